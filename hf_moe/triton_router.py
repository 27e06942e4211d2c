# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
# mypy: allow-untyped-defs
"""The router's choice in one Triton kernel: scores, top-k, weights and counts from the logits; and its backward.

Softmax top-k is Mixtral's, Qwen's and OLMoE's rule, sigmoid scores chosen with a bias DeepSeek-V3's (2024, eq. 12-16). Of
equal scores the lower index comes first. The backward recomputes the scores, so that only logits and ids are kept.

Letters: T tokens, E experts, K per token.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from .triton_tuning import inlined, runs_on

MOST_EXPERTS = 1024
SCORINGS = ("softmax", "sigmoid")
_TINY = tl.constexpr(1e-20)  # DeepSeek's, against a division by 0
_ELEMENTS = 4096  # logits that one program holds


class RouterChoice(NamedTuple):
    """What the kernel writes.

    Attributes:
        weights_TK: `[T, K]` fp32, largest score first.
        ids_TK: `[T, K]` int64.
        counts_E: `[E]` int64, the tokens of every expert; padding is not counted.
    """

    weights_TK: Tensor
    ids_TK: Tensor
    counts_E: Tensor


def supports(logits_TE: Tensor) -> bool:
    """Whether `route` takes these logits: `[T, E]` in fp32, E up to 1024, on a device that runs Triton."""
    return (
        logits_TE.dim() == 2
        and logits_TE.dtype == torch.float32
        and logits_TE.shape[1] <= MOST_EXPERTS
        and runs_on(logits_TE.device)
    )


def route(
    logits_TE: Tensor,
    top_k: int,
    scoring: str = "softmax",
    renormalise: bool = True,
    selection_bias_E: Tensor | None = None,
    scale: float = 1.0,
    token_mask_T: Tensor | None = None,
) -> RouterChoice:
    """Choose K experts for every token. Differentiable in the logits.

    Args:
        logits_TE: `[T, E]` fp32.
        top_k: K.
        scoring: `"softmax"` over the experts, or `"sigmoid"` of each.
        renormalise: whether the K weights of a token are made to sum to 1.
        selection_bias_E: `[E]` fp32, added to the scores for the choice alone (`"sigmoid"` only).
        scale: factor on the weights.
        token_mask_T: `[T]` bool, False for padding, which is routed but not counted.

    Raises:
        ValueError: an argument is out of range.
    """
    if not supports(logits_TE):
        shape, dtype = tuple(logits_TE.shape), logits_TE.dtype
        raise ValueError(f"`logits_TE` of shape {shape}, {dtype}, on {logits_TE.device} is not taken; see `supports`.")
    if not 1 <= top_k <= logits_TE.shape[1]:
        raise ValueError(f"`top_k`={top_k} must be within 1 and the {logits_TE.shape[1]} experts.")
    if scoring not in SCORINGS:
        raise ValueError(f"`scoring`={scoring!r} must be one of {', '.join(SCORINGS)}.")
    if selection_bias_E is not None and scoring != "sigmoid":
        raise ValueError(f"`selection_bias_E` is for `scoring`='sigmoid', not {scoring!r}. Leave it out.")
    return RouterChoice(*_route_op(logits_TE, top_k, scoring, renormalise, selection_bias_E, scale, token_mask_T))


@triton.jit
def route_kernel(
    logits_ptr, selection_bias_ptr, mask_ptr, weights_ptr, ids_ptr, counts_ptr, num_tokens, E, stride_logits, scale,
    TOP_K: tl.constexpr, SIGMOID: tl.constexpr, RENORMALISE: tl.constexpr, HAS_BIAS: tl.constexpr, HAS_MASK: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """One program per BLOCK_T tokens: K times the largest that is left. Counts are sums of integers, so always the same."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    k = tl.arange(0, BLOCK_K)
    real = t < num_tokens
    inside = real[:, None] & (e < E)[None, :]
    logits = tl.load(logits_ptr + t.to(tl.int64)[:, None] * stride_logits + e[None, :], mask=inside, other=0.0)
    logits = tl.where((e < E)[None, :], logits, float("-inf"))
    choice = logits
    if SIGMOID:
        choice = tl.sigmoid(logits)
        if HAS_BIAS:
            choice += tl.load(selection_bias_ptr + e, mask=e < E, other=0.0)[None, :]
    left = tl.broadcast_to((e < E)[None, :], (BLOCK_T, BLOCK_E))
    top = tl.full((BLOCK_T, BLOCK_K), float("-inf"), tl.float32)
    ids = tl.zeros((BLOCK_T, BLOCK_K), tl.int32)
    for i in range(TOP_K):
        best = tl.max(tl.where(left, choice, float("-inf")), axis=1)
        first = tl.min(tl.where(left & (choice == best[:, None]), e[None, :], E - 1), axis=1)
        picked = e[None, :] == first[:, None]
        chosen = tl.sum(tl.where(picked, logits, 0.0), axis=1)
        top = tl.where((k == i)[None, :], chosen[:, None], top)
        ids = tl.where((k == i)[None, :], first[:, None], ids)
        left = left & (e[None, :] != first[:, None])
    weights = _weights(logits, top, k < TOP_K, SIGMOID, RENORMALISE) * scale
    offsets = t.to(tl.int64)[:, None] * TOP_K + k[None, :]
    tl.store(weights_ptr + offsets, weights, mask=real[:, None] & (k < TOP_K)[None, :])
    tl.store(ids_ptr + offsets, ids.to(tl.int64), mask=real[:, None] & (k < TOP_K)[None, :])
    if HAS_MASK:
        real = real & (tl.load(mask_ptr + t, mask=real, other=0) != 0)
    taken = real[:, None] & (e < E)[None, :] & (left == 0)
    counts = tl.sum(taken.to(tl.int32), axis=0).to(tl.int64)
    tl.atomic_add(counts_ptr + e, counts, mask=(e < E) & (counts > 0))


