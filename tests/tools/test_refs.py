"""`bpo refs`."""

from __future__ import annotations

import errno
import fcntl
import json
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from stored_reference import FINGERPRINT, VALUES, filled, flip_bit, key_of, shard

from bpo.cli import main
from bpo.model.reference.format import ShardWriter
from bpo.model.reference.store import ReferenceStore
from bpo.tools import refs

NOW = ["--older-than-minutes", "0"]


def contents(directory: Path) -> dict[str, list[float]]:
    store = ReferenceStore(directory, FINGERPRINT)
    return {name: store.get(key_of(name)).tolist() for name in VALUES if key_of(name) in store}


def test_inspect_reports_the_contents(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(tmp_path)
    filled(tmp_path, "two", "four", rank=1)
    with sorted(tmp_path.glob("*.index"))[1].open("ab") as file:
        file.write(b"torn")
    assert main(["refs", "inspect", str(tmp_path), "--json"]) == 0
    found = json.loads(capsys.readouterr().out)
    assert found["fingerprint"] == FINGERPRINT
    expected = {"num_entries": 4, "num_tokens": 10, "num_duplicates": 1, "torn_bytes": 4, "num_damaged_records": 0}
    assert {name: found[name] for name in expected} == expected
    assert found["num_bytes"] == sum(file.stat().st_size for file in tmp_path.iterdir())
    assert [shard["num_entries"] for shard in found["shards"]] == [3, 2]
    assert main(["refs", "inspect", str(tmp_path)]) == 0
    text = capsys.readouterr().out
    assert "4 entries, 10 tokens" in text and "1 duplicates" in text and "dtype: float32" in text


def test_a_directory_without_a_store_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for command in ("inspect", "verify", "compact"):
        assert main(["refs", command, str(tmp_path)]) == 1
        assert f"{tmp_path}: not a reference store" in capsys.readouterr().err


def test_verify_accepts_an_undamaged_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(tmp_path)
    with shard(tmp_path, "values").open("ab") as file:
        file.write(b"the tail of a killed run")
    assert main(["refs", "verify", str(tmp_path)]) == 0
    assert "all checksums match" in capsys.readouterr().out


def test_damaged_values_are_named_removed_and_recomputed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(tmp_path)
    flip_bit(shard(tmp_path, "values"), 5)
    assert main(["refs", "verify", str(tmp_path)]) == 1
    text = capsys.readouterr().out
    assert str(shard(tmp_path, "values")) in text and key_of("one") in text and key_of("two") not in text
    assert main(["refs", "verify", str(tmp_path), "--remove-damaged"]) == 0
    assert contents(tmp_path) == {name: VALUES[name] for name in ("two", "three")}
    assert main(["refs", "verify", str(tmp_path)]) == 0
    filled(tmp_path, "one")
    assert contents(tmp_path) == {name: VALUES[name] for name in ("one", "two", "three")}


def test_a_damaged_record_is_found_and_removed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(tmp_path)
    flip_bit(shard(tmp_path, "index"), 40 + 52)
    assert main(["refs", "verify", str(tmp_path)]) == 1
    assert "1 damaged index records" in capsys.readouterr().out
    assert main(["refs", "verify", str(tmp_path), "--remove-damaged"]) == 0
    assert main(["refs", "verify", str(tmp_path)]) == 0
    assert contents(tmp_path) == {name: VALUES[name] for name in ("one", "three")}


def test_a_shard_with_a_damaged_header_is_renamed(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(tmp_path)
    flip_bit(shard(tmp_path, "index"), 20)
    assert main(["refs", "verify", str(tmp_path), "--remove-damaged"]) == 0
    assert "not part of this store" in capsys.readouterr().out
    assert contents(tmp_path) == {} and len(list(tmp_path.glob("*.index.rejected"))) == 1


def test_compact_merges_the_shards_and_drops_duplicates(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for rank, names in enumerate((("one", "two"), ("two", "three"), ("four", "one"))):
        filled(tmp_path, *names, rank=rank)
    reader = ReferenceStore(tmp_path, FINGERPRINT)  # a running training job
    assert main(["refs", "compact", str(tmp_path), *NOW]) == 0
    assert "3 shards merged, 4 entries kept, 2 duplicates dropped" in capsys.readouterr().out
    assert contents(tmp_path) == VALUES
    assert shard(tmp_path, "values").stat().st_size == 4 * 10 and shard(tmp_path, "index").stat().st_size == 40 + 4 * 52
    assert reader.get(key_of("four")).tolist() == VALUES["four"]
    assert main(["refs", "compact", str(tmp_path), *NOW]) == 0
    assert "0 shards merged" in capsys.readouterr().out


def test_a_killed_compaction_loses_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    filled(tmp_path, "one", "two")
    filled(tmp_path, "two", "three", "four", rank=1)

    def killed(self: Path, missing_ok: bool = False) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patched:
        patched.setattr(Path, "unlink", killed)
        with pytest.raises(KeyboardInterrupt):
            refs.compact_store(tmp_path, 0)
    assert contents(tmp_path) == VALUES and refs.inspect_store(tmp_path).num_duplicates == 5
    assert refs.compact_store(tmp_path, 0) == (3, 4, 5)
    assert contents(tmp_path) == VALUES


def test_recently_modified_shards_are_skipped(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(tmp_path, "one")
    filled(tmp_path, "one", rank=1)
    young = filled(tmp_path, "two", rank=2)
    for path in tmp_path.glob("rank0000[01]*"):
        os.utime(path, (0, 0))
    assert refs.compact_store(tmp_path, 60) == (2, 1, 1)
    assert contents(tmp_path).keys() == {"one", "two"} and len(list(tmp_path.glob("rank00002*"))) == 2
    assert young.get(key_of("two")).tolist() == VALUES["two"]


def no_locks(descriptor: int, operation: int) -> None:
    raise OSError(errno.ENOLCK, "No locks available")


def test_damage_is_removed_at_once_except_from_a_shard_that_is_being_written(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    command = ["refs", "verify", str(tmp_path), "--remove-damaged"]
    filled(tmp_path, "one")
    writer = ShardWriter(tmp_path, FINGERPRINT, "writing")
    writer.add(bytes.fromhex(key_of("two")), np.array(VALUES["two"]))
    writer.commit()
    flip_bit(next(tmp_path.glob("writing*.values")), 0)
    assert main(command) == 1
    assert "a running job may still be writing" in capsys.readouterr().out
    writer.close()  # as the death of its job does
    with monkeypatch.context() as patched:
        patched.setattr(fcntl, "flock", no_locks)
        assert main(command) == 1  # without file locks, the age decides
    assert main(command) == 0
    assert contents(tmp_path).keys() == {"one"}


def test_compact_refuses_a_damaged_store(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    filled(tmp_path, "one")
    flip_bit(shard(tmp_path, "values"), 0)
    filled(tmp_path, "two", rank=1)
    assert main(["refs", "compact", str(tmp_path), *NOW]) == 1
    assert "--remove-damaged` first" in capsys.readouterr().err
    assert len(list(tmp_path.glob("*.index"))) == 2


def test_no_torch_is_needed(tmp_path: Path) -> None:
    filled(tmp_path)
    code = (
        "import sys; from bpo.cli import main\n"
        "for command in ('inspect', 'verify', 'compact'): assert main(['refs', command, sys.argv[1]]) == 0\n"
        "print('torch' in sys.modules)"
    )
    result = subprocess.run([sys.executable, "-c", code, str(tmp_path)], capture_output=True, text=True, check=True)
    assert result.stdout.splitlines()[-1] == "False"
