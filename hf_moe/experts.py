# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Expert weights stacked into one tensor per projection, and the shared experts that every token passes.

`Experts` keeps the contract of Transformers (`gate_up_proj` E×2F×D, `down_proj` E×D×F, `act_fn`, `num_experts`), so that
every registered `experts_implementation` runs it. The default is `"hf_moe"` (see `hf_moe.fast_experts`).
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.integrations import use_experts_implementation

from .configuration_moe import MoEConfig
from .fast_experts import NAME, takes


@use_experts_implementation
class _StackedExperts(nn.Module):
    """The weights and the plain loop; `experts_implementation` other than `"eager"` replaces the loop."""

    config: MoEConfig
    act_fn: Callable[[Tensor], Tensor]
    _apply_gate: Callable[[Tensor], Tensor]  # given by the decorator
    num_experts: int
    has_gate: bool
    has_bias: bool

    def __init__(self, config: MoEConfig) -> None:
        super().__init__()

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """What `"eager"` runs; the decorator puts the chosen implementation in its place."""
        return self.loop(hidden_states, top_k_index, top_k_weights)

    def loop(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """`Σ_k top_k_weights[t, k] · expert[top_k_index[t, k]](hidden_states[t])`.

        Args:
            hidden_states: `[T, D]`.
            top_k_index: `[T, K]` expert ids; `num_experts` marks an empty slot.
            top_k_weights: `[T, K]`.
        """
        output_TD = torch.zeros_like(hidden_states)
        with torch.no_grad():
            slots_EKT = F.one_hot(top_k_index, num_classes=self.num_experts + 1).permute(2, 1, 0)
            hit = slots_EKT[: self.num_experts].sum(dim=(-1, -2)).nonzero()
        for expert in hit.flatten().tolist():
            slot, token = torch.where(slots_EKT[expert])
            expert_output = self._expert(expert, hidden_states[token])
            weighted = expert_output * top_k_weights[token, slot, None]
            output_TD = output_TD.index_add(0, token, weighted.to(output_TD.dtype))
        return output_TD

    def _expert(self, expert: int, x: Tensor) -> Tensor:
        def linear(rows: Tensor, name: str) -> Tensor:
            bias = getattr(self, f"{name}_bias")[expert] if self.has_bias else None
            return F.linear(rows, getattr(self, name)[expert], bias)

        hidden = linear(x, "gate_up_proj" if self.has_gate else "up_proj")
        return linear(self._apply_gate(hidden) if self.has_gate else self.act_fn(hidden), "down_proj")


class Experts(_StackedExperts):
    """E feed-forward experts with stacked weights.

    Args:
        config: names the `experts_implementation`.
        num_experts: E.
        hidden_size: D.
        intermediate_size: F.
        act_fn: activation, applied to the gate (gated) or to the up projection.
        has_gate: SwiGLU-like (`act(gate) * up`) or plain (`act(up)`).
        has_bias: whether both projections have biases.
        allow_empty_slots: whether ids equal to E occur (capacity).
        dtype: of the weights (default: torch's default dtype).
    """

    def __init__(
        self,
        config: MoEConfig,
        num_experts: int,
        hidden_size: int,
        intermediate_size: int,
        act_fn: Callable[[Tensor], Tensor],
        has_gate: bool = True,
        has_bias: bool = False,
        allow_empty_slots: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__(config)
        self.num_experts, self.hidden_dim, self.intermediate_dim = num_experts, hidden_size, intermediate_size
        self.act_fn = act_fn
        self.has_gate, self.has_bias = has_gate, has_bias
        if allow_empty_slots:
            self.allow_empty_slots()
        up_name, up_size = ("gate_up_proj", 2 * intermediate_size) if has_gate else ("up_proj", intermediate_size)
        shapes = {up_name: (up_size, hidden_size), "down_proj": (hidden_size, intermediate_size)}
        for name, (rows, columns) in shapes.items():
            self.register_parameter(name, nn.Parameter(torch.empty(num_experts, rows, columns, dtype=dtype)))
            if has_bias:
                self.register_parameter(f"{name}_bias", nn.Parameter(torch.empty(num_experts, rows, dtype=dtype)))

    def allow_empty_slots(self) -> None:
        """Skip the slots that hold the id E from now on."""
        self._is_expert_parallel = True  # Transformers' name for it: expert parallelism has such slots as well

    def forward(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """See `loop` for what is computed; the config's `experts_implementation` says how."""
        if self._needs_loop(hidden_states):
            return self.loop(hidden_states, top_k_index, top_k_weights)
        return super().forward(hidden_states, top_k_index, top_k_weights)

    def _needs_loop(self, hidden_states: Tensor) -> bool:
        """Torch's grouped GEMM takes no fp64, and only rows of a multiple of 16 bytes; the plain loop takes any."""
        # 8 of the smallest precision, bf16
        if not (hidden_states.dtype == torch.float64 or self.hidden_dim % 8 or self.intermediate_dim % 8):
            return False
        name = self.config._experts_implementation
        return name == "grouped_mm" or (name == NAME and not takes(self, hidden_states))

    def reset_parameters(self, std: float = 0.02) -> None:
        """Weights from N(0, std²), biases 0."""
        for name, parameter in self.named_parameters(recurse=False):
            init.zeros_(parameter) if name.endswith("_bias") else init.normal_(parameter, mean=0.0, std=std)

    def extra_repr(self) -> str:
        return (
            f"num_experts={self.num_experts}, hidden_size={self.hidden_dim}, intermediate_size={self.intermediate_dim}, "
            f"has_gate={self.has_gate}, has_bias={self.has_bias}"
        )


class DenseFFN(nn.Module):
    """An ordinary feed-forward block: the shared experts, and the dense half of a residual MoE.

    Args:
        hidden_size, intermediate_size: D, F.
        act_fn, has_gate, has_bias, dtype: as in `Experts`.
    """

    def __init__(
        self,
        hidden_size: int,
        intermediate_size: int,
        act_fn: Callable[[Tensor], Tensor],
        has_gate: bool = True,
        has_bias: bool = False,
        dtype: torch.dtype | None = None,
    ) -> None:
        super().__init__()
        if has_gate:
            self.gate_proj = nn.Linear(hidden_size, intermediate_size, bias=has_bias, dtype=dtype)
        self.up_proj = nn.Linear(hidden_size, intermediate_size, bias=has_bias, dtype=dtype)
        self.down_proj = nn.Linear(intermediate_size, hidden_size, bias=has_bias, dtype=dtype)
        self.act_fn = act_fn
        self.has_gate = has_gate

    def forward(self, x: Tensor) -> Tensor:
        hidden = self.act_fn(self.gate_proj(x)) * self.up_proj(x) if self.has_gate else self.act_fn(self.up_proj(x))
        return self.down_proj(hidden)

    def reset_parameters(self, std: float = 0.02) -> None:
        """Weights from N(0, std²), biases 0."""
        for name, parameter in self.named_parameters():
            if "act_fn" not in name:
                init.zeros_(parameter) if name.endswith("bias") else init.normal_(parameter, mean=0.0, std=std)
