"""Worker: adapters on a model whose experts are spread over ranks, against the same adapters in one process.

Run by test_expert_parallel_lora.py under torchrun: `expert_lora_worker.py FOLDER JOBS`, where JOBS is a JSON list of {"name",
"ep", "tp", "dense", "dispatcher", "dtype", "fields" of MoEConfig, "options" of `moe_lora_config`, "own_config": whether PEFT's
plain config is used, "all_to_one": whether all tokens go to two experts, "moved": where experts are moved to, "checkpointing",
"accumulation", "load": whether the files are loaded again}, or of {"name", "trainer": true, "ep", "fields"}. Every rank makes
the reference itself; rank 0 writes FOLDER/NAME/result.json with the largest differences, relative to the largest value.
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
from hf_moe.training import moe_lora_config
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file
from torch import Tensor, nn
from torch.nn import functional as F
from trainer_cut import NUM_SEQUENCES, collate, sequences
from transformers import AutoModelForCausalLM, Trainer, TrainingArguments

from hf_moe import MoEConfig, MoEForCausalLM
from hf_moe.expert_lora import sync_replicated_parameters
from hf_moe.expert_parallel import load_expert_parallel
from hf_moe.expert_placement import move_experts

STEPS = 2
ADAPTER = "adapter_model.safetensors"


def build(folder: Path, all_to_one: bool = False, **fields: Any) -> None:
    """A checkpoint with weights large enough that routing is far from uniform."""
    torch.manual_seed(0)
    model = MoEForCausalLM(MoEConfig(text_config=text_config("llama", initializer_range=0.2), **{"num_experts": 4, **fields}))
    if all_to_one:
        for layer in model.moe_layers:
            layer.gate.e_score_correction_bias[:2] += 10.0
    model.save_pretrained(folder)


def adapted(model: nn.Module, job: dict[str, Any]) -> PeftModel:
    """With adapters whose values depend on their names only."""
    config = moe_lora_config(model, r=2, verbose=False, **job.get("options", {}))
    if job.get("own_config"):
        config = LoraConfig(
            r=2, lora_alpha=config.lora_alpha, target_modules=config.target_modules, task_type=config.task_type,
            target_parameters=config.target_parameters, modules_to_save=config.modules_to_save,
        )  # fmt: skip
    model = get_peft_model(model, config)
    with torch.no_grad():
        for index, (name, parameter) in enumerate(model.named_parameters()):
            if ".lora_" in name:
                draw = torch.randn(parameter.shape, generator=torch.Generator().manual_seed(index))
                parameter.copy_(0.2 * draw)
    if job.get("checkpointing"):
        model.gradient_checkpointing_enable(gradient_checkpointing_kwargs={"use_reentrant": False})
        model.enable_input_require_grads()
    return model.train()


def batch() -> tuple[Tensor, Tensor]:
    """Eight sequences of unequal length: ids and labels."""
    generator = torch.Generator().manual_seed(3)
    ids = torch.randint(3, 128, (8, 9), generator=generator)
    lengths = torch.randint(3, 10, (8, 1), generator=generator)
    return ids, ids.masked_fill(torch.arange(9) >= lengths, -100)


def train(
    model: PeftModel, ids: Tensor, labels: Tensor, tokens: int, scale: int, accumulation: int = 1
) -> tuple[list[float], dict[str, Tensor]]:
    """`STEPS` steps of AdamW: losses, and the first gradients. The loss is in the model's own precision throughout."""
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=accumulation)
    trained = {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}
    optimizer = torch.optim.AdamW(trained.values(), lr=0.01)
    losses, first = [], {}
    for step in range(STEPS):
        total = 0.0
        for mine, wanted in zip(ids.chunk(accumulation), labels.chunk(accumulation), strict=True):
            with accelerator.accumulate(model):
                logits = model(input_ids=mine).logits[:, :-1]
                loss = F.cross_entropy(logits.flatten(0, 1), wanted[:, 1:].flatten(), reduction="sum") / tokens
                (loss * scale).backward()
                total += loss.item()
        if not step:
            first = {name: parameter.grad.clone() for name, parameter in trained.items()}
        nn.utils.clip_grad_norm_(trained.values(), 1.0)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(total)
    return losses, first


def gap(got: dict[str, Tensor], expected: dict[str, Tensor]) -> float:
    """The largest difference of tensors of the same names, each relative to its largest value."""
    assert got.keys() == expected.keys(), (sorted(got)[:3], sorted(expected)[:3])
    gaps = [(got[k] - v).abs().max() / v.abs().max().clamp(min=1e-8) for k, v in expected.items()]
    return torch.stack(gaps).max().item()


def state(model: PeftModel) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters() if parameter.requires_grad}


def merge_error(model: PeftModel) -> str:
    try:
        model.merge_and_unload()
    except ValueError as error:
        return str(error)
    return ""


def whole_experts_error(model: nn.Module) -> str:
    try:
        get_peft_model(model, LoraConfig(target_modules=["q_proj"], modules_to_save=["experts"]))
    except ValueError as error:
        return str(error)
    return ""


