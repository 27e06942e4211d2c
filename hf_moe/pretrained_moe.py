# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""`MoEPreTrainedModel`: what every model of hf_moe does beside its own forward: swap the FFNs, record, load and save."""

from __future__ import annotations

import functools
import importlib
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from itertools import chain
from typing import Any

import torch
from torch import nn
from torch.distributed.fsdp import MixedPrecisionPolicy
from torch.utils.checkpoint import checkpoint
from transformers import PreTrainedModel
from transformers.distributed.parallel_utils import ALL_PARALLEL_STYLES, replace_layer_number_by_wildcard

from .checkpoint_names import fused_state_dict
from .configuration_moe import BATCH_ROUTERS, NOISY_ROUTERS, MoEConfig
from .dense_ffn import UnsupportedArchitectureError, find_ffns
from .fast_experts import NAME as FAST_EXPERTS
from .moe_layer import MoELayer
from .native_blocks import experts_field, find_native_blocks
from .parameter_counts import Shape, count_parameters
from .record import RoutingRecord, checkpoint_with_record, record_routing, token_mask

# A loss's name in outputs, and the field with its coefficient.
LOSS_COEFFICIENTS = {
    "aux_loss": "router_aux_loss_coef",
    "importance_loss": "router_importance_loss_coef",
    "load_loss": "router_load_loss_coef",
    "z_loss": "router_z_loss_coef",
    "threshold_loss": "router_threshold_loss_coef",
}


# Styles of expert parameters: Transformers' own, and that of `hf_moe.expert_sharding`, which is there once that is imported.
EVEN_SHARD, UNEVEN_SHARD = "grouped_gemm", "hf_moe_expert_shard"


# Arguments of `from_pretrained` that `hf_moe.expert_offload` reads.
OFFLOAD_OPTIONS = ("expert_offload", "expert_cache_size", "expert_prefetch")


@dataclass(frozen=True)
class _Listener:
    """See `MoEPreTrainedModel.add_routing_listener`."""

    call: Callable[[RoutingRecord], None]
    in_eval: bool
    keep_routing: bool


