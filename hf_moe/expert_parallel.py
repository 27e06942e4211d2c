# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Expert parallelism under Accelerate: a model's experts spread over ranks, and everything else as you like.

    accelerator = Accelerator()
    model = load_expert_parallel("my-moe", accelerator, ep_size=8)
    optimizer = torch.optim.AdamW(parameter_groups(model))
    optimizer, loader = accelerator.prepare(optimizer, loader)

The model comes sharded: it is not prepared again. `accelerator.backward`, `clip_grad_norm_` and `accumulate` work as ever.
Transformers does the sharding (`DistributedConfig`, FSDP2 over `efsdp`) and reads only this rank's part of the checkpoint. What
is ours: the meshes (`expert_mesh`), experts that do not divide evenly (`expert_sharding`), and how tokens travel
(`dispatchers`).
"""

from __future__ import annotations

import os
from dataclasses import dataclass, fields
from functools import partial
from typing import Any, Literal, get_args

import torch.distributed as dist
from torch import nn
from transformers import AutoConfig, AutoModelForCausalLM

from .auto import MoEConfig
from .dispatchers import choose_dispatcher, ep_implementation, register_dispatchers
from .expert_checkpoint import save_expert_parallel
from .expert_lora import allow_adapters
from .expert_mesh import Dense, ExpertMesh, expert_mesh
from .native_blocks import experts_field
from .pretrained_moe import MoEPreTrainedModel

Dispatcher = Literal["auto", "all_to_all", "deduplicated", "capacity", "hierarchical", "chunked"]


@dataclass(frozen=True)
class ExpertParallelConfig:
    """How a model is spread over ranks.

    Args:
        ep_size: ranks that hold the experts between them (R). 1: no expert parallelism.
        dispatcher: how tokens reach their experts (see `hf_moe.dispatchers`); `"auto"` chooses and says why.
        dense: the rest of the model: `"fsdp"` shards it over all ranks (FSDP2), `"replicate"` keeps it whole on every rank (as
            DDP does), `"hybrid"` shards within and replicates across `dp_replicate_size` groups (HSDP).
        dp_replicate_size: the number of those groups (default: the number of nodes).
        tp_size: ranks that share a batch and split the dense layers, where the model's class has a plan for it.
        ranks_per_node: GPUs of a node (default: as launched).
        chunk_rows: `"chunked"`: the most (token, expert) pairs that a rank gets in one round.
        mixed_precision: FSDP2 gathers and computes in bfloat16 and reduces in fp32; routers stay in fp32.
        timeout_s: seconds after which a rank that waits for another gives up (default: as launched, 30 minutes for Accelerate).

    Raises:
        ValueError: a value is not allowed.
    """

    ep_size: int = 1
    dispatcher: Dispatcher = "auto"
    dense: Dense = "fsdp"
    dp_replicate_size: int | None = None
    tp_size: int = 1
    ranks_per_node: int | None = None
    chunk_rows: int = 16384
    mixed_precision: bool = False
    timeout_s: float | None = None

    def __post_init__(self) -> None:
        for name, allowed in (("dispatcher", get_args(Dispatcher)), ("dense", get_args(Dense))):
            if getattr(self, name) not in allowed:
                raise ValueError(f"`{name}`={getattr(self, name)!r} is not known. Choose {', '.join(allowed)}.")
        for name in ("ep_size", "tp_size", "dp_replicate_size", "ranks_per_node", "chunk_rows"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ValueError(f"`{name}`={value} must be at least 1.")
        if self.timeout_s is not None and not self.timeout_s > 0:
            raise ValueError(f"`timeout_s`={self.timeout_s} must be a positive number of seconds.")

    def mesh(
        self, world_size: int, num_experts: list[int], top_k: int, capacity: float | None = None
    ) -> tuple[ExpertMesh, str]:
        """The meshes for so many ranks, and why the dispatcher is what it is.

        Args:
            world_size: W.
            num_experts: E of each MoE layer.
            top_k: K.
            capacity: the capacity factor; `None` if dropless.
        """
        per_node = self.ranks_per_node or int(os.environ.get("LOCAL_WORLD_SIZE", world_size))
        nodes_of_group = -(-self.ep_size // per_node)
        name: str = self.dispatcher
        reason = "as asked for"
        if name == "auto":
            name, reason = choose_dispatcher(
                ep_size=self.ep_size, num_experts=max(num_experts, default=1), top_k=top_k, capacity=capacity,
                num_nodes=nodes_of_group, ranks_per_node=per_node,
            )  # fmt: skip
        mesh = expert_mesh(
            world_size=world_size,
            ep_size=self.ep_size,
            tp_size=self.tp_size,
            dense=self.dense,
            dp_replicate_size=self.dp_replicate_size or max(1, world_size // per_node),
            num_experts=num_experts,
            ep_implementation=ep_implementation(name, ranks_per_node=per_node, chunk_rows=self.chunk_rows),
            fsdp_mixed_precision=self.mixed_precision,
            timeout_s=self.timeout_s,
        )
        return mesh, f"dispatcher {name}: {reason}"

    def distributed(self, model_config: Any, quiet: bool = False) -> dict[str, ExpertMesh]:
        """The argument of `from_pretrained` that spreads a model over the ranks that there are; none for one rank.

        Args:
            model_config: of a MoE.
            quiet: do not print the table of ranks.

        Raises:
            ValueError: the ranks cannot be arranged so, or the model has no experts.
        """
        experts = _experts_of(model_config)
        world_size = dist.get_world_size() if dist.is_available() and dist.is_initialized() else 1
        if world_size == 1:
            if self.ep_size > 1 or self.tp_size > 1:
                raise ValueError(
                    f"`ep_size`={self.ep_size}, `tp_size`={self.tp_size} need several processes, and there is one. Start the "
                    "script with `accelerate launch` or `torchrun`, and make an `Accelerator` before the model."
                )
            return {}
        mesh, why = self.mesh(world_size, *experts)
        if not isinstance(model_config, MoEConfig) and mesh.expert_replicas != mesh.dp_replicate_size:
            raise ValueError(
                f"`dense`={self.dense!r}, `ep_size`={self.ep_size}: Transformers lays out a native MoE (type "
                f"{model_config.model_type!r}) with `dense`='fsdp' and experts that divide evenly. Choose that, or import the "
                "model (`hf-moe import`)."
            )
        if dist.get_rank() == 0 and not quiet:
            print(f"{_summary(mesh)}; {why}\n{mesh.table()}", flush=True)
        return {"distributed_config": mesh}


def load_expert_parallel(
    path: str | os.PathLike[str],
    accelerator: Any = None,
    *,
    config: ExpertParallelConfig | None = None,
    upcycle: Any = None,
    quiet: bool = False,
    **kwargs: Any,
) -> Any:
    """Load a causal LM with its experts spread over the ranks; each rank reads its part only.

    Args:
        path: folder or Hub id of a MoE (ours or a native one), or of a dense model with `upcycle`.
        accelerator: an `accelerate.Accelerator`; it gives ranks, device and, if it was launched with them, sizes of the mesh
            (`ParallelismConfig`). Without one the process group has to be there already.
        config: sizes and dispatcher; or give its fields as keywords (`ep_size=8`).
        upcycle: recipe of an upcycling (see `hf_moe.conversion`): the dense model's FFNs become this rank's experts, and no
            rank ever holds more than its part of the model and one tensor.
        quiet: do not print the table of ranks.
        kwargs: fields of `ExpertParallelConfig`, and arguments of `from_pretrained`.

    Returns:
        The model in evaluation mode, as from `from_pretrained`. Its parameters are `DTensor`s. Give it to `Trainer`, or make
        an optimizer and prepare that; `accelerator.prepare(model)` is not needed.

    Raises:
        ValueError: the ranks cannot be arranged so, or the model has no experts.
    """
    names = {field.name for field in fields(ExpertParallelConfig)}
    given = {name: kwargs.pop(name) for name in list(kwargs) if name in names}
    if config is not None and given:
        raise ValueError(f"Give `config` or its fields ({', '.join(given)}), not both.")
    layout = config or ExpertParallelConfig(**{**_of_accelerator(accelerator), **given})
    if upcycle is None:
        model_config = kwargs.get("config") or AutoConfig.from_pretrained(path, **_of_hub(kwargs))
        build = partial(AutoModelForCausalLM.from_pretrained, path)
    else:
        from hf_moe.conversion.sharded_upcycling import plan_into_shards

        plan = plan_into_shards(path, upcycle)
        model_config, build = MoEConfig.from_dict(plan.config), plan.build
    model = build(**layout.distributed(model_config, quiet), **kwargs)
    allow_adapters(model)
    return model


def is_expert_parallel(model: nn.Module) -> bool:
    """Whether a model's experts are spread over ranks, by this module or by Transformers alone."""
    meshes = [getattr(module, "_mesh_manager", None) for module in model.modules()]
    return any(mesh is not None and mesh.get_mesh("ep").size() > 1 for mesh in meshes)


