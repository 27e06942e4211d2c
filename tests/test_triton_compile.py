"""Every Triton kernel goes through the real compiler, down to machine code, for GPUs that need not be here."""

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

pytest.importorskip("triton.backends.nvidia", reason="needs Triton")
WORKER = Path(__file__).parent / "triton_compile_worker.py"
SHARED_BYTES = {80: 163 * 1024, 90: 227 * 1024}  # per program, by compute capability
TENSOR_CORES = {80: "mma", 90: "wgmma"}
GEMMS = {"gather_up_kernel", "scatter_down_kernel", "down_backward_kernel", "weight_gradient_kernel"}
OTHERS = {"plan_tiles_kernel", "combine_kernel", "bias_gradient_kernel", "route_kernel", "route_backward_kernel"}


def compiled(capability: int, cache: Path) -> list[dict[str, Any]]:
    """In a process of its own: in this one, kernels are interpreted."""
    environment = {name: value for name, value in os.environ.items() if name != "TRITON_INTERPRET"}
    environment |= {"TRITON_CACHE_DIR": str(cache)}
    command = [sys.executable, str(WORKER), str(capability)]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    return [json.loads(line) for line in done.stdout.splitlines()]


@pytest.mark.parametrize("capability", SHARED_BYTES)
def test_compiles(capability: int, tmp_path: Path) -> None:
    rows = compiled(capability, tmp_path)
    assert {row["kernel"] for row in rows if row["dtype"] == "bf16"} == GEMMS | OTHERS
    assert {row["dtype"] for row in rows} == {"fp32", "bf16", "fp16"}
    for row in rows:
        assert row["cubin"] > 0
        assert row["shared"] <= SHARED_BYTES[capability], row
        if row["kernel"] in GEMMS and row["dtype"] != "fp32" and row["constants"].get("BLOCK_M", 0) >= 64:
            assert row[TENSOR_CORES[capability]] > 0, row
            assert row["async_copies"] > 0, row
