"""Training with experts spread over ranks is training in one process: loss, every gradient, norm, three or ten optimizer
steps."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from accelerate import Accelerator
from parity_worker import build, train
from ranks import launch

SIGMOID = {"router_type": "sigmoid", "num_experts_per_tok": 2}
SHARED = {"num_shared_experts": 1, "use_shared_expert_gate": True, "balance_scope": "global_batch"}
TOP_K = {"router_type": "top_k", "num_experts": 4, "num_experts_per_tok": 2, **SHARED}
CAPACITY = {"router_type": "top_k", "capacity_factor": 0.6}
NOISY = {"router_type": "noisy_top_k", "router_importance_loss_coef": 0.1, "router_load_loss_coef": 0.1}
HIERARCHICAL = {"router_type": "hierarchical", "n_group": 3, "topk_group": 2, "num_experts_per_tok": 2}
# Adam divides a gradient by its size, and so makes rounding of the smallest ones large, unless eps is above it
ADAMW = {"optimizer": "adamw", "clip": 0.5, "optimizer_options": {"eps": 1e-5}}
GPT2 = {"num_hidden_layers": 2, "resid_pdrop": 0.0, "embd_pdrop": 0.0, "attn_pdrop": 0.0}

# what is trained: model and data; and how it is spread
WHAT: dict[str, dict[str, Any]] = {
    "top_k": {"fields": TOP_K},
    "ten_steps": {"steps": 10, "fields": TOP_K},
    "capacity": {"fields": CAPACITY, "clip": 0.1, "seed": 1, "accumulation": 2},
    "noisy": {"fields": NOISY, "seed": 6, **ADAMW},
    "sigmoid": {"fields": SIGMOID, "seed": 2, "checkpointing": True},
    "hash": {"fields": {"router_type": "hash", "num_experts_per_tok": 1}, **ADAMW},
    "switch": {"fields": {"router_type": "switch", "num_experts_per_tok": 1, "capacity_factor": 1.0}, "checkpointing": True},
    "hierarchical": {"fields": HIERARCHICAL, "seed": 3},
    "expert_choice": {"fields": {"router_type": "expert_choice", "allow_non_causal": True}, "checkpointing": True},
    "strictly_balanced": {"fields": {"router_type": "strictly_balanced"}, "seed": 5},
    "one_expert": {"fields": {**SIGMOID, "num_experts_per_tok": 1}, "favourite": 2, "accumulation": 2, **ADAMW},
    "no_tokens": {"fields": {"router_type": "top_k"}, "empty_rows": 4, "seed": 4},
    "gpt2": {"fields": {"router_type": "top_k", "num_experts": 5}, "family": "gpt2", "text": GPT2},
}
HOW: dict[int, list[tuple[str, dict[str, Any]]]] = {
    2: [
        ("ten_steps", {"ep_size": 2}),
        ("capacity", {"ep_size": 2, "dispatcher": "capacity"}),
        ("noisy", {"ep_size": 1}),
        ("sigmoid", {"ep_size": 2, "dispatcher": "chunked", "chunk_rows": 32, "dense": "replicate"}),
        ("no_tokens", {"ep_size": 2, "dispatcher": "all_to_all"}),
        ("one_expert", {"ep_size": 2, "dense": "replicate"}),
        ("top_k", {"ep_size": 2, "tp_size": 2}),
        ("expert_choice", {"ep_size": 2}),
        ("gpt2", {"ep_size": 2, "dense": "replicate"}),
    ],
    4: [
        ("ten_steps", {"ep_size": 4, "dispatcher": "hierarchical", "ranks_per_node": 2}),
        ("top_k", {"ep_size": 2, "dense": "hybrid", "dp_replicate_size": 2}),
        ("capacity", {"ep_size": 4, "dispatcher": "deduplicated"}),
        ("noisy", {"ep_size": 4, "dispatcher": "deduplicated"}),
        ("sigmoid", {"ep_size": 2, "dispatcher": "all_to_all"}),
        ("strictly_balanced", {"ep_size": 4}),
        ("hash", {"ep_size": 4, "dense": "replicate"}),
        ("switch", {"ep_size": 4, "dispatcher": "capacity"}),
        ("hierarchical", {"ep_size": 4, "dispatcher": "chunked", "chunk_rows": 64}),
        ("one_expert", {"ep_size": 4, "dispatcher": "chunked", "chunk_rows": 16}),
        ("no_tokens", {"ep_size": 4, "dispatcher": "deduplicated"}),
        ("top_k", {"ep_size": 4, "tp_size": 2, "dispatcher": "deduplicated"}),
    ],
}

# in bfloat16: weights, or what FSDP2 gathers of fp32 weights
HALF = {"2-half-weights": {"dtype": "bfloat16"}, "2-half-gathered": {"mixed_precision": True, "dense": "replicate"}}


def name_of(world: int, what: str, how: dict[str, Any]) -> str:
    return "-".join([str(world), what, *(str(value) for value in how.values())])


CASES = [(world, what, how) for world, cases in HOW.items() for what, how in cases]


@pytest.fixture(scope="module")
def alone(tmp_path_factory: Any) -> dict[str, dict[str, Any]]:
    """One process; the models that it starts from are in `folder`."""
    folder = tmp_path_factory.mktemp("parity")
    found = {}
    for what, job in WHAT.items():
        model = build(job)
        model.save_pretrained(folder / what)
        found[what] = train(model, job, Accelerator(cpu=True))
    return {"folder": folder, **found}


@pytest.fixture(scope="module")
def spread(alone: dict[str, Any]) -> dict[str, dict[str, Any]]:
    """All cases, one launch for each number of ranks."""
    folder: Path = alone["folder"]
    found = {}
    for world, cases in HOW.items():
        jobs = [{**WHAT[what], **how, "model": what, "name": name_of(world, what, how)} for what, how in cases]
        if world == 2:
            jobs += [{**WHAT["switch"], "ep_size": 2, "model": "switch", "name": name, **how} for name, how in HALF.items()]
        (folder / "jobs.json").write_text(json.dumps(jobs))
        launch(world, "parity_worker.py", folder, folder / "jobs.json")
        found |= {job["name"]: torch.load(folder / f"{job['name']}.pt") for job in jobs}
    return found


@pytest.mark.parametrize(("world", "what", "how"), CASES, ids=[name_of(*case) for case in CASES])
def test_parity(world: int, what: str, how: dict[str, Any], alone: dict[str, Any], spread: dict[str, Any]) -> None:
    expected, found = alone[what], spread[name_of(world, what, how)]
    torch.testing.assert_close(torch.tensor(found["losses"]), torch.tensor(expected["losses"]), rtol=1e-5, atol=0)
    torch.testing.assert_close(torch.tensor(found["norms"]), torch.tensor(expected["norms"]), rtol=1e-5, atol=0)
    for kind in ("gradients", "parameters"):
        assert set(found[kind]) == set(expected[kind])
        for name, value in expected[kind].items():
            tolerance = 1e-5 * max(value.abs().max().item(), 1e-6)
            difference = (found[kind][name] - value).abs().max().item()
            assert difference <= tolerance, f"{kind} of {name}: {difference:.3g}"


@pytest.mark.parametrize("name", HALF)
def test_routers_stay_in_fp32(name: str, alone: dict[str, Any], spread: dict[str, Any]) -> None:
    found = spread[name]
    assert found["router_dtypes"] == ["torch.float32"]
    assert found["losses"][0] == pytest.approx(alone["switch"]["losses"][0], rel=1e-2)  # bf16 has 8 bits
    assert found["losses"] != alone["switch"]["losses"]
