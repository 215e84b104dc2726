"""What makes a function a stage: a Prefect task that asks the store first, and what every stage is given."""

from collections.abc import Callable
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, TypeVar

from prefect import Task, task
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import TaskRunContext
from prefect.tasks import exponential_backoff

from tasks.adapters.dataset import Dataset
from tasks.adapters.files import PASSING_ERRNOS
from tasks.adapters.store import Outcome, Store
from tasks.artifacts import ArtifactRef, Job
from tasks.config import FileData, JudgeServerConfig
from tasks.dashboard import Terminal, show_progress
from tasks.evaluation_config import BenchmarkConfig
from tasks.ports import Advance
from tasks.serve import Engines
from vzero_core.errors import VZeroError

J = TypeVar("J", bound=Job)


@dataclass(frozen=True)
class Benchmark:
    """Questions that models are measured on, and what reads their images."""

    config: BenchmarkConfig
    data: Dataset
    source: str
    """Digest of its files before they are read."""


@dataclass(frozen=True)
class RunContext:
    """Where and how a run works; nothing of it enters any key."""

    store: Store
    data: FileData
    data_version: str
    compared: dict[str, FileData | BenchmarkConfig]
    """Evaluation data that training is kept clear of, by its digest."""
    dataset: Dataset
    benchmarks: dict[str, Benchmark]
    """By name; the data's own held-out questions are the one called `HELD_OUT`."""
    judge: JudgeServerConfig
    engines: Engines
    terminal: Terminal
    checkpoint_every: int
    image_threads: int

    def progress(self, title: str, total: int) -> AbstractContextManager[Advance]:
        """Show the progress of a stage on the terminal and, where it lasts, on the dashboard."""
        return show_progress(self.terminal, title, total)


def _can_pass(_: Task[..., Any], __: TaskRun, state: State[Any]) -> bool:
    """Tell whether an error may be gone at the next try: a broken connection may, bad input may not."""
    error = state.result(raise_on_failure=False)
    # Of these, a server that is away has been waited for already: StoreUnavailableError.
    if isinstance(error, VZeroError):
        return False
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    return isinstance(error, OSError) and error.errno in PASSING_ERRNOS


retrying: dict[str, Any] = {
    "retries": 2,
    "retry_delay_seconds": exponential_backoff(backoff_factor=2),
    "retry_jitter_factor": 0.5,
    "retry_condition_fn": _can_pass,
}
"""Arguments of a Prefect task that is tried again after an error that may pass."""


def stage(
    job_type: type[J],
) -> Callable[[Callable[[J, RunContext, Path], Outcome]], Task[[J, RunContext], ArtifactRef]]:
    """Make a stage of a function that writes a job's files into an empty folder.

    The task gives the artefact that is committed under the job's key, and calls the function only where there is
    none. Prefect's cache has the same key, and the store's identity, so that it never outlives the store.
    """

    def decorate(make: Callable[[J, RunContext, Path], Outcome]) -> Task[[J, RunContext], ArtifactRef]:
        def run(job: J, context: RunContext) -> ArtifactRef:
            return context.store.produce(job, lambda folder: make(job, context, folder))

        run.__doc__ = make.__doc__
        make_task = task(
            name=job_type.stage.replace("_", " "),
            task_run_name="{job.title}",
            cache_key_fn=_cache_key,
            persist_result=True,
            result_serializer="json",
            **retrying,
        )
        return make_task(run)

    return decorate


def _cache_key(_: TaskRunContext, parameters: dict[str, Any]) -> str:
    job, context = parameters["job"], parameters["context"]
    return f"vzero-{job.stage}-{job.key}-{context.store.identity}"
