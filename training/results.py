# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""What `hf-moe train` leaves in its output folder beside the checkpoint: metrics, picture, lineage, model card; and the Hub."""

from __future__ import annotations

import json
import os
import sys
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .arguments import DataArguments, ModelArguments

if TYPE_CHECKING:
    from .trainer import MoETrainer

METRICS_FILE = "metrics.json"
PICTURE_FILE = "expert_load.png"


def told(model: ModelArguments, data: DataArguments, upcycle: dict[str, Any]) -> dict[str, Any]:
    """What a run was told about its model and data, as `metrics.json` has it."""
    options = {**asdict(model), **asdict(data), **upcycle}
    for name in ("train_file", "eval_file"):
        files = options[name]
        options[name] = files[0] if files and len(files) == 1 else files
    if data.dataset_name is not None and os.path.isdir(data.dataset_name):
        options["dataset_name"] = os.path.abspath(data.dataset_name)  # not to be taken for an id of the Hub
    return options


def write_results(trainer: MoETrainer, results: dict[str, Any], records: dict[str, bytes]) -> None:
    """Write all files, each whole or not at all, and push them if that is asked for.

    Args:
        trainer: after training; its checkpoint is saved.
        results: for `metrics.json`.
        records: files that tell where the model comes from.
    """
    folder = Path(trainer.args.output_dir or ".")
    trainer.save_state()
    for name, content in {**records, METRICS_FILE: (json.dumps(results, indent=1) + "\n").encode()}.items():
        new = folder / f"{name}.new"
        new.write_bytes(content)
        os.replace(new, folder / name)
    _draw(folder)
    _write_card(trainer, folder)
    if "eval_before" in results and "eval_after" in results:
        before, after = (results[f"eval_{when}"] for when in ("before", "after"))
        print(
            f"held-out LM loss: {before['eval_loss']:.4f} before, {after['eval_loss']:.4f} after; perplexity "
            f"{before['eval_perplexity']:.2f} before, {after['eval_perplexity']:.2f} after"
        )
    print(f"wrote {folder}")
    if trainer.args.push_to_hub:
        _push(trainer, folder)


def _draw(folder: Path) -> None:
    from .load_file import LOAD_FILE, read_expert_load
    from .plots import plot_expert_load

    path = folder / LOAD_FILE
    if path.exists() and read_expert_load(path).steps:
        try:
            plot_expert_load(path, folder / PICTURE_FILE)
        except ImportError as error:
            print(f"hf-moe train: no picture. {error}", file=sys.stderr)


def _write_card(trainer: MoETrainer, folder: Path) -> None:
    from hf_moe import model_cards

    try:
        model_cards.save_card(folder, trainer=trainer)
    except (ValueError, ImportError) as error:  # the training is done, and what it made is saved
        print(f"hf-moe train: no model card. {error}", file=sys.stderr)


def _push(trainer: MoETrainer, folder: Path) -> None:
    from hf_moe import model_cards

    args = trainer.args
    repo_id = trainer.hub_model_id or args.hub_model_id or folder.absolute().name
    try:
        pushed = model_cards.push_to_hub(folder, repo_id, token=args.hub_token, private=args.hub_private_repo)
    except Exception as error:  # as above; the Hub's client has many errors
        print(f"hf-moe train: not pushed to {repo_id}: {error}", file=sys.stderr)
    else:
        print(pushed)
