# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Listening to the routing of any Mixture-of-Experts: ours, or a native one of Transformers, wrapped in whatever."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from hf_moe.pretrained_moe import MoEPreTrainedModel
from hf_moe.record import RoutingRecord

from .native_routing import watch_native_routing
from .routing_watch import RoutingWatch


def watch_routing(
    model: nn.Module, listener: Callable[[RoutingRecord], None], *, in_eval: bool = False, keep_routing: bool = False
) -> RoutingWatch:
    """Have `listener(record)` called at the end of every training forward of the MoE in `model`.

    Args:
        model: a MoE of hf_moe or of Transformers; PEFT, DDP, FSDP or `torch.compile` may have wrapped it.
        listener: gets the forward's `RoutingRecord`.
        in_eval: call it after every other forward, too.
        keep_routing: have the layers' plans in the record.

    Raises:
        ValueError: there is no MoE in it.
    """
    for module in model.modules():
        if isinstance(module, MoEPreTrainedModel):
            return _watch_ours(module, listener, in_eval, keep_routing)
    watch = watch_native_routing(model, listener, in_eval=in_eval, keep_routing=keep_routing)
    if watch is None:
        raise ValueError(
            f"`model` of class {type(model).__name__} holds no Mixture-of-Experts that is known: no experts to watch. "
            "Upcycle it first (`hf-moe upcycle`), or train it without this callback."
        )
    return watch


def _watch_ours(
    model: MoEPreTrainedModel, listener: Callable[[RoutingRecord], None], in_eval: bool, keep_routing: bool
) -> RoutingWatch:
    config = model.config
    model.add_routing_listener(listener, in_eval=in_eval, keep_routing=keep_routing)
    return RoutingWatch(
        layers=config.moe_layers,
        num_experts=config.num_experts_per_layer,
        top_k=config.num_experts_per_tok,
        routers=[layer.gate for layer in model.moe_layers],
        coefficients=model.loss_coefficients,
        model=model,
        close=lambda: model.remove_routing_listener(listener),
    )
