# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""The file of expert load against a plain list: whatever is done to it, wherever it is killed, whoever reads it meanwhile."""

import json
import multiprocessing
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import tracemalloc
from collections.abc import Callable, Iterator
from pathlib import Path
from types import FrameType
from typing import Any

import numpy as np
import pytest
import safetensors.numpy
import safetensors.torch
import torch
from hf_moe.training import load_file as module
from hf_moe.training.load_file import LOAD_FILE, ExpertLoadFile, read_expert_load
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import end_after
from safetensors import safe_open

LAYERS, NUM_EXPERTS = [1, 3, 4], [2, 5, 3]
Rows = list[tuple[int, list[list[int]]]]
CHILD_S = 120
FORK = multiprocessing.get_context("fork") if hasattr(os, "fork") else None


def counts_at(step: int, num_experts: list[int]) -> list[list[int]]:
    """Other numbers for every step, layer and expert."""
    return [[(step * 7919 + 31 * layer + expert) % 10**9 for expert in range(n)] for layer, n in enumerate(num_experts)]


def rows_of(path: Path) -> Rows:
    """The rows as the official reader gives them, without the padding."""
    tensors = safetensors.numpy.load_file(path)
    with safe_open(path, framework="np") as file:
        num_experts = json.loads(file.metadata()["num_experts"])
    executed = [[counts[:n] for counts, n in zip(row, num_experts, strict=True)] for row in tensors["executed"].tolist()]
    return list(zip(tensors["step"].tolist(), executed, strict=True))


def row(step: int, num_experts: list[int] = NUM_EXPERTS) -> tuple[int, list[list[int]]]:
    return step, counts_at(step, num_experts)


def written(path: Path, steps: list[int], layers: list[int] = LAYERS, num_experts: list[int] = NUM_EXPERTS) -> ExpertLoadFile:
    file = ExpertLoadFile(path, layers, num_experts)
    file.keep(0)
    for step in steps:
        file.append(*row(step, num_experts))
    return file


@pytest.fixture
def small(monkeypatch: pytest.MonkeyPatch) -> None:
    """Space is used up after a few rows, and rows are copied in several pieces."""
    monkeypatch.setattr(module, "RESERVED_STEPS", 3)
    monkeypatch.setattr(module, "_CHUNK", 250)


# ---------------------------------------------------------------------- what is in it


@pytest.mark.parametrize("rows", [0, 1, 5])
@pytest.mark.parametrize(("layers", "num_experts"), [(LAYERS, NUM_EXPERTS), ([0], [1]), (list(range(60)), [256] * 60)])
def test_every_reader_reads_it(layers: list[int], num_experts: list[int], rows: int, tmp_path: Path) -> None:
    """numpy and torch, during training and after it; then nothing but the two tensors and the one file is left."""
    path = tmp_path / "run" / LOAD_FILE
    steps = [10 * i + 10 for i in range(rows)]
    file = written(path, steps, layers, num_experts)
    expected = np.zeros((rows, len(layers), max(num_experts)), np.int64)
    for index, step in enumerate(steps):
        for layer, counts in enumerate(counts_at(step, num_experts)):
            expected[index, layer, : len(counts)] = counts
    for finished in (False, True):
        if finished:
            file.finish()
        tensors, torch_tensors = safetensors.numpy.load_file(path), safetensors.torch.load_file(path)
        assert set(tensors) == set(torch_tensors) == {"step", "executed"} | (set() if finished else {"_reserved_step"})
        for name, value in (("step", np.array(steps, np.int64)), ("executed", expected)):
            assert tensors[name].dtype == np.int64
            np.testing.assert_array_equal(tensors[name], value)
            assert torch.equal(torch_tensors[name], torch.from_numpy(value))
        load = read_expert_load(path)
        assert (load.steps, load.layers, load.num_experts) == (steps, layers, num_experts)
        np.testing.assert_array_equal(load.executed, expected)
        assert load.totals() == [expected[:, layer, :n].sum(0).tolist() for layer, n in enumerate(num_experts)]
    assert [entry.name for entry in path.parent.iterdir()] == [LOAD_FILE]
    assert path.stat().st_size < 1500 + 8 * rows + expected.nbytes


