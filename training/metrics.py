# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Sums of routing statistics over many forwards and ranks, and the numbers to log that follow from them."""

from __future__ import annotations

import base64
import math
from collections.abc import Collection
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from hf_moe.losses import cv_squared, load_loss
from hf_moe.record import LayerRecord, RoutingRecord, layer_losses


@dataclass
class WindowTotal:
    """What a `RoutingWindow` holds, summed over ranks.

    Attributes:
        layers: per MoE layer the sums of `LayerRecord.sums`.
        terms: router losses by name, `[L]`: the sum of `RoutingRecord.terms`.
        lm_loss: the sum of `RoutingRecord.lm_loss`.
        forwards: `[]`, how many forwards were added, and
        lm_forwards: `[]`, how many of them knew their LM loss.
        adds_up: as in `RoutingRecord`.
    """

    layers: list[LayerRecord] = field(default_factory=list)
    terms: dict[str, Tensor] = field(default_factory=dict)
    lm_loss: Tensor | float = 0.0
    forwards: Tensor | float = 0.0
    lm_forwards: Tensor | float = 0.0
    adds_up: bool = False


class RoutingWindow:
    """The sums of every MoE layer over all forwards since the last `clear`.

    They lie in one vector on the model's device, so that memory does not grow with the number of forwards, adding never
    waits for the device, and ranks exchange one message. The vector is fp64 (fp32 on MPS, which has no fp64): counts stay
    exact.

    Args:
        names: which of `LayerRecord.sums` to keep, without the losses (default: all, with the losses).
    """

    def __init__(self, names: Collection[str] | None = None) -> None:
        self._names = names
        self.clear()

    def clear(self) -> None:
        """Start again from nothing."""
        self._flat: Tensor | None = None
        self._layout: list[dict[str, Any]] = []  # per layer: num_experts, top_k, and the shapes of its sums by name
        self._terms: dict[str, int] = {}  # the length of each
        self._adds_up = False

    @property
    def is_empty(self) -> bool:
        """Whether no forward was added on this rank."""
        return self._flat is None

    @torch.no_grad()
    def add(self, record: RoutingRecord) -> None:
        """Add one forward.

        Raises:
            ValueError: the forward ran other MoE layers than the first one of the window.
        """
        layers = [(layer, self._kept(layer)) for layer in record.layers if layer.sums]
        if not layers:
            return
        terms = record.terms if self._names is None else {}
        device = next(iter(layers[0][1].values())).device
        parts = [value for _, sums in layers for value in sums.values()] + list(terms.values())
        one = parts[0].new_ones(1)
        parts += [0 * one, one, 0 * one] if record.lm_loss is None else [record.lm_loss, one, one]
        flat = torch.cat([part.detach().reshape(-1).to(device, non_blocking=True) for part in parts])
        flat = flat.to(_wide(device))
        if self._flat is None:
            self._flat = flat
            self._layout = [_layout(layer, sums) for layer, sums in layers]
            self._terms = {name: term_L.numel() for name, term_L in terms.items()}
        elif self._flat.numel() != flat.numel():
            raise ValueError(
                f"A forward ran {len(layers)} MoE layers, but the forwards before it ran {len(self._layout)}. Statistics can "
                "only be added up if every forward runs the same layers: set the config's `layerdrop` to 0."
            )
        else:
            self._flat += flat.to(self._flat.device)
        self._adds_up = record.adds_up

    def total(self, device: torch.device | str | None = None, replicas: int = 1) -> WindowTotal:
        """The sums over the window and over all ranks. All ranks have to call it together.

        Args:
            device: where to put the sums (default: where they are; elsewhere it is one copy, which waits).
            replicas: how many ranks see the same tokens (tensor parallelism).
        """
        if self._flat is None:
            return WindowTotal()
        flat = self._flat.clone()
        if _world_size() > 1:
            dist.all_reduce(flat)
        parts = iter((flat / replicas).to(device).split(self._sizes()))
        layers = [
            LayerRecord(
                layer["num_experts"],
                layer["top_k"],
                {name: next(parts).view(shape) for name, shape in layer["shapes"].items()},
            )
            for layer in self._layout
        ]
        terms = {name: next(parts) for name in self._terms}
        lm_loss, forwards, lm_forwards = next(parts)
        return WindowTotal(layers, terms, lm_loss, forwards, lm_forwards, self._adds_up)

    def gather(self) -> None:
        """Move the sums of all ranks to the first, so that its `state` is that of all. All ranks have to call it together."""
        if self._flat is None or _world_size() == 1:
            return
        dist.all_reduce(self._flat)
        if dist.get_rank() != 0:
            self._flat.zero_()

    def state(self) -> dict[str, Any]:
        """This rank's part, fit for JSON and exact."""
        if self._flat is None:
            return {}
        return {
            "flat": base64.b64encode(self._flat.cpu().double().numpy().tobytes()).decode(),
            # the order of names matters, and `Trainer` sorts the keys of its JSON
            "layout": [{**layer, "shapes": list(layer["shapes"].items())} for layer in self._layout],
            "terms": list(self._terms.items()),
            "adds_up": self._adds_up,
        }

    def restore(self, state: dict[str, Any], device: torch.device, first_rank: bool = True) -> None:
        """Go on from a `state` that was saved after `gather`.

        Args:
            state: of the first rank.
            device: where the forwards will run.
            first_rank: the others start from zeros.
        """
        self.clear()
        if not state:
            return
        flat = torch.frombuffer(bytearray(base64.b64decode(state["flat"])), dtype=torch.float64)
        self._flat = flat.to(device, _wide(device)) * int(first_rank)
        self._layout = [{**layer, "shapes": dict(layer["shapes"])} for layer in state["layout"]]
        self._terms, self._adds_up = dict(state["terms"]), state["adds_up"]

    def _kept(self, layer: LayerRecord) -> dict[str, Tensor]:
        return layer.sums if self._names is None else {name: layer.sums[name] for name in self._names}

    def _sizes(self) -> list[int]:
        sums = [math.prod(shape) for layer in self._layout for shape in layer["shapes"].values()]
        return [*sums, *self._terms.values(), 3]


