"""The judge `server`: replies, scores and requests, with a server made by the test."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from bpo.job.launch import Ranks
from bpo.ranking.judge import Failed, Scored
from bpo.ranking.judges.server import ServerJudge
from tests.bootstrap.fake_server import completion, fake_server
from tests.ranking.candidates import config_of, judged
from tests.sample_groups import group

PROMPT = 'Question: {question}\nReference: {reference}\nAnswer: {answer}\nEnd with {"score": 0 to 10}.'


@contextmanager
def judge_of(
    root: Path, folder: Path, reply: Callable[[str], str], prompt: str = PROMPT, **options: Any
) -> Iterator[tuple[ServerJudge, list[dict[str, Any]]]]:
    """The judge, whose server answers `reply(text of the request)`, and the requests."""

    def answer(body: dict[str, Any], number: int) -> Any:
        content = body["messages"][0]["content"]
        text = reply(content if isinstance(content, str) else content[-1]["text"])
        return completion(text) if text else (400, {"error": "refused"})

    (folder / "prompt.txt").write_text(prompt)
    with fake_server(answer) as (url, received):
        given = {"server": {"url": url, "model": "m"}, "prompt": str(folder / "prompt.txt"), **options}
        given = {name: value for name, value in given.items() if value != ""}
        yield ServerJudge(config_of(root / "c.jsonl", "server", given), Ranks()), received


def test_the_last_number_of_each_reply_is_the_score(photo_root: Path, tmp_path: Path) -> None:
    def reply(text: str) -> str:
        if "a dog" in text.split("Answer:")[1]:
            return "-1 ... 3"
        time.sleep(0.1)  # the second answer's reply comes first
        return "2 of 3 objects are right. Score: 7.5"

    with judge_of(photo_root, tmp_path, reply) as (judge, received):
        (result,) = judged(judge, group("a", "a cat", "a dog"))
    assert isinstance(result, Scored) and result.scores == (7.5, 3.0)
    assert result.details[1] == {"reply": "-1 ... 3", "model": ""}
    first = next(body for body in received if "Answer: a dog" in body["messages"][0]["content"][1]["text"])
    assert first["messages"][0]["content"][1]["text"].startswith("Question: What?\nReference: a cat\nAnswer: a dog\n")
    assert first["messages"][0]["content"][0]["image_url"]["url"].startswith("data:image/png;base64,")
    assert (first["temperature"], first["max_tokens"], len(received)) == (0.0, 1024, 2)


@pytest.mark.parametrize(
    ("pattern", "text", "score"),
    [
        (r"score\W+(\d+)", "score: 4 of 9", 4.0),
        (r"\d+/", "4/ 9", None),
        ("", "none", None),
        ("", "score 11", None),
        (r"(\d)|x", "x", None),
    ],
)
def test_a_pattern_finds_the_score_and_a_reply_without_one_fails(
    photo_root: Path, tmp_path: Path, pattern: str, text: str, score: float | None
) -> None:
    replies = {"a cat": "score 5", "a dog": text}

    def reply(asked: str) -> str:
        return replies[asked.split("Answer: ")[1].split("\n")[0]]

    if score is not None:
        replies["a cat"] = text
    with judge_of(photo_root, tmp_path, reply, pattern=pattern) as (judge, _):
        (result,) = judged(judge, group("a", "a cat", "a dog"))
    if score is not None:
        assert isinstance(result, Scored) and result.scores == (score, score)
    else:
        assert isinstance(result, Failed) and result.reason.partition(":")[0] in ("no score", "a score outside [0, 10]")


def test_groups_fail_alone_and_images_can_be_left_out(photo_root: Path, tmp_path: Path) -> None:
    records = [
        group("refused", "a cat", "a dog"),
        group("gone", "a cow", "a hen", image="gone.png"),
        group("no-gt", ("a cow", 1.0, "x"), ("a hen", 0.0, "y")),
        group("fine", "a cow", "a hen"),
    ]
    with judge_of(photo_root, tmp_path, lambda text: "" if "Answer: a dog" in text else "6") as (judge, _):
        refused, gone, no_reference, fine = judged(judge, *records)
    assert isinstance(refused, Failed) and "HTTP 400" in refused.reason
    assert isinstance(gone, Failed) and "gone.png" in gone.reason
    assert no_reference == Failed("no completion of type gt for the prompt's {reference}")
    assert isinstance(fine, Scored) and fine.scores == (6.0, 6.0)
    with judge_of(photo_root, tmp_path, lambda text: "6", image=False) as (judge, received):
        assert all(isinstance(result, Scored) for result in judged(judge, records[1], records[3]))
    assert all(isinstance(body["messages"][0]["content"], str) for body in received)


def test_what_the_replies_depend_on_is_the_identity(photo_root: Path, tmp_path: Path) -> None:
    with judge_of(photo_root, tmp_path, str) as (judge, _):
        first = judge.identity()
    with judge_of(photo_root, tmp_path, str, PROMPT + " Be strict.") as (judge, _):  # at another address
        changed = judge.identity()
    assert [name for name in first if first[name] != changed[name]] == ["prompt (SHA-256)"]


@pytest.mark.parametrize(
    ("options", "prompt", "message"),
    [
        ({"server": {}}, PROMPT, "needs rank.options.server.url and prompt"),
        ({"min": 3, "max": 3}, PROMPT, "rank.options.min is 3; it must be below max 3"),
        ({"pattern": "("}, PROMPT, r"rank.options.pattern is '\('"),
        ({}, "{question}", r"rank.options.prompt .*\{answer\} is missing"),
    ],
)
def test_options_that_cannot_be_right_are_refused(
    photo_root: Path, tmp_path: Path, options: dict[str, Any], prompt: str, message: str
) -> None:
    with pytest.raises(ValueError, match=message), judge_of(photo_root, tmp_path, str, prompt, **options):
        pass
