# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Upcycling (Komatsuzaki et al. 2022, arXiv:2212.05055): a dense model in, a Mixture-of-Experts out.

`plan_upcycling` says from config and headers alone what every tensor of the output is made of; `upcycle` has the plan
written, or put into a model in memory.
"""

from __future__ import annotations

import dataclasses
import os
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint_reader import json_bytes, read_json
from .checkpoint_writer import check_apart, check_destination, remove_leftovers, write_checkpoint
from .companions import code_files, companion_files
from .errors import ConversionError
from .methods import Preservation
from .recipe import MOE_FIELDS, Recipe, read_text
from .upcycling_plan import RECIPE_FILE, REPORT_FILE, UpcyclingPlan, plan_upcycling

if TYPE_CHECKING:
    from transformers import PreTrainedModel

    from hf_moe.configuration_moe import MoEConfig
    from hf_moe.modeling_moe import MoEForCausalLM

    from .verification import ExactnessReport


@dataclass
class UpcyclingResult:
    """What `upcycle` returns.

    Attributes:
        destination: where the checkpoint is; `None` if it was made in memory only.
        report: how exactly it computes what the dense model computes; `None` if not verified.
        promise: what the method promises about that.
    """

    destination: Path | None
    report: ExactnessReport | None
    promise: Preservation
    _model: MoEForCausalLM | None = field(default=None, repr=False)

    @cached_property
    def model(self) -> MoEForCausalLM:
        """The MoE, in evaluation mode; loaded when it is first asked for."""
        if self._model is not None:
            return self._model
        from hf_moe.auto import MoEForCausalLM

        return MoEForCausalLM.from_pretrained(self.destination, dtype="auto").eval()


def upcycle(
    source: str | os.PathLike | PreTrainedModel | None = None,
    destination: str | os.PathLike | None = None,
    *,
    config: MoEConfig | None = None,
    recipe: str | os.PathLike | None = None,
    **fields: Any,
) -> UpcyclingResult:
    """Turn a dense causal LM into a Mixture-of-Experts.

    Args:
        source: a folder or Hub id of a dense checkpoint, or a dense model in memory.
        destination: folder for the MoE checkpoint, tokenizer and all; `None` to make it in memory.
        config: what to build; or its fields as keywords.
        recipe: a YAML file with any of the following.
        fields: fields of `Recipe` (`method="copy"`, `preset`, `router_init`, `seed`, `dtype`, `verify`, `text`, …), options of
            the method (`std`, `ratio`, `granularity`, `scale`, `assignment`, `rest`) and fields of `MoEConfig`
            (`num_experts=8`, `num_experts_per_tok=2`, `router_type`, `num_shared_experts`, …).

    Raises:
        ConversionError (a `ValueError`): recipe and source do not fit, or the source is damaged.
        UnsupportedArchitectureError: the source has no FFN that could be replaced.
        FileExistsError: `destination` exists and is not empty.

    Example:
        >>> from transformers import LlamaConfig, LlamaForCausalLM
        >>> dense = LlamaForCausalLM(LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, vocab_size=256))
        >>> upcycle(dense, num_experts=4).report.exact
        True
    """
    if config is not None:
        given = sorted(set(fields) & {*MOE_FIELDS, "preset"})
        if given:
            raise ConversionError(f"Give `config`, or `preset` and fields ({', '.join(given)}), not both.")
        fields |= {name: getattr(config, name) for name in MOE_FIELDS}
    model: PreTrainedModel | None = None
    if isinstance(source, (str, os.PathLike)):
        fields["source"] = os.fspath(source)
    else:
        model = source
    if destination is not None:
        fields["destination"] = os.fspath(destination)
    made = Recipe.read(recipe, **fields) if recipe is not None else Recipe.from_dict(fields)
    return run_recipe(made, model)


def upcycle_model(dense: PreTrainedModel, config: MoEConfig, **fields: Any) -> MoEForCausalLM:
    """The MoE of `config` made of a dense model in memory, unverified. `dense` is left as it is and shares no memory."""
    return upcycle(dense, config=config, verify=False, **fields).model


def run_recipe(recipe: Recipe, model: PreTrainedModel | None = None) -> UpcyclingResult:
    """Do what a recipe says; `model` in the place of its source, if given."""
    destination = None if recipe.destination is None else Path(recipe.destination)
    if destination is not None:
        check_apart(destination, [source for source in (recipe.source, *(recipe.models or [])) if source is not None])
    text = read_text(recipe.text)
    plan = plan_upcycling(recipe, model)
    if destination is None:
        from .in_memory import build_upcycled

        moe = build_upcycled(plan)
        return UpcyclingResult(None, _verify(plan, moe, text) if recipe.verify else None, plan.promise, moe)
    finished = _finished_report(destination, plan.job, recipe.verify)
    if finished is not None:
        remove_leftovers(destination)
    else:
        check_destination(destination)
        files: dict[str, bytes | Path] = {
            **companion_files(plan.source.companions),
            **_files_of_model(plan.source.model),
            **code_files(),
        }
        files |= {RECIPE_FILE: recipe.to_yaml().encode(), "config.json": json_bytes(plan.config)}
        write_checkpoint(
            destination,
            plan.tensors,
            files,
            job=plan.job,
            max_shard_size=recipe.shard_bytes,
            finish=lambda folder: _reports(plan, folder, text),
            progress="Upcycling",
        )
        finished = read_json(destination / REPORT_FILE)
    return UpcyclingResult(destination, _report_of(finished), plan.promise)


# ---------------------------------------------------------------------- writing


def _reports(plan: UpcyclingPlan, folder: Path, text: list[str] | None) -> dict[str, bytes]:
    """Compare what was written with the dense model; the report and the model card."""
    from hf_moe.model_cards import conversion_card, describe_parent

    recipe, source = plan.recipe, plan.source
    report = _verify(plan, folder, text) if recipe.verify else None
    measured: dict[str, Any] = {} if report is None else {**dataclasses.asdict(report), "verdict": report.verdict}
    bases = [] if source.model is None and recipe.source is None else [source.model or recipe.source]
    homes = {recipe.source: source.companions} if source.model is None else {}
    parents = [describe_parent(parent, homes.get(parent)) for parent in dict.fromkeys([*(recipe.models or []), *bases])]
    content = {**measured, "promise": str(plan.promise), "parents": parents, "job": plan.job}
    card = conversion_card(
        Path(recipe.destination or folder).name,
        plan.config,
        plan.tensors,
        kind="upcycling",
        report=content,
        method=recipe.method,
        recipe=recipe.to_yaml(),
        files=[path.name for path in folder.iterdir()],
    )
    return {REPORT_FILE: json_bytes(content), "README.md": card.encode()}


def _verify(plan: UpcyclingPlan, moe: Any, text: list[str] | None) -> ExactnessReport:
    from .verification import verify_checkpoints

    return verify_checkpoints(
        plan.source.model or plan.source.checkpoint,
        moe,
        moe_config=plan.config,
        tokenizer=plan.source.companions,
        text=text,
        expected_exact=plan.promise.exact,
    )


def _report_of(content: dict[str, Any]) -> ExactnessReport | None:
    if "exact" not in content:
        return None
    from .verification import ExactnessReport

    names = [field.name for field in dataclasses.fields(ExactnessReport)]
    return ExactnessReport(**{name: content[name] for name in names})


def _finished_report(destination: Path, job: str, verified: bool) -> dict[str, Any] | None:
    """The report of a destination that this very job has written already (its process was stopped just after)."""
    path = destination / REPORT_FILE
    report = read_json(path) if path.is_file() and (destination / "config.json").is_file() else {}
    return report if report.get("job") == job and ("exact" in report or not verified) else None


def _files_of_model(model: Any) -> dict[str, bytes]:
    if model is None or not model.can_generate():
        return {}
    return {"generation_config.json": model.generation_config.to_json_string().encode()}
