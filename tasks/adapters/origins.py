"""Where a run came from and what it took: its artefacts, data, models, code and costs."""

from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from tasks.adapters.ancestors import with_ancestors
from tasks.adapters.dataset import FINDINGS, QUARANTINE
from tasks.adapters.evaluation import EvaluateJob
from tasks.adapters.row_facts import Finding
from tasks.adapters.run_job import ReportJob
from tasks.adapters.store import Store
from tasks.adapters.tables import read_rows
from tasks.adapters.training_data import CheckpointJob
from tasks.artifacts import ArtifactRef, BadRow, Manifest

NUM_BAD_ROWS = 20
"""Bad rows shown of each stage; all of them stand in the quarantine tables."""

_WITH_TOKENS = ("rollouts", "replay", "train", "predict")
"""Stages in which a model writes, replays or learns responses; others count what these did."""


@dataclass(frozen=True)
class Cost:
    """What artefacts took when they were made, whichever run made them; None where it was not measured."""

    num_artifacts: int
    seconds: float
    cpu_seconds: float | None
    gpu_seconds: float | None
    num_tokens: int | None


@dataclass(frozen=True)
class Validation:
    """What the training data was found to be."""

    samples: dict[str, Any]
    views: dict[str, Any]
    training_set: dict[str, Any]
    regions: dict[str, Any] | None
    findings: tuple[Finding, ...]
    bad_rows: tuple[tuple[str, BadRow], ...]

    @property
    def num_bad(self) -> int:
        """Rows set aside."""
        return int(self.samples["num_bad"] + self.views["num_bad"])


@dataclass(frozen=True)
class Origins:
    """Names of what a run was made of."""

    costs: dict[str, Cost]
    """By stage, in the order of their first appearance."""
    total: Cost
    first: datetime
    last: datetime
    student_weights: str
    teacher_weights: str
    selected: dict[str, Any]
    source: str | None
    """Path or URL of the training data, which names a version where it is in lakeFS; None for the small world."""
    questions: tuple[tuple[str, dict[str, Any], ArtifactRef], ...]
    """Name, figures and table of each benchmark."""
    codes: tuple[str, ...]


def validation(job: ReportJob, store: Store) -> Validation:
    """Sum up the validation of a run's training data."""
    return Validation(
        samples=store.manifest(job.samples).summary,
        views=store.manifest(job.views).summary,
        training_set=store.manifest(job.training_set).summary,
        regions=store.manifest(job.regions).summary if job.regions else None,
        findings=tuple(read_rows(store.read(job.samples, FINDINGS), Finding)),
        bad_rows=tuple(
            (ref.stage, row)
            for ref in (job.samples, job.views)
            for row in read_rows(store.read(ref, QUARANTINE), BadRow)[:NUM_BAD_ROWS]
        ),
    )


def origins(job: ReportJob, store: Store) -> Origins:
    """Give what a run was made of, and what it took."""
    policy = store.manifest(job.rounds[0].rollouts[0]).inputs["policy"]
    teacher = store.manifest(job.rounds[0].replays[0]).inputs["teacher"]
    made = {one.benchmark: EvaluateJob.model_validate(store.manifest(one.ref).job) for one in job.evaluations}
    # As a rule a state is stored within its round's training, whose time counts it.
    manifests = [one for one in with_ancestors(store, job.inputs().values()) if one.stage != CheckpointJob.stage]
    costs: dict[str, list[Manifest]] = {}
    for manifest in manifests:
        costs.setdefault(manifest.stage, []).append(manifest)
    return Origins(
        costs={stage: cost_of(found) for stage, found in costs.items()},
        total=cost_of(manifests),
        first=min(manifest.created_at for manifest in manifests),
        last=max(manifest.created_at for manifest in manifests),
        student_weights=store.manifest(policy).job["weights"],
        teacher_weights=store.manifest(teacher).job["weights"],
        selected=store.manifest(job.selected).summary,
        source=job.config.get("data", {}).get("source", {}).get("path"),
        questions=tuple((name, store.manifest(one.data).summary, one.data) for name, one in made.items()),
        codes=tuple(sorted({manifest.code for manifest in manifests})),
    )


def cost_of(manifests: Sequence[Manifest]) -> Cost:
    """Add up what artefacts took."""
    return Cost(
        num_artifacts=len(manifests),
        seconds=sum(manifest.measured["seconds"] for manifest in manifests),
        cpu_seconds=_sum(manifest.measured.get("cpu_seconds") for manifest in manifests),
        gpu_seconds=_sum(manifest.measured.get("gpu_seconds") for manifest in manifests),
        num_tokens=_sum(manifest.summary.get("num_tokens") for manifest in manifests if manifest.stage in _WITH_TOKENS),
    )


def _sum(values: Iterable[Any]) -> Any:
    """Add up what is known; None where nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None
