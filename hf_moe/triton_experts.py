# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""`"hf_moe_triton"`, an `experts_implementation` of Transformers in Triton: forward and backward without sorted copies.

Saved for the backward are, beside what the caller holds anyway, the values that go into the activation; its output is
recomputed, and routing weights get their gradient without the experts' outputs (Guo et al. 2025, SonicMoE, section 3).
What the kernels do not take (see `supports`) falls back to Transformers' `grouped_mm`.

    >>> from hf_moe import triton_experts                           # doctest: +SKIP
    >>> triton_experts.register()                                   # doctest: +SKIP
    >>> model.set_experts_implementation("hf_moe_triton")           # doctest: +SKIP
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import activations
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, _default_apply_gate, grouped_mm_experts_forward

from . import triton_grouped as grouped
from .triton_grouped import Plan, Weights
from .triton_tuning import runs_on

NAME = "hf_moe_triton"
DTYPES = (torch.bfloat16, torch.float16, torch.float32)
# type of a module, or a function: the kernels' name for it
ACTIVATIONS: dict[Any, str] = {
    activations.SiLUActivation: "silu", nn.SiLU: "silu", F.silu: "silu",
    activations.GELUActivation: "gelu", F.gelu: "gelu",
    activations.GELUTanh: "gelu_tanh", activations.NewGELUActivation: "gelu_tanh", activations.FastGELUActivation: "gelu_tanh",
    activations.QuickGELUActivation: "quick_gelu",
    nn.ReLU: "relu", F.relu: "relu", torch.relu: "relu",
    activations.ReLUSquaredActivation: "relu2",
    activations.LinearActivation: "linear", nn.Identity: "linear",
}  # fmt: skip


def register() -> None:
    """Make `"hf_moe_triton"` an `experts_implementation`. Twice does no harm."""
    ALL_EXPERTS_FUNCTIONS.register(NAME, triton_experts_forward)


def supports(experts: nn.Module, hidden_states: Tensor) -> bool:
    """Whether the kernels take this case.

    They run on CUDA devices of compute capability 8.0 and later, and everywhere under Triton's interpreter
    (`TRITON_INTERPRET=1`, set before anything imports Triton). They take fp32, bf16 and fp16, plain or gated experts with
    gate and up concatenated, with or without bias, in either layout of the weights, and the activations in `ACTIVATIONS`.

    Args:
        experts: a module of the contract of Transformers' `use_experts_implementation`.
        hidden_states: `[T, D]`.
    """
    names = ["gate_up_proj" if experts.has_gate else "up_proj", "down_proj"]
    parameters = [getattr(experts, name, None) for name in names + [f"{name}_bias" for name in names if experts.has_bias]]
    plain = all(type(p) in (Tensor, nn.Parameter) for p in parameters)  # neither a DTensor nor quantised
    same = plain and len({(p.dtype, p.device) for p in parameters if p is not None}) == 1
    known = same and parameters[0] is not None and parameters[0].dtype in DTYPES
    gate_is_ours = not experts.has_gate or (
        experts.is_concatenated and getattr(experts._apply_gate, "__func__", None) is _default_apply_gate
    )
    return bool(
        known
        and gate_is_ours
        and not experts.has_post_expert_norm
        and _act_name(experts.act_fn) is not None
        and hidden_states.dim() == 2
        and hidden_states.dtype in DTYPES
        and runs_on(hidden_states.device)
    )


def triton_experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """`Σ_k top_k_weights[t, k] · expert[top_k_index[t, k]](hidden_states[t])`, the contract of `grouped_mm_experts_forward`.

    Products are in the dtype of autocast, else in that of the weights; sums in fp32; the output in that of the input.

    Args:
        self: the experts.
        hidden_states: `[T, D]`.
        top_k_index: `[T, K]`; ids outside of 0..E-1 are empty slots.
        top_k_weights: `[T, K]`.
    """
    if not supports(self, hidden_states):
        return grouped_mm_experts_forward(self, hidden_states, top_k_index, top_k_weights)
    up, down = (getattr(self, name) for name in ("gate_up_proj" if self.has_gate else "up_proj", "down_proj"))
    up_bias, down_bias = (getattr(self, f"{name}_proj_bias") if self.has_bias else None for name in _bias_names(self))
    if self.is_transposed:
        up, down = up.transpose(1, 2), down.transpose(1, 2)
    tensors = (hidden_states, top_k_weights, up, down, up_bias, down_bias)
    save = torch.is_grad_enabled() and any(t is not None and t.requires_grad for t in tensors)
    kind = hidden_states.device.type
    dtype = torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else up.dtype
    act = _act_name(self.act_fn)
    assert act is not None
    return _forward_op(hidden_states, top_k_index, top_k_weights, up, down, up_bias, down_bias, act, dtype, save)[0]


