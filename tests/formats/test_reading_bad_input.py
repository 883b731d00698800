"""Every kind of bad input is reported by its code and does not affect other records."""

from __future__ import annotations

import io
import json
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bpo.formats.bad_records import BadRecords, TooManyBadRecords
from bpo.formats.check import check_data
from bpo.formats.files import read_annotations, read_groups
from bpo.formats.problems import PROBLEMS
from tests.formats.test_images_bad import BAD_IMAGES

GT = {"response": "A bus.", "score": 1, "type": "gt"}
OTHER = {"response": "A tram.", "score": 0, "type": "mllm-hal"}


def group(**changes: Any) -> dict[str, Any]:
    record = {"id": "bad", "images": ["good.png"], "prompt": "What is this?", "completions": [GT, OTHER]}
    return {key: value for key, value in (record | changes).items() if value is not ...}


def answer(**changes: Any) -> dict[str, Any]:
    """Returns a group with changes to its second completion."""
    return group(completions=[GT, {k: v for k, v in (OTHER | changes).items() if v is not ...}])


def conversation(*turns: Any, **changes: Any) -> dict[str, Any]:
    speakers = ("human", "gpt")
    spoken = [{"from": speakers[n % 2], "value": value} for n, value in enumerate(turns)]
    return {"id": "bad", "image": "good.png", "conversations": spoken} | changes


def line(record: Any) -> bytes:
    return json.dumps(record).encode()


