"""Requests to a judge: the filled prompt, the image if the judge sees, the decoding options."""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from bpo.config.judge import JudgeConfig
from bpo.evaluation.benchmark import Question
from bpo.evaluation.judge.prompt import JudgePrompt
from bpo.evaluation.judge.rule import Rule
from bpo.formats.images import data_url, image_bytes_digest, load_image


@dataclass(frozen=True, slots=True)
class JudgeRequest:
    """A request.

    Attributes:
        key: SHA-256 of everything that the reply depends on: name of the judge, messages, decoding, number of the run.
        name: Name of the judged answer, for messages.
        body: Gives the body; images are encoded only then.
    """

    key: str
    name: str
    body: Callable[[], dict[str, Any]]


@dataclass(frozen=True)
class RequestMaker:
    """Makes the requests of one benchmark.

    Attributes:
        image_root: Folder of the images.
    """

    options: JudgeConfig
    rule: Rule
    prompt: JudgePrompt
    image_root: Path

    def request(self, model: str, question: Question, answer: str, run: int) -> JudgeRequest:
        """The request for one answer in one run.

        Args:
            model: Name of the judged model, for messages; equal answers of two models are one request.

        Raises:
            ValueError: A field of the question's record or its image is missing.
        """
        text = self.prompt.fill(self.rule.fields(question, answer))
        image = question.image if self.options.images else ""
        digest = image_bytes_digest(self.image_root, image) if image else ""
        asked = [self.options.system_prompt, text, digest, self._decoding(), run]
        key = hashlib.sha256(json.dumps([self.options.server.model, *asked]).encode()).hexdigest()
        return JudgeRequest(key, f"{model}, question {question.id!r}", lambda: self._body(text, image))

    def _decoding(self) -> dict[str, Any]:
        limit = {"max_tokens": self.options.max_tokens} if self.options.max_tokens else {}
        return {"temperature": self.options.temperature, **limit}

    def _body(self, text: str, image: str) -> dict[str, Any]:
        content: str | list[dict[str, Any]] = text
        if image:
            url = data_url(load_image(self.image_root, image))
            content = [{"type": "image_url", "image_url": {"url": url}}, {"type": "text", "text": text}]
        system = [{"role": "system", "content": self.options.system_prompt}] if self.options.system_prompt else []
        return {"messages": [*system, {"role": "user", "content": content}], **self._decoding()}
