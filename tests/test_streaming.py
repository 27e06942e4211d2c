# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""What is read and what is written: sources in every layout, the same bits, and the names that the model itself writes."""

from __future__ import annotations

import json
import math
import os
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, text_config
from hf_moe.conversion import ConversionError, upcycle
from ranks import finished
from safetensors import safe_open
from safetensors.torch import save_file
from sources import (
    CHAT_TEMPLATE,
    COMMAND,
    dense_model,
    edit_json,
    restore,
    same_tensors,
    save_dense,
    save_tokenizer,
    stored_tensors,
    tree,
)
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig

from hf_moe import MoEConfig, MoEForCausalLM

EXPERTS = 3


def convert(source: Any, destination: Path, **fields: Any) -> dict[str, Tensor]:
    """The tensors of a MoE checkpoint, not verified."""
    upcycle(source, destination, verify=False, **{"num_experts": EXPERTS, **fields})
    return stored_tensors(destination)


def config_of(folder: Path) -> dict[str, Any]:
    """What its config means to Transformers, without who wrote it."""
    content = AutoConfig.from_pretrained(folder).to_dict()
    for side in (content, content["text_config"]):
        for field in ("transformers_version", "_name_or_path", "architectures"):
            side.pop(field, None)
    return content


def ffn_of(name: str) -> bool:
    return ".mlp." in name


# ---------------------------------------------------------------------- layouts of the source


def as_it_is(folder: Path) -> None:
    """`model.safetensors`."""


def sharded(folder: Path) -> None:
    AutoModelForCausalLM.from_pretrained(folder).save_pretrained(folder, max_shard_size="20KB")
    (folder / "model.safetensors").unlink()
    assert len(list(folder.glob("*.safetensors"))) > 3


def index_of_one(folder: Path) -> None:
    """An index, and in its file more than the index lists."""
    tensors = stored_tensors(folder)
    index = {"metadata": {}, "weight_map": dict.fromkeys(tensors, "weights.safetensors")}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    save_file({**tensors, "leftover": torch.zeros(3)}, folder / "weights.safetensors")
    (folder / "model.safetensors").unlink()


def pickled(folder: Path) -> None:
    torch.save(stored_tensors(folder), folder / "pytorch_model.bin")
    (folder / "model.safetensors").unlink()


def pickled_before_zip(folder: Path) -> None:
    torch.save(stored_tensors(folder), folder / "pytorch_model.bin", _use_new_zipfile_serialization=False)
    (folder / "model.safetensors").unlink()


def pickled_shards(folder: Path) -> None:
    weight_map = {}
    for number, (name, tensor) in enumerate(stored_tensors(folder).items()):
        file = f"pytorch_model-{number}.bin"
        torch.save({name: tensor}, folder / file)
        weight_map[name] = file
    (folder / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": weight_map}))
    (folder / "model.safetensors").unlink()


LAYOUTS = [as_it_is, sharded, index_of_one, pickled, pickled_before_zip, pickled_shards]


@pytest.mark.parametrize("layout", LAYOUTS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_layouts(layout: Any, dtype: torch.dtype, tmp_path: Path) -> None:
    """The output does not depend on the source's files, nothing of the source is touched, and everything keeps its bits."""
    dense_model(dtype=dtype).save_pretrained(tmp_path / "dense")
    expected = stored_tensors(tmp_path / "dense")
    layout(tmp_path / "dense")
    before = tree(tmp_path / "dense")
    written = convert(tmp_path / "dense", tmp_path / "moe")
    assert tree(tmp_path / "dense") == before
    assert_upcycled(written, expected)
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype="auto")
    assert moe.dtype == dtype


def assert_upcycled(written: dict[str, Tensor], dense: dict[str, Tensor], experts: int = EXPERTS) -> None:
    """By copy, llama: what is shared keeps its name and bits, every expert is the dense FFN."""
    routers = {name: tensor for name, tensor in written.items() if name.endswith(".mlp.gate.weight")}
    made = {name: tensor for name, tensor in dense.items() if not ffn_of(name)}
    for name, tensor in dense.items():
        if ffn_of(name):
            made |= {name.replace(".mlp.", f".mlp.experts.{i}."): tensor for i in range(experts)}
    same_tensors({name: tensor for name, tensor in written.items() if name not in routers}, made)
    layers = {name.split(".")[2] for name in dense if ffn_of(name)}
    assert len(routers) == len(layers)
    assert all(router.dtype == torch.float32 and router.shape[0] == experts for router in routers.values())


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "opt", "gpt_neox"])
def test_names_without_prefix(family: str, tmp_path: Path) -> None:
    """As GPT-2 is on the Hub: the base model's names and no LM head. In the output they are the causal LM's names."""
    dense = dense_model(family, tie_word_embeddings=True)
    dense.save_pretrained(tmp_path / "dense")
    expected = convert(tmp_path / "dense", tmp_path / "expected")
    prefix = f"{dense.base_model_prefix}."
    tensors = stored_tensors(tmp_path / "dense")
    assert all(name.startswith(prefix) for name in tensors)
    restore(tmp_path / "dense", {name.removeprefix(prefix): tensor for name, tensor in tensors.items()})
    same_tensors(convert(tmp_path / "dense", tmp_path / "moe"), expected)
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe").eval()
    ids = torch.arange(3, 20).view(1, -1)
    torch.testing.assert_close(moe(ids).logits, dense(ids).logits, rtol=0, atol=1e-5)


