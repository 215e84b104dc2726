"""Which figures of a run are drawn over its rounds, and what a healthy gate looks like in them."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from tasks.adapters.charts import Chart, Line, drawable
from tasks.adapters.origins import cost_of
from tasks.adapters.store import Store
from tasks.artifacts import ArtifactRef, Manifest
from vzero_core.config import Gate, GateConfig, PrefixTrustConfig

Figures = Mapping[str, float | None]
"""A round's figures by name, the number of the round among them."""

SUSPICIOUS_CORRELATION = 0.3
"""Beyond this, of either sign, a gate is said to choose by length."""
_Z = 1.96
"""Standard errors to either side of a mean that make a 95% interval."""


def round_figures(
    store: Store,
    number: int,
    rollouts: Sequence[ArtifactRef],
    replays: Sequence[ArtifactRef],
    gate: ArtifactRef,
    train: ArtifactRef,
) -> Figures:
    """Give the figures of one round from its manifests; shards are put together by what they count."""
    sampled, replayed = ([store.manifest(ref) for ref in refs] for refs in (rollouts, replays))
    num_responses = sum(manifest.summary["num_responses"] for manifest in sampled)
    num_tokens = sum(manifest.summary["num_tokens"] for manifest in sampled)
    truncated = sum(manifest.summary["truncated_share"] * manifest.summary["num_responses"] for manifest in sampled)
    trained, gated = store.manifest(train), store.manifest(gate)
    cost = cost_of([*sampled, *replayed, gated, trained])
    return {
        "round": number,
        **_numbers(trained.summary),
        **_numbers(gated.summary),
        **{f"support_{view}": value for view, value in _support(replayed).items()},
        "response_length": num_tokens / num_responses,
        "truncated_share": truncated / num_responses,
        "sampled_per_second": _rate(sampled),
        "replayed_per_second": _rate(replayed),
        "replay_computed_share": _computed_share(replayed),
        "trained_per_second": trained.measured.get("tokens_per_second"),
        "wall_seconds": cost.seconds,
        "cpu_seconds": cost.cpu_seconds,
        "gpu_seconds": cost.gpu_seconds,
    }


def _numbers(summary: Mapping[str, Any]) -> dict[str, float | None]:
    return {name: value for name, value in summary.items() if value is None or isinstance(value, int | float)}


def _support(replayed: Sequence[Manifest]) -> dict[str, float]:
    """Give the teacher's mean log-prob of the round's tokens under each view."""
    total = sum(manifest.summary["num_tokens"] for manifest in replayed)
    sums: dict[str, float] = {}
    for manifest in replayed:
        for view, mean in manifest.summary["mean_logprob"].items():
            sums[view] = sums.get(view, 0.0) + mean * manifest.summary["num_tokens"]
    return {view: value / total for view, value in sums.items()}


def _computed_share(replayed: Sequence[Manifest]) -> float | None:
    """Give how much of what was replayed the teacher computed, a prompt counting once for each of its responses."""
    total = sum(manifest.measured.get("num_prompted_tokens", 0) for manifest in replayed)
    return sum(manifest.measured.get("num_computed_tokens", 0) for manifest in replayed) / total if total else None


def _rate(shards: Sequence[Manifest]) -> float | None:
    rates = [(shard.summary["num_tokens"], shard.measured.get("tokens_per_second")) for shard in shards]
    seconds = sum(count / rate for count, rate in rates if rate)
    return sum(count for count, rate in rates if rate) / seconds if seconds else None


def learning_curves(rounds: Sequence[Figures]) -> list[Chart]:
    """Give the charts of how the student changes; those without a value in any round are left out."""
    return drawable(
        [
            _chart(
                rounds,
                "Divergence of student and teacher",
                "nats per token",
                {"k1": "divergence_k1", "k3": "divergence_k3"},
                covers=(0.0,),
                note="Two estimates of the reverse KL to the teacher's target view, on the student's own responses. "
                "It should fall.",
            ),
            _chart(
                rounds,
                "Teacher's support",
                "nats per token",
                {"relevant crop": "support_positive", "irrelevant crop": "support_negative", "no crop": "support_none"},
                note="Mean log-prob of the student's responses under each view. It should rise.",
            ),
            _chart(
                rounds,
                "Evidence score",
                "nats per token",
                {"mean": "evidence_score"},
                covers=(0.0,),
                note="How much more the relevant crop supports the responses than the irrelevant one does.",
            ),
            _chart(rounds, "Loss", "first mini-batch of the round", {"loss": "loss"}, covers=(0.0,)),
            _chart(
                rounds,
                "Entropy of the student",
                "nats per token",
                {"entropy": "entropy"},
                covers=(0.0,),
                note="A fall towards 0 means that all responses of a prompt become the same.",
            ),
            _chart(rounds, "Response length", "tokens", {"mean": "response_length"}, covers=(0.0,)),
            _chart(
                rounds,
                "Truncated responses",
                "share that met max_new_tokens",
                {"truncated": "truncated_share"},
                percent=True,
                covers=(0.0, 0.05),
            ),
            _chart(
                rounds,
                "Speed",
                "tokens per second, logarithmic",
                {"sampling": "sampled_per_second", "replay": "replayed_per_second", "training": "trained_per_second"},
                logarithmic=True,
            ),
            _chart(
                rounds,
                "Cost of a round",
                "seconds",
                {"wall": "wall_seconds", "CPU": "cpu_seconds", "GPU": "gpu_seconds"},
                covers=(0.0,),
                note="Sampling, replay, gate and training, added up. CPU counts all threads of the run's own process.",
            ),
        ]
    )


