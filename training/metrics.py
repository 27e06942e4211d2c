# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Sums of routing statistics over many forwards and ranks, and the numbers to log that follow from them."""

from __future__ import annotations

from collections.abc import Collection

import torch
import torch.distributed as dist
from torch import Tensor

from hf_moe.record import LayerRecord, RoutingRecord, layer_losses, mean_by_name


class RoutingWindow:
    """The sums of every MoE layer over all forwards since the last `clear`.

    They lie in one vector on the model's device, so that memory does not grow with the number of forwards, adding never
    waits for the device, and ranks exchange one message. The vector is fp64 (fp32 on MPS, which has no fp64): counts stay
    exact.

    Args:
        names: which of `LayerRecord.sums` to keep (default: all).
    """

    def __init__(self, names: Collection[str] | None = None) -> None:
        self._names = names
        self._flat: Tensor | None = None
        self._layout: list[LayerRecord] = []  # shapes only: its sums are on the meta device

    @torch.no_grad()
    def add(self, record: RoutingRecord) -> None:
        """Add one forward.

        Raises:
            ValueError: the forward ran other MoE layers than the first one of the window.
        """
        layers = [self._part(layer) for layer in record.layers if layer.sums]
        if not layers:
            return
        values = [value for layer in layers for value in layer.sums.values()]
        device = values[0].device
        wide = torch.float32 if device.type == "mps" else torch.float64
        flat = torch.cat([value.detach().reshape(-1).to(device, non_blocking=True) for value in values]).to(wide)
        if self._flat is None:
            self._flat = flat
            self._layout = [LayerRecord(x.num_experts, x.top_k, _shapes(x.sums)) for x in layers]
        elif self._flat.numel() != flat.numel():
            raise ValueError(
                f"A forward ran {len(layers)} MoE layers, but the forwards before it ran {len(self._layout)}. Statistics can "
                "only be added up if every forward runs the same layers: set the config's `layerdrop` to 0."
            )
        else:
            self._flat += flat.to(self._flat.device)

    def total(self, device: torch.device | str | None = None) -> list[LayerRecord]:
        """One record per MoE layer with the sums over the window and over all ranks; empty before the first forward.

        All ranks have to call it together.

        Args:
            device: where to put the sums (default: where they are; elsewhere it is one copy, which waits).
        """
        if self._flat is None:
            return []
        flat = self._flat.clone()
        if dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
            dist.all_reduce(flat)
        shapes = [shape for layer in self._layout for shape in layer.sums.values()]
        parts = iter(flat.to(device).split([shape.numel() for shape in shapes]))
        return [
            LayerRecord(x.num_experts, x.top_k, {name: next(parts).view(s.shape) for name, s in x.sums.items()})
            for x in self._layout
        ]

    def clear(self) -> None:
        """Start again from nothing."""
        self._flat, self._layout = None, []

    def _part(self, layer: LayerRecord) -> LayerRecord:
        if self._names is None:
            return layer
        return LayerRecord(layer.num_experts, layer.top_k, {name: layer.sums[name] for name in self._names})


def _shapes(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: value.detach().to("meta") for name, value in sums.items()}


def load_metrics(layers: list[LayerRecord]) -> dict[str, float]:
    """What to log about the load of the experts: means over layers, except `dead_experts`, which is their sum.

    Args:
        layers: sums of each layer, e.g. of `RoutingWindow.total("cpu")`.

    Returns:
        `load_max_over_mean` and `load_cv` (population standard deviation / mean) of the assignments executed;
        `importance_cv` of the summed gates; `router_entropy` per token in nats; `drop_rate`, the share of the wanted
        assignments that was not executed; `dead_experts`, which executed nothing; and the losses of `layer_losses`
        without coefficients, of the sums given: over several steps that is not the mean of the steps' losses. What a
        router does not define (all but the load for `hash`) is absent.
    """
    per_layer = []
    for layer in layers:
        executed_E, counts_E = layer.sums["executed"], layer.sums["counts"]
        numbers = {
            "load_max_over_mean": executed_E.max() / executed_E.mean().clamp(min=1e-20),
            "load_cv": _cv(executed_E),
            "drop_rate": 1 - executed_E.sum() / counts_E.sum().clamp(min=1e-20),
        }
        if "importance" in layer.sums:
            numbers["importance_cv"] = _cv(layer.sums["importance"])
        if "entropy" in layer.sums:
            numbers["router_entropy"] = layer.sums["entropy"] / layer.sums["tokens"].clamp(min=1)
        per_layer.append(numbers | layer_losses(layer.sums, layer.top_k))
    metrics = {name: float(value) for name, value in mean_by_name(per_layer).items()}
    return {**metrics, "dead_experts": sum(int((layer.sums["executed"] == 0).sum()) for layer in layers)}


def _cv(values_E: Tensor) -> Tensor:
    return values_E.std(correction=0) / values_E.mean().clamp(min=1e-20)