class MoEPreTrainedModel(PreTrainedModel):
    """What `MoEModel` and `MoEForCausalLM` share: the dense model `language_model`, and its FFNs replaced."""

    config: MoEConfig
    config_class = MoEConfig
    language_model: Any  # the dense causal LM, or its decoder by the name that it has there
    base_model_prefix = "language_model"
    write_sharded: Any = None  # how a model that is spread over ranks is saved; `hf_moe.expert_parallel` knows
    model_tags = ["hf_moe", "moe", "mixture-of-experts"]  # on the Hub
    supports_gradient_checkpointing = True
    # the dense model checks for itself what it supports
    _supports_sdpa = True
    _supports_flash_attn = True
    _supports_flex_attn = True
    _supports_attention_backend = True

    def _replace_ffns(self) -> None:
        """Put a `MoELayer` in the place of the FFN of every MoE layer."""
        config = self.config
        text_config = config.get_text_config()
        shells = find_native_blocks(self.language_model)
        field = experts_field(text_config) if shells else None  # a class that can have experts may have none
        if field is not None:
            raise UnsupportedArchitectureError(
                f"`text_config.{field}`={getattr(text_config, field)}: {text_config.model_type!r} already is a "
                "Mixture-of-Experts. Give the config of a dense model; for a checkpoint there is `hf-moe import`."
            )
        if shells and len(shells) != len(config.moe_layers):
            raise UnsupportedArchitectureError(
                f"`text_config` of type {text_config.model_type!r} has MoE blocks in {len(shells)} layers, but "
                f"`mlp_only_layers` and `decoder_sparse_step` make {len(config.moe_layers)} MoE layers. It must be all of them."
            )
        sites: Any = shells or find_ffns(self.language_model, text_config.num_hidden_layers)
        self._keep_in_fp32_modules_strict = []
        for index, num_experts in zip(config.moe_layers, config.num_experts_per_layer, strict=True):
            site = sites[index]
            layer = MoELayer(config=config, num_experts=num_experts, **site.layer_arguments(self.language_model))
            site.replace(self.language_model, layer)
            self._keep_in_fp32_modules_strict.append(f"{site.moe_path}.gate.")
        if shells and hasattr(text_config, "router_aux_loss_coef"):
            text_config.router_aux_loss_coef = 0.0  # TRL would compute it of the dense model, which has one expert
        self._is_stateful = any(m._is_stateful for m in self.language_model.modules() if isinstance(m, PreTrainedModel))
        self._routing_listeners: list[_Listener] = []

    @property
    def moe_layers(self) -> list[MoELayer]:
        """The MoE layers, first to last."""
        return [module for module in self.modules() if isinstance(module, MoELayer)]

    def add_routing_listener(
        self, listener: Callable[[RoutingRecord], None], *, in_eval: bool = False, keep_routing: bool = False
    ) -> None:
        """Have `listener(record)` called at the end of every forward in training mode with gradients on.

        Args:
            listener: gets the `RoutingRecord`; its sums may carry gradient.
            in_eval: call it after every other forward, too.
            keep_routing: have the layers' plans in the record.
        """
        self._routing_listeners.append(_Listener(listener, in_eval, keep_routing))

    def remove_routing_listener(self, listener: Callable[[RoutingRecord], None]) -> None:
        """Undo `add_routing_listener`."""
        self._routing_listeners.remove(next(entry for entry in self._routing_listeners if entry.call == listener))

    @property
    def loss_coefficients(self) -> dict[str, float]:
        """Coefficient of each router loss in the training loss, by the name that the loss has in outputs."""
        return {name: getattr(self.config, field) for name, field in LOSS_COEFFICIENTS.items()}

    def num_active_parameters(self, exclude_embeddings: bool = False) -> int:
        """Parameters that one token passes: all but the experts that it does not go to (K of E in each layer).

        Of routers that do not fix the number of experts of a token, K is the average.
        """
        counts = count_parameters([Shape(n, tuple(p.shape)) for n, p in self.named_parameters()], self.config.to_dict())
        return self.num_parameters(exclude_embeddings=exclude_embeddings) - counts.total + (counts.active or counts.total)

    # ------------------------------------------------------------------ hooks of PreTrainedModel

    @classmethod
    def prepare_distribute_model(cls, distributed_config: Any, device_map: Any = None) -> Any:
        """See `DistributedMixin`. A config that builds its own meshes (`hf_moe.expert_mesh`) does."""
        build_meshes = getattr(distributed_config, "build_meshes", None)
        if build_meshes is None:
            return super().prepare_distribute_model(distributed_config, device_map)
        return distributed_config, *build_meshes()

    @classmethod
    def maybe_distribute_model(cls, model: Any, distributed_config: Any, mesh_manager: Any) -> Any:
        """See `DistributedMixin`; such a config has the last word."""
        if getattr(distributed_config, "fsdp_mixed_precision", False):
            model._fsdp_plan = {**model._router_fsdp_plan, **model._fsdp_plan}
        model = super().maybe_distribute_model(model, distributed_config, mesh_manager)
        for layer in model.moe_layers:
            _gather_as_it_is(layer.gate)
        finish = getattr(distributed_config, "finish", None)
        return model if finish is None else finish(model)

    def init_parallel_plans(self) -> None:
        """See `DistributedMixin`: the dense model's plans for what is left of it, and one for the experts."""
        super().init_parallel_plans()
        names = {replace_layer_number_by_wildcard(name) for name, _ in chain(self.named_modules(), self.named_parameters())}
        self._tp_plan = {rule: style for rule, style in (self._tp_plan or {}).items() if rule in names}
        shard = EVEN_SHARD if UNEVEN_SHARD not in ALL_PARALLEL_STYLES else UNEVEN_SHARD
        self._ep_plan, layers, routers = {}, {}, {}
        for path, module in self.named_modules():
            if isinstance(module, MoELayer):
                path = replace_layer_number_by_wildcard(path)
                self._ep_plan |= {f"{path}.experts": "ep_dispatch_experts"}
                self._ep_plan |= {f"{path}.experts.{name}": shard for name, _ in module.experts.named_parameters()}
                layers[path.partition(".*")[0] + ".*"] = "free_full_weight"
                if any(True for _ in module.gate.parameters()):
                    routers[f"{path}.gate"] = "free_full_weight"
        self._fsdp_plan = self._fsdp_plan or layers  # a class without a plan: its layers, one by one
        self._router_fsdp_plan = routers
        if len({parameter.dtype for parameter in self.parameters()}) > 1:  # FSDP2 gathers parameters of one dtype at a time
            self._fsdp_plan = {**routers, **self._fsdp_plan}

    @torch.no_grad()
    def initialize_weights(self) -> None:
        """Initialise the MoE layers, which the dense model's own initialisation does not know, then the rest."""
        std = getattr(self.config.get_text_config(), "initializer_range", None) or 0.02
        for layer in self.moe_layers:
            parts = [module for module in layer.modules() if not getattr(module, "_is_hf_initialized", False)]
            if layer in parts:
                layer.reset_parameters(std)
            for module in parts:
                module._is_hf_initialized = True  # type: ignore[assignment]
        super().initialize_weights()
        # Transformers leaves out modules without parameters of their own where the class is not one of its own; dense models
        # can have buffers that are made there (Falcon-H1)
        for module in self._dense_model().modules():
            if isinstance(module, PreTrainedModel) and next(module.parameters(recurse=False), None) is None:
                module._init_weights(module)

    def load_state_dict(self, state_dict: Mapping[str, Any], strict: bool = True, assign: bool = False) -> Any:
        """As `nn.Module`'s, also with the names that a checkpoint has on disk, which `Trainer` resumes with."""
        return super().load_state_dict(fused_state_dict(self, state_dict), strict=strict, assign=assign)

    @classmethod
    def _can_set_experts_implementation(cls) -> bool:
        return True  # Transformers looks for the decorator in this file, but it is in experts.py

    def get_correct_experts_implementation(self, requested_experts: str | None) -> str:
        """See `PreTrainedModel`'s; ours is the default."""
        return super().get_correct_experts_implementation(FAST_EXPERTS if requested_experts is None else requested_experts)

    def get_input_embeddings(self) -> nn.Module:
        return self._dense_model().get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self._dense_model().set_input_embeddings(value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """See `PreTrainedModel.resize_token_embeddings`."""
        return self._dense_model().resize_token_embeddings(*args, **kwargs)

    def save_pretrained(self, save_directory: str | os.PathLike[str], *args: Any, **kwargs: Any) -> None:
        """See `PreTrainedModel.save_pretrained`. The code goes along, for `AutoModel` and `AutoModelForCausalLM` alike.

        A model that is spread over ranks is written tensor by tensor; every rank has to call.
        """
        classes = [c for c in MoEPreTrainedModel.__subclasses__() if c._auto_class is not None]
        self.config.auto_map = {c._auto_class: f"{c.__module__.rpartition('.')[2]}.{c.__name__}" for c in classes}
        if self.is_distributed_loading_by_transformers and self.write_sharded is not None and not args:
            self.write_sharded(self, save_directory, **kwargs)
        else:
            super().save_pretrained(save_directory, *args, **kwargs)

    @classmethod
    def from_pretrained(cls, pretrained_model_name_or_path: Any = None, *args: Any, **kwargs: Any) -> Any:
        """See `PreTrainedModel.from_pretrained`.

        With `expert_offload="disk"` (or `"cpu"`) experts are read when they are used, into a cache of `expert_cache_size`; a
        thread reads them ahead for `expert_prefetch` layers. See `hf_moe.expert_offload`.

        Raises:
            ValueError: the folder is a checkpoint of a training whose model was spread over ranks.
        """
        if os.path.isdir(os.path.join(str(pretrained_model_name_or_path), "distributed_checkpoint")):
            raise ValueError(
                f"{pretrained_model_name_or_path} is a checkpoint of an expert-parallel training. Resume from it, or make a "
                "model of it with `hf-moe consolidate`."
            )
        options = {name: kwargs.pop(name) for name in OFFLOAD_OPTIONS if name in kwargs}
        if any(value is not None for value in options.values()):
            offload = importlib.import_module("hf_moe.expert_offload")  # no part of the code that goes with a checkpoint
            return offload.load_offloaded(cls, options, pretrained_model_name_or_path, *args, **kwargs)
        loaded = super().from_pretrained(pretrained_model_name_or_path, *args, **kwargs)
        model = loaded[0] if isinstance(loaded, tuple) else loaded  # with `output_loading_info`
        model._copy_routers()
        return loaded

    def _copy_routers(self) -> None:
        """Have the routers own their memory.

        What is loaded in the precision of its file is a view of that file, which stays mapped into memory while there is one:
        in a model in bf16 of a checkpoint in fp32 the routers, which stay fp32, held all of it.
        """
        for layer in self.moe_layers:
            for parameter in layer.gate.parameters():
                if parameter.device.type == "cpu" and type(parameter.data) is torch.Tensor:
                    parameter.data = parameter.data.clone()
            for name, buffer in layer.gate.named_buffers(recurse=False):
                if buffer.device.type == "cpu":
                    setattr(layer.gate, name, buffer.clone())  # as another's view it would keep that, whatever its `data`

    def _dense_model(self) -> PreTrainedModel:
        return self.language_model

    def _supports_default_dynamic_cache(self) -> bool:
        dense: Any = self._dense_model()
        return dense._supports_default_dynamic_cache()

    def _set_gradient_checkpointing(
        self, enable: bool = True, gradient_checkpointing_func: Callable = checkpoint, every_n_layers: int = 1
    ) -> None:
        if isinstance(gradient_checkpointing_func, functools.partial):
            gradient_checkpointing_func.keywords.setdefault("use_reentrant", False)  # torch's default is True
        wrapped = checkpoint_with_record(gradient_checkpointing_func, self._routers_draw)
        super()._set_gradient_checkpointing(enable=enable, gradient_checkpointing_func=wrapped, every_n_layers=every_n_layers)

    def _adopt_checkpoint_wrappers(self) -> None:
        """Make torch's `CheckpointWrapper`s (FSDP's activation checkpointing) bring the record back for the recompute."""
        for module in self.modules():
            checkpoint_fn = vars(module).get("checkpoint_fn")
            if checkpoint_fn is not None and not getattr(checkpoint_fn, "carries_record", False):
                checkpoint_fn = checkpoint_with_record(checkpoint_fn, self._routers_draw)
                checkpoint_fn.carries_record = True  # type: ignore[attr-defined]
                vars(module)["checkpoint_fn"] = checkpoint_fn

    @property
    def _routers_draw(self) -> bool:
        """Whether routers draw random numbers in training."""
        return self.config.router_type in (*NOISY_ROUTERS, "gshard") or self.config.router_jitter_noise > 0

    @property
    def _routing_depends_on_padding(self) -> bool:
        capacity = self.config.capacity_factor if self.training else self.config.eval_capacity_factor
        return capacity is not None or self.config.router_type in BATCH_ROUTERS

    # ------------------------------------------------------------------ one forward

    def _run(
        self,
        run_dense_model: Callable[..., Any],
        measure: bool,
        keep_logits: bool,
        inputs: dict[str, Any],
    ) -> tuple[Any, RoutingRecord]:
        """Call the dense model under a new record."""
        if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
            self._adopt_checkpoint_wrappers()
        tokens = inputs["inputs_embeds"] if inputs["input_ids"] is None else inputs["input_ids"]
        if tokens is None:
            raise ValueError("Neither `input_ids` nor `inputs_embeds` is given. Pass one of them.")
        if inputs["use_cache"] is None:
            inputs["use_cache"] = getattr(self.config, "use_cache", None)  # `Trainer` sets it here, not in `text_config`
        batch_shape = (tokens.shape[0], tokens.shape[1])
        mask = None
        if measure or self._routing_depends_on_padding:  # else, in decoding, nothing would read it
            mask = token_mask(inputs["attention_mask"], batch_shape, inputs["past_key_values"])
        record = RoutingRecord(
            token_mask=mask,
            input_ids=inputs["input_ids"],
            batch_shape=batch_shape,
            keep_logits=keep_logits,
            keep_routing=any(listener.keep_routing for listener in self._routing_listeners),
            measure=measure,
        )
        with record_routing(record):
            outputs = run_dense_model(**{name: value for name, value in inputs.items() if value is not None})
        return outputs, record

    def _has_listeners(self) -> bool:
        """Whether anybody listens to a forward that begins now."""
        in_training = self.training and torch.is_grad_enabled()
        return any(in_training or listener.in_eval for listener in self._routing_listeners)

    def _tell_listeners(self, record: RoutingRecord) -> None:
        for listener in self._routing_listeners:
            if listener.in_eval or (self.training and record.grad_enabled):
                listener.call(record)


def _gather_as_it_is(router: Any) -> None:
    """Have FSDP2's mixed precision leave a router in fp32, where it manages the router by itself."""
    state = getattr(router, "_get_fsdp_state", lambda: None)()
    if state is not None:
        state._mp_policy = MixedPrecisionPolicy()
        groups = getattr(state, "_fsdp_param_groups", None) or [state._fsdp_param_group]
        for group in groups:
            group.mp_policy = state._mp_policy  # read at the first forward
