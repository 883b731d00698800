"""Inline SVG charts: bars with their range over seeds, lines over steps, counts by name, histograms.

The page's style sheet sets the colours by class (`series-0`, `series-1`, ...), so that charts follow light and dark
schemes; lines also differ in their dashes, not only in colour.
"""

from __future__ import annotations

import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from markupsafe import Markup

_WIDTH = 440
_ROW_HEIGHT = 26
_LABEL_WIDTH = 150
_VALUE_WIDTH = 62
_LONGEST_LABEL = 220
_CHARACTER_WIDTH = 8
_LINE_HEIGHT = 210
_LEFT, _RIGHT, _TOP, _BOTTOM = 52, 10, 12, 26


@dataclass(frozen=True, slots=True)
class Bar:
    """A row of a bar chart: a bar for the median, dots for the values of all seeds."""

    label: str
    values: tuple[float, ...]
    median: float
    text: str
    series: int


@dataclass(frozen=True, slots=True)
class Line:
    """A line of a line chart, as ordered (step, value) points."""

    label: str
    points: tuple[tuple[float, float], ...]
    series: int


def bar_chart(title: str, bars: Sequence[Bar], reference: float) -> Markup:
    """Horizontal bars from 0 to a round upper limit, and a dashed line at `reference` (the base model's median)."""
    upper = _nice_upper(max([reference, *(value for bar in bars for value in bar.values)]))
    height = _ROW_HEIGHT * len(bars) + 6
    span = _WIDTH - _LABEL_WIDTH - _VALUE_WIDTH

    def x_of(value: float) -> str:
        return f"{_LABEL_WIDTH + span * value / upper:.1f}"

    parts = []
    for row, bar in enumerate(bars):
        top = row * _ROW_HEIGHT + 4
        middle = top + (_ROW_HEIGHT - 6) / 2
        width = f"{span * bar.median / upper:.1f}"
        parts.append(
            Markup(
                '<text class="label" x="{}" y="{}" text-anchor="end">{}</text>'
                '<rect class="bar series-{}" x="{}" y="{}" width="{}" height="{}" rx="3"/>'
            ).format(_LABEL_WIDTH - 8, middle + 4, bar.label, bar.series, _LABEL_WIDTH, top, width, _ROW_HEIGHT - 6)
        )
        if len(bar.values) > 1:
            low, high = x_of(min(bar.values)), x_of(max(bar.values))
            parts.append(
                Markup('<line class="range" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(low, high, middle, middle)
            )
            dot = Markup('<circle class="seed" cx="{}" cy="{}" r="2.6"/>')
            parts += [dot.format(x_of(value), middle) for value in bar.values]
        parts.append(
            Markup('<text class="value" x="{}" y="{}" text-anchor="end">{}</text>').format(
                _WIDTH - 2, middle + 4, bar.text
            )
        )
    parts.append(Markup('<line class="reference" x1="{0}" x2="{0}" y1="0" y2="{1}"/>').format(x_of(reference), height))
    summary = "; ".join(f"{bar.label} {bar.text}" for bar in bars)
    return _svg(f"{title}: {summary}", height, parts)


def line_chart(title: str, lines: Sequence[Line], reference: float | None = None) -> Markup:
    """Lines over steps with ticks on both axes; `reference` draws a dashed horizontal line."""
    points = [point for line in lines for point in line.points]
    values = [value for _, value in points] + ([reference] if reference is not None else [])
    y_ticks = _ticks(min(values), max(values))
    x_ticks = _ticks(min(0.0, *(step for step, _ in points)), max(step for step, _ in points))
    x_low, x_high = x_ticks[0], max(step for step, _ in points)
    y_low, y_high = y_ticks[0], y_ticks[-1]
    plot_width, plot_height = _WIDTH - _LEFT - _RIGHT, _LINE_HEIGHT - _TOP - _BOTTOM

    def x_of(step: float) -> str:
        return f"{_LEFT + plot_width * (step - x_low) / ((x_high - x_low) or 1):.1f}"

    def y_of(value: float) -> str:
        return f"{_TOP + plot_height * (y_high - value) / ((y_high - y_low) or 1):.1f}"

    parts = []
    for tick in y_ticks:
        y = y_of(tick)
        parts.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>'
                '<text class="tick" x="{}" y="{:.1f}" text-anchor="end">{}</text>'
            ).format(_LEFT, _WIDTH - _RIGHT, y, y, _LEFT - 7, float(y) + 4, _tick_text(tick, y_ticks))
        )
    for tick in (tick for tick in x_ticks if tick <= x_high):
        parts.append(
            Markup('<text class="tick" x="{}" y="{}" text-anchor="middle">{}</text>').format(
                x_of(tick), _LINE_HEIGHT - 8, _tick_text(tick, x_ticks)
            )
        )
    if reference is not None:
        y = y_of(reference)
        parts.append(
            Markup('<line class="reference" x1="{}" x2="{}" y1="{}" y2="{}"/>').format(_LEFT, _WIDTH - _RIGHT, y, y)
        )
    for line in lines:
        path = " ".join(f"{x_of(step)},{y_of(value)}" for step, value in line.points)
        parts.append(Markup('<polyline class="line series-{}" points="{}"/>').format(line.series, path))
    ends = "; ".join(f"{line.label} ends at {line.points[-1][1]:.3g}" for line in lines)
    return _svg(f"{title} over training steps: {ends}", _LINE_HEIGHT, parts)


