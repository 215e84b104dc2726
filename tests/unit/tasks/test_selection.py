"""The choice of a checkpoint: criteria by hand, the rule, and what is said of it."""

from itertools import pairwise

import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.selection import Candidate, PromptCriteria, choose, explain, trend


def candidate(number: int, *surprises: float) -> Candidate:
    """A checkpoint by what its responses to each prompt lack in support; the other figures would mislead."""
    rows = [
        PromptCriteria(sample_id=str(index), divergence=-value, support=-value, evidence_score=value)
        for index, value in enumerate(surprises)
    ]
    return Candidate(number, tuple(rows))


def test_the_highest_support_is_chosen_where_no_later_one_is_near() -> None:
    # One prompt has no standard error, so nothing counts as near.
    assert choose([candidate(0, 0.1), candidate(10, 0.5), candidate(20, 0.3), candidate(30, 0.4)]).round == 20


def test_of_two_whose_order_is_chance_the_later_one_is_chosen() -> None:
    # Round 20 less round 10: +0.3, -0.1, mean 0.1, standard error 0.2 (deviations 0.2, n - 1 = 1, over sqrt 2).
    rounds = [candidate(0, 9.0, 9.0), candidate(10, 1.0, 1.0), candidate(20, 1.3, 0.9)]
    assert choose(rounds).round == 20
    # +0.3, +0.1: mean 0.2, standard error 0.1.
    assert choose([*rounds[:2], candidate(20, 1.3, 1.1)]).round == 10
    # Later ones are compared with the best, not with one another.
    assert choose([*rounds, candidate(30, 1.6, 0.8)]).round == 30
    assert choose([*rounds, candidate(30, 1.6, 1.2)]).round == 20


def test_the_untrained_student_is_never_chosen() -> None:
    assert choose([candidate(0, 0.1, 0.1), candidate(10, 0.5, 0.7)]).round == 10


@given(st.lists(st.lists(st.floats(0, 5, width=16), min_size=3, max_size=3), min_size=2, max_size=8))
def test_the_choice_only_ever_moves_to_the_newest(surprises: list[list[float]]) -> None:
    """The flow stores a state as it is made, and only if it is then the choice."""
    rounds = [candidate(0, 9.0, 9.0, 9.0), *(candidate(10 * n, *row) for n, row in enumerate(surprises, 1))]
    choices = [choose(rounds[:end]).round for end in range(2, len(rounds) + 1)]
    for number, (before, after) in enumerate(pairwise(choices), start=2):
        assert after in (before, 10 * number)


def test_differences_are_told_prompt_by_prompt() -> None:
    # Prompts differ by 1 nat, checkpoints by 0.1 on each of them but for 0.01: a clear difference all the same.
    first = candidate(0, 2.1, 3.1, 1.1, 4.11)
    chosen = candidate(10, 1.0, 2.0, 0.0, 3.0)
    last = candidate(20, 1.1, 2.1, 0.1, 3.11)
    assert explain([first, chosen, last]) == (
        "round 10 has a support of -1.500 nats per token, the highest; the last, round 20, has -1.603, clearly less; "
        "before training it was -2.603, clearly less"
    )


def test_what_may_be_chance_is_said_to_be() -> None:
    # Differences +1, -0.8: mean 0.1, standard error 0.9.
    text = explain([candidate(0, 5.0, 5.2), candidate(10, 1.0, 2.0), candidate(20, 2.0, 1.2)])
    assert text == (
        "round 20 has a support of -1.600 nats per token; the highest, round 10, is -1.500, a difference inside the "
        "noise; before training it was -5.100, clearly less"
    )


def test_equal_checkpoints_are_not_told_apart() -> None:
    # As where the gate lets nothing through.
    same = [candidate(number, 1.0, 2.0) for number in (0, 10)]
    assert "before training it was -1.500, a difference inside the noise" in explain(same)


def test_a_student_that_drifted_from_the_teacher_is_told() -> None:
    text = explain([candidate(0, 0.1, 0.2, 0.1), candidate(10, 1.1, 1.2, 1.1001)])
    assert "before training it was -0.133, clearly more" in text


def test_the_trend_is_the_slope_of_the_last_half() -> None:
    rounds = [candidate(number, value) for number, value in [(0, 9.0), (10, 5.0), (20, 1.0), (30, 0.8), (40, 0.6)]]
    # Of five candidates the last two: 0.2 nats in 10 rounds.
    assert trend(rounds, "support") == pytest.approx(0.2)
    assert trend(rounds, "evidence_score") == pytest.approx(-0.2)
    assert trend(rounds[:2], "support") is None
