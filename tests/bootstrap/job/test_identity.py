"""What may change between the starts of a bootstrapping job."""

from __future__ import annotations

import json
import logging
import shutil
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bpo.bootstrap.engines import models as engines_module
from bpo.bootstrap.job.identity import check_identity, job_options
from bpo.bootstrap.run import run_bootstrap, run_merge
from bpo.config.bootstrap import (
    BootstrapConfig,
    InjectConfig,
    SampleConfig,
    SegmentConfig,
    ServerConfig,
    ValidateConfig,
    WeakenConfig,
)
from bpo.config.negatives import EditConfig
from bpo.config.training import Config, DataConfig, ModelConfig
from bpo.job.exits import Interrupted
from bpo.job.signals import StopRequest
from tests.bootstrap.jobs import num_outcomes, parts, results, stop_after

MakeConfig = Callable[..., Config]


def test_a_job_is_not_continued_with_other_pixel_limits(photos: Path, tmp_path: Path) -> None:
    config = Config(data=DataConfig(annotations=str(photos / "annotations.json"), image_root=str(photos)))
    check_identity(config, tmp_path / "job")
    check_identity(config, tmp_path / "job")
    capped = replace(config, data=replace(config.data, max_pixels=3136))
    with pytest.raises(ValueError, match="data.max_pixels was None, is 3136"):
        check_identity(capped, tmp_path / "job")
    faithful = replace(config, data=replace(config.data, image_aspect="pad", system_prompt="Be brief."))
    with pytest.raises(ValueError, match="data.image_aspect was None, is 'pad'.*data.system_prompt was None, is 'Be b"):
        check_identity(faithful, tmp_path / "job")


def test_outcomes_judged_by_fewer_rules_are_named_and_used_by_switching_them_off(photos: Path, tmp_path: Path) -> None:
    """As of a version without `same_form` and with another default of `max_changed_share`."""
    config = Config(data=DataConfig(annotations=str(photos / "annotations.json"), image_root=str(photos)))
    config.bootstrap.sources = ["weaken", "inject"]
    config.bootstrap.validate = ValidateConfig(same_form=False, max_changed_share=1.0)
    check_identity(config, tmp_path / "job")
    config.bootstrap.validate = ValidateConfig()
    with pytest.raises(ValueError, match="same_form was None, is True.*max_changed_share was 1.0, is 0.6"):
        check_identity(config, tmp_path / "job")


def test_a_note_beside_the_model_changes_nothing_and_another_tokenizer_does(
    photos: Path, tmp_path: Path, tiny_llava_dir: Path
) -> None:
    model = Path(shutil.copytree(tiny_llava_dir, tmp_path / "model"))
    data = DataConfig(annotations=str(photos / "annotations.json"), image_root=str(photos))
    config = Config(model=ModelConfig(path=str(model)), data=data)
    check_identity(config, tmp_path / "job")
    (model / "notes.txt").write_text("from the archive")
    check_identity(config, tmp_path / "job")
    (model / "tokenizer_config.json").write_text((model / "tokenizer_config.json").read_text() + " ")
    with pytest.raises(ValueError, match=r"model.path \(weights\) was"):
        check_identity(config, tmp_path / "job")


@pytest.mark.parametrize("content", ["", "{", "5", "[1]"])
def test_a_damaged_identity_is_named(photos: Path, tmp_path: Path, content: str) -> None:
    config = Config(data=DataConfig(annotations=str(photos / "annotations.json"), image_root=str(photos)))
    check_identity(config, tmp_path / "job")
    (tmp_path / "job" / "job.json").write_text(content)
    with pytest.raises(ValueError, match=r"job.json is damaged .*start over"):
        check_identity(config, tmp_path / "job")


def changed_sources(photos: Path, folder: Path, before: dict[str, Any], after: dict[str, Any]) -> set[str]:
    """The sources that a change of `bootstrap` options concerns."""
    data = DataConfig(annotations=str(photos / "annotations.json"), image_root=str(photos))
    sources = ["weaken", "crop", "mask", "regenerate", "unweakened", "inject", "sample", "greedy", "segment"]
    first = check_identity(Config(data=data, bootstrap=BootstrapConfig(sources=sources, **before)), folder)
    accepting = BootstrapConfig(sources=sources, accept_changes=sources, **after)
    second = check_identity(Config(data=data, bootstrap=accepting), folder)
    return {source for source in sources if first.current[source] != second.current[source]}


EVERY_SOURCE = {"weaken", "crop", "mask", "regenerate", "unweakened", "inject", "sample", "greedy", "segment"}
SEPARATE = {"inject": InjectConfig(llm="another-model")}


