"""Worker: train a few steps under some wrapper, cut as told, and say what the callback counted and logged.

Run by test_distributed_counts.py under torchrun: `counts_worker.py FOLDER JOBS`, where JOBS is a JSON list of
{"name", "mode": "ddp" | "fsdp2" | "ep", "native": whether Mixtral, "accumulation", "fields" of MoEConfig, "options" of
TrainingArguments}. Rank 0 writes FOLDER/NAME.json.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from families import text_config
from hf_moe.training import ExpertLoadCallback, LossFreeBalancingCallback, read_expert_load
from torch import nn
from torch.distributed.tensor import DTensor
from trainer_cut import NUM_SEQUENCES, collate, sequences
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, Trainer, TrainingArguments
from transformers.distributed import DistributedConfig

from hf_moe import MoEConfig, MoEForCausalLM

EP_PLAN = {
    "layers.*.mlp.experts": "ep_dispatch_experts",
    "layers.*.mlp.experts.gate_up_proj": "grouped_gemm",
    "layers.*.mlp.experts.down_proj": "grouped_gemm",
}


def build(native: bool, **fields: Any) -> Any:
    torch.manual_seed(0)
    if native:
        config = MixtralConfig(
            vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=4, num_local_experts=4, num_experts_per_tok=2, output_router_logits=True,
            initializer_range=0.2, router_aux_loss_coef=0.0,  # its router loss depends on the cut
        )  # fmt: skip
        return MixtralForCausalLM(config)
    return MoEForCausalLM(MoEConfig(text_config=text_config("llama", initializer_range=0.2), num_experts=4, **fields))


def expert_parallel(model: Any, world: int, folder: Path) -> Any:
    """The same weights, loaded by Transformers with the experts spread over all ranks."""
    if not dist.is_initialized():
        dist.init_process_group("gloo")
    model.save_pretrained(folder)  # the first rank writes
    dist.barrier()
    prefix = "model." if isinstance(model, MixtralForCausalLM) else "language_model.model."
    plan = {prefix + name: rule for name, rule in EP_PLAN.items()}
    how = DistributedConfig(ep_size=world, fsdp_size=world, ep_plan=plan, ep_implementation="all_to_all")
    return AutoModelForCausalLM.from_pretrained(folder, distributed_config=how)


def run(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    world = int(os.environ.get("WORLD_SIZE", "1"))
    model: nn.Module = build(job["native"], **job.get("fields", {}))
    if job["mode"] == "ep":
        model = expert_parallel(model, world, folder / f"{job['name']}-model")
    options = {"ddp_backend": "gloo"} if world > 1 else {}
    if job["mode"] == "fsdp2":
        options |= {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
        if job["native"]:
            options["fsdp_config"]["transformer_layer_cls_to_wrap"] = ["MixtralDecoderLayer"]
    args = TrainingArguments(
        output_dir=str(folder / job["name"]), use_cpu=True, max_steps=4, logging_steps=2, save_strategy="no",
        report_to="none", disable_tqdm=True, learning_rate=1e-3,
        **({"gradient_accumulation_steps": job["accumulation"]} | options | job.get("options", {})),
    )  # fmt: skip
    if args.fsdp:  # on CPUs Accelerate takes no notice of FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    args.per_device_train_batch_size = NUM_SEQUENCES // job["accumulation"] // world
    trainer = Trainer(
        model, args, train_dataset=sequences(), data_collator=collate,
        callbacks=[ExpertLoadCallback(), LossFreeBalancingCallback()],
    )  # fmt: skip
    trainer.train()
    assert not args.fsdp or all(isinstance(parameter, DTensor) for parameter in trainer.model.parameters())
    logs = [row for row in trainer.state.log_history if "loss" in row]
    biases = [b.tolist() for name, b in model.named_buffers() if name.endswith("e_score_correction_bias")]
    found = {"logs": logs, "biases": biases, "total_flos": trainer.state.total_flos}
    if args.process_index == 0:
        load = read_expert_load(folder / job["name"] / "expert_load.safetensors")
        found |= {"steps": load.steps, "executed": load.executed.tolist()}
    return found


if __name__ == "__main__":
    target = Path(sys.argv[1])
    for each in json.loads(sys.argv[2]):
        result = run(target, each)
        (target / f"{each['name']}.{os.environ.get('RANK', '0')}.json").write_text(json.dumps(result))
