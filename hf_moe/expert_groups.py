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

import numpy as np
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
        return torch.from_numpy(np.minimum(self.slot_P.numpy() // top_k, tokens - 1))

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
    routing, sizes that were never seen are the rule. These are 108 up to 4096, and less than a sixth of one is padding. Where
    tiles take 16 rows at a time whatever they hold, they are filled, and 95 sizes are left.
    """
    if count <= 16:
        return count
    step = 4 if count <= 64 else 8 if count <= 128 else 16 if count <= 256 else 32 if count <= 512 else 64
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
    # NumPy, since a call costs a fraction of torch's; what has few bits it sorts without comparing
    ids_S = np.minimum(ids_TK.reshape(-1).numpy(), num_experts)
    slot_S = ids_S.astype(np.min_scalar_type(num_experts)).argsort(kind="stable")
    rows_E = np.bincount(ids_S, minlength=num_experts)[:num_experts]
    experts, counts = [], []
    for expert, count in enumerate(rows_E.tolist()):
        while count:
            experts.append(expert)
            counts.append(count if most_rows is None else min(count, most_rows))
            count -= counts[-1]
    sizes = [padded(count) for count in counts] if pad else counts
    slots, rows, filled = len(slot_S), sum(sizes), sum(counts)
    slot_P = slot_S = slot_S[:filled]  # empty slots are last
    row_S = np.arange(filled)
    if rows > filled:
        row_S += np.repeat(np.cumsum(np.subtract([0, *sizes[:-1]], [0, *counts[:-1]])), counts)
        slot_P = np.full(rows, slots)
        slot_P[row_S] = slot_S
        rows_E = np.bincount(experts, sizes, num_experts)
    row_TK = np.empty(ids_TK.shape, np.int64)
    row_TK.fill(rows)  # `np.full` takes longer
    row_TK.reshape(-1)[slot_S] = row_S
    few = 0 < filled <= rows_in_one_call * num_experts
    ends_E = torch.from_numpy(rows_E.cumsum(dtype=np.int32)) if few else None
    return Groups(experts, sizes, filled, torch.from_numpy(slot_P), torch.from_numpy(row_TK), ends_E)
