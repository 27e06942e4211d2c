"""`DeadExpertCallback`: what counts as dead, reports, re-initialisation with the optimizer's state, exploration, resuming."""

from __future__ import annotations

import gc
import json
import logging
import os
import random
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from accelerate.state import PartialState
from accelerate.utils import DistributedType
from hf_moe.training import DeadExpertCallback
from hf_moe.training.dead_experts import count_streaks, move_bonuses
from hf_moe.training.expert_rows import read_row, write_row
from hf_moe.training.watching import watch_routing
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import launch
from tiny import tiny, token_ids
from torch import Tensor, nn
from torch.distributed.fsdp import FullyShardedDataParallel
from torch.distributed.tensor import DTensor
from trainer_cut import NUM_SEQUENCES, collate, sequences
from transformers import (
    AutoModelForCausalLM,
    MixtralConfig,
    MixtralForCausalLM,
    Trainer,
    TrainerCallback,
    TrainingArguments,
)
from transformers.distributed import DistributedConfig

from hf_moe import MoEForCausalLM
from hf_moe.routing import Routing

EXPERTS, LAYERS = 4, 3
ROUTERS: dict[str, dict[str, Any]] = {
    "top_k": {},
    "switch": {"num_experts_per_tok": 1},
    "noisy_top_k": {},
    "gshard": {},
    "sigmoid": {},
    "hierarchical": {"n_group": 2, "topk_group": 2},  # one expert in each group
}


@pytest.fixture(autouse=True, scope="module")
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    gc.freeze()  # `Trainer` collects garbage at the beginning of every training
    yield
    gc.unfreeze()
    torch.set_num_threads(before)


