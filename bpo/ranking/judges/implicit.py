"""The policy judges its own answers by its implicit reward: log-ratios to a reference model (SPA, arXiv 2406.04412)."""

from __future__ import annotations

import gc
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any, Literal

import torch

from bpo.config.options import Section, needed, number
from bpo.config.training import Config
from bpo.data.encode import EncodedGroup, Encoder, EncodingError, load_encoder
from bpo.formats.problems import RecordError
from bpo.job.launch import Ranks, pick_device
from bpo.model.group_scores import GroupScorer, completion_places
from bpo.model.load import resolve_model
from bpo.model.weights import policy_fingerprint
from bpo.ranking.judge import Failed, Judge, Scored, register_judge
from bpo.ranking.judges.models import seen_by_model
from bpo.ranking.options import judge_options
from bpo.records import PreferenceGroup

POLICY, REFERENCE = "policy", "reference"


@dataclass(kw_only=True)
class ImplicitOptions(Section):
    """Options of the judge `implicit`; other options of both models are those of `model`.

    Attributes:
        policy: Model whose preferences count: a directory, which may be a LoRA adapter's, or Hub id. Empty uses
            model.path.
        reference: Model that the policy was trained from, such as the one after supervised fine-tuning.
        beta: Inverse temperature with which the policy was trained.
        length: `sum` of the tokens' log-ratios, as in the paper, or their `mean`.
        max_tokens: Largest number of tokens of a forward pass; a larger group has one of its own.
    """

    where = "rank.options"

    policy: str = ""
    reference: str = needed("")
    beta: float = number(0.1, above=0)
    length: Literal["sum", "mean"] = "sum"
    max_tokens: int = number(16384, at_least=1)


def preference_probability(first: float, second: float) -> float:
    """P(first answer is preferred to the second) of two implicit rewards: sigmoid(first - second)."""
    return 0.5 * (1 + math.tanh((first - second) / 2))


@register_judge("implicit")
class ImplicitJudge(Judge):
    """score(y) = beta (log pi(y) - log pi_ref(y)); the two models are loaded in turn.

    Details of a completion: `logp_policy` and `logp_reference` in nats, `tokens`, and `preferred`, the mean of
    P(it is preferred) over the group's other completions.
    """

    passes = (POLICY, REFERENCE)

    def __init__(self, config: Config, ranks: Ranks):
        self.options = judge_options(ImplicitOptions, config)
        self._paths = {POLICY: self.options.policy or config.model.path, REFERENCE: self.options.reference}
        if not self._paths[POLICY]:
            raise ValueError("rank.options.policy and model.path are both empty; set one to the policy")
        self._config, self._ranks = config, ranks
        self._scorer: tuple[str, GroupScorer] | None = None

    def identity(self) -> dict[str, Any]:
        models = {name: policy_fingerprint(path) for name, path in self._paths.items()}
        return {**models, "beta": self.options.beta, "length": self.options.length, **seen_by_model(self._config)}

    def judge(self, name: str, groups: Sequence[PreferenceGroup]) -> Iterator[tuple[int, Scored | Failed]]:
        scorer, encoded = self._scorer_of(name), []
        for index, group in enumerate(groups):
            try:
                encoded.append((index, _encode(scorer.encoder, group)))
            except (RecordError, EncodingError) as error:
                yield index, Failed(str(error))
        for index, tokens, logp in scorer.score(encoded, self.options.max_tokens):
            places = completion_places(scorer.encoder, groups[index], tokens)
            sums = [float(values_N.double().sum()) for values_N in logp]
            details = [{"tokens": len(logp[place])} for place in places]
            yield index, Scored(tuple(sums[place] for place in places), tuple(details))

    def combine(self, results: Mapping[str, Scored]) -> Scored:
        """The scores from both log-probabilities; raises ValueError if the tokenizers differ."""
        policy, reference = results[POLICY], results[REFERENCE]
        if policy.details != reference.details:
            raise ValueError(
                f"{self._paths[POLICY]} and {self._paths[REFERENCE]} split answers into different tokens; set "
                "rank.options.reference to the model that the policy was trained from"
            )
        tokens = [detail["tokens"] if self.options.length == "mean" else 1 for detail in policy.details]
        pairs = list(zip(policy.scores, reference.scores, strict=True))
        scores = [self.options.beta * (own - base) / n for (own, base), n in zip(pairs, tokens, strict=True)]
        details = []
        for index, ((own, base), detail) in enumerate(zip(pairs, policy.details, strict=True)):
            others = [preference_probability(scores[index], score) for score in scores[:index] + scores[index + 1 :]]
            preferred = sum(others) / max(len(others), 1)
            details.append({"logp_policy": own, "logp_reference": base, **detail, "preferred": preferred})
        return Scored(tuple(scores), tuple(details))

    def _scorer_of(self, name: str) -> GroupScorer:
        """The model of a pass, in place of that of another."""
        if self._scorer is None or self._scorer[0] != name:
            self._scorer = None
            gc.collect()
            if torch.cuda.is_available():
                torch.cuda.empty_cache()
            config = replace(self._config, model=replace(self._config.model, path=self._paths[name]))
            model = resolve_model(config.model, pick_device(self._ranks), for_training=True)
            self._scorer = name, GroupScorer(model, load_encoder(config))
        return self._scorer[1]


def _encode(encoder: Encoder, group: PreferenceGroup) -> EncodedGroup:
    """The group with each distinct answer once, whatever the scores in its file."""
    prompt = encoder.encode_prompt(group.id, group.images, group.prompt)
    room = encoder.max_length_tokens - len(prompt.prefix_ids)
    if room < 1:
        raise EncodingError(f"record {group.id!r}: {encoder.too_long(prompt)}")
    ids = dict.fromkeys(encoder.encode_completion(completion.response)[:room] for completion in group.completions)
    return EncodedGroup(prompt, tuple(ids), (0.0,) * len(ids))
