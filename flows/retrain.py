"""New samples teach the champion: `python -m flows.retrain [--config my.toml]`."""

import argparse
import sys
import time
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from prefect import flow
from prefect.client.schemas.objects import State
from prefect.states import Completed
from prefect.task_runners import ThreadPoolTaskRunner

from flows.command import run_command
from flows.config import LAPTOP, RunConfig
from flows.data import imported_rows
from flows.pipeline import Taught, result_of, teach
from flows.publication import Decision, alone, fetch_student, follow, open_registry, publish_student
from flows.run import open_run, version_of_data
from flows.summary import outcome, print_result, show_report
from tasks.adapters.registry import Move, Registry, Version
from tasks.promotion import Pair, PromotionJob, promotion
from tasks.stage import RunContext
from vzero_core.errors import ConfigError, InputError


@flow(
    name="vzero-retrain",
    flow_run_name="{config.name}, retraining",
    task_runner=ThreadPoolTaskRunner(max_workers=1),  # type: ignore[arg-type]
)
def retrain(config: RunConfig = LAPTOP) -> State[Any]:
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
    with alone(registry):
        challenged = registry.last()
        champion = registry.champion()
        if challenged is None or champion is None:
            return Completed(message="there is no champion to train on; run vzero/full-pipeline first")
        # By hand, what was looked at is looked at again: settings may be others now.
        if challenged.data == version_of_data(config) and challenged.kind != "seen":
            # Of a run that was lost just after it had made this champion.
            follow(config, registry, champion)
            return Completed(message=f"no new data: the champion is {champion.name} ({challenged.reason})")
        config = fetch_student(registry, champion.name, config)
        with open_run(config) as run:
            _require_store(run, champion)
            try:
                waiting = _too_few(config, run, registry, champion)
                if waiting is not None:
                    _remember(registry, challenged, run.data_version, waiting)
                    return Completed(message=waiting)
                taught = teach(config, run, previous=champion.training_set, parent=champion.name)
            except InputError as error:
                # It would come again at every poll; with other data, or by hand, there is a new try.
                _remember(registry, challenged, run.data_version, str(error).partition("\n")[0])
                raise
            decision = _decide(config, run, taught)
            published = publish_student(config, run, taught, challenged=challenged, decision=decision)
            result = result_of(run, taught, started, published)
            show_report(result, config)
            return Completed(message=outcome(result), data=result)


def _require_store(run: RunContext, champion: Version) -> None:
    """Make sure that what the champion learned is known here.

    Raises:
        ConfigError: it is not.
    """
    if run.store.find(champion.training_set.stage, champion.training_set.key) is None:
        raise ConfigError(
            f"store.url must be the store that the champion {champion.name} was made in, {champion.store}, got "
            f"{run.store.url}; set it"
        )


def _too_few(config: RunConfig, run: RunContext, registry: Registry, champion: Version) -> str | None:
    """Say that there are too few new rows for a retraining; None where there are enough.

    Rows that the champion was challenged with before are trained on again, but it takes others to start it.
    """
    rows = imported_rows(config, run, champion.training_set)
    new = run.dataset.seen(rows)
    # Of those in the history: one that is not was published by a run that was lost before it decided.
    for name in {move.version for move in registry.history() if move.kind in ("promoted", "kept")}:
        version = registry.version(str(name))
        if version.parent == champion.name:
            new -= run.dataset.seen(version.training_set)
    if len(new) >= config.retrain.min_new:
        return None
    unread = run.store.manifest(rows).summary["num_bad"]
    few = f"{len(new)} new samples" if new else "no new samples"
    few += f", {unread} rows that cannot be read" if unread else ""
    return f"{few}; a retraining takes {config.retrain.min_new} (retrain.min_new)"


def _remember(registry: Registry, challenged: Move, data: str, reason: str) -> None:
    """Note that the data were looked at, so that no poll finds them again."""
    if (challenged.kind, challenged.data, challenged.reason) != ("seen", data, reason):
        registry.move(challenged, kind="seen", champion=challenged.champion, version=None, data=data, reason=reason)


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
        samples=taught.training_set,
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
