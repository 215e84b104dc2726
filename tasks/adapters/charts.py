"""Line charts as SVG for a page that is read in light and in dark: colours are the page's, legends are its text."""

import re
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from matplotlib.axes import Axes

WIDTH, HEIGHT = 350, 190
"""Units of the viewBox. A chart is shown about as many pixels wide, so sizes of text and lines are pixels too."""


MAX_LEVELS = 2
"""Level lines that can be told apart."""
_MAX_MARKED = 25
"""Above this many points a line is drawn without a marker at each."""
_MARGIN = 0.04
"""Share of an axis that stays free at either end."""
_FLAT = 1e-3
"""Smallest range of a value axis."""
_Dash = str | tuple[float, tuple[float, ...]]
_DASHES: tuple[_Dash, ...] = ("-", (0, (5, 2)), (0, (1.5, 1.5)))
_LEVEL_DASHES: tuple[_Dash, ...] = ((0, (6, 3)), (0, (2, 2)))
_MARKERS = ("o", "s", "^")
# Matplotlib knows no CSS variables, so it draws in colours that stand for them. Pure black will not do: it is its
# default, which it does not write.
_INKS = {
    "#010101": "var(--muted)",
    "#020202": "var(--grid)",
    "#030303": "var(--line-1)",
    "#040404": "var(--line-2)",
    "#050505": "var(--line-3)",
}
_MUTED, _GRID, *_LINES = _INKS
_MINUS = "\N{MINUS SIGN}"


@dataclass(frozen=True)
class Line:
    """One figure over the rounds; None where it is not defined. `intervals` are (low, high)."""

    label: str
    rounds: tuple[int, ...]
    values: tuple[float | None, ...]
    intervals: tuple[tuple[float, float], ...] = ()

    @property
    def known(self) -> list[float]:
        """The values that are defined."""
        return [value for value in self.values if value is not None]


@dataclass(frozen=True)
class Chart:
    """What is drawn, and what a reader is told about it."""

    title: str
    unit: str
    lines: tuple[Line, ...]
    levels: tuple[tuple[str, float], ...] = ()
    percent: bool = False
    covers: tuple[float, ...] = ()
    """Values that the axis reaches at least, so that small changes look small."""
    logarithmic: bool = False
    note: str = ""
    marked: int | None = None
    """A round that a line is drawn at."""

    def __post_init__(self) -> None:
        assert 0 < len(self.lines) <= len(_LINES)
        assert len(self.levels) <= MAX_LEVELS

    def text(self, value: float | None) -> str:
        """Write a value as the chart's axis does."""
        return format_value(value, percent=self.percent)


def format_value(value: float | None, *, percent: bool = False, signed: bool = False) -> str:
    """Write a number for a reader: three digits that count, a percentage with one decimal, or three signed ones."""
    if value is None:
        return "\N{EN DASH}"
    if percent:
        text = f"{value:.1%}"
    elif signed:
        text = f"{value:+.3f}"
    elif isinstance(value, int) or abs(value) >= 1000:
        text = f"{value:,.0f}"
    else:
        text = f"{value:#.3g}".removesuffix(".")
    return text.replace("-", _MINUS)


def draw(chart: Chart, last_round: int) -> str:
    """Draw a chart as an <svg> element that fits its container; it holds no text but the numbers at the axes.

    Args:
        chart: what is drawn; every line holds at least one value.
        last_round: where the round axis ends, so that the charts of a page share it.

    Returns:
        The same bytes for the same chart: no dates, no random ids.
    """
    import io

    import matplotlib
    from matplotlib.figure import Figure

    with matplotlib.rc_context():
        # A user's own matplotlibrc shall not change the page.
        matplotlib.rcdefaults()
        # Salted by title, so that two charts of a page share no id.
        matplotlib.rcParams.update({"svg.hashsalt": chart.title, "svg.fonttype": "none", "font.size": 11})
        figure = Figure(figsize=(WIDTH / 72, HEIGHT / 72), layout="constrained")
        axes = figure.add_subplot()
        for line, color, dash, marker in zip(chart.lines, _LINES, _DASHES, _MARKERS, strict=False):
            _draw_line(axes, line, color, dash, marker)
        if chart.marked is not None:
            axes.axvline(chart.marked, color=_MUTED, linewidth=1, zorder=0)
        for (_, level), dash in zip(chart.levels, _LEVEL_DASHES, strict=False):
            axes.axhline(level, color=_MUTED, linewidth=1.2, linestyle=dash)
        _dress(axes, chart, last_round)
        buffer = io.StringIO()
        metadata = dict.fromkeys(("Creator", "Date", "Format", "Type"))
        figure.savefig(buffer, format="svg", transparent=True, metadata=metadata)
    return _for_page(buffer.getvalue())


