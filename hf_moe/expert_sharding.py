# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""How stacked experts lie on the ranks of an expert-parallel group, also where they do not divide evenly.

Expert *slot* s lies on rank s // ceil(E / R), as `torch.chunk` cuts: 6 experts on 4 ranks are 2, 2, 2 and 0. That is how a
`DTensor` shards a dimension, and the fullest rank holds as few experts as it can.
"""

from __future__ import annotations

from typing import Any

from torch import nn
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import Shard, distribute_tensor
from transformers.distributed.expert_parallel import MoEParamShard
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES

from .pretrained_moe import UNEVEN_SHARD


class UnevenExpertShard(MoEParamShard):
    """Transformers' `grouped_gemm` style for any number of experts.

    It leaves on the experts' module: `num_experts`, those of this rank; `num_global_experts`, E; `experts_per_rank`,
    ceil(E / R); `slot_of_expert`, `None` while every expert lies in the slot of its own number.
    """

    def shard_param(self, module: nn.Module, param: str, mesh: DeviceMesh) -> None:
        """Put a placeholder that is sharded over experts in the parameter's place."""
        parameter = module._parameters.get(param)
        if parameter is None:
            return
        experts: Any = module
        num_experts = parameter.shape[0]
        experts.num_global_experts = num_experts
        experts.experts_per_rank = -(-num_experts // mesh.size())
        experts.num_experts = len(experts_of_rank(num_experts, mesh.size(), mesh.get_local_rank()))
        experts.slot_of_expert = None
        experts._is_expert_parallel = True  # Transformers' word for: skip the slots of experts that are not here
        sharded = distribute_tensor(parameter, mesh, [self.placement], src_data_rank=None)
        module._parameters[param] = nn.Parameter(sharded, requires_grad=parameter.requires_grad)


def experts_of_rank(num_experts: int, ep_size: int, rank: int) -> range:
    """The slots that lie on an expert-parallel rank.

    Args:
        num_experts: E.
        ep_size: R.
        rank: 0..R-1.
    """
    per_rank = -(-num_experts // ep_size)
    return range(min(rank * per_rank, num_experts), min((rank + 1) * per_rank, num_experts))


def sharded_experts(model: nn.Module) -> list[Any]:
    """The expert modules of a model that are spread over ranks by this style, first to last."""
    return [module for module in model.modules() if hasattr(module, "num_global_experts")]


_STYLE: Any = UnevenExpertShard(Shard(0), shards_expert_dim=True)
ALL_PARALLEL_STYLES.register(UNEVEN_SHARD, _STYLE)
