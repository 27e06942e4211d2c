"""`MoETrainer`: parameter groups, freezing, learning rates in logs, token-weighted evaluation, and otherwise `Trainer`."""

from __future__ import annotations

import json
import math
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from counts_worker import expert_parallel
from families import text_config
from hf_moe.training import (
    ExpertLoadCallback,
    LossFreeBalancingCallback,
    MoETrainer,
    MoETrainingArguments,
    read_expert_load,
)
from hf_moe.training.checkpoints import last_whole_checkpoint, what_is_missing
from hf_moe.training.parameter_groups import parts_of
from hf_moe.training.perplexity import Perplexity
from native_models import NATIVE
from peft import LoraConfig, get_peft_model
from ranks import launch
from tiny import tiny
from torch import nn
from torch.nn import functional as F
from trainer_cut import collate, sequences
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Trainer, TrainingArguments

from hf_moe import MoEForCausalLM

ROWS = sequences()
TOKENS = sum(len(row["input_ids"]) - 1 for row in ROWS)  # that are predicted
ROUTERS = {
    "top_k": {"weight"},
    "noisy_top_k": {"weight", "noise_weight"},
    "sigmoid": {"weight"},
    "hash": set(),
    "hierarchical": {"weight", "noise_weight", "group_weight", "group_noise_weight"},
    "strictly_balanced": {"weight", "thresholds"},
}
FIELDS = {"hierarchical": {"n_group": 2, "topk_group": 2}}


def moe_trainer(model: nn.Module | None, folder: Path, cls: Any = MoETrainer, **options: Any) -> Any:
    inits = {
        name: options.pop(name) for name in ("callbacks", "optimizers", "model_init", "compute_loss_func") if name in options
    }
    settings: dict[str, Any] = {
        "output_dir": str(folder), "use_cpu": True, "per_device_train_batch_size": 8, "per_device_eval_batch_size": 4,
        "learning_rate": 1e-2, "logging_steps": 1, "max_steps": 2, "save_strategy": "no", "report_to": "none",
        "disable_tqdm": True, "prediction_loss_only": True, "lr_scheduler_type": "linear",
    }  # fmt: skip
    arguments = MoETrainingArguments if cls is MoETrainer else TrainingArguments
    return cls(
        model, arguments(**{**settings, **options}), train_dataset=ROWS, eval_dataset=ROWS, data_collator=collate, **inits
    )


def native(name: str) -> Any:
    """A tiny native MoE with the vocabulary of the sequences."""
    model_type, fields, _ = NATIVE[name]
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(
        CONFIG_MAPPING[model_type](**{**fields, "vocab_size": 128, "initializer_range": 0.2})
    )


def logs(run: Trainer) -> list[dict[str, Any]]:
    return [row for row in run.state.log_history if "loss" in row]


def snapshot(model: nn.Module) -> dict[str, torch.Tensor]:
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


def changed_parts(model: nn.Module, before: dict[str, torch.Tensor]) -> set[str]:
    part_of = parts_of(model)
    return {part_of[name] for name, value in snapshot(model).items() if not torch.equal(value, before[name])}


def lora(model: nn.Module, **changes: Any) -> nn.Module:
    """Adapters on attention, routed experts, and, of a native MoE, on nothing of the router."""
    config = LoraConfig(
        r=2, target_modules=["q_proj", "v_proj"],
        target_parameters=["mlp.experts.gate_up_proj", "mlp.experts.down_proj"], **changes,
    )  # fmt: skip
    return get_peft_model(model, config)


# ---------------------------------------------------------------------- the parts


@pytest.mark.parametrize("router", ROUTERS)
def test_parts_of_ours(router: str) -> None:
    model = tiny(router_type=router, num_shared_experts=1, decoder_sparse_step=2, **FIELDS.get(router, {}))
    part_of = parts_of(model)
    assert part_of.keys() == dict(model.named_parameters()).keys()
    of_router = {name for name, part in part_of.items() if part == "router"}
    assert of_router == {f"language_model.model.layers.1.mlp.gate.{name}" for name in ROUTERS[router]}
    experts = {name for name, part in part_of.items() if part == "experts"}
    assert experts == {f"language_model.model.layers.1.mlp.experts.{name}" for name in ("gate_up_proj", "down_proj")}
    assert part_of["language_model.model.layers.1.mlp.shared_experts.down_proj.weight"] == "rest"


