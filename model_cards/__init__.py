# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Model cards: a README.md that says what a model is and where it comes from, and its way to the Hub."""

from .conversion_card import conversion_card
from .lineage import describe_parent
from .metadata import CardOptions
from .pushing import Push, create_model_card, push_to_hub
from .rendering import render_card, save_card

__all__ = [
    "CardOptions",
    "Push",
    "conversion_card",
    "create_model_card",
    "describe_parent",
    "push_to_hub",
    "render_card",
    "save_card",
]
