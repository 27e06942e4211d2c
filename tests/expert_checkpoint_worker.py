"""Runs of several ranks on one machine: forked from one process, so that nothing is imported twice.

`expert_checkpoint_worker.py FOLDER JOBS` runs the jobs one after the other, each on ranks of its own, where JOBS is a JSON list
of {"name", "run": name of a function of this file, "world", …}. Rank r leaves FOLDER/NAME.r.json.
"""

from __future__ import annotations

import hashlib
import json
import os
import signal
import sys
import time
import traceback
import weakref
from functools import partial
from itertools import groupby
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from accelerate.state import AcceleratorState, GradientState, PartialState
from families import text_config
from hf_moe.training import MoETrainer, MoETrainingArguments
from ranks import end_after
from torch import Tensor
from torch.distributed.checkpoint import FileSystemWriter
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from trainer_cut import collate, sequences
from transformers import MixtralConfig, MixtralForCausalLM, TrainerState

from hf_moe import MoEConfig, MoEForCausalLM
from hf_moe.expert_checkpoint import load_distributed, missing_part, save_distributed, save_expert_parallel
from hf_moe.expert_parallel import load_expert_parallel
from hf_moe.pretrained_moe import MoEPreTrainedModel
from hf_moe.tensor_pieces import Pieces, expert_orders, gather_to_first, model_tensors, placements

MODELS: dict[str, dict[str, Any]] = {
    "plain": {"num_experts": 4},
    "uneven": {"num_experts": 6, "router_type": "sigmoid", "router_bias_update_speed": 0.01},
    "seven": {
        "num_experts": 7, "router_type": "sigmoid", "router_bias_update_speed": 0.01, "num_shared_experts": 1,
        "text": {"num_hidden_layers": 1},
    },
    "tied": {"num_experts": 8, "text": {"tie_word_embeddings": True}},
}  # fmt: skip


def build(kind: str) -> Any:
    torch.manual_seed(0)
    if kind == "mixtral":
        config = MixtralConfig(
            vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
            num_key_value_heads=4, num_local_experts=4, num_experts_per_tok=2, initializer_range=0.2,
        )  # fmt: skip
        return MixtralForCausalLM(config)
    fields = dict(MODELS[kind])
    text = text_config("llama", **{"initializer_range": 0.2, "num_hidden_layers": 2, **fields.pop("text", {})})
    return MoEForCausalLM(MoEConfig(text_config=text, **fields))


def spread(folder: Path, kind: str, world: int, ep: int, **how: Any) -> Any:
    """The model of a kind, with its experts over `ep` of `world` ranks; plain in one process."""
    source = folder / f"model-{kind}"
    if world == 1:
        return type(build(kind)).from_pretrained(source)
    return load_expert_parallel(source, ep_size=ep, quiet=True, **{"dispatcher": "all_to_all", **how})


# ---------------------------------------------------------------------- round trips


def of_name(name: str, like: Tensor) -> Tensor:
    """A whole tensor that only its name decides."""
    seed = int.from_bytes(hashlib.sha256(name.encode()).digest()[:4], "little")
    return torch.rand(tuple(like.shape), generator=torch.Generator().manual_seed(seed)).to(like.dtype)


def optimizer_of(model: Any, kind: str) -> torch.optim.Optimizer:
    """Groups by mesh, as they have to be, and within them by name, so that they are others at every parallelism."""
    groups: dict[Any, list[Any]] = {}
    for name, parameter in model.named_parameters():
        if parameter.requires_grad:
            rate = 1e-3 if "experts" in name else 2e-3 if ".gate." in name else 3e-3
            groups.setdefault((rate, str(getattr(parameter, "device_mesh", None))), []).append(parameter)
    given = [{"params": parameters, "lr": rate, "part": f"of {rate}"} for (rate, _), parameters in groups.items()]
    return torch.optim.AdamW(given) if kind == "adamw" else torch.optim.SGD(given, momentum=0.9 if kind == "momentum" else 0)


