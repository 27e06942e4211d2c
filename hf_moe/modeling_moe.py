# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""`MoEModel` and `MoEForCausalLM`: any dense causal LM of Transformers with its feed-forward blocks replaced by experts."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint
from transformers import AutoModel, AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils.generic import can_return_tuple

from .balance import BatchBalance
from .callers_loss import Backbone, CallersLoss
from .checkpoint_names import checkpoint_conversion, fused_state_dict
from .configuration_moe import BATCH_ROUTERS, NOISY_ROUTERS, MoEConfig
from .dense_ffn import UnsupportedArchitectureError, find_ffns
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

# The dense model has no experts of its own, and refuses an `experts_implementation` that is meant for ours.
_DENSE = {"experts_implementation": "eager"}


@dataclass
class MoECausalLMOutputWithPast(MoeCausalLMOutputWithPast):
    """`MoeCausalLMOutputWithPast` plus the losses by name.

    `loss` is the LM loss in evaluation; in training it is the LM loss plus coefficient times router loss. The router losses
    are means over layers, without coefficients: `aux_loss` is Switch's (balanced: 1), `importance_loss` and `load_loss`
    are CV² (balanced: 0). `router_logits` has one `[B·S, E]` tensor per MoE layer.
    """

    lm_loss: Tensor | None = None
    importance_loss: Tensor | None = None
    load_loss: Tensor | None = None
    z_loss: Tensor | None = None
    threshold_loss: Tensor | None = None


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

    def get_input_embeddings(self) -> nn.Module:
        return self._dense_model().get_input_embeddings()

    def set_input_embeddings(self, value: nn.Module) -> None:
        self._dense_model().set_input_embeddings(value)

    def resize_token_embeddings(self, *args: Any, **kwargs: Any) -> nn.Embedding:
        """See `PreTrainedModel.resize_token_embeddings`."""
        return self._dense_model().resize_token_embeddings(*args, **kwargs)

    def save_pretrained(self, *args: Any, **kwargs: Any) -> None:
        """See `PreTrainedModel.save_pretrained`. The code goes along, for `AutoModel` and `AutoModelForCausalLM` alike."""
        classes = (MoEModel, MoEForCausalLM)
        self.config.auto_map = {c._auto_class: f"{c.__module__.rpartition('.')[2]}.{c.__name__}" for c in classes}
        super().save_pretrained(*args, **kwargs)

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


class MoEModel(MoEPreTrainedModel):
    """The bare decoder, without a language-modelling head. Reads the checkpoints of `MoEForCausalLM` and the reverse."""

    _keys_to_ignore_on_load_unexpected = [r"^language_model\.(lm_head|embed_out|output_layer)\."]

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config)
        text_config = config.get_text_config()
        # the name that the decoder has in its causal LM, so that both have the same weight names
        causal_lm_class: Any = MODEL_FOR_CAUSAL_LM_MAPPING[type(text_config)]
        self._decoder_name = causal_lm_class.base_model_prefix
        self.language_model = nn.ModuleDict({self._decoder_name: AutoModel.from_config(text_config, **_DENSE)})
        self._replace_ffns()
        self.post_init()

    def _dense_model(self) -> PreTrainedModel:
        return self.language_model[self._decoder_name]

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        **kwargs: Any,
    ) -> MoeModelOutputWithPast:
        """Hidden states of the decoder; arguments as for the dense model, plus `output_router_logits`."""
        keep_logits = self.config.output_router_logits if output_router_logits is None else output_router_logits
        inputs = {
            "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
            "past_key_values": past_key_values, "inputs_embeds": inputs_embeds, "use_cache": use_cache, **kwargs,
        }  # fmt: skip
        outputs, record = self._run(self._dense_model(), self._has_listeners(), keep_logits, inputs)
        self._tell_listeners(record)
        return MoeModelOutputWithPast(
            last_hidden_state=outputs.last_hidden_state,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            router_logits=_router_logits(record) if keep_logits else None,
        )


