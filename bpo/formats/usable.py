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
    """Keeps the completions with a weight that are of the given types, or top-scored among those of the same images.

    Empty `types` keeps all types.
    """
    weighted = tuple(completion for completion in group.completions if completion.weight)
    if not types:
        return group if len(weighted) == len(group.completions) else replace(group, completions=weighted)
    top = {view: max(c.score for c in weighted if c.view == view) for view in {c.view for c in weighted}}
    return replace(group, completions=tuple(c for c in weighted if c.score == top[c.view] or c.type in types))


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
) -> list[tuple[Answer, Completion]] | None:
    """Merges completions with equal answers (texts or token ids): the one with the higher score, then weight, is kept.

    Those of the group's images and of its other images are not merged with each other.

    Returns:
        The distinct answers with their completions, in order of their first occurrence, or None if no two answers that
        describe the group's images differ in score (`NO_PAIR`).
    """
    best: dict[tuple[str, Answer], Completion] = {}
    for completion in completions:
        key = completion.view, answer_of(completion)
        best[key] = max(best.get(key, completion), completion, key=lambda c: (c.score, c.weight))
    if len({completion.score for completion in best.values() if not completion.view}) < 2:
        return None
    return [(answer, completion) for (_, answer), completion in best.items()]
