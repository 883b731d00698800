"""Line charts as SVG files for the docs: the demo's chart with its own style sheet, axis titles and legend."""

from __future__ import annotations

import html
import re
from dataclasses import dataclass
from pathlib import Path

from bpo.tools.charts import Line, line_chart

COLOURS = ("#0969da", "#bc4c00", "#1a7f37", "#8250df", "#cf222e", "#57606a")
DASHES = ("none", "7 3", "2 3", "9 3 2 3", "1 2", "12 4")
_LEGEND_HEIGHT = 17
_TITLE_HEIGHT = 34


@dataclass(frozen=True)
class Series:
    label: str
    points: tuple[tuple[float, float], ...]


def plot(path: Path, title: str, x_title: str, y_title: str, series: list[Series]) -> None:
    """Writes one chart with linear axes, so that a linear cost is a straight line."""
    chart = str(line_chart(title, [Line(curve.label, curve.points, k) for k, curve in enumerate(series)]))
    found = re.fullmatch(r'<svg [^>]*viewBox="0 0 (\d+) (\d+)">(.*)</svg>', chart, flags=re.DOTALL)
    assert found, chart[:200]
    width, height = int(found[1]), int(found[2])
    bottom = _TITLE_HEIGHT + height + 14
    total = bottom + _LEGEND_HEIGHT * len(series) + 8
    style = "".join(
        f".series-{k}{{stroke:{COLOURS[k % 6]};stroke-dasharray:{DASHES[k % 6]}}}" for k in range(len(series))
    )
    legend = "".join(
        f'<line class="line series-{k}" x1="12" x2="46" y1="{bottom + 10 + _LEGEND_HEIGHT * k}" '
        f'y2="{bottom + 10 + _LEGEND_HEIGHT * k}"/>'
        f'<text x="54" y="{bottom + 14 + _LEGEND_HEIGHT * k}">{html.escape(curve.label)}</text>'
        for k, curve in enumerate(series)
    )
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {total}" width="{width * 1.6:.0f}" '
        f'role="img" aria-label="{html.escape(title)}"><style>'
        "text{font:11px system-ui,sans-serif;fill:#24292f}.grid{stroke:#d0d7de}.line{fill:none;stroke-width:1.8}"
        f".title{{font-weight:600;font-size:13px}}{style}</style>"
        f'<rect width="{width}" height="{total}" fill="#fff"/>'
        f'<text class="title" x="12" y="17">{html.escape(title)}</text>'
        f'<text x="12" y="{_TITLE_HEIGHT}">{html.escape(y_title)}</text>'
        f'<g transform="translate(0 {_TITLE_HEIGHT})">{found[3]}</g>'
        f'<text x="{width - 10}" y="{bottom}" text-anchor="end">{html.escape(x_title)}</text>{legend}</svg>\n',
        encoding="utf-8",
    )
