"""Large buffers are memory like any, and are used again."""

from __future__ import annotations

import gc
import mmap
import sys
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch
from test_fast_experts import TOLERANCE, build, check, inputs

from hf_moe import large_buffers
from hf_moe.large_buffers import _Kept, empty, zeros

LARGE = (1200, 1100)


@pytest.fixture
def kept(monkeypatch: pytest.MonkeyPatch) -> _Kept:
    if sys.platform != "linux":
        pytest.skip("memory is kept on Linux only")
    kept = _Kept(most=64 << 20)
    monkeypatch.setattr(large_buffers, "_KEPT", kept)
    return kept


@pytest.mark.parametrize("shape", [(3, 5), LARGE, (2, 0)], ids=str)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_room(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    for make, value in ((empty, 1.0), (zeros, 0.0)):
        room = make(torch.zeros((), dtype=dtype), *shape)
        if make is empty:
            room.fill_(value)
        assert (room.shape, room.dtype, room.is_contiguous()) == (shape, dtype, True)
        assert (room == value).all()
        assert (room.add_(1) == value + 1).all()


def test_memory_is_used_again_when_nothing_refers_to_it(kept: _Kept) -> None:
    like = torch.zeros(())
    room = empty(like, *LARGE)
    part, where = room[3:5], room.data_ptr()
    part.fill_(7)
    del room
    other = empty(like, *LARGE)
    assert other.data_ptr() != where
    other.fill_(1)
    assert (part == 7).all()
    del part
    assert empty(like, LARGE[0] - 1, LARGE[1]).data_ptr() == where  # nearly of that size
    larger = empty(like, 2 * LARGE[0], LARGE[1])
    assert larger.data_ptr() != where
    assert zeros(like, *LARGE).data_ptr() != where  # zeros are new
    assert not zeros(like, *LARGE).any()


def test_the_oldest_goes_when_there_is_too_much() -> None:
    kept = _Kept(most=5 * mmap.PAGESIZE)
    one, two, three = (mmap.mmap(-1, pages * mmap.PAGESIZE) for pages in (1, 2, 3))
    for memory in (one, two, three):
        kept.put(memory)
    assert kept.take(3 * mmap.PAGESIZE) is three
    assert kept.take(2 * mmap.PAGESIZE) is two
    assert kept.take(mmap.PAGESIZE) is not one
    kept.put(mmap.mmap(-1, 6 * mmap.PAGESIZE))  # more than there may be
    assert len(kept.take(6 * mmap.PAGESIZE)) == 6 * mmap.PAGESIZE
    assert kept._bytes == 0


def test_threads_do_not_get_the_same_memory(kept: _Kept) -> None:
    def work(seed: int) -> bool:
        right = True
        for step in range(20):
            rooms = [empty(torch.zeros(()), *LARGE).fill_(seed + step + i) for i in range(2)]
            right &= all((room == seed + step + i).all().item() for i, room in enumerate(rooms))
        return right

    with ThreadPoolExecutor(4) as pool:
        assert all(pool.map(work, range(0, 4000, 1000)))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_was_in_it_does_not_show(kept: _Kept, dtype: torch.dtype) -> None:
    """Two experts of nine are idle, and all memory that is used again is full of NaN."""
    torch.manual_seed(0)
    module = build(9, 512, 512, ("silu", True, False), dtype)
    batch = inputs(1200, 2, 7, 512, dtype)
    check(module, *batch, TOLERANCE[dtype])
    gc.collect()
    memory = [memory for same in kept._by_size.values() for memory in same]
    assert len(memory) >= 3
    for buffer in memory:
        torch.frombuffer(buffer, dtype=dtype).fill_(float("nan"))
    check(module, *batch, TOLERANCE[dtype])
