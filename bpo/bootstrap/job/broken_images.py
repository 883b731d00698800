"""Broken-image policy: stops a job at its first broken image, or above a limit, not after hours of generating."""

from __future__ import annotations

from collections.abc import Iterable
from pathlib import Path

from bpo.bootstrap.job.outcomes import Outcome, record_digest
from bpo.config.training import DataConfig
from bpo.formats.bad_records import BadRecords
from bpo.formats.problems import Problem


class BrokenImages:
    """Counts records with broken images, each once, over all sources and earlier starts of the job.

    Args:
        data: Provides `on_bad` and `max_bad_share`.
        num_usable: Number of annotations of the job.
        bad: Bad records found while reading them.
        folder: Folder of the outcomes, for messages.
        known: `record_digest` of those found by earlier starts; they count, but do not stop the job on their own.
    """

    def __init__(self, data: DataConfig, num_usable: int, bad: BadRecords, folder: Path, known: Iterable[bytes] = ()):
        self._data, self._num_read, self._folder = data, len(bad.problems), folder
        self._num_records = num_usable + self._num_read
        self._broken = set(known)

    def check(self, outcomes: Iterable[Outcome]) -> None:
        """Checks outcomes before they are written.

        Raises:
            RecordError: A record is broken, and `data.on_bad` is error.
            TooManyBadRecords: The job has more broken records than `data.max_bad_share` allows.
        """
        bad = BadRecords.from_config(self._data)
        for outcome in outcomes:
            digest = record_digest(outcome.record_id)
            if outcome.status == "broken" and digest not in self._broken:
                bad.report(Problem("image-refused", str(self._folder), outcome.record_id, outcome.reason))
                self._broken.add(digest)
        if bad.problems:
            where = f"{self._data.annotations} with the images of {self._data.image_root}"
            advice = f"repair them and remove {self._folder}, or raise the share"
            bad.check_share(self._num_records, where, self._num_read + len(self._broken), advice)