class MoEForCausalLM(MoEPreTrainedModel, GenerationMixin):
    """A causal LM whose feed-forward blocks are Mixtures of Experts.

    Example:
        >>> from transformers import LlamaConfig
        >>> text_config = LlamaConfig(hidden_size=64, intermediate_size=128, num_hidden_layers=2, num_attention_heads=4,
        ...                           num_key_value_heads=4, vocab_size=256)
        >>> model = MoEForCausalLM(MoEConfig(text_config=text_config, num_experts=4, num_experts_per_tok=2))
        >>> ids = torch.randint(0, 256, (2, 16))
        >>> sorted(k for k in model(input_ids=ids, labels=ids).keys() if "loss" in k)
        ['aux_loss', 'importance_loss', 'lm_loss', 'loss', 'z_loss']
    """

    def __init__(self, config: MoEConfig) -> None:
        super().__init__(config)
        self.language_model = AutoModelForCausalLM.from_config(config.get_text_config(), **_DENSE)
        self._replace_ffns()
        self._accepted = _accepted_arguments(self.language_model)
        self._balance = BatchBalance(config.balance_scope)
        self.callers_loss = CallersLoss()
        self.post_init()

    @can_return_tuple
    def forward(
        self,
        input_ids: Tensor | None = None,
        attention_mask: Tensor | None = None,
        position_ids: Tensor | None = None,
        past_key_values: Cache | None = None,
        inputs_embeds: Tensor | None = None,
        labels: Tensor | None = None,
        use_cache: bool | None = None,
        output_router_logits: bool | None = None,
        logits_to_keep: int | Tensor = 0,
        **kwargs: Any,
    ) -> MoECausalLMOutputWithPast:
        """Logits and, with `labels`, losses.

        Args:
            input_ids, inputs_embeds: `[B, S]` or `[B, S, D]`; one of them.
            attention_mask: `[B, past + S]`, or 4-D. Padding counts in no statistic, loss or capacity.
            labels: `[B, S]`; -100 is ignored.
            output_router_logits: also return the router logits (default: the config's).
            position_ids, past_key_values, use_cache, logits_to_keep, kwargs: as for the dense model. `num_items_in_batch`
                (given by `Trainer`) makes losses of micro-batches add up (see `hf_moe.balance`).
        """
        keep_logits = self.config.output_router_logits if output_router_logits is None else output_router_logits
        inputs = {
            "input_ids": input_ids, "attention_mask": attention_mask, "position_ids": position_ids,
            "past_key_values": past_key_values, "inputs_embeds": inputs_embeds, "use_cache": use_cache, "labels": labels,
            "logits_to_keep": logits_to_keep, **kwargs,
        }  # fmt: skip
        measure = self.training or labels is not None or keep_logits or self._has_listeners()
        outputs, record = self._run(self._call_language_model, measure, keep_logits, inputs)
        lm_loss = outputs.get("loss")
        loss, router_losses = self._total_loss(lm_loss, record, inputs) if measure else (lm_loss, {})
        self._tell_listeners(record)
        return MoECausalLMOutputWithPast(
            loss=loss,
            lm_loss=lm_loss,
            logits=outputs.logits,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            router_logits=_router_logits(record) if keep_logits else None,
            **router_losses,
        )

    @property
    def base_model(self) -> Any:
        """The decoder, under a record: what trainers call that apply the LM head themselves (TRL's)."""
        dense = getattr(self, "language_model", self)
        return dense if dense is self else Backbone(self.decode, dense)

    @can_return_tuple
    def decode(
        self, input_ids: Tensor | None = None, output_router_logits: bool | None = None, **kwargs: Any
    ) -> MoeModelOutputWithPast:
        """The hidden states that the LM head gets; in training they carry the router losses (see `hf_moe.callers_loss`)."""
        keep_logits = self.config.output_router_logits if output_router_logits is None else output_router_logits
        names = ("attention_mask", "past_key_values", "inputs_embeds", "use_cache")
        inputs = {"input_ids": input_ids, **dict.fromkeys(names), **kwargs}
        in_training = self.training and torch.is_grad_enabled()
        measure = in_training or keep_logits or self._has_listeners()
        outputs, record = self._run(self._call_decoder, measure, keep_logits, inputs)
        hidden_states = outputs.last_hidden_state
        if in_training:
            _, losses = self._total_loss(None, record, inputs)
            weighted = [c * losses[name] for name, c in self.loss_coefficients.items() if c and name in losses]
            if weighted:
                hidden_states = self.callers_loss.carry(hidden_states, torch.stack(weighted).sum(), self.parameters())
        self._tell_listeners(record)
        return MoeModelOutputWithPast(
            last_hidden_state=hidden_states,
            past_key_values=outputs.get("past_key_values"),
            hidden_states=outputs.get("hidden_states"),
            attentions=outputs.get("attentions"),
            router_logits=_router_logits(record) if keep_logits else None,
        )

    def _call_decoder(self, **inputs: Any) -> Any:
        decoder = self.language_model.base_model
        accepted = _accepted_arguments(decoder)
        return decoder(**{name: value for name, value in inputs.items() if accepted is None or name in accepted})

    def _call_language_model(self, **inputs: Any) -> Any:
        """The dense causal LM; arguments of a loss that it cannot take are applied here."""
        if self._accepted is None:
            return self.language_model(**inputs)
        given = {name: value for name, value in inputs.items() if name in self._accepted and name != "labels"}
        outputs = self.language_model(**given)
        if inputs.get("labels") is not None:
            loss_arguments = {k: v for k, v in inputs.items() if k in ("num_items_in_batch", "shift_labels")}
            vocab_size = self.config.get_text_config().vocab_size
            outputs["loss"] = self.loss_function(outputs.logits, inputs["labels"], vocab_size, **loss_arguments)
        return outputs

    def _total_loss(
        self, lm_loss: Tensor | None, record: RoutingRecord, inputs: dict[str, Any]
    ) -> tuple[Tensor | None, dict[str, Tensor]]:
        """LM loss plus weighted router losses in training, the LM loss alone in evaluation; and the router losses by name."""
        layers = [layer for layer in record.layers if layer.sums]
        if not layers:
            return lm_loss, {}
        if not self.training:
            record.lm_loss = lm_loss
            return lm_loss, record.losses()
        num_items = inputs.get("num_items_in_batch")
        num_labels = None if lm_loss is None else _count_labels(inputs)
        version = next((p._version for p in self.moe_layers[0].gate.parameters()), 0)
        terms, values = self._balance.terms(layers, num_labels, num_items, version)
        record.terms = {name: term_L.detach() for name, term_L in terms.items()}
        if lm_loss is None:  # a loss of the caller's own (DPO): what is reported can be differentiated
            return None, {name: term_L.mean() for name, term_L in terms.items()}
        record.lm_loss, record.adds_up = lm_loss.detach(), num_items is not None
        loss = lm_loss
        for name, coefficient in self.loss_coefficients.items():
            if coefficient and name in terms:
                loss = loss + coefficient * terms[name].mean().to(loss.device)
        return loss, {name: value_L.mean() for name, value_L in values.items()}

    def prepare_inputs_for_generation(self, *args: Any, **kwargs: Any) -> dict[str, Any]:
        """The dense model's own."""
        return self.language_model.prepare_inputs_for_generation(*args, **kwargs)

    def get_output_embeddings(self) -> nn.Module:
        return self.language_model.get_output_embeddings()

    def set_output_embeddings(self, new_embeddings: nn.Module) -> None:
        self.language_model.set_output_embeddings(new_embeddings)

    def get_decoder(self) -> nn.Module:
        return self.language_model.get_decoder()


def _accepted_arguments(model: nn.Module) -> frozenset[str] | None:
    """Argument names of a model's forward, or `None` if it takes any."""
    parameters = inspect.signature(model.forward).parameters.values()
    return None if any(p.kind is p.VAR_KEYWORD for p in parameters) else frozenset(p.name for p in parameters)


def _count_labels(inputs: dict[str, Any]) -> Tensor:
    """Labels that the LM loss counts, as `Trainer` counts them for `num_items_in_batch`."""
    shift_labels = inputs.get("shift_labels")
    labels = inputs["labels"][..., 1:] if shift_labels is None else shift_labels
    return labels.ne(-100).sum()


def _router_logits(record: RoutingRecord) -> Any:
    return tuple(layer.router_logits for layer in record.layers if layer.router_logits is not None)


register_checkpoint_conversion_mapping(MoEConfig.model_type, checkpoint_conversion(), overwrite=True)
MoEModel.register_for_auto_class("AutoModel")
MoEForCausalLM.register_for_auto_class("AutoModelForCausalLM")

__all__ = ["MoECausalLMOutputWithPast", "MoEForCausalLM", "MoEModel", "MoEPreTrainedModel"]
