"""Chat completions against real HTTP and its faults."""

from __future__ import annotations

import json
import threading
import time
from typing import Any

import pytest

from bpo.bootstrap.engines.text import ChatTextGenerator
from bpo.bootstrap.inject import InjectionRequest, Message
from bpo.config.bootstrap import InjectConfig, ServerConfig
from bpo.job.chat_server import MAX_TRIES, ChatServer, Reply, ServerError
from tests.bootstrap.fake_server import CUT, DRIP, Answer, completion, fake_server
from tests.bootstrap.replies import FakeClock, replies_of


def request(record_id: str = "r1", text: str = "Rewrite this.", seed: int = 5) -> InjectionRequest:
    return InjectionRequest(record_id, (Message("user", text),), "Modified:", 77, seed)


def generator(url: str, clock: Any = None, **server: Any) -> ChatTextGenerator:
    options = ServerConfig(url=url, model="small", **server)
    return ChatTextGenerator(ChatServer(options, clock or FakeClock()), InjectConfig(server=options), "small")


def test_the_server_gets_prompt_sampling_and_seed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret")
    with fake_server(lambda body, number: completion("A dog.")) as (url, received):
        assert replies_of(generator(url + "/"), [request()]) == [Reply("A dog.")]
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


def test_a_system_prompt_precedes_each_request() -> None:
    llm = ChatTextGenerator(None, InjectConfig(), "big", "Be kind.")  # type: ignore[arg-type]
    assert llm.body(request())["messages"] == [
        {"role": "system", "content": "Be kind."},
        {"role": "user", "content": "Rewrite this."},
    ]


FAULTS: dict[str, Answer] = {
    "500": (500, {"error": "busy"}),
    "429": (429, {"error": "slow down"}),
    "no choices": (200, {"choices": []}),
    "no JSON": (200, b"<html>proxy error</html>"),
    "content is a number": (200, {"choices": [{"message": {"content": 7}}]}),
    "null": (200, b"null"),
    "no object": (200, b"[1, 2]"),
    "choices by name": (200, {"choices": {"0": "A dog."}}),
    "nested without end": (200, b'{"choices": ' + b"[" * 100_000),
    "not UTF-8": (200, b'{"choices": "\xff\xfe"}'),
    "empty": (200, b""),
    "larger than any answer": (200, {**completion("A dog.")[1], "padding": "x" * (17 << 20)}),  # type: ignore[dict-item]
    "cut in the middle": (CUT, completion("A dog.")[1]),
}


@pytest.mark.parametrize("fault", FAULTS)
def test_what_may_pass_is_tried_again_with_growing_pauses(fault: str) -> None:
    clock = FakeClock()
    with fake_server(lambda body, number: completion("A dog.") if number == 3 else FAULTS[fault]) as (url, received):
        assert replies_of(generator(url, clock), [request()]) == [Reply("A dog.")]
    assert len(received) == 3
    first, second = clock.slept
    assert 0.5 <= first <= 1 <= second <= 2


def test_who_failed_together_does_not_come_again_together() -> None:
    clock = FakeClock()
    with fake_server(lambda body, number: (503, {}) if number <= 8 else completion("ok")) as (url, _):
        replies_of(generator(url, clock, concurrency=8), [request(str(i)) for i in range(8)])
    assert len(set(clock.slept[:8])) == 8


def test_a_server_that_stays_away_ends_the_job_after_its_patience() -> None:
    clock = FakeClock()
    with fake_server(lambda body, number: (503, {})) as (url, received):
        with pytest.raises(ServerError, match=rf"{url}/chat/completions.*'r1'.*503.*patience_s=100"):
            replies_of(generator(url, clock, patience_s=100), [request()])
    assert 30 <= clock.now_s <= 100 and len(received) == len(clock.slept) + 1
    with pytest.raises(ServerError, match="'r1'"):  # the port is closed
        replies_of(generator(url, patience_s=100), [request()])


