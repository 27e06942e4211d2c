"""Experts, batches and the slow way to run them, for tests of expert-parallel dispatchers."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralExperts

from hf_moe import MoEConfig
from hf_moe.experts import Experts

D, FF = 16, 8


def make_experts(num: int, form: str, dtype: torch.dtype, implementation: str, d: int = D, ff: int = FF) -> nn.Module:
    """Experts with drawn weights; biases too."""
    if form == "mixtral":
        config = MixtralConfig(hidden_size=d, intermediate_size=ff, num_local_experts=num)
        config._experts_implementation = implementation
        experts: nn.Module = MixtralExperts(config).to(dtype)
        experts.has_gate, experts.has_bias = True, False
    else:
        config = MoEConfig()
        config._experts_implementation = implementation
        gate, bias = "gate" in form, "bias" in form
        experts = Experts(config, num, d, ff, F.silu, has_gate=gate, has_bias=bias, dtype=dtype)
    for parameter in experts.parameters():
        nn.init.normal_(parameter, std=0.3)
    experts._is_expert_parallel = True
    return experts


def double_loop(experts: nn.Module, num: int, x_TD: Tensor, ids_TK: Tensor, weights_TK: Tensor) -> Tensor:
    """One token and one expert at a time."""
    rows = []
    for x_D, ids, weights in zip(x_TD, ids_TK.tolist(), weights_TK, strict=True):
        y_D = 0 * x_D * weights.sum()
        for e, weight in zip(ids, weights, strict=True):
            if e == num:
                continue
            up = (experts.gate_up_proj if experts.has_gate else experts.up_proj)[e] @ x_D
            if experts.has_bias:
                up = up + (experts.gate_up_proj_bias if experts.has_gate else experts.up_proj_bias)[e]
            hidden = F.silu(up[: up.shape[0] // 2]) * up[up.shape[0] // 2 :] if experts.has_gate else F.silu(up)
            down = experts.down_proj[e] @ hidden
            y_D = y_D + weight * (down + experts.down_proj_bias[e] if experts.has_bias else down)
        rows.append(y_D)
    return torch.stack(rows) if rows else x_TD * weights_TK.sum()


def make_batch(routing: str, tokens: int, num: int, k: int, dtype: torch.dtype, seed: int, d: int = D) -> tuple[Tensor, ...]:
    """Hidden states, expert ids, weights and the gradient of the output."""
    draw = torch.Generator().manual_seed(seed)
    scores = torch.rand(tokens, num, generator=draw)
    if routing == "one":  # the same experts for every token
        scores = torch.arange(num, 0, -1).float().expand(tokens, -1)
    if routing == "unused":
        scores[:, 1] = -1
    if routing == "even":  # as many for each expert, as far as possible
        scores = torch.zeros(tokens, num).scatter_(1, (torch.arange(tokens * k).view(tokens, k)) % num, 1.0)
    ids = scores.topk(k, dim=-1).indices
    weights = torch.rand(tokens, k, generator=draw, dtype=dtype) + 0.1
    if routing in ("empty", "nothing"):
        empty = torch.rand(tokens, k, generator=draw) < (0.4 if routing == "empty" else 2)
        ids, weights = ids.masked_fill(empty, num), weights.masked_fill(empty, 0.0)
    x, grad = (torch.randn(tokens, d, generator=draw, dtype=dtype) for _ in range(2))
    return x, ids, weights, grad


def local_experts(
    full: nn.Module, num: int, rank: int, ranks: int, form: str, implementation: str, placement: bool
) -> nn.Module:
    """What lies on a rank, as the sharding leaves it."""
    per_rank = -(-num // ranks)
    slot_of_expert = torch.randperm(num, generator=torch.Generator().manual_seed(9)) if placement else torch.arange(num)
    expert_of_slot = slot_of_expert.argsort()
    mine = expert_of_slot[rank * per_rank : (rank + 1) * per_rank]
    weights = dict(full.named_parameters())
    dtype = next(iter(weights.values())).dtype
    experts = make_experts(max(len(mine), 1), form, dtype, implementation, *_sizes(full))
    for name, weight in weights.items():
        setattr(experts, name, nn.Parameter(weight.detach()[mine].clone()))
    experts.num_experts = len(mine)
    if form != "mixtral" or num % ranks:
        experts.num_global_experts, experts.experts_per_rank = num, per_rank
        experts.slot_of_expert = slot_of_expert if placement else None
    experts.mine = mine
    return experts


def _sizes(experts: nn.Module) -> tuple[int, int]:
    return experts.hidden_dim, experts.intermediate_dim


def error(got: Tensor, wanted: Tensor) -> float:
    """Largest difference, relative to the largest value."""
    assert got.shape == wanted.shape, (got.shape, wanted.shape)
    assert got.dtype == wanted.dtype
    return float((got - wanted).abs().max() / wanted.abs().max().clamp(min=1)) if got.numel() else 0.0
