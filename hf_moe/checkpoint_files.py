# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""The safetensors files of an ordinary checkpoint, planned from shapes alone and written tensor by tensor."""

from __future__ import annotations

import json
import os
import re
import shutil
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    PrefixChange,
    WeightConverter,
    apply_converters,
    dot_natural_key,
    revert_weight_conversion,
)
from transformers.modeling_utils import remove_tied_weights_from_state_dict
from transformers.utils import logging

# Of torch's dtypes, safetensors' name and its place in the order in which safetensors lays tensors out.
_DTYPES = {
    torch.uint64: "U64", torch.int64: "I64", torch.float64: "F64", torch.complex64: "C64", torch.float32: "F32",
    torch.uint32: "U32", torch.int32: "I32", torch.bfloat16: "BF16", torch.float16: "F16", torch.uint16: "U16",
    torch.int16: "I16", torch.float8_e4m3fn: "F8_E4M3", torch.float8_e5m2: "F8_E5M2", torch.int8: "I8", torch.uint8: "U8",
    torch.bool: "BOOL",
}  # fmt: skip
_ORDER = list(_DTYPES)


class FilePlan:
    """The files of a checkpoint, from shapes alone, and which tensors are converted together.

    Args:
        model: gives names, shapes and conversions; it may be on the meta device.
        dtypes: by the names of its state dict.
        max_shard_size: of a file.
        original_format: with the names and shapes on disk.
        variant: of `save_pretrained`.
    """

    def __init__(
        self,
        model: PreTrainedModel,
        dtypes: Mapping[str, torch.dtype],
        max_shard_size: int | str,
        original_format: bool,
        variant: str | None,
    ) -> None:
        self._model, self._original = model, original_format
        shapes = {name: tensor.shape for name, tensor in model.state_dict().items()}
        ignored = set(model._keys_to_ignore_on_save or ())
        empty = {name: torch.empty(s, dtype=dtypes[name], device="meta") for name, s in shapes.items() if name not in ignored}
        empty = remove_tied_weights_from_state_dict(empty, model)
        self.units = _converted_together(model, list(empty)) if original_format else [[name] for name in empty]
        self._on_disk = revert_weight_conversion(model, empty) if original_format else empty
        stem = f"model.{variant}" if variant else "model"
        self.weights, self.index = f"{stem}{{suffix}}.safetensors", f"{stem}.safetensors.index.json"
        if variant:
            self.index = f"model.safetensors.index.{variant}.json"
        self.split = split_state_dict_into_shards_factory(
            self._on_disk,
            # views of one tensor count as that and stay together, as in one process
            get_storage_size=lambda tensor: tensor.untyped_storage().nbytes(),
            get_storage_id=lambda tensor: tensor.untyped_storage()._cdata,
            filename_pattern=self.weights,
            max_shard_size=max_shard_size,
        )

    def write(self, fetch: Callable[[str], Tensor | None], folder: Path | None) -> None:
        """Write the files, tensor by tensor.

        Args:
            fetch: the whole tensor of a name of the state dict, where it is to be written. All ranks call it, in one order.
            folder: to write to; `None` on a rank that only takes part in fetching.
        """
        files = {}
        if folder is not None:
            for file, names in self.split.filename_to_tensors.items():
                files[file] = SafetensorsFile(folder / file, {name: self._on_disk[name] for name in names})
        for unit in logging.tqdm(self.units, desc="Writing weights", disable=folder is None):
            fetched = {name: fetch(name) for name in unit}
            if folder is None:
                continue
            whole = {name: tensor for name, tensor in fetched.items() if tensor is not None}
            converted = revert_weight_conversion(self._model, whole) if self._original else whole
            del fetched, whole
            for name in list(converted):
                files[self.split.tensor_to_filename[name]].write(name, converted.pop(name))
        if folder is not None and self.split.is_sharded:
            metadata = {"total_parameters": self._model.num_parameters(), **self.split.metadata}
            index = {"metadata": metadata, "weight_map": self.split.tensor_to_filename}
            (folder / self.index).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def _converted_together(model: PreTrainedModel, names: list[str]) -> list[list[str]]:
    """Names of the model whose tensors are needed at once to make those on disk; as `revert_weight_conversion` groups them."""
    conversions = getattr(model, "_weight_conversions", None)
    if conversions is None:
        conversions = [c for c in get_model_conversion_mapping(model, add_legacy=False) if not isinstance(c, PrefixChange)]
    converters: list[Any] = [c.reverse_transform() for c in conversions[::-1] if isinstance(c, WeightConverter)]
    units: dict[str, list[str]] = defaultdict(list)
    for name in sorted(names, key=dot_natural_key):
        renamed, pattern = apply_converters(name, converters)
        units[name if pattern is None else renamed].append(name)
    return list(units.values())


