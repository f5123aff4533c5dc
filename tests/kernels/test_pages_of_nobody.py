"""Page tables that hold -1 behind a sequence's end, as engines' do: the same bits as with 0 there.

What reads a page must be in the buffer: on a TPU every access is checked, of a GPU kernel the pages
that it reads are.
"""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import kernel_cases
import kv_cases
import numpy as np
import prefill_cases
import pytest
import triton_cases
from jax.experimental.pallas import tpu as pltpu
from step_cases import FAST, SCALE, SIZES, filled

import turboq_kernels
from turboq.cache.layer import TokenPolicy, uniform_layer
from turboq.cache.pool import Pool
from turboq.codecs import PerHead
from turboq_kernels.decode import base, mosaic_tpu, mosaic_tpu_step, triton, triton_kernel
from turboq_kernels.prefill import mosaic_tpu as prefill_tpu
from turboq_kernels.prefill import mosaic_tpu_softmax
from turboq_kernels.prefill import triton as prefill_triton

WATCHED = pltpu.InterpretParams(out_of_bounds_reads="raise")
LENGTHS = {256: (600, 0, 7), 64: (300, 0, 7)}  # of a page: of odd numbers of pages, and none
SMALL = dataclasses.replace(triton_cases.SMALL, tile_rows=4)  # of two pages of 64
pytestmark = pytest.mark.usefixtures("unchecked")  # `interpret` is no bool where it is watched


def behind(table, lengths, page, entry):
    """The table with `entry` in place of all that lies behind a sequence's end."""
    held = -(-jnp.asarray(lengths, jnp.int32)[:, None] // page)
    return jnp.where(jnp.arange(table.shape[1])[None] < held, table, entry)


def same(run):
    """Every number of run(-1) is that of run(0), bit for bit; the first array has some.

    Not only -1: what is checked counts -1 from the buffer's end.
    """
    want = jax.tree.leaves(run(0))
    for entry in (-1, -1000):
        for a, b in zip(jax.tree.leaves(run(entry)), want, strict=True):
            np.testing.assert_array_equal(a, b)
    assert np.any(np.asarray(want[0]))


@pytest.fixture
def read(monkeypatch):
    """The lowest and the highest head-page of every step that a Triton kernel reads."""
    found, levels = [], triton_kernel._levels

    def noted(ref, page, *args):
        jax.debug.callback(lambda *x: found.append(x), jnp.min(page), jnp.max(page), ref.shape[0])
        return levels(ref, page, *args)

    monkeypatch.setattr(triton_kernel, "_levels", noted)
    return found


def check_read(found):
    jax.effects_barrier()
    assert found
    assert all(0 <= low <= high < count for low, high, count in found), found


def over(function, case, **options):
    """run(entry) of a function over stored tokens of a pool."""
    named = {"bias": None} | case.options | options
    call = jax.jit(functools.partial(function, **named), compiler_options=FAST)

    def run(entry):
        table = behind(case.pages.table, LENGTHS[case.k.page], case.k.page, entry)
        pages = dataclasses.replace(case.pages, table=table)
        return call(case.q, case.k, case.v, pages, case.starts, case.ends)

    return run


def made(kind, name, dim, page):
    kind = kernel_cases.make if kind == "decode" else prefill_cases.history
    tokens = {} if kind is kernel_cases.make else {"tokens": 5}
    return kind(
        name, dim=dim, page=page, paged=True, lengths=LENGTHS[page], group=2, spare_pages=2,
        **tokens,
    )  # fmt: skip


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_xla(kind):
    case = made(kind, "turboquant_3", 32, 256)
    same(over(base.decode, case, splits=None, block_tokens=512))


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_a_gpu_kernel(kind, read):
    function, tuned = triton.decode, SMALL
    if kind == "prefill":
        function, tuned = prefill_triton.history, (SMALL, 64)
    case = made(kind, "turboquant_3", 32, 64)
    same(over(function, case, splits=None, interpret=True, tuned=tuned))
    check_read(read)


@pytest.mark.parametrize("kind", ["decode", "prefill"])
def test_a_tpu_kernel(kind, monkeypatch):
    monkeypatch.setattr(mosaic_tpu_softmax, "MAX_RUN", 16)
    case = made(kind, "static_scale", 128, 256)
    options = {"splits": None} if kind == "decode" else {}
    function = mosaic_tpu.decode if kind == "decode" else prefill_tpu.history
    same(over(function, case, interpret=WATCHED, **options))


@pytest.mark.parametrize("name", ["triton", "mosaic_tpu"])
def test_a_step_by_launches_of_its_own(name, rng, read, monkeypatch):
    """A sequence of one page of three, and one of fewer tokens than sinks."""
    monkeypatch.setattr(mosaic_tpu_step, "UNROLLED", 0)
    dim, page = SIZES[name]
    # The watched interpreter takes no 16-bit scales of two heads.
    codec = PerHead(dim=dim, bits=2, scale="head" if name == "mosaic_tpu" else "vector")
    arrays = [kv_cases.learned(rng, 2, 2, dim) for _ in "kv"]
    layer = uniform_layer(
        kv_heads=2, k=codec, v=codec, policy=TokenPolicy(sinks=3, recent=5), k_arrays=arrays[0],
        v_arrays=arrays[1],
    )  # fmt: skip
    view, tail, *_ = filled(rng, layer, 1, page)
    lengths, table = jnp.asarray([page - 5, 1], jnp.int32), jnp.pad(view.table, ((0, 0), (0, 1)))
    view = dataclasses.replace(view, lengths=lengths, table=table)
    q = jnp.asarray(rng.standard_normal((2, 1, 4, dim)), jnp.float32)

    def attend(q, view, tail):
        return turboq_kernels.cache_attention(
            q, layer, view, tail, q_positions=lengths[:, None] - 1, scale=SCALE,
            implementation=name, interpret=True if name == "triton" else WATCHED,
        )  # fmt: skip

    traced = jax.jit(attend, compiler_options=FAST).trace(q, view, tail)
    assert "name=turboq_finish" in str(traced.jaxpr), "the general way was taken"
    call = traced.lower().compile()

    def run(entry):
        table = behind(view.table, view.lengths, page, entry)
        return call(q, dataclasses.replace(view, table=table), tail)

    same(run)
    if name == "triton":
        check_read(read)


@pytest.mark.parametrize("name", ["per_head", "blocks"])  # read by levels, and through the codec
def test_xla_reads_and_writes_a_cache(name, rng):
    """A chunk of two sequences: its outputs, and the pool behind it."""
    layer = kv_cases.make_layer(name, rng)
    pool = Pool([layer], pages=12, rows=4, per_sequence=4, page=64)
    names = [pool.pager.create() for _ in range(2)]
    k, v = kv_cases.tokens(rng, layer, 100)
    q = jnp.asarray(rng.standard_normal((2, 20, 2 * layer.kv_heads, kv_cases.DIM)), jnp.float32)
    pool.write(0, pool.step(names, [80, 30]), k[:, :80], v[:, :80])
    where, cache = pool.step(names, [20, 5]), pool.caches[0]

    @jax.jit
    def attend(cache, where):
        return turboq_kernels.prefill_attention(
            q, k[:, 80:], v[:, 80:], layer, cache, where=where, scale=SCALE
        )

    def run(entry):
        table = behind(where.table, where.starts + where.counts, cache.page, entry)
        return attend(cache, dataclasses.replace(where, tables=(table,)))

    same(run)
