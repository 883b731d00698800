"""`bpo judge` against a local server: what is sent, kept and compared."""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bpo.config.evaluation import EvaluationConfig
from bpo.config.judge import JudgeConfig
from bpo.config.server import ServerConfig
from bpo.config.training import Config, DataConfig
from bpo.evaluation.judge.run import run_judge
from bpo.job import chat_server
from tests.bootstrap.fake_server import Answer, fake_server
from tests.evaluation.benchmarks import judged_files

NUM = 16
PROMPT = "Objects: {image_content}\nQuestion: {question}\nTruth: {reference}\nAnswer: {answer}"


@pytest.fixture(autouse=True)
def short_pauses(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(chat_server, "FIRST_PAUSE_S", 0.01)
    monkeypatch.delenv("OPENAI_API_KEY", raising=False)


@pytest.fixture
def config(tmp_path: Path) -> Config:
    """The base answers "base N", the model "model N", but "base 0" to the first question."""
    questions = judged_files.mmhal(tmp_path, NUM)
    (tmp_path / "prompt.txt").write_text(PROMPT)
    for name in ("base", "model"):
        records = json.loads(Path(questions).read_text())
        for number, record in enumerate(records):
            record["model_answer"] = f"{name if number else 'base'} {number}"
        judged_files.write(tmp_path / f"{name}.json", records)
    judge = JudgeConfig(
        output=str(tmp_path / "out" / "judged.json"),
        base=str(tmp_path / "base.json"),
        answers=[str(tmp_path / "model.json")],
        prompt=str(tmp_path / "prompt.txt"),
    )
    return Config(evaluation=EvaluationConfig(questions=questions, format="mmhal"), judge=judge)


def at(config: Config, url: str) -> Config:
    # More connections at once than the backlog of Python's server (5) would wait a second.
    config.judge.server = ServerConfig(url=url, model="judge-1", patience_s=30, concurrency=4)
    return config


def rated(text: str, model: str = "judge-1-2026") -> Answer:
    message = {"role": "assistant", "content": text}
    return 200, {"model": model, "choices": [{"message": message, "finish_reason": "stop"}]}


def judge(body: dict[str, Any], number: int) -> Answer:
    """The base is rated 1, the model 5."""
    return rated("Rating: 5" if "Answer: model" in str(body) else "Rating: 1")


def test_the_base_is_judged_too_and_the_models_are_compared_with_it(config: Config, tmp_path: Path) -> None:
    with fake_server(judge) as (url, received):
        tree = run_judge(at(config, url))
    assert tree == json.loads((tmp_path / "out" / "judged.json").read_text())
    assert len(received) == 2 * NUM - 1  # the answer that both gave is judged once
    assert list(tree["models"]) == ["base", "model"]
    base, model = tree["models"]["base"], tree["models"]["model"]
    assert base["metrics"]["score"] == {"value": 1, "low": 1, "high": 1} and base["differences"] == {}
    assert model["metrics"]["score"]["value"] == pytest.approx(1 + 4 * 15 / 16)
    difference = model["differences"]["hallucination_rate"]
    assert difference["value"] == pytest.approx(-15 / 16) and difference["low"] == -1 <= difference["high"] < 0
    assert model["metrics"]["mean_answer_words"]["value"] == 2
    about = tree["judge"]
    assert (about["requested_model"], about["models"], about["num_runs"]) == ("judge-1", ["judge-1-2026"], 1)
    assert re.fullmatch(r"20\d\d-.*\+00:00", about["first_reply"]) and about["first_reply"] <= about["last_reply"]
    assert len(about["prompt_sha256"]) == 64
    item = model["items"][3]
    assert (item["id"], item["answer"], item["verdicts"]) == ("3", "model 3", [5])
    assert item["replies"][0]["text"] == "Rating: 5" and item["replies"][0]["finished"]


def test_a_request_has_the_filled_prompt_and_the_decoding(config: Config) -> None:
    config.judge.system_prompt = "Judge."
    with fake_server(judge) as (url, received):
        run_judge(at(config, url))
    body = next(body for body in received if "model 3" in str(body))
    text = "Objects: dog, ball\nQuestion: What is at 3?\nTruth: A dog at 3.\nAnswer: model 3"
    assert body["messages"] == [{"role": "system", "content": "Judge."}, {"role": "user", "content": text}]
    assert (body["model"], body["temperature"], body["max_tokens"], body["key"]) == ("judge-1", 0.0, 1024, None)


def test_a_second_run_sends_nothing_and_an_interrupted_one_only_the_rest(config: Config) -> None:
    def then_refuses(body: dict[str, Any], number: int) -> Answer:
        return judge(body, number) if number <= 10 else (400, {"error": "too long"})

    with fake_server(then_refuses) as (url, received):
        at(config, url).judge.server.concurrency = 1
        with pytest.raises(ValueError, match=r"21 of 31 requests have no reply, such as base, question '10': .*400"):
            run_judge(config)
    assert not Path(config.judge.output).exists()
    with fake_server(judge) as (url, received):
        first = run_judge(at(config, url))
        assert len(received) == 21
        assert run_judge(config) == first
        assert len(received) == 21


def test_old_replies_of_the_base_beside_new_ones_are_warned_of(
    config: Config, caplog: pytest.LogCaptureFixture
) -> None:
    config.judge.answers = []
    with fake_server(judge) as (url, _):
        run_judge(at(config, url))
        cache = Path(f"{config.judge.output}.replies.jsonl")
        cache.write_text(re.sub(r'"date": ?"\d{4}', '"date":"2020', cache.read_text()))
        config.judge.answers = [str(Path(config.judge.base).with_name("model.json"))]
        run_judge(config)
    assert "the replies are from 2020-" in caplog.text and "another judge.cache" in caplog.text


def test_a_failing_server_is_asked_again(config: Config) -> None:
    with fake_server(lambda body, number: judge(body, number) if number > 3 else (500, {"error": "busy"})) as (url, r):
        tree = run_judge(at(config, url))
    assert len(r) == 2 * NUM - 1 + 3 and tree["models"]["base"]["metrics"]["score"]["value"] == 1


@pytest.mark.parametrize("change", ["model", "temperature", "prompt", "system", "runs"])
def test_whatever_a_reply_depends_on_is_asked_again(config: Config, change: str) -> None:
    with fake_server(judge) as (url, received):
        run_judge(at(config, url))
        before = len(received)
        if change == "model":
            config.judge.server.model = "judge-2"
        elif change == "temperature":
            config.judge.temperature = 0.7
        elif change == "system":
            config.judge.system_prompt = "Be strict."
        elif change == "runs":
            config.judge.num_runs = 2
        else:
            Path(config.judge.prompt).write_text(PROMPT + "\nBe brief.")
        run_judge(config)
        assert len(received) == 2 * before


def test_runs_are_averaged_and_given_apart(config: Config) -> None:
    config.judge.num_runs = 2
    seen: dict[str, int] = {}

    def answer(body: dict[str, Any], number: int) -> Answer:
        text = str(body["messages"])
        seen[text] = seen.get(text, 0) + 1
        return rated(f"Rating: {2 * seen[text]}")

    with fake_server(answer) as (url, received):
        tree = run_judge(at(config, url))
    base = tree["models"]["base"]
    assert len(received) == 2 * (2 * NUM - 1)
    assert base["metrics"]["score"]["value"] == 3
    assert sum(run["score"] for run in base["runs"]) == 6
    assert sorted(base["items"][0]["verdicts"]) == [2, 4]


def test_unreadable_replies_are_counted_and_listed(config: Config, capsys: pytest.CaptureFixture[str]) -> None:
    def answer(body: dict[str, Any], number: int) -> Answer:
        return rated("I cannot say.") if "model 7" in str(body) else judge(body, number)

    with fake_server(answer) as (url, _):
        tree = run_judge(at(config, url))
    model = tree["models"]["model"]
    assert model["unreadable"] == ["7"] and tree["models"]["base"]["unreadable"] == []
    assert model["metrics"]["unreadable"]["value"] == pytest.approx(1 / 16)
    assert model["metrics"]["score"]["value"] == pytest.approx((1 + 5 * 14) / 16)
    table = capsys.readouterr().out
    assert "mmhal, judged by judge-1-2026; runs: 1" in table
    assert re.search(r"hallucination_rate +0.125 .* -0.875 .*lower is better", table)


def test_images_are_sent_where_asked(config: Config, tmp_path: Path) -> None:
    for number in range(NUM):
        Image.new("RGB", (8, 8), (number, 0, 0)).save(tmp_path / f"{number:02}.jpg")
    config.judge.images, config.data = True, DataConfig(image_root=str(tmp_path))
    with fake_server(judge) as (url, received):
        run_judge(at(config, url))
        image, text = received[0]["messages"][0]["content"]
        assert image["image_url"]["url"].startswith("data:image/png;base64,") and text["type"] == "text"
        count = len(received)
        Image.new("RGB", (9, 9)).save(tmp_path / "05.jpg")
        run_judge(config)
        assert len(received) == count + 2  # of the base and of the model


def _set(section: str, name: str, value: Any) -> Callable[[Config], None]:
    return lambda config: setattr(getattr(config, section), name, value)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_set("judge", "output", ""), r"judge.output is empty"),
        (_set("judge", "prompt", ""), r"judge.prompt is empty"),
        (_set("judge", "server", ServerConfig()), r"judge.server.url is empty"),
        (_set("judge", "base", ""), r"judge.base is empty; give the answers of the base model"),
        (
            _set("judge", "benchmark", "pope"),
            r"judge.benchmark is 'pope'; it must name .* \(mmhal\). Types .* hallusion",
        ),
        (lambda config: config.judge.answers.append("model.json"), r"two models are named 'model'; write NAME=FILE"),
        (lambda config: config.judge.answers.append("base=x.json"), r"two models are named 'base'; write NAME=FILE"),
        (lambda config: config.judge.answers.append("other=none.json"), r"none.json cannot be read"),
    ],
)
def test_what_is_missing_is_named_before_anything_is_sent(
    config: Config, change: Callable[[Config], None], message: str
) -> None:
    with fake_server(judge) as (url, received):
        change(at(config, url))
        with pytest.raises(ValueError, match=message):
            run_judge(config)
        assert received == []


