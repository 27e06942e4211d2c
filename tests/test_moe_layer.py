"""`MoELayer` against the loop oracle: values and every gradient, fp64, for every router, capacity and shared setting."""

import pytest
import torch
from oracle import layer_output
from torch import nn

from hf_moe import MoELayer, record_routing

# name: (fields of MoEConfig, arguments of MoELayer)
CASES = {
    "top_k": ({"router_type": "top_k"}, {}),
    "top_k_not_normalised": ({"router_type": "top_k", "norm_topk_prob": False}, {}),
    "top_k_one_expert": ({"router_type": "top_k", "num_experts": 1, "num_experts_per_tok": 1}, {}),
    "top_k_all_experts": ({"router_type": "top_k", "num_experts_per_tok": 6}, {}),
    "noisy_top_k": ({"router_type": "noisy_top_k"}, {}),
    "switch": ({"router_type": "switch", "num_experts_per_tok": 1}, {}),
    "gshard": ({"router_type": "gshard"}, {}),
    "expert_choice": ({"router_type": "expert_choice", "allow_non_causal": True}, {}),
    "expert_choice_factor": ({"router_type": "expert_choice", "allow_non_causal": True, "capacity_factor": 1.3}, {}),
    "hash": ({"router_type": "hash", "num_experts_per_tok": 2}, {}),
    "sigmoid": ({"router_type": "sigmoid", "routed_scaling_factor": 2.5}, {}),
    "sigmoid_groups": ({"router_type": "sigmoid", "n_group": 3, "topk_group": 2}, {}),
    "hierarchical": ({"router_type": "hierarchical", "n_group": 3, "topk_group": 2, "num_experts_per_tok": 4}, {}),
    "strictly_balanced": ({"router_type": "strictly_balanced"}, {}),
    "capacity": ({"capacity_factor": 0.7}, {}),
    "capacity_eval": ({"eval_capacity_factor": 0.7}, {}),
    "capacity_switch": ({"router_type": "switch", "num_experts_per_tok": 1, "capacity_factor": 0.6}, {}),
    "capacity_gshard": ({"router_type": "gshard", "capacity_factor": 0.8}, {}),
    "capacity_sigmoid": ({"router_type": "sigmoid", "capacity_factor": 0.5}, {}),
    "capacity_probability": ({"capacity_factor": 0.6, "capacity_policy": "probability", "allow_non_causal": True}, {}),
    "capacity_batch_priority": ({"capacity_factor": 0.6, "capacity_policy": "batch_priority", "allow_non_causal": True}, {}),
    "shared": ({"num_shared_experts": 2}, {}),
    "shared_gate": ({"num_shared_experts": 1, "use_shared_expert_gate": True}, {}),
    "residual": ({"residual_moe": True, "router_type": "switch", "num_experts_per_tok": 1}, {}),
    "plain": ({}, {"has_gate": False, "hidden_act": "gelu"}),
    "plain_bias": ({"capacity_factor": 0.7}, {"has_gate": False, "has_bias": True, "hidden_act": "relu"}),
    "gated_bias": ({"num_shared_experts": 1}, {"has_bias": True}),
}
SHAPES = [(2, 9, 5), (3, 4, 8)]


def make_layer(fields: dict, arguments: dict, hidden: int, seed: int, width: int = 7) -> MoELayer:
    torch.manual_seed(seed)
    fields = {"num_experts": 6, "num_experts_per_tok": 2, **fields}
    layer = MoELayer(hidden, intermediate_size=width, **arguments, **fields).double()
    for parameter in layer.parameters():
        nn.init.normal_(parameter, std=0.6)
    for name, buffer in layer.named_buffers():
        assert name == "gate.e_score_correction_bias"
        buffer.normal_(std=0.3)
    if layer.config.router_type == "strictly_balanced":
        layer.gate.thresholds.data.uniform_(0.05, 0.25)
    return layer


