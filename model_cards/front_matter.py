# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""The metadata at the head of a README.md: what hf_moe knows, and what a person has set, which counts more.

A comment at the head of the body has a digest of each field as hf_moe wrote it: a field that differs from it, or is gone, was
set by a person.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from huggingface_hub.repocard_data import ModelCardData

# As the Hub's server finds it (huggingface_hub.repocard).
_YAML_BLOCK = re.compile(r"^\s*---\n(.*?)\n---[ \t]*(?:\n|$)", re.DOTALL)
_EMPTY_BLOCK = re.compile(r"^\s*---\n---[ \t]*(?:\n|$)")
_RECORD = re.compile(r"^<!-- hf_moe:metadata ([^>]*?) ?-->\n*", re.MULTILINE)
_LANGUAGE = re.compile(r"[a-z]{2,3}(-[A-Za-z0-9]+)*|code|multilingual")
_LICENSE = re.compile(r"[a-z0-9][a-z0-9.+-]*")
_PLAIN_ID = re.compile(r"[A-Za-z0-9][\w.-]*(/[A-Za-z0-9][\w.-]*)?")


class FrontMatterError(ValueError):
    """Metadata that the Hub would not take. The message is one line: field, value, remedy."""


def split_readme(text: str, what: str = "README.md") -> tuple[dict[str, Any], str]:
    """The front matter of a README, and its body.

    Args:
        text: with line feeds only.
        what: its name, for messages.

    Raises:
        FrontMatterError: the front matter is not YAML, or no mapping.
    """
    import yaml

    match = _YAML_BLOCK.match(text) or _EMPTY_BLOCK.match(text)
    if match is None:
        return {}, text
    try:
        fields = yaml.safe_load(match[1]) if match.groups() else {}
    except (yaml.YAMLError, ValueError) as error:  # an impossible date is a ValueError
        reason = " ".join(str(error).split())[:160]
        raise FrontMatterError(f"{what}: its front matter is not YAML ({reason}). Repair it, or remove it.") from error
    if not isinstance(fields or {}, dict):
        raise FrontMatterError(f"{what}: its front matter holds no fields. Write lines such as `license: mit`.")
    return fields or {}, text[match.end() :]


def split_record(body: str) -> tuple[dict[str, str] | None, str]:
    """The digests of the fields that hf_moe wrote, `None` for a README of others; and the body without them."""
    match = _RECORD.search(body)
    if match is None:
        return None, body
    pairs = (entry.partition("=") for entry in match[1].split())
    return {name: digest for name, _, digest in pairs}, body[: match.start()] + body[match.end() :]


def record_of(fields: Mapping[str, Any], gone: Iterable[str] = ()) -> str:
    """The comment that `split_record` reads.

    Args:
        fields: as hf_moe wrote them.
        gone: fields that a person has removed, which shall stay so.
    """
    entries = [f"{name}={_digest(value)}" for name, value in fields.items()] + [f"{name}=-" for name in gone]
    return f"<!-- hf_moe:metadata {' '.join(entries)} -->"


def set_by_person(fields: Mapping[str, Any], record: Mapping[str, str] | None) -> dict[str, Any]:
    """The fields of a README that hf_moe did not write; those that were removed are `None`."""
    known = record or {}
    folders = _folders_of_peft(fields)
    theirs = {n: _mended(n, v, folders) for n, v in fields.items() if known.get(n) != _digest(v) and v not in (None, [], "")}
    return {**{name: None for name in known if name not in fields}, **{n: v for n, v in theirs.items() if v is not None}}


def merge_fields(ours: Mapping[str, Any], theirs: Mapping[str, Any], add_tags: bool) -> dict[str, Any]:
    """A person's fields before ours.

    Args:
        ours: what hf_moe knows.
        theirs: of `set_by_person`.
        add_tags: whether our tags are added to theirs, where there are any.
    """
    merged = {**ours, **theirs}
    if add_tags and theirs.get("tags"):
        merged["tags"] = list(dict.fromkeys([*_as_list(theirs["tags"]), *(ours.get("tags") or [])]))
    if "license" in theirs:  # the name and link of a licence belong to it
        for name in ("license_name", "license_link"):
            if name not in theirs:
                merged.pop(name, None)
    if "base_model" in theirs and "base_model_relation" not in theirs:
        merged.pop("base_model_relation", None)
    return {name: value for name, value in merged.items() if value is not None}


def written_by_peft(fields: Mapping[str, Any]) -> bool:
    """Whether PEFT has put its tags in the place of those that were there."""
    return any(str(tag).startswith("base_model:") for tag in _as_list(fields.get("tags")))


