"""Publishing: a chosen student as a version, in lakeFS where configured, and on the hub once it is champion."""

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from prefect.client.orchestration import get_client
from prefect.client.schemas.filters import (
    FlowFilter,
    FlowFilterName,
    FlowRunFilter,
    FlowRunFilterState,
    FlowRunFilterStateType,
)
from prefect.client.schemas.objects import StateType
from prefect.concurrency.sync import concurrency

from flows.config import PROJECT, RunConfig, resolve_paths
from flows.pipeline import Taught, described
from flows.run import open_store
from flows.summary import Published
from tasks.adapters.registry import Move, Registry, Version
from tasks.artifacts import digest_json
from tasks.commit_outputs import CommitOutputsJob, commit_outputs, publish_outputs
from tasks.publish import PublishJob, publish, upload
from tasks.stage import RunContext


@dataclass(frozen=True)
class Decision:
    """What was decided on a student that was published, and why."""

    promoted: bool
    reason: str


def open_registry(config: RunConfig) -> Registry | None:
    """Open the registry of published students; None where there is none."""
    config = resolve_paths(config, PROJECT)
    if config.publish.url is None:
        return None
    # Sets also how buckets are reached.
    open_store(config.store, Path(config.placement.work_dir))
    return Registry(config.publish.url)


@contextmanager
def alone(registry: Registry) -> Iterator[None]:
    """Hold the one place of the retrainings of a registry; the server frees it where a process dies."""
    name = f"vzero-retrain-{digest_json(registry.url)[:12]}"
    with get_client(sync_client=True) as client:
        client.upsert_global_concurrency_limit_by_name(name, limit=1)
    # A server that is away for a while must not end a run of days: who comes between is refused by the history.
    with concurrency(name, strict=True, raise_on_lease_renewal_failure=False):
        yield


def is_retraining(config: RunConfig) -> bool:
    """Tell whether a retraining of the same champion runs, or waits to."""
    unfinished = FlowRunFilterStateType(any_=[StateType.SCHEDULED, StateType.PENDING, StateType.RUNNING])
    with get_client(sync_client=True) as client:
        runs = client.read_flow_runs(
            flow_filter=FlowFilter(name=FlowFilterName(any_=["vzero-retrain"])),
            flow_run_filter=FlowRunFilter(state=FlowRunFilterState(type=unfinished)),
        )
    return any(run.parameters.get("config", {}).get("publish", {}).get("url") == config.publish.url for run in runs)


def fetch_student(registry: Registry, name: str, config: RunConfig) -> RunConfig:
    """Give the configuration with a published version for its student, of which a local copy is made.

    Raises:
        RegistryError: there is no such version.
    """
    registry.version(name)
    folder = Path(resolve_paths(config, PROJECT).placement.work_dir) / "published" / name
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        registry.fetch(name, folder)
    return config.model_copy(update={"student": config.student.model_copy(update={"path": str(folder)})})


def publish_student(
    config: RunConfig,
    run: RunContext,
    taught: Taught,
    *,
    challenged: Move | None = None,
    decision: Decision | None = None,
) -> Published:
    """Publish a run's student; it becomes champion where there is none, or where that was decided.

    Args:
        config: the whole configuration.
        run: what the run works with.
        taught: what it made.
        challenged: last move of the registry when the run began, for a retraining.
        decision: on the challenger, for a retraining.

    Raises:
        RegistryError: somebody else moved the champion meanwhile.
    """
    commit = _commit(config, run, taught)
    registry = open_registry(config)
    if registry is None:
        return Published(version=None, champion=None, reason=None, commit=commit)
    last = registry.last() if decision is None else challenged
    parent = last.champion if decision is not None and last is not None else None
    job = PublishJob(
        run=config.name,
        policy=taught.policy,
        selected=taught.selected,
        report=taught.report,
        training_set=taught.training_set,
        samples=taught.samples,
        evaluations=tuple(taught.evaluations),
        data=run.data_version,
        parent=parent,
        config=described(config, parent),
        license=config.publish.license,
    )
    if decision is None:
        decision = _founding(last, job.name)
    version = publish(job, run, registry.url, commit)
    champion = _move(registry, last, version, run.data_version, decision)
    if champion == version.name:
        follow(config, registry, version)
    return Published(version=version.name, champion=champion, reason=decision.reason, commit=commit)


def follow(config: RunConfig, registry: Registry, champion: Version) -> None:
    """Let lakeFS and the hub have the champion too; after the move, which somebody else may have been quicker to make.

    What is done already stays, so that a run that was lost in between is made up for by the next one.
    """
    if config.outputs.repository is not None and config.outputs.publish:
        publish_outputs(champion, config.outputs)
    if config.publish.hub is not None:
        upload(champion, registry.url, config.publish.hub)


def _founding(last: Move | None, name: str) -> Decision:
    if last is None or last.champion is None:
        return Decision(True, "the first one")
    if last.champion == name:
        return Decision(True, "it is already")
    return Decision(
        False,
        f"{last.champion} stays champion: new data challenge it by flows.retrain, you by flows.champion promote {name}",
    )


def _move(registry: Registry, last: Move | None, version: Version, data: str, decision: Decision) -> str | None:
    """Write the decision into the history; nothing is written where nothing was decided anew."""
    champion = last.champion if last is not None else None
    if champion == version.name:
        return champion
    if champion is None:
        return registry.move(
            last, kind="founded", champion=version.name, version=version.name, data=data, reason=decision.reason
        ).champion
    if version.parent is None:
        return champion
    return registry.move(
        last,
        kind="promoted" if decision.promoted else "kept",
        champion=version.name if decision.promoted else champion,
        version=version.name,
        data=data,
        reason=decision.reason,
    ).champion


def _commit(config: RunConfig, run: RunContext, taught: Taught) -> str | None:
    """Commit the outputs in lakeFS, where a repository is configured, and give the commit."""
    if config.outputs.repository is None:
        return None
    job = CommitOutputsJob(
        name=config.name,
        repository=config.outputs.repository,
        base=config.outputs.base,
        samples=taught.samples,
        selected=taught.selected,
        report=taught.report,
    )
    commit: str = run.store.manifest(commit_outputs(job, run)).summary["commit"]
    return commit
