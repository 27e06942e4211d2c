# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""What each dispatcher sends for one MoE layer, expected over routings: rows and bytes, inside and across nodes.

Letters: T tokens of a rank, K experts per token, E experts, R ranks of an expert-parallel group. Needs no torch.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from typing import Protocol

import numpy as np

from .model_sizes import ModelSizes


@dataclass(frozen=True)
class Link:
    """Bytes that a rank sends to ranks of its own node, and to those of others."""

    inside: float
    across: float

    def __add__(self, other: Link) -> Link:
        return Link(self.inside + other.inside, self.across + other.across)

    def __mul__(self, factor: float) -> Link:
        return Link(self.inside * factor, self.across * factor)

    @property
    def total(self) -> float:
        return self.inside + self.across


# ---------------------------------------------------------------------- routing


def chance_of_none(load: tuple[float, ...], top_k: int, experts: range) -> float:
    """The probability that a token goes to none of some neighbouring experts.

    K different experts are drawn with P(set) ∝ Π w_e, the w such that each gets its share of the assignments. Of a uniform
    load that is hypergeometric: C(E - n, K) / C(E, K).

    Args:
        load: of each expert, its share of the assignments; sums to 1.
        top_k: K.
        experts: their numbers.
    """
    if min(load) == max(load):
        return math.comb(len(load) - len(experts), top_k) / math.comb(len(load), top_k)
    before, after = _sums_of_sets(load, top_k)
    return float(before[experts.start] @ after[experts.stop][::-1] / before[-1, top_k])


@functools.lru_cache(maxsize=1024)
def _sums_of_sets(load: tuple[float, ...], top_k: int, rounds: int = 50) -> tuple[np.ndarray, np.ndarray]:
    """Elementary symmetric polynomials of orders 0…K of the w of experts 0…e-1, and of experts e…E-1, `[E + 1, K + 1]` each.

    The w are found by fixed-point iteration: an expert that is drawn too rarely gets a larger one.
    """
    wanted_E = np.clip(np.array(load) * top_k, 0.0, 1.0 - 1e-9)
    odds_E = wanted_E / (1 - wanted_E)
    for _ in range(rounds):
        odds_E = odds_E / odds_E.max()
        before, after = _polynomials(odds_E, top_k), _polynomials(odds_E[::-1], top_k)[::-1]
        without_E = (before[:-1, :top_k] * after[1:, top_k - 1 :: -1]).sum(axis=1)  # sets of K - 1 of the others
        drawn_E = odds_E * without_E / before[-1, top_k]
        odds_E = odds_E * np.divide(wanted_E, drawn_E, out=np.ones_like(wanted_E), where=drawn_E > 0)
    return before, after


def _polynomials(odds_E: np.ndarray, top_k: int) -> np.ndarray:
    """Of the first e numbers, the sum over sets of each size up to K of the product of their odds, `[E + 1, K + 1]`."""
    sums = np.zeros((len(odds_E) + 1, top_k + 1))
    sums[0, 0] = 1.0
    for e, odds in enumerate(odds_E):
        sums[e + 1] = sums[e]
        sums[e + 1, 1:] += odds * sums[e, :-1]
    return sums