def share_bars(title: str, counts: Sequence[tuple[str, int]]) -> Markup:
    """Counts by name as horizontal bars, each with its count."""
    most = max((count for _, count in counts), default=1)
    left = _label_width(label for label, _ in counts)
    span = _WIDTH - left - _VALUE_WIDTH
    parts = []
    for row, (label, count) in enumerate(counts):
        top = row * _ROW_HEIGHT + 4
        baseline = top + (_ROW_HEIGHT - 6) / 2 + 4
        parts.append(_label(label, left, baseline))
        parts.append(
            Markup(
                '<rect class="bar" x="{}" y="{}" width="{:.1f}" height="{}" rx="3"/>'
                '<text class="value" x="{:.1f}" y="{}">{:,}</text>'
            ).format(
                left,
                top,
                span * count / most,
                _ROW_HEIGHT - 6,
                left + span * count / most + 6,
                baseline,
                count,
            )
        )
    summary = "; ".join(f"{label} {count}" for label, count in counts)
    return _svg(f"{title}: {summary}", _ROW_HEIGHT * len(counts) + 6, parts)


def range_bars(title: str, rows: Sequence[tuple[str, Sequence[int]]]) -> Markup:
    """(low, middle, high) by name: a bar from low to high with a mark at the middle, and the values as text."""
    most = _nice_upper(max((values[-1] for _, values in rows), default=1))
    start = _label_width(label for label, _ in rows)
    span = _WIDTH - start - 2 * _VALUE_WIDTH
    parts = []
    for row, (label, (low, middle, high)) in enumerate(rows):
        top = row * _ROW_HEIGHT + 4
        baseline = top + (_ROW_HEIGHT - 6) / 2 + 4
        left, mark, right = (start + span * value / most for value in (low, middle, high))
        parts.append(_label(label, start, baseline))
        parts.append(
            Markup(
                '<line class="grid" x1="{}" x2="{}" y1="{}" y2="{}"/>'
                '<rect class="bar range" x="{:.1f}" y="{}" width="{:.1f}" height="{}" rx="3"/>'
                '<rect class="mark" x="{:.1f}" y="{}" width="3" height="{}"/>'
                '<text class="value" x="{}" y="{}" text-anchor="end">{:,} \u00b7 {:,} \u00b7 {:,}</text>'
            ).format(
                *(start, start + span, baseline - 4, baseline - 4),
                *(left, top + 3, max(3.0, right - left), _ROW_HEIGHT - 12),
                *(mark - 1.5, top, _ROW_HEIGHT - 6),
                *(_WIDTH - 2, baseline, low, middle, high),
            )
        )
    summary = "; ".join(f"{label} {low}, {middle}, {high}" for label, (low, middle, high) in rows)
    return _svg(f"{title}: {summary}", _ROW_HEIGHT * len(rows) + 6, parts)


