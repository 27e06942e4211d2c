# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Perplexity per token: the same whatever the batch size, the number of ranks, and the lengths of the sequences."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional as F

_CHUNK = 2**24  # logits that are looked at at a time, in fp32


class Perplexity:
    """A metric as those of the library `evaluate` are used: `add_batch` for every batch, then `compute`.

    It keeps two numbers, in fp64: the sum of the tokens' negative log-likelihoods, and how many they are.

    Example:
        >>> metric = Perplexity()
        >>> labels = torch.tensor([[1, 2, 3, 4], [1, 2, -100, -100]])
        >>> metric.add_batch(predictions=torch.zeros(2, 4, 8), references=labels)
        >>> metric.add_batch(predictions=torch.zeros(1, 9, 8), references=torch.ones(1, 9, dtype=torch.long))
        >>> {name: round(value, 4) for name, value in metric.compute().items()}
        {'loss': 2.0794, 'perplexity': 8.0, 'tokens': 12}
    """

    def __init__(self) -> None:
        self._sums: Tensor | None = None

    @torch.no_grad()
    def add_batch(self, *, predictions: Tensor, references: Tensor, shifted: bool = False) -> None:
        """Add sequences.

        Args:
            predictions: logits `[B, S, V]` of a causal LM.
            references: token ids `[B, S]`; -100 does not count.
            shifted: whether references are those of the next token already; else they are the inputs.
        """
        if not shifted:
            predictions, references = predictions[:, :-1], references[:, 1:]
        logits_TV, labels_T = predictions.flatten(0, 1), references.flatten().to(predictions.device)
        rows = max(1, _CHUNK // logits_TV.shape[-1])
        wide = torch.float32 if predictions.device.type == "mps" else torch.float64  # MPS has no fp64
        sums = torch.zeros(2, dtype=wide, device=predictions.device)
        for logits, labels in zip(logits_TV.split(rows), labels_T.split(rows), strict=True):
            precise = logits.to(torch.promote_types(logits.dtype, torch.float32))
            losses = F.cross_entropy(precise, labels, reduction="none", ignore_index=-100)
            sums += torch.stack([losses.to(wide).sum(), labels.ne(-100).sum().to(wide)])
        self._sums = sums if self._sums is None else self._sums + sums.to(self._sums.device)

    def compute(self, reduce: Callable[[Tensor], Tensor] | None = None) -> dict[str, float]:
        """`loss` in nats per token, `perplexity` and `tokens`; empty if there was no batch.

        Args:
            reduce: adds the sums of all ranks up.
        """
        if self._sums is None:
            return {}
        nll, tokens = (self._sums if reduce is None else reduce(self._sums)).tolist()
        loss = nll / tokens if tokens else float("nan")
        return {"loss": loss, "perplexity": math.exp(min(loss, 700.0)), "tokens": round(tokens)}
