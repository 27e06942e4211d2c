"""A MoE made in memory is the one that is written to disk, bit by bit, in the memory of its weights."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_moe.conversion import Recipe, import_moe, in_memory, run_recipe
from hf_moe.conversion.errors import ConversionError
from hf_moe.conversion.in_memory import build_model, plan_imported, plan_upcycled
from hf_moe.model_cards.lineage import read_lineage
from native_models import NATIVE, native_model
from sources import edit_json, same_tensors, save_dense, save_tokenizer, stored_tensors
from torch import Tensor, nn
from transformers import GenerationConfig

from hf_moe import MoEForCausalLM

WAYS: dict[str, tuple[str, dict[str, Any]]] = {
    "copy": ("llama", {"num_experts": 4, "decoder_sparse_step": 2}),
    "tied": ("llama_tied", {"num_experts": 4, "router_type": "noisy_top_k"}),
    "bfloat16": ("llama", {"num_experts": 4, "dtype": "bfloat16"}),
    "plain": ("gpt2", {"num_experts": 4, "num_shared_experts": 2, "router_type": "sigmoid"}),
    "packed": ("phi3", {"num_experts": [2, 4, 8]}),
    "noise": ("qwen3", {"num_experts": 4, "method": "noise", "std": 0.02}),
    "drop": ("gemma3", {"num_experts": 4, "method": "drop", "router_type": "hierarchical", "n_group": 2, "topk_group": 2}),
    "granular": ("llama_biases", {"num_experts": 8, "method": "granular", "granularity": 2, "num_experts_per_tok": 4}),
    "split": ("starcoder2", {"num_experts": 4, "method": "split", "assignment": "clustered"}),
    "residual": ("gpt_neox", {"num_experts": 4, "residual_moe": True, "layers": [0, 2]}),
    "hash": ("opt", {"num_experts": 4, "router_type": "hash"}),
}


def everything(model: nn.Module) -> dict[str, Tensor]:
    """Parameters and all buffers, those that are not saved as well."""
    return {**dict(model.named_parameters(remove_duplicate=False)), **dict(model.named_buffers(remove_duplicate=False))}


@pytest.mark.parametrize("way", WAYS)
def test_equals_the_written_checkpoint(way: str, tmp_path: Path) -> None:
    family, fields = WAYS[way]
    dense = save_dense(tmp_path / "dense", family)
    GenerationConfig(temperature=0.3, do_sample=True).save_pretrained(dense)
    recipe = {"source": str(dense), **fields}
    run_recipe(Recipe.from_dict({**recipe, "destination": str(tmp_path / "moe"), "verify": False}))
    written = MoEForCausalLM.from_pretrained(tmp_path / "moe", dtype="auto")
    planned = plan_upcycled(Recipe.from_dict({**recipe, "verify": False}))
    made = planned.build()
    same_tensors(everything(written), everything(made))
    assert made.config.to_diff_dict() == written.config.to_diff_dict()
    assert made.generation_config.to_dict() == written.generation_config.to_dict()
    made.save_pretrained(tmp_path / "saved")
    same_tensors(stored_tensors(tmp_path / "moe"), stored_tensors(tmp_path / "saved"))
    assert planned.companions == dense
    assert not made.training
    assert all(parameter.requires_grad for parameter in made.parameters())
    ids = torch.randint(3, 128, (2, 9))
    assert torch.equal(written.eval()(ids).logits, made(ids).logits)


def test_merges_models(tmp_path: Path) -> None:
    models = [str(save_dense(tmp_path / f"dense{i}", seed=i)) for i in range(3)]
    recipe = {"models": models, "method": "merge", "num_experts_per_tok": 2}
    run_recipe(Recipe.from_dict({**recipe, "destination": str(tmp_path / "moe"), "verify": False}))
    made = plan_upcycled(Recipe.from_dict({**recipe, "verify": False})).build()
    same_tensors(everything(MoEForCausalLM.from_pretrained(tmp_path / "moe")), everything(made))


def test_routers_from_prompts(tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense")
    save_tokenizer(dense)
    prompts = [["the cat"], ["a dog ran"], ["red house"], ["one two three"]]
    recipe = {"source": str(dense), "num_experts": 4, "router_init": "prompts", "router_prompts": prompts}
    run_recipe(Recipe.from_dict({**recipe, "destination": str(tmp_path / "moe"), "verify": False}))
    made = plan_upcycled(Recipe.from_dict({**recipe, "verify": False})).build()
    same_tensors(everything(MoEForCausalLM.from_pretrained(tmp_path / "moe")), everything(made))


@pytest.mark.parametrize("dtype", [None, "bfloat16"])
@pytest.mark.parametrize("name", ["mixtral", "qwen2_moe", "olmoe", "deepseek_v3", "granitemoe"])
def test_imports(name: str, dtype: str | None, tmp_path: Path) -> None:
    assert name in NATIVE
    native_model(name).save_pretrained(tmp_path / "native")
    import_moe(tmp_path / "native", tmp_path / "moe", dtype=dtype)
    planned = plan_imported(tmp_path / "native", dtype)
    made = planned.build()
    made.save_pretrained(tmp_path / "saved")
    same_tensors(stored_tensors(tmp_path / "moe"), stored_tensors(tmp_path / "saved"))
    assert json.loads(planned.records["conversion_report.json"])["format"] == NATIVE[name][0]
    same_tensors(everything(MoEForCausalLM.from_pretrained(tmp_path / "moe", dtype="auto")), everything(made))


def test_verifies_if_told(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    dense = save_dense(tmp_path / "dense")
    planned = plan_upcycled(Recipe.from_dict({"source": str(dense), "num_experts": 4}))
    planned.build()
    assert "function preserved" in planned.notes[-1]
    monkeypatch.setattr(
        in_memory, "build_model", lambda config, tensors: build_model({**config, "norm_topk_prob": False}, tensors)
    )
    with pytest.raises(ConversionError, match="NOT PRESERVED"):
        planned.build()


def test_records_tell_the_lineage(tmp_path: Path) -> None:
    """As the written checkpoint's."""
    dense = save_dense(tmp_path / "dense")
    recipe = {"source": str(dense), "num_experts": 4, "method": "drop", "ratio": 0.25}
    run_recipe(Recipe.from_dict({**recipe, "destination": str(tmp_path / "moe"), "verify": False}))
    (tmp_path / "run").mkdir()
    for name, content in plan_upcycled(Recipe.from_dict({**recipe, "verify": False})).records.items():
        (tmp_path / "run" / name).write_bytes(content)
    (stage,), (expected,) = read_lineage(tmp_path / "run"), read_lineage(tmp_path / "moe")
    assert (stage.kind, stage.parents, stage.method, stage.promise) == (
        expected.kind, expected.parents, expected.method, expected.promise
    )  # fmt: skip
    assert stage.parents[0].name == "dense"


