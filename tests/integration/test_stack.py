"""What docker/compose.yaml brings up, outside of containers: PostgreSQL, S3, Prefect's server, a worker."""

import re
import signal
import subprocess
import tomllib
import urllib.request
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
import s3fs
from support.stack import (
    FOLDER,
    SERVICES,
    ask,
    environment_of,
    free_ports,
    health_check,
    postgres,
    prefect,
    running,
    s3,
    wait_for,
)

pytestmark = pytest.mark.s3

NAMES = re.findall(r"^(\w+)=", (FOLDER / ".env.example").read_text(), re.MULTILINE)
# What `openssl rand -hex` gives, for addresses hold some of them; a quote may be in none but the script's own.
VALUES = {name: f"{number}abcdef0123456789" for number, name in enumerate(NAMES)}


@pytest.fixture(scope="module")
def database(tmp_path_factory: pytest.TempPathFactory) -> Iterator[int]:
    with postgres(tmp_path_factory.mktemp("postgres"), VALUES) as port:
        yield port


@pytest.fixture(scope="module")
def storage(tmp_path_factory: pytest.TempPathFactory) -> Iterator[str]:
    with s3(tmp_path_factory.mktemp("seaweed"), VALUES) as url:
        yield url


@pytest.fixture(scope="module")
def server(tmp_path_factory: pytest.TempPathFactory, database: int) -> Iterator[str]:
    with prefect(tmp_path_factory.mktemp("prefect"), VALUES, database) as url:
        yield url


def _psql(port: int, user: str, password: str, statement: str) -> subprocess.CompletedProcess[str]:
    command = ["psql", "-h", "127.0.0.1", "-p", str(port), "-U", user, "-d", "lakefs", "-Atc", statement]
    return subprocess.run(command, env={"PGPASSWORD": password}, capture_output=True, text=True, check=False)


def test_lakefs_has_a_database_of_its_own(database: int) -> None:
    address = environment_of("lakefs", VALUES)["LAKEFS_DATABASE_POSTGRES_CONNECTION_STRING"]
    assert address == f"postgres://lakefs:{VALUES['LAKEFS_DATABASE_PASSWORD']}@postgres:5432/lakefs?sslmode=disable"
    made = _psql(database, "lakefs", VALUES["LAKEFS_DATABASE_PASSWORD"], "CREATE TABLE kv (k int); SELECT current_user")
    assert made.stdout.splitlines()[-1] == "lakefs", made.stderr
    assert "password authentication failed" in _psql(database, "lakefs", "wrong", "SELECT 1").stderr
    superuser = "SELECT rolsuper FROM pg_roles WHERE rolname = 'lakefs'"
    assert _psql(database, "lakefs", VALUES["LAKEFS_DATABASE_PASSWORD"], superuser).stdout == "f\n"


def test_the_s3_server_has_the_buckets_and_one_key(storage: str) -> None:
    worker = environment_of("worker-light", VALUES)
    key, secret = worker["AWS_ACCESS_KEY_ID"], worker["AWS_SECRET_ACCESS_KEY"]
    files = s3fs.S3FileSystem(key=key, secret=secret, endpoint_url=storage, use_listings_cache=False)
    assert sorted(files.ls("")) == ["lakefs", "vzero"]
    files.pipe_file("vzero/a", b"1")
    with pytest.raises(OSError, match="pre-conditions"):
        files.pipe_file("vzero/a", b"2", mode="create")
    for wrong in ({"key": key, "secret": "wrong"}, {"anon": True}):
        with pytest.raises(PermissionError):
            s3fs.S3FileSystem(endpoint_url=storage, **wrong).ls("vzero")


def _worker(folder: Path, service: str, server: str, storage: str) -> tuple[list[str], dict[str, str], int]:
    """Give the command and the environment of a worker, and the port of its health check."""
    (port,) = free_ports(1)
    config = (FOLDER / "small-world.toml").read_text()
    (folder / "config.toml").write_text(config.replace("/app/.vzero/work", str(folder / "work")))
    assert tomllib.loads((folder / "config.toml").read_text())["placement"]["work_dir"] == str(folder / "work")
    variables = environment_of(service, VALUES) | {
        "PREFECT_API_URL": server,
        "AWS_ENDPOINT_URL": storage,
        "VZERO_CONFIG": str(folder / "config.toml"),
        "PREFECT_HOME": str(folder / "home"),
        "TMPDIR": str(folder / "tmp"),
        "PREFECT_WORKER_WEBSERVER_PORT": str(port),
        "PREFECT_WORKER_QUERY_SECONDS": "1",
        "PREFECT_WORKER_HEARTBEAT_SECONDS": "2",
    }
    return [str(FOLDER / "worker-entrypoint.sh")], variables, port


def _deployments(server: str) -> dict[str, Any]:
    return {each["name"]: each for each in ask(f"{server}/deployments/filter", {})}


def test_a_worker_registers_works_and_stops(tmp_path: Path, server: str, storage: str) -> None:
    assert SERVICES["worker-light"]["environment"]["VZERO_DEPLOY"] == "true"
    command, variables, port = _worker(tmp_path, "worker-light", server, storage)
    log = tmp_path / "log"
    with running(command, tmp_path, **variables) as worker:
        # The health check tells of a worker: who still registers is not one.
        wait_for(health_check("worker-light", {8080: port}), worker, log)
        assert ask(f"{server}/work_pools/vzero-gpu")["concurrency_limit"] == 1
        deployed = _deployments(server)
        assert set(deployed) == {"full-pipeline", "retrain", "evaluate", "new-data"}
        assert {each["parameters"]["config"]["store"]["url"] for each in deployed.values()} == {"s3://vzero/store"}

        def online() -> bool:
            found = ask(f"{server}/work_pools/vzero-cpu/workers/filter", {})
            return [each["status"] for each in found] == ["ONLINE"]

        wait_for(online, worker, log)
        run = ask(f"{server}/deployments/{deployed['new-data']['id']}/create_flow_run", {})["id"]

        def ended() -> Any:
            found = ask(f"{server}/flow_runs/{run}")["state"]
            return found if found["type"] not in ("SCHEDULED", "PENDING", "RUNNING") else None

        assert wait_for(ended, worker, log)["type"] == "COMPLETED", log.read_text()
        worker.send_signal(signal.SIGTERM)
        assert worker.wait(timeout=60) == 0
    assert re.search(r"Received SIGTERM.*stopped!", log.read_text(), re.DOTALL)


def test_a_worker_waits_for_its_pool(tmp_path: Path, server: str, storage: str) -> None:
    command, variables, port = _worker(tmp_path, "worker-cpu", server, storage)
    log = tmp_path / "log"
    variables |= {"VZERO_POOL": "not-deployed-yet"}
    with running(command, tmp_path, **variables) as worker:
        wait_for(lambda: "Work pool 'not-deployed-yet' not found" in log.read_text(), worker, log)
        pools = {each["name"] for each in ask(f"{server}/work_pools/filter", {})}
        assert "not-deployed-yet" not in pools
        with urllib.request.urlopen(f"http://127.0.0.1:{port}/health", timeout=5) as reply:
            assert reply.status == 200
        ask(f"{server}/work_pools/", {"name": "not-deployed-yet", "type": "process"})

        def online() -> bool:
            found = ask(f"{server}/work_pools/not-deployed-yet/workers/filter", {})
            return [each["status"] for each in found] == ["ONLINE"]

        wait_for(online, worker, log)
