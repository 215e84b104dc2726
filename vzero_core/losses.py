"""The gated distillation loss: a per-token loss, weighted, aggregated by explicit global denominators.

Shapes: B responses, T response tokens, K teacher tokens.
"""

from dataclasses import dataclass
from typing import TypeVar, assert_never

import torch
from torch import Tensor

from vzero_core.config import ForwardKLTopKLoss, Loss, PolicyGradientLoss, PPOClip, SampledLoss
from vzero_core.divergence import forward_kl_topk, sampled_divergence
from vzero_core.errors import InputError
from vzero_core.masking import (
    at_least_float32,
    masked_mean,
    masked_sum,
    require_finite,
    require_mask,
    require_shape,
    zero_padding,
)

Needed = TypeVar("Needed")


@dataclass(frozen=True)
class TopK:
    """What the top-k forward KL needs, all on the teacher's K likeliest tokens of each position.

    Attributes:
        policy_logprobs: [B, T, K] float, nats; see `divergence.topk_with_rest`.
        policy_rest: [B, T] float, nats; log of the policy's remaining mass.
        teacher_logprobs: [B, T, K] float, nats; normalised over the full vocabulary.
    """

    policy_logprobs: Tensor
    policy_rest: Tensor
    teacher_logprobs: Tensor


def token_losses(
    config: Loss,
    *,
    policy_logprobs: Tensor,
    teacher_logprobs: Tensor,
    response_mask: Tensor,
    old_logprobs: Tensor | None = None,
    topk: TopK | None = None,
) -> Tensor:
    """Give each token's loss before weights and aggregation; s = policy, t = teacher, sg = detached.

        policy_gradient         sg[k1] * s,   k1 = s - t, clamped if the config says so
        policy_gradient + ppo   A = -sg[k1];  r = exp(clamp(s - old, +-log_ratio_clamp))
                                max(-A r, -A clip(r, 1 - clip_low, 1 + clip_high)),
                                and at most -A dual_clip where A < 0
        sampled                 k2, k3 or abs of (s, t)
        forward_kl_topk         forward KL on the teacher's top-k tokens and the rest

    The value of the policy-gradient forms is a surrogate: its gradient is right, its size tells nothing.

    Args:
        config: which loss; see `config.Loss`.
        policy_logprobs: [B, T] float, nats; the current policy's log-prob of each sampled token.
        teacher_logprobs: [B, T] float, nats; the teacher's, target view. Detached here.
        response_mask: [B, T] bool. Padding of every input may hold anything.
        old_logprobs: [B, T] float, nats; the policy's log-probs when the round began; needed with `ppo` alone.
        topk: needed by `forward_kl_topk` alone, which reads it instead of the log-probs of the sampled tokens.

    Returns:
        [B, T] at least float32, nats, differentiable in the policy; 0 outside the mask, with gradient 0.

    Raises:
        InputError: an input that this loss needs is missing, shapes differ, the mask is not bool, or a needed value
            under the mask is not finite.

    Source: arXiv 2606.25319, eq. 24, for the policy gradient; its public release for PPO and the sampled forms.
    """
    require_mask("response_mask", response_mask)
    # From here on padding is 0 on both sides, where every one of the losses is 0.
    if isinstance(config, ForwardKLTopKLoss):
        return _topk_losses(config, _needed("topk", topk, config.kind), response_mask)
    policy = _clean("policy_logprobs", policy_logprobs, response_mask)
    teacher = _clean("teacher_logprobs", teacher_logprobs.detach(), response_mask)
    if isinstance(config, SampledLoss):
        return sampled_divergence(policy, teacher, config.estimator)
    if isinstance(config, PolicyGradientLoss):
        reward_cost = sampled_divergence(policy.detach(), teacher, "k1")
        if config.clamp is not None:
            reward_cost = reward_cost.clamp(-config.clamp, config.clamp)
        if config.ppo is None:
            return reward_cost * policy
        old = _clean("old_logprobs", _needed("old_logprobs", old_logprobs, "policy_gradient with ppo"), response_mask)
        return _ppo_losses(config.ppo, -reward_cost, policy, old.detach())
    assert_never(config)


