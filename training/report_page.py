# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""The page of a report: one HTML file that asks nobody for anything."""

from __future__ import annotations

from html import escape
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np

from hf_moe.version import __version__

from .report_charts import Chart, held_charts, similarity_charts, training_charts
from .report_data import RUN, ReportData, TextReport
from .report_payload import MAX_SLOTS, page_layers, page_numbers, script_json, shown_tokens
from .report_svg import ramp
from .report_text import CLASSES, code
from .routing_analysis import LayerRouting
from .specialisation import percent

TEMPLATES = Path(__file__).parent / "templates"
LOAD_HEADLINES = {
    "balanced": "The load is balanced.",
    "uneven": "The load is uneven.",
    "dead": "Some experts are dead.",
    "collapsed": "The routing has collapsed.",
    "unknown": "There is too little to judge the load.",
}
LABELS = {"token": "token", "part": "part of the text", "class": "class of token", "position": "position in the sequence"}

# Okabe and Ito's colours, which colour-blind readers can tell apart; beyond eight experts only the number can.
_EIGHT = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#b3a100", "#7a7a85")


def render_page(data: ReportData) -> str:
    """The page as HTML text."""
    from jinja2 import Environment, FileSystemLoader

    environment = Environment(loader=FileSystemLoader(TEMPLATES), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("report.html").render(**_context(data))


def _context(data: ReportData) -> dict[str, Any]:
    from markupsafe import Markup

    shown = 0 if data.text is None else shown_tokens(data.text)
    layers = page_layers(data)
    most = max((n for _, n in layers), default=0)
    load = data.source.expert_load
    return {
        "name": data.source.name,
        "facts": _facts(data),
        "version": __version__,
        "css": Markup((TEMPLATES / "report.css").read_text(encoding="utf-8")),
        "js": Markup((TEMPLATES / "report.js").read_text(encoding="utf-8")),
        "expert_colors": Markup(_expert_colors(most)),
        "payload": Markup(script_json(page_numbers(data, shown))),
        "verdict": data.verdict,
        "load_verdict": data.load_verdict,
        "load_headline": "" if data.load_verdict is None else LOAD_HEADLINES[data.load_verdict.level],
        "notes": data.notes,
        "held": _drawn([] if data.text is None else held_charts(data.text)),
        "compared": data.text is not None and bool(data.text.comparisons),
        "units": "" if data.text is None else _units(data.text),
        "most_experts": most,
        "held_table": [] if data.text is None else _held_table(data.text),
        "layers": [layer for layer, _ in layers],
        "documents": [] if data.text is None else _documents(data.text, shown),
        "shown_note": "" if data.text is None else _shown_note(data.text, shown),
        "has_load_map": data.text is not None or load is not None,
        "load_caption": _load_caption(data),
        "curves": _drawn(training_charts(data.source)),
        "curves_caption": _curves_caption(data),
        "ramp": ramp(5) if load is not None and len(load.layers) > 1 else [],
        "similarity": _similarity(data),
        "has_pairs": data.text is not None and any(pairs is not None for pairs in data.text.coactivations),
    }


def _drawn(charts: list[Chart]) -> list[dict[str, Any]]:
    from markupsafe import Markup

    return [{"title": chart.title, "svg": Markup(chart.svg()), "caption": chart.caption} for chart in charts]


# ---------------------------------------------------------------------- words


def _facts(data: ReportData) -> str:
    return " · ".join(str(value) for value in data.model.values()) or "no model"


def _shown_note(text: TextReport, shown: int) -> str:
    total = len(text.table.ids_N)
    cut = f"The first {shown} of {total} tokens are shown." if shown < total else ""
    more = [layer for layer in text.layers if layer.expert_ids_NK.shape[1] > MAX_SLOTS]
    return f"{cut} Of a token's experts, the {MAX_SLOTS} of largest weight are named." if more else cut


def _load_caption(data: ReportData) -> str:
    of = f"the {len(data.text.table.ids_N)} tokens of the text" if data.text is not None else "the last row of the training log"
    return f"Assignments of every expert in every MoE layer, over its fair share, counted as they were executed on {of}."


def _curves_caption(data: ReportData) -> str:
    load = data.source.expert_load
    if load is None:
        return "From the training log."
    return f"From the training log and {len(load.steps)} rows of expert load, up to step {load.steps[-1]}."


def _units(text: TextReport) -> str:
    found = text.dependences.get("part")
    if found is None:
        return "tokens"
    documents = len(np.unique(text.table.document_N))
    what = "whole documents" if found.units <= documents else f"runs of {RUN} tokens"
    return f"tokens, and parts of the text among {what}"


def _held_table(text: TextReport) -> list[dict[str, str]]:
    rows = []
    for name, found in text.dependences.items():
        random = text.comparisons.get(name)
        rows.append(
            {
                "label": LABELS[name],
                "share": "–" if found.share is None else percent(found.share),
                "p": "–" if found.p is None else f"{found.p:.2g}",
                "random": "–" if random is None else f"{percent(random.share)} ± {percent(random.std)}",
                "random_p": "–" if random is None else f"{random.p:.2g}",
            }
        )
    return rows


def _similarity(data: ReportData) -> dict[str, Any] | None:
    if not data.similarities:
        return None
    identical = [similarity.layer for similarity in data.similarities if similarity.identical]
    said = "All weights of an expert as one vector. Upcycled experts start as copies and move apart as they specialise."
    if len(identical) == len(data.similarities):
        said += " Here the experts of every layer are still identical."
    elif identical:
        said += f" The experts of layers {', '.join(map(str, identical))} are still identical."
    return {"caption": said, "charts": _drawn(similarity_charts(data.similarities))}


# ---------------------------------------------------------------------- the text


def _documents(text: TextReport, shown: int) -> list[dict[str, Any]]:
    """Title and HTML of every document; neighbours of the same part have one title."""
    from markupsafe import Markup

    table, first = text.table, text.layers[0]
    bounds = np.flatnonzero(np.diff(table.document_N[:shown], prepend=-1, append=-1)).tolist()
    documents, before = [], None
    for start, end in pairwise(bounds):
        part = table.parts[table.part_N[start]]
        spans = "".join(
            _span(table.pieces[t], int(table.class_N[t]), int(first.expert_ids_NK[t, 0]), first) for t in range(start, end)
        )
        documents.append({"title": part if part != before else "", "html": Markup(spans)})
        before = part
    return documents


def _span(piece: str, token_class: int, expert: int, layer: LayerRouting) -> str:
    names = [f"e{expert}" if expert < layer.num_experts else "ex"]
    if CLASSES[token_class] == "special":
        names.append("s")
    elif not piece.strip():
        names.append("w")
    return f'<i class="{" ".join(names)}">{escape(shown_piece(piece))}</i>'


def shown_piece(piece: str) -> str:
    """A token's text so that white space can be seen where it is all there is, and line ends always."""
    if not piece:
        return "◌"  # a later byte of a character
    if not piece.strip():
        piece = piece.replace(" ", "·")
    piece = piece.replace("\r\n", "\n").replace("\n", "⏎\n").replace("\t", "⇥\t")
    return "".join(c if c in "\n\t" or c.isprintable() else code(c) for c in piece)


def _expert_colors(experts: int) -> str:
    rules = [f".e{expert}{{--c:{color}}}" for expert, color in enumerate(_EIGHT[:experts])]
    if experts > len(_EIGHT):
        rules = [f".e{i}{{--c:oklch({0.62 + 0.1 * (i % 3 - 1):.2f} .13 {i * 137.508 % 360:.0f})}}" for i in range(experts)]
    return "".join(rules)
