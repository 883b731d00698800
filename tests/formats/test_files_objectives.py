"""Fields of groups for objectives: betas, weights of characters, flags, views, other images, auxiliary prompts."""

from __future__ import annotations

import io
import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bpo.formats.bad_records import BadRecords
from bpo.formats.check import check_data
from bpo.formats.convert import convert
from bpo.formats.exporters import trl_rows, write_jsonl
from bpo.formats.files import group_from_json, group_to_json, iterate_groups, read_annotations, read_groups
from bpo.formats.image_folder import ImageFolder
from bpo.formats.problems import RecordError
from bpo.formats.usable import distinct_answers, keep_types
from bpo.records import Auxiliary, Completion, ContentPart, PreferenceGroup, Turn
from tests.formats.test_convert import PNG
from tests.formats.test_files import GT, IMAGE, OTHER, group_json, text, write

ROOT = Path(__file__).resolve().parent.parent.parent
START = {"role": "assistant", "content": "It is a "}
QUESTION = {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]}


def answered(**changes: Any) -> dict[str, Any]:
    """A group with changes to its second completion, `A tram.`"""
    return group_json(completions=[GT, OTHER | changes])


def everything(record_id: str = "a") -> dict[str, Any]:
    """A group with every field."""
    return {
        "id": record_id,
        "images": ["0.png"],
        "other_images": ["1.png"],
        "prompt": [QUESTION, START],
        "completions": [
            {"response": "bus.", "score": 1.0, "type": "gt", "beta": 1.5, "weights": [[0, 3, 2.0], [3, 4, 0.0]]},
            {"response": "tram.", "score": 0.0, "type": "mllm-hal", "weight": 0.5, "note": "x"},
            {"response": "ship.", "score": 1.0, "type": "gt", "beta": 0.25, "weights": [[1, 2, 3.0]], "view": "other"},
            {"response": "car.", "score": -1.0, "type": "llm-hal", "weights": [[0, 4, 1.0]], "explored": True},
            {"response": "van.", "score": 0.5, "type": "mllm-greedy", "paired": False, "explored": True},
        ],
        "auxiliary": [{"prompt": [QUESTION], "response": "A vehicle."}],
        "split": "train",
    }


def test_every_field_is_read() -> None:
    group = group_from_json(everything(), "here")
    question = Turn("user", (IMAGE, text("What is this?")))
    assert group.other_images == ("1.png",) and group.extra == {"split": "train"}
    assert group.prompt == (question, Turn("assistant", (text("It is a "),)))
    assert group.auxiliary == (Auxiliary((question,), "A vehicle."),)
    assert group.completions[0].token_weights == ((0, 3, 2.0), (3, 4, 0.0))
    assert [c.beta for c in group.completions] == [1.5, 1.0, 0.25, 1.0, 1.0]
    assert [c.view for c in group.completions] == ["", "", "other", "", ""]
    assert [(c.paired, c.explored) for c in group.completions] == [(True, False)] * 3 + [(True, True), (False, True)]
    assert group.completions[1].extra == {"note": "x"}


def test_the_example_of_the_documentation_is_a_group() -> None:
    example = (ROOT / "docs" / "data.md").read_text(encoding="utf-8").split("```json\n")[1].split("```")[0]
    group = group_from_json(json.loads(example), "here")
    (start, end, weight), _ = group.completions[1].token_weights
    assert group.completions[1].response[start:end] == "tram" and weight == 2.5
    assert group.prompt[-1].text == "It is driving." and group.completions[2].view == "other" and group.auxiliary


