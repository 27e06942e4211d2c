"""`experts_implementation="hf_moe"` on a CPU, beside Transformers' implementations, a dense FFN and two floors.

Contenders: ours; Transformers' `eager`, `grouped_mm` and `batched_mm` (where its copies of weights fit); a dense SwiGLU of
equal active FLOPs. They run interleaved in one process, in an order drawn anew for every round, with the same weights and
tokens; of Transformers' implementations only those are timed at length that are not far behind in a first trial. Floors: the
same FLOPs at the rate of one big GEMM, and the bytes of the touched weights at the measured read bandwidth (training reads them
twice and writes a gradient for every expert). Weights that stay in a cache from call to call can be below the second floor.

One of four kinds of run; all exit 1 if a target is missed:

    python benchmarks/experts.py --quick                   # 15 cells of the grid, some minutes
    python benchmarks/experts.py --grid --json out.json    # all 288 cells, hours
    python benchmarks/experts.py --grid --experts 8 --tokens 1 4096 --dtype bfloat16  # a part of it
    python benchmarks/experts.py --fresh                   # a new routing at every call, each contender in its own process
    python benchmarks/experts.py --memory                  # what is saved for backward

The grid repeats one routing per cell, where kernels compiled for its group sizes are found again at every call. Training never
sees a routing twice: `--fresh` times that.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import multiprocessing
import statistics
import sys
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from dataclasses import asdict, dataclass, replace
from typing import Any

import torch
from layer import interleaved, write_rows
from torch import Tensor, nn
from tqdm import tqdm
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_moe import MoEConfig
from hf_moe.experts import DenseFFN, Experts
from hf_moe.fast_experts import NAME

BAR = 1.03  # over the best of Transformers'
FRESH_BAR, MEMORY_BAR = 3.0, 0.6
THEIRS = ("eager", "grouped_mm", "batched_mm")
COPIES = 3 * 2**30  # bytes that `batched_mm` may take for copies of weights
FAR_BEHIND = 1.5  # times the fastest of Transformers' in the trial
GRID: dict[str, list[Any]] = {
    "dtype": ["bfloat16", "float32"],
    "experts": [8, 64, 256],
    "top_k": [1, 2, 8],
    "tokens": [1, 16, 512, 4096],
    "pass": ["forward", "train"],
    "routing": ["uniform", "skewed"],
}
Function = Callable[[Tensor, Tensor, Tensor], Tensor]


@dataclass(frozen=True)
class Cell:
    """A layer, a batch, and what is done; `skewed` routing prefers experts as 1 / rank (Zipf)."""

    dtype: str
    experts: int
    top_k: int
    tokens: int
    training: bool
    routing: str = "uniform"
    hidden: int = 512
    width: int = 512

    def __str__(self) -> str:
        kind = "train" if self.training else "forward"
        return (
            f"{self.dtype:>8} E{self.experts:<3} K{self.top_k} T{self.tokens:<4} F{self.width:<3} {kind:<7} {self.routing:<7}"
        )

    def flops(self) -> int:
        """Three products per expert; as many again for either gradient."""
        return (3 if self.training else 1) * 6 * self.tokens * self.top_k * self.hidden * self.width

    def expert_bytes(self) -> int:
        return 3 * self.hidden * self.width * getattr(torch, self.dtype).itemsize

    def touched_bytes(self, touched: int) -> int:
        return ((2 * touched + self.experts) if self.training else touched) * self.expert_bytes()

    def inputs(self, seed: int) -> tuple[Tensor, Tensor, Tensor]:
        """Hidden states `[T, D]`, ids `[T, K]` and their weights; in training with gradients."""
        generator, dtype = torch.Generator().manual_seed(seed), getattr(torch, self.dtype)
        x_TD = torch.randn(self.tokens, self.hidden, generator=generator).to(dtype)
        preference_E = -torch.log(torch.arange(1, self.experts + 1)) * (self.routing == "skewed")
        noise_TE = -torch.log(torch.empty(self.tokens, self.experts).exponential_(generator=generator))  # Gumbel's
        logits_TK, ids_TK = (preference_E + noise_TE).topk(self.top_k)
        weights_TK = logits_TK.softmax(-1).to(dtype)
        return x_TD.requires_grad_(self.training), ids_TK, weights_TK.requires_grad_(self.training)


QUICK = [
    *(Cell(dtype, experts, top_k, 1, False) for dtype in GRID["dtype"] for experts, top_k in [(8, 2), (64, 2), (256, 8)]),
    Cell("bfloat16", 64, 8, 16, False),
    Cell("bfloat16", 8, 1, 512, False),
    Cell("bfloat16", 64, 2, 512, True, "skewed"),
    *(Cell(dtype, 8, 2, 4096, training, "skewed") for dtype in GRID["dtype"] for training in (False, True)),
    *(Cell("bfloat16", 64, 8, 4096, training) for training in (False, True)),
]
FRESH = [
    Cell("bfloat16", 64, 8, 1024, True, width=128),
    Cell("bfloat16", 64, 8, 4096, False, width=128),
    Cell("bfloat16", 64, 8, 512, True),
    Cell("bfloat16", 64, 2, 512, True),
]
MEMORY = [
    Cell(dtype, experts, top_k, tokens, True, "skewed", width=width)
    for dtype in GRID["dtype"]
    for experts, top_k, tokens, width in [
        (8, 2, 4096, 512), (64, 8, 4096, 512), (64, 8, 1024, 128), (64, 2, 512, 512), (256, 8, 4096, 512), (8, 1, 512, 1792),
    ]
]  # fmt: skip


def dense_target(cell: Cell) -> float | None:
    """The most that our time may be over the dense FFN's; None where none is set."""
    if cell.tokens == 1 and not cell.training and cell.top_k >= 2:
        return 1.2
    if cell.tokens < 4096 or (cell.experts > 64 and (cell.training or cell.dtype != "bfloat16")):
        return None
    if cell.training:
        return 1.5 if cell.dtype == "bfloat16" else 1.15
    return 1.25 if cell.experts <= 64 else 1.6


