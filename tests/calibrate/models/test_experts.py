"""Mixtures of experts: every block and group of the work against a dense float64 sum, streaming."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import TOL

from turboq_calibrate.models import default_positions, experts, load_model, streamed_experts
from turboq_calibrate.models.decoder import exact_attend, run_layer
from turboq_calibrate.models.params import layer_size
from turboq_calibrate.models.spec import Experts
from turboq_calibrate.models.streamed_experts import Streamed, whole
from turboq_calibrate.observe import passes

GOLDEN = Path(__file__).parents[2] / "golden"
SKEWED = (np.arange(60)[:, None] % 3 == 0) * 4.0  # two thirds of the tokens go anywhere


@pytest.fixture(scope="module")
def layer():
    model = load_model(GOLDEN / "qwen2_moe", resident=False)
    return model.spec.layers[0], model.layer(0)


def dense(spec, params, n, chosen, weights, numbers):
    """Every token through every expert, float64, and the sum of those it chose."""
    gate, up, down = (np.asarray(params[f"expert_{x}"], np.float64) for x in ("gate", "up", "down"))
    n, y = np.asarray(n, np.float64), np.zeros(n.shape)
    for place, number in enumerate(numbers):
        inner = n @ gate[place].T
        inner = inner / (1 + np.exp(-inner)) * (n @ up[place].T)
        share = np.where(np.asarray(chosen) == number, np.asarray(weights, np.float64), 0).sum(1)
        y += share[:, None] * (inner @ down[place].T)
    return y


@pytest.mark.parametrize(("tokens", "rows"), [(1, (8, 256)), (60, (8, 256)), (60, (1, 3))])
@pytest.mark.parametrize("numbers", [[0, 1, 2, 3, 4], [3, 1, 5, 5]])
def test_blocks_of_sorted_tokens_are_the_dense_sum(layer, monkeypatch, rng, tokens, rows, numbers):
    """All experts, and a group in another order with padding; experts that nobody chose too."""
    spec, params = layer
    monkeypatch.setattr(experts, "ROWS", rows)
    n = jnp.asarray(rng.standard_normal((tokens, spec.hidden)) + SKEWED[:tokens], jnp.float32)
    chosen, weights = experts.route(spec.experts, params, n)
    chosen = jnp.where(chosen == 2, 4, chosen)
    real = [i for i in numbers if i < spec.experts.count]
    group = params.read(np.array(real))
    padded = {name: jnp.pad(w, ((0, len(numbers) - len(real)), (0, 0), (0, 0)))
              for name, w in group.items()}  # fmt: skip
    start = jnp.asarray(rng.standard_normal(n.shape), jnp.float32)
    where = jnp.asarray(numbers, jnp.int32)
    got = experts.add_chosen(spec, padded, where, start, n, chosen, weights)
    want = np.asarray(start, np.float64) + dense(spec, group, n, chosen, weights, real)
    np.testing.assert_allclose(got, want, rtol=0, atol=TOL["model_golden"] * np.abs(want).max())


@pytest.mark.parametrize("renormalised", [False, True])
def test_routing_takes_the_most_probable(layer, rng, renormalised):
    spec, params = layer
    n = rng.standard_normal((40, spec.hidden)).astype(np.float32)
    mixture = dataclasses.replace(spec.experts, renormalised=renormalised)
    chosen, weights = experts.route(mixture, params, jnp.asarray(n))
    logits = n.astype(np.float64) @ np.asarray(params["router"], np.float64).T
    p = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
    order = np.argsort(-p, axis=1)[:, :2]
    want = np.take_along_axis(p, order, 1)
    if renormalised:
        want /= want.sum(1, keepdims=True)
    np.testing.assert_array_equal(chosen, order)
    np.testing.assert_allclose(weights, want, rtol=TOL["model_golden"])


@pytest.mark.parametrize("family", ["qwen2_moe", "qwen3_moe/model.gguf", "gemma4_moe"])
def test_streamed_experts_are_read_as_they_are_chosen(family, monkeypatch, rng):
    """Forwards and backwards, one expert in memory at a time, and none that no token chose."""
    model = load_model(GOLDEN / family, resident=False)
    spec, params = model.spec.layers[0], model.layer(0)
    assert isinstance(params, Streamed)
    monkeypatch.setattr(streamed_experts, "GROUP_BYTES", 1)
    asked = []

    def read(numbers):
        asked.append(numbers.tolist())
        return params.read(numbers)

    counted = Streamed(dict(params), read, params.size)
    x = jnp.asarray(rng.standard_normal((1, 2, spec.hidden)), jnp.float32)
    at, g = default_positions(jnp.zeros((1, 2), jnp.int32)), jnp.ones_like(x)
    full = whole(spec, params)
    close = {"rtol": 0, "atol": TOL["model_golden"]}
    want, _ = run_layer(spec, full, x, at, exact_attend)
    got, _ = run_layer(spec, counted, x, at, exact_attend)
    np.testing.assert_allclose(got, want, **close)
    half, _ = passes._attention_half(spec, params, x, at)
    n, chosen, _, _ = streamed_experts._before(spec, params, half)
    assert asked == [[int(i)] for i in np.unique(chosen)]
    assert n.shape == (2, spec.hidden)
    sampled = jnp.zeros((1, 2), jnp.int32)
    want, got = (passes.reverse(spec, p, x, at, g, sampled, skip=0) for p in (full, counted))
    for one, other in ((got[0], want[0]), (got[2], want[2])):  # gradient at x; k, v, g_k, g_v
        assert np.abs(other).max() > 0.1
        atol = TOL["model_gradient"] * np.abs(other).max()
        np.testing.assert_allclose(one, other, rtol=0, atol=atol)


def test_a_streamed_layer_does_not_hold_its_experts(layer):
    spec, params = layer
    held = sum(w.size for w in params.values())
    assert held == layer_size(spec, 0)
    full = sum(w.size for w in whole(spec, params).values())
    assert full == layer_size(spec, spec.experts.count)
    assert params.size == 4 * 3 * spec.hidden * spec.experts.intermediate
    assert spec.experts == Experts(
        count=5, chosen=2, intermediate=12, renormalised=False, shared=10
    )
    with pytest.raises(KeyError, match="expert_"):  # loud where experts are needed and not there
        jax.jit(experts.mixture, static_argnums=0)(spec, params, jnp.zeros((1, 1, spec.hidden)))
