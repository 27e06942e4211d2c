# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""What of a folder goes to the Hub, checked to be a checkpoint that can be loaded."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from .checkpoint import Checkpoint, CheckpointError, code_files

TOKENIZER = (
    "tokenizer*", "special_tokens_map.json", "added_tokens.json", "vocab.*", "merges.txt", "*.tiktoken", "spiece.model",
    "sentencepiece*.model", "tekken.json", "chat_template.*", "additional_chat_templates/*.jinja", "processor_config.json",
    "preprocessor_config.json",
)  # fmt: skip
# What a training or a report leaves.
OF_RUN = (
    "metrics.json",
    "trainer_state.json",
    "expert_load.safetensors",
    "*.png",
    "report/*.png",
    "report/*.html",
    "report/*.json",
)
# All else stays here: optimizer states, logs, scraps.
_ALONG = (*TOKENIZER, "generation_config.json", "LICENSE*", "LICENCE*", "NOTICE*", "recipe.yaml", "*_report.json", *OF_RUN)
# Files that would be loaded in the place of new ones, if they stayed in the repository.
WEIGHTS = ("model*.safetensors", "model.safetensors.index.json", "pytorch_model*.bin", "pytorch_model.bin.index.json",
           "adapter_model.*", "adapter_config.json")  # fmt: skip
_LARGEST = 50 * 10**9  # bytes of one file that the Hub takes


def files_to_push(checkpoint: Checkpoint) -> dict[str, Path]:
    """The files of a checkpoint's folder that are uploaded, but for README.md, by their path in the repository.

    Raises:
        CheckpointError: one is missing, or larger than the Hub takes.
    """
    folder = checkpoint.folder
    needed = [*checkpoint.files, "adapter_config.json" if checkpoint.is_adapter else "config.json"]
    needed += [] if checkpoint.is_adapter else code_files(folder, checkpoint.config)
    files = {name: folder / name for name in [*needed, *matching(folder, _ALONG)]}
    for path in files.values():
        size = path.stat().st_size
        if size > _LARGEST:
            raise CheckpointError(
                f"{path}: {size / 1e9:.1f} GB is more than the Hub takes in one file ({_LARGEST / 1e9:.0f} GB). Save the model "
                "with a smaller `max_shard_size`."
            )
    return files


def check_loadable(checkpoint: Checkpoint) -> list[str]:
    """Check that the tensors are those that the model's class expects, by loading it without reading its weights.

    An adapter, and a class that comes with code of the checkpoint's own, is not loaded.

    Returns:
        What is worth knowing, a sentence each.

    Raises:
        CheckpointError: a tensor is missing, or of another shape.
    """
    folder, config = checkpoint.folder, checkpoint.config
    if checkpoint.is_adapter:
        base = config.get("base_model_name_or_path")
        is_path = isinstance(base, str) and (os.path.isabs(base) or Path(base).exists())
        return [f"adapter_config.json names a folder of this machine as the base model: {base}."] if is_path else []
    from transformers import CONFIG_MAPPING, AutoModelForCausalLM
    from transformers.utils import logging

    import hf_moe.auto  # noqa: F401  registers our class

    if config.get("model_type") not in CONFIG_MAPPING and config.get("auto_map"):
        return [f"`model_type`={config.get('model_type')!r} is a class with code of its own, which was not run to check it."]
    verbosity = logging.get_verbosity()
    logging.set_verbosity(logging.CRITICAL)  # what is wrong is said below, in one line
    try:
        found: dict[str, Any] = _loading_info(AutoModelForCausalLM, folder)
    except Exception as error:  # a config can be wrong in any way
        reason = " ".join(str(error).split())[:200]
        raise CheckpointError(f"{folder}: cannot be loaded ({reason}). Save the model again.") from error
    finally:
        logging.set_verbosity(verbosity)
    for kind, what in (("missing_keys", "missing"), ("mismatched_keys", "of another shape than config.json says")):
        names = sorted(name if isinstance(name, str) else name[0] for name in found.get(kind) or ())
        if names:
            raise CheckpointError(f"{folder}: tensor `{names[0]}` is {what} ({len(names)} in all). Save the model again.")
    unknown = sorted(found.get("unexpected_keys") or ())
    return [f"{len(unknown)} tensors that the class does not use are among the weights: {unknown[0]} …."] if unknown else []


def _loading_info(auto_class: Any, folder: Path) -> dict[str, Any]:
    _, found = auto_class.from_pretrained(
        folder, device_map="meta", output_loading_info=True, ignore_mismatched_sizes=True, trust_remote_code=False
    )
    return found


def matching(folder: Path, patterns: Sequence[str]) -> list[str]:
    """Files of a folder that match one of the patterns, relative to it; what is being written (`.part`) is left out."""
    found = {path for pattern in patterns for path in folder.glob(pattern) if path.is_file() and path.suffix != ".part"}
    return sorted(path.relative_to(folder).as_posix() for path in found)
