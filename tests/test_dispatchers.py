"""Dispatchers of expert-parallel experts on gloo ranks: outputs and all gradients against a double loop, what they send, what
they hold, and in what order they do things. The work is done by dispatch_worker.py, launched once per number of ranks."""

from __future__ import annotations

import json
from functools import cache
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from ranks import launch
from transformers.distributed.expert_parallel import EPImplementationInterface

from hf_moe.dispatchers import DISPATCHERS, choose_dispatcher, ep_implementation, register_dispatchers, rows_per_token
from hf_moe.exchange import count_traffic

GROUPED = {"dtype": "float32", "implementation": "grouped_mm"}
PARITY: dict[int, list[dict[str, Any]]] = {
    2: [
        {"tokens": [0, 7], "num": 5, "k": 3, "placement": True, "seed": 1},
        {"routing": "nothing", "form": "bias"},
        {"routing": "one", "form": "mixtral", "around": "checkpoint"},
        {"num": 1, "k": 1, "frozen": "x"},
        {"tp": 2, "tokens": [5], "form": "gate_bias"},
        {"frozen": "experts", "k": 1, **GROUPED},
        {"frozen": "all"},
    ],
    4: [
        {"k": 1},
        {"routing": "one", "num": 6, "k": 1, "form": "gate_bias"},
        {"routing": "unused", "tokens": [3, 0, 5, 1], "frozen": "weights"},
        {"routing": "empty", "capacity": True, "form": "bias", "num": 6, "placement": True},
        {"num": 128, "k": 8, "tokens": [4, 4, 4, 4]},
        {"num": 8, "k": 8, "tokens": [2, 6, 2, 2], **GROUPED},
        {"tp": 2, "tokens": [3, 4], "capacity": True},
        {"tp": 2, "tokens": [1, 6], "num": 6, "routing": "empty", "placement": True, **GROUPED},
        {"form": "mixtral", "tokens": [1, 2, 3, 4], **GROUPED},
        {"form": "gate_bias", "num": 6, "k": 2, "tokens": [9, 1, 0, 0], "dtype": "float32", "implementation": "batched_mm"},
        {"num": 2, "k": 1, "tokens": [5, 0, 0, 2], "around": "checkpoint"},
        {"routing": "one", "capacity": True, "tokens": [6, 6, 6, 6], "k": 3, "seed": 2},
    ],
}  # fmt: skip
SETTINGS: dict[str, list[dict[str, Any]]] = {
    "hierarchical": [{"ranks_per_node": 1}, {"ranks_per_node": 2}, {}],
    "chunked": [{}, {"chunk_rows": 8}],
    "capacity": [{}],
}
TOP_K = (1, 8)


def jobs(world: int) -> list[dict[str, Any]]:
    """All that the ranks are to do."""
    if world == 1:
        return [{"name": f"gpu-{dispatcher}", "kind": "on_gpu", "dispatcher": dispatcher} for dispatcher in DISPATCHERS]
    found = []
    for dispatcher in DISPATCHERS:
        for number, case in enumerate(PARITY[world]):
            settings = SETTINGS.get(dispatcher, [{}])
            options = {**case, **settings[number % len(settings)]}
            found.append({"name": f"parity-{dispatcher}-{number}", "kind": "parity", "dispatcher": dispatcher, **options})
    if world == 2:
        return [*found, {"name": "failing", "kind": "failing", "dispatcher": "deduplicated"}]
    for dispatcher in DISPATCHERS:
        found += [
            {"name": f"{kind}-{dispatcher}", "kind": kind, "dispatcher": dispatcher} for kind in ("order", "bf16", "fixed")
        ]
        found += [
            {"name": f"sharded-{dispatcher}-{around}", "kind": "sharded", "dispatcher": dispatcher, "around": around}
            for around in ("checkpoint", "one")
        ]
    for dispatcher in ("transformers", *DISPATCHERS):
        nodes = {"ranks_per_node": 2} if dispatcher == "hierarchical" else {}
        each = {"kind": "traffic", "dispatcher": dispatcher, "nodes_of": 2, **nodes}
        widths = (64, 256) if dispatcher in ("transformers", "deduplicated") else (64,)
        found += [{"name": f"traffic-{dispatcher}-{d}", "d": d, **each} for d in widths]
    found.append({"name": "traffic-capacity-one", "kind": "traffic", "dispatcher": "capacity", "routing": "one"})
    found += [
        {"name": f"memory-{dispatcher}-{routing}-{k}", "kind": "memory", "dispatcher": dispatcher, "routing": routing, "k": k,
         "num": 32, "tokens": 512 // k}
        for dispatcher, ks in (("chunked", TOP_K), ("transformers", (1,)))
        for k in ks
        for routing in ("uniform", "one")
    ]  # fmt: skip
    found += [
        {"name": f"rounds-{routing}-{training}-{rows}", "kind": "rounds", "chunk_rows": rows, "routing": routing, "k": 2,
         "tokens": [30, 7, 0, 50], "training": training}
        for rows in (5, 16, 10_000)
        for routing in ("uniform", "one")
        for training in (True, False)
    ]  # fmt: skip
    found.append({"name": "refused-nodes", "kind": "refused", "dispatcher": "hierarchical", "ranks_per_node": 3})
    found.append({"name": "refused-rows", "kind": "refused", "dispatcher": "chunked", "chunk_rows": 3})
    return found


@cache
def results(world: int) -> dict[str, list[dict[str, Any]]]:
    """What each rank says of each job."""
    with TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "jobs.json").write_text(json.dumps(jobs(world)))
        launch(world, "dispatch_worker.py", name)
        return {
            job["name"]: [json.loads((folder / f"{job['name']}.{rank}.json").read_text()) for rank in range(world)]
            for job in jobs(world)
        }


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
@pytest.mark.parametrize("world", PARITY)
def test_equals_a_double_loop(world: int, dispatcher: str) -> None:
    """Output and every gradient; and the same in every bit when run again."""
    for number, case in enumerate(PARITY[world]):
        for rank in results(world)[f"parity-{dispatcher}-{number}"]:
            assert rank["error"] < (1e-5 if case.get("dtype") == "float32" else 1e-10), (case, rank["errors"])
            assert rank["same"], case


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_under_fsdp_and_checkpointing(dispatcher: str) -> None:
    """Through Transformers' own expert parallelism, with weights cut over two expert groups; one rank has no tokens."""
    for around in ("checkpoint", "one"):
        for rank in results(4)[f"sharded-{dispatcher}-{around}"]:
            assert rank["error"] < 1e-10, (around, rank["errors"])


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_half_precision(dispatcher: str) -> None:
    """Rows keep their dtype and routing weights theirs."""
    for rank in results(4)[f"bf16-{dispatcher}"]:
        assert rank["dtypes"] == ["torch.bfloat16", "torch.bfloat16", "torch.float32"]
        assert rank["error"] < 0.02


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_other_work_is_done_while_rows_travel(dispatcher: str) -> None:
    for rank in results(4)[f"order-{dispatcher}"]:
        assert rank["events"].count("meanwhile") == 1
        before = rank["events"][: rank["events"].index("meanwhile")]
        assert before == ["start"]  # under way, and not waited for
        assert rank["trained"]
        assert rank["error"] < 1e-6


