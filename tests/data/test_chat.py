"""Prompts that end with the start of an answer, and weights of characters as weights of tokens."""

from __future__ import annotations

import threading
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from bpo.data.chat import ChatTokenizer
from bpo.data.encode import Dropped, EncodedGroup, Encoder, EncodingError
from bpo.data.processor import Processor
from bpo.records import Auxiliary, Completion, PreferenceGroup, Turn
from tests.data.test_encode import CONTROL, LLAVA_1_5_TEMPLATE, control_counts
from tests.sample_groups import encoder_of, group, packed_batch, turn
from tests.tiny import LLAVA_TEMPLATE, QWEN_TEMPLATE, byte_tokenizer

QUESTION = turn(None, "What is this?")


@pytest.fixture(scope="module")
def llava(tiny_llava_dir: Path, photo_root: Path) -> Encoder:
    return encoder_of(tiny_llava_dir, photo_root)


@pytest.fixture(scope="module")
def qwen(tiny_qwen_dir: Path, photo_root: Path) -> Encoder:
    return encoder_of(tiny_qwen_dir, photo_root)


@pytest.fixture(scope="module", params=["llava", "qwen"])
def encoder(request: pytest.FixtureRequest) -> Encoder:
    return request.getfixturevalue(request.param)


def started(text: str) -> Turn:
    return turn(text, role="assistant")


def with_template(encoder: Encoder, template: str) -> Encoder:
    processor = replace(encoder.processor, chat_template=template)
    return Encoder(processor, encoder.family.config, encoder.image_root, encoder.max_length_tokens)


def starting_group(start: str, *responses: str) -> PreferenceGroup:
    original = group("g", *responses)
    return replace(original, prompt=(QUESTION, started(start)))


@pytest.mark.parametrize("start", ["It is a", "It is a ", "One.\n\n", " \tTwo:  "])
def test_the_completion_follows_the_start_directly(encoder: Encoder, start: str) -> None:
    encoded = encoder.encode_group(starting_group(start, "bus.", "tram."))
    assert isinstance(encoded, EncodedGroup)
    prefix = encoded.prompt.prefix_ids
    asked = encoder.encode_prompt("r", ["wide.png"], [QUESTION]).prefix_ids
    # The templates begin an answer as their generation prompt does.
    assert prefix == (*asked, *encoder.tokenizer(start, add_special_tokens=False)["input_ids"])
    assert encoder.eos_token_id not in prefix[len(asked) :]
    whole = encoder.tokenizer.decode([*prefix, *encoded.completion_ids[0]])
    assert whole.endswith(f"{start}bus.{encoder.tokenizer.decode([encoder.eos_token_id])}")


@pytest.mark.parametrize("template", [LLAVA_TEMPLATE, LLAVA_1_5_TEMPLATE, QWEN_TEMPLATE], ids=["tiny", "1.5", "chatml"])
def test_a_start_is_rendered_as_transformers_continues_the_final_message(llava: Encoder, template: str) -> None:
    turns = [turn("Hello?"), turn("Hi.", role="assistant"), turn("What?"), started("It is")]
    messages = [{"role": one.role, "content": [{"type": "text", "text": one.text}]} for one in turns]
    rendered = llava.tokenizer.apply_chat_template(
        messages, chat_template=template, continue_final_message=True, tokenize=False
    )
    prefix = with_template(llava, template).encode_prompt("r", [], turns).prefix_ids
    assert llava.tokenizer.decode(prefix) == rendered and rendered.endswith("It is")


def test_a_template_that_strips_answers_does_not_change_the_start(llava: Encoder) -> None:
    template = LLAVA_TEMPLATE.replace("{{ c['text'] }}", "{{ c['text'] | trim }}")
    prefix = with_template(llava, template).encode_prompt("r", [], [turn(" What? "), started(" It is ")]).prefix_ids
    assert llava.tokenizer.decode(prefix) == "USER: What? ASSISTANT:  It is "