@pytest.mark.parametrize(
    ("name", "router"),
    [
        ("mixtral", "mlp.gate.weight"),
        ("qwen2_moe", "mlp.gate.weight"),
        ("granitemoe", "block_sparse_moe.router.weight"),
        ("deepseek_v3", "mlp.gate.weight"),
        ("olmoe", "mlp.gate.weight"),
        ("ernie4_5_moe", "mlp.gate.weight"),
    ],
)
def test_parts_of_native(name: str, router: str) -> None:
    model = native(name)
    part_of = parts_of(model)
    sizes = {name: parameter.shape for name, parameter in model.named_parameters()}
    routers = [name for name, part in part_of.items() if part == "router"]
    assert routers
    assert all(router in name or "bias" in name for name in routers)
    experts = [name for name, part in part_of.items() if part == "experts"]
    assert len(experts) == 2 * len([name for name in routers if name.endswith("weight")])
    assert all(len(sizes[name]) == 3 for name in experts)
    assert {part_of[name] for name in sizes if "shared" in name or "attn" in name or "embed" in name} == {"rest"}


@pytest.mark.parametrize("build", [tiny, lambda: native("mixtral")])
def test_parts_of_adapters(build: Any) -> None:
    """What PEFT puts on experts belongs to them; a router that is trained whole is copied by PEFT."""
    model = lora(build(), modules_to_save=["gate"])
    part_of = parts_of(model)
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    assert {part_of[name] for name in trained} == {"router", "experts", "rest"}
    for name in trained:
        expected = "experts" if "experts" in name else "router" if "gate.modules_to_save" in name else "rest"
        assert part_of[name] == expected, name


# ---------------------------------------------------------------------- learning rates


MODELS: dict[str, Any] = {
    "ours": lambda: tiny(),
    "noisy": lambda: tiny(router_type="noisy_top_k", text={"mlp_bias": True}),
    "strict": lambda: tiny(router_type="strictly_balanced"),
    "gpt2": lambda: tiny("gpt2"),
    "native": lambda: native("qwen2_moe"),
    "adapters": lambda: lora(tiny(), modules_to_save=["gate"]),
    "native_adapters": lambda: lora(native("mixtral"), modules_to_save=["gate"]),
}


@pytest.mark.parametrize("kind", MODELS)
def test_every_parameter_is_in_one_group(kind: str, tmp_path: Path) -> None:
    """With its part's rate, and decayed if and only if `Trainer` decays it."""
    model = MODELS[kind]()
    run = moe_trainer(model, tmp_path, weight_decay=0.1, router_learning_rate=1e-3, expert_learning_rate=2e-3)
    optimizer = run.create_optimizer()
    stock = moe_trainer(model, tmp_path, cls=Trainer, weight_decay=0.1).create_optimizer()
    decay = {id(p): group["weight_decay"] for group in stock.param_groups for p in group["params"]}
    names, part_of = {id(p): name for name, p in model.named_parameters()}, parts_of(model)
    rates = {"router": 1e-3, "experts": 2e-3, "rest": 1e-2}
    seen: list[str] = []
    for group in optimizer.param_groups:
        assert group["params"]
        for parameter in group["params"]:
            name = names[id(parameter)]
            seen.append(name)
            assert group["part"] == part_of[name]
            assert group["lr"] == rates[part_of[name]]
            expected = 0.0 if name.endswith("thresholds") else decay[id(parameter)]
            assert group["weight_decay"] == expected, name
    assert sorted(seen) == sorted(name for name, p in model.named_parameters() if p.requires_grad)
    assert optimizer.param_groups[0]["part"] == "rest"


