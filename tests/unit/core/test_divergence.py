import math

import pytest
import torch
from torch.autograd import gradcheck

from vzero_core.divergence import (
    SampledKind,
    forward_kl,
    forward_kl_topk,
    jsd,
    reverse_kl,
    sampled_divergence,
    topk_with_rest,
)
from vzero_core.errors import InputError

F64 = torch.float64


def tensor(*values: float) -> torch.Tensor:
    return torch.tensor(values, dtype=F64)


@pytest.mark.parametrize(
    ("kind", "expected"),
    [
        # s = -1, t = -2 and s = -2, t = -1.5: s - t = 1, -1/2
        ("k1", [1.0, -0.5]),
        ("k2", [0.5, 0.125]),
        ("k3", [math.exp(-1) + 1 - 1, math.exp(0.5) - 0.5 - 1]),
        ("abs", [1.0, 0.5]),
    ],
)
def test_golden_sampled(kind: SampledKind, expected: list[float]) -> None:
    got = sampled_divergence(tensor(-1.0, -2.0), tensor(-2.0, -1.5), kind)
    assert got.tolist() == pytest.approx(expected, rel=1e-12)


def test_k3_is_clamped() -> None:
    got = sampled_divergence(tensor(-30.0, -1.0, -3.0), tensor(-1.0, -30.0, 0.0), "k3")
    # t - s = 29: far above the bound of 10. t - s = -29 counts as -20: exp(-20) + 20 - 1 = 19, cut to 10.
    # t - s = 3: exp(3) - 4 = 16, cut to 10
    assert got.tolist() == [10.0, 10.0, 10.0]


def test_k3_keeps_its_digits_where_the_models_agree() -> None:
    # about (t - s)^2 / 2 = 5e-7; exp(t - s) in float32 carries a rounding of up to 6e-8, an eighth of that
    got = sampled_divergence(torch.tensor([-1e-3]), torch.tensor([0.0]), "k3")
    assert got.item() == pytest.approx(math.expm1(1e-3) - 1e-3, rel=1e-3)


@pytest.mark.parametrize("kind", ["k1", "k2", "k3", "abs"])
def test_sampled_gradients(kind: SampledKind) -> None:
    policy = tensor(-1.0, -2.0, -0.3).requires_grad_()
    teacher = tensor(-2.0, -1.5, -0.4).requires_grad_()
    assert gradcheck(lambda s, t: sampled_divergence(s, t, kind), (policy, teacher))


def test_narrow_types_are_widened() -> None:
    policy = torch.tensor([-1.0], dtype=torch.bfloat16)
    assert sampled_divergence(policy, policy, "k2").dtype == torch.float32
    logits = torch.zeros(1, 4, dtype=torch.bfloat16)
    assert reverse_kl(logits, logits).dtype == torch.float32
    chosen, rest = topk_with_rest(logits, torch.tensor([[0, 1]]))
    assert chosen.dtype == rest.dtype == torch.float32
    assert forward_kl_topk(chosen, rest, chosen).dtype == torch.float32


def test_golden_full_vocabulary() -> None:
    # student (1/2, 1/2), teacher (1/4, 3/4)
    policy, teacher = tensor(0.5, 0.5).log(), tensor(0.25, 0.75).log()
    assert reverse_kl(policy, teacher).item() == pytest.approx(0.5 * math.log(2) + 0.5 * math.log(2 / 3))
    assert forward_kl(policy, teacher).item() == pytest.approx(0.25 * math.log(0.5) + 0.75 * math.log(1.5))
    # m = (3/8, 5/8)
    expected = 0.5 * (0.25 * math.log(2 / 3) + 0.75 * math.log(1.2)) + 0.5 * (
        0.5 * math.log(4 / 3) + 0.5 * math.log(0.8)
    )
    assert jsd(policy, teacher, 0.5).item() == pytest.approx(expected)


def test_jsd_tends_to_the_two_kls() -> None:
    policy, teacher = tensor(0.2, 0.3, 0.5).log(), tensor(0.6, 0.3, 0.1).log()
    assert jsd(policy, teacher, 1e-6).item() / 1e-6 == pytest.approx(forward_kl(policy, teacher).item(), rel=1e-4)
    assert jsd(policy, teacher, 1 - 1e-6).item() / 1e-6 == pytest.approx(reverse_kl(policy, teacher).item(), rel=1e-4)
    for beta in (0.0, 1.0, -1.0, math.nan):
        with pytest.raises(InputError, match="beta"):
            jsd(policy, teacher, beta)


def test_full_vocabulary_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    policy = torch.randn(2, 5, dtype=F64, generator=generator).requires_grad_()
    teacher = torch.randn(2, 5, dtype=F64, generator=generator).requires_grad_()
    assert gradcheck(reverse_kl, (policy, teacher))
    assert gradcheck(forward_kl, (policy, teacher))
    assert gradcheck(lambda s, t: jsd(s, t, 0.3), (policy, teacher))


def test_golden_topk_with_rest() -> None:
    logits = tensor(0.1, 0.2, 0.3, 0.4).log() + 5.0
    chosen, rest = topk_with_rest(logits, torch.tensor([3, 0]))
    assert chosen.exp().tolist() == pytest.approx([0.4, 0.1])
    assert rest.exp().item() == pytest.approx(0.5)


