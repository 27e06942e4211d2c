# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""A walk through Transformers' causal-LM registry: a tiny random model of every architecture is upcycled by copy and checked.

`python tests/architecture_walk.py --write` writes what it found: `conversion/architectures.json`, which the converter reads
instead of building models, and `docs/architectures.md`. Names of types in the command line restrict it to printing those.
"""

from __future__ import annotations

import argparse
import copy
import json
import re
import tempfile
import warnings
from collections import Counter, defaultdict
from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import torch
import transformers
from hf_moe.conversion import upcycle, upcycle_model
from hf_moe.conversion.model_names import written_names
from safetensors import safe_open
from tiny_architectures import MODEL_TYPES, VOCABULARY, WHY_NOT, dense_model, moe_config, sites_of, tiny_config
from torch import Tensor
from transformers import AutoModelForCausalLM, PreTrainedConfig, PreTrainedModel
from transformers.pytorch_utils import Conv1D

from hf_moe import MoEForCausalLM, UnsupportedArchitectureError
from hf_moe.dense_ffn import FFNSites

ROOT = Path(__file__).parents[1]
JSON = ROOT / "conversion" / "architectures.json"
TABLE = ROOT / "docs" / "architectures.md"
COMMAND = "python tests/architecture_walk.py --write"
EXACT_FP32, EXACT_FP64 = 1e-5, 1e-10


# ---------------------------------------------------------------------- the checks


def check(model_type: str, **changes: Any) -> None:
    """Upcycle a tiny model, in memory and on disk, and check the results.

    Raises:
        AssertionError: something is wrong; the message says what.
        UnsupportedArchitectureError: no FFN was found.
    """
    dense = dense_model(tiny_config(model_type, **changes))
    moe = upcycle_model(dense, moe_config(dense))
    ids = torch.randint(3, VOCABULARY, (2, 8), generator=torch.Generator().manual_seed(1))
    _check_exact(dense, moe, ids)
    with tempfile.TemporaryDirectory() as folder:
        moe.save_pretrained(f"{folder}/memory")
        dense.save_pretrained(f"{folder}/dense")
        _check_names(dense, _names(f"{folder}/dense"), _names(f"{folder}/memory"))
        result = upcycle(f"{folder}/dense", f"{folder}/moe", num_experts=4, mlp_only_layers=moe.config.mlp_only_layers)
        assert result.report is not None
        assert result.report.exact, str(result.report)
        loaded, info = AutoModelForCausalLM.from_pretrained(f"{folder}/moe", output_loading_info=True)
    assert not info["missing_keys"], f"missing in the checkpoint: {sorted(info['missing_keys'])}"
    assert not info["unexpected_keys"], f"unexpected in the checkpoint: {sorted(info['unexpected_keys'])}"
    loaded.eval()
    assert torch.equal(_logits(loaded, ids), _logits(moe, ids)), "the checkpoint gives other logits than the model in memory"
    _check_generation(dense, loaded, ids)
    _check_training(loaded, ids)


def confirm_reason(model_type: str) -> str:
    """What goes wrong with a type of `WHY_NOT`.

    Raises:
        AssertionError: nothing does.
    """
    config = tiny_config(model_type)
    try:
        sites_of(_empty_model(config))
    except UnsupportedArchitectureError as error:
        return str(error)
    dense = dense_model(config)
    moe = MoEForCausalLM(moe_config(dense)).eval()
    ids = torch.randint(3, VOCABULARY, (2, 8))
    try:
        _logits(moe, ids)
        _check_generation(moe, moe, ids, use_cache=(True, False))
        _check_training(moe, ids)
    except Exception as error:  # of any kind: it does not work
        return f"{type(error).__name__}: {error}"
    raise AssertionError(f"{model_type} is in WHY_NOT, but works. Remove it there.")


def _check_exact(dense: PreTrainedModel, moe: PreTrainedModel, ids: Tensor) -> None:
    expected = _logits(dense, ids)
    assert expected.isfinite().all(), "the dense model's logits are not finite"
    difference = (_logits(moe, ids) - expected).abs().max().item()
    if difference > EXACT_FP32:  # large logits carry more rounding than that: then fp64 decides
        pair = [copy.deepcopy(model).double() for model in (dense, moe)]
        in_fp64 = (_logits(pair[0], ids) - _logits(pair[1], ids)).abs().max().item()
        assert in_fp64 <= EXACT_FP64, f"|Δlogits| is {difference:.3g} in fp32 and {in_fp64:.3g} in fp64"
    zeroed = copy.deepcopy(moe)
    for layer in zeroed.moe_layers:
        layer.experts.down_proj.data.zero_()
    assert (_logits(zeroed, ids) - expected).abs().max() > 1e-2, "the experts have no effect on the logits"


def _check_names(dense: PreTrainedModel, dense_names: set[str], moe_names: set[str]) -> None:
    """Beside experts and routers a MoE's checkpoint has the names that the dense model's has."""
    sites = sites_of(dense)
    prefixes = tuple(prefix for site in sites for prefix in site.weight_prefixes)
    moe_paths = [f"{site.moe_path}.{part}." for site in sites for part in ("gate", "experts")]
    on_disk = written_names(dense, [*dense.state_dict(), *moe_paths])
    expected = dense_names - {on_disk[name] for name in dense.state_dict() if name.startswith(prefixes)}
    found = {name for name in moe_names if not name.startswith(tuple(on_disk[path] for path in moe_paths))}
    assert found <= expected, f"the dense model's checkpoint has no {sorted(found - expected)}"
    lacking = expected - found - {on_disk[name] for name in dense.all_tied_weights_keys}
    assert not lacking, f"the MoE's checkpoint lacks {sorted(lacking)}"


def _check_generation(
    first: PreTrainedModel, second: PreTrainedModel, ids: Tensor, use_cache: tuple[bool, bool] = (True, True)
) -> None:
    arguments = {"max_new_tokens": 4, "min_new_tokens": 4, "do_sample": False}
    expected, got = (model.generate(ids, use_cache=c, **arguments) for model, c in zip((first, second), use_cache, strict=True))
    assert torch.equal(expected, got), f"greedy generation gives {got.tolist()} instead of {expected.tolist()}"


def _check_training(moe: PreTrainedModel, ids: Tensor) -> None:
    moe.train()(input_ids=ids, labels=ids).loss.backward()
    for index, layer in enumerate(moe.moe_layers):
        for name, parameter in layer.named_parameters():
            gradient = parameter.grad
            assert gradient is not None, f"no gradient for `{name}` of MoE layer {index}"
            assert gradient.isfinite().all(), f"the gradient for `{name}` of MoE layer {index} is not finite"
        assert layer.experts.down_proj.grad.count_nonzero(), f"the gradient of the experts of MoE layer {index} is 0"


@torch.no_grad()
def _logits(model: PreTrainedModel, ids: Tensor) -> Tensor:
    torch.manual_seed(0)
    return model(input_ids=ids).logits


def _names(folder: str | Path) -> set[str]:
    names: set[str] = set()
    for path in Path(folder).glob("*.safetensors"):
        with safe_open(path, "pt") as file:
            names |= set(file.keys())
    return names


# ---------------------------------------------------------------------- what goes into the table


def entry_of(model_type: str) -> dict[str, Any]:
    """The table's entry of a model type. Whether a supported one passes is `check`'s to say."""
    wrapped = _wrapped_text_type(model_type)
    if wrapped is not None:
        return _unsupported("not_a_text_decoder", wrapped)
    if model_type in WHY_NOT:
        return _unsupported(*WHY_NOT[model_type])
    model = _empty_model(tiny_config(model_type))
    try:
        sites = sites_of(model)
    except UnsupportedArchitectureError as error:
        found = re.search(r"already is a Mixture-of-Experts \(`(.+)`\)", str(error))
        if found is None:
            raise
        return _unsupported("moe", f"already is a Mixture-of-Experts (`{found[1]}`)")
    return _supported(model_type, model, sites)


def _unsupported(kind: str, reason: str) -> dict[str, Any]:
    return {"supported": False, "kind": kind, "reason": reason}


def _wrapped_text_type(model_type: str) -> str | None:
    """Why a config that wraps others is not a text decoder's, or `None` for one of its own."""
    config = tiny_config(model_type)
    try:
        text_config = config.get_text_config()
    except ValueError:  # more than one
        return "wraps several models; the text decoder has no model type of its own in the registry"
    if text_config is config:
        return None
    inner = text_config.model_type
    if inner in MODEL_TYPES:
        return f"wraps a text decoder of type `{inner}`; convert that one"
    return f"wraps a text decoder of type `{inner}`, which has no class of its own in the registry"


