# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""How exactly a converted model computes what the model it was made of computes."""

from __future__ import annotations

import copy
import json
import logging
import math
import os
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F
from tqdm.auto import tqdm
from transformers import AutoTokenizer, PreTrainedModel, PreTrainedTokenizerBase

from hf_moe.pretrained_moe import MoEPreTrainedModel

from .checkpoint_reader import Checkpoint, open_checkpoint
from .errors import one_line
from .streamed_model import NotStreamableError, own_dtype, read_config, streamed_model, whole_model

logger = logging.getLogger(__name__)

EXACT = 1e-5  # largest |Δlogits| that counts as the same function
MOST_TOKENS, LONGEST = 2048, 512  # that are compared, in all and in a sequence
_MOST_PARAMETERS_FP64 = 1_000_000_000  # of a model in memory: above, its copy in fp64 would take too much
_MOST_TOKENS_FP64 = 128  # fp64 is slow
_CHUNK = 2**18  # logits that are compared at a time
_TOKENIZER_FILES = ("tokenizer.json", "tokenizer.model", "spiece.model", "vocab.json", "vocab.txt", "tokenizer_config.json")

BUILT_IN_TEXT = [
    "The lighthouse keeper climbed the stairs every evening, lit the lamp, and wrote the weather down in a small book.",
    "Water boils at a lower temperature on a mountain, because the air presses less on its surface.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Le marché ouvre à sept heures, et les premiers clients arrivent toujours avant l'aube.",
]


@dataclass(frozen=True)
class ExactnessReport:
    """Differences between a dense model and its MoE on the same tokens, both in evaluation.

    A large model's logits carry rounding errors above 1e-5 in fp32 already, so where the difference is larger than that,
    both models are run in fp64 as well: there a difference is one of the function. Where the conversion was not from dense
    to MoE, "dense" stands for the source and "MoE" for what was made of it; `names` tells what they are.

    Attributes:
        max_abs_diff, mean_abs_diff: of the logits, over all tokens, in the models' own dtype.
        dense_loss, moe_loss: LM loss in nats per token.
        tokens: how many tokens were compared.
        dtype: in which both ran.
        max_abs_diff_float64: of the logits, with the same weights in fp64, on the first 128 tokens; `None` where that was not
            needed, or too large.
        dense_rounding: largest difference between the dense model in its own dtype and in fp64; `None` likewise.
        exact: whether `max_abs_diff`, or else `max_abs_diff_float64`, is at most 1e-5, or the latter at most half of what the
            dense model's logits differ by between fp32 and fp64.
        routing_entropy: entropy of the routers' softmax as a share of its maximum log E, mean over layers and tokens; `None`
            where there are no logits (hash) or no two experts.
        expected_exact: whether the method promises exactness; `None` if it is open.
        names: what is compared.
    """

    max_abs_diff: float
    mean_abs_diff: float
    dense_loss: float
    moe_loss: float
    tokens: int
    dtype: str
    max_abs_diff_float64: float | None
    dense_rounding: float | None
    exact: bool
    routing_entropy: float | None = None
    expected_exact: bool | None = None
    names: tuple[str, str] = ("dense", "MoE")

    @property
    def verdict(self) -> str:
        """What the numbers mean, in words."""
        if not math.isfinite(self.max_abs_diff):
            return f"BROKEN: the {self.names[1]} model gives logits that are not finite numbers. Do not use it."
        if self.exact:
            return "function preserved"
        if self.expected_exact:
            return "NOT PRESERVED: approximate, beyond rounding, although the method promises exactness. Do not use it."
        return "approximate: beyond rounding" + (", as the method says" if self.expected_exact is False else "")

    def to_json(self) -> str:
        """As indented JSON, with the verdict."""
        return json.dumps({**asdict(self), "verdict": self.verdict}, indent=2)

    def __str__(self) -> str:
        in_fp64 = entropy = ""
        first, second = self.names
        if self.max_abs_diff_float64 is not None:
            in_fp64 = (
                f", in float64 {self.max_abs_diff_float64:.3g} (the {first} model's own rounding in {self.dtype}: "
                f"{self.dense_rounding:.3g})"
            )
        if self.routing_entropy is not None:
            entropy = f", routing entropy {100 * self.routing_entropy:.2f} % of its maximum"
        return (
            f"exactness on {self.tokens} tokens: max |Δlogits| {self.max_abs_diff:.3g} in {self.dtype}{in_fp64}, mean "
            f"{self.mean_abs_diff:.3g}, LM loss {first} {self.dense_loss:.4f}, {second} {self.moe_loss:.4f}{entropy}: "
            f"{self.verdict}"
        )


