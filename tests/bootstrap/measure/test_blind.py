"""Measures that need the model, on the tiny LLaVA."""

from __future__ import annotations

import json
import math
import shutil
from collections import Counter
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from PIL import Image

from bpo.bootstrap.measure.blind import ModelMeasures, measure_with_model
from bpo.config.measure import MeasureConfig
from bpo.config.training import Config, DataConfig, ModelConfig, TrainConfig
from bpo.data import encode
from bpo.data.cells import CLEAN, Cell
from bpo.data.encode import EncodedGroup, load_encoder
from bpo.data.reference_keys import cell_key
from bpo.formats.bad_records import BadRecords
from bpo.formats.files import group_to_json, read_groups
from bpo.formats.images import image_bytes_digest
from bpo.formats.problems import RecordError
from bpo.job.exits import Interrupted
from bpo.job.launch import Ranks
from bpo.job.signals import StopRequest
from bpo.model.group_scores import GroupScorer
from bpo.model.load import load_model, resolve_model
from bpo.model.policy import PolicyModel
from bpo.model.reference.store import ReferenceStore, run_fingerprint, store_directory
from bpo.records import Completion, PreferenceGroup
from tests.sample_groups import group, turn

NUM_RECORDS, NUM_BLIND = 7, 3


def records() -> list[PreferenceGroup]:
    """Seven records about one image each, with two pairs; the last two have the same image."""
    found = [
        group(
            f"r{n}",
            ("a red cat", 1.0, "gt"),
            (f"{n} dogs", 0.0, "llm-hal"),
            ("a cat", 0.0, "mllm-hal"),
            image=f"{n}.png",
        )
        for n in range(NUM_RECORDS)
    ]
    return [*found[:-1], replace(found[-1], images=(f"{NUM_RECORDS - 2}.png",))]


