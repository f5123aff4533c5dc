"""KL, agreement, perplexity and intervals against float64 NumPy and hand-computed cases."""

import math

import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import TOL

from turboq_calibrate.cost import metrics


def log_softmax_f64(logits):
    x = np.asarray(logits, np.float64)
    x = x - x.max(axis=-1, keepdims=True)
    return x - np.log(np.exp(x).sum(axis=-1, keepdims=True))


def kl_f64(p_logits, q_logits):
    p, q = log_softmax_f64(p_logits), log_softmax_f64(q_logits)
    return (np.exp(p) * (p - q)).sum(axis=-1)


def kl_error_bound(kl):
    """e per log-ratio, weighted by p: e * E|d| <= e sqrt(E d^2) ~ e sqrt(2 KL), and e^2 at zero."""
    e = TOL["log_softmax_f32"]
    return e * np.sqrt(2 * kl) + TOL["kl_sum_f32"] * kl + e**2


def measure(p, q, targets):
    targets = jnp.asarray(targets, jnp.int32)
    exact = metrics.reference(jnp.asarray(p), targets)
    found = metrics.compare(exact, jnp.asarray(q), targets)
    return exact, {k: np.asarray(v, np.float64) for k, v in found.items()}


def test_two_tokens_by_hand():
    p = np.log(np.array([[0.5, 0.5], [0.5, 0.5]], np.float32))
    q = np.log(np.array([[0.25, 0.75], [0.25, 0.75]], np.float32))
    exact, found = measure(p, q, [0, 1])
    np.testing.assert_allclose(found["kl"], 0.5 * math.log(4 / 3), rtol=TOL["hand_f32"])
    np.testing.assert_allclose(found["nll"], [math.log(4), math.log(4 / 3)], rtol=TOL["hand_f32"])
    np.testing.assert_allclose(exact["nll"], math.log(2), rtol=TOL["hand_f32"])
    # The tie of P goes to the lower token, which Q ranks second.
    np.testing.assert_array_equal(found["top1"], [0, 0])
    # The other direction is another number: P and Q cannot be swapped unnoticed.
    _, swapped = measure(q, p, [0, 1])
    np.testing.assert_allclose(
        swapped["kl"], 0.25 * math.log(0.5) + 0.75 * math.log(1.5), rtol=TOL["hand_f32"]
    )


@pytest.mark.parametrize("noise", [1e-4, 1e-2, 0.1, 1.0, 3.0, 10.0])
@pytest.mark.parametrize("vocab", [320, 49152])
def test_against_float64(rng, noise, vocab):
    p = (3 * rng.standard_normal((8, vocab))).astype(np.float32)
    p[np.arange(8), rng.integers(0, vocab, 8)] += 12  # confident, like a language model
    q = (p + noise * rng.standard_normal(p.shape)).astype(np.float32)
    targets = rng.integers(0, vocab, 8)
    exact, found = measure(p, q, targets)
    want = kl_f64(p, q)
    assert (np.abs(found["kl"] - want) <= kl_error_bound(want)).all()
    rows = np.arange(8)
    for got, logits in ((exact["nll"], p), (found["nll"], q)):
        nll = -log_softmax_f64(logits)[rows, targets]
        np.testing.assert_allclose(got, nll, rtol=0, atol=TOL["log_softmax_f32"])
    np.testing.assert_array_equal(found["top1"], p.argmax(-1) == q.argmax(-1))


def test_equal_and_shifted_logits_have_no_divergence(rng):
    p = (3 * rng.standard_normal((4, 1000))).astype(np.float32)
    _, same = measure(p, p, [0, 1, 2, 3])
    np.testing.assert_array_equal(same["kl"], 0)
    np.testing.assert_array_equal(same["top1"], 1)
    _, moved = measure(p, p + np.float32(5), [0, 1, 2, 3])
    assert (moved["kl"] >= 0).all()
    assert (moved["kl"] <= kl_error_bound(np.zeros(4)) + TOL["log_softmax_f32"] ** 2).all()


def test_extreme_logits_stay_finite():
    p = np.array([[1e4, 0.0, -1e4]], np.float32)
    q = np.array([[-1e4, 0.0, 1e4]], np.float32)
    _, found = measure(p, q, [0])
    np.testing.assert_allclose(found["kl"], 2e4, rtol=TOL["hand_f32"])
    np.testing.assert_allclose(found["nll"], 2e4, rtol=TOL["hand_f32"])


