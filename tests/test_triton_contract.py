"""What the Triton experts promise beside the right numbers: no waiting, little memory, fallbacks, CUDA graphs."""

from __future__ import annotations

import copy
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from tiny import gradients, padded_batch, tiny
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from transformers.activations import ACT2FN
from transformers.integrations.moe import ALL_EXPERTS_FUNCTIONS, use_experts_implementation
from triton_cases import DEVICE, Case, needs_triton, relative_error, results

triton_experts = pytest.importorskip("hf_moe.triton_experts", exc_type=ImportError)
grouped = pytest.importorskip("hf_moe.triton_grouped", exc_type=ImportError)
pytestmark = needs_triton
triton_experts.register()
triton_experts_forward = triton_experts.triton_experts_forward
BIAS_EMPTY = Case((23, 3, 5, 34, 33), has_bias=True, empty=True)


class NoSync(TorchDispatchMode):
    """Fails at what asks the device for a value, or for a shape that depends on values."""

    FORBIDDEN = (
        "_local_scalar_dense",
        "nonzero",
        "item",
        "is_nonzero",
        "equal",
        "unique",
        "masked_select",
        "bincount",
        "_to_cpu",
    )

    def __init__(self) -> None:
        super().__init__()
        self.seen: list[str] = []

    def __torch_dispatch__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name = func.overloadpacket.__name__
        self.seen.append(name)
        if name.startswith(self.FORBIDDEN) or (name == "repeat_interleave" and "Tensor" in str(func)):
            raise AssertionError(f"{func} waits for the device")
        assert not any(isinstance(a, Tensor) and a.dtype == torch.bool for i in args if isinstance(i, list) for a in i), func
        return func(*args, **(kwargs or {}))


def test_never_waits_for_the_device() -> None:
    """On the functions below autograd, since a custom op hides from the mode what it does."""
    experts, (x, index, weights) = BIAS_EMPTY.build()
    with torch.no_grad():
        parts = grouped.Weights(
            experts.gate_up_proj, experts.down_proj, experts.gate_up_proj_bias, experts.down_proj_bias, "silu"
        )
        with NoSync() as mode:
            made = grouped.plan(index, 5)
            output, pre = grouped.forward(x, weights, parts, made, torch.float32, save=True)
            found = grouped.backward(torch.ones_like(x), x, weights, parts, made, pre, [True, True, True])
    assert "sort" in mode.seen
    assert output.any()
    assert all(tensor.any() for tensor in found.tensors)
    with NoSync(), pytest.raises(AssertionError, match="waits"):
        x.sum().item()


