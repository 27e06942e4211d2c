# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""`RoutingWatch`: what a model whose routing is listened to looks like, whoever made it."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field

from torch import nn


@dataclass
class RoutingWatch:
    """What is watched.

    Attributes:
        layers: decoder layer of each MoE layer, in the order of `RoutingRecord.layers`.
        num_experts: E of each MoE layer.
        top_k: K.
        routers: the modules with the router's weights, one per MoE layer.
        coefficients: of the router losses in the training loss, by the loss's name.
        model: the MoE inside its wrappers.
        close: what `remove` calls.
    """

    layers: list[int]
    num_experts: list[int]
    top_k: int
    routers: list[nn.Module]
    coefficients: dict[str, float]
    model: nn.Module
    close: Callable[[], None] = field(repr=False)

    def remove(self) -> None:
        """Stop listening."""
        self.close()
