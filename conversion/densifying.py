# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Densifying: a MoE back to a dense model, with one expert or the average of all of them in the place of each MoE layer.

A layer whose experts are all equal computes `W` times one of them, W being what a token's combine weights sum to, plus its
shared experts. So the down projection is multiplied by W, and shared experts stand beside the expert in one wider FFN: feed-
forward blocks add up when they are put side by side.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedModel
from transformers.core_model_loading import revert_weight_conversion

from hf_moe.auto import MoEConfig
from hf_moe.dense_ffn import FFNSite, find_ffns
from hf_moe.version import __version__

from .checkpoint_reader import CHUNK, Checkpoint, as_torch, json_bytes, open_checkpoint, torch_dtype
from .checkpoint_writer import check_apart, check_destination, write_checkpoint
from .companions import companion_files
from .dense_source import local_folder
from .errors import ConversionError
from .payloads import Computed, Elementwise, OutputTensor, SourceBytes, carried, natural_key
from .pruning import expert_blocks, moe_fields, recorded_load
from .streamed_model import tensor_sources
from .verification import ExactnessReport, verify_checkpoints

REPORT_FILE = "densify_report.json"
# What configs call the width of the FFN.
_WIDTH_FIELDS = ("intermediate_size", "ffn_dim", "n_inner", "ffn_hidden_size", "ffn_hidden_dim", "inner_dim", "d_ff")
_PROJECTIONS = {"gate": "gate_proj", "up": "up_proj", "down": "down_proj"}


@dataclass(frozen=True)
class DensifyResult:
    """What `densify` returns.

    Attributes:
        destination: where the dense checkpoint is.
        report: how far the dense model is from the MoE; `None` if not verified.
    """

    destination: Path
    report: ExactnessReport | None


