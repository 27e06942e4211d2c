"""`hf-moe report`: text and routing as they are read, the verdict on real models, and the page in a real browser."""

from __future__ import annotations

import html
import json
import math
import re
import shutil
import subprocess
import sys
from collections.abc import Iterator
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from families import text_config
from hf_moe.training import report, write_report
from hf_moe.training.load_file import ExpertLoadFile
from hf_moe.training.report_charts import training_charts
from hf_moe.training.report_data import analyse_text, pick_tested, report_data
from hf_moe.training.report_page import render_page, shown_piece
from hf_moe.training.report_payload import script_json
from hf_moe.training.report_source import find_source
from hf_moe.training.report_svg import Line, line_chart, ticks
from hf_moe.training.report_text import CLASSES, Document, read_documents, token_name, tokenise
from hf_moe.training.routing_analysis import LayerRouting, expert_counts
from hf_moe.training.routing_capture import Capture, capture_routing
from native_models import native_model
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers
from transformers import PreTrainedTokenizerFast

from hf_moe import MoEConfig, MoEForCausalLM
from hf_moe.__main__ import main as hf_moe_main

VOCABULARY = 400
EVIL = "x < y </script><script>document.title='taken'</script> & \"quoted\" <!-- "
CHROMIUM = next((path for name in ("chromium", "chromium-browser", "google-chrome") if (path := shutil.which(name))), None)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    before = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(before)


@pytest.fixture(scope="module")
def tokenizer() -> PreTrainedTokenizerFast:
    """Byte-level BPE as GPT-2's and SmolLM2's, trained on the report's own sample."""
    made = Tokenizer(models.BPE())
    made.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    made.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCABULARY,
        special_tokens=["<end>"],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    made.train_from_iterator([document.text for document in read_documents([])], trainer)
    return PreTrainedTokenizerFast(tokenizer_object=made, eos_token="<end>")


def build(layers: int = 3, **fields: Any) -> MoEForCausalLM:
    torch.manual_seed(0)
    text = text_config(
        "llama", vocab_size=VOCABULARY, num_hidden_layers=layers, max_position_embeddings=64, initializer_range=0.2
    )
    return MoEForCausalLM(MoEConfig(text_config=text, **{"num_experts": 4, **fields})).eval()


def save(model: Any, tokenizer: PreTrainedTokenizerFast, folder: Path) -> Path:
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def quick(folder: Path, output: Path | None = None, **options: Any) -> Path:
    """A report without pictures, of a little text."""
    return write_report(folder, output, **{"pictures": False, "max_tokens": 1500, **options})


def numbers(page: Path) -> dict[str, Any]:
    return json.loads((page.parent / "report.json").read_text())


# ---------------------------------------------------------------------- text


def test_sample_has_five_domains_of_several_documents() -> None:
    documents = read_documents([])
    parts = [document.part for document in documents]
    assert len(set(parts)) == 5
    assert min(parts.count(part) for part in parts) >= 5
    assert len({document.text for document in documents}) == len(documents)


@pytest.mark.parametrize("text", ["The  cat\n\tsat:  été 12.5 ±🙂\n\n end ", EVIL, "a" * 30])
def test_pieces_are_the_text(tokenizer: PreTrainedTokenizerFast, text: str) -> None:
    table = tokenise([Document(text, "p")], tokenizer, 10_000, 64)
    assert "".join(table.pieces) == text
    assert table.ids_N.tolist() == tokenizer(text)["input_ids"]


def test_classes_of_tokens() -> None:
    words = ["Hello", " world", "s", ",", " 12", " = ", "  ", "{", " été", "½", "<s>", "🙂", "_"]
    made = Tokenizer(models.WordLevel({word: i for i, word in enumerate([*words, "?"])}, unk_token="?"))
    made.pre_tokenizer = pre_tokenizers.Split("|", "removed")
    special = PreTrainedTokenizerFast(tokenizer_object=made, bos_token="<s>")
    table = tokenise([Document("|".join(words), "p")], special, 100, 64)
    # the separators belong to the pieces after them, so give each word its class by itself
    alone = [tokenise([Document(word, "p")], special, 100, 64).class_N[0] for word in words]
    expected = ["word start", "word start", "word start", "punctuation", "number", "code symbol", "whitespace", "code symbol",
                "word start", "number", "special", "code symbol", "code symbol"]  # fmt: skip
    assert [CLASSES[i] for i in alone] == expected
    assert len(table.ids_N) == len(words)


