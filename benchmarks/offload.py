"""Decoding with offloaded experts beside plain loading: tokens/s, time to load, and peak memory, each in a process of its own.

A Llama with random experts is written on the spot (`--dense`: a checkpoint is upcycled instead; `--model`: one is taken as it
is). It decodes as `from_pretrained` loads it, and with caches of several sizes. Prints a Markdown table. Memory is the largest
resident set, less what Python and its imports take; "bound" is what it may be: other weights, cache and 10 %.

    python benchmarks/offload.py                                  # 1.2 GB, random
    python benchmarks/offload.py --dense path/to/SmolLM2-135M     # 8 copies of its FFNs, top-2
    python benchmarks/offload.py --limit 4                        # under a hard limit: a quarter of the checkpoint's size

With `--limit N` the size of the cache is left to the library, and the process, imports included, is not given more than 1/N of
the checkpoint's size: by `RLIMIT_DATA` (all private writable memory), and by a systemd scope (`MemoryMax`) where systemd runs.
Exits 1 if a process is over its bound or dies of its limit, or tokens differ from those of plain loading.
"""

from __future__ import annotations

import argparse
import json
import resource
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

WARM_UP = 4  # tokens, before the clock starts


def memory(name: str) -> int:
    """A line of this process's status, in bytes."""
    lines = Path("/proc/self/status").read_text().splitlines()
    return 1024 * next(int(line.split()[1]) for line in lines if line.startswith(f"{name}:"))


def work(options: dict[str, Any]) -> dict[str, Any]:
    """Load and decode in this process."""
    if options["limit_bytes"]:
        resource.setrlimit(resource.RLIMIT_DATA, (options["limit_bytes"],) * 2)
    import torch
    from transformers.utils import logging

    from hf_moe import MoEForCausalLM

    logging.disable_progress_bar()
    torch.set_num_threads(options["threads"])
    imported = memory("VmHWM")
    start = time.perf_counter()
    dtype = getattr(torch, options["dtype"])
    model = MoEForCausalLM.from_pretrained(options["model"], dtype=dtype, **options["arguments"])
    loaded = time.perf_counter() - start
    prompt = torch.arange(10, 10 + options["prompt"]).unsqueeze(0)
    settings = {"do_sample": False, "pad_token_id": 0}
    model.generate(prompt, max_new_tokens=WARM_UP, min_new_tokens=WARM_UP, **settings)
    start = time.perf_counter()
    tokens = model.generate(prompt, max_new_tokens=options["tokens"], min_new_tokens=options["tokens"], **settings)
    seconds = time.perf_counter() - start
    found = {
        "load_s": loaded, "tokens_per_s": options["tokens"] / seconds, "imported": imported, "peak": memory("VmHWM"),
        "weights": sum(p.nbytes for p in model.parameters()), "cache": 0, "hit_rate": 1.0, "read_per_token": 0.0,
        "output": tokens[0].tolist(),
    }  # fmt: skip
    if options["arguments"]:
        stats = model.expert_cache_stats()
        per_token = stats.bytes_read / (options["tokens"] + WARM_UP)
        found |= {"cache": stats.num_slots * stats.slot_bytes, "hit_rate": stats.hit_rate, "read_per_token": per_token}
    return found


