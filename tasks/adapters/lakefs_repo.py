"""Versions with lakeFS: a run's input pinned to a commit, its outputs on a branch, merged and tagged when published.

Here names and commits are made, through lakeFS's API; objects move through its S3 gateway (`files.py`).
"""

import os
import re
from collections.abc import Callable
from typing import Any, TypeVar

from tasks.adapters.files import StoreError, patiently
from vzero_core.errors import ConfigError, InputError

T = TypeVar("T")

_URL = re.compile(r"lakefs://([a-z0-9][a-z0-9-]{2,62})/([^/\s]+)(?:/|/([^/].*))?")
_SETTINGS = {
    "host": "LAKECTL_SERVER_ENDPOINT_URL",
    "username": "LAKECTL_CREDENTIALS_ACCESS_KEY_ID",
    "password": "LAKECTL_CREDENTIALS_SECRET_ACCESS_KEY",
}
_CONNECT_TIMEOUT, _READ_TIMEOUT = 5.0, 120.0
"""Seconds; a commit of many files takes the server a while."""
_ADVICE = {
    400: "correct the name (of letters, digits, '-' and '_' for a branch), or commit what lies uncommitted there",
    401: "check the key in the environment and what it is allowed to do",
    403: "the branch is protected or the repository read-only: name another branch, or change the rule in lakeFS",
    404: "create it in lakeFS, or correct its name",
    409: "the same was changed from two sides: resolve it in lakeFS, then run again",
    412: "a hook of the repository refused: read its log in lakeFS",
}


def parse_lakefs_url(url: str) -> tuple[str, str, str]:
    """Split `lakefs://repository/ref/path`, where ref is a branch, a tag or a commit id; an empty path is its root.

    Raises:
        InputError: it is not such a URL.
    """
    match = _URL.fullmatch(url)
    if match is None:
        raise InputError(
            f"a lakeFS URL must be lakefs://repository/ref/path, got {url!r}; "
            "name the repository (3 to 63 of a-z, 0-9, '-'), a ref without '/', and a path"
        )
    repository, ref, path = match.groups(default="")
    return repository, ref, path


class LakeFSRepo:
    """A lakeFS repository, reached as lakectl is: address and key stand in lakeFS's own environment variables.

    Every method can be called again after an error, and waits itself for a server that is away. Each raises StoreError
    where lakeFS refuses, and StoreUnavailableError where it did not answer for long.
    """

    def __init__(self, repository: str) -> None:
        """Take the address and the key from the environment; nothing is asked of the server.

        Raises:
            ConfigError: LAKECTL_SERVER_ENDPOINT_URL, LAKECTL_CREDENTIALS_ACCESS_KEY_ID or
                LAKECTL_CREDENTIALS_SECRET_ACCESS_KEY is not set.
        """
        # Here, because it takes most of a second, which a run without lakeFS need not pay.
        import lakefs

        missing = [name for name in _SETTINGS.values() if not os.environ.get(name)]
        if missing:
            raise ConfigError(
                f"lakeFS repository {repository!r} needs the server's address and key, got no {', no '.join(missing)}; "
                "set it in the environment"
            )
        # Given as arguments, because else the client reads ~/.lakectl.yaml, with a YAML loader that can run code.
        client: Any = lakefs.Client(  # type: ignore[no-untyped-call]
            **{setting: os.environ[name] for setting, name in _SETTINGS.items()}
        )
        _limit(client.sdk_client.commits_api.api_client.rest_client.pool_manager)
        self._name = repository
        self._repository = lakefs.Repository(repository, client)

    def url(self, ref: str, path: str) -> str:
        """Give the URL of a file or folder under a branch, tag or commit id.

        Raises:
            InputError: ref or path cannot stand in a URL.
        """
        url = f"lakefs://{self._name}/{ref}/{path}"
        if parse_lakefs_url(url)[1] != ref:
            raise InputError(f"a ref in a lakeFS URL must have no '/', got {ref!r}; use another name, or the commit id")
        return url

    def pin(self, ref: str) -> str:
        """Give the id of the commit that a branch, tag or commit id names now; what is uncommitted is not in it."""
        return self._ask(f"know ref {ref!r}", lambda: self._repository.ref(ref).get_commit().id)

    def branch(self, name: str, source: str) -> None:
        """Make a branch at a ref; one that is there stays as it is."""
        self._ask(
            f"create branch {name!r} from {source!r}",
            lambda: self._repository.branch(name).create(source, exist_ok=True),
        )

    def commit(self, branch: str, message: str, metadata: dict[str, str]) -> str:
        """Commit what was written to a branch and give the commit's id; with nothing written, that of its head."""
        from lakefs.exceptions import BadRequestException

        written = self._repository.branch(branch)

        def commit() -> str:
            try:
                return written.commit(message, metadata).id
            except BadRequestException:
                # "No changes" has no status of its own.
                if any(written.uncommitted(max_amount=1)):
                    raise
                return written.head.id

        return self._ask(f"commit to branch {branch!r}", commit)

    def merge(self, source: str, into: str, message: str, metadata: dict[str, str]) -> str:
        """Merge a ref into a branch and give the merge's commit id.

        Where all of it is merged already nothing happens, and the id is that of the branch's head.
        """
        target = self._repository.branch(into)

        def merge() -> str:
            if not any(target.diff(source, max_amount=1)):
                return target.head.id
            # Two runs may have come to the same files: the second merge changes nothing, yet says who came to them.
            return self._repository.ref(source).merge_into(into, message=message, metadata=metadata, allow_empty=True)

        return self._ask(f"merge {source!r} into branch {into!r}", merge)

    def tag(self, name: str, commit: str) -> None:
        """Let a tag name a commit, and no longer the one it named before.

        lakeFS cannot move a tag (`force` is about read-only repositories): it is deleted and made anew. So for the
        moment between two requests a reader may find no tag, never a wrong one. If the second request fails for good,
        the tag is missing until this is called again.
        """
        from lakefs.exceptions import ConflictException

        def move() -> None:
            tag = self._repository.tag(name)
            try:
                tag.create(commit)
            except ConflictException:
                if tag.get_commit().id != commit:
                    tag.delete()
                    tag.create(commit)

        self._ask(f"let tag {name!r} name commit {commit}", move)

    def _ask(self, request: str, call: Callable[[], T]) -> T:
        from lakefs.exceptions import ServerException
        from urllib3.exceptions import HTTPError

        def ask() -> T:
            try:
                return call()
            except HTTPError as error:
                raise ConnectionError(str(error)) from error
            except ServerException as error:
                status = error.status_code or 0
                said = f"{status} ({error.body.get('message') or error.reason})"
                if status == 429 or status >= 500:
                    raise ConnectionError(said) from error
                raise StoreError(
                    f"lakeFS must {request} in repository {self._name!r}, got {said}; "
                    + _ADVICE.get(status, "read the server's log")
                ) from error
            except ValueError as error:
                raise StoreError(
                    f"lakeFS's API must answer at ${_SETTINGS['host']}, got something else; "
                    "name the server alone, as in http://host:8000"
                ) from error

        return patiently(ask, f"lakefs://{self._name}")


def _limit(pool: Any) -> None:
    """Set timeouts, which the client knows none of, and leave trying again to `patiently`."""
    from urllib3 import Timeout

    send = pool.request

    def request(*args: Any, **kwargs: Any) -> Any:
        return send(
            *args, **{**kwargs, "timeout": Timeout(connect=_CONNECT_TIMEOUT, read=_READ_TIMEOUT), "retries": False}
        )

    pool.request = request
