# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""`hf-moe plan`: which mesh and dispatcher for expert parallelism on machines that are not here.

    hf-moe plan --experts 64 --top-k 8 --hidden 4096 --nodes 16 --gpus 8
    hf-moe plan --model my-moe --nodes 2 --gpus 8 --across 25 --json plan.json
    hf-moe plan --model a-dense-model --experts 16 --top-k 2 --nodes 1 --gpus 8

Memory per GPU, bytes per optimizer step inside and across nodes, and time, for every mesh and dispatcher. Bytes count what a
GPU sends to others, the mean over GPUs; times are estimates from the numbers given.
"""

from __future__ import annotations

import argparse
import dataclasses
import json
import os
import sys
from pathlib import Path
from typing import Any, NoReturn

from .communication_plan import Plan, make_plans
from .dispatch_traffic import DISPATCHERS
from .model_sizes import ModelSizes, model_sizes, sizes_of_checkpoint
from .plan_inputs import GB, OPTIMIZER_STATES, PRECISIONS, Machine, Workload
from .plan_text import config_arguments, describe

# option, type, default, help
_Option = tuple[str, type, Any, str]
MODEL: list[_Option] = [
    ("--experts", int, None, "E, of each MoE layer; with --model of a dense model: of the MoE that it would become"),
    ("--top-k", int, None, "K, experts per token"),
    ("--hidden", int, None, "D"),
    ("--layers", int, 32, "decoder layers"),
    ("--expert-width", int, None, "F (default: 4·D / K, as many weights per token as in a dense model)"),
    ("--dense-layers", int, 0, "how many layers stay dense"),
    ("--intermediate", int, None, "width of the FFN of dense layers (default: 4·D)"),
    ("--shared-experts", int, None, "experts of width F that every token passes (default: 0, or the model's)"),
    ("--vocab", int, 32768, "rows of the embedding"),
    ("--heads", int, None, "attention heads (default: D / 128)"),
    ("--kv-heads", int, None, "heads of keys and values (default: 8)"),
    ("--head-dim", int, None, "size of a head (default: 128)"),
    ("--capacity-factor", float, None, "of the experts (default: none, dropless; or the model's)"),
]
MACHINE: list[_Option] = [
    ("--nodes", int, 1, "machines"),
    ("--gpus", int, 8, "GPUs of each"),
    ("--memory", float, 80.0, "GB of a GPU"),
    ("--usable", float, 0.9, "share of it that may be planned with; the rest is for the driver and fragmentation"),
    ("--inside", float, 450.0, "GB/s that a GPU sends to others of its node"),
    ("--across", float, 50.0, "GB/s that a GPU sends to other nodes"),
    ("--latency", float, 5.0, "µs per message of an all-to-all and step of a ring"),
    ("--tflops", float, 989.0, "peak of a GPU, 10¹² FLOP/s"),
    ("--efficiency", float, 0.4, "share of the peak that training reaches where it does not wait"),
]
WORK: list[_Option] = [
    ("--micro-batch", int, 1, "sequences per GPU"),
    ("--sequence", int, 4096, "tokens per sequence"),
    ("--accumulation", int, 1, "micro-batches per optimizer step"),
    ("--imbalance", float, 1.0, "rows of the busiest rank over the mean"),
    ("--chunk-rows", int, 16384, "chunked: most rows that a rank gets in a round"),
]
OF_MODEL = ("experts", "top_k", "expert_width", "shared_experts", "capacity_factor")  # that go with --model


class _Parser(argparse.ArgumentParser):
    """Errors in one line, and no option by its first letters."""

    def error(self, message: str) -> NoReturn:
        print(f"{self.prog}: {message}. See `{self.prog} --help`.", file=sys.stderr)
        sys.exit(2)


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status: 1 if nothing fits, 2 for wrong input."""
    arguments = _parser().parse_args(argv)
    try:
        model, machine, work = _model(arguments), _machine(arguments), _workload(arguments)
        work = dataclasses.replace(work, load=_load(arguments.routing, model)) if arguments.routing else work
        names = _dispatchers(arguments.dispatcher, model)
        plans = make_plans(model, machine, work, names)
        if arguments.json:
            _write_json(Path(arguments.json), model, machine, work, plans)
    except ValueError as error:
        print(f"hf-moe plan: {error}", file=sys.stderr)
        return 2
    print(describe(model, machine, work, plans, arguments.top))
    return 0 if plans and plans[0].fits else 1


