"""Resolves the options of a loss into terms, and refuses combinations that would not mean what they say."""

from __future__ import annotations

import difflib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import Any

from bpo.config.loss import LossConfig, TermConfig
from bpo.data.cells import AUXILIARY, EXPLORED, PAIR_RULES, CellPlan, TermSpec
from bpo.data.token_weights import TOKEN_RULES
from bpo.data.views import check_views
from bpo.losses import absolute, across, preference, reference_free, stateful  # noqa: F401 they register losses
from bpo.losses.plugin import load_plugin, plugin_digest
from bpo.losses.registry import LOSSES, WEIGHINGS, LossDefinition

# Rules whose pairs have an anchor on one side.
ANCHORED = frozenset(("chosen", "rejected", "other", AUXILIARY, EXPLORED))
_NEEDS_AGAINST = frozenset(("image", "symmetric", "other", "argmax"))
# Rules whose pairs have one answer, on one side or on both: nothing to compare its tokens with.
_ONE_ANSWER = ANCHORED | {"image", "argmax"}
# Losses that read the preferred side only; the first two its mean negative log-likelihood.
_LIKELIHOODS = frozenset(("nll", "sft"))
_OF_CHOSEN = _LIKELIHOODS | {"log_ratio"}


@dataclass(frozen=True, slots=True)
class Term:
    """A term with its loss's definition; `name` is unique in its list, `where` its place in the configuration."""

    name: str
    options: TermConfig
    definition: LossDefinition
    spec: TermSpec
    values: Mapping[str, Any]
    where: str

    @property
    def length(self) -> str:
        return self.definition.length if self.options.length == "auto" else self.options.length

    @property
    def fits_kernel(self) -> bool:
        """Whether the kernels can compute it together with the head."""
        changed = self.options.guidance != 1 or self.options.divergence != "reverse_kl"
        return self.definition.kernel and not (self.spec.weighs_tokens or self.options.weighting or changed)

    @property
    def kernel_options(self) -> tuple[str, float, str]:
        """What all terms of one call of the kernels have in common."""
        return self.definition.name, self.options.label_smoothing, self.length

    @property
    def extrapolation(self) -> float:
        """lambda of the extrapolated log-probs that its loss reads, or 0."""
        return self.values["extrapolation"] if self.definition.extrapolates else 0.0

    @property
    def is_likelihood(self) -> bool:
        """Whether it only regularises: a likelihood of answers rather than a preference."""
        return self.definition.name == "nll"


def resolve_terms(config: LossConfig) -> tuple[Term, ...]:
    """The terms of a loss, in order. Loads the plug-in.

    Raises:
        ValueError: a name is unknown, an option does not apply to its loss, or terms do not go together; with the
            reason.
    """
    load_plugin(config.plugin)
    terms: list[Term] = []
    for number, options in enumerate(_listed(config)):
        where = f"loss.terms[{number}]" if config.terms else "loss"
        definition = _known(options.type, LOSSES, f"{where}.type")
        _check(options, definition, config, where)
        name = _name(options, number, where, {term.name for term in terms})
        pairs = _pairs(options, definition)
        values = _option_values(options, definition, where)
        spec = TermSpec(
            name=name,
            pairs=pairs,
            reference=definition.reference,
            beta=options.beta or config.beta,
            view=options.view,
            against=options.against,
            token_weights=options.token_weights,
            ld_alpha=options.ld_alpha,
            guidance_view=None if options.guidance == 1 else options.guidance_view,
            shared_tokens=options.shared_tokens,
            options=values,
        )
        terms.append(Term(name, options, definition, spec, values, where))
    if len({term.spec.shared_tokens for term in terms if term.spec.pairs == "argmax"}) > 1:
        raise ValueError("loss.terms: all terms with pairs: argmax must agree on shared_tokens")
    if len({term.extrapolation for term in terms if term.extrapolation}) > 1:
        raise ValueError("loss.terms: all terms with an extrapolation must agree on it")
    if all(term.spec.pairs == EXPLORED for term in terms):
        raise ValueError(
            "loss.terms: all are on explored answers, which some groups lack; add one that compares answers"
        )
    return tuple(terms)


