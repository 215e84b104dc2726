"""Published students and which of them is the champion, on any fsspec file system (docs/PUBLISHING.md).

A version lies under `versions/NAME/`: a plain Hugging Face folder `model/`, its card `README.md`, and `version.json`,
written last; what has no version.json does not exist. The champion is named by the last of the numbered entries
`champion/000001.json`, ... All of them are created, never overwritten: the create that succeeds decides.
"""

import logging
import os
import re
import shutil
import uuid
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime
from pathlib import Path, PurePosixPath
from typing import Literal, TypeVar

from pydantic import ValidationError, field_validator

from tasks.adapters.files import PASSING_ERRNOS, StoreError, error_code, patiently, sha256_file
from tasks.adapters.transfers import BrokenFileError, Folder, open_folder
from tasks.artifacts import ArtifactRef, FileEntry, Record

R = TypeVar("R", bound=Record)
log = logging.getLogger("vzero.registry")

MODEL, CARD = "model", "README.md"
Kind = Literal["founded", "promoted", "kept", "seen", "rolled back", "by hand"]

_VERSION = "version.json"
_NAME = re.compile(r"(?!\.+$)[\w.-]+")
_ENTRY = re.compile(r"[0-9]{6,}\.json")
_NUM_THREADS = 8
"""Small requests at once."""


class RegistryError(StoreError):
    """A version or an entry of the history is missing, damaged, or in the way."""


class Version(Record):
    """A published student, and what it was made of."""

    name: str
    run: str
    created_at: datetime
    parent: str | None
    """Version that it was trained on from."""
    policy: ArtifactRef
    """Its weights, a round of training."""
    selected: ArtifactRef
    """Its checkpoint."""
    report: ArtifactRef
    training_set: ArtifactRef
    """What it learned."""
    data: str
    """Version of the data that it was trained at."""
    store: str
    """URL of the store that these artefacts lie in."""
    commit: str | None
    """lakeFS commit of the run's outputs."""
    files: tuple[FileEntry, ...]

    @field_validator("files")
    @classmethod
    def _stay_inside(cls, files: tuple[FileEntry, ...]) -> tuple[FileEntry, ...]:
        # Who fetches writes to these paths, whoever wrote the version.
        for entry in files:
            parts = entry.path.split("/")
            if entry.path != CARD and (parts[0] != MODEL or len(parts) < 2 or {"", ".", ".."} & {*parts}):
                raise ValueError(f"files of a version must be {CARD} or lie in {MODEL}/, got {entry.path!r}")
        if CARD not in [entry.path for entry in files] or len(files) < 2:
            raise ValueError(f"files of a version must be {CARD} and those in {MODEL}/, got {len(files)}")
        return files


class Move(Record):
    """An entry of the history."""

    number: int
    at: datetime
    kind: Kind
    champion: str | None
    """Version that is the champion from here on."""
    version: str | None
    """Version that the entry is about."""
    data: str | None
    """Version of the data that was considered last."""
    reason: str
    attempt: str
    """Random name of the call that made the entry."""


