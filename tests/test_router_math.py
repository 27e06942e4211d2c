"""The router's fast arithmetic against plain oracles, gradients included: projection, sums, top-k, losses at once."""

from collections.abc import Callable

import pytest
import torch
from torch import Tensor
from torch.nn import functional as F

from hf_moe.record import layer_losses, losses_of_layers, routing_sums
from hf_moe.router_math import project
from hf_moe.routing import Routing, top_k

TOLERANCE = {torch.float64: 1e-10, torch.float32: 1e-5}
# tokens, experts, K
SHAPES = [(1, 1, 1), (7, 5, 2), (300, 8, 8), (513, 64, 2), (33, 256, 8)]
MASKS: dict[str, Callable[[int], Tensor | None]] = {
    "all_real": lambda tokens: None,
    "padded": lambda tokens: torch.rand(tokens) < 0.7,
    "all_padding": lambda tokens: torch.zeros(tokens, dtype=torch.bool),
}


def plain_sums(logits: Tensor, weights: Tensor, ids: Tensor, mask: Tensor | None) -> dict[str, Tensor]:
    """Token by token and slot by slot."""
    experts = logits.shape[1]
    real = torch.ones(len(logits), dtype=torch.bool) if mask is None else mask
    chosen = F.one_hot(ids, experts + 1)[..., :experts].to(logits.dtype)[real]  # the last column: empty slots
    probs = logits[real].softmax(-1)
    return {
        "tokens": real.sum().to(logits.dtype),
        "counts": chosen.sum((0, 1)),
        "executed": chosen.sum((0, 1)),
        "importance": (chosen * weights[real].unsqueeze(-1)).sum((0, 1)),
        "probs": probs.sum(0),
        "z": logits[real].logsumexp(-1).square().sum(),
        "entropy": torch.special.entr(probs.detach()).sum(),
    }


