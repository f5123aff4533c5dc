"""Keys stored before their rotary embedding: caches and attention against float64."""

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
from turboq.cache.layer import KVLayer, TokenPolicy, uniform_layer
from turboq.cache.pool import Pool
from turboq.cache.simulate import round_exact, simulate, simulated_attention
from turboq.codecs import Exact, Transform, TurboQuantMSE
from turboq.codecs.transform_padded import shared_layer
from turboq.numbers import packing
from turboq.numbers.rope import Rope, Scaling, inverse_frequencies, rotate
from turboq_kernels import prefill_attention
from turboq_kernels.decode import base
from turboq_kernels.encode import api as encoding
from turboq_kernels.sharding import split_layer

SCALE, GROUP = 0.3, 3
LLAMA3 = Scaling(
    type="llama3", factor=4.0, low_freq_factor=1.0, high_freq_factor=4.0, original_context=32.0
)
ROPES = {
    "half": Rope(dim=cases.DIM, theta=50.0),
    "llama3": Rope(dim=cases.DIM, theta=200.0, scaling=LLAMA3),
    "partial": Rope(dim=6, theta=20.0, layout="interleaved"),
}


def before(layer: KVLayer, rope: str = "half", block: int = 1) -> KVLayer:
    return dataclasses.replace(layer, rope=ROPES[rope], rope_block=block)


def inputs(rng, layer, t, batch=2):
    k, v = cases.tokens(rng, layer, t, batch)
    q = rng.standard_normal((batch, t, GROUP * layer.kv_heads, cases.DIM)).astype(np.float32)
    return jnp.asarray(q), k, v


def turn(rope: Rope, x: np.ndarray, sign: float, block: int = 0) -> np.ndarray:
    """[B, T, K, D] at positions 0..T-1, pairs as complex numbers in float64.

    With `block`, turned by what positions exceed their block's first.
    """
    half = rope.dim // 2
    pairs = np.arange(rope.dim).reshape((2, half) if rope.layout == "half" else (half, 2))
    first, second = pairs if rope.layout == "half" else pairs.T
    at = np.arange(x.shape[1]) % block if block else np.arange(x.shape[1])
    angle = at[:, None] * inverse_frequencies(rope).astype(np.float64)
    z = (x[..., first] + 1j * x[..., second]) * np.exp(sign * 1j * angle)[None, :, None]
    out = np.array(x, np.float64)
    out[..., first], out[..., second] = z.real, z.imag
    return out


def stored(layer: KVLayer, k, v):
    """(k_hat, v_hat) by hand: turned back in float64, quantized as they are, turned again."""
    assert layer.rope is not None
    if layer.block > 1:  # blocks are encoded from the exact ring
        k, v = round_exact(layer.policy, k), round_exact(layer.policy, v)
    policy = dataclasses.replace(layer.policy, exact_dtype="float32")
    plain = dataclasses.replace(layer, policy=policy, rope=None)
    unrotated = turn(layer.rope, np.asarray(k, np.float64), -1.0)
    if layer.rope_block == 1:
        k_hat, v_hat = simulate(plain, jnp.asarray(unrotated, jnp.float32), v)
        return turn(layer.rope, np.asarray(k_hat, np.float64), 1.0), v_hat
    # R(o) (k - mu) is what is coded, about mu again as the codec takes it off by itself.
    (group,), block = layer.groups, layer.rope_block
    mean = np.asarray(group.k_arrays["mean"], np.float64)[None, None]
    relative = turn(layer.rope, unrotated - mean, 1.0, block) + mean
    k_hat, v_hat = simulate(plain, jnp.asarray(relative, jnp.float32), v)
    left = turn(layer.rope, np.asarray(k_hat, np.float64) - mean, -1.0, block)
    return turn(layer.rope, left + mean, 1.0), v_hat


def oracle(layer, q, k, v, **options):
    return kernel_oracle.policy_attention(
        layer, q, k, v, scale=SCALE, stored_values=stored(layer, k, v), **options
    )


def run(layer, q, k, v, sizes, **options):
    """Writes and attends chunk by chunk, as an engine would."""
    cache, outs, at = kv_cache.init(layer, batch=q.shape[0], capacity=300), [], 0
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
    return jnp.concatenate(outs, axis=1), cache


