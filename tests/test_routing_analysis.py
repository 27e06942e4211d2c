"""The numbers of a report against slow and plain ones: counts, load, information, liking, pairs, similarity, the verdict."""

from __future__ import annotations

import math
import statistics
from collections import Counter
from itertools import combinations

import numpy as np
import pytest
import torch
from hf_moe.training.coactivation import coactivation
from hf_moe.training.dependence import Dependence, LayerDependence, dependence, most_information, mutual_information
from hf_moe.training.expert_similarity import expert_similarity, expert_weights
from hf_moe.training.random_routers import RandomComparison, RandomLayer, compare_with_random, random_routings
from hf_moe.training.routing_analysis import (
    LIKING_Z,
    LayerRouting,
    contingency,
    expert_counts,
    likings,
    load_of,
    wilson_lower,
)
from hf_moe.training.specialisation import judge, judge_load, percent
from native_models import native_model
from tiny import tiny

SHAPES = [(40, 4, 1), (60, 4, 2), (50, 8, 3), (30, 5, 5)]


def routing(tokens: int, experts: int, top_k: int, seed: int = 0, empty: float = 0.0, layer: int = 0) -> LayerRouting:
    """Uneven random choices without replacement, with a share of empty slots."""
    random = np.random.default_rng(seed)
    scores = random.gumbel(size=(tokens, experts)) + random.normal(size=experts)
    ids = np.argsort(-scores, axis=1)[:, :top_k]
    ids[random.random(ids.shape) < empty] = experts
    return LayerRouting(layer, experts, ids, np.where(ids < experts, 1 / top_k, 0.0).astype(np.float32))


def sets(routed: LayerRouting) -> list[set[int]]:
    return [{int(e) for e in row if e < routed.num_experts} for row in routed.expert_ids_NK]


# ---------------------------------------------------------------------- counts and load


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("empty", [0.0, 0.4])
def test_counts(shape: tuple[int, int, int], empty: float) -> None:
    routed = routing(*shape, seed=1, empty=empty)
    labels = np.random.default_rng(2).integers(0, 3, shape[0])
    expected = Counter((int(label), e) for label, chosen in zip(labels, sets(routed), strict=True) for e in chosen)
    counts = contingency(labels, routed, 4)
    assert counts.shape == (4, shape[1])
    assert all(counts[a, e] == expected[a, e] for a in range(4) for e in range(shape[1]))
    assert expert_counts(routed).tolist() == counts.sum(axis=0).tolist()
    assert routed.slots_per_token.tolist() == [len(chosen) for chosen in sets(routed)]


def test_load() -> None:
    load = load_of(np.array([30, 10, 60, 0]), top_k=1)
    assert load.max_over_mean == pytest.approx(60 / 25)
    assert load.cv == pytest.approx(statistics.pstdev([30, 10, 60, 0]) / 25)
    assert (load.dead, load.collapsed) == ([3], False)
    assert load.concentration == pytest.approx((0.6 - 0.25) / 0.75)
    assert load_of(np.array([5, 0, 5, 5]), top_k=1).dead == []  # too few to say
    assert load_of(np.array([97, 1, 1, 1]), top_k=1).collapsed
    assert load_of(np.array([100, 100, 2, 2]), top_k=2).collapsed
    assert not load_of(np.array([100, 100, 100, 100]), top_k=4).collapsed


# ---------------------------------------------------------------------- dependence on the text


def plain_information(pairs: list[tuple[int, int]]) -> float:
    joint, left, right, total = Counter(pairs), Counter(a for a, _ in pairs), Counter(e for _, e in pairs), len(pairs)
    return sum(n / total * math.log(n * total / (left[a] * right[e])) for (a, e), n in joint.items())


def assignments(labels: list[int], routed: LayerRouting) -> list[tuple[int, int]]:
    return [(label, e) for label, chosen in zip(labels, sets(routed), strict=True) for e in chosen]


