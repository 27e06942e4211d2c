"""Every `experts_implementation` that runs here computes the same outputs and gradients as the plain loop."""

from pathlib import Path

import pytest
import torch
from tiny import gradients, padded_batch, tiny
from transformers import AutoModelForCausalLM
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS

from hf_moe import MoEForCausalLM

# CUDA kernels, downloaded from the Hub by the `kernels` package.
CUDA_ONLY = ("deepgemm", "sonicmoe")
TRITON = {"hf_moe_triton"}  # where Triton is installed; see test_triton_experts.py
ON_CPU = ("eager", "batched_mm", "grouped_mm", "hf_moe")
# name: (dense family, fields)
CASES = {
    "gated": ("llama", {}),
    "gated_bias_capacity": ("llama_biases", {"capacity_factor": 0.6, "eval_capacity_factor": 0.6}),
    "plain_bias": ("gpt2", {}),
    "plain_bias_capacity": ("gpt2", {"capacity_factor": 0.6, "eval_capacity_factor": 0.6}),
    "plain_loose": ("opt", {"num_experts": 3}),
    "plain_no_bias": ("falcon_no_bias", {"num_experts_per_tok": 1}),
    "second_dropped_at_random": ("llama", {"router_type": "gshard"}),
    "one_slot_per_expert": ("llama", {"router_type": "expert_choice", "allow_non_causal": True}),
    "pyramid_shared": ("phi3", {"num_experts": [2, 4, 6], "num_shared_experts": 1}),
}
# Sums over experts and over the rows of a matrix product in another order, in fp32.
TOLERANCE = {"rtol": 1e-4, "atol": 2e-6}


def test_table_is_complete() -> None:
    """A new implementation of Transformers has to be tested, or named as one that needs CUDA."""
    assert {"eager", *ALL_EXPERTS_FUNCTIONS} - TRITON == {*ON_CPU, *CUDA_ONLY}


def test_ours_is_the_default(tmp_path: Path) -> None:
    model = tiny()
    assert {layer.experts.config._experts_implementation for layer in model.moe_layers} == {"hf_moe"}
    model.save_pretrained(tmp_path)
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path)
    assert {layer.experts.config._experts_implementation for layer in loaded.moe_layers} == {"hf_moe"}


def run(model: MoEForCausalLM, training: bool) -> tuple[torch.Tensor, dict[str, torch.Tensor]]:
    torch.manual_seed(5)
    outputs = model.train(training)(**padded_batch())
    outputs.loss.backward()
    found = gradients(model)
    model.zero_grad()
    return outputs.logits.detach(), found


@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
@pytest.mark.parametrize("implementation", [name for name in ON_CPU if name != "eager"])
@pytest.mark.parametrize("case", CASES)
def test_equals_the_loop(case: str, implementation: str, training: bool) -> None:
    family, fields = CASES[case]
    model = tiny(family, **fields)
    model.set_experts_implementation("eager")
    logits, expected = run(model, training)
    model.set_experts_implementation(implementation)
    assert {layer.experts.config._experts_implementation for layer in model.moe_layers} == {implementation}
    found_logits, found = run(model, training)
    torch.testing.assert_close(found_logits, logits, **TOLERANCE)
    assert found.keys() == expected.keys()
    for name in expected:
        torch.testing.assert_close(found[name], expected[name], **TOLERANCE)


@pytest.mark.parametrize("implementation", [*ON_CPU, *CUDA_ONLY])
def test_from_pretrained(implementation: str, tmp_path: Path) -> None:
    """The keyword reaches the layers, and does not end up in the checkpoint."""
    model = tiny()
    model.save_pretrained(tmp_path / "a")
    if implementation in CUDA_ONLY:
        pytest.skip("downloads a CUDA kernel from the Hub")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "a", experts_implementation=implementation)
    assert {layer.experts.config._experts_implementation for layer in loaded.moe_layers} == {implementation}
    found = loaded(**padded_batch()).logits
    torch.testing.assert_close(found, model(**padded_batch()).logits, **TOLERANCE)
    loaded.save_pretrained(tmp_path / "b")
    assert "experts_implementation" not in (tmp_path / "b" / "config.json").read_text()


def test_unknown_implementation() -> None:
    with pytest.raises(ValueError, match="grouped_mm"):
        tiny().set_experts_implementation("fastest")
