"""Injected errors: a text-only LLM rewrites the annotation with erroneous but common elements.

The prompts are the files in `prompts/`. They are rendered as a conversation with the worked examples as earlier turns,
the format that instruction-tuned models follow best. The instruction starts the first user turn because not every chat
template supports a system role.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files
from pathlib import Path
from typing import Any, Literal

import yaml

from bpo.bootstrap.reply_forms import asks_for_description
from bpo.records import Annotation

Mode = Literal["description", "qa"]

# Placeholders of the request template, per mode.
_FIELDS: dict[Mode, tuple[str, ...]] = {"description": ("description",), "qa": ("question", "response")}
_MIN_BUDGET_TOKENS = 64
_BUDGET_TOKENS_PER_WORD = 4


@dataclass(frozen=True, slots=True)
class Message:
    """One turn of plain text for a text-only LLM."""

    role: Literal["user", "assistant"]
    content: str


@dataclass(frozen=True, slots=True)
class InjectionRequest:
    """A text-only LLM's request for one record.

    Attributes:
        messages: Worked examples and the request, alternating user and assistant, ending with the user.
        label: Precedes each answer in the plain-text form.
        max_new_tokens: Per-record budget, ample for a rewriting about as long as the annotation.
    """

    record_id: str
    messages: tuple[Message, ...]
    label: str
    max_new_tokens: int
    seed: int


@dataclass(frozen=True, slots=True)
class InjectionPrompt:
    """A prompt file: instruction, request template, answer label, worked examples (request, answer)."""

    instruction: str
    request: str
    label: str
    examples: tuple[tuple[str, str], ...]


def prompt_text(mode: Mode, prompt_dir: str = "") -> str:
    """The prompt file of a mode, from the package or from `prompt_dir`.

    Raises:
        ValueError: `prompt_dir` has no such file.
    """
    if not prompt_dir:
        return files("bpo.bootstrap").joinpath("prompts").joinpath(f"{mode}.yaml").read_text(encoding="utf-8")
    path = Path(prompt_dir) / f"{mode}.yaml"
    if not path.is_file():
        raise ValueError(
            f"bootstrap.inject.prompt_dir: {path} is missing; copy bpo/bootstrap/prompts/{mode}.yaml there and edit it"
        )
    return path.read_text(encoding="utf-8")


@cache
def load_prompt(mode: Mode, prompt_dir: str = "") -> InjectionPrompt:
    """Reads the prompt file of a mode.

    Raises:
        ValueError: The file is missing or malformed, or its request does not have exactly the mode's placeholders.
    """
    where = f"{prompt_dir or 'bpo/bootstrap/prompts'}/{mode}.yaml"
    try:
        tree: dict[str, Any] = yaml.safe_load(prompt_text(mode, prompt_dir))
        request = tree["request"]
        examples = tuple(
            (_fill(request, **{k: str(v) for k, v in e.items()}), str(e["modified"])) for e in tree["examples"]
        )
        prompt = InjectionPrompt(tree["instruction"].strip(), request, tree["label"], examples)
    except (yaml.YAMLError, KeyError, TypeError, AttributeError) as error:
        raise ValueError(
            f"{where}: {type(error).__name__} {error}; required: instruction, request, label and examples, each "
            f"example with {', '.join(_FIELDS[mode])} and modified"
        ) from error
    if sorted(re.findall(r"\{(\w+)\}", request)) != sorted(_FIELDS[mode]):
        raise ValueError(
            f"{where}: request must contain {{{'}, {'.join(_FIELDS[mode])}}} once each, and nothing else in braces"
        )
    return prompt


def choose_mode(configured: Literal["description", "qa", "auto"], annotation: Annotation) -> Mode:
    """The configured mode; for `auto`, `description` if the last user turn asks for one, else `qa`."""
    if configured != "auto":
        return configured
    return "description" if asks_for_description(question_of(annotation)) else "qa"


def question_of(annotation: Annotation) -> str:
    """The text of the turn that the annotation answers."""
    return annotation.prompt[-1].text.strip()


def build_request(
    annotation: Annotation, mode: Mode, max_new_tokens: int, seed: int, prompt_dir: str = ""
) -> InjectionRequest:
    """Builds the conversation that requests an erroneous version of one annotation.

    Args:
        max_new_tokens: The configured limit. The budget is 64 tokens plus 4 per word of the annotation if that is
            less, which bounds the cost of a model that does not stop.
    """
    prompt = load_prompt(mode, prompt_dir)
    response = annotation.response.strip()
    if mode == "description":
        request = _fill(prompt.request, description=response)
    else:
        request = _fill(prompt.request, question=question_of(annotation), response=response)
    messages: list[Message] = []
    for example_request, example_answer in prompt.examples:
        messages += [Message("user", example_request), Message("assistant", example_answer)]
    messages.append(Message("user", request))
    messages[0] = Message("user", f"{prompt.instruction}\n\n{messages[0].content}")
    budget = _MIN_BUDGET_TOKENS + _BUDGET_TOKENS_PER_WORD * len(response.split())
    return InjectionRequest(annotation.id, tuple(messages), prompt.label, min(max_new_tokens, budget), seed)


def as_plain_text(request: InjectionRequest) -> str:
    """Renders the conversation without a chat template: requests and labelled answers, ending with the label."""
    parts = []
    for message in request.messages:
        parts.append(message.content if message.role == "user" else f"{request.label} {message.content}")
    return "\n\n".join([*parts, request.label])


def _fill(form: str, **values: str) -> str:
    """Replaces each {name} in `form`; braces in the values are kept literally."""
    return re.sub(r"\{(\w+)\}", lambda match: values[match.group(1)], form)
