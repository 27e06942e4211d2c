# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Launches the kernels of `triton_kernels`: the experts forward and backward on plain tensors, without autograd.

No step asks the device for a value, and every size follows from T, K, E, D and F: CUDA graphs can capture all of it.

Letters: T tokens, K slots per token, S = T·K, E experts, D hidden, F expert width, N = 2F (gated) or F.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import triton
from torch import Tensor
from torch.nn import functional as F

from . import triton_kernels as kernels
from .triton_tuning import SMALLEST_TILE, rows_per_tile

_NARROWEST = 32  # block of columns in the tables of triton_tuning.py


@dataclass(frozen=True)
class Weights:
    """The experts' parameters, of any strides.

    Attributes:
        up_END: `[E, N, D]`, gate before up.
        down_EDF: `[E, D, F]`.
        up_bias_EN, down_bias_ED: `[E, N]`, `[E, D]`, contiguous; or `None`.
        act: name of the activation.
    """

    up_END: Tensor
    down_EDF: Tensor
    up_bias_EN: Tensor | None
    down_bias_ED: Tensor | None
    act: str

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.up_END, self.down_EDF, self.up_bias_EN, self.down_bias_ED

    @property
    def gated(self) -> bool:
        return self.up_END.shape[1] != self.down_EDF.shape[2]


