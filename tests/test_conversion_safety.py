# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Conversions that are stopped, starved of disk, or fed damaged sources: the destination is absent or complete.

Processes are really killed: after random delays, at random lines of the journal, and before each of their changes to the disk.
"""

from __future__ import annotations

import contextlib
import errno
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
import traceback
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_moe.conversion import ConversionError, UnfinishedConversionError, upcycle
from hf_moe.conversion.checkpoint_writer import workspace_of
from ranks import end_after
from sources import (
    COMMAND,
    dense_model,
    edit_json,
    refusal,
    restore,
    run_command,
    same_tensors,
    save_tokenizer,
    stored_tensors,
    tree,
)
from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

LAYERS = 12
RECIPE: dict[str, Any] = {"num_experts": 4, "verify": False, "max_shard_size": 60_000}
PROMPTS = [["the cat"], ["a dog ran", "red"], ["two"], ["in the house"]]
TEXT = ["the cat sat on the mat and the dog ran in", "one two three", "a red house and a blue mat"]
TURNS = 40  # after which what is always "faster" is taken for a fault
CHILD_S, COMMAND_S, POLL_S = 120, 300, 0.0005
CHANGES = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "open")  # audit events


@pytest.fixture(scope="module")
def dense(tmp_path_factory) -> Path:
    """A llama of many small layers in several files, with a tokenizer. No test changes it."""
    folder = tmp_path_factory.mktemp("source") / "dense"
    torch.manual_seed(0)
    config = LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=LAYERS, num_attention_heads=2, vocab_size=32,
                         max_position_embeddings=64)  # fmt: skip
    AutoModelForCausalLM.from_config(config).save_pretrained(folder, max_shard_size="60KB")
    save_tokenizer(folder)
    before = tree(folder)
    return_times = {path: path.stat().st_mtime_ns for path in folder.iterdir()}
    yield folder  # type: ignore[misc]
    assert tree(folder) == before
    assert {path: path.stat().st_mtime_ns for path in folder.iterdir()} == return_times


# ---------------------------------------------------------------------- processes that are killed


def start(work: Callable[[], Any], log: Path) -> int:
    """Run `work` in a child process; returns its id."""
    child = os.fork()
    if child:
        return child
    try:
        with open(log, "w") as file:
            os.dup2(file.fileno(), 2)
            end_after(CHILD_S)
            try:
                work()
            except BaseException:
                traceback.print_exc()
                file.flush()
                os._exit(1)
    finally:
        os._exit(0)


def ended(child: int) -> int | None:
    """What a child process ended with (negative: the signal), or `None` while it runs."""
    found, status = os.waitpid(child, os.WNOHANG)
    return os.waitstatus_to_exitcode(status) if found else None


def kill_when(child: int, ready: Callable[[], bool], how: int = signal.SIGKILL) -> int:
    """Send a signal once `ready`; returns what the process ended with (0: it was faster)."""
    while not ready():
        if (status := ended(child)) is not None:
            return status
        time.sleep(POLL_S)  # the child needs the processor
    os.kill(child, how)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def lines_written(destination: Path, lines: int) -> Callable[[], bool]:
    """Whether the journal of a conversion tells of so many groups of tensors."""
    journal = workspace_of(destination) / "journal"

    def ready() -> bool:
        with contextlib.suppress(FileNotFoundError):
            return journal.read_bytes().count(b"done\n") >= lines
        return False

    return ready


def dies_at(change: int, place: Path, work: Callable[[], Any]) -> Callable[[], Any]:
    """`work`, killed before its n-th change to what is below `place`."""

    def run() -> None:
        left = change
        pwrite = os.pwrite

        def count() -> None:
            nonlocal left
            left -= 1
            if left < 0:
                os.kill(os.getpid(), signal.SIGKILL)

        def hook(event: str, arguments: tuple[Any, ...]) -> None:
            if event in CHANGES and (event == "os.truncate" or str(arguments[0]).startswith(str(place))):
                count()

        def counted_pwrite(*arguments: Any) -> int:
            count()
            return pwrite(*arguments)

        os.pwrite = counted_pwrite  # type: ignore[assignment]
        sys.addaudithook(hook)  # cannot be removed, but this is a process of its own
        work()

    return run


def stop_half_way(change: int, place: Path, work: Callable[[], Any]) -> None:
    """Run `work` in a child process that is killed before its n-th change."""
    log = place.with_name("half.log")
    assert kill_when(start(dies_at(change, place, work), log), lambda: False) == -signal.SIGKILL, log.read_text()


def passed(seconds: float) -> Callable[[], bool]:
    end = time.monotonic() + seconds
    return lambda: time.monotonic() >= end


def expected_tree(source: Any, destination: Path, **fields: Any) -> dict[str, str]:
    """What an undisturbed run writes there; it is removed again."""
    upcycle(source, destination, **fields)
    found = tree(destination)
    shutil.rmtree(destination)
    return found


def check_after_kill(destination: Path, expected: dict[str, str]) -> None:
    """Absent or complete; and nothing that is unfinished can be loaded."""
    if destination.exists():
        assert tree(destination) == expected
    workspace = workspace_of(destination)
    folders = [path for path in (workspace, workspace / "checkpoint", workspace / "memo") if path.is_dir()]
    for folder in folders:
        if folder.name == "checkpoint" and (folder / "config.json").exists():  # the very last step but one
            assert tree(folder) == expected
            continue
        with pytest.raises((OSError, ValueError)):
            AutoConfig.from_pretrained(folder)
        with pytest.raises((OSError, ValueError)):
            AutoModelForCausalLM.from_pretrained(folder)


def check_finish(source: Any, destination: Path, expected: dict[str, str], **fields: Any) -> None:
    """A run that is not stopped ends with what one alone would have written."""
    upcycle(source, destination, **fields)
    assert tree(destination) == expected
    assert not workspace_of(destination).exists()


METHODS: dict[str, dict[str, Any]] = {
    "copy": {},
    "cast": {"dtype": "bfloat16", "num_shared_experts": 1},
    "noise": {"method": "noise"},
    "drop": {"method": "drop"},
    "granular": {"method": "granular", "num_experts": 4},
    "random": {"method": "split"},
    "clustered": {"method": "split", "assignment": "clustered"},
    "coactivation": {"method": "split", "assignment": "coactivation", "text": TEXT},
    "prompts": {"router_init": "prompts", "router_prompts": PROMPTS},
}


@pytest.mark.parametrize("name", METHODS)
def test_kills_while_writing(name: str, dense: Path, tmp_path: Path) -> None:
    """One to three kills at random points, then a run to the end; 4 times. Random parts stay the same."""
    fields = {**RECIPE, **METHODS[name]}
    destination = tmp_path / "moe"
    expected = expected_tree(dense, destination, **fields)
    draw = random.Random(name)
    for _ in range(4):
        stop_half_way(draw.randrange(100), tmp_path, lambda: upcycle(dense, destination, **fields))
        check_after_kill(destination, expected)
        for _ in range(draw.randint(0, 2)):
            child = start(lambda: upcycle(dense, destination, **fields), tmp_path / "log")
            status = kill_when(child, lines_written(destination, draw.randrange(1, 150)))
            assert status in (0, -signal.SIGKILL), (tmp_path / "log").read_text()
            check_after_kill(destination, expected)
        check_finish(dense, destination, expected, **fields)
        shutil.rmtree(destination)


def test_kills_after_random_delays(dense: Path, tmp_path: Path) -> None:
    """From before the workspace is made to after it is gone."""
    destination = tmp_path / "moe"
    began = time.monotonic()
    expected = expected_tree(dense, destination, **RECIPE)
    whole = time.monotonic() - began
    draw = random.Random(1)
    statuses = []
    for _ in range(20):
        child = start(lambda: upcycle(dense, destination, **RECIPE), tmp_path / "log")
        statuses.append(kill_when(child, passed(draw.uniform(0, 1.2 * whole))))
        check_after_kill(destination, expected)
        if draw.random() < 0.5:
            check_finish(dense, destination, expected, **RECIPE)
            shutil.rmtree(destination)
    assert statuses.count(-signal.SIGKILL) >= 4
    assert set(statuses) <= {0, -signal.SIGKILL}


def kill_before_every_change(
    place: Path, work: Callable[[], Any], check: Callable[[], Any], draw: random.Random, most: int
) -> int:
    """All of the first and last changes and some between; returns how many kills there were."""
    number = kills = 0
    while True:
        child = start(dies_at(number, place, work), place.with_suffix(".log"))
        status = kill_when(child, lambda: False)
        check()
        if status == 0:
            return kills
        assert status == -signal.SIGKILL, place.with_suffix(".log").read_text()
        kills += 1
        number += 1 if number < 12 else draw.randint(1, most)


def test_kill_before_every_change_to_the_disk(dense: Path, tmp_path: Path) -> None:
    """A run that is killed before one of its changes, and a second that goes on."""
    place = tmp_path / "place"
    destination = place / "moe"
    fields = {**RECIPE, "layers": [0, 1], "max_shard_size": "1GB"}
    expected = expected_tree(dense, destination, **fields)

    def check() -> None:
        check_after_kill(destination, expected)
        check_finish(dense, destination, expected, **fields)
        shutil.rmtree(destination)

    assert kill_before_every_change(place, lambda: upcycle(dense, destination, **fields), check, random.Random(2), 14) >= 20


def test_the_last_changes_to_the_disk(dense: Path, tmp_path: Path) -> None:
    """Killed at the renaming, and while the workspace is removed: what was reached counts, and what is left over goes."""
    place = tmp_path / "place"
    destination = place / "moe"
    fields = {**RECIPE, "layers": [0], "max_shard_size": "1GB"}
    expected = expected_tree(dense, destination, **fields)

    def stopped(event_name: str, last: str) -> Callable[[], None]:
        def run() -> None:
            def hook(event: str, arguments: tuple[Any, ...]) -> None:
                if event == event_name and str(arguments[0]).endswith(last):
                    os.kill(os.getpid(), signal.SIGKILL)

            sys.addaudithook(hook)
            upcycle(dense, destination, **fields)

        return run

    reached = []
    for event, last in (("os.rename", "config.json.unfinished"), ("os.rename", "/checkpoint"), ("os.remove", "lock"),
                        ("os.rmdir", ".unfinished")):  # fmt: skip
        assert kill_when(start(stopped(event, last), tmp_path / "log"), lambda: False) == -signal.SIGKILL
        reached.append(destination.exists())
        check_after_kill(destination, expected)
        assert workspace_of(destination).exists()
        check_finish(dense, destination, expected, **fields)
        shutil.rmtree(destination)
    assert reached == [False, False, True, True]


def test_another_job_in_between(dense: Path, tmp_path: Path) -> None:
    """A is killed, B is killed before any of its changes (also while it clears A's remains away), then A runs to the end."""
    place = tmp_path / "place"
    destination = place / "moe"
    fields = {**RECIPE, "layers": [0, 1]}
    other = {**fields, "seed": 5, "num_experts": 3}
    expected, expected_other = (expected_tree(dense, destination, **f) for f in (fields, other))

    def half() -> None:
        stop_half_way(45, place, lambda: upcycle(dense, destination, **fields))

    def check() -> None:
        if destination.exists():
            assert tree(destination) == expected_other
            shutil.rmtree(destination)
        check_finish(dense, destination, expected, **fields)
        shutil.rmtree(destination)
        half()

    half()
    assert kill_before_every_change(place, lambda: upcycle(dense, destination, **other), check, random.Random(3), 25) >= 15


@pytest.mark.parametrize("changed", ["recipe", "seed", "shards", "source"])
def test_stale_files_never_mix_in(changed: str, dense: Path, tmp_path: Path) -> None:
    """After a kill another job, or the same of a changed source, starts anew."""
    source = Path(shutil.copytree(dense, tmp_path / "dense"))
    destination = tmp_path / "moe"
    fields = {**RECIPE, "max_shard_size": 20_000}
    stop_half_way(200, tmp_path, lambda: upcycle(source, destination, **fields))
    more = {"recipe": {"num_experts": 3}, "seed": {"seed": 1}, "shards": {"max_shard_size": "1GB"}}.get(changed, {})
    if changed == "source":
        path = next(source.glob("*1-of-*.safetensors"))
        data = bytearray(path.read_bytes())
        data[-4:] = data[-8:-4]
        path.write_bytes(data)
    elsewhere = tmp_path / "elsewhere" / "moe"
    upcycle(source, elsewhere, **{**fields, **more})
    upcycle(source, destination, **{**fields, **more})
    assert tree(destination).keys() == tree(elsewhere).keys()
    for file in destination.glob("*.safetensors"):
        assert file.read_bytes() == (elsewhere / file.name).read_bytes()
    assert not workspace_of(destination).exists()


def test_a_second_run_goes_on(dense: Path, tmp_path: Path, monkeypatch) -> None:
    """It does not write again what is there."""
    destination = tmp_path / "moe"
    stop_half_way(180, tmp_path, lambda: upcycle(dense, destination, **RECIPE))
    written = 0
    pwrite = os.pwrite

    def counted(handle: int, data: Any, offset: int) -> int:
        nonlocal written
        written += len(data)
        return pwrite(handle, data, offset)

    monkeypatch.setattr(os, "pwrite", counted)
    upcycle(dense, destination, **RECIPE)
    again = written
    written = 0
    upcycle(dense, tmp_path / "other", **RECIPE)
    assert again < 0.7 * written


@pytest.mark.parametrize("seed", range(3))
def test_kills_while_verifying(seed: int, dense: Path, tmp_path: Path) -> None:
    """When all is written but the report; the report of the second run is that of an undisturbed one."""
    destination = tmp_path / "moe"
    fields = {**RECIPE, "verify": True}
    expected = expected_tree(dense, destination, **fields)
    written = workspace_of(destination) / "checkpoint" / "config.json.unfinished"
    draw = random.Random(seed)
    status: int | None = 0
    for _ in range(TURNS):
        shutil.rmtree(destination, ignore_errors=True)
        child = start(lambda: upcycle(dense, destination, **fields), tmp_path / "log")
        status = None
        while status is None and not written.exists():
            status = ended(child)
            time.sleep(POLL_S)
        if status is None:
            status = kill_when(child, passed(draw.uniform(0, 0.05)))
        check_after_kill(destination, expected)
        if status:  # else it was faster
            break
    assert status == -signal.SIGKILL, (tmp_path / "log").read_text()
    check_finish(dense, destination, expected, **fields)
    assert json.loads((destination / "upcycling_report.json").read_text())["exact"] is True


def test_commands_are_killed(dense: Path, tmp_path: Path) -> None:
    """`hf-moe upcycle` itself, from its start to its end."""
    destination = tmp_path / "moe"
    command = [*COMMAND, str(dense), str(destination), "--num-experts", "4", "--no-verify", "--max-shard-size", "60000"]
    began = time.monotonic()
    subprocess.run(command, check=True, capture_output=True, timeout=COMMAND_S)
    whole = time.monotonic() - began
    expected = tree(destination)
    shutil.rmtree(destination)
    draw = random.Random(4)
    for turn in range(6):
        process = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
        ready = lines_written(destination, draw.randrange(100)) if turn % 2 else passed(draw.uniform(0, whole))
        while not ready() and process.poll() is None:
            time.sleep(POLL_S)
        process.kill()
        assert process.wait() in (0, -signal.SIGKILL)
        check_after_kill(destination, expected)
    done = subprocess.run(command, capture_output=True, text=True, timeout=COMMAND_S)
    assert done.returncode == 0, done.stderr
    assert tree(destination) == expected
    assert not workspace_of(destination).exists()
    assert subprocess.run(command, capture_output=True, timeout=COMMAND_S).returncode == 0  # it is there already
    assert tree(destination) == expected


@pytest.fixture
def heeds_interrupts() -> Iterator[None]:
    """What a shell starts in the background ignores SIGINT, and so does all that is started from there."""
    before = signal.signal(signal.SIGINT, signal.default_int_handler)
    yield
    signal.signal(signal.SIGINT, before)


@pytest.mark.usefixtures("heeds_interrupts")
def test_interrupted(dense: Path, tmp_path: Path) -> None:
    """Ctrl-C: one line, and the same command goes on."""
    destination = tmp_path / "moe"
    command = [*COMMAND, str(dense), str(destination), "--num-experts", "64", "--no-verify"]
    for _ in range(TURNS):
        shutil.rmtree(destination, ignore_errors=True)
        process = subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)
        ready = lines_written(destination, 10)
        while not ready() and process.poll() is None:
            time.sleep(POLL_S)
        process.send_signal(signal.SIGINT)
        out, err = process.communicate(timeout=COMMAND_S)
        status = process.returncode
        if status:  # else it was faster
            break
    assert (status, out) == (130, "")
    assert len(err.splitlines()) == 1
    assert "goes on" in err
    assert not destination.exists()
    assert subprocess.run(command, capture_output=True, timeout=COMMAND_S).returncode == 0
    upcycle(dense, tmp_path / "expected", num_experts=64, verify=False)
    same_tensors(stored_tensors(destination), stored_tensors(tmp_path / "expected"))