@torch.library.custom_op("hf_moe::triton_experts", mutates_args=())
def _forward_op(
    x_TD: Tensor,
    top_k_index: Tensor,
    top_k_weights: Tensor,
    up_END: Tensor,
    down_EDF: Tensor,
    up_bias_EN: Tensor | None,
    down_bias_ED: Tensor | None,
    act: str,
    dtype: torch.dtype,
    save: bool,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """The output, the values before the activation, and the parts of the plan; opaque to `torch.compile`."""
    made = grouped.plan(top_k_index, up_END.shape[0])
    weights = Weights(up_END, down_EDF, up_bias_EN, down_bias_ED, act)
    y_TD, pre_SN = grouped.forward(x_TD, top_k_weights, weights, made, dtype, save)
    return y_TD, pre_SN, *made.tensors


@_forward_op.register_fake
def _(x_TD, top_k_index, top_k_weights, up_END, down_EDF, up_bias_EN, down_bias_ED, act, dtype, save):  # type: ignore[no-untyped-def]
    rows, experts = top_k_index.numel(), up_END.shape[0]
    y_TD = x_TD.new_empty(x_TD.shape)
    pre_SN = x_TD.new_empty((rows, up_END.shape[1]) if save else (0, 0), dtype=dtype)
    return y_TD, pre_SN, *Plan.empty(rows, experts, x_TD.device).tensors


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    x_TD, _, top_k_weights, up, down, up_bias, down_bias, ctx.act, _, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(x_TD, top_k_weights, up, down, up_bias, down_bias, *output[1:])


def _backward(ctx: Any, dy_TD: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    needs_x, _, needs_weights, *needs = ctx.needs_input_grad[:7]
    if dy_TD is None:
        return (None,) * 10
    x_TD, top_k_weights, up, down, up_bias, down_bias, *saved = ctx.saved_tensors
    wanted = [needs_x, needs[0] or needs[2], needs[1] or needs[3]]
    d_x, d_weights, d_up, d_down, d_up_bias, d_down_bias = _backward_op(
        dy_TD, x_TD, top_k_weights, up, down, up_bias, down_bias, *saved, ctx.act, wanted
    )
    d_index = None
    found = (d_x, d_index, d_weights, d_up, d_down, d_up_bias, d_down_bias)
    asked = (needs_x, False, needs_weights, *needs)
    return *(gradient if ask else None for gradient, ask in zip(found, asked, strict=True)), None, None, None


_forward_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("hf_moe::triton_experts_backward", mutates_args=())
def _backward_op(
    dy_TD: Tensor,
    x_TD: Tensor,
    top_k_weights: Tensor,
    up_END: Tensor,
    down_EDF: Tensor,
    up_bias_EN: Tensor | None,
    down_bias_ED: Tensor | None,
    pre_SN: Tensor,
    experts_S: Tensor,
    slots_S: Tensor,
    starts_E1: Tensor,
    tile_experts: Tensor,
    tile_rows: Tensor,
    act: str,
    wanted: list[bool],
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """All gradients; empty tensors for those that are not wanted."""
    made = Plan(experts_S, slots_S, starts_E1, tile_experts, tile_rows)
    weights = Weights(up_END, down_EDF, up_bias_EN, down_bias_ED, act)
    found = grouped.backward(dy_TD, x_TD, top_k_weights, weights, made, pre_SN, wanted)
    absent = x_TD.new_empty(0)
    return tuple(absent.clone() if t is None else t for t in found.tensors)  # type: ignore[return-value]


@_backward_op.register_fake
def _(dy_TD, x_TD, top_k_weights, up_END, down_EDF, up_bias_EN, down_bias_ED, *rest):  # type: ignore[no-untyped-def]
    want_x, want_up, want_down = rest[-1]
    wanted = (want_x, True, want_up, want_down, want_up, want_down)
    like = (
        x_TD.new_empty(x_TD.shape),
        top_k_weights.new_empty(top_k_weights.shape),
        up_END,
        down_EDF,
        up_bias_EN,
        down_bias_ED,
    )
    return tuple(
        torch.empty_like(t) if t is not None and want else x_TD.new_empty(0) for t, want in zip(like, wanted, strict=True)
    )


def _refuse(ctx: Any, *gradients: Tensor | None) -> None:
    raise RuntimeError(f"`experts_implementation`={NAME!r} has no second derivative; use 'eager' for double backward.")


_backward_op.register_autograd(_refuse)


def _bias_names(experts: nn.Module) -> tuple[str, str]:
    return ("gate_up" if experts.has_gate else "up", "down")


def _act_name(act_fn: Any) -> str | None:
    if isinstance(act_fn, nn.GELU):
        return "gelu_tanh" if act_fn.approximate == "tanh" else "gelu"
    key = type(act_fn) if isinstance(act_fn, nn.Module) else act_fn
    return ACTIVATIONS.get(key)