def test_rates_are_those_of_sgd(tmp_path: Path) -> None:
    """One step of plain SGD moves each weight by its part's rate times its gradient."""
    model = tiny(router_z_loss_coef=0.1)
    before = snapshot(model)
    run = moe_trainer(
        model, tmp_path, optim="sgd", max_steps=1, per_device_train_batch_size=16, max_grad_norm=0.0, learning_rate=0.5,
        router_learning_rate=2.0, expert_learning_rate=0.125, lr_scheduler_type="constant",
    )  # fmt: skip
    run.train()
    oracle = tiny(router_z_loss_coef=0.1).train()
    batch = collate(ROWS)
    oracle(**batch, num_items_in_batch=batch["labels"][:, 1:].ne(-100).sum()).loss.backward()
    part_of, rates = parts_of(oracle), {"router": 2.0, "experts": 0.125, "rest": 0.5}
    for name, parameter in oracle.named_parameters():
        assert parameter.grad is not None
        expected = before[name] - rates[part_of[name]] * parameter.grad
        torch.testing.assert_close(dict(model.named_parameters())[name], expected, rtol=1e-5, atol=1e-6)


def test_rates_are_logged(tmp_path: Path) -> None:
    """Each log has the rates of the step just made, as it has `learning_rate`."""
    run = moe_trainer(tiny(), tmp_path, max_steps=4, router_learning_rate=1e-3, expert_learning_rate=0.0, logging_steps=2)
    run.train()
    rows = logs(run)
    assert [row["lr/rest"] for row in rows] == [row["learning_rate"] for row in rows] == pytest.approx([7.5e-3, 2.5e-3])
    assert [row["lr/router"] for row in rows] == pytest.approx([7.5e-4, 2.5e-4])
    assert [row["lr/experts"] for row in rows] == [0.0, 0.0]
    others = [row for row in run.state.log_history if "loss" not in row]
    assert not any(name.startswith("lr/") for row in others for name in row)


def test_same_losses_as_the_stock_trainer(tmp_path: Path) -> None:
    """Without options of its own, to the last bit; for a dense model, too, which gets no callbacks."""
    for build in (lambda: tiny(router_type="noisy_top_k"), lambda: AutoModelForCausalLM.from_config(text_config("llama"))):
        found = []
        for cls in (Trainer, MoETrainer):
            torch.manual_seed(0)
            run = moe_trainer(build(), tmp_path, cls=cls, max_steps=3, weight_decay=0.1, gradient_accumulation_steps=2)
            run.train()
            found.append([(row["loss"], row["grad_norm"], row["learning_rate"]) for row in logs(run)])
        assert found[0] == found[1]
    assert not any(name.startswith(("moe/", "lr/")) for row in run.state.log_history for name in row)


@pytest.mark.parametrize(
    ("build", "options", "message"),
    [
        (lambda: tiny(router_type="hash"), {"router_learning_rate": 1e-3}, "no parameter in the router"),
        (lambda: lora(tiny()), {"router_learning_rate": 1e-3}, "no parameter of the router is trained: all 3 are frozen"),
        (lambda: AutoModelForCausalLM.from_config(text_config("llama")), {"expert_learning_rate": 1.0}, "LlamaForCausalLM has"),
        (tiny, {"optim": "adafactor", "router_learning_rate": 1e-3, "optimizers": True}, "`optimizers` holds an optimizer"),
    ],
)
def test_a_rate_of_nothing_is_refused(build: Any, options: dict[str, Any], message: str, tmp_path: Path) -> None:
    model = build()
    if "optimizers" in options:
        options = {**options, "optimizers": (torch.optim.SGD(model.parameters(), lr=1.0), None)}
    with pytest.raises(ValueError, match=message):
        moe_trainer(model, tmp_path, **options).train()


# ---------------------------------------------------------------------- freezing


