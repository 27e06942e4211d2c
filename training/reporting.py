# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Getting a callback's numbers to the reporters of a stock `Trainer`.

`Trainer` hands each log to its callbacks one after the other, the reporters (TensorBoard, …) before those of the user. A
user's callback that adds numbers to a log therefore has to be moved before them; callbacks are not told of the list that
they are in, but it is that of the `CallbackHandler` which is calling.
"""

from __future__ import annotations

import inspect
from typing import Any

from transformers import (
    PrinterCallback,
    ProgressCallback,
    TrainerCallback,
    TrainerControl,
    TrainerState,
    TrainingArguments,
)
from transformers.trainer_callback import CallbackHandler, DefaultFlowCallback

_CONSOLE = (PrinterCallback, ProgressCallback)


def move_before_reporters(callback: TrainerCallback, last: TrainerCallback) -> None:
    """To be called from an event of `callback`: from the next event on, it is first (but for Trainer's own flow control).

    Args:
        callback: adds numbers to logs.
        last: a callback to come after all others but those that print to the console.
    """
    handler = _calling_handler(callback)
    if handler is None:  # called by hand
        return
    others = [other for other in handler.callbacks if other is not callback and type(other) is not type(last)]
    flow = [other for other in others if isinstance(other, DefaultFlowCallback)]
    console = [other for other in others if isinstance(other, _CONSOLE)]
    between = [other for other in others if other not in flow and other not in console]
    handler.callbacks = [*flow, callback, *between, last, *console]  # a new list: the old one is being walked


def _calling_handler(callback: TrainerCallback) -> Any:
    frame = inspect.currentframe()
    while frame is not None:
        caller = frame.f_locals.get("self")
        if isinstance(caller, CallbackHandler) and callback in caller.callbacks:
            return caller
        frame = frame.f_back
    return None


class LayersOffConsole(TrainerCallback):
    """Stands after all reporters; the console comes next, and many numbers of many layers are not for it."""

    def on_log(
        self,
        args: TrainingArguments,
        state: TrainerState,
        control: TrainerControl,
        logs: dict[str, Any] | None = None,
        **kwargs: Any,
    ) -> None:
        """Take the numbers of single layers out of a log."""
        for name in [name for name in logs or {} if name.startswith("moe/layer_")]:
            assert logs is not None
            del logs[name]
