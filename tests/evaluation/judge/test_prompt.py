"""Placeholders of a judge's prompt."""

from __future__ import annotations

from pathlib import Path

import pytest

from bpo.evaluation.judge.prompt import JudgePrompt

KNOWN = ("question", "answer", "reference")


def read(tmp_path: Path, text: str) -> JudgePrompt:
    path = tmp_path / "prompt.txt"
    path.write_text(text, encoding="utf-8")
    return JudgePrompt.read(path, KNOWN)


def test_texts_replace_placeholders_and_are_not_looked_at(tmp_path: Path) -> None:
    prompt = read(tmp_path, "Q: {question}\nA: {answer} ({answer})")
    values = {"question": "{answer}?", "answer": "{0} {} %s \\1", "reference": "unused"}
    assert prompt.fill(values) == "Q: {answer}?\nA: {0} {} %s \\1 ({0} {} %s \\1)"


def test_json_in_the_prompt_stays_as_it_is(tmp_path: Path) -> None:
    text = 'Reply with {"score": 1, "nested": {"a": []}} or {{answer}}, about: {answer}'
    assert read(tmp_path, text).fill({"answer": "X"}) == text.replace("{{answer}}", "{answer}").replace(
        ": {answer}", ": X"
    )


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (
            "{answer} {image}",
            r"unknown placeholder \{image\}; known are \{question\}, \{answer\}, \{reference\}",
        ),
        ("{answer} {}", r"unknown placeholder \{\}"),
        ("{question}", r"\{answer\} is missing"),
        ("{{answer}}", r"\{answer\} is missing"),
    ],
)
def test_unknown_and_missing_placeholders_are_named(tmp_path: Path, text: str, message: str) -> None:
    with pytest.raises(ValueError, match=rf"judge.prompt .*prompt.txt: {message}"):
        read(tmp_path, text)


def test_a_file_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=r"judge.prompt .*none.txt cannot be read"):
        JudgePrompt.read(tmp_path / "none.txt", KNOWN)
