# Copyright 2026 the hf_moe authors. Licensed under the Apache License, Version 2.0.
"""Routers: one class per rule, `[T, D]` tokens in, a `Routing` out.

Every router computes in fp32 whatever the model's dtype or autocast, and its parameters stay fp32 through `.to(bf16)`
(fp64 is kept as fp64). Noise and jitter change the router's logits only, never what the experts see.

`noise_scale`, a factor on all noise, and `exploration_bonus`, added to the logits, are for training only and in no checkpoint.

Letters: T tokens, D hidden, E experts, K per token, A groups, B experts of a group (A·B = E).
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from transformers import initialization as init

from .best_tokens import best_tokens_per_expert
from .configuration_moe import MoEConfig
from .losses import loss_free_bias_update, smooth_load
from .router_math import is_plain, project, softmax, without_autocast
from .routing import Routing, top_k

# By type of device: the choice in one kernel, with the arguments of `triton_router.route` (registered in auto.py). It returns a
# `RouterChoice`, or `None` for logits that it does not take.
KERNELS: dict[str, Callable[..., Any]] = {}
NOISE_EPSILON = 1e-2  # smallest standard deviation of the gating noise (the paper's reference code)


class Router(nn.Module, ABC):
    """Base of the learned routers: a fp32 projection of the tokens to one logit per expert.

    Args:
        config: which rule, and its numbers.
        hidden_size: D.
        num_experts: E.
    """

    zero_init = False
    exploration_bonus: Tensor | None

    def __init__(self, config: MoEConfig, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.config = config
        self.hidden_size = hidden_size
        self.num_experts = num_experts
        self.top_k = config.num_experts_per_tok
        self.jitter = config.router_jitter_noise
        self.noise_scale = 1.0
        self.weight = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=torch.float32))
        self.register_buffer("exploration_bonus", None, persistent=False)

    def reset_parameters(self, std: float = 0.02) -> None:
        """Draw the projection from N(0, std²), or set it to 0 where the paper starts from 0."""
        for parameter in self.parameters(recurse=False):
            init.zeros_(parameter) if self.zero_init else init.normal_(parameter, mean=0.0, std=std)

    def forward(self, x_TD: Tensor, token_mask_T: Tensor | None = None, token_ids_T: Tensor | None = None) -> Routing:
        """Plan a batch.

        Args:
            x_TD: `[T, D]` tokens.
            token_mask_T: `[T]` bool, False for padding. Read by the routers that compare tokens with each other.
            token_ids_T: `[T]` vocabulary ids. Read by the hash router.
        """
        with without_autocast(x_TD.device.type):
            return self.route(self._jittered(x_TD), token_mask_T)

    @abstractmethod
    def route(self, x_TD: Tensor, token_mask_T: Tensor | None) -> Routing:
        """The router's rule, on tokens of any precision; `project` makes fp32 of them."""

    @property
    def compares_ranks(self) -> bool:
        """Whether tokens of all ranks are compared: in training, as the scope of the config says."""
        return self.training and self.config.balance_scope == "global_batch"

    def _jittered(self, x_TD: Tensor) -> Tensor:
        jitter = self.jitter * self.noise_scale
        if not (self.training and jitter):
            return x_TD
        x_TD = x_TD.to(self.weight.dtype)
        return x_TD * torch.empty_like(x_TD).uniform_(1 - jitter, 1 + jitter)

    def _explored(self, scores_TE: Tensor) -> Tensor:
        """The scores plus the exploration bonus, if there is one, in training."""
        if self.exploration_bonus is None or not self.training:
            return scores_TE
        return scores_TE + self.exploration_bonus.to(scores_TE)

    def _chosen_by_kernel(self, logits_TE: Tensor, **rule: Any) -> Routing | None:
        """The plan from one kernel, if there is one for these logits.

        It has no second derivative: for that there is `experts_implementation="eager"`, here as for the experts.
        """
        kernel = KERNELS.get(logits_TE.device.type)
        if kernel is None or not is_plain(logits_TE) or self.config._experts_implementation in (None, "eager"):
            return None
        choice = kernel(logits_TE, self.top_k, **rule)
        return None if choice is None else Routing.of(choice.ids_TK, choice.weights_TK, logits_TE)

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> nn.Module:
        """Follow a move to another device, not to a lower precision."""

        def keep_precision(tensor: Tensor) -> Tensor:
            moved = fn(tensor)
            lowered = tensor.is_floating_point() and moved.is_floating_point() and moved.dtype.itemsize < 4
            return tensor.to(device=moved.device) if lowered else moved

        return super()._apply(keep_precision, recurse)

    def extra_repr(self) -> str:
        return f"hidden_size={self.hidden_size}, num_experts={self.num_experts}, top_k={self.top_k}"