def test_numbers_keep_their_place_however_long(tmp_path: Path) -> None:
    """The largest counts and steps, and a header whose numbers get longer with every row."""
    most = 2**63 - 1
    file = ExpertLoadFile(tmp_path / LOAD_FILE, [0], [2])
    rows = [(step, [[most, step]]) for step in (1, 10**6, 10**12, most)]
    for one in rows:
        file.append(*one)
        assert rows_of(tmp_path / LOAD_FILE) == rows[: rows.index(one) + 1]


# ---------------------------------------------------------------------- a plain list as the oracle

ACTIONS = st.one_of(
    st.tuples(st.just("append"), st.integers(1, 12)),
    st.tuples(st.just("keep"), st.integers(0, 60)),
    st.tuples(st.just("finish"), st.just(0)),
    st.tuples(st.just("reopen"), st.just(0)),
    st.tuples(st.just("finish and reopen"), st.just(0)),
)


@pytest.mark.usefixtures("small")
@settings(max_examples=80, deadline=None)
@given(st.lists(ACTIONS, max_size=12), st.sampled_from([(LAYERS, NUM_EXPERTS), ([0, 1], [4, 4])]), st.booleans())
def test_any_sequence(actions: list[tuple[str, int]], sizes: tuple[list[int], list[int]], hard_links: bool) -> None:
    with tempfile.TemporaryDirectory() as folder, pytest.MonkeyPatch.context() as patch:
        if not hard_links:
            patch.setattr(module.os, "link", refuse)
        path, oracle = Path(folder) / LOAD_FILE, Rows()
        file = ExpertLoadFile(path, *sizes)
        file.keep(0)
        for action, number in actions:
            last = oracle[-1][0] if oracle else 0
            for step in range(last + number, last + 2 * number) if action == "append" else ():
                oracle.append(row(step, sizes[1]))
                file.append(*oracle[-1])
                assert rows_of(path) == oracle
            if action == "keep":
                oracle = [one for one in oracle if one[0] <= number] if number else []
                file.keep(number)
            if "finish" in action:
                file.finish()
            if "reopen" in action:
                file = ExpertLoadFile(path, *sizes)
            assert rows_of(path) == oracle
        file.keep(10**6)
        file.finish()
        assert rows_of(path) == oracle
        assert os.listdir(folder) == [LOAD_FILE]


def refuse(*args: Any, **kwargs: Any) -> None:
    raise PermissionError("no hard links here")


# ---------------------------------------------------------------------- keep


def test_keep_at_step_0_begins_anew(tmp_path: Path) -> None:
    """Rows of an earlier training of any model are dropped; what is not ours is never lost."""
    path = tmp_path / LOAD_FILE
    for content in (None, b"", b"no safetensors", safetensors.numpy.save({"weight": np.ones(3)}), b"also none"):
        if content is not None:
            path.write_bytes(content)
        written(path, [4, 8]).finish()
        assert rows_of(path) == [row(4), row(8)]
    written(path, [5], [0], [7])
    assert rows_of(path) == [row(5, [7])]
    kept = {entry.name: entry.read_bytes() for entry in tmp_path.iterdir() if ".old" in entry.name}
    assert list(map(kept.get, ("", "1", "2", "3"))) == [None] * 4
    assert [kept[f"{LOAD_FILE}.old{number}"] for number in ("", "1", "3")] == [b"", b"no safetensors", b"also none"]
    assert len(kept) == 4


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: written(path, [4], [0], [7]), r"layers \[0\] with \[7\] experts, but the model has \[1, 3, 4\]"),
        (lambda path: written(path, [4], LAYERS, [5, 5, 5]).finish(), r"with \[5, 5, 5\] experts, but .* with \[2, 5, 3\]"),
        (lambda path: path.write_bytes(b"none"), "not a whole safetensors file"),
    ],
)
def test_keep_of_what_does_not_fit(make: Callable[[Path], Any], message: str, tmp_path: Path) -> None:
    """A resumed training says so, and leaves the file as it is."""
    path = tmp_path / LOAD_FILE
    make(path)
    before = path.read_bytes()
    for begin in (lambda file: file.keep(4), lambda file: file.append(*row(8))):
        with pytest.raises(ValueError, match=message) as error:
            begin(ExpertLoadFile(path, LAYERS, NUM_EXPERTS))
        assert "\n" not in str(error.value)
        assert LOAD_FILE in str(error.value)
        assert path.read_bytes() == before


