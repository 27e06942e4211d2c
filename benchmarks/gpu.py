"""The Triton experts on one GPU, beside what a user would pick instead and two floors, at the shapes of known models.

Contenders: `hf_moe_triton`; Transformers' `grouped_mm`, `batched_mm` (where its copy of the weights fits) and `sonicmoe`
(where its kernel loads); a dense SwiGLU of equal active FLOPs. Floors: the same FLOPs at the rate of one big GEMM, and the
bytes of the touched weights at the measured bandwidth. Calls are interleaved in alternating order, timed with CUDA events,
with the next of 16 routings at every call. Prints markdown rows for benchmarks/RESULTS.md; exits 1 if a target is missed.

    python benchmarks/gpu.py --json gpu.json                     # everything, some minutes
    python benchmarks/gpu.py --layers Mixtral-8x7B --tokens 8192 # a part of it
    python benchmarks/gpu.py --smoke                             # on a CPU, interpreted: that it runs; its times mean nothing
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import statistics
import subprocess
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

os.environ["TRITON_INTERPRET"] = "1" if "--smoke" in sys.argv else "0"  # before anything imports Triton

import torch
import transformers
import triton
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS
from transformers.integrations.sonicmoe import is_sonicmoe_loadable

from hf_moe import MoEConfig, triton_experts
from hf_moe.experts import Experts

SMOKE = "--smoke" in sys.argv
OURS = triton_experts.NAME
DEVICE = torch.device("cpu" if SMOKE else "cuda")
IMPLEMENTATIONS = (OURS, "grouped_mm", "batched_mm", "sonicmoe")


@dataclass(frozen=True)
class Layer:
    """Hidden size, expert width, experts, experts per token; whether its experts are small."""

    hidden: int
    width: int
    experts: int
    top_k: int
    fine_grained: bool = True

    def flops(self, tokens: int) -> int:
        """Of a forward: three products per expert."""
        return 6 * tokens * self.top_k * self.hidden * self.width

    def weight_bytes(self, item: int) -> int:
        """Of one expert."""
        return 3 * self.hidden * self.width * item


LAYERS = {
    "OLMoE-1B-7B": Layer(2048, 1024, 64, 8),
    "Qwen3-30B-A3B": Layer(2048, 768, 128, 8),
    "Mixtral-8x7B": Layer(4096, 14336, 8, 2, fine_grained=False),
    "DeepSeek-V3": Layer(7168, 2048, 256, 8),
}
if SMOKE:
    LAYERS = {"fine-grained (smoke)": Layer(32, 16, 8, 4), "coarse (smoke)": Layer(32, 64, 4, 2, fine_grained=False)}
DENSE = "dense, equal active FLOPs"
Function = Callable[..., Tensor]
ROUTINGS = 16  # drawn ahead, so that drawing is not timed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--layers", nargs="+", choices=LAYERS, default=list(LAYERS))
    parser.add_argument("--tokens", nargs="+", type=int, default=[12] if SMOKE else [16, 512, 8192])
    parser.add_argument("--dtype", choices=["bfloat16", "float16", "float32"], default="bfloat16")
    parser.add_argument("--rounds", type=int, default=2 if SMOKE else 30)
    parser.add_argument("--smoke", action="store_true", help="tiny shapes on a CPU under Triton's interpreter")
    parser.add_argument("--json", help="write rows, floors and targets here")
    args = parser.parse_args()
    if not SMOKE and not torch.cuda.is_available():
        parser.error("no CUDA device; `--smoke` runs without one")
    triton_experts.register()
    dtype = getattr(torch, args.dtype)
    floors = {"gemm_flops": gemm_rate(dtype), "bandwidth": bandwidth()}
    rows = []
    for name in tqdm(args.layers, unit="layer"):
        layer = with_fitting_experts(name, LAYERS[name], dtype)
        experts = build(layer, dtype)
        for tokens in args.tokens:
            for training in (False, True):
                rows += [{"layer": name, **row} for row in measure(experts, layer, tokens, training, args.rounds, floors)]
        del experts
    targets = check(rows, floors)
    report(rows, floors, targets, args.dtype)
    if args.json:
        Path(args.json).write_text(json.dumps({**machine(), **floors, "rows": rows, "targets": targets}, indent=1))
    return int(not SMOKE and not all(target["met"] for target in targets))


def with_fitting_experts(name: str, layer: Layer, dtype: torch.dtype) -> Layer:
    """Fewer experts where weights and their gradients would take more than 70 % of the memory; said when so."""
    if SMOKE:
        return layer
    fit = int(0.35 * torch.cuda.mem_get_info()[0] / layer.weight_bytes(dtype.itemsize))
    if fit >= layer.experts:
        return layer
    tqdm.write(f"{name}: {fit} of its {layer.experts} experts, as the memory of the device allows")
    return Layer(layer.hidden, layer.width, fit, layer.top_k, layer.fine_grained)


def build(layer: Layer, dtype: torch.dtype) -> Experts:
    config = MoEConfig(num_experts=layer.experts, num_experts_per_tok=layer.top_k)
    config._experts_implementation = "eager"
    with torch.device(DEVICE):
        experts = Experts(config, layer.experts, layer.hidden, layer.width, ACT2FN["silu"], dtype=dtype)
    experts.reset_parameters()
    return experts


def contenders(experts: Experts, layer: Layer, tokens: int) -> dict[str, tuple[Function, list[Tensor]]]:
    """By name: a callable of the experts' contract, and its parameters."""
    found: dict[str, tuple[Function, list[Tensor]]] = {}
    copy = tokens * layer.top_k * layer.weight_bytes(experts.down_proj.element_size())
    for name in IMPLEMENTATIONS:
        if name == "batched_mm" and not SMOKE and 3 * copy > torch.cuda.mem_get_info()[0]:
            continue
        if name == "sonicmoe" and not is_sonicmoe_loadable():
            continue
        found[name] = (functools.partial(ALL_EXPERTS_FUNCTIONS[name], experts), list(experts.parameters()))
    like = {"dtype": experts.down_proj.dtype, "device": DEVICE, "requires_grad": True}
    width = layer.top_k * layer.width
    up, down = torch.randn(2 * width, layer.hidden, **like), torch.randn(layer.hidden, width, **like)

    def dense(x: Tensor, *_: Tensor) -> Tensor:
        gate, up_ = F.linear(x, up).chunk(2, dim=-1)
        return F.linear(F.silu(gate) * up_, down)

    found[DENSE] = (dense, [up, down])
    return found


