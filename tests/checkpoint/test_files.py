"""Checkpoint files without DeepSpeed: damage, names, retention, shards.

Saving is in test_save.py, kills in test_save_kills.py, DeepSpeed in test_train.py and test_ranks.py.
"""

from __future__ import annotations

import hashlib
import json
import logging
import random
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from checkpoint_worker import NUMEL, Run, make_shard, stored_step, whole

from bpo.checkpoint.files import (
    CheckpointError,
    apply_retention,
    best_step,
    checkpoint_dirs,
    checkpoints_root,
    clean_leftovers,
    commit,
    finished_step,
    follow_pointer,
    mark_best,
    newest_valid_checkpoint,
    seal_file,
    step_dir,
    superseded,
    verify_checkpoint,
)
from bpo.checkpoint.partition import RunDescription
from bpo.checkpoint.shards import KINDS, MASTER, Fragment, Shard, ShardSet, shard_name
from bpo.config.loss import LossConfig
from bpo.config.training import Config
from bpo.data.schedule import PlannedStep
from bpo.losses.program import LossProgram


def write_checkpoint(output_dir: Path, step: int) -> Path:
    Run(output_dir).save(step)
    return step_dir(output_dir, step)


def flip_a_bit(path: Path, bit: int | None = None) -> None:
    data = bytearray(path.read_bytes())
    bit = len(data) * 4 if bit is None else bit
    data[bit // 8] ^= 1 << bit % 8
    path.write_bytes(data)


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:-1])


FILES = [shard_name(0), "manifest.json", "manifest.sha256"]


def test_an_intact_checkpoint_gives_its_manifest(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, 10)
    manifest = verify_checkpoint(directory)
    assert (manifest["step"], manifest["world_size"]) == (10, 1)
    assert sorted(p.name for p in directory.iterdir()) == sorted(FILES)
    assert set(manifest["files"]) == {shard_name(0)}
    assert (checkpoints_root(tmp_path) / "latest").read_text() == "step-00000010"


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", [cut, flip_a_bit, Path.unlink], ids=["truncated", "flipped bit", "deleted"])
def test_damage_to_any_file_is_found_and_named(tmp_path: Path, name: str, damage: Callable[[Path], Any]) -> None:
    directory = write_checkpoint(tmp_path, 10)
    damage(directory / name)
    named = name if name.startswith("rank") else "manifest.json"
    with pytest.raises(
        CheckpointError, match=f"{named}.*(bytes instead of|differs|missing|not finished|does not match|format 1)"
    ):
        verify_checkpoint(directory)


def test_every_one_of_400_random_bits_is_found(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, 10)
    draw = random.Random(0)
    sizes = {name: 8 * (directory / name).stat().st_size for name in FILES}
    for number in range(400):
        name = FILES[number % len(FILES)]
        bit = draw.randrange(sizes[name])
        flip_a_bit(directory / name, bit)
        with pytest.raises(CheckpointError):
            verify_checkpoint(directory)
            pytest.fail(f"bit {bit} of {name} was not noticed")
        flip_a_bit(directory / name, bit)
    verify_checkpoint(directory)


@pytest.mark.parametrize("name", ["../other.safetensors", "/etc/passwd", "a/b.safetensors", "../.."])
def test_a_manifest_cannot_name_files_outside_its_folder(tmp_path: Path, name: str) -> None:
    """It is read by export, which may be given a checkpoint of unknown origin."""
    content = json.dumps({"format": 2, "step": 1, "files": {name: {"bytes": 1, "sha256": ""}}}).encode()
    (tmp_path / "manifest.json").write_bytes(content)
    (tmp_path / "manifest.sha256").write_text(f"{hashlib.sha256(content).hexdigest()}  manifest.json\n")
    with pytest.raises(CheckpointError, match="is not the name of a file in this folder"):
        verify_checkpoint(tmp_path)


def test_a_checkpoint_of_an_older_version_is_said_to_be_one(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, 10)
    (directory / "manifest.json").write_text(json.dumps({"step": 10, "files": {}}))
    with pytest.raises(CheckpointError, match="older version of bpo"):
        verify_checkpoint(directory)


