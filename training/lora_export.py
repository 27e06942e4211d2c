# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""An adapter of stacked experts written as one of a model whose experts are modules of their own.

PEFT stores the pairs of all E experts of a stacked matrix together: A as `[E·r, in]`, one expert after the other, and B as
`[out, r·E]`, one rank after the other. The export has them under the names of the checkpoint's tensors, which are per expert:
beside `model.layers.0.mlp.experts.3.up_proj.weight` there are
`base_model.model.model.layers.0.mlp.experts.3.up_proj.lora_A.weight` and `…lora_B.weight`. Gate and up have the A that they
share, and each its half of B. Scale, rank and every product B_e A_e are those of the stacked adapter, to the bit.
"""

from __future__ import annotations

import json
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from safetensors.torch import load_file, save_file
from torch import Tensor

CONFIG_FILE, WEIGHTS_FILE = "adapter_config.json", "adapter_model.safetensors"
_ROOT = "base_model.model."
_OWN_PREFIX = "language_model."  # in the names of a `MoEForCausalLM`, but not in those of its checkpoints

# The matrices that a stacked one holds, in the order in which it holds them; the order of the rows is PEFT's order of nesting:
# the first is the innermost.
_MATRICES = {"gate_up_proj": ("gate_proj", "up_proj"), "up_proj": ("plain_up_proj",), "down_proj": ("down_proj",)}
_INTERLEAVED = ("gpt_oss",)  # gate and up take turns, row by row
_CONV1D = ("c_attn", "c_fc", "c_proj", "q_attn")  # linear layers with `[in, out]` weights, when adapted as parameters


@dataclass(frozen=True)
class _Stacked:
    """The pairs of one stacked matrix.

    Attributes:
        target: the module's name as it is among the config's targets.
        matrices: what it holds.
        a_EI: `[E·r, in]`.
        b_OE: `[out, r·E]`.
        rank: r.
        alpha: `lora_alpha`.
    """

    target: str
    matrices: tuple[str, ...]
    a_EI: Tensor
    b_OE: Tensor
    rank: int
    alpha: float

    @property
    def num_experts(self) -> int:
        return self.a_EI.shape[0] // self.rank

    def pairs(self, interleaved: bool) -> dict[str, Tensor]:
        """By `{expert}.{matrix}.lora_A.weight` and `…lora_B.weight`."""
        a_ERI = self.a_EI.view(self.num_experts, self.rank, -1)
        b_ORE = self.b_OE.view(self.b_OE.shape[0], self.rank, self.num_experts)
        parts = len(self.matrices)
        found = {}
        for expert in range(self.num_experts):
            b_OR = b_ORE[:, :, expert]
            halves = [b_OR[i::parts] for i in range(parts)] if interleaved else b_OR.chunk(parts)
            for matrix, half in zip(self.matrices, halves, strict=True):
                found[f"{expert}.{matrix}.lora_A.weight"] = a_ERI[expert].clone()
                found[f"{expert}.{matrix}.lora_B.weight"] = half.contiguous().clone()
        return found


def export_expert_adapters(adapter_dir: str | os.PathLike[str], output_dir: str | os.PathLike[str]) -> Path:
    """Write an adapter with one LoRA pair per expert and matrix, as an ordinary PEFT adapter.

    Other adapters and routers of the same file come along. Of a native MoE whose config can be read from the adapter's
    `base_model_name_or_path`, the layout of gate and up is known; else gate comes first, as in all but GPT-OSS.

    Args:
        adapter_dir: what `save_pretrained` of a model with an adapter of `moe_lora_config` wrote.
        output_dir: a new folder; it appears whole or not at all.

    Returns:
        `output_dir`.

    Raises:
        ValueError: there is no such adapter, it adapts no stacked experts, or `output_dir` exists.
    """
    source, target = Path(adapter_dir), Path(output_dir)
    config, tensors = _read(source)
    if target.exists():
        raise ValueError(f"`output_dir`={os.fspath(output_dir)!r} exists. Give a new folder.")
    exported, stacked = _export(config, tensors, _is_interleaved(config))
    new = target.with_name(f"{target.name}.new-{os.getpid()}")
    new.mkdir(parents=True)
    try:
        save_file(exported, new / WEIGHTS_FILE, metadata={"format": "pt"})
        text = json.dumps(_exported_config(config, stacked), indent=2, sort_keys=True)
        (new / CONFIG_FILE).write_text(text + "\n", encoding="utf-8")
        os.replace(new, target)
    except BaseException:
        shutil.rmtree(new, ignore_errors=True)
        raise
    return target


def _read(folder: Path) -> tuple[dict[str, Any], dict[str, Tensor]]:
    for name in (CONFIG_FILE, WEIGHTS_FILE):
        if not (folder / name).is_file():
            raise ValueError(f"`adapter_dir`={str(folder)!r} has no {name}. Give a folder that `save_pretrained` wrote.")
    config = json.loads((folder / CONFIG_FILE).read_text(encoding="utf-8"))
    if config.get("peft_type") != "LORA":
        raise ValueError(f"`adapter_dir`={str(folder)!r} holds a {config.get('peft_type')} adapter. Only LoRA can be exported.")
    return config, load_file(folder / WEIGHTS_FILE)


def _is_interleaved(config: Mapping[str, Any]) -> bool:
    from transformers import AutoConfig

    base = config.get("base_model_name_or_path")
    try:
        model_type = AutoConfig.from_pretrained(base).model_type if base else None
    except (OSError, ValueError):  # neither here nor on the Hub, or of a class that is not known
        return False
    return model_type in _INTERLEAVED


def _export(
    config: Mapping[str, Any], tensors: Mapping[str, Tensor], interleaved: bool
) -> tuple[dict[str, Tensor], list[_Stacked]]:
    """All tensors of the export, and the stacked matrices that were taken apart."""
    left = {name.removeprefix(_ROOT): tensor for name, tensor in tensors.items()}
    stacked = _stacked(config, left)
    if not stacked:
        raise ValueError(
            f"The adapter adapts no stacked experts (`target_parameters`={config.get('target_parameters')}), so there is "
            "nothing to take apart. Adapters of modules are per module already."
        )
    exported = _ordinary(left, config)
    for module, part in stacked:
        exported |= {f"{module}.{pair}": tensor for pair, tensor in part.pairs(interleaved).items()}
    return {_ROOT + name.removeprefix(_OWN_PREFIX): value for name, value in exported.items()}, [part for _, part in stacked]


def _stacked(config: Mapping[str, Any], left: dict[str, Tensor]) -> list[tuple[str, _Stacked]]:
    """The stacked matrices and the modules that have them; takes their tensors out of `left`."""
    targets = [name.rpartition(".") for name in config.get("target_parameters") or ()]
    found = []
    modules = [name.removesuffix(".lora_A.weight") for name in left if name.endswith(".lora_A.weight")]
    for module in [name for name in modules if not name.endswith(".base_layer")]:
        own = {parameter: path for path, _, parameter in targets if f".{module}".endswith(f".{path}")}
        nested = [parameter for parameter in _MATRICES if parameter in own]
        for depth, parameter in enumerate(reversed(nested)):
            path = module + ".base_layer" * depth
            part = _Stacked(
                target=own[parameter],
                matrices=_MATRICES[parameter],
                a_EI=left.pop(f"{path}.lora_A.weight"),
                b_OE=left.pop(f"{path}.lora_B.weight"),
                rank=_pattern(config, "rank_pattern", f"{module}.{parameter}", config["r"]),
                alpha=_pattern(config, "alpha_pattern", f"{module}.{parameter}", config["lora_alpha"]),
            )
            _check_shapes(f"{module}.{parameter}", part)
            found.append((module, part))
    return found


def _check_shapes(name: str, part: _Stacked) -> None:
    a_EI, b_OE = part.a_EI, part.b_OE
    if a_EI.shape[0] != b_OE.shape[1] or a_EI.shape[0] % part.rank or b_OE.shape[0] % len(part.matrices):
        raise ValueError(
            f"`{name}`: lora_A {tuple(a_EI.shape)} and lora_B {tuple(b_OE.shape)} are no pairs of rank {part.rank}. Was the "
            "adapter changed after it was saved?"
        )


def _ordinary(left: Mapping[str, Tensor], config: Mapping[str, Any]) -> dict[str, Tensor]:
    """What is no expert's, as it is; pairs of transposed linear layers, adapted as parameters, as pairs of modules."""
    found = dict(left)
    for module in [name.removesuffix(".lora_A.weight") for name in left if name.endswith(".lora_A.weight")]:
        a, b = left[f"{module}.lora_A.weight"], left[f"{module}.lora_B.weight"]
        target = next((t for t in config.get("target_parameters") or () if f".{module}.weight".endswith(f".{t}")), None)
        if target is None:
            continue
        if a.shape[0] != _pattern(config, "rank_pattern", f"{module}.weight", config["r"]):
            raise ValueError(
                f"`{target}` holds several experts under a name that is not among {', '.join(_MATRICES)}, so it is not known "
                "which matrices it is made of. Export adapters of other models."
            )
        if module.rpartition(".")[2] in _CONV1D:
            found[f"{module}.lora_A.weight"], found[f"{module}.lora_B.weight"] = b.T.contiguous(), a.T.contiguous()
    return found


