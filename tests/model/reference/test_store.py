"""The store of reference log-probs."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from stored_reference import FINGERPRINT, VALUES, filled, flip_bit, key_of, put, shard

from bpo.model.reference.store import ReferenceStore, ReferenceStoreError


def stored(store: ReferenceStore, *names: str) -> list[float]:
    return store.gather([key_of(name) for name in names]).tolist()


def test_round_trip_through_the_disk(tmp_path: Path) -> None:
    filled(tmp_path)
    store = ReferenceStore(tmp_path, FINGERPRINT)
    assert len(store) == 3 and key_of("one") in store and key_of("four") not in store
    assert store.has([key_of(name) for name in ("four", "three", "four", "one")]).tolist() == [False, True, False, True]
    for name in ("one", "two", "three"):
        values = store.get(key_of(name))
        assert torch.equal(values, torch.tensor(VALUES[name])) and values.dtype == torch.float32


def test_half_precision_is_stored_as_fp32(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path, FINGERPRINT)
    store.put(key_of("h"), torch.tensor([-1.5, -0.25], dtype=torch.bfloat16, requires_grad=True))
    store.close()
    store.reload()
    assert stored(store, "h") == [-1.5, -0.25]


def test_gather_gives_the_tokens_in_the_order_of_the_batch(tmp_path: Path) -> None:
    assert stored(filled(tmp_path), "two", "one", "two") == [-7.0, -0.5, -1.25, -3.0, -7.0]


def test_ranks_and_runs_write_shards_of_their_own_and_read_all(tmp_path: Path) -> None:
    filled(tmp_path, "one", rank=0)
    filled(tmp_path, "two", rank=1)
    store = filled(tmp_path, "three", rank=0)  # a second run adds to the existing entries
    assert stored(store, "three", "one", "two") == [*VALUES["three"], *VALUES["one"], *VALUES["two"]]
    assert len(list(tmp_path.glob("*.values"))) == 3


def test_two_jobs_may_write_at_the_same_time(tmp_path: Path) -> None:
    jobs = [ReferenceStore(tmp_path, FINGERPRINT) for _ in range(2)]  # the same rank of both
    put(jobs[0], "one", "two")
    put(jobs[1], "two", "three")
    jobs[1].close()
    put(jobs[0], "four")
    jobs[0].close()
    for job in jobs:
        job.reload()
        assert len(job) == 4 and stored(job, *VALUES) == [v for values in VALUES.values() for v in values]


def test_a_missing_entry_is_a_key_error(tmp_path: Path) -> None:
    with pytest.raises(KeyError, match=key_of("four")):
        filled(tmp_path).get(key_of("four"))


@pytest.mark.parametrize("cut_bytes", [1, 30, 51, 52])
def test_torn_last_record_is_left_out_and_computed_again(tmp_path: Path, cut_bytes: int) -> None:
    filled(tmp_path)
    index = shard(tmp_path, "index")
    index.write_bytes(index.read_bytes()[:-cut_bytes])
    store = ReferenceStore(tmp_path, FINGERPRINT)
    assert key_of("three") not in store and stored(store, "two") == VALUES["two"]
    put(store, "three")
    store.close()
    assert stored(ReferenceStore(tmp_path, FINGERPRINT), "three") == VALUES["three"]


def test_zeros_at_the_end_of_an_index_are_no_entries(tmp_path: Path) -> None:
    """After a power cut a file may have its new length but not its new content."""
    filled(tmp_path)
    with shard(tmp_path, "index").open("ab") as file:
        file.write(bytes(3 * 52 + 7))
    assert len(ReferenceStore(tmp_path, FINGERPRINT)) == 3


@pytest.mark.parametrize("cut_bytes", [1, 4, 8])
def test_partial_values_are_left_out(tmp_path: Path, cut_bytes: int) -> None:
    filled(tmp_path)
    values = shard(tmp_path, "values")
    values.write_bytes(values.read_bytes()[:-cut_bytes])
    store = ReferenceStore(tmp_path, FINGERPRINT)
    assert key_of("three") not in store and len(store) == 2
    assert stored(store, "one", "two") == [*VALUES["one"], *VALUES["two"]]


def test_index_without_its_values_is_left_out(tmp_path: Path) -> None:
    filled(tmp_path)
    shard(tmp_path, "values").unlink()
    assert len(ReferenceStore(tmp_path, FINGERPRINT)) == 0


@pytest.mark.parametrize("record", [0, 1])
def test_a_damaged_record_costs_only_its_own_entry(tmp_path: Path, record: int) -> None:
    filled(tmp_path)
    flip_bit(shard(tmp_path, "index"), 40 + 52 * record + 33)  # the offset: it would point at other values
    store = ReferenceStore(tmp_path, FINGERPRINT)
    assert [key_of(name) in store for name in ("one", "two", "three")] == [record != 0, record != 1, True]


def test_a_flipped_bit_is_found_and_named(tmp_path: Path) -> None:
    filled(tmp_path)
    flip_bit(shard(tmp_path, "values"), 5)  # in the second value of "one"
    store = ReferenceStore(tmp_path, FINGERPRINT)
    assert stored(store, "two") == VALUES["two"]
    with pytest.raises(ReferenceStoreError, match=rf"\.values: entry {key_of('one')[:12]} is damaged") as error:
        store.get(key_of("one"))
    assert f"bpo refs verify {tmp_path} --remove-damaged" in str(error.value)


def test_a_complete_store_is_only_read(tmp_path: Path) -> None:
    """It may be on a read-only file system."""
    filled(tmp_path)
    before = {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in [tmp_path, *tmp_path.iterdir()]}
    store = ReferenceStore(tmp_path, FINGERPRINT, rank=3)
    assert store.has([key_of("one")]).all() and stored(store, "two") == VALUES["two"]
    assert store.close() is None
    store.reload()
    assert {p: (p.stat().st_mtime_ns, p.stat().st_size) for p in [tmp_path, *tmp_path.iterdir()]} == before


def test_another_fingerprint_is_refused_by_field(tmp_path: Path) -> None:
    ReferenceStore(tmp_path, {**FINGERPRINT, "file:gone.txt": "y", "file:same.json": "z"})
    other = {
        "file:model.safetensors": "def",
        "dtype": "bfloat16",
        "kernels": "triton",
        "file:new.json": "x",
        "file:same.json": "z",
    }
    with pytest.raises(ReferenceStoreError) as error:
        ReferenceStore(tmp_path, other)
    lines = [line.strip() for line in str(error.value).splitlines()[1:-1]]
    assert lines == [
        "dtype: float32 in the store, bfloat16 in this run",
        "file:gone.txt: not in the model directory any more",
        "file:model.safetensors: content differs (SHA-256 abc... in the store, def... now)",
        "file:new.json: not in the model directory when the store was created",
        "kernels: not recorded in the store, triton in this run",
    ]
    assert "train.reference_dir" in str(error.value)


def test_a_shard_of_another_store_is_refused(tmp_path: Path) -> None:
    """Copied by hand, or written by a job that lost the race for the first fingerprint."""
    filled(tmp_path / "mine")
    other = ReferenceStore(tmp_path / "other", {**FINGERPRINT, "dtype": "bfloat16"})
    put(other, "four")
    name = other.close()
    for suffix in ("index", "values"):
        shutil.copy(shard(tmp_path / "other", suffix), tmp_path / "mine")
    with pytest.raises(ReferenceStoreError, match=f"{name}: belongs to another store"):
        ReferenceStore(tmp_path / "mine", FINGERPRINT)


def test_the_first_format_is_refused_with_the_way_out(tmp_path: Path) -> None:
    (tmp_path / "fingerprint.json").write_text(json.dumps(FINGERPRINT))
    with pytest.raises(ReferenceStoreError, match=r"format 1; .* writes format 2. Remove it, or set "):
        ReferenceStore(tmp_path, FINGERPRINT)


@pytest.mark.parametrize(
    ("content", "message"),
    [("[1]", "contains a list, not an object"), ('{"format": 2}', "has no `fingerprint`"), ("{", "not valid JSON")],
)
def test_a_fingerprint_file_that_says_nothing_is_refused_by_name(tmp_path: Path, content: str, message: str) -> None:
    (tmp_path / "fingerprint.json").write_text(content)
    with pytest.raises(ReferenceStoreError, match=rf"{tmp_path}/fingerprint.json: {message}.*remove the store"):
        ReferenceStore(tmp_path, FINGERPRINT)


def test_a_shard_that_another_rank_wrote_and_nobody_can_see_is_an_error(tmp_path: Path) -> None:
    store = filled(tmp_path)
    with pytest.raises(ReferenceStoreError, match="rank00001-gone.index: shard not found"):
        store.reload(also=["rank00001-gone.index", None])


def test_a_key_that_is_no_digest_is_refused(tmp_path: Path) -> None:
    with pytest.raises(ValueError, match="reference key 'abcd': 2 bytes, a SHA-256 has 32"):
        filled(tmp_path).has(["abcd"])


KILLED = """
import os, signal, sys
from pathlib import Path
from bpo.model.reference import format as reference_format
from bpo.model.reference.store import ReferenceStore
from stored_reference import FINGERPRINT, put
reference_format.COMMIT_EVERY_S = 0.0  # every entry
store = ReferenceStore(Path(sys.argv[1]), FINGERPRINT)
put(store, "one", "two")
reference_format.COMMIT_EVERY_S = 1e9
put(store, "three")
os.kill(os.getpid(), signal.SIGKILL)
"""
LIMITED = """
import resource, sys
from pathlib import Path
from bpo.model.reference.store import ReferenceStore, ReferenceStoreError
from stored_reference import FINGERPRINT, put
import torch
store = ReferenceStore(Path(sys.argv[1]), FINGERPRINT)
put(store, "one")
store._writer.commit()
resource.setrlimit(resource.RLIMIT_FSIZE, (4096, resource.RLIM_INFINITY))
store.put("00" * 32, torch.zeros(5000))
try:
    store.close()
