"""Costs predicted from what was observed, against the formula in float64; how they order units."""

import jax.numpy as jnp
import numpy as np
import pytest
from plan_cases import geometry
from tolerances import TOL

from turboq.codecs import Exact, PerHead, TurboQuantMSE
from turboq.codecs.fit_transform import fit_heads
from turboq.codecs.observed import Observed
from turboq.errors import TurboqError
from turboq_calibrate.candidates.makers import learned, named
from turboq_calibrate.candidates.table import build_table
from turboq_calibrate.cost import agreement as report
from turboq_calibrate.cost.predicted import predicted_costs

TEXTS = 3
RIDGE = 1e-2  # of the metric's mean eigenvalue, in a token's weight


@pytest.fixture
def seen(rng):
    """Two layers; texts of different lengths and scales; a gradient per token."""
    found = {}
    for layer in geometry().cache_layers:
        for side, dim in (("k", layer.k_dim), ("v", layer.v_dim)):
            text = np.repeat(np.arange(TEXTS, dtype=np.int32), (60, 30, 10))
            rng.shuffle(text)
            shape = (layer.kv_heads, len(text), dim)
            x = rng.normal(size=shape) * rng.uniform(0.5, 2, (layer.kv_heads, 1, dim)) + 1
            g = rng.normal(size=shape) * rng.uniform(0.01, 0.1, (layer.kv_heads, 1, dim))
            g *= 1 + text[None, :, None]
            found[layer.index, side] = Observed.of(
                x.astype(np.float32), g.astype(np.float32), text=text
            )
    return found


def table_of(seen, makers=None):
    some = [
        named("tq 2", TurboQuantMSE(dim=16, bits=2)),
        named("learned 3", PerHead(dim=16, bits=3)),
        *learned({"transform 2.5": 2.5}),
        named("exact", Exact(dim=16, dtype="float32")),
    ]
    return build_table(geometry(), makers or some, lambda layer, side: seen[layer, side])


def oracle(x, g, text, codec, arrays):
    """Cost [X] of one head, the module's formula token by token."""
    own = {name: jnp.asarray(values) for name, values in arrays.items()}
    back = codec.decode(own, codec.encode(own, jnp.asarray(x)))
    e, g = np.asarray(back, np.float64) - x, g.astype(np.float64)
    fisher = sum(np.outer(row, row) for row in g) / (2 * len(g))
    floor = RIDGE * np.trace(fisher) / len(fisher) * np.eye(len(fisher))
    weights = np.array([row @ np.linalg.solve(fisher + floor, row) for row in g])
    weights /= weights.mean()
    cost = [w * (a @ fisher @ a) / 2 + (b @ a) ** 2 / 4
            for w, a, b in zip(weights, e, g, strict=True)]  # fmt: skip
    return [np.mean([c for c, t in zip(cost, text, strict=True) if t == n]) for n in range(TEXTS)]


def test_costs_are_the_formula(seen):
    table = table_of(seen)
    got = predicted_costs(table, lambda layer, side: seen[layer, side])
    assert got.shape == (12, 4, TEXTS)
    for u, unit in enumerate(table.units):
        own = seen[unit.layer, unit.side]
        for c in (0, 1):
            option = table.options[unit.layer, unit.side][c]
            want = oracle(
                own.x[unit.head], own.g[unit.head], own.text, option.codecs[unit.head],
                option.arrays[unit.head],
            )  # fmt: skip
            np.testing.assert_allclose(got[u, c], want, rtol=TOL["sensitivity_rel"])
    assert np.all(got[:, :3] > 0)
    assert not got[:, 3].any()  # an exact candidate costs nothing


def test_learned_candidates_know_their_costs(seen):
    """Nothing is coded, nor observed again; the rates are the fit's own."""
    table = table_of(seen, learned({"2": 2, "3": 3}))

    def never(layer, side):
        raise AssertionError

    got = predicted_costs(table, never)
    for unit, costs in zip(table.units, got, strict=True):
        fit = fit_heads(seen[unit.layer, unit.side])[unit.head]
        options = table.options[unit.layer, unit.side]
        for c, option in enumerate(options):
            want = fit.cost(option.codecs[unit.head].segments)
            np.testing.assert_array_equal(costs[c], want)


def test_what_the_fit_says_is_what_coding_gives(seen):
    """A learned transform's own costs and those of its codec on the sample: the same nats."""
    table = table_of(seen, learned({"3": 3}))
    known = predicted_costs(table, lambda layer, side: seen[layer, side])
    for key, (option,) in table.options.items():
        object.__setattr__(option, "costs", None)
        assert table.options[key][0].costs is None
    coded = predicted_costs(table, lambda layer, side: seen[layer, side])
    # The fit leaves products of different coordinates' errors out; they average out over tokens.
    np.testing.assert_allclose(known.sum(axis=0), coded.sum(axis=0), rtol=0.1)


def test_without_gradients_there_are_no_nats(seen):
    blind = {key: Observed.of(own.x, text=own.text) for key, own in seen.items()}
    table = table_of(blind, [named("tq 2", TurboQuantMSE(dim=16, bits=2))])
    with pytest.raises(TurboqError, match="turboquant_mse has no predicted cost without gradients"):
        predicted_costs(table, lambda layer, side: blind[layer, side])


def test_report_rows_and_table(seen, rng):
    table = table_of(seen)
    units = len(table.units)
    kl = np.full((units, 4), np.nan)
    kl[:, 2] = rng.permutation(units) + 1.0
    predicted = {"right": kl * 2, "wrong": -kl, "flat": np.ones((units, 4))}
    rows = report.compare_scores(table, predicted, kl)
    assert [(r["candidate"], r["score"]) for r in rows] == [
        ("transform 2.5", name) for name in predicted
    ]
    assert rows[0]["spearman"]["all"] == pytest.approx(1)
    assert rows[1]["spearman"]["all"] == pytest.approx(-1)
    assert rows[2]["spearman"]["all"] is None
    assert rows[0]["ratio"] == pytest.approx(2)
    text = report.format_scores(rows)
    assert len({len(line) for line in text.splitlines()}) == 1
    assert "transform 2.5" in text


def test_spearman():
    """d = (0, 1, -1, 0): 1 - 6 * 2 / (4 * 15); ties share their mean rank."""
    a = np.array([1.0, 2.0, 3.0, 9.0])
    assert report.spearman(a, np.array([1.0, 5.0, 2.0, 7.0])) == pytest.approx(0.8)
    assert report.spearman(a, np.array([1.0, 1.0, 2.0, 3.0])) == pytest.approx(
        np.corrcoef([1, 2, 3, 4], [1.5, 1.5, 3, 4])[0, 1]
    )
    assert report.spearman(a[:2], a[:2]) is None
