# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Numbers that were measured, and on which the speed of experts on a CPU depends; what is computed does not.

Measured on an Intel Xeon with AMX, whose bf16 products go through tiles of 16 rows, and on an AMD EPYC (Zen 4), which has none.
"""

from __future__ import annotations

from typing import NamedTuple

import torch

_BF16, _FP16, _FP32 = torch.bfloat16, torch.float16, torch.float32


class Tuning(NamedTuple):
    """What is faster on a CPU.

    Attributes:
        padded_to: rows; groups of more than 16 in bf16 or fp16 are padded to a multiple of it at least.
        rows_in_one_call: by precision, at inference and where a backward follows: rows per expert, on average, up to which
            torch's product of all groups in one call is faster than a call for each.
        swapped: by precision, the rows of groups for which what is between the products is stored column by column at inference
            (see `ExpertLayer.between`).
        vectors_by_mm: precisions in which `torch.mm` (oneDNN) is faster than `torch.mv` for a single row.
        transposed_copy: rows per group, up to which gradients of weights in bf16 or fp16 are faster with a transposed copy of
            the left factor.
        cached_values: of a block of rows in pointwise work, so that several such blocks stay in a cache.
    """

    padded_to: int
    rows_in_one_call: dict[torch.dtype, tuple[int, int]]
    swapped: dict[torch.dtype, range]
    vectors_by_mm: frozenset[torch.dtype]
    transposed_copy: int
    cached_values: int


WITH_TILES = Tuning(
    padded_to=16,
    rows_in_one_call={_BF16: (24, 16), _FP16: (24, 16), _FP32: (16, 16)},
    swapped={_BF16: range(1, 513), _FP32: range(16, 129)},
    vectors_by_mm=frozenset(),
    transposed_copy=32,
    cached_values=1 << 16,
)
WITHOUT_TILES = Tuning(
    padded_to=4,
    rows_in_one_call=dict.fromkeys((_BF16, _FP16, _FP32), (64, 64)),
    swapped={_BF16: range(1, 513)},
    vectors_by_mm=frozenset({_BF16}),
    transposed_copy=0,
    cached_values=1 << 18,
)


def _of_this_cpu() -> Tuning:
    has = torch.cpu.get_capabilities()
    if has.get("amx_bf16"):
        return WITH_TILES
    # without instructions for bf16 torch's own product of a vector was not compared
    return WITHOUT_TILES if has.get("avx512_bf16") else WITHOUT_TILES._replace(vectors_by_mm=frozenset())


_TUNING = _of_this_cpu()


def tuning() -> Tuning:
    """What is faster on this CPU."""
    return _TUNING
