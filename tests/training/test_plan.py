"""The plan of a training run and its log messages."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from bpo.config.training import Config, TrainConfig
from bpo.data.encode import Encoder
from bpo.data.groups import GroupDataset, MeasuredGroup
from bpo.job.launch import Ranks
from bpo.records import PreferenceGroup
from bpo.training.batches import training_batches
from bpo.training.measure import TrainingData
from bpo.training.plan import plan_training
from tests.sample_groups import encoder_of, group, turn
from tests.training.doubles import EngineWithoutModel


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
        plan_training(config_of(4).train, data, Ranks(0, 2, 0))
    assert "1 steps of 4 groups, up to 1 micro-batches per rank" in caplog.text
    assert "the busiest of 2 ranks processes 0.0 % more tokens" in caplog.text
    assert not [record for record in caplog.records if record.levelname == "WARNING"]


def test_ranks_that_will_wait_are_warned_of_once_with_the_fix(encoder: Encoder, caplog) -> None:
    data = data_of(encoder, [100, 60])
    with caplog.at_level("INFO"):
        plan_training(config_of(2).train, data, Ranks(0, 2, 0))
    (warning,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "wait for each other 20 % of the time" in warning  # the mean is 80 and one rank has 100
    assert "train.groups_per_step=2 is 1.0 groups per rank and 1.0 per micro-batch" in warning
    assert "train.max_micro_batch_tokens=1000" in warning
    caplog.clear()
    with caplog.at_level("INFO"):
        plan_training(config_of(2).train, data, Ranks(1, 2, 1))
    assert caplog.text == ""


def test_a_micro_batch_keeps_room_for_the_stand_in_where_a_group_has_no_image(encoder: Encoder) -> None:
    """LLaVA's image takes 4 tokens here: three groups of 100 and an image are more than 300."""
    ranks = Ranks(0, 1, 0)
    text_only = PreferenceGroup("text", (), (turn("What?"),), group("x", "a", "b").completions)
    (with_images,) = plan_training(config_of(3, 300).train, data_of(encoder, [100] * 3), ranks)
    (mixed,) = plan_training(config_of(3, 300).train, data_of(encoder, [100] * 3, text_only), ranks)
    assert len(with_images.micro_batches[0]) == 1
    assert len(mixed.micro_batches[0]) == 2
    (wider,) = plan_training(config_of(3, 304).train, data_of(encoder, [100] * 3, text_only), ranks)
    assert len(wider.micro_batches[0]) == 1


def test_separate_sequences_are_said_aloud_once_with_reason_and_cost(encoder: Encoder, photo_root, caplog) -> None:
    """Two groups of three rows of 50 tokens are 300 tokens, where [40 | 10 | 10 | 10] shared would be 70 each."""
    separate = encoder_of(Path(encoder.processor.tokenizer.name_or_path), photo_root, share_prefix="never")
    dataset = GroupDataset([group(name, "a", "b", "c") for name in "xy"], separate, max_words=9, types=())
    measured = tuple(MeasuredGroup(70, 2, name, num_completions=3, longest_tokens=50) for name in "xy")
    with caplog.at_level("INFO"):
        (step,) = plan_training(config_of(2, 300).train, TrainingData(dataset, (0, 1), measured), Ranks(0, 1, 0))
    assert [sorted(groups) for groups in step.micro_batches[0]] == [[0, 1]]
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "model.share_prefix is never" in line and "300 tokens" in line and "2.14 times the 140" in line
    (step,) = plan_training(config_of(2, 299).train, TrainingData(dataset, (0, 1), measured), Ranks(0, 1, 0))
    assert sorted(step.micro_batches[0]) == [(0,), (1,)]


def test_batches_of_separate_sequences_are_within_the_limit_with_their_padding(
    family_dir: Callable[[str], Path], photo_root: Path, caplog
) -> None:
    """Gemma 3: groups of different prompts, one without an image, whose batch gets a row for the stand-in image."""
    encoder = encoder_of(family_dir("gemma3"), photo_root)
    groups = [group(f"g{i}", "a" * (1 + 7 * i), "b", "c" * i, prompt=turn(None, "?" * (1 + 9 * i))) for i in range(6)]
    groups.append(PreferenceGroup("text", (), (turn("What?"),), group("x", "a", "bc").completions))
    dataset = GroupDataset(groups, encoder, max_words=9, types=(), keep_text_only=True)
    measured: Any = tuple(dataset.measure(i) for i in range(7))
    data = TrainingData(dataset, tuple(range(7)), measured)
    for limit in (150, 400, 1000):
        (step,) = plan_training(config_of(7, limit).train, data, Ranks(0, 2, 0))
        largest = []
        for rank in (0, 1):
            engine: Any = EngineWithoutModel(Ranks(rank, 2, rank))
            config = config_of(7, limit)
            config.data.num_workers = 0
            (batches,) = training_batches(config.data, data, [step], None, engine)
            largest += [batch.input_ids_T.numel() for batch in batches if len(batch.group_ids) > 1]
        assert all(tokens <= limit for tokens in largest)
        assert limit < 400 or largest
    assert "both directions" in caplog.text and "windows of 24 tokens" in caplog.text


def test_padded_rows_of_text_alone_leave_room_for_the_row_of_the_stand_in(tiny_llava_dir: Path, photo_root) -> None:
    encoder = encoder_of(tiny_llava_dir, photo_root, share_prefix="never")
    answers = group("x", "a", "b").completions
    groups = [PreferenceGroup(name, (), (turn("What?"),), answers) for name in ("first", "second")]
    dataset = GroupDataset(groups, encoder, max_words=9, types=(), keep_text_only=True)
    measured: Any = tuple(dataset.measure(i) for i in range(2))
    data = TrainingData(dataset, (0, 1), measured)
    length = measured[0].longest_tokens
    (tight,) = plan_training(config_of(2, 4 * length).train, data, Ranks(0, 1, 0))  # four rows and no fifth
    (wide,) = plan_training(config_of(2, 6 * length).train, data, Ranks(0, 1, 0))
    assert [len(step.micro_batches[0]) for step in (tight, wide)] == [2, 1]
