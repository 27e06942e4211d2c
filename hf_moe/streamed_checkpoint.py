# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""An ordinary checkpoint for the Hub, of a model that no rank holds: written and read tensor by tensor.

The files are those that `save_pretrained` writes in one process: the same names on disk, shards, index, config and code. The
first rank writes; it holds one tensor at a time (all experts of a layer in one projection), the others nothing but their part.
"""

from __future__ import annotations

import shutil
from collections import defaultdict
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from copy import deepcopy
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn
from torch.distributed.fsdp import FSDPModule
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
)
from transformers.utils import logging
from transformers.utils.hub import create_and_tag_model_card

from .checkpoint_files import FilePlan, beside, files_by_name, read_tensor, remove_old_shards
from .tensor_pieces import Pieces, clean_name, expert_orders, gather_to_first, model_tensors, reshard

_OF_REPOSITORY = ("private", "repo_type", "space_sdk", "resource_group_id")
# What a checkpoint of a training has beside the files of a model.
_OF_TRAINING = (
    "optimizer*",
    "scheduler.pt",
    "scaler.pt",
    "rng_state*",
    "trainer_state.json",
    "training_args.bin",
    "*.safetensors*",
)


def save_expert_parallel(
    model: PreTrainedModel,
    folder: str | Path,
    max_shard_size: int | str = "50GB",
    *,
    push_to_hub: bool = False,
    **kwargs: Any,
) -> None:
    """What `save_pretrained` does in one process, for a model that is spread over ranks. All ranks call it.

    Args:
        model: sharded by `from_pretrained(distributed_config=…)` or `load_expert_parallel`.
        folder: to write to; the first rank does. Every file is written beside and renamed.
        max_shard_size: of a file, in bytes or as in `"5GB"`.
        push_to_hub: upload the folder afterwards.
        kwargs: what else `save_pretrained` takes; those of an upload are used with `push_to_hub`.

    Raises:
        ValueError: `state_dict` or `distributed_checkpoint` is given, or the model has adapters or is quantised.
    """
    for option in ("state_dict", "distributed_checkpoint"):
        if kwargs.pop(option, None):
            raise ValueError(f"`{option}` cannot be given for an expert-parallel model. Leave it out.")
    if getattr(model, "_hf_peft_config_loaded", False):
        raise ValueError("The model has adapters (`add_adapter`). Use a `PeftModel`, which saves them alone.")
    if getattr(model, "hf_quantizer", None) is not None:
        raise ValueError("The model is quantised, which cannot be saved from several ranks. Save it in one process.")
    folder, first = Path(folder), _is_first()
    original, variant = kwargs.pop("save_original_format", True), kwargs.pop("variant", None)
    reshard(model)
    tensors, orders = model.state_dict(), expert_orders(model)
    plan = FilePlan(model, {name: t.dtype for name, t in tensors.items()}, max_shard_size, original, variant)
    if first:
        folder.mkdir(parents=True, exist_ok=True)
    with beside(folder) if first else nullcontext() as target:
        if target is not None:
            save_all_but_weights(model, target)
        plan.write(lambda name: gather_to_first(tensors[name], orders.get(clean_name(name))), target)
    if first:
        remove_old_shards(folder, plan)
    if push_to_hub and first:
        _upload(model, folder, kwargs)
    if dist.is_initialized():
        dist.barrier()


def save_all_but_weights(model: PreTrainedModel, folder: str | Path) -> None:
    """What `save_pretrained` writes in one process beside the weights: configs and code. One rank calls it."""
    with _as_in_one_process(model):
        type(model).save_pretrained(model, folder, state_dict={})


def consolidate_from(
    fetch: Callable[[str], Tensor], dtypes: Mapping[str, torch.dtype], checkpoint: Path, out: Path, max_shard_size: int | str
) -> None:
    """Write a checkpoint for the Hub from tensors that are fetched one by one.

    Args:
        fetch: the tensor of a parameter or buffer, by its name in the model.
        dtypes: of the tensors that there are.
        checkpoint: folder with `config.json` and what else belongs to the model (code, tokenizer), which is copied.
        out: folder to write to.
        max_shard_size: of a file.
    """
    model = _empty_model(checkpoint)
    own = _canonical_names(model)
    absent = sorted(set(own.values()) - dtypes.keys())
    if absent:
        raise ValueError(f"{checkpoint}: {absent[0]} is not in it. (Of a training of adapters, the base model is not saved.)")
    out.mkdir(parents=True, exist_ok=True)
    plan = FilePlan(model, {name: dtypes[saved] for name, saved in own.items()}, max_shard_size, True, None)
    with beside(out) as target:
        for path in checkpoint.iterdir():
            if path.is_file() and not path.name.startswith(".") and not any(path.match(p) for p in _OF_TRAINING):
                shutil.copyfile(path, target / path.name)
        plan.write(lambda name: fetch(own[name]), target)
    remove_old_shards(out, plan)


def load_hub_weights(model: PreTrainedModel, folder: str | Path) -> None:
    """Load an ordinary checkpoint into a model that is spread over ranks, as it is, tensor by tensor. All ranks call it.

    Args:
        model: whose parameters get their part of the tensors.
        folder: with safetensors files, whose names are those of the disk.

    Raises:
        ValueError: there is no such file, or a parameter is not in it.
    """
    files = files_by_name(Path(folder))
    tensors, orders, tied = model_tensors(model), expert_orders(model), _canonical_names(model)
    mapping = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    sources: dict[str, list[tuple[str, str | None]]] = defaultdict(list)  # of each name in the model
    for name in sorted(files, key=dot_natural_key):
        target, pattern = (name, None) if name in tied else rename_source_key(name, renamings, converters)
        sources[target].append((name, pattern))
    loaded = set()
    for target, parts in logging.tqdm(sources.items(), desc="Loading weights", disable=not _is_first()):
        if parts[0][1] is None:
            whole = {target: read_tensor(files[parts[0][0]], parts[0][0])}
        else:
            converter: Any = deepcopy(by_pattern[parts[0][1]])
            for name, pattern in parts:
                converter.add_tensor(target, name, pattern, read_tensor(files[name], name))
            whole = {t: v[0] if isinstance(v, list) else v for t, v in converter.convert(target, model=model).items()}
        for name, tensor in whole.items():
            own = tied.get(name)
            if own is not None:
                Pieces(tensors[own], orders.get(own)).copy_from(tensor)
                loaded.add(own)
    absent = sorted(tensors.keys() - loaded)
    if absent:
        raise ValueError(f"{folder}: {absent[0]} is not in it. Give a whole checkpoint of this model.")


def _canonical_names(model: nn.Module) -> dict[str, str]:
    """Of each name of the state dict, the one that `model_tensors` has for it: a tied parameter has several."""
    first = {id(tensor): name for name, tensor in model_tensors(model).items()}
    every = model.state_dict(keep_vars=True)
    return {clean_name(name): first[id(tensor)] for name, tensor in every.items() if id(tensor) in first}


@contextmanager
def _as_in_one_process(model: PreTrainedModel) -> Iterator[None]:
    """Inside, the model looks as if it were not sharded, so that Transformers saves all but its weights as it does then.

    FSDP2 gives a model a class of its own, in a module of torch: its file would be copied as the model's code.
    """
    sharded: Any = type(model)
    config = model.config
    distributed = vars(config).pop("distributed_config", None)
    marked = vars(model).pop("_is_distributed_loading_by_transformers", None)
    model.__class__ = next(cls for cls in sharded.__mro__ if not issubclass(cls, FSDPModule))
    try:
        yield
    finally:
        model.__class__ = sharded
        if marked is not None:
            model._is_distributed_loading_by_transformers = marked
        if distributed is not None:
            config.distributed_config = distributed


def _empty_model(checkpoint: Path) -> PreTrainedModel:
    """The model of a checkpoint's config, without weights."""
    import transformers

    from .auto import MoEForCausalLM, MoEModel

    config = transformers.AutoConfig.from_pretrained(checkpoint)
    name = (config.architectures or ["none"])[0]
    ours: dict[str, Any] = {cls.__name__: cls for cls in (MoEForCausalLM, MoEModel)}
    cls = ours.get(name) or getattr(transformers, name, None)
    if cls is None:
        raise ValueError(
            f"{checkpoint}: `architectures` in its config is {name!r}, which is not known. Name the model's class."
        )
    with torch.device("meta"):
        return cls(config)


def _upload(model: PreTrainedModel, folder: Path, options: Mapping[str, Any]) -> None:
    """Upload a folder as `save_pretrained(push_to_hub=True)` does."""
    from huggingface_hub import HfApi

    of_repository = {name: value for name, value in options.items() if name in _OF_REPOSITORY}
    name, token = options.get("repo_id") or folder.name, options.get("token")
    repository = HfApi().create_repo(name, exist_ok=True, token=token, **of_repository).repo_id
    create_and_tag_model_card(repository, model.model_tags, token=token).save(folder / "README.md")
    of_commit: dict[str, Any] = {"commit_message": options.get("commit_message"), "create_pr": bool(options.get("create_pr"))}
    model._upload_modified_files(folder, repository, files_timestamps={}, token=token, **of_commit)


def _is_first() -> bool:
    return not dist.is_initialized() or dist.get_rank() == 0


__all__ = ["consolidate_from", "load_hub_weights", "save_all_but_weights", "save_expert_parallel"]
