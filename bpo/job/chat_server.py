"""Chat completions from an OpenAI-compatible server (vLLM, SGLang, llama.cpp ...), using only the standard library.

An API key, if required, is read from the environment variable OPENAI_API_KEY: configuration files are copied into every
run directory. It is sent to the host of `server.url` alone: redirects are not followed.
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
from dataclasses import dataclass
from typing import Any, Protocol

from bpo.config.server import ServerConfig
from bpo.job.exits import JobError

logger = logging.getLogger(__name__)

# Failures of one request, with other requests answered in between, after which it is no longer retried.
MAX_TRIES = 6
FIRST_PAUSE_S, MAX_PAUSE_S = 1.0, 60.0
_BLOCK_BYTES, _MAX_ANSWER_BYTES = 1 << 16, 16 << 20
# The server rejects this request (such as a prompt over its context length); others may succeed.
_REQUEST_REFUSED = (400, 413, 422)


@dataclass(frozen=True, slots=True)
class Reply:
    """An LLM's answer to one request.

    Attributes:
        text: The answer, before cleaning.
        finished: Whether it ended with an EOS token, not at its budget.
        error: Why this request has no answer, or None.
        is_broken: Whether the error is in the record itself (such as an unreadable image), not in this request.
        model: Name of the model as the server reports it; empty if it does not.
        first_tokens: (text, log-prob) of the most likely first tokens; empty if the server does not report them.
    """

    text: str
    finished: bool = True
    error: str | None = None
    is_broken: bool = False
    model: str = ""
    first_tokens: tuple[tuple[str, float], ...] = ()


class ServerError(JobError):
    """The server cannot be used; the message contains its URL, the record and the server's response."""


class _RefusedRequest(Exception):
    """The server permanently rejects one request."""


class _Stopped(Exception):
    """The server cannot be used, as another request found."""


class _TryAgain(Exception):
    """A transient failure; `pause_s` is the server's Retry-After, if any."""

    def __init__(self, message: str, pause_s: float | None = None):
        super().__init__(message)
        self.pause_s = pause_s


class _NoRedirects(urllib.request.HTTPRedirectHandler):
    """Redirects are errors: following one would send the API key to a host that the user did not name."""

    def redirect_request(self, *_: Any) -> None:
        return None


class Clock(Protocol):
    """`time`, or a substitute for tests."""

    def monotonic(self) -> float: ...

    def sleep(self, seconds: float, /) -> None: ...


