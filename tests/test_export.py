"""MoEs of every dense family as native checkpoints: equal logits in stock Transformers, or a refusal that says why."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_moe.conversion.checkpoint_reader import open_checkpoint
from hf_moe.conversion.errors import ConversionError
from hf_moe.conversion.exporting import export, plan_export
from hf_moe.conversion.importing import import_moe
from hf_moe.conversion.native_docs import render
from hf_moe.conversion.native_formats import NATIVE_FORMATS
from native_models import DENSE, ROUTERS, loaded, moe_model
from safetensors.torch import load_file, save_file
from transformers import AutoConfig

_LLAMA = {
    "top_k": ["mixtral", "qwen2_moe", "granitemoe", "granitemoeshared"],
    "gated_shared": ["qwen2_moe"],
    "shared": ["granitemoeshared"],
    "sigmoid": ["glm4_moe", "solar_open"],
    "sigmoid_groups": ["glm4_moe"],
}
_QWEN2 = {**{router: [] for router in ROUTERS}, "top_k": ["qwen2_moe"], "gated_shared": ["qwen2_moe"],
          "sigmoid": ["glm4_moe", "solar_open"], "sigmoid_groups": ["glm4_moe"]}  # fmt: skip
_WINDOWS = {"top_k": ["qwen2_moe"], "gated_shared": ["qwen2_moe"], "shared": [], "sigmoid": [], "sigmoid_groups": []}
_GRANITE = {"top_k": ["granitemoe", "granitemoeshared"], "gated_shared": [], "shared": ["granitemoeshared"], "sigmoid": [],
            "sigmoid_groups": []}  # fmt: skip
_NONE: dict[str, list[str]] = {router: [] for router in ROUTERS}
_OLMO = {**_NONE, "top_k": ["flex_olmo"]}
# The formats that can say each family with each router.
FORMATS: dict[str, dict[str, list[str]]] = {
    "llama": _LLAMA,
    "llama_bias_tied_llama3": _GRANITE,
    "llama_dynamic": _LLAMA,
    "mistral": _LLAMA,
    "mistral_window": {**_WINDOWS, "top_k": ["mixtral", "qwen2_moe"]},
    "ministral": _WINDOWS,
    "cwm": _WINDOWS,
    "qwen2": _QWEN2,
    "qwen2_windows": _WINDOWS,
    "qwen3": {**_NONE, "top_k": ["qwen3_moe"], "sigmoid": ["dots1", "glm4_moe"], "sigmoid_groups": ["dots1", "glm4_moe"]},
    "qwen3_window_bias": {**_NONE, "top_k": ["qwen3_moe"], "sigmoid": ["dots1"], "sigmoid_groups": ["dots1"]},
    "seed_oss": _QWEN2,
    "seed_oss_no_bias": _LLAMA,
    "seed_oss_all_bias": _GRANITE,
    "smollm3": _LLAMA,
    "smollm3_without_rope": _NONE,
    "granite": _GRANITE,
    "olmo2": _OLMO,
    "olmo3": _OLMO,
    "olmo3_windows": _NONE,
    "ernie4_5": {**_NONE, "top_k": ["ernie4_5_moe"], "shared": ["ernie4_5_moe"]},
    "hunyuan_v1_dense": {**_NONE, "top_k": ["hunyuan_v1_moe"], "shared": ["hunyuan_v1_moe"]},
    "lfm2": {**_NONE, "sigmoid": ["lfm2_moe"]},
    "lfm2_plain_width": {**_NONE, "sigmoid": ["lfm2_moe"]},
    "youtu": {**_NONE, "sigmoid": ["deepseek_v3"], "sigmoid_groups": ["deepseek_v3"]},
}
ALWAYS_SHARED = {name for name, native in NATIVE_FORMATS.items() if native.needs_shared}


@pytest.mark.parametrize("family", DENSE)
def test_exports_compute_the_same_in_the_native_class(family: str, tmp_path: Path) -> None:
    for router in ROUTERS:
        source = tmp_path / router
        moe_model(family, router).save_pretrained(source)
        formats = FORMATS[family][router]
        for name in NATIVE_FORMATS.keys() - set(formats):
            with pytest.raises(ConversionError, match=rf"cannot be said as {name}: `.*`=.*must be"):
                plan_export(open_checkpoint(source), name)
        if not formats:
            with pytest.raises(ConversionError, match="no native format computes this"):
                plan_export(open_checkpoint(source))
            continue
        assert plan_export(open_checkpoint(source)).format == formats[0]
        _, expected, text = loaded(source)
        for name in formats:
            result = export(source, tmp_path / f"{router}_{name}", format=name)
            model, logits, native_text = loaded(tmp_path / f"{router}_{name}")
            assert type(model).__name__ == NATIVE_FORMATS[name].model_class
            torch.testing.assert_close(logits, expected, atol=1e-5, rtol=0)
            assert torch.equal(native_text, text)
            added = name in ALWAYS_SHARED and "num_shared_experts" not in ROUTERS[router]
            assert any("one of zeros was added" in note for note in result.notes) == added


@pytest.mark.parametrize(("family", "router"), [("llama", "top_k"), ("qwen3", "sigmoid_groups"), ("granite", "shared"),
                                                ("lfm2", "sigmoid"), ("qwen2", "gated_shared")])  # fmt: skip
def test_export_then_import_gives_equal_bytes(family: str, router: str, tmp_path: Path) -> None:
    source = tmp_path / "moe"
    moe_model(family, router).to(torch.bfloat16).save_pretrained(source)
    export(source, tmp_path / "native")
    import_moe(tmp_path / "native", tmp_path / "back")
    ours, theirs = (load_file(tmp_path / name / "model.safetensors") for name in ("moe", "back"))
    assert ours.keys() == theirs.keys()
    assert all(ours[name].dtype == theirs[name].dtype and torch.equal(ours[name], theirs[name]) for name in ours)
    assert AutoConfig.from_pretrained(tmp_path / "back").text_config.model_type in (DENSE[family][0], "mistral")


def test_an_export_loads_where_hf_moe_cannot_be_imported(tmp_path: Path) -> None:
    moe_model("qwen3", "top_k").save_pretrained(tmp_path / "moe")
    export(tmp_path / "moe", tmp_path / "native")
    _, expected, _ = loaded(tmp_path / "moe")
    script = """
