"""Worker: what a step of an expert-parallel model sends and holds on each rank, beside what the planner says.

Run by test_communication_plan.py under torchrun: `plan_worker.py FOLDER`. FOLDER/jobs.json is a list of {"name", "model":
fields of MoEConfig, "layout": fields of ExpertParallelConfig, "checkpointing", "batch": [sequences, length]}. Each rank writes
FOLDER/NAME.RANK.json.
"""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from families import text_config

from hf_moe import MoEConfig, MoEForCausalLM
from hf_moe.exchange import count_traffic
from hf_moe.expert_parallel import load_expert_parallel

# W_g = W_noise = 0 and noise alone: K experts at random, each set as likely
RANDOM_ROUTING = {
    "router_type": "noisy_top_k", "router_importance_loss_coef": 0.0, "router_load_loss_coef": 0.0,
    "router_aux_loss_coef": 0.0, "balance_scope": "micro_batch",
}  # fmt: skip


def make_model(folder: Path, job: dict[str, Any]) -> Path:
    """A checkpoint, written by rank 0."""
    path = folder / f"{job['name']}-model"
    if dist.get_rank() == 0:
        torch.manual_seed(0)
        dense = text_config("llama", hidden_size=64, intermediate_size=32, num_hidden_layers=2, **job.get("text", {}))
        model = MoEForCausalLM(MoEConfig(text_config=dense, **{**RANDOM_ROUTING, **job["model"]}))
        for layer in model.moe_layers:
            torch.nn.init.zeros_(layer.gate.weight)
        model.save_pretrained(path)
    dist.barrier()
    return path


def run(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    """Bytes by kind of collective in the second step, and bytes of parameters and gradients."""
    model = load_expert_parallel(make_model(folder, job), quiet=True, **job["layout"]).train()
    if job["checkpointing"]:
        model.gradient_checkpointing_enable()
    torch.manual_seed(1 + dist.get_rank())
    ids = torch.randint(3, 128, job["batch"])
    model(input_ids=ids, labels=ids).loss.backward()
    model.zero_grad()
    with count_traffic(job["layout"].get("ranks_per_node")) as traffic:
        model(input_ids=ids, labels=ids).loss.backward()
    held = [parameter.to_local() for parameter in model.parameters()]
    gradients = [parameter.grad.to_local() for parameter in model.parameters()]
    return {
        "bytes": {kind: sent.bytes for kind, sent in traffic.kinds.items()},
        "across": {kind: sent.bytes_across for kind, sent in traffic.kinds.items()},
        "weights": sum(math.prod(local.shape) * local.element_size() for local in held),
        "gradients": sum(math.prod(local.shape) * local.element_size() for local in gradients),
    }


if __name__ == "__main__":
    target = Path(sys.argv[1])
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    for each in json.loads((target / "jobs.json").read_text()):
        (target / f"{each['name']}.{dist.get_rank()}.json").write_text(json.dumps(run(target, each)))
    dist.destroy_process_group()
