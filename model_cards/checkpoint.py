# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""A checkpoint's config, tensors and files, from headers alone; with what is wrong with it in one line."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .lineage import ADAPTER_CONFIG

WEIGHTS, INDEX, ADAPTER = "model.safetensors", "model.safetensors.index.json", "adapter_model.safetensors"
# safetensors' names of dtypes as torch has them
DTYPES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "F8_E4M3": "float8_e4m3fn", "I64": "int64",
    "F8_E5M2": "float8_e5m2", "I32": "int32", "I16": "int16", "I8": "int8", "U8": "uint8", "BOOL": "bool",
}  # fmt: skip
_LONGEST_HEADER = 100_000_000  # safetensors' own limit


class CheckpointError(ValueError):
    """A folder holds no checkpoint that could be loaded. The message is one line: file, what is wrong, remedy."""


@dataclass(frozen=True)
class TensorHeader:
    """A tensor's name, shape, dtype (torch's name, or safetensors' where torch has none) and bytes."""

    name: str
    shape: tuple[int, ...]
    dtype: str
    nbytes: int


@dataclass(frozen=True)
class Checkpoint:
    """What a folder holds.

    Attributes:
        folder: where it is.
        config: content of config.json; of an adapter, of adapter_config.json.
        files: names of the files with weights, and of their index.
        tensors: of all of them.
        is_adapter: whether it is a PEFT adapter.
    """

    folder: Path
    config: dict[str, Any]
    files: list[str]
    tensors: list[TensorHeader]
    is_adapter: bool


def open_checkpoint(folder: Path) -> Checkpoint:
    """Read config and headers, and check that every file is there and whole.

    Raises:
        CheckpointError: it is not.
    """
    if not folder.is_dir():
        raise CheckpointError(f"{folder}: no such folder. Give one that `save_pretrained` or `hf-moe` wrote.")
    is_adapter = (folder / ADAPTER_CONFIG).is_file() and not any((folder / name).is_file() for name in (WEIGHTS, INDEX))
    config_file = folder / (ADAPTER_CONFIG if is_adapter else "config.json")
    config = read_config(config_file)
    single = ADAPTER if is_adapter else WEIGHTS
    if (folder / single).is_file():
        return Checkpoint(folder, config, [single], list(read_header(folder / single)), is_adapter)
    if not is_adapter and (folder / INDEX).is_file():
        return Checkpoint(folder, config, *_read_shards(folder), is_adapter)
    others = sorted(path.name for path in folder.glob("*.bin") if path.name.startswith(("pytorch_model", "adapter_model")))
    inside = sorted(path.name for path in folder.glob("checkpoint-*") if (path / "config.json").is_file())
    remedy = (
        f"Its weights are in {others[0]}, which can hold code: load and save it with Transformers."
        if others
        else f"Give one of its checkpoints, e.g. {folder / inside[-1]}."
        if inside
        else "Save the model there with `save_pretrained`."
    )
    raise CheckpointError(f"{folder}: no {single}{'' if is_adapter else f' or {INDEX}'}. {remedy}")


def read_config(path: Path) -> dict[str, Any]:
    """A config.json.

    Raises:
        CheckpointError: it is missing, or no JSON object.
    """
    if not path.is_file():
        inside = sorted(found.parent.name for found in path.parent.glob(f"checkpoint-*/{path.name}"))
        remedy = (
            f"Give one of its checkpoints, e.g. {path.parent / inside[-1]}." if inside else "Give a folder with a checkpoint."
        )
        raise CheckpointError(f"{path}: no such file. {remedy}")
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path}: not readable as JSON ({' '.join(str(error).split())[:160]}). Save it again.") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not an object. Save it again.")
    return content


def read_header(path: Path) -> Iterator[TensorHeader]:
    """The tensors of one safetensors file, which is checked to be as long as its header says.

    Raises:
        CheckpointError: it is cut short or damaged.
    """
    try:
        size = path.stat().st_size
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            if not 2 <= length <= min(_LONGEST_HEADER, size - 8):
                raise ValueError(f"its header would have {length} bytes")
            header = json.loads(file.read(length))
        entries = {name: entry for name, entry in header.items() if name != "__metadata__"}
        end = max((entry["data_offsets"][1] for entry in entries.values()), default=0)
        if size != 8 + length + end:
            raise ValueError(f"{size} bytes long where its header says {8 + length + end}")
    except (OSError, ValueError, KeyError, TypeError, AttributeError, IndexError) as error:
        reason = " ".join(str(error).split())[:160]
        raise CheckpointError(f"{path}: not a whole safetensors file ({reason}). Save it again.") from error
    for name, entry in entries.items():
        start, stop = entry["data_offsets"]
        yield TensorHeader(name, tuple(entry["shape"]), DTYPES.get(entry["dtype"], entry["dtype"]), stop - start)


def _read_shards(folder: Path) -> tuple[list[str], list[TensorHeader]]:
    weight_map = read_config(folder / INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{folder / INDEX}: has no `weight_map` of tensors to files. Save the model again.")
    listed: dict[str, set[str]] = {}
    for name, file in weight_map.items():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{folder / INDEX}: `weight_map` names {file!r}, which is no file of the folder. Save again.")
        listed.setdefault(file, set()).add(name)
    tensors = []
    for file, names in sorted(listed.items()):
        if not (folder / file).is_file():
            raise CheckpointError(f"{folder / file}: the shard is missing (named by {INDEX}). Save the model again.")
        found = {tensor.name: tensor for tensor in read_header(folder / file)}
        if names - found.keys():
            raise CheckpointError(
                f"{folder / file}: lacks `{min(names - found.keys())}`, which {INDEX} lists. Save the model again."
            )
        tensors += [found[name] for name in found if name in names]
    return [INDEX, *sorted(listed)], tensors


def code_files(folder: Path, config: dict[str, Any]) -> list[str]:
    """The Python files that a checkpoint needs for `trust_remote_code`: those that configs name, and what these import.

    Raises:
        CheckpointError: one is missing.
    """
    todo = {(module, "config.json") for module in _modules(config.get("auto_map"))}
    tokenizer = folder / "tokenizer_config.json"
    if tokenizer.is_file():
        todo |= {(module, tokenizer.name) for module in _modules(read_config(tokenizer).get("auto_map"))}
    found: set[str] = set()
    while todo:
        module, needed_by = todo.pop()
        path = folder / f"{module}.py"
        if not path.is_file():
            raise CheckpointError(
                f"{path}: no such file, but {needed_by} needs it. Save the model again with `save_pretrained`."
            )
        found.add(path.name)
        text = path.read_text(encoding="utf-8")
        imported = re.findall(r"^\s*from\s+\.(\w+)\s+import", text, flags=re.MULTILINE)
        todo |= {(name, path.name) for name in imported if f"{name}.py" not in found}
    return sorted(found)


def _modules(auto_map: Any) -> Iterable[str]:
    """Names of the modules of an `auto_map` that lie in the folder itself."""
    for entry in auto_map.values() if isinstance(auto_map, dict) else []:
        for name in entry if isinstance(entry, list) else [entry]:
            if isinstance(name, str) and "." in name and "--" not in name:  # `org/model--module.Class` lies elsewhere
                yield name.rpartition(".")[0]
