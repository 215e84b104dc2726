"""The scores of a run, benchmark by benchmark: before, after, the teacher, and what the differences are worth."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from tasks.adapters.charts import MAX_LEVELS, Chart, Line
from tasks.adapters.evaluation import Evaluated, comparable, compare_evaluations, evaluated
from tasks.adapters.run_job import Evaluation, ReportJob, rounds_by_policy, selected_round
from tasks.adapters.statistics import Comparison
from tasks.adapters.store import Store
from tasks.artifacts import ArtifactRef


@dataclass(frozen=True)
class Measurement:
    """One score; `round` is None where it is not the student's, from the full image alone."""

    label: str
    ref: ArtifactRef
    made: Evaluated
    round: int | None
    summary: Mapping[str, Any]

    @property
    def accuracy(self) -> float:
        """The score, 0 to 1."""
        return float(self.summary["accuracy"])

    @property
    def interval(self) -> tuple[float, float]:
        """Its 95% interval."""
        return float(self.summary["low"]), float(self.summary["high"])


@dataclass(frozen=True)
class Row:
    """A line of a benchmark's table; compared is it with the student before training, where that can be done."""

    found: Measurement
    comparison: Comparison | None


@dataclass(frozen=True)
class Scoreboard:
    """What was measured on one benchmark."""

    name: str
    student: tuple[Measurement, ...]
    """By round, of the full image, scored like the first of them."""
    others: tuple[Measurement, ...]
    selected: int
    """The round whose student was chosen."""
    rows: tuple[Row, ...]

    @property
    def before(self) -> Measurement | None:
        """The student before training."""
        return next((found for found in self.student if found.round == 0), None)

    @property
    def after(self) -> Row | None:
        """The student that was chosen."""
        return next((row for row in self.rows if row.found.round == self.selected and row.found.round != 0), None)

    @property
    def chosen(self) -> Measurement | None:
        """The student that was chosen, whether it was trained or not; the last one measured where it was not."""
        last = self.student[-1] if self.student else None
        return next((found for found in self.student if found.round == self.selected), last)

    @property
    def first(self) -> Measurement:
        """Any of them, for what they have in common."""
        return self.rows[0].found

    @property
    def categories(self) -> list[str]:
        """Names of the categories, of the first measurement that has any."""
        return list(self.first.summary["by_category"])


def scoreboards(job: ReportJob, store: Store) -> list[Scoreboard]:
    """Give the benchmarks of a run, in the order measured."""
    rounds, selected = rounds_by_policy(job, store), selected_round(job, store)
    boards = []
    for name in dict.fromkeys(evaluation.benchmark for evaluation in job.evaluations):
        found = [_measured(store, one, rounds) for one in job.evaluations if one.benchmark == name]
        boards.append(_board(store, name, found, selected))
    return boards


def _measured(store: Store, evaluation: Evaluation, rounds: Mapping[str, int]) -> Measurement:
    made = evaluated(store, evaluation.ref)
    is_student = made.asked.role == "student" and made.asked.crop is None
    number = rounds.get(made.asked.policy.digest) if is_student else None
    return Measurement(evaluation.label, evaluation.ref, made, number, store.manifest(evaluation.ref).summary)


def _board(store: Store, name: str, found: list[Measurement], selected: int) -> Scoreboard:
    student = {one.round: one for one in reversed(found) if one.round is not None}
    by_round = tuple(student[number] for number in sorted(student))
    others = tuple(one for one in found if one.round is None)
    before = student.get(0)
    ends = [number for number in dict.fromkeys((0, selected, max(student, default=0))) if number in student]
    rows = [Row(student[number], compared(store, before, student[number]) if number else None) for number in ends]
    rows += [Row(one, compared(store, before, one)) for one in others]
    return Scoreboard(name, by_round, others, selected, tuple(rows))


def compared(store: Store, before: Measurement | None, after: Measurement | None) -> Comparison | None:
    """Compare two measurements question by question; None where one is missing or they are of different things."""
    if before is None or after is None or not can_compare(before, after):
        return None
    return compare_evaluations(store, before.ref, after.ref)


def can_compare(before: Measurement, after: Measurement) -> bool:
    """Tell whether two measurements are of the same questions, answered as often, scored alike."""
    seeds = [len(found.made.asked.generation.seeds) for found in (before, after)]
    return seeds[0] == seeds[1] and comparable(before.made.job, after.made.job)


def accuracy_charts(boards: Iterable[Scoreboard]) -> list[Chart]:
    """Give the student's accuracy over the rounds, a chart for each benchmark."""
    charts = []
    for board in boards:
        if not board.student:
            continue
        levels = tuple((one.label, one.accuracy) for one in board.others)[:MAX_LEVELS]
        title, unit = f"Accuracy, {board.name}", "with 95% intervals"
        note = "Round 0 is before any training."
        charts.append(
            Chart(
                title, unit, (accuracy_line("student", board),), levels, percent=True, note=note, marked=board.selected
            )
        )
    return charts


def accuracy_line(label: str, board: Scoreboard) -> Line:
    """Give the student's accuracy by round."""
    return Line(
        label,
        tuple(found.round or 0 for found in board.student),
        tuple(found.accuracy for found in board.student),
        intervals=tuple(found.interval for found in board.student),
    )
