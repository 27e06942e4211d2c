"""Counts, losses and biases do not depend on how the work was spread: 1, 2 and 4 gloo ranks, DDP, FSDP2, expert parallelism,
gradient accumulation, gradient checkpointing; our model and a native one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from ranks import launch
from trainer_cut import sequences

TOP_K, LAYERS, STEPS_PER_LOG = 2, 3, 2
ASSIGNMENTS = sum(len(row["input_ids"]) for row in sequences()) * TOP_K * STEPS_PER_LOG
SIGMOID = {"router_type": "sigmoid", "router_bias_update_speed": 0.25}
CAPACITY = {"router_type": "top_k", "capacity_factor": 0.6}
NATIVE_FORM = {"router_type": "top_k", "norm_topk_prob": True}


def job(mode: str, kind: str, accumulation: int, checkpointing: bool = False) -> dict[str, Any]:
    fields = {"sigmoid": SIGMOID, "capacity": CAPACITY, "native": NATIVE_FORM}[kind]
    options = {"gradient_checkpointing": checkpointing, "gradient_checkpointing_kwargs": {"use_reentrant": False}}
    name = f"{mode}-{kind}-{accumulation}-{checkpointing}"
    return {"name": name, "mode": mode, "native": kind == "native", "accumulation": accumulation, "fields": fields,
            "options": options if checkpointing else {}}  # fmt: skip


ALONE = [job("ddp", kind, 1) for kind in ("sigmoid", "capacity", "native")]
JOBS = {
    1: [job("ddp", "sigmoid", 4, True), job("ddp", "capacity", 2), job("ddp", "native", 2, True)],
    2: [
        job("ddp", "sigmoid", 2), job("fsdp2", "capacity", 1, True), job("ep", "sigmoid", 2),
        job("ep", "native", 1), job("fsdp2", "native", 2), job("ddp", "native", 1, True),
    ],
    4: [
        job("ddp", "capacity", 2, True), job("fsdp2", "sigmoid", 1), job("ep", "sigmoid", 1, True),
        job("ddp", "native", 2), job("ep", "native", 2),
    ],
}  # fmt: skip


def results(folder: Path, jobs: list[dict[str, Any]], world: int) -> dict[str, list[dict[str, Any]]]:
    """What each rank says of each job."""
    launch(world, "counts_worker.py", folder, json.dumps(jobs))
    return {
        each["name"]: [json.loads((folder / f"{each['name']}.{rank}.json").read_text()) for rank in range(world)]
        for each in jobs
    }


@pytest.fixture(scope="module")
def alone(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    """The whole batch in one forward of one process, by kind."""
    found = results(tmp_path_factory.mktemp("alone"), ALONE, 1)
    return {name.split("-")[1]: ranks[0] for name, ranks in found.items()}


@pytest.mark.parametrize("world", JOBS)
def test_however_it_is_cut(tmp_path: Path, alone: dict[str, dict[str, Any]], world: int) -> None:
    for name, ranks in results(tmp_path, JOBS[world], world).items():
        kind, expected = name.split("-")[1], alone[name.split("-")[1]]
        first = ranks[0]
        assert first["steps"] == [2, 4], name
        for log, executed in zip(first["logs"], first["executed"], strict=True):
            for index, layer in enumerate(executed):
                wanted = ASSIGNMENTS * (1 - log[f"moe/layer_{index}/drop_rate"])
                assert sum(layer) == pytest.approx(wanted, abs=1e-6), name
                assert (sum(layer) < ASSIGNMENTS) == (kind == "capacity"), name
        assert first["executed"][0] == expected["executed"][0], name  # later steps may differ by rounding at near-ties
        moved = sum(
            abs(a - b)
            for got, ours in zip(first["executed"][1], expected["executed"][1], strict=True)
            for a, b in zip(got, ours, strict=True)
        )
        assert moved <= 8, name
        for rank in ranks:  # each rank logs the same, and moves its biases alike
            assert rank["logs"] == first["logs"] or _close(rank["logs"], first["logs"]), name
            assert rank["biases"] == first["biases"], name
        exact = {"moe/lm_loss", "moe/load_cv", "moe/importance_cv", "moe/router_entropy", "moe/z_loss", "loss"}
        if kind != "native":  # whose router losses are those of micro-batches
            exact |= {"moe/aux_loss", "moe/importance_loss"}
        for key in exact:
            assert first["logs"][0][key] == pytest.approx(expected["logs"][0][key], rel=2e-3), (name, key)


def _close(one: list[dict], other: list[dict]) -> bool:
    """Equal but for what each rank measures for itself."""
    own = {"moe/tflops_per_device", "moe/mfu"}
    return [{k: v for k, v in row.items() if k not in own} for row in one] == [
        {k: v for k, v in row.items() if k not in own} for row in other
    ]
