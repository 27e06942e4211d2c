# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""PEFT's adapters on a model whose experts are spread over ranks.

    model = load_expert_parallel("my-moe", accelerator, ep_size=8)
    model = get_peft_model(model, moe_lora_config(model))
    sync_replicated_parameters(model)  # not under `Trainer`, which does it itself

The adapters come after the sharding. They are small, so every rank holds those of all experts, whole and as plain tensors; in
the forward it cuts out those of the experts that it has. Their gradients are averaged over all ranks: an expert's gradient is
the sum over the ranks that hold it (the others have 0), divided by the number of batches, as it is for the experts' own
weights. The saved adapter is therefore that of one process, and any run can load it.
"""

from __future__ import annotations

from functools import partial
from typing import TYPE_CHECKING, Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from torch.distributed.tensor import DTensor

if TYPE_CHECKING:
    from peft import LoraConfig

_PREPARED = "_hf_moe_allows_adapters"
_SYNCED = "_replicated_grad_hook_registered"  # `Trainer`'s mark, so that no gradient is averaged twice


def allow_adapters(model: nn.Module) -> None:
    """Prepare a model that was sharded at load time for PEFT, without adapters yet; any other model is left alone.

    `load_expert_parallel` and `moe_lora_config` call it. After that any way to attach adapters works: `get_peft_model`,
    `PeftModel.from_pretrained`, `model.add_adapter`, TRL.
    """
    sharded: Any = model
    if not getattr(sharded, "is_distributed_loading_by_transformers", False) or _PREPARED in vars(model):
        return
    vars(model)[_PREPARED] = True
    if sharded._tp_size == 1:
        sharded._tp_size = None  # PEFT takes any other value for tensor parallelism, and gathers the whole model to save
    model.register_load_state_dict_post_hook(_adopt_all)
    for module in model.modules():
        if any(_is_sharded(child) for child in module.children()):
            module.register_forward_pre_hook(_adopt_children)
        if _is_sharded(module):  # what `modules_to_save` copies is trained as it is: whole, on every rank
            vars(module)["__deepcopy__"] = partial(_whole_copy, module)


def sharded_lora_config(config: LoraConfig) -> LoraConfig:
    """A config whose adapters fit a sharded model from the start. `moe_lora_config` calls it where the model is sharded.

    A config of your own needs it for attention under HSDP (`dense="hybrid"`), whose shards PEFT 0.21 takes for those of tensor
    parallelism; and merging is then refused in plain words for all layers, whether they have run or not.

    Args:
        config: changed in place, and returned. What it is saved as stays the same.
    """
    from .expert_lora_layers import make_layer

    config._register_custom_module({nn.Module: make_layer})  # type: ignore[dict-item]  # it is only called
    return config


def sync_replicated_parameters(model: nn.Module) -> None:
    """Keep what is trained but not sharded (adapters, copies of routers) the same on all ranks, for loops without `Trainer`.

    The first rank's values go to all; from then on every gradient that a backward leaves is averaged over all ranks, under
    `accelerator.accumulate` that of the last micro-batch, with what came before. All ranks have to call it together.

    Args:
        model: with adapters.
    """
    if not (dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1):
        return
    for parameter in model.parameters():
        if not parameter.requires_grad or isinstance(parameter.data, DTensor):
            continue
        with torch.no_grad():
            dist.broadcast(parameter.data, src=0)
        if not getattr(parameter, _SYNCED, False):
            parameter.register_post_accumulate_grad_hook(_average_gradient)
            setattr(parameter, _SYNCED, True)


def _average_gradient(parameter: Tensor) -> None:
    from accelerate.state import GradientState

    if GradientState().sync_gradients:
        assert parameter.grad is not None
        dist.all_reduce(parameter.grad)
        parameter.grad /= dist.get_world_size()


def _is_sharded(module: nn.Module) -> bool:
    return any(isinstance(parameter, DTensor) for parameter in module.parameters(recurse=False))


def _adopt_children(module: nn.Module, args: Any) -> None:
    """Before a module runs: the adapters that PEFT put on its children become those that know of the sharding."""
    for child in module.children():
        if "lora_A" in child._modules:
            from .expert_lora_layers import adopt

            adopt(child)


def _adopt_all(model: nn.Module, incompatible_keys: Any) -> None:
    """After an adapter was loaded."""
    for module in model.modules():
        _adopt_children(module, ())


@torch.no_grad()
def _whole_copy(module: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A copy with plain parameters, gathered from all ranks, which have to call it together.

    Raises:
        ValueError: the module computes with a part of its parameters.
    """
    if "forward" in vars(module):  # Transformers hangs tensor and expert parallelism in there
        raise ValueError(
            f"`modules_to_save` names a {type(module).__name__} that is split over ranks by expert or tensor parallelism; only "
            "adapters train there. Name it in `target_parameters` or `target_modules` (`moe_lora_config` does)."
        )
    # `fully_shard` puts two classes before a module's own
    kind: Any = type(module).__mro__[2] if isinstance(module, FSDPModule) else type(module)
    copy: nn.Module = kind.__new__(kind)
    nn.Module.__init__(copy)
    skipped = {*vars(copy), "__deepcopy__", "forward"}
    vars(copy).update({name: value for name, value in vars(module).items() if name not in skipped})
    copy.training = module.training
    for name, parameter in module._parameters.items():
        if parameter is not None:
            whole = parameter.full_tensor() if isinstance(parameter, DTensor) else parameter
            parameter = nn.Parameter(whole.detach().clone(), requires_grad=parameter.requires_grad)
        copy.register_parameter(name, parameter)
    for name, buffer in module._buffers.items():
        copied = None if buffer is None else buffer.clone()
        copy.register_buffer(name, copied, persistent=name not in module._non_persistent_buffers_set)
    for name, child in module.named_children():
        copy.add_module(name, _whole_copy(child, memo))
    memo[id(module)] = copy
    return copy