def build(**fields: Any) -> MoEForCausalLM:
    text = {"resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}
    return tiny("gpt2", text=text, **{"num_experts": EXPERTS, **fields}).train()


def starve(model: MoEForCausalLM, *experts: int, by: float = 12.0, group: int | None = None) -> MoEForCausalLM:
    """Give all tokens a common direction, and the router's rows of these experts (or of a group) the opposite one."""
    for layer, block in zip(model.moe_layers, model.language_model.transformer.h, strict=True):
        with torch.no_grad():
            block.ln_2.bias[0], block.ln_2.weight[0] = 4.0, 0.0
            for parameter in layer.gate.parameters():  # nothing else sees the direction
                parameter[:, 0] = 0.0
            layer.gate.weight[list(experts), 0] = -by / 4
            if group is not None:
                layer.gate.group_weight[group, 0] = -by / 4
    return model


def trainer(model: nn.Module, folder: Path, callbacks: list[TrainerCallback], **options: Any) -> Trainer:
    """Steps of one epoch each: every step sees all sequences."""
    accumulation = options.get("gradient_accumulation_steps", 1)
    defaults = {
        "max_steps": 4, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True, "report_to": "none",
        "per_device_train_batch_size": NUM_SEQUENCES // accumulation, "learning_rate": 1e-3,
    }  # fmt: skip
    if "WORLD_SIZE" in os.environ:
        defaults["ddp_backend"] = "gloo"
    args = TrainingArguments(output_dir=str(folder), **{**defaults, **options})
    args.per_device_train_batch_size //= args.world_size
    if args.fsdp:  # on CPUs Accelerate takes no notice of FSDP
        PartialState._shared_state["distributed_type"] = DistributedType.MULTI_GPU
    return Trainer(model, args, train_dataset=sequences(), data_collator=collate, callbacks=callbacks)


def warnings_of(caplog: pytest.LogCaptureFixture) -> list[str]:
    return [record.getMessage() for record in caplog.records if record.name == "hf_moe.training.dead_experts"]


class Loads(TrainerCallback):
    """Executed assignments per layer and expert of every optimizer step."""

    def __init__(self) -> None:
        self.steps: list[list[list[float]]] = []
        self._now: list[list[Tensor]] = []

    def on_train_begin(self, args, state, control, model=None, **kwargs):
        self._watch = watch_routing(model, self._listen)

    def _listen(self, record: Any) -> None:
        self._now.append([layer.sums["executed"].detach().clone() for layer in record.layers])

    def on_step_end(self, args, state, control, **kwargs):
        self.steps.append([sum(forwards).tolist() for forwards in zip(*self._now, strict=True)])
        self._now = []

    def on_train_end(self, args, state, control, **kwargs):
        self._watch.remove()


class Snapshot(TrainerCallback):
    """Parameters, buffers and optimizer state after a step, as far as the callbacks before this one have got."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.weights: dict[str, Tensor] = {}
        self.state: dict[str, dict[str, Tensor]] = {}

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step != self.step:
            return
        self.weights = {name: tensor.detach().clone() for name, tensor in model.state_dict().items()}
        names = {parameter: name for name, parameter in model.named_parameters()}
        self.state = {names[p]: {key: value.clone() for key, value in values.items()} for p, values in optimizer.state.items()}


# ---------------------------------------------------------------------- what counts as dead


@settings(max_examples=30, deadline=None)
@given(seed=st.integers(0, 10**6), threshold=st.sampled_from([0.05, 0.3, 0.9]), enough=st.sampled_from([0.4, 1.0]))
def test_streaks_and_bonuses_against_a_loop(seed: int, threshold: float, enough: float) -> None:
    draw = random.Random(seed)
    layers, experts, patience, step = 2, 5, 2, 0.25
    streak_LE, bonus_LE = torch.zeros(layers, experts, dtype=torch.int64), torch.zeros(layers, experts)
    streaks, bonuses = [[0] * experts for _ in range(layers)], [[0.0] * experts for _ in range(layers)]
    for _ in range(12):
        shares = [[draw.choice([0.0, 0.05, 0.2, 0.35, 1.0, 2.0]) for _ in range(experts)] for _ in range(layers)]
        share_LE = torch.tensor(shares, dtype=torch.float64)
        streak_LE = count_streaks(streak_LE, share_LE, threshold)
        exploring_LE = (streak_LE >= patience) | (bonus_LE > 0)
        bonus_LE = move_bonuses(bonus_LE, share_LE, exploring_LE, step, enough)
        for layer, row in enumerate(shares):
            for expert, share in enumerate(row):
                streaks[layer][expert] = streaks[layer][expert] + 1 if share < threshold else 0
                if share < enough and (streaks[layer][expert] >= patience or bonuses[layer][expert] > 0):
                    bonuses[layer][expert] += step
                else:
                    bonuses[layer][expert] = max(0.0, bonuses[layer][expert] - step)
        assert streak_LE.tolist() == streaks
        assert bonus_LE.tolist() == bonuses


class Scripted(TrainerCallback):
    """Routes each layer's tokens round-robin over the experts that a script names for the step."""

    def __init__(self, model: MoEForCausalLM, script: Callable[[int, int], list[int]]) -> None:
        """Args: script: (optimizer step, layer) -> experts."""
        self.step = 0
        for index, layer in enumerate(model.moe_layers):

            def route(
                x_TD: Tensor, mask: Tensor | None, gate: nn.Module = layer.gate, index: int = index, k: int = layer.top_k
            ) -> Routing:
                experts = torch.tensor(script(self.step, index))
                first_T = torch.arange(x_TD.shape[0]) % len(experts)
                ids_TK = experts[(first_T[:, None] + torch.arange(k)) % len(experts)]
                return Routing.of(ids_TK, torch.full(ids_TK.shape, 1 / k), x_TD @ gate.weight.T)

            layer.gate.route = route

    def on_step_begin(self, args, state, control, **kwargs):
        self.step = state.global_step + 1


def test_each_death_is_reported_once(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Expert 3 of layer 1 is dead in steps 2 to 6 and from 9 on; with patience 3 that is two deaths. Layer 2 has no tokens for
    expert 0 in too short a time."""
    model = build()

    def script(step: int, layer: int) -> list[int]:
        if layer == 1 and (2 <= step <= 6 or step >= 9):
            return [0, 1, 2]
        return [1, 2, 3] if layer == 2 and step in (4, 5) else [0, 1, 2, 3]

    with caplog.at_level(logging.WARNING):
        trainer(model, tmp_path, [Scripted(model, script), DeadExpertCallback(patience=3)], max_steps=14).train()
    first, second = warnings_of(caplog)
    assert "MoE layer 1, step 4: expert 3 (0.0%) got less than 5.0% of the fair load in each of the last 3 steps" in first
    assert "reinit" in first
    assert "explore" in first
    assert "MoE layer 1, step 11: expert 3" in second


def test_looks_only_every_so_many_steps(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """By default a tenth of the patience."""
    assert [DeadExpertCallback(patience=n).check_every for n in (1, 9, 20, 300)] == [1, 1, 2, 30]
    model = build()
    callback = DeadExpertCallback(patience=2, check_every=5)
    with caplog.at_level(logging.WARNING):
        trainer(model, tmp_path, [Scripted(model, lambda step, layer: [0, 1, 2]), callback], max_steps=9).train()
    assert [line.split(":")[0] for line in warnings_of(caplog)] == [f"MoE layer {i}, step 5" for i in range(LAYERS)]


def test_ordinary_steps_wait_for_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Between two looks the callback reads no value of a tensor, which on a GPU would wait for it."""
    callback = DeadExpertCallback("explore", patience=1, check_every=3)
    original, looks = callback.on_step_end, []

    def guarded(args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        def read(*args: Any, **kwargs: Any) -> None:
            raise AssertionError(f"read in step {state.global_step}")

        with pytest.MonkeyPatch.context() as patch:
            if state.global_step % 3:
                for name in ("item", "tolist", "cpu", "numpy", "nonzero", "__bool__", "__int__", "__float__", "__index__"):
                    patch.setattr(Tensor, name, read)
            else:
                looks.append(state.global_step)
            original(args, state, control, **kwargs)

    monkeypatch.setattr(callback, "on_step_end", guarded)
    trainer(starve(build(), 1), tmp_path, [callback], max_steps=7).train()
    assert looks == [3, 6]


def test_load_is_that_of_all_micro_batches_and_after_capacity(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """The reports are those that follow from the counts of a listener of one's own; layers of different widths."""
    model = build(num_experts=[4, 6, 3], capacity_factor=0.7)
    loads, threshold, patience = Loads(), 0.8, 2
    callback = DeadExpertCallback(threshold=threshold, patience=patience)
    with caplog.at_level(logging.WARNING):
        trainer(model, tmp_path, [loads, callback], gradient_accumulation_steps=4, max_steps=6, learning_rate=3e-2).train()
    expected, streaks = set(), {}
    for step, layers in enumerate(loads.steps, start=1):
        for layer, load_E in enumerate(layers):
            for expert, load in enumerate(load_E):
                under = load < threshold * sum(load_E) / len(load_E)
                streaks[layer, expert] = streaks.get((layer, expert), 0) + 1 if under else 0
                if streaks[layer, expert] == patience:
                    share = load * len(load_E) / sum(load_E)
                    expected.add(f"MoE layer {layer}, step {step}: expert {expert} ({share:.1%})")
    got = set()
    for line in warnings_of(caplog):
        where, experts = line.split(" got less")[0].split(": ")
        got |= {f"{where}: {expert}" for expert in experts.split(", ")}
    assert got == expected
    assert len(expected) > 2


# ---------------------------------------------------------------------- re-initialisation


def check_copied(before: Snapshot, after: Snapshot, prefix: str, source: int, target: int, bias: bool) -> None:
    """The rows of `target` below `prefix` are those of `source`, with noise on matrices; all other rows are unchanged."""
    for name, old in before.weights.items():
        new = after.weights[name]
        if not name.startswith(prefix) or (name.endswith("correction_bias") and not bias):
            assert torch.equal(new, old), name
            continue
        noisy = new.dim() == 3 or (".gate." in name and new.dim() == 2)
        kept = [row for row in range(old.shape[0]) if row != target]
        assert torch.equal(new[kept], old[kept]), name
        difference = new[target] - old[source]
        if noisy:
            assert 0.03 < difference.std(correction=0) / old[source].std(correction=0) < 0.08, name
        else:
            assert torch.equal(new[target], old[source]), name
    for name, state in before.state.items():
        for key, old in state.items():
            expected = old.clone()
            if name.startswith(prefix) and old.dim() > 0:
                expected[target] = old[source]
            assert torch.equal(after.state[name][key], expected), (name, key)


@pytest.mark.parametrize(
    ("router", "optim"),
    [("top_k", "adamw_torch"), ("switch", "adamw_torch_fused"), ("sigmoid", "adamw_torch"), ("noisy_top_k", "sgd")],
)
def test_reinit_in_training(tmp_path: Path, router: str, optim: str) -> None:
    """Only layer 1's dead expert changes, at the step at which its patience ends; the sources are the busiest."""
    model = build(router_type=router, **ROUTERS[router])
    if router == "sigmoid":
        for layer in model.moe_layers:
            layer.gate.e_score_correction_bias.copy_(torch.tensor([0.1, 0.2, 0.3, 0.4]))

    def script(step: int, layer: int) -> list[int]:
        return [1, 0, 1, 3] if layer == 1 else [0, 1, 2, 3]  # 1 has half of the layer's places

    before, after = Snapshot(3), Snapshot(3)
    callback = DeadExpertCallback("reinit", patience=3)
    callbacks = [Scripted(model, script), before, callback, after]
    run = trainer(model, tmp_path, callbacks, max_steps=5, optim=optim)
    stream: list[Tensor] = []
    run.add_callback(Streams(stream, before=callback))
    run.train()
    prefix = "language_model.transformer.h.1.mlp."
    names = [name for name in before.weights if name.startswith(prefix)]
    assert len(names) == (5 if router == "top_k" or router == "switch" else 6)
    check_copied(before, after, prefix, source=1, target=2, bias=True)
    assert before.weights[f"{prefix}gate.weight"].ne(after.weights[f"{prefix}gate.weight"]).any()


class Streams(TrainerCallback):
    """Sees that a callback does not draw from the global stream."""

    def __init__(self, seen: list[Tensor], before: TrainerCallback) -> None:
        original = before.on_step_end

        def watched(*args: Any, **kwargs: Any) -> None:
            state = torch.get_rng_state()
            original(*args, **kwargs)
            assert torch.equal(torch.get_rng_state(), state)
            seen.append(state)

        before.on_step_end = watched  # type: ignore[method-assign]


def test_a_dead_group_is_copied_whole(tmp_path: Path) -> None:
    model = build(router_type="hierarchical", n_group=2)
    before, after = Snapshot(2), Snapshot(2)
    callbacks = [Scripted(model, lambda step, layer: [0, 1] if layer == 2 else [0, 1, 2, 3]), before,
                 DeadExpertCallback("reinit", patience=2), after]  # fmt: skip
    trainer(model, tmp_path, callbacks, max_steps=2).train()
    gate = "language_model.transformer.h.2.mlp.gate."
    changed = {name for name, old in before.weights.items() if not torch.equal(old, after.weights[name])}
    assert {name.removeprefix(gate) for name in changed if name.startswith(gate)} == {
        "weight", "noise_weight", "group_weight", "group_noise_weight"
    }  # fmt: skip
    for name in changed:
        old, new = before.weights[name], after.weights[name]
        half = old.shape[0] // 2
        assert torch.equal(old[:half], new[:half]), name
        for row in range(half):  # each expert from the one in its place
            difference = (new[half + row] - old[row]).std(correction=0)
            assert difference < 0.1 * old[row].std(correction=0), name


def test_the_copy_takes_tokens(tmp_path: Path) -> None:
    """A starved expert of a real router has a part of the busiest one's load in the step after it was made anew."""
    model = starve(build(router_type="switch", num_experts_per_tok=1), 2)
    loads = Loads()
    trainer(model, tmp_path, [loads, DeadExpertCallback("reinit", patience=3)], max_steps=5).train()
    assert all(layer[2] == 0 for step in loads.steps[:3] for layer in step)
    for layer, load_E in enumerate(loads.steps[3]):
        source = max(range(EXPERTS), key=lambda expert, layer=layer: loads.steps[2][layer][expert])
        assert load_E[2] > 0.05 * loads.steps[2][layer][source]
        assert load_E[source] > 0.05 * loads.steps[2][layer][source]


# ---------------------------------------------------------------------- exploration


@pytest.mark.parametrize("router", ROUTERS)
def test_explore_revives_and_warn_does_not(tmp_path: Path, router: str) -> None:
    loads = {}
    for action in ("warn", "explore"):
        model, seen = starve(build(router_type=router, router_aux_loss_coef=0.0, **ROUTERS[router]), 1), Loads()
        callback = DeadExpertCallback(action, patience=2, exploration_step=2.5)
        trainer(model, tmp_path, [seen, callback], max_steps=12, learning_rate=1e-4).train()
        loads[action] = [[layer[1] for layer in step] for step in seen.steps]
    assert all(load <= 1 for step in loads["warn"] for load in step)  # noise may reach it
    assert all(load == 0 for step in loads["explore"][:2] for load in step)
    for layer in range(LAYERS):
        assert max(step[layer] for step in loads["explore"]) > 20, layer


def test_explore_revives_a_dead_group(tmp_path: Path) -> None:
    """What all experts of a group have in common of a bonus lifts the group."""
    model, seen = starve(build(router_type="hierarchical", n_group=2), group=1), Loads()
    callback = DeadExpertCallback("explore", patience=2, exploration_step=2.5)
    trainer(model, tmp_path, [seen, callback], max_steps=12, learning_rate=1e-4).train()
    assert all(sum(layer[2:]) == 0 for step in seen.steps[:2] for layer in step)
    assert all(max(sum(step[layer][2:]) for step in seen.steps) > 20 for layer in range(LAYERS))


def test_bonus_follows_the_load(tmp_path: Path) -> None:
    """It goes up a step with each step of hunger, and down once the expert is fed; then it is gone."""
    model = build()
    seen: list[float] = []

    class See(TrainerCallback):
        def on_step_end(self, args, state, control, **kwargs):
            seen.append(model.moe_layers[1].gate.exploration_bonus[3].item())
            assert model.moe_layers[0].gate.exploration_bonus.eq(0).all()

    def script(step: int, layer: int) -> list[int]:
        return [0, 1, 2] if layer == 1 and step < 6 else [0, 1, 2, 3]

    callback = DeadExpertCallback("explore", patience=2, exploration_step=0.5)
    trainer(model, tmp_path, [Scripted(model, script), callback, See()], max_steps=10).train()
    assert seen == [0.0, 0.5, 1.0, 1.5, 2.0, 1.5, 1.0, 0.5, 0.0, 0.0]
    assert all(layer.gate.exploration_bonus is None for layer in model.moe_layers)


@pytest.mark.parametrize("router", ROUTERS)
def test_bonus_is_for_training_only(tmp_path: Path, router: str) -> None:
    """Evaluation, checkpoint and config know nothing of it; in training it changes choice and (but for sigmoid) weight."""
    model = starve(build(router_type=router, **ROUTERS[router]), 1)
    ids = token_ids(4, 20)
    with torch.no_grad():
        model.eval()
        plain, names = model(input_ids=ids).logits, set(model.state_dict())
        for layer in model.moe_layers:
            layer.gate.exploration_bonus = torch.tensor([0.0, 9.0, 0.0, 0.0])
        assert torch.equal(model(input_ids=ids).logits, plain)
        assert set(model.state_dict()) == names
        gate = model.train().moe_layers[0].gate
        x_TD = torch.randn(50, 32)
        routing = gate(x_TD)
        gate.exploration_bonus = None
        without = gate(x_TD)
    assert (routing.chosen_ids_TK == 1).any()
    if router == "sigmoid":
        assert torch.equal(routing.logits_TE, without.logits_TE)
        assert torch.equal(routing.logits_TE, x_TD @ gate.weight.T)
        scores = routing.logits_TE.sigmoid().gather(1, routing.expert_ids_TK)
        torch.testing.assert_close(routing.weights_TK, scores / scores.sum(-1, keepdim=True))
    model.config.save_pretrained(tmp_path)
    assert "exploration" not in (tmp_path / "config.json").read_text()


def test_bonus_reaches_gate_weight_and_gradient() -> None:
    """Against softmax top-2 of logits + bonus written out."""
    gate = tiny("llama").moe_layers[0].gate.train()
    bonus_E = torch.tensor([0.0, 0.0, 2.0, 0.0])
    x_TD = torch.randn(30, 32, generator=torch.Generator().manual_seed(0))
    gate.exploration_bonus = bonus_E
    routing = gate(x_TD)
    weight = gate.weight.detach().clone().requires_grad_()
    logits_TE = x_TD @ weight.T + bonus_E
    top_TK, ids_TK = logits_TE.topk(2)
    assert torch.equal(routing.expert_ids_TK, ids_TK)
    torch.testing.assert_close(routing.weights_TK, top_TK.softmax(-1))
    (routing.weights_TK[:, 0] ** 2).sum().backward()
    (top_TK.softmax(-1)[:, 0] ** 2).sum().backward()
    torch.testing.assert_close(gate.weight.grad, weight.grad)


def test_recompute_routes_the_same(tmp_path: Path) -> None:
    """With gradient checkpointing: the same losses and weights, to rounding."""
    weights = []
    for checkpointing in (False, True):
        model = starve(build(), 1)
        callback = DeadExpertCallback("explore", patience=1, exploration_step=3.0)
        run = trainer(model, tmp_path, [callback], max_steps=5, gradient_checkpointing=checkpointing)
        run.train()
        weights.append({name: p.detach().clone() for name, p in model.named_parameters()})
    for name, value in weights[0].items():
        torch.testing.assert_close(weights[1][name], value, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


def test_router_that_peft_trains_a_copy_of(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(starve(build(), 1), LoraConfig(r=2, target_modules=["c_attn"], modules_to_save=["gate"]))
    seen = Loads()
    callback = DeadExpertCallback("explore", patience=2, exploration_step=6.0)
    trainer(model, tmp_path, [seen, callback], max_steps=8, learning_rate=1e-4).train()
    assert all(layer[1] == 0 for step in seen.steps[:2] for layer in step)
    assert all(max(step[layer][1] for step in seen.steps) > 20 for layer in range(LAYERS))


def test_says_what_lives_by_the_bonus_only(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    model = starve(build(), 1)
    with caplog.at_level(logging.WARNING):
        callback = DeadExpertCallback("explore", patience=1, exploration_step=0.5)
        trainer(model, tmp_path, [callback], max_steps=4).train()
    lines = [line for line in warnings_of(caplog) if "when training ended" in line]
    assert [line.split(" still")[0] for line in lines] == [f"MoE layer {i}: expert 1 (2)" for i in range(LAYERS)]


# ---------------------------------------------------------------------- resuming


@pytest.mark.parametrize(("action", "restore"), [("warn", False), ("reinit", False), ("explore", False), ("explore", True)])
def test_resumes_exactly(tmp_path: Path, caplog: pytest.LogCaptureFixture, action: str, restore: bool) -> None:
    """Six steps, or three and three: the same weights to the last bit, the same reports."""

    def train(folder: Path, checkpoint: str | None) -> tuple[dict[str, Tensor], DeadExpertCallback, list[str]]:
        model = starve(build(router_type="sigmoid"), 1)
        if checkpoint:
            model = MoEForCausalLM.from_pretrained(checkpoint)
        callback = DeadExpertCallback(action, patience=4, check_every=2, exploration_step=2.0)
        run = trainer(
            model, folder, [callback], max_steps=9, save_strategy="steps", save_steps=3, learning_rate=1e-2,
            restore_callback_states_from_checkpoint=restore,
        )  # fmt: skip
        caplog.clear()
        with caplog.at_level(logging.WARNING):
            run.train(resume_from_checkpoint=checkpoint)
        return {name: tensor.clone() for name, tensor in model.state_dict().items()}, callback, warnings_of(caplog)

    whole, _, lines = train(tmp_path / "whole", None)
    for step in (3, 6):
        checkpoint = tmp_path / "whole" / f"checkpoint-{step}"
        resumed, _, again = train(tmp_path / f"from_{step}", str(checkpoint))
        for name, tensor in whole.items():
            assert torch.equal(resumed[name], tensor), name
        assert again == [line for line in lines if ", step " not in line or int(line.split(", step ")[1].split(":")[0]) > step]
    saved = [
        json.loads((tmp_path / folder / "checkpoint-9" / "trainer_state.json").read_text())["stateful_callbacks"]
        for folder in ("whole", "from_3", "from_6")
    ]
    assert saved[0]["DeadExpertCallback"] == saved[1]["DeadExpertCallback"] == saved[2]["DeadExpertCallback"]
    kept = saved[0]["DeadExpertCallback"]["attributes"]["_restored"]
    assert bool(kept["bonuses"]) == (action == "explore")
    assert kept["streaks"] or action == "reinit"


def test_can_be_added_to_a_training_that_goes_on(tmp_path: Path) -> None:
    """`Trainer` saves no callback whose name is not in the checkpoint that it resumed from."""
    options = {"save_strategy": "steps", "save_steps": 1}
    trainer(build(), tmp_path, [], max_steps=1, **options).train()
    callbacks = [DeadExpertCallback(patience=1, threshold=0.9), DeadExpertCallback("explore", patience=1, threshold=0.4)]
    run = trainer(build(), tmp_path, callbacks[:1], max_steps=2, **options)
    run.train(resume_from_checkpoint=str(tmp_path / "checkpoint-1"))
    assert (tmp_path / "checkpoint-2" / "trainer_state.json").exists()
    trainer(build(), tmp_path / "two", callbacks, max_steps=2, **options).train()
    kept = json.loads((tmp_path / "two" / "checkpoint-2" / "trainer_state.json").read_text())["stateful_callbacks"]
    assert {entry["args"]["action"] for entry in kept["DeadExpertCallback"]} == {"warn", "explore"}


def test_a_new_training_starts_afresh(tmp_path: Path) -> None:
    model = starve(build(), 1)
    callback = DeadExpertCallback("explore", patience=2, exploration_step=0.1)
    run = trainer(model, tmp_path, [callback], max_steps=2)
    run.train()
    run.train()  # had it gone on counting, the bonus would be 0.3
    assert callback.state()["attributes"] == DeadExpertCallback().state()["attributes"]
    assert model._routing_listeners == []


# ---------------------------------------------------------------------- native MoEs


def mixtral() -> MixtralForCausalLM:
    torch.manual_seed(0)
    return MixtralForCausalLM(
        MixtralConfig(
            vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
            num_key_value_heads=4, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.2,
        )
    )  # fmt: skip


def test_native_moe(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    """Mixtral: reported and re-initialised by the loads of a listener of one's own; no bonus."""
    threshold, loads, before, after = 0.75, Loads(), Snapshot(2), Snapshot(2)
    callback = DeadExpertCallback("reinit", threshold=threshold, patience=2)
    with caplog.at_level(logging.WARNING):
        trainer(mixtral(), tmp_path, [loads, before, callback, after], max_steps=2).train()
    changed = set()
    for layer, (first_E, second_E) in enumerate(zip(*loads.steps, strict=True)):
        low = [e for e in range(4) if max(first_E[e], second_E[e]) < threshold * sum(first_E) / 4]
        for expert in low:
            source = max(range(4), key=lambda e, load_E=second_E: load_E[e])
            prefix = f"model.layers.{layer}.mlp."
            for name in ("gate.weight", "experts.gate_up_proj", "experts.down_proj"):
                old, new = before.weights[prefix + name], after.weights[prefix + name]
                assert (new[expert] - old[source]).std() < 0.1 * old[source].std()
                assert torch.equal(
                    after.state[prefix + name]["exp_avg"][expert], before.state[prefix + name]["exp_avg"][source]
                )
                changed.add(prefix + name)
    assert changed
    assert {n for n, old in before.weights.items() if not torch.equal(old, after.weights[n])} == changed
    assert len(warnings_of(caplog)) == len({name.split(".mlp")[0] for name in changed})
    with pytest.raises(ValueError, match=r"explore.*hf_moe's learned routers"):
        trainer(mixtral(), tmp_path, [DeadExpertCallback("explore")]).train()


# ---------------------------------------------------------------------- what does not fit


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"action": "kill"}, "`action`='kill' must be one of 'warn', 'reinit', 'explore'"),
        ({"threshold": 0}, "`threshold`=0 must be between 0 and 1"),
        ({"threshold": 1.5}, "`threshold`=1.5"),
        ({"patience": 0}, "`patience`=0 must be at least 1"),
        ({"check_every": 0}, "`check_every`=0"),
        ({"noise": 0.0}, "`noise`=0.0 must be positive"),
        ({"exploration_step": -1}, "`exploration_step`=-1"),
        ({"action": "explore", "threshold": 0.6}, "`exploration_share`=0.5 must be between `threshold`=0.6 and 1"),
    ],
)
def test_refused_arguments(arguments: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message.replace("(", r"\(")):
        DeadExpertCallback(**arguments)


@pytest.mark.parametrize("action", ["reinit", "explore"])
@pytest.mark.parametrize("fields", [
    {"router_type": "hash"}, {"router_type": "expert_choice", "allow_non_causal": True}, {"router_type": "strictly_balanced"},
])  # fmt: skip
def test_refused_routers(tmp_path: Path, fields: dict, action: str) -> None:
    model = build(**fields)
    with pytest.raises(ValueError, match=f"`action`='{action}' does not fit `router_type`='{fields['router_type']}'"):
        trainer(model, tmp_path, [DeadExpertCallback(action)]).train()
    assert model._routing_listeners == []
    trainer(build(**fields), tmp_path, [DeadExpertCallback("warn")], max_steps=1).train()


def test_refused_models(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from peft import LoraConfig, get_peft_model

    lora = get_peft_model(build(), LoraConfig(r=2, target_modules=["c_attn"]))
    with pytest.raises(ValueError, match=r"`experts.up_proj` of layer 0 is not trained \(frozen, as under PEFT"):
        trainer(lora, tmp_path, [DeadExpertCallback("reinit")]).train()
    model = build()
    for layer in model.moe_layers:
        layer.gate.requires_grad_(False)
    with pytest.raises(ValueError, match=r"`router.weight` of layer 0 is not trained"):
        trainer(model, tmp_path, [DeadExpertCallback("reinit")]).train()

    callback, args = DeadExpertCallback("reinit"), TrainingArguments(output_dir=str(tmp_path), use_cpu=True)
    state = SimpleNamespace(stateful_callbacks={}, global_step=0)
    flat = FullyShardedDataParallel.__new__(FullyShardedDataParallel)
    nn.Module.__init__(flat)
    flat._modules["_fsdp_wrapped_module"] = build()
    with pytest.raises(ValueError, match=r"`action`='reinit' does not work under FSDP1"):
        callback.on_train_begin(args, state, None, model=flat, optimizer=None)
    args.deepspeed_plugin = object()
    with pytest.raises(ValueError, match=r"`action`='reinit' does not work under DeepSpeed.*FSDP2"):
        callback.on_train_begin(args, state, None, model=build(), optimizer=None)


# ---------------------------------------------------------------------- several ranks


def whole(tensor: Tensor) -> Tensor:
    return tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor


def weights_and_state(model: nn.Module, optimizer: Any) -> dict[str, Tensor]:
    found = {name: whole(p.detach()).clone() for name, p in model.named_parameters()}
    found |= {name: buffer.clone() for name, buffer in model.named_buffers() if "exploration" not in name}
    for name, parameter in model.named_parameters():
        state = optimizer.state.get(parameter, {})
        found |= {f"{name} {key}": whole(value).clone() for key, value in state.items() if isinstance(value, Tensor)}
    return {name.removeprefix("module."): value for name, value in found.items()}


class Whole(TrainerCallback):
    """Like `Snapshot`, of whole tensors of whatever wrapper."""

    def __init__(self, step: int) -> None:
        self.step = step
        self.found: dict[str, Tensor] = {}

    def on_step_end(self, args, state, control, model=None, optimizer=None, **kwargs):
        if state.global_step == self.step:
            self.found = weights_and_state(model, optimizer)


def collapsed(num_experts: int) -> MoEForCausalLM:
    """Expert 1 of each layer gets nothing."""
    model = tiny("llama", num_experts=num_experts, num_experts_per_tok=1, router_type="sigmoid").train()
    for layer in model.moe_layers:
        layer.gate.e_score_correction_bias[1] = -5.0
    return model


EP_RULES = {"": "ep_dispatch_experts", ".gate_up_proj": "grouped_gemm", ".down_proj": "grouped_gemm"}


def job(mode: str, action: str, folder: Path) -> dict[str, Any]:
    """Three steps, in the first two of which expert 1 of each layer is dead."""
    options: dict[str, Any] = {"max_steps": 3}
    if mode == "ep":
        world = int(os.environ["WORLD_SIZE"])
        plan = {f"language_model.model.layers.*.mlp.experts{name}": rule for name, rule in EP_RULES.items()}
        how = DistributedConfig(ep_size=2, fsdp_size=world, ep_plan=plan, ep_implementation="all_to_all")
        model = AutoModelForCausalLM.from_pretrained(folder / "model", distributed_config=how).train()
    else:
        model = collapsed(5)  # shards of unequal size
    if mode == "fsdp2":
        options |= {"fsdp": True, "fsdp_config": {"version": 2, "transformer_layer_cls_to_wrap": ["LlamaDecoderLayer"]}}
    before, after, end = Whole(2), Whole(2), Whole(3)
    callback = DeadExpertCallback(action, patience=2, exploration_step=40.0)  # a quarter of it for a sigmoid: 10 > 5
    run = trainer(model, folder / mode, [before, callback, after, end], **options)
    run.train()
    sharded = [isinstance(parameter, DTensor) for parameter in run.model.parameters()]
    assert all(sharded) if mode == "fsdp2" else any(sharded) == (mode == "ep")
    return {"before": before.found, "after": after.found, "end": end.found}


def placements() -> None:
    """Rows of tensors that are sharded in any way, against the whole tensor."""
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.tensor import Replicate, Shard, distribute_tensor

    world = torch.distributed.get_world_size()
    line, grid = init_device_mesh("cpu", (world,)), init_device_mesh("cpu", (world // 2, 2))
    cases = [(line, [Shard(0)]), (line, [Shard(1)]), (line, [Replicate()]), (grid, [Replicate(), Shard(0)]),
             (grid, [Shard(0), Shard(0)]), (grid, [Shard(0), Shard(1)]), (grid, [Shard(1), Shard(0)])]  # fmt: skip
    for rows in (1, 3, 5):
        full = torch.arange(rows * 7 * 2, dtype=torch.float32).view(rows, 7, 2)
        for mesh, how in cases:
            tensor = distribute_tensor(full.clone(), mesh, how)
            for row in range(rows):
                assert torch.equal(read_row(tensor, row), full[row]), (rows, how)
                new = torch.full((7, 2), -1.0 - row) + full[row]
                write_row(tensor, row, new)
                expected = full.clone()
                expected[row] = new
                assert torch.equal(tensor.full_tensor(), expected), (rows, how)
                write_row(tensor, row, full[row])


def worker(folder: str) -> None:
    results = {}
    for mode, action in (("ddp", "reinit"), ("fsdp2", "reinit"), ("ep", "reinit"), ("ddp", "explore"), ("fsdp2", "explore")):
        results[f"{mode} {action}"] = job(mode, action, Path(folder))
    placements()
    torch.save(results, Path(folder, f"rank{os.environ['RANK']}.pt"))


@pytest.fixture(scope="module", params=[2])
def ranks(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    folder = tmp_path_factory.mktemp("ranks")
    collapsed(4).save_pretrained(folder / "model")
    launch(request.param, __file__, folder)
    return [torch.load(folder / f"rank{rank}.pt") for rank in range(request.param)]


def test_ranks_stay_identical(ranks: list[dict[str, Any]]) -> None:
    """Whatever the wrapper, all ranks have the same weights and optimizer state, before and after."""
    for name, stages in ranks[0].items():
        for stage, tensors in stages.items():
            assert tensors
            for other in ranks[1:]:
                assert other[name][stage].keys() == tensors.keys()
                for key, tensor in tensors.items():
                    assert torch.equal(other[name][stage][key], tensor), (name, stage, key)


@pytest.mark.parametrize("name", ["ddp reinit", "fsdp2 reinit", "ep reinit"])
def test_sharded_rows_are_replaced(ranks: list[dict[str, Any]], name: str) -> None:
    before, after = ranks[0][name]["before"], ranks[0][name]["after"]
    assert before.keys() == after.keys()
    for key, old in before.items():
        new = after[key]
        if ".mlp." not in key or key.endswith("step"):
            assert torch.equal(old, new), key
            continue
        kept = [row for row in range(old.shape[0]) if row != 1]
        assert torch.equal(new[kept], old[kept]), key
        if " " in key or old.dim() - (".experts." in key) < 2:  # optimizer state, biases: copied as they are
            assert any(torch.equal(new[1], old[row]) for row in kept), key
        else:
            noise = min(((new[1] - old[row]).std() / old[row].std()).item() for row in kept)
            assert 0.03 < noise < 0.08, key


def test_wrappers_do_the_same(ranks: list[dict[str, Any]]) -> None:
    """DDP and FSDP2 draw the same noise and give the same bonus."""
    for action in ("reinit", "explore"):
        expected, got = ranks[0][f"ddp {action}"], ranks[0][f"fsdp2 {action}"]
        for stage in ("after", "end"):
            for key, tensor in expected[stage].items():
                torch.testing.assert_close(got[stage][key], tensor, rtol=1e-3, atol=1e-5, msg=lambda m, k=key: f"{k}: {m}")


if __name__ == "__main__":
    worker(sys.argv[1])
