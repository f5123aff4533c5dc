"""`transform`: an independent float64 encoder and decoder, folding, what is dropped, accounts."""

from __future__ import annotations

import dataclasses
import json

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import TOL

from turboq.codecs import from_config
from turboq.codecs.fit_basis import fit_basis
from turboq.codecs.fit_transform import fit_arrays
from turboq.codecs.transform import Transform, unit_table
from turboq.numbers import codebook, trellis

SEGMENTS = ((8, 4), (16, 2), (8, 1))  # of 40: 8 coordinates are dropped
DIM = 40


def source(seed=0, n=128):
    """Correlated vectors with a large mean, and a metric of another shape."""
    rng = np.random.default_rng(seed)
    mix = rng.normal(size=(DIM, DIM)) * 0.6 ** np.arange(DIM)
    x = rng.normal(size=(n, DIM)) @ mix.T + 5 * rng.normal(size=DIM)
    half = rng.normal(size=(DIM, DIM))
    return x.astype(np.float32), half @ half.T / DIM + 0.1 * np.eye(DIM)


def fitted(codec, seed=0):
    x, metric = source(seed)
    basis = fit_basis(x.mean(axis=0), np.cov(x.T, bias=True), metric)
    arrays = fit_arrays(codec, basis, x)
    return x, {name: jnp.asarray(a) for name, a in arrays.items()}


def walk(states, tables, u):
    """Least squared error over all paths from state 0, by dynamic programming on (state) alone."""
    h1, h0 = trellis.POLYNOMIALS[states]
    best = {0: (0.0, [])}
    for table, value in zip(tables, u, strict=True):
        new = {}
        for state, (cost, path) in best.items():
            for z1 in range(2):
                z0 = state & 1
                points = table[2 * z1 + z0 :: 4]
                point = points[np.argmin(np.abs(points - value))]
                after = (state >> 1) ^ (z0 * (h0 >> 1)) ^ (z1 * (h1 >> 1))
                total = cost + (value - point) ** 2
                if after not in new or total < new[after][0]:
                    new[after] = (total, [*path, point])
        best = new
    return min(best.values(), key=lambda way: way[0])


def expand(codec, arrays):
    """One table per coordinate, float64."""
    fitted = codec.codebook == "fitted"
    return [
        np.asarray(arrays[f"codebook{i}"], np.float64) if fitted else unit_table(codec, bits)
        for i, (width, bits) in enumerate(codec.segments)
        for _ in range(width)
    ]


@pytest.mark.parametrize("gain", ["none", "code", "float16"])
@pytest.mark.parametrize("book", ["gaussian", "fitted"])
def test_scalar_against_float64(gain, book):
    codec = Transform(dim=DIM, segments=SEGMENTS, gain=gain, gain_bits=3, codebook=book)
    x, arrays = fitted(codec)
    a = {name: np.asarray(v, np.float64) for name, v in arrays.items()}
    y = (x.astype(np.float64) - a["mean"]) @ a["analysis"].T
    rms = np.sqrt(np.mean(y * y, axis=-1))
    g = np.ones(len(x))
    if gain == "code":
        distance = np.abs(np.log(rms)[:, None] - np.log(a["gains"])[None, :])
        g = a["gains"][np.argmin(distance, axis=1)]
    if gain == "float16":
        # The float32 root mean square may round to the neighbouring float16.
        g = np.asarray(codec.encode(arrays, jnp.asarray(x))["gain"][:, 0], np.float64)
        np.testing.assert_allclose(g, rms, rtol=2.0**-10 + TOL["transform_float64"])
    unit = y / (rms if gain == "float16" else g)[:, None]
    tables = expand(codec, a)
    values = np.stack(
        [t[np.argmin(np.abs(t - unit[:, [j]]), axis=1)] for j, t in enumerate(tables)]
    )
    due = a["mean"] + (g[:, None] * values.T) @ a["synthesis"].T
    got = np.asarray(codec.decode(arrays, codec.encode(arrays, jnp.asarray(x))))
    # float32 moves a value at a threshold to the neighbouring code now and then.
    wrong = np.max(np.abs(got - due), axis=1) > TOL["transform_float64"] * np.abs(x).max()
    assert np.sum(wrong) <= 1


