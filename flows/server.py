"""A Prefect server of this project's own, for runs without one; it is stopped by the run that started it."""

import fcntl
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_HOME,
    get_current_settings,
    temporary_settings,
)

from tasks.adapters.process_guard import Process, find_process, is_guarded
from vzero_core.errors import VZeroError

START_TIMEOUT = 180.0
"""Seconds; a new database takes half a minute on a busy laptop."""
STOP_TIMEOUT = 10.0
GUARD_TIMEOUT = 60.0
"""Seconds in which the guards of a run's own servers end those, and themselves."""
_MARK = "VZERO_STARTED_FOR"
"""Variable that all have in their environment that was started for a home, so that it is found again."""


class ServerError(VZeroError, RuntimeError):
    """The Prefect server could not be started."""


@dataclass(frozen=True)
class OwnServer:
    """A Prefect server that was started here."""

    url: str
    """Address of its API."""
    environment: dict[str, str]
    """For programs that use it; they are ended with it, and found again should this process be killed."""
    process: subprocess.Popen[bytes]

    def end_users(self) -> None:
        """End all that was started in its environment; it goes on itself.

        Raises:
            ServerError: processes are left that not even SIGKILL ends.
        """
        _end_all(Path(self.environment["PREFECT_HOME"]), sparing=self.process.pid)


@contextmanager
def prefect_server(home: Path) -> Iterator[str]:
    """Give the address of the Prefect server to use: the configured one, or one started here and stopped again.

    Args:
        home: folder of the server started here: its database, log and results.

    Raises:
        ServerError: the server does not start, or another run holds the folder.
    """
    configured = get_current_settings().api.url
    if configured:
        _require_answer(configured)
        yield configured
        return
    with own_server(home) as server:
        yield server.url


