"""Rows of a dataset, one at a time. Only the fields that its format names enter: an answer is dropped at this door."""

import hashlib
from collections.abc import Iterator, Sequence, Set
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from itertools import islice
from pathlib import Path, PurePosixPath
from typing import Any, Protocol

from tasks.adapters.files import stat
from tasks.adapters.formats import (
    FORMATS,
    BoxUnit,
    Fields,
    Format,
    id_of,
    json_object,
    parse_region,
    printable,
    require_unicode,
    shown,
    to_pixels,
)
from tasks.adapters.images import ImageReader
from tasks.adapters.parallel import in_order
from tasks.adapters.row_files import count_of, existing, files_of, is_folder, opened, rows_of, suffix_of
from tasks.artifacts import KEY_LENGTH, BadRow, ImageRef, ImportedRow, digest_bytes, digest_json
from tasks.config import FileData, SmallWorldData
from tasks.small_world.dataset import write_dataset
from vzero_core.errors import InputError
from vzero_core.views import Box

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


class UnreadRow(BadRow):
    """A row of a wrong form, and what it is."""

    digest: str


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


def read_source(source: FileData) -> Iterator[SourceRow | UnreadRow]:
    """Read the rows of a dataset as they are asked for; a row of a wrong form comes as an UnreadRow with the reason.

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
                # What is no row at all has no content either.
                content = f"{name.stem}:{number}" if isinstance(value, InputError) else repr(value)
                yield UnreadRow(
                    row=before + number,
                    id=id_of(value, "id"),
                    reason=f"{where}{error}",
                    digest=digest_bytes(content.encode(errors="backslashreplace")),
                )
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


def check_rows(source: FileData, images: ImageReader, threads: int) -> None:
    """Make sure that every row of a dataset can be read, and that its images are there: of these, the headers are read.

    Args:
        source: the dataset.
        images: reads its images.
        threads: look at images at the same time.

    Raises:
        InputError: a row cannot be read, or an image of it; the first such rows are named.
    """

    def look(row: SourceRow | UnreadRow) -> BadRow | None:
        if isinstance(row, BadRow):
            return row
        problem = import_row(row, images, decode=False).problem
        return BadRow(row=row.row, id=row.id, reason=problem) if problem else None

    bad = [row for row in in_order(look, read_source(source), threads) if row is not None]
    if bad:
        raise InputError(
            f"rows must have the form of {source.kind}, and images that are there, {len(bad)} have not:\n"
            f"{name_bad_rows(bad)}"
        )


def count_rows(source: FileData) -> int:
    """Count the rows of a dataset, good or bad: from Parquet's metadata, else by one pass over the file."""
    return sum(count_of(url, FORMATS[source.kind]) for url in files_of(source))


def source_digest(source: FileData, images: ImageReader, known: Set[str] = frozenset()) -> str:
    """Digest of a dataset before it is validated: its rows, and size and ETag or date of every image they name.

    Text files count with their whole content; Parquet files with the rows as they are read, since they may embed
    gigabytes of images: these count with the size and date of their file.

    Args:
        source: the dataset.
        images: reads its images.
        known: digests of rows that are passed over; where there are any, all others count as they are read.

    Raises:
        InputError: as `read_source`.
    """
    state = hashlib.sha256()
    for url in files_of(source):
        if not known and suffix_of(url, FORMATS[source.kind]) != ".parquet":
            for chunk in content_of(url):
                state.update(chunk)
    for part in stamped((row for row in read_source(source) if row_digest(row) not in known), images):
        state.update(part)
    return state.hexdigest()[:KEY_LENGTH]


def row_digest(row: SourceRow | UnreadRow) -> str:
    """Name a row by what it says, whichever file and line it stands in; a row without an id has these for its id.

    A picture that is embedded in a Parquet file has no name of its own, so a row with one counts by the rest.
    """
    if isinstance(row, UnreadRow):
        return row.digest
    images = [
        uri and uri[uri.index("#row=") :].partition("&")[2] if "#row=" in (uri or "") else uri
        for uri in (row.image, row.detail_image, row.positive_image, row.negative_image)
    ]
    return digest_json([row.id, row.question, row.region, row.unit, images])


def data_version(source: SmallWorldData | FileData) -> str:
    """Name the state of a dataset by its files, of which none is read: names, sizes, and ETags or dates.

    Raises:
        InputError: a file is missing.
    """
    if isinstance(source, SmallWorldData):
        return digest_json(source.model_dump())
    urls = files_of(source)

    def pin(url: str) -> list[object]:
        with existing(url):
            found = stat(url)
        return [url.rsplit("/", 1)[-1], found.size, found.etag]

    # Threads, because on S3 each file costs a request.
    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        found = list(pool.map(pin, urls))
    return digest_json([source.kind, found])


class NamesImages(Protocol):
    """A row that was read."""

    @property
    def images(self) -> tuple[str, ...]:
        """Every image that it names."""


def content_of(url: str) -> Iterator[bytes]:
    """Give a text file in parts."""
    with opened(url) as file:
        while chunk := file.read(_CHUNK):
            yield chunk


def stamped(rows: Iterator[NamesImages | BadRow], images: ImageReader) -> Iterator[bytes]:
    """Give what a digest must see of rows: themselves, and size and ETag or date of every file that they name."""
    seen: set[str] = set()
    # Threads, because on S3 each image costs a request.
    with ThreadPoolExecutor(_STAT_THREADS) as pool:
        while batch := list(islice(rows, _BATCH_ROWS)):
            yield repr(batch).encode()
            uris = [uri for row in batch if not isinstance(row, BadRow) for uri in row.images]
            files = [file for file in dict.fromkeys(uri.partition("#row=")[0] for uri in uris) if file not in seen]
            seen.update(files)
            yield repr(list(pool.map(images.stamp, files))).encode()


def name_bad_rows(bad: Sequence[BadRow]) -> str:
    """Name the first bad rows with their reasons, a line each."""
    lines = [f"  row {row.row} ({shown(row.id or 'no id')}): {printable(row.reason)}" for row in bad[:NUM_NAMED]]
    if len(bad) > NUM_NAMED:
        lines.append(f"  ... and {len(bad) - NUM_NAMED} more")
    return "\n".join(lines)


# --- rows ---------------------------------------------------------------------------------------------------------


def _source_row(value: Any, form: Format[Fields], source: FileData, number: int, default_id: str) -> SourceRow:
    row = json_object(value)
    fields = form.read({name: row.get(name) for name in form.fields})
    region, problem = None, None
    try:
        region = parse_region(fields.boxes, source.box_format or form.box_format)
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
    require_unicode(found.id, found.question, *found.images, found.source, found.license, found.group)
    return found
