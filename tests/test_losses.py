"""Routers and losses against the golden vectors of the papers' formulas, and against plain loops."""

import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor

from hf_moe.best_tokens import best_tokens_per_expert
from hf_moe.losses import (
    cv_squared,
    hierarchical_load,
    importance_loss,
    load_loss,
    loss_free_bias_update,
    smooth_load,
    switch_loss,
    z_loss,
)
from hf_moe.record import LayerRecord, RoutingRecord, routing_sums
from hf_moe.router_math import softmax
from hf_moe.routers import noisy_top_k
from hf_moe.routing import Routing, top_k

CLEAN = torch.tensor([[1, 0.5, -0.5, 0], [0.2, 0.1, 0, -0.1], [-1, 2, 0.3, 0.4]], dtype=torch.float64)
RAW_NOISE = torch.tensor([[0, -1, 1, 0.5], [0, 0, 0, 0], [0.5, -0.5, 0.2, -0.2]], dtype=torch.float64)
Z = torch.tensor([[0.1, -0.3, 0.8, -0.2], [-0.5, 0.4, 0.3, 0.9], [1.2, -0.7, 0.05, 0.6]], dtype=torch.float64)
LOGITS = torch.tensor([[2, 1, 0, -1], [0.5, 0.5, 1.5, 0], [1, -1, 0.2, 0.3], [0, 3, 0.1, -0.2]], dtype=torch.float64)


def close(got: Tensor, expected: list | float, tolerance: float = 1e-6) -> None:
    torch.testing.assert_close(got.double(), torch.tensor(expected, dtype=torch.float64), rtol=0, atol=tolerance)


def test_golden_noisy_top_k() -> None:
    ids, gates, load = noisy_top_k(CLEAN, RAW_NOISE, Z, 2)
    dense = torch.zeros_like(CLEAN).scatter(1, ids, gates)
    close(dense, [[0.625206, 0, 0.374794, 0], [0, 0.462179, 0, 0.537821], [0, 0.710181, 0, 0.289819]])
    sums = routing_sums(Routing.of(ids, gates, CLEAN, load=load), num_experts=4)
    close(sums["importance"], [0.625206, 1.172360, 0.374794, 0.827640])
    close(importance_loss(sums["importance"]), 0.151453)
    close(sums["load"], [1.236801, 1.865074, 0.823881, 1.153334])
    close(load_loss(sums["load"]), 0.088048)


@pytest.mark.parametrize(("k", "expected"), [(1, 1.233877), (2, 1.116939)])
def test_golden_switch_loss(k: int, expected: float) -> None:
    _, ids = top_k(LOGITS, k)  # the second token has two equal logits: the lower index is taken
    weights = LOGITS.softmax(-1).gather(1, ids)
    record = LayerRecord(4, k, routing_sums(Routing.of(ids, weights, LOGITS), 4))
    close(record.losses()["aux_loss"], expected)
    close(record.losses()["z_loss"], 5.877707)


def test_golden_bias_update() -> None:
    close(loss_free_bias_update(torch.tensor([10, 2, 3, 1]), 1e-3), [-1e-3, 1e-3, 1e-3, 1e-3], 1e-9)


def test_golden_expert_choice() -> None:
    probs = LOGITS.softmax(-1)
    chosen = best_tokens_per_expert(probs, 2, None)
    expected = {(0, 0): 0.643914, (2, 0): 0.480481, (3, 1): 0.872926, (0, 1): 0.236883, (1, 2): 0.510493,
                (2, 2): 0.215894, (2, 3): 0.238600, (1, 3): 0.113906}  # fmt: skip
    assert {tuple(pair) for pair in chosen.nonzero().tolist()} == set(expected)
    for (token, expert), weight in expected.items():
        close(probs[token, expert], weight)


def test_golden_hierarchical_load() -> None:
    load = hierarchical_load(torch.tensor([2.4, 1.6]), torch.tensor([[1.8, 1.2], [0.4, 0.6]]), torch.tensor([3.0, 1.0]))
    close(load, [1.44, 0.96, 0.64, 0.96])


def test_balanced_and_collapsed_values() -> None:
    close(cv_squared(torch.full((8,), 3.0)), 0.0)
    collapsed = torch.zeros(8)
    collapsed[2] = 5.0
    close(cv_squared(collapsed), 7.0)  # E - 1
    uniform = torch.full((8,), 10.0)
    close(switch_loss(uniform, uniform, 80, 1), 1.0)
    close(switch_loss(collapsed * 2, collapsed * 2, 10, 1), 8.0)
    close(z_loss(torch.tensor(12.0), 3), 4.0)


def loop_smooth_load(clean: Tensor, noisy: Tensor, std: Tensor, top_k: int) -> Tensor:
    rows = []
    for c, h, s in zip(clean, noisy, std, strict=True):
        row = []
        for i in range(len(c)):
            others = sorted((h[j] for j in range(len(c)) if j != i), reverse=True)
            argument = (c[i] - others[top_k - 1]) / s[i]
            row.append(0.5 * (1 + torch.erf(argument / math.sqrt(2))))
        rows.append(torch.stack(row))
    return torch.stack(rows)