class Registry:
    """Versions and the history of champions below a folder or URL."""

    def __init__(self, url: str) -> None:
        """Open the registry; nothing is asked of it yet.

        Args:
            url: folder or fsspec URL; a local folder is made at the first use, a bucket must exist.
        """
        self.url = url.rstrip("/")
        self._root = open_folder(url)
        self._moves = self._root.below("champion")

    # --- the history ------------------------------------------------------------------------------------------------

    def history(self) -> list[Move]:
        """Give all entries, the oldest first.

        Raises:
            RegistryError: an entry is missing or damaged.
        """
        numbers = self._numbers()
        if missing := sorted({*range(1, max(numbers, default=0) + 1)} - {*numbers}):
            raise RegistryError(
                f"{self._moves.url}/{_file(missing[0])} must be there, as later entries are; restore it, or name the "
                "champion by hand: `python -m flows.champion promote NAME`"
            )
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            return list(pool.map(self._move, numbers))

    def last(self) -> Move | None:
        """Give the last entry, None where there is none yet.

        Raises:
            RegistryError: it is damaged.
        """
        numbers = self._numbers()
        return self._move(numbers[-1]) if numbers else None

    def champion(self) -> Version | None:
        """Give the champion, None where there is none yet.

        Raises:
            RegistryError: it is missing, or it or the last entry is damaged.
        """
        last = self.last()
        return self.version(last.champion) if last is not None and last.champion is not None else None

    def move(
        self,
        after: Move | None,
        *,
        kind: Kind,
        champion: str | None,
        version: str | None,
        data: str | None,
        reason: str,
    ) -> Move:
        """Add an entry to the history, and so name the champion: one request, which succeeds for one caller alone.

        Args:
            after: the last entry when the caller decided; None where there was none.
            kind: what happened.
            champion: version that is the champion from here on.
            version: version that the entry is about.
            data: version of the data that was considered last.
            reason: for people.

        Raises:
            RegistryError: somebody else added an entry since, or there is no such champion.
        """
        if champion is not None:
            self.version(champion)
        move = Move(
            number=1 if after is None else after.number + 1,
            at=datetime.now(UTC),
            kind=kind,
            champion=champion,
            version=version,
            data=data,
            reason=reason,
            attempt=uuid.uuid4().hex,
        )
        _make(self._moves)
        # Our own entry refuses us where it was created and the server's answer was lost.
        if (
            not self._moves.create(_file(move.number), move.model_dump_json(indent=1).encode())
            and (winner := self._move(move.number)).attempt != move.attempt
        ):
            raise RegistryError(
                f"entry {move.number} of {self._moves.url} must be new, but somebody else moved since "
                f"({winner.kind}: {winner.reason}); look at the champion again, then decide again"
            )
        return move

    def rollback(self) -> Move:
        """Make the champion before the present one champion again; once more: the one before that, never forth.

        Raises:
            RegistryError: there was none before, it is gone, or somebody else moved at the same time.
        """
        history = self.history()
        reigns: list[str] = []
        for move in history:
            if move.kind == "rolled back":
                del reigns[-1:]
            elif move.champion is not None and move.champion not in reigns[-1:]:
                reigns.append(move.champion)
        if len(reigns) < 2:
            raise RegistryError(f"{self.url} must have had a champion before the present one to go back to, got none")
        present, before = reigns[-1], reigns[-2]
        last = history[-1]
        return self.move(
            last, kind="rolled back", champion=before, version=present, data=last.data, reason=f"back from {present}"
        )

    def _numbers(self) -> list[int]:
        """Give the numbers of the entries, in order; files of other names are somebody else's."""
        names = self._list(self._moves, "file")
        numbers = [int(name.removesuffix(".json")) for name in names if _ENTRY.fullmatch(name)]
        return sorted(number for number in numbers if _file(number) in names)

    def _move(self, number: int) -> Move:
        move = _parse(self._moves, _file(number), self._moves.read(_file(number)), Move)
        if move.number != number:
            raise RegistryError(
                f"{self._moves.url}/{_file(number)} must be entry {number}, got {move.number}; restore it"
            )
        return move

    # --- versions ---------------------------------------------------------------------------------------------------

    def version(self, name: str) -> Version:
        """Give a version by its name.

        Raises:
            RegistryError: there is none of that name, or it is damaged.
        """
        found = self.find(name)
        if found is None:
            raise RegistryError(
                f"version {name!r} must be in {self.url}, but it is not; `python -m flows.champion show` lists them"
            )
        return found

    def find(self, name: str) -> Version | None:
        """Give a version by its name, or None.

        Raises:
            RegistryError: it is damaged.
        """
        place = self._place(name)
        content = place.read(_VERSION)
        if content is None:
            return None
        version = _parse(place, _VERSION, content, Version)
        if version.name != name:
            raise RegistryError(f"{place.url}/{_VERSION} must be of version {name}, got {version.name}; restore it")
        return version

    def versions(self) -> list[Version]:
        """Give all versions, the oldest first; a damaged one is left out, with a warning."""

        def find(name: str) -> Version | None:
            try:
                return self.find(name)
            except RegistryError as error:
                log.warning("%s", error)
                return None

        names = self._list(self._root.below("versions"), "directory")
        with ThreadPoolExecutor(_NUM_THREADS) as pool:
            found = list(filter(None, pool.map(find, filter(_NAME.fullmatch, names))))
        return sorted(found, key=lambda version: (version.created_at, version.name))

    def add(self, version: Version, folder: Path) -> None:
        """Publish a version; one that is there with the same files stays as it is.

        No file is overwritten: of several who add the same name with different files at most one succeeds, whole. Who
        was interrupted leaves files that a second call with the same files completes.

        Args:
            version: whose `files` are those of the folder.
            folder: local folder with `model/` and `README.md`.

        Raises:
            RegistryError: other files are there under that name.
        """
        place = self._place(version.name)
        _make(place)
        if self._same(version):
            return
        unsure = [entry for entry in version.files if not _create_file(place, entry.path, folder / entry.path)]
        try:
            place.download({entry: Path(os.devnull) for entry in unsure})
        except BrokenFileError as error:
            raise RegistryError(
                f"{place.url} must have no other files than this version's, but {error}; "
                f"delete {place.url}, if no version.json is in it, and publish again"
            ) from error
        text = version.model_dump_json(indent=1).encode()
        if not place.create(_VERSION, text):
            assert self._same(version), "a version.json that could not be created must be there"

    def fetch(self, name: str, target: Path) -> None:
        """Copy a version's model into the local folder `target`, checked; it appears whole or not at all.

        Args:
            name: of the version.
            target: folder to be made, or an empty one; one that holds the model already stays.

        Raises:
            RegistryError: there is no such version, a file of it is damaged, or the target holds something else.
        """
        version = self.version(name)
        place = self._place(name)
        entries = {entry: PurePosixPath(entry.path).relative_to(MODEL) for entry in version.files if entry.path != CARD}
        if target.is_file() or (target.is_dir() and any(target.iterdir())):
            _require_same(target, entries)
            return
        unfinished = target.with_name(f"{target.name}.{uuid.uuid4().hex[:8]}.partial")
        try:
            for path in entries.values():
                (unfinished / path).parent.mkdir(parents=True, exist_ok=True)
            place.download({entry: unfinished / path for entry, path in entries.items()})
            try:
                unfinished.rename(target)
            except OSError:
                # Somebody else was quicker.
                _require_same(target, entries)
        except BrokenFileError as error:
            raise _damaged(place, error) from error
        finally:
            shutil.rmtree(unfinished, ignore_errors=True)

    def card(self, name: str) -> bytes:
        """Give a version's card, README.md.

        Raises:
            RegistryError: there is no such version, or the card is damaged.
        """
        [entry] = [entry for entry in self.version(name).files if entry.path == CARD]
        place = self._place(name)
        try:
            return place.load(entry)
        except BrokenFileError as error:
            raise _damaged(place, error) from error

    def model_url(self, name: str) -> str:
        """Give where a version's model lies, for a person to open."""
        return self._place(name).below(MODEL).url

    def _same(self, version: Version) -> bool:
        """Tell whether the version is there; False where there is none of that name."""
        found = self.find(version.name)
        if found is not None and {*found.files} != {*version.files}:
            raise RegistryError(
                f"version {version.name} must be new in {self.url}, but is there with other files; "
                "publish under another name"
            )
        return found is not None

    def _place(self, name: str) -> Folder:
        if not _NAME.fullmatch(name):
            raise RegistryError(f"a version's name must be of letters, digits, '.', '_' and '-', got {name!r}")
        return self._root.below("versions", name)

    def _list(self, folder: Folder, what: Literal["file", "directory"]) -> list[str]:
        try:
            found = patiently(lambda: folder.fs.ls(folder.path, detail=True), folder.url)
        except FileNotFoundError:
            return []
        return [PurePosixPath(info["name"]).name for info in found if info["type"] == what]


