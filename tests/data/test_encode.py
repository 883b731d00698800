"""Encoding of records as token ids."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import AutoConfig, AutoProcessor

from bpo.data.encode import Dropped, EncodedGroup, Encoder, EncodingError
from bpo.data.processor import Processor, load_processor
from bpo.formats.images import ImageError
from bpo.formats.usable import keep_types
from bpo.records import Completion, Turn
from tests.conftest import FUZZ
from tests.sample_groups import PHOTOS, encoder_of, group, turn
from tests.tiny import LLAVA_TEMPLATE, byte_tokenizer

# llava-hf/llava-1.5-7b-hf's template: all images first, and a space after each text.
LLAVA_1_5_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] != 'system' %}{{ message['role'].upper() + ': ' }}{% endif %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'image') %}{{ '<image>\n' }}{% endfor %}"
    "{% if message['role'] != 'assistant' %}"
    "{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}{{ content['text'] + ' ' }}"
    "{% endfor %}{% else %}{% for content in message['content'] | selectattr('type', 'equalto', 'text') %}"
    "{% generation %}{{ content['text'] + ' ' }}{% endgeneration %}{% endfor %}{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}{{ 'ASSISTANT:' }}{% endif %}"
)
CHATS = {
    "one text": [turn("What?")],
    "image first": [turn(None, "What is this?")],
    "two neighbouring texts": [turn(None, "First.", "Second?")],
    "texts around an image": [turn("Before", None, "after", "it.")],
    "two images": [turn(None, "then", None, "Differ?")],
    "line breaks": [turn(None, "\n\nWhat?\n")],
    "spaces": [turn("  What ", None, " is it?  ")],
    "system": [turn("Be ", "brief.", role="system"), turn(None, "What?")],
    "several turns": [turn(None, "What?"), turn("A cat", ".", role="assistant"), turn("Sure", "?")],
    "unicode": [turn(None, "\u4ec0\u4e48?", "\U0001f600")],
}
# `conv_vicuna_v1` of llava/conversation.py in haotian-liu/LLaVA, with which LLaVA-1.5 and the paper's release train.
VICUNA_SYSTEM = (
    "A chat between a curious user and an artificial intelligence assistant. "
    "The assistant gives helpful, detailed, and polite answers to the user's questions."
)
CONTROL = "<image> </s> <s> <pad> <|image_pad|> <|im_end|> <|im_start|>"


@pytest.fixture(scope="module")
def llava(tiny_llava_dir: Path, photo_root: Path) -> Encoder:
    return encoder_of(tiny_llava_dir, photo_root)


@pytest.fixture(scope="module")
def qwen(tiny_qwen_dir: Path, photo_root: Path) -> Encoder:
    return encoder_of(tiny_qwen_dir, photo_root)


@pytest.fixture(scope="module", params=["llava", "qwen"])
def encoder(request: pytest.FixtureRequest) -> Encoder:
    return request.getfixturevalue(request.param)


def control_ids(encoder: Encoder) -> set[int]:
    return {*encoder.suppressed_token_ids, encoder.eos_token_id}


def control_counts(encoder: Encoder, ids: tuple[int, ...]) -> dict[int, int]:
    return {token: ids.count(token) for token in control_ids(encoder) if token in ids}


@pytest.mark.parametrize("photo", PHOTOS)
def test_llava_ids_match_its_processor(llava: Encoder, tiny_llava_dir: Path, photo_root: Path, photo: str) -> None:
    processor = AutoProcessor.from_pretrained(tiny_llava_dir)
    ours = llava.encode_prompt("r", [photo], [turn(None, "What is this?"), turn("A cat.", role="assistant"), turn("?")])
    messages = [
        {"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What is this?"}]},
        {"role": "assistant", "content": [{"type": "text", "text": "A cat."}]},
        {"role": "user", "content": [{"type": "text", "text": "?"}]},
    ]
    text = processor.apply_chat_template(messages, add_generation_prompt=True)
    theirs = processor(text=text, images=Image.open(photo_root / photo), return_tensors="pt")
    assert list(ours.prefix_ids) == theirs["input_ids"][0].tolist()
    assert torch.equal(ours.image_inputs["pixel_values"], theirs["pixel_values"])


@pytest.mark.parametrize("chat", CHATS)
@pytest.mark.parametrize("template", [LLAVA_TEMPLATE, LLAVA_1_5_TEMPLATE], ids=["tiny", "llava-1.5"])
def test_prefix_ids_equal_apply_chat_template(
    llava: Encoder, tiny_llava_dir: Path, photo_root: Path, template: str, chat: str
) -> None:
    processor = AutoProcessor.from_pretrained(tiny_llava_dir)
    encoder = Encoder(replace(llava.processor, chat_template=template), llava.family.config, photo_root, 2048)
    photos = iter(PHOTOS)
    messages, images = [], []
    for message in CHATS[chat]:
        content: list[dict[str, str]] = []
        for part in message.content:
            if part.type == "image":
                images.append(next(photos))
                content.append({"type": "image", "path": str(photo_root / images[-1])})
            else:
                content.append({"type": "text", "text": part.text})
        messages.append({"role": message.role, "content": content})
    theirs = processor.apply_chat_template(
        messages, chat_template=template, add_generation_prompt=True, tokenize=True, return_dict=True
    )
    assert list(encoder.encode_prompt("r", images, CHATS[chat]).prefix_ids) == list(theirs["input_ids"][0])


@pytest.mark.parametrize("chat", CHATS)
def test_qwens_prefix_ids_equal_apply_chat_template(qwen: Encoder, chat: str) -> None:
    """Without the images: Qwen's processor needs torchvision; tests/data/families compares prompts with images."""
    texts = [(t.role, [part.text for part in t.content if part.type == "text"]) for t in CHATS[chat]]
    messages = [{"role": role, "content": [{"type": "text", "text": text} for text in own]} for role, own in texts]
    theirs = qwen.tokenizer.apply_chat_template(messages, add_generation_prompt=True, tokenize=True)
    ours = qwen.encode_prompt("r", [], [turn(*own, role=role) for role, own in texts])
    assert list(ours.prefix_ids) == list(theirs["input_ids"])


