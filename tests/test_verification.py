# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Streamed from disk, models compute what they compute in memory; and the report tells what is broken."""

import dataclasses
import json
import math
import weakref
from pathlib import Path
from typing import Any

import pytest
import torch
from families import FAMILIES, text_config
from hf_moe.conversion import streamed_parameters as streaming
from hf_moe.conversion import upcycle, verification
from hf_moe.conversion.checkpoint_reader import open_checkpoint
from hf_moe.conversion.errors import ConversionError
from hf_moe.conversion.streamed_model import NotStreamableError, own_dtype, read_config, streamed_model, whole_model
from hf_moe.conversion.verification import ExactnessReport, load_tokenizer, token_batches, verify, verify_checkpoints
from safetensors.torch import save_file
from test_upcycling import ROUTERS, dense_model
from tiny import tensors_on_disk, tiny, token_ids
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from torch import Tensor
from transformers import (
    AutoModelForCausalLM,
    DeepseekV3Config,
    GPTNeoXForCausalLM,
    MixtralConfig,
    PreTrainedModel,
    PreTrainedTokenizerFast,
)

BROUGHT_BY_THE_ISSUE = ("llama", "llama_biases", "gpt2", "opt", "gpt_neox", "phi3", "gemma2", "gemma3", "falcon", "llama_tied")


@pytest.fixture
def small_blocks(monkeypatch: pytest.MonkeyPatch) -> None:
    """Blocks of a few rows, so that the tiny matrices are cut as large ones are."""
    monkeypatch.setattr(streaming, "_BLOCK", 512)


def streamed(folder: Path, **options: Any) -> PreTrainedModel:
    checkpoint = open_checkpoint(folder)
    return streamed_model(checkpoint, read_config(checkpoint), own_dtype(checkpoint), **options)


def in_memory(folder: Path, **options: Any) -> PreTrainedModel:
    return AutoModelForCausalLM.from_pretrained(folder, dtype="auto", **options).eval()


@torch.inference_mode()
def logits(model: PreTrainedModel) -> Tensor:
    return model(token_ids()).logits


