"""The TPU encode kernel in interpret mode: against float64, in place, watched for races."""

import dataclasses
import functools

import encode_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from tolerances import TOL

from turboq.cache import contiguous as caches
from turboq.cache import paged as paged_cache
from turboq.cache.layer import HeadGroup, KVLayer, TokenPolicy, uniform_layer
from turboq.cache.pager import Pager
from turboq.codecs import Exact, PerHead, TurboQuantMSE, TurboQuantProd
from turboq_kernels.encode import encode, mosaic_tpu
from turboq_kernels.encode import mosaic_tpu_codes as arithmetic

# The interpreted kernel is one large program: without optimization it compiles much faster.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
WATCHED = pltpu.InterpretParams(
    detect_races=True, out_of_bounds_reads="raise", dma_execution_mode="on_wait"
)


@functools.cache
def compiled(writing, interpret):
    def write(x, tables, words, pages, starts, counts):
        return mosaic_tpu.write(
            x, writing, tables, words, pages, starts, counts, interpret=interpret
        )

    return jax.jit(write, compiler_options=FAST)


def run(case, interpret: bool | pltpu.InterpretParams = True):
    assert mosaic_tpu.unsupported(case.writing, case.codec.dim, case.page) is None
    write = compiled(case.writing, interpret)
    return write(case.x, case.tables, case.words, case.pages, case.starts, case.counts)


@pytest.mark.parametrize(
    ("name", "made"),
    [
        # Appends: one token, a few, none; more sequences than one step takes; two pages.
        ("mse_3", {"tokens": 1, "starts": (0, 1, 255, 256, 257) + (9,) * 12, "heads": 1}),
        ("prod_3", {"dim": 128, "tokens": 5, "starts": (254, 7, 60), "counts": (5, 0, 2)}),
        ("transform_code", {"dim": 256, "tokens": 3, "starts": (63, 62, 0), "page": 64}),
        ("transform_odd", {"dim": 64, "tokens": 2, "starts": (255, 3), "paged": True}),
        # Chunks: part of a page, several, from anywhere; pages of 64; 16-bit inputs.
        ("mse_unbiased", {"tokens": 300, "starts": (3, 70), "counts": (300, 0), "heads": 1}),
        ("transform_float16", {"dim": 128, "tokens": 40, "starts": (255, 0), "paged": True}),
        ("prod_1", {"tokens": 150, "starts": (63, 64), "page": 64, "paged": True}),
        ("per_head_head", {"dim": 256, "tokens": 9, "starts": (0,), "dtype": "bfloat16"}),
        # Enough signs for some to follow from the rounding of the scale.
        ("prod_bfloat16", {"tokens": 400, "starts": (5,)}),
        ("mse_least_squares", {"dim": 128, "tokens": 10, "starts": (1,), "heads": 1}),
    ],
)
def test_matches_float64(name, made):
    case = cases.make_case(name, **made)
    cases.check(case, *run(case))


@pytest.mark.parametrize(("name", "sizes"), [("prod_3", (1,) * 10), ("transform_code", (5, 5))])
def test_chunks_of_any_size_give_equal_bytes(name, sizes):
    """Ten tokens at once, one by one, and in pieces: the same pages.

    Row numbers follow from sums that a CPU adds in another order in tiles of another height.
    """
    whole = cases.make_case(name, page=64, paged=True, tokens=10, starts=(58, 0), heads=1)
    want, numbers = run(whole)
    words, at, got = whole.words, 0, []
    for size in sizes:
        piece = whole.replace(
            x=whole.x[:, :, at : at + size], words=words, starts=whole.starts + at,
            counts=jnp.full_like(whole.counts, size),
        )  # fmt: skip
        words, rows = run(piece)
        got.append(rows)
        at += size
    for a, b in zip(words, want, strict=True):
        np.testing.assert_array_equal(a, b)
    for a, b in zip(zip(*got, strict=True), numbers, strict=True):
        a = jnp.concatenate(a, axis=2)
        np.testing.assert_allclose(a, b, rtol=TOL["encode_f32"], atol=0)