def _pattern(config: Mapping[str, Any], field: str, name: str, default: Any) -> Any:
    from peft.utils.other import get_pattern_key

    patterns = config.get(field) or {}
    return patterns.get(get_pattern_key(list(patterns), name), default)


def _exported_config(config: Mapping[str, Any], stacked: list[_Stacked]) -> dict[str, Any]:
    """The adapter's config with modules as targets."""
    parameters = [name.rpartition(".") for name in config.get("target_parameters") or ()]
    linears = {path for path, _, parameter in parameters if parameter == "weight"}
    modules = {*(config.get("target_modules") or ()), *linears}
    ranks, alphas = dict(config.get("rank_pattern") or {}), dict(config.get("alpha_pattern") or {})
    for part in stacked:
        for module in (f"{part.target}.{expert}.{matrix}" for expert in range(part.num_experts) for matrix in part.matrices):
            modules.add(module)
            if part.rank != config["r"]:
                ranks[module] = part.rank
            if part.alpha != config["lora_alpha"]:
                alphas[module] = part.alpha
    saved = config.get("modules_to_save")
    return {
        **config,
        "target_modules": sorted(name.removeprefix(_OWN_PREFIX) for name in modules),
        "target_parameters": None,
        "modules_to_save": saved and [name.removeprefix(_OWN_PREFIX) for name in saved],
        "rank_pattern": {name.removeprefix(_OWN_PREFIX): rank for name, rank in ranks.items()},
        "alpha_pattern": {name.removeprefix(_OWN_PREFIX): alpha for name, alpha in alphas.items()},
        "fan_in_fan_out": bool(config.get("fan_in_fan_out")) or any(name.rpartition(".")[2] in _CONV1D for name in linears),
    }
