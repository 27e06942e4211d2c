"""Our router, its losses and its counts against Transformers' router and `load_balancing_loss_func`.

Both have the same weights and get the same tokens, new ones at every call; runs are interleaved.
Transformers' side is `MixtralTopKRouter` for each layer and one `load_balancing_loss_func` over the logits of all layers, as
`MixtralForCausalLM` runs them. Ours is a `TopKRouter` for each layer, what a `RoutingRecord` sums up, and the router losses of
all layers: more than theirs, since counts, importance, entropy and z-loss are in it. Ours projects in fp32 also where the model
is in bf16. `training` adds the backward of loss and gates, to tokens and weights.

The product of tokens and router weights is in both; "beside it" is the ratio of what is left when each side's own product
(forward, or forward and backward) is taken off. Prints medians and ratios; exits 1 if a ratio is above the bar.

    python benchmarks/router.py --experts 64 --tokens 512  # a part of the grid
    python benchmarks/router.py --json out.json            # all of it
    python benchmarks/router.py --device cuda              # with the choice in one Triton kernel
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
from collections.abc import Callable
from typing import Any

import torch
from layer import add_grid_options, interleaved, write_rows
from torch import Tensor
from torch.nn import functional as F
from tqdm import tqdm
from transformers import MixtralConfig
from transformers.models.mixtral.modeling_mixtral import MixtralTopKRouter, load_balancing_loss_func

from hf_moe import MoEConfig
from hf_moe.record import RoutingRecord
from hf_moe.router_math import project
from hf_moe.routers import TopKRouter

BAR = 0.3
GRID: dict[str, list[Any]] = {
    "dtype": ["float32", "bfloat16"],
    "experts": [8, 16, 64, 256],
    "top_k": [1, 2, 8],
    "tokens": [16, 512, 1024, 4096],
    "layers": [1, 8],
    "masked": [0, 1],
}
COEFFICIENT = 0.01
Run = Callable[[Tensor], Tensor]


class Cell:
    """The contenders of one cell of the grid: calls that take tokens `[T, D]` and return what is differentiated.

    Args:
        args: of the command line.
        dtype, experts, top_k, tokens, layers, masked: the cell; a masked batch has a quarter of padding.
    """

    def __init__(
        self, args: argparse.Namespace, dtype: str, experts: int, top_k: int, tokens: int, layers: int, masked: int
    ) -> None:
        torch.manual_seed(0)
        self.experts, self.top_k = experts, top_k
        theirs = MixtralConfig(hidden_size=args.hidden, num_local_experts=experts, num_experts_per_tok=top_k)
        ours = MoEConfig(num_experts=experts, num_experts_per_tok=top_k)
        ours._experts_implementation = "hf_moe"  # on a GPU: with the Triton kernel
        self.theirs = [MixtralTopKRouter(theirs) for _ in range(layers)]
        self.ours = [TopKRouter(ours, args.hidden, experts).to(args.device) for _ in range(layers)]
        for router, other in zip(self.theirs, self.ours, strict=True):
            torch.nn.init.normal_(router.weight, std=args.hidden**-0.5)
            other.load_state_dict(router.state_dict())
            router.to(args.device, getattr(torch, dtype))
        self.mask = torch.arange(tokens, device=args.device) < tokens * 3 // 4 if masked else None
        self.weights = [router.weight for router in (*self.theirs, *self.ours)]

    def run_theirs(self, x_TD: Tensor) -> Tensor:
        outputs = [router(x_TD) for router in self.theirs]
        logits = tuple(output[0] for output in outputs)
        loss = load_balancing_loss_func(logits, self.experts, self.top_k, self.mask)
        return COEFFICIENT * loss + sum(weights.sum() for _, weights, _ in outputs)

    def run_ours(self, x_TD: Tensor) -> Tensor:
        record, gates = RoutingRecord(), []
        for router in self.ours:
            routing = router(x_TD, self.mask)
            record.add(routing, self.experts, self.top_k, self.mask)
            gates.append(routing.weights_TK.sum())
        return COEFFICIENT * record.losses()["aux_loss"] + sum(gates)

    def project_theirs(self, x_TD: Tensor) -> Tensor:
        return sum((F.linear(x_TD, router.weight).sum() for router in self.theirs), torch.zeros(()))

    def project_ours(self, x_TD: Tensor) -> Tensor:
        return sum((project(x_TD, router.weight).sum() for router in self.ours), torch.zeros(()))

    def call(self, run: Run, batches: list[Tensor], training: bool) -> Callable[[], None]:
        """A call that runs forward, or forward and backward, on the next batch."""
        turn = itertools.cycle(batches)

        def forward() -> None:
            with torch.no_grad():
                run(next(turn))

        def forward_backward() -> None:
            leaf = next(turn).detach().requires_grad_()
            run(leaf).backward()
            for weight in self.weights:
                weight.grad = None

        return forward_backward if training else forward


def measure(args: argparse.Namespace, training: bool, cell: tuple[Any, ...]) -> dict[str, Any]:
    row = dict(zip(GRID, cell, strict=True))
    contenders = Cell(args, **row)
    shape = (row["tokens"], args.hidden)
    batches = [torch.randn(shape, dtype=getattr(torch, row["dtype"]), device=args.device) for _ in range(5)]
    runs: list[Run] = [
        contenders.run_ours, contenders.run_theirs, contenders.project_ours, contenders.project_theirs,
    ]  # fmt: skip
    calls = [contenders.call(run, batches, training) for run in runs]
    ours, theirs, our_product, their_product = interleaved(calls, args.seconds, args.device)
    beside = max(ours - our_product, 0.0) / max(theirs - their_product, 1e-9)
    times = {"ours_ms": ours, "theirs_ms": theirs, "our_product_ms": our_product, "their_product_ms": their_product}
    milliseconds = {name: 1e3 * seconds for name, seconds in times.items()}
    return {**row, "training": training, **milliseconds, "ratio": ours / theirs, "ratio_beside": beside}


def describe(row: dict[str, Any]) -> str:
    kind = "train" if row["training"] else "forward"
    masked = "masked" if row["masked"] else ""
    return (
        f"{row['dtype']:>8} E{row['experts']:<3} K{row['top_k']} T{row['tokens']:<5} L{row['layers']} {masked:<6} {kind:<8}"
        f"{row['ours_ms']:9.3f} ms {row['theirs_ms']:9.3f} ms"
        f"   product {row['our_product_ms']:8.3f} {row['their_product_ms']:8.3f}"
        f"   ratio {row['ratio']:.3f}, beside it {row['ratio_beside']:.3f}"
    )


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--hidden", type=int, default=512)
    add_grid_options(parser, GRID, seconds=1.0)
    parser.add_argument("--only", choices=["forward", "train"], help="default: both")
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    kinds = [training for training in (False, True) if args.only in (None, "train" if training else "forward")]
    cells = [cell for cell in itertools.product(*(getattr(args, axis) for axis in GRID)) if cell[2] <= cell[1]]
    rows = []
    for cell, training in tqdm(list(itertools.product(cells, kinds)), unit="cell"):
        rows.append(measure(args, training, cell))
        tqdm.write(describe(rows[-1]))
    worst = max(rows, key=lambda row: row["ratio"])
    medians = [statistics.median(row[name] for row in rows) for name in ("ratio", "ratio_beside")]
    print(f"largest ratio {worst['ratio']:.3f} (bar {BAR}); median {medians[0]:.3f}, beside the product {medians[1]:.3f}")
    print(f"{sum(row['ratio'] <= BAR for row in rows)} of {len(rows)} cells within the bar")
    write_rows(rows, args.json)
    return int(worst["ratio"] > BAR)


if __name__ == "__main__":
    sys.exit(main())
