"""Gate and evidence score against a slow reference of the standard library."""

import math
import random
import statistics

import pytest
import torch

from vzero_core.config import GateConfig
from vzero_core.diagnostics import auc, auc_within_groups
from vzero_core.evidence import evidence_scores
from vzero_core.gating import gate_weights, prefix_trust


def reference_weights(scores: list[float], groups: list[int], config: GateConfig) -> list[float]:
    weights = []
    for score, group in zip(scores, groups, strict=True):
        members = [other for other, other_group in zip(scores, groups, strict=True) if other_group == group]
        spread = statistics.pstdev(members)
        if len(members) == 1 or spread < config.min_spread:
            weights.append(1.0)
            continue
        standardised = (score - statistics.fmean(members)) / (spread + config.eps)
        weights.append(min(max(1 + config.alpha * standardised, config.w_min), config.w_max))
    return weights


@pytest.mark.parametrize("seed", range(30))
def test_gate_equals_the_reference(seed: int) -> None:
    source = random.Random(seed)
    size = source.randint(1, 20)
    scores = [source.gauss(0, source.choice([1e-4, 0.1, 3])) for _ in range(size)]
    groups = [source.randint(-2, 2) * 10**12 for _ in range(size)]
    config = GateConfig(
        alpha=source.choice([0.5, 1.0, 2.0]),
        w_min=source.choice([0.0, 0.5]),
        w_max=source.choice([1.5, 2.0]),
        min_spread=source.choice([0.0, 1e-3, 0.1]),
    )
    got = gate_weights(torch.tensor(scores, dtype=torch.float64), torch.tensor(groups), config)
    assert got.tolist() == pytest.approx(reference_weights(scores, groups, config), rel=1e-8, abs=1e-8)


@pytest.mark.parametrize("seed", range(10))
def test_evidence_and_trust_equal_the_reference(seed: int) -> None:
    source = random.Random(seed)
    pos, neg, mask = ([[source.uniform(-5, 0) for _ in range(6)] for _ in range(4)] for _ in range(3))
    keep = [[value > -3 for value in row] for row in mask]
    gamma, floor = source.uniform(0, 2), source.uniform(0, 0.3)
    scores, trusts = [], []
    for pos_row, neg_row, keep_row in zip(pos, neg, keep, strict=True):
        gaps = [p - n for p, n, kept in zip(pos_row, neg_row, keep_row, strict=True) if kept]
        scores.append(statistics.fmean(gap if gap > 0 else gamma * gap for gap in gaps) if gaps else 0.0)
        product, trust = 1.0, []
        for p, n, kept in zip(pos_row, neg_row, keep_row, strict=True):
            trust.append(max(product, floor) if kept else 0.0)
            product *= math.exp(min(0.0, p - n)) if kept else 1.0
        trusts.append(trust)
    pos_BT, neg_BT = torch.tensor(pos, dtype=torch.float64), torch.tensor(neg, dtype=torch.float64)
    assert evidence_scores(pos_BT, neg_BT, torch.tensor(keep), gamma).tolist() == pytest.approx(scores, rel=1e-12)
    got = prefix_trust(pos_BT, neg_BT, torch.tensor(keep), floor)
    assert got.tolist() == [pytest.approx(trust, rel=1e-12) for trust in trusts]


@pytest.mark.parametrize("seed", range(20))
def test_auc_equals_counting_pairs(seed: int) -> None:
    source = random.Random(seed)
    size = source.randint(1, 25)
    scores = [float(source.randint(0, 5)) for _ in range(size)]  # with ties
    labels = [source.random() < 0.5 for _ in range(size)]
    groups = [source.randint(0, 3) for _ in range(size)]

    def count(within: bool) -> float | None:
        wins = [
            1.0 if scores[i] > scores[j] else 0.5 if scores[i] == scores[j] else 0.0
            for i in range(size)
            for j in range(size)
            if labels[i] and not labels[j] and (not within or groups[i] == groups[j])
        ]
        return statistics.fmean(wins) if wins else None

    tensors = torch.tensor(scores), torch.tensor(labels)
    expected = count(within=False), count(within=True)
    got = auc(*tensors), auc_within_groups(*tensors, torch.tensor(groups))
    for value, reference in zip(got, expected, strict=True):
        assert value is None if reference is None else value == pytest.approx(reference, rel=1e-12)
