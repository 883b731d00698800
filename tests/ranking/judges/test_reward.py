"""The judge `reward`: tiny random models, whose scores are compared with those of transformers alone."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from PIL import Image
from tokenizers.processors import TemplateProcessing
from transformers import (
    CLIPConfig,
    CLIPImageProcessor,
    CLIPModel,
    LlamaConfig,
    LlamaForCausalLM,
    LlamaForSequenceClassification,
    SiglipConfig,
    SiglipModel,
)

from bpo.job.launch import Ranks
from bpo.ranking.judge import Failed, Scored
from bpo.ranking.judges.reward import RewardJudge
from tests.ranking.candidates import config_of, judged
from tests.sample_groups import group, turn
from tests.tiny import byte_tokenizer, save, sharpen

TEMPLATE = "{% for m in messages %}<{{ m['role'] }}>{{ m['content'] }}</s>{% endfor %}"
RECORD = group("a", "a cat", "a dog on a mat", "no")


def tokenizer_of(template: str | None = None) -> Any:
    tokenizer = byte_tokenizer(["<s>", "</s>", "<pad>"], bos_token="<s>", eos_token="</s>", pad_token="<pad>")
    tokenizer.chat_template = template
    ends = [(token, tokenizer.convert_tokens_to_ids(token)) for token in ("<s>", "</s>")]
    tokenizer.backend_tokenizer.post_processor = TemplateProcessing(single="<s> $A </s>", special_tokens=ends)
    return tokenizer


def text_model(
    folder: Path, kind: Any = LlamaForSequenceClassification, template: str | None = None, **own: Any
) -> Any:
    torch.manual_seed(0)
    tokenizer = tokenizer_of(template)
    sizes = dict(hidden_size=32, intermediate_size=64, num_hidden_layers=2, num_attention_heads=4, **own)
    model = kind(LlamaConfig(vocab_size=len(tokenizer), max_position_embeddings=64, dtype="float32", **sizes)).eval()
    sharpen(model)
    save(folder, model, tokenizer)
    return model


def judge(root: Path, model: Path, **options: Any) -> RewardJudge:
    return RewardJudge(config_of(root / "c.jsonl", "reward", {"model": str(model), **options}), Ranks())


@torch.inference_mode()
def logits(model: Any, text: str, special: bool = False) -> torch.Tensor:
    tokens = tokenizer_of()(text, return_tensors="pt", add_special_tokens=special)
    return model(**tokens).logits[0]


def test_the_logit_of_question_and_answer_is_the_score(tmp_path: Path) -> None:
    model = text_model(tmp_path / "m", num_labels=1)
    (result,) = judged(judge(tmp_path, tmp_path / "m"), RECORD)
    assert isinstance(result, Scored)
    wanted = [logits(model, f"What?\n{answer.response}", special=True).item() for answer in RECORD.completions]
    assert result.scores == pytest.approx(wanted, abs=1e-6) and len(set(wanted)) == 3
    # Scores of a group do not depend on the groups that it is judged with.
    assert judged(judge(tmp_path, tmp_path / "m"), group("b", "x", "y" * 20), RECORD)[1] == result


def test_the_chat_template_and_the_label_of_the_model_are_used(tmp_path: Path) -> None:
    model = text_model(tmp_path / "m", template=TEMPLATE, num_labels=3)
    begun = replace(RECORD, prompt=(turn(None, "What?"), turn("I see ", role="assistant")))
    (result,) = judged(judge(tmp_path, tmp_path / "m", label=2), begun)
    assert isinstance(result, Scored)
    texts = [f"<user>What?</s><assistant>I see {answer.response}</s>" for answer in RECORD.completions]
    assert result.scores == pytest.approx([logits(model, text)[2].item() for text in texts], abs=1e-6)
    with pytest.raises(ValueError, match=r"rank.options.label is None; .* has 3 labels: name one"):
        judged(judge(tmp_path, tmp_path / "m"), RECORD)


def test_a_text_that_is_too_long_fails_its_group_alone(tmp_path: Path) -> None:
    text_model(tmp_path / "m", num_labels=1)
    first, second = judged(judge(tmp_path, tmp_path / "m"), group("long", "x" * 90, "y"), RECORD)
    assert first == Failed("unusable input: 98 tokens of question and answer; the model takes 64")
    assert isinstance(second, Scored)


def test_a_model_without_the_head_is_refused(tmp_path: Path) -> None:
    text_model(tmp_path / "m", LlamaForCausalLM)
    with pytest.raises(ValueError, match=r"lacks weights, such as score.weight; it is no reward model"):
        judged(judge(tmp_path, tmp_path / "m"), RECORD)
    with pytest.raises(ValueError, match="rank.options.model .*absent cannot be loaded as kind `text`: "):
        judged(judge(tmp_path, tmp_path / "absent"), RECORD)


def test_the_weights_are_part_of_the_identity(tmp_path: Path) -> None:
    text_model(tmp_path / "m", num_labels=1)
    before = judge(tmp_path, tmp_path / "m").identity()
    text_model(tmp_path / "m", num_labels=2)
    assert judge(tmp_path, tmp_path / "m").identity()["model (weights)"] != before["model (weights)"]


@pytest.mark.parametrize(("config_class", "model_class"), [(CLIPConfig, CLIPModel), (SiglipConfig, SiglipModel)])
def test_clip_gives_the_cosine_of_image_and_answer(
    tmp_path: Path, photo_root: Path, config_class: Any, model_class: Any
) -> None:
    torch.manual_seed(0)
    tokenizer = tokenizer_of()
    sides = dict(hidden_size=16, intermediate_size=32, num_hidden_layers=2, num_attention_heads=2)
    text = dict(vocab_size=len(tokenizer), max_position_embeddings=24, eos_token_id=tokenizer.eos_token_id, **sides)
    vision = dict(image_size=28, patch_size=14, **sides)
    own = {"projection_dim": 8} if model_class is CLIPModel else {}
    model = model_class(config_class(text_config=text, vision_config=vision, **own)).eval()
    sharpen(model)
    processor = CLIPImageProcessor(size={"shortest_edge": 28}, crop_size={"height": 28, "width": 28})
    save(tmp_path / "m", model, tokenizer, processor)
    two = replace(RECORD, images=("wide.png", "tall.png"), prompt=(turn(None, None, "What?"),))
    gone = replace(RECORD, images=("gone.png",))
    one, both, failed = judged(judge(photo_root, tmp_path / "m", kind="clip"), RECORD, two, gone)
    wanted = []
    for name in two.images:
        pixels = processor(Image.open(photo_root / name).convert("RGB"), return_tensors="pt")
        answers = [answer.response for answer in RECORD.completions]
        texts = tokenizer(answers, padding="max_length", max_length=24, return_tensors="pt")
        if model_class is SiglipModel:
            del texts["attention_mask"]
        with torch.inference_mode():
            output = model(**pixels, **texts)
        wanted.append((output.text_embeds @ output.image_embeds.T)[:, 0])
    assert isinstance(one, Scored) and isinstance(both, Scored) and len(set(one.scores)) == 3
    assert one.scores == pytest.approx(wanted[0].tolist(), abs=1e-6)
    assert both.scores == pytest.approx(((wanted[0] + wanted[1]) / 2).tolist(), abs=1e-6)
    assert isinstance(failed, Failed) and "gone.png" in failed.reason
