"""Settings of all tests: no network, one thread (the workers of pytest-xdist share the cores), no bars, order of files."""

import os

os.environ.setdefault("HF_HUB_OFFLINE", "1")
os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")

import pytest
import torch

if not torch.cuda.is_available():  # read when Triton is first imported
    os.environ.setdefault("TRITON_INTERPRET", "1")

from transformers.utils import logging

torch.set_num_threads(1)
logging.disable_progress_bar()

SLOW = ("expert_parallel", "finetune", "resume", "dispatchers", "expert_placement", "expert_checkpoints", "distributed_counts",
        "sharded_upcycling", "trainer", "conversion_safety", "compile", "export", "expert_parallel_failures")  # fmt: skip


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    """The files that take longest come first, lest one of them is all that runs in the end."""
    items.sort(key=lambda item: item.path.stem.removeprefix("test_") not in SLOW)