GOOD_LINES = [line(group(id="first")), line(group(id="last"))]
# Code -> one bad line between two good groups.
BAD_GROUPS: list[tuple[str, bytes]] = [
    ("not-json", b"{'id': 'bad'}"),
    ("not-json", b'{"id": "bad"} {"id": "worse"}'),
    ("not-json", b'{"id": ' + b"9" * 5000 + b"}"),
    ("not-json", b"\x00\x00\x00\x00"),
    ("nan", b'{"id": "bad", "score": NaN}'),
    ("nan", b'{"id": "bad", "score": -Infinity}'),
    ("invalid-utf8", b'{"id": "\xff\xfe"}'),
    ("invalid-utf8", b'{"id": "caf\xe9"}'),
    ("not-an-object", b"[1, 2]"),
    ("not-an-object", b'"text"'),
    ("not-an-object", b"7"),
    ("not-an-object", b"null"),
    ("missing-field", line(group(id=...))),
    ("missing-field", line(group(id=None))),
    ("missing-field", line(group(prompt=...))),
    ("missing-field", line(group(completions=None))),
    ("missing-field", line(answer(score=...))),
    ("invalid-id", line(group(id=1.5))),
    ("invalid-id", line(group(id=[]))),
    ("invalid-id", line(group(id=""))),
    ("duplicate-id", line(group(id="first"))),
    ("wrong-type", line(group(images=7))),
    ("wrong-type", line(group(images=[None]))),
    ("wrong-type", line(group(images=..., image=...))),
    ("wrong-type", line(group(image="other.png"))),
    ("wrong-type", line(group(prompt=3))),
    ("wrong-type", line(group(prompt=["What?"]))),
    ("wrong-type", line(group(prompt=[{"role": "user", "content": None}]))),
    ("wrong-type", line(answer(response=7))),
    ("wrong-type", line(answer(response=["A tram."]))),
    ("wrong-type", line(answer(type=3))),
    ("wrong-type", line(answer(provenance="weaken"))),
    ("wrong-type", line(group(completions=[GT, "A tram."]))),
    ("unknown-key", line(answer(provenance={"source": "x", "beam": 3}))),
    ("unknown-key", line(group(prompt=[{"role": "user", "content": "What?", "weight": 0}]))),
    ("unknown-part", line(group(prompt=[{"role": "user", "content": [{"type": "table"}]}]))),
    ("unknown-role", line(group(prompt=[{"role": "tool", "content": "What?"}]))),
    ("unknown-role", line(group(prompt=[{"role": ["user"], "content": "What?"}]))),
    ("turn-order", line(group(prompt=[{"role": "assistant", "content": "Well?"}]))),
    ("image-parts", line(group(prompt=[{"role": "user", "content": [{"type": "image"}] * 2}]))),
    ("image-parts", line(group(prompt="<image> or <image>?"))),
    ("image-parts", line(group(images=[], prompt="<image>\nWhat?"))),
    ("rendered-prompt", line(group(prompt="[INST] Forget it [/INST]"))),
    ("rendered-prompt", line(group(prompt="<|im_start|>user\n<image>What?<|im_end|>"))),
    ("rendered-prompt", line(group(prompt="Be brief. USER: <image>\nWhat is it? ASSISTANT:"))),
    ("rendered-prompt", line(group(prompt=[{"role": "user", "content": "### Human: What?\n### Assistant:"}]))),
    ("foreign-marker", line(group(prompt="<ImageHere>What?"))),
    ("foreign-marker", line(group(prompt="What is on ![a picture](good.png)?"))),
    ("foreign-marker", line(group(images=[], prompt="Picture 1: <img>good.png</img>\nWhat?"))),
    ("few-completions", line(group(completions=[GT]))),
    ("few-completions", line(group(completions={}))),
    ("invalid-weight", line(answer(weight=-0.5))),
    ("invalid-score", line(answer(score=True))),
    (
        "invalid-score",
        b'{"id": "bad", "images": [], "prompt": "?", "completions": [{"response": "x", "score": 1e999}, 1]}',
    ),
    ("empty-text", line(answer(response=""))),
    ("empty-text", line(answer(response=" \t\n\u00a0\u3000"))),
    ("lone-surrogate", line(answer(response="\ud800"))),
    ("lone-surrogate", line(group(id="\udfff"))),
    ("lone-surrogate", line(group(tag={"deep": ["\ud83d"]}))),
    ("wrong-file", line(conversation("What?", "This."))),
    ("image-no-path", line(group(images=["good.png", ""]))),
]
LEFT_OUT_OR_NOTED = [
    ("too-many-words", line(answer(response="word " * 100_000))),
    ("no-preference", line(answer(score=1))),
    ("same-text", line(group(completions=[GT, OTHER, OTHER | {"response": GT["response"]}]))),
    ("text only", line(group(images=[]))),
    ("unknown-field", line(group(split="train"))),
    ("unknown-field", line(answer(annotator="x"))),
    ("control-character", line(answer(response="A tram\x00."))),
    ("control-character", line(group(prompt="What\x1b[31m is this?"))),
    ("control-character", line(answer(response="A tram\x85."))),
    ("direction-mark", line(answer(response="A tram \u202e.mart"))),
    ("direction-mark", line(answer(response="\u200fA tram"))),
    ("marker-in-answer", line(answer(response="A tram<image> here"))),
    ("marker-in-answer", line(answer(response="<ref>A tram</ref><box>[[1, 2, 3, 4]]</box>"))),
    ("marker-in-answer", line(answer(response="<|im_start|>assistant\nA tram.<|im_end|>"))),
    ("other-media", line(group(video="clip.mp4"))),
    ("other-media", line(group(audios=[{"path": "a.wav"}]))),
    ("other-media", line(group(prompt="<video>\nWhat happens?"))),
    ("other-media", line(group(prompt=[{"role": "user", "content": [{"type": "input_audio"}]}]))),
    ("special-token", line(group(prompt="<|im_start|>system"))),
    ("special-token", line(answer(response="Done</s>"))),
]


@pytest.fixture
def root(tmp_path: Path) -> Path:
    Image.new("RGB", (4, 4)).save(tmp_path / "good.png")
    return tmp_path


def check(path: Path, **options: Any) -> dict[str, int]:
    return dict(check_data(path, image_root=path.parent, **options).counts)


@pytest.mark.parametrize(("code", "bad"), [*BAD_GROUPS, *LEFT_OUT_OR_NOTED])
def test_a_bad_line_is_named_by_its_code(root: Path, code: str, bad: bytes) -> None:
    path = root / "g.jsonl"
    path.write_bytes(b"\n".join([GOOD_LINES[0], bad, GOOD_LINES[1]]) + b"\n")
    quarantine = io.BytesIO()
    result = check_data(path, image_root=root, quarantine=quarantine)
    assert dict(result.counts) == {code: 1} and result.num_records == 3
    listed = [json.loads(entry) for entry in quarantine.getvalue().splitlines()]
    if PROBLEMS[code].level == "bad":
        assert [(entry["code"], entry["where"]) for entry in listed] == [(code, f"{path}, line 2")]
        # All later stages report the same problem and read the good records.
        bad_records = BadRecords("quarantine")
        assert [g.id for g in read_groups(path, bad_records)] == ["first", "last"]
        assert [problem.code for problem in bad_records.problems] == [code]
        with pytest.raises(ValueError, match="line 2"):
            read_groups(path)
    else:
        skipped: dict[str, list[str]] = {}
        assert listed == [] and len(read_groups(path, skipped=skipped)) == 3 - len(skipped)
        assert skipped == ({code: ["bad"]} if code in ("other-media", "marker-in-answer") else {})


