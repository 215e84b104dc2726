"""Stages: what names a model, and whether student and teacher can work together."""

import json
import logging
from pathlib import Path
from typing import Any, ClassVar

from tasks.adapters.dataset import MODELS
from tasks.adapters.models import model_folder
from tasks.adapters.prompts import PromptProcessor
from tasks.adapters.store import Outcome, write_json
from tasks.artifacts import ArtifactRef, Job, Role
from tasks.config import PromptConfig
from tasks.stage import RunContext, stage
from vzero_core.errors import InputError

log = logging.getLogger("vzero.check_models")

PROBE = "What is written on the small sign? 0123456789"


class ModelJob(Job):
    """Name a model by its weights."""

    stage: ClassVar[str] = "model"

    weights: str
    role: Role

    @property
    def title(self) -> str:
        """How the run is called on the dashboard."""
        return f"model: {self.role}"


class CheckModelsJob(Job):
    """Check that student and teacher can work together."""

    stage: ClassVar[str] = "check_models"
    version: ClassVar[int] = 2

    student: ArtifactRef
    teacher: ArtifactRef
    prompt: PromptConfig


@stage(ModelJob)
def model(job: ModelJob, context: RunContext, folder: Path) -> Outcome:
    """Name a model: the policy before the first round, or the teacher."""
    policy = {"weights": job.weights, "num_updates": 0}
    write_json(folder / "policy.json", policy)
    return Outcome(summary={"role": job.role})


@stage(CheckModelsJob)
def check_models(job: CheckModelsJob, context: RunContext, folder: Path) -> Outcome:
    """Refuse models whose tokens or prompts differ, before anything is computed with them."""
    engines = context.engines
    student, teacher = model_folder(engines.student_path), model_folder(engines.teacher_path)
    ours, theirs = PromptProcessor(student), PromptProcessor(teacher)
    _require_same_tokens(ours, theirs)
    sizes = {path: _vocabulary_size(path) for path in (student, teacher)}
    if len(set(sizes.values())) > 1:
        raise InputError(
            f"student and teacher must have output layers of one size, got {sizes[student]} and {sizes[teacher]}; "
            "choose a teacher of the student's family"
        )
    for num_images in (1, 2):
        texts = [processor.render(PROBE, num_images, job.prompt) for processor in (ours, theirs)]
        if texts[0] != texts[1]:
            # The student's rendering is used for both, so this costs the teacher its habit, not correctness.
            log.warning("the teacher's chat template differs (%r); the student's is used for both", texts[1])
            break
    models = {
        "num_tokens": len(ours.tokenizer),
        "prompt": ours.render(PROBE, 1, job.prompt),
        "special_tokens": sorted(ours.special_tokens()),
        "context_tokens": {"student": _context_tokens(student), "teacher": _context_tokens(teacher)},
    }
    write_json(folder / MODELS, models)
    return Outcome(summary={"num_tokens": len(ours.tokenizer)})


def _require_same_tokens(student: PromptProcessor, teacher: PromptProcessor) -> None:
    ours, theirs = student.tokenizer.get_vocab(), teacher.tokenizer.get_vocab()
    different = sorted(
        (token for token in {*ours, *theirs} if ours.get(token) != theirs.get(token)),
        key=lambda token: (ours.get(token, len(ours)), token),
    )
    if different:
        token = different[0]
        raise InputError(
            f"student and teacher must have the same tokenizer, but {len(different)} tokens differ; the first is "
            f"{token!r}: id {ours.get(token, 'none')} in the student, {theirs.get(token, 'none')} in the teacher; "
            "choose a teacher of the student's family"
        )
    left, right = (processor.tokenizer(PROBE)["input_ids"] for processor in (student, teacher))
    if left != right:
        raise InputError(
            f"student and teacher must split text alike, but {PROBE!r} gives {left} and {right}; "
            "choose a teacher of the student's family"
        )


def _vocabulary_size(folder: Path) -> int:
    return int(_text_setting(folder, "vocab_size") or 0)


def _context_tokens(folder: Path) -> int | None:
    """Give how many tokens prompt and response may have together, where the model says so."""
    return _text_setting(folder, "max_position_embeddings")


def _text_setting(folder: Path, name: str) -> int | None:
    config: dict[str, Any] = json.loads((folder / "config.json").read_text())
    value: int | None = config.get("text_config", config).get(name, config.get(name))
    return value
