# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""The pictures of a report as PNG files. Needs matplotlib, which `pip install hf_moe[plots]` brings."""

from __future__ import annotations

import math
import os
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np

from .report_charts import ACCENT, MORE, SOFT, Chart, held_charts, similarity_charts, training_charts
from .report_data import ReportData

MAX_PANELS = 6
MAX_NAMES = 32  # on an axis
_INK, _PALE = "#303036", "#6f727b"
_COLORS = {ACCENT: "#2f5fa8", SOFT: "#7b7e86", MORE: "#d9741a"}


def write_pictures(data: ReportData, folder: Path) -> list[Path]:
    """Write every picture that the data allows.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The pictures need matplotlib: `pip install hf_moe[plots]`.") from error
    charts = {
        "specialisation.png": [] if data.text is None else held_charts(data.text),
        "training.png": training_charts(data.source),
        "similarity_by_layer.png": similarity_charts(data.similarities),
    }
    drawers: dict[str, Callable[[Any], bool]] = {name: _charts(found) for name, found in charts.items()}
    drawers |= {"load.png": _load(data), "expert_similarity.png": _similarities(data)}
    drawers |= {"coactivation.png": _pairs(data), "liking.png": _likings(data)}
    written = []
    for name, draw in drawers.items():
        figure = Figure(dpi=130, layout="constrained", facecolor="white")
        if draw(figure):
            _write(figure, folder / name)
            written.append(folder / name)
    return written


def _write(figure: Any, path: Path) -> None:
    from matplotlib.backends.backend_agg import FigureCanvasAgg

    new = path.with_name(path.name + ".new")
    FigureCanvasAgg(figure).print_figure(new, format="png", facecolor="white")
    os.replace(new, path)


# ---------------------------------------------------------------------- curves


def _charts(charts: Sequence[Chart]) -> Callable[[Any], bool]:
    def draw(figure: Any) -> bool:
        if not charts:
            return False
        for axis, chart in zip(_panels(figure, len(charts), 4.4, 2.6), charts, strict=True):
            _title(axis, chart.title)
            axis.set_xlabel(f"{chart.x_label}    ({chart.caption})" if len(chart.caption) < 40 else chart.x_label, fontsize=8)
            for line in chart.lines:
                color = _COLORS.get(line.color, line.color)
                style = {"linestyle": "--" if line.dashed else "-", "marker": "o" if chart.dots or len(line.x) == 1 else None}
                axis.plot(line.x, line.y, color=color, linewidth=1.4, markersize=3, label=line.name, **style)
                if len(line.low):
                    axis.fill_between(line.x, line.low, line.high, color=color, alpha=0.2, linewidth=0)
            if chart.zero:
                axis.set_ylim(bottom=0)
            axis.xaxis.get_major_locator().set_params(integer=True)
            axis.grid(axis="y", color="#e6e5e0", linewidth=0.7)
            shown = [line.name for line in chart.lines]
            if 1 < len(shown) <= 4:
                axis.legend(fontsize=7, frameon=False, labelcolor=_INK)
            elif len(shown) > 4:
                _corner(axis, f"{shown[0]} (blue) to {shown[-1]} (orange)")
        return True

    return draw


# ---------------------------------------------------------------------- maps


def _load(data: ReportData) -> Callable[[Any], bool]:
    if data.text is not None:
        layers, counts = [x.layer for x in data.text.layers], [np.array(load.counts) for load in data.text.loads]
    elif data.source.expert_load is not None:
        load = data.source.expert_load
        layers = load.layers
        counts = [row[:n] for row, n in zip(load.executed[-1], load.num_experts, strict=True)]
    else:
        return lambda figure: False

    def draw(figure: Any) -> bool:
        experts = max(map(len, counts))
        ratio_LE = np.full((len(layers), experts), np.nan)
        for row, counts_E in enumerate(counts):
            ratio_LE[row, : len(counts_E)] = counts_E * len(counts_E) / max(1, counts_E.sum())
        figure.set_size_inches(min(14, 2.6 + 0.42 * experts), min(14, 1.4 + 0.3 * len(layers)))
        axis = figure.subplots()
        image = _ratio_map(axis, ratio_LE, [str(layer) for layer in layers], [str(e) for e in range(experts)])
        for row, column in zip(*np.nonzero(ratio_LE == 0), strict=True):
            axis.text(column, row, "×", ha="center", va="center", fontsize=8, color=_INK)
        axis.set_xlabel("expert", fontsize=9)
        axis.set_ylabel("layer", fontsize=9)
        _title(axis, "Load, in times of a fair share (×: none)")
        _bar(figure, image, [axis])
        return True

    return draw


def _pairs(data: ReportData) -> Callable[[Any], bool]:
    found = (
        [] if data.text is None else [(x.layer, p) for x, p in zip(data.text.layers, data.text.coactivations, strict=True) if p]
    )

    def panel(axis: Any, item: Any) -> Any:
        layer, (observed_EE, expected_EE) = item
        names = [str(expert) for expert in range(len(observed_EE))]
        enough_EE = (expected_EE >= 3) | (observed_EE >= 3)
        ratio_EE = np.divide(
            observed_EE, expected_EE, out=np.full(expected_EE.shape, np.nan), where=enough_EE & (expected_EE > 0)
        )
        np.fill_diagonal(ratio_EE, np.nan)
        _title(axis, f"layer {layer}")
        return _ratio_map(axis, ratio_EE, names, names)

    return _maps(found, panel, "Pairs of experts on one token, in times of independent experts")


def _similarities(data: ReportData) -> Callable[[Any], bool]:
    low = min((float(similarity.cosine_EE.min()) for similarity in data.similarities), default=0.0)

    def panel(axis: Any, similarity: Any) -> Any:
        values_EE = similarity.cosine_EE.copy()
        names = [str(expert) for expert in range(len(values_EE))]
        np.fill_diagonal(values_EE, np.nan)
        image = axis.imshow(values_EE, cmap="viridis", vmin=min(low, 0.99), vmax=1.0, aspect="equal")
        _names(axis, names, names)
        _title(axis, f"layer {similarity.layer}" + (": identical" if similarity.identical else ""))
        return image

    return _maps(data.similarities, panel, "Cosine similarity of the experts' weights", ratio=False)


def _likings(data: ReportData) -> Callable[[Any], bool]:
    text = data.text
    if text is None or len(text.kinds["part"].labels) < 2:
        return lambda figure: False
    kind = text.kinds["part"]
    rows = np.sort(np.argsort(-kind.occurrences_A, kind="stable")[:12])
    total = len(text.table.ids_N)

    def panel(axis: Any, row: int) -> Any:
        counts_AE = kind.counts_LAE[row]
        expected_AE = np.outer(kind.occurrences_A, kind.counts_LAE[row].sum(axis=0)) / total
        ratio_AE = np.divide(counts_AE, expected_AE, out=np.full(expected_AE.shape, np.nan), where=expected_AE >= 3)
        labels = [_short(kind.labels[a]) for a in rows]
        _title(axis, f"layer {text.layers[row].layer}")
        return _ratio_map(axis, ratio_AE[rows], labels, [str(e) for e in range(counts_AE.shape[1])])

    return _maps(range(len(text.layers)), panel, "Parts of the text by expert, in times of the expert's share", aspect=1.4)


def _maps(
    items: Sequence[Any], panel: Callable[[Any, Any], Any], title: str, ratio: bool = True, aspect: float = 1.0
) -> Callable[[Any], bool]:
    """At most `MAX_PANELS` maps, evenly chosen from first to last, with one scale."""

    def draw(figure: Any) -> bool:
        if not len(items):
            return False
        count = min(len(items), MAX_PANELS)
        chosen = [items[round(i * (len(items) - 1) / max(1, count - 1))] for i in range(count)]
        axes = _panels(figure, count, 3.1 * aspect, 3.0)
        images = [panel(axis, item) for axis, item in zip(axes, chosen, strict=True)]
        which = f" ({count} of {len(items)} MoE layers)" if count < len(items) else ""
        figure.suptitle(title + which, fontsize=10.5, color=_INK, x=0.01, ha="left")
        if ratio:
            _bar(figure, images[0], axes)
        else:
            figure.colorbar(images[0], ax=axes, shrink=0.6, pad=0.02).ax.tick_params(labelsize=8, colors=_PALE)
        return True

    return draw


def _ratio_map(axis: Any, ratio: np.ndarray, rows: list[str], columns: list[str]) -> Any:
    """Blue below 1, orange above, in steps of a factor; white where nothing can be said."""
    from matplotlib.colors import LinearSegmentedColormap

    colors = LinearSegmentedColormap.from_list("ratio", ["#2c6fb3", "#f1f0ec", "#d9741a"]).with_extremes(bad="white")
    with np.errstate(divide="ignore"):
        image = axis.imshow(np.log2(ratio), cmap=colors, vmin=-2, vmax=2, aspect="auto")
    _names(axis, rows, columns)
    if len(columns) <= 12 and len(rows) <= 30:
        for row, column in zip(*np.nonzero(np.isfinite(ratio) & (ratio > 0)), strict=True):
            color = "white" if abs(math.log2(ratio[row, column])) > 1.4 else _INK
            axis.text(column, row, f"{ratio[row, column]:.2g}", ha="center", va="center", fontsize=6.5, color=color)
    return image


def _names(axis: Any, rows: list[str], columns: list[str]) -> None:
    for names, ticks in ((rows, axis.set_yticks), (columns, axis.set_xticks)):
        every = math.ceil(len(names) / MAX_NAMES)
        ticks(range(0, len(names), every), names[::every], fontsize=7.5)
    axis.tick_params(colors=_PALE, length=0)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _bar(figure: Any, image: Any, axes: Sequence[Any]) -> None:
    bar = figure.colorbar(image, ax=list(axes), shrink=0.7, pad=0.02, ticks=[-2, -1, 0, 1, 2])
    bar.ax.set_yticklabels(["÷4", "÷2", "1", "×2", "×4"], fontsize=8, color=_PALE)
    bar.outline.set_visible(False)


def _panels(figure: Any, count: int, width: float, height: float) -> list[Any]:
    columns = min(3, count)
    lines = -(-count // columns)
    figure.set_size_inches(0.9 + width * columns, 0.6 + height * lines)
    axes = figure.subplots(lines, columns, squeeze=False)
    for axis in axes.flat[count:]:
        axis.set_visible(False)
    for axis in axes.flat:
        axis.tick_params(colors=_PALE, labelsize=8)
        for side in ("top", "right"):
            axis.spines[side].set_visible(False)
    return list(axes.flat[:count])


def _title(axis: Any, text: str) -> None:
    axis.set_title(text, fontsize=9.5, color=_INK, loc="left")


def _corner(axis: Any, text: str) -> None:
    axis.text(0.99, 0.97, text, transform=axis.transAxes, ha="right", va="top", fontsize=7, color=_PALE)


def _short(name: str, most: int = 22) -> str:
    """A name of the text, fit for a picture: matplotlib reads $ as mathematics, and its font has no glyph for every sign."""
    clean = "".join(c if c.isprintable() and ord(c) < 0x3000 else "□" for c in name).replace("$", r"\$")
    return clean if len(clean) <= most else clean[: most - 1] + "…"
