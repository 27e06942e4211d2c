"""Upcycling into the shards of a model on 2 and 4 ranks gives what `upcycle` writes, bit by bit, in the memory of a shard."""

from __future__ import annotations

import json
import random
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_moe.conversion import Recipe, run_recipe
from hf_moe.conversion.checkpoint_reader import Checkpoint
from hf_moe.conversion.errors import ConversionError
from hf_moe.conversion.in_memory import plan_upcycled
from hf_moe.conversion.lazy_tensors import LazyTensor, lazy_state_dict
from hf_moe.conversion.sharded_upcycling import upcycle_into_shards
from ranks import launch
from sources import edit_json, restore, same_tensors, save_dense, save_tokenizer, stored_tensors
from test_in_memory import everything
from torch import Tensor
from transformers import GenerationConfig

from hf_moe import MoEConfig, MoEForCausalLM

TEXT = ["the cat sat on the mat", "a dog ran and a red house", "one two three four", "blue cat in the house"] * 4
PROMPTS = [["the cat"], ["a dog ran"], ["red house"], ["one two three"], ["blue mat"], ["the house"]]
# name: family, recipe, ep_size, what becomes of the rest, dtype to load in
WAYS: dict[str, tuple[str, dict[str, Any], int, str, str | None]] = {
    "copy": ("llama_tied", {"num_experts": 15, "num_shared_experts": 2}, 4, "fsdp", None),
    "noise": ("qwen3", {"num_experts": 8, "method": "noise", "std": 0.05, "router_init_std": 0.3}, 2, "fsdp", "bfloat16"),
    "drop": ("gemma3", {"num_experts": 8, "method": "drop", "router_type": "hierarchical", "n_group": 2, "topk_group": 2},
             2, "replicate", None),
    "granular": ("llama_biases", {"num_experts": 8, "method": "granular", "granularity": 2, "num_experts_per_tok": 4},
                 2, "fsdp", None),
    "clustered": ("starcoder2", {"num_experts": 4, "method": "split", "assignment": "clustered", "dtype": "bfloat16"},
                  2, "replicate", None),
    "coactivation": ("llama", {"num_experts": 4, "method": "split", "assignment": "coactivation", "text": TEXT},
                     2, "fsdp", None),
    "prompts": ("llama", {"num_experts": 6, "router_init": "prompts", "router_prompts": PROMPTS}, 2, "fsdp", None),
    "packed": ("phi3", {"num_experts": [2, 4, 8]}, 4, "fsdp", None),
    "transposed": ("gpt2", {"num_experts": 8, "num_shared_experts": 2, "router_type": "sigmoid"}, 2, "fsdp", None),
    "residual": ("gpt_neox", {"num_experts": 8, "residual_moe": True, "layers": [0, 2], "router_init": "zeros"},
                 2, "fsdp", None),
    "merge": ("llama", {"method": "merge", "rest": "average", "num_experts_per_tok": 2}, 4, "fsdp", None),
}  # fmt: skip
RUNS = {
    2: ["drop", "granular", "coactivation", "prompts", "transposed", "residual", "fails"],
    4: ["copy", "noise", "clustered", "packed", "merge", "memory"],
}
SAVED = ["granular", "packed"]
# each expert has 3 MB in each of 3 layers
HEAVY = {"hidden_size": 256, "intermediate_size": 1024, "head_dim": 64}


