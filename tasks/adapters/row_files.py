"""Files of rows: JSONL, JSON arrays, Parquet and TSV, read a part at a time, wherever they lie."""

import csv
import io
import json
import os
import re
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import PurePosixPath
from typing import Any, BinaryIO

from tasks.adapters.files import filesystem, open_file, patiently
from tasks.adapters.formats import FORMATS, Format, shown
from tasks.adapters.images import MAX_TSV_ROW, embedded_uri, next_tsv_row, open_parquet, stays_inside, tsv_uri
from tasks.config import FileData
from vzero_core.errors import InputError

_CHUNK = 1 << 20
_MAX_ROW = 1 << 26
"""Characters of one row of a JSON array; beyond, the array is taken for broken, so that it is not read whole."""
_BATCH_ROWS = 1024
_SPACE = re.compile(r"[ \t\n\r]*")
_NOT_UTF_8 = {
    b"\xff\xfe": "UTF-16 or UTF-32",
    b"\xfe\xff": "UTF-16",
    b"\x00\x00\xfe\xff": "UTF-32",
    b"\x1f\x8b": "gzip",
}
"""What a text file is that begins so."""


def is_folder(path: str) -> bool:
    """Tell whether a path or URL is a folder."""
    fs, inner = filesystem(path)
    return bool(patiently(lambda: fs.isdir(inner), path))


def files_of(source: FileData) -> list[str]:
    """Give the files of a dataset, by name.

    Raises:
        InputError: a folder has none of the format.
    """
    if not is_folder(source.path):
        return [source.path]
    fs, inner = filesystem(source.path)
    suffix = FORMATS[source.kind].suffix
    names = sorted(PurePosixPath(name).name for name in patiently(lambda: fs.ls(inner, detail=False), source.path))
    names = [name for name in names if name.endswith(suffix) and not name.startswith(".")]
    if not names:
        raise InputError(f"data of kind {source.kind} must be {suffix} files, got none in {source.path}")
    return [f"{source.path.rstrip('/')}/{name}" for name in names]


def suffix_of(url: str, form: Format[Any]) -> str:
    """Give the suffix that says how a file is read."""
    suffix = PurePosixPath(url).suffix
    return suffix if suffix in (".jsonl", ".json", ".parquet") else form.suffix


def rows_of(url: str, form: Format[Any], root: str) -> Iterator[tuple[int, Any]]:
    """Give the rows of a file with their numbers, from 1; an InputError stands for one that cannot be read."""
    suffix = suffix_of(url, form)
    if suffix == ".parquet":
        return _parquet_rows(url, form, root)
    if suffix == ".tsv":
        return _tsv_rows(url, form, root)
    return _array_rows(url) if suffix == ".json" else lines_of(url)


def count_of(url: str, form: Format[Any]) -> int:
    """Give the number of rows of a file other than TSV, good or bad."""
    if suffix_of(url, form) == ".parquet":
        with existing(url), open_parquet(url) as parquet:
            return int(parquet.metadata.num_rows)
    if suffix_of(url, form) == ".json":
        return sum(1 for _ in _array_rows(url))
    with opened(url) as file:
        return sum(1 for line in file if line.strip())


@contextmanager
def opened(url: str) -> Iterator[BinaryIO]:
    """Open a text file.

    Raises:
        InputError: it is missing, or not UTF-8.
    """
    with existing(url), open_file(url) as file:
        start = file.read(4)
        for mark, name in _NOT_UTF_8.items():
            if start.startswith(mark):
                raise InputError(f"{url} must be UTF-8, got {name}; convert it, or unpack it")
        file.seek(0)
        yield file


@contextmanager
def existing(url: str) -> Iterator[None]:
    """Say of a file of data that it is missing, where one is met.

    Raises:
        InputError: there is none.
    """
    try:
        yield
    except (FileNotFoundError, IsADirectoryError) as error:
        raise InputError(f"data must be a file or a folder of files, but there is no such file: {url}") from error


