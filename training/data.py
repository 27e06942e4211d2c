# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Text and chats as sequences of tokens for causal language modelling."""

from __future__ import annotations

import inspect
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import partial
from itertools import chain
from typing import TYPE_CHECKING, Any

import torch

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset
    from transformers import PreTrainedTokenizerBase

IGNORED = -100  # a label that has no loss
_MARKS_ASSISTANT = re.compile(r"\{%-?\s*generation\s*-?%\}")


@dataclass(frozen=True)
class Layout:
    """How documents become sequences.

    Attributes:
        packing: see `DataArguments`.
        max_seq_length: tokens of a sequence, or the most of them.
        text_field: the field with the text, or `None` for chats.
        messages_field: the field with the chats.
        assistant_only: whether only what the assistant says has labels.
    """

    packing: str = "blocks"
    max_seq_length: int = 512
    text_field: str | None = "text"
    messages_field: str = "messages"
    assistant_only: bool = False


def tokenise(
    rows: Dataset | IterableDataset,
    tokenizer: PreTrainedTokenizerBase,
    layout: Layout,
    *,
    what: str,
    workers: int | None = None,
) -> Any:
    """Documents as sequences with `input_ids` and `labels`, and what the packing needs besides.

    Args:
        rows: a dataset with the layout's field.
        tokenizer: the model's; it gets its own special tokens, and the end-of-text token closes every text.
        layout: what to make of them.
        what: where they come from, for messages.
        workers: processes.

    Raises:
        ValueError: there is no sequence in it.
    """
    from datasets import IterableDataset

    columns = rows.column_names or list(next(iter(rows), {}))
    work = partial(_tokenise_batch, tokenizer=tokenizer, layout=layout)
    if isinstance(rows, IterableDataset):
        sequences: Any = rows.map(work, batched=True, remove_columns=columns)
        first = next(iter(sequences), None)
    else:
        sequences = rows.map(work, batched=True, remove_columns=columns, num_proc=workers, desc=f"tokenising {what}")
        first = sequences[0] if len(sequences) else None
    if first is None and layout.packing == "false":
        raise ValueError(f"{what} has no document of at least two tokens with a loss. Give more text.")
    if first is None:
        raise ValueError(
            f"{what} has fewer than {layout.max_seq_length} tokens, which fills no block. Give more text, or lower "
            "`--max_seq_length`."
        )
    return sequences


def load_blocks(
    option: str, path: str, tokenizer: PreTrainedTokenizerBase, block_size: int, text_field: str = "text"
) -> Dataset:
    """Tokenise a file and cut it into blocks of equal length, so that no token is padding.

    Documents follow each other, each closed by the end-of-text token; the rest that fills no block is left out.

    Args:
        option: the option that names the file, for messages.
        path: a file that `open_files` reads.
        tokenizer: the model's.
        block_size: tokens per block.
        text_field: the field that holds the text.

    Raises:
        ValueError: the file does not fill one block.
    """
    from .data_source import open_files

    layout = Layout(max_seq_length=block_size, text_field=text_field)
    return tokenise(open_files([path]), tokenizer, layout, what=f"`{option}`={path!r}")


def check_chats(option: str, tokenizer: PreTrainedTokenizerBase, assistant_only_loss: str) -> bool:
    """Whether chats get labels only where the assistant speaks.

    Args:
        option: the option that names the data, for messages.
        tokenizer: with its chat template.
        assistant_only_loss: see `DataArguments`.

    Raises:
        ValueError: there is no template, or one that does not mark what the assistant says.
    """
    template: Any = tokenizer.chat_template
    if not template:
        raise ValueError(f"`{option}` has chats, but the tokenizer has no chat template. Give one with `--chat_template FILE`.")
    marks = _MARKS_ASSISTANT.search(template if isinstance(template, str) else template.get("default", "")) is not None
    if assistant_only_loss == "true" and not marks:
        raise ValueError(
            "`--assistant_only_loss`='true': the chat template does not mark what the assistant says with {% generation %}. "
            "Give one that does with `--chat_template FILE`, or choose 'false'."
        )
    return marks and assistant_only_loss != "false"


@dataclass(frozen=True)
class PadCollator:
    """Pads a batch's sequences to the longest on the right; padding has no label and is masked."""

    pad_token_id: int

    def __call__(self, rows: list[dict[str, Any]]) -> dict[str, torch.Tensor]:
        """`input_ids`, `labels` and `attention_mask`, each `[B, S]`."""
        longest = max(len(row["input_ids"]) for row in rows)
        filler = {"input_ids": self.pad_token_id, "labels": IGNORED, "attention_mask": 0}
        padded: dict[str, list[list[int]]] = {name: [] for name in filler}
        for row in rows:
            values = {**row, "attention_mask": [1] * len(row["input_ids"])}
            for name, fill in filler.items():
                padded[name].append([*values[name], *[fill] * (longest - len(values[name]))])
        return {name: torch.tensor(values) for name, values in padded.items()}