@pytest.mark.parametrize("photo", PHOTOS)
def test_image_tokens_match_the_towers_features(
    encoder: Encoder, photo: str, request: pytest.FixtureRequest, tiny_llava_dir: Path, tiny_qwen_dir: Path
) -> None:
    from bpo.config.training import ModelConfig
    from bpo.model.load import load_model

    directory = tiny_llava_dir if encoder.family.config.model_type == "llava" else tiny_qwen_dir
    model = load_model(ModelConfig(path=str(directory), dtype="float32"))
    prompt = encoder.encode_prompt("r", [photo], [turn(None, "What?")])
    with torch.no_grad():
        features = model.model.get_image_features(**prompt.image_inputs).pooler_output
    assert prompt.prefix_ids.count(encoder.image_token_id) == sum(map(len, features))


def test_several_images_appear_at_their_parts(encoder: Encoder) -> None:
    first = encoder.encode_prompt("r", ["tall.png"], [turn(None)]).prefix_ids.count(encoder.image_token_id)
    second = encoder.encode_prompt("r", ["square.png"], [turn(None)]).prefix_ids.count(encoder.image_token_id)
    both = encoder.encode_prompt("r", ["tall.png", "square.png"], [turn(None, "then", None)]).prefix_ids
    runs = "".join("i" if token == encoder.image_token_id else "." for token in both).split(".")
    assert [len(run) for run in runs if run] == [first, second]


def test_control_tokens_in_text_stay_text(encoder: Encoder) -> None:
    plain = encoder.encode_prompt("r", ["wide.png"], [turn(None, "x")])
    spelled = encoder.encode_prompt("r", ["wide.png"], [turn(None, CONTROL)])
    assert control_counts(encoder, spelled.prefix_ids) == control_counts(encoder, plain.prefix_ids)
    assert CONTROL in encoder.tokenizer.decode(spelled.prefix_ids)
    completion = encoder.encode_completion(CONTROL)
    assert control_counts(encoder, completion) == {encoder.eos_token_id: 1}
    assert completion[-1] == encoder.eos_token_id
    assert encoder.decode(completion) == CONTROL


