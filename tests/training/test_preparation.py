"""What is planned before training, and said about it. Run: python -m pytest tests/training/test_preparation.py"""

from __future__ import annotations

import json
from collections import Counter
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

from bpo.config.training import Config, DataConfig, ModelConfig, TrainConfig
from bpo.data import encode
from bpo.data.encode import Encoder
from bpo.data.groups import GroupDataset, MeasuredGroup
from bpo.interrupts import Interrupted, StopRequest
from bpo.launch import Ranks
from bpo.model.reference import format as reference_format
from bpo.records import GroupBatch, PreferenceGroup
from bpo.training import preparation
from bpo.training.preparation import TrainingData, fill_reference_store, measure_groups, plan_training, training_batches
from tests.sample_groups import PHOTOS, encoder_of, group, turn


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


def test_separate_sequences_are_said_aloud_once_with_reason_and_cost(encoder: Encoder, photo_root, caplog) -> None:
    """Two groups of three rows of 50 tokens are 300 tokens, where [40 | 10 | 10 | 10] shared would be 70 each."""
    separate = encoder_of(Path(encoder.processor.tokenizer.name_or_path), photo_root, share_prefix="never")
    dataset = GroupDataset([group(name, "a", "b", "c") for name in "xy"], separate, max_words=9, types=())
    measured = tuple(MeasuredGroup(70, 2, name, num_completions=3, longest_tokens=50) for name in "xy")
    with caplog.at_level("INFO"):
        (step,) = plan_training(config_of(2, 300), TrainingData(dataset, (0, 1), measured), Ranks(0, 1, 0))
    assert [sorted(one) for one in step.micro_batches[0]] == [[0, 1]]
    (line,) = [record.getMessage() for record in caplog.records if record.levelname == "WARNING"]
    assert "model.share_prefix is never" in line and "300 tokens" in line and "2.14 times the 140" in line
    (step,) = plan_training(config_of(2, 299), TrainingData(dataset, (0, 1), measured), Ranks(0, 1, 0))
    assert sorted(step.micro_batches[0]) == [(0,), (1,)]


def test_batches_of_separate_sequences_are_within_the_limit_with_their_padding(
    family_dir: Callable[[str], Path], photo_root: Path, caplog
) -> None:
    """Gemma 3: groups of different prompts, one without an image, whose batch gets a row for the stand-in."""
    encoder = encoder_of(family_dir("gemma3"), photo_root)
    groups = [group(f"g{i}", "a" * (1 + 7 * i), "b", "c" * i, prompt=turn(None, "?" * (1 + 9 * i))) for i in range(6)]
    groups.append(PreferenceGroup("text", (), (turn("What?"),), group("x", "a", "bc").completions))
    dataset = GroupDataset(groups, encoder, max_words=9, types=(), keep_text_only=True)
    measured: Any = tuple(dataset.measure(i) for i in range(7))
    data = TrainingData(dataset, tuple(range(7)), measured)
    for limit in (150, 400, 1000):
        (step,) = plan_training(config_of(7, limit), data, Ranks(0, 2, 0))
        largest = []
        for rank in (0, 1):
            engine: Any = EngineWithoutModel(Ranks(rank, 2, rank))
            config = config_of(7, limit)
            config.data.num_workers = 0
            keys: Any = SimpleNamespace(gather=lambda keys: torch.zeros(1))
            (batches,) = training_batches(config, data, [step], keys, engine)
            largest += [one.input_ids_T.numel() for one in batches if len(one.group_ids) > 1]
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
    (tight,) = plan_training(config_of(2, 4 * length), data, Ranks(0, 1, 0))  # four rows and no fifth
    (wide,) = plan_training(config_of(2, 6 * length), data, Ranks(0, 1, 0))
    assert [len(step.micro_batches[0]) for step in (tight, wide)] == [2, 1]


NUM_GROUPS = 12