@pytest.mark.parametrize("shape", SHAPES)
@pytest.mark.parametrize("empty", [0.0, 0.3])
def test_information(shape: tuple[int, int, int], empty: float) -> None:
    routed = routing(*shape, seed=3, empty=empty)
    labels = np.random.default_rng(4).integers(0, 5, shape[0])
    own = plain_information(assignments(labels.tolist(), routed))
    assert mutual_information(contingency(labels, routed, 5)) == pytest.approx(own, abs=1e-10)
    most = plain_information(assignments(list(range(shape[0])), routed))  # every token its own label
    assert most_information(routed) == pytest.approx(most, abs=1e-10)


def test_dependence_as_computed_plainly() -> None:
    """Shares, z and p, the layers' p corrected for their number."""
    layers = [routing(60, 4, 2, seed=5, layer=3), routing(60, 6, 1, seed=6, empty=0.2, layer=7)]
    labels = np.repeat([0, 1, 2], 20)
    units = np.repeat(np.arange(12), 5)
    found = dependence(labels, units, layers, shuffles=30, seed=9)
    random = np.random.default_rng(9)
    orders = [random.permutation(12) for _ in range(30)]
    shuffled = [[int(labels[5 * order[unit]]) for unit in units] for order in orders]
    nulls = [[plain_information(assignments(row, layer)) for row in shuffled] for layer in layers]
    values = [plain_information(assignments(labels.tolist(), layer)) for layer in layers]
    means, stds = [statistics.mean(null) for null in nulls], [statistics.pstdev(null) for null in nulls]
    rooms = [plain_information(assignments(list(range(60)), layer)) - m for layer, m in zip(layers, means, strict=True)]
    z = [(v - m) / s for v, m, s in zip(values, means, stds, strict=True)]
    largest = [max((null[r] - m) / s for null, m, s in zip(nulls, means, stds, strict=True)) for r in range(30)]
    for layer, v, m, room, own in zip(found.layers, values, means, rooms, z, strict=True):
        assert layer.information == pytest.approx(v, abs=1e-10)
        assert layer.share == pytest.approx((v - m) / room, abs=1e-10)
        assert layer.z == pytest.approx(own, abs=1e-8)
        assert layer.p == (1 + sum(other >= own - 1e-12 for other in largest)) / 31
    assert [layer.layer for layer in found.layers] == [3, 7]
    share = statistics.mean((v - m) / room for v, m, room in zip(values, means, rooms, strict=True))
    null = [statistics.mean((n[r] - m) / room for n, m, room in zip(nulls, means, rooms, strict=True)) for r in range(30)]
    assert found.share == pytest.approx(share, abs=1e-10)
    assert found.p == (1 + sum(other >= share for other in null)) / 31


def test_dependence_of_a_fixed_rule_is_whole() -> None:
    labels = np.random.default_rng(0).integers(0, 12, 500)
    ids = np.stack([labels % 4, (labels + 1) % 4], axis=1)
    found = dependence(labels, np.arange(500), [LayerRouting(0, 4, ids, np.full(ids.shape, 0.5))], shuffles=99)
    assert found.share == pytest.approx(1.0)
    assert found.p == 0.01


def test_no_choice_is_no_dependence() -> None:
    ids = np.tile([0, 1], (50, 1))
    found = dependence(np.arange(50) % 3, np.arange(50), [LayerRouting(0, 2, ids, np.full(ids.shape, 0.5))], shuffles=20)
    assert (found.share, found.p, found.layers[0].share) == (None, None, None)


def test_dependence_is_calibrated_and_respects_units() -> None:
    """Documents that each have a favourite expert of their own: no dependence on the part, but tokens alone would say so."""
    by_document, by_token = [], []
    for seed in range(30):
        random = np.random.default_rng(seed)
        documents = np.repeat(np.arange(20), 15)
        favourite = random.integers(0, 4, 20)[documents]
        ids = np.where(random.random(300) < 0.7, favourite, random.integers(0, 4, 300))[:, None]
        routed = [LayerRouting(0, 4, ids, np.ones(ids.shape))]
        parts = documents // 5
        by_document.append(dependence(parts, documents, routed, shuffles=99, seed=seed).p)
        by_token.append(dependence(parts, np.arange(300), routed, shuffles=99, seed=seed).p)
    assert sum(p <= 0.05 for p in by_document) <= 5
    assert sum(p <= 0.3 for p in by_document) >= 3
    assert sum(p <= 0.05 for p in by_token) >= 25


