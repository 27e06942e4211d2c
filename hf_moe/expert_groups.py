# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Which rows of a batch belong to which expert, laid out in groups of few different sizes.

Letters: T tokens, K slots per token, S = T·K slots, E experts, P rows of all groups together.

    ids [[2, 0], [2, 4], [0, 2]], E = 4 (id 4 is an empty slot)
    expert           0       2
    slots            1, 4    0, 2, 5
    rows             0, 1    2, 3, 4, 5 (padding)
    row of slot      2 0 3 6 1 4        (6 is P, a row of zeros)
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from itertools import accumulate, pairwise

import torch
from torch import Tensor

from .cpu_tuning import tuning


@dataclass(frozen=True)
class Run:
    """The rows `start` to `end`: groups side by side, of `sizes[i]` rows of `experts[i]`."""

    start: int
    end: int
    experts: list[int]
    sizes: list[int]

    def __len__(self) -> int:
        return self.end - self.start

    def split(self, rows: Tensor, dim: int = 0) -> tuple[Tensor, ...]:
        """The groups of what has these rows along `dim`."""
        return rows.split_with_sizes(self.sizes, dim)  # `Tensor.split` takes twice as long to get there


@dataclass(frozen=True)
class Groups:
    """The rows of all experts that have some.

    Attributes:
        experts: of each group, in ascending order; twice where a group was cut.
        sizes: rows of each group, with padding.
        filled: rows that are not padding: as many as there are slots that are not empty.
        slot_P: `[P]` the slot of each row; S for padding.
        row_TK: `[T, K]` the row of each slot; P for empty ones.
        ends_E: `[E]` int32, the row after each expert's last, for products of all groups in one call; `None` where a call for
            each group is better.
    """

    experts: list[int]
    sizes: list[int]
    filled: int
    slot_P: Tensor
    row_TK: Tensor
    ends_E: Tensor | None = None

    def __len__(self) -> int:
        return len(self.slot_P)

    def tokens(self) -> Tensor:
        """`[P]` the token of each row; of padding the last."""
        tokens, top_k = self.row_TK.shape
        tokens_P = self.slot_P.div(top_k, rounding_mode="floor")
        return tokens_P if self.filled == len(self) else tokens_P.clamp_(max=tokens - 1)

    def runs(self, most_rows: int) -> Iterator[Run]:
        """Groups side by side that have so many rows together, or the one that has more."""
        first = start = rows = 0
        for i, size in enumerate(self.sizes):
            if rows and rows + size > most_rows:
                yield Run(start, start + rows, self.experts[first:i], self.sizes[first:i])
                first, start, rows = i, start + rows, 0
            rows += size
        if rows:
            yield Run(start, start + rows, self.experts[first:], self.sizes[first:])


def padded(count: int) -> int:
    """The least of few sizes that holds so many rows.

    oneDNN, which multiplies bf16 matrices on CPUs, compiles a kernel for every shape it meets and keeps the last 1024. In
    routing, sizes that were never seen are the rule. These are 100 up to 4096, and less than a fifth of one is padding. Where
    tiles take 16 rows at a time whatever they hold, they are filled, and 95 sizes are left.
    """
    if count <= 16:
        return count
    step = 4 if count <= 32 else 8 if count <= 64 else 16 if count <= 256 else 32 if count <= 512 else 64
    step = max(step, tuning().padded_to)
    return -(-count // step) * step


def group_rows(ids_TK: Tensor, num_experts: int, pad: bool, most_rows: int | None = None, rows_in_one_call: int = 0) -> Groups:
    """Sort the slots of a batch by expert.

    Args:
        ids_TK: `[T, K]` ids; E and above marks an empty slot.
        num_experts: E.
        pad: to few sizes (see `padded`), or not.
        most_rows: of a group; an expert with more has several.
        rows_in_one_call: without padding, per expert, on average, up to which the groups get `ends_E`.
    """
    sorted_S, slot_S = ids_TK.reshape(-1).sort(stable=True)
    ends_E = torch.searchsorted(sorted_S, torch.arange(num_experts), right=True, out_int32=True)
    experts, counts = [], []
    for expert, (start, end) in enumerate(pairwise([0, *ends_E.tolist()])):
        while start < end:
            experts.append(expert)
            counts.append(end - start if most_rows is None else min(end - start, most_rows))
            start += counts[-1]
    sizes = [padded(count) for count in counts] if pad else counts
    slots, rows, filled = len(slot_S), sum(sizes), sum(counts)
    slot_S = slot_S[:filled]  # empty slots are last
    slot_P, row_S = slot_S, torch.arange(filled)
    if rows > filled:
        padding = torch.tensor([0, *(size - count for size, count in zip(sizes, counts, strict=True))])
        row_S += padding.cumsum(0)[:-1].repeat_interleave(torch.tensor(counts))
        slot_P = torch.full((rows,), slots).scatter_(0, row_S, slot_S)
    row_TK = torch.full((slots,), rows).scatter_(0, slot_S, row_S).view(ids_TK.shape)
    few = 0 < filled <= rows_in_one_call * num_experts
    if few and rows > filled:
        rows_E = [0] * num_experts
        for expert, size in zip(experts, sizes, strict=True):
            rows_E[expert] += size
        ends_E = torch.tensor(list(accumulate(rows_E)), dtype=torch.int32)
    return Groups(experts, sizes, filled, slot_P, row_TK, ends_E if few else None)
