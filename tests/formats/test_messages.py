"""Messages with images in their parts, and answers that repeat the prompt."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bpo.formats.convert import convert
from bpo.formats.files import read_annotations, read_groups
from bpo.records import Completion, ContentPart, Turn

IMAGE = ContentPart("image")
PAIR = (Completion("A bus.", 1.0, "chosen"), Completion("A tram.", 0.0, "rejected"))


def text(value: str) -> ContentPart:
    return ContentPart("text", value)


def message(role: str, *parts: Any) -> dict[str, Any]:
    return {"role": role, "content": [{"type": "text", "text": p} if isinstance(p, str) else p for p in parts]}


def write(path: Path, *records: Any) -> Path:
    path.write_text(json.dumps(list(records)))
    return path


@pytest.mark.parametrize(
    "part",
    [
        {"type": "image", "image": "a.png"},
        {"type": "image", "path": "a.png", "text": None},
        {"type": "image", "url": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png"}},
        {"type": "image_url", "image_url": "a.png"},
        {"type": "image_url", "image_url": {"url": "a.png", "detail": "high"}},
        {"type": "input_image", "image_url": "a.png", "detail": "auto"},
        {"type": "image_path", "content": "a.png"},
    ],
)
def test_a_message_part_may_contain_an_image(tmp_path: Path, part: dict[str, Any]) -> None:
    other = {"type": "image", "image": "b.png"}
    answer = message("assistant", "A", {"type": "output_text", "text": " bus."})
    turns = [message("user", {"type": "input_text", "text": "Is "}, part, " or ", other, "it?"), answer]
    (annotation,) = read_annotations(write(tmp_path / "a.json", {"id": 1, "messages": turns})).annotations
    assert annotation.images == ("a.png", "b.png") and annotation.response == "A bus."
    assert annotation.prompt == (Turn("user", (text("Is "), IMAGE, text(" or "), IMAGE, text("it?"))),)


def test_parts_without_a_path_take_the_images_of_the_record_and_markers_stay_text(tmp_path: Path) -> None:
    turns = [message("user", "What is <image>?", {"type": "image"}), {"role": "assistant", "content": "A bus."}]
    (annotation,) = read_annotations(write(tmp_path / "a.json", {"images": ["a.png"], "messages": turns})).annotations
    assert annotation.prompt == (Turn("user", (text("What is <image>?"), IMAGE)),) and annotation.images == ("a.png",)


# A question about two images, in every form of data; ... stands for the question.
PAIR_OF_TEXTS = {"chosen": "A bus.", "rejected": "A tram."}
SCORED = {
    "completions": [{"response": "A bus.", "score": 1, "type": "a"}, {"response": "A tram.", "score": 0, "type": "b"}]
}
ANSWER = {"role": "assistant", "content": "A bus."}
FORMS: dict[str, tuple[str, dict[str, Any]]] = {
    "bpo's groups": ("a.jsonl", {"id": "1", "prompt": ..., **SCORED}),
    "groups without ids": ("a.jsonl", {"prompt": ..., **SCORED}),
    "the paper's list": ("a.json", {"prompt": ..., **SCORED}),
    "turns": ("a.jsonl", {"id": "1", "prompt": [{"role": "user", "content": ...}], **SCORED}),
    "TRL's text": ("a.json", {"prompt": ..., **PAIR_OF_TEXTS}),
    "TRL's messages": ("a.json", {"prompt": [{"role": "user", "content": ...}], **PAIR_OF_TEXTS}),
    "TRL's conversations": (
        "a.json",
        {name: [{"role": "user", "content": ...}, ANSWER] for name in ("chosen", "rejected")},
    ),
    "ShareGPT": ("a.json", {"conversations": [{"from": "human", "value": ...}], **PAIR_OF_TEXTS}),
    "LLaVA": ("a.json", {"conversations": [{"from": "human", "value": ...}, {"from": "gpt", "value": "A bus."}]}),
    "messages": ("a.json", {"messages": [{"role": "user", "content": ...}, ANSWER]}),
    "after a turn with parts": (
        "a.json",
        {"messages": [message("user", "Hello <image>."), ANSWER, {"role": "user", "content": ...}, ANSWER]},
    ),
    "bpo's annotations": ("a.jsonl", {"prompt": ..., "response": "A bus."}),
}


def asked(value: Any, question: str) -> Any:
    if isinstance(value, dict):
        return {name: asked(inner, question) for name, inner in value.items()}
    return (
        [asked(inner, question) for inner in value] if isinstance(value, list) else question if value is ... else value
    )


def read(path: Path) -> Any:
    record = json.loads(path.read_text())
    record = record[0] if isinstance(record, list) else record
    return read_groups(path)[0] if {"completions", "chosen"} & record.keys() else read_annotations(path).annotations[0]


@pytest.mark.parametrize("form", FORMS)
def test_a_marker_in_the_text_of_a_user_turn_is_an_image_in_every_form(tmp_path: Path, form: str) -> None:
    name, record = FORMS[form]
    path = tmp_path / name

    def prompt_of(question: str) -> tuple[Turn, ...]:
        tree = {"images": ["a.png", "b.png"], **asked(record, question)}
        path.write_text(json.dumps([tree] if name == "a.json" else tree))
        return read(path).prompt

    assert prompt_of("Left <image> right <image> differ?")[-1] == Turn(
        "user", (text("Left "), IMAGE, text(" right "), IMAGE, text(" differ?"))
    )
    assert prompt_of("<image>\r\n<image>\r\nDo they\r\ndiffer?") == prompt_of("<image>\n<image>\nDo they\ndiffer?")
    with pytest.raises(ValueError, match=r"3 <image> markers for 2 images; make the numbers equal"):
        prompt_of("<image> <image> <image>")


@pytest.mark.parametrize(
    ("record", "problem"),
    [
        ({"messages": [message("user", {"type": "image", "image": "a"})], "images": ["b"]}, "in a separate field"),
        ({"messages": [message("user", {"type": "image", "image": 7}), message("assistant", "x")]}, "'images' is"),
        ({"messages": [message("user", {"type": "table"}, "x"), message("assistant", "x")], "image": "a"}, "must be"),
        ({"messages": [message("user", "x"), message("assistant", {"type": "image"})], "image": "a"}, "a part is"),
    ],
)
def test_invalid_parts_are_refused(tmp_path: Path, record: Any, problem: str) -> None:
    with pytest.raises(ValueError, match=problem):
        read_annotations(write(tmp_path / "a.json", record))


def test_fields_of_turns_are_kept(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>What?", "at": 3}, {"from": "gpt", "value": "A bus.", "by": None}]
    path = write(tmp_path / "a.json", {"image": "a.png", "conversations": turns})
    (annotation,) = read_annotations(path).annotations
    assert annotation.extra == {"source_turns": [{"at": 3}, {}]}
    answers = {"chosen": {"from": "gpt", "value": "A bus.", "judge": "x"}, "rejected": "A tram."}
    (group,) = read_groups(write(tmp_path / "b.json", {"image": "a.png", "conversations": turns[:1], **answers}))
    assert [completion.extra for completion in group.completions] == [{"judge": "x"}, {}]
    assert group.extra == {"source_turns": [{"at": 3}]}


@pytest.mark.parametrize("prompt", [..., "What?", [message("user", {"type": "image", "image": "a.png"}, "What?")]])
def test_answers_may_repeat_the_prompt(tmp_path: Path, prompt: Any) -> None:
    asked = {"role": "user", "content": "What?"} if prompt == "What?" else None
    asked = asked or message("user", {"type": "image", "image": "a.png"}, "What?")
    record = {"prompt": prompt, "images": ["a.png"] if prompt == "What?" else None, "score_chosen": 8.5}
    record |= {"chosen": [asked, message("assistant", "A bus.")], "rejected": [asked, message("assistant", "A tram.")]}
    record = {name: value for name, value in record.items() if value is not ...}
    # UltraFeedback has a second copy of the preferred conversation.
    for more in ({}, {"messages": record["chosen"]}):
        (group,) = read_groups(write(tmp_path / "a.json", record | more))
        assert (group.images, group.completions) == (("a.png",), PAIR)
        assert group.prompt == (Turn("user", (IMAGE, text("What?"))),)
        assert group.extra["score_chosen"] == 8.5


def test_a_prompt_that_the_answers_contradict_is_refused(tmp_path: Path) -> None:
    turns = [{"role": "user", "content": "One?"}, {"role": "assistant", "content": "x"}]
    with pytest.raises(ValueError, match="does not start with the prompt"):
        read_groups(write(tmp_path / "a.json", {"prompt": "Two?", "chosen": turns, "rejected": turns}))


def test_converted_messages_read_back_equal(tmp_path: Path) -> None:
    turns = [message("user", "Is ", {"type": "image", "image": "a.png"}, "it?"), message("assistant", "A bus.")]
    convert(write(tmp_path / "a.json", {"id": 1, "messages": turns}), tmp_path / "a.jsonl")
    assert read_annotations(tmp_path / "a.jsonl") == read_annotations(tmp_path / "a.json")
