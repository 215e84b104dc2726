"""Datasets as samples. Only the fields named here enter: an answer in training data is dropped at this door."""

import json
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Generic, TypeVar

import fsspec

from tasks.adapters.images import ImageReader
from tasks.artifacts import BadRow, EvaluationSample, ImageRef, Sample, digest_bytes, digest_json
from tasks.config import JsonlData, SmallWorldData
from tasks.ports import Advance
from tasks.small_world.dataset import write_dataset
from vzero_core.errors import InputError
from vzero_core.views import Box, clip_box

S = TypeVar("S", Sample, EvaluationSample)

NUM_NAMED = 5
"""Bad rows that a message names; all of them stand in the quarantine table."""


@dataclass(frozen=True)
class DataFiles:
    """Where the rows are."""

    train: str
    evaluation: str | None


@dataclass(frozen=True)
class SampleFormat(Generic[S]):
    """Which fields a row must and may have, and how it becomes a sample."""

    what: str
    required: tuple[str, ...]
    optional: tuple[str, ...]
    build: Callable[[dict[str, Any], ImageReader], tuple[S, bool]]


@dataclass
class Imported(Generic[S]):
    """What a dataset file gave."""

    samples: list[S] = field(default_factory=list)
    bad: list[BadRow] = field(default_factory=list)
    num_clipped: int = 0
    dropped_fields: set[str] = field(default_factory=set)

    def summary(self) -> dict[str, Any]:
        """Figures for tables and messages."""
        return {
            "num_samples": len(self.samples),
            "num_bad": len(self.bad),
            "num_clipped": self.num_clipped,
            "dropped_fields": sorted(self.dropped_fields),
            "bad": [row.model_dump() for row in self.bad[:NUM_NAMED]],
        }


def locate(source: SmallWorldData | JsonlData, work_dir: Path) -> DataFiles:
    """Give the dataset's files; the small world is drawn first where it is not there yet."""
    if isinstance(source, JsonlData):
        return DataFiles(train=source.path, evaluation=source.evaluation_path)
    folder = work_dir / f"small-world-{digest_json(source.model_dump())[:12]}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_dataset(folder, num_prompts=source.num_prompts, num_eval=source.num_evaluation, seed=source.seed)
    return DataFiles(train=str(folder / "train.jsonl"), evaluation=str(folder / "eval.jsonl"))


def folder_of(path: str) -> str:
    """Give the folder that relative image paths count from."""
    return path.rsplit("/", 1)[0] if "/" in path else "."


def source_digest(path: str, what: str, images: ImageReader) -> str:
    """Digest of a dataset before it is validated: its file, and size and date of every image it names.

    Raises:
        InputError: the file is missing or has no rows.
    """
    content = _read(path, what)
    stamps: list[list[str | int]] = []
    for line in content.splitlines():
        # A line that cannot be read has no images; validation names it.
        try:
            row = json.loads(line)
        except ValueError:
            continue
        for name in ("image", "detail_image"):
            if isinstance(row, dict) and isinstance(row.get(name), str):
                stamps.append(images.stamp(row[name]))
    return digest_bytes(content, digest_json(stamps).encode())


def count_rows(path: str, form: SampleFormat[Any]) -> int:
    """Give the number of rows of a JSONL file, good or bad."""
    return sum(1 for line in _read(path, form.what).splitlines() if line.strip())


def import_samples(
    path: str,
    form: SampleFormat[S],
    images: ImageReader,
    *,
    reserved: Sequence[str],
    max_bad_share: float,
    advance: Advance,
) -> Imported[S]:
    """Read a JSONL file: decode every image, check every row, set bad ones aside with the reason.

    Args:
        path: the JSONL file.
        form: `TRAINING` or `EVALUATION`.
        images: reads the images.
        reserved: texts that no question may hold: the models' special tokens.
        max_bad_share: share of bad rows, 0 to 1.
        advance: called after each row.

    Raises:
        InputError: the file is missing or empty, or the share of bad rows is above the limit.
    """
    found: Imported[S] = Imported()
    rows: dict[str, int] = {}
    for number, line in enumerate(_read(path, form.what).splitlines(), start=1):
        if not line.strip():
            continue
        identifier = None
        try:
            row = _parse(line, form.required)
            identifier = str(row["id"])
            if identifier in rows:
                raise InputError(f"id must be unique, but row {rows[identifier]} has it too; rename one of them")
            known = {name: row[name] for name in (*form.required, *form.optional) if row.get(name) is not None}
            sample, clipped = form.build(known, images)
            _require_plain(sample.question, reserved)
        except InputError as error:
            found.bad.append(BadRow(row=number, id=identifier, reason=str(error)))
        else:
            rows[identifier] = number
            found.samples.append(sample)
            found.num_clipped += clipped
            found.dropped_fields.update(set(row) - {*form.required, *form.optional})
        advance(1)
    _require_share(found, max_bad_share, form.what)
    return found


