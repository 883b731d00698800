"""Answers on disk: ranks share the questions, no answer is lost."""

from __future__ import annotations

import json
import os
import signal
import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bpo.config.training import Config, DataConfig, EvaluationConfig, ModelConfig
from bpo.evaluation.answer_journal import AnswerJournal
from bpo.evaluation.answers import Request, answer_requests, batches_of
from bpo.evaluation.benchmark import YES_NO
from bpo.evaluation.run import run_evaluation
from bpo.job.exits import Interrupted
from bpo.job.launch import Ranks
from bpo.job.restarts import NoProgressError
from bpo.job.signals import StopRequest
from bpo.model.decoding import answer


@pytest.fixture
def config(tmp_path: Path, tiny_llava_dir: Path) -> Config:
    """Five images to describe and five questions about them, two of them twice, in batches of two: five batches."""
    names = [f"{number}.png" for number in range(5)]
    for number, name in enumerate(names):
        Image.new("RGB", (40, 30), (50 * number, 90, 40)).save(tmp_path / name)
    images = [{"id": number, "file_name": name} for number, name in enumerate(names)]
    instances = {"images": images, "annotations": [], "categories": [{"id": 1, "name": "dog"}]}
    (tmp_path / "instances.json").write_text(json.dumps(instances))
    questions = [{"question_id": n, "image": name, "text": "A dog?", "label": "no"} for n, name in enumerate(names)]
    (tmp_path / "pope_random.json").write_text("\n".join(map(json.dumps, questions)))
    (tmp_path / "pope_popular.json").write_text("\n".join(map(json.dumps, questions[:2])))
    return Config(
        model=ModelConfig(path=str(tiny_llava_dir), dtype="float32"),
        data=DataConfig(image_root=str(tmp_path)),
        evaluation=EvaluationConfig(
            output=str(tmp_path / "results.json"),
            chair_instances=str(tmp_path / "instances.json"),
            pope_questions=[str(tmp_path / f"pope_{split}.json") for split in ("random", "popular")],
            max_new_tokens=3,
            batch_size=2,
        ),
    )


