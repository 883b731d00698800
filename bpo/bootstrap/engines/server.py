"""Chat completions from an OpenAI-compatible server (vLLM, SGLang, llama.cpp ...), with the standard library alone.

An API key, where the server wants one, comes from the environment variable OPENAI_API_KEY: a key in a configuration
file ends in every run's directory.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import random
import threading
import time
import urllib.error
import urllib.request
from collections.abc import Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor, as_completed
from typing import Any, Protocol

from bpo.bootstrap.engines.text import Reply
from bpo.config.bootstrap import ServerConfig

logger = logging.getLogger(__name__)

# A request that fails so often, others being answered between its failures, is at fault itself.
MAX_TRIES = 6
FIRST_PAUSE_S, MAX_PAUSE_S = 1.0, 60.0
_BLOCK_BYTES, _MAX_ANSWER_BYTES = 1 << 16, 16 << 20
# The server understood and refuses this one request (a prompt over its context length, say): others may pass.
_REQUEST_REFUSED = (400, 413, 422)


class ServerError(RuntimeError):
    """A server that cannot be used; the message names its URL, the record and what it said."""


class _RefusedRequest(Exception):
    """The server refuses one request for good."""


class _Stopped(Exception):
    """Another request found that the server cannot be used."""


class _TryAgain(Exception):
    """A failure that may pass; `pause_s` is what the server asked for, if it did."""

    def __init__(self, message: str, pause_s: float | None = None):
        super().__init__(message)
        self.pause_s = pause_s


class Clock(Protocol):
    """`time`, or what tests put in its place."""

    def monotonic(self) -> float: ...

    def sleep(self, seconds: float, /) -> None: ...


class ChatServer:
    """Sends bodies to `{url}/chat/completions`, some at a time; tries again with pauses while the server is away."""

    def __init__(self, options: ServerConfig, clock: Clock = time):
        self.options = options
        self.url = options.url.rstrip("/") + "/chat/completions"
        self._clock = clock
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._last_answer_s = float("-inf")
        self._num_answers = 0
        self._next_turn_s = float("-inf")

    def replies(self, bodies: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[tuple[int, Reply]]:
        """(index, reply) of each (record id, body), as they are finished.

        Raises:
            ServerError: the server stayed away for `patience_s`, or refuses the key, the path or the model; every reply
                that was finished by then has been given before.
        """
        self._stopped.clear()
        with ThreadPoolExecutor(self.options.concurrency) as pool:
            futures = {pool.submit(self._reply, *body): index for index, body in enumerate(bodies)}
            failure: ServerError | None = None
            try:
                for future in as_completed(futures):
                    error = _Stopped() if future.cancelled() else future.exception()
                    if error is None:
                        yield futures[future], future.result()
                    elif isinstance(error, ServerError):
                        failure = failure or error
                        self._stop(list(futures))
                    elif not isinstance(error, _Stopped):
                        raise error
            finally:
                self._stop(list(futures))  # whoever reads the replies may stop reading
            if failure is not None:
                raise failure

    def _stop(self, futures: Sequence[Future[Reply]]) -> None:
        self._stopped.set()
        for future in futures:
            future.cancel()

    def _reply(self, record_id: str, body: dict[str, Any]) -> Reply:
        data = json.dumps({"model": self.options.model, "n": 1, **body}).encode("utf-8")
        started_s, pause_s = self._clock.monotonic(), FIRST_PAUSE_S
        own_failures, answers_seen = 0, self._num_answers
        while True:
            self._wait_for_turn()
            try:
                reply = self._post(data)
            except _RefusedRequest as error:
                return Reply("", error=f"{self.url}: {error}")
            except _TryAgain as error:
                # Not all at once: who failed together would come again together.
                wait_s = min(MAX_PAUSE_S, pause_s * random.uniform(0.5, 1) if error.pause_s is None else error.pause_s)
                own_failures += self._num_answers > answers_seen
                answers_seen = self._num_answers
                if own_failures >= MAX_TRIES:
                    return Reply("", error=f"{self.url}: {error} ({own_failures} tries between answers to others)")
                self._check_patience(record_id, started_s, wait_s, error)
                logger.warning("%s, record %r: %s; again in %.0f s", self.url, record_id, error, wait_s)
                self._clock.sleep(wait_s)
                pause_s *= 2
            except ServerError as error:
                raise ServerError(f"{self.url}, record {record_id!r}: {error}") from error
            else:
                with self._lock:
                    self._last_answer_s = self._clock.monotonic()
                    self._num_answers += 1
                return reply

    def _check_patience(self, record_id: str, started_s: float, wait_s: float, error: _TryAgain) -> None:
        away_s = self._clock.monotonic() - max(started_s, self._last_answer_s)
        if away_s + wait_s > self.options.patience_s:
            raise ServerError(
                f"{self.url}, record {record_id!r}: {error}; no answer for {away_s:.0f} s (server.patience_s="
                f"{self.options.patience_s:g}); check that the server runs, then start again: finished records are kept"
            ) from error

    def _wait_for_turn(self) -> None:
        """Keeps requests `60 / requests_per_minute` seconds apart, over all threads."""
        if self._stopped.is_set():
            raise _Stopped
        if not self.options.requests_per_minute:
            return
        with self._lock:
            now_s = self._clock.monotonic()
            turn_s = max(now_s, self._next_turn_s)
            self._next_turn_s = turn_s + 60 / self.options.requests_per_minute
        if turn_s > now_s:
            self._clock.sleep(turn_s - now_s)

    def _post(self, data: bytes) -> Reply:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        http_request = urllib.request.Request(self.url, data=data, headers=headers, method="POST")
        try:
            deadline_s = time.monotonic() + self.options.timeout_s
            with urllib.request.urlopen(http_request, timeout=self.options.timeout_s) as response:
                return _read_reply(_read_whole(response, deadline_s))
        except urllib.error.HTTPError as error:
            raise _classify(error) from error
        except (OSError, http.client.HTTPException) as error:
            # URLError, time-outs and dropped connections: the server may be starting, or busy.
            raise _TryAgain(f"no answer: {error}") from error


def _read_whole(response: Any, deadline_s: float) -> bytes:
    """The body; a server that sends it drop by drop is not waited for, nor is one that never ends."""
    body = bytearray()
    while block := response.read1(_BLOCK_BYTES):
        body += block
        if len(body) > _MAX_ANSWER_BYTES:
            raise _TryAgain(f"an answer of more than {_MAX_ANSWER_BYTES >> 20} MiB")
        if time.monotonic() > deadline_s:
            raise _TryAgain("no whole answer within server.timeout_s")
    if response.length:  # `read1` takes the end of the connection for the end of the body
        raise _TryAgain(f"an answer that was cut off {response.length} bytes before its end")
    return bytes(body)


def _read_reply(raw: bytes) -> Reply:
    try:
        choice = json.loads(raw)["choices"][0]
        text = choice["message"]["content"]
        if text is not None and not isinstance(text, str):
            raise TypeError("content is not text")
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise _TryAgain(f"an answer that is not a chat completion: {raw[:200]!r}") from error
    return Reply(text or "", finished=choice.get("finish_reason") != "length")


def _classify(error: urllib.error.HTTPError) -> Exception:
    try:
        said = error.read()[:500].decode("utf-8", "replace").strip()
    except (OSError, http.client.HTTPException) as cut:
        said = f"(its text was cut off: {cut})"
    message = f"HTTP {error.code}: {said}"
    if error.code in _REQUEST_REFUSED:
        return _RefusedRequest(message)
    if error.code in (408, 409, 425, 429) or error.code >= 500:
        asked = error.headers.get("Retry-After", "")
        return _TryAgain(message, float(asked) if asked.isdigit() else None)
    return ServerError(f"{message}; check server.url, server.model and OPENAI_API_KEY")
