# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""How exactly a MoE computes what the dense model it was made of computes."""

from __future__ import annotations

import copy
import json
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

EXACT = 1e-5  # largest |Δlogits| that counts as the same function
_MOST_PARAMETERS_FP64 = 1_000_000_000  # above, copies in fp64 would take too much memory

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
    both models are run in fp64 as well: there a difference is one of the function.

    Attributes:
        max_abs_diff, mean_abs_diff: of the logits, over all tokens, in the models' own dtype.
        dense_loss, moe_loss: LM loss in nats per token.
        tokens: how many tokens were compared.
        dtype: in which both ran.
        max_abs_diff_float64: of the logits, with the same weights in fp64; `None` where that was not needed, or too large.
        dense_rounding: largest difference between the dense model in its own dtype and in fp64; `None` likewise.
        exact: whether `max_abs_diff`, or else `max_abs_diff_float64`, is at most 1e-5.
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

    def to_json(self) -> str:
        """As indented JSON."""
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        verdict = "function preserved" if self.exact else f"approximate: above {EXACT:g}"
        in_fp64 = ""
        if self.max_abs_diff_float64 is not None:
            in_fp64 = (
                f", in float64 {self.max_abs_diff_float64:.3g} (the dense model's own rounding in {self.dtype}: "
                f"{self.dense_rounding:.3g})"
            )
        return (
            f"exactness on {self.tokens} tokens: max |Δlogits| {self.max_abs_diff:.3g} in {self.dtype}{in_fp64}, mean "
            f"{self.mean_abs_diff:.3g}, LM loss dense {self.dense_loss:.4f}, MoE {self.moe_loss:.4f}: {verdict}"
        )


@torch.inference_mode()
def verify(
    dense: PreTrainedModel,
    moe: PreTrainedModel,
    tokenizer: PreTrainedTokenizerBase | None = None,
    text: list[str] | None = None,
) -> ExactnessReport:
    """Run both models on the same tokens.

    Args:
        dense, moe: models of the same vocabulary, on any devices.
        tokenizer: for `text`; without one, random tokens are compared.
        text: what to compare on (default: a few built-in sentences).
    """
    batches = _batches(dense, tokenizer, text or BUILT_IN_TEXT)
    (dense_logits, dense_loss), (moe_logits, moe_loss) = (_run(model, batches) for model in (dense, moe))
    differences = (dense_logits - moe_logits).abs()
    largest = differences.max().item()
    in_fp64 = rounding = None
    if largest > EXACT and moe.num_parameters() <= _MOST_PARAMETERS_FP64:
        precise = _run(copy.deepcopy(dense).double(), batches)[0]
        in_fp64 = (_run(copy.deepcopy(moe).double(), batches)[0] - precise).abs().max().item()
        rounding = (dense_logits - precise).abs().max().item()
    return ExactnessReport(
        max_abs_diff=largest,
        mean_abs_diff=differences.mean().item(),
        dense_loss=dense_loss,
        moe_loss=moe_loss,
        tokens=sum(ids.numel() for ids in batches),
        dtype=str(moe.dtype).removeprefix("torch."),
        max_abs_diff_float64=in_fp64,
        dense_rounding=rounding,
        exact=(largest if in_fp64 is None else in_fp64) <= EXACT,
    )


def _run(model: PreTrainedModel, batches: list[Tensor]) -> tuple[Tensor, float]:
    """Logits of all tokens `[tokens, V]` as fp64 on the CPU, and the mean LM loss per predicted token."""
    model.eval()
    logits, losses, predicted = [], 0.0, 0
    for input_ids in batches:
        ids = input_ids.to(model.device)
        outputs = model(input_ids=ids, labels=ids)
        logits.append(outputs.logits.double().cpu().flatten(0, 1))
        losses += outputs.loss.item() * (ids.shape[1] - 1)
        predicted += ids.shape[1] - 1
    return torch.cat(logits), losses / predicted


def _batches(dense: PreTrainedModel, tokenizer: PreTrainedTokenizerBase | None, text: list[str]) -> list[Tensor]:
    """One batch per text, so that there is no padding."""
    text_config = dense.config.get_text_config()
    longest = min(512, getattr(text_config, "max_position_embeddings", None) or 512)
    if tokenizer is None:
        generator = torch.Generator().manual_seed(0)
        shape = (1, min(64, longest))
        return [torch.randint(0, text_config.vocab_size, shape, generator=generator) for _ in range(4)]
    encoded = [tokenizer(t, return_tensors="pt").input_ids[:, :longest] for t in text]
    usable = [ids for ids in encoded if ids.shape[1] >= 2]
    if not usable:
        raise ValueError(f"`text` gives no sequence of at least 2 tokens (from {len(text)} texts). Give longer text.")
    return usable