def gated_distillation_loss(
    config: Loss,
    *,
    policy_logprobs: Tensor,
    teacher_logprobs: Tensor,
    response_mask: Tensor,
    weights: Tensor,
    num_responses: int,
    num_tokens: int,
    old_logprobs: Tensor | None = None,
    topk: TopK | None = None,
) -> Tensor:
    """Give the gated loss of one micro-batch, as its share of the whole batch's.

        sequence_mean   1/num_responses sum_b 1/T_b sum_k w_bk l_bk       T_b: the response's own tokens
        token_mean      1/num_tokens    sum_b       sum_k w_bk l_bk

    Both denominators are those of the whole batch (over all micro-batches and ranks), so the micro-batches' losses
    and gradients add up to the batch's however it is cut. Weights multiply the finished token loss; they are >= 0,
    and max, min and the clipped PPO terms are homogeneous in a factor >= 0, so this equals weighting the advantage.

    Args:
        config: which loss and aggregation.
        policy_logprobs: [B, T] float, nats; as in `token_losses`.
        teacher_logprobs: [B, T] float, nats; as there.
        response_mask: [B, T] bool.
        weights: [B] or [B, T] float >= 0; the gate's, times importance weights where used. Detached here.
        num_responses: responses with at least one token in the whole batch.
        num_tokens: response tokens in the whole batch.
        old_logprobs: [B, T] float, nats; as in `token_losses`.
        topk: as there.

    Returns:
        Scalar, at least float32, differentiable in the policy. A micro-batch without a token gives 0, with
        finite zero gradients.

    Raises:
        InputError: as `token_losses`; or weights are negative or not finite; or a denominator is below what this
            micro-batch alone holds.

    Source: arXiv 2606.25319, eq. 24 (sequence mean); its public release (token mean).
    """
    losses = token_losses(
        config,
        policy_logprobs=policy_logprobs,
        teacher_logprobs=teacher_logprobs,
        response_mask=response_mask,
        old_logprobs=old_logprobs,
        topk=topk,
    )
    _require_denominator("num_responses", num_responses, int(response_mask.any(dim=-1).sum()))
    _require_denominator("num_tokens", num_tokens, int(response_mask.sum()))
    weighted = losses * _token_weights(weights, response_mask).to(losses.dtype)
    # A denominator of 0 was let pass only without any token: the sum is 0, and must stay on the graph.
    if config.aggregation == "sequence_mean":
        return masked_mean(weighted, response_mask).sum() / max(num_responses, 1)
    if config.aggregation == "token_mean":
        return masked_sum(weighted, response_mask).sum() / max(num_tokens, 1)
    assert_never(config.aggregation)


def _ppo_losses(clip: PPOClip, advantages: Tensor, policy: Tensor, old: Tensor) -> Tensor:
    ratio = (policy - old).clamp(-clip.log_ratio_clamp, clip.log_ratio_clamp).exp()
    clipped = ratio.clamp(1 - clip.clip_low, 1 + clip.clip_high)
    pessimistic = torch.maximum(-advantages * ratio, -advantages * clipped)
    # Where the advantage is negative a large ratio makes the loss, and its gradient, as large as one likes.
    bounded = torch.minimum(pessimistic, -advantages * clip.dual_clip)
    return torch.where(advantages < 0, bounded, pessimistic)


def _topk_losses(config: ForwardKLTopKLoss, topk: TopK, mask: Tensor) -> Tensor:
    shape = (*mask.shape, config.k)
    require_shape("topk.policy_logprobs", topk.policy_logprobs, shape)
    require_shape("topk.teacher_logprobs", topk.teacher_logprobs, shape)
    require_shape("topk.policy_rest", topk.policy_rest, mask.shape)
    require_finite("topk.policy_logprobs", topk.policy_logprobs, mask)
    require_finite("topk.teacher_logprobs", topk.teacher_logprobs, mask)
    # -inf is the rest's right value where the k tokens are the whole vocabulary
    require_finite("topk.policy_rest", topk.policy_rest, mask & (topk.policy_rest != -torch.inf))
    return forward_kl_topk(
        zero_padding(topk.policy_logprobs, mask),
        zero_padding(topk.policy_rest, mask),
        zero_padding(topk.teacher_logprobs, mask),
    )


def _clean(name: str, logprobs: Tensor, mask: Tensor) -> Tensor:
    require_shape(name, logprobs, mask.shape)
    require_finite(name, logprobs, mask)
    return zero_padding(at_least_float32(logprobs), mask)


def _needed(name: str, value: Needed | None, kind: str) -> Needed:
    if value is None:
        raise InputError(f"{name} must be given for the loss {kind}, got None; pass it")
    return value


def _token_weights(weights: Tensor, mask: Tensor) -> Tensor:
    weights = weights.detach()
    if weights.dim() == 1:
        require_shape("weights", weights, mask.shape[:1])
        weights = weights.unsqueeze(-1).expand(mask.shape)
    require_shape("weights", weights, mask.shape)
    require_finite("weights", weights, mask)
    weights = zero_padding(weights, mask)
    if (weights < 0).any():
        raise InputError(f"weights must be >= 0, got {weights.min().item()}; a negative weight flips PPO's clipping")
    return weights


def _require_denominator(name: str, value: int, held: int) -> None:
    if value < held:
        raise InputError(
            f"{name} must be the whole batch's count, at least the {held} of this micro-batch, got {value}; "
            "count over all micro-batches and ranks"
        )
