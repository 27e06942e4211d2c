# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Every causal LM of Transformers: upcycled, or refused for the reason that the documentation gives."""

import random
import subprocess
import sys

import architecture_walk as walk
import pytest
import torch
import transformers
from hf_moe.conversion import architectures
from torch import nn
from transformers import LlamaConfig, LlamaForCausalLM, PreTrainedConfig

from hf_moe import UnsupportedArchitectureError
from hf_moe.dense_ffn import find_ffns

RECORDED = architectures._content()
SUPPORTED = [name for name in architectures.model_types() if architectures.lookup(name)]
VARIED = [
    "bert",
    "bloom",
    "falcon",
    "gpt2",
    "gpt_neox",
    "granite",
    "llama",
    "mpt",
    "olmo",
    "opt",
    "phi3",
    "qwen3",
    "starcoder2",
]

recorded_version = pytest.mark.skipif(
    architectures.transformers_version() != transformers.__version__,
    reason=f"architectures.json is of Transformers {architectures.transformers_version()}, here is {transformers.__version__}",
)


@recorded_version
@pytest.mark.parametrize("model_type", walk.MODEL_TYPES)
def test_architecture(model_type: str) -> None:
    """It is as `architectures.json` says; a supported one passes every check of the walk."""
    entry = walk.entry_of(model_type)
    assert entry == RECORDED["architectures"][model_type], f"run `{walk.COMMAND}`"
    if entry["supported"]:
        walk.check(model_type)


@recorded_version
@pytest.mark.parametrize("model_type", walk.WHY_NOT)
def test_reasons_are_true(model_type: str) -> None:
    assert walk.confirm_reason(model_type)


@recorded_version
def test_table_is_complete() -> None:
    assert architectures.model_types() == walk.MODEL_TYPES
    assert walk.JSON.read_text(encoding="utf-8") == walk.as_json(RECORDED)
    assert walk.TABLE.read_text(encoding="utf-8") == walk.as_markdown(RECORDED), f"run `{walk.COMMAND}`"
    assert len(SUPPORTED) >= 60


@pytest.mark.parametrize("seed", range(2))
@pytest.mark.parametrize("model_type", VARIED)
def test_variations(model_type: str, seed: int) -> None:
    """Biases on or off, embeddings tied or not, one to four layers."""
    draw = random.Random(f"{model_type}{seed}")
    known = walk.tiny_config(model_type).to_dict()
    own = set(known) - set(PreTrainedConfig().to_dict())
    flags = [name for name in sorted(own) if "bias" in name and isinstance(known[name], bool)]
    changes = {name: draw.random() < 0.5 for name in (*flags, "tie_word_embeddings")}
    architecture = architectures.lookup(model_type)
    assert architecture is not None
    walk.check(model_type, **changes, **{architecture.num_layers_field: draw.randint(1, 4)})


def test_reader() -> None:
    llama = architectures.lookup("llama")
    assert llama is not None
    assert (llama.class_name, llama.layers, llama.ffn, llama.moe) == ("LlamaForCausalLM", "model.layers", "mlp", "mlp")
    assert llama.tied_names == ("lm_head.weight",)
    assert "model.layers.{}.mlp.up_proj.weight" in llama.names
    assert {"model.layers.{}.mlp.up_proj.bias", "model.layers.{}.self_attn.q_proj.bias"} <= set(llama.optional_names)
    assert architectures.reason("llama") is None
    assert (architectures.lookup("mixtral"), architectures.lookup("nonsense")) == (None, None)
    assert architectures.reason("mixtral")[0] == "moe"
    assert architectures.reason("nonsense") is None
    gpt2 = architectures.lookup("gpt2")
    assert (gpt2.num_layers_field, gpt2.hidden_size_field, gpt2.transposed, gpt2.gate) == ("n_layer", "n_embd", True, None)
    opt = architectures.lookup("opt")
    assert (opt.inline, opt.ffn, opt.moe) == (True, "", "fc1")


def test_reader_needs_no_torch() -> None:
    code = "import sys, architectures; assert architectures.lookup('llama'); "
    code += "assert not {'torch', 'transformers'} & set(sys.modules)"
    subprocess.run([sys.executable, "-c", code], check=True, cwd=walk.JSON.parent, timeout=300)


# ---------------------------------------------------------------------- what no architecture of the registry has


def tiny_llama() -> LlamaForCausalLM:
    return LlamaForCausalLM(LlamaConfig(hidden_size=16, intermediate_size=24, num_hidden_layers=3, num_attention_heads=2,
                                        num_key_value_heads=2, vocab_size=32))  # fmt: skip


def test_biases_of_some_linear_layers() -> None:
    """Experts have biases everywhere: the missing ones are zeros, and the function is the same."""
    model = tiny_llama()
    mlp = model.model.layers[1].mlp
    mlp.down_proj = nn.Linear(24, 16, bias=True)
    site = find_ffns(model, 3)[1]
    assert site.has_bias
    w = site.weights(model)
    x = torch.randn(5, 16)
    hidden = mlp.act_fn(x @ w["gate"].T + w["gate_bias"]) * (x @ w["up"].T + w["up_bias"])
    torch.testing.assert_close(hidden @ w["down"].T + w["down_bias"], mlp(x))
    assert not w["up_bias"].any()
    assert w["down_bias"].any()


def test_layers_without_an_ffn() -> None:
    model = tiny_llama()
    model.model.layers[1].mlp = nn.Identity()
    sites = find_ffns(model, 3)
    assert (len(sites), sites.layers, [site.layer_index for site in sites]) == (3, [0, 2], [0, 2])
    with pytest.raises(UnsupportedArchitectureError, match=r"`mlp_only_layers`=\[1\]"):
        sites[1]


def test_refusals() -> None:
    model = tiny_llama()
    with pytest.raises(UnsupportedArchitectureError, match=r"`num_hidden_layers`=5 .* model.layers \(3\)"):
        find_ffns(model, 5)
    model.model.layers[2].mlp = model.model.layers[0].mlp
    with pytest.raises(UnsupportedArchitectureError, match="share"):
        find_ffns(model, 3)
    model.model.layers[2].experts = nn.Linear(2, 2)
    with pytest.raises(UnsupportedArchitectureError, match="Mixture-of-Experts"):
        find_ffns(model, 3)
    model = tiny_llama()
    for layer in model.model.layers:
        layer.mlp.sub_norm = nn.LayerNorm(24)  # the function is not that of the linear layers alone
    with pytest.raises(UnsupportedArchitectureError, match="Looked for"):
        find_ffns(model, 3)
