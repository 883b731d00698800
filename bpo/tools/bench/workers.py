"""One process a provider, told step by step what to do: libraries stay apart and their steps take turns."""

from __future__ import annotations

import contextlib
import importlib
import logging
import multiprocessing
import os
import traceback
from collections.abc import Iterator
from dataclasses import dataclass
from multiprocessing.connection import Connection
from pathlib import Path
from typing import Any

from bpo.tools.bench.case import StepCase

# Provider -> the module whose `serve(case, session, provider)` runs it.
PROVIDERS = {
    "bpo": "bpo.tools.bench.bpo_provider",
    "trl": "bpo.tools.bench.trl_provider",
    "trl-liger": "bpo.tools.bench.trl_provider",
}
LOG_LINES_SHOWN = 15


class ProviderError(RuntimeError):
    """A provider's process failed; the message holds its error and the end of its log."""


@dataclass(frozen=True)
class Command:
    """What the parent asks for: `step`, `reference` (the store's pass) or `stop`; and what is measured of it.

    With `keep_cache` the provider keeps its cached device memory, because it is asked again at once; else it gives it
    back before it answers, for another provider is measured next.
    """

    what: str
    kind: str = "plain"
    keep_cache: bool = False


class Session:
    """A provider's side of the conversation."""

    def __init__(self, connection: Connection):
        self._connection = connection

    def ready(self, **facts: Any) -> None:
        """The model is built and the first step can start."""
        self._connection.send(("ready", facts))

    def receive(self) -> Command:
        """The next command; waits for it."""
        return self._connection.recv()

    def answer(self, result: dict[str, Any]) -> None:
        self._connection.send(("done", result))


class Worker:
    """The parent's side: a provider in a process of its own, idle between commands."""

    def __init__(self, provider: str, case: StepCase):
        self.provider = provider
        self.log = Path(case.workdir) / f"{provider}.log"
        context = multiprocessing.get_context("spawn")  # CUDA and DeepSpeed bear no fork
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(provider, case, theirs, str(self.log)), daemon=True)
        self._process.start()
        theirs.close()  # ours sees the end of the pipe when the process is gone
        self.facts: dict[str, Any] = {}

    def wait_until_ready(self) -> None:
        self.facts = self._receive()

    def ask(self, what: str, kind: str = "plain", *, keep_cache: bool = False) -> dict[str, Any]:
        """Has the provider do one thing and returns what was measured.

        Raises:
            ProviderError: it failed, or its process ended.
        """
        try:
            self._connection.send(Command(what, kind, keep_cache))
        except BrokenPipeError as error:
            raise self._ended() from error
        return self._receive()

    def _receive(self) -> dict[str, Any]:
        try:
            status, content = self._connection.recv()
        except EOFError as error:
            raise self._ended() from error
        if status == "failed":
            raise ProviderError(f"{self.provider}: {content}")
        return content

    def _ended(self) -> ProviderError:
        self._process.join(10)
        tail = "\n".join(self.log.read_text(encoding="utf-8", errors="replace").splitlines()[-LOG_LINES_SHOWN:])
        return ProviderError(
            f"{self.provider}: its process ended with status {self._process.exitcode}; its log:\n{tail}"
        )

    def close(self) -> None:
        """Ends the process, whatever it does."""
        with contextlib.suppress(BrokenPipeError):
            self._connection.send(Command("stop"))
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._connection.close()


@contextlib.contextmanager
def started(providers: list[str], case: StepCase) -> Iterator[dict[str, Worker]]:
    """Workers by provider, started together; all are ended on the way out."""
    workers: dict[str, Worker] = {}
    try:
        for provider in providers:
            workers[provider] = Worker(provider, case)
        yield workers
    finally:
        for worker in workers.values():
            worker.close()


def _serve(provider: str, case: StepCase, connection: Connection, log: str) -> None:
    with open(log, "w", encoding="utf-8") as file:
        os.dup2(file.fileno(), 1)  # what libraries print belongs in the log, also what C++ prints
        os.dup2(file.fileno(), 2)
    logging.basicConfig(level=logging.INFO)
    try:
        importlib.import_module(PROVIDERS[provider]).serve(case, Session(connection), provider)
    except Exception as error:
        traceback.print_exc()
        connection.send(("failed", f"{type(error).__name__}: {error}"))
        raise SystemExit(1) from error
