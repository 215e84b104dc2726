"""The champion tool shows the versions, names the champion, takes it back, and copies a model."""

import re
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

import pytest
from prefect.settings import PREFECT_API_URL, temporary_settings
from support.lakefs_stand_in import LakeFSStandIn
from support.published import START, files_below, version_of, write_student
from support.seaweed import SeaweedServer

from flows.champion import main
from tasks.adapters.lakefs_repo import LakeFSRepo
from tasks.adapters.registry import Registry


@pytest.fixture(autouse=True)
def no_prefect(monkeypatch: pytest.MonkeyPatch) -> Iterator[None]:
    monkeypatch.setenv("COLUMNS", "250")
    with temporary_settings({PREFECT_API_URL: "http://127.0.0.1:1/api"}):
        yield


@pytest.fixture
def url(tmp_path: Path) -> str:
    return str(tmp_path / "published")


def fill(url: str, folder: Path, commits: tuple[str | None, ...] = (None, None, None)) -> Registry:
    """Versions a, b and c; a was founded, b promoted, c kept out."""
    registry = Registry(url)
    for number, (name, commit) in enumerate(zip("abc", commits, strict=True)):
        student = write_student(folder / name, weights=name.encode())
        parent = "a" if name != "a" else None
        created_at = START + timedelta(days=number)
        registry.add(version_of(student, name, parent=parent, commit=commit, created_at=created_at), student)
    first = registry.move(None, kind="founded", champion="a", version="a", data="d1", reason="the first one")
    second = registry.move(first, kind="promoted", champion="b", version="b", data="d2", reason="[bold]better")
    registry.move(second, kind="kept", champion="b", version="c", data="d3", reason="not better")
    return registry


@pytest.fixture
def registry(url: str, tmp_path: Path) -> Registry:
    return fill(url, tmp_path)


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> tuple[int, str]:
    code = main([*arguments])
    printed = capsys.readouterr()
    assert "Traceback" not in printed.err
    return code, printed.out + printed.err


def cells(text: str) -> list[list[str]]:
    return [[cell.strip() for cell in line.split("│")[1:-1]] for line in text.splitlines() if "│" in line]


def champion_of(registry: Registry) -> str | None:
    last = registry.last()
    return last.champion if last is not None else None


def test_show_lists_versions_and_marks_the_champion(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, "show", "--url", registry.url)
    assert code == 0
    rows = cells(text)
    assert [row[:2] for row in rows] == [["", "a"], ["*", "b"], ["", "c"]]
    assert [row[3] for row in rows] == ["", "a", "a"]
    assert "champion: b\n" in text
    assert f"model:    {registry.url}/versions/b/model\n" in text


def test_history_says_who_was_champion_when_and_why(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, "history", "--url", registry.url)
    assert code == 0
    assert re.sub(r"\d{4}-\d\d-\d\d \d\d:\d\d", "DATE", text).splitlines() == [
        *("1  DATE  founded", "   champion: a", "   about:    a", "   data:     d1", "   reason:   the first one"),
        *("2  DATE  promoted", "   champion: b", "   about:    b", "   data:     d2", "   reason:   [bold]better"),
        *("3  DATE  kept", "   champion: b", "   about:    c", "   data:     d3", "   reason:   not better"),
    ]


