"""Fuzzing: any input gives a record, an image or an error with a known code."""

from __future__ import annotations

import gzip
import io
import json
import random
from pathlib import Path
from typing import Any

import pyarrow
import pyarrow.parquet
import pytest
from hypothesis import HealthCheck, assume, example, given, settings
from hypothesis import strategies as st
from PIL import Image

from bpo.formats import jsonscan
from bpo.formats.bad_records import BadRecords
from bpo.formats.check import check_data
from bpo.formats.images import MAX_PIXELS, ImageError, decode_image
from bpo.formats.importers.preferences import PairRow
from bpo.formats.importers.registry import SCHEMAS, Schema
from bpo.formats.jsonfiles import Piece, json_pieces, read_records
from bpo.formats.problems import PROBLEMS, RecordError
from bpo.formats.reading import adapt
from bpo.formats.schema import annotation_from_json, annotation_to_json, group_from_json, group_to_json
from bpo.records import Annotation, PreferenceGroup
from tests.conftest import FUZZ

# Values in place of the expected ones: any JSON, including problematic texts.
TRAPS = [
    "",
    " ",
    "a.png",
    "../a",
    "/a",
    "http://a",
    "<image>",
    "\ud800",
    "\x00",
    "\u202e",
    "user",
    "assistant",
    "other",
    "gpt",
    "text",
    "image",
]
SCALARS = st.none() | st.booleans() | st.integers() | st.floats() | st.sampled_from(TRAPS) | st.text(max_size=5)
KEYS = st.sampled_from(
    "id idx image images prompt completions response score type provenance conversations messages from value role "
    "content text chosen rejected question system source bytes path caption bpo_group bpo_chosen bpo_rejected "
    "rejected_response rejected_messages rejected_images query instruction input history label annotations responses "
    "scores ranking beta weights weight view other_images auxiliary others bpo_other_images".split()
) | st.text(max_size=3)
VALUES = st.recursive(
    SCALARS, lambda inner: st.lists(inner, max_size=3) | st.dictionaries(KEYS, inner, max_size=4), max_leaves=12
)
PARTS = st.fixed_dictionaries(
    {"type": st.sampled_from(["text", "image", "image_url", 3])},
    optional={"text": SCALARS, "image": SCALARS | VALUES, "image_url": st.fixed_dictionaries({"url": SCALARS})},
)
CONTENTS = VALUES | st.lists(PARTS, max_size=3)
TURNS = st.fixed_dictionaries(
    {"role": st.sampled_from(["user", "assistant", "user", 3]), "content": CONTENTS}, optional={"at": VALUES}
)
SPOKEN = st.fixed_dictionaries({"from": st.sampled_from(["human", "gpt", None]), "value": SCALARS})
RATED = st.fixed_dictionaries({"response": SCALARS, "annotations": st.dictionaries(KEYS, VALUES, max_size=2) | VALUES})
COMPLETIONS = RATED | st.fixed_dictionaries(
    {"response": SCALARS | st.text(min_size=1, max_size=5), "score": SCALARS | st.integers(0, 1), "type": SCALARS},
    optional={
        "tag": VALUES,
        "beta": SCALARS | st.floats(0.1, 9),
        "weights": st.lists(st.tuples(st.integers(0, 3), st.integers(1, 4), st.floats(0, 9)), max_size=2) | VALUES,
        "view": st.just("other") | SCALARS,
    },
)
AUXILIARY = st.fixed_dictionaries(
    {"prompt": st.just("What?") | SCALARS | st.lists(TURNS, max_size=2), "response": SCALARS}
)
FIELDS: dict[str, Any] = {
    "id": SCALARS,
    "prompt": SCALARS | st.lists(TURNS, max_size=3) | VALUES,
    "images": st.lists(st.sampled_from(TRAPS), max_size=2) | VALUES,
    "completions": st.lists(COMPLETIONS, min_size=1, max_size=3) | VALUES,
    "other_images": st.lists(st.sampled_from(TRAPS), max_size=2) | VALUES,
    "auxiliary": st.lists(AUXILIARY, max_size=2) | VALUES,
    "bpo_other_images": st.lists(st.sampled_from(TRAPS), max_size=2) | VALUES,
    "conversations": st.lists(SPOKEN, max_size=4) | VALUES,
    "messages": st.lists(TURNS, max_size=4),
    "chosen": SCALARS | st.lists(TURNS, max_size=2),
    "rejected": SCALARS | st.lists(TURNS, max_size=2),
    "response": SCALARS,
    "question": SCALARS,
    "caption": SCALARS,
    "image": SCALARS | VALUES,
    "rejected_response": SCALARS | st.lists(TURNS | SCALARS, max_size=2),
    "rejected_images": VALUES,
    "query": SCALARS,
    "history": st.lists(st.lists(SCALARS, max_size=3) | TURNS, max_size=2) | VALUES,
    "label": SCALARS,
    "responses": st.lists(SCALARS, max_size=3),
    "scores": st.lists(SCALARS, max_size=3),
    "text": SCALARS | VALUES.map(lambda value: json.dumps(value)),
    "bpo_group": SCALARS | VALUES.map(lambda value: json.dumps(value)),
    "bpo_chosen": SCALARS | VALUES.map(lambda value: json.dumps(value)),
    "bpo_rejected": SCALARS | VALUES.map(lambda value: json.dumps(value)),
}
RECORDS = st.fixed_dictionaries({}, optional=FIELDS) | st.dictionaries(KEYS, VALUES, max_size=6)


