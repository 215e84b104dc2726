"""What a flow run shows of itself on the dashboard: artifacts, one of each key, which it brings up to date.

Updated rather than made anew: a run's page holds a few artifacts, however many rounds it has, and the history of a key
has one entry for each run.
"""

import logging
import time
from collections import deque
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, Literal, Protocol
from uuid import UUID

import httpx
from prefect.client.orchestration import get_client
from prefect.client.schemas.actions import ArtifactCreate, ArtifactUpdate
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId, ArtifactFilterKey
from prefect.context import FlowRunContext, TaskRunContext

from tasks.ports import Advance

log = logging.getLogger("vzero.dashboard")

_INTERVAL = 2.0
"""Seconds between updates of a progress artifact; each one is a request to the server."""
_NUM_MARKS = 8
"""Updates that a rate is measured over, so that it follows a run that became slower."""


class Board:
    """Artifacts of the flow run that is running."""

    def __init__(self, *keys: str) -> None:
        """Find those of these keys that it has; one request."""
        self._flow_run = flow_run_id()
        wanted = ArtifactFilter(
            key=ArtifactFilterKey(any_=list(keys)), flow_run_id=ArtifactFilterFlowRunId(any_=[self._flow_run])
        )
        with get_client(sync_client=True) as client:
            self._found = {artifact.key: artifact for artifact in client.read_artifacts(artifact_filter=wanted)}

    def data(self, key: str) -> Any:
        """Give what an artifact holds; None where there is none yet."""
        return self._found[key].data if key in self._found else None

    def put(
        self, kind: Literal["markdown", "table", "progress"], key: str, data: str | float, description: str
    ) -> None:
        """Make an artifact, or bring it up to date; one request.

        Args:
            kind: decides how the dashboard shows it.
            key: lower-case letters, digits and dashes.
            data: the text; of a table, a JSON list of objects; of progress, per cent.
            description: a line that is shown in lists of artifacts.
        """
        with get_client(sync_client=True) as client:
            if key in self._found:
                try:
                    client.update_artifact(self._found[key].id, ArtifactUpdate(data=data, description=description))
                    return
                except httpx.HTTPStatusError as error:
                    if error.response.status_code != httpx.codes.NOT_FOUND:
                        raise
                    # Somebody deleted it.
            # Of the flow run alone: the task run that happens to be the first to show something is not its only one.
            self._found[key] = client.create_artifact(
                ArtifactCreate(type=kind, key=key, data=data, description=description, flow_run_id=self._flow_run)
            )


@contextmanager
def telling() -> Iterator[None]:
    """Do without the dashboard where its server is away: a run of days goes on, and a warning says so."""
    try:
        yield
    except httpx.HTTPError as error:
        log.warning("the dashboard could not be told; the run goes on: %s", error)


def flow_run_id() -> UUID:
    """Give the flow run that is running."""
    context = FlowRunContext.get()
    assert context is not None, "called within a flow"
    assert context.flow_run is not None, "it is running"
    return context.flow_run.id


class Terminal(Protocol):
    """Where progress is shown beside the dashboard."""

    def track(self, title: str, total: int) -> Any:
        """Give a context manager whose value is called with the number of items just finished."""


@contextmanager
def show_progress(terminal: Terminal, title: str, total: int) -> Iterator[Advance]:
    """Show progress on a terminal and, where it lasts and a flow runs, on the dashboard."""
    started = shown = time.monotonic()
    marks = deque([(started, 0)], maxlen=_NUM_MARKS)
    done = 0
    board: Board | None = None
    with terminal.track(title, total) as advance_terminal:

        def advance(count: int) -> None:
            nonlocal done, board, shown
            done += count
            advance_terminal(count)
            now = time.monotonic()
            if FlowRunContext.get() is None or now - shown < _INTERVAL:
                return
            shown = now
            marks.append((now, done))
            key = _progress_key(title)
            # What was found done at the start of a run that goes on says nothing about its pace.
            since, before = marks[0] if len(marks) < 3 else marks[1]
            left = (total - done) * (now - since) / (done - before) if done > before else None
            pace = _pace(done - before, now - since)
            line = f"{title}: {done} of {total}{pace}" + (f", {duration(left)} left" if left is not None else "")
            with telling():
                board = board or Board(key)
                board.put("progress", key, 100.0 * done / max(total, 1), line)

        yield advance
        if board is not None:
            seconds = time.monotonic() - started
            line = f"{title}: done in {duration(seconds)}{_pace(done, seconds)}"
            with telling():
                board.put("progress", _progress_key(title), 100.0, line)


def _progress_key(title: str) -> str:
    """Name what makes progress: the stage, whatever round it is in; outside of any, the thing itself."""
    context = TaskRunContext.get()
    name = title if context is None else context.task.name
    return "progress-" + "".join(letter if letter.isalnum() else "-" for letter in name.lower()).strip("-")


def _pace(count: int, seconds: float) -> str:
    if count <= 0 or seconds <= 0:
        return ""
    if count > seconds:
        return f", {count / seconds:,.3g} per second"
    return f", {duration(seconds / count)} each"


def duration(seconds: float) -> str:
    """Write a time as a person would: 2.1 s, 48 s, 3 min 20 s, 2 h 5 min, 3 d 4 h."""
    if seconds < 9.95:
        return f"{seconds:.1f} s"
    whole = round(seconds)
    for large, small, in_large, in_small in (("d", "h", 86400, 3600), ("h", "min", 3600, 60), ("min", "s", 60, 1)):
        if whole >= in_large:
            rest = whole % in_large // in_small
            return f"{whole // in_large} {large}" + (f" {rest} {small}" if rest else "")
    return f"{whole} s"
