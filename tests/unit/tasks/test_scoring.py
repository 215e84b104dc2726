"""Scores are those of the kits on the same responses; nothing in a response can do harm."""

import json
import os
import random
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.adapters.evaluation import outcomes
from tasks.adapters.math_answers import same_answer
from tasks.adapters.scoring import Scored, check_aggregate, check_protocol, default_aggregate, needs_judge, score
from tasks.adapters.statistics import estimate
from tasks.artifacts import EvaluationSample, ImageRef, Score
from tasks.evaluation_config import BenchmarkKind, ExactProtocol, Protocol, VLMEvalKitProtocol, ZwzProtocol
from vzero_core.errors import InputError

GOLDEN: dict[str, Any] = json.loads((Path(__file__).parent / "data" / "kit_scores.json").read_text(encoding="utf-8"))
"""What the kits' own functions gave; its entry `made` says how."""
COLOURS = ("red", "blue", "green", "yellow")
EXACT, ZWZ, KIT = ExactProtocol(), ZwzProtocol(), VLMEvalKitProtocol()
PROTOCOLS: tuple[Protocol, ...] = (EXACT, ZWZ, KIT)
PIECES = st.sampled_from(
    (
        *(
            "A",
            "B",
            "(C)",
            "d",
            "red",
            "BLUE",
            "answer is ",
            "Answer: ",
            "<answer>",
            "</answer>",
            "Z",
            "é",
            "红",
            "=",
            "$",
        ),
        *("\\frac", "\\sqrt", "\\text{ ", "\\", "{", "}", "(", ")", "\n", " ", ".", ",", "**", "^", "/"),
        *("1", "23", "0.5", "1,000", "é", "红", "=", "$"),
    )
)
RESPONSES = st.one_of(st.lists(PIECES, max_size=12).map("".join), st.text(max_size=60))


def make_sample(answer: str, options: tuple[str, ...] | None = COLOURS, **more: Any) -> EvaluationSample:
    image = ImageRef.model_construct(uri="a.png")
    return EvaluationSample.model_construct(
        **{"id": "q", "image": image, "question": "Which?", "answer": answer, "options": options, **more}
    )


def tagged(text: str) -> str:
    return f"I think.\n<answer>{text}</answer>"


# --- the kits ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("case", GOLDEN["vlmevalkit"], ids=lambda case: repr(case["response"])[:40])
def test_letters_are_those_of_vlmevalkit(case: dict[str, Any]) -> None:
    options = tuple(case["options"])
    for answer in "ABCDEF"[: len(options)]:
        scored = score("hr_bench_4k", KIT, case["response"], make_sample(answer, options))
        assert scored == (case["letter"], case["letter"] == answer)


@pytest.mark.parametrize("case", GOLDEN["mme_realworld"], ids=lambda case: repr(case["response"])[:40])
def test_letters_are_those_of_vlmevalkits_own_evaluator_for_mme_realworld(case: dict[str, Any]) -> None:
    scored = score("mme_realworld", KIT, case["response"], make_sample("C", (*COLOURS, "none")))
    assert scored == (case["letter"], case["letter"] == "C")


@pytest.mark.parametrize("case", GOLDEN["zwz_choice"], ids=lambda case: repr(case["response"])[:40])
def test_choices_are_judged_as_by_zwz(case: dict[str, Any]) -> None:
    scored = score("vstar", ZWZ, case["response"], make_sample(case["answer"]))
    assert scored == (case["letter"], case["correct"])


@pytest.mark.parametrize("case", GOLDEN["zwz_open"], ids=lambda case: repr(case["response"])[:40])
def test_open_answers_are_judged_as_by_zwz(case: dict[str, Any]) -> None:
    scored = score("zoombench", ZWZ, case["response"], make_sample(case["answer"], None))
    assert scored == (case["text"] if case["text"].strip() else None, case["correct"])


@pytest.mark.parametrize(("kind", "golden"), GOLDEN["aggregates"].items())
def test_aggregates_are_those_of_vlmevalkit(kind: BenchmarkKind, golden: dict[str, Any]) -> None:
    samples, scores = [], []
    for number, row in enumerate(golden["rows"]):
        samples.append(
            make_sample(
                "A",
                id=str(number),
                group=str(row.get("question", number)),
                cycle=row.get("cycle"),
                category=row["category"],
                subcategory=row.get("subcategory"),
            )
        )
        scores.append(Score(sample_id=str(number), seed=0, extracted=None, answer="A", correct=row["correct"]))
    result = estimate(outcomes(samples, scores, default_aggregate(kind, KIT)))
    assert result.value == pytest.approx(golden["score"], rel=1e-14)


def test_the_made_up_cycles_tell_the_aggregates_apart() -> None:
    rows = GOLDEN["aggregates"]["hr_bench_4k"]["rows"]
    mean = sum(row["correct"] for row in rows) / len(rows)
    assert abs(mean - GOLDEN["aggregates"]["hr_bench_4k"]["score"]) > 0.001