@pytest.mark.parametrize("states", [4, 8])
def test_trellis_against_a_walk_over_all_paths(states):
    codec = Transform(dim=DIM, segments=SEGMENTS, quantizer="trellis", states=states)
    x, arrays = fitted(codec)
    x = x[:6]
    a = {name: np.asarray(v, np.float64) for name, v in arrays.items()}
    y = (x.astype(np.float64) - a["mean"]) @ a["analysis"].T
    tables = expand(codec, a)
    values = np.asarray(codec.values(arrays, codec.encode(arrays, jnp.asarray(x))))
    for u, got in zip(y, values, strict=True):
        cost, path = walk(states, tables, u)
        assert abs(np.sum((u - got) ** 2) - cost) < TOL["transform_float64"] * np.sum(u * u)
        assert np.mean(np.abs(got - path) > 1e-3) < 0.1  # other paths may tie


def test_free_start_never_hurts_and_is_stored():
    fixed = Transform(dim=DIM, segments=SEGMENTS, quantizer="trellis", states=8)
    free = dataclasses.replace(fixed, free_start=True)
    assert free.bits_per_vector == fixed.bits_per_vector + 3
    x, arrays = fitted(fixed)
    y = np.asarray(fixed.analyse(arrays, jnp.asarray(x)))
    errors = []
    for codec in (fixed, free):
        stored = codec.encode(arrays, jnp.asarray(x))
        errors.append(np.sum((y - np.asarray(codec.values(arrays, stored))) ** 2, axis=1))
    assert np.all(errors[1] <= errors[0] * (1 + 1e-5))
    assert np.mean(errors[1]) < 0.99 * np.mean(errors[0])


@pytest.mark.parametrize("gain", ["none", "code", "float16"])
@pytest.mark.parametrize("quantizer", ["scalar", "trellis", "window"])
def test_folding_equals_decoding(gain, quantizer):
    codec = Transform(dim=DIM, segments=SEGMENTS, gain=gain, quantizer=quantizer, states=16)
    x, arrays = fitted(codec)
    rng = np.random.default_rng(3)
    q = jnp.asarray(rng.normal(size=(5, DIM)), jnp.float32)
    p = jnp.asarray(rng.dirichlet(np.ones(len(x)), size=5) * 0.6, jnp.float32)
    stored = codec.encode(arrays, jnp.asarray(x))
    back = np.asarray(codec.decode(arrays, stored), np.float64)
    folded = codec.fold_query(arrays, q)
    assert folded["q"].shape == (5, codec.coded)
    logits = np.asarray(codec.logits(arrays, folded, stored))
    due = np.asarray(q, np.float64) @ back.T
    np.testing.assert_allclose(logits, due, atol=TOL["transform_float64"] * np.abs(due).max())
    acc = codec.accumulate(arrays, p, stored)
    out = np.asarray(codec.unfold_output(arrays, acc, jnp.sum(p, axis=1)))
    due = np.asarray(p, np.float64) @ back
    np.testing.assert_allclose(out, due, atol=TOL["transform_float64"] * np.abs(due).max())


def test_dropped_coordinates_decode_to_the_mean():
    codec = Transform(dim=DIM, segments=SEGMENTS)
    x, arrays = fitted(codec)
    back = codec.decode(arrays, codec.encode(arrays, jnp.asarray(x)))
    y, mean = source()[0], np.asarray(arrays["mean"])
    full = fit_basis(y.mean(axis=0), np.cov(y.T, bias=True), source()[1])
    # The rows of A that are not stored: what decodes has nothing along them, the source does.
    rows = full.analysis[codec.coded :]
    rows = rows / np.linalg.norm(rows, axis=1, keepdims=True)
    left, had = (np.abs((y - mean) @ rows.T).max() for y in (np.asarray(back, np.float64), x))
    assert left < TOL["transform_float64"] * np.abs(x).max()
    assert had > 10 * left