@functools.lru_cache(maxsize=1)
def build(dtype: str, experts: int, hidden: int, width: int) -> Experts:
    torch.manual_seed(0)
    layer = Experts(MoEConfig(num_experts=experts), experts, hidden, width, ACT2FN["silu"], dtype=getattr(torch, dtype))
    layer.reset_parameters(std=0.02)
    return layer


def contender(cell: Cell, name: str) -> tuple[Function, nn.Module]:
    """What computes the layer, and the module with its parameters."""
    if name == "dense":
        ffn = DenseFFN(cell.hidden, cell.top_k * cell.width, ACT2FN["silu"], dtype=getattr(torch, cell.dtype))
        ffn.reset_parameters(std=0.02)
        return lambda x, ids, weights: ffn(x), ffn
    experts = build(cell.dtype, cell.experts, cell.hidden, cell.width)
    if name == "eager":
        return experts.loop, experts
    return functools.partial(ALL_EXPERTS_FUNCTIONS[name], experts), experts


def step(cell: Cell, function: Function, module: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    """A forward; in training also a backward into tokens, routing weights and parameters."""
    with torch.set_grad_enabled(cell.training):
        output = function(*inputs)
    if cell.training:
        output.sum().backward()
        for tensor in (*inputs, *module.parameters()):
            tensor.grad = None


def seconds_of(call: Callable[[], Any]) -> float:
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


def worth_timing(cell: Cell, calls: dict[str, Callable[[], None]]) -> list[str]:
    """The names of Transformers' implementations that may be the fastest, from a few calls after the first."""
    trial = {}
    for name in THEIRS:
        if name in calls:
            is_slow = seconds_of(calls[name]) > 0.2
            trial[name] = min(seconds_of(calls[name]) for _ in range(1 if is_slow else 5))
    return [name for name, seconds in trial.items() if seconds <= FAR_BEHIND * min(trial.values())]


def measure(cell: Cell, floors: dict[str, float], seconds: float) -> dict[str, Any]:
    """One row of the grid."""
    inputs = cell.inputs(seed=0)
    copies = (3 if cell.training else 1) * cell.tokens * cell.top_k * cell.expert_bytes()  # gathered; twice in its gradient
    names = [NAME, *(name for name in THEIRS if name != "batched_mm" or copies <= COPIES), "dense"]
    calls: dict[str, Callable[[], None]] = {
        name: functools.partial(step, cell, *contender(cell, name), inputs) for name in names
    }
    theirs = worth_timing(cell, calls)
    names = [NAME, *theirs, "dense"]
    times = dict(zip(names, interleaved([calls[name] for name in names], seconds, "cpu"), strict=True))
    best = min(theirs, key=lambda name: times[name])
    ours, touched = times[NAME], cell.touched_bytes(inputs[1].unique().numel())
    return {
        **asdict(cell), "ms": {name: 1e3 * value for name, value in times.items()}, "best": best,
        "ratio": ours / times[best], "over_dense": ours / times["dense"],
        "over_gemm_floor": ours * floors[cell.dtype] / cell.flops(), "over_bytes_floor": ours * floors["bandwidth"] / touched,
    }  # fmt: skip


def floor_rates(dtypes: set[str]) -> dict[str, float]:
    """FLOP/s of one big product per dtype, and bytes/s of reading weights that no cache holds."""
    rates = {}
    for dtype in sorted(dtypes):
        a, b = (torch.randn(2048, 2048, dtype=getattr(torch, dtype)) for _ in range(2))
        times = [seconds_of(functools.partial(torch.mm, a, b)) for _ in range(8)]
        rates[dtype] = 2 * 2048**3 / statistics.median(times[2:])
    matrix, vector = torch.ones(2**15, 2**12), torch.ones(2**12)
    times = [seconds_of(functools.partial(torch.mv, matrix, vector)) for _ in range(8)]
    return {**rates, "bandwidth": matrix.nbytes / statistics.median(times[2:])}


def run_cells(args: argparse.Namespace, cells: list[Cell]) -> tuple[list[dict[str, Any]], bool]:
    """All rows, and whether every target is met."""
    floors, rows, targets = floor_rates({cell.dtype for cell in cells}), [], []
    tqdm.write("floors: " + ", ".join(f"{name} {rate / 1e9:.1f} G/s" for name, rate in floors.items()))
    for cell in tqdm(cells, unit="cell"):
        row = measure(cell, floors, args.seconds)
        row["dense_target"] = dense_target(cell)
        rows.append(row)
        tqdm.write(
            f"{cell} ours {row['ms'][NAME]:9.3f} ms  {row['best']:>10} {row['ms'][row['best']]:9.3f} ms"
            f"  ratio {row['ratio']:.3f}  over dense {row['over_dense']:6.3f}"
            f"  over floors: gemm {row['over_gemm_floor']:7.2f}, bytes {row['over_bytes_floor']:6.2f}"
        )
    worst = max(rows, key=lambda row: row["ratio"])
    met = [row["ratio"] <= BAR for row in rows]
    targets.append(summary(f"over the best of Transformers' (largest {worst['ratio']:.3f}, bar {BAR})", met))
    groups = {
        "decode (T=1, K ≥ 2)": lambda row: row["tokens"] == 1,
        "forward, T=4096": lambda row: row["tokens"] > 1 and not row["training"],
        "forward + backward, T=4096": lambda row: row["training"],
    }
    for name, belongs in groups.items():
        chosen = [row for row in rows if row["dense_target"] and belongs(row)]
        if not chosen:
            continue
        bars = "/".join(str(bar) for bar in sorted({row["dense_target"] for row in chosen}))
        targets.append(summary(f"{name} over dense (bar {bars})", [row["over_dense"] <= row["dense_target"] for row in chosen]))
        impossible = sum(row["over_dense"] / row["over_bytes_floor"] > row["dense_target"] for row in chosen)
        if impossible:
            print(f"    in {impossible} of them reading and writing the weights alone takes longer than the bar")
    return rows, all(targets)


def summary(title: str, met: list[bool]) -> bool:
    print(f"{title}: {sum(met)} of {len(met)} cells within the bar")
    return all(met)


@functools.lru_cache(maxsize=1)
def _own_contender(cell: Cell, name: str) -> tuple[Function, nn.Module]:
    return contender(cell, name)


def fresh_call(cell: Cell, name: str, seed: int) -> float:
    """Seconds of one call, in the process that has this contender alone."""
    function, module = _own_contender(cell, name)
    inputs = cell.inputs(seed)
    return seconds_of(lambda: step(cell, function, module, inputs))


def run_fresh(args: argparse.Namespace) -> tuple[list[dict[str, Any]], bool]:
    """A new routing at every call; the contenders' processes take turns, and have the same routings."""
    names, rows, spawn = (NAME, "grouped_mm", "dense"), [], multiprocessing.get_context("spawn")
    print(f"{args.calls} calls each; all: mean from the very first on; later: median without the first {args.calls // 3}")
    for cell in [replace(cell, routing=routing) for routing in args.routing for cell in FRESH]:
        pools = {
            name: ProcessPoolExecutor(1, mp_context=spawn, initializer=torch.set_num_threads, initargs=(args.threads,))
            for name in names
        }
        times: dict[str, list[float]] = {name: [] for name in names}
        for seed in tqdm(range(args.calls), unit="round", leave=False):
            for name in names if seed % 2 == 0 else reversed(names):
                times[name].append(pools[name].submit(fresh_call, cell, name, seed).result())
        for pool in pools.values():
            pool.shutdown()
        row: dict[str, Any] = asdict(cell)
        for part, of in {"all": statistics.mean, "later": lambda t: statistics.median(t[args.calls // 3 :])}.items():
            ms = {name: 1e3 * of(values) for name, values in times.items()}
            gain, over_dense = ms["grouped_mm"] / ms[NAME], ms[NAME] / ms["dense"]
            row[part] = {**ms, "gain": gain, "over_dense": over_dense}
            print(
                f"{cell} {part:<5} ours {ms[NAME]:8.1f} ms  grouped_mm {ms['grouped_mm']:8.1f}  dense {ms['dense']:8.1f}"
                f"  {gain:5.2f} × grouped_mm, over dense {over_dense:5.2f}"
            )
        rows.append(row)
    met = [
        summary(f"{part}: ≥ {FRESH_BAR} × grouped_mm", [r[part]["gain"] >= FRESH_BAR for r in rows])
        for part in ("all", "later")
    ]
    return rows, met[0]


def saved_bytes(cell: Cell, name: str) -> int:
    """Bytes of distinct storages that autograd keeps for backward, without parameters."""
    (function, module), kept = contender(cell, name), {}

    def pack(tensor: Tensor) -> Tensor:
        kept[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = function(*cell.inputs(seed=0))
    assert output.requires_grad  # and the graph is alive, so that no storage was used twice
    own = {parameter.untyped_storage().data_ptr() for parameter in module.parameters()}
    return sum(size for pointer, size in kept.items() if pointer not in own)


def run_memory(_: argparse.Namespace) -> tuple[list[dict[str, Any]], bool]:
    rows = []
    for cell in MEMORY:
        ours, theirs = saved_bytes(cell, NAME), saved_bytes(cell, "grouped_mm")
        rows.append({**asdict(cell), "ours_mb": ours / 1e6, "grouped_mm_mb": theirs / 1e6, "ratio": ours / theirs})
        print(f"{cell} saved: ours {ours / 1e6:8.2f} MB  grouped_mm {theirs / 1e6:8.2f} MB  ratio {ours / theirs:.3f}")
    worst = max(row["ratio"] for row in rows)
    return rows, summary(
        f"saved for backward (largest {worst:.3f}, bar {MEMORY_BAR})", [r["ratio"] <= MEMORY_BAR for r in rows]
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    kind = parser.add_mutually_exclusive_group()
    for name in ("quick", "grid", "fresh", "memory"):
        kind.add_argument(f"--{name}", dest="kind", action="store_const", const=name)
    parser.set_defaults(kind="quick")
    parser.add_argument("--hidden", type=int, default=512, help="of the grid")
    parser.add_argument("--width", type=int, default=512, help="of an expert in the grid")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--seconds", type=float, default=2.0, help="least time per cell; the shorter, the noisier")
    parser.add_argument("--calls", type=int, default=30, help="of each contender in --fresh")
    for axis, values in GRID.items():
        option = f"--{axis.replace('_', '-')}"
        parser.add_argument(
            option,
            nargs="+",
            type=type(values[0]),
            default=values,
            help=f"of the grid (routing: of --fresh as well); default: {values}",
        )
    parser.add_argument("--json", help="write the rows here")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    if args.kind in ("quick", "grid"):
        grid = itertools.product(*(getattr(args, axis) for axis in GRID))
        chosen = [
            Cell(dtype, experts, top_k, tokens, kind == "train", routing, args.hidden, args.width)
            for dtype, experts, top_k, tokens, kind, routing in grid
        ]
        cells = QUICK if args.kind == "quick" else [cell for cell in chosen if cell.top_k <= cell.experts]
        rows, met = run_cells(args, cells)
    else:
        rows, met = {"fresh": run_fresh, "memory": run_memory}[args.kind](args)
    write_rows(rows, args.json)
    return int(not met)


if __name__ == "__main__":
    sys.exit(main())
