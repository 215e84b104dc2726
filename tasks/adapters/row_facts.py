"""What is known of each imported row before it is judged: one flat table, which the expectations run over."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from tasks.adapters.duplicates import first_same, nearest, normalise_question
from tasks.adapters.prompts import PromptProcessor
from tasks.artifacts import ImageRef, ImportedRow, Record
from tasks.config import PromptConfig
from vzero_core.config import ViewConfig
from vzero_core.errors import InputError
from vzero_core.views import Box, Size, clip_box, positive_crop, scale_box

NEEDS_NO_CLIPPING = "box needs no clipping"
"""Name of the expectation whose rows are counted as clipped."""


class Fingerprint(Record):
    """A picture and a question of other data, such as a benchmark, which training must not hold; no answer."""

    id: str
    image_hash: str
    question: str


class RowFacts(Record):
    """One row of the table that is judged."""

    row: int
    id: str
    question: str
    image: str | None = None
    problem: str | None = None
    width: int | None = None
    height: int | None = None
    x1: float | None = None
    y1: float | None = None
    x2: float | None = None
    y2: float | None = None
    region_share: float | None = None
    has_evidence: bool = False
    same_id_as_row: int | None = None
    special_token: str | None = None
    same_as_row: int | None = None
    overlap: str | None = None
    student_tokens: int | None = None
    positive_tokens: int | None = None
    negative_tokens: int | None = None
    source: str | None = None
    license: str | None = None


class Limits(Record):
    """What rows are held to."""

    region_required: bool
    max_region_share: float
    max_student_tokens: int | None
    max_teacher_tokens: int | None


class Finding(Record):
    """What one expectation found."""

    name: str
    expectation: str = Field(description="Its type in great-expectations.")
    severity: str = Field(description="critical: its rows are set aside; warning: they are counted.")
    num_rows: int


@dataclass(frozen=True)
class Prompts:
    """What decides how long prompts are. Each model's own chat template is used; where they differ, a run warns."""

    student: PromptProcessor
    teacher: PromptProcessor
    config: PromptConfig
    views: ViewConfig


def gather_facts(
    rows: Sequence[ImportedRow],
    *,
    reserved: Sequence[str],
    others: Sequence[Fingerprint],
    max_distance: int,
    prompts: Prompts,
) -> list[RowFacts]:
    """Give the facts of all rows.

    Args:
        rows: as imported.
        reserved: texts that no question may hold: the models' special tokens.
        others: pictures and questions that training must not hold.
        max_distance: bits of 64 in which hashes of one picture may differ.
        prompts: what decides how long prompts are.
    """
    same_ids = _first_of_same_id(rows)
    hashes = [row.image_hash for row in rows]
    same_rows = first_same(hashes, [row.question for row in rows], max_distance)
    near = nearest(hashes, [other.image_hash for other in others])
    tokens = _tokens(rows, prompts)
    facts = []
    for position, row in enumerate(rows):
        found = near[position]
        overlap = None
        if found is not None and found[1] <= max_distance:
            overlap = _describe(row, others[found[0]], found[1])
        same_row = same_rows[position]
        facts.append(
            RowFacts(
                row=row.row,
                id=row.id,
                question=row.question,
                problem=row.problem or _lone_crop(row),
                **_geometry(row),
                has_evidence=row.region is not None or row.positive_image is not None,
                same_id_as_row=same_ids[position],
                special_token=next((token for token in reserved if token in row.question), None),
                same_as_row=rows[same_row].row if same_row is not None else None,
                overlap=overlap,
                **tokens.get(position, {}),
                source=row.source,
                license=row.license,
            )
        )
    return facts


def _first_of_same_id(rows: Sequence[ImportedRow]) -> list[int | None]:
    first: dict[str, int] = {}
    found = []
    for row in rows:
        found.append(first.get(row.id))
        first.setdefault(row.id, row.row)
    return found


def _lone_crop(row: ImportedRow) -> str | None:
    if (row.positive_image is None) == (row.negative_image is None):
        return None
    return "positive_image and negative_image must be given together, got one of them; add the other or leave both out"


def _describe(row: ImportedRow, other: Fingerprint, distance: int) -> str:
    asked = normalise_question(row.question) == normalise_question(other.question)
    return f"{other.id} ({distance} of 64 bits differ; {'the same question' if asked else 'another question'})"


def _geometry(row: ImportedRow) -> dict[str, Any]:
    values: dict[str, Any] = {}
    if row.image is not None:
        values |= {"image": row.image.uri, "width": row.image.width, "height": row.image.height}
    if row.region is not None:
        values |= dict(zip(("x1", "y1", "x2", "y2"), row.region, strict=True))
    region = clipped_region(row)
    if region is not None and row.image is not None:
        area = (region.x2 - region.x1) * (region.y2 - region.y1)
        values["region_share"] = area / (row.image.width * row.image.height)
    return values


def clipped_region(row: ImportedRow) -> Box | None:
    """Give a row's region inside its image; None where there is none, or none that can be used."""
    if row.region is None or row.image is None:
        return None
    try:
        return clip_box(row.region, row.image.width, row.image.height)[0]
    except InputError:
        # The expectation on boxes names it.
        return None


def _tokens(rows: Sequence[ImportedRow], prompts: Prompts) -> dict[int, dict[str, int]]:
    """Give the lengths of the three prompts of each row whose images are known, by position."""
    known = [(position, row, row.image) for position, row in enumerate(rows) if row.image and not row.problem]
    questions = [row.question for _, row, _ in known]
    views: dict[str, tuple[PromptProcessor, list[tuple[Size, ...]]]] = {
        "student_tokens": (prompts.student, [(_size(image),) for _, _, image in known]),
        "positive_tokens": (
            prompts.teacher,
            [(_size(image), _crop_size(row, image, row.positive_image, prompts.views)) for _, row, image in known],
        ),
        "negative_tokens": (
            prompts.teacher,
            [(_size(image), _crop_size(row, image, row.negative_image, prompts.views)) for _, row, image in known],
        ),
    }
    tokens: dict[int, dict[str, int]] = {position: {} for position, _, _ in known}
    for name, (processor, sizes) in views.items():
        lengths = processor.lengths(questions, sizes, prompts.config)
        for (position, _, _), length in zip(known, lengths or (), strict=lengths is not None):
            tokens[position][name] = length
    return tokens


def _size(image: ImageRef) -> Size:
    return Size(image.width, image.height)


def _crop_size(row: ImportedRow, image: ImageRef, given: ImageRef | None, views: ViewConfig) -> Size:
    """Give the size of a crop as the model is shown it; both views' crops have one size."""
    if given is not None:
        return _size(given)
    detail = _size(row.detail_image or image)
    region = clipped_region(row)
    if region is None:
        # A region is yet to be proposed; no crop of it is larger than the whole.
        return detail
    return positive_crop(scale_box(region, _size(image), detail), *detail, views.positive).size
