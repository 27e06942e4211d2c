"""`RouterFreezeCallback`, `CapacityScheduleCallback`, `NoiseScheduleCallback`: what holds in each step, and after a resume."""

from __future__ import annotations

import gc
import json
import os
import sys
from collections.abc import Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from hf_moe.training import CapacityScheduleCallback, LossFreeBalancingCallback, NoiseScheduleCallback, RouterFreezeCallback
from hf_moe.training.schedules import linear_schedule
from ranks import launch
from tiny import tiny, token_ids
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from trainer_cut import NUM_SEQUENCES, collate, sequences
from transformers import MixtralConfig, MixtralForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_moe import MoEForCausalLM, MoELayer, record_routing
from hf_moe.losses import smooth_load
from hf_moe.routers import NOISE_EPSILON, noisy_top_k

LAYERS = 3


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()  # `Trainer` collects garbage at the beginning of every training
    yield
    gc.unfreeze()
    torch.set_num_threads(before)


def build(**fields: Any) -> MoEForCausalLM:
    return tiny("llama", **fields).train()


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=4, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.2,
        )
    )  # fmt: skip


def trainer(model: nn.Module, folder: Path, callbacks: list[TrainerCallback], **options: Any) -> Trainer:
    """Steps of one epoch each: every step sees all sequences."""
    accumulation = options.get("gradient_accumulation_steps", 1)
    defaults = {
        "max_steps": 4, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "report_to": "none",
        "per_device_train_batch_size": NUM_SEQUENCES // accumulation, "learning_rate": 1e-2,
    }  # fmt: skip
    if "WORLD_SIZE" in os.environ:
        defaults["ddp_backend"] = "gloo"
    args = TrainingArguments(output_dir=str(folder), **{**defaults, **options})
    args.per_device_train_batch_size //= args.world_size
    if args.fsdp:  # on CPUs Accelerate takes no notice of FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return Trainer(model, args, train_dataset=sequences(), data_collator=collate, callbacks=callbacks)


def weights(model: nn.Module) -> dict[str, Tensor]:
    return {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}


class Each(TrainerCallback):
    """Keeps what a function says of the model at some event of every step."""

    def __init__(self, event: str, look: Any) -> None:
        self.seen: list[Any] = []

        def see(args: Any, state: Any, control: Any, model: Any = None, optimizer: Any = None, **kwargs: Any) -> None:
            self.seen.append(look(model) if optimizer is None or look.__code__.co_argcount == 1 else look(model, optimizer))

        setattr(self, event, see)


def test_line() -> None:
    assert [linear_schedule(1.0, 2.0, 4, step) for step in range(7)] == [1.0, 1.25, 1.5, 1.75, 2.0, 2.0, 2.0]
    assert linear_schedule(0.1, 0.7, 3, 3) == 0.7  # exactly
    assert linear_schedule(2, 2, 1, 0) == 2.0


# ---------------------------------------------------------------------- frozen routers


@pytest.mark.parametrize("optim", ["adamw_torch", "sgd", "adafactor"])
@pytest.mark.parametrize("router", ["top_k", "noisy_top_k", "hierarchical", "native"])
def test_nothing_moves_a_frozen_router(tmp_path: Path, router: str, optim: str) -> None:
    """Neither gradient nor weight decay nor momentum; everything else trains; then the routers do."""
    fields = {"n_group": 2} if router == "hierarchical" else {}
    model: Any = mixtral() if router == "native" else build(router_type=router, **fields)
    start = weights(model)
    steps = Each("on_step_end", weights)
    arguments = {"optim_args": "momentum=0.9"} if optim == "sgd" else {}
    callbacks = [RouterFreezeCallback(2), steps]
    trainer(model, tmp_path, callbacks, optim=optim, weight_decay=0.5, **arguments).train()
    routers = {name for name in start if ".gate." in name}
    assert len(routers) == LAYERS * {"noisy_top_k": 2, "hierarchical": 4}.get(router, 1)
    for name in start:
        moved = [not torch.equal(step[name], start[name]) for step in steps.seen]
        assert moved == ([False, False, True, True] if name in routers else [True] * 4), name


