"""Exact resume: a training that was killed, at whatever moment, ends as one that was not, to the last bit.

A run is a process of its own, forked, that is killed with SIGKILL and followed by another.
"""

from __future__ import annotations

import json
import multiprocessing
import os
import random
import signal
import time
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch
from families import text_config
from hf_moe.training import ExpertLoadCallback, LossFreeBalancingCallback, MoETrainer, MoETrainingArguments, read_expert_load
from hf_moe.training.checkpoints import last_whole_checkpoint
from native_models import NATIVE
from ranks import end_after
from safetensors.torch import load_file, save_file
from torch import nn
from trainer_cut import collate, sequences
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Trainer, TrainerCallback, TrainerState, set_seed

from hf_moe import MoEConfig, MoEForCausalLM

STEPS = 8
CHILD_S = 240
_OF_TIME = ("_runtime", "_per_second", "tflops_per_device", "moe/mfu", "preparation_time")

# what the runs have besides 8 steps on 16 sequences in batches of 4
RUNS: dict[str, dict[str, Any]] = {
    # an epoch has two steps; a checkpoint lies between two logs, and in the middle of an epoch
    "noise_dropout_accumulation": {
        "model": {"router_type": "noisy_top_k", "router_importance_loss_coef": 0.1, "router_load_loss_coef": 0.1},
        "gradient_accumulation_steps": 2, "save_steps": 3, "logging_steps": 2,
    },
    "sigmoid_bias_checkpointing": {
        "model": {
            "router_type": "sigmoid", "router_bias_update_speed": 0.01, "capacity_factor": 1.0, "router_jitter_noise": 0.1,
        },
        "activation_checkpointing": True, "gradient_accumulation_steps": 2, "save_steps": 4, "logging_steps": 3,
    },
    "autocast": {
        "model": {"router_type": "noisy_top_k", "balance_scope": "micro_batch"}, "bf16": True, "save_steps": 3,
        "logging_steps": 5,
    },
    "bfloat16_weights": {"model": {"router_z_loss_coef": 0.1}, "dtype": "bfloat16", "save_steps": 2, "logging_steps": 3},
    "gshard_hierarchy_epochs": {
        "model": {"router_type": "gshard", "capacity_factor": 1.25}, "save_strategy": "epoch", "logging_steps": 3,
        "eval_strategy": "steps", "eval_steps": 3,
    },
    "native": {"model": "deepseek_v3", "save_steps": 3, "logging_steps": 2},
}  # fmt: skip


@pytest.fixture(autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)  # a forked process has no others
    yield
    torch.set_num_threads(before)


def build(model: dict[str, Any] | str, dtype: str = "float32") -> Any:
    """A model with dropout."""
    set_seed(7)
    if isinstance(model, str):
        model_type, fields, _ = NATIVE[model]
        config = CONFIG_MAPPING[model_type](**{**fields, "vocab_size": 128, "attention_dropout": 0.2})
        return AutoModelForCausalLM.from_config(config, dtype=getattr(torch, dtype))
    text = text_config("llama", initializer_range=0.2, attention_dropout=0.2)
    config = MoEConfig(text_config=text, num_experts=4, num_experts_per_tok=2, **model)
    return MoEForCausalLM._from_config(config, dtype=getattr(torch, dtype))


def make(name: str, folder: Path, cls: type[Trainer], extra: list[TrainerCallback]) -> Trainer:
    options = {key: value for key, value in RUNS[name].items() if key not in ("model", "dtype")}
    settings: dict[str, Any] = {
        "output_dir": str(folder), "use_cpu": True, "per_device_train_batch_size": 4, "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2, "max_steps": STEPS, "save_strategy": "steps", "report_to": "none", "disable_tqdm": True,
        "prediction_loss_only": True, **options,
    }  # fmt: skip
    if cls is MoETrainer and not isinstance(RUNS[name]["model"], str):
        settings |= {"router_learning_rate": 3e-2, "expert_learning_rate": 1e-3}
    model = build(RUNS[name]["model"], RUNS[name].get("dtype", "float32"))
    if cls is not MoETrainer and last_whole_checkpoint(folder) is not None:  # which does not read stacked experts
        model = AutoModelForCausalLM.from_pretrained(last_whole_checkpoint(folder))
    callbacks: list[TrainerCallback] = [] if cls is MoETrainer else [ExpertLoadCallback(), LossFreeBalancingCallback()]
    return cls(
        model, MoETrainingArguments(**settings), train_dataset=sequences(), eval_dataset=sequences(), data_collator=collate,
        callbacks=[*callbacks, *extra],
    )  # fmt: skip