@pytest.mark.parametrize("freeze", [["router"], ["experts"], ["rest"], ["router", "rest"], ["experts", "rest"]], ids=str)
@pytest.mark.parametrize("kind", ["ours", "native", "adapters"])
def test_freezing(kind: str, freeze: list[str], tmp_path: Path) -> None:
    model = MODELS[kind]()
    before = snapshot(model)
    run = moe_trainer(
        model, tmp_path, freeze=freeze, weight_decay=0.1, activation_checkpointing=kind != "adapters", max_steps=3
    )
    run.train()
    assert changed_parts(model, before) == {"router", "experts", "rest"} - set(freeze)
    assert all(math.isfinite(row["loss"]) for row in logs(run))


def test_a_frozen_router_keeps_its_bias(tmp_path: Path) -> None:
    for freeze, moved in ((None, True), (["router"], False)):
        model = tiny(router_type="sigmoid")
        moe_trainer(model, tmp_path, freeze=freeze).train()
        assert any(layer.gate.e_score_correction_bias.any() for layer in model.moe_layers) == moved


@pytest.mark.parametrize(
    ("build", "freeze", "message"),
    [
        (tiny, ["router", "experts", "rest"], "leaves no parameter to train"),
        (lambda: tiny(router_type="hash"), ["experts", "rest"], "leaves no parameter to train"),
        (lambda: tiny(router_type="hash"), ["router"], "no parameter in the router"),
        (lambda: lora(tiny()), ["experts", "rest"], "leaves no parameter to train"),
        (lambda: AutoModelForCausalLM.from_config(text_config("llama")), ["experts"], "no parameter in the routed experts"),
    ],
)
def test_freezing_all_or_nothing_is_refused(build: Any, freeze: list[str], message: str, tmp_path: Path) -> None:
    model = build()
    trained = {name for name, parameter in model.named_parameters() if parameter.requires_grad}
    with pytest.raises(ValueError, match=message):
        moe_trainer(model, tmp_path, freeze=freeze)
    assert trained == {name for name, parameter in model.named_parameters() if parameter.requires_grad}


def test_arguments_are_checked(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"`freeze`='gate' is not known. Choose from 'rest', 'router', 'experts'"):
        MoETrainingArguments(str(tmp_path), freeze=["gate"])
    with pytest.raises(ValueError, match=r"`router_learning_rate`=-1 must not be negative"):
        MoETrainingArguments(str(tmp_path), router_learning_rate=-1)
    with pytest.raises(ValueError, match=r"`expert_learning_rate`=0.1, but `freeze` names 'experts'"):
        MoETrainingArguments(str(tmp_path), expert_learning_rate=0.1, freeze=["experts"])
    assert MoETrainingArguments(str(tmp_path), freeze="rest").freeze == ["rest"]


def test_model_init(tmp_path: Path) -> None:
    run = moe_trainer(None, tmp_path, model_init=lambda: tiny(router_type="sigmoid"), freeze=["experts"])
    run.train()
    assert {parts_of(run.model)[n] for n, p in run.model.named_parameters() if not p.requires_grad} == {"experts"}
    assert "moe/load_cv" in logs(run)[0]


def test_plain_training_arguments_do(tmp_path: Path) -> None:
    args = TrainingArguments(str(tmp_path), use_cpu=True, max_steps=1, logging_steps=1, report_to="none", save_strategy="no")
    run = MoETrainer(model=tiny(), args=args, train_dataset=ROWS, data_collator=collate)
    run.train()
    assert {"moe/load_cv", "lr/router"} <= logs(run)[0].keys()


# ---------------------------------------------------------------------- callbacks


def count(run: Trainer, kind: type) -> int:
    return sum(isinstance(callback, kind) for callback in run.callback_handler.callbacks)


def test_callbacks_are_there_once(tmp_path: Path) -> None:
    mine = ExpertLoadCallback()
    run = moe_trainer(tiny(router_type="sigmoid"), tmp_path, callbacks=[mine])
    assert (count(run, ExpertLoadCallback), count(run, LossFreeBalancingCallback)) == (1, 1)
    assert mine in run.callback_handler.callbacks
    dense = moe_trainer(AutoModelForCausalLM.from_config(text_config("llama")), tmp_path)
    assert (count(dense, ExpertLoadCallback), count(dense, LossFreeBalancingCallback)) == (0, 0)


