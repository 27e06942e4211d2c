"""A whole model: training step and generation of ours, of the same weights in `MixtralForCausalLM`, and of a dense model.

The dense model has the same layers with an FFN as wide as the experts that a token passes: equal active size. Every contender
lives in a process of its own (peak memory is then its own, and no kernel cached by one serves another); they take turns, one
step each, in alternating order. Every step has a new batch, the same for all.

A training step is timed in two parts: forward and backward with all losses; and what the optimizer does (AdamW's step and
`zero_grad`), which touches every expert, of a dense model far fewer weights. Ratios are printed for the first and for the sum.
Decoding is the time of N + 1 new tokens less the time of one, over N. Prints the bars of the sizes that have one.

    python benchmarks/model.py SmolLM2-135M          # a folder with a dense Llama or Mistral: upcycled to 8 experts, top-2
    python benchmarks/model.py --random --json out.json  # 126 M parameters: 16 experts, top-2; 64 experts, top-8
"""

from __future__ import annotations

import argparse
import json
import multiprocessing
import os
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

import torch
from tqdm import tqdm

CONTENDERS = ("ours", "mixtral", "dense")
PRECISIONS = ("float32", "bfloat16", "autocast")
# (size, task, precision): the most that our time may be, over the dense model's
BARS = {
    ("E16 K2", "train", "bfloat16"): 1.6,
    ("E64 K8", "train", "bfloat16"): 2.2,
    ("E16 K2", "train", "float32"): 1.2,
    ("E64 K8", "train", "float32"): 1.35,
    **{(size, "decode 1", precision): 1.1 for size in ("E16 K2", "E64 K8") for precision in ("float32", "bfloat16")},
}
RANDOM_SIZES = {"E16 K2": (16, 2, 512), "E64 K8": (64, 8, 128)}  # experts, per token, expert width
AUX_LOSS = {"router_aux_loss_coef": 0.01}


@dataclass(frozen=True)
class Job:
    """What a worker is started for; everything in it can be sent to a process."""

    folder: str
    precision: str
    implementation: str | None
    is_mixtral: bool
    options: argparse.Namespace


class Worker:
    """A model in a process of its own.

    Args:
        job: which.
    """

    def __init__(self, job: Job) -> None:
        from transformers import AutoModelForCausalLM
        from transformers.utils import logging

        import hf_moe.auto  # noqa: F401  registers the model

        logging.disable_progress_bar()
        torch.set_num_threads(job.options.threads)
        dtype = torch.bfloat16 if job.precision == "bfloat16" else torch.float32
        chosen = {"experts_implementation": job.implementation} if job.implementation else {}
        self.model = AutoModelForCausalLM.from_pretrained(job.folder, dtype=dtype, **chosen)
        self.job, self.options = job, job.options
        self.optimizer: torch.optim.Optimizer | None = None
        self.vocabulary = self.model.config.get_text_config().vocab_size

    def tokens(self, seed: int, batch: int, length: int) -> torch.Tensor:
        """Zipf-like ids, so that routing is as uneven as on text."""
        generator = torch.Generator().manual_seed(seed)
        uniform = torch.rand(batch, length, generator=generator)
        return (self.vocabulary**uniform - 1).long().clamp(max=self.vocabulary - 1)

    def train(self, seed: int) -> dict[str, float]:
        """One step; seconds of its parts."""
        if self.optimizer is None:
            kind = {self.options.optimizer: True}
            self.optimizer = torch.optim.AdamW(self.model.train().parameters(), lr=1e-5, **kind)
        ids = self.tokens(seed, self.options.batch, self.options.length)
        extra = {"output_router_logits": True} if self.job.is_mixtral else {}  # Mixtral's losses come with them
        autocast = torch.autocast("cpu", torch.bfloat16) if self.job.precision == "autocast" else nullcontext()
        start = time.perf_counter()
        with autocast:
            loss = self.model(input_ids=ids, labels=ids, use_cache=False, **extra).loss
        loss.backward()
        middle = time.perf_counter()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"forward_backward": middle - start, "optimizer": time.perf_counter() - middle}

    @torch.no_grad()
    def decode(self, seed: int, batch: int) -> dict[str, float]:
        """Seconds of one decoding step, the mean of several; and of the prompt with its first token."""
        self.model.eval()
        ids = self.tokens(seed, batch, self.options.prompt)
        steps = self.options.new_tokens
        seconds = []
        autocast = torch.autocast("cpu", torch.bfloat16) if self.job.precision == "autocast" else nullcontext()
        for count in (1, steps + 1):
            arguments = {"max_new_tokens": count, "min_new_tokens": count, "do_sample": False, "pad_token_id": 0}
            start = time.perf_counter()
            with autocast:
                self.model.generate(ids, attention_mask=torch.ones_like(ids), **arguments)
            seconds.append(time.perf_counter() - start)
        return {"decode": (seconds[1] - seconds[0]) / steps, "prompt": seconds[0]}


