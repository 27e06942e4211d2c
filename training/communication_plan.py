# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Planning expert-parallel training for machines that are not here: memory per rank, bytes per step and link, time.

For every mesh and dispatcher. Bytes are those that a rank sends to *other* ranks, the mean over ranks:

    all-to-all            the rows for others; what a rank keeps is not sent
    all-gather            N·(R - 1)/R of the N bytes that R ranks have between them (ring), FSDP2's padding included
    reduce-scatter        N·(R - 1)/R
    all-reduce            2·N·(R - 1)/R

A ring visits the ranks of a node one after another, so of R hops as many cross nodes as there are nodes; there is one ring for
every network card, hence means. Needs no torch.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
from tqdm import tqdm

from .dispatch_traffic import DISPATCHERS, Exchange, ExpertGroup, Link, exchange_of_layer
from .model_sizes import ModelSizes, Part
from .plan_estimates import Memory, clock_of, memory_of, seconds_of
from .plan_inputs import PRECISIONS, Machine, Mesh, Precision, Workload, meshes

SHARDING = ("all-gather", "reduce-scatter", "all-reduce")  # FSDP2's collectives
_NOTHING = Link(0.0, 0.0)


@dataclass(frozen=True)
class Plan:
    """One mesh with one dispatcher.

    Attributes:
        mesh: the ranks.
        dispatcher: a short name; `"none"` where experts are not spread.
        memory: on the fullest rank.
        traffic: mean bytes that a rank sends in an optimizer step, by collective.
        compute: seconds per optimizer step.
        exchange: seconds in dispatch and combine.
        sharding: seconds in the collectives of FSDP2.
        exposed: of both, the seconds that no computation hides.
        fits: whether memory is enough.
    """

    mesh: Mesh
    dispatcher: str
    memory: Memory
    traffic: dict[str, Link]
    compute: float
    exchange: float
    sharding: float
    exposed: float
    fits: bool

    @property
    def seconds(self) -> float:
        """Of a step, with what overlaps."""
        return self.compute + self.exposed

    @property
    def seconds_in_turn(self) -> float:
        """Of a step, if nothing overlapped."""
        return self.compute + self.exchange + self.sharding

    @property
    def dispatched(self) -> Link:
        """Bytes of dispatch and combine."""
        return sum((link for name, link in self.traffic.items() if name not in SHARDING), _NOTHING)

    @property
    def sharded(self) -> Link:
        """Bytes of FSDP2's collectives."""
        return sum((self.traffic[name] for name in SHARDING), _NOTHING)

    @property
    def sent(self) -> Link:
        """All bytes that a rank sends."""
        return self.dispatched + self.sharded


def make_plans(model: ModelSizes, machine: Machine, work: Workload, dispatchers: Sequence[str] | None = None) -> list[Plan]:
    """A plan for every mesh and every dispatcher that has a use there, the fastest first.

    Those that do not fit come last; of two that differ by less than 1 %, the one that needs less memory is first.

    Args:
        model, machine, work: what, where and how.
        dispatchers: those to consider (default: all; `capacity` only if the model has a capacity factor).
    """
    found = []
    slow = work.load is not None  # a load of its own for every layer
    for mesh in tqdm(list(meshes(machine, model.num_experts)), desc="meshes", disable=not slow, leave=False):
        useful = [name for name in dispatchers or DISPATCHERS if _has_use(name, mesh, model, machine)]
        names = useful if mesh.ep > 1 else ["none"]
        found += [plan_of(model, machine, work, mesh, name) for name in names]
    return sorted(found, key=lambda plan: (not plan.fits, float(f"{plan.seconds:.3g}"), plan.memory.total))


def plan_of(model: ModelSizes, machine: Machine, work: Workload, mesh: Mesh, dispatcher: str) -> Plan:
    """The plan for one mesh and dispatcher."""
    layers = _exchanges(model, machine, work, mesh, dispatcher)
    traffic, sharding = _sharding(model, machine, work, mesh)
    if mesh.ep > 1:
        forward = sum((layer.forward for layer in layers), _NOTHING) * work.accumulation
        traffic["dispatch, forward"] = forward
        traffic["dispatch, backward"] = sum((layer.backward for layer in layers), _NOTHING) * work.accumulation
        if work.checkpointing:
            traffic["dispatch, recompute"] = forward
    memory = memory_of(model, work, mesh, layers)
    clock = clock_of(model, machine, work, layers)
    return Plan(
        mesh=mesh,
        dispatcher=dispatcher,
        memory=memory,
        traffic=traffic,
        compute=clock.compute,
        exchange=clock.exchange,
        sharding=sharding,
        exposed=max(clock.exchange - clock.hidden, clock.exchange + sharding - clock.compute),
        fits=memory.total <= machine.memory,
    )