def parameter_groups(model: nn.Module) -> list[dict[str, Any]]:
    """The trained parameters, a group for each mesh that they lie on: fused and `foreach` optimizers take one mesh at a time.

    Example:
        >>> optimizer = torch.optim.AdamW(parameter_groups(model), lr=1e-4)  # doctest: +SKIP
    """
    by_mesh: dict[Any, list[nn.Parameter]] = {}
    for parameter in model.parameters():
        if parameter.requires_grad:
            by_mesh.setdefault(getattr(parameter, "device_mesh", None), []).append(parameter)
    return [{"params": parameters} for parameters in by_mesh.values()]


def _of_accelerator(accelerator: Any) -> dict[str, Any]:
    """Sizes that Accelerate was launched with."""
    sizes = getattr(accelerator, "parallelism_config", None)
    if sizes is None:
        return {}
    found: dict[str, Any] = {"tp_size": sizes.tp_size} if sizes.tp_size > 1 else {}
    if sizes.dp_replicate_size > 1 and sizes.dp_shard_size > 1:
        found |= {"dense": "hybrid", "dp_replicate_size": sizes.dp_replicate_size}
    return found


def _of_hub(kwargs: dict[str, Any]) -> dict[str, Any]:
    """Those arguments of `from_pretrained` that say which file is meant."""
    names = ("revision", "token", "cache_dir", "subfolder", "local_files_only", "trust_remote_code", "code_revision")
    return {name: kwargs[name] for name in names if name in kwargs}


