"""The pipeline as a service: started as a user does it, stopped, killed, and on PostgreSQL."""

import asyncio
import http.client
import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.request
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import Any, TypeVar

import asyncpg
import pytest
from prefect.client.orchestration import SyncPrefectClient, get_client
from prefect.client.schemas.filters import ArtifactFilter, ArtifactFilterFlowRunId
from prefect.client.schemas.objects import FlowRun, StateType
from prefect.events import AutomationCore
from prefect.settings import PREFECT_API_URL, temporary_settings
from prefect.states import Pending, Running
from support.postgres import postgres

from flows import deploy
from flows.config import PROJECT, load_config
from flows.server import OwnServer, ServerError, is_free, own_server, started_for

pytestmark = pytest.mark.service

SERVE = """
import sys
from pathlib import Path
from flows import serve
serve.HOME = Path(sys.argv[1])
sys.exit(serve.main(sys.argv[2:]))
"""
CONFIG = """
name = "served"
[data.source]
kind = "small_world"
num_prompts = 64
num_evaluation = 8
[sampling]
num_responses = 2
[rounds]
num_rounds = {num_rounds}
prompts_per_round = 8
[evaluate]
every = 100
[selection]
num_prompts = 0
[store]
url = "store"
[publish]
url = "published"
[placement]
work_dir = "work"
"""
PATIENCE = 180.0
"""Seconds for a run, which loads all packages first; it takes twenty on an idle machine."""

T = TypeVar("T")


def until(found: Callable[[], T | None], patience: float = PATIENCE) -> T:
    deadline = time.monotonic() + patience
    while (it := found()) is None:
        assert time.monotonic() < deadline, "what is waited for comes sooner"
        time.sleep(0.1)
    return it


def config_file(folder: Path, num_rounds: int) -> Path:
    path = folder / "my.toml"
    path.write_text(CONFIG.format(num_rounds=num_rounds))
    return path


def artefacts(folder: Path, stage: str) -> dict[str, str]:
    """Give when each artefact of a stage was made."""
    manifests = (folder / "store" / stage).glob("*/manifest.json")
    return {path.parent.name: json.loads(path.read_text())["created_at"] for path in manifests}


def free_ports() -> int:
    """Give a free port whose next one is free too."""
    while True:
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            port: int = probe.getsockname()[1]
        if is_free(port) and is_free(port + 1):
            return port


class Service:
    """`make serve`, without make."""

    def __init__(self, home: Path, config: Path, port: int) -> None:
        environment = {name: value for name, value in os.environ.items() if not name.startswith("PREFECT_")}
        self.process = subprocess.Popen(
            [sys.executable, "-c", SERVE, str(home), "--config", str(config), "--port", str(port)],
            cwd=PROJECT,
            env=environment,
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
        )
        self.environment = environment
        self.said: list[str] = []

    def wait(self) -> list[str]:
        """Give the commands that it prints for another terminal, when it is up."""
        assert self.process.stdout is not None
        for line in self.process.stdout:
            self.said.append(line.rstrip("\n"))
            if line.startswith("Ctrl-C"):
                return [each for each in self.said if each.startswith("  ")]
        raise AssertionError(f"it must come up, but it said {self.said} and {self.process.communicate()[1]}")

    def end(self, how: signal.Signals) -> str:
        """End it; give its last words."""
        self.process.send_signal(how)
        _, errors = self.process.communicate(timeout=PATIENCE)
        return errors


def test_it_serves_stops_and_goes_on(tmp_path: Path) -> None:
    home, config, port = tmp_path / "prefect", config_file(tmp_path, 8), free_ports()
    api = f"http://127.0.0.1:{port}/api"
    services = [Service(home, config, port)]
    try:
        # --- as the user of another terminal does it, to the letter
        commands = services[0].wait()
        assert f"  export PREFECT_API_URL={api}" in commands
        assert any(line.endswith("prefect deployment run vzero/full-pipeline --watch") for line in commands)
        terminal = subprocess.Popen(
            ["bash", "-c", "\n".join(commands)],
            env={**services[0].environment, "PREFECT_HOME": str(tmp_path / "user")},
            stdout=subprocess.DEVNULL,
            stderr=subprocess.DEVNULL,
            start_new_session=True,
        )
        until(lambda: True if len(artefacts(tmp_path, "train")) >= 2 else None)
        made = artefacts(tmp_path, "train")

        # --- Ctrl-C: nothing is left
        assert services[0].end(signal.SIGINT).endswith("stopped; a run that was going goes on at the next start\n")
        assert services[0].process.returncode == 0
        assert started_for(home) == []
        assert is_free(port)
        assert is_free(port + 1)
        assert artefacts(tmp_path, "report") == {}
        with suppress(ProcessLookupError):
            os.killpg(terminal.pid, signal.SIGKILL)
        terminal.wait()

        # --- the next one goes on with it
        services.append(Service(home, config, port))
        services[1].wait()
        with temporary_settings({PREFECT_API_URL: api}), get_client(sync_client=True) as client:
            [run] = [found for found in client.read_flow_runs() if found.name.startswith("served")]
            until(lambda: True if client.read_flow_run(run.id).state_type == StateType.COMPLETED else None)
            assert client.read_flow_run(run.id).run_count == 2
            assert [state.name for state in client.read_flow_run_states(run.id)].count("Running") == 2
            deployed = client.read_deployment_by_name("vzero/full-pipeline").parameters["config"]
        assert len(artefacts(tmp_path, "train")) == 8
        assert made.items() <= artefacts(tmp_path, "train").items()

        # --- the report opens in a browser, and nothing beside the store does
        files = deployed["store"]["web_url"]
        [report] = (tmp_path / "store" / "report").glob("*/*/report.html")
        with urllib.request.urlopen(f"{files}/{report.relative_to(tmp_path / 'store')}") as reply:
            assert reply.headers["Content-Type"] == "text/html"
            assert reply.read() == report.read_bytes()
        assert [status(files, path) for path in ("/", "/report/", "/%2e%2e/my.toml", "//etc/passwd")] == [404] * 4
        (tmp_path / "store" / "link").symlink_to(config)
        assert status(files, "/link") == 404
        assert status(files, f"/{report.relative_to(tmp_path / 'store')}", host="elsewhere.example") == 403

        # --- who comes in between is told what to do
        with pytest.raises(ServerError, match=f"PREFECT_API_URL={api} .venv/bin/python"), own_server(home):
            pass
        intruder = Service(home / "other", config, port)
        _, errors = intruder.process.communicate(timeout=PATIENCE)
        assert intruder.process.returncode == 1
        assert "make serve PORT=4300" in errors

        # --- killed: the next one ends what it left
        services[1].end(signal.SIGKILL)
        orphans = started_for(home)
        assert len(orphans) >= 3
        services.append(Service(home, config, port))
        services[2].wait()
        assert not set(orphans) & set(started_for(home))

        # --- what it cannot do without is lost: it says so, and leaves nothing
        [lost] = [process for process in started_for(home) if is_worker(process.pid, "vzero-gpu")]
        os.kill(lost.pid, signal.SIGKILL)
        _, errors = services[2].process.communicate(timeout=PATIENCE)
        assert services[2].process.returncode == 1
        assert "worker-vzero-gpu must keep running, but it ended with -9; see " in errors
        assert started_for(home) == []
    finally:
        for service in services:
            if service.process.poll() is None:
                service.end(signal.SIGTERM)


