"""Validation of bootstrapped completions: pure functions of the annotation and the completion.

A negative that is empty, equivalent to the annotation or malformed text has no useful signal: the model would learn
from its form instead of its errors.
"""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import groupby

from bpo.bootstrap.changes import ChangeLexicon, find_changes, language_of, load_lexicon, words_of
from bpo.bootstrap.inject import Mode
from bpo.bootstrap.reply_forms import expects_yes_or_no, is_refusal, yes_or_no
from bpo.config.bootstrap import ValidateConfig

# Image placeholders of common model families, checked in addition to the special tokens of the model in use.
KNOWN_PLACEHOLDERS = (
    "<image>",
    "<video>",
    "<img>",
    "<|image|>",
    "<|image_pad|>",
    "<|video_pad|>",
    "<|vision_start|>",
    "<|vision_end|>",
    "<image_placeholder>",
)
# Reason -> description, in the order of the checks.
REASONS = {
    "empty": "there is no text",
    "unfinished": "generation ended at its budget, not by itself",
    "too-long": "longer than data.max_completion_words",
    "placeholder": "it spells an image placeholder or a control token",
    "characters": "it holds a control character or half a surrogate pair",
    "degenerate": "broken text: loops, or little but punctuation",
    "refusal": "it declines to answer, as assistants do",
    "unchanged": "it is the annotation",
    "same-content": "the annotation's words in another order, case or punctuation",
    "yes-no": "yes or no where the annotation says something else, or the other way round, or not the opposite",
    "length-ratio": "far shorter or longer than the annotation",
    "language": "in another language or script than the annotation",
    "few-changes": "fewer changed words than bootstrap.validate.min_changed_words",
    "other-text": "more of it changed than bootstrap.validate.max_changed_share",
    "no-real-change": "only its style changed: no object, attribute, count or relation",
    "omission": "it leaves out a part of the annotation and says nothing else, so nothing in it is wrong",
    "duplicate": "another negative of the group says the same",
    "no-edit": "no word of another annotation fits, is not true of the image, and is left over in a balanced exchange",
    "no-swap": "no other annotation is near, not true of the image, and left over in a balanced exchange",
    "not-selected": "another candidate, or none, balances the set better (bootstrap.select)",
    "surplus": "its source made more than its share in bootstrap.target_shares",
}
# Added to both lengths of the ratio, so that "Yes." may be paired with a sentence.
_FREE_WORDS = 8
# Words of an answer to a question that may change whatever its length.
_FREE_CHANGED_WORDS = 8
# Up to this length an answer by yes or no says nothing else.
_BARE_ANSWER_WORDS = 3

_MAX_LOOP_WORDS = 8
_MIN_WORDS_FOR_DISTINCT = 12
_UNPRINTABLE = re.compile("[\x00-\x08\x0b\x0c\x0e-\x1f\x7f-\x9f\ud800-\udfff]")
_CHARACTER_LOOP = re.compile(r"(\w{1,20}?)\1{7,}")


def count_words(text: str) -> int:
    """Number of whitespace-separated words, as in the paper's limit of 350."""
    return len(text.split())


def content_key(text: str) -> tuple[str, ...]:
    """The words in alphabetical order, without case and punctuation.

    Equal keys mean the same words in another order. A few of these are real changes ("a left of b", "b left of a");
    they are refused together with the many mere reorderings.
    """
    return tuple(sorted(_words(text)))


def has_placeholder(text: str, special_tokens: Iterable[str]) -> bool:
    """Whether the text contains a placeholder or special token, ignoring case."""
    folded = text.casefold()
    return any(token and token.casefold() in folded for token in (*KNOWN_PLACEHOLDERS, *special_tokens))


