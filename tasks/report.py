"""Stage: one self-contained HTML page on a run, built from its artefacts alone."""

import json
import math
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from pydantic import TypeAdapter

from tasks.adapters.charts import MAX_LEVELS, Chart, Line, draw, format_value
from tasks.adapters.curves import gate_charts, learning_curves, round_figures
from tasks.adapters.dataset import QUARANTINE, Dataset
from tasks.adapters.gallery import choose_prompts, spread_of
from tasks.adapters.store import Outcome, Store
from tasks.adapters.tables import read_rows
from tasks.artifacts import ArtifactRef, BadRow, Job, Manifest, Prediction, Record
from tasks.evaluate import PREDICTIONS, EvaluateJob
from tasks.stage import RunContext, stage
from vzero_core.config import Gate, GateConfig

NUM_PROMPTS = 6
"""Prompts shown, of the first and the last round together."""
NUM_BAD_ROWS = 20
"""Bad rows shown of each stage; all of them stand in the quarantine tables."""


class RoundRefs(Record):
    """The artefacts of one round."""

    round: int
    rollouts: tuple[ArtifactRef, ...]
    replays: tuple[ArtifactRef, ...]
    gate: ArtifactRef
    train: ArtifactRef

    def refs(self) -> list[ArtifactRef]:
        """All of them, in the order made."""
        return [*self.rollouts, *self.replays, self.gate, self.train]


class Evaluation(Record):
    """A measurement and what it is called."""

    label: str
    ref: ArtifactRef


class ReportJob(Job):
    """Report on a run."""

    stage: ClassVar[str] = "report"

    name: str
    config: dict[str, Any]
    samples: ArtifactRef
    regions: ArtifactRef | None = None
    views: ArtifactRef
    rounds: tuple[RoundRefs, ...]
    evaluations: tuple[Evaluation, ...]
    selected: ArtifactRef


@dataclass(frozen=True)
class Measurement:
    """An accuracy with its 95% interval; `round` is None where it is not the student's, from the full image alone."""

    label: str
    ref: ArtifactRef
    data: ArtifactRef
    round: int | None
    accuracy: float
    low: float
    high: float
    num_questions: int


@dataclass(frozen=True)
class Change:
    """The student before and after, on the same questions."""

    before: Measurement
    after: Measurement
    num_gained: int
    num_lost: int

    @property
    def overlap(self) -> bool:
        """Whether the two intervals have a point in common."""
        return self.before.low <= self.after.high and self.after.low <= self.before.high

    @property
    def p_value(self) -> float:
        """Exact two-sided sign test on the questions whose outcome changed (McNemar)."""
        total, smaller = self.num_gained + self.num_lost, min(self.num_gained, self.num_lost)
        tail = sum(math.comb(total, count) for count in range(smaller + 1))
        return float(min(1.0, 2 * tail / 2**total))


@stage(ReportJob)
def report(job: ReportJob, context: RunContext, folder: Path) -> Outcome:
    """Write report.html."""
    (folder / "report.html").write_text(build_page(job, context.store, context.dataset), encoding="utf-8")
    return Outcome()


def build_page(job: ReportJob, store: Store, dataset: Dataset) -> str:
    """Give the page; the same artefacts give the same bytes."""
    gate: Gate = TypeAdapter(Gate).validate_python(store.manifest(job.rounds[0].gate).job["gate"])
    figures = [round_figures(store, r.round, r.rollouts, r.replays, r.gate, r.train) for r in job.rounds]
    measured = measurements(job, store)
    shown = {done.round: done for done in (job.rounds[0], job.rounds[-1])}.values()
    environment = Environment(
        loader=FileSystemLoader(Path(__file__).parent / "templates"),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
    )
    environment.filters |= {
        "value": format_value,
        "percent": lambda value: format_value(value, percent=True),
        "signed": lambda value: format_value(value, signed=True),
    }
    # A chart holds no text of the data, only what matplotlib made of numbers.
    environment.globals["draw"] = lambda chart: Markup(draw(chart, job.rounds[-1].round))
    return environment.get_template("report.html.j2").render(
        job=job,
        num_rounds=len(job.rounds),
        measurements=measured,
        change=change_of(measured, store),
        curves=[*_accuracy_curve(measured), *learning_curves(figures)],
        figures=figures,
        gate=gate,
        gate_charts=gate_charts(figures, gate),
        spread_of=spread_of(gate),
        full_weight=gate.w_max if isinstance(gate, GateConfig) else 1.0,
        prompts=[
            card
            for done in shown
            for card in choose_prompts(
                store,
                dataset,
                round_number=done.round,
                views=job.views,
                rollouts=done.rollouts,
                replays=done.replays,
                weights=done.gate,
                gate=gate,
                count=NUM_PROMPTS // len(shown),
            )
        ],
        **_origins(job, store),
        config=json.dumps(job.config, indent=2, ensure_ascii=False),
    )


