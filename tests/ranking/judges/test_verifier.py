"""The verifier: labels by objects and by language models, evidence, replies that cannot be read."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest

from bpo.config.evaluation import EvaluationConfig
from bpo.config.rank import RankConfig
from bpo.config.training import Config
from bpo.job.launch import Ranks
from bpo.ranking.judge import Failed, Scored
from bpo.ranking.judges.models import ReplyError
from bpo.ranking.judges.verifier import VerifierJudge, read_verdicts
from tests.bootstrap.conftest import tiny_llm_dir  # noqa: F401 a fixture
from tests.bootstrap.fake_server import completion, fake_server
from tests.ranking.candidates import judged
from tests.sample_groups import group

CLEAN = ("A dog lies on a sofa.", 1.0, "gt")
WRONG = ("A dog lies there.  A cat sleeps near Mr. Fox, on a bed!\nThe couch is red.", 0.0, "mllm-sample")
RECORD = group("a", CLEAN, WRONG, ("", 0.0, "mllm-sample"))


@pytest.fixture(scope="module")
def truth(tmp_path_factory: pytest.TempPathFactory) -> EvaluationConfig:
    folder = tmp_path_factory.mktemp("truth")
    names = ["dog", "cat", "couch", "bed"]
    (folder / "synonyms.txt").write_text("dog, puppy\ncat\ncouch, sofa\nbed\n")
    instances = {
        "images": [{"id": 7, "file_name": "wide.png"}],
        "categories": [{"id": n, "name": name} for n, name in enumerate(names)],
        "annotations": [{"image_id": 7, "category_id": n} for n in (0, 1, 3)],
    }
    (folder / "instances.json").write_text(json.dumps(instances))
    return EvaluationConfig(synonyms=str(folder / "synonyms.txt"), chair_instances=str(folder / "instances.json"))


def judge_of(truth: EvaluationConfig, **options: Any) -> VerifierJudge:
    return VerifierJudge(Config(evaluation=truth, rank=RankConfig(judge="verifier", options=options)), Ranks())


def test_sentences_with_unknown_objects_are_hallucinated(truth: EvaluationConfig) -> None:
    (scored,) = judged(judge_of(truth, by="objects"), RECORD)
    assert isinstance(scored, Scored) and scored.scores == (0.0, -1.0, 0.0)
    assert scored.details[1]["sentences"] == [
        {"sentence": "A dog lies there.", "label": False, "category": "no error"},
        {"sentence": "A cat sleeps near Mr. Fox, on a bed!", "label": True, "category": "entity"},
        {"sentence": "The couch is red.", "label": False, "category": "no error"},
    ]
    assert all(s["sentence"] in WRONG[0] for s in scored.details[1]["sentences"])
    (rate,) = judged(judge_of(truth, by="objects", score="rate"), RECORD)
    assert isinstance(rate, Scored) and rate.scores == (0.0, -1 / 3, 0.0)


def test_evidence_is_the_annotation_coco_objects_or_a_field(truth: EvaluationConfig) -> None:
    def scores(record: Any, evidence: str) -> Any:
        (result,) = judged(judge_of(truth, by="objects", evidence=evidence), record)
        return result.scores if isinstance(result, Scored) else result.reason

    # The picture has a dog, a cat and a bed, but no couch.
    assert scores(replace(RECORD, images=("train/wide.png",)), "objects") == (-1.0, -1.0, 0.0)
    assert scores(replace(RECORD, extra={"seen": ["bed", "puppy", "cat", "couch"]}), "seen") == (0.0, 0.0, 0.0)
    assert scores(replace(RECORD, extra={"seen": "cats on a sofa"}), "seen") == (-1.0, -2.0, 0.0)
    assert scores(RECORD, "seen") == "no evidence: seen of wide.png"
    assert scores(replace(RECORD, images=("tall.png",)), "objects") == "no evidence: objects of tall.png"
    assert scores(group("a", ("a cat", 0.0, "x"), ("a dog", 0.0, "x")), "annotation").startswith("no evidence: annot")


def test_a_server_labels_each_answer_once(truth: EvaluationConfig) -> None:
    def label(body: dict[str, Any], number: int) -> Any:
        prompt = body["messages"][0]["content"]
        if "Known of the image:\nA dog lies on a sofa.\n" not in prompt or "Question: What?" not in prompt:
            return 400, {}
        if "1. Bad" in prompt:
            return completion("I cannot see the image.")
        return completion(
            "1: No error\n2) out-of-context.\n3. entity\n" if "3. The couch is red." in prompt else "1: no error"
        )

    with fake_server(label) as (url, received):
        judge = judge_of(truth, by="server", server={"url": url, "model": "m"})
        first, second, third = judged(judge, RECORD, group("b", CLEAN, "Bad."), group("c", CLEAN, CLEAN))
    assert isinstance(first, Scored) and first.scores == (0.0, -2.0, 0.0)
    assert [s["category"] for s in first.details[1]["sentences"]] == ["no error", "out-of-context", "entity"]
    assert second == Failed("reply has not one category per sentence: 'I cannot see the image.'")
    assert isinstance(third, Scored) and third.scores == (0.0, 0.0)
    assert len(received) == 3 and judge.identity()["language model"] == "m"


def test_a_model_in_this_process_is_asked(truth: EvaluationConfig, tiny_llm_dir: Path) -> None:  # noqa: F811
    judge = judge_of(truth, by="model", llm=str(tiny_llm_dir), max_tokens=4, batch_size=1)
    (failed,) = judged(judge, RECORD)  # its weights are random
    assert isinstance(failed, Failed) and failed.reason.startswith("reply ")


@pytest.mark.parametrize(
    "reply",
    [
        "1: entity",
        "1: entity\n2: cat",
        "2: entity\n1: entity",
        "1: entity\n2: entity\n3: other",
        "Here:\n1: entity\n2: entity",
        "",
    ],
)
def test_replies_that_do_not_label_each_sentence(reply: str) -> None:
    with pytest.raises(ReplyError, match="not one category per sentence"):
        read_verdicts(reply, ["A.", "B."])


def test_prompts_of_the_user_must_show_the_sentences(truth: EvaluationConfig, tmp_path: Path) -> None:
    (tmp_path / "prompt.txt").write_text("{evidence}")
    with pytest.raises(ValueError, match=r"rank.options.prompt .*\{sentences\} is missing"):
        judge_of(truth, by="server", server={"url": "http://x/v1", "model": "m"}, prompt=str(tmp_path / "prompt.txt"))
    with pytest.raises(ValueError, match="evaluation.chair_instances is empty"):
        judge_of(EvaluationConfig(), by="objects")
