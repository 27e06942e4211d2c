# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""A dense model to be converted: its checkpoint, and where on disk each layer's feed-forward block is.

Sources are a folder, an id on the Hub, or a model in memory. What does not fit is refused from config and headers alone.
"""

from __future__ import annotations

import difflib
import logging
import os
import re
import sys
import tempfile
from dataclasses import dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from hf_moe.ffn_kinds import UnsupportedArchitectureError

from .architectures import Architecture, lookup, model_types, reason, transformers_version
from .checkpoint_reader import Checkpoint, TensorsCheckpoint, file_identity, open_checkpoint, read_json
from .errors import ConversionError, one_line
from .ffn_tensors import FFNTensors
from .model_names import empty_model, find_ffn_tensors, module_names, tied_names, written_names

logger = logging.getLogger(__name__)

_WANTED = [
    "*.json",
    "*.safetensors",
    "*.model",
    "*.jinja",
    "*.txt",
    "*.tiktoken",
    "tokenization_*.py",
    "LICENSE*",
    "NOTICE*",
    "README.md",
]
# Flags of a config that are known not to bring tensors of their own.
_HARMLESS_FLAGS = "use_cache|tie_word_embeddings|return_dict|output_|use_sliding_window|scale_attn|summary_|is_decoder"
_WIDTH_FIELDS = ("intermediate_size", "ffn_dim", "ffn_hidden_size", "n_inner")
_EXPERT_COUNTS = ("num_experts", "num_local_experts", "n_routed_experts", "moe_num_experts", "num_routed_experts")


@dataclass(frozen=True)
class DenseSource:
    """A dense model to be converted.

    Attributes:
        checkpoint: its tensors, and its config as `config.json` has it.
        ffns: of every decoder layer that has one, by index.
        names: what each tensor is called in the output.
        num_layers: decoder layers.
        companions: folder of its tokenizer and the like, or `None`.
        model: the model, where it is in memory anyway.
    """

    checkpoint: Checkpoint
    ffns: dict[int, FFNTensors]
    names: dict[str, str]
    num_layers: int
    companions: Path | None = None
    model: Any = None
    kept: Any = field(default=None, repr=False)  # what must live as long (a temporary folder)

    @property
    def text_config(self) -> dict[str, Any]:
        """The config, without what concerns code of its own."""
        dropped = ("auto_map", "_name_or_path", "quantization_config")
        return {name: value for name, value in self.checkpoint.config.items() if name not in dropped}


def open_dense(source: Any, *, gguf_file: str | None = None, revision: str | None = None) -> DenseSource:
    """Open a dense model.

    Args:
        source: a folder, an id on the Hub, or a model in memory.
        gguf_file: name of the GGUF file in it.
        revision: branch, tag or commit on the Hub.

    Raises:
        ConversionError: it is not there, damaged, quantised, or already a Mixture-of-Experts.
        UnsupportedArchitectureError: no feed-forward block was found in it.
    """
    if not isinstance(source, (str, os.PathLike)):
        refuse_unfit(source.config.to_dict(), type(source).__name__)
        return _from_model(source)
    folder = local_folder(source, revision, gguf_file)
    if gguf_file is not None:
        return _from_gguf(folder, gguf_file)
    config = read_json(folder / "config.json")
    refuse_unfit(config, str(folder))
    checkpoint = open_checkpoint(folder, config)
    of_experts = next((name for name in checkpoint.tensors if re.search(r"\.experts\.|block_sparse_moe\.", name)), None)
    if of_experts is not None:
        raise ConversionError(f"{folder}: tensor `{of_experts}` is of a Mixture-of-Experts. Use `hf-moe import` for it.")
    return _from_table(checkpoint, folder) or _probe(checkpoint, folder)


def local_folder(source: str | os.PathLike, revision: str | None = None, gguf_file: str | None = None) -> Path:
    """The folder of a checkpoint; from the Hub, it is fetched.

    Raises:
        ConversionError: there is no such folder, and no such model on the Hub.
    """
    path = Path(source)
    if path.is_dir():
        return path
    text = os.fspath(source)
    if path.exists() or text.startswith((".", "/", "~")) or text.count("/") != 1 or not all(text.split("/")):
        raise ConversionError(
            f"`source`={text!r} is not a folder. Give a folder with a checkpoint, or an id such as org/model."
        )
    from huggingface_hub import snapshot_download

    try:
        fetched = Path(
            snapshot_download(text, revision=revision, allow_patterns=[gguf_file, "*.json"] if gguf_file else _WANTED)
        )
        if not gguf_file and not any(fetched.glob("*.safetensors")):
            fetched = Path(snapshot_download(text, revision=revision, allow_patterns=[*_WANTED, "*.bin"]))
    except Exception as error:  # the Hub's client has many kinds
        reason = one_line(error, 160)
        raise ConversionError(f"`source`={text!r} is not a folder, and was not fetched from the Hub ({reason}).") from error
    return fetched


def refuse_unfit(config: dict[str, Any], what: str) -> None:
    """Refuse what is no dense causal LM, from its config.

    Raises:
        ConversionError: it already is a Mixture-of-Experts, is quantised, or its class is not known.
    """
    model_type = config.get("model_type")
    counts = [n for n in _EXPERT_COUNTS if isinstance(config.get(n), list) or (_is_int(config.get(n)) and config[n] > 1)]
    if lookup(str(model_type)) is not None:  # its config can speak of experts and have none: the tensors tell
        counts = []
    why = reason(str(model_type))
    if model_type == "hf_moe":
        raise ConversionError(
            f"{what}: `model_type`='hf_moe' already is a Mixture-of-Experts of hf_moe. Upcycle a dense model."
        )
    if counts or (why is not None and why[0] == "moe"):
        found = f"`{counts[0]}`={config[counts[0]]}" if counts else f"`model_type`={model_type!r}"
        raise ConversionError(f"{what}: {found} says that it already is a Mixture-of-Experts. Use `hf-moe import` for it.")
    refuse_quantised(config, what)
    if not isinstance(model_type, str):
        raise ConversionError(f"{what}: config.json has no `model_type`. Give a checkpoint of a Transformers causal LM.")
    if why is not None:
        raise UnsupportedArchitectureError(f"{what}: `model_type`={model_type!r} cannot be converted: {why[1]}")
    if _is_unknown(model_type):
        close = difflib.get_close_matches(model_type, model_types(), n=1)
        remedy = f"Did you mean {close[0]!r}?" if close else "Give a checkpoint of one of its causal LMs."
        raise UnsupportedArchitectureError(f"{what}: `model_type`={model_type!r} is no causal LM of Transformers. {remedy}")


def refuse_quantised(config: dict[str, Any], what: str) -> None:
    """Refuse weights that are not what a tensor's bytes say, from the config.

    Raises:
        ConversionError: the checkpoint is quantised.
    """
    if config.get("quantization_config"):
        raise ConversionError(
            f"{what}: `quantization_config` says that the weights are quantised. Save the model dequantised, then convert that."
        )


def _is_unknown(model_type: str) -> bool:
    """Whether Transformers, which is not imported for this, cannot know a model type either."""
    if model_type in model_types() or "transformers" in sys.modules:  # once imported, it may have been told of more
        return False
    return metadata.version("transformers") == transformers_version()


# ---------------------------------------------------------------------- where the FFNs are


def _from_table(checkpoint: Checkpoint, folder: Path) -> DenseSource | None:
    """By the table of architectures, if the checkpoint has exactly the tensors that the table expects. Needs no torch."""
    config = checkpoint.config
    known = lookup(config["model_type"])
    if known is None or not known.uniform:
        return None
    num_layers: Any = config.get(known.num_layers_field)
    hidden_size: Any = config.get(known.hidden_size_field)
    flags = [name for name, value in config.items() if value is True and not re.match(_HARMLESS_FLAGS, name)]
    if not _is_int(num_layers) or not _is_int(hidden_size) or (flags and known.optional_names):
        return None
    expected = {name.format(i) for name in known.names for i in range(num_layers if "{}" in name else 1)}
    absent = expected - set(checkpoint.tensors)
    if absent and (config.get("tie_word_embeddings") is not True or absent - set(known.tied_names)):
        return None
    if set(checkpoint.tensors) - expected:
        return None
    ffns = [_table_ffn(checkpoint, known, i) for i in range(num_layers)]
    widths = {config[name] for name in _WIDTH_FIELDS if _is_int(config.get(name))}
    fitting = (ffn is not None and ffn.hidden_size == hidden_size and widths <= {ffn.intermediate_size} for ffn in ffns)
    if not all(fitting) or not _sizes_fit(config, hidden_size, checkpoint):
        return None  # or it is not as its config says, which the probe will tell exactly
    names = {name: name for name in checkpoint.tensors}
    return DenseSource(checkpoint, {ffn.layer: ffn for ffn in ffns if ffn}, names, num_layers, folder)


def _sizes_fit(config: dict[str, Any], hidden_size: int, checkpoint: Checkpoint) -> bool:
    """Whether vocabulary and attention heads, where a config names them by their usual names, are those of the tensors."""
    vocabulary = config.get("vocab_size")
    rows = {info.shape[0] for info in checkpoint.tensors.values() if len(info.shape) == 2}
    if _is_int(vocabulary) and vocabulary not in rows:
        return False
    heads = config.get("num_attention_heads")
    if not isinstance(heads, int) or heads < 1:
        return True
    head_dim = config.get("head_dim") or hidden_size // heads
    key_heads = config.get("num_key_value_heads") or heads
    expected = {".q_proj.weight": heads, ".k_proj.weight": key_heads, ".v_proj.weight": key_heads}
    return all(
        info.shape[0] == expected[suffix] * head_dim
        for name, info in checkpoint.tensors.items()
        if (suffix := f".{'.'.join(name.split('.')[-2:])}") in expected
    )


def _table_ffn(checkpoint: Checkpoint, known: Architecture, index: int) -> FFNTensors | None:
    """One layer's FFN, `None` where its shapes do not fit each other."""
    layer = f"{known.layers}.{index}"
    path = f"{layer}.{known.ffn}" if known.ffn else layer
    parts = {"gate": known.up if known.packed else known.gate, "up": known.up, "down": known.down}
    linears = {part: f"{path}.{name}" for part, name in parts.items() if name}
    (up_out, up_in), (down_out, down_in) = (
        checkpoint[f"{linears[part]}.weight"].shape[:: -1 if known.transposed else 1] for part in ("up", "down")
    )
    if (up_in, up_out) != (down_out, down_in * (2 if known.packed else 1)):
        return None
    activation = f"{path}.{known.activation}." if known.activation else "\n"
    return FFNTensors(
        layer=index,
        moe_path=f"{layer}.{known.moe}",
        linears=linears,
        biases=frozenset(part for part, name in linears.items() if f"{name}.bias" in checkpoint),
        packed=known.packed,
        gate_first=known.gate_first,
        transposed=known.transposed,
        hidden_size=up_in,
        intermediate_size=down_in,
        activation={n: n.removeprefix(activation) for n in checkpoint.tensors if n.startswith(activation)},
    )


