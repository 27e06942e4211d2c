"""Worker: a training in which one rank fails, for test_expert_parallel_failures.py: `failing_worker.py MODEL KIND SECONDS`."""

import sys
import time

import torch
from accelerate import Accelerator

from hf_moe.expert_parallel import load_expert_parallel

if __name__ == "__main__":
    path, kind, timeout_s = sys.argv[1], sys.argv[2], float(sys.argv[3])
    accelerator = Accelerator(cpu=True)
    model = load_expert_parallel(path, accelerator, ep_size=accelerator.num_processes, timeout_s=timeout_s).train()
    ids = torch.randint(3, 100, (2, 8))
    for step in range(3):
        if step == 1 and accelerator.process_index == 1:
            if kind == "raises":
                raise ValueError("the data of rank 1 is damaged")
            time.sleep(90)  # longer than the other may wait
        began = time.monotonic()
        try:
            model(input_ids=ids, labels=ids).loss.backward()
        except RuntimeError:
            print(f"gave up after {time.monotonic() - began:.1f} s", flush=True)
            raise
