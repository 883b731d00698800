"""The sample of groups that a model measures, and the images of other records that stand in for a record's own.

Groups are drawn by a hash of their id, so that the sample does not depend on their order in the file. The donors of a
record are those that follow it in the order of the sample, cyclically: every image is used about equally often, and few
preprocessed images are in memory at a time.
"""

from __future__ import annotations

from collections import Counter, OrderedDict
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from bpo.bootstrap.measure.pairs import Sample, sample_rank
from bpo.data.encode import EncodedImages, Encoder
from bpo.formats.images import ImageError, image_bytes_digest
from bpo.formats.usable import NO_PAIR, refusal
from bpo.records import PreferenceGroup


@dataclass(frozen=True, slots=True)
class GroupSample:
    """Groups to measure, in an order that depends on seed and ids alone.

    num_usable: usable groups of the whole file.
    left_out: reason -> number of groups of the file that have no image or no pair, or are not trained on.
    """

    groups: tuple[PreferenceGroup, ...]
    num_usable: int
    left_out: dict[str, int]


def draw_sample(groups: Iterable[PreferenceGroup], size: int, seed: int, max_words: int) -> GroupSample:
    """A seeded random sample of the groups with images; `size` groups are in memory."""
    left_out: Counter[str] = Counter()
    drawn: Sample[PreferenceGroup] = Sample(size)
    for group in groups:
        refused = refusal(group, max_words=max_words, keep_text_only=False)
        if refused is None and len({completion.score for completion in group.own_completions}) < 2:
            refused = NO_PAIR
        if refused is None:
            drawn.add(sample_rank(seed, group.id), f"{group.id} {drawn.num_seen}", group)
        else:
            left_out[refused[0]] += 1
    return GroupSample(tuple(drawn.values()), drawn.num_seen, dict(sorted(left_out.items())))


def image_digests(groups: Sequence[PreferenceGroup], root: Path) -> list[tuple[str, ...] | ImageError]:
    """The SHA-256 of the image files of each group, or why one cannot be read."""
    found: list[tuple[str, ...] | ImageError] = []
    for group in groups:
        try:
            found.append(tuple(image_bytes_digest(root, image) for image in group.images))
        except ImageError as error:
            found.append(error)
    return found


def donors(place: int, digests: Sequence[tuple[str, ...] | ImageError]) -> Iterator[int]:
    """Records with as many images as record `place`, all of other content, in the order of preference.

    Records with the same images as an earlier donor are skipped.
    """
    own = digests[place]
    assert not isinstance(own, ImageError)
    seen = set()
    for step in range(1, len(digests)):
        other = (place + step) % len(digests)
        images = digests[other]
        if isinstance(images, ImageError) or len(images) != len(own):
            continue
        if images not in seen and set(own).isdisjoint(images):
            seen.add(images)
            yield other


class PreprocessedImages:
    """The preprocessed images of the records used last, and the errors of those that cannot be preprocessed."""

    def __init__(self, encoder: Encoder, groups: Sequence[PreferenceGroup], num_kept: int):
        self._encoder, self._groups, self._num_kept = encoder, groups, num_kept
        self._kept: OrderedDict[int, EncodedImages] = OrderedDict()
        self._errors: dict[int, ImageError] = {}

    def get(self, place: int) -> EncodedImages:
        """The images of a record of the sample.

        Raises:
            ImageError: one of them cannot be read or preprocessed.
        """
        if place in self._errors:
            raise self._errors[place]
        if place not in self._kept:
            try:
                self._kept[place] = self._encoder.encode_images(self._groups[place].images)
            except ImageError as error:
                self._errors[place] = error
                raise
            if len(self._kept) > self._num_kept:
                self._kept.popitem(last=False)
        self._kept.move_to_end(place)
        return self._kept[place]

    def usable(self, places: Iterable[int]) -> Iterator[int]:
        """Those of the records whose images can be preprocessed."""
        for place in places:
            try:
                self.get(place)
            except ImageError:
                continue
            yield place
