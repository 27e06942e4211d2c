# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""What every dispatcher of expert-parallel experts does alike: who owns an expert, slices of a shared batch, empty ranks.

Letters: T tokens of this rank, K experts per token, D hidden, R ranks of the expert group, N rows received, P (row, expert)
pairs.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Replicate, Shard
from transformers.distributed.expert_parallel import EPImplementation

from .dispatch_scope import current_dispatch


class ExpertDispatcher(EPImplementation):
    """Base of the dispatchers; a subclass writes `dispatch`.

    Experts lie in slots: slot `s` is on rank `s // experts_per_rank` of the expert group, as its expert
    `s % experts_per_rank`. The last ranks may hold fewer experts or none. `slot_of_expert` of the experts says where each
    expert lies; without it expert e is in slot e. Slots of a batch that hold the id E are empty: they are not sent anywhere.

    Args:
        experts: the module of this rank's experts; read at each call, since its parameters and placement change.
        ep_mesh: the ranks that share the experts.
        tp_mesh: the ranks that share a batch: each dispatches a slice of it, and the slices are gathered.
    """

    def __init__(self, experts: nn.Module, ep_mesh: DeviceMesh, tp_mesh: DeviceMesh) -> None:
        super().__init__(experts, ep_mesh, tp_mesh)
        self.experts = experts
        self.group = ep_mesh.get_group()
        self.num_ranks, self.rank = ep_mesh.size(), ep_mesh.get_local_rank()

    @property
    def experts_per_rank(self) -> int:
        """Slots of each rank."""
        return getattr(self.experts, "experts_per_rank", self.num_experts_here)

    @property
    def num_experts_here(self) -> int:
        """Experts that lie on this rank."""
        return int(self.experts.num_experts)  # type: ignore[arg-type]

    @property
    def num_slots(self) -> int:
        """Of all ranks; also the id of "no slot"."""
        return self.num_ranks * self.experts_per_rank

    def __call__(self, hidden_states: Tensor, top_k_index: Tensor, top_k_weights: Tensor) -> Tensor:
        """The weighted sum of the experts' outputs for each of this rank's tokens.

        Args:
            hidden_states: `[T, D]`.
            top_k_index: `[T, K]` global expert ids; E marks an empty slot.
            top_k_weights: `[T, K]`.

        Returns:
            `[T, D]` in the dtype of `hidden_states`.

        Raises:
            RuntimeError: an exchange failed, usually because another rank did.
        """
        num_tokens, hidden_size = hidden_states.shape
        if self.tp_mesh.size() > 1:
            hidden_states, top_k_index, top_k_weights = (
                # a local chunk; its backward gathers the gradients of the slices
                DTensor.from_local(t, self.tp_mesh, [Replicate()], run_check=False)
                .redistribute(self.tp_mesh, [Shard(0)])
                .to_local()
                for t in (hidden_states, top_k_index, top_k_weights)
            )
        output = self.dispatch(hidden_states, self._slots(top_k_index), top_k_weights).to(hidden_states.dtype)
        if self.tp_mesh.size() == 1:
            return output
        shape, stride = torch.Size((num_tokens, hidden_size)), (hidden_size, 1)
        return DTensor.from_local(output.contiguous(), self.tp_mesh, [Shard(0)], shape=shape, stride=stride).full_tensor()

    def dispatch(self, x_TD: Tensor, slots_TK: Tensor, weights_TK: Tensor) -> Tensor:
        """Tokens to the experts in their slots (`num_slots`: none) and the weighted sum of the results, `[T, D]`."""
        raise TypeError(f"{type(self).__name__} does not say how it dispatches: give it a method `dispatch`.")

    def _slots(self, ids_TK: Tensor) -> Tensor:
        """Where the chosen experts lie; `num_slots` for an empty slot."""
        num_experts = getattr(self.experts, "num_global_experts", self.num_slots)
        slot_of_expert_E = getattr(self.experts, "slot_of_expert", None)
        slots_TK = ids_TK
        if slot_of_expert_E is not None:
            slots_TK = slot_of_expert_E.to(ids_TK.device)[ids_TK.clamp(max=num_experts - 1)]
        return torch.where(ids_TK < num_experts, slots_TK, self.num_slots)

    def run_experts(self, x_ND: Tensor, ids_NK: Tensor, weights_NK: Tensor) -> Tensor:
        """This rank's experts on rows; with no rows, or no experts, zeros through which gradients still flow.

        FSDP wants a gradient for the same parameters on every rank, and the backward exchanges on every rank.

        Args:
            x_ND: rows.
            ids_NK: this rank's expert ids; `num_experts_here` marks an empty slot, whose weight is 0.
            weights_NK: routing weights.
        """
        weights = list(expert_weights(self.experts).values())
        trained = torch.is_grad_enabled() and any(each.requires_grad for each in (x_ND, weights_NK, *weights))
        if x_ND.shape[0] and self.num_experts_here:
            y_ND = self.experts_forward(x_ND, ids_NK, weights_NK)
            if y_ND.requires_grad or not trained:
                return y_ND  # else no slot was taken, and a loop over experts has left everything out
        y_ND = x_ND * weights_NK.sum(dim=-1, keepdim=True)
        for weight in weights:
            y_ND = y_ND + weight.reshape(-1)[:0].sum()
        return y_ND.to(x_ND.dtype)

    def run_pairs(self, x_ND: Tensor, pairs: Pairs) -> Tensor:
        """This rank's experts on (row, expert) pairs, summed per row: `[N, D]`."""
        y_PD = self.run_experts(take_rows(x_ND, pairs.row_P), pairs.id_P.unsqueeze(-1), pairs.weight_P.unsqueeze(-1))
        return sum_rows(y_PD, pairs.row_P, x_ND.shape[0])