def lines_of(url: str) -> Iterator[tuple[int, Any]]:
    """Give the rows of a JSONL file with their numbers, from 1; an InputError stands for one that is no JSON."""
    with opened(url) as file:
        for number, line in enumerate(file, start=1):
            if not line.strip():
                continue
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, InputError(f"row must be a JSON object, but it is no JSON: {error}")


def _array_rows(url: str) -> Iterator[tuple[int, Any]]:
    """Read the rows of one JSON array, holding little more than one of them."""
    number = 0
    with opened(url) as binary, io.TextIOWrapper(binary, encoding="utf-8-sig") as file:
        text = _JsonText(file)
        try:
            if not (mark := text.next_mark()):
                return
            if mark != "[":
                raise InputError(f"{url} must be a JSON array of rows, but it begins with {mark!r}")
            text.pass_mark()
            more = text.next_mark() != "]"
            while more:
                try:
                    value = text.value()
                except ValueError as error:
                    raise InputError(
                        f"{url} must be a whole JSON array, but row {number + 1} is no JSON: {error}; mend the file"
                    ) from error
                number += 1
                yield number, value
                mark = text.next_mark()
                if mark not in ("]", ","):
                    raise InputError(
                        f"{url} must be a whole JSON array, but row {number} is followed by "
                        f"{repr(mark) if mark else 'nothing'}; mend the file"
                    )
                if more := mark == ",":
                    text.pass_mark()
                    text.next_mark()
            text.pass_mark()
            if mark := text.next_mark():
                raise InputError(f"{url} must end with its JSON array, but {mark!r} follows; mend the file")
        except (UnicodeDecodeError, RecursionError) as error:
            raise InputError(f"{url} must be JSON in UTF-8, but row {number + 1} is not: {error}") from error


_LONGEST_REFERENCE = 64
"""Characters: a shorter `image` of a TSV file is the index of the row whose image is meant, as VLMEvalKit has it."""


def _tsv_rows(url: str, form: Format[Any], root: str) -> Iterator[tuple[int, Any]]:
    """Read a TSV file with a header in the layout of VLMEvalKit, holding one row.

    Images are named, not kept. Rows that refer to the image of a later row come last.
    """
    file = _relative(url, root)
    pictures: dict[str, str] = {}
    waiting: list[tuple[int, dict[str, Any]]] = []
    number = 0
    with opened(url) as binary:
        lines = _TsvLines(binary, url)
        header = next_tsv_row(lines) or []
        if header and not set(header) & set(form.images):
            raise InputError(
                f"{url} must be a TSV file whose header names an image column, one of {', '.join(form.images)}, got "
                f"{shown(header)}"
            )
        position = header.index("image") if "image" in header else None
        while True:
            start = lines.begin_row()
            try:
                cells = next_tsv_row(lines)
            except csv.Error as error:
                number += 1
                yield number, InputError(f"row must be one of a TSV file, but: {error}")
                continue
            if cells is None:
                break
            if not cells:
                continue
            number += 1
            if len(cells) != len(header):
                yield number, InputError(f"row must have {len(header)} cells, as the header, got {len(cells)}")
                continue
            row = {name: cell for name, cell in zip(header, cells, strict=True) if name in form.fields}
            if position is None:
                yield number, row
            elif len(cells[position]) > _LONGEST_REFERENCE:
                row["image"] = pictures[row.get("index", "")] = tsv_uri(file, start, lines.end, position)
                yield number, row
            else:
                row["image"] = cells[position].strip()
                if row["image"] in pictures:
                    yield number, {**row, "image": pictures[row["image"]]}
                else:
                    waiting.append((number, row))
    for number, row in waiting:
        if row["image"] in pictures:
            yield number, {**row, "image": pictures[row["image"]]}
        else:
            yield (
                number,
                InputError(f"image must be base64, or the index of a row with an image, got '{shown(row['image'])}'"),
            )


