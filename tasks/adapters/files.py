"""The one place where file systems are opened: local folders, S3, lakeFS, and whatever else fsspec knows."""

import errno
import hashlib
import io
import logging
import os
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO, TypeVar
from urllib.parse import urlsplit

import aiohttp
import fsspec
from botocore import exceptions as boto  # type: ignore[import-untyped]
from botocore.parsers import ResponseParserError  # type: ignore[import-untyped]
from fsspec.implementations.local import LocalFileSystem
from tenacity import RetryCallState, Retrying, retry_if_exception, stop_after_delay, wait_random_exponential

from vzero_core.errors import ConfigError, VZeroError

T = TypeVar("T")
log = logging.getLogger("vzero.files")

PATIENCE = 120.0
"""Seconds that a server may be away before a call gives up."""
PASSING_ERRNOS = frozenset({errno.EAGAIN, errno.EBUSY, errno.EIO, errno.EMFILE, errno.ENOSPC, errno.ESTALE})
"""Errors of a local disk that may be gone at the next try."""
LONGEST_PAUSE = 5.0
"""Seconds between two tries at most, so that a server that is back is soon noticed."""
# A hung server is given up after 3 x 20 s, then `patiently` decides; s3fs's own loop around botocore's is switched off
# (`_connect`), because together they would wait for many minutes.
_TIMEOUTS = {"connect_timeout": 5, "read_timeout": 20, "max_pool_connections": 32}
_RETRIES = {"mode": "standard", "total_max_attempts": 3}
_FIRST_BLOCK, _LARGEST_BLOCK = 1 << 17, 1 << 23
"""Bytes: what a first read asks for, enough for the header of an image, and what reading on in order grows to."""
_CHUNK = 1 << 20
_LAKEFS = ("LAKECTL_SERVER_ENDPOINT_URL", "LAKECTL_CREDENTIALS_ACCESS_KEY_ID", "LAKECTL_CREDENTIALS_SECRET_ACCESS_KEY")
_PASSING = (
    ConnectionError,
    TimeoutError,
    EOFError,
    aiohttp.ClientConnectionError,
    aiohttp.ClientPayloadError,
    boto.ConnectionError,
    boto.HTTPClientError,
    ResponseParserError,
)


class StoreError(VZeroError, OSError):
    """What is stored cannot be reached, is missing, damaged or was pruned."""


class StoreUnavailableError(StoreError, ConnectionError):
    """A server did not answer for as long as a call waits."""


@dataclass(frozen=True)
class FileStat:
    """What pins a file: its size in bytes, and its ETag, or the time of its last change where there is none."""

    size: int
    etag: str


def configure_s3(options: dict[str, Any]) -> None:
    """Set what file systems opened from now on use for S3.

    Args:
        options: of s3fs: `key`, `secret`, `endpoint_url`, `client_kwargs`, ...; what is not given comes from the
            environment (AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_ENDPOINT_URL, AWS_REGION, AWS_PROFILE, ...).
    """
    fsspec.config.conf["s3"] = options


def filesystem(url: str) -> tuple[Any, str]:
    """Give the file system of a folder or URL, and the path on it.

    Raises:
        ConfigError: `lakefs://` without the environment that names the server.
    """
    if url.startswith("lakefs://"):
        missing = [name for name in _LAKEFS if not os.environ.get(name)]
        if missing:
            raise ConfigError(f"{url} needs the server's address and keys; set {', '.join(missing)} in the environment")
        endpoint, key, secret = (os.environ[name] for name in _LAKEFS)
        # lakectl's address may end with the path of its API, which the S3 gateway does not have.
        endpoint = endpoint.rstrip("/").removesuffix("/api/v1")
        return _connect(url.replace("lakefs://", "s3://", 1), {"endpoint_url": endpoint, "key": key, "secret": secret})
    if url.startswith("s3://"):
        return _connect(url, {})
    fs, path = fsspec.core.url_to_fs(url)
    return fs, str(path)


