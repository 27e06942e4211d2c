# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Upcycling (Komatsuzaki et al. 2022, arXiv:2212.05055): a dense model, its feed-forward blocks copied into experts."""

from __future__ import annotations

import logging
import os
import shutil
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm
from transformers import AutoModelForCausalLM, AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_moe.configuration_moe import MoEConfig
from hf_moe.dense_ffn import FFNSite, find_ffns
from hf_moe.experts import DenseFFN
from hf_moe.modeling_moe import MoEForCausalLM
from hf_moe.moe_layer import MoELayer

from .verification import ExactnessReport, verify

logger = logging.getLogger(__name__)

RouterInit = Literal["normal", "zeros"]
# Where the combine weights depend on the token, the router starts so near to 0 that they are all but uniform: then a
# constant factor makes the copy exact, and the noise still tells experts apart.
_NEARLY_UNIFORM_STD = 1e-7


@dataclass(frozen=True)
class UpcyclingResult:
    """What `upcycle` returns.

    Attributes:
        model: the MoE, in evaluation mode.
        report: how exactly it computes what the dense model computes; `None` if not verified.
    """

    model: MoEForCausalLM
    report: ExactnessReport | None


def upcycle(
    source: str | os.PathLike | PreTrainedModel,
    destination: str | os.PathLike | None = None,
    *,
    method: Literal["copy"] = "copy",
    config: MoEConfig | None = None,
    preset: str | None = None,
    router_init: RouterInit = "normal",
    router_init_std: float | None = None,
    seed: int = 0,
    verify_exactness: bool = True,
    text: list[str] | None = None,
    gguf_file: str | None = None,
    dtype: str | torch.dtype = "auto",
    **config_fields: Any,
) -> UpcyclingResult:
    """Turn a dense causal LM into a Mixture-of-Experts that computes the same function.

    Args:
        source: a folder or Hub id of a dense checkpoint, or a dense model in memory.
        destination: folder for the MoE checkpoint (and the tokenizer, if the source has one); `None` to only return it.
        method: `"copy"`: every expert is the dense FFN, scaled so that the function is kept (see `routed_scale`).
        config: what to build; or give `preset` and/or fields of `MoEConfig` as keywords.
        router_init: how routers start. `"zeros"` sends every token to the same experts until training moves it.
        router_init_std: standard deviation for `"normal"` (default: the model's `initializer_range`, or almost 0 for routers
            whose weights do not sum to a constant, so that the copy is exact at the start).
        seed: of the router initialisation.
        verify_exactness: run dense and MoE on the same tokens afterwards and report the differences.
        text: text for that (default: a few built-in sentences; random tokens without a tokenizer).
        gguf_file: name of the GGUF file in `source`, if that is what it holds.
        dtype: of the loaded weights (`"auto"`: as stored).
        config_fields: fields of `MoEConfig`, such as `num_experts=8`.

    Raises:
        UnsupportedArchitectureError: the source has no FFN that could be replaced, or already is a MoE.
        ValueError: the fields do not fit each other or the model.
        FileExistsError: `destination` exists and is not empty.
    """
    if method != "copy":
        raise ValueError(f"`method`={method!r} is not known. Choose 'copy'.")
    target = _free_destination(destination)
    dense = _load(source, gguf_file, dtype)
    tokenizer = None if isinstance(source, PreTrainedModel) else _load_tokenizer(source, gguf_file)
    if config is None:
        fields = {"text_config": dense.config, **config_fields}
        config = MoEConfig.from_preset(preset, **fields) if preset else MoEConfig(**fields)
    elif config_fields or preset:
        raise ValueError(f"Give `config`, or `preset` and fields ({', '.join(config_fields)}), not both.")
    model = upcycle_model(dense, config, router_init=router_init, router_init_std=router_init_std, seed=seed)
    report = verify(dense, model, tokenizer, text) if verify_exactness else None
    if target is not None:
        _save(model, tokenizer, report, target)
    return UpcyclingResult(model, report)


