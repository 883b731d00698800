"""Which groups are trained on: the rules that need no model, for training and `bpo check` alike."""

from __future__ import annotations

from collections.abc import Callable, Hashable, Iterable, Sequence
from dataclasses import replace
from typing import TypeVar

from bpo.records import Completion, PreferenceGroup

Answer = TypeVar("Answer", bound=Hashable)
# (reason, detail) of a group that is not trained on.
NO_PAIR = ("no-pair", "no two completions differ in both tokens and score")


def keep_types(group: PreferenceGroup, types: Sequence[str]) -> PreferenceGroup:
    """Keeps the completions with a weight that are top-scored or of the given types; empty `types` keeps all types."""
    weighted = tuple(completion for completion in group.completions if completion.weight)
    if not types:
        return group if len(weighted) == len(group.completions) else replace(group, completions=weighted)
    top = max((completion.score for completion in weighted), default=0.0)
    kept: tuple[Completion, ...] = tuple(c for c in weighted if c.score == top or c.type in types)
    return PreferenceGroup(group.id, group.images, group.prompt, kept)


def refusal(group: PreferenceGroup, *, max_words: int, keep_text_only: bool) -> tuple[str, str] | None:
    """Returns (reason, detail) if the group is not trained on, whatever the model.

    Args:
        max_words: `data.max_completion_words`.
        keep_text_only: Whether `data.text_only` is `keep`.
    """
    if not group.images and not keep_text_only:
        return "no-image", "the group has no image to judge its answers by; set data.text_only=keep to train on it"
    longest = max((len(completion.response.split()) for completion in group.completions), default=0)
    if longest > max_words:
        return "too-many-words", f"a completion of {longest} words is above data.max_completion_words={max_words}"
    return None


def distinct_answers(
    completions: Iterable[Completion], answer_of: Callable[[Completion], Answer]
) -> dict[Answer, tuple[float, float]] | None:
    """Merges completions with equal answers (texts or token ids), keeping the higher score, then the higher weight.

    Returns:
        Answer -> (score, weight), or None if no two answers differ in score (`NO_PAIR`).
    """
    best: dict[Answer, tuple[float, float]] = {}
    for completion in completions:
        answer, value = answer_of(completion), (completion.score, completion.weight)
        best[answer] = max(value, best.get(answer, value))
    return best if len({score for score, _ in best.values()}) >= 2 else None
