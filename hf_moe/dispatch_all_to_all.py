# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""One row per (token, expert) pair: the reference."""

from __future__ import annotations

import torch
from torch import Tensor

from .dispatch_base import ExpertDispatcher, count_groups, grouped_order, meanwhile, take_rows
from .exchange import Exchange, swap


class AllToAllDispatcher(ExpertDispatcher):
    """Each (token, expert) pair goes to the expert's rank, and its result comes back.

    What Transformers' `AllToAllEP` does, for any number of experts, any placement and with empty slots.

    Host syncs: one per layer, for the split sizes.

    Example: 8 experts on 4 ranks, top-3. Token t of rank 0 picks E0 (w0), E4 (w1) and E5 (w2).

    GPU                 0            1            2             3
                        |            |            |             |
    batch            [..t..]
    experts           E0 E1        E2 E3        E4 E5         E6 E7
    rows sent        t to 0                     t, t to 2
    local ids           0                         0, 1
    rows returned    E0(t)                   E4(t), E5(t)
    output[t]      w0 E0(t) + w1 E4(t) + w2 E5(t)
    """

    def dispatch(self, x_TD: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> Tensor:
        top_k, ranks = slots_TK.shape[1], self.num_ranks
        slots_P = slots_TK.reshape(-1)
        order_P = grouped_order(slots_P)  # by rank, since those of a rank are consecutive; empty ones are last
        counts_RE = count_groups(slots_P, self.num_slots).view(ranks, -1)
        received_RE = swap(counts_RE, self.group, "the numbers of rows")
        sent, received = torch.stack([counts_RE.sum(dim=1), received_RE.sum(dim=1)]).tolist()  # the host sync
        order_P = order_P[: sum(sent)]
        exchange = Exchange(self.group, tuple(sent), tuple(received), "rows for the experts")

        travelling = exchange.start(take_rows(x_TD, order_P // top_k))
        meanwhile()
        x_PD = travelling.wait()
        local_ids = torch.arange(self.experts_per_rank, device=x_PD.device).repeat(ranks)
        ids_P = local_ids.repeat_interleave(received_RE.reshape(-1), output_size=sum(received))
        y_PD = self.run_experts(x_PD, ids_P.unsqueeze(-1), x_PD.new_ones(sum(received), 1))

        back_PD = exchange.back("results of the experts").start(y_PD).wait()
        # empty slots keep a zero; weights are applied here, where they are
        y_TKD = back_PD.new_zeros(slots_P.shape[0], x_TD.shape[1]).index_copy(0, order_P, back_PD)
        return (y_TKD.view(*slots_TK.shape, x_TD.shape[1]) * weights_TK.unsqueeze(-1)).sum(dim=1)