class Losses(TrainerCallback):
    """Writes every micro-batch's loss down at once, and kills the process in the forward of a micro-batch."""

    def __init__(self, folder: Path, kill_at: int | None = None) -> None:
        self.path, self.kill_at, self.seen = folder / "losses.jsonl", kill_at, 0

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self.write(["resumed at", state.global_step])
        model.register_forward_hook(lambda module, inputs, outputs: self.hear(state, module, outputs))

    def hear(self, state: TrainerState, module: nn.Module, outputs: Any) -> None:
        if not module.training:
            return
        self.seen += 1
        if self.seen == self.kill_at:
            os.kill(os.getpid(), signal.SIGKILL)
        self.write([state.global_step, outputs["loss"].item()])

    def write(self, row: list) -> None:
        with self.path.open("a") as file:
            file.write(json.dumps(row) + "\n")


def run(name: str, folder: Path, cls: type[Trainer], *, kill_at: int | None = None, break_in: Callable | None = None) -> None:
    """A training from its last whole checkpoint, if there is one, to the end; what is left is in the folder."""
    folder.mkdir(exist_ok=True)
    if break_in is not None:
        break_in()
    trainer = make(name, folder, cls, [Losses(folder, kill_at)])
    checkpoint = last_whole_checkpoint(folder)
    resume: Any = checkpoint is not None if cls is MoETrainer else checkpoint and str(checkpoint)
    trainer.train(resume_from_checkpoint=resume or None)
    weights = {name: tensor.clone() for name, tensor in trainer.model.state_dict().items()}
    save_file(weights, folder / "end.safetensors")
    (folder / "history.json").write_text(json.dumps(trainer.state.log_history))
    (folder / "flos.json").write_text(json.dumps(trainer.state.total_flos))


def limited(work: Callable, *arguments: Any, **options: Any) -> None:
    """Work of a forked process, which ends even where the fork left it a lock that nobody opens."""
    end_after(CHILD_S)
    work(*arguments, **options)


def fork(*arguments: Any, seconds: float | None = None, **options: Any) -> int:
    """Do that in a process of its own, killed after so many seconds; gives its exit code."""
    process = multiprocessing.get_context("fork").Process(target=limited, args=(run, *arguments), kwargs=options)
    process.start()
    process.join(seconds)
    if process.is_alive():
        process.kill()
        process.join()
    return process.exitcode or 0


def last_losses(folder: Path) -> dict[int, list[float]]:
    """Of each step, the micro-batches' losses in the last process that made it."""
    found: dict[int, list[float]] = {}
    for line in (folder / "losses.jsonl").read_text().splitlines():
        what, value = json.loads(line)
        if what == "resumed at":
            found = {step: losses for step, losses in found.items() if step < value}
        else:
            found.setdefault(what, []).append(value)
    return found


def history(folder: Path, cls: type[Trainer]) -> list[dict[str, Any]]:
    """Without what depends on time, and without what the stock `Trainer` forgets: the loss since the last log."""
    forgotten = ("train_loss",) if cls is MoETrainer else ("train_loss", "loss")
    rows = json.loads((folder / "history.json").read_text())
    return [
        {key: value for key, value in row.items() if not key.endswith(_OF_TIME) and key not in forgotten} for row in rows
    ]  # fmt: skip


def same(one: Path, other: Path, cls: type[Trainer]) -> None:
    """Assert that two runs ended alike, bit by bit."""
    assert last_losses(one) == last_losses(other)
    ends = [load_file(folder / "end.safetensors") for folder in (one, other)]
    assert ends[0].keys() == ends[1].keys()
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    assert history(one, cls) == history(other, cls)
    loads = [read_expert_load(folder / "expert_load.safetensors") for folder in (one, other)]
    assert loads[0].steps == loads[1].steps
    assert (loads[0].executed == loads[1].executed).all()
    assert (loads[0].layers, loads[0].num_experts) == (loads[1].layers, loads[1].num_experts)
    assert json.loads((one / "flos.json").read_text()) == json.loads((other / "flos.json").read_text())


@pytest.fixture(scope="module")
def whole(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, type[Trainer]], Path]:
    """The folder of an uninterrupted run."""
    folders: dict[tuple[str, str], Path] = {}

    def get(name: str, cls: type[Trainer]) -> Path:
        key = (name, cls.__name__)
        if key not in folders:
            folders[key] = tmp_path_factory.mktemp("whole") / "run"
            assert fork(name, folders[key], cls) == 0
        return folders[key]

    return get


@pytest.mark.parametrize(
    ("name", "cls"),
    [*((name, MoETrainer) for name in RUNS), *((name, Trainer) for name in ("noise_dropout_accumulation", "native"))],
)
def test_killed_in_the_middle_of_a_step(name: str, cls: type[Trainer], whole: Callable, tmp_path: Path) -> None:
    """A step or two after a checkpoint, and in a step of two micro-batches after the first."""
    accumulation = RUNS[name].get("gradient_accumulation_steps", 1)
    folder = tmp_path / "run"
    assert fork(name, folder, cls, kill_at=6 * accumulation) == -signal.SIGKILL
    assert last_whole_checkpoint(folder) is not None
    assert not (folder / "history.json").exists()
    assert fork(name, folder, cls) == 0
    same(whole(name, cls), folder, cls)
    rows = history(folder, cls)
    assert len({row["step"] for row in rows if "learning_rate" in row}) == len([r for r in rows if "learning_rate" in r])
    assert len(last_losses(folder)) == STEPS