@pytest.fixture
def batches(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many answers each call of the model gives."""
    given: list[int] = []
    real = answer.answer_prompts

    def counted(model: Any, encoder: Any, prompts: Any, **options: Any) -> list[str]:
        given.append(len(prompts))
        return real(model, encoder, prompts, **options)

    monkeypatch.setattr(answer, "answer_prompts", counted)
    return given


def signal_in_batch(monkeypatch: pytest.MonkeyPatch, number: int) -> None:
    put, calls = AnswerJournal.put, []

    def put_and_signal(self: AnswerJournal, *arguments: Any) -> None:
        put(self, *arguments)
        calls.append(1)
        if len(calls) == number:
            os.kill(os.getpid(), signal.SIGUSR2)

    monkeypatch.setattr(AnswerJournal, "put", put_and_signal)


def results(config: Config) -> dict[str, Any]:
    tree = json.loads(Path(config.evaluation.output).read_text())
    return {name: tree[name] for name in ("metrics", "benchmarks")}


def folder(config: Config) -> Path:
    return Path(config.evaluation.output + ".answers")


def test_a_signal_ends_the_batch_and_a_restart_answers_only_the_rest(
    config: Config, batches: list[int], monkeypatch: pytest.MonkeyPatch
) -> None:
    run_evaluation(config, progress=False)
    whole = results(config)
    Path(config.evaluation.output).unlink()
    batches.clear()
    signal_in_batch(monkeypatch, 4)
    with StopRequest() as stop, pytest.raises(Interrupted, match="8 answers are kept"):
        run_evaluation(config, progress=False, stop=stop)
    assert batches == [2, 2, 2, 2] and not Path(config.evaluation.output).exists()
    batches.clear()
    run_evaluation(config, progress=False)
    assert batches == [2]
    assert results(config) == whole and not folder(config).exists()


def test_a_killed_job_asks_again_what_a_torn_line_held(config: Config, batches: list[int]) -> None:
    run_evaluation(config, progress=False)
    whole = results(config)

    class Killed(BaseException):
        pass

    class KillAtThird(StopRequest):
        checks = 0

        def check(self, what: str) -> None:
            self.checks += 1
            if self.checks == 3:
                raise Killed

    with KillAtThird() as stop, pytest.raises(Killed):
        run_evaluation(config, progress=False, stop=stop)
    (part,) = folder(config).rglob("rank-*.jsonl")
    part.write_bytes(part.read_bytes()[:-3])
    batches.clear()
    run_evaluation(config, progress=False)
    assert batches == [2, 2, 2, 2]  # the second batch, whose last answer is torn, and the unasked questions
    assert results(config) == whole


def test_a_torn_line_takes_no_later_answer_with_it(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    AnswerJournal(tmp_path).put({"a": "yes", "b": "no"})
    (part,) = tmp_path.glob("rank-*.jsonl")
    part.write_bytes(part.read_bytes()[:-3])
    AnswerJournal(tmp_path).put({"b": "no \u00e9", "c": "perhaps"})
    journal = AnswerJournal(tmp_path)
    assert journal.all(["a", "b", "c", "a"], 0.0) == ["yes", "no \u00e9", "perhaps", "yes"]
    assert "cut short" in caplog.text


@pytest.mark.parametrize("changed", ["prompt", "image"])
def test_answers_to_another_prompt_or_image_are_in_another_folder(config: Config, changed: str) -> None:
    with StopRequest() as stop, pytest.raises(Interrupted):
        stop.received = True
        run_evaluation(config, progress=False, stop=stop)
    first = {path.name for path in folder(config).iterdir()}
    if changed == "prompt":
        config.evaluation.chair_prompt = "What is there?"
    else:
        os.utime(next(Path(config.data.image_root).rglob("*.png")), (1, 1))
    with StopRequest() as stop, pytest.raises(Interrupted):
        stop.received = True
        run_evaluation(config, progress=False, stop=stop)
    assert len({path.name for path in folder(config).iterdir()} - first) == 1


@pytest.mark.parametrize("shared_by", ["ranks", "shards"])
def test_ranks_and_shards_share_the_questions(
    config: Config, batches: list[int], monkeypatch: pytest.MonkeyPatch, shared_by: str
) -> None:
    run_evaluation(config, progress=False)
    whole = results(config)
    ranks, other_config = threading.local(), config
    if shared_by == "ranks":
        monkeypatch.setattr("bpo.evaluation.run.ranks_from_environment", lambda: Ranks(getattr(ranks, "rank", 0), 2, 0))
    else:
        config.evaluation.num_shards = 2
        other_config = replace(config, evaluation=replace(config.evaluation, shard_index=1))
    batches.clear()
    other = threading.Timer(1.0, lambda: (setattr(ranks, "rank", 1), run_evaluation(other_config, progress=False)))
    other.start()
    run_evaluation(config, progress=False)
    other.join()
    assert batches == [2] * 5  # five batches, none twice
    assert results(config) == whole and not folder(config).exists()


def test_rank_0_gives_up_when_the_others_are_gone(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    config.evaluation.stall_timeout_s = 0.2
    with pytest.raises(TimeoutError, match="2 of 5 answers are missing.*evaluation.stall_timeout_s"):
        run_evaluation(config, progress=False)


def test_restarts_that_add_no_answer_come_to_an_end(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    def start(restarts: int) -> None:
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        with StopRequest() as stop:
            stop.received = True
            run_evaluation(config, progress=False, stop=stop)

    for restarts in range(4):
        with pytest.raises(Interrupted):
            start(restarts)
    with pytest.raises(NoProgressError, match="3 restarts since answer 0.*evaluation.max_idle_restarts"):
        start(4)


def test_nothing_is_decoded_when_all_is_answered() -> None:
    request = Request(image="gone.png", text="?", max_new_tokens=1)
    journal = AnswerJournal()
    journal.put({request.key: "yes"})
    answer_requests(None, None, [request] * 2, journal, EvaluationConfig())
    assert journal.all([request.key] * 2, 0.0) == ["yes", "yes"]


def test_requests_that_differ_in_anything_have_keys_of_their_own() -> None:
    request = Request(image="a.png", text="?", max_new_tokens=1)
    changes: list[dict[str, Any]] = [{"image": ""}, {"text": ""}, {"max_new_tokens": 2}, {"labels": YES_NO}]
    keys = {replace(request, **change).key for change in ({}, *changes, {"scope": "pope"})}
    assert len(keys) == 6


def test_batches_are_of_one_length_and_hold_each_request_once() -> None:
    short, long = ([Request(image=f"{n}", text="?", max_new_tokens=length) for n in range(3)] for length in (1, 2))
    batches = batches_of([*short, *short[:2], *long], 2)
    assert batches == [short[:2], short[2:], long[:2], long[2:]]
