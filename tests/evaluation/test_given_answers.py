"""Answers from files: each question gets exactly one."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bpo.config.evaluation import EvaluationConfig
from bpo.evaluation.given_answers import read_answers
from bpo.evaluation.results import score_benchmark
from bpo.evaluation.suite import Suite, read_suite
from tests.evaluation.suites import write_files

CHAIR = ["A dog.", "A cat.", "Nothing."]
POPE = ["Yes", "No", "No", "Yes", "Yes", "No"]
POPE_IDS = [f"{split}/{number}" for split in ("random", "popular") for number in range(3)]


@pytest.fixture
def suite(tmp_path: Path) -> Suite:
    return read_suite(EvaluationConfig(suite=str(write_files(tmp_path))))


def only(suite: Suite, number: int) -> Suite:
    return Suite("one", suite.benchmarks[number : number + 1])


def written(folder: Path, content: Any) -> Path:
    path = folder / "answers"
    lines = isinstance(content, tuple)
    path.write_text("\n".join(map(json.dumps, content)) if lines else json.dumps(content))
    return path


@pytest.mark.parametrize(
    ("id_name", "text_name"),
    [
        ("id", "answer"),
        ("question_id", "text"),
        ("image_id", "caption"),
        ("id", "response"),
        ("id", "model_prediction"),
    ],
)
@pytest.mark.parametrize("form", [tuple, list])
def test_records_of_any_order_are_joined_by_id(
    tmp_path: Path, suite: Suite, id_name: str, text_name: str, form: type
) -> None:
    ids = [0, "1", 2]
    records = [{id_name: id, text_name: text, "further": [1]} for id, text in zip(ids, CHAIR, strict=True)]
    assert read_answers(written(tmp_path, form(records[::-1])), only(suite, 0)) == [CHAIR]


def test_an_object_of_texts_by_id(tmp_path: Path, suite: Suite) -> None:
    assert read_answers(written(tmp_path, dict(zip("012", CHAIR, strict=True))), only(suite, 0)) == [CHAIR]


def test_a_record_that_also_holds_its_question(tmp_path: Path, suite: Suite) -> None:
    records = [{"question_id": id, "text": "A dog?", "answer": text} for id, text in zip(POPE_IDS, POPE, strict=True)]
    assert read_answers(written(tmp_path, records), only(suite, 1)) == [POPE]


@pytest.mark.parametrize("number", [0, 1])
def test_the_official_answer_file_is_read_back(tmp_path: Path, suite: Suite, number: int) -> None:
    (benchmark,), answers = only(suite, number).benchmarks, (CHAIR, POPE)[number]
    official = benchmark.answer_file(answers)
    assert official is not None
    (tmp_path / "answers").write_text(official[1])
    assert read_answers(tmp_path / "answers", only(suite, number)) == [answers]


def test_the_official_answer_file_of_a_single_question(tmp_path: Path) -> None:
    write_files(tmp_path)
    path = tmp_path / "pope_random.json"
    path.write_text(path.read_text().splitlines()[0])
    suite = read_suite(EvaluationConfig(questions=str(path), format="pope"))
    assert read_answers(written(tmp_path, ({"question": "A dog?", "answer": "Yes"},)), suite) == [["Yes"]]


def test_records_without_ids_must_have_the_order_of_the_questions(tmp_path: Path, suite: Suite) -> None:
    records = [{"question": "A dog?", "answer": text} for text in POPE]
    assert read_answers(written(tmp_path, tuple(records)), only(suite, 1)) == [POPE]
    with pytest.raises(ValueError, match="5 answers without a known id for 6 questions of pope; add the field `id`"):
        read_answers(written(tmp_path, tuple(records[1:])), only(suite, 1))
    records[4]["question"] = "A cat?"
    with pytest.raises(ValueError, match="line 5: question is 'A cat\\?', but the question at this place has 'A dog"):
        read_answers(written(tmp_path, tuple(records)), only(suite, 1))


def test_a_file_may_answer_several_benchmarks(tmp_path: Path, suite: Suite) -> None:
    named = [{"benchmark": "chair", "id": id, "answer": text} for id, text in zip("012", CHAIR, strict=True)]
    unnamed = [{"id": id, "answer": text} for id, text in zip(POPE_IDS, POPE, strict=True)]
    assert read_answers(written(tmp_path, [*unnamed, *named]), suite) == [CHAIR, POPE]
    results = [score_benchmark(*pair) for pair in zip(suite.benchmarks, (CHAIR, POPE), strict=True)]
    assert read_answers(written(tmp_path, {"benchmarks": [r.to_json() for r in results]}), suite) == [CHAIR, POPE]
    with pytest.raises(ValueError, match="the benchmark 'char' is not in the suite; .* one of chair, pope"):
        read_answers(written(tmp_path, [{**named[0], "benchmark": "char"}]), suite)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda records: records[:1], r"2 of 3 questions of chair have no answer, such as '1', '2'"),
        (lambda records: [*records, records[1]], "record 3: question '1' has a second answer; keep one"),
        (lambda records: [*records, {"id": 7, "answer": ""}], r"record 3: chair has no question '7' \(1 such"),
        (lambda records: [{"id": 0}, *records[1:]], "record 0: the record has no text among answer"),
        (lambda records: [{**records[0], "caption": "x"}], "record 0: the record has the answers answer, caption"),
        (lambda records: ["a"], "record 0: a record is 'a'; write an object"),
    ],
)
def test_what_is_missing_or_too_much_is_named(tmp_path: Path, suite: Suite, change: Any, message: str) -> None:
    records = [{"id": id, "answer": text} for id, text in zip("012", CHAIR, strict=True)]
    with pytest.raises(ValueError, match=message):
        read_answers(written(tmp_path, change(records)), only(suite, 0))


def test_a_missing_file_is_named(tmp_path: Path, suite: Suite) -> None:
    with pytest.raises(ValueError, match=r"evaluation.answers: .*gone.json cannot be read"):
        read_answers(tmp_path / "gone.json", suite)
