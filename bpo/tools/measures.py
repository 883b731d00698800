"""Measures of the pairs of each type, read from the files of `bpo measure` or `bpo bootstrap`."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from bpo.bootstrap.job.merge import sibling_path
from bpo.bootstrap.measure.margins import BIN_NATS


@dataclass(frozen=True, slots=True)
class Margins:
    """Distribution of a margin over the pairs of a type; `histogram` counts by the lower edge in half nats."""

    median: float
    share_above_zero: float
    histogram: Mapping[int, int]


@dataclass(frozen=True, slots=True)
class TypeMeasures:
    """Measures of the pairs of one completion type; what was not measured is None.

    Attributes:
        accuracy, accuracy_error: Accuracy of the text-only discriminator and its standard error.
        text, blind, seeing, image: Margins: the discriminator's, rejected minus preferred; the model's without the
            image, rejected minus preferred; with the image, preferred minus rejected; what the image adds to that.
        telling: N-grams that tell which answer is preferred: n-gram -> pairs in which only the preferred answer has it,
            pairs in which only the rejected one has it.
        warnings: What is wrong and what to do.
    """

    accuracy: float | None = None
    accuracy_error: float = 0.0
    text: Margins | None = None
    blind: Margins | None = None
    seeing: Margins | None = None
    image: Margins | None = None
    telling: Mapping[str, tuple[int, int]] = field(default_factory=dict)
    warnings: Sequence[str] = ()


def read_measures(groups: Path) -> dict[str, TypeMeasures]:
    """Type -> measures, from `GROUPS.measures.json`, else from `GROUPS.summary.json`; empty if neither has any.

    Raises:
        ValueError: The file has an unexpected format.
    """
    path = sibling_path(groups, "measures.json")
    if not path.exists():
        path = sibling_path(groups, "summary.json")
    if not path.exists():
        return {}
    try:
        tree = json.loads(path.read_text(encoding="utf-8"))
        texts, models = tree.get("measures") or {}, (tree.get("model") or {}).get("types") or {}
        said = [str(text) for text in (tree.get("model") or {}).get("warnings", ())]
        return {
            kind: _measures(
                texts.get(kind) or {}, models.get(kind) or {}, [w for w in said if w.startswith(f"{kind}:")]
            )
            for kind in sorted({*texts, *models})
        }
    except (AttributeError, KeyError, TypeError, ValueError, RecursionError) as error:
        raise ValueError(f"{path}: {error!r} in the measures; create them again with bpo measure") from error


def _measures(of_text: Mapping[str, Any], of_model: Mapping[str, Any], warnings: Sequence[str]) -> TypeMeasures:
    text = of_text.get("text") or {}
    telling = [entry for side in ("preferred_ngrams", "rejected_ngrams") for entry in text.get(side) or ()]
    margins = {name: _margins(of_model[name]) for name in ("blind", "seeing", "image") if name in of_model}
    if "histogram" in text:
        margins["text"] = _margins(text | {"median": 0.0 - text["median_margin"]})
    return TypeMeasures(
        accuracy=None if not text else float(text["accuracy"]),
        accuracy_error=float(text.get("standard_error", 0.0)),
        telling={str(entry["ngram"]): (int(entry["preferred"]), int(entry["rejected"])) for entry in telling},
        warnings=[*(str(warning) for warning in of_text.get("warnings", ())), *warnings],
        **margins,
    )


def _margins(tree: Mapping[str, Any]) -> Margins:
    histogram = {round(float(edge) / BIN_NATS): int(count) for edge, count in tree["histogram"].items()}
    return Margins(float(tree["median"]), float(tree["share_above_zero"]), histogram)
