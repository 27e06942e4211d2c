"""The callbacks under the stock `Trainer`: what is logged and counted, where it goes, the alarms, the balancing, the FLOPs."""

from __future__ import annotations

import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from families import text_config
from hf_moe.training import AlarmThresholds, ExpertLoadCallback, LossFreeBalancingCallback, read_expert_load, watch_routing
from hf_moe.training.native_routing import bias_of
from native_moes import native_moe
from torch import nn
from trainer_cut import NUM_SEQUENCES, collate, sequences
from transformers import AutoModelForCausalLM, MixtralConfig, MixtralForCausalLM, Trainer, TrainerCallback, TrainingArguments

from hf_moe import MoEConfig, MoEForCausalLM, RoutingRecord
from hf_moe.routing import Routing

EXPERTS, TOP_K, LAYERS = 4, 2, 3
REAL_TOKENS = sum(len(row["input_ids"]) for row in sequences())
OF_ONE_STEP = [REAL_TOKENS * TOP_K] * LAYERS
LOAD = {"load_max_over_mean", "load_cv", "drop_rate", "dead_experts", "load_loss"}
ROUTED = LOAD | {"importance_cv", "router_entropy", "logit_rms", "importance_loss", "aux_loss", "z_loss"}
ONCE = {"lm_loss", "worst_load_max_over_mean", "tflops_per_device", "alarms"}


def build(**fields) -> MoEForCausalLM:
    torch.manual_seed(0)
    # larger weights than the default, so that routing is far from uniform
    text = text_config("llama", initializer_range=0.2)
    return MoEForCausalLM(MoEConfig(text_config=text, **{"num_experts": EXPERTS, "num_experts_per_tok": TOP_K, **fields}))


def trainer(model: nn.Module, folder: Path, callbacks: list[TrainerCallback], **options) -> Trainer:
    """Steps of one epoch each: every step sees all sequences."""
    accumulation = options.get("gradient_accumulation_steps", 1)
    defaults = {
        "max_steps": 2, "logging_steps": 1, "save_strategy": "no", "disable_tqdm": True, "use_cpu": True,
        "per_device_train_batch_size": NUM_SEQUENCES // accumulation,
    }  # fmt: skip
    args = TrainingArguments(output_dir=str(folder), **{**defaults, **options})
    rows = sequences()
    return Trainer(model, args, train_dataset=rows, eval_dataset=rows, data_collator=collate, callbacks=callbacks)


def training_logs(run: Trainer) -> list[dict]:
    return [row for row in run.state.log_history if "loss" in row]


def of_moe(row: dict) -> set[str]:
    """Names in a log, without those of single layers."""
    names = {key.removeprefix("moe/") for key in row if key.startswith("moe/") and not key.startswith("moe/layer_")}
    return names - {"alarm"}


def load(folder: Path) -> tuple[list[int], list[list[list[int]]]]:
    """Steps and executed assignments of the file."""
    found = read_expert_load(folder / "expert_load.safetensors")
    return found.steps, found.executed.tolist()


def per_layer(executed: list[list[list[int]]]) -> list[list[int]]:
    return [[sum(layer) for layer in row] for row in executed]


class Records:
    """Keeps the sums, terms and LM loss of every forward."""

    def __init__(self, model: MoEForCausalLM) -> None:
        self.layers: list[list[dict[str, torch.Tensor]]] = []
        model.add_routing_listener(self.listen)

    def listen(self, record: RoutingRecord) -> None:
        self.layers.append([{name: v.detach().clone() for name, v in layer.sums.items()} for layer in record.layers])

    def total(self, name: str, first: int, last: int) -> list[list[float]]:
        """One list per layer: the sum of forwards first to last - 1."""
        return [
            [sum(column) for column in zip(*(f[i][name].view(-1).tolist() for f in self.layers[first:last]), strict=True)]
            for i in range(LAYERS)
        ]


def cv(values: list[float]) -> float:
    return statistics.pstdev(values) / statistics.mean(values)


# ---------------------------------------------------------------------- what is logged


