"""Files between this machine and a folder on any fsspec file system: in parts, several at once, checked."""

import hashlib
import logging
import os
import shutil
import uuid
from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any, TypeVar

from fsspec.implementations.local import LocalFileSystem

from tasks.adapters.files import StoreError, error_code, filesystem, patiently, read_ranges, sha256_file
from tasks.artifacts import FileEntry

log = logging.getLogger("vzero.transfers")
T = TypeVar("T")
R = TypeVar("R")

_PART, _DOWNLOAD_BYTES = 1 << 25, 1 << 26
"""Bytes of one request, and of a batch of requests sent together; a larger file is read in several parts at once."""
_UPLOAD_PART, _UPLOAD_BYTES = 1 << 24, 1 << 26
"""Bytes of a part of a file that is sent in parts, several at once, and of the files sent together."""
_MAX_PARTS = 10_000
"""S3's limit of parts of one upload."""
_BATCH, _AHEAD = 64, 2
"""Files or parts in a batch, and batches under way; with the sizes above they bound the memory."""


class BrokenFileError(StoreError):
    """A file is gone, or differs from its checksum."""

    def __init__(self, name: str, problem: str) -> None:
        """Say which file, by its name in the folder, and what is wrong with it."""
        super().__init__(f"{name} {problem}")
        self.name, self.problem = name, problem


