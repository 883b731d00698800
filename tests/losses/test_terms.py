"""Resolution of the options of a loss into terms, and what is refused."""

from __future__ import annotations

import re
from pathlib import Path
from typing import Any

import pytest
import torch
import yaml

from bpo.config.io import load_config
from bpo.config.loss import LossConfig, TermConfig, ViewConfig
from bpo.losses.program import LossProgram
from bpo.losses.registry import LOSSES, LossDefinition
from bpo.losses.terms import resolve_terms

VIEWS = {name: ViewConfig(type="noise") for name in ("crop", "noise")}


def config_of(*terms: TermConfig | dict[str, Any], **options: Any) -> LossConfig:
    listed = [term if isinstance(term, TermConfig) else TermConfig(**term) for term in terms]
    return LossConfig(terms=listed, **{"views": VIEWS, **options})


# A term that is refused, and the message after "loss.terms[1]", which follows a term that is not.
REFUSED: list[tuple[dict[str, Any], str]] = [
    # unknown names
    ({"type": "sigmod"}, ".type is 'sigmod'; did you mean 'sigmoid'?; available: aot, aot_unpaired, apo_down"),
    ({"type": "zzz"}, ".type is 'zzz'; available: aot, "),
    (
        {"pairs": "txt"},
        ".pairs is 'txt'; did you mean 'text'?; available: argmax, auxiliary, chosen, explored, image, ",
    ),
    ({"token_weights": "change"}, ".token_weights is 'change'; did you mean 'changed'?; available: changed, data"),
    ({"weighting": "wpi"}, ".weighting is 'wpi'; did you mean 'wpo'?; available: wpo"),
    ({"view": "blur"}, ".view is 'blur', not in loss.views (crop, noise); add it there"),
    ({"pairs": "image", "against": "blur"}, ".against is 'blur', not in loss.views (crop, noise); add it there"),
    ({"guidance": 2.0, "guidance_view": "blind"}, ".guidance_view is 'blind', not in loss.views (crop, noise)"),
    ({"options": {"gamma": 1.0}}, ".options.gamma: sigmoid has no such option (it has none)"),
    ({"type": "simpo", "options": {"beta": 1.0}}, ".options.beta: simpo has no such option (gamma)"),
    (
        {"token_weights": "changed", "options": {"gama": 1.0}},
        ".options.gama: sigmoid has no such option (gamma, smallest_match)",
    ),
    # types and ranges of options
    ({"type": "simpo", "options": {"gamma": "0.5"}}, ".options.gamma is '0.5'; it must be of type float"),
    ({"type": "simpo", "options": {"gamma": True}}, ".options.gamma is True; it must be of type float"),
    ({"type": "spa", "options": {"window": 1.5}}, ".options.window is 1.5; it must be of type int"),
    ({"type": "spa", "options": {"window": True}}, ".options.window is True; it must be of type int"),
    ({"type": "discopop", "options": {"tau": 0}}, ".options.tau is 0.0: use a number that is above 0"),
    ({"type": "spa", "options": {"window": 0}}, ".options.window is 0: use an integer of at least 1"),
    ({"type": "exo_pair"}, ".label_smoothing is 0.0: exo_pair needs more than 0 (its paper uses 0.001)"),
    ({"type": "apo_zero", "divergence": "js"}, ".divergence is 'js', but apo_zero is defined for reverse_kl only"),
    ({"on": "chosen"}, ": on: chosen is for likelihood terms (nll); write pairs for sigmoid"),
    ({"type": "nll", "on": "chosen", "pairs": "chosen"}, ": on and pairs are two ways to write one thing; remove one"),
    # options that do not apply to the loss
    ({"type": "hinge", "label_smoothing": 0.1}, ": label_smoothing=0.1 does not apply to hinge; set 0"),
    (
        {"type": "simpo", "divergence": "js"},
        ": divergence is measured from a reference, which simpo has not; remove it",
    ),
    ({"divergence_alpha": 0.3}, ": divergence_alpha is of divergence: alpha, not reverse_kl; remove it"),
    (
        {"type": "nll", "token_weights": "data"},
        ": nll is a mean over all tokens, to which token_weights does not apply",
    ),
    ({"type": "sft", "length": "sum"}, ": sft is a mean over all tokens, to which length does not apply; remove it"),
    ({"type": "nll", "pairs": "text", "ld_alpha": 0.5}, ": nll is a mean over all tokens, to which ld_alpha does not"),
    (
        {"type": "nll", "guidance": 2.0, "guidance_view": "crop"},
        ": nll is a mean over all tokens, to which guidance does not apply; remove it",
    ),
    # views of pairs
    ({"pairs": "image"}, ": pairs: image compares two images; name the other one in `against`"),
    ({"pairs": "argmax", "view": "crop", "against": "crop"}, ": pairs: argmax compares two images; name the other one"),
    ({"pairs": "symmetric"}, ": pairs: symmetric compares two images"),
    ({"pairs": "other"}, ": pairs: other compares two images"),
    ({"against": "crop"}, ": against: crop has no meaning for pairs: text; remove it"),
    ({"pairs": "chosen", "against": "crop"}, ": against: crop has no meaning for pairs: chosen; remove it"),
    (
        {"pairs": "other", "against": "noise", "view": "crop"},
        ": view: crop has no meaning for pairs: other; remove it",
    ),
    (
        {"type": "nll", "pairs": "auxiliary", "view": "crop"},
        ": view: crop has no meaning for pairs: auxiliary; remove it",
    ),
    # anchors
    (
        {"type": "aot", "pairs": "chosen"},
        ": aot compares answers across groups, so its pairs need two sides, not pairs: chosen",
    ),
    ({"type": "nll", "pairs": "rejected"}, ": nll is of the preferred side, which pairs: rejected has not"),
    ({"type": "log_ratio", "pairs": "rejected"}, ": log_ratio is of the preferred side, which pairs: rejected has not"),
    (
        {"type": "sigmoid", "pairs": "auxiliary"},
        ": auxiliary answers enter likelihood terms only (nll), not sigmoid: they have no dispreferred side",
    ),
    (
        {"type": "orpo", "pairs": "auxiliary"},
        ": orpo compares two answers without a reference; pairs: auxiliary have one",
    ),
    (
        {"type": "orpo", "pairs": "explored"},
        ": orpo compares two answers without a reference; pairs: explored have one",
    ),
    ({"type": "simpo", "pairs": "chosen"}, ": simpo compares two answers without a reference; pairs: chosen have one"),
    ({"pairs": "chosen", "ld_alpha": 0.5}, ": ld_alpha compares the lengths of two answers; pairs: chosen have one"),
    (
        {"pairs": "image", "against": "crop", "token_weights": "changed"},
        ": token_weights: changed compares the tokens of two answers; pairs: image have one",
    ),
    # pairs that come in twos, and losses across groups
    (
        {"type": "rpo", "pairs": "symmetric", "against": "crop"},
        ": pairs: symmetric come in twos within a group; rpo compares across groups",
    ),
    (
        {"type": "margin_consistency", "pairs": "text"},
        ": margin_consistency compares the two margins of pairs: symmetric",
    ),
    ({"type": "aot", "weighting": "wpo"}, ": weighting is of pairs by themselves; aot compares across groups"),
    # guidance
    ({"guidance": 2.0}, ": guidance needs guidance_view, a view of loss.views other than the term's own"),
    (
        {"guidance": 2.0, "view": "crop", "guidance_view": "crop"},
        ": guidance needs guidance_view, a view of loss.views other than the term's own",
    ),
    ({"guidance_view": "crop"}, ": guidance_view without guidance has no effect; set guidance above 1 or remove it"),
    (
        {"guidance": 2.0, "guidance_view": "crop", "token_weights": "data"},
        ": guidance is for plain log-probs; remove token_weights, ld_alpha and pairs: argmax or auxiliary",
    ),
    ({"guidance": 2.0, "guidance_view": "crop", "ld_alpha": 0.5}, ": guidance is for plain log-probs"),
    (
        {"guidance": 2.0, "guidance_view": "crop", "pairs": "argmax", "against": "noise"},
        ": guidance is for plain log-probs",
    ),
    # second targets
    ({"shared_tokens": True}, ": shared_tokens is for pairs: argmax"),
    (
        {"type": "cpo", "pairs": "argmax", "against": "crop", "shared_tokens": True},
        ": shared_tokens takes the reference's tokens, but this loss has no reference",
    ),
    (
        {"type": "spa", "pairs": "argmax", "against": "crop", "options": {"extrapolation": 0.5}},
        ": extrapolated log-probs are of the answers' own tokens, which pairs: argmax are not; set extrapolation: 0",
    ),
    # names
    ({"name": "first"}, ".name: two terms are named 'first'; names must differ"),
]


