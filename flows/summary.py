"""What a person sees of a run: a table per round on the dashboard, and the table at the end."""

from collections import defaultdict
from datetime import datetime
from pathlib import Path

from prefect.artifacts import create_link_artifact, create_markdown_artifact, create_table_artifact
from pydantic import BaseModel
from rich.console import Console
from rich.table import Table

from tasks.adapters.ancestors import with_ancestors
from tasks.adapters.curves import round_figures
from tasks.adapters.evaluation import compare_evaluations
from tasks.adapters.store import Store
from tasks.adapters.training_data import CheckpointJob
from tasks.artifacts import ArtifactRef
from tasks.report import Evaluation, RoundRefs


class Score(BaseModel):
    """A measured accuracy with its 95% interval."""

    benchmark: str
    label: str
    accuracy: float
    low: float
    high: float
    num_questions: int


class Change(BaseModel):
    """The student before and after, on the same questions; the difference with its 95% interval."""

    benchmark: str
    difference: float
    low: float
    high: float
    p_value: float
    verdict: str


class StageTime(BaseModel):
    """What a stage took, all of its artefacts together."""

    stage: str
    num_artifacts: int
    num_reused: int
    seconds: float


class RunResult(BaseModel):
    """What a run gives."""

    scores: list[Score]
    changes: list[Change]
    stages: list[StageTime]
    chosen_round: int
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
    names = Score.model_fields.keys() - {"benchmark", "label"}
    return [
        Score(benchmark=evaluation.benchmark, label=evaluation.label, **{name: summary[name] for name in sorted(names)})
        for evaluation in evaluations
        for summary in [store.manifest(evaluation.ref).summary]
    ]


def changes_of(store: Store, before: list[Evaluation], after: list[Evaluation]) -> list[Change]:
    """Compare the student before and after on each benchmark, question by question."""
    later = {evaluation.benchmark: evaluation.ref for evaluation in after}
    changes = []
    for evaluation in before:
        found = compare_evaluations(store, evaluation.ref, later[evaluation.benchmark])
        changes.append(
            Change(
                benchmark=evaluation.benchmark,
                difference=found.difference,
                low=found.low,
                high=found.high,
                p_value=found.p_value,
                verdict=found.verdict,
            )
        )
    return changes


def show_report(result: RunResult) -> None:
    """Leave the result and the report's address on the dashboard."""
    lines = ["| benchmark | model | accuracy | 95% interval |", "|---|---|---|---|"]
    lines += [
        f"| {score.benchmark} | {score.label} | {score.accuracy:.1%} | {score.low:.1%} to {score.high:.1%} |"
        for score in result.scores
    ]
    text = "\n".join([*lines, "", *(f"- {describe(change)}" for change in result.changes)])
    create_markdown_artifact(text, key="result", description="Scores with their intervals")
    link = result.report if "://" in result.report else Path(result.report).absolute().as_uri()
    create_link_artifact(link, link_text="report.html", key="report", description="The report on this run")


def describe(change: Change) -> str:
    """Say in a line whether the student got better, and that it may be chance where it may."""
    points = f"{100 * change.difference:+.1f} points ({100 * change.low:+.1f} .. {100 * change.high:+.1f})"
    p_value = "p < 0.001" if change.p_value < 0.001 else f"p = {change.p_value:.3f}"
    if change.verdict == "inside the noise":
        return f"{change.benchmark}: {points}, {p_value}: inside the noise, no change is shown"
    return f"{change.benchmark}: {points}, {p_value}: the student got {change.verdict}"


def stage_times(store: Store, page: ArtifactRef, started: datetime) -> list[StageTime]:
    """Give what each stage took when its artefacts were made, and how many of them this run found done.

    Args:
        store: the run's.
        page: the run's report; all that it was made of counts.
        started: when this run began.
    """
    manifests = defaultdict(list)
    for manifest in with_ancestors(store, [page]):
        # As a rule a state is stored within its round's training, whose time counts it.
        if manifest.stage != CheckpointJob.stage:
            manifests[manifest.stage].append(manifest)
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
    scores = Table(title="Accuracy", title_justify="left")
    for name in ("benchmark", "model", "accuracy", "95% interval", "questions"):
        scores.add_column(name, justify="left" if name in ("benchmark", "model") else "right")
    for score in result.scores:
        interval = f"{score.low:.1%} .. {score.high:.1%}"
        row = (score.benchmark, score.label, f"{score.accuracy:.1%}", interval, str(score.num_questions))
        scores.add_row(*row)
    stages = Table(title="Time per stage", title_justify="left")
    for name in ("stage", "artefacts", "of which re-used", "seconds"):
        stages.add_column(name, justify="left" if name == "stage" else "right")
    for stage in result.stages:
        stages.add_row(
            stage.stage.replace("_", " "), str(stage.num_artifacts), str(stage.num_reused), f"{stage.seconds:.1f}"
        )
    if result.scores:
        console.print(scores)
    for change in result.changes:
        console.print(describe(change), highlight=False, soft_wrap=True)
    console.print(stages)
    console.print(
        f"This run took {seconds:.0f} s; seconds of re-used artefacts are those of the run that made them.",
        soft_wrap=True,
    )
    console.print(f"The student is that of round {result.chosen_round}.", highlight=False)
    console.print(f"student: {result.checkpoint}", soft_wrap=True)
    console.print(f"report:  {result.report}", soft_wrap=True)
    console.print(f"data:    {result.data_docs}", soft_wrap=True)
    if result.commit is not None:
        console.print(f"lakeFS:  {result.commit}", soft_wrap=True)
