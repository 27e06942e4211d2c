# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""`experts_implementation="hf_moe"`: experts on a CPU at the speed of its matrix products; elsewhere the best there is.

What it does otherwise than Transformers' `grouped_mm`:

- Groups of rows are padded to few sizes (bf16), since oneDNN compiles a kernel for every new shape.
- One autograd function for the layer. For backward it keeps the input and what the first product gave; the gathered rows
  and the activation are made again, and nothing is kept of the experts' outputs.
- Pointwise work is done in blocks of rows that stay in the cache.
- The weighted sum over a token's experts reads the rows where they are, without copies of `[T·K, D]`.
- At inference what is between the products is stored column by column, so that weights need not be copied into another order.
- Groups of few rows take each product in one call for all, and few tokens torch's own backward, so that Python does not show.
- Large buffers, the parameters' gradients among them, take memory that others had before: new pages cost more than products.
- The gradients of experts without rows are not written at all where these are most.
- A single token is multiplied with its experts' weights as they lie, without sorting or copying.

Letters as in `expert_products`.
"""

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward

from .expert_activation import KERNELS, Activation
from .expert_backward import Given, backward
from .expert_groups import Groups, Run, group_rows
from .expert_products import RUN_ROWS, ExpertLayer, ExpertWeights, room_for_rows, sum_rows, with_empty_row
from .large_buffers import empty
from .router_math import is_plain, without_autocast

NAME = "hf_moe"
GPU_NAME = "hf_moe_triton"  # registered in auto.py where Triton is installed
_FEW_ROWS = 8  # per expert, up to which autocast's copies of the weights take longer than products in their own precision
_FEW_TOKENS = 32  # up to which a backward of our own in Python takes longer than it saves, in a small layer
_CACHED_RUN = 512  # rows, where no backward follows: what is between the products is then soon used again
_CACHED_GROUP = 2048  # rows, likewise; more would only take more memory


def experts_forward(self: nn.Module, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
    """`Σ_k top_k_weights[t, k] · expert[top_k_index[t, k]](hidden_states[t])`; the contract of Transformers' experts.

    Args:
        self: the experts.
        hidden_states: `[T, D]`.
        top_k_index: `[T, K]`; E and above marks an empty slot.
        top_k_weights: `[T, K]`.

    Raises:
        RuntimeError: in backward, if a second derivative is asked for.
    """
    if not takes(self, hidden_states):
        on_gpu = hidden_states.device.type == "cuda" and GPU_NAME in ALL_EXPERTS_FUNCTIONS
        forward = ALL_EXPERTS_FUNCTIONS[GPU_NAME] if on_gpu else grouped_mm_experts_forward
        return forward(self, hidden_states, top_k_index, top_k_weights)
    weights = ExpertWeights.of(self)
    dtype = weights.up.dtype
    if torch.is_autocast_enabled("cpu") and top_k_index.numel() > _FEW_ROWS * len(weights.up):
        dtype = torch.get_autocast_dtype("cpu")
    layer = ExpertLayer(weights, Activation(self), dtype)
    with without_autocast("cpu"):
        if torch.is_grad_enabled() and _any_needs_grad(hidden_states, top_k_weights, *weights):
            plan = _plan_of_few(layer, top_k_index)
            if plan is not None:
                return _differentiated_by_torch(layer, plan, hidden_states, top_k_weights)
            return _Experts.apply(layer.activation, dtype, hidden_states, top_k_index, top_k_weights, *weights)
        if len(hidden_states) == 1 and hidden_states.dtype == weights.up.dtype == dtype:
            return _one_token(layer, hidden_states, top_k_index, top_k_weights)
        return _forward(layer, hidden_states, top_k_index, top_k_weights, keep=False)[0]


def takes(experts: Any, hidden_states: Tensor) -> bool:
    """Whether this is for the path below: values in the CPU's memory, and experts that are two products."""
    return (
        hidden_states.device.type == "cpu"
        and is_plain(hidden_states)
        and type(experts.down_proj) in (Tensor, nn.Parameter)  # a `DTensor` has its own products
        and not experts.has_post_expert_norm
        and (type(experts.act_fn) in KERNELS or not _has_parameters(experts.act_fn))
    )


