"""Groups that become unusable after the plan was made: an image was deleted, truncated or replaced.

    OUTPUT/lost.jsonl     one line per lost group: index, id, reason, detail, and its measurement at the start

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
from bpo.data.groups import BAD_REASONS, MeasuredGroup
from bpo.formats.bad_records import BadRecords
from bpo.formats.problems import Problem
from bpo.job.journal import JournalReader, JournalWriter, to_line
from bpo.records import LostGroup, PreferenceGroup

logger = logging.getLogger(__name__)

FILE = "lost.jsonl"


@dataclass
class LostGroups:
    """The lost groups of a run, the same on every rank.

    Attributes:
        path: The file that lists them.
        source: The file of the groups, for messages.
        bad: The bad records of the run so far; its rules apply to lost groups too.
        num_records: Records of the run, including bad ones.
        measured: Measurement of each usable dataset index.
        indices: Dataset indices of the lost groups.
    """

    path: Path = Path(FILE)
    source: str = ""
    bad: BadRecords = field(default_factory=BadRecords)
    num_records: int = 0
    measured: Mapping[int, MeasuredGroup] = field(default_factory=dict)
    indices: set[int] = field(default_factory=set)

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
                journal.append(to_line({**asdict(group), "measured": asdict(self.measured[group.index])}))


def earlier_losses(path: Path) -> list[dict[str, Any]]:
    """The entries of `path` that earlier starts of the run have written."""

    def parse(entry: dict[str, Any]) -> dict[str, Any]:
        LostGroup(**{key: value for key, value in entry.items() if key != "measured"})
        MeasuredGroup(**entry["measured"])
        return entry

    return [entry for _, entry in JournalReader(path).poll(parse)] if path.exists() else []


def keep_places(
    measured: list[MeasuredGroup | Dropped], groups: Sequence[PreferenceGroup], entries: Iterable[dict[str, Any]]
) -> list[LostGroup]:
    """Puts the old measurement of each group that is still lost in `measured`, so that the plan is the same.

    Returns:
        The groups that are still lost. A group whose content is again what it was is not.
    """
    lost = []
    for entry in entries:
        before = MeasuredGroup(**entry.pop("measured"))
        group = LostGroup(**entry)
        if group.index >= len(groups) or groups[group.index].id != group.group_id:
            continue  # of other data, which is refused when the checkpoint is loaded
        now = measured[group.index]
        if isinstance(now, MeasuredGroup) and now.reference_key == before.reference_key:
            logger.info("group %r is again what it was and is used", group.group_id)
            continue
        measured[group.index] = before
        lost.append(group)
    return lost