@inlined
def _weights(logits, top, chosen, SIGMOID: tl.constexpr, RENORMALISE: tl.constexpr):
    """`[T, K]` weights from all logits and those of the chosen experts; 0 where `chosen` is not."""
    if SIGMOID:
        weights = tl.where(chosen[None, :], tl.sigmoid(top), 0.0)
        if RENORMALISE:
            weights = weights / (tl.sum(weights, axis=1)[:, None] + _TINY)
    else:
        # over the chosen logits alone, softmax is already renormalised
        over = top if RENORMALISE else logits
        largest = tl.max(over, axis=1)[:, None]
        weights = tl.where(chosen[None, :], tl.exp(top - largest), 0.0)
        weights = weights / tl.sum(tl.exp(over - largest), axis=1)[:, None]
    return weights


@triton.jit
def route_backward_kernel(
    d_weights_ptr, logits_ptr, ids_ptr, d_logits_ptr, num_tokens, E, stride_logits, scale,
    TOP_K: tl.constexpr, SIGMOID: tl.constexpr, RENORMALISE: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_E: tl.constexpr, BLOCK_K: tl.constexpr,
):  # fmt: skip
    """`[T, E]` gradient of the logits; with w the weights before scaling, δ their scaled gradient, s = Σ_k δ_k w_k:

    softmax: `w_k (δ_k − s)` (kept), and `−p_e s` for all others if w is not renormalised; sigmoid: `δ_k w_k (1 − σ_k)`,
    with `δ_k − s` in place of δ_k if renormalised.
    """
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    e = tl.arange(0, BLOCK_E)
    k = tl.arange(0, BLOCK_K)
    real = t < num_tokens
    inside = real[:, None] & (e < E)[None, :]
    chosen = real[:, None] & (k < TOP_K)[None, :]
    rows = logits_ptr + t.to(tl.int64)[:, None] * stride_logits
    logits = tl.where((e < E)[None, :], tl.load(rows + e[None, :], mask=inside, other=0.0), float("-inf"))
    offsets = t.to(tl.int64)[:, None] * TOP_K + k[None, :]
    ids = tl.load(ids_ptr + offsets, mask=chosen, other=0).to(tl.int32)
    top = tl.where((k < TOP_K)[None, :], tl.load(rows + ids, mask=chosen, other=0.0), float("-inf"))
    d_weights = tl.load(d_weights_ptr + offsets, mask=chosen, other=0.0) * scale
    weights = _weights(logits, top, k < TOP_K, SIGMOID, RENORMALISE)
    common = tl.sum(tl.where(chosen, d_weights * weights, 0.0), axis=1)
    d_top = d_weights * weights
    if RENORMALISE:
        d_top -= common[:, None] * weights
    if SIGMOID:
        d_top *= 1.0 - tl.sigmoid(top)
    d_logits = tl.zeros((BLOCK_T, BLOCK_E), tl.float32)
    if not SIGMOID and not RENORMALISE:
        largest = tl.max(logits, axis=1)[:, None]
        p = tl.exp(logits - largest)
        d_logits -= p / tl.sum(p, axis=1)[:, None] * common[:, None]
    for i in range(TOP_K):
        mine = (k == i)[None, :] & chosen
        expert = tl.sum(tl.where(mine, ids, 0), axis=1)
        d_logits += tl.where(e[None, :] == expert[:, None], tl.sum(tl.where(mine, d_top, 0.0), axis=1)[:, None], 0.0)
    tl.store(d_logits_ptr + t.to(tl.int64)[:, None] * E + e[None, :], d_logits, mask=inside)


