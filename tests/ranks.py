"""Scripts that tests run as N ranks: `launch(N, script, …)`, as `torchrun --standalone --nproc_per_node N` would.

The ranks are forked from one process which has imported what takes seconds, so that a test does not wait for N of them.
"""

from __future__ import annotations

import os
import runpy
import signal
import subprocess
import sys
import tempfile
import time
import traceback
from pathlib import Path


def launch(world: int, script: str | Path, *arguments: str | Path, timeout: float = 500, **environment: str) -> str:
    """Run a script as so many ranks, or by itself as one; it has to succeed. Returns what it printed.

    Args:
        world: ranks.
        script: the name of a file beside this one, or a path.
        arguments: words of its command line.
        timeout: seconds.
        environment: variables beside those of this process.
    """
    how = [__file__, str(world)] if world > 1 else []
    command = [sys.executable, *how, str(Path(__file__).parent / script), *map(str, arguments)]
    status, output = finished(command, timeout, **environment)
    assert status == 0, output[-6000:]
    return output


def finished(command: list[str], timeout: float, **environment: str) -> tuple[int, str]:
    """Exit status and output of a command that starts processes. After `timeout` seconds all say where they are, and end."""
    environment = {**os.environ, "OMP_NUM_THREADS": "1", "PYTHONFAULTHANDLER": "1", **environment}
    # a file, since a pipe is only at its end when the last of the processes is
    with tempfile.TemporaryFile("w+", encoding="utf-8", errors="replace") as log:
        process = subprocess.Popen(command, stdout=log, stderr=subprocess.STDOUT, start_new_session=True, env=environment)
        try:
            process.wait(timeout)
        except subprocess.TimeoutExpired:
            for number in (signal.SIGABRT, signal.SIGKILL):
                os.killpg(process.pid, number)
                time.sleep(2)
            log.seek(0)
            raise AssertionError(f"not done after {timeout} s:\n{log.read()[-20000:]}") from None
        log.seek(0)
        return process.returncode, log.read()


def run(rank: int, world: int, port: int, script: Path, arguments: list[str]) -> int:
    """Be one of the ranks; returns the exit status."""
    os.environ |= {
        "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
        "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
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
    import accelerate  # noqa: F401
    import hf_moe.training.trainer  # noqa: F401
    import torch
    import transformers  # noqa: F401

    torch.set_num_threads(1)  # a fork has no other threads
    # here and not in rank 0, which would have to be told of a port that may be taken by then
    store = torch.distributed.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    ranks = set()
    for rank in range(world):
        child = os.fork()
        if not child:
            status = run(rank, world, store.port, script, arguments)
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
