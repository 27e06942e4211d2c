# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Where text comes from: files, a folder of `datasets`, or a dataset of the Hub. What cannot be used is refused first."""

from __future__ import annotations

import csv
import glob
import json
from collections.abc import Callable, Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import DataArguments

if TYPE_CHECKING:
    from datasets import Dataset, IterableDataset

FileError = Callable[[str], ValueError]


@dataclass(frozen=True)
class Format:
    """A kind of file.

    Attributes:
        reader: of `datasets`.
        fields: the field names of a file, with the first row's values where that is cheap; `None` where it is not known.
        options: of the reader.
    """

    reader: str
    fields: Callable[[Path], dict[str, Any] | None]
    options: dict[str, Any]


def find_files(option: str, patterns: Iterable[str]) -> list[str]:
    """The files of an option, without a double, checked by their first lines.

    Args:
        option: the option, for messages.
        patterns: paths, or patterns such as `data/*.jsonl`, which are sorted.

    Raises:
        ValueError: one is not there, not of a known kind, empty or damaged, or they are of several kinds.
    """
    files: dict[str, None] = {}
    for pattern in patterns:
        found = (
            [pattern] if Path(pattern).is_file() else sorted(p for p in glob.glob(pattern, recursive=True) if Path(p).is_file())
        )
        if not found:
            what = "matches no file" if glob.has_magic(pattern) else "is not a file"
            raise ValueError(f"`{option}`={pattern!r} {what}. Give the path of a {_KINDS} file.")
        files |= dict.fromkeys(found)
    for file in files:
        if Path(file).suffix not in FORMATS:
            raise ValueError(f"`{option}`={file!r} has an unknown ending. Give a {_KINDS} file.")
    readers = {FORMATS[Path(file).suffix].reader: file for file in files}
    if len(readers) > 1:
        raise ValueError(f"`{option}` names files of several kinds: {', '.join(readers.values())}. Give files of one kind.")
    return list(files)


def check_files(option: str, files: Iterable[str], data: DataArguments) -> None:
    """Check, without reading more than a line of each, that files have what is trained on.

    Raises:
        ValueError: one has not; the message says why and what to do.
    """
    for file in files:
        if not Path(file).stat().st_size:
            raise ValueError(f"`{option}`={file!r} is empty. Give a file with text.")
        try:
            first = FORMATS[Path(file).suffix].fields(Path(file))
        except _NotReadableError as error:
            raise ValueError(f"`{option}`={file!r} {error}") from error
        except Exception as error:  # a damaged parquet file has errors of pyarrow's own
            reason = " ".join(str(error).split())[:160]
            raise ValueError(f"`{option}`={file!r} cannot be read ({reason}). Write it again.") from error
        if first is not None:
            field_of(f"`{option}`={file!r}", first, data)


def field_of(what: str, first: dict[str, Any], data: DataArguments) -> str | None:
    """The field with the text of a dataset, or `None` where it has chats.

    Args:
        what: the data, for messages.
        first: its first row; values may be `...` for not known.
        data: which fields are asked for.

    Raises:
        ValueError: there is no such field, or something else is in it.
    """
    if data.text_field is None and _is_chat(first.get(data.messages_field)):
        return None
    name = data.text_field or "text"
    if first.get(name) is not ... and not isinstance(first.get(name), str):
        chats = f" and no chats in {data.messages_field!r}" if data.text_field is None else ""
        raise ValueError(
            f"{what} has no string field {name!r}{chats} in its first line, but {list(first)}. Name the field with "
            "`--text_field`."
        )
    return name


def open_files(files: list[str], streaming: bool = False) -> Any:
    """The rows of files of one kind, as `datasets` reads them."""
    from datasets import load_dataset

    kind = FORMATS[Path(files[0]).suffix]
    return load_dataset(kind.reader, data_files=[str(f) for f in files], split="train", streaming=streaming, **kind.options)


def open_dataset(data: DataArguments) -> dict[str, Any]:
    """The splits of `--dataset_name`, by name.

    Raises:
        ValueError: it is not there or not readable, or has no split to train on.
    """
    from datasets import DatasetDict, IterableDatasetDict, load_dataset, load_from_disk

    name = str(data.dataset_name)
    folder = Path(name)
    saved = folder.is_dir() and any((folder / file).is_file() for file in ("dataset_dict.json", "state.json"))
    try:
        found: Any = load_from_disk(name) if saved else load_dataset(name, data.dataset_config_name, streaming=data.streaming)
    except Exception as error:  # `datasets`, the Hub's client and pyarrow each have errors of their own
        reason = " ".join(str(error).split())[:200]
        raise ValueError(
            f"`--dataset_name`={name!r} cannot be loaded ({reason}). Give a dataset's Hub id, or a folder of `datasets`."
        ) from error
    splits = dict(found) if isinstance(found, (DatasetDict, IterableDatasetDict)) else {data.train_split: found}
    if data.train_split not in splits:
        raise ValueError(f"`--train_split`={data.train_split!r} is not in {name!r}, which has {', '.join(splits)}.")
    if saved and data.streaming:
        splits = {split: rows.to_iterable_dataset() for split, rows in splits.items()}
    return splits


