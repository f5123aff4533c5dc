"""Attention over packed words against decode-everything attention in float64."""

import dataclasses

import jax
import jax.numpy as jnp
import kernel_oracle
import kv_cases as cases
import numpy as np
import pytest
from tolerances import TOL

import turboq_kernels
from turboq.cache import contiguous as kv_cache
from turboq.cache.exact_attention import attention
from turboq.cache.layer import KVLayer, TokenPolicy, uniform_layer
from turboq.cache.simulate import simulate, simulated_attention
from turboq.codecs import Transform, TurboQuantMSE
from turboq.numbers.packing import PAGE

SCALE, GROUP = 0.3, 3
# Tests that need no other size write CHUNK tokens of two sequences into a cache of CAPACITY: time
# is compilation, and they run the programs that `test_matches_float64` has compiled.
CHUNK, CAPACITY = 9, 2 * PAGE


def oracle(layer, q, k, v, **options):
    return kernel_oracle.policy_attention(layer, q, k, v, scale=SCALE, **options)


def run(layer, q, k, v, sizes, *, capacity=CAPACITY, **options):
    """Writes and attends chunk by chunk, as an engine would."""
    cache, outs, at = kv_cache.init(layer, batch=q.shape[0], capacity=capacity), [], 0
    for size in sizes:
        part = slice(at, at + size)
        positions = cache.lengths[:, None] + jnp.arange(size, dtype=jnp.int32)[None, :]
        cache, tail = kv_cache.write(layer, cache, k[:, part], v[:, part])
        outs.append(
            turboq_kernels.cache_attention(
                q[:, part], layer, cache, tail, q_positions=positions, scale=SCALE, **options
            )
        )
        at += size
    return jnp.concatenate(outs, axis=1)


def inputs(rng, layer, t, batch=2):
    k, v = cases.tokens(rng, layer, t, batch)
    q = rng.standard_normal((batch, t, GROUP * layer.kv_heads, cases.DIM)).astype(np.float32)
    return jnp.asarray(q), k, v


def written(layer, k, v):
    """A cache with CHUNK tokens, their tail, and their positions."""
    empty = kv_cache.init(layer, batch=2, capacity=CAPACITY)
    cache, tail = kv_cache.write(layer, empty, k, v)
    return cache, tail, jnp.broadcast_to(jnp.arange(CHUNK, dtype=jnp.int32), (2, CHUNK))


@pytest.mark.parametrize("name", cases.LAYERS)
def test_matches_float64(rng, name):
    """Prefill, decode and a chunk behind both."""
    layer = cases.make_layer(name, rng)
    q, k, v = inputs(rng, layer, 24)
    got = run(layer, q, k, v, (CHUNK, 1, 1, 1, 1, 1, 1, CHUNK))
    np.testing.assert_allclose(got, oracle(layer, q, k, v), atol=TOL["packed_attention"])


@pytest.mark.parametrize("options", [{"window": 6, "softcap": 1.5}, {"window": 3}])
def test_window_and_softcap(rng, options):
    layer = cases.make_layer("mixed", rng)
    q, k, v = inputs(rng, layer, 20)
    got = run(layer, q, k, v, (10, 10), **options)
    np.testing.assert_allclose(got, oracle(layer, q, k, v, **options), atol=TOL["packed_attention"])


@pytest.mark.parametrize(
    ("name", "policy"),
    [
        ("mixed", TokenPolicy(recent=9)),
        ("blocks", TokenPolicy(sinks=3)),
    ],
)
def test_decode_equals_one_parallel_pass(rng, name, policy):
    """Across a page boundary: prefill 250 and decode 12 == simulated attention of the window."""
    layer = cases.make_layer(name, rng, policy)
    q, k, v = inputs(rng, layer, 262, batch=1)
    got = run(layer, q, k, v, (250, *(1,) * 12), block_tokens=PAGE)
    want = simulated_attention(layer, q, k, v, scale=SCALE)
    np.testing.assert_allclose(got, want, atol=TOL["packed_attention"])


def test_maximum_rises_from_block_to_block(rng):
    """Keys that grow along the context make every block rescale what the earlier ones summed."""
    layer = cases.make_layer("turboquant", rng, TokenPolicy(sinks=1))
    q, k, v = inputs(rng, layer, 3 * PAGE, batch=1)
    k *= jnp.linspace(0.2, 1.5, 3 * PAGE)[None, :, None, None]
    got = run(layer, q, k, v, (3 * PAGE,), capacity=3 * PAGE, block_tokens=PAGE)[:, -3:]
    want = simulated_attention(layer, q, k, v, scale=SCALE)[:, -3:]
    np.testing.assert_allclose(got, want, atol=TOL["packed_attention"])


