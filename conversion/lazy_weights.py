# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""What is computed only when it is written: experts that are more than rows of the dense FFN, and routers from prompts.

What depends on a whole layer or on calibration text (which neurons go to which expert, the routers' rows) is kept in the
conversion's folder: a run that goes on after another must go on with the same.
"""

from __future__ import annotations

import os
from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .dense_source import DenseSource
from .errors import ConversionError
from .ffn_tensors import FFNReader
from .methods import Method, Role, Split
from .recipe import Recipe, read_text

if TYPE_CHECKING:
    from torch import Tensor

    from .moe_tensors import LayerPlan

_MOST_FEATURES = 2 * 10**9  # bytes of activations that are held at a time


class LazyWeights:
    """Experts' tensors and routers' rows on demand; `memo` is the folder where they are kept, or `None`."""

    def __init__(self, recipe: Recipe, method: Method, source: DenseSource, memo: Path | None) -> None:
        self._recipe, self._method, self._source, self._memo = recipe, method, source, memo
        self._layers: dict[int, LayerPlan] = {}
        self._known: dict[str, Tensor] = {}

    def set_layers(self, layers: dict[int, LayerPlan]) -> None:
        """The layers that are converted."""
        self._layers = layers

    @property
    def needs_settling(self) -> bool:
        """Whether anything depends on a whole layer or on text."""
        return isinstance(self._method, Split) or self._recipe.router_init == "prompts"

    def settle(self) -> dict[str, Tensor]:
        """Compute now, for all layers, what depends on a whole layer or on text: it is small. Returned by name, for `adopt`."""
        for layer, plan in self._layers.items() if self.needs_settling else ():
            if isinstance(self._method, Split):
                self._neurons(layer, plan.readers[0])
            if plan.router_rows is not None:
                self.router_rows(layer)
        return dict(self._known)

    def adopt(self, settled: Mapping[str, Tensor]) -> None:
        """Take what `settle` returned in another process, so that nothing of it is computed here."""
        self._known |= settled

    def expert_weight(self, layer: int, expert: int, role: Role, reader: FFNReader) -> Tensor:
        """One tensor of one expert, before its scale."""
        from .expert_weights import expert_weight

        neurons = self._neurons(layer, reader) if isinstance(self._method, Split) else None
        experts = self._layers[layer].num_experts
        return expert_weight(
            self._method, layer=layer, expert=expert, role=role, load=reader.load, num_experts=experts, seed=self._recipe.seed,
            neurons_EW=neurons,
        )  # fmt: skip

    def router_rows(self, layer: int) -> Tensor:
        """`[E, D]` from the recipe's prompts."""
        from .calibration import prompt_router
        from .expert_weights import router_rows

        if not self._has(f"router-{layer}"):
            drawn = self._method.num_router_rows(self._layers[layer].num_experts)
            dense, sites, tokenizer = self._dense()
            rows = prompt_router(dense, [sites[i] for i in self._layers], tokenizer, self._recipe.router_prompts or [], drawn)
            for index, rows_ED in rows.items():
                self._keep(f"router-{index}", rows_ED)
        return router_rows(self._method, self._get(f"router-{layer}"), self._layers[layer].num_experts)

    def _neurons(self, layer: int, reader: FFNReader) -> Tensor:
        name = f"neurons-{layer}"
        if not self._has(name):
            if self._method.needs_text:
                self._divide_by_coactivation()
            else:
                self._keep(name, self._divide(layer, reader, None))
        return self._get(name)

    def _divide(self, layer: int, reader: FFNReader, features: Tensor | None) -> Tensor:
        from .expert_weights import split_neurons

        assert isinstance(self._method, Split)
        plan = self._layers[layer]
        return split_neurons(
            self._method, layer=layer, intermediate_size=plan.ffn.intermediate_size, num_experts=plan.num_experts,
            seed=self._recipe.seed, load=reader.load, has_gate=plan.ffn.has_gate, features=features,
        )  # fmt: skip

    def _divide_by_coactivation(self, max_tokens: int = 2048) -> None:
        from .calibration import neuron_features

        dense, sites, tokenizer = self._dense()
        waiting = list(self._layers)
        while waiting:
            size = max(self._layers[i].ffn.intermediate_size for i in waiting) * max_tokens * 4
            batch, waiting = waiting[: max(1, _MOST_FEATURES // size)], waiting[max(1, _MOST_FEATURES // size) :]
            text = read_text(self._recipe.text) or []
            found = neuron_features(dense, [sites[i] for i in batch], tokenizer, text, max_tokens, self._recipe.seed)
            for layer, features in found.items():
                self._keep(f"neurons-{layer}", self._divide(layer, self._layers[layer].readers[0], features))

    def _dense(self) -> tuple[Any, Any, Any]:
        """The dense model, its FFNs and its tokenizer, for calibration."""
        from transformers import AutoModelForCausalLM, AutoTokenizer

        from hf_moe.dense_ffn import find_ffns

        folder = self._source.companions
        if folder is None:
            raise ConversionError("Calibration text and prompts need a tokenizer: give the `source` as a folder or Hub id.")
        dense = self._source.model or AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
        try:
            tokenizer = AutoTokenizer.from_pretrained(folder, trust_remote_code=self._recipe.trust_remote_code)
        except (OSError, ValueError, KeyError) as error:
            raise ConversionError(f"{folder}: no tokenizer for calibration text and prompts ({error}).") from error
        return dense, find_ffns(dense, self._source.num_layers), tokenizer

    # ------------------------------------------------------------------ what is kept

    def _path(self, name: str) -> Path | None:
        return None if self._memo is None else self._memo / f"{name}.safetensors"

    def _has(self, name: str) -> bool:
        path = self._path(name)
        return name in self._known or (path is not None and path.is_file())

    def _get(self, name: str) -> Tensor:
        from safetensors.torch import load_file

        if name not in self._known:
            path = self._path(name)
            assert path is not None
            self._known[name] = load_file(path)["value"]
        return self._known[name]

    def _keep(self, name: str, value: Tensor) -> None:
        from safetensors.torch import save_file

        self._known[name] = value.contiguous()
        path = self._path(name)
        if path is not None:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({"value": self._known[name]}, path.with_suffix(".part"))
            os.replace(path.with_suffix(".part"), path)
