# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""What there is to report on: the checkpoint, the log and the expert load of a run folder, or just a model."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from hf_moe.expert_load import LOAD_FILE, ExpertLoad, read_expert_load

from .checkpoints import what_is_missing

_WEIGHTS = re.compile(r"^(adapter_)?(model|pytorch_model)[^/]*\.(safetensors|bin|index\.json)$")
_TOKENIZER = ("tokenizer.json", "tokenizer.model", "tokenizer_config.json", "vocab.json", "tekken.json")


@dataclass(frozen=True)
class Source:
    """Where a report's numbers come from.

    Attributes:
        name: for the headline.
        checkpoint: folder or Hub id of the model; `None` if a run folder has none.
        tokenizer: folder or Hub id of the tokenizer; `None` if there is none.
        log_history: as `Trainer` keeps it; empty if there is none.
        expert_load: what `ExpertLoadCallback` wrote, if it did.
        missing: one sentence for everything that is not there.
    """

    name: str
    checkpoint: str | None
    tokenizer: str | None
    log_history: list[dict[str, Any]] = field(default_factory=list)
    expert_load: ExpertLoad | None = None
    missing: list[str] = field(default_factory=list)


def find_source(run_or_model: str | os.PathLike[str], tokenizer: str | None = None) -> Source:
    """Look at a run folder, a model folder or a Hub id.

    Args:
        run_or_model: it.
        tokenizer: folder or Hub id of the tokenizer (default: what lies beside the model).

    Raises:
        ValueError: there is nothing to report on.
    """
    name = os.fspath(run_or_model)
    folder = Path(name)
    if not folder.is_dir():
        if folder.exists() or folder.is_absolute() or name.startswith((".", "~")) or name.count("/") > 1 or not name:
            raise ValueError(
                f"`RUN_OR_MODEL`={name!r} is not a folder. Give the `--output_dir` of a training, the folder of a model, or "
                "the id of a model on the Hub."
            )
        return Source(name, name, tokenizer or name, missing=["This is a model without a training run: no curves over steps."])
    checkpoints = _checkpoints(folder)
    checkpoint = next((place for place in (folder, *checkpoints) if _has_weights(place)), None)
    places = [place for place in (folder, *checkpoints) if any((place / file).is_file() for file in _TOKENIZER)]
    log_history = _log_history(folder, checkpoints)
    load = _expert_load(folder)
    if checkpoint is None and not log_history and load is None:
        raise ValueError(
            f"`RUN_OR_MODEL`={name!r} has no model, no training log and no {LOAD_FILE}. Give the `--output_dir` of a training, "
            "or the folder of a model."
        )
    tokenizer = tokenizer or (str(places[0]) if places else None)
    missing = _missing(checkpoint, tokenizer is not None, bool(log_history), load)
    return Source(
        name=folder.resolve().name,
        checkpoint=None if checkpoint is None else str(checkpoint),
        tokenizer=tokenizer,
        log_history=log_history,
        expert_load=load,
        missing=missing,
    )


def _missing(checkpoint: Path | None, has_tokenizer: bool, has_log: bool, load: ExpertLoad | None) -> list[str]:
    said = []
    if checkpoint is None:
        said.append("The folder has no model (no config.json with weights), so nothing is said about text and weights.")
    elif not has_tokenizer:
        said.append("The model has no tokenizer beside it (name one with `--tokenizer`), so it was run on no text.")
    if not has_log and load is None:
        said.append("The folder has no training log (trainer_state.json or metrics.json): no curves over steps.")
    elif not has_log:
        said.append("The folder has no training log (trainer_state.json or metrics.json): no losses over steps.")
    elif load is None:
        said.append(f"The folder has no {LOAD_FILE} (`ExpertLoadCallback` writes it): no load over steps.")
    return said


def _checkpoints(folder: Path) -> list[Path]:
    """`checkpoint-N` folders, newest first, and those that a killed training was writing last."""
    found = [(int(m[1]), place) for place in folder.iterdir() if (m := re.fullmatch(r"checkpoint-(\d+)", place.name))]
    return [p for _, _, p in sorted((what_is_missing(p) is None, step, p) for step, p in found if p.is_dir())][::-1]


def _has_weights(folder: Path) -> bool:
    has_config = (folder / "config.json").is_file() or (folder / "adapter_config.json").is_file()
    return has_config and any(_WEIGHTS.match(file.name) for file in folder.iterdir())


def _log_history(folder: Path, checkpoints: list[Path]) -> list[dict[str, Any]]:
    """The longest of the histories that a run leaves: `metrics.json`'s, or `Trainer`'s state at the end or in a checkpoint."""
    files = [folder / "metrics.json", folder / "trainer_state.json", *(place / "trainer_state.json" for place in checkpoints)]
    histories = [_history_in(file) for file in files if file.is_file()]
    return max(histories, key=lambda history: max((row.get("step", 0) for row in history), default=-1), default=[])


def _history_in(file: Path) -> list[dict[str, Any]]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except ValueError:  # cut short by a kill; there may be another
        return []
    history = content.get("log_history") if isinstance(content, dict) else None
    return [row for row in history if isinstance(row, dict)] if isinstance(history, list) else []


def _expert_load(folder: Path) -> ExpertLoad | None:
    file = folder / LOAD_FILE
    load = read_expert_load(file) if file.is_file() else None
    return load if load is not None and load.steps else None


def series(history: list[dict[str, Any]], name: str) -> tuple[list[int], list[float]]:
    """Steps and finite values of one key of a log history."""
    rows = [(row["step"], row[name]) for row in history if isinstance(row.get(name), int | float) and "step" in row]
    rows = [(step, float(value)) for step, value in rows if abs(value) < float("inf")]
    return [step for step, _ in rows], [value for _, value in rows]
