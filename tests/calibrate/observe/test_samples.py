"""Samples are what transformers' attention sees; fitted formats get the arrays they declare."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import TOL

from turboq import codecs as c
from turboq.cache.layer import TokenPolicy, uniform_layer
from turboq.cache.simulate import simulate
from turboq.errors import TurboqError
from turboq.numbers.rope import inverse_frequencies
from turboq_calibrate.measure.attention_plugs import packed_attend, simulated_attend
from turboq_calibrate.models import load_model
from turboq_calibrate.models.decoder import exact_attend
from turboq_calibrate.observe import samples as module
from turboq_calibrate.observe.samples import collect_samples

GOLDEN = Path(__file__).parent.parent.parent / "golden" / "llama3"


@pytest.fixture(scope="module")
def golden():
    return np.load(GOLDEN / "golden.npz")


@pytest.fixture(scope="module")
def layers(golden):
    model = load_model(GOLDEN)
    return collect_samples(model, golden["tokens"], skip=3, positions=golden["positions"])


def test_samples_are_what_transformers_sees(golden, layers):
    for i, layer in enumerate(layers):
        for side in ("k", "v"):
            want = golden[f"{side}{i}"][:, 3:]
            want = np.moveaxis(want, 2, 0).reshape(want.shape[2], -1, want.shape[3])
            got = getattr(layer, side)
            atol = TOL["capture_golden"] * np.abs(want).max()
            np.testing.assert_allclose(got, want, rtol=0, atol=atol)
        q = golden[f"q{i}"][:, 3:].astype(np.float64)
        per_kv = q.shape[2] // layer.k.shape[0]
        for head in range(layer.k.shape[0]):
            x = q[:, :, head * per_kv : (head + 1) * per_kv].reshape(-1, q.shape[3])
            atol = 2 * TOL["capture_golden"] * np.abs(x).max() ** 2
            np.testing.assert_allclose(layer.q_moment[head], x.T @ x / len(x), rtol=0, atol=atol)


def test_pre_rope_samples_undo_the_rotary_embedding(golden):
    """Rotating them again, in float64 complex numbers, gives what transformers' attention sees."""
    model = load_model(GOLDEN)
    got = collect_samples(
        model, golden["tokens"], skip=3, positions=golden["positions"], pre_rope=True
    )
    turns = inverse_frequencies(model.spec.layers[0].rope).astype(np.float64)
    angle = golden["positions"][:, 3:, None].astype(np.float64) * turns
    angle = angle.reshape(-1, angle.shape[-1])
    for i, layer in enumerate(got):
        half = layer.k.shape[-1] // 2
        z = (layer.k[..., :half] + 1j * layer.k[..., half:]) * np.exp(1j * angle)[None]
        want = golden[f"k{i}"][:, 3:]
        want = np.moveaxis(want, 2, 0).reshape(want.shape[2], -1, want.shape[3])
        atol = 2 * TOL["capture_golden"] * np.abs(want).max()
        np.testing.assert_allclose(np.concatenate([z.real, z.imag], -1), want, rtol=0, atol=atol)
        assert np.max(np.abs(layer.k - want)) > 0.1 * np.abs(want).max()


def test_attention_plugs_honour_keys_before_rope(golden):
    """An exact codec changes nothing; a coarse one errs where it would on unrotated keys."""
    spec, policy = load_model(GOLDEN).spec.layers[0], TokenPolicy(sinks=2, exact_dtype="float32")
    rng = np.random.default_rng(5)
    q, k, v = (jnp.asarray(rng.standard_normal((1, 9, n, 16)), jnp.float32) for n in (4, 2, 2))
    at = jnp.arange(9, dtype=jnp.int32)[None]

    def layer(codec):
        return uniform_layer(kv_heads=2, k=codec, v=codec, policy=policy, rope=spec.rope)

    want, _ = exact_attend(spec, q, k, v, at, None)
    exact, errors = simulated_attend(spec, q, k, v, at, layer(c.Exact(dim=16, dtype="float32")))
    np.testing.assert_allclose(exact, want, atol=TOL["attention_f32"])
    assert np.max(np.asarray(errors["k_rel_mse"])) < TOL["attention_f32"]
    coarse = layer(c.IntAffine(dim=16, bits=1, rotation="identity"))
    # By hand: un-rotate in float64, quantize each vector, rotate back, keep the sinks.
    angle = np.arange(9)[:, None] * inverse_frequencies(spec.rope).astype(np.float64)
    z = np.exp(1j * angle)[None, :, None]
    pre = (np.asarray(k)[..., :8] + 1j * np.asarray(k)[..., 8:]) / z
    pre = jnp.asarray(np.concatenate([pre.real, pre.imag], -1), jnp.float32)
    plain = dataclasses.replace(coarse, rope=None)
    back, v_hat = (np.array(x) for x in simulate(plain, pre, v))
    post = (back[..., :8] + 1j * back[..., 8:]) * z
    k_hat = np.concatenate([post.real, post.imag], -1).astype(np.float32)
    k_hat[:, :2], v_hat[:, :2] = np.asarray(k)[:, :2], np.asarray(v)[:, :2]
    by_hand, _ = exact_attend(spec, q, jnp.asarray(k_hat), jnp.asarray(v_hat), at, None)
    for plug in (simulated_attend, packed_attend):
        turned, errors = plug(spec, q, k, v, at, coarse)
        np.testing.assert_allclose(turned, by_hand, atol=TOL["packed_attention"])
        other = plug(spec, q, k, v, at, plain)[1]
        assert not np.allclose(errors["k_rel_mse"], other["k_rel_mse"], rtol=0.05)


def test_refuses_nan(golden, monkeypatch):
    nan = np.full((1, 5, 2, 16), np.nan, np.float32)
    monkeypatch.setattr(module, "forward", lambda *_, **__: (None, [(nan, nan, nan)]))
    with pytest.raises(TurboqError, match="layer 0: keys or values hold NaN"):
        collect_samples(load_model(GOLDEN), golden["tokens"])
