"""Where the Triton tests run, and small experts with their inputs.

Without a GPU the tests run under Triton's interpreter (`TRITON_INTERPRET=1`, which conftest.py sets before anything imports
Triton). With one they run compiled; `TRITON_INTERPRET=1 pytest ...` interprets them there as well.
"""

from __future__ import annotations

from dataclasses import dataclass

import pytest
import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

from hf_moe import MoEConfig
from hf_moe.experts import Experts

triton_tuning = pytest.importorskip("hf_moe.triton_tuning", reason="needs Triton", exc_type=ImportError)

DEVICE = torch.device("cpu" if triton_tuning.INTERPRETED else "cuda")
needs_triton = pytest.mark.skipif(
    not triton_tuning.INTERPRETED and not torch.cuda.is_available(), reason="needs TRITON_INTERPRET=1 or a CUDA device"
)


@dataclass(frozen=True)
class Case:
    """Sizes in the order T, K, E, D, F, and what the experts are."""

    sizes: tuple[int, int, int, int, int]
    act: str = "silu"
    has_gate: bool = True
    has_bias: bool = False
    empty: bool = False  # some slots hold no expert
    transposed: bool = False

    def build(self, dtype: torch.dtype = torch.float32, seed: int = 0) -> tuple[Experts, tuple[Tensor, Tensor, Tensor]]:
        """Experts, and `hidden_states`, `top_k_index`, `top_k_weights`; floats are leaves that want gradients."""
        tokens, top_k, num_experts, hidden, width = self.sizes
        torch.manual_seed(seed)
        config = MoEConfig(num_experts=num_experts, num_experts_per_tok=top_k)
        config._experts_implementation = "eager"
        experts = Experts(
            config, num_experts, hidden, width, ACT2FN[self.act], self.has_gate, self.has_bias, allow_empty_slots=self.empty
        )
        for parameter in experts.parameters():
            nn.init.normal_(parameter, std=parameter.shape[-1] ** -0.5 if parameter.dim() == 3 else 0.3)
        scores = torch.rand(tokens, num_experts + self.empty)
        if num_experts > 3 and top_k < num_experts:
            scores[:, 1] = -1  # an expert without tokens
        x = torch.randn(tokens, hidden).to(DEVICE, dtype).requires_grad_()
        weights = torch.rand(tokens, top_k).to(DEVICE).requires_grad_()
        index = scores.argsort(dim=-1, descending=True)[:, :top_k].to(DEVICE)
        return experts.to(DEVICE, dtype), (x, index, weights)


def results(output: Tensor, experts: nn.Module, inputs: tuple[Tensor, Tensor, Tensor]) -> dict[str, Tensor]:
    """The output and every gradient (zeros for none) of a random linear function of it, by name."""
    leaves = {"x": inputs[0], "top_k_weights": inputs[2], **dict(experts.named_parameters())}
    wanted = {name: leaf for name, leaf in leaves.items() if leaf.requires_grad}
    direction = torch.randn(output.shape, generator=torch.Generator().manual_seed(7)).to(output)
    loss = (output * direction).sum() + sum(0 * leaf.sum() for leaf in wanted.values())
    gradients = torch.autograd.grad(loss, list(wanted.values()))
    return {"output": output.detach(), **dict(zip(wanted, gradients, strict=True))}


def relative_error(found: Tensor, expected: Tensor) -> float:
    """Largest difference over the largest value."""
    if not expected.numel():
        return 0.0
    return ((found.double() - expected.double()).abs().max() / expected.double().abs().max().clamp(min=1e-3)).item()
