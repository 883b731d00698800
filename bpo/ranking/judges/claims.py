"""Splits answers into claims and asks a multimodal model about each (RLAIF-V, arXiv 2405.17220)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

from bpo.bootstrap.whole_set.sentences import sentence_spans
from bpo.config.options import check, number
from bpo.config.server import ServerConfig
from bpo.config.training import Config
from bpo.data.encode import EncodingError
from bpo.evaluation.files import read_synonyms
from bpo.formats.lexicon import ObjectLexicon
from bpo.formats.problems import RecordError
from bpo.job.chat_server import Reply
from bpo.job.durable import file_digest
from bpo.job.launch import Ranks
from bpo.ranking.judge import Failed, Judge, Scored, dialogue_of, register_judge
from bpo.ranking.judges.models import LanguageModel, LanguageOptions, QuestionModel, QuestionServer, ReplyError, text_of
from bpo.ranking.options import judge_options
from bpo.ranking.sentences import question_of
from bpo.records import PreferenceGroup

_PICTURE = r"(?:image|photo|photograph|picture)"
# Words before the first thing that a description names.
_OPENING = re.compile(
    rf"(?:(?:in|on) (?:the|this) {_PICTURE}\s*,?\s*)?"
    rf"(?:(?:this is |it is )?(?:a|an|the|this) {_PICTURE} (?:of|with|shows|showing|depicts|features|contains)\s+"
    r"|(?:we can see|there is|there are)\s+)?",
    re.IGNORECASE,
)
# Joins claims only before a determiner: "black and white" is one, "a rock and a leaf" are two.
_JOINT = re.compile(
    r"(?:\s*[,;]\s*(?:(?:and|or|but|while|with)\s+)?|\s+(?:and|but|while|with)\s+)"
    r"(?=(?:an?|the|one|two|three|four|five|six|several|some|many|few|another|his|her|its|their|there|\d+)\b)",
    re.IGNORECASE,
)
_ITEM = re.compile(r"(?:[-*•]|\d+[.)])\s+(.*)")


@dataclass(kw_only=True)
class ClaimsOptions(LanguageOptions):
    """Options of the judge `claims`; `llm`, `server` and `prompt` are those of the language model that splits.

    Attributes:
        split: How answers are split: `rules`, for English; `objects`, those that they name, by evaluation.synonyms; or
            by a language model: `server`, or `model` for `llm`.
        ask: What answers the questions: `model` in this process, or `server` for `ask_server`.
        model: Multimodal model to ask; empty uses model.path.
        ask_server: OpenAI-compatible server of a multimodal model.
        question: Text of a question; {claim} is replaced.
        answers: The model's words for yes and no.
        min_claims: Each claim that an answer has less than this counts as a rejected one, so that silence does not pay.
    """

    split: Literal["rules", "objects", "server", "model"] = "rules"
    ask: Literal["model", "server"] = "model"
    model: str = ""
    ask_server: ServerConfig = field(default_factory=ServerConfig)
    question: str = "Does the image show this: {claim}? Answer yes or no."
    answers: list[str] = field(default_factory=lambda: ["Yes", "No"])
    min_claims: int = number(0, at_least=0)

    def __post_init__(self) -> None:
        super().__post_init__()
        check("{claim}" in self.question, f"rank.options.question is {self.question!r}; it must contain {{claim}}")
        check(len(self.answers) == 2, f"rank.options.answers is {self.answers}; give the words for yes and no")
        check(self.ask == "model" or bool(self.ask_server.url), "rank.options.ask_server.url is empty; set the server")


@register_judge("claims")
class ClaimsJudge(Judge):
    """score(y) = -(number of claims with p_yes <= p_no); equal claims of a group are asked once.

    Details of a completion: `rejected`, and `claims`, a list of {"claim", "p_yes", "accepted"}.
    """

    def __init__(self, config: Config, ranks: Ranks):
        options = self.options = judge_options(ClaimsOptions, config)
        self._splitter: LanguageModel | None = None
        self._lexicon: ObjectLexicon | None = None
        self._synonyms = Path(config.evaluation.synonyms)
        if options.split in ("server", "model"):
            self._splitter = LanguageModel(options, ranks, options.split, "claims", ("answer", "question"))
        elif options.split == "objects":
            check(bool(config.evaluation.synonyms), "evaluation.synonyms is empty; set the names of the objects")
            self._lexicon = read_synonyms(self._synonyms)
        self._asked: QuestionModel | QuestionServer
        if options.ask == "server":
            self._asked = QuestionServer(config, options.ask_server, options.answers)
        else:
            path = options.model or config.model.path
            self._asked = QuestionModel(config, ranks, path, options.answers, options.batch_size)

    def identity(self) -> dict[str, Any]:
        names = ("split", "ask", "question", "answers", "min_claims")
        splitter = self._splitter.identity() if self._splitter else {}
        synonyms = {"synonyms (SHA-256)": file_digest(self._synonyms)} if self._lexicon else {}
        return {name: getattr(self.options, name) for name in names} | splitter | synonyms | self._asked.identity()

    def judge(self, name: str, groups: Sequence[PreferenceGroup]) -> Iterator[tuple[int, Scored | Failed]]:
        replies: Iterator[Reply] = iter(())
        if self._splitter is not None:
            asked = [(group.id, question_of(group), answer) for group in groups for answer in dialogue_of(group)[1]]
            replies = iter(self._splitter.ask([(id, {"question": q, "answer": answer}) for id, q, answer in asked]))
        for index, group in enumerate(groups):
            own = list(islice(replies, len(group.completions)))
            try:
                result: Scored | Failed = self._scored(group, self._claims(group, own))
            except (RecordError, EncodingError, ReplyError) as error:
                result = Failed(str(error))
            yield index, result

    def _claims(self, group: PreferenceGroup, replies: Sequence[Reply]) -> list[tuple[str, ...]]:
        """The claims of each completion."""
        if not group.images:
            raise EncodingError(f"record {group.id!r}: there is no image to ask about")
        if self._splitter is not None:
            return [read_claims(text_of(reply)) for reply in replies]
        _, texts = dialogue_of(group)
        if self._lexicon is not None:
            return [split_by_objects(text, self._lexicon) for text in texts]
        return [split_by_rules(text) for text in texts]

    def _scored(self, group: PreferenceGroup, claims: Sequence[Sequence[str]]) -> Scored:
        distinct = list(dict.fromkeys(claim for of_answer in claims for claim in of_answer))
        p_yes = self._asked.yes(group, [self.options.question.replace("{claim}", claim) for claim in distinct])
        found = [{"claim": c, "p_yes": p, "accepted": p > 0.5} for c, p in zip(distinct, p_yes, strict=True)]
        verdict = dict(zip(distinct, found, strict=True))
        scores, details = [], []
        for of_answer in claims:
            rejected = sum(not verdict[claim]["accepted"] for claim in of_answer)
            scores.append(float(-rejected - max(0, self.options.min_claims - len(of_answer))))
            details.append({"rejected": rejected, "claims": [verdict[claim] for claim in of_answer]})
        return Scored(tuple(scores), tuple(details))


def split_by_rules(answer: str) -> tuple[str, ...]:
    """Each distinct claim of an English answer once, in order.

    Sentences are split at commas, semicolons, `and`, `but`, `while` and `with` before a determiner; words such as
    "a photo of" at the start of a sentence are left out. Other lists, such as "cups, plates and forks", stay one claim.
    """
    claims: dict[str, str] = {}
    for start, end in sentence_spans(answer):
        sentence = answer[start:end].strip(" \n.!?;,")
        for claim in _JOINT.split(_OPENING.sub("", sentence, count=1)):
            claims.setdefault(claim.casefold(), claim)
    return tuple(claim for claim in claims.values() if claim)


def split_by_objects(answer: str, lexicon: ObjectLexicon) -> tuple[str, ...]:
    """Each object that the answer names once, in order: its canonical name with an article, such as "a rock"."""
    names = dict.fromkeys(mention.object for mention in lexicon.mentions(answer))
    return tuple(f"{'an' if name[0] in 'aeiou' else 'a'} {name}" for name in names)


def read_claims(reply: str) -> tuple[str, ...]:
    """The claims of a language model's reply: one per line with a bullet or a number, or the word NONE.

    Raises:
        ReplyError: The reply has another form.
    """
    lines = [line.strip() for line in reply.splitlines() if line.strip()]
    if [line.strip(".").upper() for line in lines] == ["NONE"]:
        return ()
    items = [item[1].strip() for line in lines if (item := _ITEM.fullmatch(line))]
    if not lines or len(items) < len(lines):
        raise ReplyError(f"reply is no list of claims: {reply[:80]!r}")
    return tuple(dict.fromkeys(items))
