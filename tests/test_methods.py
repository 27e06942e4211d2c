"""Upcycling methods: every tensor against a plain oracle, every promise about the function against a built model."""

import itertools
import subprocess
import sys
from collections.abc import Callable
from functools import partial
from pathlib import Path

import pytest
import torch
from families import text_config
from hf_moe.conversion.expert_weights import (
    NEURON_DIMENSION,
    add_noise,
    average_tensors,
    balanced_assignment,
    balanced_kmeans,
    draw_anew,
    dropped_neurons,
    expert_weight,
    router_rows,
    split_neurons,
)
from hf_moe.conversion.methods import METHODS, ROLES, Drop, Granular, Method, Noise, Role, Split, StartingRouter, make_method
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import AutoModelForCausalLM, PreTrainedModel

from hf_moe import MoEConfig, MoEForCausalLM
from hf_moe.dense_ffn import find_ffns

DTYPES = (torch.bfloat16, torch.float32, torch.float64)


def ffn_weights(hidden: int, width: int, seed: int = 0, dtype: torch.dtype = torch.float64) -> dict[Role, Tensor]:
    """A dense FFN's tensors, biases included."""
    generator = torch.Generator().manual_seed(seed)
    shapes: dict[Role, tuple[int, ...]] = {
        "gate": (width, hidden),
        "up": (width, hidden),
        "down": (hidden, width),
        "gate_bias": (width,),
        "up_bias": (width,),
        "down_bias": (hidden,),
    }
    return {role: torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for role, shape in shapes.items()}


def apply_ffn(w: dict[Role, Tensor], x: Tensor, gated: bool) -> Tensor:
    up = F.linear(x, w["up"], w["up_bias"])
    hidden = F.silu(F.linear(x, w["gate"], w["gate_bias"])) * up if gated else F.gelu(up)
    return F.linear(hidden, w["down"], w["down_bias"])


def expert_ffn(
    method: Method, dense: dict[Role, Tensor], expert: int, num_experts: int, seed: int, neurons_EW: Tensor | None = None
) -> dict[Role, Tensor]:
    arguments = {"num_experts": num_experts, "seed": seed, "neurons_EW": neurons_EW}
    return {
        role: expert_weight(method, layer=0, expert=expert, role=role, load=dense.__getitem__, **arguments) for role in ROLES
    }


# ---------------------------------------------------------------------- options and sizes


def test_methods_need_the_standard_library_only() -> None:
    path = Path(__file__).parent.parent / "conversion" / "methods.py"
    code = f"import runpy, sys; runpy.run_path({str(path)!r}); print('torch' in sys.modules, 'numpy' in sys.modules)"
    result = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True, timeout=300)
    assert result.stdout.split() == ["False", "False"]


def test_every_method_by_name() -> None:
    assert list(METHODS) == ["copy", "noise", "drop", "granular", "split", "merge"]
    for name in METHODS:
        assert make_method(name).name == name
        assert make_method(name).identical_experts == (name == "copy")
    assert [make_method("split", assignment=a).needs_text for a in ("random", "clustered", "coactivation")] == [0, 0, 1]