def _connect(url: str, options: dict[str, Any]) -> tuple[Any, str]:
    given = {**fsspec.config.conf.get("s3", {}), **options}
    # botocore reads AWS_DEFAULT_REGION only.
    region = os.environ.get("AWS_REGION")
    fs, path = fsspec.core.url_to_fs(
        url,
        **options,
        use_listings_cache=False,
        max_concurrency=4,
        config_kwargs={**_TIMEOUTS, "retries": _RETRIES, **given.get("config_kwargs", {})},
        client_kwargs={**({"region_name": region} if region else {}), **given.get("client_kwargs", {})},
    )
    fs.retries = 1
    return fs, str(path)


def read_bytes(url: str) -> bytes:
    """Read a whole file.

    Raises:
        FileNotFoundError: there is none.
        StoreError: the server refuses, or does not answer for long.
    """
    fs, path = filesystem(url)
    content: bytes = patiently(lambda: fs.cat_file(path), url)
    return content


def read_ranges(fs: Any, ranges: Sequence[tuple[str, int, int | None]], what: str) -> list[bytes]:
    """Read parts of files at once, patiently; what lies beyond a file's end is left out.

    Args:
        fs: file system.
        ranges: path, first byte, and the byte after the last, or None for the file's end.
        what: URL they are below, for messages.

    Raises:
        FileNotFoundError: a file is missing; its path is the error's text.
    """
    paths, starts, ends = (list(part) for part in zip(*ranges, strict=True))

    def read() -> list[bytes]:
        parts = fs.cat_ranges(paths, starts, ends, on_error="return")
        return [_part(path, part) for path, part in zip(paths, parts, strict=True)]

    return patiently(read, what)


def _part(path: str, part: bytes | Exception) -> bytes:
    if not isinstance(part, Exception):
        return part
    if error_code(part) == "InvalidRange":
        return b""
    if isinstance(part, FileNotFoundError) and error_code(part) != "NoSuchBucket":
        raise FileNotFoundError(path) from part
    raise part


def open_file(url: str) -> AbstractContextManager[BinaryIO]:
    """Open a file for reading in parts; it can be searched, and on a server every read is patient.

    Raises:
        FileNotFoundError: there is none.
    """
    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        return Path(path).open("rb")
    return io.BufferedReader(_RemoteFile(fs, path, stat(url).size, url))


class _RemoteFile(io.RawIOBase):
    """Reads ranges; the longer a file is read in order, the larger they get."""

    def __init__(self, fs: Any, path: str, size: int, url: str) -> None:
        self._fs, self._path, self._size, self._url = fs, path, size, url
        self._position = 0
        self._start, self._block = 0, b""
        self._next_length = _FIRST_BLOCK

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = os.SEEK_SET) -> int:
        base = {os.SEEK_SET: 0, os.SEEK_CUR: self._position, os.SEEK_END: self._size}[whence]
        self._position = max(base + offset, 0)
        return self._position

    def readinto(self, buffer: Any) -> int:
        target = memoryview(buffer).cast("B")
        length = min(len(target), self._size - self._position)
        if length <= 0:
            return 0
        end = self._start + len(self._block)
        if not self._start <= self._position < end:
            in_order = self._position == end
            self._next_length = min(2 * self._next_length, _LARGEST_BLOCK) if in_order else _FIRST_BLOCK
            stop = min(self._position + max(length, self._next_length), self._size)
            self._start = self._position
            [self._block] = read_ranges(self._fs, [(self._path, self._position, stop)], self._url)
        offset = self._position - self._start
        part = self._block[offset : offset + length]
        target[: len(part)] = part
        self._position += len(part)
        return len(part)


def stat(url: str) -> FileStat:
    """Give what pins a file, without reading it.

    Raises:
        FileNotFoundError: there is none.
    """
    fs, path = filesystem(url)
    if isinstance(fs, LocalFileSystem):
        found = os.stat(path)
        return FileStat(found.st_size, str(found.st_mtime_ns))
    info = patiently(lambda: fs.info(path), url)
    if info["type"] != "file":
        raise FileNotFoundError(url)
    return FileStat(info["size"], str(info.get("ETag") or fs.ukey(path)).strip('"'))