def test_continuations_and_positions(tokenizer: PreTrainedTokenizerFast) -> None:
    table = tokenise([Document("zqxj 2017 zq", "p"), Document("zq", "q")], tokenizer, 100, 4)
    names = [CLASSES[i] for i in table.class_N]
    words = [piece.strip() for piece in table.pieces]
    assert words[0][0] == "z"
    assert names[0] == "word start"
    assert "word continuation" in names
    assert names[-1] in ("word start", "word continuation")
    assert table.position_N[:5].tolist() == [0, 1, 2, 3, 0]  # a sequence has at most 4
    assert table.sequence_N[-1] > table.sequence_N[0]
    assert table.parts == ["p", "q"]
    assert table.position_classes[0] == 0


def test_token_names(tokenizer: PreTrainedTokenizerFast) -> None:
    ids = {text: tokenizer(text)["input_ids"][0] for text in (" ", "\n", "a")}
    assert [token_name(tokenizer, ids[text]) for text in (" ", "\n", "a")] == ["␣", "⏎", "a"]
    assert token_name(tokenizer, tokenizer("🙂")["input_ids"][0]) not in ("", "\ufffd")


def test_documents_of_files(tmp_path: Path) -> None:
    rows = [{"text": f"document {i}", "lang": "xy"[i % 2], "n": i} for i in range(6)]
    jsonl = tmp_path / "a.jsonl"
    jsonl.write_text("".join(json.dumps(row) + "\n" for row in rows) + "\n")
    plain = tmp_path / "b.txt"
    plain.write_text("\n\n".join(f"Paragraph {i} with words." for i in range(40)))
    headed = tmp_path / "c.md"
    headed.write_text("# One\n\nfirst\n\n## Two\n\nsecond\n# no heading, a comment\n")
    assert [d.part for d in read_documents([jsonl])] == [f"line {i}" for i in range(1, 7)]
    assert [d.part for d in read_documents([jsonl], part_field="lang")] == ["x", "y"] * 3
    assert [d.part for d in read_documents([jsonl], part_field="n")] == list("012345")
    sections = read_documents([plain])
    assert [d.part for d in sections] == [f"section {i} of 8" for i in range(1, 9)]
    assert " ".join(" ".join(d.text.split()) for d in sections) == " ".join(plain.read_text().split())
    assert [(d.part, d.text.split()[-1]) for d in read_documents([headed])] == [("One", "first"), ("Two", "comment")]
    assert {d.part for d in read_documents([jsonl, plain])} == {"a.jsonl", "b.txt"}


