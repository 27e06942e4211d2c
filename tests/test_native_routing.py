"""The routing of native MoEs of Transformers, seen through hooks, against slow oracles."""

from __future__ import annotations

import copy
import functools
import gc
import importlib
import io
import json
import threading
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
import transformers
from hf_moe.training.native_moe_blocks import LEFT_OUT, ODD_BLOCKS, find_native_moe
from hf_moe.training.native_routing import bias_of, watch_native_routing
from native_moes import (
    MOE_FIELDS,
    NO_EXPERTS,
    check_layer,
    check_logits,
    classes_of_types,
    moe_types,
    native_moe,
    padded,
    returned_logits,
    spied,
)
from peft import LoraConfig, get_peft_model
from ranks import launch
from torch import Tensor, nn

from hf_moe import RoutingRecord

TYPES = moe_types()


def watched(model: nn.Module, **options: Any) -> tuple[Any, list[RoutingRecord]]:
    records: list[RoutingRecord] = []
    watch = watch_native_routing(model, records.append, **options)
    assert watch is not None
    return watch, records


def hooks_of(model: nn.Module) -> list[Any]:
    return [hook for m in model.modules() for hooks in (m._forward_hooks, m._forward_pre_hooks) for hook in hooks.values()]


def counts(record: RoutingRecord) -> list[list[float]]:
    return [layer.sums["counts"].tolist() for layer in record.layers]


def check(model: Any, batch: dict[str, Tensor], run: Any = None, real: Tensor | None = None) -> RoutingRecord:
    """Run once with the oracle beside the watch, and compare."""
    watch, records = watched(model)
    with spied(model) as executed:
        (model if run is None else run)(**batch)
    watch.remove()
    assert len(records) == 1
    calls = [call for calls in executed.values() for call in calls]
    real = batch["attention_mask"].bool() if real is None else real
    assert len(calls) == len(records[0].layers) == len(watch.layers)
    for layer, call in zip(records[0].layers, calls, strict=True):
        check_layer(layer, call, real)
    return records[0]


# ---------------------------------------------------------------------- every architecture


def test_tables_mean_something() -> None:
    """New MoEs of Transformers are in `TYPES` by themselves. Rows of tables that no longer mean anything have to go."""
    assert len(TYPES) > 50
    assert set(MOE_FIELDS) | set(NO_EXPERTS) <= set(TYPES)
    others = ("ernie4_5_vl_moe", "nllb_moe", "switch_transformers")  # not among the causal LMs
    files = [importlib.import_module(f"transformers.models.{name}.modeling_{name}") for name in others]
    assert {*ODD_BLOCKS, *LEFT_OUT} <= classes_of_types().union(*(dir(file) for file in files))


@pytest.mark.parametrize("model_type", TYPES)
def test_architecture(model_type: str) -> None:
    """Counts, gates and logits are those of the oracle, with padding on either side; the model does what it did before."""
    model = native_moe(model_type)
    if model_type in NO_EXPERTS:
        assert watch_native_routing(model, print) is None
        return
    for side in ("right", "left"):
        batch = padded(side)
        real = batch["attention_mask"].bool()
        torch.manual_seed(0)
        plain = model(**batch).loss.item()
        torch.manual_seed(0)
        record = check(model, batch)
        assert record.lm_loss is not None
        assert record.lm_loss.item() == plain
        assert not any(value.requires_grad for layer in record.layers for value in layer.sums.values())
        if model_type in ("doge", "gemma4_text"):  # have no logits; return probabilities by that name
            continue
        all_logits = returned_logits(model, batch)
        if model_type == "jetmoe":
            all_logits = all_logits[2::3]  # those of a layer's attention come first, twice
        for layer, logits in zip(record.layers[-len(all_logits) :], all_logits, strict=True):
            check_logits(layer, logits, real)


def test_gemma4_probabilities() -> None:
    model, batch = native_moe("gemma4_text"), padded("left")
    record, real = check(model, batch), batch["attention_mask"].bool().reshape(-1)
    for layer, probs in zip(record.layers, returned_logits(model, batch), strict=True):
        torch.testing.assert_close(layer.sums["probs"], probs[real].sum(dim=0), rtol=1e-4, atol=1e-5)


