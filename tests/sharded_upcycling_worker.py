"""Worker: upcycle into shards on several ranks, compare with the checkpoint that `upcycle` wrote, and watch memory.

Run by test_sharded_upcycling.py under torchrun: `sharded_upcycling_worker.py FOLDER JOBS`, where JOBS is a JSON list of
{"name", "ep", "dense", "path", "recipe", "dtype", "save", "memory"}. FOLDER/NAME holds what `upcycle` wrote. Each rank writes
FOLDER/NAME.RANK.json.
"""

from __future__ import annotations

import ctypes
import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hf_moe.conversion.errors import ConversionError
from torch.distributed.tensor import DTensor

from hf_moe import MoEForCausalLM
from hf_moe.expert_parallel import ExpertParallelConfig, load_expert_parallel

M_MMAP_THRESHOLD = -3  # of glibc's malloc.h


def resident(which: str) -> int:
    """Bytes of memory that this process has (`VmRSS`), or at most had since the last reset (`VmHWM`)."""
    lines = dict(line.split(":", 1) for line in Path("/proc/self/status").read_text().splitlines())
    return int(lines[which].split()[0]) * 1024


def local(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.to_local() if isinstance(tensor, DTensor) else tensor


def nbytes(tensor: torch.Tensor) -> int:
    return local(tensor).numel() * tensor.element_size()


def run(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    how = ExpertParallelConfig(ep_size=job["ep"], dense=job["dense"], dispatcher="all_to_all")
    dist.barrier()
    Path("/proc/self/clear_refs").write_text("5")  # begins the high-water mark anew
    before = resident("VmRSS")
    try:
        model = load_expert_parallel(job["path"], config=how, upcycle=job["recipe"], dtype=job["dtype"], quiet=True)
    except ConversionError as error:
        return {"error": str(error)}
    found: dict[str, Any] = {"memory": resident("VmHWM") - before, "wrong": [], "experts": []}
    dist.barrier()

    own = {**dict(model.named_parameters()), **dict(model.named_buffers())}
    found["shard"] = sum(map(nbytes, own.values()))
    found["largest"] = max(map(nbytes, own.values()))
    found["experts"] = [len(local(p)) for name, p in own.items() if name.endswith("experts.down_proj")]
    if not job["memory"]:
        written = MoEForCausalLM.from_pretrained(folder / job["name"], dtype=job["dtype"])
        expected = {**dict(written.named_parameters()), **dict(written.named_buffers())}
        found["names"] = own.keys() == expected.keys()
        for name, tensor in own.items():
            full = tensor.full_tensor() if isinstance(tensor, DTensor) else tensor
            if full.dtype != expected[name].dtype or not torch.equal(full, expected[name]):
                found["wrong"].append(name)
        unlike = {"distributed_config", "_name_or_path", "auto_map"}
        ours, theirs = (m.config.to_diff_dict() for m in (model, written))
        found["config"] = {n: v for n, v in ours.items() if n not in unlike} == {
            n: v for n, v in theirs.items() if n not in unlike
        }
        found["generation"] = model.generation_config.to_dict() == written.generation_config.to_dict()
    if job["save"]:
        model.save_pretrained(folder / f"{job['name']}-saved")
    return found


if __name__ == "__main__":
    target = Path(sys.argv[1])
    ctypes.CDLL(None).mallopt(M_MMAP_THRESHOLD, 65536)  # what is freed goes back at once: what is measured is what is held
    dist.init_process_group("gloo")
    for each in json.loads(sys.argv[2]):
        (target / f"{each['name']}.{dist.get_rank()}.json").write_text(json.dumps(run(target, each)))
    dist.destroy_process_group()
