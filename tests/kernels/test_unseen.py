"""What a query may not see does not reach it, Inf and NaN included: 0 * Inf is NaN.

A token is broken in one head. Queries that may see it are not finite; all others, and other heads,
are bit for bit what they are without the break.
"""

import dataclasses

import jax.numpy as jnp
import kernel_cases
import kv_cases as cases
import numpy as np
import prefill_cases
import pytest

import turboq_kernels
from turboq.cache import contiguous as kv_cache
from turboq.cache.exact_attention import attention
from turboq.cache.layer import TokenPolicy, uniform_layer
from turboq.cache.simulate import simulated_attention
from turboq.codecs import FP8, NVFP4, Exact, TurboQuantMSE
from turboq.numbers.packing import PAGE
from turboq.numbers.rope import Rope

SCALE, GROUP, TOKENS, BAD = 0.3, 2, 24, 11


def packed(layer, q, k, v, window, sizes):
    cache, outs, at = kv_cache.init(layer, batch=q.shape[0], capacity=PAGE), [], 0
    for size in sizes:
        part = slice(at, at + size)
        positions = cache.lengths[:, None] + jnp.arange(size, dtype=jnp.int32)[None, :]
        cache, tail = kv_cache.write(layer, cache, k[:, part], v[:, part])
        outs.append(
            turboq_kernels.cache_attention(
                q[:, part], layer, cache, tail, q_positions=positions, scale=SCALE, window=window
            )
        )
        at += size
    return jnp.concatenate(outs, axis=1)


PATHS = {
    "exact": lambda layer, q, k, v, window: attention(q, k, v, scale=SCALE, window=window),
    "blocks of queries": lambda layer, q, k, v, window: attention(
        q, k, v, scale=SCALE, window=window, query_block=5
    ),
    "simulated": lambda layer, q, k, v, window: simulated_attention(
        layer, q, k, v, scale=SCALE, window=window
    ),
    "packed": lambda layer, q, k, v, window: packed(layer, q, k, v, window, (TOKENS,)),
    "chunks": lambda layer, q, k, v, window: packed(layer, q, k, v, window, (12, 12)),
    "prefill": lambda layer, q, k, v, window: turboq_kernels.prefill_attention(
        q, k, v, layer, kv_cache.init(layer, batch=q.shape[0], capacity=PAGE),
        scale=SCALE, window=window,
    )[0],
}  # fmt: skip


def layers():
    fp8, exact = FP8(dim=cases.DIM, scale="none"), Exact(dim=cases.DIM, dtype="float16")
    rope = Rope(dim=cases.DIM, theta=100.0)
    nothing, ones = TokenPolicy(), {"scale": jnp.ones((2,), jnp.float32)}
    mse = TurboQuantMSE(dim=cases.DIM, bits=3)
    return {
        "codes that are NaN": uniform_layer(kv_heads=2, k=fp8, v=fp8, policy=nothing),
        "vectors": uniform_layer(kv_heads=2, k=exact, v=exact, policy=nothing),
        "keys before RoPE": uniform_layer(kv_heads=2, k=mse, v=fp8, policy=nothing, rope=rope),
        "block scales": uniform_layer(
            kv_heads=2, k=mse, v=NVFP4(dim=cases.DIM), policy=nothing, v_arrays=ones
        ),
    }


def layer_of(name, rng):
    return cases.make_layer(name, rng) if name in cases.LAYERS else layers()[name]


@pytest.mark.parametrize(
    ("path", "name", "window"),
    [
        ("exact", "exact", None),
        ("blocks of queries", "exact", 4),
        ("simulated", "mixed", None),
        ("simulated", "blocks", None),
        ("packed", "codes that are NaN", None),
        ("packed", "vectors", None),
        ("packed", "keys before RoPE", 4),
        ("packed", "block scales", None),
        ("chunks", "mixed", 4),
        ("chunks", "blocks", None),
        ("prefill", "per_head", None),
    ],
)
def test_a_broken_token_reaches_those_that_see_it(rng, path, name, window):
    """A key in sequence 0, a value in sequence 1, both of head 1."""
    layer = cases.make_layer(name, rng) if name in cases.LAYERS else layers()[name]
    k, v = cases.tokens(rng, layer, TOKENS)
    q = jnp.asarray(rng.standard_normal((2, TOKENS, GROUP * layer.kv_heads, cases.DIM)), k.dtype)
    # FP8 without scales stores Inf as its largest number.
    what = jnp.nan if name in layers() else jnp.inf
    broken = k.at[0, BAD, 1, 3].set(what), v.at[1, BAD + 1, 1, 3].set(what)
    clean, got = (np.asarray(PATHS[path](layer, q, *kv, window)) for kv in ((k, v), broken))
    since = np.arange(TOKENS)[None] - np.array([[BAD], [BAD + 1]])
    sees = np.zeros(got.shape[:3], bool)
    sees[..., GROUP : 2 * GROUP] = ((since >= 0) & (since < (window or TOKENS)))[..., None]
    np.testing.assert_array_equal(got[~sees], clean[~sees])
    assert not np.isfinite(got[sees]).all(axis=-1).any()


def break_a_scale(case, slot: int):
    """The case with V's scale of one slot of sequence 0 and head 0 infinite."""
    page = case.v.page
    row = int(case.pages.table[0, slot // page]) * case.pages.stride_page
    scales = tuple(s.at[row, slot % page].set(jnp.inf) for s in case.v.scales)
    return case.replace(v=dataclasses.replace(case.v, scales=scales))


@pytest.mark.parametrize(
    ("implementation", "run", "dtype"),
    [
        ("xla", kernel_cases.Case.run, "float16"),
        ("mosaic_tpu", kernel_cases.Case.run, "float32"),
    ],
)
def test_a_broken_scale_in_kernels(implementation, run, dtype):
    """Speculative tokens: rows of one tile that end at different slots.

    TPU kernels read what is not finite as a number, so there nothing shows in the rows that see it.
    In Triton's kernels a tile of rows shares it: keeping it apart costs prefill a quarter more.
    """
    case = kernel_cases.make("turboquant_2", lengths=(40,), heads=1, tokens=2, scale_dtype=dtype)
    slot = int(case.ends.max()) - 1
    options = {"implementation": implementation, "interpret": implementation != "xla"}
    clean, got = (
        np.asarray(p.acc / p.total[..., None])[0, 0]
        for p in (run(c, **options) for c in (case, break_a_scale(case, slot)))
    )
    sees = np.asarray(case.ends)[0] > slot
    assert 0 < sees.sum() < len(sees)
    np.testing.assert_array_equal(got[~sees], clean[~sees])
    if implementation != "mosaic_tpu":
        assert not np.isfinite(got[sees]).all(axis=-1).any()


@pytest.mark.parametrize("implementation", ["xla", "triton", "mosaic_tpu"])
def test_a_broken_exact_token_in_kernels(implementation):
    """A chunk's own tokens: a key broken in head 0, a value in head 1."""
    case = prefill_cases.own(tokens=6, dim=64, starts=(3,), heads=2)
    broken = case.replace(
        k=case.k.at[0, 0, 4, 3].set(jnp.inf), v=case.v.at[0, 1, 4, 3].set(jnp.nan)
    )
    options = {"implementation": implementation, "interpret": implementation != "xla"}
    clean, got = (
        np.asarray(p.acc / p.total[..., None])[0]
        for p in (c.run(**options) for c in (case, broken))
    )
    sees = np.asarray(case.upper)[0] >= 3 + 4
    np.testing.assert_array_equal(got[:, ~sees], clean[:, ~sees])
    assert not np.isfinite(got[:, sees]).any()