@pytest.mark.parametrize("class_name", ["SwitchTransformers", "NllbMoe"])
def test_left_out(class_name: str) -> None:
    config_class = getattr(transformers, f"{class_name}Config")
    sizes = {"vocab_size": 64, "d_model": 16, "d_kv": 4, "d_ff": 16, "num_layers": 2, "num_heads": 2, "num_experts": 2,
             "encoder_layers": 2, "decoder_layers": 2, "encoder_ffn_dim": 16, "decoder_ffn_dim": 16,
             "encoder_sparse_step": 1}  # fmt: skip
    model = getattr(transformers, f"{class_name}Model")(config_class(**sizes))
    assert any(type(module).__name__ in LEFT_OUT for module in model.modules())
    assert watch_native_routing(model, print) is None
    assert not hooks_of(model)


# ---------------------------------------------------------------------- how it is run


@pytest.mark.parametrize("use_reentrant", [False, True])
@pytest.mark.parametrize("model_type", ["mixtral", "glm4_moe", "gpt_oss", "llama4_text", "zaya"])
def test_gradient_checkpointing(model_type: str, use_reentrant: bool) -> None:
    """The recompute does not count, also when several forwards come before the backwards."""
    model = native_moe(model_type)
    batches = [padded(side, seed=seed) for seed, side in enumerate(("right", "left"))]
    plain = [counts(check(model, batch)) for batch in batches]
    model.gradient_checkpointing_enable({"use_reentrant": use_reentrant})
    watch, records = watched(model)
    losses = [model(**batch, use_cache=False).loss for batch in batches]
    for loss in losses:
        loss.backward()
    assert [counts(record) for record in records] == plain
    assert all(p.grad is not None for p in watch.routers[0].parameters() if p.requires_grad)
    watch.remove()


@pytest.mark.parametrize("implementation", ["eager", "grouped_mm", "batched_mm"])
@pytest.mark.parametrize("model_type", ["olmoe", "deepseek_v3", "granitemoeshared", "gpt_oss", "ernie4_5_moe", "phimoe"])
def test_experts_implementation(model_type: str, implementation: str) -> None:
    model = native_moe(model_type)
    model.set_experts_implementation(implementation)
    check(model, padded("right"))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float64])
@pytest.mark.parametrize("model_type", ["mixtral", "qwen3_moe", "lfm2_moe", "llama4_text"])
def test_dtype(model_type: str, dtype: torch.dtype) -> None:
    """More tokens than bf16 can count."""
    model, batch = native_moe(model_type).to(dtype), padded("left", (700, 650))
    if dtype == torch.float64 and model_type != "llama4_text":
        model.set_experts_implementation("eager")
    record = check(model, batch)
    assert max(max(row) for row in counts(record)) > 256
    if dtype == torch.float64:
        for layer, logits in zip(record.layers, returned_logits(model, batch), strict=True):
            probs = logits[batch["attention_mask"].bool().reshape(-1)].softmax(dim=-1).sum(dim=0)
            torch.testing.assert_close(layer.sums["probs"], probs.double(), rtol=1e-5, atol=1e-8)


@pytest.mark.parametrize("kind", ["none", "4d", "positional", "embeds", "autocast"])
def test_inputs(kind: str) -> None:
    model, batch = native_moe("qwen2_moe"), padded("right")
    real = batch["attention_mask"].bool()
    if kind == "none":  # packed rows have positions that start again, and no padding
        real = torch.ones_like(real)
        batch = {"input_ids": batch["input_ids"], "position_ids": (torch.arange(10) % 4).repeat(2, 1)}
    elif kind == "4d":
        allowed = torch.ones(10, 10).tril().bool() & real[:, None, None, :]
        batch["attention_mask"] = allowed
    elif kind == "embeds":
        batch["inputs_embeds"] = model.get_input_embeddings()(batch.pop("input_ids")).detach()
    run = model
    if kind == "positional":
        run = functools.partial(lambda **inputs: model(inputs["input_ids"], inputs["attention_mask"], labels=inputs["labels"]))
    with torch.autocast("cpu", torch.bfloat16, enabled=kind == "autocast"):
        check(model, batch, run, real)


