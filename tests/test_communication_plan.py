"""The planner: expected rows against simulated routing, sizes against models, bytes against what real dispatchers send."""

from __future__ import annotations

import itertools
import json
import math
import subprocess
import sys
from dataclasses import fields
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from families import text_config
from hf_moe.training.communication_plan import crossing, make_plans, plan_of
from hf_moe.training.dispatch_traffic import (
    DISPATCHERS,
    ExpertGroup,
    chance_of_none,
    exchange_of_layer,
    integer_bytes,
    rows_per_expert,
)
from hf_moe.training.load_file import ExpertLoadFile
from hf_moe.training.model_sizes import model_sizes, sizes_of_checkpoint
from hf_moe.training.parallel_arguments import ExpertParallelArguments
from hf_moe.training.plan_command import main as plan_command
from hf_moe.training.plan_inputs import Machine, Mesh, Workload, meshes
from hf_moe.training.plan_text import FLAGS
from ranks import launch
from transformers import LlamaForCausalLM, MixtralConfig, MixtralForCausalLM

from hf_moe import MoEConfig, MoEForCausalLM
from hf_moe.__main__ import main
from hf_moe.dispatch_base import smallest_integer
from hf_moe.dispatchers import DISPATCHERS as REAL_DISPATCHERS
from hf_moe.dispatchers import rows_per_token
from hf_moe.expert_mesh import expert_mesh
from hf_moe.expert_parallel import ExpertParallelConfig
from hf_moe.routing import most_rows_per_expert

SMALL = ["--experts", "8", "--top-k", "2", "--hidden", "512", "--layers", "4", "--sequence", "512"]
WORLD = 4


def job(name: str, model: dict[str, Any], layout: dict[str, Any], checkpointing: bool = False, **more: Any) -> dict[str, Any]:
    return {"name": name, "model": model, "layout": layout, "checkpointing": checkpointing, "batch": [2, 256], **more}


JOBS = [
    job("deduplicated", {"num_experts": 16, "num_experts_per_tok": 4}, {"ep_size": 4, "dispatcher": "deduplicated"}),
    job("replicated", {"num_experts": 8, "num_experts_per_tok": 2, "num_shared_experts": 1},
        {"ep_size": 4, "dispatcher": "all_to_all", "dense": "replicate"}, True),
    job("capacity", {"num_experts": 8, "num_experts_per_tok": 2, "capacity_factor": 1.25},
        {"ep_size": 2, "dispatcher": "capacity"}),
    job("hierarchical", {"num_experts": 32, "num_experts_per_tok": 8},
        {"ep_size": 4, "dispatcher": "hierarchical", "ranks_per_node": 2}, True),
    job("chunked", {"num_experts": 16, "num_experts_per_tok": 2},
        {"ep_size": 4, "dispatcher": "chunked", "dense": "hybrid", "dp_replicate_size": 2, "chunk_rows": 300}),
    job("copies", {"num_experts": 32, "num_experts_per_tok": 4, "mlp_only_layers": [0]},
        {"ep_size": 2, "dispatcher": "deduplicated", "dense": "hybrid", "dp_replicate_size": 2}, True,
        text={"tie_word_embeddings": True}),
    job("uneven", {"num_experts": 6, "num_experts_per_tok": 2},
        {"ep_size": 4, "dispatcher": "deduplicated", "ranks_per_node": 2}),
    job("pyramid", {"num_experts": [4, 8], "num_experts_per_tok": 2}, {"ep_size": 2, "dispatcher": "all_to_all"}, True),
]  # fmt: skip


@pytest.fixture(scope="module")
def measured(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, list[dict[str, Any]]]]:
    """The folder with the checkpoints, and what each rank of each job sent and held."""
    folder = tmp_path_factory.mktemp("plan")
    (folder / "jobs.json").write_text(json.dumps(JOBS))
    launch(WORLD, "plan_worker.py", folder)
    ranks = range(WORLD)
    return folder, {
        each["name"]: [json.loads((folder / f"{each['name']}.{rank}.json").read_text()) for rank in ranks] for each in JOBS
    }