def test_a_server_that_dies_and_comes_back_loses_nothing_and_does_nothing_twice() -> None:
    """It dies with requests in flight, is away for ten minutes of the client's time, and answers the rest."""
    clock = FakeClock()
    answered: list[str] = []

    def answer(body: dict[str, Any], number: int) -> Answer:
        text = body["messages"][0]["content"]
        if 10 <= number and clock.now_s < 600:
            return (CUT, completion(text)[1]) if number % 2 else (502, b"")
        answered.append(text)
        return completion(text)

    with fake_server(answer) as (url, _):
        replies = replies_of(generator(url, clock, concurrency=4), [request(str(i), str(i)) for i in range(40)])
    assert [reply.text for reply in replies] == [str(i) for i in range(40)]
    assert sorted(answered, key=int) == [str(i) for i in range(40)]


def test_what_was_answered_before_the_server_went_away_is_kept() -> None:
    with fake_server(lambda body, number: completion("ok") if number <= 5 else (503, {})) as (url, _):
        server = generator(url, concurrency=1, patience_s=30)
        kept: list[int] = []
        with pytest.raises(ServerError):
            for index, _ in server.replies([request(str(i)) for i in range(9)]):
                kept.append(index)
    assert kept == [0, 1, 2, 3, 4]


def test_one_request_that_always_fails_does_not_stop_the_others() -> None:
    def answer(body: dict[str, Any], number: int) -> Answer:
        return (500, {"error": "boom"}) if body["messages"][0]["content"] == "bad" else completion("ok")

    texts = ["bad", *map(str, range(30))]
    with fake_server(answer) as (url, received):
        replies = replies_of(generator(url, concurrency=2), [request(text, text) for text in texts])
    assert [reply.text for reply in replies[1:]] == ["ok"] * 30
    assert "boom" in (replies[0].error or "")
    assert sum(body["messages"][0]["content"] == "bad" for body in received) >= MAX_TRIES


def test_a_server_that_hangs_is_given_up_and_asked_again() -> None:
    release = threading.Event()

    def answer(body: dict[str, Any], number: int) -> Answer:
        if number == 1:
            release.wait(10)
        return completion("late" if number == 1 else "A dog.")

    with fake_server(answer) as (url, _):
        assert replies_of(generator(url, timeout_s=0.2), [request()]) == [Reply("A dog.")]
        release.set()


def test_a_server_that_answers_drop_by_drop_is_given_up_and_asked_again() -> None:
    """Each byte comes in time, the answer never."""
    with fake_server(lambda body, number: (DRIP if number == 1 else 200, completion("A dog.")[1])) as (url, received):
        started_s = time.monotonic()
        assert replies_of(generator(url, timeout_s=0.5), [request()]) == [Reply("A dog.")]
        assert len(received) >= 2 and time.monotonic() - started_s >= 0.5


def test_a_wrong_model_or_key_stops_at_once() -> None:
    with fake_server(lambda body, number: (404, {"error": "no model `small`"})) as (url, received):
        with pytest.raises(ServerError, match="no model `small`.*server.model"):
            replies_of(generator(url), [request()])
    assert len(received) == 1


@pytest.mark.parametrize("status", [301, 302, 303, 307, 308])
def test_the_key_does_not_follow_a_redirect(status: int, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "secret\n")  # as read from a file
    with fake_server(lambda body, number: completion("ok")) as (other, received):
        with fake_server(lambda body, number: (status, {}), {"Location": f"{other}/chat/completions"}) as (url, asked):
            with pytest.raises(ServerError, match=f"redirect to '{other}/chat/completions'.*set server.url"):
                replies_of(generator(url), [request()])
    assert [body["key"] for body in asked] == ["Bearer secret"] and received == []