def state_of(model: Any, optimizer: Any) -> dict[str, Tensor]:
    names = {id(parameter): name for name, parameter in model_tensors(model).items()}
    return {
        f"{names[id(parameter)]}/{entry}": value
        for parameter, state in optimizer.state.items()
        for entry, value in state.items()
    }


def digests(model: Any, optimizer: Any) -> dict[str, str]:
    """Of every tensor, brought together on the first rank."""
    orders, found = expert_orders(model), {}
    for name, tensor in {**model_tensors(model), **state_of(model, optimizer)}.items():
        whole = gather_to_first(tensor, orders.get(name.partition("/")[0]))
        if whole is not None:
            found[name] = digest(whole)
    return found


def digest(whole: Tensor) -> str:
    return (
        f"{whole.dtype} {list(whole.shape)} {hashlib.sha256(whole.contiguous().view(-1).view(torch.uint8).numpy()).hexdigest()}"
    )


def placement(model: Any) -> list[list[int]]:
    return [slots.tolist() for slots in placements(model).values()]


def move_experts(model: Any) -> None:
    """Experts somewhere else, as a placement would have it, with nothing moved yet."""
    for index, module in enumerate(module for module in model.modules() if hasattr(module, "num_global_experts")):
        generator = torch.Generator().manual_seed(index)
        module.slot_of_expert = torch.randperm(module.num_global_experts, generator=generator)


def save(folder: Path, job: dict[str, Any]) -> Any:
    """A model and an optimizer whose values come from their names, saved."""
    model = spread(folder, job["kind"], job["world"], job["ep"], **job.get("how", {}))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "q_proj" not in name  # some are frozen
    if job.get("moved"):
        move_experts(model)
    optimizer = optimizer_of(model, job["optimizer"])
    for parameter in model.parameters():
        parameter.grad = torch.zeros_like(parameter) if parameter.requires_grad else None
    optimizer.step()
    orders = expert_orders(model)
    for name, tensor in {**model_tensors(model), **state_of(model, optimizer)}.items():
        Pieces(tensor, orders.get(name.partition("/")[0])).copy_from(of_name(name, tensor))
    before = digests(model, optimizer)
    with Peak() as peak:
        pending = save_distributed(model, optimizer, folder / job["name"], async_save=job.get("async", False))
    for parameter in model.parameters():  # training goes on
        parameter.detach().zero_()
    pending.wait()
    total = sum(tensor.nbytes for tensor in model_tensors(model).values())
    return {"digests": before, "peak": peak.largest, "total": total, "placement": placement(model)}


def load(folder: Path, job: dict[str, Any]) -> Any:
    model = spread(folder, job["kind"], job["world"], job["ep"], **job.get("how", {}))
    for name, parameter in model.named_parameters():
        parameter.requires_grad = "q_proj" not in name
    if job.get("moved"):
        move_experts(model)
    optimizer = optimizer_of(model, job["optimizer"])
    for group in optimizer.param_groups:
        group["lr"] = group["part"] = None
    with Peak() as peak:
        load_distributed(model, optimizer, folder / job["of"])
    rates = sorted({(group["lr"], group["part"]) for group in optimizer.param_groups})
    return {"digests": digests(model, optimizer), "rates": rates, "peak": peak.largest, "placement": placement(model)}


