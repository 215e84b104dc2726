"""What holds for every form of the loss: padding, micro-batches and empty batches change nothing."""

from dataclasses import dataclass, replace
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vzero_core.config import ForwardKLTopKLoss, GateConfig, Loss, PolicyGradientLoss, PPOClip, SampledLoss
from vzero_core.divergence import topk_with_rest
from vzero_core.gating import gate_weights
from vzero_core.losses import TopK, gated_distillation_loss, token_losses

V, K = 7, 3
FORMS: list[Loss] = [
    PolicyGradientLoss(),
    PolicyGradientLoss(clamp=0.5),
    PolicyGradientLoss(clamp=10.0, ppo=PPOClip()),
    SampledLoss(estimator="k2"),
    SampledLoss(estimator="k3"),
    SampledLoss(estimator="abs"),
    ForwardKLTopKLoss(k=K),
]
CONFIGS = [
    form.model_copy(update={"aggregation": aggregation})
    for form in FORMS
    for aggregation in ("sequence_mean", "token_mean")
]
every_config = pytest.mark.parametrize("config", CONFIGS, ids=repr)
JUNK = st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e30, 0.0])


@dataclass(frozen=True)
class Batch:
    """Every input of the loss; the three of the policy are leaves."""

    policy: Tensor
    topk_policy: Tensor
    topk_rest: Tensor
    teacher: Tensor
    old: Tensor
    topk_teacher: Tensor
    weights: Tensor
    mask: Tensor

    def map(self, change: Any) -> "Batch":
        return Batch(**{name: change(value) for name, value in vars(self).items()})


def make_batch(seed: int, num_responses: int, num_tokens: int, token_weights: bool) -> Batch:
    """Random logits and ragged responses, in float64; a response may be empty."""
    generator = torch.Generator().manual_seed(seed)

    def randn(*shape: int) -> Tensor:
        return torch.randn(*shape, dtype=torch.float64, generator=generator)

    shape = (num_responses, num_tokens)
    policy_logits, teacher_logits = randn(*shape, V), randn(*shape, V)
    sampled = torch.randint(V, (*shape, 1), generator=generator)
    policy = policy_logits.log_softmax(-1).gather(-1, sampled).squeeze(-1)
    teacher_topk = teacher_logits.log_softmax(-1).topk(K, dim=-1)
    topk_policy, topk_rest = topk_with_rest(policy_logits, teacher_topk.indices)
    lengths = torch.randint(num_tokens + 1, (num_responses, 1), generator=generator)
    return Batch(
        policy=policy,
        topk_policy=topk_policy,
        topk_rest=topk_rest,
        teacher=teacher_logits.log_softmax(-1).gather(-1, sampled).squeeze(-1),
        old=policy + 0.3 * randn(*shape),
        topk_teacher=teacher_topk.values,
        weights=2 * torch.rand(shape if token_weights else shape[:1], dtype=torch.float64, generator=generator),
        mask=torch.arange(num_tokens) < lengths,
    )


def run(config: Loss, batch: Batch, num_responses: int, num_tokens: int) -> tuple[Tensor, list[Tensor]]:
    """Give the loss and its gradients in the three inputs of the policy (zeros where one is not used)."""
    leaves = [value.clone().requires_grad_() for value in (batch.policy, batch.topk_policy, batch.topk_rest)]
    loss = gated_distillation_loss(
        config,
        policy_logprobs=leaves[0],
        teacher_logprobs=batch.teacher,
        response_mask=batch.mask,
        weights=batch.weights,
        num_responses=num_responses,
        num_tokens=num_tokens,
        old_logprobs=batch.old,
        topk=TopK(policy_logprobs=leaves[1], policy_rest=leaves[2], teacher_logprobs=batch.topk_teacher),
    )
    loss.backward()
    return loss.detach(), [torch.zeros_like(leaf) if leaf.grad is None else leaf.grad for leaf in leaves]


def run_whole(config: Loss, batch: Batch) -> tuple[Tensor, list[Tensor]]:
    return run(config, batch, int(batch.mask.any(-1).sum()), int(batch.mask.sum()))


def fill_padding(batch: Batch, junk: float) -> Batch:
    def fill(value: Tensor) -> Tensor:
        if value.dtype == torch.bool or value.dim() < 2:
            return value
        mask = batch.mask.unsqueeze(-1) if value.dim() == 3 else batch.mask
        return torch.where(mask, value, torch.full_like(value, junk))

    return batch.map(fill)


batches = st.builds(
    make_batch, st.integers(0, 10**6), st.integers(1, 5), st.integers(1, 5), token_weights=st.booleans()
)


def close(left: Tensor, right: Tensor) -> bool:
    return torch.allclose(left, right, rtol=1e-10, atol=1e-13)


@every_config
@given(batch=batches, junk=JUNK)
def test_padding_content_is_irrelevant(config: Loss, batch: Batch, junk: float) -> None:
    loss, gradients = run_whole(config, batch)
    junk_loss, junk_gradients = run_whole(config, fill_padding(batch, junk))
    assert torch.equal(loss, junk_loss)
    for gradient, junk_gradient in zip(gradients, junk_gradients, strict=True):
        assert torch.equal(gradient, junk_gradient)
        assert not gradient[~batch.mask].any()


