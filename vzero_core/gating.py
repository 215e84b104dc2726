"""Gates: from evidence to the weight of a response, and from agreement to the weight of a token.

Shapes: B responses, T response tokens, N groups.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vzero_core.config import GateConfig
from vzero_core.errors import InputError
from vzero_core.masking import require_finite, require_mask, require_shape, zero_padding

# One step of log(p / p_max) below this is as good as zero probability; it bounds sums of infinities.
MIN_LOG_TRUST_STEP = -50.0


@dataclass(frozen=True)
class GroupStatistics:
    """Mean and population standard deviation of the scores of each group, groups in ascending order of their id.

    Attributes:
        index: [B] int64; the group of each response, as a position in the other tensors.
        count: [N] int64; responses in the group.
        mean: [N] float64, nats.
        std: [N] float64, nats, divided by the count (not by the count less one).
    """

    index: Tensor
    count: Tensor
    mean: Tensor
    std: Tensor


def group_statistics(scores: Tensor, group_ids: Tensor) -> GroupStatistics:
    """Give the statistics of the scores within each group.

    Args:
        scores: [B] float, nats.
        group_ids: [B] int64, any values in any order; equal ids are one group.

    Raises:
        InputError: shapes differ, ids are not int64, or a score is not finite.
    """
    if scores.dim() != 1:
        raise InputError(f"scores must be of shape [B], got {tuple(scores.shape)}; pass one score per response")
    require_shape("group_ids", group_ids, scores.shape)
    if group_ids.dtype != torch.int64:
        raise InputError(f"group_ids must be int64, got {group_ids.dtype}; number the prompts")
    require_finite("scores", scores, torch.ones_like(scores, dtype=torch.bool))
    exact = scores.detach().double()
    _, index, count = torch.unique(group_ids, return_inverse=True, return_counts=True)
    zeros = torch.zeros(len(count), dtype=torch.float64, device=scores.device)
    mean = zeros.index_add(0, index, exact) / count
    variance = zeros.index_add(0, index, (exact - mean[index]).square()) / count
    return GroupStatistics(index=index, count=count, mean=mean, std=variance.sqrt())


def gate_weights(scores: Tensor, group_ids: Tensor, config: GateConfig) -> Tensor:
    """Give each response's weight from its score's place within its group.

        a = (p - mean_G p) / (std_G p + eps)        population std
        w = clip(1 + alpha * a, w_min, w_max)
        w = 1 for the whole group where it holds one response, or where std_G p < min_spread

    Args:
        scores: [B] float, nats per token; evidence scores.
        group_ids: [B] int64; the prompt of each response, any values, any order, any group size.
        config: the gate's settings.

    Returns:
        [B] float64 in [w_min, w_max], detached.

    Raises:
        InputError: shapes differ, ids are not int64, or a score is not finite.

    Source: arXiv 2606.25319, eq. 20 (alpha is the release's, 1 in the paper).

    Departure: `min_spread`. With eps as small as 1e-6, scores that differ by rounding alone would be spread over
    the whole range of weights; below `min_spread` a group is not gated. 0 reproduces the source.
    """
    statistics = group_statistics(scores, group_ids)
    mean, std = statistics.mean[statistics.index], statistics.std[statistics.index]
    standardised = (scores.detach().double() - mean) / (std + config.eps)
    weights = (1.0 + config.alpha * standardised).clamp(config.w_min, config.w_max)
    # A group of one needs no case of its own: its score is its mean, so a = 0 and w = 1 exactly.
    return torch.where(std >= config.min_spread, weights, torch.ones_like(weights))


def prefix_trust(teacher_logprobs: Tensor, teacher_max_logprobs: Tensor, response_mask: Tensor, floor: float) -> Tensor:
    """Give each token's weight: how far the teacher would itself have written what stands before it.

        v_1 = 1
        v_k = prod_{j<k} exp(clamp(logp_t(y_j) - max_u logp_t(u), -50, 0))
        v_k = max(v_k, floor)

    The product runs over tokens under the mask only; holes in the mask do not count.

    Args:
        teacher_logprobs: [B, T] float, nats; the teacher's log-prob of each sampled token, target view.
        teacher_max_logprobs: [B, T] float, nats; its largest log-prob at the same position.
        response_mask: [B, T] bool; True on the response's tokens. Padding may hold anything.
        floor: smallest weight, in [0, 1]; on long responses the product decays to nothing.

    Returns:
        [B, T] float64 in [floor, 1] under the mask, 0 elsewhere, detached; never rising along a response.

    Raises:
        InputError: shapes differ, the mask is not bool, a log-prob under the mask is not finite, or the floor is not
            in [0, 1].

    Source: an experiment of this project, not of the paper; after an error the teacher's targets contradict the
    prefix they continue, and this takes their weight away.
    """
    require_mask("response_mask", response_mask)
    require_shape("teacher_logprobs", teacher_logprobs, response_mask.shape)
    require_shape("teacher_max_logprobs", teacher_max_logprobs, response_mask.shape)
    require_finite("teacher_logprobs", teacher_logprobs, response_mask)
    require_finite("teacher_max_logprobs", teacher_max_logprobs, response_mask)
    if not 0 <= floor <= 1:
        raise InputError(f"floor must be in [0, 1], got {floor}; use 0 for none")
    sampled = zero_padding(teacher_logprobs.detach().double(), response_mask)
    largest = zero_padding(teacher_max_logprobs.detach().double(), response_mask)
    # The upper clamp: the two log-probs may come from different kernels, and trust must not rise by their rounding.
    step = (sampled - largest).clamp(MIN_LOG_TRUST_STEP, 0.0)
    # Shifted by one token rather than `cumsum - step`, which would leave rounding where v_1 = 1 is exact.
    before = torch.nn.functional.pad(step, (1, 0))[:, :-1].cumsum(dim=-1)
    return zero_padding(before.exp().clamp(min=floor), response_mask)
