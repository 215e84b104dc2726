"""Images where they lie: opened within limits, turned as EXIF says, and checked against what was validated."""

import base64
import binascii
import csv
import errno
import hashlib
import io
import os
import re
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from itertools import accumulate, chain
from typing import Any

import aiohttp
import imagehash
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from botocore.exceptions import ParamValidationError  # type: ignore[import-untyped]
from PIL import ExifTags, Image, ImageOps, UnidentifiedImageError

from tasks.adapters.files import filesystem, open_file, read_bytes, read_ranges, stat
from tasks.adapters.formats import printable, shown
from tasks.artifacts import ImageRef
from tasks.config import URL_SCHEMES
from vzero_core.errors import InputError, VZeroError

# Named, because Pillow knows many more, some of which start other programs (EPS: Ghostscript). JPEG includes MPO.
_FORMATS = ("JPEG", "PNG", "WEBP", "GIF", "BMP", "TIFF")
_SIZE_FIRST = (b"\xff\xd8\xff", b"\x89PNG", b"BM")
"""How files begin whose size, orientation and number of pictures stand before the pixels: JPEG, PNG, BMP."""
_HEADER_BYTES = 1 << 16
# What the models see is three 8-bit channels; everything else is converted or refused here.
_MODES_8_BIT = frozenset({"1", "L", "LA", "P", "PA", "RGB", "RGBA", "RGBX", "CMYK", "YCbCr"})
_MODES_16_BIT = frozenset({"I;16", "I;16L", "I;16B", "I;16N"})

_BAD_PATH = frozenset({errno.EISDIR, errno.ENOTDIR, errno.EACCES, errno.ENAMETOOLONG, errno.ELOOP})

# Pillow's own limit is fixed, at 179 million pixels; the reader's is a setting, and asked before pixels are decoded.
Image.MAX_IMAGE_PIXELS = None
# Broken EXIF, a palette's transparency: nothing that a user could act on. Here, because a filter set for the length of
# a call is not safe among threads.
warnings.filterwarnings("ignore", category=UserWarning, module=r"PIL\.")

_EMBEDDED = re.compile(r"(?P<file>.+)#row=(?P<row>\d{1,12})&column=(?P<column>[^&]+)&index=(?P<index>\d{1,12})")
_IN_TSV = re.compile(r"(?P<file>.+)#bytes=(?P<start>\d{1,15})-(?P<end>\d{1,15})&column=(?P<column>\d{1,4})")
MAX_TSV_ROW = 1 << 28
"""Bytes of one row of a TSV file; beyond, a quote is taken for not closed, so that the file is not read whole."""
# Of the whole process: one cell may fill a row, and an image of 8K in base64 has some megabytes.
csv.field_size_limit(MAX_TSV_ROW)
_MAX_STREAMS = 4
"""Columns that are read at the same time: an image, its detail, both crops."""
_KEPT_BYTES = 1 << 26
"""Of each of them, for threads that run ahead of one another."""
_READ_BUFFER = 1 << 20


@dataclass(frozen=True)
class Inspected:
    """What an image is.

    Attributes:
        ref: where it lies, its size, and what pins its content.
        hash: perceptual hash of the upright picture, 64 bits as 16 hexadecimal digits; None where it was not decoded.
    """

    ref: ImageRef
    hash: str | None


