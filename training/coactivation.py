# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Which experts share tokens more often than independent ones would."""

from __future__ import annotations

import numpy as np

from .routing_analysis import Floats, Ints, LayerRouting


def coactivation(routing: LayerRouting) -> tuple[Ints, Floats]:
    """How often two experts share a token, and how often they would if experts were chosen independently.

    Independent, without replacement, and with the numbers given: every token keeps how many experts it has, every expert has
    its tokens in expectation, and beyond that nothing is assumed. That is conditional Bernoulli sampling, the design of
    largest entropy: a set of n experts has probability proportional to the product of its experts' odds (Chen, Dempster and
    Liu 1994). With two experts per token it is drawing one after the other and refusing equal ones.

    Returns:
        Observed `[E, E]` int64 (diagonal: the expert's tokens) and expected `[E, E]` (diagonal: nan).
    """
    experts = routing.num_experts
    observed_EE = np.zeros((experts, experts), np.int64)
    for start in range(0, len(routing.expert_ids_NK), 1 << 16):  # sums of ones: exact in fp32 below 2**24
        block = routing.expert_ids_NK[start : start + (1 << 16)].astype(np.int64)
        has_NE = np.zeros((len(block), experts + 1), np.float32)
        np.put_along_axis(has_NE, block, 1.0, axis=1)
        observed_EE += np.rint(has_NE[:, :experts].T @ has_NE[:, :experts]).astype(np.int64)
    return observed_EE, independent_pairs(np.diagonal(observed_EE), routing.slots_per_token)


def independent_pairs(counts_E: Ints, slots_N: Ints, rounds: int = 1000) -> Floats:
    """`[E, E]` expected pairs of conditional Bernoulli sampling (see `coactivation`); nan on the diagonal.

    Args:
        counts_E: `[E]` tokens of each expert.
        slots_N: `[N]` experts of each token.
        rounds: most iterations for the odds.
    """
    sizes, tokens = np.unique(slots_N[slots_N > 0], return_counts=True)
    expected_EE = np.zeros((len(counts_E), len(counts_E)))
    always_E = counts_E >= tokens.sum()  # infinite odds
    expected_EE[always_E] = counts_E
    expected_EE[:, always_E] = counts_E[:, None]
    free = np.flatnonzero(~always_E & (counts_E > 0))
    sizes = sizes - int(always_E.sum())
    if len(free) > 1 and sizes.max(initial=0) > 0:
        sizes, tokens = sizes[sizes > 0], tokens[sizes > 0]
        odds = _fit_odds(counts_E[free].astype(np.float64), sizes, tokens, rounds)
        without_both = _symmetric_polynomials(odds, int(sizes.max()), leave_out=2)
        whole = _symmetric_polynomials(odds, int(sizes.max()), leave_out=0)
        pairs = sum(
            (n * without_both[..., size - 2] / whole[size] for size, n in zip(sizes, tokens, strict=True) if size > 1),
            np.zeros((len(free), len(free))),
        )
        expected_EE[np.ix_(free, free)] = np.outer(odds, odds) * pairs
    np.fill_diagonal(expected_EE, np.nan)
    return expected_EE


def _fit_odds(counts: Floats, sizes: Ints, tokens: Ints, rounds: int) -> Floats:
    """Odds with which every expert has its count in expectation; their scale is of no matter."""
    odds = counts / counts.mean()
    for _ in range(rounds):
        without_one = _symmetric_polynomials(odds, int(sizes.max()), leave_out=1)
        whole = _symmetric_polynomials(odds, int(sizes.max()), leave_out=0)
        rate = sum(n * without_one[:, size - 1] / whole[size] for size, n in zip(sizes, tokens, strict=True))
        fitted = counts / rate
        fitted /= np.exp(np.log(fitted).mean())
        done = np.abs(fitted / odds - 1).max() < 1e-10
        odds = fitted
        if done:
            break
    return odds


def _symmetric_polynomials(odds: Floats, most: int, leave_out: int) -> Floats:
    """Elementary symmetric polynomials e_0 … e_most of the odds: `[most + 1]`; with one or two left out `[E, most + 1]`,
    `[E, E, most + 1]`."""
    experts = len(odds)
    e = np.zeros((*[experts] * leave_out, most + 1))
    e[..., 0] = 1.0
    for expert, value in enumerate(odds.tolist()):
        factor = np.full((*[experts] * leave_out, 1), value)
        for axis in range(leave_out):
            factor[(slice(None),) * axis + (expert,)] = 0.0
        e[..., 1:] += factor * e[..., :-1]
    return e
