# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Where a dense architecture keeps its feed-forward block, and of what kind it is.

Nothing here asks for an architecture's name: the decoder layers are the model's `ModuleList` of that length, and the FFN
is the submodule with linear layers of the right names and shapes (the tables below).
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn
from transformers.pytorch_utils import Conv1D


class UnsupportedArchitectureError(ValueError):
    """The model has no feed-forward block that could be replaced by experts; the message says what was looked for."""


@dataclass(frozen=True)
class FFNKind:
    """Names of the linear layers of an FFN. `packed`: gate and up in one layer, gate first."""

    up: str
    down: str
    gate: str | None = None
    packed: bool = False

    @property
    def linears(self) -> tuple[str, ...]:
        return tuple(name for name in (self.gate, self.up, self.down) if name)

    @property
    def has_gate(self) -> bool:
        return self.packed or self.gate is not None


# The first that fits wins: gated before plain, since `up_proj`, `down_proj` occur in both.
FFN_KINDS = (
    FFNKind(gate="gate_proj", up="up_proj", down="down_proj"),  # Llama, Mistral, Qwen, Gemma, OLMo, Cohere, Granite …
    FFNKind(gate="w1", up="w3", down="w2"),  # LFM2
    FFNKind(gate="linear_fc1_gate", up="linear_fc1_up", down="linear_fc2"),
    FFNKind(up="gate_up_proj", down="down_proj", packed=True),  # Phi-3, GLM
    FFNKind(up="input_linear", down="output_linear", packed=True),  # Granite shared MLP
    FFNKind(up="c_fc", down="c_proj"),  # GPT-2, GPT-Neo, Starcoder2
    FFNKind(up="dense_h_to_4h", down="dense_4h_to_h"),  # GPT-NeoX, Falcon, Bloom
    FFNKind(up="fc1", down="fc2"),  # Phi, OPT
    FFNKind(up="fc_in", down="fc_out"),  # GPT-J, CodeGen
    FFNKind(up="up_proj", down="down_proj"),  # MPT, Nemotron, Apertus
)
ACTIVATIONS = ("act_fn", "activation_fn", "act", "activation", "activation_func", "gelu_impl")
_LINEAR = (nn.Linear, Conv1D)


@dataclass(frozen=True)
class FFNSite:
    """One FFN of a model: where it hangs and what it is made of.

    Attributes:
        layer_index: index of its decoder layer.
        path: dotted name of the FFN below the model, or of the decoder layer whose own linear layers are the FFN.
        kind: names of its linear layers.
        inline: the linear layers and the activation belong to the decoder layer itself (OPT).
        activation: attribute name of the activation.
        hidden_size, intermediate_size: D, F.
        has_bias: whether the linear layers have biases.
        dropout: probability at the FFN's output.
    """

    layer_index: int
    path: str
    kind: FFNKind
    inline: bool
    activation: str
    hidden_size: int
    intermediate_size: int
    has_bias: bool
    dropout: float

    @property
    def moe_path(self) -> str:
        """Dotted name of the module that takes the FFN's place."""
        return f"{self.path}.{self.kind.up}" if self.inline else self.path

    @property
    def weight_prefixes(self) -> tuple[str, ...]:
        """What the names of the FFN's own weights begin with."""
        if not self.inline:
            return (f"{self.path}.",)
        return tuple(f"{self.path}.{name}." for name in (*self.kind.linears, self.activation))

    def module(self, model: nn.Module) -> nn.Module:
        """The FFN (or the decoder layer that it is part of)."""
        return model.get_submodule(self.path)

    def act_fn(self, model: nn.Module) -> Callable[[Tensor], Tensor]:
        """The FFN's activation."""
        return getattr(self.module(model), self.activation)

    def layer_arguments(self, model: nn.Module) -> dict[str, Any]:
        """Arguments of a `MoELayer` with experts like this FFN."""
        return {
            "hidden_size": self.hidden_size,
            "intermediate_size": self.intermediate_size,
            "hidden_act": self.act_fn(model),
            "has_gate": self.kind.has_gate,
            "has_bias": self.has_bias,
            "dropout": self.dropout,
            "dtype": getattr(self.module(model), self.kind.down).weight.dtype,
        }

    def replace(self, model: nn.Module, layer: nn.Module) -> None:
        """Put `layer` in the FFN's place."""
        model.set_submodule(self.moe_path, layer)
        if self.inline:  # the decoder layer goes on to call the activation and the second linear layer
            model.set_submodule(f"{self.path}.{self.kind.down}", nn.Identity())
            setattr(self.module(model), self.activation, nn.Identity())

    def weights(self, model: nn.Module) -> dict[str, Tensor]:
        """The FFN's weights as `up`, `down` and, where they exist, `gate`, `up_bias`, … in `[out, in]` layout."""
        module = self.module(model)
        found: dict[str, Tensor] = {}
        for role in ("gate", "up", "down"):
            name = getattr(self.kind, role)
            if name is None:
                continue
            linear = getattr(module, name)
            found[role] = linear.weight.T if isinstance(linear, Conv1D) else linear.weight
            if linear.bias is not None:
                found[f"{role}_bias"] = linear.bias
        if self.kind.packed:
            for suffix in ("", "_bias"):
                if f"up{suffix}" in found:
                    found[f"gate{suffix}"], found[f"up{suffix}"] = found[f"up{suffix}"].chunk(2, dim=0)
        return found


