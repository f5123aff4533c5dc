"""Rounding by what errors cost: against the closed form of the greedy choice, and nearest."""

import numpy as np
import pytest

from turboq.numbers import rounding


def metric(rng, dim, decay):
    """Costs that fall as decay^i in directions of no coordinate's own."""
    turn = np.linalg.qr(rng.normal(size=(dim, dim)))[0]
    return (turn * decay ** np.arange(dim)) @ turn.T


def cost(error, h):
    return np.einsum("rc,cd,rd->r", error, h, error)


def greedy(matrix, scale, h):
    """Each entry the nearest to where the cost of those before it is least made good:
    rest - H_rr^-1 H_rd (their errors), by one solution of a linear system per column."""
    h = h + rounding.RIDGE * np.mean(np.diag(h)) * np.eye(len(h))
    order, q = np.argsort(-np.diag(h), kind="stable"), np.zeros(matrix.shape)
    for i, c in enumerate(order):
        done, rest = order[:i], order[i:]
        errors = q[:, done] * scale[:, None] - matrix[:, done]
        back = np.linalg.solve(h[np.ix_(rest, rest)], h[np.ix_(rest, done)] @ errors.T)[0]
        q[:, c] = np.clip(np.rint((matrix[:, c] - back) / scale), -127, 127)
    return q


@pytest.mark.parametrize("dim", [5, 70, 130])  # within a block, two, three
@pytest.mark.parametrize("decay", [1.0, 0.9])
def test_every_entry_is_the_greedy_choice(rng, dim, decay):
    matrix, h = rng.normal(size=(9, dim)), metric(rng, dim, decay)
    q, scale = rounding.to_int8(matrix, rounding.Metric.of(h))
    assert q.dtype == np.int8
    np.testing.assert_allclose(np.abs(matrix).max(axis=1), 127 * scale, rtol=1e-6)
    np.testing.assert_array_equal(q, greedy(matrix, scale.astype(np.float64), h))


def test_costs_less_than_nearest_where_errors_do_not_cost_alike(rng):
    matrix, h = rng.normal(size=(20, 96)), metric(rng, 96, 0.9)
    q, scale = rounding.to_int8(matrix, rounding.Metric.of(h))
    nearest = np.rint(matrix / scale[:, None]) * scale[:, None]
    ours, theirs = (cost(x - matrix, h).sum() for x in (q * scale[:, None], nearest))
    assert ours < theirs / 5
    alike = rounding.to_int8(matrix, rounding.Metric.of(np.eye(96)))[0]
    np.testing.assert_array_equal(alike, np.rint(matrix / scale[:, None]))


def test_rows_of_zeros_and_metrics_without_an_inverse(rng):
    matrix = rng.normal(size=(3, 8))
    matrix[1] = 0
    q, scale = rounding.to_int8(matrix, rounding.Metric.of(np.ones((8, 8))))
    assert not np.any(q[1])
    assert scale[1] == 1
    # Only the sum costs: it is off by at most half a step.
    off = (q * scale[:, None].astype(np.float64) - matrix).sum(axis=1)
    assert np.all(np.abs(off) <= 0.51 * scale)
    assert np.all(rounding.to_int8(matrix, rounding.Metric.of(np.zeros((8, 8))))[0][1] == 0)


def test_refusals():
    with pytest.raises(ValueError, match="the metric must be finite"):
        rounding.Metric.of(np.full((2, 2), np.nan))
    with pytest.raises(ValueError, match="the matrix must be finite"):
        rounding.to_int8(np.full((2, 2), np.inf), rounding.Metric.of(np.eye(2)))
