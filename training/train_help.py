# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""`hf-moe train --help` without torch: the options of dataclasses that need it are read from their source text."""

from __future__ import annotations

import ast
import dataclasses
import textwrap
from collections.abc import Iterable
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from .arguments import DataArguments, ModelArguments

_Option = tuple[str, str, Any]  # name, help, default


def train_help(description: str, upcycle_fields: Iterable[tuple[str, Any, Any]]) -> str:
    """The whole text.

    Args:
        description: the module's docstring.
        upcycle_fields: name, type and field of the options of upcycling.
    """
    here = Path(__file__).parent
    spec = find_spec("transformers")
    assert spec is not None
    assert spec.origin is not None
    ours = {
        name: (text, default)
        for file, kind in (
            ("parallel_arguments.py", "ExpertParallelArguments"),
            ("trainer.py", "MoETrainingArguments"),
            ("command_line.py", "FinetuneArguments"),
        )
        for name, text, default in _in_source(here / file, kind)
    }
    theirs = _in_source(Path(spec.origin).parent / "training_args.py", "TrainingArguments")
    groups: dict[str, list[_Option]] = {
        "model": _of(ModelArguments),
        "upcycling (values are YAML; see also hf-moe upcycle --help)": [
            (name, item.metadata["help"], None) for name, _, item in upcycle_fields
        ],
        "data": _of(DataArguments),
        "training": [(name, *ours[name]) for name in ours],
        "training: the TrainingArguments of Transformers": [option for option in theirs if option[0] not in ours],
    }
    parts = [description.strip()]
    for title, options in groups.items():
        parts += [f"{title}:\n" + "\n".join(_line(*option) for option in options)]
    return "\n\n".join(parts)


def _of(kind: Any) -> list[_Option]:
    return [
        (f.name, f.metadata["help"], ... if f.default is dataclasses.MISSING else f.default) for f in dataclasses.fields(kind)
    ]


def _in_source(path: Path, kind: str) -> list[_Option]:
    """The fields of a dataclass in a file, with their help."""
    tree = ast.parse(path.read_text(encoding="utf-8"))
    body = next(node.body for node in tree.body if isinstance(node, ast.ClassDef) and node.name == kind)
    found: list[_Option] = []
    for node in body:
        if not isinstance(node, ast.AnnAssign) or not isinstance(node.target, ast.Name) or node.target.id.startswith("_"):
            continue
        words = {w.arg: w.value for w in node.value.keywords} if isinstance(node.value, ast.Call) else {"default": node.value}
        found.append((node.target.id, _help_in(words.get("metadata")), _default_in(words)))
    return found


def _help_in(node: Any) -> str:
    pairs = zip(node.keys, node.values, strict=True) if isinstance(node, ast.Dict) else []
    for key, value in pairs:
        if isinstance(key, ast.Constant) and key.value == "help" and isinstance(value, ast.Constant):
            return str(value.value)
    return ""


def _default_in(words: dict[Any, Any]) -> Any:
    node = words.get("default")
    if node is None:
        return ... if "default_factory" not in words else None
    return node.value if isinstance(node, ast.Constant) else None


def _line(name: str, text: str, default: Any) -> str:
    said = " ".join(text.replace("%%", "%").split())
    shown = " (required)" if default is ... else "" if default is None or "default:" in said else f" (default: {default})"
    return textwrap.fill(f"{said}{shown}", 120, initial_indent=f"  --{name}  ", subsequent_indent=" " * 6)
