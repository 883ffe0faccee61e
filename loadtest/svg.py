"""Charts as inline SVG: lines, dots and steps over two axes. It is small on purpose, so that a
report can be opened anywhere, for years, without a library. Pure."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from html import escape

Point = tuple[float, float]
COLOURS = ("#2563eb", "#d97706", "#059669", "#dc2626", "#7c3aed", "#0891b2", "#be185d", "#4d7c0f")
_WIDTH, _HEIGHT = 460, 260
_LEFT, _RIGHT, _TOP, _BOTTOM = 58, 14, 26, 62
_NUM_TICKS = 6


@dataclass(frozen=True)
class Series:
    name: str
    points: Sequence[Point]
    dots: bool = False
    """Dots without a line."""
    dashed: bool = False
    colour: str = ""


@dataclass(frozen=True)
class Mark:
    """A vertical line."""

    x: float
    label: str


def chart(
    title: str,
    series: Sequence[Series],
    *,
    x_label: str,
    y_label: str,
    marks: Sequence[Mark] = (),
    y_from_zero: bool = True,
) -> str:
    """An <svg> element; a note in its place when there is nothing to draw."""
    drawn = [Series(s.name, _finite(s.points), s.dots, s.dashed, s.colour) for s in series]
    points = [point for one in drawn for point in one.points]
    if not points:
        return f'<p class="empty">{escape(title)}: nothing to draw</p>'
    xs, ys = [x for x, _ in points] + [mark.x for mark in marks], [y for _, y in points]
    x_axis = _Axis(min(xs), max(xs), _LEFT, _WIDTH - _RIGHT)
    y_axis = _Axis(0.0 if y_from_zero else min(ys), max(ys), _HEIGHT - _BOTTOM, _TOP)
    parts = [
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{escape(title)}">',
        f'<text class="title" x="{_LEFT}" y="15">{escape(title)}</text>',
        *_grid(x_axis, y_axis),
        f'<text class="label" x="{(_LEFT + _WIDTH - _RIGHT) / 2:.0f}" y="{_HEIGHT - 28}"'
        f' text-anchor="middle">{escape(x_label)}</text>',
        f'<text class="label" transform="translate(12 {(_TOP + _HEIGHT - _BOTTOM) / 2:.0f})'
        f' rotate(-90)" text-anchor="middle">{escape(y_label)}</text>',
    ]
    for mark in marks:
        x = x_axis.place(mark.x)
        parts.append(
            f'<line class="mark" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{_HEIGHT - _BOTTOM}"/>'
            f'<text class="mark" x="{x + 3:.1f}" y="{_TOP + 9}">{escape(mark.label)}</text>'
        )
    for index, one in enumerate(drawn):
        colour = one.colour or COLOURS[index % len(COLOURS)]
        parts += _drawn(one, colour, x_axis, y_axis)
    parts += _legend(drawn)
    return "".join([*parts, "</svg>"])


def cumulative(values: Sequence[float], num_points: int = 160) -> list[Point]:
    """For each value the percentage of values that are not above it; thinned out."""
    ordered = sorted(values)
    if not ordered:
        return []
    last = len(ordered) - 1
    places = sorted({round(step * last / num_points) for step in range(num_points + 1)})
    return [(ordered[place], 100 * (place + 1) / len(ordered)) for place in places]


def ticks(low: float, high: float) -> list[float]:
    """Round numbers from `low` to `high`, about six."""
    span = high - low
    if span <= 0:
        return [low]
    rough = span / _NUM_TICKS
    power = 10 ** math.floor(math.log10(rough))
    step = next(factor * power for factor in (1, 2, 5, 10) if factor * power >= rough)
    first = math.ceil(low / step - 1e-9)
    return [number * step for number in range(first, math.floor(high / step + 1e-9) + 1)]


class _Axis:
    """Maps values to places on the page."""

    def __init__(self, low: float, high: float, start: float, end: float) -> None:
        if high <= low:
            low, high = min(low, 0.0), high if high > 0 else low + 1
        self.low, self.high = low, high + 0.04 * (high - low)
        self._start, self._end = start, end

    def place(self, value: float) -> float:
        share = (value - self.low) / (self.high - self.low)
        return self._start + share * (self._end - self._start)

    def ticks(self) -> list[float]:
        return ticks(self.low, self.high)


def _grid(x_axis: _Axis, y_axis: _Axis) -> list[str]:
    bottom, right = _HEIGHT - _BOTTOM, _WIDTH - _RIGHT
    parts = []
    for value in y_axis.ticks():
        y = y_axis.place(value)
        parts.append(
            f'<line class="grid" x1="{_LEFT}" x2="{right}" y1="{y:.1f}" y2="{y:.1f}"/>'
            f'<text class="tick" x="{_LEFT - 5}" y="{y + 3:.1f}" text-anchor="end">'
            f"{value:g}</text>"
        )
    for value in x_axis.ticks():
        x = x_axis.place(value)
        parts.append(
            f'<line class="grid" x1="{x:.1f}" x2="{x:.1f}" y1="{_TOP}" y2="{bottom}"/>'
            f'<text class="tick" x="{x:.1f}" y="{bottom + 13}" text-anchor="middle">'
            f"{value:g}</text>"
        )
    return parts


def _drawn(series: Series, colour: str, x_axis: _Axis, y_axis: _Axis) -> list[str]:
    places = [(x_axis.place(x), y_axis.place(y)) for x, y in series.points]
    parts = []
    if not series.dots and len(places) > 1:
        path = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
        dash = ' stroke-dasharray="5 4"' if series.dashed else ""
        parts.append(f'<polyline fill="none" stroke="{colour}"{dash} points="{path}"/>')
    if series.dots or len(places) <= 24:
        name = escape(series.name)
        parts += [
            f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.4" fill="{colour}">'
            f"<title>{name}: {value_x:.4g}, {value_y:.4g}</title></circle>"
            for (x, y), (value_x, value_y) in zip(places, series.points, strict=True)
        ]
    return parts


def _legend(drawn: Sequence[Series]) -> list[str]:
    parts, x = [], float(_LEFT)
    for index, one in enumerate(drawn):
        colour = one.colour or COLOURS[index % len(COLOURS)]
        parts.append(
            f'<rect x="{x:.0f}" y="{_HEIGHT - 14}" width="10" height="4" fill="{colour}"/>'
            f'<text class="tick" x="{x + 14:.0f}" y="{_HEIGHT - 8}">{escape(one.name)}</text>'
        )
        x += 26 + 5.6 * len(one.name)
    return parts


def _finite(points: Sequence[Point]) -> list[Point]:
    return [(x, y) for x, y in points if math.isfinite(x) and math.isfinite(y)]