@pytest.mark.parametrize(
    ("name", "options", "message"),
    [
        ("magic", {}, "`method`='magic'.*'copy'"),
        ("copy", {"ratio": 0.5}, "`ratio`.*belongs to 'drop'"),
        ("drop", {"ratoi": 0.5}, "Did you mean `ratio`"),
        ("drop", {"ratio": 0}, r"`ratio`=0 .*\(0, 1\]"),
        ("drop", {"ratio": 1.5}, r"`ratio`=1.5 "),
        ("drop", {"ratio": True}, r"`ratio`=True "),
        ("drop", {"ratio": float("nan")}, r"`ratio`=nan "),
        ("noise", {"std": 0.0}, "`std`=0.0 .*> 0"),
        ("noise", {"std": float("inf")}, "`std`=inf "),
        ("noise", {"std": "much"}, "`std`='much' "),
        ("granular", {"granularity": 1}, "`granularity`=1 .*int >= 2"),
        ("granular", {"granularity": 2.0}, "`granularity`=2.0 "),
        ("granular", {"scale": "up"}, "`scale`='up' .*'down', 'cube_root'"),
        ("split", {"assignment": "best"}, "`assignment`='best' .*'coactivation'"),
        ("merge", {"rest": ["base"]}, "`rest`=.*'average', 'base'"),
    ],
)
def test_refused_options(name: str, options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        make_method(name, **options)
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    ("method", "sizes", "message"),
    [
        (make_method("copy"), (4, 5, 48), "`num_experts_per_tok`=5 .*1..4"),
        (Granular(2), (7, 2, 48), "`num_experts`=7 .*`granularity`=2.*6 or 8"),
        (Granular(4), (8, 2, 48), "`num_experts_per_tok`=2 .*Choose 4"),
        (Granular(4), (8, 4, 50), "`intermediate_size`=50.*`granularity` among 2, 5, 10"),
        (Split(), (5, 2, 48), "`intermediate_size`=48.*`num_experts` among 2, 3, 4"),
        (Drop(0.001), (4, 2, 48), "`ratio`=0.001.*0.0208"),
        (Granular(2), (4, 2, 48, 1.0, 1), "`num_shared_experts`=1.*multiple of 2"),
        (make_method("copy"), (4, 2, 48, -1.0), "`weights_sum`"),
    ],
)
def test_refused_sizes(method: Method, sizes: tuple, message: str) -> None:
    with pytest.raises(ValueError, match=message) as error:
        method.check(*sizes)
    assert "\n" not in str(error.value)


