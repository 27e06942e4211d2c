# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Callbacks for the stock `Trainer`: watch the load of the experts, and balance it without a loss."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Any

import torch
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_callback import ExportableState
from transformers.trainer_utils import SaveStrategy
from transformers.utils import logging

from hf_moe.losses import loss_free_bias_update
from hf_moe.record import RoutingRecord

from .alarms import Alarm, AlarmBell, AlarmThresholds
from .flops import FlopsMeter, active_parameters, peak_flops
from .load_file import LOAD_FILE, ExpertLoadFile
from .metrics import RoutingWindow, load_metrics
from .native_routing import bias_of
from .reporting import LayersOffConsole, move_before_reporters
from .routing_watch import RoutingWatch
from .watching import watch_routing

logger = logging.get_logger(__name__)


class RoutingCallback(TrainerCallback):
    """Adds up what a MoE tells of every training forward, from the beginning of training to its end.

    Args:
        window: where to add it up.

    Attributes:
        watch: what is watched, during training.
    """

    def __init__(self, window: RoutingWindow) -> None:
        self.window = window
        self.watch: RoutingWatch | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._stop()  # an interrupted training never reached its on_train_end
        self.watch = watch_routing(kwargs["model"], self._listen)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._stop()

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Tell the model how many micro-batches the step has, for trainers that make the loss themselves (TRL's)."""
        callers_loss = getattr(self.watch.model, "callers_loss", None) if self.watch is not None else None
        if callers_loss is not None:
            callers_loss.accumulation_steps = _micro_batches(args, state, kwargs.get("train_dataloader"))

    def _listen(self, record: RoutingRecord) -> None:
        self.window.add(record)

    def _stop(self) -> None:
        self.window.clear()
        if self.watch is not None:
            callers_loss = getattr(self.watch.model, "callers_loss", None)
            if callers_loss is not None:
                callers_loss.accumulation_steps = None
            self.watch.remove()
            self.watch = None


def _micro_batches(args: TrainingArguments, state: TrainerState, loader: Any) -> int:
    """How many micro-batches the coming optimizer step has: as `Trainer` cuts an epoch, its last step may have fewer."""
    most = args.gradient_accumulation_steps
    try:
        batches = len(loader)
    except TypeError:  # an iterable dataset
        return most
    steps = -(-batches // most)
    return batches % most or most if state.global_step % steps == steps - 1 else most


def saved_state(callback: TrainerCallback, state: TrainerState) -> dict[str, Any]:
    """The attributes that a callback with `state()` had when the checkpoint was saved from which training goes on.

    `Trainer` restores them only with `restore_callback_states_from_checkpoint`, and cannot save a callback whose name is
    not in the checkpoint; this does without the one and mends the other. Empty at the beginning of a training.
    """
    name = type(callback).__name__
    states: Any = state.stateful_callbacks
    found = states.setdefault(name, callback.state())  # type: ignore[attr-defined]
    found = found[-1] if isinstance(found, list) else found  # `Trainer` appends to a list at every checkpoint
    return found.get("attributes", {}) if state.global_step else {}


class ExpertLoadCallback(RoutingCallback, ExportableState):
    """Logs how the experts are used and what their routers lose, over all ranks, and says when something goes wrong.

    Every training log gets the numbers of `load_metrics` since the log before it, as `moe/<name>` and, of each layer,
    `moe/layer_<i>/<name>`, in `state.log_history` and in every reporter (the console shows the means only); further
    `moe/tflops_per_device` and, where the device's peak is known, `moe/mfu`, both of active parameters, and `moe/alarms`, how
    many alarms there were (their text is in `log_history` as `moe/alarm`). `state.total_flos` counts active parameters. What
    is left when training ends goes into the log of the summary.

    Every log also appends a row to `<output_dir>/expert_load.safetensors`: `step` `[N]` and `executed` `[N, layers, experts]`,
    the assignments that were executed (after capacity), over real tokens. A resumed training goes on where its checkpoint
    was saved, without gap or double.

    Args:
        thresholds: of the alarms. Each kind of alarm is raised once: as a warning, and in `alarms`.
        peak_flops: FLOP/s of one device, for `moe/mfu` (default: from a table of GPUs).

    Example:
        >>> from hf_moe.training import ExpertLoadCallback
        >>> trainer = Trainer(model, args, train_dataset=dataset, callbacks=[ExpertLoadCallback()])  # doctest: +SKIP
    """

    def __init__(self, thresholds: AlarmThresholds | dict[str, Any] | None = None, peak_flops: float | None = None) -> None:
        super().__init__(RoutingWindow())
        self._thresholds = AlarmThresholds(**thresholds) if isinstance(thresholds, dict) else thresholds or AlarmThresholds()
        self._peak_flops = peak_flops
        self._bell = AlarmBell(self._thresholds)
        self._file: ExpertLoadFile | None = None
        self._flops: FlopsMeter | None = None
        self._trainer_state: TrainerState | None = None
        self._logged_step = 0

    @property
    def alarms(self) -> list[Alarm]:
        """The alarms of this training."""
        return self._bell.raised

    def state(self) -> dict[str, Any]:
        """What a checkpoint keeps: the window since the last log, as `_AfterOthers` has gathered it."""
        if self._flops is not None and self._trainer_state is not None:
            self._flops.correct(self._trainer_state)
        attributes = {
            "window": self.window.state(),
            "logged_step": self._logged_step,
            "alarms": [asdict(alarm) for alarm in self._bell.raised],
            "streaks": [[layer, streak] for layer, streak in self._bell.streaks.items()],
        }
        arguments = {"thresholds": asdict(self._thresholds), "peak_flops": self._peak_flops}
        return {"args": arguments, "attributes": {"_saved": attributes}}

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._trainer_state = self._flops = None
        super().on_train_begin(args, state, control, **kwargs)
        assert self.watch is not None
        move_before_reporters(self, _AfterOthers(self))
        saved = saved_state(self, state).get("_saved", {})
        self._logged_step = saved.get("logged_step", state.global_step)
        self._bell = AlarmBell(
            self._thresholds, [Alarm(**alarm) for alarm in saved.get("alarms", [])], dict(saved.get("streaks", []))
        )
        first = state.is_world_process_zero
        self.window.restore(saved.get("window", {}), args.device, first)
        active, total = active_parameters(self.watch)
        self._flops = FlopsMeter(active, total, self._peak_flops or peak_flops(), seen=state.total_flos)
        self._trainer_state = state
        if first:
            path = Path(args.output_dir or ".") / LOAD_FILE
            self._file = ExpertLoadFile(path, self.watch.layers, self.watch.num_experts)
            self._file.keep(self._logged_step)

    def on_step_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_step_begin(args, state, control, **kwargs)
        if self._flops is not None:
            self._flops.start_step()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        if self._flops is not None:
            self._flops.end_step()

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the numbers of the window to a training log, or to the summary at the end, and start a new window."""
        if logs is None or self.watch is None or self._flops is None:
            return
        is_summary = "train_loss" in logs
        if not is_summary and "loss" not in logs:  # an evaluation
            return
        self._flops.correct(state)
        if "total_flos" in logs:
            logs["total_flos"] = state.log_history[-1]["total_flos"] = state.total_flos
        if self.window.is_empty:
            return
        total = self.window.total("cpu", replicas=_replicas(self.watch))  # every rank logs, so every rank gets here
        self.window.clear()
        steps, self._logged_step = state.global_step - self._logged_step, state.global_step
        numbers = load_metrics(total, self.watch.layers, steps)
        alarms = self._bell.check(state.global_step, numbers, total, self.watch)
        numbers |= self._flops.metrics(args.world_size)
        metrics: dict[str, Any] = {f"moe/{name}": value for name, value in numbers.items()}
        metrics["moe/alarms"] = len(self._bell.raised)
        logs.update(metrics)
        kept: Any = state.log_history[-1]  # `Trainer` has copied the logs into it by now
        kept.update(metrics)
        if alarms:
            kept["moe/alarm"] = " ".join(alarm.message for alarm in alarms)
        if state.is_world_process_zero:
            for alarm in alarms:
                logger.warning(f"step {alarm.step}: {alarm.message}")
            assert self._file is not None
            self._file.append(state.global_step, [layer.sums["executed"].round().long().tolist() for layer in total.layers])

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_train_end(args, state, control, **kwargs)
        if self._file is not None:
            self._file.finish()
            self._file = None

    def gather(self, args: TrainingArguments, control: TrainerControl) -> None:
        """Bring all ranks' part of the window to the first if a checkpoint may be saved before the next log."""
        best = control.should_evaluate and args.save_strategy == SaveStrategy.BEST
        if (control.should_save or best) and not control.should_log:
            self.window.gather()


class _AfterOthers(LayersOffConsole):
    """What `ExpertLoadCallback` does after all other callbacks, which may have asked for a checkpoint."""

    def __init__(self, owner: ExpertLoadCallback) -> None:
        self._owner = owner

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._owner.gather(args, control)

    def on_epoch_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._owner.gather(args, control)


def _replicas(watch: RoutingWatch) -> int:
    """How many ranks see the same tokens: those of a tensor-parallel group."""
    return getattr(watch.model, "tp_size", None) or 1


class LossFreeBalancingCallback(RoutingCallback):
    """Loss-free balancing (arXiv:2408.15664): after each optimizer step, moves the bias of every sigmoid router.

    An expert that got more than the mean of the step's assignments, over ranks and micro-batches, loses `speed`; one that
    got less gains it. Native MoEs that have such a bias (DeepSeek-V3, GLM4-MoE, …) are balanced, too: Transformers loads
    their bias but never moves it. Models with other routers are left alone.

    Args:
        speed: u (default: the config's `router_bias_update_speed`; of native MoEs 1e-3, the paper's).
    """

    def __init__(self, speed: float | None = None) -> None:
        super().__init__(RoutingWindow(names=("counts",)))
        self._speed = speed

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        assert self.watch is not None
        if all(bias_of(router) is None for router in self.watch.routers):
            self._stop()
        elif hasattr(kwargs["model"], "peft_config") and not any(
            parameter.requires_grad for router in self.watch.routers for parameter in router.parameters()
        ):
            logger.warning(
                "The adapter being trained does not hold the routers, so the bias of loss-free balancing stays as it is: it "
                "would not be saved. To move it, give `router=True` to `moe_lora_config`."
            )
            self._stop()

    @torch.no_grad()
    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the biases by the counts of the optimizer step that was just made."""
        if self.watch is None:
            return
        layers = self.window.total().layers
        self.window.clear()
        if not layers:
            return
        of_config: float = getattr(self.watch.model.config, "router_bias_update_speed", 1e-3)
        speed = of_config if self._speed is None else self._speed
        for router, layer in zip(self.watch.routers, layers, strict=True):
            bias = bias_of(router)
            if bias is not None:  # DeepSeek-V4 has layers that hash
                bias += loss_free_bias_update(layer.sums["counts"], speed).to(bias).view_as(bias)
