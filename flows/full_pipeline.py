"""The pipeline, top to bottom. `python -m flows.full_pipeline [--config my.toml]` runs it."""

import argparse
import signal
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from prefect import flow
from prefect.task_runners import ThreadPoolTaskRunner

from flows.config import PROJECT, RunConfig, load_config
from flows.data import all_have_regions, both_views, evaluation_questions, validated_samples, with_regions
from flows.garbage import NUM_KEPT_STATES
from flows.plan import check_plan
from flows.round import train_round
from flows.run import fingerprint, open_run
from flows.server import prefect_server
from flows.summary import RunResult, print_result, scores_of, stage_times
from flows.terminal import show_on_terminal
from tasks.adapters.models import model_digest, model_folder
from tasks.adapters.training_data import CheckpointJob
from tasks.artifacts import ArtifactRef, Role
from tasks.check_models import CheckModelsJob, ModelJob, check_models, model
from tasks.commit_outputs import CommitOutputsJob, commit_outputs
from tasks.data_docs import DATA_DOCS
from tasks.evaluate import EvaluateJob, evaluate
from tasks.report import Evaluation, ReportJob, RoundRefs, report
from tasks.stage import RunContext
from tasks.train import checkpoint
from vzero_core.config import ViewConfig
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

        evaluations = _evaluate(config, run, questions, "student", student, "student, before")
        evaluations += _evaluate(config, run, questions, "teacher", teacher, "teacher, full image")
        if questions is not None and all_have_regions(run, questions):
            evaluations += _evaluate(config, run, questions, "teacher", teacher, "teacher, with crop", config.views)

        policy, rounds = student, list[RoundRefs]()
        with run.progress("rounds", config.rounds.num_rounds) as advance:
            for number in range(1, config.rounds.num_rounds + 1):
                done = train_round(config, run, number, policy, teacher, views)
                policy = done.train
                rounds.append(done)
                _prune(run, rounds)
                if number % config.evaluate.every == 0 and number < config.rounds.num_rounds:
                    evaluations += _evaluate(config, run, questions, "student", policy, f"student, round {number}")
                advance(1)
        num_rounds = config.rounds.num_rounds
        last = f"student, after {num_rounds} round{'s' if num_rounds > 1 else ''}"
        evaluations += _evaluate(config, run, questions, "student", policy, last)

        selected = checkpoint(CheckpointJob(train_key=policy.key), run)
        run.store.keep(selected)
        page = report(
            ReportJob(
                name=config.name,
                config=config.model_dump(mode="json", exclude={"store", "placement", "outputs", "tracking"}),
                samples=samples,
                regions=proposed,
                views=views,
                rounds=tuple(rounds),
                evaluations=tuple(evaluations),
                selected=selected,
            ),
            run,
        )
        commit = _commit_outputs(config, run, proposed or samples, selected, page)
        data = [ref for ref in (questions, samples, docs, proposed, views) if ref is not None]
        behind = [ref for made in data for ref in run.store.manifest(made).inputs.values()]
        refs = list(dict.fromkeys([student, teacher, checked, *behind, *data]))
        refs += [ref for done in rounds for ref in done.refs()]
        refs += [*(evaluation.ref for evaluation in evaluations), page]
        return RunResult(
            scores=scores_of(run.store, evaluations),
            stages=stage_times(run.store, refs, started),
            policy=policy,
            checkpoint=run.store.path_of(selected, "model"),
            report=run.store.path_of(page, "report.html"),
            data_docs=run.store.path_of(docs, DATA_DOCS),
            commit=commit,
        )


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


def _evaluate(
    config: RunConfig,
    run: RunContext,
    questions: ArtifactRef | None,
    role: Role,
    policy: ArtifactRef,
    label: str,
    crop: ViewConfig | None = None,
) -> list[Evaluation]:
    if questions is None:
        return []
    job = EvaluateJob(
        role=role,
        policy=policy,
        data=questions,
        crop=crop,
        prompt=config.prompt,
        answer_pattern=config.evaluate.answer_pattern,
        max_new_tokens=config.evaluate.max_new_tokens,
        engine=fingerprint(config.student if role == "student" else config.teacher),
    )
    return [Evaluation(label=label, ref=evaluate(job, run))]


def _prune(run: RunContext, rounds: list[RoundRefs]) -> None:
    states = [
        found.ref
        for done in rounds[-(NUM_KEPT_STATES + 1) * run.checkpoint_every :]
        if (found := run.store.find(CheckpointJob.stage, CheckpointJob(train_key=done.train.key).key)) is not None
    ]
    for ref in states[:-NUM_KEPT_STATES]:
        run.store.prune(ref)


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
