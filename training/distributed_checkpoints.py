# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""`Trainer` that checkpoints and resumes a model which was sharded when it was loaded (expert parallelism, FSDP2, TP).

Transformers 5.23 refuses to. A `checkpoint-N` holds, in place of weights and optimizer, the folder `distributed_checkpoint`
(see `hf_moe.expert_checkpoint`); the rest is as ever. The file system has to be one that all ranks share. Training goes on from
it with any number of ranks and any parallelism, or in one process; and from an ordinary checkpoint with any.
"""

from __future__ import annotations

import random
import shutil
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn
from transformers import PreTrainedModel, Trainer, TrainingArguments
from transformers.trainer import OPTIMIZER_NAME, SCHEDULER_NAME, TRAINER_STATE_NAME
from transformers.trainer_pt_utils import set_rng_state_for_device
from transformers.trainer_utils import HubStrategy, rotate_checkpoints

from hf_moe.expert_checkpoint import (
    DISTRIBUTED_FOLDER,
    PendingSave,
    load_distributed,
    load_hub_weights,
    load_optimizer,
    save_all_but_weights,
    save_distributed,
    save_expert_parallel,
)
from hf_moe.optimizer_groups import group_options, optimized_parameters, plain_optimizer, set_group_options
from hf_moe.tensor_pieces import Pieces, expert_orders

from .parameter_groups import PARTS, parts_of


class DistributedCheckpointTrainer(Trainer):
    """`Trainer`, for models that `from_pretrained(distributed_config=…)` has sharded as for any other."""

    def __init__(
        self, model: nn.Module | None = None, args: TrainingArguments | None = None, *more: Any, **kwargs: Any
    ) -> None:
        self._pending: PendingSave | None = None
        self._checkpoint: str | None = None  # that is being written
        args = TrainingArguments("tmp_trainer") if args is None else args
        with _saving_is_ours(model, args):
            super().__init__(model, args, *more, **kwargs)

    @property
    def _writes_distributed(self) -> bool:
        return self.is_distributed_loading_by_transformers and not self.args.save_only_model

    # ------------------------------------------------------------------ saving

    def _save_checkpoint(self, model: nn.Module, trial: Any) -> None:
        self._finish_saving()
        if not self._writes_distributed:
            return super()._save_checkpoint(model, trial)
        folder = Path(self._get_output_dir(trial)) / f"checkpoint-{self.state.global_step}"
        if self.args.should_save:
            # what is left of a killed training, or of another, must not look whole while this one is written
            (folder / TRAINER_STATE_NAME).unlink(missing_ok=True)
            shutil.rmtree(folder / DISTRIBUTED_FOLDER, ignore_errors=True)
            (folder / DISTRIBUTED_FOLDER).mkdir(parents=True, exist_ok=True)
        _barrier()
        limit = self.args.save_total_limit
        self._checkpoint = str(folder)
        try:
            if getattr(self.args, "async_save", False):
                self.args.save_total_limit = None  # the checkpoint before is needed until this one is whole
            super()._save_checkpoint(model, trial)
        finally:
            self._checkpoint, self.args.save_total_limit = None, limit

    def _finish_saving(self) -> None:
        """Wait for an asynchronous save, and delete what it makes superfluous. An error in it is raised here."""
        pending, self._pending = self._pending, None
        if pending is None:
            return
        pending.wait()
        if self.args.should_save:
            rotate_checkpoints(
                output_dir=str(pending.folder.parent.parent),
                save_total_limit=self.args.save_total_limit,
                best_model_checkpoint=self.state.best_model_checkpoint,
                use_mtime=True,
            )

    def _save(self, output_dir: str | None = None, state_dict: dict | None = None) -> None:
        if not self.is_distributed_loading_by_transformers or not isinstance(self.model, PreTrainedModel):
            return super()._save(output_dir, state_dict)
        in_checkpoint = self._checkpoint is not None and output_dir == self._checkpoint
        how = partial(_save_but_weights if in_checkpoint else save_expert_parallel, self.model)
        with _saving_with(self.model, how):
            super()._save(output_dir, state_dict)

    def _save_optimizer_and_scheduler(self, output_dir: str) -> None:
        if not self._writes_distributed:
            return super()._save_optimizer_and_scheduler(output_dir)
        model: Any = self.model
        scheduler: Any = self.lr_scheduler
        folder = Path(output_dir) / DISTRIBUTED_FOLDER
        in_background = getattr(self.args, "async_save", False)
        pending = save_distributed(model, self.optimizer, folder, async_save=in_background)
        self._pending = pending if in_background else None
        if self.args.should_save:
            torch.save(scheduler.state_dict(), Path(output_dir) / SCHEDULER_NAME)

    def _save_rng_state(self, output_dir: str) -> None:
        super()._save_rng_state(output_dir)
        if self._writes_distributed:
            _barrier()  # the first rank writes `trainer_state.json` next, which says that all is there

    def _push_from_checkpoint(self, checkpoint_folder: str) -> None:
        if self._writes_distributed and self.args.hub_strategy != HubStrategy.END:
            if self.args.hub_strategy != HubStrategy.EVERY_SAVE:
                self._finish_saving()  # the checkpoint itself is uploaded
            self._save(self.args.output_dir)
        super()._push_from_checkpoint(checkpoint_folder)

    def _finalize_training(self, *args: Any, **kwargs: Any) -> Any:
        self._finish_saving()
        return super()._finalize_training(*args, **kwargs)

    # ------------------------------------------------------------------ resuming

    def _load_from_checkpoint(self, resume_from_checkpoint: str, model: nn.Module | None = None) -> None:
        if not self._load_sharded(resume_from_checkpoint, self.model if model is None else model):
            super()._load_from_checkpoint(resume_from_checkpoint, model)

    def _load_best_model(self) -> None:
        if not self._load_sharded(self.state.best_model_checkpoint or "", self.model):
            super()._load_best_model()

    def _load_sharded(self, checkpoint: str, model: Any) -> bool:
        """Load weights, if the checkpoint or the model is sharded."""
        folder = Path(checkpoint) / DISTRIBUTED_FOLDER
        if folder.is_dir():
            load_distributed(self.accelerator.unwrap_model(model, keep_torch_compile=False), None, folder)
            return True
        if self.is_distributed_loading_by_transformers and isinstance(model, PreTrainedModel):
            load_hub_weights(model, checkpoint)
            return True
        return False

    def _load_optimizer_and_scheduler(self, checkpoint: str | None) -> None:
        model: Any = self.model
        optimizer: Any = self.optimizer
        scheduler: Any = self.lr_scheduler
        folder, file, of_scheduler = (
            Path(checkpoint or "") / name for name in (DISTRIBUTED_FOLDER, OPTIMIZER_NAME, SCHEDULER_NAME)
        )
        sharded = self.is_distributed_loading_by_transformers and file.is_file() and of_scheduler.is_file()
        if checkpoint is not None and folder.is_dir():
            load_optimizer(model, optimizer, folder)
        elif checkpoint is not None and sharded:
            load_whole_optimizer(model, optimizer, file, set(self.get_decay_parameter_names(model)))
        else:
            return super()._load_optimizer_and_scheduler(checkpoint)
        scheduler.load_state_dict(torch.load(of_scheduler, weights_only=True))
        for attribute, option in (("base_lrs", "initial_lr"), ("_last_lr", "lr")):  # the groups may be others now
            if isinstance(getattr(scheduler, attribute, None), list):
                setattr(scheduler, attribute, [group.get(option, group["lr"]) for group in optimizer.param_groups])

    def _load_rng_state(self, checkpoint: str | None) -> None:
        """See `Trainer`. A rank that was not there goes on from the first rank's state, with numbers of its own."""
        of_rank = f"rng_state_{self.args.process_index}.pth" if self.args.world_size > 1 else "rng_state.pth"
        others = [Path(checkpoint or "") / name for name in ("rng_state_0.pth", "rng_state.pth")]
        file = next((path for path in others if path.is_file()), None)
        if checkpoint is None or file is None or (Path(checkpoint) / of_rank).is_file():
            return super()._load_rng_state(checkpoint)
        load_rng_state(file, self.args.process_index)