@settings(max_examples=40, deadline=None)
@given(tokens=st.integers(1, 5), experts=st.integers(2, 7), data=st.data())
def test_smooth_load_is_the_probability(tokens: int, experts: int, data: st.DataObject) -> None:
    """kth_excluding(H, k, i), the paper's own words, by sorting the others; gradients as well."""
    top_k = data.draw(st.integers(1, experts - 1))
    torch.manual_seed(data.draw(st.integers(0, 1000)))
    clean, noise = (torch.randn(tokens, experts, dtype=torch.float64, requires_grad=True) for _ in range(2))
    std = torch.rand(tokens, experts, dtype=torch.float64) + 0.1
    downstream = torch.randn(tokens, experts, dtype=torch.float64)
    results = []
    for function in (smooth_load, loop_smooth_load):
        value = function(clean, clean + std * noise, std, top_k)
        results.append((value, *torch.autograd.grad((value * downstream).sum(), (clean, noise))))
    for got, expected in zip(*results, strict=True):
        torch.testing.assert_close(got, expected, rtol=0, atol=1e-10)


def test_smooth_load_of_all_experts_is_the_count() -> None:
    clean = torch.randn(3, 4, requires_grad=True)
    load = smooth_load(clean, clean + 1, torch.ones(3, 4), 4)
    assert torch.equal(load, torch.ones(3, 4))
    assert not load.requires_grad


@settings(max_examples=40, deadline=None)
@given(seed=st.integers(0, 10_000), tokens=st.integers(1, 12), experts=st.integers(1, 6), cut=st.integers(0, 12))
def test_sums_add_up_and_ignore_padding(seed: int, tokens: int, experts: int, cut: int) -> None:
    """The sums of a batch are those of its parts; padded tokens add nothing."""
    torch.manual_seed(seed)
    top_k = min(2, experts)
    logits = torch.randn(tokens, experts, dtype=torch.float64)
    weights, ids = logits.softmax(-1).topk(top_k)
    mask = torch.rand(tokens) < 0.7
    whole = routing_sums(Routing.of(ids, weights, logits), experts, mask)
    real = routing_sums(Routing.of(ids[mask], weights[mask], logits[mask]), experts)
    parts = [
        routing_sums(Routing.of(ids[rows], weights[rows], logits[rows]), experts, mask[rows])
        for rows in (slice(None, cut), slice(cut, None))
    ]
    for name, value in whole.items():
        torch.testing.assert_close(value, real[name])
        torch.testing.assert_close(value, parts[0][name] + parts[1][name])


def test_per_layer_not_pooled() -> None:
    """Eight layers, each collapsed on another pair of experts: pooled they look uniform, per layer they score E / K."""
    record = RoutingRecord()
    for layer in range(8):
        logits = torch.full((16, 16), -30.0)
        logits[:, [2 * layer, 2 * layer + 1]] = 30.0
        ids = torch.tensor([[2 * layer, 2 * layer + 1]]).expand(16, -1)
        record.add(Routing.of(ids, torch.full((16, 2), 0.5), logits), 16, 2, None)
    close(record.losses()["aux_loss"], 8.0, 1e-5)
    close(record.losses()["importance_loss"], 7.0, 1e-5)


@settings(max_examples=60, deadline=None)
@given(
    rows=st.lists(st.lists(st.sampled_from([-2.5, -1.0, -0.0, 0.0, 1e-30, 0.1, 0.3, 7.0]), min_size=6, max_size=6), min_size=1),
    k=st.integers(1, 6),
    dtype=st.sampled_from([torch.float32, torch.float64]),
    copies=st.sampled_from([1, 200]),  # few scores and many go different ways
)
def test_top_k_takes_the_lower_of_equal(rows: list[list[float]], k: int, dtype: torch.dtype, copies: int) -> None:
    rows = rows * copies
    values, ids = top_k(scores := torch.tensor(rows, dtype=dtype), k)
    assert ids.tolist() == [sorted(range(6), key=lambda i: -row[i])[:k] for row in rows]
    assert torch.equal(values, scores.gather(1, ids))


def test_top_k_of_neighbouring_floats() -> None:
    """Scores one bit apart are not equal."""
    scores = torch.ones(1000, 3)
    scores[:, 2] = torch.nextafter(scores[:, 2], torch.tensor(2.0))
    assert top_k(scores, 3)[1].tolist() == [[2, 0, 1]] * 1000


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("experts", [8, 33, 128, 129, 300])
@pytest.mark.parametrize("k", [1, 2, 3, 8])
def test_top_k_is_the_stable_sort(k: int, experts: int, dtype: torch.dtype) -> None:
    """Whatever the width: many equal ones, none, and rows of little but -inf (groups that are ruled out)."""
    torch.manual_seed(experts)
    scores = torch.randn(700, experts, dtype=dtype)
    for given_scores in (
        scores,
        scores.round(),
        scores.masked_fill(torch.rand(700, experts) < 0.97, float("-inf")),
        scores[:0],
    ):
        expected = given_scores.sort(dim=-1, descending=True, stable=True)
        values, ids = top_k(given_scores.view(-1, 7, experts), k)
        assert torch.equal(ids.flatten(0, 1), expected.indices[:, :k])
        assert torch.equal(values.flatten(0, 1), expected.values[:, :k])


@pytest.mark.parametrize("shape", [(3, 2), (300, 2), (300, 1), (40, 5, 8), (300, 16)], ids=str)
def test_softmax_of_few_columns(shape: tuple[int, ...]) -> None:
    torch.manual_seed(0)
    scores = 5 * torch.randn(shape, dtype=torch.float64, requires_grad=True)
    grad = torch.randn(shape, dtype=torch.float64)
    exact, found = scores.softmax(dim=-1), softmax(scores)
    assert found.is_contiguous()
    torch.testing.assert_close(found, exact, rtol=0, atol=1e-15)
    gradients = [torch.autograd.grad(output, scores, grad)[0] for output in (found, exact)]
    torch.testing.assert_close(*gradients, rtol=0, atol=1e-14)