def _layout(layer: LayerRecord, sums: dict[str, Tensor]) -> dict[str, Any]:
    shapes = {name: list(value.shape) for name, value in sums.items()}
    return {"num_experts": layer.num_experts, "top_k": layer.top_k, "shapes": shapes}


def _wide(device: torch.device) -> torch.dtype:
    return torch.float32 if device.type == "mps" else torch.float64


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def load_metrics(total: WindowTotal, layers: list[int], optimizer_steps: int) -> dict[str, float]:
    """What to log about a window.

    Args:
        total: of a window, on the CPU.
        layers: decoder layer of each MoE layer, for the names.
        optimizer_steps: how many the window has.

    Returns:
        Of every layer `layer_<i>/<name>`, and `<name>`, the mean over layers (`dead_experts`: their sum; and
        `worst_load_max_over_mean`, the maximum):

        - `importance_loss`, `load_loss`, `aux_loss`, `z_loss` (and `threshold_loss`): the router losses as they entered the
          training loss, without coefficients; the mean over optimizer steps. Without a record of that (a bare `MoEModel`)
          they are computed from the whole window's sums. Of a router without noise the smooth load is the count of
          assignments, so its `load_loss` is their CV².
        - `lm_loss`: the LM loss alone, so that loss = lm_loss + Σ coefficient · router loss. Not per layer.
        - `load_max_over_mean`, `load_cv` (population standard deviation / mean) of the assignments executed;
          `importance_cv` of the summed gates; `router_entropy` per token in nats; `logit_rms`, the root of the mean of
          logsumexp²; `drop_rate`, the share of the wanted assignments that was not executed; `dead_experts`, which executed
          nothing.

        What a router does not define is absent (`hash` has no probabilities, so only load, drops and dead experts).
    """
    steps = max(1, optimizer_steps)
    losses = {name: (term_L / (steps if total.adds_up else total.forwards)).tolist() for name, term_L in total.terms.items()}
    per_layer = _load_of_layers(total.layers)
    for row, layer in enumerate(total.layers):
        of_window = {} if losses else {name: float(value) for name, value in layer_losses(layer.sums, layer.top_k).items()}
        per_layer[row] |= of_window | {name: values[row] for name, values in losses.items()}
    metrics = {}
    if total.lm_forwards:
        metrics["lm_loss"] = float(total.lm_loss / (steps if total.adds_up else total.lm_forwards))
    for name in per_layer[0]:
        values = [numbers[name] for numbers in per_layer]
        metrics[name] = sum(values) if name == "dead_experts" else sum(values) / len(values)
    metrics["worst_load_max_over_mean"] = max(numbers["load_max_over_mean"] for numbers in per_layer)
    for index, numbers in zip(layers, per_layer, strict=True):
        metrics |= {f"layer_{index}/{name}": value for name, value in numbers.items()}
    return metrics


def _load_of_layers(layers: list[LayerRecord]) -> list[dict[str, float]]:
    """The numbers of each layer, computed for all layers of the same size at once: there can be many."""
    found: list[dict[str, float]] = [{} for _ in layers]
    for size in {layer.num_experts for layer in layers}:
        rows = [row for row, layer in enumerate(layers) if layer.num_experts == size]
        sums = {name: torch.stack([layers[row].sums[name] for row in rows]) for name in layers[rows[0]].sums}
        executed_LE, counts_LE, tokens_L = sums["executed"], sums["counts"], sums["tokens"].clamp(min=1)
        numbers = {
            "load_max_over_mean": executed_LE.amax(dim=-1) / executed_LE.mean(dim=-1).clamp(min=1e-20),
            "load_cv": cv_squared(executed_LE).sqrt(),
            "drop_rate": 1 - executed_LE.sum(dim=-1) / counts_LE.sum(dim=-1).clamp(min=1e-20),
            "load_loss": load_loss(counts_LE),
        }
        if "importance" in sums:
            numbers["importance_cv"] = cv_squared(sums["importance"]).sqrt()
        if "entropy" in sums:
            numbers["router_entropy"] = sums["entropy"] / tokens_L
            numbers["logit_rms"] = (sums["z"] / tokens_L).sqrt()
        numbers["dead_experts"] = (executed_LE == 0).sum(dim=-1)
        lists = {name: value.tolist() for name, value in numbers.items()}
        for index, row in enumerate(rows):
            found[row] = {name: values[index] for name, values in lists.items()}
    return found