def _experts_of(config: Any) -> tuple[list[int], int, float | None]:
    """E of each MoE layer, K, and the capacity factor.

    Raises:
        ValueError: the model has no experts.
    """
    if isinstance(config, MoEConfig):
        return config.num_experts_per_layer, config.num_experts_per_tok, config.capacity_factor
    text_config = config.get_text_config()
    field = experts_field(text_config)
    if field is None:
        raise ValueError(
            f"A model of type {config.model_type!r} has no experts to spread. Give `upcycle=` with a recipe, or a MoE's path."
        )
    top_k = next((getattr(text_config, name) for name in ("num_experts_per_tok", "moe_topk") if hasattr(text_config, name)), 1)
    return [getattr(text_config, field)], top_k, None


def _summary(mesh: ExpertMesh) -> str:
    dense = f"{mesh.dp_replicate_size} replica(s) × {mesh.fsdp_size} FSDP shard(s)"
    tp = f" × {mesh.tp_size} TP" if mesh.tp_size > 1 else ""
    copies = f"{mesh.expert_replicas} replica(s) × {mesh.efsdp_size} FSDP shard(s)"
    return f"{mesh.world_size} ranks: dense parameters in {dense}{tp}; experts over {mesh.ep_size} ranks in {copies}"


register_dispatchers()
MoEPreTrainedModel.write_sharded = staticmethod(save_expert_parallel)