class SafetensorsFile:
    """A file whose header is written first and whose tensors come in any order.

    Args:
        path: to write to.
        tensors: of the dtypes and shapes that will come, by name.
    """

    def __init__(self, path: Path, tensors: Mapping[str, Tensor]) -> None:
        self._path = path
        self._starts: dict[str, int] = {}
        header: dict[str, Any] = {"__metadata__": {"format": "pt"}}
        end = 0
        for name in sorted(tensors, key=lambda name: (_ORDER.index(tensors[name].dtype), name)):
            tensor = tensors[name]
            self._starts[name], end = end, end + tensor.nbytes
            places = [self._starts[name], end]
            header[name] = {"dtype": _DTYPES[tensor.dtype], "shape": list(tensor.shape), "data_offsets": places}
        text = json.dumps(header, separators=(",", ":"), ensure_ascii=False).encode()
        text += b" " * (-len(text) % 8)
        self._data = 8 + len(text)
        with path.open("wb") as file:
            file.write(len(text).to_bytes(8, "little") + text)
            file.truncate(self._data + end)

    def write(self, name: str, tensor: Tensor) -> None:
        """Put a tensor where the header says."""
        with self._path.open("r+b") as file:
            file.seek(self._data + self._starts[name])
            file.write(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().data)


def files_by_name(folder: Path) -> dict[str, Path]:
    """The file of each tensor."""
    from safetensors import safe_open

    index = folder / "model.safetensors.index.json"
    if index.exists():
        return {n: folder / file for n, file in json.loads(index.read_text(encoding="utf-8"))["weight_map"].items()}
    path = folder / "model.safetensors"
    if not path.exists():
        raise ValueError(f"{folder}: there is no {path.name} and no {index.name}. Give a checkpoint with safetensors files.")
    with safe_open(path, "pt") as file:
        return dict.fromkeys(file.keys(), path)


def read_tensor(path: Path, name: str) -> Tensor:
    """One tensor of a file."""
    from safetensors import safe_open

    with safe_open(path, "pt") as file:
        return file.get_tensor(name)


@contextmanager
def beside(folder: Path) -> Iterator[Path]:
    """A folder in this one, whose files are moved here when the block is left; the index comes last."""
    for left in folder.glob(".saving-*"):
        shutil.rmtree(left, ignore_errors=True)  # of a process that was killed
    target = Path(tempfile.mkdtemp(prefix=".saving-", dir=folder))
    try:
        yield target
        for path in sorted(target.iterdir(), key=lambda path: (path.suffix != ".safetensors", ".index." in path.name)):
            os.replace(path, folder / path.name)
    finally:
        shutil.rmtree(target, ignore_errors=True)


def remove_old_shards(folder: Path, plan: FilePlan) -> None:
    """Weights of another save in the folder that are no part of this one."""
    pattern = re.escape(plan.weights).replace(re.escape("{suffix}"), r"(-\d{5}-of-\d{5})?")
    for path in folder.iterdir():
        if re.fullmatch(pattern, path.name) and path.name not in plan.split.filename_to_tensors:
            path.unlink()
    if not plan.split.is_sharded:
        (folder / plan.index).unlink(missing_ok=True)


__all__ = ["FilePlan", "SafetensorsFile", "beside", "files_by_name", "read_tensor", "remove_old_shards"]
