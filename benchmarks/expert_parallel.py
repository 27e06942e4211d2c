# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""The dispatchers of expert parallelism beside Transformers' `all_to_all`: rows, bytes, peak memory and time per step.

    python benchmarks/expert_parallel.py [--world 4] [--experts 64] [--top-k 8] [--json out.json]

Launches itself with so many processes (gloo, or NCCL where there is a GPU for each). A step is forward and backward of the
experts of one MoE layer; all dispatchers take turns, in an order that changes every round. Rows (there and back, forward and
backward) and bytes are what a rank sends to others, the mean over ranks, as counted at the collectives; "across" is the part
to other nodes, of `--ranks-per-node` consecutive ranks each (pretended, on one machine). Beside them stands what `hf-moe plan`
predicts. Memory is the peak of the busiest rank; ratios of times are medians over rounds. With the routing `one` all tokens
choose the same K experts. `capacity` drops the assignments that are over its capacity, the others none.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from hf_moe.training.dispatch_traffic import ExpertGroup, exchange_of_layer
from hf_moe.training.model_sizes import model_sizes
from hf_moe.training.plan_inputs import Workload
from torch import Tensor, nn
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard
from transformers.activations import ACT2FN
from transformers.distributed.expert_parallel import EpDispatchExpertsParallel, MoEParamShard

from hf_moe import MoEConfig
from hf_moe.dispatch_scope import DispatchScope, dispatching
from hf_moe.dispatchers import DISPATCHERS, ep_implementation
from hf_moe.exchange import count_traffic
from hf_moe.expert_sharding import UnevenExpertShard
from hf_moe.experts import Experts
from hf_moe.routing import Routing, apply_capacity, most_rows_per_expert

REFERENCE = "Transformers"
SIZES = {"world": 4, "ranks-per-node": 2, "experts": 64, "top-k": 8, "hidden": 128, "width": 64, "tokens": 512, "rounds": 5,
         "chunk-rows": 16384}  # fmt: skip
DTYPES = {"float32": "fp32", "bfloat16": "bf16"}


@dataclass
class Result:
    """Of one dispatcher and routing; bytes and rows are means over ranks, of one step."""

    routing: str
    dispatcher: str
    rows: float
    bytes: float
    bytes_across: float
    predicted: float
    predicted_across: float
    peak_bytes: float
    milliseconds: float
    ratio: float
    difference: float | None

    @property
    def off(self) -> float:
        """The prediction's relative error."""
        return self.predicted / self.bytes - 1 if self.bytes else 0.0


@dataclass
class Job:
    """One dispatcher with one routing.

    Attributes:
        step: forward and backward; returns the output.
    """

    routing: str
    dispatcher: str
    load: tuple[float, ...]
    step: Callable[[], Tensor]


def make_experts(args: argparse.Namespace, name: str, device: torch.device) -> nn.Module:
    """This rank's experts behind a dispatcher, as Transformers hangs it in; the same weights for each."""
    torch.manual_seed(0)
    config = MoEConfig(num_experts=args.experts, num_experts_per_tok=args.top_k)
    config._experts_implementation = "eager" if args.hidden % 8 or args.width % 8 else "grouped_mm"
    experts = Experts(
        config, args.experts, args.hidden, args.width, ACT2FN["silu"], allow_empty_slots=True, dtype=getattr(torch, args.dtype)
    ).to(device)
    experts.reset_parameters()
    ep_mesh = init_device_mesh(device.type, (args.world,), mesh_dim_names=("ep",))
    tp_mesh = init_device_mesh(device.type, (args.world, 1), mesh_dim_names=("dp", "tp"))["tp"]
    style = (MoEParamShard if name == REFERENCE else UnevenExpertShard)(Shard(0), shards_expert_dim=True)
    for parameter, _ in list(experts.named_parameters()):
        style.shard_param(experts, parameter, ep_mesh)
    settings = {"ranks_per_node": args.ranks_per_node, "chunk_rows": args.chunk_rows}
    how = "all_to_all" if name == REFERENCE else ep_implementation(name, **settings)
    return EpDispatchExpertsParallel().install_forward(experts, ep_mesh, tp_mesh=tp_mesh, ep_implementation=how)