@pytest.mark.parametrize(
    ("kind", "protocol", "expected"),
    [
        ("hr_bench_4k", KIT, "cycles"),
        ("hr_bench_8k", KIT, "cycles"),
        ("hr_bench_8k", EXACT, "cycles"),
        ("hr_bench_4k", ZWZ, "rows"),
        ("mmstar", KIT, "rows"),
        ("vstar", KIT, "rows"),
        ("mme_realworld", KIT, "rows"),
        ("zoombench", ZWZ, "rows"),
        ("jsonl", EXACT, "rows"),
    ],
)
def test_the_aggregate_is_that_of_the_protocol(kind: BenchmarkKind, protocol: Protocol, expected: str) -> None:
    assert default_aggregate(kind, protocol) == expected


def test_an_aggregate_needs_the_parts_that_it_is_a_mean_of() -> None:
    whole = make_sample("A", cycle="1", category=None, subcategory="x")
    for aggregate in ("rows", "cycles", "categories"):
        check_aggregate(aggregate, [whole])
    bare = make_sample("A", id="q7", cycle=None, category=None, subcategory=None)
    check_aggregate("rows", [bare])
    with pytest.raises(InputError, match="no cycles, got cycles with question q7, which has none; change"):
        check_aggregate("cycles", [whole, bare])
    with pytest.raises(InputError, match="no categories, got categories with question q7"):
        check_aggregate("categories", [whole, bare])


def test_zoombenchs_choices_are_no_choice_set_of_zwz() -> None:
    # mm-eval's list of choice sets lacks it: only the very letter is equal, all else goes to its judge.
    assert score("zoombench", ZWZ, tagged("A"), make_sample("A")) == ("A", True)
    assert score("zoombench", ZWZ, tagged("A. red"), make_sample("A")) == ("A. red", False)
    assert score("vstar", ZWZ, tagged("A. red"), make_sample("A")) == ("A", True)


def test_vlmevalkit_knows_no_open_question() -> None:
    check_protocol(KIT, [make_sample("A")])
    check_protocol(ZWZ, [make_sample("A"), make_sample("12", None)])
    for refused in (
        lambda: check_protocol(KIT, [make_sample("A"), make_sample("12", None, id="q7")]),
        lambda: score("zoombench", KIT, "12", make_sample("12", None, id="q7")),
    ):
        with pytest.raises(InputError, match=r"must be exact or zwz .* question q7"):
            refused()


# --- exact ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "letter"),
    [
        ("B", "B"),
        ("(B)", "B"),
        ("B.", "B"),
        (" b ", "B"),
        ("(b).", "B"),
        ("blue", "B"),
        ("Blue.", "B"),
        ("B. blue", None),
        ("E", None),
        ("light blue", None),
        ("", None),
        ("A or B", None),
    ],
)
def test_a_choice_is_its_letter_or_its_text(text: str, letter: str | None) -> None:
    assert score("jsonl", EXACT, tagged(text), make_sample("B")) == (letter, letter == "B")


def test_an_option_that_stands_twice_is_not_chosen_by_its_text() -> None:
    assert score("jsonl", EXACT, tagged("red"), make_sample("A", ("red", "Red", "blue"))) == (None, False)


def test_a_letter_comes_before_an_options_text() -> None:
    assert score("jsonl", EXACT, tagged("B"), make_sample("A", ("B", "A"))) == ("B", False)


@pytest.mark.parametrize(
    ("text", "answer", "correct"),
    [
        ("STOP", "stop.", True),
        (" Stop.. ", "STOP", True),
        ("stop it", "STOP", False),
        ("1,000", "1000", False),
        ("Straße", "STRASSE", True),
    ],
)
def test_an_open_answer_is_equal_but_for_case_and_a_full_stop(text: str, answer: str, correct: bool) -> None:
    protocol = ExactProtocol(answer_pattern="<answer>(.*?)</answer>")
    assert score("jsonl", protocol, tagged(text), make_sample(answer, None)) == (text.strip(), correct)


def test_the_last_match_counts_and_lines_do_not_end_it() -> None:
    assert score("jsonl", EXACT, tagged("red") + tagged("\nA\n"), make_sample("A")) == ("A", True)
    assert score("jsonl", EXACT, "A", make_sample("A")) == (None, False)


def test_a_group_that_found_nothing_is_no_answer() -> None:
    protocol = ExactProtocol(answer_pattern=r"answer(?: is (\w+))?")
    assert score("jsonl", protocol, "the answer", make_sample("A", None)) == (None, False)
    assert score("jsonl", ExactProtocol(answer_pattern="<a>(.*?)</a>"), "<a> </a>", make_sample("", None)) == (
        None,
        False,
    )


# --- any response -----------------------------------------------------------------------------------------------------


