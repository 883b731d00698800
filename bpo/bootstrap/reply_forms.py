"""Forms of questions and replies: requests for a description, answers by yes or no, refusals to answer.

A reply in another form than the annotation's is told apart by its form alone, whatever it says about the image.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from functools import cache
from importlib.resources import files

import yaml

# Requests for a description: by verb or noun ("Describe ...", "Can you give a caption") or by an open question.
_ASKS_FOR_DESCRIPTION = re.compile(
    r"""\b(?:describ\w*|descriptions?|caption\w*|depict\w*|portray\w*|narrat\w*|summar\w*|elaborat\w*)\b
    |\bwhat\s+(?:do|can)\s+you\s+(?:see|notice|observe)\b
    |\bwhat\s+is\s+(?:this|happening|going\s+on|in\s+(?:the|this)\s+(?:image|picture|photo\w*|scene))\s*\??\s*$
    |\bwhat(?:'s|’s)\s+(?:happening|going\s+on|in\s+(?:the|this)\s+(?:image|picture|photo\w*|scene))
    |\b(?:tell\s+me\s+about|explain)\s+(?:the|this)\s+(?:image|picture|photo\w*|scene|visual)""",
    re.IGNORECASE | re.VERBOSE,
)
_OPEN_QUESTION = re.compile(
    r"""\b(?:what|which|who|whom|whose|where|when|why|how)\b
    |^\W*(?:can|could|will|would|do)\s+you\s+(?:please\s+)?(?:tell|list|name|count|give|identify|read|say|provide)\b
    |\w\s+or\s+(?!no\b|not\b)\w""",
    re.IGNORECASE | re.VERBOSE,
)
_YES_NO_QUESTION = re.compile(
    r"(?:^|[,.:;!?\n]\s*)(?:is|are|was|were|am|do|does|did|can|could|has|have|had|will|would|should|may|might)(?:n['’]t)?\s"
    r"[^?]*\?",
    re.IGNORECASE,
)
# The first word counts as an answer of its own if a mark, the end or a pronoun follows: "No, ...", not "No people ...".
_AFTER_ANSWER = r"(?=\s*(?:[,.;:!?…，。；：！？、]|$)|\s+[-–—]\s|\s+(?:there|it|he|she|they|you|we|i)\b)"
_SENTENCE_END = re.compile(r"(?<=[.!?])\s+|[。！？\n]+")
_OPENER = re.compile(r"^[\W_]*(?:(?:unfortunately|however|well|hello|hi|oh|but|and|leider|malheureusement)\b[,!. ]*)*")
_REFUSAL_SENTENCES = 2


@dataclass(frozen=True)
class _Forms:
    refusal: re.Pattern[str]
    answer: re.Pattern[str]
    yes: frozenset[str]


@cache
def _forms() -> _Forms:
    path = files("bpo.bootstrap").joinpath("lexicon").joinpath("reply_forms.yaml")
    tree = yaml.safe_load(path.read_text(encoding="utf-8"))
    refusals = [pattern for patterns in tree["refusals"].values() for pattern in patterns]
    words = sorted([*tree["yes"], *tree["no"]], key=len, reverse=True)
    answer = rf"^[\W_]*({'|'.join(map(re.escape, words))}){_AFTER_ANSWER}"
    return _Forms(re.compile("|".join(f"(?:{p})" for p in refusals)), re.compile(answer), frozenset(tree["yes"]))


def asks_for_description(question: str) -> bool:
    """Whether a prompt asks for a description of the image (English)."""
    return bool(_ASKS_FOR_DESCRIPTION.search(question))


def is_refusal(text: str) -> bool:
    """Whether one of the first two sentences declines to answer ("I'm sorry, but I can't ...", "As an AI ...")."""
    sentences = _SENTENCE_END.split(text.strip().casefold().replace("’", "'"), maxsplit=_REFUSAL_SENTENCES)
    return any(_forms().refusal.match(_OPENER.sub("", s, count=1)) for s in sentences[:_REFUSAL_SENTENCES])


def yes_or_no(text: str) -> tuple[bool, str] | None:
    """Whether a reply begins by saying yes (True) or no, and the text after that word; None if it says neither."""
    folded = text.strip().casefold()
    match = _forms().answer.match(folded)
    return (match.group(1) in _forms().yes, folded[match.end() :]) if match else None


def expects_yes_or_no(question: str) -> bool | None:
    """Whether a question is answered by yes or no; None if that cannot be told, as in other languages than English."""
    if re.search(r"\byes or no\b", question, re.IGNORECASE):
        return True
    if asks_for_description(question) or _OPEN_QUESTION.search(question):
        return False
    return True if _YES_NO_QUESTION.search(question) else None
