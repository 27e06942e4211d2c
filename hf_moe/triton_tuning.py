# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Which block sizes the Triton kernels are tried with, and how the choice is made and kept.

The rows of a tile follow from the shape (`rows_per_tile`), since the table of tiles depends on them. The other blocks, warps
and stages are measured by `triton.autotune`, once per shape and dtype, and kept in Triton's cache folder
(`TRITON_CACHE_DIR`). Under Triton's interpreter nothing is measured: it runs one small configuration.
"""

from __future__ import annotations

import inspect
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import triton
import triton.language as tl

# Triton decides at its import, by TRITON_INTERPRET, whether kernels are interpreted.
INTERPRETED = not isinstance(tl.sum, triton.JITFunction)
_INTERPRETED_BLOCKS = {"BLOCK_M": 64, "BLOCK_N": 64, "BLOCK_K": 32, "BLOCK_R": 32}
SMALLEST_TILE = 16  # rows: what matrix units take at least
_SHARED_BYTES_SM80 = 163 * 1024  # per program, where the device does not say


@dataclass(frozen=True)
class Search:
    """What is tried for one kernel.

    Attributes:
        blocks: the kernel's names of block sizes, each with the argument that it divides.
        operands: the tiles in shared memory at every stage, as pairs of block names.
        candidates: block sizes in the order of `blocks`, then warps and stages.
    """

    blocks: dict[str, str]
    operands: tuple[tuple[str, str], ...]
    candidates: tuple[tuple[int, ...], ...]

    @property
    def configs(self) -> list[triton.Config]:
        """The candidates as Triton takes them."""
        return [
            triton.Config(dict(zip(self.blocks, c, strict=False)), num_warps=c[-2], num_stages=c[-1]) for c in self.candidates
        ]

    def shared_bytes(self, config: triton.Config, arguments: dict[str, Any]) -> int:
        """About what the tiles in flight take."""
        sizes = {**arguments, **config.kwargs}
        item = max(t.element_size() for t in arguments.values() if isinstance(t, torch.Tensor) and t.is_floating_point())
        return config.num_stages * item * sum(sizes[a] * sizes[b] for a, b in self.operands)

    def fitting(self, configs: list[triton.Config], arguments: dict[str, Any], **more: Any) -> list[triton.Config]:
        """The configurations that fit into shared memory and waste least of their blocks; at least one."""
        values = {**arguments, **more}
        limit = _shared_bytes_of_device()
        fit = [c for c in configs if self.shared_bytes(c, values) <= limit]
        fit = fit or [min(configs, key=lambda c: self.shared_bytes(c, values))]

        def idle(config: triton.Config) -> int:
            """Blocks that are twice the problem or more."""
            return sum(
                config.kwargs[block] >= 2 * max(values[size], 16) for block, size in self.blocks.items() if size in values
            )

        least = min(idle(c) for c in fit)
        return [c for c in fit if idle(c) == least]


# Two accumulators, gate and up.
GATED = Search(
    {"BLOCK_N": "N", "BLOCK_K": "K"},
    (("BLOCK_M", "BLOCK_K"), ("BLOCK_N", "BLOCK_K"), ("BLOCK_N", "BLOCK_K")),
    ((32, 64, 4, 4), (64, 32, 4, 4), (64, 64, 4, 3), (64, 64, 8, 4), (128, 32, 8, 4), (128, 64, 8, 3), (128, 64, 8, 4)),
)
# One accumulator.
PLAIN = Search(
    {"BLOCK_N": "N", "BLOCK_K": "K"},
    (("BLOCK_M", "BLOCK_K"), ("BLOCK_N", "BLOCK_K")),
    ((32, 64, 4, 4), (64, 64, 4, 4), (64, 128, 4, 3), (128, 32, 4, 4), (128, 64, 4, 3), (128, 64, 8, 4), (256, 64, 8, 3)),
)
# One accumulator, and several tiles more of that size at the end: the wide ones would spill registers.
BACKWARD = Search(
    PLAIN.blocks,
    PLAIN.operands,
    ((32, 64, 4, 4), (64, 64, 4, 4), (64, 64, 8, 3), (64, 64, 8, 4), (64, 128, 8, 3), (128, 64, 8, 3)),
)
# One block of an expert's weight gradient, R tokens at a time. What is read by index needs two stages for each in flight.
WEIGHT = Search(
    {"BLOCK_M": "M", "BLOCK_N": "N", "BLOCK_R": "ROWS_PER_EXPERT"},
    (("BLOCK_R", "BLOCK_M"), ("BLOCK_R", "BLOCK_N")),
    (
        (64, 64, 16, 4, 6),
        (64, 64, 32, 4, 6),
        (64, 128, 32, 4, 6),
        (128, 64, 32, 4, 6),
        (128, 128, 32, 8, 6),
        (128, 128, 64, 8, 5),
        (128, 256, 64, 8, 5),
    ),
)


def runs_on(device: torch.device) -> bool:
    """Whether kernels run there: CUDA of compute capability 8.0 or later, and any device under the interpreter.

    Raises:
        RuntimeError: `TRITON_INTERPRET` was set too late.
    """
    if INTERPRETED:
        return True
    if not isinstance(_probe, triton.JITFunction):
        raise RuntimeError("`TRITON_INTERPRET` was set after Triton had been imported. Set it before Python starts.")
    return device.type == "cuda" and torch.version.hip is None and torch.cuda.get_device_capability(device) >= (8, 0)


def inlined(function: Callable[..., Any]) -> Callable[..., Any]:
    """`triton.jit` for what kernels call. Plain Python under the interpreter, which takes 0.4 ms to enter a jitted one."""
    return function if INTERPRETED else triton.jit(function)


@triton.jit
def _probe() -> None:
    """Interpreted or compiled, as all kernels that this package defines."""


def rows_per_tile(rows: int, num_experts: int) -> int:
    """Rows of a tile: what an expert gets on average, as the next power of two within 16 and 128.

    Args:
        rows: T·K.
        num_experts: E.
    """
    for size in (SMALLEST_TILE, 32, 64):
        if rows <= size * num_experts:
            return size
    return 128


def tuned(search: Search, key: list[str], reset_to_zero: list[str] | None = None) -> Callable[[Any], Any]:
    """`triton.autotune` over the candidates.

    Args:
        search: what is tried.
        key: arguments for which a choice holds (Triton adds the dtypes).
        reset_to_zero: tensors that a trial must not leave behind.
    """
    if INTERPRETED:
        blocks = {name: _INTERPRETED_BLOCKS[name] for name in search.blocks}
        return triton.autotune([triton.Config(blocks)], key, reset_to_zero=reset_to_zero)
    options: dict[str, Any] = {"prune_configs_by": {"early_config_prune": search.fitting}}
    if "cache_results" in inspect.signature(triton.autotune).parameters:
        options["cache_results"] = True
    return triton.autotune(search.configs, key, reset_to_zero=reset_to_zero, **options)


def _shared_bytes_of_device() -> int:
    if not torch.cuda.is_available():
        return _SHARED_BYTES_SM80
    properties = torch.cuda.get_device_properties(torch.cuda.current_device())
    return getattr(properties, "shared_memory_per_block_optin", _SHARED_BYTES_SM80)