@pytest.mark.parametrize(
    ("fields", "names"),
    [({"capacity_factor": 0.6}, ROUTED), ({"router_type": "noisy_top_k"}, ROUTED), ({"router_type": "hash"}, LOAD)],
)
def test_logged_numbers(tmp_path: Path, fields: dict, names: set[str]) -> None:
    """Each training log has every number of every layer, of the steps since the log before; evaluations have none."""
    model = build(**fields)
    records = Records(model)
    run = trainer(
        model, tmp_path, [ExpertLoadCallback()], max_steps=4, logging_steps=2, gradient_accumulation_steps=2,
        eval_strategy="steps", eval_steps=1, learning_rate=1e-2,
    )  # fmt: skip
    run.train()
    logs = training_logs(run)
    assert [row["step"] for row in logs] == [2, 4]
    assert all(of_moe(row) == names | ONCE for row in logs)
    assert all({f"moe/layer_{i}/{name}" for i in range(LAYERS) for name in names} <= set(row) for row in logs)
    others = [row for row in run.state.log_history if "loss" not in row]
    assert len(others) == 5  # four evaluations and the summary
    assert not any(key.startswith("moe/") for row in others for key in row)
    for row, (first, last) in zip(logs, [(0, 4), (4, 8)], strict=True):
        executed, counts = records.total("executed", first, last), records.total("counts", first, last)
        expected = {
            "load_max_over_mean": [max(e) / statistics.mean(e) for e in executed],
            "load_cv": [cv(e) for e in executed],
            "drop_rate": [1 - sum(e) / sum(c) for e, c in zip(executed, counts, strict=True)],
        }
        if "router_entropy" in names:
            tokens = records.total("tokens", first, last)
            expected["router_entropy"] = [
                e[0] / t[0] for e, t in zip(records.total("entropy", first, last), tokens, strict=True)
            ]
            expected["logit_rms"] = [
                math.sqrt(z[0] / t[0]) for z, t in zip(records.total("z", first, last), tokens, strict=True)
            ]
            expected["importance_cv"] = [cv(i) for i in records.total("importance", first, last)]
        for name, values in expected.items():
            assert row[f"moe/{name}"] == pytest.approx(statistics.mean(values), rel=1e-5, abs=1e-9), name
            assert [row[f"moe/layer_{i}/{name}"] for i in range(LAYERS)] == pytest.approx(values, rel=1e-5, abs=1e-9)
        assert row["moe/worst_load_max_over_mean"] == pytest.approx(max(expected["load_max_over_mean"]))
    assert (logs[0]["moe/drop_rate"] > 0.01) == ("capacity_factor" in fields)


@pytest.mark.parametrize("scope", ["global_batch", "micro_batch"])
@pytest.mark.parametrize("accumulation", [1, 4])
def test_the_parts_of_the_loss_add_up(tmp_path: Path, accumulation: int, scope: str) -> None:
    """What `Trainer` logs as `loss` is the logged LM loss plus coefficient times logged router losses, of layers, too."""
    coefficients = {"importance_loss": 0.3, "load_loss": 0.2, "aux_loss": 0.1, "z_loss": 0.05}
    fields = {f"router_{name}_coef": value for name, value in coefficients.items()}
    model = build(router_type="noisy_top_k", balance_scope=scope, **fields)
    for layer in model.moe_layers:
        nn.init.normal_(layer.gate.weight, std=0.3)
    run = trainer(
        model, tmp_path, [ExpertLoadCallback()], max_steps=6, logging_steps=3, gradient_accumulation_steps=accumulation,
        learning_rate=1e-2,
    )  # fmt: skip
    run.train()
    assert len(training_logs(run)) == 2
    for row in training_logs(run):
        of_layers = {n: statistics.mean(row[f"moe/layer_{i}/{n}"] for i in range(LAYERS)) for n in coefficients}
        total = row["moe/lm_loss"] + sum(c * row[f"moe/{name}"] for name, c in coefficients.items())
        assert row["loss"] == pytest.approx(total, rel=1e-5)
        assert {name: row[f"moe/{name}"] for name in coefficients} == pytest.approx(of_layers, rel=1e-6)


def test_tensorboard_has_every_number(tmp_path: Path) -> None:
    pytest.importorskip("tensorboard")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    run = trainer(build(), tmp_path, [ExpertLoadCallback()], report_to="tensorboard", max_steps=4, logging_steps=2)
    run.train()
    (folder,) = {path.parent for path in tmp_path.rglob("events.out.tfevents.*")}
    events = EventAccumulator(str(folder), size_guidance={"scalars": 0}).Reload()
    logs = training_logs(run)
    keys = {key for row in logs for key in row if key.startswith("moe/")}
    assert len(keys) == len(ROUTED) * (1 + LAYERS) + len(ONCE)
    for key in keys:
        found = {event.step: event.value for event in events.Scalars(f"train/{key}")}
        assert found == pytest.approx({row["step"]: row[key] for row in logs}, rel=1e-6), key