def test_vision_language_model() -> None:
    """The text decoder is watched, and not the vision tower."""
    text = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
            "num_key_value_heads": 2, "head_dim": 8, "num_experts": 4, "num_experts_per_tok": 2, "moe_intermediate_size": 16,
            "rope_parameters": {"rope_type": "default", "rope_theta": 1e4, "mrope_section": [2, 1, 1]}}  # fmt: skip
    vision = {"depth": 1, "hidden_size": 16, "intermediate_size": 16, "num_heads": 2, "out_hidden_size": 32,
              "deepstack_visual_indexes": [0]}  # fmt: skip
    config = transformers.Qwen3VLMoeConfig(text_config=text, vision_config=vision)
    config.text_config.output_router_logits = True
    model = transformers.Qwen3VLMoeForConditionalGeneration(config).train()
    watch, records = watched(model)
    assert watch.layers == [0, 1]
    assert watch.coefficients == {"aux_loss": config.text_config.router_aux_loss_coef}
    batch = padded("left")
    outputs = model(**batch)
    assert [sum(row) for row in counts(records[0])] == [28, 28]
    assert records[0].lm_loss.item() < outputs.loss.item()
    watch.remove()


def test_training_only() -> None:
    model, batch = native_moe("mixtral"), padded("right")
    watch, records = watched(model)
    everything, seen = watched(model, in_eval=True, keep_routing=True)
    model.eval()(**batch)
    model.generate(batch["input_ids"][:1], max_new_tokens=3, do_sample=False)
    with torch.no_grad():
        model.train()(**batch)
    assert not records
    assert len(seen) == 5
    model(**batch)
    assert len(records) == 1
    assert len(seen) == 6
    assert counts(records[0]) == counts(seen[-1]) == counts(seen[0])
    assert records[0].layers[0].routing is None
    for record in seen:
        for layer in record.layers:
            plan = layer.routing
            weights = torch.zeros(4).scatter_add(0, plan.expert_ids_TK[record_mask(record, plan)].flatten(), torch.ones(99999))
            assert weights.tolist() == layer.sums["executed"].tolist()
    watch.remove()
    everything.remove()
    assert not hooks_of(model)


def record_mask(record: RoutingRecord, plan: Any) -> Tensor:
    mask = record.token_mask
    return torch.ones(plan.expert_ids_TK.shape[0], dtype=torch.bool) if mask is None else mask.reshape(-1)


def test_cached_generation_with_left_padding() -> None:
    """Steps with a cache have masks longer than their tokens."""
    model, batch = native_moe("qwen3_moe").eval(), padded("left")
    watch, records = watched(model, in_eval=True)
    model.generate(batch["input_ids"], attention_mask=batch["attention_mask"], max_new_tokens=4, min_new_tokens=4)
    assert [record.layers[0].sums["tokens"].item() for record in records] == [14, 2, 2, 2]
    watch.remove()


# ---------------------------------------------------------------------- robustness


@pytest.mark.parametrize("where", ["first layer", "last layer", "loss"])
def test_a_forward_that_raises(where: str) -> None:
    model, batch = native_moe("olmoe"), padded("right")
    expected = counts(check(model, batch))
    watch, records = watched(model)
    broken = {"first layer": model.model.layers[0].mlp.experts, "last layer": model.model.layers[2], "loss": model.lm_head}[
        where
    ]
    handle = broken.register_forward_pre_hook(lambda *args: 1 / 0)
    for _ in range(2):
        with pytest.raises(ZeroDivisionError):
            model(**batch)
    handle.remove()
    model.model(input_ids=batch["input_ids"], attention_mask=batch["attention_mask"])  # the decoder alone
    model(**batch)
    assert [counts(record) for record in records] == [expected, expected]
    assert records[0].lm_loss is None
    watch.remove()


def test_threads() -> None:
    """Threads that run the same modules at once, as `DataParallel` does, do not see each other's tokens."""
    model = native_moe("mixtral")
    batches = [padded("right", (9, length), seed=length) for length in range(2, 8)]
    expected = [counts(check(model, batch)) for batch in batches]
    watch, records = watched(model)

    def run(batch: dict[str, Tensor]) -> None:
        for _ in range(5):
            model(**batch).loss.backward()

    threads = [threading.Thread(target=run, args=(batch,)) for batch in batches]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    watch.remove()
    found = sorted(counts(record) for record in records)
    assert found == sorted(expected * 5)