def test_two_at_once(dense: Path, tmp_path: Path, capsys) -> None:
    """The second is refused and leaves the first alone."""
    destination = tmp_path / "moe"
    expected = expected_tree(dense, destination, **RECIPE)
    for _ in range(TURNS):
        shutil.rmtree(destination, ignore_errors=True)
        child = start(lambda: upcycle(dense, destination, **RECIPE), tmp_path / "log")
        ready = lines_written(destination, 5)
        until = time.monotonic() + CHILD_S
        while not ready() and not destination.exists() and time.monotonic() < until:
            time.sleep(POLL_S)
        os.kill(child, signal.SIGSTOP)
        stopped = os.WIFSTOPPED(os.waitpid(child, os.WUNTRACED)[1])
        if stopped:  # else it was faster
            break
    assert stopped, (tmp_path / "log").read_text()
    line = refusal(capsys, tmp_path, str(dense), str(destination), "--num-experts", "4", "--no-verify")
    assert "another process" in line
    os.kill(child, signal.SIGCONT)
    assert os.waitstatus_to_exitcode(os.waitpid(child, 0)[1]) == 0, (tmp_path / "log").read_text()
    assert tree(destination) == expected


# ---------------------------------------------------------------------- the disk


@pytest.mark.parametrize("writes", [0, 1, 7, 100, 200])
def test_disk_full(writes: int, dense: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """What is done stays aside, and the same command goes on."""
    destination = tmp_path / "moe"
    expected = expected_tree(dense, destination, **RECIPE)
    pwrite, left = os.pwrite, writes

    def full(*arguments: Any) -> int:
        nonlocal left
        left -= 1
        if left < 0:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return pwrite(*arguments)

    with monkeypatch.context() as patch:
        patch.setattr(os, "pwrite", full)
        with pytest.raises(UnfinishedConversionError, match=r"moe.*the disk is full.*same command again") as caught:
            upcycle(dense, destination, **RECIPE)
    assert len(str(caught.value).splitlines()) == 1
    assert not destination.exists()
    check_after_kill(destination, expected)
    check_finish(dense, destination, expected, **RECIPE)


@contextlib.contextmanager
def small_disk(folder: Path, size: int) -> Iterator[Path]:
    """A file system of so many bytes, where the system permits to mount one."""
    folder.mkdir()
    done = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", f"size={size}", "none", str(folder)], capture_output=True, text=True, timeout=60
    )
    if done.returncode:
        pytest.skip(f"mounting is not permitted: {done.stderr.strip()}")
    try:
        yield folder
    finally:
        subprocess.run(["umount", "-l", str(folder)], check=True, timeout=60)