@given(response=RESPONSES, answer=st.sampled_from("ABCD"))
def test_a_choice_is_right_exactly_where_its_letter_is(response: str, answer: str) -> None:
    for protocol in PROTOCOLS:
        for kind in ("vstar", "mme_realworld"):
            scored = score(kind, protocol, response, make_sample(answer))
            assert scored.correct == (scored.extracted == answer)
            assert scored.extracted is None or (len(scored.extracted) == 1 and scored.extracted.isupper())
            assert not needs_judge(kind, protocol, make_sample(answer), scored)


@given(response=RESPONSES, answer=st.sampled_from("ABCD"), seed=st.integers(0, 99))
def test_vlmevalkits_letter_does_not_depend_on_the_right_one(response: str, answer: str, seed: int) -> None:
    other = random.Random(seed).choice("ABCD")
    assert (
        score("mmstar", KIT, response, make_sample(answer)).extracted
        == score("mmstar", KIT, response, make_sample(other)).extracted
    )


@given(answer=st.text(max_size=30))
def test_every_answer_is_equal_to_itself(answer: str) -> None:
    assert same_answer(answer, answer)


@given(answer=RESPONSES, response=RESPONSES)
def test_any_two_texts_can_be_compared(answer: str, response: str) -> None:
    assert same_answer(answer, response) in (True, False)


@given(number=st.integers(-(10**8), 10**8), unit=st.sampled_from(["", "%", " cm", " hours", ".0", "\n", "$"]))
def test_numbers_are_equal_however_they_are_written(number: int, unit: str) -> None:
    assert same_answer(str(number), f"{number:,}{unit}")
    assert same_answer(f"{number:,}", f"{number}{unit}")
    assert not same_answer(str(number), f"{number + 1}{unit}")


@given(top=st.integers(1, 99), bottom=st.sampled_from([2, 4, 5, 8, 10, 16, 20, 25, 50]))
def test_a_fraction_is_equal_to_its_decimal_number(top: int, bottom: int) -> None:
    # 8/4 is not 2 and 4/8 is not 1/2: a whole number must be written as one, a fraction be the same.
    assert same_answer(f"{top}/{bottom}", f"{top / bottom}") == (top % bottom != 0)
    assert not same_answer(f"{top}/{bottom}", f"{2 * top}/{2 * bottom}")


@pytest.mark.parametrize(
    "response",
    [
        "9**9**9**9",
        "(9**64)**64**64",
        "99999999999!",
        "((((" * 500,
        "(" * 90 + "1.5" + ")" * 90,
        "1/0",
        "2.5**99999999",
        "1e999",
        "0.0**-1",
        "(-8)**0.5",
        "__import__('os')._exit(3)",
        "f'{0:>999999999}'",
        "9" * 5000 + ".5",
        "\\frac" * 300,
        "\\sqrt" * 300,
        "\\frac{" * 300,
        "\x00",
        "\ud800",
    ],
)
def test_nothing_in_a_response_is_run_or_fills_the_memory(response: str) -> None:
    assert not same_answer("2.25", response)
    assert not same_answer("2.25", f"({response})")
    for protocol in PROTOCOLS:
        assert not score("vstar", protocol, tagged(response), make_sample("E")).correct


def test_a_sum_is_calculated_unless_it_is_very_long() -> None:
    assert same_answer("2.25", "2.25" + "+0" * 50)
    assert not same_answer("2.25", "2.25" + "+0" * 150)


# --- the judge's share ------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("kind", "protocol", "options", "scored", "expected"),
    [
        ("zoombench", ZWZ, None, Scored("three", False), True),
        ("jsonl", EXACT, None, Scored("three", False), True),
        ("zoombench", ZWZ, COLOURS, Scored("A. red", False), True),
        ("zoombench", ZWZ, None, Scored("3", True), False),
        ("zoombench", ZWZ, None, Scored(None, False), False),
        ("zoombench", EXACT, COLOURS, Scored("B", False), False),
        ("vstar", ZWZ, COLOURS, Scored("B", False), False),
        ("vstar", KIT, COLOURS, Scored("B", False), False),
    ],
)
def test_a_judge_is_asked_about_texts_that_are_not_equal(
    kind: BenchmarkKind, protocol: Protocol, options: tuple[str, ...] | None, scored: Scored, expected: bool
) -> None:
    assert needs_judge(kind, protocol, make_sample("A", options), scored) is expected


def test_a_setting_of_the_kit_changes_nothing(monkeypatch: pytest.MonkeyPatch) -> None:
    # With VERBOSE the kit takes an A in more than three words for an article.
    assert "VERBOSE" not in os.environ
    before = score("vstar", KIT, "I would say A", make_sample("A"))
    monkeypatch.setenv("VERBOSE", "1")
    assert score("vstar", KIT, "I would say A", make_sample("A")) == before == ("A", True)
