"""Scores from activations against a float64 oracle whose gradients come from the whole model."""

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import TOL

from turboq.cache.layer import TokenPolicy
from turboq.codecs import Exact, TurboQuantMSE
from turboq_calibrate import cost as s
from turboq_calibrate.candidates import table as c
from turboq_calibrate.cost import agreement as report
from turboq_calibrate.cost.side_by_side import quantized
from turboq_calibrate.models import load_model
from turboq_calibrate.models.geometry import model_geometry
from turboq_calibrate.models.model import forward
from turboq_calibrate.observe.samples import collect_samples

GOLDEN = Path(__file__).parents[2] / "golden"
SINKS, SEED = 2, 3


def make_table(model, windows):
    dim = model.spec.layers[0].head_dim
    makers = [
        c.data_free("tq 2", TurboQuantMSE(dim=dim, bits=2)),
        c.learned("transform 2", 2),
        c.data_free("exact", Exact(dim=dim, dtype="float32")),
    ]
    return c.build_table(model_geometry(model), makers, collect_samples(model, windows))


def small_table(model):
    dim = model.spec.layers[0].head_dim
    return c.build_table(
        model_geometry(model), [c.data_free("tq 2", TurboQuantMSE(dim=dim, bits=2))]
    )


def make_windows(model, count=2, length=15):
    rng = np.random.default_rng(5)
    return rng.integers(0, model.spec.vocab, (count, length)).astype(np.int32)


@pytest.fixture(scope="module")
def model():
    return load_model(GOLDEN / "llama3")


def labels_of(logits, seed, shape):
    """Inverse of the cumulative distribution at Philox's uniforms, in float64."""
    u = (np.random.Philox(key=seed).random_raw(int(np.prod(shape))) >> 40) / 2.0**24
    x = np.asarray(logits, np.float64)
    p = np.exp(x - x.max(-1, keepdims=True))
    below = np.cumsum(p / p.sum(-1, keepdims=True), axis=-1)
    return (below < u.reshape(shape)[..., None]).sum(-1)


def gradients(model, windows, recent, errors=None):
    """q, k, v, and gradients at k, v (where read quantized) and at the attention output projected
    onto the residual stream, by one jax.grad through the whole model."""
    specs = model.spec.layers
    count, length = windows.shape

    def attend(spec, q, k, v, positions, state):
        # All of p from one softmax over (quantized | exact) keys, by masks; unlike the product.
        dk, dv, mid = state
        group = spec.heads // spec.kv_heads
        t = np.arange(length)
        far = (t[None, :] <= t[:, None] - recent) & (t[None, :] >= SINKS)
        seen = t[None, :] <= t[:, None]
        if spec.window is not None:
            seen &= t[None, :] > t[:, None] - spec.window
        keys, more = jnp.repeat(k, group, 2), jnp.repeat(dk, group, 2)
        raw = jnp.einsum("bthd,bshd->bhts", q, keys, precision="highest")
        extra = jnp.einsum("bthd,bshd->bhts", q, more, precision="highest")
        raw = (raw + jnp.where(far[None, None], extra, 0.0)) * spec.scale
        p = jax.nn.softmax(jnp.where(seen[None, None], raw, -jnp.inf), axis=-1)
        out = jnp.einsum("bhts,bshd->bthd", p, jnp.repeat(v, group, 2), precision="highest")
        p_far = jnp.where(far[None, None], p, 0.0)
        out += jnp.einsum("bhts,bshd->bthd", p_far, jnp.repeat(dv, group, 2), precision="highest")
        return out + mid, (q, k, v)

    def zeros(spec, heads, dim):
        return jnp.zeros((count, length, heads, dim))

    states = [
        (
            zeros(spec, spec.kv_heads, spec.head_dim),
            zeros(spec, spec.kv_heads, spec.v_head_dim),
            zeros(spec, spec.heads, spec.v_head_dim),
        )
        for spec in specs
    ]
    if errors is not None:
        states = [(e["k"], e["v"], z[2]) for e, z in zip(errors, states, strict=True)]
    logits, kept = forward(model, windows, attend, states)
    labels = jnp.asarray(labels_of(logits, SEED, windows.shape))

    def fixed(states):
        logits = forward(model, windows, attend, states)[0]
        chosen = jnp.take_along_axis(jax.nn.log_softmax(logits), labels[..., None], axis=-1)
        return -jnp.sum(chosen[:, :-1])

    return kept, jax.grad(fixed)(states)


