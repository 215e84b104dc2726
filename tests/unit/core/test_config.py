"""A combination that makes no sense cannot be written; presets hold the published settings."""

import json
from typing import Any

import pytest
from pydantic import BaseModel, TypeAdapter, ValidationError

from vzero_core import config as config_module
from vzero_core.config import (
    ForwardKLTopKLoss,
    Gate,
    GateConfig,
    Loss,
    NegativeCropConfig,
    NoGateConfig,
    Objective,
    PolicyGradientLoss,
    PositiveCropConfig,
    PPOClip,
    PrefixTrustConfig,
    SampledLoss,
    ViewConfig,
    preset,
    required_views,
)
from vzero_core.errors import ConfigError, InputError, NoDisjointCropError, VZeroError

MODELS = [
    model
    for model in vars(config_module).values()
    if isinstance(model, type) and issubclass(model, BaseModel) and model.model_fields
]


@pytest.mark.parametrize("estimator", ["k1", "k2", "k3", "abs"])
def test_policy_gradient_takes_no_estimator(estimator: str) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Loss).validate_python({"kind": "policy_gradient", "estimator": estimator})


@pytest.mark.parametrize(
    "wrong",
    [
        {"kind": "sampled", "estimator": "k1"},  # back-propagated k1 does not see the teacher
        {"kind": "sampled"},
        {"kind": "sampled", "estimator": "k2", "ppo": {}},
        {"kind": "forward_kl_topk", "k": 0},
        {"kind": "forward_kl_topk", "estimator": "k2"},
        {"kind": "policy_gradient", "k": 10},
        {"kind": "policy_gradient", "clamp": 0},
        {"kind": "policy_gradient", "aggregation": "sum"},
        {"kind": "policy_gradient", "ppo": {"dual_clip": 1.0}},
        {"kind": "policy_gradient", "ppo": {"clip_low": 1.0}},
        {"kind": "reverse_kl"},
        {},
    ],
)
def test_wrong_loss_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Loss).validate_python(wrong)


@pytest.mark.parametrize(
    "wrong",
    [
        {"alpha": -0.1},
        {"alpha": float("nan")},
        {"alpha": float("inf")},
        {"w_min": -0.1},
        {"w_min": 1.1},
        {"w_max": 0.9},
        {"w_max": float("inf")},
        {"eps": 0},
        {"min_spread": -1e-3},
        {"gamma": -1},
        {"beta": 1},
    ],
)
def test_wrong_gate_is_refused(wrong: dict[str, float]) -> None:
    with pytest.raises(ValidationError) as caught:
        GateConfig(**wrong)  # type: ignore[arg-type]
    assert next(iter(wrong)) in str(caught.value)


@pytest.mark.parametrize(
    "wrong",
    [{"kind": "prefix_trust", "floor": 1.5}, {"kind": "prefix_trust", "alpha": 1}, {"kind": "off", "alpha": 1}],
)
def test_wrong_other_gate_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(ValidationError):
        TypeAdapter(Gate).validate_python(wrong)


def test_wrong_views_are_refused() -> None:
    with pytest.raises(ValidationError):
        NegativeCropConfig(downsample=0)
    with pytest.raises(ValidationError):
        PositiveCropConfig(margin=-0.1)
    with pytest.raises(ValidationError):
        PositiveCropConfig(min_pixels=0)
    with pytest.raises(ValidationError):
        ViewConfig(resample="nearest")  # type: ignore[arg-type]


def test_paper_preset() -> None:
    paper = preset("paper")
    assert paper.gate == GateConfig(alpha=1.0, w_min=0.0, w_max=2.0, eps=1e-6, min_spread=0.0, gamma=1.0)
    assert paper.loss == PolicyGradientLoss(clamp=None, ppo=None, aggregation="sequence_mean")
    assert Objective() == paper


def test_release_preset() -> None:
    release = preset("release")
    assert release.gate == GateConfig(alpha=0.5, w_min=0.0, w_max=2.0, eps=1e-6, min_spread=0.0, gamma=1.0)
    clip = PPOClip(clip_low=0.2, clip_high=0.2, log_ratio_clamp=20.0, dual_clip=3.0)
    assert release.loss == PolicyGradientLoss(clamp=10.0, ppo=clip, aggregation="token_mean")


def test_unknown_preset_says_what_there_is() -> None:
    with pytest.raises(ConfigError, match="paper, release"):
        preset("papr")  # type: ignore[arg-type]


@pytest.mark.parametrize(
    ("gate", "target", "views"),
    [
        (GateConfig(), "positive", ("positive", "negative")),
        (GateConfig(), "none", ("positive", "negative", "none")),
        (PrefixTrustConfig(), "positive", ("positive",)),
        (PrefixTrustConfig(), "none", ("none",)),
        (NoGateConfig(), "positive", ("positive",)),
        (NoGateConfig(), "none", ("none",)),
    ],
)
def test_required_views(gate: Gate, target: config_module.Target, views: tuple[str, ...]) -> None:
    assert required_views(gate, target) == views


@pytest.mark.parametrize("model", MODELS, ids=lambda model: model.__name__)
def test_every_field_is_described_and_frozen(model: type[BaseModel]) -> None:
    for name, field in model.model_fields.items():
        assert field.description, f"{model.__name__}.{name}"
    assert model.model_config["frozen"]
    assert model.model_config["extra"] == "forbid"


@pytest.mark.parametrize(
    "objective",
    [
        preset("paper"),
        preset("release"),
        Objective(gate=PrefixTrustConfig(floor=0.1), loss=ForwardKLTopKLoss(k=5, aggregation="token_mean")),
        Objective(gate=NoGateConfig(), loss=SampledLoss(estimator="k3")),
    ],
)
def test_an_objective_survives_json(objective: Objective) -> None:
    assert Objective.model_validate(json.loads(objective.model_dump_json())) == objective


def test_errors_are_value_errors_too() -> None:
    for error in (ConfigError, InputError, NoDisjointCropError):
        assert issubclass(error, VZeroError)
        assert issubclass(error, ValueError)
    assert issubclass(NoDisjointCropError, InputError)
