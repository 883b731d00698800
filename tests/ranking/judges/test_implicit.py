"""The implicit judge: log-ratios to the number, one model at a time, groups that cannot be scored."""

from __future__ import annotations

import weakref
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from peft import LoraConfig, get_peft_model

from bpo.config.rank import RankConfig
from bpo.config.training import Config, DataConfig, ModelConfig
from bpo.data.encode import load_encoder
from bpo.job.launch import Ranks
from bpo.model.generate import to_model
from bpo.model.load import load_model
from bpo.ranking.judge import Failed, Scored
from bpo.ranking.judges.implicit import ImplicitJudge, preference_probability
from tests.sample_groups import group, three_groups
from tests.tiny import save, tiny_llava

BETA = 0.25


@pytest.fixture(scope="module")
def policy_dir(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny LLaVA with other weights."""
    folder = tiny_llava(tmp_path_factory.mktemp("models") / "policy")
    model = load_model(ModelConfig(path=str(folder), dtype="float32"))
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.mul_(1.1)
    return save(folder, model)


def config_of(policy: Path, photo_root: Path, **options: Any) -> Config:
    return Config(
        model=ModelConfig(path=str(policy), dtype="float32"),
        data=DataConfig(image_root=str(photo_root)),
        rank=RankConfig(judge="implicit", options={"beta": BETA, **options}),
    )


def judged(judge: ImplicitJudge, records: list[Any]) -> list[Scored | Failed]:
    passes = [dict(judge.judge(name, records)) for name in judge.passes]
    assert all(sorted(results) == list(range(len(records))) for results in passes)
    combined: list[Scored | Failed] = []
    for index in range(len(records)):
        results = [results[index] for results in passes]
        failed = [result for result in results if isinstance(result, Failed)]
        combined.append(failed[0] if failed else judge.combine(dict(zip(judge.passes, results, strict=True))))
    return combined


def plain_logp(folder: Path, photo_root: Path, record: Any) -> list[tuple[float, int]]:
    """(log-probability, number of tokens) of each answer by transformers' own forward pass."""
    config = config_of(folder, photo_root, reference="x")
    model, encoder = load_model(config.model), load_encoder(config)
    prompt = encoder.encode_prompt(record.id, record.images, record.prompt)
    found = []
    for completion in record.completions:
        ids = encoder.encode_completion(completion.response)
        whole = torch.tensor([[*prompt.prefix_ids, *ids]])
        with torch.no_grad():
            logits = model(input_ids=whole, **to_model(prompt.image_inputs, model)).logits[0, -len(ids) - 1 : -1]
        found.append((float(logits.log_softmax(-1)[range(len(ids)), list(ids)].sum()), len(ids)))
    return found


@pytest.mark.parametrize("length", ["sum", "mean"])
def test_scores_are_log_ratios(length: str, policy_dir: Path, tiny_llava_dir: Path, photo_root: Path) -> None:
    record = group("a", ("a cat", 1.0, "gt"), ("a dog on a mat", 1.0, "mllm-sample"), ("a cat", 1.0, "mllm-sample"))
    judge = ImplicitJudge(config_of(policy_dir, photo_root, reference=str(tiny_llava_dir), length=length), Ranks())
    (scored,) = judged(judge, [record])
    assert isinstance(scored, Scored)
    logp, base = (plain_logp(folder, photo_root, record) for folder in (policy_dir, tiny_llava_dir))
    wanted = [BETA * (p - b) / (n if length == "mean" else 1) for (p, n), (b, _) in zip(logp, base, strict=True)]
    assert scored.scores == pytest.approx(wanted, abs=1e-4) and scored.scores[0] == scored.scores[2]
    assert [d["tokens"] for d in scored.details] == [n for _, n in logp]
    assert scored.details[1]["logp_policy"] == pytest.approx(logp[1][0], abs=1e-3)
    assert scored.details[1]["preferred"] == preference_probability(scored.scores[1], scored.scores[0])


def test_the_probability_of_a_preference() -> None:
    assert preference_probability(3.0, 3.0) == 0.5
    assert preference_probability(0.0, 1.0) == pytest.approx(1 / (1 + torch.e))
    assert preference_probability(2.0, -1.5) + preference_probability(-1.5, 2.0) == pytest.approx(1, abs=1e-15)
    assert (preference_probability(1e4, -1e4), preference_probability(-1e4, 1e4)) == (1.0, 0.0)


def test_the_reference_itself_prefers_nothing(tiny_llava_dir: Path, photo_root: Path) -> None:
    config = config_of(tiny_llava_dir, photo_root, reference=str(tiny_llava_dir))
    for scored in judged(ImplicitJudge(config, Ranks()), three_groups()):
        assert isinstance(scored, Scored) and set(scored.scores) == {0.0}
        assert {detail["preferred"] for detail in scored.details} == {0.5}


def test_an_adapter_is_a_policy_and_the_models_are_loaded_in_turn(
    tiny_llava_dir: Path, photo_root: Path, tmp_path: Path
) -> None:
    options = LoraConfig(r=2, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
    adapted = get_peft_model(load_model(ModelConfig(path=str(tiny_llava_dir), dtype="float32")), options)
    adapted.save_pretrained(tmp_path / "adapter")
    judge = ImplicitJudge(config_of(tmp_path / "adapter", photo_root, reference=str(tiny_llava_dir)), Ranks())
    dict(judge.judge("policy", three_groups()))
    assert judge._scorer is not None
    policy = weakref.ref(judge._scorer[1]._policy)
    dict(judge.judge("reference", three_groups()))
    assert policy() is None
    (scored,) = judged(judge, three_groups()[:1])
    assert isinstance(scored, Scored) and max(map(abs, scored.scores)) > 1e-3
    assert judge.identity()["policy"] != judge.identity()["reference"]


def test_groups_that_cannot_be_scored_do_not_stop_the_others(tiny_llava_dir: Path, photo_root: Path) -> None:
    config = config_of(tiny_llava_dir, photo_root, reference=str(tiny_llava_dir))
    config = replace(config, data=replace(config.data, max_length_tokens=60))
    records = [
        group("gone", "a", "b", image="gone.png"),
        group("equal", "a cat", "a cat"),
        group(
            "long",
            "a",
            "b",
            prompt=replace(three_groups()[0].prompt[0], content=three_groups()[1].prompt[0].content * 3),
        ),
    ]
    gone, equal, long = judged(ImplicitJudge(config, Ranks()), records)
    assert isinstance(gone, Failed) and "gone.png" in gone.reason
    assert equal == Scored((0.0, 0.0), equal.details)  # type: ignore[union-attr]
    assert isinstance(long, Failed) and "image parts" in long.reason


def test_other_tokens_and_missing_models_are_refused(tiny_llava_dir: Path, photo_root: Path) -> None:
    with pytest.raises(ValueError, match="rank.options.reference is ''; it must not be empty"):
        ImplicitJudge(config_of(tiny_llava_dir, photo_root), Ranks())
    with pytest.raises(ValueError, match="rank.options.policy and model.path are both empty"):
        ImplicitJudge(replace(config_of(tiny_llava_dir, photo_root, reference="x"), model=ModelConfig()), Ranks())
    judge = ImplicitJudge(config_of(tiny_llava_dir, photo_root, reference=str(tiny_llava_dir)), Ranks())
    results = {name: Scored((-1.0,), ({"tokens": n},)) for n, name in enumerate(judge.passes)}
    with pytest.raises(ValueError, match="into different tokens"):
        judge.combine(results)
