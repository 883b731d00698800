"""The pictures of docs/bootstrapping.md, from a results file of this benchmark.

python -m benchmarks.grounding.plots benchmarks/results/grounding-cpu.json docs/images
"""

from __future__ import annotations

import html
import json
import sys
from collections.abc import Mapping
from pathlib import Path
from typing import Any

WIDTH, LEFT, RIGHT, TOP = 640, 150, 20, 46
_STYLE = (
    "text{font:12px system-ui,sans-serif;fill:#24292f}.small{font-size:10.5px;fill:#57606a}.grid{stroke:#d0d7de}"
    ".zero{stroke:#24292f;stroke-dasharray:4 3}.bar{fill:#0969da}.dot{fill:#bc4c00}"
    ".range{stroke:#bc4c00;stroke-width:2}.title{font-weight:600;font-size:13px}"
)


def _svg(path: Path, title: str, height: float, parts: list[str]) -> None:
    path.write_text(
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {WIDTH} {height:.0f}" width="{WIDTH}" role="img" '
        f'aria-label="{html.escape(title)}"><style>{_STYLE}</style>'
        f'<rect width="{WIDTH}" height="{height:.0f}" fill="#fff"/>'
        f'<text class="title" x="12" y="20">{html.escape(title)}</text>{"".join(parts)}</svg>\n',
        encoding="utf-8",
    )


def _scale(value: float, low: float, high: float) -> float:
    return LEFT + (WIDTH - LEFT - RIGHT) * (value - low) / (high - low)


def outcome_by_accuracy(path: Path, sources: Mapping[str, Mapping[str, Any]], ratios: Mapping[str, Any]) -> None:
    """Per source, sorted by how well the text alone tells: wrong facts after training over those of fine-tuning."""
    names = sorted(sources, key=lambda name: sources[name]["text_accuracy"])
    ends = [end for name in names for end in ratios[name]["interval"]]
    low, high = min(0.5, *ends) - 0.02, max(1.1, *ends) + 0.02
    bottom = TOP + 34 * len(names)
    parts = ['<text class="small" x="12" y="38">source, accuracy of the text alone</text>']
    for tick in (round(0.1 * k, 1) for k in range(int(10 * low), int(10 * high) + 1)):
        if low <= tick <= high:
            x = _scale(tick, low, high)
            line = "zero" if tick == 1 else "grid"
            parts.append(f'<line class="{line}" x1="{x:.1f}" x2="{x:.1f}" y1="{TOP}" y2="{bottom}"/>')
            parts.append(f'<text class="small" x="{x:.1f}" y="{bottom + 14}" text-anchor="middle">{tick:g}</text>')
    for row, name in enumerate(names):
        y = TOP + 34 * row + 17
        start, end = (_scale(value, low, high) for value in ratios[name]["interval"])
        accuracy = sources[name]["text_accuracy"]
        parts.append(f'<text x="12" y="{y + 4}">{html.escape(name)}, {accuracy:.2f}</text>')
        parts.append(f'<line class="range" x1="{start:.1f}" x2="{end:.1f}" y1="{y}" y2="{y}"/>')
        parts.append(f'<circle class="dot" cx="{_scale(ratios[name]["ratio"], low, high):.1f}" cy="{y}" r="4.5"/>')
    note = "wrong facts over those of fine-tuning on the chosen answers, with 95 % intervals; 1: no better"
    parts.append(f'<text class="small" x="{WIDTH - RIGHT}" y="{bottom + 30}" text-anchor="end">{note}</text>')
    _svg(path, "Does training on a source beat fine-tuning?", bottom + 40, parts)


def blind_preference(path: Path, sources: Mapping[str, Mapping[str, Any]], reach: float = 20.0) -> None:
    """Per source: histogram of how much more plausible the rejected answer is without its image, in nats."""
    parts = []
    for row, name in enumerate(sorted(sources, key=lambda name: abs(sources[name]["blind_share"] - 0.5))):
        base = TOP + 62 * row + 44
        bins: dict[int, int] = {}
        for edge, count in sources[name]["blind_histogram"].items():
            at = int(max(-reach, min(reach - 1, float(edge) // 1)))
            bins[at] = bins.get(at, 0) + count
        most = max(bins.values())
        width = _scale(1, -reach, reach) - _scale(0, -reach, reach)
        for at, count in sorted(bins.items()):
            tall = 40 * count / most
            x = _scale(at, -reach, reach)
            parts.append(
                f'<rect class="bar" x="{x:.1f}" y="{base - tall:.1f}" width="{width - 1:.1f}" height="{tall:.1f}"/>'
            )
        zero = _scale(0, -reach, reach)
        parts.append(f'<line class="grid" x1="{LEFT}" x2="{WIDTH - RIGHT}" y1="{base}" y2="{base}"/>')
        parts.append(f'<line class="zero" x1="{zero:.1f}" x2="{zero:.1f}" y1="{base - 44}" y2="{base}"/>')
        parts.append(f'<text x="12" y="{base - 20}">{html.escape(name)}</text>')
        parts.append(f'<text class="small" x="12" y="{base - 5}">above 0: {sources[name]["blind_share"]:.0%}</text>')
    bottom = TOP + 62 * len(sources)
    for tick in (-reach, -reach / 2, 0, reach / 2, reach):
        x = _scale(tick, -reach, reach)
        anchor = "end" if tick == reach else "middle"
        parts.append(f'<text class="small" x="{x:.1f}" y="{bottom + 2}" text-anchor="{anchor}">{tick:g}</text>')
    note = "log p(rejected) - log p(preferred) under other images, nats; balanced around 0 is good"
    parts.append(f'<text class="small" x="{WIDTH - RIGHT}" y="{bottom + 18}" text-anchor="end">{note}</text>')
    _svg(path, "Which answer does the model prefer without its image?", bottom + 28, parts)


def main(results: Path, folder: Path) -> None:
    found = json.loads(results.read_text(encoding="utf-8"))
    sources = found["predictions"]["sources"]
    outcome_by_accuracy(folder / "grounding-sources.svg", sources, found["against_control"])
    blind_preference(folder / "grounding-blind.svg", sources)


if __name__ == "__main__":
    main(Path(sys.argv[1]), Path(sys.argv[2]))