@pytest.mark.parametrize(("term", "message"), REFUSED, ids=str)
def test_a_term_that_would_not_mean_what_it_says_is_refused_by_its_place(term: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(f'loss.terms[1]{message}')}"):
        LossProgram(config_of({"name": "first"}, term))


SHORT = [
    ({"type": "sigmod"}, "loss.type is 'sigmod'; did you mean 'sigmoid'?"),
    ({"type": "hinge", "label_smoothing": 0.1}, "loss: label_smoothing=0.1 does not apply to hinge; set 0"),
    ({"type": "exo_pair"}, "loss.label_smoothing is 0.0: exo_pair needs more than 0"),
    ({"type": "rpo", "options": {"tau": -1.0}}, "loss.options.tau is -1.0: use a number that is above 0"),
    ({"type": "spa", "options": {"quantile": 1.0}}, "loss.options.quantile is 1.0: use a number that is above 0 and"),
    ({"type": "margin_consistency"}, "loss: pairs: symmetric compares two images"),
    ({"views": {"v": ViewConfig(type="blur")}}, "loss.views.v.type is 'blur'; available: noise, crop,"),
]


@pytest.mark.parametrize(("options", "message"), SHORT, ids=str)
def test_the_short_form_is_refused_by_its_own_keys(options: dict[str, Any], message: str) -> None:
    with pytest.raises(ValueError, match=f"^{re.escape(message)}"):
        LossProgram(LossConfig(**options))


