"""What holds for every evidence score, gate and prefix trust."""

import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

from vzero_core.config import GateConfig
from vzero_core.evidence import evidence_scores
from vzero_core.gating import gate_weights, prefix_trust

JUNK = st.sampled_from([float("nan"), float("inf"), -float("inf"), 1e30])
SCORE = st.floats(-20, 20)
CONFIG = st.builds(
    GateConfig,
    alpha=st.floats(0, 5),
    w_min=st.floats(0, 1),
    w_max=st.floats(1, 5),
    eps=st.sampled_from([1e-6, 1e-3, 1.0]),
    min_spread=st.sampled_from([0.0, 1e-3, 0.7312]),  # no drawn group has this very spread,
)


@st.composite
def groups_of_scores(draw: st.DrawFn) -> tuple[Tensor, Tensor]:
    pairs = draw(st.lists(st.tuples(SCORE, st.integers(-3, 3)), min_size=1, max_size=12))
    scores, groups = zip(*pairs, strict=True)
    return torch.tensor(scores, dtype=torch.float64), torch.tensor(groups)


@st.composite
def logprob_pairs(draw: st.DrawFn) -> tuple[Tensor, Tensor, Tensor]:
    generator = torch.Generator().manual_seed(draw(st.integers(0, 10**6)))
    shape = (draw(st.integers(1, 4)), draw(st.integers(1, 6)))
    left = -3 * torch.rand(shape, generator=generator)
    right = -3 * torch.rand(shape, generator=generator)
    return left, right, torch.rand(shape, generator=generator) < 0.6  # holes too


@given(logprob_pairs(), st.floats(0, 3), JUNK)
def test_scores_ignore_padding(inputs: tuple[Tensor, Tensor, Tensor], gamma: float, junk: float) -> None:
    pos, neg, mask = inputs
    scores = evidence_scores(pos, neg, mask, gamma)
    assert torch.equal(scores, evidence_scores(pos.where(mask, junk), neg.where(mask, junk), mask, gamma))


@given(logprob_pairs(), st.floats(0, 3))
def test_a_score_is_that_of_the_response_alone(inputs: tuple[Tensor, Tensor, Tensor], gamma: float) -> None:
    pos, neg, mask = inputs
    scores = evidence_scores(pos, neg, mask, gamma)
    for row, score in enumerate(scores):
        used = mask[row]
        alone = evidence_scores(pos[row, used][None], neg[row, used][None], used[used][None], gamma)
        assert torch.allclose(alone, score[None], rtol=1e-12, atol=1e-15)


@given(logprob_pairs())
def test_swapping_the_views_turns_the_sign(inputs: tuple[Tensor, Tensor, Tensor]) -> None:
    pos, neg, mask = inputs
    assert torch.equal(evidence_scores(pos, neg, mask), -evidence_scores(neg, pos, mask))


@given(groups_of_scores(), CONFIG)
def test_weights_stay_within_bounds(inputs: tuple[Tensor, Tensor], config: GateConfig) -> None:
    weights = gate_weights(*inputs, config)
    assert ((weights >= config.w_min) & (weights <= config.w_max)).all()


@given(groups_of_scores(), CONFIG, st.randoms(use_true_random=False))
def test_order_of_responses_and_names_of_groups_do_not_matter(
    inputs: tuple[Tensor, Tensor], config: GateConfig, random: object
) -> None:
    scores, groups = inputs
    order = list(range(len(scores)))
    random.shuffle(order)  # type: ignore[attr-defined]
    weights = gate_weights(scores, groups, config)
    moved = gate_weights(scores[order], 1000 - 7 * groups[order], config)
    # eps of 1e-6 turns a rounding of 1e-15 in the mean into 1e-9 in the weight
    assert torch.allclose(weights[order], moved, atol=1e-7)


@given(groups_of_scores(), CONFIG)
def test_a_group_is_weighted_as_if_alone(inputs: tuple[Tensor, Tensor], config: GateConfig) -> None:
    scores, groups = inputs
    weights = gate_weights(scores, groups, config)
    for group in groups.unique():
        members = groups == group
        assert torch.allclose(weights[members], gate_weights(scores[members], groups[members], config), atol=1e-7)
        if members.sum() == 1:
            assert weights[members].item() == 1.0