@pytest.mark.skipif(shutil.which("mount") is None, reason="no `mount` command")
def test_disk_really_full(dense: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """A file system with too little room: refused at first; and where the room goes while it runs, gone on with afterwards."""
    expected = expected_tree(dense, tmp_path / "disk" / "moe", **RECIPE)
    shutil.rmtree(tmp_path / "disk")
    with small_disk(tmp_path / "disk", 2_500_000) as disk:
        filler = disk / "filler"
        for left in (5_000, 100_000, 290_000):
            filler.write_bytes(bytes(shutil.disk_usage(disk).free - left))
            arguments = [str(dense), str(disk / "moe"), "--num-experts", "4", "--no-verify"]
            assert "GB are free" in refusal(capsys, disk, *arguments)
            with monkeypatch.context() as patch:
                patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, 10**12))
                with pytest.raises(OSError, match=r"disk is full|No space left"):
                    upcycle(dense, disk / "moe", **RECIPE)
            assert not (disk / "moe").exists()
            filler.unlink()
            check_finish(dense, disk / "moe", expected, **RECIPE)
            shutil.rmtree(disk / "moe")


def test_free_space_is_checked_first(dense: Path, tmp_path: Path, monkeypatch, capsys) -> None:
    """Before anything is written; what an earlier run has written already counts."""
    destination = tmp_path / "moe"
    expected = expected_tree(dense, destination, **RECIPE)
    size = sum(path.stat().st_size for path in dense.glob("*.safetensors"))
    with monkeypatch.context() as patch:
        patch.setattr(shutil, "disk_usage", lambda _: shutil._ntuple_diskusage(0, 0, size))
        line = refusal(capsys, tmp_path, str(dense), str(destination), "--num-experts", "4", "--no-verify")
    assert str(tmp_path) in line
    assert "are needed" in line
    check_finish(dense, destination, expected, **RECIPE)


