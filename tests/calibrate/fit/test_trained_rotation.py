"""Learned rotations: orthogonality, gradients, what training must reach, acceptance, resuming."""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from fit_cases import transform_at
from tolerances import TOL

from turboq.codecs.fit_transform import TransformOptions, fit_heads
from turboq.codecs.observed import Observed
from turboq.errors import TurboqError
from turboq.numbers import codebook
from turboq_calibrate.fit import trained_rotation as rotate
from turboq_calibrate.fit.orthogonal import cayley, cayley_host
from turboq_calibrate.fit.trained_rotation import Recipe, learn_rotations

DIM, HEADS = 16, 2
RECIPE = Recipe(steps=20, batch=128, every=10, learning_rate=0.02)


def layer(seed=0, n=400, structured=True, gradients=False):
    """Two heads; independent axes of two values each, hidden by an equal-variance rotation."""
    rng = np.random.default_rng(seed)
    turns = np.linalg.qr(rng.normal(size=(HEADS, DIM, DIM)))[0]
    shape = (HEADS, n, DIM)
    y = rng.choice([-1.0, 1.0], shape) if structured else rng.normal(size=shape)
    x = ((y + 0.05 * rng.normal(size=shape)) @ turns + 3.0).astype(np.float32)
    half = rng.normal(size=(HEADS, DIM, DIM))
    queries = None if structured else half @ np.swapaxes(half, -1, -2) / DIM + np.eye(DIM)
    g = rng.normal(size=shape).astype(np.float32) if gradients else None
    return Observed.of(x, g, queries=queries)


def started(seen, bits=24, **options):
    chosen = TransformOptions(**options)
    fits = {key: fit_heads(own, chosen) for key, own in seen.items()}
    starts = {key: transform_at(own, bits, chosen, fits=fits[key]) for key, own in seen.items()}
    return starts, fits


def test_cayley_is_orthogonal_whatever_its_argument(rng):
    x = rng.normal(size=(3, 24, 24)) * np.array([1e-3, 1.0, 30.0])[:, None, None]
    eye = np.broadcast_to(np.eye(24), x.shape)
    exact = cayley_host(x)
    np.testing.assert_allclose(exact @ np.swapaxes(exact, 1, 2), eye, atol=TOL["cayley_f64"])
    np.testing.assert_allclose(np.linalg.det(exact), 1, rtol=TOL["cayley_f64"])
    got = np.asarray(jax.jit(cayley)(jnp.asarray(x, jnp.float32)), np.float64)
    np.testing.assert_allclose(got @ np.swapaxes(got, 1, 2), eye, atol=TOL["cayley_f32"])
    np.testing.assert_allclose(got[:2], exact[:2], atol=TOL["cayley_f32"])
    np.testing.assert_array_equal(cayley_host(np.zeros((4, 4))), np.eye(4))
    # To first order a rotation by -2 (X - X^T).
    small = 1e-6 * x[1]
    due = np.eye(24) - 2 * (small - small.T)
    np.testing.assert_allclose(cayley_host(small), due, atol=TOL["cayley_first_order"])


def loss_host(skew, spread, head, z, weights, gain):
    """`rotate.loss` in float64 with exhaustive search."""
    v = head["variances"]
    w = (skew - skew.T) * np.sqrt(np.minimum.outer(v, v) / np.maximum.outer(v, v))
    turn = np.linalg.inv(np.eye(len(w)) + w) @ (np.eye(len(w)) - w)
    coded = int(head["coded"])
    total = 0.0
    for row, weight in zip(z, weights, strict=True):
        y = turn.T @ row
        sigma = np.sqrt(
            np.array([np.sum(turn[:, i] ** 2 * head["variances"]) for i in range(len(w))])
        )
        sigma = sigma * head["stretch"] * np.exp(spread)
        u = y[:coded] / sigma[:coded]
        g = 1.0 if gain == "none" else np.sqrt(np.mean(u * u))
        if gain == "code":
            g = head["gains"][np.argmin(np.abs(np.log(head["gains"] / g)))]
        near = [p[np.argmin(np.abs(t - p))] for t, p in zip(u / g, head["points"], strict=False)]
        error = np.sum((sigma[:coded] * (u - g * np.array(near))) ** 2) + np.sum(y[coded:] ** 2)
        total += weight * error
    return total / np.sum(weights * np.sum(z * z, axis=1))


@pytest.mark.parametrize("gain", ["none", "float16", "code"])
def test_loss_and_gradient_against_finite_differences(gain, rng):
    dim, coded = 5, 4
    head = {
        "variances": np.sort(rng.uniform(0.5, 3, dim))[::-1],
        "stretch": np.array([1.0, 1.1, 1.3, 1.0, 1.0]),
        "points": np.stack([codebook.lloyd_max("gaussian", 2)] * coded + [np.zeros(4)]),
        "coded": np.array(4.0),
        "gains": np.geomspace(0.5, 2, 4),
    }
    z, weights = rng.normal(size=(40, dim)) * np.sqrt(head["variances"]), rng.uniform(0.5, 2, 40)
    point = [rng.normal(size=(dim, dim)) * 0.1, rng.normal(size=dim) * 0.05]
    as_jax = jax.tree.map(lambda a: jnp.asarray(a, jnp.float32), (head, z, weights, point))
    params = {"skew": as_jax[3][0], "spread": as_jax[3][1]}
    value, gradient = jax.value_and_grad(rotate.loss)(params, *as_jax[:3], gain)
    np.testing.assert_allclose(
        value, loss_host(*point, head, z, weights, gain), rtol=TOL["rotation_loss"]
    )
    slopes = []
    for part in range(2):
        slope = np.zeros(point[part].size)
        for i in range(slope.size):
            ends = []
            for step in (1e-7, -1e-7):
                moved = [p.copy() for p in point]
                moved[part].reshape(-1)[i] += step
                ends.append(loss_host(*moved, head, z, weights, gain))
            slope[i] = (ends[0] - ends[1]) / 2e-7
        slopes.append(slope)
    got = np.concatenate([np.asarray(gradient[n]).reshape(-1) for n in ("skew", "spread")])
    due = np.concatenate(slopes)
    assert np.abs(got - due).max() < TOL["rotation_gradient"] * np.abs(due).max()


