"""One of the processes that train together: `accelerate launch ... -m tasks.adapters.trainer_worker [PORT]`.

The main process takes jobs at PORT of 127.0.0.1, from who knows the key in the environment, and hands each one on to
the others; these, on this machine or on others, need no port and no settings of their own.
"""

import ctypes
import hmac
import json
import os
import signal
import sys
import time
import traceback
from dataclasses import asdict
from datetime import timedelta
from http.server import BaseHTTPRequestHandler, HTTPServer

import torch
import torch.distributed as dist
from accelerate import PartialState
from accelerate.utils import str_to_bool
from torch.distributed.distributed_c10d import _get_default_store
from torch.distributed.elastic.multiprocessing.errors import record

from tasks.adapters.dataset import Dataset
from tasks.adapters.images import ImageReader
from tasks.adapters.store import Store
from tasks.adapters.trainer import Trainer, Update
from tasks.adapters.trainer_process import KEY_VARIABLE, TrainerSettings, TrainingRequest, open_trainer
from vzero_core.errors import VZeroError

_IDLE_TIMEOUT = timedelta(days=30)
"""How long the other processes wait for a job: sampling and replay lie between two."""
_STEP_TIMEOUT = timedelta(hours=3)
"""How long processes wait for one another in a job: the main one writes a state alone."""
_LAST_WORD = 5.0
"""Seconds in which the main process can tell an error that all processes have; the launcher ends all with the first."""
_FAILURE = "failure"
"""Key in the processes' common store of the error of one that is not the main one."""
_SET_DEATH_SIGNAL = 1
"""PR_SET_PDEATHSIG of prctl(2)."""


class Worker:
    """A process's part in every job."""

    def __init__(self) -> None:
        """Join the other processes."""
        self._cpu = str_to_bool(os.environ.get("ACCELERATE_USE_CPU", "false")) == 1
        self.state = PartialState(cpu=self._cpu, timeout=_STEP_TIMEOUT)
        # Of its own: waiting for days neither keeps a GPU busy nor runs into the time-out of gradients.
        self._group = dist.new_group(backend="gloo", timeout=_IDLE_TIMEOUT)
        self._settings: TrainerSettings | None = None
        self._trainer: Trainer | None = None

    def train(self, body: bytes) -> Update:
        """Do a job that the main process was given, together with the others, which call `follow`."""
        self._broadcast(torch.tensor([len(body)]))
        self._broadcast(torch.frombuffer(bytearray(body), dtype=torch.uint8))
        return self._do(body)

    def follow(self) -> None:
        """Do the main process's jobs until this process is ended."""
        while True:
            length = torch.zeros(1, dtype=torch.int64)
            self._broadcast(length)
            body = torch.zeros(int(length), dtype=torch.uint8)
            self._broadcast(body)
            try:
                self._do(body.numpy().tobytes())
            except Exception as error:
                _get_default_store().set(_FAILURE, json.dumps(_told(error)))
                time.sleep(_LAST_WORD)
                raise

    def end(self) -> None:
        """Let go of the trainer."""
        if self._trainer is not None:
            self._trainer.release()

    def _broadcast(self, tensor: torch.Tensor) -> None:
        dist.broadcast(tensor, src=0, group=self._group)

    def _do(self, body: bytes) -> Update:
        request = TrainingRequest.model_validate_json(body)
        if self._trainer is None or request.settings != self._settings:
            self.end()
            self._settings = request.settings
            self._trainer = self._open(request.settings)
        return self._trainer.train(request.job)

    def _open(self, settings: TrainerSettings) -> Trainer:
        torch.set_num_threads(settings.threads)
        store = Store(settings.store, settings.work_dir, settings.cache_bytes)
        dataset = Dataset(store, ImageReader(settings.images, settings.max_image_pixels))
        return open_trainer(settings, store, dataset, device="cpu" if self._cpu else "")


class _Server(HTTPServer):
    """Takes one job after the other."""

    def __init__(self, port: int, worker: Worker, key: str) -> None:
        super().__init__(("127.0.0.1", port), _Handler)
        self.worker = worker
        self.key = key
        self.failed = False


class _Handler(BaseHTTPRequestHandler):
    server: _Server
    # Seconds: who connects and says nothing must not keep a job waiting.
    timeout = 10

    def do_GET(self) -> None:
        self._reply(200 if self.path == "/health" else 404, {})

    def do_POST(self) -> None:
        given = self.headers.get("Authorization", "").removeprefix("Bearer ")
        if not hmac.compare_digest(given.encode(), self.server.key.encode()):
            return self._reply(401, {"kind": "", "error": "the key must be the trainer's"})
        body = self.rfile.read(int(self.headers["Content-Length"]))
        # Whatever happens now, the processes are not in step unless it ends well.
        self.server.failed = True
        try:
            update = self.server.worker.train(body)
        except Exception as error:
            told = _told(error)
            if not isinstance(error, VZeroError):
                traceback.print_exc()
                # Most often a lost connection, to a process that had said why before it went.
                if (store := _get_default_store()).check([_FAILURE]):
                    told = json.loads(store.get(_FAILURE))
            return self._reply(500, told)
        self.server.failed = False
        self._reply(200, asdict(update) | {"folder": str(update.folder)})

    def log_message(self, *_: object) -> None:
        """Say nothing of every request."""

    def _reply(self, status: int, content: dict[str, object]) -> None:
        body = json.dumps(content).encode()
        self.send_response(status)
        self.send_header("Content-Length", str(len(body)))
        self.end_headers()
        self.wfile.write(body)


def _told(error: Exception) -> dict[str, object]:
    return {"kind": type(error).__name__, "error": str(error)}


def _die_with_the_launcher() -> None:
    """Let the kernel end this process with its parent: the launcher gives it a session that nobody else watches."""
    parent = os.getppid()
    ctypes.CDLL(None, use_errno=True).prctl(_SET_DEATH_SIGNAL, signal.SIGKILL)
    if os.getppid() != parent:
        sys.exit("the launcher has ended")


@record
def main() -> int:
    """Work until ended; 1 after an error."""
    _die_with_the_launcher()
    worker = Worker()
    if not worker.state.is_main_process:
        worker.follow()
    # A tracker on another machine wants to be told that the run has ended.
    signal.signal(signal.SIGTERM, lambda *_: sys.exit())
    try:
        server = _Server(int(sys.argv[1]), worker, os.environ[KEY_VARIABLE])
        while not server.failed:
            server.handle_request()
    finally:
        worker.end()
    return 1


if __name__ == "__main__":
    sys.exit(main())
