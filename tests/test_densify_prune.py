# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Densifying undoes upcycling bit by bit, and pruning keeps what a plain cut of the model in memory keeps."""

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, text_config
from hf_moe.conversion.densifying import densify
from hf_moe.conversion.errors import ConversionError
from hf_moe.conversion.pruning import most_used, prune
from hf_moe.conversion.upcycling import upcycle
from hf_moe.training.load_file import LOAD_FILE, ExpertLoadFile
from test_upcycling import dense_model
from tiny import tensors_on_disk, tiny, token_ids
from torch import Tensor
from transformers import AutoModelForCausalLM, BloomConfig

from hf_moe import MoEConfig, MoEForCausalLM

# Scales that are powers of two, or 1: what was divided is multiplied back without rounding.
EXACT_ROUTERS: dict[str, dict[str, Any]] = {
    "top_k": {},
    "top_k_not_normalised": {"norm_topk_prob": False},
    "noisy_top_k": {"router_type": "noisy_top_k"},
    "switch": {"router_type": "switch", "num_experts_per_tok": 1},
    "hash": {"router_type": "hash"},
    "pyramid_switch": {"router_type": "switch", "num_experts_per_tok": 1, "num_experts": [2, 4, 8]},
    "every_other": {"decoder_sparse_step": 2},
    "hierarchical": {"router_type": "hierarchical", "n_group": 2, "topk_group": 2},
}


def save(model: MoEForCausalLM, folder: Path) -> Path:
    model.save_pretrained(folder)
    return folder


def write_load(path: Path, model: MoEForCausalLM, rows: list[list[list[int]]], finish: bool = True) -> Path:
    """A file of expert load with these assignments."""
    num_experts = [len(counts) for counts in rows[0]] if rows else model.config.num_experts_per_layer
    file = ExpertLoadFile(path, model.config.moe_layers[: len(num_experts)], num_experts)
    file.keep(0)
    for number, row in enumerate(rows, start=1):
        file.append(number, row)
    if finish:
        file.finish()
    return path


def assert_same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


