# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""What a plan is for: the machines, the training, and every way to arrange the ranks. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import NamedTuple


class Precision(NamedTuple):
    """Bytes per number: of parameters, gradients and optimizer state (`stored`), of what FSDP2 gathers and reduces, and of the
    rows that dispatchers send."""

    stored: int
    gathered: int
    reduced: int
    rows: int


PRECISIONS = {
    "fp32": Precision(4, 4, 4, 4),
    "bf16": Precision(2, 2, 2, 2),  # also AdamW's state
    "mixed": Precision(4, 2, 4, 2),  # FSDP2's MixedPrecisionPolicy: fp32 weights, gradients and AdamW, bf16 compute
    "autocast": Precision(4, 4, 4, 4),  # `bf16=True` of Trainer: fp32 everywhere between matrix products
}
OPTIMIZER_STATES = {"adamw": 2, "sgd_momentum": 1, "sgd": 0}
GB = 10**9


@dataclass(frozen=True)
class Machine:
    """What the training would run on.

    Attributes:
        nodes: machines.
        gpus: of each.
        inside, across: bytes per second that one GPU sends to others of its node, and to other nodes.
        latency: seconds for each message of an all-to-all and each step of a ring.
        flops: per second of one GPU, as it achieves them.
        memory: bytes of one GPU that may be used.
    """

    nodes: int
    gpus: int
    inside: float = 450e9
    across: float = 50e9
    latency: float = 5e-6
    flops: float = 0.4 * 989e12
    memory: float = 0.9 * 80e9

    @property
    def world(self) -> int:
        return self.nodes * self.gpus


@dataclass(frozen=True)
class Workload:
    """One optimizer step of one rank.

    Attributes:
        tokens: of a micro-batch.
        sequence: length of its sequences.
        accumulation: micro-batches per step; FSDP2 reduces gradients in each.
        precision: one of `PRECISIONS`.
        optimizer: one of `OPTIMIZER_STATES`.
        checkpointing: whether layers are recomputed in backward.
        imbalance: rows of the busiest rank over the mean, beyond what uneven experts make.
        chunk_rows: of the `chunked` dispatcher.
        load: in each MoE layer, each expert's share of the assignments (default: uniform).
    """

    tokens: int = 4096
    sequence: int = 4096
    accumulation: int = 1
    precision: str = "mixed"
    optimizer: str = "adamw"
    checkpointing: bool = True
    imbalance: float = 1.0
    chunk_rows: int = 16384
    load: tuple[tuple[float, ...], ...] | None = None

    @property
    def row_bytes(self) -> int:
        """Of a number in a row that dispatchers send."""
        return PRECISIONS[self.precision].rows


@dataclass(frozen=True)
class Mesh:
    """How ranks are arranged; names as in `hf_moe.expert_mesh`."""

    dense: str
    dp_replicate: int
    fsdp: int
    expert_replicas: int
    efsdp: int
    ep: int

    @property
    def world(self) -> int:
        return self.dp_replicate * self.fsdp

    def arguments(self, dispatcher: str, chunk_rows: int | None = None) -> dict[str, object]:
        """Fields of `ExpertParallelConfig`, those with other values than its defaults."""
        found: dict[str, object] = {"ep_size": self.ep}
        if self.ep > 1:
            found["dispatcher"] = dispatcher
        if self.dense != "fsdp":
            found["dense"] = self.dense
        if self.dense == "hybrid":
            found["dp_replicate_size"] = self.dp_replicate
        if dispatcher == "chunked" and chunk_rows is not None:
            found["chunk_rows"] = chunk_rows
        return found


def meshes(machine: Machine, num_experts: Sequence[int]) -> Iterator[Mesh]:
    """Every arrangement that `ExpertParallelConfig` can name, without tensor parallelism.

    Args:
        machine: gives the number of ranks.
        num_experts: E of each MoE layer.
    """
    world = machine.world
    divisors = [size for size in range(1, world + 1) if world % size == 0]
    kinds = [("fsdp", 1), *(("hybrid", size) for size in divisors if 1 < size < world)]
    kinds += [("replicate", world)] if world > 1 else []
    for ep in divisors:
        if ep > max(num_experts):
            break
        for dense, replicas in kinds:
            copies = world // ep
            expert_replicas = copies if dense == "replicate" or copies % replicas else replicas
            if any(count % (ep * (copies // expert_replicas)) for count in num_experts):
                expert_replicas = copies
            if ep == 1:  # experts lie in their layer's group
                expert_replicas = replicas
            yield Mesh(dense, replicas, world // replicas, expert_replicas, copies // expert_replicas, ep)
