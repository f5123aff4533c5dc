"""The Pallas-Triton encode kernel in interpret mode: against float64, and its steps alone."""

import dataclasses
import importlib.util
import sys

import encode_cases as cases
import jax
import jax.numpy as jnp
import numpy as np
import pytest
from append_cases import ROOM, full, layer_of_many, located, same
from tolerances import TOL

from turboq.cache import contiguous as caches
from turboq.cache.layer import TokenPolicy, uniform_layer
from turboq.cache.pool import Pool
from turboq.codecs import TurboQuantMSE
from turboq.codecs.transform import Transform
from turboq_kernels.encode import encode, store, triton
from turboq_kernels.encode import triton_steps as steps
from turboq_kernels.triton_memory import three

# The interpreted kernel is one large program: without optimization it compiles much faster.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
TILE = triton.Tuning(columns=32, block=32, num_warps=4, num_stages=1)
WRITE = jax.jit(
    triton.write, static_argnames=("writing", "interpret", "tuned"), compiler_options=FAST
)


def run(case, **options):
    return case.run(WRITE, interpret=True, **options)


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("mse_3", {"dim": 128, "tokens": 1, "starts": (0, 1, 255, 256, 257)}),
        ("mse_unbiased", {"tokens": 19, "page": 64, "paged": True, "counts": (19, 0)}),
        ("mse_4", {"tokens": 140, "starts": (3, 250), "counts": (140, 7), "dtype": "bfloat16"}),
        ("prod_1", {"page": 64, "paged": True, "tokens": 40, "starts": (0, 63)}),
        ("prod_bfloat16", {"dim": 128, "tokens": 20, "counts": (20, 7)}),
        ("transform_odd", {"tokens": 17, "page": 64, "starts": (60,)}),
        ("transform_float16", {"dim": 96}),
        ("rope_block", {"heads": 1, "tokens": 2}),
        ("hadamard_head", {"dim": 256, "heads": 1, "tokens": 1}),
    ],
)
def test_matches_float64(name, options):
    case = cases.make_case(name, **options)
    assert triton.unsupported(case.writing, case.codec.dim, case.page) is None
    cases.check(case, *run(case))


def test_chunks_give_equal_bytes():
    """In two pieces and one by one, the latter through programs of single tokens."""
    case = cases.make_case("prod_3", tokens=12, page=64, starts=(57, 2), heads=1, clean=True)
    whole = run(case, tuned=TILE)
    for sizes in ((7, 5), (1,) * 12):
        words, rows, at = case.words, [], 0
        for size in sizes:
            part = case.replace(
                x=case.x[:, :, at : at + size], words=words, starts=case.starts + at,
                counts=jnp.full_like(case.counts, size),
            )  # fmt: skip
            words, found = run(part, tuned=TILE)
            rows.append(found)
            at += size
        for a, b in zip(words, whole[0], strict=True):
            np.testing.assert_array_equal(a, b)
        for a, b in zip(zip(*rows, strict=True), whole[1], strict=True):
            np.testing.assert_array_equal(jnp.concatenate(a, axis=2), b)


