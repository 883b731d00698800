"""The demo's report: one self-contained HTML page without scripts or external resources.

`write_report(path, data)` renders `ReportData`; `mark_answer` and `read_curves` create its parts.
"""

from __future__ import annotations

import base64
import hashlib
import io
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, fields
from pathlib import Path
from statistics import median

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from PIL import Image

from bpo.evaluation.benchmarks.chair import Description
from bpo.formats.jsonfiles import read_records
from bpo.formats.lexicon import ObjectLexicon
from bpo.tools import measure_plots
from bpo.tools.charts import Bar, Line, bar_chart, legend_swatch, line_chart, thin_out
from bpo.tools.measures import TypeMeasures

ASSETS = Path(__file__).resolve().parent / "assets"
MAX_CURVE_POINTS = 60
NUM_SERIES = 7  # colours and dashes in report.css
CURVES = {
    "loss": "Loss",
    "rewards/margins": "Reward margin",
    "rewards/accuracies": "Reward accuracy",
    "logps/chosen": "Log-prob of chosen",
    "logps/rejected": "Log-prob of rejected",
}
NEGATIVES = {
    "mllm-hal": "answer to the weakened image",
    "llm-hal": "injected errors",
    "mllm-self": "answer to the image",
    "swap": "annotation of another image",
}


@dataclass(frozen=True, slots=True)
class Figures:
    """Scores of one model, as fractions in [0, 1]. Lower chair_i and chair_s are better."""

    chair_i: float
    chair_s: float
    recall: float
    pope_accuracy: float
    pope_adversarial: float
    pope_f1: float
    pope_yes_ratio: float


METRICS: dict[str, tuple[str, str]] = {
    "chair_i": ("CHAIR per instance", "share of named objects that are absent; lower is better"),
    "chair_s": ("CHAIR per sentence", "share of descriptions that name an absent object; lower is better"),
    "recall": ("Recall", "share of present objects that are named; higher is better"),
    "pope_accuracy": ("POPE accuracy", "share of correct yes/no answers, mean of three splits; higher is better"),
    "pope_adversarial": ("POPE adversarial", "accuracy if the absent objects are companions; higher is better"),
    "pope_f1": ("POPE F1", "of the yes answers, mean of three splits; higher is better"),
    "pope_yes_ratio": ("POPE yes-ratio", "share of yes answers; half of the correct answers are yes"),
}


@dataclass(frozen=True, slots=True)
class Variant:
    """A row of the table.

    Attributes:
        name: Key, such as `bpo_weaken_only`.
        label: Name in tables and charts.
        description: Short description of its training data.
        runs: Scores, one entry per seed, in the same order for every variant.
    """

    name: str
    label: str
    description: str
    runs: tuple[Figures, ...]

    def values(self, metric: str) -> tuple[float, ...]:
        return tuple(getattr(run, metric) for run in self.runs)

    def median(self, metric: str) -> float:
        return median(self.values(metric))


@dataclass(frozen=True, slots=True)
class Curves:
    """Metric name -> (step, value) points of one training run."""

    variant: str
    points: dict[str, tuple[tuple[float, float], ...]]


@dataclass(frozen=True, slots=True)
class MarkedAnswer:
    """An answer with the spans of words that name absent objects, and the present objects it does not name."""

    label: str
    text: str
    hallucinated: tuple[tuple[int, int], ...] = ()
    missing: tuple[str, ...] = ()

    @property
    def pieces(self) -> tuple[tuple[str, bool], ...]:
        """The text split into (piece, hallucinated)."""
        cuts, at = [], 0
        for start, end in self.hallucinated:
            cuts += [(self.text[at:start], False), (self.text[start:end], True)]
            at = end
        return tuple((piece, wrong) for piece, wrong in [*cuts, (self.text[at:], False)] if piece)


@dataclass(frozen=True, slots=True)
class TrainingExample:
    """A group: the scene, its weakened image if there is one, the chosen and the rejected answers."""

    id: str
    prompt: str
    scene: Image.Image
    weakened: Image.Image | None
    noise_step: int | None
    chosen: MarkedAnswer
    rejected: tuple[MarkedAnswer, ...]


@dataclass(frozen=True, slots=True)
class EvaluationExample:
    """A scene not used in training, and the models' answers."""

    id: str
    scene: Image.Image
    present: tuple[str, ...]
    answers: tuple[MarkedAnswer, ...]


@dataclass(frozen=True, slots=True)
class ReportData:
    """The contents of the page.

    Attributes:
        explanation: One paragraph that describes the experiment.
        seeds: The seeds of the runs.
        variants: Rows of the table; the first is the base model.
        headline: Name of the variant that the top of the page compares with the base.
        curves: Training curves of the first seed.
        measures: Completion type -> measures of its pairs, of the first seed.
        stage_seconds: Stage -> seconds.
        versions: Package -> version.
    """

    title: str
    explanation: str
    seeds: tuple[int, ...]
    variants: tuple[Variant, ...]
    headline: str
    curves: tuple[Curves, ...]
    measures: Mapping[str, TypeMeasures]
    training_examples: tuple[TrainingExample, ...]
    evaluation_examples: tuple[EvaluationExample, ...]
    stage_seconds: dict[str, float]
    versions: dict[str, str]


