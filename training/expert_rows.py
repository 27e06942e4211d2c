# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""The rows that one expert has in the tensors of its layer: weights, router and optimizer state, sharded over ranks or not.

Letters: E experts, A groups of experts.
"""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor, Replicate
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset
from transformers import TrainingArguments
from transformers.utils import logging

from .native_routing import bias_of
from .routing_watch import RoutingWatch

logger = logging.get_logger(__name__)

_ROUTER_ROWS = ("weight", "noise_weight", "bias")
_GROUP_ROWS = ("group_weight", "group_noise_weight")


# ---------------------------------------------------------------------- rows of a tensor


@torch.no_grad()
def read_row(tensor: Tensor, index: int) -> Tensor:
    """A copy of `tensor[index]`, whole on every rank. All ranks that share a DTensor have to call it together."""
    if not isinstance(tensor, DTensor):
        return tensor[index].clone()
    local, (rows, *rest) = _local_part(tensor)
    mesh = tensor.device_mesh
    row = torch.zeros(tensor.shape[1:], dtype=tensor.dtype, device=mesh.device_type)
    if rows.start <= index < rows.stop:
        row[tuple(rest)] = local[index - rows.start].to(row.device)
    for dimension, placement in enumerate(tensor.placements):
        if not isinstance(placement, Replicate):
            dist.all_reduce(row, group=mesh.get_group(dimension))
    return row


@torch.no_grad()
def write_row(tensor: Tensor, index: int, row: Tensor) -> None:
    """`tensor[index] = row`, where every rank has the whole row."""
    if not isinstance(tensor, DTensor):
        tensor[index].copy_(row)
        return
    local, (rows, *rest) = _local_part(tensor)
    if rows.start <= index < rows.stop:
        local[index - rows.start].copy_(row[tuple(rest)])


def _local_part(tensor: DTensor) -> tuple[Tensor, list[slice]]:
    """What lies on this rank, and where it stands in the whole tensor."""
    shape, offset = compute_local_shape_and_global_offset(tensor.shape, tensor.device_mesh, tensor.placements)
    return tensor.to_local(), [slice(start, start + size) for start, size in zip(offset, shape, strict=True)]


def with_noise(row: Tensor, noise: float, generator: torch.Generator) -> Tensor:
    """`row + N(0, (noise · σ)²)`, σ the row's own standard deviation, in at least fp32.

    Args:
        row: any shape.
        noise: relative to σ.
        generator: on the CPU, so that every rank and device draws the same.
    """
    wide = row.to(torch.promote_types(row.dtype, torch.float32))
    draw = torch.randn(row.shape, generator=generator, dtype=torch.float32).to(wide)
    return wide + noise * wide.std(correction=0) * draw


# ---------------------------------------------------------------------- the tensors of a layer


@dataclass(frozen=True)
class StackedLayer:
    """A MoE layer whose experts are stacked: one tensor per projection, one row per expert.

    Attributes:
        layer: decoder layer.
        num_experts: E.
        router, experts: its modules.
    """

    layer: int
    num_experts: int
    router: nn.Module
    experts: nn.Module

    @property
    def num_groups(self) -> int:
        """A; 1 where the router knows no groups."""
        return getattr(self.router, "num_groups", None) or getattr(self.router, "n_group", None) or 1

    @property
    def is_hierarchical(self) -> bool:
        """Whether groups have router rows of their own, and an expert's row means something in its group only."""
        return hasattr(self.router, _GROUP_ROWS[0])

    def expert_tensors(self) -> dict[str, Tensor]:
        """By name, tensors of E rows."""
        return {f"experts.{name}": parameter for name, parameter in self.experts.named_parameters(recurse=False)}

    def router_tensors(self) -> dict[str, Tensor]:
        """By name, tensors of E rows; the bias of a sigmoid router, too."""
        found = {f"router.{name}": tensor for name, tensor in _attributes(self.router, _ROUTER_ROWS)}
        bias = bias_of(self.router)
        return found if bias is None else found | {"router.e_score_correction_bias": bias.view(-1)}

    def group_tensors(self) -> dict[str, Tensor]:
        """By name, tensors of A rows."""
        return {f"router.{name}": tensor for name, tensor in _attributes(self.router, _GROUP_ROWS)}

    def check(self, optimizer: Any) -> None:
        """See that every row can be replaced.

        Raises:
            ValueError: some are not stacked, or not trained by the optimizer.
        """
        trained = {id(parameter) for group in optimizer.param_groups for parameter in group["params"]}
        expert_tensors, router_tensors = self.expert_tensors(), self.router_tensors()
        if not expert_tensors or "router.weight" not in router_tensors:
            raise ValueError(
                f"`action`='reinit' needs stacked experts and a router with a `weight`; layer {self.layer} has "
                f"{type(self.experts).__name__} and {type(self.router).__name__}. Use action='warn'."
            )
        for name, tensor in {**expert_tensors, **router_tensors}.items():
            if tensor.dim() == 0 or tensor.shape[0] != self.num_experts:
                raise ValueError(
                    f"`action`='reinit' needs one row per expert, but `{name}` of layer {self.layer} has shape "
                    f"{tuple(tensor.shape)} for {self.num_experts} experts. Use action='warn'."
                )
            if isinstance(tensor, nn.Parameter) and (not tensor.requires_grad or id(tensor) not in trained):
                raise ValueError(
                    f"`action`='reinit' replaces weights, but `{name}` of layer {self.layer} is not trained (frozen, as under "
                    "PEFT, or kept elsewhere by the optimizer). Train experts and router, or use action='warn'."
                )


