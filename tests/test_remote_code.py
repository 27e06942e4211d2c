"""A saved checkpoint carries its code: a process without hf_moe loads it with torch and transformers alone."""

import json
import os
import subprocess
import sys
from pathlib import Path

import torch
from tiny import tensors_on_disk, tiny, token_ids

import hf_moe

# What may not be importable in the process that loads, so that nothing but the saved code can be used.
READER = """
import sys

for name in ("hf_moe", "accelerate", "peft", "datasets", "evaluate"):
    sys.modules[name] = None  # as if it were not installed
import torch
from transformers import AutoConfig, AutoModel, AutoModelForCausalLM

source, target, out = sys.argv[1:]
try:
    AutoConfig.from_pretrained(source)
    raise SystemExit("the architecture is known without its code")
except ValueError:
    pass
config = AutoConfig.from_pretrained(source, trust_remote_code=True)
model, info = AutoModelForCausalLM.from_pretrained(source, trust_remote_code=True, output_loading_info=True)
assert not any(info.values()), info
assert not any(name.startswith("hf_moe.") for name in sys.modules)
assert type(model.config) is type(config)
ids = torch.load(out)["ids"]
found = {"config": type(config).__module__, "logits": model(input_ids=ids).logits.detach()}
found["generated"] = model.generate(ids, max_new_tokens=4, do_sample=False)
found["hidden"] = AutoModel.from_pretrained(source, trust_remote_code=True)(input_ids=ids).last_hidden_state.detach()
model.train()
model.activation_checkpointing_enable()
loss = model(input_ids=ids, labels=ids).loss
loss.backward()
found["loss"] = loss.detach()
model.eval().save_pretrained(target)
again = AutoModelForCausalLM.from_pretrained(target, trust_remote_code=True)
assert torch.equal(again(input_ids=ids).logits, found["logits"])
torch.save(found, out)
"""


def read_elsewhere(source: Path, target: Path, folder: Path) -> dict:
    """What READER finds in `source` and saves to `target`."""
    out = folder / "found.pt"
    torch.save({"ids": token_ids()}, out)
    environment = {**os.environ, "HF_MODULES_CACHE": str(folder / "modules"), "HF_HUB_OFFLINE": "1", "PYTHONPATH": ""}
    command = [sys.executable, "-c", READER, str(source), str(target), str(out)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment, cwd=folder, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return torch.load(out)


def test_process_without_hf_moe(tmp_path: Path) -> None:
    model = tiny(router_type="noisy_top_k", capacity_factor=1.0, num_shared_experts=1)
    model.save_pretrained(tmp_path / "a", max_shard_size="20KB")
    found = read_elsewhere(tmp_path / "a", tmp_path / "b", tmp_path)
    assert found["config"].startswith("transformers_modules.")
    ids = token_ids()
    outputs = model(input_ids=ids, output_hidden_states=True)
    assert torch.equal(found["logits"], outputs.logits)
    assert torch.equal(found["hidden"], outputs.hidden_states[-1])
    assert torch.equal(found["generated"], model.generate(ids, max_new_tokens=4, do_sample=False))
    assert torch.isfinite(found["loss"])
    # what the other process saved is again a checkpoint of hf_moe, with the same names, values and code
    first, second = tensors_on_disk(tmp_path / "a"), tensors_on_disk(tmp_path / "b")
    assert first.keys() == second.keys()
    assert all(torch.equal(first[name], second[name]) for name in first)
    assert {path.name for path in (tmp_path / "a").glob("*.py")} == {path.name for path in (tmp_path / "b").glob("*.py")}
    loaded = hf_moe.MoEForCausalLM.from_pretrained(tmp_path / "b")
    assert torch.equal(loaded(input_ids=ids).logits, outputs.logits)


def test_saved_files(tmp_path: Path) -> None:
    """The code is copied as it is, and the config says where the classes are."""
    tiny().save_pretrained(tmp_path)
    package = Path(hf_moe.__file__).parent
    saved = {path.name for path in tmp_path.glob("*.py")}
    assert {"configuration_moe.py", "modeling_moe.py", "moe_layer.py", "record.py"} <= saved
    assert not {"__init__.py", "__main__.py", "expert_parallel.py"} & saved
    for name in saved:
        assert (tmp_path / name).read_text() == (package / name).read_text()
    assert json.loads((tmp_path / "config.json").read_text())["auto_map"] == {
        "AutoConfig": "configuration_moe.MoEConfig",
        "AutoModel": "modeling_moe.MoEModel",
        "AutoModelForCausalLM": "modeling_moe.MoEForCausalLM",
    }