@pytest.mark.parametrize("family", ["llama", "gpt2", "falcon", "opt", "phi3", "llama_tied"])
def test_models_in_memory(family: str, tmp_path: Path) -> None:
    """A model in memory gives the same bytes as its folder."""
    expected = convert(save_dense(tmp_path / "dense", family), tmp_path / "expected")
    same_tensors(convert(dense_model(family), tmp_path / "moe"), expected)
    assert config_of(tmp_path / "moe") == config_of(tmp_path / "expected")


@pytest.mark.parametrize("in_memory", [True, False])
def test_without_destination(in_memory: bool, tmp_path: Path) -> None:
    """In memory: the same weights as in a folder, verified."""
    source: Any = save_dense(tmp_path / "dense")
    result = upcycle(dense_model() if in_memory else source, num_experts=EXPERTS)
    assert result.destination is None
    assert result.report is not None
    assert result.report.exact
    convert(source, tmp_path / "moe")
    on_disk = AutoModelForCausalLM.from_pretrained(tmp_path / "moe").state_dict()
    same_tensors(dict(result.model.state_dict()), dict(on_disk))


def test_tied_embeddings_are_written_once(tmp_path: Path) -> None:
    written = convert(save_dense(tmp_path / "dense", "llama_tied"), tmp_path / "moe")
    assert "lm_head.weight" not in written
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert moe.get_output_embeddings().weight is moe.get_input_embeddings().weight


def test_mixed_dtypes_are_kept(tmp_path: Path) -> None:
    """Norms in fp32 in a model in bf16, and one FFN in fp16."""
    dense_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    tensors = stored_tensors(tmp_path / "dense")
    for name in tensors:
        tensors[name] = tensors[name].float() if "norm" in name else tensors[name]
        tensors[name] = tensors[name].half() if ".1.mlp." in name else tensors[name]
    restore(tmp_path / "dense", tensors)
    assert_upcycled(convert(tmp_path / "dense", tmp_path / "moe"), tensors)
    assert json.loads((tmp_path / "moe" / "config.json").read_text())["dtype"] == "bfloat16"


class Trap:
    """Unpickling it makes a file."""

    def __init__(self, path: Path) -> None:
        self.path = path

    def __reduce__(self) -> Any:
        return (os.mkdir, (str(self.path),))


@pytest.mark.parametrize("shard", [False, True])
@pytest.mark.parametrize("legacy", [False, True])
def test_code_in_a_pickle_is_not_run(shard: bool, legacy: bool, tmp_path: Path) -> None:
    save_dense(tmp_path / "dense")
    (pickled_shards if shard else pickled)(tmp_path / "dense")
    path = next((tmp_path / "dense").glob("*.bin"))
    bad = {**torch.load(path), "x": Trap(tmp_path / "sprung")}
    torch.save(bad, path, _use_new_zipfile_serialization=not legacy)
    with pytest.raises(ConversionError, match=rf"{path.name}.*not readable as tensors alone"):
        convert(tmp_path / "dense", tmp_path / "moe")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense"]
    torch.load(path, weights_only=False)  # the trap works
    assert (tmp_path / "sprung").exists()


