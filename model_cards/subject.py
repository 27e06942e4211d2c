# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""What a card is about: a checkpoint's folder, a model in memory, or a `Trainer`, all described in the same way."""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from hf_moe.parameter_counts import ParameterCounts, count_parameters

from .checkpoint import Checkpoint, CheckpointError, TensorHeader, open_checkpoint
from .lineage import (
    LINEAGE,
    METRICS,
    Parent,
    Stage,
    details_of,
    local_folder_of,
    parent_named,
    read_json_object,
    read_lineage,
    stages_before,
)
from .training_run import TrainingRun, notes_of, read_run, run_of_trainer

LOAD_PICTURE, REPORT_PAGE = "expert_load.png", "report/report.html"
_PICTURES = (LOAD_PICTURE, "report/*.png")


@dataclass(frozen=True, kw_only=True)
class Adapter:
    """A PEFT adapter.

    Attributes:
        kind: as PEFT calls it (`LORA`).
        base: the model that it is for.
        config: content of adapter_config.json.
        parameters, nbytes: of the adapter alone.
    """

    kind: str
    base: Parent
    config: Mapping[str, Any]
    parameters: int
    nbytes: int


@dataclass(frozen=True, kw_only=True)
class Subject:
    """What a card is about.

    Attributes:
        name: of the folder or the model.
        config: content of config.json; of an adapter, its base model's, or empty where that is not at hand.
        counts: parameters; of an adapter, its base model's; `None` where they are not known.
        dtypes: bytes by dtype.
        stages: what it was made of, the oldest first.
        run: the training that it is the result of, or `None`.
        adapter: if it is one.
        folder: its files, or `None`.
        pictures: relative to the folder.
        has_tokenizer, has_licence_file: whether the folder has one.
        has_code: whether it has the code of its class, for `trust_remote_code`.
        versions: of the libraries that it was made with, by name.
    """

    name: str
    config: Mapping[str, Any]
    counts: ParameterCounts | None
    dtypes: Mapping[str, int] = field(default_factory=dict)
    stages: list[Stage] = field(default_factory=list)
    run: TrainingRun | None = None
    adapter: Adapter | None = None
    folder: Path | None = None
    pictures: list[str] = field(default_factory=list)
    has_tokenizer: bool = False
    has_licence_file: bool = False
    has_code: bool = False
    versions: Mapping[str, str] = field(default_factory=dict)


def describe(source: Any, trainer: Any = None) -> Subject:
    """Describe a folder, a model or a `Trainer`.

    Args:
        source: the folder of a checkpoint or of a run, a model of Transformers or PEFT, or a `Trainer`.
        trainer: the `Trainer` of a model, for its hyper-parameters and logs.

    Raises:
        CheckpointError: the folder has no whole checkpoint.
        TypeError: `source` is none of these.
    """
    if isinstance(source, (str, os.PathLike)):
        found = describe_folder(Path(source))
        return found if trainer is None else replace(found, run=run_of_trainer(trainer), versions=library_versions())
    if is_trainer(source):
        return describe(source.accelerator.unwrap_model(source.model), source)
    source = _unwrapped(source)
    if not (hasattr(source, "config") and hasattr(source, "named_parameters")):
        raise TypeError(f"`source` is a {type(source).__name__}. Give a folder, a model of Transformers or PEFT, or a Trainer.")
    return _describe_model(source, trainer)


def _unwrapped(model: Any) -> Any:
    """Without `torch.compile`, `DistributedDataParallel` and the like."""
    while True:
        parts = getattr(model, "_modules", {})
        inner = next((parts[name] for name in ("_orig_mod", "module") if len(parts) == 1 and name in parts), None)
        if inner is None:
            return model
        model = inner


def is_trainer(source: Any) -> bool:
    """Whether something is a `Trainer` of Transformers, or made like one."""
    return all(hasattr(source, name) for name in ("model", "args", "state", "save_model"))


