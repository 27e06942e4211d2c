# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Everything a report says, as numbers, before anything is drawn."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from tqdm import tqdm

from .coactivation import coactivation
from .dependence import Dependence, dependence
from .expert_similarity import ExpertSimilarity
from .random_routers import RandomComparison, compare_with_random
from .report_source import Source
from .report_text import CLASSES, POSITIONS, TokenTable
from .routing_analysis import Floats, Ints, LayerRouting, Liking, Load, contingency, expert_counts, likings, load_of
from .routing_capture import Capture
from .specialisation import LoadVerdict, Verdict, judge, judge_load, layers_beyond

RUN = 16  # tokens that are shuffled together where a part has too few documents
MOST_LIKED = 10  # tokens per expert


@dataclass(frozen=True)
class Kind:
    """A way to sort tokens, and how often each expert has each sort.

    Attributes:
        labels: names of the sorts.
        occurrences_A: `[A]` tokens of each sort.
        counts_LAE: per MoE layer `[A, E]`: those of them that have the expert among theirs.
    """

    labels: list[str]
    occurrences_A: Ints
    counts_LAE: list[Ints]


@dataclass(frozen=True)
class TextReport:
    """What a text tells.

    Attributes:
        table: its tokens.
        layers: who computed them.
        tested: number of tokens that the tests looked at.
        dependences, comparisons: by label: `token`, `part`, `class`, `position`.
        loads: of every MoE layer.
        kinds: `part`, `class`, `position`.
        liked_tokens: per MoE layer and expert the tokens it likes; labels are vocabulary ids.
        coactivations: per MoE layer observed and expected pairs; `None` where no token has two experts.
    """

    table: TokenTable
    layers: list[LayerRouting]
    tested: int
    dependences: dict[str, Dependence]
    comparisons: dict[str, RandomComparison]
    loads: list[Load]
    kinds: dict[str, Kind]
    liked_tokens: list[list[list[Liking]]]
    coactivations: list[tuple[Ints, Floats] | None]


@dataclass(frozen=True)
class ReportData:
    """What a report says.

    Attributes:
        source: where it is from.
        model: facts about the model, by name; empty without one.
        verdict, load_verdict: the headline; `None` where there is nothing to go by.
        text: of the given text; `None` if the model was not run.
        similarities: of the experts of the MoE layers whose weights were found.
        notes: what is missing, and what else a reader has to know.
    """

    source: Source
    model: dict[str, Any]
    verdict: Verdict | None
    load_verdict: LoadVerdict | None
    text: TextReport | None
    similarities: list[ExpertSimilarity]
    notes: list[str] = field(default_factory=list)


# ---------------------------------------------------------------------- the text


