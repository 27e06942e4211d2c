# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""How large the parts of a Mixture-of-Experts are, as FSDP2 shards them: from a few numbers, or from a checkpoint's headers.

Needs no torch: a plan is for machines that are not here.
"""

from __future__ import annotations

import json
import math
import os
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, NamedTuple

from hf_moe.parameter_counts import (
    FIELD_NAMES,
    HEAD,
    LOOKUP,
    SHARED,
    ConfigFields,
    Shape,
    layer_of,
    own_weights,
    routed_experts,
)

Shapes = tuple[tuple[int, ...], ...]
_LARGEST_HEADER = 100_000_000
_ROUTER = re.compile(r"\.(gate|router)\.(?!.*_proj)")


class Part(NamedTuple):
    """Parameters that FSDP2 gathers and reduces together.

    Attributes:
        name: what it is.
        shapes: of its parameters; each is sharded along its first dimension.
        kept: whether it stays gathered from forward to backward (the head).
        fp32: whether it is fp32 whatever the model's dtype (the routers).
        again: whether another part holds the parameters (a head that is the embedding lies in FSDP2's root group, too).
    """

    name: str
    shapes: Shapes
    kept: bool = False
    fp32: bool = False
    again: bool = False

    @property
    def numel(self) -> int:
        return sum(map(math.prod, self.shapes))

    def sharded(self, ranks: int) -> int:
        """Parameters on each of so many ranks, padding included."""
        return sum(-(-shape[0] // ranks) * math.prod(shape[1:]) for shape in self.shapes)


@dataclass(frozen=True)
class ModelSizes:
    """A MoE model, as far as memory, traffic and time depend on it.

    Attributes:
        hidden: D.
        top_k: K.
        num_experts: E of each MoE layer, first to last.
        expert: shapes of the parameters of one expert.
        expert_width: F.
        dense: everything else, part by part; the parts of a decoder layer follow each other.
        num_layers: decoder layers, dense ones included.
        shared_width: width of what every token passes beside the routed experts, in the MoE layers.
        attention_width: heads × head size.
        vocab: rows of the embedding.
        capacity_factor: of the experts; `None` is dropless.
    """

    hidden: int
    top_k: int
    num_experts: tuple[int, ...]
    expert: Shapes
    expert_width: int
    dense: tuple[Part, ...]
    num_layers: int
    shared_width: int
    attention_width: int
    vocab: int
    capacity_factor: float | None = None

    @property
    def expert_numel(self) -> int:
        """Parameters of one expert."""
        return sum(map(math.prod, self.expert))

    @property
    def total(self) -> int:
        """All parameters."""
        return sum(part.numel for part in self.dense if not part.again) + sum(self.num_experts) * self.expert_numel

    @property
    def active(self) -> int:
        """Those that a token passes."""
        return self.total - sum(max(0, e - self.top_k) for e in self.num_experts) * self.expert_numel

    def experts(self, count: int) -> Part:
        """So many experts, stacked."""
        return Part("experts", tuple((count, *shape) for shape in self.expert))


def model_sizes(
    *,
    hidden: int,
    experts: int,
    top_k: int,
    layers: int = 32,
    expert_width: int | None = None,
    dense_layers: int = 0,
    intermediate: int | None = None,
    shared_experts: int = 0,
    vocab: int = 32768,
    heads: int | None = None,
    kv_heads: int | None = None,
    head_dim: int | None = None,
    tied: bool = False,
    gated: bool = True,
    capacity_factor: float | None = None,
) -> ModelSizes:
    """Sizes of a Llama-like decoder whose FFNs are experts.

    Args:
        hidden: D.
        experts: E of each MoE layer.
        top_k: K.
        layers: decoder layers.
        expert_width: F (default: 4·D / K, so that a token passes as much as in a dense model).
        dense_layers: how many of the layers stay dense.
        intermediate: width of their FFN (default: 4·D).
        shared_experts: experts of width F that every token passes.
        vocab: rows of the embedding.
        heads, kv_heads, head_dim: of attention (default: heads of 128, 8 of them for keys and values).
        tied: whether the head is the embedding.
        gated: whether a FFN has a gate.
        capacity_factor: of the experts; `None` is dropless.

    Raises:
        ValueError: a number is not positive, or two do not go together.
    """
    given = {"hidden": hidden, "experts": experts, "top_k": top_k, "layers": layers, "expert_width": expert_width,
             "intermediate": intermediate, "vocab": vocab, "heads": heads, "kv_heads": kv_heads, "head_dim": head_dim,
             "capacity_factor": capacity_factor}  # fmt: skip
    for name, value in given.items():
        if value is not None and not value > 0:
            raise ValueError(f"`{name}`={value} must be positive.")
    if top_k > experts:
        raise ValueError(f"`top_k`={top_k} is more than `experts`={experts}. Choose at most as many.")
    if not 0 <= dense_layers < layers:
        raise ValueError(f"`dense_layers`={dense_layers} must be from 0 to {layers - 1}: one layer at least has experts.")
    if shared_experts < 0:
        raise ValueError(f"`shared_experts`={shared_experts} must not be negative.")
    heads = heads or max(1, hidden // (head_dim or 128))
    head_dim = head_dim or max(1, hidden // heads)
    kv_heads = kv_heads or min(8, heads)
    width = expert_width or max(1, 4 * hidden // top_k)
    attention = ((heads * head_dim, hidden), (kv_heads * head_dim, hidden), (kv_heads * head_dim, hidden),
                 (hidden, heads * head_dim), (hidden,), (hidden,))  # fmt: skip
    shared = _ffn(hidden, shared_experts * width, gated) if shared_experts else ()
    dense = [Part("embedding", ((vocab, hidden),))] if not tied else []
    dense += [Part("layer", attention + _ffn(hidden, intermediate or 4 * hidden, gated))] * dense_layers
    dense += [Part("layer", attention + shared), Part("router", ((experts, hidden),), fp32=True)] * (layers - dense_layers)
    dense.append(Part("head", ((hidden,), (vocab, hidden)), kept=True))
    dense += [_tied_head(vocab, hidden)] if tied else []
    return ModelSizes(
        hidden=hidden, top_k=top_k, num_experts=(experts,) * (layers - dense_layers), expert=_stacked(hidden, width, gated),
        expert_width=width, dense=tuple(dense), num_layers=layers, shared_width=shared_experts * width,
        attention_width=heads * head_dim, vocab=vocab, capacity_factor=capacity_factor,
    )  # fmt: skip


def sizes_of_checkpoint(path: str | os.PathLike[str], experts: int | None = None, **changes: Any) -> ModelSizes:
    """Sizes of a checkpoint, of the headers of its safetensors files where they are there, else of its config.json.

    Args:
        path: a folder, or a config.json.
        experts: of a dense model: E of the MoE that it would become.
        changes: `top_k`, `expert_width`, `shared_experts`, `capacity_factor`: other values than the config's.

    Raises:
        ValueError: it cannot be read, is dense and `experts` is not given, or lacks a size.
    """
    folder = Path(path)
    config_file = folder / "config.json" if folder.is_dir() else folder
    config = _read_json(config_file)
    fields = ConfigFields(config)
    changes = {name: value for name, value in changes.items() if value is not None}
    files = sorted(config_file.parent.glob("*.safetensors"))
    if not files:
        return _of_config(config_file, fields, experts, changes)
    shapes = [Shape(name, tuple(entry["shape"])) for file in files for name, entry in _header(file).items()]
    return _of_tensors(config_file, shapes, fields, experts, changes)


def _of_config(file: Path, fields: ConfigFields, experts: int | None, changes: dict[str, Any]) -> ModelSizes:
    """As of a Llama-like model with the sizes that config.json names."""
    top_k, width = _routing(file, fields, experts, changes)
    layers = _required(file, fields, "num_layers")
    own = fields.number("num_experts") or 0
    listed = fields.value(*FIELD_NAMES["num_experts"])
    pyramid = listed if isinstance(listed, list) else None
    shared = changes.get("shared_experts", fields.number("num_shared_experts") or 0)
    num_moe = len(_moe_layers(fields, layers)) if own > 1 else layers
    sizes = model_sizes(
        hidden=_required(file, fields, "hidden_size"), experts=own if own > 1 else experts or 1, top_k=top_k, layers=layers,
        expert_width=width, dense_layers=layers - num_moe, intermediate=_width(fields), shared_experts=shared,
        vocab=fields.value("vocab_size") or 32768, heads=fields.number("num_heads"),
        kv_heads=fields.value("num_key_value_heads"), head_dim=fields.value("head_dim"),
        tied=bool(fields.value("tie_word_embeddings")), capacity_factor=changes.get("capacity_factor", _capacity(fields)),
    )  # fmt: skip
    return replace(sizes, num_experts=tuple(pyramid)) if pyramid else sizes


def _of_tensors(
    file: Path, tensors: list[Shape], fields: ConfigFields, experts: int | None, changes: dict[str, Any]
) -> ModelSizes:
    weights = own_weights(tensors, fields)
    counts, routed = routed_experts(weights, fields)
    hidden, layers = _required(file, fields, "hidden_size"), _required(file, fields, "num_layers")
    top_k, width = _routing(file, fields, experts, changes)
    if counts:
        names = {tensor.name for tensor in routed}
        per_layer = sum(math.prod(t.shape) for t in routed) // sum(counts.values())
        gated = per_layer >= 3 * hidden * width
    else:
        ffn = [t for t in weights if layer_of(t.name) >= 0 and "attn" not in t.name and _width(fields) in t.shape]
        names, counts = {t.name for t in ffn}, dict.fromkeys(sorted({layer_of(t.name) for t in ffn}), experts or 1)
        gated = sum(math.prod(t.shape) for t in ffn) >= 3 * hidden * (_width(fields) or 1) * len(counts)
    shared_width = changes.get("shared_experts", 0 if experts else fields.number("num_shared_experts") or 0) * width
    beside = [t for t in weights if t.name not in names]
    if "shared_experts" in changes:
        beside = [t for t in beside if not SHARED.search(t.name)]
    sizes = ModelSizes(
        hidden=hidden, top_k=top_k, num_experts=tuple(counts.values()), expert=_stacked(hidden, width, gated),
        expert_width=width, dense=(), num_layers=layers, shared_width=shared_width,
        attention_width=_attention_width(fields, hidden), vocab=fields.value("vocab_size") or 1,
        capacity_factor=changes.get("capacity_factor", _capacity(fields)),
    )  # fmt: skip
    added = _ffn(hidden, shared_width, gated) if shared_width and ("shared_experts" in changes or experts) else ()
    return replace(sizes, dense=_parts(beside, counts, hidden, added, fields))


def _parts(
    weights: list[Shape], num_experts: Mapping[int, int], hidden: int, added: Shapes, fields: ConfigFields
) -> tuple[Part, ...]:
    """The parameters beside the experts, as Transformers' plans cut them; routers that are missing are added."""
    layers: dict[int, list[tuple[int, ...]]] = {}
    routers: dict[int, list[tuple[int, ...]]] = {layer: [] for layer in num_experts}
    outside: list[Shape] = []
    for tensor in weights:
        layer = layer_of(tensor.name)
        if layer < 0:
            outside.append(tensor)
        elif layer in routers and _ROUTER.search(tensor.name) and not SHARED.search(tensor.name):
            routers[layer].append(tensor.shape)
        else:
            layers.setdefault(layer, []).append(tensor.shape)
    tied = bool(fields.value("tie_word_embeddings"))
    first = [t for t in outside if LOOKUP.search(t.name) and not HEAD.search(t.name) and not tied]
    parts = [Part("embedding", tuple(t.shape for t in first))] if first else []
    for layer, shapes in sorted(layers.items()):
        parts.append(Part("layer", (*shapes, *(added if layer in num_experts else ()))))
        if layer in num_experts:
            parts.append(Part("router", tuple(routers[layer] or [(num_experts[layer], hidden)]), fp32=True))
    parts.append(Part("head", tuple(t.shape for t in outside if t not in first), kept=True))
    table = next((t.shape for t in outside if LOOKUP.search(t.name) and t.shape[0] == fields.value("vocab_size")), None)
    return tuple([*parts, _tied_head(*table)] if tied and table else parts)


def _tied_head(vocab: int, hidden: int) -> Part:
    return Part("tied head", ((vocab, hidden),), kept=True, again=True)


def _routing(file: Path, fields: ConfigFields, experts: int | None, changes: dict[str, Any]) -> tuple[int, int]:
    """K and F."""
    own = fields.number("num_experts") or 0
    if own <= 1 and experts is None:
        raise ValueError(f"{file}: a dense model. Say how many experts it would get: `--experts`.")
    if own > 1 and experts is not None:
        raise ValueError(f"`experts`={experts}: {file} already has {own} experts. Leave it out.")
    top_k = changes.get("top_k", fields.number("num_experts_per_tok") if own > 1 else 2)
    if top_k is None:
        raise ValueError(f"{file}: no `num_experts_per_tok`. Give `--top-k`.")
    if not 1 <= top_k <= max(own, experts or 1):
        raise ValueError(f"`top_k`={top_k} must be from 1 to the {max(own, experts or 1)} experts.")
    width = changes.get("expert_width") or fields.value("moe_intermediate_size", "expert_ffn_hidden_size") or _width(fields)
    if not isinstance(width, int):
        raise ValueError(f"{file}: no `moe_intermediate_size` or `intermediate_size`. Give `--expert-width`.")
    return top_k, width


def _moe_layers(fields: ConfigFields, layers: int) -> list[int]:
    """Which layers have experts, by the fields that families of Transformers use."""
    step, dense = fields.value("decoder_sparse_step") or 1, fields.value("mlp_only_layers") or []
    first = fields.value("first_k_dense_replace") or 0
    return [i for i in range(layers) if (i + 1) % step == 0 and i not in dense and i >= first]


def _ffn(hidden: int, width: int, gated: bool) -> Shapes:
    return ((width, hidden),) * (2 if gated else 1) + ((hidden, width),)


def _stacked(hidden: int, width: int, gated: bool) -> Shapes:
    """One expert of `Experts`: gate and up projection are one tensor."""
    return ((2 * width if gated else width, hidden), (hidden, width))


def _width(fields: ConfigFields) -> int | None:
    hidden = fields.number("hidden_size")
    width = fields.value("intermediate_size", "n_inner", "ffn_dim", "ffn_hidden_size")
    return width if isinstance(width, int) else 4 * hidden if hidden else None


def _capacity(fields: ConfigFields) -> float | None:
    return fields.value("capacity_factor")


def _attention_width(fields: ConfigFields, hidden: int) -> int:
    heads, size = fields.number("num_heads"), fields.value("head_dim")
    return heads * size if heads and isinstance(size, int) else hidden


def _required(file: Path, fields: ConfigFields, what: str) -> int:
    number = fields.number(what)
    if number is None or number < 1:
        raise ValueError(f"{file}: no `{FIELD_NAMES[what][0]}`. Give the config.json of a causal LM.")
    return number


def _read_json(file: Path) -> dict[str, Any]:
    try:
        content = json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ValueError(
            f"`model`={str(file)!r} cannot be read ({error.strerror}). Give a folder with a config.json."
        ) from error
    except ValueError as error:
        raise ValueError(f"`model`={str(file)!r} is not JSON ({error}). Give a folder with a config.json.") from error
    if not isinstance(content, dict):
        raise ValueError(f"`model`={str(file)!r} holds no JSON object. Give a folder with a config.json.")
    return content


def _header(file: Path) -> dict[str, Any]:
    """Names and shapes in a safetensors file."""
    try:
        with file.open("rb") as opened:
            length = int.from_bytes(opened.read(8), "little")
            if length > _LARGEST_HEADER:
                raise ValueError("header too long")
            header = json.loads(opened.read(length))
    except (OSError, ValueError) as error:
        raise ValueError(f"{file}: not a whole safetensors file ({error}).") from error
    return {name: entry for name, entry in header.items() if name != "__metadata__"}
