"""Scores with their uncertainty, and paired comparisons of two of them."""

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Literal

import numpy as np
from scipy.stats import binomtest
from scipy.stats import t as student

from vzero_core.errors import InputError

_CONFIDENCE = 0.95
_NUM_RESAMPLES = 10_000
_CHUNK = 250
"""Resamples in memory at a time."""
_SEED = 0


@dataclass(frozen=True)
class Outcomes:
    """Which answers to a benchmark are right.

    Attributes:
        correct: [N] bool.
        question: [N] int; rows that share a number ask the same question, or are answers to it with several seeds.
        group: [N] int; the score is the mean of the groups' means. All the same where it is the mean over rows.
    """

    correct: np.ndarray
    question: np.ndarray
    group: np.ndarray


@dataclass(frozen=True)
class Estimate:
    """A score with its 95% interval."""

    value: float
    low: float
    high: float
    method: Literal["wilson", "bootstrap"]


@dataclass(frozen=True)
class Comparison:
    """A paired difference, second less first, with its 95% interval.

    Attributes:
        p_value: two-sided.
        num_gained: rows that became right.
        num_lost: rows that became wrong.
    """

    difference: float
    low: float
    high: float
    p_value: float
    method: Literal["mcnemar", "bootstrap"]
    num_gained: int
    num_lost: int

    @property
    def verdict(self) -> Literal["better", "worse", "inside the noise"]:
        """Whether the difference can be told from chance, at 5%."""
        if self.p_value >= 0.05:
            return "inside the noise"
        return "better" if self.difference > 0 else "worse"


def estimate(outcomes: Outcomes) -> Estimate:
    """Give a score with its 95% interval.

    Wilson's interval where each row is a question of its own and the score is the mean over rows. Else a percentile
    bootstrap over questions: all rows of a question are drawn together, and a question is replaced by one that lies
    in the same groups, so that each category keeps its number of questions. Where the bootstrap does not vary (all
    right, all wrong, a single question) it says nothing, and Wilson's interval is given for as many independent
    questions as weigh as much as these do (Kish's effective number); a single question's is at least as wide as
    that of one right or one wrong answer.

    Args:
        outcomes: at least one row; their order does not matter.

    Source: Wilson, "Probable inference, the law of succession, and statistical inference", JASA 1927; Efron and
        Tibshirani, "An Introduction to the Bootstrap", 1993, chapter 13; Kish, "Survey Sampling", 1965.
    """
    tally = _Tally(outcomes, outcomes.correct)
    method: Literal["wilson", "bootstrap"] = "wilson"
    low, high = _wilson(tally.score, tally.num_effective)
    if not tally.independent:
        drawn_low, drawn_high = _interval(tally.resampled())
        if drawn_low < drawn_high:
            low, high, method = drawn_low, drawn_high, "bootstrap"
    return Estimate(tally.score, low, high, method)


def compare(first: Outcomes, second: Outcomes) -> Comparison:
    """Compare two sets of answers to the same questions, row by row.

    The p-value is that of McNemar's exact test where each row is a question of its own and the score is the mean over
    rows. Else it is that of a paired bootstrap over questions, drawn as `estimate` does: twice the share of resamples
    on the rarer side of 0. It is never below 2 / 2^m, where m is the number of questions whose score changed: that is
    the p-value of the exact sign test when all of them changed for the better, and m questions cannot say more.

    The interval is that of the paired bootstrap. Where that does not vary (nothing changed, all changed alike, a
    single question), those of the shares gained and lost are put together, each as `estimate` has it (Newcombe's
    square-and-add).

    Exchanging the two gives the same with the other sign.

    Args:
        first: at least one row.
        second: the same rows in the same order.

    Raises:
        InputError: the rows are not the same.

    Source: McNemar, "Note on the sampling error of the difference between correlated proportions or percentages",
        Psychometrika 1947; Newcombe, "Improved confidence intervals for the difference between binomial proportions
        based on paired data", Statistics in Medicine 1998.
    """
    _require_same(first, second)
    gained, lost = second.correct & ~first.correct, first.correct & ~second.correct
    num_gained, num_lost = int(gained.sum()), int(lost.sum())
    tally = _Tally(first, gained.astype(int) - lost)
    # From both sides, so that neither is favoured by the order in which questions are drawn.
    resampled = np.concatenate([tally.resampled(), -_Tally(first, lost.astype(int) - gained).resampled()])
    low, high = _interval(resampled)
    if low == high:
        low, high = _square_and_add(_Tally(first, gained), _Tally(first, lost))
    if tally.independent:
        changed = num_gained + num_lost
        p_value = float(binomtest(num_gained, changed).pvalue) if changed else 1.0
    else:
        rarer = min((resampled <= 0).sum(), (resampled >= 0).sum())
        p_value = min(1.0, max(2 * float(rarer + 1) / (len(resampled) + 1), 2 * 0.5**tally.num_changed))
    return Comparison(
        difference=tally.score,
        low=low,
        high=high,
        p_value=p_value,
        method="mcnemar" if tally.independent else "bootstrap",
        num_gained=num_gained,
        num_lost=num_lost,
    )


