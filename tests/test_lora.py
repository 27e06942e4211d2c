"""Expert LoRA with PEFT: what is adapted, its gradients, adapters that are saved, loaded, merged and exported per expert."""

from __future__ import annotations

import copy
import json
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_moe.training import (
    ExpertLoadCallback,
    LossFreeBalancingCallback,
    export_expert_adapters,
    moe_lora_config,
    read_expert_load,
    watch_routing,
)
from hf_moe.training.lora import KINDS, lora_summary
from peft import LoraConfig, PeftModel, get_peft_model
from safetensors.torch import load_file, save_file
from tiny import ALL_LOSSES, padded_batch, tensors_on_disk, tiny, token_ids
from torch import Tensor, nn
from torch.func import functional_call
from trainer_cut import collate, sequences
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, Trainer, TrainingArguments
from transformers.pytorch_utils import Conv1D

from hf_moe import MoEForCausalLM, MoELayer

NOISY = {"router_type": "noisy_top_k", "mlp_only_layers": [1]}
SIGMOID = {"router_type": "sigmoid", "num_shared_experts": 1, "mlp_only_layers": [0]}
LOSSES = {name: value for name, value in ALL_LOSSES.items() if name != "router_load_loss_coef"}  # that one needs noise
RESIDUAL = {"residual_moe": True, "num_experts_per_tok": 1}
_SIZES: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 24, "num_hidden_layers": 2,
    "num_attention_heads": 4, "num_key_value_heads": 2, "num_experts_per_tok": 2, "max_position_embeddings": 64,
    "initializer_range": 0.2, "eos_token_id": 2, "pad_token_id": 0,
}  # fmt: skip
NATIVE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4},
    "olmoe": {"num_experts": 4},
    "qwen3_moe": {"num_experts": 4},
    "qwen2_moe": {"num_experts": 4, "shared_expert_intermediate_size": 16},
    "deepseek_v3": {
        "n_routed_experts": 4, "n_group": 2, "topk_group": 1, "first_k_dense_replace": 1, "q_lora_rank": 8, "kv_lora_rank": 8,
        "qk_nope_head_dim": 8, "qk_rope_head_dim": 8, "v_head_dim": 8, "num_key_value_heads": 4,
    },
    "gpt_oss": {"num_local_experts": 4, "head_dim": 8, "rope_parameters": {"rope_type": "default", "rope_theta": 1e4}},
}  # fmt: skip


def native(name: str) -> nn.Module:
    torch.manual_seed(0)
    return AutoModelForCausalLM.from_config(CONFIG_MAPPING[name](**{**_SIZES, **NATIVE[name]})).eval()


def adapted(model: nn.Module, seed: int = 1, **options: Any) -> PeftModel:
    """With adapters that are trained as far as one can see: no matrix of theirs is 0."""
    model = get_peft_model(model, moe_lora_config(model, **{"r": 4, "verbose": False, **options}))
    shake(model, seed)
    return model.eval()


@torch.no_grad()
def shake(model: nn.Module, seed: int = 1) -> None:
    """Change all that is trained."""
    generator = torch.Generator().manual_seed(seed)
    for name, value in [*model.named_parameters(), *model.named_buffers()]:
        if getattr(value, "requires_grad", False) or ("modules_to_save" in name and "bias" in name):
            value += 0.1 * torch.randn(value.shape, generator=generator, dtype=torch.float32).to(value.dtype)


@torch.no_grad()
def logits_of(model: nn.Module) -> Tensor:
    return model.eval()(input_ids=token_ids()).logits


def trained(model: nn.Module) -> dict[str, Tensor]:
    return {name: parameter for name, parameter in model.named_parameters() if parameter.requires_grad}


# ---------------------------------------------------------------------- what is adapted

FAMILIES = ["llama", "qwen3", "gemma2", "phi3", "gpt2", "gpt_neox", "opt", "phi", "starcoder2", "falcon"]
OPTIONS: list[dict[str, Any]] = [{}, {"router": True}, {"experts": False}, {"attention": False}, {"shared_experts": False}]