def _pairs(options: TermConfig, definition: LossDefinition) -> str:
    """The rule of a term's pairs; `on` is another way to write it for a likelihood."""
    return options.pairs or options.on or definition.pairs


def cell_plan(config: LossConfig, terms: Iterable[Term], seed: int) -> CellPlan:
    """What the terms need of the data. Views are drawn from `seed`."""
    return CellPlan(tuple(term.spec for term in terms), dict(config.views), seed, identity=plugin_digest(config.plugin))


def _listed(config: LossConfig) -> list[TermConfig]:
    """The terms as they are listed, or those of the short form."""
    if not config.terms:
        short = TermConfig(type=config.type, label_smoothing=config.label_smoothing, options=dict(config.options))
        nll = [TermConfig(type="nll", weight=config.chosen_nll_weight)] if config.chosen_nll_weight else []
        return [short, *nll]
    default = LossConfig()
    for name in ("type", "label_smoothing", "chosen_nll_weight", "options"):
        if getattr(config, name) != getattr(default, name):
            raise ValueError(f"loss.{name} and loss.terms are both set; write loss.{name} into the terms")
    return list(config.terms)


def _name(options: TermConfig, number: int, where: str, taken: set[str]) -> str:
    name = options.name or options.type
    if name in taken and not options.name:
        name = f"{name}_{number}"
    if name in taken:
        raise ValueError(f"{where}.name: two terms are named {name!r}; names must differ")
    return name


def _known(name: str, registered: Mapping[str, Any], where: str) -> Any:
    if name not in registered:
        close = difflib.get_close_matches(name, registered, n=1)
        hint = f"; did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"{where} is {name!r}{hint}; available: {', '.join(sorted(registered))}")
    return registered[name]


def _check(options: TermConfig, definition: LossDefinition, config: LossConfig, where: str) -> None:
    pairs = _pairs(options, definition)
    _known(pairs, PAIR_RULES, f"{where}.pairs")
    for field, registered in (("token_weights", TOKEN_RULES), ("weighting", WEIGHINGS)):
        if getattr(options, field):
            _known(getattr(options, field), registered, f"{where}.{field}")
    check_views(config.views)
    for field in ("view", "against", "guidance_view"):
        if getattr(options, field) and getattr(options, field) not in config.views:
            known = ", ".join(config.views) or "none"
            raise ValueError(
                f"{where}.{field} is {getattr(options, field)!r}, not in loss.views ({known}); add it there"
            )
    for fault in _faults(options, definition, pairs):
        raise ValueError(f"{where}: {fault}")


def _faults(options: TermConfig, definition: LossDefinition, pairs: str) -> Iterable[str]:
    """Combinations that would not mean what they say."""
    yield from _faults_of_pairs(options, definition, pairs)
    yield from _faults_of_likelihoods(options, definition)
    name = definition.name
    if options.on and definition.pairs != "chosen":
        yield f"on: {options.on} is for likelihood terms (nll); write pairs for {name}"
    if options.on and options.pairs:
        yield "on and pairs are two ways to write one thing; remove one"
    if options.label_smoothing and not definition.smoothing:
        yield f"label_smoothing={options.label_smoothing:g} does not apply to {name}; set 0"
    if options.weighting and definition.across_groups:
        yield f"weighting is of pairs by themselves; {name} compares across groups"
    if options.guidance != 1 and (not options.guidance_view or options.guidance_view == options.view):
        yield "guidance needs guidance_view, a view of loss.views other than the term's own (V-DPO: without the image)"
    if options.guidance == 1 and options.guidance_view:
        yield "guidance_view without guidance has no effect; set guidance above 1 or remove it"
    if options.guidance != 1 and (pairs in ("argmax", AUXILIARY) or options.ld_alpha != 1 or options.token_weights):
        yield "guidance is for plain log-probs; remove token_weights, ld_alpha and pairs: argmax or auxiliary"
    if definition.extrapolates and options.options.get("extrapolation") and pairs == "argmax":
        yield "extrapolated log-probs are of the answers' own tokens, which pairs: argmax are not; set extrapolation: 0"
    if options.shared_tokens and pairs != "argmax":
        yield "shared_tokens is for pairs: argmax"
    if options.shared_tokens and not definition.reference:
        yield "shared_tokens takes the reference's tokens, but this loss has no reference"
    if options.divergence != "reverse_kl" and not definition.reference:
        yield f"divergence is measured from a reference, which {name} has not; remove it"
    if options.divergence_alpha != TermConfig().divergence_alpha and options.divergence != "alpha":
        yield f"divergence_alpha is of divergence: alpha, not {options.divergence}; remove it"
    if options.ld_alpha != 1 and pairs in _ONE_ANSWER:
        yield f"ld_alpha compares the lengths of two answers; pairs: {pairs} have one"
    if options.token_weights == "changed" and pairs in _ONE_ANSWER:
        yield f"token_weights: changed compares the tokens of two answers; pairs: {pairs} have one"