def test_finish_without_a_beginning_does_nothing(tmp_path: Path) -> None:
    ExpertLoadFile(tmp_path / LOAD_FILE, LAYERS, NUM_EXPERTS).finish()
    assert not list(tmp_path.iterdir())


# ---------------------------------------------------------------------- what is refused


@pytest.mark.parametrize(
    ("step", "executed", "error", "message"),
    [
        (8, counts_at(8, NUM_EXPERTS), ValueError, "`step`=8 must be later than 8"),
        (9, counts_at(9, [2, 5]), ValueError, r"`executed` has layers of \[2, 5\] experts, but .* is of \[2, 5, 3\]"),
        (9, counts_at(9, [2, 5, 4]), ValueError, r"\[2, 5, 4\]"),
        (9, [[0, 1], [0, -1, 0, 0, 0], [0, 0, 0]], ValueError, "negative count at step 9"),
        (9, [[0, 1], [0, 1.5, 0, 0, 0], [0, 0, 0]], TypeError, "float"),
        (9, [[0, 2**63], [0, 0, 0, 0, 0], [0, 0, 0]], OverflowError, "int"),
    ],
)
def test_rows_that_do_not_fit(step: int, executed: list, error: type[Exception], message: str, tmp_path: Path) -> None:
    file = written(tmp_path / LOAD_FILE, [4, 8])
    with pytest.raises(error, match=message):
        file.append(step, executed)
    assert rows_of(tmp_path / LOAD_FILE) == [row(4), row(8)]
    file.append(*row(12))
    assert rows_of(tmp_path / LOAD_FILE) == [row(4), row(8), row(12)]


