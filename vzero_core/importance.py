"""How far the trainer's policy is from the engine that sampled the responses, and a weight that corrects for it.

Two engines give slightly different log-probs for the same weights. Shapes: B responses, T response tokens, N tokens.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vzero_core.masking import at_least_float32, require_finite, require_mask, require_shape, zero_padding

# exp overflows float32 from 89 nats on; no healthy pair of engines is 20 nats apart.
LOG_RATIO_CLAMP = 20.0


@dataclass(frozen=True)
class ImportanceHealth:
    """Figures of the token ratios r = policy / sampler of one round, before the cap.

    Attributes:
        importance_ratio_mean: 1 in expectation, whatever the policy, where the tokens were drawn at temperature 1.
        importance_ratio_max: at most exp(20).
        importance_effective_share: (sum r)^2 / (N sum r^2), in (0, 1]; 1 where all ratios are equal.
        importance_capped_share: share of the ratios above the cap. None without a cap.
    """

    importance_ratio_mean: float
    importance_ratio_max: float
    importance_effective_share: float
    importance_capped_share: float | None


def importance_weights(policy_logprobs: Tensor, sampler_logprobs: Tensor, response_mask: Tensor, cap: float) -> Tensor:
    """Give each token's truncated importance weight, min(r, cap), r = exp(clamp(policy - sampler, +-20)).

    The weights multiply finished token losses, whose denominators stay counts of responses and tokens: the mean of r
    under the sampler is 1, and a count does not depend on how a batch is cut. Each token is corrected for its own
    draw, not for the tokens before it. The cap bounds the variance and costs a bias: what is cut off is missing.

    With PPO, old / sampler (this weight) is a constant beside current / old (PPO's ratio). Their product is
    current / sampler, but each is bounded by itself: PPO keeps clipping around the old policy, not the sampler.
    Without PPO nothing corrects for the updates since the round began. A loss that depends on the prefix alone
    (`forward_kl_topk`) has no draw to correct at its own position; there the weights only add noise.

    Args:
        policy_logprobs: [B, T] float, nats; the trainer's log-probs as the round begins.
        sampler_logprobs: [B, T] float, nats; those that the sampling engine recorded.
        response_mask: [B, T] bool. Padding of both may hold anything.
        cap: >= 1; the largest weight.

    Returns:
        [B, T] at least float32, in (0, cap], detached; 0 outside the mask.

    Raises:
        InputError: shapes differ, the mask is not bool, or a log-prob under the mask is not finite.

    Source: truncated importance sampling, Ionides 2008, J. Comput. Graph. Stat. 17, with a constant cap and per
        token, as is usual where one engine samples and another trains. Two ratios with PPO: arXiv 2110.00641.
    """
    require_mask("response_mask", response_mask)
    for name, logprobs in (("policy_logprobs", policy_logprobs), ("sampler_logprobs", sampler_logprobs)):
        require_shape(name, logprobs, response_mask.shape)
        require_finite(name, logprobs, response_mask)
    return zero_padding(_ratio(policy_logprobs, sampler_logprobs).clamp(max=cap), response_mask)


def importance_health(policy_logprobs: Tensor, sampler_logprobs: Tensor, cap: float | None) -> ImportanceHealth:
    """Give the figures of a round's ratios.

    Args:
        policy_logprobs: [N] float, nats; as in `importance_weights`, of at least one token.
        sampler_logprobs: [N] float, nats; as there.
        cap: as there; None where no weight is used.

    Raises:
        InputError: shapes differ, or a log-prob is not finite.
    """
    require_shape("sampler_logprobs", sampler_logprobs, policy_logprobs.shape)
    everywhere = torch.ones_like(policy_logprobs, dtype=torch.bool)
    require_finite("policy_logprobs", policy_logprobs, everywhere)
    require_finite("sampler_logprobs", sampler_logprobs, everywhere)
    ratio = _ratio(policy_logprobs.double(), sampler_logprobs.double())
    return ImportanceHealth(
        importance_ratio_mean=ratio.mean().item(),
        importance_ratio_max=ratio.max().item(),
        importance_effective_share=(ratio.sum().square() / (len(ratio) * ratio.square().sum())).item(),
        importance_capped_share=None if cap is None else (ratio > cap).double().mean().item(),
    )


def _ratio(policy: Tensor, sampler: Tensor) -> Tensor:
    log_ratio = at_least_float32(policy.detach()) - at_least_float32(sampler.detach())
    return log_ratio.clamp(-LOG_RATIO_CLAMP, LOG_RATIO_CLAMP).exp()