# ---------------------------------------------------------------------- the destination


def test_foreign_folders_are_left_alone(dense: Path, tmp_path: Path, capsys) -> None:
    """A folder that has the workspace's name by chance is neither filled nor removed, be it the source itself."""
    (tmp_path / "moe.unfinished").mkdir()
    (tmp_path / "moe.unfinished" / "thesis.txt").write_text("years of work")
    arguments = ["--num-experts", "4", "--no-verify"]
    assert "thesis.txt" in refusal(capsys, tmp_path, str(dense), str(tmp_path / "moe"), *arguments)
    source = shutil.copytree(dense, tmp_path / "model.unfinished")
    assert "source" in refusal(capsys, tmp_path, str(source), str(tmp_path / "model"), *arguments)
    inner = shutil.copytree(dense, tmp_path / "x.unfinished" / "checkpoint")
    assert "source" in refusal(capsys, tmp_path, str(inner), str(tmp_path / "x"), *arguments)


@pytest.mark.parametrize("kind", ["absent", "empty", "deep", "link", "relative", "slash"])
def test_destinations(kind: str, dense: Path, tmp_path: Path, monkeypatch) -> None:
    """Absent or empty folders, however they are named."""
    place = tmp_path / "place"
    place.mkdir()
    (place / "empty").mkdir()
    (place / "link").symlink_to(place / "empty")
    names = {"absent": place / "moe", "deep": place / "a" / "b" / "c", "relative": "../moe", "slash": f"{place}/moe/"}
    (place / "here").mkdir()
    monkeypatch.chdir(place / "here")
    destination = names.get(kind, place / kind)
    result = upcycle(dense, destination, **RECIPE)
    monkeypatch.chdir(place)
    real = place / {"link": "empty", "relative": "moe"}.get(kind, destination)
    assert result.destination is not None
    assert (real / "config.json").is_file()
    assert not list(place.rglob("*.unfinished"))
    assert (place / "link").is_symlink()