@pytest.mark.parametrize("family", FAMILIES)
def test_the_table_is_what_peft_trains(family: str) -> None:
    """Part by part: PEFT adapts the modules that the table says, with as many parameters."""
    for options in OPTIONS if family in ("llama", "gpt2") else OPTIONS[:2]:
        model = tiny(family, num_shared_experts=1, mlp_only_layers=[1])
        linears = [name for name, module in model.named_modules() if isinstance(module, nn.Linear | Conv1D)]
        size, modules = model.num_parameters(), dict(model.named_modules())
        config = moe_lora_config(model, r=3, verbose=False, **options)
        summary = lora_summary(model, config)
        assert summary.total == size
        model = get_peft_model(model, config)
        names = trained(model)
        assert sum(parameter.numel() for parameter in names.values()) == summary.trained
        wrapped = {name.removeprefix("base_model.model.").partition(".lora_")[0] for name in names if ".lora_" in name}
        in_layers = {name for name in linears if ".layers." in name or ".h." in name}
        mixers = {name for name in in_layers if "attn" in name or "attention" in name}
        shared = {name for name in in_layers if "shared_experts" in name}
        experts = {name for name, module in modules.items() if name.endswith(".experts")}
        dense = in_layers - mixers - shared
        assert len(mixers) == summary["attention projections"].modules
        assert len(shared) == summary["shared experts"].modules
        assert len(dense) == summary["dense FFNs"].modules
        expected = set() if options == {"attention": False} else mixers
        if options != {"experts": False}:
            expected = expected | experts | {f"{name}.base_layer" for name in experts} | dense
            expected |= set() if options == {"shared_experts": False} else shared
        assert wrapped == expected
        whole = {name for name in names if ".lora_" not in name}
        assert bool(whole) == ("router" in options)
        assert all(".mlp.gate." in name or ".fc1.gate." in name for name in whole)


@pytest.mark.parametrize("name", NATIVE)
def test_native_moe(name: str, tmp_path: Path) -> None:
    """The table is true, a step changes what is trained and nothing else, and the adapter reloads to equal logits."""
    for options in ({}, {"router": True, "attention": False}):
        model = native(name)
        untouched, base = copy.deepcopy(model), {n: p.detach().clone() for n, p in model.named_parameters()}
        config = moe_lora_config(model, r=4, verbose=False, **options)
        summary = lora_summary(model, config)
        assert summary.total == sum(value.numel() for value in base.values())
        assert all(row.modules == 0 or row.adapted for row in summary.rows if row.kind in KINDS[1:4])
        model = get_peft_model(model, config)
        assert sum(parameter.numel() for parameter in trained(model).values()) == summary.trained
        optimizer = torch.optim.AdamW(trained(model).values(), lr=0.05)
        for _ in range(2):  # A has no gradient while B is 0
            model.train()(**padded_batch()).loss.backward()
            optimizer.step()
            optimizer.zero_grad()
        for key, value in model.named_parameters():
            if not value.requires_grad:
                own = key.removeprefix("base_model.model.").replace(".base_layer", "").replace(".original_module", "")
                assert torch.equal(value, base[own]), key
        expected = logits_of(model)
        assert (expected - logits_of(untouched)).abs().max() > 1e-3
        model.save_pretrained(tmp_path / str(len(options)))
        loaded = PeftModel.from_pretrained(untouched, str(tmp_path / str(len(options))))
        assert torch.equal(logits_of(loaded), expected)
        torch.testing.assert_close(logits_of(loaded.merge_and_unload()), expected, rtol=1e-4, atol=1e-5)