def test_all_to_alls_are_counted_exactly() -> None:
    """Transformers' and ours send each pair there and back, and their gradients; the counts are 8 bytes for each expert."""
    for dispatcher, d in (("transformers", 64), ("transformers", 256), ("all_to_all", 64)):
        for rank in results(4)[f"traffic-{dispatcher}-{d}"]:
            assert rank["rows"] == 2 * (rank["out"] + rank["in"])
            assert rank["bytes"] == rank["rows"] * d * 4 + 128 * 8 * 3 / 4
            assert 0 < rank["rows_across"] < rank["rows"]
            assert rank["uncounted"] == {}


def test_deduplicated_sends_less_than_half() -> None:
    for d in (64, 256):
        for ours, theirs in zip(results(4)[f"traffic-deduplicated-{d}"], results(4)[f"traffic-transformers-{d}"], strict=True):
            assert ours["rows"] <= 0.5 * theirs["rows"]
            assert ours["bytes"] <= 0.5 * theirs["bytes"]
    sent = sum(rank["rows"] for rank in results(4)["traffic-deduplicated-64"]) / (4 * 4 * 64)  # rows per token and way
    assert sent == pytest.approx(rows_per_token(4, 128, 8) * 3 / 4, rel=0.03)


def test_hierarchical_crosses_once_per_node() -> None:
    """Each of the 64 tokens (of 8 experts) needs the other node nearly always: a row there, one back, and their gradients."""
    for ours, flat in zip(results(4)["traffic-hierarchical-64"], results(4)["traffic-deduplicated-64"], strict=True):
        assert 4 * 60 <= ours["rows_across"] <= 4 * 64
        assert ours["bytes_across"] < 0.6 * flat["bytes_across"]


def test_capacity_sends_the_same_whatever_the_routing() -> None:
    sent = {rank["bytes"] for name in ("64", "one") for rank in results(4)[f"traffic-capacity-{name}"]}
    assert len(sent) == 1


@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_only_capacity_reads_nothing_back(dispatcher: str) -> None:
    """Tried with tensors that have shapes and no values."""
    for rank in results(4)[f"fixed-{dispatcher}"]:
        assert rank["reads"] == (dispatcher != "capacity")
        assert rank.get("shapes", [[6, 16]]) == [[6, 16]]


def test_chunked_needs_the_same_memory_for_any_routing() -> None:
    def peak(dispatcher: str, routing: str, k: int) -> int:
        return max(rank["peak"] for rank in results(4)[f"memory-{dispatcher}-{routing}-{k}"])

    for k in TOP_K:
        assert peak("chunked", "one", k) <= 1.15 * peak("chunked", "uniform", k), k
    assert peak("transformers", "one", 1) > 2 * peak("transformers", "uniform", 1)  # that is what is measured