def upcycle_model(
    dense: PreTrainedModel,
    config: MoEConfig,
    *,
    router_init: RouterInit = "normal",
    router_init_std: float | None = None,
    seed: int = 0,
) -> MoEForCausalLM:
    """The MoE of `config` with the weights of `dense`, by copy. `dense` is left as it is and shares no memory.

    Raises:
        ValueError: an expert is to have another width than the dense FFN, which a copy cannot give.
    """
    if router_init not in ("normal", "zeros"):
        raise ValueError(f"`router_init`={router_init!r} is not known. Choose 'normal' or 'zeros'.")
    text_config = dense.config
    sites = find_ffns(dense, text_config.num_hidden_layers)
    for index in config.moe_layers:
        width = sites[index].intermediate_size
        if config.moe_intermediate_size not in (None, width):
            raise ValueError(
                f"`moe_intermediate_size`={config.moe_intermediate_size} differs from the width {width} of the dense FFN in "
                f"layer {index}; `method`='copy' makes experts of the dense width. Leave it at None."
            )
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        model = MoEForCausalLM(config)
        nn.Module.to(model, dtype=dense.dtype)
        _init_routers(model, router_init, router_init_std)
    _copy_other_weights(dense, model, [sites[index] for index in config.moe_layers])
    layers = [model.language_model.get_submodule(sites[index].moe_path) for index in config.moe_layers]
    for index, layer in tqdm(list(zip(config.moe_layers, layers, strict=True)), desc="Upcycling layers", leave=False):
        _fill_layer(layer, sites[index].weights(dense))
    if dense.can_generate():
        model.generation_config = dense.generation_config
    return model.eval()


def routed_scale(layer: MoELayer) -> tuple[float, float]:
    """Factors on the down projections of the experts and of what stands beside them, so that a layer of copies is exact.

    With all experts equal to the dense FFN the routed part is `Σ_k w_k` times its output. That sum is a constant for most
    routers (`MoEConfig.weights_sum`), and K/E for the others while their router is uniform. Shared experts take half of the
    output; a residual MoE mixes two halves by itself.
    """
    config = layer.config
    weights_sum = config.weights_sum
    if weights_sum is None:  # a token's weights are 1/E each: K of them, or all that choose it
        weights_sum = layer.top_k / layer.num_experts
    if not config.num_shared_experts:
        return 1 / weights_sum, 1.0
    gate = 0.5 if config.use_shared_expert_gate else 1.0  # the sigmoid of 0, where it starts
    return 0.5 / weights_sum, 0.5 / gate / config.num_shared_experts


@torch.no_grad()
def _fill_layer(layer: MoELayer, ffn: Mapping[str, Tensor]) -> None:
    """Copy one dense FFN into the experts and beside them."""
    routed, beside = routed_scale(layer)
    experts = layer.experts
    for suffix in ("", "_bias"):
        if f"up{suffix}" not in ffn:
            continue
        up, down = ffn[f"up{suffix}"], ffn[f"down{suffix}"] * routed
        if experts.has_gate:
            getattr(experts, f"gate_up_proj{suffix}").copy_(torch.cat([ffn[f"gate{suffix}"], up]))
        else:
            getattr(experts, f"up_proj{suffix}").copy_(up)
        getattr(experts, f"down_proj{suffix}").copy_(down)
    if layer.config.num_shared_experts:
        _fill_dense(layer.shared_experts, ffn, layer.config.num_shared_experts, beside)
    if layer.config.residual_moe:
        _fill_dense(layer.residual_ffn, ffn, 1, 1.0)


