# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Published Mixture-of-Experts systems as `MoEConfig` fields: one row per system, with its paper."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class Preset:
    """What a published system sets."""

    paper: str
    fields: dict[str, Any] = field(default_factory=dict)
    first_dense_layers: int = 0


_SHAZEER = {"router_importance_loss_coef": 0.1, "router_load_loss_coef": 0.1, "router_aux_loss_coef": 0.0}

PRESETS: dict[str, Preset] = {
    "shazeer2017": Preset(
        "Shazeer et al. 2017, arXiv:1701.06538",
        {"router_type": "noisy_top_k", "num_experts": 256, "num_experts_per_tok": 4, **_SHAZEER},
    ),
    "shazeer2017_hierarchical": Preset(
        "Shazeer et al. 2017, arXiv:1701.06538, app. B",
        {"router_type": "hierarchical", "num_experts": 256, "num_experts_per_tok": 4, "n_group": 16, "topk_group": 2,
         **_SHAZEER},
    ),
    "switch": Preset(
        "Fedus et al. 2021, arXiv:2101.03961",
        {"router_type": "switch", "num_experts": 128, "num_experts_per_tok": 1, "capacity_factor": 1.25,
         "decoder_sparse_step": 2, "router_jitter_noise": 0.01, "router_aux_loss_coef": 0.01},
    ),
    "gshard": Preset(
        "Lepikhin et al. 2020, arXiv:2006.16668",
        {"router_type": "gshard", "num_experts": 128, "num_experts_per_tok": 2, "capacity_factor": 1.25,
         "decoder_sparse_step": 2, "router_aux_loss_coef": 0.01},
    ),
    "glam": Preset(
        "Du et al. 2021, arXiv:2112.06905",
        {"router_type": "gshard", "num_experts": 64, "num_experts_per_tok": 2, "capacity_factor": 1.25,
         "decoder_sparse_step": 2, "router_aux_loss_coef": 0.01},
    ),
    "mixtral": Preset(
        "Jiang et al. 2024, arXiv:2401.04088",
        {"router_type": "top_k", "num_experts": 8, "num_experts_per_tok": 2, "router_aux_loss_coef": 0.02},
    ),
    "expert_choice": Preset(
        "Zhou et al. 2022, arXiv:2202.09368",
        {"router_type": "expert_choice", "num_experts": 64, "num_experts_per_tok": 2, "decoder_sparse_step": 2,
         "router_aux_loss_coef": 0.0, "allow_non_causal": True},
    ),
    "hash": Preset(
        "Roller et al. 2021, arXiv:2106.04426",
        {"router_type": "hash", "num_experts": 64, "num_experts_per_tok": 1, "router_aux_loss_coef": 0.0},
    ),
    "megablocks": Preset(
        "Gale et al. 2022, arXiv:2211.15841",
        {"router_type": "top_k", "num_experts": 64, "num_experts_per_tok": 1, "norm_topk_prob": False,
         "router_aux_loss_coef": 0.01},
    ),
    "deepspeed_residual": Preset(
        "Rajbhandari et al. 2022 (DeepSpeed-MoE, PR-MoE), arXiv:2201.05596",
        {"router_type": "switch", "num_experts": 64, "num_experts_per_tok": 1, "residual_moe": True,
         "capacity_factor": 1.25, "decoder_sparse_step": 2, "router_aux_loss_coef": 0.01},
    ),
    "deepseek_v3": Preset(
        "DeepSeek-AI 2024, arXiv:2412.19437; loss-free balancing: Wang et al. 2024, arXiv:2408.15664",
        {"router_type": "sigmoid", "num_experts": 256, "num_experts_per_tok": 8, "num_shared_experts": 1, "n_group": 8,
         "topk_group": 4, "routed_scaling_factor": 2.5, "router_bias_update_speed": 1e-3, "router_aux_loss_coef": 1e-4},
        first_dense_layers=3,
    ),
    "qwen3_moe": Preset(
        "Qwen Team 2025, arXiv:2505.09388; global-batch balance: Qiu et al. 2025, arXiv:2501.11873",
        {"router_type": "top_k", "num_experts": 128, "num_experts_per_tok": 8, "router_aux_loss_coef": 1e-3,
         "balance_scope": "global_batch"},
    ),
    "olmoe": Preset(
        "Muennighoff et al. 2024, arXiv:2409.02060",
        {"router_type": "top_k", "num_experts": 64, "num_experts_per_tok": 8, "norm_topk_prob": False,
         "router_aux_loss_coef": 0.01, "router_z_loss_coef": 1e-3},
    ),
}  # fmt: skip


def preset_fields(name: str, num_hidden_layers: int, overrides: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """The fields of preset `name` fitted to a model and to `overrides`.

    Returns:
        The fields, and a description of each that had to be reduced to fit.
    """
    preset = PRESETS[name]
    fields = dict(preset.fields)
    before = dict(fields)
    experts = overrides.get("num_experts", fields["num_experts"])
    experts = min(experts) if isinstance(experts, (list, tuple)) and experts else experts
    if isinstance(experts, int) and experts > 0:
        _fit_to_experts(fields, experts, overrides)
    if preset.first_dense_layers and "mlp_only_layers" not in overrides:
        before["mlp_only_layers"] = list(range(preset.first_dense_layers))
        fields["mlp_only_layers"] = list(range(min(preset.first_dense_layers, num_hidden_layers // 2)))
    if fields.get("decoder_sparse_step", 1) > num_hidden_layers:
        fields["decoder_sparse_step"] = num_hidden_layers
    changed = [f"{k} {before[k]} -> {fields[k]}" for k in fields if k not in overrides and fields[k] != before[k]]
    return fields, changed


def _fit_to_experts(fields: dict[str, Any], experts: int, overrides: dict[str, Any]) -> None:
    """Reduce groups and K until they fit `experts`; what the user overrides stays as given."""
    given: dict[str, Any] = {**fields, **overrides}
    if "n_group" in fields and "n_group" not in overrides:
        # at least two experts in a group (a group's score is the sum of its two best), the count a divisor
        fields["n_group"] = max(g for g in range(1, given["n_group"] + 1) if experts % g == 0 and (g == 1 or experts // g >= 2))
    if "topk_group" in fields and "topk_group" not in overrides:
        most = min(given["topk_group"], overrides.get("n_group", fields["n_group"]))
        # the hierarchical router takes the same number in every group it chooses
        top_k = overrides.get("num_experts_per_tok") if fields["router_type"] == "hierarchical" else None
        fields["topk_group"] = max(g for g in range(1, most + 1) if not isinstance(top_k, int) or top_k % g == 0)
    if "num_experts_per_tok" not in overrides:
        groups, chosen = ({**fields, **overrides}.get(k, 1) for k in ("n_group", "topk_group"))
        fields["num_experts_per_tok"] = min(given["num_experts_per_tok"], chosen * (experts // groups), experts)
