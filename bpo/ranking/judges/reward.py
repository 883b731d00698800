"""Scores answers with a reward model: a classifier of texts, or the similarity of image and text (CLIP, SigLIP)."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

import torch
from torch.nn.functional import normalize

from bpo.config.options import Section, check, number
from bpo.config.training import Config, missing_model
from bpo.data.processor import render_template
from bpo.formats.images import ImageError, load_image
from bpo.job.launch import Ranks, pick_device
from bpo.model.weights import policy_fingerprint
from bpo.ranking.judge import Failed, Judge, Scored, dialogue_of, register_judge
from bpo.ranking.options import judge_options
from bpo.records import PreferenceGroup


class _TooLong(ValueError):
    """A text that the model does not take."""


@dataclass(kw_only=True)
class RewardOptions(Section):
    """Options of the judge `reward`.

    Attributes:
        model: Directory or Hub id of the reward model.
        kind: `text`: a sequence classifier of question and answer, which does not see the image. `clip`: the cosine
            of the embeddings of image and answer.
        label: Label of a classifier with several whose logit is the score.
        dtype: Data type of the weights; `config` uses the model config's.
    """

    where = "rank.options"

    model: str = ""
    kind: Literal["text", "clip"] = "text"
    label: int | None = number(None, at_least=0)
    dtype: Literal["config", "float32", "bfloat16", "float16"] = "config"

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.model), "rank.options.model is empty; set the directory of the reward model")


@register_judge("reward")
class RewardJudge(Judge):
    """Each group, and each text, has a forward pass of its own: no score depends on others. The model loads on use."""

    def __init__(self, config: Config, ranks: Ranks):
        self.options = judge_options(RewardOptions, config)
        self._image_root, self._device = Path(config.data.image_root or "."), pick_device(ranks)
        self._loaded: Any = None

    def identity(self) -> dict[str, Any]:
        names = ("kind", "label", "dtype")
        options = {name: getattr(self.options, name) for name in names}
        return {"model (weights)": policy_fingerprint(self.options.model), **options}

    @torch.inference_mode()
    def judge(self, name: str, groups: Sequence[PreferenceGroup]) -> Iterator[tuple[int, Scored | Failed]]:
        if self._loaded is None:
            self._loaded = self._load()
        score = self._similarities if self.options.kind == "clip" else self._logits
        for index, group in enumerate(groups):
            try:
                yield index, Scored(tuple(score(group)))
            except (ImageError, _TooLong) as error:
                yield index, Failed(f"unusable input: {error}")

    def _load(self) -> tuple[Any, Any, Any]:
        """(model, tokenizer, image processor or None).

        Raises:
            ValueError: The directory has no such model, or not its head.
        """
        from transformers import AutoModel, AutoModelForSequenceClassification, AutoTokenizer
        from transformers.models.auto.image_processing_auto import AutoImageProcessor

        options, path = self.options, self.options.model
        is_clip = options.kind == "clip"
        dtype = "auto" if options.dtype == "config" else getattr(torch, options.dtype)
        try:
            kind = AutoModel if is_clip else AutoModelForSequenceClassification
            model, info = kind.from_pretrained(path, dtype=dtype, output_loading_info=True)
            tokenizer = AutoTokenizer.from_pretrained(path)
            image_processor = AutoImageProcessor.from_pretrained(path) if is_clip else None
        except (OSError, ValueError) as error:
            fault = missing_model(path) or " ".join(str(error).split())
            raise ValueError(f"rank.options.model {path} cannot be loaded as kind `{options.kind}`: {fault}") from error
        missing = sorted(info["missing_keys"]) or (
            ["logit_scale"] if is_clip and not hasattr(model, "logit_scale") else []
        )
        if missing:
            raise ValueError(f"rank.options.model {path} lacks weights, such as {missing[0]}; it is no reward model")
        labels = getattr(model.config, "num_labels", 1)
        if not is_clip and not (labels == 1 if options.label is None else options.label < labels):
            raise ValueError(f"rank.options.label is {options.label}; {path} has {labels} labels: name one, from 0")
        return model.to(self._device).eval(), tokenizer, image_processor

    def _logits(self, group: PreferenceGroup) -> Iterator[float]:
        model, tokenizer, _ = self._loaded
        template = tokenizer.chat_template
        limit = min(tokenizer.model_max_length, getattr(model.config, "max_position_embeddings", None) or 1 << 60)
        turns, answers = dialogue_of(group)
        for answer in answers:
            text = "\n".join([*(turn.text for turn in turns), answer])
            if template:
                messages = [{"role": turn.role, "content": turn.text} for turn in turns]
                messages.append({"role": "assistant", "content": answer})
                text = render_template(tokenizer, None, messages, self.options.model, add_generation_prompt=False)
            tokens = tokenizer(text, add_special_tokens=not template, return_tensors="pt").to(self._device)
            if tokens.input_ids.shape[1] > limit:
                raise _TooLong(f"{tokens.input_ids.shape[1]} tokens of question and answer; the model takes {limit}")
            yield float(model(**tokens).logits[0, self.options.label or 0])

    def _similarities(self, group: PreferenceGroup) -> list[float]:
        """Cosines [K] of each answer with the image, their mean over several images; long answers are cut."""
        model, tokenizer, image_processor = self._loaded
        images = [load_image(self._image_root, image) for image in group.images]
        pixels = image_processor(images=images, return_tensors="pt").to(self._device, model.dtype)
        # Full length: SigLIP was trained with it, and for CLIP the padding then does not depend on other answers.
        length = model.config.text_config.max_position_embeddings
        _, texts = dialogue_of(group)
        tokens = tokenizer(texts, padding="max_length", max_length=length, truncation=True, return_tensors="pt")
        if model.config.model_type.startswith("siglip"):
            tokens.pop("attention_mask", None)  # trained without
        output = model(**pixels, **tokens.to(self._device))
        text_KD, image_ID = (normalize(x.float(), dim=-1) for x in (output.text_embeds, output.image_embeds))
        return [float(cosine) for cosine in (text_KD @ image_ID.T).mean(1)]