def patiently(call: Callable[[], T], what: str) -> T:
    """Make a call that can be made again, until it succeeds or fails for good.

    Args:
        call: asks a server, or a local file system, whose errors go through as they are.
        what: URL it is about, for messages.

    Raises:
        StoreUnavailableError: the server was away, or answered that it cannot now, for `PATIENCE` seconds.
        StoreError: the server refuses: key, rights, bucket.
    """
    retrying = Retrying(
        retry=retry_if_exception(_can_pass),
        wait=wait_random_exponential(multiplier=0.2, max=LONGEST_PAUSE),
        stop=stop_after_delay(PATIENCE),
        before_sleep=lambda state: _say(state, what),
        reraise=True,
    )
    try:
        return retrying(call)
    except StoreError:
        raise
    except Exception as error:
        explained = _explained(error, what)
        if explained is None:
            raise
        raise explained from error


def error_code(error: BaseException) -> str | None:
    """Give S3's name of an error, None for errors that did not come from an S3 server."""
    cause = error.__cause__
    return str(cause.response["Error"].get("Code")) if isinstance(cause, boto.ClientError) else None


def _status(error: BaseException) -> int:
    cause = error.__cause__
    if isinstance(cause, boto.ClientError):
        return int(cause.response["ResponseMetadata"]["HTTPStatusCode"])
    return error.status if isinstance(error, aiohttp.ClientResponseError) else 0


def _can_pass(error: BaseException) -> bool:
    if isinstance(error, StoreError | boto.SSLError | aiohttp.ClientSSLError):
        return False
    # 409: two conditional writes met; the next try is told who won. 429: too many requests.
    return isinstance(error, _PASSING) or _status(error) >= 500 or _status(error) in (409, 429)


def _say(state: RetryCallState, what: str) -> None:
    if state.attempt_number == 1 and state.outcome is not None:
        log.warning(
            "%s does not answer (%s); waiting up to %.0f s", _endpoint(what), state.outcome.exception(), PATIENCE
        )


def _explained(error: Exception, what: str) -> StoreError | None:
    endpoint = _endpoint(what)
    if _can_pass(error):
        return StoreUnavailableError(
            f"{endpoint} must answer for {what}, but did not within {PATIENCE:.0f} s: {error}; "
            "check that it runs, has space and that its address is right, then run the same command again"
        )
    if isinstance(error, boto.NoCredentialsError | boto.PartialCredentialsError | boto.CredentialRetrievalError):
        return StoreError(
            f"{what} needs an access key for {endpoint}, got none; set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, "
            "or the Prefect block of the store"
        )
    code = error_code(error)
    if code == "NoSuchBucket":
        return StoreError(f"the bucket of {what} must exist at {endpoint}; create it, or correct the URL")
    # 404: no such file. 412: it is there already. 416: the range is beyond its end. The caller knows what to do.
    if code is not None and _status(error) not in (404, 412, 416):
        return StoreError(
            f"{what} was refused by {endpoint} ({code}: {error}); check the access key, its secret, its rights on "
            "the bucket, the bucket's name and the region"
        )
    return None


def _endpoint(what: str) -> str:
    if what.startswith("lakefs://"):
        return os.environ.get(_LAKEFS[0], "lakeFS")
    if what.startswith(("http://", "https://")):
        address = urlsplit(what)
        return f"{address.scheme}://{address.netloc}"
    given = fsspec.config.conf.get("s3", {})
    configured = given.get("endpoint_url") or given.get("client_kwargs", {}).get("endpoint_url")
    return configured or os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or "the S3 service"


def sha256_file(path: Path) -> str:
    """Hash a file in bounded memory; 64 hexadecimal digits."""
    state = hashlib.sha256()
    with path.open("rb") as file:
        while chunk := file.read(_CHUNK):
            state.update(chunk)
    return state.hexdigest()
