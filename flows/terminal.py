"""Progress beside the dashboard: bars on a terminal, a line now and then in a log."""

import logging
import sys
import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager

from prefect.logging.handlers import PrefectConsoleHandler
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from tasks.ports import Advance

LINE_INTERVAL = 10.0
"""Seconds between the lines of one item in a log."""


class ProgressBars:
    """Bars that redraw themselves; an inner one leaves when it is done."""

    def __init__(self, console: Console) -> None:
        """Draw on a console."""
        columns = (
            TextColumn("{task.description:<22}"),
            BarColumn(bar_width=30),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TimeRemainingColumn(),
        )
        self._progress = Progress(*columns, console=console, transient=True)
        self._num_open = 0
        # A shard is replayed in a thread of its own.
        self._lock = threading.Lock()

    @contextmanager
    def track(self, title: str, total: int) -> Iterator[Advance]:
        """Show one item's progress."""
        with self._lock:
            if self._num_open == 0:
                self._progress.start()
            self._num_open += 1
        bar = self._progress.add_task(title, total=total)
        try:
            yield lambda count: self._progress.advance(bar, count)
        finally:
            self._progress.remove_task(bar)
            with self._lock:
                self._num_open -= 1
                if self._num_open == 0:
                    self._progress.stop()


class ProgressLines:
    """Plain lines, few of them, for logs and pipes."""

    @contextmanager
    def track(self, title: str, total: int) -> Iterator[Advance]:
        """Say now and then how far one item is."""
        done, started = 0, time.monotonic()
        shown = started

        def advance(count: int) -> None:
            nonlocal done, shown
            done += count
            if time.monotonic() - shown >= LINE_INTERVAL:
                shown = time.monotonic()
                print(f"{title}: {done}/{total}, {shown - started:.0f} s", file=sys.stderr, flush=True)

        yield advance


def make_terminal() -> ProgressBars | ProgressLines:
    """Give bars where standard error is a terminal, else lines."""
    console = Console(stderr=True)
    return ProgressBars(console) if console.is_terminal else ProgressLines()


def show_on_terminal() -> None:
    """Let this project's warnings through to the terminal, and leave Prefect's log to the dashboard."""
    for handler in logging.getLogger().handlers:
        if isinstance(handler, PrefectConsoleHandler):
            handler.setLevel(logging.CRITICAL + 1)
    handler = logging.StreamHandler()
    handler.setFormatter(logging.Formatter("%(levelname)s: %(message)s"))
    logging.getLogger("vzero").addHandler(handler)