@pytest.mark.parametrize("kind", ["ours", "native"])
def test_flops_are_of_active_parameters(kind: str, tmp_path: Path) -> None:
    model = MODELS[kind]()
    run = moe_trainer(model, tmp_path, max_steps=1, per_device_train_batch_size=16)
    run.train()
    total = model.num_parameters(exclude_embeddings=True)
    routed = sum(p.numel() for name, p in model.named_parameters() if parts_of(model)[name] == "experts")
    tokens = collate(ROWS)["input_ids"].numel()
    assert run.state.total_flos == pytest.approx(6 * tokens * (total - routed / 2))  # two of four experts


# ---------------------------------------------------------------------- evaluation


def token_weighted_loss(model: nn.Module) -> float:
    """Sequence by sequence, in fp64."""
    total = 0.0
    with torch.no_grad():
        for row in ROWS:
            ids = row["input_ids"].unsqueeze(0)
            logits = model.eval()(input_ids=ids).logits[0, :-1].double()
            total += F.cross_entropy(logits, ids[0, 1:], reduction="sum").item()
    return total / TOKENS


@pytest.mark.parametrize("kind", ["ours", "native", "adapters"])
@pytest.mark.parametrize("batch", [1, 3, 4, 16])
def test_eval_loss_is_of_all_tokens(kind: str, batch: int, tmp_path: Path) -> None:
    model = MODELS[kind]()
    if kind == "native":
        model.config.output_router_logits = True  # its loss would then have the router's in it
    metrics = moe_trainer(model, tmp_path, per_device_eval_batch_size=batch).evaluate()
    expected = token_weighted_loss(model)
    assert metrics["eval_loss"] == pytest.approx(expected, rel=1e-5)
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(expected), rel=1e-5)
    assert metrics["eval_tokens"] == TOKENS


def test_stock_eval_loss_is_not(tmp_path: Path) -> None:
    """What it is for: the mean over batches of means over tokens is another number."""
    metrics = moe_trainer(tiny(), tmp_path, cls=Trainer, per_device_eval_batch_size=1).evaluate()
    assert abs(metrics["eval_loss"] - token_weighted_loss(tiny())) > 1e-3


def test_eval_in_training_is_logged_and_chooses_the_best(tmp_path: Path) -> None:
    run = moe_trainer(
        tiny(), tmp_path, eval_strategy="steps", eval_steps=1, metric_for_best_model="perplexity", save_strategy="best",
        greater_is_better=False,
    )  # fmt: skip
    run.train()
    rows = [row for row in run.state.log_history if "eval_loss" in row]
    assert len(rows) == 2
    assert all(row["eval_perplexity"] == pytest.approx(math.exp(row["eval_loss"])) for row in rows)
    assert run.state.best_metric == min(row["eval_perplexity"] for row in rows)
    assert rows[-1]["eval_loss"] == pytest.approx(token_weighted_loss(run.model), rel=1e-5)


def test_a_loss_of_ones_own_stays(tmp_path: Path) -> None:
    def constant(outputs: Any, labels: Any, num_items_in_batch: Any = None) -> torch.Tensor:
        return outputs.logits.sum() * 0 + 7.0

    metrics = moe_trainer(tiny(), tmp_path, compute_loss_func=constant).evaluate()
    assert metrics["eval_loss"] == 7.0
    assert metrics["eval_perplexity"] == pytest.approx(math.exp(token_weighted_loss(tiny())), rel=1e-5)


def test_several_eval_sets(tmp_path: Path) -> None:
    run = moe_trainer(tiny(), tmp_path)
    metrics = run.evaluate({"a": ROWS[:3], "b": ROWS})
    assert metrics["eval_a_tokens"] == sum(len(row["input_ids"]) - 1 for row in ROWS[:3])
    assert metrics["eval_b_loss"] == pytest.approx(token_weighted_loss(tiny()), rel=1e-5)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float64])
