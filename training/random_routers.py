# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""What routers that nobody trained would do with the same hidden states.

Any router is a function of the token's hidden state, so its choices depend on the text, also where it is random: similar
tokens go to the same expert. Specialisation that training made is what goes beyond that. The comparison is with random
projections that give every token as many experts, and every expert as many tokens, as the router does.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor
from tqdm import tqdm

from .dependence import Dependence, exceedance, mutual_information
from .routing_analysis import Floats, Ints, LayerRouting, contingency, expert_counts

ROUNDS, CLOSE = 12, 0.02  # of fitting the loads: at most so many, until so small a share of the assignments is off
_VALUES = 1 << 22  # scores at a time


@dataclass(frozen=True)
class RandomLayer:
    """A label's hold on the choice of random routers in one layer.

    Attributes:
        share: mean over random routers of what `LayerDependence.share` is for the router.
        std: standard deviation over random routers.
        z: how many of these the router's own share is above the mean.
        p: probability of a z so large in any of the layers for a random router (maxT).
    """

    share: float
    std: float
    z: float
    p: float


@dataclass(frozen=True)
class RandomComparison:
    """A label's hold on the choice of experts (`Dependence.share`), beside that of random routers.

    Attributes:
        share: mean over random routers and layers.
        std: standard deviation over random routers of the mean over layers.
        z: how many of these the routers' own mean is above it.
        p: probability that random routers have a mean so large.
        layers: one by one; `None` where there is no choice.
        routers: how many random ones per layer.
    """

    share: float
    std: float
    z: float
    p: float
    layers: list[RandomLayer | None]
    routers: int


def compare_with_random(
    inputs: Sequence[Tensor | None],
    layers: Sequence[LayerRouting],
    labels: Mapping[str, Ints],
    observed: Mapping[str, Dependence],
    routers: int = 99,
    seed: int = 0,
) -> dict[str, RandomComparison]:
    """Compare the dependence on each label with that of random routers.

    Args:
        inputs: `[N, D]` what each layer's router reads; `None` where it is unknown.
        layers: the routing of every layer, of the same tokens.
        labels: `[N]` codes from 0, by name.
        observed: of the same tokens, by the same names.
        routers: how many random ones per layer.
        seed: of their weights.

    Returns:
        By name; a label that says nothing in any layer is absent, and all are if a layer's input is unknown.
    """
    if any(x is None for x in inputs):
        return {}
    shares = {name: np.full((len(layers), routers), np.nan) for name in labels}
    for row, (x_ND, routing) in enumerate(zip(tqdm(inputs, desc="random routers", leave=False), layers, strict=True)):
        open_names = [name for name in labels if observed[name].layers[row].share is not None]
        if not open_names or x_ND is None:
            continue
        generator = torch.Generator().manual_seed(seed + row)
        for router, drawn in enumerate(random_routings(x_ND, routing, routers, generator)):
            for name in open_names:
                layer = observed[name].layers[row]  # of the same loads, so chance and the most possible are the same
                found = mutual_information(contingency(labels[name], drawn, int(labels[name].max()) + 1))
                shares[name][row, router] = (found - layer.null_mean) / (layer.most - layer.null_mean)
    return {name: _compare(observed[name], share_LR) for name, share_LR in shares.items() if observed[name].share is not None}


def _compare(observed: Dependence, share_LR: Floats) -> RandomComparison:
    open_L = np.array([layer.share is not None for layer in observed.layers])
    own_L = np.array([layer.share or 0.0 for layer in observed.layers])[open_L]
    share_LR = share_LR[open_L]
    mean_L, std_L = share_LR.mean(axis=1), np.maximum(share_LR.std(axis=1), 1e-12)
    z_L, largest_R = (own_L - mean_L) / std_L, ((share_LR - mean_L[:, None]) / std_L[:, None]).max(axis=0)
    rows = zip(mean_L.tolist(), std_L.tolist(), z_L.tolist(), strict=True)
    layers = iter([RandomLayer(mean, std, z, exceedance(z, largest_R)) for mean, std, z in rows])
    over_layers_R = share_LR.mean(axis=0)
    mean, std = float(over_layers_R.mean()), max(float(over_layers_R.std()), 1e-12)
    return RandomComparison(
        share=mean,
        std=std,
        z=(float(own_L.mean()) - mean) / std,
        p=exceedance(float(own_L.mean()), over_layers_R),
        layers=[next(layers) if is_open else None for is_open in open_L],
        routers=share_LR.shape[1],
    )


