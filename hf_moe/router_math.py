# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""The arithmetic of routers in full precision: their projection, and one softmax that gives all that is asked of it.

Letters: T tokens, D hidden, E experts (or any columns).
"""

from __future__ import annotations

from contextlib import AbstractContextManager, nullcontext
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

_NO_CONTEXT = nullcontext()
_BLOCK = 256  # rows of x whose copy in fp32 stays in a core's cache
_LOWEST = -1e4  # a logit so far below the largest has the probability 0
_NARROW = 16  # columns; fewer do not fill a vector register
_SMALL = 256  # values, up to which turning them over costs more than it saves


def without_autocast(device_type: str) -> AbstractContextManager[Any]:
    """A context that turns autocast off where it is on (to enter one costs more than to ask)."""
    return torch.autocast(device_type, enabled=False) if torch.is_autocast_enabled(device_type) else _NO_CONTEXT


def is_plain(tensor: Tensor) -> bool:
    """Whether it has values now: no subclass such as a `DTensor`, not under a compiler, not under `torch.func`."""
    return type(tensor) is Tensor and not torch.compiler.is_compiling() and not torch._C._are_functorch_transforms_active()


def project(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """`x Wᵀ`, `[T, E]`, in the weight's precision; of an x in bf16 no copy in fp32 is kept for the backward."""
    if x_TD.dtype == weight_ED.dtype or torch.compiler.is_compiling():
        return F.linear(x_TD.to(weight_ED.dtype), weight_ED)
    if torch.is_grad_enabled() and (x_TD.requires_grad or weight_ED.requires_grad):
        projected: Tensor = _Project.apply(x_TD, weight_ED)
        return projected
    return _product(x_TD, weight_ED)


class _Project(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x_TD: Tensor, weight_ED: Tensor) -> Tensor:
        ctx.save_for_backward(x_TD, weight_ED)
        return _product(x_TD, weight_ED)

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, Tensor | None]:
        x_TD, weight_ED = ctx.saved_tensors
        (gradient_TE,) = gradients
        needs_x, needs_weight = ctx.needs_input_grad
        with without_autocast(x_TD.device.type):
            if torch.is_grad_enabled() or x_TD.device.type != "cpu":  # gradients of gradients are not for `out=`
                of_x = (gradient_TE @ weight_ED).to(x_TD.dtype) if needs_x else None
                return of_x, gradient_TE.t() @ x_TD.to(weight_ED.dtype) if needs_weight else None
            of_x = torch.empty_like(x_TD) if needs_x else None
            of_weight = torch.zeros_like(weight_ED) if needs_weight else None
            for start in range(0, len(x_TD), _BLOCK):
                here = slice(start, start + _BLOCK)
                if of_x is not None:
                    of_x[here] = gradient_TE[here] @ weight_ED
                if of_weight is not None:
                    of_weight.addmm_(gradient_TE[here].t(), x_TD[here].to(weight_ED.dtype))
        return of_x, of_weight


def _product(x_TD: Tensor, weight_ED: Tensor) -> Tensor:
    """`x Wᵀ` in the weight's precision; on CPU block by block, so that the copy of x never reaches the main memory."""
    if len(x_TD) <= _BLOCK or x_TD.device.type != "cpu":
        return F.linear(x_TD.to(weight_ED.dtype), weight_ED)
    return torch.cat([F.linear(block.to(weight_ED.dtype), weight_ED) for block in x_TD.split(_BLOCK)])


def softmax(scores: Tensor) -> Tensor:
    """`scores.softmax(dim=-1)`; on CPU rows of a few columns are turned over, which torch else takes one value at a time."""
    if scores.shape[-1] >= _NARROW or scores.numel() <= _SMALL or scores.device.type != "cpu" or torch.compiler.is_compiling():
        return scores.softmax(dim=-1)
    return scores.movedim(-1, 0).softmax(dim=0).movedim(0, -1).contiguous()


class Sums(dict[str, Tensor]):
    """Sums over tokens by name, and the vector that they are pieces of.

    Attributes:
        flat: `[3E + 5]`: counts of the experts and of empty slots, importance likewise, probs, tokens, z, entropy.
    """

    def __init__(self, flat: Tensor) -> None:
        super().__init__(pieces_of(flat))
        self.flat = flat


def pieces_of(flat: Tensor) -> dict[str, Tensor]:
    """The sums by name: `[..., E]`, or `[...]` for those that are one number. See `Sums`."""
    experts = (flat.shape[-1] - 5) // 3
    counts, _, importance, _, probs, numbers = flat.split([experts, 1, experts, 1, experts, 3], dim=-1)
    tokens, z, entropy = numbers.unbind(dim=-1)
    tokens, counts, entropy = tokens.detach(), counts.detach(), entropy.detach()
    return {"tokens": tokens, "counts": counts, "executed": counts, "importance": importance, "probs": probs, "z": z,
            "entropy": entropy}  # fmt: skip


