"""Near pictures and equal questions are found as a plain double loop finds them."""

import random

import pytest

from tasks.adapters.duplicates import first_same, nearest, normalise_question


def distance(first: str, second: str) -> int:
    return (int(first, 16) ^ int(second, 16)).bit_count()


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ("What is it?", "what is  it"),
        ("\uff37hat is it ?", "What\tis it!"),
        ("the sign's colour", "The sign\u2019s colour"),
        ("Straße", "STRASSE"),
    ],
)
def test_questions_that_only_look_different_are_the_same(first: str, second: str) -> None:
    assert normalise_question(first) == normalise_question(second)


@pytest.mark.parametrize(("first", "second"), [("what is it", "what was it"), ("a b", "ab"), ("是什么", "是谁")])
def test_other_questions_are_others(first: str, second: str) -> None:
    assert normalise_question(first) != normalise_question(second)


def make_hashes(count: int, seed: int) -> list[str | None]:
    """Random hashes, half of them a few bits beside an earlier one, some missing."""
    drawn = random.Random(seed)
    hashes: list[str | None] = []
    for _ in range(count):
        value = drawn.getrandbits(64)
        known = [found for found in hashes if found is not None]
        if known and drawn.random() < 0.5:
            value = int(drawn.choice(known), 16)
            for _ in range(drawn.randrange(6)):
                value ^= 1 << drawn.randrange(64)
        hashes.append(None if drawn.random() < 0.1 else f"{value:016x}")
    return hashes


@pytest.mark.parametrize("max_distance", [0, 2, 5])
def test_duplicates_are_those_of_a_double_loop(max_distance: int) -> None:
    hashes = make_hashes(200, seed=1)
    questions = [f"question {number % 3}{'?' * (number % 2)}" for number in range(200)]
    expected: list[int | None] = []
    for number, ours in enumerate(hashes):
        same = [
            earlier
            for earlier, theirs in enumerate(hashes[:number])
            if ours and theirs and number % 3 == earlier % 3 and distance(ours, theirs) <= max_distance
        ]
        expected.append(same[0] if same else None)
    assert first_same(hashes, questions, max_distance) == expected
    assert any(found is not None for found in expected)


def test_the_nearest_is_that_of_a_double_loop() -> None:
    ours = make_hashes(1100, seed=2)
    theirs = [value for value in make_hashes(60, seed=3) if value is not None]
    found = nearest(ours, theirs)
    for value, got in zip(ours, found, strict=True):
        if value is None:
            assert got is None
            continue
        distances = [distance(value, other) for other in theirs]
        assert got == (distances.index(min(distances)), min(distances))


def test_with_nothing_to_compare_nothing_is_near() -> None:
    assert nearest(["0" * 16], []) == [None]
    assert nearest([None], ["0" * 16]) == [None]
    assert first_same([], [], 4) == []
