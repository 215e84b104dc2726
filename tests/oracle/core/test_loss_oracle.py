"""Losses against other ways to the same thing: another loss, an exact expectation, a slow reference."""

import math
import random
from typing import Any

import pytest
import torch
from torch import Tensor

from vzero_core.config import PolicyGradientLoss, PPOClip, SampledLoss
from vzero_core.divergence import (
    SampledKind,
    forward_kl,
    forward_kl_topk,
    reverse_kl,
    sampled_divergence,
    topk_with_rest,
)
from vzero_core.losses import gated_distillation_loss, token_losses

F64 = torch.float64
ONE_TOKEN = torch.ones(1, 1, dtype=torch.bool)
# Bounds far away: what is left is the surrogate itself.
OPEN = PPOClip(clip_low=0.999, clip_high=1e6, log_ratio_clamp=50.0, dual_clip=1e6)


def logits(seed: int, *shape: int) -> Tensor:
    return torch.randn(*shape, dtype=F64, generator=torch.Generator().manual_seed(seed))


@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
@pytest.mark.parametrize("ppo", [None, OPEN], ids=["plain", "ppo"])
def test_k1_policy_gradient_equals_back_propagated_k2(ppo: PPOClip | None, aggregation: Any) -> None:
    """At ratio 1 and without clamps; through the logits, so that the chain rule is checked too."""
    student, teacher = logits(0, 3, 4, 6).requires_grad_(), logits(1, 3, 4, 6)
    sampled = torch.randint(6, (3, 4, 1), generator=torch.Generator().manual_seed(2))
    policy = student.log_softmax(-1).gather(-1, sampled).squeeze(-1)
    batch: dict[str, Any] = {
        "policy_logprobs": policy,
        "teacher_logprobs": teacher.log_softmax(-1).gather(-1, sampled).squeeze(-1),
        "response_mask": torch.arange(4) < torch.tensor([[4], [2], [1]]),
        "weights": torch.tensor([0.3, 1.7, 1.0]),
        "num_responses": 3,
        "num_tokens": 7,
        "old_logprobs": policy.detach(),
    }
    k1 = gated_distillation_loss(PolicyGradientLoss(ppo=ppo, aggregation=aggregation), **batch)
    k2 = gated_distillation_loss(SampledLoss(estimator="k2", aggregation=aggregation), **batch)
    (k1_gradient,) = torch.autograd.grad(k1, student, retain_graph=True)
    (k2_gradient,) = torch.autograd.grad(k2, student)
    assert k2_gradient.abs().max() > 1e-3
    assert torch.allclose(k1_gradient, k2_gradient, rtol=1e-12, atol=1e-15)


def expectation(student: Tensor, per_token: Tensor) -> Tensor:
    """Average over the policy's samples, all of them; the sampling itself is not differentiated through."""
    return (student.detach().softmax(-1) * per_token).sum(-1)


@pytest.mark.parametrize("seed", range(5))
def test_the_gradient_of_k3_is_in_expectation_that_of_the_forward_kl(seed: int) -> None:
    student, teacher = (logits(seed, 5) / 2).requires_grad_(), logits(seed + 100, 5) / 2
    estimate = sampled_divergence(student.log_softmax(-1), teacher.log_softmax(-1), "k3")
    assert estimate.max() < 10  # the clamp is not at work
    (gradient,) = torch.autograd.grad(expectation(student, estimate), student)
    (forward,) = torch.autograd.grad(forward_kl(student, teacher), student)
    (reverse,) = torch.autograd.grad(reverse_kl(student, teacher), student)
    assert torch.allclose(gradient, forward, rtol=1e-10)
    assert not torch.allclose(gradient, reverse, rtol=1e-2)


@pytest.mark.parametrize("seed", range(5))
def test_the_policy_gradient_is_in_expectation_that_of_the_reverse_kl(seed: int) -> None:
    student, teacher = logits(seed, 5).requires_grad_(), logits(seed + 100, 5)
    surrogate = token_losses(
        PolicyGradientLoss(),
        policy_logprobs=student.log_softmax(-1).unsqueeze(-1),  # five responses of one token: the whole vocabulary
        teacher_logprobs=teacher.log_softmax(-1).unsqueeze(-1),
        response_mask=ONE_TOKEN.expand(5, 1),
    ).squeeze(-1)
    (gradient,) = torch.autograd.grad(expectation(student, surrogate), student)
    (reverse,) = torch.autograd.grad(reverse_kl(student, teacher), student)
    assert torch.allclose(gradient, reverse, rtol=1e-10)


@pytest.mark.parametrize("kind", ["k1", "k3"])
def test_k1_and_k3_are_in_expectation_the_reverse_kl(kind: SampledKind) -> None:
    student, teacher = logits(0, 5), logits(1, 5)
    estimate = sampled_divergence(student.log_softmax(-1), teacher.log_softmax(-1), kind)
    assert expectation(student, estimate).item() == pytest.approx(reverse_kl(student, teacher).item(), rel=1e-12)