def test_rest_keeps_its_digits_where_it_is_tiny() -> None:
    # one token holds all but 1e-17 of the mass: 1 - sum would be 0, or negative
    logits = torch.tensor([40.0, 0.0, 0.0])
    _, rest = topk_with_rest(logits, torch.tensor([0]))
    assert rest.item() == pytest.approx(math.log(2) - 40.0, rel=1e-6)


def test_logprobs_do_not_carry_the_rounding_of_large_logits() -> None:
    logits = torch.tensor([100.0, 99.0, 98.0, 97.0])
    chosen, rest = topk_with_rest(logits, torch.tensor([0, 1]))
    assert chosen.exp().sum().item() + rest.exp().item() == pytest.approx(1.0, abs=3e-7)


def test_topk_leaves_the_callers_logits_alone() -> None:
    logits = torch.randn(2, 5)
    before = logits.clone()
    topk_with_rest(logits, torch.tensor([[0], [1]]))
    assert torch.equal(logits, before)


def test_topk_gradients() -> None:
    generator = torch.Generator().manual_seed(0)
    logits = torch.randn(2, 6, dtype=F64, generator=generator).requires_grad_()
    teacher = torch.randn(2, 6, dtype=F64, generator=generator).log_softmax(-1).topk(3, dim=-1)
    assert gradcheck(lambda x: topk_with_rest(x, teacher.indices), (logits,))
    assert gradcheck(lambda x: forward_kl_topk(*topk_with_rest(x, teacher.indices), teacher.values), (logits,))


def test_whole_vocabulary_as_topk_has_an_empty_rest_and_a_finite_gradient() -> None:
    logits = torch.randn(3, 4, generator=torch.Generator().manual_seed(0)).requires_grad_()
    ids = torch.arange(4).expand(3, 4)
    chosen, rest = topk_with_rest(logits, ids)
    assert rest.tolist() == [-math.inf] * 3
    assert torch.allclose(chosen, logits.log_softmax(-1))
    teacher = torch.randn(3, 4, generator=torch.Generator().manual_seed(1)).log_softmax(-1)
    forward_kl_topk(chosen, rest, teacher).sum().backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == [
        pytest.approx(row, abs=1e-6) for row in (logits.detach().softmax(-1) - teacher.exp()).tolist()
    ]


def test_a_rest_of_impossible_tokens_is_empty_too() -> None:
    logits = torch.tensor([0.0, 0.0, -math.inf, -math.inf]).requires_grad_()
    chosen, rest = topk_with_rest(logits, torch.tensor([0, 1]))
    assert rest.item() == -math.inf
    forward_kl_topk(chosen, rest, tensor(0.25, 0.75).log()).backward()
    assert logits.grad is not None
    assert logits.grad.tolist() == pytest.approx([0.25, -0.25, 0.0, 0.0])


def test_golden_forward_kl_topk() -> None:
    # teacher 1/2, 1/4, rest 1/4; student 1/4, 1/4, rest 1/2
    got = forward_kl_topk(tensor(0.25, 0.25).log(), tensor(0.5).log()[0], tensor(0.5, 0.25).log())
    assert got.item() == pytest.approx(0.5 * math.log(2) + 0.25 * math.log(0.5))


def test_forward_kl_topk_is_blind_inside_the_rest() -> None:
    teacher = tensor(0.6, 0.3, 0.1).log()
    student = tensor(0.6, 0.1, 0.3).log()
    ids = torch.tensor([0])
    got = forward_kl_topk(*topk_with_rest(student, ids), teacher[ids])
    assert got.item() == pytest.approx(0.0, abs=1e-12)
    assert forward_kl(student, teacher).item() > 0.1


def test_teacher_mass_above_one_by_rounding_is_no_nan() -> None:
    teacher = torch.tensor([0.7, 0.3000001]).log()
    got = forward_kl_topk(torch.tensor([0.7, 0.2]).log(), torch.tensor(0.1).log(), teacher)
    assert got.item() == pytest.approx(0.3 * math.log(1.5), abs=1e-5)


def test_teacher_is_detached_in_topk() -> None:
    teacher = tensor(0.5, 0.25).log().requires_grad_()
    policy = tensor(0.25, 0.25).log().requires_grad_()
    forward_kl_topk(policy, tensor(0.5).log()[0], teacher).backward()
    assert teacher.grad is None
    assert policy.grad is not None


def test_wrong_shapes_are_refused() -> None:
    with pytest.raises(InputError):
        sampled_divergence(torch.zeros(2, 3), torch.zeros(3), "k1")
    with pytest.raises(InputError):
        reverse_kl(torch.zeros(2, 3), torch.zeros(1, 3))
    with pytest.raises(InputError):
        topk_with_rest(torch.zeros(2, 3), torch.zeros(1, 2, dtype=torch.int64))
    with pytest.raises(InputError):
        forward_kl_topk(torch.zeros(2, 3), torch.zeros(3), torch.zeros(2, 3))
    with pytest.raises(InputError):
        forward_kl_topk(torch.zeros(2, 3), torch.zeros(2), torch.zeros(2, 2))