class ImageReader:
    """Reads the images of one dataset; may be used by several threads."""

    def __init__(self, root: str, max_pixels: int) -> None:
        """Set where relative paths count from, and the largest image that is decoded.

        Args:
            root: folder or URL.
            max_pixels: pixels; larger images are refused before decoding.
        """
        self._root = root.removeprefix("file://").rstrip("/")
        self._max_pixels = max_pixels
        self._columns = _EmbeddedColumns()

    def inspect(self, uri: str, *, decode: bool) -> Inspected:
        """Describe an image.

        Args:
            uri: path, URL, `embedded_uri` or `tsv_uri`.
            decode: decode and hash it whole; else read its header, size and ETag only. Read whole in either case are
                embedded images, because Parquet cannot give a part of a value, and those on the web, where not every
                server tells a size and an ETag.

        Raises:
            InputError: it is missing, empty, too large, of a kind that is not handled, or damaged, or its web server
                does not give it.
        """
        url, embedded = self.locate(uri), _embedded(uri) is not None
        on_web = not embedded and url.startswith(("http://", "https://"))
        if not decode and not embedded and not on_web:
            width, height = self._header_size(uri, url)
            with self._found(uri):
                found = stat(url)
            return Inspected(
                ImageRef(uri=uri, width=width, height=height, size_bytes=found.size, etag=found.etag), None
            )
        content = self._fetch_once(uri, url) if on_web else self._fetch(uri)
        image = self._decode(uri, content) if decode else None
        width, height = image.size if image is not None else self._upright_size(uri, content)
        ref = ImageRef(
            uri=uri, width=width, height=height, size_bytes=len(content), sha256=hashlib.sha256(content).hexdigest()
        )
        return Inspected(ref, str(imagehash.phash(image)) if image is not None else None)

    def read(self, ref: ImageRef) -> Image.Image:
        """Give an image as RGB, upright.

        Raises:
            InputError: it is not the image that was validated.
        """
        content = self._fetch(ref.uri)
        if ref.sha256 is not None:
            same = len(content) == ref.size_bytes and hashlib.sha256(content).hexdigest() == ref.sha256
        else:
            same = self.stamp(ref.uri) == [ref.size_bytes, ref.etag]
        if not same:
            raise InputError(
                f"image {shown(ref.uri)} must be the one that was validated ({ref.size_bytes} bytes), but it "
                f"has changed ({len(content)} bytes); restore it, or give it a new date (touch) and run the flow "
                "again, so that it is validated anew"
            )
        image = self._decode(ref.uri, content)
        if image.size != (ref.width, ref.height):
            raise InputError(
                f"image {shown(ref.uri)} must be {ref.width}x{ref.height} as its header says, got {image.width}x"
                f'{image.height}; set data.images = "decode"'
            )
        return image

    def stamp(self, uri: str) -> list[str | int]:
        """Give what changes when an image, or the file it is embedded in, changes; empty where there is none."""
        embedded = _embedded(uri)
        try:
            with self._found(uri):
                found = stat(self.locate(embedded["file"] if embedded else uri))
        except InputError:
            return []
        return [found.size, found.etag]

    def locate(self, uri: str) -> str:
        """Give the full path or URL of an image.

        Raises:
            InputError: a relative path leaves the dataset's folder, or it is no path or URL that is handled.
        """
        uri = uri.removeprefix("file://")
        scheme, is_url, _ = uri.partition("://")
        # fsspec takes what :: joins for a chain of file systems.
        if (
            not uri.strip()
            or "\0" in uri
            or "::" in uri
            or uri.startswith("data:")
            or (is_url and scheme not in URL_SCHEMES)
        ):
            raise InputError(
                f"image must be a path or one of {', '.join(URL_SCHEMES)} URLs, got '{shown(uri)}'; write it to a file"
            )
        if is_url or uri.startswith("/"):
            return uri
        url = f"{self._root}/{uri}"
        if ".." in uri.split("/") or not stays_inside(url, self._root):
            raise InputError(
                f"image path must stay inside the dataset's folder, also through links, got '{shown(uri)}'; "
                "use an absolute path"
            )
        return url

    def _fetch(self, uri: str) -> bytes:
        embedded = _embedded(uri)
        url = self.locate(embedded["file"] if embedded else uri)
        with self._found(uri):
            if embedded is None:
                content = read_bytes(url)
            elif embedded.re is _IN_TSV:
                content = _read_cell(url, int(embedded["start"]), int(embedded["end"]), int(embedded["column"]))
            else:
                content = self._columns.read(url, embedded["column"], int(embedded["row"]), int(embedded["index"]))
        return _not_empty(uri, content)

    def _fetch_once(self, uri: str, url: str) -> bytes:
        # Without patience: an address that a row names may be wrong, or its server gone for good.
        with self._found(uri):
            try:
                fs, path = filesystem(url)
                content: bytes = fs.cat_file(path)
            except FileNotFoundError:
                raise
            except (aiohttp.ClientError, OSError, ValueError) as error:
                raise InputError(
                    f"image {shown(uri)} must be reachable, but: {shown(error)}; correct its URL"
                ) from error
        return _not_empty(uri, content)

    def _header_size(self, uri: str, url: str) -> tuple[int, int]:
        with self._found(uri), open_file(url) as file:
            start = _not_empty(uri, file.read(_HEADER_BYTES))
        if start.startswith(_SIZE_FIRST):
            try:
                return self._upright_size(uri, start)
            except InputError:
                # The header may be longer than what was read; if not, the whole file fails in the same way.
                pass
        return self._upright_size(uri, self._fetch(uri))

    def _upright_size(self, uri: str, content: bytes) -> tuple[int, int]:
        with _named(uri):
            image = self._open(uri, content)
            # Not PngImageFile's own method, which decodes the pixels to look for EXIF behind them.
            orientation = Image.Image.getexif(image).get(ExifTags.Base.Orientation, 1)
        # Pillow's TIFF plugin gives the upright size by itself.
        turned = orientation in (5, 6, 7, 8) and image.format != "TIFF"
        return (image.height, image.width) if turned else image.size

    def _decode(self, uri: str, content: bytes) -> Image.Image:
        with _named(uri):
            image = self._open(uri, content)
            image.load()
            # In place, because a copy of a large picture takes as long as decoding half of it.
            ImageOps.exif_transpose(image, in_place=True)
            return _to_rgb(image)

    def _open(self, uri: str, content: bytes) -> Image.Image:
        image = Image.open(io.BytesIO(content), formats=_FORMATS)
        pixels = image.width * image.height
        if pixels > self._max_pixels:
            raise InputError(
                f"image {shown(uri)} must have at most {self._max_pixels} pixels, got {pixels}; "
                "make it smaller or raise data.max_image_pixels"
            )
        if image.mode not in _MODES_8_BIT | _MODES_16_BIT:
            raise InputError(
                f"image {shown(uri)} must have 8 or 16 bits per channel, got mode {image.mode}; convert it"
            )
        frames = getattr(image, "n_frames", 1)
        # Phones put previews and depth behind the picture (MPO); the first is the one that viewers show.
        if frames > 1 and image.format != "MPO":
            raise InputError(
                f"image {shown(uri)} must be a still picture, got {frames} frames; save the one that is meant"
            )
        return image

    @contextmanager
    def _found(self, uri: str) -> Iterator[None]:
        try:
            yield
        except FileNotFoundError as error:
            raise InputError(f"image {shown(uri)} must exist, but there is no such file below {self._root}") from error
        except OSError as error:
            # Others may pass, and are no fault of the row.
            if error.errno not in _BAD_PATH:
                raise
            raise InputError(f"image {shown(uri)} must be a file that can be read, but: {error.strerror}") from error
        except ParamValidationError as error:
            raise InputError(f"image {shown(uri)} must have a bucket and a path that S3 allows; correct it") from error