def test_a_file_that_bpo_has_written_is_the_same_bytes_after_a_round_trip(tmp_path: Path) -> None:
    old = [group_json(image=..., images=["x.png"], id=str(n), tag=[n]) for n in range(2)]
    plain = [group_from_json(record, "here") for record in old]
    for name, groups in (("old", plain), ("new", [group_from_json(everything(), "here")])):
        write_jsonl(groups, tmp_path / f"{name}.jsonl")
        convert(tmp_path / f"{name}.jsonl", tmp_path / "again.jsonl")
        assert (tmp_path / "again.jsonl").read_bytes() == (tmp_path / f"{name}.jsonl").read_bytes()
    written = json.loads((tmp_path / "old.jsonl").read_text().splitlines()[0])
    assert list(written) == ["id", "images", "prompt", "completions", "tag"]
    assert [list(entry) for entry in written["completions"]] == [
        ["response", "score", "type"],
        ["response", "score", "type", "provenance"],
    ]


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for number in range(2):
        Image.new("RGB", (4, 4), (number * 60, 0, 0)).save(tmp_path / f"{number}.png")
    write(tmp_path / "g.jsonl", everything("a"), everything("b"))
    return tmp_path


@pytest.mark.parametrize(("name", "target"), [("p.json", None), ("t.jsonl", "trl"), ("again.jsonl", None)])
def test_every_field_survives_conversion(folder: Path, name: str, target: Any) -> None:
    convert(folder / "g.jsonl", folder / name, target=target)
    assert read_groups(folder / name) == read_groups(folder / "g.jsonl")


def test_other_images_are_embedded_in_parquet_and_written_back(folder: Path) -> None:
    convert(folder / "g.jsonl", folder / "t.parquet", image_root=folder)
    convert(folder / "t.parquet", folder / "back.jsonl", images=ImageFolder(folder / "images"))
    assert read_groups(folder / "back.jsonl") == read_groups(folder / "g.jsonl")
    assert (folder / "images" / "1.png").read_bytes() == (folder / "1.png").read_bytes()


def test_paths_of_other_images_become_relative_and_embedded_ones_files(folder: Path) -> None:
    embedded = everything() | {"images": [f"{folder}/0.png"], "other_images": [f"data:image/png;base64,{PNG}"]}
    absolute = everything("b") | {"other_images": [f"{folder}/1.png"]}
    write(folder / "mixed.jsonl", embedded, absolute)
    convert(folder / "mixed.jsonl", folder / "out.jsonl", images=ImageFolder(folder), image_root=folder)
    first, second = read_groups(folder / "out.jsonl")
    assert first.images == ("0.png",) and second.other_images == ("1.png",)
    assert Image.open(folder / first.other_images[0]).size == (9, 9)


def test_rows_of_trl_are_pairs_about_the_groups_own_images(folder: Path) -> None:
    rows = list(trl_rows(group_from_json(everything(), "here")))
    pairs = [tuple(row[side][0]["content"][0]["text"] for side in ("chosen", "rejected")) for row in rows]
    assert pairs == [("bus.", "tram."), ("bus.", "car."), ("tram.", "car.")]
    assert [turn["role"] for turn in rows[0]["prompt"]] == ["user", "assistant"]
    described = [GT | {"view": "other"}, OTHER, OTHER | {"response": "A car."}]
    write(
        folder / "no_pair.jsonl", group_json(images=["0.png"], image=..., other_images=["1.png"], completions=described)
    )
    bad = BadRecords("quarantine", max_bad_share=1.0)
    assert convert(folder / "no_pair.jsonl", folder / "t.jsonl", target="trl", bad=bad).num_written == 0
    assert [(problem.code, problem.record_id) for problem in bad.problems] == [("no-preference", "a")]


def test_a_missing_other_image_is_a_problem_of_its_record(folder: Path) -> None:
    (folder / "1.png").unlink()
    quarantine = io.BytesIO()
    result = check_data(folder / "g.jsonl", image_root=folder, quarantine=quarantine)
    assert result.counts["image-missing"] == 2 and result.num_trained == 0
    assert [json.loads(entry)["record"] for entry in quarantine.getvalue().splitlines()] == ["a", "b"]


