"""Settings of gate, loss and views. A combination that makes no sense cannot be written down."""

from typing import Annotated, Literal, get_args

from pydantic import BaseModel, ConfigDict, Field

from vzero_core.errors import ConfigError

Aggregation = Literal["sequence_mean", "token_mean"]
SampledEstimator = Literal["k2", "k3", "abs"]
Preset = Literal["paper", "release"]
View = Literal["positive", "negative", "none"]
Target = Literal["positive", "none"]
Resample = Literal["bicubic", "lanczos", "bilinear"]


class _Config(BaseModel):
    model_config = ConfigDict(
        frozen=True,
        extra="forbid",
        allow_inf_nan=False,
        # In forms that are made from the schema a setting is called as in the configuration.
        field_title_generator=lambda name, _: name,
    )


# --- gate ---------------------------------------------------------------------------------------------------------


class GateConfig(_Config):
    """Contrastive evidence gate: one weight per response, from how much more the positive view supports it."""

    kind: Literal["contrastive"] = Field(default="contrastive", description="Contrastive evidence gate.")
    alpha: float = Field(
        default=1.0, ge=0, description="Strength: weight = 1 + alpha * standardised score; 0 is plain distillation."
    )
    w_min: float = Field(default=0.0, ge=0, le=1, description="Smallest weight of a response.")
    w_max: float = Field(default=2.0, ge=1, description="Largest weight of a response.")
    eps: float = Field(default=1e-6, gt=0, description="Added to the group's standard deviation, in nats.")
    min_spread: float = Field(
        default=0.0,
        ge=0,
        description="Groups whose scores have a standard deviation below this many nats get weight 1; 0 gates all.",
    )
    gamma: float = Field(
        default=1.0, ge=0, description="Factor on negative evidence gaps; 1 counts both signs alike, 0 ignores them."
    )


class PrefixTrustConfig(_Config):
    """Prefix trust: one weight per token, which decays where the response leaves what the teacher would say."""

    kind: Literal["prefix_trust"] = Field(default="prefix_trust", description="Prefix trust, a token weight.")
    floor: float = Field(default=0.0, ge=0, le=1, description="Smallest weight of a token.")


class NoGateConfig(_Config):
    """No gate: every response has weight 1 (plain on-policy distillation)."""

    kind: Literal["off"] = Field(default="off", description="No gate: every weight is 1.")


Gate = Annotated[GateConfig | PrefixTrustConfig | NoGateConfig, Field(discriminator="kind")]


def required_views(gate: Gate, target: Target) -> tuple[View, ...]:
    """Give the views the teacher has to replay: the target's, and those the gate compares.

    Args:
        gate: the gate; only the contrastive one compares views (positive with negative).
        target: the view distilled from: the positive crop, or `none`, the full image alone.

    Returns:
        Each view once, in the order positive, negative, none.
    """
    compared: set[View] = {"positive", "negative"} if isinstance(gate, GateConfig) else set()
    needed: set[View] = compared | {target}
    return tuple(view for view in get_args(View) if view in needed)


# --- loss ---------------------------------------------------------------------------------------------------------


class PPOClip(_Config):
    """Clipping of the probability ratio between the current and the old policy."""

    clip_low: float = Field(default=0.2, gt=0, lt=1, description="The ratio is clipped below at 1 - clip_low.")
    clip_high: float = Field(default=0.2, gt=0, description="The ratio is clipped above at 1 + clip_high.")
    log_ratio_clamp: float = Field(
        default=20.0, gt=0, description="The log-ratio is clamped to +- this many nats before exp."
    )
    dual_clip: float = Field(
        default=3.0, gt=1, description="Where the advantage is negative, the loss is at most this times its size."
    )


class _LossConfig(_Config):
    aggregation: Aggregation = Field(
        default="sequence_mean",
        description="sequence_mean: mean over tokens, then over responses; token_mean: mean over all tokens.",
    )