@dataclass(frozen=True)
class Mixture:
    """`scale · Σ coefficient · tensor` of tensors on disk of one shape; summed up in fp64, rounded once."""

    terms: tuple[tuple[str, float], ...]
    scale: float = 1.0

    def pieces(self, checkpoint: Checkpoint) -> Iterator[Tensor]:
        """The flat result, piece by piece."""
        dtypes = [checkpoint[name].dtype for name, _ in self.terms]
        size = max(CHUNK // len(self.terms), 2**16) // 8 * 8
        for chunks in zip(*(checkpoint.chunks(name, size=size) for name, _ in self.terms), strict=True):
            values = [as_torch(chunk, dtype) for chunk, dtype in zip(chunks, dtypes, strict=True)]
            if len(values) == 1 and self.scale * self.terms[0][1] == 1.0:
                yield values[0]
                continue
            total = torch.zeros(values[0].shape, dtype=torch.float64)
            for value, (_, factor) in zip(values, self.terms, strict=True):
                total.add_(value, alpha=factor)
            yield total.mul_(self.scale)

    def read_into(self, out: Tensor, checkpoint: Checkpoint) -> None:
        """Write the result over `out`, of any strides."""
        if not out.is_contiguous():
            whole = torch.empty(out.shape, dtype=out.dtype)
            self.read_into(whole, checkpoint)
            out.copy_(whole)
            return
        flat, position = out.view(-1), 0
        for piece in self.pieces(checkpoint):
            flat[position : position + len(piece)].copy_(piece)
            position += len(piece)


def densify(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    expert: int | Sequence[int] | None = None,
    average: bool = False,
    load: str | os.PathLike | None = None,
    weights_sum: float | None = None,
    max_shard_size: int = 5 * 10**9,
    verify: bool = True,
    text: list[str] | None = None,
) -> DensifyResult:
    """Turn a MoE of hf_moe back into a dense checkpoint of its `text_config`'s architecture.

    Args:
        source: folder of the MoE checkpoint.
        destination: folder for the dense one, absent or empty.
        expert: which expert every layer keeps, or one number for each MoE layer.
        average: keep the average of the experts instead, weighted by `load`.
        load: `expert_load.safetensors`, recorded by `ExpertLoadCallback` (default: all experts count the same).
        weights_sum: what a token's combine weights sum to (default: what upcycling divided by: the router's constant, or K/E
            where it depends on the token).
        max_shard_size: bytes per weight file.
        verify: compare both models afterwards.
        text: for that (see `verify_checkpoints`).

    Raises:
        ConversionError: the choice does not fit, or a dense model cannot hold what stands beside the experts.
        FileExistsError: `destination` exists and is not empty.
    """
    target = Path(destination)
    check_destination(target)
    check_apart(target, [source])
    checkpoint = open_checkpoint(local_folder(source))
    moe_fields(checkpoint)  # refuses what is none of ours
    config = MoEConfig.from_dict(checkpoint.config)
    shares = _shares(config, expert, average, load)
    if weights_sum is not None and (isinstance(weights_sum, bool) or not weights_sum > 0):
        raise ConversionError(f"`weights_sum`={weights_sum!r} must be a positive number.")
    _refuse_gated_parts(config)
    content, dense = _dense_model(checkpoint, config)
    tensors = _dense_tensors(checkpoint, config, dense, shares, weights_sum)
    reports: list[ExactnessReport] = []

    def finish(folder: Path) -> dict[str, bytes]:
        if not verify:
            return {}
        names = ("MoE", "dense")
        reports.append(verify_checkpoints(checkpoint, folder, moe_config=content, text=text, names=names))
        return {REPORT_FILE: reports[0].to_json().encode() + b"\n"}

    write_checkpoint(
        target,
        tensors,
        {**companion_files(checkpoint.folder), "config.json": json_bytes(content)},
        job=json.dumps(["densify", __version__, checkpoint.identity, shares, weights_sum, max_shard_size, verify]),
        max_shard_size=max_shard_size,
        finish=finish,
        progress="Densifying",
    )
    return DensifyResult(target, reports[0] if reports else None)


def _shares(
    config: MoEConfig, expert: int | Sequence[int] | None, average: bool, load: str | os.PathLike | None
) -> list[list[tuple[int, float]]]:
    """Of each MoE layer, the experts that are used, and the share of each."""
    counts = config.num_experts_per_layer
    if (expert is None) == (not average and load is None):
        raise ConversionError("Give either `expert`, or `average` (with `load` for the weights): one of the two.")
    if expert is None:
        totals = [[1] * count for count in counts] if load is None else recorded_load(load, config)
        return [[(i, n / sum(layer)) for i, n in enumerate(layer) if n] for layer in totals]
    chosen = [expert] * len(counts) if isinstance(expert, int) else list(expert)
    if len(chosen) != len(counts):
        raise ConversionError(f"`expert`={chosen} lists {len(chosen)} experts, but there are {len(counts)} MoE layers.")
    for layer, index, count in zip(config.moe_layers, chosen, counts, strict=True):
        if not isinstance(index, int) or isinstance(index, bool) or not 0 <= index < count:
            raise ConversionError(f"`expert`={index!r} must lie in 0..{count - 1}, the experts of layer {layer}.")
    return [[(index, 1.0)] for index in chosen]


def _refuse_gated_parts(config: MoEConfig) -> None:
    for field, what in (
        ("use_shared_expert_gate", "the shared experts' output is scaled anew for every token"),
        ("residual_moe", "experts and dense half are mixed anew for every token"),
    ):
        if getattr(config, field):
            raise ConversionError(f"`{field}`=True: {what}, which no dense feed-forward block does. It cannot be densified.")


def _dense_model(checkpoint: Checkpoint, config: MoEConfig) -> tuple[dict[str, Any], PreTrainedModel]:
    """The content of the dense config.json, and the model without weights."""
    content = dict(checkpoint.config["text_config"])
    content.setdefault("dtype", checkpoint.config.get("dtype"))
    blocks = expert_blocks(checkpoint, config)
    width = _width(checkpoint, config, next(iter(blocks)))
    dense = _build(content)
    if _widths(dense) != {width}:
        dense = _build_wider(content, config, dense, width)
    content["architectures"] = [type(dense).__name__]
    return content, dense


def _width(checkpoint: Checkpoint, config: MoEConfig, block: str) -> int:
    """What the dense FFN has to be wide: an expert, and the shared experts beside it."""
    width = checkpoint[f"{block}.experts.0.down_proj.weight"].shape[1]
    if config.num_shared_experts:
        width += checkpoint[f"{block}.shared_experts.down_proj.weight"].shape[1]
    return width


def _build(content: dict[str, Any]) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(AutoConfig.for_model(**content))


def _widths(dense: PreTrainedModel) -> set[int]:
    sites = find_ffns(dense, dense.config.get_text_config().num_hidden_layers)
    return {sites[layer].intermediate_size for layer in sites.layers}


def _build_wider(content: dict[str, Any], config: MoEConfig, dense: PreTrainedModel, width: int) -> PreTrainedModel:
    """The model with FFNs of another width; `content` is changed to say so."""
    field = "num_shared_experts" if config.num_shared_experts else "moe_intermediate_size"
    what = f"`{field}`={getattr(config, field)}: the dense feed-forward blocks would be {width} wide"
    if len(config.moe_layers) < config.num_text_layers:
        raise ConversionError(
            f"{what}, but those of the layers that are dense already are {sorted(_widths(dense))}; a dense model has one width."
        )
    for name in _WIDTH_FIELDS:
        if hasattr(dense.config, name):
            wider = _build({**content, name: width})
            if _widths(wider) == {width}:
                content[name] = width
                return wider
    raise ConversionError(f"{what}, but `text_config` ({content.get('model_type')}) has no field for their width.")


# ---------------------------------------------------------------------- tensors


def _dense_tensors(
    checkpoint: Checkpoint,
    config: MoEConfig,
    dense: PreTrainedModel,
    shares: list[list[tuple[int, float]]],
    weights_sum: float | None,
) -> list[OutputTensor]:
    sites = find_ffns(dense, config.num_text_layers)
    blocks = expert_blocks(checkpoint, config)
    tensors: list[OutputTensor] = []
    for (block, layer), chosen, experts in zip(blocks.items(), shares, config.num_experts_per_layer, strict=True):
        constant = config.weights_sum if weights_sum is None else weights_sum
        scale = config.num_experts_per_tok / experts if constant is None else constant
        tensors += _layer_tensors(checkpoint, block, sites[layer], dense, chosen, scale)
    prefixes = tuple(f"{block}." for block in blocks)
    tensors += [carried(checkpoint, name) for name in checkpoint.tensors if not name.startswith(prefixes)]
    return _named_as_saved(checkpoint, dense, tensors)


def _named_as_saved(checkpoint: Checkpoint, dense: PreTrainedModel, tensors: list[OutputTensor]) -> list[OutputTensor]:
    """The tensors by the names that `save_pretrained` of the dense model gives them; every weight of it must be there."""
    state, sources = dense.state_dict(), tensor_sources(dense, [tensor.name for tensor in tensors])
    missing = sorted(set(state) - set(sources))
    if missing:
        raise ConversionError(f"{checkpoint.folder}: nothing in it gives `{missing[0]}` of the dense model.")
    saved = {tensor.name: tensor.name for tensor in tensors}
    for target, names in sources.items():
        reverted = revert_weight_conversion(dense, {target: state[target]})
        if len(names) == len(reverted) == 1 and target not in (dense.all_tied_weights_keys or {}):
            saved[str(names[0])] = next(iter(reverted))
    renamed = [dataclasses.replace(tensor, name=saved[tensor.name]) for tensor in tensors]
    return sorted(renamed, key=lambda tensor: natural_key(tensor.name))


def _layer_tensors(
    checkpoint: Checkpoint,
    block: str,
    site: FFNSite,
    dense: PreTrainedModel,
    chosen: list[tuple[int, float]],
    scale: float,
) -> Iterator[OutputTensor]:
    """The tensors of one dense FFN, in whatever layout its architecture has."""
    parts = {role: _parts(checkpoint, block, site, role, chosen, scale) for role in site.weights(dense)}
    names = {id(parameter): name for name, parameter in dense.named_parameters()}
    places: dict[str, dict[str, Tensor]] = {}  # of each parameter: the views of it by role
    for role, view in site.weights(dense).items():
        base = view if view._base is None else view._base
        if id(base) in names:
            places.setdefault(names[id(base)], {})[role] = view
        else:
            _refuse_other_than_zero(checkpoint, parts[role], role)
    for name, views in places.items():
        yield _place(checkpoint, name, dense.get_parameter(name), views, parts)
    prefix = f"{block}.experts.act_fn."
    for name in checkpoint.tensors:
        if name.startswith(prefix):  # an activation that has weights: all experts share it
            yield carried(checkpoint, name, new_name=f"{site.path}.{site.activation}.{name.removeprefix(prefix)}")


def _parts(
    checkpoint: Checkpoint, block: str, site: FFNSite, role: str, chosen: list[tuple[int, float]], scale: float
) -> list[Mixture]:
    """What a role of the dense FFN consists of: of the experts, and of the shared experts."""
    kind, _, bias = role.partition("_")
    suffix = f"{_PROJECTIONS[kind]}.{bias or 'weight'}"
    plain = "plain_" if kind == "up" and not site.kind.has_gate else ""
    factor = scale if kind == "down" else 1.0
    parts = [Mixture(tuple((f"{block}.experts.{i}.{plain}{suffix}", share) for i, share in chosen), factor)]
    if f"{block}.shared_experts.{suffix}" in checkpoint:
        parts.append(Mixture(((f"{block}.shared_experts.{suffix}", 1.0),)))
    if role == "down_bias" and len(parts) > 1:  # outputs add up
        routed, shared = parts
        terms = tuple((name, share * routed.scale) for name, share in routed.terms)
        return [dataclasses.replace(shared, terms=(*terms, *shared.terms))]
    return parts


def _place(
    checkpoint: Checkpoint, name: str, parameter: Tensor, views: dict[str, Tensor], parts: dict[str, list[Mixture]]
) -> OutputTensor:
    """One parameter of the dense model; its bytes are carried where it is one tensor of one expert."""
    first = next(iter(parts[next(iter(views))])).terms[0][0]
    dtype, shape = checkpoint[first].dtype, tuple(parameter.shape)
    (role, view), *others = views.items()
    only = parts[role][0]
    if not others and view._base is None and len(parts[role]) == 1 and len(only.terms) == 1:
        scale = only.scale * only.terms[0][1]
        source = SourceBytes(checkpoint, first)
        return OutputTensor(name, dtype, shape, source if scale == 1.0 else Elementwise(source, dtype, scale))
    layouts = {role: (tuple(v.shape), v.stride(), v.storage_offset()) for role, v in views.items()}

    def compute() -> Tensor:
        whole = torch.empty(shape, dtype=torch_dtype(dtype))
        for role, layout in layouts.items():
            _fill(torch.as_strided(whole, *layout), role, parts[role], checkpoint)
        return whole

    key = ("densify", name, str(layouts), *(part for role in layouts for part in parts[role]))
    return OutputTensor(name, dtype, shape, Computed(key, compute, shape, dtype))


def _fill(out: Tensor, role: str, parts: list[Mixture], checkpoint: Checkpoint) -> None:
    """Put the parts of a role side by side, along the neurons."""
    dimension, position = (1 if role == "down" else 0), 0
    for part in parts:
        size = checkpoint[part.terms[0][0]].shape[dimension]
        part.read_into(out.narrow(dimension, position, size), checkpoint)
        position += size


def _refuse_other_than_zero(checkpoint: Checkpoint, parts: list[Mixture], role: str) -> None:
    """Experts have biases everywhere or nowhere; one that the dense architecture lacks must be what it was made as, 0."""
    for part in parts:
        if any(piece.count_nonzero() for piece in part.pieces(checkpoint)):
            raise ConversionError(
                f"`{part.terms[0][0]}`: the experts have learned a bias where the dense architecture has none ({role})."
            )