def describe_tensors(
    name: str, config: Mapping[str, Any], tensors: Iterable[TensorHeader], stages: list[Stage], **more: Any
) -> Subject:
    """Describe what a converter is writing: names, shapes, dtypes and bytes of its tensors."""
    headers = list(tensors)
    more.setdefault("dtypes", bytes_by_dtype(headers))
    more.setdefault("has_code", bool(config.get("auto_map")))
    return Subject(name=name, config=config, counts=count_parameters(headers, config), stages=stages, **more)


# ---------------------------------------------------------------------- folders


def describe_folder(folder: Path) -> Subject:
    """Describe a folder with a checkpoint, and what else lies there."""
    checkpoint = open_checkpoint(folder)
    name = Path(os.path.abspath(folder)).name
    shared: dict[str, Any] = {
        "stages": read_lineage(folder),
        "run": read_run(folder),
        "folder": folder,
        **_beside(folder),
    }
    if checkpoint.is_adapter:
        return _adapter_subject(name, folder, checkpoint, shared)
    shared["versions"] = _versions_of(folder, checkpoint.config.get("transformers_version"))
    return describe_tensors(name, checkpoint.config, checkpoint.tensors, **shared)


def _beside(folder: Path) -> dict[str, Any]:
    return {
        "pictures": [p.relative_to(folder).as_posix() for pattern in _PICTURES for p in sorted(folder.glob(pattern))],
        "has_tokenizer": (folder / "tokenizer_config.json").is_file() or (folder / "tokenizer.json").is_file(),
        "has_licence_file": any(path.is_file() for path in folder.glob("LICEN[CS]E*")),
    }


def _versions_of(folder: Path, saved_with: Any) -> dict[str, str]:
    """Versions that were written down when the model was saved, or what config.json says of them."""
    for file in (METRICS, LINEAGE):
        found = read_json_object(folder / file).get("versions")
        if isinstance(found, dict) and saved_with in (None, found.get("Transformers")):
            return {str(name): str(version) for name, version in found.items()}
    return {"Transformers": str(saved_with)} if saved_with else {}


def _adapter_subject(name: str, folder: Path, checkpoint: Checkpoint, shared: dict[str, Any]) -> Subject:
    said = checkpoint.config.get("base_model_name_or_path")
    base_folder = local_folder_of(said) if isinstance(said, str) else None
    adapter = Adapter(
        kind=str(checkpoint.config.get("peft_type") or "PEFT"),
        base=parent_named(said) if isinstance(said, str) else Parent("unknown"),
        config=checkpoint.config,
        parameters=sum(_numel(tensor.shape) for tensor in checkpoint.tensors),
        nbytes=sum(tensor.nbytes for tensor in checkpoint.tensors),
    )
    try:
        base = open_checkpoint(base_folder) if base_folder is not None else None
    except CheckpointError:
        base = None
    with_peft = {"PEFT": str(checkpoint.config["peft_version"])} if checkpoint.config.get("peft_version") else {}
    versions = with_peft | _versions_of(folder, None)
    if base is None or base.is_adapter:
        return Subject(name=name, config={}, counts=None, adapter=adapter, versions=versions, **shared)
    return describe_tensors(name, base.config, base.tensors, adapter=adapter, versions=versions, **shared)


# ---------------------------------------------------------------------- models in memory


