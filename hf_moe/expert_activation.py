# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""The pointwise part of an expert and its gradient, without autograd, so that the cheap values are made again, not kept."""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn
from transformers import activations

aten = torch.ops.aten


class Kernels(NamedTuple):
    """An activation: `forward(x, out=…)` and `backward(grad, x, grad_input=…)`."""

    forward: Callable[..., Tensor]
    backward: Callable[..., Tensor]


def _gelu(approximate: str) -> Kernels:
    backward = partial(aten.gelu_backward.grad_input, approximate=approximate)
    return Kernels(partial(aten.gelu.out, approximate=approximate), backward)


def _relu_backward(grad: Tensor, x: Tensor, *, grad_input: Tensor) -> Tensor:
    return aten.threshold_backward.grad_input(grad, x, 0, grad_input=grad_input)


_SILU = Kernels(aten.silu.out, aten.silu_backward.grad_input)
KERNELS: dict[type[nn.Module], Kernels] = {
    nn.SiLU: _SILU,
    activations.SiLUActivation: _SILU,
    nn.ReLU: Kernels(aten.relu.out, _relu_backward),
    activations.GELUTanh: _gelu("tanh"),
    activations.GELUActivation: _gelu("none"),
}


class Activation:
    """What an expert does between its two products.

    Args:
        experts: a module of the contract of Transformers' experts.
    """

    def __init__(self, experts: Any) -> None:
        self.gated: bool = experts.has_gate
        self._any = experts._apply_gate if self.gated else experts.act_fn
        usual_gate = not self.gated or getattr(experts._apply_gate, "__name__", "") == "_default_apply_gate"
        self._kernels = KERNELS.get(type(experts.act_fn)) if usual_gate and experts.is_concatenated else None

    def for_autograd(self, hidden: Tensor) -> Tensor:
        """`[rows, 2F]` or `[rows, F]` to `[rows, F]`, as the module itself does it."""
        return self._any(hidden)

    def forward(self, hidden: Tensor, out: Tensor) -> Tensor:
        """`act(gate) * up`, or `act(up)`.

        Args:
            hidden: `[rows, 2F]` or `[rows, F]`; what the first product gave.
            out: `[rows, F]`.
        """
        if self._kernels is None:
            return out.copy_(self._any(hidden))
        if not self.gated:
            return self._kernels.forward(hidden, out=out)
        width = out.shape[1]
        return self._kernels.forward(hidden[:, :width], out=out).mul_(hidden[:, width:])

    def backward(self, output: Tensor, grad: Tensor, hidden: Tensor, weight: Tensor, grad_hidden: Tensor) -> Tensor:
        """Through the activation, and through the routing weight that the expert's output is multiplied with.

        Args:
            output: `[rows, F]` becomes `weight · forward(hidden)`.
            grad: `[rows, F]` of `forward(hidden)` as if it were not weighted; overwritten.
            hidden: as given to `forward`.
            weight: `[rows, 1]` routing weights.
            grad_hidden: shape of `hidden`; becomes its gradient.

        Returns:
            `[rows]` gradient of the routing weights.
        """
        if self._kernels is None:
            return self._backward_by_autograd(output, grad, hidden, weight, grad_hidden)
        width = output.shape[1]
        if not self.gated:
            self._kernels.forward(hidden, out=output)
            grad_weight = torch.mul(grad, output, out=grad_hidden).sum(-1)
            self._kernels.backward(grad.mul_(weight), hidden, grad_input=grad_hidden)
        else:
            gate, up = hidden[:, :width], hidden[:, width:]
            grad_gate, grad_up = grad_hidden[:, :width], grad_hidden[:, width:]
            activated = self._kernels.forward(gate, out=grad_up)
            torch.mul(activated, up, out=output)
            grad_weight = torch.mul(grad, output, out=grad_gate).sum(-1)
            grad_up.mul_(grad.mul_(weight))
            self._kernels.backward(grad.mul_(up), gate, grad_input=grad_gate)
        output.mul_(weight)
        return grad_weight

    def _backward_by_autograd(
        self, output: Tensor, grad: Tensor, hidden: Tensor, weight: Tensor, grad_hidden: Tensor
    ) -> Tensor:
        with torch.enable_grad():
            leaf = hidden.detach().requires_grad_()
            activated = self._any(leaf)
            grad_hidden.copy_(torch.autograd.grad(activated, leaf, grad * weight)[0])
        grad_weight = (grad * activated.detach()).sum(-1)
        output.copy_(activated.detach()).mul_(weight)
        return grad_weight
