"""Publishing: a chosen student as a version, in lakeFS where configured, and on the hub once it is champion."""

from dataclasses import dataclass
from pathlib import Path

from flows.config import PROJECT, RunConfig, resolve_paths
from flows.pipeline import Taught, described
from flows.run import open_store
from flows.summary import Published
from tasks.adapters.registry import Move, Registry, Version
from tasks.artifacts import ArtifactRef
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


def fetch_student(registry: Registry, name: str, config: RunConfig) -> RunConfig:
    """Give the configuration with a published version for its student, of which a local copy is made."""
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
    outputs = _commit(config, run, taught)
    commit = run.store.manifest(outputs[1]).summary["commit"] if outputs is not None else None
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
    champion = _move(registry, last, version, decision)
    if champion == version.name:
        # After the move, which somebody else may have been quicker to make.
        if outputs is not None and config.outputs.publish:
            publish_outputs(outputs[0], run, outputs[1])
        if config.publish.hub is not None:
            upload(version, registry.url, config.publish.hub)
    return Published(version=version.name, champion=champion, reason=decision.reason, commit=commit)


def _founding(last: Move | None, name: str) -> Decision:
    if last is None or last.champion is None:
        return Decision(True, "the first one")
    if last.champion == name:
        return Decision(True, "it is already")
    return Decision(
        False,
        f"{last.champion} stays champion: new data challenge it by flows.retrain, you by flows.champion promote {name}",
    )


def _move(registry: Registry, last: Move | None, version: Version, decision: Decision) -> str | None:
    """Write the decision into the history; nothing is written where nothing was decided anew."""
    champion = last.champion if last is not None else None
    if champion == version.name:
        return champion
    if champion is None:
        return registry.move(
            last, kind="founded", champion=version.name, version=version.name, data=version.data, reason=decision.reason
        ).champion
    if version.parent is None:
        return champion
    return registry.move(
        last,
        kind="promoted" if decision.promoted else "kept",
        champion=version.name if decision.promoted else champion,
        version=version.name,
        data=version.data,
        reason=decision.reason,
    ).champion


def _commit(config: RunConfig, run: RunContext, taught: Taught) -> tuple[CommitOutputsJob, ArtifactRef] | None:
    """Commit the outputs in lakeFS, where a repository is configured."""
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
    return job, commit_outputs(job, run)