def _draw_line(axes: "Axes", line: Line, color: str, dash: _Dash, marker: str) -> None:
    values = [float("nan") if value is None else value for value in line.values]
    shown = marker if len(line.known) <= _MAX_MARKED else ""
    axes.plot(line.rounds, values, color=color, linestyle=dash, lw=1.8, marker=shown, ms=4, clip_on=False)
    if line.intervals:
        low, high = zip(*line.intervals, strict=True)
        axes.vlines(line.rounds, low, high, color=color, linewidth=1.4)
        axes.scatter([*line.rounds] * 2, [*low, *high], marker="_", s=40, color=color, linewidth=1.4)


def _dress(axes: "Axes", chart: Chart, last_round: int) -> None:
    from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

    for name, spine in axes.spines.items():
        spine.set_visible(name == "bottom")
        spine.set_color(_GRID)
    axes.tick_params(length=0, labelcolor=_MUTED, which="both")
    axes.tick_params(axis="x", pad=6)
    axes.grid(axis="y", color=_GRID, linewidth=0.8)
    axes.set_axisbelow(True)
    axes.set_xlim(-_MARGIN * last_round, (1 + _MARGIN) * last_round)
    axes.xaxis.set_major_locator(MaxNLocator(nbins=6, integer=True))
    axes.set_xlabel("round", color=_MUTED)
    if chart.logarithmic:
        axes.set_yscale("log")
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 3)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        # Wide enough for a tick to fall inside, wherever the values lie.
        known = [value for line in chart.lines for value in line.known]
        axes.set_ylim(min(known) / 2, max(known) * 2)
    else:
        axes.yaxis.set_major_locator(MaxNLocator(nbins=5, steps=[1, 2, 2.5, 5, 10], min_n_ticks=3))
        axes.set_ylim(_limits(chart))
    axes.yaxis.set_major_formatter(FuncFormatter(lambda value, _: _tick(value, chart)))


def _limits(chart: Chart) -> tuple[float, float]:
    """Give the ends of the value axis: some room beyond the values, none beyond what is covered anyway."""
    values = [
        value for line in chart.lines for value in (*line.known, *(end for ends in line.intervals for end in ends))
    ]
    values += [*(level for _, level in chart.levels), *chart.covers]
    low, high = min(values), max(values)
    # A flat line gets an axis too, and not one of rounding-size steps.
    room = _MARGIN * max(high - low, abs(high), _FLAT)
    return (
        low if low in chart.covers else low - room,
        high if high in chart.covers else high + room,
    )


def _tick(value: float, chart: Chart) -> str:
    plain = f"{value:,.0f}" if abs(value) >= 1000 else f"{value:.4g}"
    text = f"{100 * value:.4g}%" if chart.percent else plain
    return text.replace("-", _MINUS)


def _for_page(svg: str) -> str:
    svg = svg[svg.index("<svg") :]
    # Matplotlib's own style sheet would apply to the whole page.
    svg = re.sub(r"<metadata>.*?</metadata>|<style.*?</style>", "", svg, flags=re.DOTALL)
    # Inside HTML neither names of namespaces nor fixed sizes are wanted.
    svg = re.sub(r"<svg [^>]*>", f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" aria-hidden="true">', svg, count=1)
    svg = svg.replace("xlink:href", "href")
    # Ids of groups would stand in every chart; those of markers and clip paths are hashes with the chart's salt.
    svg = re.sub(r' id="(?![mp][0-9a-f]{10}")[^"]*"| transform="rotate\(-?0 [^"]*"', "", svg)
    for ink, variable in _INKS.items():
        svg = svg.replace(ink, variable)
    return re.sub(r"\s*\n\s*", "\n", svg)


def drawable(charts: Sequence[Chart]) -> list[Chart]:
    """Leave out lines without any value, and charts without any line."""
    found = []
    for chart in charts:
        lines = tuple(line for line in chart.lines if line.known)
        if lines:
            found.append(replace(chart, lines=lines))
    return found
