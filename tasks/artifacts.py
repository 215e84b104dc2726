"""What passes between stages: references, jobs and manifests (docs/ARCHITECTURE.md).

A job says what is to be made and from what; its `key` is the name of the result before it exists. A reference says
what was made; its `digest` is the name of the content. Where things lie and how fast they are made is in neither.
"""

import hashlib
import json
from collections.abc import Iterator
from datetime import datetime
from typing import Any, ClassVar, Literal

from pydantic import BaseModel, ConfigDict, Field

from vzero_core.views import Box

KEY_LENGTH = 32
"""Hexadecimal digits kept of a sha256: 128 bits, far beyond accidental collisions, short enough for a path."""


class Record(BaseModel):
    """Base of everything that is stored: immutable, and strict about unknown fields."""

    model_config = ConfigDict(frozen=True, extra="forbid")


class ArtifactRef(Record):
    """Name of a committed artefact: what it is derived from (`key`) and what it contains (`digest`)."""

    stage: str
    key: str
    digest: str


class Job(Record):
    """What one run of a stage makes: references and settings, nothing about where or how fast.

    A subclass is a stage's input type; its fields decide the key. Bump `version` when the stage's meaning changes.
    """

    stage: ClassVar[str]
    version: ClassVar[int] = 1

    @property
    def key(self) -> str:
        """Hash of stage, version, settings and the digests of the inputs; 32 hexadecimal digits."""
        return digest_json({"stage": self.stage, "version": self.version, "job": _identity(self)})

    @property
    def title(self) -> str:
        """How the run is called on the dashboard."""
        return self.stage.replace("_", " ")

    def inputs(self) -> dict[str, ArtifactRef]:
        """Give the references among the fields, by name; `rollouts.0` is the first of several."""
        return dict(_references(self))


def digest_json(value: Any) -> str:
    """Hash a JSON value; the order of keys does not matter."""
    text = json.dumps(value, sort_keys=True, separators=(",", ":"), ensure_ascii=True, allow_nan=False)
    return hashlib.sha256(text.encode()).hexdigest()[:KEY_LENGTH]


def digest_bytes(*parts: bytes) -> str:
    """Hash bytes; each part's length counts, so that parts cannot run into each other."""
    state = hashlib.sha256()
    for part in parts:
        state.update(len(part).to_bytes(8, "big"))
        state.update(part)
    return state.hexdigest()[:KEY_LENGTH]


def _identity(value: Any) -> Any:
    # A reference counts by its content alone: two ways to the same content are the same input.
    if isinstance(value, ArtifactRef):
        return {"digest": value.digest}
    if isinstance(value, BaseModel):
        return {name: _identity(getattr(value, name)) for name in type(value).model_fields}
    if isinstance(value, tuple | list):
        return [_identity(item) for item in value]
    if isinstance(value, dict):
        return {str(name): _identity(item) for name, item in value.items()}
    return value


def _references(value: Any, name: str = "") -> Iterator[tuple[str, ArtifactRef]]:
    if isinstance(value, ArtifactRef):
        yield name, value
    elif isinstance(value, BaseModel):
        for field in type(value).model_fields:
            yield from _references(getattr(value, field), f"{name}.{field}" if name else field)
    elif isinstance(value, tuple):
        for position, item in enumerate(value):
            yield from _references(item, f"{name}.{position}")


class FileEntry(Record):
    """One file of an artefact."""

    path: str
    size: int
    sha256: str


class Manifest(Record):
    """What makes an artefact exist: written once, last, and never changed but to a tombstone."""

    stage: str
    key: str
    digest: str
    attempt: str
    files: tuple[FileEntry, ...]
    inputs: dict[str, ArtifactRef]
    job: dict[str, Any]
    summary: dict[str, Any] = Field(description="Figures that follow from the job; for tables, charts and the report.")
    measured: dict[str, float] = Field(description="Figures of this attempt alone: seconds, tokens per second.")
    code: str = Field(description="Version of the code that made it.")
    created_at: datetime
    host: str
    pruned: bool = Field(default=False, description="The files were deleted; the names remain.")

    @property
    def ref(self) -> ArtifactRef:
        """The artefact's reference."""
        return ArtifactRef(stage=self.stage, key=self.key, digest=self.digest)


def content_digest(files: tuple[FileEntry, ...]) -> str:
    """Digest of an artefact: hash of its files' names and contents only."""
    return digest_json(sorted([entry.path, entry.sha256] for entry in files))


# --- rows of tables -----------------------------------------------------------------------------------------------


