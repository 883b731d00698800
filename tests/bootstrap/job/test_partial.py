"""Merges of unfinished jobs."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path

import pytest

from bpo.bootstrap import run as run_module
from bpo.bootstrap.job.leases import Leases
from bpo.bootstrap.job.outcomes import Outcome, OutcomeWriter
from bpo.bootstrap.run import run_bootstrap, run_merge
from bpo.cli import main as bpo
from bpo.config.bootstrap import BootstrapConfig, InjectConfig
from bpo.config.training import Config, DataConfig
from bpo.formats.files import read_groups
from bpo.job.exits import Interrupted
from bpo.job.signals import StopRequest
from bpo.records import Provenance
from tests.bootstrap.jobs import parts, results, rewrite_instantly, stop_after

MakeConfig = Callable[..., Config]


def stopped(config: Config, monkeypatch: pytest.MonkeyPatch, num_batches: int) -> None:
    """Runs a job until a stop request after some batches."""
    with monkeypatch.context() as patch, StopRequest() as stop, pytest.raises(Interrupted):
        stop_after(patch, num_batches, stop)
        run_bootstrap(config, progress=False, stop=stop)


def summary_of(config: Config) -> dict[str, object]:
    found: dict[str, object] = json.loads(Path(config.data.groups + ".summary.json").read_text())
    return found


def test_a_merge_of_a_running_job_uses_what_is_finished_and_changes_nothing_of_it(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, running = make("whole", sources=["weaken"]), make("running", sources=["weaken"])
    run_bootstrap(whole, progress=False)
    stopped(running, monkeypatch, num_batches=1)
    with Leases(parts(running) / "claims", "worker-00001", 120) as other:
        assert other.take("weaken-4x1-000001")
        torn = next(parts(running).glob("rank-*.jsonl"))
        torn.write_bytes(torn.read_bytes() + b'{"id": "pho')  # being written
        before = {path: path.read_bytes() for path in parts(running).rglob("*") if path.is_file()}
        summary = run_merge(running, partial=True)
        assert {path: path.read_bytes() for path in parts(running).rglob("*") if path.is_file()} == before
    assert summary.partial and summary.unfinished == {"weaken": 5} and summary.num_groups is not None
    assert 0 < summary.num_groups <= 4 and set(read_groups(Path(running.data.groups))) <= set(
        read_groups(Path(whole.data.groups))
    )
    assert summary_of(running)["partial"] is True and summary_of(running)["unfinished"] == {"weaken": 5}
    run_bootstrap(running, progress=False)
    assert results(running) == results(whole) and summary_of(running)["partial"] is False


def test_a_job_that_ends_during_a_partial_merge_is_merged_whole(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    whole, running = make("whole", sources=["weaken"]), make("running", sources=["weaken"])
    run_bootstrap(whole, progress=False)
    stopped(running, monkeypatch, num_batches=1)
    merge = run_module.merge

    def while_the_job_ends(*arguments: object) -> object:
        monkeypatch.setattr(run_module, "merge", merge)
        run_bootstrap(running, progress=False)
        return merge(*arguments)

    monkeypatch.setattr(run_module, "merge", while_the_job_ends)
    assert not run_merge(running, partial=True).partial
    assert results(running) == results(whole) and summary_of(running)["partial"] is False


def job_of_objects(folder: Path) -> Config:
    """1,200 captions in the order of their length: 38 % are short and about dogs, the others about cats."""
    rng = random.Random(0)
    records = []
    for number in range(1200):
        words = 5 + number // 40
        name = "dog" if number < 456 else "cat"
        text = " ".join([f"A {name} near a", *rng.choices(["red", "blue", "old", "large"], k=words), "house."])
        turns = [{"from": "human", "value": "<image>\nDescribe it."}, {"from": "gpt", "value": text}]
        records.append({"id": f"r{number}", "image": f"{number}.png", "conversations": turns})
    folder.mkdir(parents=True)
    (folder / "annotations.json").write_text(json.dumps(records))
    data = DataConfig(annotations=str(folder / "annotations.json"), groups=str(folder / "groups.jsonl"))
    inject = InjectConfig(mode="description", llm="instant")
    return Config(data=data, bootstrap=BootstrapConfig(sources=["inject"], inject=inject, batch_size=4))


@pytest.mark.parametrize("share", [0.1, 0.7])
def test_what_a_stopped_job_has_finished_is_a_fair_sample(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, share: float, capsys: pytest.CaptureFixture[str]
) -> None:
    rewrite_instantly(monkeypatch)
    config = job_of_objects(tmp_path / "job")
    stopped(config, monkeypatch, num_batches=round(300 * share))
    flags = ["--data.annotations", config.data.annotations, "--data.groups", config.data.groups]
    flags += ["--bootstrap.sources", '["inject"]', "--bootstrap.inject.llm", "instant", "--bootstrap.batch_size", "4"]
    assert bpo(["merge", "--partial", *flags, "--bootstrap.inject.mode", "description"]) == 0
    num_done = round(1200 * share)
    printed = capsys.readouterr().out
    assert f"{num_done} groups of 1200" in printed and f"no outcome yet: inject {1200 - num_done};" in printed
    assert f"llm-hal: {num_done} of 1200 sampled annotations; 0 of" in printed
    texts = [group.completions[0].response for group in read_groups(Path(config.data.groups))]
    assert abs(sum("dog" in text for text in texts) / len(texts) - 0.38) < 0.05
    every = [record["conversations"][1]["value"] for record in json.loads(Path(config.data.annotations).read_text())]
    assert abs(sum(map(len, texts)) / len(texts) - sum(map(len, every)) / len(every)) < 4


def test_a_biased_sample_is_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """As if the longest records had been generated first."""
    config = job_of_objects(tmp_path / "job")
    identities = run_module.check_identity(config, parts(config))
    flags = ["--data.annotations", config.data.annotations, "--data.groups", config.data.groups]
    flags += ["--bootstrap.sources", '["inject"]', "--bootstrap.inject.llm", "instant"]
    flags += ["--bootstrap.inject.mode", "description"]
    assert bpo(["merge", "--partial", *flags]) == 1
    assert "1200 of 1200 outcomes are missing" in capsys.readouterr().err
    with OutcomeWriter(parts(config), 0, identities.mark) as writer:
        writer.append(
            Outcome(f"r{number}", "inject", "kept", f"A zebra {number}.", provenance=Provenance("injected-errors"))
            for number in range(360, 1200)
        )
    assert bpo(["merge", *flags]) == 1
    assert "or merge what is finished with --partial" in capsys.readouterr().err
    assert bpo(["merge", "--partial", *flags]) == 0
    assert "object 'dog' in 11.4%, of all in 38.0%" in capsys.readouterr().out
