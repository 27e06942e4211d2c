"""Routers compute in fp32 and stay fp32, whatever the model's dtype and autocast."""

import copy
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from tiny import padded_batch, tiny
from torch import Tensor, nn

from hf_moe import MoEForCausalLM, MoELayer, Routing

MODES: dict[str, Callable[[MoEForCausalLM], MoEForCausalLM]] = {
    "to_bf16": lambda model: model.to(torch.bfloat16),
    "bfloat16": lambda model: model.bfloat16(),
    "half": lambda model: model.half(),
    "to_device_and_dtype": lambda model: model.to("cpu", torch.float16),
    "to_and_back": lambda model: model.to(torch.bfloat16).float(),
    "autocast": lambda model: model,
}
ROUTERS = {
    "top_k": {},
    "noisy_top_k": {"router_type": "noisy_top_k"},
    "sigmoid": {"router_type": "sigmoid"},
    "hierarchical": {"router_type": "hierarchical", "n_group": 2, "topk_group": 2},
    "strictly_balanced": {"router_type": "strictly_balanced"},
}


def routings(model: MoEForCausalLM, mode: str, batch: dict[str, Tensor]) -> list[tuple[nn.Module, tuple, Routing]]:
    """Router, its inputs and its plan, for every MoE layer of one forward."""
    found: list = []
    hooks = [
        layer.gate.register_forward_hook(lambda router, inputs, plan: found.append((router, inputs, plan)))
        for layer in model.moe_layers
    ]
    with torch.autocast("cpu", torch.bfloat16) if mode == "autocast" else nullcontext():
        outputs = model(**batch, output_router_logits=True)
    for hook in hooks:
        hook.remove()
    assert all(logits.dtype == torch.float32 for logits in outputs.router_logits)
    assert torch.isfinite(outputs.loss)
    return found


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("router", ROUTERS)
def test_router_is_fp32(router: str, mode: str) -> None:
    """Parameters and buffers keep their bits, and the plan is the one that fp32 makes of the same inputs."""
    model = tiny(**ROUTERS[router])
    for layer in model.moe_layers:
        for buffer in layer.gate.buffers():
            buffer.normal_()
    reference = copy.deepcopy(model)
    model = MODES[mode](model)
    dtype = torch.float32 if mode in ("autocast", "to_and_back") else model.dtype
    assert {parameter.dtype for parameter in model.moe_layers[0].experts.parameters()} == {dtype}
    plans = routings(model, mode, padded_batch())
    assert len(plans) == 3
    for (gate, (tokens, mask, ids), plan), layer in zip(plans, reference.moe_layers, strict=True):
        for name, tensor in layer.gate.state_dict().items():
            assert gate.state_dict()[name].dtype == torch.float32
            assert torch.equal(gate.state_dict()[name], tensor)
        expected = layer.gate(tokens.float(), mask, ids)
        assert torch.equal(plan.expert_ids_TK, expected.expert_ids_TK)
        assert torch.equal(plan.weights_TK, expected.weights_TK)
        assert torch.equal(plan.logits_TE, expected.logits_TE)


def test_low_precision_would_route_otherwise() -> None:
    """What the fp32 router is for: the same projection in bf16 chooses other experts for some tokens."""
    torch.manual_seed(0)
    gate = MoELayer(64, num_experts=32, num_experts_per_tok=4, intermediate_size=8).gate
    tokens = torch.randn(4096, 64).bfloat16()
    rough = (tokens @ gate.weight.bfloat16().T).topk(4).indices.sort().values
    exact = gate(tokens).expert_ids_TK.sort().values
    assert 0.005 < (rough != exact).any(dim=-1).float().mean() < 0.5


@pytest.mark.parametrize("mode", ["to_bf16", "autocast"])
def test_training_in_low_precision(mode: str) -> None:
    """Router gradients are fp32, and near those of fp32."""
    found = {}
    for name in (mode, "fp32"):
        model = tiny(router_z_loss_coef=0.1).train()
        model = MODES[name](model) if name == mode else model
        with torch.autocast("cpu", torch.bfloat16) if name == "autocast" else nullcontext():
            loss = model(**padded_batch()).loss
        loss.backward()
        found[name] = torch.cat([layer.gate.weight.grad.flatten() for layer in model.moe_layers])
    assert found[mode].dtype == torch.float32
    # bf16 has 8 bits, and where it moves a token to another expert the gradient jumps: direction only
    assert torch.cosine_similarity(found[mode], found["fp32"], dim=0) > 0.95


@pytest.mark.skipif(not Path("/proc/self/maps").exists(), reason="Linux says what is mapped into memory")
@pytest.mark.parametrize("router", ["top_k", "sigmoid"])  # with parameters; and with a buffer
def test_loading_in_another_precision_lets_go_of_the_file(router: str, tmp_path: Path) -> None:
    """The routers keep the file's precision, but not the file: in a view of it, all of it would stay in memory."""
    saved = tiny("llama", **ROUTERS[router])
    saved.save_pretrained(tmp_path)
    model = MoEForCausalLM.from_pretrained(tmp_path, dtype=torch.bfloat16)
    assert model.moe_layers[0].gate.weight.dtype == torch.float32
    assert torch.equal(model.moe_layers[0].gate.weight, saved.moe_layers[0].gate.weight)
    assert str(tmp_path) not in Path("/proc/self/maps").read_text()