def _embedded(uri: str) -> re.Match[str] | None:
    return _EMBEDDED.fullmatch(uri) or _IN_TSV.fullmatch(uri)


def stays_inside(path: str, folder: str) -> bool:
    """Say whether a local path is inside a folder once links are followed; a URL has none."""
    if "://" in folder:
        return True
    inside = os.path.realpath(folder or "/")
    return os.path.commonpath([inside, os.path.realpath(path)]) == inside


@contextmanager
def _named(uri: str) -> Iterator[None]:
    """Name the image in every error of a decoder; what decoders raise for damaged files is of many types."""
    try:
        yield
    except (VZeroError, MemoryError):
        raise
    except UnidentifiedImageError as error:
        raise InputError(
            f"image {shown(uri)} must be an image, of {', '.join(_FORMATS)}; its format is not one"
        ) from error
    except Exception as error:
        raise InputError(f"image {shown(uri)} must be readable, but decoding failed: {shown(error)}") from error


def _not_empty(uri: str, content: bytes) -> bytes:
    if not content:
        raise InputError(f"image {shown(uri)} must not be empty, got a file of 0 bytes")
    return content


def _to_rgb(image: Image.Image) -> Image.Image:
    if image.mode in _MODES_16_BIT:
        values = np.asarray(image).astype(np.uint32)
        grey = ((values + 128) // 257).astype(np.uint8)  # 65535 / 255 = 257: round(value / 257)
        if "transparency" in image.info:
            grey[values == image.info["transparency"]] = 255
        return Image.fromarray(grey).convert("RGB")
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA"):
        # Transparent pixels carry arbitrary colours; the models were trained on what a viewer shows on white.
        rgba = image.convert("RGBA")
        return Image.alpha_composite(Image.new("RGBA", rgba.size, "white"), rgba).convert("RGB")
    return image if image.mode == "RGB" else image.convert("RGB")


def from_base64(text: str, what: str) -> bytes:
    """Decode base64, with or without line breaks in it.

    Args:
        text: what is decoded.
        what: what it is, for messages.

    Raises:
        InputError: it is something else.
    """
    try:
        return base64.b64decode("".join(text.split()), validate=True)
    except (binascii.Error, ValueError) as error:
        raise InputError(f"{what} must be an image in base64, but: {error}; is the file whole?") from error


# --- images embedded in TSV ---------------------------------------------------------------------------------------


def tsv_uri(file: str, start: int, end: int, column: int) -> str:
    """Name an image that is a cell of a TSV file, in base64.

    Args:
        file: the TSV file, as other images are named.
        start: the first byte of its row.
        end: the byte after the row's last.
        column: its column, from 0.
    """
    return f"{file}#bytes={start}-{end}&column={column}"


def next_tsv_row(lines: Iterator[str]) -> list[str] | None:
    """Give the cells of the next row, of as many lines as it has; none for a blank line, None at the end.

    Raises:
        csv.Error: it is no row of a TSV file.
    """
    line = next(lines, None)
    if line is None:
        return None
    text = line.removesuffix("\n").removesuffix("\r")
    if '"' not in text and "\r" not in text:
        # The same as csv gives, which needs up to eight times the memory of a cell.
        return text.split("\t") if text else []
    return next(csv.reader(chain([line], lines), delimiter="\t"), [])


def _read_cell(url: str, start: int, end: int, column: int) -> bytes:
    what = f"cell {column} of bytes {start} to {end} of {printable(url)}"
    if not start < end <= start + MAX_TSV_ROW:
        raise InputError(f"{what} must be in a row of at most {MAX_TSV_ROW} bytes, got {end - start}")
    fs, path = filesystem(url)
    [row] = read_ranges(fs, [(path, start, end)], url)
    try:
        cells = next_tsv_row(line.decode("utf-8", "surrogateescape") for line in io.BytesIO(row)) or []
    except csv.Error as error:
        raise InputError(f"{what} must be in a row of a TSV file, but: {error}") from error
    if column >= len(cells):
        raise InputError(f"{what} must be in a row with as many cells, got {len(cells)}")
    return from_base64(cells[column], what)


# --- images embedded in Parquet -----------------------------------------------------------------------------------


def embedded_uri(file: str, row: int, column: str, index: int) -> str:
    """Name an image that is a value in a Parquet file.

    Args:
        file: the Parquet file, as other images are named.
        row: its row, from 0.
        column: its column: bytes, base64 as text, a struct with the field `bytes`, or a list of one of them.
        index: its place in the list, from 0.
    """
    return f"{file}#row={row}&column={column}&index={index}"


@contextmanager
def open_parquet(url: str) -> Iterator[pq.ParquetFile]:
    """Open a Parquet file for reading in parts.

    Raises:
        InputError: what is read inside the `with` is not, or no whole, Parquet file.
        FileNotFoundError: there is none.
    """
    with open_file(url) as file:
        try:
            # A column is read as it is decoded; by default, a row group's part of it would be read first as a whole.
            yield pq.ParquetFile(file, buffer_size=_READ_BUFFER, pre_buffer=False)
        except (pa.ArrowException, OSError) as error:
            # A file system's errors have a number; Arrow raises a bare OSError for damaged pages.
            if isinstance(error, VZeroError) or (isinstance(error, OSError) and error.errno is not None):
                raise
            raise InputError(
                f"{printable(url)} must be a whole Parquet file, but it cannot be read: {error}"
            ) from error


class _EmbeddedColumns:
    """Reads single values of Parquet columns, and goes on from where it stopped when rows are asked for in order.

    Parquet has no index of rows: to reach a row, the values before it in its row group are passed. So reading in
    order costs one pass, also where several threads ask for rows a little out of order, since the last values are
    kept; reading at random costs half a row group for each value. What is held in memory is a page of the file, which
    pyarrow's writer ends after 1,024 rows or with the row group.
    """

    def __init__(self) -> None:
        self._streams: dict[tuple[str, str], _RowGroup] = {}
        self._lock = threading.Lock()

    def read(self, url: str, column: str, row: int, index: int) -> bytes:
        with self._lock:
            stream = self._streams.pop((url, column), None)
            if stream is None or not stream.can_give(row):
                stream = _RowGroup(url, column, row)
            contents = stream.contents(row)
            self._streams[url, column] = stream
            if len(self._streams) > _MAX_STREAMS:
                del self._streams[next(iter(self._streams))]
        content = contents[index] if index < len(contents) else None
        if content is None:
            raise InputError(
                f"row {row} of {printable(url)} must hold image {index} in column {shown(column)}, got none"
            )
        if isinstance(content, str):
            return from_base64(content, f"row {row} of {printable(url)}, column {shown(column)}")
        return content


class _RowGroup:
    """One column of the row group that a row is in, read from its start, with the last values that were passed."""

    def __init__(self, url: str, column: str, row: int) -> None:
        with open_parquet(url) as parquet:
            sizes = [parquet.metadata.row_group(group).num_rows for group in range(parquet.num_row_groups)]
        ends = list(accumulate(sizes))
        group = next((group for group, end in enumerate(ends) if row < end), None)
        if group is None:
            raise InputError(f"{printable(url)} must have a row {row}, got {sum(sizes)} rows")
        self._next, self._end = ends[group] - sizes[group], ends[group]
        self._values = _column_contents(url, group, column)
        self._kept: dict[int, list[bytes | str | None]] = {}
        self._kept_bytes = 0

    def can_give(self, row: int) -> bool:
        return row in self._kept or self._next <= row < self._end

    def contents(self, row: int) -> list[bytes | str | None]:
        while self._next <= row:
            self._kept[self._next] = next(self._values)
            self._kept_bytes += _num_bytes(self._kept[self._next])
            self._next += 1
            while self._kept_bytes > _KEPT_BYTES and len(self._kept) > 1:
                self._kept_bytes -= _num_bytes(self._kept.pop(next(iter(self._kept))))
        return self._kept[row]


def _num_bytes(contents: list[bytes | str | None]) -> int:
    return sum(len(content) for content in contents if content is not None)


def _column_contents(url: str, group: int, column: str) -> Iterator[list[bytes | str | None]]:
    """Give the images of each row of a row group, one row in memory at a time."""
    with open_parquet(url) as parquet:
        for batch in parquet.iter_batches(batch_size=1, row_groups=[group], columns=[column], use_threads=False):
            if column not in batch.schema.names:
                raise InputError(f"{printable(url)} must have a column {shown(column)}, got none")
            value = batch.column(0)[0].as_py()
            items = [item.get("bytes") if isinstance(item, dict) else item for item in _as_list(value)]
            yield [item if isinstance(item, bytes | str) else None for item in items]


def _as_list(value: Any) -> list[Any]:
    return value if isinstance(value, list) else [value]
