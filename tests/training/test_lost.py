"""Groups whose images change during a run: left out by name, at their place in the plan, in later starts too."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict, replace
from pathlib import Path
from typing import Any

import pytest
from PIL import Image

from bpo.config.training import Config
from bpo.data.encode import load_encoder
from bpo.formats.bad_records import BadRecords, TooManyBadRecords
from bpo.formats.problems import RecordError
from bpo.job.launch import Ranks
from bpo.model.load import resolve_model
from bpo.model.reference.store import ReferenceStore
from bpo.records import LostGroup
from bpo.training.batches import training_batches
from bpo.training.lost import LostGroups
from bpo.training.measure import TrainingData, measure_groups
from bpo.training.plan import plan_training
from bpo.training.reference_pass import fill_reference_store
from tests.training.doubles import NUM_GROUPS, EngineWithoutModel
from tests.training.test_reference_pass import no_collectives


@pytest.fixture
def own_images(run: Config, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Config:
    """The run on images of its own, that may change."""
    no_collectives(monkeypatch)
    root = shutil.copytree(run.data.image_root, tmp_path / "images")
    return replace(run, data=replace(run.data, image_root=str(root), on_bad="quarantine", max_bad_share=0.5))


def start(config: Config, *, continuing: bool = False) -> TrainingData:
    return measure_groups(config, load_encoder(config), Ranks(), lambda mine: [mine], continuing=continuing)


def reference(config: Config, data: TrainingData) -> ReferenceStore:
    engine: Any = EngineWithoutModel()
    return fill_reference_store(config, resolve_model(config.model, for_training=True), engine, data)


def trained(config: Config, data: TrainingData, store: ReferenceStore) -> tuple[set[str], list[LostGroup], list[Any]]:
    """The groups of all steps, those lost in them, and the plan."""
    engine: Any = EngineWithoutModel()
    steps = plan_training(config.train, data, engine.ranks)
    batches = [batch for step in training_batches(config.data, data, steps, store, engine) for batch in step]
    assert all(batch.loss_inputs.reference.shape == batch.target_N.shape for batch in batches)  # type: ignore[union-attr]
    used = {name for batch in batches if not batch.is_filler for name in batch.group_ids}
    return used, [group for batch in batches for group in batch.lost], steps


def users_of(image: str, data: TrainingData) -> set[str]:
    return {group.id for group in data.dataset.groups if image in group.images}


def test_an_image_replaced_before_the_reference_pass_is_not_trained_on(own_images: Config) -> None:
    own_images.train.max_steps = 0
    data = start(own_images)
    gone = users_of("wide.png", data)
    Image.new("RGB", (90, 60), "red").save(Path(own_images.data.image_root, "wide.png"))
    store = reference(own_images, data)
    assert len(store) == 2 * (NUM_GROUPS - len(gone)) and 0 < len(gone) < NUM_GROUPS
    used, lost, steps = trained(own_images, data, store)
    assert used == {f"g{i}" for i in range(NUM_GROUPS)} - gone and not lost  # known, not reported again
    assert data.num_pairs(tuple(range(NUM_GROUPS))) == NUM_GROUPS - len(gone)  # the mean is over what is trained on
    listed = [json.loads(line) for line in Path(own_images.train.output_dir, "lost.jsonl").read_text().splitlines()]
    assert {entry["group_id"] for entry in listed} == gone
    assert all("wide.png has changed since the run was planned" in entry["detail"] for entry in listed)

    again = start(own_images, continuing=True)
    assert [g.reference_key for g in again.measured] == [g.reference_key for g in data.measured]
    assert trained(own_images, again, reference(own_images, again))[::2] == (used, steps)  # each step has its groups


def test_an_image_that_is_lost_between_two_steps_and_comes_back(own_images: Config, tmp_path: Path) -> None:
    data = start(own_images)
    store = reference(own_images, data)
    image = Path(own_images.data.image_root, "tall.png")
    image.rename(tmp_path / "away")
    used, lost, _ = trained(own_images, data, store)
    assert (
        lost
        and {group.group_id for group in lost} <= users_of("tall.png", data)
        and not used & users_of("tall.png", data)
    )
    data.lost.report([[asdict(group) for group in lost]], is_main=True)
    (tmp_path / "away").rename(image)
    again = start(own_images, continuing=True)
    assert not again.lost.indices and trained(own_images, again, store)[0] >= {group.group_id for group in lost}


def test_images_that_change_between_two_starts_are_lost_at_their_place(own_images: Config, tmp_path: Path) -> None:
    """A replaced, a deleted and a restored image, while no start of the run could notice it."""
    own_images.data.max_bad_share = 1.0
    root = Path(own_images.data.image_root)
    (root / "square.png").rename(tmp_path / "away")
    data = start(own_images)
    store = reference(own_images, data)
    (tmp_path / "away").rename(root / "square.png")
    (root / "wide.png").unlink()
    Image.new("RGB", (58, 112), "red").save(root / "tall.png")
    again = start(own_images, continuing=True)
    assert [g.reference_key for g in again.measured] == [g.reference_key for g in data.measured]
    lost = users_of("wide.png", data) | users_of("tall.png", data)
    assert {again.dataset.groups[index].id for index in again.lost.indices} == lost
    assert plan_training(own_images.train, again, Ranks()) == plan_training(own_images.train, data, Ranks())
    assert trained(own_images, again, store)[0] == set()
    listed = Path(own_images.train.output_dir, "lost.jsonl").read_text()
    assert "'wide.png' is missing" in listed and "tall.png has changed since the run was planned" in listed
    own_images.data.on_bad = "error"
    with pytest.raises(RecordError, match="'wide.png' is missing|tall.png has changed"):
        start(own_images, continuing=True)


def test_other_records_are_not_taken_for_lost_images(own_images: Config) -> None:
    data = start(own_images)
    groups = Path(own_images.data.groups)
    groups.write_text(groups.read_text().replace("yes 7", "certainly 7"))
    again = start(own_images, continuing=True)
    differing = [a.reference_key != b.reference_key for a, b in zip(again.measured, data.measured, strict=True)]
    assert sum(differing) == 1 and not again.lost.indices  # the checkpoint's fingerprint of the data then refuses it
    groups.write_text("".join(groups.read_text().splitlines(keepends=True)[:-1]))
    assert len(start(own_images, continuing=True).measured) == len(data.measured) - 1


def test_a_fresh_start_forgets_what_another_run_has_lost(own_images: Config) -> None:
    listed = Path(own_images.train.output_dir, "lost.jsonl")
    data = start(own_images)
    data.lost.report([[asdict(LostGroup(0, "g0", "bad-image", "cut"))]], is_main=True)
    assert listed.exists()
    start(own_images)
    assert not listed.exists()


def test_the_rules_for_bad_records_hold_on_every_rank(tmp_path: Path) -> None:
    everyone = [[], [asdict(LostGroup(3, "g3", "bad-image", "image 'x.png' is missing"))]]
    for is_main in (True, False):
        strict = LostGroups(tmp_path / "lost.jsonl", "groups.jsonl", BadRecords("error"), 100)
        with pytest.raises(RecordError, match=r"group 'g3' .*'x.png' is missing.*--resume.*data.on_bad=quarantine"):
            strict.report(everyone, is_main=is_main)
        few = LostGroups(tmp_path / "lost.jsonl", "groups.jsonl", BadRecords("quarantine", 0.001), 100)
        with pytest.raises(TooManyBadRecords, match="groups.jsonl: 1 of 100 records are bad"):
            few.report(everyone, is_main=is_main)
    assert not (tmp_path / "lost.jsonl").exists()
