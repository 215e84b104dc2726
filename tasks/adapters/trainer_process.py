"""The trainer on several processes: started by accelerate's launcher, given its jobs over a loopback socket."""

import http.client
import json
import logging
import secrets
import sys
import time
from collections.abc import Callable
from contextlib import AbstractContextManager
from pathlib import Path
from urllib.parse import urlsplit

import fsspec

from tasks.adapters.accelerator import make_accelerator
from tasks.adapters.dataset import Dataset
from tasks.adapters.server_process import ServerError, ServerProcess
from tasks.adapters.store import Store, StoreError
from tasks.adapters.trainer import Trainer, Update
from tasks.adapters.training_data import TrainJob
from tasks.config import Settings, TrainerConfig
from tasks.ports import Advance
from vzero_core.errors import ConfigError, InputError

log = logging.getLogger("vzero.trainer")

KEY_VARIABLE = "VZERO_TRAINER_KEY"
"""Environment variable with the key that jobs must bring."""
_START_TIMEOUT = 600.0
"""Seconds until all processes have joined; models are loaded later, with the first job."""
_END_TIMEOUT = 60.0
"""Seconds after a lost connection in which the launcher ends."""
_ERRORS = {kind.__name__: kind for kind in (ConfigError, InputError, StoreError)}


class TrainerSettings(Settings):
    """What a trainer needs beside its jobs; secrets come from the environment."""

    store: str
    cache_bytes: int
    images: str
    max_image_pixels: int
    student: str
    work_dir: Path
    max_batch_tokens: int
    threads: int
    placement: TrainerConfig
    trackers: tuple[str, ...]
    run_name: str


def open_trainer(settings: TrainerSettings, store: Store, dataset: Dataset, *, device: str) -> Trainer:
    """Give this process's trainer, which trains alone or as one of several.

    Args:
        settings: what it needs.
        store: where rollouts, replays, weights and training states are read from.
        dataset: samples and images.
        device: torch device; "" for the one that accelerate gives this process.
    """
    accelerator = make_accelerator(
        cpu=device == "cpu",
        trackers=settings.trackers,
        run_name=settings.run_name,
        folder=settings.work_dir / "trackers",
    )
    return Trainer(
        store,
        dataset,
        accelerator,
        student=settings.student,
        work_dir=settings.work_dir,
        device=device or str(accelerator.device),
        max_batch_tokens=settings.max_batch_tokens,
        placement=settings.placement,
    )


class TrainingRequest(Settings):
    """What every process is given for one job."""

    settings: TrainerSettings
    job: TrainJob


class TrainerProcesses:
    """A trainer elsewhere: started with the first job, started once more where it is lost, and stopped by `release`."""

    def __init__(
        self, settings: TrainerSettings, *, track: Callable[[str, int], AbstractContextManager[Advance]]
    ) -> None:
        """Prepare; nothing is started yet.

        Args:
            settings: what the processes need.
            track: shows progress, given a title and a total.
        """
        self._settings = settings
        self._track = track
        self._key = secrets.token_hex(16)
        self._last: tuple[str, Update] | None = None
        self._released = False
        self._server = ServerProcess(
            "trainer",
            lambda port: launch_command(settings.placement, port),
            environment=self._environment(),
            work_dir=settings.work_dir,
            start_timeout=_START_TIMEOUT,
        )

    def train(self, job: TrainJob) -> Update:
        """Make the policy that follows `job.policy`; a job done last costs nothing again.

        Raises:
            InputError: the optimizer's settings do not fit the student.
            StoreError: an input or every training state on the way is missing or damaged.
            ServerError: the processes do not start, or were lost or failed twice.
        """
        if self._last is not None and self._last[0] == job.key:
            return self._last[1]
        try:
            update = self._ask(job)
        except _LostError as error:
            if self._released:
                raise
            log.warning("%s; it is started once more", error)
            update = self._ask(job)
        self._last = (job.key, update)
        return update

    def release(self) -> None:
        """Stop all processes."""
        self._released = True
        self._server.stop()

    def _environment(self) -> dict[str, str]:
        settings = self._settings
        environment = {KEY_VARIABLE: self._key, "OMP_NUM_THREADS": str(settings.threads)}
        if "s3" in fsspec.config.conf:
            # fsspec reads it from there when it is imported.
            environment["FSSPEC_S3"] = json.dumps(fsspec.config.conf["s3"])
        if settings.placement.num_machines == 1:
            environment |= {"GLOO_SOCKET_IFNAME": "lo", "NCCL_SOCKET_IFNAME": "lo"}
        if settings.placement.devices:
            return environment | {"CUDA_VISIBLE_DEVICES": ",".join(settings.placement.devices)}
        return environment | {"ACCELERATE_USE_CPU": "true"}

    def _ask(self, job: TrainJob) -> Update:
        if not self._server.is_running():
            with self._track(f"starting {self._settings.placement.total_processes} training processes", 1) as advance:
                self._server.start(lambda _: None)
                advance(1)
        address = urlsplit(self._server.url)
        connection = http.client.HTTPConnection(str(address.hostname), address.port)
        body = TrainingRequest(settings=self._settings, job=job).model_dump_json()
        try:
            connection.request("POST", "/train", body, {"Authorization": f"Bearer {self._key}"})
            response = connection.getresponse()
            reply = json.loads(response.read())
        except (OSError, http.client.HTTPException) as error:
            raise self._lost() from error
        finally:
            connection.close()
        if response.status == http.client.OK:
            return Update(**reply | {"folder": Path(reply["folder"])})
        # What its processes hold is unknown now.
        self._server.stop()
        if reply["kind"] in _ERRORS:
            raise _ERRORS[reply["kind"]](reply["error"])
        # Its own mistake, or that another process was lost, which looks like anything from here.
        raise _LostError(
            f"the trainer must end its round, but it failed with {reply['kind']}: {reply['error']}; "
            f"see {self._server.log}"
        )

    def _lost(self) -> "_LostError":
        deadline = time.monotonic() + _END_TIMEOUT
        while self._server.is_running() and time.monotonic() < deadline:
            time.sleep(0.1)
        error = self._server.lost()
        self._server.stop()
        return _LostError(str(error))


class _LostError(ServerError):
    """The processes ended, or failed by no fault of the job's."""


def launch_command(placement: TrainerConfig, port: int) -> list[str]:
    """Give the command that starts the processes of the first machine.

    Args:
        placement: how many there are, on which machines.
        port: of 127.0.0.1, where the main process takes jobs.
    """
    host, _, meeting = (placement.address or "127.0.0.1:0").rpartition(":")
    # --multi_gpu means several processes, also on the CPU.
    command = [sys.executable, "-m", "accelerate.commands.launch", "--multi_gpu"]
    command += ["--num_machines", str(placement.num_machines), "--machine_rank", "0"]
    command += ["--num_processes", str(placement.total_processes)]
    command += ["--main_process_ip", host, "--main_process_port", meeting]
    # Named, so that no file of the user's about accelerate sets them: which GPUs there are says the environment.
    command += ["--mixed_precision", "no", "--dynamo_backend", "no", "--gpu_ids", "all"]
    return [*command, "-m", "tasks.adapters.trainer_worker", str(port)]
