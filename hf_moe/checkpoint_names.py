# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""The names that a checkpoint has on disk: the dense model's own, and one tensor per expert and projection.

Fusing them into stacked experts and back is Transformers' `WeightConverter`, which `from_pretrained` and `save_pretrained`
apply. `Trainer` resumes with `load_state_dict`, which does not; `fused_state_dict` applies it there.
"""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Mapping
from copy import deepcopy
from typing import Any

import torch
from torch import Tensor
from transformers import PreTrainedModel
from transformers.conversion_mapping import get_model_conversion_mapping
from transformers.core_model_loading import (
    Concatenate,
    MergeModulelist,
    WeightConverter,
    WeightRenaming,
    dot_natural_key,
    rename_source_key,
    revert_weight_conversion,
)

# Experts without a gate have a name of their own for the up projection, since a name can be converted in one way only.
_FUSED = {
    (r"\.experts.*.gate_proj.weight", r"\.experts.*.up_proj.weight"): r"\.experts.gate_up_proj",
    (r"\.experts.*.gate_proj.bias", r"\.experts.*.up_proj.bias"): r"\.experts.gate_up_proj_bias",
    (r"\.experts.*.plain_up_proj.weight",): r"\.experts.up_proj",
    (r"\.experts.*.plain_up_proj.bias",): r"\.experts.up_proj_bias",
    (r"\.experts.*.down_proj.weight",): r"\.experts.down_proj",
    (r"\.experts.*.down_proj.bias",): r"\.experts.down_proj_bias",
}


class MergeExperts(MergeModulelist):
    """Transformers' stacking of experts, also on a rank of an expert-parallel group that has none of them."""

    def convert(  # type: ignore[override]  # the decorator of Transformers' own hides its signature
        self, input_dict: Any, source_patterns: list[str], target_patterns: list[str], **kwargs: Any
    ) -> Any:
        if any(len(tensors) for tensors in input_dict.values()):
            stack: Any = super().convert
            return stack(input_dict, source_patterns, target_patterns, **kwargs)
        parameter = kwargs["model"].get_parameter(kwargs["full_layer_name"])
        parts = len(input_dict)  # such as gate and up, which are put one above the other next
        empty = torch.empty(0, parameter.shape[1] // parts, *parameter.shape[2:], dtype=parameter.dtype)
        return {self.get_target_pattern(parts, source, target_patterns): empty.clone() for source in list(input_dict)}


def checkpoint_conversion() -> list[WeightConverter | WeightRenaming]:
    """What to register with `register_checkpoint_conversion_mapping`."""
    prefix = WeightRenaming(r"^(?!language_model\.)(.+)", r"language_model.\1")
    fused = [
        WeightConverter(
            source_patterns=list(sources),
            target_patterns=target,
            operations=[MergeExperts(dim=0), *([Concatenate(dim=1)] if len(sources) > 1 else [])],
        )
        for sources, target in _FUSED.items()
    ]
    return [prefix, *fused]


def fused_state_dict(model: PreTrainedModel, state_dict: Mapping[str, Tensor]) -> dict[str, Tensor]:
    """A state dict with a checkpoint's names, in the model's names.

    A shard of a checkpoint may hold a part of a layer's experts; the others are taken from the model as it is.

    Args:
        model: gives the names, and the experts that are not in `state_dict`.
        state_dict: with names of either kind; names that are known to neither are kept.
    """
    mapping = get_model_conversion_mapping(model, add_legacy=False)
    renamings = [entry for entry in mapping if isinstance(entry, WeightRenaming)]
    converters = [entry for entry in mapping if isinstance(entry, WeightConverter)]
    by_pattern = {pattern: converter for converter in converters for pattern in converter.source_patterns}
    own = model.state_dict()

    fused: dict[str, Tensor] = {}
    parts: dict[str, dict[str, Tensor]] = defaultdict(dict)  # of each fused tensor, by name on disk
    for name, value in state_dict.items():
        target, pattern = (name, None) if name in own else rename_source_key(name, renamings, converters)
        if pattern is None or target not in own:
            fused[target if target in own else name] = value
        else:
            parts[target][name] = value
    for target, given in parts.items():
        converter = deepcopy(by_pattern[rename_source_key(next(iter(given)), renamings, converters)[1] or ""])
        complete = {**revert_weight_conversion(model, {target: own[target]}), **given}
        for name in sorted(complete, key=dot_natural_key):
            _, pattern = rename_source_key(name, renamings, converters)
            converter.add_tensor(target, name, pattern or "", complete[name])
        fused |= {t: v[0] if isinstance(v, list) else v for t, v in converter.convert(target, model=model).items()}
    return fused
