"""Wiring of measurements: benchmarks are validated, models answer them shard by shard, answers are scored."""

import logging

from flows.config import RunConfig
from flows.run import fingerprint
from tasks.adapters.evaluation import EvaluateJob, PredictJob
from tasks.adapters.scoring import check_aggregate, check_protocol, default_aggregate
from tasks.artifacts import ArtifactRef, Role
from tasks.evaluate import evaluate
from tasks.evaluation_config import HELD_OUT, Aggregate, BenchmarkConfig
from tasks.evaluation_data import EvaluationDataJob, evaluation_data
from tasks.predict import predict, shards
from tasks.report import Evaluation
from tasks.stage import RunContext
from vzero_core.config import ViewConfig

log = logging.getLogger("vzero.evaluation")

Questions = dict[str, ArtifactRef]
"""Validated questions by the name of their benchmark."""


def evaluation_questions(config: RunConfig, run: RunContext, models: ArtifactRef) -> Questions:
    """Validate the questions that models are measured on: the data's own, if any, and the benchmarks."""
    questions = {}
    for name, benchmark in run.benchmarks.items():
        settings = benchmark.config
        job = EvaluationDataJob(
            benchmark=name,
            kind=settings.kind,
            source=benchmark.source,
            models=models,
            max_image_pixels=config.data.max_image_pixels,
            prompt=settings.prompt or config.prompt,
            choice_template=settings.choice_template,
            max_new_tokens=settings.generation.max_new_tokens,
        )
        questions[name] = evaluation_data(job, run)
        for warning in run.store.manifest(questions[name]).summary["warnings"]:
            log.warning("benchmark %s: %s", name, warning)
        # Now, before a model answers what no rule can score.
        samples = benchmark.data.evaluation(questions[name])
        check_protocol(settings.protocol, samples)
        check_aggregate(_aggregate(settings), samples)
    return questions


def measure_on(
    config: RunConfig,
    run: RunContext,
    questions: Questions,
    benchmark: str,
    role: Role,
    policy: ArtifactRef,
    label: str,
    crop: ViewConfig | None = None,
) -> list[Evaluation]:
    """Measure a model on one benchmark; nothing comes of it where the run has no such questions."""
    if benchmark not in questions:
        return []
    settings, data = run.benchmarks[benchmark].config, questions[benchmark]
    # The same questions under another name, to score them otherwise, are not asked again.
    asked_as = next(name for name, other in questions.items() if other.digest == data.digest)
    prompt = settings.prompt or config.prompt
    engine = fingerprint(config.student if role == "student" else config.teacher)
    predictions = [
        predict(
            PredictJob(
                benchmark=asked_as,
                role=role,
                policy=policy,
                data=data,
                crop=crop,
                prompt=prompt,
                choice_template=settings.choice_template,
                generation=settings.generation,
                engine=engine,
                first=first,
                last=last,
            ),
            run,
        )
        for first, last in shards(run.benchmarks[benchmark].data.evaluation(data))
    ]
    job = EvaluateJob(
        benchmark=benchmark,
        kind=settings.kind,
        role=role,
        policy=policy,
        crop=crop,
        data=data,
        prompt=prompt,
        choice_template=settings.choice_template,
        generation=settings.generation,
        engine=engine,
        predictions=tuple(predictions),
        protocol=settings.protocol,
        aggregate=_aggregate(settings),
        judge=settings.judge,
    )
    return [Evaluation(label=label, benchmark=benchmark, ref=evaluate(job, run))]


def _aggregate(settings: BenchmarkConfig) -> Aggregate:
    return settings.aggregate or default_aggregate(settings.kind, settings.protocol)


def measure_everywhere(
    config: RunConfig, run: RunContext, questions: Questions, policy: ArtifactRef, label: str
) -> list[Evaluation]:
    """Measure the student on all benchmarks."""
    return [
        found
        for benchmark in questions
        for found in measure_on(config, run, questions, benchmark, "student", policy, label)
    ]


def all_have_regions(run: RunContext, questions: Questions) -> bool:
    """Tell whether every question of the data's own can be shown with its crop."""
    if HELD_OUT not in questions:
        return False
    summary = run.store.manifest(questions[HELD_OUT]).summary
    return bool(summary["num_regions"] == summary["num_samples"])