def test_a_key_that_cannot_be_sent_is_not_printed(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("OPENAI_API_KEY", "sk-1\nsk-2")
    with pytest.raises(ServerError, match="OPENAI_API_KEY has line breaks") as error:
        generator("http://127.0.0.1:1/v1")
    assert "sk-" not in str(error.value)


def test_a_request_that_the_server_refuses_does_not_stop_the_others() -> None:
    def answer(body: dict[str, Any], number: int) -> Answer:
        long = "long" in json.dumps(body["messages"])
        return (400, {"error": "context length"}) if long else completion("A dog.")

    with fake_server(answer) as (url, _):
        replies = replies_of(generator(url), [request("r1", "long"), request("r2", "short")])
    assert replies[1] == Reply("A dog.")
    assert replies[0].error is not None and "context length" in replies[0].error and url in replies[0].error


def test_requests_run_side_by_side_up_to_the_limit() -> None:
    running: list[int] = []
    most, together = 0, threading.Event()

    def answer(body: dict[str, Any], number: int) -> Answer:
        nonlocal most
        running.append(number)
        most = max(most, len(running))
        if len(running) > 1:
            together.set()
        together.wait(60)  # the first is answered after the second has come
        time.sleep(0.05)
        running.remove(number)
        return completion(body["messages"][0]["content"])

    with fake_server(answer) as (url, _):
        replies = replies_of(generator(url, concurrency=5), [request(str(i), str(i)) for i in range(20)])
    assert [reply.text for reply in replies] == [str(i) for i in range(20)]
    assert 2 <= most <= 5


def test_requests_are_kept_apart_where_a_rate_is_set() -> None:
    clock = FakeClock()
    with fake_server(lambda body, number: completion("ok")) as (url, _):
        replies_of(generator(url, clock, requests_per_minute=30, concurrency=1), [request(str(i)) for i in range(4)])
    assert clock.slept == [2.0, 2.0, 2.0]


def test_a_server_says_how_long_to_wait() -> None:
    with fake_server(lambda body, number: completion("ok") if number == 2 else (429, {}), {"Retry-After": "7"}) as (
        url,
        _,
    ):
        clock = FakeClock()
        assert replies_of(generator(url, clock), [request()]) == [Reply("ok")]
    assert clock.slept == [7.0]


def test_text_cut_by_the_budget_is_not_finished() -> None:
    with fake_server(lambda body, number: completion("A dog and", "length")) as (url, _):
        assert replies_of(generator(url), [request()]) == [Reply("A dog and", finished=False)]


def test_a_url_without_a_scheme_is_an_error() -> None:
    with pytest.raises(ValueError, match="localhost:8000.*http://HOST:PORT/v1"):
        ServerConfig(url="localhost:8000", model="m")


def test_a_server_loads_an_adapter_and_must_list_the_model_that_is_asked_for() -> None:
    served = ["base"]
    with fake_server(lambda body, number: completion("ok"), models=served) as (url, received):
        server = ChatServer(ServerConfig(url=url + "/", model="bpo-1"), FakeClock())
        with pytest.raises(ServerError, match=rf"{url} serves base, not bpo-1; serve it under that name"):
            server.check_served()
        for _ in range(2):  # another rank has loaded it before
            server.load_adapter("/adapters/1")
            server.check_served()
    assert served == ["base", "bpo-1"]
    asked = [(body["path"], body["lora_name"], body["lora_path"]) for body in received]
    assert asked == [("/v1/load_lora_adapter", "bpo-1", "/adapters/1")] * 2


def test_a_server_that_loads_no_adapters_or_lists_no_models_is_refused() -> None:
    with fake_server(lambda body, number: completion("ok")) as (url, _):
        server = ChatServer(ServerConfig(url=url, model="m", patience_s=10), FakeClock())
        with pytest.raises(ServerError, match="/load_lora_adapter does not load /a: HTTP 404.*VLLM_ALLOW_RUNTIME_LORA"):
            server.load_adapter("/a")
        with pytest.raises(ServerError, match="/models does not list the served models"):
            server.check_served()
    with pytest.raises(ServerError, match="/models: no answer.*patience_s=10.*check that the server is up"):
        server.check_served()
