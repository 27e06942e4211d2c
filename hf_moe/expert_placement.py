# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Experts that change places between the ranks of an expert-parallel group, so that each rank has as much to do as the others.

An expert keeps its number, by which routers, losses, records and checkpoints know it. What changes is its *slot*: the row of
the stacked weights where it lies. The E slots are cut evenly over the ranks (see `expert_sharding`), and
`experts.slot_of_expert` says which expert lies where.

Letters: E experts, R expert-parallel ranks.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from itertools import chain, product
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor.placement_types import _StridedShard

from .placement_plan import PlacementPlan, max_over_mean, plan_placement

_EP = "ep"  # the name that the experts' meshes give the dimension
_KNOWS_SLOTS = "hf_moe_"  # how the names of dispatchers begin that look at `slot_of_expert`


def expert_layers(model: nn.Module) -> dict[int, Any]:
    """The modules whose experts are spread over ranks, by the number of their decoder layer, as logs name it."""
    found: dict[int, Any] = {}
    for name, module in model.named_modules():
        if _mesh_size(module):
            number = re.search(r"(?:^|\.)(\d+)(?:\.|$)", name)
            found[int(number.group(1)) if number else len(found)] = module
    return found


def ep_size(experts: nn.Module) -> int:
    """R, of a module of `expert_layers`."""
    return _mesh_size(experts)


def current_placement(model: nn.Module) -> dict[int, list[int]]:
    """The slot of each expert, by decoder layer."""
    return {layer: _slots(experts) for layer, experts in expert_layers(model).items()}


def unplaced(rows: Tensor, slot_of_expert: Tensor | None) -> Tensor:
    """Rows in the order of slots, as they lie in the stacked weights, brought into the order of experts.

    Args:
        rows: `[E, …]`, whole.
        slot_of_expert: `[E]`; `None` if nothing was moved.
    """
    return rows if slot_of_expert is None else rows.index_select(0, slot_of_expert.to(rows.device))


@torch.no_grad()
def move_experts(model: nn.Module, optimizer: Any, layer_index: int, new_slots: Sequence[int] | Tensor) -> int:
    """Have the experts of one MoE layer change places. All ranks have to call it together, between two optimizer steps.

    Weights, biases, gradients and what the optimizer keeps of them go along, one tensor at a time, into the same parameters;
    the function of the model and all that training does to it stay as they are.

    Args:
        model: from `load_expert_parallel`.
        optimizer: of any kind whose state has the shape of its parameter (SGD, AdamW, Lion, …); `None` if there is none.
        layer_index: number of the decoder layer.
        new_slots: `[E]`, the slot of each expert; slot s lies on rank s // ceil(E / R).

    Returns:
        How many experts have moved.

    Raises:
        ValueError: the layer's experts are not spread over ranks, `new_slots` is no permutation, the dispatcher knows no slots,
            or the optimizer keeps something else. Nothing has moved then.
    """
    layers = expert_layers(model)
    if layer_index not in layers:
        raise ValueError(f"`layer_index`={layer_index} has no experts that are spread over ranks. Layers: {sorted(layers)}.")
    check_dispatcher(model)
    experts = layers[layer_index]
    old, new = _slots(experts), [int(slot) for slot in new_slots]
    if sorted(new) != list(range(len(old))):
        raise ValueError(f"`new_slots`={new} must name each of the slots 0 to {len(old) - 1} once.")
    source_of_slot = list(range(len(old)))
    for expert, slot in enumerate(new):
        source_of_slot[slot] = old[expert]
    tensors = _tensors(experts, optimizer)
    if old == new:
        return 0
    getattr(experts, "reshard", lambda: None)()  # FSDP2: what is gathered is a copy
    for tensor in tensors:
        _exchange_rows(tensor, source_of_slot)
    identity = new == list(range(len(new)))
    experts.slot_of_expert = None if identity else torch.tensor(new, device=_device(tensors[0]))
    return sum(one != other for one, other in zip(old, new, strict=True))


def check_dispatcher(model: Any) -> None:
    """See that the model's dispatcher finds experts that were moved.

    Raises:
        ValueError: it is one of Transformers' own.
    """
    name = getattr(getattr(model.config, "distributed_config", None), "ep_implementation", None)
    if name is None or not name.startswith(_KNOWS_SLOTS):
        raise ValueError(
            f"`ep_implementation`={name!r} sends tokens by an expert's number and would miss those that were moved. Load the "
            "model with `load_expert_parallel`, whose dispatchers know where experts lie."
        )


# ---------------------------------------------------------------------- what there is to move


def _mesh_size(module: nn.Module) -> int:
    """R; 0 where a module's parameters are not spread over experts."""
    for parameter in module.parameters(recurse=False):
        names = parameter.device_mesh.mesh_dim_names or () if isinstance(parameter, DTensor) else ()
        if _EP in names:
            return parameter.device_mesh.size(names.index(_EP))  # type: ignore[attr-defined]
    return 0