def _blocks(num_experts: int, top_k: int) -> dict[str, int]:
    block_e = triton.next_power_of_2(num_experts)
    return {"BLOCK_T": max(1, _ELEMENTS // block_e), "BLOCK_E": block_e, "BLOCK_K": triton.next_power_of_2(top_k)}


@torch.library.custom_op("hf_moe::triton_route", mutates_args=())
def _route_op(
    logits_TE: Tensor,
    top_k: int,
    scoring: str,
    renormalise: bool,
    selection_bias_E: Tensor | None,
    scale: float,
    token_mask_T: Tensor | None,
) -> tuple[Tensor, Tensor, Tensor]:
    """The three tensors of a `RouterChoice`; opaque to `torch.compile`."""
    tokens, experts = logits_TE.shape
    logits_TE = logits_TE if logits_TE.stride(1) == 1 else logits_TE.contiguous()
    weights_TK = logits_TE.new_empty(tokens, top_k)
    ids_TK = logits_TE.new_empty(tokens, top_k, dtype=torch.int64)
    counts_E = logits_TE.new_zeros(experts, dtype=torch.int64)
    if tokens:
        blocks = _blocks(experts, top_k)
        bias_E = None if selection_bias_E is None else selection_bias_E.to(torch.float32).contiguous()
        mask_T = None if token_mask_T is None else token_mask_T.contiguous()
        route_kernel[(triton.cdiv(tokens, blocks["BLOCK_T"]),)](
            logits_TE, bias_E, mask_T, weights_TK, ids_TK, counts_E, tokens, experts, logits_TE.stride(0), scale,
            TOP_K=top_k, SIGMOID=scoring == "sigmoid", RENORMALISE=renormalise,
            HAS_BIAS=bias_E is not None, HAS_MASK=mask_T is not None, **blocks,
        )  # fmt: skip
    return weights_TK, ids_TK, counts_E


@_route_op.register_fake
def _(logits_TE: Tensor, top_k: int, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    tokens, experts = logits_TE.shape
    return (
        logits_TE.new_empty(tokens, top_k),
        logits_TE.new_empty(tokens, top_k, dtype=torch.int64),
        logits_TE.new_empty(experts, dtype=torch.int64),
    )


def _setup_context(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    logits_TE, _, ctx.scoring, ctx.renormalise, _, ctx.scale, _ = inputs
    ctx.set_materialize_grads(False)
    ctx.mark_non_differentiable(*output[1:])
    ctx.save_for_backward(logits_TE, output[1])


def _backward(ctx: Any, d_weights_TK: Tensor | None, *unused: None) -> tuple[Tensor | None, ...]:
    if d_weights_TK is None:
        return (None,) * 7
    logits_TE, ids_TK = ctx.saved_tensors
    return _backward_op(d_weights_TK, logits_TE, ids_TK, ctx.scoring, ctx.renormalise, ctx.scale), *(None,) * 6


_route_op.register_autograd(_backward, setup_context=_setup_context)


@torch.library.custom_op("hf_moe::triton_route_backward", mutates_args=())
def _backward_op(
    d_weights_TK: Tensor, logits_TE: Tensor, ids_TK: Tensor, scoring: str, renormalise: bool, scale: float
) -> Tensor:
    """Gradient of the logits `[T, E]`."""
    (tokens, experts), top_k = logits_TE.shape, ids_TK.shape[1]
    logits_TE = logits_TE if logits_TE.stride(1) == 1 else logits_TE.contiguous()
    d_logits_TE = logits_TE.new_empty(tokens, experts)
    if tokens:
        blocks = _blocks(experts, top_k)
        route_backward_kernel[(triton.cdiv(tokens, blocks["BLOCK_T"]),)](
            d_weights_TK.contiguous(), logits_TE, ids_TK, d_logits_TE, tokens, experts, logits_TE.stride(0), scale,
            TOP_K=top_k, SIGMOID=scoring == "sigmoid", RENORMALISE=renormalise, **blocks,
        )  # fmt: skip
    return d_logits_TE


@_backward_op.register_fake
def _(d_weights_TK: Tensor, logits_TE: Tensor, *rest: Any) -> Tensor:
    return logits_TE.new_empty(logits_TE.shape)


def _refuse(ctx: Any, *gradients: Tensor | None) -> None:
    raise RuntimeError(
        "The Triton router has no second derivative (create_graph=True): take experts_implementation='eager' for it."
    )


_backward_op.register_autograd(_refuse)
