"""Intervals and comparisons: golden values, all bootstrap samples of small cases, and how often intervals are right."""

import math
from collections.abc import Callable, Sequence
from itertools import product
from statistics import NormalDist

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from tasks.adapters.statistics import Comparison, Outcomes, compare, estimate, lower_bound, mean_interval
from vzero_core.errors import InputError

Z = NormalDist().inv_cdf(0.975)
Row = tuple[int, int, bool]
"""Question, group, and whether the answer is right."""


def outcomes(rows: Sequence[Row]) -> Outcomes:
    question, group, correct = (np.array(column) for column in zip(*rows, strict=True))
    return Outcomes(correct.astype(bool), question, group)


def separate(correct: Sequence[bool]) -> Outcomes:
    """Each row a question of its own, and the score their mean."""
    return outcomes([(number, 0, value) for number, value in enumerate(correct)])


def rotated(answers: Sequence[str]) -> Outcomes:
    """A question for each word, a rotation for each of its letters: + is right."""
    return outcomes([(q, g, letter == "+") for q, word in enumerate(answers) for g, letter in enumerate(word)])


def categories(*answers: str) -> Outcomes:
    """A category for each word, a question for each letter: + is right."""
    rows = [(g, letter == "+") for g, word in enumerate(answers) for letter in word]
    return outcomes([(q, g, correct) for q, (g, correct) in enumerate(rows)])


def wilson(successes: int, number: int) -> tuple[float, float]:
    """By the textbook's formula."""
    share, square = successes / number, Z * Z
    middle = (share + square / (2 * number)) / (1 + square / number)
    half = Z / (1 + square / number) * math.sqrt(share * (1 - share) / number + square / (4 * number * number))
    return middle - half, middle + half


# --- Wilson -------------------------------------------------------------------------------------------------------


def test_separate_rows_have_wilsons_interval() -> None:
    found = estimate(separate([True] * 8 + [False] * 2))
    # By hand: (0.8 + 0.19207) / 1.38415 -+ 1.95996 / 1.38415 * sqrt(0.016 + 0.0096036) = 0.71674 -+ 0.22658.
    assert (found.value, found.low, found.high) == pytest.approx((0.8, 0.49016, 0.94332), abs=1e-5)
    assert found.method == "wilson"


@pytest.mark.parametrize(("successes", "number"), [(0, 1), (1, 1), (29, 100), (0, 50), (115, 191), (13_777, 23_000)])
def test_wilsons_interval_is_the_formulas(successes: int, number: int) -> None:
    found = estimate(separate([place < successes for place in range(number)]))
    assert found.value == successes / number
    assert (found.low, found.high) == pytest.approx(wilson(successes, number), abs=1e-9)
    assert found.method == "wilson"


# --- the bootstrap, all of whose samples are listed ---------------------------------------------------------------


def score(rows: Sequence[tuple[int, float]]) -> float:
    """Mean over groups of the means, from (group, value)."""
    by_group: dict[int, list[float]] = {}
    for group, value in rows:
        by_group.setdefault(group, []).append(value)
    return sum(sum(values) / len(values) for values in by_group.values()) / len(by_group)


def all_samples(asked: Outcomes, values: Sequence[float]) -> np.ndarray:
    """Give the scores of all samples of questions, drawn with replacement among those in the same groups; sorted."""
    questions: dict[int, list[tuple[int, float]]] = {}
    for question, group, value in zip(asked.question.tolist(), asked.group.tolist(), values, strict=True):
        questions.setdefault(question, []).append((group, value))
    strata: dict[frozenset[int], list[list[tuple[int, float]]]] = {}
    for rows in questions.values():
        strata.setdefault(frozenset(group for group, _ in rows), []).append(rows)
    draws = product(*(product(alike, repeat=len(alike)) for alike in strata.values()))
    return np.sort([score([row for stratum in draw for rows in stratum for row in rows]) for draw in draws])


def require_interval(low: float, high: float, samples: np.ndarray) -> None:
    """An end lies between the quantiles 2.1% and 2.9%: 10,000 samples are off by 0.6% once in 10,000 times."""
    for end, share in ((low, 0.025), (high, 0.975)):
        below, above = np.quantile(samples, [share - 0.006, share + 0.006], method="nearest")
        assert below - 1e-9 <= end <= above + 1e-9