def test_long_files_are_taken_evenly(tmp_path: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    file = tmp_path / "long.jsonl"
    file.write_text("".join(json.dumps({"text": f"line {i} " + "word " * 50}) + "\n" for i in range(1000)))
    documents = read_documents([file], max_tokens=320)
    assert len(documents) == 20
    assert (documents[0].part, documents[-1].part) == ("line 1", "line 1000")
    table = tokenise(documents, tokenizer, 320, 64)
    lengths = np.bincount(table.document_N)
    assert lengths.tolist() == [16] * 20
    short = [Document("a", "s"), Document("word " * 500, "l")]
    assert len(tokenise(short, tokenizer, 100, 64).ids_N) == 100


# ---------------------------------------------------------------------- routing


@pytest.mark.parametrize(
    "fields",
    [
        {},
        {"router_type": "hash"},
        {"router_type": "sigmoid", "num_experts_per_tok": 3},
        {"eval_capacity_factor": 0.5},
        {"router_type": "strictly_balanced"},
        {"num_experts": [3, 5, 4], "num_experts_per_tok": 1},
    ],
    ids=str,
)
def test_routing_is_that_of_each_sequence_alone(fields: dict[str, Any]) -> None:
    """Padding and batching change nothing, and every token is in its place."""
    model = build(**fields)
    lengths = [3, 7, 5, 12]
    ids = np.random.default_rng(0).integers(3, VOCABULARY, sum(lengths))
    sequences = np.repeat(np.arange(4), lengths)
    keep = np.arange(len(ids)) % 3 == 0
    found = capture_routing(model, ids, sequences, keep, batch_tokens=26)
    position = 0
    for length in lengths:
        records = []
        model.add_routing_listener(records.append, in_eval=True, keep_routing=True)
        with torch.no_grad():
            model(torch.from_numpy(ids[position : position + length])[None])
        model.remove_routing_listener(records.append)
        for layer, record in zip(found.layers, records[0].layers, strict=True):
            for token in range(length):
                row = {
                    int(e): float(w)
                    for e, w in zip(record.routing.expert_ids_TK[token], record.routing.weights_TK[token], strict=True)
                    if e < record.num_experts
                }
                at = position + token
                got = {
                    int(e): float(w)
                    for e, w in zip(layer.expert_ids_NK[at], layer.weights_NK[at], strict=True)
                    if e < layer.num_experts
                }
                assert got == pytest.approx(row, abs=1e-5)
                weights = [
                    w for e, w in zip(layer.expert_ids_NK[at], layer.weights_NK[at], strict=True) if e < layer.num_experts
                ]
                assert weights == sorted(weights, reverse=True)
        position += length
    assert not model._routing_listeners
    assert [x.shape for x in found.inputs] == [(int(keep.sum()), 32)] * 3
    assert found.learned == (fields.get("router_type") != "hash")
    assert [layer.layer for layer in found.layers] == [0, 1, 2]


def test_routing_of_expert_choice_counts_no_padding() -> None:
    """Each expert takes its share of the real tokens of the batch."""
    model = build(router_type="expert_choice", allow_non_causal=True, num_experts_per_tok=1)
    ids = np.random.default_rng(0).integers(3, VOCABULARY, 20)
    found = capture_routing(model, ids, np.repeat([0, 1], [4, 16]), np.ones(20, bool))
    for layer in found.layers:
        assert expert_counts(layer).tolist() == [5] * 4


@pytest.mark.parametrize("case", ["mixtral", "olmoe", "deepseek_v3"])
def test_routing_of_native_models(case: str) -> None:
    model = native_model(case)
    ids = np.random.default_rng(0).integers(3, 99, 24)
    found = capture_routing(model, ids, np.repeat([0, 1], [9, 15]), np.ones(24, bool))
    alone = capture_routing(model, ids[9:], np.zeros(15, int), np.ones(15, bool))
    for both, one in zip(found.layers, alone.layers, strict=True):
        assert both.expert_ids_NK[9:].tolist() == one.expert_ids_NK.tolist()
        assert both.slots_per_token.tolist() == [found.top_k] * 24
    assert all(x is not None and x.shape == (24, 32) for x in found.inputs)


# ---------------------------------------------------------------------- the verdict on models


def by_domain(tokenizer: PreTrainedTokenizerFast) -> MoEForCausalLM:
    """Experts differ, and the routers read from the embedding to which of four kinds a token belongs."""
    model = build(initializer_range=0.02)
    names = [token_name(tokenizer, i) for i in range(VOCABULARY)]
    kinds = torch.tensor([0 if any(c.isdigit() for c in n) else 1 if n.isascii() and n.strip("␣").isalpha() else 2 + i % 2
                          for i, n in enumerate(names)])  # fmt: skip
    with torch.no_grad():
        table = model.get_input_embeddings().weight
        table[:, :4] = 0.0
        table[torch.arange(VOCABULARY), kinds] = 2.0
        for layer in model.moe_layers:
            layer.gate.weight.zero_()
            layer.gate.weight[torch.arange(4), torch.arange(4)] = 5.0
        for name, parameter in model.named_parameters():
            if name.endswith(("o_proj.weight", "down_proj")):
                parameter *= 0.01  # the residual stream keeps the embedding
    return model


def test_specialised_model(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    found = numbers(quick(save(by_domain(tokenizer), tokenizer, tmp_path / "model")))
    verdict, held = found["specialisation"], found["text"]["dependence"]
    assert verdict["level"] == "present"
    assert held["part"]["share"] > found["text"]["random_routers"]["part"]["share"] + 0.1
    assert held["part"]["p"] == 0.005
    digits = found["text"]["layers"][0]["liked_tokens"][0]
    assert digits
    assert all(any(c.isdigit() for c in liking["name"]) for liking in digits)
    part = found["text"]["kinds"]["part"]["labels"].index("Numbers and maths")
    counts = np.array(found["text"]["layers"][0]["counts"]["part"])
    first_choice = np.array(found["text"]["layers"][0]["expert_ids"])[:, 0]
    assert counts[part, 0] / counts[:, 0].sum() > 0.6
    assert set(first_choice) == {0, 1, 2, 3}


@pytest.mark.parametrize("copies", [True, False], ids=["copies", "different"])
def test_untrained_model(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, copies: bool) -> None:
    """A random router's choice depends on the token, which is not specialisation; between copies it is nothing at all."""
    model = build()
    with torch.no_grad():
        for layer in model.moe_layers:
            torch.nn.init.normal_(layer.gate.weight, std=1e-3)
            for parameter in layer.experts.parameters():
                if copies:
                    parameter.copy_(parameter[:1].expand_as(parameter))
    page = quick(save(model, tokenizer, tmp_path / "model"), tmp_path / "out")
    found = numbers(page)
    assert found["text"]["dependence"]["token"]["share"] > 0.05  # it would look like specialisation
    assert found["text"]["dependence"]["token"]["p"] == 0.005
    assert found["specialisation"]["level"] == ("none" if copies else "weak")
    text = page.read_text()
    assert ("There is no specialisation." in text) == copies
    assert ("No specialisation beyond what random routers show." in text) != copies
    assert [similarity["identical"] for similarity in found["similarity"]] == [copies] * 3
    assert ("still identical" in text) == copies


def test_fixed_rule(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    found = numbers(quick(save(build(router_type="hash"), tokenizer, tmp_path / "model")))
    assert found["specialisation"]["level"] == "fixed"
    assert found["text"]["dependence"]["token"]["share"] == pytest.approx(1.0)
    assert found["text"]["random_routers"] == {}
    assert "not the work of training" in " ".join(found["specialisation"]["sentences"])


def test_collapsed_model(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    model = build(num_experts_per_tok=1)
    with torch.no_grad():
        for layer in model.moe_layers:
            layer.gate.weight.zero_()  # of equal logits the first wins
    page = quick(save(model, tokenizer, tmp_path / "model"))
    found = numbers(page)
    assert found["load"]["level"] == "collapsed"
    assert all(layer["load"]["dead"] == [1, 2, 3] for layer in found["text"]["layers"])
    assert "The routing has collapsed." in page.read_text()
    assert found["specialisation"]["level"] == "none"
    assert "nearly every token the same experts" in " ".join(found["specialisation"]["sentences"])


def test_numbers_are_those_of_the_model(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """report.json's routing is the model's own, and its counts are its routing's."""
    model = build(eval_capacity_factor=0.8)
    folder = save(model, tokenizer, tmp_path / "model")
    text = tmp_path / "text.jsonl"
    text.write_text("".join(json.dumps({"body": f"the {i} cat = {i}", "of": "ab"[i % 2]}) + "\n" for i in range(30)))
    found = numbers(quick(folder, text=text, text_field="body", part_field="of", dtype="float32", device="cpu"))["text"]
    assert found["parts"] == ["a", "b"]
    assert "".join(found["tokens"]["pieces"]) == "".join(f"the {i} cat = {i}" for i in range(30))
    records: list = []
    model.add_routing_listener(records.append, in_eval=True, keep_routing=True)
    with torch.no_grad():
        for i in range(30):
            model(torch.tensor([tokenizer(f"the {i} cat = {i}")["input_ids"]]))
    for row, layer in enumerate(found["layers"]):
        executed = sum(record.layers[row].sums["executed"] for record in records)
        assert layer["load"]["counts"] == executed.tolist()
        ids = np.concatenate([np.sort(record.layers[row].routing.expert_ids_TK.numpy(), axis=1) for record in records])
        assert np.sort(layer["expert_ids"], axis=1).tolist() == ids.tolist()
        assert np.array(layer["counts"]["part"]).sum(axis=0).tolist() == layer["load"]["counts"]


# ---------------------------------------------------------------------- runs


@pytest.fixture
def run_folder(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> Path:
    """What a training leaves: two checkpoints, a log, and the file of expert load."""
    folder = tmp_path / "run"
    history = [
        {"step": step, "loss": 3 - step / 20, "moe/aux_loss": 1.2, "moe/router_entropy": 1.0 + step / 100, "moe/drop_rate": 0.1,
         "moe/z_loss": math.nan, **{f"moe/layer_{layer}/router_entropy": 1.0 + layer for layer in range(3)}}
        for step in (2, 4, 6)
    ]  # fmt: skip
    for step in (4, 6):
        save(build() if step == 6 else build(num_experts=2), tokenizer, folder / f"checkpoint-{step}")
        state = {"log_history": [row for row in history if row["step"] <= step], "global_step": step}
        (folder / f"checkpoint-{step}" / "trainer_state.json").write_text(json.dumps(state))
    file = ExpertLoadFile(folder / "expert_load.safetensors", [0, 1, 2], [4, 4, 4])
    for step in (2, 4, 6):
        file.append(step, [[10, 10, 10, 10], [40, 0, 0, 0], [20, 10, 5, 5]])
    return folder


def test_run_folder(run_folder: Path) -> None:
    """The newest checkpoint, the longest log, every curve that was logged."""
    source = find_source(run_folder)
    assert source.checkpoint == str(run_folder / "checkpoint-6")
    assert [row["step"] for row in source.log_history] == [2, 4, 6]
    assert source.missing == []
    charts = {chart.title: chart for chart in training_charts(source)}
    assert set(charts) == {
        "Load: busiest expert over mean", "Load: coefficient of variation", "Loss", "Load-balancing loss (Switch)",
        "Router entropy", "Drop rate", "Router entropy by layer",
    }  # fmt: skip
    assert [list(line.y) for line in charts["Load: busiest expert over mean"].lines] == [[1.0] * 3, [4.0] * 3, [2.0] * 3]
    assert charts["Load: coefficient of variation"].lines[1].y[0] == pytest.approx(math.sqrt(3))
    assert charts["Loss"].lines[0].x == [2, 4, 6]
    assert charts["Loss"].lines[0].y == [2.9, 2.8, 2.7]
    page = write_report(run_folder, max_tokens=1500)
    assert page == run_folder / "report" / "report.html"
    assert page.read_text().count("<svg") == len(charts) + 2 + 2  # and what is explained, and similarity
    found = numbers(page)
    assert found["training"]["expert_load"]["executed"][0][1] == [40, 0, 0, 0]
    assert found["training"]["log_history"][0]["moe/z_loss"] is None
    pictures = {path.name: path for path in page.parent.glob("*.png")}
    assert set(pictures) == {
        "load.png", "training.png", "specialisation.png", "similarity_by_layer.png", "expert_similarity.png",
        "coactivation.png", "liking.png",
    }  # fmt: skip
    from matplotlib.image import imread

    for path in pictures.values():
        pixels = imread(path)
        assert min(pixels.shape[:2]) > 200
        assert pixels[..., :3].std() > 0.01
    assert not list(page.parent.glob("*.new"))


def test_what_is_missing_is_said(run_folder: Path, tmp_path: Path) -> None:
    for name in ("checkpoint-4", "checkpoint-6"):
        for weights in (run_folder / name).glob("model*"):
            weights.unlink()
    page = quick(run_folder, tmp_path / "out")
    text = page.read_text()
    assert "The folder has no model (no config.json with weights)" in text
    assert "Load: busiest expert over mean" in text
    assert "The text, coloured by expert" not in text
    assert numbers(page)["load"]["sentences"][0].startswith("In the last row of the training log")
    (run_folder / "expert_load.safetensors").unlink()
    assert any("no expert_load.safetensors" in sentence for sentence in find_source(run_folder).missing)


def test_run_without_log_and_tokenizer(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    folder = save(build(), tokenizer, tmp_path / "model")
    for file in folder.glob("tokenizer*"):
        file.unlink()
    page = quick(folder)
    text = page.read_text()
    assert "no tokenizer beside it" in text
    assert "no curves over steps" in text
    assert "How far the experts have moved apart" in text
    assert numbers(page)["text"] is None


def test_adapter_is_merged(tokenizer: PreTrainedTokenizerFast, tmp_path: Path) -> None:
    """What a LoRA training of the routers' neighbours leaves is the model with the adapter, not the model without."""
    from peft import LoraConfig, get_peft_model

    base = save(build(), tokenizer, tmp_path / "base")
    model = MoEForCausalLM.from_pretrained(base)
    adapted = get_peft_model(model, LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False))
    adapted.save_pretrained(tmp_path / "run")
    tokenizer.save_pretrained(tmp_path / "run")
    found = [numbers(quick(folder, max_tokens=200))["text"]["layers"] for folder in (base, tmp_path / "run")]
    assert found[0][0]["expert_ids"] != found[1][0]["expert_ids"]
    merged = adapted.merge_and_unload()
    merged.save_pretrained(tmp_path / "merged")
    tokenizer.save_pretrained(tmp_path / "merged")
    assert numbers(quick(tmp_path / "merged", max_tokens=200))["text"]["layers"][0]["expert_ids"] == found[1][0]["expert_ids"]


# ---------------------------------------------------------------------- the command


def test_command(tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = save(build(), tokenizer, tmp_path / "model")
    text = tmp_path / "a.txt"
    text.write_text("The cat sat.\n\n" * 30)
    assert (
        hf_moe_main(
            [
                "report",
                str(folder),
                "--text",
                str(text),
                "--output",
                str(tmp_path / "out"),
                "--max-tokens",
                "64",
                "--no-pictures",
            ]
        )
        == 0
    )
    said = capsys.readouterr().out
    assert said.endswith(f"wrote {tmp_path / 'out' / 'report.html'}\n")
    assert "fair share" in said
    assert len(numbers(tmp_path / "out" / "report.html")["text"]["tokens"]["ids"]) <= 64


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["/no/such/folder"], "`RUN_OR_MODEL`='/no/such/folder' is not a folder. Give"),
        (["{empty}"], "has no model, no training log"),
        (["{model}", "--text", "no.txt"], "`--text`='no.txt' is not a file"),
        (["{model}", "--text", "{model}/config.json"], "has an unknown ending"),
        (["{model}", "--text", "{text}", "--part_field", "x"], "`--part_field`='x' is a field of JSON lines"),
        (["{model}", "--text", "{jsonl}", "--text_field", "body"], "line 1 has no string field 'body'. Name the field"),
        (["{model}", "--text", "{jsonl}", "--part-field", "body"], "`--part_field`='body'"),
        (["{model}", "--text", "{blank}"], "holds no text"),
        (["{model}", "--max-tokens", "0"], "`--max-tokens`=0"),
        (["{model}", "--device", "warp"], "`--device`='warp' cannot be used"),
        (["{model}", "--output", "{text}"], "is a file. Name a folder"),
        (["{dense}"], "`RUN_OR_MODEL` holds no Mixture-of-Experts"),
    ],
    ids=lambda value: value if isinstance(value, str) else None,
)  # fmt: skip
def test_refusals(
    tokenizer: PreTrainedTokenizerFast, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: list[str], message: str
) -> None:
    """One line, before any work, and nothing is written."""
    places = {name: tmp_path / name for name in ("empty", "model", "dense")}
    places["empty"].mkdir()
    if "{dense}" in arguments:
        from transformers import AutoModelForCausalLM

        save(AutoModelForCausalLM.from_config(text_config("llama", vocab_size=VOCABULARY)), tokenizer, places["dense"])
    save(build(layers=1), tokenizer, places["model"])
    files = {"text": "a.txt", "jsonl": "a.jsonl", "blank": "b.txt"}
    for name, content in (("text", "words"), ("jsonl", '{"text": "words"}'), ("blank", " \n")):
        places[name] = tmp_path / files[name]
        places[name].write_text(content)
    filled = [argument.format(**places) if "{" in argument else argument for argument in arguments]
    assert report.main(filled) == 2
    captured = capsys.readouterr()
    errors = [line for line in captured.err.splitlines() if line.startswith("hf-moe report: ")]
    assert len(errors) == 1
    assert message in errors[0]
    assert not list(tmp_path.rglob("report.*"))


def test_help_needs_no_torch() -> None:
    code = (
        "import sys; from hf_moe.__main__ import main\ntry: main(['report', '--help'])\nfinally: print('torch' in sys.modules)"
    )
    command = [sys.executable, "-c", f"import sys; sys.argv = ['hf-moe']; {code}"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    assert ran.stdout.endswith("False\n"), ran.stdout + ran.stderr
    assert "--part_field" in ran.stdout


# ---------------------------------------------------------------------- the page


def test_nothing_gets_out_of_the_script() -> None:
    value = {"a": [EVIL, "\u2028\u2029", math.nan, np.int64(3)], "b": {"<": None}}
    text = script_json(value)
    assert not re.search("[<>&\u2028\u2029]", text)
    assert json.loads(text) == {"a": [EVIL, "\u2028\u2029", None, 3], "b": {"<": None}}


def test_shown_pieces() -> None:
    pieces = [" the", "  ", "\n", "\n\n", "\t", "\r\n", "", "a\x1b", "\u202e"]
    assert [shown_piece(piece) for piece in pieces] == [
        " the", "··", "⏎\n", "⏎\n⏎\n", "⇥\t", "⏎\n", "◌", "a\\u001b", "\\u202e",
    ]  # fmt: skip


def test_ticks_and_charts() -> None:
    for low, high in ((0, 1), (0.93, 0.931), (-3, 1000), (5, 5), (0, 0), (1e-9, 2e-9)):
        found = ticks(low, high)
        assert found[0] <= low
        assert found[-1] >= high
        assert 2 <= len(found) <= 12
        assert len({round(b - a, 12 - round(math.log10(high - low or 1))) for a, b in pairwise(found)}) == 1
    svg = line_chart([Line("<evil>", list(range(2000)), [math.sin(i) for i in range(2000)], "red")], "x & y", "y")
    assert "&lt;evil&gt;" in svg
    assert "<evil>" not in svg
    assert "x &amp; y" in svg
    points = re.search(r'points="([^"]+)"', svg)[1].split()
    assert len(points) <= 301
    assert points[-1].startswith("330.0,")  # the last step is on it
    assert "NaN" not in svg
    assert "nan" not in svg


def big_report(layers: int, tokens: int, experts: int, top_k: int, tokenizer: PreTrainedTokenizerFast) -> str:
    random = np.random.default_rng(0)
    words = random.choice(["alpha", "beta", "gamma", "x", "=", "12"], 4 * tokens)
    documents = [Document(" ".join(words[i::8]), f"part {i}") for i in range(8)]
    table = tokenise(documents, tokenizer, tokens, 512)
    count = len(table.ids_N)
    assert count == tokens
    ids = np.argsort(random.random((layers, count, experts)), axis=2)[:, :, :top_k]
    routed = [LayerRouting(i, experts, ids[i], random.random((count, top_k)).astype(np.float32)) for i in range(layers)]
    tested = pick_tested(table, 512)
    found = analyse_text(table, Capture(routed, [None] * layers, top_k, True), tested, shuffles=9)
    from hf_moe.training.expert_similarity import expert_similarity
    from hf_moe.training.report_source import Source

    similarities = [expert_similarity(i, [[torch.randn(8, 4)] for _ in range(experts)]) for i in range(layers)]
    data = report_data(Source("big", "x", "x"), {"m": "model"}, found, similarities, True)
    return render_page(data)


def test_page_is_small(tokenizer: PreTrainedTokenizerFast) -> None:
    """2000 tokens, 30 layers, 32 experts, 8 per token."""
    page = big_report(30, 2000, 32, 8, tokenizer)
    assert len(page.encode()) < 3_000_000


@pytest.fixture(scope="module")
def evil_page(tokenizer: PreTrainedTokenizerFast, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A report of a text, and of parts, that try to get out."""
    folder = tmp_path_factory.mktemp("evil")
    rows = [
        {"text": f"{EVIL}{i} = {i}\n\tthe cat \u202e🙂", "part": EVIL if i % 2 else "<img src=x onerror=alert(1)>"}
        for i in range(12)
    ]
    (folder / "evil.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    save(build(num_experts=5, mlp_only_layers=[1]), tokenizer, folder / "a<b>&c")
    return quick(folder / "a<b>&c", text=folder / "evil.jsonl", part_field="part")


def test_page_asks_nobody(evil_page: Path) -> None:
    text = evil_page.read_text()
    policy = "default-src 'none'; style-src 'unsafe-inline'; script-src 'unsafe-inline'; img-src data:"
    assert f'<meta http-equiv="Content-Security-Policy" content="{policy}">' in text
    assert not re.search(r"https?://", text)
    assert not re.search(
        r"(src|href)\s*=\s*[\"'](?!data:)", re.sub(r"&[a-z]+;|&#\d+;", "", text.replace(html.escape(EVIL), ""))
    )
    assert "@import" not in text
    assert "url(" not in text
    assert text.count("<script") == text.count("</script>") == 2
    assert "<script>document" not in text
    assert "<img" not in text
    assert "a&lt;b&gt;&amp;c" in text


def test_page_has_the_text_without_scripts(evil_page: Path, tokenizer: PreTrainedTokenizerFast) -> None:
    spans = re.findall(r'<i class="([^"]+)">([^<]*)</i>', evil_page.read_text())
    found = numbers(evil_page)["text"]
    assert len(spans) == len(found["tokens"]["ids"])
    for (names, shown), piece, ids in zip(spans, found["tokens"]["pieces"], found["layers"][0]["expert_ids"], strict=True):
        assert names.split()[0] == f"e{ids[0]}"
        assert html.unescape(shown) == shown_piece(piece)


def browse(page: Path, profile: Path, address: str = "") -> tuple[str, str]:
    """The document after its scripts ran, and what the browser said."""
    assert CHROMIUM is not None
    quiet = ("--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run")
    headless = ("--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={profile}", "--virtual-time-budget=3000")
    command = [CHROMIUM, *headless, *quiet, "--enable-logging=stderr", "--dump-dom", f"{page.as_uri()}{address}"]
    ran = subprocess.run(command, capture_output=True, text=True, timeout=120)
    return ran.stdout, "\n".join(line for line in ran.stderr.splitlines() if "CONSOLE" in line)


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
@pytest.mark.parametrize("layer", [0, 2])
def test_browser_shows_the_layer(evil_page: Path, tmp_path: Path, layer: int) -> None:
    """Scripts run without an error, and every token has the class of its expert in the layer that the address names."""
    dom, console = browse(evil_page, tmp_path, f"#layer={layer}")
    assert console == ""
    assert 'data-ready="yes"' in dom
    assert f'data-layer="{layer}"' in dom
    assert "<title>What the experts do: a&lt;b&gt;&amp;c</title>" in dom
    found = numbers(evil_page)["text"]
    row = [entry["layer"] for entry in found["layers"]].index(layer)
    spans = re.findall(r'<i class="(e\d+|ex)[^"]*" data-e="([^"]*)">', dom)
    assert [name for name, _ in spans] == [f"e{ids[0]}" for ids in found["layers"][row]["expert_ids"]]
    assert [number for _, number in spans] == [str(ids[0]) for ids in found["layers"][row]["expert_ids"]]
    assert f"layer {layer} ({row + 1} of 2)" in dom
    legend = re.search(r'id="legend">(.*?)</div>', dom, re.DOTALL)[1]
    assert legend.count("<button") == 5
    cards = re.search(r'id="cards">(.*?)<figure>', dom, re.DOTALL)[1]
    for expert, liked in enumerate(found["layers"][row]["liked_tokens"]):
        assert f"Expert {expert} " in cards
        for liking in liked:
            assert (
                f"<code>{html.escape(liking['name'], quote=False)}</code></td><td>{liking['count']} of {liking['occurrences']}"
                in cards
            )
    for canvas in ("kind-part", "kind-class", "kind-position", "load-map", "similarity-map", "pairs-map"):
        assert re.search(rf'<canvas id="{canvas}" width="\d+" height="\d+"[^>]*aria-label="[^"]+"', dom), canvas


@pytest.mark.skipif(CHROMIUM is None, reason="no Chromium")
def test_browser_shows_a_run_without_model(run_folder: Path, tmp_path: Path) -> None:
    for name in ("checkpoint-4", "checkpoint-6"):
        shutil.rmtree(run_folder / name)
    dom, console = browse(quick(run_folder), tmp_path / "profile")
    assert console == ""
    assert 'data-ready="yes"' in dom
    assert re.search(r'<canvas id="load-map" width="\d+"', dom)