@pytest.mark.parametrize("content", [[torch.zeros(2)], torch.zeros(2), {"model": {}}, {}])
def test_pickles_of_something_else(content: Any, tmp_path: Path) -> None:
    save_dense(tmp_path / "dense")
    pickled(tmp_path / "dense")
    torch.save(content, tmp_path / "dense" / "pytorch_model.bin")
    with pytest.raises(ConversionError, match=r"pytorch_model\.bin|missing"):
        convert(tmp_path / "dense", tmp_path / "moe")


def test_gguf(tmp_path: Path) -> None:
    """A llama as llama.cpp stores it: other names, and the rows of queries and keys in another order."""
    gguf = pytest.importorskip("gguf")
    dense = save_gguf(gguf, tmp_path / "gguf")
    result = upcycle(tmp_path / "gguf", tmp_path / "moe", num_experts=EXPERTS, gguf_file="tiny.gguf")
    assert result.report is not None
    assert result.report.exact
    ids = torch.arange(3, 20).view(1, -1)
    torch.testing.assert_close(result.model(ids).logits, dense(ids).logits, rtol=0, atol=1e-5)
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "moe")
    assert tokenizer.convert_tokens_to_ids(["a", "b"]) == [4, 5]


def save_gguf(gguf: Any, folder: Path) -> Any:
    """Write a tiny llama as GGUF; returns the model."""
    folder.mkdir()
    dense = dense_model()
    config = dense.config
    writer = gguf.GGUFWriter(folder / "tiny.gguf", "llama")
    writer.add_context_length(config.max_position_embeddings)
    writer.add_embedding_length(config.hidden_size)
    writer.add_block_count(config.num_hidden_layers)
    writer.add_feed_forward_length(config.intermediate_size)
    writer.add_head_count(config.num_attention_heads)
    writer.add_head_count_kv(config.num_key_value_heads)
    writer.add_layer_norm_rms_eps(config.rms_norm_eps)
    writer.add_rope_dimension_count(config.head_dim)
    writer.add_rope_freq_base(config.rope_parameters["rope_theta"])
    writer.add_vocab_size(config.vocab_size)
    tokens = ["<unk>", "<s>", "</s>", "▁", "a", "b", *(f"<0x{i:02X}>" for i in range(config.vocab_size - 6))]
    writer.add_tokenizer_model("llama")
    writer.add_token_list(tokens)
    writer.add_token_scores([-float(i) for i in range(len(tokens))])
    writer.add_token_types([2, 3, 3, 1, 1, 1, *[6] * (len(tokens) - 6)])
    writer.add_bos_token_id(1)
    writer.add_eos_token_id(2)
    names = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, config.num_hidden_layers)
    for name, tensor in dense.state_dict().items():
        heads = {"q_proj": config.num_attention_heads, "k_proj": config.num_key_value_heads}.get(name.split(".")[-2])
        if heads:  # llama.cpp rotates neighbouring dimensions, Transformers the two halves
            tensor = tensor.view(heads, 2, -1, tensor.shape[1]).transpose(1, 2).reshape(tensor.shape)
        writer.add_tensor(names.get_name(name, try_suffixes=(".weight",)), tensor.contiguous().numpy())
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return dense


# ---------------------------------------------------------------------- dtypes and shards of the output


@pytest.mark.parametrize("source", ["float32", "bfloat16", "float16"])
@pytest.mark.parametrize("target", ["float32", "bfloat16", "float16"])
def test_dtype(source: str, target: str, tmp_path: Path) -> None:
    """Every weight is rounded once, as torch rounds; routers are fp32; the config says so."""
    dense_model(dtype=getattr(torch, source)).save_pretrained(tmp_path / "dense")
    expected = {name: t.to(getattr(torch, target)) for name, t in stored_tensors(tmp_path / "dense").items()}
    assert_upcycled(convert(tmp_path / "dense", tmp_path / "moe", dtype=target), expected)
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe", dtype="auto")
    assert moe.dtype == getattr(torch, target)
    assert moe.moe_layers[0].gate.weight.dtype == torch.float32


