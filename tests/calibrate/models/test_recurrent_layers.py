"""Layers that keep a state against their recurrence token by token in float64, and backwards."""

import dataclasses
from pathlib import Path

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import TOL

from turboq_calibrate.models import load_model, recurrence
from turboq_calibrate.models.decoder import MIXERS
from turboq_calibrate.models.params import layer_shapes
from turboq_calibrate.models.spec import DeltaNet, Mamba

GOLDEN = Path(__file__).parents[2] / "golden"
DELTA = DeltaNet(key_heads=2, value_heads=6, key_dim=5, value_dim=3, kernel=4)
MAMBA = Mamba(
    heads=6, head_dim=3, groups=2, state_dim=5, kernel=4, conv_bias=True, bias=True,
    step_limits=(0.5, 2.0),
)  # fmt: skip


@pytest.fixture(scope="module", params=[DELTA, MAMBA], ids=["delta_net", "mamba"])
def case(request):
    """A layer with its weights and inputs [2, 11, M]."""
    rng = np.random.default_rng(7)
    spec = load_model(GOLDEN / "qwen3_5", resident=False).spec.layers[0]
    spec = dataclasses.replace(spec, recurrent=request.param)
    params = {
        name: rng.standard_normal(shape) * (shape[-1] ** -0.5 if len(shape) > 1 else 1.0)
        for name, shape in layer_shapes(spec).items()
    }
    return spec, params, rng.standard_normal((2, 11, spec.hidden))


def mix(spec, params, n, state=None):
    return MIXERS[type(spec.recurrent)](spec, params, n, state)


compiled = jax.jit(mix, static_argnums=0)  # with the chunks of everyday


def sigmoid(y):
    return 1 / (1 + np.exp(-y))


def convolved(x, params, kernel):
    """silu of the convolution of [T, C] in float64."""
    seen = np.concatenate([np.zeros((kernel - 1, x.shape[1])), x])
    y = np.stack([(seen[t : t + kernel] * params["conv"][:, 0].T).sum(0) for t in range(len(x))])
    y = y + params.get("conv_bias", 0)
    return y * sigmoid(y)


def mamba_by_token(spec, params, n):
    """The docstring's equations in float64, one sequence, one head and one token at a time."""
    m, out = spec.recurrent, np.zeros_like(n)
    for index, rows in enumerate(n):
        whole = rows @ params["mamba_in"].T + params["mamba_in_bias"]
        z, dt = whole[:, : m.inner], whole[:, m.inner + m.channels :]
        mixed = convolved(whole[:, m.inner : m.inner + m.channels], params, m.kernel)
        heads = np.zeros((len(rows), m.inner))
        for h in range(m.heads):
            own = slice(h * m.head_dim, (h + 1) * m.head_dim)
            at = m.inner + h // (m.heads // m.groups) * m.state_dim
            b, c = (mixed[:, y : y + m.state_dim] for y in (at, at + m.groups * m.state_dim))
            matrix = np.zeros((m.state_dim, m.head_dim))
            for t in range(len(rows)):
                step = np.log1p(np.exp(dt[t, h] + params["decay_bias"][h]))
                step = min(max(step, m.step_limits[0]), m.step_limits[1])
                matrix = matrix * np.exp(-np.exp(params["log_decay"][h]) * step)
                matrix = matrix + np.outer(b[t], step * mixed[t, own])
                heads[t, own] = matrix.T @ c[t] + params["skip"][h] * mixed[t, own]
        y = (heads * z * sigmoid(z)).reshape(len(rows), m.groups, -1)
        y = y / np.sqrt((y * y).mean(-1, keepdims=True) + spec.norm_eps)
        y = y.reshape(len(rows), -1) * params["mamba_norm"]
        out[index] = y @ params["mamba_out"].T + params["mamba_out_bias"]
    return out


def by_token(spec, params, n):
    """The docstring's equations in float64, one sequence, one head and one token at a time."""
    if isinstance(spec.recurrent, Mamba):
        return mamba_by_token(spec, params, n)
    d, out = spec.recurrent, np.zeros_like(n)
    each = d.value_heads // d.key_heads
    for b, rows in enumerate(n):
        x = rows @ params["delta_qkv"].T
        mixed = convolved(x, params, d.kernel)
        width = d.key_heads * d.key_dim
        z = rows @ params["delta_z"].T
        heads = np.zeros((len(x), d.value_heads, d.value_dim))
        for h in range(d.value_heads):
            at = h // each * d.key_dim
            q, k = mixed[:, at : at + d.key_dim], mixed[:, width + at : width + at + d.key_dim]
            q, k = (y / np.sqrt((y * y).sum(1, keepdims=True) + 1e-6) for y in (q, k))
            own = slice(h * d.value_dim, (h + 1) * d.value_dim)
            v = mixed[:, 2 * width :][:, own]
            matrix = np.zeros((d.key_dim, d.value_dim))
            for t in range(len(x)):
                a = rows[t] @ params["delta_a"][h] + params["decay_bias"][h]
                matrix = matrix * np.exp(-np.exp(params["log_decay"][h]) * np.log1p(np.exp(a)))
                beta = sigmoid(rows[t] @ params["delta_b"][h])
                matrix = matrix + np.outer(k[t], beta * (v[t] - matrix.T @ k[t]))
                o = matrix.T @ q[t] / np.sqrt(d.key_dim)
                o = o / np.sqrt((o * o).mean() + spec.norm_eps) * params["delta_norm"]
                heads[t, h] = o * z[t, own] * sigmoid(z[t, own])
        out[b] = heads.reshape(len(x), -1) @ params["delta_out"].T
    return out