def _has_use(name: str, mesh: Mesh, model: ModelSizes, machine: Machine) -> bool:
    if name == "capacity":
        return model.capacity_factor is not None
    return name != "hierarchical" or (mesh.ep > machine.gpus > 1 and mesh.ep % machine.gpus == 0)


def _exchanges(model: ModelSizes, machine: Machine, work: Workload, mesh: Mesh, dispatcher: str) -> list[Exchange]:
    """What each MoE layer sends, the mean over all expert-parallel groups."""
    starts = range(0, mesh.world, mesh.ep)
    layouts = Counter(tuple((start + i) // machine.gpus - start // machine.gpus for i in range(mesh.ep)) for start in starts)
    loads = work.load or (None,) * len(model.num_experts)
    found: dict[Any, Exchange] = {}
    for key in zip(model.num_experts, loads, strict=True):
        if key not in found:
            groups = [(ExpertGroup.of(key[0], nodes, key[1]), number) for nodes, number in layouts.items()]
            found[key] = Exchange.mean(
                [(exchange_of_layer(dispatcher, group, model, work), number) for group, number in groups]
            )
    return [found[key] for key in zip(model.num_experts, loads, strict=True)]


# ---------------------------------------------------------------------- FSDP2


def crossing(world: int, size: int, stride: int, gpus: int) -> float:
    """Of the hops of a ring over each group of `size` ranks that lie `stride` apart, the share between nodes."""
    if size == 1:
        return 0.0
    ranks = np.arange(world)
    last = (ranks // stride) % size == size - 1
    following = np.where(last, ranks - (size - 1) * stride, ranks + stride)
    return float((ranks // gpus != following // gpus).mean())


class _Axis(NamedTuple):
    """Groups of ranks that gather or reduce together, and what share of their hops is between nodes."""

    size: int
    across: float

    def ring(self, nbytes: float) -> Link:
        """What a rank sends to bring a piece of so many bytes once around."""
        sent = nbytes * (self.size - 1)
        return Link(sent * (1 - self.across), sent * self.across)


def _sharding(model: ModelSizes, machine: Machine, work: Workload, mesh: Mesh) -> tuple[dict[str, Link], float]:
    """Bytes of FSDP2's collectives in an optimizer step, and their seconds."""

    def axis(size: int, stride: int) -> _Axis:
        return _Axis(size, crossing(mesh.world, size, stride, machine.gpus))

    shards, replicas = axis(mesh.fsdp, 1), axis(mesh.dp_replicate, mesh.fsdp)
    expert_shards, expert_replicas = axis(mesh.efsdp, mesh.ep), axis(mesh.expert_replicas, mesh.ep * mesh.efsdp)
    if mesh.ep == 1:
        expert_shards, expert_replicas = shards, replicas
    traffic = dict.fromkeys(SHARDING, _NOTHING)
    steps = 0
    parts = Counter((part, 1.0, shards, replicas) for part in model.dense)
    for count in model.num_experts:
        of_rank = -(-count // mesh.ep)
        parts[model.experts(of_rank), count / (of_rank * mesh.ep), expert_shards, expert_replicas] += 1
    for (part, share, shard, replica), number in parts.items():
        collectives = _collectives(part, PRECISIONS[work.precision], shard, replica)
        traffic = {name: traffic[name] + collectives[name] * (share * number) for name in traffic}
        steps += number * ((3 - part.kept) * (shard.size - 1) + 2 * (replica.size - 1))
    traffic = {name: link * work.accumulation for name, link in traffic.items()}
    total = sum(traffic.values(), _NOTHING)
    return traffic, seconds_of(total, machine) + steps * work.accumulation * machine.latency


def _collectives(part: Part, precision: Precision, shards: _Axis, replicas: _Axis) -> dict[str, Link]:
    """Of one micro-batch: gathered for forward and again for backward, unless kept; then reduced."""
    numel = part.sharded(shards.size)
    gathered, reduced = (4, 4) if part.fp32 else (precision.gathered, precision.reduced)
    return {
        "all-gather": shards.ring(numel * gathered) * (1 if part.kept else 2),
        "reduce-scatter": shards.ring(numel * reduced),
        "all-reduce": replicas.ring(2 * numel * reduced / replicas.size),
    }
