"""The part that training and retraining share: from data and a student to a chosen, measured, reported student."""

from dataclasses import dataclass
from datetime import datetime
from functools import partial
from pathlib import Path
from typing import Any

from flows.config import RunConfig
from flows.data import both_views, imported_rows, training_samples, validated_samples, with_regions
from flows.garbage import NUM_KEPT_STATES
from flows.measure import all_have_regions, evaluation_questions, measure_everywhere, measure_on
from flows.plan import check_plan
from flows.round import require_round, train_round
from flows.selection import Candidates, store_state
from flows.summary import Published, RunResult, changes_of, scores_of, show_run, stage_times
from tasks.adapters.models import model_digest, model_folder
from tasks.adapters.training_data import CheckpointJob
from tasks.artifacts import ArtifactRef, Role
from tasks.check_models import CheckModelsJob, ModelJob, check_models, model
from tasks.data_docs import DATA_DOCS
from tasks.evaluation_config import HELD_OUT
from tasks.report import Evaluation, ReportJob, RoundRefs, report
from tasks.stage import RunContext


@dataclass(frozen=True)
class Taught:
    """What a run made.

    Attributes:
        samples: what was learned from, regions included.
        before: measurements of the student before training.
        final: measurements of the chosen student, on the same questions.
        evaluations: all of them, in the order made.
        criteria: label-free figures of the student before training, and of the chosen one; None where no prompts are
            set aside.
        chosen_round: of the chosen student.
        policy: the chosen student's weights.
        selected: its stored state.
    """

    samples: ArtifactRef
    docs: ArtifactRef
    training_set: ArtifactRef
    before: list[Evaluation]
    final: list[Evaluation]
    evaluations: list[Evaluation]
    criteria: tuple[ArtifactRef, ...] | None
    chosen_round: int
    policy: ArtifactRef
    selected: ArtifactRef
    report: ArtifactRef


def teach(
    config: RunConfig, run: RunContext, *, previous: ArtifactRef | None = None, parent: str | None = None
) -> Taught:
    """Train the student, choose one of its checkpoints, measure it and write the report.

    Args:
        config: the whole configuration; its student is where training starts.
        run: what the run works with.
        previous: training set of the student; None: it was never trained here, and all samples are new.
        parent: published version that the student is.
    """
    student, teacher = name_model(config, run, "student"), name_model(config, run, "teacher")
    show_run(config, run, data=run.data_version, student=student, teacher=teacher, parent=parent)
    checked = check_models(CheckModelsJob(student=student, teacher=teacher, prompt=config.prompt), run)
    questions = evaluation_questions(config, run, checked)
    rows = imported_rows(config, run, previous)
    samples, docs = validated_samples(config, run, rows, checked)
    check_plan(config, run.store, samples)
    proposed = with_regions(config, run, samples, teacher)
    views = both_views(config, run, proposed or samples)
    prompts = training_samples(config, run, rows, views, previous)
    require_round(config, run, prompts)

    before = measure_everywhere(config, run, questions, student, "student, before")
    ask_teacher = partial(measure_on, config, run, questions, HELD_OUT, "teacher", teacher)
    evaluations = before + ask_teacher("teacher, full image")
    if all_have_regions(run, questions):
        evaluations += ask_teacher("teacher, with crop", config.views)

    policy, rounds = student, list[RoundRefs]()
    candidates = Candidates(config, run, teacher, prompts)
    candidates.consider(0, student)
    with run.progress("rounds", config.rounds.num_rounds) as advance:
        for number in range(1, config.rounds.num_rounds + 1):
            done = train_round(config, run, number, policy, teacher, prompts)
            policy = done.train
            rounds.append(done)
            candidates.consider(number, policy)
            _prune(run, rounds, candidates)
            if number % config.evaluate.every == 0 and number < config.rounds.num_rounds:
                label = f"student, round {number}"
                evaluations += measure_on(config, run, questions, HELD_OUT, "student", policy, label)
            advance(1)
    selection = candidates.decide()
    num_rounds = config.rounds.num_rounds
    chosen = num_rounds if selection is None else run.store.manifest(selection).summary["round"]
    label = f"student, after {num_rounds} round{'s' if num_rounds > 1 else ''}"
    if chosen < num_rounds:
        evaluations += measure_on(config, run, questions, HELD_OUT, "student", policy, label)
        label = f"student, round {chosen}, chosen"
    policy = rounds[chosen - 1].train
    final = measure_everywhere(config, run, questions, policy, label)
    # Measured already, under another label, where it was its turn.
    evaluations = [found for found in evaluations if found.ref not in [last.ref for last in final]] + final

    selected = store_state(run, policy)
    run.store.keep(selected)
    page = report(
        ReportJob(
            name=config.name,
            config=described(config, parent),
            samples=samples,
            docs=docs,
            regions=proposed,
            views=views,
            training_set=prompts,
            rounds=tuple(rounds),
            evaluations=tuple(evaluations),
            criteria=tuple(candidates.criteria),
            selection=selection,
            selected=selected,
        ),
        run,
    )
    return Taught(
        samples=proposed or samples,
        docs=docs,
        training_set=prompts,
        before=before,
        final=final,
        evaluations=evaluations,
        criteria=candidates.of(0, chosen),
        chosen_round=chosen,
        policy=policy,
        selected=selected,
        report=page,
    )


def described(config: RunConfig, parent: str | None) -> dict[str, Any]:
    """Give what of a configuration belongs to what was made: not where things lie, nor who is told.

    Args:
        config: the whole configuration.
        parent: published version that the student was, whose local copy the configuration names.
    """
    values = config.model_dump(mode="json", exclude={"store", "placement", "outputs", "publish", "tracking", "retrain"})
    if parent is not None:
        values["student"]["path"] = f"published version {parent}"
    return values | {"benchmarks": [benchmark.model_dump(mode="json") for benchmark in config.measured]}


def result_of(run: RunContext, taught: Taught, started: datetime, published: Published) -> RunResult:
    """Sum up a run for people."""
    store = run.store
    return RunResult(
        scores=scores_of(store, taught.evaluations),
        changes=changes_of(store, taught.before, taught.final),
        stages=stage_times(store, taught.report, started),
        chosen_round=taught.chosen_round,
        policy=taught.policy,
        checkpoint=store.path_of(taught.selected, "model"),
        report=store.path_of(taught.report, "report.html"),
        data_docs=store.path_of(taught.docs, DATA_DOCS),
        published=published,
    )


def name_model(config: RunConfig, run: RunContext, role: Role) -> ArtifactRef:
    """Name a model by its weights."""
    folder = model_folder((config.student if role == "student" else config.teacher).path)
    weights = model_digest(folder, Path(config.placement.work_dir) / "model-digests.json")
    return model(ModelJob(weights=weights, role=role), run)


def _prune(run: RunContext, rounds: list[RoundRefs], candidates: Candidates) -> None:
    """Let go of all training states but the last ones and the one that would be chosen now."""
    states = [
        found.ref
        for done in rounds[-(NUM_KEPT_STATES + 1) * run.checkpoint_every :]
        if (found := run.store.find(CheckpointJob.stage, CheckpointJob(train_key=done.train.key).key)) is not None
    ]
    kept = [*states[-NUM_KEPT_STATES:], candidates.state]
    for ref in [*states[:-NUM_KEPT_STATES], *candidates.superseded]:
        if ref not in kept:
            run.store.prune(ref)
    candidates.superseded = [ref for ref in candidates.superseded if ref in kept]