@pytest.mark.parametrize(
    ("option", "value"),
    [("type", "hinge"), ("label_smoothing", 0.1), ("chosen_nll_weight", 0.5), ("options", {"tau": 1.0})],
)
def test_the_short_form_and_a_list_exclude_each_other(option: str, value: Any) -> None:
    message = f"loss.{option} and loss.terms are both set; write loss.{option} into the terms"
    with pytest.raises(ValueError, match=message):
        resolve_terms(config_of(TermConfig(), **{option: value}))


def test_terms_of_second_targets_agree_on_whose_tokens_they_are() -> None:
    own, shared = (TermConfig(pairs="argmax", against="noise", shared_tokens=flag) for flag in (False, True))
    assert len(resolve_terms(config_of(shared, shared))) == 2
    with pytest.raises(ValueError, match="all terms with pairs: argmax must agree on shared_tokens"):
        resolve_terms(config_of(own, shared))


def test_terms_agree_on_the_extrapolation_that_takes_one_pass() -> None:
    def terms(*values: float) -> list[TermConfig]:
        return [TermConfig(type="spa", options={"extrapolation": value}) for value in values]

    assert LossProgram(config_of(*terms(0.5, 0.0, 0.5), TermConfig())).extrapolation == 0.5
    assert LossProgram(config_of(TermConfig())).extrapolation == 0
    with pytest.raises(ValueError, match="^loss.terms: all terms with an extrapolation must agree on it"):
        resolve_terms(config_of(*terms(0.5, 0.25)))


def test_a_loss_on_explored_answers_alone_is_refused_since_groups_may_lack_them() -> None:
    explored = TermConfig(type="log_ratio", pairs="explored")
    assert len(resolve_terms(config_of({}, explored))) == 2
    with pytest.raises(ValueError, match="^loss.terms: all are on explored answers, .* add one that compares answers"):
        resolve_terms(config_of(explored))


