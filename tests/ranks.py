"""Run a script as N ranks: `ranks.py N SCRIPT ARGUMENTS…`, as `torchrun --standalone --nproc_per_node N` does.

The ranks are forked from one process which has imported what takes seconds, so that a test does not wait for N of them.
"""

from __future__ import annotations

import os
import runpy
import signal
import socket
import sys
import traceback
from pathlib import Path

import accelerate  # noqa: F401
import hf_moe.training.trainer  # noqa: F401
import torch
import transformers  # noqa: F401

RANKS = __file__


def run(rank: int, world: int, port: int, script: Path, arguments: list[str]) -> int:
    """Be one of the ranks; returns the exit status."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port),
    }  # fmt: skip
    sys.argv = [str(script), *arguments]
    sys.path.insert(0, str(script.parent))
    try:
        runpy.run_path(str(script), run_name="__main__")
    except SystemExit as end:
        return int(end.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


def main(world: int, script: Path, arguments: list[str]) -> int:
    """Start the ranks, and end them all when one fails."""
    torch.set_num_threads(1)  # a fork has no other threads
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    ranks = set()
    for rank in range(world):
        child = os.fork()
        if not child:
            status = run(rank, world, port, script, arguments)
            sys.stdout.flush()
            sys.stderr.flush()
            os._exit(status)
        ranks.add(child)
    failed = 0
    while ranks:
        child, status = os.wait()
        ranks.discard(child)
        if status and not failed:
            failed = 1
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    return failed


if __name__ == "__main__":
    sys.exit(main(int(sys.argv[1]), Path(sys.argv[2]), sys.argv[3:]))
