"""CHAIR: objects that a description names but the image lacks (arXiv 1809.02156).

    chair_i = hallucinated mentions / all mentions                 (repeats count)
    chair_s = descriptions with a hallucinated mention / descriptions
    recall  = distinct present objects named / distinct present objects

An object is present if an instance annotation or a ground-truth caption of the image names it. All three sum over the
data set before dividing. A ratio with denominator 0 is 0: descriptions that name no object have chair_i 0 and recall 0,
so always report both.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

from bpo.formats.lexicon import Mention, ObjectLexicon


@dataclass(frozen=True, slots=True)
class DescriptionScore:
    """One description.

    Attributes:
        image_id: Id of the image.
        text: The description.
        present: Objects in the image.
        mentions: All mentions, in order.
    """

    image_id: int | str
    text: str
    present: frozenset[str]
    mentions: tuple[Mention, ...]

    @property
    def hallucinated(self) -> tuple[Mention, ...]:
        return tuple(mention for mention in self.mentions if mention.object not in self.present)

    @property
    def named(self) -> frozenset[str]:
        """Present objects that the description names."""
        return self.present & {mention.object for mention in self.mentions}

    @property
    def missing(self) -> tuple[str, ...]:
        return tuple(sorted(self.present - self.named))


@dataclass(frozen=True, slots=True)
class ChairResult:
    """CHAIR over a data set, as fractions in [0, 1]."""

    chair_i: float
    chair_s: float
    recall: float
    num_mentions: int
    num_hallucinated_mentions: int
    descriptions: tuple[DescriptionScore, ...]


def present_objects(
    lexicon: ObjectLexicon, instances: Iterable[str] = (), captions: Iterable[str] = ()
) -> frozenset[str]:
    """Objects of an image: the categories of its instances and the objects in its ground-truth captions.

    Raises:
        ValueError: A category is not in the lexicon.
    """
    present = set()
    for category in instances:
        canonical = lexicon.canonical(category)
        if canonical is None:
            raise ValueError(f"category {category!r} is not in the synonyms; add a line for it")
        present.add(canonical)
    for caption in captions:
        present.update(mention.object for mention in lexicon.mentions(caption))
    return frozenset(present)


def score_descriptions(
    descriptions: Sequence[tuple[int | str, str]],
    present_of_image: Mapping[int | str, frozenset[str]],
    lexicon: ObjectLexicon,
) -> ChairResult:
    """Computes CHAIR of descriptions.

    Args:
        descriptions: (image id, text) pairs.
        present_of_image: Image id -> objects in it (`present_objects`).
        lexicon: Finds mentions of objects.

    Raises:
        ValueError: An image has no ground truth.
    """
    scores = []
    for image_id, text in descriptions:
        if image_id not in present_of_image:
            raise ValueError(f"image {image_id!r} has no ground truth; describe only annotated images")
        scores.append(DescriptionScore(image_id, text, present_of_image[image_id], lexicon.mentions(text)))
    num_mentions = sum(len(score.mentions) for score in scores)
    num_hallucinated = sum(len(score.hallucinated) for score in scores)
    return ChairResult(
        chair_i=ratio(num_hallucinated, num_mentions),
        chair_s=ratio(sum(bool(score.hallucinated) for score in scores), len(scores)),
        recall=ratio(sum(len(score.named) for score in scores), sum(len(score.present) for score in scores)),
        num_mentions=num_mentions,
        num_hallucinated_mentions=num_hallucinated,
        descriptions=tuple(scores),
    )


def ratio(part: int, whole: int) -> float:
    """part / whole, or 0 if whole is 0."""
    return part / whole if whole else 0.0
