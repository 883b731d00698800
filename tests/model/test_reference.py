"""The store of reference log-probs. Run: python -m pytest tests/model/test_reference.py"""

from __future__ import annotations

import shutil
from pathlib import Path

import pytest
import torch

from bpo.model.reference import ReferenceStore, ReferenceStoreError, model_fingerprint

FINGERPRINT = {"file:model.safetensors": "abc", "dtype": "float32"}
VALUES = {"one": [-0.5, -1.25, -3.0], "two": [-7.0], "three": [-0.125, -0.25]}


def filled(directory: Path, rank: int = 0, keys: tuple[str, ...] = ("one", "two", "three")) -> ReferenceStore:
    store = ReferenceStore(directory, FINGERPRINT, rank)
    for key in keys:
        store.put(key, torch.tensor(VALUES[key]))
    store.close()
    store.reload()
    return store


def shard(directory: Path, suffix: str) -> Path:
    (path,) = directory.glob(f"*.{suffix}")
    return path


def test_round_trip_through_the_disk(tmp_path: Path) -> None:
    filled(tmp_path)
    store = ReferenceStore(tmp_path, FINGERPRINT)
    assert len(store) == 3 and "one" in store and "four" not in store
    for key, values in VALUES.items():
        assert torch.equal(store.get(key), torch.tensor(values)) and store.get(key).dtype == torch.float32


def test_half_precision_is_stored_as_fp32(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path, FINGERPRINT)
    store.put("h", torch.tensor([-1.5, -0.25], dtype=torch.bfloat16, requires_grad=True))
    store.close()
    store.reload()
    assert store.get("h").tolist() == [-1.5, -0.25]


def test_gather_gives_the_tokens_in_the_order_of_the_batch(tmp_path: Path) -> None:
    assert filled(tmp_path).gather(["two", "one", "two"]).tolist() == [-7.0, -0.5, -1.25, -3.0, -7.0]


def test_ranks_and_runs_write_shards_of_their_own_and_read_all(tmp_path: Path) -> None:
    filled(tmp_path, rank=0, keys=("one",))
    filled(tmp_path, rank=1, keys=("two",))
    store = filled(tmp_path, rank=0, keys=("three",))  # a second run adds to what is there
    assert store.gather(["three", "one", "two"]).tolist() == [*VALUES["three"], *VALUES["one"], *VALUES["two"]]
    assert len(list(tmp_path.glob("*.f32"))) == 3


def test_a_missing_entry_is_a_key_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match="four"):
        filled(tmp_path).get("four")


@pytest.mark.parametrize("cut_bytes", [1, 30])
def test_torn_last_line_is_left_out_and_computed_again(tmp_path: Path, cut_bytes: int) -> None:
    filled(tmp_path)
    index = shard(tmp_path, "jsonl")
    index.write_bytes(index.read_bytes()[: -1 - cut_bytes])  # the newline too
    store = ReferenceStore(tmp_path, FINGERPRINT)
    assert "three" not in store and torch.equal(store.get("two"), torch.tensor(VALUES["two"]))
    store.put("three", torch.tensor(VALUES["three"]))
    store.close()
    assert torch.equal(ReferenceStore(tmp_path, FINGERPRINT).get("three"), torch.tensor(VALUES["three"]))


@pytest.mark.parametrize("cut_bytes", [1, 4, 8])
def test_partial_values_are_left_out(tmp_path: Path, cut_bytes: int) -> None:
    filled(tmp_path)
    values = shard(tmp_path, "f32")
    values.write_bytes(values.read_bytes()[:-cut_bytes])
    store = ReferenceStore(tmp_path, FINGERPRINT)
    assert "three" not in store and len(store) == 2
    assert store.gather(["one", "two"]).tolist() == [*VALUES["one"], *VALUES["two"]]


def test_index_without_its_values_is_left_out(tmp_path: Path) -> None:
    filled(tmp_path)
    shard(tmp_path, "f32").unlink()
    assert len(ReferenceStore(tmp_path, FINGERPRINT)) == 0


def test_a_flipped_bit_is_found_and_named(tmp_path: Path) -> None:
    filled(tmp_path)
    values = shard(tmp_path, "f32")
    data = bytearray(values.read_bytes())
    data[5] ^= 1  # in the second value of "one"
    values.write_bytes(data)
    store = ReferenceStore(tmp_path, FINGERPRINT)
    assert store.get("two").tolist() == VALUES["two"]
    with pytest.raises(ReferenceStoreError, match=r"\.f32: entry one is damaged"):
        store.get("one")


def test_another_fingerprint_is_refused_by_field(tmp_path: Path) -> None:
    filled(tmp_path)
    other = {**FINGERPRINT, "dtype": "bfloat16", "file:new.json": "x"}
    with pytest.raises(ReferenceStoreError) as error:
        ReferenceStore(tmp_path, other)
    assert "dtype: store has float32, this run has bfloat16" in str(error.value)
    assert "file:new.json: store has None, this run has x" in str(error.value)
    assert "model.safetensors" not in str(error.value)
    assert "train.reference_dir" in str(error.value)


def test_model_fingerprint_covers_weights_processor_template_and_dtype(tmp_path: Path, tiny_llava_dir: Path) -> None:
    copy = Path(shutil.copytree(tiny_llava_dir, tmp_path / "model"))
    before = model_fingerprint(str(copy), dtype="float32")
    assert before == model_fingerprint(str(tiny_llava_dir), dtype="float32")  # not the place, the content
    changed = [
        name
        for name in ("model.safetensors", "chat_template.jinja", "tokenizer.json", "config.json")
        if _with_one_more_byte(copy / name) and model_fingerprint(str(copy), dtype="float32") != before
    ]
    assert len(changed) == 4
    assert {k for k, v in model_fingerprint(str(tiny_llava_dir), dtype="bfloat16").items() if before[k] != v} == {
        "dtype"
    }


def _with_one_more_byte(path: Path) -> bool:
    with path.open("ab") as file:
        return file.write(b" ") == 1
