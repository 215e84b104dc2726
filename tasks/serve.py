"""Engines and trainer as resources of one run: started when first needed, stopped by the flow that started them."""

from functools import cached_property
from pathlib import Path
from types import TracebackType
from typing import Self

import torch

from tasks.adapters.dataset import Dataset
from tasks.adapters.models import model_folder
from tasks.adapters.prompts import PromptProcessor
from tasks.adapters.store import Store
from tasks.adapters.trainer import Trainer
from tasks.adapters.training_data import CheckpointJob, TrainJob
from tasks.adapters.transformers_engine import TransformersEngine
from tasks.artifacts import ArtifactRef
from tasks.config import ModelConfig, PlacementConfig


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
        work_dir: Path,
    ) -> None:
        """Set where the models are; nothing is loaded yet."""
        self._store = store
        self._student_config = student
        self._teacher_config = teacher
        self._placement = placement
        self._work_dir = work_dir
        self.student_path = student.path
        self.teacher_path = teacher.path
        self._student: TransformersEngine | None = None
        self._teacher: TransformersEngine | None = None
        self.trainer = Trainer(
            store,
            dataset,
            student=student.path,
            work_dir=work_dir,
            device=placement.student_device,
            max_batch_tokens=placement.max_batch_tokens,
        )

    def __enter__(self) -> Self:
        """Set what holds for the whole process."""
        torch.set_num_threads(self._placement.threads)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        """Let go of what was started, here and now: tensors freed by another thread at exit abort the process."""
        self._student = self._teacher = None
        self.trainer.release()

    @cached_property
    def renderer(self) -> PromptProcessor:
        """Renders the prompts of student and teacher alike."""
        return PromptProcessor(model_folder(self._student_config.path))

    def student(self, policy: ArtifactRef) -> TransformersEngine:
        """Give the sampling engine, holding a policy's weights."""
        folder = self._weights(policy)
        if self._student is None:
            self._student = TransformersEngine(
                folder,
                policy.digest,
                dtype=self._student_config.dtype,
                device=self._placement.student_device,
                max_batch_tokens=self._placement.max_batch_tokens,
            )
        self._student.load_weights(folder, policy.digest)
        return self._student

    def teacher(self) -> TransformersEngine:
        """Give the teacher's engine."""
        if self._teacher is None:
            self._teacher = TransformersEngine(
                model_folder(self._teacher_config.path),
                "teacher",
                dtype=self._teacher_config.dtype,
                device=self._placement.teacher_device,
                max_batch_tokens=self._placement.max_batch_tokens,
            )
        return self._teacher

    def _weights(self, policy: ArtifactRef) -> Path:
        """Give a local folder with a policy's weights: what lies here, a stored one, or training repeated."""
        if policy.stage != TrainJob.stage:
            return model_folder(self._student_config.path)
        local = self._work_dir / f"policy-{policy.key}" / "model"
        if local.is_dir():
            return local
        checkpoint = self._store.find(CheckpointJob.stage, CheckpointJob(train_key=policy.key).key)
        if checkpoint is not None and not checkpoint.pruned:
            fetched = self._work_dir / f"resumed-{checkpoint.key}"
            if not fetched.is_dir():
                self._store.fetch(checkpoint.ref, "model", fetched)
            return fetched
        return self.trainer.train(TrainJob.model_validate(self._store.manifest(policy).job)).folder / "model"
