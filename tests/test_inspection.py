# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""What `inspect_checkpoint` reads from headers is what torch counts in the model itself."""

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, text_config
from hf_moe.conversion.checkpoint_reader import open_checkpoint
from hf_moe.conversion.errors import ConversionError
from hf_moe.conversion.inspection import inspect_checkpoint, inspect_tensors
from huggingface_hub.errors import OfflineModeIsEnabled
from safetensors.torch import save_file
from tiny import tiny
from torch import nn
from torch.utils.flop_counter import FlopCounterMode
from transformers import CONFIG_MAPPING, AutoModelForCausalLM, PreTrainedModel

CONTEXT = 8  # not above the window of the families that have one

_SMALL: dict[str, Any] = {
    "vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "moe_intermediate_size": 16, "num_hidden_layers": 3,
    "num_attention_heads": 4, "num_key_value_heads": 2, "max_position_embeddings": 128, "pad_token_id": 0,
}  # fmt: skip
_LATENT = {
    "num_key_value_heads": 4, "n_group": 2, "topk_group": 1, "q_lora_rank": 16, "kv_lora_rank": 16, "qk_rope_head_dim": 8,
    "qk_nope_head_dim": 8, "v_head_dim": 8, "head_dim": 8,
}  # fmt: skip
_DEEPSEEK = {"n_routed_experts": 8, "num_experts_per_tok": 2, "n_shared_experts": 1, "first_k_dense_replace": 1}
NATIVE: dict[str, dict[str, Any]] = {
    "mixtral": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "qwen2_moe": {"num_experts": 4, "num_experts_per_tok": 2, "shared_expert_intermediate_size": 24},
    "qwen3_moe": {"num_experts": 4, "num_experts_per_tok": 2, "head_dim": 8, "decoder_sparse_step": 2},
    "olmoe": {"num_experts": 4, "num_experts_per_tok": 2},
    "deepseek_v2": {**_DEEPSEEK, **_LATENT},
    "deepseek_v3": {**_DEEPSEEK, **_LATENT},
    "glm4_moe": {**_DEEPSEEK, "head_dim": 8},
    "granitemoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "gpt_oss": {"num_local_experts": 4, "num_experts_per_tok": 2, "head_dim": 8},
    "phimoe": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "hunyuan_v1_moe": {"num_experts": 4, "moe_topk": 2, "head_dim": 8},
}
OURS: dict[str, dict[str, Any]] = {
    "top_k": {},
    "hash": {"router_type": "hash"},
    "noisy_top_k": {"router_type": "noisy_top_k"},
    "sigmoid": {"router_type": "sigmoid", "num_experts": 8, "n_group": 2},
    "hierarchical": {"router_type": "hierarchical", "n_group": 2, "topk_group": 2},
    "shared": {"num_shared_experts": 2, "use_shared_expert_gate": True},
    "residual": {"residual_moe": True},
    "pyramid": {"num_experts": [2, 4, 8]},
    "every_other": {"decoder_sparse_step": 2},
}


def native(name: str) -> PreTrainedModel:
    torch.manual_seed(0)
    config = CONFIG_MAPPING[name](**{**_SMALL, **NATIVE[name]})
    return AutoModelForCausalLM.from_config(config, attn_implementation="eager", experts_implementation="eager").eval()


def ours(name: str, family: str = "llama") -> PreTrainedModel:
    model = tiny(family, **OURS[name])
    model.set_attn_implementation("eager")  # torch counts the FLOPs of plain products
    model.set_experts_implementation("eager")
    return model


@torch.no_grad()
def parameters_of_one_token(model: PreTrainedModel) -> int:
    """By hand: those of every module that one token passes, and of stacked experts the share of those chosen."""
    seen: dict[int, float] = {}

    def count(module: nn.Module, args: Any, output: Any) -> None:
        for parameter in module.parameters(recurse=False):
            share = 1.0
            if parameter.dim() == 3 or hasattr(module, "down_proj_bias"):  # the plain loop is given the ids of the chosen
                ids = next(a for a in args if isinstance(a, torch.Tensor) and a.dtype == torch.int64)
                share = ids.unique().numel() / len(parameter)
            seen[id(parameter)] = parameter.numel() * share

    handles = [module.register_forward_hook(count) for module in model.modules()]
    model(torch.tensor([[5]]), use_cache=False)
    for handle in handles:
        handle.remove()
    return round(sum(seen.values()))


