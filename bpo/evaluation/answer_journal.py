"""Answer journal: answers are written to disk as they are generated, so runs are resumable and ranks share the work.

    FOLDER/rank-00000.jsonl     one JSON line per answer: benchmark, number of the question, text

Ranks communicate only through these files. Each appends to its own and syncs it to disk after every batch; all ranks
read all files. A question whose line was torn by a kill is asked again. Answers are greedy, so repeated ones are equal.
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
    """The answers to the numbered questions of the benchmarks.

    Args:
        folder: Folder of the journal; None keeps answers in memory, for a single process.
        ranks: The ranks that share the questions.
        stop: Checked before every batch.
    """

    def __init__(self, folder: Path | None = None, ranks: Ranks | None = None, stop: StopRequest | None = None):
        self.folder, self.ranks, self.stop = folder, ranks or Ranks(), stop
        self._answers: dict[tuple[str, int], str] = {}
        self._journals: dict[Path, JournalReader] = {}
        if folder is not None:
            folder.mkdir(parents=True, exist_ok=True)
            self.poll()

    def __len__(self) -> int:
        return len(self._answers)

    def batches(self, benchmark: str, num_questions: int, size: int) -> list[range]:
        """This rank's batches with unanswered questions; batches do not depend on the number of ranks."""
        starts = range(0, num_questions, size)[self.ranks.rank :: self.ranks.world_size]
        batches = [range(start, min(start + size, num_questions)) for start in starts]
        return [batch for batch in batches if any((benchmark, number) not in self._answers for number in batch)]

    def check_stop(self) -> None:
        """Raises Interrupted if a signal was received."""
        if self.stop is not None:
            self.stop.check(f"{len(self)} answers are kept")

    def put(self, benchmark: str, answers: Mapping[int, str]) -> None:
        """Adds answers by the number of their question; returns when they are on disk."""
        self._answers |= {(benchmark, number): text for number, text in answers.items()}
        if self.folder is None:
            return
        with JournalWriter(self.folder / f"rank-{self.ranks.rank:05d}.jsonl", exclusive=False) as writer:
            writer.append(b"".join(to_line([benchmark, number, text]) for number, text in answers.items()))

    def poll(self) -> int:
        """Reads new lines of all ranks; returns the number of new answers."""
        before = len(self._answers)
        for path in sorted(self.folder.glob("rank-*.jsonl")) if self.folder else ():
            for _, (benchmark, number, text) in self._journals.setdefault(path, JournalReader(path)).poll(_answer):
                self._answers[benchmark, number] = text
        return len(self._answers) - before

    def all(self, benchmark: str, num_questions: int, stall_timeout_s: float) -> Sequence[str]:
        """All answers in the order of the questions; waits for those of other ranks.

        Raises:
            TimeoutError: no answer arrived for `stall_timeout_s` seconds.
            Interrupted: a signal was received meanwhile.
        """
        wanted = [(benchmark, number) for number in range(num_questions)]
        last_news = time.monotonic()
        while missing := sum(key not in self._answers for key in wanted):
            if self.poll():
                last_news = time.monotonic()
                continue
            if time.monotonic() - last_news > stall_timeout_s:
                raise TimeoutError(
                    f"{self.folder}: {missing} of {num_questions} answers are missing and none arrived for "
                    f"{stall_timeout_s:.0f} s (evaluation.stall_timeout_s); check the other ranks' logs, then restart: "
                    "answers are kept"
                )
            self.check_stop()
            time.sleep(min(_POLL_S, stall_timeout_s))
        return [self._answers[key] for key in wanted]


def _answer(entry: Any) -> tuple[str, int, str]:
    benchmark, number, text = entry
    return benchmark, number, text
