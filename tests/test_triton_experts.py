"""The Triton experts against the plain loop: outputs and every gradient, and what they promise beside (see triton_cases)."""

from __future__ import annotations

import copy
from typing import Any

import pytest
import torch
from torch import Tensor, nn
from triton_cases import DEVICE, Case, needs_triton, relative_error, results

triton_experts = pytest.importorskip("hf_moe.triton_experts", exc_type=ImportError)
grouped = pytest.importorskip("hf_moe.triton_grouped", exc_type=ImportError)
pytestmark = needs_triton
triton_experts_forward = triton_experts.triton_experts_forward

# sizes: T, K, E, D, F
CASES = {
    "several_blocks": Case((21, 2, 5, 40, 72)),
    "loose_sizes": Case((9, 3, 4, 70, 67)),
    "one_token": Case((1, 2, 8, 32, 16)),
    "one_expert_large_tile": Case((150, 1, 1, 16, 16)),
    "tile_of_32": Case((40, 3, 5, 24, 16)),
    "tile_of_64": Case((60, 2, 3, 17, 9)),
    "many_experts": Case((5, 6, 18, 16, 24)),
    "all_experts": Case((11, 4, 4, 16, 16)),
    "bias": Case((17, 2, 3, 35, 20), act="gelu", has_bias=True),
    "plain": Case((17, 2, 3, 35, 20), act="gelu_new", has_gate=False),
    "plain_bias_empty": Case((23, 2, 4, 20, 37), act="relu", has_gate=False, has_bias=True, empty=True),
    "bias_empty": Case((23, 3, 5, 34, 33), has_bias=True, empty=True),
}
LOW = {"bf16": (torch.bfloat16, 2**-8), "fp16": (torch.float16, 2**-11)}  # dtype and its unit roundoff


