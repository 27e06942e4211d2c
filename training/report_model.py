# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Loading the model of a report, and having it tell of its experts and of the text."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import nn
from tqdm import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer
from transformers.utils.peft_utils import find_adapter_config_file

import hf_moe.auto  # noqa: F401  registers our classes

from .expert_similarity import ExpertSimilarity, expert_similarity, expert_weights
from .report_data import ReportData, TextReport, analyse_text, pick_tested, report_data
from .report_source import Source
from .report_text import Document, tokenise
from .routing_capture import capture_routing, tokens_to_keep
from .routing_watch import RoutingWatch
from .watching import watch_routing

MAX_LENGTH = 1024  # tokens that the model reads at once


def gather(
    source: Source, documents: list[Document], max_tokens: int, device: str | None, dtype: str, trust_remote_code: bool
) -> ReportData:
    """Load the model, if there is one, and let it tell.

    Args:
        source: what there is.
        documents: text to route.
        max_tokens: of it.
        device, dtype, trust_remote_code: as in `write_report`.

    Raises:
        ValueError: the model cannot be used.
    """
    if source.checkpoint is None:
        return report_data(source, {}, None, [], learned=True)
    tokenizer: Any = None
    if source.tokenizer is not None:
        tokenizer = AutoTokenizer.from_pretrained(source.tokenizer, trust_remote_code=trust_remote_code)
    model = load_model(source.checkpoint, device, dtype, trust_remote_code)
    watch = _watch(model)
    similarities, notes = _similarities(model, watch)
    text, learned = None, True
    if tokenizer is not None:
        text, learned = _route(model, watch, tokenizer, documents, max_tokens)
        notes += _text_notes(model, text, learned)
    return report_data(source, _facts(model, watch, text), text, similarities, learned, notes)


def load_model(checkpoint: str, device: str | None, dtype: str, trust_remote_code: bool) -> nn.Module:
    """The causal LM of a folder or Hub id in evaluation mode; of an adapter, its model with the adapter merged in.

    Raises:
        ValueError: it cannot be loaded.
    """
    options: dict[str, Any] = {"dtype": dtype, "trust_remote_code": trust_remote_code}
    place = device or ("cuda" if torch.cuda.is_available() else "cpu")
    try:
        torch.empty(0, device=place)
    except (RuntimeError, AssertionError) as error:
        raise ValueError(f"`--device`={place!r} cannot be used here ({error}). Name another, e.g. cpu.") from error
    is_adapter = Path(checkpoint, "adapter_config.json").is_file() and not Path(checkpoint, "config.json").is_file()
    if is_adapter or (not Path(checkpoint).is_dir() and find_adapter_config_file(checkpoint) is not None):
        from peft import PeftConfig, PeftModel

        name = PeftConfig.from_pretrained(checkpoint).base_model_name_or_path
        base: Any = AutoModelForCausalLM.from_pretrained(name, **options)
        model: Any = PeftModel.from_pretrained(base, checkpoint).merge_and_unload()
    else:
        model = AutoModelForCausalLM.from_pretrained(checkpoint, **options)
    return model.to(place).eval()


def _watch(model: nn.Module) -> RoutingWatch:
    """Its MoE layers.

    Raises:
        ValueError: there are none.
    """
    try:
        watch = watch_routing(model, lambda record: None, in_eval=True)
    except ValueError as error:
        raise ValueError(
            f"`RUN_OR_MODEL` holds no Mixture-of-Experts that is known, but a {type(model).__name__}. Upcycle it first "
            "(`hf-moe upcycle`)."
        ) from error
    watch.remove()
    return watch


def _similarities(model: nn.Module, watch: RoutingWatch) -> tuple[list[ExpertSimilarity], list[str]]:
    """Similarity of the experts of every layer whose weights are found, and what to say of the others."""
    found, lost = [], []
    rows = list(zip(watch.layers, watch.routers, watch.num_experts, strict=True))
    for layer, router, experts in tqdm(rows, desc="experts", unit="layer"):
        weights = expert_weights(model, router, experts)
        if weights is None:
            lost.append(str(layer))
        else:
            found.append(expert_similarity(layer, weights))
    said = f"The weights of the experts were not found in layer {', '.join(lost)}: their similarity is not shown there."
    return found, [said] if lost else []


def _route(
    model: nn.Module, watch: RoutingWatch, tokenizer: Any, documents: list[Document], max_tokens: int
) -> tuple[TextReport, bool]:
    """What the text tells, and whether the routers have weights."""
    config: Any = model.config
    text_config = config.get_text_config()
    length = min(MAX_LENGTH, getattr(text_config, "max_position_embeddings", None) or MAX_LENGTH)
    table = tokenise(documents, tokenizer, max_tokens, length)
    most = tokens_to_keep(len(table.ids_N), len(watch.layers), text_config.hidden_size, max(watch.num_experts))
    tested_N = pick_tested(table, most)
    capture = capture_routing(model, table.ids_N, table.sequence_N, tested_N)
    return analyse_text(table, capture, tested_N), capture.learned


# ---------------------------------------------------------------------- words


def _facts(model: nn.Module, watch: RoutingWatch, text: TextReport | None) -> dict[str, Any]:
    config: Any = model.config
    parameters = sum(p.numel() for p in model.parameters())
    facts: dict[str, Any] = {"architecture": type(model).__name__, "parameters": f"{parameters / 1e6:,.1f} M parameters"}
    inner = config.get_text_config()
    if inner is not config:
        facts["architecture"] += f" on {inner.model_type}"
    facts["layers"] = f"{len(watch.layers)} MoE layers of {getattr(inner, 'num_hidden_layers', len(watch.layers))}"
    if text is not None:
        experts = sorted({layer.num_experts for layer in text.layers})
        per_token = sum(float(layer.slots_per_token.mean()) for layer in text.layers) / len(text.layers)
        facts["experts"] = f"{' to '.join(map(str, experts[:: max(1, len(experts) - 1)]))} experts, {per_token:.3g} per token"
        facts["text"] = f"{len(text.table.ids_N)} tokens in {len(text.table.parts)} parts of text"
    return facts


def _text_notes(model: nn.Module, text: TextReport, learned: bool) -> list[str]:
    notes = []
    config: Any = model.config
    if getattr(config, "router_type", None) == "expert_choice":
        notes.append("Experts choose tokens from a whole batch: with other texts beside it, a token may get other experts.")
    if text.tested < len(text.table.ids_N):
        notes.append(f"The tests looked at {text.tested} of the {len(text.table.ids_N)} tokens; counts are of all.")
    if learned and not text.comparisons and any(found.share is not None for found in text.dependences.values()):
        notes.append("What the routers read is not known, so they were not compared with random routers.")
    if "part" not in text.dependences:
        notes.append("The text has too few parts, or too little of each, to test whether experts depend on them.")
    return notes