# ---------------------------------------------------------------------- documents

_Document = tuple[list[int], list[int]]  # ids and labels


def _tokenise_batch(batch: dict[str, list[Any]], tokenizer: PreTrainedTokenizerBase, layout: Layout) -> dict[str, list]:
    if layout.text_field is not None:
        documents = _texts(batch[layout.text_field], tokenizer)
    else:
        documents = _chats(batch[layout.messages_field], tokenizer, layout.assistant_only)
    return _LAYOUTS[layout.packing](documents, layout.max_seq_length)


def _texts(texts: Iterable[str | None], tokenizer: Any) -> Iterator[_Document]:
    """Each closed by the end-of-text token."""
    end = [] if tokenizer.eos_token_id is None else [tokenizer.eos_token_id]
    for ids in tokenizer([text or "" for text in texts], verbose=False)["input_ids"]:
        closed = [*ids, *([] if ids[-1:] == end else end)]
        yield closed, closed


def _chats(chats: list[Any], tokenizer: Any, assistant_only: bool) -> Iterator[_Document]:
    """As the chat template writes them."""
    for chat in chats:
        found = tokenizer.apply_chat_template(
            chat, tokenize=True, return_dict=True, return_assistant_tokens_mask=assistant_only
        )
        ids = found["input_ids"]
        marked = found["assistant_masks"] if assistant_only else [1] * len(ids)
        yield ids, [token if mark else IGNORED for token, mark in zip(ids, marked, strict=True)]


def _blocks(documents: Iterable[_Document], size: int) -> dict[str, list[list[int]]]:
    """One after the other, cut into sequences of `size`; the rest is left out."""
    documents = list(documents)
    ids, labels = (list(chain.from_iterable(document[part] for document in documents)) for part in (0, 1))
    starts = range(0, len(ids) - size + 1, size)
    return {"input_ids": [ids[s : s + size] for s in starts], "labels": [labels[s : s + size] for s in starts]}


def _apart(documents: Iterable[_Document], size: int) -> dict[str, list[list[int]]]:
    """As `_blocks`, with positions that begin anew at every document; its first token is predicted by none."""
    documents = list(documents)
    blocks = _blocks(((ids, [IGNORED, *labels[1:]]) for ids, labels in documents if ids), size)
    within = list(chain.from_iterable(range(len(ids)) for ids, _ in documents))
    positions = []
    for start in range(0, len(within) - size + 1, size):
        first = within[start]  # a document that began in an earlier block begins anew
        until = next((i for i in range(1, size) if within[start + i] == 0), size)
        positions.append([p - first if i < until else p for i, p in enumerate(within[start : start + size])])
    return {**blocks, "position_ids": positions}


def _single(documents: Iterable[_Document], size: int) -> dict[str, list[list[int]]]:
    """One per sequence; what is longer than `size` goes on in the next. Sequences that predict nothing are left out."""
    pieces = [
        (ids[start : start + size], labels[start : start + size])
        for ids, labels in documents
        for start in range(0, len(ids), size)
    ]
    kept = [(ids, labels) for ids, labels in pieces if any(label != IGNORED for label in labels[1:])]
    return {"input_ids": [ids for ids, _ in kept], "labels": [labels for _, labels in kept]}


_LAYOUTS = {"blocks": _blocks, "documents": _apart, "false": _single}


@torch.no_grad()
def check_documents_apart(model: Any) -> None:
    """Refuse a model in which a document sees the one before it in its sequence, although positions begin anew.

    It is tried out: the logits of a document must not depend on the tokens of the one before.

    Raises:
        ValueError: they do.
    """
    if any(parameter.is_meta for parameter in model.parameters()):  # of another rank, which tries it out
        return
    was_training = model.training
    model.eval()
    first, second = torch.tensor([[3, 5, 7, 2, 4]]), torch.tensor([[9, 8, 6]])
    positions = torch.cat([torch.arange(5), torch.arange(3)]).unsqueeze(0)
    device = next(model.parameters()).device
    logits = []
    for before in (first, first + 1):
        ids = torch.cat([before, second], dim=1).to(device)
        inputs = {"input_ids": ids, "position_ids": positions.to(device)}
        accepted = inspect.signature(model.forward).parameters
        logits.append(model(**{k: v for k, v in inputs.items() if k in accepted}, use_cache=False).logits[:, 5:].float())
    model.train(was_training)
    rounding = 10 * torch.finfo(model.dtype).eps * logits[0].abs().max()
    if not bool((logits[0] - logits[1]).abs().max() <= rounding):
        how = getattr(model.config, "_attn_implementation", None)
        raise ValueError(
            f"`--packing`='documents': in this {model.config.get_text_config().model_type} with {how!r} attention a document "
            "sees the one before it. Choose 'blocks' or 'false', or another `--attn_implementation`."
        )