def _supported(model_type: str, model: PreTrainedModel, sites: FFNSites) -> dict[str, Any]:
    site = sites[sites.layers[0]]
    layers = site.path[: site.path.index(f".{site.layer_index}")]
    layer_path = f"{layers}.{site.layer_index}"
    names, per_layer = _names_on_disk(model_type, layers)
    tied = names - _names_on_disk(model_type, layers, tie_word_embeddings=True)[0] if _can_tie(model_type) else set()
    renamed = names - _templates(model.state_dict(), layers)[0]
    return {
        "supported": True,
        "class": type(model).__name__,
        "num_layers_field": _num_layers_field(model_type, layers, len(sites)),
        "hidden_size_field": type(model.config).attribute_map.get("hidden_size", "hidden_size"),
        "layers": layers,
        "ffn": site.path.removeprefix(layer_path).removeprefix("."),
        "moe": site.moe_path.removeprefix(layer_path).removeprefix("."),
        "gate": site.kind.gate,
        "up": site.kind.up,
        "down": site.kind.down,
        "activation": site.activation,
        "inline": site.inline,
        "packed": site.kind.packed,
        "gate_first": True,
        "transposed": isinstance(site.module(model).get_submodule(site.kind.up), Conv1D),
        "uniform": len(set(per_layer)) == 1 and len(sites.layers) == len(sites) == len(per_layer) and not renamed,
        "names": sorted(names),
        "tied_names": sorted(tied),
        "optional_names": sorted(_optional_names(model_type, model, site.path, layers) - names),
    }


