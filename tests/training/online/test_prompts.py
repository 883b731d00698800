"""Which annotations are prompts, and which options do not go together."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path

import pytest

from bpo.config.io import load_config, train_inputs
from bpo.config.loss import LossConfig, TermConfig
from bpo.config.online import OnlineConfig
from bpo.config.training import Config, DataConfig, TrainConfig
from bpo.data.parts import in_part
from bpo.formats.bad_records import TooManyBadRecords
from bpo.training.online.prompts import check_online, read_prompts

ONLINE = Config(online=OnlineConfig(source="segment"))


def record(name: str, answer: str = "a dog", **fields: object) -> dict:
    turns = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": answer}]
    return {"id": name, "image": f"{name}.png", "conversations": turns, **fields}


def data(folder: Path, records: list[dict], **options: object) -> Config:
    (folder / "annotations.json").write_text(json.dumps(records))
    return Config(data=DataConfig(annotations=str(folder / "annotations.json"), **options))  # type: ignore[arg-type]


def test_prompts_are_the_usable_annotations_of_the_part_that_are_not_held_out(tmp_path: Path) -> None:
    names = [f"r{k}" for k in range(30)]
    config = data(tmp_path, [record("long", "word " * 400), *map(record, names)], part="1/2")
    expected = [name for name in names if in_part(name, "1/2")]
    assert 5 < len(expected) < 25
    prompts = read_prompts(config, {expected[0]})
    assert [annotation.id for annotation in prompts.usable] == expected[1:] and prompts.num_records == 31
    with pytest.raises(ValueError, match="none of 31 records can be used"):
        read_prompts(config, expected)


def test_bad_records_count_against_the_limit(tmp_path: Path) -> None:
    bad = [record("a"), {"id": "b", "image": "b.png", "conversations": "?"}]
    with pytest.raises(TooManyBadRecords, match="1 of 2 records are bad"):
        read_prompts(data(tmp_path, bad), ())
    assert len(read_prompts(data(tmp_path, bad, max_bad_share=0.5), ()).bad.problems) == 1


def test_the_content_of_a_run_is_that_of_its_annotations(tmp_path: Path) -> None:
    def content(**fields: object) -> list[str]:
        return list(read_prompts(data(tmp_path, [record("a"), record("b", **fields)]), ()).content())  # type: ignore[arg-type]

    assert content() == content() and len(content()) == 2
    assert all(content()[1] != content(**fields)[1] for fields in ({"answer": "a cat"}, {"image": "c.png"}))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"train": TrainConfig(held_out_groups=4)}, "train.held_out_groups is set, .* set data.groups"),
        ({"train": TrainConfig(reference_model="other")}, "train.reference_model does not apply"),
        ({"train": TrainConfig(reference_only=True)}, "train.reference_only does not apply"),
        ({"loss": LossConfig(type="rpo")}, "embeddings of all prompts"),
        ({"loss": LossConfig(type="spa", options={"extrapolation": 0.5})}, "hidden states of a fixed reference"),
        ({"loss": LossConfig(terms=[TermConfig(), TermConfig(type="nll", pairs="explored")])}, "explored answers"),
    ],
)
def test_options_that_do_not_go_together_are_refused(options: dict, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        check_online(replace(ONLINE, **options))
    check_online(replace(Config(), **options))
    check_online(replace(ONLINE, train=TrainConfig(held_out_groups=4), data=DataConfig(groups="held.jsonl")))


def test_an_online_run_reads_annotations_and_others_groups(tiny_llava_dir: Path) -> None:
    flags = ["--model.path", str(tiny_llava_dir)]
    with pytest.raises(ValueError, match="data.groups must be set"):
        load_config(flags, reads=train_inputs)
    with pytest.raises(ValueError, match="data.annotations must be set"):
        load_config([*flags, "--online.source", "segment"], reads=train_inputs)
