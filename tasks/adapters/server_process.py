"""Server programs with a lifetime: started, waited for, and always ended, whatever happens to this process (Linux)."""

import http.client
import json
import os
import secrets
import select
import shlex
import signal
import socket
import subprocess
import sys
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import IO

from tasks.adapters import process_guard
from tasks.adapters.process_guard import (
    Record,
    end_session,
    find_process,
    is_marked,
    session_members,
    unlink_shared_memory,
)
from vzero_core.errors import VZeroError

_MAX_PORTS = 3
"""Ports that are tried where another program takes one between its choice and its use."""
_POLL_INTERVAL = 0.2
_REPLY_TIMEOUT = 1.0
_PORT_TAKEN = "address already in use"
"""What errno 98 is called in any program's log."""
_LOG_LINES = 20
_LOG_BYTES = 1 << 16
"""What is read of the log's end; lines beyond it are not shown."""


class ServerError(VZeroError, RuntimeError):
    """A server cannot be started, or is lost."""


class _PortTakenError(ServerError):
    """The program found its port in use."""


class ServerProcess:
    """A server program on a free port of 127.0.0.1, which does not outlive this process.

    Threads may ask whether it runs, and stop it, also while another one starts it.

    Attributes:
        log: file that what it prints is added to.
    """

    def __init__(
        self,
        name: str,
        command: Callable[[int], Sequence[str]],
        *,
        environment: Mapping[str, str],
        work_dir: Path,
        start_timeout: float,
    ) -> None:
        """Prepare a server.

        Args:
            name: what it is called in messages and files.
            command: gives the command line for a port; it must hold no secret, for it is logged.
            environment: added to this process's own; secrets may be here, for it is written nowhere.
            work_dir: folder of the log, `servers/NAME.log`, and of the record that `sweep` reads.
            start_timeout: seconds from start to healthy.
        """
        self._name = name
        self._command = command
        self._environment = environment
        self._folder = work_dir.absolute() / "servers"
        self.log = self._folder / f"{name}.log"
        self._start_timeout = start_timeout
        self._run: _Run | None = None
        self._is_wanted = False
        self._lock = threading.Lock()

    @property
    def url(self) -> str:
        """Address of the running program, without a slash at its end."""
        assert self._run is not None, "only a server that was started has an address"
        return f"http://127.0.0.1:{self._run.port}"

    def start(self, waiting: Callable[[float], None]) -> None:
        """Start the program, after ending what is left of an earlier start, and wait until GET /health answers 200.

        Args:
            waiting: called about once a second with the seconds since the start.

        Raises:
            ServerError: the program ended, was stopped, or is not healthy in time; nothing of it is left then.
        """
        self._end(self._run)
        self._is_wanted = True
        began = time.monotonic()
        for _ in range(_MAX_PORTS - 1):
            with suppress(_PortTakenError):
                return self._start_once(began, waiting)
        return self._start_once(began, waiting)

    def is_running(self) -> bool:
        """Tell whether the program runs, and is guarded."""
        return self._goes_on(self._run)

    def lost(self) -> ServerError:
        """Give the error that says how a program ended which `is_running` no more, with the last lines of its log."""
        if self._run is None:
            return ServerError(f"the {self._name} server must run, but its last start failed; see {self.log}")
        return self._lost(self._run)

    def stop(self) -> None:
        """Return when the program, all it started and its shared memory are gone; where there is none, at once.

        Raises:
            ServerError: processes are left that not even SIGKILL ends.
        """
        self._is_wanted = False
        self._end(self._run)

    def _start_once(self, began: float, waiting: Callable[[float], None]) -> None:
        run = self._launch()
        try:
            self._wait(run, began, waiting)
        except BaseException:
            self._end(run)
            raise

    def _goes_on(self, run: "_Run | None") -> bool:
        with self._lock:
            # Another thread may have ended it.
            if run is None or run is not self._run:
                return False
            # Not select: that refuses descriptors beyond 1023.
            said = select.poll()
            said.register(run.from_guard)
            if run.exit_code is None and said.poll(0):
                # Nothing where the guard itself is gone.
                run.exit_code = os.read(run.from_guard.fileno(), 16).decode()
            return run.exit_code is None

    def _end(self, run: "_Run | None") -> None:
        with self._lock:
            if run is None or run is not self._run:
                return
            if not run.to_guard.closed:
                # Not only closed: a fork of this process may hold the pipe open.
                with suppress(BrokenPipeError), run.to_guard:
                    run.to_guard.write(b"\n")
            run.guard.wait()
            run.from_guard.close()
            self._run = None
            # Its guard was killed, or could not end all.
            if run.record.exists():
                _clear(run.record)

    def _launch(self) -> "_Run":
        port = _free_port()
        command = list(self._command(port))
        marker = secrets.token_hex(8)
        record = self._folder / f"{self._name}-{marker}.json"
        self._folder.mkdir(parents=True, exist_ok=True)
        with self._lock, self.log.open("ab") as log:
            if not self._is_wanted:
                raise self._stopped()
            log.write(f"--- {datetime.now():%Y-%m-%d %H:%M:%S} {shlex.join(command)}\n".encode())
            log.flush()
            log_start = log.tell()
            guard = subprocess.Popen(
                [sys.executable, "-m", process_guard.__name__, str(record), str(os.getpid()), marker, *command],
                stdin=subprocess.PIPE,
                stdout=subprocess.PIPE,
                stderr=log,
                bufsize=0,
                env={**os.environ, **self._environment},
                start_new_session=True,
            )
            assert guard.stdin is not None, "it was asked for"
            assert guard.stdout is not None, "it was asked for"
            self._run = _Run(port, record, log_start, guard, guard.stdin, guard.stdout)
            return self._run

    def _wait(self, run: "_Run", began: float, waiting: Callable[[float], None]) -> None:
        shown = began
        while self._goes_on(run):
            if _is_healthy(run):
                return
            now = time.monotonic()
            if now - began > self._start_timeout:
                raise ServerError(
                    f"the {self._name} server must be healthy within {self._start_timeout:.0f} s, but it is not; raise "
                    f"the time-out, or see {self.log}, which ends:\n{_end_of(self.log, run.log_start)}"
                )
            if now - shown >= 1:
                shown = now
                waiting(now - began)
            time.sleep(_POLL_INTERVAL)
        if run is not self._run:
            raise self._stopped()
        error = self._lost(run)
        raise _PortTakenError(*error.args) if _PORT_TAKEN in _tail_of(self.log, run.log_start).lower() else error

    def _lost(self, run: "_Run") -> ServerError:
        how = _how_it_ended(run.exit_code)
        return ServerError(
            f"the {self._name} server must keep running, but {how}; see {self.log}, which ends:\n"
            f"{_end_of(self.log, run.log_start)}"
        )

    def _stopped(self) -> ServerError:
        return ServerError(f"the {self._name} server was stopped while it was started")


