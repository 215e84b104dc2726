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
from pathlib import Path

from prefect.events.worker import EventsWorker
from prefect.logging.handlers import APILogWorker
from prefect.settings import (
    PREFECT_API_URL,
    PREFECT_HOME,
    get_current_settings,
    temporary_settings,
)

from vzero_core.errors import VZeroError

START_TIMEOUT = 180.0
"""Seconds; a new database takes half a minute on a busy laptop."""
STOP_TIMEOUT = 10.0


class ServerError(VZeroError, RuntimeError):
    """The Prefect server could not be started."""


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
        yield configured
        return
    home.mkdir(parents=True, exist_ok=True)
    with ExitStack() as stack:
        lock = stack.enter_context((home / "lock").open("w"))
        try:
            fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            raise ServerError(f"another run is using {home}; wait for it to end, or stop it") from error
        _stop_orphan(home / "server.json")
        port = _free_port()
        url = f"http://127.0.0.1:{port}/api"
        stack.enter_context(_running(home, port, url))
        stack.enter_context(temporary_settings({PREFECT_API_URL: url, PREFECT_HOME: home}))
        # Before the server stops: what is still queued for it would be sent again and again for a minute.
        stack.callback(_send_queued)
        yield url


def _send_queued() -> None:
    EventsWorker.drain_all(timeout=STOP_TIMEOUT)
    APILogWorker.drain_all(timeout=STOP_TIMEOUT)


@contextmanager
def _running(home: Path, port: int, url: str) -> Iterator[None]:
    environment = {
        **os.environ,
        "PREFECT_HOME": str(home),
        "PREFECT_API_URL": url,
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_SERVER_UI_SHOW_PROMOTIONAL_CONTENT": "false",
    }
    command = [sys.executable, "-m", "prefect", "server", "start", "--host", "127.0.0.1", "--port", str(port)]
    with (home / "server.log").open("w") as log:
        server = subprocess.Popen(
            command, env=environment, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
        )
    (home / "server.json").write_text(json.dumps({"pid": server.pid, "port": port}))
    try:
        _wait(server, f"{url}/health", home / "server.log")
        yield
    finally:
        _stop(server.pid)
        server.wait()
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


def _stop_orphan(record: Path) -> None:
    """End what an earlier run left when it was killed; nobody else holds the lock, so it is nobody's."""
    if not record.is_file():
        return
    left = json.loads(record.read_text())
    command = Path(f"/proc/{left['pid']}/cmdline")
    # The number may belong to another process by now: only a server on the recorded port is ours.
    if command.is_file() and f"--port\0{left['port']}\0" in command.read_text():
        _stop(left["pid"])
    record.unlink()


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
