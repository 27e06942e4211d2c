# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""What an export and an import have in common: the plan, its writing, the check afterwards."""

from __future__ import annotations

import json
import os
from collections import Counter
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .checkpoint_reader import Checkpoint, json_bytes, open_checkpoint
from .checkpoint_writer import check_apart, check_destination, write_checkpoint
from .companions import companion_files
from .dense_source import local_folder, refuse_quantised
from .errors import ConversionError
from .payloads import OutputTensor
from .recipe import DTYPES, MOE_FIELDS, PlannedFields, parse_size

if TYPE_CHECKING:
    from .verification import ExactnessReport

_DTYPES = {name: code for name, code in DTYPES.items() if code is not None}


@dataclass(frozen=True)
class NativePlan:
    """A checkpoint to be written.

    Attributes:
        format: name of the native format that it has, or had.
        config: for config.json.
        tensors: of the checkpoint.
        notes: what the result does not have of the source, a sentence each. None of it changes logits in evaluation.
        files: beside the companions of the source (tokenizer, generation config, …).
    """

    format: str
    config: dict[str, Any]
    tensors: Sequence[OutputTensor]
    notes: list[str]
    files: Mapping[str, Path]


@dataclass(frozen=True)
class ConversionResult:
    """What `export` and `import_moe` return.

    Attributes:
        format: name of the native format.
        destination: folder of the checkpoint.
        notes: see `NativePlan`.
        report: comparison of the logits, if asked for.
    """

    format: str
    destination: Path
    notes: list[str]
    report: ExactnessReport | None


def dtype_code(dtype: str | None) -> str | None:
    """safetensors' name of a dtype.

    Raises:
        ConversionError: it is not known.
    """
    if dtype in (None, "auto"):
        return None
    if dtype not in _DTYPES:
        raise ConversionError(f"`dtype`={dtype!r} is not known. Choose {', '.join(map(repr, _DTYPES))}, or 'auto' to keep it.")
    return _DTYPES[str(dtype)]


def stored_dtype(checkpoint: Checkpoint, tensors: Sequence[OutputTensor], dtype: str | None) -> str:
    """The `dtype` of config.json: what was asked for, else what most of the tensors have."""
    code = dtype or Counter(tensor.dtype for tensor in tensors).most_common(1)[0][0]
    return {value: name for name, value in _DTYPES.items()}.get(code) or str(checkpoint.config.get("dtype", "float32"))


def check_routing(config: Mapping[str, Any], num_layers: int, folder: Path | None) -> None:
    """Check the fields of a `MoEConfig` as it does itself.

    Raises:
        ConversionError: one is out of range, or two do not go together.
    """
    try:
        PlannedFields(num_layers=num_layers, **{name: config[name] for name in MOE_FIELDS if name in config}).validate_moe()
    except (ValueError, TypeError) as error:
        raise ConversionError(f"{folder}: {error}") from error


def run_plan(
    source: str | os.PathLike,
    destination: str | os.PathLike,
    make_plan: Callable[[Checkpoint], NativePlan],
    max_shard_size: int | str,
    verify: bool,
) -> ConversionResult:
    """Plan, write, and compare if asked to."""
    from hf_moe.model_cards import conversion_card, describe_parent

    target, size = Path(destination), parse_size(max_shard_size)
    check_destination(target)
    check_apart(target, [source])
    folder = local_folder(source)
    checkpoint = open_checkpoint(folder)
    refuse_quantised(checkpoint.config, str(folder))
    plan = make_plan(checkpoint)
    job = json.dumps([str(folder.resolve()), checkpoint.identity, plan.config, plan.format, size], default=str)
    files: dict[str, bytes | Path] = {**companion_files(folder), **plan.files, "config.json": json_bytes(plan.config)}
    reports: list[ExactnessReport] = []

    def finish(written: Path) -> dict[str, bytes]:
        report: dict[str, Any] = {"kind": "import" if plan.files else "export", "format": plan.format}
        report["parents"] = [describe_parent(source, folder)]
        if verify:
            from .verification import verify_checkpoints

            names = ("source", "result")
            measured = verify_checkpoints(
                checkpoint, written, moe_config=plan.config, tokenizer=folder, expected_exact=True, names=names
            )
            reports.append(measured)
            report |= json.loads(measured.to_json())
        names_written = [path.name for path in written.iterdir()]
        card = conversion_card(target.name, plan.config, plan.tensors, kind=report["kind"], report=report, files=names_written)
        return {"conversion_report.json": json_bytes(report), "README.md": card.encode()}

    write_checkpoint(target, plan.tensors, files, job=job, max_shard_size=size, finish=finish)
    return ConversionResult(plan.format, target, plan.notes, reports[0] if reports else None)
