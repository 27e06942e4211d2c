# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""The numbers inside a report's page, few and small enough that thousands of tokens and many layers stay a small file."""

from __future__ import annotations

import base64
import json
from typing import Any

import numpy as np

from .expert_similarity import ExpertSimilarity
from .report_data import ReportData, TextReport, plain
from .routing_analysis import expert_counts
from .specialisation import percent

ROUTING_BYTES = 1_200_000  # of the page's expert ids and weights
MAX_TOKENS, MAX_SLOTS = 4000, 8  # that the page shows
PAIR_VALUES = 60_000  # of each of the page's maps of pairs, over all layers
LIKED_ENTRIES = 20_000
_MOST_STEPS = 2**16 - 2


def page_layers(data: ReportData) -> list[tuple[int, int]]:
    """(decoder layer, experts) of every MoE layer: of the text, of the weights, or of the training."""
    if data.text is not None:
        return [(layer.layer, layer.num_experts) for layer in data.text.layers]
    if data.similarities:
        return [(similarity.layer, len(similarity.cosine_EE)) for similarity in data.similarities]
    return []


def shown_tokens(text: TextReport) -> int:
    """How many tokens the page can show without growing too large."""
    slots = _slots(text)
    return min(len(text.table.ids_N), MAX_TOKENS, max(200, ROUTING_BYTES // (len(text.layers) * slots * 2)))


def _slots(text: TextReport) -> int:
    return min(MAX_SLOTS, max(layer.expert_ids_NK.shape[1] for layer in text.layers))


def pack(values: np.ndarray) -> dict[str, str]:
    """An array as base64 of its little-endian bytes, for the page's script."""
    kind = {"uint8": "u1", "uint16": "u2", "uint32": "u4", "float32": "f4"}[values.dtype.name]
    return {"type": kind, "data": base64.b64encode(values.astype(values.dtype.newbyteorder("<")).tobytes()).decode()}


def pack_scaled(values: np.ndarray, low: float, high: float) -> dict[str, Any]:
    """The same in 16 bits per number between `low` and `high`; nan stays."""
    steps = np.round((np.nan_to_num(values, nan=low) - low) / max(high - low, 1e-12) * _MOST_STEPS)
    steps = np.where(np.isnan(values), _MOST_STEPS + 1, np.clip(steps, 0, _MOST_STEPS))
    return {**pack(steps.astype(np.uint16)), "low": low, "high": high}


def script_json(value: Any) -> str:
    """JSON that nothing in it can close or open: safe inside `<script>`."""
    text = json.dumps(plain(value), ensure_ascii=False, separators=(",", ":"), allow_nan=False)
    for character in "<>&\u2028\u2029":
        text = text.replace(character, f"\\u{ord(character):04x}")
    return text


def page_numbers(data: ReportData, shown: int) -> dict[str, Any]:
    """What the page's script draws, for `script_json`.

    Args:
        data: the report.
        shown: of `shown_tokens`; 0 without a text.
    """
    layers = page_layers(data)
    return {
        "layers": [layer for layer, _ in layers],
        "num_experts": [experts for _, experts in layers],
        "text": None if data.text is None else _text_payload(data.text, shown),
        "load": _load_payload(data),
        "similarity": _similarity_payload(data),
        "pairs": None if data.text is None else _pairs_payload(data.text),
    }


def _pack_counts(counts: np.ndarray) -> dict[str, str]:
    return pack(counts.reshape(-1).astype(np.uint16 if counts.max(initial=0) < 2**16 else np.uint32))


def _text_payload(text: TextReport, shown: int) -> dict[str, Any]:
    table, slots, wide = text.table, _slots(text), max(layer.num_experts for layer in text.layers) > 255
    ids_LTK = np.full((len(text.layers), shown, slots), max(layer.num_experts for layer in text.layers), np.int64)
    weights_LTK = np.zeros((len(text.layers), shown, slots))
    more_LT = np.zeros((len(text.layers), shown), np.int64)
    for row, layer in enumerate(text.layers):
        width = min(slots, layer.expert_ids_NK.shape[1])
        ids_LTK[row, :, :width] = layer.expert_ids_NK[:shown, :width]
        weights_LTK[row, :, :width] = layer.weights_NK[:shown, :width]
        more_LT[row] = np.maximum(0, layer.slots_per_token[:shown] - slots)
    scale_L = np.maximum(weights_LTK.max(axis=(1, 2)), 1e-9)
    names = list(dict.fromkeys([int(i) for i in table.ids_N[:shown]] + _liked_ids(text)))
    index = {token: place for place, token in enumerate(names)}
    most = max(3, LIKED_ENTRIES // sum(layer.num_experts for layer in text.layers))
    return {
        "shown": shown,
        "slots": slots,
        "total": len(table.ids_N),
        "ids": pack(ids_LTK.astype(np.uint16 if wide else np.uint8).reshape(-1)),
        "weights": pack(np.round(255 * weights_LTK / scale_L[:, None, None]).astype(np.uint8).reshape(-1)),
        "weight_scale": [round(float(scale), 5) for scale in scale_L],
        "more": pack(more_LT.astype(np.uint16).reshape(-1)) if more_LT.any() else None,
        "names": [table.names[token] for token in names],
        "name_of": pack(np.array([index[int(i)] for i in table.ids_N[:shown]], np.uint32)),
        "token_ids": pack(table.ids_N[:shown].astype(np.uint32)),
        "position": pack(table.position_N[:shown].astype(np.uint32)),
        "chosen": [_pack_counts(expert_counts(layer)) for layer in text.layers],
        "liked": [
            [[[index[x.label], x.count, x.occurrences, round(x.lift, 3)] for x in liked[:most]] for liked in experts]
            for experts in text.liked_tokens
        ],
        "kinds": {name: _kind_payload(text, name) for name in text.kinds},
    }


def _liked_ids(text: TextReport) -> list[int]:
    return [liking.label for experts in text.liked_tokens for liked in experts for liking in liked]


def _kind_payload(text: TextReport, name: str) -> dict[str, Any]:
    """At most 24 labels, those with the most tokens."""
    kind = text.kinds[name]
    rows = np.sort(np.argsort(-kind.occurrences_A, kind="stable")[:24])
    return {
        "labels": [kind.labels[row] for row in rows],
        "occurrences": kind.occurrences_A[rows].tolist(),
        "counts": [_pack_counts(counts_AE[rows]) for counts_AE in kind.counts_LAE],
    }


def _load_payload(data: ReportData) -> dict[str, Any] | None:
    load = data.source.expert_load
    if data.text is not None:
        layers, counts = [layer.layer for layer in data.text.layers], [found.counts for found in data.text.loads]
    elif load is not None:
        layers = load.layers
        counts = [row[:n].tolist() for row, n in zip(load.executed[-1], load.num_experts, strict=True)]
    else:
        return None
    return {"layers": layers, "num_experts": [len(row) for row in counts], "counts": counts}


def spread(sizes: list[int], budget: int) -> list[int]:
    """Rows whose pairs of experts fit the budget, evenly from first to last."""
    if not sizes:
        return []
    most = max(1, budget // max(1, max(sizes) * (max(sizes) - 1) // 2))
    if most >= len(sizes):
        return list(range(len(sizes)))
    return sorted({round(place) for place in np.linspace(0, len(sizes) - 1, most).tolist()})


def _similarity_payload(data: ReportData) -> dict[str, Any] | None:
    if not data.similarities:
        return None
    at = {layer: row for row, (layer, _) in enumerate(page_layers(data))}
    rows = spread([len(s.cosine_EE) for s in data.similarities], PAIR_VALUES)
    found = [data.similarities[row] for row in rows if data.similarities[row].layer in at]
    corners = [np.triu_indices(len(s.cosine_EE), 1) for s in found]
    ends = {"cosine": (-1.0, 1.0), "centred": (-1.0, 1.0), "distance": (0.0, 2.0)}
    maps = {
        name: [pack_scaled(getattr(s, f"{name}_EE")[corner], *ends[name]) for s, corner in zip(found, corners, strict=True)]
        for name in ends
    }
    low = min((float(np.min(s.cosine_EE)) for s in found), default=0.0)
    return {"rows": [at[s.layer] for s in found], "low": min(low, 0.99), "said": [_pairs_said(s) for s in found], **maps}


def _pairs_said(similarity: ExpertSimilarity) -> str:
    if similarity.identical:
        return f"The experts of layer {similarity.layer} are still identical."
    distance, cosine = similarity.mean_of_pairs("distance_EE"), similarity.mean_of_pairs("cosine_EE")
    if distance is None:
        return "There is one expert only."
    copies = len(similarity.cosine_EE) - similarity.distinct
    some = f" {copies} of them are copies of others." if copies else ""
    said = f"Two experts of layer {similarity.layer} have cosine {cosine:.4f} and differ by {percent(distance)} of their norm."
    return said + some


def _pairs_payload(text: TextReport) -> dict[str, Any] | None:
    with_pairs = [(row, pairs) for row, pairs in enumerate(text.coactivations) if pairs is not None]
    if not with_pairs:
        return None
    kept = [with_pairs[i] for i in spread([len(pairs[0]) for _, pairs in with_pairs], PAIR_VALUES)]
    corners = [np.triu_indices(len(pairs[0]), 1) for _, pairs in kept]
    return {
        "rows": [row for row, _ in kept],
        "observed": [_pack_counts(p[0][corner]) for (_, p), corner in zip(kept, corners, strict=True)],
        "expected": [
            pack_scaled(p[1][corner], 0.0, float(p[1][corner].max(initial=1.0)))
            for (_, p), corner in zip(kept, corners, strict=True)
        ],
    }