def make_routing(args: argparse.Namespace, kind: str, device: torch.device) -> tuple[Tensor, tuple[float, ...]]:
    """Expert ids `[T, K]` of this rank's tokens, and each expert's share of the assignments."""
    if kind == "uniform":
        scores = torch.rand(args.tokens, args.experts, generator=torch.Generator().manual_seed(1 + dist.get_rank()))
        return scores.topk(args.top_k, dim=-1).indices.to(device), (1 / args.experts,) * args.experts
    ids = torch.arange(args.top_k, device=device).expand(args.tokens, -1).contiguous()
    return ids, tuple(1 / args.top_k if expert < args.top_k else 0.0 for expert in range(args.experts))


def make_job(args: argparse.Namespace, routing: str, name: str, experts: nn.Module, device: torch.device) -> Job:
    """A step of a dispatcher on this rank's tokens."""
    ids_TK, load = make_routing(args, routing, device)
    draw = torch.Generator().manual_seed(7 + dist.get_rank())
    x_TD, grad_TD = (torch.randn(args.tokens, args.hidden, generator=draw).to(device, experts.gate_up_proj.dtype) for _ in "xg")
    weights_TK = torch.rand(args.tokens, args.top_k, generator=draw).to(device)
    rows = None
    if name == "capacity":
        plan = apply_capacity(
            Routing.of(ids_TK, weights_TK, None), args.experts, args.capacity_factor, (1, args.tokens), None, "position"
        )
        ids_TK, weights_TK = plan.expert_ids_TK, plan.weights_TK
        rows = most_rows_per_expert(args.experts, args.capacity_factor, args.top_k, (1, args.tokens))

    def step() -> Tensor:
        x, weights = x_TD.clone().requires_grad_(), weights_TK.clone().requires_grad_()
        with dispatching(DispatchScope(rows_per_expert=rows)):
            y_TD = experts(x, ids_TK, weights)
        y_TD.backward(grad_TD)
        experts.zero_grad()
        return y_TD.detach()

    return Job(routing, name, load, step)


def measure(args: argparse.Namespace, jobs: list[Job], device: torch.device) -> list[Result]:
    """Bytes and memory of each job by itself, then times, interleaved."""
    measured, outputs = [], {}
    for job in jobs:
        outputs[job.routing, job.dispatcher] = job.step()
        with count_traffic(args.ranks_per_node) as traffic:
            job.step()
        sent = traffic.total
        measured.append([*_mean([sent.rows, sent.bytes, sent.bytes_across]), _largest(peak_bytes(job.step, device))])
    times: dict[tuple[str, str], list[float]] = {(job.routing, job.dispatcher): [] for job in jobs}
    for number in range(args.rounds):
        for job in jobs if number % 2 else jobs[::-1]:
            dist.barrier()
            started = time.perf_counter()
            job.step()
            if device.type == "cuda":
                torch.cuda.synchronize()
            times[job.routing, job.dispatcher].append(_largest(time.perf_counter() - started))
    results = []
    for job, (rows, sent_bytes, across, peak) in zip(jobs, measured, strict=True):
        mine, theirs = times[job.routing, job.dispatcher], times.get((job.routing, REFERENCE))
        reference = outputs.get((job.routing, REFERENCE))
        difference = None if reference is None else float((outputs[job.routing, job.dispatcher] - reference).abs().max())
        predicted = predict(args, job)
        results.append(Result(
            job.routing, job.dispatcher, rows, sent_bytes, across, *predicted, peak, 1e3 * statistics.median(mine),
            statistics.median(a / b for a, b in zip(mine, theirs, strict=True)) if theirs else float("nan"),
            None if job.dispatcher == "capacity" else difference,
        ))  # fmt: skip
    return results


