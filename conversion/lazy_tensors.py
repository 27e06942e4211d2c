# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Planned tensors in a form that `from_pretrained(None, state_dict=…)` loads: each is computed when it is indexed, and only so
much of it as is asked for.

A `LazyTensor` is to a plan what a slice of safetensors (`safe_open(…).get_slice(name)`) is to a file. So Transformers' own
loading puts a planned model into memory, and where it shards the model, each rank computes its shard alone.
"""

from __future__ import annotations

import dataclasses
import math
import threading
from collections.abc import Iterator, Sequence
from functools import singledispatch
from typing import Any

import torch
from torch import Tensor

from hf_moe.auto import MoEConfig, MoEForCausalLM

from .checkpoint_reader import ITEM_SIZE, as_torch, dtype_name, torch_dtype
from .errors import ConversionError
from .payloads import Averaged, Elementwise, Joined, OutputTensor, SourceBytes
from .streamed_model import NotStreamableError, parameter_dtypes, tensor_sources

_Ranges = tuple[tuple[int, int], ...]  # first and last (exclusive) index along each dimension


class LazyTensor:
    """A tensor of a model that is computed from a plan when it is indexed.

    Args:
        shape: of the whole.
        parts: the planned tensors that it consists of: one; or, `stacked`, for each index of the first dimension those that
            lie one below the other there (an expert's gate and up projection).
        lock: held while values are computed. Loading has several threads, which must not have a tensor each in the making,
            and readers of checkpoints know nothing of threads.
        stacked: see `parts`.
        dtype: that values are rounded to as they are read (default: the parts').
    """

    def __init__(
        self,
        shape: tuple[int, ...],
        parts: Sequence[tuple[OutputTensor, ...]],
        lock: threading.Lock,
        *,
        stacked: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        self.shape, self._parts, self._lock, self._stacked = shape, parts, lock, stacked
        self.dtype: torch.dtype = torch_dtype(parts[0][0].dtype) if dtype is None else dtype

    def get_shape(self) -> list[int]:
        """As of a slice of safetensors."""
        return list(self.shape)

    def get_dtype(self) -> str:
        """safetensors' name of the dtype."""
        return dtype_name(self.dtype)

    def is_floating_point(self) -> bool:
        """As `Tensor`'s."""
        return self.dtype.is_floating_point

    def __getitem__(self, index: Any) -> Tensor:
        """What `tensor[index]` would be, of the values asked for only if `index` is `...` or slices."""
        ranges = _as_ranges(index, self.shape)
        with self._lock:
            return self._compute(_whole(self.shape))[index] if ranges is None else self._compute(ranges)

    def _compute(self, ranges: _Ranges) -> Tensor:
        out = torch.empty([stop - start for start, stop in ranges], dtype=self.dtype)
        groups: dict[Any, tuple[OutputTensor, list[Tensor]]] = {}  # equal payloads are read once
        for part, needed, target in self._needed(ranges, out):
            groups.setdefault((part.payload, needed), (part, []))[1].append(target)
        for (_, needed), (part, targets) in groups.items():
            _fill(part, needed, targets)
        return out

    def _needed(self, ranges: _Ranges, out: Tensor) -> Iterator[tuple[OutputTensor, _Ranges, Tensor]]:
        """The parts of which something is needed, what of them, and where in `out` it belongs."""
        if not self._stacked:
            yield self._parts[0][0], ranges, out
            return
        (first, last), (top, bottom), *columns = ranges
        for index in range(first, last):
            row = 0
            for part in self._parts[index]:
                start, stop = max(top - row, 0), min(bottom - row, part.shape[0])
                if start < stop:
                    yield part, ((start, stop), *columns), out[index - first, row + start - top : row + stop - top]
                row += part.shape[0]


def lazy_state_dict(
    config: MoEConfig, tensors: Sequence[OutputTensor], dtype: torch.dtype, ep_size: int = 1
) -> dict[str, LazyTensor]:
    """A planned model's tensors, for `MoEForCausalLM.from_pretrained(None, config=config, state_dict=…)`.

    They have the names that they have in the model, experts stacked, so that nothing is merged on loading: it would take a
    second copy. They are as on disk where the dense model's own tensors are merged or split on loading; and those of a layer's
    experts where a rank gets none of them: Transformers cannot cut an empty part out of a tensor that FSDP shards as well.

    Args:
        config: of the MoE.
        tensors: by the names that they have on disk.
        dtype: that the model is loaded in.
        ep_size: ranks that the experts will lie on, as `torch.chunk` divides them.

    Raises:
        ConversionError: a tensor is missing, or of another shape than the model's.
    """
    with torch.device("meta"):
        model = MoEForCausalLM._from_config(config, dtype=dtype)
    planned, lock = {tensor.name: tensor for tensor in tensors}, threading.Lock()
    try:
        sources = tensor_sources(model, planned)
    except NotStreamableError:
        return {tensor.name: LazyTensor(tensor.shape, [(tensor,)], lock) for tensor in tensors}
    missing = sorted(set(model.state_dict()) - set(sources))
    if missing:
        raise ConversionError(f"Tensor `{missing[0]}` of the model is not planned ({len(missing)} in all).")
    dtypes, taken = parameter_dtypes(model, dtype), set()
    state: dict[str, LazyTensor] = {}
    for name, source in sources.items():
        stacked = isinstance(source, list)
        parts = [tuple(planned[part] for part in one) for one in (source if isinstance(source, list) else [source])]
        if parts[0][0].name in taken:  # tied to another, which Transformers sees to
            continue
        taken |= {part.name for one in parts for part in one}
        if stacked and -(-len(parts) // ep_size) * (ep_size - 1) >= len(parts):
            state |= {part.name: LazyTensor(part.shape, [(part,)], lock) for one in parts for part in one}
            continue
        shape = tuple(model.get_parameter_or_buffer(name).shape)
        _check_shape(name, shape, parts, stacked)
        state[name] = LazyTensor(shape, parts, lock, stacked=stacked, dtype=dtypes.get(name))
    return state


def _check_shape(name: str, expected: tuple[int, ...], parts: list[tuple[OutputTensor, ...]], stacked: bool) -> None:
    for one in parts:
        found = (len(parts), sum(part.shape[0] for part in one), *one[0].shape[1:]) if stacked else one[0].shape
        if found != expected:
            raise ConversionError(f"`{name}` has shape {list(expected)} in the model, but {list(found)} is planned.")


def _as_ranges(index: Any, shape: tuple[int, ...]) -> _Ranges | None:
    """An index of `...` or slices without steps as ranges; `None` for others."""
    if index is Ellipsis:
        return _whole(shape)
    slices = index if isinstance(index, tuple) else (index,)
    if len(slices) > len(shape) or not all(isinstance(one, slice) and one.step in (None, 1) for one in slices):
        return None
    given = [one.indices(size)[:2] for one, size in zip(slices, shape, strict=False)]
    return tuple((start, max(start, stop)) for start, stop in given) + _whole(shape)[len(given) :]


def _whole(shape: tuple[int, ...]) -> _Ranges:
    return tuple((0, size) for size in shape)


def _fill(tensor: OutputTensor, ranges: _Ranges, targets: list[Tensor]) -> None:
    """Put `tensor[ranges]` into each of `targets`."""
    if not all(target.numel() for target in targets):
        return
    (start, stop), row = ranges[0] if ranges else (0, 1), math.prod(tensor.shape[1:])
    into = targets
    if ranges[1:] != _whole(tensor.shape)[1:]:  # some columns: of whole rows, which are what lies together
        into = [torch.empty((stop - start, *tensor.shape[1:]), dtype=targets[0].dtype)]
    flat, position, size = [target.view(-1) for target in into], 0, ITEM_SIZE[tensor.dtype]
    for piece in _bytes(tensor.payload, start * row * size, stop * row * size):
        values = as_torch(bytes(piece) if piece.readonly else piece, tensor.dtype)
        for target in flat:
            target[position : position + values.numel()].copy_(values)
        position += values.numel()
    if into is not targets:
        columns = (slice(None), *(slice(*one) for one in ranges[1:]))
        for target in targets:
            target.copy_(into[0][columns])


@singledispatch
def _bytes(payload: Any, start: int, stop: int) -> Iterator[memoryview]:
    """Bytes `start` to `stop` of a payload, in pieces; each is valid until the next is asked for.

    Of what is computed as a whole they are cut out; for the others see below.
    """
    position = 0
    for piece in payload.chunks():
        begin, end = max(start - position, 0), min(stop - position, len(piece))
        if begin < end:
            yield piece[begin:end]
        position += len(piece)
        if position >= stop:
            return


@_bytes.register
def _(payload: SourceBytes, start: int, stop: int) -> Iterator[memoryview]:
    return _cut(payload, start, stop).chunks()


@_bytes.register
def _(payload: Elementwise, start: int, stop: int) -> Iterator[memoryview]:
    given, made = ITEM_SIZE[payload.source_dtype], ITEM_SIZE[payload.dtype]
    return dataclasses.replace(payload, source=_cut(payload.source, start // made * given, stop // made * given)).chunks()


@_bytes.register
def _(payload: Averaged, start: int, stop: int) -> Iterator[memoryview]:
    first = payload.parts[0]
    given, made = ITEM_SIZE[first.checkpoint[first.name].dtype], ITEM_SIZE[payload.dtype]
    parts = tuple(_cut(part, start // made * given, stop // made * given) for part in payload.parts)
    return dataclasses.replace(payload, parts=parts).chunks()


@_bytes.register
def _(payload: Joined, start: int, stop: int) -> Iterator[memoryview]:
    position = 0
    for part in payload.parts:
        begin, end = max(start - position, 0), min(stop - position, part.nbytes)
        if begin < end:
            yield from _bytes(part, begin, end)
        position += part.nbytes


def _cut(source: SourceBytes, start: int, stop: int) -> SourceBytes:
    return dataclasses.replace(source, start=source.start + start, stop=source.start + stop)


__all__ = ["LazyTensor", "lazy_state_dict"]
