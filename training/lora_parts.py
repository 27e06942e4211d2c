# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""The parts of a Mixture-of-Experts that adapters can go to, found by structure and not by an architecture's name.

The routed experts are the modules of no torch class that hold stacked weights `[E, …, …]`; the module above them is the MoE
block. What else the block holds is a router, or an FFN that every token passes. In the other modules of a decoder layer, linear
layers are an FFN's if they have the names of one (`hf_moe.ffn_kinds`); what is left mixes tokens.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from dataclasses import dataclass
from operator import attrgetter

from torch import nn
from transformers.pytorch_utils import Conv1D

from hf_moe.ffn_kinds import FFN_KINDS

ATTENTION, EXPERTS, SHARED_EXPERTS = "attention projections", "routed experts", "shared experts"
DENSE_FFN, ROUTER = "dense FFNs", "routers"
EMBEDDINGS, LM_HEAD, REST = "embeddings", "lm head", "norms and the rest"
KINDS = (ATTENTION, EXPERTS, SHARED_EXPERTS, DENSE_FFN, ROUTER, EMBEDDINGS, LM_HEAD, REST)
_LINEAR = (nn.Linear, Conv1D)
_LAYER = re.compile(r"^(?:.*?\.)?\d+\.(.+)$")  # what comes after the first number, which is the layer's


@dataclass(frozen=True)
class Part:
    """One module, or one parameter of a module with stacked experts.

    Attributes:
        kind: of `KINDS`.
        name: dotted name below the model; of the parameter where `how` is `"parameter"`.
        module: dotted name of the module that it belongs to.
        how: how it can be trained: LoRA on a `"module"` or on a `"parameter"`, or `"whole"`.
        shape: of the weight, `[out, in]`, or `[E, out, in]` in either order; empty where there is none.
        size: number of parameters, each counted once in a model.
        is_transposed: whether it is a linear layer with an `[in, out]` weight (GPT-2's).
    """

    kind: str
    name: str
    module: str
    how: str
    shape: tuple[int, ...]
    size: int
    is_transposed: bool = False

    @property
    def lora_size(self) -> int:
        """Parameters of its pairs of rank 1."""
        rows_columns = self.shape[-2:]
        return sum(rows_columns) * (self.shape[0] if len(self.shape) == 3 else 1)


def below_layer(name: str) -> str:
    """A name without what leads to its decoder layer: `model.layers.3.mlp.gate` is `mlp.gate`."""
    found = _LAYER.match(name)
    return found.group(1) if found else name


def find_parts(model: nn.Module) -> list[Part]:
    """All parts of a model; together they have all of its parameters."""
    experts = [name for name, module in model.named_modules() if stacked_parameters(module)]
    blocks = {name.rpartition(".")[0] for name in experts}
    ffn_linears = set(_ffn_linears(model))
    routers = [
        f"{block}.{name}"
        for block in sorted(blocks)
        for name, child in model.get_submodule(block).named_children()
        if _is_router(f"{block}.{name}", child, experts, ffn_linears)
    ]
    seen: set[int] = set()
    parts = [_whole(model, name, seen) for name in routers]
    inside = tuple(f"{name}." for name in routers)
    for name, module in model.named_modules():
        if name in routers or name.startswith(inside):
            continue
        if name in experts:
            parts += _expert_parts(name, module, seen)
        elif next(module.parameters(recurse=False), None) is not None:
            kind = _kind(model, name, module, blocks, ffn_linears)
            shape = tuple(module.weight.shape) if isinstance(module, _LINEAR) else ()
            parts.append(Part(kind, name, name, "module", shape, _size(module, seen), isinstance(module, Conv1D)))
    return parts


def stacked_parameters(module: nn.Module) -> list[str]:
    """Names of a module's own parameters that hold the weights of several experts."""
    if type(module).__module__.startswith("torch.nn"):  # a convolution's weight has three dimensions, too
        return []
    return [name for name, parameter in module.named_parameters(recurse=False) if parameter.dim() == 3]


def _expert_parts(name: str, module: nn.Module, seen: set[int]) -> Iterator[Part]:
    for parameter_name, parameter in module.named_parameters(recurse=False):
        is_new = id(parameter) not in seen
        seen.add(id(parameter))
        is_weight = parameter.dim() == 3
        shape = tuple(parameter.shape) if is_weight else ()
        how = "parameter" if is_weight else "none"
        yield Part(EXPERTS, f"{name}.{parameter_name}", name, how, shape, parameter.numel() * is_new)


def _whole(model: nn.Module, name: str, seen: set[int]) -> Part:
    module = model.get_submodule(name)
    return Part(ROUTER, name, name, "whole", (), sum(_size(child, seen) for child in module.modules()))


def _size(module: nn.Module, seen: set[int]) -> int:
    new = [parameter for parameter in module.parameters(recurse=False) if id(parameter) not in seen]
    seen.update(id(parameter) for parameter in new)
    return sum(parameter.numel() for parameter in new)


def _is_router(name: str, child: nn.Module, experts: list[str], ffn_linears: set[str]) -> bool:
    """Whether a child of a MoE block decides where tokens go, or how much of what they get: it is no expert and no FFN."""
    if any(expert == name or expert.startswith(f"{name}.") for expert in experts):
        return False
    if any(linear.startswith(f"{name}.") for linear in ffn_linears):
        return False
    return next(child.parameters(), None) is not None or next(child.buffers(), None) is not None


def _kind(model: nn.Module, name: str, module: nn.Module, blocks: set[str], ffn_linears: set[str]) -> str:
    embeddings = [getattr(model, f"get_{which}_embeddings", lambda: None)() for which in ("input", "output")]
    if module is embeddings[1]:
        return LM_HEAD
    if module is embeddings[0] or isinstance(module, nn.Embedding):
        return EMBEDDINGS
    if not isinstance(module, _LINEAR) or not _LAYER.match(name):
        return REST
    if name not in ffn_linears:
        return ATTENTION
    is_shared = any(name.startswith(f"{block}.") for block in blocks) or "shared" in name
    return SHARED_EXPERTS if is_shared else DENSE_FFN


def _ffn_linears(model: nn.Module) -> Iterator[str]:
    """Names of the linear layers of FFNs; layers of other names and attention's are not among them."""
    for path, module in model.named_modules():
        if not _LAYER.match(f"{path}.x") or "attn" in path.lower() or "attention" in path.lower():
            continue
        for kind in FFN_KINDS:
            if all(isinstance(_get(module, linear), _LINEAR) for linear in kind.linears):
                yield from (f"{path}.{linear}" for linear in kind.linears)


def _get(module: nn.Module, name: str) -> object:
    try:
        return attrgetter(name)(module)
    except AttributeError:
        return None
