# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""The plan of an upcycling: from configs and headers alone, what every tensor of the output is made of."""

from __future__ import annotations

import dataclasses
import hashlib
import json
import logging
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from hf_moe.version import __version__

from .checkpoint_reader import FLOATING, TORCH_NAMES
from .checkpoint_writer import workspace_of
from .companions import OUR_CLASS, same_tokenizer
from .dense_source import DenseSource, open_dense
from .errors import ConversionError
from .ffn_tensors import AveragedFFNReader, FFNReader
from .lazy_weights import LazyWeights
from .methods import Merge, Method, Preservation
from .moe_tensors import ZERO_AT_THE_START, LayerPlan, router_std, starting_router
from .payloads import Averaged, Made, OutputTensor, SourceBytes, carried, natural_key
from .recipe import DTYPES, MOE_FIELDS, PlannedFields, Recipe

if TYPE_CHECKING:
    from transformers import PreTrainedModel


logger = logging.getLogger(__name__)

# What a conversion leaves beside the checkpoint to tell where that comes from.
REPORT_FILE, RECIPE_FILE = "upcycling_report.json", "recipe.yaml"
# Fields of a config in which fine-tunes of one base may differ.
_MAY_DIFFER = ("_name_or_path", "transformers_version", "dtype", "torch_dtype", "use_cache", "auto_map", "bos_token_id",
               "eos_token_id", "pad_token_id", "attention_dropout", "hidden_dropout")  # fmt: skip


@dataclass(frozen=True)
class UpcyclingPlan:
    """All that is known before a tensor is read.

    Attributes:
        recipe: what was asked for.
        source: the dense model that gives config and tokenizer.
        fields: of the `MoEConfig`.
        tensors: of the output, in their order.
        promise: whether the function is kept, and why.
        job: tells this conversion from any other.
        lazy: what of `tensors` depends on whole layers or on text.
    """

    recipe: Recipe
    source: DenseSource
    fields: PlannedFields
    tensors: list[OutputTensor]
    promise: Preservation
    job: str
    lazy: LazyWeights = dataclasses.field(repr=False, compare=False)

    @property
    def config(self) -> dict[str, Any]:
        """The content of the MoE's config.json."""
        fields = {name: getattr(self.fields, name) for name in MOE_FIELDS}
        dtype = _torch_name(self.recipe.dtype, self.tensors)
        text_config = {name: value for name, value in self.source.text_config.items() if name not in ("torch_dtype", "dtype")}
        return {
            **OUR_CLASS,
            "dtype": dtype,
            **fields,
            "text_config": {**text_config, "dtype": dtype},
        }


def plan_upcycling(recipe: Recipe, model: PreTrainedModel | None = None) -> UpcyclingPlan:
    """Plan an upcycling from configs and headers.

    Raises:
        ConversionError, UnsupportedArchitectureError: as `upcycle`.
    """
    method = recipe.make_method()
    opened: dict[str, Any] = {"gguf_file": recipe.gguf_file, "revision": recipe.revision}
    base = open_dense(model if model is not None else recipe.dense_source, **opened)
    branches = [open_dense(source, **opened) for source in recipe.models or []]
    check_branches(base, branches)
    fields = recipe.moe_fields(base.num_layers, warn=logger.warning)
    lazy = LazyWeights(
        recipe, method, base, None if recipe.destination is None else workspace_of(Path(recipe.destination)) / "memo"
    )
    layers, promise = _plan_layers(recipe, method, fields, base, branches, lazy)
    tensors = _all_tensors(recipe, base, branches, layers)
    identity = [source.checkpoint.identity for source in (base, *branches)]
    settled = {name: value for name, value in recipe.to_dict().items() if name not in ("destination", "verify")}
    shapes = [(t.name, t.dtype, t.shape) for t in tensors]
    job = hashlib.blake2b(json.dumps([__version__, settled, identity, shapes]).encode(), digest_size=16).hexdigest()
    return UpcyclingPlan(recipe, base, fields, tensors, promise, job, lazy)


def check_branches(base: DenseSource, branches: Iterable[DenseSource]) -> None:
    """Refuse to merge models that are not fine-tunes of one base.

    Raises:
        ConversionError: configs, tensors or tokenizers differ.
    """
    branches = list(branches)
    for branch in branches:
        first, other = base.text_config, branch.text_config
        differing = sorted(n for n in {*first, *other} if n not in _MAY_DIFFER and first.get(n) != other.get(n))
        if differing:
            name = differing[0]
            raise ConversionError(
                f"`models`: {_where(branch)} has `{name}`={other.get(name)!r}, but {_where(base)} has {first.get(name)!r}. "
                "Merge fine-tunes of one base."
            )
        ours, theirs = ({i.name: (i.dtype, i.shape) for i in s.checkpoint.tensors.values()} for s in (base, branch))
        uneven = sorted(n for n in {*ours, *theirs} if ours.get(n) != theirs.get(n))
        if uneven:
            raise ConversionError(
                f"`models`: tensor `{uneven[0]}` is {theirs.get(uneven[0])} in {_where(branch)}, but {ours.get(uneven[0])} in "
                f"{_where(base)}. Merge fine-tunes of one base, of one dtype."
            )
    folders = [source.companions for source in (base, *branches) if source.companions is not None]
    other_ids = same_tokenizer(folders)
    if other_ids:
        raise ConversionError(f"`models`: the tokenizer of {other_ids[0]} gives other ids than that of {folders[0]}.")