class Keeps(TrainerCallback):
    """A reporter of the user's own, and what the console prints."""

    def __init__(self) -> None:
        self.logs: list[dict] = []

    def on_log(self, args, state, control, logs=None, **kwargs):
        self.logs.append(dict(logs))


@pytest.mark.parametrize("added_later", [False, True])
def test_reporters_get_all_and_the_console_the_means(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], added_later: bool
) -> None:
    """Wherever the callback stands in the list."""
    reporter = Keeps()
    run = trainer(build(), tmp_path, [reporter] if added_later else [reporter, ExpertLoadCallback()], report_to="none")
    if added_later:
        run.add_callback(ExpertLoadCallback())
    run.train()
    assert [row["step"] for row in run.state.log_history] == [1, 2, 2]
    for seen, kept in zip(reporter.logs, run.state.log_history, strict=True):
        assert seen == {name: value for name, value in kept.items() if name != "step"}
    printed = capsys.readouterr().out
    assert "moe/load_cv" in printed
    assert "moe/layer_" not in printed


def test_what_is_left_at_the_end_is_in_the_summary(tmp_path: Path) -> None:
    run = trainer(build(), tmp_path, [ExpertLoadCallback()], max_steps=5, logging_steps=3)
    run.train()
    summary = run.state.log_history[-1]
    assert "train_runtime" in summary
    assert of_moe(summary) == ROUTED | ONCE
    steps, executed = load(tmp_path)
    assert steps == [3, 5]
    assert per_layer(executed) == [[3 * n for n in OF_ONE_STEP], [2 * n for n in OF_ONE_STEP]]


# ---------------------------------------------------------------------- what is counted


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("accumulation", [1, 2])
def test_every_assignment_is_counted_once(tmp_path: Path, accumulation: int, checkpointing: bool) -> None:
    """Neither padding, nor recomputation, nor evaluation adds to the load; accumulation steps do."""
    run = trainer(
        build(), tmp_path, [ExpertLoadCallback()], max_steps=3, gradient_accumulation_steps=accumulation,
        activation_checkpointing=checkpointing, eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    run.train()
    steps, executed = load(tmp_path)
    assert steps == [1, 2, 3]
    assert per_layer(executed) == [OF_ONE_STEP] * 3
    assert read_expert_load(tmp_path / "expert_load.safetensors").layers == [0, 1, 2]


def test_executed_is_wanted_less_dropped(tmp_path: Path) -> None:
    model = build(capacity_factor=0.6, num_experts=[4, 6, 2], mlp_only_layers=[])
    run = trainer(model, tmp_path, [ExpertLoadCallback()], max_steps=2, logging_steps=2)
    run.train()
    (row,) = training_logs(run)
    _, ((executed),) = load(tmp_path)
    for index, layer in enumerate(executed):
        wanted = 2 * REAL_TOKENS * TOP_K
        assert sum(layer) == round(wanted * (1 - row[f"moe/layer_{index}/drop_rate"])) < wanted
    assert executed[2][2:] == [0] * 4  # this layer has two experts
    assert all(executed[1])


def collapse(model: MoEForCausalLM) -> MoEForCausalLM:
    """Every token to the first K experts."""
    for layer in model.moe_layers:

        def collapsed(x_TD: torch.Tensor, mask: torch.Tensor | None, gate: nn.Module = layer.gate) -> Routing:
            ids_TK = torch.arange(TOP_K).expand(x_TD.shape[0], TOP_K)
            return Routing.of(ids_TK, torch.full(ids_TK.shape, 1 / TOP_K), x_TD @ gate.weight.T)

        layer.gate.route = collapsed
    return model


def test_dead_experts_are_reported(tmp_path: Path) -> None:
    run = trainer(collapse(build()), tmp_path, [ExpertLoadCallback()], max_steps=1)
    run.train()
    (row,) = training_logs(run)
    assert row["moe/dead_experts"] == (EXPERTS - TOP_K) * LAYERS
    assert row["moe/layer_1/dead_experts"] == EXPERTS - TOP_K
    assert row["moe/load_max_over_mean"] == EXPERTS / TOP_K
    assert load(tmp_path)[1] == [[[REAL_TOKENS] * TOP_K + [0] * (EXPERTS - TOP_K)] * LAYERS]


def test_forwards_that_do_not_train_are_not_counted(tmp_path: Path) -> None:
    """As a reference model's: without gradient, though in training mode."""

    class Twice(Trainer):
        def compute_loss(self, model, inputs, *arguments, **options):
            with torch.no_grad():
                model(**inputs)
            return super().compute_loss(model, inputs, *arguments, **options)

    run = trainer(build(), tmp_path, [ExpertLoadCallback()], max_steps=1)
    run.__class__ = Twice
    run.train()
    assert per_layer(load(tmp_path)[1]) == [OF_ONE_STEP]


def test_a_native_moe_is_counted(tmp_path: Path) -> None:
    config = MixtralConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=LAYERS, num_attention_heads=4,
        num_key_value_heads=4, num_local_experts=EXPERTS, num_experts_per_tok=TOP_K, output_router_logits=True,
    )  # fmt: skip
    run = trainer(MixtralForCausalLM(config), tmp_path, [ExpertLoadCallback()], gradient_accumulation_steps=2)
    run.train()
    assert per_layer(load(tmp_path)[1]) == [OF_ONE_STEP] * 2
    assert all(of_moe(row) == ROUTED | ONCE for row in training_logs(run))