def test_series_meets_the_plain_formula():
    x = np.linspace(-0.5, 0.5, 1001)
    got = np.asarray(metrics._series(jnp.asarray(x, jnp.float32)), np.float64)
    exact = x * x * sum((-x) ** k / math.factorial(k + 2) for k in range(20))
    np.testing.assert_allclose(got, exact, rtol=TOL["kl_series"], atol=1e-300)


def test_perplexity_is_over_tokens_not_windows():
    nll = np.array([[0.0, 0.0], [2.0, 2.0]])
    assert metrics.perplexity(nll) == pytest.approx(math.e, rel=TOL["f64"])


def test_bootstrap_against_a_plain_loop(rng):
    values = rng.random(7)
    raw = np.random.Philox(key=3).random_raw(50 * 7).reshape(50, 7)
    means = []
    for resample in raw.tolist():
        picked = [values[int((word >> 11) / 2**53 * 7)] for word in resample]
        means.append(sum(picked) / 7)
    want = np.percentile(means, [5, 95])
    got = metrics.bootstrap_ci(values, level=0.9, samples=50, seed=3)
    np.testing.assert_allclose(got, want, rtol=TOL["f64"])


def test_bootstrap_is_as_wide_as_theory_says(rng):
    values = rng.standard_normal(40)
    lo, hi = metrics.bootstrap_ci(values, samples=4000)
    # Resampling has the variance of the sample divided by N; 1.96 sd each side of the mean.
    half = 1.96 * values.std() / math.sqrt(40)
    assert (hi - lo) / 2 == pytest.approx(half, rel=TOL["bootstrap_width"])
    assert (hi + lo) / 2 == pytest.approx(values.mean(), abs=TOL["bootstrap_width"] * half)


def test_bootstrap_is_reproducible_and_seeded(rng):
    values = rng.random(9)
    a, b, c = (metrics.bootstrap_ci(values, seed=s) for s in (1, 1, 2))
    assert a == b != c
    assert metrics.bootstrap_ci(np.full(5, 0.25)) == (0.25, 0.25)
    assert metrics.bootstrap_ci(np.array([0.5])) is None  # one window says nothing about spread
    # Resamples of three windows, from Philox words that NumPy promises to keep.
    golden = metrics._resamples(3, 4, 20261122)
    np.testing.assert_array_equal(golden, [[1, 1, 0], [2, 2, 1], [2, 1, 0], [1, 1, 0]])


@pytest.mark.parametrize("bad", [{"level": 0.0}, {"level": 1.0}, {"samples": 0}])
def test_bootstrap_refuses(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        metrics.bootstrap_ci(np.array([0.5, 0.6]), **bad)


def test_summary_definitions(rng):
    kl = rng.exponential(size=(4, 250))
    nll, nll_exact = rng.random((2, 4, 250))
    top1 = (rng.random((4, 250)) < 0.7).astype(np.float64)
    m = metrics.TokenMetrics(kl=kl, nll=nll, nll_exact=nll_exact, top1=top1)
    row = m.summary(samples=200, seed=5)
    ordered = np.sort(kl.ravel())
    at = 0.99 * 999  # linear interpolation between the order statistics 989 and 990 (from zero)
    p99 = ordered[989] + (at - 989) * (ordered[990] - ordered[989])
    want = {
        "kl_mean": kl.sum() / 1000,
        "kl_median": (ordered[499] + ordered[500]) / 2,
        "kl_p99": p99,
        "top1": top1.sum() / 1000,
        "perplexity": math.exp(nll.sum() / 1000),
        "perplexity_ratio": math.exp((nll.sum() - nll_exact.sum()) / 1000),
    }
    for name, value in want.items():
        assert row[name] == pytest.approx(value, rel=TOL["f64"]), name
    ci = metrics.bootstrap_ci(kl.mean(axis=1), samples=200, seed=5)
    assert row["kl_ci"] == list(ci)
    assert m.summary(level=0.5, samples=200, seed=5)["kl_ci"] != row["kl_ci"]


def test_windows_stack_in_order():
    rows = [{k: np.full(3, i) for k in ("kl", "nll", "nll_exact", "top1")} for i in range(2)]
    stacked = metrics.TokenMetrics.stack(rows)
    np.testing.assert_array_equal(stacked.kl, [[0, 0, 0], [1, 1, 1]])
    assert stacked.kl.dtype == np.float64
