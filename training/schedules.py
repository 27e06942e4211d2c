# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""What changes with the optimizer step: frozen routers at first, the capacity factor, the routers' noise.

Everything here is a function of `state.global_step`, so a resumed training goes on exactly.
"""

from __future__ import annotations

from abc import abstractmethod
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.utils.weak import WeakTensorKeyDictionary
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_moe.configuration_moe import NOISY_ROUTERS
from hf_moe.moe_layer import MoELayer
from hf_moe.routers import Router

from .expert_rows import refuse_flat_parameters, trained_module
from .watching import watch_routing


def linear_schedule(start: float, end: float, steps: int, step: int) -> float:
    """`start` before the first of `steps` optimizer steps, `end` after the last, a line between; then `end`.

    Args:
        start, end: the values.
        steps: optimizer steps from one to the other.
        step: optimizer steps made.
    """
    return float(end) if step >= steps else start + (end - start) * step / steps


class _LayerSchedule(TrainerCallback):
    """Sets something of every MoE layer at the beginning of every optimizer step.

    Args:
        start, end: values.
        steps: optimizer steps from one to the other.
    """

    def __init__(self, start: float | None, end: float | None, steps: int) -> None:
        if not isinstance(steps, int) or steps < 1:
            raise ValueError(f"`steps`={steps!r} must be an int of at least 1.")
        self.start, self.end, self.steps = start, end, steps
        self._layers: list[MoELayer] = []

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._layers = [module for module in kwargs["model"].modules() if isinstance(module, MoELayer)]
        if not self._layers:
            raise ValueError(
                f"{type(self).__name__} changes the MoE layers of hf_moe, and `model` of class "
                f"{type(kwargs['model']).__name__} has none. Import a native MoE first (`hf-moe import`), or train without it."
            )
        self._check()
        self._set(state.global_step)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._set(state.global_step)

    @abstractmethod
    def _check(self) -> None:
        """Raise ValueError if the schedule does not fit the layers."""

    @abstractmethod
    def _set(self, step: int) -> None:
        """Give the layers the values for the optimizer step that follows `step` others."""


class CapacityScheduleCallback(_LayerSchedule):
    """Anneals the capacity factor: how much of its fair share of a sequence an expert may take in training.

    The optimizer step after `n` others is made with the value on the line from `start` (n = 0) to `end` (n = `steps` and
    later). A dropless end of the line is the smallest factor at which nothing can be dropped, E / K (`expert_choice`, whose
    factor is the average number of experts per token: K); from `steps` on a dropless `end` is `None` itself.

    The value is also that of `config.capacity_factor`. So a checkpoint has the one with which its last step was made, and
    the trained model has `end` if `steps` were reached. `eval_capacity_factor` is left alone.

    Args:
        start, end: positive numbers, or `None` for dropless.
        steps: optimizer steps from one to the other.

    Raises:
        ValueError: a value is out of range; at the beginning of training: the router has no capacity.

    Example:
        >>> from hf_moe.training import CapacityScheduleCallback
        >>> callback = CapacityScheduleCallback(start=2.0, end=1.25, steps=1000)
    """

    def __init__(self, start: float | None, end: float | None, steps: int) -> None:
        super().__init__(start, end, steps)
        for name, value in (("start", start), ("end", end)):
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"`{name}`={value!r} must be a positive number, or None (dropless).")

    def _check(self) -> None:
        if any(layer.config.router_type == "strictly_balanced" for layer in self._layers):
            raise ValueError(
                "`router_type`='strictly_balanced' has no capacity: every expert takes the same number of tokens already. "
                "Train without CapacityScheduleCallback."
            )

    def _set(self, step: int) -> None:
        value = self._value(step)
        for layer in self._layers:
            layer.config.capacity_factor = value
            layer.set_capacity_factor(value)

    def _value(self, step: int) -> float | None:
        if step >= self.steps or self.start == self.end:
            return self.end
        dropless = max(
            layer.top_k if layer.config.router_type == "expert_choice" else layer.num_experts / layer.top_k
            for layer in self._layers
        )
        start, end = (dropless if value is None else value for value in (self.start, self.end))
        return linear_schedule(start, end, self.steps, step)


class NoiseScheduleCallback(_LayerSchedule):
    """Anneals the routers' noise in training: a factor on the gating noise of `noisy_top_k` and `hierarchical`, and on
    `router_jitter_noise` of any router.

    1 is the noise of the paper and of the config, 0 is none. The smooth load of the noisy routers is that of the scaled
    noise; its standard deviation does not fall below the paper's smallest, so that the load loss stays finite. The factor
    (`Router.noise_scale`) is in no config and no checkpoint, and is 1 again when training has ended; noise is never drawn in
    evaluation.

    Args:
        start, end: factors of at least 0.
        steps: optimizer steps from one to the other.

    Raises:
        ValueError: a value is out of range; at the beginning of training: the routers draw no noise.

    Example:
        >>> from hf_moe.training import NoiseScheduleCallback
        >>> callback = NoiseScheduleCallback(start=1.0, end=0.0, steps=1000)
    """

    def __init__(self, start: float, end: float, steps: int) -> None:
        super().__init__(start, end, steps)
        for name, value in (("start", start), ("end", end)):
            if not 0 <= value < float("inf"):
                raise ValueError(f"`{name}`={value!r} must be a number of at least 0 (1 is the config's noise).")
        self._values = float(start), float(end)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._scale(1.0)

    def _check(self) -> None:
        for layer in self._layers:
            kind, jitter = layer.config.router_type, layer.config.router_jitter_noise
            if kind not in NOISY_ROUTERS and not jitter:
                raise ValueError(
                    f"`router_type`={kind!r} draws no noise that could be scaled. Set `router_jitter_noise`, use one of "
                    f"{NOISY_ROUTERS}, or train without NoiseScheduleCallback."
                )
            if jitter * max(self._values) >= 1:
                raise ValueError(
                    f"`router_jitter_noise`={jitter} times {max(self._values)} must stay under 1. Lower `start` and `end`."
                )

    def _set(self, step: int) -> None:
        self._scale(linear_schedule(*self._values, self.steps, step))

    def _scale(self, scale: float) -> None:
        for layer in self._layers:
            for module in layer.gate.modules():  # PEFT may have wrapped it
                if isinstance(module, Router):
                    module.noise_scale = scale


class RouterFreezeCallback(TrainerCallback):
    """Keeps all routers as they are until an optimizer step: experts that were just made can settle first.

    Until then a router's parameters have no gradient when the optimizer steps, so neither momentum nor weight decay moves
    them and no state of theirs ages; `requires_grad` is left alone, so that DDP and FSDP2 see every parameter used. Their
    gradients are 0 from the start, so they do not count in the norm that is logged and clipped by. After `until_step`
    optimizer steps they train as if for the first time.

    The bias of loss-free balancing is no parameter and goes on moving: balance is what a frozen router lacks. Leave
    `LossFreeBalancingCallback` out to keep it.

    Args:
        until_step: optimizer steps without change to the routers, counted from the beginning of the whole training.

    Raises:
        ValueError: it is negative; at the beginning of training: no router has parameters, or DeepSpeed or FSDP1 is used.

    Example:
        >>> from hf_moe.training import RouterFreezeCallback
        >>> callback = RouterFreezeCallback(until_step=500)
    """

    def __init__(self, until_step: int) -> None:
        if not isinstance(until_step, int) or until_step < 0:
            raise ValueError(f"`until_step`={until_step!r} must be an int of at least 0.")
        self.until_step = until_step
        self._routers: list[nn.Module] = []
        self._handles: list[Any] = []  # of hooks
        self._gathered = WeakTensorKeyDictionary()  # FSDP2's whole parameters that have one

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._release()  # an interrupted training may not have got to it
        model = kwargs["model"]
        refuse_flat_parameters("RouterFreezeCallback", args, model)
        watch = watch_routing(model, lambda record: None)
        watch.remove()
        self._routers = [trained_module(router) for router in watch.routers]
        if not self._parameters():
            raise ValueError("No router has trained parameters, so there is nothing to freeze. Leave RouterFreezeCallback out.")
        if state.global_step >= self.until_step:
            return
        for parameter in self._parameters():
            self._handles.append(parameter.register_hook(torch.zeros_like))
        if any(isinstance(parameter, DTensor) for parameter in model.parameters()):
            for router in self._routers:
                self._handles.append(router.register_forward_pre_hook(self._hold_gathered))
            _make_state(kwargs["optimizer"], self._parameters())

    def on_pre_optimizer_step(
        self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any
    ) -> None:
        """Take the gradients away, while frozen."""
        if state.global_step < self.until_step:
            for parameter in self._parameters():
                parameter.grad = None
        elif state.global_step == self.until_step:
            _drop_empty_state(kwargs["optimizer"], self._parameters())

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if state.global_step >= self.until_step:
            self._release()

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._release()
        self._routers = []

    def _parameters(self) -> list[nn.Parameter]:
        return [parameter for router in self._routers for parameter in router.parameters() if parameter.requires_grad]

    def _hold_gathered(self, router: nn.Module, inputs: Any) -> None:
        """FSDP2 computes with whole parameters that it makes from the sharded ones, and that have hooks of their own."""
        if torch.compiler.is_compiling():  # hooks cannot be traced: there the gradients do count in the norm
            return
        for parameter in router.parameters():
            if parameter.requires_grad and not isinstance(parameter, DTensor) and parameter not in self._gathered:
                self._handles.append(parameter.register_hook(torch.zeros_like))
                self._gathered[parameter] = None

    def _release(self) -> None:
        for handle in self._handles:
            handle.remove()
        self._handles = []
        self._gathered = WeakTensorKeyDictionary()


@torch.no_grad()
def _make_state(optimizer: Any, parameters: list[nn.Parameter]) -> None:
    """Have the optimizer make its state of the parameters, without moving them.

    Sharded checkpoints of an optimizer are read into the state that it would make for *all* parameters: one that has none
    of the routers could not be loaded.
    """
    inner = getattr(optimizer, "optimizer", optimizer)  # inside Accelerate's wrapper
    rates = [group["lr"] for group in inner.param_groups]
    before = [parameter.clone() for parameter in parameters]
    for group in inner.param_groups:
        group["lr"] = torch.zeros_like(group["lr"]) if isinstance(group["lr"], Tensor) else 0.0
    missing = [parameter for parameter in parameters if not inner.state.get(parameter)]
    for parameter in missing:
        parameter.grad = torch.zeros_like(parameter)
    if missing:
        inner.step()
    for parameter, value in zip(parameters, before, strict=True):
        parameter.grad = None
        parameter.copy_(value)
    for group, rate in zip(inner.param_groups, rates, strict=True):
        group["lr"] = rate


def _drop_empty_state(optimizer: Any, parameters: list[nn.Parameter]) -> None:
    """Forget what `_make_state` made, so that the first real step is a first step (bias correction)."""
    for parameter in parameters:
        moments = [value for value in optimizer.state.get(parameter, {}).values() if isinstance(value, Tensor)]
        moments = [value for value in moments if value.numel() > 1 or parameter.numel() == 1]
        if moments and not any(_whole(value).any() for value in moments):
            optimizer.state.pop(parameter)


def _whole(value: Tensor) -> Tensor:
    return value.full_tensor() if isinstance(value, DTensor) else value