def oracle(experts: Any, inputs: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """The loop in fp64 on the same numbers."""
    experts = copy.deepcopy(experts).double()
    x, index, weights = inputs
    inputs = (x.detach().double().requires_grad_(), index, weights.detach().double().requires_grad_())
    return results(experts.loop(*inputs), experts, inputs)


@pytest.mark.parametrize("case", CASES)
def test_equals_the_loop(case: str) -> None:
    experts, inputs = CASES[case].build()
    assert triton_experts.supports(experts, inputs[0])
    found = results(triton_experts_forward(experts, *inputs), experts, inputs)
    for name, expected in oracle(experts, inputs).items():
        assert found[name].dtype == torch.float32
        assert relative_error(found[name], expected) < 2e-6, name


@pytest.mark.parametrize("case", ["several_blocks", "one_expert_large_tile", "bias_empty", "plain_bias_empty"])
@pytest.mark.parametrize("precision", LOW)
def test_low_precision(precision: str, case: str) -> None:
    """No worse than a few roundings, nor than twice the loop in that dtype."""
    dtype, roundoff = LOW[precision]
    experts, inputs = CASES[case].build(dtype)
    found = results(triton_experts_forward(experts, *inputs), experts, inputs)
    loop = results(experts.loop(*inputs), experts, inputs)
    for name, expected in oracle(experts, inputs).items():
        assert found[name].dtype == loop[name].dtype, name
        error = relative_error(found[name], expected)
        assert error < 4 * roundoff, name
        assert error < 2 * relative_error(loop[name], expected) + roundoff / 2, name


@pytest.mark.parametrize("has_gate", [True, False], ids=["gated", "plain"])
@pytest.mark.parametrize(
    "act", ["silu", "swish", "gelu", "gelu_new", "gelu_pytorch_tanh", "quick_gelu", "relu", "relu2", "linear"]
)
def test_activations(act: str, has_gate: bool) -> None:
    experts, inputs = Case((9, 2, 3, 16, 16), act=act, has_gate=has_gate).build()
    with torch.no_grad():
        for parameter in experts.parameters():
            parameter *= 2  # both tails
    found = results(triton_experts_forward(experts, *inputs), experts, inputs)
    for name, expected in oracle(experts, inputs).items():
        assert relative_error(found[name], expected) < 3e-6, name


@pytest.mark.parametrize("tokens", [0, 7])
def test_nothing_to_do(tokens: int) -> None:
    """No tokens, or no slot that holds an expert of ours: another rank's ids, of either sign, are empty as well."""
    experts, (x, index, weights) = Case((tokens, 2, 3, 16, 8), has_bias=True, empty=True).build()
    elsewhere = torch.tensor([[3, -1]], device=DEVICE).expand(tokens, 2) + 0
    if tokens:
        elsewhere[0, 0] = 100
    found = results(triton_experts_forward(experts, x, elsewhere, weights), experts, (x, index, weights))
    assert found["output"].shape == (tokens, 16)
    assert not any(tensor.any() for tensor in found.values())


def test_not_contiguous() -> None:
    case = Case((12, 2, 4, 16, 24))
    experts, (x, index, weights) = case.build()
    expected = results(triton_experts_forward(experts, x, index, weights), experts, (x, index, weights))
    views = (x.t().contiguous().t(), index.t().contiguous().t(), weights.t().contiguous().t())
    views += (torch.stack([x, x], dim=1)[:, 1], index, weights)
    for inputs in (views[:3], views[3:]):
        assert not inputs[0].is_contiguous()
        output = triton_experts_forward(experts, *inputs)
        found = results(output.t().contiguous().t(), experts, (x, index, weights))  # and so the gradient of the output
        for name, tensor in expected.items():
            torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def test_sum_over_an_expanded_gradient() -> None:
    experts, inputs = Case((12, 2, 4, 16, 24)).build()
    loop, found = (f(*inputs).sum() for f in (experts.loop, lambda *a: triton_experts_forward(experts, *a)))
    expected, got = (torch.autograd.grad(loss, experts.down_proj)[0] for loss in (loop, found))
    torch.testing.assert_close(got, expected, rtol=1e-5, atol=1e-5)


def test_transposed_weights() -> None:
    """The layout `[E, D, 2F]`, `[E, F, D]`; gradients come in the weights' own."""
    experts, inputs = CASES["bias"].build()
    turned = copy.deepcopy(experts)
    turned.is_transposed = True
    for name in ("gate_up_proj", "down_proj"):
        setattr(turned, name, nn.Parameter(getattr(experts, name).detach().transpose(1, 2).contiguous()))
    assert triton_experts.supports(turned, inputs[0])
    found = results(triton_experts_forward(turned, *inputs), turned, inputs)
    for name, expected in oracle(experts, inputs).items():
        expected = expected.transpose(1, 2) if name in ("gate_up_proj", "down_proj") else expected
        assert relative_error(found[name], expected) < 2e-6, name


@pytest.mark.parametrize("weights_dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("autocast", [True, False])
def test_mixed_dtypes(autocast: bool, weights_dtype: torch.dtype) -> None:
    """Autocast computes in its dtype, gradients come in that of each tensor; without it, the weights' dtype decides."""
    experts, inputs = CASES["several_blocks"].build()
    experts.to(weights_dtype)
    with torch.autocast(DEVICE.type, torch.bfloat16, enabled=autocast):
        output = triton_experts_forward(experts, *inputs)
    found = results(output, experts, inputs)
    exact = not autocast and weights_dtype == torch.float32
    for name, expected in oracle(experts, inputs).items():
        assert found[name].dtype == (weights_dtype if name.endswith("proj") else torch.float32), name
        assert relative_error(found[name], expected) < (2e-6 if exact else 4 * 2**-8), name
        if autocast and weights_dtype == torch.float32:
            assert relative_error(found[name], expected) > 1e-5, name


@pytest.mark.parametrize("trained", ["x", "top_k_weights", "gate_up_proj", "down_proj", "gate_up_proj_bias", "down_proj_bias"])
def test_only_one_wants_a_gradient(trained: str) -> None:
    experts, inputs = CASES["bias_empty"].build()
    expected = oracle(experts, inputs)[trained]
    leaves = {"x": inputs[0], "top_k_weights": inputs[2], **dict(experts.named_parameters())}
    for name, leaf in leaves.items():
        leaf.requires_grad_(name == trained)
    found = results(triton_experts_forward(experts, *inputs), experts, inputs)
    assert found.keys() == {"output", trained}
    assert relative_error(found[trained], expected) < 2e-6


def test_same_every_time() -> None:
    experts, inputs = CASES["bias_empty"].build(torch.bfloat16)
    first, second = (results(triton_experts_forward(experts, *inputs), experts, inputs) for _ in range(2))
    for name, tensor in first.items():
        torch.testing.assert_close(second[name], tensor, rtol=0, atol=0)


def test_double_backward_is_refused() -> None:
    experts, (x, index, weights) = Case((4, 2, 3, 16, 16)).build()
    output = triton_experts_forward(experts, x, index, weights)
    (slope,) = torch.autograd.grad(output.sum(), x, create_graph=True)
    with pytest.raises(RuntimeError, match="no second derivative"):
        slope.sum().backward()


@pytest.mark.parametrize("sizes", [(7, 2, 3), (64, 1, 1), (300, 2, 2), (33, 4, 9), (5, 8, 300), (1, 1, 1), (200, 3, 7)])
def test_plan(sizes: tuple[int, int, int]) -> None:
    """Every slot that holds an expert is in exactly one tile, of its expert."""
    tokens, top_k, num_experts = sizes
    index = torch.randint(-1, num_experts + 2, (tokens, top_k), generator=torch.Generator().manual_seed(3))
    made = grouped.plan(index.to(DEVICE), num_experts)
    slots, starts = made.slots_S.tolist(), made.starts_E1.tolist()
    tiles = list(zip(made.tile_experts.tolist(), made.tile_rows.tolist(), strict=True))[: made.num_tiles]
    covered = []
    for expert, row in tiles:
        if expert < num_experts:
            assert starts[expert] <= row < starts[expert + 1]
            covered += [(slot, expert) for slot in slots[row : min(row + made.block_m, starts[expert + 1])]]
    flat = index.flatten().tolist()
    assert sorted(covered) == [(slot, e) for slot, e in enumerate(flat) if 0 <= e < num_experts]
    assert [slot for slot, _ in covered] == sorted((s for s, _ in covered), key=lambda s: (flat[s], s))
