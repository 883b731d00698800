"""Answers with ratings (VLFeedback, lists of scores) and with labels (KTO)."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bpo.formats.bad_records import BadRecords
from bpo.formats.check import check_data
from bpo.formats.convert import convert
from bpo.formats.files import read_groups


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def rated(*ratings: Any) -> dict[str, dict[str, Any]]:
    return {
        aspect: {"Rating": rating}
        for aspect, rating in zip(("Helpfulness", "Visual Faithfulness"), ratings, strict=False)
    }


ANSWERS = {"A bus.": rated("4", "5"), "A tram.": rated("2", "1"), "A car.": rated(1, 2)}
AS_LIST = [{"response": text, "annotations": judged, "model": "m"} for text, judged in ANSWERS.items()]
AS_COLUMNS = {"response": list(ANSWERS), "annotations": list(ANSWERS.values()), "model": ["m"] * 3}


@pytest.mark.parametrize("completions", [AS_LIST, AS_COLUMNS], ids=["list", "columns"])
def test_the_score_is_the_mean_rating_and_equal_means_form_no_pair(tmp_path: Path, completions: Any) -> None:
    record = {"id": "v", "prompt": "What?", "img_path": "a.png", "completions": completions}
    (group,) = read_groups(write(tmp_path / "a.jsonl", record))
    assert [(c.response, c.score) for c in group.completions] == [("A bus.", 4.5), ("A tram.", 1.5), ("A car.", 1.5)]
    assert group.images == ("a.png",) and group.completions[0].extra["annotations"] == ANSWERS["A bus."]
    convert(tmp_path / "a.jsonl", tmp_path / "again.jsonl")
    assert read_groups(tmp_path / "again.jsonl") == (group,)


def test_answers_that_all_have_the_same_mean_are_left_out(tmp_path: Path) -> None:
    record = {"prompt": "What?", "image": "a.png", "completions": [AS_LIST[1], AS_LIST[2]]}
    assert check_data(write(tmp_path / "a.jsonl", record), opens_images=False).counts["no-preference"] == 1


def test_lists_of_answers_and_scores(tmp_path: Path) -> None:
    record = {"image": "a.png", "prompt": "What?", "responses": ["A bus.", "A tram."], "scores": [3, 1.5]}
    (group,) = read_groups(write(tmp_path / "a.jsonl", record))
    assert [(c.response, c.score) for c in group.completions] == [("A bus.", 3), ("A tram.", 1.5)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        (
            {"completions": [AS_LIST[0], {"response": "x", "annotations": rated("N/A")}]},
            r"completions\[1\].annotations\['Helpf",
        ),
        ({"completions": [AS_LIST[0], {"response": "x", "annotations": {}}]}, "has neither 'score' nor ratings"),
        ({"completions": [AS_LIST[0]]}, "fewer than two rated"),
        ({"completions": {"response": ["x", "y"], "annotations": [rated(1)]}}, "has neither 'score' nor ratings"),
        ({"responses": ["x", "y"], "ranking": [1, 2]}, "does not tell which end is best"),
        ({"responses": ["x", "y"], "scores": [1]}, "has neither 'score' nor ratings"),
    ],
)
def test_answers_without_a_usable_rating_are_refused(tmp_path: Path, changes: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        read_groups(write(tmp_path / "a.jsonl", {"prompt": "What?", "image": "a.png", **changes}))


def labelled(answer: str, label: Any, question: str = "What?", image: str = "a.png", **more: Any) -> dict[str, Any]:
    turns = [{"role": "user", "content": f"<image>{question}"}, {"role": "assistant", "content": answer}]
    return {"messages": turns, "label": label, "images": [image], **more}


def test_answers_to_one_prompt_with_both_labels_are_a_group_wherever_they_are(tmp_path: Path) -> None:
    rows = [
        labelled("A bus.", True, id="x", source="web"),
        labelled("A tram.", False),
        {"prompt": "<image>Why?", "completion": "Yes.", "kto_tag": False, "images": ["a.png"]},
        labelled("A car.", False),
        {"prompt": "<image>Why?", "completion": "So.", "kto_tag": True, "images": ["a.png"]},
    ]
    path = write(tmp_path / "a.jsonl", *rows)
    first, second = read_groups(path)
    assert [(c.response, c.score) for c in first.completions] == [("A bus.", 1), ("A tram.", 0), ("A car.", 0)]
    assert first.completions[0].extra == {"source": "web", "source_id": "x"} and first.images == ("a.png",)
    assert [(c.response, c.score) for c in second.completions] == [("Yes.", 0), ("So.", 1)]
    assert check_data(path, opens_images=False).num_bad == 0
    convert(path, tmp_path / "again.jsonl")
    assert read_groups(tmp_path / "again.jsonl") == (first, second)


def test_a_bad_row_does_not_separate_the_rows_around_it(tmp_path: Path) -> None:
    rows = [labelled("A.", True), labelled("", False), labelled("<image>", True), labelled("B.", False)]
    bad = BadRecords("quarantine")
    path = write(tmp_path / "a.jsonl", *rows)
    (group,) = read_groups(path, bad)
    assert [c.response for c in group.completions] == ["A.", "B."] and [p.code for p in bad.problems] == ["empty-text"]
    assert check_data(path, opens_images=False).counts == {"empty-text": 1, "marker-in-answer": 1}


@pytest.mark.parametrize(
    ("rows", "codes"),
    [
        ([labelled("A.", True)], ["one-label"]),
        ([labelled("A.", True), labelled("B.", True)], ["one-label"]),
        ([labelled("A.", True), labelled("B.", False, "Why?")], ["one-label"] * 2),
        ([labelled("A.", True), labelled("B.", False, image="b.png")], ["one-label"] * 2),
        (
            [labelled("A.", True), labelled("B.", False), labelled("C.", 0, "Why?"), labelled("D.", 1)],
            ["one-label"],
        ),
        ([labelled("A.", "cat"), labelled("B.", 2)], ["wrong-type"] * 2),
    ],
)
def test_answers_without_a_counterpart_are_bad_by_name(tmp_path: Path, rows: list[Any], codes: list[str]) -> None:
    path = write(tmp_path / "a.jsonl", *rows)
    bad = BadRecords("quarantine")
    read_groups(path, bad)
    assert [problem.code for problem in bad.problems] == codes
    result = check_data(path, opens_images=False)
    assert (result.num_bad, result.counts) == (len(codes), {codes[0]: len(codes)})
