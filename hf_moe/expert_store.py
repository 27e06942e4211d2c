# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""The experts of a model that are no parameters of it: a checkpoint, and the cache from which they are used."""

from __future__ import annotations

import threading
import weakref
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor
from transformers.utils import logging

from .expert_cache import CacheStats, Expert, ExpertCache
from .expert_files import SafetensorsFiles
from .expert_reader import ExpertLayer, ExpertReader, Piece, find_experts
from .free_memory import free_memory
from .offload_options import OffloadOptions

_CPU = torch.device("cpu")


@dataclass
class CacheReport(CacheStats):
    """Of the whole model.

    Attributes:
        layers: the same numbers of each MoE layer.
        num_slots: experts that the cache holds; 0 before the first forward.
        slot_bytes: that one takes.
    """

    layers: Sequence[CacheStats] = ()
    num_slots: int = 0
    slot_bytes: int = 0


class NotCopied:
    """What has open files and a thread can be neither copied nor pickled."""

    def __deepcopy__(self, memo: Any) -> NoReturn:
        raise ValueError("A model with `expert_offload` cannot be copied. Load the checkpoint a second time.")

    def __reduce_ex__(self, protocol: Any) -> NoReturn:
        raise ValueError("A model with `expert_offload` cannot be pickled. Load the checkpoint where the model is needed.")


class ExpertStore(NotCopied):
    """All offloaded experts of a model.

    Args:
        layers: the experts of its MoE layers, in order.
        options: how they are kept.
        dtype: of the experts when they are loaded.
        beside: bytes of the model's other weights.

    Raises:
        ValueError: the cache would be smaller than one expert.
    """

    def __init__(self, layers: Sequence[ExpertLayer], options: OffloadOptions, dtype: torch.dtype, beside: int) -> None:
        self.layers, self.options, self.dtype = list(layers), options, dtype
        self.num_experts = sum(layer.num_experts for layer in layers)
        self._beside = beside
        self._limit = options.cache_size if options.memory_limit is None else options.memory_limit - beside
        self._files: SafetensorsFiles | None = None
        self._pieces: dict[Expert, list[Piece]] = {}
        self._caches: dict[tuple[torch.dtype, torch.device], ExpertCache] = {}
        self._held: ExpertCache | None = None  # all experts in CPU memory
        self._lock = threading.Lock()
        self._slots(dtype, self._limit)

    def open(self, files: SafetensorsFiles, mapping: Sequence[Any]) -> dict[str, str]:
        """Find the experts in a checkpoint.

        Args:
            files: of the checkpoint.
            mapping: how Transformers renames and converts its tensors.

        Returns:
            The names of all other tensors, and what they are called in the model.

        Raises:
            ValueError: an expert is missing, or has another shape.
        """
        self._pieces, others = find_experts(files.tensors, self.layers, mapping)
        self._files = files
        return others

    def hold(self) -> None:
        """Read all experts into CPU memory, if that is where they are kept."""
        if self.options.place != "cpu":
            return
        self._held = self._new_cache(self.num_experts, self.dtype, _CPU, held=None)
        for expert in logging.tqdm(sorted(self._pieces), desc="Loading experts"):
            with self._held.use(expert):
                pass
        self._held.stats[:] = [CacheStats() for _ in self.layers]
        self._caches[self.dtype, _CPU] = self._held

    def cache(self, dtype: torch.dtype, device: torch.device) -> ExpertCache:
        """The cache of the experts in a dtype on a device; that of another is given up.

        Raises:
            ValueError: it would be smaller than one expert, or the device is neither a CPU nor CUDA.
        """
        found = self._caches.get((dtype, device))
        if found is not None:
            return found
        if device.type not in ("cpu", "cuda"):
            raise ValueError(f"`expert_offload` runs on 'cpu' and 'cuda', not on {device.type!r}. Move the model there.")
        with self._lock:
            if (dtype, device) not in self._caches:
                for kind in [kind for kind, cache in self._caches.items() if cache is not self._held]:
                    self._caches.pop(kind).close()
                held = self._held if dtype == self.dtype else None
                if held is not None:
                    held.pin()
                slots = self._slots(dtype, free_memory(device) // 2 if self._limit is None else self._limit)
                self._caches[dtype, device] = self._new_cache(slots, dtype, device, held)
            return self._caches[dtype, device]

    def report(self) -> CacheReport:
        """What the cache has done until now."""
        cache = next((c for c in self._caches.values() if c is not self._held), self._held)
        if cache is None:
            return CacheReport(layers=[CacheStats() for _ in self.layers])
        total, layers = sum(cache.stats, CacheStats()), list(cache.stats)
        return CacheReport(**vars(total), layers=layers, num_slots=cache.num_slots, slot_bytes=cache.slot_bytes)

    def stacked(self, index: int, name: str, dtype: torch.dtype) -> Tensor:
        """One parameter of a layer as a model has it that is not offloaded: of all experts, read from disk."""
        layer, reader = self.layers[index], self._reader(dtype, None)
        whole = torch.empty(layer.num_experts, *layer.shapes[name], dtype=dtype)
        for expert, tensor in enumerate(whole):
            reader.read((index, expert), {name: tensor})
        return whole

    def close(self) -> None:
        """Close the files, stop reading ahead and give the memory back. The experts cannot be used any more."""
        with self._lock:
            for cache in self._caches.values():
                cache.close()
            self._caches.clear()
            self._held = None
            if self._files is not None:
                self._files.close()

    def _reader(self, dtype: torch.dtype, held: ExpertCache | None) -> ExpertReader:
        if self._files is None:
            raise RuntimeError("The model's experts were not loaded. Load it with `from_pretrained`.")
        return ExpertReader(self._files, self._pieces, self.layers, dtype, held)

    def _new_cache(self, slots: int, dtype: torch.dtype, device: torch.device, held: ExpertCache | None) -> ExpertCache:
        size = max(layer.nbytes(dtype) for layer in self.layers)
        # the cache and what it reads from know nothing of the store, so that its thread ends with the model
        cache = ExpertCache(slots, size, device, len(self.layers), self._reader(dtype, held))
        weakref.finalize(self, cache.close)
        return cache

    def _slots(self, dtype: torch.dtype, limit: int | None) -> int:
        """Experts that the cache holds."""
        size = max(layer.nbytes(dtype) for layer in self.layers)
        if limit is None:
            return self.num_experts
        if limit >= size:
            return min(limit // size, self.num_experts)
        if self.options.memory_limit is not None:
            raise ValueError(
                f"`max_memory`={self.options.memory_limit} bytes leaves {limit} for experts beside {self._beside} of other "
                f"weights, but one expert takes {size}. Give at least {self._beside + size}."
            )
        raise ValueError(f"`expert_cache_size`={limit} bytes is less than one expert. Give at least {size}.")


__all__ = ["CacheReport", "ExpertStore", "NotCopied"]