def _has_parameters(function: Any) -> bool:
    return isinstance(function, nn.Module) and next(function.parameters(), None) is not None


def _any_needs_grad(*tensors: Tensor | None) -> bool:
    return any(tensor is not None and tensor.requires_grad for tensor in tensors)


def _one_token(layer: ExpertLayer, x_1D: Tensor, ids_1K: Tensor, weights_1K: Tensor) -> Tensor:
    """A vector goes through the weights of its experts as they lie: nothing to sort or to copy."""
    hidden_size, width_up, width = layer.widths
    experts = [expert for expert in ids_1K[0].tolist() if expert < layer.num_experts]
    if len(experts) < ids_1K.shape[1]:
        weights_1K = weights_1K[ids_1K < layer.num_experts].unsqueeze(0)
    hidden, activated, outputs = (x_1D.new_empty(len(experts), size) for size in (width_up, width, hidden_size))
    run = Run(0, len(experts), experts, [1] * len(experts))
    _row_by_row(layer, run, x_1D.expand(len(experts), -1), hidden, activated, outputs)
    _add_bias(outputs, layer.weights.down_bias, run)
    return torch.mm(weights_1K.to(x_1D.dtype), outputs)


def _plan_of_few(layer: ExpertLayer, ids_TK: Tensor) -> Groups | None:
    """The rows, where they are few enough for `_differentiated_by_torch`."""
    if len(ids_TK) > _FEW_TOKENS or not layer.is_small:
        return None
    rows_in_one_call = layer.rows_in_one_call(keep=True)
    if not rows_in_one_call:
        return None
    plan = group_rows(ids_TK, layer.num_experts, pad=False, rows_in_one_call=rows_in_one_call)
    return None if plan.ends_E is None else plan


def _differentiated_by_torch(layer: ExpertLayer, plan: Groups, x_TD: Tensor, weights_TK: Tensor) -> Tensor:
    """The layer for autograd as it is: more is kept for backward than by `_Experts`, which of few rows is little."""
    up, down, *_ = layer.weights
    hidden = F.grouped_mm(x_TD.to(layer.dtype).index_select(0, plan.tokens()), up, offs=plan.ends_E)
    outputs = F.grouped_mm(layer.activation.for_autograd(hidden), down, offs=plan.ends_E)
    output = sum_rows(with_empty_row(outputs, plan), plan.row_TK, weights_TK.to(layer.dtype)).to(x_TD.dtype)
    output.register_hook(lambda grad: _refuse_second_derivative())
    return output


def _forward(layer: ExpertLayer, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, keep: bool) -> tuple[Tensor, Groups, Tensor]:
    """The output, and for backward (`keep`) the rows and, `[P, H]`, what the first product gave."""
    most_rows, run_rows = (None, RUN_ROWS) if keep else (_CACHED_GROUP, _CACHED_RUN)
    plan = group_rows(ids_TK, layer.num_experts, layer.compiles_shapes, most_rows, layer.rows_in_one_call(keep))
    x, weights_TK = x_TD.to(layer.dtype), weights_TK.to(layer.dtype)
    if plan.ends_E is not None:
        output_PD, hidden_PH = _in_one_call(layer, plan, x)
        return sum_rows(output_PD, plan.row_TK, weights_TK).to(x_TD.dtype), plan, hidden_PH
    tokens_P, runs = plan.tokens(), list(plan.runs(run_rows))
    hidden_size, width_up, width = layer.widths
    most = max(map(len, runs), default=0)
    inputs_buffer, activated_buffer = empty(x, most, hidden_size), empty(x, most, width)
    hidden_buffer = empty(x, len(plan) if keep else most, width_up)
    output_PD = room_for_rows(x, len(plan), hidden_size)
    for run in runs:
        inputs, outputs = inputs_buffer[: len(run)], output_PD[run.start : run.end]
        torch.index_select(x, 0, tokens_P[run.start : run.end], out=inputs)
        if keep:
            _row_by_row(layer, run, inputs, hidden_buffer[run.start : run.end], activated_buffer[: len(run)], outputs)
        else:
            _column_by_column(layer, run, inputs, hidden_buffer, activated_buffer, outputs)
        _add_bias(outputs, layer.weights.down_bias, run)
    return sum_rows(output_PD, plan.row_TK, weights_TK).to(x_TD.dtype), plan, hidden_buffer


