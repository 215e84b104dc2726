"""A bounded local cache of a remote store's files, named by their contents; several processes may share it."""

import hashlib
import os
import shutil
import uuid
from contextlib import suppress
from pathlib import Path

from tasks.adapters.files import sha256_file

_LARGEST_SHARE = 4
"""A file larger than this part of the cache would push out all others, and is not kept."""
_SLACK_SHARE = 16
"""What is written before the folder is counted again, as a part of the cache."""


class FileCache:
    """Files by the sha256 of their contents; what was used least recently goes first."""

    def __init__(self, folder: Path, max_bytes: int) -> None:
        """Set the place.

        Args:
            folder: created with the first file.
            max_bytes: size of all files together; each further process may add a 16th of it.
        """
        self._folder = folder
        self._max_bytes = max_bytes
        # Unknown how full it is: the first file counts.
        self._uncounted = max_bytes

    def read(self, sha256: str) -> bytes | None:
        """Give a file's contents, or None where it is not here, or not whole."""
        path = self._folder / sha256
        try:
            content = path.read_bytes()
        except FileNotFoundError:
            return None
        return content if self._confirm(path, hashlib.sha256(content).hexdigest()) else None

    def copy(self, sha256: str, target: Path) -> bool:
        """Copy a file to a place that is free, and tell whether it was here and whole."""
        path = self._folder / sha256
        try:
            shutil.copyfile(path, target)
        except FileNotFoundError:
            return False
        if self._confirm(path, sha256_file(target)):
            return True
        target.unlink()
        return False

    def add(self, sha256: str, content: bytes | Path) -> None:
        """Keep contents, or a link to the file that holds them, unless they are too large."""
        size = content.stat().st_size if isinstance(content, Path) else len(content)
        if size >= self._max_bytes // _LARGEST_SHARE:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        partial = self._folder / f"{sha256}.{uuid.uuid4().hex[:8]}.partial"
        try:
            if isinstance(content, Path):
                _link_or_copy(content, partial)
            else:
                partial.write_bytes(content)
            # Another process may have deleted it to make room. One that is there and damaged is replaced with it.
            with suppress(FileNotFoundError):
                os.utime(partial)
                partial.replace(self._folder / sha256)
        finally:
            partial.unlink(missing_ok=True)
        self._uncounted += size
        if self._uncounted > self._max_bytes // _SLACK_SHARE:
            self._shrink()
            self._uncounted = 0

    def _confirm(self, path: Path, found: str) -> bool:
        if found != path.name:
            path.unlink(missing_ok=True)
            return False
        # Another process may have deleted it by now.
        with suppress(FileNotFoundError):
            os.utime(path)
        return True

    def _shrink(self) -> None:
        """Delete the oldest files until there is room for as much as is written before the next count."""
        files = []
        for entry in os.scandir(self._folder):
            # Another process may be deleting too.
            with suppress(FileNotFoundError):
                found = entry.stat()
                files.append((found.st_mtime_ns, found.st_size, entry.path))
        total = sum(size for _, size, _ in files)
        for _, size, path in sorted(files):
            if total <= self._max_bytes - self._max_bytes // _SLACK_SHARE:
                return
            Path(path).unlink(missing_ok=True)
            total -= size


def _link_or_copy(source: Path, target: Path) -> None:
    try:
        os.link(source, target)
    except OSError:
        shutil.copyfile(source, target)