def test_control_tokens_in_a_start_stay_text(encoder: Encoder) -> None:
    for text in (CONTROL, "\ue0f2 and \ue0f00\ue0f1", "<image>"):
        plain = encoder.encode_prompt("r", ["wide.png"], [QUESTION, started("x")])
        spelled = encoder.encode_prompt("r", ["wide.png"], [turn(None, text), started(text)])
        assert control_counts(encoder, spelled.prefix_ids) == control_counts(encoder, plain.prefix_ids)
        assert encoder.tokenizer.decode(spelled.prefix_ids).endswith(text)
        assert encoder.tokenizer.decode(spelled.prefix_ids).count(text) >= 2


def test_a_template_without_answers_refuses_a_start_and_names_the_record(llava: Encoder) -> None:
    template = "{% for m in messages if m['role'] == 'user' %}{{ m['content'][0]['text'] }}{% endfor %}"
    encoder = with_template(llava, template)
    with pytest.raises(EncodingError, match="'r7': .* drops the start of an answer, .* renders assistant turns"):
        encoder.encode_prompt("r7", [], [turn("Say \ue0f2."), started("It is")])


def test_a_system_prompt_comes_before_a_prompt_with_a_start(qwen: Encoder) -> None:
    processor = qwen.processor
    encoder = Encoder(processor, qwen.family.config, qwen.image_root, 2048, system_prompt="Be brief.")
    text = encoder.tokenizer.decode(encoder.encode_prompt("r", [], [turn("What?"), started("It is")]).prefix_ids)
    assert text.startswith("<|im_start|>system\nBe brief.<|im_end|>") and text.endswith("<|im_start|>assistant\nIt is")


def test_positions_count_on_through_a_start(qwen: Encoder) -> None:
    """The multimodal positions of image and question are those without a start; one more per token from there."""
    plain, with_start = group("g", "bus", "tram"), starting_group("It is ", "bus", "tram")
    plain = replace(plain, prompt=(QUESTION,))
    batches = [packed_batch(qwen, [one]) for one in (plain, with_start)]
    (_, without), (_, end) = (batch.layout.prefix_spans[0] for batch in batches)
    first, second = (batch.position_ids_XT for batch in batches)
    assert end - without == len("It is ")
    assert second[:, :without].equal(first[:, :without])
    for start, stop in batches[1].layout.completion_spans[0]:
        path = [*range(without - 1, end), *range(start, stop)]
        assert (second[:, path].diff(dim=1) == 1).all()


# Weights of characters


def weights_of(tokenizer: Any, text: str, *spans: tuple[int, int, float]) -> list[tuple[str, float]]:
    """(decoded token, weight) of a text; a byte that is no character is decoded as U+FFFD."""
    processor = Processor(tokenizer, None, LLAVA_TEMPLATE)
    chat = ChatTokenizer(processor, ["</s>"], {tokenizer.convert_tokens_to_ids("</s>")})
    ids, weights = chat.plain(text), chat.plain_weights(text, spans)
    assert len(ids) == len(weights)
    return [(tokenizer.decode([token]), weight) for token, weight in zip(ids, weights, strict=True)]


@pytest.fixture(scope="module")
def words() -> Any:
    """A tokenizer with the tokens ` a`, ` ca`, ` cat` and `</s>`."""
    merges = (("Ġ", "a"), ("c", "a"), ("Ġ", "ca"), ("Ġca", "t"))
    return byte_tokenizer(["</s>"], merges, eos_token="</s>")


def test_a_token_has_the_weight_of_the_span_of_its_first_letter(words: Any) -> None:
    assert weights_of(words, "is a cat", (5, 8, 2.0)) == [("i", 1), ("s", 1), (" a", 1), (" cat", 2)]
    assert weights_of(words, "is a cat", (6, 8, 2.0))[-1] == (" cat", 1)  # begins within the token
    assert weights_of(words, "is a cat", (2, 4, 3.0), (4, 6, 2.0)) == [("i", 1), ("s", 1), (" a", 3), (" cat", 2)]
    assert weights_of(words, "is a cat", (0, 1, 0.0), (1, 4, 0.5)) == [("i", 0), ("s", 0.5), (" a", 0.5), (" cat", 1)]
    assert weights_of(words, "a \n b", (1, 3, 4.0)) == [("a", 1), (" ", 4), ("\n", 4), (" ", 1), ("b", 1)]


