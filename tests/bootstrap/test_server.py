"""The OpenAI-compatible generator against real HTTP. Run: python -m pytest tests/bootstrap/test_server.py"""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest

from bpo.bootstrap.generators import Reply
from bpo.bootstrap.inject import InjectionRequest, Message
from bpo.bootstrap.server import MAX_TRIES, OpenAICompatibleGenerator, ServerError
from bpo.config_bootstrap import InjectConfig
from tests.bootstrap.fake_server import Answer, completion, fake_server


def request(record_id: str = "r1", text: str = "Rewrite this.", seed: int = 5) -> InjectionRequest:
    return InjectionRequest(record_id, (Message("user", text),), "Modified:", 77, seed)


def generator(url: str, pauses: list[float] | None = None, **options: Any) -> OpenAICompatibleGenerator:
    config = InjectConfig(server_url=url, server_model="small", **options)
    return OpenAICompatibleGenerator(config, pause=[].append if pauses is None else pauses.append)


def test_the_server_gets_prompt_sampling_and_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with fake_server(lambda body, number: completion("A dog.")) as (url, received):
        assert generator(url + "/").reply([request()]) == [Reply("A dog.")]
    assert received == [
        {
            "model": "small",
            "messages": [{"role": "user", "content": "Rewrite this."}],
            "temperature": 0.8,
            "top_p": 0.95,
            "max_tokens": 77,
            "seed": 5,
            "n": 1,
            "path": "/v1/chat/completions",
            "key": "Bearer secret",
        }
    ]


def test_a_500_and_a_429_are_tried_again_with_growing_pauses() -> None:
    def answer(body: dict[str, Any], number: int) -> Answer:
        return completion("A dog.") if number == 3 else (500 if number == 1 else 429, {"error": "busy"})

    pauses: list[float] = []
    with fake_server(answer) as (url, received):
        assert generator(url, pauses).reply([request()]) == [Reply("A dog.")]
    assert len(received) == 3
    assert pauses == [1.0, 2.0]


def test_an_answer_that_is_no_completion_is_tried_again() -> None:
    with fake_server(lambda body, number: completion("ok") if number == 2 else (200, {"choices": []})) as (url, _):
        assert generator(url).reply([request()]) == [Reply("ok")]


def test_a_server_that_stays_away_is_an_error_naming_url_and_record() -> None:
    with fake_server(lambda body, number: (503, {})) as (url, received):
        with pytest.raises(ServerError, match=rf"{url}/chat/completions.*'r1'.*503"):
            generator(url).reply([request()])
    assert len(received) == MAX_TRIES
    with pytest.raises(ServerError, match="'r1'"):
        generator(url).reply([request()])


def test_a_server_that_hangs_is_an_error(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bpo.bootstrap.server.MAX_TRIES", 1)
    release = threading.Event()

    def answer(body: dict[str, Any], number: int) -> Answer:
        release.wait(10)
        return completion("late")

    with fake_server(answer) as (url, _):
        with pytest.raises(ServerError, match="timed out"):
            generator(url, server_timeout_s=0.2).reply([request()])
        release.set()


def test_a_wrong_model_or_key_stops_at_once() -> None:
    with fake_server(lambda body, number: (404, {"error": "no model `small`"})) as (url, received):
        with pytest.raises(ServerError, match="no model `small`.*server_model"):
            generator(url).reply([request()])
    assert len(received) == 1


def test_a_request_that_the_server_refuses_does_not_stop_the_others() -> None:
    def answer(body: dict[str, Any], number: int) -> Answer:
        long = "long" in json.dumps(body["messages"])
        return (400, {"error": "context length"}) if long else completion("A dog.")

    with fake_server(answer) as (url, _):
        replies = generator(url).reply([request("r1", "long"), request("r2", "short")])
    assert replies[1] == Reply("A dog.")
    assert replies[0].error is not None and "context length" in replies[0].error and url in replies[0].error


def test_replies_come_in_order_and_requests_run_side_by_side() -> None:
    def answer(body: dict[str, Any], number: int) -> Answer:
        text = body["messages"][0]["content"]
        time.sleep(0.2 - 0.02 * int(text))
        return completion(text)

    with fake_server(answer) as (url, _):
        started = time.monotonic()
        replies = generator(url, server_concurrency=8).reply([request(str(i), str(i)) for i in range(8)])
        elapsed_s = time.monotonic() - started
    assert [reply.text for reply in replies] == [str(i) for i in range(8)]
    assert elapsed_s < 0.6  # one after the other: 1.0 s


def test_text_cut_by_the_budget_is_not_finished() -> None:
    with fake_server(lambda body, number: completion("A dog and", "length")) as (url, _):
        assert generator(url).reply([request()]) == [Reply("A dog and", finished=False)]


def test_a_url_without_a_scheme_is_an_error() -> None:
    with pytest.raises(ValueError, match="localhost:8000.*http://HOST:PORT/v1"):
        generator("localhost:8000")
