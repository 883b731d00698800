"""The judge's replies, kept in a journal: the same request is never sent twice, not even by another run.

{"key": ..., "text": ..., "model": ..., "finished": true, "date": "2026-11-27T03:44:00+00:00"}
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

from bpo.evaluation.judge.requests import JudgeRequest
from bpo.job.chat_server import ChatServer
from bpo.job.journal import JournalReader, JournalWriter, to_line

# Requests are encoded and queued in blocks, since they may hold images.
_BLOCK = 256


@dataclass(frozen=True, slots=True)
class JudgeReply:
    """A reply.

    Attributes:
        text: As received.
        model: Name of the judge as the server reports it, else as requested.
        finished: False if it was cut at `judge.max_tokens`.
        date: When it was received, UTC.
    """

    text: str
    model: str
    finished: bool
    date: str

    def to_json(self) -> dict[str, Any]:
        return asdict(self)


class ReplyJournal:
    """Replies by key, in one file."""

    def __init__(self, path: Path):
        self.path = path
        self.replies: dict[str, JudgeReply] = {}
        if path.exists():
            self.replies = dict(reply for _, reply in JournalReader(path).poll(_read))

    def ask(
        self, server: ChatServer, requests: Sequence[JudgeRequest], received: Callable[[], None] = lambda: None
    ) -> None:
        """Sends the requests that have no reply yet, equal ones once; each reply is on disk before the next is read.

        Args:
            received: Called after each reply; may raise to stop.

        Raises:
            ServerError: The server cannot be used.
            ValueError: The server refused some requests, or another process writes to the same file.
        """
        missing = list({request.key: request for request in requests if request.key not in self.replies}.values())
        refused = []
        with JournalWriter(self.path, exclusive=True) as writer:
            for start in range(0, len(missing), _BLOCK):
                block = missing[start : start + _BLOCK]
                for index, reply in server.replies([(request.name, request.body()) for request in block]):
                    if reply.error is not None:
                        refused.append((block[index].name, reply.error))
                        continue
                    date = datetime.now(timezone.utc).isoformat(timespec="seconds")
                    kept = JudgeReply(reply.text, reply.model or server.options.model, reply.finished, date)
                    writer.append(to_line({"key": block[index].key, **kept.to_json()}))
                    self.replies[block[index].key] = kept
                    received()
        if refused:
            raise ValueError(
                f"{len(refused)} of {len(missing)} requests have no reply, such as {refused[0][0]}: {refused[0][1]}. "
                f"The others are kept in {self.path}; after a fix, only these are sent again"
            )


def _read(entry: Any) -> tuple[str, JudgeReply]:
    return entry["key"], JudgeReply(entry["text"], entry["model"], entry["finished"], entry["date"])
