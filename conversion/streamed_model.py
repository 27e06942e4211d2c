# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""A model that computes with weights read from disk when they are needed, and dropped after use.

It is built on the meta device, and its parameters are replaced by some that are read whenever a function of torch is given one:
those of linear layers in blocks of rows, of embeddings the rows that are looked up, of stacked experts those that were chosen.
So a checkpoint of any size runs in about the memory of its activations.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Iterable
from typing import Any

import torch
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    dot_natural_key,
    rename_source_key,
)

import hf_moe.auto  # noqa: F401  registers the classes

from .checkpoint_reader import FLOATING, Checkpoint, torch_dtype
from .errors import ConversionError, one_line
from .streamed_parameters import StoredExperts, StoredTensor, StreamedParameter


class NotStreamableError(ValueError):
    """The model's tensors are not those on disk: they are merged or split when they are loaded."""


def streamed_model(
    checkpoint: Checkpoint,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    *,
    compute_dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """A causal LM in evaluation mode whose weights stay on disk.

    Args:
        checkpoint: its tensors, under the names that `from_pretrained` takes.
        config: its config; one of `checkpoint`'s own is not looked at.
        dtype: of the model, which weights are rounded to.
        compute_dtype: wider one that the model then gets, as by `model.to(compute_dtype)`.
        trust_remote_code: allow code that the checkpoint names to be run.

    Raises:
        NotStreamableError: tensors are merged or split on loading in other ways than experts are stacked.
        ConversionError: a tensor is missing, or of another shape.
    """
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(
            config, dtype=dtype, experts_implementation="eager", trust_remote_code=trust_remote_code
        )
    sources = tensor_sources(model, checkpoint.tensors)
    _refuse_missing(model, sources, checkpoint)
    _make_buffers(model, sources, checkpoint)
    own_dtypes = parameter_dtypes(model, dtype)
    if compute_dtype is not None:
        model = nn.Module.to(model, dtype=compute_dtype)
    for name, own in own_dtypes.items():
        path, _, attribute = name.rpartition(".")
        parameters, source, wide = model.get_submodule(path)._parameters, sources[name], compute_dtype or own
        empty = parameters[attribute]
        assert empty is not None
        shape = tuple(empty.shape)
        if isinstance(source, list):
            _check_count(source, shape[0], checkpoint)
            experts = [StoredTensor(checkpoint, names, shape[1:], wide, own) for names in source]
            parameters[attribute] = StreamedParameter.of(empty, StoredExperts(experts))
        else:
            stored = StoredTensor(checkpoint, source, shape, wide, own)
            parameters[attribute] = StreamedParameter.of(empty, stored)
    return model.eval()


def whole_model(
    checkpoint: Checkpoint,
    config: PreTrainedConfig,
    dtype: torch.dtype,
    *,
    compute_dtype: torch.dtype | None = None,
    trust_remote_code: bool = False,
) -> PreTrainedModel:
    """The same model loaded by `from_pretrained`, in as much memory as that takes. Arguments as of `streamed_model`."""
    state = {name: checkpoint.tensor(name) for name in checkpoint.tensors}
    with torch.device("meta"):
        model_class = type(AutoModelForCausalLM.from_config(config, trust_remote_code=trust_remote_code))
    model = model_class.from_pretrained(None, config=config, state_dict=state, dtype=dtype)
    return nn.Module.to(model, dtype=compute_dtype).eval()


def read_config(checkpoint: Checkpoint, trust_remote_code: bool = False) -> PreTrainedConfig:
    """The config object of a checkpoint's config.json. Code that it names is run with `trust_remote_code` only."""
    fields = dict(checkpoint.config)
    if trust_remote_code and "auto_map" in fields and checkpoint.folder is not None:
        return AutoConfig.from_pretrained(checkpoint.folder, trust_remote_code=True)
    fields.pop("auto_map", None)  # or building the model would ask whether its code may be run
    if "model_type" not in fields:
        raise ConversionError(f"{checkpoint.folder}: config.json has no `model_type`. Give a Transformers checkpoint.")
    try:
        return AutoConfig.for_model(**fields)
    except ValueError as error:
        raise ConversionError(f"{checkpoint.folder}: config.json is not one of Transformers ({one_line(error)}).") from error


def own_dtype(checkpoint: Checkpoint) -> torch.dtype:
    """The dtype that `from_pretrained(dtype="auto")` chooses: the config's, else that of most bytes."""
    config = checkpoint.config
    named = next((c[name] for c in (config, config.get("text_config") or {}) for name in ("dtype", "torch_dtype")
                  if isinstance(c.get(name), str)), None)  # fmt: skip
    if named is not None:
        return getattr(torch, named.removeprefix("torch."))
    sizes: dict[str, int] = defaultdict(int)
    for info in checkpoint.tensors.values():
        if info.dtype in FLOATING:
            sizes[info.dtype] += info.nbytes
    return torch_dtype(max(sizes, key=lambda name: sizes[name])) if sizes else torch.float32


def tensor_sources(model: PreTrainedModel, names: Iterable[str]) -> dict[str, tuple[str, ...] | list[tuple[str, ...]]]:
    """Where `from_pretrained` takes each parameter and persistent buffer of a model from.

    Args:
        model: weights may be on the meta device.
        names: of the tensors on disk.

    Returns:
        By name in the model: the one name on disk, or for stacked experts a list with the names (gate, up) of each expert.
        Tied weights have the same source. Tensors that the model does not have are left out.

    Raises:
        NotStreamableError: tensors are merged or split in another way.
    """
    mapping = get_model_conversion_mapping(model)
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    renamings = [entry for entry in mapping if not isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    state, prefix = model.state_dict(), model.base_model_prefix
    sources: dict[str, Any] = {}
    parts: dict[str, dict[str, list[str]]] = defaultdict(lambda: defaultdict(list))
    for name in sorted(names, key=dot_natural_key):
        target, pattern = rename_source_key(name, renamings, converters, prefix, state)  # type: ignore[arg-type]
        if target not in state and name in state:
            target, pattern = rename_source_key(name, [], [], prefix, state)
        if pattern is None and target in state:
            sources[target] = (name,)
        elif pattern is not None:
            if not _stacks_experts(by_pattern[pattern]):
                raise NotStreamableError(f"`{name}` is converted when it is loaded")
            parts[target][pattern].append(name)
    for target, by_part in parts.items():
        order = [by_part[pattern] for pattern in by_pattern[next(iter(by_part))].source_patterns]
        if target in state and len({len(part) for part in order}) == 1:
            sources[target] = list(zip(*order, strict=True))
    for one, other in (model.all_tied_weights_keys or {}).items():
        for missing, present in ((one, other), (other, one)):
            if missing not in sources and present in sources:
                sources[missing] = sources[present]
    return sources


def _stacks_experts(converter: WeightConverter) -> bool:
    stacked = [isinstance(operation, MergeModulelist) and operation.dim == 0 for operation in converter.operations[:1]]
    joined = [isinstance(operation, Concatenate) and operation.dim == 1 for operation in converter.operations[1:]]
    return stacked == [True] and joined in ([], [True])


def _refuse_missing(model: PreTrainedModel, sources: dict[str, Any], checkpoint: Checkpoint) -> None:
    missing = sorted(set(model.state_dict()) - set(sources))
    if missing:
        raise ConversionError(
            f"{checkpoint.folder}: tensor `{missing[0]}` is missing ({len(missing)} in all). A model loaded from it would have "
            "random weights there."
        )


def _make_buffers(model: PreTrainedModel, sources: dict[str, Any], checkpoint: Checkpoint) -> None:
    """Give every buffer its value: from disk, or as Transformers makes those that are not saved (rotary frequencies)."""
    for path, module in model.named_modules():
        made = False
        for name, buffer in module._buffers.items():
            if buffer is None:
                continue
            full = f"{path}.{name}" if path else name
            if full in sources:
                value = StoredTensor(checkpoint, sources[full], tuple(buffer.shape), buffer.dtype).read()
                value._is_hf_initialized = True  # type: ignore[attr-defined]
            else:
                value, made = torch.empty_like(buffer, device="cpu"), True
            module._buffers[name] = value
        if made:
            module._is_hf_initialized = False
    model.initialize_weights()


def parameter_dtypes(model: PreTrainedModel, dtype: torch.dtype) -> dict[str, torch.dtype]:
    """What `from_pretrained` loads each parameter as."""
    keep_fp32 = [pattern.replace("*", ".*") for pattern in model._get_dtype_plan(dtype)]
    return {
        name: torch.float32 if any(re.search(pattern, name) for pattern in keep_fp32) else parameter.dtype
        for name, parameter in model.named_parameters(remove_duplicate=False)
    }


def _check_count(names: list[tuple[str, ...]], expected: int, checkpoint: Checkpoint) -> None:
    if len(names) != expected:
        raise ConversionError(
            f"{checkpoint.folder}: `{names[0][0]}` and the like are of {len(names)} experts, but the config has {expected}."
        )


__all__ = [
    "NotStreamableError",
    "own_dtype",
    "parameter_dtypes",
    "read_config",
    "streamed_model",
    "tensor_sources",
    "whole_model",
]
