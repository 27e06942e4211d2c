"""What a person wrote into a card stays there, and what other libraries drafted does not."""

import random
import re
from pathlib import Path
from typing import Any

import pytest
from hf_moe.model_cards import render_card, save_card
from huggingface_hub import EvalResult, ModelCard
from test_model_cards import data_of
from tiny import tiny


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("card") / "model"
    tiny().save_pretrained(path)
    return path


def with_readme(folder: Path, tmp_path: Path, text: str, **options: Any) -> str:
    (tmp_path / "README.md").write_bytes(text.encode())
    return render_card(folder, readme=tmp_path / "README.md", **options)


@pytest.mark.parametrize("seed", range(8))
def test_text_between_blocks_is_kept(seed: int, folder: Path, tmp_path: Path) -> None:
    """Whatever stands between our blocks stays there, byte for byte, however often the card is written."""
    rng = random.Random(seed)
    pieces = ["Plain.", "## Limits\n\n- one\n- two", "```\n# no heading\n<!-- a comment -->\n```", "| a |\n|---|\n| 1 |",
              "> quoted\n\n   indented   ", "<details>\n\n*x*\n\n</details>", "Ünïcödé {{ no }} {% template %}"]  # fmt: skip
    card = render_card(folder)
    gaps = [match.end() for match in re.finditer(r"<!-- hf_moe:end \w+ -->", card)]
    chosen = sorted(rng.sample(gaps, rng.randint(1, len(gaps))), reverse=True)
    written = []
    for gap in chosen:
        piece = rng.choice(pieces) + f" ({gap})"
        written.insert(0, piece)
        card = f"{card[:gap]}\n\n{piece}\n{card[gap:]}"
    again = with_readme(folder, tmp_path, card, title="Renamed")
    places = [again.index(piece) for piece in written]
    assert places == sorted(places)
    order = re.findall(r"hf_moe:end (\w+)|\((\d+)\)$", card, re.MULTILINE)
    assert re.findall(r"hf_moe:end (\w+)|\((\d+)\)$", again, re.MULTILINE) == order
    assert "# Renamed" in again
    assert with_readme(folder, tmp_path, again, title="Renamed") == again


def test_edited_blocks_are_kept(folder: Path, tmp_path: Path) -> None:
    card = render_card(folder)
    edited = card.replace("## Sizes\n", "## Sizes, as I see them\n")
    again = with_readme(folder, tmp_path, edited, title="Renamed")
    assert "## Sizes, as I see them\n" in again
    assert again.count("## Sizes") == 1
    assert "# Renamed" in again
    without = re.sub(r"<!-- hf_moe:begin sizes.*?hf_moe:end sizes -->\n\n", "", card, flags=re.DOTALL)
    assert with_readme(folder, tmp_path, without) == card  # one that was cut out comes back to its place
    for broken in (card.replace("<!-- hf_moe:end sizes -->\n", ""), card + card.split("---\n\n", 1)[1]):
        once = with_readme(folder, tmp_path, broken)
        assert with_readme(folder, tmp_path, once) == once


@pytest.mark.parametrize("line_break", ["\n", "\r\n"])
def test_readme_of_somebody_else(line_break: str, folder: Path, tmp_path: Path) -> None:
    text = (
        "---\nlicense: mit\ntags:\n- poetry\ncustom: [1, {a: b}]\n---\n\n# My model\n\nIt writes poems.\n\n## Limits\n\nMany.\n"
    )
    card = with_readme(folder, tmp_path, text.replace("\n", line_break))
    assert ("\r\n" in card) == (line_break == "\r\n")
    assert card.count("\n") == card.count(line_break)
    card = card.replace("\r\n", "\n")
    assert "# My model\n\nIt writes poems.\n\n## Limits\n\nMany.\n\n<!-- hf_moe:begin summary" in card
    assert len(re.findall("^# ", card, re.MULTILINE)) == 1  # their title is the title
    data = data_of(card)
    assert (data["license"], data["custom"]) == ("mit", [1, {"a": "b"}])
    assert data["tags"] == ["poetry", "hf_moe", "moe", "mixture-of-experts"]
    again = with_readme(folder, tmp_path, card)
    assert again == card


def test_fields_of_a_person_win(folder: Path, tmp_path: Path) -> None:
    card = render_card(folder, license="mit", datasets="org/a", eval_results={"perplexity": 12.5})
    data = data_of(card)
    assert data["model-index"][0]["results"][0]["dataset"]["type"] == "org/a"
    # arguments win over the front matter, the front matter over what files tell
    changed = ModelCard(card)
    changed.data["pipeline_tag"] = "fill-mask"
    changed.data["library_name"] = "mine"
    changed.data["tags"] = ["only-this"]
    changed.data["language"] = ["no"]
    again = with_readme(folder, tmp_path, str(changed).replace("'no'", "no"), license="apache-2.0")
    data = data_of(again)
    assert (data["pipeline_tag"], data["library_name"], data["tags"]) == ("fill-mask", "mine", ["only-this"])
    assert (data["license"], data["datasets"], data["language"]) == ("apache-2.0", "org/a", ["no"])
    assert data["model-index"][0]["results"][0]["metrics"][0]["value"] == 12.5
    # what was removed stays out; what is ours changes
    removed = ModelCard(with_readme(folder, tmp_path, render_card(folder)))
    del removed.data.pipeline_tag
    once = with_readme(folder, tmp_path, str(removed), title="Other")
    assert "pipeline_tag" not in data_of(once)
    assert "pipeline_tag" not in data_of(with_readme(folder, tmp_path, once))


