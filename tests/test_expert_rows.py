"""Which expert is copied to which, and what is copied: rows of weights, router and optimizer state."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from hf_moe.training.expert_rows import Copies, copy_row, make_copies, plan_copies, stacked_layers
from hf_moe.training.watching import watch_routing
from hypothesis import given, settings
from hypothesis import strategies as st
from tiny import tiny
from torch import Tensor, nn
from transformers import Adafactor

ROUTERS: dict[str, dict[str, Any]] = {
    "top_k": {},
    "switch": {"num_experts_per_tok": 1},
    "noisy_top_k": {},
    "gshard": {},
    "sigmoid": {},
    "hierarchical": {"n_group": 2, "topk_group": 2},
}


# ---------------------------------------------------------------------- which is copied where


@pytest.mark.parametrize(
    ("load_E", "dead", "num_groups", "hierarchical", "experts", "groups"),
    [
        ([2.0, 1.9, 0.1, 0.0], [3], 1, False, [(0, 3)], []),
        # 0 has 2.0, shared with 2 it has 1.0; then 1 is the busiest with 1.9
        ([2.0, 1.9, 0.0, 0.0], [2, 3], 1, False, [(0, 2), (1, 3)], []),
        # 3.0 / 2 > 1.0, 3.0 / 3 = 1.0: the earlier of equals
        ([3.0, 0.0, 1.0, 0.0, 0.0], [1, 3, 4], 1, False, [(0, 1), (0, 3), (0, 4)], []),
        # the busiest of the own group; a group without any takes from the layer
        ([0.0, 0.5, 3.5, 0.0], [0, 3], 2, False, [(1, 0), (2, 3)], []),
        ([0.0, 0.0, 3.0, 1.0], [0, 1], 2, False, [(2, 0), (2, 1)], []),
        # hierarchical: within the group; a group that is wholly dead gets the busiest group; a half-dead one waits
        ([0.0, 0.5, 3.5, 0.0], [0, 3], 2, True, [(1, 0), (2, 3)], []),
        ([0.0, 0.0, 3.0, 1.0], [0, 1], 2, True, [(2, 0), (3, 1)], [(1, 0)]),
        ([0.0, 0.0, 4.0, 0.0], [0, 1, 3], 2, True, [(2, 3), (2, 0), (2, 1)], [(1, 0)]),
        ([0.0, 0.01, 3.0, 1.0], [0], 2, True, [], []),
    ],
)
def test_plan(load_E: list[float], dead: list[int], num_groups: int, hierarchical: bool, experts: list, groups: list) -> None:
    assert plan_copies(load_E, dead, 0.05, num_groups, hierarchical) == Copies(experts, groups)


@settings(max_examples=50, deadline=None)
@given(seed=st.integers(0, 10**6), num_groups=st.sampled_from([1, 2, 3]), hierarchical=st.booleans())
def test_plan_never_takes_from_the_dead(seed: int, num_groups: int, hierarchical: bool) -> None:
    draw = random.Random(seed)
    load_E = [draw.choice([0.0, 0.01, 0.6, 1.0, 2.5]) for _ in range(4 * num_groups)]
    low = [expert for expert, load in enumerate(load_E) if load < 0.05]
    dead = [expert for expert in low if draw.random() < 0.8]
    copies = plan_copies(load_E, dead, 0.05, num_groups, hierarchical and num_groups > 1)
    targets = [target for _, target in copies.experts]
    assert len(set(targets)) == len(targets)
    assert set(targets) <= set(dead)
    assert all(load_E[source] >= 0.05 for source, _ in copies.experts)
    for target in dead:  # whoever has a living neighbour in its group gets one of them
        own = [e for e in range(len(load_E)) if e // 4 == target // 4 and load_E[e] >= 0.05]
        if own:
            assert next(source for source, to in copies.experts if to == target) in own


# ---------------------------------------------------------------------- what is copied


class MasterWeights(torch.optim.Optimizer):
    """SGD with momentum on a fp32 copy of each parameter, as optimizers for bf16 training keep it."""

    def __init__(self, params: Any) -> None:
        super().__init__(params, {"lr": 0.1})

    def step(self, closure: Any = None) -> None:
        for parameter in self.param_groups[0]["params"]:
            state = self.state[parameter]
            if not state:
                state["master"], state["momentum"] = parameter.detach().float(), torch.zeros_like(parameter)
            state["momentum"].mul_(0.9).add_(parameter.grad)
            state["master"].sub_(state["momentum"].float(), alpha=0.1)
            parameter.data.copy_(state["master"])


OPTIMIZERS: dict[str, Callable[[list], Any]] = {
    "adamw": lambda p: torch.optim.AdamW(p, amsgrad=True),
    "adamw_foreach": lambda p: torch.optim.AdamW(p, foreach=True),
    "adamw_fused": lambda p: torch.optim.AdamW(p, fused=True),
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9),
    "rmsprop": lambda p: torch.optim.RMSprop(p, momentum=0.5, centered=True),
    "adafactor": lambda p: Adafactor(p, lr=1e-2, relative_step=False, scale_parameter=False, beta1=0.9),
    "torch_adafactor": lambda p: torch.optim.Adafactor(p),
}


@pytest.mark.parametrize("shape", [(4, 6, 5), (4, 5), (4, 4), (4, 3, 4)])
@pytest.mark.parametrize("name", OPTIMIZERS)
def test_optimizer_state_follows(name: str, shape: tuple[int, ...]) -> None:
    """The row of every state that has one is the source's; nothing else changes; the next steps of both rows are equal."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(shape))
    optimizer = OPTIMIZERS[name]([parameter])
    for _ in range(3):
        parameter.grad = torch.randn(shape)
        optimizer.step()
    before = {key: value.clone() for key, value in optimizer.state[parameter].items() if isinstance(value, Tensor)}
    weights = parameter.detach().clone()
    copy_row(parameter, 1, 3, 0.0, torch.Generator(), optimizer)
    weights[3] = weights[1]
    assert torch.equal(parameter, weights)
    shared = {"exp_avg_sq_col": len(shape) == 2, "col_var": len(shape) == 2, "step": True}  # one for all rows
    for key, value in before.items():
        if value.dim() and not shared.get(key, False):
            value[3] = value[1]
        assert torch.equal(optimizer.state[parameter][key], value), key
    parameter.grad = torch.randn(shape)
    parameter.grad[3] = parameter.grad[1]
    optimizer.step()
    torch.testing.assert_close(parameter[3], parameter[1], rtol=1e-6, atol=1e-7)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32, torch.float64])
