"""Requests to a text-only LLM."""

from __future__ import annotations

from pathlib import Path

import pytest

from bpo.bootstrap.inject import as_plain_text, build_request, choose_mode, load_prompt
from bpo.records import Annotation, ContentPart, Turn


def annotation(question: str, response: str, *earlier: str) -> Annotation:
    turns = [Turn("user" if i % 2 == 0 else "assistant", (ContentPart("text", t),)) for i, t in enumerate(earlier)]
    turns.append(Turn("user", (ContentPart("image"), ContentPart("text", question))))
    return Annotation("r", ("a.png",), tuple(turns), response)


@pytest.mark.parametrize("mode", ["description", "qa"])
def test_prompt_files_have_worked_examples_in_which_something_changes(mode: str) -> None:
    prompt = load_prompt(mode)
    assert len(prompt.examples) >= 3
    assert all(answer and answer not in request for request, answer in prompt.examples)
    assert "{" not in "".join(request for request, _ in prompt.examples)


def test_the_conversation_of_a_description() -> None:
    request = build_request(annotation("Describe it.", " A {cat} <image>. "), "description", 1024, seed=7)
    roles = [message.role for message in request.messages]
    assert roles == ["user", "assistant"] * (len(roles) // 2) + ["user"]
    assert request.messages[0].content.startswith(load_prompt("description").instruction)
    assert request.messages[-1].content == "Description: A {cat} <image>."
    assert (request.record_id, request.seed) == ("r", 7)


def test_the_conversation_of_a_question_has_the_last_question_only() -> None:
    request = build_request(annotation("What colour?", "Red.", "How many?", "Two."), "qa", 1024, seed=0)
    assert request.messages[-1].content == "Question: What colour?\nCorrect answer: Red."


def test_the_plain_form_labels_every_answer_and_ends_with_the_label() -> None:
    request = build_request(annotation("What colour?", "Red."), "qa", 1024, seed=0)
    text = as_plain_text(request)
    assert text.endswith("Question: What colour?\nCorrect answer: Red.\n\nOther answer:")
    assert text.count("Other answer: ") == len(load_prompt("qa").examples)


def test_a_short_annotation_gets_a_short_budget_and_the_configured_limit_holds() -> None:
    short = build_request(annotation("What?", "one two"), "qa", 1024, seed=0)
    assert short.max_new_tokens == 64 + 4 * 2
    assert build_request(annotation("What?", "word " * 900), "qa", 1024, seed=0).max_new_tokens == 1024


@pytest.mark.parametrize(
    ("question", "mode"),
    [
        ("Describe this image.", "description"),
        ("Can you give a detailed caption for the photo?", "description"),
        ("What do you see happening in this image?", "description"),
        ("What is this?", "description"),
        ("What's going on?", "description"),
        ("Write a terse but informative summary of the picture.", "description"),
        ("What is this man holding?", "qa"),
        ("How many dogs are there?", "qa"),
        ("Is the cup left of the plate?", "qa"),
        ("What can you infer about the weather?", "qa"),
    ],
)
def test_auto_mode_follows_the_question(question: str, mode: str) -> None:
    assert choose_mode("auto", annotation(question, "x")) == mode
    assert choose_mode("qa", annotation(question, "x")) == "qa"


def test_a_users_own_prompts_replace_the_packages(tmp_path: Path) -> None:
    (tmp_path / "qa.yaml").write_text(
        "instruction: Err.\nrequest: '{question} / {response}'\nlabel: 'Wrong:'\n"
        "examples: [{question: 'How many?', response: 3, modified: 4}]\n"
    )
    request = build_request(annotation("What?", "Red."), "qa", 1024, 0, str(tmp_path))
    assert [m.content for m in request.messages] == ["Err.\n\nHow many? / 3", "4", "What? / Red."]
    assert as_plain_text(request) == "Err.\n\nHow many? / 3\n\nWrong: 4\n\nWhat? / Red.\n\nWrong:"
    with pytest.raises(ValueError, match=rf"{tmp_path}/description.yaml.*copy"):
        build_request(annotation("What?", "Red."), "description", 1024, 0, str(tmp_path))


@pytest.mark.parametrize(
    ("content", "complaint"),
    [
        ("instruction: x\nrequest: '{response}'\nlabel: y\nexamples: []\n", "must contain {question}, {response}"),
        ("instruction: x\nlabel: y\nexamples: []\n", "'request'; required: instruction, request"),
        ("instruction: x\nrequest: '{question} {response}'\nlabel: y\nexamples: [{question: a}]\n", "'response'"),
        ("[", "required: instruction"),
    ],
)
def test_a_broken_prompt_file_is_an_error_naming_it(tmp_path: Path, content: str, complaint: str) -> None:
    (tmp_path / "qa.yaml").write_text(content)
    with pytest.raises(ValueError, match="qa.yaml") as error:
        load_prompt("qa", str(tmp_path))
    assert complaint in str(error.value)