DESIGNS = {
    "rotations": rotated(["++", "+-", "--", "-+", "++"]),
    "one group, several seeds": outcomes([(q, 0, q % 3 > s % 2) for q in range(5) for s in range(3)]),
    "questions of different numbers of rows": outcomes(
        [(q, 0, bool((q + n) % 2)) for q, size in enumerate((1, 2, 3, 5, 1)) for n in range(size)]
    ),
    "categories": categories("++-", "+-", "-"),
    "categories and seeds": outcomes(
        [(q, q % 2, letter == "+") for q, word in enumerate(["++", "+-", "--", "-+", "++"]) for letter in word],
    ),
    "a rotation that some questions lack": rotated(["+-", "++", "-", "+", "--"]),
}
designs = pytest.mark.parametrize("asked", DESIGNS.values(), ids=DESIGNS)


@designs
def test_the_interval_is_that_of_all_bootstrap_samples(asked: Outcomes) -> None:
    values = asked.correct.astype(float).tolist()
    samples = all_samples(asked, values)
    found = estimate(asked)
    assert found.method == "bootstrap"
    assert found.value == pytest.approx(score(list(zip(asked.group.tolist(), values, strict=True))))
    assert found.low < found.value < found.high
    require_interval(found.low, found.high, samples)


def answered_again(asked: Outcomes) -> Outcomes:
    """The same questions, some of them with another answer, more of them better."""
    changed = np.random.default_rng(3).random(len(asked.correct)) < np.where(asked.correct, 0.2, 0.6)
    return Outcomes(asked.correct ^ changed, asked.question, asked.group)


@designs
def test_the_difference_is_that_of_all_paired_bootstrap_samples(asked: Outcomes) -> None:
    after = answered_again(asked)
    values = (after.correct.astype(float) - asked.correct).tolist()
    samples = all_samples(asked, values)
    found = compare(asked, after)
    assert found.method == "bootstrap"
    assert found.difference == pytest.approx(estimate(after).value - estimate(asked).value)
    require_interval(found.low, found.high, samples)
    rarer = min((samples <= 1e-9).mean(), (samples >= -1e-9).mean())
    changed = {
        q for q in asked.question.tolist() if sum(v for v, o in zip(values, asked.question, strict=True) if o == q)
    }
    assert found.p_value == pytest.approx(min(1.0, max(2 * rarer, 2 * 0.5 ** len(changed))), abs=0.03)
    assert (found.num_gained, found.num_lost) == (values.count(1.0), values.count(-1.0))


def test_samples_without_a_difference_count_on_both_sides() -> None:
    """Also where thirds and sixths do not add up to 0 in floating point."""

    def asked(words: Sequence[str]) -> Outcomes:
        return outcomes([(q, q % 3, letter == "+") for q, word in enumerate(words) for letter in word])

    first = asked(["++-", "+++", "+--", "--+", "+-+", "-++"])
    second = asked(["+--", "+--", "++-", "-++", "--+", "++-"])
    samples = all_samples(first, (second.correct.astype(float) - first.correct).tolist())
    assert (samples >= -1e-9).mean() - (samples > 1e-9).mean() > 0.1
    # 26 of 128 samples are at 0 or above it.
    assert (samples >= -1e-9).mean() == 26 / 128
    assert compare(first, second).p_value == pytest.approx(2 * 26 / 128, abs=0.015)


def test_rows_that_say_the_same_are_not_more_evidence() -> None:
    words = ["+", "-", "+", "+", "-", "+", "+"]
    twice, often = (outcomes([(q, 0, w == "+") for q, w in enumerate(words) for _ in range(n)]) for n in (2, 8))
    assert estimate(twice) == estimate(often)


def test_a_category_keeps_its_number_of_questions() -> None:
    """A category without questions would have no mean; here a free draw would leave one out two times in three."""
    few = categories("+", "-", "+" * 30 + "-" * 20)
    with np.errstate(all="raise"):
        found = estimate(few)
    # Only the large one varies, with a weight of a third.
    assert found.value == pytest.approx((1 + 0 + 0.6) / 3)
    low, high = (found.value + sign * Z * math.sqrt(0.6 * 0.4 / 50) / 3 for sign in (-1, 1))
    assert (found.low, found.high) == pytest.approx((low, high), abs=0.01)


def test_a_small_category_weighs_as_much_as_a_large_one() -> None:
    small, large = "+-+-", "+" * 90 + "-" * 10
    assert estimate(categories(small, large)).value == pytest.approx((0.5 + 0.9) / 2)
    assert compare(categories(small, large), categories("++++", large)).difference == pytest.approx(0.25)


# --- how often intervals and p-values are right ---------------------------------------------------------------------


