"""Calibrated label probabilities, in closed form."""

from __future__ import annotations

import pytest

from bpo.model.decoding.calibration import Form, best_label, calibrated

FORMS: tuple[Form, ...] = ("scale", "shift")


def test_scale_divides_by_the_prior() -> None:
    assert calibrated([0.7, 0.3], [0.8, 0.2], "scale") == pytest.approx([0.368421, 0.631579], abs=1e-6)
    assert best_label(("Yes", "No"), calibrated([0.7, 0.3], [0.8, 0.2], "scale")) == "No"


def test_shift_subtracts_the_prior() -> None:
    assert calibrated([0.7, 0.3], [0.8, 0.2], "shift") == pytest.approx([-0.1, 0.1])


@pytest.mark.parametrize("form", FORMS)
def test_an_image_that_says_nothing_leaves_a_tie_which_the_first_label_wins(form: Form) -> None:
    scores = calibrated([0.9, 0.1], [0.9, 0.1], form)
    assert scores[0] == scores[1]
    assert best_label(("Yes", "No"), scores) == "Yes"
    assert best_label(("No", "Yes"), scores) == "No"


def test_both_forms_choose_the_same_of_two_labels() -> None:
    """Both ask whether the probability of the first label rose above its prior; of three labels they may differ."""
    levels = [n / 20 for n in range(1, 20) if n != 10]
    for p, prior in ((p, prior) for p in levels for prior in levels if p != prior):
        scores = [calibrated([p, 1 - p], [prior, 1 - prior], form) for form in FORMS]
        assert len({best_label(("Yes", "No"), of_form) for of_form in scores}) == 1
    three = [calibrated([0.6, 0.3, 0.1], [0.4, 0.599, 0.001], form) for form in FORMS]
    assert [best_label(("a", "b", "c"), of_form) for of_form in three] == ["c", "a"]
