# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Running a model over a text and keeping who computed which token."""

from __future__ import annotations

import inspect
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from tqdm import tqdm

from hf_moe.record import RoutingRecord

from .routing_analysis import Ints, LayerRouting
from .routing_watch import RoutingWatch
from .watching import watch_routing

BATCH_TOKENS = 2048
_INPUT_BYTES = 1 << 29  # of all layers' router inputs together


@dataclass(frozen=True)
class Capture:
    """The routing of a text.

    Attributes:
        layers: of every MoE layer, `[N, K]` each.
        inputs: what every layer's router read of the kept tokens, `[n, D]` bf16; `None` where its router was not called.
        top_k: K as configured.
        learned: whether the routers have weights.
    """

    layers: list[LayerRouting]
    inputs: list[Tensor | None]
    top_k: int
    learned: bool


class _Collector:
    """Takes the plans and the routers' inputs of the running batch.

    Attributes:
        record: of the last forward.
        positions: of the tokens whose inputs are kept, among the batch's with padding; `num_tokens`: how many there are.
        inputs: by MoE layer, `[n, D]` the input of its router.
    """

    def __init__(self) -> None:
        self.record: RoutingRecord | None = None
        self.num_tokens, self.positions = 0, torch.zeros(0, dtype=torch.int64)
        self.inputs: dict[int, Tensor] = {}

    def expect(self, real_T: Tensor, keep_T: Tensor) -> None:
        """A forward begins: these of its tokens are real, and of these real ones the inputs are kept."""
        self.record, self.num_tokens = None, len(real_T)
        self.positions = real_T.nonzero().flatten()[keep_T]
        self.inputs.clear()

    def listen(self, record: RoutingRecord) -> None:
        self.record = record

    def hook(self, row: int) -> Any:
        def keep(module: nn.Module, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
            values = [*args, *kwargs.values()]
            x = next((v for v in values if isinstance(v, Tensor) and v.is_floating_point() and v.dim() > 1), None)
            if x is not None and x.numel() // x.shape[-1] == self.num_tokens:
                x_nD = x.detach().reshape(-1, x.shape[-1])[self.positions.to(x.device)]
                self.inputs[row] = x_nD.to("cpu", torch.bfloat16)

        return keep


@torch.no_grad()
def capture_routing(
    model: nn.Module, ids_N: Ints, sequence_N: Ints, keep_N: np.ndarray, batch_tokens: int = BATCH_TOKENS
) -> Capture:
    """Run the model, in evaluation mode, over sequences of tokens.

    Args:
        model: with a MoE that `watch_routing` knows.
        ids_N: `[N]` vocabulary ids.
        sequence_N: `[N]` the sequence of each token, ascending from 0.
        keep_N: `[N]` bool: tokens of which the routers' inputs are kept, as far as memory allows it (see `_INPUT_BYTES`).
        batch_tokens: tokens and padding per forward.

    Raises:
        ValueError: the model has no MoE, or none that tells of every token.
    """
    collector = _Collector()
    watch = watch_routing(model, collector.listen, in_eval=True, keep_routing=True)
    hooks = [r.register_forward_pre_hook(collector.hook(row), with_kwargs=True) for row, r in enumerate(watch.routers)]
    was_training = model.training
    model.eval()
    plans: list[list[tuple[Ints, Ints]]] = [[] for _ in watch.layers]
    inputs: list[list[Tensor]] = [[] for _ in watch.layers]
    bounds = np.flatnonzero(np.diff(sequence_N, prepend=-1, append=sequence_N[-1] + 1))
    try:
        with tqdm(total=len(ids_N), unit="token", desc="routing", unit_scale=True) as bar:
            for first, last in _batches(bounds, batch_tokens):
                rows = [ids_N[a:b] for a, b in zip(bounds[first:last], bounds[first + 1 : last + 1], strict=True)]
                kept_T = torch.from_numpy(keep_N[bounds[first] : bounds[last]])
                for row, plan in enumerate(_one_batch(model, watch, collector, rows, kept_T)):
                    plans[row].append(plan)
                    inputs[row] += [collector.inputs[row]] if row in collector.inputs else []
                bar.update(int(bounds[last] - bounds[first]))
    finally:
        for hook in hooks:
            hook.remove()
        watch.remove()
        model.train(was_training)
    layers = [_layer(watch, row, plans[row]) for row in range(len(plans))]
    kept = [torch.cat(x) if len(x) == len(p) else None for x, p in zip(inputs, plans, strict=True)]
    learned = any(parameter.numel() for router in watch.routers for parameter in router.parameters())
    return Capture(layers, kept, watch.top_k, learned)


def tokens_to_keep(num_tokens: int, num_layers: int, hidden_size: int, num_experts: int) -> int:
    """How many tokens the tests look at, so that memory and time stay bounded."""
    by_memory = _INPUT_BYTES // (2 * max(1, num_layers * hidden_size))
    by_time = (1 << 17) // max(1, num_experts)
    return max(512, min(num_tokens, 4096, by_memory, by_time))


def _batches(bounds: Ints, batch_tokens: int) -> Iterator[tuple[int, int]]:
    """(first, last + 1) of neighbouring sequences that fit into a batch with their padding."""
    lengths = np.diff(bounds)
    first, longest = 0, 0
    for index, length in enumerate(lengths.tolist()):
        if index > first and max(longest, length) * (index - first + 1) > batch_tokens:
            yield first, index
            first, longest = index, 0
        longest = max(longest, length)
    yield first, len(lengths)


def _one_batch(
    model: nn.Module, watch: RoutingWatch, collector: _Collector, rows: Sequence[Ints], keep_T: Tensor
) -> list[tuple[Ints, Ints]]:
    """For every MoE layer, ids and weights `[T, K]` of the real tokens."""
    device = next(model.parameters()).device
    ids_BS, mask_BS = (torch.zeros(len(rows), max(map(len, rows)), dtype=torch.int64) for _ in range(2))
    for index, row in enumerate(rows):
        ids_BS[index, : len(row)] = torch.from_numpy(row)
        mask_BS[index, : len(row)] = 1
    real_T = mask_BS.flatten().bool()
    few = {"logits_to_keep": 1} if "logits_to_keep" in inspect.signature(model.forward).parameters else {}
    collector.expect(real_T, keep_T)
    model(input_ids=ids_BS.to(device), attention_mask=mask_BS.to(device), use_cache=False, **few)
    layers = [] if collector.record is None else collector.record.layers
    plans = [layer.routing for layer in layers if layer.routing is not None]
    if len(plans) != len(watch.layers) or any(len(plan.expert_ids_TK) != len(real_T) for plan in plans):
        raise ValueError(
            f"`model`: {len(plans)} of its {len(watch.layers)} MoE layers told which experts they gave every token. A report "
            "needs all of them."
        )
    both = [(plan.expert_ids_TK, plan.weights_TK) for plan in plans]
    return [(ids.detach().cpu()[real_T].numpy(), w.detach().cpu().float()[real_T].numpy()) for ids, w in both]


def _layer(watch: RoutingWatch, row: int, plans: list[tuple[Ints, Ints]]) -> LayerRouting:
    ids_NK = np.concatenate([plan[0] for plan in plans]).astype(np.int32)
    weights_NK = np.concatenate([plan[1] for plan in plans])
    return ordered(LayerRouting(watch.layers[row], watch.num_experts[row], ids_NK, weights_NK))


def ordered(routing: LayerRouting) -> LayerRouting:
    """With every token's filled slots first, by falling weight."""
    filled_NK = routing.expert_ids_NK < routing.num_experts
    order_NK = np.argsort(np.where(filled_NK, -routing.weights_NK, np.inf), axis=1, kind="stable")
    most = max(1, int(filled_NK.sum(axis=1).max(initial=0)))
    ids_NK = np.take_along_axis(routing.expert_ids_NK, order_NK, axis=1)[:, :most]
    weights_NK = np.take_along_axis(np.where(filled_NK, routing.weights_NK, 0.0), order_NK, axis=1)[:, :most]
    return LayerRouting(routing.layer, routing.num_experts, ids_NK, weights_NK.astype(np.float32))