def verify(
    dense: PreTrainedModel,
    moe: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    text: list[str] | None = None,
    *,
    expected_exact: bool | None = None,
    names: tuple[str, str] = ("dense", "MoE"),
) -> ExactnessReport:
    """Run two models that are in memory on the same tokens.

    Args:
        dense, moe: models of the same vocabulary, on any devices.
        tokenizer: for `text`; without one, random tokens are compared.
        text: what to compare on, up to 2048 tokens of it (default: a few built-in sentences).
        expected_exact, names: for the report.
    """
    batches = token_batches(dense.config, tokenizer, text)
    to_fp64 = moe.num_parameters() <= _MOST_PARAMETERS_FP64
    return _compare(_Side(_in_memory(dense)), _Side(_in_memory(moe)), batches, to_fp64, expected_exact, names)


def verify_checkpoints(
    dense: Checkpoint | PreTrainedModel | str | os.PathLike,
    moe: Checkpoint | PreTrainedModel | str | os.PathLike,
    *,
    moe_config: dict[str, Any] | None = None,
    tokenizer: PreTrainedTokenizerBase | str | os.PathLike | None = None,
    text: list[str] | None = None,
    expected_exact: bool | None = None,
    names: tuple[str, str] = ("dense", "MoE"),
    trust_remote_code: bool = False,
) -> ExactnessReport:
    """Run two models on the same tokens, with their weights streamed from disk (see `streamed_model`).

    Where the MoE was written in another dtype, the dense weights are rounded to it first: what is compared is the function.

    Args:
        dense: the source: a folder or an open checkpoint; or a model that is in memory anyway.
        moe: what was made of it, likewise.
        moe_config: content of the MoE's config.json, where that has not got its name yet.
        tokenizer: for `text`, or the folder that has one (default: the dense model's folder). Its own code is never run.
            Without one, random tokens are compared.
        text: what to compare on, up to 2048 tokens of it (default: a few built-in sentences).
        expected_exact, names: for the report.
        trust_remote_code: allow code of the dense checkpoint to be run.

    Raises:
        ConversionError: a checkpoint is damaged or does not fit its config.
    """
    opened = [
        source if isinstance(source, (Checkpoint, PreTrainedModel)) else open_checkpoint(Path(source), config)
        for source, config in ((dense, None), (moe, moe_config))
    ]
    written = opened[1].dtype if isinstance(opened[1], PreTrainedModel) else own_dtype(opened[1])
    loads = [_in_memory(s) if isinstance(s, PreTrainedModel) else _on_disk(s, written, trust_remote_code) for s in opened]
    first = opened[0]
    config = first.config if isinstance(first, PreTrainedModel) else read_config(first, trust_remote_code)
    if tokenizer is None and isinstance(first, Checkpoint):
        tokenizer = first.folder
    if isinstance(tokenizer, (str, os.PathLike)):
        tokenizer = load_tokenizer(tokenizer)
    batches = token_batches(config, tokenizer, text)
    return _compare(_Side(loads[0]), _Side(loads[1]), batches, True, expected_exact, names)


