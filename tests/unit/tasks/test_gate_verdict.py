"""A gate's health in words: each fault alone is named, and nothing else with it."""

from typing import Any

import pytest

from tasks.adapters.gate_verdict import gate_verdict
from vzero_core.config import GateConfig, NoGateConfig, PrefixTrustConfig

HEALTHY: dict[str, Any] = {
    "mean_spread": 0.2,
    "share_below_min_spread": 0.1,
    "share_at_w_min": 0.15,
    "share_at_w_max": 0.15,
    "effective_sample_share": 0.7,
    "weight_length_correlation": 0.05,
}


@pytest.mark.parametrize(
    ("figures", "word"),
    [
        ({}, "healthy"),
        ({"weight_length_correlation": None}, "healthy"),
        ({"mean_spread": None, "share_below_min_spread": None}, "one response a prompt"),
        ({"effective_sample_share": None}, "all weights are 0"),
        ({"share_below_min_spread": 0.5}, "healthy"),
        ({"share_below_min_spread": 0.51}, "no spread"),
        # Groups that are left ungated weigh 1 each: that follows, and is not said again.
        ({"share_below_min_spread": 1.0, "effective_sample_share": 1.0}, "no spread"),
        ({"effective_sample_share": 0.995}, "uniform weights"),
        ({"effective_sample_share": 0.32}, "few responses count"),
        ({"effective_sample_share": 0.34}, "healthy"),
        ({"share_at_w_min": 0.41, "share_at_w_max": 0.41}, "a mere switch"),
        ({"share_at_w_min": 0.39, "share_at_w_max": 0.39}, "healthy"),
        ({"weight_length_correlation": 0.31}, "prefers longer responses"),
        ({"weight_length_correlation": -0.31}, "prefers shorter responses"),
        ({"weight_length_correlation": 0.29}, "healthy"),
        (
            {"effective_sample_share": 0.2, "weight_length_correlation": 0.9},
            "few responses count, prefers longer responses",
        ),
    ],
)
def test_each_fault_of_a_contrastive_gate_is_named(figures: dict[str, Any], word: str) -> None:
    verdict = gate_verdict(HEALTHY | figures, GateConfig())
    assert verdict.word == word
    assert len(verdict.reasons) == word.count(", ") + 1


def test_the_figure_is_in_the_reason() -> None:
    (reason,) = gate_verdict(HEALTHY | {"share_below_min_spread": 0.75}, GateConfig(min_spread=1e-3)).reasons
    assert reason.startswith("75% of the prompts")
    assert "(0.001 nats per token)" in reason


@pytest.mark.parametrize(
    ("floor", "weight", "word"),
    [(0.0, 0.09, "little trust"), (0.0, 0.11, "healthy"), (0.5, 0.54, "little trust"), (0.5, 0.56, "healthy")],
)
def test_prefix_trust_is_judged_above_its_floor(floor: float, weight: float, word: str) -> None:
    assert gate_verdict({"mean_token_weight": weight}, PrefixTrustConfig(floor=floor)).word == word


def test_no_gate_is_off() -> None:
    assert gate_verdict({}, NoGateConfig()).word == "off"
    # Strength 0 is plain distillation, chosen, and no fault.
    assert gate_verdict(HEALTHY | {"effective_sample_share": 1.0}, GateConfig(alpha=0.0)).word == "off"
