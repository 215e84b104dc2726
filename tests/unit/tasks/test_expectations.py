"""Every expectation finds the row it is meant for and says what to do; the Data Docs fetch nothing."""

import re
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from tasks.adapters.expectations import Judgement, data_docs, judge
from tasks.adapters.row_facts import Limits, RowFacts
from vzero_core.errors import InputError
from vzero_core.views import Box, clip_box

LIMITS = Limits(region_required=True, max_region_share=0.5, max_student_tokens=100, max_teacher_tokens=200)
GOOD: dict[str, Any] = {
    "id": "a",
    "question": "what?",
    "image": "a.png",
    "width": 100,
    "height": 50,
    "x1": 10.0,
    "y1": 10.0,
    "x2": 30.0,
    "y2": 20.0,
    "region_share": 0.04,
    "has_evidence": True,
    "student_tokens": 100,
    "positive_tokens": 200,
    "negative_tokens": 200,
    "source": "s",
    "license": "CC0",
}


def run(*changes: dict[str, Any], limits: Limits = LIMITS) -> Judgement:
    rows = [RowFacts(row=1, **GOOD)]
    rows += [RowFacts(row=number, **(GOOD | change)) for number, change in enumerate(changes, start=2)]
    return judge(rows, limits)


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"problem": "image x.png must exist"}, "image x.png must exist"),
        ({"same_id_as_row": 1}, "id must be unique, but row 1 has it too; rename"),
        ({"question": " \n"}, "question must be a text that is not empty"),
        ({"special_token": "<image>"}, "must not hold special tokens of the models, got '<image>'"),
        ({"x1": 30.0, "x2": 10.0}, "box must be xyxy with x1 < x2 and y1 < y2"),
        ({"y2": 10.0}, "box must be xyxy with x1 < x2 and y1 < y2"),
        ({"x1": 100.0, "x2": 120.0}, "box must meet the 100x50 image"),
        ({"y1": -9.0, "y2": 0.0}, "box must meet the 100x50 image"),
        ({"region_share": 0.51}, r"region must cover at most 50% of the image .*, got 51%"),
        ({"same_as_row": 1}, "row 1 has the same picture and question"),
        ({"overlap": "bench.jsonl row 7"}, "must not be in evaluation data, but it is that of bench.jsonl row 7"),
        ({"crop_problem": "no such place"}, "no such place"),
        ({"student_tokens": 101}, r"at most 100 tokens \(student\), got 101"),
        ({"positive_tokens": 201}, r"at most 200 tokens \(teacher, relevant crop\), got 201"),
        ({"negative_tokens": 201}, r"at most 200 tokens \(teacher, irrelevant crop\), got 201"),
        ({"has_evidence": False}, "must have a region, or both crops"),
    ],
)
def test_each_expectation_sets_its_row_aside(change: dict[str, Any], reason: str) -> None:
    judgement = run(change)
    assert list(judgement.reasons) == [2]
    assert re.search(reason, judgement.reasons[2])
    assert [finding.num_rows for finding in judgement.findings if finding.severity == "critical"].count(1) == 1


@pytest.mark.parametrize(
    ("change", "name"),
    [
        ({"x2": 101.0}, "box needs no clipping"),
        ({"source": None}, "source is named"),
        ({"license": None}, "licence is named"),
    ],
)
def test_a_warning_is_counted_and_sets_nothing_aside(change: dict[str, Any], name: str) -> None:
    judgement = run(change)
    assert judgement.reasons == {}
    assert [(finding.name, finding.severity) for finding in judgement.findings if finding.num_rows] == [
        (name, "warning")
    ]


def test_all_reasons_of_a_row_are_given_and_good_rows_have_none() -> None:
    judgement = run({"question": "", "same_id_as_row": 1}, {})
    assert list(judgement.reasons) == [2]
    assert judgement.reasons[2].count(";") >= 1
    assert "unique" in judgement.reasons[2]
    assert "empty" in judgement.reasons[2]


def test_what_is_not_known_or_not_limited_is_not_judged() -> None:
    nothing: dict[str, Any] = dict.fromkeys(set(GOOD) - {"id", "question", "has_evidence"})
    limits = Limits(region_required=False, max_region_share=0.5, max_student_tokens=None, max_teacher_tokens=None)
    judgement = run(nothing | {"has_evidence": False}, {"student_tokens": 10**6}, limits=limits)
    assert judgement.reasons == {}


def test_a_single_row_without_any_value_is_judged() -> None:
    judgement = judge([RowFacts(row=7, id="a", question="q", problem="image a must exist")], LIMITS)
    assert list(judgement.reasons) == [7]


sides = st.integers(-20, 120).map(float)


@settings(max_examples=15)
@given(st.lists(st.tuples(sides, sides, sides, sides), min_size=1, max_size=40))
def test_the_box_expectation_agrees_with_clip_box(boxes: list[tuple[float, float, float, float]]) -> None:
    def usable(box: Box) -> bool:
        try:
            clip_box(box, 100, 50)
        except InputError:
            return False
        return True

    judgement = run(*({"x1": x1, "y1": y1, "x2": x2, "y2": y2} for x1, y1, x2, y2 in boxes))
    assert set(judgement.reasons) == {row for row, box in enumerate(boxes, start=2) if not usable(Box(*box))}


def test_data_docs_show_what_failed_and_fetch_nothing() -> None:
    page = data_docs(run({"question": ""}, {"overlap": "bench.jsonl row 7"}).result)
    assert "Question is not empty" in page
    assert "Image is in no evaluation data" in page
    assert not re.search(r"""(src|href)\s*=\s*["']?(https?:)?//""", page)
    assert "<script" not in page
    assert "@import" not in page
