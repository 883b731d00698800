"""The judge by claims: splitting, questions to a model and to servers, scores by hand."""

from __future__ import annotations

import json
import math
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from bpo.config.evaluation import EvaluationConfig
from bpo.config.rank import RankConfig
from bpo.config.training import Config, DataConfig, ModelConfig
from bpo.data.encode import load_encoder
from bpo.job.launch import Ranks
from bpo.model.generate import to_model
from bpo.model.load import load_model
from bpo.ranking.judge import Failed, Scored
from bpo.ranking.judges.claims import ClaimsJudge, read_claims, split_by_rules
from bpo.ranking.judges.models import ReplyError
from tests.bootstrap.fake_server import completion, fake_server
from tests.ranking.candidates import judged
from tests.sample_groups import group, turn

WORLD = [("a photo with a rock and a tree.", 1.0, "gt"), ("a photo with a rock, a leaf and a tree.", 0.0, "x")]
DOG, NOTHING = ("A photo of a Dog.", 0.0, "x"), ("", 0.0, "x")


def judge_of(photo_root: Path, model: Path | str = "", synonyms: Path | str = "", **options: Any) -> ClaimsJudge:
    config = Config(
        model=ModelConfig(path=str(model), dtype="float32"),
        data=DataConfig(image_root=str(photo_root)),
        evaluation=EvaluationConfig(synonyms=str(synonyms)),
        rank=RankConfig(judge="claims", options=options),
    )
    return ClaimsJudge(config, Ranks())


@pytest.mark.parametrize(
    ("answer", "claims"),
    [
        ("a photo with a rock, a leaf and a tree.", ("a rock", "a leaf", "a tree")),
        (
            "The image shows a man with a hat riding a horse. In the photo, there are two dogs, and a cat sleeps.",
            ("a man", "a hat riding a horse", "two dogs", "a cat sleeps"),
        ),
        ("A black and white cat sits on the mat, looking up.", ("A black and white cat sits on the mat, looking up",)),
        ("There is a bus. There is a bus! A Bus.", ("a bus",)),
        (" .", ()),
    ],
)
def test_rules_split_descriptions(answer: str, claims: tuple[str, ...]) -> None:
    assert split_by_rules(answer) == claims


def test_lists_of_a_language_model() -> None:
    assert read_claims("- There is a dog.\n\n* It is red.\n3. Two cats.\n- There is a dog.\n") == (
        "There is a dog.",
        "It is red.",
        "Two cats.",
    )
    assert read_claims(" none.\n") == ()
    for reply in ("", "Sure! Here are the claims:\n- There is a dog."):
        with pytest.raises(ReplyError, match="reply is no list of claims"):
            read_claims(reply)


def yes_no(body: dict[str, Any], number: int) -> Any:
    """Yes to all but leaves; log-probs of them alone; of a broken thing it is not sure."""
    *pictures, question = body["messages"][0]["content"]
    if [part["image_url"]["url"][:22] for part in pictures] != ["data:image/png;base64,"] or not body["logprobs"]:
        return 400, {}
    if "broken" in question["text"]:
        return completion("Perhaps.")
    if "leaf" not in question["text"] and "Dog" not in question["text"]:
        return 200, {"choices": [{"message": {"content": "Yes, it does."}, "logprobs": None}]}
    status, reply = completion("Yes")
    assert isinstance(reply, dict)
    chances = {"Yes": 0.2, " no": 0.3, "No": 0.1, "Maybe": 0.4}
    listed = [{"token": token, "logprob": math.log(chance)} for token, chance in chances.items()]
    reply["choices"][0]["logprobs"] = {"content": [{"top_logprobs": listed}]}
    return status, reply


def test_a_server_is_asked_once_per_claim_of_a_group(photo_root: Path) -> None:
    with fake_server(yes_no) as (url, received):
        server = {"url": url, "model": "m"}
        judge = judge_of(photo_root, ask="server", ask_server=server, question="See {claim}?", min_claims=2)
        good, blind_group = group("a", *WORLD, DOG, NOTHING), group("d", "a", "b", prompt=turn("What?"))
        blind_group = replace(blind_group, images=())
        first, bad, gone, blind = judged(
            judge, good, group("b", "a broken cup", "a cup"), group("c", "a", "b", image="gone.png"), blind_group
        )
    asked = [body["messages"][0]["content"][1]["text"] for body in received]
    assert sorted(asked[:4]) == ["See a Dog?", "See a leaf?", "See a rock?", "See a tree?"]
    assert isinstance(first, Scored) and first.scores == (0.0, -1.0, -2.0, -2.0)
    leaf = first.details[1]["claims"][1]
    assert leaf == {"claim": "a leaf", "p_yes": pytest.approx(1 / 3), "accepted": False}
    assert [detail["rejected"] for detail in first.details] == [0, 1, 1, 0]
    assert isinstance(bad, Failed) and bad.reason == "reply neither yes nor no: 'Perhaps.'"
    assert isinstance(gone, Failed) and "gone.png" in gone.reason
    assert isinstance(blind, Failed) and "no image to ask about" in blind.reason
    assert judge.identity()["asked"] == "m" and url not in json.dumps(judge.identity())