@torch.no_grad()
def random_routings(x_ND: Tensor, routing: LayerRouting, routers: int, generator: torch.Generator) -> list[LayerRouting]:
    """Routings by random projections of `x_ND`, with as many experts for each token and nearly the same loads."""
    experts = routing.num_experts
    slots_N, counts_E = torch.from_numpy(routing.slots_per_token.astype(np.int64)), torch.from_numpy(expert_counts(routing))
    x_ND = x_ND.float()
    found: list[LayerRouting] = []
    block = max(1, _VALUES // (len(x_ND) * experts))
    while len(found) < routers:
        number = min(block, routers - len(found))
        weight = torch.randn(number * experts, x_ND.shape[1], generator=generator)
        scores_RNE = (x_ND @ weight.T).view(-1, number, experts).transpose(0, 1)
        for ids_NK in _with_loads(scores_RNE, slots_N, counts_E).numpy():
            found.append(LayerRouting(routing.layer, experts, ids_NK, np.ones(ids_NK.shape, np.float32)))
    return found


def _with_loads(scores_RNE: Tensor, slots_N: Tensor, counts_E: Tensor) -> Tensor:
    """`[R, N, K]` ids of every token's best experts, once each expert has a bias with which it gets about its count."""
    experts, most = scores_RNE.shape[2], int(slots_N.max())
    scores_RNE = scores_RNE - scores_RNE.mean(dim=1, keepdim=True)
    scores_RNE = scores_RNE / scores_RNE.std(dim=1, keepdim=True).clamp(min=1e-12)
    empty_NK = torch.arange(most) >= slots_N.unsqueeze(1)
    wanted_E = _log_odds(counts_E, len(slots_N))
    bias_RE = wanted_E.expand(scores_RNE.shape[0], -1).clone() / 1.7
    best_R, best_RE = torch.full((scores_RNE.shape[0],), float("inf")), bias_RE
    for _ in range(ROUNDS):
        got_RE = _counts(_best(scores_RNE + bias_RE.unsqueeze(1), most, empty_NK), experts)
        error_R = (got_RE - counts_E).abs().sum(dim=1).float()
        best_RE = torch.where((error_R < best_R).unsqueeze(1), bias_RE, best_RE)
        best_R = torch.minimum(error_R, best_R)
        if best_R.max() <= CLOSE * counts_E.sum():
            break
        # the logistic curve with slope 1.7 follows the normal distribution's, so this is nearly Newton's step
        bias_RE = bias_RE + (wanted_E - _log_odds(got_RE, len(slots_N))) / 1.7 * 0.7
    return _best(scores_RNE + best_RE.unsqueeze(1), most, empty_NK)


def _best(scores_RNE: Tensor, most: int, empty_NK: Tensor) -> Tensor:
    return scores_RNE.topk(most, dim=-1).indices.masked_fill(empty_NK, scores_RNE.shape[2])


def _counts(ids_RNK: Tensor, experts: int) -> Tensor:
    flat_RT = ids_RNK.flatten(1)
    return torch.zeros(len(flat_RT), experts + 1, dtype=torch.int64).scatter_add(1, flat_RT, torch.ones_like(flat_RT))[
        :, :experts
    ]


def _log_odds(counts: Tensor, tokens: int) -> Tensor:
    rate = (counts.float() + 0.5) / (tokens + 1)
    return rate.log() - (-rate).log1p()
