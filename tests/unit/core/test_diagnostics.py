import math
from dataclasses import fields

import pytest
import torch

from vzero_core.config import GateConfig
from vzero_core.diagnostics import GateHealth, auc, auc_within_groups, gate_health
from vzero_core.errors import InputError

IDS = torch.tensor([0, 0, 1, 1, 2, 2, 3])


def test_golden_health() -> None:
    # spreads 1, 2, .5 of the groups of two; the group of one has none
    scores = torch.tensor([0.0, 2.0, 0.0, 4.0, 0.0, 1.0, 9.0])
    weights = torch.tensor([0.0, 2.0, 0.5, 1.5, 1.0, 1.0, 1.0])
    lengths = torch.tensor([4, 2, 4, 2, 3, 3, 3])
    health = gate_health(scores, weights, IDS, lengths, GateConfig(min_spread=1.0))
    assert health.mean_spread == pytest.approx(3.5 / 3)
    assert health.median_spread == pytest.approx(1.0)
    assert health.share_below_min_spread == pytest.approx(1 / 3)
    assert health.share_at_w_min == pytest.approx(1 / 7)
    assert health.share_at_w_max == pytest.approx(1 / 7)
    # sum 7, sum of squares 0 + 4 + .25 + 2.25 + 3 = 9.5
    assert health.effective_sample_share == pytest.approx(49 / (7 * 9.5))
    # w - 1 = -1, 1, -.5, .5; length - 3 = 1, -1, 1, -1: -3 / sqrt(2.5 * 4)
    assert health.weight_length_correlation == pytest.approx(-3 / math.sqrt(10))
    assert all(isinstance(getattr(health, field.name), float) for field in fields(GateHealth))


def test_median_of_an_even_number_of_groups_is_between() -> None:
    scores = torch.tensor([0.0, 2.0, 0.0, 4.0])
    health = gate_health(scores, torch.ones(4), IDS[:4], torch.ones(4), GateConfig())
    assert health.median_spread == pytest.approx(1.5)


def test_undefined_figures_are_none_and_equal_weights_are_fully_effective() -> None:
    equal = torch.full((3,), 0.1, dtype=torch.float64)
    assert equal.var() > 0  # by the rounding of their mean
    health = gate_health(torch.zeros(3), equal, torch.tensor([0, 1, 2]), torch.tensor([3, 4, 5]), GateConfig())
    assert health.mean_spread is health.median_spread is health.share_below_min_spread is None
    assert health.weight_length_correlation is None
    assert health.effective_sample_share == pytest.approx(1.0)
    lone = gate_health(torch.zeros(1), torch.zeros(1), torch.tensor([0]), torch.tensor([3]), GateConfig())
    assert lone.effective_sample_share is None
    assert lone.weight_length_correlation is None
    assert lone.share_at_w_min == 1.0


def test_wrong_health_input_is_refused() -> None:
    empty = torch.zeros(0)
    with pytest.raises(InputError, match="at least one response"):
        gate_health(empty, empty, torch.zeros(0, dtype=torch.int64), empty, GateConfig())
    with pytest.raises(InputError, match="weights must be of shape"):
        gate_health(torch.zeros(2), torch.zeros(3), IDS[:2], torch.zeros(2), GateConfig())
    with pytest.raises(InputError, match="weights must be finite"):
        gate_health(torch.zeros(2), torch.tensor([math.nan, 1.0]), IDS[:2], torch.zeros(2), GateConfig())


def test_golden_auc() -> None:
    # right .8, .4; wrong .4, .1: pairs 1, 1, 1/2, 1
    scores = torch.tensor([0.8, 0.4, 0.4, 0.1])
    labels = torch.tensor([True, True, False, False])
    assert auc(scores, labels) == pytest.approx(3.5 / 4)
    assert auc(-scores, labels) == pytest.approx(0.5 / 4)
    assert auc(torch.zeros(4), labels) == 0.5


def test_auc_within_groups_ignores_differences_between_groups() -> None:
    # within groups perfect, across groups the second group's wrong one outscores the first's right one
    scores = torch.tensor([1.0, 0.0, 11.0, 10.0, 5.0])
    labels = torch.tensor([True, False, True, False, True])
    groups = torch.tensor([4, 4, -1, -1, 8])
    assert auc_within_groups(scores, labels, groups) == 1.0
    assert auc(scores, labels) == pytest.approx(4 / 6)


@pytest.mark.parametrize("labels", [torch.tensor([True, True]), torch.tensor([False, False])])
def test_auc_without_a_pair_is_none(labels: torch.Tensor) -> None:
    assert auc(torch.tensor([0.0, 1.0]), labels) is None
    assert auc_within_groups(torch.tensor([0.0, 1.0]), labels, torch.tensor([0, 0])) is None
    assert auc_within_groups(torch.tensor([0.0, 1.0]), torch.tensor([True, False]), torch.tensor([0, 1])) is None
    assert auc(torch.zeros(0), torch.zeros(0, dtype=torch.bool)) is None


def test_wrong_auc_input_is_refused() -> None:
    with pytest.raises(InputError, match="labels must be bool"):
        auc(torch.zeros(2), torch.zeros(2))
    with pytest.raises(InputError, match="scores must be finite"):
        auc(torch.tensor([0.0, math.nan]), torch.tensor([True, False]))
    with pytest.raises(InputError, match="labels must be of shape"):
        auc(torch.zeros(2), torch.tensor([True]))
