# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""How much the text tells about the experts: mutual information, against shuffled text.

Letters as in `routing_analysis`; L layers, R shuffles.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from .routing_analysis import Floats, Ints, LayerRouting, contingency, expert_counts


def mutual_information(counts_AE: Ints) -> float:
    """Plug-in mutual information of label and expert in nats; every assignment is one draw."""
    total = counts_AE.sum()
    if total == 0:
        return 0.0
    cells, rows, columns = counts_AE, counts_AE.sum(axis=1), counts_AE.sum(axis=0)
    return float((_x_log_x(cells).sum() - _x_log_x(rows).sum() - _x_log_x(columns).sum() + _x_log_x(total)) / total)


def _x_log_x(counts: Ints) -> Floats:
    values = np.asarray(counts, dtype=np.float64)
    return values * np.log(np.maximum(values, 1.0))


def most_information(routing: LayerRouting) -> float:
    """The mutual information of token and expert in nats: the most that any label can have.

    It is H(expert) less what is open when the token is known, which of its several experts is meant.
    """
    counts_E, slots_N = expert_counts(routing), routing.slots_per_token
    total = counts_E.sum()
    if total == 0:
        return 0.0
    entropy = np.log(total) - _x_log_x(counts_E).sum() / total
    return max(0.0, float(entropy - _x_log_x(slots_N).sum() / total))


MIN_CHOICE = 0.01  # nats: a layer that gives nearly every token the same experts makes no choice that text could explain


@dataclass(frozen=True)
class LayerDependence:
    """How much a label tells about the expert in one layer.

    Attributes:
        layer: index of the decoder layer.
        information: plug-in mutual information in nats.
        null_mean, null_std: the same after shuffling, which has the same loads: what chance alone gives.
        most: what it would be if the label fixed the experts.
        share: `(information - null_mean) / (most - null_mean)`, the bias-corrected share of the choice that the label
            explains (as in adjusted mutual information, Vinh et al. 2010); `None` where there is no choice.
        z: distance from the shuffled ones in their standard deviations; `None` where they do not vary.
        p: probability of a z so large in any of the layers by chance (Westfall and Young's maxT).
    """

    layer: int
    information: float
    null_mean: float
    null_std: float
    most: float
    share: float | None
    z: float | None
    p: float | None


@dataclass(frozen=True)
class Dependence:
    """How much a label tells about the expert, over all layers.

    Attributes:
        share: mean over layers of their `share`; `None` if no layer has one.
        p: of that mean, against the same shuffles.
        shuffles: how many.
        units: how many units were shuffled.
        layers: one by one.
    """

    share: float | None
    p: float | None
    shuffles: int
    units: int
    layers: list[LayerDependence]


def dependence(
    labels_N: Ints,
    units_N: Ints,
    layers: Sequence[LayerRouting],
    shuffles: int = 199,
    seed: int = 0,
) -> Dependence:
    """Test whether experts depend on a label, against shuffles of the label among units of text.

    A shuffle gives every unit the label of another, for all layers alike, and leaves the routing as it is: the loads, the
    experts that go together and what neighbouring tokens of a unit have in common all stay.

    Args:
        labels_N: `[N]` codes from 0.
        units_N: `[N]` codes from 0 of what is shuffled; tokens of one unit have one label.
        layers: the routing of every layer.
        shuffles: how many.
        seed: of the shuffles.
    """
    random = np.random.default_rng(seed)
    num_labels, num_units = int(labels_N.max()) + 1, int(units_N.max()) + 1
    label_of_unit = np.zeros(num_units, np.int64)
    label_of_unit[units_N] = labels_N
    orders = [random.permutation(num_units) for _ in range(shuffles)]
    observed_L, most_L = np.zeros(len(layers)), np.zeros(len(layers))
    null_LR = np.zeros((len(layers), shuffles))
    for row, routing in enumerate(layers):
        observed_L[row] = mutual_information(contingency(labels_N, routing, num_labels))
        most_L[row] = most_information(routing)
        null_LR[row] = [mutual_information(contingency(label_of_unit[order][units_N], routing, num_labels)) for order in orders]
    return _judge(layers, observed_L, most_L, null_LR, num_units)


def _judge(layers: Sequence[LayerRouting], observed_L: Floats, most_L: Floats, null_LR: Floats, num_units: int) -> Dependence:
    mean_L, std_L, shuffles = null_LR.mean(axis=1), null_LR.std(axis=1), null_LR.shape[1]
    open_L = (most_L - mean_L > MIN_CHOICE) & (std_L > 1e-12)
    room_L, scale_L = np.where(open_L, most_L - mean_L, 1.0), np.where(open_L, std_L, 1.0)
    above_L, above_LR = (observed_L - mean_L) * open_L, (null_LR - mean_L[:, None]) * open_L[:, None]
    z_L, largest_R = above_L / scale_L, (above_LR / scale_L[:, None]).max(axis=0, initial=-np.inf)
    found = [
        LayerDependence(
            layer=routing.layer,
            information=float(observed_L[row]),
            null_mean=float(mean_L[row]),
            null_std=float(std_L[row]),
            most=float(most_L[row]),
            share=float(above_L[row] / room_L[row]) if open_L[row] else None,
            z=float(z_L[row]) if open_L[row] else None,
            p=exceedance(z_L[row], largest_R) if open_L[row] else None,
        )
        for row, routing in enumerate(layers)
    ]
    if not open_L.any():
        return Dependence(None, None, shuffles, num_units, found)
    share = float((above_L / room_L)[open_L].mean())
    shuffled_R = (above_LR / room_L[:, None])[open_L].mean(axis=0)
    return Dependence(share, exceedance(share, shuffled_R), shuffles, num_units, found)


def exceedance(value: float, null: Floats) -> float:
    """p-value of a value among draws from the null: the share that is at least as large, itself among them."""
    return float((1 + (null >= value - 1e-12).sum()) / (1 + len(null)))