@dataclass(frozen=True)
class Pairs:
    """(row, expert) pairs, ordered by row.

    Attributes:
        row_P: index of the row.
        id_P: which of the rank's (or the node's) experts.
        weight_P: routing weight.
    """

    row_P: Tensor
    id_P: Tensor
    weight_P: Tensor


def flat_pairs(ids_TK: Tensor, weights_TK: Tensor) -> Pairs:
    """All T·K pairs of a batch."""
    tokens, top_k = ids_TK.shape
    row_P = torch.arange(tokens, device=ids_TK.device).repeat_interleave(top_k, output_size=tokens * top_k)
    return Pairs(row_P, ids_TK.reshape(-1), weights_TK.reshape(-1))


def expert_weights(experts: nn.Module) -> dict[str, Tensor]:
    """All weights by name, as the forward sees them: where a LoRA is hung in as a parametrization, with it."""
    hung_in = list(getattr(experts, "parametrizations", ()))
    weights: dict[str, Tensor] = {name: getattr(experts, name) for name in hung_in}
    plain = {name: weight for name, weight in experts.named_parameters() if not name.startswith("parametrizations.")}
    return weights | plain


def meanwhile() -> None:
    """Do what the layer wants to have done while tokens travel. A dispatcher calls it once."""
    scope = current_dispatch()
    if scope is not None and scope.meanwhile is not None:
        scope.meanwhile()


def take_rows(x_ND: Tensor, index_M: Tensor) -> Tensor:
    """`x_ND[index_M]`, whose gradient is summed in the same order in every run."""
    return x_ND.index_select(0, index_M) if x_ND.device.type == "cpu" else x_ND[index_M]


def sum_rows(x_MD: Tensor, index_M: Tensor, num_rows: int) -> Tensor:
    """Add each row to the row of the output that its index names: `[num_rows, D]`.

    The sum has at least single precision and the same order in every run: CUDA's `index_add` has neither, its `index_put`
    sorts first; on CPUs it is the other way round.
    """
    precision = torch.promote_types(x_MD.dtype, torch.float32)
    zeros_ND = torch.zeros(num_rows, x_MD.shape[1], dtype=precision, device=x_MD.device)
    wide_MD = x_MD.to(precision)
    if x_MD.device.type == "cpu":
        return zeros_ND.index_add(0, index_M, wide_MD).to(x_MD.dtype)
    return zeros_ND.index_put((index_M,), wide_MD, accumulate=True).to(x_MD.dtype)


def grouped_order(group_P: Tensor) -> Tensor:
    """The pairs ordered by the group they belong to, and among these as they were."""
    return torch.argsort(group_P, stable=True)


def smallest_integer(largest: int) -> torch.dtype:
    """The smallest integer type that holds 0 … `largest`."""
    return next(dtype for dtype in (torch.uint8, torch.int16, torch.int32) if largest <= torch.iinfo(dtype).max)


def count_groups(group_P: Tensor, num_groups: int) -> Tensor:
    """How many of each group, `[num_groups]`; ids from `num_groups` on are not counted."""
    counts = torch.zeros(num_groups + 1, dtype=torch.long, device=group_P.device)
    return counts.scatter_add_(0, group_P.clamp(max=num_groups), torch.ones_like(group_P))[:num_groups]
