"""Whether a gate is healthy: without labels while training, against known correctness offline.

Shapes: B responses.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from vzero_core.config import GateConfig
from vzero_core.errors import InputError
from vzero_core.gating import group_statistics
from vzero_core.masking import require_finite, require_shape


@dataclass(frozen=True)
class GateHealth:
    """Label-free figures of one batch's gate; None where a figure is not defined.

    Attributes:
        mean_spread: nats; mean over groups of the scores' population standard deviation. None without any group of
            two or more: a single response has no spread.
        median_spread: nats; the median of the same.
        share_below_min_spread: share of the same groups that `min_spread` leaves ungated.
        share_at_w_min: share of weights at the lower bound.
        share_at_w_max: share of weights at the upper bound.
        effective_sample_share: (sum w)^2 / (B sum w^2), in (0, 1]; 1 where all weights are equal. None where all
            are 0.
        weight_length_correlation: Pearson's, of weight and response length. None where either is constant. Far from
            0, the gate chooses by length.
    """

    mean_spread: float | None
    median_spread: float | None
    share_below_min_spread: float | None
    share_at_w_min: float
    share_at_w_max: float
    effective_sample_share: float | None
    weight_length_correlation: float | None


def gate_health(
    scores: Tensor, weights: Tensor, group_ids: Tensor, response_lengths: Tensor, config: GateConfig
) -> GateHealth:
    """Give the label-free figures of a contrastive gate.

    Args:
        scores: [B] float, nats per token; evidence scores.
        weights: [B] float >= 0; what `gate_weights` made of them.
        group_ids: [B] int64.
        response_lengths: [B] integer, tokens.
        config: the gate's settings.

    Raises:
        InputError: no response, shapes differ, ids are not int64, or a score or weight is not finite.
    """
    statistics = group_statistics(scores, group_ids)
    if len(scores) == 0:
        raise InputError("scores must hold at least one response, got none; skip the figures of an empty batch")
    require_shape("weights", weights, scores.shape)
    require_shape("response_lengths", response_lengths, scores.shape)
    require_finite("weights", weights, torch.ones_like(weights, dtype=torch.bool))
    spreads = statistics.std[statistics.count > 1]
    exact = weights.detach().double()
    squares = exact.square().sum().item()
    return GateHealth(
        mean_spread=spreads.mean().item() if len(spreads) else None,
        median_spread=spreads.quantile(0.5).item() if len(spreads) else None,
        share_below_min_spread=_share(spreads < config.min_spread) if len(spreads) else None,
        share_at_w_min=_share(exact <= config.w_min),
        share_at_w_max=_share(exact >= config.w_max),
        effective_sample_share=exact.sum().item() ** 2 / (len(exact) * squares) if squares > 0 else None,
        weight_length_correlation=_pearson(exact, response_lengths.double()),
    )


def auc(scores: Tensor, labels: Tensor) -> float | None:
    """Give the probability that a right response outscores a wrong one, ties counting one half (Mann-Whitney).

    Args:
        scores: [B] float.
        labels: [B] bool; True where the response is right. Known offline only: training reads no label.

    Returns:
        In [0, 1], 1/2 being chance; None where all responses are right or all wrong.

    Raises:
        InputError: shapes differ, labels are not bool, or a score is not finite.
    """
    return auc_within_groups(scores, labels, torch.zeros(scores.shape, dtype=torch.int64, device=scores.device))


def auc_within_groups(scores: Tensor, labels: Tensor, group_ids: Tensor) -> float | None:
    """Give the same among pairs of one group only: what a gate that standardises within groups can use.

    Every pair of a right and a wrong response of one prompt counts alike, so prompts with more such pairs count
    for more.

    Args:
        scores: [B] float.
        labels: [B] bool.
        group_ids: [B] int64.

    Returns:
        In [0, 1]; None where no group has both right and wrong responses.

    Raises:
        InputError: shapes differ, labels are not bool, ids are not int64, or a score is not finite.
    """
    index = group_statistics(scores, group_ids).index
    require_shape("labels", labels, scores.shape)
    if labels.dtype != torch.bool:
        raise InputError(f"labels must be bool, got {labels.dtype}; compare the answers first")
    wins, pairs = 0.0, 0
    for group in range(int(index.max()) + 1 if len(index) else 0):
        right = scores[(index == group) & labels].contiguous()
        wrong = scores[(index == group) & ~labels].sort().values
        below = torch.searchsorted(wrong, right)
        not_above = torch.searchsorted(wrong, right, right=True)
        wins += (below + not_above).sum().item() / 2
        pairs += len(right) * len(wrong)
    return wins / pairs if pairs else None


def _share(flags: Tensor) -> float:
    return flags.double().mean().item()


def _pearson(left: Tensor, right: Tensor) -> float | None:
    # Compared, not tested for zero variance: the mean of equal numbers can differ from them by rounding.
    if left.min() == left.max() or right.min() == right.max():
        return None
    left, right = left - left.mean(), right - right.mean()
    return float((left * right).sum() / (left.norm() * right.norm()))
