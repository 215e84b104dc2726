"""Evidence score of a response: how much more likely the positive view makes it than the negative view.

Shapes: B responses, T response tokens.
"""

import torch
from torch import Tensor

from vzero_core.errors import InputError
from vzero_core.masking import masked_mean, require_finite, require_mask, require_shape, zero_padding


def evidence_scores(
    teacher_logprobs_pos: Tensor, teacher_logprobs_neg: Tensor, response_mask: Tensor, gamma: float = 1.0
) -> Tensor:
    """Give each response's mean evidence gap.

        d_k = logp_t(y_k | x, z+) - logp_t(y_k | x, z-)
        e_k = relu(d_k) - gamma * relu(-d_k)
        p   = mean_k e_k

    Args:
        teacher_logprobs_pos: [B, T] float, nats; the teacher's log-prob of each sampled token, positive view.
        teacher_logprobs_neg: [B, T] float, nats; the same under the negative view.
        response_mask: [B, T] bool; True on the response's tokens. Padding may hold anything.
        gamma: factor on negative gaps; 1 gives e_k = d_k.

    Returns:
        [B] float64, nats per token, detached; 0 for a response whose mask is empty.

    Raises:
        InputError: shapes differ, the mask is not bool, a log-prob under the mask is not finite, or gamma is not a
            finite number >= 0.

    Source: arXiv 2606.25319, section on evidence gating; gamma from the public release.

    Departure: float64 throughout, because scores of one group can differ by less than float32 resolves.
    """
    require_mask("response_mask", response_mask)
    require_shape("teacher_logprobs_pos", teacher_logprobs_pos, response_mask.shape)
    require_shape("teacher_logprobs_neg", teacher_logprobs_neg, response_mask.shape)
    require_finite("teacher_logprobs_pos", teacher_logprobs_pos, response_mask)
    require_finite("teacher_logprobs_neg", teacher_logprobs_neg, response_mask)
    if not 0 <= gamma < float("inf"):
        raise InputError(f"gamma must be a finite number >= 0, got {gamma}; use 1 for the paper's score")
    positive = zero_padding(teacher_logprobs_pos.detach().double(), response_mask)
    negative = zero_padding(teacher_logprobs_neg.detach().double(), response_mask)
    gap = positive - negative
    return masked_mean(torch.relu(gap) - gamma * torch.relu(-gap), response_mask)