def plan(tokens: int, experts: int, k: int, dtype: torch.dtype, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """Logits and weights that want gradients, and ids of which some are empty slots."""
    torch.manual_seed(seed)
    logits = (3 * torch.randn(tokens, experts, dtype=dtype)).requires_grad_()
    ids = torch.stack([torch.randperm(experts)[:k] for _ in range(tokens)])
    ids[torch.rand(tokens, k) < 0.1] = experts
    return logits, torch.rand(tokens, k, dtype=dtype, requires_grad=True), ids


def gradients_of(sums: dict[str, Tensor], leaves: tuple[Tensor, ...], seed: int) -> tuple[Tensor, ...]:
    """Of a random combination of the sums that carry gradient."""
    generator = torch.Generator().manual_seed(seed)
    names = ("importance", "probs", "z")
    loss = sum((sums[n] * torch.randn(sums[n].shape, generator=generator, dtype=sums[n].dtype)).sum() for n in names)
    return torch.autograd.grad(loss, leaves, create_graph=True)


@pytest.mark.parametrize("mask", MASKS)
@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_sums(shape: tuple[int, int, int], dtype: torch.dtype, mask: str) -> None:
    for seed in range(3):
        logits, weights, ids = plan(*shape, dtype, seed)
        mask_T = MASKS[mask](shape[0])
        got = routing_sums(Routing.of(ids, weights, logits), shape[1], mask_T)
        expected = plain_sums(logits, weights, ids, mask_T)
        assert got.keys() == expected.keys()
        for name in ("tokens", "counts", "executed"):
            assert torch.equal(got[name], expected[name])
        tolerance = TOLERANCE[dtype]
        for name, value in expected.items():
            torch.testing.assert_close(got[name], value, rtol=tolerance, atol=tolerance, msg=lambda m, n=name: f"{n}: {m}")
        leaves = (logits, weights)
        for a, b in zip(gradients_of(got, leaves, seed), gradients_of(expected, leaves, seed), strict=True):
            torch.testing.assert_close(a, b, rtol=tolerance, atol=tolerance * 10 if dtype == torch.float32 else tolerance)


def test_sums_twice_differentiated() -> None:
    logits, weights, ids = plan(4, 3, 2, torch.float64, 0)
    mask = torch.tensor([True, False, True, True])

    def sums(logits: Tensor, weights: Tensor) -> tuple[Tensor, ...]:
        found = routing_sums(Routing.of(ids, weights, logits), 3, mask)
        return found["importance"].square(), found["probs"].square(), found["z"].square()

    assert torch.autograd.gradcheck(sums, (logits, weights))
    assert torch.autograd.gradgradcheck(sums, (logits, weights))


def test_sums_of_extreme_logits() -> None:
    """Large offsets cancel, -inf has the probability 0, a collapsed row has the entropy 0."""
    logits = torch.tensor([[1000.0, 1000.0], [0.0, -float("inf")], [500.0, -500.0], [-1000.0, -1001.0]])
    ids = torch.zeros(4, 1, dtype=torch.long)
    sums = routing_sums(Routing.of(ids, torch.ones(4, 1), logits), 2)
    wide = routing_sums(Routing.of(ids, torch.ones(4, 1, dtype=torch.float64), logits.double()), 2)
    probs = logits.double().softmax(-1)
    torch.testing.assert_close(sums["entropy"].double(), torch.special.entr(probs).sum(), rtol=1e-6, atol=1e-6)
    for name, value in sums.items():
        torch.testing.assert_close(value.double(), wide[name], rtol=1e-6, atol=1e-6)


def test_sums_in_autocast() -> None:
    """A bf16 product would count to 256."""
    logits, weights, ids = plan(700, 4, 2, torch.float32, 0)
    mask = torch.rand(700) < 0.9
    plain = routing_sums(Routing.of(ids, weights, logits), 4, mask)
    expected = gradients_of(plain, (logits, weights), 0)
    with torch.autocast("cpu", torch.bfloat16):
        sums = routing_sums(Routing.of(ids, weights, logits), 4, mask)
        got = gradients_of(sums, (logits, weights), 0)
    assert all(torch.equal(sums[name], plain[name]) for name in plain)
    assert all(torch.equal(a, b) for a, b in zip(got, expected, strict=True))


@pytest.mark.parametrize("autocast", [False, True])
@pytest.mark.parametrize("shape", [(1, 8, 3), (40, 64, 16), (700, 32, 8)], ids=str)
def test_projection_of_bf16_tokens(shape: tuple[int, int, int], autocast: bool) -> None:
    """It is the product in fp32 of what bf16 holds, and keeps no fp32 copy of the tokens for the backward."""
    tokens, hidden, experts = shape
    torch.manual_seed(0)
    x = torch.randn(tokens, hidden).bfloat16().requires_grad_()
    weight = torch.randn(experts, hidden, requires_grad=True)
    downstream = torch.randn(tokens, experts)
    kept: list[Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        logits = project(x, weight)
    assert logits.dtype == torch.float32
    assert {t.dtype for t in kept if t.shape == x.shape} == {torch.bfloat16}
    expected = F.linear(x.float(), weight)
    torch.testing.assert_close(logits, expected, rtol=1e-6, atol=1e-5)
    wanted = torch.autograd.grad((expected * downstream).sum(), (x, weight))
    loss = (logits * downstream).sum()
    with torch.autocast("cpu", torch.bfloat16, enabled=autocast):
        got = torch.autograd.grad(loss, (x, weight))
    for a, b in zip(got, wanted, strict=True):
        assert a.dtype == b.dtype
        torch.testing.assert_close(a, b, rtol=1e-2 if a.dtype == torch.bfloat16 else 1e-5, atol=1e-4)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize(("rows", "experts"), [(1, 16), (3, 9), (100, 16), (40, 64), (20, 256)])
def test_top_k_with_many_equal(rows: int, experts: int, dtype: torch.dtype) -> None:
    """Few values for many experts: nearly all scores have equals; gradients go to the chosen."""
    for seed, k in enumerate([1, 2, 3, 8, experts]):
        torch.manual_seed(seed)
        scores = torch.randint(-2, 3, (rows, experts)).to(dtype).requires_grad_()
        values, ids = top_k(scores, k)
        expected = [sorted(range(experts), key=lambda i, row=row: -row[i])[:k] for row in scores.tolist()]
        assert ids.tolist() == expected
        downstream = torch.randn(rows, k, dtype=dtype)
        (gradient,) = torch.autograd.grad((values * downstream).sum(), scores)
        assert torch.equal(gradient, torch.zeros_like(scores).scatter(1, ids, downstream))


@pytest.mark.parametrize("rows", [1, 100])
@pytest.mark.parametrize("k", [2, 3])
def test_top_k_where_only_one_is_finite(rows: int, k: int) -> None:
    """The others are all -inf, as outside of the groups a token may use: no expert is taken twice."""
    scores = torch.full((rows, 16), -float("inf"))
    scores[:, 5] = 1.0
    ids = top_k(scores, k)[1]
    assert ids[:, 0].tolist() == [5] * rows
    assert all(len(set(row)) == k for row in ids.tolist())


def test_sums_of_mixed_precision() -> None:
    """Logits in fp64 beside gates in fp32, as Mixtral's router makes them in a fp64 model."""
    logits, weights, ids = plan(9, 4, 2, torch.float64, 0)
    mask = torch.arange(9) < 6
    got = routing_sums(Routing.of(ids, weights.float(), logits), 4, mask)
    for name, value in plain_sums(logits, weights, ids, mask).items():
        torch.testing.assert_close(got[name].double(), value, rtol=1e-6, atol=1e-6)


def test_top_k_leaves_its_input_alone() -> None:
    scores = torch.randn(100, 64)
    for view in (scores, scores.t().contiguous().t(), scores[:, ::2]):
        before = view.clone()
        _, ids = top_k(view, 2)
        assert torch.equal(view, before)
        assert torch.equal(ids, before.topk(2, dim=-1).indices)


def test_top_k_under_function_transforms() -> None:
    scores = torch.randn(40, 64)
    gradient = torch.func.grad(lambda s: top_k(s, 2)[0].sum())(scores)
    assert torch.equal(gradient, torch.zeros_like(scores).scatter(1, scores.topk(2).indices, 1.0))


def test_losses_of_layers_at_once() -> None:
    """Layers of several kinds (sizes, K, with smooth load, without probabilities): as one by one."""
    torch.manual_seed(0)
    layers = []
    for experts, k, kind in [(8, 2, "plain"), (8, 2, "plain"), (6, 2, "load"), (8, 1, "plain"), (6, 2, "hash"), (6, 2, "load")]:
        logits, weights, ids = plan(20, experts, k, torch.float64, len(layers))
        stats = {"load": torch.rand(20, experts, dtype=torch.float64)} if kind == "load" else {}
        routing = Routing.of(ids, weights, None if kind == "hash" else logits, **stats)
        layers.append((routing_sums(routing, experts), k))
    for some in (layers, layers[:2], layers[:1], layers[4:5]):
        got = losses_of_layers(some)
        one_by_one = [layer_losses(dict(sums), k) for sums, k in some]
        for name in {name for losses in one_by_one for name in losses}:
            expected = torch.stack([losses[name] for losses in one_by_one if name in losses])
            torch.testing.assert_close(got[name], expected, rtol=0, atol=1e-10)
        assert got.keys() == {name for losses in one_by_one for name in losses}
