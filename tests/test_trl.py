"""TRL's `SFTTrainer` and `DPOTrainer` take our model: counts, router losses, callbacks, expert LoRA, adapters."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_moe.training import ExpertLoadCallback, LossFreeBalancingCallback, moe_lora_config, read_expert_load
from tiny import tiny
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast, Trainer, TrainerCallback, TrainingArguments

from hf_moe import MoEConfig, MoEForCausalLM

pytest.importorskip("trl")
from datasets import Dataset
from peft import PeftModel
from trl import DPOConfig, DPOTrainer, SFTConfig, SFTTrainer

TOP_K, LAYERS, ROWS = 2, 2, 8
CHAT = (
    "{% for m in messages %}{% if m['role'] == 'assistant' %}"
    "{% generation %}{{ m['content'] }} </s> {% endgeneration %}{% else %}{{ m['content'] }} <s> {% endif %}{% endfor %}"
)
# Coefficients so large that a loss that is lost or doubled is seen.
LARGE = {"router_aux_loss_coef": 1.0, "router_z_loss_coef": 0.5, "router_importance_loss_coef": 0.3}


def small(**fields: Any) -> MoEForCausalLM:
    return tiny(text={"num_hidden_layers": LAYERS}, **fields)


def tokenizer() -> PreTrainedTokenizerFast:
    """Of words `w0` to `w99`."""
    words = ["<pad>", "<s>", "</s>", "<unk>", *(f"w{i}" for i in range(100))]
    words_only = Tokenizer(models.WordLevel({word: i for i, word in enumerate(words)}, unk_token="<unk>"))
    words_only.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    special = {"pad_token": "<pad>", "bos_token": "<s>", "eos_token": "</s>", "unk_token": "<unk>"}
    return PreTrainedTokenizerFast(tokenizer_object=words_only, chat_template=CHAT, **special)


def words(count: int, generator: torch.Generator) -> str:
    return " ".join(f"w{i}" for i in torch.randint(0, 100, (count,), generator=generator).tolist())


def texts(lengths: tuple[int, ...] = (5, 17, 9, 12, 4, 15, 8, 11)) -> list[str]:
    generator = torch.Generator().manual_seed(3)
    return [words(length, generator) for length in lengths]


def sft_rows() -> Dataset:
    return Dataset.from_list([{"text": text} for text in texts()])


def chat_rows() -> Dataset:
    pairs = zip(texts()[::2], texts()[1::2], strict=True)
    turns = [[{"role": "user", "content": a}, {"role": "assistant", "content": b}] for a, b in pairs]
    return Dataset.from_list([{"messages": turn} for turn in turns] * 2)


def completion_rows() -> Dataset:
    return Dataset.from_list([{"prompt": f"{text} ", "completion": "w7 w8 w9"} for text in texts()])


def preferences() -> Dataset:
    generator = torch.Generator().manual_seed(4)
    return Dataset.from_list(
        [
            {"prompt": f"{text} ", "chosen": words(3 + i % 4, generator), "rejected": words(5, generator)}
            for i, text in enumerate(texts())
        ]
    )


def tokens_of_preferences() -> int:
    """Tokens that the policy sees in an epoch of `preferences`: prompt, answer and `</s>`, twice for each row."""
    return sum(
        2 * len(row["prompt"].split()) + len(row["chosen"].split()) + len(row["rejected"].split()) + 2 for row in preferences()
    )


def settings(folder: Path, **options: Any) -> dict[str, Any]:
    """Steps of one epoch each, with a learning rate that makes a tiny model learn its rows by heart."""
    accumulation = options.get("gradient_accumulation_steps", 1)
    defaults = {
        "output_dir": str(folder), "per_device_train_batch_size": ROWS // accumulation, "max_steps": 6, "logging_steps": 1,
        "learning_rate": 3e-2, "lr_scheduler_type": "constant", "save_strategy": "no", "report_to": "none", "use_cpu": True,
        "disable_tqdm": True, "bf16": False,
    }  # fmt: skip
    return {**defaults, **options}


def sft(model: nn.Module, folder: Path, rows: Dataset | None = None, **options: Any) -> SFTTrainer:
    extra = {name: options.pop(name) for name in ("callbacks", "peft_config", "eval_dataset") if name in options}
    rows = sft_rows() if rows is None else rows
    return SFTTrainer(
        model, SFTConfig(**settings(folder, **options)), train_dataset=rows, processing_class=tokenizer(), **extra
    )


def dpo(model: nn.Module, folder: Path, **options: Any) -> DPOTrainer:
    extra = {name: options.pop(name) for name in ("callbacks", "peft_config", "ref_model", "eval_dataset") if name in options}
    args = DPOConfig(**settings(folder, **{"beta": 0.5, "max_steps": 3, **options}))
    return DPOTrainer(model, args=args, train_dataset=preferences(), processing_class=tokenizer(), **extra)


def losses(run: Trainer) -> list[float]:
    return [row["loss"] for row in run.state.log_history if "loss" in row]


def executed(folder: Path) -> list[int]:
    """Assignments of each step."""
    return read_expert_load(folder / "expert_load.safetensors").executed.sum((1, 2)).tolist()


@torch.no_grad()
def logits(model: nn.Module) -> Tensor:
    ids = torch.randint(3, 100, (2, 9), generator=torch.Generator().manual_seed(5))
    return model.eval()(input_ids=ids).logits


class Gradients(TrainerCallback):
    """Keeps the gradients of every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[dict[str, Tensor]] = []

    def on_pre_optimizer_step(self, args, state, control, **kwargs):
        found = {name: p.grad.clone() for name, p in kwargs["model"].named_parameters() if p.grad is not None}
        self.steps.append(found)