@every_config
@given(batch=batches, junk=JUNK, columns=st.integers(1, 3), rows=st.integers(0, 2))
def test_a_masked_batch_equals_the_smaller_one(
    config: Loss, batch: Batch, junk: float, columns: int, rows: int
) -> None:
    def widen(value: Tensor) -> Tensor:
        shape = [value.shape[0] + rows, *value.shape[1:]]
        if value.dim() > 1:
            shape[1] += columns
        fill: Any = False if value.dtype == torch.bool else (0.0 if value.dim() == 1 else junk)
        wide = torch.full(shape, fill, dtype=value.dtype)
        wide[tuple(slice(size) for size in value.shape)] = value
        return wide

    loss, gradients = run_whole(config, batch)
    wide_loss, wide_gradients = run_whole(config, batch.map(widen))
    assert close(loss, wide_loss)
    for gradient, wide in zip(gradients, wide_gradients, strict=True):
        assert close(gradient, wide[: gradient.shape[0], : gradient.shape[1]])


@every_config
@given(batch=batches, data=st.data())
def test_any_split_into_micro_batches_gives_the_same_gradient(config: Loss, batch: Batch, data: st.DataObject) -> None:
    size = len(batch.mask)
    part_of = torch.tensor(data.draw(st.lists(st.integers(0, 2), min_size=size, max_size=size)))
    num_responses, num_tokens = int(batch.mask.any(-1).sum()), int(batch.mask.sum())
    loss, gradients = run(config, batch, num_responses, num_tokens)
    total = torch.zeros_like(loss)
    totals = [torch.zeros_like(gradient) for gradient in gradients]
    for part in range(3):
        rows = part_of == part
        part_loss, part_gradients = run(
            config, batch.map(lambda value, rows=rows: value[rows]), num_responses, num_tokens
        )
        total += part_loss
        for whole, gradient in zip(totals, part_gradients, strict=True):
            whole[rows] += gradient
    assert close(loss, total)
    for gradient, whole in zip(gradients, totals, strict=True):
        assert close(gradient, whole)


@every_config
@pytest.mark.parametrize("junk", [0.0, float("nan")])
@pytest.mark.parametrize(("num_responses", "num_tokens"), [(0, 4), (3, 0), (0, 0), (3, 4)])
@pytest.mark.parametrize("denominator", [0, 5])
def test_an_empty_batch_gives_zero_and_finite_gradients(
    config: Loss, junk: float, num_responses: int, num_tokens: int, denominator: int
) -> None:
    batch = make_batch(0, 3, 4, token_weights=False)
    batch = batch.map(lambda value: value[:num_responses, :num_tokens] if value.dim() > 1 else value[:num_responses])
    batch = fill_padding(replace(batch, mask=torch.zeros_like(batch.mask)), junk)
    loss, gradients = run(config, batch, denominator, denominator)
    assert loss.item() == 0.0
    for gradient in gradients:
        assert not gradient.any()


@every_config
@given(batch=batches)
def test_response_weights_equal_the_same_token_weights(config: Loss, batch: Batch) -> None:
    per_response = batch.weights if batch.weights.dim() == 1 else batch.weights[:, 0]
    per_token = per_response.unsqueeze(-1).expand(batch.mask.shape)
    loss, gradients = run_whole(config, replace(batch, weights=per_response))
    token_loss, token_gradients = run_whole(config, replace(batch, weights=per_token))
    assert torch.equal(loss, token_loss)
    assert all(torch.equal(a, b) for a, b in zip(gradients, token_gradients, strict=True))


@every_config
@given(batch=batches, seed=st.integers(0, 10**6))
def test_a_gate_of_no_strength_is_plain_distillation(config: Loss, batch: Batch, seed: int) -> None:
    generator = torch.Generator().manual_seed(seed)
    size = len(batch.mask)
    scores = torch.randn(size, generator=generator)
    groups = torch.randint(2, (size,), generator=generator)
    gated = run_whole(config, replace(batch, weights=gate_weights(scores, groups, GateConfig(alpha=0.0))))
    plain = run_whole(config, replace(batch, weights=torch.ones(size)))
    assert torch.equal(gated[0], plain[0])
    assert all(torch.equal(a, b) for a, b in zip(gated[1], plain[1], strict=True))


@every_config
@given(batch=batches)
def test_a_response_of_weight_zero_has_no_gradient(config: Loss, batch: Batch) -> None:
    weights = torch.ones(len(batch.mask))
    weights[0] = 0.0
    _, gradients = run_whole(config, replace(batch, weights=weights))
    for gradient in gradients:
        assert not gradient[0].any()


@every_config
@given(batch=batches, junk=JUNK)
def test_the_loss_is_its_token_losses_aggregated(config: Loss, batch: Batch, junk: float) -> None:
    batch = fill_padding(batch, junk)
    losses = token_losses(
        config,
        policy_logprobs=batch.policy,
        teacher_logprobs=batch.teacher,
        response_mask=batch.mask,
        old_logprobs=batch.old,
        topk=TopK(batch.topk_policy, batch.topk_rest, batch.topk_teacher),
    )
    assert not losses[~batch.mask].any()
    weights = batch.weights if batch.weights.dim() == 2 else batch.weights.unsqueeze(-1).expand(batch.mask.shape)
    total = 0.0
    for row, weight, mask in zip(losses, weights, batch.mask, strict=True):
        row_sum = sum(float(value * w) for value, w, used in zip(row, weight, mask, strict=True) if used)
        per_token = config.aggregation == "token_mean"
        total += row_sum if per_token else row_sum / max(1, int(mask.sum()))
    count = int(batch.mask.sum()) if per_token else int(batch.mask.any(-1).sum())
    assert run_whole(config, batch)[0].item() == pytest.approx(total / max(1, count), rel=1e-9, abs=1e-12)
