# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Where the native Mixture-of-Experts classes of Transformers say which experts compute which tokens.

Nearly all do it in one way. A block has a router (`gate` or `router`), whose output has the logits in the place that the
model declares in `_can_record_outputs["router_logits"]`, and `experts`, called with (hidden_states, top_k_index `[T, K]`,
top_k_weights `[T, K]`). That call is what is executed, with global ids: expert parallelism replaces the experts' forward and
PEFT wraps the experts, both further in. Blocks that differ have a row in `ODD_BLOCKS`, or a reason in `LEFT_OUT`.
"""

from __future__ import annotations

import re
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from operator import attrgetter
from typing import Any

from torch import Tensor, nn
from transformers import PreTrainedModel


@dataclass(frozen=True)
class Assignments:
    """Which experts compute T tokens.

    Attributes:
        ids_TK: `[T, K]`; E marks an empty slot.
        weights_TK: `[T, K]`, or `None` where no module is given them.
        logits_TE: `[T, E]`, or `None` where they are not known.
    """

    ids_TK: Tensor
    weights_TK: Tensor | None = None
    logits_TE: Tensor | None = None


@dataclass(frozen=True)
class Rule:
    """Where a MoE block says how it routes.

    Attributes:
        router: name of the child with the router's weights; several to choose from.
        experts: name of the child that is called with the assignments; unused where `read` is given.
        ids, weights: position and name of these arguments in that call; `weights` can be `None`.
        logits: their place in the router's output, or the name below the router of a module whose output they are, where the
            model declares something else.
        read: the assignments by (router, the router's output), where that tells all.
        num_experts, top_k: attribute of the router, the block or the experts that is E, and K.
    """

    router: tuple[str, ...] = ("gate", "router")
    experts: str = "experts"
    ids: tuple[int, str] = (1, "top_k_index")
    weights: tuple[int, str] | None = (2, "top_k_weights")
    logits: int | str | None = None
    read: Callable[[nn.Module, Any], Assignments] | None = None
    num_experts: str = "num_experts"
    top_k: str = "top_k"


def _read_jetmoe(router: Any, output: Any) -> Assignments:
    """The router sorts its assignments by expert, so the choice is made again from its logits."""
    logits_TE = output[4]
    top_TK, ids_TK = logits_TE.topk(router.top_k, dim=1)
    return Assignments(ids_TK, top_TK.softmax(dim=1), logits_TE)


def _read_llama4(router: Any, output: Any) -> Assignments:
    """Every expert runs on every token, its input scaled by a score that is 0 where it was not chosen."""
    scores_TE, logits_TE = output
    ids_TK = logits_TE.topk(router.top_k, dim=1).indices
    return Assignments(ids_TK, scores_TE.gather(1, ids_TK), logits_TE)


def _read_zaya(router: Any, output: Any) -> Assignments:
    """Expert E - 1 is "skip"; the experts get its tokens as those of expert 0 with weight 0."""
    logits_TE = output[0]
    probs_TE = logits_TE.softmax(dim=-1)
    ids_TK = (probs_TE.float() + router.balancing_biases).topk(router.top_k, dim=-1).indices
    return Assignments(ids_TK, probs_TE.gather(1, ids_TK), logits_TE)


# Blocks that do not follow the module's docstring, by class.
ODD_BLOCKS: dict[str, Rule] = {
    # the first layers' router, of another class, is not declared
    "DeepseekV4SparseMoeBlock": Rule(logits=0),
    # experts are rows of embeddings, found by a product of two keys: there are no logits of single experts
    "DogeCDMoE": Rule(router=("router_gate",), experts="down_embed", ids=(0, "input"), weights=None),
    # the router calls its probabilities logits
    "Gemma4TextDecoderLayer": Rule(logits="proj", num_experts="config.num_experts", top_k="config.top_k_experts"),
    "JetMoeMoE": Rule(read=_read_jetmoe),
    "Llama4TextMoe": Rule(read=_read_llama4),
    # the last of the experts are identities ("zero experts"): they are counted like the others
    "LongcatFlashMoE": Rule(num_experts="n_routed_experts"),
    "ZayaSparseMoeBlock": Rule(read=_read_zaya, num_experts="num_router_classes"),
}

# Blocks that look like a MoE block or route, and are not watched, by class, with the reason.
LEFT_OUT: dict[str, str] = {
    "Ernie4_5_VLMoeSparseMoeBlock": "gets the text tokens or the image tokens alone, without saying which those are",
    "JetMoeMoA": "routes among attention projections; its layer's row is that of the experts in the feed-forward block",
    "NllbMoeSparseMLP": "is in an encoder and in a decoder, whose tokens differ",
    "SwitchTransformersSparseMLP": "is in an encoder and in a decoder, whose tokens differ",
}


@dataclass(frozen=True)
class Site:
    """One MoE block.

    Attributes:
        row: in the record. PEFT's `modules_to_save` keeps several copies of a block, of which one runs: they share a row.
        layer: index of the decoder layer.
        num_experts: E.
        top_k: K.
        block: the block.
        rule: how to read it.
        logits_index: place of the logits in the router's output; `None` if it has none.
    """

    row: int
    layer: int
    num_experts: int
    top_k: int
    block: nn.Module
    rule: Rule
    logits_index: int | None

    @property
    def router(self) -> nn.Module:
        """The module with the router's weights, in its wrappers."""
        return _child(self.block, self.rule.router)

    @property
    def router_output(self) -> nn.Module:
        """The module whose output has the logits."""
        name = self.rule.logits
        return unwrapped(self.router)[-1].get_submodule(name) if isinstance(name, str) else self.router

    def logits(self, output: Any) -> Tensor | None:
        """The logits `[..., E]` in what `router_output` returned."""
        if isinstance(self.rule.logits, str):
            return output
        if self.logits_index is None:
            return None
        return output[self.logits_index] if isinstance(output, tuple) else output

    def assignments(self, args: tuple[Any, ...], kwargs: dict[str, Any]) -> Assignments:
        """What the experts were called with."""
        (ids_at, ids_name), weights = self.rule.ids, self.rule.weights
        ids_TK = args[ids_at] if len(args) > ids_at else kwargs[ids_name]
        if weights is None:
            return Assignments(ids_TK)
        return Assignments(ids_TK, args[weights[0]] if len(args) > weights[0] else kwargs[weights[1]])


@dataclass(frozen=True)
class NativeMoE:
    """A native MoE inside its wrappers.

    Attributes:
        model: it.
        chain: the modules whose forward encloses all its blocks, outermost first, from the outermost wrapper to the decoder.
        sites: its blocks.
    """

    model: nn.Module
    chain: list[nn.Module]
    sites: list[Site]

    @property
    def rows(self) -> list[Site]:
        """One site for each row of the record: the last, which of PEFT's copies is the one that is trained."""
        return list({site.row: site for site in self.sites}.values())

    @property
    def aux_loss_coef(self) -> float | None:
        """The coefficient of the native router loss, if the model's class knows one."""
        if not hasattr(sys.modules[type(self.model).__module__], "load_balancing_loss_func"):
            return None
        names = ("router_aux_loss_coef", "aux_loss_coef")
        places = [(place, name) for place in (self.model, self._text_config) for name in names]
        return next((getattr(place, name) for place, name in places if getattr(place, name, None) is not None), None)

    @property
    def coefficients(self) -> dict[str, float]:
        """`aux_loss_coef` by the loss's name, if the config has the model add that loss to the training loss."""
        coefficient, is_on = self.aux_loss_coef, getattr(self._text_config, "output_router_logits", False)
        return {"aux_loss": coefficient} if is_on and coefficient is not None else {}

    @property
    def _text_config(self) -> Any:
        return self.model.config.get_text_config() if isinstance(self.model, PreTrainedModel) else None


def find_native_moe(model: nn.Module) -> NativeMoE | None:
    """The native MoE in `model`, which PEFT, DDP, FSDP or `torch.compile` may have wrapped; `None` if there is none."""
    blocks = dict(_blocks(model))
    inner = next((m for m in model.modules() if isinstance(m, PreTrainedModel) and _holds(m, blocks)), model)
    decoder = inner.get_decoder() if isinstance(inner, PreTrainedModel) else inner
    if _holds(decoder, blocks):  # and not the vision tower
        inside = set(decoder.modules())
        blocks = {path: block for path, block in blocks.items() if block in inside}
    if not blocks:
        return None
    prefix = _common_prefix(list(blocks))
    enclosing = [model.get_submodule(".".join(prefix[:depth])) for depth in range(len(prefix) + 1)]
    chain = [module for module in enclosing if not isinstance(module, (nn.ModuleList, nn.ModuleDict))]
    return NativeMoE(inner, chain, _sites(model, blocks, prefix))


def _blocks(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    for path, module in model.named_modules():
        names = {cls.__name__ for cls in type(module).__mro__}
        if names.isdisjoint(LEFT_OUT) and _rule_of(module) is not None:
            yield path, module


def _rule_of(block: nn.Module) -> Rule | None:
    rule = next((ODD_BLOCKS[cls.__name__] for cls in type(block).__mro__ if cls.__name__ in ODD_BLOCKS), Rule())
    children = block._modules
    is_list = isinstance(children.get(rule.experts), nn.ModuleList)  # experts that are called one by one
    has_experts = rule.read is not None or (children.get(rule.experts) is not None and not is_list)
    return rule if has_experts and any(children.get(name) is not None for name in rule.router) else None


def _holds(module: nn.Module, blocks: dict[str, nn.Module]) -> bool:
    return not set(module.modules()).isdisjoint(blocks.values())


def _common_prefix(paths: list[str]) -> list[str]:
    """The names that all paths begin with, up to the list of layers."""
    prefix = []
    for names in zip(*(path.split(".") for path in paths), strict=False):
        if len(set(names)) > 1 or names[0].isdigit():
            break
        prefix.append(names[0])
    return prefix


_COPIES = re.compile(r"\.(original_module|modules_to_save\.[^.]+)")


def _sites(model: nn.Module, blocks: dict[str, nn.Module], prefix: list[str]) -> list[Site]:
    sites: list[Site] = []
    rows: dict[str, int] = {}
    for path, block in blocks.items():
        rule = _rule_of(block)
        assert rule is not None
        router = unwrapped(_child(block, rule.router))[-1]  # PEFT's wrapper of a router has a `num_experts` of its own: 1
        places = [router, block, *reversed(unwrapped(block._modules.get(rule.experts)))]
        layer = next((name for name in path.split(".")[len(prefix) :] if name.isdigit()), "0")
        sites.append(
            Site(
                row=rows.setdefault(_COPIES.sub("", path), len(rows)),
                layer=int(layer),
                num_experts=_first(places, rule.num_experts),
                top_k=_first(places, rule.top_k),
                block=block,
                rule=rule,
                logits_index=rule.logits if isinstance(rule.logits, int) else _logits_index(model, router),
            )
        )
    return sites


def _child(block: nn.Module, names: tuple[str, ...]) -> Any:
    return next(child for name in names if (child := block._modules.get(name)) is not None)


_WRAPPED = ("base_layer", "_fsdp_wrapped_module", "_checkpoint_wrapped_module", "_orig_mod", "original_module")


def unwrapped(module: nn.Module | None) -> list[nn.Module]:
    """A module and what PEFT, FSDP, activation checkpointing or `torch.compile` has wrapped in it, outermost first."""
    found = []
    while module is not None:
        found.append(module)
        copies: Any = module._modules.get("modules_to_save")  # PEFT's: the one that runs comes last
        children = [*(module._modules.get(name) for name in _WRAPPED), *(copies.values() if copies else ())]
        present = [child for child in children if child is not None]
        module = present[-1] if present else None
    return found


def _first(places: list[nn.Module], name: str) -> int:
    for place in places:
        try:
            return int(attrgetter(name)(place))
        except AttributeError:
            continue
    raise ValueError(f"No part of {type(places[0]).__name__}'s block has `{name}`. Add its block to `ODD_BLOCKS`.")


def _logits_index(model: nn.Module, router: nn.Module) -> int | None:
    """Place of the logits in the router's output, as a model above it declares."""
    for module in model.modules():
        recorded = getattr(module, "_can_record_outputs", None) if isinstance(module, PreTrainedModel) else None
        specs = (recorded or {}).get("router_logits", [])
        for spec in specs if isinstance(specs, list) else [specs]:
            target = getattr(spec, "target_class", spec)
            if isinstance(target, type) and isinstance(router, target):
                return getattr(spec, "index", 1)
    return None


_BIASES = ("e_score_correction_bias", "expert_bias", "balancing_biases")


def selection_bias(router: nn.Module, block: nn.Module) -> Tensor | None:
    """What a block adds to the scores before it chooses, `[E]`; `None` if it has none."""
    routers = unwrapped(router)
    statics = [module._modules["moe_statics"] for module in routers if "moe_statics" in module._modules]
    for place in (*routers, *statics, block):
        for name in _BIASES:
            bias = getattr(place, name, None)
            if isinstance(bias, Tensor):
                return bias if bias.dim() == 1 else bias[0]
    return None
