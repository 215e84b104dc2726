import math
from collections.abc import Callable
from typing import Any

import pytest
import torch

from vzero_core.config import preset
from vzero_core.errors import InputError
from vzero_core.importance import importance_health, importance_weights
from vzero_core.losses import gated_distillation_loss

F64 = torch.float64
NAN = float("nan")

# Two responses, of 2 and 1 tokens; the ratios of probabilities are 2, 1/2 and 3
POLICY = torch.tensor([[0.5, 0.2], [0.9, NAN]], dtype=F64).log()
SAMPLER = torch.tensor([[0.25, 0.4], [0.3, NAN]], dtype=F64).log()
MASK = torch.tensor([[True, True], [True, False]])


@pytest.mark.parametrize(("cap", "expected"), [(10.0, [2, 0.5, 3, 0]), (2.5, [2, 0.5, 2.5, 0]), (1.0, [1, 0.5, 1, 0])])
def test_golden_weights(cap: float, expected: list[float]) -> None:
    assert importance_weights(POLICY, SAMPLER, MASK, cap).flatten().tolist() == pytest.approx(expected)


def test_weights_are_detached() -> None:
    policy, sampler = POLICY.clone().requires_grad_(), SAMPLER.clone().requires_grad_()
    assert not importance_weights(policy, sampler, MASK, 2.0).requires_grad


@pytest.mark.parametrize(
    ("given", "expected"), [(torch.bfloat16, torch.float32), (torch.float32, torch.float32), (F64, F64)]
)
def test_weights_are_at_least_float32(given: torch.dtype, expected: torch.dtype) -> None:
    assert importance_weights(POLICY.to(given), SAMPLER.to(given), MASK, 2.0).dtype == expected


def test_narrow_types_are_widened_before_the_difference() -> None:
    """In bfloat16, 8 - 1/128 is 8."""
    policy = torch.tensor([[-8.0]])
    sampler = torch.tensor([[-1 / 128]], dtype=torch.bfloat16)
    weight = importance_weights(policy.bfloat16(), sampler, torch.tensor([[True]]), 2.0)
    assert weight.item() == pytest.approx(math.exp(-8 + 1 / 128))


def test_far_log_probs_neither_overflow_nor_vanish() -> None:
    policy, sampler = torch.tensor([[0.0, -1000.0]]), torch.tensor([[-1000.0, 0.0]])
    mask = torch.ones(1, 2, dtype=torch.bool)
    assert importance_weights(policy, sampler, mask, 1e30).tolist() == [
        [pytest.approx(math.exp(20)), pytest.approx(math.exp(-20))]
    ]
    health = importance_health(policy[0], sampler[0], None)
    assert health.importance_ratio_max == pytest.approx(math.exp(20))
    assert health.importance_effective_share == pytest.approx(0.5)


def test_with_ppo_the_two_ratios_multiply() -> None:
    """One token of k1 = 1: advantage -1, current / old = e^0.1, inside the clip, and old / sampler = 2, or 1.5 capped.

    The loss is the product; so is its gradient, the loss's exponent being the current log-prob.
    """
    current = torch.tensor([[-1.0]], dtype=F64, requires_grad=True)
    old, mask = torch.tensor([[-1.1]], dtype=F64), torch.tensor([[True]])
    sampler = old - math.log(2)
    for cap, factor in ((10.0, 2.0), (1.5, 1.5)):
        current.grad = None
        loss = gated_distillation_loss(
            preset("release").loss,
            policy_logprobs=current,
            teacher_logprobs=torch.tensor([[-2.0]], dtype=F64),
            response_mask=mask,
            weights=importance_weights(old, sampler, mask, cap),
            num_responses=1,
            num_tokens=1,
            old_logprobs=old,
        )
        loss.backward()
        assert current.grad is not None
        assert loss.item() == pytest.approx(factor * math.exp(0.1))
        assert current.grad.item() == pytest.approx(factor * math.exp(0.1))


def test_golden_health() -> None:
    # ratios 2, 1/2, 3: sum 5.5, sum of squares 4 + .25 + 9
    health = importance_health(POLICY[MASK], SAMPLER[MASK], 2.5)
    assert health.importance_ratio_mean == pytest.approx(5.5 / 3)
    assert health.importance_ratio_max == pytest.approx(3.0)
    assert health.importance_effective_share == pytest.approx(5.5**2 / (3 * 13.25))
    assert health.importance_capped_share == pytest.approx(1 / 3)


def test_a_ratio_at_the_cap_is_not_capped_and_without_a_cap_nothing_is() -> None:
    equal = POLICY[MASK]
    assert importance_health(equal, equal, 1.0).importance_capped_share == 0.0
    assert importance_health(equal, equal, None).importance_capped_share is None


def spoiled(position: tuple[int, int], value: float) -> torch.Tensor:
    changed = POLICY.clone()
    changed[position] = value
    return changed


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: importance_weights(spoiled((0, 1), NAN), SAMPLER, MASK, 2.0), r"policy_logprobs must be finite.*0, 1"),
        (lambda: importance_weights(POLICY, spoiled((1, 0), -math.inf), MASK, 2.0), "sampler_logprobs must be finite"),
        (lambda: importance_weights(POLICY, SAMPLER[:1], MASK, 2.0), "sampler_logprobs must be of shape"),
        (lambda: importance_weights(POLICY[:, :1], SAMPLER, MASK, 2.0), "policy_logprobs must be of shape"),
        (lambda: importance_weights(POLICY, SAMPLER, MASK.long(), 2.0), r"response_mask must be \[B, T\] bool"),
        (lambda: importance_health(POLICY[0], SAMPLER[0, :1], None), "sampler_logprobs must be of shape"),
        (lambda: importance_health(POLICY[1], SAMPLER[0], None), "policy_logprobs must be finite"),
        (lambda: importance_health(POLICY[0], SAMPLER[1], None), "sampler_logprobs must be finite"),
    ],
)
def test_wrong_input_is_refused(call: Callable[[], Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        call()