def test_a_listener_that_runs_the_model() -> None:
    model, batch = native_moe("olmoe"), padded("right")
    seen: list[RoutingRecord] = []

    def listener(record: RoutingRecord) -> None:
        seen.append(record)
        with torch.no_grad():
            model(input_ids=batch["input_ids"])

    watch = watch_native_routing(model, listener)
    model(**batch)
    model(**batch)
    assert watch is not None
    watch.remove()
    assert len(seen) == 2
    assert counts(seen[0]) == counts(seen[1]) == counts(check(model, batch))


def test_blocks_that_run_twice_or_not_at_all() -> None:
    model, batch = native_moe("mixtral"), padded("right")
    watch, records = watched(model)
    first, second = model.model.layers[0], model.model.layers[1]
    model.model.layers = nn.ModuleList([first, first, second])  # the third is skipped
    model(**batch, use_cache=False)
    watch.remove()
    assert [layer.sums["tokens"].item() for layer in records[0].layers] == [28, 14, 0]
    assert [sum(row) for row in counts(records[0])] == [56, 28, 0]
    assert all(len(term_L) == 3 for term_L in records[0].terms.values())


def test_logits_are_let_go() -> None:
    model, batch = native_moe("qwen3_moe"), padded("right")
    watch, records = watched(model)
    logits: list[weakref.ref[Tensor]] = []
    handle = watch.routers[0].register_forward_hook(lambda m, args, output: logits.append(weakref.ref(output[0])))
    model(**batch).loss.backward()
    handle.remove()
    gc.collect()
    assert len(logits) == 1
    assert logits[0]() is None
    assert records[0].layers[0].router_logits is None
    assert model.config.output_router_logits is False
    watch.remove()
    assert not hooks_of(model)


def test_copies_tell_nobody() -> None:
    model, batch = native_moe("mixtral"), padded("right")
    watch, records = watched(model, in_eval=True)
    buffer = io.BytesIO()
    torch.save(model, buffer)
    buffer.seek(0)
    for copied in (copy.deepcopy(model), torch.load(buffer, weights_only=False)):
        copied(**batch)
        assert not records
    model(**batch)
    assert len(records) == 1
    watch.remove()


class Gate(nn.Linear):
    num_experts, top_k = 4, 3

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        weights, ids = super().forward(x_TD).topk(3, dim=-1)
        return weights, ids.masked_fill(weights < 0, 4)  # an empty slot


