"""`hf-moe train`: every kind of model and data, resuming, pushing, launching, and what is refused before work starts."""

from __future__ import annotations

import json
import math
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from families import text_config
from hf_moe.conversion import Recipe, run_recipe
from hf_moe.model_cards.lineage import read_lineage
from hf_moe.training import read_expert_load
from hf_moe.training.arguments import DataArguments
from hf_moe.training.command_line import parse
from hf_moe.training.data import IGNORED, Layout, PadCollator, check_documents_apart, tokenise
from hf_moe.training.data_source import FORMATS, field_of
from hf_moe.training.finetune import main
from native_models import NATIVE
from ranks import finished
from safetensors.torch import load_file
from tiny import tiny
from tokenizers import Tokenizer, models, pre_tokenizers, processors
from transformers import CONFIG_MAPPING, AutoConfig, AutoModelForCausalLM, AutoTokenizer, PreTrainedTokenizerFast

from hf_moe import MoEForCausalLM, model_cards

WORDS = [
    *("the", "a", "cat", "dog", "sat", "ran", "on", "in", "mat", "house", "and", "red", "blue", "one", "two", "three", "four"),
    *("user", "assistant"),
]
SENTENCES = ["the cat sat on the mat", "a dog ran", "one two three four", "the red house and the blue mat", "a cat"]
TEMPLATE = (
    "{% for m in messages %}{{ m.role }} {% if m.role == 'assistant' %}{% generation %}{{ m.content }} </s>{% endgeneration %}"
    "{% else %}{{ m.content }} {% endif %}{% endfor %}"
)
CHATS = [
    [{"role": "user", "content": "one two"}, {"role": "assistant", "content": "three four"}],
    [{"role": "user", "content": "the cat"}, {"role": "assistant", "content": "sat on"}, {"role": "user", "content": "a mat"},
     {"role": "assistant", "content": "red"}],
]  # fmt: skip


