# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""What `hf-moe plan` prints: the meshes and dispatchers as tables, what does not fit and why, and what to choose."""

from __future__ import annotations

from collections.abc import Callable

from .communication_plan import Plan
from .model_sizes import ModelSizes
from .plan_inputs import GB, Machine, Mesh, Workload

# `ExpertParallelConfig`'s fields, as options of `hf-moe train`
FLAGS = {
    "ep_size": "--expert_parallel_size",
    "dispatcher": "--expert_parallel_dispatcher",
    "dense": "--expert_parallel_dense",
    "dp_replicate_size": "--expert_parallel_nodes",
    "chunk_rows": "--expert_parallel_chunk_rows",
    "mixed_precision": "--expert_parallel_mixed_precision",
}


def describe(model: ModelSizes, machine: Machine, work: Workload, plans: list[Plan], top: int) -> str:
    """The whole text: what is planned, the meshes, what does not fit, and the recommendation."""
    fitting = [plan for plan in plans if plan.fits]
    too_large = _best_of_meshes([plan for plan in plans if not plan.fits])
    kept = ", gradient checkpointing" if work.checkpointing else ""
    lines = [
        f"{model.total / 1e9:.3g} G parameters, {model.active / 1e9:.3g} G of them for each token; {machine.nodes} × "
        f"{machine.gpus} GPUs of {_gb(machine.memory)} usable GB; per GPU and step {work.accumulation} × {work.tokens} "
        f"tokens; {work.precision}, {work.optimizer}{kept}",
        "",
    ]
    if fitting:
        best = _best_of_meshes(fitting)
        lines += ["Meshes, each with its fastest dispatcher:", *_table(best[:top], work)]
        lines += [f"… and {len(best) - top} more meshes that fit (--top, --json)"] if len(best) > top else []
        of_best = [plan for plan in fitting if plan.mesh == fitting[0].mesh]
        if len(of_best) > 1:
            lines += ["", "Dispatchers on the first of them:", *_table(of_best, work)]
        lines += ["", *LEGEND, ""]
    if too_large:
        lines += [f"{len(too_large)} meshes do not fit:", *_why_not(too_large, top), ""]
    if fitting:
        return "\n".join([*lines, *_recommendation(fitting, work)])
    least = min(plans, key=lambda plan: plan.memory.total)
    lines.append(
        f"Nothing fits: {_name(least)} needs {_gb(least.memory.total)} GB, most of it {_largest(least)}. "
        "Take more GPUs, or a smaller `--micro-batch` or `--sequence`."
    )
    return "\n".join(lines)


def _best_of_meshes(plans: list[Plan]) -> list[Plan]:
    """The first plan of each mesh."""
    best: dict[Mesh, Plan] = {}
    for plan in plans:
        best.setdefault(plan.mesh, plan)
    return list(best.values())


# heading: what stands below it; bytes are GB per GPU and step
COLUMNS: dict[str, Callable[[Plan, Workload], str]] = {
    "dense": lambda plan, _: _dense(plan),
    "ep": lambda plan, _: str(plan.mesh.ep),
    "copies": lambda plan, _: f"{plan.mesh.expert_replicas} × {plan.mesh.efsdp}",
    "dispatcher": lambda plan, _: plan.dispatcher,
    "memory": lambda plan, _: _gb(plan.memory.total),
    "dispatch": lambda plan, _: _gb(plan.dispatched.total),
    "of it across": lambda plan, _: _gb(plan.dispatched.across),
    "sharding": lambda plan, _: _gb(plan.sharded.total),
    "of that across": lambda plan, _: _gb(plan.sharded.across),
    "step": lambda plan, _: _time(plan.seconds),
    "waits": lambda plan, _: f"{plan.exposed / plan.seconds:.0%}",
    "in turn": lambda plan, _: f"{1 - plan.compute / plan.seconds_in_turn:.0%}",
    "tokens/s": lambda plan, work: f"{work.tokens * work.accumulation / plan.seconds:.0f}",
}
LEGEND = [
    "copies: replicas × FSDP shards of the experts. memory: GB per GPU. dispatch: GB that a GPU sends per step in dispatch and",
    "combine; sharding: in FSDP2's collectives; across: of these to other nodes. waits: share of the step in communication",
    "that nothing hides; in turn: if nothing overlapped. tokens/s: per GPU.",
]


