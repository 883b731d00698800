"""Calibration over a benchmark: the mean prior of its questions, measured once by all ranks."""

from __future__ import annotations

import threading
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bpo.config.decoding import CalibrationConfig, ContrastConfig, SamplingConfig
from bpo.config.evaluation import EvaluationConfig
from bpo.data.encode import load_encoder
from bpo.evaluation.answer_journal import AnswerJournal
from bpo.evaluation.answers import Request, _mean_priors, answer_requests
from bpo.job.launch import Ranks
from bpo.model.decoding.cost import DecodingCost
from bpo.model.load import load_model
from tests.evaluation.test_grid import config_of

YES_NO = ("Yes", "No")


@pytest.fixture
def loaded(tmp_path: Path, tiny_llava_dir: Path) -> tuple[Any, Any]:
    config = config_of(tmp_path, tiny_llava_dir)
    return load_model(config.model), load_encoder(config)


def options_of(over: str) -> EvaluationConfig:
    return EvaluationConfig(
        decoding="calibration",
        calibration=CalibrationConfig(over=over),  # type: ignore[arg-type]
        contrast=ContrastConfig(views=["none", "noise"]),
        batch_size=2,
    )


def requests(scope: str) -> list[Request]:
    questions = [Request(image=f"{n}.png", text=f"A dog {n}?", max_new_tokens=3, labels=YES_NO) for n in range(4)]
    return [replace(r, scope=scope) for r in (*questions, Request(image="0.png", text="Describe.", max_new_tokens=3))]


def answered(loaded: tuple[Any, Any], options: EvaluationConfig, journal: AnswerJournal) -> tuple[list[str], Any]:
    cost = DecodingCost()
    asked = requests("pope")
    answer_requests(*loaded, asked, journal, options, progress=False, cost=cost)
    return journal.all([request.key for request in asked], 20.0), cost


def test_the_prior_is_the_mean_over_questions_and_views(loaded: tuple[Any, Any]) -> None:
    options, asked = options_of("dataset"), requests("pope")
    journal = AnswerJournal()
    priors = _mean_priors(*loaded, asked, journal, options, progress=False, cost=None)
    ((key, (yes, no)),) = priors.items()
    assert key == ("pope", YES_NO)
    assert yes + no == pytest.approx(1 + 2e-4)
    alone = [
        _mean_priors(*loaded, [request], AnswerJournal(), options, progress=False, cost=None)[key][0]
        for request in asked[:4]
    ]
    assert yes == pytest.approx(sum(alone) / 4, abs=1e-6) and max(alone) - min(alone) > 1e-7
    texts, cost = answered(loaded, options, journal)
    assert set(texts[:4]) <= set(YES_NO) and texts[4] not in YES_NO
    assert (cost.calibrated, cost.uncalibrated) == (4, 1)
    assert "none" not in cost.branches  # the prior was known


def test_ranks_measure_the_prior_together_and_a_restart_measures_nothing(
    loaded: tuple[Any, Any], tmp_path: Path
) -> None:
    options, folder = options_of("dataset"), tmp_path / "journal"
    expected, _ = answered(loaded, options, AnswerJournal())
    found: dict[int, Any] = {}
    lock = threading.Lock()
    model, encoder = loaded

    class OneAtATime:
        """The model, for one thread at a time."""

        def __call__(self, *args: Any, **inputs: Any) -> Any:
            with lock:
                return model(*args, **inputs)

        def __getattr__(self, name: str) -> Any:
            return getattr(model, name)

    def rank(number: int) -> None:
        found[number] = answered((OneAtATime(), encoder), options, AnswerJournal(folder, Ranks(number, 2, 0)))

    threads = [threading.Thread(target=rank, args=(number,)) for number in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found[0][0] == found[1][0] == expected
    assert [found[number][1].branches["none"].prefills for number in range(2)] == [2, 2]
    again, cost = answered(loaded, options, AnswerJournal(folder))
    assert again == expected and not cost.branches


def test_the_prior_of_each_question_needs_no_other(loaded: tuple[Any, Any]) -> None:
    options = options_of("sample")
    texts, cost = answered(loaded, options, AnswerJournal())
    assert cost.branches["none"].prefills == cost.branches["noise"].prefills == 4
    other = replace(options, sampling=SamplingConfig(seed=9))
    assert set(answered(loaded, other, AnswerJournal())[0][:4]) <= set(YES_NO)
    assert texts[4] not in YES_NO
