# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""The body of a README.md as blocks that hf_moe writes, between marker comments, and text that it never touches.

A block's first marker carries a digest of the block. One that was edited since is its editor's, and is kept as it is.
"""

from __future__ import annotations

import hashlib
import re
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from pathlib import Path

_BLOCK = re.compile(
    r"^<!-- hf_moe:begin (?P<name>[a-z]+)(?: (?P<digest>[0-9a-f]{8}))? -->[ \t]*\n(?P<text>.*?)\n<!-- hf_moe:end (?P=name) -->",
    re.DOTALL | re.MULTILINE,
)
_TRAINERS_COMMENT = re.compile(r"<!-- This model card has been generated automatically according to .*?-->", re.DOTALL)
_HUBS_COMMENT = "<!-- Provide a quick summary of what the model is/does. -->"
_HUBS_TITLE = "Model Card for Model ID"
_HUBS_SENTENCE = (
    "This is the model card of a 🤗 transformers model that has been pushed on the Hub. This model card has been automatically "
    "generated."
)
# What `Trainer` writes under the title of its draft, and what it and PEFT write under other headings, besides placeholders.
_TRAINERS_INTRODUCTION = (
    r"This model is a fine-tuned version of .* on .*|This model was trained from scratch on .*"
    r"|It achieves the following results on the evaluation set:|- [A-Z][\w ]*: -?[\d.e+-]+"
)
_DRAFTED_LINES = {
    "Training hyperparameters": r"The following hyperparameters were used during training:|- \w+: .*",
    "Training results": r"\|.*\|",
    "Framework versions": r"- \w+ [\d.]+[\w.+-]*",
}
_PEFTS_ENDING = re.compile(r"\n### Framework versions\n\n- PEFT \S+\s*\Z")
_PLACEHOLDER = re.compile(r"\[?More information needed\]?", re.IGNORECASE)
_HEADING = re.compile(r"(#{1,6})\s+(.*?)\s*#*\s*")


@dataclass(frozen=True)
class Block:
    """A part of a README that hf_moe wrote.

    Attributes:
        name: what it is about; no two blocks have the same.
        text: as Markdown.
        digest: of the text when it was written; `None` where the marker has none.
    """

    name: str
    text: str
    digest: str | None = None

    @property
    def edited(self) -> bool:
        """Whether somebody else has changed the text since."""
        return self.digest != digest_of(self.text)

    def __str__(self) -> str:
        begin = f"<!-- hf_moe:begin {self.name} {self.digest or digest_of(self.text)} -->"
        return f"{begin}\n{self.text}\n<!-- hf_moe:end {self.name} -->"


def digest_of(text: str) -> str:
    """8 hexadecimal digits, the same whatever the line endings and the blanks at the ends of lines."""
    lines = "\n".join(line.rstrip() for line in text.strip().splitlines())
    return hashlib.blake2b(lines.encode(), digest_size=4).hexdigest()


def split_body(body: str) -> list[Block | str]:
    """Blocks, and the text before, between and after them, in their order. Text of nothing but blanks is left out."""
    parts: list[Block | str] = []
    seen: set[str] = set()
    end = 0
    for match in _BLOCK.finditer(body):
        if match["name"] in seen:  # pasted twice: the second is somebody's text
            continue
        seen.add(match["name"])
        parts += [body[end : match.start()], Block(match["name"], match["text"], match["digest"])]
        end = match.end()
    parts.append(body[end:])
    return [
        part if isinstance(part, Block) else part.strip("\n") for part in parts if not isinstance(part, str) or part.strip()
    ]


def own_text(parts: Sequence[Block | str]) -> str:
    """What is not hf_moe's: the text around blocks, and blocks that were edited."""
    texts = (part.text if isinstance(part, Block) else part for part in parts if isinstance(part, str) or part.edited)
    return "\n\n".join(texts)


def has_title(parts: Sequence[Block | str]) -> bool:
    """Whether there is a first-level heading in what is not hf_moe's."""
    return any(level == 1 for level, _, _ in _headings(own_text(parts).splitlines()))