def predict(args: argparse.Namespace, job: Job) -> tuple[float, float]:
    """What the planner expects for a layer and step: all bytes, and those to other nodes."""
    model = model_sizes(
        hidden=args.hidden, experts=args.experts, top_k=args.top_k, layers=1, expert_width=args.width,
        capacity_factor=args.capacity_factor,
    )  # fmt: skip
    work = Workload(
        tokens=args.tokens, sequence=args.tokens, precision=DTYPES[args.dtype], checkpointing=False, chunk_rows=args.chunk_rows
    )
    nodes = [rank // args.ranks_per_node for rank in range(args.world)]
    name = "all_to_all" if job.dispatcher == REFERENCE else job.dispatcher
    found = exchange_of_layer(name, ExpertGroup.of(args.experts, nodes, job.load), model, work)
    total = found.forward + found.backward
    return total.total, total.across


def peak_bytes(step: Callable[[], Any], device: torch.device) -> float:
    """Of the tensors that are alive at once during a step."""
    gc.collect()
    if device.type == "cuda":
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step()
        return float(torch.cuda.max_memory_allocated() - before)
    tracker = MemTracker()
    with tracker:
        step()
    return float(tracker.get_tracker_snapshot("peak")[device]["Total"])


def _mean(values: list[float]) -> list[float]:
    """Over ranks."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, values)
    return [statistics.fmean(column) for column in zip(*gathered, strict=True)]


def _largest(value: float) -> float:
    """Of any rank."""
    gathered: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(gathered, value)
    return max(gathered)


def table(results: list[Result]) -> str:
    """One line per routing and dispatcher."""
    head = [
        "routing",
        "dispatcher",
        "rows",
        "MB sent",
        "across",
        "predicted",
        "across",
        "off by",
        "peak MB",
        "ms",
        "ratio",
        "differs by",
    ]
    lines = [head]
    for result in results:
        numbers = [result.bytes, result.bytes_across, result.predicted, result.predicted_across]
        megabytes = [f"{number / 1e6:.3f}" for number in numbers]
        differs = "" if result.difference is None else f"{result.difference:.0e}"
        lines.append([
            result.routing, result.dispatcher, f"{result.rows:.0f}", *megabytes, f"{result.off:+.1%}",
            f"{result.peak_bytes / 1e6:.1f}", f"{result.milliseconds:.1f}", f"{result.ratio:.2f}", differs,
        ])  # fmt: skip
    widths = [max(len(line[i]) for line in lines) for i in range(len(head))]
    return "\n".join("  ".join(c.ljust(w) if i < 2 else c.rjust(w) for i, (c, w) in enumerate(zip(line, widths, strict=True)))
                     for line in lines)  # fmt: skip


def work(args: argparse.Namespace) -> None:
    """One of the processes."""
    torch.set_num_threads(1)
    on_gpu = torch.cuda.is_available() and torch.cuda.device_count() >= args.world
    device = torch.device("cuda", int(os.environ["LOCAL_RANK"])) if on_gpu else torch.device("cpu")
    if on_gpu:
        torch.cuda.set_device(device)
    dist.init_process_group("nccl" if on_gpu else "gloo")
    names = [name for name in args.dispatchers if name != REFERENCE or args.experts % args.world == 0]
    modules = {name: make_experts(args, name, device) for name in names}
    jobs = [make_job(args, routing, name, each, device) for routing in args.routings for name, each in modules.items()]
    results = measure(args, jobs, device)
    if dist.get_rank() == 0:
        print(
            f"{args.world} ranks ({device.type}), {args.ranks_per_node} per node; {args.experts} experts, top-{args.top_k}, "
            f"hidden {args.hidden}, width {args.width}, {args.tokens} tokens per rank, {args.dtype}; {args.rounds} rounds"
        )
        print(table(results), flush=True)
        if args.json:
            content = {"options": vars(args), "results": [{**asdict(result), "off": result.off} for result in results]}
            Path(args.json).write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
    dist.destroy_process_group()


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    for name, default in SIZES.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--capacity-factor", type=float, default=1.25)
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--dispatchers", nargs="+", choices=[REFERENCE, *DISPATCHERS], default=[REFERENCE, *DISPATCHERS])
    parser.add_argument("--routings", nargs="+", choices=["uniform", "one"], default=["uniform", "one"])
    parser.add_argument("--json", metavar="FILE", help="write all numbers there")
    return parser.parse_args()


def main() -> int:
    args = parse()
    if "RANK" in os.environ:
        work(args)
        return 0
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", str(args.world)]
    environment = {**os.environ, "OMP_NUM_THREADS": os.environ.get("OMP_NUM_THREADS", "1")}
    return subprocess.run([*launcher, __file__, *sys.argv[1:]], env=environment, check=False).returncode


if __name__ == "__main__":
    sys.exit(main())
