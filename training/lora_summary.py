# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""What a `LoraConfig` trains of a model, part by part, as a table."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING

from torch import nn

from .lora_parts import EXPERTS, KINDS, Part, find_parts

if TYPE_CHECKING:
    from peft import LoraConfig

_HEADER = ("part", "modules", "parameters", "trained", "how")


@dataclass(frozen=True)
class SummaryRow:
    """One kind of part.

    Attributes:
        kind: of `KINDS`.
        modules: how many modules of the model.
        adapted: how many of them are trained.
        parameters: of the model, without adapters; each is counted once, tied ones where they come first.
        lora_parameters: of the adapters.
        whole_parameters: of modules that are trained whole.
    """

    kind: str
    modules: int
    adapted: int
    parameters: int
    lora_parameters: int
    whole_parameters: int

    @property
    def how(self) -> str:
        """In words."""
        if not self.adapted:
            return "frozen" if self.modules else "-"
        words = "trained whole" if self.whole_parameters else "LoRA, a pair per expert" if self.kind == EXPERTS else "LoRA"
        return words if self.adapted == self.modules else f"{words} (in {self.adapted} of {self.modules})"


@dataclass(frozen=True)
class LoraSummary:
    """What is adapted and what is not; `str` of it is a table.

    Attributes:
        rows: one for each of `KINDS`.
        r, lora_alpha: of the config.
    """

    rows: tuple[SummaryRow, ...]
    r: int
    lora_alpha: float

    def __getitem__(self, kind: str) -> SummaryRow:
        return next(row for row in self.rows if row.kind == kind)

    @property
    def trained(self) -> int:
        """Parameters that training changes."""
        return sum(row.lora_parameters + row.whole_parameters for row in self.rows)

    @property
    def total(self) -> int:
        """Parameters of the model without adapters."""
        return sum(row.parameters for row in self.rows)

    def __str__(self) -> str:
        lines = [_HEADER]
        for row in self.rows:
            trained = row.lora_parameters + row.whole_parameters
            lines.append((row.kind, f"{row.modules:,}", f"{row.parameters:,}", f"{trained:,}", row.how))
        widths = [max(len(line[column]) for line in lines) for column in range(4)]
        table = [
            f"{kind:<{widths[0]}}  {modules:>{widths[1]}}  {size:>{widths[2]}}  {trained:>{widths[3]}}  {how}"
            for kind, modules, size, trained, how in lines
        ]
        share = 100 * self.trained / max(1, self.total)
        last = f"LoRA with r={self.r}, lora_alpha={self.lora_alpha}: {self.trained:,} trained, {share:.2f} % of {self.total:,}"
        return "\n".join([*table, last])


def lora_summary(model: nn.Module, config: LoraConfig) -> LoraSummary:
    """What a config will train of a model that has no adapters yet.

    Args:
        model: a MoE of hf_moe or of Transformers.
        config: of `moe_lora_config`, or your own with names or a regular expression as targets.
    """
    parts = find_parts(model)
    rank = _ranks(config)
    rows = []
    for kind in KINDS:
        own = [part for part in parts if part.kind == kind]
        whole = [part for part in own if _is_saved(part, config)]
        lora = [part for part in own if part not in whole and part.shape and _is_target(part, config)]
        rows.append(
            SummaryRow(
                kind,
                modules=len({part.module for part in own}),
                adapted=len({part.module for part in (*whole, *lora)}),
                parameters=sum(part.size for part in own),
                lora_parameters=sum(rank(part) * part.lora_size for part in lora),
                whole_parameters=sum(part.size for part in whole),
            )
        )
    return LoraSummary(tuple(rows), config.r, config.lora_alpha)


def _ranks(config: LoraConfig) -> Callable[[Part], int]:
    from peft.utils.other import get_pattern_key

    patterns = dict(config.rank_pattern or {})

    def rank(part: Part) -> int:
        as_parameter = f"{part.name}.weight"
        name = as_parameter if part.how == "module" and _is_parameter_target(as_parameter, config) else part.name
        return patterns.get(get_pattern_key(list(patterns), name), config.r)

    return rank


def _is_saved(part: Part, config: LoraConfig) -> bool:
    return bool(part.size) and any(part.name.endswith(name) for name in config.modules_to_save or ())


def _is_target(part: Part, config: LoraConfig) -> bool:
    from peft.tuners.tuners_utils import check_target_module_exists

    if part.how != "module":
        return _is_parameter_target(part.name, config)
    return _is_parameter_target(f"{part.name}.weight", config) or bool(check_target_module_exists(config, part.name))


def _is_parameter_target(name: str, config: LoraConfig) -> bool:
    return any(name == target or name.endswith(f".{target}") for target in config.target_parameters or ())
