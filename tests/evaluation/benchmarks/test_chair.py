"""CHAIR's figures on cases made by hand; mentions are tested with the lexicon."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import pytest

from bpo.evaluation.benchmark import Benchmark
from bpo.evaluation.benchmarks.chair import ChairBenchmark, ChairOptions
from bpo.evaluation.intervals import count_units

NAMES = {1: "dog", 2: "cat", 3: "bus", 4: "bowl", 5: "tie", 6: "chair"}
PRESENT: dict[int, tuple[int, ...]] = {7: (1, 2, 3), 8: (4,), 9: (5,)}


def benchmark(folder: Path, present: dict[int, tuple[int, ...]] = PRESENT, **options: Any) -> ChairBenchmark:
    instances = {
        "images": [{"id": image, "file_name": f"{image}.jpg"} for image in present],
        "annotations": [{"image_id": i, "category_id": c} for i, categories in present.items() for c in categories],
        "categories": [{"id": key, "name": name} for key, name in NAMES.items()],
    }
    (folder / "instances.json").write_text(json.dumps(instances))
    return ChairBenchmark.read(ChairOptions(instances=str(folder / "instances.json"), **options))


def metrics(subject: Benchmark, answers: Sequence[str]) -> dict[str, float]:
    sums = count_units(subject.questions, answers, subject.score(answers)).sums()
    return {name: float(value) for name, value in subject.metrics(sums).items()}


def test_the_three_figures_by_hand(tmp_path: Path) -> None:
    subject = benchmark(tmp_path)
    answers = [
        "A dog, two dogs, a chair, a chair and a cat.",  # 5 mentions, 2 hallucinated, 2 of 3 present named
        "A bowl.",  # 1 mention, 1 of 1
        "Something blue.",  # none, 0 of 1
    ]
    assert metrics(subject, answers) == pytest.approx({"chair_i": 2 / 6, "chair_s": 1 / 3, "recall": 3 / 5})
    first = subject.score(answers).items[0]
    assert first["hallucinated"] == ["chair", "chair"] and first["missing"] == ["bus"]
    assert first["present"] == ["bus", "cat", "dog"]
    spans = [answers[0][mention["start"] : mention["end"]] for mention in first["mentions"]]
    assert spans == ["dog", "dogs", "chair", "chair", "cat"]
    assert (first["id"], first["image"], first["answer"]) == ("7", "7.jpg", answers[0])


def test_nothing_named_gives_zero_and_a_warning(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert metrics(benchmark(tmp_path), ["", "Nothing.", "Blue."]) == {"chair_i": 0, "chair_s": 0, "recall": 0}
    assert "no description names any object" in caplog.text


def test_captions_and_synonyms_count(tmp_path: Path) -> None:
    (tmp_path / "captions.json").write_text(json.dumps({"annotations": [{"image_id": 8, "caption": "A stool."}]}))
    (tmp_path / "synonyms.txt").write_text("dog, puppy\ncat\nbus\nbowl\ntie\nchair, stool\n")
    files = {name: str(tmp_path / f"{name}.{end}") for name, end in (("captions", "json"), ("synonyms", "txt"))}
    subject = benchmark(tmp_path, **files)
    assert metrics(subject, ["A puppy.", "A chair.", "A tie."]) == pytest.approx(
        {"chair_i": 0, "chair_s": 0, "recall": 3 / 6}
    )
    assert subject.files == (str(tmp_path / "instances.json"), *files.values())


def test_questions_are_the_prompt_of_the_literature_or_ones_own(tmp_path: Path) -> None:
    assert benchmark(tmp_path).questions[0].text == "Please describe this image in detail."
    own = benchmark(tmp_path, prompt="What is there?", suffix="Be brief.")
    assert [(q.id, q.text) for q in own.questions][1] == ("8", "What is there? Be brief.")


def test_fewer_images_keep_their_truth(tmp_path: Path) -> None:
    subject = benchmark(tmp_path).restricted(["8.jpg"])
    assert metrics(subject, ["A bowl and a dog."]) == pytest.approx({"chair_i": 0.5, "chair_s": 1, "recall": 1})


def test_the_answer_file_has_ids_of_the_instances(tmp_path: Path) -> None:
    suffix, content = benchmark(tmp_path).answer_file(["a\nb", "ü", ""])
    assert suffix == ".jsonl"
    lines = [json.loads(line) for line in content.splitlines()]
    assert lines[0] == {"image_id": 7, "caption": "a\nb"} and lines[1]["caption"] == "ü"


def test_without_instances_it_is_refused() -> None:
    with pytest.raises(ValueError, match="'chair': option 'instances' is empty"):
        ChairBenchmark.read(ChairOptions())