@dataclass
class _Run:
    """What belongs to one start of a program."""

    port: int
    record: Path
    log_start: int
    guard: subprocess.Popen[bytes]
    to_guard: IO[bytes]
    from_guard: IO[bytes]
    exit_code: str | None = None
    """Of the program: None while it runs, empty where its guard could not tell."""


def _is_healthy(run: _Run) -> bool:
    connection = http.client.HTTPConnection("127.0.0.1", run.port, timeout=_REPLY_TIMEOUT)
    try:
        connection.request("GET", "/health")
        healthy = connection.getresponse().status == 200
    except (OSError, http.client.HTTPException):
        return False
    finally:
        connection.close()
    # Another program that took the port may be healthy too.
    return healthy and _listens(run.guard.pid, run.port)


def _end_of(log: Path, start: int) -> str:
    return "\n".join(_tail_of(log, start).splitlines()[-_LOG_LINES:])


def _tail_of(log: Path, start: int) -> str:
    with log.open("rb") as file:
        file.seek(max(start, file.seek(0, os.SEEK_END) - _LOG_BYTES))
        return file.read().decode(errors="replace")


def sweep(work_dir: Path) -> int:
    """End servers whose owner is gone, unlink their shared memory, and give how many there were.

    Args:
        work_dir: as it was given to their `ServerProcess`.

    Raises:
        ServerError: processes are left that not even SIGKILL ends, or a record cannot be read.
    """
    count = 0
    for path in sorted((work_dir / "servers").glob("*.json")):
        # A guard may be at it too, and be done.
        with suppress(FileNotFoundError):
            record = _read(path)
            owner = find_process(record.owner)
            if owner is None or owner.started != record.owner_started:
                _clear(path)
                count += 1
    return count


def _clear(path: Path) -> None:
    record = _read(path)
    # The session's number may be another one's by now.
    if any(is_marked(process.pid, record.marker) for process in session_members(record.session)):
        try:
            end_session(record.session)
        except TimeoutError as error:
            raise ServerError(f"{error}; restart the machine, or its GPU driver") from error
    unlink_shared_memory(record.shared_memory)
    path.unlink(missing_ok=True)


def _read(path: Path) -> Record:
    try:
        return Record(**json.loads(path.read_text()))
    except (ValueError, TypeError) as error:
        raise ServerError(
            f"{path} must be the record of a server, got {error}; end that server and delete it"
        ) from error


def _how_it_ended(exit_code: str | None) -> str:
    if not exit_code:
        return "its guard was killed, or could not start it"
    if int(exit_code) >= 0:
        return f"it ended with code {exit_code}"
    hint = " (the machine may be out of memory)" if -int(exit_code) == signal.SIGKILL else ""
    return f"signal {-int(exit_code)} ended it{hint}"


def _listens(session: int, port: int) -> bool:
    """Tell whether it is a process of the session that listens on a port."""
    rows = [line.split() for table in Path("/proc/net").glob("tcp*") for line in table.read_text().splitlines()]
    # Columns: 1 is ADDRESS:PORT in hexadecimal digits, 3 the state (0A: listening), 9 the socket's inode.
    sockets = {f"socket:[{row[9]}]" for row in rows if row[3] == "0A" and int(row[1].rpartition(":")[2], 16) == port}
    return any(
        _target(descriptor) in sockets
        for process in session_members(session)
        for descriptor in Path(f"/proc/{process.pid}/fd").glob("*")
    )


def _target(link: Path) -> str:
    try:
        return os.readlink(link)
    except OSError:
        return ""


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
