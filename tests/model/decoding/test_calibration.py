"""Calibrated label probabilities, in closed form."""

from __future__ import annotations

import pytest

from bpo.model.decoding.calibration import best_label, calibrated


def test_scale_divides_by_the_prior() -> None:
    assert calibrated([0.7, 0.3], [0.8, 0.2], "scale") == pytest.approx([0.368421, 0.631579], abs=1e-6)
    assert best_label(("Yes", "No"), calibrated([0.7, 0.3], [0.8, 0.2], "scale")) == "No"


def test_shift_subtracts_the_prior() -> None:
    assert calibrated([0.7, 0.3], [0.8, 0.2], "shift") == pytest.approx([-0.1, 0.1])


@pytest.mark.parametrize("form", ["scale", "shift"])
def test_an_image_that_says_nothing_leaves_a_tie_which_the_first_label_wins(form: str) -> None:
    scores = calibrated([0.9, 0.1], [0.9, 0.1], form)  # type: ignore[arg-type]
    assert scores[0] == scores[1]
    assert best_label(("Yes", "No"), scores) == "Yes"
    assert best_label(("No", "Yes"), scores) == "No"
