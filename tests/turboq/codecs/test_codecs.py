"""Every codec at every head dim, each property once (`codec_rows.ROWS` is the matrix)."""

from __future__ import annotations

import json

import jax
import jax.numpy as jnp
import numpy as np
import oracles
import pytest
from codec_rows import HEADS, ROWS, TOKENS, cell, compiling, variable
from tolerances import TOL

from turboq.codecs import (
    Codec,
    Exact,
    from_config,
)
from turboq.codecs.scalar import ScalarCodec
from turboq.numbers import codebook, distortion, packing

DIMS = (64, 80, 256)
# Time is compilation, so only the codecs of the main road run at every dim; the other formats run
# at one (and their edges at 128), and their own files test their odd ones.
CELLS = [
    (row, dim)
    for row in ROWS
    for dim in (DIMS if isinstance(ROWS[row].make(64), Exact | ScalarCodec) else (64,))
]
cells = pytest.mark.parametrize(("row", "dim"), CELLS)


@cells
def test_config_fields_and_packing(row, dim):
    c = cell(row, dim)
    codec: Codec = c["codec"]
    config = json.loads(json.dumps(codec.config()))
    assert config["codec"] == codec.name
    assert from_config(config) == codec
    assert hash(from_config(config)) == hash(codec)
    assert {k: v.shape[1:] for k, v in c["arrays"].items()} == codec.array_shapes
    assert set(c["stored"]) == {f.name for f in codec.fields}
    total = 0
    for field in codec.fields:
        values = c["stored"][field.name]
        rows = TOKENS // codec.block if field.per_block else TOKENS
        assert values.shape == (HEADS, rows, field.width)
        if field.packed:
            assert values.dtype == np.uint8
            assert values.max() < 2**field.bits
            words = packing.pack_host(values, field.bits)
            np.testing.assert_array_equal(packing.unpack_host(words), values)
            total += words.nbytes
        else:
            assert values.dtype == jnp.dtype(field.dtype)
            assert values.dtype.itemsize * 8 == field.bits
            total += values.nbytes
    assert total * 8 == codec.bits_per_vector * HEADS * TOKENS
    assert codec.bits_per_channel == codec.bits_per_vector / dim
    assert c["decoded"].dtype == np.float32
    assert c["decoded"].shape == c["x"].shape


@cells
def test_encode_equals_float64_oracle(row, dim):
    """Codes equal exhaustive search except within rounding of a threshold; scales follow."""
    c = cell(row, dim)
    codec, stored = c["codec"], c["stored"]
    if isinstance(c["codec"], Exact):
        np.testing.assert_array_equal(stored["x"], c["x"].astype(jnp.dtype(codec.dtype)))
    if not isinstance(c["codec"], ScalarCodec):  # the others have oracles in their own files
        return
    x = variable(c)
    turn = oracles.rotation(codec.rotation, dim, codec.seed) if dim <= 128 else codec.turn.matrix
    rms = np.sqrt(np.mean(x * x, -1))
    if getattr(codec, "scale", "") == "head":
        u = x @ turn.T / c["arrays"]["scale"][:, None, None]
    else:
        u = x @ turn.T / rms[..., None]
    rounding = TOL[f"stored_{codec.scale_dtype}"]
    residual = u
    if "codes" in stored:
        bits = codec.bits - ("signs" in stored)
        source = getattr(codec, "codebook", "sphere")
        table = (
            c["arrays"]["codebook"][0].astype(np.float64)
            if "codebook" in c["arrays"]
            else codebook.lloyd_max(source, bits, dim)
        )
        t = codebook.thresholds(table)
        clear = np.abs(u - t[np.clip(np.searchsorted(t, u), 0, len(t) - 1)]) > TOL["code_margin"]
        clear &= np.abs(u - t[np.clip(np.searchsorted(t, u) - 1, 0, None)]) > TOL["code_margin"]
        assert np.mean(~clear) < TOL["unclear_share"]
        np.testing.assert_array_equal(stored["codes"][clear], np.searchsorted(t, u)[clear])
        values = table[stored["codes"]]
        if "scale" in stored:
            got = stored["scale"][..., 0].astype(np.float64)
            expected = oracles.scale(codec.scale_rule, u, values, rms)
            np.testing.assert_allclose(got, expected, rtol=rounding)
            residual = u - (got / rms)[..., None] * values
    if "signs" in stored:
        sketched = residual @ codec.signs_of.matrix.T
        clear = np.abs(sketched) > TOL["code_margin"] * np.sqrt(dim)
        np.testing.assert_array_equal(stored["signs"][clear], (sketched > 0)[clear])
        gamma = np.sqrt(np.mean(residual**2, -1)) * rms
        np.testing.assert_allclose(stored["gamma"][..., 0].astype(np.float64), gamma, rtol=rounding)