# ---------------------------------------------------------------------- what each expert likes


@pytest.mark.parametrize(("count", "trials"), [(1, 1), (3, 3), (5, 9), (50, 100), (0, 7), (400, 400)])
def test_wilson_lower_end(count: int, trials: int) -> None:
    """It is the smallest rate that is not further than z standard deviations from the one seen."""
    low, high = 0.0, count / trials
    for _ in range(200):
        rate = (low + high) / 2
        far = count / trials - rate > LIKING_Z * math.sqrt(rate * (1 - rate) / trials)
        low, high = (rate, high) if far else (low, rate)
    assert wilson_lower(np.array([count]), np.array([trials]))[0] == pytest.approx(high, abs=1e-9)


def test_likings() -> None:
    """Lift and expected counts are plain ratios; what is seen once does not win, however well it fits."""
    occurrences = np.array([1, 40, 40, 300, 3])
    counts = np.array([[1, 0], [38, 2], [20, 20], [100, 200], [3, 0]])
    tokens = counts.sum(axis=0)
    found = likings(counts, occurrences, tokens, most=5)
    best = found[0][0]
    assert (best.label, best.count, best.occurrences) == (1, 38, 40)
    assert best.expected == pytest.approx(40 * tokens[0] / 384)
    assert best.lift == pytest.approx(38 / best.expected)
    assert best.at_least == pytest.approx(wilson_lower(np.array([38]), np.array([40]))[0] / (tokens[0] / 384))
    for expert, liked in enumerate(found):
        assert 0 not in [liking.label for liking in liked]
        assert [x.at_least for x in liked] == sorted((x.at_least for x in liked), reverse=True)
        assert all(liking.at_least > 1 and liking.count == counts[liking.label, expert] for liking in liked)
    assert [liking.label for liking in found[1]] == [3]
    assert [len(liked) for liked in likings(counts, occurrences, tokens, most=1)] == [1, 1]


# ---------------------------------------------------------------------- co-activation


def plain_pairs(counts: list[int], sizes: list[int]) -> list[list[float]]:
    """Expected pairs by enumeration of all sets of experts, with the odds that give every expert its count."""
    experts = range(len(counts))
    odds = [1.0] * len(counts)
    for _ in range(4000):
        got = [0.0] * len(counts)
        for size, tokens in Counter(sizes).items():
            subsets = list(combinations(experts, size))
            weights = [math.prod(odds[e] for e in subset) for subset in subsets]
            for subset, weight in zip(subsets, weights, strict=True):
                for e in subset:
                    got[e] += tokens * weight / sum(weights)
        odds = [o * c / g if g else 0.0 for o, c, g in zip(odds, counts, got, strict=True)]
        top = max(odds)
        odds = [o / top for o in odds]
    expected = [[0.0] * len(counts) for _ in experts]
    for size, tokens in Counter(sizes).items():
        subsets = list(combinations(experts, size))
        weights = [math.prod(odds[e] for e in subset) for subset in subsets]
        for subset, weight in zip(subsets, weights, strict=True):
            for i, j in combinations(subset, 2):
                expected[i][j] += tokens * weight / sum(weights)
    return expected