def test_page_edges(rng):
    """The last query of 1, 255, 256 and 257 tokens."""
    layer = cases.make_layer("per_head", rng, TokenPolicy(sinks=1, recent=2))
    q, k, v = inputs(rng, layer, PAGE + 1, batch=4)
    counts = jnp.array([1, PAGE - 1, PAGE, PAGE + 1], jnp.int32)
    empty = kv_cache.init(layer, batch=4, capacity=CAPACITY)
    cache, tail = kv_cache.write(layer, empty, k, v, counts)
    last = (counts - 1)[:, None]
    got = turboq_kernels.cache_attention(
        jnp.take_along_axis(q, last[..., None, None], axis=1), layer, cache, tail,
        q_positions=last, scale=SCALE, block_tokens=PAGE,
    )  # fmt: skip
    for b, count in enumerate(counts.tolist()):
        want = oracle(layer, *(x[b : b + 1, :count] for x in (q, k, v)), since=count - 1)
        np.testing.assert_allclose(got[b], want[0], atol=TOL["packed_attention"])


def test_sequences_of_different_lengths(rng):
    """Two sequences padded into one chunk give what each gives alone; an empty one gives zeros."""
    layer = cases.make_layer("mixed", rng)
    q, k, v = inputs(rng, layer, 17, batch=3)
    counts = jnp.array([17, 5, 0], jnp.int32)
    cache, tail = kv_cache.write(layer, kv_cache.init(layer, batch=3, capacity=PAGE), k, v, counts)
    positions = jnp.broadcast_to(jnp.arange(17, dtype=jnp.int32), (3, 17))
    got = turboq_kernels.cache_attention(q, layer, cache, tail, q_positions=positions, scale=SCALE)
    want = oracle(layer, q, k, v)
    for b, count in enumerate((17, 5)):
        np.testing.assert_allclose(got[b, :count], want[b, :count], atol=TOL["packed_attention"])
    assert not np.any(np.asarray(got[2]))


@pytest.mark.parametrize("name", cases.LAYERS)
def test_unused_slots_never_leak(rng, name):
    """NaN and garbage in every slot past the length change no bit of the result."""
    layer = cases.make_layer(name, rng)
    q, k, v = inputs(rng, layer, CHUNK)
    cache, tail, positions = written(layer, k, v)

    def poison(x):
        if x.dtype == jnp.uint32:  # packed: token 8j + r is bit j; tokens from 16 on are unused
            return x | jnp.uint32(0xFFFFFFFC)
        if x.shape[2] == CAPACITY:  # (all are written up to CHUNK, or are not read)
            return x.at[:, :, CHUNK:].set(jnp.nan)
        return x

    dirty = dataclasses.replace(cache, groups=jax.tree.map(poison, cache.groups))
    clean_out, dirty_out = (
        turboq_kernels.cache_attention(q, layer, c, tail, q_positions=positions, scale=SCALE)
        for c in (cache, dirty)
    )
    np.testing.assert_array_equal(np.asarray(clean_out), np.asarray(dirty_out))


def test_exact_codec_is_plain_attention(rng):
    layer = cases.make_layer("exact", rng, TokenPolicy(exact_dtype="float32"))
    q, k, v = inputs(rng, layer, 30)
    want = attention(q, k, v, scale=SCALE)
    np.testing.assert_allclose(run(layer, q, k, v, (30,)), want, atol=TOL["packed_attention"])


def test_one_group_in_any_head_order(rng):
    """A group may list its heads in any order: arrays follow the group, results the heads."""
    layer = cases.make_layer("per_head", rng)
    turned = jax.tree.map(lambda x: x[::-1], layer.groups[0])
    turned = KVLayer(groups=(dataclasses.replace(turned, heads=(1, 0)),), policy=layer.policy)
    q, k, v = inputs(rng, layer, CHUNK)
    want = run(layer, q, k, v, (CHUNK,))
    np.testing.assert_array_equal(np.asarray(run(turned, q, k, v, (CHUNK,))), np.asarray(want))
    for a, b in zip(simulate(turned, k, v), simulate(layer, k, v), strict=True):
        np.testing.assert_array_equal(np.asarray(a), np.asarray(b))


def test_no_recompilation_as_the_cache_grows(rng):
    layer = cases.make_layer("turboquant", rng)
    q, k, v = inputs(rng, layer, 8)
    run(layer, q, k, v, (1,))
    before = turboq_kernels.cache_attention._cache_size()
    run(layer, q, k, v, (1,) * 8)
    assert turboq_kernels.cache_attention._cache_size() == before


