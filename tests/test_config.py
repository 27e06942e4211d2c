"""`MoEConfig`: presets, layers, round trips, and refusals that name field, value and remedy."""

import json

import pytest
import torch
from families import text_config
from transformers import AutoConfig

from hf_moe import PRESETS, MoEConfig, MoEForCausalLM

REFUSED = {
    "K above E": ({"num_experts": 4, "num_experts_per_tok": 5}, "num_experts_per_tok"),
    "K zero": ({"num_experts_per_tok": 0}, "num_experts_per_tok"),
    "E zero": ({"num_experts": 0}, "num_experts"),
    "E not int": ({"num_experts": True}, "num_experts"),
    "router": ({"router_type": "topk"}, "router_type"),
    "scope": ({"balance_scope": "batch"}, "balance_scope"),
    "policy": ({"capacity_policy": "random"}, "capacity_policy"),
    "policy looks ahead": ({"capacity_policy": "probability", "capacity_factor": 1.0}, "allow_non_causal"),
    "priority looks ahead": ({"capacity_policy": "batch_priority", "capacity_factor": 1.0}, "allow_non_causal"),
    "expert choice looks ahead": ({"router_type": "expert_choice"}, "allow_non_causal"),
    "switch top-2": ({"router_type": "switch"}, "num_experts_per_tok"),
    "gshard top-1": ({"router_type": "gshard", "num_experts_per_tok": 1}, "num_experts_per_tok"),
    "capacity": ({"capacity_factor": 0.0}, "capacity_factor"),
    "eval capacity": ({"eval_capacity_factor": -1}, "eval_capacity_factor"),
    "strict capacity": ({"router_type": "strictly_balanced", "capacity_factor": 1.0}, "capacity_factor"),
    "coefficient": ({"router_aux_loss_coef": -0.1}, "router_aux_loss_coef"),
    "load without noise": ({"router_load_loss_coef": 0.1}, "router_load_loss_coef"),
    "jitter": ({"router_jitter_noise": 1.5}, "router_jitter_noise"),
    "jitter of a hash": ({"router_type": "hash", "router_jitter_noise": 0.1}, "router_jitter_noise"),
    "groups of a softmax": ({"n_group": 2}, "n_group"),
    "groups do not divide": ({"router_type": "sigmoid", "n_group": 3, "topk_group": 1}, "n_group"),
    "more groups than there are": ({"router_type": "sigmoid", "n_group": 2, "topk_group": 3}, "topk_group"),
    "groups too small": ({"router_type": "sigmoid", "n_group": 4, "topk_group": 1, "num_experts_per_tok": 3}, "topk_group"),
    "one level": ({"router_type": "hierarchical"}, "n_group"),
    "uneven levels": ({"router_type": "hierarchical", "n_group": 4, "topk_group": 2, "num_experts_per_tok": 3}, "topk_group"),
    "scaling of a softmax": ({"routed_scaling_factor": 2.0}, "routed_scaling_factor"),
    "width": ({"moe_intermediate_size": 0}, "moe_intermediate_size"),
    "step": ({"decoder_sparse_step": 0}, "decoder_sparse_step"),
    "no MoE layer": ({"decoder_sparse_step": 4}, "decoder_sparse_step"),
    "all dense": ({"mlp_only_layers": [0, 1, 2]}, "mlp_only_layers"),
    "layer outside": ({"mlp_only_layers": [3]}, "mlp_only_layers"),
    "pyramid too short": ({"num_experts": [4, 8]}, "num_experts"),
    "pyramid below K": ({"num_experts": [4, 8, 1]}, "num_experts_per_tok"),
    "residual and shared": ({"residual_moe": True, "num_shared_experts": 1}, "num_shared_experts"),
    "gate of nothing": ({"use_shared_expert_gate": True}, "num_shared_experts"),
    "misspelt": ({"num_expert": 4}, "num_experts"),
}


@pytest.mark.parametrize("name", REFUSED)
def test_refused_with_field_and_remedy(name: str) -> None:
    fields, named = REFUSED[name]
    with pytest.raises(ValueError, match=named) as error:
        MoEConfig(text_config=text_config("llama"), **fields)
    assert len(str(error.value)) > 40  # says more than the field


@pytest.mark.parametrize("name", PRESETS)
def test_preset_builds_and_returns(name: str, tmp_path) -> None:
    """Every preset fits a small model, trains a step's forward, and survives a round trip through its file."""
    config = MoEConfig.from_preset(name, text_config=text_config("llama"), num_experts=8)
    config.save_pretrained(tmp_path)
    loaded = AutoConfig.from_pretrained(tmp_path)
    assert isinstance(loaded, MoEConfig)
    assert loaded.to_diff_dict() == config.to_diff_dict()
    ids = torch.arange(12).view(2, 6)
    assert MoEForCausalLM(config).train()(input_ids=ids, labels=ids).loss.isfinite()


@pytest.mark.parametrize("name", PRESETS)
def test_preset_is_what_it_says(name: str) -> None:
    """At the system's own size nothing of the preset is changed."""
    fields = PRESETS[name].fields
    config = MoEConfig.from_preset(name, text_config=text_config("llama", num_hidden_layers=8))
    for field, value in fields.items():
        assert getattr(config, field) == value, field
    assert config.mlp_only_layers == list(range(PRESETS[name].first_dense_layers))


@pytest.mark.parametrize("name", PRESETS)
@pytest.mark.parametrize("experts", [2, 4, 6, 64])
def test_preset_fits_any_number_of_experts(name: str, experts: int) -> None:
    if name == "shazeer2017_hierarchical" and experts == 2:
        pytest.skip("two groups of one expert: nothing to choose at the second level")
    config = MoEConfig.from_preset(name, text_config=text_config("llama"), num_experts=experts)
    assert config.num_experts == experts


def test_overrides_are_kept_or_refused() -> None:
    config = MoEConfig.from_preset("olmoe", text_config=text_config("llama"), num_experts=4, num_experts_per_tok=3)
    assert (config.num_experts, config.num_experts_per_tok) == (4, 3)
    with pytest.raises(ValueError, match="num_experts_per_tok"):
        MoEConfig.from_preset("olmoe", text_config=text_config("llama"), num_experts=4, num_experts_per_tok=5)
    with pytest.raises(ValueError, match="mixtral"):
        MoEConfig.from_preset("mixtrall")


def test_which_layers() -> None:
    config = MoEConfig(text_config=text_config("llama", num_hidden_layers=6), decoder_sparse_step=2, mlp_only_layers=[3])
    assert config.moe_layers == [1, 5]
    model = MoEForCausalLM(config)
    names = {name.split(".")[3] for name, _ in model.named_parameters() if ".experts." in name}
    assert names == {"1", "5"}


def test_pyramid_and_width() -> None:
    config = MoEConfig(text_config=text_config("llama"), num_experts=[2, 4, 8], moe_intermediate_size=24)
    layers = MoEForCausalLM(config).moe_layers
    assert [tuple(layer.experts.down_proj.shape) for layer in layers] == [(e, 32, 24) for e in (2, 4, 8)]


def test_text_config_as_dict_and_hf_conventions(tmp_path) -> None:
    config = MoEConfig(text_config=text_config("qwen2").to_dict(), num_experts=4)
    assert config.get_text_config().model_type == "qwen2"
    config.save_pretrained(tmp_path)
    written = json.loads((tmp_path / "config.json").read_text())
    assert written["text_config"]["model_type"] == "qwen2"
    assert MoEConfig() is not None  # constructible without arguments, as Transformers asks of a config