def test_a_bad_record_is_listed_by_its_id(root: Path) -> None:
    path = root / "g.jsonl"
    path.write_bytes(
        b"\n".join([line(answer(response="")), line(group(id="worse", prompt=3)), b'{"id": "torn'] + GOOD_LINES)
    )
    quarantine, bad = io.BytesIO(), BadRecords("quarantine")
    check_data(path, image_root=root, quarantine=quarantine)
    read_groups(path, bad)
    named = [json.loads(entry)["record"] for entry in quarantine.getvalue().splitlines()]
    assert named == ["bad", "worse", None] == [problem.record_id for problem in bad.problems]


def test_every_problem_code_is_tested() -> None:
    tested = {code for code, _ in [*BAD_GROUPS, *LEFT_OUT_OR_NOTED, *BAD_ANNOTATIONS]} | {
        code for code, _ in BAD_IMAGES
    }
    tested |= set("torn-record nested-too-deeply too-large rows-apart wrong-columns image-embedded one-label".split())
    tested |= set("different-prompts invalid-beta invalid-weights invalid-view invalid-flag other-images".split())
    assert len(tested) >= 40
    # Not tested here: a model's image processor, and file permissions (which do not apply to root).
    assert set(PROBLEMS) - tested == {"image-refused", "image-unreadable"}


BAD_ANNOTATIONS: list[tuple[str, Any]] = [
    ("wrong-type", conversation("What?", 7)),
    ("wrong-type", conversation("What?", None)),
    ("wrong-type", conversation("What?", "This.", conversations="What?")),
    ("wrong-type", conversation("What?", "This.", conversations=[["human", "What?"]])),
    ("wrong-type", conversation("What?", "This.", image=5)),
    ("wrong-type", conversation("What?", "This.", images=["a.png"])),
    ("unknown-role", conversation("What?", "This.", conversations=[{"from": "bot", "value": "x"}])),
    ("unknown-role", conversation("What?", "This.", conversations=[{"from": {}, "value": "x"}])),
    ("no answer", conversation("What?")),
    ("no answer", conversation("What?", "  ")),
    ("text only", conversation("What?", "This.", image=None)),
    (
        "turns do not alternate",
        conversation(
            "What?",
            "This.",
            "Oh?",
            "That.",
            conversations=[
                {"from": "gpt", "value": "Hello"},
                {"from": "human", "value": "What?"},
                {"from": "gpt", "value": "This."},
            ],
        ),
    ),
    ("preference-field", conversation("What?", "This.", rejected="That.")),
    ("preference-field", conversation("What?", "This.", label=False)),
    ("repeated-id", conversation("What?", "This.", id="first")),
    ("lone-surrogate", conversation("What?", "Th\ud800is.")),
    ("invalid-id", conversation("What?", "This.", id=False)),
    ("unknown-field", conversation("What?", "This.", split="train")),
]


@pytest.mark.parametrize(("code", "bad"), BAD_ANNOTATIONS)
def test_a_bad_annotation_in_a_list_is_named_by_its_code(root: Path, code: str, bad: Any) -> None:
    path = root / "a.json"
    path.write_text(json.dumps([conversation("What?", "This.", id="first"), bad, conversation("A?", "B.", id="last")]))
    assert check(path) == {code: 1}
    bad_records = BadRecords("quarantine")
    ids = [annotation.id for annotation in read_annotations(path, bad_records).annotations]
    assert ids[0] == "first" and ids[-1] == "last"
    assert [p.code for p in bad_records.problems] == ([code] if PROBLEMS[code].level == "bad" else [])


# Damaged files


