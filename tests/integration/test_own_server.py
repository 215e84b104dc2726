"""What ends with the project's own Prefect server: all that was started for it, also a run's own servers."""

import os
import socket
import subprocess
import sys
from pathlib import Path

import pytest

from flows.config import PROJECT
from flows.server import ServerError, own_server, started_for

pytestmark = pytest.mark.e2e

MODEL_SERVER = """
import signal, sys
from http.server import BaseHTTPRequestHandler, HTTPServer
from pathlib import Path

class Healthy(BaseHTTPRequestHandler):
    def do_GET(self):
        self.send_response(200)
        self.end_headers()

def leave(*_):
    Path(sys.argv[1]).write_text("asked to go")
    sys.exit()

signal.signal(signal.SIGTERM, leave)
HTTPServer(("127.0.0.1", int(sys.argv[2])), Healthy).serve_forever()
"""
RUN = """
import sys, time
from pathlib import Path
from tasks.adapters.server_process import ServerProcess

work_dir, code = Path(sys.argv[1]), sys.argv[2]
server = ServerProcess(
    "vllm",
    lambda port: [sys.executable, "-c", code, str(work_dir / "last-words"), str(port)],
    environment={},
    work_dir=work_dir,
    start_timeout=60,
)
server.start(lambda _: None)
print(server.url, flush=True)
time.sleep(600)
"""


def test_all_ends_with_it_and_model_servers_are_asked_to(tmp_path: Path) -> None:
    home = tmp_path / "prefect"
    with own_server(home) as server:
        run = subprocess.Popen(
            [sys.executable, "-c", RUN, str(tmp_path), MODEL_SERVER],
            cwd=PROJECT,
            env=server.environment,
            stdout=subprocess.PIPE,
            text=True,
            start_new_session=True,
        )
        assert run.stdout is not None
        assert run.stdout.readline().startswith("http://127.0.0.1:")
        # Server, run, guard and model server.
        assert len(started_for(home)) >= 4
        server.end_users()
        assert server.process.poll() is None
        assert {process.group for process in started_for(home)} == {server.process.pid}
        # A GPU's memory is given back by whom it was given to: the guard asked it to end, before anybody killed it.
        assert (tmp_path / "last-words").read_text() == "asked to go"
        assert list((tmp_path / "servers").glob("*.json")) == []
        run.wait()
    assert started_for(home) == []


def test_others_are_left_alone(tmp_path: Path) -> None:
    environment = {**os.environ, "VZERO_STARTED_FOR": str(tmp_path / "another")}
    other = subprocess.Popen(["sleep", "600"], env=environment)
    try:
        with own_server(tmp_path / "prefect"):
            pass
        assert other.poll() is None
    finally:
        other.kill()
        other.wait()


def test_a_port_that_is_taken_is_named(tmp_path: Path) -> None:
    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = taken.getsockname()[1]
        with pytest.raises(ServerError, match=f"port {port} must be free"), own_server(tmp_path / "prefect", port):
            pass
    # What failed holds nothing: it works with a port that is free.
    assert started_for(tmp_path / "prefect") == []