def _table(plans: list[Plan], work: Workload) -> list[str]:
    """One line per plan."""
    rows = [list(COLUMNS), *([cell(plan, work) for cell in COLUMNS.values()] for plan in plans)]
    widths = [max(len(row[i]) for row in rows) for i in range(len(COLUMNS))]
    rows.insert(1, ["-" * width for width in widths])
    left = [name in ("dense", "dispatcher") for name in COLUMNS]
    return [
        "  ".join(cell.ljust(w) if to_left else cell.rjust(w) for cell, w, to_left in zip(row, widths, left, strict=True))
        for row in rows
    ]


def _why_not(plans: list[Plan], top: int) -> list[str]:
    """What each mesh needs, and the most of it."""
    plans = sorted(plans, key=lambda plan: plan.memory.total)
    lines = [f"  ep {p.mesh.ep}, dense {_dense(p)}: {_gb(p.memory.total)} GB, most of it {_largest(p)}" for p in plans]
    return lines[:top] + ([f"  … and {len(lines) - top} more"] if len(lines) > top else [])


def _recommendation(plans: list[Plan], work: Workload) -> list[str]:
    best = plans[0]
    arguments = config_arguments(best, work)
    written = ", ".join(f"{name}={value!r}" for name, value in arguments.items())
    lines = [
        f"Recommended: {_name(best)}: {_time(best.seconds)} per step, {_gb(best.memory.total)} GB. It is the fastest of the "
        f"{len(plans)} plans that fit; among equally fast ones, it needs the least memory."
    ]
    same = next((plan for plan in plans[1:] if plan.mesh == best.mesh), None)
    other = next((plan for plan in plans[1:] if plan.mesh != best.mesh), None)
    if other is not None:
        lines.append(f"  The next mesh ({_name(other)}) {_compared(other, best)}.")
    if same is not None:
        lines.append(f"  On the same mesh, {same.dispatcher} {_compared(same, best)}.")
    return [*lines, f"  ExpertParallelConfig({written})", f"  hf-moe train … {_flags(arguments)}"]


def config_arguments(plan: Plan, work: Workload) -> dict[str, object]:
    """Fields of `ExpertParallelConfig`, those with other values than its defaults."""
    arguments = plan.mesh.arguments(plan.dispatcher, work.chunk_rows)
    return {**arguments, "mixed_precision": True} if work.precision == "mixed" else arguments


def _compared(plan: Plan, best: Plan) -> str:
    slower = plan.seconds / best.seconds - 1
    time = f"takes {slower:.1%} longer" if slower >= 0.0005 else "takes as long"
    return (
        f"{time}: {_gb(plan.sent.total)} GB sent rather than {_gb(best.sent.total)}, "
        f"{_gb(plan.sent.across)} rather than {_gb(best.sent.across)} across nodes, {_gb(plan.memory.total)} GB of memory"
    )


def _flags(arguments: dict[str, object]) -> str:
    return " ".join(f"{FLAGS[name]} {value}" for name, value in arguments.items())


def _dense(plan: Plan) -> str:
    return f"hybrid {plan.mesh.dp_replicate} × {plan.mesh.fsdp}" if plan.mesh.dense == "hybrid" else plan.mesh.dense


def _name(plan: Plan) -> str:
    return f"ep {plan.mesh.ep}, dense {_dense(plan)}" + (f", {plan.dispatcher}" if plan.mesh.ep > 1 else "")


def _largest(plan: Plan) -> str:
    parts = vars(plan.memory)
    name = max(parts, key=lambda part: parts[part])
    titles = {"optimizer": "optimizer state", "gathered": "gathered parameters", "dispatch": "dispatch buffers"}
    return f"{titles.get(name, name)} ({_gb(parts[name])} GB)"


def _gb(nbytes: float) -> str:
    """Three digits."""
    value = nbytes / GB
    return "0" if not value else f"{value:.3g}" if value < 100 else f"{value:.0f}"


def _time(seconds: float) -> str:
    """Three digits."""
    unit, size = next(((u, s) for u, s in (("s", 1.0), ("ms", 1e-3)) if seconds >= s), ("µs", 1e-6))
    return f"{seconds / size:.3g} {unit}" if seconds < 1000 else f"{seconds:.0f} s"
