"""A pool of pages against float64 and against the contiguous cache, byte by byte."""

import importlib.util
import sys
from pathlib import Path

import jax
import jax.numpy as jnp
import kernel_oracle
import kv_cases as cases
import numpy as np
import pytest
from tolerances import TOL

import turboq_kernels
from turboq.cache import contiguous as kv_cache
from turboq.cache import paged as paged_cache
from turboq.cache.layer import TokenPolicy, uniform_layer
from turboq.cache.pool import Pool
from turboq.codecs import IntAffine
from turboq.numbers.packing import PAGE
from turboq_kernels.encode import encode
from turboq_kernels.prefill.api import prefill

SCALE, GROUP = 0.3, 3
ROOT = Path(__file__).parents[2]


def inputs(rng, layer, t, batch=2):
    k, v = cases.tokens(rng, layer, t, batch)
    q = rng.standard_normal((batch, t, GROUP * layer.kv_heads, cases.DIM)).astype(np.float32)
    return jnp.asarray(q), k, v


def make_pool(layer, *, page=64, pages=12, rows=4, per_sequence=4):
    return Pool([layer], pages=pages, rows=rows, per_sequence=per_sequence, page=page)


def attend(pool, where, tail, q, **options):
    positions = where.starts[:, None] + jnp.arange(q.shape[1], dtype=jnp.int32)[None, :]
    return turboq_kernels.cache_attention(
        q, pool.layers[0], pool.view(0, where), tail, q_positions=positions, scale=SCALE, **options
    )


def run(pool, names, q, k, v, sizes, **options):
    outs, at = [], 0
    for size in sizes:
        part = slice(at, at + size)
        where = pool.step(names, [size] * len(names))
        tail = pool.write(0, where, k[:, part], v[:, part])
        outs.append(attend(pool, where, tail, q[:, part], **options))
        at += size
    return jnp.concatenate(outs, axis=1)


def test_matches_float64(rng):
    """Two chunks over a page's end, then decode; pages are handed out in mixed order."""
    layer = cases.make_layer("blocks", rng)
    pool = make_pool(layer)
    spare = [pool.pager.create() for _ in range(2)]
    pool.step(spare, [3, 1])
    pool.pager.drop(spare[0])
    names = [pool.pager.create(), pool.pager.create()]
    q, k, v = inputs(rng, layer, 75)
    got = run(pool, names, q, k, v, (35, 35, *(1,) * 5), window=40, softcap=2.0)
    want = kernel_oracle.policy_attention(layer, q, k, v, scale=SCALE, window=40, softcap=2.0)
    np.testing.assert_allclose(got, want, atol=TOL["packed_attention"])


def test_pages_hold_the_bytes_of_the_contiguous_cache(rng):
    """At once, and a chunk and one by one; pages of 256 are those of `cache.contiguous`."""
    layer = cases.make_layer("per_head", rng, TokenPolicy(sinks=2))
    _, k, v = inputs(rng, layer, 261)
    flat, _ = kv_cache.write(layer, kv_cache.init(layer, batch=2, capacity=512), k, v)
    for sizes in ((261,), (254, *(1,) * 7)):
        pool = make_pool(layer, page=256, per_sequence=2)
        names, at = [pool.pager.create(), pool.pager.create()], 0
        for size in sizes:
            where = pool.step(names, [size] * 2)
            pool.write(0, where, k[:, at : at + size], v[:, at : at + size])
            at += size
        table = np.array([pool.pager.pages_of(n) for n in names])
        for g, buffers in enumerate(pool.caches[0].groups):
            pooled, wanted = (buffers.k, buffers.v), (flat.groups[g].k, flat.groups[g].v)
            for a, b in zip(jax.tree.leaves(pooled), jax.tree.leaves(wanted), strict=True):
                got = np.asarray(a)[table].swapaxes(1, 2).reshape(b.shape)
                np.testing.assert_array_equal(got, np.asarray(b))


@pytest.mark.parametrize("name", ["per_head", "blocks"])  # read by levels, and through the codec
def test_a_pool_of_bits(name, rng):
    """The same numbers as in a pool of float16, and outputs of the same."""
    layer = cases.make_layer(name, rng)
    q, k, v = inputs(rng, layer, 70)
    pools, found = [make_pool(layer) for _ in range(2)], []
    init = paged_cache.init(layer, pages=12, rows=4, page=64, float16_bits=True)
    pools[1].caches[0] = init
    for pool in pools:
        names = [pool.pager.create(), pool.pager.create()]
        found.append(run(pool, names, q, k, v, (65, *(1,) * 5)))
    np.testing.assert_array_equal(*found)
    kinds = [{x.dtype for x in jax.tree.leaves(p.caches[0].groups)} for p in pools]
    assert kinds[0] - kinds[1] == {jnp.dtype(jnp.float16)}
    assert kinds[1] - kinds[0] == {jnp.dtype(jnp.uint16)}
    plain, bits = (jax.tree.leaves(p.caches[0].groups) for p in pools)
    for a, b in zip(plain, bits, strict=True):
        np.testing.assert_array_equal(np.asarray(a).view(b.dtype), b)