@pytest.fixture
def config(tiny_llava_dir: Path, tmp_path: Path) -> Config:
    draw = np.random.default_rng(0)
    for n in range(NUM_RECORDS):
        pixels = draw.integers(0, 255, (30 + n, 40, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(tmp_path / f"{n}.png")
    write(tmp_path / "groups.jsonl", records())
    return Config(
        model=ModelConfig(path=str(tiny_llava_dir), dtype="float32"),
        data=DataConfig(groups=str(tmp_path / "groups.jsonl"), image_root=str(tmp_path)),
        train=TrainConfig(output_dir=str(tmp_path / "run")),
        measure=MeasureConfig(blind_images=NUM_BLIND, max_micro_batch_tokens=300),
    )


def write(path: Path, groups: list[PreferenceGroup]) -> None:
    path.write_text("".join(json.dumps(group_to_json(group)) + "\n" for group in groups))


def measure(config: Config, ranks: Ranks | None = None, stop: StopRequest | None = None) -> ModelMeasures | None:
    bad = BadRecords.from_config(config.data)
    return measure_with_model(config, read_groups(Path(config.data.groups)), bad, ranks=ranks, stop=stop)


def lines(config: Config) -> list[dict[str, Any]]:
    return [json.loads(line) for line in Path(f"{config.data.groups}.measures.jsonl").read_text().splitlines()]


@pytest.fixture
def passes(monkeypatch: pytest.MonkeyPatch) -> Counter[str]:
    """How many prefixes of each record were computed."""
    counts: Counter[str] = Counter()
    score = GroupScorer.score

    def counted(self: GroupScorer, groups: Any, max_tokens: int) -> Iterator[Any]:
        for item, encoded, logp in score(self, groups, max_tokens):
            counts[encoded.prompt.record_id] += 1
            yield item, encoded, logp

    monkeypatch.setattr(GroupScorer, "score", counted)
    return counts


def test_values_are_those_of_separate_sequences_with_other_images(config: Config) -> None:
    measures = measure(config)
    assert measures is not None and measures.num_records == NUM_RECORDS and measures.num_stored == 0
    encoder, model = load_encoder(config), load_model(config.model)
    of_id = {record.id: record for record in records()}

    def log_prob(record: PreferenceGroup, images: tuple[str, ...], response: str) -> float:
        prompt = encoder.encode_prompt(record.id, images, record.prompt)
        ids = encoder.encode_completion(response)
        with torch.no_grad():
            logits = model(input_ids=torch.tensor([[*prompt.prefix_ids, *ids]]), **prompt.image_inputs).logits[0]
        rows = logits[len(prompt.prefix_ids) - 1 : -1].double().log_softmax(-1)
        return float(rows.gather(1, torch.tensor(ids)[:, None]).sum())

    blind_of, seeing_of = {}, {}
    for line in lines(config):
        record = of_id[line["id"]]
        images = [of_id[donor].images for donor in line["donors"]]
        assert len({*images}) == NUM_BLIND and record.images not in images
        for completion, values in zip(record.completions, line["completions"], strict=True):
            assert values["response"] == completion.response
            mean = sum(math.exp(log_prob(record, own, completion.response)) for own in images) / NUM_BLIND
            assert values["blind"] == pytest.approx(math.log(mean), abs=1e-4)
            assert values["seeing"] == pytest.approx(log_prob(record, record.images, completion.response), abs=1e-4)
        cat, dogs, _ = line["completions"]
        blind_of[record.id] = dogs["blind"] - cat["blind"]
        seeing_of[record.id] = cat["seeing"] - dogs["seeing"]
    figures = measures.types["llm-hal"]
    assert figures["pairs"] == NUM_RECORDS and measures.types["mllm-hal"]["pairs"] == NUM_RECORDS
    assert figures["blind"]["median"] == pytest.approx(np.median(list(blind_of.values())), abs=2e-4)
    assert figures["blind"]["share_above_zero"] == pytest.approx(np.mean([v > 0 for v in blind_of.values()]), abs=1e-4)
    assert figures["seeing"]["share_below_zero"] == pytest.approx(
        np.mean([v < 0 for v in seeing_of.values()]), abs=1e-4
    )
    image = [seeing_of[name] + blind_of[name] for name in blind_of]
    assert figures["image"]["mean"] == pytest.approx(np.mean(image), abs=2e-4)
    assert "object" in figures["blind"]["by_change"]


def test_neither_order_nor_micro_batches_nor_ranks_change_values(config: Config) -> None:
    before = measure(config)
    values = {line["id"]: line for line in lines(config)}
    shutil.rmtree(f"{config.data.groups}.measures.parts")
    write(Path(config.data.groups), records()[::-1])
    config.measure.max_micro_batch_tokens = 1
    assert measure(config, Ranks(1, 2)) is None
    after = measure(config, Ranks(0, 2))
    for line in lines(config):
        other = values[line["id"]]
        assert line["donors"] == other["donors"]
        for one, two in zip(line["completions"], other["completions"], strict=True):
            assert one == pytest.approx(two, abs=5e-5)
    assert before is not None and after is not None and after.types.keys() == before.types.keys()
    for kind, figures in after.types.items():
        assert figures["blind"]["median"] == pytest.approx(before.types[kind]["blind"]["median"], abs=5e-4)


def test_a_killed_job_continues_with_the_records_that_are_missing(config: Config, passes: Counter[str]) -> None:
    config.measure.max_micro_batch_tokens = 1
    whole = measure(config)
    assert set(passes.values()) == {1 + NUM_BLIND}
    expected = Path(f"{config.data.groups}.measures.jsonl").read_bytes()
    (journal,) = Path(f"{config.data.groups}.measures.parts").glob("*/rank-00000.jsonl")
    kept = journal.read_bytes().splitlines(keepends=True)
    journal.write_bytes(b"".join(kept[:3]) + kept[3][:20])  # killed while writing
    passes.clear()
    again = measure(config)
    finished = {json.loads(line)["id"] for line in kept[:3]}
    assert set(passes) == {f"r{n}" for n in range(NUM_RECORDS)} - finished
    assert again == whole and Path(f"{config.data.groups}.measures.jsonl").read_bytes() == expected
    passes.clear()
    assert measure(config) == whole and not passes


def test_a_signal_ends_it_with_every_finished_record(config: Config, passes: Counter[str]) -> None:
    config.measure.max_micro_batch_tokens = 1
    with StopRequest() as stop:

        def received_after_three(self: Any) -> bool:
            return sum(passes.values()) >= 3 * (1 + NUM_BLIND)

        stopping = type("Stopping", (), {"received": property(received_after_three), "check": StopRequest.check})()
        with pytest.raises(Interrupted, match="3 of 7 records are kept"):
            measure(config, stop=stopping)
        assert not stop.received
    passes.clear()
    assert measure(config) is not None and len(passes) == NUM_RECORDS - 3


def test_values_of_other_options_are_kept_and_not_used(
    config: Config, passes: Counter[str], caplog: pytest.LogCaptureFixture
) -> None:
    first = measure(config)
    passes.clear()
    config.measure.blind_images = 2
    assert measure(config) is not None and set(passes.values()) == {3}
    assert "measure.blind_images was 3, is 2" in caplog.text
    passes.clear()
    config.measure.blind_images = NUM_BLIND
    assert measure(config) == first and not passes
    changed = records()
    changed[0] = replace(changed[0], completions=(*changed[0].completions[:2], Completion("two cats", 0.0, "mllm-hal")))
    write(Path(config.data.groups), changed)
    assert measure(config) is not None and len(passes) == NUM_RECORDS
    passes.clear()
    Image.new("RGB", (30, 30)).save(Path(config.data.image_root) / "0.png")
    assert measure(config) is not None and len(passes) == NUM_RECORDS


def fill_store(config: Config, ids: set[str], value: float) -> None:
    """A reference store of these records, with a recognisable log-prob per token."""
    model = resolve_model(config.model, for_training=True)
    directory = store_directory(config)
    store = ReferenceStore(directory, run_fingerprint(config, model, directory))
    encoder = load_encoder(config)
    for record in records():
        encoded = encoder.encode_group(record)
        assert isinstance(encoded, EncodedGroup)
        if record.id in ids:
            digests = [image_bytes_digest(Path(config.data.image_root), image) for image in record.images]
            for index, tokens in enumerate(encoded.completion_ids):
                store.put(cell_key(encoded, Cell(CLEAN, index), digests), torch.full((len(tokens),), value))
    store.close()


def test_a_reference_store_that_fits_gives_the_records_own_log_probs(config: Config, passes: Counter[str]) -> None:
    fill_store(config, {"r1", "r4"}, -0.5)
    measures = measure(config)
    assert measures is not None and measures.num_stored == 2
    assert {name: count for name, count in passes.items() if count == NUM_BLIND} == {"r1": NUM_BLIND, "r4": NUM_BLIND}
    for line in lines(config):
        stored = [values["seeing"] == -0.5 * values["tokens"] for values in line["completions"]]
        assert set(stored) == {line["id"] in ("r1", "r4")}


def test_a_reference_store_of_another_setting_is_not_used(config: Config, passes: Counter[str]) -> None:
    config.model.dtype = "bfloat16"
    fill_store(config, {"r1"}, -0.5)
    config.model.dtype = "float32"
    measures = measure(config)
    assert measures is not None and measures.num_stored == 0 and set(passes.values()) == {1 + NUM_BLIND}


def test_records_that_cannot_be_measured_are_counted(config: Config) -> None:
    """Text-only records and records without a pair; two images, of which no other record has as many; a bad image."""
    root = Path(config.data.image_root)
    two = replace(records()[0], id="two", images=("0.png", "1.png"), prompt=(turn(None, None, "?"),))
    text = replace(records()[0], id="text", images=(), prompt=(turn("?"),))
    equal = replace(records()[0], id="equal", completions=records()[0].completions[1:])
    (root / "bad.png").write_bytes(b"no picture")
    bad = replace(records()[0], id="bad", images=("bad.png",))
    write(Path(config.data.groups), [*records(), two, text, equal, bad])
    config.data.max_bad_share = 0.2
    measures = measure(config)
    assert measures is not None and measures.num_records == NUM_RECORDS
    assert measures.left_out == {"no-image": 1, "no-pair": 1}
    assert measures.skipped == {"image-undecodable": 1, "too-few-donors": 1}
    assert {line["id"] for line in lines(config)} == {record.id for record in records()}
    assert not any("bad" in line["donors"] for line in lines(config))
    shutil.rmtree(f"{config.data.groups}.measures.parts")
    config.data.max_bad_share = 0.1
    with pytest.raises(ValueError, match=r"1 of 9 records are bad.*bad\.png"):
        measure(config)
    config.data.on_bad = "error"
    with pytest.raises(RecordError, match=r"bad\.png"):
        measure(config)


def test_images_are_preprocessed_about_once(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    counts: Counter[str] = Counter()
    load = encode.load_image

    def counted(root: Path, image: str) -> Image.Image:
        counts[image] += 1
        return load(root, image)

    monkeypatch.setattr(encode, "load_image", counted)
    measure(config)
    assert counts.total() <= NUM_RECORDS + NUM_BLIND + 1


def test_micro_batches_hold_several_passes(config: Config, monkeypatch: pytest.MonkeyPatch) -> None:
    forward, tokens = PolicyModel.forward, []

    def counted(self: PolicyModel, input_ids_T: torch.Tensor, *args: Any, **more: Any) -> Any:  # noqa: N803
        tokens.append(input_ids_T.numel())
        return forward(self, input_ids_T, *args, **more)

    monkeypatch.setattr(PolicyModel, "forward", counted)
    measure(config)
    assert len(tokens) < NUM_RECORDS * (1 + NUM_BLIND) / 2 and max(tokens) <= config.measure.max_micro_batch_tokens


def test_nothing_to_measure_is_an_error(config: Config) -> None:
    config.measure.blind_images = NUM_RECORDS
    with pytest.raises(ValueError, match="could be measured.*of other content, not 7"):
        measure(config)
    write(Path(config.data.groups), [replace(records()[0], images=(), prompt=(turn("?"),))])
    with pytest.raises(ValueError, match="no group has an image and a pair"):
        measure(config)