def load_tokenizer(folder: str | os.PathLike) -> PreTrainedTokenizerBase | None:
    """The tokenizer in a folder; `None` if there is none, or none without running code of the folder."""
    if not any((Path(folder) / name).is_file() for name in _TOKENIZER_FILES):
        return None
    try:
        return AutoTokenizer.from_pretrained(folder, trust_remote_code=False)
    except Exception as error:  # tokenizers fail in many ways, and random tokens do as well
        reason = one_line(error, 160)
        logger.warning("%s: the tokenizer was not loaded (%s); random tokens are compared.", os.fspath(folder), reason)
        return None


def token_batches(config: Any, tokenizer: PreTrainedTokenizerBase | None, text: list[str] | None = None) -> list[Tensor]:
    """Token ids `[B, S]` to compare on, without padding: the text as one, cut in sequences; or random ids."""
    text_config = config.get_text_config()
    limits = [getattr(text_config, name, None) for name in ("max_position_embeddings", "max_seq_len", "seq_length")]
    longest = min([LONGEST, *(limit for limit in limits if isinstance(limit, int) and limit > 1)])
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        return [torch.randint(0, text_config.vocab_size, (4, min(32, longest)), generator=generator)]
    text = text or BUILT_IN_TEXT
    ids = torch.tensor([tokenizer("\n\n".join(text)[: 64 * MOST_TOKENS]).input_ids])  # a token has a few letters
    ids = ids[:, :MOST_TOKENS].clamp(max=text_config.vocab_size - 1)
    usable = [piece for piece in ids.split(longest, dim=1) if piece.shape[1] >= 2]
    if not usable:
        raise ValueError(f"`text` gives no sequence of at least 2 tokens (from {len(text)} texts). Give longer text.")
    return usable


# ---------------------------------------------------------------------- the two models

_Load = Callable[[torch.dtype | None, bool], PreTrainedModel]


def _in_memory(model: PreTrainedModel) -> _Load:
    return lambda dtype, whole: model.eval() if dtype is None else copy.deepcopy(model).eval().to(dtype)


def _on_disk(checkpoint: Checkpoint, written: torch.dtype, trust_remote_code: bool) -> _Load:
    def load(dtype: torch.dtype | None, whole: bool) -> PreTrainedModel:
        config = read_config(checkpoint, trust_remote_code)
        build = whole_model if whole else streamed_model
        return build(checkpoint, config, written, compute_dtype=dtype, trust_remote_code=trust_remote_code)

    return load


class _Side:
    """One of the two models, in its own dtype (`None`) and in others, made when first run."""

    def __init__(self, load: _Load) -> None:
        self._load = load
        self._models: dict[torch.dtype | None, PreTrainedModel] = {}

    def __call__(self, ids: Tensor, dtype: torch.dtype | None = None) -> tuple[Tensor, tuple[Tensor, ...]]:
        """Logits `[tokens, V]` on the CPU, and router logits `[tokens, E]` of each MoE layer."""
        try:
            if dtype not in self._models:
                self._models[dtype] = self._load(dtype, False)
            return _run(self._models[dtype], ids)
        except NotStreamableError as error:
            logger.info("The model is loaded whole: %s", error)
        self._models[dtype] = self._load(dtype, True)
        return _run(self._models[dtype], ids)

    @property
    def dtype(self) -> torch.dtype:
        """The model's own."""
        return self._models[None].dtype


def _run(model: PreTrainedModel, ids: Tensor) -> tuple[Tensor, tuple[Tensor, ...]]:
    more = {"output_router_logits": True} if isinstance(model, MoEPreTrainedModel) else {}
    outputs = model(input_ids=ids.to(model.device), use_cache=False, **more)
    return outputs.logits.flatten(0, 1).cpu(), (outputs.router_logits or ()) if more else ()


# ---------------------------------------------------------------------- the comparison


@dataclass
class _Sums:
    """What is added up over batches."""

    largest: Tensor = field(default_factory=lambda: torch.zeros((), dtype=torch.float64))
    absolute: float = 0.0
    values: int = 0
    losses: list[float] = field(default_factory=lambda: [0.0, 0.0])
    predicted: int = 0
    entropies: list[Tensor] = field(default_factory=list)


