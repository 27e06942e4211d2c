"""Checkpoints of expert-parallel trainings: round trips and resuming at other sizes, kills, saving in the background, the Hub.

All ranks are real gloo processes. They run once, before the tests, which compare what they left.
"""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from expert_checkpoint_worker import build
from hf_moe.training.checkpoints import last_whole_checkpoint, what_is_missing
from ranks import launch
from safetensors.torch import save_file
from tiny import tensors_on_disk, token_ids

from hf_moe import MoEForCausalLM
from hf_moe.checkpoint_files import SafetensorsFile
from hf_moe.expert_checkpoint import DISTRIBUTED_FOLDER, consolidate, load_distributed, missing_part, save_distributed
from hf_moe.tensor_pieces import Pieces, model_tensors

Job = dict[str, Any]
SMALL_SHARDS = "40KB"
EVERY_STEP = {"save_steps": 1, "save_total_limit": 1}
BEST = {
    **EVERY_STEP, "eval_strategy": "steps", "eval_steps": 1, "load_best_model_at_end": True, "async_save": True,
    "metric_for_best_model": "eval_loss", "greater_is_better": True,
}  # fmt: skip


def job(run: str, name: str, world: int, ep: int, kind: str, **more: Any) -> Job:
    return {"run": run, "name": name, "world": world, "ep": ep, "kind": kind, **more}


