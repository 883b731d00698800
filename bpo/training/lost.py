"""Groups that become unusable after the plan was made: an image was deleted, truncated or replaced.

    OUTPUT/planned.jsonl     what the run was planned with: a line per group with its digest and measurement
    OUTPUT/lost.jsonl        a line per lost group: index, id, reason, detail

A lost group keeps its place in the plan, without weight, so that the other groups stay in their steps, also in later
starts of the run. A later start uses a group again if its image is what it was.
"""

from __future__ import annotations

import logging
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bpo.data.encode import Dropped
from bpo.data.groups import BAD_REASONS, MeasuredGroup, changed_images
from bpo.data.lengths import group_digest
from bpo.formats.bad_records import BadRecords
from bpo.formats.problems import Problem
from bpo.job.durable import replacing, write_durably
from bpo.job.journal import JournalReader, JournalWriter, to_line
from bpo.records import LostGroup, PreferenceGroup

logger = logging.getLogger(__name__)

FILE, PLANNED = "lost.jsonl", "planned.jsonl"


@dataclass
class LostGroups:
    """The lost groups of a run, the same on every rank.

    Attributes:
        path: The file that lists them.
        source: The file of the groups, for messages.
        bad: The bad records of the run so far; its rules apply to lost groups too.
        num_records: Records of the run, including bad ones.
        indices: Dataset indices of the lost groups.
    """

    path: Path = Path(FILE)
    source: str = ""
    bad: BadRecords = field(default_factory=BadRecords)
    num_records: int = 0
    indices: set[int] = field(default_factory=set)

    def keep(self, groups: Sequence[LostGroup], *, is_main: bool) -> None:
        """Replaces the list with the groups that are lost when a start begins."""
        self.indices = {group.index for group in groups}
        if not is_main:
            return
        self.path.unlink(missing_ok=True)
        if groups:
            write_durably(self.path, b"".join(to_line(asdict(group)) for group in groups), sync=False)
            logger.warning("%d groups stay left out until they are what they were: %s", len(groups), self.path)

    def report(self, everyone: Iterable[Sequence[Mapping[str, Any]]], *, is_main: bool) -> None:
        """Adds the groups that the ranks have lost; to be called on all ranks with the same arguments.

        Args:
            everyone: `LostGroup`s as dictionaries, by rank.

        Raises:
            RecordError: `data.on_bad` is error. TooManyBadRecords: more are bad than `data.max_bad_share` allows.
        """
        found = {entry["index"]: LostGroup(**entry) for entries in everyone for entry in entries}
        new = [found[index] for index in sorted(found.keys() - self.indices)]
        for group in new:
            self.bad.report(
                Problem(
                    BAD_REASONS.get(group.reason, "image-refused"),
                    self.source,
                    group.group_id,
                    f"group {group.group_id!r} was usable when the run was planned but no longer is: {group.detail}. "
                    "Restore it and continue with --resume, or set data.on_bad=quarantine to go on without it",
                )
            )
        self.bad.check_share(self.num_records, self.source)
        self.indices |= found.keys()
        if not new or not is_main:
            return
        with JournalWriter(self.path, exclusive=False) as journal:
            for group in new:
                logger.warning("left out from here on: group %r: %s", group.group_id, group.detail)
                journal.append(to_line(asdict(group)))


def write_planned(
    path: Path, encoder: str, groups: Sequence[PreferenceGroup], measured: Sequence[MeasuredGroup | Dropped]
) -> None:
    """Records what a run is planned with: first `encoder`, from `encoder_fingerprint`, then a line per group."""
    rows = zip(groups, measured, strict=True)
    path.parent.mkdir(parents=True, exist_ok=True)
    with replacing(path, sync=False) as file:
        file.write(to_line([encoder, None]))
        for group, result in rows:
            known = asdict(result) if isinstance(result, MeasuredGroup) else None
            file.write(to_line([group_digest(group), known]))


def keep_places(
    path: Path, encoder: str, groups: Sequence[PreferenceGroup], measured: list[MeasuredGroup | Dropped]
) -> list[LostGroup]:
    """Replaces in `measured` what has changed since `write_planned`, so that the plan stays as it was.

    Changes nothing if the file is of other records or another encoder: such a run is refused when the checkpoint is
    loaded.

    Returns:
        The groups that were usable and no longer are. A group that was not is left out, whatever it is now.
    """

    def parse(row: Any) -> tuple[str, MeasuredGroup | None]:
        return row[0], None if row[1] is None else MeasuredGroup(**row[1])

    rows = [row for _, row in JournalReader(path).poll(parse)] if path.exists() else []
    if len(rows) != 1 + len(groups) or rows[0][0] != encoder:
        return []
    lost = []
    for index, ((digest, before), group) in enumerate(zip(rows[1:], groups, strict=True)):
        now = measured[index]
        same = before is not None and isinstance(now, MeasuredGroup) and now.reference_key == before.reference_key
        if same or digest != group_digest(group):
            continue
        if before is None:
            if isinstance(now, MeasuredGroup):
                measured[index] = Dropped(group.id, "not-planned", "it was unusable when the run was planned")
            continue
        measured[index] = before
        reason, detail = (now.reason, now.detail) if isinstance(now, Dropped) else ("bad-image", changed_images(group))
        lost.append(LostGroup(index, group.id, reason, detail))
    return lost
