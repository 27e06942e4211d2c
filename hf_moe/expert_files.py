# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Single tensors, and rows of tensors, of safetensors files, read into memory that is there already.

Files are read (`preadv`), not mapped: the pages of a mapping count as memory of the process (RSS), and a private mapping counts
whole against `ulimit -d`. What has another dtype on disk is cast chunk by chunk.
"""

from __future__ import annotations

import json
import math
import os
import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

_DTYPES = {"F64": torch.float64, "F32": torch.float32, "F16": torch.float16, "BF16": torch.bfloat16}
_OTHER_DTYPES = {
    "I64": torch.int64, "I32": torch.int32, "I16": torch.int16, "I8": torch.int8, "U8": torch.uint8, "BOOL": torch.bool,
}  # fmt: skip
_CHUNK = 1 << 18  # bytes that are cast at a time


@dataclass(frozen=True)
class StoredTensor:
    """Where a tensor stands.

    Attributes:
        file: index of the file.
        start: its first byte.
        dtype, shape: on disk.
    """

    file: int
    start: int
    dtype: torch.dtype
    shape: tuple[int, ...]

    @property
    def nbytes(self) -> int:
        return math.prod(self.shape) * self.dtype.itemsize

    def __getitem__(self, index: int) -> StoredTensor:
        """Along the first dimension."""
        inner = replace(self, shape=self.shape[1:])
        return replace(inner, start=self.start + index * inner.nbytes)


class SafetensorsFiles:
    """The open files of a checkpoint. They stay readable when they are deleted or replaced by others of the same name.

    Args:
        paths: of the files.

    Attributes:
        tensors: by name.

    Raises:
        ValueError: one is not a safetensors file, or has a dtype that is not supported.
    """

    def __init__(self, paths: Sequence[str | os.PathLike[str]]) -> None:
        self._paths = [os.fspath(path) for path in paths]
        self._descriptors: list[int] = []
        self._close = weakref.finalize(self, _close_all, self._descriptors)
        self._states: list[tuple[int, int]] = []
        self._of_thread = threading.local()
        self.tensors: dict[str, StoredTensor] = {}
        for index, path in enumerate(self._paths):
            self._descriptors.append(os.open(path, os.O_RDONLY | getattr(os, "O_CLOEXEC", 0)))
            self._states.append(self._state(index))
            self.tensors |= self._header(index)

    def close(self) -> None:
        """Close the files; nothing can be read afterwards."""
        self._close()

    def read(self, stored: StoredTensor, target: Tensor) -> int:
        """Read a tensor into `target`: contiguous, on the CPU, of the same shape, of any floating dtype.

        Returns:
            The bytes that were read.

        Raises:
            RuntimeError: the files were closed, or changed since they were opened.
        """
        if not self._descriptors:
            raise RuntimeError("The checkpoint's files were closed. Load the model again.")
        if self._state(stored.file) != self._states[stored.file]:
            raise RuntimeError(f"{self._paths[stored.file]} was changed after the model was loaded. Load the model again.")
        flat = target.detach().reshape(-1)
        if flat.numel() and stored.dtype == target.dtype:
            self._fill(stored.file, stored.start, flat)
        elif flat.numel():
            self._cast(stored, flat)
        return stored.nbytes

    def load(self, stored: StoredTensor, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor of its own (default: in the dtype on disk)."""
        target = torch.empty(stored.shape, dtype=dtype or stored.dtype, device="cpu")
        self.read(stored, target)
        return target

    def _cast(self, stored: StoredTensor, flat: Tensor) -> None:
        if not hasattr(self._of_thread, "chunk"):
            self._of_thread.chunk = torch.empty(_CHUNK, dtype=torch.uint8, device="cpu")
        chunk = self._of_thread.chunk.view(stored.dtype)
        for first in range(0, flat.numel(), chunk.numel()):
            piece = flat[first : first + chunk.numel()]
            part = chunk[: piece.numel()]
            self._fill(stored.file, stored.start + first * stored.dtype.itemsize, part)
            piece.copy_(part)

    def _fill(self, file: int, start: int, flat: Tensor) -> None:
        memory = memoryview(flat.view(torch.uint8).numpy().data)
        while len(memory):
            try:
                count = os.preadv(self._descriptors[file], [memory], start)
            except OSError as error:
                raise RuntimeError(f"{self._paths[file]} cannot be read any more ({error}). Load the model again.") from error
            if not count:
                raise RuntimeError(f"{self._paths[file]} ends at byte {start}, before its last tensor. Load the model again.")
            memory, start = memory[count:], start + count

    def _state(self, file: int) -> tuple[int, int]:
        """Size and time of the last change."""
        state = os.fstat(self._descriptors[file])
        return state.st_size, state.st_mtime_ns

    def _header(self, file: int) -> dict[str, StoredTensor]:
        size, descriptor = self._states[file][0], self._descriptors[file]
        length = int.from_bytes(os.pread(descriptor, 8, 0), "little")
        if size < 8 or length > size - 8:
            raise ValueError(f"{self._paths[file]} is not a safetensors file. Give a checkpoint with safetensors files.")
        header: dict[str, Any] = json.loads(os.pread(descriptor, length, 8))
        header.pop("__metadata__", None)
        found = {}
        for name, entry in header.items():
            dtype = {**_DTYPES, **_OTHER_DTYPES}.get(entry["dtype"])
            if dtype is None:
                raise ValueError(f"{self._paths[file]}: {name} is of dtype {entry['dtype']}. Give a checkpoint without it.")
            first, end = entry["data_offsets"]
            found[name] = StoredTensor(file, 8 + length + first, dtype, tuple(entry["shape"]))
            if found[name].nbytes != end - first or 8 + length + end > size:
                raise ValueError(f"{self._paths[file]}: {name} is not whole. Copy the checkpoint again.")
        return found


class TensorOnRequest:
    """A tensor of a state dict that is read when it is asked for; Transformers' loader takes it for a slice of a file.

    Args:
        files, stored: where it is.
        dtype: to read it in.
    """

    def __init__(self, files: SafetensorsFiles, stored: StoredTensor, dtype: torch.dtype) -> None:
        self._files, self._stored, self._dtype = files, stored, dtype

    def __getitem__(self, index: Any) -> Tensor:
        whole = self._files.load(self._stored, self._dtype)
        return whole if index is Ellipsis else whole[index]

    def get_shape(self) -> list[int]:
        """As a safetensors slice has it."""
        return list(self._stored.shape)


def _close_all(descriptors: list[int]) -> None:
    while descriptors:
        os.close(descriptors.pop())


__all__ = ["SafetensorsFiles", "StoredTensor", "TensorOnRequest"]
