# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Tiny dense checkpoints on disk in every layout, and what tests of the converters ask about folders and commands."""

from __future__ import annotations

import hashlib
import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import torch
from families import VOCABULARY, text_config
from safetensors.torch import load_file, save_file
from tokenizers import Tokenizer, models, pre_tokenizers
from torch import Tensor, nn
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerFast

from hf_moe.__main__ import main

CHAT_TEMPLATE = "{% for m in messages %}<{{ m.role }}>{{ m.content }}{% endfor %}"
COMMAND = [sys.executable, "-m", "hf_moe", "upcycle"]
WORDS = [
    "the",
    "a",
    "cat",
    "dog",
    "sat",
    "ran",
    "on",
    "in",
    "mat",
    "house",
    "and",
    "red",
    "blue",
    "one",
    "two",
    "three",
    "four",
]


def dense_model(family: str = "llama", seed: int = 0, dtype: torch.dtype = torch.float32, **changes: Any) -> PreTrainedModel:
    """A model with weights, biases and norms so large that a wrong one shows."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(text_config(family, **{"initializer_range": 0.2, **changes})).eval()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
        elif parameter.dim() == 1:
            parameter.data += 0.2 * torch.randn_like(parameter)
    return model.to(dtype)


def save_dense(folder: Path, family: str = "llama", seed: int = 0, **changes: Any) -> Path:
    """Such a model in a folder."""
    dense_model(family, seed, **changes).save_pretrained(folder)
    return folder


def save_tokenizer(folder: Path, words: list[str] | None = None, chat_template: str | None = CHAT_TEMPLATE) -> None:
    """A tokenizer of a few words, with padding and a chat template."""
    vocabulary = {word: i for i, word in enumerate(["<pad>", "<s>", "</s>", "<unk>", *(words or WORDS)])}
    assert len(vocabulary) <= VOCABULARY
    tokenizer = Tokenizer(models.WordLevel(vocabulary, unk_token="<unk>"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    fast = PreTrainedTokenizerFast(tokenizer_object=tokenizer, pad_token="<pad>", bos_token="<s>", eos_token="</s>",
                                   unk_token="<unk>", padding_side="left")  # fmt: skip
    fast.chat_template = chat_template
    fast.save_pretrained(folder)


def stored_tensors(folder: Path) -> dict[str, Tensor]:
    """All tensors of a folder's safetensors files, read by safetensors itself."""
    found: dict[str, Tensor] = {}
    for path in sorted(folder.glob("*.safetensors")):
        tensors = load_file(path)
        assert not found.keys() & tensors.keys()
        found |= tensors
    return found


def restore(folder: Path, tensors: dict[str, Tensor]) -> None:
    """Put other tensors into a folder with one weight file."""
    save_file({name: tensor.contiguous() for name, tensor in tensors.items()}, folder / "model.safetensors", {"format": "pt"})


def edit_json(path: Path, **changes: Any) -> None:
    """Change fields of a JSON file; `...` removes one."""
    content = json.loads(path.read_text())
    content = {name: value for name, value in {**content, **changes}.items() if value is not ...}
    path.write_text(json.dumps(content))


def tree(folder: Path) -> dict[str, str]:
    """Every file below a folder with a digest of its content; folders as well."""
    return {
        path.relative_to(folder).as_posix(): hashlib.sha256(path.read_bytes()).hexdigest() if path.is_file() else "folder"
        for path in sorted(folder.rglob("*"))
    }


def same_tensors(one: dict[str, Tensor], other: dict[str, Tensor]) -> None:
    """Assert equal names, dtypes, shapes and bits."""
    assert one.keys() == other.keys()
    for name, tensor in one.items():
        assert tensor.dtype == other[name].dtype, name
        assert torch.equal(tensor, other[name]), name


def refusal(capsys: Any, place: Path, *arguments: str) -> str:
    """The one line that `hf-moe upcycle` refuses with; `place` is as it was."""
    before = tree(place)
    capsys.readouterr()
    try:
        status: Any = main(["upcycle", *arguments])
    except SystemExit as stop:  # argparse
        status = stop.code
    out, err = capsys.readouterr()
    assert status not in (0, None), f"accepted: {arguments}"
    assert tree(place) == before
    assert out == ""
    assert len(err.splitlines()) == 1, err
    return err


def run_command(*arguments: str, **options: Any) -> subprocess.CompletedProcess[str]:
    """`hf-moe upcycle` in a process of its own."""
    return subprocess.run([*COMMAND, *arguments], capture_output=True, text=True, timeout=300, **options)
