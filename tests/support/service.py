"""The project as a service, as `make serve` starts it, in a folder of its own."""

import json
import os
import signal
import socket
import subprocess
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from prefect.settings import PREFECT_API_URL, temporary_settings

from flows.config import PROJECT, RunConfig

_CODE = """
import sys
from pathlib import Path
from flows import serve
serve.HOME = Path(sys.argv[1])
sys.exit(serve.main(sys.argv[2:]))
"""


@contextmanager
def serving(folder: Path, config: RunConfig) -> Iterator[str]:
    """Give the dashboard's address; deployments have the configuration for their default, and workers run.

    Args:
        folder: gets the server's home and the configuration.
        config: whose paths are absolute.
    """
    (folder / "my.toml").write_text(_toml_lines(config.model_dump(mode="json", exclude_none=True)))
    port = _two_free_ports()
    # Whatever server other tests have started.
    environment = {name: value for name, value in os.environ.items() if name != "PREFECT_API_URL"}
    command = [
        sys.executable,
        "-c",
        _CODE,
        str(folder / "home"),
        "--config",
        str(folder / "my.toml"),
        "--port",
        str(port),
    ]
    service = subprocess.Popen(
        command, cwd=PROJECT, env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    assert service.stdout is not None
    try:
        said = []
        for line in service.stdout:
            said.append(line)
            if "Ctrl-C" in line:
                break
        else:
            raise AssertionError("the service did not start:\n" + "".join(said))
        with temporary_settings({PREFECT_API_URL: f"http://127.0.0.1:{port}/api"}):
            yield f"http://127.0.0.1:{port}"
    finally:
        service.send_signal(signal.SIGINT)
        service.communicate()


def _toml_lines(values: dict[str, Any]) -> str:
    return "".join(f"{name} = {_toml(value)}\n" for name, value in values.items())


def _toml(value: Any) -> str:
    if isinstance(value, dict):
        return "{" + ", ".join(f"{name} = {_toml(inner)}" for name, inner in value.items()) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_toml, value)) + "]"
    # Text, numbers and truth are written alike.
    return json.dumps(value)


def _two_free_ports() -> int:
    """Give the first of two ports in a row that are free."""
    while True:
        with socket.socket() as first, socket.socket() as second:
            first.bind(("127.0.0.1", 0))
            port: int = first.getsockname()[1]
            try:
                second.bind(("127.0.0.1", port + 1))
            except OSError:
                continue
            return port