def test_the_newest_is_found_and_unfinished_ones_are_not(tmp_path: Path) -> None:
    assert newest_valid_checkpoint(tmp_path) is None
    for step in (10, 2, 100):
        write_checkpoint(tmp_path, step)
    (checkpoints_root(tmp_path) / "step-00000200.1234.tmp").mkdir()
    assert [d.name for d in checkpoint_dirs(tmp_path)] == ["step-00000100", "step-00000010", "step-00000002"]
    found = newest_valid_checkpoint(tmp_path)
    assert found is not None and found[0].name == "step-00000100" and stored_step(*found) == 100


def test_a_step_of_nine_digits_is_newer_than_one_of_eight(tmp_path: Path) -> None:
    for step in (99_999_999, 100_000_000):
        write_checkpoint(tmp_path, step)
    assert checkpoint_dirs(tmp_path)[0].name == "step-100000000"


def test_the_steps_done_are_those_of_the_latest_intact_manifest(tmp_path: Path) -> None:
    assert finished_step(tmp_path) is None
    for step in (10, 20, 30):
        final = step_dir(tmp_path, step)
        temporary = final.with_suffix(".tmp")
        temporary.mkdir(parents=True)
        (temporary / "a").write_bytes(b"ab")
        cursor = {"steps_done": step, "steps_planned": 40}
        commit(temporary, final, {"cursor": cursor, "files": {"a": seal_file(temporary / "a")}})
    assert finished_step(tmp_path) == (30, 40)
    cut(step_dir(tmp_path, 30) / "a")
    assert finished_step(tmp_path) == (20, 40)
    cut(step_dir(tmp_path, 20) / "manifest.json")
    assert finished_step(tmp_path) == (10, 40)