def card_data(fields: Mapping[str, Any], what: str = "README.md") -> ModelCardData:
    """The fields as huggingface_hub has them, checked as far as the Hub's rules are known.

    Raises:
        FrontMatterError: a field is not what the Hub takes.
    """
    from huggingface_hub.repocard_data import ModelCardData

    for name, check in _CHECKS.items():
        for value in _as_list(fields.get(name)):
            remedy = check(value)
            if remedy:
                raise FrontMatterError(f"{what}: `{name}`={value!r} {remedy}")
    try:
        return ModelCardData(**fields)
    except (TypeError, ValueError) as error:
        raise FrontMatterError(f"{what}: {' '.join(str(error).split())[:200]}") from error


def is_repo_id(name: Any) -> bool:
    """Whether a text has the form of a repository's id on the Hub, with its namespace."""
    from huggingface_hub.errors import HFValidationError
    from huggingface_hub.utils import validate_repo_id

    if not isinstance(name, str) or name.count("/") != 1 or not all(name.split("/")) or name.startswith((".", "~")):
        return False
    try:
        validate_repo_id(name)
    except HFValidationError:
        return False
    return True


# ---------------------------------------------------------------------- the Hub's rules


def _check_base_model(value: Any) -> str:
    known = isinstance(value, str) and (is_repo_id(value) or ("/" not in value and bool(_PLAIN_ID.fullmatch(value))))
    return "" if known else "is not the id of a model on the Hub. Give one such as org/model, or leave it out."


def _check_dataset(value: Any) -> str:
    known = isinstance(value, str) and bool(_PLAIN_ID.fullmatch(value))
    return "" if known else "is not the id of a dataset on the Hub. Give one such as org/dataset, or leave it out."


def is_license(value: Any) -> bool:
    """Whether a text has the form of a licence's identifier on the Hub."""
    return isinstance(value, str) and bool(_LICENSE.fullmatch(value))


def _check_license(value: Any) -> str:
    known = isinstance(value, str) and bool(_LICENSE.fullmatch(value))
    return (
        "" if known else "is not an identifier of a licence. Give one in small letters, such as apache-2.0 or mit, or `other`."
    )


def _check_language(value: Any) -> str:
    known = isinstance(value, str) and bool(_LANGUAGE.fullmatch(value))
    return "" if known else "is not the code of a language. Give two or three small letters, such as en or fr."


def _check_text(value: Any) -> str:
    return "" if isinstance(value, str) and value.strip() else "is not a text. Give one, in quotes where YAML needs them."


_CHECKS = {
    "base_model": _check_base_model,
    "datasets": _check_dataset,
    "license": _check_license,
    "language": _check_language,
    "tags": _check_text,
    "library_name": _check_text,
    "pipeline_tag": _check_text,
}


# ---------------------------------------------------------------------- small things


def _mended(name: str, value: Any, folders: Sequence[str]) -> Any:
    """A field as it was meant; `None` where a library has written what no Hub can use.

    Args:
        folders: of this machine, that PEFT has taken for ids of base models.
    """
    if name == "language":  # YAML 1.1 reads the code of Norwegian as false
        return ["no" if v is False else v for v in value] if isinstance(value, list) else "no" if value is False else value
    if name == "base_model":
        usable = [v for v in _as_list(value) if v not in folders and not _check_base_model(v)]
        return (usable if isinstance(value, list) else usable[0]) if usable else None
    if name == "tags":
        return [tag for tag in _as_list(value) if not any(str(tag).endswith(f":{folder}") for folder in folders)]
    if name == "model-index":  # `Trainer` writes one without results
        rows = [row for row in _as_list(value) if not isinstance(row, dict) or row.get("results") != []]
        return rows or None
    return value


def _folders_of_peft(fields: Mapping[str, Any]) -> list[str]:
    """Folders in tags of PEFT such as `base_model:adapter:/home/me/dense`."""
    named = [str(tag).split(":", 2)[2] for tag in _as_list(fields.get("tags")) if re.match("base_model:[a-z]+:", str(tag))]
    return [name for name in named if _check_base_model(name) or Path(name).exists()]


def _as_list(value: Any) -> Sequence[Any]:
    return value if isinstance(value, (list, tuple)) else [] if value is None else [value]


def _digest(value: Any) -> str:
    text = json.dumps(value, sort_keys=True, default=str, ensure_ascii=False)
    return hashlib.blake2b(text.encode(), digest_size=4).hexdigest()