@pytest.mark.parametrize("schema", SCHEMAS, ids=lambda schema: schema.name)
@given(record=RECORDS)
@settings(max_examples=120 * FUZZ, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_record_is_refused_or_survives_the_round_trip(schema: Schema, record: dict[str, Any]) -> None:
    piece = Piece("file, line 1", 0, False, json.dumps(record).encode())
    try:
        _, outcome = adapt(schema, piece)
    except RecordError as error:
        assert error.code in PROBLEMS and "file, line 1" in str(error)
        return
    if isinstance(outcome, PairRow):
        outcome = outcome.group
        if len(outcome.completions) == 1:  # an answer with a label: not a group yet
            return
    if isinstance(outcome, PreferenceGroup):
        again: Any = group_from_json(json.loads(json.dumps(group_to_json(outcome), ensure_ascii=False).encode()), "x")
    elif isinstance(outcome, Annotation):
        tree = json.loads(json.dumps(annotation_to_json(outcome), ensure_ascii=False).encode())
        again = annotation_from_json(tree, outcome.id, "x")
    else:
        assert outcome in PROBLEMS
        return
    assert again == outcome


@given(
    records=st.lists(st.dictionaries(KEYS, VALUES, max_size=3), max_size=6),
    indent=st.sampled_from([None, 1]),
    size=st.integers(1, 40),
)
@settings(max_examples=100 * FUZZ, deadline=None, suppress_health_check=list(HealthCheck))
def test_a_list_read_in_chunks_of_any_size_is_the_list(
    tmp_path: Path, records: list[dict[str, Any]], indent: int | None, size: int
) -> None:
    text = json.dumps(records, indent=indent, ensure_ascii=False)
    assume("NaN" not in text and "Infinity" not in text)
    assume(not any("\ud800" <= character <= "\udfff" for character in text))
    path = tmp_path / "a.json"
    path.write_text(text, encoding="utf-8")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonscan, "CHUNK_BYTES", size)
        assert [record.value for record in read_records(path)] == records


GOOD = {
    "id": "x",
    "image": "a.png",
    "conversations": [{"from": "human", "value": 'A "b" {c}'}, {"from": "gpt", "value": "[]"}],
}


LINES = [json.dumps(GOOD | {"id": str(n)}) for n in range(4)]
EDITS = st.tuples(st.integers(1, len("\n".join(LINES))), st.integers(0, 3), st.binary(max_size=3))


@given(edits=st.lists(EDITS, min_size=1, max_size=3), as_list=st.booleans(), size=st.sampled_from([7, 100, 1 << 20]))
@example(edits=[(1, 0, b"]")], as_list=True, size=1 << 20)  # the list ends before its first record
@example(edits=[(1, 0, b"],")], as_list=True, size=7)
@example(edits=[(1 + len(LINES[0]), 1, b"]")], as_list=True, size=7)
@example(edits=[(1, 0, b"\n")], as_list=False, size=7)
@example(edits=[(80, 3, b"\x80"), (344, 3, b"")], as_list=True, size=7)
@settings(max_examples=150 * FUZZ, deadline=None, suppress_health_check=list(HealthCheck))
def test_damaged_files_are_read_to_their_end(
    tmp_path: Path, edits: list[tuple[int, int, bytes]], as_list: bool, size: int
) -> None:
    content = bytearray(("[" + ",\n".join(LINES) + "]" if as_list else "\n".join(LINES) + "\n").encode())
    for start, length, replacement in edits:
        content[start : start + length] = replacement
    path = tmp_path / ("a.json" if as_list else "a.jsonl")
    path.write_bytes(content)
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(jsonscan, "CHUNK_BYTES", size)
        pieces = list(json_pieces(path))
        # An extra brace may join records and an extra quote may hide them, but nothing is read twice.
        assert len(pieces) <= 16 and all(piece.end_bytes <= len(content) for piece in pieces)
        num_whole = sum(line.encode() in content for line in LINES)
        try:
            result = check_data(path, opens_images=False)
        except ValueError as error:
            # It names the damage: a first record that swallows the others, a lone brace in the first line.
            assert str(path) in str(error) and (not num_whole or "contains no records" not in str(error))
        else:
            assert result.num_records == len(pieces) and set(result.counts) <= set(PROBLEMS)
            # No damage takes a record away in silence.
            assert result.num_bad or result.num_records >= num_whole


