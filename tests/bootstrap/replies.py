"""Replies of a generator in request order, and a fake clock advanced by sleeping."""

from __future__ import annotations

import threading
from collections.abc import Sequence
from typing import Any

from bpo.job.chat_server import Reply


def replies_of(generator: Any, requests: Sequence[Any]) -> list[Reply]:
    prepared = [[generator.prepare(request) for request in requests]] if hasattr(generator, "prepare") else []
    replies = dict(generator.replies(requests, *prepared))
    assert sorted(replies) == list(range(len(requests)))
    return [replies[index] for index in range(len(requests))]


class FakeClock:
    """`time` for a `ChatServer`: `sleep` returns immediately and advances the clock."""

    def __init__(self) -> None:
        self.now_s = 0.0
        self.slept: list[float] = []
        self._lock = threading.Lock()

    def monotonic(self) -> float:
        return self.now_s

    def sleep(self, seconds: float, /) -> None:
        with self._lock:
            self.slept.append(seconds)
            self.now_s += seconds
