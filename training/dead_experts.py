# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Experts that get next to no tokens: reported, re-initialised from a busy one, or given tokens to try.

Letters: L MoE layers, E experts (of the widest layer; narrower ones are padded).
"""

from __future__ import annotations

from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn
from torch.distributed.tensor import DTensor
from torch.nn.utils.rnn import pad_sequence
from transformers import TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.utils import logging

from hf_moe.configuration_moe import BATCH_ROUTERS
from hf_moe.routers import Router

from .callbacks import RoutingCallback
from .expert_rows import StackedLayer, make_copies, plan_copies, refuse_flat_parameters, stacked_layers, trained_module
from .metrics import RoutingWindow

logger = logging.get_logger(__name__)

Action = Literal["warn", "reinit", "explore"]

# What a step of the bonus is worth where it is not added to logits: a sigmoid rises by at most a quarter per logit.
_STEP_UNIT = {"sigmoid": 0.25}
_REMEDIES = {
    "warn": "Raise the router losses' coefficients, or use action='reinit' or 'explore'.",
    "reinit": "It is made anew from a busy expert.",
    "explore": "From now on a bonus on its logits brings it tokens in training.",
}


class DeadExpertCallback(RoutingCallback, ExportableState):
    """Looks after experts that get less than a share of their fair load for many optimizer steps in a row.

    The load is what was executed (after capacity) over all ranks and micro-batches of the step; the fair load is its mean
    over the experts of the layer. What happens to a dead expert is the `action`:

    - `"warn"`: it is reported, once per death.
    - `"reinit"`: its weights, its row of the router (the bias of a sigmoid router, too) and what the optimizer keeps of them
      are replaced by those of the busiest expert of its layer, of its group if that has any; several dead ones share the
      busy ones out. Weights and router row get noise, so that the two take different tokens and grow apart. If all of a
      hierarchical router's group is dead, the busiest group is copied whole. Not with FSDP1, DeepSpeed, frozen experts.
    - `"explore"`: a bonus on its logits (`Router.exploration_bonus`; of a sigmoid router: on what it chooses by) grows by a
      step per optimizer step while the expert gets less than `exploration_share` of its fair load, and shrinks while it gets
      more, down to 0. It works in training only, draws nothing, and is in no checkpoint of the model.

    All ranks decide alike, because everything follows from counts summed over them. Counting waits for no device; every
    `check_every` steps there is one look at the counters, which does. A resumed training goes on exactly: the counters,
    bonuses and reports are in the checkpoint's `trainer_state.json`.

    Args:
        action: see above. Native MoEs can be warned of and, if their experts are stacked, re-initialised.
        threshold: share of the fair load below which an expert counts as dead.
        patience: for how many optimizer steps in a row.
        check_every: optimizer steps between two looks (default: a tenth of `patience`).
        noise: `"reinit"`: standard deviation of the noise, relative to that of the matrix (or router row) it is added to.
        exploration_step: `"explore"`: by how much the bonus moves, in logits.
        exploration_share: `"explore"`: up to what share of its fair load an expert is helped.

    Raises:
        ValueError: a value is out of range; at the beginning of training: the action does not fit the model.

    Example:
        >>> from hf_moe.training import DeadExpertCallback
        >>> callback = DeadExpertCallback(action="reinit", patience=100)
        >>> trainer = Trainer(model, args, train_dataset=dataset, callbacks=[callback])  # doctest: +SKIP
    """

    def __init__(
        self,
        action: Action = "warn",
        *,
        threshold: float = 0.05,
        patience: int = 20,
        check_every: int | None = None,
        noise: float = 0.05,
        exploration_step: float = 0.05,
        exploration_share: float = 0.5,
    ) -> None:
        super().__init__(RoutingWindow(names=("executed",)))
        self._arguments = {
            "action": action, "threshold": threshold, "patience": patience, "check_every": check_every, "noise": noise,
            "exploration_step": exploration_step, "exploration_share": exploration_share,
        }  # fmt: skip
        for name, valid, expected in (
            ("action", action in get_args(Action), f"one of {', '.join(map(repr, get_args(Action)))}"),
            ("threshold", 0 < threshold < 1, "between 0 and 1"),
            ("patience", patience >= 1, "at least 1"),
            ("check_every", check_every is None or check_every >= 1, "at least 1, or None"),
            ("noise", noise > 0, "positive: without noise the copy would take the same tokens as its source"),
            ("exploration_step", exploration_step > 0, "positive"),
            (
                "exploration_share",
                action != "explore" or threshold <= exploration_share <= 1,
                f"between `threshold`={threshold} and 1",
            ),
        ):
            if not valid:
                raise ValueError(f"`{name}`={self._arguments[name]!r} must be {expected}.")
        self.action, self.threshold, self.patience, self.noise = action, threshold, patience, noise
        self.check_every = check_every or max(1, patience // 10)
        self.exploration_step, self.exploration_share = exploration_step, exploration_share
        self._forget()

    def _forget(self) -> None:
        self._streak_LE: Tensor | None = None  # optimizer steps in a row under the threshold
        self._bonus_LE: Tensor | None = None
        self._reported: dict[tuple[int, int], int] = {}  # the step at which each dead expert that was reported died
        self._sizes_L1 = torch.zeros(0, 1)
        self._routers: list[Router] = []  # those that have a bonus
        self._layers: list[StackedLayer] = []  # those that can be re-initialised

    # ------------------------------------------------------------------ events

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        assert self.watch is not None
        saved = self._saved(state)
        try:
            self._prepare(args, kwargs["model"], kwargs.get("optimizer"))
        except ValueError:
            self._stop()  # no listener stays behind
            raise
        self._sizes_L1 = torch.tensor(self.watch.num_experts, dtype=torch.float64).unsqueeze(1)
        shape = (len(self.watch.num_experts), max(self.watch.num_experts))
        self._streak_LE = _dense(saved.get("streaks", {}), shape, torch.int64)
        self._reported = {_cell(name): step for name, step in saved.get("reported", {}).items()}
        if self._routers:
            self._bonus_LE = _dense(saved.get("bonuses", {}), shape, torch.float32)
            for router, size, bonus_E in zip(self._routers, self.watch.num_experts, self._bonus_LE, strict=True):
                sharded = isinstance(router.weight, DTensor)  # it may be offloaded
                router.exploration_bonus = bonus_E[:size].to(args.device if sharded else router.weight.device, copy=True)

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Count the optimizer step that was just made, move the bonuses by it, and look from time to time."""
        if self.watch is None or self._streak_LE is None:
            return
        layers = self.window.total().layers
        self.window.clear()
        if not layers:
            return
        share_LE = self._shares([layer.sums["executed"] for layer in layers])
        device = share_LE.device
        self._streak_LE = count_streaks(self._streak_LE.to(device), share_LE, self.threshold)
        if self._bonus_LE is not None:
            self._bonus_LE = self._bonus_LE.to(device)
            exploring_LE = (self._streak_LE >= self.patience) | (self._bonus_LE > 0)
            self._bonus_LE = move_bonuses(self._bonus_LE, share_LE, exploring_LE, self._step_size(), self.exploration_share)
            for router, bonus_E in zip(self._routers, self._bonus_LE, strict=True):
                assert router.exploration_bonus is not None
                router.exploration_bonus.copy_(bonus_E[: router.num_experts], non_blocking=True)
        if state.global_step % self.check_every == 0:
            self._look(args, state, share_LE, kwargs.get("optimizer"))

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._bonus_LE is not None and self.watch is not None and state.is_world_process_zero:
            for layer, bonus_E in zip(self.watch.layers, self._bonus_LE.tolist(), strict=True):
                helped = [f"expert {expert} ({bonus:.2g})" for expert, bonus in enumerate(bonus_E) if bonus > 0]
                if helped:
                    logger.warning(
                        f"MoE layer {layer}: {', '.join(helped)} still had an exploration bonus when training ended; "
                        "without it, as in evaluation, they get fewer tokens. Train longer, or raise `exploration_step`."
                    )
        super().on_train_end(args, state, control, **kwargs)

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps; the same on every rank."""
        saved = {
            "streaks": _sparse(self._streak_LE),
            "bonuses": _sparse(self._bonus_LE),
            "reported": {f"{row}.{expert}": step for (row, expert), step in self._reported.items()},
        }
        return {"args": self._arguments, "attributes": {"_restored": saved}}

    def _stop(self) -> None:
        super()._stop()
        for router in self._routers:
            router.exploration_bonus = None
        self._forget()

    def _saved(self, state: TrainerState) -> dict[str, Any]:
        """What a checkpoint kept of the callback (of several: of the one with these arguments); nothing at the first step."""
        own = self.state()
        kept: Any = state.stateful_callbacks
        found = kept.setdefault(type(self).__name__, own)  # `Trainer` saves only what has a name there
        if isinstance(found, list):  # of several callbacks; `Trainer` appends to it with every checkpoint
            found = next((entry for entry in reversed(found) if entry["args"] == own["args"]), own)
        return found["attributes"].get("_restored", {}) if state.global_step else {}

    # ------------------------------------------------------------------ what fits

    def _prepare(self, args: TrainingArguments, model: nn.Module, optimizer: Any) -> None:
        """Find what the action acts on.

        Raises:
            ValueError: it cannot be done to this model.
        """
        assert self.watch is not None
        if self.action == "explore":
            self._routers = self._exploring_routers()
        elif self.action == "reinit":
            refuse_flat_parameters("`action`='reinit'", args, model)
            self._refuse_balanced_routers()
            self._layers = stacked_layers(self.watch)
            for layer in self._layers:
                layer.check(optimizer)

    def _exploring_routers(self) -> list[Router]:
        assert self.watch is not None
        self._refuse_balanced_routers()
        found = []
        for gate in self.watch.routers:
            router = next((module for module in trained_module(gate).modules() if isinstance(module, Router)), None)
            if router is None:
                raise ValueError(
                    f"`action`='explore' adds to the logits of hf_moe's learned routers, and {type(gate).__name__} is none. "
                    "Use 'warn', or for native MoEs 'reinit' (or import the model: `hf-moe import`)."
                )
            found.append(router)
        return found

    def _refuse_balanced_routers(self) -> None:
        assert self.watch is not None
        router_type = getattr(self.watch.model.config, "router_type", None)
        if router_type in (*BATCH_ROUTERS, "hash"):
            raise ValueError(
                f"`action`={self.action!r} does not fit `router_type`={router_type!r}, whose load is balanced by construction "
                "and does not follow from logits. Use action='warn', or no DeadExpertCallback."
            )

    # ------------------------------------------------------------------ counting and acting

    def _shares(self, executed: list[Tensor]) -> Tensor:
        """`[L, E]` load relative to the fair load; 1 in padding, and where a layer got nothing at all."""
        executed_LE = pad_sequence(executed, batch_first=True)
        self._sizes_L1 = self._sizes_L1.to(executed_LE)
        fair_L1 = executed_LE.sum(dim=1, keepdim=True) / self._sizes_L1
        real_LE = torch.arange(executed_LE.shape[1], device=executed_LE.device) < self._sizes_L1
        return torch.where(real_LE & (fair_L1 > 0), executed_LE / fair_L1, 1.0)

    def _step_size(self) -> float:
        return self.exploration_step * _STEP_UNIT.get(self._routers[0].config.router_type, 1.0)

    def _look(self, args: TrainingArguments, state: TrainerState, share_LE: Tensor, optimizer: Any) -> None:
        """Report the experts that died since the last look, and re-initialise them if that is the action."""
        assert self._streak_LE is not None
        assert self.watch is not None
        streaks, shares = torch.stack([self._streak_LE.to(share_LE), share_LE]).cpu()
        dead = {(row, expert): int(streaks[row, expert]) for row, expert in (streaks >= self.patience).nonzero().tolist()}
        died = {cell: state.global_step - streak for cell, streak in dead.items()}
        new = [cell for cell in dead if self._reported.get(cell) != died[cell]]
        self._reported = died
        for row, layer in enumerate(self.watch.layers):
            found = [f"expert {expert} ({shares[row, expert]:.1%})" for r, expert in new if r == row]
            if found and state.is_world_process_zero:
                logger.warning(
                    f"MoE layer {layer}, step {state.global_step}: {', '.join(found)} got less than {self.threshold:.1%} of "
                    f"the fair load in each of the last {self.patience} steps or more (in brackets: of the last step). "
                    f"{_REMEDIES[self.action]}"
                )
        for row, stacked in enumerate(self._layers):
            experts = [expert for r, expert in dead if r == row]
            load_E = shares[row, : stacked.num_experts].tolist()
            copies = plan_copies(load_E, experts, self.threshold, stacked.num_groups, stacked.is_hierarchical)
            make_copies(stacked, copies, self.noise, f"{args.seed} {state.global_step}", optimizer)
            for _, expert in copies.experts:
                self._streak_LE[row, expert] = 0


# ---------------------------------------------------------------------- pure functions


def count_streaks(streak_LE: Tensor, share_LE: Tensor, threshold: float) -> Tensor:
    """How many optimizer steps in a row each expert was under the threshold, this one included.

    Args:
        streak_LE: until the step before.
        share_LE: load of this step relative to the fair load.
        threshold: of the share.
    """
    return torch.where(share_LE < threshold, streak_LE + 1, 0)


def move_bonuses(bonus_LE: Tensor, share_LE: Tensor, exploring_LE: Tensor, step: float, enough: float) -> Tensor:
    """Each exploring expert's bonus one step up while its share is under `enough`, else one step down, but not below 0."""
    up_LE = exploring_LE & (share_LE < enough)
    return (bonus_LE + torch.where(up_LE, step, -step)).clamp(min=0)


# ---------------------------------------------------------------------- counters in JSON


def _sparse(values_LE: Tensor | None) -> dict[str, Any]:
    """`{"row.expert": value}` of what is not 0: `Trainer` writes every number of a list into a line of its own."""
    if values_LE is None:
        return {}
    values_LE = values_LE.cpu()
    return {f"{row}.{expert}": values_LE[row, expert].item() for row, expert in values_LE.nonzero().tolist()}


def _dense(values: dict[str, Any], shape: tuple[int, int], dtype: torch.dtype) -> Tensor:
    values_LE = torch.zeros(shape, dtype=dtype)
    for name, value in values.items():
        values_LE[_cell(name)] = value
    return values_LE


def _cell(name: str) -> tuple[int, int]:
    row, expert = name.split(".")
    return int(row), int(expert)