def _fill_dense(target: DenseFFN, ffn: Mapping[str, Tensor], copies: int, scale: float) -> None:
    """`copies` of the FFN side by side in one wide FFN, its output scaled."""
    for role in ("gate", "up") if target.has_gate else ("up",):
        linear = getattr(target, f"{role}_proj")
        linear.weight.copy_(torch.cat([ffn[role]] * copies))
        if linear.bias is not None:
            linear.bias.copy_(torch.cat([ffn[f"{role}_bias"]] * copies))
    target.down_proj.weight.copy_(torch.cat([ffn["down"]] * copies, dim=1) * scale)
    if target.down_proj.bias is not None:
        target.down_proj.bias.copy_(ffn["down_bias"] * scale * copies)


def _init_routers(model: MoEForCausalLM, how: RouterInit, std: float | None) -> None:
    default = model.config.get_text_config().__dict__.get("initializer_range") or 0.02
    if std is None:
        std = default if model.config.weights_sum is not None else _NEARLY_UNIFORM_STD
    for layer in model.moe_layers:
        layer.gate.reset_parameters(0.0 if how == "zeros" else std)


def _copy_other_weights(dense: PreTrainedModel, model: MoEForCausalLM, replaced: list[FFNSite]) -> None:
    """Everything that is not a replaced FFN: same names, same values."""
    replaced_weights = tuple(prefix for site in replaced for prefix in site.weight_prefixes)
    kept = {name: value for name, value in dense.state_dict().items() if not name.startswith(replaced_weights)}
    missing, unexpected = model.language_model.load_state_dict(kept, strict=False)
    moe_paths = tuple(f"{site.moe_path}." for site in replaced)
    missing = [name for name in missing if not name.startswith(moe_paths)]
    if missing or unexpected:
        raise RuntimeError(f"The dense weights do not fit the MoE: missing {missing}, unexpected {unexpected}.")


# ---------------------------------------------------------------------- reading and writing


def _load(source: str | os.PathLike | PreTrainedModel, gguf_file: str | None, dtype: str | torch.dtype) -> PreTrainedModel:
    if isinstance(source, PreTrainedModel):
        return source.eval()
    if os.path.sep in os.fspath(source) and not os.path.isdir(source):
        raise FileNotFoundError(f"`source`={os.fspath(source)!r} is not a folder. Give a checkpoint folder or a Hub id.")
    model = AutoModelForCausalLM.from_pretrained(source, gguf_file=gguf_file, dtype=dtype)
    return model.eval()


def _load_tokenizer(source: str | os.PathLike, gguf_file: str | None) -> PreTrainedTokenizerBase | None:
    try:
        return AutoTokenizer.from_pretrained(source, gguf_file=gguf_file)
    except (OSError, ValueError, KeyError) as error:
        logger.warning("No tokenizer was found in %s (%s); none is saved with the MoE.", os.fspath(source), error)
        return None


def _free_destination(destination: str | os.PathLike | None) -> Path | None:
    if destination is None:
        return None
    path = Path(destination)
    if path.exists() and (not path.is_dir() or any(path.iterdir())):
        raise FileExistsError(
            f"`destination`={os.fspath(destination)!r} exists and is not empty. Remove it, or choose another."
        )
    return path


def _save(
    model: MoEForCausalLM, tokenizer: PreTrainedTokenizerBase | None, report: ExactnessReport | None, destination: Path
) -> None:
    """Write beside the destination and rename, so that a folder of that name is complete."""
    destination.parent.mkdir(parents=True, exist_ok=True)
    unfinished = Path(tempfile.mkdtemp(prefix=f".{destination.name}.", dir=destination.parent))
    try:
        model.save_pretrained(unfinished)
        if tokenizer is not None:
            tokenizer.save_pretrained(unfinished)
        if report is not None:
            (unfinished / "upcycling_report.json").write_text(report.to_json() + "\n", encoding="utf-8")
        unfinished.chmod(0o755)
        if destination.exists():
            destination.rmdir()
        unfinished.rename(destination)
    except BaseException:
        shutil.rmtree(unfinished, ignore_errors=True)
        raise
