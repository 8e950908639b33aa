"""Small charts as SVG, for pages that need nothing else: no script, no network."""

from __future__ import annotations

import math
import time
from bisect import bisect
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from itertools import groupby

from markupsafe import Markup

LINE, DOTS = "line", "dots"

WIDE, NARROW = 900, 440

_HEIGHT = 180
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 10, 10, 24
_MAX_POINTS = 400
_NUM_TICKS = 4


@dataclass(frozen=True, slots=True)
class Point:
    """One point, and what is said of it where somebody points at it."""

    x: float
    y: float
    title: str


@dataclass(frozen=True, slots=True)
class Series:
    """Points of one kind.

    Attributes:
        name: For the legend.
        kind: Its class in the page's style.
        points: In the order of x.
        style: ``LINE`` or ``DOTS``.
    """

    name: str
    kind: str
    points: Sequence[Point]
    style: str = LINE


@dataclass(frozen=True, slots=True)
class Mark:
    """A vertical line through the whole chart."""

    x: float
    kind: str
    title: str


def draw(
    label: str,
    series: Sequence[Series],
    marks: Sequence[Mark] = (),
    *,
    spell_x: Callable[[float], str],
    spell_y: Callable[[float], str],
    width: int = WIDE,
) -> Markup:
    """Draw a chart whose y axis begins at 0, or below where values are negative.

    Lines are broken at the marks.

    Args:
        label: What it shows, for those who cannot see it.
        series: What is drawn; of many points in one place the highest.
        marks: Behind it.
        spell_x: Spells values of x.
        spell_y: Spells values of y.
        width: In pixels of the page, about: texts have the size that they have there.
    """
    series = [Series(s.name, s.kind, _thinned(s.points), s.style) for s in series]
    every = [point for one in series for point in one.points]
    if not every:
        return Markup('<p class="nothing">nothing yet</p>')
    xs = [point.x for point in every] + [mark.x for mark in marks]
    x = _Axis(min(xs), max(xs), _LEFT, width - _RIGHT)
    ticks = _nice_ticks(
        min(0.0, *(point.y for point in every)), max(point.y for point in every)
    )
    y = _Axis(ticks[0], ticks[-1], _HEIGHT - _BOTTOM, _TOP)
    drawn = [
        Markup("<title>{}</title>").format(label),
        *[_grid_line(y(tick), spell_y(tick), width) for tick in ticks],
        *[_x_label(x, index / _NUM_TICKS, spell_x) for index in range(_NUM_TICKS + 1)],
        *[_marked(mark, x(mark.x)) for mark in marks],
        *[_drawn(one, x, y, [mark.x for mark in marks]) for one in series],
    ]
    return Markup('<svg viewBox="0 0 {} {}" role="img">{}</svg>').format(
        width, _HEIGHT, Markup("").join(drawn)
    )


def legend(series: Sequence[Series], marks: Sequence[tuple[str, str]] = ()) -> Markup:
    """Say which colour is what."""
    named = [(one.name, one.kind) for one in series if one.points] + [*marks]
    items = [Markup('<span class="key {}">{}</span>').format(k, n) for n, k in named]
    return Markup('<p class="legend">{}</p>').format(Markup(" ").join(items))


class _Axis:
    """Maps values to where they stand."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        self.low = low
        self.high = high if high > low else low + 1.0
        self._start, self._end = start, end

    def __call__(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self._start + share * (self._end - self._start)


def _grid_line(y: float, text: str, width: int) -> Markup:
    return Markup(
        '<line class="grid" x1="{}" x2="{}" y1="{:.1f}" y2="{:.1f}"/>'
        '<text class="axis" x="{}" y="{:.1f}" text-anchor="end">{}</text>'
    ).format(_LEFT, width - _RIGHT, y, y, _LEFT - 6, y + 4, text)


def _x_label(x: _Axis, share: float, spell: Callable[[float], str]) -> Markup:
    value = x.low + (x.high - x.low) * share
    anchor = {0.0: "start", 1.0: "end"}.get(share, "middle")
    template = '<text class="axis" x="{:.1f}" y="{}" text-anchor="{}">{}</text>'
    return Markup(template).format(x(value), _HEIGHT - 6, anchor, spell(value))


def _marked(mark: Mark, x: float) -> Markup:
    return Markup(
        '<line class="{}" x1="{:.1f}" x2="{:.1f}" y1="{}" y2="{}"><title>{}</title></line>'
    ).format(mark.kind, x, x, _TOP, _HEIGHT - _BOTTOM, mark.title)


def _drawn(one: Series, x: _Axis, y: _Axis, breaks: Sequence[float]) -> Markup:
    lines = []
    if one.style == LINE:
        for _, group in groupby(one.points, lambda point: bisect(breaks, point.x)):
            path = " ".join(f"{x(p.x):.1f},{y(p.y):.1f}" for p in group)
            template = '<polyline class="{}" points="{}"/>'
            lines.append(Markup(template).format(one.kind, path))
    radius = 3.5 if one.style == DOTS else 2 if len(one.points) < 80 else 0.8
    template = (
        '<circle class="{}" cx="{:.1f}" cy="{:.1f}" r="{}"><title>{}</title></circle>'
    )
    dots = [
        Markup(template).format(one.kind, x(p.x), y(p.y), radius, p.title)
        for p in one.points
    ]
    return Markup("").join([*lines, *dots])


def _thinned(points: Sequence[Point]) -> list[Point]:
    """Keep the highest of those that would stand in one place."""
    if len(points) <= _MAX_POINTS:
        return [*points]
    size = math.ceil(len(points) / _MAX_POINTS)
    groups = [points[start : start + size] for start in range(0, len(points), size)]
    return [max(group, key=lambda point: point.y) for group in groups]


def _nice_ticks(low: float, high: float) -> list[float]:
    """Return round values that hold a range between them."""
    span = (high - low) or abs(high) or 1.0
    raw = span / _NUM_TICKS
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * m for m in (1, 2, 2.5, 5, 10) if power * m >= raw * 0.999)
    first = math.floor(low / step)
    last = math.ceil(high / step)
    return [step * n for n in range(first, max(last, first + 1) + 1)]


def spell_time(span_seconds: float) -> Callable[[float], str]:
    """Return what spells points in time as finely as a span of it needs."""
    day, minute = 86400, 60
    form = "%H:%M:%S"
    if span_seconds > 3 * day:
        form = "%b %d"
    elif span_seconds > 0.5 * day:
        form = "%b %d %H:%M"
    elif span_seconds > 10 * minute:
        form = "%H:%M"
    return lambda seconds: time.strftime(form, time.localtime(seconds))