@cells
def test_decode_logits_and_output_agree(row, dim):
    """decode equals the float64 formula; logits and outputs equal plain products with decode."""
    c = cell(row, dim)
    codec, stored = c["codec"], c["stored"]
    if isinstance(c["codec"], ScalarCodec):
        y = np.zeros(c["x"].shape)
        if "codes" in stored:
            table = (c["arrays"] | codec.tables)["codebook"].astype(np.float64)
            table = table if table.ndim == 1 else table[0]
            factor = stored.get("scale", c["arrays"].get("scale", np.zeros(1))[:, None, None])
            y = y + table[stored["codes"]] * factor.astype(np.float64)
        if "signs" in stored:
            z = 2.0 * stored["signs"] - 1
            gamma = stored["gamma"].astype(np.float64) * np.sqrt(dim)
            y = y + codec.signs_of.constant * gamma * (z @ codec.signs_of.matrix)
        mean = c["arrays"].get("mean", np.zeros((HEADS, dim)))[:, None]
        expected = y @ codec.turn.matrix + mean
        np.testing.assert_allclose(
            c["decoded"], expected, atol=TOL["decode_f32"] * np.abs(expected).max(), rtol=0
        )
    decoded = c["decoded"].astype(np.float64)
    logits = np.einsum("htd,hsd->hts", c["q"], decoded)
    size = np.linalg.norm(c["q"], axis=-1)[..., None] * np.linalg.norm(decoded, axis=-1)[:, None]
    assert np.max(np.abs(c["logits"] - logits) / size) < TOL["product_f32"]
    output = np.einsum("hts,hsd->htd", c["weights"], decoded)
    atol = TOL["product_f32"] * np.abs(decoded).max()
    np.testing.assert_allclose(c["output"], output, atol=atol, rtol=0)


@cells
def test_distortion_reaches_its_closed_form_and_respects_shannon(row, dim):
    c = cell(row, dim)
    x = variable(c)
    centre = c["arrays"].get("mean", np.zeros((HEADS, dim)))[:, None]
    error = np.sum((c["decoded"].astype(np.float64) - centre - x) ** 2, -1)
    power = np.array([0.25, 3.0])[:, None] ** 2 * dim
    if not isinstance(c["codec"], Exact):  # Exact's bound is far below float32's own rounding
        distortion.check_shannon(
            np.mean(error / power) * dim,
            bits_per_vector=c["codec"].bits_per_vector,
            variances=np.ones(dim),
            slack=TOL["shannon_slack"],
        )
    if (form := ROWS[row].error) is None:
        return
    per_vector = getattr(c["codec"], "scale", "") != "head"
    relative = error / (np.sum(x * x, -1) if per_vector else power)
    expected = form(dim)
    allowed = TOL["standard_errors"] * np.std(relative) / np.sqrt(relative.size)
    allowed += expected * ROWS[row].spread / dim
    assert abs(np.mean(relative) - expected) <= allowed


@pytest.mark.parametrize("dim", DIMS)
def test_scale_rules_keep_their_promise(dim):
    """unbiased: <x, x_hat> = |x|^2; matched: |x_hat| = |x|; least squares: error _|_ x_hat."""
    inner = lambda a, b: np.sum(a.astype(np.float64) * b, -1)  # noqa: E731
    for row, left, right in (
        ("mse-4-unbiased", lambda x, y: inner(x, y), lambda x, y: inner(x, x)),
        ("mse-2-matched", lambda x, y: inner(y, y), lambda x, y: inner(x, x)),
        ("mse-3-least", lambda x, y: inner(x, y), lambda x, y: inner(y, y)),
    ):
        c = cell(row, dim)
        x, y = c["x"], c["decoded"]
        rtol = TOL["rule_f16"] if row != "mse-3-least" else TOL["rule_bf16"]
        np.testing.assert_allclose(left(x, y), right(x, y), rtol=rtol, err_msg=row)


# Operation by operation, one of a kind: each compiles a hundred programs.
EAGER = ("mse-3", "prod-3", "per_head-3", "kivi_key-2", "fp8-e4m3-token", "ggml-q4_0-walsh")


@pytest.mark.parametrize("row", ROWS)
def test_vmap_equals_a_loop_over_heads(row):
    """Heads by themselves against the jitted vmap: same codes up to rounding at a threshold."""
    c = cell(row, 64)
    n = 64

    codec: Codec = c["codec"]

    def alone(arrays, x, q, stored):
        logits = codec.logits(arrays, codec.fold_query(arrays, q), stored)
        return codec.encode(arrays, x), codec.decode(arrays, stored), logits

    if row not in EAGER:
        alone = jax.jit(alone)
    for h in range(HEADS):
        arrays = {k: jnp.asarray(v[h]) for k, v in c["arrays"].items()}
        x, q = jnp.asarray(c["x"][h, :n]), jnp.asarray(c["q"][h])
        rows = {f.name: n // codec.block if f.per_block else n for f in codec.fields}
        stored = {k: jnp.asarray(v[h, : rows[k]]) for k, v in c["stored"].items()}
        with compiling(codec):
            found, decoded, logits = alone(arrays, x, q, stored)
        for name, values in found.items():
            got = np.asarray(values, np.float64)
            same = np.isclose(got, stored[name], rtol=TOL["scale_step"], atol=0)
            assert np.mean(same) >= 1 - TOL["unclear_share"], name
        atol = TOL["decode_f32"] * np.abs(c["decoded"]).max()
        np.testing.assert_allclose(decoded, c["decoded"][h, :n], atol=atol, rtol=0)
        atol = TOL["product_f32"] * np.abs(c["logits"]).max()
        np.testing.assert_allclose(logits, c["logits"][h, :, :n], atol=atol, rtol=0)
