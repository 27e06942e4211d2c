# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""The text that a report looks at: documents, the part of the text each belongs to, and their tokens."""

from __future__ import annotations

import json
import re
import unicodedata
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from .routing_analysis import Ints

if TYPE_CHECKING:
    from transformers import PreTrainedTokenizerBase

SAMPLE = Path(__file__).parent / "templates" / "sample.jsonl"
MAX_SECTIONS = 8
CLASSES = ("word start", "word continuation", "number", "punctuation", "code symbol", "whitespace", "special", "other")
POSITIONS = ("first token", "2nd to 8th", "9th to 32nd", "33rd to 128th", "later")
_POSITION_STARTS = (1, 8, 32, 128)
_HEADING = re.compile(r"^#{1,6} +\S.*$")
_PLAIN = (".txt", ".md")
_LEAST = 16  # tokens of a document, where there are too many to take all


@dataclass(frozen=True)
class Document:
    """A text that the model reads by itself.

    Attributes:
        text: it.
        part: the part of the whole that it belongs to: a domain, a file, a section, or itself.
    """

    text: str
    part: str


@dataclass(frozen=True)
class TokenTable:
    """The tokens of all documents, one after the other.

    Attributes:
        ids_N: vocabulary ids.
        sequence_N: which sequence, as the model reads them; `document_N`: which document; `part_N`: index in `parts`.
        position_N: index in the sequence.
        class_N: index in `CLASSES`.
        pieces: the text of each token; together they are the documents. Special tokens have their name.
        parts: names of the parts.
        names: name of every vocabulary id that occurs.
    """

    ids_N: Ints
    sequence_N: Ints
    document_N: Ints
    part_N: Ints
    position_N: Ints
    class_N: Ints
    pieces: list[str]
    parts: list[str]
    names: dict[int, str]

    @property
    def position_classes(self) -> Ints:
        """`[N]` index in `POSITIONS`."""
        return np.searchsorted(_POSITION_STARTS, self.position_N, side="right")


# ---------------------------------------------------------------------- documents


