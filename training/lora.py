# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""LoRA for Mixtures-of-Experts with PEFT: what is adapted is said, and nothing else is.

PEFT's own short forms mean different things in different MoEs: `target_modules="all-linear"` leaves out stacked experts, which
are parameters and no modules, and may take in the router. `moe_lora_config` finds the parts of a model by their structure and
names them one by one:

- attention projections (and whatever else mixes tokens), shared experts and dense FFNs: ordinary LoRA on each linear layer;
- routed experts: one pair A_e `[r, in]`, B_e `[out, r]` for each expert and stacked matrix (PEFT's `target_parameters`), so
  that W_e becomes W_e + lora_alpha / r · B_e A_e. All parts of one stacked matrix share A_e: gate and up have one A;
- the router: left alone, or trained whole (`modules_to_save`). Its [E, D] matrix has hardly more rows than the rank, so that a
  pair of low rank saves nothing; it keeps its fp32, and what else decides the routing (noise weights, thresholds, the bias of
  loss-free balancing) is saved with the adapter.
"""

from __future__ import annotations

import copy
import os
from collections.abc import Callable, Collection, Iterable
from typing import TYPE_CHECKING, Any

import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel

from hf_moe.expert_lora import allow_adapters, sharded_lora_config

from .lora_export import export_expert_adapters
from .lora_parts import ATTENTION, DENSE_FFN, EXPERTS, KINDS, ROUTER, SHARED_EXPERTS, Part, below_layer, find_parts
from .lora_summary import LoraSummary, lora_summary

if TYPE_CHECKING:
    from peft import LoraConfig

# Fields of `LoraConfig` that say where adapters go, which is what `moe_lora_config` is for.
_PLACES = (
    "target_modules", "target_parameters", "exclude_modules", "layers_to_transform", "layers_pattern", "layer_replication",
)  # fmt: skip
# What PEFT cannot do on parameters; all of it is off by default.
_NOT_ON_PARAMETERS = ("lora_dropout", "use_dora", "lora_bias", "fan_in_fan_out")


def moe_lora_config(
    model: nn.Module,
    *,
    experts: bool = True,
    router: bool = False,
    attention: bool = True,
    shared_experts: bool | None = None,
    dense_ffns: bool | None = None,
    r: int = 8,
    lora_alpha: float = 16,
    lora_dropout: float = 0.0,
    verbose: bool = True,
    **kwargs: Any,
) -> LoraConfig:
    """A `LoraConfig` for a MoE of hf_moe or of Transformers, over any dense family.

    Args:
        model: without adapters. Its weights may be on the meta device, or sharded at load time (`load_expert_parallel`).
        experts: adapt the routed experts, each with a pair of its own.
        router: train the routers whole, and the gates that mix shared and routed experts; else they stay as they are.
        attention: adapt all linear layers that mix tokens.
        shared_experts: adapt the experts that every token passes (default: as `experts`).
        dense_ffns: adapt the FFNs of the layers without experts (default: as `experts`).
        r, lora_alpha, lora_dropout: as in `LoraConfig`. Dropout is not to be had on stacked experts.
        verbose: print the table of `lora_summary`, on the main process.
        kwargs: further fields of `LoraConfig`; `modules_to_save` is added to the routers.

    Returns:
        What `get_peft_model`, `SFTTrainer(peft_config=…)` and `model.add_adapter` take.

    Raises:
        ValueError: a part that is asked for is not there, or PEFT cannot do what is asked.

    Example:
        >>> from transformers import LlamaConfig
        >>> from hf_moe import MoEConfig, MoEForCausalLM
        >>> text_config = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        ...                           num_key_value_heads=2, vocab_size=64)
        >>> model = MoEForCausalLM(MoEConfig(text_config=text_config, num_experts=4))
        >>> config = moe_lora_config(model, attention=False, r=4, verbose=False)
        >>> sorted(config.target_parameters)
        ['mlp.experts.down_proj', 'mlp.experts.gate_up_proj']
    """
    from peft import LoraConfig

    parts = find_parts(model)
    wanted = {
        ATTENTION: attention,
        EXPERTS: experts,
        SHARED_EXPERTS: experts if shared_experts is None else shared_experts,
        DENSE_FFN: experts if dense_ffns is None else dense_ffns,
        ROUTER: router,
    }
    _check_parts(model, parts, {EXPERTS: experts, SHARED_EXPERTS: bool(shared_experts), DENSE_FFN: bool(dense_ffns)})
    _check_fields(kwargs)
    chosen = [part for part in parts if wanted.get(part.kind)]
    options: dict[str, Any] = {"r": r, "lora_alpha": lora_alpha, "lora_dropout": lora_dropout, **kwargs}
    if getattr(model, "get_output_embeddings", lambda: None)() is not None:
        options.setdefault("task_type", "CAUSAL_LM")
    config = LoraConfig(**{**options, **_targets(model, chosen, list(kwargs.get("modules_to_save") or []))})
    config = _keep_targets(config, model, options)
    _check_parameters(config, options)
    if getattr(model, "is_distributed_loading_by_transformers", False):
        allow_adapters(model)
        config = sharded_lora_config(config)
    if verbose and _is_main_process():
        print(lora_summary(model, config))
    return config


def _check_parts(model: nn.Module, parts: list[Part], asked: dict[str, bool]) -> None:
    if any(".lora_" in name for name, _ in model.named_parameters()):
        raise ValueError("`model` has adapters already. Give the model below them, or merge them (`merge_and_unload`) first.")
    found = {part.kind for part in parts}
    options = {EXPERTS: "experts", SHARED_EXPERTS: "shared_experts", DENSE_FFN: "dense_ffns"}
    for kind, is_asked in asked.items():
        if is_asked and kind not in found:
            raise ValueError(
                f"`{options[kind]}`=True, but `model` of class {type(model).__name__} has no {kind}. Set it to False."
            )


def _check_fields(kwargs: dict[str, Any]) -> None:
    given = [name for name in _PLACES if kwargs.get(name) is not None]
    if given:
        raise ValueError(
            f"`{given[0]}`={kwargs[given[0]]!r} says where adapters go, and so do `attention`, `experts`, `shared_experts`, "
            "`dense_ffns` and `router`. Use these, or make a `peft.LoraConfig` yourself."
        )


def _check_parameters(config: LoraConfig, options: dict[str, Any]) -> None:
    if not (config.target_modules or config.target_parameters):
        raise ValueError(
            "Nothing is to be adapted: `attention`, `experts`, `shared_experts` and `dense_ffns` are False or not there. Set "
            "one of them to True (`router` alone needs no adapters: freeze the other parameters)."
        )
    for name in _NOT_ON_PARAMETERS:
        if config.target_parameters and options.get(name):
            raise ValueError(
                f"`{name}`={options[name]!r} is not possible on {config.target_parameters[0]!r} and other parameters, which "
                "PEFT adapts by adding to the weight. Leave it out, or set `experts`=False."
            )


def _targets(model: nn.Module, chosen: list[Part], modules_to_save: list[str]) -> dict[str, Any]:
    """The fields of `LoraConfig` that name the parts."""
    module_names = [name for name, _ in model.named_modules()]
    parameter_names = [name for name, _ in model.named_parameters(remove_duplicate=False)]
    has_parameters = any(part.how == "parameter" for part in chosen)
    # PEFT sets `fan_in_fan_out` for the transposed linear layers of GPT-2, and then refuses parameters; so they become some
    transposed = {part.name for part in chosen if part.is_transposed}
    as_parameters = [f"{name}.weight" for name in transposed] if has_parameters else []
    modules = {part.name for part in chosen if part.how == "module"} - (transposed if has_parameters else set())
    parameters = {part.name for part in chosen if part.how == "parameter"} | set(as_parameters)
    routers = {part.name for part in chosen if part.how == "whole" and part.size}
    return {
        "target_modules": _short(modules, module_names, _ends_with),
        "target_parameters": _short(parameters, parameter_names, _ends_with) or None,
        "modules_to_save": [*_short(routers, module_names, str.endswith), *modules_to_save] or None,
        "fan_in_fan_out": bool(transposed) and not has_parameters,
    }


def _ends_with(name: str, target: str) -> bool:
    """How PEFT matches targets."""
    return name == target or name.endswith(f".{target}")


def _short(names: Collection[str], all_names: Iterable[str], matches: Callable[[str, str], bool]) -> list[str]:
    """The names without what comes before and with the layer's index, where that means the same modules; else whole."""
    groups: dict[str, set[str]] = {}
    for name in names:
        groups.setdefault(below_layer(name), set()).add(name)
    found: set[str] = set()
    for short, group in groups.items():
        matched = {name for name in all_names if matches(name, short)}
        found |= {short} if matched <= set(names) else group
    return sorted(found)


