# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""The options of `from_pretrained(…, expert_offload=…)`: what they may be, and what they cannot be combined with."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from accelerate.utils import convert_file_size_to_int

PLACES = ("disk", "cpu")
# Arguments of `from_pretrained` that need the experts among the model's parameters.
_REFUSED = (
    "quantization_config", "distributed_config", "tp_plan", "tp_size", "device_mesh", "gguf_file", "state_dict",
    "offload_folder", "key_mapping",
)  # fmt: skip


@dataclass(frozen=True)
class OffloadOptions:
    """How the experts are kept.

    Attributes:
        place: `"disk"` or `"cpu"`.
        cache_size: bytes of the cache; `None`: what `memory_limit` leaves, else half of the memory that is free.
        memory_limit: bytes of all weights on the model's device, the cache among them.
        prefetch: layers to look ahead; 0: nothing is read ahead.
    """

    place: str
    cache_size: int | None = None
    memory_limit: int | None = None
    prefetch: int = 1


def refuse_combinations(arguments: Mapping[str, Any]) -> None:
    """Raise a ValueError if `from_pretrained` got an argument that cannot be combined with `expert_offload`."""
    for name in _REFUSED:
        if arguments.get(name) is not None:
            raise ValueError(f"`{name}` cannot be combined with `expert_offload`. Leave one of them out.")


def parse_options(options: Mapping[str, Any], max_memory: Any = None, device: torch.device | None = None) -> OffloadOptions:
    """Check the options of `from_pretrained`.

    Args:
        options: `expert_offload` (`"disk"` or `"cpu"`), `expert_cache_size` (bytes, or as in `"2GB"`), `expert_prefetch`.
        max_memory: as Accelerate's: by device; or of the model's device alone.
        device: of the model.
    """
    place, size, prefetch = (options.get(f"expert_{name}") for name in ("offload", "cache_size", "prefetch"))
    if place not in PLACES:
        raise ValueError(f"`expert_offload`={place!r} is not known. Give one of {', '.join(map(repr, PLACES))}.")
    if prefetch is not None and (isinstance(prefetch, bool) or not isinstance(prefetch, int) or prefetch < 0):
        raise ValueError(f"`expert_prefetch`={prefetch!r} must be a number of layers: 0 (read nothing ahead), 1, 2, …")
    if isinstance(max_memory, Mapping):
        key = "cpu" if device is None or device.type == "cpu" else device.index or 0
        if max_memory.get(key) is None:
            raise ValueError(f"`max_memory`={dict(max_memory)} has no entry for {key!r}, where the model is. Add it.")
        max_memory = max_memory[key]
    if size is not None and max_memory is not None:
        raise ValueError("Give `expert_cache_size` or `max_memory` (of all weights together), not both.")
    cache_size, limit = _bytes("expert_cache_size", size), _bytes("max_memory", max_memory)
    return OffloadOptions(place, cache_size, limit, 1 if prefetch is None else prefetch)


def _bytes(name: str, size: Any) -> int | None:
    if size is None:
        return None
    try:
        parsed = -1 if isinstance(size, bool) else convert_file_size_to_int(size)
    except (ValueError, AttributeError, TypeError):
        parsed = -1
    if parsed < 0:
        raise ValueError(f"`{name}`={size!r} is no size. Give bytes, or text as in '2GB' or '512MiB'.")
    return parsed


def one_device(device_map: Any) -> torch.device | None:
    """The device that a `device_map` puts the whole model on; `None` for none."""
    if isinstance(device_map, Mapping) and set(device_map) == {""}:
        device_map = device_map[""]
    if device_map is None:
        return None
    try:
        device = torch.device(device_map)
    except (RuntimeError, TypeError, ValueError):
        device = torch.device("meta")
    if device.type not in ("cpu", "cuda"):
        raise ValueError(
            f"`device_map`={device_map!r} cannot be combined with `expert_offload`. Name one device: 'cuda' or 'cpu'."
        )
    return device


__all__ = ["PLACES", "OffloadOptions", "one_device", "parse_options", "refuse_combinations"]
