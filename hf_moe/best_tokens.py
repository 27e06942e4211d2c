# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""The tokens that an expert chooses, where experts choose tokens: the best of a batch, which may be spread over ranks."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn import functional as F


def best_tokens_per_expert(probs_TE: Tensor, factor: float, token_mask_T: Tensor | None, over_ranks: bool = False) -> Tensor:
    """`[T, E]` bool: is the token among the expert's `ceil(T · factor / E)` best real ones (ties to the earlier).

    Args:
        probs_TE: what the experts compare tokens by.
        factor: slots of an expert as a multiple of T / E.
        token_mask_T: `[T]` bool, False for padding.
        over_ranks: compare the tokens of all ranks, so that it does not matter how they are spread; every rank has to call.
    """
    num_tokens, num_experts = probs_TE.shape
    real_T = torch.ones_like(probs_TE[:, 0], dtype=torch.bool) if token_mask_T is None else token_mask_T
    scores_TE = probs_TE.detach().masked_fill(~real_T.unsqueeze(-1), float("-inf"))
    num_real, first = real_T.sum(), 0
    if over_ranks and dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1:
        scores_TE, num_real, first = _of_all_ranks(scores_TE, num_real)
    capacity = torch.ceil(num_real.double() * factor / num_experts - 1e-9)
    rank_TE = scores_TE.argsort(dim=0, descending=True, stable=True).argsort(dim=0)
    return (rank_TE[first : first + num_tokens] < capacity) & real_T.unsqueeze(-1)


def _of_all_ranks(scores_TE: Tensor, num_real: Tensor) -> tuple[Tensor, Tensor, int]:
    """The scores of all ranks' tokens, rank after rank; how many of them are real; and where this rank's begin."""
    told = torch.stack([num_real.new_tensor(scores_TE.shape[0]), num_real])
    each = [torch.empty_like(told) for _ in range(dist.get_world_size())]
    dist.all_gather(each, told)
    longest = max(int(told[0]) for told in each)
    padded_TE = F.pad(scores_TE, (0, 0, 0, longest - scores_TE.shape[0]), value=float("-inf"))
    gathered = [torch.empty_like(padded_TE) for _ in each]
    dist.all_gather(gathered, padded_TE.contiguous())
    return torch.cat(gathered), torch.stack(each)[:, 1].sum(), dist.get_rank() * longest
