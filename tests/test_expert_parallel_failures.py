"""A rank that fails, or that does not come, brings the others down with a message, and none waits in silence."""

from __future__ import annotations

import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest
from families import text_config
from ranks import finished, launch

from hf_moe import MoEConfig, MoEForCausalLM


@pytest.fixture(scope="module")
def model(tmp_path_factory: Any) -> Path:
    folder = tmp_path_factory.mktemp("model")
    MoEForCausalLM(MoEConfig(text_config=text_config("llama"), num_experts=4)).save_pretrained(folder)
    return folder


def test_a_rank_that_raises(model: Path) -> None:
    """Under torchrun."""
    worker = str(Path(__file__).parent / "failing_worker.py")
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    began = time.monotonic()
    status, output = finished([*torchrun, worker, str(model), "raises", "600"], timeout=300)
    seconds = time.monotonic() - began
    assert status != 0
    assert "the data of rank 1 is damaged" in output
    assert seconds < 200  # long before the timeout


def test_a_rank_that_does_not_come(model: Path) -> None:
    with pytest.raises(AssertionError) as caught:
        launch(2, "failing_worker.py", model, "sleeps", "5")
    output = str(caught.value)
    waited = re.search(r"gave up after ([\d.]+) s", output)
    assert waited, output[-3000:]
    assert float(waited[1]) < 60
    assert re.search(r"[Tt]imed out|another rank", output), output[-3000:]  # where FSDP2 waits, the words are Gloo's
