# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""`Routing`, the plan a router makes for a batch of tokens, and the capacity that cuts it.

Letters: T tokens (B sequences of S), E experts, K slots per token. A slot that holds the id E holds no expert; its weight
is 0. This is the sentinel that Transformers' expert implementations skip.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np
import torch
from torch import Tensor

_SMALLEST_FP32 = 2.0**-149
_FEW = 512  # scores that are sorted sooner than compared in several steps
_SORTED_FAST = 128  # 64-bit keys of a row that NumPy sorts in vector registers
_SORTED_AT_ONCE = 1 << 15  # scores whose keys stay in a core's cache


@dataclass(frozen=True)
class Routing:
    """Who computes what: the plan for T tokens.

    Attributes:
        expert_ids_TK: `[T, K]` int64; E marks an empty slot.
        weights_TK: `[T, K]` combine weights in the router's dtype (fp32); 0 in empty slots.
        logits_TE: `[T, E]` the router's logits without noise, or `None` where there are none (hash).
        chosen_ids_TK: `[T, K]` the ids before capacity (and before GShard's random drop); what the router *wanted*.
        chosen_weights_TK: `[T, K]` the gates before capacity.
        stats: further sums over tokens that the router's own losses need, by name, as `[T, ...]` tensors.
    """

    expert_ids_TK: Tensor
    weights_TK: Tensor
    logits_TE: Tensor | None
    chosen_ids_TK: Tensor
    chosen_weights_TK: Tensor
    stats: dict[str, Tensor] = field(default_factory=dict)

    @classmethod
    def of(cls, expert_ids_TK: Tensor, weights_TK: Tensor, logits_TE: Tensor | None, **stats: Tensor) -> Routing:
        """A plan in which everything wanted is also done."""
        return cls(expert_ids_TK, weights_TK, logits_TE, expert_ids_TK, weights_TK, stats)

    def keep(self, keep_TK: Tensor, num_experts: int) -> Routing:
        """The plan with the slots where `keep_TK` is False emptied."""
        return replace(
            self,
            expert_ids_TK=self.expert_ids_TK.masked_fill(~keep_TK, num_experts),
            weights_TK=self.weights_TK.masked_fill(~keep_TK, 0.0),
        )


