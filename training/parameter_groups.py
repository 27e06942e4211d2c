# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""The three parts of a Mixture-of-Experts that are trained differently: routers, routed experts, and the rest."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Literal, get_args

import torch
from torch import nn

Part = Literal["rest", "router", "experts"]
PARTS: tuple[Part, ...] = get_args(Part)

_ROUTERS = ("gate", "router")


def parts_of(model: nn.Module) -> dict[str, Part]:
    """The part that each parameter belongs to, by the parameter's name.

    A MoE block is a module with a child `experts` and beside it a `gate` or a `router`: so are ours and all of
    Transformers, in whatever wrappers. What wrappers put inside these children (adapters) belongs to the same part. Shared
    experts, which every token passes, are of the rest, as attention is.
    """
    roots: dict[str, Part] = {}
    for path, experts, router in _blocks(model):
        roots[f"{path}{experts}."], roots[f"{path}{router}."] = "experts", "router"
    prefixes = tuple(roots)
    found: dict[str, Part] = {}
    for name, _ in model.named_parameters():
        inside = name.startswith(prefixes)
        found[name] = next(part for root, part in roots.items() if name.startswith(root)) if inside else "rest"
    return found


def _blocks(model: nn.Module) -> Iterator[tuple[str, str, str]]:
    """Path of each MoE block (with a dot, or empty), and the names of its experts and its router."""
    for path, module in model.named_modules():
        router = next((name for name in _ROUTERS if name in module._modules), None)
        if router is not None and "experts" in module._modules:
            yield f"{path}." if path else "", "experts", router


def freeze_parts(model: nn.Module, parts: Collection[str]) -> None:
    """Take parts of a model out of training.

    Raises:
        ValueError: there is nothing to freeze in a part, or nothing would be left to train.
    """
    part_of = parts_of(model)
    trainable = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    for part in parts:
        if not any(part_of[name] == part for name in trainable):
            raise ValueError(f"`freeze`={part!r}: {_nothing(model, part)} Leave it out.")
    if all(part_of[name] in parts for name in trainable):
        raise ValueError(f"`freeze`={' '.join(parts)!r} leaves no parameter to train. Freeze less.")
    for name, parameter in trainable.items():
        if part_of[name] in parts:
            parameter.requires_grad = False


def trained_parts(model: nn.Module) -> list[Part]:
    """The parts of which something is trained."""
    part_of = parts_of(model)
    trained = {part_of[name] for name, parameter in model.named_parameters() if parameter.requires_grad}
    return [part for part in PARTS if part in trained]


def check_rates(model: nn.Module, rates: Mapping[Part, float | None]) -> None:
    """Refuse a learning rate for a part of which nothing is trained.

    Args:
        model: as it is trained: what is frozen is.
        rates: by part; `None` where no learning rate is given.

    Raises:
        ValueError: there is such a part.
    """
    trained = trained_parts(model)
    for part, rate in rates.items():
        if rate is not None and part not in trained:
            raise ValueError(f"`{RATE_OPTIONS[part]}`={rate}: {_nothing(model, part)} Leave it out.")


RATE_OPTIONS: dict[Part, str] = {
    "rest": "learning_rate",
    "router": "router_learning_rate",
    "experts": "expert_learning_rate",
}


def split_groups(optimizer: torch.optim.Optimizer, model: nn.Module, rates: Mapping[Part, float | None]) -> None:
    """Split the groups of an optimizer that has not made a step by part, the rest first, each with its learning rate.

    Everything else of a group (weight decay, …) stays as it is; a group says in `part` what it is.

    Args:
        optimizer: of Trainer.
        model: whose parameters it has.
        rates: by part; `None` for the learning rate that the group has.

    Raises:
        ValueError: the optimizer does not have each trainable parameter once, so rates cannot be given.
    """
    part_of = {id(parameter): part for parameter, part in zip(model.parameters(), parts_of(model).values(), strict=True)}
    held = [id(parameter) for group in optimizer.param_groups for parameter in group["params"]]
    if sorted(held) != sorted(id(parameter) for parameter in model.parameters() if parameter.requires_grad):
        given = [RATE_OPTIONS[part] for part, rate in rates.items() if rate is not None]
        if given:
            raise ValueError(
                f"`{given[0]}`: {type(optimizer).__name__} makes parameter groups of its own. Choose another `optim`, such as "
                "'adamw_torch'."
            )
        return
    groups = []
    for part in PARTS:
        rate = rates.get(part)
        for group in optimizer.param_groups:
            parameters = [parameter for parameter in group["params"] if part_of[id(parameter)] == part]
            if parameters:
                changed = {} if rate is None else {"lr": rate}
                groups.append({**group, **changed, "part": part, "params": parameters})
    optimizer.param_groups[:] = groups


def _nothing(model: nn.Module, part: str) -> str:
    """Why nothing of a part is trained."""
    count = sum(found == part for found in parts_of(model).values())
    what = {"router": "router", "experts": "routed experts", "rest": "model but routers and experts"}[part]
    if count:
        return f"no parameter of the {what} is trained: all {count} are frozen."
    return f"the {type(model).__name__} has no parameter in the {what}."


__all__ = ["PARTS", "RATE_OPTIONS", "Part", "check_rates", "freeze_parts", "parts_of", "split_groups", "trained_parts"]