def find_ffns(model: nn.Module, num_hidden_layers: int) -> list[FFNSite]:
    """The FFN of every decoder layer.

    Args:
        model: a causal LM of Transformers (weights may be on the meta device).
        num_hidden_layers: how many decoder layers it has.

    Raises:
        UnsupportedArchitectureError: a layer has no FFN of a known kind.
    """
    layers_path, layers = _decoder_layers(model, num_hidden_layers)
    return [_find_ffn(model, f"{layers_path}.{i}", layer, i) for i, layer in enumerate(layers)]


def _decoder_layers(model: nn.Module, num_hidden_layers: int) -> tuple[str, nn.ModuleList]:
    lists = [(n, m) for n, m in model.named_modules() if isinstance(m, nn.ModuleList)]
    fitting = [(n, m) for n, m in lists if len(m) == num_hidden_layers and any(_linears(layer) for layer in m)]
    if not fitting:
        seen = ", ".join(f"{n} ({len(m)})" for n, m in lists) or "none"
        raise UnsupportedArchitectureError(
            f"{type(model).__name__} has no `ModuleList` of `num_hidden_layers`={num_hidden_layers} decoder layers (found: "
            f"{seen}). hf_moe replaces the feed-forward block of each decoder layer and needs to find them."
        )
    return min(fitting, key=lambda item: item[0].count("."))


def _linears(module: nn.Module) -> dict[str, nn.Module]:
    return {name: m for name, m in module.named_modules() if isinstance(m, _LINEAR)}


def _find_ffn(model: nn.Module, layer_path: str, layer: nn.Module, index: int) -> FFNSite:
    candidates = [(name, module) for name, module in layer.named_modules() if not _is_attention(name)]
    for name, module in sorted(candidates, key=lambda item: item[0].count(".") + bool(item[0])):
        for kind in FFN_KINDS:
            site = _site(layer_path, name, module, kind, index)
            if site is not None:
                return site
    kinds = "; ".join(", ".join(kind.linears) for kind in FFN_KINDS)
    found = ", ".join(f"{n} {_shape(m)}" for n, m in _linears(layer).items()) or "none"
    raise UnsupportedArchitectureError(
        f"{type(model).__name__}: no feed-forward block was found in `{layer_path}` ({type(layer).__name__}). Looked for "
        f"linear layers named {kinds}, beside an activation named {', '.join(ACTIVATIONS)}, in a module called with the "
        f"hidden states alone. Linear layers found: {found}. If the model already is a Mixture-of-Experts, its experts need "
        "no replacing."
    )


def _is_attention(name: str) -> bool:
    return "attn" in name.lower() or "attention" in name.lower()


def _site(layer_path: str, name: str, module: nn.Module, kind: FFNKind, index: int) -> FFNSite | None:
    linears: list[Any] = [getattr(module, linear, None) for linear in kind.linears]
    activation = next((a for a in ACTIVATIONS if callable(getattr(module, a, None))), None)
    if activation is None or not all(isinstance(linear, _LINEAR) for linear in linears):
        return None
    if name and _required_arguments(module) != 1:  # Bloom and MPT hand the residual to the FFN
        return None
    (up_out, up_in), (down_out, down_in) = _shape(getattr(module, kind.up)), _shape(getattr(module, kind.down))
    if (up_in, up_out) != (down_out, down_in * (2 if kind.packed else 1)):
        return None
    biases = {linear.bias is not None for linear in linears}
    if len(biases) > 1:  # experts have biases everywhere or nowhere
        return None
    dropouts = [m.p for n, m in module.named_children() if isinstance(m, nn.Dropout)] if name else []
    residual_dropout = getattr(module, "residual_dropout", None)
    if isinstance(residual_dropout, float):
        dropouts.append(residual_dropout)
    return FFNSite(
        layer_index=index,
        path=f"{layer_path}.{name}" if name else layer_path,
        kind=kind,
        inline=not name,
        activation=activation,
        hidden_size=up_in,
        intermediate_size=down_in,
        has_bias=biases == {True},
        dropout=dropouts[0] if dropouts else 0.0,
    )


def _required_arguments(module: nn.Module) -> int:
    parameters = inspect.signature(module.forward).parameters.values()
    return sum(p.default is p.empty and p.kind in (p.POSITIONAL_ONLY, p.POSITIONAL_OR_KEYWORD) for p in parameters)


def _shape(linear: nn.Module) -> tuple[int, int]:
    """(out, in) of a linear layer."""
    weight = linear.weight
    assert isinstance(weight, Tensor)
    return (weight.shape[1], weight.shape[0]) if isinstance(linear, Conv1D) else (weight.shape[0], weight.shape[1])
