"""What of a store is no longer needed: old training states, and what attempts left that were never committed."""

from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from datetime import UTC, datetime, timedelta
from pathlib import Path

from prefect.settings import get_current_settings

from tasks.adapters.store import KEEP, Store, StoredFile, artefact_names
from tasks.adapters.training_data import CheckpointJob, TrainJob
from tasks.artifacts import Manifest

NUM_KEPT_STATES = 2
"""Training states kept at the end of each chain of rounds."""


@dataclass(frozen=True)
class Garbage:
    """Something to collect.

    Attributes:
        what: what it is, for a person.
        path: from the store's root; a file, or a folder with all below it.
        size: bytes.
        state: the manifest of a training state, whose name remains.
    """

    what: str
    path: str
    size: int
    state: Manifest | None = None


def find_garbage(files: list[StoredFile], manifests: list[Manifest], older_than: timedelta) -> list[Garbage]:
    """Find what can go, ordered by path.

    Args:
        files: all files of the store, listed before the manifests were read.
        manifests: all manifests of the store that can be read; where one cannot, all attempts are kept.
        older_than: what no manifest names is left alone while it is younger: it may be an attempt under way.
    """
    found = [*_old_states(files, manifests), *_left_over(files, manifests, datetime.now(UTC) - older_than)]
    return sorted(found, key=lambda garbage: garbage.path)


def collect(store: Store, garbage: Iterable[Garbage]) -> Iterator[Garbage]:
    """Delete, giving each thing when it is gone."""
    records = Path(get_current_settings().results.local_storage_path)
    for thing in garbage:
        if thing.state is None:
            store.delete(thing.path)
        else:
            # Prefect has no call to forget a result. While its record remains, Prefect would answer with a state
            # that has no files, so it goes first.
            name = f"vzero-{thing.state.stage}-{thing.state.key}-{store.identity}"
            (records / name).unlink(missing_ok=True)
            store.prune(thing.state.ref)
        yield thing


def _old_states(files: list[StoredFile], manifests: list[Manifest]) -> Iterator[Garbage]:
    """Find the states that are neither kept nor among the last ones of a chain of rounds."""
    rounds = {manifest.key: manifest for manifest in manifests if manifest.stage == TrainJob.stage}
    states = {
        manifest.job["train_key"]: manifest
        for manifest in manifests
        if manifest.stage == CheckpointJob.stage and not manifest.pruned
    }
    needed = {f"{CheckpointJob.stage}/{states[key].key}" for key in _last_states(rounds, states)}
    needed |= {file.path.removesuffix(f"/{KEEP}") for file in files if file.path.endswith(f"/{KEEP}")}
    for state in states.values():
        path = f"{state.stage}/{state.key}"
        if path not in needed:
            yield Garbage("training state", path, sum(entry.size for entry in state.files), state)


def _last_states(rounds: dict[str, Manifest], states: dict[str, Manifest]) -> Iterator[str]:
    """Give the keys of the rounds whose states are the last of some chain."""
    # A state is committed before its round is: one without a round belongs to a run under way, or to one to go on with.
    yield from states.keys() - rounds.keys()
    continued = {manifest.inputs["policy"].key for manifest in rounds.values()}
    for key in rounds.keys() - continued:
        num_left = NUM_KEPT_STATES
        while key in rounds and num_left:
            if key in states:
                num_left -= 1
                yield key
            key = rounds[key].inputs["policy"].key


def _left_over(files: list[StoredFile], manifests: list[Manifest], before: datetime) -> Iterator[Garbage]:
    """Find old attempts that no manifest names, and files that were never finished."""
    # A manifest that could not be read may name any attempt of its artefact.
    unread = set(artefact_names(files)) - {(manifest.stage, manifest.key) for manifest in manifests}
    named = {f"{manifest.stage}/{manifest.key}/{manifest.attempt}" for manifest in manifests if not manifest.pruned}
    attempts: dict[str, list[StoredFile]] = {}
    for file in files:
        folder = "/".join(file.path.split("/")[:3])
        if file.path.count("/") >= 3:
            attempts.setdefault(folder, []).append(file)
        elif file.path.endswith(".partial") and file.changed < before:
            yield Garbage("unfinished file", file.path, file.size)
    for folder, members in attempts.items():
        stage, key, _ = folder.split("/")
        if folder not in named and (stage, key) not in unread and max(file.changed for file in members) < before:
            yield Garbage("attempt that was not committed", folder, sum(file.size for file in members))