@contextmanager
def own_server(home: Path, port: int | None = None) -> Iterator[OwnServer]:
    """Start a Prefect server on 127.0.0.1, which ends with all that was started in its environment.

    Args:
        home: folder of its database, log and results.
        port: where it listens, for whoever else wants to use it; None: a free one, for this process alone.

    Raises:
        ServerError: the server does not start, another one holds the folder, or the port is taken.
    """
    home.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        lock = stack.enter_context((home / "lock").open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ServerError(_in_use(home)) from error
        # Nobody else holds the lock: what is left of an earlier server is nobody's.
        _end_all(home)
        server = stack.enter_context(_running(home, port))
        stack.callback(server.end_users)
        stack.enter_context(temporary_settings({PREFECT_API_URL: server.url, PREFECT_HOME: home}))
        # Before the server stops: what is still queued for it would be sent again and again for a minute.
        stack.callback(send_queued)
        yield server


def _require_answer(url: str) -> None:
    try:
        urllib.request.urlopen(f"{url.rstrip('/')}/health", timeout=STOP_TIMEOUT).close()
    except urllib.error.HTTPError:
        # Whoever refuses is there: a server behind a door of its own.
        return
    except OSError as error:
        raise ServerError(
            f"a Prefect server must answer at {url}, which PREFECT_API_URL or Prefect's profile names, but: {error}; "
            "start it, or unset PREFECT_API_URL"
        ) from error


def send_queued() -> None:
    """Send what is queued for the server: events and log lines."""
    EventsWorker.drain_all(timeout=STOP_TIMEOUT)
    APILogWorker.drain_all(timeout=STOP_TIMEOUT)


@contextmanager
def _running(home: Path, given_port: int | None) -> Iterator[OwnServer]:
    port = given_port or _free_port()
    if not is_free(port):
        raise ServerError(
            f"port {port} must be free, but a program listens there; stop it, or choose another: make serve PORT=4300"
        )
    url = f"http://127.0.0.1:{port}/api"
    environment = {
        **os.environ,
        _MARK: str(home),
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
        # In memory, a limit's place that was held when the server stopped would be held for good.
        "PREFECT_SERVER_CONCURRENCY_LEASE_STORAGE": "prefect.server.concurrency.lease_storage.filesystem",
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (home / "server.log").open("w") as log:
        process = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    (home / "server.json").write_text(json.dumps({"pid": process.pid, "port": port, "shared": given_port is not None}))
    try:
        _wait(process, f"{url}/health", home / "server.log")
        yield OwnServer(url, environment, process)
    finally:
        _stop(process.pid)
        process.wait()
        (home / "server.json").unlink()


def _wait(server: subprocess.Popen[bytes], url: str, log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    while time.monotonic() < deadline:
        if server.poll() is not None:
            raise ServerError(f"Prefect's server must start, but it ended with code {server.returncode}; see {log}")
        with suppress(urllib.error.URLError, OSError), urllib.request.urlopen(url, timeout=2) as reply:
            if reply.status == 200:
                return
        time.sleep(0.1)
    raise ServerError(f"Prefect's server must answer within {START_TIMEOUT:.0f} s, but it did not; see {log}")


def _stop(pid: int) -> None:
    """End a server and all it started: its process group, politely at first."""
    with suppress(ProcessLookupError):
        os.killpg(pid, signal.SIGTERM)
        deadline = time.monotonic() + STOP_TIMEOUT
        while time.monotonic() < deadline:
            with suppress(ChildProcessError):
                os.waitpid(pid, os.WNOHANG)
            os.killpg(pid, 0)
            time.sleep(0.05)
        os.killpg(pid, signal.SIGKILL)


def _in_use(home: Path) -> str:
    """Say who holds the folder, and what to do about it."""
    with suppress(FileNotFoundError, ValueError):
        record = json.loads((home / "server.json").read_text())
        if record["shared"]:
            url = f"http://127.0.0.1:{record['port']}"
            return (
                f"`make serve` is using {home}, with a Prefect server at {url}; stop it, or let runs use its server: "
                f"PREFECT_API_URL={url}/api .venv/bin/python -m flows.full_pipeline"
            )
    return f"another run is using {home}; wait for it to end, or stop it"


def _end_all(home: Path, sparing: int | None = None) -> None:
    """End all that was started in the environment of a home's server.

    A run's process is told nothing: it would call itself crashed. What it computed is stored; servers of its own have
    a guard each, who ends them when the run is gone.

    Args:
        home: folder of the server.
        sparing: process group that stays.

    Raises:
        ServerError: processes are left that not even SIGKILL ends.
    """
    began = time.monotonic()
    found: set[Process] = set()
    while True:
        found |= {process for process in started_for(home) if process.group != sparing}
        # A process that ends shows no environment any more, but may hold its port still.
        left = [process.pid for process in found if find_process(process.pid) == process]
        if not left:
            return
        waited = time.monotonic() - began
        if waited > 2 * GUARD_TIMEOUT:
            raise ServerError(f"processes {left} must end on SIGKILL, but they did not; restart the machine")
        for pid in left:
            if waited > GUARD_TIMEOUT or not is_guarded(pid):
                with suppress(ProcessLookupError):
                    os.kill(pid, signal.SIGKILL)
        time.sleep(0.05)


def started_for(home: Path) -> list[Process]:
    """Give what runs in the environment of a home's server, that server included."""
    mark = f"{_MARK}={home}".encode()
    found = []
    for pid in (int(name) for name in os.listdir("/proc") if name.isdigit()):
        # Of a process that is gone, or somebody else's, there is nothing to read.
        with suppress(FileNotFoundError, ProcessLookupError, PermissionError):
            if pid != os.getpid() and mark in Path(f"/proc/{pid}/environ").read_bytes().split(b"\0"):
                found.append(find_process(pid))
    return [process for process in found if process is not None]


def is_free(port: int) -> bool:
    """Tell whether nobody listens on a port of 127.0.0.1."""
    with socket.socket() as probe:
        # As servers do: connections that ended a minute ago do not count.
        probe.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        try:
            probe.bind(("127.0.0.1", port))
        except OSError:
            return False
    return True


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
