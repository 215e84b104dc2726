"""What holds for every pair of distributions."""

import math

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vzero_core.divergence import forward_kl, forward_kl_topk, jsd, reverse_kl, sampled_divergence, topk_with_rest

FULL = [reverse_kl, forward_kl, lambda s, t: jsd(s, t, 0.3)]


@st.composite
def logit_pairs(draw: st.DrawFn, dtype: torch.dtype = torch.float64) -> tuple[Tensor, Tensor]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    size = draw(st.integers(1, 12))
    scale = draw(st.sampled_from([0.01, 1.0, 10.0, 50.0]))
    policy = scale * torch.randn(4, size, dtype=torch.float64, generator=generator)
    nearness = draw(st.sampled_from([0.0, 1e-6, 1e-2, 1.0]))
    teacher = policy + nearness * scale * torch.randn(4, size, dtype=torch.float64, generator=generator)
    return policy.to(dtype), teacher.to(dtype)


def topk_inputs(policy: Tensor, teacher: Tensor, k: int) -> tuple[Tensor, Tensor, Tensor]:
    chosen = teacher.log_softmax(-1).topk(min(k, teacher.shape[-1]), dim=-1)
    return *topk_with_rest(policy, chosen.indices), chosen.values


@given(logit_pairs())
def test_full_divergences_are_not_negative_and_zero_when_equal(pair: tuple[Tensor, Tensor]) -> None:
    policy, teacher = pair
    for divergence in FULL:
        assert (divergence(policy, teacher) >= -1e-12).all()
        assert divergence(policy, policy).abs().max() < 1e-12
    assert (jsd(policy, teacher, 0.5) <= math.log(2) + 1e-12).all()
    assert torch.allclose(jsd(policy, teacher, 0.3), jsd(teacher, policy, 0.7), atol=1e-12)
    assert torch.allclose(reverse_kl(policy, teacher), forward_kl(teacher, policy), atol=1e-12)


@given(logit_pairs(), st.floats(-100, 100), st.floats(-100, 100))
def test_a_shift_of_the_logits_changes_nothing(pair: tuple[Tensor, Tensor], left: float, right: float) -> None:
    policy, teacher = pair
    for divergence in FULL:
        assert torch.allclose(divergence(policy, teacher), divergence(policy + left, teacher + right), atol=1e-9)
    for before, after in zip(
        topk_inputs(policy, teacher, 3)[:2],
        topk_with_rest(policy + left, teacher.topk(min(3, teacher.shape[-1]), dim=-1).indices),
        strict=True,
    ):
        assert torch.allclose(before, after, atol=1e-9)


@given(logit_pairs(dtype=torch.float32), st.integers(1, 12))
def test_topk_never_falls_below_its_bound_in_float32(pair: tuple[Tensor, Tensor], k: int) -> None:
    assert (forward_kl_topk(*topk_inputs(*pair, k)) >= -1e-6).all()


@given(logit_pairs(), st.integers(1, 12))
def test_topk_is_a_lower_bound_of_the_full_divergence(pair: tuple[Tensor, Tensor], k: int) -> None:
    policy, teacher = pair
    assert (forward_kl_topk(*topk_inputs(policy, teacher, k)) <= forward_kl(policy, teacher) + 1e-9).all()


@given(logit_pairs())
def test_topk_of_the_whole_vocabulary_is_the_full_divergence(pair: tuple[Tensor, Tensor]) -> None:
    policy, teacher = pair
    assert torch.allclose(
        forward_kl_topk(*topk_inputs(policy, teacher, teacher.shape[-1])), forward_kl(policy, teacher), atol=1e-9
    )


@given(logit_pairs(), st.integers(1, 12))
def test_topk_and_rest_are_one_distribution(pair: tuple[Tensor, Tensor], k: int) -> None:
    chosen, rest, _ = topk_inputs(*pair, k)
    assert torch.allclose(chosen.exp().sum(-1) + rest.exp(), torch.ones(4, dtype=torch.float64), atol=1e-12)


@given(logit_pairs(dtype=torch.float32), st.integers(1, 12))
def test_topk_gradient_is_finite_and_sums_to_zero(pair: tuple[Tensor, Tensor], k: int) -> None:
    policy = pair[0].requires_grad_()
    forward_kl_topk(*topk_inputs(policy, pair[1], k)).sum().backward()
    assert policy.grad is not None
    assert policy.grad.isfinite().all()
    assert policy.grad.sum(-1).abs().max() < 1e-5  # a shift of the logits changes nothing


@given(st.lists(st.tuples(st.floats(-2000, 0), st.floats(-2000, 0)), min_size=1, max_size=8))
def test_sampled_estimators_are_finite_and_zero_when_equal(pairs: list[tuple[float, float]]) -> None:
    values = torch.tensor(pairs)
    policy = values[:, 0].clone().requires_grad_()
    for kind in ("k1", "k2", "k3", "abs"):
        estimate = sampled_divergence(policy, values[:, 1], kind)
        (gradient,) = torch.autograd.grad(estimate.sum(), policy)
        assert estimate.isfinite().all()
        assert gradient.isfinite().all()
        assert kind == "k1" or (estimate >= 0).all()
        assert not sampled_divergence(policy, policy, kind).any()