def _parser() -> _Parser:
    parser = _Parser(
        prog="hf-moe plan", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    model = parser.add_argument_group("the model")
    model.add_argument("--model", metavar="PATH", help="folder of a MoE, or of a dense model with --experts; or a config.json")
    for group, options in ((model, MODEL), (parser.add_argument_group("the machines"), MACHINE),
                           (work := parser.add_argument_group("the training"), WORK)):  # fmt: skip
        for name, kind, default, text in options:
            shown = "" if default is None else f" (default: {default:g})"
            group.add_argument(name, type=kind, metavar="N", help=f"{text}{shown}".replace("%", "%%"))
    model.add_argument("--tied", action="store_true", help="the head is the embedding")
    model.add_argument("--no-gate", action="store_true", help="experts without a gate")
    work.add_argument(
        "--precision", choices=list(PRECISIONS), default="mixed", help="(default: mixed: fp32 weights, bf16 compute)"
    )
    work.add_argument("--optimizer", choices=list(OPTIMIZER_STATES), default="adamw", help="(default: adamw)")
    work.add_argument("--no-checkpointing", action="store_true", help="keep all activations")
    work.add_argument(
        "--routing", metavar="FILE", help="expert_load.safetensors of a training: its load instead of a uniform one"
    )
    work.add_argument("--dispatcher", nargs="+", metavar="NAME", help=f"only these: {', '.join(DISPATCHERS)}")
    parser.add_argument("--top", type=int, default=20, metavar="N", help="lines of the table (default: 20)")
    parser.add_argument("--json", metavar="FILE", help="write every plan there")
    return parser


def _values(arguments: argparse.Namespace, options: list[_Option]) -> dict[str, Any]:
    """What was given, or the default; numbers must be positive."""
    found = {}
    for flag, _, default, _ in options:
        name = flag.strip("-").replace("-", "_")
        value = getattr(arguments, name)
        if value is not None and not value > 0 and not (value == 0 and name in ("dense_layers", "shared_experts", "latency")):
            raise ValueError(f"`{flag}`={value:g} must be positive.")
        found[name] = default if value is None else value
    return found


def _model(arguments: argparse.Namespace) -> ModelSizes:
    values = _values(arguments, MODEL)
    if arguments.model is None:
        missing = [f"--{name.replace('_', '-')}" for name in ("experts", "top_k", "hidden") if values[name] is None]
        if missing:
            raise ValueError(f"`{missing[0]}` is missing. Give it, or a model: `--model PATH`.")
        values["shared_experts"] = values["shared_experts"] or 0
        return model_sizes(**values, tied=arguments.tied, gated=not arguments.no_gate)
    for flag in (*(flag for flag, *_ in MODEL), "--tied", "--no-gate"):
        name = flag.strip("-").replace("-", "_")
        if name not in OF_MODEL and getattr(arguments, name) not in (None, False):
            raise ValueError(f"`{flag}` is the model's own: leave it out with `--model`.")
    return sizes_of_checkpoint(arguments.model, **{name: getattr(arguments, name) for name in OF_MODEL})


def _machine(arguments: argparse.Namespace) -> Machine:
    values = _values(arguments, MACHINE)
    for name in ("usable", "efficiency"):
        if values[name] > 1:
            raise ValueError(f"`--{name}`={values[name]:g} is a share: give a number from 0 to 1.")
    return Machine(
        nodes=values["nodes"], gpus=values["gpus"], inside=values["inside"] * GB, across=values["across"] * GB,
        latency=values["latency"] * 1e-6, flops=values["tflops"] * 1e12 * values["efficiency"],
        memory=values["memory"] * GB * values["usable"],
    )  # fmt: skip


def _workload(arguments: argparse.Namespace) -> Workload:
    values = _values(arguments, WORK)
    if values["imbalance"] < 1:
        raise ValueError(f"`--imbalance`={values['imbalance']:g} is the busiest rank over the mean: give 1 or more.")
    if arguments.top < 1:
        raise ValueError(f"`--top`={arguments.top} must be positive.")
    return Workload(
        tokens=values["micro_batch"] * values["sequence"], sequence=values["sequence"], accumulation=values["accumulation"],
        precision=arguments.precision, optimizer=arguments.optimizer, checkpointing=not arguments.no_checkpointing,
        imbalance=values["imbalance"], chunk_rows=values["chunk_rows"],
    )  # fmt: skip


def _dispatchers(names: list[str] | None, model: ModelSizes) -> list[str] | None:
    for name in names or ():
        if name not in DISPATCHERS:
            raise ValueError(f"`--dispatcher`={name!r} is not known. Choose {', '.join(DISPATCHERS)}.")
        if name == "capacity" and model.capacity_factor is None:
            raise ValueError("`--dispatcher`='capacity' needs experts with a capacity: give `--capacity-factor`.")
    return names


def _load(path: str, model: ModelSizes) -> tuple[tuple[float, ...], ...]:
    """Of each MoE layer, each expert's share of the assignments in a training."""
    from hf_moe.expert_load import read_expert_load

    try:
        load = read_expert_load(path)
    except OSError as error:
        raise ValueError(
            f"`--routing`={path!r} cannot be read ({error.strerror}). Give a training's expert_load.safetensors."
        ) from error
    if tuple(load.num_experts) != model.num_experts:
        raise ValueError(
            f"`--routing`={path!r} is of {len(load.num_experts)} layers with {max(load.num_experts)} experts, the model has "
            f"{len(model.num_experts)} with {max(model.num_experts)}. Give the file of a training of this model."
        )
    if any(not sum(counts) for counts in load.totals()):
        raise ValueError(f"`--routing`={path!r} counts no tokens in some layer. Give the file of a longer training.")
    return tuple(tuple(count / sum(counts) for count in counts) for counts in load.totals())


def _write_json(path: Path, model: ModelSizes, machine: Machine, work: Workload, plans: list[Plan]) -> None:
    """Everything, in bytes and seconds."""
    content = {
        "model": {"parameters": model.total, "active": model.active, "hidden": model.hidden, "top_k": model.top_k,
                  "num_experts": list(model.num_experts)},
        "machine": vars(machine),
        "workload": vars(work),
        "plans": [
            {
                "config": config_arguments(plan, work), "mesh": vars(plan.mesh),
                "dispatcher": plan.dispatcher, "fits": plan.fits, "memory": {**vars(plan.memory), "total": plan.memory.total},
                "bytes_per_step": {name: vars(link) for name, link in plan.traffic.items()}, "seconds": plan.seconds,
                "seconds_in_turn": plan.seconds_in_turn, "compute": plan.compute, "exchange": plan.exchange,
                "sharding": plan.sharding, "exposed": plan.exposed,
            }
            for plan in plans
        ],
    }  # fmt: skip
    aside = path.with_name(f"{path.name}.new")
    try:
        aside.write_text(json.dumps(content, indent=2) + "\n", encoding="utf-8")
        os.replace(aside, path)
    except OSError as error:
        raise ValueError(f"`--json`={str(path)!r} cannot be written ({error.strerror}).") from error
