"""Rows of a dataset, one at a time. Only the fields that its format names enter: an answer is dropped at this door."""

import hashlib
import math
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any

from tasks.adapters.formats import (
    FORMATS,
    BoxFormat,
    BoxUnit,
    Format,
    enclose,
    own,
    parse_boxes,
    printable,
    shown,
    to_pixels,
)
from tasks.adapters.images import ImageReader
from tasks.adapters.row_files import count_of, files_of, is_folder, lines_of, opened, rows_of, suffix_of
from tasks.artifacts import KEY_LENGTH, BadRow, EvaluationSample, ImageRef, ImportedRow, digest_json
from tasks.config import FileData, SmallWorldData
from tasks.ports import Advance
from tasks.small_world.dataset import write_dataset
from vzero_core.errors import InputError
from vzero_core.views import Box, clip_box

NUM_NAMED = 5
"""Bad rows that a message names; all of them stand in the quarantine table."""

_CHUNK = 1 << 20
_BATCH_ROWS = 1024
_STAT_THREADS = 16


@dataclass(frozen=True)
class SourceRow:
    """A training row as its file has it; no image was opened yet.

    Attributes:
        row: its number in the source, from 1; in a folder, files follow one another by name.
        id: as given, or `<file name without suffix>:<number in the file>`.
        region: xyxy in `unit`; of several boxes, the smallest one that contains them all.
        problem: why the region cannot be read.
        dropped: names of the row's fields that stay outside.
    """

    row: int
    id: str
    question: str
    image: str
    region: Box | None
    unit: BoxUnit
    problem: str | None
    detail_image: str | None
    positive_image: str | None
    negative_image: str | None
    source: str | None
    license: str | None
    group: str | None
    dropped: tuple[str, ...]

    @property
    def images(self) -> tuple[str, ...]:
        """Every image that the row names."""
        given = (self.image, self.detail_image, self.positive_image, self.negative_image)
        return tuple(uri for uri in given if uri is not None)


def locate(source: SmallWorldData | FileData, work_dir: Path) -> FileData:
    """Give the dataset as files; the small world is drawn first where it is not there yet."""
    if isinstance(source, FileData):
        return source
    folder = work_dir / f"small-world-{digest_json(source.model_dump())[:12]}"
    if not folder.is_dir():
        folder.parent.mkdir(parents=True, exist_ok=True)
        write_dataset(folder, num_prompts=source.num_prompts, num_eval=source.num_evaluation, seed=source.seed)
    return FileData(kind="jsonl", path=str(folder / "train.jsonl"), evaluation_path=str(folder / "eval.jsonl"))


def image_root(source: FileData) -> str:
    """Give the folder or URL that relative image paths count from."""
    if source.image_root is not None:
        return source.image_root
    return source.path if is_folder(source.path) else folder_of(source.path)


def folder_of(path: str) -> str:
    """Give the folder of a file."""
    return path.rsplit("/", 1)[0] if "/" in path else "."


def read_source(source: FileData) -> Iterator[SourceRow | BadRow]:
    """Read the rows of a dataset as they are asked for; a row of a wrong form comes as a BadRow with the reason.

    JSONL is read line by line, a JSON array row by row, Parquet by batches of the columns that are needed: neither a
    file nor the images that it may embed are held in memory.

    Raises:
        InputError: a file is missing, has no rows, or is broken so that its rows cannot be told apart.
    """
    form = FORMATS[source.kind]
    files = files_of(source)
    before = 0
    for url in files:
        number, name = 0, PurePosixPath(url)
        for number, value in rows_of(url, form, image_root(source)):
            try:
                yield _source_row(value, form, source, before + number, f"{name.stem}:{number}")
            except InputError as error:
                where = f"{name.name} row {number}: " if len(files) > 1 else ""
                yield BadRow(row=before + number, id=_id_of(value), reason=f"{where}{error}")
        before += number
    if before == 0:
        raise InputError(f"data must have rows, but {source.path} is empty; write one row a sample")