def _slots(experts: Any) -> list[int]:
    slot_of_expert = getattr(experts, "slot_of_expert", None)
    if slot_of_expert is not None:
        return slot_of_expert.tolist()
    return list(range(next(experts.parameters(recurse=False)).shape[0]))


def _tensors(experts: nn.Module, optimizer: Any) -> list[DTensor]:
    """All that has a row per expert: parameters, their gradients, their optimizer state.

    Raises:
        ValueError: something cannot be moved.
    """
    found: list[DTensor] = []
    for name, parameter in experts.named_parameters(recurse=False):
        if not _has_rows(parameter, parameter):
            raise ValueError(f"The experts' parameter {name!r} is not spread over ranks as the others are. It cannot be moved.")
        state = {} if optimizer is None else optimizer.state.get(parameter, {})
        kept = [(key, value) for key, value in state.items() if isinstance(value, Tensor) and value.numel() > 1]
        for key, value in kept:
            if not _has_rows(value, parameter):
                raise ValueError(
                    f"The optimizer's {key!r} of {name!r} has the shape {tuple(value.shape)} for the parameter's "
                    f"{tuple(parameter.shape)} and cannot be moved. Use an optimizer with plain states, as AdamW or SGD."
                )
        gradient = [] if parameter.grad is None else [parameter.grad]
        found += [parameter, *gradient, *(value for _, value in kept)]  # type: ignore[list-item]
    return found


def _has_rows(value: Tensor, parameter: Tensor) -> bool:
    """Whether a tensor has a row per expert, on the rank where the expert's parameter is."""
    if not (isinstance(value, DTensor) and isinstance(parameter, DTensor)) or value.shape[:1] != parameter.shape[:1]:
        return False
    same = value.device_mesh == parameter.device_mesh and value.placements == parameter.placements
    return same and _EP in (value.device_mesh.mesh_dim_names or ())


# ---------------------------------------------------------------------- moving


def _exchange_rows(tensor: DTensor, source_of_slot: list[int]) -> None:
    """Row s of the whole tensor becomes what its row `source_of_slot[s]` was; only rows that change are sent."""
    local, rows_of_rank = tensor.to_local(), _rows_of_ranks(tensor)
    owner = {row: rank for rank, rows in rows_of_rank.items() for row in rows}
    me, ranks = dist.get_rank(), range(dist.get_world_size())
    mine = {row: place for place, row in enumerate(rows_of_rank[me])}
    sent = [
        [
            mine[source_of_slot[row]]
            for row in _changed(rows_of_rank.get(rank, []), source_of_slot)
            if source_of_slot[row] in mine
        ]
        for rank in ranks
    ]
    received = [[mine[row] for row in _changed(mine, source_of_slot) if owner[source_of_slot[row]] == rank] for rank in ranks]
    device = _device(tensor)
    outgoing = local[_index(sent, local)].to(device).contiguous()
    incoming = outgoing.new_empty(sum(map(len, received)), *local.shape[1:])
    dist.all_to_all_single(incoming, outgoing, [len(rows) for rows in received], [len(rows) for rows in sent])
    local[_index(received, local)] = incoming.to(local.device)


def _index(rows_of_ranks: list[list[int]], like: Tensor) -> Tensor:
    return torch.tensor([*chain.from_iterable(rows_of_ranks)], dtype=torch.long, device=like.device)


def _changed(rows: Sequence[int] | dict[int, int], source_of_slot: list[int]) -> Iterator[int]:
    return (row for row in rows if source_of_slot[row] != row)


def _rows_of_ranks(tensor: DTensor) -> dict[int, list[int]]:
    """The rows of the whole tensor that each rank holds, in their order there; of the ranks that share it with this one.

    FSDP2 shards what expert parallelism has sharded: its chunks (`_StridedShard`) are cut from the rows of an
    expert-parallel rank.
    """
    mesh, here = tensor.device_mesh, tensor.device_mesh.get_coordinate()
    assert here is not None
    cuts = [dim for dim, placement in enumerate(tensor.placements) if getattr(placement, "dim", None) == 0]
    strided = [dim for dim in cuts if isinstance(tensor.placements[dim], _StridedShard)]
    order = [*(dim for dim in cuts if dim not in strided), *reversed(strided)]
    found = {}
    for place in product(*(range(mesh.size(dim)) for dim in order)):
        coordinate, rows = list(here), list(range(tensor.shape[0]))
        for dim, index in zip(order, place, strict=True):
            size = -(-len(rows) // mesh.size(dim))
            rows, coordinate[dim] = rows[index * size : (index + 1) * size], index
        found[int(mesh.mesh[tuple(coordinate)])] = rows
    return found


def _device(tensor: DTensor) -> torch.device:
    """Where ranks exchange data; parameters may be offloaded."""
    kind = tensor.device_mesh.device_type
    return torch.device(kind) if kind == "cpu" else torch.device(kind, torch.accelerator.current_device_index())


__all__ = [
    "PlacementPlan", "check_dispatcher", "current_placement", "ep_size", "expert_layers", "max_over_mean", "move_experts",
    "plan_placement", "unplaced",
]  # fmt: skip
