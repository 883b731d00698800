"""Weights of pairs with which the set is balanced: a convex problem, solved by accelerated projected gradient descent.

    minimise  ||beyond(r + sum_i w_i d_i)||^2 + ridge * sum_i (w_i - 1)^2   over  w_i >= 0, mean 1, effective size

Shape letters as in `differences`.
"""

from __future__ import annotations

import numpy as np

from bpo.bootstrap.select.differences import Rows, beyond, tolerance

# An imbalance of one n-gram is left at ridge / (1 + ridge) of what it was, however frequent the n-gram: the last part
# would cost the most effective sample size.
RIDGE = 0.05
MAX_STEPS, TOLERANCE = 300, 1e-4
_POWER_STEPS = 20


def solve_weights(
    rows: Rows, residual_F: np.ndarray, variance_F: np.ndarray, scale_F: np.ndarray, min_effective_share: float
) -> np.ndarray:
    """Weights [R] with mean 1.

    Args:
        rows: Differences of the pairs.
        residual_F: Weighted sum of the differences decided before.
        variance_F: Variance by chance of that sum after these pairs.
        scale_F: Weight of each feature.
        min_effective_share: Smallest (sum w)^2 / (R sum w^2).
    """
    max_square = len(rows) * (1 / min_effective_share - 1)  # of w - 1: the same bound, since the mean is 1
    # FISTA (Beck and Teboulle, 2009) with a restart where the objective rises (O'Donoghue and Candes, 2015).
    bound_F = tolerance(variance_F)
    step = 0.5 / (_largest_eigenvalue(rows, scale_F) * 1.1 + RIDGE)
    weight_R = ahead_R = np.ones(len(rows))
    momentum = 1.0
    for _ in range(MAX_STEPS):
        excess_F = beyond(residual_F + rows.total(ahead_R), bound_F)
        gradient_R = 2 * rows.dot(scale_F * excess_F) + 2 * RIDGE * (ahead_R - 1)
        new_R = project(ahead_R - step * gradient_R, max_square)
        if float((ahead_R - new_R) @ (new_R - weight_R)) > 0:
            momentum = 1.0
        faster = (1 + np.sqrt(1 + 4 * momentum**2)) / 2
        ahead_R = new_R + (momentum - 1) / faster * (new_R - weight_R)
        change = float(np.abs(new_R - weight_R).max())
        weight_R, momentum = new_R, faster
        if change < TOLERANCE:
            break
    return weight_R


def project(point_R: np.ndarray, max_square: float) -> np.ndarray:
    """The nearest point with entries of at least 0 and mean 1, and ||w - 1||^2 of at most `max_square`.

    The bound holds for the projection of a point moved towards 1, by the optimality conditions of both constraints.
    """
    near_R = _onto_simplex(point_R)
    if float(((near_R - 1) ** 2).sum()) <= max_square:
        return near_R
    low, high = 0.0, 1.0
    for _ in range(40):
        middle = (low + high) / 2
        near_R = _onto_simplex(1 + middle * (point_R - 1))
        low, high = (middle, high) if float(((near_R - 1) ** 2).sum()) <= max_square else (low, middle)
    return _onto_simplex(1 + low * (point_R - 1))


def _onto_simplex(point_R: np.ndarray) -> np.ndarray:
    """The nearest point with entries of at least 0 and mean 1 (Held, Wolfe and Crowder, 1974)."""
    falling_R = np.sort(point_R)[::-1]
    shift_R = (np.cumsum(falling_R) - len(point_R)) / np.arange(1, len(point_R) + 1)
    return np.maximum(point_R - shift_R[np.flatnonzero(falling_R > shift_R)[-1]], 0.0)


def _largest_eigenvalue(rows: Rows, scale_F: np.ndarray) -> float:
    """Of D S D^T, for differences D [R, F] and scales S, by power iteration from a fixed start."""
    vector_R = 1 + 0.5 * np.cos(np.arange(len(rows), dtype=np.float64))
    value = 0.0
    for _ in range(_POWER_STEPS):
        norm = float(np.linalg.norm(vector_R))
        if norm == 0:
            return value
        vector_R = rows.dot(scale_F * rows.total(vector_R / norm))
        value = float(np.linalg.norm(vector_R))
    return value
