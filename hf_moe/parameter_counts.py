# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""How many parameters a causal LM has, and how many a token uses: from the names and shapes of its tensors and its config.

Mixtures of Experts of hf_moe and native ones (experts one by one, or stacked in one tensor) and dense models; on disk or in
memory. Needs no torch.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple, Protocol, TypeVar

# What configs call the same thing, the commonest name first.
FIELD_NAMES = {
    "num_layers": ("num_hidden_layers", "n_layer", "n_layers", "num_layers", "decoder_layers"),
    "hidden_size": ("hidden_size", "n_embd", "d_model", "model_dim"),
    "num_heads": ("num_attention_heads", "n_head", "n_heads", "num_heads", "num_query_heads"),
    "num_experts": ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts"),
    "num_experts_per_tok": ("num_experts_per_tok", "num_experts_per_token", "moe_k", "moe_topk", "moe_top_k", "top_k_experts",
                            "experts_per_token", "num_selected_experts", "top_k"),
    "num_shared_experts": ("num_shared_experts", "n_shared_experts", "moe_num_shared_experts", "num_shared_expert"),
}  # fmt: skip
HEAD = re.compile(r"(?:^|\.)(lm_head|embed_out|output_layer|output_projection|head)\.weight$")
LOOKUP = re.compile(r"(?:embed|wte|wpe)[^.]*\.weight$")
SHARED = re.compile(r"(?:^|\.)(shared_experts?|shared_mlp|residual_ffn)\.")

_BUFFER = re.compile(r"(inv_freq|masked_bias|e_score_correction_bias|expert_bias|position_ids|\.attn\.bias|\.attention\.bias)$")
_LAYER = re.compile(r"\.(\d+)\.")
_ONE_EXPERT = re.compile(r"(?:^|\.)experts\.(\d+)\.")
_STACKED_EXPERTS = re.compile(r"(?:^|\.)experts\.(?!\d|act)")
_ROUTER = re.compile(r"\.(gate|router)\.(?!.*_proj)")


class NamedShape(Protocol):
    """A tensor of which only the name and the shape matter."""

    @property
    def name(self) -> str: ...

    @property
    def shape(self) -> tuple[int, ...]: ...


class Shape(NamedTuple):
    """The name and the shape of a parameter."""

    name: str
    shape: tuple[int, ...]


Tensors = TypeVar("Tensors", bound=NamedShape)


class ConfigFields:
    """A config.json, its sub-configs of the language model included, by any of the names that a field has."""

    def __init__(self, config: Mapping[str, Any]) -> None:
        nested = [config[name] for name in ("text_config", "ffn_config") if isinstance(config.get(name), dict)]
        self._levels = [config, *nested]

    def value(self, *names: str) -> Any:
        """The first that is there and not null."""
        return next((level[n] for level in self._levels for n in names if level.get(n) is not None), None)

    def number(self, what: str) -> int | None:
        """One of `FIELD_NAMES`; of a list, the largest."""
        value = self.value(*FIELD_NAMES[what])
        if isinstance(value, list):
            value = max((v for v in value if isinstance(v, int)), default=None)
        return value if isinstance(value, int) and not isinstance(value, bool) else None


@dataclass(frozen=True)
class ParameterCounts:
    """Parameters of a model; what is tied counts once, buffers and the biases that balance routing do not.

    Attributes:
        total: all of them.
        active: that one token uses: all but the experts it is not sent to. `None` where the config does not say K.
        experts: of the routed experts.
        router: of the routers.
        shared: that every token passes beside the routed experts.
        num_experts: number of routed experts by index of the decoder layer; empty in a dense model.
    """

    total: int
    active: int | None
    experts: int
    router: int
    shared: int
    num_experts: dict[int, int]


def count_parameters(tensors: Iterable[NamedShape], config: Mapping[str, Any]) -> ParameterCounts:
    """Count the parameters of a model.

    Args:
        tensors: names and shapes, as on disk or as in memory.
        config: content of config.json.
    """
    fields = ConfigFields(config)
    weights = own_weights(list(tensors), fields)
    num_experts, routed = routed_experts(weights, fields)
    idle = idle_parameters(num_experts, routed, fields)
    routed_names = {t.name for t in routed}
    beside = [t for t in weights if t.name not in routed_names and layer_of(t.name) in num_experts]
    total = _numel(weights)
    return ParameterCounts(
        total=total,
        active=None if idle is None else total - idle,
        experts=_numel(routed),
        router=_numel(t for t in beside if _ROUTER.search(t.name) and not SHARED.search(t.name)),
        shared=_numel(t for t in weights if SHARED.search(t.name)),
        num_experts=num_experts,
    )


def layer_of(name: str) -> int:
    """Index of the decoder layer that a tensor belongs to; -1: none."""
    found = _LAYER.search(name)
    return int(found.group(1)) if found else -1


def own_weights(tensors: Sequence[Tensors], fields: ConfigFields) -> list[Tensors]:
    """Without buffers, layers beyond the last (for predicting several tokens), and a head that is tied and stored anyway."""
    tables = {tuple(t.shape) for t in tensors if LOOKUP.search(t.name) and not HEAD.search(t.name)}
    tied = bool(fields.value("tie_word_embeddings"))
    num_layers = fields.number("num_layers") or math.inf
    return [
        t
        for t in tensors
        if not _BUFFER.search(t.name)
        and layer_of(t.name) < num_layers
        and not (tied and HEAD.search(t.name) and tuple(t.shape) in tables)
    ]


def routed_experts(weights: Iterable[Tensors], fields: ConfigFields) -> tuple[dict[int, int], list[Tensors]]:
    """Number of experts by layer, and the experts' tensors."""
    configured = fields.number("num_experts") or 0
    counts: dict[int, int] = {}
    routed: list[Tensors] = []
    for tensor in weights:
        one, layer = _ONE_EXPERT.search(tensor.name), layer_of(tensor.name)
        stacked, named = len(tensor.shape) == 3, bool(_STACKED_EXPERTS.search(tensor.name)) and configured > 1
        if one:
            counts[layer] = max(counts.get(layer, 0), int(one.group(1)) + 1)
        elif stacked and (named or tensor.shape[0] == configured > 1):
            counts[layer] = tensor.shape[0]
        elif not named:
            continue
        routed.append(tensor)
    for tensor in routed:  # a layer whose experts are all stacked in matrices (DBRX)
        counts.setdefault(layer_of(tensor.name), configured)
    return dict(sorted(counts.items())), routed


def idle_parameters(num_experts: Mapping[int, int], routed: Iterable[NamedShape], fields: ConfigFields) -> int | None:
    """Of the experts that a token is not sent to; `None` where the config does not say how many it is sent to."""
    if not num_experts:
        return 0
    top_k = fields.number("num_experts_per_tok")
    if top_k is None:
        return None
    sizes = dict.fromkeys(num_experts, 0)
    for tensor in routed:
        sizes[layer_of(tensor.name)] += math.prod(tensor.shape)
    return sum(size * max(num_experts[layer] - top_k, 0) // num_experts[layer] for layer, size in sizes.items())


def _numel(tensors: Iterable[NamedShape]) -> int:
    return sum(math.prod(t.shape) for t in tensors)