class TopKRouter(Router):
    """Softmax top-k (Mixtral, Qwen, OLMoE): K largest probabilities, renormalised with `norm_topk_prob`. Also Switch."""

    def __init__(self, config: MoEConfig, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, hidden_size, num_experts)
        self.renormalise = config.norm_topk_prob and config.router_type != "switch"

    def route(self, x_TD: Tensor, token_mask_T: Tensor | None) -> Routing:
        logits_TE = self._explored(project(x_TD, self.weight))
        routing = self._chosen_by_kernel(logits_TE, renormalise=self.renormalise)
        if routing is not None:
            return routing
        top_TK, ids_TK = top_k(logits_TE, self.top_k)
        if self.renormalise:  # softmax over the kept logits is the renormalised softmax
            return Routing.of(ids_TK, softmax(top_TK), logits_TE)
        return Routing.of(ids_TK, softmax(logits_TE).gather(1, ids_TK), logits_TE)


class NoisyTopKRouter(Router):
    """Noisy top-k gating (Shazeer 2017, eq. 3-5), starting from W_g = W_noise = 0."""

    zero_init = True

    def __init__(self, config: MoEConfig, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, hidden_size, num_experts)
        self.noise_weight = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=torch.float32))

    def route(self, x_TD: Tensor, token_mask_T: Tensor | None) -> Routing:
        clean_TE, raw_TE = self._explored(project(x_TD, self.weight)), project(x_TD, self.noise_weight)
        noise_TE = torch.randn_like(clean_TE) if self.training else None
        ids_TK, weights_TK, load_TE = noisy_top_k(clean_TE, raw_TE, noise_TE, self.top_k, self.noise_scale)
        return Routing.of(ids_TK, weights_TK, clean_TE, load=load_TE)


def noisy_top_k(
    clean_TE: Tensor, raw_noise_TE: Tensor, noise_TE: Tensor | None, k: int, noise_scale: float = 1.0
) -> tuple[Tensor, Tensor, Tensor]:
    """Noisy top-k gating and its smooth load (Shazeer 2017, eq. 3-5 and 8-9) over the last dimension.

    Args:
        clean_TE: `[..., E]` x W_g.
        raw_noise_TE: `[..., E]` x W_noise; the standard deviation is `softplus(raw) + 1e-2`.
        noise_TE: `[..., E]` standard normal draws, or `None` for no noise (evaluation).
        k: K.
        noise_scale: factor on the standard deviation of the draws; 1 is the paper's.

    Returns:
        Expert ids `[..., K]`, gates `[..., K]` (softmax over the K kept), smooth load `[..., E]`.
    """
    std_TE = F.softplus(raw_noise_TE) + NOISE_EPSILON
    noisy_TE = clean_TE if noise_TE is None else clean_TE + noise_scale * std_TE * noise_TE
    if noise_TE is not None and noise_scale != 1:
        std_TE = (noise_scale * std_TE).clamp(min=NOISE_EPSILON)  # the smooth load divides by it
    top_TK, ids_TK = top_k(noisy_TE, k)
    return ids_TK, softmax(top_TK), smooth_load(clean_TE, noisy_TE, std_TE, k)


