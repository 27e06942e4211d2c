# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""The command `hf-moe`: hands over to the module of the sub-command that is named."""

from __future__ import annotations

import importlib
import sys

# Names, not imports: what a command needs is imported when it is run, and the core imports nothing above it.
COMMANDS = {
    "upcycle": ("hf_moe.conversion.cli:upcycle", "turn a dense checkpoint into a Mixture-of-Experts checkpoint"),
    "export": ("hf_moe.conversion.cli:export", "write a MoE checkpoint in a native format (Mixtral, Qwen3-MoE, …)"),
    "import": ("hf_moe.conversion.cli:import_moe", "read a native MoE checkpoint into hf_moe"),
    "densify": ("hf_moe.conversion.cli:densify", "make a MoE checkpoint dense again"),
    "prune": ("hf_moe.conversion.cli:prune", "drop the least used experts"),
    "inspect": ("hf_moe.conversion.cli:inspect", "parameters, experts, bytes and FLOPs of a checkpoint"),
    "train": ("hf_moe.training.finetune:main", "fine-tune a checkpoint, or a model upcycled in memory, on text or chats"),
    "plan": ("hf_moe.training.plan_command:main", "choose a mesh and a dispatcher for expert parallelism on given machines"),
    "consolidate": ("hf_moe.training.consolidate_command:main", "make a model of a checkpoint of an expert-parallel training"),
    "report": ("hf_moe.training.report:main", "a page that shows what a trained model's experts do"),
    "demo": ("hf_moe.training.demo:main", "upcycle and fine-tune a real model, from download to generated text"),
}


def main(argv: list[str] | None = None) -> int:
    """Run `hf-moe COMMAND …`; returns its exit status."""
    argv = sys.argv[1:] if argv is None else argv
    if not argv or argv[0] in ("-h", "--help"):
        print(_help())
        return 0 if argv else 2
    if argv[0] == "--version":
        from .version import __version__

        print(f"hf_moe {__version__}")
        return 0
    if argv[0] not in COMMANDS:
        print(f"hf-moe: no command {argv[0]!r}. Choose one of {', '.join(COMMANDS)}.", file=sys.stderr)
        return 2
    module, _, function = COMMANDS[argv[0]][0].partition(":")
    return getattr(importlib.import_module(module), function)(argv[1:]) or 0


def _help() -> str:
    lines = [f"  {name:<12}{description}" for name, (_, description) in COMMANDS.items()]
    usage = ["usage: hf-moe COMMAND [options]", "", *lines, "", "`hf-moe COMMAND --help` lists the options of a command."]
    return "\n".join(usage)


if __name__ == "__main__":
    sys.exit(main())
