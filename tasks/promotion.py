"""Stage: whether a retrained student takes the champion's place: by its own criterion, and kept from regressions."""

from pathlib import Path
from typing import Any, ClassVar

from tasks.adapters.evaluation import compare_evaluations, least_gain
from tasks.adapters.statistics import mean_interval
from tasks.adapters.store import Outcome, Store, write_json
from tasks.artifacts import ArtifactRef, Job, Record
from tasks.selection import read_candidates
from tasks.stage import RunContext, stage
from tasks.training_set import image_of


class Pair(Record):
    """Champion and challenger on the same questions."""

    benchmark: str
    champion: ArtifactRef
    challenger: ArtifactRef


class PromotionJob(Job):
    """Decide on a challenger."""

    stage: ClassVar[str] = "promotion"

    criteria: tuple[ArtifactRef, ...]
    """Label-free figures of champion and challenger on the same prompts; empty where questions with answers decide."""
    samples: ArtifactRef
    """Training set that these prompts were set aside of."""
    split: Pair | None
    """Questions that decide; None: the figures do."""
    guards: tuple[Pair, ...]
    """Benchmarks, which decide nothing but that nothing is lost."""
    margin: float

    @property
    def title(self) -> str:
        """How the run is called on the dashboard."""
        return "decide on promotion"


@stage(PromotionJob)
def promotion(job: PromotionJob, context: RunContext, folder: Path) -> Outcome:
    """Promote a challenger that is better than the champion, and on no benchmark worse by more than the margin.

    Better: by questions set apart for this, where there are any (McNemar, p < 0.05), else by the teacher's support for
    the responses to prompts that neither was trained on (95% interval of the mean over images above 0). Not worse:
    with 95% confidence on one side, on each benchmark, the loss is below the margin. No benchmark makes a challenger
    champion, so the figures that are reported on them are not selected upon, however often the champion changes.
    """
    better, reason = _by_split(context.store, job.split) if job.split is not None else _by_support(context, job)
    guards = [_guard(context.store, pair, job.margin) for pair in job.guards]
    failed = [guard for guard in guards if not guard["passed"]]
    if better and failed:
        reason += "; but " + "; ".join(
            f"{guard['benchmark']} may lose {-100 * guard['least_gain']:.1f} points, {100 * job.margin:.1f} are allowed"
            for guard in failed
        )
    summary = {"promoted": better and not failed, "reason": reason, "guards": guards}
    write_json(folder / "promotion.json", summary)
    return Outcome(summary=summary)


def _by_split(store: Store, pair: Pair) -> tuple[bool, str]:
    found = compare_evaluations(store, pair.champion, pair.challenger)
    points = f"{100 * found.difference:+.1f} points ({100 * found.low:+.1f} .. {100 * found.high:+.1f})"
    return found.verdict == "better", f"{pair.benchmark}: {points}, p = {found.p_value:.3f}: {found.verdict}"


def _by_support(context: RunContext, job: PromotionJob) -> tuple[bool, str]:
    champion, challenger = read_candidates(context.store, job.criteria)
    images = {sample.id: image_of(sample) for sample in context.dataset.samples(job.samples)}
    gains = [after.support - before.support for before, after in zip(champion.prompts, challenger.prompts, strict=True)]
    # Prompts of one image are no independent evidence.
    clusters = [images[prompt.sample_id] for prompt in champion.prompts]
    more, low, high = mean_interval(gains, clusters)
    verdict = "better" if low > 0 else "worse" if high < 0 else "inside the noise"
    interval = f"{more:+.3f} nats per token ({low:+.3f} .. {high:+.3f})"
    what = f"{len(gains)} prompts set aside, of {len(set(clusters))} images"
    return low > 0, f"the teacher's support on {what}: {interval}: {verdict}"


def _guard(store: Store, pair: Pair, margin: float) -> dict[str, Any]:
    gain = least_gain(store, pair.champion, pair.challenger)
    found = compare_evaluations(store, pair.champion, pair.challenger)
    return {
        "benchmark": pair.benchmark,
        "difference": found.difference,
        "least_gain": gain,
        "passed": gain > -margin,
    }