def test_neighbouring_parts_cannot_spell_a_control_token(encoder: Encoder) -> None:
    plain = encoder.encode_prompt("r", ["wide.png"], [turn(None, "x")])
    for parts in ([None, "<ima", "ge> </", "s> <|im_", "end|>"], ["<ima", None, "ge> </", "s> <|i", "m_", "end|>"]):
        halves = encoder.encode_prompt("r", ["wide.png"], [turn(*parts)])
        assert control_counts(encoder, halves.prefix_ids) == control_counts(encoder, plain.prefix_ids)
        assert encoder.tokenizer.decode(halves.prefix_ids).count("</s> <|im_end|>") == 1


@settings(max_examples=40 * FUZZ, deadline=None)
@given(text=st.lists(st.sampled_from([*CONTROL.split(), " ", "a", "é", "\ue0f0", "0", "\ue0f1", "\n"])).map("".join))
def test_any_text_round_trips(llava: Encoder, qwen: Encoder, text: str) -> None:
    for encoder in (llava, qwen):
        prompt = encoder.encode_prompt("r", [], [turn("[" + text + "]")])
        assert f"[{text}]" in encoder.tokenizer.decode(prompt.prefix_ids)
        assert encoder.tokenizer.decode(encoder.encode_completion(text)[:-1]) == text


def test_special_tokens_not_registered_in_the_tokenizer_are_suppressed(llava: Encoder) -> None:
    ids = llava.tokenizer.convert_tokens_to_ids(["<s>", "<pad>", "<image>"])
    assert set(ids) == set(llava.suppressed_token_ids)
    assert llava.eos_token_id not in llava.suppressed_token_ids


@pytest.mark.parametrize("template_writes_bos", [False, True])
@pytest.mark.parametrize("first_text", ["What?", "<s> <image>"])
def test_bos_appears_exactly_once(
    tiny_llava_dir: Path, photo_root: Path, template_writes_bos: bool, first_text: str
) -> None:
    """For a tokenizer that adds BOS and EOS, with a chat template that does or does not write BOS."""
    tokenizer = byte_tokenizer(
        ["<s>", "</s>", "<pad>", "<image>"], bos_token="<s>", eos_token="</s>", pad_token="<pad>"
    )
    special = [("<s>", tokenizer.bos_token_id), ("</s>", tokenizer.eos_token_id)]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=special)
    template = ("<s>" if template_writes_bos else "") + LLAVA_TEMPLATE
    images = load_processor(str(tiny_llava_dir)).image_processor
    config = AutoConfig.from_pretrained(tiny_llava_dir)
    encoder = Encoder(Processor(tokenizer, images, template), config, photo_root, 2048)
    prefix = encoder.encode_prompt("r", ["wide.png"], [turn(None, first_text)]).prefix_ids
    assert prefix.count(tokenizer.bos_token_id) == 1
    assert prefix[0] == tokenizer.bos_token_id
    assert tokenizer.eos_token_id not in prefix
    assert tokenizer.decode(prefix).endswith(f"{first_text} ASSISTANT: ")
    assert encoder.encode_completion("a") == (*tokenizer("a", add_special_tokens=False)["input_ids"], 257)


@pytest.mark.parametrize(
    ("template", "end"),
    [
        ("{% for m in messages %}{{ m['content'][0]['text'] }} <pad>{% endfor %}", "<pad>"),
        ("{% for m in messages %}{{ m['content'][0]['text'] }} and <pad>{% endfor %}", "</s>"),
        ("{% for m in messages if m['role'] == 'user' %}<pad>{{ m['content'][0]['text'] }}{% endfor %}", "</s>"),
        ("{% for m in messages %}{{ m['content'][0]['text'] }}<s>{% endfor %}", "</s>"),
    ],
    ids=["a control token", "text", "a template without answers", "BOS of the next text"],
)
def test_the_templates_token_after_an_answer_ends_it(llava: Encoder, template: str, end: str) -> None:
    processor = replace(llava.processor, chat_template=template)
    encoder = Encoder(processor, llava.family.config, llava.image_root, 2048)
    assert encoder.eos_token_id == llava.tokenizer.convert_tokens_to_ids(end)
    assert set(encoder.end_token_ids) == {encoder.eos_token_id, llava.tokenizer.eos_token_id}
    assert encoder.encode_completion("a")[-1] == encoder.eos_token_id


