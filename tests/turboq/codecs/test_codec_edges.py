"""Codecs at the edges: zero, one-hot, huge, tiny and shifted vectors, overflow, bad configs."""

from __future__ import annotations

import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from codec_rows import ROWS, arrays_of, lloyd
from tolerances import TOL

from turboq.codecs import (
    CODECS,
    Exact,
    PerHead,
    TurboQuantMSE,
    TurboQuantProd,
    check_finite_stored,
    from_config,
)
from turboq.codecs.scalar import ScalarCodec
from turboq.errors import TurboqError
from turboq.numbers import codebook, scale


@functools.cache
def program(row, dim):
    """A codec, its arrays, and what encodes and decodes in one program: time is compilation."""
    codec = ROWS[row].make(dim)

    @jax.jit
    def run(arrays, x):  # what is decoded is rounded as it is stored
        stored = jax.lax.optimization_barrier(codec.encode(arrays, x))
        return stored, codec.decode(arrays, stored)

    return codec, arrays_of(codec, np.random.default_rng(1)), run


# Every codec at one dim; those of the main road at one that is no power of two besides.
EDGES = [(row, 128) for row in ROWS]
EDGES += [(row, 80) for row in ROWS if isinstance(ROWS[row].make(64), Exact | ScalarCodec)]


@pytest.mark.parametrize(("row", "dim"), EDGES)
def test_edge_vectors(row, dim):
    """Zero and -0.0 decode to zero (to the mean); everything finite stays finite."""
    codec, fitted, run = program(row, dim)
    arrays = {k: jnp.asarray(v[1]) for k, v in fitted.items()}
    mean = np.asarray(arrays.get("mean", np.zeros(dim, np.float32)))
    x = np.zeros((max(6, codec.block), dim), np.float32)
    x[1] = -0.0
    x[2, 5] = 3.0  # one-hot
    x[3] = 2.0  # constant
    x[4] = 1e-3 * np.sign(np.random.default_rng(2).normal(size=dim))
    x[5, 7] = -1e4
    x = x + mean
    if "mean" not in arrays:
        x[1] = -0.0  # adding the zero mean dropped the sign
    stored, decoded = run(arrays, jnp.asarray(x))
    decoded = np.asarray(decoded)
    check_finite_stored(stored)
    assert np.all(np.isfinite(decoded))
    if ROWS[row].zero_exact:
        np.testing.assert_array_equal(decoded[:2], np.stack([mean, mean]))
        for name, values in stored.items():
            np.testing.assert_array_equal(values[0], values[1], err_msg=name)


def test_one_hot_under_hadamard():
    """All |coordinates| are 1/sqrt(D): raw error is (1 - c)^2, any per-vector scale removes it."""
    x = jnp.zeros((1, 128)).at[0, 3].set(-7.0)
    for rule in scale.RULES:
        codec = TurboQuantMSE(dim=128, bits=2, scale_rule=rule, scale_dtype="float32")
        got = codec.decode({}, codec.encode({}, x))
        error = float(jnp.sum((got - x) ** 2) / 49)
        c = codebook.lloyd_max("sphere", 2, 128)
        expected = np.min((c - 1) ** 2) if rule == "raw" else 0.0
        np.testing.assert_allclose(error, expected, atol=TOL["rotate_f32"], rtol=0)


@pytest.mark.parametrize("size", [1e-30, 1e-6, 1e6, 1e30])
def test_huge_and_tiny_norms(size, rng):
    """With a float32 scale, coding commutes with the size of the vector over 60 decades."""
    base = rng.normal(size=(16, 96)).astype(np.float32)
    x = jnp.asarray(base * np.float32(size))
    for codec in (
        TurboQuantMSE(dim=96, bits=3, scale_rule="unbiased", scale_dtype="float32"),
        TurboQuantProd(dim=96, bits=3, scale_dtype="float32"),
    ):
        small = codec.decode({}, codec.encode({}, jnp.asarray(base)))
        stored = codec.encode({}, x)
        check_finite_stored(stored)
        got = np.asarray(codec.decode({}, stored), np.float64) / float(np.float32(size))
        np.testing.assert_allclose(got, small, atol=TOL["rotate_f32"], rtol=0)


