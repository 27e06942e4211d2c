# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Watching the routing of a native Mixture-of-Experts of Transformers, with hooks alone.

Hooks on the modules around all MoE blocks (the wrappers, the causal LM, its decoder) say when a forward begins and ends;
hooks in the blocks say how it routes (see `native_moe_blocks`). The latter count only while a forward of the same thread is
running: the recompute of gradient checkpointing comes in the backward, when none is.

In a forward that `torch.compile` traces, hooks cannot touch Python's state. There what they have to say goes through an
operator, which stays in the compiled graph and says it when that runs.
"""

from __future__ import annotations

import inspect
import sys
import threading
import weakref
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import partial
from typing import Any

import torch
from torch import Tensor, nn
from torch._library.effects import EffectType
from torch.utils.hooks import RemovableHandle
from transformers.utils import logging

from hf_moe.record import LayerRecord, RoutingRecord, routing_sums, stack_by_name, token_mask
from hf_moe.routing import Routing

from .native_moe_blocks import Assignments, NativeMoE, Site, find_native_moe, selection_bias, unwrapped
from .routing_watch import RoutingWatch

logger = logging.get_logger(__name__)


def watch_native_routing(
    model: nn.Module, listener: Callable[[RoutingRecord], None], *, in_eval: bool = False, keep_routing: bool = False
) -> RoutingWatch | None:
    """Have `listener(record)` called at the end of every forward in training mode with gradients on.

    The record has one `LayerRecord` per MoE block with the exact sums over real tokens, without gradient. Where a block's
    logits are not known (`DogeCDMoE`) there are counts only. `lm_loss` is the model's loss without its native router loss.

    `terms` and `coefficients`: Transformers' native `aux_loss` pools the layers and does not divide by K, so it is about K
    times the mean over layers of ours. Its coefficient is named if the config's `output_router_logits` is on, else the native
    loss is not part of the training loss. It is the same for every micro-batch, whatever its share of the labels.

    Args:
        model: a model of Transformers, in any wrappers. It is left as it is but for hooks, which `RoutingWatch.remove` removes.
        listener: gets the `RoutingRecord`. Never called by two threads at once.
        in_eval: call it after every other forward, too.
        keep_routing: have the layers' plans in the record.

    Returns:
        The watch, or `None` if the model has no MoE block that can be watched.
    """
    moe = find_native_moe(model)
    if moe is None:
        return None
    watcher = _Watcher(moe, listener, in_eval, keep_routing)
    handles = watcher.attach()
    for site in moe.sites:
        _BLOCK_OF[site.router] = weakref.ref(site.block)

    def close() -> None:
        for handle in handles:
            handle.remove()

    return RoutingWatch(
        layers=[site.layer for site in moe.rows],
        num_experts=[site.num_experts for site in moe.rows],
        top_k=moe.rows[0].top_k,
        routers=[site.router for site in moe.rows],
        coefficients=moe.coefficients,
        model=moe.model,
        close=close,
    )


# The block around each watched router: some blocks keep the router's bias themselves.
_BLOCK_OF: weakref.WeakKeyDictionary[nn.Module, weakref.ref[nn.Module]] = weakref.WeakKeyDictionary()


def bias_of(router: nn.Module) -> Tensor | None:
    """The bias `[E]` that a native router adds to its scores when it chooses, but not to the weights; `None` if it has none.

    It is the model's own tensor, to be changed in place under `no_grad`. Where it lies:

    - on the router, as `e_score_correction_bias`: DeepSeek-V3 and most that choose by sigmoid (GLM-4-MoE, dots1, Kimi, …),
      LongCat; Zaya's is `balancing_biases`;
    - on a module `moe_statics` of the router: ERNIE 4.5;
    - on the block around the router: `expert_bias` (Afmoe, LFM2-MoE), `e_score_correction_bias` (MiniMax-M2, HY-V3).

    Args:
        router: one of `RoutingWatch.routers`.
    """
    block = _BLOCK_OF.get(router, lambda: None)()
    return selection_bias(router, router if block is None else block)


# ---------------------------------------------------------------------- one forward


@dataclass
class _Forward:
    """A forward that is running.

    Attributes:
        opened_by: place in the chain of the module that it began with, and will end with.
        record: what is known.
        share: this micro-batch's share of the optimizer step's labels, `[]`; `None` if unknown.
        logits: by row, of routers that ran, until their experts do.
        layers: by row, of blocks that ran.
        loss: the training loss.
        aux_loss: the native router loss.
    """

    opened_by: int
    record: RoutingRecord
    share: Tensor | None = None
    logits: dict[int, Tensor | None] = field(default_factory=dict)
    layers: dict[int, LayerRecord] = field(default_factory=dict)
    loss: Tensor | None = None
    aux_loss: Tensor | None = None


class _Running(threading.local):
    forward: _Forward | None = None


class _Watcher:
    """The hooks, and what they do with the forward that is running in their thread."""

    def __init__(self, moe: NativeMoE, listener: Callable[[RoutingRecord], None], in_eval: bool, keep_routing: bool) -> None:
        self._moe, self._listener, self._in_eval, self._keep_routing = moe, listener, in_eval, keep_routing
        self._row_sites = moe.rows
        self._running = _Running()
        self._lock = threading.Lock()  # the replicas of `DataParallel` are threads
        self.key: int | None = id(self)
        _WATCHERS[self.key] = self

    def __reduce__(self) -> tuple[Callable[..., Any], tuple[Any, ...]]:
        """Hooks are copied with their model: those of a copy (of a reference model, of averaged weights) tell nobody."""
        return _deaf_watcher, ()

    def attach(self) -> list[RemovableHandle]:
        """Register the hooks."""
        _forget_compiled_code()
        handles = []
        for place, module in enumerate(self._moe.chain):
            names = tuple(inspect.signature(module.forward).parameters)
            handles.append(module.register_forward_pre_hook(partial(self._before, place, names), with_kwargs=True))
            handles.append(module.register_forward_hook(partial(self._after, place), always_call=True))
        for site in self._moe.sites:
            handles.append(site.router_output.register_forward_hook(partial(self._after_router, site)))
            if site.rule.read is None:
                experts: Any = site.block._modules[site.rule.experts]
                handles.append(experts.register_forward_pre_hook(partial(self._before_experts, site), with_kwargs=True))
        return handles

    # ------------------------------------------------------------------ hooks: what they are given, as tensors

    def _before(self, place: int, names: tuple[str, ...], module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self.key is None or not (self._in_eval or (self._moe.model.training and torch.is_grad_enabled())):
            return
        inputs = {**dict(zip(names, args, strict=False)), **kwargs}
        ids, embeds = inputs.get("input_ids"), inputs.get("inputs_embeds")
        tokens = embeds if ids is None else ids
        mask = None
        if tokens is not None:
            mask = token_mask(inputs.get("attention_mask"), tuple(tokens.shape[:2]), inputs.get("past_key_values"))
        self._tell("begin", place, [ids, mask, _share_of_labels(inputs)])

    def _after(self, place: int, module: nn.Module, args: Any, output: Any) -> None:
        if not self._hears():
            return
        losses = output if isinstance(output, Mapping) else {}
        event = "fail" if output is None else "end"  # there is no output where the forward raised
        self._tell(event, place, [losses.get("loss"), losses.get("aux_loss")])

    @torch.no_grad()  # a checkpoint compares the tensors that are saved for the backward with those of the recompute
    def _after_router(self, site: Site, module: nn.Module, args: Any, output: Any) -> None:
        if not self._hears():
            return
        if site.rule.read is not None:
            self._tell_assignments(site, site.rule.read(unwrapped(module)[-1], output))
        else:
            self._tell("see_logits", site.row, [site.logits(output)])

    def _before_experts(self, site: Site, module: nn.Module, args: Any, kwargs: dict[str, Any]) -> None:
        if self._hears():
            self._tell_assignments(site, site.assignments(args, kwargs))

    def _tell_assignments(self, site: Site, found: Assignments) -> None:
        self._tell("see_assignments", site.row, [found.ids_TK, found.weights_TK, found.logits_TE])

    def _hears(self) -> bool:
        """Whether a forward that counts is running, or will be when a graph that is being traced runs."""
        if self.key is None:
            return False
        if torch.compiler.is_compiling():
            return self._in_eval or self._moe.model.training
        return self._running.forward is not None

    def _tell(self, event: str, index: int, tensors: list[Tensor | None]) -> None:
        assert self.key is not None
        detached = [_plain(tensor) for tensor in tensors]
        if torch.compiler.is_compiling():
            _routing_event(detached, event, index, self.key)
        else:
            getattr(self, event)(index, *detached)

    # ------------------------------------------------------------------ events

    def begin(self, place: int, ids: Tensor | None, mask: Tensor | None, share: Tensor | None) -> None:
        """A module around all blocks is called. The innermost knows best what the blocks will see."""
        running = self._running.forward
        if running is None or running.opened_by == place:  # or a forward that raised where no hook could tell
            running = _Forward(place, RoutingRecord(keep_routing=self._keep_routing))
            self._running.forward = running
        record = running.record
        record.input_ids = record.input_ids if ids is None else ids
        record.token_mask = record.token_mask if mask is None else mask
        if ids is not None:
            record.batch_shape = (ids.shape[0], ids.shape[1])
        running.share = running.share if share is None else share

    def fail(self, place: int, *nothing: Tensor | None) -> None:
        """Such a module raised."""
        running = self._running.forward
        if running is not None and running.opened_by == place:
            self._running.forward = None

    def end(self, place: int, loss: Tensor | None, aux_loss: Tensor | None) -> None:
        """Such a module returned."""
        running = self._running.forward
        if running is None:
            return
        if loss is not None:  # a copy: `Trainer` scales the loss in place
            running.loss, running.aux_loss = loss.detach().clone(), None if aux_loss is None else aux_loss.detach()
        if running.opened_by != place:
            return
        self._running.forward = None
        self._warn_of_silence(running)
        if running.layers:
            self._finish(running)
            with self._lock:
                self._listener(running.record)

    def see_logits(self, row: int, logits: Tensor | None) -> None:
        """A router returned."""
        running = self._running.forward
        if running is not None:
            running.logits[row] = logits

    def see_assignments(self, row: int, ids: Tensor, weights: Tensor | None, logits: Tensor | None) -> None:
        """Experts are called."""
        running = self._running.forward
        if running is None:
            return
        site = self._row_sites[row]
        logits = running.logits.pop(row, None) if logits is None else logits
        layer = _layer_record(site, Assignments(ids, weights, logits), running.record)
        before = running.layers.get(row)
        if before is not None:  # a block that runs more than once
            layer.sums = {name: before.sums[name] + value for name, value in layer.sums.items()}
        running.layers[row] = layer

    def _warn_of_silence(self, running: _Forward) -> None:
        silent = [site.layer for site in self._row_sites if site.row not in running.layers]
        if silent and not isinstance(self._moe.chain[running.opened_by], nn.DataParallel):  # whose replicas end by themselves
            logger.warning_once(
                f"The MoE blocks of layers {silent} did not call their routers and experts, so nothing is counted for them: "
                "they were skipped, or a kernel replaces them. Load the model without `use_kernels`."
            )

    @torch.no_grad()
    def _finish(self, running: _Forward) -> None:
        record = running.record
        some = next(iter(running.layers.values()))
        record.layers = [running.layers.get(site.row) or _no_tokens(site, some) for site in self._row_sites]
        record.adds_up = running.share is not None
        per_layer = [layer.losses() for layer in record.layers]
        common = set.intersection(*(set(losses) for losses in per_layer))
        record.terms = stack_by_name([{name: losses[name] for name in losses if name in common} for losses in per_layer])
        if running.share is not None:
            record.terms = {name: term_L * running.share.to(term_L.device) for name, term_L in record.terms.items()}
        record.lm_loss = running.loss
        if running.loss is not None and running.aux_loss is not None and self._moe.aux_loss_coef is not None:
            record.lm_loss = running.loss - self._moe.aux_loss_coef * running.aux_loss.to(running.loss.device)


def _deaf_watcher() -> _Watcher:
    watcher = _Watcher.__new__(_Watcher)
    watcher.key = None
    return watcher


def _plain(tensor: Any) -> Tensor | None:
    """Without gradient, and whole if it is a `DTensor`."""
    whole = tensor.full_tensor() if hasattr(tensor, "full_tensor") else tensor
    return None if whole is None else whole.detach()


def _share_of_labels(inputs: Mapping[str, Any]) -> Tensor | None:
    """The LM loss is the sum over this forward's labels divided by `num_items_in_batch`, those of the optimizer step."""
    labels, shifted, num_items = (inputs.get(name) for name in ("labels", "shift_labels", "num_items_in_batch"))
    counted = labels[..., 1:] if shifted is None and labels is not None else shifted
    if num_items is None or counted is None:
        return None
    count = counted.ne(-100).sum()
    return count / (num_items.to(count.device) if isinstance(num_items, Tensor) else num_items)


