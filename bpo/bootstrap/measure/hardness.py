"""Is it hard? Dominating texts, rejected answers that are true of the image, distance to the annotation, refusals."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import PurePosixPath
from statistics import median

from bpo.bootstrap.changes import ChangeLexicon, Changes, find_changes
from bpo.bootstrap.job.statistics import SIMILARITY_BINS
from bpo.bootstrap.measure.pairs import TextPair
from bpo.formats.lexicon import ObjectLexicon

# Kinds of content that truth about objects cannot judge.
_BEYOND_OBJECTS = {"attribute", "count", "relation", "polarity"}
# Texts with more words would take seconds to align.
MAX_WORDS = 2000


@dataclass(frozen=True)
class ObjectTruth:
    """Objects in each image, as CHAIR reads them.

    Attributes:
        present_of_file: Path of an image as its file of instances names it -> objects in it.
        lexicon: Finds the mentions of these objects.
    """

    present_of_file: Mapping[str, frozenset[str]]
    lexicon: ObjectLexicon

    def present(self, images: Sequence[str]) -> frozenset[str] | None:
        """Objects in any of the images, found by path or by file name; None if one of them is unknown."""
        found: set[str] = set()
        for path in images:
            objects = self.present_of_file.get(path, self.present_of_file.get(PurePosixPath(path).name))
            if objects is None:
                return None
            found |= objects
        return frozenset(found) if images else None


@dataclass(frozen=True)
class TruthCount:
    """Rejected answers against the objects in the image.

    Attributes:
        num_pairs: Pairs whose images are known and whose rejected answer names an object.
        objects_present: Fraction of these that name only objects in the image.
        false_negatives: Fraction that also change no attribute, count, relation or polarity of the preferred answer:
            as far as objects tell, they are true.
    """

    num_pairs: int
    objects_present: float
    false_negatives: float


@dataclass(frozen=True)
class Hardness:
    """Distance of the rejected answers of one type from the preferred ones.

    Attributes:
        num_texts: Rejected answers counted for the most frequent text.
        top_text, top_text_share: The most frequent rejected text and its share.
        num_diffs: Pairs aligned word by word.
        words_changed: Median number of words inserted, deleted or replaced.
        similarity_histogram: Pairs that keep i/10 to (i + 1)/10 of the longer text's words.
        false_negatives: Fraction whose rejected answer adds no content to the preferred one by the lexicon (no object,
            attribute, count, relation, polarity or unknown word) and drops no negation: it is as true as that one.
        false_negative_examples: Record ids.
        truth: By the objects in the image; None without ground truth for these images.
        refused_share: Fraction of the source's answers that were refused; None if unknown.
    """

    num_texts: int
    top_text: str
    top_text_share: float
    num_diffs: int
    words_changed: float
    similarity_histogram: tuple[int, ...]
    false_negatives: float
    false_negative_examples: tuple[str, ...]
    truth: TruthCount | None
    refused_share: float | None
    kinds_of_pair: dict[int, frozenset[str]] = field(repr=False, compare=False)


def hardness(
    pairs: Sequence[TextPair],
    lexicon: ChangeLexicon,
    *,
    max_diffs: int,
    truth: ObjectTruth | None = None,
    refused_share: float | None = None,
) -> Hardness:
    """Measures a sample of pairs of one type; the first `max_diffs` that are not too long are aligned."""
    texts = Counter(" ".join(pair.rejected.casefold().split()) for pair in pairs)
    top_text, top_count = texts.most_common(1)[0] if texts else ("", 0)
    histogram = [0] * SIMILARITY_BINS
    distances: list[int] = []
    false_ids: list[str] = []
    kinds_of_pair: dict[int, frozenset[str]] = {}
    judged = _Judged(truth)
    for index, pair in enumerate(pairs):
        if len(distances) == max_diffs:
            break
        if max(len(pair.preferred.split()), len(pair.rejected.split())) > MAX_WORDS:
            continue
        changes = find_changes(pair.preferred, pair.rejected, lexicon)
        kinds_of_pair[index] = frozenset(changes.kinds)
        distances.append(changes.distance)
        histogram[min(SIMILARITY_BINS - 1, int((1 - changes.share) * SIMILARITY_BINS))] += 1
        if adds_nothing(changes, lexicon):
            false_ids.append(pair.record_id)
        judged.add(pair, changes)
    return Hardness(
        num_texts=len(pairs),
        top_text=top_text,
        top_text_share=top_count / max(len(pairs), 1),
        num_diffs=len(distances),
        words_changed=float(median(distances)) if distances else 0.0,
        similarity_histogram=tuple(histogram),
        false_negatives=len(false_ids) / max(len(distances), 1),
        false_negative_examples=tuple(false_ids[:5]),
        truth=judged.count(),
        refused_share=refused_share,
        kinds_of_pair=kinds_of_pair,
    )


def adds_nothing(changes: Changes, lexicon: ChangeLexicon) -> bool:
    """Whether a text adds no content to the one it is compared with and drops no negation."""
    gone, come = (Counter(map(lexicon.meaning, words)) for words in (changes.dropped, changes.added))
    added = {lexicon.kind(word) for word in come - gone}
    dropped = {lexicon.kind(word) for word in gone - come}
    return added <= {None} and "polarity" not in dropped


class _Judged:
    """Counts pairs whose rejected answer names only objects in the image."""

    def __init__(self, truth: ObjectTruth | None):
        self._truth = truth
        self._num_pairs = self._num_present = self._num_false = 0

    def add(self, pair: TextPair, changes: Changes) -> None:
        present = self._truth.present(pair.images) if self._truth else None
        if self._truth is None or present is None:
            return
        named = {mention.object for mention in self._truth.lexicon.mentions(pair.rejected)}
        self._num_pairs += bool(named)
        if named and named <= present:
            self._num_present += 1
            self._num_false += not changes.kinds & _BEYOND_OBJECTS

    def count(self) -> TruthCount | None:
        total = self._num_pairs
        return TruthCount(total, self._num_present / total, self._num_false / total) if total else None
