"""The plan of all rounds: which stages, with which policy, data, reference and options."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from bpo.rounds.plan import check_unchanged, plan_rounds
from bpo.rounds.run import write_stage_config
from bpo.rounds.stages import Stage
from tests.rounds.jobs import rounds_config


def stages_of(*arguments: Any, **sections: Any) -> dict[tuple[int, str], Stage]:
    return {(stage.round, stage.name): stage for stage in plan_rounds(rounds_config(*arguments, **sections))}


def test_each_round_starts_with_the_policy_of_the_round_before(tmp_path: Path) -> None:
    stages = stages_of(tmp_path, [{"part": "1/2"}, {"part": "2/2"}], rounds={"evaluate": True})
    names = ["generate", "select", "train", "export", "evaluate"]
    assert list(stages) == [(number, name) for number in (1, 2) for name in names]
    first, second = str(tmp_path / "base"), str(tmp_path / "runs" / "round-1" / "policy")
    for name in ("generate", "train", "export"):
        assert (stages[1, name].options["model"]["path"], stages[2, name].options["model"]["path"]) == (first, second)
    assert stages[1, "export"].options["export"]["output"] == second
    assert stages[1, "evaluate"].options["model"]["path"] == second
    assert [stages[number, "select"].options["select"]["policy"] for number in (1, 2)] == [first, second]
    assert [stages[number, "generate"].options["data"]["part"] for number in (1, 2)] == ["1/2", "2/2"]
    assert stages[2, "train"].options["data"]["groups"] == str(tmp_path / "runs" / "round-2" / "groups.jsonl")


def test_options_of_a_round_are_its_own_and_each_round_draws_anew(tmp_path: Path) -> None:
    options = {"train": {"lr": 3e-7}, "loss": {"options": {"alpha": 0.2}}}
    stages = stages_of(
        tmp_path,
        [{}, {"options": options}, {}],
        loss={"type": "spa", "options": {"alpha": 0.1, "window": 9}},
        train={"lr": 1e-6, "seed": 5},
    )
    trains = [stages[number, "train"].options for number in (1, 2, 3)]
    assert [tree["train"]["lr"] for tree in trains] == [1e-6, 3e-7, 1e-6]
    assert [tree["loss"]["options"] for tree in trains] == [{"alpha": 0.1, "window": 9}, {"alpha": 0.2}] + [
        {"alpha": 0.1, "window": 9}
    ]
    assert [tree["train"]["seed"] for tree in trains] == [5, 6, 7]
    assert [stages[number, "generate"].options["bootstrap"]["seed"] for number in (1, 2)] == [0, 1]


def test_the_first_policy_can_be_the_reference_of_all_rounds(tmp_path: Path) -> None:
    stages = stages_of(tmp_path, [{}, {}], rounds={"reference": "first"})
    assert (1, "reference") not in stages
    reference, train = stages[2, "reference"].options, stages[2, "train"].options
    assert reference["model"]["path"] == train["train"]["reference_model"] == str(tmp_path / "base")
    assert reference["train"]["reference_only"] and not train["train"]["reference_only"]
    assert reference["train"]["reference_dir"] == train["train"]["reference_dir"]
    assert stages[1, "train"].options["train"]["reference_model"] == ""


def test_a_judge_has_a_stage_and_the_implicit_one_compares_with_the_first_model(tmp_path: Path) -> None:
    stages = stages_of(tmp_path, [{}, {}], rank={"judge": "implicit", "options": {"beta": 0.3}})
    judge = stages[2, "judge"].options
    assert judge["rank"]["options"] == {"beta": 0.3, "reference": str(tmp_path / "base")}
    assert judge["rank"]["candidates"] == stages[2, "generate"].options["data"]["groups"]
    assert judge["rank"]["output"] == stages[2, "select"].options["select"]["judgements"]


def test_given_groups_and_online_training_generate_nothing(tmp_path: Path) -> None:
    stages = stages_of(tmp_path, [{"groups": "seed.jsonl"}, {"replay": 0.5}, {"replay": 0.5}])
    assert [name for number, name in stages if number == 1] == ["train", "export"]
    assert stages[1, "train"].options["data"]["groups"] == "seed.jsonl"
    second = str(tmp_path / "runs" / "round-2" / "groups.jsonl")
    assert stages[2, "select"].options["select"]["mixture"] == [{"groups": "seed.jsonl", "share": 0.5}]
    assert stages[3, "select"].options["select"]["mixture"] == [
        {"groups": "seed.jsonl", "share": 0.25},
        {"groups": second, "share": 0.25},
    ]
    online = stages_of(tmp_path, [{"part": "1/2"}], online={"source": "segment"})
    assert list(online) == [(1, "train"), (1, "export")]
    assert online[1, "train"].options["data"]["part"] == "1/2"


def test_lora_is_handed_over_as_an_adapter_where_the_engine_takes_it(tmp_path: Path) -> None:
    def form(**sections: Any) -> str:
        return str(stages_of(tmp_path, [{}], **sections)[1, "export"].options["export"]["form"])

    lora: dict[str, Any] = {"language": "lora"}
    vllm = {"vision": {"engine": "vllm"}, "weaken": {"space": "pixel"}}
    assert form() == "merged"
    assert form(trainable=lora) == "adapter"
    assert form(trainable=lora, rounds={"handover": "merged"}) == "merged"
    assert form(trainable=lora, bootstrap=vllm) == "merged"
    assert form(trainable=lora | {"projector": "frozen"}, bootstrap=vllm) == "adapter"
    with pytest.raises(ValueError, match="vLLM loads no adapter with a trained projector"):
        form(trainable=lora, bootstrap=vllm, rounds={"handover": "adapter"})
    with pytest.raises(ValueError, match="more than LoRA and projector is trained"):
        form(rounds={"handover": "adapter"})


def test_a_server_that_would_answer_with_the_first_policy_is_refused(tmp_path: Path) -> None:
    server = {"url": "http://localhost:1/v1", "model": "first"}
    bootstrap = {"vision": {"engine": "server", "server": server}, "weaken": {"space": "pixel"}}
    with pytest.raises(ValueError, match=r"rounds.each\[1\]: the server must answer with the policy of round 1"):
        stages_of(tmp_path, [{}, {}], bootstrap=bootstrap)
    named = {"options": {"bootstrap": {"vision": {"server": {"model": "second"}}}}}
    stages = stages_of(tmp_path, [{}, named], bootstrap=bootstrap)
    assert stages[2, "generate"].options["bootstrap"]["vision"]["server"] | server == server | {"model": "second"} | {
        key: value
        for key, value in stages[1, "generate"].options["bootstrap"]["vision"]["server"].items()
        if key not in server
    } | {"model": "first"}


@pytest.mark.parametrize(
    ("each", "message"),
    [
        ([], "rounds.each is empty"),
        ([{"parts": "1/2"}], r"rounds.each\[0\].parts: unknown option `parts` of a round; did you mean `part`"),
        ([{}, {"options": {"train": {"learning": 1}}}], r"rounds.each\[1\].options: unknown key `train.learning`"),
        ([{"options": {"data": {"groups": "x"}}}], r"rounds.each\[0\].options: data.groups is set by the rounds"),
        ([{"replay": 0.5}], r"rounds.each\[0\].replay is 0.5, but there is no earlier round"),
        ([{}, {"groups": "g", "replay": 0.5}], r"rounds.each\[1\].replay: the round selects no groups"),
    ],
)
def test_impossible_rounds_are_refused(tmp_path: Path, each: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        plan_rounds(rounds_config(tmp_path, each))


def test_images_are_chosen_before_the_first_round(tmp_path: Path) -> None:
    stages = stages_of(tmp_path, [{}], rounds={"image_command": "score --fast"})
    assert next(iter(stages)) == (0, "images")
    images, generate = stages[0, "images"], stages[1, "generate"]
    assert images.options["rank"]["options"] == {"command": "score --fast"}
    assert generate.options["data"]["annotations"] == images.options["rank"]["output"] == str(images.result)


def test_a_finished_stage_keeps_its_options_except_those_of_speed(tmp_path: Path) -> None:
    def train(**options: Any) -> Stage:
        return stages_of(tmp_path, [{}], train=options)[1, "train"]

    stage = train(lr=1e-6)
    stage.folder.mkdir(parents=True)
    write_stage_config(stage)
    check_unchanged(train(lr=1e-6, save_every_steps=7))
    with pytest.raises(ValueError, match="is finished, with other options: train.lr was 1e-06, is 2e-06"):
        check_unchanged(train(lr=2e-6))
    stage.config_file.unlink()
    check_unchanged(train(lr=2e-6))
