# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Pruning: the experts that training used least are left out of every layer, and with them their rows of the router."""

from __future__ import annotations

import json
import os
import re
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING

from hf_moe.expert_load import read_expert_load
from hf_moe.moe_fields import MoEFields
from hf_moe.version import __version__

from .architectures import lookup
from .checkpoint_reader import Checkpoint, json_bytes, open_checkpoint
from .checkpoint_writer import check_apart, check_destination, write_checkpoint
from .companions import code_files, companion_files
from .dense_source import local_folder
from .errors import ConversionError, one_line
from .payloads import Joined, OutputTensor, SourceBytes, carried, natural_key
from .recipe import MOE_FIELDS, PlannedFields

if TYPE_CHECKING:
    from .verification import ExactnessReport

REPORT_FILE = "prune_report.json"
# Why a router cannot do with fewer experts.
_UNFIT_ROUTERS = {
    "hash": "it sends tokens to experts by a fixed hash, which would send all of them elsewhere",
    "hierarchical": "its experts lie in groups of equal size",
    "expert_choice": "how many experts a token gets depends on their number",
    "strictly_balanced": "its thresholds were learned for the probabilities over all experts",
}
_EXPERT = re.compile(r"(.*)\.experts\.(\d+)\.(.+)")


@dataclass(frozen=True)
class PruneResult:
    """What `prune` returns.

    Attributes:
        destination: where the checkpoint is.
        kept: by decoder layer, the experts that were kept, by their index in the source.
        report: how far the pruned MoE is from the source; `None` if not verified.
    """

    destination: Path
    kept: dict[int, list[int]]
    report: ExactnessReport | None


def prune(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    *,
    load: str | os.PathLike,
    keep: int,
    max_shard_size: int = 5 * 10**9,
    verify: bool = True,
    text: list[str] | None = None,
) -> PruneResult:
    """Leave the least used experts out.

    Args:
        source: folder of a MoE checkpoint of hf_moe.
        destination: folder for the pruned one, absent or empty.
        load: `expert_load.safetensors`, recorded by `ExpertLoadCallback`; its rows are added up.
        keep: experts that each layer keeps (layers with as few keep all).
        max_shard_size: bytes per weight file.
        verify: compare both afterwards.
        text: for that (see `verify_checkpoints`).

    Raises:
        ConversionError: source, load and `keep` do not fit each other, or the router does not allow it.
        FileExistsError: `destination` exists and is not empty.
    """
    target = Path(destination)
    check_destination(target)
    check_apart(target, [source])
    checkpoint = open_checkpoint(local_folder(source))
    config = moe_fields(checkpoint)
    _check(config, keep)
    counts = recorded_load(load, config)
    kept = {layer: most_used(layer_counts, keep) for layer, layer_counts in zip(config.moe_layers, counts, strict=True)}
    numbers = [len(experts) for experts in kept.values()]
    content = {**checkpoint.config, "num_experts": numbers[0] if len(set(numbers)) == 1 else numbers}
    tensors = _kept_tensors(checkpoint, config, kept)
    reports: list[ExactnessReport] = []

    def finish(folder: Path) -> dict[str, bytes]:
        if verify:
            from .verification import verify_checkpoints

            names = ("MoE", "pruned MoE")
            reports.append(verify_checkpoints(checkpoint, folder, moe_config=content, text=text, names=names))
        report = json.loads(reports[0].to_json()) if reports else {}
        return {REPORT_FILE: json_bytes({**report, "kept_experts": {str(layer): ids for layer, ids in kept.items()}})}

    files = {**companion_files(checkpoint.folder), **(code_files() if "auto_map" in content else {})}
    write_checkpoint(
        target,
        tensors,
        {**files, "config.json": json_bytes(content)},
        job=json.dumps(["prune", __version__, checkpoint.identity, list(kept.items()), max_shard_size, verify]),
        max_shard_size=max_shard_size,
        finish=finish,
        progress="Pruning",
    )
    return PruneResult(target, kept, reports[0] if reports else None)


def moe_fields(checkpoint: Checkpoint) -> MoEFields:
    """The fields of the `MoEConfig` of a MoE checkpoint of hf_moe; for an architecture of the table, without torch.

    Raises:
        ConversionError: it is none.
        ValueError: a field is out of range.
    """
    config = checkpoint.config
    if config.get("model_type") != "hf_moe":
        raise ConversionError(
            f"{checkpoint.folder}: `model_type`={config.get('model_type')!r} is not a MoE of hf_moe. A native one can be "
            "brought in with `hf-moe import`."
        )
    text_config = config.get("text_config") or {}
    known = lookup(str(text_config.get("model_type")))
    num_layers = text_config.get(known.num_layers_field) if known is not None else None
    if isinstance(num_layers, int):
        fields = PlannedFields(num_layers=num_layers, **{name: config[name] for name in MOE_FIELDS if name in config})
        fields.validate_moe()
        return fields
    from hf_moe.auto import MoEConfig

    return MoEConfig.from_dict(config)