def top_k(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The k largest scores and their indices, both `[..., k]`, largest first; of equal ones the lower index first.

    `Tensor.topk` leaves the order of equal scores open, and routers that start at zero have nothing but equal ones.
    """
    if torch.compiler.is_compiling() and scores.device.type == "cpu":
        # Inductor on CPU (torch 2.13) loses the scatter that the backward of a gather or a sort is; a product has none.
        ids = _top_k_ids_of_many(scores.detach(), k)
        chosen = torch.nn.functional.one_hot(ids, scores.shape[-1]).to(scores.dtype)
        return (scores.unsqueeze(-2) * chosen).sum(dim=-1), ids
    if scores.numel() <= _FEW or (scores.dtype == torch.float64 and scores.device.type != "cpu"):
        values, ids = scores.sort(dim=-1, descending=True, stable=True)
        return values[..., :k], ids[..., :k]
    ids = _top_k_ids_of_many(scores.detach(), k)
    return scores.gather(-1, ids), ids


def _top_k_ids_of_many(scores: Tensor, k: int) -> Tensor:
    """Without torch's sort of whole rows, which is the slowest of all."""
    if _numpy_takes(scores):
        sorts_fast = scores.dtype == torch.float32 and scores.shape[-1] <= _SORTED_FAST
        if k <= 2 or (4 * k < scores.shape[-1] and not sorts_fast):
            return _by_repeated_argmax(scores, k)
        if scores.dtype == torch.float32:
            return _by_sorted_keys(scores, k)
    if k <= 2:
        first = scores.argmax(dim=-1, keepdim=True)
        if k == 1:
            return first
        return torch.cat([first, scores.scatter(-1, first, float("-inf")).argmax(dim=-1, keepdim=True)], dim=-1)
    if scores.dtype == torch.float64:
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    # In fp64 there is room below the last bit of fp32 to order equal scores by index.
    keys = scores.double()
    index = torch.arange(keys.shape[-1], dtype=keys.dtype, device=keys.device)
    return torch.addcmul(keys, keys.abs() + _SMALLEST_FP32, index, value=-(2.0**-45)).topk(k, dim=-1).indices


def _numpy_takes(scores: Tensor) -> bool:
    """Whether these are values in the CPU's memory (not a fake tensor, a `DTensor` or one under `torch.func`)."""
    if scores.device.type != "cpu" or torch.compiler.is_compiling() or type(scores) is not Tensor:
        return False
    wrapped = torch._C._functorch.is_functorch_wrapped_tensor(scores)
    return not wrapped and scores.dtype in (torch.float32, torch.float64)


def _by_repeated_argmax(scores: Tensor, k: int) -> Tensor:
    """NumPy's argmax of rows, which takes the first of equal ones, is several times as fast as torch's, or as its `topk`."""
    num_experts = scores.shape[-1]
    ids = torch.empty(*scores.shape[:-1], k, dtype=torch.int64)
    rows, left = ids.view(-1, k).numpy(), scores.reshape(-1, num_experts).numpy()
    rows[:, 0] = left.argmax(axis=-1)
    if k > 1:
        left = left.copy()
        flat = left.reshape(-1)
        start = torch.arange(0, flat.size, num_experts).numpy()
    for slot in range(1, k):
        flat[rows[:, slot - 1] + start] = float("-inf")
        rows[:, slot] = left.argmax(axis=-1)
    if k > 1 and flat[rows[:, k - 1] + start].min(initial=0) == float("-inf"):  # none was left, so one is taken twice
        return scores.sort(dim=-1, descending=True, stable=True).indices[..., :k]
    return ids


def _by_sorted_keys(scores: Tensor, k: int) -> Tensor:
    """Sort integers that hold a fp32 score in their upper half and, so that equal ones keep their order, E - 1 - index below.

    NumPy sorts rows of up to 128 such keys in vector registers, in less than half the time of `Tensor.topk`.
    """
    num_experts = scores.shape[-1]
    ids = torch.empty(*scores.shape[:-1], k, dtype=torch.int64)
    index = np.arange(num_experts - 1, -1, -1)
    rows = max(1, _SORTED_AT_ONCE // num_experts)
    for part, into in zip(scores.reshape(-1, num_experts).split(rows), ids.view(-1, k).split(rows), strict=True):
        bits = (part + 0.0).numpy().view(np.int32)  # + 0.0: -0.0 is 0.0, but its bits are others
        below = bits >> 31
        below &= 0x7FFFFFFF
        bits ^= below  # integers in the order of the numbers
        keys = bits.astype(np.int64)
        keys <<= 32
        keys |= index
        keys.sort(axis=-1)
        np.subtract(num_experts - 1, keys[:, : -k - 1 : -1] & 0xFFFFFFFF, out=into.numpy())
    return ids


def apply_capacity(
    routing: Routing,
    num_experts: int,
    capacity_factor: float,
    batch_shape: Sequence[int],
    token_mask_T: Tensor | None = None,
    policy: str = "position",
) -> Routing:
    """Empty the slots that are over the capacity of their expert; those tokens pass through the residual.

    Capacity is counted within one sequence, over real tokens, so that it does not depend on ranks, batch or padding.
    With `"position"` an expert may hold at most `ceil(capacity_factor · K · n / E)` of the first n tokens, for every n:
    the usual capacity at the end of the sequence, and at no point a look at what follows. The other policies rank the
    whole sequence against its final capacity, so later tokens can push out earlier ones.

    Args:
        routing: the plan.
        num_experts: E.
        capacity_factor: slots per expert as a multiple of its fair share.
        batch_shape: (..., S), the tokens' shape; its last dimension is the sequence.
        token_mask_T: `[T]` bool, False for padding, which neither takes capacity nor is dropped.
        policy: `"position"`, `"probability"` or `"batch_priority"` (see `MoEConfig.capacity_policy`).
    """
    ids_TK = routing.expert_ids_TK
    length = batch_shape[-1] if len(batch_shape) else 1
    real_T = torch.ones_like(ids_TK[:, 0], dtype=torch.bool) if token_mask_T is None else token_mask_T
    arrives_BSE = _by_expert(ids_TK, real_T.unsqueeze(-1).expand_as(ids_TK), num_experts).view(-1, length, num_experts)
    real_tokens_BS = real_T.view(-1, length).cumsum(dim=1)
    capacity_BS1 = _ceil(real_tokens_BS, capacity_factor * ids_TK.shape[-1] / num_experts).unsqueeze(-1)
    if policy == "position":
        kept_BSE = _first_come_first_served(arrives_BSE, capacity_BS1)
    else:
        weights_TK = routing.weights_TK
        if policy == "batch_priority":
            weights_TK = weights_TK.amax(dim=-1, keepdim=True).expand_as(weights_TK)
        priority_BSE = _by_expert(ids_TK, weights_TK.detach(), num_experts).view_as(arrives_BSE)
        kept_BSE = _ranked(arrives_BSE, priority_BSE, capacity_BS1[:, -1:])
    # the column of the sentinel, so that empty slots can be looked up like the others
    kept_TE1 = torch.nn.functional.pad(kept_BSE.flatten(0, 1), (0, 1), value=False)
    return routing.keep(kept_TE1.gather(1, ids_TK) | ~real_T.unsqueeze(-1), num_experts)


def most_rows_per_expert(num_experts: int, capacity_factor: float, top_k: int, batch_shape: Sequence[int]) -> int:
    """The most tokens of a batch that one expert can get after `apply_capacity`; known without looking at the plan.

    Args:
        num_experts, capacity_factor, batch_shape: as in `apply_capacity`.
        top_k: K.
    """
    length = batch_shape[-1] if len(batch_shape) else 1
    sequences = math.prod(batch_shape[:-1])
    return sequences * min(length, math.ceil(length * (capacity_factor * top_k / num_experts) - 1e-9))


def _by_expert(ids_TK: Tensor, values_TK: Tensor, num_experts: int) -> Tensor:
    """`[T, E]` with the value of each expert's slot, 0 (False) where a token does not use the expert."""
    out_TE1 = values_TK.new_zeros(ids_TK.shape[0], num_experts + 1)
    return out_TE1.scatter(1, ids_TK, values_TK)[:, :num_experts]


def _ceil(count: Tensor, factor: float) -> Tensor:
    """`ceil(count · factor)` in float64, safe from 2.0000000001 becoming 3."""
    return torch.ceil(count.double() * factor - 1e-9).long()


def _first_come_first_served(arrives_BSE: Tensor, capacity_BS1: Tensor) -> Tensor:
    """Which arrivals find a free place when places are added along the sequence.

    An expert holds n_s = min(n_{s-1} + arrival_s, C_s). As C never falls, this reflected walk has the closed form
    n_s = A_s + min(0, min_{r ≤ s} (C_r − A_r)) with A the cumulated arrivals.
    """
    arrived_BSE = arrives_BSE.long().cumsum(dim=1)
    lost_BSE = (capacity_BS1 - arrived_BSE).cummin(dim=1).values.clamp(max=0)
    held_BSE = arrived_BSE + lost_BSE
    return torch.diff(held_BSE, dim=1, prepend=torch.zeros_like(held_BSE[:, :1])) > 0


def _ranked(arrives_BSE: Tensor, priority_BSE: Tensor, capacity_B11: Tensor) -> Tensor:
    """Which arrivals are among the first C by priority (ties to the earlier token)."""
    priority_BSE = priority_BSE.masked_fill(~arrives_BSE, float("-inf"))
    order_BSE = priority_BSE.argsort(dim=1, descending=True, stable=True)
    return arrives_BSE & (order_BSE.argsort(dim=1) < capacity_B11)
