"""Small students to publish: folders as a registry takes them, and what it says of them."""

from datetime import UTC, datetime
from pathlib import Path
from typing import Any

from support.run_artifacts import Run

from flows.config import RunConfig
from tasks.adapters.model_card import PublishJob
from tasks.adapters.registry import Version, list_files
from tasks.artifacts import ArtifactRef

START = datetime(2026, 1, 1, tzinfo=UTC)


def ref(name: str) -> ArtifactRef:
    return ArtifactRef(stage="train", key=name, digest=name)


def write_student(folder: Path, weights: bytes = b"weights", card: str = "card") -> Path:
    (folder / "model" / "deep").mkdir(parents=True)
    (folder / "model" / "config.json").write_text("{}")
    (folder / "model" / "deep" / "model.safetensors").write_bytes(weights)
    (folder / "README.md").write_text(card)
    return folder


def version_of(folder: Path, name: str, **changes: Any) -> Version:
    fields: dict[str, Any] = {
        "name": name,
        "run": "run",
        "created_at": START,
        "parent": None,
        "policy": ref("policy"),
        "selected": ref("selected"),
        "report": ref("report"),
        "training_set": ref("training_set"),
        "data": "data-1",
        "store": "/store",
        "commit": None,
        "files": list_files(folder),
    }
    return Version.model_validate(fields | changes)


def files_below(folder: Path) -> dict[str, bytes]:
    return {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}


def publish_job(run: Run, **changes: Any) -> PublishJob:
    """What publishes the student of a run of hand-written artefacts."""
    job = run.job
    fields: dict[str, Any] = {
        "run": job.name,
        "policy": job.rounds[-1].train,
        "selected": job.selected,
        "report": run.report(),
        "training_set": job.training_set,
        "samples": job.samples,
        "evaluations": job.evaluations,
        "data": "0123456789abcdef",
        "parent": None,
        "config": RunConfig().model_dump(mode="json"),
        "license": "Apache-2.0",
    }
    return PublishJob.model_validate(fields | changes)
