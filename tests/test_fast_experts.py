"""`experts_implementation="hf_moe"` on CPU: outputs, gradients and memory against the plain loop in fp64."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor, nn
from transformers import MixtralConfig
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, grouped_mm_experts_forward
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from hf_moe import MoEConfig, cpu_tuning
from hf_moe.cpu_tuning import WITH_TILES, WITHOUT_TILES, Tuning
from hf_moe.expert_groups import group_rows, padded
from hf_moe.experts import Experts
from hf_moe.fast_experts import NAME, experts_forward, takes

# T, K, E, D, F: one token; none; most experts idle; few rows for all; odd widths; several blocks; several runs
SHAPES = [(1, 2, 8, 16, 24), (0, 2, 4, 16, 24), (33, 1, 64, 16, 8), (12, 2, 6, 16, 24), (7, 3, 5, 9, 15), (300, 2, 3, 24, 16),
          (2100, 2, 2, 16, 40)]  # fmt: skip
# activation, gated, biases
KINDS = [("silu", True, False), ("silu", True, True), ("gelu", False, True), ("gelu_pytorch_tanh", True, False),
         ("relu", False, False), ("relu2", False, True), ("gelu_new", True, True)]  # fmt: skip
# Relative to the norm. bf16 has 8 bits, and the gradient of a routing weight is a sum of products that nearly cancel.
TOLERANCE = {torch.float64: 1e-13, torch.float32: 2e-6, torch.bfloat16: 0.03, torch.float16: 0.004}


def build(experts: int, hidden: int, width: int, kind: tuple[str, bool, bool], dtype: torch.dtype) -> Experts:
    act, gated, bias = kind
    module = Experts(MoEConfig(num_experts=experts), experts, hidden, width, ACT2FN[act], gated, bias, dtype=dtype)
    for parameter in module.parameters():
        nn.init.normal_(parameter, std=0.3)
    return module


def inputs(
    tokens: int, top_k: int, experts: int, hidden: int, dtype: torch.dtype, empty_slots: bool = False
) -> tuple[Tensor, ...]:
    x = torch.randn(tokens, hidden).to(dtype).requires_grad_()
    ids = torch.rand(tokens, experts).argsort(dim=-1)[:, :top_k]
    if empty_slots:
        ids = ids.masked_fill(torch.rand(ids.shape) < 0.4, experts)
    weights = torch.rand(ids.shape).to(dtype).masked_fill(ids == experts, 0.0).requires_grad_()
    return x, ids, weights


def in_fp64(module: Experts, x: Tensor, ids: Tensor, weights: Tensor, grad: Tensor) -> list[Tensor]:
    """Output and gradients of the loop: x, routing weights, parameters."""
    exact = Experts(
        module.config, module.num_experts, module.hidden_dim, module.intermediate_dim, module.act_fn, module.has_gate,
        module.has_bias, dtype=torch.float64,
    )  # fmt: skip
    exact.load_state_dict({name: value.double() for name, value in module.state_dict().items()})
    leaves = [x.detach().double().requires_grad_(), weights.detach().double().requires_grad_(), *exact.parameters()]
    output = exact.loop(leaves[0], ids, leaves[1]) + 0 * torch.stack([leaf.sum() for leaf in leaves]).sum()
    return [output.detach(), *torch.autograd.grad(output, leaves, grad.double())]


def assert_near(found: list[Tensor], exact: list[Tensor], tolerance: float) -> None:
    for got, expected in zip(found, exact, strict=True):
        assert got.shape == expected.shape
        assert (got.double() - expected).norm() <= tolerance * expected.norm().clamp(min=1e-12), (got, expected)


def check(module: Experts, x: Tensor, ids: Tensor, weights: Tensor, tolerance: float) -> None:
    grad = torch.randn(x.shape).to(x.dtype)
    leaves = [x, weights, *module.parameters()]
    output = experts_forward(module, x, ids, weights)
    found = [output.detach(), *torch.autograd.grad(output, leaves, grad)]
    assert [tensor.dtype for tensor in found] == [x.dtype, *(leaf.dtype for leaf in leaves)]
    exact = in_fp64(module, x, ids, weights, grad)
    filled = ids < module.num_experts  # the gradient of an empty slot's weight means nothing
    found[2], exact[2] = found[2] * filled, exact[2] * filled
    assert_near(found, exact, tolerance)
    with torch.no_grad():
        assert_near([experts_forward(module, x, ids, weights)], exact[:1], tolerance)


@pytest.mark.parametrize("dtype", TOLERANCE, ids=str)
@pytest.mark.parametrize("kind", KINDS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_equals_the_loop(shape: tuple[int, ...], kind: tuple[str, bool, bool], dtype: torch.dtype) -> None:
    tokens, top_k, experts, hidden, width = shape
    torch.manual_seed(sum(shape))
    module = build(experts, hidden, width, kind, dtype)
    for empty_slots in (False, True):
        x, ids, weights = inputs(tokens, top_k, experts, hidden, dtype, empty_slots)
        check(module, x, ids, weights, TOLERANCE[dtype])


@settings(max_examples=40, deadline=None)
@given(
    tokens=st.integers(0, 90), top_k=st.integers(1, 4), experts=st.integers(4, 20), hidden=st.integers(1, 20),
    width=st.integers(1, 20), aligned=st.booleans(), kind=st.sampled_from(KINDS), empty_slots=st.booleans(),
    dtype=st.sampled_from([torch.float64, torch.float32]), seed=st.integers(0, 2**16),
)  # fmt: skip
def test_any_shape(
    tokens: int, top_k: int, experts: int, hidden: int, width: int, aligned: bool, kind: Any, empty_slots: bool,
    dtype: torch.dtype, seed: int,
) -> None:  # fmt: skip
    """Aligned widths: torch's grouped product takes them, for groups of few rows."""
    torch.manual_seed(seed)
    hidden, width = (8 * hidden, 8 * width) if aligned else (hidden, width)
    module = build(experts, hidden, width, kind, dtype)
    check(module, *inputs(tokens, top_k, experts, hidden, dtype, empty_slots), TOLERANCE[dtype])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize(("tokens", "top_k", "experts"), [(3, 1, 6), (40, 2, 18)])  # most are idle; few, of over 32 MB in fp32
