# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints of an expert-parallel training, to be resumed with any number of ranks and any expert parallelism, or none.

They are written with torch's DCP: every rank writes what it holds and reads what it will hold, and nobody ever has the whole
model. The entries are `model.<parameter>` and `optimizer.state.<parameter>.<entry>`, as those of Transformers'
`save_optimizer_distributed`, and one with the options of the parameter groups. Experts are in the order of their ids wherever
they lie. The optimizer's groups may be others when the training goes on: options belong to parameters.
"""

from __future__ import annotations

import pickle
import warnings
from collections.abc import Iterator, Mapping
from concurrent.futures import Future
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
import torch.distributed.checkpoint as dcp
from torch import Tensor, nn
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata
from torch.distributed.checkpoint.staging import AsyncStager

from .expert_placement import check_dispatcher, ep_size
from .optimizer_groups import empty_like_saved, group_options, optimized_parameters, plain_optimizer, set_group_options
from .streamed_checkpoint import consolidate_from, load_hub_weights, save_all_but_weights, save_expert_parallel
from .tensor_pieces import (
    Pieces,
    PiecesLoadPlanner,
    PiecesSavePlanner,
    clean_name,
    expert_orders,
    model_tensors,
    placements,
)

DISTRIBUTED_FOLDER = "distributed_checkpoint"  # in a checkpoint of `MoETrainer`
METADATA = ".metadata"  # DCP writes it last
_WEIGHTS, _STATE, _GROUPS, _ABOUT = "model.", "optimizer.state.", "optimizer.groups", "hf_moe"
_FORMAT = 1


class PendingSave:
    """A save that may go on while training does.

    Attributes:
        folder: where it is written.
    """

    def __init__(self, folder: Path, future: Future | None = None, group: dist.ProcessGroup | None = None) -> None:
        self.folder = folder
        self._future, self._group = future, group

    def done(self) -> bool:
        """Whether this rank has nothing left to do."""
        return self._future is None or self._future.done()

    def wait(self) -> None:
        """Wait until the checkpoint is whole, on all ranks. An error in the saving of any rank is raised here, on every one."""
        future, self._future = self._future, None
        group, self._group = self._group, None
        try:
            if future is not None:
                future.result()
        finally:
            if group is not None:
                dist.destroy_process_group(group)


class _AlreadyCopied(AsyncStager):
    """The entries are copies in main memory when DCP gets them."""

    _synchronize_after_execute = False

    def stage(self, state_dict: Any) -> Any:
        return state_dict

    def synchronize_staging(self) -> None:
        return None

    def close(self) -> None:
        return None


def save_distributed(
    model: nn.Module,
    optimizer: torch.optim.Optimizer | None,
    folder: str | Path,
    *,
    async_save: bool = False,
) -> PendingSave:
    """Save a model and its optimizer, every rank what it holds. All ranks call it, between two optimizer steps.

    Args:
        model: expert-parallel or not. Of a model with PEFT adapters, what is trained is saved, and buffers.
        optimizer: its state and options are saved, too; `None` to save the model only.
        folder: to write to. It is a whole checkpoint when `.metadata` is in it.
        async_save: copy everything to main memory, then write in a thread while training goes on.

    Returns:
        On which to `wait()`, if it was asynchronous, before another save and before the training ends.

    Raises:
        CheckpointException: a rank could not write.
    """
    folder = Path(folder)
    entries: dict[str, Any] = {_WEIGHTS + name: pieces for name, pieces in _weights(model).items()}
    if optimizer is not None:
        entries |= _optimizer_entries(model, optimizer)
    world = dist.get_world_size() if dist.is_initialized() else 1
    entries[_ABOUT] = {"format": _FORMAT, "world_size": world, "placement": _placement(model)}
    if not async_save:
        with _without_a_group_is_fine():
            dcp.save(entries, checkpoint_id=folder, planner=PiecesSavePlanner())
        return PendingSave(folder)
    entries = {name: entry.to_host() if isinstance(entry, Pieces) else entry for name, entry in entries.items()}
    if torch.cuda.is_available():
        torch.cuda.current_stream().synchronize()  # for the copies
    group = dist.new_group(backend="gloo") if dist.is_initialized() else None  # its collectives meet no others
    with _without_a_group_is_fine():
        future = dcp.async_save(
            entries, checkpoint_id=folder, planner=PiecesSavePlanner(), process_group=group, async_stager=_AlreadyCopied()
        )
    assert isinstance(future, Future)
    return PendingSave(folder, future, group)


def load_distributed(model: nn.Module, optimizer: torch.optim.Optimizer | None, folder: str | Path) -> None:
    """Load what `save_distributed` saved, at any number of ranks and any expert parallelism, or in one process without.

    All ranks call it. Experts that were moved lie where they lay, if as many ranks share them; else they stay where they are.

    Args:
        model: of the same parameters, sharded or not.
        optimizer: of the same parameters, or `None` to load the model only.
        folder: of the checkpoint.

    Raises:
        ValueError: it is no such checkpoint, or is not whole, or is of another model or optimizer.
    """
    reader = _Reader(folder)
    _restore_placement(model, reader.about[_ABOUT]["placement"])
    entries: dict[str, Any] = {_WEIGHTS + name: pieces for name, pieces in _weights(model).items()}
    reader.check(entries, type(model).__name__)
    reader.load(entries)
    if optimizer is not None:
        load_optimizer(model, optimizer, folder)


def load_optimizer(model: nn.Module, optimizer: torch.optim.Optimizer, folder: str | Path) -> None:
    """The optimizer's part of `load_distributed`."""
    reader = _Reader(folder)
    if _GROUPS not in reader.saved:
        raise ValueError(f"{folder}: no optimizer was saved. Load the model only.")
    optimizer = plain_optimizer(optimizer)
    orders, entries = expert_orders(model), dict[str, Any]({_GROUPS: None})
    states: dict[nn.Parameter, dict[str, Any]] = {}
    saved = _entries_by_parameter(reader.saved)
    for name, (parameter, group) in optimized_parameters(model, optimizer).items():
        states[parameter] = state = {
            entry: empty_like_saved(f"{name}.{entry}", parameter, group, info) for entry, info in saved.get(name, {}).items()
        }
        for entry, value in state.items():
            entries[f"{_STATE}{name}.{entry}"] = Pieces(value, orders.get(name)) if isinstance(value, Tensor) else None
    reader.load(entries)
    names = {parameter: name for name, (parameter, _) in optimized_parameters(model, optimizer).items()}
    set_group_options(optimizer, names, entries[_GROUPS] or {})
    for parameter, state in states.items():
        for entry, value in state.items():
            if value is None:
                state[entry] = entries[f"{_STATE}{names[parameter]}.{entry}"]
        if state:
            optimizer.state[parameter] = state


