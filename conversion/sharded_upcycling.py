# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""A dense checkpoint upcycled straight into the shards of a model that is spread over ranks.

Every rank reads configs and headers and plans the whole Mixture-of-Experts. Then Transformers loads it as it would load a
checkpoint (`from_pretrained(…, distributed_config=…)`), the plan in the place of the files: each rank computes its experts and
its rows of the rest, one tensor at a time, and nothing is written. Random draws have a generator of their own for each tensor,
so the model is, bit by bit, the one that `upcycle` writes.

    rank 0: experts 0 … 3  ◀─┐              ┌─▶ experts 8 … 11 :rank 2
    rank 1: experts 4 … 7  ◀─┴─ dense files ┴─▶ experts 12 … 15 :rank 3

What depends on calibration (`router_init="prompts"`, `method="split"`) is computed by rank 0, which holds the dense model
for that time where text is run through it, and sent to the others.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

from .in_memory import PlannedModel, plan_upcycled
from .recipe import Recipe

if TYPE_CHECKING:
    import torch
    from transformers.distributed import DistributedConfig

    from hf_moe.modeling_moe import MoEForCausalLM


def upcycle_into_shards(
    source: str | os.PathLike | None,
    recipe: Recipe | Mapping[str, Any] | str | os.PathLike,
    *,
    distributed_config: DistributedConfig | dict[str, Any] | None = None,
    dtype: str | torch.dtype | None = None,
    **kwargs: Any,
) -> MoEForCausalLM:
    """Upcycle a dense checkpoint into a model of which each rank holds its shard. To be called on every rank.

    No rank ever holds more than its shard and one tensor, unless Transformers merges or splits the dense model's own tensors
    on loading, or `gguf_file` is given: then each has the dense model in memory as well.

    Args:
        source: a folder or Hub id of a dense checkpoint; `None`: the recipe's.
        recipe: a `Recipe`, its fields by name (`{"num_experts": 16, "method": "noise", …}`), or a YAML file. Its
            `destination` and `verify` are not looked at: save the model to have it on disk.
        distributed_config: how it is spread; `None`: not at all.
        dtype: to load it in; `None`: the recipe's.
        kwargs: more arguments of `from_pretrained`.

    Returns:
        The model, in evaluation mode. Its config is the one that `upcycle` writes.

    Raises:
        ConversionError (a `ValueError`): recipe and source do not fit, or the source is damaged.
        UnsupportedArchitectureError: the source has no FFN that could be replaced.
    """
    planned = plan_into_shards(source, recipe)
    return planned.build(distributed_config=distributed_config, dtype=dtype, **kwargs)


def plan_into_shards(source: str | os.PathLike | None, recipe: Recipe | Mapping[str, Any] | str | os.PathLike) -> PlannedModel:
    """The first half of `upcycle_into_shards`: its result's `config` is known before it is settled how the model is spread.

    `planned.build(distributed_config=…, **kwargs)` is the second half.

    Raises:
        ConversionError, UnsupportedArchitectureError: as `upcycle_into_shards`.
    """
    given: dict[str, Any] = {"verify": False} if source is None else {"verify": False, "source": os.fspath(source)}
    if isinstance(recipe, Recipe):
        return plan_upcycled(dataclasses.replace(recipe, **given))
    if isinstance(recipe, Mapping):
        return plan_upcycled(Recipe.from_dict({**recipe, **given}))
    return plan_upcycled(Recipe.read(recipe, **given))


__all__ = ["plan_into_shards", "upcycle_into_shards"]