def softmax_sums(logits_TE: Tensor, weights_TK: Tensor, ids_TK: Tensor, real_T: Tensor | None) -> Sums:
    """The sums over real tokens that losses and metrics of a router are made of, from one softmax.

    Args:
        logits_TE: whose softmax is meant.
        weights_TK: gates, summed to the importance.
        ids_TK: experts, which are counted; E is an empty slot.
        real_T: 1 for tokens, 0 for padding; `None` if all are real.

    Returns:
        `tokens` `[]`; `counts` and `executed` `[E]`, the same; `importance` `[E]`; `probs` `[E]`; `z` `[]`, of logsumexp²;
        `entropy` `[]` in nats. `importance`, `probs` and `z` carry gradient.
    """
    dtype = torch.promote_types(logits_TE.dtype, weights_TK.dtype)
    real_T = None if real_T is None else real_T.to(dtype)
    return Sums(_SoftmaxSums.apply(logits_TE.to(dtype), weights_TK.to(dtype), ids_TK, real_T))


class _SoftmaxSums(torch.autograd.Function):
    """With p = softmax(l), s = logsumexp(l), and g of the sums: ∂l_te = real_t p_te (g_e − Σ_j p_tj g_j + 2 s_t g_z)."""

    @staticmethod
    def forward(ctx: Any, logits_TE: Tensor, weights_TK: Tensor, ids_TK: Tensor, real_T: Tensor | None) -> Tensor:
        num_tokens, experts = logits_TE.shape
        top_T1 = logits_TE.amax(dim=-1, keepdim=True)
        below_TE = logits_TE - top_T1
        probs_TE = below_TE.exp()
        z_T1 = probs_TE.sum(dim=-1, keepdim=True)
        probs_TE /= z_T1
        log_z_T1 = z_T1.log_()
        # log z - Σ p (logit - top): no two large numbers are subtracted; clamped, since 0 · -inf is not 0
        entropy_T = log_z_T1.squeeze(-1) - below_TE.clamp_(min=_LOWEST).mul_(probs_TE).sum(dim=-1)
        log_z_T = (log_z_T1 + top_T1).squeeze(-1)

        flat = weights_TK.new_zeros(3 * experts + 5)
        counts, importance, probs, numbers = flat.split([experts + 1, experts + 1, experts, 3])
        ids = ids_TK.reshape(-1)
        if real_T is None:
            real_TK = torch.ones_like(weights_TK)
            tokens, z, entropy = numbers.unbind()
            tokens.fill_(num_tokens)
            torch.dot(log_z_T, log_z_T, out=z)
            torch.sum(entropy_T, dim=0, out=entropy)
            torch.sum(probs_TE, dim=0, out=probs)
        else:
            real_TK = real_T.unsqueeze(-1).expand_as(weights_TK)
            weights_TK = weights_TK * real_TK
            numbers.copy_(torch.mv(torch.stack([torch.ones_like(real_T), log_z_T.square(), entropy_T]), real_T))
            torch.mv(probs_TE.t(), real_T, out=probs)
        counts.scatter_add_(0, ids, real_TK.reshape(-1))
        importance.scatter_add_(0, ids, weights_TK.reshape(-1))
        ctx.save_for_backward(logits_TE, log_z_T, ids_TK, real_T)
        return flat

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> tuple[Tensor | None, ...]:
        logits_TE, log_z_T, ids_TK, real_T = ctx.saved_tensors
        experts = logits_TE.shape[-1]
        _, of_importance, of_probs, of_numbers = gradients[0].split([experts + 1, experts + 1, experts, 3])
        of_weights = of_importance[ids_TK] if ctx.needs_input_grad[1] else None
        if of_weights is not None and real_T is not None:
            of_weights = of_weights * real_T.unsqueeze(-1)
        if not ctx.needs_input_grad[0]:
            return None, of_weights, None, None
        if torch.is_grad_enabled():  # twice differentiated: the saved normaliser is no function of the logits
            log_z_T = logits_TE.logsumexp(dim=-1)
        probs_TE = (logits_TE - log_z_T.unsqueeze(-1)).exp()
        with without_autocast(logits_TE.device.type):
            of_row_T = 2 * of_numbers[1] * log_z_T - torch.mv(probs_TE, of_probs)
        of_logits = (of_row_T.unsqueeze(-1) + of_probs) * probs_TE
        return of_logits if real_T is None else of_logits * real_T.unsqueeze(-1), of_weights, None, None