def test_an_answer_that_is_missing_is_named(config: Config) -> None:
    records = json.loads(Path(config.judge.base).read_text())
    judged_files.write(Path(config.judge.base), records[:-1])
    with pytest.raises(ValueError, match=r"base.json: .*15 answers"):
        run_judge(at(config, "http://127.0.0.1:9/v1"))


def test_answers_come_from_results_of_evaluations_of_larger_suites(config: Config, tmp_path: Path) -> None:
    def result(kind: str, answers: list[str]) -> dict[str, Any]:
        items = [{"id": str(number), "answer": answer} for number, answer in enumerate(answers)]
        return {"type": kind, "settings": {"options": {"name": ""}}, "items": items}

    answers = [f"base {number}" for number in range(NUM)]
    judged_files.write(tmp_path / "base.json", {"benchmarks": [result("pope", ["yes"]), result("mmhal", answers)]})
    with fake_server(judge) as (url, _):
        tree = run_judge(at(config, url))
    assert [item["answer"] for item in tree["models"]["base"]["items"]] == answers


def test_what_needs_no_judge_is_not_sent_and_the_benchmark_may_be_of_a_suite(config: Config, tmp_path: Path) -> None:
    shr, mmhal = (
        {"type": "shr", **judged_files.shr(tmp_path)},
        {"type": "mmhal", "questions": config.evaluation.questions},
    )
    suite = judged_files.write(tmp_path / "suite.yaml", {"benchmarks": [mmhal, shr]})
    config.evaluation = EvaluationConfig(suite=suite)
    config.judge.base = judged_files.write(tmp_path / "base.json", {"3": " . ", "1": "A dog. A cat."})
    config.judge.answers, config.judge.benchmark = [], "shr"
    Path(config.judge.prompt).write_text("{regions}{facts}{sentences}")
    with fake_server(lambda body, number: rated("Judgement:\n1. correct: x\n2. hallucination: y")) as (url, received):
        tree = run_judge(at(config, url))
    assert len(received) == 1
    base = tree["models"]["base"]
    assert [item["replies"] for item in base["items"]][0] == [None]
    assert base["metrics"]["hallucinated_sentences"]["value"] == 0.5 and base["unreadable"] == []
