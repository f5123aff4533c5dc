"""Fits of `transform`: moments and weights, costs against the codec, sizes, held-out cost."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fit_cases import transform_at
from tolerances import TOL

from turboq.codecs import measured_costs as measured
from turboq.codecs.distortion_curves import distortion_curve
from turboq.codecs.fit_basis import moments, token_weights
from turboq.codecs.fit_transform import (
    TransformOptions,
    fit_heads,
    head_rates,
    held_out_cost,
)
from turboq.codecs.measured_costs import SPREADS, measured_costs
from turboq.codecs.observed import Observed, subset
from turboq.errors import TurboqError
from turboq.numbers.codebook import lloyd_max

DIM, HEADS, TOKENS = 16, 2, 900


def observed(seed=0, gradients=True, tokens=TOKENS) -> Observed:
    """Correlated vectors with a mean and heavy tails; gradients of a few tokens dominate."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(HEADS, DIM, DIM)) * 0.7 ** np.arange(DIM)
    x = rng.standard_t(5, size=(HEADS, tokens, DIM)) @ np.swapaxes(mix, 1, 2) + 2.0
    g = rng.normal(size=x.shape) @ rng.normal(size=(HEADS, DIM, DIM)) * 0.1
    g = g * rng.exponential(size=(1, tokens, 1))
    text = np.repeat(np.arange(3, dtype=np.int32), -(-tokens // 3))[:tokens]
    x, g = x.astype(np.float32), g.astype(np.float32)
    return Observed.of(x, g if gradients else None, text=text)


def test_weights_find_the_token_that_matters():
    rng = np.random.default_rng(2)
    g = rng.normal(size=(100, 8))
    g[17] *= 30
    metric = g.T @ g / 200
    w = token_weights(g, metric)
    ridge = 1e-2 * np.trace(metric) / 8 * np.eye(8)
    due = np.einsum("nd,de,ne->n", g, np.linalg.inv(metric + ridge), g)
    np.testing.assert_allclose(w, due / due.mean(), rtol=TOL["product_f32"])
    assert np.argmax(w) == 17
    assert w[17] > 10 * np.median(w)
    np.testing.assert_array_equal(token_weights(0 * g, metric), np.ones(100))


@pytest.mark.parametrize("emphasis", [0.0, 0.5, 1.0])
def test_moments_are_those_of_the_mixture(emphasis):
    """Against every token weighted (1 - a) + a w in float64, about the same mean."""
    seen = observed()
    x, g = seen.x[1].astype(np.float64), seen.g[1].astype(np.float64)
    energy = np.sum(g * g, axis=1)
    w = (1 - emphasis) + emphasis * energy / energy.mean()
    due = w @ x / len(x)
    mean, covariance = moments(seen, emphasis)
    np.testing.assert_allclose(mean[1], due, rtol=1e-12)
    z = x - due
    np.testing.assert_allclose(covariance[1], (z * w[:, None]).T @ z / len(x), atol=1e-9)
    shrunk, about = moments(seen, emphasis, shrink_mean=0.25)
    np.testing.assert_allclose(shrunk[1], 0.75 * due, rtol=1e-12)
    z = x - 0.75 * due
    np.testing.assert_allclose(about[1], (z * w[:, None]).T @ z / len(x), atol=1e-9)


def test_measured_costs_are_what_the_quantizer_does(rng):
    """Every coordinate, number of bits and text, by exhaustive search over points and spreads."""
    y = rng.standard_t(3, size=(3, 3000)).astype(np.float32)
    weights = rng.exponential(size=y.shape).astype(np.float32)
    text = rng.integers(0, 3, 3000)
    text[text == 1] = 2  # a text without tokens
    curve = distortion_curve("scalar")[:6]
    costs, spreads = measured_costs(y, weights, curve, text)
    assert costs.shape == (3, 3, 6)
    for bits in range(6):
        points = lloyd_max("gaussian", bits) if bits else np.zeros(1)
        for i, row in enumerate(y.astype(np.float64)):
            left = [np.min((row[:, None] - m * points) ** 2, axis=1) * weights[i] for m in SPREADS]
            best = int(np.argmin([e.sum() for e in left]))
            assert spreads[i, bits] == (SPREADS[best] if bits else 1.0)
            due = [left[best][text == t].sum() for t in range(3)]
            np.testing.assert_allclose(costs[:, i, bits], due, rtol=1e-9, atol=1e-12)


def test_bins_are_found_by_table_as_by_search():
    """At every edge, its neighbours in float32 and float64, and far outside."""
    bins = measured._bins(8)
    near = [np.nextafter(bins.edges, side) for side in (-np.inf, np.inf)]
    y = np.concatenate([bins.edges, *near, [-1e30, 1e30]])
    for values in (y, y.astype(np.float32)):
        np.testing.assert_array_equal(
            bins.of(values), np.searchsorted(bins.edges, values, side="right")
        )


def test_measured_costs_are_the_closed_form_on_a_gaussian_and_stretch_for_a_heavy_token(rng):
    y, curve = rng.normal(size=(2, 20000)), distortion_curve("trellis", 4)
    weight = np.full(y.shape, 1 / y.shape[1])
    costs, spreads = measured_costs(y, weight, curve)
    np.testing.assert_allclose(costs[0, 0], curve, rtol=0.05)
    assert np.all(spreads[0, 2:] == 1)
    y[1, 5], weight[1, 5] = 7.0, 1.0
    costs, spreads = measured_costs(y, weight, curve)
    assert np.all(spreads[1, 2:] > 1)
    assert np.all(costs[0, 1, 2:] > 2 * costs[0, 0, 2:])


@pytest.mark.parametrize("shrink", [0.0, 0.3])
def test_costs_are_those_of_the_codec_on_each_text(shrink):
    """The quadratic form of the codec's own errors, token by token: half of each estimate."""
    seen = observed()
    options = TransformOptions(shrink=shrink, shrink_mean=shrink, emphasis=0.25)
    fits = fit_heads(seen, options)
    for h, (codec, arrays) in enumerate(transform_at(seen, 3 * DIM, options, fits=fits)):
        basis = fits[h].basis
        assert codec.bits_per_vector <= 3 * DIM
        lifted = {n: jnp.asarray(a) for n, a in arrays.items()}
        back = jax.jit(lambda x, c=codec, a=lifted: c.decode(a, c.encode(a, x)))(seen.x[h])
        e = np.asarray(back, np.float64) - seen.x[h]
        # In coordinates of the basis, each by itself.
        z = e @ basis.analysis.T
        w = token_weights(seen.g[h], seen.metric[h])
        slope = seen.g[h].astype(np.float64) @ basis.synthesis
        each = 0.5 * w * (z**2 @ basis.variances) + 0.25 * np.sum((slope * z) ** 2, axis=1)
        due = [each[seen.text == t].mean() for t in range(3)]
        np.testing.assert_allclose(fits[h].cost(codec.segments), due, rtol=TOL["fit_cost"])
        table = head_rates(fits, options)[h]
        total = table.error[table.at(3 * DIM)]
        np.testing.assert_allclose(total, each.mean(), rtol=TOL["fit_cost"])


@pytest.mark.parametrize("quantizer", ["scalar", "window"])
def test_costs_know_of_the_gain(quantizer):
    """Tokens of very different sizes: what a codec with a gain costs, against its own errors."""
    plain = observed(3)
    size = np.exp(np.random.default_rng(5).normal(size=(1, TOKENS, 1))).astype(np.float32)
    seen = Observed.of((plain.x - 2) * size + 2, plain.g, text=plain.text)
    options = TransformOptions(quantizer=quantizer, states=16, gain="code")
    static = dataclasses.replace(options, gain="none")
    fits, without = fit_heads(seen, options), fit_heads(seen, static)
    for h, (codec, arrays) in enumerate(transform_at(seen, 3 * DIM + 4, options, fits=fits)):
        basis, lifted = fits[h].basis, {n: jnp.asarray(a) for n, a in arrays.items()}
        back = jax.jit(lambda x, c=codec, a=lifted: c.decode(a, c.encode(a, x)))(seen.x[h])
        z = (np.asarray(back, np.float64) - seen.x[h]) @ basis.analysis.T
        w = token_weights(seen.g[h], seen.metric[h])
        slope = seen.g[h].astype(np.float64) @ basis.synthesis
        due = np.mean(0.5 * w * (z**2 @ basis.variances) + 0.25 * np.sum((slope * z) ** 2, axis=1))
        costs = [np.mean(fit[h].cost(codec.segments)) for fit in (fits, without)]
        # A choice of codes errs less than costs know of, and neighbours share bits.
        tolerance = TOL["fit_gain"] if quantizer == "scalar" else TOL["fit_searched_gain"]
        np.testing.assert_allclose(costs[0], due, rtol=tolerance)
        assert costs[0] < 0.6 * costs[1]


@pytest.mark.parametrize("gradients", [True, False])
def test_held_out_cost_is_that_of_the_codecs(gradients):
    """On tokens that were not fitted, with decoded errors and the other part's own metric."""
    whole = observed(gradients=gradients)
    fit, rest = subset(whole, whole.text != 2), subset(whole, whole.text == 2)
    options = TransformOptions(ridge=0.03)
    fits = fit_heads(fit, options)
    due = 0.0
    for h, (codec, arrays) in enumerate(transform_at(fit, 40, options, fits=fits)):
        lifted = {n: jnp.asarray(a) for n, a in arrays.items()}
        back = jax.jit(lambda x, c=codec, a=lifted: c.decode(a, c.encode(a, x)))(rest.x[h])
        e = np.asarray(back, np.float64) - rest.x[h]
        quadratic = np.einsum("nd,de,ne->n", e, rest.metric[h], e)
        if rest.g is not None:
            w = token_weights(rest.g[h], rest.metric[h], ridge=0.03)
            quadratic = 0.5 * w * quadratic + 0.25 * np.sum(rest.g[h] * e, axis=1) ** 2
        due += quadratic.mean()
    got = held_out_cost(fits, rest, 40 / DIM, options)
    assert got == pytest.approx(due, rel=TOL["fit_cost"])
    # More bits cost less, and a trellis less than a scalar code.
    assert held_out_cost(fits, rest, 4.0, options) < got
    trellis = dataclasses.replace(options, quantizer="trellis", states=4)
    assert held_out_cost(fit_heads(fit, trellis), rest, 40 / DIM, trellis) < got


def test_shrinking_helps_where_tokens_are_few():
    """64 tokens of 16 white dimensions: the sampled covariance is noise, the isotropic is right."""
    rng = np.random.default_rng(4)
    x = rng.normal(size=(HEADS, 2064, DIM)).astype(np.float32)
    few, many = Observed.of(x[:, :64]), Observed.of(x[:, 64:])
    cost = [
        held_out_cost(fit_heads(few, o), many, 2.0, o)
        for o in (TransformOptions(), TransformOptions(shrink=0.9, shrink_mean=0.9))
    ]
    assert cost[1] < 0.97 * cost[0]


@pytest.mark.parametrize("options", [{"gain": "code"}, {"codebook": "fitted", "gain": "float16"}])
def test_codecs_at_a_size_keep_it_and_fit_their_segments(options):
    seen, chosen = observed(), TransformOptions(**options)
    size = 3 * DIM + chosen.overhead(DIM)
    for h, (codec, arrays) in enumerate(transform_at(seen, size, chosen)):
        assert 2.4 * DIM < codec.bits_per_vector <= size
        assert {n: a.shape for n, a in arrays.items()} == codec.array_shapes
        # The codec fits itself to the same arrays.
        for name, values in codec.fit(seen).items():
            np.testing.assert_allclose(
                values[h], arrays[name], TOL["fitted_alone"], TOL["fitted_alone_near_zero"]
            )


def test_refusals():
    seen = observed(tokens=DIM - 1)
    with pytest.raises(TurboqError, match="needs moments of 16 tokens or more, 15 tokens are too"):
        fit_heads(seen)
    for field in ("shrink", "shrink_mean", "emphasis"):
        with pytest.raises(ValueError, match=field):
            TransformOptions(**{field: 1.5})
    with pytest.raises(ValueError, match="ridge"):
        TransformOptions(ridge=-1.0)
    with pytest.raises(ValueError, match="smallest"):
        transform_at(observed(), 7)