def serve(pipe: Connection, job: Job) -> None:
    """The worker's process: answers each (method, arguments) with the result and the peak memory, until told to end."""
    worker = Worker(job)
    while (request := pipe.recv()) is not None:
        method, arguments = request
        pipe.send((getattr(worker, method)(*arguments), peak_bytes()))


def peak_bytes() -> int:
    """Most memory that this process has held (resident)."""
    for line in Path("/proc/self/status").read_text(encoding="ascii").splitlines():
        if line.startswith("VmHWM"):
            return int(line.split()[1]) * 1024
    raise OSError("/proc/self/status has no VmHWM: run it on Linux.")


@contextmanager
def workers(jobs: dict[str, Job]) -> Iterator[dict[str, Connection]]:
    """A process per job, and the pipes to them."""
    spawn = multiprocessing.get_context("spawn")
    pipes, processes = {}, []
    for name, job in jobs.items():
        pipes[name], theirs = spawn.Pipe()
        processes.append(spawn.Process(target=serve, args=(theirs, job), daemon=True))
        processes[-1].start()
        theirs.close()
    try:
        yield pipes
        for pipe in pipes.values():
            pipe.send(None)
        for process in processes:
            process.join()
    finally:
        for process in processes:
            process.terminate()


def in_turn(jobs: dict[str, Job], rounds: int, method: str, *arguments: Any) -> dict[str, dict[str, float]]:
    """Medians of what the workers time, and their peak memory; the first two rounds only warm up."""
    found: dict[str, list[dict[str, float]]] = {name: [] for name in jobs}
    peaks = dict.fromkeys(jobs, 0)
    with workers(jobs) as pipes:
        for step in tqdm(range(rounds + 2), desc=f"{method} {'/'.join(map(str, arguments))}", unit="round", leave=False):
            for name in list(jobs) if step % 2 else reversed(list(jobs)):
                pipes[name].send((method, (step, *arguments)))
                times, peaks[name] = pipes[name].recv()
                found[name].append(times)
    medians = {
        name: {part: statistics.median(times[part] for times in rows[2:]) for part in rows[0]} for name, rows in found.items()
    }
    return {name: {**parts, "peak_bytes": float(peaks[name])} for name, parts in medians.items()}


def make_models(args: argparse.Namespace, size: str, folder: Path) -> dict[str, str]:
    """Write the contenders' checkpoints; their folders."""
    from hf_moe.conversion import export, upcycle
    from transformers import AutoConfig, AutoModelForCausalLM, LlamaConfig

    from hf_moe import MoEConfig, MoEForCausalLM

    paths = {name: str(folder / name) for name in CONTENDERS}
    torch.manual_seed(0)
    if args.random:
        experts, top_k, width = RANDOM_SIZES[size]
        text = {"hidden_size": 512, "num_hidden_layers": 8, "num_attention_heads": 8, "num_key_value_heads": 8}
        text |= {"vocab_size": 32000, "tie_word_embeddings": True}
        moe = MoEConfig(
            text_config=LlamaConfig(**text, intermediate_size=width), num_experts=experts, num_experts_per_tok=top_k, **AUX_LOSS
        )
        MoEForCausalLM(moe).save_pretrained(paths["ours"])
        dense = LlamaConfig(**text, intermediate_size=top_k * width)
    else:
        upcycle(args.dense, paths["ours"], num_experts=8, num_experts_per_tok=2, **AUX_LOSS)
        dense = AutoConfig.from_pretrained(args.dense)
        dense.intermediate_size *= 2
    export(paths["ours"], paths["mixtral"], format="mixtral")
    AutoModelForCausalLM.from_config(dense, dtype=torch.float32).save_pretrained(paths["dense"])
    return paths


def implementations(args: argparse.Namespace) -> dict[str, str | None]:
    """The experts implementation of each contender."""
    from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

    import hf_moe.auto  # noqa: F401  registers ours

    ours = args.experts_implementation or ("hf_moe" if "hf_moe" in ALL_EXPERTS_FUNCTIONS else None)
    return {"ours": ours, "mixtral": args.their_experts_implementation, "dense": None}