except ReferenceStoreError as error:
    print(error)
"""


def run_script(code: str, directory: Path) -> subprocess.CompletedProcess[str]:
    tests = Path(__file__).resolve().parents[2]
    environment = {**os.environ, "PYTHONPATH": f"{tests}{os.pathsep}{tests.parent}"}
    argv = [sys.executable, "-c", code, str(directory)]
    return subprocess.run(argv, env=environment, capture_output=True, text=True, timeout=300, check=False)


def test_a_killed_writer_loses_only_what_came_after_its_last_commit(tmp_path: Path) -> None:
    assert run_script(KILLED, tmp_path).returncode == -9
    store = ReferenceStore(tmp_path, FINGERPRINT)
    assert [key_of(name) in store for name in ("one", "two", "three")] == [True, True, False]
    assert stored(store, "one", "two") == [*VALUES["one"], *VALUES["two"]]


def test_a_full_disk_is_named_with_what_is_needed_and_the_store_stays_usable(tmp_path: Path) -> None:
    """A file size limit simulates a full disk: the write fails half-way in the same way."""
    printed = run_script(LIMITED, tmp_path)
    assert printed.returncode == 0, printed.stderr
    assert f"{tmp_path}/rank00000-" in printed.stdout and "need 20,052 bytes" in printed.stdout
    assert shard(tmp_path, "values").stat().st_size == 4096  # part of the entry was written
    store = ReferenceStore(tmp_path, FINGERPRINT)
    assert len(store) == 1 and stored(store, "one") == VALUES["one"]
    put(store, "two")
    store.close()
    store.reload()
    assert stored(store, "two", "one") == [*VALUES["two"], *VALUES["one"]]


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path / "store", FINGERPRINT)
    put(store, "one")
    shutil.rmtree(tmp_path / "store")
    with pytest.raises(ReferenceStoreError, match=r"rank00000-.*cannot be written \(No such file or directory\)"):
        store.close()


def test_a_shard_removed_while_it_is_written_is_an_error_and_not_a_loss_in_silence(tmp_path: Path) -> None:
    store = ReferenceStore(tmp_path, FINGERPRINT)
    put(store, "one")
    assert store._writer is not None
    store._writer.commit()
    shard(tmp_path, "index").unlink()
    put(store, "two")
    with pytest.raises(ReferenceStoreError, match="removed while it was being written"):
        store.close()
