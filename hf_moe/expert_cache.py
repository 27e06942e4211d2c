# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""A bounded cache of experts: slots of memory of one size, made once; the least recently used expert leaves first.

A thread of the cache's own reads ahead: the experts that the running layer has yet to come to, and those that the routers of
the next layers are expected to choose (speculative loading: Eliseev & Mazur 2023, "Fast Inference of Mixture-of-Experts
Language Models with Offloading", section 3.2). It evicts nothing that the running layer needs.
"""

from __future__ import annotations

import threading
from collections import Counter, OrderedDict, deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor

Expert = tuple[int, int]  # index of the MoE layer, index of the expert in it
Weights = dict[str, Tensor]


@dataclass
class CacheStats:
    """What happened in one layer (or all: they add up) since the model was loaded.

    Attributes:
        hits: experts that were needed and were there, or were being read because they had been predicted.
        misses: experts that were needed and were not.
        prefetch_hits: of the hits, those that were there because they had been predicted, and are needed for the first time.
        prefetched: experts that were read because they had been predicted.
        bytes_read: from disk, or from CPU memory (`"cpu"`).
    """

    hits: int = 0
    misses: int = 0
    prefetch_hits: int = 0
    prefetched: int = 0
    bytes_read: int = 0

    @property
    def hit_rate(self) -> float:
        """`hits / (hits + misses)`; 0 where nothing was needed."""
        return self.hits / max(1, self.hits + self.misses)

    def __add__(self, other: CacheStats) -> CacheStats:
        return CacheStats(**{name: value + getattr(other, name) for name, value in vars(self).items()})


@dataclass
class _Entry:
    """An expert that has a slot."""

    slot: int
    predicted: bool = False  # and not needed yet
    ahead: bool = False  # read ahead for the layer that needs it, and not used yet
    pins: int = 1
    weights: Weights | None = None  # once it is read
    failed: bool = False


@dataclass
class _Slots:
    """The memory, and which of it is free."""

    memory: Tensor
    free: list[int]
    used: dict[int, Any] = field(default_factory=dict)  # the CUDA event after which a slot may be overwritten


class ExpertCache:
    """Experts in a fixed number of slots, for any number of threads.

    Args:
        num_slots: experts that it holds.
        slot_bytes: of the largest expert.
        device: of the memory.
        num_layers: of the model, for the statistics.
        read: `read(expert, memory, after)` fills `[slot_bytes]` uint8 memory, on CUDA after the event `after`, and returns the
            expert's weights, which are views of it, and the number of bytes read.
    """

    def __init__(
        self,
        num_slots: int,
        slot_bytes: int,
        device: torch.device,
        num_layers: int,
        read: Callable[[Expert, Tensor, Any], tuple[Weights, int]],
    ) -> None:
        self.num_slots, self.slot_bytes, self.device = num_slots, slot_bytes, device
        self.stats = [CacheStats() for _ in range(num_layers)]
        self._slots = _Slots(torch.empty(num_slots, slot_bytes, dtype=torch.uint8, device=device), list(range(num_slots)))
        self._read = read
        self._entries: OrderedDict[Expert, _Entry] = OrderedDict()  # least recently used first
        self._per_layer: Counter[int] = Counter()  # entries
        self._needed: Counter[Expert] = Counter()  # by layers that run, and have not come to them
        self._requests: deque[tuple[Expert, bool]] = deque()  # to be read ahead, and whether it is a prediction
        self._changed = threading.Condition()
        self._reader: threading.Thread | None = None
        self._closed = self._pinned = False

    def holds_layer(self, layer: int, num_experts: int) -> bool:
        """Whether all experts of a layer are here, so that there is nothing to predict."""
        return self._per_layer[layer] == num_experts

    @contextmanager
    def layer(
        self, experts: Sequence[Expert], read_ahead: bool
    ) -> Iterator[Callable[[Expert], AbstractContextManager[Weights]]]:
        """Inside, a layer needs these experts, in this order: until they have been used, they are the last to be evicted.

        Args:
            experts: what it will use.
            read_ahead: whether to begin to read those that are missing.

        Yields:
            What makes the context in which the weights of an expert stay.
        """
        pending = Counter(experts)
        with self._changed:
            self._needed.update(pending)
            self._requests.clear()  # what was predicted, and not read until now, is known better now
            if read_ahead:
                missing = [expert for expert in experts if expert not in self._entries]
                room = self.num_slots - (len(experts) - len(missing))
                self._request(missing[1 : max(0, room)], predicted=False)  # the first is needed at once
        try:
            yield partial(self.use, pending=pending)
        finally:
            with self._changed:
                self._release(pending)

    def prefetch(self, experts: Sequence[Expert]) -> None:
        """Read these experts in the background, if there is room beside what is needed: the most likely ones come first."""
        with self._changed:
            room = (self.num_slots - len(self._needed)) // 2  # half, so that predictions do not push each other out
            self._request([expert for expert in experts if expert not in self._entries][: max(0, room)], predicted=True)

    @contextmanager
    def use(self, expert: Expert, pending: Counter[Expert] | None = None) -> Iterator[Weights]:
        """The weights of an expert, which stays inside the block; afterwards it is not `pending` any more."""
        entry = self._take(expert)
        try:
            yield entry.weights or {}
        finally:
            with self._changed:
                entry.pins -= 1
                if pending and pending[expert]:
                    pending[expert] -= 1
                    self._release({expert: 1})
                if self.device.type == "cuda":
                    self._slots.used[entry.slot] = torch.cuda.current_stream(self.device).record_event()
                self._changed.notify_all()

    def pin(self) -> None:
        """Page-lock the memory, from which CUDA then copies while it computes. Done where it is, since torch rounds up."""
        memory = self._slots.memory
        if not self._pinned and torch.cuda.is_available():
            self._pinned = int(torch.cuda.cudart().cudaHostRegister(memory.data_ptr(), memory.nbytes, 0)) == 0

    def close(self) -> None:
        """Stop reading ahead and give the memory back."""
        with self._changed:
            if self._closed:
                return
            self._closed = True
            self._changed.notify_all()
        if self._reader is not None and self._reader is not threading.current_thread():
            self._reader.join()
        if self._pinned:
            torch.cuda.cudart().cudaHostUnregister(self._slots.memory.data_ptr())
        self._entries.clear()
        self._slots = _Slots(torch.empty(0), [])

    # ------------------------------------------------------------------ of the thread that runs a layer

    def _take(self, expert: Expert) -> _Entry:
        """The pinned entry of an expert that has been read."""
        while True:
            with self._changed:
                entry, mine = self._entries.get(expert), False
                while entry is None:
                    if self._closed:
                        raise RuntimeError("The experts were closed. Load the model again.")
                    entry = self._reserve(expert, keep_needed=False)
                    mine = entry is not None
                    if entry is None:  # other threads use all slots
                        self._changed.wait()
                        entry = self._entries.get(expert)
                if not mine:
                    entry.pins += 1
                self._entries.move_to_end(expert)
                self._count(expert, entry, mine)
                while not mine and entry.weights is None and not entry.failed:
                    self._changed.wait()
            if mine:
                self._fill(expert, entry)
            if not entry.failed:
                return entry  # otherwise the reading thread met an error: meet it here

    def _count(self, expert: Expert, entry: _Entry, mine: bool) -> None:
        stats = self.stats[expert[0]]
        missed = mine or entry.ahead
        stats.misses += missed
        stats.hits += not missed
        stats.prefetch_hits += entry.predicted
        entry.predicted = entry.ahead = False

    # ------------------------------------------------------------------ of both

    def _reserve(self, expert: Expert, keep_needed: bool) -> _Entry | None:
        """A pinned entry without weights; `None` where every slot is in use (or needed, if that is to be kept)."""
        if not self._slots.free:
            victim = next((e for e in self._idle() if e not in self._needed), None)
            if victim is None and not keep_needed:
                victim = next(self._idle(), None)
            if victim is None:
                return None
            self._remove(victim)
        self._per_layer[expert[0]] += 1
        entry = self._entries[expert] = _Entry(self._slots.free.pop())
        return entry

    def _release(self, experts: Mapping[Expert, int]) -> None:
        """Need experts so many times less."""
        for expert, times in experts.items():
            self._needed[expert] -= times
            if not self._needed[expert]:
                del self._needed[expert]

    def _remove(self, expert: Expert) -> None:
        self._slots.free.append(self._entries.pop(expert).slot)
        self._per_layer[expert[0]] -= 1

    def _idle(self) -> Iterator[Expert]:
        """Experts that may be evicted, least recently used first."""
        return (expert for expert, entry in self._entries.items() if not entry.pins and entry.weights is not None)

    def _fill(self, expert: Expert, entry: _Entry) -> None:
        try:
            weights, size = self._read(expert, self._slots.memory[entry.slot], self._slots.used.get(entry.slot))
        except BaseException:
            with self._changed:
                entry.failed = True
                self._remove(expert)
                self._changed.notify_all()
            raise
        with self._changed:
            entry.weights = weights
            self.stats[expert[0]].bytes_read += size
            self._changed.notify_all()

    # ------------------------------------------------------------------ of the thread that reads ahead

    def _request(self, experts: Sequence[Expert], predicted: bool) -> None:
        self._requests.extend((expert, predicted) for expert in experts)
        if self._requests and not self._closed:
            if self._reader is None:
                self._reader = threading.Thread(target=self._read_ahead, name="hf_moe-experts", daemon=True)
                self._reader.start()
            self._changed.notify_all()

    def _read_ahead(self) -> None:
        while True:
            with self._changed:
                while not self._requests and not self._closed:
                    self._changed.wait()
                if self._closed:
                    return
                expert, predicted = self._requests.popleft()
                late = not predicted and expert not in self._needed  # the layer was faster
                entry = None if late or expert in self._entries else self._reserve(expert, keep_needed=True)
                if entry is None:
                    continue
                entry.predicted, entry.ahead = predicted, not predicted
                self.stats[expert[0]].prefetched += predicted
            try:
                self._fill(expert, entry)
            except Exception:
                continue  # the layer that needs the expert reads it itself, and says what is wrong
            with self._changed:
                entry.pins -= 1
                self._changed.notify_all()


__all__ = ["CacheStats", "Expert", "ExpertCache", "Weights"]
