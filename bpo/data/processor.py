"""The three parts of a multimodal processor that training needs: tokenizer, image processor, chat template.

They are loaded one by one: `AutoProcessor` builds a video processor as well, which fails without torchvision for models
such as Qwen2.5-VL although no video is ever read here.
"""

from __future__ import annotations

import json
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True, slots=True)
class Processor:
    tokenizer: Any
    image_processor: Any
    chat_template: str

    def apply_chat_template(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """Renders structured messages to text with one placeholder an image."""
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, add_generation_prompt=add_generation_prompt, tokenize=False
        )


def load_processor(path: str, *, trust_remote_code: bool = False) -> Processor:
    """Reads the processor's parts from a model directory or hub id.

    Raises:
        ValueError: there is no chat template; says where one may stand.
    """
    from transformers import AutoTokenizer

    # From its module: some versions of transformers (5.17) export it at the top only where torchvision is installed.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    image_processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
    template = tokenizer.chat_template or _processor_chat_template(path)
    if not template:
        raise ValueError(
            f"{path}: no chat template found in the tokenizer, chat_template.jinja or chat_template.json; "
            "save one with the processor (processor.chat_template = ...; processor.save_pretrained(DIR))"
        )
    return Processor(tokenizer, image_processor, template)


def _processor_chat_template(path: str) -> str | None:
    """The template as a processor saves it beside the tokenizer: chat_template.jinja, or the older JSON file."""
    from transformers.utils import cached_file

    missing_is_fine: dict[str, Any] = {
        "_raise_exceptions_for_missing_entries": False,
        "_raise_exceptions_for_connection_errors": False,
    }
    jinja = cached_file(path, "chat_template.jinja", **missing_is_fine)
    if jinja:
        with open(jinja, encoding="utf-8") as file:
            return file.read()
    legacy = cached_file(path, "chat_template.json", **missing_is_fine)
    if legacy:
        with open(legacy, encoding="utf-8") as file:
            return json.load(file)["chat_template"]
    return None
