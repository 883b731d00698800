"""Finding and verifying checkpoints, without DeepSpeed. Run: python -m pytest tests/test_checkpoint.py

Saving and resuming on two ranks is in test_train.py.
"""

from __future__ import annotations

import json
import logging
from pathlib import Path
from typing import Any

import pytest

from bpo.checkpoint import (
    CheckpointError,
    _hash_files,
    checkpoint_dirs,
    find_resumable,
    newest_valid_checkpoint,
    resume,
    verify_checkpoint,
)
from bpo.launch import Ranks


def write_checkpoint(output_dir: Path, step: int) -> Path:
    directory = output_dir / "checkpoints" / f"step-{step:08d}"
    (directory / "deepspeed").mkdir(parents=True)
    (directory / "deepspeed" / "optimizer.pt").write_bytes(bytes(range(100)))
    (directory / "trainable.safetensors").write_bytes(b"weights %d" % step)
    manifest = {"step": step, "world_size": 2, "config": {}, "files": _hash_files(directory)}
    (directory / "manifest.json").write_text(json.dumps(manifest))
    return directory


def flip_a_bit(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


def test_an_intact_checkpoint_gives_its_manifest(tmp_path: Path) -> None:
    manifest = verify_checkpoint(write_checkpoint(tmp_path, 10))
    assert (manifest["step"], manifest["world_size"]) == (10, 2)
    assert set(manifest["files"]) == {"deepspeed/optimizer.pt", "trainable.safetensors"}


@pytest.mark.parametrize("name", ["deepspeed/optimizer.pt", "trainable.safetensors"])
@pytest.mark.parametrize(
    ("damage", "message"),
    [(cut, "bytes instead of"), (flip_a_bit, "SHA-256 differs"), (Path.unlink, "is missing")],
    ids=["truncated", "flipped bit", "deleted"],
)
def test_damage_is_found_and_the_file_named(tmp_path: Path, name: str, damage: Any, message: str) -> None:
    directory = write_checkpoint(tmp_path, 10)
    damage(directory / name)
    with pytest.raises(CheckpointError, match=f"{name}.*{message}"):
        verify_checkpoint(directory)


@pytest.mark.parametrize("text", ["", '{"step": 1', "{}", "[]", '{"files": {"x": {}}}', '{"files": 3}'])
def test_a_damaged_manifest_is_a_damaged_checkpoint(tmp_path: Path, text: str) -> None:
    directory = write_checkpoint(tmp_path, 10)
    (directory / "manifest.json").write_text(text)
    with pytest.raises(CheckpointError, match=r"manifest\.json is damaged"):
        verify_checkpoint(directory)


def test_without_a_manifest_it_was_not_finished(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, 10)
    (directory / "manifest.json").unlink()
    with pytest.raises(CheckpointError, match="not written to the end"):
        verify_checkpoint(directory)


def test_the_newest_is_found_and_unfinished_ones_are_not(tmp_path: Path) -> None:
    assert newest_valid_checkpoint(tmp_path) is None
    for step in (10, 2, 100):
        write_checkpoint(tmp_path, step)
    (tmp_path / "checkpoints" / "step-00000200.tmp").mkdir()
    assert [d.name for d in checkpoint_dirs(tmp_path)] == ["step-00000100", "step-00000010", "step-00000002"]
    found = newest_valid_checkpoint(tmp_path)
    assert found is not None and found[0].name == "step-00000100" and found[1]["step"] == 100


def test_a_damaged_one_is_passed_over_aloud(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_checkpoint(tmp_path, 10)
    flip_a_bit(write_checkpoint(tmp_path, 20) / "deepspeed" / "optimizer.pt")
    (write_checkpoint(tmp_path, 30) / "manifest.json").write_text("{}")
    with caplog.at_level(logging.ERROR):
        found = newest_valid_checkpoint(tmp_path)
    assert found is not None and found[1]["step"] == 10
    assert "passed over" in caplog.text and "step-00000020" in caplog.text and "step-00000030" in caplog.text


def test_none_left_is_an_error_that_lists_the_damage(tmp_path: Path) -> None:
    for step in (10, 20):
        cut(write_checkpoint(tmp_path, step) / "trainable.safetensors")
    with pytest.raises(CheckpointError, match="(?s)can be used.*step-00000020.*step-00000010"):
        find_resumable(tmp_path, resume=True)


def test_a_fresh_start_never_mixes_with_an_earlier_run(tmp_path: Path) -> None:
    assert find_resumable(tmp_path, resume=False) is None
    directory = write_checkpoint(tmp_path, 10)
    with pytest.raises(CheckpointError, match="--resume or another train.output_dir"):
        find_resumable(tmp_path, resume=False)
    found = find_resumable(tmp_path, resume=True)
    assert found is not None and found[0] == directory


def test_resume_without_a_checkpoint_starts_fresh_and_says_so(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    with caplog.at_level(logging.WARNING):
        assert find_resumable(tmp_path, resume=True) is None
    assert "starting at step 0" in caplog.text


def test_another_number_of_ranks_is_refused(tmp_path: Path) -> None:
    class Engine:
        ranks = Ranks(0, 4, 0)

    directory = write_checkpoint(tmp_path, 10)
    with pytest.raises(CheckpointError, match="written by 2 ranks; this run has 4"):
        resume(Engine(), directory, verify_checkpoint(directory))  # type: ignore[arg-type]
