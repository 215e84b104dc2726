"""The pipeline, from data to a published student. `python -m flows.full_pipeline [--config my.toml]` runs it."""

import argparse
import sys
import time
from datetime import UTC, datetime
from pathlib import Path

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed
from prefect.task_runners import ThreadPoolTaskRunner

from flows.command import run_command
from flows.config import LAPTOP, RunConfig
from flows.pipeline import result_of, teach
from flows.publication import open_registry, publish_student
from flows.run import open_run
from flows.summary import RunResult, outcome, print_result, show_report


# One thread beside the flow's own: what is submitted goes on while the next shard is sampled, one after the other.
@flow(
    name="vzero",
    flow_run_name="{config.name}, seed {config.seed}",
    task_runner=ThreadPoolTaskRunner(max_workers=1),  # type: ignore[arg-type]
)
def vzero(config: RunConfig = LAPTOP) -> State[RunResult]:
    """Teach the student to see what the teacher sees with the right crop beside the image; no answer is read.

    Args:
        config: the whole configuration; the default is the small world on a laptop.
    """
    started = datetime.now(UTC)
    # Asked now, because what is wrong with it must not end a run of days.
    if (registry := open_registry(config)) is not None:
        registry.last()
    with open_run(config) as run:
        taught = teach(config, run)
        published = publish_student(config, run, taught)
        result = result_of(run, taught, started, published)
        show_report(result, config)
    return Completed(message=outcome(result), data=result)


def main(arguments: list[str] | None = None) -> int:
    """Run the pipeline from the command line."""
    parser = argparse.ArgumentParser(prog="python -m flows.full_pipeline", description="Run the V-Zero pipeline.")
    parser.add_argument("--config", type=Path, help="TOML configuration; without it the small world runs")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    return run_command(options.config, vzero, lambda result: print_result(result, time.monotonic() - started))


if __name__ == "__main__":
    sys.exit(main())
