"""Whole bootstrapping jobs: sharding, resuming, quarantine."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
from datasets import Dataset

from bpo.bootstrap import run as run_module
from bpo.bootstrap.engines import models as engines_module
from bpo.bootstrap.job.outcomes import OutcomeWriter
from bpo.bootstrap.run import run_bootstrap
from bpo.config.bootstrap import ServerConfig
from bpo.config.select import SelectConfig
from bpo.config.training import Config
from bpo.formats.files import read_groups
from bpo.job.exits import Interrupted
from bpo.job.launch import Ranks
from bpo.job.signals import StopRequest
from tests.bootstrap.fake_server import completion, fake_server
from tests.bootstrap.jobs import RESULTS, num_outcomes, parts, results, stop_after

MakeConfig = Callable[..., Config]


def lines(config: Config, name: str) -> list[dict[str, Any]]:
    return [json.loads(line) for line in results(config)[name].splitlines()]


def test_groups_hold_the_annotation_and_its_negatives_with_provenance(make: MakeConfig, tiny_llava_dir: Path) -> None:
    config = make("a", sources=["weaken", "inject", "unweakened"])
    summary = run_bootstrap(config, progress=False)
    groups = read_groups(Path(config.data.groups))
    assert summary.num_groups == len(groups) >= 8
    assert [group.id for group in groups] == sorted(group.id for group in groups)
    for group in groups:
        gt, *negatives = group.completions
        assert (gt.score, gt.type, gt.provenance.source) == (1.0, "gt", "annotation")
        assert negatives and all(negative.score == 0 for negative in negatives)
    by_type = {c.type: c.provenance for group in groups for c in group.completions}
    assert set(by_type) == {"gt", "mllm-hal", "llm-hal", "mllm-self"}
    weak, own, injected = by_type["mllm-hal"], by_type["mllm-self"], by_type["llm-hal"]
    assert (weak.source, weak.noise_step, weak.temperature) == ("weakened-image", 900, 1.0)
    assert weak.model == str(tiny_llava_dir)
    assert (own.source, own.noise_step) == ("unweakened-image", None)
    assert (injected.source, injected.top_p, injected.mode in ("qa", "description")) == ("injected-errors", 0.95, True)
    assert weak.seed is not None and len({weak.seed, own.seed, injected.seed}) == 3


def test_counts_add_up_and_refusals_are_listed(make: MakeConfig) -> None:
    config = make("a")
    summary = run_bootstrap(config, progress=False)
    refused = lines(config, "groups.jsonl.refused.jsonl")
    for source in ("weaken", "inject"):
        assert summary.kept[source] + sum(summary.refused.get(source, {}).values()) == 9
    assert len(refused) == sum(sum(reasons.values()) for reasons in summary.refused.values())
    stored = json.loads(Path(config.data.groups + ".summary.json").read_text())
    assert stored["kept"] == summary.kept and set(stored["seconds"]) == {"weaken", "inject"}


def test_batch_size_and_order_of_the_file_change_nothing(make: MakeConfig, photos: Path) -> None:
    reference = make("a")
    run_bootstrap(reference, progress=False)
    for folder, batch_size in (("b", 1), ("c", 16)):
        config = make(folder, batch_size=batch_size)
        run_bootstrap(config, progress=False)
        assert results(config) == results(reference)
    backwards = make("d")
    records = json.loads((photos / "annotations.json").read_text())
    (photos / "backwards.json").write_text(json.dumps(records[::-1]))
    backwards.data.annotations = str(photos / "backwards.json")
    run_bootstrap(backwards, progress=False)
    assert read_groups(Path(backwards.data.groups)) == read_groups(Path(reference.data.groups))[::-1]


def test_another_seed_gives_other_negatives(make: MakeConfig) -> None:
    first, second = make("a"), make("b", seed=1)
    run_bootstrap(first, progress=False)
    run_bootstrap(second, progress=False)
    assert results(first)["groups.jsonl"] != results(second)["groups.jsonl"]


def as_rank(monkeypatch: pytest.MonkeyPatch, rank: int, world_size: int) -> None:
    monkeypatch.setattr(run_module, "ranks_from_environment", lambda: Ranks(rank, world_size, rank))


@pytest.mark.parametrize("cut_bytes", [1, 400, 10_000])
def test_a_killed_job_goes_on_and_redoes_a_torn_line(make: MakeConfig, cut_bytes: int) -> None:
    whole, killed = make("whole"), make("killed")
    run_bootstrap(whole, progress=False)
    run_bootstrap(killed, progress=False)
    part = parts(killed) / "rank-00000.jsonl"
    content = part.read_bytes()
    part.write_bytes(content[: max(0, len(content) - cut_bytes)])
    survivors = part.read_bytes().rpartition(b"\n")[0]
    for name in RESULTS:
        (Path(killed.data.groups).parent / name).unlink()
    run_bootstrap(killed, progress=False)
    assert part.read_bytes().startswith(survivors)
    assert sorted(part.read_bytes().splitlines()) == sorted(content.splitlines())
    assert results(killed) == results(whole)


def test_a_job_may_go_on_with_other_ranks_and_batches(make: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, killed = make("whole"), make("killed")
    run_bootstrap(whole, progress=False)
    for rank in (1, 2):
        as_rank(monkeypatch, rank, 3)
        with StopRequest() as stop, pytest.raises(Interrupted):
            stop_after(monkeypatch, 1, stop)
            run_bootstrap(killed, progress=False, stop=stop)
    done = {line for path in parts(killed).glob("rank-*.jsonl") for line in path.read_bytes().splitlines()}
    as_rank(monkeypatch, 0, 1)
    killed.bootstrap.batch_size = 3
    run_bootstrap(killed, progress=False)
    now = [line for path in parts(killed).glob("rank-*.jsonl") for line in path.read_bytes().splitlines()]
    assert done < set(now) and len(now) == 18
    assert results(killed) == results(whole)


def test_a_finished_job_loads_no_model_again(make: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    config = make("a")
    run_bootstrap(config, progress=False)
    before = results(config)
    for name in ("load_model", "load_causal_lm"):
        monkeypatch.setattr(engines_module, name, lambda *a, **k: pytest.fail("a model was loaded"))
    run_bootstrap(config, progress=False)
    assert results(config) == before


def test_a_line_that_lost_power_is_done_again(make: MakeConfig) -> None:
    config = make("a")
    run_bootstrap(config, progress=False)
    before = results(config)
    part = parts(config) / "rank-00000.jsonl"
    first, rest = part.read_bytes().split(b"\n", 1)
    part.write_bytes(b"\0" * len(first) + b"\n" + rest)
    run_bootstrap(config, progress=False)
    assert results(config) == before


def test_changed_options_are_refused_by_name(make: MakeConfig) -> None:
    run_bootstrap(make("a"), progress=False)
    changed = make("a", seed=3)
    changed.bootstrap.weaken = replace(changed.bootstrap.weaken, noise_step=500)
    with pytest.raises(ValueError, match=r"bootstrap\.seed was 0, is 3") as error:
        run_bootstrap(changed, progress=False)
    assert "bootstrap.weaken.noise_step was 900, is 500" in str(error.value)
    assert "temperature" not in str(error.value)


def test_other_weights_at_the_same_path_are_refused(make: MakeConfig, tiny_llava_dir: Path, tmp_path: Path) -> None:
    config = make("a", limit=2, sources=["weaken"])
    config.model.path = str(shutil.copytree(tiny_llava_dir, tmp_path / "model"))
    run_bootstrap(config, progress=False)
    weights = next(Path(config.model.path).glob("*.safetensors"))
    content = bytearray(weights.read_bytes())
    content[-1] ^= 1
    weights.write_bytes(content)
    with pytest.raises(ValueError, match=r"model\.path \(weights\)"):
        run_bootstrap(config, progress=False)


def test_annotations_may_be_a_folder_that_datasets_saved(make: MakeConfig, photos: Path) -> None:
    records = json.loads((photos / "annotations.json").read_text())
    of_list, of_folder = make("list", sources=["weaken"]), make("folder", sources=["weaken"])
    Dataset.from_list(records).save_to_disk(photos / "saved")
    of_folder.data.annotations = str(photos / "saved")
    run_bootstrap(of_list, progress=False)
    run_bootstrap(of_folder, progress=False)
    assert results(of_folder) == results(of_list)
    Dataset.from_list(records[:4]).save_to_disk(photos / "saved")
    with pytest.raises(ValueError, match=r"data\.annotations \(content\)"):
        run_bootstrap(of_folder, progress=False)


def test_two_processes_cannot_write_one_part(tmp_path: Path) -> None:
    hold = "import sys, pathlib; from bpo.bootstrap.job.outcomes import *; p = pathlib.Path(sys.argv[1]);"
    hold += "w = OutcomeWriter(p, 0); w.append([Outcome('r', 'weaken', 'kept')]);"
    hold += "OutcomeReader(p).poll(); print(1, flush=True); sys.stdin.read()"
    command = [sys.executable, "-c", hold, str(tmp_path)]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE) as other:
        assert other.stdout.readline() == b"1\n"
        with pytest.raises(ValueError, match="rank-00000.jsonl is being written by another process"):
            OutcomeWriter(tmp_path, 0)
        other.stdin.close()
    OutcomeWriter(tmp_path, 0)


def test_a_broken_image_is_quarantined_and_the_job_goes_on(make: MakeConfig, photos: Path) -> None:
    whole = make("whole")
    run_bootstrap(whole, progress=False)
    (photos / "3.png").write_bytes(b"no picture")
    for folder, sources in (("both", ["weaken", "inject"]), ("text", ["inject"])):
        config = make(folder, sources=sources)
        config.data.max_bad_share = 0.2
        summary = run_bootstrap(config, progress=False)
        (entry,) = lines(config, "groups.jsonl.quarantine.jsonl")
        assert (entry["file"], entry["record"], summary.num_quarantined) == (["3.png"], "photo-3", 1)
        assert "3.png" in entry["error"]
        assert all(group.id != "photo-3" for group in read_groups(Path(config.data.groups)))
    both = read_groups(Path(make("both").data.groups))
    assert both == tuple(g for g in read_groups(Path(whole.data.groups)) if g.id != "photo-3")


def test_bad_images_stop_a_job_above_the_ceiling_or_at_the_first(make: MakeConfig, photos: Path) -> None:
    for name in ("3.png", "5.png"):
        (photos / name).write_bytes(b"no picture")
    config = make("a", sources=["weaken"], batch_size=1)
    with pytest.raises(ValueError, match=r"of 9 records are bad, more than data\.max_bad_share"):
        run_bootstrap(config, progress=False)
    kept = num_outcomes(config)
    config.data.on_bad = "error"
    with pytest.raises(ValueError, match=r"[35]\.png"):
        run_bootstrap(config, progress=False)
    config.data.on_bad, config.data.max_bad_share = "quarantine", 0.3
    assert run_bootstrap(config, progress=False).num_quarantined == 2
    assert 0 < kept < 9


def test_limits(make: MakeConfig) -> None:
    config = make("a", limit=5, max_inject_records=2)
    summary = run_bootstrap(config, progress=False)
    done = {
        (json.loads(line)["source"], json.loads(line)["id"]) for line in (parts(config) / "rank-00000.jsonl").open()
    }
    assert {record for source, record in done if source == "inject"} == {"photo-0", "photo-1"}
    assert len({record for source, record in done if source == "weaken"}) == 5
    assert summary.num_annotations == 5
    # A higher limit later keeps finished records.
    more = run_bootstrap(make("a", limit=7, max_inject_records=2), progress=False)
    assert more.num_annotations == 7


def test_an_annotation_that_is_no_use_is_left_out_whole(make: MakeConfig, photos: Path) -> None:
    records = json.loads((photos / "annotations.json").read_text())
    records[2]["conversations"][1]["value"] = "word " * 351
    (photos / "annotations.json").write_text(json.dumps(records))
    config = make("a", sources=["weaken"])
    summary = run_bootstrap(config, progress=False)
    assert summary.refused["annotation"] == {"too-long": 1}
    assert all(group.id != "photo-2" for group in read_groups(Path(config.data.groups)))


def test_the_own_language_model_and_the_weakened_image_share_one_load(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch
) -> None:
    loads: list[str] = []
    real = engines_module.load_model
    monkeypatch.setattr(engines_module, "load_model", lambda config, device: loads.append("x") or real(config, device))
    summary = run_bootstrap(make("a", inject={"max_new_tokens": 12}), progress=False)
    assert loads == ["x"]
    assert summary.kept["inject"] > 0


def test_candidates_share_one_load(make: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    loads: list[str] = []
    for name in ("load_model", "load_causal_lm"):
        real = getattr(engines_module, name)
        load = lambda *args, name=name, real=real: loads.append(name) or real(*args)  # noqa: E731
        monkeypatch.setattr(engines_module, name, load)
    run_bootstrap(config := make("a", limit=2, select=SelectConfig(candidates=2)), progress=False)
    assert loads == ["load_model", "load_causal_lm"] and num_outcomes(config) == 8


def test_a_job_without_any_usable_negative_is_an_error_that_says_why(make: MakeConfig) -> None:
    with fake_server(lambda body, number: completion("")) as (url, _):
        config = make("a", inject={"server": ServerConfig(url=url, model="m")}, sources=["inject"])
        with pytest.raises(ValueError, match=r"none of 9 annotations.*'empty': 9"):
            run_bootstrap(config, progress=False)
    assert len((Path(config.data.groups + ".refused.jsonl")).read_text().splitlines()) == 9


@pytest.mark.parametrize("name", ["annotations", "groups"])
def test_a_missing_path_is_an_error_naming_the_option(make: MakeConfig, name: str) -> None:
    config = make("a")
    setattr(config.data, name, "")
    with pytest.raises(ValueError, match=f"data.{name} is empty"):
        run_bootstrap(config, progress=False)


def test_more_candidates_later_keep_the_earlier_ones_and_one_gives_the_same_files_as_before(make: MakeConfig) -> None:
    config = make("a", sources=["weaken", "inject", "text-only"])
    run_bootstrap(config, progress=False)
    before, journal = results(config), (parts(config) / "rank-00000.jsonl").read_bytes()
    more = replace(config, bootstrap=replace(config.bootstrap, select=SelectConfig(candidates=3)))
    run_bootstrap(more, progress=False)
    added = (parts(config) / "rank-00000.jsonl").read_bytes()
    assert added.startswith(journal)
    everything = [json.loads(line) for line in added.splitlines()]
    rows = everything[journal.count(b"\n") :]
    keys = [f"{source}#{number}" for source in ("weaken", "inject", "text-only") for number in (1, 2)]
    assert sorted(row["source"] for row in rows) == sorted(keys * 9)
    for row in rows:
        assert row["provenance"]["candidate"] == int(row["source"][-1])
    assert len({row["provenance"]["seed"] for row in everything}) == len(everything) == 81
    run_bootstrap(config, progress=False)
    assert results(config) == before and (parts(config) / "rank-00000.jsonl").read_bytes() == added