import sys, torch
sys.modules["hf_moe"] = None  # importing it raises
from transformers import AutoModelForCausalLM
model, info = AutoModelForCausalLM.from_pretrained(sys.argv[1], dtype=torch.float32, output_loading_info=True)
assert not any(info.values()), info
ids = torch.randint(3, 99, (2, 20), generator=torch.Generator().manual_seed(1))
torch.save(model.eval()(ids, use_cache=False).logits.detach(), sys.argv[2])
"""
    environment = {**os.environ, "HF_HUB_OFFLINE": "1"}
    arguments = [sys.executable, "-c", script, str(tmp_path / "native"), str(tmp_path / "logits.pt")]
    subprocess.run(arguments, check=True, env=environment, cwd=tmp_path, timeout=300)
    torch.testing.assert_close(torch.load(tmp_path / "logits.pt"), expected, atol=1e-5, rtol=0)


def test_plans_need_neither_torch_nor_transformers(tmp_path: Path) -> None:
    moe_model("llama", "top_k").save_pretrained(tmp_path / "moe")
    export(tmp_path / "moe", tmp_path / "native")
    script = """
import sys
from pathlib import Path
folder = Path(sys.argv[1])
sys.argv[0] = "hf-moe"  # as the command line is started
from hf_moe.conversion.checkpoint_reader import open_checkpoint
from hf_moe.conversion.exporting import plan_export
from hf_moe.conversion.importing import plan_import
assert plan_export(open_checkpoint(folder / "moe")).format == "mixtral"
assert plan_import(open_checkpoint(folder / "native")).format == "mixtral"
assert not {"torch", "transformers"} & set(sys.modules)
"""
    subprocess.run([sys.executable, "-c", script, str(tmp_path)], check=True, timeout=300)


def test_config_is_said_in_old_words_too(tmp_path: Path) -> None:
    """Transformers 4, vLLM and llama.cpp read `rope_theta`, `rope_scaling` and `torch_dtype`."""
    moe_model("llama_dynamic", "top_k").to(torch.bfloat16).save_pretrained(tmp_path / "moe")
    export(tmp_path / "moe", tmp_path / "native", format="mixtral")
    config = json.loads((tmp_path / "native" / "config.json").read_text())
    assert (config["rope_theta"], config["rope_scaling"]) == (900.0, {"rope_type": "dynamic", "factor": 2.0})
    assert config["rope_parameters"] == {"rope_theta": 900.0, "rope_type": "dynamic", "factor": 2.0}
    assert config["torch_dtype"] == config["dtype"] == "bfloat16"
    assert (config["head_dim"], config["num_local_experts"], config["num_experts_per_tok"]) == (8, 4, 2)
    export(tmp_path / "moe", tmp_path / "qwen", format="qwen2_moe")
    config = json.loads((tmp_path / "qwen" / "config.json").read_text())
    assert config["norm_topk_prob"] is True  # the class's default is False
    assert (config["num_experts"], config["qkv_bias"]) == (4, False)


def test_old_words_are_read(tmp_path: Path) -> None:
    """`rope_theta` and `rope_scaling` beside, or instead of, `rope_parameters`."""
    moe_model("llama_dynamic", "top_k").save_pretrained(tmp_path / "moe")
    export(tmp_path / "moe", tmp_path / "native", format="mixtral")
    path = tmp_path / "native" / "config.json"
    config = json.loads(path.read_text())
    del config["rope_parameters"]
    path.write_text(json.dumps(config))
    import_moe(tmp_path / "native", tmp_path / "back")
    rope = AutoConfig.from_pretrained(tmp_path / "back").text_config.rope_parameters
    assert (rope["rope_theta"], rope["rope_type"], rope["factor"]) == (900.0, "dynamic", 2.0)


REFUSED: dict[str, tuple[dict[str, Any], str, str]] = {
    "noisy": ({"router_type": "noisy_top_k"}, "mixtral", "`router_type`='noisy_top_k': the router must be 'top_k' for mixtral"),
    "hash": ({"router_type": "hash"}, "mixtral", "`router_type`='hash': the router must be 'top_k' for mixtral"),
    "not_renormalised": (
        {"norm_topk_prob": False}, "mixtral", "`norm_topk_prob`=False: renormalising the kept weights must be True for mixtral"
    ),
    "pyramid": ({"num_experts": [4, 4, 8]}, "mixtral", "`num_experts`=[4, 4, 8]: the number of experts must be one number"),
    "residual": ({"residual_moe": True}, "mixtral", "`residual_moe`=True: a dense block beside the experts must be False"),
    "capacity": ({"eval_capacity_factor": 1.5}, "mixtral", "`eval_capacity_factor`=1.5: a capacity in evaluation must be None"),
    "sparse": ({"decoder_sparse_step": 2}, "mixtral", "`decoder_sparse_step`=2, `mlp_only_layers`=[]: the MoE layers must be"),
    "shared": ({"num_shared_experts": 1}, "mixtral", "`num_shared_experts`=1: the width of shared experts must be 0"),
    "ungated": (
        {"num_shared_experts": 1}, "qwen2_moe", "`use_shared_expert_gate`=False: the gate of shared experts must be True"
    ),
    "last_dense": (
        {"router_type": "sigmoid", "mlp_only_layers": [2]}, "glm4_moe", "the MoE layers must be all layers from some layer on"
    ),
    "small_groups": (
        {"router_type": "sigmoid", "n_group": 4, "topk_group": 2}, "glm4_moe", "each group has at least 2 of the 4 experts"
    ),
    "unknown": ({}, "mixtrall", "`format`='mixtrall' is not known. Choose 'auto', 'mixtral', 'qwen3_moe'"),
}  # fmt: skip


@pytest.mark.parametrize("case", REFUSED)
def test_what_a_format_cannot_say_is_named(case: str, tmp_path: Path) -> None:
    fields, name, message = REFUSED[case]
    moe_model("llama", "top_k", **fields).save_pretrained(tmp_path / "moe")
    with pytest.raises(ConversionError, match=re.escape(message)) as error:
        export(tmp_path / "moe", tmp_path / "native", format=name)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


def test_every_field_in_the_way_is_named_at_once(tmp_path: Path) -> None:
    moe_model("llama_bias_tied_llama3", "gated_shared").save_pretrained(tmp_path / "moe")
    with pytest.raises(ConversionError) as error:
        export(tmp_path / "moe", tmp_path / "native", format="mixtral")
    for field in (
        "text_config.attention_bias`=True",
        "decoder_sparse_step`=2",
        "norm_topk_prob`=False",
        "num_shared_experts`=1",
    ):
        assert field in str(error.value)
    with pytest.raises(ConversionError, match=r"Nearest: \w+: .* \| \w+: .* \| "):
        export(tmp_path / "moe", tmp_path / "native")


@pytest.mark.parametrize("fields", [{"router_type": "switch", "num_experts_per_tok": 1}, {"router_type": "gshard"}])
def test_routers_that_are_top_k_in_evaluation(fields: dict[str, Any], tmp_path: Path) -> None:
    moe_model("qwen3", "top_k", **fields).save_pretrained(tmp_path / "moe")
    export(tmp_path / "moe", tmp_path / "native", format="qwen3_moe")
    torch.testing.assert_close(loaded(tmp_path / "native")[1], loaded(tmp_path / "moe")[1], atol=1e-5, rtol=0)


def test_what_only_training_reads_is_left_out_with_a_note(tmp_path: Path) -> None:
    fields = {"router_z_loss_coef": 0.001, "router_jitter_noise": 0.1, "capacity_factor": 2.0}
    moe_model("qwen3", "top_k", **fields).save_pretrained(tmp_path / "moe")
    notes = export(tmp_path / "moe", tmp_path / "native").notes
    for name, value in fields.items():
        assert any(note.startswith(f"`{name}`={value}: read in training only") for note in notes)
    assert len(notes) == 3


@pytest.mark.parametrize("problem", ["dense", "family", "lost_expert", "lost_norm", "mlp_bias"])
def test_sources_that_are_not_what_they_say(problem: str, tmp_path: Path) -> None:
    model = moe_model("llama", "top_k")
    model.save_pretrained(tmp_path / "moe")
    path, weights = tmp_path / "moe" / "config.json", tmp_path / "moe" / "model.safetensors"
    config, tensors = json.loads(path.read_text()), load_file(weights)
    message = {
        "dense": "`model_type`='llama' is not a checkpoint of hf_moe",
        "family": "`text_config.model_type`='gpt2': no native format has this decoder",
        "lost_expert": "tensor `model.layers.1.mlp.experts.3.up_proj.weight` is missing",
        "lost_norm": "tensor `model.layers.2.input_layernorm.weight` is missing",
        "mlp_bias": "`mlp_bias`=True of llama is not supported here",
    }[problem]
    if problem == "dense":
        config = config["text_config"]
    elif problem == "family":
        config["text_config"]["model_type"] = "gpt2"
    elif problem == "mlp_bias":
        config["text_config"]["mlp_bias"] = True
    else:
        del tensors[message.split("`")[1]]
    path.write_text(json.dumps(config))
    save_file(tensors, weights, metadata={"format": "pt"})
    with pytest.raises(ConversionError, match=re.escape(message)):
        export(tmp_path / "moe", tmp_path / "native")
    assert not (tmp_path / "native").exists()


def test_destination_that_is_not_empty_is_refused(tmp_path: Path) -> None:
    moe_model("llama", "top_k").save_pretrained(tmp_path / "moe")
    with pytest.raises(FileExistsError, match="is not empty"):
        export(tmp_path / "moe", tmp_path / "moe")


def test_docs_are_those_of_the_table() -> None:
    path = Path(__file__).parent.parent / "docs" / "native_formats.md"
    assert path.read_text(encoding="utf-8") == render(), (
        "run `python -m hf_moe.conversion.native_docs > docs/native_formats.md`"
    )
