# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""What each section of a card says, as rows and words for the template."""

from __future__ import annotations

import dataclasses
import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

from hf_moe.moe_fields import MoEFields
from hf_moe.parameter_counts import ConfigFields, ParameterCounts

from .lineage import Stage
from .subject import Subject
from .training_run import TrainingRun, hyperparameter_rows, layer_loads

Rows = list[tuple[str, str]]

OURS = "hf_moe"  # `model_type` of a MoE of hf_moe
_DEFAULTS = {field.name: field.default for field in dataclasses.fields(MoEFields)}

# Router losses: the field with the coefficient, and what the loss is.
_LOSSES = {
    "router_aux_loss_coef": "Switch / GShard balancing loss",
    "router_importance_loss_coef": "CV² of the importance (Shazeer 2017)",
    "router_load_loss_coef": "CV² of the load (Shazeer 2017)",
    "router_z_loss_coef": "router z-loss (ST-MoE)",
    "router_threshold_loss_coef": "threshold loss (Shazeer 2017, eq. 20)",
}
# What else a router of hf_moe reads, by its type.
_ROUTER_READS = {
    "top_k": ("norm_topk_prob",),
    "hierarchical": ("n_group", "topk_group"),
    "sigmoid": ("n_group", "topk_group", "routed_scaling_factor", "router_bias_update_speed"),
}
# The same of native classes.
_NATIVE_ROUTER = ("scoring_func", "topk_method", "norm_topk_prob", "n_group", "topk_group", "routed_scaling_factor")
_NATIVE_LOSS = re.compile(r"\w*(aux_loss|z_loss)\w*")

# The last log of the load: key, what it is.
_LOAD_METRICS = {
    "load_max_over_mean": "largest load over mean",
    "worst_load_max_over_mean": "largest load over mean, worst layer",
    "load_cv": "coefficient of variation of the load",
    "importance_cv": "coefficient of variation of the importance",
    "router_entropy": "router entropy (nats per token)",
    "drop_rate": "share of assignments dropped",
    "dead_experts": "experts without a token (all layers)",
    "lm_loss": "LM loss",
    "aux_loss": "Switch / GShard balancing loss",
    "importance_loss": "importance loss",
    "load_loss": "load loss",
    "z_loss": "z-loss",
    "threshold_loss": "threshold loss",
}
# What a run was told of its data, and the option without which it means nothing.
_DATA = {
    "dataset_name": ("dataset", None),
    "dataset_config_name": ("its configuration", "dataset_name"),
    "train_split": ("its split for training", "dataset_name"),
    "eval_split": ("its held-out split", "dataset_name"),
    "train_file": ("training text", None),
    "eval_file": ("held-out text", None),
    "validation_split_percentage": ("held out, in per cent of the documents", None),
    "packing": ("packing", None),
}


def size_rows(subject: Subject) -> Rows:
    """Parameters, bytes and dtypes."""
    counts, rows = subject.counts, []
    if subject.adapter is not None:
        rows = [
            ("parameters of the adapter", number(subject.adapter.parameters)),
            ("its bytes", f"{short(subject.adapter.nbytes)}B"),
        ]
    if counts is None:
        return rows
    of_base = " of the base model" if subject.adapter is not None else ""
    rows.append((f"parameters{of_base}", number(counts.total)))
    if counts.num_experts:
        rows.append(("active per token", "unknown" if counts.active is None else number(counts.active)))
        rows.append(("in experts", number(counts.experts)))
        rows.append(("in routers", number(counts.router)))
        if counts.shared:
            rows.append(("in shared experts", number(counts.shared)))
    total = sum(subject.dtypes.values())
    each = sorted(subject.dtypes.items(), key=lambda item: -item[1])
    said = ", ".join(f"{name} {short(size)}B" for name, size in each) if len(each) > 1 else "".join(name for name, _ in each)
    rows.append(("bytes", f"{short(total)}B ({said})"))
    return rows


def routing_rows(subject: Subject) -> Rows:
    """The router, its numbers and its losses; empty for a dense model."""
    counts, config = subject.counts, subject.config
    if counts is None or not counts.num_experts:
        return []
    ours = config.get("model_type") == OURS
    top_k = ConfigFields(config).number("num_experts_per_tok")
    num_layers = ConfigFields(config).number("num_layers")
    each = ", ".join(str(n) for n in sorted(set(counts.num_experts.values())))
    rows = [
        ("router", _our_router(config) if ours else _native_router(config)),
        ("experts", f"{each} per MoE layer, {'unknown' if top_k is None else top_k} per token"),
        ("MoE layers", ranges(counts.num_experts) + (f" of {num_layers}" if num_layers else "")),
    ]
    return rows + (_our_routing(config) if ours else _native_losses(config))


