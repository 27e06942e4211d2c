# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""The card that a converter writes beside the weights. Needs no torch."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from typing import Any, Protocol

from .checkpoint import DTYPES, TensorHeader
from .lineage import Stage, measured
from .metadata import CardOptions
from .rendering import fill
from .subject import describe_tensors


class WrittenTensor(Protocol):
    """A tensor of the output; `dtype` is safetensors' name."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...

    @property
    def dtype(self) -> str: ...

    @property
    def nbytes(self) -> int: ...


def conversion_card(
    name: str,
    config: Mapping[str, Any],
    tensors: Iterable[WrittenTensor],
    *,
    kind: str,
    report: Mapping[str, Any],
    method: str | None = None,
    recipe: str | None = None,
    files: Iterable[str] = (),
) -> str:
    """The text of README.md for a checkpoint that was converted.

    Args:
        name: of its folder.
        config: content of its config.json.
        tensors: that it has.
        kind: of `Stage`, e.g. `"upcycling"`.
        report: content of its report: `parents` (see `describe_parent`), `promise`, `format`, and what was measured.
        method: how the experts of an upcycling were made.
        recipe: of an upcycling, as YAML.
        files: names of the files that go along.
    """
    said = {field: report.get(field) for field in ("parents", "promise", "format")}
    stage = Stage.from_dict({**said, "kind": kind, "method": method, "recipe": recipe, "report": measured(report)})
    headers = [TensorHeader(t.name, t.shape, DTYPES.get(t.dtype, t.dtype), t.nbytes) for t in tensors]
    names = list(files)
    subject = describe_tensors(
        name,
        config,
        headers,
        [stage],
        has_tokenizer=any(file.startswith("tokenizer") for file in names),
        has_licence_file=any(file.startswith(("LICENSE", "LICENCE")) for file in names),
    )
    return fill(subject, CardOptions())