def measure(
    experts: Experts, layer: Layer, tokens: int, training: bool, rounds: int, floors: dict[str, float]
) -> list[dict[str, Any]]:
    """One row per contender; those that fail are left out, and named."""
    x = torch.randn(tokens, layer.hidden, dtype=experts.down_proj.dtype, device=DEVICE, requires_grad=training)
    indices = [torch.rand(tokens, layer.experts, device=DEVICE).topk(layer.top_k).indices for _ in range(ROUTINGS)]
    weights = torch.rand(tokens, layer.top_k, device=DEVICE, requires_grad=training)
    calls, memory = {}, {}
    for name, (function, parameters) in contenders(experts, layer, tokens).items():
        call = functools.partial(step, function, x, weights, parameters, training)
        try:
            for index in indices[:3]:  # compiles and tunes
                call(index)
            memory[name] = activation_mb(function, (x, indices[0], weights), parameters) if training else {}
            calls[name] = call
        except (RuntimeError, ImportError, ValueError) as error:  # out of memory is a RuntimeError
            tqdm.write(f"{name} left out at T={tokens}: {str(error).splitlines()[0]}")
    passes = 3 if training else 1
    flops = passes * layer.flops(tokens)
    touched = statistics.mean(index.unique().numel() for index in indices)
    # the forward reads the touched weights; the backward reads them again and writes all gradients
    touched_bytes = (touched * (1 + training) + layer.experts * training) * layer.weight_bytes(x.element_size())
    about = {"tokens": tokens, "training": training, "experts": layer.experts}
    floor = {
        "ms_at_gemm_rate": 1e3 * flops / floors["gemm_flops"],
        "ms_at_bandwidth": 1e3 * touched_bytes / floors["bandwidth"],
    }
    rows = []
    for name, seconds in interleaved(calls, indices, rounds).items():
        rate = None if name == DENSE else touched_bytes / seconds / 1e9
        done = {"name": name, "ms": 1e3 * seconds, "tflops": flops / seconds / 1e12, "weights_gb_s": rate}
        rows.append({**about, **done, **floor, "saved_mb": None, "peak_mb": None, **memory[name]})
    return rows


def step(function: Function, x: Tensor, weights: Tensor, parameters: list[Tensor], training: bool, index: Tensor) -> None:
    """A forward; in training also a backward into everything."""
    with torch.set_grad_enabled(training):
        output = function(x, index, weights)
    if training:
        torch.autograd.grad(output, [x, weights, *parameters], torch.ones_like(output), allow_unused=True)


def interleaved(calls: dict[str, Callable[[Tensor], None]], indices: list[Tensor], rounds: int) -> dict[str, float]:
    """Median seconds of each call, run in turn and in alternating order."""
    times: dict[str, list[float]] = {name: [] for name in calls}
    for turn in range(rounds):
        for name in list(calls) if turn % 2 == 0 else reversed(list(calls)):
            times[name].append(seconds_of(calls[name], indices[turn % len(indices)]))
    return {name: statistics.median(values) for name, values in times.items()}


def seconds_of(call: Callable[..., Any], *arguments: Any) -> float:
    if SMOKE:
        start = time.perf_counter()
        call(*arguments)
        return time.perf_counter() - start
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    torch.cuda.synchronize()
    begin.record()
    call(*arguments)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3