@torch.no_grad()
def _layer_record(site: Site, found: Assignments, record: RoutingRecord) -> LayerRecord:
    ids_TK = found.ids_TK.detach().reshape(-1, found.ids_TK.shape[-1]).long()
    mask_T = None if record.token_mask is None else record.token_mask.reshape(-1).to(ids_TK.device)
    if mask_T is not None and mask_T.numel() != ids_TK.shape[0]:
        raise ValueError(
            f"`attention_mask` is for {mask_T.numel()} tokens, but {ids_TK.shape[0]} reach the MoE block of layer "
            f"{site.layer}, so padding cannot be told. Pass one value per token."
        )
    if found.weights_TK is None:
        weights_TK, logits_TE = torch.ones_like(ids_TK, dtype=torch.float32), None
    else:
        weights_TK = _wide(found.weights_TK).reshape(ids_TK.shape)
        logits_TE = None if found.logits_TE is None else _wide(found.logits_TE).reshape(ids_TK.shape[0], site.num_experts)
    routing = Routing.of(ids_TK, weights_TK, logits_TE)
    sums = routing_sums(routing, site.num_experts, mask_T)
    return LayerRecord(site.num_experts, ids_TK.shape[1], sums, routing=routing if record.keep_routing else None)


def _wide(values: Tensor) -> Tensor:
    """At least fp32: bf16 cannot count to 257."""
    return values.detach().to(torch.promote_types(values.dtype, torch.float32))