def test_perplexity_metric(dtype: torch.dtype) -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(3, 7, 11, generator=generator).to(dtype)
    labels = torch.randint(0, 11, (3, 7), generator=generator)
    labels[1, 4:] = -100
    nll = [
        -logits[b, s].double().log_softmax(-1)[labels[b, s + 1]].item()
        for b in range(3) for s in range(6) if labels[b, s + 1] >= 0
    ]  # fmt: skip
    for cut in (1, 2, 3):
        metric = Perplexity()
        for part in range(0, 3, cut):
            metric.add_batch(predictions=logits[part : part + cut], references=labels[part : part + cut])
        found = metric.compute()
        assert found["tokens"] == len(nll)
        assert found["loss"] == pytest.approx(sum(nll) / len(nll), rel=1e-10 if dtype == torch.float64 else 1e-6)
    shifted = Perplexity()
    shifted.add_batch(predictions=logits[:, :-1], references=labels[:, 1:], shifted=True)
    assert shifted.compute() == found
    assert Perplexity().compute() == {}


# ---------------------------------------------------------------------- two ranks


def worker(folder: str) -> None:
    found = {}
    for batch in (3, 5):  # 16 sequences: the last batch is made whole with repeated ones
        run = moe_trainer(tiny(), Path(folder), per_device_eval_batch_size=batch, ddp_backend="gloo")
        found[f"eval_{batch}"] = run.evaluate()
    run = moe_trainer(
        tiny(router_type="noisy_top_k"), Path(folder), per_device_train_batch_size=4, ddp_backend="gloo",
        router_learning_rate=1e-3, freeze=["experts"],
    )  # fmt: skip
    run.train()
    found["logs"] = logs(run)
    for first in (False, True):  # an evaluation must not keep the model from being trained together
        for name, model in (("ddp", tiny()), ("ep", expert_parallel(tiny(), 2, Path(folder, "model")))):
            options = {"per_device_train_batch_size": 4, "ddp_backend": "gloo", "router_learning_rate": 1e-3}
            run = moe_trainer(model, Path(folder, name), **options)
            if first:
                run.evaluate()
            run.train()
            found[f"{name}_{first}"] = [(row["loss"], row["grad_norm"]) for row in logs(run)]
    for resume in (False, True):  # from a checkpoint between two logs
        run = moe_trainer(
            tiny(router_type="sigmoid"), Path(folder, "resumed"), per_device_train_batch_size=2, ddp_backend="gloo",
            max_steps=6, save_strategy="steps", save_steps=4, logging_steps=3,
        )  # fmt: skip
        run.train(resume_from_checkpoint=str(Path(folder, "resumed", "checkpoint-4")) if resume else None)
        found[f"resumed_{resume}"] = [row["loss"] for row in logs(run)]
        found[f"load_{resume}"] = read_expert_load(Path(folder, "resumed", "expert_load.safetensors")).executed.tolist()
    Path(folder, f"rank{run.args.process_index}.json").write_text(json.dumps(found))


def test_two_ranks(tmp_path: Path) -> None:
    launch(2, __file__, tmp_path)
    expected = token_weighted_loss(tiny())
    alone = moe_trainer(tiny(), tmp_path, router_learning_rate=1e-3)
    alone.train()
    together = [(row["loss"], row["grad_norm"]) for row in logs(alone)]
    for rank in (0, 1):
        found = json.loads((tmp_path / f"rank{rank}.json").read_text())
        for batch in (3, 5):
            assert found[f"eval_{batch}"]["eval_loss"] == pytest.approx(expected, rel=1e-5)
            assert found[f"eval_{batch}"]["eval_tokens"] == TOKENS
        assert [row["lr/router"] for row in found["logs"]] == pytest.approx([1e-3, 5e-4])
        assert "lr/experts" not in found["logs"][0]
        for name in ("ddp", "ep"):
            assert found[f"{name}_True"] == found[f"{name}_False"]
            for got, wanted in zip(found[f"{name}_True"], together, strict=True):
                assert got == pytest.approx(wanted, rel=1e-4)
        assert found["resumed_True"] == pytest.approx(found["resumed_False"], rel=1e-6)
        assert found["load_True"] == found["load_False"]


# ---------------------------------------------------------------------- checkpoints


