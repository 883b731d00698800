"""Asks a language model on a server to rate each answer, with the user's prompt; the reply has the score."""

from __future__ import annotations

import hashlib
import re
from collections import defaultdict
from collections.abc import Iterator, Sequence
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from bpo.config.options import Section, check, number
from bpo.config.server import ServerConfig
from bpo.config.training import Config
from bpo.evaluation.judge.prompt import JudgePrompt
from bpo.formats.images import ImageError, data_url, load_image
from bpo.job.chat_server import ChatServer, Reply
from bpo.job.launch import Ranks
from bpo.ranking.judge import Failed, Judge, Scored, dialogue_of, register_judge
from bpo.ranking.options import judge_options
from bpo.records import PreferenceGroup

_NUMBER = r"-?\d+(?:\.\d+)?"


@dataclass(kw_only=True)
class ServerJudgeOptions(Section):
    """Options of the judge `server`.

    Attributes:
        server: Server of the judge.
        prompt: Text file with its prompt; {question}, {answer} and {reference} are replaced.
        reference: Type of the completion that is the {reference}.
        image: Send the images with each request, for judges that see.
        pattern: Regular expression for the score in a reply: its first group, or the whole match; empty takes the last
            number.
        min: Smallest valid score.
        max: Largest valid score.
        temperature: Sampling temperature; 0 is greedy.
        max_tokens: Maximum number of tokens per reply.
    """

    where = "rank.options"

    server: ServerConfig = field(default_factory=ServerConfig)
    prompt: str = ""
    reference: str = "gt"
    image: bool = True
    pattern: str = ""
    min: float = 0.0
    max: float = 10.0
    temperature: float = number(0.0, at_least=0, zero="greedy")
    max_tokens: int = number(1024, at_least=1)

    def __post_init__(self) -> None:
        super().__post_init__()
        check(bool(self.server.url and self.prompt), "the judge `server` needs rank.options.server.url and prompt")
        check(self.min < self.max, f"rank.options.min is {self.min:g}; it must be below max {self.max:g}")
        try:
            re.compile(self.pattern)
        except re.error as error:
            raise ValueError(f"rank.options.pattern is {self.pattern!r}: {error}") from error


@register_judge("server")
class ServerJudge(Judge):
    """Sends one request per completion. Details of a completion: the `reply`, and the `model` that the server names."""

    def __init__(self, config: Config, ranks: Ranks):
        self.options = judge_options(ServerJudgeOptions, config)
        known = ("question", "answer", "reference")
        self._prompt = JudgePrompt.read(Path(self.options.prompt), known, option="rank.options.prompt")
        self._server = ChatServer(self.options.server)
        self._image_root = Path(config.data.image_root or ".")

    def identity(self) -> dict[str, Any]:
        options = {name: value for name, value in asdict(self.options).items() if name not in ("server", "prompt")}
        prompt = hashlib.sha256(self._prompt.template.encode()).hexdigest()
        return {"model": self.options.server.model, "prompt (SHA-256)": prompt, **options}

    def judge(self, name: str, groups: Sequence[PreferenceGroup]) -> Iterator[tuple[int, Scored | Failed]]:
        bodies: list[tuple[str, dict[str, Any]]] = []
        places: list[tuple[int, int]] = []
        rated: dict[int, dict[int, tuple[float, dict[str, Any]] | Failed]] = defaultdict(dict)
        for index, group in enumerate(groups):
            try:
                bodies += [(group.id, body) for body in self._bodies(group)]
            except ImageError as error:
                yield index, Failed(f"unusable image: {error}")
                continue
            except KeyError:
                yield index, Failed(f"no completion of type {self.options.reference} for the prompt's {{reference}}")
                continue
            places += [(index, place) for place in range(len(group.completions))]
        for number_, reply in self._server.replies(bodies):
            index, place = places[number_]
            rated[index][place] = self._rated(reply)
            if len(rated[index]) == len(groups[index].completions):
                answers = [answer for _, answer in sorted(rated[index].items())]
                failed = next((answer for answer in answers if isinstance(answer, Failed)), None)
                yield index, failed or Scored(*zip(*answers, strict=True))

    def _bodies(self, group: PreferenceGroup) -> list[dict[str, Any]]:
        """The request for each completion.

        Raises:
            ImageError: An image cannot be read.
            KeyError: The prompt has {reference}, and the group has no completion of that type.
        """
        urls = [data_url(load_image(self._image_root, image)) for image in group.images if self.options.image]
        pictures = [{"type": "image_url", "image_url": {"url": url}} for url in urls]
        turns, answers = dialogue_of(group)
        fields = {"question": "\n".join(turn.text for turn in turns)}
        kinds = [completion.type for completion in group.completions]
        if self.options.reference in kinds:
            fields["reference"] = answers[kinds.index(self.options.reference)]
        sampling = {"temperature": self.options.temperature, "max_tokens": self.options.max_tokens}
        texts = [self._prompt.fill({**fields, "answer": answer}) for answer in answers]
        # Servers of text-only models may take no list.
        contents = [[*pictures, {"type": "text", "text": text}] if pictures else text for text in texts]
        return [{"messages": [{"role": "user", "content": content}], **sampling} for content in contents]

    def _rated(self, reply: Reply) -> tuple[float, dict[str, Any]] | Failed:
        if reply.error:
            return Failed(f"no reply: {reply.error}")
        matches = list(re.finditer(self.options.pattern or _NUMBER, reply.text))
        try:
            match = matches[0 if self.options.pattern else -1]
            score = float(match.group(1 if match.re.groups else 0))
        except (LookupError, ValueError, TypeError):
            return Failed(f"no score: {reply.text[-200:]!r}")
        if not self.options.min <= score <= self.options.max:
            return Failed(f"a score outside [{self.options.min:g}, {self.options.max:g}]: {reply.text[-200:]!r}")
        return score, {"reply": reply.text, "model": reply.model}