def in_own_process(options: dict[str, Any], scope: list[str]) -> dict[str, Any]:
    command = [*scope, sys.executable, __file__, "--worker", json.dumps(options)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{options['arguments']}: exit {done.returncode}\n{done.stderr[-3000:]}")
    return json.loads(done.stdout.splitlines()[-1])


def scope_of(limit: int) -> list[str]:
    """The command that runs another one in a control group with this limit; nothing where systemd cannot."""
    command = ["systemd-run", "--scope", "--quiet", f"--property=MemoryMax={limit}", "--property=MemorySwapMax=0"]
    try:
        return command if subprocess.run([*command, "true"], capture_output=True, check=False).returncode == 0 else []
    except OSError:
        return []


def make(args: argparse.Namespace, folder: Path) -> Path:
    """The checkpoint; in a process of its own, whose memory is nobody's."""
    if args.model:
        return Path(args.model)
    target = folder / "model"
    if args.dense:
        command = ["-m", "hf_moe", "upcycle", args.dense, str(target), "--num-experts", str(args.experts), "--no-verify"]
    else:
        sizes = {
            "hidden_size": args.hidden, "intermediate_size": args.width, "num_hidden_layers": args.layers,
            "num_attention_heads": args.hidden // 64, "num_key_value_heads": args.hidden // 64, "vocab_size": 32000,
        }  # fmt: skip
        code = (
            "import sys, json; from hf_moe import MoEConfig, MoEForCausalLM\n"
            "dense = {'model_type': 'llama', 'tie_word_embeddings': True, **json.loads(sys.argv[2])}\n"
            "config = MoEConfig(text_config=dense, num_experts=int(sys.argv[3]), num_experts_per_tok=2)\n"
            "MoEForCausalLM(config).save_pretrained(sys.argv[1])"
        )
        command = ["-c", code, str(target), json.dumps(sizes), str(args.experts)]
    subprocess.run([sys.executable, *command], check=True, stdout=sys.stderr)
    return target


def compare(args: argparse.Namespace, model: Path) -> bool:
    """Run everything and print the table. Returns whether the bars are met."""
    size = sum(path.stat().st_size for path in model.glob("*.safetensors"))
    limit = int(size / args.limit) if args.limit else None
    base = {name: getattr(args, name) for name in ("dtype", "threads", "prompt", "tokens")} | {"model": str(model)}
    jobs: dict[str, tuple[dict[str, Any], int | None]] = {"plain loading": ({}, None)}
    for cache in args.cache if limit is None else []:
        for prefetch in args.prefetch:
            arguments = {"expert_offload": "disk", "expert_cache_size": cache, "expert_prefetch": prefetch}
            jobs[f"cache {cache}, prefetch {prefetch}"] = (arguments, None)
    if limit is not None:
        jobs[f"limit {limit >> 20} MiB"] = ({"expert_offload": "disk"}, limit)
    print(f"checkpoint {size / 2**20:.0f} MiB, {args.dtype}, {args.threads} thread(s), {args.prompt}+{args.tokens} tokens\n")
    print("| | load s | tokens/s | × plain | peak MiB | bound MiB | hit rate | MiB read per token |\n" + "|---" * 8 + "|")
    met, plain = True, None
    for name, (arguments, allowed) in jobs.items():
        scope = scope_of(allowed) if allowed else []
        found = in_own_process({**base, "arguments": arguments, "limit_bytes": allowed}, scope)
        plain = plain or found
        bound = 1.1 * (found["weights"] + found["cache"]) if arguments else None
        peak = found["peak"] - found["imported"]
        met &= (bound is None or allowed is not None or peak <= bound) and found["output"] == plain["output"]
        print(
            f"| {name}{' (control group)' if scope else ''} | {found['load_s']:.1f} | {found['tokens_per_s']:.2f} "
            f"| {found['tokens_per_s'] / plain['tokens_per_s']:.2f} | {peak / 2**20:.0f} "
            f"| {'' if bound is None else f'{bound / 2**20:.0f}'} | {found['hit_rate']:.2f} "
            f"| {found['read_per_token'] / 2**20:.0f} |",
            flush=True,
        )
    return met


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", help="a checkpoint of hf_moe")
    parser.add_argument("--dense", help="a dense checkpoint, to upcycle")
    for name, value in {
        "experts": 8,
        "hidden": 768,
        "width": 2048,
        "layers": 8,
        "threads": 1,
        "prompt": 16,
        "tokens": 24,
    }.items():
        parser.add_argument(f"--{name}", type=int, default=value)
    parser.add_argument("--dtype", default="float32", choices=["float32", "bfloat16", "float16"])
    parser.add_argument("--cache", nargs="+", default=["100MB", "300MB", "2GB"])
    parser.add_argument("--prefetch", nargs="+", type=int, default=[0, 1])
    parser.add_argument("--limit", type=float, help="give the process 1/LIMIT of the checkpoint's size")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        print(json.dumps(work(json.loads(args.worker))))
        return 0
    with tempfile.TemporaryDirectory() as folder:
        return 0 if compare(args, make(args, Path(folder))) else 1


if __name__ == "__main__":
    sys.exit(main())
