# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Expert-parallel ranks that get more than their share of the tokens: experts are moved while the model trains.

Letters: L MoE layers, E experts (of the widest layer; narrower ones are padded), R expert-parallel ranks.
"""

from __future__ import annotations

import base64
import time
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from hf_moe.expert_placement import (
    PlacementPlan,
    check_dispatcher,
    current_placement,
    ep_size,
    expert_layers,
    max_over_mean,
    move_experts,
    plan_placement,
)

from .callbacks import RoutingCallback, saved_state
from .metrics import RoutingWindow
from .reporting import LayersOffConsole, move_before_reporters

logger = logging.get_logger(__name__)

_METRIC = "rank_load_max_over_mean"


class ExpertPlacementCallback(RoutingCallback, ExportableState):
    """Moves experts between ranks when one rank has more to do than the others.

    The load of a rank is the assignments that were executed (after capacity) by the experts that lie there, over all batches.
    Every `every` optimizer steps, where in a layer the fullest rank's load of these steps exceeds the mean by the threshold,
    experts of that layer change places (`plan_placement`, `move_experts`), with their optimizer state: the function of the
    model, its gradients and its training stay as they are. All ranks decide alike, from counts summed over them. Counting waits
    for no device; every `every` steps there is one look at the counters, which does.

    Every training log gets the fullest rank's load over the mean since the log before it, as `moe/rank_load_max_over_mean` (the
    mean over layers) and of each layer as `moe/layer_<i>/rank_load_max_over_mean`. Every move prints a line. A resumed training
    goes on with the counters of its checkpoint; where the experts lie is part of the checkpoint of the model.

    A model whose experts are not spread over ranks is left alone.

    Args:
        threshold: of the fullest rank's load over the mean, from which on experts are moved.
        every: optimizer steps between two looks.
        min_gain: the least share of the fullest rank's load that a move must take away.

    Raises:
        ValueError: a value is out of range; at the beginning of training: the dispatcher is one of Transformers' own.

    Example:
        >>> from hf_moe.training.placement import ExpertPlacementCallback
        >>> trainer = MoETrainer(model, args, callbacks=[ExpertPlacementCallback(threshold=1.2)])  # doctest: +SKIP
    """

    def __init__(self, threshold: float = 1.2, *, every: int = 50, min_gain: float = 0.05) -> None:
        super().__init__(RoutingWindow(names=("executed",)))
        self._arguments = {"threshold": threshold, "every": every, "min_gain": min_gain}
        for name, valid, expected in (
            ("threshold", threshold > 1, "greater than 1, which is a load that all ranks share"),
            ("every", every >= 1, "at least 1"),
            ("min_gain", 0 <= min_gain < 1, "between 0 and 1"),
        ):
            if not valid:
                raise ValueError(f"`{name}`={self._arguments[name]!r} must be {expected}.")
        self.threshold, self.every, self.min_gain = threshold, every, min_gain
        self._forget()

    def _forget(self) -> None:
        self._model: nn.Module | None = None
        self._experts: list[Any] = []  # of each MoE layer
        self._load_LE = torch.zeros(0, 0)  # executed assignments since the last look
        self._load_LR = torch.zeros(0, 0)  # by rank, since the last log

    # ------------------------------------------------------------------ events

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        assert self.watch is not None
        layers = expert_layers(kwargs["model"])
        if not layers:
            logger.warning("ExpertPlacementCallback: the experts are not spread over ranks, so there is nothing to move.")
            self._stop()
            return
        try:
            check_dispatcher(self.watch.model)
        except ValueError:
            self._stop()  # no listener stays behind
            raise
        move_before_reporters(self, LayersOffConsole())
        self._model = self.watch.model
        self._experts = [layers[layer] for layer in self.watch.layers]  # every MoE layer is spread, or none
        saved = saved_state(self, state).get("_saved", {})
        rows, ranks = len(self._experts), ep_size(self._experts[0])
        self._load_LE = _restored(saved.get("load_by_expert"), (rows, max(self.watch.num_experts)))
        self._load_LR = _restored(saved.get("load_by_rank"), (rows, ranks))

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the optimizer step that was just made, and look from time to time."""
        if self.watch is None:
            return
        layers = self.window.total(replicas=getattr(self.watch.model, "tp_size", None) or 1).layers
        self.window.clear()
        if layers:
            executed_LE = pad_sequence([layer.sums["executed"] for layer in layers], batch_first=True)
            self._load_LE = self._load_LE.to(executed_LE) + executed_LE
            self._load_LR = self._load_LR.to(executed_LE) + self._by_rank(executed_LE)
        if state.global_step % self.every == 0:
            self._look(state, kwargs.get("optimizer"))
            self._load_LE = torch.zeros_like(self._load_LE)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the ranks' load to a training log."""
        if self.watch is None or logs is None or "loss" not in logs or not self._load_LR.any():
            return
        ratios = [max_over_mean(load_R) for load_R in self._load_LR.tolist()]
        self._load_LR = torch.zeros_like(self._load_LR)
        metrics = {f"moe/layer_{layer}/{_METRIC}": ratio for layer, ratio in zip(self.watch.layers, ratios, strict=True)}
        metrics[f"moe/{_METRIC}"] = sum(ratios) / len(ratios)
        logs.update(metrics)
        kept: Any = state.log_history[-1]  # `Trainer` has copied the logs into it by now
        kept.update(metrics)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; the same on every rank."""
        saved = {"load_by_expert": _packed(self._load_LE), "load_by_rank": _packed(self._load_LR)}
        return {"args": self._arguments, "attributes": {"_saved": saved}}

    def _stop(self) -> None:
        super()._stop()
        self._forget()

    # ------------------------------------------------------------------ looking and moving

    def _by_rank(self, executed_LE: Tensor) -> Tensor:
        """`[L, R]` from `[L, E]`, on the device."""
        load_LR = torch.zeros(*self._load_LR.shape, dtype=executed_LE.dtype, device=executed_LE.device)
        for row, experts in enumerate(self._experts):
            load_LR[row].index_add_(0, _rank_of_expert(experts, executed_LE.device), executed_LE[row, : _num_experts(experts)])
        return load_LR

    def _look(self, state: TrainerState, optimizer: Any) -> None:
        """Move experts of the layers where that pays."""
        assert self.watch is not None
        assert self._model is not None
        placement = current_placement(self._model)
        for row, (layer, load_E) in enumerate(zip(self.watch.layers, self._load_LE.tolist(), strict=True)):
            experts = self._experts[row]
            ranks, size = ep_size(experts), _num_experts(experts)
            per_rank, load_R = -(-size // ranks), [0.0] * ranks
            for slot, load in zip(placement[layer], load_E, strict=False):  # of narrower layers there is padding
                load_R[slot // per_rank] += load
            if max_over_mean(load_R) <= self.threshold:
                continue
            plan = plan_placement(load_E[:size], per_rank, ranks, placement[layer])
            if not plan.moved or plan.after > plan.before * (1 - self.min_gain):
                continue
            start = time.perf_counter()
            move_experts(self._model, optimizer, layer, plan.new_slots)
            if state.is_world_process_zero:
                print(_message(state.global_step, layer, plan, size, time.perf_counter() - start), flush=True)


def _num_experts(experts: nn.Module) -> int:
    """E of a layer."""
    return next(experts.parameters(recurse=False)).shape[0]


def _rank_of_expert(experts: Any, device: torch.device) -> Tensor:
    """`[E]`, the expert-parallel rank where each lies."""
    size = _num_experts(experts)
    slot_of_expert = getattr(experts, "slot_of_expert", None)
    slots_E = torch.arange(size, device=device) if slot_of_expert is None else slot_of_expert.to(device)
    return slots_E // -(-size // ep_size(experts))


def _packed(counters: Tensor) -> str:
    """In one line of JSON, exact."""
    return base64.b64encode(counters.cpu().double().numpy().tobytes()).decode()


def _restored(packed: str | None, shape: tuple[int, int]) -> Tensor:
    """Counters of a checkpoint; new ones where there are none, or the number of ranks is another."""
    values = np.frombuffer(base64.b64decode(packed or ""), dtype=np.float64)
    fits = values.size == shape[0] * shape[1]
    return torch.from_numpy(values.copy()).view(shape) if fits else torch.zeros(shape, dtype=torch.float64)


def _message(step: int, layer: int, plan: PlacementPlan, num_experts: int, seconds: float) -> str:
    return (
        f"step {step}: MoE layer {layer}: {plan.moved} of {num_experts} experts moved in {seconds:.2f} s; the fullest rank's "
        f"load {plan.before:.2f} → {plan.after:.2f} × the mean"
    )


__all__ = ["ExpertPlacementCallback"]