def test_training_finds_hidden_axes(tmp_path):
    """White values of two levels per hidden axis: every basis is joint, one is good at 1 bit."""
    seen = {(0, "v"): layer()}
    starts, fits = started(seen, bits=DIM)
    recipe = dataclasses.replace(RECIPE, steps=120, every=60, learning_rate=0.05)
    found = learn_rotations(seen, starts, fits, tmp_path, recipe=recipe, progress=False)[0, "v"]
    assert found.accepted.all()
    assert np.all(found.trained < 0.7 * found.start)
    for (codec, arrays), fit in zip(found.heads, fits[0, "v"], strict=True):
        # Still a transform of the metric's kind: orthogonal rows under it, A S = 1.
        np.testing.assert_allclose(
            arrays["analysis"] @ arrays["synthesis"], np.eye(codec.coded), atol=TOL["rotated_pair"]
        )
        metric = fit.basis.analysis.T @ np.diag(fit.basis.variances) @ fit.basis.analysis
        gram = arrays["synthesis"].T.astype(np.float64) @ metric @ arrays["synthesis"]
        off = gram - np.diag(np.diag(gram))
        assert np.abs(off).max() < TOL["rotated_pair"] * np.diag(gram).max()


@pytest.mark.parametrize("options", [{}, {"gain": "code"}, {"quantizer": "trellis", "states": 4}])
def test_never_worse_than_the_start_on_validation(options, tmp_path):
    """A learning rate that ruins everything: heads keep the arrays they came with, bit by bit."""
    seen = {(0, "k"): layer(structured=False)}
    starts, fits = started(seen, **options)
    wild = dataclasses.replace(RECIPE, learning_rate=3.0)
    found = learn_rotations(seen, starts, fits, tmp_path, recipe=wild, progress=False)[0, "k"]
    assert not found.accepted.any()
    for (_, kept), (_, start) in zip(found.heads, starts[0, "k"], strict=True):
        assert kept is start
    # The reported error is the codec's, by its own encoder and decoder.
    codec, arrays = starts[0, "k"][1]
    x = seen[0, "k"].x[1, 300:]
    own = {n: jnp.asarray(a) for n, a in arrays.items()}
    e = x - np.asarray(jax.jit(lambda x: codec.decode(own, codec.encode(own, x)))(x), np.float64)
    basis = fits[0, "k"][1].basis
    metric = basis.analysis.T @ np.diag(basis.variances) @ basis.analysis
    cost = [np.einsum("nd,de,ne->", a, metric, a) for a in (e, x - basis.mean)]
    np.testing.assert_allclose(found.start[1], cost[0] / cost[1], rtol=TOL["rotation_loss"])


def test_interrupted_runs_end_the_same_and_other_inputs_are_refused(tmp_path, monkeypatch):
    keys = [(i, side) for i in range(2) for side in ("k", "v")]
    seen = {key: layer(seed, gradients=True) for seed, key in enumerate(keys)}
    starts, fits = started(seen)
    rotate.advance.clear_cache()

    def run(folder, recipe=RECIPE):
        return learn_rotations(seen, starts, fits, folder, recipe=recipe, progress=False)

    whole = run(tmp_path / "whole")
    assert rotate.advance._cache_size() == 1  # layers and sides share one program
    count = [0]
    real = rotate.advance

    def dies(*args):
        count[0] += 1
        if count[0] in (2, 4, 5):  # within a side, after it, and at once
            raise KeyboardInterrupt
        return real(*args)

    monkeypatch.setattr(rotate, "advance", dies)
    for _ in range(3):
        with pytest.raises(KeyboardInterrupt):
            run(tmp_path / "cut")
    again = run(tmp_path / "cut")
    assert count[0] == 3 + 4 * RECIPE.steps // RECIPE.every  # nothing was trained twice
    for key, side in whole.items():
        np.testing.assert_array_equal(side.trained, again[key].trained)
        for (_, a), (_, b) in zip(side.heads, again[key].heads, strict=True):
            for name in a:
                np.testing.assert_array_equal(a[name], b[name])
    with pytest.raises(TurboqError, match="other inputs"):
        run(tmp_path / "cut", dataclasses.replace(RECIPE, seed=1))
    count[0] = 0
    with pytest.raises(KeyboardInterrupt):  # half of the first side, no file yet
        run(tmp_path / "part")
    with pytest.raises(TurboqError, match="other inputs"):
        run(tmp_path / "part", dataclasses.replace(RECIPE, seed=1))