@given(st.integers(1, 12), st.integers(1, 12), st.integers(1, 60), st.integers(2, 5))
def test_sizes_that_fit_are_taken(num_experts: int, top_k: int, width: int, granularity: int) -> None:
    """`check` against the conditions written out."""
    fits = {
        "copy": top_k <= num_experts,
        "noise": top_k <= num_experts,
        "merge": top_k <= num_experts,
        "drop": top_k <= num_experts and round(width * 0.5) >= 1,
        "split": top_k <= num_experts and width % num_experts == 0,
        "granular": top_k <= num_experts and not any(n % granularity for n in (num_experts, top_k, width)),
    }
    for name, expected in fits.items():
        method = make_method(name, **({"granularity": granularity} if name == "granular" else {}))
        if not expected:
            with pytest.raises(ValueError, match="`"):
                method.check(num_experts, top_k, width, None)
            continue
        method.check(num_experts, top_k, width, None)
        parts = {"split": num_experts, "granular": granularity}.get(name, 1)
        assert method.expert_width(width, num_experts) * parts == width
        assert method.num_router_rows(num_experts) == (num_experts // granularity if name == "granular" else num_experts)


def test_scale_is_that_of_the_papers() -> None:
    groups, granularity, top_k = 4, 2, 4
    experts = groups * granularity
    granular, paper = Granular(granularity), Granular(granularity, "cube_root")
    assert granular.role_scale("down", experts, 1.0) == granularity  # top-k, then softmax: weights sum to 1
    amplitude = groups * granularity**2 / top_k  # softmax, then top-k: weights sum to K / N
    assert granular.role_scale("down", experts, experts / top_k) == pytest.approx(amplitude)
    for role in ("gate", "up", "down", "gate_bias", "up_bias"):
        assert paper.role_scale(role, experts, experts / top_k) == pytest.approx(amplitude ** (1 / 3))
    # a part of a split FFN weighs 1/K · scale = E/K where the K weights are equal
    assert Split().role_scale("down", 8, 1.0) / 2 == 8 / 2
    for method in (granular, paper, Split(), Noise(), make_method("copy")):
        assert method.role_scale("down_bias", 8, 0.7) == 0.7  # the weighted biases add up to one whole
    assert [Noise().role_scale(role, 8, 0.7) for role in ("gate", "up", "down")] == [1, 1, 0.7]


@pytest.mark.parametrize("weights_sum", [1.0, None])
def test_uniform_router_is_asked_for_where_it_matters(weights_sum: float | None) -> None:
    for method, experts, top_k in itertools.product(MADE.values(), (1, 2, 4, 8), (1, 2, 4, 8)):
        if top_k > experts:
            continue
        uniform, other = (
            method.preserves_function(experts, top_k, StartingRouter(weights_sum, start)).exact for start in (True, False)
        )
        if method.needs_uniform_router(experts, top_k, weights_sum):
            assert uniform >= other
        else:
            assert uniform == other


# ---------------------------------------------------------------------- noise and drop


@pytest.mark.parametrize("dtype", DTYPES)
def test_noise_is_relative_to_each_matrix(dtype: torch.dtype) -> None:
    dense = ffn_weights(96, 160, dtype=dtype)
    dense["up"] *= 30
    expert = expert_ffn(Noise(0.25), dense, 1, 4, seed=3)
    for role in ("gate", "up", "down"):
        assert expert[role].dtype == dtype
        noise = expert[role].double() - dense[role].double()
        std = dense[role].double().std().item()
        assert noise.std().item() == pytest.approx(0.25 * std, rel=0.03)
        assert abs(noise.mean()) < 0.01 * std
    for role in ("gate_bias", "up_bias", "down_bias"):
        assert torch.equal(expert[role], dense[role])


def test_noise_against_one_generator_and_no_chunks(monkeypatch: pytest.MonkeyPatch) -> None:
    weight = torch.randn(37, 64) + 2
    expected = weight + 0.1 * weight.std(correction=0) * torch.randn(37, 64, generator=torch.Generator().manual_seed(5))
    torch.testing.assert_close(add_noise(weight, 0.1, torch.Generator().manual_seed(5)), expected)
    monkeypatch.setattr("hf_moe.conversion.expert_weights._CHUNK", 5 * 64)
    noise = (add_noise(weight, 0.1, torch.Generator().manual_seed(5)) - weight) / (0.1 * weight.std(correction=0))
    generator = torch.Generator().manual_seed(5)
    chunks = [torch.randn(n, 64, generator=generator) for n in (5,) * 7 + (2,)]
    torch.testing.assert_close(noise, torch.cat(chunks), rtol=0, atol=1e-4)


@given(st.integers(2, 12), st.integers(1, 40), st.floats(0.05, 1.0), st.integers(0, 10**6), st.sampled_from(DTYPES))
@settings(max_examples=40, deadline=None)
def test_drop_replaces_one_set_of_neurons(hidden: int, width: int, ratio: float, seed: int, dtype: torch.dtype) -> None:
    """Element by element: outside the set bits are kept, inside they are new, and the set is that of all tensors."""
    method = Drop(ratio)
    if not method.num_dropped(width):
        return
    dense = ffn_weights(hidden, width, seed, dtype)
    neurons = set(dropped_neurons(method, width, layer=0, expert=2, seed=seed).tolist())
    assert len(neurons) == round(ratio * width)
    expert = expert_ffn(method, dense, 2, 4, seed)
    for role in ("gate", "up", "down", "gate_bias", "up_bias"):
        by_neuron, source = (w[role].T if role == "down" else w[role] for w in (expert, dense))
        assert expert[role].dtype == dtype
        assert expert[role].is_contiguous()
        for neuron in range(width):
            if neuron not in neurons:
                assert torch.equal(by_neuron[neuron], source[neuron])
            elif by_neuron.dim() == 2:
                assert not torch.equal(by_neuron[neuron], source[neuron])
    assert torch.equal(expert["down_bias"], dense["down_bias"])


@pytest.mark.parametrize("role", ["gate", "down", "up_bias"])
def test_drop_draws_from_the_replaced_entries_distribution(role: Role) -> None:
    width, hidden = (20000, 1) if role == "up_bias" else (400, 300)
    weight = ffn_weights(hidden, width, dtype=torch.float32)[role]
    dimension = NEURON_DIMENSION[role] or 0
    neurons = torch.arange(0, width, 2)
    weight.index_copy_(dimension, neurons, 3 + 0.5 * weight.index_select(dimension, neurons))  # unlike the rest
    before = weight.index_select(dimension, neurons)
    after = draw_anew(weight, role, neurons, torch.Generator().manual_seed(1)).index_select(dimension, neurons)
    assert after.mean().item() == pytest.approx(before.mean().item(), abs=0.02)
    assert after.std().item() == pytest.approx(before.std().item(), rel=0.02)
    correlation = torch.corrcoef(torch.stack([before.flatten(), after.flatten()]))[0, 1]
    assert abs(correlation) < 0.05


@pytest.mark.parametrize("method", [Noise(), Drop()])
def test_randomness_follows_seed_layer_expert_and_nothing_else(method: Method) -> None:
    dense = ffn_weights(8, 24, dtype=torch.float32)

    def weight(layer: int, expert: int, role: Role, seed: int) -> Tensor:
        torch.rand(3)  # the global generator is not asked
        return expert_weight(method, layer=layer, expert=expert, role=role, load=dense.__getitem__, num_experts=4, seed=seed)

    keys = list(itertools.product((0, 1), (0, 3), ("gate", "up", "down"), (0, -7)))
    first = {key: weight(*key) for key in keys}
    assert all(torch.equal(weight(*key), first[key]) for key in reversed(keys))
    for a, b in itertools.combinations(keys, 2):
        assert first[a].shape != first[b].shape or not torch.equal(first[a], first[b])
    assert all(torch.equal(dense[role], source) for role, source in ffn_weights(8, 24, dtype=torch.float32).items())


# ---------------------------------------------------------------------- granular and split


@given(
    groups=st.integers(1, 4),
    granularity=st.integers(2, 4),
    chosen=st.integers(1, 4),
    shard_width=st.integers(1, 5),
    hidden=st.integers(1, 6),
    gated=st.booleans(),
    seed=st.integers(0, 10**6),
    equal=st.booleans(),
)
@settings(max_examples=60, deadline=None)
def test_granular_is_the_dense_function(
    groups: int, granularity: int, chosen: int, shard_width: int, hidden: int, gated: bool, seed: int, equal: bool
) -> None:
    """One top-k over repeated router rows takes whole groups, and those are the dense FFN, for every weighting of groups."""
    experts, top_k, width = groups * granularity, min(chosen, groups) * granularity, shard_width * granularity
    method = Granular(granularity)
    method.check(experts, top_k, width)
    dense = ffn_weights(hidden, width, seed)
    x = torch.randn(hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    rows = torch.zeros(groups, hidden).double() if equal else ffn_weights(hidden, groups, seed + 1)["up"]
    logits = router_rows(method, rows, experts) @ x
    values, ids = logits.sort(descending=True, stable=True)
    weights = values[:top_k].softmax(dim=0)
    total = torch.zeros(hidden, dtype=torch.float64)
    for weight, expert in zip(weights, ids[:top_k].tolist(), strict=True):
        tensors = expert_ffn(method, dense, expert, experts, seed)
        scaled = {role: tensor * method.role_scale(role, experts, 1.0) for role, tensor in tensors.items()}
        total += weight * apply_ffn(scaled, x, gated)
    torch.testing.assert_close(total, apply_ffn(dense, x, gated), rtol=1e-10, atol=1e-10)


def test_granular_shards_in_order() -> None:
    dense = ffn_weights(3, 6)
    for expert in range(6):
        tensors = expert_ffn(Granular(3), dense, expert, 6, seed=0)
        kept = [2 * (expert % 3), 2 * (expert % 3) + 1]
        for role in ("gate", "up", "gate_bias", "up_bias"):
            assert torch.equal(tensors[role], torch.stack([dense[role][i] for i in kept]))
        assert torch.equal(tensors["down"], torch.stack([dense["down"][:, i] for i in kept], dim=1))
        assert torch.equal(tensors["down_bias"], dense["down_bias"])
        assert Granular(3).first_twin(expert) == expert % 3


def test_router_rows_are_repeated_by_group() -> None:
    rows = torch.arange(6.0).view(3, 2)
    assert router_rows(Granular(2), rows, 6).tolist() == [[0, 1], [0, 1], [2, 3], [2, 3], [4, 5], [4, 5]]
    assert router_rows(Split(), rows, 3) is rows
    with pytest.raises(ValueError, match=r"3 rows.*draws 6"):
        router_rows(make_method("copy"), rows, 6)


ASSIGNMENTS = ("random", "clustered", "coactivation")


@given(
    experts=st.integers(1, 6),
    part=st.integers(1, 5),
    hidden=st.integers(1, 6),
    gated=st.booleans(),
    seed=st.integers(0, 10**6),
    assignment=st.sampled_from(ASSIGNMENTS),
)
@settings(max_examples=60, deadline=None)
def test_split_parts_add_up(experts: int, part: int, hidden: int, gated: bool, seed: int, assignment: str) -> None:
    width = experts * part
    dense = ffn_weights(hidden, width, seed)
    method = make_method("split", assignment=assignment)
    assert isinstance(method, Split)
    features = dense["up"] if assignment == "coactivation" else None
    arguments = {"layer": 0, "intermediate_size": width, "num_experts": experts, "seed": seed, "has_gate": gated}
    neurons = split_neurons(method, load=dense.__getitem__, features=features, **arguments)
    assert neurons.shape == (experts, part)
    assert sorted(neurons.flatten().tolist()) == list(range(width))
    assert torch.equal(neurons, neurons.sort(dim=1).values)
    x = torch.randn(hidden, dtype=torch.float64, generator=torch.Generator().manual_seed(seed))
    total = torch.zeros(hidden, dtype=torch.float64)
    for expert in range(experts):
        tensors = expert_ffn(method, dense, expert, experts, seed, neurons)
        for i, neuron in enumerate(neurons[expert].tolist()):
            assert torch.equal(tensors["up"][i], dense["up"][neuron])
            assert torch.equal(tensors["down"][:, i], dense["down"][:, neuron])
        scaled = {role: tensor * method.role_scale(role, experts, 1.0) for role, tensor in tensors.items()}
        total += apply_ffn(scaled, x, gated) / experts
    torch.testing.assert_close(total, apply_ffn(dense, x, gated), rtol=1e-10, atol=1e-10)


def test_split_follows_seed_and_layer() -> None:
    arguments = {"intermediate_size": 64, "num_experts": 4, "load": ffn_weights(8, 64).__getitem__, "has_gate": True}
    for assignment in ("random", "clustered"):
        divide = partial(split_neurons, Split(assignment), **arguments)
        first = divide(layer=1, seed=2)
        assert torch.equal(divide(layer=1, seed=2), first)
        assert not torch.equal(divide(layer=0, seed=2), first)
        assert not torch.equal(divide(layer=1, seed=3), first)


def test_split_refusals() -> None:
    load = ffn_weights(8, 12).__getitem__
    arguments = {"layer": 3, "seed": 0, "load": load, "has_gate": True}
    with pytest.raises(ValueError, match=r"`num_experts`=5 .*`intermediate_size`=12"):
        split_neurons(Split(), intermediate_size=12, num_experts=5, **arguments)
    with pytest.raises(ValueError, match=r"coactivation.*\(12, tokens\) in layer 3, not None"):
        split_neurons(Split("coactivation"), intermediate_size=12, num_experts=4, **arguments)
    with pytest.raises(ValueError, match="`neurons_EW` of shape None"):
        expert_weight(Split(), layer=0, expert=0, role="up", load=load, num_experts=4, seed=0)


def assignment_oracle(similarity: list[list[float]], clusters: int) -> list[int]:
    """The rule of `balanced_assignment`, row by row."""
    room = [len(similarity) // clusters] * clusters
    placed = [-1] * len(similarity)
    while -1 in placed:
        asking: dict[int, list[tuple[float, int]]] = {c: [] for c in range(clusters)}
        for row, values in enumerate(similarity):
            if placed[row] < 0:
                ranked = sorted((c for c in range(clusters) if room[c]), key=lambda c: -values[c])
                loss = values[ranked[0]] - values[ranked[1]] if len(ranked) > 1 else float("inf")
                asking[ranked[0]].append((-loss, row))
        for cluster, rows in asking.items():
            for _, row in sorted(rows)[: room[cluster]]:
                placed[row] = cluster
            room[cluster] -= min(room[cluster], len(rows))
    return placed


@given(st.integers(1, 6), st.integers(1, 5), st.integers(0, 10**6))
@settings(max_examples=60, deadline=None)
def test_balanced_assignment_against_a_loop(clusters: int, part: int, seed: int) -> None:
    similarity = torch.randn(clusters * part, clusters, generator=torch.Generator().manual_seed(seed))
    got = balanced_assignment(similarity)
    assert got.bincount(minlength=clusters).tolist() == [part] * clusters
    assert got.tolist() == assignment_oracle(similarity.tolist(), clusters)


@pytest.mark.parametrize("seed", range(5))
def test_balanced_assignment_is_the_best_for_two(seed: int) -> None:
    similarity = torch.randn(8, 2, generator=torch.Generator().manual_seed(seed))

    def total(first: tuple[int, ...]) -> float:
        return sum(similarity[i, 0 if i in first else 1].item() for i in range(8))

    best = max(itertools.combinations(range(8), 4), key=total)
    assert balanced_assignment(similarity).eq(0).nonzero().flatten().tolist() == list(best)


@pytest.mark.parametrize("dtype", DTYPES)
def test_kmeans_finds_planted_clusters(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """Rows of 4 directions and very different lengths, in chunks that cut across everything."""
    monkeypatch.setattr("hf_moe.conversion.expert_weights._CHUNK", 7 * 32)
    generator = torch.Generator().manual_seed(0)
    directions = torch.linalg.qr(torch.randn(32, 4, generator=generator)).Q.T
    truth = torch.randperm(48, generator=generator) % 4
    rows = (directions[truth] + 0.05 * torch.randn(48, 32, generator=generator)) * (1 + truth).view(-1, 1) * 10
    found = balanced_kmeans(rows.to(dtype), 4, generator)
    assert sorted(found.tolist()) == sorted((truth == c).nonzero().flatten().tolist() for c in range(4))


def test_kmeans_gathers_similar_rows() -> None:
    """Without planted clusters: rows of a cluster are nearer to its mean than with a random division."""
    rows = torch.randn(96, 16, generator=torch.Generator().manual_seed(0))
    unit = F.normalize(rows, dim=1)

    def spread(neurons: Tensor) -> float:
        return sum((unit[n] - unit[n].mean(dim=0)).square().sum().item() for n in neurons)

    found = spread(balanced_kmeans(rows, 6, torch.Generator().manual_seed(0)))
    divided = [spread(torch.randperm(96, generator=torch.Generator().manual_seed(s)).view(6, -1)) for s in range(20)]
    assert found < min(divided) - 5


def test_kmeans_looks_at_directions_only() -> None:
    rows = torch.randn(96, 16, generator=torch.Generator().manual_seed(0))
    scaled = rows * 2.0 ** torch.randint(-6, 7, (96, 1), generator=torch.Generator().manual_seed(1))
    found, again = (balanced_kmeans(r, 6, torch.Generator().manual_seed(0)) for r in (rows, scaled))
    assert torch.equal(found, again)


def test_coactivation_puts_together_what_is_active_together() -> None:
    """Whatever the sign: two groups of neurons, each active on its own tokens."""
    active = torch.zeros(8, 20)
    active[::2, :10] = 1
    active[1::2, 10:] = 1
    features = active * torch.randn(8, 20, generator=torch.Generator().manual_seed(0))
    arguments = {"layer": 0, "intermediate_size": 8, "num_experts": 2, "seed": 0, "has_gate": True}
    neurons = split_neurons(Split("coactivation"), load=ffn_weights(2, 8).__getitem__, features=features, **arguments)
    assert sorted(neurons.tolist()) == [[0, 2, 4, 6], [1, 3, 5, 7]]


# ---------------------------------------------------------------------- averages


@pytest.mark.parametrize("dtype", [*DTYPES, torch.float16])
@pytest.mark.parametrize("count", [1, 2, 3, 7])
def test_average_keeps_equal_bits(count: int, dtype: torch.dtype) -> None:
    same = torch.cat([torch.randn(300), torch.tensor([0.0, -0.0, 1e-40, 3e-39, -1e-7, float("inf")])]).to(dtype)
    mean = average_tensors([same.clone() for _ in range(count)])
    assert mean.dtype == dtype
    assert torch.equal(mean.view(torch.uint8), same.view(torch.uint8))


@pytest.mark.parametrize("dtype", DTYPES)
def test_average_against_fp64(dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("hf_moe.conversion.expert_weights._CHUNK", 50)
    generator = torch.Generator().manual_seed(0)
    tensors = [torch.randn(9, 31, generator=generator, dtype=torch.float64).to(dtype) for _ in range(4)]
    tensors[0][3, 20] = -0.0  # in a chunk with others that move
    tensors[1][:4] = tensors[2][:4] = tensors[3][:4] = tensors[0][:4]
    sources = [t.clone() for t in tensors]
    mean = average_tensors(tensors)
    torch.testing.assert_close(mean, torch.stack(tensors).double().mean(dim=0).to(dtype), rtol=0, atol=1e-15)
    assert torch.equal(mean[:4].view(torch.uint8), tensors[0][:4].view(torch.uint8))
    assert all(torch.equal(a, b) for a, b in zip(tensors, sources, strict=True))
    transposed = average_tensors([t.T for t in tensors])
    assert torch.equal(transposed, mean.T)


def test_average_refuses_what_differs() -> None:
    with pytest.raises(ValueError, match="one shape and dtype"):
        average_tensors([torch.zeros(2), torch.zeros(3)])
    with pytest.raises(ValueError, match="one shape and dtype"):
        average_tensors([torch.zeros(2), torch.zeros(2).bfloat16()])


# ---------------------------------------------------------------------- models


def dense_model(family: str, seed: int = 0) -> PreTrainedModel:
    """A model in fp64, with weights so large that a wrong FFN shows."""
    torch.manual_seed(seed)
    model = AutoModelForCausalLM.from_config(text_config(family, initializer_range=0.2)).eval().double()
    for name, parameter in model.named_parameters():
        if name.endswith("bias"):
            nn.init.normal_(parameter, std=0.2)
    return model


@torch.no_grad()
def build(
    dense: PreTrainedModel, method: Method, router_std: float, ffns: list[PreTrainedModel] | None = None, **fields: object
) -> MoEForCausalLM:
    """The MoE by hand: dense weights by name, experts from `expert_weight`, routers from `router_rows`."""
    sites = find_ffns(dense, dense.config.num_hidden_layers)
    width = sites[0].intermediate_size
    experts = fields["num_experts"]
    assert isinstance(experts, int)
    config = MoEConfig(text_config=dense.config, moe_intermediate_size=method.expert_width(width, experts), **fields)
    torch.manual_seed(1)
    moe = MoEForCausalLM(config).eval().to(dense.dtype)
    replaced = tuple(prefix for site in sites for prefix in site.weight_prefixes)
    kept = {name: value for name, value in dense.state_dict().items() if not name.startswith(replaced)}
    moe.language_model.load_state_dict(kept, strict=False)
    weights_sum = config.weights_sum or config.num_experts_per_tok / experts
    for site, layer in zip(sites, moe.moe_layers, strict=True):
        models = [site.weights(model) for model in ffns or [dense] * experts]
        neurons = None
        if isinstance(method, Split):
            split = partial(split_neurons, method, layer=site.layer_index, seed=0, has_gate=site.kind.has_gate)
            neurons = split(intermediate_size=width, num_experts=experts, load=models[0].__getitem__)
        for expert, role in itertools.product(range(experts), models[0]):
            arguments = {"layer": site.layer_index, "num_experts": experts, "seed": 0, "neurons_EW": neurons}
            tensor = expert_weight(method, expert=expert, role=role, load=models[expert].__getitem__, **arguments)
            _place(layer.experts, role, expert, tensor * method.role_scale(role, experts, 1 / weights_sum))
        if hasattr(layer.gate, "weight") and not getattr(layer.gate, "zero_init", False):
            rows = torch.randn(method.num_router_rows(experts), config.get_text_config().hidden_size) * router_std
            layer.gate.weight.copy_(router_rows(method, rows, experts))
    return moe


def _place(experts: nn.Module, role: str, expert: int, tensor: Tensor) -> None:
    projection, _, bias = role.partition("_")
    suffix = "_bias" if bias else ""
    width = experts.intermediate_dim
    if projection == "down":
        getattr(experts, f"down_proj{suffix}")[expert].copy_(tensor)
    elif experts.has_gate:
        rows = slice(0, width) if projection == "gate" else slice(width, 2 * width)
        getattr(experts, f"gate_up_proj{suffix}")[expert, rows].copy_(tensor)
    else:
        getattr(experts, f"up_proj{suffix}")[expert].copy_(tensor)


def difference(moe: MoEForCausalLM, dense: PreTrainedModel) -> float:
    ids = torch.randint(3, 128, (2, 11), generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        return (moe(ids).logits - dense(ids).logits).abs().max().item()


ROUTERS: dict[str, dict[str, object]] = {
    "top_k": {},
    "top_k_not_normalised": {"norm_topk_prob": False},
    "noisy_top_k": {"router_type": "noisy_top_k"},
    "gshard": {"router_type": "gshard"},
    "hash": {"router_type": "hash"},
    "sigmoid": {"router_type": "sigmoid", "routed_scaling_factor": 2.5},
    "sigmoid_in_groups": {"router_type": "sigmoid", "n_group": 4, "topk_group": 2, "num_experts": 12},
    "hierarchical": {"router_type": "hierarchical", "n_group": 2, "topk_group": 1},
    "hierarchical_one_each": {"router_type": "hierarchical", "n_group": 2, "topk_group": 2},
    "strictly_balanced": {"router_type": "strictly_balanced"},
    "expert_choice": {"router_type": "expert_choice", "allow_non_causal": True, "num_experts": 8},
    "all_experts": {"num_experts_per_tok": 4},
    "all_experts_not_normalised": {"num_experts_per_tok": 4, "norm_topk_prob": False},
}
MADE: dict[str, Method] = {
    "copy": make_method("copy"),
    "noise": Noise(),
    "drop": Drop(),
    "granular": Granular(2),
    "cube_root": Granular(2, "cube_root"),
    "split": Split(),
    "clustered": Split("clustered"),
}


@pytest.mark.parametrize("uniform", [True, False])  # but for rounding: exactly equal logits would always choose the first
@pytest.mark.parametrize("router", ROUTERS)
@pytest.mark.parametrize("name", MADE)
def test_promises_are_kept(name: str, router: str, uniform: bool) -> None:
    """What `preserves_function` says is what a model in fp64 does, for every method, router and start of the router."""
    dense, method = dense_model("llama_biases"), MADE[name]
    fields = {"num_experts": 4, "num_experts_per_tok": 2, **ROUTERS[router]}
    moe = build(dense, method, 1e-12 if uniform else 0.3, **fields)
    config, gate = moe.config, moe.moe_layers[0].gate
    method.check(config.num_experts, config.num_experts_per_tok, 48, config.weights_sum)
    starting = StartingRouter(
        config.weights_sum, uniform or getattr(gate, "zero_init", False), config.router_type, config.n_group, config.topk_group
    )
    promise = method.preserves_function(config.num_experts, config.num_experts_per_tok, starting)
    found = difference(moe, dense)
    assert found <= 1e-10 if promise.exact else found > 1e-4, (str(promise), found)


@pytest.mark.parametrize("family", ["llama", "gpt2", "opt", "phi3", "starcoder2"])
@pytest.mark.parametrize(("name", "top_k", "std"), [("granular", 2, 0.3), ("granular", 4, 0.0), ("split", 8, 0.0)])
def test_exact_families(family: str, name: str, top_k: int, std: float) -> None:
    dense = dense_model(family)
    moe = build(dense, MADE[name], std, num_experts=8, num_experts_per_tok=top_k)
    assert difference(moe, dense) <= 1e-10
    moe.moe_layers[1].experts.down_proj.data[1] *= 1.5  # the experts matter
    assert difference(moe, dense) > 1e-4


def test_exact_in_fp32() -> None:
    dense = dense_model("llama").float()
    for name, top_k, std in (("granular", 4, 0.3), ("split", 8, 0.0)):
        assert difference(build(dense, MADE[name], std, num_experts=8, num_experts_per_tok=top_k), dense) <= 1e-5


def test_merge_gives_each_model_an_expert() -> None:
    """With a router that sends all tokens to expert i, the MoE of a base and fine-tuned FFNs is model i."""
    base = dense_model("gpt2")
    tuned = [dense_model("gpt2", seed) for seed in (1, 2, 3)]
    replaced = tuple(p for site in find_ffns(base, 3) for p in site.weight_prefixes)
    rest = {name: value for name, value in base.state_dict().items() if not name.startswith(replaced)}
    for model in tuned:
        model.load_state_dict(rest, strict=False)
    moe = build(base, make_method("merge"), 0.0, ffns=tuned, num_experts=3, num_experts_per_tok=1)
    gates: list[Callable[..., object]] = [layer.gate.route for layer in moe.moe_layers]
    for i, model in enumerate(tuned):
        for layer, route in zip(moe.moe_layers, gates, strict=True):
            layer.gate.route = lambda x, mask, route=route, i=i: _always(route(x, mask), i)
        assert difference(moe, model) <= 1e-10
        assert difference(moe, tuned[i - 1]) > 1e-3


def _always(routing: object, expert: int) -> object:
    return type(routing).of(torch.full_like(routing.expert_ids_TK, expert), routing.weights_TK, routing.logits_TE)