def draws_of(layer: MoELayer, tokens: int) -> dict[str, torch.Tensor]:
    """The random numbers that the next forward of `layer` will draw."""
    experts, groups = layer.num_experts, layer.config.n_group
    kind = layer.config.router_type
    state = torch.get_rng_state()
    draws = {}
    if kind == "hierarchical":
        draws["group_noise"] = torch.randn(tokens, groups, dtype=torch.float64)
        draws["noise"] = torch.randn(tokens, groups, experts // groups, dtype=torch.float64)
    elif kind == "noisy_top_k":
        draws["noise"] = torch.randn(tokens, experts, dtype=torch.float64)
    elif kind == "gshard":
        draws["uniform"] = torch.rand(tokens, dtype=torch.float64)
    torch.set_rng_state(state)
    return draws


@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("masked", [False, True], ids=["full", "padded"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("case", CASES)
def test_equals_loop(case: str, training: bool, masked: bool, shape: tuple[int, int, int]) -> None:
    layer = make_layer(*CASES[case], shape[-1], seed=len(case)).train(training)
    x = torch.randn(shape, dtype=torch.float64)
    ids = torch.randint(0, 1000, shape[:2])
    mask = torch.rand(shape[:2]) < 0.7 if masked else None
    downstream = torch.randn(shape, dtype=torch.float64)
    if masked:  # nobody reads padding
        downstream = downstream * mask.unsqueeze(-1)
    draws = draws_of(layer, shape[0] * shape[1])

    def run(forward) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
        layer.zero_grad()
        leaf = x.clone().requires_grad_()
        y = forward(leaf)
        (y * downstream).sum().backward()
        gradients = {n: torch.zeros_like(p) if p.grad is None else p.grad.clone() for n, p in layer.named_parameters()}
        return y.detach() if mask is None else y.detach() * mask.unsqueeze(-1), {"x": leaf.grad, **gradients}

    with record_routing(token_mask=mask, input_ids=ids):
        y, gradients = run(layer)
    expected_y, expected_gradients = run(lambda leaf: layer_output(layer, leaf, mask, ids, draws))
    torch.testing.assert_close(y, expected_y, rtol=0, atol=1e-10)
    for name, expected in expected_gradients.items():
        torch.testing.assert_close(gradients[name], expected, rtol=0, atol=1e-10, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("case", CASES)
def test_fp32_equals_fp64(case: str) -> None:
    """Through the default implementation (grouped GEMM: the sizes fit it), which fp64 does not use."""
    layer = make_layer(*CASES[case], 8, seed=3, width=8).eval()
    x, ids = torch.randn(2, 16, 8), torch.randint(0, 1000, (2, 16))
    with record_routing(input_ids=ids):
        expected = layer(x.double())
        got = layer.float()(x)
    torch.testing.assert_close(got.double(), expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize(
    "case", [c for c in CASES if "expert_choice" not in c and "priority" not in c and "probability" not in c]
)
def test_causal(case: str) -> None:
    """No token's output in evaluation depends on later tokens, nor on how many there are."""
    fields, arguments = CASES[case]
    if "capacity_factor" in fields:
        fields = {**fields, "eval_capacity_factor": fields["capacity_factor"]}
    layer = make_layer(fields, arguments, 5, seed=4).eval()
    x, ids = torch.randn(2, 12, 5, dtype=torch.float64), torch.randint(0, 99, (2, 12))
    changed = x.clone()
    changed[:, 7:] = torch.randn(2, 5, 5, dtype=torch.float64)
    with record_routing(input_ids=ids):
        full, other = layer(x), layer(changed)
    with record_routing(input_ids=ids[:, :7]):
        prefix = layer(x[:, :7])
    torch.testing.assert_close(full[:, :7], other[:, :7], rtol=0, atol=1e-12)
    torch.testing.assert_close(full[:, :7], prefix, rtol=0, atol=1e-12)


@pytest.mark.parametrize("case", CASES)
def test_evaluation_is_deterministic(case: str) -> None:
    layer = make_layer(*CASES[case], 5, seed=5).eval()
    x, ids = torch.randn(2, 6, 5, dtype=torch.float64), torch.randint(0, 99, (2, 6))
    with record_routing(input_ids=ids):
        assert torch.equal(layer(x), layer(x))


def test_capacity_drops_and_counts() -> None:
    """All tokens want expert 0: of n tokens it executes ceil(n · cf · K / E), the rest passes through as zeros."""
    layer = MoELayer(4, num_experts=4, num_experts_per_tok=1, router_type="switch", capacity_factor=1.0, intermediate_size=8)
    layer.gate.weight.data = torch.tensor([[1.0, 0, 0, 0], *[[0.0] * 4] * 3])
    x = torch.rand(3, 10, 4) + 0.5
    mask = torch.ones(3, 10, dtype=torch.bool)
    mask[2, :4] = False
    with record_routing(token_mask=mask) as record:
        y = layer.train()(x)
    sums = record.layers[0].sums
    assert sums["counts"].tolist() == [26, 0, 0, 0]
    assert sums["executed"].tolist() == [3 + 3 + 2, 0, 0, 0]
    assert ((y != 0).any(-1) & mask).sum() == 8


def test_jitter_never_reaches_the_experts() -> None:
    """With one expert the router's jitter cannot change the output; the input is not touched either."""
    layer = MoELayer(4, num_experts=1, num_experts_per_tok=1, router_jitter_noise=0.5, intermediate_size=8).train()
    x = torch.randn(2, 3, 4)
    before = x.clone()
    assert torch.equal(layer(x), layer(x))
    assert torch.equal(x, before)


def test_jitter_moves_the_router() -> None:
    layer = MoELayer(4, num_experts=4, num_experts_per_tok=2, router_jitter_noise=0.5, intermediate_size=8).train()
    for parameter in layer.parameters():
        nn.init.normal_(parameter)
    x = torch.randn(2, 3, 4)
    assert not torch.equal(layer(x), layer(x))


def test_any_leading_shape() -> None:
    layer = MoELayer(4, num_experts=4, num_experts_per_tok=2, intermediate_size=8).eval()
    x = torch.randn(2, 3, 5, 4)
    flat = layer(x.view(-1, 4))
    assert torch.equal(layer(x).view(-1, 4), flat)
    assert layer(x[:0]).shape == (0, 3, 5, 4)


def test_bad_arguments() -> None:
    with pytest.raises(ValueError, match="num_experts_per_tok"):
        MoELayer(4, num_experts=2, num_experts_per_tok=3)
    layer = MoELayer(4, num_experts=2, num_experts_per_tok=1, router_type="hash", intermediate_size=8)
    with pytest.raises(ValueError, match="input_ids"):
        layer(torch.randn(1, 2, 4))
    with record_routing(token_mask=torch.ones(1, 5, dtype=torch.bool)), pytest.raises(ValueError, match="token_mask"):
        layer(torch.randn(1, 2, 4))


def test_lstm_language_model() -> None:
    """The 2017 paper's model: the MoE between LSTM layers, trained with both referees; it learns and stays balanced."""
    torch.manual_seed(0)
    embed, lstm, head = nn.Embedding(20, 16), nn.LSTM(16, 16, batch_first=True), nn.Linear(16, 20)
    moe = MoELayer(16, num_experts=8, num_experts_per_tok=2, router_type="noisy_top_k", intermediate_size=16, has_gate=False)
    modules = nn.ModuleList([embed, lstm, moe, head]).train()
    optimizer = torch.optim.Adam(modules.parameters(), 1e-2)
    tokens = torch.arange(640).view(32, 20) % 20  # the next token is a function of the current one
    losses = []
    for _ in range(60):
        with record_routing() as record:
            hidden, _ = lstm(embed(tokens[:, :-1]))
            logits = head(hidden + moe(hidden))
        router = record.losses()
        lm = nn.functional.cross_entropy(logits.flatten(0, 1), tokens[:, 1:].flatten())
        (lm + 0.1 * router["importance_loss"] + 0.1 * router["load_loss"]).backward()
        optimizer.step()
        optimizer.zero_grad()
        losses.append(lm.item())
    assert losses[-1] < 0.1 * losses[0]
    assert router["importance_loss"] < 0.5
