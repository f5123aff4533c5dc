"""Fisher gradients against the KL of a real perturbation; fits and plans of `transform`."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from turboq.cache.layer import TokenPolicy
from turboq.cache.simulate import simulate
from turboq.codecs.fit_transform import measured_costs, token_weights, weighted_moments
from turboq.codecs.transform import Transform
from turboq.codecs.water_filling import distortion_curve
from turboq_calibrate.fit.learned_plans import learned_plan, predicted_cost
from turboq_calibrate.fit.plan import model_geometry
from turboq_calibrate.fit.transform import Options, fit_heads, fit_transform, transform_at
from turboq_calibrate.models import load_model
from turboq_calibrate.models.decoder import default_positions, exact_attend, run_head, run_layer
from turboq_calibrate.models.model import embed_tokens
from turboq_calibrate.observe.gradients import GradientSamples, LayerGradients, collect_gradients
from turboq_calibrate.observe.samples import LayerSamples, collect_samples

GOLDEN = Path(__file__).parent.parent.parent / "golden" / "llama3"


@pytest.fixture(scope="module")
def model():
    return load_model(GOLDEN)


def shifted(spec, q, k, v, positions, state):
    """Plug: exact attention with offsets added to k and v."""
    return exact_attend(spec, q, k + state["k"], v + state["v"], positions, None)


def log_probabilities(model, tokens, offsets):
    x, positions = embed_tokens(model, tokens), default_positions(jnp.asarray(tokens))
    for i, spec in enumerate(model.spec.layers):
        x, _ = run_layer(spec, model.layer(i), x, positions, shifted, offsets[i])
    return np.asarray(jax.nn.log_softmax(run_head(model.spec, model.head_params(), x)), np.float64)


@pytest.mark.parametrize("side", ["k", "v"])
def test_gradients_predict_the_kl_of_a_small_error(model, side):
    """KL = 1/2 E[(sum_s g_s . e_s)^2] to second order; 600 draws have 6 % standard error."""
    rng = np.random.default_rng(0)
    tokens = rng.integers(0, model.spec.vocab, size=(1, 12)).astype(np.int32)
    found = collect_gradients(model, np.repeat(tokens, 600, axis=0), skip=0)
    errors, total = [], np.zeros(600)
    for spec, layer in zip(model.spec.layers, found, strict=True):
        zero = {"k": np.zeros((1, 12, spec.kv_heads, spec.head_dim), np.float32)}
        zero["v"] = np.zeros((1, 12, spec.kv_heads, spec.v_head_dim), np.float32)
        zero[side] = rng.normal(size=zero[side].shape).astype(np.float32)
        errors.append(zero)
        g = getattr(layer, side).reshape(spec.kv_heads, 600, 12, -1)
        total += np.einsum("kbtd,tkd->b", g, zero[side][0])
    due = 0.5 * np.mean(total**2)
    size = np.sqrt(2e-3 / due)  # a KL far above rounding and still quadratic
    scaled = [{n: jnp.asarray(e * size, jnp.float32) for n, e in x.items()} for x in errors]
    p = log_probabilities(model, tokens, [jax.tree.map(jnp.zeros_like, e) for e in scaled])
    q = log_probabilities(model, tokens, scaled)
    kl = np.sum(np.exp(p) * (p - q))
    assert abs(kl / (due * size**2) - 1) < 0.25


def test_metric_is_half_the_mean_of_squares():
    g = np.random.default_rng(1).normal(size=(2, 5, 3)).astype(np.float32)
    layer = LayerGradients(k=g, v=2 * g)
    due = sum(np.outer(row, row) for row in g[1].astype(np.float64)) / 10
    np.testing.assert_allclose(layer.metric("k")[1], due, rtol=1e-6)
    np.testing.assert_allclose(layer.metric("v")[1], 4 * due, rtol=1e-6)


def test_weights_find_the_token_that_matters():
    rng = np.random.default_rng(2)
    g = rng.normal(size=(100, 8))
    g[17] *= 30
    w = token_weights(g, g.T @ g / 200)
    assert np.argmax(w) == 17
    assert np.isclose(w.mean(), 1)
    assert w[17] > 10 * np.median(w)
    x = rng.normal(size=(100, 8)) + 3
    mean, covariance = weighted_moments(x, np.eye(100)[17] * 100)
    np.testing.assert_allclose(mean, x[17], rtol=1e-6)
    assert np.abs(covariance).max() < 1e-6


def test_measured_costs_are_the_closed_form_on_a_gaussian_and_stretch_for_a_heavy_token():
    rng = np.random.default_rng(3)
    y, curve = rng.normal(size=(20000, 2)), distortion_curve("scalar")[:5]
    costs, spreads = measured_costs(y, np.full(y.shape, 1 / len(y)), curve)
    np.testing.assert_allclose(costs[0], curve, rtol=0.05)
    assert np.all(spreads[0, 2:] == 1)
    y[5, 1], weight = 7.0, np.full(y.shape, 1 / len(y))
    weight[5, 1] = 1.0
    costs, spreads = measured_costs(y, weight, curve)
    assert np.all(spreads[1, 2:] > 1)
    assert np.all(costs[1, 2:] > 2 * costs[0, 2:])
    # What is claimed is what the quantizer does.
    from turboq.numbers.codebook import lloyd_max

    c = lloyd_max("gaussian", 3) * spreads[1, 3]
    nearest = c[np.argmin(np.abs(y[:, 1, None] - c), axis=1)]
    assert np.isclose(np.sum(weight[:, 1] * (y[:, 1] - nearest) ** 2), costs[1, 3])


@pytest.fixture(scope="module")
def fitted(model):
    tokens = np.random.default_rng(4).integers(0, model.spec.vocab, size=(6, 64)).astype(np.int32)
    samples, gradients = collect_samples(model, tokens), collect_gradients(model, tokens)
    options = Options(quantizer="scalar")
    fits = {
        (i, side): fit_heads(samples[i], side, options, gradients=gradients[i])
        for i in range(len(samples))
        for side in ("k", "v")
    }
    return samples, gradients, options, fits


def test_plans_keep_the_budget_and_finer_sharing_costs_less(model, fitted):
    *_, options, fits = fitted
    geometry, cost = model_geometry(model), {}
    for granularity in ("uniform", "per_layer", "per_head"):
        plan, arrays = learned_plan(
            geometry, fits, options, 2.5, granularity=granularity, policy=TokenPolicy(sinks=4)
        )
        assert plan.bits_per_channel() <= 2.5
        cost[granularity] = predicted_cost(plan, fits)
        layer = plan.kv_layer(0, arrays)
        kinds = {g.k for g in layer.groups}
        assert granularity == "per_head" or len(kinds) == 1
    assert cost["per_head"] <= cost["per_layer"] * 1.02
    assert cost["per_layer"] <= cost["uniform"] * 1.02
    with pytest.raises(ValueError, match="granularity"):
        learned_plan(geometry, fits, options, 2.5, granularity="per_token")


def test_transform_at_uses_what_it_is_given(fitted):
    samples, gradients, *_ = fitted
    layer = samples[0]
    dim = layer.k.shape[-1]
    heads = transform_at(layer, "k", 3 * dim, gain="code", gradients=gradients[0])
    assert len(heads) == len(layer.k)
    found = GradientSamples(**vars(layer), gradients=gradients[0])
    again = transform_at(found, "k", 3 * dim, gain="code")
    assert [codec for codec, _ in again] == [codec for codec, _ in heads]
    for codec, arrays in heads:
        assert 2.4 * dim < codec.bits_per_vector <= 3 * dim
        assert {n: a.shape for n, a in arrays.items()} == codec.array_shapes


def test_one_codec_for_all_heads_decodes_near_its_samples(fitted):
    samples, *_ = fitted
    layer = samples[0]
    heads, _, dim = layer.v.shape
    options = Options(quantizer="trellis", states=4)
    codec, arrays = fit_transform(options, layer, "v", bits_per_vector=4 * dim)
    assert isinstance(codec, Transform)
    again, _ = fit_transform(codec, layer, "v")
    assert again == codec
    from turboq.cache.layer import uniform_layer

    stored = uniform_layer(
        kv_heads=heads, k=codec, v=codec, policy=TokenPolicy(),
        k_arrays={n: jnp.asarray(a) for n, a in arrays.items()},
        v_arrays={n: jnp.asarray(a) for n, a in arrays.items()},
    )  # fmt: skip
    x = jnp.moveaxis(jnp.asarray(layer.v), 0, 1)[None]
    _, back = simulate(stored, x, x)
    spread = np.var(np.asarray(layer.v), axis=1).sum()
    error = np.mean(np.square(np.asarray(x - back)), axis=(0, 1)).sum()
    assert error < 0.02 * spread  # 4 bits of a trellis leave 0.0065 of a Gaussian


def test_options_need_a_size():
    x = np.zeros((1, 9, 8), np.float32)
    layer = LayerSamples(k=x, v=x, q_moment=np.eye(8)[None])
    with pytest.raises(ValueError, match="bits_per_vector"):
        fit_transform(Options(), layer, "k")
