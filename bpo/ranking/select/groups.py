"""Selects the pairs of one record, and makes groups whose preference pairs are exactly these."""

from __future__ import annotations

import random
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

from bpo.bootstrap.changes import words_of
from bpo.bootstrap.completion_types import PROVENANCE_SOURCES
from bpo.config.selection import SelectionConfig
from bpo.formats.problems import RecordError
from bpo.job.seeds import derive_seed
from bpo.ranking.judge import Failed, Judgement
from bpo.ranking.select.rules import Pair, all_pairs, distinct, top_bottom
from bpo.ranking.sentences import keep_pair
from bpo.records import Completion, PreferenceGroup

ANNOTATION = "gt"  # type of the annotation among the completions
_OTHERS = {PROVENANCE_SOURCES[source] for source in ("inject", "swap", "edit")}  # answers not of the policy


@dataclass(frozen=True, slots=True)
class Choice:
    """The pairs selected in one record; without one, `reason` says why, and `detail` tells the quarantine more."""

    group: PreferenceGroup
    judgement: Judgement | None = None
    scores: Sequence[float] = ()
    pairs: Sequence[Pair] = ()
    reason: str = ""
    detail: str = ""


def choose(group: PreferenceGroup, result: Judgement | Failed | None, options: SelectionConfig) -> Choice:
    """Selects the pairs of a record by the scores of a judge, or (None) of the group.

    Under `prefer`, the rule pairs the other candidates, and those that do not score higher than the annotation are
    paired with it, whatever the margin. Raises ValueError if the judge lacks the sentences that an option needs.
    """
    if isinstance(result, Failed):
        return Choice(group, reason="failed", detail=result.reason)
    scores = result.scored.scores if result else tuple(completion.score for completion in group.completions)
    texts = [completion.response for completion in group.completions]
    members = [k for k, c in enumerate(group.completions) if not c.view and (result or c.paired)]
    annotations = [k for k in members if group.completions[k].type == ANNOTATION and options.annotation != "rank"]
    taken = {tuple(words_of(texts[k])) for k in annotations} if options.annotation == "prefer" else set()
    members = [k for k in members if k not in annotations and not (taken and tuple(words_of(texts[k])) in taken)]
    own, own_texts = [scores[k] for k in members], [texts[k] for k in members]
    if options.rule == "all":
        found = all_pairs(own, own_texts, options.min_margin)
    else:
        found = top_bottom(own, own_texts, options.k if options.rule == "top-bottom" else 1, options.min_margin)
    pairs = [(members[i], members[j]) for i, j in found]
    if options.annotation == "prefer":
        pairs += [(a, members[k]) for a in annotations for k in distinct(own, own_texts) if scores[a] >= own[k]]
    reason = ""
    if not pairs:
        reason = "equal texts" if len(distinct(own, own_texts)) < 2 else "tie" if len(set(own)) == 1 else "margin"
    if result and pairs and options.clean_chosen:
        labels = {k: [bool(entry["label"]) for entry in _sentences(result, k)] for pair in pairs for k in pair}
        pairs = [(i, j) for i, j in pairs if keep_pair(labels[i], labels[j])]
        reason = "" if pairs else "sentences"
    if 0 < options.max_pairs < len(pairs):
        pairs = random.Random(derive_seed(options.seed, "pairs", group.id)).sample(pairs, options.max_pairs)
    return Choice(group, result, scores, pairs, reason)


def check_policy(group: PreferenceGroup, policy: str, file: str) -> None:
    """Raises ValueError if a model's answer (but injected errors) is not, or does not say that it is, the policy's."""
    for completion in group.completions:
        source = completion.provenance
        found = source.policy if source else None
        free = completion.type == ANNOTATION or (source and (source.model is None or source.source in _OTHERS))
        if found != policy and not (free and found is None):
            raise ValueError(
                f"{file}: group {group.id!r}: the {completion.type} answer is of policy {found or 'unknown'}, not of "
                f"select.policy={policy}; generate it again with that policy, or leave select.policy empty"
            )


