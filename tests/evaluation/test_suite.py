"""Suites: what they give, and what their errors say."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from bpo.config.evaluation import EvaluationConfig
from bpo.evaluation.suite import Suite, make_benchmark, read_suite
from tests.evaluation.suites import SUITE, write_files


def read(folder: Path, text: str = "", **options: object) -> Suite:
    path = write_files(folder)
    if text:
        path.write_text(text)
    return read_suite(EvaluationConfig(suite=str(path), **options))  # type: ignore[arg-type]


def test_defaults_hold_where_an_entry_says_nothing_else(tmp_path: Path) -> None:
    text = SUITE.replace("defaults: {max_new_tokens: 3}", "defaults: {max_new_tokens: 3, suffix: Briefly.}")
    suite = read(tmp_path, text.replace("  - type: pope", "  - type: pope\n    suffix: One word.\n    name: short"))
    chair, pope = suite.benchmarks
    assert (suite.name, chair.name, pope.name, chair.answer_length) == ("both", "chair", "short", 3)
    assert chair.questions[0].text.endswith("in detail. Briefly.") and pope.questions[0].text == "A dog? One word."


def test_a_file_is_that_of_the_current_directory_or_else_the_one_beside_the_suite(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    here = tmp_path / "here"
    here.mkdir()
    monkeypatch.chdir(here)
    assert len(read(tmp_path).benchmarks[1].questions) == 6
    (here / "pope_random.json").write_text(json.dumps({"question_id": 9, "image": "a.png", "text": "?", "label": "no"}))
    assert len(read(tmp_path).benchmarks[1].questions) == 4


@pytest.mark.parametrize(
    ("old", "new", "message"),
    [
        ("type: pope", "type: pop", r"suite.yaml, line 6: unknown type 'pop'; did you mean `pope`"),
        ("type: pope", "kind: pope", r"suite.yaml, line 6: unknown type None"),
        (
            "instances:",
            "instance:",
            r"suite.yaml, line 5: unknown option `instance` of chair; did you mean `instances`",
        ),
        ("[pope_random.json, pope_popular.json]", "12", r"suite.yaml, line 7: questions is 12: .*"),
        (
            "  - type: chair",
            "  - type: chair\n    sample: -1",
            r"line 5: suite.sample is -1; it must be 0",
        ),
        ("instances.json", "gone.json", r"line 4: gone.json cannot be read"),
        (
            "  - type: chair",
            "  - type: pope\n    questions: [pope_random.json]\n  - type: chair",
            "line 8: .* same name",
        ),
        ("{max_new_tokens: 3}", "{name: x}", r"`defaults` is \{'name': 'x'\}; it may set .*max_new_tokens"),
        ("benchmarks:", "benchmark:", r"unknown key `benchmark`; did you mean `benchmarks`"),
        ("name: both", "name: both\nname: one", r"line 2: `name` occurs twice"),
        ("  - type: chair\n    instances: instances.json\n", "  - chair\n", r"line 4: a benchmark is 'chair'; write a"),
    ],
)
def test_a_mistake_is_named_with_its_line_and_fix(tmp_path: Path, old: str, new: str, message: str) -> None:
    assert old in SUITE
    with pytest.raises(ValueError, match=message):
        read(tmp_path, SUITE.replace(old, new, 1))


def test_the_evaluation_s_sample_applies_to_benchmarks_without_their_own(tmp_path: Path) -> None:
    text = SUITE.replace("  - type: chair", "  - type: chair\n    sample: 1")
    chair, pope = read(tmp_path, text, sample=2).benchmarks
    assert (len(chair.images), len(pope.images)) == (1, 2)
    assert set(chair.images) < set(pope.images)


def test_a_list_of_images_restricts_all_benchmarks(tmp_path: Path) -> None:
    (tmp_path / "list.txt").write_text("c.png\nelsewhere.png\n\n")
    assert read(tmp_path, images=str(tmp_path / "list.txt")).images == ("c.png",)
    with pytest.raises(
        ValueError, match=r"list.txt: 1 lines are no images of chair, such as line 2 \('elsewhere.png'\)"
    ):
        read(tmp_path, SUITE.replace("  - type: chair", "  - type: chair\n    images: list.txt"))


def test_one_question_file_is_a_suite_of_its_format(tmp_path: Path) -> None:
    write_files(tmp_path)
    pope, chair = (
        read_suite(EvaluationConfig(questions=str(tmp_path / file), format=kind)).benchmarks[0]
        for file, kind in (("pope_random.json", "pope"), ("instances.json", "chair"))
    )
    assert (pope.name, len(pope.questions), pope.answer_length) == ("pope", 3, 128)
    assert (chair.name, len(chair.questions)) == ("chair", 3)
    with pytest.raises(ValueError, match="evaluation.format: unknown type 'pop'; did you mean `pope`"):
        read_suite(EvaluationConfig(questions="q.json", format="pop"))
    with pytest.raises(ValueError, match="belong together"):
        read_suite(EvaluationConfig(questions="q.json"))


def test_a_benchmark_by_itself(tmp_path: Path) -> None:
    write_files(tmp_path)
    assert len(make_benchmark({"type": "chair", "instances": str(tmp_path / "instances.json")}).questions) == 3
    with pytest.raises(ValueError, match="guard: unknown option"):
        make_benchmark({"type": "chair", "instanc": "x"}, where="guard")
