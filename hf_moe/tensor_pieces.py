# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Which part of a tensor lies on which rank, as rectangles of the whole: what checkpoints of sharded models are made of.

DTensor says of a shard only one rectangle, which does not hold for experts that FSDP2 splits on top of expert parallelism
(`_StridedShard`) when they do not divide evenly, nor for experts that were moved between ranks. Here rows are followed one by
one, so that nothing has to be redistributed before it is saved, and experts are always in the order of their ids.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Iterator, Sequence
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.checkpoint import DefaultLoadPlanner, DefaultSavePlanner
from torch.distributed.checkpoint.metadata import ChunkStorageMetadata, Metadata, MetadataIndex, TensorProperties
from torch.distributed.checkpoint.planner import TensorWriteData, WriteItem, WriteItemType
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard

_OF_WRAPPERS = ("_checkpoint_wrapped_module.", "_orig_mod.", "_fsdp_wrapped_module.")
_PLACEMENT = "slot_of_expert"


class Pieces:
    """What this rank holds of a tensor: views, each a rectangle of the whole. It is what DCP saves and loads.

    Args:
        tensor: a DTensor, or a plain tensor, which is the whole.
        expert_of_slot: `[E]`, where dimension 0 is slots of experts and they do not lie in the order of their ids.
    """

    def __init__(self, tensor: Tensor, expert_of_slot: Tensor | None = None) -> None:
        self.shape, self.dtype = tensor.shape, tensor.dtype
        local = tensor.detach()
        if isinstance(local, DTensor):
            local = local.to_local()
        indices = held_indices(tensor, expert_of_slot=expert_of_slot)
        self._views = {} if indices is None else {corner: local[inside] for corner, _, inside in _rectangles(indices)}

    def size(self) -> torch.Size:
        """Of the whole."""
        return self.shape

    def items(self) -> Iterator[tuple[tuple[int, ...], Tensor]]:
        """First index in the whole and the view, of each rectangle."""
        return iter(self._views.items())

    def to_host(self) -> Pieces:
        """A copy in main memory, which training does not change; copies from a GPU are not waited for."""
        copy = object.__new__(Pieces)
        copy.shape, copy.dtype = self.shape, self.dtype
        copy._views = {corner: _host_copy(view) for corner, view in self._views.items()}
        return copy

    @torch.no_grad()
    def copy_from(self, whole: Tensor) -> None:
        """Fill the views from the whole tensor."""
        for corner, view in self._views.items():
            view.copy_(whole[tuple(slice(start, start + size) for start, size in zip(corner, view.shape, strict=True))])

    def find(self, index: MetadataIndex) -> Tensor:
        """The view at an index of DCP."""
        return self._views[tuple(index.offset or ())]

    def __create_chunk_list__(self) -> list[ChunkStorageMetadata]:
        return [ChunkStorageMetadata(torch.Size(corner), view.size()) for corner, view in self._views.items()]

    def __create_write_items__(self, fqn: str, _: Any) -> list[WriteItem]:
        properties = TensorProperties(dtype=self.dtype)
        return [
            WriteItem(
                MetadataIndex(fqn, c.offsets), WriteItemType.SHARD, tensor_data=TensorWriteData(c, properties, self.shape)
            )
            for c in self.__create_chunk_list__()
        ]


