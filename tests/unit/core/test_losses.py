import math
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.autograd import gradcheck

from vzero_core.config import ForwardKLTopKLoss, Loss, PolicyGradientLoss, PPOClip, SampledLoss, preset
from vzero_core.errors import InputError
from vzero_core.losses import TopK, gated_distillation_loss, token_losses

F64 = torch.float64
NAN = float("nan")

# Two responses, of 2 and 1 tokens; s - t = 1, -2 and 0.5
POLICY = [[-1.0, -3.0], [-0.5, NAN]]
TEACHER = [[-2.0, -1.0], [-1.0, NAN]]
MASK = torch.tensor([[True, True], [True, False]])
WEIGHTS = torch.tensor([2.0, 0.5])


def golden_batch() -> dict[str, Any]:
    return {
        "policy_logprobs": torch.tensor(POLICY, dtype=F64, requires_grad=True),
        "teacher_logprobs": torch.tensor(TEACHER, dtype=F64),
        "response_mask": MASK,
        "weights": WEIGHTS,
        "num_responses": 2,
        "num_tokens": 3,
    }


def loss_and_gradient(config: Loss, **changes: Any) -> tuple[float, list[list[float]]]:
    batch = {**golden_batch(), **changes}
    loss = gated_distillation_loss(config, **batch)
    assert loss.shape == ()
    loss.backward()
    return loss.item(), batch["policy_logprobs"].grad.tolist()


def test_golden_paper() -> None:
    loss, gradient = loss_and_gradient(preset("paper").loss)
    # 1/2 [2 * 1/2 (1 * -1 + -2 * -3) + 0.5 * 0.5 * -0.5]
    assert loss == pytest.approx(0.5 * (5.0 - 0.125))
    # the gradient is w (s - t) / (T_b * 2)
    assert gradient == [[2 * 1 / 4, 2 * -2 / 4], [0.5 * 0.5 / 2, 0.0]]


def test_golden_release_at_ratio_one() -> None:
    old = torch.tensor(POLICY, dtype=F64)
    loss, gradient = loss_and_gradient(preset("release").loss, old_logprobs=old)
    # ratio 1: the token loss is k1 itself, its gradient too; 1/3 [2 (1 - 2) + 0.5 * 0.5]
    assert loss == pytest.approx((2 * (1 - 2) + 0.25) / 3)
    assert gradient == [[pytest.approx(2 / 3), pytest.approx(-4 / 3)], [pytest.approx(0.25 / 3), 0.0]]


def test_golden_k1_clamp() -> None:
    _, gradient = loss_and_gradient(PolicyGradientLoss(clamp=1.5, aggregation="token_mean"), weights=torch.ones(2))
    assert gradient == [[pytest.approx(1 / 3), pytest.approx(-1.5 / 3)], [pytest.approx(0.5 / 3), 0.0]]


@pytest.mark.parametrize(
    ("estimator", "tokens"),
    [
        ("k2", [0.5, 2.0, 0.125]),
        ("k3", [math.exp(-1), math.exp(2) - 3, math.exp(-0.5) - 0.5]),
        ("abs", [1.0, 2.0, 0.5]),
    ],
)
def test_golden_sampled(estimator: Any, tokens: list[float]) -> None:
    a, b, c = tokens
    loss, _ = loss_and_gradient(SampledLoss(estimator=estimator))
    assert loss == pytest.approx((2 * (a + b) / 2 + 0.5 * c) / 2)
    loss, _ = loss_and_gradient(SampledLoss(estimator=estimator, aggregation="token_mean"))
    assert loss == pytest.approx((2 * (a + b) + 0.5 * c) / 3)


def test_golden_topk() -> None:
    # the token of the unit test of forward_kl_topk, once; the other positions are padding
    token = 0.5 * math.log(2) + 0.25 * math.log(0.5)
    topk = TopK(
        policy_logprobs=torch.tensor([[[0.25, 0.25], [NAN, NAN]]], dtype=F64).log(),
        policy_rest=torch.tensor([[0.5, NAN]], dtype=F64).log(),
        teacher_logprobs=torch.tensor([[[0.5, 0.25], [NAN, NAN]]], dtype=F64).log(),
    )
    padded = torch.full((1, 2), NAN, dtype=F64)
    loss = gated_distillation_loss(
        ForwardKLTopKLoss(k=2),
        policy_logprobs=padded,
        teacher_logprobs=padded,
        response_mask=torch.tensor([[True, False]]),
        weights=torch.tensor([3.0]),
        num_responses=4,
        num_tokens=9,
        topk=topk,
    )
    assert loss.item() == pytest.approx(3 * token / 4)


