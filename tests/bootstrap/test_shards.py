"""A job shared by several, a signal, and restarts in vain. Run: python -m pytest tests/bootstrap/test_shards.py"""

from __future__ import annotations

import os
import signal
from pathlib import Path

import pytest

from bpo.bootstrap.parts import PartReader, PartWriter
from bpo.bootstrap.run import run_bootstrap, run_merge
from bpo.cli import main as bpo
from bpo.config import Config, DataConfig, ModelConfig
from bpo.config_bootstrap import BootstrapConfig, WeakenConfig
from bpo.interrupts import EXIT_INTERRUPTED, EXIT_NO_PROGRESS, Interrupted, StopRequest
from bpo.run_lock import NoProgressError, RestartCount

RESULTS = ("groups.jsonl", "groups.jsonl.refused.jsonl", "groups.jsonl.quarantine.jsonl")


@pytest.fixture
def job(photos: Path, tiny_llava_dir: Path):
    """A job over the nine photographs in batches of two; `folder` is where its groups go."""

    def build(folder: str, **bootstrap: object) -> Config:
        groups = str(photos / folder / "groups.jsonl")
        options = {"sources": ["weaken"], "batch_size": 2, **bootstrap}
        return Config(
            model=ModelConfig(path=str(tiny_llava_dir), dtype="float32"),
            data=DataConfig(annotations=str(photos / "annotations.json"), groups=groups, image_root=str(photos)),
            bootstrap=BootstrapConfig(weaken=WeakenConfig(temperature=1.0, max_new_tokens=6), **options),
        )

    return build


def results(config: Config) -> dict[str, str]:
    folder = Path(config.data.groups).parent
    return {name: (folder / name).read_text() for name in RESULTS}


def parts(config: Config) -> Path:
    return Path(config.data.groups + ".parts")


def num_done(config: Config) -> int:
    reader = PartReader(parts(config))
    reader.poll()
    return len(reader)


def stop_after(monkeypatch: pytest.MonkeyPatch, num_batches: int, number: signal.Signals) -> None:
    """The process gets a signal while its batch of this number is written."""
    append, written = PartWriter.append, []

    def append_and_signal(self: PartWriter, outcomes) -> None:
        append(self, outcomes)
        written.append(1)
        if len(written) == num_batches:
            os.kill(os.getpid(), number)

    monkeypatch.setattr(PartWriter, "append", append_and_signal)


def test_shards_in_any_order_and_a_merge_make_the_groups_of_one_job(job, monkeypatch: pytest.MonkeyPatch) -> None:
    whole = job("whole")
    run_bootstrap(whole, progress=False)
    monkeypatch.setenv("WORLD_SIZE", "2")  # each shard has two ranks
    for shard in (2, 0, 1):
        for rank in ("1", "0"):
            monkeypatch.setenv("RANK", rank)
            shared = job("shared", num_shards=3, shard_index=shard)
            summary = run_bootstrap(shared, progress=False)
            assert summary.num_groups is None and not Path(shared.data.groups).exists()
    # Five batches for six workers: the last has none.
    shares = [len(path.read_text().splitlines()) for path in sorted(parts(shared).glob("rank-*.jsonl"))]
    assert sorted(shares) == [0, 1, 2, 2, 2, 2]
    monkeypatch.delenv("RANK")
    merged = run_merge(job("shared"))
    assert merged.num_groups == len(results(whole)["groups.jsonl"].splitlines())
    assert results(shared) == results(whole)


def test_a_merge_names_what_is_missing(job) -> None:
    with pytest.raises(ValueError, match="nothing to merge; run `bpo bootstrap`"):
        run_merge(job("shared"))
    run_bootstrap(job("shared", num_shards=2), progress=False)
    with pytest.raises(ValueError, match=r"4 of 9 outcomes are missing \(the first: weaken of record"):
        run_merge(job("shared"))
    with pytest.raises(ValueError, match="bootstrap.seed was 0, is 1"):
        run_merge(job("shared", seed=1))
    # Another number of shards goes on all the same.
    run_bootstrap(job("shared", num_shards=4, shard_index=1), progress=False)
    with pytest.raises(ValueError, match="2 of 9 outcomes are missing"):
        run_merge(job("shared"))


