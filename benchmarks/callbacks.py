# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""What watching the experts costs: training steps with and without `ExpertLoadCallback`, interleaved; and one log.

    python benchmarks/callbacks.py [--model ours|mixtral] [--layers 8] [--hidden 256] [--experts 16] [--rounds 20]

A step is forward, backward and AdamW on a fresh batch. "with" and "without" take turns, and the ratio is the median over
rounds of with / without. The log is timed alone, with the file that it appends to already 1 000 and 10 000 rows long.
"""

from __future__ import annotations

import argparse
import statistics
import tempfile
import time
import tracemalloc
from pathlib import Path
from typing import Any

import torch
from hf_moe.training import ExpertLoadCallback, watch_routing
from transformers import LlamaConfig, MixtralConfig, MixtralForCausalLM, TrainerControl, TrainerState, TrainingArguments

from hf_moe import MoEConfig, MoEForCausalLM


def build(arguments: argparse.Namespace) -> Any:
    """A model of about the size of a small language model."""
    shape: dict[str, Any] = {
        "vocab_size": 8192, "hidden_size": arguments.hidden, "num_hidden_layers": arguments.layers,
        "num_attention_heads": 8, "num_key_value_heads": 8, "intermediate_size": 2 * arguments.hidden,
    }  # fmt: skip
    if arguments.model == "mixtral":
        return MixtralForCausalLM(MixtralConfig(**shape, num_local_experts=arguments.experts, output_router_logits=True))
    return MoEForCausalLM(MoEConfig(text_config=LlamaConfig(**shape), num_experts=arguments.experts))


def time_steps(model: Any, callback: ExpertLoadCallback, rounds: int, batch: int, length: int) -> tuple[float, float]:
    """Seconds per step without, and the median ratio of with to without."""
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-4)

    def step() -> float:
        ids = torch.randint(0, model.config.get_text_config().vocab_size, (batch, length))
        started = time.perf_counter()
        loss = model(input_ids=ids, labels=ids, num_items_in_batch=torch.tensor(ids.numel() - batch)).loss
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        return time.perf_counter() - started

    def watched() -> float:
        watch = watch_routing(model, callback.window.add)
        seconds = step()
        watch.remove()
        return seconds

    step(), watched()
    plain, ratios = [], []
    for turn in range(rounds):
        first, second = (step, watched) if turn % 2 else (watched, step)
        times = {first: first(), second: second()}
        plain.append(times[step])
        ratios.append(times[watched] / times[step])
    return statistics.median(plain), statistics.median(ratios)


def time_logs(model: Any, callback: ExpertLoadCallback, rows: int) -> tuple[float, float]:
    """Median seconds of a log when the file has this many rows, and the bytes that 1 000 more logs leave in Python's memory."""
    with tempfile.TemporaryDirectory() as folder:
        args = TrainingArguments(output_dir=folder, report_to="none", use_cpu=True)
        state, control = TrainerState(is_world_process_zero=True), TrainerControl()
        callback.on_train_begin(args, state, control, model=model)
        ids = torch.randint(0, 8192, (1, 64))
        kept: list[Any] = []
        watch = watch_routing(model, kept.append)
        model(input_ids=ids, labels=ids)
        watch.remove()
        seconds = []

        def log(step: int) -> None:
            callback.window.add(kept[0])
            state.global_step, state.log_history = step, [{}]
            started = time.perf_counter()
            callback.on_log(args, state, control, logs={"loss": 1.0})
            seconds.append(time.perf_counter() - started)

        for step in range(1, rows + 1):
            log(step)
        tracemalloc.start()
        before = tracemalloc.get_traced_memory()[0]
        for step in range(rows + 1, rows + 1001):
            log(step)
        grown = tracemalloc.get_traced_memory()[0] - before
        tracemalloc.stop()
        callback.on_train_end(args, state, control)
        assert Path(folder, "expert_load.safetensors").stat().st_size
    return statistics.median(seconds[max(0, rows - 500) : rows]), grown


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--model", choices=["ours", "mixtral"], default="ours")
    for name, default in {"layers": 8, "hidden": 256, "experts": 16, "rounds": 20, "batch": 4, "length": 256}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    arguments = parser.parse_args()
    torch.manual_seed(0)
    model, callback = build(arguments).train(), ExpertLoadCallback()
    seconds, ratio = time_steps(model, callback, arguments.rounds, arguments.batch, arguments.length)
    print(f"step without the callback {1e3 * seconds:.1f} ms; with / without {ratio:.4f}")
    for rows in (1_000, 10_000):
        one, grown = time_logs(model, callback, rows)
        print(f"log number {rows}: {1e3 * one:.2f} ms; 1000 more logs leave {grown / 1024:.0f} KiB")


if __name__ == "__main__":
    main()
