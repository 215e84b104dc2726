"""What is known of each imported row before it is judged: one flat table, which the expectations run over."""

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from pydantic import Field

from tasks.adapters.duplicates import first_same, nearest, normalise_question
from tasks.adapters.prompts import PromptProcessor
from tasks.artifacts import ArtifactRef, ImageRef, ImportedRow, Record
from tasks.config import PromptConfig
from vzero_core.config import ViewConfig
from vzero_core.errors import InputError, NoDisjointCropError
from vzero_core.views import Box, Size, clip_box, negative_crop, positive_crop, scale_box

NEEDS_NO_CLIPPING = "box needs no clipping"
"""Name of the expectation whose rows are counted as clipped."""


class Fingerprint(Record):
    """A picture and a question of other data, such as a benchmark, which training must not hold; no answer."""

    row: int = Field(description="Row of its file, from 1.")
    image_hash: str
    question: str


class Compared(Record):
    """Evaluation data that training is kept clear of."""

    name: str = Field(description="Name of the file, for messages.")
    fingerprints: ArtifactRef


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
    crop_problem: str | None = None
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
    others: Sequence[tuple[str, Fingerprint]],
    max_distance: int,
    prompts: Prompts,
) -> list[RowFacts]:
    """Give the facts of all rows.

    Args:
        rows: as imported.
        reserved: texts that no question may hold: the models' special tokens.
        others: pictures and questions that training must not hold, each with the name of its file.
        max_distance: bits of 64 in which hashes of one picture may differ.
        prompts: what decides how long prompts are.
    """
    problems = [row.problem or _lone_crop(row) or _refusal(row, prompts) for row in rows]
    special = [next((token for token in reserved if token in row.question), None) for row in rows]
    usable = [
        not problem
        and not token
        and row.question.strip() != ""
        and (row.region is None or clipped_region(row) is not None)
        for row, problem, token in zip(rows, problems, special, strict=True)
    ]
    # What is set aside anyway makes no later row a duplicate.
    same_ids = _first_of_same_id(rows, usable)
    hashes = [row.image_hash for row in rows]
    known = [value if use else None for value, use in zip(hashes, usable, strict=True)]
    same_rows = first_same(known, [row.question for row in rows], max_distance)
    near = nearest(hashes, [other.image_hash for _, other in others])
    tokens = _tokens(rows, problems, prompts)
    facts = []
    for position, row in enumerate(rows):
        found = near[position]
        overlap = None
        if found is not None and found[1] <= max_distance:
            overlap = _describe(row, *others[found[0]], found[1])
        same_row = same_rows[position]
        facts.append(
            RowFacts(
                row=row.row,
                id=row.id,
                question=row.question,
                problem=problems[position],
                **_geometry(row),
                # A row with a problem may have a region that cannot be read.
                has_evidence=row.problem is not None or row.region is not None or row.positive_image is not None,
                same_id_as_row=same_ids[position],
                special_token=special[position],
                crop_problem=_crop_problem(row, prompts.views) if usable[position] else None,
                same_as_row=rows[same_row].row if same_row is not None else None,
                overlap=overlap,
                **tokens.get(position, {}),
                source=row.source,
                license=row.license,
            )
        )
    return facts


def _first_of_same_id(rows: Sequence[ImportedRow], usable: Sequence[bool]) -> list[int | None]:
    first: dict[str, int] = {}
    found = []
    for row, use in zip(rows, usable, strict=True):
        found.append(first.get(row.id))
        if use:
            first.setdefault(row.id, row.row)
    return found


def _lone_crop(row: ImportedRow) -> str | None:
    if (row.positive_image is None) == (row.negative_image is None):
        return None
    return "positive_image and negative_image must be given together, got one of them; add the other or leave both out"


def _refusal(row: ImportedRow, prompts: Prompts) -> str | None:
    images = (row.image, row.positive_image, row.negative_image)
    for image in images:
        for processor in (prompts.student, prompts.teacher):
            refusal = processor.refusal(_size(image)) if image is not None else None
            if refusal is not None and image is not None:
                return (
                    f"image {image.uri} of {image.width}x{image.height} is refused by the model's processor: {refusal}"
                )
    return None


def _crop_problem(row: ImportedRow, views: ViewConfig) -> str | None:
    """Say why no irrelevant crop can be cut beside the relevant one; whether one can depends on sizes alone."""
    region = clipped_region(row)
    if region is None or row.image is None or row.positive_image is not None:
        return None
    detail = _size(row.detail_image or row.image)
    positive = positive_crop(scale_box(region, _size(row.image), detail), *detail, views.positive)
    try:
        negative_crop(positive, views.negative, seed=0, sample_id=row.id)
    except NoDisjointCropError as error:
        return str(error)
    return None


def _describe(row: ImportedRow, name: str, other: Fingerprint, distance: int) -> str:
    asked = normalise_question(row.question) == normalise_question(other.question)
    return (
        f"{name} row {other.row} ({distance} of 64 bits differ; {'the same question' if asked else 'another question'})"
    )


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


def _tokens(rows: Sequence[ImportedRow], problems: Sequence[str | None], prompts: Prompts) -> dict[int, dict[str, int]]:
    """Give the lengths of the three prompts of each row whose images are known, by position."""
    known = [(position, row, row.image) for position, row in enumerate(rows) if row.image and not problems[position]]
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