def report(size: str, task: str, precision: str, part: str, seconds: dict[str, float], tokens: int) -> dict[str, Any]:
    """Print one line, and give it as a row."""
    bar = BARS.get((size, task, precision)) if part != "optimizer" else None
    ratios = {f"over_{name}": seconds["ours"] / seconds[name] for name in seconds if name != "ours"}
    rates = {f"{name}_tokens_per_s": tokens / value for name, value in seconds.items()}
    shown = "".join(f"  {name} {1e3 * value:9.2f} ms ({tokens / value:7.0f}/s)" for name, value in seconds.items())
    compared = "".join(f"  {name.replace('_', ' ')} {value:.3f}" for name, value in ratios.items())
    tqdm.write(f"{size} {precision:<8} {task:<8} {part:<26}{shown}{compared}" + (f"  (bar {bar} over dense)" if bar else ""))
    return {"size": size, "precision": precision, "task": task, "part": part, "bar": bar, **ratios, **rates}


def measure(args: argparse.Namespace, size: str, precision: str, folders: dict[str, str]) -> list[dict[str, Any]]:
    """All tasks of one model in one precision."""
    chosen = implementations(args)
    jobs = {name: Job(folders[name], precision, chosen[name], name == "mixtral", args) for name in args.contenders}
    rows = []
    tqdm.write(f"{size} {precision}: experts_implementation of ours {chosen['ours']}, of mixtral {chosen['mixtral']}")
    if "train" in args.tasks:
        found = in_turn(jobs, args.rounds, "train")
        tokens = args.batch * args.length
        forward_backward = {name: parts["forward_backward"] for name, parts in found.items()}
        step = {name: parts["forward_backward"] + parts["optimizer"] for name, parts in found.items()}
        rows.append(report(size, "train", precision, "forward + backward", forward_backward, tokens))
        rows.append(report(size, "train", precision, f"with AdamW ({args.optimizer})", step, tokens))
        rows[-1]["peak_bytes"] = show_peaks(found)
    if "decode" in args.tasks:
        for batch in args.decode_batch:
            found = in_turn(jobs, args.rounds, "decode", batch)
            for part, tokens in (("decode", batch), ("prompt", batch * args.prompt)):
                seconds = {name: parts[part] for name, parts in found.items()}
                rows.append(report(size, f"{part} {batch}", precision, "generate", seconds, tokens))
            rows[-1]["peak_bytes"] = show_peaks(found)
    return rows


def show_peaks(found: dict[str, dict[str, float]]) -> dict[str, float]:
    peaks = {name: parts["peak_bytes"] for name, parts in found.items()}
    tqdm.write("    peak memory" + "".join(f"  {name} {value / 2**30:.2f} GiB" for name, value in peaks.items()))
    return peaks


def parse() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("dense", nargs="?", help="folder of a dense checkpoint, which is upcycled")
    parser.add_argument("--random", action="store_true", help="random models of 126 M parameters instead")
    parser.add_argument("--sizes", nargs="+", choices=list(RANDOM_SIZES), default=list(RANDOM_SIZES), help="of --random")
    parser.add_argument("--tasks", nargs="+", choices=["train", "decode"], default=["train", "decode"])
    parser.add_argument("--precisions", nargs="+", choices=PRECISIONS, default=list(PRECISIONS))
    parser.add_argument("--contenders", nargs="+", choices=CONTENDERS, default=list(CONTENDERS))
    parser.add_argument("--batch", type=int, default=2, help="sequences of a training step")
    parser.add_argument("--length", type=int, default=512, help="tokens of a sequence")
    parser.add_argument("--decode-batch", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--prompt", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=32)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--optimizer", choices=["fused", "foreach"], default="fused")
    parser.add_argument("--experts-implementation", help="ours (default: hf_moe where it is registered)")
    parser.add_argument("--their-experts-implementation", default="grouped_mm")
    parser.add_argument("--json", help="write the rows here")
    args = parser.parse_args()
    if args.random == (args.dense is not None):
        parser.error("give the folder of a dense checkpoint, or --random")
    if args.dense is not None and not os.path.isfile(os.path.join(args.dense, "config.json")):
        parser.error(f"{args.dense}: no config.json there. Give the folder of a dense checkpoint, or --random")
    if "ours" not in args.contenders:
        parser.error("--contenders must have 'ours' among them: ratios are of it")
    return args


def main() -> int:
    args = parse()
    torch.set_num_threads(args.threads)
    rows = []
    for size in args.sizes if args.random else ["E8 K2"]:
        with tempfile.TemporaryDirectory() as folder:
            folders = make_models(args, size, Path(folder))
            for precision in args.precisions:
                rows += measure(args, size, precision, folders)
    if args.json:
        with open(args.json, "w", encoding="utf-8") as file:
            json.dump(rows, file, indent=1)
    late = [row for row in rows if row["bar"] and row.get("over_dense", 0.0) > row["bar"]]
    if any(row["bar"] for row in rows):
        print(f"{len(late)} of {sum(bool(row['bar']) for row in rows)} ratios are above their bar")
    return int(bool(late))


if __name__ == "__main__":
    sys.exit(main())