def _field(config: Mapping[str, Any], name: str) -> Any:
    return config.get(name, _DEFAULTS[name])


def _our_router(config: Mapping[str, Any]) -> str:
    kind = str(_field(config, "router_type"))
    reads = ", ".join(f"`{name}`={_field(config, name)}" for name in _ROUTER_READS.get(kind, ()))
    return f"`{kind}`" + (f" ({reads})" if reads else "")


def _our_routing(config: Mapping[str, Any]) -> Rows:
    rows: Rows = []
    if shared := _field(config, "num_shared_experts"):
        gated = ", scaled by a learned gate" if _field(config, "use_shared_expert_gate") else ""
        rows.append(("shared experts", f"{shared} per MoE layer{gated}"))
    if _field(config, "residual_moe"):
        rows.append(("residual MoE", "the dense FFN stays beside the experts"))
    train, evaluation = _field(config, "capacity_factor"), _field(config, "eval_capacity_factor")
    policy = f" (who is dropped: `{_field(config, 'capacity_policy')}`)" if train or evaluation else ""
    said = [f"factor {value:g} in {when}" if value else f"dropless in {when}"
            for value, when in ((train, "training"), (evaluation, "evaluation"))]  # fmt: skip
    rows.append(("capacity", (", ".join(said) if train or evaluation else "dropless") + policy))
    if jitter := _field(config, "router_jitter_noise"):
        rows.append(("jitter of the router's input", f"{jitter:g}"))
    hidden = set() if _field(config, "router_type") == "strictly_balanced" else {"router_threshold_loss_coef"}
    losses = {n: _field(config, n) for n in _LOSSES if n not in hidden and _field(config, n)}
    rows += [(_LOSSES[name], f"coefficient {value:g}") for name, value in losses.items()]
    rows.append(("balanced over", str(_field(config, "balance_scope")).replace("_", " ")) if losses else ("losses", "none"))
    return rows


def _native_router(config: Mapping[str, Any]) -> str:
    fields = ConfigFields(config)
    known = {name: fields.value(name) for name in _NATIVE_ROUTER if fields.value(name) is not None}
    said = ", ".join(f"`{name}`={value}" for name, value in known.items())
    return f"that of `{config.get('model_type')}`" + (f" ({said})" if said else "")


def _native_losses(config: Mapping[str, Any]) -> Rows:
    levels = [config, *(level for level in [config.get("text_config")] if isinstance(level, Mapping))]
    found = {n: v for level in levels for n, v in level.items() if _NATIVE_LOSS.fullmatch(n) and isinstance(v, float | int)}
    return [(f"`{name}`", str(value)) for name, value in found.items()]


def load_grid(run: TrainingRun | None) -> list[list[str]]:
    """A row for each MoE layer, under a row of headings; columns of which nothing is known are left out."""
    loads = [] if run is None else layer_loads(run)
    columns: dict[str, list[str | None]] = {
        "layer": [str(load.layer) for load in loads],
        "experts": [None if load.num_experts is None else str(load.num_experts) for load in loads],
        "max/mean": [f"{load.max_over_mean:.2f}" for load in loads],
        "CV": [f"{load.cv:.3f}" for load in loads],
        "dead experts": [str(load.dead) for load in loads],
        WHOLE_RUN: [None if load.run_max_over_mean is None else f"{load.run_max_over_mean:.2f}" for load in loads],
    }
    return _grid(columns) if loads else []


WHOLE_RUN = "max/mean, whole run"


def _grid(columns: Mapping[str, Sequence[str | None]]) -> list[list[str]]:
    known = {name: values for name, values in columns.items() if any(value is not None for value in values)}
    return [list(known), *([value or "" for value in row] for row in zip(*known.values(), strict=True))]


def metric_rows(run: TrainingRun | None) -> Rows:
    """The last logged `moe/…` values, means over layers."""
    values = {} if run is None else run.last("moe/")
    return [(_LOAD_METRICS[name], plain(values[name])) for name in _LOAD_METRICS if name in values]


def training_rows(run: TrainingRun | None, datasets: Iterable[str] = ()) -> Rows:
    """Data and hyper-parameters."""
    if run is None:
        return []
    rows: Rows = [("datasets", ", ".join(f"[{d}](https://huggingface.co/datasets/{d})" for d in datasets))] if datasets else []
    options = run.options
    for name, (shown, needed) in _DATA.items():
        value = options.get(name) if needed is None or options.get(needed) else None
        items = [_last_part(str(item)) for item in (value if isinstance(value, list) else [value]) if item]
        if items and not (name == "dataset_name" and datasets):
            rows.append((shown, ", ".join(f"`{code(item)}`" for item in items)))
    losses = run.losses()
    said = [("training loss", f"{plain(losses[0])} at the first log, {plain(losses[-1])} at the last")] if losses else []
    return [*rows, *hyperparameter_rows(run), *said]


