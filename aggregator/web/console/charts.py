"""Line charts as SVG: no script draws them, and the style sheet colours them for light and dark."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass

from markupsafe import Markup

_WIDTH, _HEIGHT = 360, 190
_LEFT, _RIGHT, _TOP, _BOTTOM = 44, 348, 12, 162
_MOST_LABELS = 6


@dataclass(frozen=True)
class Series:
    """A line.

    Attributes:
        points: (x, y), by x.
        dashed: it is a bound, not a measurement.
    """

    name: str
    points: tuple[tuple[float, float], ...]
    dashed: bool = False


def line_chart(series: Sequence[Series], *, title: str, x: str, share: bool = False) -> Markup:
    """Draws lines over a common axis.

    Args:
        series: at most one of them dashed; those without points are left out.
        title: what a reader who cannot see it is told.
        x: what the horizontal axis counts.
        share: values are shares of one, shown in percent.
    """
    drawn = [each for each in series if each.points]
    points = [point for each in drawn for point in each.points]
    if not points:
        return Markup("")
    columns = sorted({at for at, _ in points})
    low, high, step = _scale([value for _, value in points])
    first, last = columns[0], columns[-1]

    def across(at: float) -> float:
        return (
            _LEFT + (at - first) / (last - first) * (_RIGHT - _LEFT) if last > first else (_LEFT + _RIGHT) / 2
        )

    def down(value: float) -> float:
        return _BOTTOM - (value - low) / (high - low) * (_BOTTOM - _TOP)

    def label(value: float) -> str:
        return f"{100 * value:.4g} %" if share else f"{value:.4g}"

    parts = [
        Markup('<svg class="chart" viewBox="0 0 {} {}" role="img"><title>{}</title>').format(
            _WIDTH, _HEIGHT, title
        )
    ]
    for index in range(round((high - low) / step) + 1):
        value = low + index * step
        parts.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{y:.1f}" y2="{y:.1f}"/>'
                '<text x="{}" y="{t:.1f}" text-anchor="end">{}</text>'
            ).format(_LEFT, _RIGHT, _LEFT - 6, label(value), y=down(value), t=down(value) + 3.5)
        )
    every = math.ceil(len(columns) / _MOST_LABELS)
    for at in columns[::every]:
        parts.append(
            Markup('<text x="{:.1f}" y="{}" text-anchor="middle">{:g}</text>').format(
                across(at), _BOTTOM + 14, at
            )
        )
    parts.append(
        Markup('<text class="axis" x="{}" y="{}" text-anchor="middle">{}</text>').format(
            (_LEFT + _RIGHT) / 2, _HEIGHT - 2, x
        )
    )
    for index, each in enumerate(drawn):
        place = " ".join(f"{across(at):.1f},{down(value):.1f}" for at, value in each.points)
        kind = "bound" if each.dashed else f"line-{index}"
        parts.append(Markup('<polyline class="line {}" points="{}"/>').format(kind, place))
        for at, value in () if each.dashed else each.points:
            parts.append(
                Markup(
                    '<circle class="dot {}" cx="{:.1f}" cy="{:.1f}" r="2.5"><title>{}</title></circle>'
                ).format(kind, across(at), down(value), f"{each.name}, {x} {at:g}: {label(value)}")
            )
    parts.append(Markup("</svg>"))
    return Markup("").join(parts)


def _scale(values: Sequence[float]) -> tuple[float, float, float]:
    # From a round number below to one above, in three to six steps of 1, 2 or 5.
    low, high = min(values), max(values)
    if high == low:
        low, high = low - abs(low) * 0.1 - 1e-9, high + abs(high) * 0.1 + 1e-9
    raw = (high - low) / 4
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(power * factor for factor in (1, 2, 5, 10) if power * factor >= raw)
    return math.floor(low / step + 1e-9) * step, math.ceil(high / step - 1e-9) * step, step