@pytest.mark.parametrize("kind", ["file", "full", "full link"])
def test_destinations_that_are_taken(kind: str, dense: Path, tmp_path: Path, capsys, monkeypatch) -> None:
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "x").write_text("x")
    (tmp_path / "file").write_text("x")
    (tmp_path / "full link").symlink_to(tmp_path / "full")
    assert "not empty" in refusal(capsys, tmp_path, str(dense), str(tmp_path / kind), "--num-experts", "4", "--no-verify")
    (tmp_path / "here").mkdir()
    monkeypatch.chdir(tmp_path / "here")
    assert "current folder" in refusal(capsys, tmp_path, str(dense), ".", "--num-experts", "4", "--no-verify")


def test_a_finished_run_is_not_repeated_for_another(dense: Path, tmp_path: Path, capsys) -> None:
    """The same command says that all is done; another recipe, or a verification that is missing, is refused."""
    arguments = [str(dense), str(tmp_path / "moe"), "--num-experts", "4"]
    upcycle(dense, tmp_path / "moe", num_experts=4, verify=False)
    before = tree(tmp_path)
    upcycle(dense, tmp_path / "moe", num_experts=4, verify=False)
    assert tree(tmp_path) == before
    assert "not empty" in refusal(capsys, tmp_path, *arguments)
    assert "not empty" in refusal(capsys, tmp_path, *arguments, "--no-verify", "--seed", "1")


