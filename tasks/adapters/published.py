"""Figures that others published, for the report's table; nothing here was measured by this project."""

from typing import NamedTuple

from tasks.evaluation_config import BenchmarkKind

SOURCE = "V-Zero, arXiv 2606.25319 (2026)"
"""Where all figures stand."""


class PublishedFigure(NamedTuple):
    """A published accuracy.

    Attributes:
        model: whose it is.
        percent: accuracy, %.
        note: what a reader must know of it.
    """

    model: str
    percent: float
    note: str | None = None


BASE, TRAINED = "Qwen3.5-4B", "V-Zero-4B"
NO_GATE, RANDOM_VIEWS = "V-Zero-4B, no gate", "V-Zero-4B, random positive and negative views"
SMALL_TEACHER, FOUR_ROLLOUTS = "V-Zero-4B, 9B teacher", "V-Zero-4B, 4 rollouts a prompt"

PUBLISHED: dict[BenchmarkKind, tuple[PublishedFigure, ...]] = {
    "vstar": (
        PublishedFigure(BASE, 84.3),
        PublishedFigure(TRAINED, 89.0),
        PublishedFigure(NO_GATE, 86.4),
        PublishedFigure(RANDOM_VIEWS, 83.3),
        PublishedFigure(SMALL_TEACHER, 89.5),
        PublishedFigure(FOUR_ROLLOUTS, 89.0),
    ),
    "hr_bench_4k": (
        PublishedFigure(BASE, 84.4),
        PublishedFigure(TRAINED, 87.8),
        PublishedFigure(NO_GATE, 86.4),
        PublishedFigure(RANDOM_VIEWS, 82.4),
        PublishedFigure(SMALL_TEACHER, 87.3),
        PublishedFigure(FOUR_ROLLOUTS, 87.1),
    ),
    "hr_bench_8k": (
        PublishedFigure(BASE, 80.1),
        PublishedFigure(TRAINED, 82.1, "one table says 82.6; only 82.1 fits the averages"),
        PublishedFigure(NO_GATE, 82.4),
        PublishedFigure(RANDOM_VIEWS, 77.3),
        PublishedFigure(SMALL_TEACHER, 83.8),
        PublishedFigure(FOUR_ROLLOUTS, 82.0),
    ),
    "zoombench": (
        PublishedFigure(BASE, 52.2),
        PublishedFigure(TRAINED, 57.7),
        PublishedFigure(NO_GATE, 56.6),
        PublishedFigure(RANDOM_VIEWS, 47.2),
        PublishedFigure(SMALL_TEACHER, 54.8),
        PublishedFigure(FOUR_ROLLOUTS, 54.1),
    ),
    "mme_realworld": (PublishedFigure(BASE, 69.2), PublishedFigure(TRAINED, 69.8)),
    "mmstar": (PublishedFigure(BASE, 71.8), PublishedFigure(TRAINED, 74.4)),
}


def published(kind: BenchmarkKind) -> tuple[PublishedFigure, ...]:
    """Give what the paper reports on a benchmark; nothing for a user's own."""
    return PUBLISHED.get(kind, ())
