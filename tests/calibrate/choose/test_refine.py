"""Re-fitting costs to measured KL, and solving again."""

from pathlib import Path

import numpy as np
import pytest
from tolerances import TOL

from turboq.cache.layer import TokenPolicy
from turboq.codecs import TurboQuantMSE
from turboq_calibrate.candidates import table as c
from turboq_calibrate.candidates.makers import named
from turboq_calibrate.choose import refine as r
from turboq_calibrate.choose.solver.problem import Problem
from turboq_calibrate.choose.solver.solve import allocate
from turboq_calibrate.cost.measured import isolated_costs, measure, unit_moves
from turboq_calibrate.cost.side_by_side import Engine
from turboq_calibrate.models import load_model
from turboq_calibrate.models.geometry import model_geometry

GOLDEN = Path(__file__).parents[2] / "golden"
POLICY = TokenPolicy(sinks=2)


def make_table(layout, bits=(1, 2, 4)):
    return c.build_table(layout, [named(f"tq {b}", TurboQuantMSE(dim=16, bits=b)) for b in bits])


@pytest.fixture(scope="module")
def model():
    return load_model(GOLDEN / "llama3")


@pytest.fixture(scope="module")
def windows(model):
    return np.random.default_rng(9).integers(0, model.spec.vocab, (4, 40)).astype(np.int32)


@pytest.fixture(scope="module")
def table(model):
    return make_table(model_geometry(model))


@pytest.fixture(scope="module")
def engine(model, table, windows):
    return Engine(model, table, windows[:1], POLICY)


@pytest.fixture(scope="module")
def costs(engine, table):
    """What every unit costs alone."""
    return isolated_costs(table, measure(engine, unit_moves(table), progress=False))


def test_moves_reach_the_next_sizes(table):
    chosen = table.uniform(1, 0)
    chosen[table.rows(1, "k")] = 2
    moves, names = r.layer_moves(table, chosen)
    assert names == [(0, "k", "up"), (0, "k", "down"), (0, "v", "up"), (1, "k", "down"),
                     (1, "v", "up")]  # fmt: skip
    assert [m.changes for m in moves] == [
        ((0, 2), (1, 2)), ((0, 0), (1, 0)), ((2, 1), (3, 1)), ((4, 1), (5, 1)), ((6, 1), (7, 1))
    ]  # fmt: skip
    assert [m.layer for m in moves] == [0, 0, 0, 1, 1]
    sizes = np.array([40, 24, 24, 80])  # out of order, and equal
    assert r.neighbour(sizes, 0, up=False) == 1
    assert r.neighbour(sizes, 2, up=True) == 0
    assert r.neighbour(sizes, 3, up=True) is None


def test_refit_follows_what_was_measured(table, rng):
    costs = rng.uniform(1, 2, table.sizes.shape)
    sides = [(0, "k", "up"), (0, "k", "down"), (0, "v", "up"), (1, "v", "down")]
    expected = np.array([-1.0, 3.0, -2.0, 0.0])
    measured = np.array([-2.5, 3.5 + 3, -2.0 * 1000, 5.0])  # 9 of 4; far too much; unpredicted
    got = r.refit(table, costs, sides, expected, measured) / costs

    def shrunk(ratio):
        return np.exp(np.log(ratio) ** 3 / (np.log(ratio) ** 2 + np.log(2) ** 2))

    assert got[:2] == pytest.approx(shrunk(9 / 4))
    assert got[2:4] == pytest.approx(shrunk(16))
    assert got[4:] == pytest.approx(1)


def test_refinement_undoes_wrong_costs(engine, costs, table):
    """Values of layer 0 said to matter 50 times less than they do: measuring finds out."""
    wrong = costs.copy()
    wrong[table.rows(0, "v")] /= 50
    limit = int(3.3 * table.channels)

    def solver(costs):
        return allocate(Problem.of(table, costs), limit).chosen

    refined = r.refine(engine, wrong, solver, rounds=4, progress=False)
    first, *later = refined.rounds
    best = min(x.measured for x in refined.rounds)
    assert later
    assert best < 0.8 * first.measured
    got = engine.kl(np.stack([refined.chosen, first.chosen])).mean(axis=1)
    assert got == pytest.approx([best, first.measured], rel=TOL["kl_model_rel"])
    assert all(table.total(x.chosen) <= limit for x in refined.rounds)
    ratio = (refined.costs / wrong)[table.rows(0, "v")].mean() / (refined.costs / wrong).mean()
    assert ratio > 2
    assert len(first.changes) == len(r.layer_moves(table, first.chosen)[0])
    # The common factor: predictions of the next plan are in the measured one's scale.
    assert later[0].predicted == pytest.approx(later[0].measured, rel=0.5)


def test_refinement_may_only_improve(engine, costs, table):
    """The plan of the least measured KL stays, whatever comes after it."""
    choices = [table.uniform(c, c) for c in (2, 0, 1)]
    asked = iter(choices)
    refined = r.refine(engine, costs, lambda costs: next(asked), rounds=2, progress=False)
    measured = [x.measured for x in refined.rounds]
    assert measured[0] < measured[2] < measured[1]
    np.testing.assert_array_equal(refined.chosen, choices[0])
