# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""`hf-moe consolidate`: an ordinary checkpoint of one that an expert-parallel training left.

    hf-moe consolidate run/checkpoint-1000 my-moe

It needs one process and no GPU, whatever the training ran on, and holds a tensor at a time.
"""

from __future__ import annotations

import argparse
import sys


def main(argv: list[str] | None = None) -> int:
    """Run the command; returns its exit status."""
    parser = argparse.ArgumentParser(prog="hf-moe consolidate", description=(__doc__ or "").partition("\n")[0])
    parser.add_argument("checkpoint", help="checkpoint-N folder of MoETrainer")
    parser.add_argument("output", help="folder to write the model to")
    parser.add_argument("--max_shard_size", default="50GB", help="largest file (default: %(default)s)")
    options = parser.parse_args(argv)
    from hf_moe.expert_checkpoint import consolidate

    try:
        consolidate(options.checkpoint, options.output, options.max_shard_size)
    except (ValueError, OSError) as error:
        print(f"hf-moe consolidate: {' '.join(str(error).split())}", file=sys.stderr)
        return 2
    print(f"{options.output}: ready for `from_pretrained`")
    return 0