def test_used_pages_and_rejected_tokens_leave_no_trace(rng):
    """Pages that were full of NaN before, and tokens taken back, change no bit of what is read."""
    layer = cases.make_layer("per_head", rng, TokenPolicy(sinks=2))
    q, k, v = inputs(rng, layer, 70)
    clean, used = make_pool(layer, pages=4), make_pool(layer, pages=4)
    want = run(clean, [clean.pager.create(), clean.pager.create()], q, k, v, (35, 35))
    old = [used.pager.create(), used.pager.create()]
    run(used, old, -q, -2 * k, v + 1, (35, 35))
    used.caches[0] = jax.tree.map(
        lambda x: x if x.dtype == jnp.uint32 else jnp.full(x.shape, jnp.nan, x.dtype),
        used.caches[0],
    )
    for name in old:
        used.pager.drop(name)
    names = [used.pager.create(), used.pager.create()]
    first = run(used, names, q[:, :35], k[:, :35], v[:, :35], (35,))
    run(used, names, q[:, :35], 7 * k[:, :35], v[:, :35] - 3, (35,))
    for name in names:
        used.pager.truncate(name, 35)
    again = run(used, names, q[:, 35:], k[:, 35:], v[:, 35:], (35,))
    got = np.concatenate([np.asarray(first), np.asarray(again)], axis=1)
    np.testing.assert_array_equal(got, np.asarray(want))


def test_forks_go_their_own_ways(rng):
    """A shared prefix of one page and a half, then different tokens, recent window included."""
    layer = cases.make_layer("per_head", rng)
    q, k, v = inputs(rng, layer, 110)
    pool = make_pool(layer)
    a = pool.pager.create()
    pool.write(0, pool.step([a], [100]), k[:1, :100], v[:1, :100])
    b = pool.pager.fork(a)
    assert pool.pager.report().saved == 2
    both_k, both_v = (x.at[1, :100].set(x[0, :100]) for x in (k, v))
    tail = slice(100, 110)
    got = run(pool, [a, b], q[:, tail], both_k[:, tail], both_v[:, tail], (10,))
    assert pool.pager.report().saved == 1  # the half page was copied, the whole one was not
    want = kernel_oracle.policy_attention(layer, q, both_k, both_v, scale=SCALE)[:, tail]
    np.testing.assert_allclose(got, want, atol=TOL["packed_attention"])


def test_missing_copy_on_write_is_caught(rng, monkeypatch):
    """Without the copy a fork overwrites its parent."""
    monkeypatch.setattr(paged_cache, "copy", lambda cache, step: cache)
    with pytest.raises(AssertionError):
        test_forks_go_their_own_ways(rng)


@pytest.mark.parametrize(("name", "paged"), [("mixed", False), ("blocks", True)])
def test_prefill_sees_its_own_tokens_exactly(rng, name, paged):
    """Chunks over their history (the first two around the sinks); the cache is as by `write`."""
    layer = cases.make_layer(name, rng)
    q, k, v = inputs(rng, layer, 20)
    pool, outs = make_pool(layer, page=256, per_sequence=1), []
    names = [pool.pager.create(), pool.pager.create()]
    cache = pool.caches[0] if paged else kv_cache.init(layer, batch=2, capacity=PAGE)
    for begin in range(0, 20, 2):
        part = [x[:, begin : begin + 2] for x in (q, k, v)]
        where = paged_cache.locate(pool.pager.plan(names, [2, 2])) if paged else None
        out, cache = prefill(*part, layer, cache, where=where, scale=SCALE, window=16)
        outs.append(out)
    starts = np.arange(20) // 2 * 2
    want = kernel_oracle.policy_attention(layer, q, k, v, scale=SCALE, window=16, own_from=starts)
    np.testing.assert_allclose(np.concatenate(outs, axis=1), want, atol=TOL["packed_attention"])
    plain, _ = kv_cache.write(layer, kv_cache.init(layer, batch=2, capacity=PAGE), k, v)
    if paged:
        where = paged_cache.locate(pool.pager.plan(names, [0, 0]))
        found, wanted = cache.groups[0].k["codes"][where.table[:, 0]], plain.groups[0].k["codes"]
        np.testing.assert_array_equal(np.asarray(found), np.asarray(wanted)[:, :, 0])
    else:
        for a, b in zip(jax.tree.leaves(cache), jax.tree.leaves(plain), strict=True):
            np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_prefill_of_different_lengths(rng):
    """Padding queries and tokens change nothing for the others."""
    layer = cases.make_layer("per_head", rng)
    q, k, v = inputs(rng, layer, 12)
    counts = jnp.array([12, 5], jnp.int32)
    empty = kv_cache.init(layer, batch=2, capacity=64)
    out, cache = prefill(q, k, v, layer, empty, counts=counts, scale=SCALE)
    want = kernel_oracle.policy_attention(layer, q, k, v, scale=SCALE, own_from=np.zeros(12))
    np.testing.assert_allclose(out[0], want[0], atol=TOL["packed_attention"])
    np.testing.assert_allclose(out[1, :5], want[1, :5], atol=TOL["packed_attention"])
    np.testing.assert_array_equal(np.asarray(cache.lengths), [12, 5])


