"""What is printed at the end of a run."""

import pytest

from flows.summary import Change, RunResult, print_result
from tasks.artifacts import ArtifactRef


def test_a_run_without_questions_says_which_round_it_chose(capsys: pytest.CaptureFixture[str]) -> None:
    print_result(result(), 12.0)
    assert "The student is that of round 20." in capsys.readouterr().out


def test_a_comparison_stands_in_one_line(capsys: pytest.CaptureFixture[str]) -> None:
    change = Change(
        benchmark="held-out", difference=0.1, low=-0.05, high=0.251, p_value=0.2, verdict="inside the noise"
    )
    print_result(result(change), 12.0)
    line = "held-out: +10.0 points (-5.0 .. +25.1), p = 0.200: inside the noise, no change is shown"
    assert line in capsys.readouterr().out.splitlines()


def result(*changes: Change) -> RunResult:
    return RunResult(
        scores=[],
        changes=list(changes),
        stages=[],
        chosen_round=20,
        policy=ArtifactRef(stage="train", key="k", digest="d"),
        checkpoint="model",
        report="report.html",
        data_docs="data-docs.html",
        commit=None,
    )
