# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Pictures of a training. Needs matplotlib, which `pip install hf_moe[plots]` brings."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any

MAX_PANELS = 6
MAX_LINES = 16  # more experts than this: no lines between bands
_INK, _PALE = "#303036", "#8a8a94"


def plot_expert_load(jsonl_path: str | os.PathLike[str], png_path: str | os.PathLike[str]) -> None:
    """Draw how the assignments are shared among the experts over the steps of a training.

    At most six MoE layers are shown, evenly chosen from the first to the last. Each is a stack of one band per expert; the
    bands of a balanced layer lie between the dotted lines.

    Args:
        jsonl_path: the `expert_load.jsonl` that `ExpertLoadCallback` wrote.
        png_path: the picture to write; it appears whole or not at all.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: the file has no rows.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The picture needs matplotlib: `pip install hf_moe[plots]`.") from error
    with open(jsonl_path, encoding="utf-8") as file:
        rows = [json.loads(line) for line in file]
    if not rows:
        raise ValueError(
            f"`jsonl_path`={os.fspath(jsonl_path)!r} has no rows: the training never logged. Lower its `logging_steps`."
        )
    num_layers = len(rows[0]["executed"])
    shown = _evenly(num_layers, MAX_PANELS)
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    figure = Figure(figsize=(1.2 + 3.3 * columns, 1.25 + 2.15 * lines), dpi=150, layout="constrained")
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    experts = max(len(rows[0]["executed"][index]) for index in shown)
    for axis, index in zip(axes.flat, shown, strict=False):
        _draw_layer(axis, rows, index, _colors(experts))
    for axis in axes[:, 0]:
        axis.set_ylabel("share of assignments", color=_INK, fontsize=9)
    for position in range(max(0, len(shown) - columns), len(shown)):  # the lowest panel of each column
        axes.flat[position].set_xlabel("step", color=_INK, fontsize=9)
        axes.flat[position].tick_params(labelbottom=True)
    _draw_legend(figure, experts)
    which = f"{len(shown)} of {num_layers} MoE layers" if len(shown) < num_layers else "each MoE layer"
    lines_mean = " (dotted: perfectly balanced)" if experts <= MAX_LINES else ""
    figure.suptitle(f"Load of the experts in {which}{lines_mean}", fontsize=11, color=_INK, x=0.01, ha="left")
    _write(FigureCanvasAgg(figure), Path(png_path))


def _evenly(count: int, most: int) -> list[int]:
    """At most `most` of the indices 0 to count-1, evenly spaced, first and last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _draw_layer(axis: Any, rows: list[dict[str, Any]], index: int, colors: list[Any]) -> None:
    counts = [row["executed"][index] for row in rows]
    shares = [[count / max(1, sum(step)) for count in step] for step in counts]
    # a row holds the steps since the row before it, the first one those since step 0
    steps, shares = [0, *(row["step"] for row in rows)], [shares[0], *shares]
    experts = len(shares[0])
    edge = 0.6 if experts <= MAX_LINES else 0
    axis.stackplot(steps, list(zip(*shares, strict=True)), colors=colors[:experts], edgecolor="white", linewidth=edge)
    if experts <= MAX_LINES:
        for boundary in range(1, experts):
            axis.axhline(boundary / experts, color=_INK, linewidth=0.8, linestyle=(0, (1, 2.5)))
    names = rows[0].get("layers")
    axis.set_title(f"layer {names[index] if names else index}", fontsize=10, color=_INK, loc="left", pad=4)
    first, last = (max(step) * experts for step in (shares[0], shares[-1]))
    axis.set_title(f"max/mean {first:.2f} → {last:.2f}", fontsize=8, color=_PALE, loc="right", pad=4)
    axis.set_xlim(steps[0], steps[-1])
    axis.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    axis.set_ylim(0, 1)
    axis.set_yticks([0, 0.5, 1], ["0", "½", "1"])
    axis.tick_params(colors=_PALE, labelsize=8, length=2.5)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _colors(experts: int) -> list[Any]:
    """Viridis, which colour-blind readers can follow, mixed with white so that the dotted lines stand out."""
    from matplotlib import colormaps

    pure = (colormaps["viridis"](0.12 + 0.8 * i / max(1, experts - 1))[:3] for i in range(experts))
    return [tuple(0.8 * channel + 0.2 for channel in color) for color in pure]


def _draw_legend(figure: Any, experts: int) -> None:
    from matplotlib.patches import Patch

    every = -(-experts // MAX_LINES)  # of many experts, only some are named
    names = [Patch(color=color, label=f"expert {i}") for i, color in enumerate(_colors(experts))][::every]
    figure.legend(handles=names[::-1], loc="outside right center", frameon=False, fontsize=8, labelcolor=_INK, handlelength=1)


def _write(canvas: Any, path: Path) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    canvas.print_figure(new, format="png", facecolor="white")
    os.replace(new, path)