class PiecesSavePlanner(DefaultSavePlanner):
    """DCP's planner, for a flat dict of `Pieces` and other values."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def lookup_object(self, index: MetadataIndex) -> Any:
        found = self.state_dict[index.fqn]
        return found.find(index) if isinstance(found, Pieces) else super().lookup_object(index)


class PiecesLoadPlanner(DefaultLoadPlanner):
    """DCP's planner, for a flat dict of `Pieces` and other values; runs no code that is in a checkpoint's values."""

    def __init__(self) -> None:
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)

    def set_up_planner(
        self, state_dict: dict[str, Any], metadata: Metadata | None = None, is_coordinator: bool = False
    ) -> None:
        # torch's goes through the values, and makes `None` of those that it does not know
        self.original_state_dict = self.state_dict = state_dict
        self.metadata, self.is_coordinator = metadata, is_coordinator

    def lookup_tensor(self, index: MetadataIndex) -> Tensor:
        found = self.state_dict[index.fqn]
        return found.find(index) if isinstance(found, Pieces) else super().lookup_tensor(index)

    def load_bytes(self, read_item: Any, value: Any) -> None:
        self.original_state_dict[read_item.dest_index.fqn] = torch.load(value, weights_only=True)


def held_indices(
    tensor: Tensor, coordinate: Sequence[int] | None = None, expert_of_slot: Tensor | None = None
) -> list[Tensor] | None:
    """Of each dimension, the indices in the whole of what a rank holds, in the order in which it holds them.

    Args:
        tensor: see `Pieces`.
        coordinate: the rank's, on the mesh of a DTensor (default: this rank's).
        expert_of_slot: see `Pieces`.

    Returns:
        `None` for a rank that is not on the mesh.
    """
    indices = [torch.arange(size) for size in tensor.shape]
    if isinstance(tensor, DTensor):
        coordinate = tensor.device_mesh.get_coordinate() if coordinate is None else coordinate
        if coordinate is None:
            return None
        for axis, split in _order_of_splits(tensor):
            placement: Any = tensor.placements[axis]
            dim = placement.dim % tensor.ndim
            groups = [indices[dim]] if split == 1 else _chunks(indices[dim], split)
            indices[dim] = torch.cat([_chunks(group, tensor.device_mesh.size(axis))[coordinate[axis]] for group in groups])
    if expert_of_slot is not None and indices and tensor.shape[0] == len(expert_of_slot):
        indices[0] = expert_of_slot.cpu()[indices[0]]
    return indices


def _order_of_splits(tensor: DTensor) -> list[tuple[int, int]]:
    """The mesh axes that split a tensor, in the order in which they do, and into how many groups it is cut for it.

    `_StridedShard` stands for two things: a split (by FSDP2) of what axes to the right of it have split before, and a split
    of each of several matrices that lie in one (gate and up).
    """
    sharded = [(axis, placement) for axis, placement in enumerate(tensor.placements) if hasattr(placement, "dim")]
    first, afterwards = [], []
    for axis, placement in sharded:
        if not isinstance(placement, _StridedShard):
            first.append((axis, 1))
            continue
        to_the_right = [a for a, p in sharded if a > axis and p.dim == placement.dim]
        if math.prod(tensor.device_mesh.size(a) for a in to_the_right) == placement.split_factor:
            afterwards.append((axis, 1))
        else:
            first.append((axis, int(placement.split_factor)))
    return first + afterwards[::-1]


def _chunks(indices: Tensor, count: int) -> list[Tensor]:
    """As `torch.chunk`, and empty ones to make them `count`."""
    size = -(-len(indices) // count)
    return [indices[number * size : (number + 1) * size] for number in range(count)]


def _rectangles(indices: list[Tensor]) -> Iterator[tuple[tuple[int, ...], tuple[int, ...], tuple[slice, ...]]]:
    """First index in the whole, sizes, and slices of the local tensor, of each rectangle that is not empty."""
    runs = [_runs(held) for held in indices]
    for rectangle in itertools.product(*runs):
        corner = tuple(start for start, _, _ in rectangle)
        sizes = tuple(length for _, _, length in rectangle)
        yield corner, sizes, tuple(slice(local, local + length) for _, local, length in rectangle)


def _runs(held: Tensor) -> list[tuple[int, int, int]]:
    """Start in the whole, start in the local tensor, and length of each run of consecutive indices."""
    if not len(held):
        return []
    starts = [0, *(torch.nonzero(held.diff() != 1).flatten() + 1).tolist(), len(held)]
    return [(int(held[start]), start, stop - start) for start, stop in itertools.pairwise(starts)]


def _host_copy(view: Tensor) -> Tensor:
    copy = torch.empty(view.shape, dtype=view.dtype, pin_memory=view.is_cuda)
    return copy.copy_(view, non_blocking=view.is_cuda)


# ---------------------------------------------------------------------- models


def clean_name(name: str) -> str:
    """A parameter's name without what wrappers put into it."""
    for wrapper in _OF_WRAPPERS:
        name = name.replace(wrapper, "")
    return name


