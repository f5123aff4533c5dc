"""Uses that public reports break on: odd head dims, beams that change places, dead heads."""

import jax.numpy as jnp
import kernel_oracle
import kv_cases as cases
import numpy as np
import pytest
from tolerances import TOL

import turboq_kernels
from turboq.cache import contiguous as kv_cache
from turboq.cache.layer import TokenPolicy, uniform_layer
from turboq.cache.pool import Pool
from turboq.codecs import PerHead, TurboQuantMSE

SCALE, GROUP, HEADS = 0.3, 3, 2


def random(rng, batch, t, heads, dim):
    return jnp.asarray(rng.standard_normal((batch, t, heads, dim)), jnp.float32)


def in_two_chunks(layer, q, k, v):
    """Prefill of all but three tokens, then these."""
    cache, outs = kv_cache.init(layer, batch=q.shape[0], capacity=k.shape[1]), []
    for part in (slice(0, -3), slice(-3, None)):
        size = q[:, part].shape[1]
        positions = cache.lengths[:, None] + jnp.arange(size, dtype=jnp.int32)[None, :]
        cache, tail = kv_cache.write(layer, cache, k[:, part], v[:, part])
        outs.append(
            turboq_kernels.cache_attention(
                q[:, part], layer, cache, tail, q_positions=positions, scale=SCALE
            )
        )
    return np.concatenate(outs, axis=1)


@pytest.mark.parametrize(("k_dim", "v_dim"), [(40, 72), (192, 128), (576, 512)])
def test_head_dims_that_are_no_power_of_two(rng, k_dim, v_dim):
    layer = uniform_layer(
        kv_heads=HEADS,
        k=TurboQuantMSE(dim=k_dim, bits=3),
        v=TurboQuantMSE(dim=v_dim, bits=4),
        policy=TokenPolicy(sinks=2, recent=2),
    )
    q, k = random(rng, 1, 12, GROUP * HEADS, k_dim), random(rng, 1, 12, HEADS, k_dim)
    v = random(rng, 1, 12, HEADS, v_dim)
    got = in_two_chunks(layer, q, k, v)
    assert got.shape == (1, 12, GROUP * HEADS, v_dim)
    want = kernel_oracle.policy_attention(layer, q, k, v, scale=SCALE)
    np.testing.assert_allclose(got, want, atol=TOL["packed_attention"])


def test_beams_that_change_places(rng):
    """Of three beams the last goes on twice, in other places, and the first ends: every one that
    goes on sees its own past, whichever place it has."""
    layer = cases.make_layer("per_head", rng)
    pool = Pool([layer], pages=16, rows=8, per_sequence=4, page=64)
    past_k, past_v = cases.tokens(rng, layer, 70, 3)
    beams = [pool.pager.create() for _ in range(3)]
    pool.write(0, pool.step(beams, [70] * 3), past_k, past_v)
    order = [2, 1, 2]
    names = [pool.pager.fork(beams[i]) for i in order]
    for name in beams:
        pool.pager.drop(name)
    k, v = cases.tokens(rng, layer, 5, 3)
    q = random(rng, 3, 5, GROUP * HEADS, cases.DIM)
    where = pool.step(names, [5] * 3)
    tail = pool.write(0, where, k, v)
    positions = where.starts[:, None] + jnp.arange(5, dtype=jnp.int32)[None, :]
    got = turboq_kernels.cache_attention(
        q, layer, pool.view(0, where), tail, q_positions=positions, scale=SCALE
    )
    whole_k, whole_v = (
        jnp.concatenate([past[np.array(order)], new], axis=1)
        for past, new in ((past_k, k), (past_v, v))
    )
    padded = jnp.concatenate([jnp.zeros((3, 70, *q.shape[2:]), jnp.float32), q], axis=1)
    want = kernel_oracle.policy_attention(layer, padded, whole_k, whole_v, scale=SCALE)[:, 70:]
    np.testing.assert_allclose(got, want, atol=TOL["packed_attention"])
    for name in names:
        pool.pager.drop(name)
    assert pool.pager.report().active == 0


def test_a_dead_head_is_finite_and_leaves_others_alone(rng):
    """A KV head of zeros, as pruned models have: scale and norm of nothing."""
    codec = PerHead(dim=cases.DIM, bits=3)
    arrays = cases.learned(rng, HEADS, 3)
    dead = {name: x.at[1].set(0) for name, x in arrays.items() if name != "codebook"}
    arrays |= dead
    layer = uniform_layer(
        kv_heads=HEADS, k=codec, v=codec, policy=TokenPolicy(), k_arrays=arrays, v_arrays=arrays
    )
    k, v = (x.at[:, :, 1].set(0) for x in cases.tokens(rng, layer, 12, 1))
    q = random(rng, 1, 12, GROUP * HEADS, cases.DIM)
    got = in_two_chunks(layer, q, k, v)
    assert np.isfinite(got).all()
    np.testing.assert_array_equal(got[:, :, GROUP:], 0)
    want = kernel_oracle.policy_attention(layer, q, k, v, scale=SCALE)
    np.testing.assert_allclose(got, want, atol=TOL["packed_attention"])