def oracle(model, table, windows, recent, errors=None):
    """All scores in float64, loops over everything."""
    kept, grads = gradients(model, windows, recent, errors)
    count, length = windows.shape
    total = {name: np.zeros(table.sizes.shape) for name in s.SCORES}
    for i, spec in enumerate(model.spec.layers):
        q, k, v = (np.asarray(x, np.float64) for x in kept[i])
        g_k, g_v, g_mid = (np.asarray(x, np.float64) for x in grads[i])
        group = spec.heads // spec.kv_heads
        w_o = np.asarray(model.layer(i)["o"], np.float64)
        # The gradient at the residual stream: W_o^T g_x = g_mid, and W_o is not square, so take it
        # from the sum's other operand: least squares is exact where W_o^T has full column rank.
        g_x = np.linalg.lstsq(w_o.T, g_mid.reshape(count * length, -1).T, rcond=None)[0].T
        fisher = (g_x**2).mean(axis=0)
        for unit in (u for u in table.units if u.layer == i):
            at, h = table.index[unit], unit.head
            x, g = (k, g_k) if unit.side == "k" else (v, g_v)
            for n, option in enumerate(table.options[i, unit.side]):
                x_hat = quantized(option, jnp.asarray(x, jnp.float32))
                e = np.asarray(x_hat, np.float64) - x
                e[:, :SINKS] = 0
                e, gh, xh = e[:, :, h], g[:, :, h], x[:, SINKS:, h].reshape(-1, x.shape[-1])
                flat_e, flat_g = e.reshape(-1, e.shape[-1]), gh.reshape(-1, e.shape[-1])
                tokens = count * (length - SINKS)
                total["fisher"][at, n] = (gh**2 * e**2).sum() / 2
                total["directional"][at, n] = ((gh * e).sum(-1) ** 2).sum() / 2
                mean_outer = flat_g.T @ flat_g / tokens
                total["matrix"][at, n] = (mean_outer * (flat_e.T @ flat_e)).sum() / 2
                total["mse"][at, n] = (e**2).sum() / ((xh - xh.mean(0)) ** 2).sum()
                for b in range(count):
                    for t in range(length):
                        seen = np.arange(t + 1)
                        if spec.window is not None:
                            seen = seen[seen > t - spec.window]
                        far = (seen <= t - recent) & (seen >= SINKS)
                        add = np.zeros(w_o.shape[0])
                        for j in range(h * group, (h + 1) * group):
                            logits = spec.scale * (k[b, seen, h] @ q[b, t, j])
                            p = np.exp(logits - logits.max())
                            p /= p.sum()
                            if unit.side == "v":
                                change = (p * far) @ e[b, seen]
                            else:
                                d = spec.scale * (e[b, seen] @ q[b, t, j]) * far
                                total["logit"][at, n] += (p @ d**2 - (p @ d) ** 2) / 2
                                other = np.exp(logits + d - (logits + d).max())
                                change = (other / other.sum() - p) @ v[b, seen, h]
                            dim = v.shape[-1]
                            add += w_o[:, j * dim : (j + 1) * dim] @ change
                        total["output_error"][at, n] += add @ add
                        total["output"][at, n] += (fisher * add**2).sum() / 2
    scored = count * (length - 1)
    return {name: x / (1 if name == "mse" else scored) for name, x in total.items()}