@pytest.mark.parametrize(("shape", "empty"), [((80, 4, 2), 0.0), ((90, 5, 3), 0.0), ((90, 5, 3), 0.3), ((60, 6, 6), 0.6)])
def test_coactivation(shape: tuple[int, int, int], empty: float) -> None:
    routed = routing(*shape, seed=11, empty=empty)
    observed, expected = coactivation(routed)
    plain = Counter(pair for chosen in sets(routed) for pair in combinations(sorted(chosen), 2))
    assert observed.diagonal().tolist() == expert_counts(routed).tolist()
    by_hand = plain_pairs(expert_counts(routed).tolist(), [s for s in routed.slots_per_token.tolist() if s])
    for i, j in combinations(range(shape[1]), 2):
        assert observed[i, j] == observed[j, i] == plain[i, j]
        assert expected[i, j] == expected[j, i] == pytest.approx(by_hand[i][j], rel=1e-5)
    assert np.isnan(expected.diagonal()).all()


def test_coactivation_of_experts_that_are_always_or_never_used() -> None:
    random = np.random.default_rng(0)
    ids = np.stack([np.zeros(200, int), random.integers(1, 4, 200)], axis=1)  # 0 always, 4 never
    observed, expected = coactivation(LayerRouting(0, 5, ids, np.ones(ids.shape)))
    assert expected[0, 1:4].tolist() == observed[0, 1:4].tolist()
    assert expected[4, :4].tolist() == [0, 0, 0, 0]
    assert expected[1, 2] == expected[2, 3] == 0


def test_independent_experts_are_at_one() -> None:
    """Draws one after the other that refuse equal ones, with uneven odds: many standard deviations would be seen."""
    random = np.random.default_rng(3)
    odds = np.array([8.0, 4, 2, 1, 1, 0.5])
    first, second = (random.choice(6, size=60_000, p=odds / odds.sum()) for _ in range(2))
    ids = np.stack([first, second], axis=1)[first != second]
    observed, expected = coactivation(LayerRouting(0, 6, ids, np.ones(ids.shape)))
    corner = np.triu_indices(6, 1)
    assert np.abs((observed[corner] - expected[corner]) / np.sqrt(expected[corner])).max() < 4


