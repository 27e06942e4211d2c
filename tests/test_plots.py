# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""The pictures of expert load show the numbers that are in the file."""

import math
import sys
from pathlib import Path

import numpy as np
import pytest
from hf_moe.training.load_file import LOAD_FILE, ExpertLoad, ExpertLoadFile, read_expert_load
from hf_moe.training.plots import _coarser, _draw_cells, plot_expert_load, plot_load_heat_map
from matplotlib import colormaps
from matplotlib.figure import Figure
from matplotlib.image import imread


def drawn_load(rows: int, num_experts: list[int], seed: int = 0) -> ExpertLoad:
    """Random counts; in the last layer all assignments go to expert 0."""
    generator = np.random.default_rng(seed)
    executed_NLE = np.zeros((rows, len(num_experts), max(num_experts)), np.int64)
    for layer, experts in enumerate(num_experts):
        executed_NLE[:, layer, :experts] = generator.integers(1, 100, (rows, experts))
    executed_NLE[:, -1, 1:] = 0
    return ExpertLoad(
        [5 * row + 5 for row in range(rows)], executed_NLE, [2 * i + 1 for i in range(len(num_experts))], num_experts
    )


def write(load: ExpertLoad, path: Path) -> Path:
    file = ExpertLoadFile(path, load.layers, load.num_experts)
    file.keep(0)
    for step, executed in zip(load.steps, load.executed.tolist(), strict=True):
        file.append(step, [counts[:n] for counts, n in zip(executed, load.num_experts, strict=True)])
    return path


@pytest.mark.parametrize(("rows", "num_experts"), [(1, [2]), (7, [4, 8, 3]), (30, [20] * 7)])
def test_pictures_appear_whole(rows: int, num_experts: list[int], tmp_path: Path) -> None:
    load = drawn_load(rows, num_experts)
    plot_expert_load(write(load, tmp_path / LOAD_FILE), tmp_path / "new" / "bands.png")
    plot_load_heat_map(read_expert_load(tmp_path / LOAD_FILE), tmp_path / "new" / "map.png")
    assert sorted(path.name for path in (tmp_path / "new").iterdir()) == ["bands.png", "map.png"]
    for name in ("bands.png", "map.png"):
        pixels = imread(tmp_path / "new" / name)
        assert pixels.shape[1] <= 2000
        assert len(np.unique(pixels.reshape(-1, pixels.shape[2]), axis=0)) > 20


@pytest.mark.parametrize("num_experts", [[2], [256], [2] * 64, [3, 8, 5]])
def test_heat_map_shows_the_load(num_experts: list[int]) -> None:
    """Cells, colours, numbers, crosses and names of the axes, against a plain loop."""
    load = drawn_load(3, num_experts)
    axis = Figure().subplots()
    width = 0.5 if max(num_experts) <= 8 else 0.05
    image = _draw_cells(axis, load, width=width, height=0.2)
    texts, dead, most = {}, [], []
    for row, (experts, counts) in enumerate(zip(num_experts, load.totals(), strict=True)):
        shares = [count / (sum(counts) / experts) for count in counts]
        most.append(f"{max(shares):.2f}")
        for expert, share in enumerate(shares):
            if share:
                assert image.get_array()[row, expert] == pytest.approx(math.log2(share), abs=1e-12)
                texts[expert, row] = share
            else:
                dead.append([expert, row])
        assert np.ma.getmaskarray(image.get_array())[row, experts:].all()
    (crosses,) = axis.collections
    assert crosses.get_offsets().tolist() == dead
    shown = {text.get_position(): float(text.get_text()) for text in axis.texts}
    assert shown == (pytest.approx(texts, abs=0.0051) if width > 0.3 else {})
    assert [label.get_text() for label in axis.get_yticklabels()] == [str(layer) for layer in load.layers]
    (right,) = axis.child_axes
    assert [label.get_text() for label in right.get_yticklabels()] == most
    fair, half, double = image.to_rgba(np.array([0.0, -1.0, 1.0]))
    assert min(fair[:3]) > 0.95
    assert half[2] > half[0] + 0.3
    assert double[0] > double[2] + 0.3
    assert image.cmap.name == colormaps["RdBu_r"].name


def test_a_layer_without_assignments() -> None:
    load = ExpertLoad([1], np.array([[[0, 0], [1, 3]]]), [0, 1], [2, 2])
    axis = Figure().subplots()
    _draw_cells(axis, load, width=0.5, height=0.3)
    assert axis.collections[0].get_offsets().tolist() == [[0, 0], [1, 0]]
    assert [label.get_text() for label in axis.child_axes[0].get_yticklabels()] == ["–", "1.50"]


@pytest.mark.parametrize(("rows", "most"), [(1, 4), (4, 4), (5, 4), (11, 4), (100, 7)])
def test_many_rows_are_added_up(rows: int, most: int) -> None:
    load = drawn_load(rows, [4, 3])
    coarse = _coarser(load, most)
    assert len(coarse.steps) <= most
    if rows <= most:
        assert coarse.steps == load.steps
    previous = 0
    for step, executed in zip(coarse.steps, coarse.executed, strict=True):
        inside = [index for index, each in enumerate(load.steps) if previous < each <= step]
        np.testing.assert_array_equal(executed, sum(load.executed[index] for index in inside))
        previous = step
    assert previous == load.steps[-1]


def test_what_cannot_be_drawn(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    empty = write(drawn_load(0, [2]), tmp_path / LOAD_FILE)
    picture = tmp_path / "picture.png"
    with pytest.raises(ValueError, match=r"has no rows.*`logging_steps`"):
        plot_expert_load(empty, picture)
    with pytest.raises(ValueError, match=r"has no rows.*`logging_steps`"):
        plot_load_heat_map(read_expert_load(empty), picture)
    with pytest.raises(FileNotFoundError):
        plot_expert_load(tmp_path / "nowhere", picture)
    (tmp_path / "other").write_text('{"step": 1}')
    with pytest.raises(ValueError, match="not a whole safetensors file"):
        plot_expert_load(tmp_path / "other", picture)
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    for draw in (lambda: plot_expert_load(empty, picture), lambda: plot_load_heat_map(drawn_load(1, [2]), picture)):
        with pytest.raises(ImportError, match=r"pip install hf_moe\[plots\]"):
            draw()
    assert not picture.exists()