def consolidate(checkpoint_folder: str | Path, out: str | Path, max_shard_size: int | str = "50GB") -> None:
    """Make an ordinary checkpoint for the Hub of one of an expert-parallel training, in one process, tensor by tensor.

    Args:
        checkpoint_folder: `checkpoint-N` of `MoETrainer`, or any folder with `config.json` and, in it or in
            `distributed_checkpoint`, what `save_distributed` wrote.
        out: folder to write to.
        max_shard_size: of a file.

    Raises:
        ValueError: there is no whole checkpoint, or it holds an adapter and not the model.
    """
    reader = _Reader(distributed_folder(checkpoint_folder))

    def fetch(name: str) -> Tensor:
        info = reader.saved[_WEIGHTS + name]
        assert isinstance(info, TensorStorageMetadata)
        whole = torch.empty(info.size, dtype=info.properties.dtype)
        reader.load({_WEIGHTS + name: Pieces(whole)}, alone=True)
        return whole

    dtypes = {n.removeprefix(_WEIGHTS): i.properties.dtype for n, i in reader.saved.items() if n.startswith(_WEIGHTS)}
    consolidate_from(fetch, dtypes, Path(checkpoint_folder), Path(out), max_shard_size)


def distributed_folder(checkpoint: str | Path) -> Path:
    """Where in a checkpoint of `MoETrainer` the distributed part is; the folder itself if it is one."""
    inside = Path(checkpoint) / DISTRIBUTED_FOLDER
    return inside if inside.is_dir() else Path(checkpoint)


def missing_part(folder: str | Path) -> str | None:
    """The first file of a distributed checkpoint that is missing or cut short, or `None` if it is whole."""
    try:
        stored = _read_metadata(Path(folder)).storage_data
        ends: dict[str, int] = {}
        for place in stored.values():
            ends[place.relative_path] = max(ends.get(place.relative_path, 0), place.offset + place.length)
        short = [name for name, end in ends.items() if not _is_long_enough(Path(folder) / name, end)]
    except (OSError, EOFError, AttributeError, pickle.UnpicklingError):
        return METADATA
    return min(short, default=None)


def _is_long_enough(path: Path, size: int) -> bool:
    return path.is_file() and path.stat().st_size >= size


# ---------------------------------------------------------------------- entries


