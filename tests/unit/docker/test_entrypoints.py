"""The containers' programs, run as they are, outside a container."""

import http.server
import os
import shlex
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import pytest

from flows.config import PROJECT
from tasks.adapters.models import model_folder
from tasks.adapters.vllm_command import server_command
from tasks.config import ModelConfig, ServersConfig, VLLMEngine

FOLDER = PROJECT / "docker"
OURS = ("PREFECT_API_URL", "VZERO_", "VLLM_", "TMPDIR")
NOBODY = "http://127.0.0.1:9/api"
TOLD = 'for word in "$@"; do printf "%s\\n" "$word"; done'


def _environment(programs: Path | None = None, **variables: str) -> dict[str, str]:
    kept = {name: value for name, value in os.environ.items() if not name.startswith(OURS)}
    first = [str(programs)] if programs else []
    return kept | {"PATH": os.pathsep.join([*first, str(Path(sys.executable).parent), kept["PATH"]])} | variables


def _run(script: str, environment: dict[str, str], *arguments: str) -> subprocess.CompletedProcess[str]:
    command = [str(FOLDER / script), *arguments]
    return subprocess.run(command, env=environment, capture_output=True, text=True, check=False, timeout=60)


@pytest.fixture
def programs(tmp_path: Path) -> Path:
    """Programs that say what they were started with, in place of those that a container would go on with."""
    folder = tmp_path / "programs"
    folder.mkdir()
    for name in ("prefect", "python3"):
        (folder / name).write_text(f"#!/bin/sh\n{TOLD}\n")
        (folder / name).chmod(0o755)
    return folder


class _Server(http.server.ThreadingHTTPServer):
    """Prefect's API, as far as it is asked for its health."""

    status = 200

    def __init__(self) -> None:
        super().__init__(("127.0.0.1", 0), _Health)
        self.was_asked = threading.Event()


