"""The store on a real S3 server, and what becomes of it when the server, the line or the keys fail."""

import logging
import os
import re
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import ClassVar, Literal

import fsspec
import pytest
from support.runs import small_config
from support.seaweed import BUCKET, KEYS, Line, SeaweedServer

from flows.run import open_run
from tasks.adapters import files
from tasks.adapters.files import StoreUnavailableError, configure_s3
from tasks.adapters.store import DamagedError, Outcome, Store, StoreError
from tasks.artifacts import ArtifactRef, Job

pytestmark = pytest.mark.s3

MIB = 1 << 20


class BytesJob(Job):
    stage: ClassVar[str] = "bytes"

    name: str


def write(content: bytes) -> Callable[[Path], Outcome]:
    def make(folder: Path) -> Outcome:
        (folder / "deep").mkdir()
        (folder / "deep" / "content.bin").write_bytes(content)
        (folder / "other.txt").write_text("other")
        return Outcome()

    return make


def refuse(folder: Path) -> Outcome:
    raise AssertionError("made twice")


@pytest.fixture
def line(seaweed: SeaweedServer, s3_url: str) -> Iterator[Line]:
    """File systems reach the server over this line."""
    made = Line(seaweed)
    configure_s3({**seaweed.options(), "endpoint_url": made.endpoint})
    yield made
    made.close()


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(files, "PATIENCE", 1.0)


AWAY = 5.0
"""Seconds: longer than botocore itself goes on trying, so that the store has to wait."""


class Kill:
    """Kills the server at the first request that an expression matches, and starts it again after AWAY seconds."""

    def __init__(self, server: SeaweedServer, expression: str) -> None:
        self.server, self.expression = server, re.compile(expression)
        self.lock = threading.Lock()
        self.restart: threading.Timer | None = None

    def __call__(self, request: str) -> Literal["pass"]:
        with self.lock:
            if self.restart is None and self.expression.search(request):
                self.server.kill()
                self.restart = threading.Timer(AWAY, self.server.start)
                self.restart.start()
        return "pass"

    def wait(self) -> None:
        assert self.restart is not None, "the server was never killed"
        self.restart.join()


class Once:
    """Gives the reply to the first request that an expression matches another fate."""

    def __init__(self, fate: Literal["lose", "spoil"], expression: str) -> None:
        self.fate, self.expression = fate, re.compile(expression)
        self.requests: list[str] = []

    def __call__(self, request: str) -> Literal["pass", "lose", "spoil"]:
        if self.requests or not self.expression.search(request):
            return "pass"
        self.requests.append(request)
        return self.fate


# --- who wins -------------------------------------------------------------------------------------------------------