def test_token_weights() -> None:
    weights = torch.tensor([[1.0, 3.0], [0.5, NAN]])
    loss, _ = loss_and_gradient(SampledLoss(estimator="abs"), weights=weights)
    assert loss == pytest.approx(((1 * 1 + 3 * 2) / 2 + 0.5 * 0.5) / 2)


def test_denominators_are_the_whole_batchs() -> None:
    loss, _ = loss_and_gradient(SampledLoss(estimator="abs"))
    scaled, _ = loss_and_gradient(SampledLoss(estimator="abs"), num_responses=20)
    assert scaled == pytest.approx(loss / 10)


def test_clipped_ppo_token_has_no_gradient_and_an_open_one_has() -> None:
    # ratio e^1, outside 1 + 0.2. Advantage -(s - t): -2 (bad token: still pushed down), then +2 (good: clipped)
    config = PolicyGradientLoss(clamp=10.0, ppo=PPOClip(), aggregation="token_mean")
    policy = torch.tensor([[-1.0, -1.0]], dtype=F64, requires_grad=True)
    batch: dict[str, Any] = {
        "policy_logprobs": policy,
        "teacher_logprobs": torch.tensor([[-3.0, 1.0]], dtype=F64),
        "old_logprobs": torch.tensor([[-2.0, -2.0]], dtype=F64),
        "response_mask": torch.ones(1, 2, dtype=torch.bool),
    }
    losses = token_losses(config, **batch)
    assert losses.tolist() == [pytest.approx([2 * math.e, -2 * 1.2])]
    losses.sum().backward()
    assert policy.grad is not None
    assert policy.grad.tolist() == [pytest.approx([2 * math.e, 0.0])]


def test_the_two_clips_are_two_settings() -> None:
    # ratios 2 and 1/2 of a good and a bad token, advantages +1 and -1: clipped at 1.5 above and .9 below
    losses = token_losses(
        PolicyGradientLoss(ppo=PPOClip(clip_low=0.1, clip_high=0.5)),
        policy_logprobs=torch.tensor([[-1.0, -1.0]], dtype=F64),
        teacher_logprobs=torch.tensor([[0.0, -2.0]], dtype=F64),
        old_logprobs=torch.tensor([[-1.0 - math.log(2), -1.0 + math.log(2)]], dtype=F64),
        response_mask=torch.ones(1, 2, dtype=torch.bool),
    )
    assert losses.tolist() == [pytest.approx([-1.5, 0.9])]


def test_dual_clip_bounds_the_loss_of_a_bad_token() -> None:
    config = PolicyGradientLoss(ppo=PPOClip(dual_clip=3.0))
    policy = torch.tensor([[-1.0]], dtype=F64, requires_grad=True)
    losses = token_losses(
        config,
        policy_logprobs=policy,
        teacher_logprobs=torch.tensor([[-3.0]], dtype=F64),
        old_logprobs=torch.tensor([[-3.0]], dtype=F64),
        response_mask=torch.ones(1, 1, dtype=torch.bool),
    )
    # ratio e^2 = 7.4 is above 3: the loss is 2 * 3, and flat
    assert losses.tolist() == [[pytest.approx(6.0)]]
    losses.sum().backward()
    assert policy.grad is not None
    assert policy.grad.item() == 0.0


def test_log_ratio_is_clamped_before_exp() -> None:
    config = PolicyGradientLoss(ppo=PPOClip(log_ratio_clamp=1.0, clip_high=100.0, dual_clip=100.0))
    losses = token_losses(
        config,
        policy_logprobs=torch.tensor([[-1.0]], dtype=F64),
        teacher_logprobs=torch.tensor([[0.0]], dtype=F64),
        old_logprobs=torch.tensor([[-900.0]], dtype=F64),
        response_mask=torch.ones(1, 1, dtype=torch.bool),
    )
    assert losses.tolist() == [[pytest.approx(-math.e)]]


def test_only_the_policy_gets_a_gradient() -> None:
    batch = golden_batch()
    others = {
        "teacher_logprobs": batch["teacher_logprobs"].clone().requires_grad_(),
        "weights": torch.tensor([2.0, 0.5], requires_grad=True),
        "old_logprobs": torch.tensor(POLICY, dtype=F64, requires_grad=True),
    }
    for config in (preset("release").loss, preset("paper").loss, SampledLoss(estimator="k2")):
        gated_distillation_loss(config, **{**batch, **others}).backward()
    assert batch["policy_logprobs"].grad is not None
    assert all(other.grad is None for other in others.values())


@pytest.mark.parametrize("estimator", ["k2", "k3", "abs"])
@pytest.mark.parametrize("aggregation", ["sequence_mean", "token_mean"])
def test_gradcheck(estimator: Any, aggregation: Any) -> None:
    batch = golden_batch()
    config = SampledLoss(estimator=estimator, aggregation=aggregation)

    def loss(policy: Tensor) -> Tensor:
        return gated_distillation_loss(config, **{**batch, "policy_logprobs": policy})

    assert gradcheck(loss, (torch.tensor([[-1.0, -3.0], [-0.5, -9.0]], dtype=F64, requires_grad=True),))


