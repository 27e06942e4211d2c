# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""`MoEModel` and `MoEForCausalLM`: any dense causal LM of Transformers with its feed-forward blocks replaced by experts."""

from __future__ import annotations

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AutoModel, AutoModelForCausalLM, Cache, GenerationMixin, PreTrainedModel
from transformers.conversion_mapping import register_checkpoint_conversion_mapping
from transformers.modeling_outputs import MoeCausalLMOutputWithPast, MoeModelOutputWithPast
from transformers.models.auto.modeling_auto import MODEL_FOR_CAUSAL_LM_MAPPING
from transformers.utils.generic import can_return_tuple

from .balance import BatchBalance
from .callers_loss import Backbone, CallersLoss
from .checkpoint_names import checkpoint_conversion
from .configuration_moe import MoEConfig
from .pretrained_moe import MoEPreTrainedModel
from .record import RoutingRecord

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
        # a copy: `Trainer` scales the loss in place
        record.lm_loss, record.adds_up = lm_loss.detach().clone(), num_items is not None
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
