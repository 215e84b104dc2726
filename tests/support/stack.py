"""The services of docker/compose.yaml, started outside of containers from what stands in it."""

import json
import os
import re
import shutil
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any

import pytest
import yaml

from flows.config import PROJECT

FOLDER = PROJECT / "docker"
SERVICES: dict[str, Any] = yaml.safe_load((FOLDER / "compose.yaml").read_text())["services"]
START_TIMEOUT = 120.0
"""Seconds; Prefect's server with a new database takes some twenty."""


def environment_of(service: str, values: Mapping[str, str]) -> dict[str, str]:
    """Give the environment of a service, its variables filled in."""

    def value(found: re.Match[str]) -> str:
        return values.get(found[1], "")

    return {
        name: re.sub(r"\$\{(\w+):[?-][^}]*\}", value, text) for name, text in SERVICES[service]["environment"].items()
    }


def free_ports(count: int) -> list[int]:
    """Give ports of 127.0.0.1 that nobody listens on, all different."""
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports


@contextmanager
def running(command: list[str], folder: Path, **variables: str) -> Iterator[subprocess.Popen[bytes]]:
    """Run a program until it is no longer needed; its output goes to `log` in its folder."""
    kept = {name: value for name, value in os.environ.items() if not name.startswith(("PREFECT_", "VZERO_", "AWS_"))}
    path = os.pathsep.join([str(Path(sys.executable).parent), kept["PATH"]])
    with (folder / "log").open("wb") as log:
        process = subprocess.Popen(
            command,
            cwd=PROJECT,
            env=kept | {"PATH": path, "PYTHONUNBUFFERED": "1"} | variables,
            stdout=log,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    try:
        yield process
    finally:
        with suppress(ProcessLookupError):
            os.killpg(process.pid, 9)
        process.wait()


def wait_for(
    what: Callable[[], Any], process: subprocess.Popen[bytes], log: Path, timeout: float = START_TIMEOUT
) -> Any:
    """Wait until something is true, and give it; a program that ends instead is shown with its log."""
    deadline = time.monotonic() + timeout
    while True:
        with suppress(OSError):
            if found := what():
                return found
        if process.poll() is not None or time.monotonic() > deadline:
            raise AssertionError(log.read_text(errors="replace")[-4000:])
        time.sleep(0.2)


def health_check(service: str, ports: Mapping[int, int]) -> Callable[[], bool]:
    """Give a service's own health check, asked at other ports, with wget and Python of this machine.

    Args:
        service: its name.
        ports: of this machine, by those of the container.
    """
    kind, *words = SERVICES[service]["healthcheck"]["test"]
    moved = [re.sub(r"127\.0\.0\.1:(\d+)", lambda found: f"127.0.0.1:{ports[int(found[1])]}", word) for word in words]
    command = ["sh", "-c", *moved] if kind == "CMD-SHELL" else moved
    if command[0] == "python":
        command[0] = sys.executable

    def is_well() -> bool:
        return subprocess.run(command, cwd=PROJECT, capture_output=True, check=False).returncode == 0

    return is_well


@contextmanager
def postgres(folder: Path, values: Mapping[str, str]) -> Iterator[int]:
    """Run PostgreSQL as its image does: a role and a database of Prefect's, then the script beside compose.yaml."""
    programs = _postgres_programs()
    # PostgreSQL refuses to run as root.
    as_user = ["setpriv", "--reuid=postgres", "--regid=postgres", "--clear-groups"] if os.geteuid() == 0 else []
    if as_user:
        shutil.chown(folder, "postgres", "postgres")
        # Folders of pytest are root's alone.
        for parent in folder.parents[:3]:
            parent.chmod(parent.stat().st_mode | 0o011)
    password = folder / "password"
    password.write_text(values["POSTGRES_PASSWORD"])
    password.chmod(0o644)
    (port,) = free_ports(1)
    settings = environment_of("postgres", values)
    made = [str(programs / "initdb"), "-D", str(folder / "data"), "-U", settings["POSTGRES_USER"]]
    made += ["--auth=scram-sha-256", f"--pwfile={password}", "--no-sync"]
    subprocess.run([*as_user, *made], check=True, capture_output=True)
    command = [str(programs / "postgres"), "-D", str(folder / "data"), "-p", str(port), "-k", str(folder)]
    (folder / "log").touch()
    with running([*as_user, *command, "-c", "listen_addresses=127.0.0.1", "-c", "fsync=off"], folder) as process:
        ready = [str(programs / "pg_isready"), "--host", "127.0.0.1", "--port", str(port)]
        wait_for(
            lambda: subprocess.run(ready, capture_output=True, check=False).returncode == 0, process, folder / "log"
        )
        where = os.environ | settings | {"PGHOST": "127.0.0.1", "PGPORT": str(port)}
        where["PGPASSWORD"] = settings["POSTGRES_PASSWORD"]
        made = [str(programs / "createdb"), "-U", settings["POSTGRES_USER"], settings["POSTGRES_DB"]]
        subprocess.run(made, check=True, env=where)
        subprocess.run([str(FOLDER / "postgres-init.sh")], check=True, env=where, capture_output=True)
        yield port


def _postgres_programs() -> Path:
    found = sorted(Path("/usr/lib/postgresql").glob("*/bin/initdb"))
    if not found:
        # CI must install it: a check that is passed over there is none.
        assert os.environ.get("CI") != "true", "PostgreSQL must be installed in CI; apt-get install postgresql"
        pytest.skip("PostgreSQL is not there; apt-get install postgresql")
    return found[-1].parent


@contextmanager
def s3(folder: Path, values: Mapping[str, str]) -> Iterator[str]:
    """Run the S3 server; give its address."""
    parts = ("s3", "filer", "master", "volume", "admin")
    places = [f"{part}.port{kind}" for kind in ("", ".grpc") for part in parts]
    ports = dict(zip(places, free_ports(len(places)), strict=True))
    (folder / "data").mkdir()
    given = [word for word in SERVICES["s3"]["command"] if not re.match(r"-(dir|ip\.bind|\w+\.port)=", word)]
    given += [f"-dir={folder / 'data'}", "-ip.bind=127.0.0.1", *(f"-{place}={port}" for place, port in ports.items())]
    program = str(Path(sys.executable).with_name("weed"))
    with running([program, *given], folder, **environment_of("s3", values)) as process:
        moved = {8333: ports["s3.port"], 8888: ports["filer.port"]}
        wait_for(health_check("s3", moved), process, folder / "log")
        yield f"http://127.0.0.1:{ports['s3.port']}"


@contextmanager
def prefect(folder: Path, values: Mapping[str, str], database: int) -> Iterator[str]:
    """Run Prefect's server on PostgreSQL; give the address of its API."""
    (port,) = free_ports(1)
    entrypoint = SERVICES["prefect"]["entrypoint"]
    assert entrypoint[:2] == ["tini", "--"]
    changed = {"0.0.0.0": "127.0.0.1", "4200": str(port)}
    environment = environment_of("prefect", values) | {
        "PREFECT_SERVER_DATABASE_HOST": "127.0.0.1",
        "PREFECT_SERVER_DATABASE_PORT": str(database),
        "PREFECT_SERVER_ANALYTICS_ENABLED": "false",
        "PREFECT_HOME": str(folder / "home"),
    }
    with running([changed.get(word, word) for word in entrypoint[2:]], folder, **environment) as process:
        wait_for(health_check("prefect", {4200: port}), process, folder / "log")
        yield f"http://127.0.0.1:{port}/api"


def ask(url: str, body: Any = None) -> Any:
    """Ask Prefect's API."""
    data = None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"Content-Type": "application/json"})
    with urllib.request.urlopen(request, timeout=20) as reply:
        return json.load(reply)