@pytest.mark.parametrize(
    ("name", "recent", "around"), [("llama3", 0, True), ("qwen2_window", 2, False)]
)
def test_scores_match_the_oracle(name, recent, around):
    model = load_model(GOLDEN / name)
    windows = make_windows(model)
    table = make_table(model, windows)
    policy = TokenPolicy(sinks=SINKS, recent=recent, exact_dtype="float32")
    plan = np.arange(len(table.units)) % 2 if around else None
    errors = None
    if around:
        run = s.Engine(model, table, windows, policy).run(plan)
        stored = (np.arange(windows.shape[1]) >= SINKS)[None, :, None, None]
        errors = [
            {side: jnp.where(stored, e, 0.0) for side, e in added.items()} for added in run.errors
        ]
    want = oracle(model, table, windows, recent, errors)
    got = s.activation_costs(
        model, table, windows, policy=policy, base=plan, seed=SEED, window_batch=2, progress=False
    )
    assert got.keys() == want.keys() == set(s.SCORES)
    for score, values in want.items():
        np.testing.assert_allclose(
            got[score], values, rtol=TOL["sensitivity_rel"], atol=1e-12, err_msg=score
        )
        costs = values[:, :2]
        if score == "logit":
            costs = costs[[u.side == "k" for u in table.units]]
        assert np.all(costs > 1e-6), score
        assert not values[:, 2].any(), score  # an exact candidate costs nothing


def test_windows_may_be_streamed(model):
    windows, table = make_windows(model, count=2), small_table(model)
    policy = TokenPolicy(sinks=SINKS)
    options = {"policy": policy, "seed": SEED, "progress": False}
    whole = s.activation_costs(model, table, windows, window_batch=2, **options)
    parts = s.activation_costs(model, table, windows, window_batch=1, **options)
    for score in ("fisher", "directional", "output_error", "logit"):  # sums over tokens
        np.testing.assert_allclose(
            parts[score], whole[score], rtol=TOL["sensitivity_rel"], atol=1e-12, err_msg=score
        )
    again = s.activation_costs(model, table, windows, window_batch=1, **options)
    assert all(np.array_equal(again[n], parts[n]) for n in s.SCORES)
    other = s.activation_costs(model, table, windows, **(options | {"seed": SEED + 1}))
    assert not np.allclose(other["fisher"], parts["fisher"], rtol=1e-2)
    np.testing.assert_allclose(
        other["logit"], parts["logit"], rtol=TOL["sensitivity_rel"], atol=1e-12
    )


def test_predictions_are_the_kl_they_predict(model):
    """In nats and in order, on a model where both are known."""
    windows, table = make_windows(model, count=4, length=48), small_table(model)
    policy = TokenPolicy(sinks=SINKS)
    costs = s.activation_costs(model, table, windows, policy=policy, window_batch=4, progress=False)
    engine = s.Engine(model, table, windows, policy)
    kl = s.isolated_costs(table, s.measure(engine, s.unit_moves(table), progress=False))
    rows = {r["score"]: r for r in report.compare_scores(table, costs, kl)}
    for score in ("fisher", "directional", "matrix", "output"):
        assert rows[score]["spearman"]["all"] > 0.85
        assert 1 / 1.4 < rows[score]["ratio"] < 1.4
    assert rows["output"]["spearman"]["all"] > rows["mse"]["spearman"]["all"] + 0.3


def test_report_rows_and_table(rng):
    model = load_model(GOLDEN / "mistral")
    table = make_table(model, make_windows(model))
    units = len(table.units)
    kl = np.full((units, 3), np.nan)
    kl[:, 1] = rng.permutation(units) + 1.0
    predicted = {"right": kl * 2, "wrong": -kl, "flat": np.ones((units, 3))}
    rows = report.compare_scores(table, predicted, kl)
    assert [(r["candidate"], r["score"]) for r in rows] == [
        ("transform 2", name) for name in predicted
    ]
    assert rows[0]["spearman"]["all"] == pytest.approx(1)
    assert rows[1]["spearman"]["all"] == pytest.approx(-1)
    assert rows[2]["spearman"]["all"] is None
    assert rows[0]["ratio"] == pytest.approx(2)
    text = report.format_scores(rows)
    assert len({len(line) for line in text.splitlines()}) == 1
    assert "transform 2" in text


def test_spearman():
    """d = (0, 1, -1, 0): 1 - 6 * 2 / (4 * 15); ties share their mean rank."""
    a = np.array([1.0, 2.0, 3.0, 9.0])
    assert report.spearman(a, np.array([1.0, 5.0, 2.0, 7.0])) == pytest.approx(0.8)
    assert report.spearman(a, np.array([1.0, 1.0, 2.0, 3.0])) == pytest.approx(
        np.corrcoef([1, 2, 3, 4], [1.5, 1.5, 3, 4])[0, 1]
    )
    assert report.spearman(a[:2], a[:2]) is None
