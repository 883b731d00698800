"""Sparse logistic regression."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from bpo.bootstrap.measure.logistic import Differences, differences, fit_logistic
from bpo.bootstrap.measure.ngrams import ngram_ids
from bpo.bootstrap.measure.pairs import TextPair
from tests.bootstrap.measure.worlds import independent, swapped, telling


def test_differences_are_ngrams_of_one_side_only() -> None:
    pairs = [TextPair(str(i), "a red dog", "a dog dog") for i in range(4)]
    rows = differences(pairs, bits=20)
    preferred, rejected = rows.counts()
    of = {int(number): (p, r) for number, p, r in zip(rows.id_C, preferred, rejected, strict=True)}
    only_preferred = set(ngram_ids("a red dog", 20).tolist()) - set(ngram_ids("a dog dog", 20).tolist())
    only_rejected = set(ngram_ids("a dog dog", 20).tolist()) - set(ngram_ids("a red dog", 20).tolist())
    assert of == {**{n: (4, 0) for n in only_preferred}, **{n: (0, 4) for n in only_rejected}}
    assert len(only_preferred) == 3 and len(only_rejected) == 2  # red, a red, red dog; a dog, dog dog


def test_rare_ngrams_are_left_out() -> None:
    assert len(differences([TextPair(str(i), "a", "b") for i in range(3)]).id_C) == 0
    assert len(differences([]).id_C) == 0


def test_solution_is_that_of_a_dense_solver() -> None:
    rows = differences(telling(120, 0.5))
    weight_P = np.linspace(0.5, 1.5, 120)
    dense = np.zeros((120, len(rows.id_C)))
    dense[rows.row_Z, rows.column_Z] = rows.value_Z
    matrix, weights = torch.tensor(dense), torch.zeros(len(rows.id_C), dtype=torch.float64, requires_grad=True)
    solver = torch.optim.LBFGS([weights], max_iter=500, tolerance_grad=1e-10, line_search_fn="strong_wolfe")

    def closure() -> torch.Tensor:
        solver.zero_grad()
        losses = torch.nn.functional.softplus(-(matrix @ weights))
        loss = (torch.tensor(weight_P) * losses).sum() + 5 * (weights**2).sum()
        loss.backward()
        return loss

    solver.step(closure)
    expected = (matrix @ weights).detach().numpy()
    assert np.allclose(rows.scores(fit_logistic(rows, weight_P)), expected, atol=0.01)
    assert np.abs(expected).max() > 1


def test_exactly_balanced_texts_have_the_solution_zero() -> None:
    rows = differences(swapped(80))
    assert np.abs(fit_logistic(rows, np.ones(80))).max() == pytest.approx(0, abs=1e-12)


def test_a_pair_of_weight_zero_has_no_influence() -> None:
    rows = differences(telling(60, 1.0))
    weight_P = np.ones(60)
    weight_P[30:] = 0
    half = differences(telling(60, 1.0)[:30], min_pairs=1)
    full = dict(zip(rows.id_C.tolist(), fit_logistic(rows, weight_P), strict=True))
    unseen = set(rows.id_C.tolist()) - set(half.id_C.tolist())
    assert unseen and all(full[number] == 0 for number in unseen)


def test_few_products_are_enough(monkeypatch: pytest.MonkeyPatch) -> None:
    rows, calls = differences(independent(3000)), []
    scores = Differences.scores
    monkeypatch.setattr(Differences, "scores", lambda self, weight_C: calls.append(1) or scores(self, weight_C))
    fit_logistic(rows, np.ones(3000))
    assert 5 < len(calls) <= 25