def answers(rng: np.random.Generator, chances: np.ndarray) -> Outcomes:
    """Answers to each question in four rotations, each right by the question's chance."""
    question, group = (index.ravel() for index in np.indices((len(chances), 4)))
    return Outcomes(rng.random(len(question)) < chances[question], question, group)


def test_95_percent_of_the_intervals_hold_the_truth() -> None:
    """500 benchmarks of 60 questions in 4 rotations; hard questions are hard in all of them."""
    rng = np.random.default_rng(1)
    truth = 0.6
    covered = naive = 0
    for _ in range(500):
        asked = answers(rng, rng.beta(0.6, 0.4, 60))
        found = estimate(asked)
        covered += found.low <= truth <= found.high
        low, high = wilson(int(asked.correct.sum()), len(asked.correct))
        naive += low <= truth <= high
    assert 0.92 < covered / 500 < 0.98
    assert naive / 500 < 0.85


def test_p_values_are_those_of_chance_where_nothing_changed() -> None:
    """200 pairs of checkpoints that are equally good; and the interval of the difference holds 0."""
    rng = np.random.default_rng(2)
    p_values, held = [], 0
    for _ in range(200):
        chances = rng.beta(0.6, 0.4, 40)
        found = compare(answers(rng, chances), answers(rng, chances))
        p_values.append(found.p_value)
        held += found.low <= 0 <= found.high
    assert 0.92 < held / 200 < 0.98
    for level in (0.05, 0.2, 0.5):
        # Three standard deviations of the share, and one hundredth for the small sample.
        assert abs(np.mean(np.array(p_values) < level) - level) < 3 * math.sqrt(level * (1 - level) / 200) + 0.01


def test_a_change_of_hard_questions_alone_is_seen_in_pairs() -> None:
    """The intervals of the two scores overlap, and yet the difference is clear."""
    first = rotated(["++++"] * 60 + ["----"] * 40)
    second = rotated(["++++"] * 60 + ["+++-"] * 10 + ["----"] * 30)
    found = compare(first, second)
    assert estimate(first).high > estimate(second).low
    # Ten questions changed, all for the better.
    assert found.p_value == 2 * 0.5**10
    assert found.verdict == "better"
    assert compare(second, first).verdict == "worse"


# --- McNemar ------------------------------------------------------------------------------------------------------


def paired(gained: int, lost: int, same: int) -> tuple[Outcomes, Outcomes]:
    first = separate([False] * gained + [True] * lost + [True] * same)
    second = separate([True] * gained + [False] * lost + [True] * same)
    return first, second


@pytest.mark.parametrize(
    ("gained", "lost", "p_value"),
    [
        # 2 (C(9,0) + C(9,1)) / 2^9 = 20 / 512.
        (8, 1, 0.0390625),
        # 2 (C(9,0) + C(9,1) + C(9,2)) / 2^9 = 92 / 512.
        (2, 7, 0.1796875),
        # 2 C(5,0) / 2^5.
        (5, 0, 0.0625),
        (4, 4, 1.0),
        (0, 0, 1.0),
    ],
)
def test_mcnemars_exact_test_is_a_sum_of_binomial_coefficients(gained: int, lost: int, p_value: float) -> None:
    found = compare(*paired(gained, lost, 91))
    assert found.p_value == pytest.approx(p_value, rel=1e-12)
    assert found.method == "mcnemar"
    assert (found.num_gained, found.num_lost) == (gained, lost)
    assert found.difference == pytest.approx((gained - lost) / (91 + gained + lost))
    assert found.verdict == ("better" if (gained, lost) == (8, 1) else "inside the noise")


def test_the_interval_of_separate_rows_is_near_the_normal_one() -> None:
    found = compare(*paired(60, 30, 410))
    half = Z * math.sqrt((90 - 30**2 / 500) / 500**2)
    assert (found.low, found.high) == pytest.approx((0.06 - half, 0.06 + half), abs=0.003)


# --- where a bootstrap has nothing to say -------------------------------------------------------------------------


@pytest.mark.parametrize("number", [1, 5, 200])
def test_all_right_or_all_wrong_has_wilsons_interval_over_questions(number: int) -> None:
    """Not over rows: four rotations of a question are no four questions."""
    right, wrong = (estimate(rotated([letter * 4] * number)) for letter in "+-")
    beyond = Z * Z / (number + Z * Z)
    assert (right.value, right.low, right.high) == pytest.approx((1, 1 - beyond, 1))
    assert (wrong.value, wrong.low, wrong.high) == pytest.approx((0, 0, beyond))
    assert right.method == wrong.method == "wilson"


