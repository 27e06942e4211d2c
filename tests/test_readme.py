"""The README is true: its Python runs, and its table of presets is that of the code."""

import os
import re
from pathlib import Path

import pytest
import torch
from families import text_config
from tokenizers import Tokenizer, models, pre_tokenizers
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from hf_moe import PRESETS

README = (Path(__file__).parent.parent / "README.md").read_text(encoding="utf-8")


@pytest.fixture
def demo_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A small model where `make demo` leaves the real one."""
    torch.manual_seed(0)
    dense = tmp_path / "demo_output" / "dense"
    AutoModelForCausalLM.from_config(text_config("llama", vocab_size=256)).save_pretrained(dense)
    vocabulary = {"<unk>": 0, "<|im_end|>": 1, **{chr(c): c for c in range(32, 127)}}
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Split("", "isolated")
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>").save_pretrained(dense)
    monkeypatch.chdir(tmp_path)
    return tmp_path


def test_python_runs(demo_files: Path) -> None:
    blocks = re.findall(r"```python\n(.*?)```", README, flags=re.DOTALL)
    assert len(blocks) == 8
    for block in blocks:
        exec(compile(block, "README.md", "exec"), {})
    assert {"my-moe", "my-run", "my-tuned-moe"} <= set(os.listdir(demo_files))
    assert (demo_files / "my-run" / "expert_load.safetensors").exists()


def test_presets_table() -> None:
    rows = {
        row[0]: row for row in re.findall(r"^\| `(\w+)` \| `(\w+)` \| (\d+), (\d+) \| (.*?) \| (.*?) \|$", README, re.MULTILINE)
    }
    assert set(rows) == set(PRESETS)
    for name, preset in PRESETS.items():
        _, router, experts, top_k, also, paper = rows[name]
        fields = dict(preset.fields)
        assert (router, int(experts), int(top_k)) == tuple(
            fields.pop(f) for f in ("router_type", "num_experts", "num_experts_per_tok")
        )
        assert paper == preset.paper
        for field, value in fields.items():
            letter = {"router_importance_loss_coef": "i", "router_load_loss_coef": "l", "router_aux_loss_coef": "a",
                      "router_z_loss_coef": "z"}.get(field)  # fmt: skip
            said = f"`{field}={value!r}`" if letter is None else f"{letter} {value:g}"
            assert said in also or (letter and not value), (name, field)