def test_values_too_large_for_the_dtype(tmp_path: Path) -> None:
    dense = dense_model()
    dense.model.layers[1].mlp.up_proj.weight.data[3, 4] = 1e6
    dense.save_pretrained(tmp_path / "dense")
    with pytest.raises(ConversionError, match=r"`dtype`=F16.*layers\.1\.mlp\.up_proj\.weight.*too large"):
        convert(tmp_path / "dense", tmp_path / "moe", dtype="float16")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dense"]


@pytest.mark.parametrize("size", [1, 5_000, "20KB", "1MB"])
@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_shards(size: int | str, family: str, tmp_path: Path) -> None:
    """Each file is within the size (or holds one tensor), the index is right, and the tensors are those of one file."""
    save_dense(tmp_path / "dense", family)
    expected = convert(tmp_path / "dense", tmp_path / "one")
    same_tensors(convert(tmp_path / "dense", tmp_path / "moe", max_shard_size=size), expected)
    files = sorted((tmp_path / "moe").glob("*.safetensors"))
    limit = {"20KB": 20_000, "1MB": 10**6}.get(str(size), size)
    index_path = tmp_path / "moe" / "model.safetensors.index.json"
    for file in files:
        with safe_open(file, "pt") as opened:
            assert opened.metadata() == {"format": "pt"}
            sizes = [t.nbytes for t in map(opened.get_tensor, opened.keys())]
        assert sum(sizes) <= limit or len(sizes) == 1
    assert [f.name for f in files] == [f"model-{i:05d}-of-{len(files):05d}.safetensors" for i in range(1, len(files) + 1)] or (
        len(files) == 1 and files[0].name == "model.safetensors"
    )
    assert index_path.exists() == (len(files) > 1)
    if index_path.exists():
        index = json.loads(index_path.read_text())
        assert index["metadata"]["total_size"] == sum(t.nbytes for t in expected.values())
        assert index["weight_map"].keys() == expected.keys()
        for name, file in index["weight_map"].items():
            with safe_open(tmp_path / "moe" / file, "pt") as opened:
                assert torch.equal(opened.get_tensor(name), expected[name])
    one, other = (AutoModelForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("one", "moe"))
    same_tensors(dict(one), dict(other))


def test_headers_are_aligned(tmp_path: Path) -> None:
    """Data begin at multiples of 8 bytes, also where dtypes are mixed, so that files can be mapped into memory."""
    dense_model(dtype=torch.bfloat16).save_pretrained(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "moe")
    data = (tmp_path / "moe" / "model.safetensors").read_bytes()
    length = int.from_bytes(data[:8], "little")
    assert length % 8 == 0
    header = json.loads(data[8 : 8 + length])
    items = {"F32": 4, "BF16": 2}
    assert {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} == set(items)
    assert all(e["data_offsets"][0] % items[e["dtype"]] == 0 for n, e in header.items() if n != "__metadata__")


# ---------------------------------------------------------------------- routers


def test_routers_follow_the_seed(tmp_path: Path) -> None:
    """The same for the same seed, others for another seed and in another layer; loads of one checkpoint agree."""
    save_dense(tmp_path / "dense")
    runs = {}
    for name, seed in (("a", 7), ("b", 7), ("c", 8)):
        written = convert(tmp_path / "dense", tmp_path / name, seed=seed)
        runs[name] = [written[f"model.layers.{i}.mlp.gate.weight"] for i in range(3)]
    assert all(torch.equal(one, other) for one, other in zip(runs["a"], runs["b"], strict=True))
    different = [*runs["a"], *runs["c"]]
    assert all(not torch.equal(one, other) for i, one in enumerate(different) for other in different[:i])
    first, second = (AutoModelForCausalLM.from_pretrained(tmp_path / "a").state_dict() for _ in range(2))
    same_tensors(dict(first), dict(second))


