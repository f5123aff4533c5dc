"""A layer with a window holds the pages that its next query needs, and attention is as if all were.

Oracles: the simulated pass over the whole sequence (which drops nothing), float64 where it is
cheap, and counting pages one by one.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import kernel_oracle
import kv_cases
import numpy as np
import pytest
from plan_cases import geometry
from tolerances import TOL

from turboq.cache import accounting, contiguous, model_cache, windows
from turboq.cache.layer import KVLayer, TokenPolicy, uniform_layer
from turboq.cache.pager import Pager
from turboq.cache.pool import Pool
from turboq.cache.simulate import simulated_attention
from turboq.codecs import PerHead, TurboQuantMSE
from turboq.codecs.observed import Observed
from turboq.codecs.transform import Transform
from turboq.errors import TurboqError
from turboq.numbers.packing import PAGE
from turboq.numbers.rope import Rope
from turboq.plan.build import uniform_plan
from turboq.what_fits import sizes, storage
from turboq.what_fits.layers import CacheGeometry, CacheLayer
from turboq.what_fits.max_context import max_context
from turboq_kernels.attention import cache_attention
from turboq_kernels.prefill.api import prefill

DIM, SCALE = kv_cases.DIM, 0.3


def inputs(rng, layer, t, batch=1):
    k, v = kv_cases.tokens(rng, layer, t, batch)
    q = rng.standard_normal((batch, t, 2 * layer.kv_heads, layer.groups[0].k.dim))
    return jnp.asarray(q, jnp.float32), k, v


def at(start, size, batch):
    steps = jnp.arange(size, dtype=jnp.int32)[None]
    return jnp.broadcast_to(jnp.asarray(start, jnp.int32).reshape(-1, 1) + steps, (batch, size))


@functools.partial(jax.jit, static_argnames=("window",))
def one_by_one(layer: KVLayer, cache, q, k, v, window):
    """A token at a time in one loop: the cache never changes its shape."""

    def step(cache, token):
        q, k, v = (x[:, None] for x in token)
        where = at(cache.lengths, 1, len(q))
        cache, tail = contiguous.write(layer, cache, k, v)
        out = cache_attention(q, layer, cache, tail, q_positions=where, scale=SCALE, window=window)
        return cache, out[:, 0]

    moved = tuple(jnp.swapaxes(x, 0, 1) for x in (q, k, v))
    cache, out = jax.lax.scan(step, cache, moved)
    return cache, jnp.swapaxes(out, 0, 1)


def check_simulated(layer, q, k, v, got, start=0):
    """As the pass over the whole sequence in one program, where XLA may round a stored scale or a
    code otherwise: rarely, and little. A token too few or too many would show in most queries."""
    want = simulated_attention(layer, q, k, v, scale=SCALE, window=layer.window)
    off = np.abs(np.asarray(got) - np.asarray(want)[:, start:])
    assert np.mean(off > TOL["packed_attention"]) < 0.02
    assert np.max(off) < 0.02


def by_chunks(layer, cache, q, k, v, chunks, window):
    outs, start = [], 0
    for size in chunks:
        part = slice(start, start + size)
        cache, tail = contiguous.write(layer, cache, k[:, part], v[:, part])
        out = cache_attention(
            q[:, part], layer, cache, tail, q_positions=at(start, size, len(q)), scale=SCALE,
            window=window,
        )  # fmt: skip
        cache, start = contiguous.settled(layer, cache), start + size
        outs.append(out)
    return cache, np.concatenate(outs, axis=1)


def test_pages_that_a_window_needs_by_listing_them():
    lengths = range(4 * PAGE)
    for window in (1, 2, 255, 256, 257, 258, 512, 513):
        first = windows.first_needed(window, jnp.array(lengths, jnp.int32))
        for new in (1, 2, 256, 300):
            ends = [(max(n - window + 1, 0) // PAGE, (n + new - 1) // PAGE) for n in lengths]
            assert first.tolist() == [low * PAGE for low, _ in ends]
            # No sequence's end cuts it short here.
            most = max(high - low + 1 for low, high in ends)
            assert windows.pages_held(window, 9 * PAGE, new=new) == most
        assert windows.pages_held(window, 9 * PAGE) == sizes._pages(window, 9 * PAGE)
    assert windows.pages_held(512, 100) == 1
    assert windows.pages_held(None, 1000) == 4


@pytest.mark.parametrize(("name", "window"), [("mixed", 257), ("blocks", 256), ("exact", 1)])
def test_decoding_equals_the_simulated_pass_at_every_length(rng, name, window):
    """Token by token over three page ends; the sequences lie at different places of their pages."""
    layer = dataclasses.replace(kv_cases.make_layer(name, rng), window=window)
    q, k, v = inputs(rng, layer, 600, batch=2)
    empty = contiguous.init(layer, batch=2, capacity=1024)
    cache, got = one_by_one(layer, empty, q, k, v, window)
    whole = contiguous.init(dataclasses.replace(layer, window=None), batch=2, capacity=1024)
    all_held, want = one_by_one(dataclasses.replace(layer, window=None), whole, q, k, v, window)
    np.testing.assert_allclose(got, want, atol=TOL["attention_f32"])
    check_simulated(layer, q, k, v, got)
    pages = windows.pages_held(window, 1024)
    assert cache.slots == pages * PAGE < cache.capacity
    due = accounting.residency([layer], context=1024, batch=2).cache
    assert cache.nbytes == empty.nbytes == due
    assert cache.nbytes < all_held.nbytes


def test_chunks_around_window_and_page(rng):
    """A prompt of several pages, single tokens over a page's end, another chunk; in float64."""
    window, rope = 200, Rope(dim=DIM, theta=100.0)
    layer = dataclasses.replace(kv_cases.make_layer("per_head", rng), window=window, rope=rope)
    q, k, v = inputs(rng, layer, 560)
    empty = contiguous.init(layer, batch=1, capacity=768)
    cache, got = by_chunks(layer, empty, q, k, v, (510, 1, 1, 1, 1, 46), window)
    want = kernel_oracle.policy_attention(layer, q, k, v, scale=SCALE, window=window)
    np.testing.assert_allclose(got, want, atol=TOL["packed_attention"])
    assert cache.slots == 2 * PAGE
    assert cache.dropped.tolist() == [PAGE]


