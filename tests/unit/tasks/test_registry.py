"""The registry: a version is whole or does not exist, one caller alone names the champion, what is damaged is named."""

import logging
import os
import shutil
import subprocess
import sys
import threading
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path
from typing import Any

import fsspec
import pytest
from support.published import START, files_below, version_of, write_student

from tasks.adapters.registry import Move, Registry, RegistryError
from tasks.adapters.transfers import Folder
from vzero_core.errors import VZeroError


@pytest.fixture(params=["local", "memory", pytest.param("s3", marks=pytest.mark.s3)])
def url(request: pytest.FixtureRequest, tmp_path: Path) -> Iterator[str]:
    if request.param == "s3":
        yield request.getfixturevalue("s3_url")
        return
    yield str(tmp_path / "published") if request.param == "local" else "memory://published"
    fsspec.filesystem("memory").store.clear()


@pytest.fixture
def local(tmp_path: Path) -> Path:
    return tmp_path / "published"


def add(registry: Registry, tmp_path: Path, *names: str) -> None:
    for number, name in enumerate(names):
        folder = write_student(tmp_path / f"student-{name}", weights=name.encode())
        registry.add(version_of(folder, name, created_at=START + timedelta(days=number)), folder)


def move(registry: Registry, kind: Any, champion: str | None, **changes: Any) -> Move:
    fields = {"version": champion, "data": None, "reason": kind, **changes}
    return registry.move(registry.last(), kind=kind, champion=champion, **fields)


def overwrite(registry: Registry, path: str, content: bytes) -> None:
    fs, root = fsspec.core.url_to_fs(registry.url)
    fs.makedirs(f"{root}/{path}".rpartition("/")[0], exist_ok=True)
    fs.pipe_file(f"{root}/{path}", content)


# --- versions -------------------------------------------------------------------------------------------------------


def test_a_version_comes_back_as_it_was_added(url: str, tmp_path: Path) -> None:
    registry = Registry(url)
    assert registry.versions() == []
    folder = write_student(tmp_path / "student", weights=os.urandom(3 << 20))
    version = version_of(folder, "run-1", parent="run-0", commit="c0ffee")
    registry.add(version, folder)
    again = Registry(url)
    assert again.version("run-1") == version
    assert again.card("run-1") == b"card"
    again.fetch("run-1", tmp_path / "fetched" / "model")
    assert files_below(tmp_path / "fetched" / "model") == files_below(folder / "model")
    # Nothing half is left beside it.
    assert [path.name for path in (tmp_path / "fetched").iterdir()] == ["model"]