# ---------------------------------------------------------------------- SFT

SFT: dict[str, tuple[Callable[[], Dataset], dict[str, Any]]] = {
    "plain": (sft_rows, {}),
    "accumulated": (sft_rows, {"gradient_accumulation_steps": 2}),
    "no checkpointing": (sft_rows, {"gradient_checkpointing": False}),
    "packed": (sft_rows, {"packing": True, "max_length": 32}),
    "packed, wrapped": (sft_rows, {"packing": True, "packing_strategy": "wrapped", "max_length": 16}),
    "padding free": (sft_rows, {"padding_free": True, "max_length": None}),
    "multiple of 16": (sft_rows, {"pad_to_multiple_of": 16}),
    "dft": (sft_rows, {"loss_type": "dft"}),
    "assistant only": (chat_rows, {"assistant_only_loss": True}),
    "completion only": (completion_rows, {"completion_only_loss": True}),
}


@pytest.mark.parametrize(("case", "lora"), [*((case, True) for case in SFT), ("plain", False), ("accumulated", False)])
def test_sft(case: str, lora: bool, tmp_path: Path) -> None:
    """The rows are learned; every real token is counted once, K times in every layer; numbers are logged."""
    rows, options = SFT[case]
    model = small(router_z_loss_coef=1e-3)
    config = moe_lora_config(model, r=8, lora_alpha=32, verbose=False) if lora else None
    run = sft(model, tmp_path, rows(), callbacks=[ExpertLoadCallback()], peft_config=config, **options)
    run.train()
    if case != "dft":  # whose loss is 0 as well where nothing is known
        assert losses(run)[-1] < 0.6 * losses(run)[0]
    logs = [row for row in run.state.log_history if "loss" in row]
    seen = [row["num_tokens"] for row in logs]  # TRL's own count, of the attention mask
    tokens = [after - before for before, after in zip([0, *seen[:-1]], seen, strict=True)]
    if case not in ("assistant only", "completion only", "packed, wrapped"):
        assert set(tokens) == {sum(len(text.split()) + 1 for text in texts())}
    assert logs[-1]["mean_token_accuracy"] > 0.2 + logs[0]["mean_token_accuracy"]
    assert executed(tmp_path) == [count * TOP_K * LAYERS for count in tokens]
    for row in logs:
        assert {
            "moe/aux_loss",
            "moe/z_loss",
            "moe/load_max_over_mean",
            "moe/layer_0/aux_loss",
            "moe/dead_experts",
        } <= row.keys()
        assert row["moe/drop_rate"] == 0