# ---------------------------------------------------------------------- streamed models


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", FAMILIES)
def test_streamed_is_the_loaded_model(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    """Dense and MoE, bit by bit in their own dtype, and in fp64; and nothing is left in memory afterwards."""
    dense_model(family).to(dtype).save_pretrained(tmp_path / "dense")
    tiny(family, router_type="sigmoid").to(dtype).save_pretrained(tmp_path / "moe")
    for folder, options in (("dense", {}), ("moe", {"experts_implementation": "eager"})):
        loaded, model = in_memory(tmp_path / folder, **options), streamed(tmp_path / folder)
        assert torch.equal(logits(model), logits(loaded))
        wide = streamed(tmp_path / folder, compute_dtype=torch.float64)
        torch.testing.assert_close(logits(wide), logits(loaded.double()), rtol=0, atol=1e-10)
        assert all(isinstance(p, streaming.StreamedParameter) for p in (*model.parameters(), *wide.parameters()))


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("family", BROUGHT_BY_THE_ISSUE)
def test_blocks_of_rows(family: str, tmp_path: Path) -> None:
    tiny(family, num_shared_experts=1).save_pretrained(tmp_path)
    torch.testing.assert_close(logits(streamed(tmp_path)), logits(in_memory(tmp_path)), rtol=0, atol=1e-5)
    wide = logits(in_memory(tmp_path).double())
    torch.testing.assert_close(logits(streamed(tmp_path, compute_dtype=torch.float64)), wide, rtol=0, atol=1e-10)


def test_rows_across_tensors(tmp_path: Path) -> None:
    """A stored tensor that consists of several gives any rows of the whole."""
    parts = [torch.randn(rows, 3) for rows in (4, 1, 6)]
    save_file({f"t{i}": part for i, part in enumerate(parts)}, tmp_path / "model.safetensors")
    stored = streaming.StoredTensor(open_checkpoint(tmp_path, {}), ("t0", "t1", "t2"), (11, 3), torch.float64)
    for start in range(12):
        for stop in range(start, 12):
            assert torch.equal(stored.read(start, stop), torch.cat(parts).double()[start:stop])


def _native(config: Any) -> PreTrainedModel:
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_config(config, experts_implementation="eager").eval()
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(8.0)
    return model


_SMALL = {"vocab_size": 128, "hidden_size": 32, "intermediate_size": 48, "num_hidden_layers": 2, "num_attention_heads": 4,
          "num_key_value_heads": 4, "pad_token_id": 0}  # fmt: skip
NATIVE = {
    "mixtral": MixtralConfig(**_SMALL, num_local_experts=4),
    "deepseek_v3": DeepseekV3Config(**_SMALL, moe_intermediate_size=16, n_routed_experts=4, num_experts_per_tok=2, n_group=2,
                                    topk_group=1, first_k_dense_replace=1, q_lora_rank=16, kv_lora_rank=16,
                                    qk_rope_head_dim=8, qk_nope_head_dim=8, v_head_dim=8),
}  # fmt: skip


@pytest.mark.usefixtures("small_blocks")
@pytest.mark.parametrize("name", NATIVE)
def test_native_moe_checkpoints_stream_as_well(name: str, tmp_path: Path) -> None:
    model = _native(NATIVE[name])
    model.save_pretrained(tmp_path)
    wide = streamed(tmp_path, compute_dtype=torch.float64)
    torch.testing.assert_close(logits(wide), logits(model.double()), rtol=1e-9, atol=1e-9)


def test_base_model_prefix_may_be_absent(tmp_path: Path) -> None:
    dense = dense_model("gpt2")
    dense.transformer.save_pretrained(tmp_path)
    names = set(open_checkpoint(tmp_path).tensors)
    assert "wte.weight" in names
    assert torch.equal(logits(streamed(tmp_path)), logits(dense))


def test_names_that_transformers_renames(tmp_path: Path) -> None:
    dense = dense_model("gpt_neox")
    assert isinstance(dense, GPTNeoXForCausalLM)
    dense.save_pretrained(tmp_path)
    assert not set(open_checkpoint(tmp_path).tensors) <= set(dense.state_dict())
    assert torch.equal(logits(streamed(tmp_path)), logits(dense))


@pytest.mark.usefixtures("small_blocks")
def test_memory_holds_one_block_and_only_chosen_experts_are_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model = tiny("llama", num_experts=16)
    model.save_pretrained(tmp_path)
    live, peak, read = 0, 0, set()
    plain = streaming.StoredTensor.read

    def drop(size: int) -> None:
        nonlocal live
        live -= size

    def tracked(self: Any, start: int = 0, stop: int | None = None) -> Tensor:
        nonlocal live, peak
        tensor = plain(self, start, stop)
        live += tensor.nbytes
        peak = max(peak, live)
        weakref.finalize(tensor, drop, tensor.nbytes)
        read.update(self.names)
        return tensor

    monkeypatch.setattr(streaming.StoredTensor, "read", tracked)
    chosen = streamed(tmp_path)
    with torch.inference_mode():
        routing = chosen(torch.tensor([[5, 9]]), output_router_logits=True).router_logits
    expected = {(layer, i) for layer, scores in enumerate(routing) for i in scores.topk(2).indices.flatten().tolist()}
    split = [name.split(".") for name in read if ".experts." in name]  # model.layers.0.mlp.experts.3.up_proj.weight
    assert {(int(parts[2]), int(parts[5])) for parts in split} == expected
    assert len(expected) < 3 * 16
    router, norms = 16 * 32 * 4, 2 * 32 * 4
    assert peak <= 2 * 512 + router + norms
    assert live <= norms + router


# ---------------------------------------------------------------------- the same report


def both_reports(tmp_path: Path) -> tuple[ExactnessReport, ExactnessReport]:
    """Streamed, and in memory."""
    dense, moe = (in_memory(tmp_path / name, experts_implementation="eager") for name in ("dense", "moe"))
    return verify_checkpoints(tmp_path / "dense", tmp_path / "moe"), verify(dense, moe)


def assert_same_report(one: ExactnessReport, other: ExactnessReport) -> None:
    for field in dataclasses.fields(one):
        a, b = getattr(one, field.name), getattr(other, field.name)
        assert a == pytest.approx(b, rel=1e-6, abs=1e-9) if isinstance(a, float) else a == b, field.name


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("family", BROUGHT_BY_THE_ISSUE)
def test_report_of_every_family(family: str, dtype: torch.dtype, tmp_path: Path) -> None:
    dense_model(family).to(dtype).save_pretrained(tmp_path / "dense")
    upcycle(str(tmp_path / "dense"), tmp_path / "moe", num_experts=4, verify=False)
    report, expected = both_reports(tmp_path)
    assert_same_report(report, expected)
    assert report.exact
    assert report.dtype == str(dtype).removeprefix("torch.")
    assert (report.max_abs_diff_float64 is None) == (report.max_abs_diff <= 1e-5)


@pytest.mark.parametrize("router", ROUTERS)
def test_report_of_every_router(router: str, tmp_path: Path) -> None:
    fields, promised = ROUTERS[router]
    dense_model("llama").save_pretrained(tmp_path / "dense")
    upcycle(str(tmp_path / "dense"), tmp_path / "moe", verify=False, **{"num_experts": 4, **fields})
    report, expected = both_reports(tmp_path)
    assert_same_report(report, expected)
    assert report.exact == (promised is not None)
    if fields.get("router_type") == "hash":
        assert report.routing_entropy is None
    else:
        assert report.routing_entropy is not None
        assert 0.95 < report.routing_entropy <= 1.0


def test_fp64_tells_rounding_from_a_difference(tmp_path: Path) -> None:
    dense = dense_model("llama")
    dense.lm_head.weight.data *= 1000
    dense.save_pretrained(tmp_path / "dense")
    upcycle(str(tmp_path / "dense"), tmp_path / "moe", num_experts=4, verify=False)
    report, expected = both_reports(tmp_path)
    assert_same_report(report, expected)
    assert report.max_abs_diff > 1e-5
    assert report.max_abs_diff_float64 is not None
    assert report.max_abs_diff_float64 < 1e-9
    assert report.exact


def change(folder: Path, name: str, factor: float) -> None:
    """Multiply one tensor on disk."""
    tensors = tensors_on_disk(folder)
    tensors[name] = tensors[name] * factor
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def made_moe(tmp_path: Path, **fields: Any) -> Path:
    dense_model("llama").save_pretrained(tmp_path / "dense")
    upcycle(str(tmp_path / "dense"), tmp_path / "moe", verify=False, **{"num_experts": 4, **fields})
    return tmp_path / "moe"


def test_one_broken_tensor_of_one_expert_is_found(tmp_path: Path) -> None:
    moe = made_moe(tmp_path)
    assert verify_checkpoints(tmp_path / "dense", moe, expected_exact=True).verdict == "function preserved"
    change(moe, "model.layers.1.mlp.experts.2.down_proj.weight", 1.001)
    report, expected = both_reports(tmp_path)
    assert_same_report(report, expected)
    assert not report.exact
    assert report.verdict.startswith("approximate")
    broken = verify_checkpoints(tmp_path / "dense", moe, expected_exact=True)
    assert "NOT PRESERVED" in broken.verdict
    assert broken.verdict in str(broken)
    assert "as the method says" in verify_checkpoints(tmp_path / "dense", moe, expected_exact=False).verdict


def test_logits_that_are_no_numbers_are_broken(tmp_path: Path) -> None:
    moe = made_moe(tmp_path)
    change(moe, "lm_head.weight", 1e38)  # finite weights, logits that are not
    report = verify_checkpoints(tmp_path / "dense", moe)
    assert not report.exact
    assert report.verdict.startswith("BROKEN")


def test_damaged_checkpoints_are_refused(tmp_path: Path) -> None:
    moe = made_moe(tmp_path)
    tensors, config = tensors_on_disk(moe), json.loads((moe / "config.json").read_text())
    name = "model.layers.0.mlp.experts.1.up_proj.weight"
    changed: dict[str, tuple[dict[str, Tensor], dict[str, Any]]] = {
        "norm.weight` is missing": ({k: v for k, v in tensors.items() if k != "model.norm.weight"}, {}),
        "missing|experts": ({k: v for k, v in tensors.items() if k != name}, {}),
        "shape": ({**tensors, name: tensors[name][:3].contiguous()}, {}),
        "NaN or Inf": ({**tensors, name: tensors[name] * math.nan}, {}),
        "of different models": (tensors, {"num_experts": 5}),
    }
    for message, (content, fields) in changed.items():
        save_file(content, moe / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ConversionError, match=message):
            verify_checkpoints(tmp_path / "dense", moe, moe_config={**config, **fields})


def test_config_may_have_no_name_yet(tmp_path: Path) -> None:
    moe = made_moe(tmp_path)
    config = json.loads((moe / "config.json").read_text())
    (moe / "config.json").rename(moe / "config.json.unfinished")
    assert verify_checkpoints(tmp_path / "dense", moe, moe_config=config).exact


def test_another_dtype_is_compared_after_rounding(tmp_path: Path) -> None:
    """The function is compared, not the dtype that the user asked for."""
    dense = dense_model("llama")
    dense.save_pretrained(tmp_path / "dense")
    upcycle(str(tmp_path / "dense"), tmp_path / "moe", num_experts=4, dtype="bfloat16", verify=False)
    report = verify_checkpoints(tmp_path / "dense", tmp_path / "moe")
    assert report.dtype == "bfloat16"
    assert report.exact


def test_in_memory_sources(tmp_path: Path) -> None:
    moe = made_moe(tmp_path)
    expected = verify_checkpoints(tmp_path / "dense", moe)
    report = verify_checkpoints(dense_model("llama"), moe)
    assert_same_report(report, expected)
    assert_same_report(
        verify_checkpoints(in_memory(tmp_path / "dense"), in_memory(moe, experts_implementation="eager")), report
    )


def test_what_cannot_be_streamed_is_loaded_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moe = made_moe(tmp_path)
    expected = verify_checkpoints(tmp_path / "dense", moe)

    def refuse(*args: Any, **kwargs: Any) -> PreTrainedModel:
        raise NotStreamableError("merged")

    calls = []
    monkeypatch.setattr(verification, "streamed_model", refuse)
    monkeypatch.setattr(verification, "whole_model", lambda *a, **k: calls.append(1) or whole_model(*a, **k))
    report = verify_checkpoints(tmp_path / "dense", moe)
    assert len(calls) == 2
    assert report.max_abs_diff < 1e-5
    assert report.dense_loss == pytest.approx(expected.dense_loss, rel=1e-6)


def test_other_errors_are_not_hidden(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    moe = made_moe(tmp_path)

    def fail(*args: Any, **kwargs: Any) -> PreTrainedModel:
        raise RuntimeError("out of order")

    monkeypatch.setattr(verification, "streamed_model", fail)
    with pytest.raises(RuntimeError, match="out of order"):
        verify_checkpoints(tmp_path / "dense", moe)


# ---------------------------------------------------------------------- numbers of the report


def test_routing_entropy_is_the_plain_one() -> None:
    moe = tiny("llama", num_experts=[2, 4, 8])
    dense = AutoModelForCausalLM.from_config(text_config("llama"))
    report = verify(dense, moe)
    (ids,) = token_batches(dense.config, None)
    shares = []
    with torch.no_grad():  # as the verification: training adds up in another order
        logits = moe(ids, output_router_logits=True).router_logits
    for scores in logits:
        for row in scores.double().softmax(-1).tolist():
            shares.append(-sum(p * math.log(p) for p in row) / math.log(len(row)))
    assert report.routing_entropy == pytest.approx(sum(shares) / len(shares), abs=1e-9)


def test_losses_and_differences_are_the_plain_ones() -> None:
    dense, moe = dense_model("llama"), tiny("llama")
    report = verify(dense, moe)
    (ids,) = token_batches(dense.config, None)
    a, b = dense(ids, labels=ids), moe(ids, labels=ids)
    assert report.dense_loss == pytest.approx(a.loss.item(), rel=1e-5)
    assert report.moe_loss == pytest.approx(b.loss.item(), rel=1e-5)
    difference = (a.logits - b.logits).abs()
    assert report.max_abs_diff == pytest.approx(difference.max().item(), rel=1e-6)
    assert report.mean_abs_diff == pytest.approx(difference.mean().item(), rel=1e-5)
    assert report.tokens == ids.numel()


def test_json_has_all(tmp_path: Path) -> None:
    report = verify(dense_model("llama"), tiny("llama"), names=("one", "other"))
    content = json.loads(report.to_json())
    assert content["verdict"] == report.verdict
    again = ExactnessReport(**{field.name: content[field.name] for field in dataclasses.fields(ExactnessReport)})
    assert str(again) == str(report)
    assert "LM loss one" in str(report)


# ---------------------------------------------------------------------- text and tokenizers


def write_tokenizer(folder: Path, words: int = 100) -> None:
    vocabulary = {"[UNK]": 0, **{f"w{i}": i for i in range(1, words)}}
    tokenizer = Tokenizer(WordLevel(vocabulary, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, unk_token="[UNK]").save_pretrained(folder)


def test_text_is_cut_in_sequences(tmp_path: Path) -> None:
    write_tokenizer(tmp_path)
    tokenizer = load_tokenizer(tmp_path)
    assert tokenizer is not None
    text = [" ".join(f"w{1 + i % 99}" for i in range(1500)), " ".join(["w7"] * 1500)]
    long = token_batches(text_config("llama", max_position_embeddings=4096), tokenizer, text)
    assert [tuple(ids.shape) for ids in long] == [(1, 512)] * 4
    assert torch.cat(long, dim=1)[0, :1500].tolist() == [1 + i % 99 for i in range(1500)]
    short = token_batches(text_config("llama"), tokenizer, ["w1 w2 w3 w4 w5"] * 40)
    assert [tuple(ids.shape) for ids in short] == [(1, 128), (1, 72)]
    few = token_batches(text_config("llama", vocab_size=64), tokenizer, ["w1 w80 w2"])
    assert few[0].max() < 64
    with pytest.raises(ValueError, match="longer text"):
        token_batches(text_config("llama"), tokenizer, ["w1"])


def test_the_folder_of_the_dense_model_gives_the_tokenizer(tmp_path: Path) -> None:
    moe = made_moe(tmp_path)
    assert verify_checkpoints(tmp_path / "dense", moe, text=["w1 w2 w3"]).tokens == 4 * 32  # random: there is no tokenizer
    write_tokenizer(tmp_path / "dense")
    assert verify_checkpoints(tmp_path / "dense", moe, text=["w1 w2 w3"]).tokens == 3
    assert verify_checkpoints(tmp_path / "dense", moe).tokens > 50  # built-in text


def test_code_of_a_tokenizer_is_never_run(tmp_path: Path) -> None:
    marker = tmp_path / "it_ran"
    write_tokenizer(tmp_path)
    config = json.loads((tmp_path / "tokenizer_config.json").read_text())
    config |= {"auto_map": {"AutoTokenizer": ["evil.Evil", None]}, "tokenizer_class": "Evil"}
    (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
    (tmp_path / "evil.py").write_text(f"open({str(marker)!r}, 'w')\nclass Evil: pass\n")
    load_tokenizer(tmp_path)
    assert not marker.exists()