# ---------------------------------------------------------------------- damaged sources


@pytest.fixture
def copy(dense: Path, tmp_path: Path) -> Path:
    """A source to be damaged."""
    return Path(shutil.copytree(dense, tmp_path / "dense"))


def refused(source: Any, place: Path) -> str:
    """The message of a conversion that leaves nothing behind."""
    before = tree(place)
    with pytest.raises((ConversionError, FileNotFoundError)) as caught:
        upcycle(source, place / "moe", **RECIPE)
    assert tree(place) == before
    assert len(str(caught.value).splitlines()) == 1
    return str(caught.value)


@pytest.mark.parametrize("size", [0, 3, 8, 100, -1, -4000, -10_000])
def test_truncated_shard(size: int, copy: Path, tmp_path: Path) -> None:
    path = sorted(copy.glob("*.safetensors"))[1]
    data = path.read_bytes()
    path.write_bytes(data[:size])
    message = refused(copy, tmp_path)
    assert path.name in message
    assert "Fetch it again" in message
    path.write_bytes(data + b"more")
    assert path.name in refused(copy, tmp_path)


def test_shard_that_shrinks_while_it_is_read(copy: Path, tmp_path: Path, monkeypatch) -> None:
    """Cut after the headers were checked."""
    path = sorted(copy.glob("*.safetensors"))[1]
    preadv = os.preadv

    def cut(*arguments: Any) -> int:
        with open(path, "r+b") as file:
            file.truncate(9000)
        return preadv(*arguments)

    monkeypatch.setattr(os, "preadv", cut)
    with pytest.raises(ConversionError, match=rf"{path.name}.*ends within tensor"):
        upcycle(copy, tmp_path / "moe", **RECIPE)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense"]


