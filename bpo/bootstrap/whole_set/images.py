"""What is known about the images of records: which they are, and the objects in them by ground truth."""

from __future__ import annotations

from collections.abc import Sequence

from bpo.bootstrap.measure.hardness import ObjectTruth
from bpo.bootstrap.whole_set.content import hash32


class ImageFacts:
    """Hashed facts about images and about the objects that texts name, by the lexicon of the ground truth.

    Args:
        truth: Objects in the images, if known; otherwise texts name none.
    """

    def __init__(self, truth: ObjectTruth | None):
        self._truth = truth

    @staticmethod
    def hashes(images: Sequence[str]) -> list[int]:
        """One token for each image."""
        return sorted({hash32(image) for image in images})

    def named(self, text: str) -> list[int]:
        """Objects that a text names."""
        return self._tokens({mention.object for mention in self._truth.lexicon.mentions(text)}) if self._truth else []

    def present(self, images: Sequence[str]) -> list[int] | None:
        """Objects in the images; None if unknown."""
        present = self._truth.present(images) if self._truth else None
        return None if present is None else self._tokens(present)

    @staticmethod
    def _tokens(names: set[str] | frozenset[str]) -> list[int]:
        return sorted({hash32(name) for name in names})