class GShardRouter(Router):
    """GShard and GLaM: top-2, g1 + g2 = 1; in training the second is kept with probability min(1, 2·g2)."""

    def route(self, x_TD: Tensor, token_mask_T: Tensor | None) -> Routing:
        logits_TE = self._explored(project(x_TD, self.weight))
        top_TK, ids_TK = top_k(logits_TE, 2)
        weights_TK = softmax(top_TK)
        routing = Routing.of(ids_TK, weights_TK, logits_TE)
        if not self.training:
            return routing
        second_T = weights_TK.detach()[:, 1]
        keep_second_T = torch.rand_like(second_T) < 2 * second_T
        return routing.keep(torch.stack([torch.ones_like(keep_second_T), keep_second_T], dim=-1), self.num_experts)


class SigmoidRouter(Router):
    """Sigmoid scores, chosen with a bias that balances and weighted without it (DeepSeek-V3, loss-free balancing).

    The bias is a fp32 buffer without gradient. It changes only by `update_bias`, once per optimizer step. An exploration
    bonus is added beside it: to the choice, not to the weights.
    """

    e_score_correction_bias: Tensor

    def __init__(self, config: MoEConfig, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, hidden_size, num_experts)
        self.num_groups, self.topk_group = config.n_group, config.topk_group
        self.scale = config.routed_scaling_factor
        self.register_buffer("e_score_correction_bias", torch.zeros(num_experts, dtype=torch.float32))

    def reset_parameters(self, std: float = 0.02) -> None:
        super().reset_parameters(std)
        init.zeros_(self.e_score_correction_bias)

    def route(self, x_TD: Tensor, token_mask_T: Tensor | None) -> Routing:
        logits_TE = project(x_TD, self.weight)
        if self.topk_group == self.num_groups:
            bias_E = self._explored(self.e_score_correction_bias)
            routing = self._chosen_by_kernel(logits_TE, scoring="sigmoid", selection_bias_E=bias_E, scale=self.scale)
            if routing is not None:
                return routing
        scores_TE = logits_TE.sigmoid()
        biased_TE = self._explored(scores_TE.detach() + self.e_score_correction_bias)
        _, ids_TK = top_k(self._within_groups(biased_TE), self.top_k)
        kept_TK = scores_TE.gather(1, ids_TK)
        weights_TK = kept_TK / (kept_TK.sum(dim=-1, keepdim=True) + 1e-20) * self.scale
        return Routing.of(ids_TK, weights_TK, logits_TE)

    def _within_groups(self, biased_TE: Tensor) -> Tensor:
        """The biased scores with all but the best groups at -inf; a group's score is the sum of its two best."""
        if self.topk_group == self.num_groups:
            return biased_TE
        groups_TAB = biased_TE.unflatten(-1, (self.num_groups, -1))
        group_score_TA = groups_TAB.topk(min(2, groups_TAB.shape[-1]), dim=-1).values.sum(dim=-1)
        _, best_TG = top_k(group_score_TA, self.topk_group)
        allowed_TA = torch.zeros_like(group_score_TA, dtype=torch.bool).scatter(1, best_TG, True)
        return groups_TAB.masked_fill(~allowed_TA.unsqueeze(-1), float("-inf")).flatten(1)

    @torch.no_grad()
    def update_bias(self, counts_E: Tensor) -> None:
        """Apply the loss-free update for one optimizer step.

        Args:
            counts_E: `[E]` assignments of the step, summed over ranks and micro-batches.
        """
        speed = self.config.router_bias_update_speed
        self.e_score_correction_bias += loss_free_bias_update(counts_E, speed).to(self.e_score_correction_bias)


