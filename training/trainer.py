# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""`MoETrainer`: Transformers' `Trainer` plus what a callback cannot do for a Mixture-of-Experts."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback, TrainerControl, TrainerState, TrainingArguments
from transformers.trainer_pt_utils import nested_gather

from hf_moe.expert_parallel import ExpertParallelConfig, load_expert_parallel
from hf_moe.tensor_pieces import reshard

from .callbacks import ExpertLoadCallback, LossFreeBalancingCallback
from .checkpoints import STATE, last_whole_checkpoint, reading_names_on_disk, what_is_missing
from .distributed_checkpoints import DistributedCheckpointTrainer
from .parallel_arguments import ExpertParallelArguments
from .parameter_groups import PARTS, Part, check_rates, freeze_parts, split_groups, trained_parts
from .perplexity import Perplexity
from .watching import watch_routing


@dataclass
class MoETrainingArguments(ExpertParallelArguments, TrainingArguments):
    """`TrainingArguments` plus learning rates and freezing of routers, routed experts, and the rest; expert parallelism.

    Shared experts are of the rest. Weight decay is as in `Trainer`: for all weights but biases and norms, routers included.
    """

    router_learning_rate: float | None = field(
        default=None, metadata={"help": "Highest learning rate of the routers (default: learning_rate)."}
    )
    expert_learning_rate: float | None = field(
        default=None, metadata={"help": "Highest learning rate of the routed experts (default: learning_rate)."}
    )
    freeze: list[str] | None = field(default=None, metadata={"help": "What not to train: one or two of router, experts, rest."})
    async_save: bool = field(
        default=False,
        metadata={"help": "Write checkpoints of expert-parallel models in the background. Takes main memory for a copy."},
    )

    def __post_init__(self) -> None:
        super().__post_init__()
        self.check_expert_parallel()
        self.freeze = [self.freeze] if isinstance(self.freeze, str) else self.freeze
        for part in self.freeze or []:
            if part not in PARTS:
                raise ValueError(f"`freeze`={part!r} is not known. Choose from {', '.join(map(repr, PARTS))}.")
        rates = {"router": self.router_learning_rate, "experts": self.expert_learning_rate}
        for part, rate in rates.items():
            option = {"router": "router_learning_rate", "experts": "expert_learning_rate"}[part]
            if rate is not None and not rate >= 0:
                raise ValueError(f"`{option}`={rate} must not be negative. To train nothing there, `freeze` {part!r}.")
            if rate is not None and part in (self.freeze or []):
                raise ValueError(f"`{option}`={rate}, but `freeze` names {part!r}. Leave one of them out.")