def merge_body(existing: Sequence[Block | str], blocks: Sequence[Block]) -> str:
    """New blocks in the place of the old ones; all other text, and blocks that were edited, as they are.

    Args:
        existing: of `split_body`.
        blocks: of the new card, in their order. A new one comes after the one that it follows there.
    """
    new = {block.name: block for block in blocks}
    merged: list[Block | str] = []
    for part in existing:
        if isinstance(part, str) or part.edited:
            merged.append(part)
        elif part.name in new:
            merged.append(new[part.name])
    present = {part.name for part in merged if isinstance(part, Block)}
    # a title that is not ours stays on top
    last = -1 if present or not has_title(merged) else len(merged) - 1
    for block in blocks:
        if block.name in present:
            last = next(i for i, part in enumerate(merged) if isinstance(part, Block) and part.name == block.name)
        else:
            last += 1
            merged.insert(last, block)
    return "\n\n".join(str(part) for part in merged) + "\n"


# ---------------------------------------------------------------------- drafts that other libraries write


def strip_draft(body: str, titles: Collection[str]) -> str:
    """A card that `Trainer`, or `push_to_hub` of Transformers or PEFT, has drafted, without what they wrote.

    What remains is what a person put into it. Text that is no such draft is returned as it is.

    Args:
        body: of the README.
        titles: that the new card says or implies; a draft's title that is one of them goes.
    """
    body = _PEFTS_ENDING.sub("\n", body)
    from_trainer = bool(_TRAINERS_COMMENT.search(body))
    if not from_trainer and _HUBS_COMMENT not in body:
        return body
    lines = _TRAINERS_COMMENT.sub("", body).splitlines()
    headings = [(0, "", -1), *_headings(lines)]
    blank = _lines_of_blank_card()
    kept: list[tuple[int, str]] = []
    for (level, heading, start), (_, _, stop) in zip(headings, [*headings[1:], (0, "", len(lines))], strict=True):
        if level > 1 or (level == 1 and heading not in (*titles, _HUBS_TITLE)):
            kept.append((level, lines[start]))
        drafted = _DRAFTED_LINES.get(heading, "") if level > 1 else _TRAINERS_INTRODUCTION if from_trainer else ""
        section = lines[start + 1 : stop]
        kept += [(_TEXT, line) for line in section if not _is_drafted(line.strip(), blank, drafted)]
    return re.sub(r"\n{3,}", "\n\n", "\n".join(_without_empty_sections(kept))).strip("\n")


_TEXT = 7  # the level of what is no heading


def _is_drafted(line: str, blank: frozenset[str], pattern: str) -> bool:
    return line in blank or bool(_PLACEHOLDER.fullmatch(line)) or bool(pattern and re.fullmatch(pattern, line))


def _without_empty_sections(lines: Sequence[tuple[int, str]]) -> list[str]:
    """Lines, each with the level of its heading or `_TEXT`, without headings that have nothing under them; a title stays."""
    kept: list[str] = []
    deepest = 0  # of what was kept, from the end: it justifies the headings above it
    for level, line in reversed(lines):
        if level == _TEXT:
            deepest = _TEXT if line.strip() else deepest
        elif level == 1 or level < deepest:
            deepest = level
        else:
            continue
        kept.append(line)
    return kept[::-1]


def _lines_of_blank_card() -> frozenset[str]:
    """The lines, but for headings, of the card that huggingface_hub drafts for a model of which nothing is said."""
    import huggingface_hub
    import jinja2

    path = Path(huggingface_hub.__file__).parent / "templates" / "modelcard_template.md"
    text = jinja2.Template(path.read_text(encoding="utf-8")).render(card_data="") if path.is_file() else ""
    return frozenset({_HUBS_SENTENCE, *(line.strip() for line in text.splitlines() if not line.startswith("#"))} - {""})


def _headings(lines: Sequence[str]) -> list[tuple[int, str, int]]:
    """Level, text and index of every heading that is not in a code fence."""
    found = []
    fence = ""
    for index, line in enumerate(lines):
        text = line.strip()
        opening = re.match(r"(`{3,}|~{3,})", text)
        if fence:
            fence = "" if text.startswith(fence) and not text.strip(fence[0]) else fence
        elif opening:
            fence = opening[1]
        elif match := _HEADING.fullmatch(line):
            found.append((len(match[1]), match[2], index))
    return found
