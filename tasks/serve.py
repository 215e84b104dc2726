"""Engines and trainer as resources of one run: started when first needed, stopped by the flow that started them."""

import logging
import threading
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Literal, Self

import torch
from prefect.client.orchestration import get_client
from prefect.concurrency.sync import concurrency
from prefect.context import TaskRunContext
from prefect.exceptions import ObjectNotFound

from tasks.adapters.dataset import Dataset
from tasks.adapters.models import model_folder
from tasks.adapters.prompts import PromptProcessor
from tasks.adapters.server_process import ServerError, sweep
from tasks.adapters.store import Store
from tasks.adapters.trainer import Trainer, fetch_state
from tasks.adapters.trainer_process import TrainerProcesses, TrainerSettings, open_trainer
from tasks.adapters.training_data import CheckpointJob, TrainJob
from tasks.adapters.transformers_engine import TransformersEngine
from tasks.adapters.vllm_engine import VLLMEngine
from tasks.adapters.vllm_servers import VLLMServers
from tasks.artifacts import ArtifactRef, Role
from tasks.config import InProcessEngine, ModelConfig, PlacementConfig
from tasks.ports import Advance, PolicyEngine

log = logging.getLogger("vzero.serve")

LEASE_SECONDS = 60
"""After so long at most, and Prefect's least, the place of a run that was killed is free again."""


def teacher_limit(url: str) -> str:
    """Give the name of the Prefect concurrency limit of an attached teacher server.

    Args:
        url: http://HOST:PORT, as in the configuration.
    """
    # Prefect takes no slash in a name.
    return f"vzero-teacher-{url.partition('://')[2]}"