def stacked_layers(watch: RoutingWatch) -> list[StackedLayer]:
    """The layers of what is watched, each router with the experts that stand beside it.

    Raises:
        ValueError: there are none beside it.
    """
    beside: dict[int, nn.Module] = {}
    for block in watch.model.modules():
        experts = getattr(block, "experts", None)
        if isinstance(experts, nn.Module):
            beside |= {id(child): experts for child in block.children()}
    layers = []
    for layer, num_experts, router in zip(watch.layers, watch.num_experts, watch.routers, strict=True):
        if id(router) not in beside:
            raise ValueError(
                f"`action`='reinit' finds no `experts` beside the {type(router).__name__} of layer {layer}. Use action='warn'."
            )
        layers.append(StackedLayer(layer, num_experts, trained_module(router), beside[id(router)]))
    return layers


def trained_module(module: nn.Module) -> nn.Module:
    """The module itself, or the copy of it that PEFT trains in its stead (`modules_to_save`)."""
    copies = getattr(module, "modules_to_save", None)
    if not isinstance(copies, nn.ModuleDict) or not len(copies):
        return module
    active: Any = module
    return copies[active.active_adapters[0]]


def refuse_flat_parameters(what: str, args: TrainingArguments, model: nn.Module) -> None:
    """Raise where the optimizer does not hold the model's own parameters.

    Raises:
        ValueError: under DeepSpeed, or FSDP of version 1.
    """
    deepspeed = args.deepspeed_plugin is not None
    if deepspeed or any(isinstance(module, FullyShardedDataParallel) for module in model.modules()):
        raise ValueError(
            f"{what} does not work under {'DeepSpeed' if deepspeed else 'FSDP1'}, whose optimizer holds flattened copies of "
            "the parameters. Use FSDP2 (`fsdp_config={'version': 2}`) or DDP."
        )


def _attributes(module: nn.Module, names: tuple[str, ...]) -> Iterator[tuple[str, Tensor]]:
    for name in names:
        tensor = getattr(module, name, None)
        if isinstance(tensor, Tensor):
            yield name, tensor


# ---------------------------------------------------------------------- what to copy


@dataclass(frozen=True)
class Copies:
    """Which experts, and which groups of a hierarchical router, are replaced by which: pairs (source, target)."""

    experts: list[tuple[int, int]]
    groups: list[tuple[int, int]]