class ChatServer:
    """Sends bodies to `{url}/chat/completions` concurrently; retries with backoff while the server is unavailable."""

    def __init__(self, options: ServerConfig, clock: Clock = time):
        self.options = options
        self._base = options.url.rstrip("/")
        self.url = f"{self._base}/chat/completions"
        self._headers = {"Content-Type": "application/json", **_authorization()}
        self._opener = urllib.request.build_opener(_NoRedirects)
        self._clock = clock
        self._lock = threading.Lock()
        self._stopped = threading.Event()
        self._last_answer_s = float("-inf")
        self._num_answers = 0
        self._next_turn_s = float("-inf")

    def replies(self, bodies: Sequence[tuple[str, dict[str, Any]]]) -> Iterator[tuple[int, Reply]]:
        """(index, reply) of each (record id, body), in order of completion.

        Raises:
            ServerError: the server was unavailable for `patience_s`, or rejects the key, the path or the model; raised
                after all finished replies have been yielded.
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
                self._stop(list(futures))  # the consumer may stop early
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
                # With jitter: requests that failed together would otherwise retry together.
                wait_s = min(MAX_PAUSE_S, pause_s * random.uniform(0.5, 1) if error.pause_s is None else error.pause_s)
                own_failures += self._num_answers > answers_seen
                answers_seen = self._num_answers
                if own_failures >= MAX_TRIES:
                    return Reply("", error=f"{self.url}: {error} ({own_failures} failures while others were answered)")
                self._check_patience(f"{self.url}, record {record_id!r}", started_s, wait_s, error)
                logger.warning("%s, record %r: %s; retrying in %.0f s", self.url, record_id, error, wait_s)
                self._clock.sleep(wait_s)
                pause_s *= 2
            except ServerError as error:
                raise ServerError(f"{self.url}, record {record_id!r}: {error}") from error
            else:
                with self._lock:
                    self._last_answer_s = self._clock.monotonic()
                    self._num_answers += 1
                return reply

    def _check_patience(self, where: str, started_s: float, wait_s: float, error: _TryAgain) -> None:
        away_s = self._clock.monotonic() - max(started_s, self._last_answer_s)
        if away_s + wait_s > self.options.patience_s:
            raise ServerError(
                f"{where}: {error}; no answer for {away_s:.0f} s (server.patience_s="
                f"{self.options.patience_s:g}); check that the server is up, then restart: finished records are kept"
            ) from error

    def _wait_for_turn(self) -> None:
        """Spaces requests `60 / requests_per_minute` seconds apart, across all threads."""
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

    def load_adapter(self, path: str) -> None:
        """Makes a vLLM server load a LoRA adapter under the name `server.model`; one that it has already is kept.

        Uses vLLM's endpoint `load_lora_adapter` as documented; not run with vLLM.

        Args:
            path: Directory of the adapter, as the server sees it.

        Raises:
            ServerError: the server does not answer, or refuses; names the flags that it needs.
        """
        try:
            self._ask("/load_lora_adapter", {"lora_name": self.options.model, "lora_path": path})
        except _RefusedRequest as error:
            if "already" not in str(error):
                raise ServerError(
                    f"{self._base}/load_lora_adapter does not load {path}: {error}. Start vLLM with the base model, "
                    "--enable-lora, a sufficient --max-lora-rank and VLLM_ALLOW_RUNTIME_LORA_UPDATING=True, on a "
                    "machine that can read the folder; or serve the merged model"
                ) from error

    def check_served(self) -> None:
        """Checks that the server lists `server.model`; one that ignores the name would answer with another model.

        Raises:
            ServerError: the server does not answer, lists no models, or not this one; names those that it lists.
        """
        try:
            names = [str(entry["id"]) for entry in json.loads(self._ask("/models"))["data"]]
        except (_RefusedRequest, ValueError, KeyError, TypeError) as error:
            raise ServerError(f"{self._base}/models does not list the served models: {error!r}") from error
        if self.options.model not in names:
            raise ServerError(
                f"{self._base} serves {', '.join(names) or 'no model'}, not {self.options.model}; serve it under that "
                "name (vLLM: --served-model-name), or correct server.model and model.path"
            )

    def _ask(self, path: str, body: dict[str, Any] | None = None) -> bytes:
        """The response to a request other than for an answer; waits for the server as long as for an answer."""
        url, data = self._base + path, None if body is None else json.dumps(body).encode("utf-8")
        started_s, pause_s = self._clock.monotonic(), FIRST_PAUSE_S
        while True:
            try:
                return self._send(url, data)
            except _TryAgain as error:
                self._check_patience(url, started_s, pause_s, error)
                logger.warning("%s: %s; retrying in %.0f s", url, error, pause_s)
                self._clock.sleep(pause_s)
                pause_s = min(MAX_PAUSE_S, 2 * pause_s)
            except ServerError as error:
                raise _RefusedRequest(str(error)) from error

    def _post(self, data: bytes) -> Reply:
        return _read_reply(self._send(self.url, data))

    def _send(self, url: str, data: bytes | None) -> bytes:
        method = "GET" if data is None else "POST"
        http_request = urllib.request.Request(url, data=data, headers=self._headers, method=method)
        try:
            deadline_s = time.monotonic() + self.options.timeout_s
            with self._opener.open(http_request, timeout=self.options.timeout_s) as response:
                return _read_whole(response, deadline_s)
        except urllib.error.HTTPError as error:
            raise _classify(error) from error
        except (OSError, http.client.HTTPException) as error:
            # URLError, timeouts and dropped connections: the server may be starting or busy.
            raise _TryAgain(f"no answer: {error}") from error


def _authorization() -> dict[str, str]:
    """The header with the API key, if there is one.

    Raises:
        ServerError: the key cannot be a header; does not contain it, as the error of `http.client` would.
    """
    key = os.environ.get("OPENAI_API_KEY", "").strip()
    if not (key.isascii() and key.isprintable()):
        raise ServerError("OPENAI_API_KEY has line breaks or characters outside ASCII; set it to the key alone")
    return {"Authorization": f"Bearer {key}"} if key else {}


def _read_whole(response: Any, deadline_s: float) -> bytes:
    """Reads the body, within a deadline (a slow-trickle response) and a size limit (an unbounded one)."""
    body = bytearray()
    while block := response.read1(_BLOCK_BYTES):
        body += block
        if len(body) > _MAX_ANSWER_BYTES:
            raise _TryAgain(f"response larger than {_MAX_ANSWER_BYTES >> 20} MiB")
        if time.monotonic() > deadline_s:
            raise _TryAgain("response incomplete after server.timeout_s")
    if response.length:  # `read1` treats the end of the connection as the end of the body
        raise _TryAgain(f"response truncated, {response.length} bytes missing")
    return bytes(body)


def _read_reply(raw: bytes) -> Reply:
    try:
        completion = json.loads(raw)
        choice = completion["choices"][0]
        text = choice["message"]["content"]
        if text is not None and not isinstance(text, str):
            raise TypeError("content is not text")
    except (ValueError, KeyError, IndexError, TypeError, RecursionError) as error:
        raise _TryAgain(f"response is not a chat completion: {raw[:200]!r}") from error
    finished, model = choice.get("finish_reason") != "length", str(completion.get("model") or "")
    return Reply(text or "", finished, model=model, first_tokens=_first_tokens(choice))


def _first_tokens(choice: dict[str, Any]) -> tuple[tuple[str, float], ...]:
    try:
        listed = choice["logprobs"]["content"][0]["top_logprobs"]
        return tuple((str(entry["token"]), float(entry["logprob"])) for entry in listed)
    except (KeyError, IndexError, TypeError, ValueError):  # not asked for, or in another form
        return ()


def _classify(error: urllib.error.HTTPError) -> Exception:
    try:
        content = error.read()[:500].decode("utf-8", "replace").strip()
    except (OSError, http.client.HTTPException) as cut:
        content = f"(response truncated: {cut})"
    message = f"HTTP {error.code}: {content}"
    if 300 <= error.code < 400:
        target = error.headers.get("Location", "")
        return ServerError(
            f"redirect to {target!r} (HTTP {error.code}) not followed; set server.url to the final address"
        )
    if error.code in _REQUEST_REFUSED:
        return _RefusedRequest(message)
    if error.code in (408, 409, 425, 429) or error.code >= 500:
        retry_after = error.headers.get("Retry-After", "")
        return _TryAgain(message, float(retry_after) if retry_after.isdecimal() else None)
    return ServerError(f"{message}; check server.url, server.model and OPENAI_API_KEY")
