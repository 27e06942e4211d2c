# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
# mypy: allow-untyped-defs
"""The Triton kernels of the experts: grouped GEMMs that gather while loading and scatter while storing, and their backward.

Letters: T tokens, K slots per token, S = T·K slots, E experts, D hidden, F expert width. Slot `t·K + k` is the k-th choice of
token t. *Rows* are the slots sorted by expert; `slots_ptr[row]` is the slot, `starts_ptr[e]` the first row of expert e, and
`starts_ptr[E]` the number of rows. A *tile* is up to BLOCK_M rows of one expert; tables that `plan_tiles_kernel` fills on the
device say which, so that no shape depends on data. All accumulate in fp32 and take any size; sums are in a fixed order.

In the GEMMs N is the number of output columns and K the depth (TOP_K is the number of slots per token).
"""

from __future__ import annotations

import triton
import triton.language as tl

from .triton_functions import activation, activation_slope, dot, load_tile, rounded
from .triton_tuning import BACKWARD, GATED, PLAIN, WEIGHT, inlined, tuned

# kernels see globals only as constants
_GROUP = tl.constexpr(8)  # tiles that run side by side on the same columns of weights
_CHUNK = tl.constexpr(128)
_TILE_KEY = ["N", "K", "EXPERTS_CLASS", "BLOCK_M", "stride_wk"]
# no masks where blocks divide the sizes
_EVEN = {
    "EVEN_N": lambda args: args["N"] % args["BLOCK_N"] == 0,
    "EVEN_K": lambda args: args["K"] % args["BLOCK_K"] == 0,
}


@inlined
def _place(num_tiles, columns, BLOCK_N: tl.constexpr):
    """This program's tile and block of columns: groups of tiles take turns on the same columns, which stay in L2."""
    blocks = tl.cdiv(columns, BLOCK_N)
    program = tl.program_id(0)
    first = program // (_GROUP * blocks) * _GROUP
    size = tl.minimum(num_tiles - first, _GROUP)
    inside = program % (_GROUP * blocks)
    return first + inside % size, inside // size


@triton.jit
def plan_tiles_kernel(
    starts_ptr, tile_expert_ptr, tile_row_ptr, num_experts, num_tiles, BLOCK_M: tl.constexpr, BLOCK_E: tl.constexpr
):
    """Fill the table of tiles, `[num_tiles]` experts (E: none) and first rows: one program per expert, one for the rest."""
    expert = tl.program_id(0)
    e = tl.arange(0, BLOCK_E)
    inside = e < num_experts
    counts = tl.load(starts_ptr + e + 1, mask=inside, other=0) - tl.load(starts_ptr + e, mask=inside, other=0)
    tiles = (counts + BLOCK_M - 1) // BLOCK_M
    first = tl.sum(tl.where(e < expert, tiles, 0))
    mine = tl.sum(tl.where(e == expert, tiles, 0))
    if expert == num_experts:
        mine = num_tiles - first
    row = tl.load(starts_ptr + expert)
    for i in range(0, mine, _CHUNK):
        tile = i + tl.arange(0, _CHUNK)
        tl.store(tile_expert_ptr + first + tile, tl.zeros_like(tile) + expert, mask=tile < mine)
        tl.store(tile_row_ptr + first + tile, row + tile * BLOCK_M, mask=tile < mine)


