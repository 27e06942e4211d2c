"""Scripts that tests run as N ranks: `launch(N, script, …)`, as `torchrun --standalone --nproc_per_node N` would.

What takes seconds to import is imported once, by the fork server of `multiprocessing`, from which all ranks are forked: a
process of one Python thread. Whatever happens, a rank ends soon after its time limit.
"""

from __future__ import annotations

import faulthandler
import multiprocessing
import os
import runpy
import signal
import socket
import subprocess
import sys
import tempfile
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path

import torch

PRELOADED = [
    "torch", "torch.distributed.fsdp", "torch.distributed.tensor", "transformers", "transformers.models.llama.modeling_llama",
    "accelerate", "hf_moe", "hf_moe.expert_parallel", "hf_moe.training", "hf_moe.training.trainer",
]  # fmt: skip
GRACE_S = 60  # after which a rank ends that nobody ended
SERVER = multiprocessing.get_context("forkserver")
SERVER.set_forkserver_preload(PRELOADED)


def launch(world: int, script: str | Path, *arguments: str | Path, timeout: float = 600) -> str:
    """Run a script as so many ranks, or by itself as one; it has to succeed. Returns what it printed.

    Args:
        world: ranks.
        script: the name of a file beside this one, or a path.
        arguments: words of its command line.
        timeout: seconds.
    """
    variables = {**os.environ, "OMP_NUM_THREADS": "1"}
    words = [str(Path(__file__).parent / script), *map(str, arguments)]
    with tempfile.NamedTemporaryFile("r", encoding="utf-8", errors="replace") as log:
        process = SERVER.Process(target=start, args=(world, words, variables, log.name, timeout + GRACE_S))
        process.start()
        try:
            process.join(timeout)
        finally:
            if late := process.is_alive():
                end_group(process.pid)
                process.join()
        assert not late, f"not done after {timeout} s:\n{log.read()[-20000:]}"
        output = log.read()
        assert process.exitcode == 0, output[-20000:]
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
            end_group(process.pid)
            process.wait()
            log.seek(0)
            raise AssertionError(f"not done after {timeout} s:\n{log.read()[-20000:]}") from None
        log.seek(0)
        return process.returncode, log.read()


def end_after(limit_s: float) -> None:
    """Have this process say where it is and end, should it still be there after so many seconds.

    For processes that tests fork: a lock that another thread held at the fork is held for ever.
    """
    faulthandler.register(signal.SIGALRM, file=2, all_threads=True, chain=True)  # what comes next in the chain ends it
    signal.setitimer(signal.ITIMER_REAL, limit_s)


def end_group(group: int) -> None:
    """Have all processes of a group say where they are, and kill them."""
    for number in (signal.SIGABRT, signal.SIGKILL):
        try:
            os.killpg(group, number)
        except ProcessLookupError:
            return
        time.sleep(2)


def start(world: int, words: list[str], variables: dict[str, str], log: str, limit_s: float) -> None:
    """Start the ranks from a process of their own group, and end them all when one fails."""
    os.setsid()
    speak_to(log)
    multiprocessing.set_start_method("fork", force=True)  # as in a process that no fork server started
    os.environ.clear()
    os.environ.update(variables)
    # it listens before the ranks are there, and is served after: a fork has none of the threads that serve
    door = socket.create_server(("127.0.0.1", 0))
    address, port = door.getsockname()
    ranks = {fork(partial(run, rank, world, door, words), limit_s) for rank in range(world)}
    store = torch.distributed.TCPStore(
        address, port, is_master=True, wait_for_workers=False, master_listen_fd=door.detach()
    )  # fmt: skip
    failed = 0
    while ranks:
        child, status = os.wait()
        ranks.discard(child)
        if status and not failed:
            failed = 1
            for other in ranks:
                os.kill(other, signal.SIGKILL)
    del store
    sys.exit(failed)


def speak_to(log: str) -> None:
    """Standard output and errors, and where the threads are at a fatal signal, go to a file."""
    file = os.open(log, os.O_WRONLY | os.O_APPEND)
    for stream in (1, 2):
        os.dup2(file, stream)
    sys.stdout = os.fdopen(1, "w", buffering=1, encoding="utf-8", closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, encoding="utf-8", closefd=False)
    faulthandler.enable(sys.stderr)


def fork(work: Callable[[], None], limit_s: float) -> int:
    """A child that does `work` and ends with status 0 or 1, or says after `limit_s` seconds where it is and ends."""
    child = os.fork()
    if child:
        return child
    status = 1
    try:
        end_after(limit_s)
        work()
        status = 0
    except SystemExit as end:
        status = int(end.code or 0)
    except BaseException:
        traceback.print_exc()
    finally:
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)


def run(rank: int, world: int, door: socket.socket, words: list[str]) -> None:
    """Be one of the ranks."""
    address, port = door.getsockname()
    door.close()
    torch.set_num_threads(1)
    if world > 1:
        os.environ |= {
            "RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world), "LOCAL_WORLD_SIZE": str(world),
            "MASTER_ADDR": address, "MASTER_PORT": str(port), "TORCHELASTIC_USE_AGENT_STORE": "True",
        }  # fmt: skip
    sys.argv = words
    sys.path.insert(0, str(Path(words[0]).parent))
    runpy.run_path(words[0], run_name="__main__")
