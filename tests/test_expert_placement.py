"""Experts that change places between gloo ranks: the plan, the move, and the callback that makes it."""

from __future__ import annotations

import itertools
import json
from pathlib import Path
from typing import Any

import pytest
import torch
from hf_moe.training.placement import ExpertPlacementCallback, _packed, _restored
from hypothesis import given, settings
from hypothesis import strategies as st
from ranks import launch
from tiny import tiny
from trainer_cut import collate, sequences
from transformers import Trainer, TrainingArguments

from hf_moe.expert_placement import current_placement, max_over_mean, move_experts, plan_placement, unplaced

# ---------------------------------------------------------------------- the plan


@st.composite
def problems(draw: st.DrawFn) -> tuple[list[float], int, int, list[int]]:
    """Loads, slots per rank, ranks, and where the experts lie."""
    ranks = draw(st.integers(1, 6))
    num_experts = draw(st.integers(1, 14))
    load = st.one_of(st.integers(0, 50), st.floats(0, 1e6, allow_subnormal=False))
    loads = draw(st.lists(load, min_size=num_experts, max_size=num_experts))
    return loads, -(-num_experts // ranks), ranks, draw(st.permutations(range(num_experts)))


def rank_loads(loads: list[float], slots: list[int], per_rank: int, ranks: int) -> list[float]:
    found = [0.0] * ranks
    for load, slot in zip(loads, slots, strict=True):
        found[slot // per_rank] += load
    return found


@settings(deadline=None, max_examples=200)
@given(problems())
def test_a_plan_is_valid_and_no_worse(problem: tuple[list[float], int, int, list[int]]) -> None:
    loads, per_rank, ranks, current = problem
    plan = plan_placement(loads, per_rank, ranks, current)
    assert sorted(plan.new_slots) == list(range(len(loads)))  # so no rank has more than its slots
    before, after = (max_over_mean(rank_loads(loads, slots, per_rank, ranks)) for slots in (current, plan.new_slots))
    assert plan.before == pytest.approx(before)
    assert plan.after == pytest.approx(after)
    assert after <= before * (1 + 1e-9)
    changed = [one // per_rank != other // per_rank for one, other in zip(current, plan.new_slots, strict=True)]
    assert plan.moved == sum(changed)
    stay = [one == other for one, other, moves in zip(current, plan.new_slots, changed, strict=True) if not moves]
    assert all(stay)  # within a rank nothing is moved
    assert plan_placement(loads, per_rank, ranks, plan.new_slots).after <= after * (1 + 1e-9)


@settings(deadline=None, max_examples=60)
@given(st.lists(st.integers(0, 20), min_size=6, max_size=6), st.sampled_from([(3, 2), (2, 3), (2, 4)]))
def test_a_plan_is_close_to_the_best_there_is(loads: list[int], shape: tuple[int, int]) -> None:
    """The best of all permutations, by trying them."""
    per_rank, ranks = shape
    plan = plan_placement(loads, per_rank, ranks, tolerance=0.0)
    best = min(max(rank_loads(loads, list(slots), per_rank, ranks)) for slots in itertools.permutations(range(6)))
    assert max(rank_loads(loads, plan.new_slots, per_rank, ranks)) <= best * 4 / 3  # the bound of longest processing time first


def test_plans_worked_out_by_hand() -> None:
    assert plan_placement([5, 5, 5, 5], 2, 2).moved == 0
    assert plan_placement([0, 0, 0, 0], 2, 2) == ([0, 1, 2, 3], 1.0, 1.0, 0)
    plan = plan_placement([9, 9, 1, 1], 2, 2)
    assert (plan.before, plan.after, plan.moved) == (1.8, 1.0, 2)
    # one expert has more than all others: nothing helps, so nothing is moved
    assert plan_placement([100, 1, 1, 1, 1, 1], 1, 6).moved == 0
    # 6 experts on 4 ranks are 2, 2, 2 and 0, and the last rank stays empty
    uneven = plan_placement([6, 6, 1, 1, 3, 3], 2, 4)
    assert max(rank_loads([6, 6, 1, 1, 3, 3], uneven.new_slots, 2, 4)) == 7
    # what is within the tolerance is not worth a move
    assert plan_placement([10.05, 9.95], 1, 2, tolerance=0.01).moved == 0
    with pytest.raises(ValueError, match="`num_ranks`=2"):
        plan_placement([1, 1, 1], 1, 2)
    with pytest.raises(ValueError, match="`current`"):
        plan_placement([1, 1], 1, 2, [0, 0])


def test_rows_are_brought_back_in_order() -> None:
    rows = torch.arange(5.0).unsqueeze(1)
    slots = torch.tensor([3, 0, 4, 1, 2])
    placed = torch.empty_like(rows)
    placed[slots] = rows
    assert torch.equal(unplaced(placed, slots), rows)
    assert unplaced(rows, None) is rows


# ---------------------------------------------------------------------- moves and training on gloo ranks

BIASED = {"router_type": "sigmoid", "skew": 0.5}
SHUFFLED = {4: [2, 3, 0, 1], 6: [5, 3, 0, 1, 4, 2], 8: [7, 2, 5, 0, 1, 6, 3, 4]}
JOBS: dict[int, list[dict[str, Any]]] = {
    2: [
        {"name": "sgd, biases", "ep": 2, "optimizer": "sgd", "dense": "replicate", "dispatcher": "deduplicated",
         "fields": {"family": "gpt2", "num_experts": 6}, "moves": {"2": {"0": SHUFFLED[6], "2": SHUFFLED[6]}}},
        {"name": "native", "ep": 2, "native": True,
         "moves": {"0": {"0": SHUFFLED[4]}, "2": {"1": [3, 0, 1, 2], "0": [0, 1, 2, 3]}}},
    ],
    4: [
        {"name": "uneven", "ep": 4, "fields": {"num_experts": 6}, "dispatcher": "deduplicated", "optimizer": "adamw_foreach",
         "moves": {"1": {"0": SHUFFLED[6]}, "2": {"0": [4, 3, 5, 0, 1, 2]}, "in_backward": {"1": SHUFFLED[6]}}},
        {"name": "copies sharded", "ep": 2, "fields": {"num_experts": 8},
         "moves": {"1": {"0": SHUFFLED[8], "1": SHUFFLED[8], "2": SHUFFLED[8]}}},
        {"name": "hybrid", "ep": 2, "dense": "hybrid", "fields": {"num_experts": 8, "router_type": "sigmoid",
         "n_group": 2, "topk_group": 1}, "moves": {"1": {"0": SHUFFLED[8], "2": SHUFFLED[8]}}},
        {"name": "trainer", "trainer": True, "ep": 4, "steps": 6, "callback": {"every": 2, "threshold": 1.1},
         "fields": {"num_experts": 16, **BIASED}},
    ],
}  # fmt: skip


@pytest.fixture(scope="module", params=JOBS)
def results(request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """By job, what rank 0 says."""
    folder, world = tmp_path_factory.mktemp("placement"), request.param
    launch(world, "placement_worker.py", folder, json.dumps(JOBS[world]))
    return {job["name"]: json.loads((folder / job["name"] / "result.json").read_text()) for job in JOBS[world]}


def test_a_move_changes_nothing_but_the_place(results: dict[str, Any]) -> None:
    """Losses, gradients, weights and the optimizer's moments are those of a training without a move, expert by expert."""
    for job in (job for jobs in JOBS.values() for job in jobs if job["name"] in results and not job.get("trainer")):
        found = results[job["name"]]
        assert found["losses"] <= 2e-6, (job, found)
        for name in ("gradients", "moments", "weights"):
            assert found[name] <= 1e-4, (job, found)
        assert found["trained"] > 0.05, job  # else there would be nothing to compare
        last = {layer: slots for step in ("0", "1", "2", "in_backward") for layer, slots in job["moves"].get(step, {}).items()}
        for layer, slots in found["placement"].items():
            assert slots == last.get(layer, list(range(len(slots)))), job
        assert found["moved"] > 0, job


def test_errors_name_what_is_wrong(results: dict[str, Any]) -> None:
    for name, found in results.items():
        if name == "trainer":
            continue
        wanted = ("`layer_index`=7", "`new_slots`", "'rows'", "`ep_implementation`='all_to_all'")
        for error, words in zip(found["errors"], wanted, strict=True):
            assert words in error, (name, error)


def test_the_callback_balances_the_ranks(results: dict[str, Any]) -> None:
    if "trainer" not in results:
        pytest.skip("no such job at this number of ranks")
    still, moved = results["trainer"]["still"], results["trainer"]["moved"]
    key = "moe/rank_load_max_over_mean"
    ratios = [row[key] for row in moved["logs"]]
    assert ratios[0] > 1.3
    assert max(ratios[1:]) < 1.1  # below the threshold
    assert [row["loss"] for row in moved["logs"]] == pytest.approx([row["loss"] for row in still["logs"]], abs=1e-6)
    assert results["trainer"]["gap"] <= 1e-4
    assert all(f"moe/layer_{layer}/rank_load_max_over_mean" in moved["logs"][0] for layer in range(3))
    assert key not in still["logs"][0]
    assert still["placement"] == {str(layer): list(range(16)) for layer in range(3)}
    for layer in range(3):
        assert moved["placement"][str(layer)] != list(range(16))
        assert f"step 2: MoE layer {layer}: " in moved["printed"]
    assert 0 < results["trainer"]["state"] < 5000


# ---------------------------------------------------------------------- without expert parallelism


def test_a_model_in_one_process_is_left_alone(tmp_path: Path) -> None:
    model = tiny(num_experts=4).train()
    assert current_placement(model) == {}
    with pytest.raises(ValueError, match="`layer_index`=0"):
        move_experts(model, None, 0, [0, 1, 2, 3])
    args = TrainingArguments(
        output_dir=str(tmp_path), use_cpu=True, max_steps=1, report_to="none", save_strategy="no", disable_tqdm=True
    )
    callbacks = [ExpertPlacementCallback(every=1)]
    Trainer(model, args, train_dataset=sequences(), data_collator=collate, callbacks=callbacks).train()
    assert not model._routing_listeners  # none stays behind


def test_counters_survive_a_checkpoint() -> None:
    counters = torch.rand(3, 5, dtype=torch.float64)
    assert torch.equal(_restored(json.loads(json.dumps(_packed(counters))), (3, 5)), counters)
    assert torch.equal(_restored(_packed(counters), (3, 4)), torch.zeros(3, 4, dtype=torch.float64))  # other ranks now
    assert torch.equal(_restored(None, (1, 2)), torch.zeros(1, 2, dtype=torch.float64))


@pytest.mark.parametrize("arguments", [{"threshold": 1.0}, {"every": 0}, {"min_gain": 1.0}])
def test_arguments_are_checked(arguments: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=f"`{next(iter(arguments))}`="):
        ExpertPlacementCallback(**arguments)
