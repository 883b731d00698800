"""Losses with a state, by their closed forms, and what the state keeps."""

from __future__ import annotations

import json
import math
import random

import pytest
import torch

from bpo.losses.stateful import SPA_OPTIONS, MarginWindow, MeanReward
from tests.losses.pairs import gradients, loss_of, pair_values


def minus_log_sigmoid(x: float) -> float:
    return math.log1p(math.exp(-x))


def window(margins: list[float], **options: float) -> MarginWindow:
    """State after one step of these margins."""
    state = MarginWindow({**SPA_OPTIONS, **options})
    state.update([[margin] for margin in margins])
    return state


def test_bco_before_the_first_step_classifies_around_0() -> None:
    values = pair_values([-1.0], [-4.0], [-3.0], [-1.0], beta=0.5)
    assert loss_of("bco_pair", values).item() == pytest.approx(minus_log_sigmoid(1.0) + minus_log_sigmoid(1.5))


def test_bco_classifies_around_the_mean_reward_of_earlier_steps() -> None:
    state = MeanReward({})
    values = pair_values([-1.0, -2.0], [-4.0, -1.5], [-3.0, -2.0], [-1.0, -1.0], beta=0.5, state=state)
    rows = state.collect(values)
    assert rows.tolist() == [[1.0, -1.5], [0.0, -0.25]] and not rows.requires_grad
    state.update(rows.tolist())
    state.update([[2.0, 0.75]])
    assert state.mean == (1.0 - 1.5 + 0.0 - 0.25 + 2.0 + 0.75) / 6
    shift = state.mean
    expected = [minus_log_sigmoid(w - shift) + minus_log_sigmoid(shift - l) for w, l in ((1, -1.5), (0, -0.25))]  # noqa: E741
    assert loss_of("bco_pair", values).tolist() == pytest.approx(expected, rel=1e-12)
    slope = -0.5 / (1 + math.exp(1.0 - shift))
    assert gradients("bco_pair", values)[0][0] == pytest.approx(slope, rel=1e-12)


def test_the_mean_reward_does_not_depend_on_the_order_of_a_steps_rows() -> None:
    rng = random.Random(0)
    rows = [[rng.gauss(0, 10 ** rng.randint(-8, 8)), rng.gauss(0, 1)] for _ in range(100)]
    forwards, backwards = MeanReward({}), MeanReward({})
    forwards.update(rows)
    backwards.update(rows[::-1])
    assert forwards.state_dict() == backwards.state_dict()


def test_spa_smooths_the_labels_of_the_smallest_margins_only() -> None:
    alpha = 0.25
    state = window([0.0, 1.0, 2.0, 3.0, 4.0], quantile=0.375, alpha=alpha)
    assert state.threshold == pytest.approx(1.5)
    values = pair_values([1.4, 1.5, 1.6, -3.0], [0.0] * 4, beta=1.0, state=state)
    expected = [
        (1 - alpha * (m <= 1.5)) * minus_log_sigmoid(m) + alpha * (m <= 1.5) * minus_log_sigmoid(-m)
        for m in (1.4, 1.5, 1.6, -3.0)
    ]
    assert loss_of("spa", values).tolist() == pytest.approx(expected, rel=1e-12)
    chosen, _ = gradients("spa", values)
    sigmoid = [1 / (1 + math.exp(-m)) for m in (1.4, 1.6)]
    assert chosen[0] == pytest.approx(alpha + sigmoid[0] - 1) and chosen[2] == pytest.approx(sigmoid[1] - 1)


def test_spa_is_dpo_before_the_first_margin_and_during_the_warm_up() -> None:
    logps = [0.1, -2.0], [0.0, 0.5]
    dpo = loss_of("sigmoid", pair_values(*logps)).tolist()
    state = MarginWindow({**SPA_OPTIONS, "warmup_steps": 2})
    for _ in range(2):
        assert loss_of("spa", pair_values(*logps, state=state)).tolist() == dpo
        state.update([[5.0]])
    assert loss_of("spa", pair_values(*logps, state=state)).tolist() != dpo
    assert loss_of("spa", pair_values(*logps, state=MarginWindow(SPA_OPTIONS))).tolist() == dpo


def test_spas_margins_are_those_of_the_loss_without_gradient() -> None:
    values = pair_values([-1.0, -2.0], [-4.0, -1.5], [-3.0, -2.0], [-1.0, -1.0], beta=[0.5, 2.0])
    rows = MarginWindow(SPA_OPTIONS).collect(values)
    assert rows.tolist() == [[2.5], [1.0]] and not rows.requires_grad


