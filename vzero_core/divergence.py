"""Divergences between policy and teacher: on the sampled token, on the teacher's top-k, on the full vocabulary.

Shapes: V vocabulary, K kept tokens; leading axes are free.
"""

from typing import Literal, assert_never

import torch
from torch import Tensor

from vzero_core.errors import InputError
from vzero_core.masking import at_least_float32, require_shape

SampledKind = Literal["k1", "k2", "k3", "abs"]

# k3 grows like exp(log-ratio): one improbable token would own the batch, or overflow.
K3_LOG_RATIO_CLAMP = 20.0
K3_CLAMP = 10.0


def sampled_divergence(policy_logprobs: Tensor, teacher_logprobs: Tensor, kind: SampledKind) -> Tensor:
    """Give an estimate of the divergence from the sampled token alone; s = policy, t = teacher.

        k1  = s - t                                 mean over the policy's samples: reverse KL
        k2  = (s - t)^2 / 2                         its gradient in s is k1 times the gradient of s
        k3  = exp(t - s) - (t - s) - 1              t - s clamped to +-20, the result to +-10
        abs = |s - t|

    Back-propagating k1 does not see the teacher; it is a policy-gradient reward, and only k1 is. The gradient of
    back-propagated k3, averaged over the policy's samples, is that of the *forward* KL, sum_u p_t (log p_t - log
    p_s), although k3's mean is the reverse KL; where the clamps bite its gradient is 0.

    Args:
        policy_logprobs: [...] float, nats; the policy's log-prob of the sampled token.
        teacher_logprobs: [...] float, nats; the teacher's.
        kind: the estimator.

    Returns:
        [...] at least float32, nats, differentiable in both.

    Raises:
        InputError: shapes differ.

    Source: k1 to k3 are Schulman's estimators; abs and the clamps are the public release's.
    """
    require_shape("teacher_logprobs", teacher_logprobs, policy_logprobs.shape)
    log_ratio = at_least_float32(policy_logprobs) - at_least_float32(teacher_logprobs)
    if kind == "k1":
        return log_ratio
    if kind == "k2":
        return log_ratio.square() / 2
    if kind == "k3":
        clamped = (-log_ratio).clamp(-K3_LOG_RATIO_CLAMP, K3_LOG_RATIO_CLAMP)
        # expm1, or the value of a small log-ratio would be the rounding of exp
        return (torch.expm1(clamped) - clamped).clamp(-K3_CLAMP, K3_CLAMP)
    if kind == "abs":
        return log_ratio.abs()
    assert_never(kind)


def topk_with_rest(logits: Tensor, token_ids: Tensor) -> tuple[Tensor, Tensor]:
    """Give the log-probs of K chosen tokens and the log of the mass of all others.

        topk = logits[token_ids] - logsumexp(logits)
        rest = logsumexp(logits of the complement) - logsumexp(logits)

    The rest is a logsumexp, not log(1 - sum): that loses all digits, and its gradient, where the rest is small.
    One copy of the logits, in the wider type, is kept for the backward pass.

    Args:
        logits: [..., V] float.
        token_ids: [..., K] int64, distinct within a row, K <= V; at padding any valid ids will do.

    Returns:
        topk [..., K] and rest [...], at least float32, nats, differentiable in the logits. Where nothing is left
        over (K = V) the rest is -inf, with gradient 0.

    Raises:
        InputError: the leading shapes differ.
    """
    require_shape("token_ids", token_ids, (*logits.shape[:-1], token_ids.shape[-1]))
    # Shift by the maximum first: log-probs of large logits would else carry the rounding of the logits' size.
    largest = at_least_float32(logits.detach().amax(dim=-1, keepdim=True))
    chosen = at_least_float32(logits.gather(-1, token_ids)) - largest
    complement = (at_least_float32(logits) - largest).scatter_(-1, token_ids, -torch.inf)
    # The gradient of logsumexp over nothing but -inf is NaN; such a row is a constant -inf.
    nothing_left = complement.detach().amax(dim=-1) == -torch.inf
    rest = complement.masked_fill_(nothing_left.unsqueeze(-1), 0.0).logsumexp(dim=-1)
    rest = torch.where(nothing_left, torch.full_like(rest, -torch.inf), rest)
    log_total = torch.cat((chosen, rest.unsqueeze(-1)), dim=-1).logsumexp(dim=-1)
    return chosen - log_total.unsqueeze(-1), rest - log_total