def test_the_table_is_printed_once(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny(**SIGMOID)
    config = moe_lora_config(model, router=True)
    lines = capsys.readouterr().out.splitlines()
    assert "\n".join(lines) == str(lora_summary(model, config))
    assert [line.split("  ")[0] for line in lines[1:-1]] == list(KINDS)
    assert "LoRA, a pair per expert" in lines[2]
    assert "trained whole" in lines[5]
    assert lines[6].endswith("frozen")
    assert lines[-1].startswith("LoRA with r=8, lora_alpha=16")
    monkeypatch.setenv("RANK", "1")
    moe_lora_config(model)
    monkeypatch.delenv("RANK")
    moe_lora_config(model, verbose=False)
    assert capsys.readouterr().out == ""


@pytest.mark.parametrize(
    ("fields", "options", "message"),
    [
        ({}, {"lora_dropout": 0.1}, "`lora_dropout`=0.1 is not possible on 'mlp.experts.down_proj'"),
        ({}, {"use_dora": True}, "`use_dora`=True is not possible"),
        ({}, {"target_modules": ["q_proj"]}, "`target_modules`=.'q_proj'. says where adapters go"),
        ({}, {"layers_to_transform": [0]}, "`layers_to_transform`=.0. says"),
        ({}, {"shared_experts": True}, "`shared_experts`=True, but `model` of class MoEForCausalLM has no shared experts"),
        ({}, {"dense_ffns": True}, "no dense FFNs"),
        ({}, {"attention": False, "experts": False}, "Nothing is to be adapted"),
    ],
)
def test_what_cannot_be_is_refused(fields: dict, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        moe_lora_config(tiny(**fields), verbose=False, **options)
    assert "\n" not in str(error.value)


def test_a_model_without_experts_or_with_adapters_is_refused() -> None:
    with pytest.raises(ValueError, match="has no routed experts"):
        moe_lora_config(tiny().language_model.lm_head, verbose=False)
    with pytest.raises(ValueError, match="has adapters already"):
        moe_lora_config(adapted(tiny()), verbose=False)


def test_dropout_and_further_fields_where_they_are_possible() -> None:
    config = moe_lora_config(
        tiny(), experts=False, lora_dropout=0.1, use_rslora=True, modules_to_save=["lm_head"], verbose=False
    )
    assert (config.lora_dropout, config.use_rslora, config.modules_to_save) == (0.1, True, ["lm_head"])
    assert config.target_parameters is None
    config = moe_lora_config(tiny("gpt2"), experts=False, lora_dropout=0.1, verbose=False)
    assert (config.fan_in_fan_out, set(config.target_modules)) == (True, {"attn.c_attn", "attn.c_proj"})


@pytest.mark.parametrize("pattern", [{"gate_up_proj": 6}, {".*layers.0.*down_proj": 2, "q_proj": 5}])
def test_ranks_by_pattern_are_counted(pattern: dict[str, int]) -> None:
    model = tiny()
    config = moe_lora_config(model, rank_pattern=pattern, verbose=False)
    summary = lora_summary(model, config)
    assert sum(p.numel() for p in trained(get_peft_model(model, config)).values()) == summary.trained


# ---------------------------------------------------------------------- gradients

CASES: list[tuple[str, dict[str, Any]]] = [
    ("llama", {}),
    ("llama", {**RESIDUAL, **LOSSES}),
    ("gpt2", {"capacity_factor": 1.0, **LOSSES}),
    ("llama_biases", {**SIGMOID, "mlp_only_layers": [0, 2]}),
    ("phi3", {"num_experts": 1, "num_experts_per_tok": 1}),
    ("llama", {"router_type": "expert_choice", "allow_non_causal": True}),
]


def explicit_pairs(model: PeftModel, r: int) -> dict[str, tuple[list[Tensor], list[Tensor]]]:
    """A_e and B_e of every stacked matrix, as leaves of their own, by the matrix's name in the base model."""
    state = model.state_dict()
    found = {}
    for name in state:
        module, is_inner, _ = name.partition(".base_layer.lora_A.")
        if "lora_A" not in name or ".experts." not in name:
            continue
        module = module if is_inner else name.partition(".lora_A.")[0]
        layer: Any = model.get_submodule(module).get_base_layer()
        matrix = "down_proj" if not is_inner else "gate_up_proj" if layer.has_gate else "up_proj"
        experts = layer.num_experts
        a, b = state[name], state[name.replace("lora_A", "lora_B")]
        a_E = [a.reshape(experts, r, -1)[e].clone().requires_grad_() for e in range(experts)]
        b_E = [b.reshape(-1, r, experts)[:, :, e].clone().requires_grad_() for e in range(experts)]
        found[f"{module.removeprefix('base_model.model.')}.{matrix}"] = (a_E, b_E)
    return found


@pytest.mark.parametrize("implementation", ["eager", "batched_mm"])
@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize(("family", "fields"), CASES, ids=str)
def test_gradients_of_the_pairs(family: str, fields: dict, checkpointing: bool, implementation: str) -> None:
    """Loss and gradients equal those of W_e + scale · B_e A_e, written out expert by expert, in fp64."""
    r, alpha = 3, 5.0
    base = tiny(family, text={"num_hidden_layers": 2 if "mlp_only_layers" not in fields else 3}, **fields).double().train()
    base.set_experts_implementation(implementation)
    plain = copy.deepcopy(base)
    model = adapted(base, attention=False, shared_experts=False, dense_ffns=False, r=r, lora_alpha=alpha).train()
    if checkpointing:
        model.gradient_checkpointing_enable()
    loss = model(**padded_batch()).loss
    loss.backward()

    pairs = explicit_pairs(model, r)
    weights = dict(plain.named_parameters())
    merged = {
        name: torch.stack([weights[name][e] + alpha / r * b_E[e] @ a_E[e] for e in range(len(a_E))])
        for name, (a_E, b_E) in pairs.items()
    }
    expected = functional_call(plain, merged, (), padded_batch()).loss
    expected.backward()
    assert len(pairs) == 2 * len(plain.moe_layers)
    assert abs(loss.item() - expected.item()) < 1e-10
    for name, (a_E, b_E) in pairs.items():
        module, _, matrix = name.rpartition(".")
        wrapper = model.get_submodule(f"base_model.model.{module}" + ("" if matrix == "down_proj" else ".base_layer"))
        a, b = wrapper.lora_A["default"].weight.grad, wrapper.lora_B["default"].weight.grad
        want_a = torch.cat([x.grad if x.grad is not None else torch.zeros_like(x) for x in a_E])
        want_b = torch.stack([x.grad if x.grad is not None else torch.zeros_like(x) for x in b_E], dim=2).flatten(1)
        assert want_b.abs().max() > 1e-6
        assert (a - want_a).abs().max() < 1e-10
        assert (b - want_b).abs().max() < 1e-10


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_experts_implementations_agree(dtype: torch.dtype) -> None:
    """A grouped GEMM, a batched one and the loop see the same adapted weights."""
    model = adapted(tiny().to(dtype))
    tolerance = 1e-4 if dtype == torch.float32 else 0.15
    results, gradients = [], []
    for implementation in ("eager", "batched_mm", "grouped_mm"):
        model.get_base_model().set_experts_implementation(implementation)
        results.append(logits_of(model).float())
        model.zero_grad()
        model(input_ids=token_ids(), labels=token_ids()).loss.backward()
        gradients.append(torch.cat([p.grad.float().flatten() for name, p in trained(model).items() if "experts" in name]))
    for result, gradient in zip(results[1:], gradients[1:], strict=True):
        assert (result - results[0]).abs().max() < tolerance * results[0].abs().max()
        assert (gradient - gradients[0]).norm() < tolerance * gradients[0].norm()
    assert gradients[0].norm() > 0


# ---------------------------------------------------------------------- routers


@pytest.mark.parametrize("router", [False, True])
@pytest.mark.parametrize("fields", [NOISY, SIGMOID, {"use_shared_expert_gate": True, "num_shared_experts": 1}], ids=str)
def test_routers(fields: dict, router: bool, tmp_path: Path) -> None:
    """Left alone they are the same to the bit; trained, they stay fp32 in a bf16 model and are saved with all they have."""
    model = tiny(**fields, **ALL_LOSSES if fields is NOISY else {}).to(torch.bfloat16)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    model = get_peft_model(model, moe_lora_config(model, router=router, r=4, verbose=False))
    options = {"max_steps": 2, "learning_rate": 1e-2, "logging_steps": 1, "per_device_train_batch_size": 8}
    args = TrainingArguments(
        str(tmp_path), use_cpu=True, report_to="none", save_strategy="no", disable_tqdm=True, bf16=True, **options
    )
    callbacks = [ExpertLoadCallback(), *([LossFreeBalancingCallback()] if router else [])]
    Trainer(model, args, train_dataset=sequences(), data_collator=collate, callbacks=callbacks).train()
    rows = read_expert_load(tmp_path / "expert_load.safetensors").executed
    tokens = sum(len(row["input_ids"]) for row in sequences())
    assert rows.sum() == tokens * 2 * len(model.get_base_model().moe_layers)
    model.save_pretrained(tmp_path / "adapter")
    saved = {name for name in load_file(tmp_path / "adapter" / "adapter_model.safetensors") if ".lora_" not in name}
    merged = model.merge_and_unload()
    after = merged.state_dict()
    decides = {name for name in before if ".gate." in name or "shared_expert_gate" in name}
    changed = {name for name in decides if not torch.equal(after[name], before[name])}
    assert changed == (decides if router else set())
    assert {name.removeprefix("base_model.model.") for name in saved} == changed
    assert all(after[name].dtype == torch.float32 for name in decides if ".gate." in name)
    assert after["language_model.model.layers.2.mlp.experts.down_proj"].dtype == torch.bfloat16


def test_a_watch_sees_through_the_adapters() -> None:
    """The routing of an adapted model, its disabled adapters included, is told; a forward without gradients is not."""
    model = adapted(tiny(), router=True).train()
    records = []
    watch = watch_routing(model, records.append)
    model(**padded_batch())
    with torch.no_grad():
        model(**padded_batch())
    with model.disable_adapter():
        model(**padded_batch())
    watch.remove()
    model(**padded_batch())
    assert watch.layers == [0, 1, 2]
    sums = [[layer.sums["executed"].sum().item() for layer in record.layers] for record in records]
    assert sums == [[25 * 2.0] * 3] * 2


# ---------------------------------------------------------------------- save, load, merge

SAVED: dict[str, tuple[str, dict[str, Any], dict[str, Any]]] = {
    "sigmoid": ("llama", SIGMOID, {"router": True}),
    "gpt2": ("gpt2", {}, {}),
    "opt": ("opt", NOISY, {"router": True}),
    "hierarchical": ("phi3", {"router_type": "hierarchical", "n_group": 2, "topk_group": 2}, {"router": True}),
    "experts only": ("qwen3", {}, {"attention": False, "use_rslora": True}),
}
_FRESH_PROCESS = """
import sys, torch
from pathlib import Path
import hf_moe
from peft import AutoPeftModelForCausalLM, PeftModel
from transformers import AutoModelForCausalLM
from tiny import token_ids
found = {}
for folder in sorted(Path(sys.argv[1]).iterdir()):
    base = lambda: AutoModelForCausalLM.from_pretrained(folder / "base")
    adapter = str(folder / "adapter")
    own = base()
    own.load_adapter(adapter)
    models = [PeftModel.from_pretrained(base(), adapter), AutoPeftModelForCausalLM.from_pretrained(adapter), own]
    models.append(AutoModelForCausalLM.from_pretrained(folder / "merged"))
    with torch.no_grad():
        found[folder.name] = [model.eval()(input_ids=token_ids()).logits for model in models]
torch.save(found, sys.argv[2])
"""


def test_adapters_load_in_a_fresh_process(tmp_path: Path) -> None:
    """By all three ways of loading, to equal logits; merged, they are ordinary checkpoints with a tensor per expert."""
    expected, merged_logits = {}, {}
    for name, (family, fields, options) in SAVED.items():
        folder = tmp_path / "models" / name
        tiny(family, **fields).save_pretrained(folder / "base")
        model = adapted(AutoModelForCausalLM.from_pretrained(folder / "base"), **options)
        expected[name] = logits_of(model)
        model.save_pretrained(folder / "adapter")
        merged = model.merge_and_unload()
        assert type(merged) is MoEForCausalLM
        torch.testing.assert_close(logits_of(merged), expected[name], rtol=1e-4, atol=1e-5)
        merged_logits[name] = logits_of(merged)
        merged.save_pretrained(folder / "merged")
        assert tensors_on_disk(folder / "merged").keys() == tensors_on_disk(folder / "base").keys()
        assert any(".experts.3.down_proj.weight" in key for key in tensors_on_disk(folder / "merged"))
    command = [sys.executable, "-c", _FRESH_PROCESS, str(tmp_path / "models"), str(tmp_path / "found.pt")]
    subprocess.run(command, check=True, cwd=Path(__file__).parent, capture_output=True, timeout=300)
    for name, found in torch.load(tmp_path / "found.pt").items():
        for logits in found[:3]:
            assert torch.equal(logits, expected[name]), name
        assert torch.equal(found[3], merged_logits[name]), name


def test_several_adapters(tmp_path: Path) -> None:
    """One model, two adapters: each can be chosen, merged and unmerged, and switched off."""
    model = tiny()
    without = logits_of(model)
    model = adapted(model)
    first = logits_of(model)
    model.add_adapter("second", moe_lora_config(tiny(), r=2, verbose=False))
    model.set_adapter("second")
    assert torch.equal(logits_of(model), without)  # B is 0
    shake(model, seed=2)
    second = logits_of(model)
    assert (second - first).abs().max() > 1e-2
    model.save_pretrained(tmp_path)
    model.set_adapter("default")
    assert torch.equal(logits_of(model), first)
    model.merge_adapter(["second"])
    torch.testing.assert_close(logits_of(model), second, rtol=1e-4, atol=1e-5)
    model.unmerge_adapter()
    torch.testing.assert_close(logits_of(model), first, rtol=1e-4, atol=1e-5)
    with model.disable_adapter():
        torch.testing.assert_close(logits_of(model), without, rtol=1e-4, atol=1e-5)
    other = PeftModel.from_pretrained(tiny(), str(tmp_path), adapter_name="default")
    other.load_adapter(str(tmp_path / "second"), "second")
    assert torch.equal(logits_of(other), first)
    other.set_adapter("second")
    assert torch.equal(logits_of(other), second)


# ---------------------------------------------------------------------- one pair per expert


class PerExpert(nn.Module):
    """Modules with the names of a checkpoint's weights, one for each, as a model with experts of their own would have."""

    prepare_inputs_for_generation = None  # PEFT looks for it

    def __init__(self, weights: dict[str, Tensor]) -> None:
        super().__init__()
        for name, weight in weights.items():
            path, _, leaf = name.rpartition(".")
            if leaf != "weight" or weight.dim() != 2:
                continue
            parent: Any = self
            for part in path.split(".")[:-1]:
                if part not in parent._modules:
                    parent.add_module(part, nn.Module())
                parent = parent._modules[part]
            parent.add_module(path.rpartition(".")[2], self.linear(path, weight))

    @staticmethod
    def linear(path: str, weight: Tensor) -> nn.Module:
        if path.rpartition(".")[2] in ("c_attn", "c_proj"):
            layer: nn.Module = Conv1D(weight.shape[1], weight.shape[0])
        else:
            layer = nn.Linear(weight.shape[1], weight.shape[0], bias=False)
        layer.weight = nn.Parameter(weight.clone())
        return layer


@pytest.mark.parametrize(
    ("family", "fields", "options"),
    [
        ("llama", {}, {}),
        ("llama", SIGMOID, {"router": True, "rank_pattern": {"gate_up_proj": 6}, "alpha_pattern": {"experts.down_proj": 3}}),
        ("gpt2", {}, {"use_rslora": True}),
        ("opt", {"mlp_only_layers": [1]}, {}),
        ("llama", {"num_experts": 6, "mlp_only_layers": [0]}, {"attention": False, "r": 1}),
    ],
    ids=str,
)
def test_export(family: str, fields: dict, options: dict, tmp_path: Path) -> None:
    """PEFT loads the export into a model of per-expert modules, and merged there, every weight is that of the merged model."""
    base = tiny(family, **fields).double()
    base.save_pretrained(tmp_path / "base")
    model = adapted(base, **options)
    model.save_pretrained(tmp_path / "adapter")
    assert export_expert_adapters(tmp_path / "adapter", tmp_path / "export") == tmp_path / "export"
    assert {path.name for path in (tmp_path / "export").iterdir()} == {"adapter_config.json", "adapter_model.safetensors"}

    tensors = load_file(tmp_path / "export" / "adapter_model.safetensors")
    on_disk = tensors_on_disk(tmp_path / "base")
    pairs = [name for name in tensors if ".lora_" in name]
    for name in pairs:
        assert f"{name.removeprefix('base_model.model.').partition('.lora_')[0]}.weight" in on_disk
    per_expert = PeftModel.from_pretrained(PerExpert(on_disk), str(tmp_path / "export"))
    assert {name for name, _ in per_expert.named_parameters() if ".lora_" in name} == {
        name.replace(".weight", ".default.weight") for name in pairs
    }
    merged = dict(per_expert.merge_and_unload().named_parameters())
    model.merge_and_unload().save_pretrained(tmp_path / "merged")
    for name, weight in tensors_on_disk(tmp_path / "merged").items():
        if name in merged and (".gate." not in name or options.get("router")):
            torch.testing.assert_close(merged[name].double(), weight.double(), rtol=0, atol=1e-12)
    assert any(not torch.equal(merged[name], on_disk[name]) for name in merged if ".experts.2." in name)


@pytest.mark.parametrize("implementation", ["llama", "gpt_oss"])
def test_exported_deltas_are_exact(implementation: str, tmp_path: Path) -> None:
    """Of matrices of small whole numbers, whose products are exact: B_e A_e of the export is PEFT's delta, to the bit."""
    model: Any = tiny() if implementation == "llama" else native("gpt_oss")
    if implementation == "gpt_oss":
        model.save_pretrained(tmp_path / "base")
        model = AutoModelForCausalLM.from_pretrained(tmp_path / "base")
    model = adapted(model, r=4, lora_alpha=8)
    generator = torch.Generator().manual_seed(0)
    for parameter in trained(model).values():
        parameter.data = torch.randint(-3, 4, parameter.shape, generator=generator).to(parameter.dtype)
    model.save_pretrained(tmp_path / "adapter")
    export_expert_adapters(tmp_path / "adapter", tmp_path / "export")
    tensors = load_file(tmp_path / "export" / "adapter_model.safetensors")

    def delta(expert: int, matrix: str) -> Tensor:
        prefix = f"base_model.model.model.layers.1.mlp.experts.{expert}.{matrix}"
        return 2.0 * tensors[f"{prefix}.lora_B.weight"] @ tensors[f"{prefix}.lora_A.weight"]

    inside = "language_model." if implementation == "llama" else ""
    down = model.get_submodule(f"base_model.model.{inside}model.layers.1.mlp.experts")
    down_E, up_E = down.get_delta_weight("default"), down.base_layer.get_delta_weight("default")
    for expert in range(4):
        if implementation == "gpt_oss":  # `[in, out]`, gate and up by turns
            gate, up, down_OI = up_E[expert].T[::2], up_E[expert].T[1::2], down_E[expert].T
        else:
            (gate, up), down_OI = up_E[expert].chunk(2), down_E[expert]
        assert torch.equal(delta(expert, "gate_proj"), gate)
        assert torch.equal(delta(expert, "up_proj"), up)
        assert torch.equal(delta(expert, "down_proj"), down_OI)
        assert gate.abs().sum() > 0


def _no_config(folder: Path) -> None:
    (folder / "adapter_config.json").unlink()


def _other_kind(folder: Path) -> None:
    _change_config(folder, peft_type="LOHA")


def _no_experts(folder: Path) -> None:
    _change_config(folder, target_parameters=None)


def _cut(folder: Path) -> None:
    path = folder / "adapter_model.safetensors"
    tensors = load_file(path)
    name = next(name for name in tensors if "experts.lora_A" in name)
    save_file({**tensors, name: tensors[name][:-1].contiguous()}, path)


def _change_config(folder: Path, **fields: Any) -> None:
    path = folder / "adapter_config.json"
    path.write_text(json.dumps({**json.loads(path.read_text()), **fields}))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (_no_config, "has no adapter_config.json"),
        (_other_kind, "holds a LOHA adapter"),
        (_no_experts, "adapts no stacked experts"),
        (_cut, "are no pairs of rank 4"),
    ],
)
def test_a_refused_export_leaves_nothing(spoil: Callable[[Path], None], message: str, tmp_path: Path) -> None:
    adapted(tiny()).save_pretrained(tmp_path / "adapter")
    spoil(tmp_path / "adapter")
    with pytest.raises(ValueError, match=message):
        export_expert_adapters(tmp_path / "adapter", tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]


def test_an_export_that_fails_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    adapted(tiny()).save_pretrained(tmp_path / "adapter")

    def fail(*args: Any, **kwargs: Any) -> None:
        raise OSError("disk full")

    monkeypatch.setattr("hf_moe.training.lora_export.json.dumps", fail)
    with pytest.raises(OSError, match="disk full"):
        export_expert_adapters(tmp_path / "adapter", tmp_path / "export")
    assert [path.name for path in tmp_path.iterdir()] == ["adapter"]
    monkeypatch.undo()
    (tmp_path / "export").mkdir()
    with pytest.raises(ValueError, match="exists"):
        export_expert_adapters(tmp_path / "adapter", tmp_path / "export")


def test_a_summary_of_another_config() -> None:
    """Of a `LoraConfig` of one's own, half of the attention is told as half."""
    summary = lora_summary(tiny(), LoraConfig(r=2, target_modules=["q_proj", "v_proj"]))
    assert summary["attention projections"].how == "LoRA (in 6 of 12)"
    assert summary["routed experts"].how == "frozen"
    assert isinstance(tiny().moe_layers[0], MoELayer)
