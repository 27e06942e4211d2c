"""The Triton router against plain torch in fp64: choice, weights, counts and the gradient of the logits."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor
from triton_cases import DEVICE, needs_triton

from hf_moe import MoEConfig, auto
from hf_moe.routers import KERNELS, ROUTERS, Router

triton_router = pytest.importorskip("hf_moe.triton_router", exc_type=ImportError)
pytestmark = needs_triton
# T, E, K
SIZES = [(7, 5, 2), (1, 1, 1), (70, 64, 8), (9, 300, 6), (5, 1024, 8), (33, 3, 3), (6, 17, 17), (130, 8, 1)]
RULES = [("softmax", True), ("softmax", False), ("sigmoid", True), ("sigmoid", False)]


def oracle(
    logits_TE: Tensor, top_k: int, scoring: str, renormalise: bool, bias_E: Tensor | None, scale: float
) -> tuple[Tensor, Tensor]:
    """Weights and ids, by a stable sort of all scores."""
    scores_TE = logits_TE.softmax(dim=-1) if scoring == "softmax" else logits_TE.sigmoid()
    choice_TE = scores_TE.detach() if bias_E is None else scores_TE.detach() + bias_E
    ids_TK = choice_TE.sort(dim=-1, descending=True, stable=True).indices[:, :top_k]
    weights_TK = scores_TE.gather(1, ids_TK)
    if renormalise:
        weights_TK = weights_TK / weights_TK.sum(dim=-1, keepdim=True)
    return weights_TK * scale, ids_TK


@pytest.mark.parametrize(("scoring", "renormalise"), RULES)
@pytest.mark.parametrize("sizes", SIZES, ids=str)
def test_equals_the_oracle(sizes: tuple[int, int, int], scoring: str, renormalise: bool) -> None:
    tokens, num_experts, top_k = sizes
    torch.manual_seed(num_experts)
    logits = (2 * torch.randn(tokens, num_experts)).to(DEVICE).requires_grad_()
    bias = torch.randn(num_experts).to(DEVICE) if scoring == "sigmoid" else None
    direction = torch.randn(tokens, top_k).to(DEVICE)
    found = triton_router.route(logits, top_k, scoring, renormalise, bias, scale=2.5)
    (slope,) = torch.autograd.grad((found.weights_TK * direction).sum(), logits)

    exact = logits.detach().double().requires_grad_()
    weights, ids = oracle(exact, top_k, scoring, renormalise, bias, 2.5)
    (expected,) = torch.autograd.grad((weights * direction).sum(), exact)
    assert found.weights_TK.dtype == torch.float32
    assert found.ids_TK.dtype == found.counts_E.dtype == torch.int64
    assert torch.equal(found.ids_TK, ids)
    assert torch.equal(found.counts_E, ids.flatten().bincount(minlength=num_experts))
    torch.testing.assert_close(found.weights_TK.double(), weights, rtol=1e-5, atol=1e-6)
    torch.testing.assert_close(slope.double(), expected, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("scoring", ["softmax", "sigmoid"])
def test_equal_scores_go_to_the_lower_index(scoring: str) -> None:
    logits = torch.tensor([[0.0, 0, 0, 0, 0, 0], [1, 2, 1, 2, 2, 1], [-5, -5, 3, -5, 3, -5], [-0.0, 0, -0.0, 0, 0, 0]]).to(
        DEVICE
    )
    ids = triton_router.route(logits, 4, scoring).ids_TK
    assert ids.tolist() == [[0, 1, 2, 3], [1, 3, 4, 0], [2, 4, 0, 1], [0, 1, 2, 3]]


def test_experts_that_are_masked_out() -> None:
    """Of logits -inf each is still chosen once, with weight 0 and gradient 0."""
    logits = torch.tensor([[float("-inf"), 1.0, float("-inf"), 2.0, float("-inf")]]).to(DEVICE).requires_grad_()
    found = triton_router.route(logits, 4)
    assert found.ids_TK.tolist() == [[3, 1, 0, 2]]
    torch.testing.assert_close(found.weights_TK.detach()[0, :2].cpu(), torch.tensor([2.0, 1.0]).softmax(dim=0))
    (slope,) = torch.autograd.grad(found.weights_TK[0, 0], logits)
    assert not found.weights_TK[0, 2:].any()
    assert not slope[0, [0, 2, 4]].any()
    assert slope[0, 3] > 0


def test_padding_is_routed_but_not_counted() -> None:
    torch.manual_seed(0)
    logits = torch.randn(50, 6).to(DEVICE)
    mask = (torch.arange(50) % 3 > 0).to(DEVICE)
    found, every = (triton_router.route(logits, 2, token_mask_T=m) for m in (mask, None))
    assert torch.equal(found.ids_TK, every.ids_TK)
    assert torch.equal(found.counts_E, every.ids_TK[mask].flatten().bincount(minlength=6))


def test_layouts_and_no_tokens() -> None:
    torch.manual_seed(0)
    logits = torch.randn(12, 7).to(DEVICE)
    expected = triton_router.route(logits, 3)
    for view in (logits.t().contiguous().t(), torch.stack([logits, logits], dim=1)[:, 1]):
        assert not view.is_contiguous()
        for found, tensor in zip(triton_router.route(view, 3), expected, strict=True):
            assert torch.equal(found, tensor)
    leaf = logits[:0].clone().requires_grad_()
    none = triton_router.route(leaf, 3)
    assert [tuple(tensor.shape) for tensor in none] == [(0, 3), (0, 3), (7,)]
    assert not none.counts_E.any()
    none.weights_TK.sum().backward()
    assert leaf.grad is not None
    assert leaf.grad.shape == (0, 7)


ROUTER_CASES = [
    ("top_k", {}),
    ("top_k", {"norm_topk_prob": False}),
    ("switch", {"num_experts_per_tok": 1}),
    ("sigmoid", {"routed_scaling_factor": 2.5}),
]


def build_router(router_type: str, fields: dict) -> Router:
    config = MoEConfig(router_type=router_type, num_experts=12, **{"num_experts_per_tok": 3, **fields})
    router = ROUTERS[router_type](config, 16, 12).to(DEVICE)
    assert isinstance(router, Router)
    torch.nn.init.normal_(router.weight)
    if router_type == "sigmoid":
        router.e_score_correction_bias.normal_()
    return router


@pytest.mark.parametrize("explored", [False, True])
@pytest.mark.parametrize(("router_type", "fields"), ROUTER_CASES)
def test_our_routers_take_it(router_type: str, fields: dict, explored: bool, monkeypatch: pytest.MonkeyPatch) -> None:
    """The same plan and gradients as without it; not for `"eager"`, which has a second derivative."""
    torch.manual_seed(0)
    router = build_router(router_type, fields)
    if explored:
        router.exploration_bonus = torch.linspace(-1, 1, 12).to(DEVICE)
    calls = []

    def kernel(*args: Any, **kwargs: Any) -> Any:
        calls.append(kwargs)
        return auto._route_with_triton(*args, **kwargs)

    monkeypatch.setitem(KERNELS, DEVICE.type, kernel)
    x = torch.randn(30, 16).to(DEVICE)
    direction = torch.randn(30, 12).to(DEVICE)
    found = []
    for implementation in ("eager", "hf_moe"):
        router.config._experts_implementation = implementation
        leaf = x.clone().requires_grad_()
        routing = router(leaf)
        assert len(calls) == (implementation == "hf_moe")
        loss = (routing.weights_TK * direction[:, : routing.weights_TK.shape[1]]).sum() + (routing.logits_TE * direction).sum()
        found.append([routing.expert_ids_TK, routing.weights_TK, *torch.autograd.grad(loss, [leaf, router.weight])])
    (ids, *expected), (ids_by_kernel, *by_kernel) = found
    assert torch.equal(ids_by_kernel, ids)
    torch.testing.assert_close(by_kernel[0], expected[0], rtol=1e-5, atol=1e-6)
    for slope, other in zip(by_kernel[1:], expected[1:], strict=True):
        torch.testing.assert_close(slope, other, rtol=1e-5, atol=1e-5)


def test_our_routers_do_without_it(monkeypatch: pytest.MonkeyPatch) -> None:
    """Where it does not take the logits, under a compiler, under `torch.func`, and where groups limit the choice."""
    torch.manual_seed(0)
    monkeypatch.setitem(KERNELS, DEVICE.type, auto._route_with_triton)
    router, x = build_router("top_k", {}), torch.randn(30, 16).to(DEVICE)
    router.config._experts_implementation = "hf_moe"
    expected = router(x)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: router(x).weights_TK, fullgraph=True, backend="aot_eager")(x)
    torch.testing.assert_close(compiled, expected.weights_TK)
    _, slope = torch.func.jvp(lambda x: router(x).weights_TK.sum(), (x,), (torch.ones_like(x),))
    assert slope.isfinite()
    in_fp64 = router.double()(x.double())
    assert in_fp64.weights_TK.dtype == torch.float64
    assert torch.equal(in_fp64.expert_ids_TK, expected.expert_ids_TK)
    grouped = build_router("sigmoid", {"n_group": 3, "topk_group": 1})
    grouped.config._experts_implementation = "hf_moe"
    groups = grouped(x).expert_ids_TK // 4
    assert torch.equal(groups, groups[:, :1].expand(-1, 3))


def test_is_registered_for_gpus() -> None:
    assert list(KERNELS.items()) == [("cuda", auto._route_with_triton)]


@pytest.mark.parametrize(
    ("name", "arguments"),
    [
        ("top_k", {"top_k": 0}),
        ("top_k", {"top_k": 7}),
        ("scoring", {"scoring": "relu"}),
        ("selection_bias_E", {"selection_bias_E": torch.zeros(6)}),
        ("logits_TE", {"logits_TE": torch.zeros(4, 6, dtype=torch.bfloat16)}),
        ("logits_TE", {"logits_TE": torch.zeros(4, 1025)}),
    ],
)
def test_errors_name_the_argument(name: str, arguments: dict) -> None:
    with pytest.raises(ValueError, match=f"`{name}`"):
        triton_router.route(**{"logits_TE": torch.zeros(4, 6, device=DEVICE), "top_k": 2, **arguments})


def test_double_backward_is_refused() -> None:
    logits = torch.randn(4, 6, device=DEVICE, requires_grad=True)
    (slope,) = torch.autograd.grad(triton_router.route(logits, 2).weights_TK.square().sum(), logits, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        slope.sum().backward()


def test_compiles_without_a_break() -> None:
    logits = torch.randn(9, 6, device=DEVICE, requires_grad=True)
    torch._dynamo.reset()
    compiled = torch.compile(lambda x: tuple(triton_router.route(x, 2)), fullgraph=True, backend="aot_eager")
    found, expected = (f(logits) for f in (compiled, lambda x: triton_router.route(x, 2)))
    slopes = [torch.autograd.grad(weights.square().sum(), logits)[0] for weights, *_ in (found, expected)]
    torch.testing.assert_close(slopes[0], slopes[1])
    for tensor, other in zip(found, expected, strict=True):
        torch.testing.assert_close(tensor, other)
    torch.library.opcheck(torch.ops.hf_moe.triton_route, (logits, 2, "softmax", True, None, 1.0, None))