def _placement(model: nn.Module) -> dict[str, Any]:
    """Where the experts lie that were moved, by the name of their module."""
    modules = {clean_name(name): module for name, module in model.named_modules()}
    return {n: {"slots": slots.tolist(), "ep_size": ep_size(modules[n])} for n, slots in placements(model).items()}


def _restore_placement(model: nn.Module, saved: Mapping[str, Any]) -> None:
    """Say where the experts lie, before their rows are loaded."""
    for name, experts in model.named_modules():
        found = saved.get(clean_name(name))
        if found is not None and ep_size(experts) == found["ep_size"]:
            check_dispatcher(model)
            device = next(experts.parameters(recurse=False)).device
            vars(experts)["slot_of_expert"] = torch.tensor(found["slots"], device=device)


def _weights(model: nn.Module) -> dict[str, Pieces]:
    """Of a model with adapters, the base model is elsewhere."""
    orders, tensors = expert_orders(model), model_tensors(model)
    if hasattr(model, "peft_config"):
        tensors = {n: t for n, t in tensors.items() if t.requires_grad or not isinstance(t, nn.Parameter)}
    return {name: Pieces(tensor, orders.get(name)) for name, tensor in tensors.items()}


def _optimizer_entries(model: nn.Module, optimizer: Any) -> dict[str, Any]:
    optimizer = plain_optimizer(optimizer)
    orders, entries, options = expert_orders(model), {}, {}
    for name, (parameter, group) in optimized_parameters(model, optimizer).items():
        options[name] = group_options(group)
        for entry, value in optimizer.state.get(parameter, {}).items():
            entries[f"{_STATE}{name}.{entry}"] = Pieces(value, orders.get(name)) if isinstance(value, Tensor) else value
    return {**entries, _GROUPS: options}


def _entries_by_parameter(saved: Mapping[str, Any]) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for key, info in saved.items():
        if key.startswith(_STATE):
            name, _, entry = key.removeprefix(_STATE).rpartition(".")
            found.setdefault(name, {})[entry] = info
    return found


class _Reader:
    """A distributed checkpoint, whose metadata is read once."""

    def __init__(self, folder: str | Path) -> None:
        self.folder = Path(folder)
        missing = missing_part(folder)
        if missing is not None:
            raise ValueError(f"{folder}: {missing} is missing or cut short, so there is no whole distributed checkpoint.")
        self._metadata = _read_metadata(self.folder)
        self.saved: dict[str, Any] = self._metadata.state_dict_metadata
        self.about: dict[str, Any] = {_ABOUT: {"format": 0}}
        if _ABOUT in self.saved:
            self.load(self.about, alone=True)
        if self.about[_ABOUT]["format"] != _FORMAT:
            raise ValueError(f"{folder}: it was not written by `save_distributed` of this version. Load it with what wrote it.")

    def check(self, entries: Mapping[str, Any], model: str) -> None:
        """That the model's entries are those of the checkpoint."""
        weights = {name for name in self.saved if name.startswith(_WEIGHTS)}
        absent, left = sorted(entries.keys() - weights), sorted(weights - entries.keys())
        for found, what in ((absent, "is not in the checkpoint"), (left, f"is in the checkpoint, but not in {model}")):
            if found:
                raise ValueError(f"{self.folder}: {found[0].removeprefix(_WEIGHTS)} {what}. Give the model that was trained.")
        for name in weights:
            if self.saved[name].size != entries[name].size():
                raise ValueError(
                    f"{self.folder}: {name.removeprefix(_WEIGHTS)} is {list(self.saved[name].size)}, in {model} "
                    f"{list(entries[name].size())}. Give the model that was trained."
                )

    def load(self, entries: dict[str, Any], alone: bool = False) -> None:
        """Fill `Pieces` in place, and put other values into `entries`."""
        storage, metadata = dcp.FileSystemReader(self.folder), self._metadata
        storage.read_metadata = lambda *args, **kwargs: metadata  # type: ignore[method-assign]
        with _without_a_group_is_fine(), torch.no_grad():
            dcp.load(entries, storage_reader=storage, planner=PiecesLoadPlanner(), no_dist=alone)


def _read_metadata(folder: Path) -> Metadata:
    return dcp.FileSystemReader(folder).read_metadata()


@contextmanager
def _without_a_group_is_fine() -> Iterator[None]:
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", message="torch.distributed is disabled")
        warnings.filterwarnings("ignore", message="Detected an existing checkpoint")
        yield


__all__ = [
    "DISTRIBUTED_FOLDER",
    "PendingSave",
    "consolidate",
    "distributed_folder",
    "load_distributed",
    "load_hub_weights",
    "load_optimizer",
    "missing_part",
    "save_all_but_weights",
    "save_distributed",
    "save_expert_parallel",
]
