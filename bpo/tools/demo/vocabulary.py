"""The word-level tokenizer and the processor of the demo's base model."""

from __future__ import annotations

from collections.abc import Iterable

from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, normalizers, pre_tokenizers, processors
from transformers import CLIPImageProcessorPil, LlavaProcessor, PreTrainedTokenizerFast

from .rewriting import rewriting_request
from .sprites import OBJECTS
from .world import DESCRIBE, caption_of, question_about

PAD, BOS, EOS, UNKNOWN, IMAGE = "<pad>", "<s>", "</s>", "<unk>", "<image>"
SPECIAL_TOKENS = (PAD, BOS, EOS, UNKNOWN, IMAGE)
# Instead of CLIP's statistics of photographs, values that centre the demo's light backgrounds.
PIXEL_MEAN, PIXEL_STD = (0.80, 0.80, 0.80), (0.20, 0.20, 0.20)

# LLaVA-1.5's conversation format, for content given as text or as a list of image and text parts.
CHAT_TEMPLATE = (
    "{% for message in messages %}"
    "{% if message['role'] == 'assistant' %}{{ ' ASSISTANT:' }}{% else %}"
    "{{ ('<s>' if loop.first else '') + message['role'].upper() + ':' }}{% endif %}"
    "{% if message['content'] is string %}{{ ' ' + message['content'] }}{% else %}"
    "{% for part in message['content'] %}{% if part['type'] == 'image' %}{{ ' <image>' }}"
    "{% elif part['type'] == 'text' %}{{ ' ' + part['text'] }}{% endif %}{% endfor %}{% endif %}"
    "{% if message['role'] == 'assistant' %}{{ '</s>' }}{% endif %}"
    "{% endfor %}{% if add_generation_prompt %}{{ ' ASSISTANT:' }}{% endif %}"
)


def _sentences() -> Iterable[str]:
    yield from ("USER:", "SYSTEM:", "ASSISTANT:", "Yes.", "No.", "an", DESCRIBE, rewriting_request(""))
    for thing in OBJECTS:
        for name in (thing.name, *thing.synonyms):
            yield question_about(name)
            yield caption_of([name, name, name])


def build_tokenizer() -> PreTrainedTokenizerFast:
    """One token per word or punctuation mark; words include the preceding space, so decoding is exact."""
    words = Tokenizer(models.WordLevel({UNKNOWN: 0}, unk_token=UNKNOWN))
    split = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Metaspace(prepend_scheme="always", split=True),
            pre_tokenizers.Split(Regex(r"[.,:;!?]"), behavior="isolated"),
        ]
    )
    vocabulary = dict.fromkeys(SPECIAL_TOKENS)
    for sentence in _sentences():
        vocabulary.update(dict.fromkeys(word for word, _ in split.pre_tokenize_str(sentence)))
    ids = {word: i for i, word in enumerate(vocabulary)}
    words = Tokenizer(models.WordLevel(ids, unk_token=UNKNOWN))
    words.normalizer = normalizers.Replace(Regex(r"\s+"), " ")
    words.pre_tokenizer = split
    words.decoder = decoders.Metaspace(prepend_scheme="always", split=True)
    words.post_processor = processors.TemplateProcessing(single="$A", pair="$A $B", special_tokens=[])
    return PreTrainedTokenizerFast(
        tokenizer_object=words,
        pad_token=PAD,
        bos_token=BOS,
        eos_token=EOS,
        unk_token=UNKNOWN,
        # lstrip: the space before the placeholder is not a token.
        additional_special_tokens=[AddedToken(IMAGE, lstrip=True, special=True, normalized=False)],
        padding_side="left",
        model_max_length=512,
        clean_up_tokenization_spaces=False,
    )


def build_processor(image_px: int, patch_px: int) -> LlavaProcessor:
    """A LLaVA processor with the word-level tokenizer, for images of `image_px` x `image_px`."""
    image_processor = CLIPImageProcessorPil(
        size={"shortest_edge": image_px},
        crop_size={"height": image_px, "width": image_px},
        image_mean=list(PIXEL_MEAN),
        image_std=list(PIXEL_STD),
    )
    return LlavaProcessor(
        image_processor=image_processor,
        tokenizer=build_tokenizer(),
        patch_size=patch_px,
        vision_feature_select_strategy="default",
        chat_template=CHAT_TEMPLATE,
        image_token=IMAGE,
        num_additional_image_tokens=1,
    )
