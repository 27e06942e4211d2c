"""Worker: run expert-parallel dispatchers on gloo ranks and compare each with a plain double loop over the whole batch.

Run by test_dispatchers.py under torchrun: `dispatch_worker.py FOLDER`. FOLDER/jobs.json is a list of {"name", "kind", …},
where the kind names a function below and the rest are its keywords. Each rank writes FOLDER/NAME.RANK.json.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import time
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
import torch.distributed as dist
from dispatch_oracle import FF, D, double_loop, error, local_experts, make_batch, make_experts
from torch import Tensor, nn
from torch._subclasses.fake_tensor import DataDependentOutputException, FakeTensorMode
from torch.distributed._tools.mem_tracker import MemTracker
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils.checkpoint import checkpoint
from transformers.distributed.expert_parallel import AllToAllEP, apply_expert_parallelism

from hf_moe.dispatch_scope import DispatchScope, dispatching
from hf_moe.dispatchers import DISPATCHERS, ep_implementation, register_dispatchers
from hf_moe.exchange import count_traffic


def meshes(tp: int = 1) -> tuple[DeviceMesh, DeviceMesh]:
    """All ranks share the experts; `tp` consecutive ranks share a batch."""
    key = f"tp{tp}"
    if key not in _MESHES:
        world = dist.get_world_size()
        tp_mesh = init_device_mesh("cpu", (world // tp, tp), mesh_dim_names=("dp", "tp"))["tp"]
        _MESHES[key] = init_device_mesh("cpu", (world,), mesh_dim_names=("ep",)), tp_mesh
    return _MESHES[key]


_MESHES: dict[str, tuple[DeviceMesh, DeviceMesh]] = {}


def build(dispatcher: str, experts: nn.Module, tp: int = 1, **settings: Any) -> Any:
    base = AllToAllEP if dispatcher == "transformers" else DISPATCHERS[dispatcher]
    return type(base.__name__, (base,), settings)(experts, *meshes(tp))


def scope_of(ids: Tensor, num: int, capacity: bool) -> Any:
    """Capacity: no more room than the fullest expert of this rank needs."""
    if not capacity:
        return nullcontext()
    most = int(torch.bincount(ids.flatten(), minlength=num + 1)[:num].max()) if ids.numel() else 0
    return dispatching(DispatchScope(rows_per_expert=most))


def parity(
    dispatcher: str,
    routing: str = "uniform",
    num: int = 8,
    k: int = 2,
    tokens: list[int] | None = None,
    form: str = "gate",
    dtype: str = "float64",
    implementation: str = "eager",
    placement: bool = False,
    tp: int = 1,
    capacity: bool = False,
    seed: int = 0,
    around: str = "",
    frozen: str = "",
    **settings: Any,
) -> dict[str, Any]:
    """Differences of output and gradients from the double loop; that two runs agree in every bit."""
    world, rank, precision = dist.get_world_size(), dist.get_rank(), getattr(torch, dtype)
    torch.manual_seed(seed)
    full = make_experts(num, form, precision, implementation)
    tokens = tokens or [5] * (world // tp)
    batches = [make_batch(routing, t, num, k, precision, 100 * seed + r) for r, t in enumerate(tokens)]
    wanted = []
    for x, ids, weights, grad in batches:
        x, weights = x.clone().requires_grad_(), weights.clone().requires_grad_()
        y = double_loop(full, num, x, ids, weights)
        (y * grad).sum().backward()
        wanted.append((y.detach(), x.grad, weights.grad))

    experts = local_experts(full, num, rank, world, form, implementation, placement)
    run = build(dispatcher, experts, tp, **settings)
    weights_of = list(experts.parameters())
    for parameter in weights_of:
        parameter.requires_grad_(frozen not in ("experts", "all"))

    def layer(x: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
        with scope_of(ids, num, capacity):
            return run(x, ids, weights)

    found = []
    for _ in range(2):
        x, ids, weights, grad = (each.clone() for each in batches[rank // tp])
        leaves = [
            x.requires_grad_(frozen not in ("x", "all")),
            weights.requires_grad_(frozen not in ("weights", "all")),
            *weights_of,
        ]
        y = checkpoint(layer, x, ids, weights, use_reentrant=False) if around == "checkpoint" else layer(x, ids, weights)
        if frozen != "all":
            y.backward(grad)
        found.append([y.detach(), *(leaf.grad for leaf in leaves if leaf.requires_grad)])
        for parameter in weights_of:
            parameter.grad = None
    y, *grads = wanted[rank // tp]
    grads += [(torch.zeros_like(p) if p.grad is None else p.grad)[experts.mine] for p in full.parameters()]
    expected = [y, *(grad for leaf, grad in zip(leaves, grads, strict=True) if leaf.requires_grad)]
    errors = [error(got, want) for got, want in zip(found[0], expected, strict=True)]
    same = all(torch.equal(one, other) for one, other in zip(*found, strict=True))
    return {"error": max(errors), "errors": errors, "same": same}


def one_step(dispatcher: str, routing: str, num: int, k: int, tokens: int, d: int, ff: int = FF, **settings: Any) -> Any:
    """A function that runs forward and backward in fp32, and this rank's batch."""
    rank, world = dist.get_rank(), dist.get_world_size()
    torch.manual_seed(0)
    full = make_experts(num, "gate", torch.float32, "grouped_mm", d, ff)
    experts = local_experts(full, num, rank, world, "gate", "grouped_mm", False)
    run = build(dispatcher, experts, **settings)
    x, ids, weights, grad = make_batch(routing, tokens, num, k, torch.float32, rank, d)
    x.requires_grad_()
    weights.requires_grad_()

    def step() -> Tensor:
        y = run(x, ids, weights)
        y.backward(grad)
        return y

    return step, experts, ids