@pytest.mark.parametrize("returned", [torch.zeros(()), torch.zeros(2, 1), 1.0, None])
def test_a_loss_that_gives_no_loss_per_pair_is_refused(returned: Any, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(LOSSES, "mine", LossDefinition("mine", lambda values: returned))
    with pytest.raises(ValueError, match=r"^loss\.terms\[1\]: mine returned .* for 2 pairs, not a tensor of shape"):
        LossProgram(config_of({}, {"type": "mine"}))


# What is not refused although a similar term is.
ACCEPTED: list[dict[str, Any]] = [
    {"pairs": "image", "against": "crop"},
    {"pairs": "image", "view": "crop"},  # against the clean image
    {"pairs": "rejected"},
    {"pairs": "other", "against": "crop"},
    {"type": "nll", "pairs": "text"},
    {"type": "nll", "pairs": "auxiliary"},
    {"type": "log_ratio", "pairs": "other", "against": "crop"},
    {"type": "orpo", "pairs": "image", "against": "crop"},
    {"type": "margin_consistency", "against": "crop"},
    {"type": "sft", "weighting": "wpo"},
    {"guidance": 1.5, "guidance_view": "noise", "pairs": "chosen"},
    {"divergence": "alpha", "divergence_alpha": 0.3},
    {"token_weights": "data", "pairs": "chosen"},
    {"token_weights": "changed", "ld_alpha": 0.5},
]


@pytest.mark.parametrize("term", ACCEPTED, ids=str)
def test_combinations_with_a_meaning(term: dict[str, Any]) -> None:
    (spec,) = LossProgram(config_of(term)).plan.terms
    assert spec.pairs == term.get("pairs", LOSSES[term.get("type", "sigmoid")].pairs)
    assert (spec.against, spec.token_weights) == (term.get("against", ""), term.get("token_weights", ""))


def test_a_likelihood_names_its_answers_by_on(tmp_path: Path) -> None:
    (tmp_path / "mpo.yaml").write_text(
        "loss: {terms: [{type: sigmoid, pairs: text, weight: 0.8, beta: 0.1}, {type: bco_pair, weight: 0.2}, "
        "{type: nll, on: chosen, weight: 1.0}, {type: nll, on: auxiliary, name: description}]}"
    )
    specs = LossProgram(load_config(["--config", str(tmp_path / "mpo.yaml")]).loss).plan.terms
    from_flag = load_config(["--loss.terms", "[{type: nll, on: auxiliary}]"]).loss.terms
    assert [term.on for term in from_flag] == ["auxiliary"]
    assert [(spec.name, spec.pairs) for spec in specs] == [
        ("sigmoid", "text"),
        ("bco_pair", "text"),
        ("nll", "chosen"),
        ("description", "auxiliary"),
    ]


def test_the_short_form_is_a_list_of_one_or_two() -> None:
    (alone,) = resolve_terms(LossConfig(type="simpo", options={"gamma": 1}, label_smoothing=0.1))
    assert alone.name == "simpo" and alone.values == {"gamma": 1.0} and isinstance(alone.values["gamma"], float)
    assert alone.options.label_smoothing == 0.1 and alone.length == "mean" and not alone.spec.reference
    preference, likelihood = resolve_terms(LossConfig(chosen_nll_weight=0.2))
    assert (likelihood.name, likelihood.options.weight, likelihood.spec.pairs) == ("nll", 0.2, "chosen")
    assert likelihood.is_likelihood and not preference.is_likelihood


def test_names_of_terms() -> None:
    terms = config_of({}, {"type": "nll"}, {}, {"name": "mine"}, {"type": "nll", "weight": 2.0})
    assert [term.name for term in resolve_terms(terms)] == ["sigmoid", "nll", "sigmoid_2", "mine", "nll_4"]
    with pytest.raises(ValueError, match=r"loss\.terms\[2\]\.name: two terms are named 'sigmoid_2'"):
        resolve_terms(config_of({}, {"name": "sigmoid_2"}, {}))


def test_what_a_term_leaves_open_is_the_losss_own() -> None:
    inherited, own, ipo = resolve_terms(config_of({}, {"beta": 0.3}, {"type": "ipo", "length": "sum"}, beta=0.7))
    assert [term.spec.beta for term in (inherited, own, ipo)] == [0.7, 0.3, 0.7]
    assert [term.length for term in (inherited, ipo)] == ["sum", "sum"]
    assert resolve_terms(LossConfig(type="ipo"))[0].length == "mean"
    (changed,) = resolve_terms(config_of({"token_weights": "changed", "options": {"gamma": 2}}))
    assert changed.values == changed.spec.options == {"gamma": 2.0, "smallest_match": 1}
    (sums,) = resolve_terms(config_of({"type": "margin_consistency", "against": "crop"}))
    assert sums.spec.pairs == "symmetric"


MDPO = {
    "beta": 0.2,
    "views": {"crop": {"type": "crop", "max_area": 0.1}, "blind": {"type": "none"}},
    "terms": [
        {"type": "sigmoid", "name": "text"},
        {"type": "sigmoid", "name": "image", "pairs": "image", "against": "crop", "weight": 0.5},
        {"type": "spa", "options": {"window": 7, "quantile": 0.25}},
    ],
}


def test_a_list_of_terms_and_views_from_a_file(tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"loss": MDPO}))
    loss = load_config(["--config", str(tmp_path / "c.yaml")]).loss
    assert loss.views == {"crop": ViewConfig(type="crop", max_area=0.1), "blind": ViewConfig(type="none")}
    assert all(isinstance(term, TermConfig) for term in loss.terms)
    text, image, spa = resolve_terms(loss)
    assert (image.name, image.options.weight, image.spec.against, image.spec.beta) == ("image", 0.5, "crop", 0.2)
    assert spa.values["window"] == 7 and spa.values["quantile"] == 0.25 and spa.values["alpha"] == 0.1
    assert text.name == "text"