def list_files(folder: Path) -> tuple[FileEntry, ...]:
    """Give what lies in a local folder, as `Version.files` has it."""
    paths = sorted(path for path in folder.rglob("*") if path.is_file())
    return tuple(
        FileEntry(path=path.relative_to(folder).as_posix(), size=path.stat().st_size, sha256=sha256_file(path))
        for path in paths
    )


def _parse(folder: Folder, name: str, content: bytes | None, record: type[R]) -> R:
    try:
        return record.model_validate_json(content or b"")
    except ValidationError as error:
        raise RegistryError(f"{folder.url}/{name} must be whole, but is not; restore it") from error


def _damaged(place: Folder, error: BrokenFileError) -> RegistryError:
    return RegistryError(f"{place.url} must be as published, but {error}; restore it")


def _file(number: int) -> str:
    return f"{number:06d}.json"


def _make(folder: Folder) -> None:
    """Make a folder on this machine; elsewhere there are none."""
    if not folder.local:
        return
    try:
        Path(folder.path).mkdir(parents=True, exist_ok=True)
    except OSError as error:
        if error.errno in PASSING_ERRNOS:
            raise
        raise RegistryError(
            f"publish.url must be a folder that can be written, but {folder.path} cannot be made: {error.strerror}; "
            "correct it, or its rights"
        ) from error


def _create_file(place: Folder, name: str, source: Path) -> bool:
    """Write a file unless there is one already, and tell whether it was surely written by this call."""
    path = f"{place.path}/{name}"
    if place.local:
        _make(Folder(place.fs, str(Path(path).parent), place.url))
        unfinished = f"{path}.{uuid.uuid4().hex}.partial"
        try:
            shutil.copyfile(source, unfinished)
            os.link(unfinished, path)
        except FileExistsError:
            return False
        finally:
            Path(unfinished).unlink(missing_ok=True)
        return True
    try:
        patiently(lambda: place.fs.put_file(str(source), path, mode="create"), f"{place.url}/{name}")
    except FileExistsError:
        return False
    except OSError as error:
        # An upload in parts whose last answer was lost is not known any more.
        if error_code(error) not in ("PreconditionFailed", "NoSuchUpload"):
            raise
        return False
    return True


def _require_same(target: Path, entries: dict[FileEntry, PurePosixPath]) -> None:
    expected = {(str(path), entry.sha256) for entry, path in entries.items()}
    if {(entry.path, entry.sha256) for entry in list_files(target)} != expected:
        raise RegistryError(f"{target} must be a new or empty folder, but something else is there; name another one")
