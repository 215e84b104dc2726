"""What makes a function a stage: a Prefect task that asks the store first, and what every stage is given."""

import time
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol, TypeVar

from prefect import Task, task
from prefect.artifacts import create_progress_artifact, update_progress_artifact
from prefect.client.schemas.objects import State, TaskRun
from prefect.context import FlowRunContext, TaskRunContext
from prefect.tasks import exponential_backoff

from tasks.adapters.dataset import Dataset
from tasks.adapters.files import PASSING_ERRNOS
from tasks.adapters.store import Outcome, Store
from tasks.artifacts import ArtifactRef, Job
from tasks.config import FileData, JudgeServerConfig
from tasks.evaluation_config import BenchmarkConfig
from tasks.ports import Advance
from tasks.serve import Engines
from vzero_core.errors import VZeroError

J = TypeVar("J", bound=Job)

_ARTIFACT_INTERVAL = 2.0
"""Seconds between updates of a progress artifact; each one is a request to the server."""


class Terminal(Protocol):
    """Where progress is shown beside the dashboard."""

    def track(self, title: str, total: int) -> Any:
        """Give a context manager whose value is called with the number of items just finished."""


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


@contextmanager
def show_progress(terminal: Terminal, title: str, total: int) -> Iterator[Advance]:
    """Show progress on a terminal and, where it lasts and a flow runs, on the dashboard."""
    done = 0
    artifact: Any = None
    shown = time.monotonic()
    with terminal.track(title, total) as advance_terminal:

        def advance(count: int) -> None:
            nonlocal done, artifact, shown
            done += count
            advance_terminal(count)
            if FlowRunContext.get() is None or time.monotonic() - shown < _ARTIFACT_INTERVAL:
                return
            shown = time.monotonic()
            percent = 100.0 * done / max(total, 1)
            if artifact is None:
                artifact = create_progress_artifact(percent, key=_slug(title), description=title)
            else:
                update_progress_artifact(artifact, percent)

        yield advance
        if artifact is not None:
            update_progress_artifact(artifact, 100.0)


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
            retries=2,
            retry_delay_seconds=exponential_backoff(backoff_factor=2),
            retry_jitter_factor=0.5,
            retry_condition_fn=_can_pass,
        )
        return make_task(run)

    return decorate


def _cache_key(_: TaskRunContext, parameters: dict[str, Any]) -> str:
    job, context = parameters["job"], parameters["context"]
    return f"vzero-{job.stage}-{job.key}-{context.store.identity}"


def _can_pass(_: Task[..., Any], __: TaskRun, state: State[Any]) -> bool:
    """Tell whether an error may be gone at the next try: a broken connection may, bad input may not."""
    error = state.result(raise_on_failure=False)
    # Of these, a server that is away has been waited for already: StoreUnavailableError.
    if isinstance(error, VZeroError):
        return False
    if isinstance(error, ConnectionError | TimeoutError):
        return True
    return isinstance(error, OSError) and error.errno in PASSING_ERRNOS


def _slug(title: str) -> str:
    return "".join(letter if letter.isalnum() else "-" for letter in title.lower()).strip("-")