def test_large_gradients_of_idle_experts(tokens: int, top_k: int, experts: int, dtype: torch.dtype) -> None:
    """They are memory that nobody has written to: still zero, to be added to and to be read by an optimizer."""
    torch.manual_seed(tokens)
    module = build(experts, 512, 512, ("silu", True, False), dtype)
    batches = [inputs(tokens, top_k, experts - 2, 512, dtype) for _ in range(2)]
    idle = sorted(set(range(experts)) - {int(expert) for _, ids, _ in batches for expert in ids.flatten()})
    assert len(idle) >= 2
    for batch in batches:
        check(module, *batch, TOLERANCE[dtype])
        experts_forward(module, *batch).sum().backward()
    summed = [parameter.grad.clone() for parameter in module.parameters()]
    module.zero_grad()
    sum(experts_forward(module, *batch).sum() for batch in batches).backward()
    for parameter, before in zip(module.parameters(), summed, strict=True):
        assert (parameter.grad - before).norm() <= TOLERANCE[dtype] * before.norm()
        assert not parameter.grad[idle].any()
        parameter.grad[idle] += 1
        assert (parameter.grad[idle] == 1).all()


def test_derivative() -> None:
    """Against finite differences."""
    torch.manual_seed(0)
    module = build(4, 6, 5, ("silu", True, True), torch.float64)
    x, ids, weights = inputs(5, 2, 4, 6, torch.float64)
    names, values = zip(*module.named_parameters(), strict=True)

    module.config._experts_implementation = NAME

    def run(x: Tensor, weights: Tensor, *parameters: Tensor) -> Tensor:
        return torch.func.functional_call(module, dict(zip(names, parameters, strict=True)), (x, ids, weights))

    assert torch.autograd.gradcheck(run, (x, weights, *values))


@pytest.mark.parametrize("trained", ["x", "weights", "parameters", "down_proj"])
@pytest.mark.parametrize(
    ("tokens", "bias", "dtype"), [(9, True, torch.float64), (9, False, torch.float32), (60, False, torch.float32)]
)
def test_only_what_is_needed_gets_a_gradient(tokens: int, bias: bool, dtype: torch.dtype, trained: str) -> None:
    torch.manual_seed(1)
    module = build(4, 8, 8, ("silu", True, bias), dtype)
    x, ids, weights = inputs(tokens, 2, 4, 8, dtype)
    expected = in_fp64(module, x, ids, weights, torch.ones(tokens, 8))
    everything = {"x": x, "weights": weights, **dict(module.named_parameters())}
    for name, leaf in everything.items():
        leaf.requires_grad_(name == trained or (trained == "parameters" and name not in ("x", "weights")))
    experts_forward(module, x, ids, weights).sum().backward()
    for (_, leaf), exact in zip(everything.items(), expected[1:], strict=True):
        assert (leaf.grad is None) != leaf.requires_grad
        if leaf.grad is not None:
            assert_near([leaf.grad], [exact], TOLERANCE[dtype])


