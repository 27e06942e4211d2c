# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""One row per (token, rank): a token goes once to each rank that needs it, and one sum comes back."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from .dispatch_base import (
    ExpertDispatcher,
    Pairs,
    count_groups,
    flat_pairs,
    grouped_order,
    meanwhile,
    smallest_integer,
    sum_rows,
    take_rows,
)
from .exchange import Exchange, Travelling, swap


class DeduplicatedDispatcher(ExpertDispatcher):
    """A token goes once to each rank that holds experts of it; these are weighted and summed there.

    With the rows go the pairs: an expert id of one or two bytes and a weight for each. At 4 ranks, 128 experts and top-8 a
    token needs 2.7 other ranks on average, where `AllToAllDispatcher` sends 6 rows.

    Host syncs: one per layer, for the split sizes.

    Example: 8 experts on 4 ranks, top-3. Token t of rank 0 picks E0 (w0), E4 (w1) and E5 (w2).

    GPU                 0            1                2               3
                        |            |                |               |
    batch            [..t..]
    experts           E0 E1        E2 E3            E4 E5           E6 E7
    rows sent        t to 0                        t to 2
    pairs sent       (0, w0)                   (0, w1), (1, w2)
    rows returned   w0 E0(t)               w1 E4(t) + w2 E5(t)
    output[t]       the sum of the rows that came back
    """

    def dispatch(self, x_TD: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> Tensor:
        pairs = flat_pairs(slots_TK % self.experts_per_rank, weights_TK)
        rank_P = slots_TK.reshape(-1) // self.experts_per_rank  # `num_ranks`: none
        sent = send_once(x_TD, pairs, rank_P, self.experts_per_rank, self.group)
        meanwhile()
        x_ND, received = sent.wait()
        return sent.give_back(self.run_pairs(x_ND, received))


@dataclass(frozen=True)
class SentOnce:
    """Rows and their pairs under way, and what is needed to bring the results back.

    Attributes:
        rows, weights, marks: what travels; a mark is an expert id, doubled, plus one on the first pair of a row.
        exchange: of the rows.
        row_N: the sender's row of each row sent.
        num_rows: of the sender.
        mark_dtype: of the marks, which travel as bytes.
    """

    rows: Travelling
    weights: Travelling
    marks: Travelling
    exchange: Exchange
    row_N: Tensor
    num_rows: int
    mark_dtype: torch.dtype

    def wait(self) -> tuple[Tensor, Pairs]:
        """The rows that came, `[N, D]`, and their pairs."""
        rows_ND, weight_P = self.rows.wait(), self.weights.wait()
        marks_P = self.marks.wait().view(self.mark_dtype).long()
        return rows_ND, Pairs((marks_P & 1).cumsum(0) - 1, marks_P >> 1, weight_P)

    def give_back(self, y_ND: Tensor) -> Tensor:
        """One row of results for each row that came, summed for the sender's rows: `[num_rows, D]`."""
        back_ND = self.exchange.back("results of the experts").start(y_ND).wait()
        return sum_rows(back_ND, self.row_N, self.num_rows)


def send_once(x_TD: Tensor, pairs: Pairs, rank_P: Tensor, num_ids: int, group: ProcessGroup) -> SentOnce:
    """Start to send each row once to each rank of a group that one of its pairs belongs to.

    Host syncs: one, for the split sizes.

    Args:
        x_TD: rows.
        pairs: their pairs.
        rank_P: the rank of the group each pair goes to; the group's size for nowhere.
        num_ids: ids of the pairs are below it.
        group: the ranks.
    """
    tokens, ranks = x_TD.shape[0], group.size()
    cell_P = rank_P * tokens + pairs.row_P  # cells of a table ranks × rows
    pairs_RT = count_groups(cell_P, ranks * tokens)
    needed_RT = pairs_RT > 0
    counts_R2 = torch.stack([needed_RT.view(ranks, tokens).sum(dim=1), pairs_RT.view(ranks, tokens).sum(dim=1)], dim=1)
    received_R2 = swap(counts_R2, group, "the numbers of rows")
    rows_out, pairs_out, rows_in, pairs_in = torch.cat([counts_R2, received_R2], dim=1).t().tolist()  # the host sync

    order_P = grouped_order(cell_P)[: sum(pairs_out)]
    row_N = grouped_order((~needed_RT).to(torch.uint8))[: sum(rows_out)] % max(tokens, 1)
    cell_P = cell_P[order_P]
    first_P = torch.ones_like(cell_P)
    first_P[1:] = cell_P[1:] != cell_P[:-1]
    mark_dtype = smallest_integer(2 * num_ids - 1)
    marks_P = (2 * pairs.id_P[order_P] + first_P).to(mark_dtype)

    exchange = Exchange(group, tuple(rows_out), tuple(rows_in), "rows for the experts")
    of_pairs = Exchange(group, tuple(pairs_out), tuple(pairs_in), "routing weights")
    of_bytes = of_pairs.times(mark_dtype.itemsize, "expert ids")  # as bytes: NCCL has no 16-bit integers
    marks = of_bytes.start(marks_P.view(torch.uint8))
    weights = of_pairs.start(pairs.weight_P[order_P])
    return SentOnce(exchange.start(take_rows(x_TD, row_N)), weights, marks, exchange, row_N, tokens, mark_dtype)