def reshard(model: nn.Module) -> None:
    """Have FSDP2 drop the parameters that it has gathered, so that a model's parameters are its shards."""
    for module in model.modules():
        if isinstance(module, FSDPModule):
            module.reshard()


def model_tensors(model: nn.Module) -> dict[str, Tensor]:
    """Parameters, a tied one once, and the buffers that are saved, by name. (Where experts lie is no part of them.)"""
    reshard(model)
    found: dict[str, Tensor] = {clean_name(name): parameter for name, parameter in model.named_parameters()}
    for path, module in model.named_modules():
        for name, buffer in module.named_buffers(path, recurse=False):
            if name.rpartition(".")[2] not in {*module._non_persistent_buffers_set, _PLACEMENT}:
                found[clean_name(name)] = buffer
    return found


def placements(model: nn.Module) -> dict[str, Tensor]:
    """`slot_of_expert` `[E]` of the experts that were moved, by the module's name."""
    named = ((clean_name(name), getattr(module, _PLACEMENT, None)) for name, module in model.named_modules())
    return {name: slots for name, slots in named if isinstance(slots, Tensor)}


def expert_orders(model: nn.Module) -> dict[str, Tensor]:
    """`expert_of_slot` `[E]` of each parameter of experts that were moved, by the parameter's name."""
    moved, orders = placements(model), {}
    for name, _ in model.named_parameters():
        owner = clean_name(name).rpartition(".")[0]
        if owner in moved:
            orders[clean_name(name)] = moved[owner].argsort()
    return orders


# ---------------------------------------------------------------------- one tensor, brought together


@torch.no_grad()
def gather_to_first(tensor: Tensor, expert_of_slot: Tensor | None = None) -> Tensor | None:
    """The whole of a tensor in main memory, on the first rank only; the others send what they hold and keep nothing.

    Args:
        tensor, expert_of_slot: see `Pieces`. All ranks call it, with tensors of one layout.
    """
    rank = dist.get_rank() if dist.is_initialized() else 0
    if not isinstance(tensor, DTensor):
        return tensor.detach().cpu() if rank == 0 else None
    ranks = tensor.device_mesh.mesh
    first = (ranks == 0).nonzero()
    if not len(first):
        return None  # a group of ranks that holds a copy
    held: Any = tensor.detach()
    local: Tensor = held.to_local().to(tensor.device_mesh.device_type).contiguous()  # it may be offloaded
    whole = torch.empty(tensor.shape, dtype=tensor.dtype) if rank == 0 else None
    for coordinate in itertools.product(*(range(size) for size in ranks.shape)):
        axes = zip(coordinate, first[0].tolist(), tensor.placements, strict=True)
        if any(at != of_first for at, of_first, placement in axes if not hasattr(placement, "dim")):
            continue  # a copy
        sender = int(ranks[coordinate])
        if rank not in (0, sender):
            continue
        indices = held_indices(tensor, coordinate, expert_of_slot)
        assert indices is not None
        shape = [len(of_dim) for of_dim in indices]
        if math.prod(shape) == 0:
            continue
        if rank == sender != 0:
            dist.send(local.view(-1).view(torch.uint8), 0)
        elif whole is not None:
            part = local if sender == 0 else torch.empty(shape, dtype=tensor.dtype, device=local.device)
            if sender != 0:
                dist.recv(part.view(-1).view(torch.uint8), sender)
            part = part.cpu()
            for corner, sizes, inside in _rectangles(indices):
                whole[tuple(slice(start, start + size) for start, size in zip(corner, sizes, strict=True))] = part[inside]
    return whole


__all__ = [
    "Pieces",
    "PiecesLoadPlanner",
    "PiecesSavePlanner",
    "clean_name",
    "expert_orders",
    "gather_to_first",
    "held_indices",
    "model_tensors",
    "placements",
    "reshard",
]