def test_float32_stays_float32_whatever_the_weights() -> None:
    batch = golden_batch()
    batch["policy_logprobs"] = torch.tensor(POLICY, requires_grad=True)
    batch["teacher_logprobs"] = torch.tensor(TEACHER)
    batch["weights"] = WEIGHTS.double()
    assert gated_distillation_loss(preset("paper").loss, **batch).dtype == torch.float32


def test_bfloat16_is_computed_in_float32() -> None:
    batch = golden_batch()
    batch["policy_logprobs"] = torch.tensor(POLICY, dtype=torch.bfloat16, requires_grad=True)
    batch["teacher_logprobs"] = torch.tensor(TEACHER, dtype=torch.bfloat16)
    assert gated_distillation_loss(preset("paper").loss, **batch).dtype == torch.float32


@pytest.mark.parametrize(
    ("config", "changes", "message"),
    [
        (preset("release").loss, {}, "old_logprobs must be given"),
        (ForwardKLTopKLoss(), {}, "topk must be given"),
        (preset("paper").loss, {"weights": torch.tensor([-1.0, 1.0])}, "weights must be >= 0"),
        (preset("paper").loss, {"weights": torch.tensor([NAN, 1.0])}, "weights must be finite"),
        (preset("paper").loss, {"weights": torch.ones(3)}, "weights must be of shape"),
        (preset("paper").loss, {"weights": torch.ones(2, 3)}, "weights must be of shape"),
        (preset("paper").loss, {"weights": torch.tensor(1.0)}, "weights must be of shape"),
        (preset("paper").loss, {"num_responses": 1}, "num_responses must be the whole batch's count"),
        (preset("paper").loss, {"num_tokens": 2}, "num_tokens must be the whole batch's count"),
        (preset("paper").loss, {"num_tokens": 0}, "num_tokens must be"),
        (preset("paper").loss, {"response_mask": MASK.float()}, "response_mask must be .* bool"),
        (preset("paper").loss, {"response_mask": ~MASK & False | True}, "policy_logprobs must be finite"),
        (preset("paper").loss, {"teacher_logprobs": torch.full((2, 2), -math.inf)}, "teacher_logprobs must be finite"),
        (preset("release").loss, {"old_logprobs": torch.full((2, 2), NAN)}, "old_logprobs must be finite"),
        (preset("release").loss, {"old_logprobs": torch.zeros(2, 3)}, "old_logprobs must be of shape"),
    ],
)
def test_wrong_input_is_refused(config: Loss, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(InputError, match=message):
        gated_distillation_loss(config, **{**golden_batch(), **changes})


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"policy_logprobs": torch.zeros(2, 2, 3)}, "topk.policy_logprobs must be of shape"),  # k is 2
        ({"teacher_logprobs": torch.full((2, 2, 2), NAN)}, "topk.teacher_logprobs must be finite"),
        ({"policy_logprobs": torch.full((2, 2, 2), -math.inf)}, "topk.policy_logprobs must be finite"),
        ({"policy_rest": torch.zeros(2, 1)}, "topk.policy_rest must be of shape"),
        ({"policy_rest": torch.full((2, 2), math.inf)}, "topk.policy_rest must be finite"),
        ({"policy_rest": torch.full((2, 2), NAN)}, "topk.policy_rest must be finite"),
    ],
)
def test_wrong_topk_is_refused(changes: dict[str, Tensor], message: str) -> None:
    right = {
        "policy_logprobs": torch.full((2, 2, 2), -2.0),
        "policy_rest": torch.full((2, 2), -1.0),
        "teacher_logprobs": torch.full((2, 2, 2), -2.0),
    }
    gated_distillation_loss(ForwardKLTopKLoss(k=2), **golden_batch(), topk=TopK(**right))
    with pytest.raises(InputError, match=message):
        gated_distillation_loss(ForwardKLTopKLoss(k=2), **golden_batch(), topk=TopK(**{**right, **changes}))


def test_no_rest_is_let_pass() -> None:
    whole = torch.tensor([[[0.5, 0.5]]]).log()
    topk = TopK(policy_logprobs=whole, policy_rest=torch.tensor([[-math.inf]]), teacher_logprobs=whole)
    losses = token_losses(
        ForwardKLTopKLoss(k=2),
        policy_logprobs=torch.zeros(1, 1),
        teacher_logprobs=torch.zeros(1, 1),
        response_mask=torch.ones(1, 1, dtype=torch.bool),
        topk=topk,
    )
    assert losses.item() == pytest.approx(0.0, abs=1e-6)