def test_flipped_header_bits(copy: Path, tmp_path: Path) -> None:
    """One bit of a header flipped: refused, or of no consequence (in the metadata, in white space)."""
    upcycle(copy, tmp_path / "expected", **RECIPE)
    expected = stored_tensors(tmp_path / "expected")
    path = sorted(copy.glob("*.safetensors"))[0]
    data = path.read_bytes()
    length = int.from_bytes(data[:8], "little")
    draw = random.Random(5)
    harmless = 0
    for position in [*range(8), *(draw.randrange(8, 8 + length) for _ in range(80))]:
        flipped = bytearray(data)
        flipped[position] ^= 1 << draw.randrange(8)
        path.write_bytes(flipped)
        try:
            upcycle(copy, tmp_path / "moe", **RECIPE)
        except ValueError as error:
            assert str(copy) in str(error)  # noqa: PT017
            assert not (tmp_path / "moe").exists()
        else:
            harmless += 1
            same_tensors(stored_tensors(tmp_path / "moe"), expected)
            shutil.rmtree(tmp_path / "moe")
        assert not workspace_of(tmp_path / "moe").exists()
    assert harmless < 10


INDEX: dict[str, tuple[Callable[[dict[str, str]], Any], str]] = {
    "no map": (lambda _: None, "weight_map"),
    "list": (lambda _: ["a"], "weight_map"),
    "empty": (lambda _: {}, "weight_map"),
    "missing shard": (lambda m: {**m, "model.norm.weight": "model-9.safetensors"}, "model-9.safetensors"),
    "other shard": (lambda m: {**m, "model.embed_tokens.weight": max(m.values())}, "index lists"),
    "outside": (lambda m: {**m, "model.norm.weight": "../dense/x.safetensors"}, "not a file of the folder"),
    "number": (lambda m: {**m, "model.norm.weight": 3}, "not a file of the folder"),
    "tensor left out": (lambda m: {k: v for k, v in m.items() if k != "model.norm.weight"}, "model.norm.weight"),
    "FFN left out": (lambda m: {k: v for k, v in m.items() if ".3.mlp.up" not in k}, "layers.3.mlp.up_proj.weight"),
}


