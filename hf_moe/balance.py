# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Router losses that do not depend on how a batch was cut into ranks and accumulation steps.

`Trainer` returns one loss per micro-batch and adds them up: over accumulation steps always, over ranks with
`average_tokens_across_devices` (the default). The LM loss fits because it is divided by `num_items_in_batch`, the number N
of labels in the whole global batch. A router loss A(S) is a function of sums S over the tokens, and not a sum itself, so
its terms have to be made to add up. With n_m the labels of micro-batch m and q_m = (n_1 + … + n_m) / N:

- `"micro_batch"`: the term of micro-batch m is (n_m / N) · A(S_m), a weighted mean over micro-batches.
- `"global_batch"`: S is summed over the ranks, and over the accumulation steps so far. The term of step m is
  q_m · A(S_1 + … + S_m) − q_{m−1} · A(S_1 + … + S_{m−1}), so that the terms of a whole batch add up to A(S) of all of it,
  however it was cut. Only the newest micro-batch carries gradient. Over ranks that is the exact gradient. Over accumulation
  steps it is exact for the last step; an earlier one cannot know the counts still to come and uses those so far (as
  Qiu et al. 2025, arXiv:2501.11873, do), with the same weight per token in every step.

Without `num_items_in_batch` (a loop of your own) each call is a batch of its own and its loss is averaged over ranks, as
DDP averages gradients.
"""

from __future__ import annotations

from dataclasses import dataclass, field

import torch
import torch.distributed as dist
from torch import Tensor

from .record import LayerRecord, losses_of_layers


@dataclass
class _BatchSoFar:
    """The micro-batches of the current optimizer step that have been seen, summed over ranks."""

    flat_sums: Tensor
    labels: Tensor
    num_items: Tensor
    parameter_version: int
    terms: dict[str, Tensor] = field(default_factory=dict)  # q_{m-1} · A(S_1 + … + S_{m-1}), `[L]` by name


class BatchBalance:
    """Turns the sums of each forward into terms of the training loss.

    Args:
        scope: `"micro_batch"` or `"global_batch"` (see the module's text).
    """

    def __init__(self, scope: str) -> None:
        self.scope = scope
        self._so_far: _BatchSoFar | None = None

    def terms(
        self,
        layers: list[LayerRecord],
        num_labels: Tensor | None,
        num_items_in_batch: Tensor | int | None,
        parameter_version: int = 0,
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """What to add to this micro-batch's training loss, and what to report, both without coefficients.

        Args:
            layers: the layers' sums.
            num_labels: labels of this micro-batch that the LM loss counts.
            num_items_in_batch: the same for the whole global batch, or `None`.
            parameter_version: changes with every optimizer step, so that a step that was cut short is not continued.

        Returns:
            Terms by name with gradient, and the losses by name as values (of the global batch so far in that scope); both
            `[L]`, one per layer. What counts is their mean.
        """
        if num_items_in_batch is None or num_labels is None:
            return self._single(layers)
        num_items = torch.as_tensor(num_items_in_batch, device=num_labels.device).float().flatten()[0]
        if self.scope == "micro_batch":
            losses = losses_of_layers([(layer.sums, layer.top_k) for layer in layers])
            share = num_labels / num_items
            return {name: share * loss for name, loss in losses.items()}, _detached(losses)
        return self._global(layers, num_labels.float(), num_items, parameter_version)

    def _single(self, layers: list[LayerRecord]) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        """A batch of its own; over ranks the value is A(S) on each, and the mean of the gradients that of A(S)."""
        world = _world_size() if self.scope == "global_batch" else 1
        if world == 1:
            losses = losses_of_layers([(layer.sums, layer.top_k) for layer in layers])
            return losses, _detached(losses)
        flat = _flatten(layers)
        losses = _losses(flat + _of_other_ranks(flat), layers)
        values = _detached(losses)
        return {name: values[name] + world * (loss - values[name]) for name, loss in losses.items()}, values

    def _global(
        self, layers: list[LayerRecord], num_labels: Tensor, num_items: Tensor, parameter_version: int
    ) -> tuple[dict[str, Tensor], dict[str, Tensor]]:
        flat, world = _flatten(layers), _world_size()
        summed, labels = flat, num_labels
        if world > 1:
            others = _of_other_ranks(torch.cat([flat, num_labels.view(1).to(flat)]))
            summed, labels = flat + others[:-1], num_labels + others[-1].to(num_labels)
        before, continued = self._so_far, torch.zeros_like(num_items)
        if before is not None and before.parameter_version == parameter_version:
            # 1 if this micro-batch belongs to the batch so far, else 0; as a factor, so that no device is waited for
            same_batch = (before.num_items == num_items) & (before.labels + labels <= num_items)
            continued = same_batch.to(summed)
            summed, labels = summed + continued * before.flat_sums, labels + continued * before.labels
        losses = _losses(summed, layers)
        share = (labels / num_items).to(summed)
        weighted = {name: share * loss for name, loss in losses.items()}
        self._so_far = _BatchSoFar(summed.detach(), labels, num_items, parameter_version, _detached(weighted))
        terms = {}
        for name, loss in weighted.items():
            value = loss.detach() - (0.0 if before is None else continued * before.terms[name])
            # the ranks' terms are added up: each carries its part of the value and the gradient of its own tokens
            terms[name] = value / world + (loss - loss.detach())
        return terms, _detached(losses)


def _world_size() -> int:
    return dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1


def _of_other_ranks(flat: Tensor) -> Tensor:
    """Sum over the other ranks, without gradient."""
    summed = flat.detach().clone()
    dist.all_reduce(summed)
    return summed - flat.detach()


def _flatten(layers: list[LayerRecord]) -> Tensor:
    """All layers' sums as one vector, so that ranks exchange one message."""
    device = layers[0].sums["tokens"].device
    return torch.cat([value.reshape(-1).to(device) for layer in layers for value in layer.sums.values()])


def _losses(flat: Tensor, layers: list[LayerRecord]) -> dict[str, Tensor]:
    """Losses by name, `[L]`, from what `_flatten` made."""
    sizes = [value.numel() for layer in layers for value in layer.sums.values()]
    parts = iter(flat.split(sizes))
    sums = [{name: next(parts).view(value.shape) for name, value in layer.sums.items()} for layer in layers]
    return losses_of_layers([(of_layer, layer.top_k) for of_layer, layer in zip(sums, layers, strict=True)])


def _detached(losses: dict[str, Tensor]) -> dict[str, Tensor]:
    return {name: loss.detach() for name, loss in losses.items()}
