"""Helpers for tests of bootstrapping jobs: files on disk, stopping a job, lenient validation of random text."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

import pytest

from bpo.bootstrap import sources
from bpo.bootstrap.engines.models import Generators
from bpo.bootstrap.inject import InjectionRequest
from bpo.bootstrap.job.outcomes import OutcomeReader, OutcomeWriter
from bpo.bootstrap.sources import InjectedErrors
from bpo.bootstrap.validate import Refusal, refusal
from bpo.config.training import Config
from bpo.job.chat_server import Reply
from bpo.job.signals import StopRequest

RESULTS = ("groups.jsonl", "groups.jsonl.refused.jsonl", "groups.jsonl.quarantine.jsonl")


def results(config: Config) -> dict[str, str]:
    folder = Path(config.data.groups).parent
    return {name: (folder / name).read_text() for name in RESULTS}


def parts(config: Config) -> Path:
    return Path(config.data.groups + ".parts")


def num_lines(config: Config) -> list[int]:
    """Number of outcomes in each worker's part, including duplicates."""
    return [len(path.read_bytes().splitlines()) for path in sorted(parts(config).glob("rank-*.jsonl"))]


def num_outcomes(config: Config) -> int:
    reader = OutcomeReader(parts(config))
    reader.poll()
    return len(reader)


def stop_after(monkeypatch: pytest.MonkeyPatch, num_batches: int, stop: StopRequest) -> None:
    """Requests a stop during the write of batch `num_batches`."""
    append, written = OutcomeWriter.append, []

    def append_and_stop(self: OutcomeWriter, outcomes: Any) -> None:
        append(self, outcomes)
        written.append(1)
        stop.received = stop.received or len(written) == num_batches

    monkeypatch.setattr(OutcomeWriter, "append", append_and_stop)


def accept_random_text(monkeypatch: pytest.MonkeyPatch) -> None:
    """Accepts unfinished and unprintable text, which random models nearly always generate."""

    def lenient(response: str, *arguments: Any, **options: Any) -> Refusal | None:
        printable = "".join(c if c.isprintable() else "?" for c in response)
        return refusal(printable, *arguments, **{**options, "finished": True})

    monkeypatch.setattr(sources, "refusal", lenient)


class InstantRewriter:
    """Replaces a text-only LLM: adds a zebra to every description."""

    name, whole_batches, special_tokens, policy = "instant", True, (), None

    def replies(self, requests: Sequence[InjectionRequest]) -> Iterator[tuple[int, Reply]]:
        for index, request in enumerate(requests):
            yield index, Reply(f"{request.messages[-1].content.partition('Description: ')[2]} A zebra stands there.")


def rewrite_instantly(monkeypatch: pytest.MonkeyPatch) -> None:
    """Jobs of the source `inject` need no model and no images."""
    monkeypatch.setattr(Generators, "text", lambda self: InstantRewriter())
    monkeypatch.setattr(InjectedErrors, "prepare", lambda self, annotation: None)
