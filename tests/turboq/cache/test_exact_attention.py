"""Reference attention against float64 NumPy, one query at a time."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import TOL

from turboq.cache import exact_attention
from turboq.cache.exact_attention import attention


def attention64(q, k, v, *, scale, window=None, softcap=None, q_positions=None, k_positions=None):
    """softmax over the keys that each single query may see, in float64, by explicit loops."""
    batch, t, heads, _ = q.shape
    per_kv = heads // k.shape[2]
    out = np.zeros((batch, t, heads, v.shape[-1]))
    for b in range(batch):
        for i in range(t):
            at = i if q_positions is None else q_positions[b, i]
            s = np.arange(k.shape[1]) if k_positions is None else k_positions[b]
            keep = (s >= 0) & (s <= at)
            if window is not None:
                keep &= s > at - window
            if not keep.any():
                continue
            for h in range(heads):
                logits = k[b, keep, h // per_kv].astype(np.float64) @ q[b, i, h] * scale
                if softcap is not None:
                    logits = softcap * np.tanh(logits / softcap)
                p = np.exp(logits - logits.max())
                out[b, i, h] = (p / p.sum()) @ v[b, keep, h // per_kv]
    return out


def make(rng, batch=2, t=9, s=9, heads=4, kv_heads=2, dim=16, value_dim=24):
    shapes = (batch, t, heads, dim), (batch, s, kv_heads, dim), (batch, s, kv_heads, value_dim)
    return tuple(rng.standard_normal(shape).astype(np.float32) for shape in shapes)


@pytest.mark.parametrize("window", [None, 1, 4])
@pytest.mark.parametrize("softcap", [None, 2.0])
@pytest.mark.parametrize("query_block", [512, 4, 1])  # one block, blocks, blocks of two prefixes
def test_matches_float64(rng, window, softcap, query_block):
    q, k, v = make(rng)
    got = attention(
        *map(jnp.asarray, (q, k, v)),
        scale=0.25, window=window, softcap=softcap, query_block=query_block,
    )  # fmt: skip
    want = attention64(q, k, v, scale=0.25, window=window, softcap=softcap)
    np.testing.assert_allclose(got, want, atol=TOL["attention_f32"])


@pytest.mark.parametrize("window", [6, 3])  # read in prefixes, and window by window
def test_gradients_in_blocks_are_those_of_one(rng, window):
    q, k, v = map(jnp.asarray, make(rng))

    def pulled(query_block):
        out, pull = jax.vjp(
            lambda *x: attention(*x, scale=0.25, window=window, query_block=query_block), q, k, v
        )
        return pull(jnp.cos(jnp.arange(out.size, dtype=jnp.float32)).reshape(out.shape))

    for got, want in zip(pulled(1), pulled(512), strict=True):
        np.testing.assert_allclose(got, want, atol=TOL["attention_f32"])


@pytest.mark.parametrize("window", [None, 3])
@pytest.mark.parametrize("order", ["in order", "later", "shuffled"])
def test_many_keys_are_read_as_far_as_they_are_seen(rng, monkeypatch, window, order):
    monkeypatch.setattr(exact_attention, "LONG", 32)
    q, k, v = make(rng, t=23, s=23 if order == "in order" else 37)
    at = None
    keys = None
    if order != "in order":
        at = np.stack([np.arange(23), np.arange(14, 37)]).astype(np.int32)
    if order == "shuffled":
        keys = np.argsort(rng.random((2, 37)), axis=1).astype(np.int32)
    given = {} if at is None else {"q_positions": jnp.asarray(at)}
    given |= {} if keys is None else {"k_positions": jnp.asarray(keys)}
    got = attention(*map(jnp.asarray, (q, k, v)), scale=0.25, window=window, query_block=2, **given)
    want = attention64(q, k, v, scale=0.25, window=window, q_positions=at, k_positions=keys)
    np.testing.assert_allclose(got, want, atol=TOL["attention_f32"])


def test_keys_out_of_order_are_read_by_blocks_too(rng):
    q, k, v = make(rng)
    order = np.argsort(rng.random((2, 9)), axis=1).astype(np.int32)
    got = attention(
        *map(jnp.asarray, (q, k, v)), scale=0.25, k_positions=jnp.asarray(order), query_block=1
    )
    want = attention64(q, k, v, scale=0.25, k_positions=order)
    np.testing.assert_allclose(got, want, atol=TOL["attention_f32"])


def test_positions_and_empty_slots(rng):
    q, k, v = make(rng, t=3, s=7)
    q_positions = np.array([[4, 5, 6], [0, 1, 2]], np.int32)
    k_positions = np.array([[3, 4, -1, 0, 6, 5, 1], [-1, -1, 2, -1, -1, -1, -1]], np.int32)
    v[0, 2] = 1e6  # an empty slot's content must not matter
    q_j, k_j, v_j = map(jnp.asarray, (q, k, v))
    got = attention(
        q_j,
        k_j,
        v_j,
        scale=0.25,
        q_positions=jnp.array(q_positions),
        k_positions=jnp.array(k_positions),
    )
    want = attention64(q, k, v, scale=0.25, q_positions=q_positions, k_positions=k_positions)
    np.testing.assert_allclose(got, want, atol=TOL["attention_f32"])
    assert not np.any(np.asarray(got)[1, :2])  # saw no key at all


def test_refuses_heads_that_do_not_divide(rng):
    q, k, v = make(rng, heads=3)
    with pytest.raises(ValueError, match="heads=3"):
        attention(*map(jnp.asarray, (q, k, v)), scale=1.0)
