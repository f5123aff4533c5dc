"""At most n formats per place, against every choice there is."""

import itertools

import numpy as np
import pytest

from turboq_calibrate.choose.solver import places
from turboq_calibrate.choose.solver.problem import Infeasible

FLOAT = 1e-9  # relative: sums in another order; HiGHS to its tolerances
PLACE = np.array([0, 0, 0, 1, 1, 1])
COLUMNS = 4


def instance(seed, *, same_sizes, forbidden):
    """6 rows in two places, 4 columns; costs are multiples of 2^-10, so sums are exact."""
    rng = np.random.default_rng(seed)
    shape = (len(PLACE), COLUMNS)
    sizes = rng.integers(1, 9, shape).cumsum(axis=1) * 16
    if same_sizes:
        sizes = sizes[:2][PLACE]
    costs = np.round(rng.integers(1, 2000, (len(PLACE), 1)) * 0.4 ** np.arange(COLUMNS)) / 1024
    costs[rng.random(shape) < forbidden] = np.inf
    return costs, sizes


def legal_choices(most, counted, everywhere):
    """[n, 6] of all choices that obey the rules."""
    out = []
    for choice in itertools.product(range(COLUMNS), repeat=len(PLACE)):
        few = all(len({c for c, p in zip(choice, PLACE, strict=True) if p == at}) <= most
                  for at in (0, 1))  # fmt: skip
        if few and (everywhere is None or len({c for c in choice if counted[c]}) <= everywhere):
            out.append(choice)
    return np.array(out)


RULES = [(2, None), (2, 3), (1, 2), (3, 3)]


@pytest.mark.parametrize("same_sizes", [True, False])
@pytest.mark.parametrize(("most", "everywhere"), RULES)
def test_against_enumeration(most, everywhere, same_sizes):
    counted = np.array([True, True, True, False])
    choices = legal_choices(most, counted, everywhere)
    rows, proven = np.arange(len(PLACE)), 0
    for seed in range(8):
        costs, sizes = instance(seed, same_sizes=same_sizes, forbidden=0.1 * (seed % 2))
        total, size = costs[rows, choices].sum(axis=1), sizes[rows, choices].sum(axis=1)
        fits = size[np.isfinite(total)]
        for limit in np.random.default_rng(seed).integers(fits.min() - 40, fits.max(), 4).tolist():
            best = np.min(total[size <= limit], initial=np.inf)

            def solve(costs=costs, sizes=sizes, limit=limit):
                return places.allocate(
                    costs, sizes, limit, PLACE, most,
                    counted=counted, everywhere=everywhere, gap=0.0, seconds=10.0,
                )  # fmt: skip

            if np.isinf(best):
                with pytest.raises(Infeasible) as error:
                    solve()
                assert error.value.smallest == fits.min()
                continue
            found = solve()
            assert any((choices == found.chosen).all(axis=1)), "the rules are broken"
            assert sizes[rows, found.chosen].sum() <= limit
            assert found.cost == costs[rows, found.chosen].sum()
            assert found.bound <= best * (1 + FLOAT)
            assert found.cost >= best
            if same_sizes and most <= 2:
                assert found.cost == pytest.approx(best, rel=FLOAT)
                assert found.bound == pytest.approx(best, rel=FLOAT)
                proven += 1
    assert not same_sizes or most > 2 or proven >= 16


def test_a_combination_that_some_row_cannot_take_is_left_out():
    costs = np.array([[1.0, np.inf, 0.5], [1.0, 0.1, np.inf]])
    sizes = np.tile([16, 32, 48], (2, 1))
    wide = places.places(costs, sizes, np.zeros(2, int), np.arange(3), 1)
    vertices = wide.costs.shape[1] // 3
    assert wide.costs.reshape(3, vertices)[:, 0].tolist() == [2.0, np.inf, np.inf]