# ---------------------------------------------------------------------- similarity


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16])
def test_similarity(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    weights = [[torch.randn(6, 4, dtype=dtype), torch.randn(7, dtype=dtype)] for _ in range(3)]
    found = expert_similarity(5, weights)
    flat = [torch.cat([part.double().flatten() for part in expert]) for expert in weights]
    mean = torch.stack(flat).mean(dim=0)
    for i, j in combinations(range(3), 2):
        a, b = flat[i], flat[j]
        assert found.cosine_EE[i, j] == pytest.approx(float(a @ b / (a.norm() * b.norm())), abs=1e-6)
        c, d = a - mean, b - mean
        assert found.centred_EE[i, j] == pytest.approx(float(c @ d / (c.norm() * d.norm())), abs=1e-6)
        assert found.distance_EE[i, j] == pytest.approx(float((a - b).norm() / ((a.norm() + b.norm()) / 2)), rel=1e-5)
    assert (found.layer, found.distinct, found.identical) == (5, 3, False)
    pairs = [found.cosine_EE[i, j] for i, j in combinations(range(3), 2)]
    assert found.mean_of_pairs("cosine_EE") == pytest.approx(statistics.mean(pairs))


def test_similarity_of_copies_and_of_nearly_copies() -> None:
    torch.manual_seed(0)
    base = torch.randn(3000)
    copies = expert_similarity(0, [[base.clone()] for _ in range(4)])
    assert (copies.identical, copies.distinct, copies.mean_of_pairs("distance_EE")) == (True, 1, 0.0)
    assert copies.cosine_EE.tolist() == [[1.0] * 4] * 4
    assert np.isnan(copies.centred_EE).all()
    two = expert_similarity(0, [[base], [base + 1], [base.clone()], [base + 1]])
    assert (two.identical, two.distinct) == (False, 2)
    # a millionth of the norm apart: their cosine is 1 in every digit, their distance is known all the same
    moved = base + 1e-5 * torch.randn(3000)
    near = expert_similarity(0, [[base], [moved]])
    expected = float((base.double() - moved.double()).norm() / base.double().norm())
    assert near.distance_EE[0, 1] == pytest.approx(expected, rel=1e-3)
    assert not near.identical


@pytest.mark.parametrize("case", ["llama", "gpt2", "mixtral", "deepseek_v3", "granitemoe"])
def test_expert_weights_are_those_of_the_experts(case: str) -> None:
    """Scaling expert 1 of a layer, as the model has it, changes what is found of it alone."""
    model = tiny(case) if case in ("llama", "gpt2") else native_model(case)
    from hf_moe.training.watching import watch_routing

    watch = watch_routing(model, lambda record: None)
    watch.remove()
    found = expert_weights(model, watch.routers[-1], watch.num_experts[-1])
    assert found is not None
    assert len(found) == watch.num_experts[-1]
    before = [torch.cat([p.detach().flatten().clone() for p in expert]) for expert in found]
    stacked = {p.data_ptr(): p for p in model.parameters() if p.dim() == 3}
    assert sum(part.numel() for part in found[0]) >= 2 * 32 * 24
    changed = 0
    for part in found[1]:
        owner = next(p for p in stacked.values() if p[1].data_ptr() == part.data_ptr()) if part.dim() == 2 else None
        if owner is not None:
            changed += 1
            with torch.no_grad():
                owner[1] *= 2
    assert changed == sum(part.dim() == 2 for part in found[1]) >= 2
    after = expert_weights(model, watch.routers[-1], watch.num_experts[-1])
    same = [torch.equal(b, torch.cat([p.detach().flatten() for p in expert])) for b, expert in zip(before, after, strict=True)]
    assert same == [i != 1 for i in range(len(found))]


# ---------------------------------------------------------------------- random routers


@pytest.mark.parametrize(("shape", "empty"), [((600, 4, 1), 0.0), ((600, 8, 2), 0.0), ((600, 6, 6), 0.5)])
def test_random_routers_have_the_same_slots_and_loads(shape: tuple[int, int, int], empty: float) -> None:
    routed = routing(*shape, seed=1, empty=empty)
    inputs = torch.randn(600, 32, generator=torch.Generator().manual_seed(0)) + 3  # a large common direction
    drawn = random_routings(inputs, routed, 6, torch.Generator().manual_seed(1))
    assert len(drawn) == 6
    for other in drawn:
        assert other.slots_per_token.tolist() == routed.slots_per_token.tolist()
        assert [len(chosen) for chosen in sets(other)] == routed.slots_per_token.tolist()  # no expert twice
        off = np.abs(expert_counts(other) - expert_counts(routed)).sum()
        assert off <= 0.05 * expert_counts(routed).sum()
    assert len({str(other.expert_ids_NK.tolist()) for other in drawn}) == 6


def test_random_routers_agree_among_like_inputs_only() -> None:
    """Tokens with the same input get the same experts: dependence on the token is what a random router has anyway."""
    inputs = torch.randn(30, 32, generator=torch.Generator().manual_seed(0)).repeat(20, 1)
    labels = np.tile(np.arange(30), 20)
    routed = routing(600, 4, 1, seed=2)
    for other in random_routings(inputs, routed, 3, torch.Generator().manual_seed(1)):
        firsts = other.expert_ids_NK[:, 0].reshape(20, 30)
        assert (firsts == firsts[0]).all()
    observed = {"token": dependence(labels, np.arange(600), [routed], shuffles=50)}
    found = compare_with_random([inputs], [routed], {"token": labels}, observed, routers=20)["token"]
    assert found.share > 0.9
    assert found.z < -3
    assert found.p == 1.0
    assert compare_with_random([None], [routed], {"token": labels}, observed) == {}


# ---------------------------------------------------------------------- the verdict


def explained(share: float, p: float = 0.005, layer_p: float = 1.0) -> Dependence:
    layers = [LayerDependence(layer, share, 0.0, 0.1, 1.0, share, share / 0.1, layer_p) for layer in range(3)]
    return Dependence(share, p, 199, 100, layers)


def compared(share: float, z: float, p: float) -> RandomComparison:
    return RandomComparison(share, 0.02, z, p, [RandomLayer(share, 0.05, 1.0, 1.0)] * 3, 99)


def experts(distance: float, layers: int = 3) -> list:
    base, other = torch.ones(100), torch.ones(100)
    other[0] += distance
    return [expert_similarity(layer, [[base], [other]]) for layer in range(layers)]


@pytest.mark.parametrize(
    ("share", "p", "random", "distance", "learned", "level"),
    [
        (0.6, 0.005, (0.3, 12.0, 0.01), 1.0, True, "present"),
        (0.31, 0.005, (0.3, 5.0, 0.01), 1.0, True, "weak"),  # beyond chance, but not worth a word
        (0.4, 0.005, (0.3, 3.0, 0.01), 1.0, True, "weak"),
        (0.4, 0.005, (0.3, 5.0, 0.02), 1.0, True, "weak"),
        (0.1, 0.005, (0.3, -9.0, 1.0), 1.0, True, "weak"),
        (0.6, 0.005, (0.3, 12.0, 0.01), 0.0, True, "none"),  # copies
        (0.02, 0.4, (0.3, -9.0, 1.0), 1.0, True, "none"),
        (0.004, 0.005, (0.3, -9.0, 1.0), 1.0, True, "none"),
        (0.9, 0.005, None, 1.0, False, "fixed"),
        (0.9, 0.005, None, 1.0, True, "unknown"),
    ],
)
def test_verdict(share: float, p: float, random: tuple | None, distance: float, learned: bool, level: str) -> None:
    comparisons = {} if random is None else {"part": compared(*random)}
    verdict = judge({"part": explained(share, p)}, comparisons, experts(distance), learned)
    assert verdict.level == level
    said = " ".join(verdict.sentences)
    assert percent(share) in said
    assert ("identical" in said) == (distance == 0)
    if random is not None and p < 0.01 and share >= 0.01:
        assert percent(random[0]) in said


def test_verdict_of_a_single_layer() -> None:
    """One specialised layer among many counts, where the mean does not show it."""
    found = explained(0.05)
    found.layers[1] = LayerDependence(1, 0.5, 0.0, 0.1, 1.0, 0.5, 5.0, 0.005)
    random = compared(0.05, 0.0, 0.5)
    random.layers[1] = RandomLayer(0.05, 0.05, 9.0, 0.01)
    verdict = judge({"part": found}, {"part": random}, experts(1.0), True)
    assert verdict.level == "present"
    assert "in 1 of 3 layers by itself" in verdict.sentences[-1]


def test_verdict_without_anything_and_with_some_copies() -> None:
    assert judge({}, {}, experts(1.0)).level == "unknown"
    mixed = [*experts(1.0, 2), *experts(0.0, 4)[3:]]
    assert "The experts of layer 3 are still identical." in judge({}, {}, mixed).sentences


def test_verdict_on_the_load() -> None:
    def level(*counts: list[int]) -> tuple[str, str]:
        verdict = judge_load(range(len(counts)), [load_of(np.array(c), 1) for c in counts], "Here")
        return verdict.level, " ".join(verdict.sentences)

    assert level([100, 110, 90, 100])[0] == "balanced"
    assert level([100, 110, 90, 100], [200, 50, 80, 70]) == (
        "uneven", "Here, the busiest expert has 2.00 times its fair share (in layer 1).",
    )  # fmt: skip
    assert level([200, 100, 100, 0])[0] == "dead"
    assert "an expert gets nothing: 3 in layer 0" in level([200, 100, 100, 0])[1]
    assert level([990, 4, 3, 3])[0] == "collapsed"
    assert "collapsed in layer 0:" in level([990, 4, 3, 3])[1]
    assert "collapsed in layers 0, 1:" in level([990, 4, 3, 3], [990, 4, 3, 3])[1]
    assert level([990, 4, 3, 3], [1, 0, 0, 0]) == ("unknown", "Here, a fair share is 0.25 assignments: too few to say more.")