def test_a_list_of_terms_and_views_from_flags() -> None:
    flags = ["--loss.terms", '[{"type": "hinge", "pairs": "image", "against": "crop"}, {"type": "nll", "weight": 0.5}]']
    loss = load_config([*flags, "--loss.views", '{"crop": {"type": "crop"}}', "--loss.beta=0.3"]).loss
    first, second = resolve_terms(loss)
    assert (first.definition.name, first.spec.against, first.spec.beta) == ("hinge", "crop", 0.3)
    assert second.options.weight == 0.5 and loss.views == {"crop": ViewConfig(type="crop")}


@pytest.mark.parametrize(
    ("loss", "named"),
    [
        ({"terms": [{"type": "sigmoid"}, {"type": "nll", "factor": 1.0}]}, "factor"),
        ({"terms": [{"type": "sigmoid", "weight": -1.0}]}, "loss.terms.weight is -1.0; it must be 0 or more"),
        ({"terms": [{"type": "sigmoid", "length": "median"}]}, "median"),
        ({"terms": {"type": "sigmoid"}}, "terms"),
        ({"views": {"crop": {"typ": "crop"}}}, "typ"),
        ({"views": {"noise": {"step": 1000}}}, "loss.views.step is 1000; it must be in [0, 999]"),
    ],
    ids=str,
)
def test_an_error_within_a_list_names_its_key(loss: dict[str, Any], named: str, tmp_path: Path) -> None:
    (tmp_path / "c.yaml").write_text(yaml.safe_dump({"loss": loss}))
    with pytest.raises(ValueError, match=re.escape(named)):
        load_config(["--config", str(tmp_path / "c.yaml")])
    flags = [f"--loss.{key}={yaml.safe_dump(value, default_flow_style=True).strip()}" for key, value in loss.items()]
    with pytest.raises(ValueError, match=re.escape(named)):
        load_config(flags)
