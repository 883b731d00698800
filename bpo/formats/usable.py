"""Which groups are trained on: the rules that need no model, for training and `bpo check` alike."""

from __future__ import annotations

from collections.abc import Hashable, Iterable, Sequence
from typing import TypeVar

from bpo.records import Completion, PreferenceGroup

Answer = TypeVar("Answer", bound=Hashable)
# (reason, detail) of a group that is not trained on.
NO_PAIR = ("no-pair", "no two completions differ in both tokens and score")


def keep_types(group: PreferenceGroup, types: Sequence[str]) -> PreferenceGroup:
    """Keeps the top-scored completions of a group and those of the given types; empty `types` keeps all."""
    if not types:
        return group
    top = max(completion.score for completion in group.completions)
    kept: tuple[Completion, ...] = tuple(c for c in group.completions if c.score == top or c.type in types)
    return PreferenceGroup(group.id, group.images, group.prompt, kept)


def refusal(group: PreferenceGroup, *, max_words: int, keep_text_only: bool) -> tuple[str, str] | None:
    """Returns (reason, detail) if the group is not trained on, whatever the model.

    Args:
        max_words: `data.max_completion_words`.
        keep_text_only: Whether `data.text_only` is `keep`.
    """
    if not group.images and not keep_text_only:
        return "no-image", "the group has no image to judge its answers by; set data.text_only=keep to train on it"
    longest = max(len(completion.response.split()) for completion in group.completions)
    if longest > max_words:
        return "too-many-words", f"a completion of {longest} words is above data.max_completion_words={max_words}"
    return None


def distinct_answers(scored: Iterable[tuple[Answer, float]]) -> dict[Answer, float] | None:
    """Merges equal answers (texts or token ids), keeping the higher score.

    Returns:
        Answer -> score, or None if no two answers differ in score (`NO_PAIR`).
    """
    best: dict[Answer, float] = {}
    for answer, score in scored:
        best[answer] = max(score, best.get(answer, score))
    return best if len(set(best.values())) >= 2 else None