def test_every_byte_of_a_character_has_its_weight(words: Any) -> None:
    text = "é\U0001f600x"  # two and four bytes
    assert [weight for _, weight in weights_of(words, text, (0, 1, 2.0))] == [2, 2, 1, 1, 1, 1, 1]
    assert [weight for _, weight in weights_of(words, text, (1, 2, 3.0))] == [1, 1, 3, 3, 3, 3, 1]
    assert [weight for _, weight in weights_of(words, text, (2, 3, 4.0))] == [1, 1, 1, 1, 1, 1, 4]


def test_a_spelled_control_token_keeps_the_places_of_the_weights(words: Any) -> None:
    found = weights_of(words, "a</s> cat", (1, 5, 2.0), (6, 9, 3.0))
    assert found == [("a", 1), *((letter, 2) for letter in "</s>"), (" cat", 3)]


def weighted(*completions: Completion, **changes: Any) -> PreferenceGroup:
    return replace(group("g", "x", "y"), completions=completions, **changes)


def test_weights_betas_and_views_are_encoded_only_if_there_are_any(encoder: Encoder) -> None:
    plain = encoder.encode_group(
        weighted(Completion("ab", 1.0, "gt"), Completion("c", 0.0, "x", token_weights=((0, 1, 1.0),)))
    )
    assert isinstance(plain, EncodedGroup)
    assert (plain.betas, plain.token_weights, plain.described) == ((), (), ())
    full = encoder.encode_group(
        weighted(
            Completion("ab", 1.0, "gt", token_weights=((1, 2, 3.0),)),
            Completion("c", 0.0, "hal", beta=2.0),
            Completion("de", 1.0, "gt", view="other"),
            other_images=("tall.png",),
        )
    )
    assert isinstance(full, EncodedGroup)
    assert full.betas == (1.0, 2.0, 1.0) and full.described == ("", "", "other")
    assert full.token_weights == ((1.0, 3.0, 1.0), (1.0, 1.0), (1.0, 1.0, 1.0))  # the end token has weight 1


def test_a_merged_completion_keeps_the_fields_of_the_one_with_the_higher_score(llava: Encoder) -> None:
    best = Completion("ab", 1.0, "gt", weight=0.5, beta=2.0, token_weights=((0, 1, 4.0),))
    worse = Completion("ab", 0.5, "hal", weight=3.0, beta=3.0, token_weights=((0, 2, 5.0),))
    for first, second in ((best, worse), (worse, best)):
        encoded = llava.encode_group(weighted(first, Completion("c", 0.0, "hal"), second))
        assert isinstance(encoded, EncodedGroup)
        assert (encoded.scores, encoded.weights, encoded.betas) == ((1.0, 0.0), (0.5, 1.0), (2.0, 1.0))
        assert encoded.token_weights == ((4.0, 1.0, 1.0), (1.0, 1.0))


def test_an_answer_about_other_images_is_not_merged_and_makes_no_pair(llava: Encoder) -> None:
    own, other = Completion("ab", 1.0, "gt"), Completion("ab", 0.0, "gt", view="other")
    dropped = llava.encode_group(weighted(own, other, other_images=("tall.png",)))
    assert isinstance(dropped, Dropped) and dropped.reason == "no-pair"
    kept = llava.encode_group(weighted(own, other, Completion("c", 0.0, "hal"), other_images=("tall.png",)))
    assert isinstance(kept, EncodedGroup)
    assert kept.completion_ids[0] == kept.completion_ids[1] and kept.described == ("", "other", "")