@pytest.mark.parametrize(
    ("before", "after", "concerned"),
    [
        ({}, {"weaken": WeakenConfig(noise_step=500)}, {"weaken", "regenerate"}),
        ({}, {"weaken": WeakenConfig(crop_share=0.5)}, {"crop"}),
        (SEPARATE, {"inject": InjectConfig(llm="another-model", temperature=0.5)}, {"inject"}),
        ({}, {"inject": InjectConfig(server=ServerConfig(url="http://host/v1", model="m"))}, {"inject"}),
        ({}, {"validate": ValidateConfig(max_changed_share=0.5)}, {"inject"}),
        ({}, {"validate": ValidateConfig(refuse_duplicates=False), "target_shares": {"crop": 1.0}}, set()),
        (
            SEPARATE,
            {"weaken": WeakenConfig(temperature=0.5), **SEPARATE},
            {"weaken", "crop", "mask", "regenerate", "unweakened"},
        ),
        ({}, {"sample": SampleConfig(count=9)}, set()),
        ({}, {"sample": SampleConfig(temperature=0.5, top_p=0.5)}, {"sample"}),
        ({}, {"sample": SampleConfig(max_new_tokens=5)}, {"sample", "greedy"}),
        ({}, {"segment": SegmentConfig(top_k=1)}, {"segment"}),
        ({}, {"validate": ValidateConfig(same_language=False)}, EVERY_SOURCE - {"sample", "greedy"}),
        ({}, {"validate": ValidateConfig(max_repeats=9)}, EVERY_SOURCE),
    ],
)
def test_an_option_concerns_its_own_sources(
    photos: Path, tmp_path: Path, before: dict[str, Any], after: dict[str, Any], concerned: set[str]
) -> None:
    assert changed_sources(photos, tmp_path / "job", before, after) == concerned


# Of the defaults at commit 584bba9, before there were sources for judges, segments and parts.
EARLIER = {
    "weaken": "c7b42d2f061c",
    "inject": "715b5282ea1f",
    "crop": "091ea9df7c03",
    "mask": "c8d72db2bc03",
    "regenerate": "3d2baca10b59",
    "text-only": "b7497b23acc8",
    "unweakened": "b7497b23acc8",
    "edit": "ab715b102c56",
}


def test_outcomes_of_earlier_versions_are_still_used_and_a_part_concerns_only_edits(
    photos: Path, tmp_path: Path
) -> None:
    data = DataConfig(annotations=str(photos / "annotations.json"), image_root=str(photos))
    options = BootstrapConfig(sources=[*EARLIER, "sample", "segment"], edit=EditConfig(by="blind"))
    config = Config(data=data, bootstrap=options)
    current = check_identity(config, tmp_path).current
    assert {source: current[source] for source in EARLIER} == EARLIER
    with pytest.raises(ValueError, match=r"with other options: data.part was None, is '1/3' \(edit\)\. "):
        check_identity(replace(config, data=replace(data, part="1/3")), tmp_path)


@pytest.mark.parametrize(("llm", "sources"), [("", {"weaken", "inject"}), ("another-model", {"weaken"})])
def test_another_model_concerns_the_sources_that_it_answers(
    photos: Path, tmp_path: Path, llm: str, sources: set[str]
) -> None:
    data = DataConfig(annotations=str(photos / "annotations.json"), image_root=str(photos))
    options = BootstrapConfig(sources=["weaken", "inject"], inject=InjectConfig(llm=llm))
    config = Config(model=ModelConfig(path="a"), data=data, bootstrap=options)
    check_identity(config, tmp_path)
    with pytest.raises(ValueError, match="model.path was 'a', is 'b'") as error:
        check_identity(replace(config, model=ModelConfig(path="b")), tmp_path)
    assert set(json.loads(str(error.value).partition("accept_changes '")[2].partition("'")[0])) == sources


def test_a_source_with_other_options_starts_again_if_accepted_and_comes_back(
    make: MakeConfig, monkeypatch: pytest.MonkeyPatch, tiny_llm_dir: Path, caplog: pytest.LogCaptureFixture
) -> None:
    llm = {"llm": str(tiny_llm_dir), "dtype": "float32", "max_new_tokens": 12}
    first, other = make("a", inject=llm, limit=4), make("a", inject={**llm, "temperature": 0.5}, limit=4)
    run_bootstrap(first, progress=False)
    before, journals = results(first), {path: path.read_bytes() for path in parts(first).glob("rank-*.jsonl")}
    message = r"contains 4 outcomes with other options: bootstrap.inject.temperature was 0.8, is 0.5 \(inject\)\. "
    with pytest.raises(ValueError, match=message + r".*--bootstrap.accept_changes '\[\"inject\"\]'"):
        run_bootstrap(other, progress=False)
    other.bootstrap.accept_changes = ["inject"]
    with monkeypatch.context() as patch, StopRequest() as stop, pytest.raises(Interrupted):
        stop_after(patch, 1, stop)
        run_bootstrap(other, progress=False, stop=stop)
    other.bootstrap.accept_changes = []  # once is enough
    with caplog.at_level(logging.INFO):
        run_bootstrap(other, progress=False)
    assert "4 outcomes of `inject` with other options are kept, not used" in caplog.text
    fresh = make("fresh", inject={**llm, "temperature": 0.5}, limit=4)
    run_bootstrap(fresh, progress=False)
    assert results(other) == results(fresh) != before
    assert all(path.read_bytes().startswith(content) for path, content in journals.items())
    lines = [json.loads(line) for path in journals for line in path.read_bytes().splitlines()]
    assert [line["source"] for line in lines].count("weaken") == 4 and len(lines) == 12
    for name in ("load_model", "load_causal_lm"):
        monkeypatch.setattr(engines_module, name, lambda *a, **k: pytest.fail("a model was loaded"))
    run_merge(first)  # the first options again
    assert results(first) == before
    run_bootstrap(other, progress=False)
    assert results(other) == results(fresh)