def test_a_damaged_one_is_skipped_with_an_error_and_set_aside(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    write_checkpoint(tmp_path, 10)
    flip_a_bit(write_checkpoint(tmp_path, 20) / shard_name(0))
    (write_checkpoint(tmp_path, 30) / "manifest.json").write_text("{}")
    found = newest_valid_checkpoint(tmp_path)
    assert found is not None and found[1]["step"] == 10
    for step in (20, 30):
        assert f"step-{step:08d} skipped" in caplog.text
        assert (checkpoints_root(tmp_path) / f"step-{step:08d}.damaged").is_dir()
    write_checkpoint(tmp_path, 20)  # the run reaches that step again
    assert newest_valid_checkpoint(tmp_path)[1]["step"] == 20  # type: ignore[index]
    flip_a_bit(step_dir(tmp_path, 20) / shard_name(0))
    newest_valid_checkpoint(tmp_path)
    assert (checkpoints_root(tmp_path) / "step-00000020.damaged-2").is_dir()


def test_none_left_is_an_error_that_lists_the_damage_and_moves_nothing(tmp_path: Path) -> None:
    for step in (10, 20):
        cut(write_checkpoint(tmp_path, step) / shard_name(0))
    with pytest.raises(CheckpointError, match="(?s)is valid.*step-00000020.*step-00000010"):
        newest_valid_checkpoint(tmp_path)
    assert len(checkpoint_dirs(tmp_path)) == 2


@pytest.mark.parametrize("state", ["empty", "missing", "dangling"])
def test_a_broken_pointer_is_repaired_and_logged(tmp_path: Path, state: str, caplog: pytest.LogCaptureFixture) -> None:
    write_checkpoint(tmp_path, 10)
    pointer = checkpoints_root(tmp_path) / "latest"
    {
        "empty": lambda: pointer.write_text(""),
        "missing": pointer.unlink,
        "dangling": lambda: pointer.write_text("step-00000099"),
    }[state]()
    found = newest_valid_checkpoint(tmp_path)
    assert found is not None and found[1]["step"] == 10 and pointer.read_text() == "step-00000010"
    assert {"dangling": "step-00000099"}.get(state, state) in caplog.text


def test_a_step_that_is_saved_again_replaces_the_old_one_and_a_kill_between_loses_neither(tmp_path: Path) -> None:
    directory = write_checkpoint(tmp_path, 10)
    (directory / "note").touch()
    write_checkpoint(tmp_path, 10)
    assert not (directory / "note").exists() and [d.name for d in checkpoint_dirs(tmp_path)] == ["step-00000010"]
    # State after a kill between the two renames: the old one moved away, the new one not yet renamed.
    directory.rename(directory.with_name("step-00000010.replaced"))
    (checkpoints_root(tmp_path) / "step-00000010.ab12.tmp").mkdir()
    (checkpoints_root(tmp_path) / ".latest.ab12.tmp").touch()
    clean_leftovers(tmp_path)
    assert sorted(p.name for p in checkpoints_root(tmp_path).iterdir()) == ["latest", "step-00000010"]
    verify_checkpoint(directory)
    shutil.copytree(directory, directory.with_name("step-00000010.replaced"))  # a kill after both
    clean_leftovers(tmp_path)
    assert [p.name for p in checkpoints_root(tmp_path).glob("step*")] == ["step-00000010"]


@pytest.mark.parametrize(
    ("keep_last", "keep_every", "gone"),
    [(0, 0, []), (0, 20, []), (1, 0, [10, 20, 30, 40]), (2, 0, [10, 20, 30]), (2, 20, [10, 30]), (9, 0, [])],
)
def test_retention_keeps_the_last_and_every_nth(
    tmp_path: Path, keep_last: int, keep_every: int, gone: list[int]
) -> None:
    steps = [10, 20, 30, 40, 50]
    assert superseded(steps, keep_last, keep_every) == gone
    for step in steps:
        step_dir(tmp_path, step).mkdir(parents=True)
    apply_retention(tmp_path, keep_last, keep_every)
    left = sorted(p.name for p in checkpoints_root(tmp_path).iterdir())
    assert left == [f"step-{step:08d}" for step in steps if step not in gone]


def test_pointers_name_checkpoints_and_other_paths_are_themselves(tmp_path: Path) -> None:
    checkpoint, best = write_checkpoint(tmp_path, 10), checkpoints_root(tmp_path) / "best"
    assert best_step(tmp_path) is None and follow_pointer(best) == best
    mark_best(tmp_path, 10)
    assert follow_pointer(best) == follow_pointer(best.with_name("latest")) == checkpoint == follow_pointer(checkpoint)
    mark_best(tmp_path, 20)  # removed by hand
    assert best_step(tmp_path) is None


def test_what_cannot_be_removed_is_named_and_stays(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    for step in (10, 20):
        step_dir(tmp_path, step).mkdir(parents=True)

    def refuse(*_: Any) -> None:
        raise PermissionError(13, "Permission denied")

    monkeypatch.setattr("bpo.checkpoint.files.os.replace", refuse)
    apply_retention(tmp_path, 1, 0)
    assert "step-00000010 is superseded but cannot be removed" in caplog.text


def test_a_manifest_that_is_written_later_has_the_states_of_its_own_step() -> None:
    """Saves in the background are committed when further steps may have run."""
    program = LossProgram(LossConfig(type="spa"))
    step = PlannedStep(0, 0, (0,), (((0,),),), ((False,),))
    groups: Any = SimpleNamespace(content=list, steps=[step, step])
    run = RunDescription(Config(), groups, {}, {}, 1, program)
    program.states["spa"].update([[0.5]])
    run.take_loss_states()
    program.states["spa"].update([[0.75]])
    assert run.manifest(1)["loss_states"] == {"spa": {"margins": [0.5], "num_steps": 1}}


def write_shards(directory: Path, world_size: int, step: int = 7) -> ShardSet:
    directory.mkdir()
    for rank in range(world_size):
        make_shard(step, rank, world_size).write(directory / shard_name(rank))
    return ShardSet(directory, [shard_name(rank) for rank in range(world_size)])


@pytest.mark.parametrize("wrote", [1, 2, 3, 7])
@pytest.mark.parametrize("reads", [1, 2, 4, 5])
def test_any_number_of_ranks_reads_what_any_number_wrote(tmp_path: Path, wrote: int, reads: int) -> None:
    shards = write_shards(tmp_path / "c", wrote)
    assert shards.shapes() == {"w": (10, 100)} and shards.optimizer_step == 7
    for rank in range(reads):
        expected, mine = make_shard(7, rank, reads), make_shard(0, rank, reads)
        shards.fill(mine.fragments, mine.tensors)
        assert mine.tensors.keys() == expected.tensors.keys()
        for name in mine.tensors:
            assert torch.equal(mine.tensors[name], expected.tensors[name])


def test_ranges_across_shards_and_flat_tensors(tmp_path: Path) -> None:
    """As under ZeRO-2 with two parameter groups: a rank holds parts of several parameters in several flat tensors."""
    (tmp_path / "c").mkdir()
    values = {name: torch.randn(30) for name in "abc"}
    pieces = {
        0: [("a", 0, 30, 0, 0), ("b", 0, 12, 0, 30), ("c", 0, 5, 1, 2)],
        1: [("b", 12, 18, 0, 0), ("c", 5, 25, 1, 0)],
    }
    for rank, table in pieces.items():
        flats = {f"{kind}.{n}": torch.zeros(50) for kind in KINDS for n in (0, 1)}
        for name, start, numel, flat, at in table:
            flats[f"{MASTER}.{flat}"][at : at + numel] = values[name][start : start + numel]
        fragments = [Fragment(name, (30,), "float32", start, numel, flat, at) for name, start, numel, flat, at in table]
        Shard(fragments, 1, flats).write(tmp_path / "c" / shard_name(rank))
    shards = ShardSet(tmp_path / "c", [shard_name(0), shard_name(1)])
    draw = random.Random(0)
    for _ in range(200):
        name, start = draw.choice("abc"), draw.randrange(30)
        numel = draw.randrange(0, 31 - start)
        assert torch.equal(shards.read(MASTER, name, start, numel), values[name][start : start + numel])
    assert {n: v.tolist() for n, v in shards.parameters()} == {n: v.tolist() for n, v in values.items()}


def test_parameters_come_in_the_dtype_that_the_model_computes_with(tmp_path: Path) -> None:
    ((name, value),) = write_shards(tmp_path / "c", 2).parameters()
    assert name == "w" and value.shape == (10, 100) and torch.equal(value, whole(7).reshape(10, 100).bfloat16())


def test_what_no_shard_holds_is_an_error(tmp_path: Path) -> None:
    write_shards(tmp_path / "c", 2)
    half = ShardSet(tmp_path / "c", [shard_name(0)])
    with pytest.raises(CheckpointError, match=f"no shard contains elements 500 to {NUMEL} of w"):
        half.read(MASTER, "w", 0, NUMEL)
    with pytest.raises(CheckpointError, match="no shard contains elements 0 to 1 of v"):
        half.read(MASTER, "v", 0, 1)


def test_shards_of_different_steps_and_other_files_are_refused(tmp_path: Path) -> None:
    from safetensors.torch import save_file

    write_shards(tmp_path / "c", 2)
    make_shard(8, 1, 2).write(tmp_path / "c" / shard_name(1))
    with pytest.raises(CheckpointError, match=r"different optimizer steps: \[7, 8\]"):
        ShardSet(tmp_path / "c", [shard_name(0), shard_name(1)])
    save_file({"x": torch.zeros(1)}, tmp_path / "c" / shard_name(1))
    with pytest.raises(CheckpointError, match="rank-00001.*not a shard"):
        ShardSet(tmp_path / "c", [shard_name(1)])


def test_nothing_in_a_checkpoint_is_executed(tmp_path: Path) -> None:
    """A pickle under a shard's name, with a manifest that vouches for it, is not unpickled."""
    import os
    import pickle

    class Bomb:
        def __reduce__(self) -> Any:
            return os.mkdir, (str(tmp_path / "executed"),)

    for content in (pickle.dumps(Bomb()), _zip_pickle(Bomb())):
        (tmp_path / shard_name(0)).write_bytes(content)
        with pytest.raises(Exception, match="(?i)header|deserializ"):
            ShardSet(tmp_path, [shard_name(0)])
        assert not (tmp_path / "executed").exists()


def _zip_pickle(item: Any) -> bytes:
    import io

    buffer = io.BytesIO()
    torch.save(item, buffer)
    return buffer.getvalue()


def test_sealing_counts_and_hashes_what_lies_on_disk(tmp_path: Path) -> None:
    (tmp_path / "f").write_bytes(b"abc")
    sha256 = "ba7816bf8f01cfea414140de5dae2223b00361a396177a9cb410ff61f20015ad"  # FIPS 180-2, appendix B.1
    assert seal_file(tmp_path / "f") == {"bytes": 3, "sha256": sha256}


def test_files_are_read_by_sha256sum(tmp_path: Path) -> None:
    import subprocess

    directory = write_checkpoint(tmp_path, 10)
    subprocess.run(["sha256sum", "-c", "--status", "manifest.sha256"], cwd=directory, check=True)


@pytest.fixture(autouse=True)
def _info(caplog: pytest.LogCaptureFixture) -> None:
    caplog.set_level(logging.INFO)
