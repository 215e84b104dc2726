"""What a model answers to a benchmark's questions and how that is scored: jobs, and how their artefacts are read."""

from collections.abc import Sequence
from typing import ClassVar, NamedTuple

import numpy as np

from tasks.adapters.dataset import SAMPLES
from tasks.adapters.statistics import Comparison, Outcomes, compare, lower_bound
from tasks.adapters.store import Store
from tasks.adapters.tables import read_rows
from tasks.artifacts import ArtifactRef, EvaluationSample, Job, Role, Score
from tasks.config import EngineFingerprint, PromptConfig
from tasks.evaluation_config import Aggregate, BenchmarkKind, GenerationConfig, JudgeConfig, Protocol
from vzero_core.config import ViewConfig

PREDICTIONS, SCORES, RESULTS = "predictions.parquet", "scores.parquet", "results.json"


class PredictJob(Job):
    """Ask a model a shard of a benchmark's questions."""

    stage: ClassVar[str] = "predict"

    benchmark: str
    role: Role
    policy: ArtifactRef
    data: ArtifactRef
    crop: ViewConfig | None
    """How the region's crop is cut; None: the full image alone."""
    prompt: PromptConfig
    choice_template: str
    generation: GenerationConfig
    engine: EngineFingerprint
    first: int
    """Row of the data that the shard begins with."""
    last: int
    """Row after the shard's last."""

    @property
    def title(self) -> str:
        """How the run is called on the dashboard."""
        crop = ", with crop" if self.crop else ""
        return f"{self.benchmark}, {self.role}{crop}, questions {self.first + 1} to {self.last}"


class EvaluateJob(Job):
    """Score the answers to a benchmark."""

    stage: ClassVar[str] = "evaluate"
    version: ClassVar[int] = 3

    benchmark: str
    kind: BenchmarkKind
    role: Role
    policy: ArtifactRef
    crop: ViewConfig | None
    data: ArtifactRef
    prompt: PromptConfig
    choice_template: str
    generation: GenerationConfig
    engine: EngineFingerprint
    """With the three before it, how the predictions were asked for: others may have given the very same answers."""
    predictions: tuple[ArtifactRef, ...]
    protocol: Protocol
    aggregate: Aggregate
    judge: JudgeConfig | None

    @property
    def title(self) -> str:
        """How the run is called on the dashboard."""
        return f"score {self.benchmark}, {self.role}" + (", with crop" if self.crop else "")


class Evaluated(NamedTuple):
    """An evaluation, and what was asked of whom."""

    job: EvaluateJob
    asked: PredictJob
    """For the first shard; the others differ in their rows alone."""


def evaluated(store: Store, ref: ArtifactRef) -> Evaluated:
    """Give the jobs behind an evaluation."""
    job = EvaluateJob.model_validate(store.manifest(ref).job)
    return Evaluated(job, PredictJob.model_validate(store.manifest(job.predictions[0]).job))


def subcategory_of(sample: EvaluationSample) -> str | None:
    """Name a subcategory with its category: MME-RealWorld has some of one name in two of them."""
    return "/".join(name for name in (sample.category, sample.subcategory) if name) if sample.subcategory else None


def outcomes(samples: Sequence[EvaluationSample], scores: Sequence[Score], aggregate: Aggregate) -> Outcomes:
    """Put scores into the form that statistics take.

    Args:
        samples: all questions.
        scores: of answers to them, one or more each.
        aggregate: what the score is a mean of.
    """
    by_id = {sample.id: sample for sample in samples}
    rows = [by_id[score.sample_id] for score in scores]
    questions = [row.group or row.id for row in rows]
    groups: dict[Aggregate, list[str | None]] = {
        "rows": [None for _ in rows],
        "cycles": [row.cycle for row in rows],
        "categories": [subcategory_of(row) or row.category for row in rows],
    }
    return Outcomes(
        correct=np.array([score.correct for score in scores]),
        question=_numbered(questions),
        group=_numbered(groups[aggregate]),
    )


def _numbered(names: Sequence[str | None]) -> np.ndarray:
    numbers: dict[str | None, int] = {}
    return np.array([numbers.setdefault(name, len(numbers)) for name in names])


def read_outcomes(store: Store, ref: ArtifactRef) -> tuple[list[Score], Outcomes]:
    """Read the scores of an evaluation, by question and seed, so that two on the same questions have the same order."""
    job = EvaluateJob.model_validate(store.manifest(ref).job)
    samples = read_rows(store.read(job.data, SAMPLES), EvaluationSample)
    scores = read_rows(store.read(ref, SCORES), Score)
    scores.sort(key=lambda score: (score.sample_id, score.seed))
    return scores, outcomes(samples, scores, job.aggregate)


def comparable(first: EvaluateJob, second: EvaluateJob) -> bool:
    """Tell whether two evaluations are of the same questions, scored alike."""
    return (first.data.digest, first.protocol, first.aggregate, first.judge) == (
        second.data.digest,
        second.protocol,
        second.aggregate,
        second.judge,
    )


def compare_evaluations(store: Store, before: ArtifactRef, after: ArtifactRef) -> Comparison:
    """Compare two `comparable` evaluations, question by question."""
    return compare(read_outcomes(store, before)[1], read_outcomes(store, after)[1])


def least_gain(store: Store, before: ArtifactRef, after: ArtifactRef) -> float:
    """Give how much accuracy a student gains at least on two `comparable` evaluations, with 95% confidence."""
    return lower_bound(read_outcomes(store, before)[1], read_outcomes(store, after)[1])