def test_whole_checkpoints(tmp_path: Path) -> None:
    run = moe_trainer(tiny(), tmp_path, save_strategy="steps", save_steps=1)
    run.train()
    first, second = tmp_path / "checkpoint-1", tmp_path / "checkpoint-2"
    assert last_whole_checkpoint(tmp_path) == second
    assert last_whole_checkpoint(tmp_path / "nothing") is None
    for name in ("trainer_state.json", "optimizer.pt", "rng_state.pth", "scheduler.pt", "model.safetensors"):
        path = second / name
        content = path.read_bytes()
        for cut in (0, len(content) // 2, len(content) - 3):
            path.write_bytes(content[:cut])
            assert what_is_missing(second) == name, cut
        assert last_whole_checkpoint(tmp_path) == first
        with pytest.raises(ValueError, match=rf"{name} is missing or cut short"):
            moe_trainer(tiny(), tmp_path).train(resume_from_checkpoint=str(second))
        path.write_bytes(content)
    assert what_is_missing(second) is None
    (second / "trainer_state.json").unlink()
    (first / "trainer_state.json").write_text("[]")
    with pytest.raises(ValueError, match="there is no whole checkpoint"):
        moe_trainer(tiny(), tmp_path).train(resume_from_checkpoint=True)


def test_sharded_checkpoint(tmp_path: Path) -> None:
    tiny().save_pretrained(tmp_path / "checkpoint-7", max_shard_size="40KB")
    (tmp_path / "checkpoint-7" / "trainer_state.json").write_text('{"global_step": 7}')
    assert what_is_missing(tmp_path / "checkpoint-7") is None
    shard = sorted((tmp_path / "checkpoint-7").glob("model-*.safetensors"))[1]
    shard.unlink()
    assert what_is_missing(tmp_path / "checkpoint-7") == shard.name


@pytest.mark.parametrize(("name", "shards"), [("mixtral", True), ("deepseek_v3", False), ("granitemoe", False)])
def test_native_checkpoints_are_read_back(name: str, shards: bool, tmp_path: Path) -> None:
    """Also by `load_best_model_at_end`; the stock `Trainer` leaves out the experts."""
    run = moe_trainer(native(name), tmp_path, save_strategy="steps", save_steps=1, learning_rate=0.1)
    run.train()
    folder = tmp_path / "checkpoint-1"
    expected = AutoModelForCausalLM.from_pretrained(folder).state_dict()
    if shards:
        (folder / "model.safetensors").unlink()
        saved = native(name)
        saved.load_state_dict(expected)
        saved.save_pretrained(folder, max_shard_size="50KB")
        assert len(list(folder.glob("model-*.safetensors"))) > 1
    for read in ("_load_from_checkpoint", "_load_best_model"):
        other = moe_trainer(native(name), tmp_path / "other")
        other.state.best_model_checkpoint = str(folder)
        other._load_from_checkpoint(str(folder)) if read == "_load_from_checkpoint" else other._load_best_model()
        found = other.model.state_dict()
        assert all(torch.equal(found[key], expected[key]) for key in expected), read
    stock = moe_trainer(native(name), tmp_path / "other", cls=Trainer)
    stock._load_from_checkpoint(str(folder))
    assert not all(torch.equal(stock.model.state_dict()[key], expected[key]) for key in expected)


def test_the_stock_trainer_reads_its_checkpoints(tmp_path: Path) -> None:
    moe_trainer(tiny(), tmp_path, save_strategy="steps", save_steps=1).train()
    stock = moe_trainer(tiny(), tmp_path, cls=Trainer, max_steps=3, callbacks=[ExpertLoadCallback()])
    stock.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert stock.state.global_step == 3
    restored = moe_trainer(tiny(), tmp_path, max_steps=3, restore_callback_states_from_checkpoint=True)
    restored.train(resume_from_checkpoint=str(tmp_path / "checkpoint-2"))
    assert restored.state.global_step == 3
    assert isinstance(restored.model, MoEForCausalLM)


if __name__ == "__main__":
    worker(sys.argv[1])
