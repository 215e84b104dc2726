"""Whether a round's gate is healthy, in words."""

from dataclasses import dataclass

from tasks.adapters.curves import SUSPICIOUS_CORRELATION, Figures
from vzero_core.config import Gate, GateConfig, PrefixTrustConfig

MAX_UNGATED_SHARE = 0.5
"""Where more of a round's prompts have too little spread, the gate does nothing for most of them."""
MIN_EFFECTIVE_SHARE = 1 / 3
"""Below this, a few responses make the whole update."""
MAX_EFFECTIVE_SHARE = 0.99
"""Above this, all responses count alike."""
MAX_BOUNDS_SHARE = 0.8
"""Where more of the weights stand at the bounds, little is left between them: normal scores leave 68% at strength 1."""
MIN_TRUST = 0.1
"""Of the way from the floor to 1: below this, prefix trust is gone after the first tokens."""


@dataclass(frozen=True)
class GateVerdict:
    """What is to be said of a round's gate."""

    word: str
    """`healthy`, `off`, or what is wrong, in short."""
    reasons: tuple[str, ...]
    """A sentence each, with the figure and what to look at."""


def gate_verdict(figures: Figures, gate: Gate) -> GateVerdict:
    """Judge a gate by a round's label-free figures; the thresholds are those that the report names (docs/REPORT.md).

    Args:
        figures: of the round; those of the gate may be None where they are not defined.
        gate: its settings.
    """
    if isinstance(gate, PrefixTrustConfig):
        found = _prefix_trust(figures, gate)
    elif isinstance(gate, GateConfig) and gate.alpha > 0:
        found = _contrastive(figures, gate)
    else:
        return GateVerdict("off", ("Every response counts alike, as configured.",))
    if not found:
        return GateVerdict("healthy", ("Nothing is out of the ordinary.",))
    return GateVerdict(", ".join(found), tuple(found.values()))


def _contrastive(figures: Figures, gate: GateConfig) -> dict[str, str]:
    if figures["mean_spread"] is None:
        return {
            "one response a prompt": "A response has no other of its prompt to be compared with, so all weigh 1: "
            "set sampling.num_responses to 2 or more."
        }
    effective = figures["effective_sample_share"]
    if effective is None:
        return {"all weights are 0": "Nothing is learned: look at gate.alpha, gate.w_min and gate.gamma."}
    found = {}
    ungated = figures["share_below_min_spread"] or 0.0
    if ungated > MAX_UNGATED_SHARE:
        found["no spread"] = (
            f"{ungated:.0%} of the prompts are left ungated: their responses' scores spread less than gate.min_spread "
            f"({gate.min_spread:g} nats per token), so the crops do not tell them apart, or they are all the same."
        )
    elif effective > MAX_EFFECTIVE_SHARE:
        found["uniform weights"] = (
            f"The effective sample share is {effective:.1%}: all responses count alike, as without a gate."
        )
    if effective < MIN_EFFECTIVE_SHARE:
        found["few responses count"] = (
            f"The effective sample share is {effective:.0%}, below a third: a few responses make the whole update."
        )
    bounds = (figures["share_at_w_min"] or 0.0) + (figures["share_at_w_max"] or 0.0)
    if bounds > MAX_BOUNDS_SHARE:
        found["a mere switch"] = (
            f"{bounds:.0%} of the weights stand at gate.w_min or gate.w_max: little is left between on and off; lower "
            "gate.alpha, or sample more responses a prompt."
        )
    correlation = figures["weight_length_correlation"]
    if correlation is not None and abs(correlation) > SUSPICIOUS_CORRELATION:
        longer = "longer" if correlation > 0 else "shorter"
        found[f"prefers {longer} responses"] = (
            f"Weight and length correlate by {correlation:+.2f}, beyond ±{SUSPICIOUS_CORRELATION:g}: the gate chooses "
            "by length, not by evidence."
        )
    return found


def _prefix_trust(figures: Figures, gate: PrefixTrustConfig) -> dict[str, str]:
    trust = figures["mean_token_weight"] or 0.0
    if trust >= gate.floor + MIN_TRUST * (1 - gate.floor):
        return {}
    return {
        "little trust": f"The mean token weight is {trust:.2f}, near the floor ({gate.floor:g}): the teacher would "
        "leave the responses after their first tokens."
    }
