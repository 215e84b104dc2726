"""A run's page, built from its artefacts alone; images alone lie elsewhere, and one that is gone is said to be."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from pydantic import TypeAdapter

from tasks.adapters.answers import changed_answers
from tasks.adapters.charts import draw, format_value
from tasks.adapters.curves import Figures, gate_charts, learning_curves, round_figures, selection_charts
from tasks.adapters.dataset import Dataset
from tasks.adapters.gallery import GAP_STEP, LOGPROB_STEP, MAX_LEVEL, choose_prompts
from tasks.adapters.origins import origins, validation
from tasks.adapters.published import SOURCE, published
from tasks.adapters.run_job import ReportJob, selected_round
from tasks.adapters.scoreboard import accuracy_charts, scoreboards
from tasks.adapters.store import Store
from vzero_core.config import Gate, GateConfig

_TEMPLATES = Path(__file__).parents[1] / "templates"


def build_page(job: ReportJob, store: Store, dataset: Dataset, benchmarks: Mapping[str, Dataset]) -> str:
    """Give the page of a run; the same artefacts and images give the same bytes.

    Args:
        job: what the run made.
        store: where it lies.
        dataset: reads the training images.
        benchmarks: reads the images of the held-out questions, by the benchmark's name.
    """
    gate = gate_of(job, store)
    figures = all_figures(job, store)
    boards = scoreboards(job, store)
    chosen = selected_round(job, store)
    return render(
        "report.html.j2",
        last_round=job.rounds[-1].round,
        job=job,
        chosen=chosen,
        boards=boards,
        published={board.name: published(board.first.made.job.kind) for board in boards},
        source_of_published=SOURCE,
        curves=[*accuracy_charts(boards), *learning_curves(figures)],
        figures=figures,
        selection=store.manifest(job.selection).summary if job.selection else None,
        selection_charts=selection_charts(store, job.criteria, chosen),
        gate=gate,
        gate_charts=gate_charts(figures, gate),
        galleries=choose_prompts(store, dataset, job.rounds, views=job.training_set, gate=gate),
        shade=GAP_STEP if isinstance(gate, GateConfig) else LOGPROB_STEP,
        max_level=MAX_LEVEL,
        full_weight=gate.w_max if isinstance(gate, GateConfig) else 1.0,
        changes=changed_answers(store, boards, benchmarks),
        validation=validation(job, store),
        origins=origins(job, store),
        config=json.dumps(job.config, indent=2, ensure_ascii=False),
    )


def gate_of(job: ReportJob, store: Store) -> Gate:
    """Give the run's gate."""
    gate: Gate = TypeAdapter(Gate).validate_python(store.manifest(job.rounds[0].gate).job["gate"])
    return gate


def all_figures(job: ReportJob, store: Store) -> list[Figures]:
    """Give the figures of all rounds."""
    return [round_figures(store, r.round, r.rollouts, r.replays, r.gate, r.train) for r in job.rounds]


def render(template: str, *, last_round: int, **values: Any) -> str:
    """Fill a template.

    Args:
        template: its file name.
        last_round: where the round axis of every chart ends.
        values: what the template names.
    """
    environment = Environment(
        loader=FileSystemLoader(_TEMPLATES), autoescape=True, undefined=StrictUndefined, trim_blocks=True
    )
    environment.filters |= {
        "value": format_value,
        "percent": lambda value: format_value(value, percent=True),
        "signed": lambda value: format_value(value, signed=True),
        "points": _points,
        "count": lambda value: format_value(value if value is None else round(value)),
    }
    # A chart holds no text of the data, only what matplotlib made of numbers.
    environment.globals["draw"] = lambda chart: Markup(draw(chart, last_round))
    return environment.get_template(template).render(**values)


def _points(value: float) -> str:
    """Write a difference of two shares in percentage points."""
    return f"{100 * value:+.1f}".replace("-", "\N{MINUS SIGN}")