def prompted(encoder: Encoder, template: str, system_prompt: str) -> Encoder:
    processor = replace(encoder.processor, chat_template=template)
    return Encoder(processor, encoder.family.config, encoder.image_root, 2048, system_prompt=system_prompt)


def test_the_system_prompt_gives_the_conversation_of_the_original_llava(llava: Encoder) -> None:
    encoder = prompted(llava, LLAVA_1_5_TEMPLATE, VICUNA_SYSTEM)

    def text(images: Sequence[str], *turns: Turn) -> str:
        return encoder.tokenizer.decode(encoder.encode_prompt("r", images, turns).prefix_ids)

    image = "<image>" * 4
    assert text(["wide.png"], turn(None, "What?")) == f"{VICUNA_SYSTEM} USER: {image}\nWhat? ASSISTANT:"
    own = turn("Be brief.", role="system")
    assert text(["wide.png"], own, turn(None, "What?")) == f"Be brief. USER: {image}\nWhat? ASSISTANT:"
    assert text([], turn("What?")) == f"{VICUNA_SYSTEM} USER: What? ASSISTANT:"


@pytest.mark.parametrize(
    ("before", "fault"),
    [
        ("{% if messages[0]['role'] == 'system' %}{{ raise_exception('no system') }}{% endif %}", "no system"),
        ("{% set messages = messages | rejectattr('role', 'equalto', 'system') | list %}", "it drops system turns"),
    ],
)
def test_a_template_without_a_system_turn_refuses_a_system_prompt(llava: Encoder, before: str, fault: str) -> None:
    assert prompted(llava, before + LLAVA_TEMPLATE, "").encode_prompt("r", [], [turn("What?")]).prefix_ids
    with pytest.raises(
        ValueError, match=rf"data.system_prompt is set, but .*takes no system turn \(.*{fault}.*remove it"
    ):
        prompted(llava, before + LLAVA_TEMPLATE, "Be kind.")


def test_truncation_affects_completions_only(tiny_llava_dir: Path, photo_root: Path) -> None:
    original = group("g", "abcdefghij", "xyz")
    whole = encoder_of(tiny_llava_dir, photo_root).encode_group(original)
    assert isinstance(whole, EncodedGroup)
    prefix = whole.prompt.prefix_ids
    encoder = encoder_of(tiny_llava_dir, photo_root, max_length_tokens=len(prefix) + 4)
    cut = encoder.encode_group(original)
    assert isinstance(cut, EncodedGroup)
    assert cut.prompt.prefix_ids == prefix
    assert [encoder.tokenizer.decode(ids) for ids in cut.completion_ids] == ["abcd", "xyz</s>"]
    assert cut.num_tokens == len(prefix) + 8


def test_a_prompt_that_leaves_no_room_drops_its_group(tiny_llava_dir: Path, photo_root: Path) -> None:
    whole = encoder_of(tiny_llava_dir, photo_root).encode_prompt("g", ["wide.png"], [turn(None, "What?")])
    num_prefix = len(whole.prefix_ids)
    dropped = encoder_of(tiny_llava_dir, photo_root, max_length_tokens=num_prefix).encode_group(group("g", "a", "b"))
    assert isinstance(dropped, Dropped)
    assert (dropped.group_id, dropped.reason) == ("g", "prompt-too-long")
    assert dropped.detail == (
        f"the prompt takes {num_prefix} of {num_prefix} tokens, 4 of them for images; raise "
        f"data.max_length_tokens={num_prefix}"
    )