def test_logit_sinks(rng):
    layer = cases.make_layer("per_head", rng)
    q, k, v = inputs(rng, layer, 12)
    sinks = jnp.asarray(rng.standard_normal(q.shape[2]), jnp.float32)
    cache, tail = kv_cache.write(layer, kv_cache.init(layer, batch=2, capacity=64), k, v)
    positions = jnp.broadcast_to(jnp.arange(12, dtype=jnp.int32), (2, 12))
    got = turboq_kernels.cache_attention(
        q, layer, cache, tail, q_positions=positions, scale=SCALE, sink_logits=sinks
    )
    want = kernel_oracle.policy_attention(layer, q, k, v, scale=SCALE, sink_logits=sinks)
    np.testing.assert_allclose(got, want, atol=TOL["packed_attention"])


def test_residency_of_a_pool(rng):
    """Bytes by hand: two groups of `mixed`, 64 tokens a page."""
    layer = cases.make_layer("mixed", rng)
    pool = make_pool(layer)
    a = pool.pager.create()
    pool.step([a], [70])
    pool.pager.fork(a)
    got, bits = pool.residency(), layer.bits_per_token
    page, exact = 64 * bits // 8, 2 * 3 * 16 * (3 + 5) * 2  # K and V, heads, D, tokens, bfloat16
    assert (got.active, got.shared, got.saved) == (2 * page, 2 * page, 2 * page)
    assert got.exact_reserved == 4 * exact
    assert got.exact == 2 * exact
    assert got.reserved == 12 * page + 4 * exact == pool.caches[0].nbytes
    assert got.fragmentation == 1 - 70 / 128


def test_refusals(rng):
    layer = cases.make_layer("blocks", rng)
    with pytest.raises(ValueError, match="page=100"):
        paged_cache.init(layer, pages=1, rows=1, page=100)
    with pytest.raises(ValueError, match="pages=0"):
        paged_cache.init(layer, pages=0, rows=1)
    wide = uniform_layer(
        kv_heads=1, k=cases.BlockMax(dim=16, size=128), v=cases.BlockMax(dim=16),
        policy=TokenPolicy(),
    )  # fmt: skip
    with pytest.raises(ValueError, match="page=64 must be a multiple of the layer's blocks of 128"):
        paged_cache.init(wide, pages=1, rows=1, page=64)
    q, k, v = inputs(rng, layer, 1)
    pool, flat = paged_cache.init(layer, pages=1, rows=1), kv_cache.init(layer, batch=2, capacity=9)
    where = paged_cache.locate(make_pool(layer).pager.plan([], []))
    for call, message in (
        (lambda: encode(layer, pool, k, v), "a pool takes where"),
        (lambda: encode(layer, flat, k, v, where=where), "where is for a pool"),
        (lambda: encode(layer, flat, k, v, implementation="triton"), "implementation='triton'"),
        (lambda: prefill(q, k, v, layer, pool, scale=1.0), "a pool takes where"),
    ):
        with pytest.raises(ValueError, match=message):
            call()


def test_soak_leaks_nothing():
    """Random sessions (experiments/soak.py), bounded: outputs of fresh caches, no page left."""
    spec = importlib.util.spec_from_file_location("soak", ROOT / "experiments" / "soak.py")
    soak_file = importlib.util.module_from_spec(spec)
    sys.modules["soak"] = soak_file
    spec.loader.exec_module(soak_file)
    codec = IntAffine(dim=16, bits=3, rotation="identity")  # sums nothing: equal bytes
    layer = uniform_layer(kv_heads=2, k=codec, v=codec, policy=TokenPolicy(sinks=3))
    soak = soak_file.Soak(np.random.default_rng(1), pages=10, chunks=(40,), together=1, layer=layer)
    for i in range(72):
        soak.operate()
        assert i % 8 or not soak.differs()
    for kind, least in {"extend": 20, "compared": 5, "fork": 3}.items():
        assert soak.done[kind] > least
    assert soak.leaked() == 0
