"""Versions on the Hugging Face hub: a commit and a tag each."""

import os
import tempfile
from pathlib import Path

import httpx2
from huggingface_hub import CommitOperationAdd, CommitOperationDelete, HfApi, set_client_factory
from huggingface_hub.errors import HfHubHTTPError
from huggingface_hub.utils._http import default_client_factory
from huggingface_hub.utils.tqdm import disable_progress_bars

from tasks.adapters.files import StoreError, patiently
from tasks.adapters.registry import CARD, MODEL, Registry
from vzero_core.errors import ConfigError

TOKEN = "HF_TOKEN"
_TIMEOUT = httpx2.Timeout(60.0, connect=10.0)
"""Seconds; the hub's client knows none of its own."""
_KEPT = ".gitattributes"
"""The hub's own file."""
_ADVICE = {
    401: f"check the token in {TOKEN}",
    403: f"give the token in {TOKEN} the right to write there",
    404: f"check publish.hub and the rights of the token in {TOKEN}",
}


def require_token(repository: str) -> str:
    """Give the hub's token from the environment.

    Raises:
        ConfigError: there is none.
    """
    token = os.environ.get(TOKEN)
    if not token:
        raise ConfigError(f"publish.hub {repository} needs a token of the hub that may write there; set {TOKEN}")
    return token


def upload_version(registry: Registry, name: str, repository: str) -> str:
    """Upload a version's model and card as one commit, tagged with its name, and give its address.

    A missing repository is created, private. Files of earlier versions are deleted from the head, not from the past.
    A version whose tag is there is left as it is, so the call can be repeated.

    Args:
        registry: where the version is.
        name: of the version.
        repository: OWNER/NAME on the hub; HF_ENDPOINT names another hub.

    Raises:
        ConfigError: there is no token in the environment.
        StoreError: the hub refuses, or does not answer for long.
    """
    api = HfApi(endpoint=os.environ.get("HF_ENDPOINT"), token=require_token(repository))
    set_client_factory(_client)
    disable_progress_bars()
    with tempfile.TemporaryDirectory(prefix="vzero-upload-") as temporary:
        patiently(lambda: _upload(api, registry, name, repository, Path(temporary) / MODEL), api.endpoint)
    return f"{api.endpoint}/{repository}/tree/{name}"


def _upload(api: HfApi, registry: Registry, name: str, repository: str, model: Path) -> None:
    try:
        api.create_repo(repository, private=True, exist_ok=True)
        if name in [tag.name for tag in api.list_repo_refs(repository).tags]:
            return
        registry.fetch(name, model)
        contents: dict[str, bytes | str] = {
            path.relative_to(model).as_posix(): str(path) for path in sorted(model.rglob("*")) if path.is_file()
        }
        contents[CARD] = registry.card(name)
        gone = {*api.list_repo_files(repository)} - {*contents, _KEPT}
        operations: list[CommitOperationAdd | CommitOperationDelete] = [
            CommitOperationAdd(path_in_repo=path, path_or_fileobj=content) for path, content in contents.items()
        ]
        operations += [CommitOperationDelete(path_in_repo=path) for path in sorted(gone)]
        commit = api.create_commit(repository, operations, commit_message=f"Version {name}")
        api.create_tag(repository, tag=name, revision=commit.oid, exist_ok=True)
    # The client wraps errors of large files.
    except (httpx2.HTTPError, RuntimeError, ValueError) as error:
        cause = error.__cause__ if isinstance(error, RuntimeError) else error
        status = cause.response.status_code if isinstance(cause, HfHubHTTPError) else 0
        if isinstance(cause, httpx2.TransportError) or status == 429 or status >= 500:
            raise ConnectionError(str(cause)) from error
        raise StoreError(
            f"the hub must take version {name} into {repository}, but refused: {cause or error}; "
            + _ADVICE.get(status, "read what it says")
        ) from error


def _client() -> httpx2.Client:
    client = default_client_factory()
    client.timeout = _TIMEOUT
    return client