def test_finds_the_model_inside_peft(tmp_path: Path) -> None:
    from peft import LoraConfig, get_peft_model

    model = get_peft_model(build(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    trainer(model, tmp_path, [ExpertLoadCallback()], max_steps=1).train()
    assert per_layer(load(tmp_path)[1]) == [OF_ONE_STEP]


def test_dense_model_is_refused(tmp_path: Path) -> None:
    model = AutoModelForCausalLM.from_config(text_config("llama"))
    with pytest.raises(ValueError, match=r"LlamaForCausalLM holds no Mixture-of-Experts.*hf-moe upcycle"):
        trainer(model, tmp_path, [ExpertLoadCallback()]).train()


# ---------------------------------------------------------------------- interrupted and resumed


def moe_numbers(rows: list[dict]) -> list[dict]:
    """Without times. `Trainer`'s own `loss` is not in them: after a resume it forgets the steps since the last log."""
    return [{k: v for k, v in row.items() if k.startswith("moe/") and k != "moe/tflops_per_device"} for row in rows]


@pytest.mark.parametrize("logging_steps", [1, 3])
@pytest.mark.parametrize("restore", [False, True])
def test_resumed_training_continues_log_and_file(tmp_path: Path, logging_steps: int, restore: bool) -> None:
    """Also where the checkpoint was saved between two logs, and whether or not `Trainer` restores callbacks itself."""
    options = {"max_steps": 8, "save_strategy": "steps", "save_steps": 4, "logging_steps": logging_steps}
    options |= {"lr_scheduler_type": "constant", "learning_rate": 1e-3}
    options["restore_callback_states_from_checkpoint"] = restore
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    reference = trainer(build(), whole, [ExpertLoadCallback()], **options)
    reference.train()
    parts.mkdir()
    (whole / "checkpoint-4").rename(parts / "checkpoint-4")
    trainer(build(), parts, [ExpertLoadCallback()], **{**options, "max_steps": 5, "save_strategy": "no"}).train()
    assert load(parts)[0][-1] == 5  # rows that the resumed training has to take back
    run = trainer(
        MoEForCausalLM.from_pretrained(parts / "checkpoint-4"), parts, [ExpertLoadCallback({"drop_rate": None})], **options
    )
    run.train(resume_from_checkpoint=str(parts / "checkpoint-4"))
    assert load(parts) == load(whole)
    assert moe_numbers(training_logs(run)) == moe_numbers(training_logs(reference))
    assert run.state.total_flos == reference.state.total_flos
    trainer(build(), parts, [ExpertLoadCallback()], max_steps=1).train()  # afresh: the old rows go
    assert load(parts)[0] == [1]


class StopsOnce(TrainerCallback):
    """Raises in the middle of the first training."""

    def __init__(self) -> None:
        self.raised = False

    def on_substep_end(self, args, state, control, **kwargs):
        if not self.raised:
            self.raised = True
            raise KeyboardInterrupt


def test_interrupted_training_leaves_nothing_behind(tmp_path: Path) -> None:
    """The forward before the interruption is not in the counts of the next training, and no listener listens twice."""
    model = build(router_type="sigmoid", router_bias_update_speed=0.25)
    callbacks = [ExpertLoadCallback(), LossFreeBalancingCallback(), StopsOnce()]
    run = trainer(model, tmp_path, callbacks, max_steps=1, gradient_accumulation_steps=2)
    with pytest.raises(KeyboardInterrupt):
        run.train()
    run.train()
    ((row),) = load(tmp_path)[1]
    assert [sum(layer) for layer in row] == OF_ONE_STEP
    expected = [[0.25 * ((c < statistics.mean(layer)) - (c > statistics.mean(layer))) for c in layer] for layer in row]
    assert [layer.gate.e_score_correction_bias.tolist() for layer in model.moe_layers] == expected
    assert model._routing_listeners == []


def test_memory_does_not_grow(tmp_path: Path) -> None:
    """10 000 forwards leave no more behind in the window than one."""
    callback = ExpertLoadCallback()
    model = build().train()
    model.add_routing_listener(callback._listen)
    ids = sequences()[0]["input_ids"].unsqueeze(0)
    records: list[RoutingRecord] = []
    model.add_routing_listener(records.append)
    model(input_ids=ids, labels=ids)
    size = len(json.dumps(callback.window.state()))
    for _ in range(9_999):
        callback.window.add(records[0])
    assert len(json.dumps(callback.window.state())) == size < 10_000
    total = callback.window.total()
    assert float(total.forwards) == 10_000
    assert [float(layer.sums["executed"].sum()) for layer in total.layers] == [10_000 * ids.numel() * TOP_K] * LAYERS


# ---------------------------------------------------------------------- alarms


class Spoil(TrainerCallback):
    """Does something to the model at a step."""

    def __init__(self, step: int, spoil) -> None:
        self.step, self.spoil = step, spoil

    @torch.no_grad()
    def on_step_end(self, args, state, control, model=None, **kwargs):
        if state.global_step == self.step:
            self.spoil(model)


def run_with(tmp_path: Path, model: MoEForCausalLM, step: int, spoil=lambda model: None, **options) -> ExpertLoadCallback:
    callback = ExpertLoadCallback()
    run = trainer(model, tmp_path, [callback, Spoil(step, spoil)], **{"max_steps": 6, "learning_rate": 0.0, **options})
    run.train()
    logged = [row["moe/alarms"] for row in training_logs(run)]
    assert logged[-1] == len(callback.alarms)
    texts = " ".join(row.get("moe/alarm", "") for row in run.state.log_history)
    assert all(alarm.message in texts for alarm in callback.alarms)
    return callback


def test_a_sound_run_raises_none(tmp_path: Path) -> None:
    assert run_with(tmp_path, build(router_aux_loss_coef=0.01), 1).alarms == []


def test_collapse(tmp_path: Path) -> None:
    (alarm,) = run_with(tmp_path, collapse(build()), 1).alarms
    assert (alarm.kind, alarm.step, alarm.value) == ("collapse", 3, EXPERTS / TOP_K)
    assert "layer 0 (and 2 more)" in alarm.message
    assert "raise `router_aux_loss_coef`" in alarm.message


def test_one_collapsed_layer_is_named(tmp_path: Path) -> None:
    """Where the mean over layers looks harmless."""
    model = build(num_experts=8)

    def spoil(model: MoEForCausalLM) -> None:
        model.moe_layers[1].gate.weight.zero_()  # equal scores: the first K

    (alarm,) = run_with(tmp_path, model, 1, spoil).alarms
    assert (alarm.kind, alarm.layer, alarm.step) == ("collapse", 1, 4)
    assert "layer 1:" in alarm.message


def test_exploding_logits(tmp_path: Path) -> None:
    def spoil(model: MoEForCausalLM) -> None:
        model.moe_layers[2].gate.weight.mul_(1000)

    alarms = run_with(tmp_path, build(), 2, spoil).alarms
    assert [(alarm.kind, alarm.layer, alarm.step) for alarm in alarms if alarm.kind == "logits"] == [("logits", 2, 3)]
    assert "router_z_loss_coef" in alarms[0].message


@pytest.mark.parametrize("value", [math.nan, math.inf])
def test_broken_router(tmp_path: Path, value: float) -> None:
    def spoil(model: MoEForCausalLM) -> None:
        model.moe_layers[1].gate.weight[2, 3] = value

    alarms = run_with(tmp_path, build(), 3, spoil).alarms
    assert [(alarm.kind, alarm.step, alarm.layer) for alarm in alarms] == [("not_finite", 4, 1)]


def test_router_losses_above_the_lm_loss(tmp_path: Path) -> None:
    (alarm,) = run_with(tmp_path, build(router_aux_loss_coef=1.0, router_z_loss_coef=50.0), 1).alarms
    assert (alarm.kind, alarm.step) == ("aux_loss", 1)
    assert "most is z_loss" in alarm.message


def test_drops(tmp_path: Path) -> None:
    (alarm,) = run_with(tmp_path, build(capacity_factor=0.5), 1).alarms
    assert alarm.kind == "drops"
    assert alarm.value > 0.4
    assert "Raise `capacity_factor`" in alarm.message
    by_design = run_with(tmp_path, build(router_type="gshard"), 1).alarms  # at random, whatever the capacity
    assert "drops" not in {alarm.kind for alarm in by_design}


def test_thresholds_can_be_set(tmp_path: Path) -> None:
    callback = ExpertLoadCallback(AlarmThresholds(load_max_over_mean=None))
    trainer(collapse(build()), tmp_path, [callback], max_steps=5).train()
    assert callback.alarms == []


@pytest.mark.parametrize("seed", [0, 1])
def test_the_papers_losses_mend_a_collapsed_run(tmp_path: Path, seed: int) -> None:
    """One hot expert: without balancing the alarm comes within 20 logs; with the paper's losses the load is even at the end."""
    ends = {}
    for name, coefficient in {"none": 0.0, "paper": 0.1}.items():
        torch.manual_seed(seed)
        model = build(
            num_experts=8, router_type="noisy_top_k", router_aux_loss_coef=0.0, router_importance_loss_coef=coefficient,
            router_load_loss_coef=coefficient,
        )  # fmt: skip
        for layer in model.moe_layers:  # the mean of the inputs' direction, so that expert 0 wins for most tokens
            with torch.no_grad():
                layer.gate.noise_weight.fill_(0.0)
                layer.gate.weight.normal_(std=0.05)
            layer.gate.register_forward_pre_hook(hot_expert)
        callback = ExpertLoadCallback()
        run = trainer(
            model, tmp_path / name, [callback], max_steps=70, learning_rate=5e-2, seed=seed, lr_scheduler_type="constant"
        )
        run.train()
        ends[name] = statistics.mean(row["moe/load_max_over_mean"] for row in training_logs(run)[-5:])
        first = [alarm.step for alarm in callback.alarms if alarm.kind == "collapse"]
        if name == "none":
            assert first
            assert first[0] <= 20
    assert ends["none"] > 2.5
    assert ends["paper"] <= 1.5


def hot_expert(gate: nn.Module, inputs: tuple) -> tuple:
    """Adds a constant to one hidden direction, and at the first call points expert 0 at it."""
    x_TD, *others = inputs
    if not getattr(gate, "is_hot", False):
        gate.is_hot = True
        with torch.no_grad():
            gate.weight[0, 0] = 1.5
    return (torch.cat([x_TD[:, :1] * 0 + 2.0, x_TD[:, 1:]], dim=-1), *others)


# ---------------------------------------------------------------------- FLOPs


def active_by_hand(model: MoEForCausalLM) -> int:
    """Parameters without embeddings, counting K of E experts of each layer."""
    count = 0
    for name, parameter in model.named_parameters():
        if "embed" in name:
            continue
        is_routed = ".experts." in name
        count += parameter.numel() * TOP_K // parameter.shape[0] if is_routed else parameter.numel()
    return count


@pytest.mark.parametrize("save_steps", [2, 100])
def test_flops_count_active_parameters(tmp_path: Path, save_steps: int) -> None:
    model = build(num_experts=[4, 8, 2], num_shared_experts=1)
    active = active_by_hand(model)
    assert model.num_active_parameters(exclude_embeddings=True) == active < model.num_parameters(exclude_embeddings=True)
    run = trainer(
        model, tmp_path, [ExpertLoadCallback(peak_flops=1e9)], max_steps=5, logging_steps=3, save_strategy="steps",
        save_steps=save_steps,
    )  # fmt: skip
    run.train()
    batch = collate(sequences())["input_ids"].numel()
    expected = 6 * batch * active * 5
    assert run.state.total_flos == pytest.approx(expected, rel=1e-9)
    assert run.state.log_history[-1]["total_flos"] == run.state.total_flos
    rows = [row for row in run.state.log_history if "moe/mfu" in row]
    assert len(rows) == 2
    assert all(row["moe/mfu"] == pytest.approx(row["moe/tflops_per_device"] * 1e3) for row in rows)
    last = run.state.log_history[-1]["step"]
    saved = json.loads((tmp_path / f"checkpoint-{last}" / "trainer_state.json").read_text())
    assert saved["total_flos"] == pytest.approx(expected, rel=1e-9)


# ---------------------------------------------------------------------- LossFreeBalancingCallback


class Biases(TrainerCallback):
    """Keeps the biases after every optimizer step, and how many forwards there were until then."""

    def __init__(self, records: Records) -> None:
        self.records = records
        self.seen: list[tuple[int, list[torch.Tensor]]] = []

    def on_step_end(self, args, state, control, model=None, **kwargs):
        biases = [layer.gate.e_score_correction_bias.clone() for layer in model.moe_layers]
        self.seen.append((len(self.records.layers), biases))


@pytest.mark.parametrize("accumulation", [1, 2])
def test_bias_moves_once_per_optimizer_step(tmp_path: Path, accumulation: int) -> None:
    speed = 0.0625
    model = build(router_type="sigmoid", router_bias_update_speed=speed)
    records = Records(model)
    biases = Biases(records)
    run = trainer(
        model, tmp_path, [LossFreeBalancingCallback(), biases], max_steps=3, logging_steps=2,
        gradient_accumulation_steps=accumulation, eval_strategy="steps", eval_steps=1,
    )  # fmt: skip
    run.train()
    assert [forwards for forwards, _ in biases.seen] == [accumulation, 2 * accumulation, 3 * accumulation]
    expected = [[0.0] * EXPERTS for _ in range(LAYERS)]
    for forwards, seen in biases.seen:
        for layer, counts in enumerate(records.total("counts", forwards - accumulation, forwards)):
            mean = statistics.mean(counts)
            for expert, count in enumerate(counts):
                expected[layer][expert] += speed * ((mean > count) - (mean < count))
        assert [bias.tolist() for bias in seen] == expected
    assert any(value for layer in expected for value in layer)
    # the last evaluation came after the last step, and changed nothing
    assert [layer.gate.e_score_correction_bias.tolist() for layer in model.moe_layers] == expected


def test_balancing_leaves_other_routers_alone(tmp_path: Path) -> None:
    callback = LossFreeBalancingCallback()
    model = build(router_type="top_k")
    trainer(model, tmp_path, [callback], max_steps=1).train()
    assert callback.window.is_empty
    assert model._routing_listeners == []


@pytest.mark.parametrize("model_type", ["deepseek_v3", "glm4_moe", "ernie4_5_moe", "lfm2_moe"])
def test_native_biases_move(tmp_path: Path, model_type: str) -> None:
    """Wherever the model keeps them: as many steps up or down as its experts were under or over the mean."""
    model = native_moe(model_type)
    rows = [{"input_ids": row["input_ids"] % model.config.vocab_size} for row in sequences()]
    watch = watch_routing(model, lambda record: None)
    watch.remove()
    before = [bias_of(router).clone() for router in watch.routers]
    callbacks = [ExpertLoadCallback(), LossFreeBalancingCallback(speed=0.25)]
    run = trainer(model, tmp_path, callbacks, max_steps=1)
    run.train_dataset = rows
    run.train()
    _, (executed,) = load(tmp_path)
    assert len(executed) == len(watch.routers) > 0
    for router, counts, old in zip(watch.routers, executed, before, strict=True):
        mean = statistics.mean(counts)
        moved = (bias_of(router) - old).flatten().tolist()
        assert moved == pytest.approx([0.25 * ((c < mean) - (c > mean)) for c in counts], abs=1e-6)