def load_rng_state(file: Path, rank: int) -> None:
    """Python's, NumPy's and torch's random numbers from a file of the first rank; other ranks get others from there.

    Args:
        file: of `Trainer`.
        rank: of this process. The first goes on as it was.
    """
    from transformers.trainer_pt_utils import safe_globals

    with safe_globals():
        state = torch.load(file, weights_only=True)
    random.setstate(state["python"])
    np.random.set_state(state["numpy"])
    torch.random.set_rng_state(state["cpu"])
    if torch.cuda.is_available():
        set_rng_state_for_device("CUDA", torch.cuda, state, isinstance(state.get("cuda"), list))
    if rank:
        seed = int(torch.randint(2**31, ())) + rank
        random.seed(seed)
        np.random.seed(seed)
        torch.manual_seed(seed)


@torch.no_grad()
def load_whole_optimizer(model: nn.Module, optimizer: Any, file: Path, decayed: set[str]) -> None:
    """Load `optimizer.pt` of a training in one process (or DDP) into the optimizer of a sharded model.

    The file is mapped, not read: each rank reads its part.

    Args:
        model: as it is trained.
        optimizer: of its parameters, in `Trainer`'s groups.
        file: of `MoETrainer`.
        decayed: the names of parameters with weight decay.

    Raises:
        ValueError: the file is of other parameters.
    """
    saved = torch.load(file, map_location="cpu", mmap=True, weights_only=True)
    optimizer, orders = plain_optimizer(optimizer), expert_orders(model)
    held = optimized_parameters(model, optimizer)
    names = _names_in_file(model, list(held), saved["param_groups"], decayed)
    options = {names[i]: group_options(group) for group in saved["param_groups"] for i in group["params"]}
    set_group_options(optimizer, {parameter: name for name, (parameter, _) in held.items()}, options)
    for index, entries in saved["state"].items():
        name = names[index]
        parameter, _ = held[name]
        state = optimizer.state[parameter]
        for entry, value in entries.items():
            if isinstance(value, torch.Tensor) and value.dim() and value.shape != parameter.shape:
                raise ValueError(
                    f"{file}: {entry} of {name} is {list(value.shape)}, not {list(parameter.shape)}. Train as then."
                )
            if isinstance(value, torch.Tensor) and value.dim():
                state[entry] = torch.empty_like(parameter, dtype=value.dtype, requires_grad=False)
                Pieces(state[entry], orders.get(name)).copy_from(value)
            else:
                state[entry] = value.clone() if isinstance(value, torch.Tensor) else value