@pytest.mark.parametrize("changes", [{"num_shards": 0}, {"num_shards": 2, "shard_index": 2}, {"shard_index": -1}])
def test_a_shard_that_does_not_exist_is_refused(changes: dict[str, int]) -> None:
    with pytest.raises(ValueError, match="bootstrap.(num_shards|shard_index) is"):
        BootstrapConfig(**changes)


@pytest.mark.parametrize("number", [signal.SIGUSR2, signal.SIGTERM])
def test_a_signal_ends_the_batch_and_a_restart_goes_on(
    job, monkeypatch: pytest.MonkeyPatch, number: signal.Signals
) -> None:
    whole, stopped = job("whole"), job("stopped")
    run_bootstrap(whole, progress=False)
    stop_after(monkeypatch, 2, number)
    with StopRequest() as stop, pytest.raises(Interrupted, match="4 of this rank's 9 records"):
        run_bootstrap(stopped, progress=False, stop=stop)
    assert num_done(stopped) == 4 and not Path(stopped.data.groups).exists()
    run_bootstrap(stopped, progress=False)
    assert results(stopped) == results(whole)


def test_the_command_ends_with_the_codes_that_train_sh_knows(job, monkeypatch: pytest.MonkeyPatch, capsys) -> None:
    config = job("stopped")
    stop_after(monkeypatch, 1, signal.SIGUSR1)
    flags = ["--model.path", config.model.path, "--model.dtype", "float32", "--data.annotations"]
    flags += [config.data.annotations, "--data.groups", config.data.groups, "--data.image_root", config.data.image_root]
    flags += ["--bootstrap.sources", '["weaken"]', "--bootstrap.batch_size", "2"]
    flags += ["--bootstrap.weaken.max_new_tokens", "6"]
    before = signal.getsignal(signal.SIGTERM)
    assert bpo(["bootstrap", *flags]) == EXIT_INTERRUPTED
    assert "2 of this rank's 9 records" in capsys.readouterr().err
    assert signal.getsignal(signal.SIGTERM) == before
    RestartCount(parts(config), "restarts-00000-of-00001.json").start(2, 1)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "4")
    assert bpo(["bootstrap", *flags, "--bootstrap.max_idle_restarts", "1"]) == EXIT_NO_PROGRESS


def test_restarts_that_finish_nothing_come_to_an_end(job, monkeypatch: pytest.MonkeyPatch) -> None:
    config = job("stuck", num_shards=2)

    def start(restarts: int) -> None:
        """A start that is told to stop before its first batch."""
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        with StopRequest() as stop:
            stop.received = True
            run_bootstrap(config, progress=False, stop=stop)

    for restarts in range(4):
        with pytest.raises(Interrupted):
            start(restarts)
    with pytest.raises(NoProgressError, match=r"3 restarts since outcome 0.*restarts-00000-of-00002"):
        start(4)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "0")
    run_bootstrap(job("stuck", num_shards=2, shard_index=1), progress=False)
    with pytest.raises(NoProgressError):  # what another shard has done is no progress of this one
        start(5)


def test_progress_starts_the_count_anew(job, monkeypatch: pytest.MonkeyPatch) -> None:
    config = job("slow")
    for restarts in range(1, 5):  # one batch a start: more starts than max_idle_restarts allows without progress
        monkeypatch.setenv("SLURM_RESTART_COUNT", str(restarts))
        stop_after(monkeypatch, 1, signal.SIGUSR1)
        with StopRequest() as stop, pytest.raises(Interrupted):
            run_bootstrap(config, progress=False, stop=stop)
    monkeypatch.setenv("SLURM_RESTART_COUNT", "5")
    run_bootstrap(config, progress=False)
    assert num_done(config) == 9 and not list(parts(config).glob("restarts-*"))
