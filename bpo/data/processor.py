"""Loads the tokenizer, image processor and chat template of a model.

They are loaded separately because `AutoProcessor` also builds a video processor, which requires torchvision for models
such as Qwen2.5-VL although bpo reads no videos.
"""

from __future__ import annotations

import ctypes
import json
import logging
import threading
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpo.config.training import missing_model
from bpo.records import ContentPart, Turn

logger = logging.getLogger(__name__)

# A template is code that comes with the model; rendering takes about a millisecond.
TEMPLATE_TIMEOUT_S = 5.0
# A private-use character where a text is rendered.
PLACE = "\ue0f2"


class ChatTemplateError(ValueError):
    """A chat template that fails, or takes only text as content; names the template."""


class EndlessTemplateError(ValueError):
    """A chat template that was stopped by the time limit."""


@dataclass(frozen=True, slots=True)
class Processor:
    """The parts of a processor; `template_source` names the chat template in messages."""

    tokenizer: Any
    image_processor: Any
    chat_template: str
    template_source: str = "chat template"

    def apply_chat_template(self, messages: list[dict[str, Any]], *, add_generation_prompt: bool = True) -> str:
        """Renders structured messages to text with one placeholder per image.

        Raises:
            ChatTemplateError: The template fails on these messages.
            EndlessTemplateError: It takes longer than `TEMPLATE_TIMEOUT_S`.
        """
        try:
            return render_template(
                self.tokenizer, self.chat_template, messages, self.template_source, add_generation_prompt
            )
        except ChatTemplateError as error:
            if self._takes_text(messages):
                raise self.only_text_error() from error
            raise

    def before_answer(self, messages: list[dict[str, Any]]) -> str:
        """Renders messages without `PLACE` and the beginning of an assistant turn, up to the place of its text.

        As with `continue_final_message` of transformers, but the template does not see the text that is put there,
        so it keeps its white space.

        Raises:
            ChatTemplateError: The template fails on these messages, or drops the turn.
            EndlessTemplateError: It takes longer than `TEMPLATE_TIMEOUT_S`.
        """
        answer = {"role": "assistant", "content": [{"type": "text", "text": PLACE}]}
        before, place, _ = self.apply_chat_template([*messages, answer], add_generation_prompt=False).rpartition(PLACE)
        if not place:
            raise ChatTemplateError(
                f"{self.template_source}: the chat template drops the start of an answer, with which the prompt ends; "
                "use a template that renders assistant turns"
            )
        return before

    def check_system_turn(self) -> None:
        """Raises ValueError if the chat template refuses or drops a system turn."""
        text = PLACE
        turns = [("system", text), ("user", "?")]
        messages = [{"role": role, "content": [{"type": "text", "text": said}]} for role, said in turns]
        try:
            fault = "" if text in self.apply_chat_template(messages) else "it drops system turns"
        except ChatTemplateError as error:
            fault = str(error)
        if fault:
            raise ValueError(
                f"data.system_prompt is set, but {self.template_source} takes no system turn ({fault}); remove it"
            )

    def only_text_error(self) -> ChatTemplateError:
        return ChatTemplateError(
            f"{self.template_source}: the chat template takes only text as content, so it cannot place images; save "
            "the template of the model's processor as chat_template.jinja in the model directory"
        )

    def _takes_text(self, messages: list[dict[str, Any]]) -> bool:
        """Whether the template renders the messages with their text as content."""
        texts = [
            {**message, "content": "".join(part.get("text", "") for part in message["content"])} for message in messages
        ]
        try:
            return bool(render_template(self.tokenizer, self.chat_template, texts, self.template_source))
        except ChatTemplateError:
            return False


def render_template(
    tokenizer: Any,
    template: str | None,
    messages: list[dict[str, Any]],
    source: str,
    add_generation_prompt: bool = True,
) -> str:
    """Renders messages with a chat template; None uses the tokenizer's. `source` names it in messages.

    Raises:
        ChatTemplateError: The template fails on these messages.
        EndlessTemplateError: It takes longer than `TEMPLATE_TIMEOUT_S`.
    """
    try:
        return _within(
            TEMPLATE_TIMEOUT_S,
            lambda: tokenizer.apply_chat_template(
                messages, chat_template=template, add_generation_prompt=add_generation_prompt, tokenize=False
            ),
        )
    except TimeoutError as error:
        raise EndlessTemplateError(
            f"{source}: the chat template was stopped after {TEMPLATE_TIMEOUT_S:g} s; look for an endless loop in it"
        ) from error
    except Exception as error:  # raised by the template's code: any type
        raise ChatTemplateError(f"{source}: the chat template fails ({type(error).__name__}: {error})") from error