def open_data(data: DataArguments, seed: int) -> dict[str, tuple[str, Dataset | IterableDataset]]:
    """What to train on and, if there is any, to evaluate on: `"train"` and `"eval"`, each with its name for messages.

    Args:
        data: where it is; files have been checked.
        seed: of the documents that are held out.
    """
    rows: dict[str, tuple[str, Any]] = {}
    if data.train_file is not None:
        rows["train"] = (_said("--train_file", data.train_file), open_files(data.train_file, data.streaming))
    else:
        splits = open_dataset(data)
        rows["train"] = (f"`--dataset_name`={data.dataset_name!r}", splits[data.train_split])
        if data.eval_split in splits and data.eval_file is None and data.validation_split_percentage is None:
            rows["eval"] = (f"`--eval_split`={data.eval_split!r}", splits[data.eval_split])
    if data.eval_file is not None:
        rows["eval"] = (_said("--eval_file", data.eval_file), open_files(data.eval_file, data.streaming))
    if data.validation_split_percentage is not None:
        name, whole = rows["train"]
        held_out = round(len(whole) * data.validation_split_percentage / 100)
        if not 0 < held_out < len(whole):
            raise ValueError(
                f"`--validation_split_percentage`={data.validation_split_percentage} of the {len(whole)} documents in {name} "
                f"is {held_out}. Choose another."
            )
        parts = whole.train_test_split(test_size=held_out, seed=seed)
        rows = {"train": (name, parts["train"]), "eval": (f"the {held_out} documents held out of {name}", parts["test"])}
    return rows


def _said(option: str, files: list[str]) -> str:
    return f"`{option}`={files[0]!r}" if len(files) == 1 else f"`{option}` ({len(files)} files, {files[0]!r} …)"


# ---------------------------------------------------------------------- the kinds of files


class _NotReadableError(ValueError):
    """What is wrong with a file, to follow its name."""


def _json_fields(path: Path) -> dict[str, Any] | None:
    with path.open(encoding="utf-8") as file:
        line = next((line for line in file if line.strip()), None)
    if line is None:
        raise _NotReadableError("is empty. Give a file with text.")
    if path.suffix == ".json" and line.lstrip().startswith("["):  # one array, of which the first line need not tell
        return None
    try:
        row = json.loads(line)
    except ValueError as error:
        raise _NotReadableError(f"is not JSON Lines ({error}). Write one object per line.") from error
    if not isinstance(row, dict):
        raise _NotReadableError(f"has no object in its first line, but a {type(row).__name__}. Write one object per line.")
    return row


def _csv_fields(path: Path) -> dict[str, Any]:
    longest = csv.field_size_limit(2**31 - 1)  # by default a text of 128 KiB is refused
    try:
        with path.open(encoding="utf-8", newline="") as file:
            rows = csv.reader(file)
            names, values = next(rows, []), next(rows, None)
    finally:
        csv.field_size_limit(longest)
    if values is None:
        raise _NotReadableError("has no row below its header. Give a file with text.")
    return dict(zip(names, values, strict=False))


def _parquet_fields(path: Path) -> dict[str, Any]:
    import pyarrow.parquet

    file = pyarrow.parquet.ParquetFile(path)
    if not file.metadata.num_rows:
        raise _NotReadableError("has no rows. Give a file with text.")
    types = {field.name: str(field.type) for field in file.schema_arrow}
    # what stands for a value of the type: reading one may take a whole row group
    return {name: ... if kind in ("string", "large_string") else _stand_in(kind) for name, kind in types.items()}


def _stand_in(arrow_type: str) -> Any:
    is_chat = arrow_type.startswith(("list", "large_list")) and "role" in arrow_type and "content" in arrow_type
    return [{"role": ..., "content": ...}] if is_chat else None


def _text_fields(path: Path) -> dict[str, Any]:
    with path.open(encoding="utf-8") as file:
        if not any(line.strip() for line in file):
            raise _NotReadableError("is empty. Give a file with text.")
    return {"text": ...}


def _is_chat(value: Any) -> bool:
    return (
        isinstance(value, list) and bool(value) and all(isinstance(m, dict) and {"role", "content"} <= m.keys() for m in value)
    )


FORMATS = {
    ".jsonl": Format("json", _json_fields, {}),
    ".json": Format("json", _json_fields, {}),
    ".parquet": Format("parquet", _parquet_fields, {}),
    ".csv": Format("csv", _csv_fields, {}),
    ".txt": Format("text", _text_fields, {"sample_by": "paragraph"}),
}
_KINDS = f"{', '.join(list(FORMATS)[:-1])} or {list(FORMATS)[-1]}"
