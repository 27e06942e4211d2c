# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Buffers of a fixed size: nothing that the device computed is read back to the host."""

from __future__ import annotations

from weakref import WeakKeyDictionary

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed import ProcessGroup
from torch.distributed.device_mesh import DeviceMesh
from torch.nn import functional as F

from .dispatch_base import (
    ExpertDispatcher,
    Pairs,
    count_groups,
    grouped_order,
    meanwhile,
    smallest_integer,
    sum_rows,
    take_rows,
)
from .dispatch_scope import current_dispatch
from .exchange import Exchange, failing_as


class CapacityDispatcher(ExpertDispatcher):
    """Each rank sends each other a buffer of `min(T, experts there · C)` rows, however many of them are filled.

    C is the layer's capacity, the most tokens of a rank's batch that one expert gets; without one it is T. So everything fits
    and nothing is dropped here. As in `DeduplicatedDispatcher` a token goes once to a rank, with its expert ids and weights;
    rows that are not filled have no experts. The rank then runs at most `R · experts · C` (row, expert) pairs.

    Host syncs: none with the device. All shapes follow from T and C, of which the ranks use the largest of any: unless
    `equal_batches` is set, they tell each other on the host (on CPUs, by gloo) before each call. While a CUDA graph is being
    captured, and when it is replayed, every rank has to have the same T and C.

    Example: 8 experts on 4 ranks, 4 tokens per rank, C = 1: buffers of min(4, 2 · 1) = 2 rows. t0 and t3 of rank 0 pick E4, E5.

    GPU                 0            1            2            3
                        |            |            |            |
    batch         [t0 t1 t2 t3]
    experts           E0 E1        E2 E3        E4 E5        E6 E7
    buffers of 0      [- -]        [- -]       [t0 t3]       [- -]    "-": a row without experts
    """

    equal_batches = False  # whether all ranks are known to have the same T and C

    def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.host_group = _host_group(self.group)

    def dispatch(self, x_TD: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> Tensor:
        tokens, top_k = slots_TK.shape
        most_tokens, capacity = self._agree(tokens)
        buffers = [min(most_tokens, experts * capacity) for experts in self.experts_of_ranks()]
        exchange = Exchange(self.group, tuple(buffers), (buffers[self.rank],) * self.num_ranks, "rows for the experts")
        rank_TK = slots_TK // self.experts_per_rank  # `num_ranks`: none
        token_N = self._fill(rank_TK, buffers)

        # one more row stands for the rows that are not filled
        local_NK = F.pad(slots_TK % self.experts_per_rank, (0, 0, 0, 1))[token_N]
        to_NK = F.pad(rank_TK, (0, 0, 0, 1), value=self.num_ranks)[token_N]
        here_NK = to_NK == (torch.arange(token_N.shape[0], device=token_N.device) // max(buffers[0], 1)).unsqueeze(-1)
        id_dtype = smallest_integer(self.experts_per_rank)
        ids_NK = torch.where(here_NK, local_NK, self.experts_per_rank).to(id_dtype)
        weights_NK = take_rows(F.pad(weights_TK, (0, 0, 0, 1)), token_N).masked_fill(~here_NK, 0.0)

        ids = exchange.named("expert ids").start(ids_NK.view(torch.uint8))  # as bytes: NCCL has no 16-bit integers
        weights = exchange.times(top_k, "routing weights").start(weights_NK.reshape(-1))
        rows = exchange.start(take_rows(F.pad(x_TD, (0, 0, 0, 1)), token_N))
        meanwhile()
        x_ND, w_P = rows.wait(), weights.wait()
        pairs = self._taken(ids.wait().view(id_dtype).long().reshape(-1), w_P, top_k, capacity)
        back_ND = exchange.back("results of the experts").start(self.run_pairs(x_ND, pairs)).wait()
        return sum_rows(back_ND, token_N, tokens + 1)[:tokens]

    def experts_of_ranks(self) -> list[int]:
        """How many experts lie on each rank."""
        left = getattr(self.experts, "num_global_experts", self.num_slots)
        return [min(self.experts_per_rank, max(0, left - rank * self.experts_per_rank)) for rank in range(self.num_ranks)]

    def _fill(self, rank_TK: Tensor, buffers: list[int]) -> Tensor:
        """Which token lies in each row of the buffers, rank after rank; T where none does."""
        tokens = rank_TK.shape[0]
        token_TK = torch.arange(tokens, device=rank_TK.device).unsqueeze(-1)
        table = self.num_ranks * tokens
        needed_RT = count_groups((rank_TK * tokens + token_TK).reshape(-1), table).view(self.num_ranks, tokens) > 0
        rank_R1 = torch.arange(self.num_ranks, device=rank_TK.device).unsqueeze(-1)
        # only the last ranks have shorter buffers, so each begins at a multiple of the first one's length
        row_RT = needed_RT.cumsum(dim=1) - 1 + rank_R1 * buffers[0]
        fits_RT = row_RT < (rank_R1 + 1) * buffers[0]
        assert_on_device((fits_RT | ~needed_RT).all(), "more tokens for a rank than `rows_per_expert` allows")
        row_RT = torch.where(needed_RT, row_RT, sum(buffers)).clamp(max=sum(buffers))
        token_N = torch.full((sum(buffers) + 1,), tokens, device=rank_TK.device)
        return token_N.scatter_(0, row_RT.reshape(-1), token_TK.T.expand_as(row_RT).reshape(-1))[:-1]

    def _taken(self, ids_P: Tensor, weight_P: Tensor, top_k: int, capacity: int) -> Pairs:
        """The pairs that have an expert, of N · K: a fixed number in which all fit, those without an expert last."""
        here = self.num_experts_here
        fixed = min(ids_P.shape[0], self.num_ranks * here * capacity)
        assert_on_device((ids_P < here).sum() <= fixed, "more rows for an expert than `rows_per_expert` allows")
        order_P = grouped_order(ids_P)[:fixed]
        return Pairs(order_P // top_k, ids_P[order_P].clamp(max=here), weight_P[order_P])

    def _agree(self, tokens: int) -> tuple[int, int]:
        """The largest T and C of any rank."""
        scope = current_dispatch()
        capacity = tokens if scope is None or scope.rows_per_expert is None else min(tokens, scope.rows_per_expert)
        if self.equal_batches or (torch.cuda.is_available() and torch.cuda.is_current_stream_capturing()):
            return tokens, capacity
        sizes = torch.tensor([tokens, capacity], device="cpu")
        with failing_as("the sizes of buffers", self.host_group):
            dist.all_reduce(sizes, dist.ReduceOp.MAX, group=self.host_group)
        most_tokens, most_rows = sizes.numpy().tolist()
        return most_tokens, most_rows


def assert_on_device(condition: Tensor, what: str) -> None:
    """Fail where the tensor lies, without waiting for it."""
    torch._assert_async(condition, f"The `capacity` dispatcher got {what}. Use `dispatcher='deduplicated'`.")


_HOST_GROUPS: WeakKeyDictionary[ProcessGroup, ProcessGroup] = WeakKeyDictionary()


def _host_group(group: ProcessGroup) -> ProcessGroup:
    """The same ranks, with a backend for tensors on the host."""
    if torch.device("cpu") in group._device_types:
        return group
    if group not in _HOST_GROUPS:
        ranks = dist.get_process_group_ranks(group)
        _HOST_GROUPS[group] = dist.new_group(ranks, backend="gloo", use_local_synchronization=True)
    return _HOST_GROUPS[group]
