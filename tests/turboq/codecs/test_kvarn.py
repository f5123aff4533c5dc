"""KVarN-like blocks against float64, what balancing buys, and its edges."""

import jax
import jax.numpy as jnp
import numpy as np
import oracle_affine
import pytest
from tolerances import TOL

from turboq.codecs.kvarn import KVarN, balance

encode = jax.jit(KVarN.encode, static_argnums=0)
decode = jax.jit(KVarN.decode, static_argnums=0)
even_out = jax.jit(balance, static_argnums=(1, 2))


def balance_f64(tile, iterations, axis):
    """One tile [T, D] in float64: (token scales, channel scales) of the most even state."""
    x = tile / np.sqrt(np.mean(tile**2))

    def uneven(y):
        return sum(s.max() / s.min() for s in (y.std(0, ddof=1), y.std(1, ddof=1)))

    log = {"token": np.zeros((len(x), 1)), "channel": np.zeros((1, x.shape[1]))}
    over = {"token": 1, "channel": 0}
    best = (uneven(x), dict(log))
    order = ("token", "channel") if axis == "channel" else ("channel", "token")
    for _ in range(iterations):
        for side in order:
            y = x / np.exp(log["token"] + log["channel"])
            std = y.std(over[side], ddof=1, keepdims=True).clip(1e-3, 1e3)
            log[side] = np.clip(log[side] + np.log(std), -0.3, 10)
        now = uneven(x / np.exp(log["token"] + log["channel"]))
        if now <= best[0]:
            best = (now, dict(log))
    return np.exp(best[1]["token"]), np.exp(best[1]["channel"])


def rough(rng, tokens, dim):
    """Tokens and channels of very different sizes."""
    x = rng.normal(size=(tokens, dim)) * np.geomspace(1, 5, dim)
    return (x * np.exp(rng.normal(size=(tokens, 1)) * 0.7)).astype(np.float32)


@pytest.mark.parametrize("axis", ["channel", "token"])
@pytest.mark.parametrize("iterations", [0, 3])
def test_balance_follows_float64(axis, iterations, rng):
    """Three rounds, before small differences in evenness can choose another round."""
    x = rough(rng, 64, 16).reshape(2, 32, 16)
    token, channel = even_out(jnp.asarray(x), iterations, axis)
    for i in range(2):
        due = balance_f64(x[i].astype(np.float64), iterations, axis)
        np.testing.assert_allclose(token[i], due[0], rtol=TOL["balance_f32"])
        np.testing.assert_allclose(channel[i], due[1], rtol=TOL["balance_f32"])


def test_balance_makes_blocks_even(rng):
    """Where the limits do not bind: after 16 rounds all stds of tokens and channels agree."""
    x = rough(rng, 64, 32)
    token, channel = (np.asarray(a, np.float64) for a in even_out(jnp.asarray(x), 16, "channel"))
    unit = x / np.sqrt(np.mean(x.astype(np.float64) ** 2))
    free = token[:, 0] > np.exp(-0.3) * 1.001
    assert 10 < free.sum() < 64
    std = (unit / token / channel).std(1, ddof=1)
    np.testing.assert_allclose(std[free], std[free].mean(), rtol=0.02)
    assert unit.std(1, ddof=1)[free].max() > 3 * unit.std(1, ddof=1)[free].min()


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_follows_float64(axis, rng):
    codec = KVarN(dim=32, bits=2 if axis == "token" else 4, axis=axis, group=32)
    x = rough(rng, 64, 32)
    fields = encode(codec, {}, jnp.asarray(x))
    stored = {k: np.asarray(v) for k, v in fields.items()}
    y = (x.astype(np.float64) @ codec.turn.matrix.T).reshape(2, 32, 32)
    token, channel = even_out(jnp.asarray(y, jnp.float32), 16, axis)
    f = {k: v.astype(np.float64) for k, v in stored.items() if k != "codes"}
    codes = stored["codes"].reshape(y.shape)
    if axis == "channel":
        even = f["token_scale"].reshape(2, 32, 1)
        np.testing.assert_allclose(even, token, rtol=TOL["stored_float16"] + TOL["balance_f32"])
        scale, low = f["scale"][:, None], f["minimum"][:, None]
        oracle_affine.check(y / even, codes, scale, low, 4, 1)
    else:
        even = f["channel_scale"][:, None]
        np.testing.assert_allclose(even, channel, rtol=TOL["stored_float16"] + TOL["balance_f32"])
        scale, low = f["scale"].reshape(2, 32, 1), f["minimum"].reshape(2, 32, 1)
        oracle_affine.check(y / even, codes, scale, low, 2, 2)
    y_hat = ((low + scale * codes) * even).reshape(x.shape)
    oracle_affine.close(decode(codec, {}, fields), y_hat @ codec.turn.matrix)


def test_token_scales_protect_ordinary_tokens(rng):
    """A few tokens 30 times larger: without token scales they set every channel's range."""
    x = rng.normal(size=(128, 32)).astype(np.float32)
    x[::40] *= 30
    rest = np.arange(128) % 40 != 0
    error = {}
    for iterations in (0, 16):
        codec = KVarN(dim=32, bits=4, iterations=iterations)
        got = decode(codec, {}, encode(codec, {}, jnp.asarray(x)))
        error[iterations] = np.mean((np.asarray(got) - x)[rest] ** 2)
    assert error[16] < error[0] / 20


def test_bits():
    assert [KVarN(dim=d, bits=4).bits_per_channel for d in (64, 128, 256)] == [4.5, 4.375, 4.3125]
    values = [KVarN(dim=d, bits=2, axis="token").bits_per_channel for d in (64, 128, 256)]
    assert values == [2.625, 2.375, 2.25]


@pytest.mark.parametrize("axis", ["channel", "token"])
def test_commutes_with_size(axis, rng):
    """Limits apply to the block over its rms: codes do not depend on the size of the vectors."""
    codec = KVarN(dim=32, bits=3, axis=axis, group=32, scale_dtype="float32")
    x = rough(rng, 32, 32)
    plain = encode(codec, {}, jnp.asarray(x))
    for size in (1e-3, 1e4):
        scaled = encode(codec, {}, jnp.asarray(x * np.float32(size)))
        same = np.asarray(plain["codes"]) == np.asarray(scaled["codes"])
        assert np.mean(same) > 1 - TOL["affine_unclear"]


def test_edges(rng):
    """A zero block is exact; constant, one-hot and huge blocks stay finite; NaN shows."""
    codec = KVarN(dim=16, bits=2, group=32)
    x = np.zeros((5 * 32, 16), np.float32)
    x[32:64] = 2.0
    x[70, 3] = -5.0
    x[96:128] = rng.normal(size=(32, 16)) * 1e4
    x[130, 3] = np.nan
    stored = encode(codec, {}, jnp.asarray(x))
    got = np.asarray(decode(codec, {}, stored))
    np.testing.assert_array_equal(got[:32], 0)
    np.testing.assert_allclose(got[32:64], 2.0, rtol=TOL["rule_f16"])
    assert np.all(np.isfinite(got[:128]))
    assert np.all(np.isnan(np.asarray(stored["minimum"][4])))
    with pytest.raises(ValueError, match="iterations=65 must be"):
        KVarN(dim=16, bits=2, iterations=65)
    with pytest.raises(ValueError, match="axis='head' must be one of"):
        KVarN(dim=16, bits=2, axis="head")
