# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""What is in a checkpoint, and what a forward costs: from config.json and the headers alone, without torch.

Checkpoints of hf_moe, native Mixtures of Experts (experts one by one, or stacked in one tensor) and dense models.
"""

from __future__ import annotations

import dataclasses
import json
import os
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from hf_moe.parameter_counts import (
    FIELD_NAMES,
    HEAD,
    LOOKUP,
    SHARED,
    ConfigFields,
    idle_parameters,
    layer_of,
    own_weights,
    routed_experts,
)

from .checkpoint_reader import Checkpoint, TensorInfo, open_checkpoint, read_json
from .errors import ConversionError, one_line

# Fields that say how a router works, where a config has them.
_ROUTER_FIELDS = ("scoring_func", "topk_method", "norm_topk_prob", "n_group", "topk_group", "routed_scaling_factor")
_ATTENTION_TYPES = ("full_attention", "attention", "hybrid", "sliding_attention", "chunked_attention")


@dataclass(frozen=True)
class Inspection:
    """What a checkpoint holds.

    The cost of a forward is of one token that has `context_length` tokens to attend to, itself included: 2 FLOPs for every
    weight of the matrices that it is multiplied with (those of its K experts; not of embeddings, which are looked up; the
    output head also where it is tied), and in every attention layer `2 · context · heads · (d_qk + d_v)` for scores and
    values (context: at most the window). Norms, biases, activations, convolutions' and state-space scans are left out.

    Attributes:
        source: folder or Hub id.
        model_type, architecture: as in config.json.
        num_layers: decoder layers.
        parameters: in all; what is tied counts once, buffers and the biases that balance routing do not.
        active_parameters: that one token uses: all but the experts it is not sent to. `None` where the config does not say
            how many those are.
        nbytes: of all tensors.
        dtypes: bytes by safetensors' name of the dtype.
        experts: number of routed experts by index of the decoder layer.
        num_experts_per_tok: K.
        router: its kind and numbers.
        shared_parameters: that every token passes beside the routed experts.
        num_shared_experts: as in config.json.
        matmul_flops, attention_flops: per token, see above.
        context_length: that was assumed.
        quantization: method, if the weights are quantised; counts then are of stored numbers.
    """

    source: str
    model_type: str
    architecture: str
    num_layers: int
    parameters: int
    active_parameters: int | None
    nbytes: int
    dtypes: dict[str, int]
    experts: dict[int, int]
    num_experts_per_tok: int | None
    router: str | None
    shared_parameters: int
    num_shared_experts: int
    matmul_flops: int | None
    attention_flops: int | None
    context_length: int
    quantization: str | None

    @property
    def flops_per_token(self) -> int | None:
        """Of a forward."""
        if self.matmul_flops is None or self.attention_flops is None:
            return None
        return self.matmul_flops + self.attention_flops

    @property
    def summary(self) -> str:
        """The parameters, in a few words."""
        active = "" if self.active_parameters is None or not self.experts else f", {_short(self.active_parameters)} active"
        return f"{_short(self.parameters)} parameters{active + ' per token' if active else ''}"

    def to_json(self) -> str:
        """As indented JSON."""
        return json.dumps({**dataclasses.asdict(self), "flops_per_token": self.flops_per_token}, indent=2)

    def __str__(self) -> str:
        dtypes = ", ".join(f"{name} {_short(size)}B" for name, size in sorted(self.dtypes.items(), key=lambda i: -i[1]))
        rows = {
            "parameters": self.summary,
            "bytes": f"{_short(self.nbytes)}B ({dtypes})",
            "layers": f"{self.num_layers}" + (f", MoE in {_ranges(self.experts)}" if self.experts else ""),
        }
        if self.experts:
            each = ", ".join(map(str, sorted(set(self.experts.values()))))
            rows["experts"] = f"{each} per MoE layer, {self.num_experts_per_tok or 'unknown'} per token"
            rows["router"] = self.router or "unknown"
        if self.shared_parameters:
            rows["shared experts"] = (
                f"{self.num_shared_experts or 1} per MoE layer, {_short(self.shared_parameters)} parameters"
            )
        if self.flops_per_token is not None and self.matmul_flops and self.attention_flops is not None:
            rows["forward"] = (
                f"{_short(self.flops_per_token)}FLOPs per token at a context of {self.context_length} "
                f"({_short(self.matmul_flops)} weights, {_short(self.attention_flops)} attention)"
            )
        if self.quantization:
            rows["quantised"] = f"{self.quantization}; counts are of stored numbers"
        lines = [f"{self.source}: {self.architecture} ({self.model_type})"]
        return "\n".join([*lines, *(f"  {name:<15}{value}" for name, value in rows.items())])


def inspect_checkpoint(path: str | os.PathLike, context_length: int | None = None) -> Inspection:
    """Inspect a checkpoint.

    Args:
        path: a folder, or the id of a model on the Hub, of which headers alone are fetched.
        context_length: for the cost of attention (default: 4096, or what the model allows if that is less).

    Raises:
        ConversionError: it is not there, damaged, or not a checkpoint of Transformers.
    """
    if Path(path).is_dir():
        checkpoint = open_checkpoint(Path(path))
        return inspect_tensors(os.fspath(path), checkpoint.config, checkpoint.tensors.values(), context_length)
    config, tensors = _from_hub(os.fspath(path))
    return inspect_tensors(os.fspath(path), config, tensors, context_length)


def inspect_tensors(
    source: str, config: Mapping[str, Any], tensors: Iterable[TensorInfo], context_length: int | None = None
) -> Inspection:
    """Inspect what config.json and headers say; arguments as fields of `Inspection`."""
    fields = ConfigFields(config)
    stored = list(tensors)
    num_layers = fields.number("num_layers") or 1 + max((layer_of(t.name) for t in stored), default=-1)
    if num_layers < 1:
        raise ConversionError(f"{source}: config.json has no `num_hidden_layers`. Give a checkpoint of a causal LM.")
    if context_length is None:
        longest = fields.value("max_position_embeddings", "n_positions", "max_seq_len")
        context_length = min(4096, longest) if isinstance(longest, int) and longest > 0 else 4096
    weights = own_weights(stored, fields)
    experts, routed = routed_experts(weights, fields)
    unused = idle_parameters(experts, routed, fields)
    matrices = _matmul_parameters(weights, fields)
    idle = idle_parameters(experts, [t for t in routed if _is_matrix(t)], fields)
    dtypes: dict[str, int] = {}
    for tensor in stored:
        dtypes[tensor.dtype] = dtypes.get(tensor.dtype, 0) + tensor.nbytes
    parameters = sum(t.numel for t in weights)
    shared = sum(t.numel for t in weights if SHARED.search(t.name))
    architectures = config.get("architectures") or ["unknown architecture"]
    quantization = config.get("quantization_config")
    return Inspection(
        source=source,
        model_type=str(config.get("model_type")),
        architecture=str(architectures[0]),
        num_layers=num_layers,
        parameters=parameters,
        active_parameters=None if unused is None else parameters - unused,
        nbytes=sum(dtypes.values()),
        dtypes=dtypes,
        experts=experts,
        num_experts_per_tok=fields.number("num_experts_per_tok") if experts else None,
        router=_router(config, fields) if experts else None,
        shared_parameters=shared,
        num_shared_experts=(fields.number("num_shared_experts") or 0) if shared else 0,
        matmul_flops=None if idle is None else 2 * (matrices - idle),
        attention_flops=_attention_flops(fields, num_layers, context_length),
        context_length=context_length,
        quantization=str(quantization.get("quant_method")) if isinstance(quantization, dict) else None,
    )


def _is_matrix(tensor: TensorInfo) -> bool:
    return len(tensor.shape) >= 2 and not tensor.name.endswith("bias")


def _matmul_parameters(weights: list[TensorInfo], fields: ConfigFields) -> int:
    """Of the matrices that tokens are multiplied with; the head's also where it is tied to the embedding."""
    heads = [t for t in weights if HEAD.search(t.name)]
    tables = [t for t in weights if LOOKUP.search(t.name) and not HEAD.search(t.name) and len(t.shape) == 2]
    looked_up = {t.name for t in tables}
    vocabulary = fields.value("vocab_size")
    tied = [] if heads else [t for t in tables if t.shape[0] == vocabulary][:1]
    return sum(t.numel for t in [*weights, *tied] if _is_matrix(t) and t.name not in looked_up) + sum(t.numel for t in tied)