def test_inputs_that_are_not_contiguous() -> None:
    torch.manual_seed(2)
    module = build(4, 8, 6, ("silu", True, False), torch.float64)
    x = torch.randn(8, 30, dtype=torch.float64).t().requires_grad_()
    _, ids, weights = inputs(30, 2, 4, 8, torch.float64)
    wide = torch.stack([ids, ids], dim=-1)[..., 0]
    check(module, x, wide, weights.detach().t().contiguous().t().requires_grad_(), 1e-13)


@pytest.mark.parametrize("bias", [True, False])
@pytest.mark.parametrize(
    ("tokens", "hidden", "width", "dtype"), [(40, 8, 6, torch.float64), (7, 16, 24, torch.float32), (90, 16, 24, torch.float32)]
)
def test_weights_stored_the_other_way_round(tokens: int, hidden: int, width: int, dtype: torch.dtype, bias: bool) -> None:
    """`is_transposed`: `[E, D, 2F]` and `[E, F, D]`."""
    torch.manual_seed(3)
    module, tolerance = build(4, hidden, width, ("silu", True, bias), dtype), TOLERANCE[dtype]
    x, ids, weights = inputs(tokens, 2, 4, hidden, dtype)
    exact = in_fp64(module, x, ids, weights, torch.ones(tokens, hidden))
    module.is_transposed = True
    for name in ("gate_up_proj", "down_proj"):
        setattr(module, name, nn.Parameter(getattr(module, name).detach().transpose(1, 2).contiguous()))
    output = experts_forward(module, x, ids, weights)
    found = [output.detach(), *torch.autograd.grad(output.sum(), [x, weights, *module.parameters()])]
    by_name = dict(zip(("y", "x", "weights", *dict(module.named_parameters())), found, strict=True))
    in_order = ("y", "x", "weights", "gate_up_proj", "gate_up_proj_bias", "down_proj", "down_proj_bias")
    order = [name for name in in_order if name in by_name]
    turned = [by_name[n].transpose(1, 2) if n.endswith("_proj") else by_name[n] for n in order]
    assert_near(turned, exact, tolerance)
    with torch.no_grad():
        for some in (slice(1), slice(None)):
            assert_near([experts_forward(module, x[some], ids[some], weights[some])], [exact[0][some]], tolerance)


@pytest.mark.parametrize("step", [1, 2])
@pytest.mark.parametrize("tokens", [7, 90])
def test_weights_that_are_parts_of_larger_ones(tokens: int, step: int) -> None:
    """Rows of an odd length, or with gaps: torch's grouped product takes neither."""
    torch.manual_seed(5)
    module = build(4, 16, 24, ("silu", True, False), torch.float32)
    x, ids, weights = inputs(tokens, 2, 4, 16, torch.float32)
    for name, columns in (("gate_up_proj", 16), ("down_proj", 24)):
        larger = torch.randn(4, getattr(module, name).shape[1], 2 * columns + 1) * 0.3
        setattr(module, name, nn.Parameter(larger[..., : step * columns : step]))
    assert not module.gate_up_proj.is_contiguous()
    check(module, x, ids, weights, TOLERANCE[torch.float32])


def test_autocast() -> None:
    """Products in bf16 whatever the parameters are in, but for few rows; gradients in the precision of what they are of."""
    torch.manual_seed(4)
    module = build(4, 16, 24, ("silu", True, True), torch.float32)
    x, ids, weights = inputs(50, 2, 4, 16, torch.float32)
    exact = in_fp64(module, x, ids, weights, torch.ones(50, 16))
    with torch.autocast("cpu", torch.bfloat16):
        output = experts_forward(module, x, ids, weights)
        few = experts_forward(module, x[:9], ids[:9], weights[:9])
        with torch.no_grad():
            alone = experts_forward(module, x[:1], ids[:1], weights[:1])
    assert torch.equal(few, experts_forward(module, x[:9], ids[:9], weights[:9]))
    found = [output.detach(), *torch.autograd.grad(output.sum(), [x, weights, *module.parameters()])]
    assert {tensor.dtype for tensor in found} == {torch.float32}
    assert_near(found, exact, TOLERANCE[torch.bfloat16])
    assert_near([alone], [exact[0][:1]], TOLERANCE[torch.float32])
    assert (output.double() - exact[0]).norm() > 1e-4 * exact[0].norm()  # it was bf16