@pytest.fixture
def run(tiny_llava_dir: Path, photo_root: Path, tmp_path: Path) -> Config:
    """Twelve groups, four of each picture, in steps of six groups and micro-batches of about two."""
    with (tmp_path / "groups.jsonl").open("w") as file:
        for i in range(NUM_GROUPS):
            completions = [{"response": f"{k} {i}", "score": int(k == "yes"), "type": "gt"} for k in ("yes", "no")]
            images = [list(PHOTOS)[i % len(PHOTOS)]]
            file.write(json.dumps({"id": f"g{i}", "images": images, "prompt": "?", "completions": completions}) + "\n")
    return Config(
        model=ModelConfig(path=str(tiny_llava_dir), dtype="float32"),
        data=DataConfig(groups=str(tmp_path / "groups.jsonl"), image_root=str(photo_root), num_workers=0),
        train=TrainConfig(
            output_dir=str(tmp_path / "run"), groups_per_step=6, epochs=1, max_micro_batch_tokens=90, max_steps=1
        ),
    )


class EngineWithoutModel:
    """What the preparation asks of an engine; its log-prob of a token is minus the token's id."""

    device, dtype = torch.device("cpu"), torch.float32

    def __init__(self, ranks: Ranks = Ranks(0, 1, 0), killed_after: int = 10**9):  # noqa: B008
        self.ranks = ranks
        self.killed_after = killed_after
        self.computed: list[str] = []

    def reference_logp(self, batch: GroupBatch) -> torch.Tensor:
        if self.killed_after == 0:
            raise KeyboardInterrupt
        self.killed_after -= 1
        self.computed += batch.group_ids
        return -batch.target_N.float()

    def sum_over_ranks(self, values: list[float]) -> list[float]:
        return values


