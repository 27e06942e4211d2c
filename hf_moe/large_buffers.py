# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Large buffers on a CPU: in huge pages, and used again.

Memory that a process has not used before is made page by page when it is first written to. The gradients of many experts are
hundreds of megabytes that training frees and takes anew at every step, and 4 KB at a time that took longer than to compute
them. Where transparent huge pages are for those who ask (`madvise`, the default of most Linux systems), these buffers ask. A
virtual machine may hand what is freed to its host, and huge pages are then the slowest of all to get back; so some are kept.
"""

from __future__ import annotations

import contextlib
import math
import mmap
import sys
import threading
import weakref

import torch
from torch import Tensor

HUGE_PAGE = 2 << 20  # bytes, on most machines
_LARGE = 2 * HUGE_PAGE


class _Kept:
    """Memory that tensors had, for the next of the same size, up to so many bytes.

    The system is told that it may have it (`MADV_FREE`), and takes it where memory is short, but not before.
    """

    def __init__(self, most: int) -> None:
        self._most = most
        self._bytes = 0
        self._by_size: dict[int, list[mmap.mmap]] = {}  # the size that was put back last comes last
        self._lock = threading.RLock()  # a tensor may die, and `put` run, within `take`

    def take(self, nbytes: int) -> mmap.mmap:
        """Memory with any contents."""
        with self._lock:
            if same := self._by_size.get(nbytes):
                self._bytes -= nbytes
                return same.pop()
        return _map(nbytes)

    def put(self, memory: mmap.mmap) -> None:
        _advise(memory, "MADV_FREE")
        with self._lock:
            self._by_size[len(memory)] = [*self._by_size.pop(len(memory), ()), memory]
            self._bytes += len(memory)
            while self._bytes > self._most:
                size, same = next(iter(self._by_size.items()))
                if same:
                    same.pop()
                    self._bytes -= size
                else:
                    del self._by_size[size]


_KEPT = _Kept(most=2 << 30)


def empty(like: Tensor, *shape: int) -> Tensor:
    """`like.new_empty(shape)`; on a CPU large ones take memory that others had before."""
    count = math.prod(shape)
    nbytes = count * like.element_size()
    if not _is_large(like, nbytes):
        return like.new_empty(shape)
    step = max(HUGE_PAGE, 1 << nbytes.bit_length() - 4)  # a few sizes only, since rows are a few more or less at every call
    memory = _KEPT.take(-(-nbytes // step) * step)
    view = memoryview(memory)  # what the tensor holds until it dies
    weakref.finalize(view, _KEPT.put, memory).atexit = False
    return torch.frombuffer(view, dtype=like.dtype, count=count).view(shape)


def zeros(like: Tensor, *shape: int) -> Tensor:
    """`like.new_zeros(shape)`; on a CPU large ones are memory never used before, which is zero without being written to.

    What nobody writes to takes no memory either, and is read at the speed of the cache: it is one page, again and again.
    """
    nbytes = math.prod(shape) * like.element_size()
    if not _is_large(like, nbytes):
        return like.new_zeros(shape)
    return torch.frombuffer(_map(nbytes), dtype=like.dtype).view(shape)


def _is_large(like: Tensor, nbytes: int) -> bool:
    return nbytes >= _LARGE and like.device.type == "cpu" and sys.platform == "linux"


def _map(nbytes: int) -> mmap.mmap:
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    _advise(memory, "MADV_HUGEPAGE")
    return memory


def _advise(memory: mmap.mmap, advice: str) -> None:
    with contextlib.suppress(OSError, AttributeError):  # an older kernel; it goes without
        memory.madvise(getattr(mmap, advice))