@dataclass(frozen=True)
class ExpertGroup:
    """An expert-parallel group and how often its experts are wanted.

    Attributes:
        nodes: the node of each of the R ranks.
        load: of each of the E experts, its share of the assignments.
    """

    nodes: tuple[int, ...]
    load: tuple[float, ...]

    @classmethod
    def of(cls, num_experts: int, nodes: Sequence[int], load: Sequence[float] | None = None) -> ExpertGroup:
        """With a uniform load, unless one is given."""
        return cls(tuple(nodes), tuple(load) if load is not None else (1.0 / num_experts,) * num_experts)

    @property
    def size(self) -> int:
        """R."""
        return len(self.nodes)

    @property
    def per_rank(self) -> int:
        """Experts on the fullest rank."""
        return -(-len(self.load) // self.size)

    def experts(self, ranks: Sequence[int]) -> range:
        """The experts of neighbouring ranks: slot s lies on rank s // ceil(E / R)."""
        most = len(self.load)
        return range(min(ranks[0] * self.per_rank, most), min((ranks[-1] + 1) * self.per_rank, most))

    def share(self) -> np.ndarray:
        """Of each rank, its share of the assignments, `[R]`."""
        return np.bincount(np.arange(len(self.load)) // self.per_rank, weights=self.load, minlength=self.size)

    def wanted(self, top_k: int) -> np.ndarray:
        """Of each rank, the chance that a token goes to any of its experts, `[R]`."""
        return _wanted(self.load, self.size, top_k)

    def node_ranks(self) -> dict[int, list[int]]:
        """The ranks of each node."""
        members: dict[int, list[int]] = {}
        for rank, node in enumerate(self.nodes):
            members.setdefault(node, []).append(rank)
        return members

    def sent(self, to_R: np.ndarray) -> Link:
        """The mean over ranks of what each sends to the others, if every rank has `to_R[p]` for rank p."""
        nodes = np.array(self.nodes)
        same_R = (nodes[:, None] == nodes[None, :]).sum(axis=0)
        inside = float((to_R * (same_R - 1)).sum()) / self.size
        return Link(inside, float((to_R * (self.size - same_R)).sum()) / self.size)


@functools.lru_cache(maxsize=4096)
def _wanted(load: tuple[float, ...], ranks: int, top_k: int) -> np.ndarray:
    """See `ExpertGroup.wanted`; meshes with the same `ep` ask the same."""
    group = ExpertGroup((0,) * ranks, load)
    return np.array([1.0 - chance_of_none(load, top_k, group.experts([rank])) for rank in range(ranks)])


# ---------------------------------------------------------------------- dispatchers

COUNT, ROUTING_WEIGHT = 8, 4  # bytes: the numbers of rows travel as int64, routing weights as fp32


class Batch(Protocol):
    """What of a workload the rows of one micro-batch depend on: see `Workload`."""

    @property
    def tokens(self) -> int: ...

    @property
    def sequence(self) -> int: ...

    @property
    def imbalance(self) -> float: ...

    @property
    def chunk_rows(self) -> int: ...

    @property
    def row_bytes(self) -> int: ...


@dataclass(frozen=True)
class Exchange:
    """What one MoE layer exchanges for one micro-batch.

    Attributes:
        forward, backward: the mean bytes that a rank sends. What is recomputed sends as much as forward.
        rows: of the forward, to other ranks, one way.
        hot: what the busiest rank sends or receives over the mean.
        busiest_rows: (row, expert) pairs that the experts of the busiest rank compute.
        held_rows: of these, those whose activations it holds for backward.
        buffer: bytes of the rows that lie on the busiest rank between the exchanges.
        kept: of these, bytes that lie there until backward.
        messages: to or from other ranks, of the forward; each costs its latency.
        overlap: the share of the experts' time in which rows travel.
        meanwhile: whether the shared experts run while rows travel.
        reruns: how often backward runs the experts' forward again.
    """

    forward: Link
    backward: Link
    rows: float
    hot: float
    buffer: float
    kept: float
    messages: float
    busiest_rows: float = 0.0
    held_rows: float = 0.0
    overlap: float = 0.0
    meanwhile: bool = True
    reruns: int = 0

    @classmethod
    def mean(cls, found: Sequence[tuple[Exchange, int]]) -> Exchange:
        """Of expert-parallel groups that lie differently on the nodes; each with how many there are."""
        total = sum(number for _, number in found)
        forward, backward = Link(0.0, 0.0), Link(0.0, 0.0)
        for exchange, number in found:
            forward += exchange.forward * (number / total)
            backward += exchange.backward * (number / total)
        return replace(found[0][0], forward=forward, backward=backward)

    def passes(self, checkpointing: bool) -> list[Link]:
        """What the busiest rank sends, pass by pass."""
        again = [self.forward] if checkpointing else []
        return [link * self.hot for link in (self.forward, *again, self.backward)]


def exchange_of_layer(dispatcher: str, group: ExpertGroup, model: ModelSizes, batch: Batch) -> Exchange:
    """What a dispatcher sends for one MoE layer and micro-batch.

    Args:
        dispatcher: one of `DISPATCHERS`, or `"none"`: experts are not spread.
        group: the ranks and the load.
        model, batch: sizes.
    """
    share_R = group.share()
    busiest = batch.tokens * model.top_k * group.size * float(share_R.max()) * batch.imbalance
    if group.size == 1:
        found = Exchange(Link(0.0, 0.0), Link(0.0, 0.0), rows=0.0, hot=1.0, buffer=0.0, kept=0.0, messages=0.0)
    else:
        found = DISPATCHERS[dispatcher](group, share_R, model, batch)
    return replace(found, busiest_rows=busiest, held_rows=min(busiest, found.held_rows or busiest))


def _all_to_all(group: ExpertGroup, share_R: np.ndarray, model: ModelSizes, batch: Batch) -> Exchange:
    """A row per (token, expert) pair there and back."""
    row, pairs_R = model.hidden * batch.row_bytes, batch.tokens * model.top_k * share_R
    counts_R = np.full(group.size, COUNT * group.per_rank)
    return _exchange(group, pairs_R, 2 * pairs_R * row + counts_R, 2 * pairs_R * row, batch, row, exchanges=3)


def _deduplicated(group: ExpertGroup, share_R: np.ndarray, model: ModelSizes, batch: Batch) -> Exchange:
    """A row per (token, rank) pair there and back; of each (token, expert) pair a weight and a mark."""
    row = model.hidden * batch.row_bytes
    rows_R, pairs_R = batch.tokens * group.wanted(model.top_k), batch.tokens * model.top_k * share_R
    forward_R = 2 * rows_R * row + pairs_R * (ROUTING_WEIGHT + integer_bytes(2 * group.per_rank - 1)) + 2 * COUNT
    return _exchange(group, rows_R, forward_R, 2 * rows_R * row + pairs_R * ROUTING_WEIGHT, batch, row, exchanges=5)


def _capacity(group: ExpertGroup, share_R: np.ndarray, model: ModelSizes, batch: Batch) -> Exchange:
    """Buffers of fixed sizes, each row with K weights and expert ids; the sizes are agreed on by an all-reduce on the host."""
    row, rows_R = model.hidden * batch.row_bytes, np.zeros(group.size)
    capacity = rows_per_expert(len(group.load), model, batch)
    for rank in range(group.size):
        rows_R[rank] = min(batch.tokens, len(group.experts([rank])) * capacity)
    agreed_R = np.full(group.size, 2 * 2 * COUNT / group.size)
    forward_R = rows_R * (2 * row + model.top_k * (ROUTING_WEIGHT + integer_bytes(group.per_rank))) + agreed_R
    found = _exchange(group, rows_R, forward_R, rows_R * (2 * row + model.top_k * ROUTING_WEIGHT), batch, row, exchanges=5)
    buffer = 2 * row * float(rows_R.sum() + group.size * rows_R.max())  # as large whatever the routing
    return replace(found, hot=float(rows_R.max() / rows_R.mean()), buffer=buffer, kept=buffer)


def _hierarchical(group: ExpertGroup, share_R: np.ndarray, model: ModelSizes, batch: Batch) -> Exchange:
    """Across nodes a row per (token, node) pair, then inside the node as deduplicated, for the rows of all nodes."""
    row, members = model.hidden * batch.row_bytes, group.node_ranks()
    nodes, size = len(members), len(next(iter(members.values())))
    weights = ROUTING_WEIGHT + integer_bytes(2 * size * group.per_rank - 1)
    rows_N, pairs_N = np.zeros(nodes), np.zeros(nodes)
    for index, ranks in enumerate(members.values()):
        rows_N[index] = batch.tokens * (1 - chance_of_none(group.load, model.top_k, group.experts(ranks)))
        pairs_N[index] = batch.tokens * model.top_k * share_R[ranks].sum()
    others = (nodes - 1) / nodes
    across = float((2 * rows_N * row + pairs_N * weights).sum()) * others + 2 * COUNT * (nodes - 1)
    across_back = float((2 * rows_N * row + pairs_N * ROUTING_WEIGHT).sum()) * others

    # every rank of a node hands on its own tokens and those that `nodes - 1` others have sent it
    rows_R, pairs_R = nodes * batch.tokens * group.wanted(model.top_k), nodes * batch.tokens * model.top_k * share_R
    inside_R = 2 * rows_R * row + pairs_R * (ROUTING_WEIGHT + integer_bytes(2 * group.per_rank - 1)) + 2 * 2 * COUNT
    back_R = 2 * rows_R * row + pairs_R * ROUTING_WEIGHT
    found = _exchange(group, rows_R, inside_R, back_R, batch, row, exchanges=0)
    received = float(rows_R.max()) * size + float(rows_N.max()) * (nodes - 1)
    buffer = 2 * row * batch.imbalance * (received + batch.tokens * model.top_k)
    return replace(
        found,
        forward=Link(group.sent(inside_R).inside, across),
        backward=Link(group.sent(back_R).inside, across_back),
        rows=group.sent(rows_R).inside + float(rows_N.sum()) * others,
        buffer=buffer,
        kept=buffer,
        messages=5.0 * (nodes - 1) + 10.0 * (size - 1),
    )


def _chunked(group: ExpertGroup, share_R: np.ndarray, model: ModelSizes, batch: Batch) -> Exchange:
    """A row, a weight and an id per (token, expert) pair; backward sends all of it again, with the gradients."""
    row, pairs_R = model.hidden * batch.row_bytes, batch.tokens * model.top_k * share_R
    load = ROUTING_WEIGHT + integer_bytes(group.per_rank)
    rounds, most = rounds_of(group.size, float(pairs_R.max()) * group.size * batch.imbalance, model, batch)
    found = _exchange(
        group, pairs_R, pairs_R * (2 * row + load) + 2 * COUNT, pairs_R * (3 * row + load + ROUTING_WEIGHT), batch, row,
        exchanges=2 + 3 * rounds,
    )  # fmt: skip
    return replace(
        found, buffer=4 * row * most + batch.tokens * row, kept=batch.tokens * row, held_rows=float(most),
        overlap=(rounds - 1) / rounds, reruns=1,
    )  # fmt: skip


# By the short names of `hf_moe.dispatchers`.
DISPATCHERS: dict[str, Callable[[ExpertGroup, np.ndarray, ModelSizes, Batch], Exchange]] = {
    "all_to_all": _all_to_all,
    "deduplicated": _deduplicated,
    "capacity": _capacity,
    "hierarchical": _hierarchical,
    "chunked": _chunked,
}


def _exchange(
    group: ExpertGroup,
    rows_R: np.ndarray,
    forward_R: np.ndarray,
    backward_R: np.ndarray,
    batch: Batch,
    row: int,
    exchanges: int,
) -> Exchange:
    """Of what every rank has for rank p: rows, and bytes both ways."""
    hot = float(rows_R.max() / rows_R.mean()) * batch.imbalance
    held = float(rows_R.sum()) + group.size * float(rows_R.max()) * batch.imbalance  # sent, and received by the busiest
    return Exchange(
        forward=group.sent(forward_R), backward=group.sent(backward_R), rows=group.sent(rows_R).total, hot=hot,
        buffer=2 * row * held, kept=2 * row * held, messages=exchanges * (group.size - 1.0),
    )  # fmt: skip


def rows_per_expert(num_experts: int, model: ModelSizes, batch: Batch) -> int:
    """The most rows that one expert gets of a rank's batch: see `hf_moe.routing.most_rows_per_expert`."""
    if model.capacity_factor is None:
        return batch.tokens
    length = min(batch.sequence, batch.tokens)
    most = math.ceil(length * (model.capacity_factor * model.top_k / num_experts) - 1e-9)
    return batch.tokens // length * min(length, most)


def rounds_of(ranks: int, most_received: float, model: ModelSizes, batch: Batch) -> tuple[int, int]:
    """How many rounds `chunked` takes if the busiest rank gets so many rows, and the most rows of a round."""
    most = max(min(batch.chunk_rows, -(-batch.tokens * model.top_k // 2)), 2 * ranks)
    return max(1, math.ceil(most_received / (most - ranks + 1))), most


def integer_bytes(largest: int) -> int:
    """Of the smallest of uint8, int16 and int32 that holds 0 … `largest`."""
    return 1 if largest < 2**8 else 2 if largest < 2**15 else 4
