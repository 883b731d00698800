"""Judgements on disk: an append-only journal per process, readable while others write.

    FOLDER/identity.json     the judge and everything that its scores depend on
    FOLDER/rank-00000.jsonl  {"id": ..., "digest": ..., "pass": ..., "scores": [...], "details": [...]}
                             {"id": ..., "digest": ..., "pass": ..., "failed": reason}

Lines of the last pass hold the final scores and have the pass `RESULT`. The digest is that of the prompt, images and
answers of the group (`group_digest`): scores of other answers under the same id are refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, BinaryIO

from bpo.formats.fields import prompt_to_json
from bpo.job.durable import write_durably
from bpo.job.journal import JournalReader, JournalWriter, from_line, to_line
from bpo.ranking.judge import Failed, Judgement, Scored
from bpo.records import PreferenceGroup

RESULT = "result"


def group_digest(group: PreferenceGroup) -> str:
    """24 hexadecimal digits of all that a judge sees of a group: everything but scores and training options."""
    answers = [[completion.response, completion.type, completion.view] for completion in group.completions]
    seen = [prompt_to_json(group.prompt), group.images, group.other_images, answers, dict(group.extra)]
    return hashlib.sha256(json.dumps(seen, sort_keys=True, default=str).encode()).hexdigest()[:24]


class Judgements:
    """Looks up the results of all processes; each `poll` reads only new lines, and texts stay on disk.

    Attributes:
        identity: Content of identity.json: `judge`, and whatever the judge's scores depend on.
        failed: Id -> reason of groups that could not be judged.
    """

    def __init__(self, folder: Path, identity: dict[str, Any]):
        self.folder, self.identity = folder, identity
        self.failed: dict[str, str] = {}
        digest = hashlib.sha256(json.dumps(identity, sort_keys=True).encode()).hexdigest()[:12]
        self._judge = {"name": identity["judge"], "identity": digest}
        self._readers: list[JournalReader] = []
        self._places: dict[tuple[str, str], tuple[str, int, int]] = {}
        self._file: tuple[int, BinaryIO] | None = None  # the journal read last

    def poll(self) -> int:
        """Reads complete new lines of all journals; returns the number of results known."""
        known = {reader.path for reader in self._readers}
        self._readers += [JournalReader(path) for path in sorted(self.folder.glob("rank-*.jsonl")) if path not in known]
        for number, reader in enumerate(self._readers):
            for start, (group_id, digest, name, reason) in reader.poll(_index_entry):
                self._places.setdefault((group_id, name), (digest, number, start))
                if reason is not None:
                    self.failed.setdefault(group_id, reason)
        return len(self._places)

    def has(self, group_id: str, digest: str, name: str = RESULT) -> bool:
        """Whether the group has a result of the pass, or has failed in any; raises as `of`."""
        return self._place(group_id, digest, name) is not None

    def of(self, group: PreferenceGroup) -> Judgement | Failed | None:
        """The final scores of a group, why it has none, or None if it is not judged yet.

        Raises:
            ValueError: The judged group of this id had another prompt, image or answer.
        """
        found = self.result(group, RESULT)
        return Judgement(group.id, found, self._judge) if isinstance(found, Scored) else found

    def result(self, group: PreferenceGroup, name: str) -> Scored | Failed | None:
        """As `of`, for one pass."""
        place = self._place(group.id, group_digest(group), name)
        if place is None:
            return None
        _, number, start = place
        if self._file is None or self._file[0] != number:
            if self._file is not None:
                self._file[1].close()
            self._file = number, self._readers[number].path.open("rb")
        self._file[1].seek(start)
        entry = from_line(self._file[1].readline())
        return Failed(entry["failed"]) if "failed" in entry else Scored(tuple(entry["scores"]), tuple(entry["details"]))

    def _place(self, group_id: str, digest: str, name: str) -> tuple[str, int, int] | None:
        place = self._places.get((group_id, RESULT)) or self._places.get((group_id, name))
        if place is not None and place[0] != digest:
            raise ValueError(
                f"{self.folder}: group {group_id!r} has a judgement of another prompt, image or answer; the candidates "
                "have changed. Remove the folder to judge them, or set another rank.output"
            )
        return place


class JudgementWriter:
    """Appends results to the journal of one process, as a context.

    Raises:
        ValueError: Another process has the file open for writing.
    """

    def __init__(self, folder: Path, worker: int):
        self._journal = JournalWriter(folder / f"rank-{worker:05d}.jsonl", exclusive=True)

    def append(self, name: str, results: Iterable[tuple[PreferenceGroup, Scored | Failed]]) -> None:
        """Writes results of a pass; returns when they are on disk."""
        lines = []
        for group, result in results:
            entry: dict[str, Any] = {"id": group.id, "digest": group_digest(group), "pass": name}
            if isinstance(result, Failed):
                entry["failed"] = result.reason
            else:
                entry |= {"scores": result.scores, "details": result.details}
            lines.append(to_line(entry))
        self._journal.append(b"".join(lines))

    def __enter__(self) -> JudgementWriter:
        return self

    def __exit__(self, *_: object) -> None:
        self._journal.close()


def read_judgements(folder: Path) -> Judgements:
    """All judgements that a folder has, finished or not; raises ValueError if it has no identity.json."""
    path = folder / "identity.json"
    try:
        judgements = Judgements(folder, json.loads(path.read_bytes()))
    except (OSError, ValueError, LookupError, TypeError) as error:
        raise ValueError(f"{path} cannot be read ({error!r}); give a folder that `bpo rank` has written") from error
    judgements.poll()
    return judgements


def open_judgements(folder: Path, judge: str, identity: dict[str, Any]) -> Judgements:
    """The judgements in a folder, to be continued by the same judge with the same options.

    Raises:
        ValueError: Those in the folder are of another judge or other options; lists the differences.
    """
    text = json.dumps({"judge": judge, **identity}, indent=1, sort_keys=True)
    path = folder / "identity.json"
    if not path.exists():
        folder.mkdir(parents=True, exist_ok=True)
        write_durably(path, text + "\n")  # racing processes write the same bytes
    found, now = read_judgements(folder), json.loads(text)
    before = found.identity
    if before != now:
        changes = [name for name in {**before, **now} if before.get(name) != now.get(name)]
        listed = "; ".join(f"{name} was {before.get(name)!r}, is {now.get(name)!r}" for name in changes)
        raise ValueError(
            f"{folder} has judgements of another judge or with other options: {listed}. Undo the change, remove the "
            "folder, or set another rank.output"
        )
    return found


def _index_entry(entry: Any) -> tuple[str, str, str, str | None]:
    """(id, digest, pass, reason); a group that failed in any pass has that as its final result."""
    reason = entry.get("failed")
    return entry["id"], entry["digest"], entry["pass"] if reason is None else RESULT, reason
