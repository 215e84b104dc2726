"""What a run's report is made from: every artefact of the run, by what it was in it."""

from typing import Any, ClassVar

from tasks.adapters.store import Store
from tasks.artifacts import ArtifactRef, Job, Record


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
    """A measurement on a benchmark and what it is called."""

    label: str
    benchmark: str
    ref: ArtifactRef


class ReportJob(Job):
    """Report on a run."""

    stage: ClassVar[str] = "report"
    version: ClassVar[int] = 3

    name: str
    config: dict[str, Any]
    samples: ArtifactRef
    docs: ArtifactRef
    regions: ArtifactRef | None
    views: ArtifactRef
    """Crops of the new samples."""
    training_set: ArtifactRef
    rounds: tuple[RoundRefs, ...]
    evaluations: tuple[Evaluation, ...]
    criteria: tuple[ArtifactRef, ...]
    """Label-free figures of the candidates, round 0 first."""
    selection: ArtifactRef | None
    selected: ArtifactRef


def selected_round(job: ReportJob, store: Store) -> int:
    """Give the round whose student was chosen; 0 is the student before training."""
    if job.selection is not None:
        return int(store.manifest(job.selection).summary["round"])
    return job.rounds[-1].round


def rounds_by_policy(job: ReportJob, store: Store) -> dict[str, int]:
    """Give the round of each of the student's states by its digest; of equal ones the first."""
    # By content, not by key: an evaluation that was re-used may name another way to the same policy.
    rounds = {done.train.digest: done.round for done in reversed(job.rounds)}
    return rounds | {store.manifest(job.rounds[0].rollouts[0]).inputs["policy"].digest: 0}
