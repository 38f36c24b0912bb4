"""Line plots as SVG text that stands inside an HTML page: no library, no script, nothing to fetch.

Colours are CSS variables of the page, so that a plot is right on light and dark ground. Lines differ in dash and mark
as well as in colour. On the logarithmic axis an error of exactly 0 sits on the lowest line, labelled 0, and one that is
not finite on the highest, labelled so: neither is left out, and neither bends the scale.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from html import escape
from math import ceil, floor, isfinite, log10

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 52, 10, 12, 34
MOST_LABELS = 8
"""Of the layers along the x axis."""


@dataclass(frozen=True, kw_only=True)
class Line:
    """One line: a value for each layer, None where there is none. `style` is a CSS class of the page."""

    label: str
    style: str
    values: Sequence[float | None]


@dataclass(frozen=True)
class _Scale:
    """Decades low..high of the logarithmic axis; a zero has a row below, what is not finite one above."""

    low: int
    high: int
    zeros: bool
    endless: bool

    @property
    def rows(self) -> int:
        return max(1, self.high - self.low) + self.zeros + self.endless

    def y(self, value: float) -> float:
        """Pixels from the top."""
        if not isfinite(value):
            place = float(self.rows)
        elif value <= 0:
            place = 0.0
        else:
            place = self.zeros + min(max(log10(value), self.low), self.high) - self.low
        return TOP + (HEIGHT - TOP - BOTTOM) * (1 - place / self.rows)

    def ticks(self) -> list[tuple[float, str]]:
        """(value, label), at most about six."""
        step = max(1, ceil((self.high - self.low) / 5))
        marks = [(10.0**decade, f"1e{decade}") for decade in range(self.low, self.high + 1, step)]
        marks = [(value, f"{value:g}" if -3 < decade < 4 else label) for (value, label), decade in _decades(marks)]
        return [
            *([(0.0, "0")] if self.zeros else []),
            *marks,
            *([(float("inf"), "∞")] if self.endless else []),
        ]


def _decades(marks: Sequence[tuple[float, str]]) -> list[tuple[tuple[float, str], int]]:
    return [(mark, round(log10(mark[0]))) for mark in marks]


def _scale(lines: Sequence[Line]) -> _Scale:
    values = [value for line in lines for value in line.values if value is not None]
    finite = [value for value in values if isfinite(value) and value > 0]
    low = floor(log10(min(finite))) if finite else -8
    high = ceil(log10(max(finite))) if finite else 0
    return _Scale(
        low, max(high, low + 1), any(value <= 0 for value in values if isfinite(value)), not all(map(isfinite, values))
    )


def line_plot(name: str, title: str, description: str, layers: Sequence[int], lines: Sequence[Line]) -> str:
    """An <svg> with a title and a description for those who cannot see it.

    Args:
        name: unique within the page, for the ids that the title and description are found by.
        layers: along the x axis.
    """
    scale = _scale(lines)
    parts = [
        f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-labelledby="{name}-title {name}-desc">',
        f'<title id="{name}-title">{escape(title)}</title>',
        f'<desc id="{name}-desc">{escape(description)}</desc>',
        *_axes(scale, layers),
        *(_path(line, layers, scale) for line in lines),
        "</svg>",
    ]
    return "\n".join(parts)


def _x(position: int, count: int) -> float:
    inner = WIDTH - LEFT - RIGHT
    return LEFT + inner * ((position + 0.5) / count)


def _axes(scale: _Scale, layers: Sequence[int]) -> list[str]:
    parts = []
    for value, label in scale.ticks():
        y = scale.y(value)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{y:.1f}" y2="{y:.1f}"/>')
        parts.append(f'<text class="tick" x="{LEFT - 6}" y="{y + 4:.1f}" text-anchor="end">{label}</text>')
    step = max(1, ceil(len(layers) / MOST_LABELS))
    for position in range(0, len(layers), step):
        x = _x(position, len(layers))
        parts.append(
            f'<text class="tick" x="{x:.1f}" y="{HEIGHT - BOTTOM + 16}" text-anchor="middle">{layers[position]}</text>'
        )
    middle = LEFT + (WIDTH - LEFT - RIGHT) / 2
    parts.append(f'<text class="tick" x="{middle:.0f}" y="{HEIGHT - 4}" text-anchor="middle">layer</text>')
    return parts


def _path(line: Line, layers: Sequence[int], scale: _Scale) -> str:
    """The line and its marks; broken where a layer has no value."""
    points, steps, pen = [], [], "M"
    for position, value in enumerate(line.values):
        if value is None:
            pen = "M"
            continue
        x, y = _x(position, len(layers)), scale.y(value)
        steps.append(f"{pen}{x:.1f} {y:.1f}")
        points.append(f'<circle cx="{x:.1f}" cy="{y:.1f}" r="2.2"/>')
        pen = "L"
    return f'<g class="series {line.style}"><path d="{" ".join(steps)}"/>{"".join(points)}</g>'