def test_noise_is_relative_and_from_the_generator(dtype: torch.dtype) -> None:
    torch.manual_seed(0)
    parameter = nn.Parameter((3 * torch.randn(4, 200, 300) + 1).to(dtype))
    optimizer = torch.optim.SGD([parameter], lr=0.1)
    source, others = parameter[2].detach().clone(), parameter[1:].detach().clone()
    stream = torch.get_rng_state()
    copy_row(parameter, 2, 0, 0.1, torch.Generator().manual_seed(5), optimizer)
    assert torch.equal(torch.get_rng_state(), stream)
    assert torch.equal(parameter[1:], others)
    wide = source.to(torch.promote_types(dtype, torch.float32))
    draw = torch.randn(200, 300, generator=torch.Generator().manual_seed(5)).to(wide.dtype)
    expected = wide + 0.1 * wide.std(correction=0) * draw
    assert torch.equal(parameter[0], expected.to(dtype))
    assert (parameter[0] - source).float().std().item() == pytest.approx(0.3, rel=0.02)


def test_master_weights_get_the_new_row_in_their_precision() -> None:
    """Or the next step would undo it."""
    torch.manual_seed(0)
    parameter = nn.Parameter(torch.randn(4, 8, 8).bfloat16())
    optimizer = MasterWeights([parameter])
    for _ in range(2):
        parameter.grad = torch.randn_like(parameter)
        optimizer.step()
    copy_row(parameter, 1, 0, 0.1, torch.Generator().manual_seed(0), optimizer)
    state = optimizer.state[parameter]
    assert torch.equal(state["master"].bfloat16(), parameter)
    assert not torch.equal(state["master"][0], parameter[0].float())  # not rounded
    assert torch.equal(state["momentum"][0], state["momentum"][1])


def test_quantised_state_is_left_and_said(caplog: pytest.LogCaptureFixture) -> None:
    parameter = nn.Parameter(torch.randn(4, 8, 8))
    optimizer = SimpleNamespace(state={parameter: {"state1": torch.arange(256).byte().view(4, 8, 8), "step": 3}})
    before = optimizer.state[parameter]["state1"].clone()
    with caplog.at_level(logging.WARNING):
        copy_row(parameter, 1, 0, 0.0, torch.Generator(), optimizer)
    assert torch.equal(parameter[0], parameter[1])
    assert torch.equal(optimizer.state[parameter]["state1"], before)
    assert "`state1` (Tensor of torch.uint8) has no rows that can be copied" in caplog.text


def layers_of(model: nn.Module) -> list:
    watch = watch_routing(model, lambda record: None)
    watch.remove()
    return stacked_layers(watch)


@pytest.mark.parametrize("family", ["llama", "gpt2"])  # without and with biases
@pytest.mark.parametrize("router", ROUTERS)
def test_other_tokens_are_computed_as_before(router: str, family: str) -> None:
    """A layer's output for a token that does not go to the new expert is what it was."""
    model = tiny(family, router_type=router, **ROUTERS[router])
    optimizer = torch.optim.SGD(model.parameters(), lr=0.1)
    (layer, stacked), *_ = zip(model.moe_layers, layers_of(model), strict=True)
    torch.manual_seed(1)
    x_TD = torch.randn(400, 32)
    with torch.no_grad():
        before, was = layer(x_TD), layer.gate(x_TD)
        make_copies(stacked, Copies([(1, 0)], []), 0.05, "seed", optimizer)
        after, now = layer(x_TD), layer.gate(x_TD)
    untouched = ~((was.expert_ids_TK == 0) | (now.expert_ids_TK == 0)).any(dim=-1)
    assert 20 < untouched.sum() < 380
    if router != "switch":  # whose weight is the probability among all experts
        torch.testing.assert_close(after[untouched], before[untouched], rtol=1e-5, atol=1e-6)
    touched = (now.expert_ids_TK == 0).any(dim=-1)
    assert touched.sum() > 0
    if router == "switch":  # the two share what the source had
        had = (was.expert_ids_TK == 1).sum()
        assert min((now.expert_ids_TK == 0).sum(), (now.expert_ids_TK == 1).sum()) > 0.2 * had
