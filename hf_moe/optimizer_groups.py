# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""State and options of an optimizer, parameter by parameter, so that they fit groups that are cut otherwise.

Parameters on different meshes cannot share a group, so the groups of a training depend on how the model is spread.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import BytesStorageMetadata
from torch.distributed.tensor import DTensor

from .tensor_pieces import clean_name, reshard

# What is no part of a training, but of the machine that it runs on.
_OF_MACHINE = ("params", "param_names", "foreach", "fused", "capturable")


def plain_optimizer(optimizer: Any) -> torch.optim.Optimizer:
    """Without Accelerate's wrapper."""
    return getattr(optimizer, "optimizer", optimizer)


def optimized_parameters(model: nn.Module, optimizer: torch.optim.Optimizer) -> dict[str, tuple[nn.Parameter, dict[str, Any]]]:
    """The parameters that an optimizer has, each with its group, by name.

    Raises:
        ValueError: it has one that the model has not.
    """
    reshard(model)
    names = {id(parameter): clean_name(name) for name, parameter in model.named_parameters()}
    pairs = [(parameter, group) for group in optimizer.param_groups for parameter in group["params"]]
    if any(id(parameter) not in names for parameter, _ in pairs):
        raise ValueError("The optimizer has a parameter that the model has not. Make it of the model as it is trained.")
    return {names[id(parameter)]: (parameter, group) for parameter, group in pairs}


def empty_like_saved(name: str, parameter: Tensor, group: dict[str, Any], info: Any) -> Tensor | None:
    """Where to load an entry of an optimizer's state; `None` for one that is no tensor."""
    if isinstance(info, BytesStorageMetadata):
        return None
    dtype = info.properties.dtype
    if info.size == parameter.shape:
        return torch.empty_like(parameter, dtype=dtype, requires_grad=False)
    if len(info.size) and isinstance(parameter, DTensor):
        raise ValueError(
            f"{name} is {list(info.size)}, the parameter {list(parameter.shape)}: resume without EP, or use AdamW."
        )
    on_device = len(info.size) > 0 or group.get("capturable") or group.get("fused")  # torch's rule for `step`
    return torch.empty(info.size, dtype=dtype, device=parameter.device if on_device else "cpu")


def group_options(group: Mapping[str, Any]) -> dict[str, Any]:
    """The options of a group that a checkpoint keeps."""
    return {option: value for option, value in group.items() if option not in _OF_MACHINE}


def set_group_options(
    optimizer: torch.optim.Optimizer, names: Mapping[nn.Parameter, str], options: Mapping[str, Mapping[str, Any]]
) -> None:
    """Give the groups of an optimizer the options that their parameters had.

    Args:
        optimizer: whose groups may be others than those of the checkpoint.
        names: of its parameters.
        options: by parameter name, as they were saved.

    Raises:
        ValueError: a parameter was not trained, or parameters of one group had different options.
    """
    for group in optimizer.param_groups:
        of_group = [names[parameter] for parameter in group["params"]]
        unknown = next((name for name in of_group if name not in options), None)
        if unknown is not None:
            raise ValueError(f"{unknown} was not trained when the checkpoint was saved. Freeze what was frozen then.")
        for name in of_group[1:]:
            other = [o for o, value in options[name].items() if not _same(value, options[of_group[0]].get(o))]
            if other:
                raise ValueError(
                    f"`{other[0]}` of {name} was {options[name][other[0]]}, of {of_group[0]} "
                    f"{options[of_group[0]].get(other[0])}, but both are in one group. Give the learning rates of then."
                )
        if of_group:
            group.update(options[of_group[0]])


def _same(one: Any, other: Any) -> bool:
    if isinstance(one, Tensor) or isinstance(other, Tensor):
        return isinstance(one, Tensor) and isinstance(other, Tensor) and torch.equal(one, other)
    return one == other


__all__ = ["empty_like_saved", "group_options", "optimized_parameters", "plain_optimizer", "set_group_options"]