def histogram(
    title: str, counts: Mapping[int, int], max_bins: int = 40, *, unit: float = 1.0, mark_zero: bool = False
) -> Markup:
    """Histogram of integers in equal bins of a round width.

    Args:
        unit: What an integer stands for, such as 0.5 for halves.
        mark_zero: Draws a dashed line at 0, which is then in the plot.
    """
    counts = {0: 0, **counts} if mark_zero else counts
    low, high = min(counts, default=0), max(counts, default=0)
    width = max(1, math.ceil(_nice_upper((high - low + 1) / max_bins)))
    first = math.floor(low / width)
    bins = [0] * (math.floor(high / width) - first + 1)
    for value, count in counts.items():
        bins[math.floor(value / width) - first] += count
    labels = {index: f"{(first + index) * width * unit:g}" for index in (0, len(bins) // 2, len(bins) - 1)}
    total = sum(counts.values())
    summary = f"{title}: {total} values from {low * unit:g} to {high * unit:g}, bins of {width * unit:g}"
    return columns(summary, bins, labels, reference=-first if mark_zero else None)


def columns(title: str, values: Sequence[int], labels: Mapping[int, str], reference: float | None = None) -> Markup:
    """Counts as vertical bars, some of them labelled below; the axis shows the largest count.

    Args:
        reference: Number of the bar at whose left edge a dashed line is drawn.
    """
    most = max(values, default=0) or 1
    plot_width, plot_height = _WIDTH - _LEFT - _RIGHT, _LINE_HEIGHT - _TOP - _BOTTOM
    each = plot_width / max(1, len(values))
    bottom = _TOP + plot_height
    parts = [Markup('<line class="grid" x1="{0}" x2="{1}" y1="{2}" y2="{2}"/>').format(_LEFT, _WIDTH - _RIGHT, bottom)]
    for index, value in enumerate(values):
        # Small counts remain visible.
        height = max(1.5, plot_height * value / most) if value else 0
        parts.append(
            Markup('<rect class="bar" x="{:.1f}" y="{:.1f}" width="{:.1f}" height="{:.1f}"/>').format(
                _LEFT + index * each, bottom - height, max(0.5, each - 1), height
            )
        )
    if reference is not None:
        parts.append(
            Markup('<line class="reference" x1="{0:.1f}" x2="{0:.1f}" y1="{1}" y2="{2}"/>').format(
                _LEFT + reference * each, _TOP, bottom
            )
        )
    for index, label in labels.items():
        x = _LEFT + (index + 0.5) * each
        anchor = "end" if x > _WIDTH - 60 else "middle"
        parts.append(
            Markup('<text class="tick" x="{:.1f}" y="{}" text-anchor="{}">{}</text>').format(
                _WIDTH - 2 if anchor == "end" else x, _LINE_HEIGHT - 8, anchor, label
            )
        )
    parts.append(
        Markup('<text class="tick" x="{}" y="{}" text-anchor="end">{:,}</text>').format(_LEFT - 7, _TOP + 8, most)
    )
    return _svg(title, _LINE_HEIGHT, parts)


def figure(caption: str, svg: Markup) -> Markup:
    """A chart with its caption."""
    return Markup("<figure><figcaption>{}</figcaption>{}</figure>").format(caption, svg)


def legend_swatch(series: int) -> Markup:
    """A short line sample for the legend."""
    return Markup(
        '<svg class="swatch" viewBox="0 0 30 10" width="30" height="10" aria-hidden="true">'
        '<line class="line series-{}" x1="1" x2="29" y1="5" y2="5"/></svg>'
    ).format(series)


def thin_out(points: Sequence[tuple[float, float]], max_points: int) -> tuple[tuple[float, float], ...]:
    """Means over equal windows of consecutive points, at most `max_points` of them."""
    window = max(1, math.ceil(len(points) / max_points))
    chunks = [points[start : start + window] for start in range(0, len(points), window)]
    return tuple((_mean([step for step, _ in c]), _mean([value for _, value in c])) for c in chunks)


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)


def _svg(label: str, height: float, parts: Sequence[Markup]) -> Markup:
    return Markup('<svg class="chart" role="img" aria-label="{}" viewBox="0 0 {} {}">{}</svg>').format(
        label, _WIDTH, height, Markup("").join(parts)
    )


def _label_width(labels: Iterable[str]) -> int:
    """Width of the row labels, limited to _LONGEST_LABEL."""
    return min(_LONGEST_LABEL, max(60, 12 + _CHARACTER_WIDTH * max(map(len, labels), default=0)))


def _label(label: str, width: int, baseline: float) -> Markup:
    """A row label, right-aligned at `width`; long labels are truncated and shown in full as a tooltip."""
    length = (width - 12) // _CHARACTER_WIDTH
    whole = label if len(label) <= length else label[: length - 1] + "\u2026"
    return Markup('<text class="label" x="{}" y="{}" text-anchor="end"><title>{}</title>{}</text>').format(
        width - 8, baseline, label, whole
    )


def _nice_upper(value: float) -> float:
    """The smallest 1, 1.5, 2, 2.5, 3, 4, 5, 6 or 8 times a power of ten that is at least `value`."""
    if value <= 0:
        return 1.0
    power = 10.0 ** math.floor(math.log10(value))
    return next(factor * power for factor in (1, 1.5, 2, 2.5, 3, 4, 5, 6, 8, 10) if factor * power >= value * 0.9999)


def _ticks(low: float, high: float, max_ticks: int = 5) -> list[float]:
    """Round tick values that cover [low, high]."""
    if high - low < 1e-12:
        low, high = low - 0.5, high + 0.5
    raw = (high - low) / (max_ticks - 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(factor * power for factor in (1, 2, 2.5, 5, 10) if factor * power >= raw * 0.9999)
    first, last = math.floor(low / step + 1e-9), math.ceil(high / step - 1e-9)
    return [number * step for number in range(first, last + 1)]


def _tick_text(value: float, ticks: Sequence[float]) -> str:
    step = ticks[1] - ticks[0]
    decimals = max(0, -math.floor(math.log10(step) + 1e-9))
    if round(step, decimals) != round(step, decimals + 1):
        decimals += 1
    return f"{value:.{decimals}f}".replace("-", "\u2212")