class Peak(TorchDispatchMode):
    """The largest tensor that is made inside, and the most bytes that such tensors have at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.largest = self.live = self.most = 0
        self._known: set[int] = set()

    def __torch_dispatch__(self, function: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        result = function(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if isinstance(tensor, Tensor) and tensor.device.type != "meta" and type(tensor) is Tensor:
                storage = tensor.untyped_storage()
                if storage._cdata not in given | self._known:
                    self._add(storage)
        return result

    def _add(self, storage: Any) -> None:
        key, size = storage._cdata, storage.nbytes()
        self._known.add(key)
        self.largest, self.live = max(self.largest, size), self.live + size
        self.most = max(self.most, self.live)
        weakref.finalize(storage, self._drop, key, size)

    def _drop(self, key: int, size: int) -> None:
        self._known.discard(key)
        self.live -= size


# ---------------------------------------------------------------------- Hub checkpoints


def hub(folder: Path, job: dict[str, Any]) -> Any:
    model = spread(folder, job["kind"], job["world"], job["ep"], **job.get("how", {}))
    if job.get("moved"):
        plain = model_tensors(spread(folder, job["kind"], 1, 1))
        move_experts(model)
        for name, tensor in model_tensors(model).items():
            Pieces(tensor, expert_orders(model).get(name)).copy_from(plain[name])
    with Peak() as peak:
        save = model.save_pretrained if isinstance(model, MoEPreTrainedModel) else partial(save_expert_parallel, model)
        save(folder / job["name"], max_shard_size=job.get("shard", "50GB"))
    return {"largest": peak.largest, "most": peak.most, "class": type(model).__name__}


def fail(folder: Path, job: dict[str, Any]) -> Any:
    """An asynchronous save in which one rank cannot write: what each rank is told, and when."""
    model = spread(folder, job["kind"], job["world"], job["ep"])

    def full(*args: Any, **kwargs: Any) -> None:
        raise OSError("the disk is full")

    write = FileSystemWriter.write_data
    if dist.get_rank() == 1:
        FileSystemWriter.write_data = full
    pending = save_distributed(model, None, folder / job["name"], async_save=True)
    try:
        pending.wait()
        message = ""
    except BaseException as error:
        message = str(error)
    FileSystemWriter.write_data = write
    return {"message": message, "missing": missing_part(folder / job["name"])}


# ---------------------------------------------------------------------- trainings


def trainer_of(folder: Path, job: dict[str, Any]) -> MoETrainer:
    world = job["world"]
    model = spread(folder, job["kind"], world, job["ep"], **job.get("how", {}))
    options: dict[str, Any] = {
        "output_dir": str(folder / job.get("output", job["name"])), "use_cpu": True, "max_steps": 4, "save_steps": 2,
        "logging_steps": 1, "report_to": "none", "disable_tqdm": True, "learning_rate": 1e-2, "router_learning_rate": 3e-3,
        "weight_decay": 0.1, "per_device_train_batch_size": 4 // world, "per_device_eval_batch_size": 3,
    }  # fmt: skip
    options |= {"ddp_backend": "gloo"} if world > 1 else {}
    args = MoETrainingArguments(**{**options, **job.get("options", {})})
    rows = sequences()
    return MoETrainer(model, args, train_dataset=rows, eval_dataset=rows[:7], data_collator=collate)


def train(folder: Path, job: dict[str, Any]) -> Any:
    """What was logged, and the model's tensors at the end."""
    trainer = trainer_of(folder, job)
    if "stop_at" in job:
        STOPS[job["stop_at"]](folder / f"{job['name']}.stopped")
    if job.get("evaluate_first"):
        trainer.evaluate()
    resume = job.get("resume")
    trainer.train(resume_from_checkpoint=str(folder / resume) if isinstance(resume, str) else resume)
    if job.get("save_model"):
        trainer.save_model()
    after = trainer.evaluate()["eval_loss"] if job.get("evaluate_last") else None
    names = ("loss", "grad_norm", "learning_rate", "lr/router", "eval_loss", "eval_perplexity", "eval_tokens")
    rows = [{k: v for k, v in row.items() if k in (*names, "step")} for row in trainer.state.log_history]
    state = trainer.state
    return {"rows": rows, "digests": digests(trainer.model, trainer.optimizer), "flos": state.total_flos, "after": after,
            "best": [state.best_metric, state.best_global_step]}  # fmt: skip


def wait_to_be_killed(marker: Path) -> None:
    marker.write_text("")
    time.sleep(600)


def second_call(owner: Any, name: str, instead: Any) -> None:
    """Have `instead(original, …)` called the second time in place of a method."""
    original, calls = getattr(owner, name), [0]

    def method(*args: Any, **kwargs: Any) -> Any:
        calls[0] += 1
        return instead(original, *args, **kwargs) if calls[0] == 2 else original(*args, **kwargs)

    setattr(owner, name, method)


def stop_before_data(marker: Path) -> None:
    """One rank has not written its part of the second checkpoint."""
    if dist.get_rank() == 1:
        second_call(FileSystemWriter, "write_data", lambda *args, **kwargs: wait_to_be_killed(marker))