def test_completions_equal_after_tokenising_are_not_a_pair(tiny_llava_dir: Path, photo_root: Path) -> None:
    encoder = encoder_of(tiny_llava_dir, photo_root)
    dropped = encoder.encode_group(group("g", "same", "same"))
    assert isinstance(dropped, Dropped) and dropped.reason == "no-pair"
    kept = encoder.encode_group(group("g", "same", "other", "same"))
    assert isinstance(kept, EncodedGroup)
    assert kept.scores == (1.0, 0.0)  # duplicates are merged, keeping the higher score
    assert kept.weights == (1.0, 1.0)
    weighted = group("g", "best", "same", "same")
    weighted = replace(
        weighted,
        completions=tuple(replace(c, weight=w) for c, w in zip(weighted.completions, (1.0, 0.5, 2.0), strict=True)),
    )
    merged = encoder.encode_group(weighted)
    assert isinstance(merged, EncodedGroup) and merged.weights == (1.0, 2.0)
    num_prefix = len(kept.prompt.prefix_ids)
    cut_to_two = encoder_of(tiny_llava_dir, photo_root, max_length_tokens=num_prefix + 2)
    cut = cut_to_two.encode_group(group("g", "abc", "abd"))
    assert isinstance(cut, Dropped) and cut.reason == "no-pair"


def test_equal_scores_are_not_a_pair(encoder: Encoder) -> None:
    dropped = encoder.encode_group(group("g", ("a", 1.0, "gt"), ("b", 1.0, "gt")))
    assert isinstance(dropped, Dropped) and dropped.reason == "no-pair"


@pytest.mark.parametrize("images", [[], ["wide.png", "tall.png"]])
def test_wrong_number_of_images_names_the_record(encoder: Encoder, images: list[str]) -> None:
    with pytest.raises(EncodingError, match=f"'record-7'.*1 image parts but {len(images)} images"):
        encoder.encode_prompt("record-7", images, [turn(None, "What?")])


def test_template_that_drops_the_image_names_the_record(llava: Encoder, photo_root: Path) -> None:
    text_only = replace(llava.processor, chat_template="{% for m in messages %}{{ m['role'] }}{% endfor %}")
    encoder = Encoder(text_only, llava.family.config, photo_root, 2048)
    with pytest.raises(EncodingError, match="'record-7'.*wrote 0 image placeholders for 1 images"):
        encoder.encode_prompt("record-7", ["wide.png"], [turn(None, "What?")])


def test_an_image_the_processor_refuses_is_an_image_error(qwen: Encoder, photo_root: Path) -> None:
    Image.new("RGB", (1, 1000)).save(photo_root / "line.png")  # Qwen takes aspect ratios up to 200
    with pytest.raises(ImageError, match=r"line\.png.*1x1000"):
        qwen.encode_prompt("r", ["line.png"], [turn(None)])


def test_keep_types_always_keeps_the_best() -> None:
    original = group("g", ("a", 2.0, "gt"), ("b", 0.0, "mllm-hal"), ("c", 0.0, "llm-hal"), ("d", 2.0, "other"))
    kept = keep_types(original, ["llm-hal"])
    assert [c.response for c in kept.completions] == ["a", "c", "d"]
    assert keep_types(original, []) == original
    assert replace(kept, completions=original.completions) == original
    assert all(isinstance(c, Completion) for c in kept.completions)


def test_completions_without_weight_are_not_trained_on() -> None:
    original = group("g", ("a", 2.0, "gt"), ("b", 1.0, "mllm-hal"), ("c", 0.0, "llm-hal"))

    def kept(*weights: float, types: Sequence[str] = ()) -> list[str]:
        completions = tuple(replace(c, weight=w) for c, w in zip(original.completions, weights, strict=True))
        return [c.response for c in keep_types(replace(original, completions=completions), types).completions]

    assert kept(1.0, 0.0, 0.5) == ["a", "c"]
    assert kept(0.0, 1.0, 1.0, types=["llm-hal"]) == ["b", "c"]  # the best that is left
    assert kept(0.0, 0.0, 0.0, types=["llm-hal"]) == kept(0.0, 0.0, 0.0) == []


def test_tokenizer_without_eos_is_refused(llava: Encoder, photo_root: Path) -> None:
    tokenizer = byte_tokenizer(["<pad>", "<image>"], pad_token="<pad>")
    with pytest.raises(ValueError, match="no EOS token"):
        Encoder(replace(llava.processor, tokenizer=tokenizer), llava.family.config, photo_root, 10)