def is_worker(pid: int, pool: str) -> bool:
    words = Path(f"/proc/{pid}/cmdline").read_text().split("\0")
    return words[3:7] == ["worker", "start", "--pool", pool]


def status(files: str, path: str, host: str | None = None) -> int:
    """Give what the files' server says, to a client that corrects no path."""
    address = files.removeprefix("http://")
    connection = http.client.HTTPConnection(address, timeout=10)
    connection.request("GET", path, headers={"Host": host or address})
    return connection.getresponse().status


@contextmanager
def worker(server: OwnServer, log: Path) -> Iterator[None]:
    command = [sys.executable, "-m", "prefect", "worker", "start", "--pool", "vzero-gpu"]
    with log.open("ab") as output:
        process = subprocess.Popen(
            command,
            cwd=PROJECT,
            env={**server.environment, "PREFECT_WORKER_QUERY_SECONDS": "1"},
            stdout=output,
            stderr=subprocess.STDOUT,
            start_new_session=True,
        )
    yield
    server.end_users()
    process.wait()


def states(client: SyncPrefectClient, run: FlowRun) -> list[str]:
    return [state.name or "" for state in client.read_flow_run_states(run.id)]


async def ask(url: str, query: str) -> Any:
    connection = await asyncpg.connect(url.replace("+asyncpg", ""))
    try:
        return await connection.fetchval(query)
    finally:
        await connection.close()


def test_on_postgresql_a_lost_machine_s_run_starts_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with postgres() as database:
        monkeypatch.setenv("PREFECT_SERVER_DATABASE_CONNECTION_URL", database)
        with own_server(tmp_path / "prefect") as server, get_client(sync_client=True) as client:
            config = load_config(config_file(tmp_path, 2))
            deploy.deploy(config, lambda _: None)
            [found] = client.read_automations_by_name("vzero: no heartbeat")
            # Less than Prefect's shortest interval between heartbeats: what is tested comes before the second.
            hasty = {**found.model_dump(exclude={"id", "owner_resource"})}
            hasty["trigger"]["within"] = 15
            client.update_automation(found.id, AutomationCore.model_validate(hasty))
            run = client.create_flow_run_from_deployment(client.read_deployment_by_name("vzero/full-pipeline").id)

            # --- worker and run are gone at once
            with worker(server, tmp_path / "worker.log"):
                until(lambda: artefacts(tmp_path, "import_data") or None)
                made = artefacts(tmp_path, "import_data")
                assert states(client, run)[-1] == "Running"
            until(lambda: True if states(client, run)[-1] == "AwaitingRetry" else None)
            assert states(client, run)[-3:] == ["Running", "Crashed", "AwaitingRetry"]
            deploy.deploy(None, lambda _: None)

            # --- another worker goes on with it
            with worker(server, tmp_path / "worker.log"):
                until(lambda: True if states(client, run)[-1] in ("Completed", "Failed", "Crashed again") else None)
            assert states(client, run)[-1] == "Completed", (tmp_path / "worker.log").read_text()[-5000:]
            assert client.read_flow_run(run.id).run_count == 2
            assert artefacts(tmp_path, "import_data") == made
            assert len(artefacts(tmp_path, "train")) == 2
            of_run = ArtifactFilter(flow_run_id=ArtifactFilterFlowRunId(any_=[run.id]))
            kinds = {artifact.type for artifact in client.read_artifacts(artifact_filter=of_run)}
            assert {"table", "markdown"} <= kinds

            # --- and one retraining waits for the other
            retrain = client.read_deployment_by_name("vzero-retrain/retrain").id
            first, second = (client.create_flow_run_from_deployment(retrain) for _ in range(2))
            client.set_flow_run_state(first.id, Pending())
            client.set_flow_run_state(first.id, Running())
            client.set_flow_run_state(second.id, Pending())
            assert states(client, second)[-1] == "AwaitingConcurrencySlot"
        count = "select count(*) from flow_run_state where name = 'Crashed'"
        assert asyncio.run(ask(database, count)) == 1
