"""New samples teach the champion: `python -m flows.retrain [--config my.toml]`."""

import argparse
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.orchestration import get_client
from prefect.client.schemas.objects import State
from prefect.concurrency.sync import concurrency
from prefect.states import Completed
from prefect.task_runners import ThreadPoolTaskRunner

from flows.command import run_command
from flows.config import LAPTOP, RunConfig
from flows.data import imported_rows
from flows.pipeline import Taught, result_of, teach
from flows.publication import Decision, fetch_student, open_registry, publish_student
from flows.run import open_run, version_of_data
from flows.summary import RunResult, print_result, show_report
from tasks.adapters.registry import Registry
from tasks.artifacts import digest_json
from tasks.promotion import Pair, PromotionJob, promotion
from tasks.stage import RunContext
from vzero_core.errors import ConfigError


@flow(
    name="vzero-retrain",
    flow_run_name="{config.name}, retraining",
    task_runner=ThreadPoolTaskRunner(max_workers=1),  # type: ignore[arg-type]
)
def retrain(config: RunConfig = LAPTOP) -> State[Any] | RunResult:
    """Train the champion on with new samples, and let the result take its place where it is better.

    Nothing is trained where there are no new samples, or fewer than `retrain.min_new`. One retraining at a time: a
    second one waits, and then looks at what the first one left.

    Args:
        config: the whole configuration; in the place of its student, the champion is trained on.
    """
    started = datetime.now(UTC)
    config = _retraining(config)
    registry = open_registry(config)
    assert registry is not None, "checked with the configuration"
    with _alone(registry):
        challenged = registry.last()
        champion = registry.champion()
        if challenged is None or champion is None:
            return Completed(message="there is no champion to train on; run vzero/full-pipeline first")
        if challenged.data == version_of_data(config):
            return Completed(message=f"no new data: the champion {champion.name} was judged by these")
        config = fetch_student(registry, champion.name, config)
        with open_run(config) as run:
            if run.store.find(champion.training_set.stage, champion.training_set.key) is None:
                raise ConfigError(
                    f"store.url must be the store that the champion {champion.name} was made in, {champion.store}, got "
                    f"{run.store.url}; set it"
                )
            rows = run.store.manifest(imported_rows(config, run, champion.training_set)).summary
            if rows["num_rows"] < config.retrain.min_new:
                few = f"{rows['num_rows']} new samples" if rows["num_rows"] else "no new samples"
                reason = f"{few}; a retraining takes {config.retrain.min_new} (retrain.min_new)"
                registry.move(
                    challenged, kind="seen", champion=champion.name, version=None, data=run.data_version, reason=reason
                )
                return Completed(message=reason)
            taught = teach(config, run, previous=champion.training_set, parent=champion.name)
            decision = _decide(config, run, taught)
            published = publish_student(config, run, taught, challenged=challenged, decision=decision)
            result = result_of(run, taught, started, published)
            show_report(result, config)
            return result


def _retraining(config: RunConfig) -> RunConfig:
    """Check what retraining needs, and set its number of rounds.

    Raises:
        ConfigError: something is missing.
    """
    if config.publish.url is None:
        raise ConfigError("publish.url must name where the champion is, got none; set it, and run vzero/full-pipeline")
    if not config.selection.num_prompts and config.retrain.promotion is None:
        raise ConfigError(
            "selection.num_prompts must be more than 0, or retrain.promotion given, for challengers to be judged by, "
            "got neither; set one of them"
        )
    num_rounds = config.retrain.num_rounds or config.rounds.num_rounds
    return config.model_copy(update={"rounds": config.rounds.model_copy(update={"num_rounds": num_rounds})})


@contextmanager
def _alone(registry: Registry) -> Iterator[None]:
    """Hold the one place of the retrainings of a registry; the server frees it where a process dies."""
    name = f"vzero-retrain-{digest_json(registry.url)[:12]}"
    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name(name, limit=1)
    # A server that is away for a while must not end a run of days: who comes between is refused by the history.
    with concurrency(name, strict=True, raise_on_lease_renewal_failure=False):
        yield


def _decide(config: RunConfig, run: RunContext, taught: Taught) -> Decision:
    """Let the stage decide; the student before training is the champion."""
    after = {found.benchmark: found.ref for found in taught.final}
    pairs = [
        Pair(benchmark=found.benchmark, champion=found.ref, challenger=after[found.benchmark])
        for found in taught.before
    ]
    name = config.retrain.promotion.name if config.retrain.promotion is not None else None
    job = PromotionJob(
        criteria=taught.criteria or () if name is None else (),
        split=next((pair for pair in pairs if pair.benchmark == name), None),
        guards=tuple(pair for pair in pairs if pair.benchmark != name),
        margin=config.retrain.margin,
    )
    found = run.store.manifest(promotion(job, run)).summary
    return Decision(promoted=found["promoted"], reason=found["reason"])


def main(arguments: list[str] | None = None) -> int:
    """Retrain from the command line."""
    parser = argparse.ArgumentParser(prog="python -m flows.retrain", description="Train the champion on.")
    parser.add_argument("--config", type=Path, help="TOML configuration; without it the small world's champion learns")
    options = parser.parse_args(arguments)
    started = time.monotonic()
    return run_command(options.config, retrain, lambda result: print_result(result, time.monotonic() - started))


if __name__ == "__main__":
    sys.exit(main())