def why_degenerate(text: str, options: ValidateConfig) -> str | None:
    """Why a text is degenerate, or None: mostly punctuation, or repetitive.

    - fewer than half of the whitespace-separated pieces contain a letter or digit (", , a , a"), or
    - a phrase of up to 8 words occurs more than `max_repeats` times in a row, or
    - the share of distinct words among 12 or more is below `min_distinct_share`, or
    - a run of characters occurs 8 times in a row within a word.
    """
    pieces = text.split()
    if 2 * sum(any(c.isalnum() for c in piece) for piece in pieces) < len(pieces):
        return "little but punctuation"
    if _CHARACTER_LOOP.search(text):
        return "characters in a loop"
    words = _words(text)
    for size in range(1, _MAX_LOOP_WORDS + 1):
        if (repeats := _most_repeats(words, size)) > options.max_repeats:
            return f"a phrase of {size} words {repeats} times in a row; at most {options.max_repeats}"
    distinct = len(set(words)) / max(len(words), 1)
    if len(words) >= _MIN_WORDS_FOR_DISTINCT and distinct < options.min_distinct_share:
        return f"{distinct:.2f} of the words differ; at least {options.min_distinct_share:g} must"
    return None


@dataclass(frozen=True, slots=True)
class Refusal:
    """Why a completion is refused: one of `REASONS`, and what was found in the completion."""

    reason: str
    detail: str


def refusal(
    response: str,
    annotation: str,
    *,
    max_words: int,
    special_tokens: Iterable[str] = (),
    finished: bool = True,
    options: ValidateConfig | None = None,
    question: str = "",
    rewriting: Mode | None = None,
    compared: bool = True,
) -> Refusal | None:
    """The reason to refuse a negative, the first of `REASONS` that applies, or None.

    Args:
        response: The bootstrapped completion.
        annotation: The dataset's answer to the same prompt.
        max_words: Longest completion in words.
        special_tokens: Control tokens of the model in use, as text.
        finished: False if generation was cut off before the end of the text.
        options: Thresholds; None means the defaults.
        question: Text of the turn that the annotation answers.
        rewriting: For a rewriting of the annotation, what it is a rewriting of. It must differ by an error rather than
            by an omission. `max_changed_share` applies to descriptions, and to other answers if more than 8 words
            change. The error of an answer by yes or no is the opposite, in any words.
        compared: False for candidates of a judge, which may be as good as the annotation, or equal to it: only texts
            that are of no use to anything are refused.
    """
    text, options = response.strip(), options or ValidateConfig()
    if not text:
        return Refusal("empty", REASONS["empty"])
    if not finished:
        return Refusal("unfinished", REASONS["unfinished"])
    if (num_words := count_words(text)) > max_words:
        return Refusal("too-long", f"{num_words} words; data.max_completion_words is {max_words}")
    if has_placeholder(text, special_tokens):
        return Refusal("placeholder", REASONS["placeholder"])
    if odd := _UNPRINTABLE.search(text):
        return Refusal("characters", f"{odd.group()!r} at {odd.start()}")
    # An annotation may itself be a table or a line of digits; then the negative may be one too.
    if (broken := why_degenerate(text, options)) and not why_degenerate(annotation, options):
        return Refusal("degenerate", broken)
    if not compared:
        return None
    if options.same_form and is_refusal(text) and not is_refusal(annotation):
        return Refusal("refusal", REASONS["refusal"])
    if text == annotation.strip():
        return Refusal("unchanged", REASONS["unchanged"])
    if content_key(text) == content_key(annotation):
        return Refusal("same-content", REASONS["same-content"])
    if options.same_form and (fault := _yes_no_fault(text, annotation, question, rewriting, options)):
        return Refusal("yes-no", fault)
    return _compared(text, annotation, question, rewriting, options)


def _yes_no_fault(
    text: str, annotation: str, question: str, rewriting: Mode | None, options: ValidateConfig
) -> str | None:
    """What is wrong with a reply to a question that the annotation answers by yes or no, or with such a reply."""
    ours, theirs = yes_or_no(text), yes_or_no(annotation)
    if theirs is None:
        is_asked = rewriting != "description" and expects_yes_or_no(question) is not False
        return "the request is not answered by yes or no" if ours and not is_asked else None
    if rewriting is None:
        return None
    if ours is None:
        return "the annotation answers by yes or no, and so must an error"
    lexicon = load_lexicon(options.lexicon)
    explained = find_changes(theirs[1], ours[1], lexicon)
    if ours[0] == theirs[0]:
        is_bare = count_words(annotation) <= _BARE_ANSWER_WORDS or not explained.new - _negations(
            explained.new, lexicon
        )
        return "the error is the opposite of the annotation's answer" if is_bare else None
    says_more = any(character.isalnum() for character in ours[1])
    if says_more and not explained.new and not _negations(explained.gone, lexicon):
        return "the opposite answer, but its explanation is still the annotation's"
    return None