def test_of_eight_racing_processes_one_wins_and_the_others_leave_nothing(s3_url: str, tmp_path: Path) -> None:
    barrier = threading.Barrier(8)
    refs: list[ArtifactRef] = []

    def attempt(number: int) -> None:
        def make(folder: Path) -> Outcome:
            (folder / "text.txt").write_text(str(number))
            barrier.wait()
            return Outcome()

        refs.append(Store(s3_url, tmp_path / str(number)).produce(BytesJob(name="race"), make))

    threads = [threading.Thread(target=attempt, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    store = Store(s3_url, tmp_path / "work")
    assert len(refs) == 8
    assert set(refs) == {store.manifest(refs[0]).ref}
    assert store.read(refs[0], "text.txt").decode() in "01234567"
    assert len([file for file in store.files() if file.path.endswith("/text.txt")]) == 1


def test_a_winner_whose_answer_was_lost_keeps_its_files(s3_url: str, line: Line, tmp_path: Path) -> None:
    line.fault = lost = Once("lose", r"PUT .*/manifest\.json$")
    store = Store(s3_url, tmp_path / "work")
    ref = store.produce(BytesJob(name="x"), write(b"mine"))
    assert line.requests.count(lost.requests[0]) > 1
    assert store.produce(BytesJob(name="x"), refuse) == ref
    assert Store(s3_url, tmp_path / "elsewhere").read(ref, "deep/content.bin") == b"mine"


# --- a server that goes and comes back ------------------------------------------------------------------------------


@pytest.mark.parametrize(
    "moment", [r"partNumber=2", r"POST .*uploadId", r"PUT .*/other\.txt", r"PUT .*/manifest\.json$"]
)
def test_a_server_killed_while_a_stage_commits_loses_nothing(
    seaweed: SeaweedServer, s3_url: str, line: Line, tmp_path: Path, caplog: pytest.LogCaptureFixture, moment: str
) -> None:
    content = os.urandom(40 * MIB)
    line.fault = kill = Kill(seaweed, moment)
    store = Store(s3_url, tmp_path / "work")
    with caplog.at_level(logging.WARNING):
        ref = store.produce(BytesJob(name="x"), write(content))
    kill.wait()
    assert "waiting up to" in caplog.text
    assert Store(s3_url, tmp_path / "elsewhere").read(ref, "deep/content.bin") == content
    assert len(store.files()) == 3


@pytest.mark.parametrize("moment", [r"GET .*/manifest\.json$", r"GET .*/content\.bin$"])
def test_a_server_killed_while_files_are_read_loses_nothing(
    seaweed: SeaweedServer, s3_url: str, line: Line, tmp_path: Path, moment: str
) -> None:
    content = os.urandom(80 * MIB)
    ref = Store(s3_url, tmp_path / "work").produce(BytesJob(name="x"), write(content))
    line.fault = kill = Kill(seaweed, moment)
    Store(s3_url, tmp_path / "elsewhere").fetch(ref, "deep", tmp_path / "target")
    kill.wait()
    assert (tmp_path / "target" / "content.bin").read_bytes() == content


@pytest.mark.usefixtures("impatient")
def test_a_server_that_stays_away_is_one_clear_error(
    seaweed: SeaweedServer,
    s3_url: str,
    tmp_path: Path,
) -> None:
    store = Store(s3_url, tmp_path / "work")
    ref = store.produce(BytesJob(name="x"), write(b"hello"))
    seaweed.kill()
    try:
        with pytest.raises(StoreUnavailableError, match=rf"{seaweed.endpoint} must answer for {s3_url}.*within 1 s"):
            store.find("bytes", "0" * 32)
        with pytest.raises(ConnectionError):
            store.produce(BytesJob(name="y"), write(b"hello"))
    finally:
        seaweed.start()
    assert store.read(ref, "other.txt") == b"other"
    assert [manifest.ref for manifest in store.manifests(store.files())] == [ref]


@pytest.mark.usefixtures("impatient")
def test_a_server_that_hangs_is_given_up(seaweed: SeaweedServer, s3_url: str, tmp_path: Path) -> None:
    configure_s3({**seaweed.options(), "config_kwargs": {"read_timeout": 0.5}})
    store = Store(s3_url, tmp_path / "work")
    assert store.find("bytes", "0" * 32) is None
    seaweed.pause()
    try:
        with pytest.raises(StoreUnavailableError, match="must answer"):
            store.find("bytes", "0" * 32)
    finally:
        seaweed.resume()
    assert store.find("bytes", "0" * 32) is None


@pytest.mark.usefixtures("impatient")
def test_a_full_server_is_one_clear_error_and_leaves_nothing_visible(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    server = SeaweedServer(tmp_path / "server", "-volume.max=1", "-master.volumeSizeLimitMB=1")
    server.start()
    try:
        monkeypatch.setitem(fsspec.config.conf, "s3", server.options())
        store = Store(f"s3://{BUCKET}/store", tmp_path / "work")
        stored = []

        def fill() -> None:
            for number in range(60):
                stored.append(store.produce(BytesJob(name=str(number)), write(os.urandom(MIB))))

        with pytest.raises(StoreError, match=r"must answer for .* has space"):
            fill()
        assert [manifest.ref for manifest in store.manifests(store.files())] == sorted(stored, key=lambda ref: ref.key)
    finally:
        server.stop()


# --- keys and buckets -----------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("options", "code"),
    [
        ({"key": "writer", "secret": "wrong-secret"}, "SignatureDoesNotMatch"),
        ({"key": "nobody", "secret": "wrong-secret"}, "InvalidAccessKeyId"),
    ],
)
def test_a_wrong_key_is_one_clear_error_at_once(
    seaweed: SeaweedServer,
    s3_url: str,
    tmp_path: Path,
    options: dict[str, str],
    code: str,
) -> None:
    configure_s3({**options, "endpoint_url": seaweed.endpoint})
    store = Store(s3_url, tmp_path / "work")
    for use in (lambda: store.identity, lambda: store.produce(BytesJob(name="x"), refuse), store.files):
        with pytest.raises(
            StoreError, match=f"{s3_url}.* was refused by {seaweed.endpoint} .*check the access key"
        ) as e:
            use()
        assert code in str(e.value)
        assert "wrong-secret" not in str(e.value)
        assert not isinstance(e.value, StoreUnavailableError)


def test_without_a_key_it_says_what_to_set(
    seaweed: SeaweedServer,
    s3_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("AWS_EC2_METADATA_DISABLED", "true")
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "AWS_PROFILE"):
        monkeypatch.delenv(name, raising=False)
    configure_s3({"endpoint_url": seaweed.endpoint})
    with pytest.raises(StoreError, match=rf"{s3_url}.* needs an access key for {seaweed.endpoint}.*AWS_ACCESS_KEY_ID"):
        Store(s3_url, tmp_path / "work").find("bytes", "0" * 32)


def test_keys_and_endpoint_come_from_the_environment(
    seaweed: SeaweedServer,
    s3_url: str,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    configure_s3({})
    monkeypatch.setenv("AWS_ACCESS_KEY_ID", "writer")
    monkeypatch.setenv("AWS_SECRET_ACCESS_KEY", KEYS["writer"])
    monkeypatch.setenv("AWS_ENDPOINT_URL", seaweed.endpoint)
    monkeypatch.setenv("AWS_REGION", "eu-central-1")
    store = Store(s3_url, tmp_path / "work")
    ref = store.produce(BytesJob(name="x"), write(b"hello"))
    assert store.read(ref, "deep/content.bin") == b"hello"
    assert store._root.fs.client_kwargs == {"region_name": "eu-central-1"}
    configure_s3(seaweed.options())
    assert Store(s3_url, tmp_path / "elsewhere").read(ref, "deep/content.bin") == b"hello"


def test_a_key_that_may_only_read_reads_and_is_told_so_when_it_writes(
    seaweed: SeaweedServer,
    s3_url: str,
    tmp_path: Path,
) -> None:
    ref = Store(s3_url, tmp_path / "work").produce(BytesJob(name="x"), write(b"hello"))
    configure_s3(seaweed.options("reader"))
    store = Store(s3_url, tmp_path / "reader")
    assert store.read(ref, "deep/content.bin") == b"hello"
    with pytest.raises(StoreError, match=r"was refused.*AccessDenied"):
        store.produce(BytesJob(name="y"), write(b"hello"))
    for change in (store.keep, store.prune):
        with pytest.raises(StoreError, match=r"was refused.*AccessDenied"):
            change(ref)
    assert store.read(ref, "other.txt") == b"other"
    assert list((tmp_path / "reader").glob("bytes-*")) == []


def test_a_missing_bucket_is_named(seaweed: SeaweedServer, s3_url: str, tmp_path: Path) -> None:
    configure_s3(seaweed.options("admin"))
    store = Store("s3://no-such-bucket/store", tmp_path / "work")
    for use in (lambda: store.identity, lambda: store.produce(BytesJob(name="x"), refuse), store.files):
        with pytest.raises(StoreError, match=f"bucket of s3://no-such-bucket/store.* must exist at {seaweed.endpoint}"):
            use()


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize(
    ("options", "url", "match"),
    [
        ({"endpoint_url": "http://127.0.0.1:1"}, None, "http://127.0.0.1:1 must answer for .* within 1 s"),
        ({"secret": "wrong-secret"}, None, "was refused by .*check the access key"),
        ({}, "s3://no-such-bucket/store", "bucket of s3://no-such-bucket/store.* must exist"),
    ],
)
def test_a_run_whose_store_cannot_be_used_is_told_so_before_it_starts(
    seaweed: SeaweedServer,
    s3_url: str,
    tmp_path: Path,
    options: dict[str, str],
    url: str | None,
    match: str,
) -> None:
    configure_s3({**seaweed.options("admin"), **options})
    config = small_config(tmp_path, store={"url": url or s3_url})
    with pytest.raises(StoreError, match=match), open_run(config):
        pytest.fail("the run started")


# --- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("damage", ["shorter", "empty", "gone", "other"])
def test_a_damaged_object_is_refused_by_name_and_nothing_half_remains(
    seaweed: SeaweedServer,
    s3_url: str,
    tmp_path: Path,
    damage: str,
) -> None:
    content = os.urandom(80 * MIB if damage == "shorter" else 100)
    ref = Store(s3_url, tmp_path / "work").produce(BytesJob(name="x"), write(content))
    store = Store(s3_url, tmp_path / "elsewhere")
    path = store.path_of(ref, "deep/content.bin")
    if damage == "gone":
        seaweed.client().rm_file(path)
    else:
        damaged = {"shorter": content[: 40 * MIB], "empty": b"", "other": content[:-1] + bytes([content[-1] ^ 1])}
        seaweed.client().pipe_file(path, damaged[damage])
    what = "is gone" if damage == "gone" else "differs from its checksum"
    with pytest.raises(DamagedError, match=rf"deep/content\.bin of artefact bytes/.* {what}; delete {s3_url}/bytes/"):
        store.read(ref, "deep/content.bin")
    with pytest.raises(DamagedError, match=rf"deep/content\.bin of artefact bytes/.* {what}"):
        store.fetch(ref, "deep", tmp_path / "target")
    assert [path.name for path in tmp_path.iterdir() if "target" in path.name] == []
    assert store.read(ref, "other.txt") == b"other"


@pytest.mark.parametrize("way", ["read", "fetch"])
def test_an_object_that_arrives_damaged_is_read_once_more(
    s3_url: str,
    line: Line,
    tmp_path: Path,
    way: str,
) -> None:
    content = os.urandom(1000)
    ref = Store(s3_url, tmp_path / "work").produce(BytesJob(name="x"), write(content))
    line.fault = spoilt = Once("spoil", r"GET .*/content\.bin$")
    store = Store(s3_url, tmp_path / "elsewhere")
    if way == "read":
        assert store.read(ref, "deep/content.bin") == content
    else:
        store.fetch(ref, "deep", tmp_path / "target")
        assert (tmp_path / "target" / "content.bin").read_bytes() == content
    assert line.requests.count(spoilt.requests[0]) == 2


def test_a_damaged_manifest_is_refused_by_name(seaweed: SeaweedServer, s3_url: str, tmp_path: Path) -> None:
    store = Store(s3_url, tmp_path / "work")
    ref = store.produce(BytesJob(name="x"), write(b"hello"))
    seaweed.client().pipe_file(f"{s3_url}/{ref.stage}/{ref.key}/manifest.json", b'{"stage": "by')
    with pytest.raises(StoreError, match=rf"{s3_url}/bytes/{ref.key}/manifest.json must be whole.*delete"):
        store.find(ref.stage, ref.key)


# --- what is asked of the server ------------------------------------------------------------------------------------


def test_what_was_read_or_made_here_is_not_asked_for_again(s3_url: str, line: Line, tmp_path: Path) -> None:
    store = Store(s3_url, tmp_path / "work")
    ref = store.produce(BytesJob(name="x"), write(b"hello"))
    line.requests.clear()
    assert store.read(ref, "deep/content.bin") == b"hello"
    assert store.read(ref, "other.txt") == b"other"
    # What was made here is here; of all else, one manifest for all files.
    assert [request.rsplit("/", 1)[1] for request in line.requests] == ["manifest.json"]
    other = Store(s3_url, tmp_path / "elsewhere")
    line.requests.clear()
    for _ in range(3):
        assert other.read(ref, "deep/content.bin") == b"hello"
    assert [request.rsplit("/", 1)[1] for request in line.requests] == ["manifest.json", "content.bin"]
    # Another process with the same work folder shares the files.
    line.requests.clear()
    Store(s3_url, tmp_path / "elsewhere").fetch(ref, "deep", tmp_path / "target")
    assert (tmp_path / "target" / "content.bin").read_bytes() == b"hello"
    assert [request.rsplit("/", 1)[1] for request in line.requests] == ["manifest.json"]


def test_a_damaged_cache_is_noticed(s3_url: str, tmp_path: Path) -> None:
    store = Store(s3_url, tmp_path / "work")
    ref = store.produce(BytesJob(name="x"), write(b"hello"))
    for damage in (b"hullo", b"", None):
        for path in (tmp_path / "work" / "cache").iterdir():
            path.unlink() if damage is None else path.write_bytes(damage)
        assert store.read(ref, "deep/content.bin") == b"hello"
    (tmp_path / "work" / "cache" / store.manifest(ref).files[0].sha256).write_bytes(b"hullo")
    store.fetch(ref, "deep", tmp_path / "target")
    assert (tmp_path / "target" / "content.bin").read_bytes() == b"hello"


def test_what_another_process_pruned_and_revived_is_found_again(s3_url: str, tmp_path: Path) -> None:
    job = BytesJob(name="x")
    store, other = Store(s3_url, tmp_path / "work", cache_bytes=0), Store(s3_url, tmp_path / "other")
    ref = store.produce(job, write(b"hello"))
    assert store.read(ref, "other.txt") == b"other"
    other.prune(ref)
    assert [file.path for file in store.files()] == [f"bytes/{job.key}/manifest.json"]
    with pytest.raises(StoreError, match="was pruned"):
        store.read(ref, "other.txt")
    assert other.produce(job, write(b"hello")) == ref
    assert store.read(ref, "other.txt") == b"other"
    other.prune(ref)
    other.produce(job, write(b"hello"))
    assert store.read(ref, "deep/content.bin") == b"hello"


# --- large files ----------------------------------------------------------------------------------------------------

LARGE = """
import resource, sys
from pathlib import Path
sys.path.insert(0, "tests")
from integration.test_s3_store import BytesJob, MIB
from tasks.adapters.files import configure_s3
from tasks.adapters.store import Outcome, Store

url, endpoint, secret, work = sys.argv[1:]
configure_s3({"key": "writer", "secret": secret, "endpoint_url": endpoint})

def make(folder):
    (folder / "model").mkdir()
    with (folder / "model" / "weights.bin").open("wb") as file:
        for number in range(400):
            file.write(number.to_bytes(4, "big") * (MIB // 4))
    return Outcome()

def peak():
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024

# The first request loads most of botocore.
store = Store(url, Path(work))
store.identity
before = peak()
ref = store.produce(BytesJob(name="large"), make)
written = peak()
Store(url, Path(work) / "fresh").fetch(ref, "model", Path(work) / "target")
print(before, written, peak())
"""


def test_a_file_of_400_mb_travels_in_bounded_memory(seaweed: SeaweedServer, s3_url: str, tmp_path: Path) -> None:
    command = [sys.executable, "-c", LARGE, s3_url, seaweed.endpoint, KEYS["writer"], str(tmp_path)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[2], check=False)
    assert done.returncode == 0, done.stderr
    before, written, peak = map(int, done.stdout.split())
    assert (tmp_path / "target" / "weights.bin").stat().st_size == 400 * MIB
    assert written - before < 300, "MB, sent"
    assert peak - before < 300, "MB, fetched"
