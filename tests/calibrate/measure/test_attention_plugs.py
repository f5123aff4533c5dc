"""Attention plugs on layers whose keys are stored before their rotary embedding."""

import dataclasses
from pathlib import Path

import jax.numpy as jnp
import numpy as np
from tolerances import TOL

from turboq import codecs as c
from turboq.cache.layer import TokenPolicy, uniform_layer
from turboq.cache.simulate import simulate
from turboq.numbers.rope import inverse_frequencies
from turboq_calibrate.measure.attention_plugs import packed_attend, simulated_attend
from turboq_calibrate.models import load_model
from turboq_calibrate.models.decoder import exact_attend

GOLDEN = Path(__file__).parents[2] / "golden" / "llama3"


def test_attention_plugs_honour_keys_before_rope():
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