def test_pages_anywhere_get_the_same_bytes():
    """Two orders of a pool: equal bytes in the pages of the same tokens."""
    first = cases.make_case("mse_2", paged=True, tokens=300, starts=(100, 3), clean=True)
    total = first.words[0].shape[0] // 2
    order = np.random.default_rng(5).permutation(total)
    assert np.any(order != np.arange(total))
    table = jnp.asarray(order, jnp.int32)[first.pages.table]
    other = first.replace(pages=dataclasses.replace(first.pages, table=table))
    (a,), _ = run(first)
    (b,), _ = run(other)
    a, b = (np.asarray(x).reshape(total, 2, *x.shape[1:]) for x in (a, b))
    np.testing.assert_array_equal(b[order], a)


@pytest.mark.parametrize(
    "made",
    [
        {"tokens": 2, "starts": (63, 7, 62), "counts": (2, 0, 2), "page": 64, "heads": 1},
        {"tokens": 300, "starts": (3, 200, 0), "counts": (300, 100, 0), "spare_pages": 0},
    ],
)
def test_no_races_and_nothing_out_of_bounds(made, capfd):
    """Copies as late as their waits allow, memory that starts as NaN, every access checked."""
    case = cases.make_case("mse_2", paged=True, **made)
    cases.check(case, *run(case, WATCHED))
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


def test_special_vectors():
    """Inf and NaN show in their own row number only; huge, tiny and zero vectors keep theirs."""
    tokens = 10
    case = cases.make_case("prod_float32", dim=128, tokens=tokens, starts=(0,), heads=1)
    x = np.array(case.x)
    x[0, 0, 0, 3], x[0, 0, 1, 5], x[0, 0, 2, 7] = np.nan, np.inf, -np.inf
    x[0, 0, 3] *= 1e38 / np.abs(x[0, 0, 3]).max()
    x[0, 0, 4] *= 1e-30 / np.abs(x[0, 0, 4]).max()
    x[0, 0, 5], x[0, 0, 6] = 0.0, 3e-38
    case = case.replace(x=jnp.asarray(x))
    words, rows = run(case)
    for row in rows:
        row = np.asarray(row[0, 0])
        assert np.all(np.isnan(row[:3]))
        assert np.all(np.isfinite(row[3:]))
        np.testing.assert_array_equal(row[5:7], 0.0)
    good = np.zeros(tokens, bool)
    good[[3, 4, 7]] = True
    codes, zero = case.codes(words), np.asarray(case.tables.levels[0][0])
    cases.check_codes(case.writing, case.tables, x, codes, rows, valid=good)
    middle = np.sum(0.5 * (zero[1:] + zero[:-1]) < 0)
    np.testing.assert_array_equal(codes[0][0, 0, 5:7], middle)


@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_rounds_as_the_types_themselves(dtype):
    """Every number of the type, every middle of two, their float32 neighbours; infinity, NaN."""
    bits = np.arange(2**15, dtype=np.uint16)
    every = np.asarray(bits.view(jnp.dtype(dtype)), np.float32)
    every = every[np.isfinite(every)]
    middle = ((every[1:].astype(np.float64) + every[:-1]) / 2).astype(np.float32)
    x = np.concatenate([every, middle, np.array([65519.9, 65520, 7e4, np.inf, np.nan], np.float32)])
    x = np.concatenate([x, np.nextafter(x, np.float32(np.inf)), np.nextafter(x, np.float32(0))])
    x = x[~((x < np.finfo(np.float32).tiny) & (x > 0))]  # a TPU has no subnormal float32
    got = jax.jit(arithmetic.rounded, static_argnums=1)(jnp.asarray(x), dtype)
    with np.errstate(over="ignore"):
        want = x.astype(jnp.dtype(dtype)).astype(np.float32)
    np.testing.assert_array_equal(got, want)


def layer_of(dim):
    rng = np.random.default_rng(2)
    learned = PerHead(dim=dim, bits=4)
    arrays = {
        "mean": jnp.asarray(rng.standard_normal((1, dim)), jnp.float32),
        "scale": jnp.asarray(rng.uniform(0.5, 1.5, (1,)), jnp.float32),
        "codebook": jnp.asarray(np.sort(rng.standard_normal((1, 16))), jnp.float32),
    }
    prod, mse = TurboQuantProd(dim=dim, bits=3), TurboQuantMSE(dim=dim, bits=2)
    groups = (
        HeadGroup(heads=(1,), k=learned, v=mse, k_arrays=arrays, v_arrays={}),
        HeadGroup(heads=(0, 2), k=prod, v=mse, k_arrays={}, v_arrays={}),
    )
    policy = TokenPolicy(sinks=2, recent=3, exact_dtype="float32")
    return KVLayer(groups=groups, policy=policy)


