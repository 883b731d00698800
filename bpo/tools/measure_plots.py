"""Plots of the measures of each type, as HTML: accuracy of the text alone, margins with and without the image."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterable, Mapping, Sequence

from markupsafe import Markup

from bpo.bootstrap.job.statistics import percentile
from bpo.bootstrap.measure.margins import BIN_NATS
from bpo.tools.charts import Bar, bar_chart, figure, histogram
from bpo.tools.measures import Margins, TypeMeasures

# A few extreme pairs would leave the others in one bin.
OUTER_PERCENT = 1
_TITLES = {
    "text": "Text-only score, rejected − preferred answer, log-odds",
    "blind": "Log-probability without the image, rejected − preferred answer, nats",
    "seeing": "Log-probability with the image, preferred − rejected answer, nats",
    "image": "What the image adds to the margin of the preferred answer, nats",
}


def overview(measures: Mapping[str, TypeMeasures]) -> list[Markup]:
    """Accuracy of the text-only discriminator, and share of pairs that the model prefers wrongly without the image."""
    charts = []
    accuracies = [_bar(kind, of_type.accuracy) for kind, of_type in measures.items() if of_type.accuracy is not None]
    if accuracies:
        title = "Accuracy of the text alone (dashed: 0.5, only the image decides)"
        charts.append(figure(title, bar_chart("accuracy of the text alone", accuracies, 0.5)))
    shares = [
        _bar(kind, of_type.blind.share_above_zero) for kind, of_type in measures.items() if of_type.blind is not None
    ]
    if shares:
        title = "Rejected answer more plausible without the image, share of pairs (dashed: 0.5)"
        charts.append(figure(title, bar_chart("rejected answer more plausible without the image", shares, 0.5)))
    return charts


def _bar(label: str, value: float) -> Bar:
    return Bar(label, (value,), value, f"{value:.2f}", 0)


def facts(measures: TypeMeasures) -> list[str]:
    """The main figures in words."""
    found = []
    if measures.accuracy is not None:
        found.append(f"text alone {measures.accuracy:.2f} ± {measures.accuracy_error:.2f}")
    if measures.blind is not None:
        found.append(f"blind {measures.blind.median:+.2f} nats, above 0: {100 * measures.blind.share_above_zero:.0f} %")
    if measures.seeing is not None:
        found.append(f"seeing {measures.seeing.median:+.2f} nats")
    return found


def warnings(measures: TypeMeasures) -> list[Markup]:
    return [Markup('<p class="problem">{}</p>').format(warning) for warning in measures.warnings]


def margins(name: str, measures: TypeMeasures, keys: Iterable[str] = tuple(_TITLES)) -> Sequence[Markup]:
    """A histogram of each margin of a type that was measured, for `keys` of `text`, `blind`, `seeing` and `image`."""
    found = [(_TITLES[key], getattr(measures, key)) for key in keys]
    return [_histogram(name, title, of_key) for title, of_key in found if of_key and of_key.histogram]


def _histogram(name: str, title: str, of_key: Margins) -> Markup:
    counts = Counter(dict(of_key.histogram))
    low, high = (percentile(counts, percent) or 0 for percent in (OUTER_PERCENT, 100 - OUTER_PERCENT))
    clipped: Counter[int] = Counter()
    for value, count in counts.items():
        clipped[min(max(value, low), high)] += count
    caption = f"{title}: median {of_key.median:+.2f}, above 0: {100 * of_key.share_above_zero:.0f} %"
    return figure(caption, histogram(f"{name}: {title}", clipped, unit=BIN_NATS, mark_zero=True))