class _TsvLines:
    """Gives the lines of a file as they are asked for, and tells where the last one ended."""

    def __init__(self, file: BinaryIO, url: str) -> None:
        self._file, self._url = file, url
        self._start = self.end = 0

    def begin_row(self) -> int:
        """Say that a row begins here; give its first byte."""
        self._start = self.end
        return self._start

    def __iter__(self) -> Iterator[str]:
        return self

    def __next__(self) -> str:
        line = self._file.readline(MAX_TSV_ROW + 1)
        if not line:
            raise StopIteration
        text = line.decode("utf-8", "surrogateescape")
        if self.end == 0:
            text = text.removeprefix("\ufeff")
        self.end += len(line)
        if self.end - self._start > MAX_TSV_ROW:
            raise InputError(
                f"{self._url} must have rows of at most {MAX_TSV_ROW} bytes, but the one at byte {self._start} is "
                "longer; is a quote not closed?"
            )
        return text


class _JsonText:
    """Reads JSON marks and values from a text, which is held in part."""

    def __init__(self, file: io.TextIOBase) -> None:
        self._file = file
        self._buffer, self._position = "", 0

    def next_mark(self) -> str:
        """Go to the next character that is no white space, and give it; nothing at the end."""
        while True:
            space = _SPACE.match(self._buffer, self._position)
            assert space is not None, "the pattern matches nothing, too"
            self._position = space.end()
            if self._position < len(self._buffer):
                return self._buffer[self._position]
            self._buffer, self._position = self._file.read(_CHUNK), 0
            if not self._buffer:
                return ""

    def pass_mark(self) -> None:
        self._position += 1

    def value(self) -> Any:
        """Give the value that begins here, and go behind it; a ValueError says that it is none."""
        while True:
            broken: ValueError | None = None
            try:
                value, end = json.JSONDecoder().raw_decode(self._buffer, self._position)
            except UnicodeDecodeError:
                raise
            except ValueError as error:
                broken, value, end = error, None, len(self._buffer)
            # What ends where the chunk ends, or breaks, may go on in the next one.
            in_reach = len(self._buffer) - self._position <= _MAX_ROW
            more = self._file.read(_CHUNK) if end == len(self._buffer) and in_reach else ""
            if not more:
                if broken is not None:
                    raise broken
                self._position = end
                return value
            self._buffer, self._position = self._buffer[self._position :] + more, 0


def _parquet_rows(url: str, form: Format[Any], root: str) -> Iterator[tuple[int, Any]]:
    """Read the columns that the format names; embedded images are named, not read."""
    number = 0
    with existing(url), open_parquet(url) as parquet:
        leaves = [parquet.schema.column(index) for index in range(len(parquet.schema))]
        names = dict.fromkeys(parquet.schema_arrow.names)
        bytes_of = {
            leaf.path.split(".")[0]: index
            for index, leaf in enumerate(leaves)
            if leaf.path.split(".")[0] in form.images
            and leaf.physical_type == "BYTE_ARRAY"
            and (leaf.logical_type.type == "NONE" or (form.base64 and leaf.path in form.images))
        }
        columns = [
            leaf.path
            for index, leaf in enumerate(leaves)
            if leaf.path.split(".")[0] in form.fields and index not in bytes_of.values()
        ]
        file = _relative(url, root)
        for group in range(parquet.num_row_groups):
            metadata = parquet.metadata.row_group(group)
            embedding = [name for name, index in bytes_of.items() if not _all_null(metadata.column(index))]
            for batch in parquet.iter_batches(_BATCH_ROWS, row_groups=[group], columns=columns, use_threads=False):
                for row in batch.to_pylist() if columns else [{} for _ in range(batch.num_rows)]:
                    for name in embedding:
                        # Where a column holds nothing but bytes, only reading them would tell how many images, if any.
                        held = row.get(name, {})
                        if held is not None:
                            count = len(held) if isinstance(held, list) else 1
                            row[name] = [embedded_uri(file, number, name, index) for index in range(count)]
                    number += 1
                    # The columns that were not read are named, so that it can be told what was left out.
                    yield number, {**names, **row}


def _all_null(column: Any) -> bool:
    statistics = column.statistics
    return statistics is not None and statistics.has_null_count and statistics.null_count == column.num_values


def _relative(url: str, root: str) -> str:
    below = f"{root.rstrip('/')}/"
    if url.startswith(below) and stays_inside(url, root):
        return url.removeprefix(below)
    return url if "://" in url else os.path.abspath(url)