@pytest.mark.parametrize(
    ("name", "rope", "block", "options"),
    [
        ("mixed", "llama3", 1, {"window": 9, "softcap": 1.5}),
        ("blocks", "partial", 1, {}),
        ("per_head", "partial", 16, {"window": 9}),
    ],
)
def test_chunks_and_single_tokens_match_float64(rng, monkeypatch, name, rope, block, options):
    """Sinks, a recent window, grouped queries; 26 tokens in one chunk are many query rows."""
    monkeypatch.setattr(base, "TILE_ROWS", 16)
    layer = before(cases.make_layer(name, rng), rope, block)
    q, k, v = inputs(rng, layer, 34)
    got, _ = run(layer, q, k, v, (6, 1, 1, 26), **options)
    want = oracle(layer, q, k, v, **options)
    np.testing.assert_allclose(got, want, atol=TOL["packed_attention"])
    # It matters: the same codecs of keys as they come give something else.
    after = dataclasses.replace(layer, rope=None)
    other = kernel_oracle.policy_attention(after, q, k, v, scale=SCALE, **options)
    assert np.max(np.abs(np.asarray(got) - other)) > 100 * TOL["packed_attention"]


def test_the_packed_cache_gives_what_the_simulated_pass_gives(rng):
    """Behind a page's end and in blocks of 256 tokens, where a block's slots are not 0, 1, ..."""
    layer = before(cases.make_layer("turboquant", rng, TokenPolicy(sinks=2, recent=3)))
    q, k, v = inputs(rng, layer, 264, batch=1)
    got, _ = run(layer, q, k, v, (262, 1, 1), block_tokens=256)
    want = simulated_attention(layer, q, k, v, scale=SCALE)
    np.testing.assert_allclose(got, want, atol=TOL["packed_attention"])


def test_an_exact_codec_does_not_care(rng):
    """Up to the float32 rounding of two rotations: 8 roundings of 6e-8 on keys below 5."""
    layer = cases.make_layer("exact", rng, TokenPolicy(sinks=1))
    q, k, v = inputs(rng, layer, 12)
    got, _ = run(before(layer), q, k, v, (8, 4))
    want, _ = run(layer, q, k, v, (8, 4))
    np.testing.assert_allclose(got, want, atol=TOL["packed_attention"])


def test_what_is_stored_of_a_key_does_not_depend_on_its_position(rng):
    layer = before(cases.make_layer("per_head", rng), "llama3")
    q, k, v = inputs(rng, layer, 1)
    repeated = jnp.broadcast_to(k, (2, 40, *k.shape[2:]))
    at = jnp.arange(40, dtype=jnp.int32)[None, :]
    keys = rotate(ROPES["llama3"], repeated, at[:, :, None])
    values = jnp.broadcast_to(v, (2, 40, *v.shape[2:]))
    _, cache = run(layer, jnp.broadcast_to(q, (2, 40, *q.shape[2:])), keys, values, (40,))
    for word in jax.tree.leaves(cache.groups[0].k):
        if word.dtype == jnp.uint32:
            codes = np.asarray(packing.unpack(packing.kept(word, cases.DIM)))[:, :, :40]
            assert np.mean(codes != codes[:, :, :1]) < 1e-3  # a rounding at a threshold
    # So logits of the stored keys move with both positions: relative as the exact ones are.
    shifted, _ = simulate(layer, rotate(ROPES["llama3"], repeated, at[:, :, None] + 90), values,
                          jnp.broadcast_to(at + 90, (2, 40)))  # fmt: skip
    here, _ = simulate(layer, keys, values)
    again = rotate(ROPES["llama3"], here, jnp.full((1, 1, 1), 90, jnp.int32))
    np.testing.assert_allclose(shifted, again, atol=TOL["rope_rotate"])


def test_chunks_and_single_tokens_store_the_same(rng):
    layer = before(cases.make_layer("per_head", rng))
    q, k, v = inputs(rng, layer, 20)
    _, whole = run(layer, q, k, v, (20,))
    _, parts = run(layer, q, k, v, (9, *(1,) * 4, 7))
    for a, b in zip(jax.tree.leaves(whole), jax.tree.leaves(parts), strict=True):
        assert np.mean(np.asarray(a) != np.asarray(b)) < 1e-3  # a rounding at a threshold


