# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""`MoEConfig`: a dense causal LM's config plus what replaces its feed-forward blocks."""

from __future__ import annotations

import difflib
from typing import Any, Literal, get_args

from transformers import AutoConfig, PreTrainedConfig
from transformers.configuration_utils import SubConfigSpec
from transformers.utils import logging

from .presets import PRESETS, preset_fields

logger = logging.get_logger(__name__)

RouterType = Literal[
    "noisy_top_k",
    "top_k",
    "switch",
    "gshard",
    "expert_choice",
    "hash",
    "sigmoid",
    "hierarchical",
    "strictly_balanced",
]
CapacityPolicy = Literal["position", "probability", "batch_priority"]
BalanceScope = Literal["micro_batch", "global_batch"]

NOISY_ROUTERS = ("noisy_top_k", "hierarchical")
# Routers in which the experts look for tokens: how many experts a token gets is not fixed, and depends on other tokens.
BATCH_ROUTERS = ("expert_choice", "strictly_balanced")
_COEFFICIENTS = (
    "router_importance_loss_coef",
    "router_load_loss_coef",
    "router_aux_loss_coef",
    "router_z_loss_coef",
    "router_threshold_loss_coef",
)


class MoEConfig(PreTrainedConfig):
    r"""Configuration of a Mixture-of-Experts made of any dense causal LM.

    Args:
        text_config (`PreTrainedConfig` or `dict`, *optional*): the dense causal LM's config (default: Llama's).
        num_experts (`int` or `list[int]`): experts per MoE layer, or one number per MoE layer ("pyramid").
        num_experts_per_tok (`int`): K, the experts a token is sent to. For `expert_choice` and `strictly_balanced` the
            average of it; for `hierarchical` the product of the choices at the two levels.
        router_type: which router (see `hf_moe.routers`).
        norm_topk_prob (`bool`): `top_k` only: renormalise the K kept probabilities to sum to 1.
        moe_intermediate_size (`int`, *optional*): expert width F (default: the width of the FFN that is replaced).
        decoder_sparse_step (`int`): every how many layers the FFN is replaced; layer i is when `(i + 1) % step == 0`.
        mlp_only_layers (`list[int]`): layers that stay dense whatever the step.
        num_shared_experts (`int`): experts that every token passes through, as one FFN of that multiple of F.
        use_shared_expert_gate (`bool`): scale the shared experts' output by a learned sigmoid per token (Qwen2-MoE).
        residual_moe (`bool`): keep the dense FFN beside the experts and mix both with a learned softmax of two (PR-MoE).
        capacity_factor (`float`, *optional*): in training an expert takes at most `capacity_factor * K / E` of the tokens
            of a sequence seen so far, rounded up; what is over passes through the residual. `None` is dropless. For
            `expert_choice` it is the average number of experts per token (default `num_experts_per_tok`).
        eval_capacity_factor (`float`, *optional*): the same in evaluation.
        capacity_policy: who is dropped when an expert is full. `"position"`: the later token (causal: a token's fate
            depends on earlier tokens of its own sequence only). `"probability"`: the assignment of lower weight.
            `"batch_priority"`: the token whose best weight is lower (V-MoE). The last two look at later tokens.
        allow_non_causal (`bool`): permit what lets a token depend on later ones: `expert_choice`, and the capacity
            policies other than `"position"`.
        n_group, topk_group (`int`): `sigmoid`: experts lie in `n_group` groups of which `topk_group` may be used per
            token. `hierarchical`: the primary gate chooses `topk_group` of `n_group` groups.
        routed_scaling_factor (`float`): `sigmoid` only: factor on the normalised weights.
        router_bias_update_speed (`float`): `sigmoid` only: u of the loss-free bias update, per optimizer step.
        router_jitter_noise (`float`): in training the router's own copy of its input is multiplied by
            U(1 - jitter, 1 + jitter). The experts' input is never touched.
        router_importance_loss_coef, router_load_loss_coef (`float`): w of CV² of importance and of load (Shazeer 2017).
        router_aux_loss_coef (`float`): coefficient of the Switch / GShard balancing loss.
        router_z_loss_coef (`float`): coefficient of the router z-loss (ST-MoE).
        router_threshold_loss_coef (`float`): `strictly_balanced` only: weight of the loss that learns the thresholds
            used at inference (Shazeer 2017, eq. 20).
        balance_scope: over what the losses' statistics are summed before the loss is taken: the rank's own
            `"micro_batch"`, or the `"global_batch"` of all ranks and of the accumulation steps so far.
        output_router_logits (`bool`): return the router logits of every MoE layer.

    Raises:
        ValueError: a value is out of range or two of them do not go together; the message names field, value, remedy.

    Example:
        >>> from transformers import LlamaConfig
        >>> config = MoEConfig(text_config=LlamaConfig(num_hidden_layers=4), num_experts=8, num_experts_per_tok=2)
        >>> config.moe_layers
        [0, 1, 2, 3]
    """

    model_type = "hf_moe"
    sub_configs_defaults = {"text_config": SubConfigSpec(config_class=AutoConfig, model_type="llama")}
    keys_to_ignore_at_inference = [
        "past_key_values",
        "lm_loss",
        "aux_loss",
        "importance_loss",
        "load_loss",
        "z_loss",
        "threshold_loss",
        "router_logits",
    ]

    text_config: dict | PreTrainedConfig | None = None
    num_experts: int | list[int] = 8
    num_experts_per_tok: int = 2
    router_type: str = "top_k"
    norm_topk_prob: bool = True
    moe_intermediate_size: int | None = None
    decoder_sparse_step: int = 1
    mlp_only_layers: list[int] | None = None
    num_shared_experts: int = 0
    use_shared_expert_gate: bool = False
    residual_moe: bool = False
    capacity_factor: float | int | None = None
    eval_capacity_factor: float | int | None = None
    capacity_policy: str = "position"
    allow_non_causal: bool = False
    n_group: int = 1
    topk_group: int = 1
    routed_scaling_factor: float | int = 1.0
    router_bias_update_speed: float | int = 1e-3
    router_jitter_noise: float | int = 0.0
    router_importance_loss_coef: float | int = 0.0
    router_load_loss_coef: float | int = 0.0
    router_aux_loss_coef: float | int = 0.01
    router_z_loss_coef: float | int = 0.0
    router_threshold_loss_coef: float | int = 1.0
    balance_scope: str = "global_batch"
    output_router_logits: bool = False

    def __post_init__(self, **kwargs: Any) -> None:
        self._refuse_misspelt(kwargs)
        self.mlp_only_layers = sorted(self.mlp_only_layers or [])
        super().__post_init__(**kwargs)
        self.tie_word_embeddings = getattr(self.text_config, "tie_word_embeddings", False)
        self.validate_moe()

    # ------------------------------------------------------------------ what the model reads

    @property
    def moe_layers(self) -> list[int]:
        """Indices of the decoder layers whose FFN is replaced (the rule of Qwen-MoE)."""
        num_layers = self.get_text_config().num_hidden_layers
        step, dense = self.decoder_sparse_step, set(self.mlp_only_layers or [])
        return [i for i in range(num_layers) if i not in dense and (i + 1) % step == 0]

    @property
    def num_experts_per_layer(self) -> list[int]:
        """Number of experts of each MoE layer, in the order of `moe_layers`."""
        if isinstance(self.num_experts, int):
            return [self.num_experts] * len(self.moe_layers)
        return list(self.num_experts)

    @property
    def weights_sum(self) -> float | None:
        """What the combine weights of a token sum to in evaluation without drops, or `None` where it depends on the token.

        It is what `conversion` divides the experts' output by, so that upcycling by copy keeps the function.
        """
        if self.router_type == "sigmoid":
            return float(self.routed_scaling_factor)
        if self.router_type in ("switch", "expert_choice") or (self.router_type == "top_k" and not self.norm_topk_prob):
            return None
        return 1.0

    # ------------------------------------------------------------------ validation

    def _refuse_misspelt(self, extra: dict[str, Any]) -> None:
        """`PreTrainedConfig` keeps any unknown keyword; one that is nearly a field's name is a mistake."""
        fields = list(type(self).__annotations__)
        for key in extra:
            close = [] if key.startswith("_") else difflib.get_close_matches(key, fields, n=1, cutoff=0.85)
            if close:
                raise ValueError(f"`{key}` is not a field of MoEConfig. Did you mean `{close[0]}`?")

    def validate_moe(self) -> None:
        """Check every field and the combinations of them. Called at construction; call it again after changing fields."""
        self._validate_choices()
        self._validate_numbers()
        self._validate_experts()
        self._validate_router()

    def _validate_choices(self) -> None:
        for field, choices in (
            ("router_type", get_args(RouterType)),
            ("capacity_policy", get_args(CapacityPolicy)),
            ("balance_scope", get_args(BalanceScope)),
        ):
            if getattr(self, field) not in choices:
                raise ValueError(
                    f"`{field}`={getattr(self, field)!r} is not known. Choose one of {', '.join(map(repr, choices))}."
                )

    def _validate_numbers(self) -> None:
        counts = {"decoder_sparse_step": 1, "num_shared_experts": 0, "n_group": 1, "topk_group": 1}
        for field, least in counts.items():
            _check(_is_int(getattr(self, field)) and getattr(self, field) >= least, self, field, f"an int >= {least}")
        if self.moe_intermediate_size is not None:
            _check(_is_int(self.moe_intermediate_size) and self.moe_intermediate_size > 0, self, "moe_intermediate_size",
                   "a positive int, or None for the dense width")  # fmt: skip
        for field in ("capacity_factor", "eval_capacity_factor"):
            value = getattr(self, field)
            _check(value is None or (_is_number(value) and value > 0), self, field, "a positive number, or None (dropless)")
        for field in (*_COEFFICIENTS, "router_bias_update_speed"):
            _check(_is_number(getattr(self, field)) and getattr(self, field) >= 0, self, field, "a number >= 0")
        _check(0 <= self.router_jitter_noise < 1, self, "router_jitter_noise", "a number in [0, 1)")
        _check(self.routed_scaling_factor > 0, self, "routed_scaling_factor", "a positive number")

    def _validate_experts(self) -> None:
        num_layers = self.get_text_config().num_hidden_layers
        outside = [i for i in self.mlp_only_layers or [] if not 0 <= i < num_layers]
        if outside:
            raise ValueError(
                f"`mlp_only_layers`={self.mlp_only_layers} names layers {outside}, but the model has layers 0 to "
                f"{num_layers - 1}. Remove them."
            )
        if not self.moe_layers:
            raise ValueError(
                f"`decoder_sparse_step`={self.decoder_sparse_step} and `mlp_only_layers`={self.mlp_only_layers} leave no "
                f"MoE layer among {num_layers}. Lower the step or shorten the list."
            )
        if not isinstance(self.num_experts, int) and len(self.num_experts) != len(self.moe_layers):
            raise ValueError(
                f"`num_experts`={self.num_experts} lists {len(self.num_experts)} layers, but {len(self.moe_layers)} are "
                f"MoE layers ({self.moe_layers}). Give one number for each, or a single int."
            )
        for experts in self.num_experts_per_layer:
            if not _is_int(experts) or experts < 1:
                raise ValueError(f"`num_experts`={self.num_experts} must be a positive int, or a list of them.")
            if not _is_int(self.num_experts_per_tok) or not 1 <= self.num_experts_per_tok <= experts:
                raise ValueError(
                    f"`num_experts_per_tok`={self.num_experts_per_tok} must lie in 1..{experts} (`num_experts`). "
                    "Choose fewer experts per token, or more experts."
                )
        if self.residual_moe and self.num_shared_experts:
            raise ValueError(
                f"`residual_moe`=True already keeps a dense FFN beside the experts; `num_shared_experts`="
                f"{self.num_shared_experts} would add a second one. Use one of the two."
            )
        if self.use_shared_expert_gate and not self.num_shared_experts:
            raise ValueError("`use_shared_expert_gate`=True has nothing to gate. Set `num_shared_experts` >= 1.")

    def _validate_router(self) -> None:
        router, top_k = self.router_type, self.num_experts_per_tok
        if router == "switch" and top_k != 1:
            raise ValueError(
                f"`router_type`='switch' is top-1, but `num_experts_per_tok`={top_k}. Set it to 1, or use 'top_k'."
            )
        if router == "gshard" and top_k != 2:
            raise ValueError(
                f"`router_type`='gshard' is top-2, but `num_experts_per_tok`={top_k}. Set it to 2, or use 'top_k'."
            )
        if router not in ("sigmoid", "hierarchical") and (self.n_group, self.topk_group) != (1, 1):
            raise ValueError(
                f"`n_group`={self.n_group}, `topk_group`={self.topk_group} are read by the 'sigmoid' and 'hierarchical' "
                f"routers only, not by {router!r}. Leave both at 1."
            )
        if router in ("sigmoid", "hierarchical"):
            self._validate_groups()
        if router == "expert_choice" and not self.allow_non_causal:
            raise ValueError(
                "`router_type`='expert_choice' lets later tokens decide about earlier ones, which leaks the future in a "
                "causal LM. Use another router, or set `allow_non_causal=True` if that is what you want."
            )
        if self.capacity_policy != "position" and not self.allow_non_causal:
            raise ValueError(
                f"`capacity_policy`={self.capacity_policy!r} lets later tokens push out earlier ones, which leaks the "
                "future in a causal LM. Use 'position', or set `allow_non_causal=True` if that is what you want."
            )
        if router == "strictly_balanced" and self.capacity_factor is not None:
            raise ValueError(
                f"`capacity_factor`={self.capacity_factor} has no meaning for `router_type`='strictly_balanced': every "
                "expert takes the same number of tokens already. Leave it at None."
            )
        if router in BATCH_ROUTERS and self.eval_capacity_factor is not None:
            raise ValueError(
                f"`eval_capacity_factor`={self.eval_capacity_factor} has no meaning for `router_type`={router!r}. "
                "Leave it at None."
            )
        if self.router_load_loss_coef and router not in NOISY_ROUTERS:
            raise ValueError(
                f"`router_load_loss_coef`={self.router_load_loss_coef} needs a noisy router (the smooth load is a "
                f"probability under its noise), not {router!r}. Set it to 0, or use one of {NOISY_ROUTERS}."
            )
        if self.routed_scaling_factor != 1 and router != "sigmoid":
            raise ValueError(
                f"`routed_scaling_factor`={self.routed_scaling_factor} is read by the 'sigmoid' router only, not by "
                f"{router!r}. Leave it at 1."
            )
        if self.router_jitter_noise and router == "hash":
            raise ValueError(f"`router_jitter_noise`={self.router_jitter_noise}: a hash has no input to jitter. Set it to 0.")

    def _validate_groups(self) -> None:
        for experts in self.num_experts_per_layer:
            if experts % self.n_group:
                raise ValueError(
                    f"`n_group`={self.n_group} does not divide `num_experts`={experts} into equal groups. Choose a divisor."
                )
        if self.topk_group > self.n_group:
            raise ValueError(f"`topk_group`={self.topk_group} must lie in 1..{self.n_group} (`n_group`).")
        group_size = min(self.num_experts_per_layer) // self.n_group
        if self.router_type == "hierarchical":
            if self.n_group < 2:
                raise ValueError(f"`router_type`='hierarchical' needs `n_group` >= 2 groups, not {self.n_group}.")
            if self.num_experts_per_tok % self.topk_group:
                raise ValueError(
                    f"`num_experts_per_tok`={self.num_experts_per_tok} is not a multiple of `topk_group`={self.topk_group}: "
                    "the hierarchical router takes the same number of experts in each group it chooses."
                )
        per_group = -(-self.num_experts_per_tok // self.topk_group)
        if per_group > group_size:
            raise ValueError(
                f"`num_experts_per_tok`={self.num_experts_per_tok} needs {per_group} experts in each of `topk_group`="
                f"{self.topk_group} groups, but a group has {group_size}. Raise `topk_group` or lower `n_group`."
            )

    # ------------------------------------------------------------------ presets

    @classmethod
    def from_preset(cls, name: str, text_config: dict | PreTrainedConfig | None = None, **overrides: Any) -> MoEConfig:
        """A published system's setting by name; every field can be overridden.

        Numbers of the preset that no longer fit the overrides or the model (K > E, groups that do not divide E, dense
        layers beyond the model's half) are reduced to the nearest that fit, with a warning; what you pass is never changed.

        Args:
            name: one of `hf_moe.PRESETS`.
            text_config: the dense causal LM's config.
            overrides: fields of `MoEConfig`.
        """
        if name not in PRESETS:
            raise ValueError(f"`name`={name!r} is not a preset. Choose one of {', '.join(map(repr, PRESETS))}.")
        default = cls(text_config=text_config)  # resolves dicts, attribute maps and the default text config
        fields, changed = preset_fields(name, default.get_text_config().num_hidden_layers, overrides)
        if changed:
            logger.warning(f"Preset {name!r} was fitted to this model: {', '.join(changed)}.")
        return cls(text_config=default.text_config, **{**fields, **overrides})


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _check(ok: bool, config: MoEConfig, field: str, expected: str) -> None:
    if not ok:
        raise ValueError(f"`{field}`={getattr(config, field)!r} must be {expected}.")


MoEConfig.register_for_auto_class()

__all__ = ["PRESETS", "MoEConfig"]
