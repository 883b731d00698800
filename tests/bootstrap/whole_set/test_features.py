"""Image features: near images are near, computed once, and the same after a restart."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from bpo.bootstrap.engines.models import required_paths
from bpo.bootstrap.whole_set import features as features_module
from bpo.bootstrap.whole_set.features import ImageFeatures
from bpo.config.bootstrap import BootstrapConfig
from bpo.config.negatives import SwapConfig
from bpo.config.training import Config, DataConfig, ModelConfig
from bpo.records import Annotation
from tests.bootstrap.whole_set.corpora import captions, is_balanced, kept, outcomes_of

NUM = 24


@pytest.fixture
def scene(tmp_path: Path) -> list[Annotation]:
    """Captions at random; every other image has vertical stripes, the rest have horizontal ones."""
    rng = np.random.default_rng(0)
    for number in range(NUM):
        pixels = np.zeros((28, 28, 3))
        pixels[slice(None, None, 4)] = 255
        pixels = pixels if number % 2 else pixels.swapaxes(0, 1)
        noisy = np.clip(pixels + rng.normal(0, 8, pixels.shape), 0, 255).astype(np.uint8)
        Image.fromarray(noisy).save(tmp_path / f"{number}.png")
    return captions(NUM)


def config_for(folder: Path, model: Path) -> Config:
    return Config(
        model=ModelConfig(path=str(model), dtype="float32"),
        data=DataConfig(groups=str(folder / "groups.jsonl"), image_root=str(folder)),
        bootstrap=BootstrapConfig(sources=["swap"], swap=SwapConfig(nearest="image"), batch_size=5),
    )


@pytest.mark.parametrize("model_type", ["llava", "qwen2_5_vl"])
def test_records_of_similar_images_exchange(
    scene: list[Annotation], tmp_path: Path, model_type: str, family_dir: Callable[[str], Path]
) -> None:
    config = config_for(tmp_path, family_dir(model_type))
    pairs = kept(scene, outcomes_of(config, scene))
    assert is_balanced(pairs) and len(pairs) == NUM
    alike = [
        int(a.id[1:]) % 2 == int(o.provenance.donor[1:]) % 2 for a, o in pairs if o.provenance and o.provenance.donor
    ]
    assert sum(alike) > 0.9 * NUM


def test_features_are_computed_once_and_kept(
    scene: list[Annotation], tmp_path: Path, tiny_llava_dir: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    config = config_for(tmp_path, tiny_llava_dir)
    computed: list[int] = []
    run = features_module._Tower.features

    def counted(self, images):  # type: ignore[no-untyped-def]
        computed.append(len(images))
        if sum(computed) > 12:
            raise KeyboardInterrupt
        return run(self, images)

    monkeypatch.setattr(features_module._Tower, "features", counted)
    with pytest.raises(KeyboardInterrupt):
        outcomes_of(config, scene)
    monkeypatch.setattr(
        features_module._Tower, "features", lambda self, images: computed.append(len(images)) or run(self, images)
    )
    computed.clear()
    resumed = outcomes_of(config, scene)
    assert sum(computed) == NUM - 10  # two batches of 5 were on disk
    computed.clear()
    assert outcomes_of(config, scene) == resumed and not computed


def test_image_features_need_the_model_and_texts_do_not(tmp_path: Path) -> None:
    config = config_for(tmp_path, Path("model"))
    assert required_paths(config)["model.path"] == "model"
    config.bootstrap.swap.nearest = "text"
    assert "model.path" not in required_paths(config)


def test_a_record_whose_image_cannot_be_read_takes_no_part(
    scene: list[Annotation], tmp_path: Path, tiny_llava_dir: Path
) -> None:
    (tmp_path / "3.png").unlink()
    config = config_for(tmp_path, tiny_llava_dir)
    outcomes = outcomes_of(config, scene)
    assert outcomes[3] is not None and outcomes[3].reason == "no-swap"
    assert is_balanced(kept(scene, outcomes)) and len(kept(scene, outcomes)) == NUM - 1
    found = ImageFeatures(config, scene, np.arange(NUM))
    assert found.has.sum() == NUM - 1
    similarity = found.similarity(np.arange(NUM), np.arange(NUM))
    assert np.allclose(np.delete(similarity.diagonal(), 3), 1, atol=1e-3)