def forward_kl_topk(
    policy_topk_logprobs: Tensor, policy_rest_logprobs: Tensor, teacher_topk_logprobs: Tensor
) -> Tensor:
    """Give the forward KL on the teacher's top-k tokens, with the remaining mass of each as one more token.

        P_rest = clamp(1 - sum_k p_t(k), 0, 1)
        sum_k p_t(k) (log p_t(k) - log p_s(k)) + P_rest (log P_rest - log p_s(rest))

    It is the full forward KL on a coarser set of tokens: never above it, equal to it at K = V, and zero for some
    distributions that differ only inside the rest.

    Args:
        policy_topk_logprobs: [..., K] float, nats, finite; the policy's log-probs of the teacher's top-k tokens.
        policy_rest_logprobs: [...] float, nats; log of its remaining mass; -inf only where K = V, and there the
            last term is 0 (the teacher's rest is then its rounding).
        teacher_topk_logprobs: [..., K] float, nats; the teacher's log-probs, normalised over the full vocabulary.

    Returns:
        [...] at least float32, nats, >= -1e-6 (rounding of the inputs); differentiable in the policy, the
        teacher detached.

    Raises:
        InputError: shapes differ.

    Departure: from losses that drop the rest, and so reward the policy for moving mass into the top-k.
    """
    require_shape("teacher_topk_logprobs", teacher_topk_logprobs, policy_topk_logprobs.shape)
    require_shape("policy_rest_logprobs", policy_rest_logprobs, policy_topk_logprobs.shape[:-1])
    # float64, as K is small: a sum of K terms in float32 could fall below the bound stated above
    policy, policy_rest = policy_topk_logprobs.double(), policy_rest_logprobs.double()
    teacher = teacher_topk_logprobs.detach().double()
    teacher_probs = teacher.exp()
    chosen = (torch.xlogy(teacher_probs, teacher_probs) - teacher_probs * policy).sum(dim=-1)
    rest_probs = (1.0 - teacher_probs.sum(dim=-1)).clamp(0.0, 1.0)
    has_rest = policy_rest != -torch.inf
    safe_rest = torch.where(has_rest, policy_rest, torch.zeros_like(policy_rest))
    rest = torch.where(has_rest, torch.xlogy(rest_probs, rest_probs) - rest_probs * safe_rest, 0.0)
    return (chosen + rest).to(at_least_float32(policy_topk_logprobs).dtype)


def reverse_kl(policy_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Give the reverse KL, sum_u p_s(u) (log p_s(u) - log p_t(u)), over the full vocabulary.

    Args:
        policy_logits: [..., V] float, finite.
        teacher_logits: [..., V] float, finite.

    Returns:
        [...] at least float32, nats, >= 0 up to rounding, differentiable in both.

    Raises:
        InputError: shapes differ.

    Source: arXiv 2606.25319, eq. 21.
    """
    policy, teacher = _log_softmaxes(policy_logits, teacher_logits)
    return _kl(policy, teacher)


def forward_kl(policy_logits: Tensor, teacher_logits: Tensor) -> Tensor:
    """Give the forward KL, sum_u p_t(u) (log p_t(u) - log p_s(u)), over the full vocabulary.

    Args:
        policy_logits: [..., V] float, finite.
        teacher_logits: [..., V] float, finite.

    Returns:
        [...] at least float32, nats, >= 0 up to rounding, differentiable in both.

    Raises:
        InputError: shapes differ.
    """
    policy, teacher = _log_softmaxes(policy_logits, teacher_logits)
    return _kl(teacher, policy)


def jsd(policy_logits: Tensor, teacher_logits: Tensor, beta: float) -> Tensor:
    """Give the generalised Jensen-Shannon divergence over the full vocabulary.

        m = beta p_t + (1 - beta) p_s
        JSD = beta KL(p_t || m) + (1 - beta) KL(p_s || m)

    JSD / beta tends to the forward KL as beta -> 0, JSD / (1 - beta) to the reverse KL as beta -> 1.

    Args:
        policy_logits: [..., V] float, finite.
        teacher_logits: [..., V] float, finite.
        beta: the teacher's share of the mixture, in (0, 1); 1/2 is the symmetric divergence.

    Returns:
        [...] at least float32, nats, in [0, log 2] up to rounding, differentiable in both.

    Raises:
        InputError: shapes differ, or beta is not in (0, 1).

    Source: the convention of generalised knowledge distillation, arXiv 2306.13649.
    """
    if not 0 < beta < 1:
        raise InputError(f"beta must be in (0, 1), got {beta}; use forward_kl or reverse_kl for the ends")
    policy, teacher = _log_softmaxes(policy_logits, teacher_logits)
    shares = torch.tensor([beta, 1 - beta], dtype=policy.dtype, device=policy.device).log()
    mixture = torch.logaddexp(teacher + shares[0], policy + shares[1])
    return beta * _kl(teacher, mixture) + (1 - beta) * _kl(policy, mixture)


def _log_softmaxes(policy_logits: Tensor, teacher_logits: Tensor) -> tuple[Tensor, Tensor]:
    require_shape("teacher_logits", teacher_logits, policy_logits.shape)
    return at_least_float32(policy_logits).log_softmax(dim=-1), at_least_float32(teacher_logits).log_softmax(dim=-1)


def _kl(left: Tensor, right: Tensor) -> Tensor:
    return (left.exp() * (left - right)).sum(dim=-1)
