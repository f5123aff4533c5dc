"""The allocation whose worst text is best, against enumeration."""

import itertools

import numpy as np
import pytest

from turboq_calibrate.choose.worst_text import least_worst


def cheapest(sizes, limit):
    """Chooser of the exact optimum under a size limit, by enumeration."""
    units, candidates = sizes.shape
    every = np.array(list(itertools.product(range(candidates), repeat=units)))
    fits = every[sizes[np.arange(units), every].sum(axis=1) <= limit]

    def choose(costs):
        return fits[np.argmin(costs[np.arange(units), fits].sum(axis=1))]

    return choose, fits


@pytest.mark.parametrize("seed", range(5))
def test_no_whole_choice_has_a_much_better_worst_text(seed):
    rng = np.random.default_rng(seed)
    sizes = np.tile(np.arange(1, 5), (6, 1))
    scale = rng.lognormal(sigma=1.5, size=(6, 1, 3))
    costs = scale * 4.0 ** -np.arange(1, 5)[None, :, None]
    choose, fits = cheapest(sizes, 14)
    at = np.arange(6)

    def worst(chosen):
        return costs[at, chosen].sum(axis=0).max()

    weights = least_worst(costs, choose)
    assert weights.sum() == pytest.approx(1)
    found = worst(choose(costs @ weights))
    best = min(worst(chosen) for chosen in fits)
    # Lagrange: any weights' least total bounds the best worst text from below.
    bound = max(
        (costs @ p)[at, choose(costs @ p)].sum() for p in rng.dirichlet(np.ones(3), size=200)
    )
    assert bound <= best * (1 + 1e-12)
    assert found <= worst(choose(costs.mean(axis=2)))
    assert found <= best * 1.1  # whole choices: a gap may stay


def test_one_text_keeps_its_only_weight():
    costs = np.ones((3, 2, 1))
    assert least_worst(costs, lambda c: np.zeros(3, int)).tolist() == [1.0]


def test_a_text_that_dominates_gets_the_weight():
    costs = np.zeros((2, 2, 2))
    costs[0, :, 0], costs[1, :, 1] = [4.0, 0.0], [1.0, 0.0]  # one of the two units may be good
    choose, _ = cheapest(np.array([[1, 2], [1, 2]]), 3)
    weights = least_worst(costs, choose)
    assert choose(costs @ weights).tolist() == [1, 0]