def _in_one_call(layer: ExpertLayer, plan: Groups, x_TD: Tensor) -> tuple[Tensor, Tensor]:
    """Experts' outputs `[P, D]` (`[P + 1, D]` where slots are empty), and what the first product gave, `[P, H]`."""
    up, down, up_bias, down_bias = layer.weights
    hidden = F.grouped_mm(x_TD.index_select(0, plan.tokens()), up, offs=plan.ends_E)
    _add_bias(hidden, up_bias, plan)
    activated = hidden.new_empty(len(plan), down.shape[1])
    layer.activate(hidden, activated)
    outputs = F.grouped_mm(activated, down, offs=plan.ends_E)
    _add_bias(outputs, down_bias, plan)
    return with_empty_row(outputs, plan), hidden


def _row_by_row(layer: ExpertLayer, run: Run, inputs: Tensor, hidden: Tensor, activated: Tensor, outputs: Tensor) -> None:
    """Fill the last three of a run, all `[rows, …]`."""
    layer.multiply(inputs, layer.weights.up, hidden, run)
    _add_bias(hidden, layer.weights.up_bias, run)
    layer.activate(hidden, activated)
    layer.multiply(activated, layer.weights.down, outputs, run)


def _column_by_column(layer: ExpertLayer, run: Run, inputs: Tensor, hidden: Tensor, activated: Tensor, outputs: Tensor) -> None:
    """The same group by group; of most, what is between the products is stored column by column (see `layer.between`).

    `hidden` and `activated` are room that every group uses anew.
    """
    up, down, up_bias, _ = layer.weights
    ups, downs = layer.matrices(up, run.experts), layer.matrices(down, run.experts)
    rooms: dict[int, tuple[Tensor, Tensor]] = {}
    groups = zip(run.experts, run.sizes, run.split(inputs), ups, downs, run.split(outputs), strict=True)
    for expert, size, rows, up_DH, down_FD, output in groups:
        if size not in rooms:
            rooms[size] = layer.between(hidden, size), layer.between(activated, size)
        given, into = rooms[size]
        torch.mm(rows, up_DH, out=given)
        if up_bias is not None:
            given += up_bias[expert]
        layer.activate(given, into)
        torch.mm(into, down_FD, out=output)


def _add_bias(rows: Tensor, bias: Tensor | None, run: Run | Groups) -> None:
    if bias is not None:
        for group, expert in zip(rows.split_with_sizes(run.sizes), run.experts, strict=True):
            group += bias[expert]


def _refuse_second_derivative() -> None:
    """To be called in a backward."""
    if torch.is_grad_enabled():
        raise RuntimeError(
            f"experts_implementation={NAME!r} has no second derivative (create_graph=True): "
            "take experts_implementation='eager' for it."
        )


class _Experts(torch.autograd.Function):
    """The layer with its gradient."""

    @staticmethod
    def forward(
        ctx: Any, activation: Activation, dtype: torch.dtype, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor, *weights: Any
    ) -> Tensor:
        layer = ExpertLayer(ExpertWeights(*weights), activation, dtype)
        output, plan, hidden = _forward(layer, x_TD, ids_TK, weights_TK, keep=True)
        ctx.activation, ctx.dtype, ctx.groups = activation, dtype, (plan.experts, plan.sizes, plan.filled)
        ctx.save_for_backward(x_TD, weights_TK, hidden, plan.slot_P, plan.row_TK, plan.ends_E, *weights)
        return output

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> Any:
        _refuse_second_derivative()
        x_TD, weights_TK, hidden, slot_P, row_TK, ends_E, *weights = ctx.saved_tensors
        layer = ExpertLayer(ExpertWeights(*weights), ctx.activation, ctx.dtype)
        experts, sizes, filled = ctx.groups
        plan = Groups(experts, sizes, filled, slot_P, row_TK, ends_E)
        _, _, need_x, _, *need = ctx.needs_input_grad
        with without_autocast("cpu"):
            found = backward(layer, plan, Given(x_TD, weights_TK, hidden, grads[0]), (need_x, *need))
        return None, None, found.x_TD, None, found.weights_TK, *found.parameters


ALL_EXPERTS_FUNCTIONS.register(NAME, experts_forward)