def test_a_language_model_on_a_server_splits(photo_root: Path) -> None:
    def split(body: dict[str, Any], number: int) -> Any:
        content = body["messages"][0]["content"]
        if not isinstance(content, str):
            return yes_no(body, number)
        if "Question: What?" not in content or body["temperature"] != 0:
            return 400, {}
        answer = content.rsplit("Answer: ", 1)[1].strip()
        if answer == "long":
            return completion("- a", finish_reason="length")
        return completion("\n".join(f"- {name}" for name in answer.split()))

    with fake_server(split) as (url, received):
        server = {"url": url, "model": "m"}
        judge = judge_of(photo_root, split="server", server=server, ask="server", ask_server=server)
        first, second = judged(judge, group("a", "rock leaf", "tree", "tree"), group("b", "tree", "long"))
    assert isinstance(first, Scored) and first.scores == (-1.0, 0.0, 0.0)
    assert second == Failed("reply cut off at rank.options.max_tokens: '- a'")
    assert sum(isinstance(body["messages"][0]["content"], str) for body in received) == 3  # rock leaf, tree, long


def test_probabilities_are_those_of_the_models_first_token(
    tiny_llava_dir: Path, photo_root: Path, tmp_path: Path
) -> None:
    (tmp_path / "synonyms.txt").write_text("rock, stone\napple\ntree\n")
    options = {"split": "objects", "question": "Is there {claim} in the image?", "answers": ["yes", "no"]}
    record = group("a", ("a stone and a rock", 1.0, "gt"), ("apples, a rock and trees", 0.0, "x"))
    found = []
    for batch_size in (1, 16):
        judge = judge_of(photo_root, tiny_llava_dir, tmp_path / "synonyms.txt", batch_size=batch_size, **options)
        (scored,) = judged(judge, record)
        assert isinstance(scored, Scored)
        found.append([claim["p_yes"] for detail in scored.details for claim in detail["claims"]])
    assert [c["claim"] for d in scored.details for c in d["claims"]] == ["a rock", "an apple", "a rock", "a tree"]
    assert found[0] == pytest.approx(found[1], abs=1e-5)
    options_of_model = ModelConfig(path=str(tiny_llava_dir), dtype="float32")
    config = Config(model=options_of_model, data=DataConfig(image_root=str(photo_root)))
    model, encoder = load_model(config.model), load_encoder(config)
    prompt = encoder.encode_prompt("a", ("wide.png",), (turn(None, "Is there an apple in the image?"),))
    with torch.no_grad():
        logits = model(input_ids=torch.tensor([prompt.prefix_ids]), **to_model(prompt.image_inputs, model)).logits[
            0, -1
        ]
    yes, no = (encoder.encode_completion(word)[0] for word in ("yes", "no"))
    assert found[1][1] == pytest.approx(float(torch.sigmoid(logits[yes] - logits[no])), abs=1e-5)
    rejected = [p <= 0.5 for p in found[1]]
    assert scored.scores == (-float(rejected[0]), -float(sum(rejected[1:])))


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"question": "Is it there?"}, r"must contain \{claim\}"),
        ({"answers": ["yes"]}, "give the words for yes and no"),
        ({"ask": "server"}, "ask_server.url is empty"),
        ({"split": "server"}, "rank.options.server.url is empty"),
        ({"split": "model", "llm": "/no/where"}, "rank.options.llm is '/no/where'"),
        ({"split": "objects"}, "evaluation.synonyms is empty"),
        ({}, "rank.options.model and model.path are both empty"),
        ({"splitt": "rules"}, "did you mean `split`"),
    ],
)
def test_bad_options_are_refused(photo_root: Path, options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        judge_of(photo_root, **options)


def test_answers_must_differ_in_their_first_token(tiny_llava_dir: Path, photo_root: Path) -> None:
    judge = judge_of(photo_root, tiny_llava_dir, answers=["Yes", "Yep"])
    with pytest.raises(ValueError, match="'Yes', 'Yep'.*begin with the same token"):
        judged(judge, group("a", *WORLD))
