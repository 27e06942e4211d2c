# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""The matrix products of experts on a CPU.

Letters as in `expert_groups`, and D hidden size, F expert width, H = 2F (gated) or F.
"""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, NamedTuple

import torch
from torch import Tensor

from .cpu_tuning import tuning
from .expert_activation import Activation
from .expert_groups import Groups, Run
from .large_buffers import empty

_SUM = 0  # the mode of `torch.embedding_bag`
_SMALL = 8 << 20  # bytes of a stack of weights, whose gradient malloc then finds among what was freed
RUN_ROWS = 2048  # of groups that take each step together: weights are read in their order, rows stay near


class ExpertWeights(NamedTuple):
    """Weights so that `rows @ up[e]` and `rows @ down[e]` are the two products: `[E, D, H]`, `[E, F, D]`; biases or `None`."""

    up: Tensor
    down: Tensor
    up_bias: Tensor | None
    down_bias: Tensor | None

    @classmethod
    def of(cls, experts: Any) -> ExpertWeights:
        """Views of the parameters of a module of the contract of Transformers' experts."""
        name = "gate_up_proj" if experts.has_gate else "up_proj"
        up, down = getattr(experts, name), experts.down_proj
        if not experts.is_transposed:
            up, down = up.transpose(1, 2), down.transpose(1, 2)
        return cls(
            up, down, *((getattr(experts, f"{name}_bias"), experts.down_proj_bias) if experts.has_bias else (None, None))
        )


class ExpertLayer(NamedTuple):
    """What forward and backward share: weights, activation, and the precision of the products."""

    weights: ExpertWeights
    activation: Activation
    dtype: torch.dtype

    @property
    def num_experts(self) -> int:
        return self.weights.up.shape[0]

    @property
    def widths(self) -> tuple[int, int, int]:
        """D, H, F."""
        return self.weights.up.shape[1], self.weights.up.shape[2], self.weights.down.shape[1]

    @property
    def compiles_shapes(self) -> bool:
        """Whether each shape of a product costs a compilation: oneDNN's (bf16, fp16) do, MKL's (fp32, fp64) do not."""
        return self.dtype in (torch.bfloat16, torch.float16)

    @property
    def is_small(self) -> bool:
        """Whether new memory for all gradients costs little; never with biases, which torch's grouped product does not have."""
        up, down, up_bias, _ = self.weights
        return up_bias is None and max(up.nbytes, down.nbytes) <= _SMALL

    def rows_in_one_call(self, keep: bool) -> int:
        """Per expert, on average, up to which torch's product of all groups in one call is faster than a call for each.

        It takes one precision out of three, and dense rows or columns of a multiple of 16 bytes.

        Args:
            keep: whether a backward follows.
        """
        up, down, *_ = self.weights
        steps = {*up.stride(), *down.stride()} - {1} | {*self.widths}
        aligned = 1 in up.stride()[1:] and 1 in down.stride()[1:] and not any(step * up.itemsize % 16 for step in steps)
        takes = aligned and up.dtype == down.dtype == self.dtype
        return tuning().rows_in_one_call.get(self.dtype, (0, 0))[keep] if takes else 0

    def multiply(self, rows: Tensor, stack: Tensor, out: Tensor, run: Run) -> None:
        """`out[i] = rows[i] @ stack[e]`, with e the expert of row i.

        Args:
            rows: `[rows of the run, any]`.
            stack: `[E, any, other]`.
            out: `[rows of the run, other]`, in the precision of the products.
            run: whose groups they are.
        """
        vectors = len(run) == len(run.sizes) and rows.dtype == stack.dtype == out.dtype
        if vectors and rows.dtype not in tuning().vectors_by_mm:
            for matrix, row, into in zip(pick(stack.transpose(1, 2), run.experts), rows.unbind(), out.unbind(), strict=True):
                torch.mv(matrix, row, out=into)
        else:
            multiply(run.split(rows), self.matrices(stack, run.experts), run.split(out))

    def matrices(self, stack: Tensor, experts: list[int]) -> Iterable[Tensor]:
        """Those of the experts, in the precision of the products, one at a time where that takes a copy."""
        parts = pick(stack, experts)
        return parts if stack.dtype == self.dtype else (part.to(self.dtype) for part in parts)

    def activate(self, hidden: Tensor, out: Tensor) -> None:
        """The pointwise part, `[rows, H]` to `[rows, F]`, in blocks that stay in a cache."""
        for part, into in cached_parts(hidden, out):
            self.activation.forward(part, into)

    def between(self, room: Tensor, rows: int) -> Tensor:
        """`[rows, any]` in `room`, for what is between the products: stored column by column where that is faster.

        `x @ up` is then computed as `upᵀ @ xᵀ`, whose left factor is the weight as it is stored. As the right factor it is
        copied into another order at every call, which took a third of the time at 128 rows (AMX, bf16).
        """
        width = room.shape[1]
        flat = room.view(-1)[: rows * width]
        swapped = rows in tuning().swapped.get(self.dtype, ()) and self.weights.up.stride(1) == 1
        return flat.view(width, rows).t() if swapped else flat.view(rows, width)


def pick(stack: Tensor, indices: list[int]) -> list[Tensor]:
    """`[stack[i] for i in indices]`, for many at the cost of one call."""
    if 2 * len(indices) < len(stack):
        return [stack[i] for i in indices]
    parts = stack.unbind()
    return [parts[i] for i in indices]


def multiply(left: Iterable[Tensor], right: Iterable[Tensor], out: Iterable[Tensor]) -> None:
    """`out[i] = left[i] @ right[i]`, rounded to what `out` holds."""
    for a, b, into in zip(left, right, out, strict=True):
        if into.dtype == a.dtype:
            torch.mm(a, b, out=into)
        else:
            into.copy_(a @ b)


def cached_parts(*blocks: Tensor) -> Iterable[tuple[Tensor, ...]]:
    """Blocks of the same rows in parts that stay in the cache of a core."""
    rows, width = blocks[0].shape
    step = max(16, tuning().cached_values // width)
    return [blocks] if rows <= step or blocks[0].stride(1) != 1 else zip(*(block.split(step) for block in blocks), strict=True)


def room_for_rows(like: Tensor, rows: int, width: int) -> Tensor:
    """`[rows + 1, width]`; the last row, for empty slots, is 0."""
    room = empty(like, rows + 1, width)
    room[-1] = 0
    return room


def with_empty_row(rows: Tensor, plan: Groups) -> Tensor:
    """`[P, …]` rows as `[P + 1, …]` with a last one of zeros, if there are empty slots, which read it."""
    return rows if plan.filled == plan.row_TK.numel() else torch.cat([rows, torch.zeros_like(rows[:1])])


def sum_rows(rows_PD: Tensor, row_TK: Tensor, weights_TK: Tensor | None = None) -> Tensor:
    """Each token's (weighted) sum of its rows, added up in fp32, without a copy of them.

    Args:
        rows_PD: `[P + 1, D]` from `room_for_rows` or `with_empty_row`, or `[P, D]` where no slot is empty.
        row_TK: `[T, K]` which rows.
        weights_TK: `[T, K]`.
    """
    tokens, top_k = row_TK.shape
    first_T = torch.arange(0, tokens * top_k, top_k)
    weights_S = None if weights_TK is None else weights_TK.reshape(-1)
    # `F.embedding_bag` takes twice as long to get there
    return torch.embedding_bag(rows_PD, row_TK.view(-1), first_T, False, _SUM, False, weights_S)[0]
