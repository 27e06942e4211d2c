# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""`render_card`: the template filled from a model, and laid into the README that is there already."""

from __future__ import annotations

import os
import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .front_matter import card_data, merge_fields, record_of, set_by_person, split_readme, split_record, written_by_peft
from .lineage import LINEAGE, STATE
from .metadata import CardOptions, known_fields, said_fields
from .readme import Block, has_title, merge_body, split_body, strip_draft
from .subject import Subject, describe, is_trainer, record_bytes
from .words import card_context

TEMPLATE = Path(__file__).parent / "templates" / "card.md"
README = "README.md"


def render_card(source: Any, *, trainer: Any = None, readme: str | os.PathLike[str] | None = None, **options: Any) -> str:
    """The text of a model's README.md.

    Args:
        source: the folder of a checkpoint or of a run (`hf-moe upcycle`, `hf-moe train`, `save_pretrained`), of hf_moe, native
            or a PEFT adapter; a model in memory; or a `Trainer`.
        trainer: the `Trainer` of a model in memory, for its hyper-parameters, logs and load.
        readme: the README to lay the card into (default: that of the folder, or of the `Trainer`'s `output_dir`). What a
            person wrote into it is kept: all text outside of hf_moe's marker comments, blocks that were edited, and fields of
            the front matter.
        options: fields of `CardOptions`: `repo_id`, `title`, `license`, `language`, `datasets`, `tags`, `base_model`,
            `eval_results`, ….

    Raises:
        ValueError: the folder has no whole checkpoint, or a field is not what the Hub takes; one line that says which.
        TypeError: `source` is none of these, or an option is not known.

    Example:
        >>> from transformers import LlamaConfig
        >>> from hf_moe import MoEConfig, MoEForCausalLM
        >>> dense = LlamaConfig(hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, vocab_size=64)
        >>> card = render_card(MoEForCausalLM(MoEConfig(text_config=dense, num_experts=4)), license="apache-2.0", title="Mine")
        >>> "license: apache-2.0" in card, "# Mine" in card
        (True, True)
    """
    told = CardOptions(**options)
    subject = describe(source, trainer)
    path = Path(readme) if readme is not None else None if subject.folder is None else subject.folder / README
    if readme is not None and path is not None and not path.is_file():
        raise ValueError(f"`readme`={os.fspath(readme)!r} is not a file. Name the README.md whose text is to be kept.")
    return fill(subject, told, read_text(path), str(path or README))


def save_card(source: Any, folder: str | os.PathLike[str] | None = None, *, trainer: Any = None, **options: Any) -> Path:
    """Write `render_card(source, …)` to README.md, and beside it what a later card of the folder needs.

    That is `lineage.json`, and of a `Trainer` also `trainer_state.json`.

    Args:
        source, trainer, options: as for `render_card`.
        folder: where to (default: the folder that `source` is, or the `Trainer`'s `output_dir`).

    Returns:
        The file.
    """
    owner = source if is_trainer(source) else trainer
    place = folder if folder is not None else owner.args.output_dir if owner is not None else source
    if not isinstance(place, (str, os.PathLike)):
        raise ValueError(f"`folder`=None: a {type(source).__name__} in memory has none. Say where README.md is to be written.")
    subject, target = describe(source, trainer), Path(place)
    target.mkdir(parents=True, exist_ok=True)
    card = fill(subject, CardOptions(**options), read_text(target / README), str(target / README))
    if owner is not None:
        owner.state.save_to_json(str(target / STATE))
    write_records(subject, card, target)
    return target / README


def write_records(subject: Subject, card: str, folder: Path) -> None:
    """Write README.md and lineage.json."""
    write_bytes(folder / LINEAGE, record_bytes(subject))
    write_bytes(folder / README, card.encode())


def write_bytes(path: Path, content: bytes) -> None:
    """Write a file beside, and rename it."""
    beside = path.with_name(f"{path.name}.part")
    beside.write_bytes(content)
    os.replace(beside, path)


def read_text(path: Path | None) -> str:
    """A README with the line endings it has; empty if there is none.

    Raises:
        ValueError: it is not UTF-8.
    """
    if path is None or not path.is_file():
        return ""
    try:
        return path.read_bytes().decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise ValueError(f"{path}: not UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8.") from error


def fill(subject: Subject, told: CardOptions, existing: str = "", what: str = README) -> str:
    """The card of a subject, laid into an existing README.

    Args:
        subject: what it is about.
        told: what a person says of it.
        existing: text of the README that is there.
        what: its name, for messages.
    """
    line_break = "\r\n" if "\r\n" in existing else "\n"
    fields, body = split_readme(existing.replace("\r\n", "\n"), what)
    record, body = split_record(body)
    title = told.title or (told.repo_id or "").rpartition("/")[2] or subject.name
    parts = split_body(strip_draft(body, (title, subject.name)))
    theirs = {**set_by_person(fields, record), **said_fields(told)}
    if told.eval_results is not None:
        theirs.pop("model-index", None)
    ours = known_fields(subject, told, title, with_results="model-index" not in theirs)
    data = card_data(merge_fields(ours, theirs, add_tags=record is None or written_by_peft(fields)), what)
    written = data.to_dict()
    told_results = {"model-index"} if told.eval_results is not None else set()
    mine = {name: value for name, value in written.items() if name not in theirs and name not in told_results}
    gone = [name for name, value in theirs.items() if value is None]
    results = _results(data) if told_results or "model-index" in theirs else {}
    text = _render(data, card_context(subject, told, title, not has_title(parts), written, results))
    front, rendered = text.split("\n---\n", 1)
    blocks = [part for part in split_body(rendered) if isinstance(part, Block)]
    blocks = [Block(block.name, re.sub(r"\n{3,}", "\n\n", block.text).strip()) for block in blocks]
    card = f"{front}\n---\n\n{record_of(mine, gone)}\n\n{merge_body(parts, blocks)}"
    return card.replace("\n", line_break) if line_break != "\n" else card


def _results(data: Any) -> dict[str, Any]:
    """The results that a person has given, by name."""
    return {result.metric_name or result.metric_type: result.metric_value for result in data.eval_results or []}


def _render(data: Any, context: Mapping[str, Any]) -> str:
    """As `ModelCard.from_template` does, of which the import alone takes as much memory as a conversion."""
    import jinja2

    template = jinja2.Template(TEMPLATE.read_text(encoding="utf-8"), undefined=jinja2.StrictUndefined)
    return template.render(**{**data.to_dict(), **context, "card_data": data.to_yaml()})
