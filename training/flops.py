# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""FLOPs of training a Mixture-of-Experts: of the parameters that a token passes, not of all experts."""

from __future__ import annotations

import time
from typing import Any

import torch
from transformers import TrainerState

from hf_moe.parameter_counts import Shape, count_parameters

from .routing_watch import RoutingWatch

# Dense bf16 FLOP/s that the makers state, by a part of the name that CUDA gives.
PEAK_FLOPS = {
    "GB200": 2.5e15, "B200": 2.25e15, "H200": 989e12, "H100 NVL": 835e12, "H100 PCIe": 756e12, "H100": 989e12, "A100": 312e12,
    "L40S": 362e12, "L4": 121e12, "A10G": 70e12, "RTX 4090": 165e12, "RTX 3090": 71e12, "MI300X": 1307e12,
}  # fmt: skip


def active_parameters(watch: RoutingWatch) -> tuple[int, int]:
    """Parameters without embeddings that one token passes, and all of them, of a watched model."""
    model: Any = watch.model
    counts = count_parameters([Shape(n, tuple(p.shape)) for n, p in model.named_parameters()], model.config.to_dict())
    total = model.num_parameters(exclude_embeddings=True)
    return total - counts.total + (counts.active or counts.total), total


class FlopsMeter:
    """Corrects `TrainerState.total_flos`, which counts every parameter, and measures FLOP/s.

    Args:
        active: parameters that a token passes.
        total: what `Trainer` counts for it.
        peak: FLOP/s of one device, or `None` if unknown.
        seen: of `total_flos`, what is corrected already.
    """

    def __init__(self, active: int, total: int, peak: float | None, seen: float = 0.0) -> None:
        self._share, self._peak, self._seen = active / max(1, total), peak, seen
        self._of_window, self._seconds, self._started = 0.0, 0.0, 0.0

    def start_step(self) -> None:
        """An optimizer step begins."""
        self._started = time.perf_counter()

    def end_step(self) -> None:
        """It has ended; what comes now (evaluation, saving) is not training."""
        self._seconds += time.perf_counter() - self._started

    def correct(self, state: TrainerState) -> None:
        """Scale what `Trainer` has added to `total_flos` since the last time."""
        added = max(0.0, state.total_flos - self._seen) * self._share
        state.total_flos = self._seen = min(state.total_flos, self._seen) + added
        self._of_window += added

    def metrics(self, devices: int) -> dict[str, float]:
        """`tflops_per_device`, and `mfu` if the peak is known, since the last call."""
        if not self._seconds:
            return {}
        rate = self._of_window / self._seconds / devices
        self._of_window, self._seconds = 0.0, 0.0
        return {"tflops_per_device": rate / 1e12} | ({"mfu": rate / self._peak} if self._peak else {})


def peak_flops() -> float | None:
    """Peak dense bf16 FLOP/s of the current CUDA device by its name, or `None`."""
    if not torch.cuda.is_available():
        return None
    name = torch.cuda.get_device_name()
    return next((flops for part, flops in PEAK_FLOPS.items() if part in name), None)