def measurements(job: ReportJob, store: Store) -> list[Measurement]:
    """Give all evaluations, in the order made."""
    # By content, not by key: an evaluation that was re-used may name another way to the same policy.
    rounds = {done.train.digest: done.round for done in reversed(job.rounds)}
    rounds[_inputs(store, job.rounds[0].rollouts[0])["policy"].digest] = 0
    found = []
    for evaluation in job.evaluations:
        manifest = store.manifest(evaluation.ref)
        made = EvaluateJob.model_validate(manifest.job)
        is_student = made.role == "student" and made.crop is None
        number = rounds.get(made.policy.digest) if is_student else None
        values = {name: manifest.summary[name] for name in ("accuracy", "low", "high", "num_questions")}
        found.append(Measurement(evaluation.label, evaluation.ref, made.data, number, **values))
    return found


def change_of(measured: list[Measurement], store: Store) -> Change | None:
    """Compare the student's last measurement with its first, question by question; None where there is only one."""
    student = _student(measured)
    if len(student) < 2:
        return None
    before, after = (
        {row.sample_id: row.correct for row in read_rows(store.read(found.ref, PREDICTIONS), Prediction)}
        for found in (student[0], student[-1])
    )
    return Change(
        before=student[0],
        after=student[-1],
        num_gained=sum(correct and not before[name] for name, correct in after.items()),
        num_lost=sum(not correct and before[name] for name, correct in after.items()),
    )


def _student(measured: list[Measurement]) -> list[Measurement]:
    """Give the student's measurements on the questions that it was measured on first, by round."""
    known = [found for found in measured if found.round is not None]
    return sorted((found for found in known if found.data == known[0].data), key=lambda found: found.round or 0)


def _accuracy_curve(measured: list[Measurement]) -> list[Chart]:
    student = _student(measured)
    if not student:
        return []
    rounds, values = tuple(found.round or 0 for found in student), tuple(found.accuracy for found in student)
    line = Line("student", rounds, values, intervals=tuple((found.low, found.high) for found in student))
    levels = [(found.label, found.accuracy) for found in measured if found.round is None][:MAX_LEVELS]
    unit = "held-out questions, with 95% intervals"
    return [Chart("Accuracy", unit, (line,), tuple(levels), percent=True, note="Round 0 is before any training.")]


def _origins(job: ReportJob, store: Store) -> dict[str, Any]:
    """Give what the run was made of: times, data, models, code."""
    policy = _inputs(store, job.rounds[0].rollouts[0])["policy"]
    teacher = _inputs(store, job.rounds[0].replays[0])["teacher"]
    questions = [_inputs(store, evaluation.ref)["data"] for evaluation in job.evaluations]
    # The selected state is left out: as a rule it was stored within its round's training, whose time counts it.
    data = [ref for ref in (job.samples, job.regions, job.views) if ref is not None]
    behind = [ref for made in data for ref in _inputs(store, made).values()]
    refs = [*behind, *data, *questions, *(ref for done in job.rounds for ref in done.refs())]
    refs += [evaluation.ref for evaluation in job.evaluations]
    manifests = {(ref.stage, ref.key): store.manifest(ref) for ref in refs}
    return {
        "times": _times(manifests.values()),
        "total_seconds": sum(manifest.measured["seconds"] for manifest in manifests.values()),
        "first": min(manifest.created_at for manifest in manifests.values()),
        "last": max(manifest.created_at for manifest in manifests.values()),
        "samples": store.manifest(job.samples).summary,
        "regions": store.manifest(job.regions).summary if job.regions else None,
        "views": store.manifest(job.views).summary,
        "questions": [store.manifest(ref).summary for ref in dict.fromkeys(questions)],
        "bad_rows": [(ref.stage, row) for ref in (job.samples, job.views) for row in _bad_rows(store, ref)],
        "student_weights": store.manifest(policy).job["weights"],
        "teacher_weights": store.manifest(teacher).job["weights"],
        "selected": store.manifest(job.selected).summary,
        "codes": sorted({manifest.code for manifest in manifests.values()}),
    }


def _times(manifests: Iterable[Manifest]) -> dict[str, tuple[int, float]]:
    """Give the number of artefacts and the seconds of each stage, in the order of their first appearance."""
    times: dict[str, tuple[int, float]] = {}
    for manifest in manifests:
        count, seconds = times.get(manifest.stage, (0, 0.0))
        times[manifest.stage] = count + 1, seconds + manifest.measured["seconds"]
    return times


def _bad_rows(store: Store, ref: ArtifactRef) -> list[BadRow]:
    return read_rows(store.read(ref, QUARANTINE), BadRow)[:NUM_BAD_ROWS]


def _inputs(store: Store, ref: ArtifactRef) -> dict[str, ArtifactRef]:
    return store.manifest(ref).inputs
