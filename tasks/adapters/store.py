"""Artefacts on any fsspec file system: a local folder here, a bucket with the same code.

An attempt's files lie under `<stage>/<key>/<attempt>/`. The create-only `<stage>/<key>/manifest.json` decides which
attempt is the artefact; what has no manifest does not exist.
"""

import json
import logging
import os
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, cached_property
from pathlib import Path, PurePosixPath
from typing import Any, TypeVar

from pydantic import ValidationError

from tasks.adapters.cache import FileCache
from tasks.adapters.files import PASSING_ERRNOS, patiently
from tasks.adapters.files import StoreError as StoreError
from tasks.adapters.files import sha256_file as sha256_file
from tasks.adapters.transfers import BrokenFileError, Folder, open_folder
from tasks.artifacts import ArtifactRef, FileEntry, Job, Manifest, content_digest

T = TypeVar("T")
log = logging.getLogger("vzero.store")

CACHE_BYTES = 10 << 30
"""Default size of the local cache of a remote store."""
_NUM_THREADS = 8
"""Small requests at once."""
KEEP = "keep"
"""Name of the file that protects an artefact from pruning."""
_MANIFEST = "manifest.json"


class DamagedError(StoreError):
    """A file of an artefact is gone, or differs from its checksum, or its manifest is not whole."""


@dataclass(frozen=True)
class StoredFile:
    """A file in the store.

    Attributes:
        path: from the store's root.
        size: bytes.
        changed: when it was written.
    """

    path: str
    size: int
    changed: datetime


@dataclass
class Outcome:
    """Figures of a finished attempt."""

    summary: dict[str, Any] = field(default_factory=dict)
    """What follows from the job alone; same job, same summary."""
    measured: dict[str, float] = field(default_factory=dict)
    """What this attempt happened to take."""