def test_own_results(folder: Path) -> None:
    result = EvalResult(task_type="text-generation", dataset_type="hellaswag", dataset_name="HellaSwag", metric_type="acc",
                        metric_value=0.4)  # fmt: skip
    card = render_card(folder, eval_results=[result])
    assert data_of(card)["model-index"][0]["results"][0]["dataset"]["name"] == "HellaSwag"
    assert "| acc | 0.4 |" in card


TRAINERS_DRAFT = """---
library_name: transformers
base_model: ''
tags:
- generated_from_trainer
model-index:
- name: model
  results: []
---

<!-- This model card has been generated automatically according to the information the Trainer had access to. You
should probably proofread and complete it, then remove this comment. -->

# model

This model is a fine-tuned version of [](https://huggingface.co/) on an unknown dataset.
It achieves the following results on the evaluation set:
- Loss: 5.06

## Model description

More information needed

## Intended uses & limitations

More information needed

## Training procedure

### Training hyperparameters

The following hyperparameters were used during training:
- learning_rate: 0.001
- optimizer: Use OptimizerNames.ADAMW_TORCH_FUSED with betas=(0.9,0.999)

### Training results

| Training Loss | Epoch |
|:-------------:|:-----:|
| 5.4350        | 1.0   |


### Framework versions

- Transformers 5.23.0
- Pytorch 2.13.0+cpu
"""
# A draft, a placeholder in it, and what it becomes once somebody has filled it in.
DRAFTS = {
    "trainer": (TRAINERS_DRAFT, "More information needed", "Poems only.", "## Model description\n\nPoems only."),
    "hub": (
        str(ModelCard.from_template(ModelCard("---\nlibrary_name: transformers\ntags: []\n---\n").data)),
        "[More Information Needed]",
        "Ann",
        "### Model Description\n\n- **Developed by:** Ann",
    ),
}


@pytest.mark.parametrize("draft", DRAFTS)
def test_drafts(draft: str, folder: Path, tmp_path: Path) -> None:
    """Of what other libraries draft, only what a person has put into it remains."""
    text, placeholder, words, expected = DRAFTS[draft]
    body = render_card(folder).split("<!-- hf_moe:begin", 1)[1]
    assert with_readme(folder, tmp_path, text).split("<!-- hf_moe:begin", 1)[1] == body
    card = with_readme(folder, tmp_path, text.replace(placeholder, words, 1))
    assert not re.search("more information needed", card, re.IGNORECASE)
    assert expected in card
    assert body.split("<!-- hf_moe:begin versions")[0] in card
    assert "## Uses" not in card


@pytest.mark.parametrize(
    ("front", "message"),
    [
        ("license: [mit", "front matter is not YAML"),
        ("- a\n- b", "front matter holds no fields"),
        ("license: Apache License 2.0", "`license`='Apache License 2.0' is not an identifier"),
        ("language: English", "`language`='English' is not the code"),
        ("tags: [3]", "`tags`=3 is not a text"),
        ("datasets: /data/x", "`datasets`='/data/x' is not the id"),
        ("model-index: [{name: x}]", "Invalid `model_index`"),
    ],
)
def test_front_matter_that_cannot_be(front: str, message: str, folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=re.escape(message)) as error:
        with_readme(folder, tmp_path, f"---\n{front}\n---\ntext\n")
    assert "README.md" in str(error.value)
    assert "\n" not in str(error.value)


def test_errors(folder: Path, tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="no such folder"):
        render_card(tmp_path / "nowhere")
    with pytest.raises(ValueError, match=r"`readme`='nowhere.md' is not a file"):
        render_card(folder, readme="nowhere.md")
    with pytest.raises(TypeError, match="Give a folder, a model"):
        render_card({"a": 1})
    with pytest.raises(TypeError, match="licence"):
        render_card(folder, licence="mit")
    with pytest.raises(ValueError, match="Say where README"):
        save_card(tiny())
    (tmp_path / "checkpoint-5").mkdir()
    (tmp_path / "checkpoint-5" / "config.json").write_text("{}")
    with pytest.raises(ValueError, match=r"Give one of its checkpoints, e.g. .*checkpoint-5"):
        render_card(tmp_path)
    (tmp_path / "README.md").write_bytes(b"\xff\xfe caf\xe9")
    with pytest.raises(ValueError, match="not UTF-8"):
        render_card(folder, readme=tmp_path / "README.md")