@pytest.fixture(scope="module")
def sources(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """By name, a recipe; what `upcycle` writes by it is in `folder` under that name."""
    folder, recipes = tmp_path_factory.mktemp("sources"), {}
    for name, (family, fields, *_) in WAYS.items():
        dense = save_dense(folder / f"{name}-dense", family)
        GenerationConfig(temperature=0.3, do_sample=True).save_pretrained(dense)
        save_tokenizer(dense)
        recipes[name] = {"source": str(dense), **fields}
    recipes["fails"] = {**recipes["coactivation"], "source": str(save_dense(folder / "no-tokenizer"))}
    models = [save_dense(folder / f"parent{seed}", seed=seed) for seed in range(4)]
    recipes["merge"] = {"models": list(map(str, models)), **WAYS["merge"][1]}
    for name in WAYS:
        run_recipe(Recipe.from_dict({**recipes[name], "destination": str(folder / name), "verify": False}))
    heavy = save_dense(folder / "heavy", **HEAVY)
    recipes["memory"] = {"source": str(heavy), "num_experts": 16, "method": "noise", "std": 0.1}
    return {"folder": folder, **recipes}


def upcycled(sources: dict[str, Any], world: int, names: list[str]) -> dict[str, list[dict[str, Any]]]:
    """What each rank says of each upcycling."""
    folder, jobs = sources["folder"], []
    for name in names:
        *_, ep, dense, dtype = WAYS.get(name, (world, "fsdp", None))
        recipe = dict(sources[name])
        path = recipe.pop("source", None)
        jobs.append({"name": name, "ep": ep, "dense": dense, "dtype": dtype, "path": path, "recipe": recipe,
                     "memory": name == "memory", "save": name in SAVED})  # fmt: skip
    launch(world, "sharded_upcycling_worker.py", folder, json.dumps(jobs))
    return {name: [json.loads((folder / f"{name}.{rank}.json").read_text()) for rank in range(world)] for name in names}


@pytest.mark.parametrize("world", RUNS)
def test_every_rank_has_its_shard_of_what_upcycle_writes(sources: dict[str, Any], world: int) -> None:
    found_by_name = upcycled(sources, world, RUNS[world])
    for found in found_by_name.pop("memory", []):
        assert found["experts"] == [4, 4, 4]
        assert found["shard"] < 16 * 3 * 3 * HEAVY["hidden_size"] * HEAVY["intermediate_size"] * 4 / 3  # of the whole MoE
        assert found["memory"] < found["shard"] + found["largest"], found
    for found in found_by_name.pop("fails", []):  # a rank that cannot go on takes the others along
        assert "no tokenizer for calibration" in found["error"]
    for name, ranks in found_by_name.items():
        for found in ranks:
            assert found["names"], name
            assert found["wrong"] == [], name
            assert found["config"], name
            assert found["generation"], name
        experts = MoEConfig.from_pretrained(sources["folder"] / name).num_experts_per_layer
        held = [sum(found["experts"][layer] for found in ranks) for layer in range(len(experts))]
        copies = 1 if WAYS[name][3] == "fsdp" else world // WAYS[name][2]
        assert held == [copies * count for count in experts], name
    for name in set(SAVED) & set(RUNS[world]):
        same_tensors(stored_tensors(sources["folder"] / name), stored_tensors(sources["folder"] / f"{name}-saved"))


@pytest.mark.parametrize("name", ["granular", "clustered", "coactivation", "merge", "prompts"])
def test_one_process(sources: dict[str, Any], name: str, tmp_path: Path) -> None:
    """The recipe as a dict, an object and a file; a dtype beside it."""
    path = tmp_path / "recipe.yaml"
    path.write_text(Recipe.from_dict(sources[name]).to_yaml())
    for recipe, dtype in ((sources[name], None), (Recipe.from_dict(sources[name]), "float16"), (path, None)):
        written = MoEForCausalLM.from_pretrained(sources["folder"] / name, dtype=dtype)
        made = upcycle_into_shards(sources[name].get("source"), recipe, dtype=dtype)
        same_tensors(everything(written), everything(made))


def test_the_source_given_counts(sources: dict[str, Any], tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense", seed=7)
    made = upcycle_into_shards(dense, {"source": "nowhere", "num_experts": 2})
    gate = stored_tensors(dense)["model.layers.1.mlp.gate_proj.weight"]
    assert torch.equal(made.moe_layers[1].experts.gate_up_proj[1, : len(gate)], gate)
    edit_json(dense / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(ConversionError, match="quantised"):
        upcycle_into_shards(dense, {"num_experts": 2})
    with pytest.raises(ConversionError, match="num_expert"):
        upcycle_into_shards(dense, {"num_expert": 2})


# ---------------------------------------------------------------------- tensors on demand


def lazy(recipe: dict[str, Any], dtype: torch.dtype = torch.float32) -> dict[str, LazyTensor]:
    planned = plan_upcycled(Recipe.from_dict({**recipe, "verify": False}))
    return lazy_state_dict(MoEConfig.from_dict(planned.config), planned.tensors, dtype)


def some_slice(size: int, draw: random.Random) -> slice:
    start, stop = draw.randint(0, size), draw.randint(0, size)
    return draw.choice([slice(None), slice(start, stop), slice(min(start, stop), None), slice(-start, size + 3)])


@pytest.mark.parametrize("name", WAYS)
def test_any_index_is_that_of_the_whole(sources: dict[str, Any], name: str) -> None:
    """Of every tensor, with an oracle that loads all of it from disk."""
    draw, dtype = random.Random(name), torch.float32 if name == "clustered" else torch.bfloat16
    oracle = dict(MoEForCausalLM.from_pretrained(sources["folder"] / name, dtype=dtype).state_dict())
    tensors = lazy(sources[name], dtype)
    assert oracle.keys() - tensors.keys() <= {"language_model.lm_head.weight"}
    for key, tensor in tensors.items():
        whole = oracle[key]
        assert (tensor.get_shape(), tensor.dtype) == (list(whole.shape), whole.dtype), key
        cuts: list[Any] = [tuple(some_slice(size, draw) for size in whole.shape) for _ in range(3)]
        cuts += [..., some_slice(len(whole), draw), slice(None, None, 2), -1, (slice(0, 2), 0) if whole.dim() > 1 else 0]
        for cut in cuts:
            assert torch.equal(tensor[cut], whole[cut]), (key, cut)


def test_only_what_is_asked_for_is_read(sources: dict[str, Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of a matrix; of stacked copies of one FFN, its bytes once, however many experts are asked for."""
    tensors, read = lazy({**sources["copy"], "num_shared_experts": 0}), []
    chunks = Checkpoint.chunks

    def counted(self: Checkpoint, *args: Any, **kwargs: Any) -> Any:
        for piece in chunks(self, *args, **kwargs):
            read.append(len(piece))
            yield piece

    def bytes_read(name: str, index: Any) -> int:
        read.clear()
        tensors[f"language_model.model.{name}"][index]
        return sum(read)

    monkeypatch.setattr(Checkpoint, "chunks", counted)
    width, row = 48, 32 * 4
    assert bytes_read("embed_tokens.weight", slice(10, 17)) == 7 * row
    assert bytes_read("embed_tokens.weight", (slice(0, 0), slice(None))) == 0
    assert bytes_read("layers.0.mlp.experts.gate_up_proj", slice(4, 8)) == 2 * width * row
    assert bytes_read("layers.0.mlp.experts.gate_up_proj", (slice(3, 4), slice(40, 50))) == 10 * row
    assert bytes_read("layers.0.mlp.experts.down_proj", slice(14, 15)) == width * row
    assert bytes_read("layers.0.mlp.experts.down_proj", slice(15, 15)) == 0


def test_a_tensor_of_another_shape_is_refused(sources: dict[str, Any]) -> None:
    planned = plan_upcycled(Recipe.from_dict({**sources["copy"], "verify": False}))
    config = MoEConfig.from_dict(planned.config)
    with pytest.raises(ConversionError, match="not planned"):
        lazy_state_dict(config, planned.tensors[1:], torch.float32)
    config.text_config.vocab_size = 256
    with pytest.raises(ConversionError, match=r"embed_tokens.*\[256, 32\] in the model, but \[128, 32\] is planned"):
        lazy_state_dict(config, planned.tensors, torch.float32)


def test_damage_shows_when_the_tensor_is_loaded(tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense")
    tensors: dict[str, Tensor] = stored_tensors(dense)
    tensors["model.layers.2.mlp.up_proj.weight"][3, 4] = float("nan")
    restore(dense, tensors)
    with pytest.raises(ConversionError, match=r"layers.2.mlp.up_proj.weight.*NaN"):
        upcycle_into_shards(dense, {"num_experts": 4})
