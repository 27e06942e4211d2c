# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""A planned Mixture-of-Experts made in memory instead of on disk, in about the memory of its weights.

Transformers loads it as it loads a checkpoint, from tensors that are computed when they are asked for (see `lazy_tensors`):
none of the MoE is held twice, and of a model that is sharded over ranks each computes its shard alone.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Literal

import torch
import torch.distributed as dist
from transformers import GenerationConfig
from transformers.utils import logging as transformers_logging

from hf_moe.auto import MoEConfig, MoEForCausalLM

from .architectures import reason
from .checkpoint_reader import json_bytes, open_checkpoint
from .companions import OUR_CLASS
from .dense_source import local_folder, refuse_quantised
from .errors import ConversionError
from .importing import plan_import
from .lazy_tensors import lazy_state_dict
from .lazy_weights import LazyWeights
from .native_formats import NATIVE_FORMATS
from .native_plan import dtype_code
from .payloads import OutputTensor
from .recipe import Recipe, read_text
from .upcycling_plan import RECIPE_FILE, REPORT_FILE, UpcyclingPlan, plan_upcycling
from .verification import ExactnessReport, verify_checkpoints

_GENERATION_FILE = "generation_config.json"


@dataclass(frozen=True)
class PlannedModel:
    """A MoE that can be made in memory; all that can be wrong with it but damaged weights has been found.

    Attributes:
        config: content of its config.json.
        tensors: what its weights are made of.
        companions: folder with the source's tokenizer and the like, or `None`.
        records: files that tell where it comes from, as the conversions that write a checkpoint leave them beside it.
        notes: what is worth saying about it, a sentence each.
    """

    config: dict[str, Any]
    tensors: Sequence[OutputTensor]
    companions: Path | None
    records: dict[str, bytes]
    notes: list[str]
    _build: Callable[..., MoEForCausalLM] = field(repr=False)
    _verify: Callable[[MoEForCausalLM], ExactnessReport] | None = field(default=None, repr=False)

    def build(self, **kwargs: Any) -> MoEForCausalLM:
        """The model that `from_pretrained` would load from the written checkpoint, in evaluation mode.

        Args:
            kwargs: arguments of `from_pretrained`. With a `distributed_config`, called on every rank, each has its shard.

        Raises:
            ConversionError: the source is damaged; or the recipe says `verify`, and the MoE does not compute what the method
                promises.
        """
        model = self._build(**kwargs)
        if self.companions is not None and (self.companions / _GENERATION_FILE).is_file():
            model.generation_config = GenerationConfig.from_pretrained(self.companions)
        if self._verify is not None and model.is_distributed_loading_by_transformers:
            self.notes.append("not compared with the dense model: no rank has all of it")
        elif self._verify is not None:
            report = self._verify(model)
            self.notes.append(str(report))
            if not math.isfinite(report.max_abs_diff) or (report.expected_exact and not report.exact):
                raise ConversionError(report.verdict)
        return model


def checkpoint_kind(config: Mapping[str, Any]) -> Literal["ours", "native", "moe", "dense"]:
    """What a config.json is of: a MoE of hf_moe, a native one that can be imported, one that cannot, or none."""
    model_type = str(config.get("model_type"))
    if model_type == OUR_CLASS["model_type"]:
        return "ours"
    if model_type in NATIVE_FORMATS:
        return "native"
    why = reason(model_type)
    return "moe" if why is not None and why[0] == "moe" else "dense"


def plan_upcycled(recipe: Recipe) -> PlannedModel:
    """Plan what `upcycle` would write, bit by bit, as a model. `recipe.destination` is not looked at.

    Raises:
        ConversionError, UnsupportedArchitectureError: as `upcycle`.
    """
    from hf_moe.model_cards import describe_parent

    plan = plan_upcycling(dataclasses.replace(recipe, destination=None))
    sources = [*(recipe.models or []), *([] if recipe.source is None else [recipe.source])]
    homes = {recipe.source: plan.source.companions}
    parents = [describe_parent(source, homes.get(source)) for source in dict.fromkeys(sources)]
    records = {
        RECIPE_FILE: recipe.to_yaml().encode(),
        REPORT_FILE: json_bytes({"promise": str(plan.promise), "parents": parents, "job": plan.job}),
    }

    def compare(model: MoEForCausalLM) -> ExactnessReport:
        return verify_checkpoints(
            plan.source.model or plan.source.checkpoint,
            model,
            tokenizer=plan.source.companions,
            text=read_text(recipe.text),
            expected_exact=plan.promise.exact,
        )

    notes = [f"promised: {plan.promise}"]
    build = partial(build_upcycled, plan)
    return PlannedModel(
        plan.config, plan.tensors, plan.source.companions, records, notes, build, compare if recipe.verify else None
    )