@pytest.mark.parametrize("family", ["gemma2", "gpt2", "opt", "cohere2", "granite", "phi"])
def test_the_loss_is_our_lm_loss(family: str, tmp_path: Path) -> None:
    """TRL applies the LM head itself: soft caps, scales and biases of the dense families are in its loss as well."""
    model = tiny(family, text={"num_hidden_layers": LAYERS}, **LARGE)
    run = sft(model, tmp_path, eval_dataset=sft_rows())
    batch = run.data_collator([run.eval_dataset[i] for i in range(ROWS)])
    expected = model(**batch).lm_loss.item()
    assert run.evaluate()["eval_loss"] == pytest.approx(expected, rel=1e-5)


def test_evaluation_is_not_counted(tmp_path: Path) -> None:
    """And its loss is the LM loss, whatever the router losses weigh."""
    evaluation = {"eval_dataset": sft_rows(), "eval_strategy": "steps", "eval_steps": 1}
    run = sft(small(**LARGE), tmp_path, callbacks=[ExpertLoadCallback()], max_steps=2, learning_rate=0.0, **evaluation)
    run.train()
    evaluations = [row["eval_loss"] for row in run.state.log_history if "eval_loss" in row]
    assert evaluations == pytest.approx(losses(run), rel=1e-5)
    assert executed(tmp_path) == [sum(len(text.split()) + 1 for text in texts()) * TOP_K * LAYERS] * 2


# ---------------------------------------------------------------------- router losses


def our_gradients(run: Trainer, folder: Path, model: MoEForCausalLM, **options: Any) -> list[dict[str, Tensor]]:
    """Of the stock `Trainer`, whose loss our own forward makes, on the rows and in the order of `run`."""
    gradients = Gradients()
    unused = ("max_length", "packing", "loss_type", "shuffle_dataset")
    arguments = {name: value for name, value in settings(folder, **options).items() if name not in unused}
    trainer = Trainer(
        model, TrainingArguments(**arguments), train_dataset=run.train_dataset, data_collator=run.data_collator,
        callbacks=[gradients],
    )  # fmt: skip
    trainer.train()
    return gradients.steps


