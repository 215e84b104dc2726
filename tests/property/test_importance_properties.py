"""What holds for every pair of policy and sampler."""

import math

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vzero_core.importance import importance_health, importance_weights

JUNK = st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e30, 0.0])
CAPS = st.floats(1.0, 20.0)


@st.composite
def distributions(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    """Log-probs of all V tokens under policy and sampler at B positions, [B, V]; up to some nats apart."""
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    shape = draw(st.integers(1, 4)), draw(st.integers(1, 6))
    sampler = 2 * torch.randn(shape, dtype=torch.float64, generator=generator)
    distance = draw(st.sampled_from([1e-3, 0.1, 1.0]))
    policy = sampler + distance * torch.randn(shape, dtype=torch.float64, generator=generator)
    return policy.log_softmax(-1), sampler.log_softmax(-1)


def everywhere(values: Tensor) -> Tensor:
    return torch.ones_like(values, dtype=torch.bool)


@given(pair=distributions(), cap=CAPS)
def test_what_the_sampler_draws_counts_as_drawn_by_the_policy(pair: tuple[Tensor, Tensor], cap: float) -> None:
    """Over all tokens: probability of the sampler times weight is the policy's, but for what the cap cuts off."""
    policy, sampler = pair
    weights = importance_weights(policy, sampler, everywhere(policy), cap)
    assert torch.allclose(sampler.exp() * weights, torch.minimum(policy.exp(), cap * sampler.exp()), rtol=1e-12)
    assert ((weights > 0) & (weights <= cap)).all()
    unbounded = importance_weights(policy, sampler, everywhere(policy), math.inf)
    assert torch.allclose((sampler.exp() * unbounded).sum(-1), torch.ones(len(policy), dtype=torch.float64))


@given(pair=distributions(), cap=CAPS, junk=JUNK, data=st.data())
def test_padding_content_is_irrelevant(
    pair: tuple[Tensor, Tensor], cap: float, junk: float, data: st.DataObject
) -> None:
    policy, sampler = pair
    size = policy.numel()
    mask = torch.tensor(data.draw(st.lists(st.booleans(), min_size=size, max_size=size))).reshape(policy.shape)
    whole = importance_weights(policy, sampler, everywhere(policy), cap)
    filled = [torch.where(mask, values, junk) for values in pair]
    weights = importance_weights(*filled, mask, cap)
    assert torch.equal(weights, torch.where(mask, whole, 0.0))


@given(pair=distributions(), cap=CAPS)
def test_equal_engines_have_weights_of_exactly_one(pair: tuple[Tensor, Tensor], cap: float) -> None:
    for policy in (pair[0], pair[0].float()):
        assert torch.equal(importance_weights(policy, policy, everywhere(policy), cap), torch.ones_like(policy))
        health = importance_health(policy.flatten(), policy.flatten(), cap)
        assert vars(health) == {
            "importance_ratio_mean": 1.0,
            "importance_ratio_max": 1.0,
            "importance_effective_share": 1.0,
            "importance_capped_share": 0.0,
        }


@given(pair=distributions(), cap=CAPS, shift=st.floats(-2.0, 2.0))
def test_health_follows_from_the_weights(pair: tuple[Tensor, Tensor], cap: float, shift: float) -> None:
    policy, sampler = (values.flatten() for values in pair)
    health = importance_health(policy, sampler, cap)
    ratios = importance_weights(*pair, everywhere(pair[0]), math.inf).flatten().tolist()
    assert health.importance_ratio_mean == pytest.approx(sum(ratios) / len(ratios))
    assert health.importance_ratio_max == pytest.approx(max(ratios))
    assert health.importance_capped_share == pytest.approx(sum(ratio > cap for ratio in ratios) / len(ratios))
    # One token carries all at worst, all carry alike at best; a factor common to all ratios changes nothing.
    assert 1 / len(ratios) - 1e-12 <= health.importance_effective_share <= 1 + 1e-12
    shifted = importance_health(policy, sampler - shift, cap)
    assert shifted.importance_effective_share == pytest.approx(health.importance_effective_share)
    assert shifted.importance_ratio_mean == pytest.approx(math.exp(shift) * health.importance_ratio_mean)