def recorded_load(path: str | os.PathLike, config: MoEFields) -> list[list[int]]:
    """Assignments of each expert of each MoE layer, over all rows of an `expert_load.safetensors`.

    Raises:
        ConversionError: it is not there, not readable, or was recorded with other layers or experts.
    """
    try:
        load = read_expert_load(path)
    except OSError as error:
        raise ConversionError(f"`load`={os.fspath(path)!r}: not readable ({one_line(error)}).") from error
    except ValueError as error:
        raise ConversionError(f"`load`: {error}") from error
    if (load.layers, load.num_experts) != (config.moe_layers, config.num_experts_per_layer):
        raise ConversionError(
            f"`load`={os.fspath(path)!r}: was recorded with layers {load.layers} of {load.num_experts} experts, but the "
            f"checkpoint has layers {config.moe_layers} of {config.num_experts_per_layer}."
        )
    totals = load.totals()
    unused = [layer for layer, counts in zip(load.layers, totals, strict=True) if not any(counts)]
    if unused:
        raise ConversionError(f"`load`={os.fspath(path)!r}: no assignment was recorded in layer {unused[0]}. Train longer.")
    return totals


def most_used(counts: list[int], keep: int) -> list[int]:
    """Indices of the `keep` largest counts, ascending; of equal ones the lower index is kept."""
    return sorted(sorted(range(len(counts)), key=lambda expert: -counts[expert])[:keep])


def _check(config: MoEFields, keep: int) -> None:
    if config.router_type in _UNFIT_ROUTERS:
        raise ConversionError(
            f"`router_type`={config.router_type!r} cannot be pruned: {_UNFIT_ROUTERS[config.router_type]}. It works for top_k, "
            "noisy_top_k, switch, gshard and sigmoid."
        )
    if config.n_group > 1:
        raise ConversionError(
            f"`n_group`={config.n_group}: the router's experts lie in groups of equal size, which pruning would make uneven."
        )
    most = max(config.num_experts_per_layer)
    if not isinstance(keep, int) or isinstance(keep, bool) or not config.num_experts_per_tok <= keep < most:
        raise ConversionError(
            f"`keep`={keep!r} must lie in {config.num_experts_per_tok}..{most - 1}: at least `num_experts_per_tok`, and fewer "
            "experts than there are."
        )


def _kept_tensors(checkpoint: Checkpoint, config: MoEFields, kept: dict[int, list[int]]) -> list[OutputTensor]:
    """All tensors of the output, with the experts numbered anew."""
    blocks = expert_blocks(checkpoint, config)
    tensors = []
    for name in sorted(checkpoint.tensors, key=natural_key):
        expert = _EXPERT.fullmatch(name)
        router = next((path for path in blocks if name.startswith(f"{path}.gate.")), None)
        if expert and expert.group(1) in blocks:
            ids, index = kept[blocks[expert.group(1)]], int(expert.group(2))
            if index in ids:
                new_name = f"{expert.group(1)}.experts.{ids.index(index)}.{expert.group(3)}"
                tensors.append(carried(checkpoint, name, new_name=new_name))
        elif router is not None:
            tensors.append(_rows(checkpoint, name, kept[blocks[router]]))
        else:
            tensors.append(carried(checkpoint, name))
    return sorted(tensors, key=lambda tensor: natural_key(tensor.name))


def expert_blocks(checkpoint: Checkpoint, config: MoEFields) -> dict[str, int]:
    """The decoder layer of each MoE block, by the block's name on disk.

    Raises:
        ConversionError: the experts on disk are not those of the config.
    """
    found: dict[str, set[int]] = {}
    for name in checkpoint.tensors:
        match = _EXPERT.fullmatch(name)
        if match:
            found.setdefault(match.group(1), set()).add(int(match.group(2)))
    paths = sorted(found, key=natural_key)
    if [found[path] for path in paths] != [set(range(count)) for count in config.num_experts_per_layer]:
        raise ConversionError(
            f"{checkpoint.folder}: has experts {[len(found[path]) for path in paths]} in its MoE blocks, but config.json says "
            f"{config.num_experts_per_layer}. Config and weights are of different models."
        )
    return dict(zip(paths, config.moe_layers, strict=True))


def _rows(checkpoint: Checkpoint, name: str, experts: list[int]) -> OutputTensor:
    """The experts' rows of a router's tensor."""
    info = checkpoint[name]
    row = info.nbytes // info.shape[0]
    payload = Joined(tuple(SourceBytes(checkpoint, name, expert * row, (expert + 1) * row) for expert in experts))
    return OutputTensor(name, info.dtype, (len(experts), *info.shape[1:]), payload)