def read_documents(
    paths: Sequence[str | Path], text_field: str = "text", part_field: str | None = None, max_tokens: int = 8192
) -> list[Document]:
    """Documents of text files; without files, those of a small sample in five domains.

    A line of a `.jsonl` file is a document. A section of a `.txt` or `.md` file is one: what follows a Markdown heading, or
    of a text without headings an eighth. The part of a document is its `part_field`, or its file where there are several, or
    itself.

    Args:
        paths: the files.
        text_field: the field of JSON lines with the text.
        part_field: the field with the name of the part.
        max_tokens: of files with more documents than this allows, some are taken, at equal distances.

    Raises:
        ValueError: a file cannot be used.
    """
    if not paths:
        return read_documents([SAMPLE], part_field="part")
    for path in paths:
        check_file(path, part_field)
    documents: list[Document] = []
    most = max(1, max_tokens // (_LEAST * len(paths)))
    for path in paths:
        if Path(path).suffix in _PLAIN:
            found = list(_sections(Path(path).read_text(encoding="utf-8-sig"), max_tokens))
        else:
            found = _lines(Path(path), text_field, part_field, most)
        if len(paths) > 1 and part_field is None:
            found = [Document(document.text, Path(path).name) for document in found]
        documents += found
    if not documents:
        raise ValueError(f"`--text`={', '.join(map(str, paths))!r} holds no text. Give a file with some.")
    return documents


def check_file(path: str | Path, part_field: str | None = None) -> None:
    """Check that a file can be read as text, without reading it.

    Raises:
        ValueError: it can not; the message says why and what to do.
    """
    if not Path(path).is_file():
        raise ValueError(f"`--text`={str(path)!r} is not a file. Give the path of a .jsonl or .txt file.")
    if Path(path).suffix not in (*_PLAIN, ".jsonl"):
        raise ValueError(f"`--text`={str(path)!r} has an unknown ending. Give a .jsonl or a .txt file.")
    if part_field is not None and Path(path).suffix in _PLAIN:
        raise ValueError(f"`--part_field`={part_field!r} is a field of JSON lines, but {str(path)!r} has none. Leave it out.")


def _sections(text: str, max_tokens: int) -> Iterator[Document]:
    lines = text.splitlines(keepends=True)
    starts = [i for i, line in enumerate(lines) if _HEADING.match(line.rstrip()) and (i == 0 or not lines[i - 1].strip())]
    if len(starts) > 1:
        bounds = [*([0] if starts[0] else []), *starts, len(lines)]
        named = [("".join(lines[a:b]), lines[a].strip("# \n")) for a, b in pairwise(bounds)]
    else:
        pieces = _eighths(text)
        named = [(piece, f"section {i} of {len(pieces)}") for i, piece in enumerate(pieces, 1)]
    longest = 16 * max_tokens // max(1, len(named)) + 64  # characters; a token is rarely longer
    for content, name in named:
        if content.strip():
            yield Document(content[:longest].strip("\n"), name or "start")


def _eighths(text: str) -> list[str]:
    """At most eight pieces of about the same length, cut between paragraphs, or lines where there are no paragraphs."""
    for end in ("\n\n", "\n"):
        parts = [part for part in re.split(f"(?<={end})(?=\\S)", text) if part.strip()]
        if len(parts) >= MAX_SECTIONS:
            break
    if not parts:
        return []
    sizes = np.cumsum([len(part) for part in parts])
    which = np.minimum((sizes - 1) * MAX_SECTIONS // max(1, sizes[-1]), MAX_SECTIONS - 1)
    return ["".join(p for p, w in zip(parts, which, strict=True) if w == section) for section in dict.fromkeys(which.tolist())]


def _lines(path: Path, text_field: str, part_field: str | None, most: int) -> list[Document]:
    with path.open(encoding="utf-8") as file:
        count = sum(1 for line in file if line.strip())
    wanted = set(range(count)) if count <= most else {round(i * (count - 1) / max(1, most - 1)) for i in range(most)}
    documents, index = [], -1
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, 1):
            index += bool(line.strip())
            if line.strip() and index in wanted:
                documents.append(_document(line, f"{path}, line {number}", text_field, part_field))
    return [document for document in documents if document.text.strip()]


def _document(line: str, place: str, text_field: str, part_field: str | None) -> Document:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise ValueError(f"`--text`: {place} is not JSON ({error}). Write one object per line.") from error
    if not isinstance(row, dict) or not isinstance(row.get(text_field), str):
        raise ValueError(f"`--text`: {place} has no string field {text_field!r}. Name the field with `--text_field`.")
    if part_field is None:
        return Document(row[text_field], place.rpartition(", ")[2])
    if part_field not in row:
        raise ValueError(f"`--part_field`={part_field!r}: {place} has no such field, but {list(row)}. Name one of them.")
    return Document(row[text_field], str(row[part_field]))


# ---------------------------------------------------------------------- tokens


def tokenise(documents: Sequence[Document], tokenizer: PreTrainedTokenizerBase, max_tokens: int, max_length: int) -> TokenTable:
    """Tokens of the documents, at most `max_tokens`: all of the short documents, and as much of the long ones as fits.

    Args:
        documents: the text.
        tokenizer: the model's; it adds its special tokens.
        max_tokens: of all documents together.
        max_length: of a sequence; a longer document is several.
    """
    rows = [_tokens(document.text, tokenizer) for document in documents]
    limit = _even_limit([len(row) for row in rows], max_tokens)
    parts = list(dict.fromkeys(document.part for document in documents))
    columns: dict[str, list[int]] = {name: [] for name in ("ids", "sequence", "document", "part", "position", "class")}
    pieces: list[str] = []
    sequence = -1
    for index, (document, row) in enumerate(zip(documents, rows, strict=True)):
        before = ""
        for position, (token, piece, is_special) in enumerate(row[:limit]):
            sequence += position % max_length == 0
            values = (token, sequence, index, parts.index(document.part), position % max_length)
            for name, value in zip(columns, (*values, _class(piece, before, is_special)), strict=True):
                columns[name].append(value)
            pieces.append(piece)
            before = "" if is_special else piece or before
    names = {token: token_name(tokenizer, token) for token in dict.fromkeys(columns["ids"])}
    arrays = {f"{name}_N": np.array(values, np.int64) for name, values in columns.items()}
    return TokenTable(**arrays, pieces=pieces, parts=parts, names=names)


def _tokens(text: str, tokenizer: PreTrainedTokenizerBase) -> list[tuple[int, str, bool]]:
    """(id, piece of the text, whether special); white space that a tokenizer leaves out belongs to the token after it."""
    special = set(tokenizer.all_special_ids)
    encoded: Any = tokenizer(text, verbose=False, return_offsets_mapping=tokenizer.is_fast)
    ids = encoded["input_ids"]
    if not tokenizer.is_fast:
        return [(i, str(tokenizer.decode([i])), i in special) for i in ids]
    row, end = [], 0
    for token, (_, stop) in zip(ids, encoded["offset_mapping"], strict=True):
        if token in special and stop <= end:
            row.append((token, str(tokenizer.decode([token])), True))
        else:
            row.append((token, text[end : max(end, stop)], token in special))
            end = max(end, stop)
    return row


def _even_limit(lengths: Sequence[int], budget: int) -> int:
    """The largest limit on every length with which they sum up to the budget at most; at least 1."""
    low, high = 1, max(lengths, default=1)
    while low < high:
        middle = (low + high + 1) // 2
        if sum(min(length, middle) for length in lengths) <= budget:
            low = middle
        else:
            high = middle - 1
    return low


def _class(piece: str, before: str, is_special: bool) -> int:
    core = piece.strip()
    if is_special:
        name = "special"
    elif not core:
        name = "whitespace" if piece else "other"
    elif any(character.isalpha() for character in core):
        starts = piece[0] != core[0] or not before or not before[-1].isalnum()
        name = "word start" if starts else "word continuation"
    elif any(character.isnumeric() for character in core):
        name = "number"
    elif all(unicodedata.category(character)[0] == "P" and character not in _CODE for character in core):
        name = "punctuation"
    else:
        name = "code symbol" if any(c in _CODE or unicodedata.category(c)[0] == "S" for c in core) else "other"
    return CLASSES.index(name)


_CODE = frozenset("_{}[]#@%&*/\\")


def token_name(tokenizer: PreTrainedTokenizerBase, token: int) -> str:
    """A token's text with visible white space, or where that is no text (a part of a character) its vocabulary entry."""
    text, entry = str(tokenizer.decode([token])), str(tokenizer.convert_ids_to_tokens(token))
    if not text or "\ufffd" in text:
        return entry
    if entry.startswith(("▁", "Ġ")) and not text.startswith(" "):  # SentencePiece: decoding drops the first space
        text = " " + text
    return visible(text)


def visible(text: str) -> str:
    """White space as ␣, ⏎ and ⇥; what else cannot be seen as `code`."""
    for character, sign in ((" ", "␣"), ("\n", "⏎"), ("\t", "⇥")):
        text = text.replace(character, sign)
    return "".join(c if c.isprintable() else code(c) for c in text)


def code(character: str) -> str:
    """An unusual space as ⍽, another character that cannot be seen as its number."""
    return "⍽" if unicodedata.category(character) == "Zs" else f"\\u{ord(character):04x}"
