# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""How far the experts of a layer are from each other in their weights, one layer at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import torch
from torch import Tensor, nn

from .routing_analysis import Floats

_VALUES = 1 << 23  # weights at a time


@dataclass(frozen=True)
class ExpertSimilarity:
    """The weights of a layer's experts, each expert's matrices and biases flattened to one vector.

    Attributes:
        layer: index of the decoder layer.
        distinct: number of experts that differ from each other in at least one weight.
        cosine_EE: `[E, E]` cosine similarity of the vectors; 1 for copies.
        centred_EE: the same after taking the mean expert off; nan where nothing is left. For E unrelated deviations it is
            -1/(E-1) on average.
        distance_EE: `[E, E]` Euclidean distance over the mean norm of the two: 0 for copies, √2 for unrelated vectors.
    """

    layer: int
    distinct: int
    cosine_EE: Floats
    centred_EE: Floats
    distance_EE: Floats

    @property
    def identical(self) -> bool:
        """Whether all are copies of one."""
        return self.distinct == 1 and len(self.cosine_EE) > 1

    def mean_of_pairs(self, name: str) -> float | None:
        """Mean over pairs of different experts of `cosine_EE`, `centred_EE` or `distance_EE`; `None` without any."""
        values = getattr(self, name)[np.triu_indices(len(self.cosine_EE), 1)]
        values = values[np.isfinite(values)]
        return float(values.mean()) if len(values) else None


def expert_weights(model: nn.Module, router: nn.Module, num_experts: int) -> list[list[Tensor]] | None:
    """The weights of the experts beside a router: a list for every expert, in an order that is the same for all.

    They are beside the router, or beside the module around it: a child with parameters stacked along their first dimension,
    or a list of E modules alike. `None` if there is no such child.
    """
    names = {module: name for name, module in model.named_modules()}
    path = names.get(router, "")
    for _ in range(2):
        path = path.rpartition(".")[0]
        for child in model.get_submodule(path).children() if path else ():
            found = _split(child, num_experts)
            if child is not router and found is not None:
                return found
    return None


def _split(module: nn.Module, num_experts: int) -> list[list[Tensor]] | None:
    children = list(module.children())
    if isinstance(module, nn.ModuleList | nn.ModuleDict) and len(children) == num_experts:
        found: list[list[Tensor]] = [[p for _, p in sorted(child.named_parameters())] for child in children]
        shapes = {tuple(tuple(p.shape) for p in expert) for expert in found}
        return found if len(shapes) == 1 and found[0] and any(p.dim() > 1 for p in found[0]) else None
    stacked = [p for _, p in sorted(module.named_parameters(recurse=False)) if p.dim() >= 2 and p.shape[0] == num_experts]
    if not any(p.dim() == 3 for p in stacked):
        return None
    return [[p[expert] for p in stacked] for expert in range(num_experts)]


@torch.no_grad()
def expert_similarity(layer: int, experts: list[list[Tensor]]) -> ExpertSimilarity:
    """Compare the experts of one layer.

    The deviations from the mean expert are summed up, and everything else follows from them: experts that have hardly moved
    apart differ in digits that the vectors' own products would lose.

    Args:
        layer: index of the decoder layer.
        experts: of `expert_weights`.
    """
    count = len(experts)
    gram_EE, along_E, square = torch.zeros(count, count, dtype=torch.float64), torch.zeros(count, dtype=torch.float64), 0.0
    for block_EP in _blocks(experts):
        mean_P = block_EP.double().mean(dim=0)
        away_EP = (block_EP - mean_P).float() if block_EP.dtype == torch.float32 else block_EP.double() - mean_P
        gram_EE += (away_EP @ away_EP.T).double()
        along_E += away_EP.double() @ mean_P
        square += float(mean_P @ mean_P)
    first_E = _first_alike(experts)
    equal_EE = first_E.unsqueeze(0) == first_E.unsqueeze(1)
    raw_EE = gram_EE + along_E.unsqueeze(0) + along_E.unsqueeze(1) + square
    deviation_E, norm_E = gram_EE.diagonal(), raw_EE.diagonal().clamp(min=0).sqrt()
    squared_EE = (deviation_E.unsqueeze(0) + deviation_E.unsqueeze(1) - 2 * gram_EE).clamp(min=0)
    distance_EE = squared_EE.sqrt() / ((norm_E.unsqueeze(0) + norm_E.unsqueeze(1)) / 2)
    distance_EE[equal_EE] = 0.0
    away_E = deviation_E.sqrt()
    away_E[(away_E < 1e-7 * norm_E) | bool(equal_EE.all())] = float("nan")  # rounding of the mean, no direction
    centred_EE = gram_EE / (away_E.unsqueeze(0) * away_E.unsqueeze(1))
    cosine_EE = raw_EE / (norm_E.unsqueeze(0) * norm_E.unsqueeze(1))
    cosine_EE[equal_EE] = 1.0
    return ExpertSimilarity(
        layer=layer,
        distinct=len(set(first_E.tolist())),
        cosine_EE=cosine_EE.clamp(-1, 1).numpy(),
        centred_EE=centred_EE.clamp(-1, 1).numpy(),
        distance_EE=distance_EE.numpy(),
    )


def _blocks(experts: list[list[Tensor]]) -> Iterator[Tensor]:
    """`[E, P]` pieces of the experts' vectors in fp32 (fp64 where they are) on the CPU."""
    columns = max(1, _VALUES // len(experts))
    for parts in zip(*experts, strict=True):
        flat = [part.detach().reshape(-1) for part in parts]
        for start in range(0, len(flat[0]), columns):
            piece = torch.stack([vector[start : start + columns] for vector in flat]).cpu()
            yield piece if piece.dtype == torch.float64 else piece.float()


def _first_alike(experts: list[list[Tensor]]) -> Tensor:
    """`[E]` the first expert that has the same weights to the last bit; a few weights tell most experts apart."""
    known: dict[tuple[float, ...], list[int]] = {}
    found = []
    for index, expert in enumerate(experts):
        probe = tuple(value for part in expert for value in part.reshape(-1)[:16].tolist())
        alike = known.setdefault(probe, [])
        same = (i for i in alike if all(torch.equal(a, b) for a, b in zip(experts[i], expert, strict=True)))
        found.append(next(same, index))
        if found[-1] == index:
            alike.append(index)
    return torch.tensor(found)