def test_versions_are_listed_by_age_and_others_are_left_out(
    url: str, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    registry = Registry(url)
    add(registry, tmp_path, "run-z", "run-a", "run-c")
    overwrite(registry, "versions/run-a/version.json", b"{")
    overwrite(registry, "versions/notes.txt", b"not ours")
    overwrite(registry, "versions/half/model/config.json", b"{}")
    with caplog.at_level(logging.WARNING):
        assert [version.name for version in registry.versions()] == ["run-z", "run-c"]
    assert "versions/run-a/version.json must be whole" in caplog.text


def test_a_version_is_added_once(url: str, tmp_path: Path) -> None:
    registry = Registry(url)
    folder = write_student(tmp_path / "student")
    version = version_of(folder, "run-1")
    registry.add(version, folder)
    registry.add(version.model_copy(update={"created_at": START + timedelta(days=1)}), folder)
    assert registry.version("run-1") == version
    other = write_student(tmp_path / "other", weights=b"others")
    with pytest.raises(RegistryError, match=r"version run-1 must be new in .* with other files"):
        registry.add(version_of(other, "run-1"), other)
    registry.fetch("run-1", tmp_path / "model")
    assert files_below(tmp_path / "model") == files_below(folder / "model")


def test_what_has_no_version_json_does_not_exist(url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    registry = Registry(url)
    folder = write_student(tmp_path / "student")
    version = version_of(folder, "run-1")
    fs = registry._root.fs
    create = type(registry._root).create

    def fail(*_: Any) -> bool:
        raise ConnectionError("cut")

    monkeypatch.setattr(type(registry._root), "create", fail)
    with pytest.raises(ConnectionError):
        registry.add(version, folder)
    monkeypatch.setattr(type(registry._root), "create", create)
    assert fs.exists(f"{registry._root.path}/versions/run-1/model/config.json")
    assert registry.versions() == []
    assert registry.find("run-1") is None
    for use in (registry.version, registry.card, lambda name: registry.fetch(name, tmp_path / "model")):
        with pytest.raises(RegistryError, match="version 'run-1' must be in"):
            use("run-1")
    with pytest.raises(RegistryError, match="version 'run-1' must be in"):
        move(registry, "founded", "run-1")
    assert not (tmp_path / "model").exists()
    # A second call with the same files completes it.
    registry.add(version, folder)
    registry.fetch("run-1", tmp_path / "model")
    assert files_below(tmp_path / "model") == files_below(folder / "model")


def test_files_of_another_attempt_are_not_overwritten(url: str, tmp_path: Path) -> None:
    registry = Registry(url)
    folder = write_student(tmp_path / "student")
    overwrite(registry, "versions/run-1/README.md", b"another card")
    with pytest.raises(RegistryError, match=r"no other files than this version's, but README.md differs .*; delete"):
        registry.add(version_of(folder, "run-1"), folder)
    assert registry.find("run-1") is None
    # Its own model is there: only the card was refused.
    overwrite(registry, "versions/run-1/README.md", b"card")
    registry.add(version_of(folder, "run-1"), folder)
    assert registry.card("run-1") == b"card"


@pytest.mark.parametrize("same", [True, False])
def test_of_racing_versions_of_a_name_one_is_there_whole(local: Path, tmp_path: Path, same: bool) -> None:
    folders = [write_student(tmp_path / str(i), weights=b"x" if same else bytes([i]) * 999) for i in range(8)]
    barrier = threading.Barrier(8)
    refused: list[str] = []

    def publish(folder: Path) -> None:
        version = version_of(folder, "run-1")
        barrier.wait()
        try:
            Registry(str(local)).add(version, folder)
        except RegistryError as error:
            refused.append(str(error))

    threads = [threading.Thread(target=publish, args=(folder,)) for folder in folders]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(refused) == (0 if same else 7)
    registry = Registry(str(local))
    registry.fetch("run-1", tmp_path / "model")
    assert files_below(tmp_path / "model") in [files_below(folder / "model") for folder in folders]
    assert registry.card("run-1") == b"card"


CUT = """
import os, sys
from pathlib import Path
sys.path.insert(0, "tests")
from support.published import version_of
from tasks.adapters.registry import Registry

url, folder, calls = sys.argv[1], Path(sys.argv[2]), int(sys.argv[3])
link = os.link

def cut(*arguments):
    global calls
    calls -= 1
    if calls < 0:
        os.kill(os.getpid(), 9)
    link(*arguments)

os.link = cut
Registry(url).add(version_of(folder, "run-1"), folder)
"""


@pytest.mark.parametrize("num_files", [0, 1, 2, 3])
def test_a_process_killed_after_any_file_leaves_no_version(local: Path, tmp_path: Path, num_files: int) -> None:
    folder = write_student(tmp_path / "student")
    command = [sys.executable, "-c", CUT, str(local), str(folder), str(num_files)]
    done = subprocess.run(command, capture_output=True, text=True, cwd=Path(__file__).parents[3], check=False)
    assert done.returncode == -9, done.stderr
    registry = Registry(str(local))
    assert len([path for path in files_below(local) if not path.endswith(".partial")]) == num_files
    assert registry.versions() == []
    registry.add(version_of(folder, "run-1"), folder)
    registry.fetch("run-1", tmp_path / "model")
    assert files_below(tmp_path / "model") == files_below(folder / "model")


@pytest.mark.parametrize("name", ["", ".", "..", "../run", "a/b", "/etc", "a\\b", "a b", "a\n"])
def test_a_name_cannot_leave_the_registry(local: Path, tmp_path: Path, name: str) -> None:
    registry = Registry(str(local))
    folder = write_student(tmp_path / "student")
    for use in (
        registry.version,
        registry.card,
        registry.model_url,
        lambda name: registry.fetch(name, tmp_path / "model"),
        lambda name: move(registry, "by hand", name),
        lambda name: registry.add(version_of(folder, name), folder),
    ):
        with pytest.raises(RegistryError, match="a version's name must be of letters"):
            use(name)
    assert not local.exists()


@pytest.mark.parametrize(
    "path", ["../../escaped", "model/../../escaped", "/escaped", "escaped", "model", "model/", "model//a", "model/./a"]
)
def test_a_version_written_by_others_cannot_name_files_elsewhere(local: Path, tmp_path: Path, path: str) -> None:
    registry = Registry(str(local))
    add(registry, tmp_path, "run-1")
    content = (local / "versions/run-1/version.json").read_text()
    assert content.count('"model/config.json"') == 1
    (local / "versions/run-1/version.json").write_text(content.replace('"model/config.json"', f'"{path}"'))
    with pytest.raises(RegistryError, match=r"run-1/version\.json must be whole"):
        registry.fetch("run-1", tmp_path / "target" / "model")
    assert not list(tmp_path.rglob("escaped"))


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"name": "run-1"}', b"\xff\xfe"])
def test_a_damaged_version_is_named(url: str, tmp_path: Path, content: bytes) -> None:
    registry = Registry(url)
    add(registry, tmp_path, "run-1")
    overwrite(registry, "versions/run-1/version.json", content)
    with pytest.raises(RegistryError, match=r"versions/run-1/version\.json must be whole, but is not; restore it"):
        registry.version("run-1")


def test_a_version_of_another_name_is_refused(url: str, tmp_path: Path) -> None:
    registry = Registry(url)
    add(registry, tmp_path, "run-1", "run-2")
    overwrite(registry, "versions/run-1/version.json", registry.version("run-2").model_dump_json().encode())
    with pytest.raises(RegistryError, match=r"must be of version run-1, got run-2"):
        registry.version("run-1")


@pytest.mark.parametrize("damage", ["gone", "shorter", "other"])
def test_a_damaged_model_is_refused_and_nothing_half_remains(url: str, tmp_path: Path, damage: str) -> None:
    registry = Registry(url)
    add(registry, tmp_path, "run-1")
    path = "versions/run-1/model/deep/model.safetensors"
    if damage == "gone":
        registry._root.fs.rm_file(f"{registry._root.path}/{path}")
    else:
        overwrite(registry, path, b"run" if damage == "shorter" else b"run-2")
    problem = "is gone" if damage == "gone" else "differs from its checksum"
    with pytest.raises(RegistryError, match=rf"run-1 must be as published, but model/deep/.* {problem}"):
        registry.fetch("run-1", tmp_path / "target")
    assert not list(tmp_path.glob("target*"))
    assert registry.card("run-1") == b"card"


def test_a_target_is_never_overwritten(local: Path, tmp_path: Path) -> None:
    registry = Registry(str(local))
    add(registry, tmp_path, "run-1", "run-2")
    target = tmp_path / "target"
    target.mkdir()
    registry.fetch("run-1", target)
    before = files_below(target)
    # What is there already is not asked for again.
    (local / "versions/run-1/model/config.json").unlink()
    registry.fetch("run-1", target)
    for other in (target, tmp_path / "file"):
        (tmp_path / "file").write_text("mine")
        with pytest.raises(RegistryError, match=r"must be a new or empty folder, but something else is there"):
            registry.fetch("run-2", other)
    assert files_below(target) == before
    assert (tmp_path / "file").read_text() == "mine"


def test_eight_who_fetch_to_one_place_all_find_the_model(
    local: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    registry = Registry(str(local))
    add(registry, tmp_path, "run-1")
    barrier = threading.Barrier(8)
    done: list[int] = []
    download = Folder.download

    def download_together(folder: Folder, paths: Any) -> None:
        download(folder, paths)
        barrier.wait()

    monkeypatch.setattr(Folder, "download", download_together)

    def fetch(number: int) -> None:
        registry.fetch("run-1", tmp_path / "cache" / "model")
        done.append(number)

    threads = [threading.Thread(target=fetch, args=(number,)) for number in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(done) == [*range(8)]
    assert files_below(tmp_path / "cache" / "model") == files_below(tmp_path / "student-run-1" / "model")
    assert [path.name for path in (tmp_path / "cache").iterdir()] == ["model"]


# --- the champion ---------------------------------------------------------------------------------------------------


def test_a_history_is_kept_and_its_last_entry_names_the_champion(url: str, tmp_path: Path) -> None:
    registry = Registry(url)
    assert (registry.history(), registry.last(), registry.champion()) == ([], None, None)
    add(registry, tmp_path, "run-1", "run-2")
    made = [
        move(registry, "seen", None, data="d0"),
        move(registry, "founded", "run-1", data="d1"),
        move(registry, "kept", "run-1", version="run-2", data="d2"),
        move(registry, "promoted", "run-2", data="d3"),
    ]
    again = Registry(url)
    assert again.history() == made
    assert [entry.number for entry in made] == [1, 2, 3, 4]
    assert again.last() == made[-1]
    champion = again.champion()
    assert champion is not None
    assert champion.name == "run-2"
    fs, root = fsspec.core.url_to_fs(url)
    names = [path.rpartition("/")[2] for path in fs.ls(f"{root}/champion", detail=False)]
    assert sorted(names) == ["000001.json", "000002.json", "000003.json", "000004.json"]


@pytest.mark.parametrize("place", ["local", pytest.param("s3", marks=pytest.mark.s3)])
def test_of_racing_moves_one_wins_each_number(request: pytest.FixtureRequest, tmp_path: Path, place: str) -> None:
    url = str(tmp_path / "published") if place == "local" else request.getfixturevalue("s3_url")
    add(Registry(url), tmp_path, "run-1")
    num_rounds, num_threads = 5, 8
    barrier = threading.Barrier(num_threads)
    won: list[Move] = []
    refused: list[str] = []

    def race(number: int) -> None:
        registry = Registry(url)
        for _ in range(num_rounds):
            last = registry.last()
            barrier.wait()
            try:
                # All the same, so that nothing but the attempt tells them apart.
                won.append(
                    registry.move(last, kind="by hand", champion="run-1", version="run-1", data=None, reason="race")
                )
            except RegistryError as error:
                refused.append(str(error))
            barrier.wait()

    threads = [threading.Thread(target=race, args=(number,)) for number in range(num_threads)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert sorted(entry.number for entry in won) == [1, 2, 3, 4, 5]
    assert len(refused) == num_rounds * (num_threads - 1)
    assert all("somebody else moved since (by hand: race)" in text for text in refused)
    assert Registry(url).history() == sorted(won, key=lambda entry: entry.number)


def test_who_decided_on_an_older_history_is_refused(url: str, tmp_path: Path) -> None:
    registry = Registry(url)
    add(registry, tmp_path, "run-1", "run-2")
    first = move(registry, "founded", "run-1")
    move(registry, "seen", "run-1")
    for after in (None, first):
        with pytest.raises(RegistryError, match=r"entry \d of .* must be new, but somebody else moved since"):
            registry.move(after, kind="promoted", champion="run-2", version="run-2", data=None, reason="late")
    champion = registry.champion()
    assert champion is not None
    assert champion.name == "run-1"


def test_only_a_version_can_become_champion(url: str) -> None:
    registry = Registry(url)
    with pytest.raises(RegistryError, match="version 'run-9' must be in"):
        move(registry, "by hand", "run-9")
    assert registry.history() == []


def test_a_rollback_goes_back_one_champion_a_time_and_never_forth(url: str, tmp_path: Path) -> None:
    registry = Registry(url)
    add(registry, tmp_path, "a", "b", "c")
    with pytest.raises(RegistryError, match="must have had a champion before"):
        registry.rollback()
    move(registry, "founded", "a", data="d1")
    with pytest.raises(RegistryError, match="must have had a champion before"):
        registry.rollback()
    move(registry, "promoted", "b", data="d2")
    move(registry, "kept", "b", version="c", data="d3")
    move(registry, "promoted", "c", data="d4")
    move(registry, "seen", "c", data="d5")
    first = registry.rollback()
    assert (first.kind, first.champion, first.version, first.data) == ("rolled back", "b", "c", "d5")
    second = registry.rollback()
    assert (second.champion, second.version, second.data) == ("a", "b", "d5")
    with pytest.raises(RegistryError, match="must have had a champion before"):
        registry.rollback()
    # What comes after a rollback starts from where it went; who was champion twice is gone back to twice.
    move(registry, "by hand", "c")
    move(registry, "promoted", "b")
    move(registry, "by hand", "c")
    assert [registry.rollback().champion for _ in range(3)] == ["b", "c", "a"]


def test_a_rollback_to_a_version_that_is_gone_is_refused(local: Path, tmp_path: Path) -> None:
    registry = Registry(str(local))
    add(registry, tmp_path, "a", "b")
    move(registry, "founded", "a")
    move(registry, "promoted", "b")
    shutil.rmtree(local / "versions" / "a")
    with pytest.raises(RegistryError, match="version 'a' must be in"):
        registry.rollback()
    assert len(registry.history()) == 2


# --- damage ---------------------------------------------------------------------------------------------------------


def test_files_of_others_in_the_history_are_left_alone(url: str, tmp_path: Path) -> None:
    registry = Registry(url)
    add(registry, tmp_path, "run-1")
    entry = move(registry, "founded", "run-1")
    for name in ("README.md", "000007.json.bak", "7.json", "0000009.json", "000002.json.abc.partial", "latest.json"):
        overwrite(registry, f"champion/{name}", b"not ours")
    assert registry.history() == [entry]
    assert registry.last() == entry
    assert move(registry, "seen", "run-1").number == 2


@pytest.mark.parametrize("content", [b"", b"{", b"[]", b'{"number": 2}', b"\xff"])
def test_a_damaged_entry_is_named(url: str, tmp_path: Path, content: bytes) -> None:
    registry = Registry(url)
    add(registry, tmp_path, "run-1")
    first = move(registry, "founded", "run-1")
    move(registry, "seen", "run-1")
    overwrite(registry, "champion/000002.json", content)
    for use in (registry.last, registry.champion, registry.history, registry.rollback):
        with pytest.raises(RegistryError, match=r"champion/000002\.json must be whole, but is not; restore it"):
            use()
    with pytest.raises(RegistryError, match=r"champion/000002\.json must be whole"):
        registry.move(first, kind="seen", champion="run-1", version=None, data=None, reason="")


def test_an_entry_under_anothers_number_is_named(url: str, tmp_path: Path) -> None:
    registry = Registry(url)
    add(registry, tmp_path, "run-1")
    first = move(registry, "founded", "run-1")
    overwrite(registry, "champion/000002.json", first.model_dump_json().encode())
    with pytest.raises(RegistryError, match=r"champion/000002\.json must be entry 2, got 1"):
        registry.last()


def test_a_gap_is_named_where_it_matters(local: Path, tmp_path: Path) -> None:
    registry = Registry(str(local))
    add(registry, tmp_path, "a", "b", "c")
    for kind, name in (("founded", "a"), ("promoted", "b"), ("promoted", "c")):
        move(registry, kind, name)
    (local / "champion" / "000002.json").unlink()
    for use in (registry.history, registry.rollback):
        with pytest.raises(RegistryError, match=r"champion/000002\.json must be there, as later entries are"):
            use()
    champion = registry.champion()
    assert champion is not None
    assert champion.name == "c"
    assert move(registry, "by hand", "a").number == 4


def test_a_folder_that_cannot_be_made_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    registry = Registry(str(tmp_path / "file" / "published"))
    folder = write_student(tmp_path / "student")
    for use in (
        lambda: registry.move(None, kind="seen", champion=None, version=None, data=None, reason=""),
        lambda: registry.add(version_of(folder, "run-1"), folder),
    ):
        with pytest.raises(RegistryError, match=r"publish.url must be a folder that can be written, but .*file"):
            use()


def test_its_errors_are_the_projects_own() -> None:
    assert issubclass(RegistryError, VZeroError)