class PolicyGradientLoss(_LossConfig):
    """k1 (the sampled reverse KL) as a policy gradient; the one estimator that is right in this form."""

    kind: Literal["policy_gradient"] = Field(default="policy_gradient", description="k1 as a policy gradient.")
    clamp: float | None = Field(
        default=None, gt=0, description="k1 is clamped to +- this many nats; none in the paper, 10 in the release."
    )
    ppo: PPOClip | None = Field(default=None, description="PPO clipping; none in the paper.")


class SampledLoss(_LossConfig):
    """An estimator on the sampled token that is back-propagated directly."""

    kind: Literal["sampled"] = Field(default="sampled", description="A sampled divergence, back-propagated.")
    estimator: SampledEstimator = Field(
        description="k2: half the squared log-ratio; k3: in expectation a forward KL's gradient; abs: its size."
    )


class ForwardKLTopKLoss(_LossConfig):
    """Forward KL on the teacher's k likeliest tokens, all others as one bucket."""

    kind: Literal["forward_kl_topk"] = Field(
        default="forward_kl_topk", description="Forward KL on the teacher's likeliest tokens."
    )
    k: int = Field(default=10, ge=1, description="How many of the teacher's likeliest tokens are kept.")


Loss = Annotated[PolicyGradientLoss | SampledLoss | ForwardKLTopKLoss, Field(discriminator="kind")]


# --- both ---------------------------------------------------------------------------------------------------------


class Objective(_Config):
    """Gate and loss (with its aggregation) together; the default is the paper's."""

    gate: Gate = Field(default=GateConfig(), description="How responses or tokens are weighted.")
    loss: Loss = Field(default=PolicyGradientLoss(), description="What pulls the student to the teacher.")


_PRESETS: dict[Preset, Objective] = {
    "paper": Objective(
        gate=GateConfig(alpha=1.0, gamma=1.0, min_spread=0.0),
        loss=PolicyGradientLoss(clamp=None, ppo=None, aggregation="sequence_mean"),
    ),
    "release": Objective(
        gate=GateConfig(alpha=0.5, gamma=1.0, min_spread=0.0),
        loss=PolicyGradientLoss(clamp=10.0, ppo=PPOClip(), aggregation="token_mean"),
    ),
}


def preset(name: Preset) -> Objective:
    """Give a published combination of gate, loss and aggregation.

    Raises:
        ConfigError: the name is not a preset's.

    Source: `paper` is arXiv 2606.25319, eq. 20 and 24; `release` is the settings of its public code.
    """
    if name not in _PRESETS:
        raise ConfigError(f"preset must be one of {', '.join(_PRESETS)}, got {name!r}; choose one of them")
    return _PRESETS[name]


# --- views --------------------------------------------------------------------------------------------------------


class PositiveCropConfig(_Config):
    """How the crop of the question-relevant region is cut."""

    margin: float = Field(
        default=0.0, ge=0, description="Context around the region: this share of its width and height on every side."
    )
    min_side_px: int = Field(
        default=32, ge=1, description="A shorter side is grown around the centre to this many pixels, inside the image."
    )
    min_pixels: int = Field(
        default=65_536, ge=1, description="A crop of fewer pixels is enlarged to at least so many, aspect ratio kept."
    )


class NegativeCropConfig(_Config):
    """How the irrelevant crop of equal size is chosen."""

    downsample: int = Field(default=2, ge=1, description="The image is reduced by this factor before cutting.")
    when_impossible: Literal["largest", "quarantine"] = Field(
        default="largest",
        description="No disjoint place of equal size: take the largest disjoint box, or quarantine the sample.",
    )


class ViewConfig(_Config):
    """How both crops of a sample are made."""

    positive: PositiveCropConfig = Field(default=PositiveCropConfig(), description="The relevant crop.")
    negative: NegativeCropConfig = Field(default=NegativeCropConfig(), description="The irrelevant crop.")
    # One filter for both crops: two filters would be a difference between the views that is no evidence.
    resample: Resample = Field(default="bicubic", description="Filter of every resize, of both crops alike.")