def _keep_targets(config: LoraConfig, model: nn.Module, options: dict[str, Any]) -> LoraConfig:
    """The config, with targets that PEFT would mistake for the experts of an old checkpoint named as parameters.

    In native MoEs it takes every `gate_proj`, `up_proj` and `down_proj` (in Mixtral `w1` …) for those of the routed experts,
    also the shared experts' and the dense layers'.
    """
    from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    from transformers.conversion_mapping import get_model_conversion_mapping

    if not config.target_modules or not isinstance(model, PreTrainedModel):
        return config
    converted = copy.deepcopy(config)
    convert_peft_config_for_transformers(converted, model, get_model_conversion_mapping(model))
    mistaken = set(config.target_modules) - set(converted.target_modules or ())
    if not mistaken:
        return config
    parameters = sorted({*(config.target_parameters or ()), *(f"{name}.weight" for name in mistaken)})
    kept = sorted(set(config.target_modules) - mistaken)
    targets = {"target_modules": kept, "target_parameters": parameters, "modules_to_save": config.modules_to_save}
    return type(config)(**{**options, **targets})


def _is_main_process() -> bool:
    if dist.is_available() and dist.is_initialized():
        return dist.get_rank() == 0
    return int(os.environ.get("RANK", "0")) == 0


__all__ = ["KINDS", "LoraSummary", "export_expert_adapters", "lora_summary", "moe_lora_config"]