def mean_interval(values: Sequence[float], clusters: Sequence[str]) -> tuple[float, float, float]:
    """Give the mean of clusters' means with its 95% interval, by Student's t.

    Args:
        values: one or more a cluster.
        clusters: of each value; values of one cluster are not independent. Of a single one nothing is known: its
            interval is infinite.

    Source: Student, "The probable error of a mean", Biometrika 1908.
    """
    members: dict[str, list[float]] = {}
    for value, cluster in zip(values, clusters, strict=True):
        members.setdefault(cluster, []).append(value)
    means = [float(np.mean(found)) for found in members.values()]
    mean = float(np.mean(means))
    if len(means) == 1:
        return mean, -math.inf, math.inf
    error = float(np.std(means, ddof=1)) / math.sqrt(len(means))
    width = float(student.ppf((1 + _CONFIDENCE) / 2, len(means) - 1)) * error
    return mean, mean - width, mean + width


def lower_bound(first: Outcomes, second: Outcomes) -> float:
    """Give how much the second one gains at least (negative: loses at most), with 95% confidence on this one side.

    The lower bound of the share gained and the upper one of the share lost are put together (Newcombe's
    square-and-add), so it is sensible also where nothing was gained or lost; questions count as `estimate` has them.

    Args:
        first: at least one row.
        second: the same rows in the same order.

    Raises:
        InputError: the rows are not the same.

    Source: Newcombe, as for `compare`; Wellek, "Testing Statistical Hypotheses of Equivalence and Noninferiority",
        2010.
    """
    _require_same(first, second)
    gained, lost = second.correct & ~first.correct, first.correct & ~second.correct
    return _square_and_add(_Tally(first, gained), _Tally(first, lost), 2 * _CONFIDENCE - 1)[0]


def _require_same(first: Outcomes, second: Outcomes) -> None:
    if not (np.array_equal(first.question, second.question) and np.array_equal(first.group, second.group)):
        raise InputError(
            f"answers that are compared must be to the same questions in the same order, got {len(first.question)} "
            f"and {len(second.question)} answers to others; evaluate both on the same data with the same seeds"
        )


class _Tally:
    """A value of each row, summed by question and group (Q questions, G groups)."""

    def __init__(self, outcomes: Outcomes, values: np.ndarray) -> None:
        questions, question = np.unique(outcomes.question, return_inverse=True)
        groups, group = np.unique(outcomes.group, return_inverse=True)
        shape = (len(questions), len(groups))
        cell = question * shape[1] + group
        self._rows_QG = np.bincount(cell, minlength=math.prod(shape)).reshape(shape)
        self._sums_QG = np.bincount(cell, values, math.prod(shape)).reshape(shape)
        self.independent = shape == (len(values), 1)

    @cached_property
    def score(self) -> float:
        """Mean over groups of the groups' means."""
        return float((self._sums_QG.sum(0) / self._rows_QG.sum(0)).mean())

    @property
    def num_effective(self) -> int:
        """So many independent questions of equal weight would be as sure: (sum w)^2 / sum w^2."""
        weights_Q = (self._rows_QG / self._rows_QG.sum(0)).mean(1)
        return round(1 / float((weights_Q**2).sum()))

    @property
    def num_changed(self) -> int:
        """Questions whose sum is not 0."""
        return int(self._sums_QG.sum(1).astype(bool).sum())

    def resampled(self) -> np.ndarray:
        """Give the scores of bootstrap samples of the questions.

        Questions with the same rows and sums are of one kind (K kinds). How often each kind is drawn is multinomial,
        which is the same as drawing question after question, and far quicker.
        """
        kinds, counts_K = np.unique(np.hstack([self._rows_QG, self._sums_QG]), axis=0, return_counts=True)
        rows_KG, sums_KG = np.hsplit(kinds, 2)
        _, stratum_K = np.unique(rows_KG > 0, axis=0, return_inverse=True)
        strata = [stratum_K == number for number in range(stratum_K.max() + 1)]
        rng = np.random.default_rng(_SEED)
        scores = []
        for start in range(0, _NUM_RESAMPLES, _CHUNK):
            size = min(_CHUNK, _NUM_RESAMPLES - start)
            rows, sums = np.zeros((2, size, rows_KG.shape[1]))
            for kept in strata:
                number = counts_K[kept].sum()
                drawn = rng.multinomial(number, counts_K[kept] / number, size)
                rows += drawn @ rows_KG[kept]
                sums += drawn @ sums_KG[kept]
            # Rounded, so that equal scores are equal whatever the order of sums.
            scores.append((sums / rows).mean(1).round(12))
        return np.concatenate(scores)


def _interval(resampled: np.ndarray) -> tuple[float, float]:
    low, high = np.quantile(resampled, [(1 - _CONFIDENCE) / 2, (1 + _CONFIDENCE) / 2])
    return float(low), float(high)


def _wilson(share: float, number: int, confidence: float = _CONFIDENCE) -> tuple[float, float]:
    """Give Wilson's interval; a number of successes that is not whole lies between two that are."""
    # Rounded first: 0.29 * 100 is less than 29.
    successes = round(share * number, 6)
    low, high = (
        binomtest(count, number).proportion_ci(confidence, "wilson")
        for count in (math.floor(successes), math.ceil(successes))
    )
    return float(low.low), float(high.high)


def _square_and_add(gained: _Tally, lost: _Tally, confidence: float = _CONFIDENCE) -> tuple[float, float]:
    gained_low, gained_high = _wilson(gained.score, gained.num_effective, confidence)
    lost_low, lost_high = _wilson(lost.score, lost.num_effective, confidence)
    difference = gained.score - lost.score
    return (
        difference - math.hypot(gained.score - gained_low, lost_high - lost.score),
        difference + math.hypot(gained_high - gained.score, lost.score - lost_low),
    )
