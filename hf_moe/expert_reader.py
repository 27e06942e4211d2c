# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Where the experts are in a checkpoint, how one lies in a slot of the cache, and how it gets there."""

from __future__ import annotations

import math
import re
import threading
from collections import defaultdict
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from transformers.core_model_loading import WeightConverter, WeightRenaming, rename_source_key

from .expert_cache import Expert, ExpertCache, Weights
from .expert_files import SafetensorsFiles, StoredTensor

_ALIGNMENT = 64  # bytes: a cache line, and what vector instructions like
_NUMBER = re.compile(r"\.experts\.(\d+)\.")


@dataclass(frozen=True)
class ExpertLayer:
    """The experts of one MoE layer.

    Attributes:
        path: of the experts' module in the model.
        num_experts: E.
        shapes: of one expert's tensors, by name.
    """

    path: str
    num_experts: int
    shapes: dict[str, tuple[int, ...]]

    @property
    def num_parameters(self) -> int:
        """Of all experts."""
        return self.num_experts * sum(map(math.prod, self.shapes.values()))

    def nbytes(self, dtype: torch.dtype) -> int:
        """Of one expert in the cache."""
        return sum(_aligned(math.prod(shape) * dtype.itemsize) for shape in self.shapes.values())

    def views(self, memory: Tensor, dtype: torch.dtype) -> Weights:
        """One expert's tensors, as views of uint8 memory."""
        start, found = 0, {}
        for name, shape in self.shapes.items():
            size = math.prod(shape) * dtype.itemsize
            found[name] = memory[start : start + size].view(dtype).view(shape)
            start += _aligned(size)
        return found


@dataclass(frozen=True)
class Piece:
    """Rows of an expert's tensor that stand in one place of a file: the gate, say, above the up projection.

    Attributes:
        name: of the tensor in the model.
        row: the first that is filled.
        stored: where the rows stand.
    """

    name: str
    row: int
    stored: StoredTensor


def find_experts(
    tensors: Mapping[str, StoredTensor], layers: Sequence[ExpertLayer], mapping: Sequence[Any]
) -> tuple[dict[Expert, list[Piece]], dict[str, str]]:
    """Sort the tensors of a checkpoint into experts and others.

    Args:
        tensors: by name on disk. Experts are stored one by one, or stacked as in the model.
        layers: what the model has.
        mapping: how Transformers renames and converts tensors of this model.

    Returns:
        The pieces of every expert; and of the other tensors the names on disk, with those in the model.

    Raises:
        ValueError: a part of an expert is missing, or has another shape.
    """
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    part_of = {p: (i, len(c.source_patterns)) for c in converters for i, p in enumerate(c.source_patterns)}
    offloaded = {f"{layer.path}.{name}": (i, name) for i, layer in enumerate(layers) for name in layer.shapes}
    pieces: dict[Expert, list[Piece]] = defaultdict(list)
    others: dict[str, str] = {}
    for key, stored in tensors.items():
        target, pattern = rename_source_key(key, renamings, converters)
        if target not in offloaded:
            others[key] = target
            continue
        index, name = offloaded[target]
        shape, total = layers[index].shapes[name], layers[index].num_experts
        number = _NUMBER.search(key)
        if pattern is None or number is None:
            _check_shape(key, stored.shape, (total, *shape))
            for expert in range(total):
                pieces[index, expert].append(Piece(name, 0, stored[expert]))
        else:
            part, parts = part_of[pattern]
            rows = shape[0] // parts
            _check_shape(key, stored.shape, (rows, *shape[1:]))
            pieces[index, int(number.group(1))].append(Piece(name, part * rows, stored))
    _check_complete(pieces, layers)
    return dict(pieces), others


def _check_shape(key: str, found: tuple[int, ...], expected: tuple[int, ...]) -> None:
    if found != expected:
        raise ValueError(f"{key} has shape {found}, but the config makes it {expected}. Give a checkpoint of this model.")


def _check_complete(pieces: Mapping[Expert, Sequence[Piece]], layers: Sequence[ExpertLayer]) -> None:
    for index, layer in enumerate(layers):
        for expert in range(layer.num_experts):
            rows: dict[str, int] = defaultdict(int)
            for piece in pieces.get((index, expert), ()):
                rows[piece.name] += piece.stored.shape[0]
            lacking = [name for name, shape in layer.shapes.items() if rows[name] != shape[0]]
            if lacking:
                raise ValueError(
                    f"The checkpoint has no whole {lacking[0]!r} of expert {expert} in {layer.path}. Give a whole checkpoint."
                )


class ExpertReader:
    """Fills slots of a cache with experts.

    Args:
        files: the checkpoint.
        pieces: where every expert stands in it.
        layers: what the model has.
        dtype: of the weights in the cache.
        held: all experts in CPU memory, in the same dtype, to copy from instead.
    """

    def __init__(
        self,
        files: SafetensorsFiles,
        pieces: Mapping[Expert, Sequence[Piece]],
        layers: Sequence[ExpertLayer],
        dtype: torch.dtype,
        held: ExpertCache | None = None,
    ) -> None:
        self._files, self._pieces, self._layers, self._dtype, self._held = files, pieces, layers, dtype, held
        self._of_thread = threading.local()

    def __call__(self, expert: Expert, memory: Tensor, after: Any) -> tuple[Weights, int]:
        """See `ExpertCache`: fill uint8 memory. Returns views of it, and the number of bytes read."""
        layer = self._layers[expert[0]]
        weights = layer.views(memory, self._dtype)
        if memory.device.type == "cpu":
            return weights, self.read(expert, weights)
        if self._held is not None:
            with self._held.use(expert) as source:
                self._copy(weights, source, memory.device, after)
            return weights, layer.nbytes(self._dtype)
        if not hasattr(self._of_thread, "staging"):
            self._of_thread.staging = torch.empty(memory.shape, dtype=torch.uint8, pin_memory=True)
        staging = layer.views(self._of_thread.staging, self._dtype)
        size = self.read(expert, staging)
        self._copy(weights, staging, memory.device, after)
        return weights, size

    def read(self, expert: Expert, weights: Weights) -> int:
        """Read into an expert's CPU tensors; those that are not given are left out. Returns the number of bytes read."""
        size = 0
        for piece in self._pieces[expert]:
            if piece.name in weights:
                rows = weights[piece.name][piece.row : piece.row + piece.stored.shape[0]]
                size += self._files.read(piece.stored, rows)
        return size

    def _copy(self, target: Weights, source: Weights, device: torch.device, after: Any) -> None:
        """On a stream of the thread's own; `after`: the event that says that the slot is not computed with any more."""
        if not hasattr(self._of_thread, "stream"):
            self._of_thread.stream = torch.cuda.Stream(device)
        stream = self._of_thread.stream
        with torch.cuda.stream(stream):
            if after is not None:
                stream.wait_event(after)
            for name, tensor in source.items():
                target[name].copy_(tensor, non_blocking=True)
        stream.synchronize()


def _aligned(size: int) -> int:
    return -(-size // _ALIGNMENT) * _ALIGNMENT


__all__ = ["ExpertLayer", "ExpertReader", "Piece", "find_experts"]