SHOWS_OVERFLOW = [  # codecs that store no number but codes cannot
    r for r in ROWS if r != "exact-f32" and any(not f.packed for f in ROWS[r].make(64).fields)
]


@pytest.mark.parametrize("row", SHOWS_OVERFLOW)
def test_overflow_and_nan_are_reported(row):
    """A scale beyond float16 is inf, NaN input is NaN, and the check names the field."""
    codec, fitted, run = program(row, 128)
    arrays = {k: jnp.asarray(v[0]) for k, v in fitted.items()}
    x = np.random.default_rng(3).normal(size=(max(6, codec.block), 128)).astype(np.float32)
    x[2, 9] = np.nan
    with pytest.raises(TurboqError, match=r"layer 3: .*not finite.*wider scale_dtype"):
        check_finite_stored(run(arrays, jnp.asarray(x))[0], "layer 3")
    narrow = any(f.dtype == "float16" for f in codec.fields)
    x[2] = 1e8 * np.sign(x[0])
    stored, _ = run(arrays, jnp.asarray(x))
    if narrow:
        with pytest.raises(TurboqError, match="not finite"):
            check_finite_stored(stored)
    else:
        check_finite_stored(stored)


@pytest.mark.parametrize("row", ["mse-3", "prod-3", "per_head-3"])
def test_large_common_mean(row, rng):
    """A mean a thousand times the spread: without its removal the error is that of the mean."""
    codec, dim = ROWS[row].make(128), 128
    mean = rng.normal(size=dim) * 1000
    x = (mean + rng.normal(size=(256, dim))).astype(np.float32)
    arrays = {}
    if codec.calibrated:
        table = codebook.lloyd_max("sphere", 3, dim)
        arrays = {"mean": jnp.asarray(mean, jnp.float32), "codebook": jnp.asarray(table, "float32")}
    got = np.asarray(codec.decode(arrays, codec.encode(arrays, jnp.asarray(x))), np.float64)
    error = np.mean((got - x) ** 2)
    if codec.calibrated:
        assert abs(error / lloyd(3, dim) - 1) < TOL["common_mean"]
    else:
        assert error > 1000**2 * lloyd(4, dim)


def test_planted_key_bias_costs_its_power(rng):
    """K = 100 u + N(0, I): removing the mean divides the logit error by 1 + |mu|^2 / (sigma^2 D).

    Without it, the error is D_b |x|^2 whose power is mostly the mean's; seeds of the rotation are
    the independent draws.
    """
    dim, n, seeds = 128, 512, 16
    table = jnp.asarray(codebook.lloyd_max("sphere", 3, dim), jnp.float32)
    ratios = []
    for seed in range(seeds):
        mean = rng.normal(size=dim)
        mean *= 100 / np.linalg.norm(mean)
        k = jnp.asarray(mean + rng.normal(size=(n, dim)), jnp.float32)
        q = jnp.asarray(rng.normal(size=(16, dim)), jnp.float32)
        arrays = {"mean": jnp.asarray(mean, jnp.float32), "codebook": table}
        errors = []
        for codec, fitted in (
            (TurboQuantMSE(dim=dim, bits=3, seed=seed), {}),
            (PerHead(dim=dim, bits=3, seed=seed), arrays),
        ):
            logits = codec.logits(fitted, codec.fold_query(fitted, q), codec.encode(fitted, k))
            true = np.asarray(q, np.float64) @ np.asarray(k, np.float64).T
            errors.append(np.mean((np.asarray(logits, np.float64) - true) ** 2))
        ratios.append(errors[0] / errors[1])
    expected = 1 + 100**2 / dim
    allowed = TOL["standard_errors"] * np.std(ratios) / np.sqrt(seeds)
    assert abs(np.mean(ratios) - expected) < allowed
    assert allowed < TOL["bias_ratio_resolution"] * expected


