# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""What one forward pass tells its MoE layers (padding, token ids) and what they tell it (sums, logits).

A `RoutingRecord` is active while a model runs. Layers find it with `current_record()`; nothing is kept on the layers, so
any number of forwards may precede a backward. Gradient checkpointing runs a layer again during the backward, when the
record is no longer active: `checkpoint_with_record` brings it back then, with a throw-away list, so that the second run
sees the same padding and counts nothing twice.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from dataclasses import dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from .losses import hierarchical_load, importance_loss, load_loss, switch_loss, z_loss
from .routing import Routing


@dataclass
class LayerRecord:
    """One MoE layer's part in one forward: sums over real tokens, additive over micro-batches and ranks.

    Attributes:
        num_experts: E.
        top_k: K.
        sums: `tokens` `[]`; `counts` `[E]` assignments wanted; `executed` `[E]` assignments done (after capacity);
            `importance` `[E]` sum of gates; `probs` `[E]` sum of softmax(logits); `z` `[]`; `entropy` `[]` in nats;
            and what the router adds (`load` `[E]`; `primary_load` `[A]`, `primary_count` `[A]`; `threshold` `[]`).
        router_logits: `[T, E]` if asked for.
    """

    num_experts: int
    top_k: int
    sums: dict[str, Tensor]
    router_logits: Tensor | None = None

    def losses(self) -> dict[str, Tensor]:
        """The layer's losses without coefficients, by name; those that its router does not define are absent."""
        return layer_losses(self.sums, self.top_k)


def layer_losses(sums: dict[str, Tensor], top_k: int) -> dict[str, Tensor]:
    """The losses that the sums of a layer allow (see `LayerRecord.sums`), without coefficients."""
    losses = {"importance_loss": importance_loss(sums["importance"])} if "importance" in sums else {}
    if "primary_load" in sums:
        groups = sums["primary_load"].numel()
        load_E = hierarchical_load(sums["primary_load"], sums["load"].view(groups, -1), sums["primary_count"])
        losses["load_loss"] = load_loss(load_E)
    elif "load" in sums:
        losses["load_loss"] = load_loss(sums["load"])
    if "probs" in sums:
        losses["aux_loss"] = switch_loss(sums["counts"], sums["probs"], sums["tokens"], top_k)
        losses["z_loss"] = z_loss(sums["z"], sums["tokens"])
    if "threshold" in sums:
        losses["threshold_loss"] = sums["threshold"] / sums["tokens"].clamp(min=1)
    return losses


@dataclass
class RoutingRecord:
    """The context and the protocol of one forward pass.

    Attributes:
        token_mask: `[B, S]` bool, False for padding; `None` if all tokens are real.
        input_ids: `[B, S]`, for hash routing.
        batch_shape: (B, S), for models that hand their FFN flattened tokens (OPT).
        keep_logits: whether layers add their router logits.
        measure: whether layers add their sums; off, the record only carries the context in.
        layers: one entry per MoE layer that ran, in order.
    """

    token_mask: Tensor | None = None
    input_ids: Tensor | None = None
    batch_shape: tuple[int, int] | None = None
    keep_logits: bool = False
    measure: bool = True
    layers: list[LayerRecord] = field(default_factory=list)

    def add(self, routing: Routing, num_experts: int, top_k: int, token_mask_T: Tensor | None) -> None:
        """Called by a MoE layer with the plan it carried out."""
        sums = routing_sums(routing, num_experts, token_mask_T) if self.measure else {}
        logits = routing.logits_TE if self.keep_logits else None
        self.layers.append(LayerRecord(num_experts, top_k, sums, logits))

    def losses(self) -> dict[str, Tensor]:
        """Losses by name, each the mean over the layers that define it (never pooled over layers)."""
        return mean_by_name([layer.losses() for layer in self.layers if layer.sums])


def mean_by_name(per_layer: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Mean of each name over the dicts that have it, on the device of the first."""
    names = {name: None for losses in per_layer for name in losses}
    found = {name: [losses[name] for losses in per_layer if name in losses] for name in names}
    return {name: torch.stack([v.to(values[0].device) for v in values]).mean() for name, values in found.items()}


def routing_sums(routing: Routing, num_experts: int, token_mask_T: Tensor | None = None) -> dict[str, Tensor]:
    """Sums over real tokens of a plan (the `sums` of a `LayerRecord`)."""
    weights_TK, logits_TE = routing.chosen_weights_TK, routing.logits_TE
    real_T = None if token_mask_T is None else token_mask_T.to(weights_TK.dtype)
    tokens = weights_TK.new_tensor(weights_TK.shape[0]) if real_T is None else real_T.sum()

    def per_expert(ids_TK: Tensor, values_TK: Tensor) -> Tensor:
        if real_T is not None:
            values_TK = values_TK * real_T.unsqueeze(-1)
        sums_E1 = values_TK.new_zeros(num_experts + 1)  # the last: empty slots
        return sums_E1.scatter_add(0, ids_TK.flatten(), values_TK.flatten())[:num_experts]

    def total(values_T: Tensor) -> Tensor:
        if real_T is not None:
            values_T = values_T * real_T.view(-1, *[1] * (values_T.dim() - 1))
        return values_T.sum(dim=0)

    ones_TK = torch.ones_like(weights_TK)
    sums = {"tokens": tokens, "counts": per_expert(routing.chosen_ids_TK, ones_TK)}
    same = routing.expert_ids_TK is routing.chosen_ids_TK
    sums["executed"] = sums["counts"] if same else per_expert(routing.expert_ids_TK, ones_TK)
    if logits_TE is not None:
        sums["importance"] = per_expert(routing.chosen_ids_TK, weights_TK)
        log_z_T = logits_TE.logsumexp(dim=-1)
        probs_TE = (logits_TE - log_z_T.unsqueeze(-1)).exp()
        sums["probs"] = total(probs_TE)
        sums["z"] = total(log_z_T.square())
        with torch.no_grad():
            sums["entropy"] = total(torch.special.entr(probs_TE).sum(dim=-1))
    for name, values_T in routing.stats.items():
        sums[name] = total(values_T)
    return sums


_ACTIVE: ContextVar[RoutingRecord | None] = ContextVar("hf_moe_record", default=None)


def current_record() -> RoutingRecord | None:
    """The record of the forward that is running in this context, if any."""
    return _ACTIVE.get()


@contextmanager
def record_routing(record: RoutingRecord | None = None, **fields: Any) -> Iterator[RoutingRecord]:
    """Record the MoE layers that run inside the block.

    Example:
        >>> with record_routing(token_mask=attention_mask.bool()) as record:
        ...     y = moe_layer(x)
        >>> loss = task_loss(y) + 0.01 * record.losses()["aux_loss"]
    """
    record = RoutingRecord(**fields) if record is None else record
    token = _ACTIVE.set(record)
    try:
        yield record
    finally:
        _ACTIVE.reset(token)


def checkpoint_with_record(checkpoint: Callable) -> Callable:
    """Wrap a checkpointing function so that recomputation sees the record of the first run."""

    def checkpointed(function: Callable, *args: Any, **kwargs: Any) -> Any:
        record = current_record()
        if record is None:
            return checkpoint(function, *args, **kwargs)
        first_run = True

        def run(*run_args: Any, **run_kwargs: Any) -> Any:
            nonlocal first_run
            if first_run:
                first_run = False
                return function(*run_args, **run_kwargs)
            with record_routing(replace(record, layers=[])):
                return function(*run_args, **run_kwargs)

        return checkpoint(run, *args, **kwargs)

    return checkpointed
