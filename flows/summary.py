"""What a person sees of a run: its artifacts on the dashboard (docs/DASHBOARD.md), and the tables at its end."""

import json
import re
from collections import defaultdict
from collections.abc import Iterable, Sequence
from datetime import datetime
from typing import Any
from urllib.parse import quote

from pydantic import BaseModel, TypeAdapter
from rich.console import Console
from rich.table import Table

from flows.config import PROJECT, RunConfig, resolve_paths
from tasks.adapters.ancestors import with_ancestors
from tasks.adapters.curves import Figures, round_figures
from tasks.adapters.evaluation import compare_evaluations
from tasks.adapters.gate_verdict import GateVerdict, gate_verdict
from tasks.adapters.origins import cost_of
from tasks.adapters.store import Store
from tasks.adapters.training_data import CheckpointJob
from tasks.artifacts import ArtifactRef
from tasks.config import FileData, ModelConfig, SmallWorldData, VLLMEngine
from tasks.dashboard import Board, duration, telling
from tasks.report import Evaluation, RoundRefs
from tasks.stage import RunContext
from vzero_core.config import Gate

_NUM_SHOWN_ROUNDS = 100
"""Rounds on the dashboard, the last ones; the report has all of them."""
_COLUMNS = {
    "loss": "loss",
    "divergence": "divergence_k1",
    "support": "support_positive",
    "evidence": "evidence_score",
    "spread": "mean_spread",
    "effective share": "effective_sample_share",
    "seconds": "wall_seconds",
    "sampled/s": "sampled_per_second",
    "replayed/s": "replayed_per_second",
    "trained/s": "trained_per_second",
    "length": "response_length",
    "truncated": "truncated_share",
    "entropy": "entropy",
    "skipped updates": "num_skipped_updates",
}
"""Figures of a round on the dashboard, by what they are called there (docs/REPORT.md says what they mean)."""
_HEALTHY = {
    "mean_spread": "well above gate.min_spread, and not falling",
    "share_below_min_spread": "below a half",
    "share_at_w_min": "with the next one, below 80%",
    "share_at_w_max": "with the one above, below 80%",
    "effective_sample_share": "between a third and 99%",
    "weight_length_correlation": "near 0, within ±0.3",
    "mean_token_weight": "well above the floor, and rising",
}
"""What is healthy in a gate's figures."""


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
    cpu_seconds: float | None
    """None where it was not measured, as below."""
    gpu_seconds: float | None
    num_tokens: int | None


class Published(BaseModel):
    """Where a run's student went."""

    version: str | None
    """Its name in the registry; None where nothing is published."""
    champion: str | None
    """Who is champion after the run."""
    reason: str | None
    """Why it is champion, or why not."""
    commit: str | None
    """lakeFS commit of the outputs."""


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
    published: Published


@telling()
def show_run(
    config: RunConfig, run: RunContext, *, data: str, student: ArtifactRef, teacher: ArtifactRef, parent: str | None
) -> None:
    """Leave on the dashboard what is about to run: on which data, with which weights, and where it goes."""
    source = config.data.source
    rows = {
        "data": _source(source),
        "version of the data": _code(data),
        "student": _model(run, config.student, student, parent),
        "teacher": _model(run, config.teacher, teacher, None),
        "rounds": f"{config.rounds.num_rounds}, of {config.rounds.prompts_per_round} prompts with "
        f"{config.sampling.num_responses} responses each",
        "gate, loss": f"{config.gate.kind}, {config.loss.kind}",
        "measured on": ", ".join(run.benchmarks) or "nothing: no accuracy is measured",
        "seed": str(config.seed),
        "store": _code(run.store.url),
        "report": "at the end, in the artifact `report`",
    }
    if config.publish.url is not None:
        rows["published to"] = _code(_without_password(config.publish.url))
    text = "\n".join(["| | |", "|---|---|", *(f"| {name} | {value} |" for name, value in rows.items())])
    Board("run").put("markdown", "run", text, f"{config.rounds.num_rounds} rounds on {_source(source)}")


def _source(source: SmallWorldData | FileData) -> str:
    if isinstance(source, SmallWorldData):
        return f"the small world, {source.num_prompts:,} prompts"
    return f"{source.kind}: {_code(_without_password(source.path))}"


def _model(run: RunContext, config: ModelConfig, ref: ArtifactRef, parent: str | None) -> str:
    weights = run.store.manifest(ref).job["weights"]
    engine = f"vLLM {config.engine.version}" if isinstance(config.engine, VLLMEngine) else "transformers"
    what = f"published version {_code(parent)}" if parent is not None else _code(config.path)
    return f"{what}, weights {_code(weights[:12])}, {config.dtype}, {engine}"


def _code(text: str) -> str:
    """Let Markdown show a text as it is."""
    return "`" + text.replace("`", "'").replace("|", "\\|") + "`"


def _block(text: str) -> str:
    """Let Markdown show a text as it is, with a bar to scroll by where it is long."""
    return f"```text\n{text}\n```"


def _without_password(url: str) -> str:
    return re.sub(r"//[^/@]*@", "//", url)


