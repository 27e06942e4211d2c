# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""PEFT's LoRA layers for weights that are sharded (see `expert_lora`). Needs PEFT.

Letters: E experts, R LoRA rank, D and F the two sides of an expert's matrix.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from peft.tuners.lora import layer as peft_layer
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.distributed.tensor._utils import compute_local_shape_and_global_offset


class ParamWrapper(peft_layer.ParamWrapper):
    """LoRA on the experts of this rank, W_e + lora_alpha / r · B_e A_e, cut out of the adapters of all experts.

    PEFT's own makes a parametrization of the experts' weight, which neither a `DTensor` nor FSDP2 lets it. Here the sum stands
    in the weight's place while the experts run: it is put there after FSDP2 has gathered the weight, and taken away before
    FSDP2 frees it. As with PEFT's, autograd keeps that sum for the backward; gradient checkpointing frees it, too. (The name is
    PEFT's, which looks for it.)
    """

    @contextmanager
    def _activate_lora(self, active_adapters: list[str]) -> Iterator[None]:
        adapters = [adapter for adapter in active_adapters if adapter in self.lora_A]
        if not adapters:
            yield
            return
        swap = _Swap(self, adapters)
        experts = self.get_base_layer()
        handles = (
            experts.register_forward_pre_hook(swap.put),
            experts.register_forward_hook(swap.take_away, prepend=True, always_call=True),
        )
        try:
            yield
        finally:
            for handle in handles:
                handle.remove()

    def local_factors(self, adapter: str, weight: Tensor) -> tuple[Tensor, Tensor, float]:
        """(left, right, scale) of this rank's experts: the delta is scale · left @ right.

        Args:
            adapter: its name.
            weight: `[E, ·, ·]`, where it is a `DTensor` sharded over experts only.

        Raises:
            ValueError: the parameter is no stack of matrices.
        """
        if weight.dim() != 3:
            raise ValueError(
                f"`target_parameters` names {self.parameter_name!r} of shape {tuple(weight.shape)}; of experts that are spread "
                "over ranks only stacked matrices [E, out, in] can be adapted. Leave it out."
            )
        left_ENR, right_ERN, scale = self.get_delta_factors(adapter)
        if isinstance(weight, DTensor):
            experts = self.get_base_layer()
            sizes = getattr(getattr(experts, "config", None), "distributed_config", None)
            copies = getattr(sizes, "tp_size", None) or 1
            left_ENR, right_ERN = (_of_rank(factor, weight, experts, copies) for factor in (left_ENR, right_ERN))
        return left_ENR, right_ERN, scale

    def merge(self, safe_merge: bool = False, adapter_names: list[str] | None = None) -> None:
        """Not possible."""
        refuse_to_merge()

    def unload_and_optionally_merge_module(self, merge: bool, safe_merge: bool, adapter_names: list[str] | None) -> nn.Module:
        """See PEFT; without merging."""
        if merge:
            refuse_to_merge()
        return self.get_base_layer()


class _Swap:
    """The weight of one call, and the sum that stands in its place."""

    def __init__(self, wrapper: ParamWrapper, adapters: list[str]) -> None:
        self._wrapper, self._adapters = wrapper, adapters
        self._weight: Any = None
        self._factors: list[Tensor] = []

    def put(self, experts: nn.Module, args: Any) -> None:
        """Before the experts run, and after FSDP2 has gathered their weight."""
        name, parameters = self._wrapper.parameter_name, _parameters(experts)
        weight = parameters[name]
        total = weight.to_local() if isinstance(weight, DTensor) else weight
        self._factors = []
        with torch.autocast(device_type=weight.device.type, enabled=False):
            for adapter in self._adapters:
                left, right, scale = self._wrapper.local_factors(adapter, weight)
                total = torch.baddbmm(total, left, right, alpha=scale)
                self._factors += [left, right]
        self._weight, parameters[name] = weight, total

    def take_away(self, experts: nn.Module, args: Any, output: Any) -> Any:
        """After the experts ran, also where they raised."""
        if self._weight is None:
            return output
        _parameters(experts)[self._wrapper.parameter_name] = self._weight
        factors, self._weight, self._factors = self._factors, None, []
        if not isinstance(output, Tensor):
            return output
        # Every rank averages the gradients of all adapters, in the order in which its backward makes them. So each has to make
        # them all, whether its experts got tokens or not: these sums of nothing are 0, and so are their gradients.
        return output + torch.stack([factor[:0].sum() for factor in factors]).sum().to(output.dtype)


class _TimesCopies(torch.autograd.Function):
    """As it is, with its gradient multiplied: the ranks of a tensor-parallel group share a batch, and each has a part of it."""

    @staticmethod
    def forward(ctx: Any, factor: Tensor, copies: int) -> Tensor:
        ctx.copies = copies
        return factor.view_as(factor)

    @staticmethod
    def backward(ctx: Any, *gradients: Any) -> Any:
        return gradients[0] * ctx.copies, None


def _of_rank(factor_E: Tensor, weight: DTensor, experts: nn.Module, copies: int) -> Tensor:
    """The rows of the experts whose weights lie on this rank, in the order of the weight's rows."""
    shape, offset = compute_local_shape_and_global_offset(weight.shape, weight.device_mesh, weight.placements)
    if copies > 1:
        factor_E = _TimesCopies.apply(factor_E, copies)
    slot_of_expert = getattr(experts, "slot_of_expert", None)
    if slot_of_expert is None:
        return factor_E.narrow(0, min(offset[0], factor_E.shape[0]), shape[0])
    expert_of_slot = torch.argsort(slot_of_expert.to(factor_E.device))
    return factor_E.index_select(0, expert_of_slot[offset[0] : offset[0] + shape[0]])


def _parameters(module: nn.Module) -> dict[str, Any]:
    """For once tensors that are no parameters stand among them, as Transformers' expert parallelism does it."""
    return module._parameters


class _Linear(peft_layer.Linear):
    """LoRA on a linear layer that FSDP2 shards: it computes with the whole weight, whatever its mesh is called."""

    def _get_in_out_features(self, module: nn.Module) -> tuple[int, int] | tuple[None, None]:
        return module.in_features, module.out_features  # type: ignore[return-value]


def make_layer(target: nn.Module, adapter_name: str, config: Any, **kwargs: Any) -> nn.Module | None:
    """PEFT's default layer for a target, which knows of the sharding. To be registered as a custom module."""
    base = target.get_base_layer() if isinstance(target, peft_layer.BaseTunerLayer) else target
    if isinstance(base, nn.Linear) and kwargs.get("parameter_name") is None and not hasattr(base, "_hf_tp_plan"):
        layer: Any = _Linear(target, adapter_name, config=config, **kwargs)
    else:
        layer = peft_layer.dispatch_default(target, adapter_name, config=config, **kwargs)
    if layer is not None:
        adopt(layer)
    return layer


def adopt(layer: nn.Module) -> None:
    """Have a LoRA layer of PEFT know of the sharding."""
    while isinstance(layer, peft_layer.ParamWrapper):
        if type(layer) is peft_layer.ParamWrapper:
            layer.__class__ = ParamWrapper
        layer = layer.base_layer
    if isinstance(layer, peft_layer.LoraLayer):
        vars(layer)["merge"] = refuse_to_merge


def refuse_to_merge(*args: Any, **kwargs: Any) -> None:
    """In place of `merge`.

    Raises:
        ValueError: always.
    """
    raise ValueError(
        "Adapters cannot be merged into a model that is spread over ranks. Save them (`model.save_pretrained(folder)`), and in "
        "one process `PeftModel.from_pretrained(base_model, folder).merge_and_unload()`."
    )