def divide(pairs: Sequence[Pair], scores: Sequence[float] | None = None) -> list[dict[int, float]]:
    """Divides pairs into groups: scores of candidates from which exactly these pairs follow.

    Preferred candidates with the same rejected ones share a group with scores 1 and 0. If there are several, but all
    pairs follow from `scores`, there is one group with these.
    """
    preferred: dict[tuple[int, ...], list[int]] = {}
    for i in sorted({i for i, _ in pairs}):
        preferred.setdefault(tuple(sorted(j for k, j in pairs if k == i)), []).append(i)
    if len(preferred) > 1 and scores is not None:
        members = sorted({k for pair in pairs for k in pair})
        if {(i, j) for i in members for j in members if scores[i] > scores[j]} == set(pairs):
            return [{k: scores[k] for k in members}]
    return [dict.fromkeys(better, 1.0) | dict.fromkeys(worse, 0.0) for worse, better in preferred.items()]


def groups_of(choice: Choice, pairs: Sequence[Pair], options: SelectionConfig) -> Iterator[PreferenceGroup]:
    """Makes the groups of a record, of completions in pairs, the explored one, and those of other images.

    Several groups get ids `ID#1`, `ID#2` ... Raises RecordError if a sentence of the judge is not in the answer.
    """
    group = choice.group
    own = [k for k, completion in enumerate(group.completions) if not completion.view]
    marked = [k for k in own if group.completions[k].type == options.explored][:1]
    explored = set(marked) or {k for k in own if group.completions[k].explored}
    # Weights of tokens hold for both sides of pairs: with them, no answer is preferred and rejected in one group.
    divided = divide(pairs, choice.scores if options.sentence_weight == 1 else None)
    for number, scores in enumerate(divided, start=1):
        least = min(scores.values())
        completions = []
        for k, completion in enumerate(group.completions):
            if k in scores or k in explored:
                completion = replace(completion, score=scores.get(k, least), paired=k in scores, explored=k in explored)
                weight = options.sentence_weight if scores.get(k) == least else 1
                completions.append(_judged(completion, choice.judgement, k, weight) if choice.judgement else completion)
            elif k not in own:
                completions.append(completion)
        yield replace(
            group, id=group.id if len(divided) == 1 else f"{group.id}#{number}", completions=tuple(completions)
        )


def _judged(completion: Completion, judgement: Judgement, k: int, sentence_weight: float) -> Completion:
    """The completion with its judgement, and the weight of its hallucinated sentences."""
    details = {"details": judgement.scored.details[k]} if judgement.scored.details else {}
    found = {"score": judgement.scored.scores[k], **judgement.judge, **details}
    weights = completion.token_weights
    if sentence_weight != 1:
        weights = tuple(sentence_weights(completion.response, _sentences(judgement, k), sentence_weight))
    return replace(completion, token_weights=weights, extra={**completion.extra, "judgement": found})


def _sentences(judgement: Judgement, k: int) -> Sequence[Any]:
    sentences = judgement.scored.details[k].get("sentences") if judgement.scored.details else None
    if sentences is None:
        raise ValueError(f"select.clean_chosen and sentence_weight need the judge verifier, not {judgement.judge}")
    return sentences


def sentence_weights(response: str, sentences: Sequence[Any], weight: float) -> Iterator[tuple[int, int, float]]:
    """(start, end, weight) of hallucinated sentences, in characters; raises RecordError if one is not in the answer."""
    end = 0
    for entry in sentences:
        start = response.find(entry["sentence"], end)
        if start < 0 or not entry["sentence"]:
            raise RecordError("invalid-weights", f"sentence {entry['sentence']!r:.80} is not in {response!r:.80}")
        end = start + len(entry["sentence"])
        if entry["label"]:
            yield start, end, weight
