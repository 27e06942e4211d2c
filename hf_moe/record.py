# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""What one forward pass tells its MoE layers (padding, token ids) and what they tell it (sums, logits).

A `RoutingRecord` is active while a model runs. Layers find it with `current_record()`; nothing is kept on the layers, so
any number of forwards may precede a backward. Gradient checkpointing runs a layer again during the backward, when the
record is no longer active: `checkpoint_with_record` brings it back then, with a throw-away list, so that the second run
sees the same padding and counts nothing twice.
"""

from __future__ import annotations

import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import partial
from typing import Any

import torch
from torch import Tensor
from transformers import Cache

from .losses import hierarchical_load, importance_loss, load_loss, switch_loss, z_loss
from .router_math import Sums, pieces_of, softmax_sums, without_autocast
from .routing import Routing

_NO_LOSS = {"executed", "entropy"}  # sums that no loss is made of


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
        routing: the plan that was executed, if asked for.
    """

    num_experts: int
    top_k: int
    sums: dict[str, Tensor]
    router_logits: Tensor | None = None
    routing: Routing | None = None

    def losses(self) -> dict[str, Tensor]:
        """The layer's losses without coefficients, by name; those that its router does not define are absent."""
        return layer_losses(self.sums, self.top_k)


def layer_losses(sums: dict[str, Tensor], top_k: int) -> dict[str, Tensor]:
    """The losses that the sums of a layer allow (see `LayerRecord.sums`), without coefficients; see also `losses_of_layers`."""
    losses = {"importance_loss": importance_loss(sums["importance"])} if "importance" in sums else {}
    if "primary_load" in sums:
        groups = sums["primary_load"].shape[-1]
        load_E = hierarchical_load(sums["primary_load"], sums["load"].unflatten(-1, (groups, -1)), sums["primary_count"])
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
        keep_routing: whether layers add their plans.
        measure: whether layers add their sums; off, the record only carries the context in.
        layers: one entry per MoE layer that ran, in order.
        grad_enabled: whether gradients were on where the forward began.
        lm_loss: this forward's LM loss, a value; `None` if it computed none.
        terms: router losses by name, `[L]` values (one per layer), without coefficients, as they entered the training loss.
        adds_up: whether `lm_loss` and `terms` of the micro-batches and ranks of an optimizer step add up to the step's
            (the forward knew `num_items_in_batch`), or are to be averaged.
    """

    token_mask: Tensor | None = None
    input_ids: Tensor | None = None
    batch_shape: tuple[int, int] | None = None
    keep_logits: bool = False
    keep_routing: bool = False
    measure: bool = True
    layers: list[LayerRecord] = field(default_factory=list)
    grad_enabled: bool = field(default_factory=torch.is_grad_enabled)
    lm_loss: Tensor | None = None
    terms: dict[str, Tensor] = field(default_factory=dict)
    adds_up: bool = False

    def add(self, routing: Routing, num_experts: int, top_k: int, token_mask_T: Tensor | None) -> None:
        """Called by a MoE layer with the plan it carried out."""
        _check_recomputable(self.grad_enabled)
        sums = routing_sums(routing, num_experts, token_mask_T) if self.measure else {}
        logits = routing.logits_TE if self.keep_logits else None
        self.layers.append(LayerRecord(num_experts, top_k, sums, logits, routing if self.keep_routing else None))

    def losses(self) -> dict[str, Tensor]:
        """Losses by name, each the mean over the layers that define it (never pooled over layers)."""
        per_layer = losses_of_layers([(layer.sums, layer.top_k) for layer in self.layers if layer.sums])
        return {name: losses_L.mean() if len(losses_L) > 1 else losses_L[0] for name, losses_L in per_layer.items()}


def losses_of_layers(layers: list[tuple[dict[str, Tensor], int]]) -> dict[str, Tensor]:
    """`layer_losses` of several layers, each name's as one vector over the layers that have it.

    Layers of the same kind are computed at once: the sums are small, so what costs is the number of operations.

    Args:
        layers: sums and K of each.
    """
    kinds: dict[Any, list[int]] = {}
    for row, (sums, top_k) in enumerate(layers):
        some = sums["tokens"]
        kind = (top_k, *((name, value.shape) for name, value in sums.items()), some.device, some.dtype)
        kinds.setdefault(kind, []).append(row)
    per_layer: list[dict[str, Tensor]] = [{} for _ in layers]
    for rows in kinds.values():
        losses = layer_losses(_stacked([layers[row][0] for row in rows]), layers[rows[0]][1])
        if len(rows) == len(layers):
            return losses
        for name, loss_L in losses.items():
            for row, loss in zip(rows, loss_L.unbind(), strict=True):
                per_layer[row][name] = loss
    return stack_by_name(per_layer)


def _stacked(sums: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Each sum of layers of the same kind, with a dimension for the layers in front."""
    if all(isinstance(of_layer, Sums) for of_layer in sums):
        stacked = pieces_of(torch.stack([of_layer.flat for of_layer in sums if isinstance(of_layer, Sums)]))
    else:
        stacked = {}
    for name in sums[0].keys() - stacked.keys() - _NO_LOSS:
        stacked[name] = torch.stack([of_layer[name] for of_layer in sums])
    return stacked


