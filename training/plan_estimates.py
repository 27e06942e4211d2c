# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""How much memory a plan needs and how long its step takes. Parameters, gradients and optimizer state are exact, the rest are
estimates. Needs no torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from .dispatch_traffic import Exchange, Link
from .model_sizes import ModelSizes
from .plan_inputs import OPTIMIZER_STATES, PRECISIONS, Machine, Mesh, Precision, Workload


@dataclass(frozen=True)
class Memory:
    """Bytes on the fullest rank.

    Attributes:
        weights, gradients, optimizer: this rank's shards.
        gathered: whole parameters of the layers that compute, and a layer's whole gradients.
        activations: what backward needs.
        dispatch: rows sent and received.
    """

    weights: float
    gradients: float
    optimizer: float
    gathered: float
    activations: float
    dispatch: float

    @property
    def total(self) -> float:
        return sum(vars(self).values())


def memory_of(model: ModelSizes, work: Workload, mesh: Mesh, layers: Sequence[Exchange]) -> Memory:
    """The memory of a mesh.

    Args:
        model, work, mesh: what, how and where.
        layers: what each MoE layer exchanges.
    """
    precision = PRECISIONS[work.precision]
    weights = 0
    for part in model.dense:
        if not part.again:
            weights += part.sharded(mesh.fsdp) * (4 if part.fp32 else precision.stored)
    for count in model.num_experts:
        weights += model.experts(-(-count // mesh.ep)).sharded(mesh.fsdp if mesh.ep == 1 else mesh.efsdp) * precision.stored
    largest = max(layers, key=lambda layer: layer.buffer)
    kept = 0.0 if work.checkpointing else sum(layer.kept for layer in layers) - largest.kept
    return Memory(
        weights=weights,
        gradients=weights,
        optimizer=OPTIMIZER_STATES[work.optimizer] * weights,
        gathered=_gathered(model, precision, mesh),
        activations=_activations(model, work, layers),
        dispatch=largest.buffer + kept,
    )


def _gathered(model: ModelSizes, precision: Precision, mesh: Mesh) -> float:
    """Whole parameters: the head and its gradient, a layer that computes, the next one on its way, the gradients of one."""
    head = sum(part.numel for part in model.dense if part.kept)
    largest = max((part.numel for part in model.dense if not part.kept), default=0)
    layer = largest + max(-(-count // mesh.ep) for count in model.num_experts) * model.expert_numel
    return float((2 * head + 3 * layer) * precision.gathered)


def _activations(model: ModelSizes, work: Workload, layers: Sequence[Exchange]) -> float:
    """What backward needs, roughly: flash attention, the inputs of every matrix product and activation, fp32 logits.

    Of a row that an expert gets: its input, gate, up, their product and the output.
    """
    size = work.row_bytes
    beside = work.tokens * (6 * model.hidden + 4 * model.attention_width + 4 * model.shared_width) * size
    of_row = (2 * model.hidden + 4 * model.expert_width) * size
    counts = zip(model.num_experts, layers, strict=True)
    per_layer = [beside + work.tokens * count * 12 + layer.held_rows * of_row for count, layer in counts]
    logits = work.tokens * model.vocab * (size + 8)
    if work.checkpointing:
        return max(per_layer) + model.num_layers * work.tokens * model.hidden * size + logits
    dense_layers = (model.num_layers - len(layers)) * (beside + work.tokens * 16 * model.hidden * size)
    return sum(per_layer) + dense_layers + logits


@dataclass(frozen=True)
class Clock:
    """Seconds of an optimizer step.

    Attributes:
        compute: of the busiest rank.
        exchange: in which rows travel.
        hidden: of these, those in which something is computed.
    """

    compute: float
    exchange: float
    hidden: float


def clock_of(model: ModelSizes, machine: Machine, work: Workload, layers: Sequence[Exchange]) -> Clock:
    """The time of a step; arguments as `memory_of`.

    A forward is 2 operations per weight and token, and attention; backward is two forwards, gradient checkpointing one more.
    """
    looked_up = sum(part.numel for part in model.dense if part.name == "embedding")
    weights = sum(part.numel for part in model.dense if not part.again) - looked_up
    attention = 4 * work.sequence * model.attention_width * model.num_layers
    passes = 4 if work.checkpointing else 3
    compute = passes * work.tokens * (2 * weights + attention) / machine.flops
    shared = work.tokens * 6 * model.hidden * model.shared_width / machine.flops
    exchange, hidden = 0.0, 0.0
    for layer in layers:
        experts = layer.busiest_rows * 2 * model.expert_numel / machine.flops
        compute += (passes + layer.reruns) * experts
        meanwhile = layer.overlap * experts + (shared if layer.meanwhile else 0.0)
        for link in layer.passes(work.checkpointing):
            seconds = seconds_of(link, machine) + layer.messages * machine.latency
            exchange += seconds
            hidden += min(meanwhile, seconds)
    return Clock(*(work.accumulation * seconds for seconds in (compute, exchange, hidden)))


def seconds_of(link: Link, machine: Machine) -> float:
    """To send so many bytes; the network and the links inside a node are busy at the same time."""
    return max(link.inside / machine.inside, link.across / machine.across)