def test_refuses_what_upcycle_refuses(tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense")
    with pytest.raises(ValueError, match="num_experts_per_tok"):
        plan_upcycled(Recipe.from_dict({"source": str(dense), "num_experts": 2, "num_experts_per_tok": 4}))
    edit_json(dense / "config.json", quantization_config={"quant_method": "gptq"})
    with pytest.raises(ConversionError, match="quantised"):
        plan_upcycled(Recipe.from_dict({"source": str(dense), "num_experts": 2}))


_PEAK = """
import resource, sys
import torch, transformers
from hf_moe.conversion.in_memory import plan_upcycled
from hf_moe.conversion import Recipe
def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
for experts in (2, 16):  # the first makes what imports and warming up take
    before = peak()
    made = plan_upcycled(Recipe.from_dict({"source": sys.argv[1], "num_experts": experts, "verify": False})).build()
    weights = sum(p.numel() * p.element_size() for p in made.parameters())
    largest = max(p.numel() * p.element_size() for p in made.parameters())
    if experts == 2:
        del made
print(peak() - before, weights, largest)
"""


def test_memory_is_that_of_the_weights(tmp_path: Path) -> None:
    dense = save_dense(tmp_path / "dense", hidden_size=256, intermediate_size=1024, head_dim=64)
    done = subprocess.run([sys.executable, "-c", _PEAK, str(dense)], capture_output=True, text=True, check=True, timeout=300)
    more, weights, largest = map(int, done.stdout.split()[-3:])
    assert weights > 100e6
    assert more < weights + largest