# ---------------------------------------------------------------------- densify


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_densify_undoes_upcycling(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """The dense checkpoint comes back with the same names and bits, in every layout; and loads without hf_moe's classes."""
    dense = dense_model(family).to(dtype)
    dense.save_pretrained(tmp_path / "dense")
    upcycle(str(tmp_path / "dense"), tmp_path / "moe", num_experts=4, verify=False)
    result = densify(tmp_path / "moe", tmp_path / "back", expert=3)
    assert_same_tensors(tensors_on_disk(tmp_path / "back"), tensors_on_disk(tmp_path / "dense"))
    assert result.report is not None
    assert result.report.exact
    assert result.report.names == ("MoE", "dense")
    loaded, info = AutoModelForCausalLM.from_pretrained(tmp_path / "back", dtype="auto", output_loading_info=True)
    assert type(loaded) is type(dense)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    original = AutoModelForCausalLM.from_pretrained(tmp_path / "dense", dtype="auto")
    assert torch.equal(loaded(token_ids()).logits, original(token_ids()).logits)
    assert json.loads((tmp_path / "back" / "config.json").read_text())["architectures"] == [type(dense).__name__]


@pytest.mark.parametrize("router", EXACT_ROUTERS)
@pytest.mark.parametrize("family", ["llama", "phi3", "gpt2"])
def test_every_scale_that_is_a_power_of_two(family: str, router: str, tmp_path: Path) -> None:
    """One expert, one per layer, and averages with any load give the dense bits."""
    dense_model(family).save_pretrained(tmp_path / "dense")
    moe = upcycle(str(tmp_path / "dense"), tmp_path / "moe", verify=False, **{"num_experts": 4, **EXACT_ROUTERS[router]}).model
    expected = tensors_on_disk(tmp_path / "dense")
    counts = moe.config.num_experts_per_layer
    load = write_load(tmp_path / LOAD_FILE, moe, [[[3 * i + layer + 1 for i in range(n)] for layer, n in enumerate(counts)]])
    choices: list[dict[str, Any]] = [{"expert": 1}, {"expert": [n - 1 for n in counts]}, {"average": True}, {"load": load}]
    for number, choice in enumerate(choices):
        densify(tmp_path / "moe", tmp_path / str(number), verify=False, **choice)
        assert_same_tensors(tensors_on_disk(tmp_path / str(number)), expected)


@pytest.mark.parametrize("fields", [{"router_type": "sigmoid", "routed_scaling_factor": 2.5}, {"num_experts": 6}])
def test_other_scales_round_once(fields: dict[str, Any], tmp_path: Path) -> None:
    fields = {"num_experts": 4, **fields} if "router_type" in fields else {**fields, "norm_topk_prob": False}
    dense_model("llama").save_pretrained(tmp_path / "dense")
    upcycle(str(tmp_path / "dense"), tmp_path / "moe", verify=False, **fields)
    result = densify(tmp_path / "moe", tmp_path / "back", expert=0)
    assert result.report is not None
    assert result.report.max_abs_diff <= 1e-5
    back = tensors_on_disk(tmp_path / "back")
    for name, tensor in tensors_on_disk(tmp_path / "dense").items():
        torch.testing.assert_close(back[name], tensor, rtol=3e-7, atol=0)


def with_equal_experts(model: MoEForCausalLM, expert: int) -> MoEForCausalLM:
    """The plain oracle: every expert is replaced by the chosen one."""
    with torch.no_grad():
        for layer in model.moe_layers:
            for name, parameter in layer.experts.named_parameters():
                if not name.startswith("act_fn"):
                    parameter.copy_(parameter[expert].clone().expand_as(parameter))
    return model


@pytest.mark.parametrize(
    ("family", "fields"),
    [
        ("llama", {}),
        ("llama_biases", {"num_shared_experts": 1}),
        ("llama", {"num_shared_experts": 2}),
        ("llama", {"moe_intermediate_size": 24}),
        ("phi3", {"num_shared_experts": 1, "moe_intermediate_size": 16}),
        ("gpt2", {"num_shared_experts": 1}),
        ("opt", {"num_shared_experts": 2}),
        ("gpt_neox", {"moe_intermediate_size": 64}),
        ("falcon", {"num_shared_experts": 1}),
        ("gemma2", {"router_type": "sigmoid", "routed_scaling_factor": 1.5, "num_shared_experts": 1}),
    ],
)
def test_one_expert_of_many(family: str, fields: dict[str, Any], tmp_path: Path) -> None:
    """Logits are those of the MoE whose experts are all the chosen one; shared experts stand beside it in a wider FFN."""
    model = tiny(family, **fields)
    densify(save(model, tmp_path / "moe"), tmp_path / "dense", expert=2, verify=False)
    dense = AutoModelForCausalLM.from_pretrained(tmp_path / "dense")
    expected = with_equal_experts(model, 2)(token_ids()).logits
    assert expected.std() > 0.05
    torch.testing.assert_close(dense(token_ids()).logits, expected, rtol=0, atol=1e-5)


def test_average_is_the_plain_weighted_sum(tmp_path: Path) -> None:
    model = tiny("llama", num_experts=[2, 3, 4], num_shared_experts=1)
    rows = [[[1, 3], [2, 0, 5], [1, 1, 1, 1]], [[0, 2], [1, 1, 1], [9, 0, 3, 2]]]
    load = write_load(tmp_path / LOAD_FILE, model, rows)
    densify(save(model, tmp_path / "moe"), tmp_path / "dense", average=True, load=load, verify=False)
    got = tensors_on_disk(tmp_path / "dense")
    for index, layer in enumerate(model.moe_layers):
        share = torch.tensor([a + b for a, b in zip(rows[0][index], rows[1][index], strict=True)]).double()
        share /= share.sum()
        gate_up = (layer.experts.gate_up_proj.double() * share[:, None, None]).sum(0).chunk(2)
        down = (layer.experts.down_proj.double() * share[:, None, None]).sum(0)
        shared = layer.shared_experts
        expected = {
            "gate_proj": torch.cat([gate_up[0], shared.gate_proj.weight.double()]),
            "up_proj": torch.cat([gate_up[1], shared.up_proj.weight.double()]),
            "down_proj": torch.cat([down, shared.down_proj.weight.double()], dim=1),
        }
        for name, tensor in expected.items():
            found = got[f"model.layers.{index}.mlp.{name}.weight"].double()
            torch.testing.assert_close(found, tensor, rtol=2**-24 * 1.0001, atol=0)  # rounded once: half a unit of the last bit


@pytest.mark.parametrize(
    ("fields", "choice", "message"),
    [
        ({}, {}, "one of the two"),
        ({}, {"expert": 0, "average": True}, "one of the two"),
        ({}, {"expert": 4}, r"0\.\.3"),
        ({}, {"expert": [0, 1]}, "3 MoE layers"),
        ({}, {"expert": 0, "weights_sum": -1.0}, "weights_sum"),
        ({}, {"load": "nowhere.safetensors"}, r"`load`='nowhere.safetensors': not readable \("),
        ({}, {"load": "moe/config.json"}, r"`load`: moe/config.json: not a whole safetensors file .* give the expert_load"),
        ({}, {"load": "moe/model.safetensors"}, r"`load`: moe/model.safetensors: `format`='pt' is not .* give the expert_load"),
        ({"residual_moe": True}, {"expert": 0}, "residual_moe"),
        ({"num_shared_experts": 1, "use_shared_expert_gate": True}, {"expert": 0}, "use_shared_expert_gate"),
        ({"num_shared_experts": 1, "decoder_sparse_step": 2}, {"expert": 0}, "num_shared_experts"),
        ({"moe_intermediate_size": 16, "mlp_only_layers": [0]}, {"expert": 0}, "moe_intermediate_size"),
    ],
)
def test_densify_refuses(
    fields: dict[str, Any], choice: dict[str, Any], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.chdir(tmp_path)
    save(tiny("llama", **fields), tmp_path / "moe")
    with pytest.raises(ConversionError, match=message) as error:
        densify(tmp_path / "moe", tmp_path / "dense", **choice)
    assert "\n" not in str(error.value)
    assert [path.name for path in tmp_path.iterdir()] == ["moe"]


def test_only_moe_checkpoints_of_hf_moe(tmp_path: Path) -> None:
    dense_model("llama").save_pretrained(tmp_path / "dense")
    with pytest.raises(ConversionError, match="model_type"):
        densify(tmp_path / "dense", tmp_path / "out", expert=0)
    with pytest.raises(ConversionError, match="model_type"):
        prune(tmp_path / "dense", tmp_path / "out", load=tmp_path / LOAD_FILE, keep=2)


def test_a_width_without_a_field_is_refused(tmp_path: Path) -> None:
    """Bloom's FFN is four times the hidden size, whatever the config says."""
    text = BloomConfig(hidden_size=32, n_layer=2, n_head=4, vocab_size=128)
    config = MoEConfig(text_config=text, num_experts=4, num_shared_experts=1)
    save(MoEForCausalLM(config), tmp_path / "moe")
    with pytest.raises(ConversionError, match=r"`num_shared_experts`=1.*256 wide.*no field"):
        densify(tmp_path / "moe", tmp_path / "out", expert=0)


def test_a_config_of_other_experts_is_refused(tmp_path: Path) -> None:
    save(tiny("llama"), tmp_path / "moe")
    config = json.loads((tmp_path / "moe" / "config.json").read_text())
    (tmp_path / "moe" / "config.json").write_text(json.dumps({**config, "num_experts": 5}))
    with pytest.raises(ConversionError, match="different models"):
        densify(tmp_path / "moe", tmp_path / "out", expert=0)


# ---------------------------------------------------------------------- prune

PRUNABLE: dict[str, dict[str, Any]] = {
    "top_k": {},
    "top_k_not_normalised": {"norm_topk_prob": False},
    "noisy_top_k": {"router_type": "noisy_top_k"},
    "switch": {"router_type": "switch", "num_experts_per_tok": 1},
    "gshard": {"router_type": "gshard"},
    "sigmoid": {"router_type": "sigmoid", "routed_scaling_factor": 2.5, "num_shared_experts": 1},
    "residual": {"residual_moe": True},
}


def cut(model: MoEForCausalLM, kept: dict[int, list[int]]) -> MoEForCausalLM:
    """The plain oracle: a smaller model with the kept rows of every stacked tensor."""
    config = model.config.__class__.from_dict(model.config.to_dict())
    config.num_experts = [len(ids) for ids in kept.values()]
    smaller = MoEForCausalLM(config).eval()
    state = model.state_dict()
    for layer, ids in kept.items():
        for name in state:
            if f"layers.{layer}." in name and (".gate." in name or ".experts." in name) and "act_fn" not in name:
                state[name] = state[name][ids]
    smaller.load_state_dict(state)
    return smaller


@pytest.mark.parametrize("router", PRUNABLE)
@pytest.mark.parametrize("family", ["llama_biases", "opt"])
def test_prune_equals_a_plain_cut(family: str, router: str, tmp_path: Path) -> None:
    model = tiny(family, **{"num_experts": 6, **PRUNABLE[router]})
    generator = torch.Generator().manual_seed(0)
    rows = torch.randint(0, 50, (4, 3, 6), generator=generator).tolist()
    result = prune(save(model, tmp_path / "moe"), tmp_path / "out", load=write_load(tmp_path / "l", model, rows), keep=3)
    totals = torch.tensor(rows).sum(0)
    for layer, ids in enumerate(result.kept.values()):
        assert ids == sorted(totals[layer].topk(3).indices.tolist())
    pruned, info = AutoModelForCausalLM.from_pretrained(tmp_path / "out", output_loading_info=True)
    assert not info["missing_keys"]
    assert not info["unexpected_keys"]
    assert pruned.config.num_experts == 3
    expected = cut(model, result.kept)
    assert_same_tensors(dict(pruned.state_dict()), dict(expected.state_dict()))
    torch.testing.assert_close(pruned(token_ids()).logits, expected(token_ids()).logits, rtol=0, atol=1e-5)
    assert result.report is not None
    assert not result.report.exact
    assert json.loads((tmp_path / "out" / "prune_report.json").read_text())["kept_experts"]["0"] == result.kept[0]


def test_experts_that_no_token_chooses_are_not_missed(tmp_path: Path) -> None:
    """A bias of the sigmoid router keeps two experts away from every token: without them the function is the same."""
    model = tiny("llama", router_type="sigmoid")
    for layer in model.moe_layers:
        layer.gate.e_score_correction_bias[[1, 2]] = -100.0
    rows = [[[5, 0, 0, 5]] * 3]
    result = prune(save(model, tmp_path / "moe"), tmp_path / "out", load=write_load(tmp_path / "l", model, rows), keep=2)
    assert result.kept == {0: [0, 3], 1: [0, 3], 2: [0, 3]}
    assert result.report is not None
    assert result.report.exact
    assert result.report.names == ("MoE", "pruned MoE")


def test_prune_layers_of_unequal_size(tmp_path: Path) -> None:
    model = tiny("llama", num_experts=[2, 4, 6])
    rows = [[[1, 2], [4, 3, 2, 1], [0, 0, 1, 9, 0, 8]]]
    load = write_load(tmp_path / "l", model, rows, finish=False)  # a training that was killed
    result = prune(save(model, tmp_path / "moe"), tmp_path / "out", load=load, keep=3, verify=False)
    assert result.kept == {0: [0, 1], 1: [0, 1, 2], 2: [2, 3, 5]}
    assert result.report is None
    assert MoEForCausalLM.from_pretrained(tmp_path / "out").config.num_experts == [2, 3, 3]


def test_ties_keep_the_lower_index() -> None:
    assert most_used([3, 5, 3, 5, 3], 3) == [0, 1, 3]


@pytest.mark.parametrize(
    ("fields", "rows", "keep", "message"),
    [
        ({}, [[[1, 1, 1, 1]] * 3], 1, r"`keep`=1 must lie in 2\.\.3"),
        ({}, [[[1, 1, 1, 1]] * 3], 4, r"`keep`=4"),
        ({}, [[[1, 1, 1]] * 3], 2, "was recorded with"),
        ({}, [[[1, 1, 1, 1]] * 2], 2, "was recorded with"),
        ({}, [[[1, 1, 1, 1], [0, 0, 0, 0], [1, 1, 1, 1]]], 2, "layer 1"),
        ({}, [], 2, "layer 0"),
        ({"router_type": "hash"}, [[[1, 1, 1, 1]] * 3], 2, "router_type"),
        ({"router_type": "hierarchical", "n_group": 2, "topk_group": 2}, [[[1, 1, 1, 1]] * 3], 2, "router_type"),
        ({"router_type": "strictly_balanced"}, [[[1, 1, 1, 1]] * 3], 2, "router_type"),
        ({"router_type": "sigmoid", "n_group": 2, "topk_group": 1}, [[[1, 1, 1, 1]] * 3], 2, "n_group"),
    ],
)
def test_prune_refuses(fields: dict[str, Any], rows: list, keep: int, message: str, tmp_path: Path) -> None:
    model = tiny("llama", **fields)
    save(model, tmp_path / "moe")
    load = write_load(tmp_path / LOAD_FILE, model, rows)
    with pytest.raises(ConversionError, match=message) as error:
        prune(tmp_path / "moe", tmp_path / "out", load=load, keep=keep)
    assert "\n" not in str(error.value)
    assert sorted(path.name for path in tmp_path.iterdir()) == [LOAD_FILE, "moe"]


def test_a_load_file_that_is_none(tmp_path: Path) -> None:
    save(tiny("llama"), tmp_path / "moe")
    (tmp_path / LOAD_FILE).write_text('{"step": 1, "layers": [0, 1, 2], "executed": [[1, 2, 3, 4]]}\n')
    with pytest.raises(ConversionError, match="not a whole safetensors file") as error:
        prune(tmp_path / "moe", tmp_path / "out", load=tmp_path / LOAD_FILE, keep=2)
    assert "\n" not in str(error.value)
    with pytest.raises(FileExistsError):
        prune(tmp_path / "moe", tmp_path, load=tmp_path / LOAD_FILE, keep=2)


def test_companions_go_along(tmp_path: Path) -> None:
    model = tiny("llama")
    save(model, tmp_path / "moe")
    (tmp_path / "moe" / "chat_template.jinja").write_text("{{ messages }}")
    densify(tmp_path / "moe", tmp_path / "dense", expert=0, verify=False)
    load = write_load(tmp_path / "l", model, [[[1, 2, 3, 4]] * 3])
    prune(tmp_path / "moe", tmp_path / "pruned", load=load, keep=2, verify=False)
    for folder in ("dense", "pruned"):
        assert (tmp_path / folder / "chat_template.jinja").read_text() == "{{ messages }}"
        assert (tmp_path / folder / "generation_config.json").exists()
    assert (tmp_path / "pruned" / "modeling_moe.py").exists()
    assert not (tmp_path / "dense" / "modeling_moe.py").exists()
    assert text_config("llama").model_type == json.loads((tmp_path / "dense" / "config.json").read_text())["model_type"]
