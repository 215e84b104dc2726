"""Publishing: a chosen student as a version of the registry, with its card, and the champion on the hub."""

from datetime import UTC, datetime

from prefect import task
from prefect.cache_policies import NO_CACHE

from tasks.adapters.hub import upload_version
from tasks.adapters.model_card import PublishJob as PublishJob
from tasks.adapters.model_card import build_card
from tasks.adapters.registry import CARD, MODEL, Registry, Version, list_files
from tasks.stage import RunContext, retrying


@task(name="publish", task_run_name="{job.title}", cache_policy=NO_CACHE, **retrying)
def publish(job: PublishJob, context: RunContext, url: str, commit: str | None) -> Version:
    """Copy a checkpoint and its card to the registry; what is there already stays.

    Args:
        job: what is published.
        context: of the run, for its store.
        url: the registry's.
        commit: lakeFS commit of the run's outputs.

    Raises:
        RegistryError: other files are there under the version's name.
    """
    registry = Registry(url)
    # Published before, perhaps by a release of this project whose cards were written otherwise.
    if (found := registry.find(job.name)) is not None:
        return found
    with context.store.scratch("publish") as folder:
        context.store.fetch(job.selected, MODEL, folder / MODEL)
        (folder / CARD).write_text(build_card(job, context.store, commit), encoding="utf-8")
        version = Version(
            name=job.name,
            run=job.run,
            created_at=datetime.now(UTC),
            parent=job.parent,
            policy=job.policy,
            selected=job.selected,
            report=job.report,
            training_set=job.training_set,
            data=job.data,
            store=context.store.url,
            commit=commit,
            files=list_files(folder),
        )
        registry.add(version, folder)
    return registry.version(job.name)


@task(name="upload to the hub", task_run_name="upload {version.name}", cache_policy=NO_CACHE, **retrying)
def upload(version: Version, url: str, repository: str) -> str:
    """Upload a version to the Hugging Face hub, and give its address there; what is there already stays.

    Args:
        version: of the registry.
        url: the registry's.
        repository: OWNER/NAME on the hub.

    Raises:
        ConfigError: there is no token in the environment.
        StoreError: the hub refuses, or does not answer for long.
    """
    return upload_version(Registry(url), version.name, repository)
