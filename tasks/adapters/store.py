"""Artefacts on any fsspec file system: a local folder here, a bucket with the same code.

An attempt's files lie under `<stage>/<key>/<attempt>/`. The create-only `<stage>/<key>/manifest.json` decides which
attempt is the artefact; what has no manifest does not exist.
"""

import hashlib
import json
import os
import shutil
import socket
import subprocess
import tempfile
import time
import uuid
from collections.abc import Callable, Iterator
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import UTC, datetime
from functools import cache, cached_property
from pathlib import Path, PurePosixPath
from typing import Any

import fsspec
from fsspec.implementations.local import LocalFileSystem

from tasks.artifacts import ArtifactRef, FileEntry, Job, Manifest, content_digest
from vzero_core.errors import VZeroError

_CHUNK = 1 << 20


class StoreError(VZeroError, OSError):
    """An artefact is missing, damaged or was pruned."""


@dataclass
class Outcome:
    """Figures of a finished attempt."""

    summary: dict[str, Any] = field(default_factory=dict)
    """What follows from the job alone; same job, same summary."""
    measured: dict[str, float] = field(default_factory=dict)
    """What this attempt happened to take."""


class Store:
    """A place for artefacts."""

    def __init__(self, url: str, work_dir: Path) -> None:
        """Open the store.

        Args:
            url: folder or fsspec URL; a local folder is created at the first write.
            work_dir: local folder for attempts under way.
        """
        self.url = url
        self._fs, self._root = fsspec.core.url_to_fs(url)
        self._local = isinstance(self._fs, LocalFileSystem)
        self._work_dir = work_dir

    @cached_property
    def identity(self) -> str:
        """Random name given to the store at its first use; a store that was deleted and made anew has another."""
        path = self._path("store.json")
        if not self._fs.exists(path):
            if self._local:
                Path(self._root).mkdir(parents=True, exist_ok=True)
            self._create_only(path, json.dumps({"identity": uuid.uuid4().hex}).encode())
        identity: str = json.loads(self._fs.cat_file(path))["identity"]
        return identity

    def find(self, stage: str, key: str) -> Manifest | None:
        """Give the manifest committed under a key, or None."""
        try:
            content = self._fs.cat_file(self._path(stage, key, "manifest.json"))
        except FileNotFoundError:
            return None
        return Manifest.model_validate_json(content)

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
        manifest = self.manifest(ref)
        entry = next((entry for entry in manifest.files if entry.path == name), None)
        if entry is None or manifest.pruned:
            state = "was pruned" if manifest.pruned else "has no such file"
            raise StoreError(f"{name} must be in artefact {ref.stage}/{ref.key}, but it {state}")
        try:
            content: bytes = self._fs.cat_file(self._path(ref.stage, ref.key, manifest.attempt, name))
        except FileNotFoundError as error:
            raise self._damaged(ref, name, "is gone") from error
        if hashlib.sha256(content).hexdigest() != entry.sha256:
            raise self._damaged(ref, name, "differs from its checksum")
        return content

    def fetch(self, ref: ArtifactRef, folder: str, target: Path) -> None:
        """Copy the files below `folder` of an artefact into the local folder `target`, checked.

        The target appears whole or not at all.
        """
        partial = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.partial")
        names = [entry.path for entry in self.manifest(ref).files if entry.path.startswith(f"{folder}/")]
        if not names:
            raise StoreError(f"artefact {ref.stage}/{ref.key} must have files below {folder}/, it has none")
        for name in names:
            path = partial / PurePosixPath(name).relative_to(folder)
            path.parent.mkdir(parents=True, exist_ok=True)
            path.write_bytes(self.read(ref, name))
        try:
            partial.rename(target)
        except OSError:
            shutil.rmtree(partial)
            if not target.is_dir():
                raise

    def produce(self, job: Job, make: Callable[[Path], Outcome]) -> ArtifactRef:
        """Give the artefact of a job: the committed one, or the one that `make` writes into an empty folder.

        A pruned artefact is made again.
        """
        found = self.find(job.stage, job.key)
        if found is not None and not found.pruned:
            return found.ref
        self._work_dir.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f"{job.stage}-", dir=self._work_dir) as name:
            folder = Path(name) / "files"
            folder.mkdir()
            started = time.perf_counter()
            outcome = make(folder)
            outcome.measured["seconds"] = time.perf_counter() - started
            return self._commit(job, folder, outcome, revive=found is not None)

    def _commit(self, job: Job, folder: Path, outcome: Outcome, *, revive: bool) -> ArtifactRef:
        files = tuple(sorted(_entries(folder), key=lambda entry: entry.path))
        attempt = uuid.uuid4().hex
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
        target = self._path(job.stage, job.key, attempt)
        if self._local:
            Path(target).parent.mkdir(parents=True, exist_ok=True)
            shutil.move(folder, target)
        else:
            self._fs.put(str(folder), target, recursive=True)
        path, text = self._path(job.stage, job.key, "manifest.json"), manifest.model_dump_json(indent=1).encode()
        if revive:
            self._replace(path, text)
            return manifest.ref
        if self._create_only(path, text):
            return manifest.ref
        self._fs.rm(target, recursive=True)
        winner = self.find(job.stage, job.key)
        assert winner is not None, "a manifest that could not be created must be there"
        return winner.ref

    def keep(self, ref: ArtifactRef) -> None:
        """Protect an artefact from pruning, for good."""
        path = self._path(ref.stage, ref.key, "keep")
        if not self._fs.exists(path):
            self._fs.pipe_file(path, b"")

    def prune(self, ref: ArtifactRef) -> None:
        """Delete an artefact's files, unless it is kept; its manifest remains as a tombstone."""
        manifest = self.manifest(ref)
        if manifest.pruned or self._fs.exists(self._path(ref.stage, ref.key, "keep")):
            return
        tombstone = manifest.model_copy(update={"pruned": True}).model_dump_json(indent=1).encode()
        # The tombstone comes first: a manifest never promises files that are already going.
        self._replace(self._path(ref.stage, ref.key, "manifest.json"), tombstone)
        with suppress(FileNotFoundError):
            self._fs.rm(self._path(ref.stage, ref.key, manifest.attempt), recursive=True)

    def path_of(self, ref: ArtifactRef, name: str) -> str:
        """Give where a file of an artefact lies, for a person to open."""
        return self._path(ref.stage, ref.key, self.manifest(ref).attempt, name)

    def _replace(self, path: str, content: bytes) -> None:
        if self._local:
            partial = f"{path}.{uuid.uuid4().hex}.partial"
            Path(partial).write_bytes(content)
            os.replace(partial, path)
        else:
            self._fs.pipe_file(path, content)

    def _create_only(self, path: str, content: bytes) -> bool:
        if self._local:
            # A link makes the whole file visible at once or fails; opening with "x" would show half of it.
            partial = f"{path}.{uuid.uuid4().hex}.partial"
            Path(partial).write_bytes(content)
            try:
                os.link(partial, path)
            except FileExistsError:
                return False
            finally:
                os.unlink(partial)
            return True
        try:
            self._fs.pipe_file(path, content, mode="create")
        except FileExistsError:
            return False
        return True

    def _path(self, *parts: str) -> str:
        return "/".join((self._root, *parts))

    def _damaged(self, ref: ArtifactRef, name: str, what: str) -> StoreError:
        folder = self._path(ref.stage, ref.key)
        return StoreError(f"{name} of artefact {ref.stage}/{ref.key} {what}; delete {folder} and run the flow again")


def _entries(folder: Path) -> Iterator[FileEntry]:
    for path in folder.rglob("*"):
        if path.is_file():
            name = path.relative_to(folder).as_posix()
            yield FileEntry(path=name, size=path.stat().st_size, sha256=sha256_file(path))


def sha256_file(path: Path) -> str:
    """Hash a file in bounded memory; 64 hexadecimal digits."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
    return state.hexdigest()


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
