"""Can the text alone tell which answer of a pair is preferred? Cross-validated logistic regression on n-grams.

Training can raise the margin of a pair without looking at the image as far as a text-only model tells its answers
apart, in whichever direction. An accuracy of 0.5 means that only the image decides.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from bpo.bootstrap.measure.folds import make_folds
from bpo.bootstrap.measure.logistic import Differences, differences, fit_logistic
from bpo.bootstrap.measure.ngrams import ngram_ids, ngrams
from bpo.bootstrap.measure.pairs import TextPair

MOST_TELLING = 10

# Scores below this are ties: rounding of a solution that is 0.
_TIE = 1e-6
# Words are put in and taken out more evenly than chance if `TextTest.evenness` is below this.
_EVEN = 0.5
# An n-gram is telling if it is preferred or rejected this many standard errors more often than half of the time.
_TELLING_Z = 4.0
_CANDIDATES = 100


@dataclass(frozen=True)
class Telling:
    """An n-gram that distinguishes the answers.

    Attributes:
        ngram: Its tokens; `<s>` and `</s>` are the begin and the end of the text.
        preferred, rejected: Number of pairs in which only the preferred, or only the rejected answer has it.
    """

    ngram: str
    preferred: int
    rejected: int


@dataclass(frozen=True)
class TextTest:
    """Result of the text-only discriminator for one type of rejected answers.

    Attributes:
        num_pairs: Number of pairs in the sample.
        accuracy: Fraction of held-out pairs whose preferred answer has the higher score, ties counted as half, by the
            weights of the pairs.
        standard_error: Of the accuracy, pairs of one record counted together.
        median_margin: Median of the score of the preferred minus that of the rejected answer, in nats of log-odds.
        share_above_zero: Fraction of held-out pairs whose rejected answer looks better.
        length_accuracy: Accuracy of the rule "the longer (or the shorter) answer is preferred".
        rejected_shorter, rejected_longer: Fractions of pairs.
        evenness: 1 if n-grams are preferred and rejected as evenly as by chance, 0 if exactly evenly, more if they
            tell which answer is preferred.
        folds: What is held out together.
        preferred_ngrams, rejected_ngrams: The most telling n-grams of each side.
    """

    num_pairs: int
    accuracy: float
    standard_error: float
    median_margin: float
    share_above_zero: float
    length_accuracy: float
    rejected_shorter: float
    rejected_longer: float
    evenness: float
    folds: str
    preferred_ngrams: tuple[Telling, ...]
    rejected_ngrams: tuple[Telling, ...]
    margins: np.ndarray = field(repr=False, compare=False)

    @property
    def is_beyond_chance(self) -> bool:
        """Whether the accuracy differs from 0.5 by more than 3 standard errors."""
        error = max(self.standard_error, 0.5 / np.sqrt(self.num_pairs))
        return abs(self.accuracy - 0.5) > 3 * error


def discriminate(pairs: Sequence[TextPair], num_folds: int = 5) -> TextTest:
    """Cross-validates the discriminator.

    Args:
        pairs: At least `num_folds` pairs of one type.

    Raises:
        ValueError: There are fewer pairs than folds.
    """
    if len(pairs) < num_folds:
        raise ValueError(f"{len(pairs)} pairs cannot be split into {num_folds} folds; use fewer folds")
    weight_P = np.array([pair.weight for pair in pairs])
    rows = differences(pairs)
    evenness = _evenness(rows, weight_P)
    folds = make_folds(pairs, num_folds, exchanges=evenness < _EVEN)
    margin_P = np.zeros(len(pairs))
    for fold in range(num_folds):
        model = fit_logistic(rows, weight_P * folds.trains_PF[:, fold])
        held_out = folds.fold_P == fold
        margin_P[held_out] = rows.scores(model)[held_out]
    margin_P[np.abs(margin_P) < _TIE] = 0.0
    accuracy, error = accuracy_of(pairs, margin_P)
    num_words = np.array([[len(pair.preferred.split()), len(pair.rejected.split())] for pair in pairs])
    shorter, longer = (
        float(np.average(side, weights=weight_P))
        for side in (num_words[:, 1] < num_words[:, 0], num_words[:, 1] > num_words[:, 0])
    )
    preferred, rejected = _telling(pairs, rows)
    return TextTest(
        num_pairs=len(pairs),
        accuracy=accuracy,
        standard_error=error,
        median_margin=float(np.median(margin_P)),
        share_above_zero=float(np.average(margin_P < 0, weights=weight_P)),
        length_accuracy=0.5 + abs(shorter - longer) / 2,
        rejected_shorter=shorter,
        rejected_longer=longer,
        evenness=evenness,
        folds="records"
        + " and texts in common"
        + (" and exchanged words" if evenness < _EVEN else "")
        + (", cut" if folds.is_cut else ""),
        preferred_ngrams=preferred,
        rejected_ngrams=rejected,
        margins=margin_P,
    )


def accuracy_of(pairs: Sequence[TextPair], margin_P: np.ndarray) -> tuple[float, float]:
    """Weighted accuracy and its standard error; pairs of the same record are not independent."""
    weight_P = np.array([pair.weight for pair in pairs])
    if not weight_P.sum():
        return 0.5, 0.5
    correct_P = (margin_P > 0) + (margin_P == 0) * 0.5
    accuracy = float(np.average(correct_P, weights=weight_P))
    _, record_P = np.unique([pair.record_id for pair in pairs], return_inverse=True)
    deviation = np.bincount(record_P, weight_P * (correct_P - accuracy))
    return accuracy, float(np.sqrt((deviation**2).sum()) / weight_P.sum())


def _evenness(counted: Differences, weight_P: np.ndarray) -> float:
    """Sum of squared differences of the counts of both sides over its mean under random preferences."""
    preferred, rejected = counted.counts(weight_P)
    expected = float(np.add(*counted.counts(weight_P**2)).sum())
    return float(((preferred - rejected) ** 2).sum()) / expected if expected else 1.0


def _telling(pairs: Sequence[TextPair], counted: Differences) -> tuple[tuple[Telling, ...], tuple[Telling, ...]]:
    """The n-grams with the largest deviation from an even use, preferred and rejected."""
    preferred_C, rejected_C = counted.counts()
    z_C = (preferred_C - rejected_C) / np.sqrt(np.maximum(preferred_C + rejected_C, 1))
    sides = []
    for sign in (1, -1):
        order = np.argsort(-sign * z_C, kind="stable")[:_CANDIDATES]
        chosen: list[Telling] = []
        for column in order[sign * z_C[order] > _TELLING_Z]:
            name = _name(pairs, counted, int(column))
            found = Telling(name, int(preferred_C[column]), int(rejected_C[column]))
            if not any(_says_the_same(found, other) for other in chosen):
                chosen.append(found)
            if len(chosen) == MOST_TELLING:
                break
        sides.append(tuple(chosen))
    return sides[0], sides[1]


def _name(pairs: Sequence[TextPair], counted: Differences, column: int, examples: int = 8) -> str:
    """The most frequent n-gram with the hash of a column."""
    entries = np.flatnonzero(counted.column_Z == column)[:examples]
    names: Counter[str] = Counter()
    for entry in entries:
        pair = pairs[counted.row_Z[entry]]
        text = pair.preferred if counted.value_Z[entry] > 0 else pair.rejected
        of_text = zip(ngram_ids(text).tolist(), ngrams(text), strict=True)
        names.update({name for number, name in of_text if number == counted.id_C[column]})
    return names.most_common(1)[0][0]


def _says_the_same(one: Telling, other: Telling) -> bool:
    """Whether one n-gram contains the other and occurs in about the same pairs."""
    tokens, theirs = set(one.ngram.split()), set(other.ngram.split())
    totals = sorted((one.preferred + one.rejected, other.preferred + other.rejected))
    return (tokens <= theirs or theirs <= tokens) and totals[0] > 0.8 * totals[1]


def by_kind(
    pairs: Sequence[TextPair], margin_P: np.ndarray, kinds_of_pair: Mapping[int, frozenset[str]]
) -> dict[str, dict[str, float]]:
    """Accuracy and share of the pairs with each kind of change; a pair may have several kinds.

    Args:
        kinds_of_pair: Index of a pair -> its kinds; empty for a change of style.
    """
    members: dict[str, list[int]] = {}
    for index, kinds in kinds_of_pair.items():
        for kind in sorted(kinds) or ["style"]:
            members.setdefault(kind, []).append(index)
    found = {}
    for kind, indices in sorted(members.items()):
        accuracy, error = accuracy_of([pairs[index] for index in indices], margin_P[indices])
        found[kind] = {
            "pairs": len(indices),
            "accuracy": accuracy,
            "standard_error": error,
            "share_above_zero": float((margin_P[indices] < 0).mean()),
        }
    return found