def stop_before_metadata(marker: Path) -> None:
    """All ranks have written their part."""
    second_call(FileSystemWriter, "finish", lambda *args, **kwargs: wait_to_be_killed(marker))


def stop_in_state(marker: Path) -> None:
    """The last file of the second checkpoint is half written."""

    def half(original: Any, state: Any, path: str) -> None:
        original(state, path)
        Path(path).write_text(Path(path).read_text()[:200])
        wait_to_be_killed(marker)

    second_call(TrainerState, "save_to_json", half)


STOPS = {"data": stop_before_data, "metadata": stop_before_metadata, "state": stop_in_state}


# ---------------------------------------------------------------------- processes


def rank_main(folder: Path, jobs: list[dict[str, Any]], rank: int, meeting: Path) -> None:
    """The jobs of one rank."""
    world = jobs[0]["world"]
    torch.set_num_threads(1)
    for state in (PartialState, AcceleratorState, GradientState):
        state._reset_state()
    if world > 1:
        os.environ.update(RANK=str(rank), LOCAL_RANK=str(rank), WORLD_SIZE=str(world), LOCAL_WORLD_SIZE=str(world))
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT="29500")
        dist.init_process_group("gloo", init_method=f"file://{meeting}", rank=rank, world_size=world)
    for job in jobs:
        result = globals()[job["run"]](folder, job)
        (folder / f"{job['name']}.{rank}.json").write_text(json.dumps(result))
        if world > 1:
            dist.barrier()
    if world > 1:
        dist.destroy_process_group()


def start(folder: Path, jobs: list[dict[str, Any]]) -> list[int]:
    """Fork the ranks of jobs."""
    ranks, meeting = [], folder / f".{jobs[0]['name']}.{time.time_ns()}"
    for rank in range(jobs[0]["world"]):
        child = os.fork()
        if child == 0:
            code = 1
            end_after(300)
            try:
                rank_main(folder, jobs, rank, meeting)
                code = 0
            except BaseException:
                traceback.print_exc()
            finally:
                sys.stdout.flush()
                sys.stderr.flush()
                os._exit(code)
        ranks.append(child)
    return ranks


def finish(ranks: list[int], seconds: float = 240) -> list[int]:
    """Exit codes of the ranks. When one fails, or time is up, the others are killed."""
    codes: dict[int, int] = {}
    end = time.monotonic() + seconds
    while len(codes) < len(ranks):
        for rank in set(ranks) - codes.keys():
            pid, status = os.waitpid(rank, os.WNOHANG)
            if pid:
                codes[rank] = os.waitstatus_to_exitcode(status)
        if time.monotonic() > end or any(codes.values()):
            kill([rank for rank in ranks if rank not in codes])
        time.sleep(0.005)
    return [codes[rank] for rank in ranks]


def kill(ranks: list[int]) -> None:
    for rank in ranks:
        os.kill(rank, signal.SIGKILL)


def run(folder: Path, jobs: list[dict[str, Any]]) -> None:
    """Jobs of one number of ranks. One that is to be killed is alone."""
    began = time.monotonic()
    ranks = start(folder, jobs)
    to_be_killed = "stop_at" in jobs[0]
    if to_be_killed:
        marker = folder / f"{jobs[0]['name']}.stopped"
        while not marker.exists() and time.monotonic() < began + 60:
            time.sleep(0.01)
        kill(ranks)
        assert marker.exists(), jobs
    codes = finish(ranks)
    assert all(codes) if to_be_killed else not any(codes), (jobs, codes)
    print(f"{', '.join(job['name'] for job in jobs)}: {time.monotonic() - began:.1f} s", flush=True)


if __name__ == "__main__":
    target = Path(sys.argv[1])
    for kind in (*MODELS, "mixtral"):
        build(kind).save_pretrained(target / f"model-{kind}")
    for _, together in groupby(json.loads(sys.argv[2]), key=lambda job: (job["world"], job.get("stop_at") and job["name"])):
        run(target, list(together))