def import_row(row: SourceRow, images: ImageReader, *, decode: bool) -> ImportedRow:
    """Open the images of a row and bring its region to pixels; what is wrong with them stands in `problem`.

    Args:
        row: from `read_source`.
        images: reads the images.
        decode: decode every image, and hash the full one; else read headers only.
    """
    problems = [row.problem] if row.problem else []

    def inspect(uri: str | None) -> tuple[ImageRef | None, str | None]:
        if uri is None:
            return None, None
        try:
            found = images.inspect(uri, decode=decode)
        except InputError as error:
            problems.append(str(error))
            return None, None
        return found.ref, found.hash

    image, image_hash = inspect(row.image)
    region = row.region
    if region is not None and row.unit != "pixels":
        try:
            region = to_pixels(region, row.unit, image.width, image.height) if image is not None else None
        except InputError as error:
            problems.append(str(error))
            region = None
    return ImportedRow(
        row=row.row,
        id=row.id,
        question=row.question,
        image=image,
        region=region,
        detail_image=inspect(row.detail_image)[0],
        positive_image=inspect(row.positive_image)[0],
        negative_image=inspect(row.negative_image)[0],
        source=row.source,
        license=row.license,
        group=row.group,
        image_hash=image_hash,
        problem="; ".join(problems) or None,
    )


def count_rows(source: FileData) -> int:
    """Count the rows of a dataset, good or bad: from Parquet's metadata, else by one pass over the file."""
    return sum(count_of(url, FORMATS[source.kind]) for url in files_of(source))


def source_digest(source: FileData, images: ImageReader) -> str:
    """Digest of a dataset before it is validated: its rows, and size and ETag or date of every image they name.

    Text files count with their whole content; Parquet files with the rows as they are read, since they may embed
    gigabytes of images: these count with the size and date of their file.

    Raises:
        InputError: as `read_source`.
    """
    state = hashlib.sha256()
    for url in files_of(source):
        if suffix_of(url, FORMATS[source.kind]) != ".parquet":
            with opened(url) as file:
                while chunk := file.read(_CHUNK):
                    state.update(chunk)
    seen: set[str] = set()
    rows = read_source(source)
    # Threads, because on S3 each image costs a request.
    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        while batch := list(islice(rows, _BATCH_ROWS)):
            state.update(repr(batch).encode())
            uris = [uri for row in batch if isinstance(row, SourceRow) for uri in row.images]
            files = [file for file in dict.fromkeys(uri.partition("#row=")[0] for uri in uris) if file not in seen]
            seen.update(files)
            state.update(repr(list(pool.map(images.stamp, files))).encode())
    return state.hexdigest()[:KEY_LENGTH]


def name_bad_rows(bad: Sequence[BadRow]) -> str:
    """Name the first bad rows with their reasons, a line each."""
    lines = [f"  row {row.row} ({shown(row.id or 'no id')}): {printable(row.reason)}" for row in bad[:NUM_NAMED]]
    if len(bad) > NUM_NAMED:
        lines.append(f"  ... and {len(bad) - NUM_NAMED} more")
    return "\n".join(lines)


# --- evaluation data ----------------------------------------------------------------------------------------------


def import_evaluation(
    path: str, images: ImageReader, *, reserved: Sequence[str], advance: Advance
) -> list[EvaluationSample]:
    """Read evaluation questions with their answers: JSONL in the project's own format.

    Args:
        path: the file.
        images: reads the images; every one is decoded.
        reserved: texts that no question may hold: the models' special tokens.
        advance: called after each row.

    Raises:
        InputError: the file is missing or empty, or a row is bad, which would change the measure.
    """
    samples: dict[str, EvaluationSample] = {}
    bad: list[BadRow] = []
    for number, value in lines_of(path):
        try:
            sample = _evaluation_sample(value, images, reserved)
            if sample.id in samples:
                raise InputError("id must be unique, but an earlier row has it too; rename one of them")
            samples[sample.id] = sample
        except InputError as error:
            bad.append(BadRow(row=number, id=_id_of(value), reason=str(error)))
        advance(1)
    if not samples and not bad:
        raise InputError(f"evaluation data must have rows, but the file is empty: {path}")
    if bad:
        raise InputError(
            f"evaluation data: no row may be bad, got {len(bad)} of {len(samples) + len(bad)}; mend or remove them:\n"
            f"{name_bad_rows(bad)}"
        )
    return list(samples.values())