def same_cache(layer, got, want):
    """Equal up to codes and units that float32 rounding decides; exact tokens exactly."""
    for group, a, b in zip(layer.groups, got.groups, want.groups, strict=True):
        for x, y in zip((a.k_sinks, a.v_recent), (b.k_sinks, b.v_recent), strict=True):
            np.testing.assert_array_equal(x, y)
        for codec, x, y in ((group.k, a.k, b.k), (group.v, a.v, b.v)):
            for field in codec.fields:
                ours, xla = np.asarray(x[field.name]), np.asarray(y[field.name])
                if field.packed:
                    lead = (-1, *ours.shape[-3:])
                    ours, xla = (cases.unpacked(w.reshape(lead)) for w in (ours, xla))
                    assert np.any(xla)
                    assert np.mean(ours != xla) <= TOL["unclear_share"]
                else:
                    unit = 2.0 * TOL["stored_float16"]
                    np.testing.assert_allclose(ours, xla, rtol=unit, atol=0)


def tokens_of(rng, layer, count):
    shape = (2, count, layer.kv_heads, 64)
    return tuple(jnp.asarray(rng.standard_normal(shape), jnp.float32) for _ in range(2))


@functools.cache
def encoding(name):
    way = functools.partial(encode, implementation=name, interpret=name != "xla")
    return jax.jit(way, compiler_options=FAST)


def test_encode_into_a_contiguous_cache(rng):
    """A mixed layer: a chunk across pages, and padding; the XLA path's bytes."""
    layer = layer_of(64)
    found = {}
    steps = [(*tokens_of(rng, layer, 260), (260, 11))]
    for name in ("mosaic_tpu", "xla"):
        cache = caches.init(layer, batch=2, capacity=300)
        for k, v, counts in steps:
            cache, tail = encoding(name)(layer, cache, k, v, counts=jnp.asarray(counts, jnp.int32))
        found[name] = cache, tail
    same_cache(layer, found["mosaic_tpu"][0], found["xla"][0])
    jax.tree.map(np.testing.assert_array_equal, found["mosaic_tpu"][1], found["xla"][1])


def test_encode_into_a_pool(rng):
    """A few tokens at a time, over a page's end; the XLA path's bytes."""
    layer = uniform_layer(
        kv_heads=2, k=TurboQuantProd(dim=64, bits=3), v=TurboQuantMSE(dim=64, bits=2),
        policy=TokenPolicy(sinks=1, recent=2),
    )  # fmt: skip
    found = {}
    steps = [tokens_of(rng, layer, 3) for _ in range(23)]
    for name in ("mosaic_tpu", "xla"):
        pager = Pager(pages=8, rows=3, per_sequence=3, page=64)
        names = [pager.create(), pager.create()]
        cache = paged_cache.init(layer, pages=8, rows=3, page=64)
        for k, v in steps:
            step = pager.plan(names, (3, 2))
            cache = paged_cache.copy(cache, step)
            cache, _ = encoding(name)(layer, cache, k, v, where=paged_cache.locate(step))
        found[name] = cache
    same_cache(layer, found["mosaic_tpu"], found["xla"])


def test_what_it_cannot_do():
    writing = TurboQuantMSE(dim=64, bits=5).writing
    assert writing is not None
    assert "5-bit table" in str(mosaic_tpu.unsupported(writing, 64, 256))
    two = TurboQuantMSE(dim=512, bits=2).writing
    assert two is not None
    assert "512 coordinates" in str(mosaic_tpu.unsupported(two, 512, 256))
    assert "pages of 128" in str(mosaic_tpu.unsupported(two, 64, 128))
    for codec, message in ((TurboQuantMSE(dim=64, bits=5), "5-bit"), (Exact(dim=64), "no writing")):
        group = HeadGroup(heads=(0,), k=codec, v=codec, k_arrays={}, v_arrays={})
        layer = KVLayer(groups=(group,), policy=TokenPolicy(sinks=0, recent=0))
        cache = caches.init(layer, batch=1, capacity=1)
        k = jnp.zeros((1, 1, 1, 64))
        with pytest.raises(ValueError, match=message):
            encode(layer, cache, k, k, implementation="mosaic_tpu", interpret=True)
