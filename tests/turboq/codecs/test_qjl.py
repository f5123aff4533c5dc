"""QJL: constants, unbiasedness and variance over sketches, orthogonality, bits."""

from __future__ import annotations

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import TOL

from turboq.codecs.qjl import QJL
from turboq.numbers import distortion


def estimates(kind, dim, rows, cosine, seeds):
    """Estimates of <q, k> over many sketches for one pair with that cosine; both of norm 2."""
    rng = np.random.default_rng(4)
    k = rng.normal(size=dim)
    k *= 2 / np.linalg.norm(k)
    w = rng.normal(size=dim)
    w -= k * (w @ k) / (k @ k)
    q = cosine * k + np.sqrt(1 - cosine**2) * w * 2 / np.linalg.norm(w)
    out = []
    for seed in seeds:
        s = QJL(dim=dim, rows=rows, sketch=kind, seed=seed)
        # float64 twin of encode and logits, of the definition
        out.append(s.constant * np.linalg.norm(k) * (s.matrix @ q) @ np.sign(s.matrix @ k))
    return np.array(out), q @ k


@pytest.mark.parametrize("cosine", [0.0, 0.9])
@pytest.mark.parametrize(("kind", "rows"), [("gaussian", 16), ("gaussian", 32), ("orthogonal", 32)])
def test_unbiased_with_the_stated_variance(kind, rows, cosine):
    """Seeds two apart share no sketch: 2000 independent draws at D=16."""
    got, true = estimates(kind, 16, rows, cosine, range(0, 4000, 2))
    if kind == "gaussian":
        variance = (np.pi / 2 * 16 - true**2) / rows
    else:
        variance = distortion.sketch_variance(
            kind, 16, query_norm=2.0, residual_norm=2.0, cosine=cosine
        ) * (16 / rows)
    n = len(got)
    assert abs(np.mean(got) - true) < TOL["standard_errors"] * np.sqrt(variance / n)
    spread = np.std((got - true) ** 2) / np.sqrt(n)
    assert abs(np.mean((got - true) ** 2) - variance) < TOL["standard_errors"] * spread


@pytest.mark.parametrize("kind", ["gaussian", "orthogonal"])
def test_codec_computes_the_definition(kind, rng):
    """Stored fields, logits, outputs and decode against float64; decode is linear in q."""
    dim, rows = 64, 128
    codec = QJL(dim=dim, rows=rows, sketch=kind, seed=3)
    s = codec.matrix
    assert s.shape == (rows, dim)
    assert not np.allclose(s[:dim], s[dim:])
    if kind == "orthogonal":
        for block in (s[:dim], s[dim:]):
            np.testing.assert_allclose(block @ block.T, np.eye(dim), atol=TOL["orthogonal_f64"])
    k = rng.normal(size=(50, dim)) * 30
    q = rng.normal(size=(4, dim))
    stored = jax.jit(codec.encode)({}, jnp.asarray(k, jnp.float32))
    sketched = k @ s.T
    clear = np.abs(sketched) > TOL["code_margin"] * 30 * np.sqrt(dim)
    np.testing.assert_array_equal(np.asarray(stored["signs"])[clear], (sketched > 0)[clear])
    norm = np.linalg.norm(k, axis=1)
    np.testing.assert_allclose(
        np.asarray(stored["scale"][:, 0], np.float64) * np.sqrt(dim),
        norm,
        rtol=TOL["stored_float16"],
    )
    z = 2.0 * np.asarray(stored["signs"]) - 1
    kept = np.asarray(stored["scale"], np.float64) * np.sqrt(dim)
    expected = codec.constant * (q @ s.T) @ (z * kept).T
    size = np.abs(expected).max()

    def read(q, stored):
        return codec.logits({}, codec.fold_query({}, q), stored), codec.decode({}, stored)

    logits, decoded = jax.jit(read)(jnp.asarray(q, jnp.float32), stored)
    np.testing.assert_allclose(logits, expected, rtol=0, atol=TOL["product_f32"] * size)
    decoded = np.asarray(decoded, np.float64)
    np.testing.assert_allclose(q @ decoded.T, expected, rtol=0, atol=TOL["product_f32"] * size)


@pytest.mark.parametrize(
    ("dim", "rows", "bpc"), [(64, 256, 4.25), (128, 256, 2.125), (256, 256, 1.0625)]
)
def test_bits(dim, rows, bpc):
    assert QJL(dim=dim, rows=rows).bits_per_channel == bpc


@pytest.mark.parametrize("rows", [0, 100, -64, True])
def test_bad_rows_are_named(rows):
    with pytest.raises(ValueError, match=r"rows=.* must be a multiple of dim=64"):
        QJL(dim=64, rows=rows)