MOVED = {"moved": True}
REPLICATE = {"how": {"dense": "replicate"}}
JOBS = [
    job("save", "uneven-saved", 4, 4, "uneven", optimizer="adamw", moved=True, **{"async": True}),
    job("load", "uneven-4-4", 4, 4, "uneven", optimizer="adamw", of="uneven-saved"),
    job("load", "uneven-4-2", 4, 2, "uneven", optimizer="adamw", of="uneven-saved", **REPLICATE),
    job("hub", "uneven-hub", 4, 4, "uneven", shard=SMALL_SHARDS, moved=True),
    job("train", "whole", 4, 4, "seven", save_model=True),
    job("train", "resumed-4-4", 4, 4, "seven", resume="whole/checkpoint-2"),
    job("train", "resumed-4-2", 4, 2, "seven", resume="whole/checkpoint-2"),
    job("train", "resumed-1-1", 1, 1, "seven", resume="whole/checkpoint-2"),
    job("train", "alone", 1, 1, "seven", save_model=True),
    job("save", "tied-saved", 1, 1, "tied", optimizer="momentum"),
    job("load", "uneven-1-1", 1, 1, "uneven", optimizer="adamw", of="uneven-saved"),
    job("load", "uneven-2-2", 2, 2, "uneven", optimizer="adamw", of="uneven-saved", **MOVED),
    job("load", "tied-2-2", 2, 2, "tied", optimizer="momentum", of="tied-saved", **MOVED),
    job("hub", "mixtral-hub", 2, 2, "mixtral", shard=SMALL_SHARDS),
    job("fail", "failed", 2, 2, "plain"),
    job("train", "resumed-2-2", 2, 2, "seven", resume="whole/checkpoint-2"),
    job("train", "alone-2-2", 2, 2, "seven", resume="alone/checkpoint-2"),
    job("train", "best", 2, 2, "seven", options=BEST, evaluate_first=True, evaluate_last=True),
    job("train", "killed-data", 2, 2, "seven", options=EVERY_STEP, stop_at="data"),
    job("train", "killed-metadata", 2, 2, "seven", options={**EVERY_STEP, "async_save": True}, stop_at="metadata"),
    job("train", "killed-state", 2, 2, "seven", options=EVERY_STEP, stop_at="state"),
]  # fmt: skip
AFTER_KILLS = [
    job("train", f"after-{name}", 1, 1, "seven", options=EVERY_STEP, output=f"killed-{name}", resume=True)
    for name in ("data", "metadata", "state")
]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where the jobs left what they did."""
    path = tmp_path_factory.mktemp("runs")
    print(launch(1, "expert_checkpoint_worker.py", path, json.dumps([*JOBS, *AFTER_KILLS])))  # it forks its ranks
    return path


@pytest.fixture(scope="module")
def result(folder: Path) -> Callable[..., Any]:
    return lambda name, rank=0: json.loads((folder / f"{name}.{rank}.json").read_text())


# ---------------------------------------------------------------------- round trips


@pytest.mark.parametrize(("name", "saved"), [(j["name"], j["of"]) for j in JOBS if j["run"] == "load"])
def test_round_trips_are_exact(result: Callable, name: str, saved: str) -> None:
    """Model, buffers and state of the optimizer, to the last bit, wherever the experts lay and lie."""
    expected, got = result(saved)["digests"], result(name)["digests"]
    assert got == expected
    assert any("e_score_correction_bias" in tensor for tensor in got) == ("uneven" in name)
    assert len(set(got.values())) > len(got) / 2  # of AdamW's, every `step` is the same
    assert result(name)["rates"] == [[rate, f"of {rate}"] for rate in (1e-3, 2e-3, 3e-3)]


def test_placement_comes_back_where_it_fits(result: Callable) -> None:
    moved = result("uneven-saved")["placement"]
    assert len(moved) == 2
    assert all(sorted(slots) == list(range(6)) != slots for slots in moved)
    assert result("uneven-4-4")["placement"] == moved
    assert result("uneven-4-2")["placement"] == []
    assert result("uneven-2-2")["placement"] != []  # as it was before


def test_nobody_holds_the_model(result: Callable) -> None:
    for rank in range(4):
        saved = result("uneven-saved", rank)
        assert saved["peak"] < saved["total"] / 3
        assert result("uneven-4-2", rank)["peak"] < saved["total"] / 2
    largest = max(tensor.nbytes for tensor in model_tensors(build("uneven")).values())
    first, *others = [result("uneven-hub", rank) for rank in range(4)]
    assert first["most"] <= 2 * largest + 1024  # a tensor of the model, and what becomes of it on disk
    assert all(other["most"] <= largest + 1024 for other in others)


def test_failure_in_the_background_is_raised(result: Callable) -> None:
    for rank in range(2):
        found = result("failed", rank)
        assert "the disk is full" in found["message"]
        assert found["missing"] == ".metadata"


def test_refuses_what_is_not_of_this_model(tmp_path: Path, folder: Path) -> None:
    model = build("plain")
    with pytest.raises(ValueError, match=r"is not in the checkpoint|is in the checkpoint|is \[6, "):
        load_distributed(model, None, folder / "uneven-saved")
    save_distributed(model, None, tmp_path / "saved")
    with pytest.raises(ValueError, match="no optimizer was saved"):
        load_distributed(model, torch.optim.SGD(model.parameters()), tmp_path / "saved")
    data = next((tmp_path / "saved").glob("*.distcp"))
    data.write_bytes(data.read_bytes()[:-10])
    assert missing_part(tmp_path / "saved") == data.name
    with pytest.raises(ValueError, match="cut short"):
        load_distributed(model, None, tmp_path / "saved")


def test_groups_that_are_cut_otherwise(tmp_path: Path) -> None:
    """Options belong to parameters; a group of parameters with different ones is refused."""
    model = build("plain")
    names = dict(model.named_parameters())
    gates, others = ([p for n, p in names.items() if (".gate." in n) == gate] for gate in (True, False))
    optimizer = torch.optim.SGD([{"params": gates, "lr": 0.1}, {"params": others, "lr": 0.2, "weight_decay": 0.3}])
    save_distributed(model, optimizer, tmp_path)
    cut = torch.optim.SGD([{"params": others[:5]}, {"params": others[5:]}, {"params": gates}], lr=9.0)
    load_distributed(model, cut, tmp_path)
    assert [(group["lr"], group["weight_decay"]) for group in cut.param_groups] == [(0.2, 0.3), (0.2, 0.3), (0.1, 0)]
    with pytest.raises(ValueError, match=r"`lr` of .* both are in one group"):
        load_distributed(model, torch.optim.SGD(model.parameters()), tmp_path)


def test_pieces_of_a_plain_tensor() -> None:
    whole = torch.arange(12.0).view(4, 3)
    order = torch.tensor([2, 3, 0, 1])
    held = whole[order].clone()
    pieces = Pieces(held, order)
    assert {corner: view.tolist() for corner, view in pieces.items()} == {
        (2, 0): whole[2:].tolist(), (0, 0): whole[:2].tolist(),
    }  # fmt: skip
    pieces.copy_from(whole + 1)
    assert torch.equal(held, whole[order] + 1)


# ---------------------------------------------------------------------- the Hub's form


@pytest.mark.parametrize(("name", "kind"), [("uneven-hub", "uneven"), ("mixtral-hub", "mixtral")])
def test_hub_checkpoint_is_that_of_one_process(folder: Path, result: Callable, tmp_path: Path, name: str, kind: str) -> None:
    """All files, byte by byte: shards, index, config, code."""
    build(kind).from_pretrained(folder / f"model-{kind}").save_pretrained(tmp_path, max_shard_size=SMALL_SHARDS)
    expected = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert {path.name: path.read_bytes() for path in (folder / name).iterdir()} == expected
    assert sum(path.endswith(".safetensors") for path in expected) > 2
    assert result(name)["class"].startswith("FSDP")  # it is as it was


def test_file_is_that_of_safetensors(tmp_path: Path) -> None:
    """Byte by byte, whatever the dtypes, and in whatever order the tensors come."""
    dtypes = (torch.float32, torch.bfloat16, torch.int64, torch.bool, torch.float16, torch.uint8, torch.float64, torch.int32)
    tensors = {f"{i % 3}.é{dtype}": torch.arange(5 + i).to(dtype).view(1, -1) for i, dtype in enumerate(dtypes)}
    tensors |= {"scalar": torch.tensor(2.5), "none": torch.empty(0, 3)}
    save_file(tensors, tmp_path / "expected", metadata={"format": "pt"})
    file = SafetensorsFile(tmp_path / "got", tensors)
    for name in reversed(tensors):
        file.write(name, tensors[name])
    assert (tmp_path / "got").read_bytes() == (tmp_path / "expected").read_bytes()


def test_consolidate(folder: Path, tmp_path: Path) -> None:
    checkpoint = folder / "whole" / "checkpoint-4"
    consolidate(checkpoint, tmp_path)
    expected = {path.name: path.read_bytes() for path in (folder / "whole").iterdir() if path.is_file()}
    expected = {
        name: content for name, content in expected.items() if not name.startswith(("expert_load", "training_args", "_"))
    }
    assert {path.name: path.read_bytes() for path in tmp_path.iterdir()} == expected
    model = MoEForCausalLM.from_pretrained(tmp_path).eval()
    alone = MoEForCausalLM.from_pretrained(folder / "alone").eval()
    ids = token_ids()
    torch.testing.assert_close(model(ids).logits, alone(ids).logits, rtol=1e-4, atol=1e-4)
    consolidate(checkpoint, tmp_path, max_shard_size=SMALL_SHARDS)  # over the other
    assert not (tmp_path / "model.safetensors").exists()
    again, names = tensors_on_disk(tmp_path), MoEForCausalLM.from_pretrained(tmp_path).state_dict()
    assert len(again) > len(names)
    assert all(torch.equal(tensor, names[name]) for name, tensor in model.state_dict().items())


# ---------------------------------------------------------------------- resuming


def losses(result: Any) -> dict[int, tuple[float, float, float, float]]:
    """Loss, gradient norm and two learning rates, by step."""
    rows = {row["step"]: row for row in result["rows"] if "grad_norm" in row}
    return {step: (row["loss"], row["grad_norm"], row["learning_rate"], row["lr/router"]) for step, row in rows.items()}


RESUMED = [
    *((j["name"], "whole") for j in JOBS if j.get("resume") == "whole/checkpoint-2"),
    ("alone", "whole"), ("alone-2-2", "alone"), *((j["name"], "whole") for j in AFTER_KILLS),
]  # fmt: skip


@pytest.mark.parametrize(("name", "expected"), RESUMED)
def test_goes_on_as_if_never_interrupted(result: Callable, name: str, expected: str) -> None:
    got, wanted = losses(result(name)), losses(result(expected))
    assert sorted(got) == sorted(wanted) == [1, 2, 3, 4]
    for step in wanted:
        assert got[step] == pytest.approx(wanted[step], rel=1e-6), step


def test_same_size_is_exact(result: Callable) -> None:
    assert result("resumed-4-4")["digests"] == result("whole")["digests"]


@pytest.mark.parametrize("name", ["data", "metadata", "state"])
def test_kill_leaves_the_checkpoint_before(folder: Path, result: Callable, name: str) -> None:
    """The ranks were killed while they wrote the second checkpoint; of one that is written in the background, the first is not
    deleted before it is whole. The training that went on has written all of them again."""
    assert losses(result(f"after-{name}")).keys() == {1, 2, 3, 4}
    assert last_whole_checkpoint(folder / f"killed-{name}") == folder / f"killed-{name}" / "checkpoint-4"
    assert not (folder / f"killed-{name}.0.json").exists()


def test_best_model_and_limit(folder: Path, result: Callable) -> None:
    """With asynchronous saving: evaluation before, in and after the training, the best checkpoint, and the last."""
    found = result("best")
    rows = [row for row in found["rows"] if "eval_loss" in row]
    evaluated = {row["step"]: row["eval_loss"] for row in rows[:-1]}  # the last is after the training
    metric, step = found["best"]
    assert (step, metric) == max(evaluated.items(), key=lambda pair: pair[1])
    assert found["after"] == pytest.approx(metric, rel=1e-12)
    assert step != 4
    assert [path.name for path in (folder / "best").glob("checkpoint-*")] == [f"checkpoint-{step}"]
    assert len({row["eval_tokens"] for row in rows}) == 1


def test_what_a_whole_checkpoint_has(folder: Path, tmp_path: Path) -> None:
    """Without any one of its files a checkpoint is not whole."""
    whole = folder / "whole" / "checkpoint-2"
    assert what_is_missing(whole) is None
    files = [f"rng_state_{rank}.pth" for rank in range(4)] + ["scheduler.pt", "trainer_state.json"]
    files += [f"{DISTRIBUTED_FOLDER}/{path.name}" for path in (whole / DISTRIBUTED_FOLDER).iterdir()]
    for name in files:
        copy = shutil.copytree(whole, tmp_path / "copy")
        (copy / name).unlink()
        assert what_is_missing(copy) == name
        shutil.rmtree(copy)