def _last_part(path: str) -> str:
    """A file's name; folders of the machine that trained are nobody's business. Ids of the Hub stay whole."""
    return path.rstrip("/").rpartition("/")[2] if path.startswith(("/", ".", "~")) or path.count("/") > 1 else path


def evaluation_grid(before: Mapping[str, float], after: Mapping[str, float], given: Mapping[str, Any]) -> list[list[str]]:
    """Results before and after training under a row of headings; those that were given stand with the latter."""
    values = {**after, **given}
    names = list(dict.fromkeys([*before, *values]))
    columns: dict[str, list[str | None]] = {
        "result": list(names),
        "before training": [plain(before[name]) if name in before else None for name in names],
        "after" if before else "value": [plain(values[name]) if name in values else None for name in names],
    }
    return _grid(columns) if names else []


def exactness_rows(stage: Stage) -> Rows:
    """What the comparison of a conversion measured; empty if there was none."""
    report = stage.report
    names = report.get("names") or ("dense", "MoE")
    if not report:
        return []
    dtype = report.get("dtype")
    rows = [
        ("tokens compared", str(report.get("tokens"))),
        (f"largest difference of logits, {dtype}", plain(report.get("max_abs_diff"))),
        (f"mean difference of logits, {dtype}", plain(report.get("mean_abs_diff"))),
    ]
    if report.get("max_abs_diff_float64") is not None:
        rows.append(("largest difference of logits, float64", plain(report["max_abs_diff_float64"])))
        rows.append((f"the {names[0]} model's own rounding in {dtype}", plain(report.get("dense_rounding"))))
    rows += [(f"LM loss, {names[0]}", plain(report.get("dense_loss"))), (f"LM loss, {names[1]}", plain(report.get("moe_loss")))]
    if report.get("routing_entropy") is not None:
        rows.append(("routing entropy", f"{100 * report['routing_entropy']:.2f} % of its maximum"))
    verdict = report.get("verdict") or ("function preserved" if report.get("exact") else "approximate: beyond rounding")
    return [*rows, ("verdict", f"**{verdict}**")]


def adapter_rows(config: Mapping[str, Any]) -> Rows:
    """Rank and targets of an adapter."""
    rows: Rows = []
    for name in (
        "peft_type",
        "r",
        "lora_alpha",
        "lora_dropout",
        "use_rslora",
        "target_modules",
        "target_parameters",
        "modules_to_save",
    ):
        value = config.get(name)
        if value not in (None, [], "", False):
            said = (
                ", ".join(f"`{code(str(v))}`" for v in value)
                if isinstance(value, list)
                else str(getattr(value, "value", value))
            )
            rows.append((name.replace("_", " "), said))
    return rows


# ---------------------------------------------------------------------- numbers and words


def number(value: int) -> str:
    """`373,467,456 (373.5 M)`."""
    return f"{value:,}" + (f" ({short(value)})" if value >= 1000 else "")


def short(value: int) -> str:
    """3 to 4 digits and a unit: `254.1 M`."""
    for size, unit in ((10**12, "T"), (10**9, "G"), (10**6, "M"), (10**3, "k")):
        if value >= size:
            return f"{value / size:.4g} {unit}"
    return f"{value} "


def plain(value: Any) -> str:
    """A measured number with 4 to 5 digits."""
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return str(value)
    return str(int(value)) if float(value).is_integer() and abs(value) < 10**15 else f"{value:.5g}"


def ranges(numbers: Iterable[int]) -> str:
    """`0-3, 5` for 0, 1, 2, 3, 5."""
    runs: list[list[int]] = []
    for value in sorted(numbers):
        if runs and runs[-1][1] == value - 1:
            runs[-1][1] = value
        else:
            runs.append([value, value])
    return ", ".join(f"{a}-{b}" if a != b else f"{a}" for a, b in runs)


def code(text: str) -> str:
    """For a code span in a table: no backtick, no bar, no line break."""
    return " ".join(text.replace("`", "'").replace("|", "/").split())


def parameters(counts: ParameterCounts) -> str:
    """The size in a few words."""
    total = short(counts.total).strip()
    return f"{total} parameters" if not counts.num_experts or counts.active is None else (
        f"{total} parameters, of which a token uses {short(counts.active).strip()}"
    )  # fmt: skip
