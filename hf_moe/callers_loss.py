# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Router losses in trainings whose loss is made outside of the model.

TRL's trainers call the decoder and apply the LM head themselves, in pieces; their loss (of SFT, DPO, GRPO …) never passes the
model, and the balancing loss that they could add is one of their own, pooled over layers. So the decoder's hidden states carry
the router losses: their values are as they were, and the backward of whatever is computed from them also brings the router
losses' gradient (as DeepSeek's `AddAuxiliaryLoss` and Megatron's `MoEAuxLossAutoScaler` do).

Such a gradient does not pass through what the trainer multiplies its loss with. With M micro-batches to an optimizer step it
gets the weight 1 / M: the mean over micro-batches, as TRL takes it of balancing losses. DDP takes the mean over ranks.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor


class CallersLoss:
    """Hands router losses to hidden states.

    Attributes:
        accumulation_steps: M. If it is `None`, M is the number of forwards of the optimizer step before; in the first step,
            where that is not known, the m-th forward has the weight 1 / m.
    """

    def __init__(self) -> None:
        self.accumulation_steps: int | None = None
        self._forwards = 0  # since the last optimizer step
        self._learned = 0

    def carry(self, hidden_states: Tensor, router_loss: Tensor, parameters: Iterable[Tensor]) -> Tensor:
        """The hidden states, with a backward that adds `router_loss` / M to what is differentiated.

        Args:
            hidden_states: the decoder's last.
            router_loss: `[]`.
            parameters: the model's; all of them without gradient begin an optimizer step.

        Raises:
            ValueError: the loss will be scaled up (fp16), which the gradient of the router loss would miss.
        """
        device = hidden_states.device.type
        if torch.is_autocast_enabled(device) and torch.get_autocast_dtype(device) == torch.float16:
            raise ValueError(
                "`fp16`=True: router losses cannot be trained in it by a trainer that makes the loss itself, since they would "
                "miss the scaling of the loss. Use bf16, or set the config's `router_…_loss_coef` to 0."
            )
        carried: Tensor = _Carry.apply(hidden_states, router_loss / (self.accumulation_steps or self._learn(parameters)))
        return carried

    def _learn(self, parameters: Iterable[Tensor]) -> int:
        if self._forwards and all(parameter.grad is None for parameter in parameters):
            self._learned, self._forwards = self._forwards, 0
        self._forwards += 1
        return self._learned or self._forwards


class _Carry(torch.autograd.Function):
    """Identity on the hidden states; the loss gets the gradient 1."""

    @staticmethod
    def forward(ctx: Any, hidden_states: Tensor, loss: Tensor) -> Tensor:
        ctx.like = loss.dtype, loss.device
        return hidden_states.view_as(hidden_states)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor, Tensor]:
        dtype, device = ctx.like
        return gradients[0], torch.ones((), dtype=dtype, device=device)


class Backbone:
    """What is the `base_model` of a `MoEForCausalLM`: to call it is to call `decode`; its attributes are those of `module`.

    Args:
        decode: the model's method.
        module: the dense causal LM.
    """

    def __init__(self, decode: Any, module: Any) -> None:
        self._decode, self._module = decode, module

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self._decode(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self._module, name)