def _where(source: DenseSource) -> str:
    return str(source.companions or "the model in memory")


def _plan_layers(
    recipe: Recipe,
    method: Method,
    fields: PlannedFields,
    base: DenseSource,
    branches: list[DenseSource],
    lazy: LazyWeights,
) -> tuple[dict[int, LayerPlan], Preservation]:
    layers: dict[int, LayerPlan] = {}
    promises = []
    drawn = recipe.router_init != "prompts"
    for index, experts in zip(fields.moe_layers, fields.num_experts_per_layer, strict=True):
        if index not in base.ffns:
            others = [i for i in range(base.num_layers) if i not in base.ffns]
            raise ConversionError(f"Layer {index} has no feed-forward block. Set `mlp_only_layers`={others}.")
        ffn = base.ffns[index]
        method.check(experts, fields.num_experts_per_tok, ffn.intermediate_size, fields.weights_sum, fields.num_shared_experts)
        width = method.expert_width(ffn.intermediate_size, experts)
        if fields.moe_intermediate_size not in (None, width):
            raise ConversionError(
                f"`moe_intermediate_size`={fields.moe_intermediate_size}: `method`={method.name!r} makes experts of width "
                f"{width} of the FFN in layer {index}. Leave it out."
            )
        _check_prompts(recipe, method, fields, experts)
        std = router_std(fields, method, experts, ffn.hidden_size, recipe.router_init, recipe.router_init_std)
        readers = tuple(FFNReader(s.checkpoint, s.ffns[index]) for s in branches or [base])
        layers[index] = LayerPlan(
            ffn=ffn,
            readers=readers,
            beside=AveragedFFNReader(readers) if _averages(recipe) else FFNReader(base.checkpoint, ffn),
            fields=fields,
            num_experts=experts,
            method=method,
            weight=lazy.expert_weight,
            router_rows=None if drawn or fields.router_type == "hash" else lazy.router_rows,
            router_std=std,
            seed=recipe.seed,
            dtype=DTYPES[recipe.dtype],
        )
        promises.append(layers[index].promise(starting_router(fields, std, drawn)))
    lazy.set_layers(layers)
    _set_width(fields, method, layers)
    return layers, next((promise for promise in promises if not promise.exact), promises[0])


def _check_prompts(recipe: Recipe, method: Method, fields: PlannedFields, num_experts: int) -> None:
    """Refuse a start of the router that the layer's router does not have."""
    if fields.router_type == "hash" and recipe.router_init == "prompts":
        raise ConversionError("`router_init`='prompts': a hash router has no weights. Leave it out, or choose another router.")
    if recipe.router_init_std is not None and fields.router_type in ("hash", *ZERO_AT_THE_START):
        raise ConversionError(
            f"`router_init_std`={recipe.router_init_std}: nothing is drawn for `router_type`={fields.router_type!r}. Leave "
            "it out."
        )
    lists, rows = len(recipe.router_prompts or []), method.num_router_rows(num_experts)
    if lists and lists != rows:
        raise ConversionError(f"`router_prompts` has {lists} lists, but {rows} are needed, one for each router row.")


def _set_width(fields: PlannedFields, method: Method, layers: dict[int, LayerPlan]) -> None:
    """Say in the config how wide experts are, where it is not the dense width."""
    widths = sorted({plan.width for plan in layers.values()})
    dense = {plan.ffn.intermediate_size for plan in layers.values()}
    if dense == set(widths):
        return
    if len(widths) > 1:
        raise ConversionError(
            f"`method`={method.name!r} makes experts of widths {widths}, but a MoE of hf_moe has one. Convert layers of one "
            "width (`layers`), or give `num_experts` as one number."
        )
    fields.moe_intermediate_size = widths[0]


def _all_tensors(
    recipe: Recipe, base: DenseSource, branches: list[DenseSource], layers: dict[int, LayerPlan]
) -> list[OutputTensor]:
    """Every tensor of the output: a layer's experts stand where its dense FFN stood."""
    owner = {name: index for index, plan in layers.items() for name in plan.ffn.names}
    dtype = DTYPES[recipe.dtype]
    averaged = _averages(recipe)
    tensors: list[OutputTensor] = []
    placed = set()
    for name in sorted(base.names, key=natural_key):
        if name not in owner:
            whole = carried(base.checkpoint, name, dtype, base.names[name])
            tensors.append(_averaged(whole, [b.checkpoint for b in branches], name) if averaged else whole)
        elif owner[name] not in placed:
            placed.add(owner[name])
            tensors += layers[owner[name]].tensors()
    return tensors


def _averages(recipe: Recipe) -> bool:
    """Whether all but the experts is averaged over the `models`."""
    method = recipe.make_method()
    return isinstance(method, Merge) and method.rest == "average"


def _averaged(tensor: OutputTensor, checkpoints: list[Any], name: str) -> OutputTensor:
    if tensor.dtype not in FLOATING:
        return tensor
    return dataclasses.replace(tensor, payload=Averaged(tuple(SourceBytes(c, name) for c in checkpoints), tensor.dtype))


def _torch_name(dtype: str, tensors: Iterable[OutputTensor]) -> str:
    """The dtype of most of the output, as torch calls it."""
    if dtype != "auto":
        return dtype
    sizes: dict[str, int] = {}
    for tensor in tensors:
        if tensor.dtype in FLOATING and not isinstance(tensor.payload, Made):
            sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return TORCH_NAMES[max(sizes, key=lambda k: sizes[k])]
