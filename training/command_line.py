# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""The options of `hf-moe train`, from the command line and a config file."""

from __future__ import annotations

import dataclasses
import difflib
import json
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NoReturn

from transformers import HfArgumentParser

from .arguments import DataArguments, ModelArguments
from .trainer import MoETrainingArguments

CONFIG_ENDINGS = (".yaml", ".yml", ".json")


@dataclass
class FinetuneArguments(MoETrainingArguments):
    """`MoETrainingArguments` with the defaults that a fine-tuning run wants."""

    output_dir: str = field(metadata={"help": "Folder for the checkpoint, the metrics and the picture."})
    logging_steps: float = field(default=10, metadata={"help": "Log, and write a row of the expert load, so often."})
    # a held-out pass would otherwise keep the logits of every token
    prediction_loss_only: bool = field(default=True, metadata={"help": "Evaluate loss and perplexity only."})


@dataclass(frozen=True)
class Options:
    """What the command was told.

    Attributes:
        model: which model.
        data: which text.
        upcycle: options of the upcycling that were given, by name with their prefix.
        training: how to train.
    """

    model: ModelArguments
    data: DataArguments
    upcycle: dict[str, Any]
    training: FinetuneArguments


class _Parser(HfArgumentParser):
    """Errors as exceptions, and no option by its first letters."""

    def error(self, message: str) -> NoReturn:
        raise ValueError(message)


def parse(argv: list[str], upcycle_fields: list[tuple[str, Any, Any]]) -> Options:
    """The options of a command line, which may name a config file: first of all, or with `--config`.

    Args:
        argv: words.
        upcycle_fields: name, type and field of the options of upcycling.

    Raises:
        ValueError: an option or a field of the file is not known, or has a value that is not allowed.
    """
    upcycle_class = dataclasses.make_dataclass("UpcycleArguments", upcycle_fields)
    classes: Any = [ModelArguments, DataArguments, upcycle_class, FinetuneArguments]
    parser = _Parser(classes, prog="hf-moe train", allow_abbrev=False)
    config, words = _split_config(argv)
    names = {item.name for kind in classes for item in dataclasses.fields(kind) if item.init}
    if config is not None:
        _set_defaults(parser, _read_config(Path(config), names))
    *parsed, unknown = parser.parse_args_into_dataclasses(words, return_remaining_strings=True, look_for_args_file=False)
    if unknown:
        raise ValueError(f"`{unknown[0]}` is not an option. {_remedy(unknown[0].lstrip('-'), names)}")
    model, data, upcycle, training = parsed
    given = {name: value for name, value in dataclasses.asdict(upcycle).items() if value is not None}
    return Options(model, data, given, training)


def _split_config(argv: list[str]) -> tuple[str | None, list[str]]:
    """The config file that is named, and the other words."""
    if argv and not argv[0].startswith("-") and argv[0].endswith(CONFIG_ENDINGS):
        return argv[0], argv[1:]
    for i, word in enumerate(argv):
        if word == "--config":
            if i + 1 == len(argv):
                raise ValueError("`--config` names no file. Give one of YAML or JSON.")
            return argv[i + 1], [*argv[:i], *argv[i + 2 :]]
        if word.startswith("--config="):
            return word.partition("=")[2], [*argv[:i], *argv[i + 1 :]]
    return None, argv


def _read_config(path: Path, names: set[str]) -> dict[str, Any]:
    """The options of a file, by name."""
    try:
        text = path.read_text(encoding="utf-8")
        if path.suffix == ".json":
            content = json.loads(text)
        else:
            import yaml

            content = yaml.safe_load(text)
    except OSError as error:
        raise ValueError(f"`--config`={str(path)!r} cannot be read ({error.strerror}). Give a YAML or JSON file.") from error
    except Exception as error:  # yaml and json have errors of their own
        raise ValueError(f"`--config`={str(path)!r} is not YAML or JSON ({' '.join(str(error).split())[:160]}).") from error
    if not isinstance(content, dict) or not all(isinstance(key, str) for key in content):
        raise ValueError(
            f"`--config`={str(path)!r} holds no mapping of options to values. Write lines such as `max_steps: 100`."
        )
    options = {key.replace("-", "_"): value for key, value in content.items()}
    for name in options:
        if name not in names:
            raise ValueError(f"`--config`={str(path)!r}: `{name}` is not an option. {_remedy(name, names)}")
    return options


def _set_defaults(parser: HfArgumentParser, options: dict[str, Any]) -> None:
    """Have options of a file stand for those that the command line lacks; text is parsed as there."""
    parser.set_defaults(**options)
    for action in parser._actions:
        if action.dest in options:
            action.required = False


def _remedy(name: str, names: set[str]) -> str:
    close = difflib.get_close_matches(name.replace("-", "_").partition("=")[0], sorted(names), n=1)
    return f"Did you mean `--{close[0]}`?" if close else "See `hf-moe train --help`."
