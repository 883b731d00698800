"""Statistics at the top of the page, as HTML: all text is escaped, every plot also has its figures as text."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

from markupsafe import Markup

from bpo.formats.problems import Problem
from bpo.tools import measure_plots
from bpo.tools.charts import columns, figure, histogram, range_bars, share_bars
from bpo.tools.measures import TypeMeasures
from bpo.tools.view.summary import SourceFigures

MOST_ROWS = 10
MOST_LISTED = 50


@dataclass
class Statistics:
    """The plotted figures.

    Attributes:
        num_records: Records of the page.
        completions: Type -> number of completions.
        lengths: Type -> percentiles (5, 50, 95) of the number of words.
        refused: (source, reason) -> number of refused completions.
        margins: Smallest margin of a group, rounded to nats -> number of groups.
        sources: Figures by source of negatives.
        measures: Completion type -> measures of its pairs.
        origin: Description of the records behind `sources`.
        problems: Skipped records.
    """

    num_records: int = 0
    completions: Counter[str] = field(default_factory=Counter)
    lengths: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    refused: Counter[tuple[str, str]] = field(default_factory=Counter)
    margins: Counter[int] = field(default_factory=Counter)
    sources: Sequence[SourceFigures] = ()
    measures: Mapping[str, TypeMeasures] = field(default_factory=dict)
    origin: str = ""
    problems: Sequence[Problem] = ()


def to_json(statistics: Statistics) -> dict[str, Any]:
    """The figures behind the plots."""
    return {
        "records": statistics.num_records,
        "completions": dict(statistics.completions),
        "words": {
            kind: dict(zip(("p5", "p50", "p95"), values, strict=True)) for kind, values in statistics.lengths.items()
        },
        "refused": [[source, reason, count] for (source, reason), count in statistics.refused.most_common()],
        "smallest_margin_nats": dict(sorted(statistics.margins.items())),
        "sources": [asdict(source) for source in statistics.sources],
        "measures": {kind: asdict(measures) for kind, measures in statistics.measures.items()},
        "bad_records": len(statistics.problems),
    }


def lead(statistics: Statistics) -> Markup:
    """The line of counts."""
    parts = [_number(statistics.num_records, "record"), _number(statistics.completions.total(), "completion")]
    if statistics.refused:
        parts.append(f"{statistics.refused.total():,} refused")
    if statistics.problems:
        parts.append(f"{len(statistics.problems):,} bad, skipped")
    return Markup(" · ").join(parts)


def overview(statistics: Statistics) -> Markup:
    """The plots that are always visible."""
    types = statistics.completions.most_common(MOST_ROWS)
    charts = [figure("Completions by type", share_bars("completions by type", types))]
    lengths = [(kind, values) for kind, values in statistics.lengths.items() if len(values) == 3][:MOST_ROWS]
    if lengths:
        title = "Words per completion: 5th to 95th percentile, median marked"
        charts.append(figure(title, range_bars("words per completion, 5th, 50th and 95th percentile", lengths)))
    if statistics.refused:
        rows = [(f"{source}: {why}", count) for (source, why), count in statistics.refused.most_common(MOST_ROWS)]
        charts.append(figure("Refused, by source and reason", share_bars("refused", rows)))
    if statistics.margins:
        title = "Smallest margin per group, nats; below 0, a pair is ranked wrongly"
        charts.append(figure(title, histogram("smallest margin per group in nats", statistics.margins)))
    return Markup("").join([*charts, *measure_plots.overview(statistics.measures)])


def by_source(statistics: Statistics) -> Markup:
    """A collapsed block of plots for each source."""
    of_type, nothing = statistics.measures, TypeMeasures()
    blocks = [_source(source, of_type.get(source.type or source.name, nothing)) for source in statistics.sources]
    blocks = [block for block in blocks if block]
    if not blocks:
        return Markup("")
    head = Markup('<h2>By source</h2><p class="lead">{}</p>').format(statistics.origin)
    return head + Markup("").join(blocks)


def left_out(problems: Sequence[Problem]) -> Markup:
    """The bad records, collapsed."""
    if not problems:
        return Markup("")
    rows = Markup("").join(
        Markup("<li><b>{}</b> {}</li>").format(problem.code, problem.detail) for problem in problems[:MOST_LISTED]
    )
    more = len(problems) - MOST_LISTED
    rest = Markup("<p>{:,} more in quarantine.jsonl, next to this page.</p>").format(more) if more > 0 else Markup("")
    title = f"Skipped: {_number(len(problems), 'bad record')}"
    return Markup('<details class="left-out"><summary>{}</summary><ul dir="auto">{}</ul>{}</details>').format(
        title, rows, rest
    )


def _source(source: SourceFigures, measures: TypeMeasures) -> Markup:
    name = f"{source.name} ({source.type})" if source.type and source.type != source.name else source.name
    facts = [] if source.kept is None else [f"{source.kept:,} kept"]
    num_refused = sum(source.refused.values())
    if num_refused:
        share = "" if source.kept is None else f" ({100 * num_refused / (source.kept + num_refused):.0f} %)"
        facts.append(f"{num_refused:,} refused{share}")
    if len(source.words) == 3:
        facts.append("words {} / {} / {} (p5 / p50 / p95)".format(*source.words))
    warnings, margins = measure_plots.warnings(measures), measure_plots.margins(name, measures)
    facts += measure_plots.facts(measures)
    charts = [
        *margins,
        _shares("Refused, by reason", name, source.refused),
        _similarity(name, source.similarity),
        _shares("Negatives by kind of change", name, source.kinds),
        _shares("Objects added", name, source.added),
        _shares("Objects dropped", name, source.dropped),
    ]
    if warnings:
        facts.append(_number(len(warnings), "warning"))
    if not any(charts) and not warnings:
        return Markup("")
    return Markup(
        '<details class="source"><summary><b>{}</b> {}</summary>{}<div class="charts">{}</div></details>'
    ).format(name, " · ".join(facts), Markup("").join(warnings), Markup("").join(charts))


def _shares(title: str, source: str, counts: Mapping[str, int]) -> Markup:
    rows = sorted(counts.items(), key=lambda row: -row[1])[:MOST_ROWS]
    return figure(title, share_bars(f"{source}: {title}", rows)) if rows else Markup("")


def _similarity(source: str, bins: Sequence[int]) -> Markup:
    if not any(bins):
        return Markup("")
    labels = {
        at: f"{100 * at // len(bins)}–{100 * (at + 1) // len(bins)} %" for at in (0, len(bins) // 2, len(bins) - 1)
    }
    summary = "; ".join(f"{100 * at // len(bins)} % or more: {count}" for at, count in enumerate(bins) if count)
    title = "Similarity to the annotation: share of words kept in place"
    return figure(title, columns(f"{source}: {title}: {summary}", bins, labels))


def _number(count: int, what: str) -> str:
    return f"{count:,} {what}{'' if count == 1 else 's'}"