def test_after_the_freeze_training_is_ordinary(tmp_path: Path) -> None:
    """The first free step is AdamW's first step for the routers, with its bias correction."""
    model = build()

    def gates(model: nn.Module) -> dict[str, Tensor]:
        return {name: p.detach().clone() for name, p in model.named_parameters() if ".gate." in name}

    def gradients(model: nn.Module) -> dict[str, Tensor]:
        return {name: p.grad.clone() for name, p in model.named_parameters() if ".gate." in name and p.grad is not None}

    before, grads = Each("on_step_begin", gates), Each("on_pre_optimizer_step", gradients)
    after = Each("on_step_end", gates)
    run = trainer(model, tmp_path, [RouterFreezeCallback(2), before, grads, after], lr_scheduler_type="constant")
    run.train()
    assert [len(seen) for seen in grads.seen] == [0, 0, LAYERS, LAYERS]
    for name, gradient in grads.seen[2].items():
        expected = before.seen[2][name] - 1e-2 * gradient / (gradient.abs() + 1e-8)  # step 1: m / sqrt(v) = g / |g|
        torch.testing.assert_close(after.seen[2][name], expected, rtol=1e-5, atol=1e-6)
    for name, p in model.named_parameters():
        assert run.optimizer.state[p]["step"] == (2 if ".gate." in name else 4)


@pytest.mark.parametrize("accumulation", [1, 2])
@pytest.mark.parametrize("native", [False, True])
def test_frozen_gradients_do_not_count_in_the_norm(tmp_path: Path, native: bool, accumulation: int) -> None:
    """The norm that is logged and clipped by is that of the other parameters, as with `requires_grad` off."""
    logged = []
    for how in ("callback", "requires_grad"):
        model: Any = mixtral() if native else build(router_aux_loss_coef=1.0)
        if how == "requires_grad":
            for name, parameter in model.named_parameters():
                parameter.requires_grad_(".gate." not in name)
        callbacks = [RouterFreezeCallback(9)] if how == "callback" else []
        run = trainer(model, tmp_path, callbacks, gradient_accumulation_steps=accumulation, max_grad_norm=0.1)
        run.train()
        logged.append([(row["loss"], row["grad_norm"]) for row in run.state.log_history if "loss" in row])
    assert logged[0] == [(pytest.approx(loss, rel=1e-6), pytest.approx(norm, rel=1e-5)) for loss, norm in logged[1]]
    free = trainer(mixtral() if native else build(router_aux_loss_coef=1.0), tmp_path, [], max_steps=1)
    free.train()
    assert free.state.log_history[0]["grad_norm"] > 1.001 * logged[0][0][1]


def test_balancing_goes_on(tmp_path: Path) -> None:
    """The bias is no parameter."""
    model = build(router_type="sigmoid")
    start = weights(model)
    trainer(model, tmp_path, [RouterFreezeCallback(9), LossFreeBalancingCallback()]).train()
    for layer in model.moe_layers:
        assert layer.gate.e_score_correction_bias.abs().max() > 0
    for name, value in weights(model).items():
        if name.endswith("gate.weight"):
            assert torch.equal(value, start[name])