def saved_bytes(forward: Any, experts: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> int:
    """Of the storages that autograd keeps, beside parameters."""
    storages: dict[int, int] = {}

    def pack(tensor: Tensor) -> Tensor:
        storages[tensor.untyped_storage().data_ptr()] = tensor.untyped_storage().nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        output = forward(experts, *inputs)
    own = {parameter.untyped_storage().data_ptr() for parameter in experts.parameters()}
    del output
    return sum(size for pointer, size in storages.items() if pointer not in own)


@pytest.mark.parametrize("precision", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("sizes", [(64, 1, 4, 64, 64), (64, 2, 4, 64, 32), (64, 8, 16, 64, 32), (64, 2, 4, 32, 112)], ids=str)
def test_activation_memory(sizes: tuple[int, int, int, int, int], precision: torch.dtype) -> None:
    """At most 0.55 of what Transformers' grouped_mm keeps, with the input counted in full."""
    experts, inputs = Case(sizes).build(precision)
    theirs = saved_bytes(ALL_EXPERTS_FUNCTIONS["grouped_mm"], experts, inputs)
    ours = saved_bytes(triton_experts_forward, experts, inputs)
    rows = sizes[0] * sizes[1]
    assert ours >= rows * 2 * sizes[4] * precision.itemsize  # what goes into the activation is there
    assert ours <= 0.55 * theirs


def test_without_gradients_nothing_is_saved(monkeypatch: pytest.MonkeyPatch) -> None:
    experts, inputs = Case((4, 2, 3, 16, 16)).build()
    expected = triton_experts_forward(experts, *inputs)
    flags = []
    original = grouped.forward
    monkeypatch.setattr(grouped, "forward", lambda *a, **k: flags.append(a[-1]) or original(*a, **k))
    with torch.no_grad():
        output = triton_experts_forward(experts, *inputs)
    assert flags == [False]
    torch.testing.assert_close(output, expected, rtol=0, atol=0)


# what is changed about experts that are supported
UNSUPPORTED = {
    "activation": {"act_fn": ACT2FN["mish"]},
    "interleaved": {"is_concatenated": False},
    "norm": {"has_post_expert_norm": True, "post_expert_norm": nn.Identity()},
}


@pytest.mark.parametrize("change", UNSUPPORTED)
def test_falls_back(change: str) -> None:
    experts, inputs = Case((6, 2, 3, 16, 16)).build()
    for name, value in UNSUPPORTED[change].items():
        setattr(experts, name, value)
    assert not triton_experts.supports(experts, inputs[0])
    expected = results(ALL_EXPERTS_FUNCTIONS["grouped_mm"](experts, *inputs), experts, inputs)
    found = results(triton_experts_forward(experts, *inputs), experts, inputs)
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=0, atol=0)


def test_falls_back_with_a_gate_of_its_own() -> None:
    @use_experts_implementation
    class Clipped(nn.Module):
        def __init__(self, config: Any, like: nn.Module) -> None:
            super().__init__()
            self.gate_up_proj, self.down_proj, self.act_fn = like.gate_up_proj, like.down_proj, like.act_fn
            self.num_experts = like.num_experts

        def _apply_gate(self, hidden: Tensor) -> Tensor:
            gate, up = hidden.chunk(2, dim=-1)
            return gate.sigmoid() * up.clamp(-0.1, 0.1)

        def forward(self, *inputs: Tensor) -> None:
            pytest.fail("the decorator replaces this, unless 'eager' is asked for")

    experts, inputs = Case((6, 2, 3, 16, 16)).build()
    clipped = Clipped(experts.config, experts)
    assert not triton_experts.supports(clipped, inputs[0])
    expected = ALL_EXPERTS_FUNCTIONS["grouped_mm"](clipped, *inputs)
    torch.testing.assert_close(triton_experts_forward(clipped, *inputs), expected, rtol=0, atol=0)


@pytest.mark.parametrize("dtype", [torch.float64, torch.float8_e4m3fn])
def test_dtypes_that_are_not_taken(dtype: torch.dtype) -> None:
    experts, inputs = Case((6, 2, 3, 16, 16)).build()
    assert not triton_experts.supports(copy.deepcopy(experts).to(dtype), inputs[0])
    assert not triton_experts.supports(experts, inputs[0].detach().to(dtype))


@pytest.mark.parametrize("case", [BIAS_EMPTY, Case((17, 2, 3, 35, 20), act="gelu_new", has_gate=False)], ids=["gated", "plain"])
def test_compiles_without_a_break(case: Case) -> None:
    experts, inputs = case.build()
    expected = results(triton_experts_forward(experts, *inputs), experts, inputs)
    torch._dynamo.reset()
    compiled = torch.compile(lambda *a: triton_experts_forward(experts, *a), fullgraph=True, backend="aot_eager")
    found = results(compiled(*inputs), experts, inputs)
    for name, tensor in expected.items():
        assert relative_error(found[name], tensor) < 2e-6, name


@pytest.mark.parametrize("save", [True, False])
def test_custom_op_is_described_right(save: bool) -> None:
    """Schema, fake tensors and autograd registration, checked by torch."""
    experts, (x, index, weights) = Case((6, 2, 3, 16, 8), has_bias=True).build(torch.bfloat16)
    parameters = (experts.gate_up_proj, experts.down_proj, experts.gate_up_proj_bias, experts.down_proj_bias)
    if not save:
        x, weights, *parameters = (tensor.detach() for tensor in (x, weights, *parameters))
    arguments = (x, index, weights, *parameters, "silu", torch.bfloat16, save)
    torch.library.opcheck(torch.ops.hf_moe.triton_experts, arguments, test_utils=("test_schema", "test_faketensor"))
    torch.library.opcheck(torch.ops.hf_moe.triton_experts, arguments, test_utils="test_autograd_registration")


@pytest.mark.parametrize("family", ["llama", "gpt2"])
def test_in_a_model(family: str) -> None:
    """By its name, with padding, through the router: the losses' gradients are those of the loop."""
    model = tiny(family).to(DEVICE)
    batch = {name: tensor.to(DEVICE) for name, tensor in padded_batch().items()}
    found = {}
    for implementation in ("eager", triton_experts.NAME):
        model.set_experts_implementation(implementation)
        model.zero_grad()
        outputs = model(**batch)
        outputs.loss.backward()
        found[implementation] = {"logits": outputs.logits.detach(), **gradients(model)}
    for name, tensor in found["eager"].items():
        torch.testing.assert_close(found[triton_experts.NAME][name], tensor, rtol=1e-4, atol=2e-6)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="needs a CUDA device and compiled kernels")
def test_cuda_graph() -> None:
    """Captured with one routing and replayed with another, forward and backward."""
    experts, (x, index, weights) = BIAS_EMPTY.build()
    leaves = [x, weights, *experts.parameters()]

    def step() -> list[Tensor]:
        output = triton_experts_forward(experts, x, index, weights)
        return [output.detach(), *torch.autograd.grad(output.square().sum(), leaves)]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiles and tunes
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        index.copy_((index + 2) % 6)
        x.normal_()
    graph.replay()
    for found, expected in zip(captured, step(), strict=True):
        torch.testing.assert_close(found, expected)


@pytest.mark.gpu
@pytest.mark.skipif(DEVICE.type != "cuda", reason="the other tests are interpreted already")
@pytest.mark.parametrize("file", ["test_triton_experts.py", "test_triton_contract.py", "test_triton_router.py"])
def test_interpreter_on_a_machine_with_a_gpu(file: str) -> None:
    environment = {**os.environ, "TRITON_INTERPRET": "1"}
    command = [sys.executable, "-m", "pytest", "-n", "0", str(Path(__file__).parent / file)]
    assert subprocess.run(command, env=environment, check=False).returncode == 0
