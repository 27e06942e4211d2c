# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""What a training left behind: hyper-parameters, data, losses, metrics and the load of the experts.

From the files of a run (`metrics.json`, `trainer_state.json`, `training_args.bin`, `expert_load.safetensors`), or from a
`Trainer`.
"""

from __future__ import annotations

import pickle
import re
import zipfile
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_moe.expert_load import LOAD_FILE, ExpertLoad, read_expert_load

from .lineage import LINEAGE, METRICS, STATE, read_json_object

ARGUMENTS = "training_args.bin"
# Of a row of `log_history`, what is no result.
_NO_RESULT = ("_runtime", "_per_second", "_preparation_time")
_LAYER_KEY = re.compile(r"moe/layer_(\d+)/(\w+)")


@dataclass(frozen=True)
class TrainingRun:
    """A training.

    Attributes:
        arguments: fields of `TrainingArguments` by name, as far as they are known.
        options: what else the run was told (`model`, `train_file`, …), and its own results.
        log_history: of the `Trainer`.
        world_size: processes, where it is known.
        load: of the experts, or `None`.
    """

    arguments: dict[str, Any] = field(default_factory=dict)
    options: dict[str, Any] = field(default_factory=dict)
    log_history: list[dict[str, Any]] = field(default_factory=list)
    world_size: int | None = None
    load: ExpertLoad | None = None

    @property
    def steps(self) -> int | None:
        """Optimizer steps that were made, as far as logs tell."""
        return max((row["step"] for row in self.log_history if isinstance(row.get("step"), int)), default=None)

    def evaluations(self) -> tuple[dict[str, float], dict[str, float]]:
        """Results on held-out data before and after training, by name without `eval_`; empty where there are none."""
        before, after = self.options.get("eval_before"), self.options.get("eval_after")
        rows = [row for row in self.log_history if "eval_loss" in row]
        if not isinstance(before, dict):
            before = rows[0] if rows and rows[0].get("step") == 0 else {}
        if not isinstance(after, dict):
            after = rows[-1] if rows and rows[-1].get("step") != 0 else {}
        return _results(before), _results(after)

    def last(self, prefix: str) -> dict[str, float]:
        """The values of the last log that has keys of this prefix, without it; those of single layers are left out."""
        for row in reversed(self.log_history):
            found = {k.removeprefix(prefix): v for k, v in row.items() if k.startswith(prefix) and not _LAYER_KEY.match(k)}
            if found:
                return {name: float(value) for name, value in found.items() if isinstance(value, (int, float))}
        return {}

    def losses(self) -> list[float]:
        """The training losses that were logged."""
        return [float(row["loss"]) for row in self.log_history if isinstance(row.get("loss"), (int, float))]


def read_run(folder: Path) -> TrainingRun | None:
    """The training that left its files in a folder; `None` if there are none."""
    options = read_json_object(folder / METRICS)
    training = read_json_object(folder / LINEAGE).get("training")
    noted = training if isinstance(training, dict) else {}
    state = read_json_object(folder / STATE)
    if not state:
        steps = sorted(folder.glob(f"checkpoint-*/{STATE}"), key=lambda path: _number(path.parent.name))
        state = read_json_object(steps[-1]) if steps else {}
    history = options.pop("log_history", None) or state.get("log_history")
    named: dict[str, Any] = next(
        (options[name] for name in ("training_arguments", "arguments") if isinstance(options.get(name), dict)), {}
    )
    arguments = named or read_arguments(folder / ARGUMENTS) or dict(noted.get("arguments") or {})
    load = _load(folder)
    world_size = options.get("world_size") or noted.get("world_size")
    rows = [row for row in history if isinstance(row, dict)] if isinstance(history, list) else []
    if not (rows or arguments or load or "train" in options):
        return None
    return TrainingRun(arguments, options, rows, world_size if isinstance(world_size, int) else None, load)


def run_of_trainer(trainer: Any) -> TrainingRun:
    """The training of a `Trainer`, as far as it has come."""
    folder = Path(trainer.args.output_dir or ".")
    options = read_json_object(folder / METRICS)
    rows = [dict(row) for row in trainer.state.log_history]
    if options.pop("log_history", None) != rows:  # of another run into this folder
        options = {}
    return TrainingRun(trainer.args.to_dict(), options, rows, trainer.args.world_size, _load(folder))


def notes_of(run: TrainingRun) -> dict[str, Any]:
    """What `read_run` should find again where the other files of the run are not: no paths, no names, no tokens."""
    kept = {n: v for n, v in run.arguments.items() if n in _READ or (_is_own_setting(n) and isinstance(v, (int, float, list)))}
    return {"arguments": {n: getattr(v, "value", v) for n, v in kept.items()}, "world_size": run.world_size}


def layer_metrics(run: TrainingRun) -> dict[int, dict[str, float]]:
    """The last log's values of single layers, by decoder layer."""
    for row in reversed(run.log_history):
        layers: dict[int, dict[str, float]] = {}
        for key, value in row.items():
            match = _LAYER_KEY.fullmatch(key)
            if match and isinstance(value, (int, float)):
                layers.setdefault(int(match[1]), {})[match[2]] = float(value)
        if layers:
            return layers
    return {}


