"""Images of a step encoded once, and features that are kept."""

from __future__ import annotations

import contextlib
import json
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bpo.config.training import Config, ModelConfig
from bpo.config.vision import VisionConfig
from bpo.data.collate import collate_groups
from bpo.data.families import Family
from bpo.job.launch import Ranks
from bpo.model.attention.shared_prefix import packed_layout
from bpo.model.load import load_model, resolve_model
from bpo.model.policy import PolicyModel, model_inputs
from bpo.model.vision.cache import MemoryCache
from bpo.records import GroupBatch
from bpo.training.features import StepFeatures, features_fingerprint, use_step_features
from tests.sample_groups import encode_all, encoder_of, three_groups
from tests.test_train import launch, write_groups
from tests.tiny import tiny_llava

NUM_IMAGES = 4


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """Runs of two ranks over 8 groups about 4 images: 2 epochs of 2 steps (`features_job`)."""
    root = tmp_path_factory.mktemp("features")
    write_groups(root, 8)
    records = [json.loads(line) for line in (root / "groups.jsonl").read_text().splitlines()]
    for i, record in enumerate(records):
        record["images"] = [f"{i % NUM_IMAGES}.png"]
    (root / "groups.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    tiny_llava(root / "llava")
    result = launch([sys.executable, "-m", "tests.training.features_job", str(root), "2"], timeout_s=200)
    assert result.returncode == 0, result.stdout[-6000:]
    observed: dict[str, Any] = json.loads((root / "observed.json").read_text())
    return observed


@pytest.mark.parametrize("name", ["disk", "again", "zero3"])
def test_runs_equal_that_with_the_tower_in_each_micro_batch(runs: dict[str, Any], name: str) -> None:
    expected, actual = runs["plain"]["metrics"], runs[name]["metrics"]
    assert len(actual) == len(expected) == 4
    for one, other in zip(actual, expected, strict=True):
        for metric in ("loss", "grad_norm", "rewards/margins"):
            assert one[metric] == pytest.approx(other[metric], rel=1e-4, abs=1e-6), metric
    if not name.startswith("zero3"):  # which flattens weights in another order
        assert runs[name]["weights"] == pytest.approx(runs["plain"]["weights"], rel=1e-5)
    assert expected[-1]["loss"] < 0.9 * expected[0]["loss"]  # they learn


def test_each_rank_encodes_an_image_once_per_step(runs: dict[str, Any]) -> None:
    """Tiles that the towers have seen before each step and at the end; a rank's step has 2 groups."""
    plain, step, disk = (runs[name]["tiles"] for name in ("plain", "zero3", "disk"))
    for rank in range(2):
        seen = [after - before for before, after in zip(plain[rank], plain[rank][1:], strict=False)]
        once = [after - before for before, after in zip(step[rank], step[rank][1:], strict=False)]
        assert seen == [2, 2, 2, 2]
        assert all(1 <= own <= 2 for own in once)
        assert disk[rank][-1] <= step[rank][-1]
    assert sum(tiles[-1] for tiles in step) < sum(tiles[-1] for tiles in plain)


def test_another_run_reads_all_features_from_disk(runs: dict[str, Any]) -> None:
    """Its reference pass included."""
    assert runs["again"]["tiles"] == [[0] * 5] * 2


class Engine:
    """A policy without DeepSpeed; counts calls of its tower and the images and tiles in them."""

    ranks, device, dtype = Ranks(), torch.device("cpu"), torch.float32

    def __init__(self, policy: PolicyModel, *, is_partitioned: bool = False):
        self.policy, self.is_partitioned = policy, is_partitioned
        self.calls: list[int] = []

    def encode_images(self, entries: list[dict[str, torch.Tensor]]) -> list[torch.Tensor]:
        self.calls.append(len(entries))
        return self.policy.tower.encode(entries)


@pytest.fixture(params=["llava_next", "qwen2_5_vl"])
def step(request: pytest.FixtureRequest, family_dir: Callable[[str], Path], photo_root: Path) -> Any:
    """The engine, family and three micro-batches of a step; the second and the third have an image in common."""
    directory = family_dir(request.param)
    encoder = encoder_of(directory, photo_root)
    model = load_model(ModelConfig(path=str(directory), dtype="float32"), for_training=True)
    batches = []
    for encoded in encode_all(encoder, three_groups()):
        batch = collate_groups([encoded], encoder.family)
        batches.append(replace(batch, image_keys=encoder.family.entry_keys(batch.image_inputs)))
    return Engine(PolicyModel(model)), encoder.family, batches


def log_probs(engine: Engine, batch: GroupBatch) -> torch.Tensor:
    with torch.no_grad(), packed_layout(batch.layout):
        return engine.policy(**model_inputs(batch))


def test_a_step_in_few_calls(step: tuple[Engine, Family, list[GroupBatch]]) -> None:
    engine, family, batches = step
    distinct = {key for batch in batches for key in batch.image_keys}
    assert len(distinct) < sum(len(batch.image_keys) for batch in batches)
    expected = [log_probs(engine, batch) for batch in batches]
    for batch_tokens in (10**6, 40, 1):
        engine.calls = []
        prepared = StepFeatures(engine, family, batch_tokens)(iter(batches))  # type: ignore[arg-type]
        for batch, expected_N in zip(prepared, expected, strict=True):
            torch.testing.assert_close(log_probs(engine, batch), expected_N, atol=1e-5, rtol=0)
        assert sum(engine.calls) == len(distinct)
        assert batch_tokens != 10**6 or len(engine.calls) == 1
        assert batch_tokens != 1 or engine.calls == [1] * len(distinct)


def test_features_are_freed_after_their_last_use(step: tuple[Engine, Family, list[GroupBatch]]) -> None:
    engine, family, batches = step
    prepared = StepFeatures(engine, family, 10**6)(batches)  # type: ignore[arg-type]
    next(prepared)
    left = prepared.gi_frame.f_locals["features"]  # type: ignore[attr-defined]
    assert set(left) == {key for batch in batches[1:] for key in batch.image_keys}


def test_the_second_epoch_does_not_run_the_tower(step: tuple[Engine, Family, list[GroupBatch]]) -> None:
    engine, family, batches = step
    features = StepFeatures(engine, family, 10**6, MemoryCache(1e9))  # type: ignore[arg-type]
    first = [log_probs(engine, batch) for batch in features(batches)]
    engine.calls = []
    for batch, expected_N in zip(features(batches), first, strict=True):
        assert torch.equal(log_probs(engine, batch), expected_N)
    assert engine.calls == []


def test_a_batch_without_digests_runs_the_tower_itself(step: tuple[Engine, Family, list[GroupBatch]]) -> None:
    engine, family, batches = step
    (batch,) = StepFeatures(engine, family, 10**6)([replace(batches[0], image_keys=())])  # type: ignore[arg-type]
    assert batch.features == () and engine.calls == []


def test_what_is_used(tiny_llava_dir: Path, tmp_path: Path, step: tuple[Engine, Family, list[GroupBatch]]) -> None:
    engine, family, _ = step

    def used(partitioned: bool = False, **options: Any) -> StepFeatures | None:
        vision = VisionConfig(**options)
        config = Config(model=ModelConfig(path=str(tiny_llava_dir), dtype="float32"), vision=vision)
        config.train.output_dir = str(tmp_path)
        resolved = resolve_model(config.model, torch.device("cpu"), for_training=True)
        engine.is_partitioned = partitioned
        return use_step_features(config, resolved, engine, family, contextlib.ExitStack())  # type: ignore[arg-type]

    assert used() is None and used(encode="micro_batch") is None
    made = used(encode="step")
    assert made is not None and engine.prepare_images is made  # type: ignore[attr-defined]
    assert used(encode="step", partitioned=True) is not None
    assert used(cache="memory", partitioned=True) is not None


def test_the_fingerprint_names_the_tower_and_not_the_tokenizer(tiny_llava_dir: Path, tmp_path: Path) -> None:
    config = Config(model=ModelConfig(path=str(tiny_llava_dir), dtype="float32"))
    config.train.reference_dir = str(tmp_path)
    facts = features_fingerprint(config, resolve_model(config.model, for_training=True))
    files = {name for name in facts if name.startswith("file:")}
    assert files == {"file:config.json", "file:model.safetensors"}
    assert facts["dtype"] == "float32" and facts["device"] == "cpu" and facts["vision_attention"] == "sdpa"
    assert {"transformers", "patch_embedding"} <= facts.keys()
