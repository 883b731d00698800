"""Field names of public data sets: what they mean, and that preference data never become annotations."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from bpo.formats.bad_records import BadRecords
from bpo.formats.check import check_data, main
from bpo.formats.files import read_annotations, read_groups
from bpo.records import Completion, ContentPart, PreferenceGroup, Turn

IMAGE = {"images": ["a.png"]}
ASKED = {"role": "user", "content": "<image>What?"}
BUS, TRAM = ({"role": "assistant", "content": text} for text in ("A bus.", "A tram."))
HUMAN, GPT = {"from": "human", "value": "<image>What?"}, {"from": "gpt", "value": "A bus."}
OTHER_GPT = {"from": "gpt", "value": "A tram."}
TEXTS = {"chosen": "A bus.", "rejected": "A tram."}
CONVERSATION = {"messages": [ASKED, BUS], **IMAGE}
PARTS = [{"type": "image", "image": "a.png"}, {"type": "text", "text": "What?"}]
OPENAI = [
    {"type": "input_image", "image_url": {"url": "a.png", "detail": "low"}},
    {"type": "input_text", "text": "What?"},
]
# Each record is one question about a.png with the answers "A bus." (preferred) and "A tram.".
PAIRS: dict[str, dict[str, Any]] = {
    "ms-swift, a text": {**CONVERSATION, "rejected_response": "A tram."},
    "ms-swift, a turn": {**CONVERSATION, "rejected_response": TRAM},
    "ms-swift, a list of a text": {**CONVERSATION, "rejected_response": ["A tram."]},
    "ms-swift, a list of a turn": {**CONVERSATION, "rejected_response": [TRAM]},
    "ms-swift, messages": {**CONVERSATION, "rejected_messages": [ASKED, TRAM], "rejected_images": ["a.png"]},
    "ms-swift, query": {"query": "<image>What?", "response": "A bus.", "rejected_response": "A tram.", **IMAGE},
    "POVID": {
        "image": "a.png",
        "conversations": [HUMAN, GPT],
        "rejected_conversations": [HUMAN, OTHER_GPT],
    },
    "HA-DPO": {
        "image": "a.png",
        "chosen_conversations": [HUMAN, GPT],
        "reject_conversations": [HUMAN, OTHER_GPT],
    },
    "MIA-DPO": {"image": "a.png", "conversations": [HUMAN], "chosen": "A bus.", "reject": "A tram."},
    "alpaca": {"instruction": "<image>", "input": "What?", **TEXTS, **IMAGE},
    "chosen_response": {
        "img_path": "a.png",
        "question": "What?",
        "chosen_response": "A bus.",
        "rejected_answer": "A tram.",
    },
    "capitals": {"image": "a.png", "question": "What?", "Chosen": "A bus.", "rejectedResponse": "A tram."},
    "turns as columns": {
        "image": "a.png",
        "chosen_conversations": {"from": ["human", "gpt"], "value": ["<image>What?", "A bus."]},
        "rejected_conversations": {"from": ["human", "gpt"], "value": ["<image>What?", "A tram."]},
    },
    "preferred": {"image_path": "a.png", "prompt": "What?", "preferred": "A bus.", "dispreferred": "A tram."},
    "turns as text": {"prompt": json.dumps([{"role": "user", "content": PARTS}]), **TEXTS},
    "turns of from and value": {"image": "a.png", "prompt": "What?", "chosen": [GPT], "rejected": [OTHER_GPT]},
    "OpenAI": {
        "input": {"messages": [{"role": "user", "content": OPENAI}]},
        "preferred_output": [BUS],
        "non_preferred_output": [TRAM],
    },
    "a copy of the chosen answer": {**CONVERSATION, **TEXTS},
    "an empty last answer": {"messages": [ASKED, BUS | {"content": ""}], "chosen": BUS, "rejected": TRAM, **IMAGE},
}


def write(path: Path, *records: Any) -> Path:
    path.write_text("".join(json.dumps(record) + "\n" for record in records))
    return path


def group_of(path: Path, record: dict[str, Any]) -> PreferenceGroup:
    (group,) = read_groups(write(path / "a.jsonl", record))
    return group


def turns_of(prompt: tuple[Turn, ...]) -> list[tuple[str, str]]:
    return [(turn.role, turn.text) for turn in prompt]


@pytest.mark.parametrize("form", PAIRS)
def test_a_pair_in_any_common_form_is_a_group(tmp_path: Path, form: str) -> None:
    group = group_of(tmp_path, PAIRS[form])
    assert [(c.response, c.score, c.type) for c in group.completions] == [
        ("A bus.", 1, "chosen"),
        ("A tram.", 0, "rejected"),
    ]
    parts = tuple(part for part in group.prompt[0].content if part.text != "\n")
    assert (group.images, parts) == (("a.png",), (ContentPart("image"), ContentPart("text", "What?")))
    assert group.extra == {}


@pytest.mark.parametrize(
    "name", ["img_path", "image_path", "image_file", "imageName", "file_name", "jpg", "image_paths"]
)
def test_an_image_under_any_common_name_is_not_lost(tmp_path: Path, name: str) -> None:
    value = ["a.png"] if name.endswith("s") else "a.png"
    group = group_of(tmp_path, {name: value, "prompt": "What?", **TEXTS})
    assert group.images == ("a.png",) and group.extra == {}
    group = group_of(tmp_path, {name: value, "images": ["b.png"], "question": "What?", **TEXTS})
    assert group.images == ("b.png",) and group.extra == {name: value}


def test_several_rejected_answers_are_completions_of_one_group(tmp_path: Path) -> None:
    group = group_of(tmp_path, {**CONVERSATION, "rejected_response": ["A tram.", "A car."]})
    assert [(c.response, c.score) for c in group.completions] == [("A bus.", 1), ("A tram.", 0), ("A car.", 0)]


def test_history_and_system_prompt_are_part_of_the_prompt(tmp_path: Path) -> None:
    before = {"system": "Be brief.", "history": [["Hi", "Hello"]], "query": "<image>What?", **IMAGE}
    expected = [("system", "Be brief."), ("user", "Hi"), ("assistant", "Hello"), ("user", "What?")]
    (annotation,) = read_annotations(write(tmp_path / "a.jsonl", {**before, "response": "A bus."})).annotations
    assert turns_of(annotation.prompt) == expected and annotation.response == "A bus." and annotation.extra == {}
    for answers in (
        {**TEXTS},
        {"response": "A bus.", "rejected_response": "A tram."},
    ):
        assert turns_of(group_of(tmp_path, before | answers).prompt) == expected


@pytest.mark.parametrize("history", [[["Hi"]], ["Hi", "Hello"], "Hi", [["Hi", "Hello", "more"]], {"a": 1}])
def test_a_history_in_another_form_is_bad_and_not_lost(tmp_path: Path, history: Any) -> None:
    path = write(tmp_path / "a.jsonl", {"query": "What?", "response": "A bus.", "history": history, **IMAGE})
    with pytest.raises(ValueError, match=r"messages\[0\]"):
        read_annotations(path)


@pytest.mark.parametrize("name", ["query", "question", "instruction", "input", "prompt"])
def test_a_question_under_any_common_name_is_the_prompt(tmp_path: Path, name: str) -> None:
    path = write(tmp_path / "a.jsonl", {"image": "a.png", name: "How many?", "output": "4"})
    (annotation,) = read_annotations(path).annotations
    assert turns_of(annotation.prompt) == [("user", "How many?")]


def test_a_question_under_another_name_is_bad_and_not_lost(tmp_path: Path) -> None:
    rows = [
        {"image": "a.png", "task": "Count the wheels.", "answer": "4"},
        {"image": "a.png", "task": "How many?", "caption": "4"},
        {"image": "a.png", "source": "web", "caption": "A bus.", "title": "The big city"},
    ]
    bad = BadRecords("quarantine")
    (kept,) = read_annotations(write(tmp_path / "a.jsonl", *rows), bad).annotations
    assert turns_of(kept.prompt) == [("user", "Describe this image.")]
    assert [p.code for p in bad.problems] == ["missing-field"] * 2 and "'task'" in bad.problems[0].detail


# Fields of preference data in records that would otherwise be annotations.
LLAVA = {"image": "a.png", "conversations": [HUMAN, GPT]}
CAPTION = {"image": "a.png", "caption": "A bus."}
STRAY: list[tuple[str, dict[str, Any]]] = [
    *[
        (name, record | {name: value})
        for record in (LLAVA, CAPTION)
        for name, value in (
            ("preference", 1),
            ("output_2", "A tram."),
            ("rejected_reason", "wrong"),
            ("chosen", "A bus."),
            ("dispreferred_caption", "A tram."),
            ("human_preference", [1, 0]),
            ("worse_response", "A tram."),
            ("humanPreference", 1),
            ("rating", 2),
        )
    ],
    ("label", CAPTION | {"label": False}),
    ("rejected", CAPTION | {"rejected": "A tram."}),
    ("rejected", {"id": "1", "prompt": [ASKED], "response": "A bus.", "rejected": "A tram.", **IMAGE}),
    (
        "preference_values",
        {"image": "a.png", "conversations": [HUMAN, {"from": "gpt", "preference_values": ["a", "b"]}]},
    ),
    (
        "preference_values",
        {"image": "a.png", "conversations": json.dumps([HUMAN, {"from": "gpt", "preference_values": ["a", "b"]}])},
    ),
]


@pytest.mark.parametrize(("field", "record"), STRAY)
def test_preference_data_never_become_an_annotation(tmp_path: Path, field: str, record: dict[str, Any]) -> None:
    path = write(tmp_path / "a.jsonl", CAPTION if "caption" in record else LLAVA, record)
    bad = BadRecords("quarantine")
    assert len(read_annotations(path, bad).annotations) == 1
    assert [problem.code for problem in bad.problems] == ["preference-field"]
    assert f"line 2 (id '{record.get('id', 'record-1')}'): field {field!r} is preference data" in bad.problems[0].detail
    assert check_data(path, opens_images=False).num_bad == 1


def test_an_empty_preference_field_is_ignored(tmp_path: Path) -> None:
    path = write(tmp_path / "a.jsonl", LLAVA | {"rejected": None, "rejected_images": [], "preference": ""})
    assert len(read_annotations(path).annotations) == 1


def test_a_pair_among_annotations_is_bad_and_names_its_form(tmp_path: Path) -> None:
    text_only = {"messages": [{"role": "user", "content": "Hi"}, BUS]}
    bad = BadRecords("quarantine")
    records = (text_only, text_only, {**CONVERSATION, "chosen": "x", "rejected": "y"}, PAIRS["ms-swift, a text"])
    assert read_annotations(write(tmp_path / "a.jsonl", *records), bad).annotations == ()
    assert ["'sharegpt-pairs'" in p.detail or "'ms-swift'" in p.detail for p in bad.problems] == [True, True]


def test_records_in_several_forms_are_read_and_annotations_among_them_are_bad(tmp_path: Path) -> None:
    bad = BadRecords("quarantine")
    groups = read_groups(write(tmp_path / "a.jsonl", *PAIRS.values(), LLAVA), bad)
    assert len(groups) == len(PAIRS)
    assert [(p.code, "form 'llava'" in p.detail) for p in bad.problems] == [("wrong-file", True)]


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"rejected_images": ["b.png"], "rejected_response": "A tram."}, "'rejected_images' differ"),
        ({"rejected_images": ["b.png"]}, "'rejected_images' differ"),
        ({"rejected_images": ["b.png"], "chosen": "A bus.", "rejected": "A tram."}, "'rejected_images' differ"),
        ({"rejected_messages": [ASKED | {"content": "Why?"}, TRAM]}, "differ before their last turns"),
        ({"rejected_messages": [ASKED]}, "ends with the role 'user'"),
        ({"messages": [ASKED], "rejected_response": "A tram."}, "add 'chosen'"),
        ({"rejected_response": ""}, "rejected is empty"),
        ({"rejected_response": 3}, r"rejected\[0\] must be an object"),
    ],
)
def test_a_rejected_answer_to_something_else_is_refused(tmp_path: Path, changes: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        group_of(tmp_path, CONVERSATION | changes)


def test_answers_of_several_turns_may_differ_in_their_last(tmp_path: Path) -> None:
    more = {"role": "user", "content": "Sure?"}
    yes, no = ({"role": "assistant", "content": text} for text in ("Yes.", "No."))
    for record in (
        {"prompt": [ASKED], "chosen": [BUS, more, yes], "rejected": [BUS, more, no], **IMAGE},
        {"messages": [ASKED], "chosen": [BUS, more, yes], "rejected": [BUS, more, no], **IMAGE},
        {"chosen": [ASKED, BUS, more, yes], "rejected": [ASKED, BUS, more, no], **IMAGE},
    ):
        group = group_of(tmp_path, record)
        assert turns_of(group.prompt) == [("user", "What?"), ("assistant", "A bus."), ("user", "Sure?")]
        assert group.completions == (Completion("Yes.", 1.0, "chosen"), Completion("No.", 0.0, "rejected"))
        with pytest.raises(ValueError, match="differ from turn"):
            group_of(tmp_path, record | {"rejected": [*record["rejected"][:-3], TRAM, more, no]})


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"data": [PAIRS["alpaca"]]}, "in the list 'data'"),
        ({"a": PAIRS["alpaca"], "b": PAIRS["alpaca"]}, "values of one object"),
        ({"a": {"root": "images", "annotation": "a.jsonl", "length": 7}}, "lists other files.*'a.jsonl'"),
    ],
)
@pytest.mark.parametrize("indent", [None, 1])
def test_an_object_around_the_records_is_named(tmp_path: Path, content: Any, message: str, indent: int | None) -> None:
    (tmp_path / "a.json").write_text(json.dumps(content, indent=indent))
    with pytest.raises(ValueError, match=message):
        read_groups(tmp_path / "a.json")


def test_the_name_of_a_dataset_on_the_hub_is_recognised(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match="bpo convert hub:openbmb/RLAIF-V-Dataset "):
        main(["openbmb/RLAIF-V-Dataset"])
    with pytest.raises(ValueError, match="cannot be read"):
        check_data(Path("data/groups.jsonl"))


@pytest.mark.parametrize("role", ["tool", "tool_call", "function"])
def test_a_tool_call_is_named(tmp_path: Path, role: str) -> None:
    calls = {"role": "assistant", "content": None, "tool_calls": [{"id": "c"}]}
    for turn in ({"role": role, "content": "12"}, calls):
        path = write(tmp_path / "a.jsonl", CONVERSATION | {"messages": [ASKED, turn, BUS]})
        with pytest.raises(ValueError, match=r"messages\[1\] is a tool call"):
            read_annotations(path)
