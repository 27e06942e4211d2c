# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""The fields of a recipe as options of another command, with a prefix: `--upcycle_num_experts 8`. Needs no torch."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .cli import RECIPE_HELP
from .errors import ConversionError
from .methods import METHODS
from .recipe import METHOD_OPTIONS, MOE_FIELDS, Recipe, parse_yaml, read_yaml

# Fields that have no option: they are the command's own, or concern what is written.
_WITHOUT = ("source", "destination", "options", "moe", "max_shard_size", "dtype", "trust_remote_code")
_LISTS = ("models", "layers")
_TEXTS = ("models", "text", "gguf_file", "revision", "method", "preset", "router_init")  # not to be read as YAML


def recipe_options(prefix: str) -> list[tuple[str, Any, Any]]:
    """Name, type and field of every option, as `dataclasses.make_dataclass` takes them; all of them `None` by default.

    Values are YAML, as those of `hf-moe upcycle`.
    """
    helps = {field.name: RECIPE_HELP.get(field.name, "") for field in dataclasses.fields(Recipe) if field.name not in _WITHOUT}
    helps["verify"] = "compare the MoE with the dense model before training (default: false)"
    for name, option in METHOD_OPTIONS.items():
        owner = next(n for n, method in METHODS.items() if option in dataclasses.fields(method))
        helps[name] = f"{owner}: {option.metadata['help']} ({option.metadata['allowed']}; default: {option.default})"
    helps |= {name: f"field of MoEConfig (default: {field.default})" for name, field in MOE_FIELDS.items()}
    return [
        (
            f"{prefix}{name}",
            list[str] | None if name in _LISTS else str | None,
            dataclasses.field(default=None, metadata={"help": text.replace("%", "%%")}),
        )
        for name, text in helps.items()
    ]


def recipe_of(given: Mapping[str, Any], prefix: str, config: str | None = None, **fields: Any) -> Recipe:
    """The recipe that options describe.

    Args:
        given: values by option; `None` where an option is not given.
        prefix: of the options.
        config: a recipe file; options count more.
        fields: of the recipe, which count most.

    Raises:
        ConversionError: a value is not allowed; the message names the option.
    """
    values = {name.removeprefix(prefix): value for name, value in given.items() if value is not None}
    values = {name: _value(f"--{prefix}{name}", name, value) for name, value in values.items()}
    if isinstance(values.get("router_prompts"), str):
        values["router_prompts"] = read_yaml(Path(values["router_prompts"])).get("router_prompts")
    values = {"verify": False, **values, **fields}
    if config is None:
        return Recipe.from_dict(values)
    written = {"destination": None}  # a recipe for `hf-moe upcycle` has one
    return Recipe.read(config, **values, **written)


def _value(option: str, name: str, value: Any) -> Any:
    import yaml

    if isinstance(value, list):
        return [_value(option, name, item) for item in value]
    if not isinstance(value, str) or name in _TEXTS:
        return value
    try:
        return parse_yaml(value)
    except (ValueError, RecursionError, yaml.YAMLError) as error:  # an impossible date is a ValueError
        raise ConversionError(f"`{option}`={value!r} is not a value ({' '.join(str(error).split())[:120]}).") from error
