"""A published student on the benchmarks: `python -m flows.evaluate [--config my.toml]`."""

import argparse
import sys
from functools import partial
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed

from flows.command import run_command
from flows.config import LAPTOP, RunConfig
from flows.measure import evaluation_questions, measure_everywhere
from flows.pipeline import name_model
from flows.publication import fetch_student, open_registry
from flows.run import open_run
from flows.summary import scores_of, show_scores
from tasks.check_models import CheckModelsJob, check_models
from vzero_core.errors import ConfigError


@flow(name="vzero-evaluate", flow_run_name="{config.name}, evaluation")
def evaluate(config: RunConfig = LAPTOP, version: str | None = None) -> State[Any]:
    """Measure a published student on the data's own questions and on all benchmarks.

    Args:
        config: the whole configuration; in the place of its student, the published one is measured.
        version: its name in the registry; none: the champion.
    """
    registry = open_registry(config)
    if registry is None:
        raise ConfigError("publish.url must name where students are published, got none; set it")
    if version is None:
        champion = registry.champion()
        if champion is None:
            return Completed(message="there is no champion to measure; run vzero/full-pipeline first")
        version = champion.name
    config = fetch_student(registry, version, config)
    # Nothing is asked of the teacher, so it need not be there.
    config = config.model_copy(update={"teacher": config.student})
    with open_run(config) as run:
        student = name_model(config, run, "student")
        checked = check_models(CheckModelsJob(student=student, teacher=student, prompt=config.prompt), run)
        questions = evaluation_questions(config, run, checked)
        scores = scores_of(run.store, measure_everywhere(config, run, questions, student, version))
    if not scores:
        raise ConfigError("there must be questions to measure on, got none; set evaluation_path, or [[benchmarks]]")
    said = f"{version}: " + ", ".join(f"{score.benchmark} {score.accuracy:.1%}" for score in scores)
    show_scores(scores, notes=[said, f"weights {student.digest}"], key="evaluation")
    return Completed(message=said, data=scores)


def main(arguments: list[str] | None = None) -> int:
    """Measure from the command line."""
    parser = argparse.ArgumentParser(prog="python -m flows.evaluate", description="Measure a published student.")
    parser.add_argument("--config", type=Path, help="TOML configuration; without it the small world is asked about")
    parser.add_argument("--version", help="name of the published version; without it the champion")
    options = parser.parse_args(arguments)
    return run_command(options.config, partial(evaluate, version=options.version))


if __name__ == "__main__":
    sys.exit(main())