def _faults_of_pairs(options: TermConfig, definition: LossDefinition, pairs: str) -> Iterable[str]:
    name = definition.name
    if pairs in _NEEDS_AGAINST and options.against == options.view:
        yield f"pairs: {pairs} compares two images; name the other one in `against` (a view of loss.views)"
    if options.against and pairs in ("text", *ANCHORED - {"other"}):
        yield f"against: {options.against} has no meaning for pairs: {pairs}; remove it"
    if options.view and pairs in ("other", AUXILIARY):
        yield f"view: {options.view} has no meaning for pairs: {pairs}; remove it"
    if pairs in ANCHORED and definition.across_groups:
        yield f"{name} compares answers across groups, so its pairs need two sides, not pairs: {pairs}"
    if pairs == "rejected" and name in _OF_CHOSEN:
        yield f"{name} is of the preferred side, which pairs: rejected has not"
    if pairs == AUXILIARY and definition.reference:
        yield f"auxiliary answers enter likelihood terms only (nll), not {name}: they have no dispreferred side"
    if pairs in ANCHORED and not definition.reference and definition.pairs not in ANCHORED:
        yield f"{name} compares two answers without a reference; pairs: {pairs} have one"
    if pairs == "symmetric" and definition.across_groups:
        yield f"pairs: symmetric come in twos within a group; {name} compares across groups"
    if name == "margin_consistency" and pairs != "symmetric":
        yield "margin_consistency compares the two margins of pairs: symmetric"


def _faults_of_likelihoods(options: TermConfig, definition: LossDefinition) -> Iterable[str]:
    """A likelihood is the mean over all tokens of the term's own view."""
    if definition.name not in _LIKELIHOODS:
        return
    set_ones = {
        "token_weights": bool(options.token_weights),
        "ld_alpha": options.ld_alpha != 1,
        "guidance": options.guidance != 1,
        "length": options.length != "auto",
    }
    for name, is_set in set_ones.items():
        if is_set:
            yield f"{definition.name} is a mean over all tokens, to which {name} does not apply; remove it"


def _option_values(options: TermConfig, definition: LossDefinition, where: str) -> dict[str, Any]:
    """The options of the loss and of the term's rules, with their defaults."""
    defaults = dict(definition.options)
    if options.token_weights:
        defaults |= TOKEN_RULES[options.token_weights].options
    for key, value in options.options.items():
        if key not in defaults:
            known = ", ".join(sorted(defaults)) or "it has none"
            raise ValueError(f"{where}.options.{key}: {definition.name} has no such option ({known})")
        if isinstance(defaults[key], float) and type(value) is int:
            value = float(value)
        if type(value) is not type(defaults[key]):
            expected = type(defaults[key]).__name__
            raise ValueError(f"{where}.options.{key} is {value!r}; it must be of type {expected}")
        defaults[key] = value
    return defaults