class HierarchicalRouter(Router):
    """Two levels of noisy top-k (Shazeer 2017, app. B, eq. 12-14): a primary gate over groups, one gate in each group.

    Expert `i * B + j` is expert j of group i; its weight is `Gp_i · G_ij`. An exploration bonus is added within the groups,
    where what all experts of a group have in common changes nothing: that part is added to the group.
    """

    zero_init = True

    def __init__(self, config: MoEConfig, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, hidden_size, num_experts)
        self.num_groups, self.topk_group = config.n_group, config.topk_group
        self.top_k_in_group = config.num_experts_per_tok // config.topk_group
        self.noise_weight = nn.Parameter(torch.empty(num_experts, hidden_size, dtype=torch.float32))
        self.group_weight = nn.Parameter(torch.empty(self.num_groups, hidden_size, dtype=torch.float32))
        self.group_noise_weight = nn.Parameter(torch.empty(self.num_groups, hidden_size, dtype=torch.float32))

    def route(self, x_TD: Tensor, token_mask_T: Tensor | None) -> Routing:
        groups_TA, group_raw_TA = project(x_TD, self.group_weight), project(x_TD, self.group_noise_weight)
        clean_TAB = self._explored(project(x_TD, self.weight)).unflatten(-1, (self.num_groups, -1))
        if self.exploration_bonus is not None and self.training:
            groups_TA = groups_TA + self.exploration_bonus.to(groups_TA).view(self.num_groups, -1).amin(dim=-1)
        raw_TAB = project(x_TD, self.noise_weight).view_as(clean_TAB)
        group_noise_TA = torch.randn_like(groups_TA) if self.training else None
        noise_TAB = torch.randn_like(clean_TAB) if self.training else None
        k, k_in_group, scale = self.topk_group, self.top_k_in_group, self.noise_scale
        group_ids_TG, group_gates_TG, group_load_TA = noisy_top_k(groups_TA, group_raw_TA, group_noise_TA, k, scale)
        inner_TAK, gates_TAK, load_TAB = noisy_top_k(clean_TAB, raw_TAB, noise_TAB, k_in_group, scale)

        pick_TGK = group_ids_TG.unsqueeze(-1).expand(-1, -1, self.top_k_in_group)
        ids_TGK = pick_TGK * clean_TAB.shape[-1] + inner_TAK.gather(1, pick_TGK)
        weights_TGK = group_gates_TG.unsqueeze(-1) * gates_TAK.gather(1, pick_TGK)
        sent_TA = torch.zeros_like(groups_TA).scatter(1, group_ids_TG, 1.0)
        # log of the joint probability p(group) p(expert | group), so that softmax of it is that probability
        joint_TE = (groups_TA.unsqueeze(-1) + clean_TAB - clean_TAB.logsumexp(dim=-1, keepdim=True)).flatten(1)
        return Routing.of(
            ids_TGK.flatten(1),
            weights_TGK.flatten(1),
            joint_TE,
            primary_load=group_load_TA,
            primary_count=sent_TA,
            load=(load_TAB * sent_TA.unsqueeze(-1)).flatten(1),
        )


class ExpertChoiceRouter(Router):
    """Expert choice (Zhou et al. 2022): each expert takes its `C = ceil(T · cf / E)` best tokens by probability.

    It looks at the whole batch, so a token's output depends on later tokens and on the other sequences.
    """

    def __init__(self, config: MoEConfig, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, hidden_size, num_experts)
        self.factor = config.num_experts_per_tok if config.capacity_factor is None else config.capacity_factor

    def route(self, x_TD: Tensor, token_mask_T: Tensor | None) -> Routing:
        logits_TE = project(x_TD, self.weight)
        probs_TE = softmax(logits_TE)
        chosen_TE = best_tokens_per_expert(probs_TE, self.factor, token_mask_T, self.compares_ranks)
        return _dense_plan(probs_TE * chosen_TE, chosen_TE, logits_TE)