def traffic(
    dispatcher: str, num: int = 128, k: int = 8, tokens: int = 64, d: int = 64, nodes_of: int | None = None, **settings: Any
) -> dict[str, Any]:
    """What is sent in a step; and how many pairs have to leave this rank and to come."""
    step, _, ids = one_step(dispatcher, settings.pop("routing", "uniform"), num, k, tokens, d, **settings)
    with count_traffic(nodes_of) as sent:
        step()
    world, rank = dist.get_world_size(), dist.get_rank()
    pairs_R = torch.bincount(ids.flatten() // (num // world), minlength=world)
    all_RR = torch.empty(world * world, dtype=torch.long)
    dist.all_gather_into_tensor(all_RR, pairs_R)
    all_RR = all_RR.view(world, world)
    total = sent.total
    return {
        "rows": sent.rows, "bytes": sent.bytes, "rows_across": total.rows_across, "bytes_across": total.bytes_across,
        "total_rows": total.total_rows, "uncounted": dict(sent.uncounted),
        "out": int(pairs_R.sum() - pairs_R[rank]), "in": int(all_RR[:, rank].sum() - pairs_R[rank]),
    }  # fmt: skip


def memory(
    dispatcher: str, routing: str, k: int, tokens: int = 512, d: int = 64, ff: int = 64, num: int = 8, **settings: Any
) -> dict[str, Any]:
    """Peak of all live tensors in a forward and backward."""
    step, experts, _ = one_step(dispatcher, routing, num, k, tokens, d, ff, **settings)
    gc.collect()
    tracker = MemTracker()
    tracker.track_external(experts)
    with tracker:
        step()
    return {"peak": tracker.get_tracker_snapshot("peak")[torch.device("cpu")]["Total"]}


def order(dispatcher: str) -> dict[str, Any]:
    """When the layer's other work is done, between the collectives of a forward; and its gradient."""
    events: list[str] = []

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
            name = func._schema.name
            if "all_to_all" in name and args[0].dim() == 2 and args[0].is_floating_point() and args[0].shape[1] == D:
                events.append("start")
            result = func(*args, **(kwargs or {}))
            if "wait_tensor" in name and result.dim() == 2 and result.is_floating_point() and result.shape[1] == D:
                events.append("wait")
            return result

    torch.manual_seed(0)
    full = make_experts(8, "gate", torch.float32, "eager")
    experts = local_experts(full, 8, dist.get_rank(), dist.get_world_size(), "gate", "eager", False)
    x, ids, weights, grad = make_batch("uniform", 6, 8, 2, torch.float32, dist.get_rank())
    beside = nn.Linear(D, D)
    done = []

    def meanwhile() -> None:
        events.append("meanwhile")
        done.append(beside(x))

    run = build(dispatcher, experts)
    with Watch(), dispatching(DispatchScope(meanwhile=meanwhile)):
        y = run(x, ids, weights)
    (y + done[0]).backward(grad)
    with torch.inference_mode():
        alone = build(dispatcher, experts)(x, ids, weights)
    return {"events": events, "trained": beside.weight.grad is not None, "error": error(y.detach(), alone.detach())}


def fixed(dispatcher: str) -> dict[str, Any]:
    """Whether the dispatcher reads a value back to the host, tried with tensors that have no values."""
    world = dist.get_world_size()
    full = make_experts(8, "gate", torch.float32, "grouped_mm")
    experts = local_experts(full, 8, dist.get_rank(), world, "gate", "grouped_mm", False)
    settings = {"equal_batches": True} if dispatcher == "capacity" else {}
    run = build(dispatcher, experts, **settings)
    x, ids, weights, grad = make_batch("uniform", 6, 8, 2, torch.float32, dist.get_rank())
    shapes = []
    with FakeTensorMode(allow_non_fake_inputs=True) as mode, dispatching(DispatchScope(rows_per_expert=3)):
        fake = [mode.from_tensor(each) for each in (x, ids, weights, grad)]
        run.experts_forward = lambda x_ND, ids_NK, weights_NK: x_ND * weights_NK.sum(dim=1, keepdim=True) * ids_NK[:, :1]
        try:
            shapes.append(list(run(*fake[:3]).shape))
        except DataDependentOutputException:
            return {"reads": True}
    return {"reads": False, "shapes": shapes}


def sharded(dispatcher: str, around: str, num: int = 4, mixed: bool = False, **settings: Any) -> dict[str, Any]:
    """Under Transformers' expert parallelism with FSDP2: 2 expert groups of 2 ranks, each expert cut over the 2 groups."""
    rank = dist.get_rank()
    mesh = init_device_mesh("cpu", (2, 2), mesh_dim_names=("efsdp", "ep"))
    tp_mesh = meshes()[1]
    torch.manual_seed(0)
    full = make_experts(num, "gate", torch.float64, "eager")
    torch.manual_seed(0)
    holder = nn.Module()
    holder.experts = make_experts(num, "gate", torch.float64, "eager")
    plan = {f"experts.{name}": "grouped_gemm" for name, _ in holder.experts.named_parameters()} | {
        "experts": "ep_dispatch_experts"
    }
    apply_expert_parallelism(holder, mesh["ep"], tp_mesh, plan, ep_implementation(dispatcher, **settings))
    fully_shard(holder.experts, mesh=mesh["efsdp"], reshard_after_forward=True)
    holder.experts.set_gradient_divide_factor(1.0)
    holder.experts.set_force_sum_reduction_for_comms(True)

    batches = [make_batch("one" if around == "one" else "uniform", t, num, 2, torch.float64, t) for t in (5, 0, 3, 4)]
    for x, ids, weights, grad in batches:
        if len(x):
            (double_loop(full, num, x, ids, weights) * grad).sum().backward()
    x, ids, weights, grad = batches[rank]
    wanted = double_loop(full, num, x, ids, weights)
    x, weights = x.requires_grad_(), weights.requires_grad_()
    if around == "checkpoint":
        y = checkpoint(holder.experts, x, ids, weights, use_reentrant=False)
    else:
        y = holder.experts(x, ids, weights)
    y.backward(grad)
    errors = [error(y.detach(), wanted.detach())]
    for name, parameter in holder.experts.named_parameters():
        errors.append(error(parameter.grad.full_tensor(), getattr(full, name).grad))
    return {"error": max(errors), "errors": errors}


def rounds(chunk_rows: int, **settings: Any) -> dict[str, Any]:
    """The most rows that come in a round, how many rounds there are, and all rows that come."""
    world, rank = dist.get_world_size(), dist.get_rank()
    experts = local_experts(make_experts(8, "gate", torch.float32, "eager"), 8, rank, world, "gate", "eager", False)
    _, ids, _, _ = make_batch(settings["routing"], settings["tokens"][rank], 8, settings["k"], torch.float32, rank)
    with torch.set_grad_enabled(settings["training"]):
        planned = build("chunked", experts, chunk_rows=chunk_rows)._plan(ids)
    sizes = [sum(exchange.receive_sizes) for exchange in planned.exchanges]
    return {"most": max(sizes), "rounds": len(sizes), "rows": sum(sizes)}


def refused(dispatcher: str, **settings: Any) -> dict[str, Any]:
    """The message with which settings are refused."""
    try:
        build(dispatcher, make_experts(2, "gate", torch.float32, "eager"), **settings)
    except ValueError as problem:
        return {"message": str(problem)}
    return {"message": ""}


def bf16(dispatcher: str) -> dict[str, Any]:
    """Half-precision rows with single-precision weights, against fp32 of the same numbers."""
    world, rank = dist.get_world_size(), dist.get_rank()
    torch.manual_seed(0)
    full = make_experts(8, "gate", torch.bfloat16, "grouped_mm")
    x, ids, weights, grad = make_batch("uniform", 16, 8, 4, torch.float32, rank)
    x, grad = x.bfloat16().requires_grad_(), grad.bfloat16()
    weights.requires_grad_()
    experts = local_experts(full, 8, rank, world, "gate", "grouped_mm", False)
    y = build(dispatcher, experts)(x, ids, weights)
    y.backward(grad)
    wide = full.float()
    x_32, w_32 = x.detach().float().requires_grad_(), weights.detach().clone().requires_grad_()
    y_32 = double_loop(wide, 8, x_32, ids, w_32)
    y_32.backward(grad.float())
    dtypes = [str(t.dtype) for t in (y, x.grad, weights.grad)]
    pairs = ((y.detach(), y_32.detach()), (x.grad, x_32.grad), (weights.grad, w_32.grad))
    return {"dtypes": dtypes, "error": max(error(one.float(), other) for one, other in pairs)}


def on_gpu(dispatcher: str) -> dict[str, Any]:
    """One GPU: against the double loop; and `capacity` in a CUDA graph, replayed with another batch."""
    mesh = init_device_mesh("cuda", (1,), mesh_dim_names=("ep",))
    torch.manual_seed(0)
    full = make_experts(8, "gate", torch.bfloat16, "grouped_mm", 64, 32)
    wide = make_experts(8, "gate", torch.float32, "eager", 64, 32)
    wide.load_state_dict(full.state_dict())
    run = type("OnGpu", (DISPATCHERS[dispatcher],), {"ranks_per_node": 1})(full.cuda(), mesh, mesh)
    batches = [make_batch("empty", 32, 8, 2, torch.float32, seed, 64)[:3] for seed in (0, 1)]
    wanted = [double_loop(wide, 8, x.bfloat16().float(), ids, weights).detach() for x, ids, weights in batches]
    buffers = [batches[0][0].bfloat16().cuda(), batches[0][1].cuda(), batches[0][2].cuda()]
    leaf = buffers[0].clone().requires_grad_()
    y = run(leaf, *buffers[1:])
    y.sum().backward()
    errors = [error(y.detach().float().cpu(), wanted[0])]
    if dispatcher == "capacity":
        graph = torch.cuda.CUDAGraph()
        with torch.no_grad(), torch.cuda.graph(graph):
            y = run(*buffers)
        for buffer, values in zip(buffers, batches[1], strict=True):
            buffer.copy_(values)
        graph.replay()
        errors.append(error(y.float().cpu(), wanted[1]))
    return {"errors": errors, "finite": bool(leaf.grad.isfinite().all())}


def failing(dispatcher: str) -> dict[str, Any]:
    """What rank 0 says when rank 1 is gone; the last job."""
    if dist.get_rank() == 1:
        return {"message": ""}
    time.sleep(1.0)
    try:
        one_step(dispatcher, "uniform", 8, 2, 4, D)[0]()
    except RuntimeError as problem:
        return {"message": str(problem)}
    return {"message": "no error"}


KINDS: dict[str, Any] = {
    "parity": parity, "traffic": traffic, "memory": memory, "order": order, "fixed": fixed, "sharded": sharded, "bf16": bf16,
    "failing": failing, "rounds": rounds, "refused": refused, "on_gpu": on_gpu,
}  # fmt: skip

if __name__ == "__main__":
    target = Path(sys.argv[1])
    torch.set_num_threads(1)
    if "WORLD_SIZE" in os.environ:
        dist.init_process_group("gloo")
    else:  # by itself, on a GPU
        dist.init_process_group("nccl", store=dist.HashStore(), rank=0, world_size=1)
    register_dispatchers()
    for job in json.loads((target / "jobs.json").read_text()):
        name, kind = job.pop("name"), job.pop("kind")
        begin = time.perf_counter()
        try:
            result = KINDS[kind](**job)
        except Exception as problem:
            problem.add_note(f"in job {name}")
            raise
        result["seconds"] = time.perf_counter() - begin
        (target / f"{name}.{dist.get_rank()}.json").write_text(json.dumps(result))
        if kind == "failing":
            os._exit(0)  # as if killed: no farewell to the other
    dist.destroy_process_group()