def test_names_are_whole_on_a_narrow_terminal(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    name = "small-world-0123456789ab"
    student = write_student(tmp_path / "student")
    registry = Registry(url)
    registry.add(version_of(student, name, data="f" * 32), student)
    registry.move(None, kind="founded", champion=name, version=name, data="f" * 32, reason="the first one " * 9)
    assert cells(run(capsys, "show", "--url", url)[1])[0][1] == name
    assert f"   champion: {name}\n" in run(capsys, "history", "--url", url)[1]


def test_rollback_says_from_what_to_what(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "rollback", "--url", registry.url) == (0, "champion: b -> a\n")
    assert champion_of(registry) == "a"
    code, text = run(capsys, "rollback", "--url", registry.url)
    assert code == 1
    assert text.startswith(f"error: {registry.url} must have had a champion before")
    assert len(registry.history()) == 4


def test_promote_by_hand(registry: Registry, capsys: pytest.CaptureFixture[str]) -> None:
    assert run(capsys, "promote", "c", "--url", registry.url) == (0, "champion: b -> c\n")
    last = registry.last()
    assert last is not None
    assert (last.kind, last.champion, last.version, last.data) == ("by hand", "c", "c", "d3")
    assert run(capsys, "promote", "c", "--url", registry.url) == (0, "c is the champion already\n")
    assert len(registry.history()) == 4
    code, text = run(capsys, "promote", "d", "--url", registry.url)
    assert (code, champion_of(registry)) == (1, "c")
    assert "version 'd' must be in" in text
    assert run(capsys, "rollback", "--url", registry.url) == (0, "champion: c -> b\n")


def test_the_first_champion_can_be_named_by_hand(url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    student = write_student(tmp_path / "student")
    Registry(url).add(version_of(student, "a"), student)
    assert run(capsys, "promote", "a", "--url", url) == (0, "champion: none -> a\n")
    assert champion_of(Registry(url)) == "a"


@pytest.mark.parametrize(("arguments", "name"), [((), "b"), (("c",), "c")])
def test_fetch_copies_the_champion_or_another(
    registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str], arguments: tuple[str, ...], name: str
) -> None:
    target = tmp_path / "target"
    assert run(capsys, "fetch", *arguments, "--to", str(target), "--url", registry.url) == (0, f"{name}: {target}\n")
    assert files_below(target) == files_below(tmp_path / name / "model")


def test_fetch_overwrites_nothing(registry: Registry, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    code, text = run(capsys, "fetch", "a", "--to", str(tmp_path / "b"), "--url", registry.url)
    assert code == 1
    assert f"{tmp_path / 'b'} must be a new or empty folder" in text
    (tmp_path / "file").write_text("")
    code, text = run(capsys, "fetch", "a", "--to", str(tmp_path / "file" / "target"), "--url", registry.url)
    assert (code, text.count("\n")) == (1, 1)
    assert "Not a directory" in text


@pytest.mark.parametrize("command", [["show"], ["history"], ["rollback"], ["promote", "a"], ["fetch", "--to", "x"]])
def test_an_empty_registry_is_no_traceback(
    url: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    code, text = run(capsys, *command, "--url", url)
    assert code == (0 if command[0] in ("show", "history") else 1)
    assert command[0] != "show" or "There is no champion yet." in text
    assert code == 0 or text.startswith("error: ")
    assert list(tmp_path.iterdir()) == []


def test_the_place_comes_from_the_configuration(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    fill(str(tmp_path / "mine"), tmp_path)
    config = tmp_path / "my.toml"
    config.write_text('[publish]\nurl = "mine"\n')
    assert run(capsys, "rollback", "--config", str(config)) == (0, "champion: b -> a\n")
    config.write_text("[publish]\nurl = 3\n")
    code, text = run(capsys, "show", "--config", str(config))
    assert code == 1
    assert "publish.url" in text


# --- lakeFS ---------------------------------------------------------------------------------------------------------


@pytest.fixture
def lakefs(monkeypatch: pytest.MonkeyPatch) -> Iterator[LakeFSStandIn]:
    with LakeFSStandIn() as stand_in:
        for name, value in stand_in.environment.items():
            monkeypatch.setenv(name, value)
        stand_in.create("vision")
        yield stand_in


@pytest.fixture
def commits(lakefs: LakeFSStandIn) -> tuple[str, str]:
    """Commits of two runs in lakeFS."""
    repository = LakeFSRepo("vision")
    made = []
    for name in ("run-a", "run-b"):
        repository.branch(name, "main")
        lakefs.stage("vision", name, "vzero/model/model.safetensors", name.encode())
        made.append(repository.commit(name, f"outputs of {name}", {}))
    repository.tag("champion", made[1])
    return made[0], made[1]


def config_with_lakefs(tmp_path: Path, *, publish: bool = True) -> str:
    path = tmp_path / "my.toml"
    path.write_text(
        f'[publish]\nurl = "published"\n[outputs]\nrepository = "vision"\npublish = {str(publish).lower()}\n'
    )
    return str(path)


def test_the_tag_in_lakefs_follows_the_champion(
    url: str, commits: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(url, tmp_path, (*commits, None))
    config = config_with_lakefs(tmp_path)
    repository = LakeFSRepo("vision")
    expected = f"champion: b -> a\nlakeFS: the tag champion names commit {commits[0]}\n"
    assert run(capsys, "rollback", "--config", config) == (0, expected)
    assert repository.pin("champion") == commits[0]
    run(capsys, "promote", "b", "--config", config)
    assert repository.pin("champion") == commits[1]
    code, text = run(capsys, "promote", "c", "--config", config)
    assert code == 0
    assert "lakeFS: c has no commit there; the tag champion stays where it is" in text
    assert repository.pin("champion") == commits[1]


def test_a_tag_that_was_not_moved_is_moved_by_the_same_command_again(
    url: str, lakefs: LakeFSStandIn, commits: tuple[str, str], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    registry = fill(url, tmp_path, (*commits, None))
    config = config_with_lakefs(tmp_path)
    lakefs.refuse_next = [403]
    code, text = run(capsys, "promote", "a", "--config", config)
    assert code == 1
    assert "lakeFS must let tag 'champion' name commit" in text
    assert champion_of(registry) == "a"
    assert LakeFSRepo("vision").pin("champion") == commits[1]
    assert run(capsys, "promote", "a", "--config", config)[0] == 0
    assert LakeFSRepo("vision").pin("champion") == commits[0]
    assert len(registry.history()) == 4


def test_without_publish_or_without_keys_nothing_moves_in_lakefs(
    url: str,
    commits: tuple[str, str],
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    registry = fill(url, tmp_path, (*commits, None))
    assert run(capsys, "rollback", "--config", config_with_lakefs(tmp_path, publish=False))[1] == "champion: b -> a\n"
    assert LakeFSRepo("vision").pin("champion") == commits[1]
    monkeypatch.delenv("LAKECTL_CREDENTIALS_SECRET_ACCESS_KEY")
    code, text = run(capsys, "promote", "b", "--config", config_with_lakefs(tmp_path))
    assert code == 1
    assert "set it in the environment" in text
    # Told before anything was moved.
    assert champion_of(registry) == "a"


@pytest.mark.s3
@pytest.mark.usefixtures("seaweed")
def test_all_commands_work_on_a_bucket(
    seaweed: SeaweedServer, s3_url: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    fill(s3_url, tmp_path)
    assert "champion: b" in run(capsys, "show", "--url", s3_url)[1]
    assert run(capsys, "rollback", "--url", s3_url) == (0, "champion: b -> a\n")
    assert run(capsys, "history", "--url", s3_url)[1].count("   champion: ") == 4
    assert run(capsys, "fetch", "--to", str(tmp_path / "target"), "--url", s3_url)[0] == 0
    assert files_below(tmp_path / "target") == files_below(tmp_path / "a" / "model")
