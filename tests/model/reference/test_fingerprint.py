"""The fingerprint of the reference."""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest

from bpo.job.durable import file_digest
from bpo.model.reference import fingerprint as reference_fingerprint
from bpo.model.reference.fingerprint import DigestCache, model_fingerprint

LONG_AGO_NS = 10**18


def old_file(directory: Path, name: str, content: bytes) -> Path:
    path = directory / name
    path.write_bytes(content)
    os.utime(path, ns=(LONG_AGO_NS, LONG_AGO_NS))
    return path


@pytest.fixture
def hashed(monkeypatch: pytest.MonkeyPatch) -> list[str]:
    """Names of the files whose content was read."""
    names: list[str] = []

    def counted(path: Path) -> str:
        names.append(path.name)
        return file_digest(path)

    monkeypatch.setattr(reference_fingerprint, "file_digest", counted)
    return names


def test_covers_weights_processor_template_and_dtype(tmp_path: Path, tiny_llava_dir: Path) -> None:
    copy = Path(shutil.copytree(tiny_llava_dir, tmp_path / "model"))
    before = model_fingerprint(str(copy), dtype="float32")
    assert before == model_fingerprint(str(tiny_llava_dir), dtype="float32")  # depends on content, not on location
    for name in ("model.safetensors", "chat_template.jinja", "tokenizer.json", "config.json"):
        was = model_fingerprint(str(copy), dtype="float32")
        with (copy / name).open("ab") as file:
            file.write(b" ")
        now = model_fingerprint(str(copy), dtype="float32")
        assert {field for field in now if now[field] != was[field]} == {f"file:{name}"}
    half = model_fingerprint(str(tiny_llava_dir), dtype="bfloat16")
    assert {field for field in half if before[field] != half[field]} == {"dtype"}


def test_only_files_that_are_loaded_count(tmp_path: Path) -> None:
    """Notes, a trainer's state or weights in another format beside the model change nothing."""

    def put(name: str, content: str = "{}") -> None:
        (tmp_path / name).write_text(content)

    index = json.dumps({"weight_map": {"a": "model-1.safetensors", "b": "model-2.safetensors"}})
    for name in ("config.json", "model-1.safetensors", "model-2.safetensors", "tokenizer.json", "merges.txt"):
        put(name)
    put("model.safetensors.index.json", index)
    before = model_fingerprint(str(tmp_path))
    assert {name for name in before if name.startswith("file:")} == {f"file:{f.name}" for f in tmp_path.iterdir()}
    unrelated = "notes.txt consolidated.safetensors trainer_state.json training_args.bin pytorch_model.bin convert.py"
    for name in unrelated.split():
        put(name)
    assert model_fingerprint(str(tmp_path)) == before
    put("config.json", '{"auto_map": {"AutoModel": "modeling.Model"}}')  # then code is loaded
    assert "file:convert.py" in model_fingerprint(str(tmp_path))
    put("model.safetensors")  # is preferred to shards
    assert "file:model-1.safetensors" not in model_fingerprint(str(tmp_path))


def test_a_directory_that_is_gone_is_named(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match=f"^model.path is '{tmp_path}/gone': no such directory$"):
        model_fingerprint(f"{tmp_path}/gone")


def test_an_unchanged_model_is_hashed_once_and_nothing_is_written_beside_it(tmp_path: Path, hashed: list[str]) -> None:
    model = tmp_path / "model"
    model.mkdir()
    names = ("config.json", "model.safetensors", "tokenizer.json")
    for name in names:
        old_file(model, name, name.encode())
    kept = tmp_path / "store" / "digests.json"
    first = model_fingerprint(str(model), kept_digests=kept)
    assert sorted(hashed) == sorted(names)
    assert model_fingerprint(str(model), kept_digests=kept) == first and len(hashed) == 3
    assert len(list(model.iterdir())) == 3
    assert model_fingerprint(str(model), kept_digests=kept, rehash=True) == first and len(hashed) == 6


@pytest.mark.parametrize("change", ["size", "time", "inode"])
def test_a_file_that_changed_is_hashed_again(tmp_path: Path, hashed: list[str], change: str) -> None:
    weights = old_file(tmp_path, "w.safetensors", b"first")
    other = old_file(tmp_path, "x.safetensors", b"other")
    kept = tmp_path / "digests.json"
    was = DigestCache(kept).digests([weights, other])[weights]
    if change == "size":
        old_file(tmp_path, "w.safetensors", b"longer")
    elif change == "time":
        weights.write_bytes(b"later")
    else:
        os.replace(old_file(tmp_path, "new", b"moved"), weights)
    hashed.clear()
    now = DigestCache(kept).digests([weights, other])[weights]
    assert hashed == ["w.safetensors"] and now != was and now == file_digest(weights)


def test_exchanged_content_with_the_old_size_and_time_is_only_seen_by_rehashing(tmp_path: Path) -> None:
    """The documented cost of not reading the weights at every start."""
    weights = old_file(tmp_path, "w.safetensors", b"first")
    kept = tmp_path / "digests.json"
    was = DigestCache(kept).digests([weights])
    old_file(tmp_path, "w.safetensors", b"again")  # in place: the same inode
    assert DigestCache(kept).digests([weights]) == was
    assert DigestCache(kept, rehash=True).digests([weights])[weights] == file_digest(weights)
    assert DigestCache(kept).digests([weights])[weights] == file_digest(weights)


def test_a_file_written_just_now_is_not_believed_yet(tmp_path: Path, hashed: list[str]) -> None:
    """It could change again within one tick of the file system's clock."""
    weights = tmp_path / "w.safetensors"
    weights.write_bytes(b"new")
    for _ in range(2):
        DigestCache(tmp_path / "digests.json").digests([weights])
    assert len(hashed) == 2


@pytest.mark.parametrize("content", ["{", "", "[]", '{"FILE": {}}', '{"FILE": [5, 1, 2, 3]}', '{"FILE": []}'])
def test_a_broken_digest_file_is_named_and_the_files_are_hashed_again(
    tmp_path: Path, content: str, caplog: pytest.LogCaptureFixture
) -> None:
    kept, weights = tmp_path / "digests.json", tmp_path / "weights"
    weights.write_bytes(b"weights")
    kept.write_text(content.replace("FILE", str(weights)))
    assert DigestCache(kept).digests([weights]) == {weights: file_digest(weights)}
    assert "digests.json: unreadable entries" in caplog.text
