"""Loads the tokenizer, image processor and chat template of a model.

They are loaded separately because `AutoProcessor` also builds a video processor, which requires torchvision for models
such as Qwen2.5-VL although bpo reads no videos.
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
        """Renders structured messages to text with one placeholder per image."""
        return self.tokenizer.apply_chat_template(
            messages, chat_template=self.chat_template, add_generation_prompt=add_generation_prompt, tokenize=False
        )


def load_processor(path: str, *, trust_remote_code: bool = False) -> Processor:
    """Loads the processor's parts from a model directory or Hub id.

    Raises:
        ValueError: There is no chat template; lists the places searched.
    """
    from transformers import AutoTokenizer

    # Some versions of transformers (5.17) export it at top level only if torchvision is installed.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
    image_processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
    template = tokenizer.chat_template or _processor_chat_template(path)
    if not template:
        raise ValueError(
            f"{path}: no chat template in the tokenizer, chat_template.jinja or chat_template.json; "
            "save one with the processor (processor.chat_template = ...; processor.save_pretrained(DIR))"
        )
    return Processor(tokenizer, image_processor, template)


def _processor_chat_template(path: str) -> str | None:
    """Reads the template saved by a processor: chat_template.jinja, or the older chat_template.json."""
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