def plan_copies(load_E: list[float], dead: list[int], threshold: float, num_groups: int, hierarchical: bool) -> Copies:
    """Give each dead expert a source: the busiest of its group, else of the layer.

    A source that was given away shares its tokens with its copies from then on, so the next dead expert may find a busier
    one. A hierarchical router's row means something in its group only: a group without a living expert waits until all its
    experts are dead, and is then replaced by the busiest group, expert by expert.

    Args:
        load_E: relative to the fair load.
        dead: experts to replace.
        threshold: an expert below it can be no source.
        num_groups: A.
        hierarchical: whether groups have router rows of their own.
    """
    size = len(load_E) // num_groups
    alive = [expert for expert, load in enumerate(load_E) if load >= threshold and expert not in dead]
    shared = dict.fromkeys(range(len(load_E)), 1)

    def busiest(candidates: list[int], loads: list[float]) -> int:
        source = max(candidates, key=lambda i: loads[i] / shared[i])
        shared[source] += 1
        return source

    copies = Copies([], [])
    for target in dead:
        own = [expert for expert in alive if expert // size == target // size]
        if own or (alive and not hierarchical):
            copies.experts.append((busiest(own or alive, load_E), target))
    if not hierarchical:
        return copies
    shared = dict.fromkeys(range(num_groups), 1)
    group_loads = [sum(load_E[group * size : (group + 1) * size]) for group in range(num_groups)]
    living = sorted({expert // size for expert in alive})
    for group in range(num_groups):
        members = range(group * size, (group + 1) * size)
        if living and all(expert in dead for expert in members):
            source = busiest(living, group_loads)
            copies.groups.append((source, group))
            best = max((expert for expert in alive if expert // size == source), key=lambda expert: load_E[expert])
            likes = [source * size + i for i in range(size)]
            copies.experts.extend(
                (like if like in alive else best, target) for like, target in zip(likes, members, strict=True)
            )
    return copies


# ---------------------------------------------------------------------- copying


def make_copies(layer: StackedLayer, copies: Copies, noise: float, seed: str, optimizer: Any) -> None:
    """Carry out what is planned for a layer. Weights and router rows get noise, biases do not.

    Args:
        noise: see `with_noise`.
        seed: with the layer, the tensor and the row it fixes the noise.
        optimizer: see `copy_row`.
    """
    slots = getattr(layer.experts, "slot_of_expert", None)  # experts may have changed places between ranks
    lying = copies.experts if slots is None else [(int(slots[s]), int(slots[t])) for s, t in copies.experts]
    tables = [(layer.expert_tensors(), lying, 3), (layer.router_tensors(), copies.experts, 2)]
    for tensors, pairs, least_dim in [*tables, (layer.group_tensors(), copies.groups, 2)]:
        for name, tensor in tensors.items():
            scale = noise if tensor.dim() >= least_dim else 0.0
            for source, target in pairs:
                copy_row(tensor, source, target, scale, _generator(f"{seed} {layer.layer} {name} {target}"), optimizer)


def _generator(words: str) -> torch.Generator:
    """The same draws on every rank, and none from the global stream."""
    return torch.Generator().manual_seed(int.from_bytes(hashlib.blake2b(words.encode(), digest_size=8).digest()))


def copy_row(tensor: Tensor, source: int, target: int, noise: float, generator: torch.Generator, optimizer: Any) -> None:
    """Replace a row by another one plus noise (see `with_noise`), and what the optimizer keeps of it by that of the other.

    The moments are copied, not zeroed: the copied weights get gradients like those of the source, for which the source's
    second moment is the right scale. A second moment of 0 would, late in training, make the first steps several times
    larger than the learning rate.

    Args:
        tensor: E rows.
        source, target: rows.
        noise: 0 for a plain copy.
        generator: draws the noise.
        optimizer: whose `state` to change.
    """
    row = read_row(tensor, source)
    new = with_noise(row, noise, generator) if noise else row
    state = optimizer.state.get(tensor, {})
    masters = {key for key, value in state.items() if _is_master(value, tensor, source, row)}
    write_row(tensor, target, new)
    for key, value in state.items():
        if key in masters:
            write_row(value, target, new)
        elif _has_rows(key, value, tensor):
            write_row(value, target, read_row(value, source))


def _is_master(value: Any, parameter: Tensor, source: int, row: Tensor) -> bool:
    """Whether a state is the parameter itself in higher precision: the next step would copy it over the parameter."""
    if not _is_plain(value) or value.shape != parameter.shape or value.dtype.itemsize <= parameter.dtype.itemsize:
        return False
    return bool(row.any()) and torch.equal(read_row(value, source).to(row.dtype), row)


def _has_rows(key: str, value: Any, parameter: Tensor) -> bool:
    """Whether a state of the optimizer has a row per row of its parameter; Adafactor's factored state partly does."""
    if not isinstance(value, Tensor):
        if isinstance(value, (list, tuple, dict)):
            _warn_left(key, type(value).__name__)
        return False
    if value.numel() == 1 and parameter.numel() > 1:  # the number of steps
        return False
    if not _is_plain(value):
        _warn_left(key, f"{type(value).__name__} of {value.dtype}")
        return False
    if value.dim() == parameter.dim():  # moments; or torch's Adafactor, which keeps dimensions of size 1
        return value.shape[0] == parameter.shape[0]
    if key.endswith("_col"):  # Transformers' Adafactor: without the last dimension but one, which may be that of the rows
        return parameter.dim() > 2 and value.shape[0] == parameter.shape[0]
    return value.shape == parameter.shape[: value.dim()]


def _is_plain(value: Any) -> bool:
    """Whether rows of it can be read and written: neither quantised nor of a class with ways of its own."""
    return isinstance(value, Tensor) and type(value) in (Tensor, nn.Parameter, DTensor) and value.is_floating_point()


def _warn_left(key: str, what: str) -> None:
    logger.warning_once(
        f"The optimizer's `{key}` ({what}) has no rows that can be copied: a re-initialised expert goes on with that of the "
        "dead one. Use an optimizer with plain fp32 or bf16 states for action='reinit'."
    )