def test_rounds_are_bounded() -> None:
    for routing, pairs in (("uniform", None), ("one", 2 * 87)):
        for training in (True, False):
            for rows in (5, 16, 10_000):
                ranks = results(4)[f"rounds-{routing}-{training}-{rows}"]
                assert len({rank["rounds"] for rank in ranks}) == 1
                assert max(rank["most"] for rank in ranks) <= rows
                assert sum(rank["rows"] for rank in ranks) == 2 * 87
                assert pairs is None or ranks[0]["rows"] == pairs
    assert results(4)["rounds-one-False-10000"][0]["rounds"] == 1  # generating a few tokens
    assert results(4)["rounds-one-True-10000"][0]["rounds"] > results(4)["rounds-uniform-True-10000"][0]["rounds"] >= 4


def test_settings_that_do_not_fit_are_refused() -> None:
    assert "`ranks_per_node`=3 does not divide `ep_size`=4" in results(4)["refused-nodes"][0]["message"]
    assert "`chunk_rows`=3 is less than `ep_size`=4" in results(4)["refused-rows"][0]["message"]


def test_a_rank_that_is_gone_is_named() -> None:
    message = results(2)["failing"][0]["message"]
    assert message.startswith("Rank 0 could not exchange the numbers of rows with ranks [0, 1]: another rank has failed")


@pytest.mark.gpu
@pytest.mark.skipif(not torch.cuda.is_available(), reason="needs a GPU")
@pytest.mark.parametrize("dispatcher", DISPATCHERS)
def test_on_a_gpu(dispatcher: str) -> None:
    """NCCL with one rank; `capacity` is also captured in a CUDA graph."""
    (found,) = results(1)[f"gpu-{dispatcher}"]
    assert len(found["errors"]) == (2 if dispatcher == "capacity" else 1)
    assert max(found["errors"]) < 0.02
    assert found["finite"]


def test_names() -> None:
    register_dispatchers()
    registered = EPImplementationInterface()
    for name, dispatcher in DISPATCHERS.items():
        assert registered[f"hf_moe_{name}"] is dispatcher
        assert ep_implementation(name) == f"hf_moe_{name}"
    name = ep_implementation("hierarchical", ranks_per_node=2, chunk_rows=64)
    assert registered[name].ranks_per_node == 2
    assert issubclass(registered[name], DISPATCHERS["hierarchical"])
    assert DISPATCHERS["hierarchical"].ranks_per_node is None
    with pytest.raises(ValueError, match="`dispatcher`='nearest' is unknown"):
        ep_implementation("nearest")


@pytest.mark.parametrize(("ranks", "experts", "top_k"), [(4, 128, 8), (8, 64, 2), (2, 8, 1), (3, 6, 6)])
def test_rows_per_token_by_trial(ranks: int, experts: int, top_k: int) -> None:
    chosen = torch.rand(4000, experts, generator=torch.Generator().manual_seed(0)).topk(top_k).indices // (experts // ranks)
    needed = torch.nn.functional.one_hot(chosen, ranks).amax(dim=1).sum(dim=1).double().mean()
    assert rows_per_token(ranks, experts, top_k) == pytest.approx(float(needed), rel=0.02)


@pytest.mark.parametrize(
    ("situation", "expected"),
    [
        ({"ep_size": 1, "num_experts": 8, "top_k": 2}, "all_to_all"),
        ({"ep_size": 4, "num_experts": 128, "top_k": 8}, "deduplicated"),
        ({"ep_size": 8, "num_experts": 8, "top_k": 1}, "all_to_all"),
        ({"ep_size": 16, "num_experts": 64, "top_k": 8, "num_nodes": 2}, "hierarchical"),
        (
            {"ep_size": 12, "num_experts": 64, "top_k": 8, "num_nodes": 2, "ranks_per_node": 8},
            "deduplicated",
        ),  # 1 node and a half
        ({"ep_size": 2, "num_experts": 64, "top_k": 8, "num_nodes": 2}, "deduplicated"),  # a rank per node: nothing inside
        ({"ep_size": 8, "num_experts": 8, "top_k": 1, "capacity": 1.0}, "capacity"),
        ({"ep_size": 4, "num_experts": 128, "top_k": 8, "capacity": 4.0}, "capacity"),  # nearly every rank is needed anyway
        ({"ep_size": 8, "num_experts": 8, "top_k": 1, "capacity": 4.0}, "all_to_all"),
        ({"ep_size": 4, "num_experts": 8, "top_k": 2, "bounded_memory": True}, "chunked"),
    ],
)
def test_auto(situation: dict[str, Any], expected: str) -> None:
    name, reason = choose_dispatcher(**situation)
    assert name == expected
    assert reason.endswith(".")
    assert "\n" not in reason


def test_nothing_is_counted_where_nothing_is_sent() -> None:
    with count_traffic() as traffic:
        torch.ones(3).sum()
    assert (traffic.rows, traffic.bytes, traffic.kinds) == (0, 0, {})