def planned(folder: Path, each: dict[str, Any]) -> Any:
    """The plan for a job's mesh and dispatcher."""
    model = sizes_of_checkpoint(folder / f"{each['name']}-model")
    layout = each["layout"]
    gpus = layout.get("ranks_per_node", WORLD)
    machine = Machine(nodes=WORLD // gpus, gpus=gpus)
    sequences, length = each["batch"]
    work = Workload(
        tokens=sequences * length, sequence=length, precision="fp32", checkpointing=each["checkpointing"],
        chunk_rows=layout.get("chunk_rows", 16384),
    )  # fmt: skip
    wanted = {"dense": layout.get("dense", "fsdp"), "ep": layout["ep_size"]}
    wanted["dp_replicate"] = {"fsdp": 1, "replicate": WORLD}.get(wanted["dense"], layout.get("dp_replicate_size"))
    mesh = next(m for m in meshes(machine, model.num_experts) if all(getattr(m, k) == v for k, v in wanted.items()))
    return plan_of(model, machine, work, mesh, layout["dispatcher"])


@pytest.mark.parametrize("each", JOBS, ids=lambda each: each["name"])
def test_bytes_of_a_step(measured: tuple[Path, dict[str, list[dict[str, Any]]]], each: dict[str, Any]) -> None:
    """Within 5 % of what FSDP2 and the dispatchers send, kind by kind; what a rank holds exactly."""
    folder, found = measured
    ranks, plan = found[each["name"]], planned(folder, each)

    def mean(name: str, kind: str) -> float:
        return sum(rank[name].get(kind, 0.0) for rank in ranks) / WORLD

    assert plan.dispatched.total == pytest.approx(mean("bytes", "all_to_all"), rel=0.02)
    assert plan.dispatched.across == pytest.approx(mean("across", "all_to_all"), rel=0.03)
    assert plan.traffic["all-gather"].total == pytest.approx(mean("bytes", "all_gather"), rel=0.001)
    assert plan.traffic["reduce-scatter"].total == pytest.approx(mean("bytes", "reduce_scatter"), rel=0.001)
    statistics = 4096  # bytes: sums that losses need
    assert plan.traffic["all-reduce"].total == pytest.approx(mean("bytes", "all_reduce"), rel=0.01, abs=statistics)
    assert plan.sent.total == pytest.approx(sum(sum(rank["bytes"].values()) for rank in ranks) / WORLD, rel=0.05)
    assert plan.memory.weights == max(rank["weights"] for rank in ranks)
    assert plan.memory.gradients == max(rank["gradients"] for rank in ranks)


# ---------------------------------------------------------------------- routing


@pytest.mark.parametrize(("experts", "top_k", "ranks"), [(8, 2, 4), (128, 8, 4), (64, 8, 16), (7, 3, 3), (4, 4, 2)])
def test_chance_of_a_uniform_load(experts: int, top_k: int, ranks: int) -> None:
    group = ExpertGroup.of(experts, [0] * ranks)
    for rank, wanted in enumerate(group.wanted(top_k)):
        elsewhere = experts - len(group.experts([rank]))
        assert wanted == pytest.approx(1 - math.comb(elsewhere, top_k) / math.comb(experts, top_k), rel=1e-9)
    if experts % ranks == 0:
        assert group.wanted(top_k).sum() == pytest.approx(rows_per_token(ranks, experts, top_k), rel=1e-9)


@pytest.mark.parametrize("seed", [0, 1, 2])
def test_chance_of_an_uneven_load(seed: int) -> None:
    """Over all sets of K experts, each as likely as the product of its experts' odds."""
    draw = np.random.default_rng(seed)
    experts, top_k = 7, 3
    odds = draw.uniform(0.1, 3.0, experts)
    sets = list(itertools.combinations(range(experts), top_k))
    chances = np.array([odds[list(each)].prod() for each in sets])
    chances /= chances.sum()
    load = [sum(c for c, each in zip(chances, sets, strict=True) if e in each) / top_k for e in range(experts)]
    for some in (range(1), range(1, 3), range(3, 7), range(2, 2)):
        expected = sum(c for c, each in zip(chances, sets, strict=True) if not set(some) & set(each))
        assert chance_of_none(tuple(load), top_k, some) == pytest.approx(expected, rel=1e-5)


def test_a_load_that_is_all_on_one_rank() -> None:
    group = ExpertGroup.of(8, [0, 0, 1, 1], [0.5, 0.5, 0, 0, 0, 0, 0, 0])
    assert group.wanted(2) == pytest.approx([1, 0, 0, 0], abs=1e-6)


def simulated(experts: int, top_k: int, nodes: list[int], tokens: int, row: int, load: np.ndarray | None) -> dict[str, Any]:
    """Mean bytes that a rank sends forward, (inside, across), counted message by message."""
    draw, ranks = np.random.default_rng(0), len(nodes)
    owner = np.arange(experts) // -(-experts // ranks)
    sent = {name: np.zeros(2) for name in ("all_to_all", "deduplicated", "hierarchical")}

    def send(name: str, source: int, target: int, nbytes: float) -> None:
        if source != target:
            sent[name][int(nodes[source] != nodes[target])] += nbytes

    for source in range(ranks):
        for _ in range(tokens):
            scores = draw.gumbel(size=experts) + (0 if load is None else np.log(load))
            chosen = owner[np.argsort(-scores)[:top_k]].tolist()
            for rank in chosen:
                send("all_to_all", source, rank, 2 * row)
            for rank in set(chosen):
                send("deduplicated", source, rank, 2 * row + 5 * chosen.count(rank))
            for node in {nodes[rank] for rank in chosen}:
                here = [rank for rank in chosen if nodes[rank] == node]
                door = [rank for rank in range(ranks) if nodes[rank] == node][source % nodes.count(node)]
                if node != nodes[source]:
                    send("hierarchical", source, door, 2 * row + 5 * len(here))
                for rank in set(here):
                    send("hierarchical", source if node == nodes[source] else door, rank, 2 * row + 5 * here.count(rank))
    return {name: total / ranks for name, total in sent.items()}


@pytest.mark.parametrize(("experts", "top_k", "nodes"), [
    (16, 4, [0, 0, 1, 1]), (32, 8, [0, 0, 0, 0]), (8, 2, [0, 1]), (7, 2, [0, 0, 1, 1]), (24, 3, [0, 0, 1, 1, 2, 2]),
])  # fmt: skip
def test_rows_against_simulated_routing(experts: int, top_k: int, nodes: list[int]) -> None:
    tokens = 1000
    model = model_sizes(hidden=64, experts=experts, top_k=top_k, layers=1)
    work = Workload(tokens=tokens, sequence=tokens, precision="fp32")
    found = simulated(experts, top_k, nodes, tokens, row=64 * 4, load=None)
    for name, (inside, across) in found.items():
        if name != "hierarchical" or 1 < len(set(nodes)) < len(nodes):
            link = exchange_of_layer(name, ExpertGroup.of(experts, nodes), model, work).forward
            assert (link.inside, link.across) == pytest.approx((inside, across), rel=0.03, abs=300), name


def test_rows_of_an_uneven_load_against_simulated_routing() -> None:
    """Gumbel's top-K is not the planner's draw, and near enough."""
    draw = np.random.default_rng(3)
    wanted = draw.dirichlet(np.full(16, 3.0))
    found = simulated(16, 4, [0, 0, 1, 1], 1500, row=256, load=wanted)
    scores = draw.gumbel(size=(20000, 16)) + np.log(wanted)
    load = np.bincount(np.argsort(-scores, axis=1)[:, :4].ravel(), minlength=16) / 80000
    model, work = model_sizes(hidden=64, experts=16, top_k=4, layers=1), Workload(1500, 1500, precision="fp32")
    for name, (inside, across) in found.items():
        link = exchange_of_layer(name, ExpertGroup.of(16, [0, 0, 1, 1], load.tolist()), model, work).forward
        assert (link.inside, link.across) == pytest.approx((inside, across), rel=0.03), name


def test_what_dispatchers_and_planner_both_know() -> None:
    assert list(DISPATCHERS) == list(REAL_DISPATCHERS)
    for largest in (1, 127, 255, 256, 32767, 32768):
        assert integer_bytes(largest) == smallest_integer(largest).itemsize
    for experts, top_k, factor, shape in [(8, 2, 1.25, (2, 96)), (16, 4, 0.5, (1, 33)), (4, 1, 9.0, (3, 10))]:
        model = model_sizes(hidden=8, experts=experts, top_k=top_k, layers=1, capacity_factor=factor)
        work = Workload(tokens=math.prod(shape), sequence=shape[1])
        assert rows_per_expert(experts, model, work) == most_rows_per_expert(experts, factor, top_k, shape)


# ---------------------------------------------------------------------- meshes and sizes


@pytest.mark.parametrize(("nodes", "gpus", "experts"), [(1, 4, [6]), (2, 8, [16, 32]), (3, 4, [8]), (1, 1, [4])])
def test_meshes_are_those_of_the_library(nodes: int, gpus: int, experts: list[int]) -> None:
    found = list(meshes(Machine(nodes, gpus), experts))
    assert len(set(found)) == len(found)
    for mesh in found:
        theirs = expert_mesh(
            world_size=nodes * gpus, ep_size=mesh.ep, dense=mesh.dense, dp_replicate_size=mesh.dp_replicate, num_experts=experts
        )
        assert (mesh.dp_replicate, mesh.fsdp) == (theirs.dp_replicate_size, theirs.fsdp_size)
        if mesh.ep > 1:
            assert (mesh.expert_replicas, mesh.efsdp, mesh.ep) == tuple(theirs.expert_view)
        for name in DISPATCHERS:
            arguments = mesh.arguments(name, 64)
            ExpertParallelConfig(**arguments)
            assert {FLAGS[field].strip("-") for field in arguments} <= {f.name for f in fields(ExpertParallelArguments)}


def test_hops_between_nodes() -> None:
    assert crossing(world=16, size=8, stride=1, gpus=8) == 0  # each in a node
    assert crossing(world=16, size=16, stride=1, gpus=8) == 2 / 16
    assert crossing(world=16, size=2, stride=8, gpus=8) == 1  # replicas: one in each node
    assert crossing(world=16, size=4, stride=4, gpus=8) == 2 / 4


MODELS = {
    "llama": ("llama", {"num_experts": 8, "num_experts_per_tok": 2}),
    "shared": ("llama", {"num_experts": 4, "num_shared_experts": 2, "moe_intermediate_size": 24, "mlp_only_layers": [0]}),
    "pyramid": ("qwen3", {"num_experts": [4, 8, 16], "num_experts_per_tok": 3}),
    "tied": ("llama_tied", {"num_experts": 4, "router_type": "noisy_top_k"}),
    "plain": ("gpt2", {"num_experts": 4}),
}


@pytest.mark.parametrize("name", MODELS)
def test_sizes_of_a_checkpoint(tmp_path: Path, name: str) -> None:
    family, fields = MODELS[name]
    model = MoEForCausalLM(MoEConfig(text_config=text_config(family), **fields))
    model.save_pretrained(tmp_path)
    sizes = sizes_of_checkpoint(tmp_path)
    biases = sum(p.numel() for n, p in model.named_parameters() if ".experts." in n and n.endswith("bias"))
    assert sizes.total == model.num_parameters() - biases
    assert sizes.num_experts == tuple(model.config.num_experts_per_layer)
    idle = sum(max(0, e - sizes.top_k) * sizes.expert_numel for e in sizes.num_experts)
    assert sizes.active == sizes.total - idle
    if not biases:
        assert sizes.active == model.num_active_parameters()
    (tmp_path / "model.safetensors").unlink()
    if name in ("llama", "shared", "pyramid"):  # of the config alone: exact for Llama-like models
        assert sizes_of_checkpoint(tmp_path).total == pytest.approx(sizes.total, rel=0.005)


def test_sizes_of_a_dense_model_and_a_native_one(tmp_path: Path) -> None:
    dense = LlamaForCausalLM(text_config("llama"))
    dense.save_pretrained(tmp_path / "dense")
    upcycled = MoEForCausalLM(MoEConfig(text_config=text_config("llama"), num_experts=8, num_shared_experts=1))
    assert sizes_of_checkpoint(tmp_path / "dense", experts=8, shared_experts=1).total == upcycled.num_parameters()
    native = native_model()
    native.save_pretrained(tmp_path / "native")
    assert sizes_of_checkpoint(tmp_path / "native").total == native.num_parameters()
    for path, options, message in (
        ("dense", {}, "--experts"), ("native", {"experts": 8}, "already has 4 experts"), ("native", {"top_k": 9}, "`top_k`=9"),
        ("nowhere", {}, "cannot be read"),
    ):  # fmt: skip
        with pytest.raises(ValueError, match=message):
            sizes_of_checkpoint(tmp_path / path, **options)


def native_model() -> MixtralForCausalLM:
    return MixtralForCausalLM(MixtralConfig(
        vocab_size=128, hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4,
        num_key_value_heads=2, num_local_experts=4,
    ))  # fmt: skip


# ---------------------------------------------------------------------- plans


def test_memory_and_time_follow_what_they_depend_on() -> None:
    model = model_sizes(hidden=1024, experts=16, top_k=2, layers=8, shared_experts=1, capacity_factor=1.25)
    machine, mesh = Machine(2, 8), Mesh("fsdp", 1, 16, 2, 1, 8)
    plain = plan_of(model, machine, Workload(), mesh, "deduplicated")
    assert plan_of(model, machine, Workload(checkpointing=False), mesh, "deduplicated").memory.total > plain.memory.total
    hot = plan_of(model, machine, Workload(imbalance=4.0), mesh, "deduplicated")
    assert hot.seconds > plain.seconds
    assert hot.memory.dispatch > plain.memory.dispatch
    assert hot.sent == plain.sent
    for work in (Workload(), Workload(imbalance=4.0)):  # bounded, whatever the routing
        assert plan_of(model, machine, work, mesh, "chunked").memory.dispatch == pytest.approx(
            plan_of(model, machine, Workload(), mesh, "chunked").memory.dispatch
        )
    slow = plan_of(model, Machine(2, 8, across=1e9), Workload(), mesh, "deduplicated")
    assert slow.sharding > plain.sharding
    assert slow.compute == plain.compute
    twice = plan_of(model, machine, Workload(accumulation=2), mesh, "deduplicated")
    assert twice.sent.total == pytest.approx(2 * plain.sent.total)
    assert plain.seconds <= plain.seconds_in_turn
    capacity = plan_of(model, machine, Workload(), mesh, "capacity")
    assert plan_of(model, machine, Workload(imbalance=4.0), mesh, "capacity").exchange == capacity.exchange


def test_operations_are_those_of_the_weights() -> None:
    model = model_sizes(hidden=1024, experts=8, top_k=2, layers=4, vocab=1000)
    work = Workload(tokens=100, sequence=1, checkpointing=False)
    plan = plan_of(model, Machine(1, 8, flops=1.0), work, Mesh("fsdp", 1, 8, 8, 1, 1), "none")
    assert plan.compute == pytest.approx(6 * 100 * (model.active - 1000 * 1024), rel=0.01)


def test_plans_are_sorted_and_complete() -> None:
    model, machine = model_sizes(hidden=1024, experts=16, top_k=2, layers=8), Machine(2, 4, memory=6e9)
    plans = make_plans(model, machine, Workload())
    fits = [plan.fits for plan in plans]
    assert fits == sorted(fits, reverse=True)
    assert set(fits) == {True, False}
    seconds = [plan.seconds for plan in plans if plan.fits]
    assert all(a <= b * 1.01 for a, b in itertools.pairwise(seconds))
    assert {plan.mesh for plan in plans} == set(meshes(machine, model.num_experts))
    assert {plan.dispatcher for plan in plans if plan.mesh.ep == 8} == set(DISPATCHERS) - {"capacity"}
    assert {plan.dispatcher for plan in plans if plan.mesh.ep == 4} == {"all_to_all", "deduplicated", "chunked"}


# ---------------------------------------------------------------------- the command


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "plan.json"
    assert main(["plan", *SMALL, "--nodes", "2", "--gpus", "2", "--json", str(file)]) == 0
    text = capsys.readouterr().out
    content = json.loads(file.read_text())
    best = content["plans"][0]
    written = ", ".join(f"{name}={value!r}" for name, value in best["config"].items())
    assert f"ExpertParallelConfig({written})" in text
    assert "s per step, " in text
    assert sum(best["memory"].values()) == pytest.approx(2 * best["memory"]["total"])
    assert list(tmp_path.iterdir()) == [file]


def test_command_says_what_does_not_fit(capsys: pytest.CaptureFixture[str]) -> None:
    assert plan_command([*SMALL, "--gpus", "2", "--memory", "1"]) == 1
    text = capsys.readouterr().out
    assert "Nothing fits" in text
    assert "meshes do not fit" in text
    assert "most of it" in text


def test_command_with_a_model_and_its_load(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    native_model().save_pretrained(tmp_path)
    even, uneven = ([[10] * 4] * 2, [[18, 12, 6, 4]] * 2)
    steps = {}
    for name, counts in {"even": even, "uneven": uneven}.items():
        file = ExpertLoadFile(tmp_path / name, layers=[0, 1], num_experts=[4, 4])
        file.append(1, counts)
        file.finish()
        options = ["--model", str(tmp_path), "--gpus", "4", "--dispatcher", "all_to_all", "--latency", "0"]
        assert plan_command([*options, "--routing", str(tmp_path / name), "--json", str(tmp_path / "plan.json")]) == 0
        plans = json.loads((tmp_path / "plan.json").read_text())["plans"]
        steps[name] = next(plan["exchange"] for plan in plans if plan["mesh"]["ep"] == 4)
    assert steps["uneven"] == pytest.approx(18 / 10 * steps["even"], rel=1e-3)  # the busiest rank
    assert "all_to_all" in capsys.readouterr().out


@pytest.mark.parametrize(("options", "message"), [
    (["--top-k", "2", "--hidden", "64"], "`--experts` is missing"),
    (["--experts", "2", "--top-k", "4", "--hidden", "64"], "`top_k`=4 is more than `experts`=2"),
    ([*SMALL, "--nodes", "0"], "`--nodes`=0 must be positive"),
    ([*SMALL, "--dense-layers", "4"], "`dense_layers`=4"),
    ([*SMALL, "--efficiency", "40"], "`--efficiency`=40 is a share"),
    ([*SMALL, "--imbalance", "0.5"], "`--imbalance`=0.5"),
    ([*SMALL, "--dispatcher", "nccl"], "`--dispatcher`='nccl' is not known"),
    ([*SMALL, "--dispatcher", "capacity"], "--capacity-factor"),
    ([*SMALL, "--routing", "nowhere"], "`--routing`='nowhere' cannot be read"),
    ([*SMALL, "--json", "/nowhere/plan.json"], "`--json`='/nowhere/plan.json' cannot be written"),
    (["--model", "nowhere"], "cannot be read"),
    (["--model", "nowhere", "--hidden", "64"], "`--hidden` is the model's own"),
    (["--model", "nowhere", "--tied"], "`--tied` is the model's own"),
])  # fmt: skip
def test_wrong_input(capsys: pytest.CaptureFixture[str], options: list[str], message: str) -> None:
    assert plan_command(options) == 2
    error = capsys.readouterr().err
    assert message in error
    assert error.count("\n") == 1


def test_unknown_options(capsys: pytest.CaptureFixture[str]) -> None:
    for options in (["--expert", "8"], ["--experts", "many"]):
        with pytest.raises(SystemExit) as stopped:
            plan_command(options)
        assert stopped.value.code == 2
        assert capsys.readouterr().err.count("\n") == 1


def test_no_torch() -> None:
    code = (
        "import sys; sys.argv = ['hf-moe']\n"
        "from hf_moe.__main__ import main\n"
        f"assert main(['plan', *{SMALL!r}]) == 0\n"
        "assert not {'torch', 'transformers', 'accelerate'} & set(sys.modules)\n"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False, timeout=300)
    assert done.returncode == 0, done.stderr
