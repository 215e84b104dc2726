"""What is printed at the end of a run, and what of it stands on the dashboard."""

import json
from pathlib import Path
from typing import Any

import pytest
from support.run_artifacts import Run

from flows.config import LAPTOP, RunConfig
from flows.summary import (
    Change,
    Published,
    RunResult,
    Score,
    StageTime,
    print_result,
    show_report,
    show_round,
    show_run,
    show_scores,
)
from tasks.artifacts import ArtifactRef

NOT_PUBLISHED = Published(version=None, champion=None, reason=None, commit=None)
NOISE = Change(benchmark="held-out", difference=0.1, low=-0.05, high=0.251, p_value=0.2, verdict="inside the noise")
NOISE_LINE = "held-out: +10.0 points (-5.0 .. +25.1), p = 0.200: inside the noise, no change is shown"


class Shown:
    """A board that keeps what is put on it, as the server would."""

    artifacts: dict[str, tuple[str, Any, str]]

    def __init__(self, *keys: str) -> None:
        self.keys = keys

    def data(self, key: str) -> Any:
        assert key in self.keys
        return self.artifacts[key][1] if key in self.artifacts else None

    def put(self, kind: str, key: str, data: Any, description: str) -> None:
        assert key in self.keys
        self.artifacts[key] = (kind, data, description)


@pytest.fixture
def shown(monkeypatch: pytest.MonkeyPatch) -> dict[str, tuple[str, Any, str]]:
    monkeypatch.setattr(Shown, "artifacts", {}, raising=False)
    monkeypatch.setattr("flows.summary.Board", Shown)
    return Shown.artifacts


def test_a_run_without_questions_says_which_round_it_chose(capsys: pytest.CaptureFixture[str]) -> None:
    print_result(result(), 12.0)
    assert "The student is that of round 20." in capsys.readouterr().out


def test_a_comparison_stands_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    print_result(result(NOISE), 12.0)
    assert NOISE_LINE in capsys.readouterr().out.splitlines()


def test_a_published_student_is_named(capsys: pytest.CaptureFixture[str]) -> None:
    published = Published(version="a-1", champion="b-2", reason="not better", commit=None)
    print_result(result(published=published), 12.0)
    assert "version: a-1, not champion: not better" in capsys.readouterr().out.splitlines()


def test_a_runs_beginning_names_data_and_weights(shown: dict[str, tuple[str, Any, str]], tmp_path: Path) -> None:
    run = Run(tmp_path)
    source = {"kind": "parquet", "path": "https://me:secret@host/a|b.parquet"}
    config = RunConfig.model_validate({"data": {"source": source}, "publish": {"url": None}})
    show_run(config, context(run), data="v7", student=run.student, teacher=run.teacher, parent="a-1")
    kind, text, line = shown["run"]
    assert kind == "markdown"
    rows = dict(row.strip("| ").split(" | ", 1) for row in text.splitlines() if row.startswith("| ") and row != "| | |")
    assert rows["data"] == "parquet: `https://host/a\\|b.parquet`"
    assert rows["version of the data"] == "`v7`"
    student, teacher = (run.store.manifest(ref).job["weights"][:12] for ref in (run.student, run.teacher))
    assert rows["student"] == f"published version `a-1`, weights `{student}`, float32, transformers"
    assert rows["teacher"] == f"`embedded:teacher`, weights `{teacher}`, float32, transformers"
    assert rows["rounds"] == "60, of 32 prompts with 8 responses each"
    assert rows["store"] == f"`{run.store.url}`"
    assert "published to" not in rows
    assert "secret" not in text + line


def context(run: Run) -> Any:
    """The part of a RunContext that is shown."""

    class Context:
        store = run.store
        benchmarks = run.benchmarks

    return Context


def test_rounds_follow_each_other_and_one_that_is_made_again_takes_its_place(
    shown: dict[str, tuple[str, Any, str]], tmp_path: Path
) -> None:
    run = Run(tmp_path, num_rounds=3)
    first, second, third = run.job.rounds
    for refs in (first, second, third, second):
        show_round(run.store, refs)
        rows = json.loads(shown["rounds"][1])
        assert [row["round"] for row in rows] == list(range(refs.round, 0, -1))
    assert shown["rounds"][2].startswith("Round 2 took ")
    assert rows[0]["effective share"] == 0.7
    # Of the figures that every round of these has, none is missing; what none has is no column.
    assert {"gate", "loss", "support", "seconds", "length"} <= rows[0].keys()
    assert all(value is not None for row in rows for value in row.values())