def _results(row: Mapping[str, Any]) -> dict[str, float]:
    return {
        name.removeprefix("eval_"): float(value)
        for name, value in row.items()
        if name.startswith("eval_")
        and not name.endswith(_NO_RESULT)
        and not name.startswith("eval_moe/")
        and isinstance(value, (int, float))
        and not isinstance(value, bool)
    }


def _load(folder: Path) -> ExpertLoad | None:
    try:
        load = read_expert_load(folder / LOAD_FILE)
    except (OSError, ValueError):
        return None
    return load if load.steps else None


def _number(name: str) -> int:
    digits = re.sub(r"\D", "", name)
    return int(digits) if digits else -1


# ---------------------------------------------------------------------- training_args.bin


class _Inert:
    """Stands for any class that a pickle names: takes all arguments and does nothing."""

    args: tuple[Any, ...] = ()

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        self.args = args


class _InertUnpickler(pickle.Unpickler):
    """Reads the plain values of a pickle. No class or function that it names is imported or called."""

    def find_class(self, module: str, name: str) -> Any:
        return _Inert

    def persistent_load(self, pid: Any) -> Any:
        return None


def read_arguments(path: Path) -> dict[str, Any]:
    """The plain fields of the `TrainingArguments` that `Trainer` has pickled, without running any code; empty if unreadable."""
    try:
        with zipfile.ZipFile(path) as archive:
            name = next(name for name in archive.namelist() if name.endswith("data.pkl"))
            with archive.open(name) as file:
                state = vars(_InertUnpickler(file).load())
    except Exception:  # a damaged pickle can fail in any way, and a card can do without
        return {}
    return {name: _plain(value) for name, value in state.items() if not name.startswith("_") and _plain(value) is not None}


def _plain(value: Any) -> Any:
    """A value of JSON, or the value of an enum's member; `None` for what is neither."""
    if isinstance(value, _Inert):
        match value.args:
            case (str(plain),):
                return plain
            case (type(), str(name)):  # `getattr(enum, name)`, of Python before 3.11.4; Transformers' values are such names
                return name.lower()
        return None
    return value if isinstance(value, (str, int, float, bool, list, dict)) else None


# ---------------------------------------------------------------------- rows of tables

Get = Callable[[TrainingRun], Any]


def _argument(name: str) -> Get:
    return lambda run: run.arguments.get(name)


def _optimizer(run: TrainingRun) -> str | None:
    name = run.arguments.get("optim")
    if name is None:
        return None
    known = [(label, run.arguments.get(f)) for label, f in (("β₁", "adam_beta1"), ("β₂", "adam_beta2"), ("ε", "adam_epsilon"))]
    said = ", ".join(f"{label} {value:g}" for label, value in known if isinstance(value, (int, float)))
    return f"`{name}`" + (f" ({said})" if said and "adam" in str(name) else "")


def _batch(run: TrainingRun) -> str | None:
    size = run.arguments.get("per_device_train_batch_size")
    if not isinstance(size, int):
        return None
    accumulated = run.arguments.get("gradient_accumulation_steps") or 1
    devices = run.world_size
    parts = [f"{size} per device", *([f"{accumulated} accumulation steps"] if accumulated > 1 else [])]
    if devices is None:
        return " × ".join(parts)
    parts += [f"{devices} devices"] if devices > 1 else []
    return f"{size * accumulated * devices}" + (f" ({' × '.join(parts)})" if len(parts) > 1 else "") + " sequences"


def _schedule(run: TrainingRun) -> str | None:
    name = run.arguments.get("lr_scheduler_type")
    if name is None:
        return None
    warmup = run.arguments.get("warmup_steps") or 0
    said = f"{warmup:g} steps" if warmup >= 1 else f"{100 * warmup:g} % of the steps"
    return f"`{getattr(name, 'value', name)}`" + (f", warm-up over {said}" if warmup else "")


