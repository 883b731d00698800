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

    Empty `types` keeps all types. Explored completions of other types are kept without pairs.
    """
    weighted = tuple(completion for completion in group.completions if completion.weight)
    if not types:
        return group if len(weighted) == len(group.completions) else replace(group, completions=weighted)
    paired = [completion for completion in weighted if completion.paired]
    top = {view: max(c.score for c in paired if c.view == view) for view in {c.view for c in paired}}
    kept = [completion for completion in paired if completion.score == top[completion.view] or completion.type in types]
    others = [completion for completion in weighted if completion.explored and completion not in kept]
    return replace(group, completions=(*kept, *(replace(completion, paired=False) for completion in others)))


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

    Paired ones precede those without pairs; what is kept is explored if any of them is. Those of the group's images and
    of its other images are not merged with each other.

    Returns:
        The distinct answers with their completions, in order of their first occurrence, or None if no two paired ones
        that describe the group's images differ in score (`NO_PAIR`).
    """
    best: dict[tuple[str, Answer], Completion] = {}
    for completion in completions:
        key = completion.view, answer_of(completion)
        other = best.get(key, completion)
        kept = max(other, completion, key=lambda c: (c.paired, c.score, c.weight))
        best[key] = replace(kept, explored=True) if other.explored or completion.explored else kept
    if len({completion.score for completion in best.values() if completion.paired and not completion.view}) < 2:
        return None
    return [(answer, completion) for (_, answer), completion in best.items()]
