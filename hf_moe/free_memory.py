# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""How much memory this process may still take: the machine's, its cgroup's (containers, systemd) and its resource limits'."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path

import torch

_CGROUPS = Path("/sys/fs/cgroup")
# Of both versions of cgroups: files of the limit and of the usage, and of the usage what is given back on demand.
_FILES = {
    "v2": ("memory.max", "memory.current", ("inactive_file", "active_file")),
    "v1": ("memory.limit_in_bytes", "memory.usage_in_bytes", ("total_inactive_file", "total_active_file")),
}


def free_memory(device: torch.device) -> int:
    """Bytes that can be allocated on a device now."""
    if device.type == "cuda":
        return torch.cuda.mem_get_info(device)[0]
    import psutil  # comes with accelerate

    return max(0, min([psutil.virtual_memory().available, *_of_cgroups(), *_of_resource_limits()]))


def _of_cgroups(root: Path = _CGROUPS, membership: Path = Path("/proc/self/cgroup")) -> Iterator[int]:
    """What is left in the groups that the process is in, and in those above them."""
    lines = membership.read_text().splitlines() if membership.exists() else []
    for _, controllers, name in (line.split(":", 2) for line in lines):
        if controllers and "memory" not in controllers.split(","):
            continue
        limit, usage, reclaimable = _FILES["v1" if controllers else "v2"]
        top = root / "memory" if controllers else root
        group = top / name.lstrip("/")
        for folder in (group, *(parent for parent in group.parents if parent.is_relative_to(top))):
            try:
                most, used = (folder / limit).read_text().strip(), int((folder / usage).read_text())
                stat = dict(line.split() for line in (folder / "memory.stat").read_text().splitlines())
            except (OSError, ValueError):
                continue  # no such group in this container, or none with a limit
            if most != "max":
                yield int(most) - used + sum(int(stat.get(key, 0)) for key in reclaimable)


def _of_resource_limits() -> Iterator[int]:
    """What `ulimit -d` and `ulimit -v` leave."""
    try:
        import resource
    except ImportError:  # Windows
        return
    status = Path("/proc/self/status")
    lines = dict(line.split(":", 1) for line in status.read_text().splitlines()) if status.exists() else {}
    for limit, field in ((resource.RLIMIT_DATA, "VmData"), (resource.RLIMIT_AS, "VmSize")):
        most = resource.getrlimit(limit)[0]
        if most != resource.RLIM_INFINITY and field in lines:
            yield most - 1024 * int(lines[field].split()[0])


__all__ = ["free_memory"]
