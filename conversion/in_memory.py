# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""A planned Mixture-of-Experts made in memory instead of on disk, in about the memory of its weights.

Weights are read in pieces and put where the model will have them: no tensor of the dense model is held as a whole, and none
of the MoE twice.
"""

from __future__ import annotations

import dataclasses
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor
from tqdm import tqdm
from transformers import GenerationConfig

from hf_moe.auto import MoEConfig, MoEForCausalLM

from .architectures import reason
from .checkpoint_reader import as_torch, json_bytes, open_checkpoint, torch_dtype
from .companions import OUR_CLASS
from .dense_source import local_folder, refuse_quantised
from .errors import ConversionError
from .importing import plan_import
from .native_formats import NATIVE_FORMATS
from .native_plan import dtype_code
from .payloads import OutputTensor
from .recipe import Recipe, read_text
from .streamed_model import NotStreamableError, tensor_sources
from .upcycling import RECIPE_FILE, REPORT_FILE
from .upcycling_plan import plan_upcycling
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
    _plan: Any = field(repr=False)
    _verify: Callable[[MoEForCausalLM], ExactnessReport] | None = field(default=None, repr=False)

    def build(self) -> MoEForCausalLM:
        """The model that `from_pretrained` would load from the written checkpoint, in evaluation mode.

        Raises:
            ConversionError: the source is damaged; or the recipe says `verify`, and the MoE does not compute what the method
                promises.
        """
        model = build_model(self.config, self.tensors)
        if self.companions is not None and (self.companions / _GENERATION_FILE).is_file():
            model.generation_config = GenerationConfig.from_pretrained(self.companions)
        if self._verify is not None:
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
    return PlannedModel(
        plan.config, plan.tensors, plan.source.companions, records, notes, plan, compare if recipe.verify else None
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
    return PlannedModel(plan.config, plan.tensors, folder, records, [f"imported from {plan.format}", *plan.notes], plan)


def build_model(config: Mapping[str, Any], tensors: Sequence[OutputTensor], progress: str = "Loading") -> MoEForCausalLM:
    """The model that `from_pretrained` would load from a checkpoint with these tensors.

    Args:
        config: content of its config.json.
        tensors: by the names that they have on disk.
        progress: what the progress bar says.

    Raises:
        ConversionError: a tensor is missing, or of another shape than the model's.
    """
    moe_config = MoEConfig.from_dict(dict(config))
    with torch.device("meta"):
        empty = MoEForCausalLM(moe_config)
    try:
        state, places = _allocate(empty, tensors)
    except NotStreamableError:  # `from_pretrained` merges or splits more than experts: it needs the tensors as on disk
        places = {t.name: torch.empty(t.nbytes, dtype=torch.uint8).view(torch_dtype(t.dtype)) for t in tensors}
        state = {t.name: places[t.name].view(t.shape) for t in tensors}
    _fill(tensors, places, progress)
    # tensors that have the model's names, shapes and dtypes already are taken as they are, not copied
    model = MoEForCausalLM.from_pretrained(None, config=moe_config, state_dict=state, dtype=moe_config.dtype).eval()
    vars(model).pop("_weight_conversions", None)  # or it would be saved under these names, not under those on disk
    return model


def _allocate(model: MoEForCausalLM, tensors: Sequence[OutputTensor]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """Room for the weights.

    Returns:
        Empty tensors by name in the model; and by name on disk the flat part of them in which a tensor's values belong.
    """
    planned = {tensor.name: tensor for tensor in tensors}
    sources, shapes = tensor_sources(model, planned), {name: value.shape for name, value in model.state_dict().items()}
    missing = sorted(set(shapes) - set(sources))
    if missing:
        raise ConversionError(f"Tensor `{missing[0]}` of the model is not planned ({len(missing)} in all).")
    state: dict[str, Tensor] = {}
    places: dict[str, Tensor] = {}
    for name, source in sources.items():
        experts = source if isinstance(source, list) else [source]
        if experts[0][0] in places:  # tied to another
            continue
        dtype = torch_dtype(planned[experts[0][0]].dtype)
        state[name] = torch.empty(shapes[name], dtype=dtype)
        flat, start = state[name].view(-1), 0
        for part in (planned[part] for expert in experts for part in expert):  # gate and up lie one after the other
            size = part.payload.nbytes // dtype.itemsize
            places[part.name] = flat[start : start + size]
            start += size
        if start != flat.numel():
            raise ConversionError(f"`{name}` has {flat.numel()} values in the model, but {start} are planned.")
    return state, places


def _fill(tensors: Sequence[OutputTensor], places: Mapping[str, Tensor], progress: str) -> None:
    """Read every tensor and put it in its place; equal payloads are read once."""
    groups: dict[Any, list[OutputTensor]] = {}
    for tensor in tensors:
        if tensor.name in places:
            groups.setdefault(tensor.payload, []).append(tensor)
    total = sum(tensor.nbytes for group in groups.values() for tensor in group)
    with tqdm(total=total, desc=progress, unit="B", unit_scale=True, mininterval=0.3, leave=False, disable=None) as bar:
        for payload, group in groups.items():
            start = 0
            for piece in payload.chunks():
                values = as_torch(bytes(piece) if piece.readonly else piece, group[0].dtype)
                for tensor in group:
                    places[tensor.name][start : start + values.numel()].copy_(values)
                    bar.update(len(piece))
                start += values.numel()


__all__ = ["PlannedModel", "build_model", "checkpoint_kind", "plan_imported", "plan_upcycled"]