@torch.inference_mode()
def _compare(
    dense: _Side,
    moe: _Side,
    batches: list[Tensor],
    to_fp64: bool,
    expected_exact: bool | None,
    names: tuple[str, str],
) -> ExactnessReport:
    sums = _Sums()
    for ids in tqdm(batches, desc="Comparing", leave=False, disable=None):
        (dense_logits, _), (moe_logits, router_logits) = dense(ids), moe(ids)
        _add_differences(sums, dense_logits, moe_logits)
        sums.losses = [s + _loss(logits, ids) for s, logits in zip(sums.losses, (dense_logits, moe_logits), strict=True)]
        sums.predicted += ids.shape[0] * (ids.shape[1] - 1)
        sums.entropies += [_entropy(logits) for logits in router_logits if logits.shape[-1] > 1]
    largest = sums.largest.item()
    in_fp64, rounding, tolerance = None, None, EXACT
    if to_fp64 and expected_exact is not False and EXACT < largest < math.inf:
        in_fp64, rounding, in_fp32 = _differences_in_fp64(dense, moe, batches[0][:, :_MOST_TOKENS_FP64])
        # many classes have norms and softmax in fp32 in an fp64 model as well, which leaves a part of that rounding
        tolerance = max(EXACT, in_fp32 / 2)
    return ExactnessReport(
        max_abs_diff=largest,
        mean_abs_diff=sums.absolute / sums.values,
        dense_loss=sums.losses[0] / sums.predicted,
        moe_loss=sums.losses[1] / sums.predicted,
        tokens=sum(ids.numel() for ids in batches),
        dtype=str(moe.dtype).removeprefix("torch."),
        max_abs_diff_float64=in_fp64,
        dense_rounding=rounding,
        exact=(largest if in_fp64 is None else in_fp64) <= tolerance,
        routing_entropy=torch.cat(sums.entropies).mean().item() if sums.entropies else None,
        expected_exact=expected_exact,
        names=names,
    )


def _differences_in_fp64(dense: _Side, moe: _Side, ids: Tensor) -> tuple[float, float, float]:
    """Largest differences of logits from the dense ones in fp64: the MoE in fp64, the dense model in its own dtype, in fp32."""
    precise, _ = dense(ids, torch.float64)
    single = dense(ids, None if dense.dtype == torch.float32 else torch.float32)[0]
    differences = []
    for other in (moe(ids, torch.float64)[0], dense(ids)[0], single):
        sums = _Sums()
        _add_differences(sums, precise, other)
        differences.append(sums.largest.item())
    return differences[0], differences[1], differences[2]


def _add_differences(sums: _Sums, one: Tensor, other: Tensor) -> None:
    rows = max(1, _CHUNK // one.shape[-1])
    for a, b in zip(one.split(rows), other.split(rows), strict=True):
        differences = (a.double() - b.double()).abs_()
        sums.largest = torch.maximum(sums.largest, differences.max())  # keeps NaN
        sums.absolute += differences.sum().item()
        sums.values += differences.numel()


def _loss(logits: Tensor, ids: Tensor) -> float:
    """Sum of the LM loss over the predicted tokens, computed in fp32 at least."""
    loss = 0.0
    for sequence, labels in zip(logits.view(*ids.shape, -1), ids, strict=True):
        for rows, targets in zip(sequence[:-1].split(64), labels[1:].split(64), strict=True):
            wide = rows.to(torch.promote_types(rows.dtype, torch.float32))
            loss += F.cross_entropy(wide, targets.to(rows.device), reduction="sum").item()
    return loss


def _entropy(logits_TE: Tensor) -> Tensor:
    """`[T]` entropy of the softmax as a share of its maximum."""
    probs_TE = logits_TE.cpu().double().softmax(dim=-1)
    return torch.special.entr(probs_TE).sum(dim=-1) / math.log(logits_TE.shape[-1])
