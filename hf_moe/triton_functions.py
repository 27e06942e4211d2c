# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
# mypy: allow-untyped-defs
"""What the Triton kernels call: activations, loads with masks, products, and roundings."""

from __future__ import annotations

import triton.language as tl

from .triton_tuning import INTERPRETED, inlined

_INTERPRETED = tl.constexpr(INTERPRETED)  # kernels see globals only as constants


@inlined
def activation(x, ACT: tl.constexpr):
    """`act(x)` in fp32; the names are those of `ACTIVATIONS` in triton_experts.py."""
    if ACT == "silu":
        y = x * tl.sigmoid(x)
    elif ACT == "gelu":
        y = 0.5 * x * (1.0 + tl.erf(x * 0.7071067811865476))
    elif ACT == "gelu_tanh":
        y = x * tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))  # (1 + tanh z) / 2 = sigmoid(2 z)
    elif ACT == "quick_gelu":
        y = x * tl.sigmoid(1.702 * x)
    elif ACT == "relu":
        y = tl.where(x > 0, x, 0.0)
    elif ACT == "relu2":
        y = tl.where(x > 0, x * x, 0.0)
    else:
        tl.static_assert(ACT == "linear", "unknown activation")
        y = x
    return y


@inlined
def activation_slope(x, ACT: tl.constexpr):
    """`act'(x)` in fp32."""
    if ACT == "silu":
        s = tl.sigmoid(x)
        y = s * (1.0 + x * (1.0 - s))
    elif ACT == "gelu":
        y = 0.5 * (1.0 + tl.erf(x * 0.7071067811865476)) + x * 0.3989422804014327 * tl.exp(-0.5 * x * x)
    elif ACT == "gelu_tanh":
        s = tl.sigmoid(1.5957691216057308 * x * (1.0 + 0.044715 * x * x))
        y = s + x * s * (1.0 - s) * 1.5957691216057308 * (1.0 + 3.0 * 0.044715 * x * x)
    elif ACT == "quick_gelu":
        s = tl.sigmoid(1.702 * x)
        y = s * (1.0 + 1.702 * x * (1.0 - s))
    elif ACT == "relu":
        y = tl.where(x > 0, 1.0, 0.0)
    elif ACT == "relu2":
        y = tl.where(x > 0, 2.0 * x, 0.0)
    else:
        tl.static_assert(ACT == "linear", "unknown activation")
        y = tl.full(x.shape, 1.0, tl.float32)
    return y


@inlined
def load_tile(ptrs, first, second, CHECK_FIRST: tl.constexpr, CHECK_SECOND: tl.constexpr):
    """A tile with zeros outside; `first` and `second` say per row and per column what is inside, and are read if checked."""
    if CHECK_FIRST and CHECK_SECOND:
        return tl.load(ptrs, mask=first[:, None] & second[None, :], other=0.0)
    elif CHECK_FIRST:
        return tl.load(ptrs, mask=first[:, None], other=0.0)
    elif CHECK_SECOND:
        return tl.load(ptrs, mask=second[None, :], other=0.0)
    else:
        return tl.load(ptrs)


@inlined
def rounded(x, dtype: tl.constexpr):
    """`x.to(dtype)`, to nearest even. Triton's interpreter would cut fp32 to bf16, so there the bits are rounded here."""
    if _INTERPRETED and dtype == tl.bfloat16 and x.dtype == tl.float32:
        bits = x.to(tl.uint32, bitcast=True)
        bits = (bits + 0x7FFF + ((bits >> 16) & 1)) >> 16
        y = bits.to(tl.uint16).to(tl.bfloat16, bitcast=True)
    else:
        y = x.to(dtype)
    return y


@inlined
def dot(a, b, total, PRECISION: tl.constexpr):
    """`total + a b`. Triton's interpreter multiplies the bits of bf16 as integers, so there it gets fp32."""
    if _INTERPRETED:
        a, b = a.to(tl.float32), b.to(tl.float32)
    return tl.dot(a, b, total, input_precision=PRECISION)
