"""Worker: one optimizer step of the stock `Trainer` on 16 sequences of unequal length, cut as told.

Run by test_batch_cuts.py, alone or under torchrun: `trainer_cut.py OUT.pt JOBS`, where JOBS is a JSON list of
[fields of MoEConfig, accumulation steps].
"""

import json
import os
import sys
import tempfile

import torch
from families import text_config
from transformers import Trainer, TrainerCallback, TrainingArguments

from hf_moe import MoEConfig, MoEForCausalLM

NUM_SEQUENCES = 16


def sequences() -> list[dict]:
    """Sequences of 4 to 24 tokens."""
    generator = torch.Generator().manual_seed(1)
    lengths = torch.randint(4, 25, (NUM_SEQUENCES,), generator=generator).tolist()
    return [{"input_ids": torch.randint(3, 128, (n,), generator=generator)} for n in lengths]


def collate(rows: list[dict]) -> dict[str, torch.Tensor]:
    """Pad to the right; padding has no label."""
    longest = max(len(row["input_ids"]) for row in rows)
    batch = {"input_ids": [], "attention_mask": [], "labels": []}
    for row in rows:
        ids, pad = row["input_ids"], longest - len(row["input_ids"])
        batch["input_ids"].append(torch.cat([ids, ids.new_zeros(pad)]))
        batch["attention_mask"].append(torch.cat([torch.ones_like(ids), ids.new_zeros(pad)]))
        batch["labels"].append(torch.cat([ids, ids.new_full((pad,), -100)]))
    return {name: torch.stack(rows) for name, rows in batch.items()}


class Capture(TrainerCallback):
    """Keeps the gradients of the first optimizer step."""

    def __init__(self) -> None:
        self.gradients: dict[str, torch.Tensor] = {}

    def on_pre_optimizer_step(self, args, state, control, model=None, **kwargs):
        names = {n.removeprefix("module."): p for n, p in model.named_parameters()}
        self.gradients = {n: p.grad.clone() for n, p in names.items() if ".gate." in n or ".experts." in n}


def run(fields: dict, accumulation: int) -> dict:
    """The reported loss and the gradients of router and experts."""
    torch.manual_seed(0)
    # larger weights than the default, so that routing is far from uniform
    config = MoEConfig(text_config=text_config("llama", initializer_range=0.2), num_experts=4, **fields)
    model = MoEForCausalLM(config)
    capture = Capture()
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(
            output_dir=folder, use_cpu=True, max_steps=1, gradient_accumulation_steps=accumulation, logging_steps=1,
            learning_rate=0.0, max_grad_norm=0.0, report_to="none", save_strategy="no", disable_tqdm=True,
        )  # fmt: skip
        args.per_device_train_batch_size = NUM_SEQUENCES // accumulation // args.world_size
        trainer = Trainer(model, args, train_dataset=sequences(), data_collator=collate, callbacks=[capture])
        trainer.train()
    loss = next(row["loss"] for row in trainer.state.log_history if "loss" in row)
    return {"loss": loss, "gradients": capture.gradients}


if __name__ == "__main__":
    results = [run(fields, accumulation) for fields, accumulation in json.loads(sys.argv[2])]
    if int(os.environ.get("RANK", "0")) == 0:
        torch.save(results, sys.argv[1])
