"""Uploads with the hub's real client, against a server that stands in for the hub."""

import re
import threading
from collections.abc import Iterator
from pathlib import Path

import pytest
from huggingface_hub import constants
from huggingface_hub.utils import _http
from support.hub_stand_in import READER, TOKEN, HubStandIn
from support.published import files_below, version_of, write_student

from tasks.adapters import files, hub
from tasks.adapters.files import StoreError, StoreUnavailableError
from tasks.adapters.hub import upload_version
from tasks.adapters.registry import Registry, RegistryError
from vzero_core.errors import ConfigError

NAME = "team/student"
CARD = "---\nlicense: mit\n---\n# {}\n"


@pytest.fixture
def stand_in(monkeypatch: pytest.MonkeyPatch) -> Iterator[HubStandIn]:
    # hf_xet, which real uploads of large files use, speaks a protocol that the stand-in does not know.
    monkeypatch.setattr(constants, "HF_HUB_DISABLE_XET", True)
    with HubStandIn() as server:
        monkeypatch.setenv("HF_ENDPOINT", server.url)
        monkeypatch.setenv("HF_TOKEN", TOKEN)
        yield server


@pytest.fixture
def impatient(monkeypatch: pytest.MonkeyPatch) -> None:
    """The client itself tries again for half a minute."""
    monkeypatch.setattr(files, "PATIENCE", 0.1)
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)


@pytest.fixture
def registry(tmp_path: Path) -> Registry:
    made = Registry(str(tmp_path / "published"))
    for number in (1, 2):
        folder = write_student(tmp_path / f"student-{number}", bytes([number]) * 1000, CARD.format(number))
        if number == 1:
            (folder / "model" / "old.json").write_text("{}")
        made.add(version_of(folder, f"run-{number}"), folder)
    return made


def expected(tmp_path: Path, number: int) -> dict[str, bytes]:
    folder = tmp_path / f"student-{number}"
    return {**files_below(folder / "model"), "README.md": CARD.format(number).encode()}


def test_a_version_is_one_private_commit_with_its_tag(stand_in: HubStandIn, registry: Registry, tmp_path: Path) -> None:
    assert upload_version(registry, "run-1", NAME) == f"{stand_in.url}/{NAME}/tree/run-1"
    kept = stand_in.repositories[NAME]
    assert kept.visibility == "private"
    assert [commit.title for commit in kept.commits] == ["initial commit", "Version run-1"]
    found = dict(kept.at("run-1"))
    assert found.pop(".gitattributes")
    assert found == expected(tmp_path, 1)
    # The weights went the way of large files.
    assert stand_in.count(r"PUT /storage/") == 1


def test_the_next_version_replaces_the_head_and_keeps_the_past(
    stand_in: HubStandIn, registry: Registry, tmp_path: Path
) -> None:
    for number in (1, 2):
        upload_version(registry, f"run-{number}", NAME)
    kept = stand_in.repositories[NAME]
    assert len(kept.commits) == 3
    for number in (1, 2):
        found = dict(kept.at(f"run-{number}"))
        del found[".gitattributes"]
        assert found == expected(tmp_path, number)
    assert kept.tags["run-2"] == kept.commits[-1].oid


def test_an_upload_that_was_done_is_not_repeated(stand_in: HubStandIn, registry: Registry) -> None:
    for _ in range(2):
        upload_version(registry, "run-1", NAME)
    assert len(stand_in.repositories[NAME].commits) == 2
    assert stand_in.count("POST .*/commit/") == 1
    assert stand_in.count("POST .*/tag/") == 1


MOMENTS = ["repos/create", "/refs", "preupload", "objects/batch", "PUT /storage", "/commit/", "/tag/"]


@pytest.mark.parametrize("moment", MOMENTS)
def test_a_lost_answer_is_made_good_within_the_call(
    stand_in: HubStandIn, registry: Registry, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, moment: str
) -> None:
    monkeypatch.setattr(_http.time, "sleep", lambda seconds: None)
    lost: list[str] = []

    def lose_first(request: str) -> int | None:
        if lost or not re.search(moment, request):
            return None
        lost.append(request)
        return 0

    stand_in.fault = lose_first
    upload_version(registry, "run-1", NAME)
    assert len(lost) == 1
    is_whole(stand_in, tmp_path)