@pytest.mark.parametrize(
    ("family", "hidden", "fields"),
    [
        ("llama", 32, {}),
        ("llama", 256, {"num_experts": 64}),
        ("gpt2", 512, {"num_experts": 8}),
        ("gemma2", 128, {"num_experts": 16}),
        ("llama", 64, {"router_type": "sigmoid", "num_experts": 8}),
        ("llama", 64, {"router_type": "switch", "num_experts_per_tok": 1}),
        ("llama", 64, {"router_type": "noisy_top_k", "num_experts": 8}),
        ("llama", 64, {"method": "granular", "num_experts": 8}),
        ("llama", 64, {"method": "split", "num_experts": 8, "num_experts_per_tok": 8}),
    ],
)
def test_routing_starts_nearly_uniform_yet_tells_experts_apart(
    family: str, hidden: int, fields: dict[str, Any], tmp_path: Path
) -> None:
    """Entropy of each token's probabilities above 95 % of its maximum, and no two experts with one row."""
    sizes = {"n_embd": hidden} if family == "gpt2" else {"hidden_size": hidden}
    save_dense(tmp_path / "dense", family, **sizes)
    convert(tmp_path / "dense", tmp_path / "moe", **fields)
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe").eval()
    with torch.inference_mode():
        outputs = moe(torch.randint(3, 128, (4, 32)), output_router_logits=True)
    for logits, layer in zip(outputs.router_logits, moe.moe_layers, strict=True):
        entropy = torch.distributions.Categorical(logits=logits.double()).entropy()
        assert entropy.min() > 0.95 * math.log(logits.shape[1])
        if fields.get("router_type") != "noisy_top_k":  # its noise tells them apart
            rows = layer.gate.weight.unique(dim=0)
            assert len(rows) == logits.shape[1] // (2 if fields.get("method") == "granular" else 1)


@pytest.mark.parametrize(("init", "std"), [("zeros", 0.0), ("normal", 0.5), ("normal", 1e-4)])
def test_router_init(init: str, std: float, tmp_path: Path) -> None:
    save_dense(tmp_path / "dense", hidden_size=256)
    fields = {"router_init_std": std} if std else {}
    written = convert(tmp_path / "dense", tmp_path / "moe", num_experts=64, router_init=init, **fields)
    for layer in range(3):
        router = written[f"model.layers.{layer}.mlp.gate.weight"]
        assert router.std().item() == pytest.approx(std, rel=0.03)
        assert router.mean().abs() <= 0.05 * std


# ---------------------------------------------------------------------- what goes along


def test_companions(tmp_path: Path) -> None:
    """Tokenizer, chat template, generation config and licence are carried byte by byte; scraps are not."""
    source = save_dense(tmp_path / "dense")
    save_tokenizer(source)
    GenerationConfig(max_new_tokens=7, do_sample=True, temperature=0.25, eos_token_id=[2, 5]).save_pretrained(source)
    carried = {"LICENSE": "do what you like", "NOTICE.txt": "by us", "LICENSE-MODEL.md": "too", "tokenizer.model": "sp",
               "additional_chat_templates/tool_use.jinja": "{{ tools }}"}  # fmt: skip
    left = {"README.md": "of the dense model", "optimizer.pt": "", "trainer_state.json": "{}", "setup.py": "import nothing",
            ".gitattributes": "", "model.safetensors.part": ""}  # fmt: skip
    for name, text in {**carried, **left}.items():
        (source / name).parent.mkdir(exist_ok=True)
        (source / name).write_text(text)
    convert(source, tmp_path / "moe")
    made = tree(tmp_path / "moe")
    for name in ("tokenizer.json", "tokenizer_config.json", "chat_template.jinja", "generation_config.json", *carried):
        assert made[name] == tree(source)[name], name
    assert not {name for name in left if name != "README.md"} & made.keys()
    assert (tmp_path / "moe" / "README.md").read_text() != left["README.md"]
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "moe")
    messages = [{"role": "user", "content": "the cat"}]
    assert tokenizer.apply_chat_template(messages, tokenize=False) == "<user>the cat"
    assert tokenizer.chat_template == {"default": CHAT_TEMPLATE, "tool_use": "{{ tools }}"}
    moe = AutoModelForCausalLM.from_pretrained(tmp_path / "moe")
    assert moe.generation_config.temperature == 0.25
    assert moe.generation_config.eos_token_id == [2, 5]
    assert moe.can_generate()