def compare(folder: Path, job: dict[str, Any]) -> dict[str, Any]:
    base, dtype = folder / "model", getattr(torch, job.get("dtype", "float32"))
    if dist.get_rank() == 0:
        build(base, job.get("all_to_one", False), **job.get("fields", {}))
    dist.barrier()
    ids, labels = batch()
    tp_size = job.get("tp", 1)  # ranks that share a batch
    tokens, world, rank = int((labels[:, 1:] != -100).sum()), dist.get_world_size() // tp_size, dist.get_rank() // tp_size
    alone = adapted(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), job)
    losses, gradients = train(alone, ids, labels, tokens, 1)

    def spread() -> Any:
        layout = {"ep_size": job["ep"], "dense": job.get("dense", "fsdp"), "dispatcher": job.get("dispatcher", "all_to_all")}
        layout["tp_size"] = tp_size
        copies = {"dp_replicate_size": 2} if layout["dense"] == "hybrid" else {}
        return load_expert_parallel(base, **layout, **copies, dtype=dtype, quiet=True)

    model = adapted(spread(), job)
    sync_replicated_parameters(model)
    if job.get("moved"):
        for layer in range(3):
            move_experts(model, None, layer, job["moved"])
    got_losses, got_gradients = train(
        model, ids.chunk(world)[rank], labels.chunk(world)[rank], tokens, world, job.get("accumulation", 1)
    )
    total = torch.tensor(got_losses, dtype=torch.float64)
    dist.all_reduce(total)
    found = {
        "loss": max(abs(one - other) for one, other in zip((total / tp_size).tolist(), losses, strict=True)),
        "gradient": gap(got_gradients, gradients),
        "update": gap(state(model), state(alone)),
        "experts": sum(".experts." in name for name in gradients),
        "merge_error": merge_error(model),
    }
    if tp_size > 1:  # PEFT gathers on all ranks
        model.save_pretrained(folder / "spread", is_main_process=dist.get_rank() == 0)
    if dist.get_rank() == 0:
        if tp_size == 1:  # one rank alone does
            model.save_pretrained(folder / "spread")
        alone.save_pretrained(folder / "alone")
        saved, expected = (load_file(folder / name / ADAPTER) for name in ("spread", "alone"))
        found["file"] = gap(saved, expected)
        configs = [json.loads((folder / name / "adapter_config.json").read_text()) for name in ("spread", "alone")]
        found["same_config"] = configs[0] == configs[1]
    dist.barrier()
    if job.get("load"):
        loaded = PeftModel.from_pretrained(AutoModelForCausalLM.from_pretrained(base, dtype=dtype), folder / "spread")
        found["loaded_alone"] = gap(logits(loaded, ids), logits(alone, ids))
        again, mine = PeftModel.from_pretrained(spread(), folder / "alone"), ids.chunk(world)[rank]
        found["merge_error_loaded"] = merge_error(again)  # before it has run
        found["loaded_spread"] = gap(logits(again, mine), logits(alone, mine))
        found["whole_error"] = whole_experts_error(spread())
    return found


@torch.no_grad()
def logits(model: nn.Module, ids: Tensor) -> dict[str, Tensor]:
    return {"logits": model.eval()(input_ids=ids).logits}


def run_trainer(folder: Path, job: dict[str, Any], ep_size: int, world: int) -> dict[str, Any]:
    """Three steps of the stock `Trainer`, with accumulation and router losses; the adapter is saved."""
    if not ep_size or dist.get_rank() == 0:
        build(folder / "model", **job["fields"])
    if ep_size:
        dist.barrier()
        model = load_expert_parallel(folder / "model", ep_size=ep_size, quiet=True)
    else:
        model = AutoModelForCausalLM.from_pretrained(folder / "model")
    args = TrainingArguments(
        output_dir=str(folder / "out"), use_cpu=True, max_steps=3, logging_steps=1, save_strategy="no", report_to="none",
        disable_tqdm=True, learning_rate=0.01, gradient_accumulation_steps=2, gradient_checkpointing=True,
        per_device_train_batch_size=NUM_SEQUENCES // 2 // world, gradient_checkpointing_kwargs={"use_reentrant": False},
    )  # fmt: skip
    trainer = Trainer(adapted(model, job), args, train_dataset=sequences(), data_collator=collate)
    trainer.train()
    if args.process_index == 0:
        trainer.model.save_pretrained(folder / "trained")
    logs = [row for row in trainer.state.log_history if "loss" in row]
    return {"loss": [row["loss"] for row in logs], "grad_norm": [float(row["grad_norm"]) for row in logs]}


if __name__ == "__main__":
    dist.init_process_group("gloo")
    for each in json.loads(sys.argv[2]):
        place = Path(sys.argv[1]) / each["name"]
        place.mkdir(exist_ok=True)
        result = run_trainer(place, each, each["ep"], dist.get_world_size()) if each.get("trainer") else compare(place, each)
        if dist.get_rank() == 0:
            (place / "result.json").write_text(json.dumps(result))
        dist.barrier()
    dist.destroy_process_group()
