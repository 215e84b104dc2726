"""Held-out questions whose answer changed with training, as a person can judge them."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from tasks.adapters.dataset import SAMPLES, Dataset
from tasks.adapters.evaluation import PREDICTIONS, SCORES
from tasks.adapters.pictures import Picture, Rectangle, full_picture, rectangle
from tasks.adapters.scoreboard import Measurement, Scoreboard, can_compare
from tasks.adapters.store import Store
from tasks.adapters.tables import read_rows
from tasks.artifacts import EvaluationSample, Prediction, Score

CARDS = 3
"""Questions that became right, and as many that became wrong, of each benchmark."""
_MAX_TEXT = 3_000
"""Characters of an answer that are shown."""

_Key = tuple[str, int]


@dataclass(frozen=True)
class Answer:
    """What was answered, and what was found in it."""

    text: str
    extracted: str | None
    correct: bool
    problem: str | None

    @property
    def shown(self) -> str:
        """The end of it, where the answer stands."""
        return self.text if len(self.text) <= _MAX_TEXT else f"... {self.text[-_MAX_TEXT:]}"


@dataclass(frozen=True)
class AnswerCard:
    """A question with the answers before and after training."""

    sample: EvaluationSample
    full: Picture | None
    region: Rectangle | None
    seed: int
    before: Answer
    after: Answer


@dataclass(frozen=True)
class Changes:
    """The questions of a benchmark whose answer changed from wrong to right, or back."""

    benchmark: str
    num_seeds: int
    num_gained: int
    num_lost: int
    gained: tuple[AnswerCard, ...]
    lost: tuple[AnswerCard, ...]


def changed_answers(store: Store, boards: Iterable[Scoreboard], benchmarks: Mapping[str, Dataset]) -> list[Changes]:
    """Compare the chosen student's answers with those before training, for the benchmarks where both are scored alike.

    Args:
        store: of the artefacts.
        boards: the run's scores.
        benchmarks: what reads the images of each, by name; one that is missing leaves its cards without pictures.
    """
    changes = []
    for board in boards:
        before, after = board.before, board.after
        if before is None or after is None or not can_compare(before, after.found):
            continue
        changes.append(_changes(store, board.name, before, after.found, benchmarks.get(board.name)))
    return changes


def _changes(store: Store, name: str, before: Measurement, after: Measurement, dataset: Dataset | None) -> Changes:
    old, new = _scores(store, before), _scores(store, after)
    both = sorted(old.keys() & new.keys())
    gained = [key for key in both if new[key].correct and not old[key].correct]
    lost = [key for key in both if old[key].correct and not new[key].correct]
    samples = {row.id: row for row in read_rows(store.read(before.made.job.data, SAMPLES), EvaluationSample)}
    shown = [list({key[0]: key for key in reversed(keys)}.values())[::-1][:CARDS] for keys in (gained, lost)]
    texts = [_responses(store, found, {*shown[0], *shown[1]}) for found in (before, after)]

    def card(key: _Key) -> AnswerCard:
        sample = samples[key[0]]
        answers = [_answer(scores[key], responses[key]) for scores, responses in zip((old, new), texts, strict=True)]
        return AnswerCard(
            sample=sample,
            full=full_picture(dataset, sample),
            region=rectangle(sample.region, (sample.image.width, sample.image.height)),
            seed=key[1],
            before=answers[0],
            after=answers[1],
        )

    return Changes(
        benchmark=name,
        num_seeds=len(after.made.asked.generation.seeds),
        num_gained=len(gained),
        num_lost=len(lost),
        gained=tuple(card(key) for key in shown[0]),
        lost=tuple(card(key) for key in shown[1]),
    )


def _scores(store: Store, found: Measurement) -> dict[_Key, Score]:
    return {(row.sample_id, row.seed): row for row in read_rows(store.read(found.ref, SCORES), Score)}


def _responses(store: Store, found: Measurement, wanted: set[_Key]) -> dict[_Key, str]:
    rows = (row for ref in found.made.job.predictions for row in read_rows(store.read(ref, PREDICTIONS), Prediction))
    return {key: row.response for row in rows if (key := (row.sample_id, row.seed)) in wanted}


def _answer(score: Score, response: str) -> Answer:
    return Answer(text=response, extracted=score.extracted, correct=score.correct, problem=score.problem)
