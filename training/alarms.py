# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Alarms of a training: what goes wrong with the routers, in which layer, and what to do."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field

from .metrics import WindowTotal
from .routing_watch import RoutingWatch


@dataclass(frozen=True)
class AlarmThresholds:
    """When to raise an alarm. `None` turns one off.

    Attributes:
        load_max_over_mean: collapse: the busiest expert's share over the mean, in `patience` logs in a row. By default 4, or
            60 % of the way from balance (1) to the worst that is possible (E / K), whichever is less.
        logit_rms: root of the mean of logsumexp(logits)². A fresh router has about log E; from some 30 on, softmax is a step.
        aux_over_lm: weighted router losses over the LM loss.
        drop_rate: share of the wanted assignments that was not executed.
        not_finite: NaN or infinite router logits.
        patience: logs in a row for collapse: routing of the first steps is often uneven.
        least_assignments: per expert and log, below which its load says nothing.
    """

    load_max_over_mean: float | None = 4.0
    logit_rms: float | None = 30.0
    aux_over_lm: float | None = 1.0
    drop_rate: float | None = 0.2
    not_finite: bool = True
    patience: int = 3
    least_assignments: float = 4.0

    def collapsed_from(self, num_experts: int, top_k: int) -> float:
        """The max/mean load from which a layer counts as collapsed; infinite where it cannot."""
        worst = num_experts / top_k
        if self.load_max_over_mean is None or worst <= 1:
            return math.inf
        return min(self.load_max_over_mean, 1 + 0.6 * (worst - 1))


@dataclass(frozen=True)
class Alarm:
    """One thing that is wrong.

    Attributes:
        kind: `collapse`, `logits`, `aux_loss`, `drops` or `not_finite`.
        step: the global step of the log.
        layer: decoder layer in which it is worst.
        value: what was measured.
        message: what it means and what to do.
    """

    kind: str
    step: int
    layer: int
    value: float
    message: str


@dataclass
class AlarmBell:
    """Looks at each log, and raises each kind of alarm once.

    Attributes:
        thresholds: when.
        raised: the alarms so far.
        streaks: for how many logs in a row each layer has been collapsed.
    """

    thresholds: AlarmThresholds = field(default_factory=AlarmThresholds)
    raised: list[Alarm] = field(default_factory=list)
    streaks: dict[int, int] = field(default_factory=dict)

    def check(self, step: int, metrics: dict[str, float], total: WindowTotal, watch: RoutingWatch) -> list[Alarm]:
        """The new alarms of a log.

        Args:
            step: global step.
            metrics: of `load_metrics`.
            total: what they were computed from.
            watch: whose they are.
        """
        found = {alarm.kind: alarm for alarm in self._found(step, metrics, total, watch)}
        known = {alarm.kind for alarm in self.raised}
        new = [alarm for kind, alarm in found.items() if kind not in known]
        self.raised += new
        return new

    def _found(self, step: int, metrics: dict[str, float], total: WindowTotal, watch: RoutingWatch) -> Iterator[Alarm]:
        limits = self.thresholds
        values = {name: [metrics.get(f"layer_{i}/{name}", 0.0) for i in watch.layers] for name in _WATCHED}
        broken = [
            not all(math.isfinite(metrics.get(f"layer_{i}/{name}", 0.0)) for name in ("logit_rms", "importance_cv"))
            for i in watch.layers
        ]
        if limits.not_finite and any(broken):
            row = broken.index(True)
            yield Alarm("not_finite", step, watch.layers[row], math.nan, _NOT_FINITE.format(_layers(watch, broken)))
            return  # the other numbers mean nothing then
        collapsed = self._collapsed(values["load_max_over_mean"], total, watch)
        if any(collapsed):
            yield _worst("collapse", step, watch, values["load_max_over_mean"], collapsed, _COLLAPSE)
        for kind, name, limit, text in (
            ("logits", "logit_rms", limits.logit_rms, _LOGITS),
            ("drops", "drop_rate", _drop_limit(limits, watch), _DROPS),
        ):
            over = [limit is not None and value > limit for value in values[name]]
            if any(over):
                yield _worst(kind, step, watch, values[name], over, text)
        parts = {name: c * metrics[name] for name, c in watch.coefficients.items() if c and name in metrics}
        lm_loss = metrics.get("lm_loss")
        if limits.aux_over_lm is not None and lm_loss is not None and sum(parts.values()) > limits.aux_over_lm * lm_loss:
            name = max(parts, key=lambda part: parts[part])
            by_layer = [metrics[f"layer_{index}/{name}"] for index in watch.layers]
            text = _AUX.format(sum(parts.values()), lm_loss, name, parts[name])
            yield _worst("aux_loss", step, watch, by_layer, [True] * len(by_layer), text)

    def _collapsed(self, max_over_mean: list[float], total: WindowTotal, watch: RoutingWatch) -> list[bool]:
        """Which layers have been collapsed for `patience` logs in a row."""
        for index, value, layer in zip(watch.layers, max_over_mean, total.layers, strict=True):
            enough = float(layer.sums["executed"].mean()) >= self.thresholds.least_assignments
            over = enough and value >= self.thresholds.collapsed_from(layer.num_experts, layer.top_k)
            self.streaks[index] = self.streaks.get(index, 0) + 1 if over else 0
        return [self.streaks[index] >= self.thresholds.patience for index in watch.layers]


