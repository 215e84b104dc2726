"""`python -m flows.report` on runs that were never computed: their artefacts are written by hand."""

from pathlib import Path

import pytest
from support.run_artifacts import Run

from flows.report import main
from tasks.artifacts import ArtifactRef
from vzero_core.config import NoGateConfig


@pytest.fixture
def run(tmp_path: Path) -> Run:
    return Run(tmp_path / "run", name="first", num_rounds=1)


@pytest.fixture
def ref(run: Run) -> ArtifactRef:
    return run.report()


def build(run: Run, *arguments: str | Path) -> int:
    return main([*map(str, arguments), "--store", run.store.url])


def test_a_run_by_its_name_gives_the_page_that_its_flow_made(
    run: Run, ref: ArtifactRef, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    assert build(run, "first") == 0
    assert capsys.readouterr().out == "wrote first.html\n"
    assert (tmp_path / "first.html").read_bytes() == run.store.read(ref, "report.html")
    assert 'alt="full image"' in (tmp_path / "first.html").read_text(), "pictures are found by the run's configuration"


def test_a_run_by_its_key_and_another_file_which_is_replaced(
    run: Run, ref: ArtifactRef, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    target = tmp_path / "page.html"
    target.write_text("older")
    assert build(run, ref.key[:6], "--output", target) == 0
    assert capsys.readouterr().out == f"replaced {target}\n"
    assert target.read_bytes() == run.store.read(ref, "report.html")


def test_of_several_runs_of_one_name_the_latest(run: Run, ref: ArtifactRef, tmp_path: Path) -> None:
    later = Run(tmp_path / "run", name="first", num_rounds=2)
    latest = later.report()
    target = tmp_path / "page.html"
    assert build(run, "first", "--output", target) == 0
    assert target.read_bytes() == run.store.read(latest, "report.html") != run.store.read(ref, "report.html")


@pytest.mark.usefixtures("ref")
def test_two_runs(run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Run(tmp_path / "run", NoGateConfig(), name="second", num_rounds=1, num_correct=(5, 18)).report()
    monkeypatch.chdir(tmp_path)
    assert build(run, "second", "--against", "first") == 0
    page = (tmp_path / "second-against-first.html").read_text()
    assert "<h1>first and second</h1>" in page
    assert "+15.0 points" in page, "18 of 20 less 15 of 20: the run against the other, not the other way round"


@pytest.mark.usefixtures("ref")
def test_an_unknown_run_is_answered_with_those_there_are(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert build(run, "frist") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: RUN must be the name of a run")
    assert f"first ({run.job.key[:12]})" in error
    assert "Traceback" not in error
    assert build(run, "first", "--against", "zzz") == 1
    assert "'zzz'" in capsys.readouterr().err


def test_digits_that_fit_several_runs_are_refused(
    run: Run, ref: ArtifactRef, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    Run(tmp_path / "run", name="second", num_rounds=1).report()
    assert build(run, "") == 1
    error = capsys.readouterr().err
    assert "several begin so" in error
    assert f"first ({ref.key[:12]})" in error
    assert "second (" in error


def test_a_store_without_runs(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["any", "--store", str(tmp_path / "empty")]) == 1
    assert "must hold the report of a run, but has none" in capsys.readouterr().err


@pytest.mark.parametrize(("stage", "field"), [("report", "docs"), ("evaluate", "protocol")])
@pytest.mark.usefixtures("ref")
def test_a_run_of_another_version_is_refused(
    run: Run, stage: str, field: str, capsys: pytest.CaptureFixture[str]
) -> None:
    for place in (Path(run.store.url) / stage).glob("*/manifest.json"):
        place.write_text(place.read_text().replace(f'"{field}"', '"former"'))
    assert build(run, "first") == 1
    error = capsys.readouterr().err
    assert error.startswith("error: what a run made must have the form of this version")
    assert "Traceback" not in error


@pytest.mark.usefixtures("ref")
def test_a_file_that_cannot_be_written(run: Run, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert build(run, "first", "--output", tmp_path / "no" / "page.html") == 1
    assert "--output must be a file that can be written" in capsys.readouterr().err