def test_a_source_may_come_and_go(make: MakeConfig) -> None:
    sources = [["weaken", "mask"], ["weaken"], ["crop", "weaken"], ["weaken", "mask", "crop"]]
    for chosen, total in zip(sources, (6, 6, 9, 9), strict=True):
        run_bootstrap(config := make("a", sources=chosen, limit=3), progress=False)
        assert num_outcomes(config) == total
        run_bootstrap(fresh := make("-".join(chosen), sources=chosen, limit=3), progress=False)
        assert results(config) == results(fresh)


def test_a_merge_leaves_the_identity_of_a_job_alone(make: MakeConfig) -> None:
    config = make("a", sources=["weaken"])
    run_bootstrap(config, progress=False)
    before = (parts(config) / "job.json").read_bytes()
    other = make("a", sources=["weaken", "crop"])
    with pytest.raises(ValueError, match="9 of 18 outcomes are missing"):
        run_merge(other)
    assert (parts(config) / "job.json").read_bytes() == before


def as_written_by_an_earlier_version(config: Config) -> None:
    """One identity for all sources, and outcomes without marks."""
    identity = job_options(config) | {"bootstrap.sources": sorted(config.bootstrap.sources)}
    (parts(config) / "job.json").write_text(json.dumps(identity, indent=2) + "\n")
    for path in parts(config).glob("rank-*.jsonl"):
        lines = [json.loads(line) for line in path.read_bytes().splitlines()]
        assert all(line.pop("identity") for line in lines)
        path.write_text("".join(json.dumps(line) + "\n" for line in lines))


@pytest.mark.parametrize("llm", ["", "another-model"])
def test_the_identity_of_an_earlier_version_is_read(photos: Path, tmp_path: Path, llm: str) -> None:
    validate = ValidateConfig(same_form=False)  # an option that it did not have
    options = BootstrapConfig(sources=["weaken", "inject"], inject=InjectConfig(llm=llm), validate=validate)
    data = DataConfig(annotations=str(photos / "annotations.json"), image_root=str(photos))
    config = Config(data=data, bootstrap=options)
    stored = {name: value for name, value in job_options(config).items() if value is not None}
    (tmp_path / "job.json").write_text(json.dumps(stored | {"bootstrap.sources": ["inject", "weaken"]}))
    identities = check_identity(config, tmp_path)
    assert identities.accepts("weaken", "") and identities.accepts("inject", "") and not identities.accepts("crop", "")
    assert check_identity(config, tmp_path) == identities
    options.validate = ValidateConfig(same_form=True)
    with pytest.raises(ValueError, match=r"bootstrap.validate.same_form was None, is True \(weaken, inject\)"):
        check_identity(config, tmp_path)


def test_a_job_of_an_earlier_version_goes_on(make: MakeConfig, monkeypatch: pytest.MonkeyPatch) -> None:
    whole, config = make("whole", limit=6), make("a", limit=6)
    run_bootstrap(whole, progress=False)
    with monkeypatch.context() as patch, StopRequest() as stop, pytest.raises(Interrupted):
        stop_after(patch, 2, stop)
        run_bootstrap(config, progress=False, stop=stop)
    as_written_by_an_earlier_version(config)
    num_old = num_outcomes(config)
    weaken = WeakenConfig(temperature=1.0, max_new_tokens=12, noise_step=5)
    with pytest.raises(ValueError, match=r"bootstrap.weaken.noise_step was 900, is 5 \(weaken\)"):
        run_bootstrap(make("a", limit=6, weaken=weaken), progress=False)
    run_bootstrap(config, progress=False)
    assert 0 < num_old < num_outcomes(config) == 12 and results(config) == results(whole)
    changed = make("a", limit=6, weaken=weaken, accept_changes=["weaken"])
    run_bootstrap(changed, progress=False)
    run_bootstrap(config, progress=False)  # back to outcomes with and without marks
    assert results(config) == results(whole)