@pytest.mark.parametrize(
    ("code", "record", "message"),
    [
        ("invalid-beta", answered(beta=0), r"completions\[1\].beta is 0; it must be a number above 0, up to 1e\+06"),
        ("invalid-beta", answered(beta=True), "beta is True"),
        ("invalid-beta", answered(beta="2"), "beta is '2'"),
        ("invalid-beta", answered(beta=1e7), "beta is 10000000.0"),
        (
            "invalid-weights",
            answered(weights=3),
            r"completions\[1\].weights\[0\] is 3; write a list of \[start, end, w",
        ),
        ("invalid-weights", answered(weights=[[0, 8, 1]]), "integers 0 <= start < end <= 7 "),
        ("invalid-weights", answered(weights=[[2, 2, 1]]), r"is \[2, 2, 1\]"),
        ("invalid-weights", answered(weights=[[-1, 2, 1]]), r"is \[-1, 2, 1\]"),
        ("invalid-weights", answered(weights=[[0, 3, 1], [2, 4, 1]]), r"weights\[1\] is .* integers 3 <= start"),
        ("invalid-weights", answered(weights=[[4, 5, 1], [0, 2, 1]]), r"weights\[1\] is "),
        ("invalid-weights", answered(weights=[[0, 2.0, 1]]), "integers"),
        ("invalid-weights", answered(weights=[[0, 2, -1]]), "a weight from 0 to 1e"),
        ("invalid-weights", answered(weights=[[0, 2, 2e6]]), "a weight from 0 to 1e"),
        ("invalid-weights", answered(weights=[[0, True, 1]]), "integers"),
        ("invalid-weights", answered(weights=[[0, 2]]), r"is \[0, 2\]"),
        ("invalid-view", answered(view="other"), r"completions\[1\] has the view 'other', but .* no other_images"),
        ("invalid-view", answered(view="noise") | {"other_images": ["y.png"]}, "view is 'noise'; write \"other\""),
        ("invalid-view", answered(view=["other"]), r"view is \['other'\]"),
        ("invalid-flag", answered(paired=0), r"completions\[1\].paired is 0; write true or false"),
        ("invalid-flag", answered(explored="yes"), "explored is 'yes'"),
        (
            "invalid-flag",
            answered(view="other", explored=True) | {"other_images": ["y.png"]},
            r"completions\[1\] is explored, but describes other_images",
        ),
        ("other-images", group_json(other_images=["y.png", "z.png"]), "has 2 images, but 'images' has 1"),
        ("wrong-type", group_json(other_images=7), "'other_images' is 7; write image paths"),
        ("image-no-path", group_json(other_images=[""]), "'other_images' is"),
        ("wrong-type", group_json(auxiliary={"prompt": "What?"}), "'auxiliary' must be a list"),
        ("wrong-type", group_json(auxiliary=["What?"]), r"auxiliary\[0\] must be an object"),
        ("missing-field", group_json(auxiliary=[{"prompt": "What?"}]), r"auxiliary\[0\]: field 'response' is missing"),
        (
            "empty-text",
            group_json(auxiliary=[{"prompt": "What?", "response": " "}]),
            r"auxiliary\[0\]: response is empty",
        ),
        ("unknown-key", group_json(auxiliary=[{"prompt": "?", "response": "x", "score": 1}]), "unknown key 'score'"),
        ("image-parts", group_json(auxiliary=[{"prompt": "<image><image>", "response": "x"}]), r"auxiliary\[0\]"),
        ("turn-order", group_json(auxiliary=[{"prompt": [QUESTION, START], "response": "x"}]), "must be the user's$"),
        ("turn-order", group_json(prompt=[START]), "'assistant'; .* user's, or the start of the answer directly after"),
        ("turn-order", group_json(prompt=[QUESTION, START, START]), "ends with role 'assistant'"),
        ("turn-order", group_json(prompt=[QUESTION, {"role": "system", "content": "x"}]), "ends with role 'system'"),
        ("empty-text", group_json(prompt=[QUESTION, START | {"content": " \n"}]), "start of the answer, is empty"),
        (
            "image-parts",
            group_json(image=["x.png"] * 2, prompt=[QUESTION, START | {"content": [{"type": "image"}]}]),
            "start of the answer, has an image",
        ),
    ],
)
def test_a_bad_field_is_named_by_code_record_and_fix(
    tmp_path: Path, code: str, record: dict[str, Any], message: str
) -> None:
    path = write(tmp_path / "g.jsonl", group_json(id="good"), record)
    with pytest.raises(RecordError, match=message) as caught:
        read_groups(path)
    assert caught.value.code == code and f"{path}, line 2 (id 'a')" in str(caught.value)
    quarantine = io.BytesIO()
    result = check_data(path, opens_images=False, quarantine=quarantine)
    assert result.counts == {code: 1} and len(quarantine.getvalue().splitlines()) == 1
    assert [group.id for group in iterate_groups(path, BadRecords("quarantine"))] == ["good"]