@dataclass(frozen=True)
class Plan:
    """Which rows belong to which expert, on the device.

    Attributes:
        experts_S: `[S]` expert of every slot, E for empty ones.
        slots_S: `[S]` int32, the slots sorted by expert.
        starts_E1: `[E + 1]` int32, first row of every expert; the last is the number of rows.
        tile_experts, tile_rows: `[tiles]` int32, what `plan_tiles_kernel` fills.
    """

    experts_S: Tensor
    slots_S: Tensor
    starts_E1: Tensor
    tile_experts: Tensor
    tile_rows: Tensor

    @classmethod
    def empty(cls, rows: int, num_experts: int, device: torch.device) -> Plan:
        """A plan to be filled. The tables of tiles have room for the smallest tiles: one formula for every S."""
        dtype = torch.int16 if num_experts < 2**15 else torch.int32  # a radix sort takes time by the bytes of its keys
        slots_S, starts_E1, *tiles = (
            torch.empty(size, dtype=torch.int32, device=device)
            for size in (rows, num_experts + 1, *[rows // SMALLEST_TILE + num_experts] * 2)
        )
        return cls(torch.empty(rows, dtype=dtype, device=device), slots_S, starts_E1, *tiles)

    @property
    def tensors(self) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
        return self.experts_S, self.slots_S, self.starts_E1, self.tile_experts, self.tile_rows

    @property
    def num_experts(self) -> int:
        return self.starts_E1.shape[0] - 1

    @property
    def block_m(self) -> int:
        return rows_per_tile(self.slots_S.shape[0], self.num_experts)

    @property
    def num_tiles(self) -> int:
        """The most tiles that S rows of E experts can make."""
        rows = self.slots_S.shape[0]
        return min(rows, rows // self.block_m + self.num_experts)


def plan(top_k_index: Tensor, num_experts: int) -> Plan:
    """Sort the slots by expert and cut them into tiles.

    Args:
        top_k_index: `[T, K]`; ids outside of 0..E-1 are empty slots.
        num_experts: E.
    """
    ids_S = top_k_index.reshape(-1)
    made = Plan.empty(ids_S.shape[0], num_experts, ids_S.device)
    empty_S = (ids_S < 0) | (ids_S >= num_experts)
    made.experts_S.copy_(ids_S.masked_fill(empty_S, num_experts))
    sorted_S, order_S = made.experts_S.sort(stable=True)
    made.slots_S.copy_(order_S)
    bounds_E1 = torch.arange(num_experts + 1, dtype=sorted_S.dtype, device=ids_S.device)
    torch.searchsorted(sorted_S, bounds_E1, out_int32=True, out=made.starts_E1)
    if made.num_tiles:
        kernels.plan_tiles_kernel[(num_experts + 1,)](
            made.starts_E1, made.tile_experts, made.tile_rows, num_experts, made.num_tiles,
            BLOCK_M=made.block_m, BLOCK_E=triton.next_power_of_2(num_experts),
        )  # fmt: skip
    return made


def forward(
    x_TD: Tensor, top_k_weights: Tensor, weights: Weights, made: Plan, dtype: torch.dtype, save: bool
) -> tuple[Tensor, Tensor]:
    """The experts' output `[T, D]` in the dtype of `x_TD`, and what the backward needs: `[S, N]` before the activation.

    Args:
        x_TD: `[T, D]`.
        top_k_weights: `[T, K]`.
        weights: of the experts.
        made: the plan.
        dtype: of the products.
        save: whether there will be a backward (else the second output is empty).
    """
    tokens, top_k = top_k_weights.shape
    hidden, width = weights.down_EDF.shape[1:]
    rows, up_END = tokens * top_k, weights.up_END
    x_TD = _rows(x_TD)
    if not x_TD.numel() or not rows:
        return x_TD.new_zeros(x_TD.shape), x_TD.new_empty((0, up_END.shape[1]) if save else (0, 0), dtype=dtype)
    pre_SN = x_TD.new_empty((rows, weights.up_END.shape[1]) if save else (0, 0), dtype=dtype)
    hidden_SF = x_TD.new_empty(rows, width, dtype=dtype)
    kernels.gather_up_kernel[_over_tiles(made, width)](
        x_TD, up_END, weights.up_bias_EN, made.slots_S, made.starts_E1, made.tile_experts, made.tile_rows, pre_SN, hidden_SF,
        made.num_tiles, made.num_experts, width, hidden, x_TD.stride(0), *up_END.stride(),
        TOP_K=top_k, GATED=weights.gated, HAS_BIAS=weights.up_bias_EN is not None, SAVE_PRE=save, ACT=weights.act,
        **_meta(made, dtype),
    )  # fmt: skip
    slots_SD = x_TD.new_empty(rows, hidden)
    _scatter(hidden_SF, weights.down_EDF, weights.down_bias_ED, top_k_weights.contiguous(), made, slots_SD)
    return _combine(slots_SD, made, tokens), pre_SN


@dataclass(frozen=True)
class Gradients:
    """Gradients by what they belong to; `None` where not asked for."""

    x_TD: Tensor | None
    top_k_weights: Tensor
    up_END: Tensor | None
    down_EDF: Tensor | None
    up_bias_EN: Tensor | None
    down_bias_ED: Tensor | None

    @property
    def tensors(self) -> tuple[Tensor | None, ...]:
        return self.x_TD, self.top_k_weights, self.up_END, self.down_EDF, self.up_bias_EN, self.down_bias_ED


def backward(
    dy_TD: Tensor, x_TD: Tensor, top_k_weights: Tensor, weights: Weights, made: Plan, pre_SN: Tensor, wanted: list[bool]
) -> Gradients:
    """Gradients of `forward`.

    Args:
        dy_TD: `[T, D]`.
        x_TD, top_k_weights, weights, made: as in `forward`.
        pre_SN: what `forward` saved.
        wanted: whether those of x, of the up and of the down projections are asked for.
    """
    x_TD, dy_TD, top_k_weights = _rows(x_TD), _rows(dy_TD), top_k_weights.contiguous()
    tokens, top_k = top_k_weights.shape
    want_x, want_up, want_down = wanted
    if not top_k_weights.numel():
        up, down, up_bias, down_bias = (None if t is None else torch.zeros_like(t) for t in weights.tensors)
        return Gradients(torch.zeros_like(x_TD), torch.zeros_like(top_k_weights), up, down, up_bias, down_bias)
    d_pre_SN, weighted_SF, d_weights_TK = _down_backward(dy_TD, top_k_weights, weights, made, pre_SN)
    d_down = d_up = d_down_bias = d_up_bias = d_x = None
    if want_down:
        d_down = _weight_gradient(dy_TD, weighted_SF, weights.down_EDF, made, top_k, gather_a=True)
        if weights.down_bias_ED is not None:
            d_down_bias = _bias_gradient(dy_TD, top_k_weights, weights.down_bias_ED, made, top_k)
    del weighted_SF
    if want_up:
        d_up = _weight_gradient(d_pre_SN, x_TD, weights.up_END, made, top_k, gather_a=False)
        if weights.up_bias_EN is not None:
            d_up_bias = _bias_gradient(d_pre_SN, None, weights.up_bias_EN, made, top_k)
    if want_x:
        slots_SD = x_TD.new_empty(tokens * top_k, x_TD.shape[1])
        _scatter(d_pre_SN, weights.up_END.transpose(1, 2), None, None, made, slots_SD)
        d_x = _combine(slots_SD, made, tokens)
    return Gradients(d_x, d_weights_TK, d_up, d_down, d_up_bias, d_down_bias)


def _down_backward(
    dy_TD: Tensor, top_k_weights: Tensor, weights: Weights, made: Plan, pre_SN: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradient before the activation `[S, N]`, weighted output of the activation `[S, F]`, gradient of the routing weights."""
    hidden, width = weights.down_EDF.shape[1:]
    rows = pre_SN.shape[0]
    d_pre_SN, weighted_SF = torch.empty_like(pre_SN), pre_SN.new_empty(rows, width)
    partial = pre_SN.new_zeros(triton.cdiv(width, _NARROWEST), rows, dtype=torch.float32)
    down_EFD = weights.down_EDF.transpose(1, 2)
    kernels.down_backward_kernel[_over_tiles(made, width)](
        dy_TD, down_EFD, top_k_weights, pre_SN,
        made.slots_S, made.starts_E1, made.tile_experts, made.tile_rows, d_pre_SN, weighted_SF, partial,
        made.num_tiles, made.num_experts, rows, width, hidden, dy_TD.stride(0), *down_EFD.stride(),
        TOP_K=top_k_weights.shape[1], GATED=weights.gated, ACT=weights.act,
        **_meta(made, pre_SN.dtype),
    )  # fmt: skip
    d_weights_S = partial.sum(dim=0)
    if weights.down_bias_ED is not None:
        d_weights_S += _dy_times_bias(dy_TD, weights.down_bias_ED, made)
    return d_pre_SN, weighted_SF, d_weights_S.view_as(top_k_weights).to(top_k_weights.dtype)


def _dy_times_bias(dy_TD: Tensor, bias_ED: Tensor, made: Plan) -> Tensor:
    """`[S]`: `dy[token] · bias[expert]`, 0 for empty slots; from the products with all biases, of which there are few."""
    products_TE = F.pad(dy_TD.float() @ bias_ED.float().t(), (0, 1))
    return products_TE.gather(1, made.experts_S.view(dy_TD.shape[0], -1).long()).flatten()


def _scatter(
    rows_SK: Tensor, weight_ENK: Tensor, bias_EN: Tensor | None, top_k_weights: Tensor | None, made: Plan, out_SN: Tensor
) -> None:
    """Rows through their experts' matrices, to their slots of `out_SN`."""
    size, depth = weight_ENK.shape[1:]
    kernels.scatter_down_kernel[_over_tiles(made, size)](
        rows_SK, weight_ENK, bias_EN, top_k_weights, made.slots_S, made.starts_E1, made.tile_experts, made.tile_rows, out_SN,
        made.num_tiles, made.num_experts, size, depth, *weight_ENK.stride(),
        HAS_BIAS=bias_EN is not None, HAS_WEIGHTS=top_k_weights is not None, **_meta(made, rows_SK.dtype),
    )  # fmt: skip


def _combine(slots_SD: Tensor, made: Plan, tokens: int) -> Tensor:
    """`[T, D]`: the sum of every token's slots, in fp32 and in the order of slots."""
    rows, hidden = slots_SD.shape
    out_TD = slots_SD.new_empty(tokens, hidden)
    block_t, block_d = 8, min(256, max(16, triton.next_power_of_2(hidden)))
    kernels.combine_kernel[(triton.cdiv(tokens, block_t), triton.cdiv(hidden, block_d))](
        slots_SD,
        made.experts_S,
        out_TD,
        tokens,
        made.num_experts,
        hidden,
        TOP_K=rows // tokens,
        BLOCK_T=block_t,
        BLOCK_D=block_d,
    )
    return out_TD


def _weight_gradient(a: Tensor, b: Tensor, weight_EMN: Tensor, made: Plan, top_k: int, gather_a: bool) -> Tensor:
    """`Σ_row aᵀ b` per expert, in dtype and strides of the weight."""
    out_EMN = torch.empty_like(weight_EMN)
    experts, m, n = weight_EMN.shape

    def grid(meta: dict[str, int]) -> tuple[int]:
        return (experts * triton.cdiv(m, meta["BLOCK_M"]) * triton.cdiv(n, meta["BLOCK_N"]),)

    common = _meta(made, (b if gather_a else a).dtype)
    del common["BLOCK_M"]
    kernels.weight_gradient_kernel[grid](
        a, b, made.slots_S, made.starts_E1, out_EMN, m, n, a.stride(0), b.stride(0), *out_EMN.stride(),
        TOP_K=top_k, GATHER_A=gather_a, ROWS_PER_EXPERT=made.block_m, **common,
    )  # fmt: skip
    return out_EMN


def _bias_gradient(a: Tensor, top_k_weights: Tensor | None, bias_EN: Tensor, made: Plan, top_k: int) -> Tensor:
    """Of rows `[S, N]`, or of tokens `[T, N]` with their routing weights."""
    out_EN = torch.empty_like(bias_EN)
    experts, n = bias_EN.shape
    weighted = top_k_weights is not None
    kernels.bias_gradient_kernel[(experts, triton.cdiv(n, 64))](
        a, top_k_weights, made.slots_S, made.starts_E1, out_EN, n, a.stride(0),
        TOP_K=top_k, GATHER=weighted, HAS_WEIGHTS=weighted, BLOCK_R=32, BLOCK_N=64,
    )  # fmt: skip
    return out_EN


def _over_tiles(made: Plan, columns: int):  # type: ignore[no-untyped-def]
    tiles = made.num_tiles
    return lambda meta: (tiles * triton.cdiv(columns, meta["BLOCK_N"]),)


def _meta(made: Plan, dtype: torch.dtype) -> dict[str, int | str]:
    """What all grouped GEMMs are compiled for. TF32 as torch's own products: `torch.backends.cuda.matmul.allow_tf32`."""
    tf32 = dtype == torch.float32 and torch.backends.cuda.matmul.fp32_precision == "tf32"  # allow_tf32 sets this as well
    experts_class = 1 << math.ceil(math.log2(max(made.num_experts, 1)))
    return {"PRECISION": "tf32" if tf32 else "ieee", "EXPERTS_CLASS": experts_class, "BLOCK_M": made.block_m}


def _rows(x: Tensor) -> Tensor:
    """As it is where elements of a row are neighbours in memory."""
    return x if x.stride(1) == 1 else x.contiguous()
