# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Pictures of a training. Needs matplotlib, which `pip install hf_moe[plots]` brings."""

from __future__ import annotations

import os
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np

from hf_moe.expert_load import ExpertLoad, read_expert_load

MAX_PANELS = 6
MAX_STEPS = 250  # more rows than this are added up: a panel has hardly more pixels
MAX_LINES = 16  # more experts than this: no lines between bands
_INK, _PALE = "#303036", "#8a8a94"


def plot_expert_load(load_path: str | os.PathLike[str], png_path: str | os.PathLike[str]) -> None:
    """Draw how the assignments are shared among the experts over the steps of a training.

    At most six MoE layers are shown, evenly chosen from the first to the last. Each is a stack of one band per expert; the
    bands of a balanced layer lie between the dotted lines.

    Args:
        load_path: the `expert_load.safetensors` that `ExpertLoadCallback` wrote.
        png_path: the picture to write; it appears whole or not at all.

    Raises:
        ImportError: matplotlib is missing.
        OSError: there is no such file.
        ValueError: it has no rows, or is no file of expert load.
    """
    canvas_class, figure_class = _matplotlib()
    load = read_expert_load(load_path)
    if not load.steps:
        raise ValueError(
            f"`load_path`={os.fspath(load_path)!r} has no rows: the training never logged. Lower its `logging_steps`."
        )
    load, num_layers = _coarser(load, MAX_STEPS), len(load.layers)
    shown = _evenly(num_layers, MAX_PANELS)
    columns = min(3, len(shown))
    lines = -(-len(shown) // columns)
    figure = figure_class(figsize=(1.2 + 3.3 * columns, 1.25 + 2.15 * lines), dpi=150, layout="constrained")
    axes = figure.subplots(lines, columns, sharex=True, sharey=True, squeeze=False)
    for axis in axes.flat[len(shown) :]:
        axis.set_visible(False)
    experts = max(load.num_experts[index] for index in shown)
    for axis, index in zip(axes.flat, shown, strict=False):
        _draw_layer(axis, load, index, _colors(experts))
    for axis in axes[:, 0]:
        axis.set_ylabel("share of assignments", color=_INK, fontsize=9)
    for position in range(max(0, len(shown) - columns), len(shown)):  # the lowest panel of each column
        axes.flat[position].set_xlabel("step", color=_INK, fontsize=9)
        axes.flat[position].tick_params(labelbottom=True)
    _draw_legend(figure, experts)
    which = f"{len(shown)} of {num_layers} MoE layers" if len(shown) < num_layers else "each MoE layer"
    lines_mean = " (dotted: perfectly balanced)" if experts <= MAX_LINES else ""
    figure.suptitle(f"Load of the experts in {which}{lines_mean}", fontsize=11, color=_INK, x=0.01, ha="left")
    _write(canvas_class(figure), Path(png_path))


def plot_load_heat_map(load: ExpertLoad, png_path: str | os.PathLike[str]) -> None:
    """Draw how many assignments each expert of each MoE layer got, over all rows, against its fair share.

    The fair share is the layer's assignments divided by its experts: 1 is perfectly balanced. Colours are those of the
    logarithm, so that half and double are as far from it; a cross marks an expert that got nothing.

    Args:
        load: what `read_expert_load` gives.
        png_path: the picture to write; it appears whole or not at all.

    Raises:
        ImportError: matplotlib is missing.
        ValueError: `load` has no rows.
    """
    canvas_class, figure_class = _matplotlib()
    if not load.steps:
        raise ValueError("`load` has no rows: the training never logged. Lower its `logging_steps`.")
    experts, layers = max(load.num_experts), len(load.layers)
    width, height = min(0.45, 11 / experts), max(0.14, min(0.32, 9 / layers))  # of a cell, in inches
    width = max(width, 4.5 / experts)
    figure = figure_class(figsize=(width * experts + 1.6, height * layers + 1.5), dpi=150, layout="constrained")
    axis = figure.subplots()
    image = _draw_cells(axis, load, width, height)
    size = {"aspect": 30, "shrink": min(1.0, 5 / (width * experts)), "pad": 0.1 / (height * layers)}
    bar = figure.colorbar(image, ax=axis, location="bottom", extend="both", **size)
    bar.set_ticks([-2, -1, 0, 1, 2], labels=["¼", "½", "1", "2", "4"])
    bar.ax.tick_params(colors=_PALE, labelsize=8, length=2.5)
    bar.set_label("assignments / fair share (1: balanced, ×: none)", color=_INK, fontsize=9)
    bar.outline.set_visible(False)
    figure.suptitle(f"Load of the experts up to step {load.steps[-1]}", fontsize=11, color=_INK, x=0.01, ha="left")
    _write(canvas_class(figure), Path(png_path))


def _matplotlib() -> tuple[Any, Any]:
    """The classes of a canvas and a figure that need no display.

    Raises:
        ImportError: matplotlib is missing.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
        from matplotlib.figure import Figure
    except ImportError as error:
        raise ImportError("The picture needs matplotlib: `pip install hf_moe[plots]`.") from error
    return FigureCanvasAgg, Figure


def _evenly(count: int, most: int) -> list[int]:
    """At most `most` of the indices 0 to count-1, evenly spaced, first and last among them."""
    if count <= most:
        return list(range(count))
    return [round(i * (count - 1) / (most - 1)) for i in range(most)]


def _coarser(load: ExpertLoad, most: int) -> ExpertLoad:
    """The same assignments in at most so many rows."""
    every = -(-len(load.steps) // most)
    first = np.arange(0, len(load.steps), every)
    last = np.minimum(first + every, len(load.steps)) - 1
    return replace(load, steps=[load.steps[row] for row in last], executed=np.add.reduceat(load.executed, first))


def _draw_layer(axis: Any, load: ExpertLoad, index: int, colors: list[Any]) -> None:
    experts = load.num_experts[index]
    counts_NE = load.executed[:, index, :experts]
    shares_NE = counts_NE / counts_NE.sum(axis=1, keepdims=True).clip(min=1)
    # a row holds the steps since the row before it, the first one those since step 0
    steps, shares_NE = [0, *load.steps], shares_NE[[0, *range(len(load.steps))]]
    edge = 0.6 if experts <= MAX_LINES else 0
    axis.stackplot(steps, shares_NE.T, colors=colors[:experts], edgecolor="white", linewidth=edge)
    if experts <= MAX_LINES:
        for boundary in range(1, experts):
            axis.axhline(boundary / experts, color=_INK, linewidth=0.8, linestyle=(0, (1, 2.5)))
    axis.set_title(f"layer {load.layers[index]}", fontsize=10, color=_INK, loc="left", pad=4)
    first, last = (shares_NE[row].max() * experts for row in (0, -1))
    axis.set_title(f"max/mean {first:.2f} → {last:.2f}", fontsize=8, color=_PALE, loc="right", pad=4)
    axis.set_xlim(steps[0], steps[-1])
    axis.xaxis.get_major_locator().set_params(integer=True, nbins=6)
    axis.set_ylim(0, 1)
    axis.set_yticks([0, 0.5, 1], ["0", "½", "1"])
    axis.tick_params(colors=_PALE, labelsize=8, length=2.5)
    for spine in axis.spines.values():
        spine.set_visible(False)


def _draw_cells(axis: Any, load: ExpertLoad, width: float, height: float) -> Any:
    """The heat map itself; a cell is so many inches large."""
    shares_LE = _fair_shares(load)
    octaves_LE = np.log2(np.maximum(shares_LE, 2.0**-9))
    image = axis.imshow(octaves_LE, cmap="RdBu_r", vmin=-2, vmax=2, aspect="auto", interpolation="nearest")
    layers, experts = shares_LE.shape
    for edges, cell, grid in (
        (np.arange(1, experts) - 0.5, width, axis.axvline),
        (np.arange(1, layers) - 0.5, height, axis.axhline),
    ):
        for edge in edges if cell > 0.1 else ():
            grid(edge, color="white", linewidth=0.5)
    dead = np.argwhere(shares_LE == 0)
    axis.scatter(dead[:, 1], dead[:, 0], marker="x", color="white", linewidth=0.6, s=min(20, 500 * min(width, height) ** 2))
    if width >= 0.3:
        for layer, expert in np.argwhere(shares_LE > 0):
            color = "white" if abs(octaves_LE[layer, expert]) > 1.2 else _INK
            text = f"{shares_LE[layer, expert]:.3g}" if shares_LE[layer, expert] >= 10 else f"{shares_LE[layer, expert]:.2f}"
            axis.text(expert, layer, text, color=color, fontsize=6.5, ha="center", va="center")
    every = next(step for step in (1, 2, 4, 8, 16, 32, 64, 128) if step * width >= 0.28)
    axis.set_xticks(range(0, experts, every))
    axis.set_yticks(range(layers), load.layers)
    axis.set_xlabel("expert", color=_INK, fontsize=9)
    axis.set_ylabel("layer", color=_INK, fontsize=9)
    right = axis.secondary_yaxis("right")
    right.set_yticks(range(layers), [f"{most:.2f}" if most else "–" for most in np.nanmax(shares_LE, axis=1)])
    right.set_ylabel("max/mean", color=_INK, fontsize=9)
    for one in (axis, right):
        one.tick_params(colors=_PALE, labelsize=7, length=2.5)
        for spine in one.spines.values():
            spine.set_visible(False)
    return image


def _fair_shares(load: ExpertLoad) -> np.ndarray:
    """What each expert got, divided by the mean of its layer, `[L, E]`; NaN where a layer has no such expert."""
    shares_LE = np.full((len(load.layers), max(load.num_experts)), np.nan)
    for row, counts in zip(shares_LE, load.totals(), strict=True):
        row[: len(counts)] = np.array(counts) * len(counts) / max(1, sum(counts))
    return shares_LE


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
