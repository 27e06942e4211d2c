# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Rounds of a bounded number of rows: when all tokens want one rank, it takes more rounds, not more memory."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh

from .dispatch_base import (
    ExpertDispatcher,
    count_groups,
    expert_weights,
    grouped_order,
    meanwhile,
    smallest_integer,
    take_rows,
)
from .exchange import Exchange, swap

_LEAST_ROUNDS = 4  # of a training step under even routing, so that rows come, are run and go at once, as under any other
_LEAST_ROWS = 1024  # of a round at inference
_UNEVENNESS = 1.15  # of the fullest rank to the mean, up to which routing counts as even


class ChunkedDispatcher(ExpertDispatcher):
    """(token, expert) pairs go to the experts' ranks in rounds; no rank gets more than a bounded number in any of them.

    A round has at most `chunk_rows` rows for a rank, and in training about a quarter of what a rank gets on average: four
    rounds under even routing, and if all tokens want one rank, as many more as that one needs. Each rank sends the same share
    of what it has for a rank in every round. The rows of the next round travel while the experts run on those of this one.

    Only the sender's tokens are kept for the backward, which sends them again, with their gradients, and runs the experts
    again: 5/4 of the rows and 4/3 of the arithmetic of `AllToAllDispatcher` in a training step.

    Host syncs: one per layer, for the split sizes of all rounds.

    Example: 4 tokens on each of 4 ranks, all for E0 on rank 0, rounds of 4 rows.

    round             0                     1                     2                     3
    rows to rank 0    t0 of each rank       t1 of each rank       t2 of each rank       t3 of each rank
    meanwhile         t1s travel            t2s travel            t3s travel
    """

    chunk_rows = 16384

    def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        if self.chunk_rows < self.num_ranks:
            raise ValueError(f"`chunk_rows`={self.chunk_rows} is less than `ep_size`={self.num_ranks}: use that at least.")

    def dispatch(self, x_TD: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> Tensor:
        rounds = self._plan(slots_TK)
        with torch.no_grad():
            first = self._start_round(rounds, 0, x_TD, weights_TK)
        meanwhile()
        weights = expert_weights(self.experts)
        return _InRounds.apply(self, rounds, first, list(weights), x_TD, weights_TK, *weights.values())

    def _plan(self, slots_TK: Tensor) -> Rounds:
        """Which pairs go in which round."""
        ranks = self.num_ranks
        slots_P = slots_TK.reshape(-1)
        rank_P = slots_P // self.experts_per_rank  # `num_ranks`: none
        counts_R = count_groups(rank_P, ranks)
        received_R = swap(counts_R, self.group, "the numbers of rows")
        totals_R = swap(received_R.sum().repeat(ranks), self.group, "the numbers of rows")
        sent, received, totals = torch.stack([counts_R, received_R, totals_R]).tolist()  # the host sync

        num_rounds = self._num_rounds(totals)
        order_P = grouped_order(rank_P)[: sum(sent)]
        rank_P = rank_P[order_P]
        place_P = torch.arange(rank_P.shape[0], device=rank_P.device) - (counts_R.cumsum(0) - counts_R)[rank_P]
        round_P = (num_rounds * (place_P + 1) - 1) // counts_R[rank_P]
        order_P = order_P[grouped_order(round_P * ranks + rank_P)]
        exchanges = []
        for index in range(num_rounds):
            send, receive = (tuple(_share(n, index, num_rounds) for n in counts) for counts in (sent, received))
            exchanges.append(Exchange(self.group, send, receive, "rows for the experts"))
        pairs = order_P.split([sum(exchange.send_sizes) for exchange in exchanges])
        return Rounds(pairs, slots_P % self.experts_per_rank, slots_TK.shape[1], tuple(exchanges))

    def _num_rounds(self, totals: list[int]) -> int:
        """For so many rows to each rank. All ranks get the same."""
        largest = self.chunk_rows - self.num_ranks + 1  # shares are rounded up, at each rank by less than a row
        even = _UNEVENNESS * sum(totals) / self.num_ranks
        rows = even / max(math.ceil(even / largest), _LEAST_ROUNDS)
        if not torch.is_grad_enabled():  # a few tokens are generated in one round
            rows = max(rows, min(largest, _LEAST_ROWS))
        return max(1, math.ceil(max(totals) / max(rows, 1.0)))

    def _start_round(self, rounds: Rounds, index: int, x_TD: Tensor, weights_TK: Tensor, *more_TD: Tensor) -> Arriving:
        """Send the pairs of a round (and more rows of their tokens)."""
        pair_P = rounds.pairs[index]
        weight_P, id_P = weights_TK.reshape(-1)[pair_P], rounds.id_P[pair_P].to(smallest_integer(self.experts_per_rank))
        load_PB = torch.cat([_bytes(weight_P), _bytes(id_P)], dim=1)
        exchange = rounds.exchanges[index]
        loads = exchange.named("routing weights and expert ids").send(load_PB)
        token_P = pair_P // rounds.top_k
        rows = [exchange.send(take_rows(each_TD, token_P)) for each_TD in (x_TD, *more_TD)]
        return Arriving(exchange, loads, rows, weight_P.dtype, id_P.dtype)


@dataclass(frozen=True)
class Rounds:
    """What goes when.

    Attributes:
        pairs: of each round, the indices of the batch's pairs that this rank sends, by receiver.
        id_P: the expert of each pair of the batch, on its rank.
        top_k: pairs per token.
        exchanges: of each round.
    """

    pairs: tuple[Tensor, ...]
    id_P: Tensor
    top_k: int
    exchanges: tuple[Exchange, ...]


class Arriving(NamedTuple):
    """Rows of one round, under way."""

    exchange: Exchange
    loads: Tensor
    rows: list[Tensor]
    weight_dtype: torch.dtype
    id_dtype: torch.dtype

    def wait(self) -> tuple[Tensor, Tensor, list[Tensor]]:
        """Expert ids `[N, 1]`, weights `[N, 1]` and rows `[N, D]`."""
        load_NB = self.exchange.receive(self.loads)
        width = self.weight_dtype.itemsize
        weight_N1 = load_NB[:, :width].clone(memory_format=torch.contiguous_format).view(self.weight_dtype)
        id_N1 = load_NB[:, width:].clone(memory_format=torch.contiguous_format).view(self.id_dtype).long()
        return id_N1, weight_N1, [self.exchange.receive(each) for each in self.rows]


class _InRounds(torch.autograd.Function):
    """All rounds as one differentiable function of tokens, routing weights and the experts' weights."""

    @staticmethod
    def forward(
        ctx: Any, dispatcher: ChunkedDispatcher, rounds: Rounds, first: Arriving, names: list[str], *tensors: Tensor
    ) -> Tensor:
        x_TD, weights_TK, *_ = tensors
        ctx.dispatcher, ctx.rounds, ctx.names = dispatcher, rounds, names
        ctx.autocast = torch.is_autocast_enabled(x_TD.device.type), torch.get_autocast_dtype(x_TD.device.type)
        ctx.save_for_backward(*tensors)
        total_TD = torch.zeros_like(x_TD, dtype=torch.promote_types(x_TD.dtype, torch.float32))

        def run(id_N1: Tensor, weight_N1: Tensor, rows: list[Tensor]) -> list[Tensor]:
            return [dispatcher.run_experts(rows[0], id_N1, weight_N1)]

        def gather(pair_P: Tensor, back: list[Tensor]) -> None:
            _add_rows(total_TD, pair_P // rounds.top_k, back[0])

        _run_rounds(dispatcher, rounds, first, (x_TD, weights_TK), run, gather)
        return total_TD.to(x_TD.dtype)

    @staticmethod
    def backward(ctx: Any, grad_TD: Tensor) -> tuple[Tensor | None, ...]:
        x_TD, weights_TK, *weights = ctx.saved_tensors
        dispatcher, rounds = ctx.dispatcher, ctx.rounds
        wide = torch.promote_types(x_TD.dtype, torch.float32)
        grad_x_TD, grad_weights_P = torch.zeros_like(x_TD, dtype=wide), torch.zeros_like(weights_TK).reshape(-1)
        trained = ctx.needs_input_grad[6:]

        with _as_leaves(dispatcher.experts, ctx.names, weights, trained) as leaves:

            def run(id_N1: Tensor, weight_N1: Tensor, rows: list[Tensor]) -> list[Tensor]:
                x_ND, grad_ND = rows
                if not x_ND.shape[0]:
                    return [x_ND, weight_N1.squeeze(-1)]
                x_ND.requires_grad_()
                weight_N1.requires_grad_()
                with torch.enable_grad(), torch.autocast(x_ND.device.type, ctx.autocast[1], ctx.autocast[0]):
                    y_ND = dispatcher.run_experts(x_ND, id_N1, weight_N1)
                needed = [leaf for leaf in leaves if leaf.requires_grad]
                torch.autograd.backward(y_ND, grad_ND.to(y_ND.dtype), inputs=[x_ND, weight_N1, *needed])
                return [_grad(x_ND), _grad(weight_N1).squeeze(-1)]

            def gather(pair_P: Tensor, back: list[Tensor]) -> None:
                _add_rows(grad_x_TD, pair_P // rounds.top_k, back[0])
                grad_weights_P[pair_P] = back[1]

            tensors = (x_TD, weights_TK, grad_TD)
            first = dispatcher._start_round(rounds, 0, *tensors)
            _run_rounds(dispatcher, rounds, first, tensors, run, gather)
        grads = [_grad(leaf) if leaf.requires_grad else None for leaf in leaves]
        return None, None, None, None, grad_x_TD.to(x_TD.dtype), grad_weights_P.view_as(weights_TK), *grads


def _run_rounds(
    dispatcher: ChunkedDispatcher,
    rounds: Rounds,
    arriving: Arriving,
    tensors: tuple[Tensor, ...],
    run: Callable[[Tensor, Tensor, list[Tensor]], list[Tensor]],
    gather: Callable[[Tensor, list[Tensor]], None],
) -> None:
    """Receive, run and give back, round by round, with the next round under way meanwhile.

    Args:
        arriving: round 0.
        tensors: what `_start_round` sends of.
        run: from expert ids, routing weights and rows to the rows to give back.
        gather: takes the indices of the pairs that this rank had sent, and what came back for them.
    """
    returning: tuple[int, list[Tensor]] | None = None
    last = len(rounds.exchanges) - 1
    for index, exchange in enumerate(rounds.exchanges):
        following = dispatcher._start_round(rounds, index + 1, *tensors) if index < last else None
        back = exchange.back("results of the experts")
        sent_back = index, [back.send(each) for each in run(*arriving.wait())]
        if following is not None:
            arriving = following  # frees this round's rows
        if returning is not None:
            _receive(rounds, returning, gather)
        returning = sent_back
    if returning is not None:
        _receive(rounds, returning, gather)


def _receive(rounds: Rounds, returning: tuple[int, list[Tensor]], gather: Callable[[Tensor, list[Tensor]], None]) -> None:
    index, pending = returning
    back = rounds.exchanges[index].back("results of the experts")
    gather(rounds.pairs[index], [back.receive(each) for each in pending])


def _add_rows(total_TD: Tensor, index_P: Tensor, rows_PD: Tensor) -> None:
    """In place; see `sum_rows` for why it depends on the device."""
    rows_PD = rows_PD.to(total_TD.dtype)
    if total_TD.device.type == "cpu":
        total_TD.index_add_(0, index_P, rows_PD)
    else:
        total_TD.index_put_((index_P,), rows_PD, accumulate=True)


def _share(total: int, index: int, parts: int) -> int:
    """The `index`-th of equal parts of a number of rows, rounded so that they add up."""
    return (index + 1) * total // parts - index * total // parts


def _bytes(values_P: Tensor) -> Tensor:
    """`[P, bytes of one]`."""
    return values_P.contiguous().view(torch.uint8).view(values_P.shape[0], values_P.dtype.itemsize)


def _grad(leaf: Tensor) -> Tensor:
    return torch.zeros_like(leaf) if leaf.grad is None else leaf.grad


@contextmanager
def _as_leaves(
    experts: nn.Module, names: list[str], weights: Sequence[Tensor], trained: Sequence[bool]
) -> Iterator[list[Tensor]]:
    """Let the experts run on the weights of the forward, cut off from what they were made of.

    In the backward the module holds what FSDP or PEFT have put there: DTensors, or weights without their LoRA.
    """
    leaves = [w.detach().requires_grad_(needs) for w, needs in zip(weights, trained, strict=True)]
    places = [(experts.get_submodule(name.rpartition(".")[0])._parameters, name.rpartition(".")[2]) for name in names]
    before = [held[name] for held, name in places]
    try:
        for (held, name), leaf in zip(places, leaves, strict=True):
            held[name] = leaf  # type: ignore[assignment]
        yield leaves
    finally:
        for (held, name), parameter in zip(places, before, strict=True):
            held[name] = parameter
