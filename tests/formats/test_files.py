"""Reading of preference files and annotations in their published formats."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from bpo.formats.files import group_from_json, group_to_json, read_annotations, read_groups
from bpo.formats.importers.preferences import group_from_sharegpt
from bpo.formats.problems import RecordError
from bpo.records import Completion, ContentPart, PreferenceGroup, Provenance, Turn
from tests.conftest import FUZZ

IMAGE = ContentPart("image")


def text(value: str) -> ContentPart:
    return ContentPart("text", value)


def group_json(**changes: Any) -> dict[str, Any]:
    obj = {
        "id": "a",
        "image": "x.png",
        "prompt": "What is this?",
        "completions": [
            {"response": "A bus.", "score": 1, "type": "gt"},
            {"response": "A tram.", "score": 0, "type": "mllm-hal", "provenance": {"source": "weaken", "seed": 3}},
        ],
    }
    return {key: value for key, value in (obj | changes).items() if value is not ...}


GT, OTHER = group_json()["completions"]


def write(path: Path, *records: Any) -> Path:
    path.write_text("\n".join(json.dumps(record) for record in records) + "\n", encoding="utf-8")
    return path


def write_list(path: Path, *records: Any) -> Path:
    path.write_text(json.dumps(list(records), indent=1), encoding="utf-8")
    return path


def conversation(*turns: str, image: Any = "x.png", record_id: str = "a") -> dict[str, Any]:
    speakers = ("human", "gpt")
    return {
        "id": record_id,
        "image": image,
        "conversations": [{"from": speakers[n % 2], "value": value} for n, value in enumerate(turns)],
    }


# groups.jsonl


def test_images_come_before_a_plain_text_prompt(tmp_path: Path) -> None:
    path = write(tmp_path / "g.jsonl", group_json(images=["x.png", "y.png"], image=..., prompt="Explain it."))
    (group,) = read_groups(path)
    assert group.prompt == (Turn("user", (IMAGE, IMAGE, text("Explain it."))),)
    assert group.images == ("x.png", "y.png")
    assert group.completions[0] == Completion("A bus.", 1.0, "gt")
    assert group.completions[1].provenance == Provenance("weaken", seed=3)


def test_turns_with_text_and_with_structured_content(tmp_path: Path) -> None:
    turns = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [{"type": "text", "text": "Look:"}, {"type": "image"}]},
        {"role": "assistant", "content": "A street."},
        {"role": "user", "content": "And what drives there?"},
    ]
    (group,) = read_groups(write(tmp_path / "g.jsonl", group_json(prompt=turns)))
    assert group.prompt == (
        Turn("system", (text("Be brief."),)),
        Turn("user", (text("Look:"), IMAGE)),
        Turn("assistant", (text("A street."),)),
        Turn("user", (text("And what drives there?"),)),
    )


def test_turns_without_image_parts_get_the_images_in_the_first_user_turn(tmp_path: Path) -> None:
    turns = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "What is this?"}]
    (group,) = read_groups(write(tmp_path / "g.jsonl", group_json(prompt=turns)))
    assert group.prompt[1].content == (IMAGE, text("What is this?"))


def test_blank_lines_bom_and_unusual_line_separators_are_accepted(tmp_path: Path) -> None:
    first = json.dumps(group_json(prompt="one\u2028line"), ensure_ascii=False)
    second = json.dumps(group_json(id="b"))
    (tmp_path / "g.jsonl").write_bytes(b"\xef\xbb\xbf" + f"\n{first}\r\n\n{second}".encode())
    groups = read_groups(tmp_path / "g.jsonl")
    assert [group.id for group in groups] == ["a", "b"]
    assert groups[0].prompt[0].text == "one\u2028line"


_TEXTS = st.text(st.characters(exclude_categories=["Cs"]), max_size=12)
_ANSWERS = _TEXTS.filter(lambda value: bool(value.strip()))
_PROVENANCES = st.none() | st.builds(
    Provenance,
    source=_ANSWERS,
    model=st.none() | _TEXTS,
    noise_step=st.none() | st.integers(0, 999),
    temperature=st.none() | st.floats(0, 2),
    seed=st.none() | st.integers(),
)
_COMPLETIONS = st.builds(Completion, _ANSWERS, st.floats(allow_nan=False, allow_infinity=False), _ANSWERS, _PROVENANCES)
_TURNS = st.builds(
    Turn, st.sampled_from(["user", "assistant", "system"]), st.lists(_TEXTS.map(text), max_size=3).map(tuple)
)


@given(st.lists(_TURNS, max_size=3), st.lists(_COMPLETIONS, min_size=2, max_size=4), st.integers(1, 3), _ANSWERS)
@settings(max_examples=60 * FUZZ, deadline=None)
def test_a_group_survives_the_round_trip(
    turns: list[Turn], completions: list[Completion], num_images: int, group_id: str
) -> None:
    prompt = (*turns, Turn("user", (IMAGE,) * num_images))
    images = tuple(f"{n}.png" for n in range(num_images))
    group = PreferenceGroup(group_id, images, prompt, tuple(completions))
    assert group_from_json(json.loads(json.dumps(group_to_json(group))), "here") == group


def test_a_weight_is_written_only_if_it_is_not_1() -> None:
    group = group_from_json(group_json(completions=[GT, OTHER | {"weight": 0.25}]), "here")
    assert [completion.weight for completion in group.completions] == [1.0, 0.25]
    assert ["weight" in entry for entry in group_to_json(group)["completions"]] == [False, True]


@pytest.mark.parametrize("weight", ["1", True, -1e-9, 1e7, [1.0]])
def test_a_weight_that_is_no_number_or_out_of_range_names_the_completion(weight: Any) -> None:
    record = group_json(completions=[GT, OTHER | {"weight": weight}])
    with pytest.raises(RecordError, match=r"here.*completions\[1\].weight is .*from 0 .* to 1e\+06, or absent for 1"):
        group_from_json(record, "here")


def test_the_weight_of_another_formats_turn_is_not_the_weight_of_the_pair() -> None:
    turns = [{"from": "human", "value": "<image>What?"}]
    answers = {name: {"from": "gpt", "value": name, "weight": 0} for name in ("chosen", "rejected")}
    group = group_from_sharegpt({"conversations": turns, "images": ["x.png"], **answers}, "a", "here")
    assert isinstance(group, PreferenceGroup)
    assert [(c.weight, c.extra) for c in group.completions] == [(1.0, {"source_weight": 0})] * 2
    assert group_from_json(group_to_json(group), "here") == group


def test_unknown_fields_are_kept(tmp_path: Path) -> None:
    record = group_json(
        tag={"split": [1, None]}, completions=[GT | {"annotator": 7}, OTHER], image=..., images=["x.png"]
    )
    (group,) = read_groups(write(tmp_path / "g.jsonl", record))
    assert group.extra == {"tag": {"split": [1, None]}} and group.completions[0].extra == {"annotator": 7}
    assert group_to_json(group)["tag"] == record["tag"]
    assert group_to_json(group)["completions"][0]["annotator"] == 7


def test_a_group_without_images_has_an_empty_list() -> None:
    group = group_from_json(group_json(image=..., images=[], prompt="Explain tags."), "here")
    assert group.images == () and group.prompt[0].text == "Explain tags."


@pytest.mark.parametrize(
    "record, message",
    [
        (group_json(id=...), "'id' is missing"),
        (group_json(id=True), "'id' is True"),
        (group_json(image=...), "'images' is None"),
        (group_json(image=[""]), r"'images' is \[''\]"),
        (group_json(images=["y.png"]), "both present"),
        (group_json(prompt=...), "'prompt' is missing"),
        (group_json(prompt=[{"role": "gpt", "content": "x"}]), "role 'gpt'"),
        (group_json(prompt=[{"role": "assistant", "content": "x"}]), "ends with role 'assistant'"),
        (
            group_json(prompt=[{"role": "user", "content": [{"type": "image"}] * 2}]),
            "2 image parts and 0 <image> markers for 1 images",
        ),
        (group_json(prompt=[{"role": "user", "content": [{"type": "image_url"}]}]), r"prompt\[0\].content\[0\]"),
        (group_json(completions=[GT]), "at least two"),
        (group_json(completions=[GT, {"score": 0, "type": "x"}]), r"completions\[1\]: field 'response' is missing"),
        (group_json(completions=[GT, OTHER | {"response": 7}]), r"completions\[1\].response is int, not text"),
        (group_json(completions=[GT, OTHER | {"response": " "}]), "response is empty"),
        (group_json(completions=[GT, OTHER | {"response": "\ud800"}]), "surrogate"),
        (group_json(completions=[GT, OTHER | {"score": float("nan")}]), "NaN is not a JSON number"),
        (group_json(completions=[GT, OTHER | {"score": "0"}]), r"score is '0'; it must be a finite number"),
        (group_json(completions=[GT, OTHER | {"score": True}]), "score is True"),
        (group_json(completions=[GT, OTHER | {"score": 10**400}]), "score is 1000"),
        (group_json(completions=[GT, OTHER | {"provenance": {"source": "x", "beam": 3}}]), "unknown key 'beam'"),
        ({"id": "a", "conversations": []}, "annotation file"),
        ([1], "not an object"),
    ],
)
def test_a_bad_group_is_refused_by_file_line_and_field(tmp_path: Path, record: Any, message: str) -> None:
    path = write(tmp_path / "g.jsonl", group_json(id="good"), record)
    with pytest.raises(ValueError, match=message) as caught:
        read_groups(path)
    assert f"{path}, line 2" in str(caught.value)


def test_broken_files_are_named(tmp_path: Path) -> None:
    path = tmp_path / "g.jsonl"
    path.write_text(json.dumps(group_json()).replace('"score": 0', '"score": 1e999'))
    with pytest.raises(ValueError, match="score is inf"):
        read_groups(path)
    path.write_text(json.dumps(group_json()) + '\n{"id": "b", ')
    with pytest.raises(ValueError, match="line 2: not JSON"):
        read_groups(path)
    path.write_bytes(json.dumps(group_json()).encode() + b'\n{"id": "\xff"}')
    with pytest.raises(ValueError, match="line 2: byte 8 .* is not UTF-8"):
        read_groups(path)
    path.write_text("[" * 100_000)
    with pytest.raises(ValueError, match="nested too deeply|not JSON"):
        read_groups(path)
    with pytest.raises(ValueError, match="cannot be read"):
        read_groups(tmp_path / "missing.jsonl")
    with pytest.raises(ValueError, match="line 2.*id 'a' is used twice"):
        read_groups(write(path, group_json(), group_json()))


# The paper's released JSON


def test_the_released_schema_is_read(tmp_path: Path) -> None:
    completions = [
        {"score": 1, "response": "A bus.", "type": "gt"},
        {"score": 0, "response": "A tram.", "type": "mllm-hal", "extra": "ignored"},
        {"score": 0, "response": "A lorry.", "type": "llm-hal"},
    ]
    image = "coco/train2017/000000033471.jpg"
    path = write_list(
        tmp_path / "bpo_instruct.json",
        {"prompt": "What is this?\n<image>", "image": image, "completions": completions},
        {"id": 33471, "prompt": "<image>\nHow does it look?", "image": image, "completions": completions},
        {"id": 33471, "prompt": "What?", "image": image, "completions": completions},
    )
    groups = read_groups(path)
    assert [group.id for group in groups] == ["record-0", "33471", "33471#2"]
    assert groups[0].prompt == (Turn("user", (IMAGE, text("What is this?"))),)
    assert groups[1].prompt == (Turn("user", (IMAGE, text("How does it look?"))),)
    assert groups[2].prompt == (Turn("user", (IMAGE, text("What?"))),)
    assert [c.type for c in groups[0].completions] == ["gt", "mllm-hal", "llm-hal"]
    assert groups[0].images == (image,)


# LLaVA conversations


def test_the_last_answer_is_the_response_and_earlier_turns_are_the_prompt(tmp_path: Path) -> None:
    record = conversation("<image>\nWhat is this?", "A bus.", "What colour?", "Red.\n")
    (annotation,) = read_annotations(write_list(tmp_path / "a.json", record)).annotations
    assert annotation.response == "Red."
    assert annotation.prompt == (
        Turn("user", (IMAGE, text("What is this?"))),
        Turn("assistant", (text("A bus."),)),
        Turn("user", (text("What colour?"),)),
    )


@pytest.mark.parametrize(
    "image, value, content",
    [
        ("x.png", "<image>\nWhat?", (IMAGE, text("What?"))),
        ("x.png", "What?\n<image>", (IMAGE, text("What?"))),
        ("x.png", "Before <image> after", (IMAGE, text("Before  after"))),
        ("x.png", "<image>", (IMAGE,)),
        ("x.png", "What?", (IMAGE, text("What?"))),
        (["x", "y"], "<image>\n<image>\nCompare.", (IMAGE, IMAGE, text("Compare."))),
        (["x", "y"], "First: <image> second: <image>", (text("First: "), IMAGE, text(" second: "), IMAGE)),
        (["x", "y"], "<image>\r\n<image>\r\nCompare\r\nthem.", (IMAGE, IMAGE, text("Compare\nthem."))),
        (["x", "y"], "Compare with <image>.", (IMAGE, text("Compare with "), IMAGE, text("."))),
    ],
)
def test_image_markers(tmp_path: Path, image: Any, value: str, content: tuple[ContentPart, ...]) -> None:
    path = write_list(tmp_path / "a.json", conversation(value, "An answer.", image=image))
    (annotation,) = read_annotations(path).annotations
    assert annotation.prompt == (Turn("user", content),)


def test_markers_over_several_turns(tmp_path: Path) -> None:
    late = conversation("Hello, do you know <b>?", "Hi <image>.", "<image>\nWhat?", "A bus.")
    told = conversation("<image>\nWhat?", "A bus.", record_id="d")
    told["conversations"].insert(1, {"from": "system", "value": "Be brief."})
    answered = conversation("Hello?", "Hi <image>.", "What?", "A bus.", record_id="c")
    spread = conversation("<image>\nOne?", "A bus.", "<image>\nTwo?", "A tram.", image=["x", "y"], record_id="b")
    annotations = read_annotations(write(tmp_path / "a.jsonl", late, spread, answered, told)).annotations
    assert [turn.num_images for turn in annotations[0].prompt] == [0, 0, 1]
    assert annotations[0].prompt[1].text == "Hi <image>."
    assert annotations[3].prompt == (Turn("user", (IMAGE, text("What?"))), Turn("system", (text("Be brief."),)))
    assert [turn.num_images for turn in annotations[1].prompt] == [1, 0, 1]
    assert [turn.num_images for turn in annotations[2].prompt] == [1, 0, 0]


def test_unusable_records_are_counted_by_reason(tmp_path: Path) -> None:
    text_only = {"id": "t", "conversations": conversation("Hi", "Hello")["conversations"]}
    gpt_first = conversation("Hi", "<image>\nWhat?", "A bus.", record_id="g")
    for turn, speaker in zip(gpt_first["conversations"], ("gpt", "human", "gpt"), strict=True):
        turn["from"] = speaker
    twice = conversation("<image>\nWhat?", "A bus.", "A red bus.", record_id="2")
    twice["conversations"][2]["from"] = "gpt"
    path = write_list(
        tmp_path / "a.json",
        conversation("<image>\nWhat?", "A bus."),
        text_only,
        conversation("<image>\nWhat?", record_id="unanswered"),
        conversation("<image>\nWhat?", " ", record_id="blank"),
        gpt_first,
        twice,
    )
    file = read_annotations(path)
    assert [annotation.id for annotation in file.annotations] == ["a"]
    assert file.skipped == {
        "text only": ("t",),
        "no answer": ("unanswered", "blank"),
        "turns do not alternate": ("g", "2"),
    }


def test_repeated_and_missing_ids_become_unique(tmp_path: Path) -> None:
    records = [conversation("What?", "This.") for _ in range(3)]
    del records[2]["id"]
    annotations = read_annotations(write_list(tmp_path / "a.json", *records)).annotations
    assert [annotation.id for annotation in annotations] == ["a", "a#2", "record-2"]


@pytest.mark.parametrize(
    "record, message",
    [
        ({"id": "a", "image": "x.png", "conversations": 1}, "'conversations' must be a list"),
        (conversation("What?", "This.", image=7), "'image' is 7"),
        (conversation("What?", 7), r"conversations\[1\].value is int"),  # type: ignore[arg-type]
        ({"id": "a", "image": "x", "conversations": [{"from": "bot", "value": "x"}]}, "from is 'bot'"),
        (group_json(), "data.groups"),
    ],
)
def test_a_bad_annotation_is_refused_by_record_and_field(tmp_path: Path, record: Any, message: str) -> None:
    with pytest.raises(ValueError, match=message) as caught:
        read_annotations(write_list(tmp_path / "a.json", record))
    assert "record 0" in str(caught.value)
