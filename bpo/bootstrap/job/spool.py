"""Annotations on disk: a few bytes of memory per record for jobs over millions of them; records are read on demand."""

from __future__ import annotations

import pickle
import tempfile
from array import array
from collections.abc import Callable, Iterable, Iterator
from itertools import islice

import numpy as np

from bpo.bootstrap.job.order import WINDOW_BATCHES, fair_batches, shuffled
from bpo.bootstrap.job.outcomes import DIGEST_BYTES, record_digest
from bpo.bootstrap.validate import annotation_refusal
from bpo.records import Annotation


class AnnotationSpool:
    """The annotations of one job in a temporary file, readable in order and by position.

    Memory use is 30 bytes per record. The file is created without a name in TMPDIR: no other process can access it, and
    it is deleted with the object.

    Args:
        annotations: Iterated once.
        limit: Number of annotations to take; 0 takes all.
        max_words: `data.max_completion_words`; longer annotations are refused.
        kind_of: Returns a small number by which `batches` can separate records.

    Attributes:
        most_images: Largest number of images of a record.
    """

    def __init__(
        self,
        annotations: Iterable[Annotation],
        limit: int,
        max_words: int,
        kind_of: Callable[[Annotation], int] = lambda annotation: 0,
    ):
        self._file = tempfile.TemporaryFile(prefix="bpo-annotations-")  # noqa: SIM115 open as long as this object
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
        """All annotations, in file order."""
        return (self[position] for position in range(len(self)))

    def __getitem__(self, position: int) -> Annotation:
        self._file.seek(self._starts[position])
        annotation: Annotation = pickle.load(self._file)
        return annotation

    def digest(self, position: int) -> bytes:
        """`record_digest` of the id at a position, without reading the record."""
        return bytes(self._digests[DIGEST_BYTES * position : DIGEST_BYTES * (position + 1)])

    def batches(self, size: int, seed: int, *, limit: int = 0, by_kind: bool = False, pads: bool = True) -> Batches:
        """The usable annotations among the first `limit` (0: all) in batches in a fair order; see `fair_batches`.

        Args:
            by_kind: Separate batches for each kind.
            pads: Form batches of similar lengths, for engines that pad to the longest record.
        """
        end = min(limit or len(self), len(self))
        order_N = shuffled(self._digests[: DIGEST_BYTES * end], DIGEST_BYTES, seed)
        order_N = order_N[np.array(self._usable[:end], dtype=bool)[order_N]]
        lengths_N = np.array(self._lengths[:end], dtype=np.uint32)[order_N]
        kinds_N = np.array(self._kinds[:end] if by_kind else bytearray(end), dtype=np.uint8)[order_N]
        indices_N, starts = fair_batches(lengths_N, kinds_N, size, seed, WINDOW_BATCHES if pads else 1)
        return Batches(self, order_N[indices_N].astype(np.uint32), starts, size)


class Batches:
    """The annotations of one source in batches that are read on demand.

    Args:
        positions: Positions of the records in `spool`, in processing order.
        starts: Offset of each batch among the positions, and their number.
        size: Largest number of records in a batch.
    """

    def __init__(self, spool: AnnotationSpool, positions: np.ndarray, starts: np.ndarray, size: int):
        self._spool, self._positions, self._starts, self.size = spool, positions, starts, size

    def __len__(self) -> int:
        return len(self._starts) - 1

    def __getitem__(self, number: int) -> list[Annotation]:
        return [self._spool[position] for position in self._of(number)]

    def digests(self, number: int) -> list[bytes]:
        """`record_digest` of each record of a batch."""
        return [self._spool.digest(position) for position in self._of(number)]

    @property
    def num_records(self) -> int:
        return len(self._positions)

    def _of(self, number: int) -> list[int]:
        return [int(position) for position in self._positions[self._starts[number] : self._starts[number + 1]]]


def _length(annotation: Annotation) -> int:
    """Characters of prompt and answer, an estimate of the time that a record takes."""
    return len(annotation.response) + sum(len(turn.text) for turn in annotation.prompt)