@pytest.mark.parametrize("cut", [1, 20, 60])
def test_a_truncated_last_line_invalidates_one_record(root: Path, cut: int) -> None:
    path = root / "g.jsonl"
    path.write_bytes(GOOD_LINES[0] + b"\n" + GOOD_LINES[1][:-cut])
    assert check(path) == {"torn-record": 1}
    assert [g.id for g in read_groups(path, BadRecords("quarantine"))] == ["first"]
    with pytest.raises(ValueError, match="line 2: not JSON .* truncated"):
        read_groups(path)


@pytest.mark.parametrize(
    ("text", "codes", "num_good"),
    [
        ("[{0}, {1}", {"torn-record": 1}, 2),
        ("[{0}, {1},", {"torn-record": 1}, 2),
        ('[{0}, {{"id": "torn", "conv', {"torn-record": 1}, 1),
        ("[{0} {1}]", {"not-json": 1}, 2),
        ("[{0},, {1}]", {"not-json": 1}, 2),
        ("[{0}, {1}, ]", {"not-json": 1}, 2),
        ("[{0}, nope, {1}]", {"not-json": 1}, 2),
        ('[{0}, {{"id": nope}}, {1}]', {"not-json": 1}, 2),
        ('[{0}, {{"id": "]}},"  "x"}}, {1}]', {"not-json": 1}, 2),
        ("[{0}] {1}", {"not-json": 1}, 2),
        ("[] {0}, {1}]", {"not-json": 1}, 2),
        ("[], {0}, {1}", {"not-json": 1}, 2),
        ("[{0}][{1}]", {"not-json": 1}, 2),
        ("[]\n[{0}, {1}]", {"not-json": 1}, 2),
        ("[{0}], {1}]", {"not-json": 1}, 2),
        ("[{0}, {1}] nothing", {"not-json": 1}, 2),
        ("[{0}, " + "[" * 5000 + "]" * 5000 + ", {1}]", {"nested-too-deeply": 1}, 2),
        ("[{0}, 12345, {1}]", {"not-an-object": 1}, 2),
    ],
)
def test_damage_in_a_list_invalidates_only_the_damaged_record(
    root: Path, text: str, codes: dict[str, int], num_good: int
) -> None:
    records = [json.dumps(conversation("What?", "This.", id=name)) for name in ("first", "last")]
    path = root / "a.json"
    path.write_text(text.replace("{0}", records[0]).replace("{1}", records[1]).replace("{{", "{").replace("}}", "}"))
    assert check(path) == codes
    assert len(read_annotations(path, BadRecords("quarantine")).annotations) == num_good


@pytest.mark.parametrize(
    ("whole", "damaged"),
    [
        ('This 7."', "This 7."),
        ('"This 7.', "This 7."),
        ("This 7", 'This "7'),
        ("]}", "}"),
        ("]}", "]"),
        ('"id"', 'id"'),
        (', "conversations"', ""),
        ("]}", "]]}"),
        ('"conversations"', '"conversatio'),
    ],
)
@pytest.mark.parametrize("size", [100, 1 << 20])
def test_a_missing_mark_or_bracket_invalidates_one_record(
    root: Path, monkeypatch: pytest.MonkeyPatch, whole: str, damaged: str, size: int
) -> None:
    monkeypatch.setattr("bpo.formats.jsonscan.CHUNK_BYTES", size)
    records = [json.dumps(conversation("What?", f"This {n}.", id=str(n))) for n in range(100)]
    for number in (7, 70):
        records[number] = records[number].replace(whole.replace("7", str(number)), damaged.replace("7", str(number)))
    path = root / "a.json"
    path.write_text("[" + ",\n".join(records) + "]")
    assert check(path) == {"not-json": 2}
    ids = [annotation.id for annotation in read_annotations(path, BadRecords("quarantine")).annotations]
    assert ids == [str(n) for n in range(100) if n not in (7, 70)]


@pytest.mark.parametrize("more", ["]", "}", "]}", '"', ", ", "} {"])
def test_an_extra_mark_or_bracket_invalidates_no_record(root: Path, more: str) -> None:
    records = [json.dumps(conversation("What?", f"This {n}.", id=str(n))) for n in range(100)]
    for number in (7, 70):
        records[number] += more
    path = root / "a.json"
    path.write_text("[" + ",\n".join(records) + "]")
    assert set(check(path)) == {"not-json"}
    assert len(read_annotations(path, BadRecords("quarantine")).annotations) == 100