def test_router_that_peft_trains_a_copy_of(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    fields = {"router_type": "noisy_top_k"}
    model = get_peft_model(build(**fields), LoraConfig(r=2, target_modules=["q_proj"], modules_to_save=["gate"]))
    start, steps = weights(model), Each("on_step_end", weights)
    scales = Each("on_step_begin", lambda model: {m.noise_scale for m in model.modules() if hasattr(m, "noise_weight")})
    trainer(model, tmp_path, [RouterFreezeCallback(2), NoiseScheduleCallback(1.0, 0.0, 4), steps, scales]).train()
    copies = [name for name in start if ".gate.modules_to_save." in name]
    assert len(copies) == 2 * LAYERS
    for name in copies:
        assert [torch.equal(step[name], start[name]) for step in steps.seen] == [True, True, False, False], name
    assert scales.seen == [{1.0}, {0.75}, {0.5}, {0.25}]


@pytest.mark.parametrize("saved_at", [1, 2, 3])
def test_freeze_resumes_exactly(tmp_path: Path, saved_at: int) -> None:
    options = {"save_strategy": "steps", "save_steps": 1, "lr_scheduler_type": "constant"}
    model = build()
    trainer(model, tmp_path, [RouterFreezeCallback(2)], **options).train()
    checkpoint = tmp_path / f"checkpoint-{saved_at}"
    resumed = MoEForCausalLM.from_pretrained(checkpoint)
    trainer(resumed, tmp_path, [RouterFreezeCallback(2)], **options).train(resume_from_checkpoint=str(checkpoint))
    for name, tensor in weights(model).items():
        assert torch.equal(weights(resumed)[name], tensor), name


def test_the_same_callback_can_freeze_again(tmp_path: Path) -> None:
    callback, model = RouterFreezeCallback(2), build()
    trainer(model, tmp_path, [callback], max_steps=3).train()
    start = weights(model)
    trainer(model, tmp_path, [callback], max_steps=2).train()
    end = weights(model)
    assert all(torch.equal(end[name], start[name]) == (".gate." in name) for name in start)
    model(input_ids=token_ids(), labels=token_ids()).loss.backward()  # and leaves no hook behind
    assert all(layer.gate.weight.grad.abs().max() > 0 for layer in model.moe_layers)


def test_freeze_refuses(tmp_path: Path) -> None:
    for value in (-1, 2.5):
        with pytest.raises(ValueError, match=f"`until_step`={value} must be an int of at least 0"):
            RouterFreezeCallback(value)
    with pytest.raises(ValueError, match="No router has trained parameters"):
        trainer(build(router_type="hash"), tmp_path, [RouterFreezeCallback(1)]).train()
    callback, args = RouterFreezeCallback(1), TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    flat = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(flat)
    flat._modules["_fsdp_wrapped_module"] = build()
    with pytest.raises(ValueError, match="RouterFreezeCallback does not work under FSDP1"):
        callback.on_train_begin(args, SimpleNamespace(global_step=0), None, model=flat)
    args.deepspeed_plugin = object()
    with pytest.raises(ValueError, match="RouterFreezeCallback does not work under DeepSpeed"):
        callback.on_train_begin(args, SimpleNamespace(global_step=0), None, model=build())


# ---------------------------------------------------------------------- capacity


def factors(model: MoEForCausalLM) -> Any:
    """The factor in force, which is the same everywhere."""
    values = {layer.capacity_factor for layer in model.moe_layers} | {model.config.capacity_factor}
    assert len(values) == 1
    return values.pop()


@pytest.mark.parametrize(
    ("configured", "start", "end", "expected"),
    [
        (2.0, 2.0, 1.0, [2.0, 1.5, 1.0, 1.0]),
        (None, 1.0, 0.5, [1.0, 0.75, 0.5, 0.5]),
        (None, None, 1.0, [2.0, 1.5, 1.0, 1.0]),  # E / K = 2
        (1.0, 1.0, None, [1.0, 1.5, None, None]),
        (None, None, None, [None] * 4),
        (3.0, None, None, [None] * 4),
    ],
)
def test_capacity_of_each_step(tmp_path: Path, configured: Any, start: Any, end: Any, expected: list) -> None:
    model = build(capacity_factor=configured)
    seen = Each("on_step_begin", factors)
    callbacks = [CapacityScheduleCallback(start, end, steps=2), seen]
    trainer(model, tmp_path, callbacks, save_strategy="steps", save_steps=1).train()
    assert seen.seen == expected
    saved = [json.loads((tmp_path / f"checkpoint-{step}" / "config.json").read_text()) for step in (1, 2, 3, 4)]
    assert [config.get("capacity_factor") for config in saved] == expected
    assert model.config.capacity_factor == end


@pytest.mark.parametrize("implementation", ["eager", "batched_mm", "grouped_mm"])
def test_switched_capacity_is_that_of_construction(implementation: str) -> None:
    """A layer made dropless and limited later computes, forward and backward, as one made with the limit; and back."""
    torch.manual_seed(0)
    fields = {"num_experts": 4, "num_experts_per_tok": 2, "intermediate_size": 48}
    later, made, dropless = (MoELayer(32, **fields, capacity_factor=factor) for factor in (None, 0.5, None))
    for layer in (later, made, dropless):
        layer.load_state_dict(later.state_dict())
        layer.config._experts_implementation = implementation
    x = torch.randn(2, 16, 32)

    def run(layer: MoELayer) -> list[Tensor]:
        layer.zero_grad()
        with record_routing() as record:
            y = layer(x)
        y.square().sum().backward()
        counts = record.layers[0].sums["executed"]
        return [y.detach(), counts.detach(), *(p.grad.clone() for p in layer.parameters())]

    later.set_capacity_factor(0.5)
    limited = run(later)
    for got, expected in zip(limited, run(made), strict=True):
        assert torch.equal(got, expected)
    assert limited[1].sum() < 2 * 32
    later.set_capacity_factor(None)
    for got, expected in zip(run(later), run(dropless), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-6, atol=1e-7)
    later.set_capacity_factor(0.5)
    later.eval()  # the factor of evaluation is another
    with record_routing() as record:
        later(x)
    assert record.layers[0].sums["executed"].sum() == 2 * 32


def test_capacity_drops_what_it_should(tmp_path: Path) -> None:
    """Executed assignments of each step are those of a model that is made with that capacity."""
    counts: list[float] = []
    model = build()
    model.add_routing_listener(lambda record: counts.append(float(sum(x.sums["executed"].sum() for x in record.layers))))
    trainer(model, tmp_path, [CapacityScheduleCallback(None, 0.4, steps=3)], learning_rate=0.0).train()
    values = [2.0 + (0.4 - 2.0) * step / 3 for step in range(3)] + [0.4]
    for factor, count in zip(values, counts, strict=True):
        fresh = build(capacity_factor=factor)
        seen: list[float] = []
        fresh.add_routing_listener(lambda record, seen=seen: seen.append(sum(x.sums["executed"].sum() for x in record.layers)))
        batch = collate(sequences())
        fresh(**{name: batch[name] for name in ("input_ids", "attention_mask", "labels")})
        assert count == seen[0]
    assert counts[0] > counts[1] > counts[2] > counts[3]


def test_capacity_of_expert_choice(tmp_path: Path) -> None:
    """There it is the average number of experts per token, and K where it is `None`."""
    model = build(router_type="expert_choice", allow_non_causal=True)
    seen = Each("on_step_begin", lambda model: (model.moe_layers[0].gate.factor, model.config.capacity_factor))
    trainer(model, tmp_path, [CapacityScheduleCallback(1.0, None, steps=2), seen]).train()
    assert seen.seen == [(1.0, 1.0), (1.5, 1.5), (2, None), (2, None)]


def test_capacity_resumes_exactly(tmp_path: Path) -> None:
    def run(folder: Path, checkpoint: str | None) -> tuple[dict[str, Tensor], list]:
        model = MoEForCausalLM.from_pretrained(checkpoint) if checkpoint else build()
        seen = Each("on_step_begin", factors)
        callbacks = [CapacityScheduleCallback(None, 0.5, steps=3), seen]
        trainer(model, folder, callbacks, save_strategy="steps", save_steps=2).train(resume_from_checkpoint=checkpoint)
        return weights(model), seen.seen

    whole, values = run(tmp_path, None)
    resumed, rest = run(tmp_path / "resumed", str(tmp_path / "checkpoint-2"))
    assert rest == values[2:]
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_capacity_refuses(tmp_path: Path) -> None:
    for arguments, message in (
        ((0, 1.0, 5), "`start`=0 must be a positive number"),
        ((1.0, -2.0, 5), "`end`=-2.0 must be a positive number"),
        ((1.0, 2.0, 0), "`steps`=0 must be an int of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            CapacityScheduleCallback(*arguments)
    callback = CapacityScheduleCallback(1.0, 2.0, 5)
    with pytest.raises(ValueError, match="`router_type`='strictly_balanced' has no capacity"):
        trainer(build(router_type="strictly_balanced"), tmp_path, [callback]).train()
    with pytest.raises(ValueError, match=r"`model` of class MixtralForCausalLM has none.*hf-moe import"):
        trainer(mixtral(), tmp_path, [callback]).train()
    layer = MoELayer(16, num_experts=4, router_type="strictly_balanced")
    with pytest.raises(ValueError, match="has no capacity"):
        layer.set_capacity_factor(1.0)
    with pytest.raises(ValueError, match="`capacity_factor`=0 must be a positive number"):
        MoELayer(16, num_experts=4).set_capacity_factor(0)


# ---------------------------------------------------------------------- noise


@pytest.mark.parametrize("scale", [1.0, 0.5, 1e-4, 0.0])
def test_scaled_noise_against_the_formula(scale: float) -> None:
    """H = clean + scale · sd · z; the smooth load under that noise, whose sd is at least the paper's smallest."""
    generator = torch.Generator().manual_seed(0)
    clean, raw, z = (torch.randn(50, 6, generator=generator, dtype=torch.float64) for _ in range(3))
    clean.requires_grad_()
    raw.requires_grad_()
    ids, gates, load = noisy_top_k(clean, raw, z, 2, scale)
    sd = raw.exp().log1p() + 1e-2
    noisy = clean + scale * sd * z
    top, expected_ids = noisy.topk(2, dim=-1)
    assert torch.equal(ids, expected_ids)
    torch.testing.assert_close(gates, top.softmax(-1), rtol=0, atol=1e-10)
    torch.testing.assert_close(load, smooth_load(clean, noisy, (scale * sd).clamp(min=NOISE_EPSILON), 2), rtol=0, atol=1e-10)
    load.square().sum().backward()
    assert clean.grad.isfinite().all()
    assert raw.grad.isfinite().all()


@pytest.mark.parametrize("router", ["noisy_top_k", "hierarchical", "top_k"])
def test_noise_of_each_step(tmp_path: Path, router: str) -> None:
    """Of the gating noise and of jitter alike; nothing stays when training has ended, and nothing is saved."""
    fields = {"hierarchical": {"n_group": 2}, "top_k": {"router_jitter_noise": 0.1}}.get(router, {})
    model = build(router_type=router, **fields)
    seen = Each("on_step_begin", lambda model: {layer.gate.noise_scale for layer in model.moe_layers})
    trainer(model, tmp_path, [NoiseScheduleCallback(1.0, 0.0, steps=2), seen], save_strategy="steps", save_steps=2).train()
    assert seen.seen == [{1.0}, {0.5}, {0.0}, {0.0}]
    assert {layer.gate.noise_scale for layer in model.moe_layers} == {1.0}
    assert "noise_scale" not in (tmp_path / "checkpoint-2" / "config.json").read_text()
    assert model.config.router_jitter_noise == fields.get("router_jitter_noise", 0.0)


@pytest.mark.parametrize("router", ["noisy_top_k", "hierarchical", "sigmoid"])
def test_noise_of_scale_zero_is_none(router: str) -> None:
    """The layer trains as it evaluates; with another scale it does not."""
    fields = {"hierarchical": {"n_group": 2, "topk_group": 2}}.get(router, {})
    layer = tiny("llama", router_type=router, router_jitter_noise=0.3, **fields).moe_layers[0]
    x = torch.randn(2, 40, 32, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        expected = layer.eval()(x)
        layer.train().gate.noise_scale = 0.0
        assert torch.equal(layer(x), expected)
        layer.gate.noise_scale = 0.5
        assert not torch.equal(layer(x), expected)


@pytest.mark.parametrize("scale", [0.0, 0.5, 1.0])
def test_jitter_is_scaled(scale: float) -> None:
    gate = tiny("llama", router_jitter_noise=0.2).moe_layers[0].gate.train()
    gate.noise_scale = scale
    x = torch.ones(2000, 32)
    jittered = gate._jittered(x)
    assert (jittered - 1).abs().max() <= 0.2 * scale + 1e-6
    assert (jittered - 1).abs().max() >= 0.19 * scale


def test_losses_stay_finite_without_noise(tmp_path: Path) -> None:
    """The load loss divides by the noise's standard deviation."""
    model = build(router_type="noisy_top_k", router_load_loss_coef=0.1, router_importance_loss_coef=0.1)
    run = trainer(model, tmp_path, [NoiseScheduleCallback(0.1, 0.0, steps=1)])
    run.train()
    assert all(torch.isfinite(tensor).all() for tensor in weights(model).values())
    assert all(row["grad_norm"] < 1e4 for row in run.state.log_history if "grad_norm" in row)


def test_noise_resumes_exactly(tmp_path: Path) -> None:
    def run(folder: Path, checkpoint: str | None) -> dict[str, Tensor]:
        model = MoEForCausalLM.from_pretrained(checkpoint) if checkpoint else build(router_type="noisy_top_k")
        callbacks = [NoiseScheduleCallback(1.0, 0.2, steps=3)]
        trainer(model, folder, callbacks, save_strategy="steps", save_steps=2).train(resume_from_checkpoint=checkpoint)
        return weights(model)

    whole = run(tmp_path, None)
    resumed = run(tmp_path / "resumed", str(tmp_path / "checkpoint-2"))
    assert all(torch.equal(resumed[name], tensor) for name, tensor in whole.items())


def test_noise_refuses(tmp_path: Path) -> None:
    for arguments, message in (
        ((-1, 0, 5), "`start`=-1 must be a number of at least 0"),
        ((1, float("inf"), 5), "`end`=inf must be a number of at least 0"),
        ((1, 0, 1.5), "`steps`=1.5 must be an int of at least 1"),
    ):
        with pytest.raises(ValueError, match=message):
            NoiseScheduleCallback(*arguments)
    with pytest.raises(ValueError, match="`router_type`='top_k' draws no noise that could be scaled"):
        trainer(build(), tmp_path, [NoiseScheduleCallback(1, 0, 5)]).train()
    with pytest.raises(ValueError, match="`router_type`='hash' draws no noise"):
        trainer(build(router_type="hash"), tmp_path, [NoiseScheduleCallback(1, 0, 5)]).train()
    with pytest.raises(ValueError, match=r"`router_jitter_noise`=0.3 times 4.0 must stay under 1"):
        trainer(build(router_jitter_noise=0.3), tmp_path, [NoiseScheduleCallback(4, 0, 5)]).train()


# ---------------------------------------------------------------------- several ranks


def whole(model: nn.Module) -> dict[str, Tensor]:
    named = ((name, p.full_tensor() if hasattr(p, "full_tensor") else p) for name, p in model.named_parameters())
    return {name.removeprefix("module."): tensor.detach().clone() for name, tensor in named}


def worker(folder: str) -> None:
    """Routers frozen for two of four steps: under DDP and FSDP2, the latter also resumed from the middle of the freeze."""
    results = {}
    for mode, kind in (("ddp", None), ("fsdp2", "FULL_STATE_DICT"), ("fsdp2", "SHARDED_STATE_DICT")):
        options: dict[str, Any] = {"lr_scheduler_type": "constant", "max_grad_norm": 0.1, "weight_decay": 0.1}
        if kind:
            wrap = {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"], "state_dict_type": kind}
            options |= {"fsdp": True, "fsdp_config": wrap, "save_strategy": "steps", "save_steps": 1}
        for checkpoint in (None, "checkpoint-1") if kind else (None,):
            output = Path(folder, f"{mode}-{kind}")
            steps = Each("on_step_end", whole)
            model = build(router_aux_loss_coef=1.0)
            start = whole(model)
            run = trainer(model, output, [RouterFreezeCallback(2), steps], **options)
            run.train(resume_from_checkpoint=str(output / checkpoint) if checkpoint else None)
            assert all(isinstance(parameter, DTensor) == (mode == "fsdp2") for parameter in run.model.parameters())
            norms = [row["grad_norm"] for row in run.state.log_history if "grad_norm" in row]
            results[f"{mode} {kind} {checkpoint}"] = {"start": start, "steps": steps.seen, "norms": norms}
    torch.save(results, Path(folder, f"rank{os.environ['RANK']}.pt"))


@pytest.fixture(scope="module")
def ranks(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    launch(2, __file__, folder)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(2)]


def test_freeze_on_ranks(ranks: list[dict[str, Any]], tmp_path: Path) -> None:
    """Nothing moves a frozen router, its gradient is not in the norm, and all ranks and wrappers go the same way."""
    alone = Each("on_step_end", whole)
    options = {"lr_scheduler_type": "constant", "max_grad_norm": 0.1, "weight_decay": 0.1}
    run = trainer(build(router_aux_loss_coef=1.0), tmp_path, [RouterFreezeCallback(2), alone], **options)
    run.train()
    norms = [row["grad_norm"] for row in run.state.log_history if "grad_norm" in row]
    for name, result in ranks[0].items():
        steps, resumed = result["steps"], name.endswith("checkpoint-1")
        assert len(steps) == (3 if resumed else 4), name
        for index, (got, expected) in enumerate(zip(steps, alone.seen[-len(steps) :], strict=True)):
            for key, tensor in expected.items():
                assert torch.equal(ranks[1][name]["steps"][index][key], got[key]), (name, index, key)
                difference = (got[key] - tensor).norm() / tensor.norm()
                assert difference < 2e-2, (name, index, key, difference)
                if ".gate." in key:
                    frozen = index < len(steps) - 2
                    assert torch.equal(got[key], result["start"][key]) == frozen, (name, index, key)
        assert result["norms"][-4:] == pytest.approx(norms, rel=1e-3), name


@pytest.mark.parametrize("kind", ["FULL_STATE_DICT", "SHARDED_STATE_DICT"])
def test_frozen_fsdp2_resumes_exactly(ranks: list[dict[str, Any]], kind: str) -> None:
    """From a checkpoint whose optimizer had not stepped the routers."""
    straight = ranks[0][f"fsdp2 {kind} None"]["steps"][1:]
    resumed = ranks[0][f"fsdp2 {kind} checkpoint-1"]["steps"]
    for index, (got, expected) in enumerate(zip(resumed, straight, strict=True)):
        for key, tensor in expected.items():
            assert torch.equal(got[key], tensor), (index, key)


if __name__ == "__main__":
    worker(sys.argv[1])