@pytest.mark.usefixtures("impatient")
@pytest.mark.parametrize("moment", MOMENTS)
def test_a_call_that_failed_is_made_good_by_the_next(
    stand_in: HubStandIn, registry: Registry, tmp_path: Path, moment: str
) -> None:
    stand_in.fault = lambda request: 503 if re.search(moment, request) else None
    with pytest.raises(StoreUnavailableError, match=rf"{stand_in.url} must answer"):
        upload_version(registry, "run-1", NAME)
    stand_in.fault = lambda request: None
    upload_version(registry, "run-1", NAME)
    is_whole(stand_in, tmp_path)


def is_whole(stand_in: HubStandIn, tmp_path: Path) -> None:
    kept = stand_in.repositories[NAME]
    assert [commit.title for commit in kept.commits] == ["initial commit", "Version run-1"]
    found = dict(kept.at("run-1"))
    del found[".gitattributes"]
    assert found == expected(tmp_path, 1)


def test_a_repository_that_is_there_stays_as_visible_as_it_is(stand_in: HubStandIn, registry: Registry) -> None:
    upload_version(registry, "run-1", NAME)
    stand_in.repositories[NAME].visibility = "public"
    upload_version(registry, "run-2", NAME)
    assert stand_in.repositories[NAME].visibility == "public"


@pytest.mark.parametrize("token", [None, ""])
def test_without_a_token_it_says_what_to_set(
    stand_in: HubStandIn, registry: Registry, monkeypatch: pytest.MonkeyPatch, token: str | None
) -> None:
    monkeypatch.delenv("HF_TOKEN")
    if token is not None:
        monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(ConfigError, match=r"publish.hub team/student needs a token .*set HF_TOKEN"):
        upload_version(registry, "run-1", NAME)
    assert stand_in.requests == []


@pytest.mark.parametrize(
    ("token", "advice"),
    [("hf_wrong", "check the token in HF_TOKEN"), (READER, "give the token in HF_TOKEN the right to write there")],
)
def test_a_refused_token_is_one_clear_error_at_once(
    stand_in: HubStandIn, registry: Registry, monkeypatch: pytest.MonkeyPatch, token: str, advice: str
) -> None:
    monkeypatch.setenv("HF_TOKEN", token)
    with pytest.raises(
        StoreError, match=rf"the hub must take version run-1 into {NAME}, but refused: (?s:.*){advice}"
    ) as e:
        upload_version(registry, "run-1", NAME)
    assert token not in str(e.value)
    assert not isinstance(e.value, StoreUnavailableError)
    assert stand_in.count("repos/create") == 1
    assert stand_in.repositories == {}


def test_metadata_that_the_hub_refuses_is_one_clear_error(
    stand_in: HubStandIn, registry: Registry, tmp_path: Path
) -> None:
    folder = write_student(tmp_path / "bare", card="no metadata")
    registry.add(version_of(folder, "bare"), folder)
    with pytest.raises(StoreError, match=r"but refused: Invalid metadata in README.md(?s:.*)no metadata"):
        upload_version(registry, "bare", NAME)
    assert len(stand_in.repositories[NAME].commits) == 1


@pytest.mark.usefixtures("impatient")
def test_a_hub_that_is_away_is_one_clear_error(
    stand_in: HubStandIn, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:1")
    with pytest.raises(StoreUnavailableError, match=r"http://127.0.0.1:1 must answer .*refused"):
        upload_version(registry, "run-1", NAME)


@pytest.mark.usefixtures("impatient")
def test_a_hub_that_hangs_is_given_up(
    stand_in: HubStandIn, registry: Registry, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(hub, "_TIMEOUT", 0.2)
    answered = stand_in._answer
    released = threading.Event()

    def hang(*arguments: object) -> object:
        released.wait(30)
        return answered(*arguments)  # type: ignore[arg-type]

    monkeypatch.setattr(stand_in, "_answer", hang)
    try:
        with pytest.raises(StoreUnavailableError, match=r"must answer .*timed out"):
            upload_version(registry, "run-1", NAME)
    finally:
        released.set()


def test_a_damaged_version_is_not_uploaded(stand_in: HubStandIn, registry: Registry, tmp_path: Path) -> None:
    (tmp_path / "published/versions/run-1/model/config.json").write_text("{ }")
    with pytest.raises(RegistryError, match=r"run-1 must be as published, but model/config.json differs"):
        upload_version(registry, "run-1", NAME)
    assert not [request for request in stand_in.requests if "commit" in request or "/tag/" in request]