def pick_tested(table: TokenTable, most: int) -> np.ndarray:
    """`[N]` bool: the tokens of whole sequences, at equal distances, that the tests look at; about `most`."""
    sequences = int(table.sequence_N.max()) + 1
    wanted = min(sequences, max(1, sequences * most // len(table.ids_N)))
    chosen = np.unique(np.round(np.linspace(0, sequences - 1, wanted)).astype(np.int64))
    return np.isin(table.sequence_N, chosen)


def analyse_text(
    table: TokenTable, capture: Capture, tested_N: np.ndarray, shuffles: int = 199, routers: int = 99
) -> TextReport:
    """All numbers of a text.

    Args:
        table: its tokens.
        capture: their routing.
        tested_N: `[N]` bool, the tokens of which `capture` has the routers' inputs.
        shuffles, routers: how many there are to compare with.
    """
    labels: dict[str, Ints] = {"token": np.unique(table.ids_N[tested_N], return_inverse=True)[1]}
    units: dict[str, Ints] = {"token": np.arange(int(tested_N.sum()))}
    for name, values_N in (("part", table.part_N), ("class", table.class_N), ("position", table.position_classes)):
        labels[name] = np.unique(values_N[tested_N], return_inverse=True)[1]
        units[name] = units["token"] if name != "part" else _part_units(table, tested_N)
    testable = [
        n for n in labels if labels[n].max() > 0 and units[n].max() + 1 >= 2 * (labels[n].max() + 1 if n == "part" else 1)
    ]
    tested = [routing.take(tested_N) for routing in capture.layers]
    bar = tqdm(testable, desc="shuffling", leave=False)
    found = {name: dependence(labels[name], units[name], tested, shuffles) for name in bar}
    comparisons = {}
    if capture.learned:
        comparisons = compare_with_random(capture.inputs, tested, {name: labels[name] for name in testable}, found, routers)
    return TextReport(
        table=table,
        layers=capture.layers,
        tested=int(tested_N.sum()),
        dependences=found,
        comparisons=comparisons,
        loads=[load_of(expert_counts(layer), _mean_slots(layer)) for layer in capture.layers],
        kinds={
            "part": _kind(table.part_N, table.parts, capture.layers),
            "class": _kind(table.class_N, list(CLASSES), capture.layers),
            "position": _kind(table.position_classes, list(POSITIONS), capture.layers),
        },
        liked_tokens=[_liked_tokens(table, layer) for layer in capture.layers],
        coactivations=[coactivation(layer) if layer.slots_per_token.max(initial=0) > 1 else None for layer in capture.layers],
    )


def _part_units(table: TokenTable, tested_N: np.ndarray) -> Ints:
    """Whole documents where parts have several, so that what a document has in common counts once; else runs of tokens."""
    documents = np.unique(table.document_N[tested_N], return_inverse=True)[1]
    if documents.max() + 1 >= 3 * len(np.unique(table.part_N[tested_N])):
        return documents
    runs = np.stack([table.sequence_N[tested_N], table.position_N[tested_N] // RUN], axis=1)
    return np.unique(runs, axis=0, return_inverse=True)[1].reshape(-1)


def _mean_slots(layer: LayerRouting) -> float:
    return float(layer.slots_per_token.mean()) if len(layer.slots_per_token) else 0.0


def _kind(labels_N: Ints, names: list[str], layers: Sequence[LayerRouting]) -> Kind:
    occurrences_A = np.bincount(labels_N, minlength=len(names))
    there = np.flatnonzero(occurrences_A)
    counts = [contingency(labels_N, layer, len(names))[there] for layer in layers]
    return Kind([names[label] for label in there], occurrences_A[there], counts)


def _liked_tokens(table: TokenTable, layer: LayerRouting) -> list[list[Liking]]:
    ids, codes_N, occurrences = np.unique(table.ids_N, return_inverse=True, return_counts=True)
    found = likings(contingency(codes_N, layer, len(ids)), occurrences, expert_counts(layer), MOST_LIKED)
    return [[Liking(**{**asdict(liking), "label": int(ids[liking.label])}) for liking in row] for row in found]


# ---------------------------------------------------------------------- the whole


def report_data(
    source: Source,
    model: dict[str, Any],
    text: TextReport | None,
    similarities: list[ExpertSimilarity],
    learned: bool,
    notes: Sequence[str] = (),
) -> ReportData:
    """Judge, and put everything together (see `ReportData`)."""
    verdict = None
    if text is not None or similarities:
        found, comparisons = ({}, {}) if text is None else (text.dependences, text.comparisons)
        verdict = judge(found, comparisons, similarities, learned)
    loads = None
    if text is not None:
        loads = judge_load([layer.layer for layer in text.layers], text.loads, "On this text")
    elif source.expert_load is not None:
        trained = training_loads(source)
        loads = judge_load(source.expert_load.layers, trained, "In the last row of the training log")
    return ReportData(source, model, verdict, loads, text, similarities, [*source.missing, *notes])


def training_loads(source: Source, row: int = -1) -> list[Load]:
    """The load of every MoE layer in one row of the training's file of expert load."""
    assert source.expert_load is not None
    executed_LE = source.expert_load.executed[row]
    top_k = 1.0  # not in the file; it only sets how many experts count as the busiest
    return [load_of(counts[:n], top_k) for counts, n in zip(executed_LE, source.expert_load.num_experts, strict=True)]


def to_json(data: ReportData) -> dict[str, Any]:
    """Every number of the report, as plain lists and dicts; nan is null."""
    load = data.source.expert_load
    content = {
        "model": data.model,
        "notes": data.notes,
        "specialisation": None if data.verdict is None else asdict(data.verdict),
        "load": None if data.load_verdict is None else asdict(data.load_verdict),
        "text": None if data.text is None else _text_json(data.text),
        "similarity": [_similarity_json(similarity) for similarity in data.similarities],
        "training": {
            "log_history": data.source.log_history,
            "expert_load": None
            if load is None
            else {
                "steps": load.steps,
                "layers": load.layers,
                "num_experts": load.num_experts,
                "executed": load.executed.tolist(),
            },
        },
    }
    return plain(content)


def _text_json(text: TextReport) -> dict[str, Any]:
    table = text.table
    layers = []
    for row, layer in enumerate(text.layers):
        pairs = text.coactivations[row]
        layers.append(
            {
                "layer": layer.layer,
                "num_experts": layer.num_experts,
                "load": asdict(text.loads[row]) | {"collapsed": text.loads[row].collapsed},
                "expert_ids": layer.expert_ids_NK.tolist(),
                "weights": np.round(layer.weights_NK.astype(np.float64), 5).tolist(),
                "counts": {name: kind.counts_LAE[row].tolist() for name, kind in text.kinds.items()},
                "liked_tokens": [
                    [asdict(liking) | {"name": table.names[liking.label]} for liking in liked]
                    for liked in text.liked_tokens[row]
                ],
                "coactivation": None if pairs is None else {"observed": pairs[0].tolist(), "expected": pairs[1].tolist()},
            }
        )
    compared = {name: (text.dependences[name], random) for name, random in text.comparisons.items()}
    return {
        "tokens": {
            "ids": table.ids_N.tolist(),
            "pieces": table.pieces,
            "sequence": table.sequence_N.tolist(),
            "document": table.document_N.tolist(),
            "part": table.part_N.tolist(),
        },
        "parts": table.parts,
        "tested_tokens": text.tested,
        "kinds": {
            name: {"labels": kind.labels, "occurrences": kind.occurrences_A.tolist()} for name, kind in text.kinds.items()
        },
        "dependence": {name: asdict(found) for name, found in text.dependences.items()},
        "random_routers": {
            name: asdict(random) | {"layers_beyond": layers_beyond(found, random)} for name, (found, random) in compared.items()
        },
        "layers": layers,
    }


def _similarity_json(similarity: ExpertSimilarity) -> dict[str, Any]:
    means = {f"mean_{n}": similarity.mean_of_pairs(f"{n}_EE") for n in ("cosine", "centred", "distance")}
    return {
        "layer": similarity.layer,
        "distinct": similarity.distinct,
        "identical": similarity.identical,
        **means,
        "cosine": similarity.cosine_EE.tolist(),
        "centred": similarity.centred_EE.tolist(),
        "distance": similarity.distance_EE.tolist(),
    }


def plain(value: Any) -> Any:
    """With what JSON has no word for (nan, infinities) as null, and numpy's scalars as Python's."""
    if isinstance(value, dict):
        return {str(key): plain(item) for key, item in value.items()}
    if isinstance(value, list | tuple):
        return [plain(item) for item in value]
    if isinstance(value, float | np.floating):
        return float(value) if np.isfinite(value) else None
    if isinstance(value, np.integer):
        return int(value)
    return value