def test_code_of_a_tokenizer_is_copied_not_run(tmp_path: Path) -> None:
    """Nothing outside of the folders is read or written, whatever `auto_map` says."""
    source = save_dense(tmp_path / "in" / "dense")
    save_tokenizer(source)
    (source / "tokenization_own.py").write_text(f"import os; os.mkdir({str(tmp_path / 'run')!r})")
    (tmp_path / "in" / "secret.py").write_text("secret")
    (tmp_path / "out").mkdir()
    names = ["tokenization_own.OwnTokenizer", "../secret.Own", "org/repo--tokenization_own.OwnFast", None]
    edit_json(source / "tokenizer_config.json", auto_map={"AutoTokenizer": names})
    convert(source, tmp_path / "out" / "moe")
    assert (tmp_path / "out" / "moe" / "tokenization_own.py").read_bytes() == (source / "tokenization_own.py").read_bytes()
    assert not (tmp_path / "run").exists()
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["moe"]


# Model and fields: what is written is what `save_pretrained` writes.
SHAPES: dict[str, tuple[str, dict[str, Any]]] = {
    "top_k": ("llama", {}),
    "not normalised": ("llama", {"norm_topk_prob": False}),
    "noisy_top_k": ("llama", {"router_type": "noisy_top_k"}),
    "switch": ("llama", {"router_type": "switch", "num_experts_per_tok": 1}),
    "gshard": ("llama", {"router_type": "gshard"}),
    "expert_choice": ("llama", {"router_type": "expert_choice", "allow_non_causal": True}),
    "hash": ("llama", {"router_type": "hash"}),
    "sigmoid": ("llama", {"router_type": "sigmoid", "n_group": 2, "topk_group": 1, "routed_scaling_factor": 2.5}),
    "hierarchical": ("llama", {"router_type": "hierarchical", "n_group": 2, "topk_group": 2}),
    "strictly_balanced": ("llama", {"router_type": "strictly_balanced"}),
    "shared": ("llama", {"num_shared_experts": 2}),
    "shared gate": ("llama", {"num_shared_experts": 1, "use_shared_expert_gate": True}),
    "residual": ("llama", {"residual_moe": True}),
    "pyramid": ("llama", {"num_experts": [2, 4, 8]}),
    "every other": ("llama", {"decoder_sparse_step": 2}),
    "layers": ("llama", {"layers": [2, 0]}),
    "granular": ("llama", {"method": "granular", "num_experts": 8, "num_experts_per_tok": 4}),
    "granular shared": ("gpt2", {"method": "granular", "num_shared_experts": 2}),
    "split": ("llama", {"method": "split"}),
    "biases": ("llama_biases", {"num_shared_experts": 1}),
    "packed": ("phi3", {"num_shared_experts": 2}),
    "plain": ("gpt2", {"residual_moe": True}),
    "plain shared": ("gpt2", {"num_shared_experts": 3, "use_shared_expert_gate": True}),
    "opt": ("opt", {"num_shared_experts": 1}),
    "opt residual": ("opt", {"residual_moe": True}),
    "falcon": ("falcon_no_bias", {"router_type": "sigmoid"}),
    "gemma3": ("gemma3", {"num_experts": 2}),
    "tied": ("llama_tied", {}),
    "mixtral": ("mistral", {"preset": "mixtral"}),
    "deepseek_v3": ("qwen3", {"preset": "deepseek_v3", "num_experts": 8}),
    "deepspeed_residual": ("cohere2", {"preset": "deepspeed_residual", "num_experts": 4}),
    "olmoe": ("olmo2", {"preset": "olmoe", "num_experts": 8}),
}  # fmt: skip


SHAPES |= {f"family {family}": (family, {}) for family in FAMILIES}


