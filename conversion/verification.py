# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""How exactly a MoE computes what the dense model it was made of computes."""

from __future__ import annotations

import json
from dataclasses import asdict, dataclass

import torch
from torch import Tensor
from transformers import PreTrainedModel, PreTrainedTokenizerBase

EXACT = 1e-5  # largest |Δlogits| in fp32 that rounding alone explains

BUILT_IN_TEXT = [
    "The lighthouse keeper climbed the stairs every evening, lit the lamp, and wrote the weather down in a small book.",
    "Water boils at a lower temperature on a mountain, because the air presses less on its surface.",
    "def mean(values):\n    return sum(values) / len(values)\n",
    "Le marché ouvre à sept heures, et les premiers clients arrivent toujours avant l'aube.",
]


@dataclass(frozen=True)
class ExactnessReport:
    """Differences between a dense model and its MoE on the same tokens, both in evaluation.

    Attributes:
        max_abs_diff, mean_abs_diff: of the logits, over all real tokens.
        dense_loss, moe_loss: LM loss in nats per token.
        tokens: how many tokens were compared.
        dtype: in which both ran.
        exact: whether `max_abs_diff` is at most 1e-5.
    """

    max_abs_diff: float
    mean_abs_diff: float
    dense_loss: float
    moe_loss: float
    tokens: int
    dtype: str
    exact: bool

    def to_json(self) -> str:
        """As indented JSON."""
        return json.dumps(asdict(self), indent=2)

    def __str__(self) -> str:
        verdict = "function preserved" if self.exact else f"approximate: above {EXACT:g}"
        return (
            f"exactness on {self.tokens} tokens ({self.dtype}): max |Δlogits| {self.max_abs_diff:.3g}, mean |Δlogits| "
            f"{self.mean_abs_diff:.3g}, LM loss dense {self.dense_loss:.4f}, MoE {self.moe_loss:.4f} ({verdict})"
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
    largest, total, losses, tokens, entries = 0.0, 0.0, [0.0, 0.0], 0, 0
    for input_ids in batches:
        outputs = [m.eval()(input_ids=(ids := input_ids.to(m.device)), labels=ids) for m in (dense, moe)]
        logits = [output.logits.float().cpu() for output in outputs]
        difference = (logits[0] - logits[1]).abs()
        largest = max(largest, difference.max().item())
        total += difference.sum(dtype=torch.float64).item()
        entries += difference.numel()
        tokens += input_ids.numel()
        losses = [so_far + output.loss.item() * input_ids.numel() for so_far, output in zip(losses, outputs, strict=True)]
    return ExactnessReport(
        max_abs_diff=largest,
        mean_abs_diff=total / entries,
        dense_loss=losses[0] / tokens,
        moe_loss=losses[1] / tokens,
        tokens=tokens,
        dtype=str(moe.dtype).removeprefix("torch."),
        exact=largest <= EXACT,
    )


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