def test_token_weights_are_cut_with_the_completion(tiny_llava_dir: Path, photo_root: Path, llava: Encoder) -> None:
    num_prefix = len(llava.encode_prompt("g", ["wide.png"], [turn(None, "What?")]).prefix_ids)
    encoder = encoder_of(tiny_llava_dir, photo_root, max_length_tokens=num_prefix + 3)
    long = Completion("abcdef", 1.0, "gt", token_weights=((2, 5, 2.0),))
    encoded = encoder.encode_group(weighted(long, Completion("x", 0.0, "hal")))
    assert isinstance(encoded, EncodedGroup) and encoded.token_weights == ((1.0, 1.0, 2.0), (1.0, 1.0))
    cut = encoder.encode_group(weighted(long, Completion("x", 0.0, "hal")), longest_prefix=num_prefix + 1)
    assert isinstance(cut, EncodedGroup) and [len(ids) for ids in cut.completion_ids] == [2, 2]
    assert cut.token_weights == ()  # the weighted part is cut off
    whole = encoder.encode_group(weighted(long, Completion("x", 0.0, "hal")), longest_prefix=1)
    assert isinstance(whole, EncodedGroup) and whole.completion_ids == encoded.completion_ids
    dropped = encoder.encode_group(weighted(long, Completion("x", 0.0, "hal")), longest_prefix=num_prefix + 3)
    assert isinstance(dropped, Dropped) and dropped.reason == "prompt-too-long"
    assert f"a view of the prompt takes {num_prefix + 3} of {num_prefix + 3} tokens; raise" in dropped.detail


def test_weights_with_a_tokenizer_without_offsets_are_an_error(llava: Encoder, monkeypatch: pytest.MonkeyPatch) -> None:
    record = weighted(Completion("ab", 1.0, "gt", token_weights=((0, 1, 2.0),)), Completion("c", 0.0, "hal"))
    slow = SimpleNamespace(is_fast=False)
    chat = ChatTokenizer(llava.processor, ["</s>"], [])
    monkeypatch.setattr(chat, "plain", lambda text: [1, 2])
    chat.tokenizer = slow
    with pytest.raises(ValueError, match="need a fast tokenizer, but SimpleNamespace .* or remove 'weights'"):
        chat.plain_weights("ab", [(0, 1, 2.0)])
    monkeypatch.setattr(type(llava.tokenizer), "is_fast", property(lambda self: False))
    with pytest.raises(EncodingError, match="record 'g': weights of characters need a fast tokenizer"):
        llava.encode_group(record)


# Auxiliary prompts


def test_auxiliary_prompts_share_the_images_and_have_room_of_their_own(tiny_llava_dir: Path, photo_root: Path) -> None:
    entries = (
        Auxiliary((turn(None, "Is it red?"),), "yes, very"),
        Auxiliary((turn("Name it.", None),), "no"),
    )
    record = replace(group("g", "a", "b"), auxiliary=entries)
    roomy = encoder_of(tiny_llava_dir, photo_root)
    images = roomy.encode_images(record.images)
    encoded = roomy.encode_auxiliary(record, images)
    texts = [roomy.tokenizer.decode([*prompt.prefix_ids, *ids]) for prompt, ids in encoded]
    assert [text.replace("<image>", "") for text in texts] == [
        "USER: \nIs it red? ASSISTANT: yes, very</s>",
        "USER: Name it.\n ASSISTANT: no</s>",
    ]
    assert all(prompt.image_inputs is images.inputs for prompt, _ in encoded)
    longest = len(encoded[0][0].prefix_ids)
    tight = encoder_of(tiny_llava_dir, photo_root, max_length_tokens=longest + 2)
    assert [len(ids) for _, ids in tight.encode_auxiliary(record, images)] == [2, 3]
    full = encoder_of(tiny_llava_dir, photo_root, max_length_tokens=longest)
    with pytest.raises(
        EncodingError, match=rf"record 'g': auxiliary\[0\]: the prompt takes {longest} of {longest} tok"
    ):
        full.encode_auxiliary(record, images)
    assert roomy.encode_auxiliary(group("g", "a", "b"), images) == []


def test_threads_do_not_take_control_tokens_from_each_other(llava: Encoder) -> None:
    """One thread encodes answers as plain text while another encodes prompts with an image."""
    text = "It says <image>. " * 50
    plain = llava.encode_completion(text)
    pieces = llava._chat.render((QUESTION,))
    prompt = llava._chat.tokenize(*pieces)
    done = threading.Event()

    def encode_answers() -> bool:
        equal = True
        while not done.is_set():
            equal &= llava.encode_completion(text) == plain
        return equal

    with ThreadPoolExecutor(1) as pool:
        answers = pool.submit(encode_answers)
        try:
            prompts = [llava._chat.tokenize(*pieces) for _ in range(300)]
        finally:
            done.set()
        assert answers.result()
    assert llava.image_token_id in prompt and all(found == prompt for found in prompts)