def test_back_propagated_k1_would_not_see_the_teacher() -> None:
    student = logits(0, 5).requires_grad_()
    gradients = [
        torch.autograd.grad(
            sampled_divergence(student.log_softmax(-1), logits(seed, 5).log_softmax(-1), "k1")[2], student
        )[0]
        for seed in (1, 2)
    ]
    assert torch.equal(*gradients)


def reference_ppo(weight: float, policy: float, teacher: float, old: float, current: float, clamp: float) -> float:
    """One token of the release's loss; `current` is the policy where the advantage is taken (it has no gradient)."""
    advantage = -weight * min(max(current - teacher, -clamp), clamp)
    ratio = math.exp(min(max(policy - old, -20.0), 20.0))
    plain = -advantage * ratio
    clipped = -advantage * min(max(ratio, 0.8), 1.2)
    loss = max(plain, clipped)
    return min(loss, -advantage * 3.0) if advantage < 0 else loss


def test_ppo_equals_the_reference_in_value_and_gradient() -> None:
    source = random.Random(0)
    config = PolicyGradientLoss(clamp=10.0, ppo=PPOClip(), aggregation="token_mean")
    step, seen = 1e-6, set()
    for _ in range(400):
        policy = source.uniform(-30, 0)
        teacher = policy + source.choice([0.5, 5, 15]) * source.uniform(-1, 1)
        old = policy + source.choice([0.1, 1, 3, 30]) * source.uniform(-1, 1)
        weight = source.uniform(0, 2)
        leaf = torch.tensor([[policy]], dtype=F64, requires_grad=True)
        loss = gated_distillation_loss(
            config,
            policy_logprobs=leaf,
            teacher_logprobs=torch.tensor([[teacher]], dtype=F64),
            old_logprobs=torch.tensor([[old]], dtype=F64),
            response_mask=ONE_TOKEN,
            weights=torch.tensor([weight], dtype=F64),
            num_responses=1,
            num_tokens=1,
        )
        loss.backward()

        def at(
            moved: float, policy: float = policy, teacher: float = teacher, old: float = old, weight: float = weight
        ) -> float:
            return reference_ppo(weight, moved, teacher, old, policy, 10.0)

        assert loss.item() == pytest.approx(at(policy), rel=1e-9)
        slopes = (at(policy + step) - at(policy)) / step, (at(policy) - at(policy - step)) / step
        if slopes[0] == pytest.approx(slopes[1], rel=1e-4, abs=1e-6):  # not on a kink
            assert leaf.grad is not None
            assert leaf.grad.item() == pytest.approx(sum(slopes) / 2, rel=1e-4, abs=1e-5 * abs(at(policy)) + 1e-6)
        ratio = math.exp(min(max(policy - old, -20), 20))
        seen.add((policy > teacher, (ratio > 0.8) + (ratio > 1.2) + (ratio > 3)))
    assert len(seen) == 8  # both signs of the advantage, in all four ranges of the ratio


def test_a_weight_outside_equals_a_weight_on_the_advantage() -> None:
    """For the token loss at weight 1, times w, against the reference that puts w into the advantage."""
    for policy, teacher, old in [(-1.0, -3.0, -2.0), (-1.0, 0.0, -2.0), (-2.0, 1.0, -1.0), (-1.0, -3.0, -4.0)]:
        losses = token_losses(
            PolicyGradientLoss(clamp=10.0, ppo=PPOClip()),
            policy_logprobs=torch.tensor([[policy]], dtype=F64),
            teacher_logprobs=torch.tensor([[teacher]], dtype=F64),
            old_logprobs=torch.tensor([[old]], dtype=F64),
            response_mask=ONE_TOKEN,
        )
        for weight in (0.0, 0.3, 2.0):
            inside = reference_ppo(weight, policy, teacher, old, policy, 10.0)
            assert weight * losses.item() == pytest.approx(inside, rel=1e-12)


@pytest.mark.parametrize("seed", range(10))
def test_topk_equals_summing_the_coarse_distributions(seed: int) -> None:
    student, teacher = logits(seed, 8).softmax(-1), logits(seed + 100, 8).softmax(-1)
    ids = teacher.topk(3).indices
    chosen = set(ids.tolist())
    coarse = [(float(student[i]), float(teacher[i])) for i in sorted(chosen)]
    others = [i for i in range(8) if i not in chosen]
    coarse.append((sum(float(student[i]) for i in others), sum(float(teacher[i]) for i in others)))
    expected = sum(t * math.log(t / s) for s, t in coarse)
    got = forward_kl_topk(*topk_with_rest(student.log(), ids), teacher[ids].log())
    assert got.item() == pytest.approx(expected, rel=1e-10)
