"""A plain double loop for `MoELayer`: the slow and obvious version of every router, capacity and shared-expert setting.

One token at a time, one expert at a time, scalars where possible. Only autograd and elementary functions are shared with the
code under test.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

from hf_moe import MoELayer


def layer_output(
    layer: MoELayer, x_BSD: Tensor, mask_BS: Tensor | None, ids_BS: Tensor | None, draws: dict[str, Tensor]
) -> Tensor:
    """What `layer(x)` should be.

    Args:
        layer: gives weights, config and the training flag.
        x_BSD: `[B, S, D]`.
        mask_BS: True for real tokens.
        ids_BS: token ids, for hash.
        draws: random numbers by kind (`"noise"`, `"group_noise"`, `"uniform"`), as the layer draws them.
    """
    batch, length, hidden = x_BSD.shape
    x_TD = x_BSD.reshape(-1, hidden)
    mask = [True] * len(x_TD) if mask_BS is None else mask_BS.flatten().tolist()
    plan = _plan(layer, x_TD, mask, ids_BS, draws)
    plan = _capacity(layer, plan, mask, batch, length)
    rows = []
    for t, x in enumerate(x_TD):
        y = torch.zeros_like(x)
        for expert, weight in plan[t]:
            y = y + weight * _expert(layer, expert, x)
        rows.append(_beside(layer, x, y))
    return torch.stack(rows).view_as(x_BSD)


def _expert(layer: MoELayer, e: int, x: Tensor) -> Tensor:
    experts = layer.experts
    up = experts.gate_up_proj[e] if experts.has_gate else experts.up_proj[e]
    hidden = up @ x
    if experts.has_bias:
        hidden = hidden + (experts.gate_up_proj_bias[e] if experts.has_gate else experts.up_proj_bias[e])
    if experts.has_gate:
        width = hidden.shape[0] // 2
        hidden = experts.act_fn(hidden[:width]) * hidden[width:]
    else:
        hidden = experts.act_fn(hidden)
    out = experts.down_proj[e] @ hidden
    return out + experts.down_proj_bias[e] if experts.has_bias else out


def _ffn(ffn, x: Tensor) -> Tensor:
    up = ffn.up_proj(x)
    return ffn.down_proj(ffn.act_fn(ffn.gate_proj(x)) * up if ffn.has_gate else ffn.act_fn(up))


def _beside(layer: MoELayer, x: Tensor, y: Tensor) -> Tensor:
    config = layer.config
    if config.num_shared_experts:
        scale = torch.sigmoid(layer.shared_expert_gate(x)) if config.use_shared_expert_gate else 1.0
        return y + scale * _ffn(layer.shared_experts, x)
    if config.residual_moe:
        share = torch.softmax(layer.residual_coefficient(x), dim=-1)
        return share[0] * y + share[1] * _ffn(layer.residual_ffn, x)
    return y


# ---------------------------------------------------------------------- who goes where: [(expert, weight), …] per token


def _largest(values: list[float], k: int) -> list[int]:
    return sorted(range(len(values)), key=lambda i: -values[i])[:k]


def _softmax_of(values: list[Tensor]) -> list[Tensor]:
    total = sum(v.exp() for v in values)
    return [v.exp() / total for v in values]


def _noisy(clean: Tensor, raw: Tensor, noise: Tensor | None, k: int) -> list[tuple[int, Tensor]]:
    noisy = clean if noise is None else clean + (torch.log1p(raw.exp()) + 1e-2) * noise
    chosen = _largest(noisy.tolist(), k)
    return list(zip(chosen, _softmax_of([noisy[e] for e in chosen]), strict=True))


def _plan(layer, x_TD, mask, ids_BS, draws) -> list[list[tuple[int, Tensor]]]:
    kind, gate, config, experts = layer.config.router_type, layer.gate, layer.config, layer.num_experts
    k = config.num_experts_per_tok
    if kind in ("expert_choice", "strictly_balanced"):
        return _experts_choose(layer, x_TD, mask)
    plan = []
    for t, x in enumerate(x_TD):
        if kind == "hash":
            first = ((int(ids_BS.flatten()[t]) * 2654435769) % 2**32 * experts) >> 32
            plan.append([((first + j) % experts, torch.tensor(1 / k, dtype=x.dtype)) for j in range(k)])
            continue
        logits = gate.weight @ x
        noise = draws["noise"][t] if layer.training and "noise" in draws else None
        if kind == "noisy_top_k":
            plan.append(_noisy(logits, gate.noise_weight @ x, noise, k))
        elif kind == "hierarchical":
            plan.append(_two_levels(layer, x, t, noise, draws))
        elif kind == "sigmoid":
            plan.append(_sigmoid(layer, logits))
        elif kind == "gshard":
            chosen = _largest(logits.tolist(), 2)
            g = _softmax_of([logits[e] for e in chosen])
            keep = not layer.training or draws["uniform"][t] < 2 * g[1].detach()
            plan.append([(chosen[0], g[0])] + ([(chosen[1], g[1])] if keep else []))
        else:
            chosen = _largest(logits.tolist(), k)
            probs = _softmax_of(list(logits))
            total = sum(probs[e] for e in chosen) if kind == "top_k" and config.norm_topk_prob else 1.0
            plan.append([(e, probs[e] / total) for e in chosen])
    return plan


def _sigmoid(layer, logits: Tensor) -> list[tuple[int, Tensor]]:
    config, bias = layer.config, layer.gate.e_score_correction_bias.tolist()
    scores = torch.sigmoid(logits)
    biased = [s + b for s, b in zip(scores.tolist(), bias, strict=True)]
    size = len(biased) // config.n_group
    group_score = [sum(sorted(biased[g * size : (g + 1) * size])[-2:]) for g in range(config.n_group)]
    groups = _largest(group_score, config.topk_group)
    allowed = [b if e // size in groups else -math.inf for e, b in enumerate(biased)]
    chosen = _largest(allowed, config.num_experts_per_tok)
    total = sum(scores[e] for e in chosen) + 1e-20
    return [(e, scores[e] / total * config.routed_scaling_factor) for e in chosen]


def _two_levels(layer, x, t, noise, draws) -> list[tuple[int, Tensor]]:
    config, gate = layer.config, layer.gate
    size = layer.num_experts // config.n_group
    group_noise = draws["group_noise"][t] if layer.training else None
    groups = _noisy(gate.group_weight @ x, gate.group_noise_weight @ x, group_noise, config.topk_group)
    slots = []
    for g, group_weight in groups:
        rows = slice(g * size, (g + 1) * size)
        inner = _noisy(
            gate.weight[rows] @ x,
            gate.noise_weight[rows] @ x,
            None if noise is None else noise[g],
            config.num_experts_per_tok // config.topk_group,
        )
        slots += [(g * size + e, group_weight * weight) for e, weight in inner]
    return slots


def _experts_choose(layer, x_TD, mask) -> list[list[tuple[int, Tensor]]]:
    config, gate, experts = layer.config, layer.gate, layer.num_experts
    probs = [_softmax_of(list(gate.weight @ x)) for x in x_TD]
    real = [t for t, is_real in enumerate(mask) if is_real]
    chosen: list[list[int]] = [[] for _ in x_TD]
    if config.router_type == "expert_choice" or layer.training:
        factor = config.num_experts_per_tok if config.capacity_factor is None else config.capacity_factor
        capacity = math.ceil(len(real) * factor / experts - 1e-9)
        for e in range(experts):
            for t in sorted(real, key=lambda t: -probs[t][e].item())[:capacity]:
                chosen[t].append(e)
    else:
        thresholds = gate.thresholds.tolist()
        chosen = [[e for e in range(experts) if p[e].item() > thresholds[e]] for p in probs]
    plan = []
    for t, picked in enumerate(chosen):
        total = sum(probs[t][e] for e in picked) if config.router_type == "strictly_balanced" else 1.0
        plan.append([(e, probs[t][e] / total) for e in picked])
    return plan


def _capacity(layer, plan, mask, batch, length):
    config = layer.config
    factor = config.capacity_factor if layer.training else config.eval_capacity_factor
    if factor is None or config.router_type in ("expert_choice", "strictly_balanced"):
        return plan
    share = factor * config.num_experts_per_tok / layer.num_experts
    kept = [list(slots) for slots in plan]
    for b in range(batch):
        tokens = [b * length + s for s in range(length) if mask[b * length + s]]
        for e in range(layer.num_experts):
            arrivals = [(t, w.item()) for t in tokens for expert, w in plan[t] if expert == e]
            if config.capacity_policy == "position":
                winners = _in_order(arrivals, tokens, share)
            else:
                if config.capacity_policy == "batch_priority":
                    priority = {t: max(w.item() for _, w in plan[t]) for t, _ in arrivals}
                else:
                    priority = dict(arrivals)
                best = sorted(priority, key=priority.__getitem__, reverse=True)
                winners = set(best[: math.ceil(len(tokens) * share - 1e-9)])
            for t, _ in arrivals:
                if t not in winners:
                    kept[t] = [(expert, w) for expert, w in kept[t] if expert != e]
    return kept


def _in_order(arrivals, tokens, share) -> set[int]:
    arriving, winners = {t for t, _ in arrivals}, set()
    for seen, t in enumerate(tokens, start=1):
        if t in arriving and len(winners) < math.ceil(seen * share - 1e-9):
            winners.add(t)
    return winners
