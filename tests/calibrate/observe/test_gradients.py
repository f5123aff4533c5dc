"""Fisher gradients against the KL of a real perturbation."""

from __future__ import annotations

from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest

from turboq_calibrate.models import load_model
from turboq_calibrate.models.decoder import default_positions, exact_attend, run_head, run_layer
from turboq_calibrate.models.model import embed_tokens
from turboq_calibrate.observe.gradients import LayerGradients, collect_gradients

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
