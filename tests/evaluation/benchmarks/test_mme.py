"""MME's hallucination subset: its forms of files, its reading of answers, its scores."""

from __future__ import annotations

import json
import random
import re
from pathlib import Path

import pytest

from bpo.evaluation.benchmarks.mme import TASKS, MmeBenchmark, MmeOptions, read_yes_no
from bpo.evaluation.intervals import count_units

QUESTIONS = (("Is there a dog? Please answer yes or no.", "Yes"), ("Is there a cat? Please answer yes or no.", "No"))


def read(path: Path) -> MmeBenchmark:
    return MmeBenchmark.read(MmeOptions(data=str(path)))


def records(num_images: int = 2, tasks: tuple[str, ...] = TASKS) -> list[dict[str, str]]:
    return [
        {"category": task, "image": f"{number}.jpg", "question": question, "answer": answer}
        for task in tasks
        for number in range(num_images)
        for question, answer in QUESTIONS
    ]


def jsonl(folder: Path, entries: list[dict[str, str]]) -> Path:
    path = folder / "mme.jsonl"
    path.write_text("".join(json.dumps(entry) + "\n" for entry in entries))
    return path


def figures(subject: MmeBenchmark, answers: list[str]) -> dict[str, float]:
    sums = count_units(subject.questions, answers, subject.score(answers)).sums()
    return {name: float(value) for name, value in subject.metrics(sums).items()}


@pytest.mark.parametrize(
    "answer, said",
    [
        ("Yes", "yes"),
        ("NO.", "no"),
        (" Yes, it is", "yes"),
        ("(no)", "no"),
        ("Not at all", "no"),
        ("I do not", "other"),
        ("  yes", "other"),  # its first four characters end before the s
        ("", "other"),
        ("The answer is yes", "other"),
    ],
)
def test_the_published_reading_of_answers(answer: str, said: str) -> None:
    assert read_yes_no(answer) == said


def test_the_scores_by_hand(tmp_path: Path) -> None:
    subject = read(jsonl(tmp_path, records()))
    # existence all right; count with one question wrong; position unreadable; color always yes
    answers = ["Yes", "No", "Yes", "No", "Yes", "No", "Yes", "Yes", *4 * [""], *4 * ["yes"]]
    found = figures(subject, answers)
    assert (found["existence/score"], found["count/score"], found["color/score"]) == (200, 75 + 50, 50 + 0)
    assert found["position/score"] == 0 and found["total"] == 375
    assert found["count/accuracy"] == 0.75 and found["count/accuracy_plus"] == 0.5
    assert found["unreadable"] == 4 / 16
    assert set(subject.not_fractions) <= set(found)


def test_generated_answers_agree_with_the_definition(tmp_path: Path) -> None:
    rng = random.Random(2)
    entries = records(num_images=60)
    answers = [rng.choice(["Yes", "No", "yes.", "No, none", "Maybe", "Now", ""]) for _ in entries]
    total = 0.0
    for task in TASKS:
        of_task = [(e, a) for e, a in zip(entries, answers, strict=True) if e["category"] == task]
        correct = []
        for entry, answer in of_task:
            start = answer.lower()[:4]
            said = "Yes" if "yes" in start else "No" if "no" in start else ""
            correct.append(said == entry["answer"])
        both = [correct[i] and correct[i + 1] for i in range(0, len(correct), 2)]
        total += 100 * sum(correct) / len(correct) + 100 * sum(both) / len(both)
    assert figures(read(jsonl(tmp_path, entries)), answers)["total"] == pytest.approx(total, abs=1e-9)


def test_all_forms_of_files_give_the_same_questions(tmp_path: Path) -> None:
    entries = records()
    table = tmp_path / "mme.tsv"
    rows = [("index", "category", "image_path", "question", "answer")]
    other = ("9", "posters", "p.jpg", "Is this Titanic?", "Yes")
    rows += [other, *((str(n), *entry.values()) for n, entry in enumerate(entries))]
    table.write_text("".join("\t".join(row) + "\n" for row in rows))
    lists, release = tmp_path / "lists", tmp_path / "release"
    for task in TASKS:
        (release / task).mkdir(parents=True)
        for number in range(2):
            (release / task / f"{number}.jpg").touch()
            text = "".join(f"{question}\t{answer}\n" for question, answer in QUESTIONS)
            (release / task / f"{number}.txt").write_text(text)
        lists.mkdir(exist_ok=True)
        lines = [f"{e['image']}\t{e['question']}\t{e['answer']}\n" for e in entries if e["category"] == task]
        (lists / f"{task}.txt").write_text("".join(lines))
    read_from = {path.name: read(path) for path in (jsonl(tmp_path, entries), table, lists, release)}
    ids = [question.id for question in read_from["mme.jsonl"].questions]
    assert ids[:3] == ["existence/0.jpg/1", "existence/0.jpg/2", "existence/1.jpg/1"] and len(ids) == 16
    for subject in read_from.values():
        assert [question.id for question in subject.questions] == ids
        assert [question.text for question in subject.questions[:2]] == [text for text, _ in QUESTIONS]
        assert figures(subject, ["Yes", "No"] * 8)["total"] == 800
    assert read_from["mme.tsv"].questions[0].image == "0.jpg"
    assert read_from["lists"].questions[0].image == read_from["release"].questions[0].image == "existence/0.jpg"


def test_an_image_is_resampled_with_both_questions_and_not_with_its_namesake_of_another_task(tmp_path: Path) -> None:
    assert len({question.resampled for question in read(jsonl(tmp_path, records())).questions}) == 8


def test_the_answer_file_has_the_lines_of_the_official_tool(tmp_path: Path) -> None:
    suffix, content = read(jsonl(tmp_path, records(1))).answer_file(["\n\nYes,\tit is", *7 * ["No"]])
    lines = [line.split("\t") for line in content.splitlines()]
    assert suffix == ".txt" and len(lines) == 8 and {len(line) for line in lines} == {4}
    assert lines[0] == ["existence/0.jpg", QUESTIONS[0][0], "Yes", "  Yes, it is"]
    assert read_yes_no(lines[0][3]) == read_yes_no("\n\nYes,\tit is") == "other"


@pytest.mark.parametrize(
    "entries, message",
    [
        (records()[:-1], "color/1.jpg has 1 questions; MME has two per image"),
        (records(tasks=TASKS[:3]), "task 'color' has no question"),
        ([{**records()[0], "answer": "true"}], "line 1: field 'answer' is 'true'; it must be Yes or No"),
        ([{"category": "count", "question": "?", "answer": "Yes"}], "line 1: field 'image' is None; it must be text"),
    ],
)
def test_files_of_another_form_are_refused(tmp_path: Path, entries: list[dict[str, str]], message: str) -> None:
    with pytest.raises(ValueError, match=re.escape(message)):
        read(jsonl(tmp_path, entries))


def test_lines_and_pictures_of_a_folder_are_checked(tmp_path: Path) -> None:
    (tmp_path / "count").mkdir()
    (tmp_path / "count" / "7.txt").write_text("Are there two dogs?\tYes\n")
    with pytest.raises(ValueError, match=re.escape("there is no picture of this name; expected 7.jpg")):
        read(tmp_path)
    (tmp_path / "count.txt").write_text("7.jpg\tAre there two dogs? Yes\n")
    with pytest.raises(ValueError, match=re.escape("count.txt, line 1: 2 cells between tabs; 3 are needed")):
        read(tmp_path)
