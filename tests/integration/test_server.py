"""The project's own Prefect server: stopped at the end, swept after a crash, and nobody else's."""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.request
from collections.abc import Iterator
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, get_current_settings, temporary_settings

from flows.config import PROJECT
from flows.server import ServerError, prefect_server

pytestmark = pytest.mark.e2e

CODE = """
import sys, time
from pathlib import Path
from flows.server import prefect_server
with prefect_server(Path(sys.argv[1])) as url:
    print(url, flush=True)
    time.sleep(600)
"""

RUN = """
import sys
from pathlib import Path
from flows import command, full_pipeline
command.PROJECT = Path(sys.argv[1])
sys.exit(full_pipeline.main(["--config", sys.argv[2]]))
"""


def alive(pid: int) -> bool:
    """Whether a process runs (a zombie does not)."""
    stat = Path(f"/proc/{pid}/stat")
    return stat.is_file() and stat.read_text().rsplit(")", 1)[1].split()[0] != "Z"


@pytest.fixture(autouse=True)
def no_server() -> Iterator[None]:
    """No server is configured, whatever other tests have started."""
    with temporary_settings(restore_defaults={PREFECT_API_URL}):
        yield


def test_it_stops_locks_and_sweeps(tmp_path: Path) -> None:
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    owner = subprocess.Popen(
        [sys.executable, "-c", CODE, str(tmp_path)], cwd=PROJECT, env=environment, stdout=subprocess.PIPE, text=True
    )
    assert owner.stdout is not None
    url = owner.stdout.readline().strip()
    assert url.startswith("http://127.0.0.1:")
    with urllib.request.urlopen(f"{url}/health") as reply:
        assert reply.status == 200
    with pytest.raises(ServerError, match="another run is using"), prefect_server(tmp_path):
        pass
    orphan = json.loads((tmp_path / "server.json").read_text())["pid"]
    owner.send_signal(signal.SIGKILL)
    owner.wait()
    assert alive(orphan)

    with prefect_server(tmp_path) as own:
        assert not alive(orphan)
        assert get_current_settings().api.url == own
        server = json.loads((tmp_path / "server.json").read_text())["pid"]
        # A server that is configured is used, not doubled.
        with prefect_server(tmp_path / "other") as same:
            assert same == own
    deadline = time.monotonic() + 10
    while alive(server) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not alive(server)
    assert not (tmp_path / "server.json").exists()


def test_a_run_that_is_ended_takes_its_server_with_it(tmp_path: Path) -> None:
    (tmp_path / "my.toml").write_text(
        'name = "stopped"\n[data.source]\nkind = "small_world"\nnum_prompts = 128\nnum_evaluation = 8\n'
        '[store]\nurl = "store"\n[placement]\nwork_dir = "work"\nthreads = 1\n'
    )
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    command = [sys.executable, "-c", RUN, str(tmp_path), str(tmp_path / "my.toml")]
    run = subprocess.Popen(command, cwd=PROJECT, env=environment, stderr=subprocess.PIPE, text=True)
    deadline = time.monotonic() + 240
    while not (tmp_path / "store" / "rollouts").exists() and time.monotonic() < deadline:
        assert run.poll() is None, run.communicate()[1]
        time.sleep(0.1)
    server = json.loads((tmp_path / ".vzero" / "prefect" / "server.json").read_text())["pid"]
    try:
        run.terminate()
        _, errors = run.communicate(timeout=60)
        assert errors.endswith("stopped; the same command goes on from here\n")
        assert "Traceback" not in errors
        assert run.returncode == 130
        assert not alive(server)
    finally:
        if alive(server):
            os.killpg(server, signal.SIGKILL)


def test_a_server_that_is_named_but_away_is_one_message(tmp_path: Path) -> None:
    url = "http://127.0.0.1:9/api"
    with (
        temporary_settings({PREFECT_API_URL: url}),
        pytest.raises(ServerError, match=f"must answer at {url}, .* start"),
        prefect_server(tmp_path),
    ):
        pass