@pytest.mark.parametrize(("tokens", "width"), [(9, 6), (9, 8), (60, 8)])  # each for a backward of its own
def test_second_derivative_is_refused(tokens: int, width: int) -> None:
    module = build(4, 8, width, ("silu", True, False), torch.float32)
    x, ids, weights = inputs(tokens, 2, 4, 8, torch.float32)
    output = experts_forward(module, x, ids, weights)
    with pytest.raises(RuntimeError, match="eager"):
        torch.autograd.grad(output.sum(), x, create_graph=True)


@pytest.mark.parametrize("tokens", [2, 9, 30, 60])
@pytest.mark.parametrize("empty_slots", [False, True])
def test_few_tokens_have_one_output(tokens: int, empty_slots: bool) -> None:
    """To the last bit, whether gradients are wanted or not, and whether the layer is small."""
    torch.manual_seed(tokens)
    module = build(4, 16, 24, ("silu", True, False), torch.float32)
    x, ids, weights = inputs(tokens, 2, 4, 16, torch.float32, empty_slots)
    outputs = [experts_forward(module, x, ids, weights).detach()]
    with torch.no_grad():
        outputs.append(experts_forward(module, x, ids, weights))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("hf_moe.expert_products._SMALL", 0)
        outputs.append(experts_forward(module, x, ids, weights).detach())
    module.requires_grad_(False)
    outputs.append(experts_forward(module, x, ids, weights).detach())
    assert all(torch.equal(output, outputs[0]) for output in outputs)


def test_what_it_leaves_to_others() -> None:
    module = build(4, 8, 8, ("silu", True, False), torch.float32)
    x, ids, weights = inputs(9, 2, 4, 8, torch.float32)
    assert takes(module, x)
    assert not takes(module, x.to("meta"))
    module.act_fn = nn.PReLU()  # has a parameter, and so a gradient
    assert not takes(module, x)
    output = experts_forward(module, x, ids, weights)
    output.sum().backward()
    assert module.act_fn.weight.grad is not None
    torch.testing.assert_close(output, grouped_mm_experts_forward(module, x, ids, weights))


def test_experts_of_transformers() -> None:
    """The name is good for any model of Transformers."""
    torch.manual_seed(5)
    config = MixtralConfig(hidden_size=16, intermediate_size=24, num_local_experts=4)
    experts = MixtralExperts(config)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    x, ids, weights = inputs(30, 2, 4, 16, torch.float32)
    found = []
    for name in ("eager", NAME):
        config._experts_implementation = name
        output = experts(x, ids, weights)
        found.append([output.detach(), *torch.autograd.grad(output.sum(), [x, weights, *experts.parameters()])])
    assert_near(found[1], [tensor.double() for tensor in found[0]], 2e-6)
    assert NAME in ALL_EXPERTS_FUNCTIONS


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(64, 2, 4, 32, 64), (512, 8, 64, 64, 16), (300, 2, 8, 48, 168)], ids=str)
def test_memory_for_the_backward(shape: tuple[int, ...], dtype: torch.dtype) -> None:
    """Saved activations, without the parameters, are at most 0.6 of `grouped_mm`'s."""
    tokens, top_k, experts, hidden, width = shape
    torch.manual_seed(6)
    module = build(experts, hidden, width, ("silu", True, False), dtype)
    x, ids, weights = inputs(tokens, top_k, experts, hidden, dtype)
    parameters = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}

    def saved(forward: Any) -> int:
        storages: dict[int, int] = {}

        def pack(tensor: Tensor) -> Tensor:
            storage = tensor.untyped_storage()
            if storage.data_ptr() not in parameters:
                storages[storage.data_ptr()] = storage.nbytes()
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
            output = forward(module, x, ids, weights)
        assert output.requires_grad
        return sum(storages.values())

    assert saved(experts_forward) <= 0.6 * saved(grouped_mm_experts_forward)


@pytest.mark.parametrize("pad", [True, False])
@pytest.mark.parametrize("most_rows", [None, 3])
def test_groups(pad: bool, most_rows: int | None) -> None:
    """Every slot has one row, in a group of its expert; runs cover the rows."""
    torch.manual_seed(7)
    ids = torch.randint(0, 6, (40, 3))  # 5 is empty
    plan = group_rows(ids, 5, pad, most_rows)
    ends = torch.tensor(plan.sizes).cumsum(0).tolist()
    for (token, slot), row in zip(
        torch.cartesian_prod(torch.arange(40), torch.arange(3)).tolist(), plan.row_TK.flatten().tolist(), strict=True
    ):
        if ids[token, slot] == 5:
            assert row == len(plan)
        else:
            assert plan.slot_P[row] == 3 * token + slot
            assert plan.tokens()[row] == token
            assert plan.experts[next(i for i, end in enumerate(ends) if row < end)] == ids[token, slot]
    assert most_rows is None or max(plan.sizes) <= padded(most_rows)
    runs = list(plan.runs(10))
    assert [run.start for run in runs] + [len(plan)] == [0, *(run.end for run in runs)]
    assert [e for run in runs for e in run.experts] == plan.experts
    assert all(len(run) == sum(run.sizes) and (len(run) <= 10 or len(run.sizes) == 1) for run in runs)