def stack_by_name(per_layer: list[dict[str, Tensor]]) -> dict[str, Tensor]:
    """Each name's scalars as one vector over the dicts that have it, on the device of the first."""
    names = {name: None for losses in per_layer for name in losses}
    found = {name: [losses[name] for losses in per_layer if name in losses] for name in names}
    return {name: torch.stack([v.to(values[0].device) for v in values]) for name, values in found.items()}


def routing_sums(routing: Routing, num_experts: int, token_mask_T: Tensor | None = None) -> dict[str, Tensor]:
    """Sums over real tokens of a plan (the `sums` of a `LayerRecord`)."""
    with without_autocast(routing.chosen_weights_TK.device.type):
        return _routing_sums(routing, num_experts, token_mask_T)


def _routing_sums(routing: Routing, num_experts: int, token_mask_T: Tensor | None) -> dict[str, Tensor]:
    weights_TK, ids_TK = routing.chosen_weights_TK, routing.chosen_ids_TK
    real_T = None if token_mask_T is None else token_mask_T.to(weights_TK.dtype)

    def counts(ids_TK: Tensor) -> Tensor:
        ones_TK = torch.ones_like(weights_TK) if real_T is None else real_T.unsqueeze(-1).expand(weights_TK.shape)
        counts_E1 = weights_TK.new_zeros(num_experts + 1)  # the last: empty slots
        return counts_E1.scatter_add(0, ids_TK.reshape(-1), ones_TK.reshape(-1))[:num_experts]

    if routing.logits_TE is None:
        tokens = weights_TK.new_full((), weights_TK.shape[0]) if real_T is None else real_T.sum()
        counts_E = counts(ids_TK)
        sums = {"tokens": tokens, "counts": counts_E, "executed": counts_E}
    else:
        sums = softmax_sums(routing.logits_TE, weights_TK, ids_TK, real_T)
    if routing.expert_ids_TK is not ids_TK:
        sums["executed"] = counts(routing.expert_ids_TK)
    for name, values_T in routing.stats.items():
        sums[name] = values_T.sum(dim=0) if real_T is None else torch.tensordot(real_T, values_T.to(real_T.dtype), dims=1)
    return sums


def token_mask(attention_mask: Any, batch_shape: tuple[int, int], past_key_values: Cache | None) -> Tensor | None:
    """Which of this forward's tokens are real, from any attention mask that Transformers' models take.

    A token is real if it may attend to itself: in a 2-D mask its own column is set, in a 4-D mask its own diagonal entry.

    Args:
        attention_mask: `None`, `[B, past + S]`, `[B, H, S, past + S]` (bool or additive), or a dict of those by layer type.
        batch_shape: (B, S).
        past_key_values: the cache, whose length is the past.

    Returns:
        `[B, S]` bool, or `None` where nothing is masked or the mask does not tell (flex attention's block masks).
    """
    if isinstance(attention_mask, dict):
        attention_mask = attention_mask.get("full_attention", next(iter(attention_mask.values()), None))
    if not isinstance(attention_mask, Tensor):
        return None
    batch, length = batch_shape
    if attention_mask.dim() == 2:
        return attention_mask[:, -length:].bool() if attention_mask.shape[1] >= length else None
    if attention_mask.dim() != 4:
        return None
    past = past_key_values.get_seq_length() if past_key_values is not None else attention_mask.shape[3] - length
    allowed = attention_mask[:, 0]
    if allowed.is_floating_point():
        allowed = allowed > torch.finfo(allowed.dtype).min / 2
    allowed = allowed.bool().expand(batch, -1, -1)
    if isinstance(past, Tensor):  # a static cache counts on the device; asking for the number would wait for it
        own_S = past + torch.arange(length, device=past.device)
        return allowed.gather(2, own_S.to(allowed.device).view(1, -1, 1).expand(batch, -1, -1)).squeeze(2)
    own = allowed.diagonal(offset=past, dim1=1, dim2=2)
    return own if own.shape[1] == length else None


