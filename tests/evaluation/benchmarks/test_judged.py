"""Official answer files of judged benchmarks."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bpo.evaluation.benchmarks.registry import BENCHMARKS
from tests.evaluation.benchmarks import judged_files


def test_mmhal_adds_the_answers_to_its_records(tmp_path: Path) -> None:
    path = judged_files.mmhal(tmp_path)
    kind = BENCHMARKS["mmhal"]
    benchmark = kind.read(kind.Options(type="mmhal", questions=path))  # type: ignore[call-arg]
    assert [q.image for q in benchmark.questions[:2]] == ["00.jpg", "01.jpg"]
    assert benchmark.questions[3].text == "What is at 3?"
    found = benchmark.answer_file([f"Answer {n} é" for n in range(16)])
    assert found is not None
    assert found[0] == ".json"
    expected = [{**r, "model_answer": f"Answer {n} é"} for n, r in enumerate(json.loads(Path(path).read_text()))]
    assert json.loads(found[1]) == expected and list(json.loads(found[1])[0]) == list(expected[0])


def test_mmvet_gives_answers_by_id(tmp_path: Path) -> None:
    kind = BENCHMARKS["mmvet"]
    benchmark = kind.read(kind.Options(type="mmvet", questions=judged_files.mmvet(tmp_path)))  # type: ignore[call-arg]
    assert [(q.id, q.image, q.text) for q in benchmark.questions][0] == ("v1_0", "v1_0.png", "x?")
    found = benchmark.answer_file(["a", 'b "quoted"', ""])
    assert found == (".json", '{\n    "v1_0": "a",\n    "v1_1": "b \\"quoted\\"",\n    "v1_2": ""\n}')


def test_llava_bench_writes_lines_as_llava_does(tmp_path: Path) -> None:
    kind = BENCHMARKS["llava_bench"]
    options = kind.Options(type="llava_bench", **judged_files.llava_bench(tmp_path))
    benchmark = kind.read(options)
    suffix, content = benchmark.answer_file(["a", "b", "c\nd", "e"]) or ("", "")
    lines = [json.loads(line) for line in content.splitlines()]
    assert suffix == ".jsonl" and len(lines) == 4
    assert list(lines[2]) == ["question_id", "prompt", "text", "answer_id", "model_id", "metadata"]
    assert (lines[2]["question_id"], lines[2]["prompt"], lines[2]["text"]) == (2, "Question 2", "c\nd")
    assert len({line["answer_id"] for line in lines}) == 4 and lines[0]["metadata"] == {}
    assert benchmark.answer_file(["a", "b", "c\nd", "e"]) == (suffix, content)


def test_without_a_judge_there_are_no_metrics(tmp_path: Path) -> None:
    kind = BENCHMARKS["mmvet"]
    benchmark = kind.read(kind.Options(type="mmvet", questions=judged_files.mmvet(tmp_path)))  # type: ignore[call-arg]
    scores = benchmark.score(["a", "b", "c"])
    assert scores.rows == ()
    assert scores.items[1] == {"id": "v1_1", "image": "v1_1.jpg", "question": "Who?", "answer": "b"}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("mmhal", '[{"image_src": "a/b.jpg"}]', r"q.json, record 0: field 'question' is None"),
        ("mmhal", '[{"question": "x"}]', r"q.json, record 0: field 'image_src' is None"),
        ("mmhal", "[]", r"q.json: the file contains no question"),
        ("mmvet", '{"v1_0": "text"}', r"q.json: expected a JSON object of objects"),
        ("mmvet", '{"v1_0": {"question": "x"}}', r"q.json, 'v1_0': field 'imagename'"),
        ("llava_bench", '{"question_id": 0, "image": "a", "text": "b"}', r"q.json, line 1: field 'category'"),
        ("llava_bench", '{"image": "a", "text": "b"}', r"q.json, line 1: field 'question_id'"),
    ],
)
def test_a_wrong_question_file_is_named(tmp_path: Path, name: str, content: str, message: str) -> None:
    path = tmp_path / "q.json"
    path.write_text(content)
    kind = BENCHMARKS[name]
    with pytest.raises(ValueError, match=message):
        kind.read(kind.Options(type=name, questions=str(path)))  # type: ignore[call-arg]


def test_a_missing_question_file_is_named(tmp_path: Path) -> None:
    for name in ("mmhal", "mmvet", "llava_bench"):
        kind = BENCHMARKS[name]
        with pytest.raises(ValueError, match=f"benchmark '{name}': option 'questions' is empty"):
            kind.read(kind.Options(type=name))
        with pytest.raises(ValueError, match=r"none.json cannot be read"):
            kind.read(kind.Options(type=name, questions=str(tmp_path / "none.json")))  # type: ignore[call-arg]