def pictures() -> list[bytes]:
    made = []
    picture = Image.effect_noise((24, 16), 60).convert("RGB")
    for form in ("PNG", "JPEG", "GIF", "BMP", "TIFF", "WEBP", "PPM"):
        buffer = io.BytesIO()
        picture.save(buffer, form)
        made.append(buffer.getvalue())
    return made


@pytest.mark.filterwarnings("ignore")
def test_damaged_pictures_are_pictures_or_refused() -> None:
    rng = random.Random(0)
    outcomes = {True: 0, False: 0}
    for content in pictures():
        for _ in range(60):
            damaged = bytearray(content)
            for _ in range(rng.randint(1, 6)):
                damaged[rng.randrange(min(len(damaged), rng.choice([32, 10**6])))] = rng.randrange(256)
            if rng.random() < 0.3:
                del damaged[rng.randrange(len(damaged)) :]
            try:
                picture = decode_image(bytes(damaged), "x")
            except ImageError as error:
                assert error.code in PROBLEMS and "'x'" in str(error)
                outcomes[False] += 1
            else:
                assert picture.mode == "RGB" and 0 < picture.width * picture.height <= MAX_PIXELS
                outcomes[True] += 1
    assert min(outcomes.values()) > 50  # the damage is neither too much nor too little


@given(content=st.binary(max_size=200), name=st.sampled_from(["a.csv", "a.tsv", "a.json", "a.jsonl", "a.tar", "a"]))
@settings(max_examples=120 * FUZZ, deadline=None, suppress_health_check=list(HealthCheck))
def test_any_bytes_are_read_or_refused(tmp_path: Path, content: bytes, name: str) -> None:
    packed = (
        b"\x1f\x8b\x08" + bytes(7),
        b"\xfd7zXZ\x00\x00\x04",
        b"\x28\xb5\x2f\xfd",
        gzip.compress(b'{"image":1}\n' * 9, mtime=0),
    )
    for head in (b"", b"[", b"{", b'[{"image": 1, "caption": 2},', b"image,caption\n", b"PAR1", *packed):
        (tmp_path / name).write_bytes(head + content)
        bad = BadRecords("quarantine")
        try:
            result = check_data(tmp_path / name, opens_images=False)
        except ValueError as error:
            assert str(tmp_path / name) in str(error)
        else:
            assert result.num_records > 0
        assert not bad.problems


@pytest.fixture(scope="module")
def parquet(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, bytes]:
    """A file with nested and dictionary-encoded columns, and its content."""
    path = tmp_path_factory.mktemp("parquet") / "a.parquet"
    turns = [{"role": role, "content": f"What {n}?" * n} for n, role in enumerate(("user", "assistant"))]
    rows = [{"messages": turns, "images": [{"bytes": b"x" * n, "path": None}], "chosen": "A bus."} for n in range(99)]
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path, data_page_size=200, write_batch_size=10)
    return path, path.read_bytes()


@given(edits=st.lists(st.tuples(st.integers(4, 20_000), st.binary(min_size=1, max_size=2)), min_size=1, max_size=4))
@example(edits=[(24, b"\x80")])
@example(edits=[(11536, b"\x80")])
@settings(max_examples=60 * FUZZ, deadline=None, suppress_health_check=list(HealthCheck))
def test_damaged_parquet_is_read_or_refused(parquet: tuple[Path, bytes], edits: list[tuple[int, bytes]]) -> None:
    path, content = parquet
    damaged = bytearray(content)
    for position, replacement in edits:
        position %= len(content)
        damaged[position : position + len(replacement)] = replacement
    path.write_bytes(damaged)
    try:
        check_data(path, opens_images=False)
    except ValueError as error:
        assert str(path) in str(error)