def test_the_runs_are_hard(whole: Callable) -> None:
    """They do draw random numbers, and the losses do depend on what is resumed."""
    folder = whole("noise_dropout_accumulation", MoETrainer)
    losses = [loss for step in last_losses(folder).values() for loss in step]
    assert len(set(losses)) == len(losses) == 2 * STEPS
    rows = history(folder, MoETrainer)
    assert [row["step"] for row in rows if "learning_rate" in row] == [2, 4, 6, 8]
    assert rows[0]["lr/router"] == pytest.approx(3 * rows[0]["learning_rate"])
    assert len(list(folder.glob("checkpoint-*"))) == 3  # 3, 6, 8: not at the logs


def half_written_state() -> None:
    """The process is killed while it writes the last file of its second checkpoint."""
    save, count = TrainerState.save_to_json, [0]

    def cut(self: TrainerState, path: str) -> None:
        save(self, path)
        count[0] += 1
        if count[0] == 2:
            text = Path(path).read_text()
            Path(path).write_text(text[: len(text) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    TrainerState.save_to_json = cut  # type: ignore[method-assign]


def half_written_optimizer() -> None:
    """The process is killed while it writes the optimizer's state of its second checkpoint."""
    save, count = torch.save, [0]

    def cut(value: Any, path: Any, *arguments: Any, **options: Any) -> None:
        save(value, path, *arguments, **options)
        if str(path).endswith("optimizer.pt"):
            count[0] += 1
        if count[0] == 2:
            content = Path(path).read_bytes()
            Path(path).write_bytes(content[: len(content) // 2])
            os.kill(os.getpid(), signal.SIGKILL)

    torch.save = cut


def between_file_and_name() -> None:
    """The process is killed before the third time that a file gets its name."""
    replace, count = os.replace, [0]

    def cut(source: Any, target: Any, **options: Any) -> None:
        count[0] += 1
        if count[0] == 3:
            os.kill(os.getpid(), signal.SIGKILL)
        replace(source, target, **options)

    os.replace = cut


@pytest.mark.parametrize("break_in", [half_written_state, half_written_optimizer, between_file_and_name])
def test_killed_while_writing(break_in: Callable, whole: Callable, tmp_path: Path) -> None:
    name, folder = "noise_dropout_accumulation", tmp_path / "run"
    assert fork(name, folder, MoETrainer, break_in=break_in) == -signal.SIGKILL
    assert fork(name, folder, MoETrainer) == 0
    same(whole(name, MoETrainer), folder, MoETrainer)


def test_killed_again_and_again(whole: Callable, tmp_path: Path) -> None:
    """At moments that nobody chose."""
    name, folder = "sigmoid_bias_checkpointing", tmp_path / "run"
    expected = whole(name, MoETrainer)
    started = time.perf_counter()
    assert fork(name, tmp_path / "timed", MoETrainer) == 0
    needed = time.perf_counter() - started
    moments = random.Random(0)
    codes = [fork(name, folder, MoETrainer, seconds=needed * moments.uniform(0.2, 0.9)) for _ in range(5)]
    assert -signal.SIGKILL in codes
    assert fork(name, folder, MoETrainer) == 0
    same(expected, folder, MoETrainer)
    same(expected, tmp_path / "timed", MoETrainer)


def test_resumed_for_longer(whole: Callable, tmp_path: Path) -> None:
    """N steps, and N more in another process, are 2N steps; there is no kill, and the first ends with a summary."""
    name, folder = "noise_dropout_accumulation", tmp_path / "run"

    def half(folder: Path, steps: int) -> None:
        trainer = make(name, folder, MoETrainer, [Losses(folder)])
        trainer.args.lr_scheduler_type = "constant"
        trainer.args.max_steps = steps
        trainer.train(resume_from_checkpoint=steps == STEPS and (folder / "checkpoint-4").exists())
        save_file({n: t.clone() for n, t in trainer.model.state_dict().items()}, folder / "end.safetensors")
        (folder / "history.json").write_text(json.dumps(trainer.state.log_history))

    for target, parts in ((folder, (4, STEPS)), (tmp_path / "whole", (STEPS,))):
        target.mkdir()
        for steps in parts:
            process = multiprocessing.get_context("fork").Process(target=limited, args=(half, target, steps))
            process.start()
            process.join()
            assert process.exitcode == 0
    ends = [load_file(path / "end.safetensors") for path in (folder, tmp_path / "whole")]
    assert all(torch.equal(ends[0][name], ends[1][name]) for name in ends[0])
    rows = [[row for row in history(path, MoETrainer) if "learning_rate" in row] for path in (folder, tmp_path / "whole")]
    assert rows[0] == rows[1]