def _attention_flops(fields: ConfigFields, num_layers: int, context: int) -> int | None:
    hidden, heads = fields.number("hidden_size"), fields.value(*FIELD_NAMES["num_heads"])
    if hidden is None or heads is None:
        return None
    per_layer = heads if isinstance(heads, list) else [heads] * num_layers
    types = fields.value("layer_types", "layers_block_type")
    if not isinstance(types, list) or len(types) < num_layers:
        window = fields.value("sliding_window") if fields.value("use_sliding_window") is not False else None
        types = ["sliding_attention" if isinstance(window, int) else "full_attention"] * num_layers
    if fields.value("kv_lora_rank"):  # latent attention (DeepSeek)
        sizes = [fields.value(n) or 0 for n in ("qk_nope_head_dim", "qk_rope_head_dim", "v_head_dim")]
        widths = [sum(sizes)] * num_layers
    else:
        widths = [2 * (fields.value("head_dim") or hidden // count) for count in per_layer]
    windows = {"sliding_attention": fields.value("sliding_window"), "chunked_attention": fields.value("attention_chunk_size")}
    total = 0
    for kind, count, width in zip(types, per_layer, widths, strict=False):
        if kind in _ATTENTION_TYPES:
            total += 2 * min(context, windows.get(kind) or context) * count * width
    return total


def _router(config: Mapping[str, Any], fields: ConfigFields) -> str:
    kind = config.get("router_type") or f"{config.get('model_type')}'s own"
    known = {name: fields.value(name) for name in _ROUTER_FIELDS if fields.value(name) is not None}
    if config.get("model_type") == "hf_moe":  # there every config has every field, whether its router reads it or not
        reads = {"top_k": ("norm_topk_prob",), "hierarchical": ("n_group", "topk_group"),
                 "sigmoid": ("n_group", "topk_group", "routed_scaling_factor")}.get(str(kind), ())  # fmt: skip
        known = {name: value for name, value in known.items() if name in reads}
    return kind + (f" ({', '.join(f'{name}={value}' for name, value in known.items())})" if known else "")


def _from_hub(name: str) -> tuple[dict[str, Any], list[TensorInfo]]:
    """Config and headers of a model on the Hub, or of its copy in the cache."""
    if name.startswith((".", "/", "~")) or name.count("/") != 1:
        raise ConversionError(f"{name}: no such folder. Give a folder with a checkpoint, or a Hub id such as org/model.")
    from huggingface_hub import HfApi, hf_hub_download, try_to_load_from_cache

    cached = try_to_load_from_cache(name, "config.json")
    if isinstance(cached, str) and any(Path(cached).parent.glob("*.safetensors")):
        checkpoint: Checkpoint = open_checkpoint(Path(cached).parent)
        return checkpoint.config, list(checkpoint.tensors.values())
    try:
        config = read_json(Path(hf_hub_download(name, "config.json")))
        files = HfApi().get_safetensors_metadata(name).files_metadata.values()
    except ConversionError:
        raise
    except Exception as error:  # the Hub's client has many kinds
        reason = one_line(error, 160)
        raise ConversionError(f"{name}: not a folder, and its headers were not fetched from the Hub ({reason}).") from error
    return config, [TensorInfo(n, t.dtype, tuple(t.shape)) for file in files for n, t in file.tensors.items()]


def _short(number: int) -> str:
    """3 to 4 digits and a unit: `254.1 M`."""
    for size, unit in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if number >= size:
            return f"{number / size:.4g} {unit}"
    return f"{number} "


def _ranges(numbers: Iterable[int]) -> str:
    """`0-3, 5` for 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for number in sorted(numbers):
        if runs and runs[-1][1] == number - 1:
            runs[-1][1] = number
        else:
            runs.append([number, number])
    return ", ".join(f"{a}-{b}" if a != b else f"{a}" for a, b in runs)