def activation_mb(function: Function, inputs: tuple[Tensor, Tensor, Tensor], parameters: list[Tensor]) -> dict[str, float]:
    """MB that autograd keeps beside parameters, and on a GPU the most that a forward and backward allocate."""
    kept: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function(*inputs)
    for parameter in parameters:
        kept.pop(parameter.untyped_storage().data_ptr(), None)
    found = {"saved_mb": sum(kept.values()) / 1e6}
    del output
    if not SMOKE:
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        step(function, inputs[0], inputs[2], parameters, True, inputs[1])
        found["peak_mb"] = (torch.cuda.max_memory_allocated() - before) / 1e6
    return found


def gemm_rate(dtype: torch.dtype) -> float:
    """FLOP/s of one big product."""
    size = 64 if SMOKE else 8192
    a, b = (torch.randn(size, size, dtype=dtype, device=DEVICE) for _ in range(2))
    times = [seconds_of(torch.mm, a, b) for _ in range(20)]
    return 2 * size**3 / statistics.median(times[5:])


def bandwidth() -> float:
    """Bytes/s of a copy, counting what is read and what is written."""
    source = torch.empty(2**16 if SMOKE else 2**30, dtype=torch.uint8, device=DEVICE)
    target = torch.empty_like(source)
    times = [seconds_of(target.copy_, source) for _ in range(20)]
    return 2 * source.numel() / statistics.median(times[5:])


def check(rows: list[dict[str, Any]], floors: dict[str, float]) -> list[dict[str, Any]]:
    """The targets, at the largest number of tokens measured."""
    most = max(row["tokens"] for row in rows)
    at = {(row["layer"], row["training"], row["name"]): row for row in rows if row["tokens"] == most}
    targets = []

    def add(layer: str, what: str, value: float, bar: float, at_most: bool = False) -> None:
        targets.append(
            {"layer": layer, "what": what, "value": value, "bar": bar, "met": value <= bar if at_most else value >= bar}
        )

    for layer in dict.fromkeys(row["layer"] for row in rows):
        ours, theirs = (at.get((layer, True, name)) for name in (OURS, "grouped_mm"))
        if ours is None:
            targets.append({"layer": layer, "what": f"{OURS} runs", "value": 0.0, "bar": 1.0, "met": False})
            continue
        if not LAYERS[layer].fine_grained:
            for training in (False, True):
                row = at[layer, training, OURS]
                kind = "forward+backward" if training else "forward"
                add(layer, f"{kind}: rate over that of a dense GEMM", 1e12 * row["tflops"] / floors["gemm_flops"], 0.75)
        if theirs is None:
            continue
        if LAYERS[layer].fine_grained:
            add(layer, "training throughput over grouped_mm", theirs["ms"] / ours["ms"], 1.2)
        add(layer, "activation memory over grouped_mm", ours["saved_mb"] / theirs["saved_mb"], 0.55, at_most=True)
    return targets


def machine() -> dict[str, str]:
    git = ["git", "-C", str(Path(__file__).parent), "describe", "--always", "--dirty"]
    commit = subprocess.run(git, capture_output=True, text=True, check=False).stdout.strip()
    device = "CPU, Triton's interpreter" if SMOKE else torch.cuda.get_device_name()
    versions = f"torch {torch.__version__}, triton {triton.__version__}, transformers {transformers.__version__}"
    return {"device": device, "versions": versions, "commit": commit or "unknown"}


def report(rows: list[dict[str, Any]], floors: dict[str, float], targets: list[dict[str, Any]], dtype: str) -> None:
    """Markdown to append to benchmarks/RESULTS.md."""
    header = "layer, E, tokens, pass, implementation, ms, × GEMM floor, × bytes floor, TFLOP/s, weights GB/s, saved MB, peak MB"
    columns = header.split(", ")
    about = machine()
    if SMOKE:
        print("SMOKE RUN: interpreted on a CPU. The times below mean nothing.\n")
    print(f"### Experts on {about['device']}\n\n{about['versions']}, commit {about['commit']}; {dtype}.")
    print(f"One big GEMM: {floors['gemm_flops'] / 1e12:.3g} TFLOP/s; copy: {floors['bandwidth'] / 1e9:.4g} GB/s.\n")
    print("| " + " | ".join(columns) + " |\n" + "|---" * len(columns) + "|")
    for row in rows:
        cells = [row["layer"], row["experts"], row["tokens"], "forward+backward" if row["training"] else "forward", row["name"]]
        cells += [f"{row['ms']:.3f}", f"{row['ms'] / row['ms_at_gemm_rate']:.2f}", f"{row['ms'] / row['ms_at_bandwidth']:.2f}"]
        cells += ["" if row[k] is None else f"{row[k]:.4g}" for k in ("tflops", "weights_gb_s", "saved_mb", "peak_mb")]
        print("| " + " | ".join(map(str, cells)) + " |")
    print("\n| target | layer | value | bar | met |\n|---|---|---|---|---|")
    for target in targets:
        met = "—" if SMOKE else "yes" if target["met"] else "no"
        print(f"| {target['what']} | {target['layer']} | {target['value']:.3f} | {target['bar']} | {met} |")


if __name__ == "__main__":
    sys.exit(main())