def test_a_rounds_gate_is_judged_in_words(shown: dict[str, tuple[str, Any, str]], tmp_path: Path) -> None:
    run = Run(tmp_path)
    show_round(run.store, run.job.rounds[-1])
    _, text, line = shown["gate"]
    assert line == "Round 2: healthy"
    assert text.startswith("**Round 2: healthy.**")
    assert "| effective sample share | 0.7 | between a third and 99% |" in text.splitlines()


def test_a_long_run_shows_its_last_rounds(
    shown: dict[str, tuple[str, Any, str]], tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("flows.summary._NUM_SHOWN_ROUNDS", 2)
    run = Run(tmp_path, num_rounds=3)
    for refs in run.job.rounds:
        show_round(run.store, refs)
    assert [row["round"] for row in json.loads(shown["rounds"][1])] == [3, 2]


def test_scores_stand_with_their_intervals_and_changes(shown: dict[str, tuple[str, Any, str]]) -> None:
    score = Score(benchmark="held-out", label="before", accuracy=0.5, low=0.4, high=0.6, num_questions=40)
    show_scores([score], [NOISE], ["a note"])
    kind, text, line = shown["result"]
    assert kind == "markdown"
    assert "| held-out | before | 50.0% | 40.0% to 60.0% | 40 |" in text.splitlines()
    assert text.splitlines()[-2:] == ["- a note", f"- {NOISE_LINE}"]
    assert line == f"a note; {NOISE_LINE}"


def test_what_was_not_measured_is_said(shown: dict[str, tuple[str, Any, str]]) -> None:
    show_scores([])
    assert shown["result"][1].strip() == "No accuracy was measured."


def test_cost_is_added_up_and_the_dearest_stage_stands_first(shown: dict[str, tuple[str, Any, str]]) -> None:
    cheap = StageTime(
        stage="gate", num_artifacts=2, num_reused=1, seconds=0.5, cpu_seconds=None, gpu_seconds=None, num_tokens=None
    )
    dear = StageTime(
        stage="view_shard", num_artifacts=3, num_reused=0, seconds=95.26, cpu_seconds=7, gpu_seconds=30, num_tokens=1200
    )
    show_report(result(stages=[cheap, dear]), LAPTOP)
    kind, data, line = shown["cost"]
    rows = json.loads(data)
    assert kind == "table"
    assert [row["stage"] for row in rows] == ["total", "view shard", "gate"]
    assert list(rows[0].values()) == ["total", 5, 1, 95.8, 7, 30, 1200]
    assert rows[2]["CPU seconds"] is None
    assert line.startswith("1 min 36 s, 30 s of GPU time, 1,200 tokens;")


@pytest.mark.parametrize(
    ("url", "report", "link"),
    [
        ("/a/store", "/a/store/report/k/x/report.html", "https://files.example/v/report/k/x/report.html"),
        ("/a/store/", "/a/store/report/k/x/report.html", "https://files.example/v/report/k/x/report.html"),
        ("s3://b/p q", "s3://b/p q/report/k/x y/report.html", "https://files.example/v/report/k/x%20y/report.html"),
    ],
)
def test_the_report_is_a_link_where_a_browser_finds_the_store(
    shown: dict[str, tuple[str, Any, str]], url: str, report: str, link: str
) -> None:
    config = RunConfig.model_validate({"store": {"url": url, "web_url": "https://files.example/v/"}})
    show_report(result(report=report), config)
    assert shown["report"][1].splitlines()[0] == f"[report.html]({link})"
    assert report in shown["report"][1].splitlines()


def test_the_report_is_a_path_to_copy_where_it_does_not(shown: dict[str, tuple[str, Any, str]]) -> None:
    show_report(result(report="/a/store/report.html"), LAPTOP)
    text = shown["report"][1]
    assert "/a/store/report.html" in text.splitlines()
    assert "](" not in text


def result(
    *changes: Change,
    stages: list[StageTime] | None = None,
    report: str = "report.html",
    published: Published = NOT_PUBLISHED,
) -> RunResult:
    return RunResult(
        scores=[],
        changes=list(changes),
        stages=stages or [],
        chosen_round=20,
        policy=ArtifactRef(stage="train", key="k", digest="d"),
        checkpoint="model",
        report=report,
        data_docs="data-docs.html",
        published=published,
    )
