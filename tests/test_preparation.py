"""What is planned before training, and said about it. Run: python -m pytest tests/test_preparation.py"""

from __future__ import annotations

from pathlib import Path

import pytest

from bpo.config import Config, TrainConfig
from bpo.data.encode import Encoder
from bpo.data.groups import GroupDataset, MeasuredGroup
from bpo.launch import Ranks
from bpo.preparation import TrainingData, plan_training
from bpo.records import PreferenceGroup
from tests.sample_groups import encoder_of, group, turn


@pytest.fixture(scope="module")
def encoder(tiny_llava_dir: Path, photo_root: Path) -> Encoder:
    return encoder_of(tiny_llava_dir, photo_root)


def data_of(encoder: Encoder, num_tokens: list[int], *more: PreferenceGroup) -> TrainingData:
    groups = [group(f"g{i}", "a", "b") for i in range(len(num_tokens) - len(more))]
    dataset = GroupDataset([*groups, *more], encoder, max_words=9, types=(), keep_text_only=True)
    measured = tuple(MeasuredGroup(count, 1, f"key {i}") for i, count in enumerate(num_tokens))
    return TrainingData(dataset, tuple(range(len(num_tokens))), measured)


def config_of(groups_per_step: int, max_micro_batch_tokens: int = 1000) -> Config:
    train = TrainConfig(groups_per_step=groups_per_step, epochs=1, max_micro_batch_tokens=max_micro_batch_tokens)
    return Config(train=train)


def test_the_start_says_how_level_the_plan_is(encoder: Encoder, caplog: pytest.LogCaptureFixture) -> None:
    data = data_of(encoder, [100, 100, 50, 50])
    with caplog.at_level("INFO"):
        plan_training(config_of(4), data, Ranks(0, 2, 0))
    assert "1 steps of 4 groups, up to 1 micro-batches a rank" in caplog.text
    assert "the busiest of 2 ranks carries 0.0 % more tokens" in caplog.text
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_ranks_that_will_wait_are_warned_of_once_with_the_fix(encoder: Encoder, caplog) -> None:
    data = data_of(encoder, [100, 60])
    with caplog.at_level("INFO"):
        plan_training(config_of(2), data, Ranks(0, 2, 0))
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "wait for each other 20 % of the time" in warning  # the mean is 80 where one rank has 100
    assert "train.groups_per_step=2 is 1.0 groups a rank and 1.0 a micro-batch" in warning
    assert "train.max_micro_batch_tokens=1000" in warning
    caplog.clear()
    with caplog.at_level("INFO"):
        plan_training(config_of(2), data, Ranks(1, 2, 1))
    assert caplog.text == ""


def test_a_micro_batch_keeps_room_for_the_stand_in_where_a_group_has_no_image(encoder: Encoder) -> None:
    """LLaVA's image takes 4 tokens here: three groups of 100 and an image are more than 300."""
    ranks = Ranks(0, 1, 0)
    text_only = PreferenceGroup("text", (), (turn("What?"),), group("x", "a", "b").completions)
    (with_images,) = plan_training(config_of(3, 300), data_of(encoder, [100] * 3), ranks)
    (mixed,) = plan_training(config_of(3, 300), data_of(encoder, [100] * 3, text_only), ranks)
    assert len(with_images.micro_batches[0]) == 1
    assert len(mixed.micro_batches[0]) == 2
    (wider,) = plan_training(config_of(3, 304), data_of(encoder, [100] * 3, text_only), ranks)
    assert len(wider.micro_batches[0]) == 1
