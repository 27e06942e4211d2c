# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""The gradient of experts on a CPU. Letters as in `expert_products`."""

from __future__ import annotations

from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn import functional as F

from .cpu_tuning import tuning
from .expert_groups import Groups, Run
from .expert_products import (
    RUN_ROWS,
    ExpertLayer,
    ExpertWeights,
    cached_parts,
    multiply,
    pick,
    room_for_rows,
    sum_rows,
    with_empty_row,
)
from .large_buffers import HUGE_PAGE, empty, zeros


class Gradients(NamedTuple):
    """Of the input, the routing weights and the parameters; `None` where none is needed."""

    x_TD: Tensor | None
    weights_TK: Tensor | None
    parameters: ExpertWeights


class Given(NamedTuple):
    """What forward kept, and the gradient of its output.

    Attributes:
        x_TD: `[T, D]` the input.
        weights_TK: `[T, K]` routing weights.
        hidden_PH: `[P, H]` what the first product gave, with its bias.
        grad_TD: `[T, D]`.
    """

    x_TD: Tensor
    weights_TK: Tensor
    hidden_PH: Tensor
    grad_TD: Tensor


class _Rows(NamedTuple):
    """Rows of a run: gathered input and gradient `[rows, D]`, routing weights `[rows, 1]`, and what is between the products."""

    inputs: Tensor
    grads: Tensor
    weights: Tensor
    hidden: Tensor
    grad_activated: Tensor
    activated: Tensor
    grad_hidden: Tensor


def backward(layer: ExpertLayer, plan: Groups, given: Given, needed: Sequence[bool]) -> Gradients:
    """Gradients of `Σ_k weights[t, k] · expert[ids[t, k]](x[t])`.

    The gradient of a routing weight is `⟨grad_t, y⟩` with the expert's output y. That is `⟨grad_t @ down.T, a⟩` with its
    activation a, so that y need not be kept.

    Args:
        layer: weights and activation.
        plan: the rows.
        given: what forward kept, and the gradient of its output.
        needed: whether x, the routing weights and each of the parameters need one.
    """
    needs_x, needs_weights, *need_parameters = needed
    way = _run_by_run if plan.ends_E is None else _in_one_call
    converted = Given(*(tensor.to(layer.dtype) for tensor in given))
    grad_x_PD, grad_weight_P, parameters = way(layer, plan, converted, needs_x, need_parameters)
    return Gradients(
        None if grad_x_PD is None else sum_rows(grad_x_PD, plan.row_TK).to(given.x_TD.dtype),
        grad_weight_P[plan.row_TK].to(given.weights_TK.dtype) if needs_weights else None,
        parameters,
    )


def _run_by_run(
    layer: ExpertLayer, plan: Groups, given: Given, needs_x: bool, need_parameters: Sequence[bool]
) -> tuple[Tensor | None, Tensor, ExpertWeights]:
    """Gradients of the gathered input, `[P + 1, D]`, of each row's routing weight, `[P + 1]`, and of the parameters."""
    x_TD, weights_TK, hidden_PH, grad_TD = given
    found = _rooms(layer, plan, need_parameters)
    weight_P1 = _weights_of_rows(weights_TK, plan)
    tokens_P, runs = plan.tokens(), list(plan.runs(RUN_ROWS))
    hidden_size, width_up, width = layer.widths
    most = max(map(len, runs), default=0)
    buffers = [empty(x_TD, most, size) for size in (hidden_size, hidden_size, width, width, width_up)]
    grad_x_PD = room_for_rows(x_TD, len(plan), hidden_size) if needs_x else None
    grad_weight_P = x_TD.new_zeros(len(plan) + 1)
    for run in runs:
        here = slice(run.start, run.end)
        inputs, grads, *between = (buffer[: len(run)] for buffer in buffers)
        torch.index_select(x_TD, 0, tokens_P[here], out=inputs)
        torch.index_select(grad_TD, 0, tokens_P[here], out=grads)
        rows = _Rows(inputs, grads, weight_P1[here], hidden_PH[here], *between)
        layer.multiply(grads, layer.weights.down.transpose(1, 2), rows.grad_activated, run)
        grad_weight_P[here] = _through_activation(layer, run, rows)
        _add_parameters(layer, run, rows, found)
        if grad_x_PD is not None:
            layer.multiply(rows.grad_hidden, layer.weights.up.transpose(1, 2), grad_x_PD[here], run)
    return grad_x_PD, grad_weight_P, found