class MoETrainer(DistributedCheckpointTrainer):
    """`Trainer` for a Mixture-of-Experts of hf_moe or of Transformers; takes what `Trainer` takes, dense models too.

    - Learning rates of routers and routed experts, and freezing, as `MoETrainingArguments` say, found by structure, also in
      adapters; every log of the training has each part's rate as `lr/router`, `lr/experts`, `lr/rest`.
    - `ExpertLoadCallback` and, for routers with a bias that it moves, `LossFreeBalancingCallback` are there without being
      named, unless one of their class is given; the latter not if routers are frozen.
    - Evaluation gives `eval_loss`, the LM loss in nats per token, `eval_perplexity` and `eval_tokens` of all tokens together:
      they depend neither on batch size, nor on ranks, nor on the lengths of sequences. (With a loss of your own, `eval_loss`
      stays that.)
    - A resumed training logs what one that was not interrupted logs, also where the checkpoint lies between two logs; and
      `resume_from_checkpoint=True` takes the last checkpoint that is whole.
    - An expert-parallel model is checkpointed (see `distributed_checkpoints`), and resumed with any number of ranks and any
      expert parallelism, or in one process.

    Example:
        >>> from hf_moe.training import MoETrainer, MoETrainingArguments
        >>> args = MoETrainingArguments("run", router_learning_rate=1e-4, freeze=["rest"])  # doctest: +SKIP
        >>> MoETrainer(model, args, train_dataset=dataset).train()  # doctest: +SKIP
    """

    def __init__(
        self,
        model: nn.Module | str | os.PathLike[str] | None = None,
        args: TrainingArguments | None = None,
        *more: Any,
        **kwargs: Any,
    ) -> None:
        self._perplexity: Perplexity | None = None
        self._trained: list[Part] = []
        self._rates: dict[str, float] = {}
        spread = _spread(model, args)
        if spread is not None:
            _freeze(spread, args)
            check_rates(spread, _rates(args))
        super().__init__(spread, args, *more, **kwargs)
        for callback in _default_callbacks(self.model, self.args):
            if not any(isinstance(given, type(callback)) for given in self.callback_handler.callbacks):
                self.add_callback(callback)
        self.add_callback(_LossWindow(self))

    def call_model_init(self, trial: Any = None) -> nn.Module:
        """See `Trainer.call_model_init`."""
        model = super().call_model_init(trial)
        _freeze(model, self.args)
        return model

    def create_model_card(self, *args: Any, **kwargs: Any) -> None:
        """See `Trainer.create_model_card`; the card is that of `hf_moe.model_cards`, and text of yours in it is kept."""
        from hf_moe.model_cards import create_model_card

        create_model_card(self, *args, **kwargs)

    # ------------------------------------------------------------------ parameter groups

    def create_optimizer(self, model: Any = None) -> torch.optim.Optimizer:
        """Trainer's optimizer, its groups split by part.

        Raises:
            ValueError: a learning rate is given for a part of which nothing is trained, or with an optimizer of your own.
        """
        trained: Any = self.model if model is None else model
        rates = _rates(self.args)
        if self.optimizer is not None:
            given = [part for part in rates if rates[part] is not None]
            if given and not any("part" in group for group in self.optimizer.param_groups):
                raise ValueError(f"`optimizers` holds an optimizer, so the learning rate of {given[0]} is that of its groups.")
            return super().create_optimizer(model)
        check_rates(trained, rates)
        self._trained = trained_parts(trained)
        optimizer = super().create_optimizer(model)
        if any(rate is not None for rate in rates.values()):  # else a checkpoint has the groups that `Trainer`'s has
            split_groups(optimizer, trained, rates)
        return optimizer

    def get_decay_parameter_names(self, model: nn.Module) -> list[str]:
        """As `Trainer`'s, without the thresholds of strictly balanced routers: decay would open every expert."""
        return [name for name in super().get_decay_parameter_names(model) if not name.endswith(".thresholds")]

    def _get_learning_rate(self) -> float:
        # asked for between the optimizer's step and the scheduler's: the rates that the step was made with
        rate = super()._get_learning_rate()
        groups = getattr(self.optimizer, "param_groups", [])
        of_groups = {group["part"]: float(group["lr"]) for group in groups if "part" in group}
        self._rates = of_groups or dict.fromkeys(self._trained, rate)
        return rate

    def log(self, logs: dict[str, float], start_time: float | None = None) -> None:
        """See `Trainer.log`; a log of the training gets the rates of the parts."""
        if "learning_rate" in logs and set(self._rates) - {"rest"}:
            logs |= {f"lr/{part}": rate for part, rate in self._rates.items()}
        super().log(logs, start_time)

    # ------------------------------------------------------------------ evaluation

    def evaluation_loop(
        self,
        dataloader: Any,
        description: str,
        prediction_loss_only: bool | None = None,
        ignore_keys: list[str] | None = None,
        metric_key_prefix: str = "eval",
    ) -> Any:
        """See `Trainer.evaluation_loop`; adds the perplexity per token."""
        self._perplexity = metric = Perplexity()
        try:
            output: Any = super().evaluation_loop(dataloader, description, prediction_loss_only, ignore_keys, metric_key_prefix)
        finally:
            self._perplexity = None
        # ranks of a tensor-parallel group have the same batches
        found = metric.compute(lambda sums: self.accelerator.reduce(sums, "sum") / self.get_tp_size())
        if self.label_smoother is not None or self.compute_loss_func is not None:
            found.pop("loss", None)
        output.metrics.update({f"{metric_key_prefix}_{name}": value for name, value in found.items()})
        return output

    def compute_loss(
        self, model: nn.Module, inputs: dict[str, Any], return_outputs: bool = False, num_items_in_batch: Any = None
    ) -> Any:
        """See `Trainer.compute_loss`."""
        given = {name: inputs.get(name) for name in ("labels", "shift_labels")}
        loss, outputs = super().compute_loss(model, inputs, True, num_items_in_batch)
        if self._perplexity is not None and not model.training:
            self._add_to_perplexity(outputs, **given)
        return (loss, outputs) if return_outputs else loss

    def _add_to_perplexity(self, outputs: Any, labels: Tensor | None, shift_labels: Tensor | None) -> None:
        logits = outputs.get("logits") if isinstance(outputs, dict) else None
        labels, shifted = (labels, False) if shift_labels is None else (shift_labels, True)
        assert self._perplexity is not None
        if isinstance(logits, Tensor) and labels is not None and logits.shape[:-1] == labels.shape:
            rows = self._rows_that_count(labels.shape[0])
            self._perplexity.add_batch(predictions=logits[:rows], references=labels[:rows], shifted=shifted)

    def _rows_that_count(self, rows: int) -> int:
        """How many of this rank's rows are not repeated ones, with which Accelerate makes the last batch whole."""
        state, accelerator = self.accelerator.gradient_state, self.accelerator
        alone = accelerator.num_processes == self.get_tp_size()
        if alone or not state.end_of_dataloader or state.remainder < 1:
            return rows
        return min(rows, max(0, state.remainder - accelerator.process_index // self.get_tp_size() * rows))

    def _prepare_for_training(self, *args: Any, **kwargs: Any) -> Any:
        forget_evaluation(self.model, self.model_wrapped)
        return super()._prepare_for_training(*args, **kwargs)

    # ------------------------------------------------------------------ resuming

    def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
        """See `Trainer.train`.

        Raises:
            ValueError: there is no whole checkpoint to go on from.
        """
        wanted: Any = resume_from_checkpoint
        if wanted is True:
            wanted = last_whole_checkpoint(self.args.output_dir or ".")
            if wanted is None:
                raise ValueError(f"`resume_from_checkpoint`=True: there is no whole checkpoint in {self.args.output_dir!r}.")
        elif wanted and (missing := what_is_missing(wanted)):
            raise ValueError(f"`resume_from_checkpoint`={str(wanted)!r}: {missing} is missing or cut short. Take another.")
        return super().train(str(wanted) if wanted else None, *args, **kwargs)

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        with reading_names_on_disk(self.model if model is None else model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        with reading_names_on_disk(self.model):
            super()._load_best_model()

    def _save_checkpoint(self, *args: Any, **kwargs: Any) -> None:
        # what `Trainer` would lose: the loss since the last log
        loss = nested_gather(self._tr_loss, self.args.parallel_mode).mean().item()
        attributes = {"loss": loss, "logged_step": self._globalstep_last_logged, "world_size": self.args.world_size}
        states: Any = self.state.stateful_callbacks
        states[STATE] = {"args": {}, "attributes": attributes}
        super()._save_checkpoint(*args, **kwargs)


def forget_evaluation(model: Any, wrapped: Any) -> None:
    """Undo what an evaluation before the training leaves on a model and what would have ranks train apart without a word.

    Accelerate 1.15 marks a model that it prepares for evaluation, and then takes it for one that is prepared for training, so
    that it is not wrapped in DDP. FSDP2 leaves the root's parameters gathered, so that the optimizer would get these.
    """
    reshard(model)
    if model is wrapped and vars(model).pop("_is_accelerate_prepared", False):
        forward = vars(model).pop("_original_forward", None)  # without autocast
        if getattr(forward, "__func__", None) is type(model).forward:
            vars(model).pop("forward", None)
        elif forward is not None:
            model.forward = forward


class _LossWindow(TrainerCallback):
    """Gives a resumed `MoETrainer` back the loss since the last log, so that the next log is of all its steps."""

    def __init__(self, trainer: MoETrainer) -> None:
        self._trainer = trainer

    def on_train_begin(self, args: TrainingArguments, state: TrainerState, control: TrainerControl, **kwargs: Any) -> None:
        states: Any = state.stateful_callbacks
        saved = states.get(STATE, {}).get("attributes") if state.global_step else None
        if saved:
            trainer = self._trainer
            trainer._tr_loss += saved["loss"]
            trainer._total_loss_scalar -= saved["loss"]  # the mean at the end is of the steps of this call
            trainer._globalstep_last_logged = saved["logged_step"]


def _rates(args: Any) -> dict[Part, float | None]:
    """Learning rates by part; plain `TrainingArguments` have none."""
    return {
        "router": getattr(args, "router_learning_rate", None),
        "experts": getattr(args, "expert_learning_rate", None),
    }


def _spread(model: Any, args: Any) -> Any:
    """The model; one that is given by its path is loaded, over the ranks that `args` say.

    Raises:
        ValueError: `args` say that it is spread over ranks, and it is not.
    """
    layout = getattr(args, "expert_parallel", None)
    if isinstance(model, (str, os.PathLike)):
        args.device  # noqa: B018  joins the process group
        return load_expert_parallel(model, config=layout or ExpertParallelConfig())
    if layout is not None and args.world_size > 1 and not getattr(model, "is_distributed_loading_by_transformers", False):
        raise ValueError(
            f"`expert_parallel_size`={layout.ep_size}, but the model is not spread over ranks. Give its path as `model`, or "
            "load it with `load_expert_parallel(path, config=args.expert_parallel)`."
        )
    return model


def _freeze(model: nn.Module, args: Any) -> None:
    parts = getattr(args, "freeze", None)
    if parts:
        freeze_parts(model, parts)


def _default_callbacks(model: Any, args: Any) -> list[TrainerCallback]:
    """Those for the routing that the model has; none for a dense model."""
    try:
        watch_routing(model, lambda record: None).remove()
    except ValueError:
        return []
    callbacks: list[TrainerCallback] = [ExpertLoadCallback()]
    return callbacks if "router" in (getattr(args, "freeze", None) or []) else [*callbacks, LossFreeBalancingCallback()]


__all__ = ["MoETrainer", "MoETrainingArguments"]