@telling()
def show_round(store: Store, refs: RoundRefs) -> None:
    """Leave a round's figures on the dashboard, below those before it, and whether its gate is healthy."""
    figures = round_figures(store, refs.round, refs.rollouts, refs.replays, refs.gate, refs.train)
    gate = TypeAdapter[Gate](Gate).validate_python(store.manifest(refs.gate).job["gate"])
    verdict = gate_verdict(figures, gate)
    row = {
        "round": refs.round,
        "gate": verdict.word,
        **{name: _rounded(figures.get(figure)) for name, figure in _COLUMNS.items() if figures.get(figure) is not None},
    }
    board = Board("rounds", "gate")
    # A round that is made again, in a flow run that was tried again, takes its own place.
    earlier = [shown for shown in json.loads(board.data("rounds") or "[]") if shown["round"] < refs.round]
    # The dashboard shows ten rows at a time: the last rounds come first.
    rows = [row, *earlier][:_NUM_SHOWN_ROUNDS]
    took = duration(figures["wall_seconds"] or 0.0)
    board.put("table", "rounds", json.dumps(rows), f"Round {refs.round} took {took}; its gate: {verdict.word}")
    board.put("markdown", "gate", _gate_text(refs.round, figures, verdict), f"Round {refs.round}: {verdict.word}")


def _gate_text(number: int, figures: Figures, verdict: GateVerdict) -> str:
    lines = [f"**Round {number}: {verdict.word}.**", "", *(f"- {reason}" for reason in verdict.reasons)]
    known = {name: _HEALTHY[name] for name in _HEALTHY if figures.get(name) is not None}
    if known:
        lines += ["", "| figure | value | healthy |", "|---|---|---|"]
        lines += [f"| {name.replace('_', ' ')} | {_rounded(figures[name])} | {good} |" for name, good in known.items()]
    return "\n".join(lines)


def _rounded(value: float | None) -> float | None:
    """Keep four digits that count; whole numbers stay whole."""
    return value if value is None or isinstance(value, int) else float(f"{value:.4g}")


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


@telling()
def show_scores(
    scores: Sequence[Score], changes: Sequence[Change] = (), notes: Sequence[str] = (), key: str = "result"
) -> None:
    """Leave scores on the dashboard.

    Args:
        scores: in the order measured.
        changes: of the student before and after.
        notes: what else is to be said of the result, first.
        key: of the artifact.
    """
    lines = ["| benchmark | model | accuracy | 95% interval | questions |", "|---|---|---|---|---|"]
    lines += [
        f"| {score.benchmark} | {score.label} | {score.accuracy:.1%} | {score.low:.1%} to {score.high:.1%} "
        f"| {score.num_questions} |"
        for score in scores
    ]
    said = [*notes, *map(describe, changes)]
    text = "\n".join([*(lines if scores else ["No accuracy was measured."]), "", *(f"- {line}" for line in said)])
    Board(key).put("markdown", key, text, "; ".join(said) or "Scores with their intervals")


@telling()
def show_report(result: RunResult, config: RunConfig) -> None:
    """Leave the result, its cost and the report's address on the dashboard."""
    notes = [outcome(result), f"the student is that of round {result.chosen_round}"]
    show_scores(result.scores, result.changes, notes)
    board = Board("report", "cost")
    costs, total = _costs(result.stages)
    board.put("table", "cost", json.dumps(costs), total)
    store = resolve_paths(config, PROJECT).store
    if store.web_url is None:
        text = f"{_block(result.report)}\n\nThis is no link, because browsers open no files from a server's page."
    else:
        path = result.report.removeprefix(store.url).lstrip("/")
        text = f"[report.html]({store.web_url.rstrip('/')}/{quote(path)})\n\n{_block(result.report)}"
    board.put("markdown", "report", text, "The report on this run")


def outcome(result: RunResult) -> str:
    """Say in a line what became of a run's student."""
    published = result.published
    if published.version is None:
        return f"the student of round {result.chosen_round}, not published"
    what = "champion" if published.champion == published.version else "not champion"
    return f"{published.version}, {what}: {published.reason}"


def _costs(stages: Sequence[StageTime]) -> tuple[list[dict[str, Any]], str]:
    """Give the rows of a table, the total and the dearest stages first, and a line that sums it up."""
    total = StageTime(
        stage="total",
        num_artifacts=sum(stage.num_artifacts for stage in stages),
        num_reused=sum(stage.num_reused for stage in stages),
        seconds=sum(stage.seconds for stage in stages),
        cpu_seconds=_sum(stage.cpu_seconds for stage in stages),
        gpu_seconds=_sum(stage.gpu_seconds for stage in stages),
        num_tokens=_sum(stage.num_tokens for stage in stages),
    )
    rows = [
        {
            "stage": stage.stage.replace("_", " "),
            "artefacts": stage.num_artifacts,
            "of which re-used": stage.num_reused,
            "seconds": round(stage.seconds, 1),
            "CPU seconds": None if stage.cpu_seconds is None else round(stage.cpu_seconds, 1),
            "GPU seconds": None if stage.gpu_seconds is None else round(stage.gpu_seconds, 1),
            "tokens": stage.num_tokens,
        }
        for stage in [total, *sorted(stages, key=lambda stage: -stage.seconds)]
    ]
    line = duration(total.seconds)
    if total.gpu_seconds is not None:
        line += f", {duration(total.gpu_seconds)} of GPU time"
    if total.num_tokens is not None:
        line += f", {total.num_tokens:,} tokens"
    return rows, f"{line}; what was re-used counts with what it took when it was made"


def _sum(values: Iterable[Any]) -> Any:
    """Add up what is known; None where nothing is."""
    known = [value for value in values if value is not None]
    return sum(known) if known else None


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
            num_artifacts=cost.num_artifacts,
            num_reused=sum(manifest.created_at < started for manifest in found),
            seconds=cost.seconds,
            cpu_seconds=cost.cpu_seconds,
            gpu_seconds=cost.gpu_seconds,
            num_tokens=cost.num_tokens,
        )
        for stage, found in manifests.items()
        for cost in [cost_of(found)]
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
    if result.published.version is not None:
        console.print(f"version: {outcome(result)}", soft_wrap=True, highlight=False)
    if result.published.commit is not None:
        console.print(f"lakeFS:  {result.published.commit}", soft_wrap=True)