def test_spa_judges_by_extrapolated_margins_what_it_trains_on_plain_ones() -> None:
    """Confident pairs are DPO, the others (1 - a) DPO(Delta) + a DPO(-Delta), whatever their own Delta."""
    state = window([0.0, 1.0, 2.0, 3.0, 4.0], quantile=0.375, alpha=0.25)
    delta, judged = [1.0, 1.0, -2.0, -2.0], [1.6, 1.4, 9.0, -9.0]
    extrapolated_P = torch.tensor(judged, dtype=torch.float64, requires_grad=True)
    values = pair_values(delta, [0.0] * 4, beta=1.0, state=state, extrapolated_P=extrapolated_P)
    dpo = [minus_log_sigmoid(x) for x in delta]
    expected = [dpo[0], 0.75 * dpo[1] + 0.25 * (dpo[1] + 1.0), dpo[2], 0.75 * dpo[3] + 0.25 * (dpo[3] - 2.0)]
    assert loss_of("spa", values).tolist() == pytest.approx(expected, rel=1e-12)
    loss_of("spa", values).sum().backward()
    assert extrapolated_P.grad is None
    rows = state.collect(values)
    assert rows.tolist() == [[m] for m in judged] and not rows.requires_grad
    state.update(rows.tolist())
    everything = torch.tensor([0.0, 1.0, 2.0, 3.0, 4.0, *judged], dtype=torch.float64)
    assert state.threshold == pytest.approx(torch.quantile(everything, 0.375).item())


def test_a_share_of_the_steps_warms_up() -> None:
    state = window([1.0], warmup_share=0.2)
    state.total_steps = 11
    refined = []
    for _ in range(5):  # the first step is over
        refined.append(state.threshold is not None)
        state.update([[2.0]])
    assert refined == [False, False, True, True, True]  # 2.2 steps of 11


def test_the_window_forgets_the_oldest_margins() -> None:
    state = window([1.0, 2.0, 3.0], window=4)
    state.update([[4.0], [5.0]])
    assert state.state_dict() == {"margins": [2.0, 3.0, 4.0, 5.0], "num_steps": 2}
    assert state.threshold == pytest.approx(2.3)


def test_a_step_without_pairs_counts_as_a_step_and_changes_nothing_else() -> None:
    margins, mean = window([1.0], warmup_steps=2), MeanReward({})
    assert margins.threshold is None
    margins.update([])
    assert margins.threshold == 1.0
    mean.update([])
    assert mean.state_dict() == {"count": 0, "mean": 0.0}


def test_what_is_not_finite_does_not_enter_the_states() -> None:
    assert window([math.nan, 1.0, math.inf]).state_dict()["margins"] == [1.0]
    mean = MeanReward({})
    mean.update([[math.nan, 3.0], [-math.inf, 5.0]])
    assert mean.state_dict() == {"count": 2, "mean": 4.0}


def test_states_continue_after_json_as_if_never_interrupted() -> None:
    rng = random.Random(1)
    steps = [[[rng.gauss(0, 1) / 3] for _ in range(7)] for _ in range(6)]
    for make in (lambda: MarginWindow({**SPA_OPTIONS, "window": 9}), lambda: MeanReward({})):
        whole, saved, resumed = make(), make(), make()
        for rows in steps[:3]:
            whole.update(rows)
            saved.update(rows)
        resumed.load_state_dict(json.loads(json.dumps(saved.state_dict())))
        for rows in steps[3:]:
            whole.update(rows)
            resumed.update(rows)
        assert resumed.state_dict() == whole.state_dict()


def test_a_smaller_window_takes_the_last_margins_of_a_larger_ones_checkpoint() -> None:
    state = MarginWindow({**SPA_OPTIONS, "window": 2})
    state.update([[9.0]])
    state.load_state_dict(window([1.0, 2.0, 3.0]).state_dict())
    assert state.state_dict() == {"margins": [2.0, 3.0], "num_steps": 1}
    state.load_state_dict({"margins": [], "num_steps": 0})
    assert state.threshold is None


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize(("name", "state"), [("bco_pair", MeanReward({})), ("spa", window([1.0]))])
def test_a_state_does_not_change_the_dtype(name: str, state: MeanReward | MarginWindow, dtype: torch.dtype) -> None:
    state.update([[1.5]])
    assert loss_of(name, pair_values([0.0], [-1.0], dtype=dtype, state=state)).dtype is dtype
