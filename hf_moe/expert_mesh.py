# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Which rank does what: the meshes of expert parallelism, as Transformers' `DistributedConfig` takes them.

Two views of the same ranks (W of them):

    dense parameters   dp_replicate × fsdp  × tp      a batch per (dp_replicate, fsdp); sharded over fsdp
    experts            dp_replicate × efsdp × ep      whole experts per ep rank; sharded over efsdp

`ep` is innermost, so that an expert-parallel group is a run of neighbouring ranks: with `ep_size` ≤ the GPUs of a node, tokens
never leave it. Transformers' own config ties both views to one `dp_replicate`, so dense parameters have to be sharded over the
ranks of an expert-parallel group. Here the views are free of each other: dense parameters may be replicated as well.
"""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import TYPE_CHECKING, Any, Literal, NamedTuple

import torch
from torch import nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.distributed_c10d import _set_pg_timeout
from transformers.distributed import DistributedConfig
from transformers.distributed.utils import TransformersDeviceMesh

from .expert_sharding import sharded_experts

Dense = Literal["fsdp", "replicate", "hybrid"]


class ExpertView(NamedTuple):
    """The experts' view of the ranks."""

    dp_replicate: int
    efsdp: int
    ep: int


class Meshes(TransformersDeviceMesh):
    """Transformers' meshes; what experts are sharded over includes their replicas, whether or not dense parameters have any."""

    def get_mesh(self, dims: str | tuple[str, ...]) -> DeviceMesh:
        """The mesh of some axes; `"efsdp"` comes with the experts' `"dp_replicate"` where there are replicas."""
        if dims == "efsdp" and self._expert_mesh["dp_replicate"].size() > 1:
            dims = ("dp_replicate", "efsdp")
        return super().get_mesh(dims)


