"""What a person sees of a run: a table per round on the dashboard, and the table at the end."""

from collections import defaultdict
from datetime import datetime

from prefect.artifacts import create_table_artifact
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from tasks.adapters.curves import round_figures
from tasks.adapters.store import Store
from tasks.artifacts import ArtifactRef
from tasks.report import Evaluation, RoundRefs


class Score(BaseModel):
    """A measured accuracy with its 95% interval."""

    label: str
    accuracy: float
    low: float
    high: float
    num_questions: int


class StageTime(BaseModel):
    """What a stage took, all of its artefacts together."""

    stage: str
    num_artifacts: int
    num_reused: int
    seconds: float


class RunResult(BaseModel):
    """What a run gives."""

    scores: list[Score]
    stages: list[StageTime]
    policy: ArtifactRef
    checkpoint: str
    report: str
    data_docs: str
    commit: str | None


def show_round(store: Store, refs: RoundRefs) -> None:
    """Leave a round's figures as a table on the dashboard."""
    figures = round_figures(store, refs.round, refs.rollouts, refs.replays, refs.gate, refs.train)
    table = [
        {"figure": name.replace("_", " "), "value": round(value, 4) if isinstance(value, float) else value}
        for name, value in figures.items()
    ]
    create_table_artifact(key="round", table=table, description=f"Round {refs.round}")


def scores_of(store: Store, evaluations: list[Evaluation]) -> list[Score]:
    """Give the accuracies, in the order measured."""
    return [
        Score(label=evaluation.label, **{name: summary[name] for name in Score.model_fields if name != "label"})
        for evaluation in evaluations
        for summary in [store.manifest(evaluation.ref).summary]
    ]


def stage_times(store: Store, refs: list[ArtifactRef], started: datetime) -> list[StageTime]:
    """Give what each stage took when its artefacts were made, and how many of them this run found done."""
    manifests = defaultdict(list)
    for ref in refs:
        manifests[ref.stage].append(store.manifest(ref))
    return [
        StageTime(
            stage=stage,
            num_artifacts=len(found),
            num_reused=sum(manifest.created_at < started for manifest in found),
            seconds=sum(manifest.measured["seconds"] for manifest in found),
        )
        for stage, found in manifests.items()
    ]


def print_result(result: RunResult, seconds: float) -> None:
    """Print the tables at the end of a run."""
    console = Console()
    scores = Table(title="Accuracy on held-out questions", title_justify="left")
    for name in ("model", "accuracy", "95% interval", "questions"):
        scores.add_column(name, justify="left" if name == "model" else "right")
    for score in result.scores:
        interval = f"{score.low:.1%} .. {score.high:.1%}"
        scores.add_row(score.label, f"{score.accuracy:.1%}", interval, str(score.num_questions))
    stages = Table(title="Time per stage", title_justify="left")
    for name in ("stage", "artefacts", "of which re-used", "seconds"):
        stages.add_column(name, justify="left" if name == "stage" else "right")
    for stage in result.stages:
        stages.add_row(
            stage.stage.replace("_", " "), str(stage.num_artifacts), str(stage.num_reused), f"{stage.seconds:.1f}"
        )
    if result.scores:
        console.print(scores)
    console.print(stages)
    console.print(f"This run took {seconds:.0f} s; seconds of re-used artefacts are those of the run that made them.")
    console.print(f"student: {result.checkpoint}", soft_wrap=True)
    console.print(f"report:  {result.report}", soft_wrap=True)
    console.print(f"data:    {result.data_docs}", soft_wrap=True)
    if result.commit is not None:
        console.print(f"lakeFS:  {result.commit}", soft_wrap=True)
