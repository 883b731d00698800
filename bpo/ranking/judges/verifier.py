"""Labels each sentence of an answer by what is known of the image, in the schema of FineSumFact (arXiv 2412.10689)."""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from bpo.bootstrap.whole_set.sentences import sentence_spans
from bpo.config.evaluation import EvaluationConfig
from bpo.config.options import check, needed
from bpo.config.training import Config
from bpo.evaluation.benchmarks.verifier import Verdict
from bpo.evaluation.files import read_coco, read_synonyms
from bpo.formats.lexicon import ObjectLexicon
from bpo.job.chat_server import Reply
from bpo.job.durable import file_digest
from bpo.job.launch import Ranks
from bpo.ranking.judge import Failed, Judge, Scored, register_judge
from bpo.ranking.judges.models import LanguageModel, LanguageOptions, ReplyError, text_of
from bpo.ranking.options import judge_options
from bpo.ranking.sentences import CATEGORIES, ENTITY, NO_ERROR, question_of
from bpo.records import PreferenceGroup

_LINE = re.compile(r"(\d+)\s*[.:)]\s*([a-z -]+?)\.?")


@dataclass(kw_only=True)
class VerifierJudgeOptions(LanguageOptions):
    """Options of the judge `verifier`.

    Attributes:
        by: What labels sentences: a language model, on `server` or (`model`) that of `llm`; or `objects`, without a
            model: a sentence is hallucinated if it names an object (evaluation.synonyms) that the evidence does not.
        evidence: What is known of the image: the `annotation` (the completion of type gt), its `objects` by
            evaluation.chair_instances and chair_captions, or a field of the groups by name: text or a list of texts.
        score: Minus the `count` of hallucinated sentences, or minus their `rate` among all.
    """

    by: Literal["server", "model", "objects"] = "model"
    evidence: str = needed("annotation")
    score: Literal["count", "rate"] = "count"


@register_judge("verifier")
class VerifierJudge(Judge):
    """Details of a completion: `sentences`, a list of {"sentence", "label" (true: hallucinated), "category"}.

    Sentences occur verbatim in the answer.
    """

    def __init__(self, config: Config, ranks: Ranks):
        options = self.options = judge_options(VerifierJudgeOptions, config)
        self._model: LanguageModel | None = None
        if options.by != "objects":
            self._model = LanguageModel(options, ranks, options.by, "verifier", ("sentences", "evidence", "question"))
        self._lexicon: ObjectLexicon | None = None
        self._present: dict[str, frozenset[str]] = {}
        self._files: list[Path] = []
        if options.evidence == "objects" or options.by == "objects":
            self._read_objects(config.evaluation)

    def _read_objects(self, given: EvaluationConfig) -> None:
        """Reads the lexicon, and the objects of each image if they are the evidence."""
        if self.options.evidence != "objects" and given.synonyms:
            self._files = [Path(given.synonyms)]
            self._lexicon = read_synonyms(self._files[0])
            return
        check(bool(given.chair_instances), "evaluation.chair_instances is empty; set the objects of the images")
        paths = [Path(f) if f else None for f in (given.chair_instances, given.chair_captions, given.synonyms)]
        self._files = [path for path in paths if path is not None]
        coco = read_coco(self._files[0], *paths[1:])
        self._lexicon = coco.lexicon
        self._present = {name: coco.present_of_image[image_id] for image_id, name in coco.file_of_image.items()}

    def identity(self) -> dict[str, Any]:
        known = {name: getattr(self.options, name) for name in ("by", "evidence", "score")}
        known |= {"objects (SHA-256)": [file_digest(file) for file in self._files]}
        return known | (self._model.identity() if self._model else {})

    def judge(self, name: str, groups: Sequence[PreferenceGroup]) -> Iterator[tuple[int, Scored | Failed]]:
        evidence = [self._evidence(group) for group in groups]
        sentences = [[_sentences(answer.response) for answer in group.completions] for group in groups]
        asked = [
            (group.id, {"sentences": _numbered(listed), "evidence": known, "question": question_of(group)})
            for group, known, answers in zip(groups, evidence, sentences, strict=True)
            for listed in answers
            if known is not None and listed
        ]
        replies = iter(self._model.ask(asked) if self._model else ())
        for index, (known, answers) in enumerate(zip(evidence, sentences, strict=True)):
            if known is None:
                yield index, Failed(f"no evidence: {self.options.evidence} of {', '.join(groups[index].images)}")
                continue
            own = [next(replies, None) if listed else None for listed in answers]
            try:
                found = [self._verdicts(known, listed, reply) for listed, reply in zip(answers, own, strict=True)]
                result: Scored | Failed = self._scored(found)
            except ReplyError as error:
                result = Failed(str(error))
            yield index, result

    def _evidence(self, group: PreferenceGroup) -> str | None:
        """What is known of the group's images, or None."""
        if self.options.evidence == "annotation":
            return next((answer.response for answer in group.completions if answer.type == "gt"), None)
        if self.options.evidence == "objects":
            known = [self._present.get(image, self._present.get(Path(image).name)) for image in group.images]
            present = {name for objects in known if objects is not None for name in objects}
            return None if None in known or not known else ", ".join(sorted(present))
        value = group.extra.get(self.options.evidence)
        if isinstance(value, list):
            return ", ".join(map(str, value))
        return value if isinstance(value, str) else None

    def _verdicts(self, evidence: str, sentences: Sequence[str], reply: Reply | None) -> list[Verdict]:
        if self._model is not None:
            return read_verdicts(text_of(reply), sentences) if reply is not None else []
        assert self._lexicon is not None, "read for by: objects"
        present = {mention.object for mention in self._lexicon.mentions(evidence)}
        wrong = [any(m.object not in present for m in self._lexicon.mentions(sentence)) for sentence in sentences]
        return [Verdict(text, bad, ENTITY if bad else NO_ERROR) for text, bad in zip(sentences, wrong, strict=True)]

    def _scored(self, answers: Sequence[Sequence[Verdict]]) -> Scored:
        scores, details = [], []
        for verdicts in answers:
            count = sum(verdict.hallucinated for verdict in verdicts)
            scores.append(-count / (max(len(verdicts), 1) if self.options.score == "rate" else 1))
            listed = [{"sentence": v.sentence, "label": v.hallucinated, "category": v.category} for v in verdicts]
            details.append({"sentences": listed})
        return Scored(tuple(scores), tuple(details))


def read_verdicts(reply: str, sentences: Sequence[str]) -> list[Verdict]:
    """The verdicts of a reply with a line `NUMBER: CATEGORY` per sentence, in order.

    Raises:
        ReplyError: The reply has another form, or a category is unknown.
    """
    lines = [_LINE.fullmatch(line.strip().lower()) for line in reply.splitlines() if line.strip()]
    found = [(int(line[1]), line[2]) for line in lines if line is not None and line[2] in CATEGORIES]
    if [number for number, _ in found] != list(range(1, len(sentences) + 1)) or len(lines) > len(found):
        raise ReplyError(f"reply has not one category per sentence: {reply[:200]!r}")
    return [Verdict(text, name != NO_ERROR, name) for text, (_, name) in zip(sentences, found, strict=True)]


def _sentences(answer: str) -> list[str]:
    return [answer[start:end] for start, end in sentence_spans(answer)]


def _numbered(sentences: Sequence[str]) -> str:
    return "\n".join(f"{number}. {sentence}" for number, sentence in enumerate(sentences, 1))