def _empty_model(config: PreTrainedConfig) -> PreTrainedModel:
    with torch.device("meta"):
        return AutoModelForCausalLM.from_config(config)


def _can_tie(model_type: str) -> bool:
    return hasattr(tiny_config(model_type), "tie_word_embeddings")


def _names_on_disk(model_type: str, layers: str, **changes: Any) -> tuple[set[str], list[frozenset[str]]]:
    """Names that `save_pretrained` writes, with `{}` for the layer's index, and those of each layer; untied if that can be."""
    fields = {"tie_word_embeddings": False, **changes} if _can_tie(model_type) else changes
    with tempfile.TemporaryDirectory() as folder:
        AutoModelForCausalLM.from_config(tiny_config(model_type, **fields)).save_pretrained(folder)
        return _templates(_names(folder), layers)


def _templates(names: Iterable[str], layers: str) -> tuple[set[str], list[frozenset[str]]]:
    pattern = re.compile(rf"^{re.escape(layers)}\.(\d+)\.")
    found: dict[str, set[str]] = defaultdict(set)
    templates = set()
    for name in names:
        match = pattern.match(name)
        template = pattern.sub(f"{layers}.{{}}.", name)
        templates.add(template)
        if match:
            found[match[1]].add(template)
    return templates, [frozenset(of_layer) for of_layer in found.values()]


def _optional_names(model_type: str, model: PreTrainedModel, ffn_path: str, layers: str) -> set[str]:
    """Names that appear where one boolean field of the config is flipped, and the FFN stays where it is."""
    base = set(PreTrainedConfig().to_dict())
    flags = [n for n, v in model.config.to_dict().items() if isinstance(v, bool) and n not in base | {"tie_word_embeddings"}]
    names: set[str] = set()
    for flag in flags:
        try:
            flipped = _empty_model(tiny_config(model_type, **{flag: not getattr(model.config, flag)}))
            path = next(iter(sites_of(flipped))).path
        except Exception:  # some flags refuse to stand alone, in many ways
            continue
        if path == ffn_path:
            names |= _templates(flipped.state_dict(), layers)[0] - _templates(model.state_dict(), layers)[0]
    return names