def _evaluation_sample(value: Any, images: ImageReader, reserved: Sequence[str]) -> EvaluationSample:
    row = _object(value)
    missing = [name for name in ("id", "image", "question", "answer") if row.get(name) is None]
    if missing:
        raise InputError(f"row must have id, image, question and answer; {', '.join(missing)} missing")
    fields = own(row)
    if not fields.question.strip():
        raise InputError("question must not be empty")
    if found := [token for token in reserved if token in fields.question]:
        raise InputError(
            f"question must not hold special tokens of the models, got {found[0]!r}; it would change the prompt's "
            "structure: remove it"
        )
    answer = _answer(row["answer"])
    _require_unicode(str(fields.id), fields.question, answer)
    image = images.inspect(fields.image, decode=True).ref
    region = _region(fields.boxes, "xyxy")
    return EvaluationSample(
        id=str(fields.id),
        image=image,
        question=fields.question,
        answer=answer,
        region=clip_box(region, image.width, image.height)[0] if region is not None else None,
        detail_image=images.inspect(fields.detail_image, decode=True).ref if fields.detail_image is not None else None,
    )


def _answer(value: Any) -> str:
    finite = not isinstance(value, float) or math.isfinite(value)
    if isinstance(value, bool) or not isinstance(value, str | int | float) or not finite:
        raise InputError(f"answer must be a text or a finite number, got {type(value).__name__}; write it as a text")
    if not str(value).strip():
        raise InputError("answer must not be empty")
    return str(value)


# --- rows ---------------------------------------------------------------------------------------------------------


def _source_row(value: Any, form: Format, source: FileData, number: int, default_id: str) -> SourceRow:
    row = _object(value)
    fields = form.read({name: row.get(name) for name in form.fields})
    region, problem = None, None
    try:
        region = _region(fields.boxes, source.box_format or form.box_format)
    except InputError as error:
        problem = str(error)
    found = SourceRow(
        row=number,
        id=fields.id if fields.id is not None else default_id,
        question=fields.question,
        image=fields.image,
        region=region,
        unit=source.box_unit or "pixels",
        problem=problem,
        detail_image=fields.detail_image,
        positive_image=fields.positive_image,
        negative_image=fields.negative_image,
        source=fields.source,
        license=fields.license or source.license,
        group=fields.group,
        dropped=tuple(sorted(shown(name) for name in set(row) - set(form.fields))),
    )
    labels = (found.source, found.license, found.group)
    _require_unicode(found.id, found.question, *found.images, *(label for label in labels if label is not None))
    return found


def _region(boxes: Any, box_format: BoxFormat) -> Box | None:
    try:
        return enclose(parse_boxes(boxes), box_format)
    except RecursionError as error:
        raise InputError("region must be four numbers, such as [x1, y1, x2, y2], got lists in lists") from error


def _id_of(value: Any) -> str | None:
    identifier = value.get("id") if isinstance(value, dict) else None
    return shown(identifier) if isinstance(identifier, str | int | float) else None


def _object(value: Any) -> dict[str, Any]:
    if isinstance(value, InputError):
        raise value
    if not isinstance(value, dict):
        raise InputError(f"row must be a JSON object, got {type(value).__name__}")
    return value


def _require_unicode(*texts: str) -> None:
    # JSON can spell half a surrogate pair, which no file of ours could hold.
    for text in texts:
        try:
            text.encode()
        except UnicodeEncodeError as error:
            raise InputError("text must be valid Unicode, but half of a surrogate pair is in it") from error
