"""Worker: a few optimizer steps of a plain loop under Accelerate, the experts spread over ranks as told.

Run by test_expert_parallel.py under torchrun: `parity_worker.py FOLDER JOBS`, JOBS a file; the test itself calls `train` for
the same steps in one process. Rank 0 writes FOLDER/NAME.pt.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate import Accelerator
from families import text_config
from torch import Tensor
from torch.distributed.tensor import DTensor

from hf_moe import MoEConfig, MoEForCausalLM
from hf_moe.expert_parallel import load_expert_parallel, parameter_groups

ROWS = 8  # sequences of a global batch
TWO_LAYERS = {"num_hidden_layers": 2}
SPREAD = ("ep_size", "dense", "dispatcher", "dp_replicate_size", "tp_size", "chunk_rows", "ranks_per_node", "mixed_precision")


def build(job: dict[str, Any]) -> MoEForCausalLM:
    """The model of a job, its router far from uniform."""
    torch.manual_seed(job.get("seed", 0))
    config = text_config(job.get("family", "llama"), **{"initializer_range": 0.2, **job.get("text", TWO_LAYERS)})
    # of few shapes: what DTensor finds out about an operation, which takes it seconds, it finds out once for each shape
    model = MoEForCausalLM(MoEConfig(text_config=config, **{"num_experts": 6, **job.get("fields", {})}))
    favourite = job.get("favourite")
    for layer in model.moe_layers:
        for name, weight in layer.gate.named_parameters():
            if name == "weight" and not weight.any():  # equal logits, which rounding alone would tell apart
                torch.nn.init.normal_(weight, std=0.2)
        if favourite is not None:  # all tokens on one expert
            layer.gate.e_score_correction_bias[favourite] = 100.0
        if hasattr(layer.gate, "noise_scale"):
            layer.gate.noise_scale = 0.0  # ranks draw for themselves
    return model


def global_batch(job: dict[str, Any], step: int) -> dict[str, Tensor]:
    """Sequences of 4 to 24 tokens, padded; one rank's may be padding alone."""
    generator = torch.Generator().manual_seed(100 * job.get("seed", 0) + step)
    lengths = torch.randint(4, 25, (ROWS,), generator=generator)
    if job.get("empty_rows"):
        lengths[: job["empty_rows"]] = 0
    mask = (torch.arange(24) < lengths.unsqueeze(1)).long()
    ids = torch.randint(3, 128, (ROWS, 24), generator=generator) * mask
    return {"input_ids": ids, "attention_mask": mask, "labels": ids.masked_fill(mask == 0, -100)}


def whole(tensor: Tensor) -> Tensor:
    return (tensor.full_tensor() if isinstance(tensor, DTensor) else tensor).detach().clone()


def train(model: Any, job: dict[str, Any], accelerator: Accelerator) -> dict[str, Any]:
    """Losses and norms of all steps, the first gradients and the last parameters."""
    model.train()
    if job.get("checkpointing"):
        model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizers = {"sgd": torch.optim.SGD, "adamw": torch.optim.AdamW}
    rate, kind = {"sgd": 0.03, "adamw": 1e-3}[job.get("optimizer", "sgd")], optimizers[job.get("optimizer", "sgd")]
    optimizer = accelerator.prepare(kind(parameter_groups(model), lr=rate, **job.get("optimizer_options", {})))
    world, accumulation = accelerator.num_processes, job.get("accumulation", 1)
    batch_ranks, place = world // job.get("tp_size", 1), accelerator.process_index // job.get("tp_size", 1)
    if world == 1:  # the batches of all ranks at once
        batch_ranks, place = 1, 0
    found: dict[str, Any] = {"losses": [], "norms": [], "router_dtypes": set()}
    for layer in model.moe_layers:
        layer.gate.register_forward_pre_hook(
            lambda gate, x: found["router_dtypes"].update(str(p.dtype) for p in gate.parameters())
        )
    for step in range(job.get("steps", 3)):
        batch = global_batch(job, step)
        num_items = int(batch["labels"][:, 1:].ne(-100).sum())
        total = torch.zeros(())
        for part in range(accumulation):
            rows = {name: value.chunk(accumulation)[part].chunk(batch_ranks)[place] for name, value in batch.items()}
            outputs = model(**rows, num_items_in_batch=num_items)
            accelerator.backward(outputs.loss * batch_ranks)  # gradients are averaged over the ranks with batches of their own
            total += outputs.loss.detach()
        if world > 1:
            dist.all_reduce(total)
            total /= job.get("tp_size", 1)
        norm = accelerator.clip_grad_norm_(model.parameters(), job.get("clip", 1e9))
        if step == 0:
            found["gradients"] = {n: whole(p.grad) for n, p in model.named_parameters() if p.grad is not None}
        optimizer.step()
        optimizer.zero_grad()
        found["losses"].append(total.item())
        found["norms"].append(float(whole(norm)))
    found["router_dtypes"] = sorted(found["router_dtypes"])
    found["parameters"] = {name: whole(parameter) for name, parameter in model.named_parameters()}
    return found


def main(folder: Path, jobs: list[dict[str, Any]]) -> None:
    accelerator = Accelerator(cpu=True)
    for job in jobs:
        spread = {name: job[name] for name in SPREAD if name in job}
        model = load_expert_parallel(
            folder / job["model"], accelerator, quiet=True, dtype=job.get("dtype", "float32"), **spread
        )
        for layer in model.moe_layers:
            if hasattr(layer.gate, "noise_scale"):
                layer.gate.noise_scale = 0.0
        found = train(model, job, accelerator)
        if accelerator.is_main_process:
            torch.save(found, folder / f"{job['name']}.pt")
    dist.barrier()
    dist.destroy_process_group()


if __name__ == "__main__":
    main(Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text()))