def _num_layers_field(model_type: str, layers: str, count: int) -> str:
    """The config's field that decides how many decoder layers there are, by changing it."""
    config = tiny_config(model_type)
    default = type(config).attribute_map.get("num_hidden_layers", "num_hidden_layers")
    candidates = [n for n, v in config.to_dict().items() if v == count and isinstance(v, int) and "layer" in n]
    for field in sorted(candidates, key=lambda name: name != default):
        try:
            shorter = _empty_model(tiny_config(model_type, **{field: count - 1}))
        except Exception:  # lists with an item for each layer no longer fit: the field is the right one, or cannot be told
            continue
        if len(shorter.get_submodule(layers)) == count - 1:
            return field
    return default


def table() -> dict[str, Any]:
    """The content of `architectures.json`."""
    return {"transformers": transformers.__version__, "architectures": {name: entry_of(name) for name in MODEL_TYPES}}


# ---------------------------------------------------------------------- output

_KINDS = {
    "moe": "Mixture-of-Experts already",
    "no_ffn": "no feed-forward block",
    "not_a_text_decoder": "not a text decoder",
    "unsupported": "not supported",
}


def as_json(content: Mapping[str, Any]) -> str:
    return json.dumps(content, indent=1, sort_keys=True) + "\n"


def as_markdown(content: Mapping[str, Any]) -> str:
    """The page of the documentation."""
    entries = content["architectures"]
    counts = Counter("supported" if e["supported"] else e["kind"] for e in entries.values())
    lines = [
        "# Architectures",
        "",
        f"Every causal LM in the registry of Transformers {content['transformers']}, and what `hf_moe` makes of it. Of "
        f"{len(entries)}, **{counts['supported']} are supported**: a tiny random model of each was upcycled by copy and gave "
        "the dense logits (1e-5 in fp32, or 1e-10 in fp64 where rounding is the limit), was saved and loaded without missing "
        "or unexpected tensors, generated the same text with a cache, and had a gradient for every parameter of its MoE "
        "layers.",
        "The others: " + ", ".join(f"{counts[kind]} {words}" for kind, words in _KINDS.items()) + ".",
        "",
        f"Written by `{COMMAND}`; a test keeps it true.",
        "",
        "| model type | supported | feed-forward block, or why not |",
        "|---|---|---|",
    ]
    for name, entry in sorted(entries.items()):
        said = _ffn_in_words(entry) if entry["supported"] else f"{_KINDS[entry['kind']]}: {entry['reason']}"
        if not entry["supported"] and entry["kind"] == "moe":
            said = entry["reason"]
        lines.append(f"| `{name}` | {'yes' if entry['supported'] else 'no'} | {said} |")
    return "\n".join(lines) + "\n"


def _ffn_in_words(entry: Mapping[str, Any]) -> str:
    gated = "gated, gate and up in one tensor" if entry["packed"] else "gated" if entry["gate"] else "plain"
    linears = ", ".join(f"`{entry[part]}`" for part in ("gate", "up", "down") if entry[part])
    place = f"`{entry['ffn']}`" if entry["ffn"] else "the layer itself"
    extras = [", `[in, out]` on disk"] if entry["transposed"] else []
    if entry["inline"]:
        extras.append("; what stands around it is kept")
    if not entry["uniform"]:
        extras.append("; not in every layer the same")
    return f"{gated} ({linears}) in {place}" + "".join(extras)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model_types", nargs="*", help="check these only, and print their entries")
    parser.add_argument("--write", action="store_true", help=f"check all and write {JSON.name} and {TABLE.name}")
    arguments = parser.parse_args()
    warnings.filterwarnings("ignore")
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    content = table()
    failures = []
    for name in arguments.model_types or MODEL_TYPES:
        try:
            if content["architectures"][name]["supported"]:
                check(name)
        except Exception as error:  # all of them are to be seen
            failures.append(name)
            print(f"{name}: {type(error).__name__}: {error}")
        if arguments.model_types:
            print(as_json({name: content["architectures"][name]}))
    if failures:
        parser.exit(1, f"{len(failures)} failed: {', '.join(failures)}. Nothing is written.\n")
    if arguments.write:
        TABLE.parent.mkdir(exist_ok=True)
        JSON.write_text(as_json(content), encoding="utf-8")
        TABLE.write_text(as_markdown(content), encoding="utf-8")


if __name__ == "__main__":
    main()
