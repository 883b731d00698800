"""Answer journal: answers are written to disk as they are generated, so runs are resumable and ranks share the work.

    FOLDER/rank-00000.jsonl     one JSON line per answer: key of the request, text

Ranks communicate only through these files. Each appends to its own and syncs it to disk after every batch; all ranks
read all files. A request whose line was torn by a kill is answered again, with the same seed.
"""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from bpo.job.journal import JournalReader, JournalWriter, to_line
from bpo.job.launch import Ranks
from bpo.job.signals import StopRequest

_POLL_S = 1.0


class AnswerJournal:
    """Answers by the key of their request.

    Args:
        folder: Folder of the journal; None keeps answers in memory, for a single process.
        ranks: The ranks that share the requests.
        stop: Checked before every batch.
    """

    def __init__(self, folder: Path | None = None, ranks: Ranks | None = None, stop: StopRequest | None = None):
        self.folder, self.ranks, self.stop = folder, ranks or Ranks(), stop
        self._answers: dict[str, str] = {}
        self._journals: dict[Path, JournalReader] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self.poll()

    def __len__(self) -> int:
        return len(self._answers)

    def __contains__(self, key: str) -> bool:
        return key in self._answers

    def check_stop(self) -> None:
        """Raises Interrupted if a signal was received."""
        if self.stop is not None:
            self.stop.check(f"{len(self)} answers are kept")

    def put(self, answers: Mapping[str, str]) -> None:
        """Adds answers by key; returns when they are on disk."""
        self._answers |= answers
        if self.folder is None:
            return
        with JournalWriter(self.folder / f"rank-{self.ranks.rank:05d}.jsonl", exclusive=False) as writer:
            writer.append(b"".join(to_line([key, text]) for key, text in answers.items()))

    def poll(self) -> int:
        """Reads new lines of all ranks; returns the number of new answers."""
        before = len(self._answers)
        for path in sorted(self.folder.glob("rank-*.jsonl")) if self.folder else ():
            for _, (key, text) in self._journals.setdefault(path, JournalReader(path)).poll(_answer):
                self._answers[key] = text
        return len(self._answers) - before

    def all(self, keys: Sequence[str], stall_timeout_s: float) -> list[str]:
        """The answers of `keys`; waits for those of other ranks.

        Raises:
            TimeoutError: no answer arrived for `stall_timeout_s` seconds.
            Interrupted: a signal was received meanwhile.
        """
        last_news = time.monotonic()
        while missing := sum(key not in self._answers for key in set(keys)):
            if self.poll():
                last_news = time.monotonic()
                continue
            if time.monotonic() - last_news > stall_timeout_s:
                raise TimeoutError(
                    f"{self.folder}: {missing} of {len(set(keys))} answers are missing and none arrived for "
                    f"{stall_timeout_s:.0f} s (evaluation.stall_timeout_s); check the other ranks' logs, then restart: "
                    "answers are kept"
                )
            self.check_stop()
            time.sleep(min(_POLL_S, stall_timeout_s))
        return [self._answers[key] for key in keys]


def _answer(entry: Any) -> tuple[str, str]:
    key, text = entry
    return key, text