@given(groups_of_scores(), CONFIG)
def test_a_higher_score_never_gets_a_lower_weight(inputs: tuple[Tensor, Tensor], config: GateConfig) -> None:
    scores, groups = inputs
    weights = gate_weights(scores, groups, config)
    for group in groups.unique():
        members = groups == group
        ordered = weights[members][scores[members].argsort()]
        assert (ordered.diff() >= 0).all()


@given(groups_of_scores())
def test_unclipped_weights_average_one(inputs: tuple[Tensor, Tensor]) -> None:
    scores, groups = inputs
    # at most 12 responses: |a| <= sqrt(11) < 4, so nothing is clipped
    weights = gate_weights(scores, groups, GateConfig(alpha=0.25, w_max=2.0))
    for group in groups.unique():
        assert abs(weights[groups == group].mean().item() - 1) < 1e-7


@given(groups_of_scores())
def test_no_strength_gives_exactly_one(inputs: tuple[Tensor, Tensor]) -> None:
    assert (gate_weights(*inputs, GateConfig(alpha=0.0)) == 1).all()


@given(SCORE, st.lists(st.floats(-1e-7, 1e-7), min_size=2, max_size=8), st.lists(st.floats(-1e-7, 1e-7), min_size=8))
def test_rounding_noise_in_a_group_without_spread_changes_nothing(
    score: float, spread: list[float], noise: list[float]
) -> None:
    scores = score + torch.tensor(spread, dtype=torch.float64)
    noisy = scores + torch.tensor(noise[: len(spread)], dtype=torch.float64)
    groups = torch.zeros(len(spread), dtype=torch.int64)
    config = GateConfig(min_spread=1e-3)
    assert torch.equal(gate_weights(scores, groups, config), gate_weights(noisy, groups, config))
    assert (gate_weights(noisy, groups, config) == 1).all()


@given(st.lists(SCORE, min_size=2, max_size=8), st.lists(st.floats(-1e-7, 1e-7), min_size=8))
def test_rounding_noise_in_a_group_with_spread_changes_little(values: list[float], noise: list[float]) -> None:
    scores = torch.tensor(values, dtype=torch.float64)
    noisy = scores + torch.tensor(noise[: len(values)], dtype=torch.float64)
    groups = torch.zeros(len(values), dtype=torch.int64)
    config = GateConfig(min_spread=1e-3)
    if scores.std(correction=0) < 2e-3:  # at the threshold itself a gate has to jump
        return
    difference = gate_weights(scores, groups, config) - gate_weights(noisy, groups, config)
    # d w = alpha (d p + d mean + |a| d std) / std <= (1 + 1 + 3) 1e-7 / 2e-3
    assert difference.abs().max() < 2.5e-4


@given(logprob_pairs(), st.floats(0, 1), JUNK)
def test_prefix_trust_ignores_padding_and_never_rises(
    inputs: tuple[Tensor, Tensor, Tensor], floor: float, junk: float
) -> None:
    sampled, gap, mask = inputs
    largest = sampled - gap
    trust = prefix_trust(sampled, largest, mask, floor)
    assert torch.equal(trust, prefix_trust(sampled.where(mask, junk), largest.where(mask, junk), mask, floor))
    assert not trust[~mask].any()
    for row, used in zip(trust, mask, strict=True):
        kept = row[used]
        assert (kept.diff() <= 0).all()
        assert (kept[:1] == 1).all()
        assert (kept >= floor).all()


@given(logprob_pairs(), st.floats(0, 1))
def test_prefix_trust_of_a_masked_batch_is_that_of_the_response_alone(
    inputs: tuple[Tensor, Tensor, Tensor], floor: float
) -> None:
    sampled, gap, mask = inputs
    largest = sampled - gap
    trust = prefix_trust(sampled, largest, mask, floor)
    for row, used in enumerate(mask):
        alone = prefix_trust(sampled[row, used][None], largest[row, used][None], used[used][None], floor)
        assert torch.allclose(trust[row, used], alone[0], rtol=1e-12)