def _within(seconds: float, function: Callable[[], str]) -> str:
    """Calls `function` in a thread of its own; a signal would do only in the main thread.

    Raises:
        TimeoutError: It has not returned in time; its thread is stopped at the next Python instruction.
    """
    results: list[str] = []
    errors: list[BaseException] = []

    def call() -> None:
        try:
            results.append(function())
        except BaseException as error:
            errors.append(error)

    thread = threading.Thread(target=call, daemon=True)
    thread.start()
    thread.join(seconds)
    if thread.is_alive():
        ctypes.pythonapi.PyThreadState_SetAsyncExc(ctypes.c_ulong(thread.ident or 0), ctypes.py_object(SystemExit))
        raise TimeoutError
    if errors:
        raise errors[0]
    return results[0]


def with_system_turn(prompt: Sequence[Turn], system_prompt: str) -> tuple[Turn, ...]:
    """The prompt preceded by a system turn, unless it begins with one of its own or `system_prompt` is empty."""
    if not system_prompt or (prompt and prompt[0].role == "system"):
        return tuple(prompt)
    return Turn("system", (ContentPart("text", system_prompt),)), *prompt


def load_processor(path: str, *, trust_remote_code: bool = False) -> Processor:
    """Loads the processor's parts from a model directory or Hub id.

    The processor's own chat template takes precedence over the tokenizer's, as in `AutoProcessor`; a difference is
    logged.

    Raises:
        ValueError: There is no tokenizer, image processor or chat template; lists the places searched.
    """
    from transformers import AutoTokenizer

    # Some versions of transformers (5.17) export it at top level only if torchvision is installed.
    from transformers.models.auto.image_processing_auto import AutoImageProcessor

    try:
        tokenizer = AutoTokenizer.from_pretrained(path, trust_remote_code=trust_remote_code)
        image_processor = AutoImageProcessor.from_pretrained(path, trust_remote_code=trust_remote_code)
    except (OSError, ValueError) as error:
        fault = missing_model(path) or " ".join(str(error).split())
        raise ValueError(f"{path}: no tokenizer or image processor can be loaded: {fault}") from error
    templates = _templates(path, tokenizer)
    if not templates:
        raise ValueError(
            f"{path}: no chat template in the tokenizer, chat_template.jinja or chat_template.json; "
            "save one with the processor (processor.chat_template = ...; processor.save_pretrained(DIR))"
        )
    source, template = next(iter(templates.items()))
    others = [name for name, other in templates.items() if other != template]
    if others:
        logger.warning("%s: %s has another chat template than %s; %s is used", path, ", ".join(others), source, source)
    return Processor(tokenizer, image_processor, template, f"{path}: {source}")


def _templates(path: str, tokenizer: Any) -> dict[str, str]:
    """File -> chat template, in the order of precedence in `ProcessorMixin`; the tokenizer's last."""
    found = {
        "processor_config.json": _in_json(path, "processor_config.json"),
        "chat_template.jinja": _content(path, "chat_template.jinja"),
        "chat_template.json": _in_json(path, "chat_template.json"),
        "tokenizer_config.json": _in_json(path, "tokenizer_config.json"),
        "the tokenizer": tokenizer.chat_template,
    }
    templates: dict[str, str] = {}
    for name, template in found.items():
        if isinstance(template, list):  # named templates, as in tokenizer_config.json
            template = {entry.get("name"): entry.get("template") for entry in template if isinstance(entry, dict)}
        if isinstance(template, dict):
            template = template.get("default")
        if isinstance(template, str) and template:
            templates[name] = template
    return templates


def _in_json(path: str, name: str) -> Any:
    content = _content(path, name)
    try:
        tree = json.loads(content) if content else {}
    except json.JSONDecodeError as error:
        raise ValueError(f"{path}: {name} is not valid JSON ({error}); copy it again from the model") from error
    return tree.get("chat_template") if isinstance(tree, dict) else None


def _content(path: str, name: str) -> str | None:
    """Returns the text of a file of the model, or None if there is none."""
    from transformers.utils import cached_file

    file = cached_file(
        path, name, _raise_exceptions_for_missing_entries=False, _raise_exceptions_for_connection_errors=False
    )
    return Path(file).read_text(encoding="utf-8") if file else None