def _compared(
    text: str, annotation: str, question: str, rewriting: Mode | None, options: ValidateConfig
) -> Refusal | None:
    """Checks of the distance between a completion and its annotation."""
    ratio = (count_words(text) + _FREE_WORDS) / (count_words(annotation) + _FREE_WORDS)
    if not options.min_length_ratio <= ratio <= options.max_length_ratio:
        bounds = f"{options.min_length_ratio:g}..{options.max_length_ratio:g}"
        return Refusal("length-ratio", f"{ratio:.2f} of the annotation's length ({bounds}, {_FREE_WORDS} words free)")
    if options.same_language:
        for ours, theirs in zip(language_of(text), language_of(annotation), strict=True):
            if ours is not None and theirs is not None and ours != theirs:
                return Refusal("language", f"{ours}; the annotation is {theirs}")
    lexicon = load_lexicon(options.lexicon)
    changes = find_changes(annotation, text, lexicon)
    if changes.distance < options.min_changed_words:
        return Refusal("few-changes", f"{changes.distance} words changed; at least {options.min_changed_words} must")
    is_free = rewriting == "qa" and (changes.distance <= _FREE_CHANGED_WORDS or yes_or_no(annotation) is not None)
    if rewriting and not is_free and changes.share > options.max_changed_share:
        return Refusal("other-text", f"{changes.share:.2f} of it changed; at most {options.max_changed_share:g} may")
    if not options.require_real_change:
        return None
    difference = f"added: {' '.join(changes.added) or '-'}; dropped: {' '.join(changes.dropped) or '-'}"
    new, gone = _stems(changes.new), _stems(changes.gone)
    # "The man holds an umbrella" for "An umbrella" to "What does the man hold?".
    echoes = _stems(words_of(question)) if options.same_form and " or " not in question else set()
    if gone <= new and new <= gone | echoes:
        return Refusal("no-real-change", difference)
    lost = {word: lexicon.kind(word) for word in changes.gone if not _stems([word]) & new}
    # Without "not", or with "a woman" for "two women", a shorter text is wrong.
    if rewriting and new <= gone | echoes and "polarity" not in lost.values() and set(lost.values()) != {"count"}:
        return Refusal("omission", difference)
    return None


def _negations(words: Iterable[str], lexicon: ChangeLexicon) -> set[str]:
    return {word for word in words if lexicon.kind(word) == "polarity"}


def _stems(words: Iterable[str]) -> set[str]:
    """The words without common English endings: `holding`, `holds` and `hold` are equal."""
    return {re.sub(r"(?<=\w{2})(?:ing|ed|es|s|e)$", "", word) for word in words}


def annotation_refusal(response: str, *, max_words: int) -> str | None:
    """The reason to skip a whole record because of its annotation, or None."""
    if not response.strip():
        return "empty"
    return "too-long" if count_words(response) > max_words else None


def _words(text: str) -> list[str]:
    """Case-folded runs of letters and digits; if there are none, the whitespace-separated pieces."""
    return re.findall(r"\d+(?:[.,]\d+)*|[^\W_]+(?:['’][^\W_]+)*", text.casefold()) or text.casefold().split()


def _most_repeats(words: list[str], size: int) -> int:
    """The most times in a row that a phrase of `size` words occurs; 1 if none is repeated.

    A phrase repeated k times has words[i] == words[i + size] at (k - 1) * size consecutive positions.
    """
    equal = (a == b for a, b in zip(words, words[size:], strict=False))
    longest = max((sum(1 for _ in run) for same, run in groupby(equal) if same), default=0)
    return longest // size + 1