class _Active(threading.local):
    """What is active in this thread (not a `ContextVar`, whose `set` torch.compile cannot trace).

    Attributes:
        record: the record of the running forward.
        carried: whether the running checkpoint, if any, will bring the record back for the recompute.
    """

    record: RoutingRecord | None = None
    carried: bool = False


_ACTIVE = _Active()


def current_record() -> RoutingRecord | None:
    """The record of the forward that is running in this thread, if any."""
    return _ACTIVE.record


@contextmanager
def record_routing(record: RoutingRecord | None = None, **fields: Any) -> Iterator[RoutingRecord]:
    """Record the MoE layers that run inside the block.

    Example:
        >>> from hf_moe import MoELayer
        >>> layer = MoELayer(16, num_experts=4, intermediate_size=32)
        >>> with record_routing(token_mask=torch.tensor([[True, True, False]])) as record:
        ...     y = layer(torch.randn(1, 3, 16))
        >>> record.layers[0].sums["counts"].sum()  # two tokens, two experts each
        tensor(4.)
    """
    record = RoutingRecord(**fields) if record is None else record
    with _activated(record, carried=False):
        yield record


@contextmanager
def _activated(record: RoutingRecord, carried: bool) -> Iterator[None]:
    before = _ACTIVE.record, _ACTIVE.carried
    _ACTIVE.record, _ACTIVE.carried = record, carried
    try:
        yield
    finally:
        _ACTIVE.record, _ACTIVE.carried = before


def checkpoint_with_record(checkpoint: Callable, redraw: bool = True) -> Callable:
    """Wrap a checkpointing function so that recomputation sees the record of the first run.

    Args:
        checkpoint: `torch.utils.checkpoint.checkpoint` (not reentrant), a `partial` of it, or a function like it.
        redraw: whether routers draw random numbers: the recompute then has to draw the same, so a `partial` with
            `preserve_rng_state=False` is overruled.

    Example:
        >>> from hf_moe import MoELayer
        >>> layer = MoELayer(16, num_experts=4, intermediate_size=32)
        >>> checkpointed = checkpoint_with_record(partial(torch.utils.checkpoint.checkpoint, use_reentrant=False))
        >>> with record_routing() as record:
        ...     y = checkpointed(layer, torch.randn(1, 3, 16, requires_grad=True))
        >>> y.sum().backward()
        >>> len(record.layers)
        1
    """
    if isinstance(checkpoint, partial):
        if checkpoint.keywords.get("use_reentrant"):
            raise ValueError(_REENTRANT)
        if redraw and not checkpoint.keywords.get("preserve_rng_state", True):
            checkpoint = partial(checkpoint, preserve_rng_state=True)

    def checkpointed(function: Callable, *args: Any, **kwargs: Any) -> Any:
        record = current_record()
        if record is None:
            return checkpoint(function, *args, **kwargs)

        def run(*run_args: Any, **run_kwargs: Any) -> tuple[Any, list[LayerRecord]]:
            seen = replace(record, layers=[])
            with _activated(seen, carried=True):
                return function(*run_args, **run_kwargs), seen.layers

        outputs, layers = checkpoint(run, *args, **kwargs)  # what the recompute returns goes nowhere
        record.layers.extend(layers)
        return outputs

    return checkpointed


_REENTRANT = (
    "`use_reentrant=True` would silently lose the gradient of the router losses, which leave the checkpointed layers beside "
    "their output. Use `use_reentrant=False` (in `Trainer`: `gradient_checkpointing_kwargs={'use_reentrant': False}`)."
)


def _check_recomputable(grad_enabled: bool) -> None:
    """Refuse a checkpoint around the running layer whose recompute would not see the record.

    Args:
        grad_enabled: whether gradients were on where the forward began.
    """
    if torch.compiler.is_compiling() or not grad_enabled:
        return
    if not torch.is_grad_enabled():
        raise RuntimeError(f"A MoE layer runs in a reentrant activation checkpoint. {_REENTRANT}")
    hooks = torch._C._autograd._top_saved_tensors_default_hooks(True)
    if hooks is not None and getattr(hooks[0], "__module__", None) == "torch.utils.checkpoint" and not _ACTIVE.carried:
        raise RuntimeError(
            "A MoE layer runs in an activation checkpoint whose recompute would know nothing of padding, and might route "
            "other than the forward. Use `model.activation_checkpointing_enable()`, or give your checkpointing function to "
            "`hf_moe.record.checkpoint_with_record` and use what it returns."
        )