def _no_tokens(site: Site, like: LayerRecord) -> LayerRecord:
    """The record of a block that did not run."""
    some = like.sums["counts"]
    logits_TE = some.new_zeros(0, site.num_experts) if "probs" in like.sums else None
    none_TK = some.new_zeros(0, site.top_k)
    sums = routing_sums(Routing.of(none_TK.long(), none_TK, logits_TE), site.num_experts)
    return LayerRecord(site.num_experts, site.top_k, sums)


# ---------------------------------------------------------------------- in compiled graphs


def _forget_compiled_code() -> None:
    """What `torch.compile` has traced, it calls without a look at hooks that were added since."""
    dynamo = sys.modules.get("torch._dynamo")
    if dynamo is not None and dynamo.utils.counters["stats"]["unique_graphs"]:
        torch.compiler.reset()


_WATCHERS: weakref.WeakValueDictionary[int, _Watcher] = weakref.WeakValueDictionary()


@torch.library.custom_op("hf_moe::routing_event", mutates_args=(), tags=(torch.Tag.cudagraph_unsafe,))
def _routing_event(tensors: list[Tensor | None], event: str, index: int, key: int) -> None:
    """Calls a watcher's event when a compiled graph gets here."""
    watcher = _WATCHERS.get(key)
    if watcher is not None:
        getattr(watcher, event)(index, *tensors)


_routing_event.register_fake(lambda tensors, event, index, key: None)
_routing_event.register_effect(EffectType.ORDERED)  # neither dropped nor reordered
