# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Large buffers that the operating system hands out in huge pages.

Memory that a process has not used before is made page by page when it is first written to. The gradients of many experts are
hundreds of megabytes that training frees and takes anew at every step, and 4 KB at a time that took longer than to compute
them. Where transparent huge pages are for those who ask (`madvise`, the default of most Linux systems), these buffers ask.
"""

from __future__ import annotations

import contextlib
import ctypes
import functools
import math
import mmap
import sys
from collections.abc import Callable

import torch
from torch import Tensor

_LARGE = 4 << 20  # bytes


def empty(like: Tensor, *shape: int) -> Tensor:
    """`like.new_empty(shape)`, on a CPU in huge pages where they are to be had."""
    tensor = like.new_empty(shape)
    if tensor.nbytes >= _LARGE and tensor.device.type == "cpu" and (advise := _madvise()):
        start = -(-tensor.data_ptr() // mmap.PAGESIZE) * mmap.PAGESIZE
        advise(start, tensor.data_ptr() + tensor.nbytes - start, mmap.MADV_HUGEPAGE)  # no harm if it is refused
    return tensor


def zeros(like: Tensor, *shape: int) -> Tensor:
    """`like.new_zeros(shape)`; on a CPU large ones are memory never used before, which is zero without being written to.

    What nobody writes to takes no memory either, and is read at the speed of the cache: it is one page, again and again.
    """
    nbytes = math.prod(shape) * like.element_size()
    if nbytes < _LARGE or like.device.type != "cpu" or sys.platform != "linux":
        return like.new_zeros(shape)
    memory = mmap.mmap(-1, nbytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
    with contextlib.suppress(OSError):  # a kernel without huge pages
        memory.madvise(mmap.MADV_HUGEPAGE)
    return torch.frombuffer(memory, dtype=like.dtype).view(shape)


@functools.cache
def _madvise() -> Callable[[int, int, int], int] | None:
    if sys.platform != "linux":
        return None
    function = ctypes.CDLL(None).madvise
    function.argtypes = (ctypes.c_void_p, ctypes.c_size_t, ctypes.c_int)
    return function