BAD = [
    ([], "must be an object, not list"),
    ({}, "unknown codec None: known codecs are e8, exact, "),
    ({"codec": "kivi", "dim": 64}, "unknown codec 'kivi'"),
    ({"codec": ["exact"], "dim": 64}, "unknown codec"),
    ({"codec": "turboquant_mse", "dim": 64}, "needs field 'bits'"),
    ({"codec": "exact", "dim": 64, "bits": 3}, "no field 'bits': it has dim, dtype"),
    ({"codec": "turboquant_mse", "dim": 64, "bits": True}, "bits=True must be int, not bool"),
    ({"codec": "turboquant_mse", "dim": 64, "bits": 3.0}, "bits=3.0 must be int, not float"),
    ({"codec": "turboquant_mse", "dim": 64, "bits": 9}, "bits=9 must be 1..8"),
    ({"codec": "turboquant_mse", "dim": 60, "bits": 3}, "dim=60 must be a multiple of 8"),
    ({"codec": "exact", "dim": 1 << 30}, "dim=1073741824 must be a multiple of 8"),
    ({"codec": "exact", "dim": 64, "dtype": "int8"}, "dtype='int8' must be one of float32"),
    ({"codec": "exact", "dim": 64, "dtype": None}, "dtype=None must be str"),
    ({"codec": "turboquant_mse", "dim": 64, "bits": 3, "rotation": "fft"}, "rotation='fft'"),
    ({"codec": "turboquant_mse", "dim": 64, "bits": 3, "seed": -1}, "seed=-1"),
    ({"codec": "turboquant_mse", "dim": 64, "bits": 3, "codebook": "nf4"}, "codebook='nf4'"),
    ({"codec": "turboquant_mse", "dim": 64, "bits": 3, "scale_rule": "max"}, "scale_rule='max'"),
    ({"codec": "turboquant_mse", "dim": 64, "bits": 3, "scale_dtype": "fp8"}, "scale_dtype='fp8'"),
    ({"codec": "turboquant_prod", "dim": 64, "bits": 3, "sketch": "haar"}, "sketch='haar'"),
    ({"codec": "per_head", "dim": 64, "bits": 3, "scale": "token"}, "scale='token'"),
    (
        {"codec": "per_head", "dim": 64, "bits": 3, "scale": "head", "scale_rule": "matched"},
        "must be 'raw'",
    ),
]


@pytest.mark.parametrize(("config", "words"), BAD)
def test_bad_configs_are_refused(config, words):
    with pytest.raises(TurboqError) as caught:
        from_config(config)
    assert words in str(caught.value)
    assert "\n" not in str(caught.value)


def test_registry_and_defaults():
    assert {"exact", "turboquant_mse", "turboquant_prod", "per_head"} <= set(CODECS)
    codec = from_config({"codec": "turboquant_mse", "dim": 64, "bits": 3})
    assert codec == TurboQuantMSE(dim=64, bits=3)
    assert codec.bits_per_vector == 64 * 3 + 16
    assert TurboQuantProd(dim=64, bits=3).bits_per_vector == 64 * 3 + 32
    assert TurboQuantProd(dim=64, bits=1).bits_per_vector == 64 + 16
    assert PerHead(dim=64, bits=3, scale="head").bits_per_vector == 64 * 3


@pytest.mark.parametrize("name", sorted(CODECS))
def test_every_codec_states_what_it_is(name):
    """Source, bits per channel at three dims, static or dynamic, and what reads it."""
    codec = CODECS[name]
    stated = codec.__doc__ or ""
    assert codec.source
    assert "64" in stated or "every D" in stated
    assert "tatic" in stated or "ynamic" in stated
    assert "read" in stated
