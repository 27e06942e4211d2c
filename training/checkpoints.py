# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of a `Trainer`: which are whole (not one that was being written in a kill), and how they are read back."""

from __future__ import annotations

import json
import re
import zipfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from transformers import PreTrainedModel

from hf_moe.checkpoint_names import fused_state_dict
from hf_moe.expert_checkpoint import DISTRIBUTED_FOLDER, missing_part
from hf_moe.pretrained_moe import MoEPreTrainedModel

STATE = "MoETrainer"  # in `trainer_state.json`, among what callbacks keep there
_OF_TORCH = ("optimizer.pt", "optimizer.bin", "scheduler.pt", "scaler.pt", "training_args.bin", "rng_state*.pth")


def last_whole_checkpoint(output_dir: str | Path) -> Path | None:
    """The `checkpoint-N` of the largest N in which nothing is missing, or `None`."""
    folder = Path(output_dir)
    found = {int(m[1]): path for path in folder.glob("checkpoint-*") if (m := re.fullmatch(r"checkpoint-(\d+)", path.name))}
    return next((found[step] for step in sorted(found, reverse=True) if not what_is_missing(found[step])), None)


def what_is_missing(checkpoint: str | Path) -> str | None:
    """The first file of a checkpoint that is missing or cut short, or `None` if it is whole.

    `Trainer` writes `trainer_state.json` last, so where that is whole the others were written; they are looked at as well,
    by their headers, since ranks write files of their own and a full disk can cut any. Of a distributed checkpoint, which may
    be written in the background, `.metadata` comes last.
    """
    folder = Path(checkpoint)
    try:
        state = json.loads((folder / "trainer_state.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return "trainer_state.json"
    if not isinstance(state, dict) or "global_step" not in state:
        return "trainer_state.json"
    for index in folder.glob("*.index.json"):
        absent = _absent_shard(index)
        if absent is not None:
            return absent
    if (folder / DISTRIBUTED_FOLDER).is_dir():
        absent = _absent_part(folder, state)
        if absent is not None:
            return absent
    cut = [path for path in folder.glob("*.safetensors") if not _is_whole_safetensors(path)]
    cut += [path for pattern in _OF_TORCH for path in folder.glob(pattern) if not zipfile.is_zipfile(path)]
    return cut[0].name if cut else None


def _absent_part(folder: Path, state: dict[str, Any]) -> str | None:
    """What is missing of a distributed checkpoint, and of what each rank writes beside it."""
    part = missing_part(folder / DISTRIBUTED_FOLDER)
    if part is not None:
        return f"{DISTRIBUTED_FOLDER}/{part}"
    world = state.get("stateful_callbacks", {}).get(STATE, {}).get("attributes", {}).get("world_size", 1)
    of_ranks = [f"rng_state_{rank}.pth" for rank in range(world)] if world > 1 else ["rng_state.pth"]
    return next((name for name in ("scheduler.pt", *of_ranks) if not (folder / name).is_file()), None)


def _absent_shard(index: Path) -> str | None:
    """A file that an index names and that is not there, or the index if it is cut short."""
    try:
        names = set(json.loads(index.read_text(encoding="utf-8"))["weight_map"].values())
    except (OSError, ValueError, KeyError, AttributeError):
        return index.name
    return next((name for name in sorted(names) if not (index.parent / name).is_file()), None)


def _is_whole_safetensors(path: Path) -> bool:
    """Whether a file is as long as its header says."""
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        try:
            header = json.loads(file.read(length) if length < path.stat().st_size else b"")
            ends = [entry["data_offsets"][1] for name, entry in header.items() if name != "__metadata__"]
        except (ValueError, KeyError, TypeError, AttributeError):
            return False
    return path.stat().st_size == 8 + length + max(ends, default=0)


@contextmanager
def reading_names_on_disk(model: Any) -> Iterator[None]:
    """Inside, `model.load_state_dict` takes the names that a checkpoint has on disk, too.

    `Trainer` resumes with it, and Transformers' MoEs are saved with one tensor per expert: without this, Transformers 5.23
    goes on with the experts that the model was made with, and warns of missing keys. Ours does it by itself.
    """
    if not isinstance(model, PreTrainedModel) or isinstance(model, MoEPreTrainedModel):
        yield
        return

    def load_state_dict(state_dict: Any, *arguments: Any, **options: Any) -> Any:
        return type(model).load_state_dict(model, fused_state_dict(model, state_dict), *arguments, **options)

    model.load_state_dict = load_state_dict  # type: ignore[method-assign]
    try:
        yield
    finally:
        del model.load_state_dict
