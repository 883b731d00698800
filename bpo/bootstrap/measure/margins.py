"""Margins of preference pairs under a model, with and without their own image: medians, shares, standard errors.

Shape letters: P pairs, R records.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from bpo.bootstrap.changes import ChangeLexicon, find_changes
from bpo.config.measure import MeasureConfig
from bpo.job.seeds import derive_seed
from bpo.records import PreferenceGroup

RESAMPLES = 200  # of the records, for standard errors
BIN_NATS = 0.5
FEW_PAIRS = 30
STYLE = "style"  # the kind of a pair without a change of content


@dataclass(frozen=True, slots=True)
class PairMargins:
    """Log-probability differences of a pair, in nats.

    record: number of the record.
    type: completion type of the rejected answer.
    kinds: kinds of change between the answers.
    blind: rejected minus preferred under other records' images; above 0 if the text alone makes the rejected answer
        more plausible.
    blind_per_token: the same of the mean log-probability per token.
    seeing: preferred minus rejected under the record's own images; below 0 if the model prefers the rejected answer.
    """

    record: int
    type: str
    kinds: frozenset[str]
    blind: float
    blind_per_token: float
    seeing: float

    @property
    def image(self) -> float:
        """What the image adds to the margin of the preferred answer."""
        return self.seeing + self.blind


def log_mean_probability(logp_by_image: Sequence[float]) -> float:
    """Log of the mean over images of exp(log-probability)."""
    return float(np.logaddexp.reduce(np.asarray(logp_by_image, dtype=np.float64))) - math.log(len(logp_by_image))


def pair_margins(
    groups: Sequence[PreferenceGroup], values: Sequence[Mapping[str, Any]], lexicon: ChangeLexicon
) -> Iterator[PairMargins]:
    """Every pair of the records that have values (`bpo.bootstrap.measure.blind`).

    Completions that are the same tokens form no pair.
    """
    for number, (group, own) in enumerate(zip(groups, values, strict=True)):
        if "skipped" in own:
            continue
        blind = [log_mean_probability(by_image) for by_image in own["blind"]]
        for i, preferred in enumerate(group.completions):
            for j, rejected in enumerate(group.completions):
                if preferred.view or rejected.view:
                    continue
                if preferred.score > rejected.score and own["answer"][i] != own["answer"][j]:
                    kinds = find_changes(preferred.response, rejected.response, lexicon).kinds
                    tokens = own["tokens"]
                    yield PairMargins(
                        record=number,
                        type=rejected.type,
                        kinds=kinds or frozenset([STYLE]),
                        blind=blind[j] - blind[i],
                        blind_per_token=blind[j] / tokens[j] - blind[i] / tokens[i],
                        seeing=own["seeing"][i] - own["seeing"][j],
                    )


def figures_by_type(pairs: Sequence[PairMargins], options: MeasureConfig) -> dict[str, dict[str, Any]]:
    """Type -> figures of its pairs, as JSON: `blind`, `blind_per_token`, `seeing` and `image`."""
    by_type: dict[str, list[PairMargins]] = {}
    for pair in pairs:
        by_type.setdefault(pair.type, []).append(pair)
    return {kind: _figures_of_type(by_type[kind], options) for kind in sorted(by_type)}


def _figures_of_type(pairs: Sequence[PairMargins], options: MeasureConfig) -> dict[str, Any]:
    record_P = np.array([pair.record for pair in pairs])
    seed = derive_seed(options.seed, "margins")

    def described(values: Sequence[float]) -> dict[str, Any]:
        return describe(np.asarray(values), record_P, seed)

    blind = described([pair.blind for pair in pairs])
    changes = Counter(kind for pair in pairs for kind in pair.kinds)
    blind["by_change"] = {
        kind: describe(
            np.array([pair.blind for pair in pairs if kind in pair.kinds]),
            np.array([pair.record for pair in pairs if kind in pair.kinds]),
            seed,
        )
        for kind, _ in changes.most_common()
    }
    seeing_P = np.array([pair.seeing for pair in pairs])
    seeing = described([pair.seeing for pair in pairs])
    seeing["share_below_zero"] = float((seeing_P < 0).mean())
    seeing["share_wide"] = float((seeing_P > options.wide_margin).mean())
    tree = {
        "pairs": len(pairs),
        "records": len(set(record_P.tolist())),
        "blind": blind | {"histogram": half_nats([pair.blind for pair in pairs])},
        "blind_per_token": described([pair.blind_per_token for pair in pairs]),
        "seeing": seeing | {"histogram": half_nats(seeing_P.tolist())},
        "image": described([pair.image for pair in pairs]) | {"histogram": half_nats([pair.image for pair in pairs])},
    }
    return _rounded(tree)


def describe(values_P: np.ndarray, record_P: np.ndarray, seed: int) -> dict[str, Any]:
    """Median, mean and share above 0, each with its standard error over records, whose pairs are not independent."""
    records, row_P = np.unique(record_P, return_inverse=True)
    order = np.argsort(row_P, kind="stable")
    starts = np.searchsorted(row_P[order], np.arange(len(records) + 1))
    rows = [values_P[order[start:end]] for start, end in zip(starts, starts[1:], strict=False)]
    draw = np.random.default_rng(seed)
    resampled = [
        np.concatenate([rows[row] for row in draw.integers(len(records), size=len(records))]) for _ in range(RESAMPLES)
    ]
    statistics: dict[str, Callable[[np.ndarray], Any]] = {
        "median": np.median,
        "mean": np.mean,
        "share_above_zero": lambda values: (values > 0).mean(),
    }
    tree: dict[str, Any] = {"pairs": len(values_P)}
    for name, statistic in statistics.items():
        tree[name] = float(statistic(values_P))
        tree[f"{name}_se"] = float(np.std([statistic(values) for values in resampled]))
    return tree


def half_nats(values: Sequence[float]) -> dict[str, int]:
    """Histogram: lower edge of a bin of half a nat -> number of values."""
    bins = Counter(math.floor(value / BIN_NATS) * BIN_NATS for value in values)
    return {f"{edge:g}": bins[edge] for edge in sorted(bins)}


def _rounded(value: Any) -> Any:
    if isinstance(value, dict):
        return {name: _rounded(item) for name, item in value.items()}
    return round(value, 4) if isinstance(value, float) else value


def warnings_of(types: Mapping[str, Mapping[str, Any]], options: MeasureConfig) -> list[str]:
    """What is wrong with the pairs of a type, and what to do; within two standard errors nothing is reported."""
    return [text for kind, figures in types.items() for text in _warnings_of_type(kind, figures, options)]


def _warnings_of_type(kind: str, figures: Mapping[str, Any], options: MeasureConfig) -> Iterator[str]:
    if figures["pairs"] < FEW_PAIRS:
        yield f"{kind}: only {figures['pairs']} pairs were measured with the model; raise measure.records"
        return
    blind, seeing, image = figures["blind"], figures["seeing"], figures["image"]
    share, error = blind["share_above_zero"], 2 * blind["share_above_zero_se"]
    if share - error > options.max_share or share + error < 1 - options.max_share:
        yield (
            f"{kind}: without its image, the model finds {100 * share:.0f} % of the rejected answers more plausible "
            f"than the preferred one (median {blind['median']:+.1f} nats); training can tell them apart without "
            "looking. Balance the texts: add `swap` or `edit` to bootstrap.sources, or select with bootstrap.select"
        )
    if seeing["share_wide"] > 0.5:
        yield (
            f"{kind}: the model already prefers the better answer by more than {options.wide_margin:g} nats in "
            f"{100 * seeing['share_wide']:.0f} % of the pairs, which teach it little; use negatives that are closer to "
            "the annotation, such as `swap` or `edit`"
        )
    if image["median"] + 2 * image["median_se"] <= 0:
        yield (
            f"{kind}: the image does not raise the margin of the preferred answer (median {image['median']:+.2f} "
            "nats); check that images and annotations belong together, and that the model was given its own images"
        )
