"""A tiny model of every native MoE class among Transformers' causal LMs, and a slow oracle of how it routes.

The oracle replaces the forward of the modules that execute the routing, notes what they were given, and counts in loops.
"""

from __future__ import annotations

import inspect
import math
import re
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from tiny_architectures import MODEL_TYPES, VOCABULARY, dense_model, tiny_config
from torch import Tensor, nn
from transformers import CONFIG_MAPPING, PreTrainedModel
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING

from hf_moe.record import LayerRecord

_HEADS = {"num_key_value_heads": 4}
_GEMMA = {"enable_moe_block": True, "num_experts": 4, "top_k_experts": 2, "moe_intermediate_size": 16}
_HYBRID = {"layer_types": ["linear_attention", "full_attention", "linear_attention"]}
# What a MoE needs beside `tiny_architectures.EXTRA`: experts where its default is none, shapes that fit each other.
MOE_FIELDS: dict[str, dict[str, Any]] = {
    "axk1": _HEADS,
    "axk2": _HEADS,
    "bailing_hybrid": {**_HEADS, **_HYBRID},
    "dbrx": {
        "attn_config": {"rope_theta": 10000.0, "clip_qkv": 8.0, "kv_n_heads": 4},
        "ffn_config": {"ffn_hidden_size": 16, "moe_num_experts": 4, "moe_top_k": 2},
    },
    "deepseek_v2": _HEADS,
    "deepseek_v3": _HEADS,
    "deepseek_v32": _HEADS,
    "deepseek_v4": {"mlp_layer_types": ["hash_moe", "moe", "moe"]},
    "doge": {"is_moe": True, "num_experts": 16},
    "ernie4_5_moe": {"moe_k": 2},
    "gemma4_text": _GEMMA,
    "glm4_moe_lite": _HEADS,
    "glm_moe_dsa": _HEADS,
    "granitemoehybrid": {"num_local_experts": 4, "num_experts_per_tok": 2},
    "jamba": {"num_experts": 4},
    "kimi_linear": {**_HEADS, **_HYBRID},
    "longcat_flash": {**_HEADS, "zero_expert_num": 2, "expert_ffn_hidden_size": 16, "ffn_hidden_size": 32, "moe_topk": 2},
    "nemotron_h": {"layers_block_type": ["linear_attention", "moe", "full_attention", "moe"]},
    "qwen3_5_moe_text": _HYBRID,
    "qwen3_next": _HYBRID,
    "qwen4_exp_text": {
        **_HYBRID,
        "indexer_n_heads": 4,
        "indexer_kv_heads": 1,
        "indexer_head_dim": 8,
        "indexer_budget": 8,
        "indexer_compress_ratio": 4,
    },
}
# Types whose file has MoE blocks that they do not use.
NO_EXPERTS = {"gemma4_unified_text": "its decoder layers have no experts"}


def _mentions_experts(model_type: str) -> bool:
    model_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[model_type]]
    source = inspect.getsource(sys.modules[model_class.__module__])
    return re.search(r"router_logits|\w*Experts\(|class \w*(MoE|Moe)\w*\(nn", source) is not None


def _is_composite(model_type: str) -> bool:
    config = tiny_config(model_type)
    try:
        return config.get_text_config() is not config
    except ValueError:  # more than one
        return True


def moe_types() -> tuple[str, ...]:
    """Every model type of the registry in whose file experts are mentioned, but for configs that wrap another of them."""
    return tuple(name for name in MODEL_TYPES if _mentions_experts(name) and not _is_composite(name))


def classes_of_types() -> set[str]:
    """Names of all classes in the files of `moe_types`."""
    model_classes: list[Any] = [MODEL_FOR_CAUSAL_LM_MAPPING[CONFIG_MAPPING[name]] for name in moe_types()]
    return {name for model_class in model_classes for name in dir(sys.modules[model_class.__module__])}


def native_moe(model_type: str, **changes: Any) -> Any:
    """A tiny model in training mode, without dropout."""
    model = dense_model(tiny_config(model_type, **{**MOE_FIELDS.get(model_type, {}), **changes}))
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
    return model.train()


def padded(side: str, lengths: tuple[int, ...] = (9, 5), seed: int = 0) -> dict[str, Tensor]:
    """Sequences of these lengths, padded to the longest and one column more."""
    width = max(lengths) + 1
    ids = torch.randint(3, VOCABULARY, (len(lengths), width), generator=torch.Generator().manual_seed(seed))
    columns, lengths_B1 = torch.arange(width), torch.tensor(lengths).unsqueeze(1)
    mask = columns < lengths_B1 if side == "right" else columns >= width - lengths_B1
    return {"input_ids": ids, "attention_mask": mask.long(), "labels": ids.masked_fill(~mask, -100)}


# ---------------------------------------------------------------------- the oracle


@dataclass
class Executed:
    """One call of a MoE block: (token, expert, weight) of every assignment; the weight is `None` where it is not seen."""

    assignments: list[tuple[int, int, float | None]]