def single(x):
    return jax.tree.map(lambda y: jnp.asarray(y, jnp.float32), x)


@pytest.mark.parametrize("chunk", [1, 4, 64])
def test_layer_against_the_recurrence(case, chunk, monkeypatch):
    """Chunks of one token, with a short one at the end, and one that holds all."""
    spec, params, n = case
    monkeypatch.setattr(recurrence, "CHUNK", chunk)
    got, _ = mix(spec, single(params), single(n))
    want = by_token(spec, params, n)
    assert np.abs(want).max() > 1
    np.testing.assert_allclose(got, want, rtol=0, atol=TOL["delta_net"])


def test_state_carries_a_sequence_on(case):
    """Any split of the tokens gives what one pass gives; a prompt shorter than the convolution."""
    spec, params, n = case
    params, n = single(params), single(n)
    want, last = compiled(spec, params, n)
    for cuts in ([2, 3, 9], list(range(1, n.shape[1]))):
        state, parts = None, []
        for part in jnp.split(n, cuts, axis=1):
            y, state = compiled(spec, params, part, state)
            parts.append(y)
        assert state is not None
        np.testing.assert_allclose(
            jnp.concatenate(parts, axis=1), want, rtol=0, atol=TOL["delta_net"]
        )
        np.testing.assert_allclose(state.matrix, last.matrix, rtol=0, atol=TOL["delta_net"])
        np.testing.assert_allclose(state.inputs, last.inputs, rtol=0, atol=TOL["delta_net"])


def test_padding_leaves_no_trace(case):
    """Of a chunk only so many tokens of each sequence are real, none at all among them."""
    spec, params, n = case
    params, n = single(params), single(n)
    _, before = compiled(spec, params, n[:, :4])
    for counts in ([5, 0], [1, 7]):
        given = before._replace(counts=jnp.asarray(counts, jnp.int32))
        y, state = compiled(spec, params, n[:, 4:], given)
        for b, count in enumerate(counts):
            want, last = compiled(spec, params, n[b : b + 1, : 4 + count])
            np.testing.assert_allclose(y[b, :count], want[0, 4:], rtol=0, atol=TOL["delta_net"])
            np.testing.assert_allclose(
                state.matrix[b], last.matrix[0], rtol=0, atol=TOL["delta_net"]
            )
            np.testing.assert_array_equal(state.inputs[b], last.inputs[0])


def test_gradient_against_differences(case, monkeypatch):
    """Along random directions, central differences of the float64 recurrence."""
    spec, params, n = case
    monkeypatch.setattr(recurrence, "CHUNK", 4)
    rng = np.random.default_rng(1)
    g = rng.standard_normal(n.shape)
    _, pull = jax.vjp(lambda x: mix(spec, single(params), x)[0], single(n))
    found = np.asarray(pull(single(g))[0], np.float64)
    for _ in range(3):
        step = rng.standard_normal(n.shape)
        sides = [(by_token(spec, params, n + s * 1e-5 * step) * g).sum() for s in (1, -1)]
        want = (sides[0] - sides[1]) / 2e-5
        assert (found * step).sum() == pytest.approx(want, rel=TOL["delta_net_gradient"])


def test_decay_beyond_float32_is_zero_and_has_a_gradient():
    """exp of a sum of gates over a chunk underflows; nothing becomes NaN, forwards or back."""
    shape = (1, 5, 1)
    q = k = jnp.ones((*shape, 2)) * 0.5**0.5
    v, beta = jnp.arange(5.0).reshape(1, 5, 1, 1) + 1, jnp.ones(shape)
    g = jnp.full(shape, -200.0)

    def run(g):
        return recurrence.pass_through(q, k, v, g, jnp.ones((1, 1, 2, 1)), beta)[0]

    out, pull = jax.vjp(run, g)
    np.testing.assert_allclose(out, v, rtol=1e-6)  # every token sees itself alone
    assert np.isfinite(pull(jnp.ones_like(out))[0]).all()