def test_pages_and_forks_match_float64(rng):
    """A shared prefix of one page and a half, then different tokens."""
    layer = before(cases.make_layer("per_head", rng))
    q, k, v = inputs(rng, layer, 106)
    pool = Pool([layer], pages=12, rows=4, per_sequence=4, page=64)
    spare = pool.pager.create()
    pool.step([spare], [3])
    a = pool.pager.create()
    pool.write(0, pool.step([a], [100]), k[:1, :100], v[:1, :100])
    names = [a, pool.pager.fork(a)]
    k, v = (x.at[1, :100].set(x[0, :100]) for x in (k, v))
    outs, at = [], 100
    for size in (5, 1):
        part = slice(at, at + size)
        where = pool.step(names, [size] * 2)
        tail = pool.write(0, where, k[:, part], v[:, part])
        positions = where.starts[:, None] + jnp.arange(size, dtype=jnp.int32)[None, :]
        outs.append(
            turboq_kernels.cache_attention(
                q[:, part], layer, pool.view(0, where), tail, q_positions=positions, scale=SCALE
            )
        )
        at += size
    want = oracle(layer, q, k, v)[:, 100:]
    np.testing.assert_allclose(np.concatenate(outs, axis=1), want, atol=TOL["packed_attention"])


def test_a_prompt_in_two_chunks_matches_float64(rng):
    layer = before(cases.make_layer("turboquant", rng))
    q, k, v = inputs(rng, layer, 48)
    cache, outs = kv_cache.init(layer, batch=2, capacity=256), []
    for part in (slice(0, 24), slice(24, 48)):
        out, cache = prefill_attention(
            q[:, part], k[:, part], v[:, part], layer, cache, scale=SCALE
        )
        outs.append(out)
    want = oracle(layer, q, k, v, own_from=[0] * 24 + [24] * 24)
    np.testing.assert_allclose(np.concatenate(outs, axis=1), want, atol=TOL["packed_attention"])


def test_kernels_say_that_they_cannot(rng):
    codec = TurboQuantMSE(dim=64, bits=4)
    layer = uniform_layer(
        kv_heads=1, k=codec, v=codec, policy=TokenPolicy(), rope=Rope(dim=64, theta=1e4)
    )
    cache = kv_cache.init(layer, batch=1, capacity=256)
    x = jnp.ones((1, 1, 1, 64))
    for name in ("mosaic_tpu", "triton"):
        with pytest.raises(ValueError, match=f"'{name}' cannot run this case: keys before RoPE"):
            turboq_kernels.cache_attention(
                x, layer, cache, kv_cache.write(layer, cache, x, x)[1], scale=1.0,
                q_positions=jnp.zeros((1, 1), jnp.int32), implementation=name,
            )  # fmt: skip
        with pytest.raises(ValueError, match="cannot encode this case: keys before RoPE"):
            encoding.encode(layer, cache, x, x, implementation=name)
    assert encoding.choose(layer, 256, None) == "xla"


def test_layers_of_one_kind_share_a_program(rng):
    count = []
    for _ in range(2):
        layer = before(cases.make_layer("per_head", rng))
        q, k, v = inputs(rng, layer, 3, batch=1)
        run(layer, q, k, v, (3,))
        simulate(layer, k, v)
        jitted = (kv_cache._write, simulate, turboq_kernels.cache_attention)
        count.append([f._cache_size() for f in jitted])
    assert count[0] == count[1]


def test_rebuilt_layers_keep_it():
    policy, rope = TokenPolicy(), Rope(dim=8, theta=1e4)
    exact = Exact(dim=8)
    layer = uniform_layer(kv_heads=4, k=exact, v=exact, policy=policy, rope=rope)
    assert split_layer(layer, 2).rope == rope
    codec = Transform(dim=8, segments=((8, 2),))
    arrays = {n: jnp.ones((2, *s), jnp.float32) for n, s in codec.array_shapes.items()}
    learned = uniform_layer(
        kv_heads=2, k=codec, v=codec, policy=policy, k_arrays=arrays, v_arrays=arrays, rope=rope
    )
    shared = shared_layer(learned)
    assert shared is not learned
    assert shared.rope == rope
