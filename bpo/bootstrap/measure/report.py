"""The measures as tables for a terminal."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

from bpo.bootstrap.measure.text import TypeMeasures

_COLUMNS = (
    "type",
    "pairs",
    "text alone",
    "share > 0",
    "length alone",
    "words changed",
    "nothing new",
    "top text",
    "refused",
)


def table(measures: Mapping[str, TypeMeasures]) -> str:
    """One line per type; a dash where nothing is known."""
    return _aligned([_COLUMNS, *(_row(kind, found) for kind, found in measures.items())])


def model_table(types: Mapping[str, Mapping[str, Any]]) -> str:
    """One line per type with the medians, in nats, of `bpo.bootstrap.measure.margins.figures_by_type`."""
    head = ("type", "pairs", "blind", "share > 0", "seeing", "prefers rejected", "wide", "image adds")
    return _aligned([head, *(_model_row(kind, found) for kind, found in types.items())])


def _model_row(kind: str, found: Mapping[str, Any]) -> tuple[str, ...]:
    blind, seeing, image = found["blind"], found["seeing"], found["image"]
    return (
        kind,
        f"{found['pairs']:,}",
        f"{blind['median']:+.2f} +- {blind['median_se']:.2f}",
        f"{blind['share_above_zero']:.2f} +- {blind['share_above_zero_se']:.2f}",
        f"{seeing['median']:+.2f}",
        f"{seeing['share_below_zero']:.1%}",
        f"{seeing['share_wide']:.1%}",
        f"{image['median']:+.2f}",
    )


def _aligned(rows: Sequence[tuple[str, ...]]) -> str:
    """The first column to the left, the others to the right."""
    widths = [max(len(row[column]) for row in rows) for column in range(len(rows[0]))]
    lines = []
    for row in rows:
        first, *rest = (
            f"{cell:<{width}}" if not n else f"{cell:>{width}}"
            for n, (cell, width) in enumerate(zip(row, widths, strict=True))
        )
        lines.append("  ".join([first, *rest]).rstrip())
    return "\n".join(lines)


def _row(kind: str, found: TypeMeasures) -> tuple[str, ...]:
    text, hard = found.text, found.hardness
    return (
        kind,
        f"{found.num_pairs:,}",
        f"{text.accuracy:.2f} +- {text.standard_error:.2f}" if text else "-",
        f"{text.share_above_zero:.2f}" if text else "-",
        f"{text.length_accuracy:.2f}" if text else "-",
        f"{hard.words_changed:g}" if hard.num_diffs else "-",
        f"{hard.false_negatives:.1%}" if hard.num_diffs else "-",
        f"{hard.top_text_share:.1%}" if hard.num_texts else "-",
        "-" if hard.refused_share is None else f"{hard.refused_share:.1%}",
    )