def tokenizer(begin: bool = False) -> PreTrainedTokenizerFast:
    """Of a few words; with `begin` it puts a token before every text, as Llama's does."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *WORDS])}
    words = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    words.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    if begin:
        words.post_processor = processors.TemplateProcessing(single="<s> $A", special_tokens=[("<s>", 1)])
    return PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", bos_token="<s>", eos_token="</s>", unk_token="<unk>"
    )


@pytest.fixture(scope="module")
def place(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Checkpoints of every kind with a tokenizer, and text."""
    folder = tmp_path_factory.mktemp("place")
    torch.manual_seed(0)
    AutoModelForCausalLM.from_config(text_config("llama", initializer_range=0.2)).save_pretrained(folder / "dense")
    tiny(router_type="noisy_top_k", router_importance_loss_coef=0.1).save_pretrained(folder / "moe")
    for name in ("mixtral", "minimax_m2"):
        model_type, fields, _ = NATIVE[name]
        config = CONFIG_MAPPING[model_type](**{**fields, "vocab_size": 128})
        AutoModelForCausalLM.from_config(config).save_pretrained(folder / name)
    for path in [path for path in folder.iterdir() if path.is_dir()]:
        tokenizer().save_pretrained(path)
    texts = SENTENCES * 12
    (folder / "train.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    (folder / "heldout.txt").write_text("\n\n".join(SENTENCES[::-1] * 2) + "\n")
    (folder / "chats.jsonl").write_text("".join(json.dumps({"messages": chat}) + "\n" for chat in CHATS * 10))
    (folder / "template.jinja").write_text(TEMPLATE)
    return folder


def words(place: Path, out: Path, **options: Any) -> list[str]:
    defaults = {
        "model": place / "moe", "train_file": place / "train.jsonl", "eval_file": place / "heldout.txt", "output_dir": out,
        "max_seq_length": 8, "max_steps": 4, "learning_rate": "1e-2", "logging_steps": 2, "save_strategy": "no",
        "use_cpu": True, "disable_tqdm": True, "per_device_train_batch_size": 4,
    }  # fmt: skip
    given = {name: value for name, value in {**defaults, **options}.items() if value is not None}
    return [
        str(word) for name, value in given.items() for word in (f"--{name}", *(value if isinstance(value, list) else [value]))
    ]


def train(place: Path, out: Path, **options: Any) -> dict[str, Any]:
    assert main(words(place, out, **options)) == 0
    return json.loads((out / "metrics.json").read_text())


def numbers(metrics: dict[str, Any]) -> list[dict[str, float]]:
    """The log without what depends on time."""
    times = ("_runtime", "_per_second", "_preparation_time", "tflops_per_device", "train_loss")
    return [{k: v for k, v in row.items() if not k.endswith(times)} for row in metrics["log_history"]]


# ---------------------------------------------------------------------- models


@pytest.mark.parametrize(
    ("options", "model_type"),
    [
        ({"model": "moe"}, "hf_moe"),
        ({"model": "dense"}, "llama"),
        ({"model": "dense", "upcycle_num_experts": 4, "upcycle_method": "drop", "upcycle_layers": [0, 2]}, "hf_moe"),
        ({"model": "mixtral"}, "hf_moe"),
        ({"model": "mixtral", "keep_native": True, "router_learning_rate": 1e-3}, "mixtral"),
    ],
    ids=str,
)
def test_models(options: dict[str, Any], model_type: str, place: Path, tmp_path: Path, capsys: Any) -> None:
    """Each is trained, gets better, and is saved with all that belongs to it."""
    out = tmp_path / "out"
    metrics = train(place, out, **{**options, "model": place / options["model"]}, max_steps=8)
    before, after = metrics["eval_before"], metrics["eval_after"]
    assert after["eval_loss"] < before["eval_loss"]
    for row in (before, after):
        assert row["eval_perplexity"] == pytest.approx(math.exp(row["eval_loss"]))
    assert f"perplexity {before['eval_perplexity']:.2f} before" in capsys.readouterr().out
    assert AutoConfig.from_pretrained(out).model_type == model_type
    model = AutoModelForCausalLM.from_pretrained(out).eval()
    documents = [*SENTENCES[::-1], *SENTENCES[::-1]]
    tokens = [token for text in documents for token in [*AutoTokenizer.from_pretrained(out)(text)["input_ids"], 2]]
    ids = torch.tensor(tokens[: len(tokens) // 8 * 8]).view(-1, 8)
    with torch.no_grad():
        assert after["eval_loss"] == pytest.approx(model(input_ids=ids, labels=ids).loss.item(), rel=1e-5)
    assert after["eval_tokens"] == ids.shape[0] * 7
    assert "# out" in (out / "README.md").read_text()
    if model_type == "llama":
        assert not list(out.glob("expert_load*"))
    else:
        assert read_expert_load(out / "expert_load.safetensors").steps == [2, 4, 6, 8]
        assert (out / "expert_load.png").read_bytes().startswith(b"\x89PNG")
        assert all(f"lr/{part}" in row for row in metrics["log_history"] if "loss" in row for part in ("router", "experts"))
    assert {path.name for path in out.glob("*.new")} == set()


def test_upcycling_in_memory_is_upcycling(place: Path, tmp_path: Path) -> None:
    """The same run as from a checkpoint that `hf-moe upcycle` wrote, to the last bit; nothing else is written."""
    fields = {"num_experts": 4, "router_type": "noisy_top_k", "method": "noise", "std": 0.05, "seed": 3}
    dense = place / "dense"
    recipe = {"source": str(dense), **fields, "dtype": "float32", "verify": False}
    run_recipe(Recipe.from_dict({**recipe, "destination": str(tmp_path / "upcycled")}))
    written = train(place, tmp_path / "written", model=tmp_path / "upcycled")
    before = sorted(path.name for path in dense.iterdir())
    options = {f"upcycle_{name}": value for name, value in fields.items()}
    made = train(place, tmp_path / "made", model=dense, **options)
    assert numbers(made) == numbers(written)
    assert [made[f"eval_{when}"]["eval_loss"] for when in ("before", "after")] == [
        written[f"eval_{when}"]["eval_loss"] for when in ("before", "after")
    ]
    weights = [load_file(tmp_path / name / "model.safetensors") for name in ("made", "written")]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[1])
    assert sorted(path.name for path in dense.iterdir()) == before
    assert sorted(path.name for path in tmp_path.iterdir()) == ["made", "upcycled", "written"]
    stages = read_lineage(tmp_path / "made")
    assert [stage.kind for stage in stages] == ["upcycling", "training"]
    assert stages[0].method == "noise"
    (tmp_path / "recipe.yaml").write_text(Recipe.from_dict({**recipe, "destination": "elsewhere", "std": 0.5}).to_yaml())
    again = train(place, tmp_path / "file", model=dense, upcycle_config=tmp_path / "recipe.yaml", upcycle_std=0.05)
    assert numbers(again) == numbers(written)


def test_import_in_memory_is_import(place: Path, tmp_path: Path) -> None:
    made = train(place, tmp_path / "made", model=place / "mixtral", max_steps=1)
    stages = read_lineage(tmp_path / "made")
    assert [stage.kind for stage in stages] == ["import", "training"]
    native = train(place, tmp_path / "native", model=place / "mixtral", max_steps=1, keep_native=True)
    assert made["eval_before"]["eval_loss"] == pytest.approx(native["eval_before"]["eval_loss"], rel=1e-5)


def test_verification(place: Path, tmp_path: Path, capsys: Any) -> None:
    train(place, tmp_path / "a", model=place / "dense", upcycle_num_experts=2, upcycle_verify="true", max_steps=1)
    assert "function preserved" in capsys.readouterr().out


def test_dtype_of_what_is_upcycled(place: Path, tmp_path: Path) -> None:
    train(place, tmp_path / "a", model=place / "dense", upcycle_num_experts=2, dtype="bfloat16", max_steps=1)
    weights = load_file(tmp_path / "a" / "model.safetensors")
    assert {tensor.dtype for name, tensor in weights.items() if ".gate." not in name} == {torch.bfloat16}
    assert {tensor.dtype for name, tensor in weights.items() if ".gate." in name} == {torch.float32}


# ---------------------------------------------------------------------- data


def write_data(kind: str, folder: Path) -> dict[str, Any]:
    """The sentences of `train.jsonl` in another form, and the options for it."""
    rows = [{"text": text, "number": i} for i, text in enumerate(SENTENCES * 12)]
    data = datasets.Dataset.from_list(rows)
    match kind:
        case "globs":
            for i, part in enumerate((rows[:20], rows[20:21], rows[21:])):
                (folder / f"part{i}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in part))
            return {"train_file": [folder / "part0.jsonl", folder / "part*.jsonl"]}
        case "json":
            (folder / "all.json").write_text(json.dumps(rows, indent=1))
            return {"train_file": folder / "all.json"}
        case "parquet":
            data.rename_column("text", "body").to_parquet(folder / "all.parquet")
            return {"train_file": folder / "all.parquet", "text_field": "body"}
        case "csv":
            data.to_csv(folder / "all.csv")
            return {"train_file": folder / "all.csv"}
        case "txt":
            (folder / "all.txt").write_text("\n\n".join(row["text"] for row in rows))
            return {"train_file": folder / "all.txt"}
        case "saved":
            data.save_to_disk(folder / "saved")
            return {"train_file": None, "dataset_name": folder / "saved"}
        case "saved_splits":
            datasets.DatasetDict({"learn": data, "test": data.select([0])}).save_to_disk(folder / "saved")
            return {"train_file": None, "dataset_name": folder / "saved", "train_split": "learn"}
        case "folder":
            (folder / "set").mkdir()
            data.to_parquet(folder / "set" / "train-00000-of-00001.parquet")
            return {"train_file": None, "dataset_name": folder / "set"}
        case _:
            data.to_json(folder / "streamed.jsonl")
            return {"train_file": folder / "streamed.jsonl", "streaming": True}


@pytest.mark.parametrize("kind", ["globs", "json", "parquet", "csv", "txt", "saved", "saved_splits", "folder", "streamed"])
def test_kinds_of_data(kind: str, place: Path, tmp_path: Path) -> None:
    """All are the same text in the same order, so all give the same run."""
    options = {"max_steps": 2, "eval_file": None, "train_sampling_strategy": "sequential"}
    expected = train(place, tmp_path / "plain", **options)
    found = train(place, tmp_path / "out", **{**options, **write_data(kind, tmp_path)})
    kept = [{k: v for k, v in row.items() if k not in ("epoch", "total_flos")} for row in numbers(found)]
    assert kept == [{k: v for k, v in row.items() if k not in ("epoch", "total_flos")} for row in numbers(expected)]


def test_held_out_percentage(place: Path, tmp_path: Path) -> None:
    """So many documents, none of which is trained on; another seed holds out others."""
    numbered = [{"text": f"one {WORDS[i % 17]} {WORDS[i // 17]} two"} for i in range(40)]
    (tmp_path / "n.jsonl").write_text("".join(json.dumps(row) + "\n" for row in numbered))
    options = {"train_file": tmp_path / "n.jsonl", "eval_file": None, "validation_split_percentage": 20, "packing": "false"}
    metrics = train(place, tmp_path / "a", **options, max_steps=1)
    assert metrics["eval_before"]["eval_tokens"] == 8 * 4
    other = train(place, tmp_path / "b", **options, max_steps=1, seed=1)
    assert other["eval_before"]["eval_loss"] != metrics["eval_before"]["eval_loss"]


def test_a_dataset_with_splits_is_evaluated_on_them(place: Path, tmp_path: Path) -> None:
    rows = datasets.Dataset.from_list([{"text": text} for text in SENTENCES * 6])
    datasets.DatasetDict({"train": rows, "validation": rows.select(range(10))}).save_to_disk(tmp_path / "saved")
    metrics = train(place, tmp_path / "out", train_file=None, eval_file=None, dataset_name=tmp_path / "saved", max_steps=1)
    assert metrics["eval_after"]["eval_tokens"] > 0
    assert os.path.isabs(metrics["dataset_name"])


def test_a_dataset_of_the_hub(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    asked: list[Any] = []

    def load(*names: str, **options: Any) -> datasets.DatasetDict:
        asked.append((names, options))
        rows = datasets.Dataset.from_list([{"messages": chat} for chat in CHATS * 6])
        return datasets.DatasetDict({"train": rows, "test": rows.select([0])})

    monkeypatch.setattr(datasets, "load_dataset", load)
    metrics = train(
        place, tmp_path / "out", train_file=None, eval_file=None, dataset_name="some/chats", dataset_config_name="en",
        eval_split="test", chat_template=place / "template.jinja", packing="false", max_seq_length=16, max_steps=1,
    )  # fmt: skip
    assert asked == [(("some/chats", "en"), {"streaming": False})]
    assert metrics["eval_before"]["eval_tokens"] == 3
    assert metrics["dataset_name"] == "some/chats"


def test_fields_are_found_before_reading(tmp_path: Path) -> None:
    """From the schema, the header or the first line alone; also of texts longer than the csv module's limit."""
    datasets.Dataset.from_list([{"id": 1, "messages": chat} for chat in CHATS]).to_parquet(tmp_path / "chats.parquet")
    datasets.Dataset.from_list([{"n": 1, "text": "a" * 200_000}]).to_csv(tmp_path / "long.csv")
    chats, long = (FORMATS[path.suffix].fields(path) for path in (tmp_path / "chats.parquet", tmp_path / "long.csv"))
    assert field_of("it", chats, DataArguments(train_file=["x"])) is None
    assert field_of("it", long, DataArguments(train_file=["x"])) == "text"
    with pytest.raises(ValueError, match="no string field 'id'"):
        field_of("it", chats, DataArguments(train_file=["x"], text_field="id"))


def rows_of(texts: list[Any], name: str = "text", **layout: Any) -> list[dict[str, Any]]:
    data = datasets.Dataset.from_list([{name: text} for text in texts])
    field = "text" if name == "text" else None
    found = tokenise(data, layout.pop("tokenizer", tokenizer()), Layout(text_field=field, **layout), what="it")
    return [dict(row) for row in found]


def ids_of(text: str) -> list[int]:
    return [3 + 1 + WORDS.index(word) if word in WORDS else 2 for word in text.split()]


def test_blocks() -> None:
    found = rows_of(SENTENCES, max_seq_length=4)
    flat = [token for text in SENTENCES for token in ids_of(f"{text} </s>")]
    assert [row["input_ids"] for row in found] == [flat[i : i + 4] for i in range(0, len(flat) - 3, 4)]
    assert all(row["labels"] == row["input_ids"] for row in found)
    with_begin = rows_of(["a cat </s>", ""], max_seq_length=2, tokenizer=tokenizer(begin=True))
    assert [row["input_ids"] for row in with_begin] == [[1, *ids_of("a")], ids_of("cat </s>"), [1, 2]]


def test_documents_apart() -> None:
    """Positions begin anew at every document and every block, and no document predicts the next one's first token."""
    found = rows_of(["one two", "a", "the cat sat on the mat"], max_seq_length=4, packing="documents")
    blocks = ["one two </s> a", "</s> the cat sat", "on the mat </s>"]
    assert [row["input_ids"] for row in found] == [ids_of(block) for block in blocks]
    assert [row["position_ids"] for row in found] == [[0, 1, 2, 0], [0, 0, 1, 2], [0, 1, 2, 3]]
    assert [row["labels"][1:] for row in found] == [
        [*ids_of("two </s>"), IGNORED], [IGNORED, *ids_of("cat sat")], ids_of("the mat </s>")
    ]  # fmt: skip


def test_no_packing() -> None:
    """One document per sequence, long ones in pieces, none that predicts nothing; padding is masked and has no labels."""
    found = rows_of(["one two three four", "a", "the cat sat"], max_seq_length=4, packing="false")
    expected = [ids_of("one two three four"), ids_of("a </s>"), ids_of("the cat sat </s>")]
    assert [row["input_ids"] for row in found] == expected
    batch = PadCollator(0)(found)
    assert batch["input_ids"].tolist() == [expected[0], [*expected[1], 0, 0], expected[2]]
    assert batch["labels"].tolist() == [expected[0], [*expected[1], IGNORED, IGNORED], expected[2]]
    assert batch["attention_mask"].tolist() == [[1, 1, 1, 1], [1, 1, 0, 0], [1, 1, 1, 1]]


@pytest.mark.parametrize("assistant_only", [True, False])
def test_chats(assistant_only: bool) -> None:
    with_template = tokenizer()
    with_template.chat_template = TEMPLATE
    found = rows_of(
        CHATS, "messages", max_seq_length=32, packing="false", tokenizer=with_template, assistant_only=assistant_only
    )
    said = "user one two assistant three four </s>", "user the cat assistant sat on </s> user a mat assistant red </s>"
    spoken = "three four </s>", "sat on </s> red </s>"
    for row, text, answer in zip(found, said, spoken, strict=True):
        assert row["input_ids"] == ids_of(text)
        assert [label for label in row["labels"] if label != IGNORED] == ids_of(answer if assistant_only else text)
        assert all(label in (IGNORED, token) for label, token in zip(row["labels"], row["input_ids"], strict=True))


@pytest.mark.parametrize(("choice", "tokens"), [("auto", 10 * (3 + 5)), ("false", 10 * (6 + 12))])
def test_script_with_chats(choice: str, tokens: int, place: Path, tmp_path: Path) -> None:
    metrics = train(
        place, tmp_path / "out", train_file=place / "chats.jsonl", eval_file=place / "chats.jsonl", max_seq_length=32,
        packing="false", chat_template=place / "template.jinja", assistant_only_loss=choice,
    )  # fmt: skip
    assert metrics["eval_before"]["eval_tokens"] == tokens
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == TEMPLATE


def test_packed_documents_are_as_single_ones(place: Path, tmp_path: Path) -> None:
    """Documents that fill blocks exactly have the same loss packed as alone; in plain blocks they have another."""
    texts = ["one two three", "a dog ran on the red", "two", "a cat sat in"] * 4  # 4 + 7 + 2 + 5 = 18 tokens
    (tmp_path / "d.jsonl").write_text("".join(json.dumps({"text": text}) + "\n" for text in texts))
    found = {}
    for packing in ("false", "documents", "blocks"):
        options = {"eval_file": tmp_path / "d.jsonl", "packing": packing, "max_seq_length": 18, "max_steps": 1}
        found[packing] = train(place, tmp_path / packing, **options)["eval_before"]
    assert found["documents"]["eval_tokens"] == found["false"]["eval_tokens"] == 4 * (18 - 4)
    assert found["documents"]["eval_loss"] == pytest.approx(found["false"]["eval_loss"], rel=1e-5)
    assert abs(found["blocks"]["eval_loss"] - found["false"]["eval_loss"]) > 1e-2


@pytest.mark.parametrize("attention", ["eager", "sdpa"])
def test_documents_are_apart_or_refused(attention: str) -> None:
    model = tiny("llama").train()
    model.set_attn_implementation(attention)
    check_documents_apart(model)
    assert model.training
    bloom = AutoModelForCausalLM.from_config(CONFIG_MAPPING["bloom"](vocab_size=128, hidden_size=32, n_layer=2, n_head=4))
    with pytest.raises(ValueError, match=r"`--packing`='documents': in this bloom .* sees the one before it"):
        check_documents_apart(bloom)


# ---------------------------------------------------------------------- options


def test_config_files(place: Path, tmp_path: Path) -> None:
    """Names as on the command line, which counts more; numbers as people write them."""
    config = tmp_path / "run.yaml"
    config.write_text(
        f"model: {place / 'dense'}\ntrain-file: {place / 'train.jsonl'}\noutput_dir: {tmp_path / 'out'}\nlearning_rate: 1e-3\n"
        "packing: false\nfreeze: router\nupcycle_num_experts: 4\nupcycle_layers: [0, 2]\nlr_scheduler_kwargs: {num_cycles: 2}\n"
        "dtype: bfloat16\nbf16: true\nmax_steps: 7\nuse_cpu: true\n"
    )
    steps = ["--max_steps", "9"]
    for argv in ([str(config), *steps], ["--config", str(config), *steps], [*steps, f"--config={config}"]):
        found = parse(argv, recipe_fields())
        assert (found.model.model, found.data.train_file) == (str(place / "dense"), [str(place / "train.jsonl")])
        assert (found.training.learning_rate, found.training.max_steps, found.training.bf16) == (1e-3, 9, True)
        assert (found.data.packing, found.training.freeze, found.model.dtype) == ("false", ["router"], "bfloat16")
        assert found.upcycle == {"upcycle_num_experts": 4, "upcycle_layers": [0, 2]}
        assert found.training.lr_scheduler_kwargs == {"num_cycles": 2}
    as_json = tmp_path / "run.json"
    as_json.write_text(json.dumps({"model": "m", "train_file": ["a", "b"], "output_dir": "o", "packing": True}))
    found = parse([str(as_json)], recipe_fields())
    assert (found.data.train_file, found.data.packing) == (["a", "b"], "blocks")


def recipe_fields() -> Any:
    from hf_moe.conversion.recipe_options import recipe_options

    return recipe_options("upcycle_")


def test_every_field_of_a_recipe_has_an_option(place: Path) -> None:
    from hf_moe.conversion.recipe import METHOD_OPTIONS, MOE_FIELDS
    from hf_moe.conversion.recipe_options import recipe_of

    names = {name for name, _, _ in recipe_fields()}
    assert {f"upcycle_{name}" for name in (*METHOD_OPTIONS, *MOE_FIELDS, "method", "layers", "router_prompts", "seed")} <= names
    given = {
        "upcycle_num_experts": "[2, 4, 8]", "upcycle_std": "1e-3", "upcycle_method": "noise", "upcycle_norm_topk_prob": "false",
        "upcycle_layers": ["0", "2"], "upcycle_router_init": "zeros", "upcycle_capacity_factor": "1.5", "upcycle_seed": None,
    }  # fmt: skip
    recipe = recipe_of(given, "upcycle_", source="dense", dtype="bfloat16")
    assert recipe.moe == {"num_experts": [2, 4, 8], "norm_topk_prob": False, "capacity_factor": 1.5}
    assert (recipe.method, recipe.options, recipe.layers, recipe.router_init) == ("noise", {"std": 1e-3}, [0, 2], "zeros")
    assert (recipe.source, recipe.dtype, recipe.verify, recipe.seed) == ("dense", "bfloat16", False, 0)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train_file": "{place}/no*.jsonl"}, "`--train_file`='{place}/no*.jsonl' matches no file"),
        ({"train_file": ["{place}/train.jsonl", "{place}/heldout.txt"]}, "`--train_file` names files of several kinds"),
        ({"train_file": "{place}/dense/config.json", "text_field": "x"}, "is not JSON Lines"),
        ({"train_file": "{place}/bad.parquet"}, "`--train_file`='{place}/bad.parquet' cannot be read"),
        (
            {"train_file": "{place}/other.parquet"},
            "no string field 'text' and no chats in 'messages' in its first line, but ['n']",
        ),
        ({"train_file": "{place}/header.csv"}, "has no row below its header"),
        ({"train_file": "{place}/empty.jsonl"}, "`--train_file`='{place}/empty.jsonl' is empty"),
        ({"train_file": "{place}/numbers.json"}, "no string field 'text'"),
        ({"train_file": None}, "Give `--train_file` or `--dataset_name`: neither is given."),
        ({"dataset_name": "some/set"}, "both are given"),
        ({"train_file": None, "dataset_name": "no/such_dataset"}, "`--dataset_name`='no/such_dataset' cannot be loaded"),
        ({"train_file": None, "dataset_name": "{place}/empty"}, "`--dataset_name`='{place}/empty' cannot be loaded"),
        ({"dataset_config_name": "en"}, "`--dataset_config_name`='en' is of `--dataset_name`"),
        ({"assistant_only_loss": "true"}, "has no chats, but text in 'text'"),
        ({"validation_split_percentage": 10}, "`--validation_split_percentage`=10.0 and `--eval_file` do not go together"),
        ({"validation_split_percentage": 0, "eval_file": None}, "must lie between 0 and 100"),
        ({"validation_split_percentage": 0.1, "eval_file": None}, "of the 60 documents in"),
        ({"eval_file": None, "eval_strategy": "steps"}, "there is nothing to evaluate on"),
        ({"streaming": True, "max_steps": None, "num_train_epochs": 1}, "`--streaming` does not know how long the data is"),
        ({"packing": "dense"}, "argument --packing: invalid choice: 'dense'"),
        ({"max_seq_length": 1}, "`--max_seq_length`=1 must be at least 2"),
        ({"max_seq_length": 129}, "`--max_seq_length`=129 is more than the 128 positions"),
        ({"max_sequence_length": 9}, "`--max_sequence_length` is not an option. Did you mean `--max_seq_length`?"),
        ({"max_steps": "many"}, "invalid int value: 'many'"),
        ({"train_file": "{place}/chats.jsonl"}, "has chats, but the tokenizer has no chat template"),
        (
            {"train_file": "{place}/chats.jsonl", "chat_template": "{place}/plain.jinja", "assistant_only_loss": "true"},
            "does not mark what the assistant says with {% generation %}",
        ),
        ({"chat_template": "{place}/none.jinja"}, "`--chat_template`='{place}/none.jinja' is not a file"),
        ({"model": "{place}/dense", "keep_native": True}, "`--keep_native`: `--model`='{place}/dense' is a dense model"),
        ({"keep_native": True}, "`--keep_native`: `--model`='{place}/moe' is a MoE of hf_moe"),
        ({"upcycle_num_experts": 4}, "`--upcycle_num_experts`: `--model`='{place}/moe' already is a Mixture-of-Experts"),
        ({"model": "{place}/mixtral", "upcycle_method": "drop"}, "`--upcycle_method`: `--model`='{place}/mixtral' already is"),
        ({"model": "{place}/phimoe"}, "cannot be imported into hf_moe. Train it as the class that it is with `--keep_native`"),
        ({"model": "{place}/dense", "upcycle_num_experts": 1.5}, "`num_experts`=1.5 must be an int"),
        ({"model": "{place}/dense", "upcycle_std": 0.1}, "std"),
        ({"model": "{place}/dense", "upcycle_num_experts": "[1"}, "`--upcycle_num_experts`='[1' is not a value"),
        ({"model": "{place}/dense", "upcycle_config": "{place}/none.yaml"}, "{place}/none.yaml: not readable as YAML"),
        ({"freeze": ["router", "experts", "rest"]}, "leaves no parameter to train"),
        ({"model": "{place}/dense", "router_learning_rate": 0.1}, "has no parameter in the router"),
        ({"router_learning_rate": 0.1, "freeze": "router"}, "`router_learning_rate`=0.1, but `freeze` names 'router'"),
        ({"config": "{place}/bad.yaml"}, "`learning_rat` is not an option. Did you mean `--learning_rate`?"),
        ({"config": "{place}/none.yaml"}, "`--config`='{place}/none.yaml' cannot be read"),
        ({"resume_from_checkpoint": "{place}/cut/checkpoint-3"}, "trainer_state.json is missing or cut short"),
    ],
    ids=lambda value: None,
)
def test_refuses_before_work(options: dict[str, Any], message: str, place: Path, tmp_path: Path, capsys: Any) -> None:
    """In one line, with nothing written."""
    (place / "bad.parquet").write_text("no parquet")
    datasets.Dataset.from_dict({"n": [1, 2]}).to_parquet(place / "other.parquet")
    (place / "header.csv").write_text("text,number\n")
    (place / "empty.jsonl").write_text("")
    (place / "numbers.json").write_text('[{"n": 1}, {"n": 2}]')
    (place / "plain.jinja").write_text("{% for m in messages %}{{ m.content }} {% endfor %}")
    (place / "bad.yaml").write_text("learning_rat: 1\n")
    for name in ("empty", "cut/checkpoint-3", "phimoe"):
        (place / name).mkdir(parents=True, exist_ok=True)
    (place / "phimoe" / "config.json").write_text('{"model_type": "phimoe"}')

    def filled(value: Any) -> Any:
        if isinstance(value, list):
            return [filled(item) for item in value]
        return value if value is None else str(value).replace("{place}", str(place))

    out = tmp_path / "out"
    assert main(words(place, out, **{name: filled(value) for name, value in options.items()})) == 2
    error = capsys.readouterr().err
    lines = [line for line in error.splitlines() if line.startswith("hf-moe train: ")]
    assert len(lines) == 1, error
    assert message.replace("{place}", str(place)) in lines[0]
    assert not out.exists() or not any(out.iterdir())


def test_help_needs_no_torch() -> None:
    done = subprocess.run(
        [sys.executable, "-X", "importtime", "-m", "hf_moe", "train", "--help"],
        capture_output=True, text=True, check=True, timeout=300,
    )  # fmt: skip
    imported = {line.rpartition("|")[2].strip() for line in done.stderr.splitlines()}
    assert "hf_moe.training.train_help" in imported
    assert not imported & {"torch", "transformers"}
    shown = {word for word in done.stdout.split() if word.startswith("--")}
    parser_names = {f"--{name}" for name in option_names()}
    assert parser_names <= shown


def option_names() -> set[str]:
    import dataclasses

    from hf_moe.training.arguments import ModelArguments
    from hf_moe.training.command_line import FinetuneArguments

    named = {f.name for kind in (ModelArguments, DataArguments, FinetuneArguments) for f in dataclasses.fields(kind) if f.init}
    return named | {name for name, _, _ in recipe_fields()}


# ---------------------------------------------------------------------- resuming and pushing


def test_resumes_exactly(place: Path, tmp_path: Path) -> None:
    """`true` takes the last whole checkpoint; log, expert load and weights are those of an uninterrupted run."""
    options = {
        "max_steps": 6, "save_strategy": "steps", "save_steps": 2, "logging_steps": 3, "model": place / "dense",
        "upcycle_num_experts": 4, "upcycle_router_type": "noisy_top_k", "gradient_accumulation_steps": 2,
        "router_learning_rate": 3e-3,
    }  # fmt: skip
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    expected = train(place, whole, **options)
    parts.mkdir()
    for name in ("checkpoint-2", "checkpoint-4", "expert_load.safetensors"):
        (whole / name).rename(parts / name)
    (parts / "checkpoint-4" / "optimizer.pt").write_bytes(b"cut short")
    found = train(place, parts, **options, resume_from_checkpoint="true")
    assert numbers(found) == numbers(expected)
    assert found["eval_before"]["eval_loss"] == expected["eval_before"]["eval_loss"]
    assert found["eval_after"]["eval_loss"] == expected["eval_after"]["eval_loss"]
    assert read_expert_load(parts / "expert_load.safetensors").steps == [3, 6]
    weights = [load_file(folder / "model.safetensors") for folder in (whole, parts)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


def test_streamed_data_resumes_exactly(place: Path, tmp_path: Path) -> None:
    options = {"max_steps": 4, "save_strategy": "steps", "save_steps": 2, "logging_steps": 1, "streaming": True}
    expected = train(place, tmp_path / "whole", **options)
    (tmp_path / "parts").mkdir()
    (tmp_path / "whole" / "checkpoint-2").rename(tmp_path / "parts" / "checkpoint-2")
    found = train(place, tmp_path / "parts", **options, resume_from_checkpoint="true")
    assert numbers(found) == numbers(expected)


def test_pushes_what_it_made(place: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Any) -> None:
    """The repository is made first of all; at the end everything goes there, card and all."""
    import transformers.trainer

    asked: list[str] = []
    seen: dict[str, Any] = {}

    class Hub:
        def create_repo(self, name: str, **options: Any) -> Any:
            asked.append(name)
            return type("Url", (), {"repo_id": f"me/{name}"})

    def push(folder: Path, repo_id: str, **options: Any) -> str:
        seen.update(folder=folder, repo_id=repo_id, files={path.name for path in folder.iterdir()}, **options)
        return "pushed it"

    monkeypatch.setattr(transformers.trainer, "hf_api", Hub)
    monkeypatch.setattr(model_cards, "push_to_hub", push)
    out = tmp_path / "out"
    train(place, out, push_to_hub=True, hub_model_id="mine", hub_private_repo=True, max_steps=1)
    assert asked == ["mine"]
    assert (seen["repo_id"], seen["private"], seen["folder"]) == ("me/mine", True, out)
    assert {"README.md", "model.safetensors", "metrics.json", "tokenizer.json", "expert_load.safetensors"} <= seen["files"]
    assert "pushed it" in capsys.readouterr().out

    def refuse(*arguments: Any, **options: Any) -> Any:
        raise ConnectionError("no network")

    monkeypatch.setattr(model_cards, "push_to_hub", refuse)
    train(place, tmp_path / "other", push_to_hub=True, max_steps=1)  # the training is not lost
    assert "not pushed to me/other: no network" in capsys.readouterr().err
    monkeypatch.setattr(Hub, "create_repo", refuse)
    assert main(words(place, tmp_path / "third", push_to_hub=True)) == 2
    assert "`--push_to_hub`: the repository cannot be made (no network)" in capsys.readouterr().err


def test_a_card_that_fails_does_not_lose_the_run(place: Path, tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    def refuse(folder: Path, **given: Any) -> Any:
        raise ValueError("no card today")

    monkeypatch.setattr(model_cards, "save_card", refuse)
    train(place, tmp_path / "out", max_steps=1)
    assert "hf-moe train: no model card. no card today" in capsys.readouterr().err


# ---------------------------------------------------------------------- launching

LAUNCHERS = {
    "accelerate": ["-m", "accelerate.commands.launch", "--multi_gpu", "--num_processes", "2", "--num_machines", "1",
                   "--main_process_port", "0", "--mixed_precision", "no", "--dynamo_backend", "no"],
    "torchrun": ["-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"],
}  # fmt: skip


SPREAD = {"expert_parallel_size": 2, "expert_parallel_dense": "replicate", "save_strategy": "steps", "save_steps": 2}


@pytest.mark.parametrize(("launcher", "parallel"), [("torchrun", {}), ("accelerate", SPREAD)])
def test_two_processes(launcher: str, parallel: dict[str, Any], place: Path, tmp_path: Path, monkeypatch: Any) -> None:
    """The file under a launcher trains as one process with the double batch does, and evaluates to the same."""
    script = Path(main.__code__.co_filename)
    how = [str(script)] if launcher == "accelerate" else ["-m", "hf_moe.training.finetune"]
    options = {"model": place / "dense", "upcycle_num_experts": 4, "packing": "false", "per_device_eval_batch_size": 3}
    argv = words(place, tmp_path / "two", **options, **parallel, per_device_train_batch_size=2, ddp_backend="gloo")
    monkeypatch.chdir(tmp_path)
    status, output = finished([sys.executable, *LAUNCHERS[launcher], *how, *argv], timeout=600)
    assert status == 0, output[-3000:]
    assert output.count("held-out LM loss") == 1
    found = json.loads((tmp_path / "two" / "metrics.json").read_text())
    expected = train(place, tmp_path / "one", **options)
    assert found["world_size"] == 2
    for when in ("eval_before", "eval_after"):
        assert found[when]["eval_loss"] == pytest.approx(expected[when]["eval_loss"], rel=1e-4)
        assert found[when]["eval_tokens"] == expected[when]["eval_tokens"]
    loads = [read_expert_load(tmp_path / name / "expert_load.safetensors") for name in ("two", "one")]
    assert [load.executed.sum() for load in loads] == [loads[1].executed.sum()] * 2
    assert (output.count("expert shard") == 1) == bool(parallel)  # the table of ranks
    weights = [MoEForCausalLM.from_pretrained(tmp_path / name).state_dict() for name in ("two", "one")]
    for name, weight in weights[1].items():
        # as a whole: Adam divides each gradient by its size, and so shows the rounding of the smallest
        assert (weights[0][name] - weight).norm() <= 1e-2 * weight.norm(), name


def test_runs_as_a_file(place: Path, tmp_path: Path) -> None:
    script = Path(main.__code__.co_filename)
    done = subprocess.run(
        [sys.executable, str(script), *words(place, tmp_path / "out", max_steps=1)],
        capture_output=True,
        text=True,
        cwd=tmp_path,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert MoEForCausalLM.from_pretrained(tmp_path / "out") is not None