def test_32k_tokens_need_one_block_of_memory():
    """Decode over 32,768 tokens: temporaries stay under 1/16 of what an unpacked cache takes."""
    dim, heads, context = 128, 8, 32768
    codec = TurboQuantMSE(dim=dim, bits=3)
    layer = uniform_layer(kv_heads=heads, k=codec, v=codec, policy=TokenPolicy(sinks=4, recent=32))
    cache = jax.eval_shape(lambda: kv_cache.init(layer, batch=1, capacity=context))
    k = jax.ShapeDtypeStruct((1, 1, heads, dim), jnp.float32)
    q = jax.ShapeDtypeStruct((1, 1, 4 * heads, dim), jnp.float32)

    def step(cache, q, k):
        at = cache.lengths[:, None]
        cache, tail = kv_cache.write(layer, cache, k, k)
        out = turboq_kernels.cache_attention(q, layer, cache, tail, q_positions=at, scale=1.0)
        return out, cache

    compiled = jax.jit(step, donate_argnums=0).lower(cache, q, k).compile()
    unpacked = 2 * heads * dim * 4 * context
    packed = sum(x.size * x.dtype.itemsize for x in jax.tree.leaves(cache.groups))
    assert packed == context * heads * 2 * (48 + 2) + 2 * heads * (4 + 32) * dim * 2
    assert compiled.memory_analysis().temp_size_in_bytes < unpacked / 16


def test_refuses_unknown_implementation_and_heads(rng):
    layer = cases.make_layer("exact", rng)
    q, k, v = inputs(rng, layer, 1)
    cache, tail = kv_cache.write(layer, kv_cache.init(layer, batch=2, capacity=PAGE), k, v)
    at = jnp.zeros((2, 1), jnp.int32)
    with pytest.raises(ValueError, match="implementation='cuda'"):
        turboq_kernels.cache_attention(
            q, layer, cache, tail, q_positions=at, scale=1.0, implementation="cuda"
        )
    with pytest.raises(ValueError, match="5 query heads"):
        turboq_kernels.cache_attention(q[:, :, :5], layer, cache, tail, q_positions=at, scale=1.0)


def test_output_projection_with_the_inverse_transform_folded_in(rng):
    """V never turned back: the same as attention, then W_o (means, rotations, exact tokens)."""
    layer = cases.make_layer("mixed", rng)
    q, k, v = inputs(rng, layer, CHUNK)
    w_o = jnp.asarray(rng.standard_normal((q.shape[2], cases.DIM, 20)), jnp.float32) / 16
    cache, tail, positions = written(layer, k, v)
    at = {"q_positions": positions, "scale": SCALE}
    folded = turboq_kernels.fold_output(layer, w_o)
    got = turboq_kernels.projected_attention(q, layer, cache, tail, folded, **at)
    out = np.asarray(turboq_kernels.cache_attention(q, layer, cache, tail, **at), np.float64)
    want = np.einsum("bthe,hef->btf", out, np.asarray(w_o, np.float64))
    np.testing.assert_allclose(got, want, atol=TOL["packed_attention"])
    with pytest.raises(ValueError, match="heads=4 of w_o"):
        turboq_kernels.fold_output(layer, w_o[:4])


def test_segments_of_several_widths_with_coded_gains(rng):
    """`transform`: coordinates at 4 and 2 bits, others not stored, gains that are codes."""
    codec = Transform(dim=32, segments=((8, 4), (16, 2)), gain="code", gain_bits=3)
    turn, _ = np.linalg.qr(rng.standard_normal((2, 32, 32)))
    arrays = {
        "mean": rng.standard_normal((2, 32)),
        "analysis": turn[:, :24],
        "synthesis": turn[:, :24].swapaxes(1, 2),
        "gains": np.sort(rng.uniform(0.3, 2.0, (2, 8)), axis=-1),
    }
    arrays = {name: jnp.asarray(x, jnp.float32) for name, x in arrays.items()}
    layer = uniform_layer(
        kv_heads=2, k=codec, v=codec, policy=TokenPolicy(sinks=2, recent=3),
        k_arrays=arrays, v_arrays=arrays,
    )  # fmt: skip
    k, v = rng.standard_normal((2, 2, 14, 2, 32)).astype(np.float32)
    q = jnp.asarray(rng.standard_normal((2, 14, 4, 32)), jnp.float32)
    assert codec.reading is not None
    got = run(layer, q, jnp.asarray(k), jnp.asarray(v), (14,))
    want = oracle(layer, q, jnp.asarray(k), jnp.asarray(v))
    np.testing.assert_allclose(got, want, atol=TOL["packed_attention"])