def name_bad_rows(bad: list[BadRow]) -> str:
    """Name the first bad rows with their reasons, a line each."""
    lines = [f"  row {row.row} ({row.id or 'no id'}): {row.reason}" for row in bad[:NUM_NAMED]]
    if len(bad) > NUM_NAMED:
        lines.append(f"  ... and {len(bad) - NUM_NAMED} more")
    return "\n".join(lines)


def _read(path: str, what: str) -> bytes:
    try:
        with fsspec.open(path, "rb") as file:
            content: bytes = file.read()
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputError(f"{what} must be a JSONL file, but there is no such file: {path}") from error
    if not content.strip():
        raise InputError(f"{what} must have rows, but the file is empty: {path}; write one JSON object a line")
    return content


def _parse(line: bytes, required: tuple[str, ...]) -> dict[str, Any]:
    try:
        row = json.loads(line)
    except ValueError as error:
        raise InputError(f"row must be a JSON object, but it is no JSON: {error}") from error
    if not isinstance(row, dict):
        raise InputError(f"row must be a JSON object, got {line[:40].decode(errors='replace')!r}")
    missing = [name for name in required if row.get(name) is None]
    if missing:
        raise InputError(f"row must have {', '.join(required)}; {', '.join(missing)} missing")
    return row


def _require_share(found: Imported[Any], max_bad_share: float, what: str) -> None:
    total = len(found.samples) + len(found.bad)
    if found.bad and (len(found.bad) > max_bad_share * total or not found.samples):
        raise InputError(
            f"{what}: at most {max_bad_share:.1%} of the rows may be bad (data.max_bad_share), "
            f"got {len(found.bad)} of {total}; mend or remove them:\n{name_bad_rows(found.bad)}"
        )


# --- rows to samples ----------------------------------------------------------------------------------------------


def _text(row: dict[str, Any], name: str) -> str:
    value = row[name]
    if not isinstance(value, str) or not value.strip():
        raise InputError(f"{name} must be a text that is not empty, got {value!r}")
    return value


def _require_plain(question: str, reserved: Sequence[str]) -> None:
    found = [token for token in reserved if token in question]
    if found:
        raise InputError(
            f"question must not hold special tokens of the models, got {found[0]!r}; it would change the prompt's "
            "structure: remove it"
        )


def _images(row: dict[str, Any], images: ImageReader) -> tuple[ImageRef, ImageRef | None]:
    image = images.inspect(_text(row, "image"))
    detail = images.inspect(_text(row, "detail_image")) if "detail_image" in row else None
    return image, detail


def _region(value: Any, image: ImageRef) -> tuple[Box, bool]:
    numbers = isinstance(value, list) and len(value) == 4
    if not numbers or any(isinstance(side, bool) or not isinstance(side, int | float) for side in value):
        raise InputError(f"region must be [x1, y1, x2, y2] in pixels, got {value!r}")
    if not all(math.isfinite(side) for side in value):
        raise InputError(f"region must be finite numbers, got {value!r}")
    return clip_box(Box(*(float(side) for side in value)), image.width, image.height)


def _training_sample(row: dict[str, Any], images: ImageReader) -> tuple[Sample, bool]:
    image, detail = _images(row, images)
    region, clipped = _region(row["region"], image)
    sample = Sample(
        id=str(row["id"]),
        image=image,
        question=_text(row, "question"),
        region=region,
        detail_image=detail,
        **{name: str(row[name]) for name in ("source", "license", "group") if name in row},
    )
    return sample, clipped


def _evaluation_sample(row: dict[str, Any], images: ImageReader) -> tuple[EvaluationSample, bool]:
    image, detail = _images(row, images)
    region, clipped = _region(row["region"], image) if "region" in row else (None, False)
    sample = EvaluationSample(
        id=str(row["id"]),
        image=image,
        question=_text(row, "question"),
        answer=str(row["answer"]),
        region=region,
        detail_image=detail,
    )
    return sample, clipped


TRAINING = SampleFormat(
    what="training data",
    required=("id", "image", "question", "region"),
    optional=("detail_image", "source", "license", "group"),
    build=_training_sample,
)
EVALUATION = SampleFormat(
    what="evaluation data",
    required=("id", "image", "question", "answer"),
    optional=("region", "detail_image"),
    build=_evaluation_sample,
)