class StrictlyBalancedRouter(Router):
    """Strictly balanced gating (Shazeer 2017, app. F): in training every expert keeps its K·T/E best tokens of the batch.

    In evaluation an expert keeps the tokens above its learned threshold, so a token depends on itself alone. The
    thresholds start at 0, where every token passes.
    """

    def __init__(self, config: MoEConfig, hidden_size: int, num_experts: int) -> None:
        super().__init__(config, hidden_size, num_experts)
        self.thresholds = nn.Parameter(torch.empty(num_experts, dtype=torch.float32))

    def reset_parameters(self, std: float = 0.02) -> None:
        init.normal_(self.weight, mean=0.0, std=std)
        init.zeros_(self.thresholds)

    def route(self, x_TD: Tensor, token_mask_T: Tensor | None) -> Routing:
        logits_TE = project(x_TD, self.weight)
        probs_TE = softmax(logits_TE)
        above_TE = probs_TE > self.thresholds
        chosen_TE = above_TE
        if self.training:
            chosen_TE = best_tokens_per_expert(probs_TE, self.top_k, token_mask_T, self.compares_ranks)
        kept_TE = probs_TE * chosen_TE
        weights_TE = kept_TE / kept_TE.sum(dim=-1, keepdim=True).clamp(min=1e-20)
        if not self.training:
            return _dense_plan(weights_TE, chosen_TE, logits_TE)
        # eq. 20: moves each threshold to where it would have kept the same tokens
        disagree_TE = above_TE.to(probs_TE.dtype) - chosen_TE.to(probs_TE.dtype)
        threshold_T = (disagree_TE * (probs_TE.detach() - self.thresholds)).sum(dim=-1)
        return _dense_plan(weights_TE, chosen_TE, logits_TE, threshold=threshold_T)


def _dense_plan(weights_TE: Tensor, chosen_TE: Tensor, logits_TE: Tensor, **stats: Tensor) -> Routing:
    """A plan with one slot per expert, empty where the expert is not chosen."""
    num_experts = weights_TE.shape[1]
    ids_TE = torch.arange(num_experts, device=weights_TE.device).expand_as(weights_TE)
    return Routing.of(ids_TE.masked_fill(~chosen_TE, num_experts), weights_TE, logits_TE, **stats)


class HashRouter(nn.Module):
    """A fixed hash of the token id (Roller et al. 2021): nothing to learn, nothing to collapse; weights 1/K.

    Multiplicative (Fibonacci) hashing spreads any range of consecutive ids evenly over the experts. The K experts of a
    token are neighbours of the first.
    """

    _GOLDEN = 2654435769  # 2**32 / golden ratio

    def __init__(self, config: MoEConfig, hidden_size: int, num_experts: int) -> None:
        super().__init__()
        self.num_experts, self.top_k = num_experts, config.num_experts_per_tok

    def reset_parameters(self, std: float = 0.02) -> None:
        """Nothing to draw."""

    def forward(self, x_TD: Tensor, token_mask_T: Tensor | None = None, token_ids_T: Tensor | None = None) -> Routing:
        """Plan a batch from its token ids (see `Router.forward`).

        Raises:
            ValueError: no token ids are known.
        """
        if token_ids_T is None:
            raise ValueError(
                "`router_type`='hash' routes by token id, but none are known. Pass `input_ids` (not `inputs_embeds`) to the "
                "model, or `input_ids` to `record_routing` around a MoELayer of your own."
            )
        fraction_T = (token_ids_T.long() * self._GOLDEN) % 2**32
        first_T1 = ((fraction_T * self.num_experts) >> 32).unsqueeze(-1)
        ids_TK = (first_T1 + torch.arange(self.top_k, device=first_T1.device)) % self.num_experts
        dtype = torch.promote_types(x_TD.dtype, torch.float32)
        weights_TK = torch.full(ids_TK.shape, 1 / self.top_k, dtype=dtype, device=ids_TK.device)
        return Routing.of(ids_TK, weights_TK, None)


ROUTERS: dict[str, type[Router] | type[HashRouter]] = {
    "top_k": TopKRouter,
    "switch": TopKRouter,
    "noisy_top_k": NoisyTopKRouter,
    "gshard": GShardRouter,
    "expert_choice": ExpertChoiceRouter,
    "hash": HashRouter,
    "sigmoid": SigmoidRouter,
    "hierarchical": HierarchicalRouter,
    "strictly_balanced": StrictlyBalancedRouter,
}
