# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""`MoELayer`: a router, its experts, and what every token passes beside them. Usable in any `nn.Module`."""

from __future__ import annotations

import copy
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init
from transformers.activations import ACT2FN

from .configuration_moe import BATCH_ROUTERS, MoEConfig
from .dispatch_scope import DispatchScope, dispatching
from .experts import DenseFFN, Experts
from .fast_experts import NAME as FAST_EXPERTS
from .record import current_record
from .routers import ROUTERS, ExpertChoiceRouter
from .routing import Routing, apply_capacity, most_rows_per_expert


class MoELayer(nn.Module):
    """A Mixture-of-Experts feed-forward layer: `[..., D]` in, `[..., D]` out.

    The next to last dimension is the sequence: capacity is counted along it. Padding and token ids come from the active
    `RoutingRecord` (see `record_routing`); `MoEForCausalLM` provides it, around a layer of your own you do.

    Args:
        hidden_size: D.
        config: a `MoEConfig`; or give its fields as keywords.
        num_experts: E, for this layer (default: the config's).
        intermediate_size: F (default: the config's `moe_intermediate_size`, else 4·D).
        hidden_act: name or callable of the activation.
        has_gate: SwiGLU-like experts, or plain ones.
        has_bias: whether the experts have biases.
        dropout: probability, on the layer's output.
        dtype: of the expert weights; the router is fp32.
        config_fields: fields of `MoEConfig`, where no config is given.

    Example:
        >>> from hf_moe import MoELayer, record_routing
        >>> layer = MoELayer(64, num_experts=8, num_experts_per_tok=2, router_type="noisy_top_k", intermediate_size=128)
        >>> with record_routing() as record:
        ...     y = layer(torch.randn(4, 16, 64))
        >>> sorted(record.losses())
        ['aux_loss', 'importance_loss', 'load_loss', 'z_loss']
    """

    def __init__(
        self,
        hidden_size: int,
        config: MoEConfig | None = None,
        *,
        num_experts: int | None = None,
        intermediate_size: int | None = None,
        hidden_act: str | Callable[[Tensor], Tensor] = "silu",
        has_gate: bool = True,
        has_bias: bool = False,
        dropout: float = 0.0,
        dtype: torch.dtype | None = None,
        **config_fields: Any,
    ) -> None:
        super().__init__()
        if config is not None and config_fields:
            raise ValueError(f"Give `config` or its fields ({', '.join(config_fields)}), not both.")
        if config is None:
            if num_experts is not None:
                config_fields["num_experts"] = num_experts
            config = MoEConfig(**config_fields)
            config._experts_implementation = config._experts_implementation or FAST_EXPERTS
        self.config = config
        self.hidden_size = hidden_size
        self.num_experts = config.num_experts_per_layer[0] if num_experts is None else num_experts
        self.top_k = config.num_experts_per_tok
        self.dropout = dropout
        self.sparse_slots = config.router_type in BATCH_ROUTERS  # one slot per expert, most of them empty
        width = config.moe_intermediate_size or intermediate_size or 4 * hidden_size
        act_fn = ACT2FN[hidden_act] if isinstance(hidden_act, str) else hidden_act
        ffn: dict[str, Any] = {"act_fn": act_fn, "has_gate": has_gate, "has_bias": has_bias, "dtype": dtype}
        beside = {**ffn, "act_fn": copy.deepcopy(act_fn)}  # an activation can have parameters

        self.gate = ROUTERS[config.router_type](config, hidden_size, self.num_experts)
        # read at every call, so kept here: attributes of a config are slow to read
        self.capacity_factor = None if self.sparse_slots else config.capacity_factor
        self.eval_capacity_factor = None if self.sparse_slots else config.eval_capacity_factor
        self.has_dense_part = bool(config.num_shared_experts or config.residual_moe)
        may_drop = (self.capacity_factor, self.eval_capacity_factor) != (None, None) or config.router_type == "gshard"
        self.experts = Experts(config, self.num_experts, hidden_size, width, allow_empty_slots=may_drop, **ffn)
        if config.num_shared_experts:
            self.shared_experts = DenseFFN(hidden_size, config.num_shared_experts * width, **beside)
        if config.use_shared_expert_gate:
            self.shared_expert_gate = nn.Linear(hidden_size, 1, bias=False, dtype=dtype)
        if config.residual_moe:
            self.residual_ffn = DenseFFN(hidden_size, intermediate_size or width, **beside)
            self.residual_coefficient = nn.Linear(hidden_size, 2, dtype=dtype)
        self.reset_parameters()

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw all weights; what mixes routed and dense output starts at equal shares."""
        for child in (self.gate, self.experts, *self._beside()):
            child.reset_parameters(std)
        for name in ("shared_expert_gate", "residual_coefficient"):
            if hasattr(self, name):
                for parameter in getattr(self, name).parameters():
                    init.zeros_(parameter)

    def set_capacity_factor(self, capacity_factor: float | None) -> None:
        """Have this layer train with another capacity from now on (see `MoEConfig.capacity_factor`).

        The config, which other layers share, is left alone.

        Args:
            capacity_factor: a positive number, or `None` for dropless (`expert_choice`: for the config's K).

        Raises:
            ValueError: it is not positive, or the router has no capacity.
        """
        if self.config.router_type == "strictly_balanced":
            raise ValueError("`router_type`='strictly_balanced' has no capacity: every expert takes the same number of tokens.")
        if capacity_factor is not None and not capacity_factor > 0:
            raise ValueError(f"`capacity_factor`={capacity_factor} must be a positive number, or None (dropless).")
        if isinstance(self.gate, ExpertChoiceRouter):
            self.gate.factor = self.top_k if capacity_factor is None else capacity_factor
            return
        self.capacity_factor = capacity_factor
        if capacity_factor is not None:
            self.experts.allow_empty_slots()

    def forward(self, hidden_states: Tensor) -> Tensor:
        """Route, run the experts, combine.

        Args:
            hidden_states: `[..., S, D]`, or `[T, D]` for the T tokens of the active record's batch.
        """
        record = current_record()
        x_TD = hidden_states.reshape(-1, self.hidden_size)
        token_mask_T = None if record is None else _flat(record.token_mask, x_TD, "token_mask")
        token_ids_T = None if record is None else _flat(record.input_ids, x_TD, "input_ids")
        routing: Routing = self.gate(x_TD, token_mask_T, token_ids_T)
        capacity_factor = self.capacity_factor if self.training else self.eval_capacity_factor
        rows_per_expert = None
        if capacity_factor is not None:
            shape = record.batch_shape if record is not None and record.batch_shape else hidden_states.shape[:-1]
            policy = self.config.capacity_policy
            if token_mask_T is None:  # padding takes no capacity, but goes through the experts
                rows_per_expert = most_rows_per_expert(self.num_experts, capacity_factor, self.top_k, shape)
            routing = apply_capacity(routing, self.num_experts, capacity_factor, shape, token_mask_T, policy)
        if record is not None:
            record.add(routing, self.num_experts, self.top_k, token_mask_T)
        if _has_own_forward(self.experts):
            y_TD = self._run_distributed_experts(x_TD, routing, rows_per_expert)
        else:
            y_TD = self._run_experts(x_TD, routing)
            if self.has_dense_part:
                y_TD = self._add_dense(x_TD, y_TD, self._dense_part(x_TD))
        if self.dropout:
            y_TD = F.dropout(y_TD, self.dropout, self.training)
        return y_TD.view(hidden_states.shape)

    def _run_experts(self, x_TD: Tensor, routing: Routing) -> Tensor:
        if not self.sparse_slots:
            return self.experts(x_TD, routing.expert_ids_TK, routing.weights_TK)
        token, slot = torch.where(routing.expert_ids_TK < self.num_experts)
        ids, weights = routing.expert_ids_TK[token, slot], routing.weights_TK[token, slot]
        rows = self.experts(x_TD[token], ids.unsqueeze(-1), weights.unsqueeze(-1))
        return torch.zeros_like(x_TD).index_add(0, token, rows.to(x_TD.dtype))

    def _run_distributed_experts(self, x_TD: Tensor, routing: Routing, rows_per_expert: int | None) -> Tensor:
        """Experts on several ranks, and the dense part while tokens travel."""
        dense: list[Tensor] = []
        meanwhile = (lambda: dense.append(self._dense_part(x_TD))) if self.has_dense_part else None
        with dispatching(DispatchScope(meanwhile, rows_per_expert)):
            y_TD = self._run_experts(x_TD, routing)
        if meanwhile and not dense:  # not every dispatcher has a time to fill
            meanwhile()
        return self._add_dense(x_TD, y_TD, dense[0]) if dense else y_TD

    def _dense_part(self, x_TD: Tensor) -> Tensor:
        """What every token passes: the shared experts, or the dense half of a residual MoE."""
        if not self.config.num_shared_experts:
            return self.residual_ffn(x_TD)
        shared_TD = self.shared_experts(x_TD)
        return self.shared_expert_gate(x_TD).sigmoid() * shared_TD if self.config.use_shared_expert_gate else shared_TD

    def _add_dense(self, x_TD: Tensor, y_TD: Tensor, dense_TD: Tensor) -> Tensor:
        if self.config.num_shared_experts:
            return y_TD + dense_TD
        precision = torch.promote_types(y_TD.dtype, torch.float32)
        share_T2 = self.residual_coefficient(x_TD).softmax(dim=-1, dtype=precision).to(y_TD.dtype)
        return y_TD * share_T2[:, :1] + dense_TD * share_T2[:, 1:]

    def _beside(self) -> list[DenseFFN]:
        return [child for child in self.children() if isinstance(child, DenseFFN)]

    def extra_repr(self) -> str:
        return f"router_type={self.config.router_type!r}"


def _has_own_forward(module: nn.Module) -> bool:
    """Whether a dispatcher stands before the experts: Transformers puts it into the module's `forward`."""
    return "forward" in module.__dict__ or any(map(_has_own_forward, module._modules.values()))  # type: ignore[arg-type]


def _flat(values_BS: Tensor | None, x_TD: Tensor, name: str) -> Tensor | None:
    """`[B, S]` as `[T]` on the tokens' device, checked against their number."""
    if values_BS is None:
        return None
    if values_BS.numel() != x_TD.shape[0]:
        raise ValueError(
            f"`{name}` of shape {tuple(values_BS.shape)} does not match the {x_TD.shape[0]} tokens that reach the MoE layer. "
            "Pass one value per token."
        )
    return values_BS.reshape(-1).to(x_TD.device)
