"""Answers that ranks share: whose batch is whose, and what ends them on all ranks."""

from __future__ import annotations

import contextlib
from types import SimpleNamespace
from typing import Any

import pytest

from bpo.data.encode import Encoder
from bpo.evaluation.answers import Request
from bpo.job.exits import Interrupted
from bpo.job.launch import Ranks
from bpo.job.signals import StopRequest
from bpo.training import answering
from bpo.training.answering import AnsweringError, answer_together


def request(text: str, image: str = "wide.png") -> Request:
    return Request(image=image, text=text, max_new_tokens=9)


@pytest.fixture
def engine(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A rank of two whose model answers with the text of the question; `asked` has the batches and their budgets."""
    trainer = SimpleNamespace(ranks=Ranks(1, 2, 1), is_partitioned=True, asked=[], other=[])
    trainer.generating = lambda: contextlib.nullcontext(trainer)

    def generate(model: Any, encoder: Encoder, prompts: list[Any], *, max_new_tokens: int, **_: Any) -> list[str]:
        texts = [prompt.turns[-1].content[-1].text for prompt in prompts]
        trainer.asked.append((texts, max_new_tokens))
        return texts

    def gather(item: Any) -> list[Any]:
        return [trainer.other.pop(0) if trainer.other else ["", False], item]

    monkeypatch.setattr(answering, "generate_answers", generate)
    monkeypatch.setattr(answering, "gather_from_ranks", gather)
    return trainer


def other_rank(turns: int, *answers: Any) -> list[Any]:
    return [*[["", False]] * turns, [list(answer) for answer in answers]]


def test_a_rank_without_a_batch_repeats_one_of_the_same_kind_if_the_model_is_partitioned(
    engine: Any, encoder: Encoder
) -> None:
    requests = [request(text) for text in "abcde"] + [request("blind", image="")]
    engine.other = other_rank(3, (0, ["a", "b"]), (2, ["e"]), (3, ["blind"]))
    answers = answer_together(engine, encoder, requests, batch_size=2)
    assert answers == {one: one.text for one in requests}
    assert engine.asked == [(["c", "d"], 9), (["e"], 1), (["blind"], 1)]


def test_a_rank_with_the_whole_model_waits_instead(engine: Any, encoder: Encoder) -> None:
    engine.is_partitioned = False
    engine.other = other_rank(2, (0, ["a", "b"]), (2, ["e"]))
    answer_together(engine, encoder, [request(text) for text in "abcde"], batch_size=2)
    assert engine.asked == [(["c", "d"], 9)]


def test_an_image_that_is_gone_ends_all_ranks_with_its_name(engine: Any, encoder: Encoder) -> None:
    requests = [request("a"), request("b", image="gone.png")]
    with pytest.raises(AnsweringError, match="gone.png"):
        answer_together(engine, encoder, requests, batch_size=1)
    engine.other = [["image x.png: missing", False]]
    with pytest.raises(AnsweringError, match="x.png: missing"):  # another rank's
        answer_together(engine, encoder, [request("a"), request("b")], batch_size=1)
    assert not engine.asked


def test_a_signal_to_one_rank_ends_all(engine: Any, encoder: Encoder) -> None:
    engine.other = [["", True]]
    with pytest.raises(Interrupted):
        answer_together(engine, encoder, [request("a")], batch_size=1)
    with StopRequest() as stop:
        stop.received = True
        with pytest.raises(Interrupted):
            answer_together(engine, encoder, [request("a")], batch_size=1, stop=stop)
    assert not engine.asked