@dataclass(frozen=True)
class Folder:
    """A folder on a file system; names of files count from it.

    Attributes:
        fs: file system.
        path: on the file system.
        url: for messages, and for a person to open.
    """

    fs: Any
    path: str
    url: str

    @property
    def local(self) -> bool:
        """Whether it lies on this machine."""
        return isinstance(self.fs, LocalFileSystem)

    def below(self, *names: str) -> "Folder":
        """Give the folder of a name in it."""
        return Folder(self.fs, "/".join((self.path, *names)), "/".join((self.url, *names)))

    def read(self, name: str) -> bytes | None:
        """Read a small file, or give None where there is none."""
        try:
            [content] = read_ranges(self.fs, [(f"{self.path}/{name}", 0, None)], f"{self.url}/{name}")
        except FileNotFoundError:
            return None
        return content

    def write(self, name: str, content: bytes) -> None:
        """Write a small file, whether there is one or not; a reader sees the one or the other, whole."""
        path = f"{self.path}/{name}"
        if self.local:
            unfinished = f"{path}.{uuid.uuid4().hex}.partial"
            Path(unfinished).write_bytes(content)
            os.replace(unfinished, path)
        else:
            patiently(lambda: self.fs.pipe_file(path, content), f"{self.url}/{name}")

    def create(self, name: str, content: bytes) -> bool:
        """Write a small file unless there is one already, and tell whether it was written."""
        path = f"{self.path}/{name}"
        if self.local:
            # A link makes the whole file visible at once or fails; opening with "x" would show half of it.
            unfinished = f"{path}.{uuid.uuid4().hex}.partial"
            Path(unfinished).write_bytes(content)
            try:
                os.link(unfinished, path)
            except FileExistsError:
                return False
            finally:
                os.unlink(unfinished)
            return True
        try:
            patiently(lambda: self.fs.pipe_file(path, content, mode="create"), f"{self.url}/{name}")
        except FileExistsError:
            return False
        except OSError as error:
            if error_code(error) != "PreconditionFailed":
                raise
            return False
        return True

    def load(self, entry: FileEntry) -> bytes:
        """Read a file into memory and check it; one that is not as it should be, once more.

        Raises:
            BrokenFileError: it is gone, or differs from its checksum.
        """
        for _ in range(2):
            content = b"".join(self._parts([entry]))
            if hashlib.sha256(content).hexdigest() == entry.sha256:
                return content
        raise BrokenFileError(entry.path, "differs from its checksum")

    def download(self, paths: dict[FileEntry, Path]) -> None:
        """Write files to local paths and check them, in bounded memory; one that is not as it should be, once more.

        Raises:
            BrokenFileError: one is gone, or differs from its checksum.
        """
        with closing(self._parts(paths)) as parts:
            for entry, path in paths.items():
                if not (_write(parts, entry, path) or _write(self._parts([entry]), entry, path)):
                    raise BrokenFileError(entry.path, "differs from its checksum")

    def upload(self, source: Path) -> tuple[FileEntry, ...]:
        """Bring all files of a local folder here, and give what they are; on this machine they are moved.

        What was sent before an error is deleted again, where that is possible.
        """
        files = sorted((path.relative_to(source).as_posix(), path) for path in source.rglob("*") if path.is_file())
        if self.local:
            entries = _entries(files)
            Path(self.path).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(source, self.path)
            return entries
        batches = list(_batches(files, lambda file: file[1].stat().st_size, _UPLOAD_BYTES))
        try:
            with ThreadPoolExecutor(1) as pool:
                # A thread beside the uploads: they read the same files, which need not be read twice from disk.
                hashing = pool.submit(_entries, files)
                for _ in _ahead(self._write_batch, batches):
                    pass
                return hashing.result()
        except Exception:
            # The error that came first is the one to raise.
            try:
                self.fs.rm(self.path, recursive=True)
            except Exception as error:
                log.warning("%s is left unfinished (%s); `python -m flows.store gc` collects it", self.url, error)
            raise

    def _write_batch(self, batch: list[tuple[str, Path]]) -> None:
        largest = max(path.stat().st_size for _, path in batch)
        names, paths = [f"{self.path}/{name}" for name, _ in batch], [str(path) for _, path in batch]
        part = max(_UPLOAD_PART, -(-largest // _MAX_PARTS))
        patiently(lambda: self.fs.put(paths, names, batch_size=_BATCH, chunksize=part), self.url)

    def _parts(self, entries: Iterable[FileEntry]) -> Generator[bytes]:
        """Give the contents of files, in order and in parts; the next batches of parts are under way meanwhile."""
        ranges = [
            (f"{self.path}/{entry.path}", start, min(start + _PART, entry.size))
            for entry in entries
            for start in range(0, entry.size, _PART)
        ]
        batches = list(_batches(ranges, lambda part: part[2] - part[1], _DOWNLOAD_BYTES))
        if len(batches) == 1:
            yield from self._read_batch(batches[0])
            return
        for parts in _ahead(self._read_batch, batches):
            yield from parts

    def _read_batch(self, batch: list[tuple[str, int, int]]) -> list[bytes]:
        try:
            return read_ranges(self.fs, batch, self.url)
        except FileNotFoundError as error:
            raise BrokenFileError(str(error).removeprefix(f"{self.path}/"), "is gone") from error


def open_folder(url: str) -> Folder:
    """Open a folder or fsspec URL; nothing is asked of it yet."""
    fs, path = filesystem(url)
    return Folder(fs, path, path if isinstance(fs, LocalFileSystem) else url.rstrip("/"))


def _write(parts: Iterator[bytes], entry: FileEntry, path: Path) -> bool:
    """Write the parts of one file, and tell whether they are what its checksum says."""
    state = hashlib.sha256()
    with path.open("wb") as file:
        for part in islice(parts, -(-entry.size // _PART)):
            state.update(part)
            file.write(part)
    return state.hexdigest() == entry.sha256


def _entries(files: Iterable[tuple[str, Path]]) -> tuple[FileEntry, ...]:
    return tuple(FileEntry(path=name, size=path.stat().st_size, sha256=sha256_file(path)) for name, path in files)


def _batches(items: Iterable[T], size_of: Callable[[T], int], max_bytes: int) -> Iterator[list[T]]:
    """Cut into batches of bounded number and size; what is larger alone is a batch of its own."""
    batch: list[T] = []
    size = 0
    for item in items:
        if batch and (len(batch) == _BATCH or size + size_of(item) > max_bytes):
            yield batch
            batch, size = [], 0
        batch.append(item)
        size += size_of(item)
    if batch:
        yield batch


def _ahead(call: Callable[[T], R], items: Iterable[T]) -> Generator[R]:
    """Call with one item after the other and give the results in order, a few calls ahead of who takes them."""
    pool = ThreadPoolExecutor(_AHEAD)
    under_way: deque[Future[R]] = deque()
    try:
        for item in items:
            if len(under_way) == _AHEAD:
                yield under_way.popleft().result()
            under_way.append(pool.submit(call, item))
        while under_way:
            yield under_way.popleft().result()
    finally:
        pool.shutdown(cancel_futures=True)