def test_a_prompt_of_an_annotation_still_ends_with_the_user(tmp_path: Path) -> None:
    record = {"id": "a", "images": ["x.png"], "prompt": [QUESTION, START], "response": "bus."}
    with pytest.raises(RecordError, match="'assistant'; the last turn must be the user's$"):
        read_annotations(write(tmp_path / "a.jsonl", record))


def test_a_row_of_trl_that_bpo_did_not_write_has_no_start(tmp_path: Path) -> None:
    row = {"images": ["x.png"], "prompt": [QUESTION, START], "chosen": "bus.", "rejected": "tram."}
    with pytest.raises(RecordError, match="the last turn must be the user's$"):
        read_groups(write(tmp_path / "t.jsonl", row))


def test_fields_of_that_name_in_other_formats_are_kept_apart(tmp_path: Path) -> None:
    turns = [{"from": "human", "value": "<image>What?"}]
    answers = {name: {"from": "gpt", "value": name, "beta": 2, "view": 1} for name in ("chosen", "rejected")}
    row = {"conversations": turns, "images": ["x.png"], "other_images": [["y"]], "auxiliary": 3, **answers}
    (group,) = read_groups(write(tmp_path / "s.jsonl", row))
    assert group.extra["source_other_images"] == [["y"]] and group.extra["source_auxiliary"] == 3
    assert group.completions[0].extra == {"source_beta": 2, "source_view": 1}
    assert group_from_json(group_to_json(group), "here") == group


def test_spans_stay_at_their_characters_when_line_breaks_become_lf(tmp_path: Path) -> None:
    response = "A\r\nbus\r\nor\r\n"
    spans = [[1, 2, 5.0], [2, 3, 6.0], [3, 6, 2.0], [6, 9, 3.0], [10, 12, 4.0]]
    changes = {"auxiliary": [{"prompt": "Why?\r\n", "response": "So\r\nit is."}], "prompt": [QUESTION, START]}
    changes["prompt"][1] = START | {"content": "It is\r\n"}
    record = group_json(completions=[GT | {"response": response, "weights": spans}, OTHER], **changes)
    (group,) = read_groups(write(tmp_path / "g.jsonl", record))
    best = group.completions[0]
    assert best.response == "A\nbus\nor\n"
    assert [(best.response[s:e], w) for s, e, w in best.token_weights] == [
        ("\n", 6.0),
        ("bus", 2.0),
        ("\no", 3.0),
        ("\n", 4.0),
    ]
    assert group.auxiliary[0].response == "So\nit is." and group.auxiliary[0].prompt[0].text == "Why?\n"
    assert group.prompt[-1].text == "It is\n"


def test_a_marker_in_the_answer_of_an_auxiliary_prompt_leaves_the_record_out(tmp_path: Path) -> None:
    record = group_json(auxiliary=[{"prompt": "What?", "response": "<image> a bus"}])
    skipped: dict[str, list[str]] = {}
    assert read_groups(write(tmp_path / "g.jsonl", record), skipped=skipped) == ()
    assert skipped == {"marker-in-answer": ["a"]}


# Which completions are trained on


