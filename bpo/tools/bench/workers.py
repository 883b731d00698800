"""One process per provider, controlled by commands: isolates the libraries and lets their steps take turns."""

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
    """A provider's process failed; the message contains its error and the end of its log."""


@dataclass(frozen=True)
class Command:
    """A command of the parent: `step`, `reference` (the reference pass) or `stop`, and the kind of measurement.

    With `keep_cache` the provider keeps its cached device memory for the next command; otherwise it releases the memory
    before it answers, because another provider runs next.
    """

    what: str
    kind: str = "plain"
    keep_cache: bool = False


class Session:
    """The provider's end of the connection."""

    def __init__(self, connection: Connection):
        self._connection = connection

    def ready(self, **facts: Any) -> None:
        """Reports that the model is created and the first step can start."""
        self._connection.send(("ready", facts))

    def receive(self) -> Command:
        """Waits for the next command."""
        return self._connection.recv()

    def answer(self, result: dict[str, Any]) -> None:
        self._connection.send(("done", result))


class Worker:
    """The parent's end of the connection: a provider in its own process, idle between commands."""

    def __init__(self, provider: str, case: StepCase):
        self.provider = provider
        self.log = Path(case.workdir) / f"{provider}.log"
        context = multiprocessing.get_context("spawn")  # CUDA and DeepSpeed do not support fork
        self._connection, theirs = context.Pipe()
        self._process = context.Process(target=_serve, args=(provider, case, theirs, str(self.log)), daemon=True)
        self._process.start()
        theirs.close()  # so that recv raises EOFError when the process ends
        self.facts: dict[str, Any] = {}

    def wait_until_ready(self) -> None:
        self.facts = self._receive()

    def ask(self, what: str, kind: str = "plain", *, keep_cache: bool = False) -> dict[str, Any]:
        """Runs one command in the provider and returns the measurement.

        Raises:
            ProviderError: The command failed, or the process ended.
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
            f"{self.provider}: the process ended with status {self._process.exitcode}; end of its log:\n{tail}"
        )

    def close(self) -> None:
        """Stops the process; kills it if it does not end."""
        with contextlib.suppress(BrokenPipeError):
            self._connection.send(Command("stop"))
        self._process.join(10)
        if self._process.is_alive():
            self._process.kill()
            self._process.join()
        self._connection.close()


@contextlib.contextmanager
def started(providers: list[str], case: StepCase) -> Iterator[dict[str, Worker]]:
    """Context with a running worker for each provider; stops all of them on exit."""
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
        os.dup2(file.fileno(), 1)  # redirects all output to the log, including that of C++ libraries
        os.dup2(file.fileno(), 2)
    logging.basicConfig(level=logging.INFO)
    try:
        importlib.import_module(PROVIDERS[provider]).serve(case, Session(connection), provider)
    except Exception as error:
        traceback.print_exc()
        connection.send(("failed", f"{type(error).__name__}: {error}"))
        raise SystemExit(1) from error