@dataclass(frozen=True, slots=True)
class _Change:
    """A headline figure: a metric of the base and of the variant, and the change."""

    title: str
    before: str
    after: str
    change: str


def mark_answer(label: str, text: str, present: frozenset[str], lexicon: ObjectLexicon) -> MarkedAnswer:
    """An answer about an image with the objects `present`; mentions of other objects are marked."""
    found = Description(present, lexicon.mentions(text))
    spans = tuple((mention.start, mention.end) for mention in found.hallucinated)
    return MarkedAnswer(label, text, spans, found.missing)


def read_curves(variant: str, metrics_jsonl: Path) -> Curves:
    """Reads the curves for the report from a training run's metrics.jsonl.

    Raises:
        ValueError: The file is missing or not JSONL, or a line has no step.
    """
    points: dict[str, list[tuple[float, float]]] = {name: [] for name in CURVES}
    for record in read_records(metrics_jsonl):
        step = record.value.get("step")
        if not isinstance(step, int):
            raise ValueError(f"{record.where}: field 'step' is {step!r}; it must be a whole number")
        for name, series in points.items():
            if isinstance(value := record.value.get(name), (int, float)):
                series.append((float(step), float(value)))
    return Curves(variant, {name: tuple(series) for name, series in points.items() if series})


def write_report(path: Path, data: ReportData) -> None:
    """Writes the page.

    Raises:
        ValueError: The headline is not among the variants, or a variant does not have one run per seed.
    """
    names = [variant.name for variant in data.variants]
    if data.headline not in names:
        raise ValueError(f"headline {data.headline!r} is not among the variants {names}")
    if any(len(variant.runs) != len(data.seeds) for variant in data.variants):
        raise ValueError(f"every variant needs one run per seed ({len(data.seeds)})")
    environment = Environment(
        loader=FileSystemLoader(ASSETS),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"png": _png_uri, "percent": _percent, "swatch": legend_swatch}
    style = (ASSETS / "report.css").read_text(encoding="utf-8")
    html = environment.get_template("report.html.jinja").render(
        data=data,
        metrics=METRICS,
        style=Markup(style),  # trusted file; the policy allows only its hash
        style_hash=base64.b64encode(hashlib.sha256(style.encode()).digest()).decode(),
        changes=list(_changes(data)),
        bar_charts={metric: _bars(data, metric) for metric in METRICS},
        negatives=NEGATIVES,
        measure_plots=measure_plots,
        line_charts={title: chart for title, chart in _lines(data) if chart},
        series={name: number % NUM_SERIES for number, name in enumerate(names)},
        total_seconds=sum(data.stage_seconds.values()),
        max_curve_points=MAX_CURVE_POINTS,
    )
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(html, encoding="utf-8")


def _changes(data: ReportData) -> Iterable[_Change]:
    base = data.variants[0]
    headline = next(variant for variant in data.variants if variant.name == data.headline)
    for metric in ("chair_i", "recall", "pope_accuracy"):
        before, after = base.median(metric), headline.median(metric)
        if metric == "chair_i":
            change = f"{100 * (after / before - 1):+.0f} %" if before else "was 0"
        else:
            change = f"{100 * (after - before):+.1f} points"
        title = METRICS[metric][0]
        yield _Change(title, _percent(before), _percent(after), change.replace("-", "\u2212"))


def _bars(data: ReportData, metric: str) -> Markup:
    bars = [
        Bar(v.label, v.values(metric), v.median(metric), _percent(v.median(metric)), number % NUM_SERIES)
        for number, v in enumerate(data.variants)
    ]
    return bar_chart(METRICS[metric][0], bars, data.variants[0].median(metric))


def _lines(data: ReportData) -> Iterable[tuple[str, Markup | None]]:
    number_of = {variant.name: (number, variant.label) for number, variant in enumerate(data.variants)}
    for metric, title in CURVES.items():
        lines = []
        for curves in data.curves:
            if metric in curves.points:
                number, label = number_of[curves.variant]
                lines.append(Line(label, thin_out(curves.points[metric], MAX_CURVE_POINTS), number % NUM_SERIES))
        yield title, line_chart(title, lines) if lines else None


def _png_uri(image: Image.Image) -> str:
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", optimize=True)
    return "data:image/png;base64," + base64.b64encode(buffer.getvalue()).decode()


def _percent(value: float) -> str:
    return f"{100 * value:.1f} %"


assert set(METRICS) == {field.name for field in fields(Figures)}