@dataclass
class ExpertMesh(DistributedConfig):
    """A `DistributedConfig` whose experts may have replicas of their own.

    Attributes:
        expert_replicas: copies of the experts that are kept in step by all-reduce; the rest of the copies is sharded.
        timeout_s: seconds after which a rank that waits for another gives up; `None`: as the process group was made.
    """

    expert_replicas: int = 1
    timeout_s: float | None = None
    if TYPE_CHECKING:  # numbers, once the config is made
        ep_size: Any = None
        tp_size: Any = None
        fsdp_size: Any = None
        dp_replicate_size: Any = None

    @property
    def efsdp_size(self) -> int:
        """Ranks that share the same experts and shard them among each other."""
        return self.world_size // (self.expert_replicas * self.ep_size)

    @property
    def world_size(self) -> int:
        return self.dp_size * self.tp_size

    @property
    def expert_view(self) -> ExpertView:
        return ExpertView(self.expert_replicas, self.efsdp_size, self.ep_size)

    def _validate_mesh_config(self) -> None:  # in place of the rule that ties the two views
        if self.ep_size % self.tp_size and self.ep_size > 1:
            raise ValueError(f"`ep_size`={self.ep_size} must be a multiple of `tp_size`={self.tp_size}.")
        if self.world_size % (self.expert_replicas * self.ep_size):
            raise ValueError(
                f"`ep_size`={self.ep_size} × {self.expert_replicas} replicas does not divide the {self.world_size} ranks."
            )

    def build_meshes(self) -> tuple[torch.device, TransformersDeviceMesh]:
        """This rank's device, and the meshes. Every rank has to call it; the process group has to be there.

        Raises:
            ValueError: there are more or fewer ranks than the sizes say.
        """
        ranks = torch.distributed.get_world_size()
        if ranks != self.world_size:
            raise ValueError(f"The mesh is for {self.world_size} ranks, but there are {ranks}. Launch as many processes.")
        accelerator = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
        kind = "cpu" if accelerator is None or torch.distributed.get_backend() == "gloo" else accelerator.type
        device = torch.device(kind) if kind == "cpu" else torch.device(kind, int(os.environ.get("LOCAL_RANK", 0)))
        if kind != "cpu":
            torch.accelerator.set_device_index(device.index)
        shape = (1, self.dp_replicate_size, self.fsdp_size, self.tp_size)
        dense = init_device_mesh(kind, shape, mesh_dim_names=("pp", "dp_replicate", "fsdp", "tp"))
        experts = init_device_mesh(kind, (1, *self.expert_view), mesh_dim_names=("pp", "dp_replicate", "efsdp", "ep"))
        if self.timeout_s is not None:
            for mesh in (dense, experts):
                for axis in range(mesh.ndim):
                    _set_pg_timeout(timedelta(seconds=self.timeout_s), mesh.get_group(axis))
        return device, Meshes(dense, experts)

    def finish(self, model: Any) -> Any:
        """What is left to do after Transformers has sharded a model."""
        for experts in sharded_experts(model):
            if not experts.num_experts:
                _leave_out(experts)
        return model

    def table(self) -> str:
        """The ranks as a small table: where each stands in both views."""
        head = ["rank", "batch", "tp", "dense shard", "expert copy", "expert shard", "ep"]
        rows = [head, *([str(c) for c in self._row(rank)] for rank in range(self.world_size))]
        widths = [max(len(row[column]) for row in rows) for column in range(len(head))]
        lines = ["  ".join(cell.rjust(width) for cell, width in zip(row, widths, strict=True)) for row in rows]
        return "\n".join([lines[0], "  ".join("-" * width for width in widths), *lines[1:]])

    def _row(self, rank: int) -> list[Any]:
        tp, fsdp = self.tp_size, self.fsdp_size
        batch = rank // tp
        copies = rank // self.ep_size
        place = [rank, batch, rank % tp, f"{batch % fsdp}/{fsdp}"]
        return [*place, copies // self.efsdp_size, f"{copies % self.efsdp_size}/{self.efsdp_size}", f"{rank % self.ep_size}"]


def _leave_out(experts: nn.Module) -> None:
    """Have FSDP2 do nothing for a rank without experts: there is nothing to gather or reduce, and it cannot cut nothing up.

    The ranks that it would exchange with hold the same experts, that is none, so no rank waits for this one.
    """
    state: Any = getattr(experts, "_get_fsdp_state", lambda: None)()
    if state is None:
        return
    if hasattr(state, "_fsdp_param_groups"):
        state._fsdp_param_groups.clear()
    else:  # torch 2.11
        state._fsdp_param_group = None


def expert_mesh(
    *,
    world_size: int,
    ep_size: int,
    tp_size: int = 1,
    dense: Dense = "fsdp",
    dp_replicate_size: int | None = None,
    num_experts: list[int],
    **fields: Any,
) -> ExpertMesh:
    """The meshes for so many ranks.

    Args:
        world_size: W.
        ep_size: ranks that hold the experts between them.
        tp_size: ranks that share a batch.
        dense: `"fsdp"`: everything is sharded over all ranks; `"replicate"`: the dense parameters lie whole on every rank (as
            with DDP), and the experts' copies too; `"hybrid"`: sharded within, replicated across `dp_replicate_size` groups.
        dp_replicate_size: the number of those groups.
        num_experts: E of each MoE layer. Copies of experts are sharded only where they divide evenly, else replicated.
        fields: of `DistributedConfig`.

    Raises:
        ValueError: the sizes do not fit each other.
    """
    for name, size in (("ep_size", ep_size), ("tp_size", tp_size)):
        if size < 1 or world_size % size:
            raise ValueError(f"`{name}`={size} does not divide the {world_size} ranks. Choose a divisor.")
    data = world_size // tp_size
    replicas = {"fsdp": 1, "replicate": data, "hybrid": dp_replicate_size or 0}[dense]
    if replicas < 1 or data % replicas:
        raise ValueError(
            f"`dense`='hybrid' shards within and replicates across groups of ranks: `dp_replicate_size`={dp_replicate_size} "
            f"must divide the {data} data ranks. Give the number of nodes."
        )
    copies = world_size // ep_size
    expert_replicas = copies if dense == "replicate" else replicas if copies % replicas == 0 else copies
    if any(e % (ep_size * (copies // expert_replicas)) for e in num_experts):
        expert_replicas = copies
    return ExpertMesh(
        tp_size=tp_size,
        ep_size=ep_size,
        fsdp_size=data // replicas,
        dp_replicate_size=replicas,
        expert_replicas=expert_replicas,
        **fields,
    )