def assert_close(got: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert got.keys() == expected.keys()
    largest = max(gradient.abs().max().item() for gradient in expected.values())
    for name, gradient in expected.items():
        assert (got[name] - gradient).abs().max().item() < 1e-5 * largest, name


@pytest.mark.parametrize(
    ("fields", "accumulation", "told"),
    [
        ({}, 1, False),
        ({"router_type": "sigmoid", "balance_scope": "global_batch", "num_shared_experts": 1}, 1, True),
        ({"capacity_factor": 1.0}, 1, True),
        ({}, 2, True),
        ({}, 2, False),
    ],
)
def test_sft_trains_the_router_as_our_own_forward_does(fields: dict, accumulation: int, told: bool, tmp_path: Path) -> None:
    """Neither lost nor doubled: the gradients of a whole step are those of the stock `Trainer`.

    Micro-batches have as many tokens each, since TRL weighs them alike. Where no callback tells the number of micro-batches,
    it is known from the second step on.
    """
    fields = {**LARGE, "balance_scope": "micro_batch", **fields}
    first = 0 if told or accumulation == 1 else 1
    options = {
        "gradient_accumulation_steps": accumulation, "max_steps": first + 1, "learning_rate": 0.0, "max_grad_norm": 0.0,
    }  # fmt: skip
    rows = Dataset.from_list([{"text": text} for text in texts((9,) * ROWS)])
    gradients = Gradients()
    callbacks = [gradients, *([ExpertLoadCallback()] if told else [])]
    run = sft(small(**fields), tmp_path / "trl", rows, callbacks=callbacks, **options)
    run.train()
    expected = our_gradients(run, tmp_path / "ours", small(**fields), **options)
    without = our_gradients(run, tmp_path / "none", small(**{**fields, **dict.fromkeys(LARGE, 0.0)}), **options)
    router = next(name for name in expected[0] if "gate.weight" in name)
    assert (expected[0][router] - without[0][router]).norm() > 0.3 * expected[0][router].norm()
    assert_close(gradients.steps[first], expected[first])


def test_an_imported_moe_has_no_second_router_loss(tmp_path: Path) -> None:
    """OLMoE is kept as `text_config` of one expert, whose own balancing loss TRL would ask for."""
    from transformers import OlmoeConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    shell = OlmoeConfig(vocab_size=128, num_experts=1, num_experts_per_tok=1, eos_token_id=2, pad_token_id=0, **sizes)
    torch.manual_seed(0)
    model = MoEForCausalLM(MoEConfig(text_config=shell, num_experts=4, **LARGE))
    reference = copy.deepcopy(model)
    options = {"max_steps": 1, "learning_rate": 0.0, "max_grad_norm": 0.0}
    gradients = Gradients()
    run = sft(model, tmp_path / "trl", callbacks=[gradients, ExpertLoadCallback()], **options)
    run.train()
    assert not run.aux_loss_enabled
    assert_close(gradients.steps[0], our_gradients(run, tmp_path / "ours", reference, **options)[0])
    assert executed(tmp_path / "trl") == [sum(len(text.split()) + 1 for text in texts()) * TOP_K * LAYERS]


@pytest.mark.parametrize("accumulation", [1, 2])
def test_dpo_trains_the_router(accumulation: int, tmp_path: Path) -> None:
    """The gradient has the router losses of the policy's forward, as the mean over micro-batches."""
    options = {"gradient_accumulation_steps": accumulation, "max_steps": 1, "learning_rate": 0.0, "max_grad_norm": 0.0}
    found, batches = [], []
    for coefficients in (LARGE, dict.fromkeys(LARGE, 0.0)):
        gradients, model = Gradients(), small(**coefficients)
        run = dpo(model, tmp_path, callbacks=[gradients, ExpertLoadCallback()], ref_model=copy.deepcopy(model), **options)
        collate = run.data_collator
        run.data_collator = lambda rows, collate=collate: batches.append(collate(rows)) or batches[-1]
        run.train()
        found.append(gradients.steps[0])
    model = small(**LARGE).train()
    for batch in batches[:accumulation]:
        outputs = model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])
        losses = {name.replace("router_", "").replace("_coef", ""): c for name, c in LARGE.items()}
        (sum(c * outputs[name] for name, c in losses.items()) / accumulation).backward()
    expected = {name: p.grad for name, p in model.named_parameters() if p.grad is not None and p.grad.abs().sum() > 0}
    assert any("gate.weight" in name for name in expected)
    assert_close({name: found[0][name] - found[1][name] for name in expected}, expected)


# ---------------------------------------------------------------------- DPO


@pytest.mark.parametrize(
    ("lora", "options"),
    [
        (True, {}),
        (True, {"gradient_accumulation_steps": 2}),
        (True, {"gradient_checkpointing": False, "loss_type": ["sigmoid", "sft"]}),
        (True, {"precompute_ref_log_probs": True}),
        (False, {}),
        (False, {"precompute_ref_log_probs": True}),
    ],
    ids=str,
)
def test_dpo(lora: bool, options: dict, tmp_path: Path) -> None:
    """The loss falls; the policy's tokens are counted once, the reference's not at all, nor those of evaluation."""
    model = small(router_z_loss_coef=1e-3)
    extra: dict[str, Any] = {"eval_dataset": preferences().select(range(4)), "eval_strategy": "steps", "eval_steps": 2}
    if lora:
        extra["peft_config"] = moe_lora_config(model, r=8, lora_alpha=32, verbose=False)
    elif not options:
        extra["ref_model"] = copy.deepcopy(model)
    run = dpo(model, tmp_path, callbacks=[ExpertLoadCallback()], **extra, **options)
    run.train()
    assert losses(run)[-1] < 0.6 * losses(run)[0]
    assert executed(tmp_path) == [tokens_of_preferences() * TOP_K * LAYERS] * 3
    assert all("moe/aux_loss" in row for row in run.state.log_history if "loss" in row)


