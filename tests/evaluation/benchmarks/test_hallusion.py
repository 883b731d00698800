"""HallusionBench without a judge: its reading of answers, its three accuracies."""

from __future__ import annotations

import json
import random
import re
from collections import defaultdict
from pathlib import Path
from typing import Any

import pytest

from bpo.evaluation.benchmarks.hallusion import HallusionBenchmark, HallusionOptions, read_yes_no
from bpo.evaluation.intervals import count_units


def record(category: str, set_id: int, figure: int, question: int, label: str, **more: Any) -> dict[str, Any]:
    has_figure = not (category == "VS" and figure == 0)
    return {
        "category": category,
        "subcategory": "chart",
        "visual_input": str(min(figure, 1) + (category == "VD")),
        "set_id": str(set_id),
        "figure_id": str(figure),
        "question_id": str(question),
        "question": f"Question {question}?",
        "gt_answer": label,
        "filename": f"./{category}/chart/{set_id}_{figure}.png" if has_figure else None,
        **more,
    }


def read(folder: Path, records: list[dict[str, Any]], **options: Any) -> HallusionBenchmark:
    (folder / "HallusionBench.json").write_text(json.dumps(records))
    return HallusionBenchmark.read(HallusionOptions(data=str(folder / "HallusionBench.json"), **options))


def figures(subject: HallusionBenchmark, answers: list[str]) -> dict[str, float]:
    sums = count_units(subject.questions, answers, subject.score(answers)).sums()
    return {name: float(value) for name, value in subject.metrics(sums).items()}


@pytest.mark.parametrize(
    "answer, said",
    [
        ("Yes", "yes"),
        ("No, it is not.", "no"),
        ("The answer is YES.", "yes"),
        ("Answer: no", "no"),
        ("It does not.", "unknown"),
        ("Yes or no", "unknown"),
        ("", "unknown"),
        ("yes-no", "unknown"),  # the hyphen becomes a space
        ("- yes-no", "unknown"),  # the hyphen is removed, and "yesno" is neither
        ("yes!but", "yes"),
        ("1,000 -yes-", "yes"),
        ("1,000 people,yes", "unknown"),  # a number with a comma: commas are removed, and "peopleyes" is neither
        ("**Yes**", "unknown"),  # asterisks stay
        ("Yes.There", "unknown"),
        ("no.5", "unknown"),  # a full stop before a digit stays
        ("a. " * 32 + "yes.", "unknown"),  # only 32 full stops are removed
        ("a. " * 31 + "yes.", "yes"),
    ],
)
def test_the_published_reading_of_answers(answer: str, said: str) -> None:
    assert read_yes_no(answer) == said


def test_the_three_accuracies_by_hand(tmp_path: Path) -> None:
    records = [
        record("VD", 0, 0, 0, "1"),
        record("VD", 0, 0, 1, "0"),
        record("VD", 0, 1, 0, "0"),
        record("VD", 0, 1, 1, "0"),
        record("VS", 0, 0, 0, "1"),
        record("VS", 0, 1, 0, "0"),
    ]
    subject = read(tmp_path, records)
    found = figures(subject, ["Yes", "No", "Yes", "No", "I cannot know.", "No"])
    # Wrong: VD figure 1 question 0. The question without a figure may be left open.
    assert found == pytest.approx(
        {
            "a_acc": 5 / 6, "f_acc": 2 / 3, "q_acc": 2 / 3,
            "VD/a_acc": 3 / 4, "VD/f_acc": 1 / 2, "VD/q_acc": 1 / 2,
            "VS/a_acc": 1, "VS/f_acc": 1, "VS/q_acc": 1,
            "unreadable": 1 / 6,
        }
    )  # fmt: skip
    assert figures(subject, 6 * ["Who knows"])["a_acc"] == pytest.approx(1 / 6)
    assert [question.image for question in subject.questions][3:5] == ["VD/chart/0_1.png", ""]
    assert len({question.resampled for question in subject.questions}) == 2
    item = subject.score(["Yes", "No", "Yes", "No", "?", "No"]).items[2]
    assert (item["id"], item["label"], item["read_as"], item["correct"]) == ("VD/chart/0/1/0", "no", "yes", False)


def test_generated_answers_agree_with_the_definition(tmp_path: Path) -> None:
    rng = random.Random(9)
    records = [
        record(category, number, figure, question, rng.choice("01"))
        for category in ("VD", "VS")
        for number in range(20)
        for figure in range(rng.randint(1, 4))
        for question in range(rng.randint(1, 3))
    ]
    answers = [rng.choice(["Yes.", "No.", "No", "yes, or no", "It is."]) for _ in records]
    expected = {}
    for prefix in ("", "VD", "VS"):
        questions, of_figure, of_question = [], defaultdict(list), defaultdict(list)
        for entry, answer in zip(records, answers, strict=True):
            if not entry["category"].startswith(prefix):
                continue
            said = {"Yes.": "1", "No.": "0", "No": "0"}.get(answer, "2")
            blind = entry["category"] == "VS" and entry["figure_id"] == "0"
            right = said == entry["gt_answer"] or (blind and said == "2")
            questions.append(right)
            of_question[entry["category"], entry["set_id"], entry["question_id"]].append(right)
            if not blind:
                of_figure[entry["category"], entry["set_id"], entry["figure_id"]].append(right)
        slash = prefix and prefix + "/"
        expected[f"{slash}a_acc"] = sum(questions) / len(questions)
        expected[f"{slash}f_acc"] = sum(map(all, of_figure.values())) / len(of_figure)
        expected[f"{slash}q_acc"] = sum(map(all, of_question.values())) / len(of_question)
    found = figures(read(tmp_path, records), answers)
    del found["unreadable"]
    assert found == pytest.approx(expected, abs=1e-12)


def test_questions_without_a_figure_can_be_left_out(tmp_path: Path) -> None:
    records = [record("VS", 0, 0, 0, "1"), record("VS", 0, 1, 0, "1")]
    assert [q.id for q in read(tmp_path, records, text_only=False).questions] == ["VS/chart/0/1/0"]


def test_the_answer_file_has_the_records_with_the_prediction(tmp_path: Path) -> None:
    records = [record("VD", 0, 0, 0, "1", gt_answer_details="A line."), record("VS", 0, 0, 0, "1")]
    suffix, content = read(tmp_path, records).answer_file(["Yes", "Nö"])
    assert suffix == ".json"
    expected = [{**entry, "model_prediction": answer} for entry, answer in zip(records, ["Yes", "Nö"], strict=True)]
    assert json.loads(content) == expected


@pytest.mark.parametrize(
    "records, message",
    [
        ([record("VX", 0, 0, 0, "1")], "record 0: category must be VD or VS and gt_answer 0 or 1"),
        ([record("VD", 0, 0, 0, "yes")], "record 0: category must be VD or VS and gt_answer 0 or 1"),
        ([record("VD", 0, 0, 0, "1") | {"set_id": None}], "record 0: field 'set_id' is None"),
        ([record("VD", 0, 0, 0, "1", filename=None)], "record 0: field 'filename' is None"),
        (2 * [record("VD", 0, 0, 0, "1")], "question id 'VD/chart/0/0/0' is used twice"),
        ([], "the file contains no question"),
    ],
)
def test_files_of_another_form_are_refused(tmp_path: Path, records: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read(tmp_path, records)