class Store:
    """A place for artefacts."""

    def __init__(self, url: str, work_dir: Path, cache_bytes: int = CACHE_BYTES) -> None:
        """Open the store; nothing is asked of it yet.

        Args:
            url: folder or fsspec URL; a local folder is created at the first use, a bucket must exist.
            work_dir: local folder for attempts under way and the cache.
            cache_bytes: size of the cache of a remote store's files; a local store has none.
        """
        self.url = url.rstrip("/")
        self._root = open_folder(url)
        self._work_dir = work_dir
        self._cache = FileCache(work_dir / "cache", 0 if self._root.local else cache_bytes)
        self._manifests: dict[ArtifactRef, Manifest] = {}

    @cached_property
    def identity(self) -> str:
        """Random name given to the store at its first use; a store that was deleted and made anew has another.

        Raises:
            StoreError: the store cannot be reached, made or written.
        """
        if self._root.local:
            _make_writable(Path(self._root.path))
        content = self._root.read("store.json")
        if content is None:
            self._root.create("store.json", json.dumps({"identity": uuid.uuid4().hex}).encode())
            content = self._root.read("store.json")
        if content is None:
            raise StoreError(f"{self.url} must keep what is written; store.json is gone again: check the bucket")
        identity: str = json.loads(content)["identity"]
        return identity

    def find(self, stage: str, key: str) -> Manifest | None:
        """Give the manifest committed under a key, or None.

        Raises:
            DamagedError: it is not whole.
            StoreError: the store cannot be reached.
        """
        folder = self._root.below(stage, key)
        content = folder.read(_MANIFEST)
        if content is None:
            return None
        try:
            return Manifest.model_validate_json(content)
        except ValidationError as error:
            raise DamagedError(
                f"{folder.url}/{_MANIFEST} must be whole, but is not; delete {folder.url} and run again"
            ) from error

    def files(self) -> list[StoredFile]:
        """List all files there are, whether a manifest names them or not."""
        found = patiently(lambda: self._root.fs.find(self._root.path, detail=True), self.url)
        start = len(self._root.path) + 1
        # A server may list folders too, with a slash at their end.
        return [
            StoredFile(info["name"][start:], info["size"], _changed(info))
            for info in found.values()
            if info["type"] == "file" and not info["name"].endswith("/")
        ]

    def manifests(self, files: Iterable[StoredFile]) -> Iterator[Manifest]:
        """Give the manifests among the files, in their order.

        One that was deleted since is left out, and so is one that is not whole, with a warning.
        """

        def find(names: tuple[str, str]) -> Manifest | None:
            try:
                return self.find(*names)
            except DamagedError as error:
                log.warning("%s", error)
                return None

        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            yield from filter(None, pool.map(find, artefact_names(files)))

    def manifest(self, ref: ArtifactRef) -> Manifest:
        """Give an artefact's manifest.

        Raises:
            StoreError: there is none, or it names another content.
        """
        found = self.find(ref.stage, ref.key)
        if found is None:
            raise StoreError(
                f"artefact {ref.stage}/{ref.key} must exist in {self.url}; it does not: run the flow again"
            )
        if found.digest != ref.digest:
            raise StoreError(
                f"artefact {ref.stage}/{ref.key} must have digest {ref.digest}, got {found.digest}; run the flow again"
            )
        return found

    def read(self, ref: ArtifactRef, name: str) -> bytes:
        """Read one file of an artefact and check it against the manifest.

        Raises:
            StoreError: the file is not in the artefact, was pruned, or differs from its checksum.
        """

        def read_of(manifest: Manifest) -> bytes:
            entry = next((entry for entry in manifest.files if entry.path == name), None)
            if entry is None or manifest.pruned:
                state = "was pruned" if manifest.pruned else "has no such file"
                raise StoreError(f"{name} must be in artefact {ref.stage}/{ref.key}, but it {state}")
            content = self._cache.read(entry.sha256)
            if content is None:
                with self._attempt(manifest) as attempt:
                    content = attempt.load(entry)
                self._cache.add(entry.sha256, content)
            return content

        return self._with_manifest(ref, read_of)

    def fetch(self, ref: ArtifactRef, folder: str, target: Path) -> None:
        """Copy the files below `folder` of an artefact, all where it is empty, into the local folder `target`, checked.

        The target appears whole or not at all. Memory is bounded, also where a file is larger than it.

        Raises:
            StoreError: there are no such files, they were pruned, or one differs from its checksum.
        """
        unfinished = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.partial")

        def fetch_of(manifest: Manifest) -> None:
            entries = [entry for entry in manifest.files if entry.path.startswith(f"{folder}/" if folder else "")]
            if not entries or manifest.pruned:
                state = "was pruned" if manifest.pruned else "has none"
                raise StoreError(f"artefact {ref.stage}/{ref.key} must have files below {folder}/, but it {state}")
            paths = {entry: unfinished / PurePosixPath(entry.path).relative_to(folder) for entry in entries}
            for path in paths.values():
                path.parent.mkdir(parents=True, exist_ok=True)
            missing = {entry: path for entry, path in paths.items() if not self._cache.copy(entry.sha256, path)}
            with self._attempt(manifest) as attempt:
                attempt.download(missing)
            for entry, path in missing.items():
                self._cache.add(entry.sha256, path)

        try:
            self._with_manifest(ref, fetch_of)
            try:
                unfinished.rename(target)
            except OSError:
                # Somebody else was quicker.
                if not target.is_dir():
                    raise
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def produce(self, job: Job, make: Callable[[Path], Outcome]) -> ArtifactRef:
        """Give the artefact of a job: the committed one, or the one that `make` writes into an empty folder.

        A pruned artefact is made again.
        """
        found = self.find(job.stage, job.key)
        if found is not None and not found.pruned:
            return found.ref
        with self.scratch(job.stage) as place:
            folder = place / "files"
            folder.mkdir()
            started, cpu_started = time.perf_counter(), time.process_time()
            outcome = make(folder)
            outcome.measured["seconds"] = time.perf_counter() - started
            # Of all threads of this process, whichever artefact they work for.
            outcome.measured["cpu_seconds"] = time.process_time() - cpu_started
            return self._commit(job, folder, outcome, revive=found is not None)

    @contextmanager
    def scratch(self, title: str) -> Iterator[Path]:
        """Give an empty local folder, which goes at the end."""
        self._work_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{title}-", dir=self._work_dir) as name:
            yield Path(name)

    def _commit(self, job: Job, folder: Path, outcome: Outcome, *, revive: bool) -> ArtifactRef:
        attempt = uuid.uuid4().hex
        place = self._root.below(job.stage, job.key)
        files = place.below(attempt).upload(folder)
        if not place.local:
            for entry in files:
                self._cache.add(entry.sha256, folder / entry.path)
        manifest = Manifest(
            stage=job.stage,
            key=job.key,
            digest=content_digest(files),
            attempt=attempt,
            files=files,
            inputs=job.inputs(),
            job=job.model_dump(mode="json"),
            summary=outcome.summary,
            measured=outcome.measured,
            code=code_version(),
            created_at=datetime.now(UTC),
            host=socket.gethostname(),
        )
        text = manifest.model_dump_json(indent=1).encode()
        if revive:
            place.write(_MANIFEST, text)
        elif not place.create(_MANIFEST, text):
            winner = self.find(job.stage, job.key)
            assert winner is not None, "a manifest that could not be created must be there"
            # Our own one refuses us where it was created and the server's answer was lost.
            if winner.attempt != attempt:
                self.delete(f"{job.stage}/{job.key}/{attempt}")
                return winner.ref
        return manifest.ref

    def keep(self, ref: ArtifactRef) -> None:
        """Protect an artefact from pruning, for good."""
        self._root.below(ref.stage, ref.key).write(KEEP, b"")

    def prune(self, ref: ArtifactRef) -> None:
        """Delete an artefact's files, unless it is kept; its manifest remains as a tombstone."""
        manifest = self.manifest(ref)
        place = self._root.below(ref.stage, ref.key)
        if manifest.pruned or place.read(KEEP) is not None:
            return
        tombstone = manifest.model_copy(update={"pruned": True}).model_dump_json(indent=1).encode()
        # The tombstone comes first: a manifest never promises files that are already going.
        place.write(_MANIFEST, tombstone)
        self._manifests.pop(ref, None)
        self.delete(f"{ref.stage}/{ref.key}/{manifest.attempt}")

    def delete(self, path: str) -> None:
        """Delete a file of the store, or a folder with all that is in it, whatever it is."""
        fs, whole = self._root.fs, self._root.below(path)
        if whole.local:
            with suppress(FileNotFoundError):
                fs.rm(whole.path, recursive=True)
            return

        def delete_file(path: str) -> None:
            with suppress(FileNotFoundError):
                patiently(lambda: fs.rm_file(path), whole.url + path.removeprefix(whole.path))

        # One by one: s3fs does not tell when a request to delete many was refused.
        found = patiently(lambda: fs.find(whole.path), whole.url)
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            list(pool.map(delete_file, found))

    def path_of(self, ref: ArtifactRef, name: str) -> str:
        """Give where a file of an artefact lies, for a person to open."""
        return self._root.below(ref.stage, ref.key, self.manifest(ref).attempt, name).url

    def check(self, manifest: Manifest, entry: FileEntry) -> None:
        """Read a file of an artefact from the store, not from the cache, and forget it.

        Raises:
            DamagedError: it is gone, or differs from its checksum.
        """
        with self._attempt(manifest) as attempt:
            attempt.download({entry: Path(os.devnull)})

    def _with_manifest(self, ref: ArtifactRef, use: Callable[[Manifest], T]) -> T:
        """Use an artefact's manifest, without asking for it again; one that misleads is asked for once more."""
        known = self._manifests.get(ref)
        if known is not None:
            # Another process may have pruned or revived the artefact since.
            with suppress(DamagedError):
                return use(known)
        found = self.manifest(ref)
        if not found.pruned:
            self._manifests[ref] = found
        return use(found)

    @contextmanager
    def _attempt(self, manifest: Manifest) -> Iterator[Folder]:
        """Give the folder of an artefact's files; one that is broken is named with its artefact."""
        place = self._root.below(manifest.stage, manifest.key)
        try:
            yield place.below(manifest.attempt)
        except BrokenFileError as error:
            artefact = f"{manifest.stage}/{manifest.key}"
            raise DamagedError(
                f"{error.name} of artefact {artefact} {error.problem}; delete {place.url} and run the flow again"
            ) from error