def test_accounts_and_config():
    codec = Transform(dim=64, segments=((16, 4), (32, 3), (8, 1)), gain="code", gain_bits=3)
    assert codec.bits_per_vector == 16 * 4 + 32 * 3 + 8 + 3
    config = json.loads(json.dumps(codec.config()))
    assert from_config(config) == codec
    assert hash(from_config(config)) == hash(codec)
    assert codec.array_shapes["analysis"] == (56, 64)
    stored = jax.eval_shape(
        codec.encode,
        {n: jax.ShapeDtypeStruct(s, jnp.float32) for n, s in codec.array_shapes.items()},
        jax.ShapeDtypeStruct((7, 64), jnp.float32),
    )
    assert {f.name: (f.width,) for f in codec.fields} == {n: v.shape[1:] for n, v in stored.items()}


@pytest.mark.parametrize(
    "segments",
    [(), ((12, 3),), ((8, 3), (8, 3)), ((8, 2), (8, 3)), ((48, 2),), ((8, 9),), ((8, 0),)],
)
def test_refused_segments(segments):
    with pytest.raises(ValueError, match=r"segment|bits"):
        Transform(dim=DIM, segments=segments)


@pytest.mark.parametrize(
    ("field", "value"),
    [("gain", "none "), ("gain_bits", 0), ("quantizer", "vector"), ("codebook", "sphere")],
)
def test_refused_fields(field, value):
    with pytest.raises(ValueError, match=field):
        Transform(dim=DIM, segments=SEGMENTS, **{field: value})


def test_trellis_refuses_bits_without_a_table():
    with pytest.raises(ValueError, match="bits"):
        Transform(dim=DIM, segments=((8, 7),), quantizer="trellis")


@pytest.mark.parametrize(
    ("fields", "says"),
    [
        ({"states": 8}, "states=8 must be one of 16, 64, 256"),
        ({"free_start": True}, "no start state"),
        ({"codebook": "fitted"}, "no codebook"),
    ],
)
def test_window_codes_have_no_start_state_and_no_codebook(fields, says):
    with pytest.raises(ValueError, match=says) as refused:
        Transform(
            **({"dim": DIM, "segments": ((8, 7),), "quantizer": "window", "states": 16} | fields)
        )
    assert "\n" not in str(refused.value)


def test_window_codes_lean_on_the_bits_before(rng):
    """No word that differs in a few bits is nearer than the one found."""
    codec = Transform(dim=DIM, segments=SEGMENTS, quantizer="window", states=16)
    x, arrays = fitted(codec)
    u = np.asarray(codec.analyse(arrays, jnp.asarray(x[:40])), np.float64)
    stored = codec.encode(arrays, jnp.asarray(x[:40]))
    weights = np.asarray(arrays["weights"], np.float64)
    assert np.ptp(weights) > 0.1
    found = (u - np.asarray(codec.values(arrays, stored))) ** 2 @ weights
    for _ in range(50):
        other = {
            n: v ^ jnp.asarray(rng.random(v.shape) < 0.05, jnp.uint8) for n, v in stored.items()
        }
        error = (u - np.asarray(codec.values(arrays, other))) ** 2 @ weights
        assert np.all(error >= found * (1 - TOL["transform_float64"]))


def test_tables_are_the_codebooks():
    codec = Transform(dim=DIM, segments=((8, 3),))
    np.testing.assert_allclose(codec.tables["codebook0"], codebook.lloyd_max("gaussian", 3))
    fitted_codec = dataclasses.replace(codec, codebook="fitted")
    assert fitted_codec.tables == {}
