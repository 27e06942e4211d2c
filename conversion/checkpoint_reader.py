# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Checkpoints as names, shapes and bytes. Headers are read at once and checked; tensors are read when asked for, in pieces.

Neither torch nor transformers is imported for safetensors, so that a plan is ready in a fraction of a second.
"""

from __future__ import annotations

import hashlib
import json
import math
import os
import zipfile
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import numpy as np

from .errors import ConversionError, one_line

ITEM_SIZE = {
    "F64": 8, "F32": 4, "F16": 2, "BF16": 2, "I64": 8, "I32": 4, "I16": 2, "I8": 1, "U64": 8, "U32": 4, "U16": 2, "U8": 1,
    "BOOL": 1, "F8_E4M3": 1, "F8_E5M2": 1, "F8_E8M0": 1, "C64": 8,
}  # fmt: skip
FLOATING = ("F64", "F32", "F16", "BF16")
CHUNK = 2**20  # bytes that are in memory at a time; more would leave the processor's cache


@dataclass(frozen=True)
class TensorInfo:
    """A tensor on disk: safetensors' name of its dtype, its shape, and where its bytes are."""

    name: str
    dtype: str
    shape: tuple[int, ...]
    path: Path | None = None
    offset: int = 0

    @property
    def numel(self) -> int:
        return math.prod(self.shape)

    @property
    def nbytes(self) -> int:
        return self.numel * ITEM_SIZE[self.dtype]


class Checkpoint(ABC):
    """A dense or MoE checkpoint: `config` (its config.json), `tensors` by name, `folder` (or `None`), `identity`."""

    def __init__(self, config: dict[str, Any], tensors: Mapping[str, TensorInfo], folder: Path | None) -> None:
        self.config = config
        self.tensors = dict(tensors)
        self.folder = folder

    def __contains__(self, name: str) -> bool:
        return name in self.tensors

    def __getitem__(self, name: str) -> TensorInfo:
        return self.tensors[name]

    @property
    @abstractmethod
    def identity(self) -> list[Any]:
        """What tells this state of the source from another: names, sizes and times of its files."""

    @abstractmethod
    def read_into(self, info: TensorInfo, start: int, buffer: memoryview) -> None:
        """Fill `buffer` with the tensor's bytes from `start` on."""

    def chunks(self, name: str, start: int = 0, stop: int | None = None, size: int = CHUNK) -> Iterator[memoryview]:
        """The tensor's bytes `start` to `stop`, checked for NaN and Inf. Each piece is valid until the next is asked for."""
        info = self.tensors[name]
        stop = info.nbytes if stop is None else stop
        buffer = memoryview(bytearray(min(size, max(stop - start, 0))))
        while start < stop:
            piece = buffer[: min(size, stop - start)]
            self.read_into(info, start, piece)
            if not is_finite(piece, info.dtype):
                raise ConversionError(
                    f"{info.path or 'source'}: tensor `{name}` holds NaN or Inf. Repair the source: a model with it gives no "
                    "usable logits."
                )
            yield piece
            start += len(piece)

    def tensor(self, name: str) -> Any:
        """The whole tensor, as torch's (imported here)."""
        info = self.tensors[name]
        data, done = bytearray(info.nbytes), 0
        for piece in self.chunks(name):
            data[done : done + len(piece)] = piece
            done += len(piece)
        return as_torch(data, info.dtype).view(info.shape)


class SafetensorsCheckpoint(Checkpoint):
    """A folder with `model.safetensors`, or with shards and their index."""

    def __init__(self, folder: Path, config: dict[str, Any]) -> None:
        tensors: dict[str, TensorInfo] = {}
        self.files = _weight_files(folder, "model.safetensors")
        for path, listed in self.files.items():
            found = read_header(path)
            if listed is not None and listed - set(found):
                raise ConversionError(f"{path}: the index lists `{min(listed - set(found))}` here, but it is not in the file.")
            tensors |= found if listed is None else {name: found[name] for name in found if name in listed}
        super().__init__(config, tensors, folder)
        self._open: dict[Path, int] = {}

    @property
    def identity(self) -> list[Any]:
        return [file_identity(path) for path in self.files]

    def read_into(self, info: TensorInfo, start: int, buffer: memoryview) -> None:
        assert info.path is not None
        if info.path not in self._open:
            self._open[info.path] = os.open(info.path, os.O_RDONLY)
        done = 0
        while done < len(buffer):
            read = os.preadv(self._open[info.path], [buffer[done:]], info.offset + start + done)
            if not read:
                raise ConversionError(f"{info.path}: the file ends within tensor `{info.name}`. Fetch it again.")
            done += read

    def __del__(self) -> None:
        for descriptor in getattr(self, "_open", {}).values():
            os.close(descriptor)