def test_permuted_pages_give_permuted_bytes():
    case = cases.make_case("mse_2", tokens=70, page=64, paged=True, starts=(3, 60), clean=True)
    order = np.random.default_rng(1).permutation(case.words[0].shape[0] // 2)
    table = jnp.asarray(order, jnp.int32)[case.pages.table]
    moved = case.replace(pages=dataclasses.replace(case.pages, table=table))
    (a,), _ = run(case)
    (b,), _ = run(moved)
    split = (-1, 2, *a.shape[1:])  # pages, heads
    np.testing.assert_array_equal(b.reshape(split)[order], a.reshape(split))


def test_extreme_vectors():
    """Zeros, large and small numbers, NaN and Inf; their neighbours feel none of it."""
    case = cases.make_case("mse_matched", tokens=10, starts=(0,), heads=1)
    x = np.array(case.x)
    x[0, 0, 1] = 0.0
    x[0, 0, 2] *= 2e37 / np.abs(x[0, 0, 2]).max()
    x[0, 0, 3] *= 1e-35 / np.abs(x[0, 0, 3]).max()
    x[0, 0, 4, 5], x[0, 0, 5, 6], x[0, 0, 6, 0] = np.nan, np.inf, -np.inf
    words, (scale,) = run(case.replace(x=jnp.asarray(x)))
    clean, (plain,) = run(case)
    scale, plain = (np.asarray(s)[0, 0] for s in (scale, plain))
    assert np.all(np.isnan(scale[4:7]))
    assert scale[1] == 0
    for t in (2, 3):
        np.testing.assert_allclose(
            scale[t],
            np.sqrt(np.mean(np.square(x[0, 0, t], dtype=np.float64))),
            rtol=TOL["encode_tiny"],
        )
    same = [0, 7, 8, 9]
    np.testing.assert_array_equal(scale[same], plain[same])
    for a, b in zip(case.codes(words), case.codes(clean), strict=True):
        np.testing.assert_array_equal(a[0, 0, same], b[0, 0, same])


@pytest.mark.parametrize(("count", "paged"), [(1, False), (20, True)])
def test_through_the_cache(count, paged, rng):
    """After 58 tokens (whose words are zero here), what XLA writes."""
    layer, where = layer_of_many(simple=True), None
    if paged:
        pool = Pool([layer], pages=8, rows=2, per_sequence=2, page=64)
        names = [pool.pager.create() for _ in range(2)]
        pool.step(names, [58, 58])
        where, cache = pool.step(names, [count, count]), pool.caches[0]
    else:
        cache = caches.init(layer, batch=2, capacity=256)
        cache = dataclasses.replace(cache, lengths=cache.lengths + 58)
    k, v = jnp.asarray(rng.standard_normal((2, 2, count, 3, 64)), jnp.float32)

    def write(layer, cache, k, v, where):
        given = {"where": where}
        return (
            encode(layer, cache, k, v, implementation="triton", interpret=True, **given),
            encode(layer, cache, k, v, implementation="xla", **given),
        )

    same(*jax.jit(write, compiler_options=FAST)(layer, cache, k, v, where))


@pytest.mark.parametrize("many", [True, False])
def test_a_step_is_written_as_xla_writes_it(many, rng):
    """The first token, one past the sinks, on the second page, behind all room; one that waits."""
    layer = layer_of_many(simple=False)
    if not many:
        k, v = TurboQuantMSE(dim=128, bits=3), TurboQuantMSE(dim=32, bits=2)
        policy = TokenPolicy(recent=2, exact_dtype="float16")  # two launches: warps differ
        layer = uniform_layer(kv_heads=3, k=k, v=v, policy=policy)
    dims = (layer.groups[0].k.dim, layer.groups[0].v.dim)
    k, v = (jnp.asarray(rng.standard_normal((4, 1, 3, d)), jnp.bfloat16) for d in dims)
    assert store.appending("triton", layer, 1, True) is not None

    def both(cache, where):
        return (
            encode(layer, cache, k, v, where=where, implementation="triton", interpret=True),
            encode(layer, cache, k, v, where=where, implementation="xla"),
        )

    run = jax.jit(both, compiler_options=FAST)
    where = located([0, 3, 126, ROOM], [1, 1, 1, 1])
    got, want = run(full(rng, layer, where, float16_bits=not many), where)
    same(got, want)
    # A sequence begins anew, another one lost a token; row 2 is nobody's.
    assert got[0].overflow.tolist() == [3, 5, 5, 6, 0]
    where = located([1, 70, ROOM, 2], [1, 0, 1, 1])
    same(*run(full(rng, layer, where), where))


def test_several_tokens_and_blocks_go_the_other_way():
    codec = TurboQuantMSE(dim=64, bits=3)
    layer = uniform_layer(kv_heads=1, k=codec, v=codec, policy=TokenPolicy())
    assert store.appending("triton", layer, 2, True) is None


def test_three_parts_hold_all_bits():
    x = np.random.default_rng(0).standard_normal(2000).astype(np.float32)
    x[:3] = 0.0, np.finfo(np.float32).max, -np.finfo(np.float32).max
    parts = [np.asarray(p, np.float64) for p in three(jnp.asarray(x))]
    np.testing.assert_array_equal(sum(parts), x.astype(np.float64))
    for bad in (np.nan, np.inf):
        assert not np.isfinite(sum(np.asarray(p, np.float64) for p in three(jnp.float32(bad))))


def test_product_is_exact_to_float32():
    """Of positive numbers, where every missing term shows."""
    rng = np.random.default_rng(0)
    a, x = (rng.uniform(1.0, 2.0, (32, 64)).astype(np.float32) * 1e3 for _ in range(2))

    def blocks(values):
        return lambda k: jax.lax.dynamic_slice_in_dim(jnp.asarray(values), 16 * k, 16, 1)

    got = steps.product(blocks(a), blocks(x), 4, (32, 32))
    want = x.astype(np.float64) @ a.astype(np.float64).T
    np.testing.assert_allclose(got, want, rtol=TOL["split_product"])


def test_many_levels(monkeypatch):
    """6 bits beside 1, 32 gains: loops instead of unrolled steps."""
    monkeypatch.setitem(
        cases.CODECS, "many",
        lambda d: Transform(dim=d, segments=((16, 6), (8, 1)), gain="code", gain_bits=5),
    )  # fmt: skip
    case = cases.make_case("many", dim=32, tokens=3, starts=(62,), page=64)
    cases.check(case, *run(case))


def test_refuses():
    case = cases.make_case("mse_3", tokens=40, heads=1, starts=(0,), page=64)
    with pytest.raises(ValueError, match=r"tuned\.columns=16 are fewer than tokens_per_row=20"):
        run(case, tuned=dataclasses.replace(TILE, columns=16))
    assert "1024 coordinates are more than 512" in str(triton.unsupported(case.writing, 1024, 256))


def test_says_so_where_jax_has_no_triton(monkeypatch):
    monkeypatch.delattr("jax.experimental.pallas.triton")
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    path = triton.__file__
    assert path is not None
    spec = importlib.util.spec_from_file_location("encode_triton_again", path)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=r"no Pallas-Triton backend .* implementation='xla'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))
