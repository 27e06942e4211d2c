# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""The metadata of a card: what files tell, and what a person says."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .front_matter import is_repo_id
from .lineage import Parent, common_license
from .sections import OURS
from .subject import Subject

if TYPE_CHECKING:
    from huggingface_hub import EvalResult


@dataclass(frozen=True, kw_only=True)
class CardOptions:
    """What only a person knows. What is given counts more than an existing README's front matter, and that more than files.

    Attributes:
        repo_id: where the model will be on the Hub, for the lines that load it.
        title: the heading (default: the repository's or folder's name).
        license, license_name, license_link: the licence's identifier on the Hub (`apache-2.0`; `other` with a name and a link).
            Default: the parents', where they all have the same. It is never guessed.
        language: codes such as `en`.
        datasets: ids on the Hub of the training data.
        tags: added to hf_moe's own.
        base_model: ids on the Hub of the parents, where files do not tell.
        pipeline_tag: the task.
        eval_results: numbers by name, e.g. `{"perplexity": 12.3}`, or `EvalResult`s of huggingface_hub.
    """

    repo_id: str | None = None
    title: str | None = None
    license: str | None = None
    license_name: str | None = None
    license_link: str | None = None
    language: str | Sequence[str] | None = None
    datasets: str | Sequence[str] | None = None
    tags: str | Sequence[str] | None = None
    base_model: str | Sequence[str] | None = None
    pipeline_tag: str | None = None
    eval_results: Mapping[str, float] | Sequence[EvalResult] | None = None


def said_fields(told: CardOptions) -> dict[str, Any]:
    """Options that are fields of the front matter as they are."""
    names = ("license", "license_name", "license_link", "language", "datasets", "base_model", "pipeline_tag")
    said = {name: getattr(told, name) for name in names if getattr(told, name) is not None}
    return {name: list(value) if isinstance(value, (tuple, set)) else value for name, value in said.items()}


def known_fields(subject: Subject, told: CardOptions, title: str, with_results: bool) -> dict[str, Any]:
    ids = hub_parents(subject)
    tags = [told.tags] if isinstance(told.tags, str) else list(told.tags or [])
    results = _eval_results(subject, told) if with_results else []
    return {
        **{name: value for name, value in common_license(licensed_parents(subject)).items() if value},
        "library_name": "peft" if subject.adapter is not None else "transformers",
        "pipeline_tag": "text-generation",
        "base_model": (ids if len(ids) > 1 else ids[0]) if ids else None,
        "base_model_relation": _relation(subject, ids),
        "datasets": _datasets(subject) or None,
        "tags": list(dict.fromkeys([*own_tags(subject), *tags])),
        **({"model_name": title, "eval_results": results} if results else {}),
    }


def hub_parents(subject: Subject) -> list[str]:
    """Ids on the Hub of the nearest stage that has any."""
    for stage in reversed(subject.stages):
        ids = [parent.hub_id for parent in stage.parents if parent.hub_id is not None]
        if ids:
            return list(dict.fromkeys(ids))
    return []


def licensed_parents(subject: Subject) -> Sequence[Parent]:
    """The parents of the nearest stage of which one tells its licence."""
    for stage in reversed(subject.stages):
        if any(parent.license for parent in stage.parents):
            return stage.parents
    return ()


def _relation(subject: Subject, ids: Sequence[str]) -> str | None:
    """How the Hub calls what was done to the base model."""
    if not ids:
        return None
    if subject.adapter is not None and subject.adapter.base.hub_id in ids:
        return "adapter"
    return "merge" if len(ids) > 1 else "finetune"


def _datasets(subject: Subject) -> list[str]:
    name = None if subject.run is None else subject.run.options.get("dataset_name")
    return [name] if isinstance(name, str) and is_repo_id(name) and not Path(name).exists() else []


def own_tags(subject: Subject) -> list[str]:
    kinds = {stage.kind for stage in subject.stages}
    is_moe = subject.counts is not None and bool(subject.counts.num_experts)
    tags = {
        "hf_moe": subject.config.get("model_type") == OURS or bool(kinds & {"upcycling", "import", "export", "pruning"}),
        "moe": is_moe,
        "mixture-of-experts": is_moe,
        "upcycled": "upcycling" in kinds,
        "merge": any(stage.method == "merge" for stage in subject.stages),
        "lora": subject.adapter is not None and subject.adapter.kind.upper() == "LORA",
    }
    return [tag for tag, holds in tags.items() if holds]


def _eval_results(subject: Subject, told: CardOptions) -> list[EvalResult]:
    from huggingface_hub.repocard_data import EvalResult

    given = told.eval_results
    if given is not None and not isinstance(given, Mapping):
        return list(given)
    after = subject.run.evaluations()[1] if subject.run is not None else {}
    values = {**{n: v for n, v in after.items() if n in ("loss", "perplexity", "accuracy")}, **(given or {})}
    datasets = [told.datasets] if isinstance(told.datasets, str) else list(told.datasets or _datasets(subject))
    held_out = None if subject.run is None else subject.run.options.get("eval_file")
    shown = datasets[0] if datasets else Path(held_out).name if isinstance(held_out, str) else "held-out data"
    kind = datasets[0] if datasets else "text"
    return [
        EvalResult(task_type="text-generation", task_name="Causal language modelling", dataset_type=kind, dataset_name=shown,
                   metric_type=name, metric_name=name, metric_value=round(float(value), 6))
        for name, value in values.items()
        if math.isfinite(value)
    ]  # fmt: skip
