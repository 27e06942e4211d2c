"""The stock `Trainer` and PEFT take a `MoEForCausalLM` like any other model."""

import copy
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, PeftModel, get_peft_model
from tiny import gradients, largest_difference, padded_batch, tiny, token_ids
from torch import Tensor, nn
from trainer_cut import collate, sequences
from transformers import Trainer, TrainingArguments

from hf_moe import MoEForCausalLM


def trainer(model: nn.Module, folder: Path, **arguments: Any) -> Trainer:
    """On 16 sequences of unequal length."""
    settings = {
        "output_dir": str(folder),
        "use_cpu": True,
        "per_device_train_batch_size": 4,
        "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2,
        "logging_steps": 1,
        "save_strategy": "no",
        "report_to": "none",
        "disable_tqdm": True,
        **arguments,
    }
    return Trainer(
        model, TrainingArguments(**settings), train_dataset=sequences(), eval_dataset=sequences(), data_collator=collate
    )


def losses(run: Trainer) -> list[float]:
    return [row["loss"] for row in run.state.log_history if "loss" in row]


@pytest.mark.parametrize(
    "fields", [{"router_z_loss_coef": 0.01}, {"router_type": "noisy_top_k", "capacity_factor": 1.0}], ids=str
)
def test_resume(fields: dict, tmp_path: Path) -> None:
    """With gradient checkpointing: a run that is resumed from its checkpoint goes on as if it had not stopped."""
    arguments = {"gradient_checkpointing": True, "gradient_accumulation_steps": 2, "max_steps": 4, "save_strategy": "steps",
                 "save_steps": 2}  # fmt: skip
    whole = trainer(tiny(**fields), tmp_path / "a", **arguments)
    whole.train()
    assert len(losses(whole)) == 4
    assert losses(whole)[-1] < losses(whole)[0]
    resumed = trainer(tiny(**fields), tmp_path / "b", **arguments)
    resumed.train(resume_from_checkpoint=str(tmp_path / "a" / "checkpoint-2"))
    assert losses(resumed) == losses(whole)
    assert largest_difference(resumed.model.state_dict(), whole.model.state_dict()) == 0.0
    assert whole.model.config.use_cache is False
    plain = trainer(tiny(**fields), tmp_path / "c", **{**arguments, "gradient_checkpointing": False, "max_steps": 2})
    plain.train()
    assert losses(plain) == losses(whole)[:2]


def test_no_cache_in_training(tmp_path: Path) -> None:
    """`Trainer` sets `config.use_cache`; the dense model inside goes by it."""
    model = tiny()
    assert model(**padded_batch()).past_key_values is not None
    trainer(model, tmp_path)
    assert model(**padded_batch()).past_key_values is None
    assert model(**padded_batch(), use_cache=True).past_key_values is not None


def test_evaluate_and_predict(tmp_path: Path) -> None:
    """The eval loss is the LM loss, and predictions are the logits alone, with router logits asked for as well."""
    model = tiny("llama", output_router_logits=True, router_aux_loss_coef=10.0)
    run = trainer(model, tmp_path)
    metrics = run.evaluate()
    batches = [collate(sequences()[i : i + 4]) for i in range(0, 16, 4)]
    with torch.no_grad():
        expected = torch.stack([model(**batch).lm_loss for batch in batches]).mean().item()
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-6)
    predictions = run.predict(sequences()).predictions
    assert predictions.shape[0] == 16
    assert predictions.shape[2] == 128
    width = batches[0]["input_ids"].shape[1]
    first = model(**batches[0]).logits.detach().numpy()
    assert predictions[:4, :width] == pytest.approx(first, abs=1e-5)


# ---------------------------------------------------------------------- PEFT

LORA = {
    "attention": {"target_modules": ["q_proj", "v_proj"]},
    "experts": {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "both": {"target_modules": ["q_proj"], "target_parameters": ["mlp.experts.down_proj"]},
}


def adapted(target: str, model: MoEForCausalLM | None = None) -> PeftModel:
    config = LoraConfig(r=4, lora_alpha=8, task_type="CAUSAL_LM", **LORA[target])
    return get_peft_model(tiny(router_z_loss_coef=0.1) if model is None else model, config)


def logits_of(model: nn.Module) -> Tensor:
    with torch.no_grad():
        return model.eval()(input_ids=token_ids()).logits


def snapshot(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("target", LORA)
def test_lora(target: str, checkpointing: bool, tmp_path: Path) -> None:
    """A step changes the adapters only; they can be saved, loaded and merged."""
    model = adapted(target).train()
    base = logits_of(copy.deepcopy(model))
    if checkpointing:
        model.gradient_checkpointing_enable()
    before = snapshot(model)
    optimizer = torch.optim.AdamW([p for p in model.parameters() if p.requires_grad], lr=0.02)
    for _ in range(2):  # the first step changes the B matrices only, since A has no gradient while B is 0
        optimizer.zero_grad()
        model(**padded_batch()).loss.backward()
        optimizer.step()
    changed = {name for name, value in snapshot(model).items() if not torch.equal(value, before[name])}
    assert changed == {name for name in before if "lora_" in name} == set(gradients(model))
    trained = logits_of(model)
    assert (trained - base).abs().max() > 1e-2

    model.save_pretrained(tmp_path)
    loaded = PeftModel.from_pretrained(tiny(), str(tmp_path))
    assert torch.equal(logits_of(loaded), trained)
    merged = loaded.merge_and_unload()
    assert type(merged) is MoEForCausalLM
    # base + delta is rounded once more where it is merged
    torch.testing.assert_close(logits_of(merged), trained, rtol=1e-4, atol=1e-5)
    merged.save_pretrained(tmp_path / "merged")
    assert torch.equal(logits_of(MoEForCausalLM.from_pretrained(tmp_path / "merged")), logits_of(merged))


def test_native_adapter() -> None:
    """Transformers' own adapter API."""
    model = tiny()
    before = logits_of(model)
    model.add_adapter(LoraConfig(r=4, init_lora_weights=False, target_modules=["q_proj"]), adapter_name="a")
    assert not torch.equal(logits_of(model), before)
    model.disable_adapters()
    assert torch.equal(logits_of(model), before)


@pytest.mark.parametrize("target", ["attention", "experts"])
def test_trainer_with_peft(target: str, tmp_path: Path) -> None:
    model = adapted(target)
    before = snapshot(model)
    run = trainer(model, tmp_path, max_steps=3, gradient_checkpointing=True, save_strategy="steps", save_steps=3)
    run.train()
    assert len(losses(run)) == 3
    after = snapshot(model)
    assert {name for name in before if not torch.equal(before[name], after[name])} == {n for n in before if "lora_" in n}
    loaded = PeftModel.from_pretrained(tiny(), str(tmp_path / "checkpoint-3"))
    assert torch.equal(logits_of(loaded), logits_of(model))