def _in_one_call(
    layer: ExpertLayer, plan: Groups, given: Given, needs_x: bool, need_parameters: Sequence[bool]
) -> tuple[Tensor | None, Tensor, ExpertWeights]:
    """The same for few rows, where what costs is the number of operations: products with weights are one for all experts."""
    x_TD, weights_TK, hidden_PH, grad_TD = given
    up, down, *_ = layer.weights
    (run,) = plan.runs(len(plan))
    tokens_P = plan.tokens()
    inputs, grads = x_TD.index_select(0, tokens_P), grad_TD.index_select(0, tokens_P)
    grad_activated = F.grouped_mm(grads, down.transpose(1, 2), offs=plan.ends_E)
    between = grad_activated, *(empty(like, *like.shape) for like in (grad_activated, hidden_PH))
    rows = _Rows(inputs, grads, _weights_of_rows(weights_TK, plan), hidden_PH, *between)
    grad_weight_P = _through_activation(layer, run, rows)
    found = _rooms(layer, plan, need_parameters)
    _add_parameters(layer, run, rows, found)
    grad_x_PD = F.grouped_mm(rows.grad_hidden, up.transpose(1, 2), offs=plan.ends_E) if needs_x else None
    return None if grad_x_PD is None else with_empty_row(grad_x_PD, plan), with_empty_row(grad_weight_P, plan), found


def _weights_of_rows(weights_TK: Tensor, plan: Groups) -> Tensor:
    """`[P, 1]` routing weights, 0 for padding."""
    weights_S1 = weights_TK.reshape(-1, 1)
    if plan.filled < len(plan):
        weights_S1 = torch.cat([weights_S1, weights_S1.new_zeros(1, 1)])
    return weights_S1.index_select(0, plan.slot_P)


def _through_activation(layer: ExpertLayer, run: Run, rows: _Rows) -> Tensor:
    """Fill `activated` and `grad_hidden`; returns `[rows]` gradients of the routing weights."""
    parts = cached_parts(rows.activated, rows.grad_activated, rows.hidden, rows.weights, rows.grad_hidden)
    found = [layer.activation.backward(*part) for part in parts]
    grad_weight = found[0] if len(found) == 1 else torch.cat(found)
    if layer.weights.down_bias is not None:
        biases = pick(layer.weights.down_bias.to(layer.dtype), run.experts)
        products = (grads @ bias for grads, bias in zip(run.split(rows.grads), biases, strict=True))
        grad_weight += torch.cat(list(products))
    return grad_weight


def _add_parameters(layer: ExpertLayer, run: Run, rows: _Rows, found: ExpertWeights) -> None:
    """`down += activatedᵀ @ grads` and `up += inputsᵀ @ grad_hidden` of each expert, and the biases' sums."""
    for stack, left, right in ((found.down, rows.activated, rows.grads), (found.up, rows.inputs, rows.grad_hidden)):
        if stack is None:
            continue
        if stack.stride(1) == 1:  # the parameter is stored the other way round, and so is its gradient
            stack, left, right = stack.transpose(1, 2), right, left
        left_t = left.t()
        if layer.compiles_shapes and len(run) <= tuning().transposed_copy * len(run.sizes):
            left_t = left_t.contiguous()
        multiply(run.split(left_t, dim=1), run.split(right), pick(stack, run.experts))
    if found.down_bias is not None:
        _sum_groups(rows.grads * rows.weights, run, found.down_bias)
    if found.up_bias is not None:
        _sum_groups(rows.grad_hidden, run, found.up_bias)


def _sum_groups(rows: Tensor, run: Run, into: Tensor) -> None:
    for expert, part in zip(run.experts, run.split(rows), strict=True):
        into[expert] = part.sum(0)


def _rooms(layer: ExpertLayer, plan: Groups, needed: Sequence[bool]) -> ExpertWeights:
    """Memory for the parameters' gradients, 0 where experts have no rows; `None` for those that need none."""
    idle = set(range(layer.num_experts)).difference(plan.experts)
    pairs = zip(layer.weights, needed, strict=True)
    return ExpertWeights(*(_room_for(weight, idle) if needs and weight is not None else None for weight, needs in pairs))  # type: ignore[arg-type]


def _room_for(weight: Tensor, idle: set[int]) -> Tensor:
    """For the gradient of a stack of experts, in the layout of the parameter of which `weight` is a view; 0 of the idle."""
    transposed = weight.dim() == 3 and weight.stride(1) == 1
    like = weight.transpose(1, 2) if transposed else weight
    if 4 * (len(like) - len(idle)) * max(like[0].nbytes, HUGE_PAGE) <= like.nbytes:  # of all pages few are written to
        room = zeros(like, *like.shape)
    else:
        room = empty(like, *like.shape)
        for part in [room] if 2 * len(idle) > len(like) else [room[expert] for expert in idle]:
            part.zero_()
    return room.transpose(1, 2) if transposed else room
