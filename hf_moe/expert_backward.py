# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""The gradient of experts on a CPU. Letters as in `expert_products`."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from .expert_groups import Groups, Run
from .expert_products import RUN_ROWS, ExpertLayer, ExpertWeights, cached_parts, multiply, pick, room_for_rows, sum_rows
from .huge_pages import empty, zeros

_FEW_ROWS = 32  # per group, up to which oneDNN is faster with a transposed copy of the left factor
_REUSED = 32 << 20  # bytes; what the C library hands out again, so that writing zeros to some of it is less than to have it new


class Gradients(NamedTuple):
    """Of the input, the routing weights and the parameters; `None` where none is needed."""

    x_TD: Tensor | None
    weights_TK: Tensor | None
    parameters: ExpertWeights


class _Rows(NamedTuple):
    """Rows of a run: gathered input and gradient `[rows, D]`, routing weights `[rows, 1]`, and what is between the products."""

    inputs: Tensor
    grads: Tensor
    weights: Tensor
    hidden: Tensor
    grad_activated: Tensor
    activated: Tensor
    grad_hidden: Tensor


def backward(
    layer: ExpertLayer,
    plan: Groups,
    x_TD: Tensor,
    weights_TK: Tensor,
    hidden_PH: Tensor,
    grad_TD: Tensor,
    needed: tuple[bool, ...],
) -> Gradients:
    """Gradients of `Σ_k weights[t, k] · expert[ids[t, k]](x[t])`.

    The gradient of a routing weight is `⟨grad_t, y⟩` with the expert's output y. That is `⟨grad_t @ down.T, a⟩` with its
    activation a, so that y need not be kept.

    Args:
        layer: weights and activation.
        plan: the rows.
        x_TD: `[T, D]` the input.
        weights_TK: `[T, K]` routing weights.
        hidden_PH: `[P, H]` what the first product gave, with its bias.
        grad_TD: `[T, D]`.
        needed: whether x, the routing weights and each of the parameters need one.
    """
    needs_x, needs_weights, *need_parameters = needed
    idle = set(range(layer.num_experts)) - set(plan.experts)
    rooms = (
        _room_for(weight, idle) if needed and weight is not None else None
        for weight, needed in zip(layer.weights, need_parameters, strict=True)
    )
    found = ExpertWeights(*rooms)  # type: ignore[arg-type]
    x, grad = x_TD.to(layer.dtype), grad_TD.to(layer.dtype).contiguous()
    weight_P = torch.cat([weights_TK.flatten().to(layer.dtype), x.new_zeros(1)])[plan.slot_P]  # 0 for padding
    tokens_P, runs = plan.tokens(), list(plan.runs(RUN_ROWS))
    hidden_size, width_up, width = layer.widths
    most = max(map(len, runs), default=0)
    buffers = [empty(x, most, size) for size in (hidden_size, hidden_size, width, width, width_up)]
    grad_x_PD = room_for_rows(x, len(plan), hidden_size) if needs_x else None
    grad_weight_P = x.new_zeros(len(plan) + 1)
    for run in runs:
        here = slice(run.start, run.end)
        gathered, grads, *between = (buffer[: len(run)] for buffer in buffers)
        torch.index_select(x, 0, tokens_P[here], out=gathered)
        torch.index_select(grad, 0, tokens_P[here], out=grads)
        rows = _Rows(gathered, grads, weight_P[here, None], hidden_PH[here], *between)
        grad_weight_P[here] = _through_experts(layer, run, rows)
        _add_parameters(layer, run, rows, found)
        if grad_x_PD is not None:
            layer.multiply(rows.grad_hidden, layer.weights.up.transpose(1, 2), grad_x_PD[here], run)
    return Gradients(
        None if grad_x_PD is None else sum_rows(grad_x_PD, plan.row_TK).to(x_TD.dtype),
        grad_weight_P[plan.row_TK].to(weights_TK.dtype) if needs_weights else None,
        found,
    )


def _through_experts(layer: ExpertLayer, run: Run, rows: _Rows) -> Tensor:
    """Fill what is between the products; returns `[rows]` gradients of the routing weights."""
    layer.multiply(rows.grads, layer.weights.down.transpose(1, 2), rows.grad_activated, run)
    parts = cached_parts(rows.activated, rows.grad_activated, rows.hidden, rows.weights, rows.grad_hidden)
    grad_weight = torch.cat([layer.activation.backward(*part) for part in parts])
    if layer.weights.down_bias is not None:
        biases = pick(layer.weights.down_bias.to(layer.dtype), run.experts)
        products = (grads @ bias for grads, bias in zip(run.split(rows.grads), biases, strict=True))
        grad_weight += torch.cat(list(products))
    return grad_weight


def _add_parameters(layer: ExpertLayer, run: Run, rows: _Rows, found: ExpertWeights) -> None:
    """`down += activatedᵀ @ grads` and `up += inputsᵀ @ grad_hidden` of each expert, and the biases' sums."""
    products = ((found.down, rows.activated, rows.grads), (found.up, rows.inputs, rows.grad_hidden))
    for stack, left, right in products:
        if stack is None:
            continue
        if stack.stride(1) == 1:  # the parameter is stored the other way round, and so is its gradient
            stack, left, right = stack.transpose(1, 2), right, left
        left_t = left.t()
        if layer.compiles_shapes and len(run) <= _FEW_ROWS * len(run.sizes):
            left_t = left_t.contiguous()
        multiply(run.split(left_t, dim=1), run.split(right), pick(stack, run.experts))
    if found.down_bias is not None:
        weighted = rows.grads * rows.weights
        for expert, part in zip(run.experts, run.split(weighted), strict=True):
            found.down_bias[expert] = part.sum(0)
    if found.up_bias is not None:
        for expert, part in zip(run.experts, run.split(rows.grad_hidden), strict=True):
            found.up_bias[expert] = part.sum(0)


def _room_for(weight: Tensor, idle: set[int]) -> Tensor:
    """For the gradient of a stack of experts, in the layout of the parameter of which `weight` is a view; 0 of the idle."""
    transposed = weight.dim() == 3 and weight.stride(1) == 1
    like = weight.transpose(1, 2) if transposed else weight
    if 2 * len(idle) >= len(like) or (idle and like.nbytes > _REUSED):
        room = zeros(like, *like.shape)
    else:
        room = empty(like, *like.shape)
        for expert in idle:
            room[expert].zero_()
    return room.transpose(1, 2) if transposed else room