@pytest.mark.parametrize("name", SHAPES)
def test_files_are_those_of_save_pretrained(name: str, tmp_path: Path) -> None:
    """Names, shapes and dtypes of all tensors, the config, the generation config, and the code that goes along."""
    family, fields = SHAPES[name]
    save_dense(tmp_path / "dense", family)
    convert(tmp_path / "dense", tmp_path / "moe", **{"num_experts": 4, **fields})
    config = MoEConfig.from_pretrained(tmp_path / "moe")
    MoEForCausalLM(config).save_pretrained(tmp_path / "own")
    ours, theirs = stored_tensors(tmp_path / "moe"), stored_tensors(tmp_path / "own")
    described = [{n: (tuple(t.shape), t.dtype) for n, t in tensors.items()} for tensors in (ours, theirs)]
    assert described[0] == described[1]
    assert config_of(tmp_path / "moe") == config_of(tmp_path / "own")
    own_files, files = tree(tmp_path / "own"), tree(tmp_path / "moe")
    code = {n for n in own_files if n.endswith(".py")}
    assert "modeling_moe.py" in code
    assert {n: files.get(n) for n in code} == {n: own_files[n] for n in code}
    assert {n for n in files if n.endswith(".py")} == code
    raw = [json.loads((tmp_path / n / "config.json").read_text()) for n in ("moe", "own")]
    assert raw[0]["auto_map"] == raw[1]["auto_map"]
    assert raw[0]["architectures"] == raw[1]["architectures"] == ["MoEForCausalLM"]
    generation = [GenerationConfig.from_pretrained(tmp_path / n).to_dict() for n in ("dense", "moe")]
    assert generation[0] == generation[1]


@pytest.mark.parametrize("preset", ["mixtral", "qwen3_moe", "deepseek_v3", "switch", "shazeer2017_hierarchical"])
def test_config_is_that_of_the_preset(preset: str, tmp_path: Path) -> None:
    """As `MoEConfig.from_preset` with the dense model's config."""
    save_dense(tmp_path / "dense")
    convert(tmp_path / "dense", tmp_path / "moe", preset=preset, num_experts=8)
    expected = MoEConfig.from_preset(preset, text_config("llama"), num_experts=8)
    written = MoEConfig.from_pretrained(tmp_path / "moe")
    fields = MoEConfig.__dataclass_fields__.keys() & expected.to_dict().keys() - {"text_config", "architectures", "dtype"}
    assert {"router_type", "num_experts_per_tok", "n_group", "mlp_only_layers"} <= fields
    for field in fields - {"transformers_version", "auto_map", "tie_word_embeddings"}:
        assert getattr(written, field) == getattr(expected, field), field


# ---------------------------------------------------------------------- memory

# Runs the command and tells the peak of its memory: the largest of this process's children.
_PEAK = """
import resource, subprocess, sys
status = subprocess.run(sys.argv[1:], stdout=subprocess.DEVNULL).returncode
print(status, resource.getrusage(resource.RUSAGE_CHILDREN).ru_maxrss)
"""


def peak_of(*command: str) -> int:
    """KiB."""
    _, output = finished([sys.executable, "-c", _PEAK, *command], timeout=300)
    status, peak = output.split()[-2:]
    assert status == "0", output
    return int(peak)


@pytest.mark.parametrize(
    ("experts", "arguments", "most_mib"),
    [(4, (), 100), (16, (), 100), (4, ("--dtype", "bfloat16"), 400), (4, ("--max-shard-size", "50MB"), 100)],
)
def test_memory_does_not_grow_with_the_output(experts: int, arguments: tuple[str, ...], most_mib: int, tmp_path: Path) -> None:
    """100 MB of dense weights to 300 MB or 1 GB. Where nothing is computed, torch is not even imported."""
    config = LlamaConfig(hidden_size=512, intermediate_size=4096, num_hidden_layers=3, num_attention_heads=8, vocab_size=8000)
    AutoModelForCausalLM.from_config(config).save_pretrained(tmp_path / "dense")
    command = [*COMMAND, str(tmp_path / "dense"), str(tmp_path / "moe"), "--num-experts", str(experts), "--no-verify"]
    peak = peak_of(*command, *arguments)
    written = sum(path.stat().st_size for path in (tmp_path / "moe").glob("*.safetensors"))
    assert written > (4 * 8 if arguments[:1] == ("--dtype",) else experts * 70) * 10**6
    assert 10 * 1024 < peak < most_mib * 1024