def test_sequences_of_other_lengths_and_a_prefill_by_itself(rng):
    """`prefill` attends to its own tokens exactly; padded chunks leave sequences at other pages."""
    layer = dataclasses.replace(
        kv_cases.make_layer("turboquant", rng, TokenPolicy(recent=4)), window=100
    )
    q, k, v = inputs(rng, layer, 700, batch=2)
    cache = contiguous.init(layer, batch=2, capacity=1024)
    counts = jnp.array([640, 250], jnp.int32)
    _, cache = prefill(q, k, v, layer, cache, counts=counts, scale=SCALE, window=100)
    assert cache.dropped.tolist() == [512, 0]
    assert cache.slots == 2 * PAGE
    tail_k, tail_v = (jnp.stack([x[0, 640:660], x[1, 250:270]]) for x in (k, v))
    queries = jnp.stack([q[0, 640:660], q[1, 250:270]])
    cache, got = one_by_one(layer, cache, queries, tail_k, tail_v, 100)
    for b, length in enumerate((640, 250)):
        part = (x[b : b + 1, : length + 20] for x in (q, k, v))
        check_simulated(layer, *part, got[b : b + 1], start=length)


def test_the_pool_of_learned_plans(rng):
    """Two pools, full and windowed; states and words are those of one query after each step."""
    window, policy, rope = 130, TokenPolicy(sinks=2, recent=3), Rope(dim=DIM, theta=50.0)
    codec = Transform(dim=DIM, segments=((DIM, 3),), gain="code")
    x = rng.standard_normal((2, 60, DIM)).astype(np.float32)
    arrays = {n: jnp.asarray(a) for n, a in codec.fit(Observed.of(x)).items()}
    layers = [
        uniform_layer(
            kv_heads=2, k=codec, v=codec, policy=policy, k_arrays=arrays, v_arrays=arrays,
            rope=rope, window=w,
        )
        for w in (window, None, window)
    ]  # fmt: skip
    form = model_cache.forms(layers)
    assert form.windows == (window, None)
    states, pools = model_cache.init(form, batch=1, capacity=800)
    assert [words.shape[1] for words in pools] == [2, 4]
    data = [inputs(rng, layer, 560) for layer in layers]
    outs, start = [[], [], []], 0
    for size in (505, 1, 1, 1, 1, 1, 1, 1, 1, 1, 46):
        part = slice(start, start + size)
        states, pools = model_cache.holding(form, states, pools, new=size)
        for i, (layer, (q, k, v)) in enumerate(zip(layers, data, strict=True)):
            n = form.pool_of[i]
            states[i], pools[n], tail = model_cache.write(
                states[i], pools[n], k[:, part], v[:, part]
            )
            outs[i].append(
                model_cache.attend(
                    q[:, part], states[i], pools[n], tail, q_positions=at(start, size, 1),
                    scale=SCALE, window=layer.window,
                )
            )  # fmt: skip
        states, pools = model_cache.holding(form, states, pools, new=1)
        start += size
        assert [words.shape[1] for words in pools] == [2, 4]
    for layer, (q, k, v), got in zip(layers, data, outs, strict=True):
        check_simulated(layer, q, k, v, np.concatenate(got, axis=1))
    due = accounting.residency(layers, context=800).cache
    assert model_cache.nbytes(states, pools) == due


