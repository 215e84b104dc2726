"""A page with two runs side by side."""

import json
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

from tasks.adapters.charts import Chart, Line
from tasks.adapters.curves import gate_charts, learning_curves, overlaid, selection_charts
from tasks.adapters.origins import Cost, origins
from tasks.adapters.report_page import all_figures, gate_of, render
from tasks.adapters.run_job import ReportJob, selected_round
from tasks.adapters.scoreboard import Measurement, Scoreboard, accuracy_line, compared, scoreboards
from tasks.adapters.statistics import Comparison
from tasks.adapters.store import Store

_ABSENT = "\N{EN DASH}"


@dataclass(frozen=True)
class Pair:
    """What both runs measured on one benchmark; compared are the chosen students, second against first."""

    name: str
    rows: tuple[tuple[str, Measurement], ...]
    comparison: Comparison | None


def build_comparison(first: ReportJob, second: ReportJob, store: Store) -> str:
    """Give the page of two runs; the same artefacts give the same bytes."""
    jobs = (first, second)
    names = (first.name, second.name)
    if first.name == second.name:
        names = (f"{first.name}, {first.key[:8]}", f"{second.name}, {second.key[:8]}")
    boards = [{board.name: board for board in scoreboards(job, store)} for job in jobs]
    shared = [name for name in boards[0] if name in boards[1]]
    made = [origins(job, store) for job in jobs]
    return render(
        "side_by_side.html.j2",
        last_round=max(job.rounds[-1].round for job in jobs),
        jobs=jobs,
        names=names,
        chosen=[selected_round(job, store) for job in jobs],
        pairs=[_pair(store, names, boards[0][name], boards[1][name]) for name in shared],
        lonely=sorted((set(boards[0]) | set(boards[1])) - set(shared)),
        charts=[
            *(_accuracy(names, boards[0][name], boards[1][name]) for name in shared),
            *overlaid(_charts(first, store), _charts(second, store), names),
        ],
        differences=list(differences(first.config, second.config)),
        costs=_costs(made[0].costs, made[1].costs),
        totals=[one.total for one in made],
        origins=made,
    )


def _pair(store: Store, names: tuple[str, str], first: Scoreboard, second: Scoreboard) -> Pair:
    before = [(f"{name}, before", board.before) for name, board in zip(names, (first, second), strict=True)]
    after = [(f"{name}, chosen", board.chosen) for name, board in zip(names, (first, second), strict=True)]
    return Pair(
        name=first.name,
        rows=tuple((label, found) for label, found in (*before, *after) if found is not None),
        comparison=compared(store, first.chosen, second.chosen),
    )


def _accuracy(names: tuple[str, str], first: Scoreboard, second: Scoreboard) -> Chart:
    lines: tuple[Line, ...] = (accuracy_line(names[0], first), accuracy_line(names[1], second))
    return Chart(f"Accuracy, {first.name}", "with 95% intervals", lines, percent=True)


def _charts(job: ReportJob, store: Store) -> list[Chart]:
    figures = all_figures(job, store)
    chosen = selected_round(job, store)
    return [
        *selection_charts(store, job.criteria, chosen),
        *learning_curves(figures),
        *gate_charts(figures, gate_of(job, store)),
    ]


def differences(first: Mapping[str, Any], second: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Give the settings that differ, each with both values; one that a configuration lacks is a dash."""
    left, right = dict(_flat(first)), dict(_flat(second))
    for name in sorted({*left, *right}):
        values = tuple(
            json.dumps(found[name], ensure_ascii=False) if name in found else _ABSENT for found in (left, right)
        )
        if values[0] != values[1]:
            yield name, values[0], values[1]


def _flat(value: Any, name: str = "") -> Iterator[tuple[str, Any]]:
    if isinstance(value, Mapping) and value:
        for key, inner in value.items():
            yield from _flat(inner, f"{name}.{key}" if name else key)
    elif isinstance(value, list) and any(isinstance(inner, Mapping) for inner in value):
        for position, inner in enumerate(value):
            yield from _flat(inner, f"{name}.{position}")
    else:
        yield name, value


def _costs(first: Mapping[str, Cost], second: Mapping[str, Cost]) -> list[tuple[str, Cost | None, Cost | None]]:
    return [(stage, first.get(stage), second.get(stage)) for stage in dict.fromkeys([*first, *second])]