class TensorsCheckpoint(Checkpoint):
    """Tensors that are in memory, or mapped into it (`.bin`)."""

    def __init__(
        self, config: dict[str, Any], tensors: Mapping[str, Any], folder: Path | None = None, identity: list[Any] | None = None
    ) -> None:
        self._tensors = {name: tensor.detach() for name, tensor in tensors.items()}
        infos = {name: TensorInfo(name, dtype_name(t.dtype), tuple(t.shape)) for name, t in self._tensors.items()}
        super().__init__(config, infos, folder)
        self._identity = identity

    @cached_property
    def _digest(self) -> str:
        """Of all values, for models in memory: nothing else tells two of them apart."""
        digest = hashlib.blake2b(digest_size=16)
        for name in self.tensors:
            digest.update(name.encode())
            for start in range(0, self.tensors[name].nbytes, CHUNK):
                digest.update(self._bytes(name)[start : start + CHUNK])
        return digest.hexdigest()

    @property
    def identity(self) -> list[Any]:
        return self._identity if self._identity is not None else [self._digest]

    def _bytes(self, name: str) -> memoryview:
        import torch

        tensor = self._tensors[name].contiguous().cpu()
        return memoryview(tensor.view(-1).view(torch.uint8).numpy())

    def read_into(self, info: TensorInfo, start: int, buffer: memoryview) -> None:
        buffer[:] = self._bytes(info.name)[start : start + len(buffer)]


def open_checkpoint(folder: Path, config: dict[str, Any] | None = None) -> Checkpoint:
    """The checkpoint in a folder: safetensors, or `.bin` files (read with `weights_only`: no code in them is run).

    Raises:
        ConversionError: a file is missing, cut short, damaged, or not what the index says.
    """
    config = read_json(folder / "config.json") if config is None else config
    if (folder / "model.safetensors.index.json").exists() or (folder / "model.safetensors").exists():
        return SafetensorsCheckpoint(folder, config)
    if (folder / "pytorch_model.bin.index.json").exists() or (folder / "pytorch_model.bin").exists():
        return _open_bin(folder, config)
    gguf = sorted(path.name for path in folder.glob("*.gguf"))
    remedy = f"Name one with `gguf_file`, e.g. {gguf[0]}." if gguf else "Give a folder with a Transformers checkpoint."
    raise ConversionError(f"{folder}: no model.safetensors, pytorch_model.bin or index of either. {remedy}")


def read_header(path: Path) -> dict[str, TensorInfo]:
    """Names, dtypes, shapes and places of the tensors of one safetensors file.

    Raises:
        ConversionError: the file is cut short or damaged.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="np"):  # checks that the header is well-formed and covers the file without holes
            pass
        with open(path, "rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(length))
    except (SafetensorError, OSError, ValueError) as error:
        raise ConversionError(f"{path}: not a whole safetensors file ({one_line(error)}). Fetch it again.") from error
    unknown = {entry["dtype"] for name, entry in header.items() if name != "__metadata__"} - set(ITEM_SIZE)
    if unknown:
        raise ConversionError(f"{path}: dtype {min(unknown)} is not known. Known are {', '.join(ITEM_SIZE)}.")
    return {
        name: TensorInfo(name, entry["dtype"], tuple(entry["shape"]), path, 8 + length + entry["data_offsets"][0])
        for name, entry in header.items()
        if name != "__metadata__"
    }


def read_json(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object.

    Raises:
        ConversionError: it is missing or is not that.
    """
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError as error:
        raise ConversionError(f"{path}: no such file. Give a folder with a Transformers checkpoint.") from error
    except (OSError, ValueError) as error:
        raise ConversionError(f"{path}: not readable as JSON ({one_line(error)}).") from error
    if not isinstance(value, dict):
        raise ConversionError(f"{path}: holds a {type(value).__name__}, not an object.")
    return _from_tagged(value)


def json_bytes(content: Mapping[str, Any]) -> bytes:
    """The content of a JSON file, keys sorted."""
    return json.dumps(_to_tagged(content), indent=2, sort_keys=True, default=str).encode() + b"\n"


_TAG = "__float__"  # how Transformers writes the floats that JSON does not have
_TAGGED = {"Infinity": math.inf, "-Infinity": -math.inf, "NaN": math.nan}


def _from_tagged(value: Any) -> Any:
    if isinstance(value, dict):
        if set(value) == {_TAG}:
            return _TAGGED.get(value[_TAG], value)
        return {name: _from_tagged(item) for name, item in value.items()}
    return [_from_tagged(item) for item in value] if isinstance(value, list) else value