def _precision(run: TrainingRun) -> str | None:
    if "bf16" not in run.arguments and "fp16" not in run.arguments:
        return None
    mixed = next((name for name in ("bf16", "fp16") if run.arguments.get(name)), None)
    weights = run.options.get("dtype")
    said = f"{mixed} mixed precision" if mixed else "no mixed precision"
    return said + (f", weights loaded as {weights}" if isinstance(weights, str) else "")


def _length(run: TrainingRun) -> Any:
    return next((run.options[n] for n in ("max_seq_length", "max_length", "block_size") if run.options.get(n)), None) or next(
        (run.arguments[n] for n in ("max_seq_length", "max_length") if run.arguments.get(n)), None
    )


def _epochs(run: TrainingRun) -> Any:
    return next(
        (round(row["epoch"], 3) for row in reversed(run.log_history) if isinstance(row.get("epoch"), (int, float))), None
    )


_HYPERPARAMETERS: dict[str, Get] = {
    "learning rate": _argument("learning_rate"),
    "schedule": _schedule,
    "optimizer": _optimizer,
    "weight decay": _argument("weight_decay"),
    "largest gradient norm": _argument("max_grad_norm"),
    "batch": _batch,
    "tokens per sequence": _length,
    "optimizer steps": lambda run: run.steps,
    "epochs": _epochs,
    "precision": _precision,
    "gradient checkpointing": lambda run: run.arguments.get("gradient_checkpointing") or None,
    "seed": _argument("seed"),
}
# Fields of `TrainingArguments` that these rows read.
_READ = (
    "learning_rate", "lr_scheduler_type", "warmup_steps", "optim", "adam_beta1", "adam_beta2", "adam_epsilon", "weight_decay",
    "max_grad_norm", "per_device_train_batch_size", "gradient_accumulation_steps", "max_seq_length", "max_length", "bf16",
    "fp16", "gradient_checkpointing", "seed",
)  # fmt: skip


def hyperparameter_rows(run: TrainingRun) -> list[tuple[str, str]]:
    """Names and values as a card shows them; what is not known is left out."""
    rows = {name: get(run) for name, get in _HYPERPARAMETERS.items()}
    for name, value in {**run.options, **run.arguments}.items():
        if _is_own_setting(name) and isinstance(value, (int, float, list)) and value:
            rows[name.replace("_", " ")] = ", ".join(map(str, value)) if isinstance(value, list) else value
    return [(name, _shown(value)) for name, value in rows.items() if value is not None]


def _is_own_setting(name: str) -> bool:
    """Whether it is a learning rate of a part of the model, or says that a part was frozen."""
    return name.startswith("freeze") or (name.endswith(("learning_rate", "_lr")) and name not in ("learning_rate", "min_lr"))


def _shown(value: Any) -> str:
    if isinstance(value, bool):
        return "yes" if value else "no"
    return f"{value:.6g}" if isinstance(value, float) else str(value)


# ---------------------------------------------------------------------- the load of the experts


@dataclass(frozen=True)
class LayerLoad:
    """How evenly one layer's experts were used.

    Attributes:
        layer: index of the decoder layer.
        num_experts: of the layer, where it is known.
        max_over_mean, cv, dead: of the last logging window: the largest load over the mean, the population standard deviation
            over the mean, the experts without an assignment.
        run_max_over_mean: the largest load over the mean of the whole run.
    """

    layer: int
    num_experts: int | None
    max_over_mean: float
    cv: float
    dead: int
    run_max_over_mean: float | None


def layer_loads(run: TrainingRun) -> list[LayerLoad]:
    """One row per MoE layer, from the file of expert load, or else from the last log."""
    if run.load is not None:
        last_LE, whole_LE = run.load.executed[-1].tolist(), run.load.totals()
        rows = []
        for index, (layer, count) in enumerate(zip(run.load.layers, run.load.num_experts, strict=True)):
            counts_E, mean = last_LE[index][:count], sum(last_LE[index][:count]) / count
            deviation = (sum((c - mean) ** 2 for c in counts_E) / count) ** 0.5
            rows.append(
                LayerLoad(layer, count, _over_mean(counts_E), deviation / mean if mean else 0.0,
                          sum(c == 0 for c in counts_E), _over_mean(whole_LE[index]))
            )  # fmt: skip
        return rows
    return [
        LayerLoad(layer, None, values["load_max_over_mean"], values["load_cv"], round(values.get("dead_experts", 0)), None)
        for layer, values in sorted(layer_metrics(run).items())
        if {"load_max_over_mean", "load_cv"} <= values.keys()
    ]


def _over_mean(counts_E: list[int]) -> float:
    return max(counts_E) * len(counts_E) / sum(counts_E) if sum(counts_E) else 0.0
