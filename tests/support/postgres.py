"""A PostgreSQL server for tests: Debian's binaries, a folder and a port of its own, gone at the end."""

import os
import secrets
import shutil
import signal
import socket
import subprocess
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

START_TIMEOUT = 60.0
"""Seconds; it takes one on an idle machine."""
USER = "vzero"


@contextmanager
def postgres() -> Iterator[str]:
    """Give the URL of an empty database, as Prefect takes it."""
    binaries = _binaries()
    password = secrets.token_hex(8)
    # Not pytest's folder: nobody else may enter that, and root may not run PostgreSQL.
    folder = Path(tempfile.mkdtemp(prefix="vzero-postgres-"))
    (folder / "password").write_text(password)
    who: dict[str, Any] = {}
    if os.geteuid() == 0:
        who = {"user": "nobody", "group": "nogroup", "extra_groups": []}
        for path in (folder, folder / "password"):
            shutil.chown(path, "nobody", "nogroup")
    try:
        initialise = [binaries / "initdb", "-D", folder / "data", "-U", USER, "-A", "scram-sha-256", "-E", "UTF8"]
        subprocess.run([*initialise, f"--pwfile={folder / 'password'}"], check=True, capture_output=True, **who)
        port = _free_port()
        options = ["-c", f"port={port}", "-c", "listen_addresses=127.0.0.1", "-c", "unix_socket_directories="]
        with (folder / "log").open("wb") as log:
            server = subprocess.Popen(
                [binaries / "postgres", "-D", folder / "data", *options, "-c", "fsync=off"],
                stdout=log,
                stderr=subprocess.STDOUT,
                **who,
            )
        try:
            _wait(binaries, port, server, folder / "log")
            yield f"postgresql+asyncpg://{USER}:{password}@127.0.0.1:{port}/postgres"
        finally:
            # Fast: connections that are open are cut.
            server.send_signal(signal.SIGINT)
            server.wait(timeout=60)
    finally:
        shutil.rmtree(folder)


def _binaries() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    assert found, "PostgreSQL must be installed: apt-get install postgresql"
    return found[-1].parent


def _wait(binaries: Path, port: int, server: subprocess.Popen[bytes], log: Path) -> None:
    deadline = time.monotonic() + START_TIMEOUT
    ready = [binaries / "pg_isready", "-h", "127.0.0.1", "-p", str(port), "-U", USER, "-d", "postgres"]
    while subprocess.run(ready, capture_output=True, check=False).returncode != 0:
        assert server.poll() is None, log.read_text()
        assert time.monotonic() < deadline, log.read_text()
        time.sleep(0.1)


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
    return port
