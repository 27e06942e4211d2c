# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Which curves a report has: over the steps of the training, and over the layers of the model."""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from hf_moe.expert_load import ExpertLoad

from .expert_similarity import ExpertSimilarity
from .report_data import TextReport
from .report_source import Source, series
from .report_svg import Line, line_chart, ramp

ACCENT, SOFT, MORE = "var(--accent)", "var(--soft)", "var(--more)"
MOST_ROWS = 400

# Keys of the log, the curve's title and caption. Those in one row share a chart.
LOGGED: tuple[tuple[tuple[str, ...], str, str], ...] = (
    (("loss", "moe/lm_loss", "eval_loss"), "Loss", "training loss, its LM part, and held-out text, as far as they were logged"),
    (("moe/aux_loss",), "Load-balancing loss (Switch)", "without its coefficient; 1 is balanced"),
    (("moe/importance_loss", "moe/load_loss"), "Importance and load loss", "without coefficients; 0 is balanced"),
    (("moe/z_loss",), "Router z-loss", "without its coefficient; grows with the router's logits"),
    (("moe/router_entropy",), "Router entropy", "nats per token, mean over layers; falls as the router decides"),
    (("moe/drop_rate",), "Drop rate", "share of the wanted assignments that capacity left out"),
    (("moe/dead_experts",), "Dead experts", "that computed nothing since the log before, in all layers"),
)
# Names of the per-layer keys `moe/layer_<i>/<name>` that get a chart of their own.
PER_LAYER = {"router_entropy": "Router entropy by layer", "drop_rate": "Drop rate by layer"}


@dataclass(frozen=True)
class Chart:
    """A line chart before it is drawn, as SVG or as PNG.

    Attributes:
        title, caption: above and below.
        lines: at least one with a point.
        x_label, y_label: what the axes are.
        zero: whether the vertical axis starts at 0.
        dots: whether points are marked.
    """

    title: str
    caption: str
    lines: list[Line]
    x_label: str
    y_label: str
    zero: bool = False
    dots: bool = False

    def svg(self) -> str:
        """The chart for the page."""
        return line_chart(self.lines, self.x_label, self.y_label, self.zero, self.dots)


def training_charts(source: Source) -> list[Chart]:
    """Curves over steps: load by layer, losses, entropy, drops; what was not logged is absent."""
    charts = [] if source.expert_load is None else load_charts(source.expert_load)
    for keys, title, caption in LOGGED:
        lines = []
        for key, color in zip(keys, (ACCENT, SOFT, MORE), strict=False):
            steps, values = series(source.log_history, key)
            if steps:
                lines.append(Line(key, steps, values, color, dashed=key == "moe/lm_loss"))
        if lines:
            named = caption if len(lines) == 1 else f"{caption} ({_legend(lines)})"
            charts.append(Chart(title, named, lines, "step", title, zero=title in ("Drop rate", "Dead experts")))
    return charts + _per_layer(source)


def _legend(lines: Sequence[Line]) -> str:
    words = {ACCENT: "blue", SOFT: "grey", MORE: "orange"}
    return ", ".join(f"{line.name} {words[line.color]}" for line in lines)


def _per_layer(source: Source) -> list[Chart]:
    keys = {key for row in source.log_history for key in row}
    charts = []
    for name, title in PER_LAYER.items():
        layers = sorted(int(m[1]) for key in keys if (m := re.fullmatch(rf"moe/layer_(\d+)/{name}", key)))
        found = [(layer, *series(source.log_history, f"moe/layer_{layer}/{name}")) for layer in layers]
        lines = [
            Line(f"layer {layer}", steps, values, color)
            for (layer, steps, values), color in zip(found, ramp(len(found)), strict=True)
            if steps
        ]
        if lines:
            charts.append(Chart(title, "one line per MoE layer", lines, "step", title, zero=name == "drop_rate"))
    return charts


def load_charts(load: ExpertLoad) -> list[Chart]:
    """Largest load over mean, and coefficient of variation, over steps: one line per MoE layer."""
    steps, counts_NLE, joined = _binned(load)
    said = "one line per MoE layer" + (f"; each point counts {joined} logs together" if joined > 1 else "")
    charts = []
    for title, caption, of in (
        ("Load: busiest expert over mean", f"{said}; 1 is balanced", lambda c: c.max(axis=1) / c.mean(axis=1)),
        ("Load: coefficient of variation", f"{said}; 0 is balanced", lambda c: c.std(axis=1) / c.mean(axis=1)),
    ):
        lines = []
        for row, color in enumerate(ramp(len(load.layers))):
            counts_NE = counts_NLE[:, row, : load.num_experts[row]].astype(np.float64)
            ran = counts_NE.sum(axis=1) > 0
            if ran.any():
                lines.append(Line(f"layer {load.layers[row]}", steps[ran].tolist(), of(counts_NE[ran]).tolist(), color))
        if lines:
            charts.append(Chart(title, caption, lines, "step", title.removeprefix("Load: ")))
    return charts


def _binned(load: ExpertLoad) -> tuple[np.ndarray, np.ndarray, int]:
    """Steps and counts, of so many neighbouring rows together that at most `MOST_ROWS` are left."""
    joined = -(-len(load.steps) // MOST_ROWS)
    starts = np.arange(0, len(load.steps), joined)
    ends = np.minimum(starts + joined, len(load.steps)) - 1
    return np.array(load.steps)[ends], np.add.reduceat(load.executed, starts, axis=0), joined


def held_charts(text: TextReport) -> list[Chart]:
    """How much token and part of the text explain, layer by layer, beside random routers."""
    charts = []
    for name, title in (("token", "Explained by the token"), ("part", "Explained by the part of the text")):
        found, random = text.dependences.get(name), text.comparisons.get(name)
        if found is None or found.share is None:
            continue
        rows = [layer for layer in found.layers if layer.share is not None]
        lines = []
        if random is not None:
            pairs = [(own.layer, other) for own, other in zip(found.layers, random.layers, strict=True) if other is not None]
            mean = np.array([100 * other.share for _, other in pairs])
            std = np.array([100 * other.std for _, other in pairs])
            x, low = [layer for layer, _ in pairs], np.maximum(mean - std, np.minimum(mean, 0))
            lines.append(Line("random routers", x, mean.tolist(), SOFT, low.tolist(), (mean + std).tolist(), True))
        lines.append(Line("this model", [r.layer for r in rows], [100 * (r.share or 0.0) for r in rows], ACCENT))
        caption = "% of the choice of experts, by layer"
        charts.append(Chart(title, caption, lines, "layer", "% explained", zero=True, dots=True))
    return charts


def similarity_charts(similarities: Sequence[ExpertSimilarity]) -> list[Chart]:
    """How far apart the experts of each layer are."""
    charts = []
    for name, title, caption, factor in (
        (
            "distance_EE",
            "Distance of two experts",
            f"% of their norm, mean of all pairs; {100 * math.sqrt(2):.0f} % is unrelated",
            100,
        ),
        ("cosine_EE", "Cosine of two experts", "mean of all pairs; 1 is identical", 1),
    ):
        means = [(s.layer, s.mean_of_pairs(name)) for s in similarities]
        known = [(layer, factor * mean) for layer, mean in means if mean is not None]
        if known:
            line = Line("mean of pairs", [layer for layer, _ in known], [mean for _, mean in known], ACCENT)
            charts.append(Chart(title, caption, [line], "layer", title, zero=factor == 100, dots=True))
    return charts
