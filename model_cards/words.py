# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""What the template says of a model: sentences, and the rows of its tables."""

from __future__ import annotations

import re
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .lineage import Stage
from .metadata import CardOptions, licensed_parents, own_tags
from .sections import (
    OURS,
    WHOLE_RUN,
    adapter_rows,
    evaluation_grid,
    exactness_rows,
    load_grid,
    metric_rows,
    parameters,
    ranges,
    routing_rows,
    short,
    size_rows,
    training_rows,
)
from .subject import LOAD_PICTURE, REPORT_PAGE, Subject

_PLACE = "PATH_OR_ID"
_ADAPTERS = {"LORA": "LoRA", "ADALORA": "AdaLoRA", "IA3": "(IA)³"}  # PEFT's names as people write them


def card_context(
    subject: Subject,
    told: CardOptions,
    title: str,
    show_title: bool,
    fields: Mapping[str, Any],
    results: Mapping[str, Any],
) -> dict[str, Any]:
    """The template's variables.

    Args:
        subject, told: what the card is about, and what a person says of it.
        title, show_title: the heading, and whether it is shown.
        fields: of the front matter.
        results: that a person has given, by name.
    """
    run, config = subject.run, subject.config
    before, after = run.evaluations() if run is not None else ({}, {})
    evaluation = evaluation_grid(before, after, results)
    datasets = fields.get("datasets") or []
    load = load_grid(run)
    ours, native = config.get("model_type") == OURS, _is_native(subject)
    base = subject.adapter.base if subject.adapter is not None else None
    return {
        "title": title,
        "show_title": show_title,
        "summary": _summary(subject),
        "license_note": _license_note(subject, fields),
        "lineage": [_sentence(stage) for stage in subject.stages],
        "exactness": [
            {
                "title": _TITLES.get(stage.kind, stage.kind),
                "promise": (stage.promise or "").rstrip("."),
                "rows": exactness_rows(stage),
            }
            for stage in subject.stages
            if stage.kind == "upcycling" or stage.report
        ],
        "recipes": [_recipe(stage.recipe) for stage in subject.stages if stage.recipe],
        "sizes": size_rows(subject),
        "adapter": adapter_rows(subject.adapter.config) if subject.adapter is not None else [],
        "routing": routing_rows(subject),
        "load": load,
        "whole_run": bool(load) and WHOLE_RUN in load[0],
        "metrics": metric_rows(run),
        "load_picture": LOAD_PICTURE if LOAD_PICTURE in subject.pictures else "",
        "pictures": [{"alt": Path(p).stem.replace("_", " "), "path": p} for p in subject.pictures if p != LOAD_PICTURE],
        "report_page": REPORT_PAGE if subject.folder is not None and (subject.folder / REPORT_PAGE).is_file() else "",
        "training": training_rows(run, [datasets] if isinstance(datasets, str) else datasets),
        "evaluation": evaluation,
        "evaluation_names": [row[0] for row in evaluation],
        "usage": "model" if subject.adapter is None else "adapter",
        "is_ours": ours,
        "is_native": native,
        "has_code": subject.has_code,
        "has_tokenizer": subject.has_tokenizer,
        "where": told.repo_id or _PLACE,
        "shell_where": told.repo_id or _PLACE,
        "base_id": (base.hub_id or "PATH_OF_BASE_MODEL") if base is not None else "",
        "versions": list(subject.versions.items()),
    }


def _is_native(subject: Subject) -> bool:
    counts = subject.counts
    return (
        subject.config.get("model_type") != OURS and subject.adapter is None and bool(counts is not None and counts.num_experts)
    )


def _summary(subject: Subject) -> str:
    counts, config = subject.counts, subject.config
    kind = (config.get("text_config") or {}).get("model_type") if config.get("model_type") == OURS else config.get("model_type")
    of_kind = f" (`{kind}`)" if kind else ""
    if counts is None:
        described = "a causal language model"
    elif counts.num_experts:
        each = ", ".join(str(n) for n in sorted(set(counts.num_experts.values())))
        described = (
            f"a Mixture-of-Experts{of_kind} with {parameters(counts)}: {each} experts in decoder layers "
            f"{ranges(counts.num_experts)}"
        )
    else:
        described = f"a causal language model{of_kind} with {parameters(counts)}"
    if subject.adapter is not None:
        adapter = subject.adapter
        described = (
            f"a {_ADAPTERS.get(adapter.kind, adapter.kind)} adapter of {short(adapter.parameters).strip()} parameters for "
            f"{adapter.base.link}, {described}"
        )
    with_us = ", made with [hf_moe](https://pypi.org/project/hf_moe)" if "hf_moe" in own_tags(subject) else ""
    return f"This is {described}{with_us}."


def _license_note(subject: Subject, fields: Mapping[str, Any]) -> str:
    if fields.get("license"):
        return ""
    said = sorted({parent.license.get("license", "none that is stated") for parent in licensed_parents(subject)})
    if len(said) > 1:
        return f"The models that it was made of have different licences ({', '.join(said)}); which holds here is not stated."
    return "No licence is stated in its metadata; see the licence file." if subject.has_licence_file else ""


_TITLES = {
    "upcycling": "Upcycling",
    "import": "Import",
    "export": "Export",
    "conversion": "Conversion",
    "pruning": "Pruning",
    "densifying": "Densifying",
}
_SENTENCES = {
    "upcycling": "Upcycled{method} from {parents}.",
    "import": "Imported{format} from {parents}.",
    "export": "Exported{format} from {parents}.",
    "conversion": "Converted to or from a native format.",
    "pruning": "The least used experts of {parents} were left out.",
    "densifying": "Made dense from {parents}.",
    "training": "Trained{from_parents}{details}.",
    "adapter": "An adapter was made for {parents}.",
}


def _sentence(stage: Stage) -> str:
    names = [parent.link + (f" (licence `{parent.license['license']}`)" if "license" in parent.license else "")
             for parent in stage.parents]  # fmt: skip
    parents = ", ".join(names[:-1]) + f" and {names[-1]}" if len(names) > 1 else names[0] if names else "a model in memory"
    words = {
        "parents": parents,
        "from_parents": f" from {parents}" if names else "",
        "method": f" (method `{stage.method}`)" if stage.method else "",
        "format": f" (format `{stage.format}`)" if stage.format else "",
        "details": f": {stage.details}" if stage.details else "",
    }
    return _SENTENCES.get(stage.kind, f"{stage.kind} of {{parents}}.").format(**words)


def _recipe(text: str) -> dict[str, str]:
    """With a fence that is longer than any run of backticks in it."""
    longest = max((len(run) for run in re.findall(r"`+", text)), default=0)
    return {"fence": "`" * max(3, longest + 1), "text": text.strip()}