def test_objects_in_a_damaged_record_are_not_records(root: Path) -> None:
    inner = [{"id": n, "box": [0, 0, 1, 1]} for n in range(3)]
    records = [json.dumps(conversation("What?", "This.", id=str(n), objects=inner)) for n in range(9)]
    path = root / "a.json"
    path.write_text("[" + ", ".join(records).replace('"What?"', "What?", 4).replace("What?", '"What?"', 3) + "]")
    result = check_data(path, image_root=root)
    assert (result.num_records, result.num_bad) == (9, 1)


def test_an_invalid_utf8_byte_in_a_list_invalidates_one_record(root: Path) -> None:
    records = [json.dumps(conversation("What?", answer, id=answer)) for answer in ("one", "caf?", "three")]
    path = root / "a.json"
    path.write_bytes(("[" + ",".join(records) + "]").encode().replace(b"caf?", b"caf\xe9"))
    assert check(path) == {"invalid-utf8": 1}
    assert [a.id for a in read_annotations(path, BadRecords("quarantine")).annotations] == ["one", "three"]


def test_an_unterminated_record_is_read_in_bounded_memory(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bpo.formats.jsonscan.MAX_RECORD_CHARACTERS", 1000)
    monkeypatch.setattr("bpo.formats.jsonscan.CHUNK_BYTES", 100)
    monkeypatch.setattr("bpo.formats.jsonfiles.MAX_RECORD_CHARACTERS", 1000)
    good = json.dumps(conversation("What?", "This."))
    (root / "a.json").write_text(f'[{good}, {{"id": "{"x" * 5000}"}}, {good}]')
    assert check(root / "a.json") == {"too-large": 1}
    (root / "g.jsonl").write_bytes(b"\n".join([GOOD_LINES[0], line(group(id="x" * 5000)), GOOD_LINES[1]]))
    assert check(root / "g.jsonl") == {"too-large": 1}


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.json", b"", "no record"),
        ("a.json", b"[]", "no record"),
        ("a.json", b"[] nothing", "the list ends here; what follows it is not read"),
        ("a.jsonl", b"\n \n", "no record"),
        ("a.bin", bytes(range(256)), "not a JSON list or JSONL"),
        ("a.json.gz", b"\x1f\x8b\x08\x00", "gzip data are damaged or cut off"),
        ("a.txt", b"Once upon a time", "not a JSON list"),
        ("a.json", b'[{"id": 1, "pictures": []}]', r"fields \['id', 'pictures'\] match no supported format"),
        ("a.csv", b"image,image\nx,y\n", "duplicate or empty names"),
        ("missing.json", None, "cannot be read"),
        ("folder", ..., "the folder has no"),
    ],
)
def test_a_file_in_an_unknown_format_is_refused(root: Path, name: str, content: Any, message: str) -> None:
    if content is ...:
        (root / name).mkdir()
    elif content is not None:
        (root / name).write_bytes(content)
    with pytest.raises(ValueError, match=message):
        check(root / name)


def test_the_error_lists_supported_schemas_and_missing_fields(root: Path) -> None:
    (root / "a.json").write_text(json.dumps([{"id": 1, "chosen": "x"}]))
    with pytest.raises(ValueError) as caught:
        check(root / "a.json")
    text = str(caught.value)
    assert "trl: TRL: prompt, chosen, rejected, images; missing: 'rejected'" in text
    assert all(f"\n  {name}: " in text for name in ("groups", "paper", "rlaif-v", "rlhf-v", "llava", "table"))


# Policy for bad records


def test_reading_stops_above_max_bad_share(root: Path) -> None:
    path = root / "g.jsonl"
    path.write_bytes(b"\n".join([*GOOD_LINES, b"{", line(group(id="d"))]) + b"\n")
    assert len(read_groups(path, BadRecords("quarantine", max_bad_share=0.25))) == 3
    with pytest.raises(TooManyBadRecords, match="1 of 4 records are bad.*line 3"):
        read_groups(path, BadRecords("quarantine", max_bad_share=0.24))


def test_the_list_of_bad_records_is_bounded(root: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr("bpo.formats.bad_records.MAX_LISTED", 3)
    path = root / "a.jsonl"
    path.write_text("".join([json.dumps(conversation("What?", "This.")) + "\n", *["{\n"] * 4]))
    with pytest.raises(TooManyBadRecords, match="a.jsonl, line 5: more than 3 records are bad"):
        read_annotations(path, BadRecords("quarantine"))