def described(*answers: tuple[str, float, str, str]) -> PreferenceGroup:
    completions = tuple(Completion(response, score, kind, view=view) for response, score, kind, view in answers)
    prompt = (Turn("user", (ContentPart("image"), text("What?"))),)
    return PreferenceGroup("g", ("x.png",), prompt, completions, {"a": 1}, ("y.png",), (Auxiliary(prompt, "A bus."),))


def test_types_keep_the_best_of_each_scene_and_the_other_fields() -> None:
    group = described(
        ("bus", 1.0, "gt", ""), ("tram", 0.0, "hal", ""), ("ship", 0.5, "gt", "other"), ("boat", 0.0, "hal", "other")
    )
    kept = keep_types(group, ["none of them"])
    assert [c.response for c in kept.completions] == ["bus", "ship"]
    assert replace(kept, completions=group.completions) == group


def test_answers_about_other_images_make_no_pair_but_are_kept(tmp_path: Path) -> None:
    def responses(group: PreferenceGroup) -> list[tuple[str, str, float]] | None:
        answers = distinct_answers(group.completions, lambda c: c.response)
        return None if answers is None else [(response, c.view, c.score) for response, c in answers]

    alone = described(("bus", 1.0, "gt", ""), ("ship", 0.0, "gt", "other"), ("boat", -1.0, "hal", "other"))
    assert responses(alone) is None
    both = described(
        ("bus", 1.0, "gt", ""), ("bus", 0.0, "hal", "other"), ("tram", 0.0, "hal", ""), ("bus", 2, "hal", "")
    )
    assert responses(both) == [("bus", "", 2), ("bus", "other", 0.0), ("tram", "", 0.0)]
    write_jsonl([alone], tmp_path / "g.jsonl")
    result = check_data(tmp_path / "g.jsonl", opens_images=False)
    assert result.counts["no-preference"] == 1 and result.unused == {"no-pair": 1}


def flagged(*answers: tuple[str, float, bool, bool]) -> PreferenceGroup:
    completions = (Completion(text, score, "x", paired=paired, explored=own) for text, score, paired, own in answers)
    return replace(described(("", 0.0, "x", "")), completions=tuple(completions))


def test_an_explored_answer_of_another_type_is_kept_without_pairs() -> None:
    group = flagged(
        ("bus", 1.0, True, False), ("tram", 0.0, True, True), ("van", 2.0, False, True), ("x", 0, False, False)
    )
    kept = keep_types(group, ["none of them"]).completions
    assert [(c.response, c.paired, c.explored) for c in kept] == [
        ("bus", True, False),  # the best of those in pairs
        ("tram", False, True),
        ("van", False, True),
    ]
    assert keep_types(group, []) == group
    assert keep_types(group, ["x"]).own_completions == group.own_completions


def test_equal_answers_are_paired_and_explored_if_any_of_them_is() -> None:
    group = flagged(("bus", 1.0, True, False), ("tram", 0.0, True, False), ("tram", 2.0, False, True))
    merged = distinct_answers(group.completions, lambda c: c.response)
    assert merged is not None and [(text, c.score, c.paired, c.explored) for text, c in merged] == [
        ("bus", 1.0, True, False),
        ("tram", 0.0, True, True),  # the score of its pairs
    ]
    alone = flagged(("bus", 1.0, True, False), ("tram", 0.0, False, True))
    assert distinct_answers(alone.completions, lambda c: c.response) is None


def test_a_file_whose_answers_are_in_no_pair_is_checked_and_exported_as_such(tmp_path: Path) -> None:
    group = flagged(("bus", 1.0, True, False), ("tram", 0.0, False, True))
    write_jsonl([group], tmp_path / "g.jsonl")
    result = check_data(tmp_path / "g.jsonl", opens_images=False)
    assert result.counts["no-preference"] == 1 and result.unused == {"no-pair": 1}
    with pytest.raises(RecordError, match="TRL needs pairs"):
        list(trl_rows(group))
