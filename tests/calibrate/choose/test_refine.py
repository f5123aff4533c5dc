"""Solving, re-fitting to measured KL, and the plan that comes out of it all."""

import itertools
from pathlib import Path

import numpy as np
import pytest
from plan_cases import geometry
from tolerances import TOL

from turboq.cache.layer import TokenPolicy
from turboq.codecs import TurboQuantMSE
from turboq.errors import TurboqError
from turboq.plan import Provenance, load, save
from turboq_calibrate import cost as s
from turboq_calibrate.candidates import table as c
from turboq_calibrate.choose import refine as r
from turboq_calibrate.choose.learn import default_makers, learn_plan, plan_kl
from turboq_calibrate.measure.evaluate import evaluate
from turboq_calibrate.models import load_model
from turboq_calibrate.models.geometry import model_geometry
from turboq_calibrate.observe.gradients import collect_gradient_samples
from turboq_calibrate.observe.samples import collect_samples

GOLDEN = Path(__file__).parents[2] / "golden"
POLICY = TokenPolicy(sinks=2)


def make_table(layout, bits=(1, 2, 4)):
    return c.build_table(
        layout, [c.data_free(f"tq {b}", TurboQuantMSE(dim=16, bits=b)) for b in bits]
    )


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
    return s.Engine(model, table, windows[:1], POLICY)


@pytest.fixture(scope="module")
def costs(model, table, windows):
    return s.activation_costs(model, table, windows[:1], policy=POLICY, progress=False)["output"]


@pytest.mark.parametrize("granularity", ["uniform", "per_layer", "per_kv", "per_head"])
def test_solve_against_all_choices(granularity, rng):
    """One layer of two heads: every choice that shares labels as it must, by enumeration."""
    table = make_table(geometry(layers=1, kv_heads=2, v_dim=16))
    costs = rng.uniform(1, 9, (4, 1)) / np.array([[1, 3, 20]]) * rng.uniform(0.8, 1.2, (4, 3))
    group = r.groups(table, granularity)
    want = {"uniform": [0, 0, 1, 1], "per_layer": [0] * 4, "per_kv": [0, 0, 1, 1],
            "per_head": [0, 1, 2, 3]}  # fmt: skip
    assert group.tolist() == want[granularity]
    every = [np.array(x)[group] for x in itertools.product(range(3), repeat=group.max() + 1)]
    for bits in (2, 2.6, 3.3, 4, 9):  # a scale is one more per channel here
        limit = int(bits * table.channels)
        best = min(r.total(costs, x) for x in every if table.total(x) <= limit)
        got = r.solve(table, costs, limit, granularity)
        assert table.total(got) <= limit
        assert all(len(set(got[group == g])) == 1 for g in group)
        # Hull and exchange are exact to a step of one row: `allocate` proves more where it matters.
        assert best <= r.total(costs, got) <= 1.15 * best


def test_too_small_a_budget_names_the_smallest(table):
    costs = np.ones(table.sizes.shape)
    smallest = table.sizes.min(axis=1).sum()
    with pytest.raises(TurboqError, match=f"smallest per_kv plan .* has {smallest / 128:.4g}"):
        r.solve(table, costs, int(smallest) - 1, "per_kv")
    assert table.total(r.solve(table, costs, int(smallest), "per_kv")) == smallest
    with pytest.raises(ValueError, match="granularity='per_token'"):
        r.groups(table, "per_token")


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
        return r.solve(table, costs, limit)

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


def learned_again(model, windows, table, folder, **options):
    return learn_plan(
        model, 3.4, fit=windows[:2], check=windows[2:], policy=POLICY, table=table,
        rounds=2, folder=folder, progress=False, **options,
    )  # fmt: skip


def test_learned_plan(model, windows, table, tmp_path):
    found = learned_again(model, windows, table, tmp_path / "run", source=Provenance(seed=4))
    plan, report = found.plan, found.report
    assert report["kept"] in ("solved", "refined")
    check = report["check"]
    assert all(row["bits_per_channel"] <= 3.4 for row in check.values())
    assert check[report["kept"]]["kl_mean"] == min(row["kl_mean"] for row in check.values())
    assert check[report["kept"]]["kl_mean"] < check["uniform"]["kl_mean"]
    assert plan.bits_per_channel() == pytest.approx(report["bits_per_channel"])
    assert plan.provenance == Provenance(seed=4)
    # What the plan says of itself is what the quality table measures.
    measured = plan.quality.measured[0]
    row = evaluate(model, [("it", plan, found.arrays)], windows[2:], text="x", progress=False).rows[
        0
    ]
    assert measured.kl_mean == pytest.approx(row["kl_mean"], rel=TOL["kl_model_rel"])
    assert plan.quality.predicted.kl_mean == pytest.approx(measured.kl_mean, rel=0.6)
    save(plan, found.arrays, tmp_path / "plan")
    assert load(tmp_path / "plan")[0].quality == plan.quality
    # Continued from its files, or started anew: the same plan.
    for folder in (tmp_path / "run", None):
        again = learned_again(model, windows, table, folder, source=Provenance(seed=4))
        assert again.plan == plan
        assert again.report == report


def test_uniform_is_kept_where_it_is_better(model, windows, table, monkeypatch):
    """Costs that lie: giving more bits to what matters least."""
    real = s.activation_costs

    def upside_down(*args, **options):
        good = real(*args, **options)["output"]
        order = good[:, :1].sum() / good[:, :1]
        return {"output": good[:, :1] * order**2 / np.array([[1.0, 4, 16]])}

    monkeypatch.setattr("turboq_calibrate.choose.learn.activation_costs", upside_down)
    report = learn_plan(
        model, 3.4, fit=windows[:1], check=windows[2:], policy=POLICY, table=table, rounds=0,
        progress=False,
    ).report  # fmt: skip
    check = report["check"]
    assert check["solved"]["kl_mean"] > check["uniform"]["kl_mean"]
    assert report["kept"] == "uniform"


def test_uniform_granularity(model, windows, table):
    report = learned_again(model, windows, table, None, granularity="uniform").report
    keys = [x for x, u in zip(report["chosen"], table.units, strict=True) if u.side == "k"]
    assert len(set(keys)) == 1
    assert report["refinement"] == []
    got = plan_kl(model, table, windows[2:], [np.array(report["chosen"])], policy=POLICY)
    assert got[0].tolist() == report["check"]["uniform"]["kl_windows"]


def test_default_candidates_surround_the_budget(model, windows):
    labels = [m.label for m in default_makers(2.75)]
    assert labels[0] == "transform 1.25"
    assert "transform 2.75" in labels
    assert labels[-1] == "transform 4.75"
    with pytest.raises(TurboqError, match=r"budget_bits=0\.5"):
        default_makers(0.5)
    found = [
        c.build_table(
            model_geometry(model),
            default_makers(3, gain="code"),
            collect(model, windows[:2], skip=2),
        )
        for collect in (collect_samples, collect_gradient_samples)
    ]
    for table in found:
        most = 16 * np.array([float(label.split()[1]) for label in table.labels])
        assert np.all(table.sizes <= most)
        assert np.all(table.sizes > most - 16)
    assert found[0].sha256 != found[1].sha256
