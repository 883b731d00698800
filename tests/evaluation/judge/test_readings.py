"""HallusionBench and Object HalBench with a judge as reader: their own metrics over its verdicts."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bpo.evaluation.benchmarks.hallusion import HallusionBenchmark, HallusionOptions
from bpo.evaluation.benchmarks.objhal import ObjectHalBenchmark, ObjectHalOptions
from bpo.evaluation.judge.readings import HallusionRule, ObjectHalRule
from tests.evaluation.benchmarks import judged_files
from tests.evaluation.judge.test_ratings import metrics_of


def hallusion(folder: Path) -> HallusionBenchmark:
    """VD: two questions, about two figures each. VS: one question without and with a figure."""
    records = []
    for category, figure, number in (
        *(("VD", figure, number) for figure in (0, 1) for number in (0, 1)),
        ("VS", 0, 0),
        ("VS", 1, 0),
    ):
        records.append(
            {
                "category": category,
                "subcategory": "map",
                "set_id": "0",
                "figure_id": str(figure),
                "question_id": str(number),
                "visual_input": str(int(category == "VD" or figure > 0)),
                "filename": f"./hallusion_bench/{category}/map/0_{figure}.png",
                "question": f"Question {category} {number} about {figure}?",
                "gt_answer": str((figure + number) % 2),
                "gt_answer_details": f"Details {figure}.",
            }
        )
    path = judged_files.write(folder / "HallusionBench.json", records)
    return HallusionBenchmark.read(HallusionOptions(data=path))


@pytest.mark.parametrize(
    ("reply", "verdict"),
    [("Correct.", "correct"), ("incorrect", "incorrect"), ("It is UNCLEAR", "unclear"), ("Hm", None), ("", None)],
)
def test_hallusion_replies(tmp_path: Path, reply: str, verdict: str | None) -> None:
    benchmark = hallusion(tmp_path)
    rule = HallusionRule(benchmark)
    assert rule.read(benchmark.questions[0], "", reply) == verdict
    assert rule.fields(benchmark.questions[2], "Yes.") == {
        "question": "Question VD 0 about 1?",
        "answer": "Yes.",
        "reference": "Details 1.",
    }


def test_hallusion_metrics_follow_the_verdicts(tmp_path: Path) -> None:
    benchmark = hallusion(tmp_path)
    replies = ["correct", "incorrect", "correct", "correct", "unclear", "incorrect"]
    found = metrics_of(HallusionRule(benchmark), benchmark, replies)
    assert found["VD/a_acc"] == 3 / 4 and found["VD/f_acc"] == 1 / 2 and found["VD/q_acc"] == 1 / 2
    assert found["VS/a_acc"] == 1 / 2  # unclear is right without a figure
    assert found["a_acc"] == 4 / 6 and found["f_acc"] == 1 / 3 and found["q_acc"] == 1 / 3
    assert found["unclear"] == 1 / 6 and "unreadable" not in found
    assert metrics_of(HallusionRule(benchmark), benchmark, ["correct"] * 6)["q_acc"] == 1


def objhal(folder: Path) -> ObjectHalBenchmark:
    coco: dict[str, Any] = {
        "images": [{"id": n, "file_name": f"{n}.jpg"} for n in (1, 2)],
        "categories": [{"id": 1, "name": "dog"}, {"id": 2, "name": "dining table"}, {"id": 3, "name": "person"}],
        "annotations": [{"image_id": 1, "category_id": 1}, {"image_id": 2, "category_id": 2}],
    }
    synonyms = folder / "synonyms.txt"
    synonyms.write_text("dog, puppy\ndining table, table\nperson, man, woman\n")
    options = ObjectHalOptions(
        questions=judged_files.write(
            folder / "q.jsonl", [{"image_id": n, "question": f"Describe {n}."} for n in (1, 2)]
        ),
        instances=judged_files.write(folder / "instances.json", coco),
        synonyms=str(synonyms),
    )
    return ObjectHalBenchmark.read(options)


ANSWER = "There are two dogs and a man at a table."


@pytest.mark.parametrize(
    ("reply", "names"),
    [
        ('Objects:\n```json\n["dog", "man"]\n```\nDone.', ["dog", "man"]),
        ('Here: none yet\n["dog"]', ["dog"]),
        ("```json\n[]\n```", []),
        ("[]", []),
        ("dog, man", None),
        ('["dog"', None),
        ("[1]", None),
        ('{"a": ["dog"]}', None),
        ("", None),
    ],
)
def test_objhal_replies(tmp_path: Path, reply: str, names: list[str] | None) -> None:
    benchmark = objhal(tmp_path)
    rule = ObjectHalRule(benchmark)
    assert rule.read(benchmark.questions[0], ANSWER, reply) == names
    assert rule.fields(benchmark.questions[1], ANSWER) == {"question": "Describe 2.", "answer": ANSWER}


def test_objhal_counts_each_object_once_and_leaves_unreadable_replies_out(tmp_path: Path) -> None:
    benchmark = objhal(tmp_path)
    rule = ObjectHalRule(benchmark)
    rows = rule.rows(benchmark.questions, [ANSWER, ANSWER], [["dogs", "a dog", "puppy", "man", "woman", "sky"], None])
    assert rows[0][1] == {
        "descriptions": 1,
        "with_hallucination": True,
        "mentions": 4,  # dog, puppy, man, woman
        "hallucinated": 2,
        "present": 1,
        "named": 1,
        "naming": 1,
    }
    assert rows[1][1] == {}
    sums = {name: float(value) for name, value in rows[0][1].items()}
    assert sums["hallucinated"] / sums["mentions"] == 0.5


def test_objhal_asks_nothing_about_short_answers(tmp_path: Path) -> None:
    benchmark = objhal(tmp_path)
    rule = ObjectHalRule(benchmark)
    assert rule.settled("A dog.") and not rule.settled(ANSWER)
    assert rule.read(benchmark.questions[0], "A dog.", "") == []


def test_objhal_metrics(tmp_path: Path) -> None:
    benchmark = objhal(tmp_path)

    class AnyLength(ObjectHalRule):
        def settled(self, answer: str) -> bool:
            return False

    found = metrics_of(AnyLength(benchmark), benchmark, ['["dog", "man"]', '["cloud"]'])
    assert found == {"chair_s_refine": 1, "chair_i": 0.5, "chair_s": 0.5, "recall": 0.5}