def test_groups_of_few_rows_may_be_one_call(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_tuning, "_TUNING", WITH_TILES)
    ids = torch.tensor([[3, 1], [1, 4], [3, 1]])  # 4 is empty
    plan = group_rows(ids, 4, pad=True, rows_in_one_call=4)
    assert plan.ends_E is not None
    assert plan.ends_E.tolist() == [0, 3, 3, 5]
    assert [(run.experts, run.sizes) for run in plan.runs(len(plan))] == [([1, 3], [3, 2])]
    assert group_rows(ids, 4, pad=True).ends_E is None
    assert group_rows(ids.repeat(9, 1), 4, pad=False, rows_in_one_call=4).ends_E is None  # too many
    for rows, few in ((45, True), (46, False)):  # padding does not count
        assert (group_rows(torch.full((rows, 1), 2), 9, pad=True, rows_in_one_call=5).ends_E is not None) == few
    padded_plan = group_rows(torch.tensor([[2, 3]] * 17 + [[0, 3]]), 4, pad=True, most_rows=10, rows_in_one_call=15)
    assert padded_plan.ends_E is not None
    assert (padded_plan.sizes, padded_plan.ends_E.tolist()) == ([1, 10, 7, 10, 8], [1, 1, 18, 36])
    padded_plan = group_rows(torch.tensor([[2, 3]] * 17 + [[0, 3]]), 4, pad=True, rows_in_one_call=17)
    assert (padded_plan.sizes, padded_plan.ends_E.tolist(), padded_plan.filled) == ([1, 32, 32], [1, 1, 33, 65], 36)
    assert group_rows(torch.full((3, 1), 9), 9, pad=True, rows_in_one_call=4).ends_E is None  # all are empty


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float32], ids=str)
@pytest.mark.parametrize("kind", [("silu", True, False), ("gelu", False, True)], ids=str)
@pytest.mark.parametrize("empty_slots", [False, True])
def test_few_rows_of_which_one_expert_has_most(kind: tuple[str, bool, bool], dtype: torch.dtype, empty_slots: bool) -> None:
    """Its group is padded (bf16, fp16), those of the others are not; all go through one call."""
    torch.manual_seed(0)
    module = build(12, 16, 24, kind, dtype)
    x, ids, weights = inputs(25, 1, 12, 16, dtype, empty_slots)
    ids[:21] = 3
    weights = weights.detach().masked_fill(ids == 3, 0.7).requires_grad_()
    plan = group_rows(ids, 12, dtype != torch.float32, rows_in_one_call=4)
    assert plan.ends_E is not None
    assert (plan.filled < len(plan)) == (dtype != torch.float32)
    check(module, x, ids, weights, TOLERANCE[dtype])


@pytest.mark.parametrize("tuning", [WITH_TILES, WITHOUT_TILES], ids=["tiles", "no_tiles"])
def test_sizes_are_few_and_not_much_larger(tuning: Tuning, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cpu_tuning, "_TUNING", tuning)
    sizes = {padded(count) for count in range(1, 4097)}
    assert len(sizes) == (95 if tuning is WITH_TILES else 108)
    assert all(count <= padded(count) <= max(count + 15, 1.125 * count) for count in range(1, 4097))
    assert tuning is WITH_TILES or all(padded(count) < 1.2 * count for count in range(1, 4097))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("tokens", [1, 40, 200, 1500])
@pytest.mark.parametrize("tuning", [WITH_TILES, WITHOUT_TILES], ids=["tiles", "no_tiles"])
def test_on_any_cpu(tuning: Tuning, tokens: int, dtype: torch.dtype, monkeypatch: pytest.MonkeyPatch) -> None:
    """What is fast on one CPU is right on another."""
    monkeypatch.setattr(cpu_tuning, "_TUNING", tuning)
    torch.manual_seed(tokens)
    for kind in KINDS[:2]:
        module = build(4, 16, 24, kind, dtype)
        for empty_slots in (False, True):
            check(module, *inputs(tokens, 2, 4, 16, dtype, empty_slots), TOLERANCE[dtype])