def test_one_question_says_next_to_nothing() -> None:
    found = estimate(rotated(["++--"]))
    assert (found.value, found.low, found.high) == pytest.approx((0.5, 0, 1))


def test_categories_that_do_not_vary_count_by_their_weight() -> None:
    """The ten questions weigh as much as the thousand: 4 / (1/10 + 1/1000) = 39.6 questions, not 1,010."""
    found = estimate(categories("+" * 10, "-" * 1_000))
    assert (found.value, found.low, found.high) == pytest.approx((0.5, *wilson(20, 40)))


def test_a_comparison_in_which_nothing_changed_does_not_claim_to_be_exact() -> None:
    for same in (rotated(["++++"] * 30 + ["-+-+"] * 20), separate([True, False] * 25)):
        found = compare(same, same)
        beyond = Z * Z / (50 + Z * Z)
        assert (found.difference, found.low, found.high) == pytest.approx((0, -beyond, beyond))
        assert found.p_value == 1
        assert found.verdict == "inside the noise"


@pytest.mark.parametrize(("number", "p_value"), [(1, 1.0), (2, 0.5), (5, 0.0625), (6, 0.03125)])
def test_few_questions_cannot_prove_much(number: int, p_value: float) -> None:
    """However many rows they have: no less than the exact sign test of as many questions."""
    found = compare(rotated(["----"] * number), rotated(["++++"] * number))
    assert found.p_value == pytest.approx(p_value)
    lower = 1 - math.sqrt(2) * Z * Z / (number + Z * Z)
    assert (found.difference, found.low, found.high) == pytest.approx((1, lower, 1))
    unequal = compare(rotated(["----"] * number), rotated(["++++", *["+---"] * (number - 1)]))
    assert unequal.p_value == pytest.approx(p_value)


def test_a_p_value_is_never_0() -> None:
    found = compare(rotated(["--"] * 200), rotated(["++"] * 199 + ["--"]))
    assert found.p_value == pytest.approx(2 / 20_001)


# --- what must not matter -----------------------------------------------------------------------------------------


@st.composite
def pairs(draw: st.DrawFn) -> tuple[Outcomes, Outcomes]:
    """Two sets of answers to the same questions, of any design."""
    size = draw(st.integers(1, 24))

    def numbers(largest: int) -> np.ndarray:
        return np.array(draw(st.lists(st.integers(0, largest), min_size=size, max_size=size)))

    question, nested = numbers(draw(st.sampled_from([2, 8, 1_000]))), draw(st.booleans())
    group = question % 3 if nested else numbers(draw(st.sampled_from([0, 2])))
    first, second = (Outcomes(numbers(1).astype(bool), question, group) for _ in range(2))
    return first, second


@given(pairs())
def test_an_exchange_changes_the_sign_alone(pair: tuple[Outcomes, Outcomes]) -> None:
    there, back = compare(*pair), compare(*pair[::-1])
    assert (back.difference, back.low, back.high) == pytest.approx((-there.difference, -there.high, -there.low))
    assert (back.num_gained, back.num_lost) == (there.num_lost, there.num_gained)
    assert back.p_value == there.p_value


@given(pairs())
def test_figures_are_in_their_bounds(pair: tuple[Outcomes, Outcomes]) -> None:
    for asked in pair:
        found = estimate(asked)
        assert 0 <= found.low < found.high <= 1
        assert found.low - 1e-9 <= found.value <= found.high + 1e-9
    both = compare(*pair)
    assert -1 - 1e-9 <= both.low < both.high <= 1 + 1e-9
    assert 0 < both.p_value <= 1


def test_the_order_of_rows_and_the_names_of_questions_do_not_matter() -> None:
    rng = np.random.default_rng(5)
    chances = rng.beta(0.6, 0.4, 30)
    first, second = answers(rng, chances), answers(rng, chances)
    order, names = rng.permutation(len(first.correct)), rng.permutation(1_000)

    def shuffled(asked: Outcomes) -> Outcomes:
        return Outcomes(asked.correct[order], names[asked.question[order]], asked.group[order])

    assert estimate(shuffled(first)) == estimate(first)
    assert compare(shuffled(first), shuffled(second)) == compare(first, second)


def without_one(asked: Outcomes) -> Outcomes:
    return Outcomes(asked.correct[1:], asked.question[1:], asked.group[1:])


def backwards(asked: Outcomes) -> Outcomes:
    return Outcomes(asked.correct[::-1], asked.question[::-1], asked.group[::-1])