class _Health(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        assert isinstance(self.server, _Server)
        self.server.was_asked.set()
        self.send_response(self.server.status if self.path == "/api/health" else 404)
        self.end_headers()

    def log_message(self, *args: object) -> None:
        pass


@contextmanager
def health(status: int = 200) -> Iterator[_Server]:
    with _Server() as server:
        server.status = status
        threading.Thread(target=server.serve_forever, daemon=True).start()
        yield server
        server.shutdown()


def _url(server: _Server) -> str:
    return f"http://127.0.0.1:{server.server_address[1]}/api"


# --- worker -------------------------------------------------------------------------------------------------------

WORKER = {"PREFECT_API_URL": NOBODY, "VZERO_POOL": "vzero-cpu"}


@pytest.mark.parametrize(
    ("variables", "message"),
    [
        ({"VZERO_POOL": "vzero-cpu"}, "PREFECT_API_URL must be the address of Prefect's server, got none; set it, "),
        ({"PREFECT_API_URL": NOBODY}, "VZERO_POOL must be a work pool, got none; set vzero-cpu or vzero-gpu"),
        (WORKER | {"VZERO_DEPLOY": "yes"}, "VZERO_DEPLOY must be true or false, got yes; correct it"),
        (WORKER | {"VZERO_CONFIG": "/none.toml"}, "VZERO_CONFIG must be a file that can be read, got /none.toml; "),
        (WORKER | {"VZERO_WAIT_SECONDS": "1"}, "Prefect's server must answer within 1 s, but: http://127.0.0.1:9/"),
    ],
)
def test_what_is_missing_is_said(programs: Path, variables: dict[str, str], message: str) -> None:
    found = _run("worker-entrypoint.sh", _environment(programs, **variables))
    assert found.returncode == 1
    assert found.stdout == ""
    assert found.stderr.startswith(f"error: {message}")
    assert found.stderr.count("\n") == 1


def test_a_server_that_is_not_well_is_not_taken_for_one(programs: Path) -> None:
    with health(status=503) as server:
        variables = WORKER | {"PREFECT_API_URL": _url(server), "VZERO_WAIT_SECONDS": "1"}
        found = _run("worker-entrypoint.sh", _environment(programs, **variables))
    assert found.returncode == 1
    assert "HTTP Error 503" in found.stderr


def test_the_worker_starts_once_the_server_is_well(programs: Path, tmp_path: Path) -> None:
    with health(status=503) as server:
        variables = WORKER | {"PREFECT_API_URL": _url(server) + "/", "TMPDIR": str(tmp_path / "large" / "files")}
        process = subprocess.Popen(
            [str(FOLDER / "worker-entrypoint.sh"), "--limit", "2"],
            env=_environment(programs, **variables),
            stdout=subprocess.PIPE,
            text=True,
        )
        assert server.was_asked.wait(timeout=20)
        assert process.poll() is None
        server.status = 200
        printed, _ = process.communicate(timeout=30)
    assert process.returncode == 0
    words = ["worker", "start", "--pool", "vzero-cpu", "--type", "process", "--no-create-pool-if-not-found"]
    assert printed.splitlines() == [*words, "--with-healthcheck", "--limit", "2"]
    assert (tmp_path / "large" / "files").is_dir()


@pytest.mark.parametrize(("sent", "code"), [(signal.SIGTERM, 143), (signal.SIGINT, 130)])
def test_who_waits_can_be_stopped(programs: Path, sent: signal.Signals, code: int) -> None:
    with health(status=503) as server:
        process = subprocess.Popen(
            [str(FOLDER / "worker-entrypoint.sh")],
            env=_environment(programs, **WORKER | {"PREFECT_API_URL": _url(server)}),
            # As in a container: a shell without a terminal may be told to pass over SIGINT.
            start_new_session=True,
        )
        assert server.was_asked.wait(timeout=20)
        process.send_signal(sent)
        assert process.wait(timeout=20) == code


def test_what_fails_to_deploy_starts_no_worker(programs: Path, tmp_path: Path) -> None:
    wrong = tmp_path / "my.toml"
    wrong.write_text("rouns = 3\n")
    with health() as server:
        variables = WORKER | {"PREFECT_API_URL": _url(server), "VZERO_DEPLOY": "true", "VZERO_CONFIG": str(wrong)}
        found = _run("worker-entrypoint.sh", _environment(programs, **variables))
    assert found.returncode == 1
    assert "rouns is no setting" in found.stderr
    assert "worker" not in found.stdout


# --- vLLM ---------------------------------------------------------------------------------------------------------

VLLM = {
    "VZERO_MODEL": str(model_folder("embedded:teacher")),
    "VZERO_SERVED_NAME": "teacher",
    "VLLM_API_KEY": "key",
}


@pytest.mark.parametrize(
    ("changed", "message"),
    [
        ({"VZERO_MODEL": ""}, "VZERO_MODEL must be the folder of a model, got none; set it, "),
        ({"VZERO_MODEL": "/none"}, "VZERO_MODEL must be a folder with a config.json, got /none; mount the model there"),
        ({"VZERO_SERVED_NAME": ""}, "VZERO_SERVED_NAME must be served_name of the configuration, got none; "),
        ({"VLLM_API_KEY": ""}, "VLLM_API_KEY must be a key of your own, got none; "),
    ],
)
def test_what_a_vllm_server_lacks_is_said(programs: Path, changed: dict[str, str], message: str) -> None:
    found = _run("vllm-entrypoint.sh", _environment(programs, **VLLM | changed))
    assert (found.returncode, found.stdout) == (1, "")
    assert found.stderr.startswith(f"error: {message}")


def _flags(words: list[str]) -> dict[str, str]:
    """Give flags and their values; a switch has none."""
    flags: dict[str, str] = {}
    for word in words:
        if word.startswith("--"):
            name = word
            flags[name] = ""
        else:
            flags[name] = word
    return flags


def test_a_vllm_server_has_the_flags_of_those_that_a_run_starts(programs: Path) -> None:
    environment = _environment(programs, **VLLM, VZERO_MAX_MODEL_LEN="27136")
    found = _run("vllm-entrypoint.sh", environment, "--gpu-memory-utilization", "0.85")
    assert found.returncode == 0
    words = found.stdout.splitlines()
    assert words[:2] == ["-m", "vllm.entrypoints.openai.api_server"]
    model = ModelConfig(path="embedded:teacher", dtype="bfloat16", engine=VLLMEngine(version="0.32.0"))
    servers = ServersConfig(
        command=("python3",), devices=("0",), served_name="teacher", max_model_len=27136, memory_share=0.85
    )
    by_run = _flags(server_command(model_folder(model.path), model, servers, 8000)[1:])
    # In a container others reach it, and one GPU is not said.
    by_run["--host"] = "0.0.0.0"
    del by_run["--tensor-parallel-size"], by_run["--data-parallel-size"]
    assert _flags(words[2:]) == by_run


def test_the_key_is_on_no_command_line(programs: Path) -> None:
    found = _run("vllm-entrypoint.sh", _environment(programs, **VLLM | {"VLLM_API_KEY": "geheim"}))
    assert "geheim" not in shlex.join(found.stdout.splitlines())
