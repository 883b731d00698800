"""Annotations on disk: a job over millions of them holds a few bytes of each, and reads those it needs."""

from __future__ import annotations

import pickle
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import numpy as np

from bpo.bootstrap.job.outcomes import DIGEST_BYTES, record_digest
from bpo.bootstrap.validate import annotation_refusal
from bpo.records import Annotation


class AnnotationSpool:
    """The annotations of one job in a temporary file, to be read again in order and by position.

    In memory are 30 bytes a record. The file lies in the folder of temporary files (TMPDIR) without a name: no other
    process can reach it, and it is gone with the object.

    Args:
        annotations: Read once, one at a time.
        limit: Take only the first so many; 0 takes all.
        max_words: `data.max_completion_words`, which decides what is refused whole.
        kind_of: Gives a small number; records of one kind can be made to stand together.

    Attributes:
        most_images: Images of the record that has most.
    """

    def __init__(
        self,
        annotations: Iterable[Annotation],
        limit: int,
        max_words: int,
        kind_of: Callable[[Annotation], int] = lambda annotation: 0,
    ):
        self._file = tempfile.TemporaryFile(prefix="bpo-annotations-")  # noqa: SIM115 it lives as long as this object
        self._starts = array("Q")
        self._lengths = array("I")
        self._usable = array("B")
        self._kinds = array("B")
        self._digests = bytearray()
        self.most_images = 0
        for annotation in islice(annotations, limit or None):
            self._starts.append(self._file.tell())
            pickle.dump(annotation, self._file, protocol=pickle.HIGHEST_PROTOCOL)
            self._lengths.append(min(_length(annotation), 2**32 - 1))
            self._usable.append(annotation_refusal(annotation.response, max_words=max_words) is None)
            self._kinds.append(kind_of(annotation))
            self._digests += record_digest(annotation.id)
            self.most_images = max(self.most_images, len(annotation.images))

    def __len__(self) -> int:
        return len(self._starts)

    def __iter__(self) -> Iterator[Annotation]:
        """All of them, in the file's order."""
        return (self[position] for position in range(len(self)))

    def __getitem__(self, position: int) -> Annotation:
        self._file.seek(self._starts[position])
        annotation: Annotation = pickle.load(self._file)
        return annotation

    def digest(self, position: int) -> bytes:
        """`record_digest` of the id at a position, without reading the record."""
        return bytes(self._digests[DIGEST_BYTES * position : DIGEST_BYTES * (position + 1)])

    def longest_first(self, limit: int = 0, by_kind: bool = False) -> np.ndarray:
        """Positions of the usable ones among the first `limit` (0: all), longest first; equal ones in order.

        With `by_kind`, one kind after the other.
        """
        end = limit or len(self)
        lengths = np.array(self._lengths[:end], dtype=np.int64)
        usable = np.array(self._usable[:end], dtype=bool)
        kinds = np.array(self._kinds[:end] if by_kind else [], dtype=np.uint8)
        order = np.lexsort((-lengths, kinds)) if by_kind else np.argsort(-lengths, kind="stable")
        return order[usable[order]].astype(np.uint32)


class Batches:
    """The work of one source, cut into batches that are read when they are asked for.

    Args:
        positions: Where in `spool` the records stand, in the order of the work.
        size: Records in a batch; the last may have fewer.
    """

    def __init__(self, spool: AnnotationSpool, positions: np.ndarray, size: int):
        self._spool, self._positions, self.size = spool, positions, size

    def __len__(self) -> int:
        return -(-len(self._positions) // self.size)

    def __getitem__(self, number: int) -> list[Annotation]:
        return [self._spool[position] for position in self._of(number)]

    def digests(self, number: int) -> list[bytes]:
        """`record_digest` of each record of a batch."""
        return [self._spool.digest(position) for position in self._of(number)]

    @property
    def num_records(self) -> int:
        return len(self._positions)

    def _of(self, number: int) -> list[int]:
        return [int(position) for position in self._positions[number * self.size : (number + 1) * self.size]]


def _length(annotation: Annotation) -> int:
    """Characters of prompt and answer: records that take about as long stand together."""
    return len(annotation.response) + sum(len(turn.text) for turn in annotation.prompt)