_WATCHED = ("load_max_over_mean", "logit_rms", "drop_rate")
_COLLAPSE = (
    "{where}: the busiest expert gets {value:.2f} times the mean load. The router is collapsing: raise `router_aux_loss_coef` "
    "(or, with router_type='noisy_top_k', the importance and load coefficients; with 'sigmoid' add "
    "LossFreeBalancingCallback), lower the router's learning rate, or use DeadExpertCallback('explore')."
)
_LOGITS = (
    "{where}: the router's logits have grown to {value:.1f} (root of the mean of logsumexp²), where softmax is a step and "
    "gradients vanish. Set `router_z_loss_coef` (1e-3), or lower the router's learning rate."
)
_DROPS = (
    "{where}: {value:.0%} of the assignments are over capacity and were not computed. Raise `capacity_factor`, or set it to "
    "None (dropless), or balance the load."
)
_AUX = (
    "The weighted router losses ({:.4g}) are more than the LM loss ({:.4g}); most is {} ({:.4g}), highest in {{where}} "
    "({{value:.4g}} without its coefficient). The model now learns to balance rather than to predict: lower that coefficient."
)
_NOT_FINITE = (
    "{}: the router's logits are NaN or infinite. Load the last good checkpoint; lower the learning rate or `max_grad_norm`, "
    "and set `router_z_loss_coef` (1e-3)."
)


def _worst(kind: str, step: int, watch: RoutingWatch, values: list[float], over: list[bool], text: str) -> Alarm:
    """The alarm for the layer with the largest value, naming how many others are concerned."""
    row = max((row for row in range(len(values)) if over[row]), key=lambda row: values[row])
    where = f"layer {watch.layers[row]}" + (f" (and {sum(over) - 1} more)" if sum(over) > 1 and kind != "aux_loss" else "")
    return Alarm(kind, step, watch.layers[row], values[row], text.format(where=where, value=values[row]))


def _layers(watch: RoutingWatch, concerned: list[bool]) -> str:
    indices = [index for index, is_concerned in zip(watch.layers, concerned, strict=True) if is_concerned]
    return f"layer {indices[0]}" + (f" (and {len(indices) - 1} more)" if len(indices) > 1 else "")


def _drop_limit(limits: AlarmThresholds, watch: RoutingWatch) -> float | None:
    """GShard's router drops second experts at random, by design, and no capacity is to blame."""
    config = watch.model.config
    by_design = getattr(config, "router_type", None) == "gshard" and getattr(config, "capacity_factor", None) is None
    return None if by_design else limits.drop_rate
