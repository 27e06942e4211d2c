# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Router losses and the loss-free bias update, as pure functions of sums over tokens.

Every loss here is a function of *sums over real tokens* (`importance_E`, `load_E`, `counts_E`, `prob_sum_E`, …). Sums add
up over micro-batches and ranks, so the same functions serve every balance scope. Sums of L layers can be given at once, with
a dimension L before the others; so are the losses then.

Letters: T tokens, E experts, K experts per token, A groups, B experts of a group (A·B = E).
"""

from __future__ import annotations

import torch
from torch import Tensor

CV_EPSILON = 1e-10


def cv_squared(values_E: Tensor) -> Tensor:
    """Squared coefficient of variation `var / (mean² + 1e-10)` with the population variance (Shazeer 2017, eq. 7).

    Args:
        values_E: `[..., E]`, any unit.

    Returns:
        `[...]`; 0 where all are equal.
    """
    variance, mean = torch.var_mean(values_E, dim=-1, correction=0)
    return variance / (mean.square() + CV_EPSILON)


def importance_loss(importance_E: Tensor) -> Tensor:
    """CV² of the importance `Σ_t gate_ti` (Shazeer 2017, eq. 6-7). Balanced: 0."""
    return cv_squared(importance_E)


def load_loss(load_E: Tensor) -> Tensor:
    """CV² of the smooth load `Σ_t P(t, i)` (Shazeer 2017, eq. 8-11). Balanced: 0."""
    return cv_squared(load_E)


def switch_loss(counts_E: Tensor, prob_sum_E: Tensor, num_tokens: Tensor | float, top_k: int) -> Tensor:
    """`E · Σ_i f_i P_i` (Switch, eq. 4-6; GShard). Balanced: 1.

    Args:
        counts_E: `[..., E]` assignments per expert; carries no gradient.
        prob_sum_E: `[..., E]` sum over tokens of softmax(logits).
        num_tokens: T, `[...]`, the tokens summed over.
        top_k: K, assignments per token: `f_i = counts_i / (T K)`.

    Returns:
        `[...]`.
    """
    tokens = torch.as_tensor(num_tokens, device=prob_sum_E.device).clamp(min=1)
    return (counts_E.detach() * prob_sum_E).sum(dim=-1) / tokens.square() * (counts_E.shape[-1] / top_k)


def z_loss(z_sum: Tensor, num_tokens: Tensor | float) -> Tensor:
    """Mean over tokens of `logsumexp(logits)²` (ST-MoE, Zoph et al. 2022, eq. 5), from its sum over tokens."""
    return z_sum / torch.as_tensor(num_tokens, device=z_sum.device).clamp(min=1)


def smooth_load(clean_TE: Tensor, noisy_TE: Tensor, noise_std_TE: Tensor, top_k: int) -> Tensor:
    """`P(t, i)`: the probability that expert i is chosen if only its own noise is drawn again (Shazeer 2017, eq. 8-9).

    Whether i is in is decided on the *noisy* value: `thr` is the (K+1)-th largest of H_t if H_ti is strictly greater than
    it (i is in now), else the K-th largest.

    Args:
        clean_TE: `[T, E]` x W_g.
        noisy_TE: `[T, E]` H, the clean logits plus noise.
        noise_std_TE: `[T, E]` standard deviation of the noise.
        top_k: K.

    Returns:
        `[T, E]` in (0, 1), with gradient; for K = E ones, without.
    """
    if top_k >= clean_TE.shape[-1]:
        return torch.ones_like(clean_TE)
    top_TK = noisy_TE.topk(top_k + 1, dim=-1).values
    if_in_T1, if_out_T1 = top_TK[..., top_k : top_k + 1], top_TK[..., top_k - 1 : top_k]
    threshold_TE = torch.where(noisy_TE > if_in_T1, if_in_T1, if_out_T1)
    return torch.special.ndtr((clean_TE - threshold_TE) / noise_std_TE)


def hierarchical_load(primary_load_A: Tensor, secondary_load_AB: Tensor, primary_count_A: Tensor) -> Tensor:
    """`Load_ij = Load_p,i · Load_i(X⁽ⁱ⁾)_j / |X⁽ⁱ⁾|` (Shazeer 2017, eq. 14), flattened to `[..., A·B]`.

    Args:
        primary_load_A: `[..., A]` smooth load of the groups.
        secondary_load_AB: `[..., A, B]` smooth load of the experts over the tokens sent to their group.
        primary_count_A: `[..., A]` true number of tokens sent to each group.
    """
    share_A1 = (primary_load_A / primary_count_A.clamp(min=1)).unsqueeze(-1)
    return (share_A1 * secondary_load_AB).flatten(-2)


def loss_free_bias_update(counts_E: Tensor, speed: float) -> Tensor:
    """`u · sign(mean(c) − c_i)`, what to add to the router's bias after an optimizer step (arXiv:2408.15664, alg. 1).

    Args:
        counts_E: `[E]` assignments per expert over the optimizer step, summed over ranks and micro-batches.
        speed: u.
    """
    counts_E = counts_E.float()
    return speed * torch.sign(counts_E.mean() - counts_E)