def _of_ids(ids: Tensor, weights: Tensor | None) -> Executed:
    rows = ids.reshape(-1, ids.shape[-1]).tolist()
    values = [[None] * len(row) for row in rows] if weights is None else weights.reshape(len(rows), -1).tolist()
    return Executed([(t, e, w) for t, row in enumerate(rows) for e, w in zip(row, values[t], strict=True)])


def _of_call(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Executed:
    return _of_ids(top_k_index, top_k_weights)


def _of_zaya(experts: Any, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Executed:
    """Skipped tokens come as those of expert 0, with a weight that is 0."""
    skipped = (top_k_index == 0) & (top_k_weights == 0)
    return _of_ids(top_k_index.masked_fill(skipped, experts.num_experts), None)


def _of_llama4(experts: Any, routed_in: Tensor) -> Executed:
    """An expert computes a token where its input is not 0."""
    tokens_ETD = routed_in.view(experts.num_experts, -1, routed_in.shape[-1])
    return Executed([(t, e, None) for e, t in tokens_ETD.ne(0).any(dim=-1).nonzero().tolist()])


def _of_doge(embedding: Any, ids: Tensor) -> Executed:
    return _of_ids(ids, None)


def _of_jetmoe(router: Any, output: tuple[Any, ...]) -> Executed:
    """Tokens and gates sorted by expert, and how many each expert has."""
    _, tokens, gates, sizes, _ = output
    expert_of = [expert for expert, size in enumerate(sizes) for _ in range(size)]
    return Executed([(t, e, w) for t, e, w in zip(tokens.tolist(), expert_of, gates.tolist(), strict=True)])


# Class of the module that is given the routing, and whether the oracle reads its arguments or its output.
_SPIES: dict[str, tuple[Callable[..., Executed], bool]] = {
    "ZayaExperts": (_of_zaya, True),
    "Llama4TextExperts": (_of_llama4, True),
    "JetMoeTopKGating": (_of_jetmoe, False),
}


@contextmanager
def spied(model: nn.Module) -> Iterator[dict[str, list[Executed]]]:
    """What every MoE block executes inside the block of code, by the path of the module that was told."""
    found: dict[str, list[Executed]] = {}
    changed = []
    for path, module in model.named_modules():
        name = type(module).__name__
        read, of_arguments = _SPIES.get(name, (_of_call, True))
        if name == "Embedding" and path.endswith("up_embed"):
            read = _of_doge
        elif name not in _SPIES and not (re.fullmatch(r"\w+Experts", name) and re.search(r"\.experts(\.base_layer)*$", path)):
            continue
        if path.endswith("self_attention.experts.router"):  # JetMoE's attention, which is left out
            continue
        forward, calls = module.forward, found.setdefault(path, [])

        def spy(*args: Any, f: Any = forward, m: Any = module, c: Any = calls, r: Any = read, a: Any = of_arguments) -> Any:
            output = f(*args)
            c.append(r(m, *args) if a else r(m, output))
            return output

        module.forward = spy
        changed.append(module)
    yield found
    for module in changed:
        del module.forward


def check_layer(layer: LayerRecord, executed: Executed, real: Tensor) -> None:
    """Counts, exactly, and the sum of gates, against the oracle's assignments."""
    is_real = real.reshape(-1).tolist()
    counts, importance = [0] * layer.num_experts, [0.0] * layer.num_experts
    for token, expert, weight in executed.assignments:
        if is_real[token]:
            counts[expert] += 1
            importance[expert] += math.nan if weight is None else weight
    for name in ("counts", "executed"):
        assert layer.sums[name].tolist() == counts
    assert sum(counts) == layer.sums["tokens"].item() * layer.top_k == sum(is_real) * layer.top_k
    if "importance" in layer.sums and not math.isnan(sum(importance)):
        torch.testing.assert_close(layer.sums["importance"].double(), torch.tensor(importance).double(), rtol=1e-4, atol=1e-6)


def check_logits(layer: LayerRecord, logits: Tensor, real: Tensor) -> None:
    """Sums of probabilities, z and entropy against the logits that the model itself returns."""
    chosen = logits.reshape(-1, logits.shape[-1])[real.reshape(-1)].double()
    probs = chosen.softmax(dim=-1)
    expected = {
        "probs": probs.sum(dim=0),
        "z": chosen.exp().sum(dim=-1).log().square().sum(),
        "entropy": -(probs * probs.clamp(min=1e-300).log()).sum(),
    }
    for name, value in expected.items():
        torch.testing.assert_close(layer.sums[name].double(), value, rtol=1e-4, atol=1e-5)


def returned_logits(model: PreTrainedModel, batch: dict[str, Tensor]) -> list[Tensor]:
    """The router logits that the model's decoder returns when asked."""
    torch.manual_seed(0)
    with torch.no_grad():
        outputs = model.get_decoder()(
            input_ids=batch["input_ids"], attention_mask=batch["attention_mask"], output_router_logits=True
        )
    return list(outputs["router_logits"])