def gate_charts(rounds: Sequence[Figures], gate: Gate) -> list[Chart]:
    """Give the charts of the gate's health, each with what healthy looks like; none without a gate."""
    if isinstance(gate, PrefixTrustConfig):
        note = (
            f"1: the teacher would have written every response itself; near the floor ({gate.floor:g}): it leaves them "
            "after the first token. Healthy: well above the floor, and rising as the student comes to agree with it."
        )
        trust = _chart(
            rounds, "Mean token weight", "1 is full trust", {"mean": "mean_token_weight"}, covers=(0.0, 1.0), note=note
        )
        return drawable([trust])
    if not isinstance(gate, GateConfig):
        return []
    bounds = {f"weights at {gate.w_min:g}": "share_at_w_min", f"weights at {gate.w_max:g}": "share_at_w_max"}
    if gate.min_spread:
        bounds["groups left ungated"] = "share_below_min_spread"
    low, high = (_normal_tail(bound, gate.alpha) for bound in (1 - gate.w_min, gate.w_max - 1))
    return drawable(
        [
            _chart(
                rounds,
                "Score spread within groups",
                "standard deviation, nats per token",
                {"mean": "mean_spread", "median": "median_spread"},
                covers=(0.0,),
                note=f"Healthy: well above gate.min_spread ({gate.min_spread:g}) and not falling towards it; then the "
                "views still tell the responses of a prompt apart, and not rounding alone.",
            ),
            _chart(
                rounds,
                "Weights at the bounds",
                "share",
                bounds,
                percent=True,
                covers=(0.0, 0.25),
                note=f"Healthy: near what normally distributed scores would give ({low:.0%} and {high:.0%}). "
                "Towards a half each, the gate is a mere switch.",
            ),
            _chart(
                rounds,
                "Effective sample share",
                "(Σw)² / (B Σw²)",
                {"share": "effective_sample_share"},
                percent=True,
                covers=(0.0, 1.0),
                note="Healthy: well above a third. 100% means that all responses count alike; a low share, that a few "
                "responses make the whole update.",
            ),
            _chart(
                rounds,
                "Weight and response length",
                "Pearson's correlation",
                {"correlation": "weight_length_correlation"},
                covers=(-0.5, 0.5),
                note=f"Healthy: near 0. Beyond ±{SUSPICIOUS_CORRELATION:g} the gate chooses by length, not evidence.",
            ),
        ]
    )


def selection_charts(store: Store, criteria: Sequence[ArtifactRef], chosen: int) -> list[Chart]:
    """Give the charts of what the checkpoint was chosen by; no label is behind any of it."""
    found = [store.manifest(ref) for ref in criteria]
    return drawable(
        [
            Chart(
                f"{title} on prompts set aside",
                "nats per token, with 95% intervals",
                (_criterion(found, name),),
                covers=(0.0,),
                note=note,
                marked=chosen,
            )
            for title, name, note in (
                (
                    "Support",
                    "support",
                    "Log-prob of the responses under the teacher with the relevant crop. It decides.",
                ),
                ("Divergence", "divergence", "Student against teacher with the relevant crop. It should fall."),
                (
                    "Evidence score",
                    "evidence_score",
                    "How much more the relevant crop supports the responses than the irrelevant one does.",
                ),
            )
        ]
    )


def _criterion(found: Sequence[Manifest], name: str) -> Line:
    known = [manifest for manifest in found if manifest.summary.get(name) is not None]
    values = tuple(float(manifest.summary[name]) for manifest in known)
    # One prompt alone has no standard error.
    errors = [_Z * (manifest.summary[f"{name}_se"] or 0.0) for manifest in known]
    return Line(
        "mean",
        tuple(int(manifest.job["round"]) for manifest in known),
        values,
        intervals=tuple((value - error, value + error) for value, error in zip(values, errors, strict=True)),
    )


def overlaid(first: Sequence[Chart], second: Sequence[Chart], names: tuple[str, str]) -> list[Chart]:
    """Give a chart for each line that two runs have in common, with both of them in it."""
    others = {chart.title: chart for chart in second}
    charts = []
    for chart in first:
        if chart.title not in others:
            continue
        matching = {line.label: line for line in others[chart.title].lines}
        for line in chart.lines:
            if line.label not in matching:
                continue
            title = chart.title if len(chart.lines) == 1 else f"{chart.title}: {line.label}"
            lines = (replace(line, label=names[0]), replace(matching[line.label], label=names[1]))
            charts.append(replace(chart, title=title, lines=lines, levels=(), marked=None))
    return drawable(charts)


def _chart(
    rounds: Sequence[Figures],
    title: str,
    unit: str,
    names: Mapping[str, str],
    *,
    note: str = "",
    percent: bool = False,
    covers: tuple[float, ...] = (),
    logarithmic: bool = False,
) -> Chart:
    numbers = tuple(int(figures["round"] or 0) for figures in rounds)
    lines = tuple(Line(label, numbers, tuple(figures.get(name) for figures in rounds)) for label, name in names.items())
    return Chart(title, unit, lines, percent=percent, covers=covers, logarithmic=logarithmic, note=note)


def _normal_tail(distance: float, alpha: float) -> float:
    """Give the share of weights 1 + alpha a that lie this far to one side of 1, a being standard normal."""
    return 0.5 * math.erfc(distance / alpha / math.sqrt(2)) if alpha else 0.0