@pytest.mark.parametrize(("layers", "num_experts"), [([], []), ([0, 1], [2]), ([0], [0])])
def test_sizes_that_do_not_fit(layers: list[int], num_experts: list[int], tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`layers`=.* and `num_experts`="):
        ExpertLoadFile(tmp_path / LOAD_FILE, layers, num_experts)


@pytest.mark.parametrize("call", range(2))
def test_a_failing_disk(call: int, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Whichever of the renames fails, the file is whole with or without the row, and the next one is added as usual."""
    path = tmp_path / LOAD_FILE
    file = written(path, [4, 8])
    calls: list[Any] = []

    def failing(function: Callable[..., None]) -> Callable[..., None]:
        def work(*args: Any) -> None:
            calls.append(args)
            if len(calls) == call + 1:
                raise OSError("No space left on device")
            function(*args)

        return work

    monkeypatch.setattr(module.os, "replace", failing(os.replace))
    with pytest.raises(OSError, match="No space left"):
        file.append(*row(12))
    done = rows_of(path)
    assert done in ([row(4), row(8)], [row(4), row(8), row(12)])
    file.append(*row(16))
    assert rows_of(path) == [*done, row(16)]


VALID: dict[str, Any] = {
    "step": np.array([4, 8]),
    "executed": np.array([[[1, 2, 0], [3, 4, 5]]] * 2),
    "metadata": {"format": module.LOAD_FORMAT, "layers": "[0, 2]", "num_experts": "[2, 3]"},
}


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"metadata": None}, "`format`=None is not 'hf_moe expert load 1'"),
        ({"metadata": {"format": "other"}}, "`format`='other'"),
        ({"metadata": {"format": module.LOAD_FORMAT}}, "incomplete"),
        ({"layers": "[0, 2"}, "incomplete"),
        ({"layers": "3"}, "incomplete"),
        ({"layers": "[]", "num_experts": "[]"}, "incomplete"),
        ({"step": None}, "incomplete"),
        ({"executed": None}, "incomplete"),
        ({"layers": "[0, 2, 3]"}, "not of its `layers` and `num_experts`"),
        ({"num_experts": "[2, 4]"}, "not of its"),
        ({"num_experts": "[0, 3]"}, "not of its"),
        ({"num_experts": "[2.0, 3]"}, "not of its"),
        ({"step": np.array([4])}, "not of its"),
        ({"step": np.array([4, 8], np.int32)}, "not of its"),
        ({"executed": VALID["executed"].astype(np.float64)}, "not of its"),
        ({"step": np.array([8, 8])}, "`step` is not ascending"),
        ({"executed": -VALID["executed"]}, "negative counts"),
        ({"executed": np.ones_like(VALID["executed"])}, "experts that are not there"),
    ],
)
def test_reading_what_is_none(changes: dict[str, Any], message: str, tmp_path: Path) -> None:
    """The file is one before the change, and none after it."""
    path = tmp_path / LOAD_FILE
    for content in (VALID, {**VALID, **changes}):
        tensors = {name: content[name] for name in ("step", "executed") if content[name] is not None}
        metadata = content["metadata"]
        if metadata == VALID["metadata"]:
            metadata = {**metadata, **{name: content[name] for name in ("layers", "num_experts") if name in content}}
        safetensors.numpy.save_file(tensors, path, metadata)
        if content is VALID:
            assert read_expert_load(path).totals() == [[2, 4], [6, 8, 10]]
    with pytest.raises(ValueError, match=message) as error:
        read_expert_load(path)
    assert str(error.value).startswith(str(path))
    assert "\n" not in str(error.value)
    assert str(error.value).endswith("give the expert_load.safetensors of a training.")


def test_a_file_that_is_cut_off_or_missing(tmp_path: Path) -> None:
    path = tmp_path / LOAD_FILE
    written(path, [4, 8]).finish()
    whole = path.read_bytes()
    for length in {0, 5, 8, 100, len(whole) - 8, len(whole) - 1}:
        path.write_bytes(whole[:length])
        with pytest.raises(ValueError, match="not a whole safetensors file"):
            read_expert_load(path)
    with pytest.raises(FileNotFoundError):
        read_expert_load(tmp_path / "nowhere")


# ---------------------------------------------------------------------- kills


def at_every_line(work: Callable[[], None], look: Callable[[], None]) -> int:
    """Look before each line of `load_file.py` that the work runs; how many they were."""
    lines = 0

    def trace(frame: FrameType, event: str, argument: Any) -> Any:
        nonlocal lines
        if frame.f_code.co_filename != module.__file__:
            return None
        if event == "line":
            lines += 1
            look()
        return trace

    before = sys.gettrace()
    sys.settrace(trace)
    try:
        work()
    finally:
        sys.settrace(before)
    return lines


@pytest.mark.parametrize("hard_links", [True, False])
@pytest.mark.parametrize("task", ["append", "append where space is used up", "keep", "finish"])
@pytest.mark.usefixtures("small")
def test_a_kill_at_every_line(task: str, hard_links: bool, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A kill leaves what is on disk at that moment: a file with or without the change, and the next training goes on with it.

    Where there are no hard links, the file may have no name until then.
    """
    if not hard_links:
        monkeypatch.setattr(module.os, "link", refuse)
    path = tmp_path / "run" / LOAD_FILE
    steps = [1, 2, 3] if "used up" in task else [1, 2]
    file = written(path, steps)
    before = [row(step) for step in steps]
    added = row(steps[-1] + 1)
    after = {"keep": before[:1], "finish": before}.get(task, [*before, added])
    work = {"keep": lambda: file.keep(1), "finish": file.finish}.get(task, lambda: file.append(*added))
    found = []

    def look() -> None:
        if hard_links:
            assert rows_of(path) in (before, after)
        copy = tmp_path / "copy"
        shutil.copytree(path.parent, copy)
        resumed = ExpertLoadFile(copy / LOAD_FILE, LAYERS, NUM_EXPERTS)
        resumed.append(*row(99))
        found.append(rows_of(copy / LOAD_FILE)[:-1])
        resumed.finish()
        assert os.listdir(copy) == [LOAD_FILE]
        shutil.rmtree(copy)

    assert at_every_line(work, look) > 10
    look()
    assert found[0] == before
    assert found[-1] == after
    switch = next(index for index, rows in enumerate(found) if rows == after)
    assert found == [before] * switch + [after] * (len(found) - switch)


def child(work: Callable[[], None]) -> multiprocessing.process.BaseProcess:
    assert FORK is not None

    def limited() -> None:
        end_after(CHILD_S)
        work()

    process = FORK.Process(target=limited, daemon=True)
    process.start()
    return process


@pytest.mark.skipif(FORK is None, reason="needs fork")
@pytest.mark.usefixtures("small")
def test_kills_at_any_time(tmp_path: Path) -> None:
    """Twenty trainings after another are killed while they append without a pause; each goes on with a part of the rows."""
    assert FORK is not None
    path, chance = tmp_path / LOAD_FILE, random.Random(0)
    done = FORK.RawValue("q", 0)  # without a lock, which a process killed while it has it would keep for ever
    kept = 0
    for _ in range(20):

        def work(kept: int = kept) -> None:
            file = ExpertLoadFile(path, LAYERS, NUM_EXPERTS)
            file.keep(kept)
            while True:
                file.append(*row(kept + 1))
                kept += 1
                done.value = kept

        done.value = kept
        process = child(work)
        while done.value == kept and process.is_alive():
            time.sleep(0.001)
        time.sleep(chance.random() * 0.05)
        os.kill(process.pid or 0, signal.SIGKILL)
        process.join()
        rows = rows_of(path)
        assert rows == [row(step) for step in range(1, len(rows) + 1)]
        assert done.value <= len(rows) <= done.value + 1
        assert read_expert_load(path).steps == [step for step, _ in rows]
        kept = chance.randint(1, len(rows))


# ---------------------------------------------------------------------- other processes, memory


@pytest.fixture
def writer(tmp_path: Path) -> Iterator[Path]:
    """A process that appends a row every 10 ms."""
    if FORK is None:
        pytest.skip("needs fork")

    def work() -> None:
        file = written(tmp_path / LOAD_FILE, [])
        for step in range(1, 10**6):
            file.append(*row(step))
            time.sleep(0.01)

    process = child(work)
    while not (tmp_path / LOAD_FILE).exists() and process.is_alive():
        time.sleep(0.01)
    yield tmp_path / LOAD_FILE
    assert process.is_alive()
    process.kill()
    process.join()


def test_readers_meanwhile(writer: Path) -> None:
    """Every reader finds whole rows, never fewer than before; what torch has mapped does not change any more."""
    last, mapped, until = 0, [], time.monotonic() + 3
    while time.monotonic() < until or (last < 20 and time.monotonic() < until + CHILD_S):
        for reader in (rows_of, read_expert_load, safetensors.torch.load_file):
            try:
                found = reader(writer)
            except Exception:  # held up for two rows between opening the file and reading its header; never twice
                found = reader(writer)
            if isinstance(found, list):
                assert found == [row(step) for step in range(1, len(found) + 1)]
                assert len(found) >= last
                last = len(found)
            elif isinstance(found, dict):
                mapped = [*mapped[-50:], found]
            else:
                assert found.steps == list(range(1, len(found.steps) + 1))
    assert last >= 20
    for tensors in mapped:
        steps, executed = (tensors[name].tolist() for name in ("step", "executed"))
        assert steps == list(range(1, len(steps) + 1))
        assert [[counts[:n] for counts, n in zip(one, NUM_EXPERTS, strict=True)] for one in executed] == [
            counts_at(step, NUM_EXPERTS) for step in steps
        ]


def test_memory_does_not_grow(tmp_path: Path) -> None:
    """Neither with rows that are there, nor when all of them are copied."""
    layers, num_experts = list(range(16)), [64] * 16
    file = written(tmp_path / LOAD_FILE, list(range(1, 101)), layers, num_experts)
    counts = counts_at(0, num_experts)
    tracemalloc.start()
    try:
        for step in range(101, 801):
            file.append(step, counts)
            if step == 200:
                before = tracemalloc.get_traced_memory()[0]
                tracemalloc.reset_peak()
        now, peak = tracemalloc.get_traced_memory()
        assert now - before < 5_000
        assert peak - before < 100_000
        file.finish()
        assert (tmp_path / LOAD_FILE).stat().st_size > 5_000_000
        assert tracemalloc.get_traced_memory()[1] - before < 4_000_000
    finally:
        tracemalloc.stop()