@pytest.mark.parametrize("name", INDEX)
def test_wrong_index(name: str, copy: Path, tmp_path: Path) -> None:
    change, needle = INDEX[name]
    path = copy / "model.safetensors.index.json"
    edit_json(path, weight_map=change(json.loads(path.read_text())["weight_map"]))
    assert needle in refused(copy, tmp_path)
    path.write_text("{")
    assert path.name in refused(copy, tmp_path)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64])
@pytest.mark.parametrize("value", [float("nan"), float("inf"), float("-inf")])
@pytest.mark.parametrize("layout", ["safetensors", "bin", "memory"])
def test_values_that_are_no_numbers(dtype: torch.dtype, value: float, layout: str, tmp_path: Path) -> None:
    """Named with their tensor, wherever they are, and nothing is left behind."""
    model = dense_model(dtype=dtype)
    model.save_pretrained(tmp_path / "dense")
    tensors = stored_tensors(tmp_path / "dense")
    for name, position in (("model.layers.1.mlp.down_proj.weight", -1), ("model.norm.weight", 0), ("lm_head.weight", 1000)):
        bad = {**tensors, name: tensors[name].clone()}
        bad[name].view(-1)[position] = value
        source: Any = tmp_path / "dense"
        if layout == "memory":
            source = dense_model(dtype=dtype)
            source.load_state_dict(bad)
        elif layout == "bin":
            (tmp_path / "dense" / "model.safetensors").unlink(missing_ok=True)
            torch.save(bad, tmp_path / "dense" / "pytorch_model.bin")
        else:
            restore(tmp_path / "dense", bad)
        message = refused(source, tmp_path)
        assert f"`{name}`" in message
        assert "NaN or Inf" in message


def test_large_numbers_are_numbers(tmp_path: Path) -> None:
    """Their sum is infinite, but none of them is."""
    dense_model().save_pretrained(tmp_path / "dense")
    tensors = stored_tensors(tmp_path / "dense")
    tensors["model.norm.weight"] = torch.full_like(tensors["model.norm.weight"], 3e38)
    restore(tmp_path / "dense", tensors)
    upcycle(tmp_path / "dense", tmp_path / "moe", **RECIPE)
    assert torch.equal(stored_tensors(tmp_path / "moe")["model.norm.weight"], tensors["model.norm.weight"])


def test_damage_is_told_by_the_command_in_one_line(copy: Path, tmp_path: Path) -> None:
    """Also where it is found while writing, beside a progress bar."""
    path = sorted(copy.glob("*.safetensors"))[-1]
    data = bytearray(path.read_bytes())
    data[-4:] = b"\x00\x00\xc0\x7f"
    path.write_bytes(data)
    before = tree(tmp_path)
    done = run_command(str(copy), str(tmp_path / "moe"), "--num-experts", "4", "--no-verify")
    assert done.returncode == 2
    assert (done.stdout, len(done.stderr.splitlines())) == ("", 1)
    assert "NaN or Inf" in done.stderr
    assert tree(tmp_path) == before
