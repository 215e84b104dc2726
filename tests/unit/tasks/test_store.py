"""The store keeps what was committed, whole and unchanged, or does not have it."""

import errno
import hashlib
import os
import resource
import tempfile
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import ClassVar

import fsspec
import pytest

from tasks.adapters.store import Outcome, Store, StoreError
from tasks.artifacts import ArtifactRef, Job


class TextJob(Job):
    stage: ClassVar[str] = "text"

    text: str
    source: ArtifactRef | None = None


@pytest.fixture(params=["local", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def store(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[Store]:
    if request.param == "local":
        yield Store(str(tmp_path / "store"), tmp_path / "work")
        return
    if request.param == "s3":
        yield Store(request.getfixturevalue("s3_url"), tmp_path / "work")
        return
    memory = fsspec.filesystem("memory")
    memory.store.clear()
    yield Store("memory://vzero", tmp_path / "work")
    memory.store.clear()


def write(text: str):  # type: ignore[no-untyped-def]
    def make(folder: Path) -> Outcome:
        (folder / "deep").mkdir()
        (folder / "deep" / "text.txt").write_text(text)
        (folder / "other.txt").write_text("other")
        return Outcome(summary={"length": len(text)}, measured={"speed": 1.0})

    return make


def test_what_is_produced_is_found_and_read_again(store: Store) -> None:
    job = TextJob(text="hello")
    assert store.find(job.stage, job.key) is None
    ref = store.produce(job, write("hello"))
    assert (ref.stage, ref.key) == (job.stage, job.key)
    manifest = store.manifest(ref)
    assert manifest.ref == ref
    assert [entry.path for entry in manifest.files] == ["deep/text.txt", "other.txt"]
    assert manifest.summary == {"length": 5}
    assert set(manifest.measured) == {"speed", "seconds", "cpu_seconds"}
    assert TextJob.model_validate(manifest.job) == job
    assert store.read(ref, "deep/text.txt") == b"hello"


def test_cpu_seconds_count_the_work_of_all_threads_and_no_waiting(store: Store) -> None:
    work = 0.1

    def hash_for_a_while() -> None:
        started = time.thread_time()
        while time.thread_time() - started < work:
            hashlib.sha256(bytes(1_000_000))

    def make(folder: Path) -> Outcome:
        with ThreadPoolExecutor(2) as pool:
            for task in [pool.submit(hash_for_a_while) for _ in range(2)]:
                task.result()
        time.sleep(5 * work)
        return Outcome()

    before = time.process_time()
    measured = store.manifest(store.produce(TextJob(text="hello"), make)).measured
    assert 2 * work <= measured["cpu_seconds"] <= time.process_time() - before
    assert measured["seconds"] >= 6 * work


def test_a_committed_job_is_not_made_again(store: Store) -> None:
    job = TextJob(text="hello")
    first = store.produce(job, write("hello"))

    def refuse(folder: Path) -> Outcome:
        raise AssertionError("made twice")

    assert store.produce(job, refuse) == first


def test_the_digest_is_the_contents_alone(store: Store) -> None:
    refs = [store.produce(TextJob(text=name), write("same")) for name in ("a", "b")]
    assert refs[0].key != refs[1].key
    assert refs[0].digest == refs[1].digest
    assert store.produce(TextJob(text="c"), write("other")).digest != refs[0].digest


def test_a_failed_attempt_leaves_nothing_visible(store: Store, tmp_path: Path) -> None:
    job = TextJob(text="hello")

    def fail(folder: Path) -> Outcome:
        (folder / "half.txt").write_text("half")
        raise OSError("disk gone")

    with pytest.raises(OSError, match="disk gone"):
        store.produce(job, fail)
    assert store.find(job.stage, job.key) is None
    assert list((tmp_path / "work").iterdir()) == []
    assert store.files() == []
    assert store.produce(job, write("hello")).key == job.key


def test_of_racing_attempts_one_wins_and_all_adopt_it(store: Store) -> None:
    job = TextJob(text="race")
    barrier = threading.Barrier(6)
    refs: list[ArtifactRef] = []

    def attempt(number: int) -> None:
        def make(folder: Path) -> Outcome:
            (folder / "text.txt").write_text(str(number))
            barrier.wait()
            return Outcome()

        refs.append(store.produce(job, make))

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refs) == 6
    assert len(set(refs)) == 1
    assert store.manifest(refs[0]).digest == refs[0].digest
    assert store.read(refs[0], "text.txt").decode() in "012345"


def test_losers_leave_no_files(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"), tmp_path / "work")
    job = TextJob(text="x")

    def make(folder: Path) -> Outcome:
        # Another attempt commits while this one is under way.
        Store(str(tmp_path / "store"), tmp_path / "other").produce(job, write("winner"))
        (folder / "text.txt").write_text("loser")
        return Outcome()

    ref = store.produce(job, make)
    assert store.read(ref, "deep/text.txt") == b"winner"
    assert len(list((tmp_path / "store" / "text" / job.key).iterdir())) == 2  # the winner's folder and the manifest


@pytest.mark.parametrize("damage", [b"hullo", b"hell", b""])
def test_a_damaged_file_is_refused_by_name(tmp_path: Path, damage: bytes) -> None:
    store = Store(str(tmp_path / "store"), tmp_path / "work")
    ref = store.produce(TextJob(text="hello"), write("hello"))
    Path(store.path_of(ref, "deep/text.txt")).write_bytes(damage)
    with pytest.raises(StoreError, match=r"deep/text.txt of artefact text/.* differs from its checksum; delete"):
        store.read(ref, "deep/text.txt")


def test_a_missing_file_is_refused_by_name(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"), tmp_path / "work")
    ref = store.produce(TextJob(text="hello"), write("hello"))
    Path(store.path_of(ref, "other.txt")).unlink()
    with pytest.raises(StoreError, match=r"^other\.txt of artefact .* is gone"):
        store.read(ref, "other.txt")
    with pytest.raises(StoreError, match="no such file"):
        store.read(ref, "never.txt")


def test_a_reference_to_nothing_or_to_other_content_is_refused(store: Store) -> None:
    ref = store.produce(TextJob(text="hello"), write("hello"))
    with pytest.raises(StoreError, match="must exist"):
        store.manifest(ref.model_copy(update={"key": "0" * 32}))
    with pytest.raises(StoreError, match="must have digest"):
        store.manifest(ref.model_copy(update={"digest": "0" * 32}))


def test_pruning_leaves_the_name_and_a_new_attempt_revives_it(store: Store) -> None:
    job = TextJob(text="hello")
    ref = store.produce(job, write("hello"))
    store.prune(ref)
    store.prune(ref)
    assert store.manifest(ref).pruned
    with pytest.raises(StoreError, match="was pruned"):
        store.read(ref, "other.txt")
    assert store.produce(job, write("hello")) == ref
    assert not store.manifest(ref).pruned
    assert store.read(ref, "deep/text.txt") == b"hello"


def test_what_is_kept_is_not_pruned(store: Store) -> None:
    ref = store.produce(TextJob(text="hello"), write("hello"))
    store.keep(ref)
    store.keep(ref)
    store.prune(ref)
    assert store.read(ref, "other.txt") == b"other"


def test_fetch_copies_a_folder_whole(store: Store, tmp_path: Path) -> None:
    ref = store.produce(TextJob(text="hello"), write("hello"))
    store.fetch(ref, "deep", tmp_path / "target")
    assert (tmp_path / "target" / "text.txt").read_text() == "hello"
    assert not (tmp_path / "target" / "other.txt").exists()
    store.fetch(ref, "deep", tmp_path / "target")
    with pytest.raises(StoreError, match="nowhere"):
        store.fetch(ref, "nowhere", tmp_path / "nothing")
    assert not (tmp_path / "nothing").exists()


def test_a_store_made_anew_has_another_identity(tmp_path: Path) -> None:
    first = Store(str(tmp_path / "store"), tmp_path / "work").identity
    assert Store(str(tmp_path / "store"), tmp_path / "work").identity == first
    (tmp_path / "store" / "store.json").unlink()
    assert Store(str(tmp_path / "store"), tmp_path / "work").identity != first


@pytest.mark.parametrize(
    ("url", "problem"),
    [("file", "File exists"), ("file/store", "Not a directory"), ("/proc/nostore", "No such file or directory")],
)
def test_a_store_that_cannot_be_made_is_one_clear_error(tmp_path: Path, url: str, problem: str) -> None:
    (tmp_path / "file").write_text("")
    store = Store(str(tmp_path / url), tmp_path / "work")
    with pytest.raises(
        StoreError, match=rf"^store\.url must be a folder that can be written, got {tmp_path / url}: {problem};"
    ):
        _ = store.identity


@pytest.mark.parametrize("used_before", [False, True])
def test_a_store_that_may_not_be_written_is_one_clear_error(tmp_path: Path, used_before: bool) -> None:
    # Not below tmp_path, which nobody else may enter.
    with tempfile.TemporaryDirectory() as folder:
        if used_before:
            _ = Store(folder, tmp_path / "work").identity
        store = Store(folder, tmp_path / "work")
        os.chmod(folder, 0o555)
        user = os.geteuid()
        if user == 0:
            # The superuser may write everywhere.
            os.seteuid(65534)
        try:
            with pytest.raises(StoreError, match=f"can be written, got {folder}: Permission denied"):
                _ = store.identity
        finally:
            os.seteuid(user)
        os.chmod(folder, 0o755)


def test_what_can_pass_on_a_local_disk_stays_as_it_is(tmp_path: Path) -> None:
    store = Store(str(tmp_path / "store"), tmp_path / "work")
    soft, hard = resource.getrlimit(resource.RLIMIT_NOFILE)
    resource.setrlimit(resource.RLIMIT_NOFILE, (0, hard))
    try:
        with pytest.raises(OSError, match="Too many open files") as caught:
            _ = store.identity
    finally:
        resource.setrlimit(resource.RLIMIT_NOFILE, (soft, hard))
    assert caught.value.errno == errno.EMFILE
    assert not isinstance(caught.value, StoreError)


def test_a_local_store_that_was_only_asked_has_its_name_alone(tmp_path: Path) -> None:
    _ = Store(str(tmp_path / "store"), tmp_path / "work").identity
    assert [path.name for path in (tmp_path / "store").iterdir()] == ["store.json"]