def _names_in_file(model: nn.Module, trained: list[str], groups: list[Mapping[str, Any]], decayed: set[str]) -> list[str]:
    """The parameters in the order in which `Trainer` has them in one process, and `split_groups` if parts have rates."""
    part_of = parts_of(model)
    in_order = [name for name, _ in model.named_parameters() if name in set(trained)]
    pair = [[n for n in in_order if n in decayed], [n for n in in_order if n not in decayed]]
    if any("part" in group for group in groups):
        split = [[n for n in names if part_of[n] == part] for part in PARTS for names in pair]
        pair = [names for names in split if names]
    if [len(names) for names in pair] != [len(group["params"]) for group in groups]:
        raise ValueError(
            f"{OPTIMIZER_NAME} has groups of other parameters. Train the parts, with the rates, that were trained."
        )
    return [name for names in pair for name in names]


@contextmanager
def _saving_is_ours(model: Any, args: TrainingArguments) -> Iterator[None]:
    """Inside, `Trainer` does not see that a sharded model is to be checkpointed, which it refuses when it is made."""
    before = args.save_only_model
    args.save_only_model = before or bool(getattr(model, "is_distributed_loading_by_transformers", False))
    try:
        yield
    finally:
        args.save_only_model = before


@contextmanager
def _saving_with(model: PreTrainedModel, how: Callable[..., None]) -> Iterator[None]:
    """Inside, `model.save_pretrained` is another."""
    vars(model)["save_pretrained"] = how
    try:
        yield
    finally:
        del vars(model)["save_pretrained"]


def _save_but_weights(model: PreTrainedModel, folder: str, is_main_process: bool = True, **kwargs: Any) -> None:
    if is_main_process:
        save_all_but_weights(model, folder)


def _barrier() -> None:
    if dist.is_initialized():
        dist.barrier()
