# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""`hf-moe upcycle`: a dense checkpoint in, a Mixture-of-Experts checkpoint out."""

from __future__ import annotations

import argparse
import json
import sys
from typing import Any


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    arguments = _parser().parse_args(argv)
    from .upcycling import upcycle  # late: `--help` need not wait for torch

    try:
        result = upcycle(
            arguments.source,
            arguments.destination,
            method=arguments.method,
            preset=arguments.preset,
            router_init=arguments.router_init,
            router_init_std=arguments.router_init_std,
            seed=arguments.seed,
            verify_exactness=not arguments.no_verify,
            gguf_file=arguments.gguf_file,
            dtype=arguments.dtype,
            **_config_fields(arguments),
        )
    except (ValueError, OSError) as error:
        print(f"hf-moe upcycle: {error}", file=sys.stderr)
        return 2
    model = result.model
    total, active = model.num_parameters(), active_parameters(model)
    print(f"wrote {arguments.destination}: {total / 1e6:.1f} M parameters, {active / 1e6:.1f} M active per token")
    if result.report is not None:
        print(result.report)
    return 0


def active_parameters(model: Any) -> int:
    """Parameters that one token uses: all but the experts it is not sent to."""
    unused = 0
    for layer in model.moe_layers:
        experts = sum(p.numel() for n, p in layer.experts.named_parameters() if not n.startswith("act_fn."))
        unused += experts * (layer.num_experts - layer.top_k) // layer.num_experts
    return model.num_parameters() - unused


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(prog="hf-moe upcycle", description=__doc__)
    parser.add_argument("source", metavar="SOURCE", help="folder or Hub id of a dense causal LM")
    parser.add_argument("destination", metavar="DESTINATION", help="folder for the MoE checkpoint")
    parser.add_argument("--method", default="copy", choices=["copy"], help="how experts are made (default: copy)")
    parser.add_argument("--preset", help="a published system's setting, e.g. mixtral, switch, deepseek_v3")
    parser.add_argument("--num-experts", type=int, help="experts per MoE layer (default: 8, or the preset's)")
    parser.add_argument("--num-experts-per-tok", type=int, help="experts per token (default: 2, or the preset's)")
    parser.add_argument("--router-type", help="top_k, noisy_top_k, switch, gshard, hash, sigmoid, hierarchical, …")
    parser.add_argument("--decoder-sparse-step", type=int, help="replace the FFN of every how many layers (default: 1)")
    parser.add_argument(
        "--config-field",
        action="append",
        default=[],
        metavar="FIELD=VALUE",
        help="any other field of MoEConfig, its value as JSON; can be repeated",
    )
    parser.add_argument("--router-init", default="normal", choices=["normal", "zeros"])
    parser.add_argument("--router-init-std", type=float, help="standard deviation of the router initialisation")
    parser.add_argument("--seed", type=int, default=0, help="of the router initialisation")
    parser.add_argument("--dtype", default="auto", choices=["auto", "float32", "bfloat16", "float16"])
    parser.add_argument("--gguf-file", help="name of the GGUF file in SOURCE")
    parser.add_argument("--no-verify", action="store_true", help="do not compare the MoE with the dense model")
    return parser


def _config_fields(arguments: argparse.Namespace) -> dict[str, Any]:
    named = ("num_experts", "num_experts_per_tok", "router_type", "decoder_sparse_step")
    fields = {name: getattr(arguments, name) for name in named if getattr(arguments, name) is not None}
    for pair in arguments.config_field:
        name, equals, value = pair.partition("=")
        if not equals:
            raise ValueError(f"`--config-field {pair}` has no value. Write FIELD=VALUE, e.g. capacity_factor=1.25.")
        try:
            fields[name] = json.loads(value)
        except json.JSONDecodeError:
            fields[name] = value
    return fields


if __name__ == "__main__":
    sys.exit(main())
