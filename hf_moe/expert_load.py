# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""The file of expert load that a training leaves: how many assignments each expert of each MoE layer got, log by log.

It is a safetensors file with `step` int64 `[N]` and `executed` int64 `[N, L, E]`, rows in the order of the steps. Where layers
have different numbers of experts, E is the largest and the others are padded with zeros. While a training writes, a third
tensor `_reserved_step` keeps space for the steps to come.
"""

from __future__ import annotations

import itertools
import json
import os
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np

LOAD_FILE = "expert_load.safetensors"
LOAD_FORMAT = "hf_moe expert load 1"
_NOT_OURS = f"give the {LOAD_FILE} of a training."


@dataclass(frozen=True)
class ExpertLoad:
    """Assignments that were executed (after capacity), over real tokens and all ranks.

    Attributes:
        steps: at which optimizer steps they were logged, `[N]`, ascending.
        executed: int64 `[N, L, E]`, assignments since the row before; zeros beyond a layer's number of experts.
        layers: the decoder layer of each MoE layer, `[L]`.
        num_experts: the number of experts of each MoE layer, `[L]`.
    """

    steps: list[int]
    executed: np.ndarray
    layers: list[int]
    num_experts: list[int]

    def totals(self) -> list[list[int]]:
        """Assignments of each expert of each MoE layer, over all rows."""
        sums_LE = self.executed.sum(axis=0).tolist()
        return [sums[:count] for sums, count in zip(sums_LE, self.num_experts, strict=True)]


def read_expert_load(path: str | os.PathLike[str]) -> ExpertLoad:
    """Read a file of expert load, also while a training is writing it.

    Raises:
        OSError: it is not there, or cannot be read.
        ValueError: it is no file of expert load.
    """
    try:
        return _read(path)
    except ValueError:  # who is held up for two logs between opening the file and reading its header finds it rewritten
        return _read(path)


@contextmanager
def open_expert_load(path: str | os.PathLike[str]) -> Iterator[tuple[Any, list[int], list[int]]]:
    """Open a file of expert load without reading its rows: `safe_open`'s handle, `layers` and `num_experts`.

    Raises:
        OSError: it is not there, or cannot be read.
        ValueError: it is no file of expert load.
    """
    from safetensors import SafetensorError, safe_open

    try:
        opened = safe_open(path, framework="np")
    except SafetensorError as error:
        reason = " ".join(str(error).split())
        raise ValueError(f"{os.fspath(path)}: not a whole safetensors file ({reason}): {_NOT_OURS}") from error
    with opened as file:
        yield (file, *_described(file, path))


def _read(path: str | os.PathLike[str]) -> ExpertLoad:
    with open_expert_load(path) as (file, layers, num_experts):
        steps, executed_NLE = file.get_tensor("step").tolist(), file.get_tensor("executed")
    padding = np.arange(executed_NLE.shape[2]) >= np.array(num_experts)[:, None]
    if any(a >= b for a, b in itertools.pairwise(steps)):
        raise ValueError(f"{os.fspath(path)}: `step` is not ascending: {_NOT_OURS}")
    if executed_NLE.min(initial=0) < 0 or executed_NLE[:, padding].any():
        raise ValueError(
            f"{os.fspath(path)}: `executed` has negative counts, or counts of experts that are not there: {_NOT_OURS}"
        )
    return ExpertLoad(steps, executed_NLE, layers, num_experts)


def _described(file: Any, path: str | os.PathLike[str]) -> tuple[list[int], list[int]]:
    """`layers` and `num_experts`, once the tensors are what they say."""
    from safetensors import SafetensorError

    metadata = file.metadata() or {}
    if metadata.get("format") != LOAD_FORMAT:
        raise ValueError(f"{os.fspath(path)}: `format`={metadata.get('format')!r} is not {LOAD_FORMAT!r}: {_NOT_OURS}")
    try:
        layers, num_experts = (json.loads(metadata[name]) for name in ("layers", "num_experts"))
        step, executed = (file.get_slice(name) for name in ("step", "executed"))
        rows = step.get_shape()[0]
        fits = executed.get_shape() == [rows, len(layers), max(num_experts)] and len(layers) == len(num_experts)
        fits = fits and {type(number) for number in (*layers, *num_experts)} == {int} and min(num_experts) > 0
        fits = fits and step.get_shape() == [rows] and (step.get_dtype(), executed.get_dtype()) == ("I64", "I64")
    except (AttributeError, IndexError, KeyError, TypeError, ValueError, SafetensorError) as error:
        raise ValueError(f"{os.fspath(path)}: incomplete ({error!r}): {_NOT_OURS}") from error
    if not fits:
        raise ValueError(f"{os.fspath(path)}: its tensors are not of its `layers` and `num_experts`: {_NOT_OURS}")
    return layers, num_experts
