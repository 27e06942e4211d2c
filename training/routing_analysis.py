# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""What a routing of tokens to experts says in numbers: counts, load, and what each expert likes.

Letters: N tokens, K slots per token, E experts, A labels (token ids, parts of text, …). A slot that holds E is empty; a token
may have any number of filled ones. Everything is numpy, and counts are exact.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

Ints = NDArray[np.integer]
Floats = NDArray[np.float64]

LIKING_Z = 3.0  # one-sided 99.9 %: thousands of (token, expert) pairs are looked at
MIN_COUNT = 3
COLLAPSED = 0.9
ENOUGH = 20  # assignments of a fair share, below which a load is chance


@dataclass(frozen=True)
class LayerRouting:
    """The routing of one MoE layer.

    Attributes:
        layer: index of the decoder layer.
        num_experts: E.
        expert_ids_NK: `[N, K]`, first choice first; E marks an empty slot.
        weights_NK: `[N, K]` combine weights, 0 in empty slots.
    """

    layer: int
    num_experts: int
    expert_ids_NK: Ints
    weights_NK: NDArray[np.floating]

    @property
    def slots_per_token(self) -> Ints:
        """`[N]` how many experts each token has."""
        return (self.expert_ids_NK < self.num_experts).sum(axis=1)

    def take(self, tokens: Ints | NDArray[np.bool_]) -> LayerRouting:
        """Of these tokens only."""
        return LayerRouting(self.layer, self.num_experts, self.expert_ids_NK[tokens], self.weights_NK[tokens])


def contingency(labels_N: Ints, routing: LayerRouting, num_labels: int) -> Ints:
    """`[A, E]` int64: how many tokens with each label have each expert among theirs."""
    tokens, slots = np.nonzero(routing.expert_ids_NK < routing.num_experts)
    cells = labels_N[tokens].astype(np.int64) * routing.num_experts + routing.expert_ids_NK[tokens, slots]
    counts = np.bincount(cells, minlength=num_labels * routing.num_experts)
    return counts.reshape(num_labels, routing.num_experts)


def expert_counts(routing: LayerRouting) -> Ints:
    """`[E]` int64: tokens of each expert."""
    return contingency(np.zeros(len(routing.expert_ids_NK), np.int64), routing, 1)[0]


# ---------------------------------------------------------------------- load


@dataclass(frozen=True)
class Load:
    """How evenly a layer uses its experts.

    Attributes:
        counts: assignments of each expert.
        max_over_mean: of the counts; 1 is balanced.
        cv: population standard deviation over mean.
        dead: experts without a token, where a fair share would be `ENOUGH` tokens or more.
        concentration: share of the K busiest experts, on a scale on which 0 is a fair share and 1 is all.
    """

    counts: list[int]
    max_over_mean: float
    cv: float
    dead: list[int]
    concentration: float

    @property
    def collapsed(self) -> bool:
        """Whether the K busiest experts do nearly everything."""
        return self.concentration >= COLLAPSED


def load_of(counts_E: Ints, top_k: float) -> Load:
    """The load of a layer from its counts.

    Args:
        counts_E: `[E]` assignments.
        top_k: K; where tokens differ, their mean.
    """
    experts, total = len(counts_E), int(counts_E.sum())
    mean = total / experts
    busiest = min(experts, max(1, round(top_k)))
    fair = busiest / experts
    share = float(np.sort(counts_E)[::-1][:busiest].sum()) / max(1, total)
    return Load(
        counts=[int(count) for count in counts_E],
        max_over_mean=float(counts_E.max() / mean) if total else float("nan"),
        cv=float(counts_E.std() / mean) if total else float("nan"),
        dead=[int(expert) for expert in np.flatnonzero(counts_E == 0)] if mean >= ENOUGH else [],
        concentration=(share - fair) / (1 - fair) if fair < 1 else 0.0,
    )


# ---------------------------------------------------------------------- what each expert likes


@dataclass(frozen=True)
class Liking:
    """A label that an expert gets more of than its share.

    Attributes:
        label: its code.
        count: tokens with the label that the expert got.
        occurrences: tokens with the label.
        expected: the count if the expert got its share of this label, as of all tokens.
        lift: count / expected.
        at_least: lower end of the lift's confidence interval (Wilson 1927, z = `LIKING_Z`).
    """

    label: int
    count: int
    occurrences: int
    expected: float
    lift: float
    at_least: float


def likings(counts_AE: Ints, occurrences_A: Ints, tokens_E: Ints, most: int) -> list[list[Liking]]:
    """For each expert the labels it likes, best first by the lower end of the lift; a label seen once or twice is none.

    Args:
        counts_AE: `[A, E]` of `contingency`.
        occurrences_A: `[A]` tokens with each label.
        tokens_E: `[E]` tokens of each expert.
        most: labels to keep per expert.
    """
    total = int(occurrences_A.sum())
    rate_E = tokens_E / max(1, total)
    low_AE = wilson_lower(counts_AE, occurrences_A[:, None])
    found = []
    for expert in range(counts_AE.shape[1]):
        counts_A = counts_AE[:, expert]
        at_least_A = np.divide(low_AE[:, expert], rate_E[expert], out=np.zeros(len(counts_A)), where=rate_E[expert] > 0)
        liked = np.flatnonzero((counts_A >= MIN_COUNT) & (at_least_A > 1))
        order = liked[np.lexsort((liked, -counts_A[liked], -at_least_A[liked]))][:most]
        found.append([_liking(a, counts_A, occurrences_A, rate_E[expert], at_least_A) for a in order.tolist()])
    return found


def _liking(label: int, counts_A: Ints, occurrences_A: Ints, rate: float, at_least_A: Floats) -> Liking:
    count, occurrences = int(counts_A[label]), int(occurrences_A[label])
    expected = occurrences * float(rate)
    return Liking(label, count, occurrences, expected, count / expected, float(at_least_A[label]))


def wilson_lower(successes: Ints, trials: Ints, z: float = LIKING_Z) -> Floats:
    """Lower end of Wilson's score interval of a binomial probability; 0 where there were no trials."""
    n = np.maximum(np.asarray(trials, dtype=np.float64), 1.0)
    rate = successes / n
    centre = rate + z * z / (2 * n)
    spread = z * np.sqrt(rate * (1 - rate) / n + z * z / (4 * n * n))
    return np.maximum(0.0, (centre - spread) / (1 + z * z / n)) * (np.asarray(trials) > 0)