@tuned(GATED, _TILE_KEY)
@triton.heuristics(_EVEN)
@triton.jit
def gather_up_kernel(
    x_ptr, w_ptr, bias_ptr, slots_ptr, starts_ptr, tile_expert_ptr, tile_row_ptr, pre_ptr, hidden_ptr,
    num_tiles, num_experts, N, K, stride_x, stride_we, stride_wn, stride_wk,
    TOP_K: tl.constexpr, GATED: tl.constexpr, HAS_BIAS: tl.constexpr, SAVE_PRE: tl.constexpr, ACT: tl.constexpr,
    PRECISION: tl.constexpr, EXPERTS_CLASS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """`hidden[row] = act(x[token] Wgᵀ + bg) · (x[token] Wuᵀ + bu)`, or `act(x[token] Wᵀ + b)`: `[S, F]` in the order of rows.

    `x` is read by token, never sorted. `pre`, `[S, 2F]` or `[S, F]`, gets what goes into the activation, for the backward.
    N = F, K = D. The weights are `[E, 2F or F, D]` of any strides; bias is `[E, 2F or F]`.
    """
    tile, block = _place(num_tiles, N, BLOCK_N)
    expert = tl.load(tile_expert_ptr + tile)
    if expert >= num_experts:
        return
    dtype: tl.constexpr = hidden_ptr.dtype.element_ty
    rows = tl.load(tile_row_ptr + tile) + tl.arange(0, BLOCK_M)
    real = rows < tl.load(starts_ptr + expert + 1)
    tokens = tl.load(slots_ptr + rows, mask=real, other=0) // TOP_K
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    x_ptrs = x_ptr + tokens.to(tl.int64)[:, None] * stride_x + k[None, :]
    w_ptrs = w_ptr + expert.to(tl.int64) * stride_we + n[None, :] * stride_wn + k[:, None] * stride_wk
    gate = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    up = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        deep = k0 + k < K
        x = rounded(load_tile(x_ptrs, real, deep, False, not EVEN_K), dtype)
        w = rounded(load_tile(w_ptrs, deep, n < N, not EVEN_K, not EVEN_N), dtype)
        gate = dot(x, w, gate, PRECISION)
        if GATED:
            w = rounded(load_tile(w_ptrs + N * stride_wn, deep, n < N, not EVEN_K, not EVEN_N), dtype)
            up = dot(x, w, up, PRECISION)
        x_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * stride_wk
    WIDTH: tl.constexpr = 2 if GATED else 1
    if HAS_BIAS:
        bias_ptrs = bias_ptr + expert.to(tl.int64) * (WIDTH * N) + n
        gate += tl.load(bias_ptrs, mask=n < N, other=0.0).to(tl.float32)[None, :]
        if GATED:
            up += tl.load(bias_ptrs + N, mask=n < N, other=0.0).to(tl.float32)[None, :]
    inside = real[:, None] & (n < N)[None, :]
    if SAVE_PRE:
        pre_ptrs = pre_ptr + rows.to(tl.int64)[:, None] * (WIDTH * N) + n[None, :]
        tl.store(pre_ptrs, rounded(gate, dtype), mask=inside)
        if GATED:
            tl.store(pre_ptrs + N, rounded(up, dtype), mask=inside)
    hidden = activation(gate, ACT)
    if GATED:
        hidden *= up
    tl.store(hidden_ptr + rows.to(tl.int64)[:, None] * N + n[None, :], rounded(hidden, dtype), mask=inside)


@tuned(PLAIN, _TILE_KEY)
@triton.heuristics(_EVEN)
@triton.jit
def scatter_down_kernel(
    a_ptr, w_ptr, bias_ptr, weights_ptr, slots_ptr, starts_ptr, tile_expert_ptr, tile_row_ptr, out_ptr,
    num_tiles, num_experts, N, K, stride_we, stride_wn, stride_wk,
    HAS_BIAS: tl.constexpr, HAS_WEIGHTS: tl.constexpr, PRECISION: tl.constexpr, EXPERTS_CLASS: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """`out[slot] = weights[slot] · (a[row] Wᵀ + b)`: rows `[S, K]` in, stored at their slots of `[S, N]`.

    Slots that hold no expert are not written. The weights of the experts are `[E, N, K]` of any strides; bias is `[E, N]`.
    Without bias and weights it is also the backward of `gather_up_kernel` for its input.
    """
    tile, block = _place(num_tiles, N, BLOCK_N)
    expert = tl.load(tile_expert_ptr + tile)
    if expert >= num_experts:
        return
    dtype: tl.constexpr = a_ptr.dtype.element_ty
    rows = tl.load(tile_row_ptr + tile) + tl.arange(0, BLOCK_M)
    real = rows < tl.load(starts_ptr + expert + 1)
    slots = tl.load(slots_ptr + rows, mask=real, other=0)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    a_ptrs = a_ptr + tl.where(real, rows, 0).to(tl.int64)[:, None] * K + k[None, :]
    w_ptrs = w_ptr + expert.to(tl.int64) * stride_we + n[None, :] * stride_wn + k[:, None] * stride_wk
    out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        deep = k0 + k < K
        a = load_tile(a_ptrs, real, deep, False, not EVEN_K)
        w = rounded(load_tile(w_ptrs, deep, n < N, not EVEN_K, not EVEN_N), dtype)
        out = dot(a, w, out, PRECISION)
        a_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * stride_wk
    if HAS_BIAS:
        out += tl.load(bias_ptr + expert.to(tl.int64) * N + n, mask=n < N, other=0.0).to(tl.float32)[None, :]
    if HAS_WEIGHTS:
        out *= tl.load(weights_ptr + slots, mask=real, other=0.0).to(tl.float32)[:, None]
    out_ptrs = out_ptr + slots.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(out_ptrs, rounded(out, out_ptr.dtype.element_ty), mask=real[:, None] & (n < N)[None, :])


@triton.jit
def combine_kernel(
    rows_ptr, experts_ptr, out_ptr, num_tokens, num_experts, D,
    TOP_K: tl.constexpr, BLOCK_T: tl.constexpr, BLOCK_D: tl.constexpr,
):  # fmt: skip
    """`out[t] = Σ_k rows[t·K + k]` over the slots that hold an expert: `[S, D]` in, `[T, D]` out."""
    t = tl.program_id(0) * BLOCK_T + tl.arange(0, BLOCK_T)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = (t < num_tokens)[:, None] & (d < D)[None, :]
    total = tl.zeros((BLOCK_T, BLOCK_D), tl.float32)
    for k in range(TOP_K):
        slot = t.to(tl.int64) * TOP_K + k
        expert = tl.load(experts_ptr + slot, mask=t < num_tokens, other=0)
        full = inside & (expert < num_experts)[:, None]
        total += tl.load(rows_ptr + slot[:, None] * D + d[None, :], mask=full, other=0.0).to(tl.float32)
    tl.store(out_ptr + t.to(tl.int64)[:, None] * D + d[None, :], rounded(total, out_ptr.dtype.element_ty), mask=inside)


@tuned(BACKWARD, _TILE_KEY, reset_to_zero=["partial_ptr"])
@triton.heuristics(_EVEN)
@triton.jit
def down_backward_kernel(
    dy_ptr, w_ptr, weights_ptr, pre_ptr, slots_ptr, starts_ptr, tile_expert_ptr, tile_row_ptr,
    d_pre_ptr, weighted_ptr, partial_ptr,
    num_tiles, num_experts, num_slots, N, K, stride_dy, stride_we, stride_wn, stride_wk,
    TOP_K: tl.constexpr, GATED: tl.constexpr, ACT: tl.constexpr,
    PRECISION: tl.constexpr, EXPERTS_CLASS: tl.constexpr, BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr, BLOCK_K: tl.constexpr, EVEN_N: tl.constexpr, EVEN_K: tl.constexpr,
):  # fmt: skip
    """Backward of weighting, down projection and activation in one: N = F, K = D.

    With `g[row] = dy[token] Wd` (`[S, F]`, never stored) and `h` the recomputed output of the activation:

    - `d_pre`, `[S, 2F or F]`: the gradient of what went into the activation;
    - `weighted = weight · h`, `[S, F]`: what the gradient of Wd is made of;
    - `partial[block, slot] = Σ_n g · h` over this block of columns; summed over blocks (and with `dy[token] · bias`) this
      is the gradient of the routing weight, without the experts' outputs.

    The experts' weights are Wd as `[E, F, D]` (strides n, k).
    """
    tile, block = _place(num_tiles, N, BLOCK_N)
    expert = tl.load(tile_expert_ptr + tile)
    if expert >= num_experts:
        return
    dtype: tl.constexpr = pre_ptr.dtype.element_ty
    rows = tl.load(tile_row_ptr + tile) + tl.arange(0, BLOCK_M)
    real = rows < tl.load(starts_ptr + expert + 1)
    slots = tl.load(slots_ptr + rows, mask=real, other=0)
    n = block * BLOCK_N + tl.arange(0, BLOCK_N)
    k = tl.arange(0, BLOCK_K)
    dy_ptrs = dy_ptr + (slots // TOP_K).to(tl.int64)[:, None] * stride_dy + k[None, :]
    w_ptrs = w_ptr + expert.to(tl.int64) * stride_we + n[None, :] * stride_wn + k[:, None] * stride_wk
    g = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for k0 in range(0, K, BLOCK_K):
        deep = k0 + k < K
        dy = rounded(load_tile(dy_ptrs, real, deep, False, not EVEN_K), dtype)
        w = rounded(load_tile(w_ptrs, deep, n < N, not EVEN_K, not EVEN_N), dtype)
        g = dot(dy, w, g, PRECISION)
        dy_ptrs += BLOCK_K
        w_ptrs += BLOCK_K * stride_wk
    WIDTH: tl.constexpr = 2 if GATED else 1
    inside = real[:, None] & (n < N)[None, :]
    offsets = rows.to(tl.int64)[:, None] * (WIDTH * N) + n[None, :]
    gate = tl.load(pre_ptr + offsets, mask=inside, other=0.0).to(tl.float32)
    weight = tl.load(weights_ptr + slots, mask=real, other=0.0).to(tl.float32)[:, None]
    h = activation(gate, ACT)
    d_gate = g * weight * activation_slope(gate, ACT)
    if GATED:
        up = tl.load(pre_ptr + offsets + N, mask=inside, other=0.0).to(tl.float32)
        tl.store(d_pre_ptr + offsets + N, rounded(g * weight * h, dtype), mask=inside)
        d_gate *= up
        h *= up
    tl.store(d_pre_ptr + offsets, rounded(d_gate, dtype), mask=inside)
    weighted_ptrs = weighted_ptr + rows.to(tl.int64)[:, None] * N + n[None, :]
    tl.store(weighted_ptrs, rounded(weight * h, dtype), mask=inside)
    partial = tl.sum(tl.where(inside, g * h, 0.0), axis=1)
    tl.store(partial_ptr + block.to(tl.int64) * num_slots + slots, partial, mask=real)


@tuned(WEIGHT, ["M", "N", "EXPERTS_CLASS", "ROWS_PER_EXPERT", "GATHER_A", "stride_wn"])
@triton.jit
def weight_gradient_kernel(
    a_ptr, b_ptr, slots_ptr, starts_ptr, out_ptr, M, N, stride_a, stride_b, stride_we, stride_wm, stride_wn,
    TOP_K: tl.constexpr, GATHER_A: tl.constexpr, PRECISION: tl.constexpr,
    EXPERTS_CLASS: tl.constexpr, ROWS_PER_EXPERT: tl.constexpr,
    BLOCK_M: tl.constexpr, BLOCK_N: tl.constexpr, BLOCK_R: tl.constexpr,
):  # fmt: skip
    """`out[e] = Σ_row a[row]ᵀ b[row]` over the rows of expert e: `[E, M, N]`, zeros for an expert without rows.

    One of the two is `[S, ·]` in the order of rows; the other, a if `GATHER_A`, is `[T, ·]` and read by token.
    """
    blocks_n = tl.cdiv(N, BLOCK_N)
    blocks = tl.cdiv(M, BLOCK_M) * blocks_n
    expert = tl.program_id(0) // blocks
    block = tl.program_id(0) % blocks
    dtype: tl.constexpr = b_ptr.dtype.element_ty if GATHER_A else a_ptr.dtype.element_ty
    m = block // blocks_n * BLOCK_M + tl.arange(0, BLOCK_M)
    n = block % blocks_n * BLOCK_N + tl.arange(0, BLOCK_N)
    start = tl.load(starts_ptr + expert)
    end = tl.load(starts_ptr + expert + 1)
    out = tl.zeros((BLOCK_M, BLOCK_N), tl.float32)
    for row in range(start, end, BLOCK_R):
        rows = row + tl.arange(0, BLOCK_R)
        real = rows < end
        tokens = (tl.load(slots_ptr + rows, mask=real, other=0) // TOP_K).to(tl.int64)
        a_rows = tokens if GATHER_A else rows.to(tl.int64)
        b_rows = rows.to(tl.int64) if GATHER_A else tokens
        a = rounded(load_tile(a_ptr + a_rows[:, None] * stride_a + m[None, :], real, m < M, True, True), dtype)
        b = rounded(load_tile(b_ptr + b_rows[:, None] * stride_b + n[None, :], real, n < N, True, True), dtype)
        out = dot(tl.trans(a), b, out, PRECISION)
    out_ptrs = out_ptr + expert.to(tl.int64) * stride_we + m[:, None] * stride_wm + n[None, :] * stride_wn
    tl.store(out_ptrs, rounded(out, out_ptr.dtype.element_ty), mask=(m < M)[:, None] & (n < N)[None, :])


@triton.jit
def bias_gradient_kernel(
    a_ptr, weights_ptr, slots_ptr, starts_ptr, out_ptr, N, stride_a,
    TOP_K: tl.constexpr, GATHER: tl.constexpr, HAS_WEIGHTS: tl.constexpr, BLOCK_R: tl.constexpr, BLOCK_N: tl.constexpr,
):  # fmt: skip
    """`out[e] = Σ_row weights[slot] · a[row or token]` over the rows of expert e: `[E, N]`."""
    expert = tl.program_id(0)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    end = tl.load(starts_ptr + expert + 1)
    out = tl.zeros((BLOCK_N,), tl.float32)
    for row in range(tl.load(starts_ptr + expert), end, BLOCK_R):
        rows = row + tl.arange(0, BLOCK_R)
        real = rows < end
        slots = tl.load(slots_ptr + rows, mask=real, other=0)
        a_rows = slots // TOP_K if GATHER else rows
        a = load_tile(a_ptr + a_rows.to(tl.int64)[:, None] * stride_a + n[None, :], real, n < N, True, True).to(tl.float32)
        if HAS_WEIGHTS:
            a *= tl.load(weights_ptr + slots, mask=real, other=0.0).to(tl.float32)[:, None]
        out += tl.sum(a, axis=0)
    tl.store(out_ptr + expert.to(tl.int64) * N + n, rounded(out, out_ptr.dtype.element_ty), mask=n < N)