# ---------------------------------------------------------------------- adapters

NOISY = {"router_type": "noisy_top_k", "router_load_loss_coef": 0.1}


@pytest.mark.parametrize(
    ("make", "fields", "router"),
    [
        (sft, {}, False),
        (sft, {"router_type": "sigmoid"}, True),
        (sft, {"router_type": "sigmoid"}, False),
        (sft, NOISY, True),
        (dpo, {}, False),
        (dpo, {"router_type": "sigmoid"}, True),
    ],
)
def test_adapters_reload_to_equal_logits(
    make: Callable[..., Trainer], fields: dict, router: bool, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    """Routers included where they are trained; else they are left as they were, by loss-free balancing as well."""
    model = small(**fields)
    untrained = copy.deepcopy(model.state_dict())
    before = logits(model)
    config = moe_lora_config(model, router=router, r=4, verbose=False)
    logging.getLogger("transformers").propagate = True
    callbacks = [ExpertLoadCallback(), LossFreeBalancingCallback()]
    run = make(model, tmp_path, callbacks=callbacks, peft_config=config, max_steps=3)
    run.train()
    run.save_model(str(tmp_path / "adapter"))
    trained = logits(run.model)
    assert (trained - before).abs().max() > 1e-3
    loaded = PeftModel.from_pretrained(small(**fields), str(tmp_path / "adapter"))
    assert torch.equal(logits(loaded), trained)
    merged = loaded.merge_and_unload()
    torch.testing.assert_close(logits(merged), trained, rtol=1e-4, atol=1e-5)
    changed = {name for name, value in merged.state_dict().items() if not torch.equal(value, untrained[name])}
    assert any("experts.gate_up_proj" in name for name in changed)
    assert any(".gate." in name for name in changed) == router
    assert any("e_score_correction_bias" in name for name in changed) == (router and "sigmoid" in fields.values())
    if "sigmoid" in fields.values():
        assert ("router=True" in caplog.text) != router


def test_the_reference_is_the_adapter_before_training(tmp_path: Path) -> None:
    """DPO with a model that has adapters already compares with a copy of them; both have the experts' pairs."""
    from peft import get_peft_model

    model = small()
    adapted = get_peft_model(model, moe_lora_config(model, r=4, verbose=False))
    run = dpo(adapted, tmp_path, callbacks=[ExpertLoadCallback()], max_steps=3)
    run.train()
    assert losses(run)[0] == pytest.approx(torch.log(torch.tensor(2.0)).item(), rel=1e-5)
    assert losses(run)[-1] < losses(run)[0]
    assert executed(tmp_path) == [tokens_of_preferences() * TOP_K * LAYERS] * 3


def test_native_moe(tmp_path: Path) -> None:
    """A Mixtral of Transformers, its experts adapted, under the same callback."""
    from transformers import MixtralConfig

    sizes = {"hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": LAYERS, "num_attention_heads": 4}
    torch.manual_seed(0)
    config = MixtralConfig(
        vocab_size=128, num_key_value_heads=2, num_local_experts=4, output_router_logits=True, initializer_range=0.2, **sizes
    )
    model = AutoModelForCausalLM.from_config(config)
    untrained = copy.deepcopy(model)
    run = sft(
        model, tmp_path, callbacks=[ExpertLoadCallback()], peft_config=moe_lora_config(model, lora_alpha=32, verbose=False)
    )
    run.train()
    assert losses(run)[-1] < 0.7 * losses(run)[0]
    assert executed(tmp_path) == [sum(len(text.split()) + 1 for text in texts()) * TOP_K * LAYERS] * 6
    run.save_model(str(tmp_path / "adapter"))
    assert torch.equal(logits(PeftModel.from_pretrained(untrained, str(tmp_path / "adapter"))), logits(run.model))