def test_the_pool_of_sequences(rng):
    """Pages of a window go back to the pool; forks share what is held; attention as simulated."""
    window, policy = 70, TokenPolicy(sinks=2)
    codec = TurboQuantMSE(dim=DIM, bits=3)
    layers = [
        uniform_layer(kv_heads=2, k=codec, v=codec, policy=policy, window=w) for w in (window, None)
    ]
    pool = Pool(layers, pages=16, rows=3, per_sequence=8, page=64)
    a, b = pool.pager.create(), pool.pager.create()
    data = [inputs(rng, layer, 330, batch=2) for layer in layers]
    outs, start = [[], []], 0
    for size in (190, 1, 1, 1, 64, 1, 1, 71):
        part = slice(start, start + size)
        where = pool.step([a, b], [size] * 2)
        for i, (layer, (q, k, v)) in enumerate(zip(layers, data, strict=True)):
            tail = pool.write(i, where, k[:, part], v[:, part])
            outs[i].append(
                cache_attention(
                    q[:, part], layer, pool.view(i, where), tail, scale=SCALE,
                    q_positions=at(start, size, 2), window=layer.window,
                )
            )  # fmt: skip
        start += size
        pool.pager.check()
        first = max(start - size - window + 1, 0) // 64
        assert len(pool.pager.pages_of(a)) == -(-start // 64) - first
        assert len(pool.pager.pages_of(a, 1)) == -(-start // 64)
    for layer, (q, k, v), got in zip(layers, data, outs, strict=True):
        check_simulated(layer, q, k, v, np.concatenate(got, axis=1))
    child = pool.pager.fork(a)
    assert pool.pager.pages_of(child) == pool.pager.pages_of(a)
    pool.step([a], [1])
    assert len(pool.pager.pages_of(a)) == 2  # token 330 sees 261 on: pages 4 and 5
    pool.pager.check()
    pool.pager.truncate(child, 320)
    with pytest.raises(TurboqError, match="length=200 of sequence 0: the window of 70 tokens"):
        pool.pager.truncate(a, 200)
    page = 64 * layers[0].bits_per_token // 8
    held = [pool.pager.report(i) for i in range(2)]
    found = pool.residency()
    assert found.active == sum(report.active for report in held) * page
    assert found.reserved - found.exact_reserved == page * (16 + min(16, 3 * 3 + 8))


def test_bytes_planner_and_memory_agree():
    """A plan at a context, live caches, `memory --view=ours`, the longest context: one number."""
    model = geometry(layers=3, k_dim=16, v_dim=16)
    layers = tuple(
        dataclasses.replace(layer, window=window)
        for layer, window in zip(model.layers, (300, None, 300), strict=True)
    )
    model = dataclasses.replace(model, layers=layers)
    plan = uniform_plan(
        model, k=PerHead(dim=16, bits=3), v=TurboQuantMSE(dim=16, bits=2),
        policy=TokenPolicy(sinks=4, recent=7),
    )  # fmt: skip
    assert [layer.window for layer in plan.storage] == [300, None, 300]
    ours = storage.of_plan(plan, "plan").ours
    for context in (1, 256, 257, 767, 768, 769, 5000):
        live = sum(
            contiguous.init(layer, batch=2, capacity=context).nbytes for layer in plan.storage
        )
        assert plan.cache_bytes(context, batch=2) == live == ours.kv_bytes(context, 2)
    nbytes = plan.residency(5120, batch=2).total
    assert max_context(plan.storage, nbytes=nbytes, batch=2) == 5120
    assert max_context(plan.storage, nbytes=nbytes - 1, batch=2) == 5120 - PAGE
    at_5000 = plan.residency(5000)
    numbers = model.layers[0].kv_heads * 32 * (5000 + 2 * 300)
    assert at_5000.numbers == numbers
    assert at_5000.quantized == numbers // 32 * (16 * 3 + 16 + 16 * 2 + 16) // 8
    only = [layer for layer in plan.storage if layer.window]
    with pytest.raises(TurboqError, match="every layer has a window"):
        max_context(only, nbytes=nbytes)


def test_a_shared_prefix_is_shared_while_a_window_holds_it():
    layers = (
        CacheLayer(kind="sliding", kv_heads=1, k_dim=16, v_dim=16, window=300),
        CacheLayer(kind="full", kv_heads=1, k_dim=16, v_dim=16),
    )
    shape = CacheGeometry(name="x", family="x", layers=layers)
    ours = storage.of_formats(shape, "f16", "f16").ours
    page = 256 * 32 * 2
    # 4 sessions of 5 pages, 4 pages in common: the window holds the last 3, two of them shared.
    assert ours.kv_bytes(1280, 4, 1024) == page * ((4 + 4) + (2 + 4))


def test_a_window_of_a_reader_of_the_cache_counts():
    model = geometry(layers=3)
    first, second, third = model.layers
    reader = dataclasses.replace(second, borrows_cache_of=0, window=900)
    layers = (dataclasses.replace(first, window=300), reader, third)
    assert dataclasses.replace(model, layers=layers).kept_window(0) == 900
    layers = (layers[0], dataclasses.replace(reader, window=None), third)
    assert dataclasses.replace(model, layers=layers).kept_window(0) is None


def test_refusals(rng):
    layer = dataclasses.replace(kv_cases.make_layer("turboquant", rng), window=100)
    q, k, v = inputs(rng, layer, 3)
    cache, tail = contiguous.write(layer, contiguous.init(layer, batch=1, capacity=3), k, v)
    for window in (None, 101):
        with pytest.raises(ValueError, match=r"sees more than the 100 tokens that the layer keeps"):
            cache_attention(
                q, layer, cache, tail, q_positions=at(0, 3, 1), scale=SCALE, window=window
            )
    with pytest.raises(ValueError, match="must be at least 1 token, or None"):
        dataclasses.replace(layer, window=0)
    with pytest.raises(ValueError, match=r"pages=3 must be one number for each of windows"):
        Pager(pages=3, rows=1, per_sequence=1, windows=(None, 100))
    with pytest.raises(ValueError, match=r"windows=\(0,\) must be at least 1 token, or None"):
        Pager(pages=3, rows=1, per_sequence=1, windows=(0,))
    block = uniform_layer(
        kv_heads=1, k=kv_cases.BlockMax(dim=DIM, size=24), v=TurboQuantMSE(dim=DIM, bits=2),
        policy=TokenPolicy(), window=100,
    )  # fmt: skip
    with pytest.raises(ValueError, match="blocks of 24 tokens must divide pages of 256"):
        contiguous.init(block, batch=1, capacity=1000)
