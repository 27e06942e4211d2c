# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Registers the classes with `AutoConfig`, `AutoModel` and `AutoModelForCausalLM`, and has the public names of `hf_moe`."""

from importlib.util import find_spec
from typing import Any

from transformers import AutoConfig, AutoModel, AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from .configuration_moe import PRESETS, MoEConfig
from .dense_ffn import UnsupportedArchitectureError
from .fast_experts import GPU_NAME
from .modeling_moe import MoECausalLMOutputWithPast, MoEForCausalLM, MoEModel
from .moe_layer import MoELayer
from .record import RoutingRecord, checkpoint_with_record, record_routing
from .routers import KERNELS as ROUTER_KERNELS
from .routing import Routing

AutoConfig.register(MoEConfig.model_type, MoEConfig, exist_ok=True)
AutoModel.register(MoEConfig, MoEModel, exist_ok=True)
AutoModelForCausalLM.register(MoEConfig, MoEForCausalLM, exist_ok=True)


def _with_triton(*args: Any) -> Any:
    """The experts of `hf_moe.triton_experts`, imported when they first run: Triton takes a while."""
    from .triton_experts import triton_experts_forward

    return triton_experts_forward(*args)


def _route_with_triton(logits_TE: Any, *args: Any, **kwargs: Any) -> Any:
    """The choice of `hf_moe.triton_router`, or `None` for logits that it does not take."""
    from .triton_router import route, supports

    return route(logits_TE, *args, **kwargs) if supports(logits_TE) else None


if find_spec("triton") is not None:
    ROUTER_KERNELS["cuda"] = _route_with_triton
    ALL_EXPERTS_FUNCTIONS.register(GPU_NAME, _with_triton)

__all__ = [
    "PRESETS",
    "MoECausalLMOutputWithPast",
    "MoEConfig",
    "MoEForCausalLM",
    "MoELayer",
    "MoEModel",
    "Routing",
    "RoutingRecord",
    "UnsupportedArchitectureError",
    "checkpoint_with_record",
    "record_routing",
]
