# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Text files as blocks of tokens for causal language modelling."""

from __future__ import annotations

import json
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from datasets import Dataset
    from transformers import PreTrainedTokenizerBase

_READERS = {".jsonl": "json", ".json": "json", ".txt": "text"}


def check_text_file(option: str, path: str, text_field: str) -> None:
    """Check, without reading more than a line, that a file can be trained on.

    Args:
        option: the option that names the file, for the message.
        path: a `.jsonl` file with a string `text_field` in every line, or a `.txt` file.
        text_field: the field.

    Raises:
        ValueError: it can not; the message says why and what to do.
    """
    if not Path(path).is_file():
        raise ValueError(f"`{option}`={path!r} is not a file. Give the path of a .jsonl or .txt file.")
    if Path(path).suffix not in _READERS:
        raise ValueError(f"`{option}`={path!r} has an unknown ending. Give a .jsonl (or .json) or a .txt file.")
    with open(path, encoding="utf-8") as file:
        line = next((line for line in file if line.strip()), None)
    if line is None:
        raise ValueError(f"`{option}`={path!r} is empty. Give a file with text.")
    if Path(path).suffix == ".txt":
        return
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"`{option}`={path!r} is not JSON Lines ({error}). Write one object per line.") from error
    if not isinstance(row, dict) or not isinstance(row.get(text_field), str):
        fields = list(row) if isinstance(row, dict) else type(row).__name__
        raise ValueError(
            f"`{option}`={path!r} has no string field {text_field!r} in its first line, but {fields}. Name the field with "
            "`--text_field`."
        )


def load_blocks(
    option: str, path: str, tokenizer: PreTrainedTokenizerBase, block_size: int, text_field: str = "text"
) -> Dataset:
    """Tokenise a file and cut it into blocks of equal length, so that no token is padding.

    Documents (the lines of a JSONL file, the paragraphs of a text file) follow each other, each closed by the end-of-text
    token; the rest that fills no block is left out.

    Args:
        option: the option that names the file, for the message.
        path: as for `check_text_file`.
        tokenizer: the model's.
        block_size: tokens per block.
        text_field: the field of a JSONL file.

    Returns:
        A dataset with `input_ids` and `labels`, both `block_size` long.

    Raises:
        ValueError: the file does not fill one block.
    """
    from datasets import load_dataset

    reader = _READERS[Path(path).suffix]
    how = {"sample_by": "paragraph"} if reader == "text" else {}
    texts = load_dataset(reader, data_files=str(path), split="train", **how)
    arguments = {
        "tokenizer": tokenizer,
        "field": "text" if reader == "text" else text_field,
        "block_size": block_size,
    }
    blocks = texts.map(
        _tokenise_and_pack,
        batched=True,
        remove_columns=texts.column_names,
        fn_kwargs=arguments,
        desc=f"tokenising {Path(path).name}",
    )
    if not len(blocks):
        raise ValueError(
            f"`{option}`={path!r} has fewer than {block_size} tokens, which fills no block. Give more text, or lower "
            "`--max_seq_length`."
        )
    return blocks


def _tokenise_and_pack(
    batch: dict[str, list[str]], tokenizer: PreTrainedTokenizerBase, field: str, block_size: int
) -> dict[str, list[list[int]]]:
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    documents: Any = tokenizer(batch[field], add_special_tokens=False, verbose=False)["input_ids"]
    tokens = list(chain.from_iterable([*document, *end] for document in documents))
    starts = range(0, len(tokens) - block_size + 1, block_size)
    blocks = [tokens[start : start + block_size] for start in starts]
    return {"input_ids": blocks, "labels": [list(block) for block in blocks]}
