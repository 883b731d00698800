"""A text-only LLM behind an OpenAI-compatible server (vLLM, SGLang, llama.cpp ...), with the standard library alone.

An API key, where the server wants one, comes from the environment variable OPENAI_API_KEY: a key in a configuration
file ends in every run's directory.
"""

from __future__ import annotations

import http.client
import json
import logging
import os
import time
import urllib.error
import urllib.request
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from typing import Any

from bpo.bootstrap.generators import Reply
from bpo.bootstrap.inject import InjectionRequest
from bpo.config_bootstrap import InjectConfig

logger = logging.getLogger(__name__)

MAX_TRIES = 6
FIRST_PAUSE_S, MAX_PAUSE_S = 1.0, 60.0
# The server understood and refuses this one request (a prompt over its context length, say): others may pass.
_REQUEST_REFUSED = (400, 413, 422)


class ServerError(RuntimeError):
    """A server that cannot be used; the message names its URL, the record and what it said."""


class _RefusedRequest(Exception):
    """The server refuses one request for good."""


class _TryAgain(Exception):
    """A failure that may pass; `pause_s` is what the server asked for, if it did."""

    def __init__(self, message: str, pause_s: float | None = None):
        super().__init__(message)
        self.pause_s = pause_s


class OpenAICompatibleGenerator:
    """Sends requests to `{server_url}/chat/completions`, `server_concurrency` at a time, and tries again with pauses.

    Args:
        options: `server_url`, `server_model`, concurrency, timeout and sampling.
        pause: Called with seconds before a request is tried again (tests replace it).
    """

    special_tokens: tuple[str, ...] = ()

    def __init__(self, options: InjectConfig, pause: Callable[[float], None] = time.sleep):
        if not options.server_url.startswith(("http://", "https://")):
            raise ValueError(f"bootstrap.inject.server_url is {options.server_url!r}; write it as http://HOST:PORT/v1")
        self.options = options
        self.name = options.server_model
        self.url = options.server_url.rstrip("/") + "/chat/completions"
        self._pause = pause

    def reply(self, requests: Sequence[InjectionRequest]) -> list[Reply]:
        """Raises ServerError when the server stays away, or refuses the key, the path or the model."""
        with ThreadPoolExecutor(self.options.server_concurrency) as pool:
            futures = [pool.submit(self._reply_one, request) for request in requests]
            try:
                return [future.result() for future in futures]
            except ServerError:
                for future in futures:
                    future.cancel()
                raise

    def body(self, request: InjectionRequest) -> dict[str, Any]:
        """The JSON body of one request."""
        return {
            "model": self.options.server_model,
            "messages": [{"role": m.role, "content": m.content} for m in request.messages],
            "temperature": self.options.temperature,
            "top_p": self.options.top_p,
            "max_tokens": request.max_new_tokens,
            "seed": request.seed,
            "n": 1,
        }

    def _reply_one(self, request: InjectionRequest) -> Reply:
        data = json.dumps(self.body(request)).encode("utf-8")
        pause_s = FIRST_PAUSE_S
        for attempt in range(1, MAX_TRIES + 1):
            try:
                return self._post(data)
            except _RefusedRequest as error:
                return Reply("", error=f"{self.url}: {error}")
            except _TryAgain as error:
                if attempt == MAX_TRIES:
                    raise ServerError(
                        f"{self.url}, record {request.record_id!r}: {error} ({attempt} tries); "
                        "check that the server runs, then start again: finished records are kept"
                    ) from error
                wait_s = min(MAX_PAUSE_S, pause_s if error.pause_s is None else error.pause_s)
                logger.warning("%s, record %r: %s; again in %.0f s", self.url, request.record_id, error, wait_s)
                self._pause(wait_s)
                pause_s *= 2
            except ServerError as error:
                raise ServerError(f"{self.url}, record {request.record_id!r}: {error}") from error
        raise AssertionError("unreachable: the last try returns or raises")

    def _post(self, data: bytes) -> Reply:
        headers = {"Content-Type": "application/json"}
        if key := os.environ.get("OPENAI_API_KEY"):
            headers["Authorization"] = f"Bearer {key}"
        http_request = urllib.request.Request(self.url, data=data, headers=headers, method="POST")
        try:
            with urllib.request.urlopen(http_request, timeout=self.options.server_timeout_s) as response:
                return _read_reply(response.read())
        except urllib.error.HTTPError as error:
            raise _classify(error) from error
        except (OSError, http.client.HTTPException) as error:
            # URLError, time-outs and dropped connections: the server may be starting, or busy.
            raise _TryAgain(f"no answer: {error}") from error


def _read_reply(raw: bytes) -> Reply:
    try:
        choice = json.loads(raw)["choices"][0]
        text = choice["message"]["content"]
    except (ValueError, KeyError, IndexError, TypeError) as error:
        raise _TryAgain(f"an answer that is not a chat completion: {raw[:200]!r}") from error
    return Reply(text or "", finished=choice.get("finish_reason") != "length")


def _classify(error: urllib.error.HTTPError) -> Exception:
    said = error.read()[:500].decode("utf-8", "replace").strip()
    message = f"HTTP {error.code}: {said}"
    if error.code in _REQUEST_REFUSED:
        return _RefusedRequest(message)
    if error.code in (408, 409, 425, 429) or error.code >= 500:
        asked = error.headers.get("Retry-After", "")
        return _TryAgain(message, float(asked) if asked.isdigit() else None)
    return ServerError(f"{message}; check server_url, server_model and OPENAI_API_KEY")