def plan_imported(source: str | os.PathLike, dtype: str | None = None) -> PlannedModel:
    """Plan what `import_moe` would write, bit by bit, as a model.

    Args:
        source: folder or Hub id of a native MoE checkpoint.
        dtype: of the weights but routers (`"float32"`, `"bfloat16"`, `"float16"`; default: as they are).

    Raises:
        ConversionError: as `import_moe`.
    """
    from hf_moe.model_cards import describe_parent

    code = dtype_code(dtype)
    folder = local_folder(source)
    checkpoint = open_checkpoint(folder)
    refuse_quantised(checkpoint.config, str(folder))
    plan = plan_import(checkpoint, code)
    report = {"kind": "import", "format": plan.format, "parents": [describe_parent(source, folder)]}
    records = {"conversion_report.json": json_bytes(report)}
    build = partial(build_model, plan.config, plan.tensors)
    return PlannedModel(plan.config, plan.tensors, folder, records, [f"imported from {plan.format}", *plan.notes], build)


def build_upcycled(plan: UpcyclingPlan, **kwargs: Any) -> MoEForCausalLM:
    """The model of a plan. What depends on whole layers or on text is computed by one rank, for all to have the same.

    Args:
        plan: the same on every rank.
        kwargs: as of `build_model`.

    Raises:
        ConversionError: as `build_model`; or calibration failed.
    """
    if plan.lazy.needs_settling:
        _settle(plan.lazy, kwargs.get("distributed_config"))
    model = build_model(plan.config, plan.tensors, **kwargs)
    if plan.source.model is not None and plan.source.model.can_generate():
        model.generation_config = plan.source.model.generation_config
    return model


def build_model(config: Mapping[str, Any], tensors: Sequence[OutputTensor], **kwargs: Any) -> MoEForCausalLM:
    """The model that `from_pretrained` would load from a checkpoint with these tensors.

    Args:
        config: content of its config.json.
        tensors: by the names that they have on disk.
        kwargs: arguments of `from_pretrained`, e.g. `dtype`, `attn_implementation`, `distributed_config`.

    Raises:
        ConversionError: a tensor is missing, or of another shape than the model's; or the source is damaged.
    """
    moe_config = MoEConfig.from_dict(dict(config))
    wanted = kwargs.pop("dtype", None)
    if wanted in (None, "auto"):
        wanted = moe_config.dtype
    dtype: torch.dtype = getattr(torch, wanted) if isinstance(wanted, str) else wanted
    ep_size = getattr(kwargs.get("distributed_config"), "ep_size", None) or 1
    state: Any = lazy_state_dict(moe_config, tensors, dtype, ep_size)
    with _progress_on_one_rank():
        model = MoEForCausalLM.from_pretrained(None, config=moe_config, state_dict=state, dtype=dtype, **kwargs).eval()
    vars(model).pop("_weight_conversions", None)  # or it would be saved under these names, not under those on disk
    return model


def _settle(lazy: LazyWeights, distributed_config: Any) -> None:
    """Have calibration done: by the first rank of a sharded model for all, since its last bits depend on the machine."""
    if distributed_config is not None and not dist.is_initialized():
        MoEForCausalLM.prepare_distribute_model(distributed_config)  # joins the process group, as loading would
    if distributed_config is None or not dist.is_initialized():
        lazy.settle()
        return
    told: list[Any] = [None, None]  # what was computed, or why it was not
    failure: Exception | None = None
    if dist.get_rank() == 0:
        try:
            told[0] = lazy.settle()
        except Exception as error:  # the others wait: they must hear of any
            failure, told[1] = error, f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(told, src=0)
    if told[1] is not None:
        raise failure or ConversionError(f"On rank 0: {told[1]}")
    lazy.adopt(told[0])


@contextmanager
def _progress_on_one_rank() -> Iterator[None]:
    """Transformers' progress bars on the first rank of a run alone."""
    if int(os.environ.get("RANK", "0")) == 0 or not transformers_logging.is_progress_bar_enabled():
        yield
        return
    transformers_logging.disable_progress_bar()
    try:
        yield
    finally:
        transformers_logging.enable_progress_bar()


__all__ = ["PlannedModel", "build_model", "build_upcycled", "checkpoint_kind", "plan_imported", "plan_upcycled"]