class ImageRef(Record):
    """An image where it lies; what was validated is what may be read."""

    uri: str = Field(description="Path or URL; a relative one counts from the folder of the dataset file.")
    width: int = Field(description="Pixels, after EXIF orientation.")
    height: int = Field(description="Pixels, after EXIF orientation.")
    size_bytes: int
    sha256: str | None = Field(default=None, description="None where the image was not read whole.")
    etag: str | None = Field(default=None, description="What pins an image without sha256: ETag, or time of change.")


class Sample(Record):
    """A training sample. It has no field for an answer, so none can enter training."""

    id: str
    image: ImageRef
    question: str
    region: Box | None = Field(
        default=None,
        description="xyxy, absolute pixels of the EXIF-oriented image, half-open; none: crops are given, or proposed.",
    )
    detail_image: ImageRef | None = Field(default=None, description="The same field of view in better quality.")
    positive_image: ImageRef | None = Field(default=None, description="A given crop of the region.")
    negative_image: ImageRef | None = Field(default=None, description="A given crop from elsewhere.")
    source: str | None = None
    license: str | None = None
    group: str | None = None


class ImportedRow(Record):
    """A training row as it was found, before it is judged. It has no field for an answer."""

    row: int = Field(description="Row of the source, from 1.")
    id: str
    question: str
    image: ImageRef | None = Field(default=None, description="None where it cannot be read.")
    region: Box | None = Field(default=None, description="Pixels, as given: not clipped, not checked.")
    detail_image: ImageRef | None = None
    positive_image: ImageRef | None = None
    negative_image: ImageRef | None = None
    source: str | None = None
    license: str | None = None
    group: str | None = None
    image_hash: str | None = Field(default=None, description="Perceptual hash, 16 hexadecimal digits.")
    problem: str | None = Field(default=None, description="Why an image cannot be read.")


class EvaluationSample(Record):
    """A question with its answer, for measuring only; it lies in another table than any training sample."""

    id: str
    image: ImageRef
    question: str
    answer: str = Field(description="The letter of the right option where there are options.")
    options: tuple[str, ...] | None = Field(default=None, description="Texts of A, B, ...; none: an open question.")
    category: str | None = None
    subcategory: str | None = None
    group: str | None = Field(default=None, description="Rows that ask the same question share it; none: the id.")
    cycle: str | None = Field(default=None, description="Which rotation of the options.")
    region: Box | None = None
    detail_image: ImageRef | None = None


class BadRow(Record):
    """A row that was set aside, and why."""

    row: int = Field(description="Line of the source file, from 1.")
    id: str | None
    reason: str


class Rollout(Record):
    """One sampled response."""

    sample_id: str
    index: int = Field(description="Which of the group's responses, from 0.")
    policy: str = Field(description="Digest of the weights that sampled it.")
    token_ids: tuple[int, ...]
    logprobs: tuple[float, ...] = Field(description="Log-prob of each sampled token under the sampler, nats.")
    text: str
    tokens: tuple[str, ...] = Field(default=(), description="Text of each token, special ones included; for people.")
    truncated: bool = Field(description="The response met max_new_tokens before its end.")


class Replay(Record):
    """What the teacher says of one response: log-probs of its tokens under each view, nats."""

    sample_id: str
    index: int
    logprobs_positive: tuple[float, ...] | None = None
    logprobs_negative: tuple[float, ...] | None = None
    logprobs_none: tuple[float, ...] | None = None
    max_logprobs: tuple[float, ...] = Field(description="Target view: log-prob of the likeliest token, per position.")
    topk_ids: tuple[tuple[int, ...], ...] | None = Field(default=None, description="Target view, likeliest first.")
    topk_logprobs: tuple[tuple[float, ...], ...] | None = None


class Weight(Record):
    """What the gate says of one response."""

    sample_id: str
    index: int
    evidence_score: float | None = Field(default=None, description="Nats per token; none where no views are compared.")
    weights: tuple[float, ...] = Field(description="One value for the response, or one per token.")


class Prediction(Record):
    """What a model answered to an evaluation question; nothing is scored yet."""

    sample_id: str
    seed: int
    response: str
    num_tokens: int
    truncated: bool


class Score(Record):
    """Whether an answer is right."""

    sample_id: str
    seed: int
    extracted: str | None = Field(description="The answer that was found in the response; none: there was none.")
    answer: str
    correct: bool
    problem: str | None = Field(default=None, description="Why the judge gave no verdict; the answer counts as wrong.")


Role = Literal["student", "teacher"]