def _to_tagged(value: Any) -> Any:
    if isinstance(value, float) and not math.isfinite(value):
        return {_TAG: "NaN" if math.isnan(value) else "Infinity" if value > 0 else "-Infinity"}
    if isinstance(value, Mapping):
        return {name: _to_tagged(item) for name, item in value.items()}
    return [_to_tagged(item) for item in value] if isinstance(value, (list, tuple)) else value


def is_finite(piece: memoryview, dtype: str) -> bool:
    """Whether no value is NaN or Inf (dtypes that are not floating have none)."""
    if dtype in ("F32", "F64"):
        values = np.frombuffer(piece, dtype=np.float32 if dtype == "F32" else np.float64)
        with np.errstate(over="ignore", invalid="ignore"):
            # a sum is as fast as memory, and finite only if all are; if it is not, large values may have been too much for it
            return bool(np.isfinite(values.sum()) or np.isfinite(values).all())
    exponent = {"BF16": 0x7F80, "F16": 0x7C00}.get(dtype)
    if exponent is None:
        return True
    bits = np.frombuffer(piece, dtype=np.uint16) & np.uint16(exponent)
    return bits.size == 0 or int(bits.max()) != exponent


def as_torch(data: Any, dtype: str) -> Any:
    """Bytes as a flat torch tensor of safetensors' dtype name; it may share the bytes' memory."""
    import torch

    kind = torch_dtype(dtype)
    return (
        torch.frombuffer(bytearray(data) if isinstance(data, bytes) else data, dtype=kind)
        if len(data)
        else torch.empty(0, dtype=kind)
    )


def torch_dtype(name: str) -> Any:
    """torch's dtype of safetensors' name."""
    import torch

    return getattr(torch, TORCH_NAMES[name])


def dtype_name(dtype: Any) -> str:
    """safetensors' name of a torch dtype."""
    short = str(dtype).removeprefix("torch.")
    for name, torch_name in TORCH_NAMES.items():
        if torch_name == short:
            return name
    raise ConversionError(f"dtype {short} cannot be written to safetensors.")


TORCH_NAMES = {
    "F64": "float64", "F32": "float32", "F16": "float16", "BF16": "bfloat16", "I64": "int64", "I32": "int32", "I16": "int16",
    "I8": "int8", "U64": "uint64", "U32": "uint32", "U16": "uint16", "U8": "uint8", "BOOL": "bool",
    "F8_E4M3": "float8_e4m3fn", "F8_E5M2": "float8_e5m2", "F8_E8M0": "float8_e8m0fnu", "C64": "complex64",
}  # fmt: skip


def _weight_files(folder: Path, single: str) -> dict[Path, set[str] | None]:
    """The weight files of a folder, with the names that the index lists in each (`None`: there is no index)."""
    index = folder / f"{single}.index.json"
    if not index.exists():
        return {folder / single: None}
    weight_map = read_json(index).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise ConversionError(f"{index}: has no `weight_map` of tensor names to files.")
    files: dict[Path, set[str] | None] = {}
    for name, file in sorted(weight_map.items(), key=lambda item: str(item[1])):
        if not isinstance(file, str) or Path(file).name != file:
            raise ConversionError(f"{index}: `weight_map` names {file!r} for `{name}`, which is not a file of the folder.")
        path = folder / file
        if path not in files and not path.exists():
            raise ConversionError(f"{path}: the shard is missing (named by {index.name}). Fetch it.")
        listed = files.setdefault(path, set())
        assert listed is not None
        listed.add(name)
    return files


def _open_bin(folder: Path, config: dict[str, Any]) -> Checkpoint:
    import torch

    tensors: dict[str, Any] = {}
    files = _weight_files(folder, "pytorch_model.bin")
    for path in files:
        try:
            # files of before torch 1.6 are no zip, and cannot be mapped
            loaded = torch.load(path, map_location="cpu", weights_only=True, mmap=zipfile.is_zipfile(path))
        except Exception as error:  # torch, pickle and zip each have errors of their own
            raise ConversionError(f"{path}: not readable as tensors alone ({one_line(error)}).") from error
        if not isinstance(loaded, dict):
            raise ConversionError(f"{path}: holds a {type(loaded).__name__}, not tensors by name.")
        tensors |= {name: value for name, value in loaded.items() if isinstance(value, torch.Tensor)}
    return TensorsCheckpoint(config, tensors, folder, [file_identity(path) for path in files])


def file_identity(path: Path) -> list[Any]:
    """What tells a state of a file from another: its name, size and time."""
    status = path.stat()
    return [path.name, status.st_size, status.st_mtime_ns]
