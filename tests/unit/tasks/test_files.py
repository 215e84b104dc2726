"""Files are read the same way wherever they lie; a server's errors are waited for or told, as they deserve."""

import io
import logging
import os
import random
from pathlib import Path

import fsspec
import pytest
from botocore.exceptions import ClientError, EndpointConnectionError, NoCredentialsError, SSLError
from s3fs.errors import translate_boto_error
from support.seaweed import KEYS, SeaweedServer

from tasks.adapters import files
from tasks.adapters.files import (
    StoreError,
    StoreUnavailableError,
    configure_s3,
    filesystem,
    open_file,
    patiently,
    read_bytes,
    read_ranges,
    stat,
)
from vzero_core.errors import ConfigError, VZeroError


@pytest.fixture(params=["local", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def folder(request: pytest.FixtureRequest, tmp_path: Path) -> str:
    """A folder that can be written and read."""
    if request.param == "local":
        return str(tmp_path)
    if request.param == "s3":
        return str(request.getfixturevalue("s3_url"))
    return f"memory://{tmp_path.name}"


def put(url: str, content: bytes) -> None:
    fs, path = filesystem(url)
    fs.pipe_file(path, content)


def test_a_file_is_read_whole_and_in_parts(folder: str) -> None:
    put(f"{folder}/a.bin", b"0123456789")
    fs, path = filesystem(f"{folder}/a.bin")
    assert read_bytes(f"{folder}/a.bin") == b"0123456789"
    ranges = [(path, 2, 5), (path, 8, 99), (path, 20, 30), (path, 7, None)]
    assert read_ranges(fs, ranges, folder) == [b"234", b"89", b"", b"789"]


def test_what_is_missing_is_missing(folder: str) -> None:
    for read in (read_bytes, stat, open_file):
        with pytest.raises(FileNotFoundError):
            read(f"{folder}/nothing")
    fs, path = filesystem(folder)
    put(f"{folder}/a.bin", b"0123456789")
    with pytest.raises(FileNotFoundError, match="nothing"):
        read_ranges(fs, [(f"{path}/a.bin", 0, 5), (f"{path}/nothing", 0, 5)], folder)


def test_an_opened_file_is_the_same_in_any_order_of_reading(folder: str) -> None:
    # Larger than the largest block read ahead, so that all sizes of blocks occur.
    content = random.Random(0).randbytes(20 << 20)
    put(f"{folder}/large.bin", content)
    plain = io.BytesIO(content)
    chooser = random.Random(1)
    with open_file(f"{folder}/large.bin") as file:
        assert file.seekable()
        for _ in range(60):
            if chooser.random() < 0.5:
                place, whence = chooser.choice([(chooser.randrange(len(content)), 0), (-100, 2), (7, 1), (0, 0)])
                assert file.seek(place, whence) == plain.seek(place, whence)
            length = chooser.choice([0, 1, 100, 5000, 1 << 20])
            assert file.read(length) == plain.read(length)
        file.seek(0)
        assert file.read() == content
        assert file.read(1) == b""


def test_a_stat_changes_when_the_content_does(folder: str) -> None:
    put(f"{folder}/a.bin", b"0123456789")
    first = stat(f"{folder}/a.bin")
    assert first.size == 10
    assert stat(f"{folder}/a.bin") == first
    if not folder.startswith(("memory:", "s3:")):
        os.utime(f"{folder}/a.bin", ns=(1, 1))
    put(f"{folder}/a.bin", b"9876543210")
    assert stat(f"{folder}/a.bin").etag != first.etag


@pytest.mark.s3
def test_the_etag_is_the_servers_and_what_others_wrote_is_seen(seaweed: SeaweedServer, s3_url: str) -> None:
    with pytest.raises(FileNotFoundError):
        stat(f"{s3_url}/a.txt")
    seaweed.client().pipe_file(f"{s3_url}/a.txt", b"hello")
    # An ETag of a file sent in one piece is its MD5: `printf hello | md5sum`.
    assert stat(f"{s3_url}/a.txt") == files.FileStat(5, "5d41402abc4b2a76b9719d911017c592")
    with pytest.raises(FileNotFoundError):
        stat(s3_url)


@pytest.mark.s3
def test_lakefs_is_its_s3_gateway(seaweed: SeaweedServer, monkeypatch: pytest.MonkeyPatch) -> None:
    # Repository, reference and path are bucket and key, on whatever speaks S3; no lakeFS server is in this test.
    configure = monkeypatch.setitem
    configure(fsspec.config.conf, "s3", {"key": "nobody", "secret": "wrong", "endpoint_url": "http://127.0.0.1:1"})
    seaweed.client().pipe_file("vzero/main/folder/a.txt", b"hello")
    with pytest.raises(ConfigError, match="set LAKECTL_SERVER_ENDPOINT_URL, LAKECTL_CREDENTIALS_ACCESS_KEY_ID, "):
        read_bytes("lakefs://vzero/main/folder/a.txt")
    monkeypatch.setenv("LAKECTL_SERVER_ENDPOINT_URL", f"{seaweed.endpoint}/api/v1")
    monkeypatch.setenv("LAKECTL_CREDENTIALS_ACCESS_KEY_ID", "reader")
    monkeypatch.setenv("LAKECTL_CREDENTIALS_SECRET_ACCESS_KEY", KEYS["reader"])
    assert read_bytes("lakefs://vzero/main/folder/a.txt") == b"hello"
    assert filesystem("lakefs://vzero/main/folder/a.txt")[1] == "vzero/main/folder/a.txt"


def s3_error(code: str, status: int) -> Exception:
    reply = {"Error": {"Code": code, "Message": "message"}, "ResponseMetadata": {"HTTPStatusCode": status}}
    error: Exception = translate_boto_error(ClientError(reply, "GetObject"))
    return error


PASSING = [
    ConnectionResetError("reset"),
    TimeoutError("late"),
    EndpointConnectionError(endpoint_url="http://127.0.0.1:1"),
    s3_error("InternalError", 500),
    s3_error("ServiceUnavailable", 503),
    s3_error("SlowDown", 503),
    s3_error("504", 504),
    s3_error("ConditionalRequestConflict", 409),
]


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_errors_that_can_pass_are_waited_for(
    error: Exception, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    configure_s3_for(monkeypatch)
    left = [error, error]

    def call() -> str:
        if left:
            raise left.pop()
        return "done"

    with caplog.at_level(logging.WARNING):
        assert patiently(call, "s3://bucket/key") == "done"
    # Told once, however often it is tried.
    assert [record.getMessage()[:38] for record in caplog.records] == [
        "http://127.0.0.1:1 does not answer (" + str(error)[:2]
    ]


@pytest.mark.parametrize("error", PASSING, ids=repr)
def test_errors_that_should_pass_but_do_not_are_told_in_the_end(
    error: Exception, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure_s3_for(monkeypatch)
    monkeypatch.setattr(files, "PATIENCE", 0.3)
    with pytest.raises(StoreUnavailableError, match=r"http://127.0.0.1:1 must answer for s3://bucket/key.* within 0 s"):
        patiently(lambda: fail(error), "s3://bucket/key")


def test_a_web_server_is_named_by_its_address_not_by_the_one_of_s3(monkeypatch: pytest.MonkeyPatch) -> None:
    configure_s3_for(monkeypatch)
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    with pytest.raises(
        StoreUnavailableError, match=r"^https://example\.org:8443 must answer for https://example\.org:8"
    ):
        patiently(lambda: fail(ConnectionResetError("reset")), "https://example.org:8443/data/train.jsonl")


@pytest.mark.parametrize(
    ("error", "match"),
    [
        (s3_error("AccessDenied", 403), r"s3://bucket/key was refused by http://127.0.0.1:1 \(AccessDenied: message\)"),
        (s3_error("SignatureDoesNotMatch", 403), r"refused .*SignatureDoesNotMatch.*; check the access key"),
        (s3_error("403", 403), r"refused .*; check the access key"),
        (s3_error("AuthorizationHeaderMalformed", 400), r"refused .* and the region"),
        (s3_error("PermanentRedirect", 301), r"refused .* and the region"),
        (s3_error("NoSuchBucket", 404), r"bucket of s3://bucket/key must exist at http://127.0.0.1:1; create it"),
        (NoCredentialsError(), r"s3://bucket/key needs an access key for http://127.0.0.1:1.*AWS_SECRET_ACCESS_KEY"),
    ],
)
def test_errors_that_cannot_pass_are_told_at_once(
    error: Exception, match: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    configure_s3_for(monkeypatch)
    calls: list[int] = []
    with pytest.raises(StoreError, match=match) as caught:
        patiently(lambda: fail(error, calls), "s3://bucket/key")
    assert len(calls) == 1
    assert not isinstance(caught.value, ConnectionError)


@pytest.mark.parametrize(
    "error",
    [
        FileNotFoundError("key"),
        FileExistsError("key"),
        PermissionError(13, "a local file"),
        s3_error("NoSuchKey", 404),
        s3_error("PreconditionFailed", 412),
        SSLError(endpoint_url="https://127.0.0.1:1", error="certificate"),
        ValueError("a mistake"),
    ],
    ids=repr,
)
def test_other_errors_go_through_as_they_are(error: Exception) -> None:
    calls: list[int] = []
    with pytest.raises(type(error)) as caught:
        patiently(lambda: fail(error, calls), "s3://bucket/key")
    assert caught.value is error
    assert not isinstance(error, VZeroError)
    assert len(calls) == 1


def configure_s3_for(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(fsspec.config.conf, "s3", {})
    configure_s3({"endpoint_url": "http://127.0.0.1:1"})


def fail(error: Exception, calls: list[int] | None = None) -> None:
    if calls is not None:
        calls.append(1)
    raise error