class Engines:
    """The run's student, teacher and trainer."""

    def __init__(
        self,
        store: Store,
        dataset: Dataset,
        *,
        student: ModelConfig,
        teacher: ModelConfig,
        placement: PlacementConfig,
        training: TrainerSettings,
        work_dir: Path,
        track: Callable[[str, int], AbstractContextManager[Advance]],
    ) -> None:
        """Set where the models are; nothing is loaded yet.

        Args:
            store: where weights are read from.
            dataset: what the trainer reads images from.
            student: the model that learns.
            teacher: the model that replays.
            placement: devices and servers.
            training: what the trainer needs, in whatever process.
            work_dir: local folder for current weights and servers' logs.
            track: shows progress, given a title and a total.
        """
        self._store = store
        self._student_config = student
        self._teacher_config = teacher
        self._placement = placement
        self._work_dir = work_dir
        self._track = track
        self.student_path = student.path
        self.teacher_path = teacher.path
        self._student: TransformersEngine | VLLMEngine | None = None
        self._teacher: TransformersEngine | VLLMEngine | None = None
        # A shard is replayed in a thread of its own, which must start nothing after the run has ended.
        self._lock = threading.Lock()
        self._closed = False
        self._dataset = dataset
        self._training = training
        self._trainer: Trainer | TrainerProcesses | None = None

    def __enter__(self) -> Self:
        """Set what holds for the whole process, and end servers that a killed run left behind."""
        torch.set_num_threads(self._placement.threads)
        if ended := sweep(self._work_dir):
            log.warning("ended %d servers that an earlier run had left", ended)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of what was started, here and now: tensors freed by another thread at exit abort the process."""
        with self._lock:
            self._closed = True
        for engine in (self._student, self._teacher):
            if isinstance(engine, VLLMEngine):
                engine.close()
        if self._trainer is not None:
            self._trainer.release()
        self._student = self._teacher = self._trainer = None

    @cached_property
    def renderer(self) -> PromptProcessor:
        """Renders the prompts of student and teacher alike."""
        return PromptProcessor(model_folder(self._student_config.path))

    @property
    def trainer(self) -> Trainer | TrainerProcesses:
        """The trainer, in this process or in several of its own."""
        if self._trainer is None:
            if self._training.placement.total_processes > 1:
                self._trainer = TrainerProcesses(self._training, track=self._track)
            else:
                device = self._placement.student_device
                self._trainer = open_trainer(self._training, self._store, self._dataset, device=device)
        return self._trainer

    def student(self, policy: ArtifactRef) -> PolicyEngine:
        """Give the sampling engine, holding a policy's weights."""
        folder = self._weights(policy)
        with self._lock:
            if self._student is None:
                self._student = self._engine("student", folder, policy.digest)
            student = self._student
        student.load_weights(folder, policy.digest)
        return student

    def teacher(self, model: ArtifactRef) -> TransformersEngine | VLLMEngine:
        """Give the teacher's engine: it replays, and answers questions to be compared with."""
        folder = model_folder(self._teacher_config.path)
        with self._lock:
            if self._teacher is None:
                self._teacher = self._engine("teacher", folder, model.digest)
            teacher = self._teacher
        teacher.load_weights(folder, model.digest)
        return teacher

    @contextmanager
    def asking_teacher(self) -> Iterator[None]:
        """Hold a place at every attached teacher server while it is asked; other runs wait for theirs.

        Nothing is held where the run starts its own servers, or where there is no limit (`python -m flows.deploy`).
        """
        if TaskRunContext.get() is None:
            yield
        else:
            with concurrency(self._teacher_limits, lease_duration=LEASE_SECONDS):
                yield

    @cached_property
    def _teacher_limits(self) -> list[str]:
        names = [teacher_limit(url) for url in self._placement.teacher_servers.urls]
        return [name for name in names if _has_limit(name)]

    def gpu_seconds(self, work: Role | Literal["trainer"], seconds: float) -> dict[str, float]:
        """Give what a stage cost on GPUs, as a measured figure; none where it took place on CPU, or on others' servers.

        Args:
            work: who worked.
            seconds: for how long.
        """
        placement = self._placement
        config = self._teacher_config if work == "teacher" else self._student_config
        device = placement.teacher_device if work == "teacher" else placement.student_device
        if work == "trainer" and placement.trainer.devices:
            # One each, on every machine.
            num_gpus = placement.trainer.total_processes
        elif work != "trainer" and not isinstance(config.engine, InProcessEngine):
            num_gpus = len((placement.teacher_servers if work == "teacher" else placement.student_servers).devices)
        else:
            num_gpus = int(device != "cpu")
        return {"gpu_seconds": num_gpus * seconds} if num_gpus else {}

    def _engine(self, role: Role, folder: Path, digest: str) -> TransformersEngine | VLLMEngine:
        if self._closed:
            raise ServerError(f"the {role} must be asked while the run lasts, but it has ended")
        config = self._student_config if role == "student" else self._teacher_config
        placement = self._placement
        if isinstance(config.engine, InProcessEngine):
            return TransformersEngine(
                folder,
                digest,
                dtype=config.dtype,
                device=placement.student_device if role == "student" else placement.teacher_device,
                max_batch_tokens=placement.max_batch_tokens,
            )
        where = placement.student_servers if role == "student" else placement.teacher_servers
        servers = VLLMServers(
            role,
            config,
            where,
            exchangeable=role == "student",
            work_dir=self._work_dir,
            threads=placement.threads,
            track=self._track,
        )
        return VLLMEngine(servers, folder, read_prefix_cache=where.read_prefix_cache)

    def _weights(self, policy: ArtifactRef) -> Path:
        """Give a local folder with a policy's weights: what lies here, a stored one, or training repeated."""
        if policy.stage != TrainJob.stage:
            return model_folder(self._student_config.path)
        local = self._work_dir / f"policy-{policy.key}" / "model"
        if local.is_dir():
            return local
        checkpoint = self._store.find(CheckpointJob.stage, CheckpointJob(train_key=policy.key).key)
        if checkpoint is not None and not checkpoint.pruned:
            return fetch_state(self._store, checkpoint.ref, self._work_dir) / "model"
        return self.trainer.train(TrainJob.model_validate(self._store.manifest(policy).job)).folder / "model"


def _has_limit(name: str) -> bool:
    with get_client(sync_client=True) as client:
        try:
            client.read_global_concurrency_limit_by_name(name)
        except ObjectNotFound:
            return False
    return True
