"""A rank that fails, or that does not come, brings the others down with a message, and none waits in silence."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from families import text_config
from ranks import finished

from hf_moe import MoEConfig, MoEForCausalLM


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("model")
    MoEForCausalLM(MoEConfig(text_config=text_config("llama"), num_experts=4)).save_pretrained(folder)
    return folder


def launch(model: Path, kind: str, timeout_s: float) -> tuple[int, str, float]:
    """Exit status, all output, seconds."""
    worker = str(Path(__file__).parent / "failing_worker.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    began = time.monotonic()
    return *finished([*torchrun, worker, str(model), kind, str(timeout_s)], timeout=300), time.monotonic() - began


def test_a_rank_that_raises(model: Path) -> None:
    status, output, seconds = launch(model, "raises", timeout_s=600)
    assert status != 0
    assert "the data of rank 1 is damaged" in output
    assert seconds < 200  # long before the timeout


def test_a_rank_that_does_not_come(model: Path) -> None:
    status, output, _ = launch(model, "sleeps", timeout_s=5)
    assert status != 0
    waited = re.search(r"gave up after ([\d.]+) s", output)
    assert waited, output[-3000:]
    assert float(waited[1]) < 60
    assert re.search(r"[Tt]imed out|another rank", output), output[-3000:]  # where FSDP2 waits, the words are Gloo's
