"""Options of `bpo select`: which pairs of scored candidates to train on, and what to mix with them."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Literal

from bpo.config.options import NUM_SEEDS, Section, needed, number


@dataclass(kw_only=True)
class MixtureConfig(Section):
    """Groups of another file to train on together with the selected ones.

    Attributes:
        groups: Groups file; those that were mixed into it are not used.
        share: Number of its groups relative to that of the selected ones; drawn at random, at most all.
    """

    where = "select.mixture"

    groups: str = needed("groups.jsonl")
    share: float = number(1.0, above=0)


@dataclass(kw_only=True)
class SelectionConfig(Section):
    """Selection of preference pairs among scored candidates; written to data.groups (docs/rounds.md).

    Candidates with equal scores or equal texts are never paired.

    Attributes:
        candidates: Groups file with the candidates.
        judgements: Folder written by `bpo rank`; empty uses the scores in the file.
        policy: Policy that must have generated the candidates: its fingerprint, directory or Hub id; empty does not
            check.
        rule: `best-worst` pairs the best with the worst candidate, `all` every two with different scores, `top-bottom`
            each of the `k` best with each of the `k` worst.
        k: Number of candidates on each side of `top-bottom`.
        min_margin: Smallest difference of the scores of a pair.
        max_pairs: Largest number of pairs per prompt, drawn at random; 0 keeps all.
        annotation: `rank` lets the annotation take part with the judge's score, `drop` leaves it out, `prefer` pairs it
            with every candidate that the judge does not score higher, and the others by `rule`.
        length: `balance` drops the pairs whose answer of the longer side is longest relative to the other (RLAIF-V),
            until preferred and rejected answers have the same mean length in characters; `none` keeps all.
        clean_chosen: Keep only pairs whose preferred answer has no hallucinated sentence and whose rejected one has at
            least one, by a judge that labels sentences.
        sentence_weight: Weight of the tokens of hallucinated sentences in rejected answers, for
            `loss.terms[].token_weights: data`; 1 leaves all equal.
        explored: Completion type that terms with `pairs: explored` are on, such as mllm-greedy (SELM); it stays in the
            group even if it is in no pair.
        mixture: Other groups to train on as well.
        seed: Random seed of all draws, combined with the record's id.
    """

    where = "select"

    candidates: str = ""
    judgements: str = ""
    policy: str = ""
    rule: Literal["best-worst", "all", "top-bottom"] = "best-worst"
    k: int = number(2, at_least=1)
    min_margin: float = number(0.0, at_least=0)
    max_pairs: int = number(0, at_least=0, zero="all")
    annotation: Literal["rank", "drop", "prefer"] = "rank"
    length: Literal["none", "balance"] = "none"
    clean_chosen: bool = False
    sentence_weight: float = number(1.0, at_least=0)
    explored: str = ""
    mixture: list[MixtureConfig] = field(default_factory=list)
    seed: int = number(0, at_least=0, below=NUM_SEEDS)