@torch.no_grad()
def flops_per_token(model: PreTrainedModel) -> float:
    """As torch counts the products of a forward in which every token attends to all (masked or not)."""
    ids = torch.randint(3, 100, (1, CONTEXT), generator=torch.Generator().manual_seed(0))
    with FlopCounterMode(display=False) as counter:
        model(ids, use_cache=False)
    return counter.get_total_flops() / CONTEXT


@pytest.mark.parametrize("family", FAMILIES)
def test_dense(family: str, tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(text_config(family), attn_implementation="eager").eval()
    model.save_pretrained(tmp_path)
    found = inspect_checkpoint(tmp_path, CONTEXT)
    assert found.parameters == found.active_parameters == model.num_parameters()
    assert found.flops_per_token == flops_per_token(model)
    assert found.experts == {}
    assert found.router is None
    assert "experts" not in str(found)


@pytest.mark.parametrize("name", OURS)
@pytest.mark.parametrize("family", ["llama_biases", "gpt2"])
def test_ours(family: str, name: str, tmp_path: Path) -> None:
    model: Any = ours(name, family)
    model.save_pretrained(tmp_path)
    found = inspect_checkpoint(tmp_path, CONTEXT)
    assert found.parameters == model.num_parameters()
    assert found.active_parameters == parameters_of_one_token(model)
    assert found.flops_per_token == flops_per_token(model)
    assert list(found.experts) == model.config.moe_layers
    assert list(found.experts.values()) == model.config.num_experts_per_layer
    assert found.num_experts_per_tok == 2
    assert found.router is not None
    assert found.router.startswith(model.config.router_type)


@pytest.mark.parametrize("name", NATIVE)
def test_native(name: str, tmp_path: Path) -> None:
    """Per-expert names and stacked ones, latent attention, shared experts, dense layers among the others."""
    model = native(name)
    model.save_pretrained(tmp_path)
    found = inspect_checkpoint(tmp_path, CONTEXT)
    assert found.parameters == model.num_parameters()
    assert found.flops_per_token == flops_per_token(model)
    if name not in ("granitemoe", "hunyuan_v1_moe"):  # these do not hand ids to their experts' module
        assert found.active_parameters == parameters_of_one_token(model)
    experts = NATIVE[name].get("num_experts") or NATIVE[name].get("num_local_experts") or NATIVE[name]["n_routed_experts"]
    assert set(found.experts.values()) == {experts}
    assert found.num_experts_per_tok == 2


def test_stored_twice_or_not_at_all(tmp_path: Path) -> None:
    """A tied head counts once, whether it is stored or not; buffers and layers that are not loaded do not count."""
    model = AutoModelForCausalLM.from_config(text_config("llama_tied"))
    model.save_pretrained(tmp_path)
    plain = inspect_checkpoint(tmp_path)
    tensors = {name: open_checkpoint(tmp_path).tensor(name) for name in open_checkpoint(tmp_path).tensors}
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"].clone()
    tensors["model.layers.0.self_attn.rotary_emb.inv_freq"] = torch.ones(4)
    tensors["model.layers.3.mlp.up_proj.weight"] = torch.ones(4, 4)  # a layer for multi-token prediction
    save_file(tensors, tmp_path / "model.safetensors")
    found = inspect_checkpoint(tmp_path)
    assert found.parameters == plain.parameters == model.num_parameters()
    assert found.flops_per_token == plain.flops_per_token
    assert found.nbytes == plain.nbytes + (128 * 32 + 4 + 16) * 4


def test_bytes_by_dtype(tmp_path: Path) -> None:
    tiny("llama").to(torch.bfloat16).save_pretrained(tmp_path, max_shard_size="30KB")
    found = inspect_checkpoint(tmp_path)
    assert found.dtypes["F32"] == 3 * 4 * 32 * 4  # the routers
    assert found.nbytes == sum(found.dtypes.values()) == sum(t.nbytes for t in open_checkpoint(tmp_path).tensors.values())


def test_attention_looks_no_further_than_its_window(tmp_path: Path) -> None:
    AutoModelForCausalLM.from_config(text_config("gemma2", sliding_window=16)).save_pretrained(tmp_path)
    costs = {context: inspect_checkpoint(tmp_path, context).attention_flops for context in (16, 1000)}
    per_position = 2 * 4 * (8 + 8)  # scores and values of 4 heads of width 8
    assert costs[16] == 3 * 16 * per_position
    assert costs[1000] == (2 * 16 + 1000) * per_position  # sliding, full, sliding


def test_table_and_json(tmp_path: Path) -> None:
    ours("shared").save_pretrained(tmp_path)
    found = inspect_checkpoint(tmp_path)
    text = str(found)
    for words in ("MoE in 0-2", "4 per MoE layer, 2 per token", "top_k (norm_topk_prob=True)", "context of 128", "2 per MoE"):
        assert words in text
    content = json.loads(found.to_json())
    assert content["parameters"] == found.parameters
    assert content["flops_per_token"] == found.flops_per_token
    assert found.summary in text


def test_without_the_number_of_chosen_experts_nothing_is_made_up(tmp_path: Path) -> None:
    native("mixtral").save_pretrained(tmp_path)
    checkpoint = open_checkpoint(tmp_path)
    config = {name: value for name, value in checkpoint.config.items() if name != "num_experts_per_tok"}
    found = inspect_tensors("here", config, checkpoint.tensors.values())
    assert found.active_parameters is None
    assert found.flops_per_token is None
    assert "unknown per token" in str(found)


def test_no_torch_and_fast(tmp_path: Path) -> None:
    tiny("llama").save_pretrained(tmp_path)
    code = (
        "import sys, time; sys.argv = ['hf-moe']; start = time.time()\n"
        "from hf_moe.conversion.inspection import inspect_checkpoint\n"
        f"print(inspect_checkpoint({str(tmp_path)!r}).summary)\n"
        "assert not {'torch', 'transformers', 'huggingface_hub'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
    assert "active per token" in done.stdout


def test_errors_are_one_line(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def offline(*args: Any, **kwargs: Any) -> None:
        raise OfflineModeIsEnabled("Cannot reach the Hub:\noffline mode is enabled.")

    monkeypatch.setattr("huggingface_hub.hf_hub_download", offline)
    save_file({"a": torch.ones(2)}, tmp_path / "model.safetensors")
    (tmp_path / "config.json").write_text('{"model_type": "other"}')
    for path, message in (
        (tmp_path / "nowhere", "no such folder"),
        ("org/model", "not fetched from the Hub .*offline mode"),
        (tmp_path, "num_hidden_layers"),
    ):
        with pytest.raises(ConversionError, match=message) as error:
            inspect_checkpoint(path)
        assert "\n" not in str(error.value)


def test_headers_from_the_hub(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Only config.json and headers are asked for; what they say is what the files say."""
    from huggingface_hub.utils import SafetensorsFileMetadata, SafetensorsRepoMetadata
    from huggingface_hub.utils import TensorInfo as HubTensorInfo

    tiny("llama").save_pretrained(tmp_path)
    tensors = {
        info.name: HubTensorInfo(dtype=info.dtype, shape=list(info.shape), data_offsets=(0, info.nbytes))  # type: ignore[arg-type]
        for info in open_checkpoint(tmp_path).tensors.values()
    }
    metadata = SafetensorsRepoMetadata(
        metadata=None, sharded=False, weight_map=dict.fromkeys(tensors, "model.safetensors"),
        files_metadata={"model.safetensors": SafetensorsFileMetadata(metadata={}, tensors=tensors)},
    )  # fmt: skip
    monkeypatch.setattr("huggingface_hub.hf_hub_download", lambda name, file: str(tmp_path / file))
    monkeypatch.setattr("huggingface_hub.HfApi.get_safetensors_metadata", lambda self, name: metadata)
    found, expected = inspect_checkpoint("org/model-that-is-nowhere"), inspect_checkpoint(tmp_path)
    assert found.to_json() == expected.to_json().replace(str(tmp_path), "org/model-that-is-nowhere")