def artefact_names(files: Iterable[StoredFile]) -> list[tuple[str, str]]:
    """Give stage and key of the artefacts whose manifests are among the files."""
    paths = [PurePosixPath(file.path).parts for file in files]
    return [(parts[0], parts[1]) for parts in paths if len(parts) == 3 and parts[2] == _MANIFEST]


def _make_writable(folder: Path) -> None:
    """Make the folder of a local store where there is none, and see that it can be written."""
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Rights alone do not tell: the disk may be mounted for reading only.
        with tempfile.TemporaryFile(dir=folder):
            pass
    except OSError as error:
        if error.errno in PASSING_ERRNOS:
            raise
        raise StoreError(
            f"store.url must be a folder that can be written, got {folder}: {error.strerror}; correct it, or its rights"
        ) from error


def _changed(info: dict[str, Any]) -> datetime:
    """Give when a listed file was written; each file system has its own name for it."""
    found = info.get("LastModified") or info.get("mtime") or info["created"]
    return found if isinstance(found, datetime) else datetime.fromtimestamp(found, UTC)


@cache
def code_version() -> str:
    """Give the version of the running code: package version, and the git commit where there is one."""
    from importlib.metadata import version

    root = Path(__file__).parents[2]
    commit = ""
    if (root / ".git").exists():
        found = subprocess.run(
            ["git", "rev-parse", "--short=12", "HEAD"], cwd=root, capture_output=True, text=True, check=False
        )
        commit = f"+{found.stdout.strip()}" if found.returncode == 0 else ""
    return f"{version('vzero')}{commit}"


def write_json(path: Path, value: Any) -> None:
    """Write a small JSON file, with sorted keys so that equal values give equal bytes."""
    path.write_text(json.dumps(value, sort_keys=True, indent=1, allow_nan=False) + "\n")