def _probe(checkpoint: Checkpoint, folder: Path) -> DenseSource:
    """By building the model without weights, and Transformers' own mapping of names."""
    model = empty_model(folder)
    state = model.state_dict()
    names = module_names(model, checkpoint.tensors)
    if names is None:  # tensors that Transformers merges or splits when it loads them: let it
        return _load_whole(folder)
    known = {name: target for name, target in names.items() if target in state}
    missing = sorted(set(state) - set(known.values()) - tied_names(model))
    if missing:
        raise ConversionError(
            f"{folder}: tensor `{missing[0]}` is missing ({len(missing)} in all). Fetch the checkpoint again."
        )
    unknown = sorted(set(names) - set(known))
    if unknown:
        logger.warning("%s: %d tensors that the model does not have are left out: %s …", folder, len(unknown), unknown[0])
    on_disk = {target: name for name, target in known.items()}
    ffns = find_ffn_tensors(model, on_disk)
    for name, target in known.items():
        shape = tuple(state[target].shape)
        if checkpoint[name].shape != shape:
            raise ConversionError(
                f"{folder}: tensor `{name}` has shape {checkpoint[name].shape}, but the config asks for {shape}."
            )
    written = written_names(model, known.values())
    known = {name: written[target] for name, target in known.items()}
    return DenseSource(checkpoint, ffns, known, model.config.get_text_config().num_hidden_layers, folder)


