"""A plug-in with one entry of each kind (see docs/methods.md): `bpo train --loss.plugin docs/examples/plugin.py`.

Shape letter: P pairs.
"""

import torch
from PIL import ImageOps

from bpo.data.cells import text_pairs
from bpo.losses.plugin import register_loss, register_pairs, register_token_weights, register_view, register_weighting


@register_loss("exponential", options={"scale": 1.0})  # loss.terms[].type
def exponential(values):
    """exp(-scale * beta * margin), [P]."""
    return torch.exp(-values.options["scale"] * values.delta_P)


@register_weighting("confident")  # loss.terms[].weighting
def confident(pair):
    """How likely the policy is to give the preferred answer, per token, [P]; without gradient."""
    return torch.exp(pair.chosen_mean_P)


@register_token_weights("beginning", options={"count": 8})  # loss.terms[].token_weights
def beginning(side, options):
    """1 for the first `count` tokens of an answer, 0 for the others."""
    return [float(index < options["count"]) for index in range(len(side.ids))]


@register_pairs("first")  # loss.terms[].pairs
def first(group, term):
    """The group's first pair of a preferred and a dispreferred answer only."""
    return text_pairs(group, term)[:1]


@register_view("mirrored")  # loss.views.NAME.type
def mirrored(picture, view, generator):
    """The mirrored picture. A random view would draw from `generator` alone."""
    return ImageOps.mirror(picture)