class CustomExperts(nn.Module):
    def forward(self, x_TD: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        return x_TD * top_k_weights.sum(dim=-1, keepdim=True)


class CustomBlock(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.gate, self.experts = Gate(8, 4), CustomExperts()

    def forward(self, x_TD: Tensor) -> Tensor:
        weights, ids = self.gate(x_TD)
        return self.experts(x_TD, top_k_weights=weights, top_k_index=ids)


def test_a_block_of_somebody_else() -> None:
    """Empty slots count as nothing; what a router returns is not taken for logits unless its model says so."""
    torch.manual_seed(0)
    model = nn.Sequential(CustomBlock(), nn.Linear(8, 8), CustomBlock())
    watch, records = watched(model, keep_routing=True)
    model(torch.randn(20, 8))
    assert watch.layers == [0, 2]
    assert (watch.num_experts, watch.top_k, watch.coefficients) == ([4, 4], 3, {})
    for layer in records[0].layers:
        ids = layer.routing.expert_ids_TK.flatten().tolist()
        assert layer.sums["counts"].tolist() == [ids.count(expert) for expert in range(4)]
        assert sum(layer.sums["counts"].tolist()) < 60
        assert set(layer.sums) == {"tokens", "counts", "executed"}
    watch.remove()


# ---------------------------------------------------------------------- losses


@pytest.mark.parametrize("model_type", ["mixtral", "jetmoe", "dbrx", "granitemoe", "qwen3_next"])
def test_native_router_loss_is_not_part_of_the_lm_loss(model_type: str) -> None:
    name = {"jetmoe": "aux_loss_coef"}.get(model_type, "router_aux_loss_coef")
    changes: dict[str, Any] = {} if model_type == "dbrx" else {name: 0.25}
    model, batch = native_moe(model_type, output_router_logits=True, **changes), padded("right")
    watch, records = watched(model)
    outputs = model(**batch)
    plain = model(**batch, output_router_logits=False)
    watch.remove()
    assert outputs.loss.item() > plain.loss.item()
    for record in records:
        assert record.lm_loss is not None
        assert record.lm_loss.item() == pytest.approx(plain.loss.item(), rel=1e-6)
        assert not record.adds_up
    coefficient = getattr(model, name)
    assert watch.coefficients == {"aux_loss": coefficient}
    assert watched(native_moe(model_type))[0].coefficients == {}


def test_native_router_loss_is_k_times_ours() -> None:
    model, batch = native_moe("mixtral", num_hidden_layers=1, num_experts_per_tok=3, output_router_logits=True), padded("right")
    watch, records = watched(model)
    outputs = model(**batch)
    watch.remove()
    assert records[0].terms["aux_loss"].shape == (1,)
    assert outputs.aux_loss.item() == pytest.approx(3 * records[0].terms["aux_loss"].item(), rel=1e-5)


@pytest.mark.parametrize("as_tensor", [True, False])
def test_micro_batches_add_up(as_tensor: bool) -> None:
    model, batch = native_moe("olmoe", output_router_logits=True), padded("right", (12, 7, 5, 10))
    num_items = batch["labels"][:, 1:].ne(-100).sum()
    watch, records = watched(model)
    model(**batch)
    for rows in (slice(0, 1), slice(1, 4)):
        part = {name: value[rows] for name, value in batch.items()}
        model(**part, num_items_in_batch=num_items if as_tensor else num_items.item())
    watch.remove()
    whole, *parts = records
    assert [record.adds_up for record in records] == [False, True, True]
    torch.testing.assert_close(sum(part.lm_loss for part in parts), whole.lm_loss)
    shares = [part["labels"] for part in ({"labels": batch["labels"][:1]}, {"labels": batch["labels"][1:]})]
    for part, labels in zip(parts, shares, strict=True):
        share = labels[:, 1:].ne(-100).sum() / num_items
        for name, term_L in part.terms.items():
            assert term_L.shape == (3,)
            expected = torch.stack([layer.losses()[name] for layer in part.layers]) * share
            torch.testing.assert_close(term_L, expected)


def test_loss_that_is_scaled_in_place_later() -> None:
    model, batch = native_moe("deepseek_v3"), padded("right")
    watch, records = watched(model)
    loss = model(**batch).loss
    value = loss.item()
    with torch.no_grad():
        loss.mul_(2)
    assert records[0].lm_loss is not None
    assert records[0].lm_loss.item() == value
    watch.remove()


# ---------------------------------------------------------------------- the bias

BIASES = {
    "deepseek_v3": "gate.e_score_correction_bias", "ernie4_5_moe": "gate.moe_statics.e_score_correction_bias",
    "afmoe": "expert_bias", "lfm2_moe": "expert_bias", "minimax_m2": "e_score_correction_bias",
    "hy_v3": "e_score_correction_bias",
    "zaya": "gate.balancing_biases", "longcat_flash": "router.e_score_correction_bias",
}  # fmt: skip


@pytest.mark.parametrize("model_type", BIASES)
def test_bias(model_type: str) -> None:
    """It is the model's own tensor: moved in place, it draws every token to an expert."""
    model, batch = native_moe(model_type), padded("right")
    watch, records = watched(model)
    assert find_native_moe(model) is not None
    for router, site in zip(watch.routers, find_native_moe(model).rows, strict=True):
        bias = bias_of(router)
        assert bias is not None
        assert bias.shape == (site.num_experts,)
        owner, _, name = BIASES[model_type].rpartition(".")
        assert bias.data_ptr() == getattr(site.block.get_submodule(owner), name).data_ptr()
        with torch.no_grad():
            bias[2] += 100
    model(**batch)
    assert [row[2] for row in counts(records[0])] == [14] * len(watch.layers)
    watch.remove()


def test_no_bias() -> None:
    for model_type in ("mixtral", "deepseek_v2", "gpt_oss"):
        assert [bias_of(router) for router in watched(native_moe(model_type))[0].routers].count(None) > 1


# ---------------------------------------------------------------------- wrappers

ADAPTERS = {
    "attention": {"target_modules": ["q_proj", "q_a_proj"]},
    "experts": {"target_modules": [], "target_parameters": ["mlp.experts.gate_up_proj", "mlp.experts.down_proj"]},
    "router": {"target_modules": [], "target_parameters": ["mlp.gate.weight"]},
    "saved router": {"target_modules": ["q_proj", "q_a_proj"], "modules_to_save": ["gate"]},
    "saved block": {"target_modules": ["q_proj", "q_a_proj"], "modules_to_save": ["mlp"]},
}


@pytest.mark.parametrize("adapter", ADAPTERS)
@pytest.mark.parametrize("model_type", ["mixtral", "deepseek_v3"])
def test_peft(model_type: str, adapter: str) -> None:
    native = native_moe(model_type)
    model = get_peft_model(native, LoraConfig(r=2, lora_alpha=64, init_lora_weights=False, **ADAPTERS[adapter])).train()
    batch = padded("left")
    watch, records = watched(model)
    with spied(model) as executed:
        outputs = model(**batch)
    outputs.loss.backward()
    calls = [call for calls in executed.values() for call in calls]
    assert len(calls) == len(records[0].layers) == len(watch.routers) == len(watch.layers)
    for layer, call in zip(records[0].layers, calls, strict=True):
        check_layer(layer, call, batch["attention_mask"].bool())
        assert "probs" in layer.sums
    assert records[0].lm_loss is not None
    assert records[0].lm_loss.item() == outputs.loss.item()
    assert watch.model is native
    assert (bias_of(watch.routers[0]) is None) == (model_type == "mixtral")
    if "saved" in adapter:
        assert all(p.requires_grad for name, p in watch.routers[0].named_parameters() if "original_module" not in name)
    watch.remove()
    assert not hooks_of(model)


def test_prompt_tuning_adds_tokens() -> None:
    from peft import PromptTuningConfig

    model = get_peft_model(native_moe("mixtral"), PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)).train()
    watch, records = watched(model)
    model(**padded("right"))
    assert [layer.sums["tokens"].item() for layer in records[0].layers] == [20] * 3
    watch.remove()


@pytest.fixture
def forget_compiled_code() -> Any:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


@pytest.mark.parametrize("backend", ["eager", "aot_eager"])
def test_compile(backend: str, forget_compiled_code: None) -> None:
    """In one graph with its checkpoint, also for a watch that came after it was compiled."""
    model = native_moe("mixtral", num_hidden_layers=1)
    model.set_experts_implementation("grouped_mm")
    batches = [padded(side, seed=seed) for seed, side in enumerate(("right", "left"))]
    expected = [check(model, batch) for batch in batches]
    model.gradient_checkpointing_enable({"use_reentrant": False})
    compiled = torch.compile(model, backend=backend, fullgraph=True)
    if backend == "eager":
        compiled(**batches[0], use_cache=False)
    watch, records = watched(model)
    for batch in batches:
        compiled(**batch, use_cache=False).loss.backward()
    watch.remove()
    for record, plain in zip(records, expected, strict=True):
        assert counts(record) == counts(plain)
        torch.testing.assert_close(record.lm_loss, plain.lm_loss)
        assert not any(value.requires_grad for value in (*record.terms.values(), record.lm_loss))
    compiled(**batches[0], use_cache=False)  # what is left in the graph tells nobody
    assert len(records) == 2


def test_compiled_layers(forget_compiled_code: None) -> None:
    """As `accelerate` compiles regions: the blocks' hooks in graphs, the forward around them not."""
    model, batch = native_moe("mixtral", num_hidden_layers=2), padded("right")
    model.set_experts_implementation("grouped_mm")
    expected = counts(check(model, batch))
    for index, layer in enumerate(model.model.layers):
        model.model.layers[index] = torch.compile(layer, backend="eager")
    watch, records = watched(model)
    model(**batch).loss.backward()
    assert watch.layers == [0, 1]
    assert counts(records[0]) == expected
    watch.remove()


# ---------------------------------------------------------------------- several processes


def test_distributed(tmp_path: Path) -> None:
    """DDP, FSDP2, expert parallelism and tensor parallelism on two ranks: the counts are those of one process."""
    for world, name in ((1, "one"), (2, "two")):
        launch(world, "native_routing_worker.py", tmp_path / f"{name}.json")
    one, two = (json.loads((tmp_path / f"{name}.json").read_text()) for name in ("one", "two"))
    assert two.keys() == one.keys()
    for name, found in two.items():
        assert found["num_experts"] == one[name]["num_experts"]
        assert found["counts"] == one[name]["counts"], name
        assert found["probs"] == pytest.approx(one[name]["probs"], rel=1e-4), name