# ---------------------------------------------------------------------- models in memory


def _from_model(
    model: Any, config: dict[str, Any] | None = None, identity: list[Any] | None = None, **more: Any
) -> DenseSource:
    ffns = find_ffn_tensors(model)
    tied = tied_names(model)
    state = {name: tensor for name, tensor in model.state_dict().items() if name not in tied}
    checkpoint = TensorsCheckpoint(config or model.config.to_dict(), state, identity=identity)
    num_layers = model.config.get_text_config().num_hidden_layers
    return DenseSource(checkpoint, ffns, written_names(model, state), num_layers, model=model, **more)


def _load_whole(folder: Path) -> DenseSource:
    from transformers import AutoModelForCausalLM

    model = AutoModelForCausalLM.from_pretrained(folder, dtype="auto").eval()
    identity = [file_identity(path) for path in sorted(folder.iterdir())]
    return _from_model(model, read_json(folder / "config.json"), identity, companions=folder)


def _from_gguf(folder: Path, gguf_file: str) -> DenseSource:
    """Transformers dequantises GGUF files into a model in memory."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    path = folder / gguf_file
    if not path.is_file():
        raise ConversionError(f"`gguf_file`={gguf_file!r} is not in {folder}.")
    try:
        model = AutoModelForCausalLM.from_pretrained(folder, gguf_file=gguf_file).eval()
        tokenizer = AutoTokenizer.from_pretrained(folder, gguf_file=gguf_file)
    except ImportError as error:
        raise ConversionError(f"{path}: reading GGUF needs the package gguf: `pip install hf_moe[gguf]`.") from error
    except Exception as error:  # the GGUF reader has no error of its own
        raise ConversionError(f"{path}: not readable ({one_line(error)}).") from error
    refuse_unfit({k: v for k, v in model.config.to_dict().items() if k != "quantization_config"}, str(path))
    kept = tempfile.TemporaryDirectory()
    tokenizer.save_pretrained(kept.name)
    model.generation_config.save_pretrained(kept.name)
    config = {name: value for name, value in model.config.to_dict().items() if name != "quantization_config"}
    identity = [file_identity(path)]
    return _from_model(model, config, identity, companions=Path(kept.name), kept=kept)


def _is_int(value: Any) -> bool:
    return isinstance(value, int) and not isinstance(value, bool)
