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

import torch
from torch import Tensor


@dataclass(frozen=True)
class Run:
    """The rows `start` to `end`: groups side by side, of `sizes[i]` rows of the expert `experts[i]`."""

    start: int
    end: int
    experts: list[int]
    sizes: list[int]

    def __len__(self) -> int:
        return self.end - self.start


@dataclass(frozen=True)
class Groups:
    """The rows of all experts that have some.

    Attributes:
        experts: of each group, in ascending order; twice where a group was cut.
        sizes: rows of each group, with padding.
        slot_P: `[P]` the slot of each row; S for padding.
        row_TK: `[T, K]` the row of each slot; P for empty ones.
    """

    experts: list[int]
    sizes: list[int]
    slot_P: Tensor
    row_TK: Tensor

    def __len__(self) -> int:
        return len(self.slot_P)

    def tokens(self) -> Tensor:
        """`[P]` the token of each row; of padding the last."""
        tokens, top_k = self.row_TK.shape
        return self.slot_P.div(top_k, rounding_mode="floor").clamp_(max=tokens - 1)

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
    routing, sizes that were never seen are the rule. These are 95 up to 4096, and at most an eighth of one is padding.
    """
    if count <= 16:
        return count
    step = 16 if count <= 256 else 32 if count <= 512 else 64
    return -(-count // step) * step


def group_rows(ids_TK: Tensor, num_experts: int, pad: bool, most_rows: int | None = None) -> Groups:
    """Sort the slots of a batch by expert.

    Args:
        ids_TK: `[T, K]` ids; E and above marks an empty slot.
        num_experts: E.
        pad: to few sizes (see `padded`), or not.
        most_rows: of a group; an expert with more has several.
    """
    ids_S = ids_TK.reshape(-1)
    sorted_S, slot_S = ids_S.clamp(max=num_experts).sort(stable=True)
    experts, counts = [], []
    for expert, left in enumerate(torch.bincount(sorted_S, minlength=num_experts + 1)[:num_experts].tolist()):
        while left:
            experts.append(expert)
            counts.append(left if most_rows is None else min(left, most_rows))
            left -= counts[-1]
    sizes = [padded(count) for count in counts] if pad else counts
    rows, slot_S = sum(sizes), slot_S[: sum(counts)]  # empty slots are last
    slot_P, row_S = slot_S, torch.arange(len(slot_S))
    if rows > len(slot_S):
        padding = torch.tensor([0, *(size - count for size, count in zip(sizes, counts, strict=True))])
        row_S += padding.cumsum(0)[:-1].repeat_interleave(torch.tensor(counts))
        slot_P = torch.full((rows,), ids_S.numel()).scatter_(0, row_S, slot_S)
    row_of_slot_S = torch.full((ids_S.numel(),), rows).scatter_(0, slot_S, row_S)
    return Groups(experts, sizes, slot_P, row_of_slot_S.view(ids_TK.shape))
