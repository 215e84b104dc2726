"""The pipeline, top to bottom. `python -m flows.full_pipeline [--config my.toml]` runs it."""

import argparse
import signal
import sys
import time
from datetime import UTC, datetime
from functools import partial
from pathlib import Path

from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner

from flows.config import PROJECT, RunConfig, load_config
from flows.data import both_views, validated_samples, with_regions
from flows.evaluation import all_have_regions, evaluation_questions, measure_everywhere, measure_on
from flows.garbage import NUM_KEPT_STATES
from flows.plan import check_plan
from flows.round import require_round, train_round
from flows.run import open_run
from flows.selection import Candidates, store_state
from flows.server import prefect_server
from flows.summary import RunResult, changes_of, print_result, scores_of, show_report, stage_times
from flows.terminal import show_on_terminal
from tasks.adapters.models import model_digest, model_folder
from tasks.adapters.training_data import CheckpointJob
from tasks.artifacts import ArtifactRef, Role
from tasks.check_models import CheckModelsJob, ModelJob, check_models, model
from tasks.commit_outputs import CommitOutputsJob, commit_outputs
from tasks.data_docs import DATA_DOCS
from tasks.evaluation_config import HELD_OUT
from tasks.report import ReportJob, RoundRefs, report
from tasks.stage import RunContext
from vzero_core.errors import VZeroError

LAPTOP = RunConfig()


# One thread beside the flow's own: what is submitted goes on while the next shard is sampled, one after the other.
@flow(
    name="vzero",
    flow_run_name="{config.name}, seed {config.seed}",
    task_runner=ThreadPoolTaskRunner(max_workers=1),  # type: ignore[arg-type]
)
def vzero(config: RunConfig = LAPTOP) -> RunResult:
    """Teach the student to see what the teacher sees with the right crop beside the image; no answer is read.

    Args:
        config: the whole configuration; the default is the small world on a laptop.
    """
    started = datetime.now(UTC)
    with open_run(config) as run:
        student, teacher = _name_model(config, run, "student"), _name_model(config, run, "teacher")
        checked = check_models(CheckModelsJob(student=student, teacher=teacher, prompt=config.prompt), run)
        questions = evaluation_questions(config, run, checked)
        samples, docs = validated_samples(config, run, checked)
        check_plan(config, run.store, samples)
        proposed = with_regions(config, run, samples, teacher)
        views = both_views(config, run, proposed or samples)
        require_round(config, run, views)

        before = measure_everywhere(config, run, questions, student, "student, before")
        ask_teacher = partial(measure_on, config, run, questions, HELD_OUT, "teacher", teacher)
        evaluations = before + ask_teacher("teacher, full image")
        if all_have_regions(run, questions):
            evaluations += ask_teacher("teacher, with crop", config.views)

        policy, rounds = student, list[RoundRefs]()
        candidates = Candidates(config, run, teacher, views)
        candidates.consider(0, student)
        with run.progress("rounds", config.rounds.num_rounds) as advance:
            for number in range(1, config.rounds.num_rounds + 1):
                done = train_round(config, run, number, policy, teacher, views)
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
                config=config.model_dump(mode="json", exclude={"store", "placement", "outputs", "tracking"}),
                samples=samples,
                docs=docs,
                regions=proposed,
                views=views,
                rounds=tuple(rounds),
                evaluations=tuple(evaluations),
                criteria=tuple(candidates.criteria),
                selection=selection,
                selected=selected,
            ),
            run,
        )
        commit = _commit_outputs(config, run, proposed or samples, selected, page)
        result = RunResult(
            scores=scores_of(run.store, evaluations),
            changes=changes_of(run.store, before, final),
            stages=stage_times(run.store, page, started),
            chosen_round=chosen,
            policy=policy,
            checkpoint=run.store.path_of(selected, "model"),
            report=run.store.path_of(page, "report.html"),
            data_docs=run.store.path_of(docs, DATA_DOCS),
            commit=commit,
        )
        show_report(result)
        return result


def _name_model(config: RunConfig, run: RunContext, role: Role) -> ArtifactRef:
    folder = model_folder((config.student if role == "student" else config.teacher).path)
    weights = model_digest(folder, Path(config.placement.work_dir) / "model-digests.json")
    return model(ModelJob(weights=weights, role=role), run)


def _commit_outputs(
    config: RunConfig, run: RunContext, samples: ArtifactRef, selected: ArtifactRef, made: ArtifactRef
) -> str | None:
    if config.outputs.repository is None:
        return None
    job = CommitOutputsJob(name=config.name, outputs=config.outputs, samples=samples, selected=selected, report=made)
    done: str = run.store.manifest(commit_outputs(job, run)).summary["commit"]
    return done


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


def main(arguments: list[str] | None = None) -> int:
    """Run the pipeline from the command line."""
    parser = argparse.ArgumentParser(prog="python -m flows.full_pipeline", description="Run the V-Zero pipeline.")
    parser.add_argument("--config", type=Path, help="TOML configuration; without it the small world runs")
    path = parser.parse_args(arguments).config
    show_on_terminal()
    started = time.monotonic()
    # As Ctrl-C: who is ended without a word leaves a Prefect server behind.
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        config = load_config(path) if path else LAPTOP
        with prefect_server(PROJECT / ".vzero" / "prefect") as url:
            print(f"dashboard while this runs: {url.removesuffix('/api')}", flush=True)
            result = vzero(config)
    except VZeroError as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    except KeyboardInterrupt:
        print("stopped; the same command goes on from here", file=sys.stderr)
        return 130
    print_result(result, time.monotonic() - started)
    return 0


if __name__ == "__main__":
    sys.exit(main())
