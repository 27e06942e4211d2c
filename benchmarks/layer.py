"""Our MoE layer against Transformers' `MixtralSparseMoeBlock` on the same experts implementation.

Both have the same weights and are fed the same tokens; runs are interleaved, so that both see the
same machine. Prints medians and the ratio ours / Mixtral's of every cell; exits 1 if a ratio is above the bar. The default
shape has Mixtral's proportions (expert width 3.5 times the hidden size). In bf16 our router costs more, since it computes in
fp32: with narrow experts (`--width 512`, 64 experts, top-1) that is 5 to 15 % of the layer on a CPU with bf16 matrix units.

    python benchmarks/layer.py --experts 8 --tokens 1 512  # a part of the grid
    python benchmarks/layer.py --json out.json             # all of it, about half an hour on one free core
"""

from __future__ import annotations

import argparse
import itertools
import json
import random
import statistics
import sys
import time
from collections.abc import Callable

import torch
from tqdm import tqdm
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralSparseMoeBlock

from hf_moe import MoELayer

BAR = 1.05
GRID = {"dtype": ["float32", "bfloat16"], "experts": [8, 64], "top_k": [1, 2, 8], "tokens": [1, 16, 512, 4096]}


def build(args: argparse.Namespace, dtype: torch.dtype, experts: int, top_k: int) -> tuple[torch.nn.Module, torch.nn.Module]:
    """Our layer and Mixtral's with the same weights."""
    torch.manual_seed(0)
    config = MixtralConfig(
        hidden_size=args.hidden, intermediate_size=args.width, num_local_experts=experts, num_experts_per_tok=top_k
    )
    config._experts_implementation = args.experts_implementation
    theirs = MixtralSparseMoeBlock(config)
    for parameter in theirs.parameters():
        torch.nn.init.normal_(parameter, std=0.02)
    theirs = theirs.to(dtype)
    ours = MoELayer(
        args.hidden,
        intermediate_size=args.width,
        num_experts=experts,
        num_experts_per_tok=top_k,
        experts_implementation=args.experts_implementation,
        dtype=dtype,
    )
    with torch.no_grad():
        ours.gate.weight.copy_(theirs.gate.weight)
        ours.experts.gate_up_proj.copy_(theirs.experts.gate_up_proj)
        ours.experts.down_proj.copy_(theirs.experts.down_proj)
    return ours.to(args.device), theirs.to(args.device)


def step(layer: torch.nn.Module, x: torch.Tensor, training: bool) -> Callable[[], None]:
    """A call that runs the layer forward, or forward and backward."""

    def forward() -> None:
        with torch.no_grad():
            layer(x)

    leaf = x.clone().requires_grad_()

    def forward_backward() -> None:
        layer(leaf).sum().backward()
        layer.zero_grad(set_to_none=True)
        leaf.grad = None

    return forward_backward if training else forward


def interleaved(calls: list[Callable[[], None]], seconds: float, device: str) -> list[float]:
    """Median seconds of each call, run in rounds until `seconds` are spent.

    The order of a round is drawn anew: what ran before decides what is in the caches.
    """
    synchronize = torch.cuda.synchronize if device == "cuda" else (lambda: None)
    times: list[list[float]] = [[] for _ in calls]
    begin = time.perf_counter()
    for call in calls:
        call()
    slow = time.perf_counter() - begin > seconds
    for call in calls * (0 if slow else 2):
        call()
    begin, rounds, order = time.perf_counter(), 0, random.Random(0)
    while rounds < 9 or time.perf_counter() - begin < seconds:
        for i in order.sample(range(len(calls)), len(calls)):
            synchronize()
            start = time.perf_counter()
            calls[i]()
            synchronize()
            times[i].append(time.perf_counter() - start)
        rounds += 1
    return [statistics.median(t) for t in times]


def measure(args: argparse.Namespace, dtype: str, experts: int, top_k: int, tokens: int, training: bool) -> dict:
    ours, theirs = build(args, getattr(torch, dtype), experts, top_k)
    ours.train(training), theirs.train(training)
    x = torch.randn(1, tokens, args.hidden, dtype=getattr(torch, dtype), device=args.device)
    ours_s, theirs_s = interleaved([step(ours, x, training), step(theirs, x, training)], args.seconds, args.device)
    return {
        "dtype": dtype, "experts": experts, "top_k": top_k, "tokens": tokens, "training": training,
        "ours_ms": ours_s * 1e3, "mixtral_ms": theirs_s * 1e3, "ratio": ours_s / theirs_s,
    }  # fmt: skip


def add_grid_options(parser: argparse.ArgumentParser, grid: dict[str, list], seconds: float) -> None:
    """What every benchmark over a grid takes; also `benchmarks/router.py`."""
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"])
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=seconds, help="least time per cell; the shorter, the noisier")
    for axis, values in grid.items():
        option = f"--{axis.replace('_', '-')}"
        parser.add_argument(option, nargs="+", type=type(values[0]), default=values, help=f"default: {values}")
    parser.add_argument("--json", help="write the rows here")


def write_rows(rows: list[dict], path: str | None) -> None:
    """As JSON, if there is a path."""
    if path:
        with open(path, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    parser.add_argument("--width", type=int, default=1792)
    parser.add_argument("--experts-implementation", default="grouped_mm")
    add_grid_options(parser, GRID, seconds=5.0)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    cells = list(itertools.product(*(getattr(args, axis) for axis in GRID), [False, True]))
    rows = []
    for cell in tqdm(cells, unit="cell"):
        row = measure(args, *cell)
        rows.append(row)
        kind = "train" if row["training"] else "forward"
        tqdm.write(
            f"{row['dtype']:>8} E{row['experts']:<3} K{row['top_k']} T{row['tokens']:<5} {kind:<8}"
            f"{row['ours_ms']:10.3f} ms {row['mixtral_ms']:10.3f} ms   ratio {row['ratio']:.3f}"
        )
    worst = max(rows, key=lambda row: row["ratio"])
    print(f"largest ratio {worst['ratio']:.3f} (bar {BAR}); median {statistics.median(r['ratio'] for r in rows):.3f}")
    write_rows(rows, args.json)
    return int(worst["ratio"] > BAR)


if __name__ == "__main__":
    sys.exit(main())