def _describe_model(model: Any, trainer: Any) -> Subject:
    adapted = hasattr(model, "peft_config") and hasattr(model, "get_base_model")
    inner = model.get_base_model() if adapted else model
    prefix = getattr(model.base_model, "prefix", None) or "lora_" if adapted else None
    own, added = _parameters_of(inner, prefix)
    folder = None if trainer is None else Path(trainer.args.output_dir or ".")
    loaded_from = getattr(inner, "name_or_path", "") or ""
    stages = stages_before(loaded_from)
    run = None if trainer is None else run_of_trainer(trainer)
    adapter = None
    if adapted:
        config = next(iter(model.peft_config.values()))
        kind = str(getattr(config.peft_type, "value", config.peft_type))
        adapter = Adapter(kind=kind, base=_base_parent(loaded_from, inner), config=_plain(config.to_dict()),
                          parameters=sum(_numel(t.shape) for t in added), nbytes=sum(t.nbytes for t in added))  # fmt: skip
    if run is not None or adapted:
        kind = "training" if run is not None else "adapter"
        details = None if run is None else details_of(run.steps)
        stages = [*stages, Stage(kind, (parent_named(loaded_from),) if loaded_from else (), details=details)]
    own_name = (Path(loaded_from).name or type(inner).__name__) + (" adapter" if adapted else "")
    name = own_name if folder is None else folder.resolve().name
    beside = _beside(folder) if folder is not None and folder.is_dir() else {}
    more = {"run": run, "adapter": adapter, "folder": folder, "versions": library_versions(), **beside}
    more["has_code"] = type(inner).__module__.startswith("hf_moe.") or bool(getattr(inner.config, "auto_map", None))
    more["dtypes"] = bytes_by_dtype([*own, *_saved_buffers(inner)])
    processing = None if trainer is None else getattr(trainer, "processing_class", None)
    if processing is not None:
        more["has_tokenizer"] = True
    return describe_tensors(name, _config_of(inner), own, stages, **more)


def _base_parent(loaded_from: str, inner: Any) -> Parent:
    return parent_named(loaded_from) if loaded_from else Parent(type(inner).__name__)


def _config_of(model: Any) -> dict[str, Any]:
    config = model.config.to_dict()
    if not config.get("architectures"):
        config["architectures"] = [type(model).__name__]
    return config


def _parameters_of(model: Any, prefix: str | None) -> tuple[list[TensorHeader], list[TensorHeader]]:
    """A model's own parameters, and those of an adapter whose parts have names that begin with `prefix`."""
    own: list[TensorHeader] = []
    added: list[TensorHeader] = []
    for name, parameter in model.named_parameters():
        is_added = prefix is not None and (f".{prefix}" in name or ".modules_to_save." in name)
        (added if is_added else own).append(_header(name, parameter))
    return own, added


def _saved_buffers(model: Any) -> list[TensorHeader]:
    """Buffers that a checkpoint has: no parameters, but bytes."""
    saved = model.state_dict().keys()
    return [_header(name, buffer) for name, buffer in model.named_buffers() if name in saved]


def _header(name: str, tensor: Any) -> TensorHeader:
    dtype = str(tensor.dtype).removeprefix("torch.")
    return TensorHeader(name, tuple(tensor.shape), dtype, tensor.numel() * tensor.element_size())


def library_versions() -> dict[str, str]:
    """Of the libraries that this process has imported."""
    import sys
    from importlib import metadata

    names = {"Transformers": "transformers", "PyTorch": "torch", "PEFT": "peft", "Accelerate": "accelerate",
             "Datasets": "datasets", "TRL": "trl", "hf_moe": "hf_moe"}  # fmt: skip
    return {shown: metadata.version(package) for shown, package in names.items() if package in sys.modules}


def record_bytes(subject: Subject) -> bytes:
    """The content of lineage.json: what should outlive the folders and the process that it was read from."""
    content: dict[str, Any] = {"stages": [dataclasses.asdict(stage) for stage in subject.stages]}
    content["versions"] = dict(subject.versions)
    if subject.run is not None:
        content["training"] = notes_of(subject.run)
    return json.dumps(content, indent=1, default=str, ensure_ascii=False).encode() + b"\n"


# ---------------------------------------------------------------------- small things


def bytes_by_dtype(tensors: Iterable[TensorHeader]) -> dict[str, int]:
    """Of all tensors together."""
    sizes: dict[str, int] = {}
    for tensor in tensors:
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return sizes


def _numel(shape: Iterable[int]) -> int:
    product = 1
    for size in shape:
        product *= size
    return product


def _plain(config: Mapping[str, Any]) -> dict[str, Any]:
    """Sets as lists, as adapter_config.json has them."""
    return {name: sorted(value) if isinstance(value, (set, frozenset)) else value for name, value in config.items()}
