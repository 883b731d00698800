"""The model of lmms-eval: messages, decoding, answers; and its registration where lmms-eval is installed."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
from PIL import Image

from bpo.config.training import Config, DataConfig, ModelConfig
from bpo.data.encode import load_encoder
from bpo.model.generate import generate_answers
from bpo.model.load import load_model
from bpo.records import ContentPart, Turn
from bpo.tools import lmms_model
from bpo.tools.lmms_model import BpoLmms, Decoding, turns_of


def message(*parts: Any, role: str = "user") -> dict[str, Any]:
    """A message as lmms-eval gives it: texts and images."""
    content = [{"type": "text", "text": p} if isinstance(p, str) else {"type": "image", "url": p} for p in parts]
    return {"role": role, "content": content}


def test_messages_become_turns(photo_root: Path) -> None:
    picture = Image.open(photo_root / "wide.png")
    messages = [message("Be brief.", role="system"), message(picture, "What?"), message("A cat.", role="assistant")]
    messages.append(message(photo_root / "tall.png", "And this?"))
    turns, pictures = turns_of(messages, "pope/test/0")
    assert turns == [
        Turn("system", (ContentPart("text", "Be brief."),)),
        Turn("user", (ContentPart("image"), ContentPart("text", "What?"))),
        Turn("assistant", (ContentPart("text", "A cat."),)),
        Turn("user", (ContentPart("image"), ContentPart("text", "And this?"))),
    ]
    assert [p.size for p in pictures] == [(90, 60), (58, 112)] and {p.mode for p in pictures} == {"RGB"}
    video = {"role": "user", "content": [{"type": "video", "url": "a.mp4"}]}
    with pytest.raises(ValueError, match="pope/test/0: a message has video"):
        turns_of([video], "pope/test/0")


@pytest.mark.parametrize(
    ("kwargs", "expected"),
    [
        ({"until": ["\n\n"], "do_sample": False}, Decoding(1024, 0.0, 1.0, 0, 1)),
        ({"max_new_tokens": 64, "temperature": 0, "top_p": None, "num_beams": 5}, Decoding(64, 0.0, 1.0, 0, 5)),
        ({"temperature": 0.7, "top_p": 0.9, "top_k": 50}, Decoding(1024, 0.7, 0.9, 50, 1)),
        ({"temperature": 0.7, "do_sample": False}, Decoding(1024, 0.0, 1.0, 0, 1)),
    ],
)
def test_generation_kwargs_are_read_as_decoding(kwargs: dict[str, Any], expected: Decoding) -> None:
    assert Decoding.of(kwargs) == expected


def requests_about(photo_root: Path, model: Any) -> list[Any]:
    """As lmms-eval makes them: two of one task, between them one of another with a shorter limit."""
    docs = [
        {"image": "wide.png", "text": "What?"},
        {"image": "tall.png", "text": "Is it?"},
        {"image": "square.png", "text": "Red?"},
    ]
    model.task_dict = {"a": {"test": docs}, "b": {"test": docs}}

    def messages(doc: dict[str, str]) -> list[dict[str, Any]]:
        return [message(Image.open(photo_root / doc["image"]), doc["text"])]

    limits = {"a": {"max_new_tokens": 6, "until": ["e"]}, "b": {"max_new_tokens": 3}}
    places = [("a", 0), ("b", 1), ("a", 2)]
    return [SimpleNamespace(args=("", messages, dict(limits[task]), n, task, "test")) for task, n in places]


def expected_answers(base: Path, photo_root: Path) -> list[str]:
    config = Config(model=ModelConfig(path=str(base), dtype="float32"), data=DataConfig(image_root=str(photo_root)))
    encoder, model, answers = load_encoder(config), load_model(config.model), []
    for image, text, limit in (("wide.png", "What?", 6), ("tall.png", "Is it?", 3), ("square.png", "Red?", 6)):
        turn = Turn("user", (ContentPart("image"), ContentPart("text", text)))
        prompt = encoder.encode_prompt("r", (image,), (turn,))
        answers += generate_answers(model, encoder, [prompt], max_new_tokens=limit, temperature=0, top_p=1, seeds=[0])
    return answers


def test_answers_are_those_of_our_generation(
    tiny_llava_dir: Path, photo_root: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(lmms_model, "_HAS_LMMS_EVAL", True)
    monkeypatch.setattr(BpoLmms, "rank", 0, raising=False)
    model = BpoLmms(pretrained=str(tiny_llava_dir), dtype="float32", batch_size="2", device="cpu")
    kept: list[Any] = []
    model.cache_hook = SimpleNamespace(add_partial=lambda *entry: kept.append(entry))
    answers = model.generate_until(requests_about(photo_root, model))
    assert answers == expected_answers(tiny_llava_dir, photo_root)
    assert sorted(entry[2] for entry in kept) == sorted(answers)
    for ask in (model.loglikelihood, model.generate_until_multi_round):
        with pytest.raises(NotImplementedError, match="choose tasks of type generate_until"):
            ask([])


def test_two_kinds_of_trained_weights_are_refused(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmms_model, "_HAS_LMMS_EVAL", True)
    with pytest.raises(ValueError, match="give adapter=a or checkpoint=c, not both"):
        BpoLmms(pretrained="base", adapter="a", checkpoint="c")


def test_without_lmms_eval_the_extra_is_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lmms_model, "_HAS_LMMS_EVAL", False)
    with pytest.raises(ImportError, match=r"pip install 'bpo\[lmms-eval\]'"):
        BpoLmms(pretrained="base")


def test_the_entry_point_names_the_manifest(repo_root: Path) -> None:
    entry = f"{lmms_model.MODEL_ID} = {lmms_model.__name__}:{lmms_model.manifest.__name__}"
    assert f'"lmms_eval.models": ["{entry}"]' in (repo_root / "setup.py").read_text()


def test_lmms_eval_takes_the_manifest_and_the_class(tiny_llava_dir: Path, photo_root: Path) -> None:
    pytest.importorskip("lmms_eval", reason="lmms-eval is not installed (extra lmms-eval)")
    from lmms_eval.api.instance import Instance
    from lmms_eval.models.registry_v2 import ModelRegistryV2

    registry = ModelRegistryV2()
    registry.register_manifest(lmms_model.manifest())
    kind = registry.get_model_class("bpo")
    assert kind is BpoLmms
    model = kind.create_from_arg_string(f"pretrained={tiny_llava_dir},dtype=float32,device=cpu", {"batch_size": 2})
    metadata = {"task": "a", "doc_id": 0, "repeats": 1}
    requests = [
        Instance("generate_until", request.args, number, metadata)
        for number, request in enumerate(requests_about(photo_root, model))
    ]
    assert model.generate_until(requests) == expected_answers(tiny_llava_dir, photo_root)