def of_other_questions(asked: Outcomes) -> Outcomes:
    return Outcomes(asked.correct, asked.question[::-1], asked.group)


def in_other_groups(asked: Outcomes) -> Outcomes:
    return Outcomes(asked.correct, asked.question, 1 - asked.group)


@pytest.mark.parametrize("change", [without_one, backwards, of_other_questions, in_other_groups])
def test_answers_to_other_questions_are_not_compared(change: Callable[[Outcomes], Outcomes]) -> None:
    asked = rotated(["++", "+-", "--"])
    with pytest.raises(InputError, match="must be to the same questions in the same order"):
        compare(asked, change(asked))


def test_a_verdict_is_at_5_percent() -> None:
    def verdict(difference: float, p_value: float) -> str:
        return Comparison(difference, -1, 1, p_value, "mcnemar", 0, 0).verdict

    assert verdict(0.1, 0.0499) == "better"
    assert verdict(-0.1, 0.0499) == "worse"
    assert verdict(0.1, 0.05) == verdict(-0.1, 0.05) == "inside the noise"


def test_the_lower_bound_is_newcombes_at_90_percent_on_two_sides() -> None:
    # Of 100 rows 12 gained and 4 lost: shares .12 and .04, Wilson with z = 1.6449 (one side of 5%).
    first = separate([False] * 12 + [True] * 4 + [True] * 84)
    second = separate([True] * 12 + [False] * 4 + [True] * 84)
    z = NormalDist().inv_cdf(0.95)

    def wilson(share: float, sign: int) -> float:
        middle = share + z * z / 200
        return (middle + sign * z * math.sqrt(share * (1 - share) / 100 + z * z / 40000)) / (1 + z * z / 100)

    expected = 0.08 - math.hypot(0.12 - wilson(0.12, -1), wilson(0.04, 1) - 0.04)
    assert lower_bound(first, second) == pytest.approx(expected)
    assert expected == pytest.approx(0.0165, abs=1e-4)


def test_where_nothing_changed_few_rows_cannot_rule_a_loss_out() -> None:
    # The upper bound of 0 of n is z^2 / (n + z^2).
    z = NormalDist().inv_cdf(0.95)
    for number in (40, 1000):
        same = separate([True] * number)
        assert lower_bound(same, same) == pytest.approx(-(z**2) / (number + z**2))


@pytest.mark.parametrize("loss", [0.0, 0.03, 0.1])
def test_a_true_loss_is_below_the_lower_bound_once_in_20_times_at_most(loss: float) -> None:
    rng = np.random.default_rng(0)
    wrong = 0
    for _ in range(600):
        draws = rng.random(200)
        lost, gained = draws < 0.05 + loss, draws > 0.95
        first = separate(list(~gained))
        second = separate(list(~lost))
        wrong += lower_bound(first, second) > -loss
    # 5% of 600 are 30; the binomial's standard deviation is 5.3.
    assert wrong <= 30 + 3 * 5.3


def test_rotations_of_a_question_are_not_more_evidence_that_nothing_is_lost() -> None:
    one, four = rotated(["+"] * 50), rotated(["++++"] * 50)
    assert lower_bound(four, four) == pytest.approx(lower_bound(one, one))


def test_other_questions_give_no_lower_bound() -> None:
    with pytest.raises(InputError, match="must be to the same questions"):
        lower_bound(separate([True]), separate([True, False]))


def test_a_means_interval_is_students() -> None:
    # Mean 2, standard deviation 1, t with 2 degrees of freedom 4.3027: 4.3027 / sqrt(3) = 2.4841.
    assert mean_interval([1, 2, 3], list("abc")) == pytest.approx((2, 2 - 2.4841, 2 + 2.4841), abs=1e-4)
    assert mean_interval([1, 2, 3, 3, 3], list("abccc")) == pytest.approx(mean_interval([1, 2, 3], list("abc")))
    assert mean_interval([1, 2], list("aa")) == (1.5, -math.inf, math.inf)


def test_95_percent_of_a_means_intervals_hold_it_where_values_come_in_clusters() -> None:
    rng = np.random.default_rng(0)
    held = 0
    for _ in range(600):
        values = (rng.normal(size=(8, 1)) + rng.normal(size=(8, 8))).ravel()
        _, low, high = mean_interval(list(values), [str(number // 8) for number in range(64)])
        held += low <= 0 <= high
    # 95% of 600 are 570; the binomial's standard deviation is 5.3. As 64 independent values they would be some 400.
    assert abs(held - 570) <= 3 * 5.3