@pytest.fixture
def decoded(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How often this process has decoded each picture."""
    counts: Counter[str] = Counter()
    load: Callable[..., Any] = encode.load_image

    def counted(root: Path, image: str) -> Any:
        counts[image] += 1
        return load(root, image)

    monkeypatch.setattr(encode, "load_image", counted)
    return counts


NO_STORE: Any = SimpleNamespace(gather=lambda keys: torch.zeros(1))


def test_a_step_decodes_each_image_of_its_groups_once_and_only_when_it_is_needed(run: Config, decoded) -> None:
    data = measure_groups(run, encode.load_encoder(run), Ranks(), lambda mine: [mine])
    assert sum(decoded.values()) == NUM_GROUPS
    decoded.clear()
    expected: Counter[str] = Counter()
    for rank in (0, 1):
        engine: Any = EngineWithoutModel(Ranks(rank, 2, rank))
        (step,) = plan_training(run, data, engine.ranks)
        own = [g for micro_batch in step.micro_batches[rank] for g in micro_batch]
        assert not any(step.is_filler[rank]) and len(step.micro_batches[rank]) > 1
        (batches,) = training_batches(run, data, [step], NO_STORE, engine)
        before = sum(decoded.values())
        for k, batch in enumerate(batches):
            before += len(batch.group_ids)
            assert sum(decoded.values()) == before, k  # none of the micro-batches that follow
        assert len(batches) == k + 1 and batch.image_inputs["pixel_values"].shape[0] == len(batch.group_ids)
        expected.update(image for g in own for image in data.dataset.groups[data.usable[g]].images)
    assert decoded == expected and sum(expected.values()) == 6


def test_worker_processes_decode_and_give_the_same_batches(run: Config, decoded) -> None:
    data = measure_groups(run, encode.load_encoder(run), Ranks(), lambda mine: [mine])
    engine: Any = EngineWithoutModel()
    steps = plan_training(run, data, engine.ranks)
    in_line = [batch for step in training_batches(run, data, steps, NO_STORE, engine) for batch in step]
    decoded.clear()
    run.data.num_workers = 1
    by_workers = [batch for step in training_batches(run, data, steps, NO_STORE, engine) for batch in step]
    assert not decoded  # here, in the process that trains
    assert [one.group_ids for one in by_workers] == [one.group_ids for one in in_line]
    for one, other in zip(by_workers, in_line, strict=True):
        assert all(torch.equal(a, b) for a, b in zip(one.tensors(), other.tensors(), strict=True))


def test_an_interrupted_reference_pass_is_completed(run: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was computed before the kill stays; a changed record is computed anew, and nothing else."""
    no_collectives(monkeypatch)
    monkeypatch.setattr(reference_format, "COMMIT_EVERY_S", 0.0)
    run.train.reference_micro_batch_tokens = 90
    everyone = {f"g{i}" for i in range(NUM_GROUPS)}

    def passed(killed_after: int = 10**9) -> list[str]:
        data = measure_groups(run, encode.load_encoder(run), Ranks(), lambda mine: [mine])
        engine: Any = EngineWithoutModel(killed_after=killed_after)
        try:
            store = fill_reference_store(run, engine, data)
        except KeyboardInterrupt:
            return engine.computed
        assert len(store) >= NUM_GROUPS
        steps = plan_training(run, data, engine.ranks)
        for batches in training_batches(run, data, steps, store, engine):
            for batch in batches:
                assert batch.reference_logp_N is not None
                assert torch.equal(batch.reference_logp_N, -batch.target_N.float())
        return engine.computed

    before = passed(killed_after=2)
    after = passed()
    assert len(before) > 2 and sorted(before + after) == sorted(everyone)
    assert passed() == []
    groups = Path(run.data.groups)
    groups.write_text(groups.read_text().replace("yes 7", "certainly 7"))
    assert passed() == ["g7"]


def no_collectives(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(preparation, "from_rank_0", lambda make: make())
    monkeypatch.setattr(preparation, "gather_from_ranks", lambda item: [item])
    monkeypatch.setattr(preparation, "barrier", lambda: None)


def test_a_signal_ends_the_reference_pass_after_its_micro_batch(run: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    """Another rank got it: this one hears of it in the sum, and what both have done is stored."""
    no_collectives(monkeypatch)
    run.train.reference_micro_batch_tokens = 90
    data = measure_groups(run, encode.load_encoder(run), Ranks(), lambda mine: [mine])
    engine: Any = EngineWithoutModel()
    others = iter([0.0, 0.0, 1.0])
    engine.sum_over_ranks = lambda values: [values[0] + next(others)]
    with StopRequest() as stop, pytest.raises(Interrupted, match="in the reference pass; 6 of 12 are to be done"):
        fill_reference_store(run, engine, data, stop)
    again: Any = EngineWithoutModel()
    with StopRequest() as stop:
        assert len(fill_reference_store(run, again, data, stop)) == NUM_GROUPS
    assert len(engine.computed) == 6 and sorted(engine.computed + again.computed) == sorted(
        f"g{i}" for i in range(NUM_GROUPS)
    )


def test_a_signal_ends_measuring_on_all_ranks_and_lengths_are_kept(run: Config, decoded: Counter[str]) -> None:
    def gather(mine: Any) -> Any:
        """The other rank has measured its share and got no signal."""
        return [mine, ([], False)]

    with StopRequest() as stop:
        stop.received = True
        with pytest.raises(Interrupted, match="while measuring; 1 groups measured"):
            measure_groups(run, encode.load_encoder(run), Ranks(0, 2, 0), gather, stop)
        with pytest.raises(Interrupted):  # this one measured all of its share; the other was stopped
            stop.received = False
            measure_groups(run, encode.load_encoder(run), Ranks(0, 2, 0), lambda mine: [mine, ([], True)], stop)
    decoded.clear()
    data = measure_groups(run, encode.load_encoder(run), Ranks(), lambda mine: [mine])
    assert len(data.usable) == NUM_GROUPS
    assert sum(decoded.values()) == NUM_GROUPS // 2  # rank 0's half was known
