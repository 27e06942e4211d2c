# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Callbacks for the stock `Trainer`: watch the load of the experts, and balance it without a loss."""

from __future__ import annotations

import json
import os
from pathlib import Path
from typing import Any, cast

from torch import nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments

from hf_moe.modeling_moe import MoEPreTrainedModel
from hf_moe.record import RoutingRecord
from hf_moe.routers import SigmoidRouter

from .metrics import RoutingWindow, load_metrics

LOAD_FILE = "expert_load.jsonl"


class _RoutingCallback(TrainerCallback):
    """Adds up what the model tells of every training forward, from the beginning of training to its end.

    Args:
        window: where to add it up.
    """

    def __init__(self, window: RoutingWindow) -> None:
        self.window = window
        self._model: MoEPreTrainedModel | None = None

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._stop()  # an interrupted training never reached its on_train_end
        self._model = find_moe_model(kwargs["model"])
        self._model.add_routing_listener(self._listen)

    def on_train_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        self._stop()

    def _listen(self, record: RoutingRecord) -> None:
        self.window.add(record)

    def _stop(self) -> None:
        self.window.clear()
        if self._model is not None:
            self._model.remove_routing_listener(self._listen)
            self._model = None


def find_moe_model(model: nn.Module) -> MoEPreTrainedModel:
    """The MoE inside a model that PEFT, DDP, FSDP or `torch.compile` may have wrapped.

    Raises:
        ValueError: there is none.
    """
    for module in model.modules():
        if isinstance(module, MoEPreTrainedModel):
            return module
    raise ValueError(
        f"`model` of class {type(model).__name__} holds no MoEForCausalLM, so it has no experts to watch. Upcycle it first "
        "(`hf-moe upcycle`), or train it without this callback."
    )


class ExpertLoadCallback(_RoutingCallback):
    """Logs how evenly the experts are used, since the previous log and over all ranks.

    With every training log it adds `moe/…` numbers (see `load_metrics`) to `state.log_history` and to the logs, and a
    line `{"step": …, "layers": [decoder layer of each row], "executed": [[assignments of each expert] of each layer]}` to
    `<output_dir>/expert_load.jsonl`. A resumed training continues the file from its checkpoint's step.

    Example:
        >>> from hf_moe.training import ExpertLoadCallback
        >>> trainer = Trainer(model, args, train_dataset=dataset, callbacks=[ExpertLoadCallback()])  # doctest: +SKIP
    """

    def __init__(self) -> None:
        super().__init__(RoutingWindow())

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        if state.is_world_process_zero:
            _keep_rows(_load_file(args), up_to_step=state.global_step)

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Add the numbers of the window to a training log and start a new window."""
        if logs is None or "loss" not in logs or self._model is None:  # an evaluation, or the summary at the end
            return
        layers = self.window.total("cpu")  # every rank logs, so every rank gets here
        self.window.clear()
        if not layers:
            return
        # Trainer has copied `logs` into the history by now. TensorBoard and the other reporters have had them too: they
        # come before callbacks of the user, so they do not get these numbers from here. The progress bar comes after.
        metrics = {f"moe/{name}": value for name, value in load_metrics(layers).items()}
        logs.update(metrics)
        state.log_history[-1].update(metrics)
        if state.is_world_process_zero:
            executed = [[round(count) for count in layer.sums["executed"].tolist()] for layer in layers]
            row = {"step": state.global_step, "layers": self._model.config.moe_layers, "executed": executed}
            with _load_file(args).open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


def _load_file(args: TrainingArguments) -> Path:
    return Path(args.output_dir or ".") / LOAD_FILE


def _keep_rows(path: Path, up_to_step: int) -> None:
    """Drop the rows of an earlier training that this one will write again; at step 0 that is all of them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    lines = path.read_text(encoding="utf-8").splitlines() if path.exists() else []
    kept = [line for line in lines if _step_of(line) <= up_to_step]
    new = path.with_name(path.name + ".new")
    new.write_text("".join(f"{line}\n" for line in kept), encoding="utf-8")
    os.replace(new, path)


def _step_of(line: str) -> float:
    try:
        return json.loads(line)["step"]
    except ValueError:  # the line that a killed training was writing
        return float("inf")


class LossFreeBalancingCallback(_RoutingCallback):
    """Loss-free balancing (arXiv:2408.15664): after each optimizer step, moves the bias of every sigmoid router.

    An expert that got more than the mean of the step's assignments, over ranks and micro-batches, loses
    `router_bias_update_speed`; one that got less gains it. Models with other routers are left alone.
    """

    def __init__(self) -> None:
        super().__init__(RoutingWindow(names=("counts",)))

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        super().on_train_begin(args, state, control, **kwargs)
        assert self._model is not None
        if self._model.config.router_type != "sigmoid":
            self._stop()

    def on_step_end(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        """Move the biases by the counts of the optimizer step that was just made."""
        if self._model is None:
            return
        totals = self.window.total()
        self.window.clear()
        if totals:
            for layer, total in zip(self._model.moe_layers, totals, strict=True):
                cast(SigmoidRouter, layer.gate).update_bias(total.sums["counts"])
