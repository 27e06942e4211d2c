"""Worker: one forward and backward of native MoEs on a global batch, alone or under torchrun, and what was counted.

Run by test_native_routing.py: `native_routing_worker.py OUT.json`.
"""

from __future__ import annotations

import json
import os
import sys
import tempfile
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hf_moe.training.native_routing import watch_native_routing
from native_moes import native_moe, padded
from torch import nn
from torch.distributed.fsdp import fully_shard
from transformers import AutoModelForCausalLM
from transformers.distributed import DistributedConfig

from hf_moe import RoutingRecord

# name: (model type, how it is spread over two ranks)
JOBS: dict[str, tuple[str, str]] = {
    "ddp": ("olmoe", "ddp"),
    "fsdp2": ("qwen3_moe", "fsdp2"),
    "ep all_to_all": ("deepseek_v3", "ep"),
    "ep of bias on the block": ("minimax_m2", "ep"),
    "tp": ("mixtral", "tp"),
}


def spread(model: Any, how: str, folder: Path) -> nn.Module:
    if how == "ddp":
        return nn.parallel.DistributedDataParallel(model)
    if how == "fsdp2":
        for layer in model.model.layers:
            fully_shard(layer)
        return fully_shard(model)
    if dist.get_rank() == 0:
        model.save_pretrained(folder)
    dist.barrier()
    sizes = {"ep": {"ep_size": 2, "fsdp_size": 2}, "tp": {"tp_size": 2}}[how]
    loaded = AutoModelForCausalLM.from_pretrained(folder, distributed_config=DistributedConfig(**sizes))
    return loaded.train()


def run(model_type: str, how: str, folder: Path) -> dict[str, Any]:
    world = dist.get_world_size() if dist.is_initialized() else 1
    model: nn.Module = native_moe(model_type)
    if world > 1:
        model = spread(model, how, folder)
    batch = padded("right", (9, 5, 7, 3))
    if how != "tp":  # whose ranks share the batch
        rows = slice(dist.get_rank() * 2, dist.get_rank() * 2 + 2) if world > 1 else slice(0, 4)
        batch = {name: value[rows] for name, value in batch.items()}
    records: list[RoutingRecord] = []
    watch = watch_native_routing(model, records.append)
    assert watch is not None
    model(**batch).loss.backward()
    watch.remove()
    assert len(records) == 1
    sums = {name: torch.stack([layer.sums[name] for layer in records[0].layers]) for name in ("counts", "probs")}
    for value in sums.values():
        if world > 1 and how != "tp":
            dist.all_reduce(value)
    return {"num_experts": watch.num_experts, **{name: value.flatten().tolist() for name, value in sums.items()}}


if __name__ == "__main__":
    if int(os.environ.get("WORLD_SIZE", "1")) > 1:
        dist.init_process_group("gloo")
    with tempfile.TemporaryDirectory() as root:
        shared = [root]
        if dist.is_initialized():
            dist.broadcast_object_list(shared)
        found = {name: run(*job, Path(shared[0]) / name.replace(" ", "_")) for name, job in JOBS.items()}
    if not dist.is_initialized() or dist.get_rank() == 0:
        Path(sys.argv[1]).write_text(json.dumps(found))
    if dist.is_initialized():
        dist.barrier()
        dist.destroy_process_group()
