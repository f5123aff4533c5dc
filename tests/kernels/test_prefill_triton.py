"""The Triton prefill kernels in interpret mode: against float64, their bounds, NaN in gaps."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import prefill_cases as cases
import pytest
from tolerances import TOL

from turboq.codecs.reading import Part, Reading
from turboq_kernels.decode import triton_kernel
from turboq_kernels.prefill import triton, triton_own

# The interpreted kernel is one large program: without optimization it compiles much faster.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}
SMALL = (triton_kernel.Tuning(tile_rows=2, num_warps=4, num_stages=1, residency=1), 64)
OWN = triton_own.OwnTuning(rows=32, entries=16, num_warps=4, num_stages=1)


def jitted(function, **options):
    return jax.jit(functools.partial(function, interpret=True, **options), compiler_options=FAST)


def run(case, *, splits=1, tuned=SMALL):
    call = jitted(triton.history, **{"bias": None} | case.options, splits=splits, tuned=tuned)
    return call(*cases.args(case))


def run_own(case, tuned=OWN):
    return jitted(triton.own, **case.options, tuned=tuned)(*case.args)


def make(name, *, dim=32, heads=1, **options):
    return cases.with_bfloat16_tables(cases.history(name, dim=dim, heads=heads, **options))


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("turboquant_4", {"page": 64, "paged": True, "sinks": 3, "window": 90, "padding": 2}),
        ("prod", {"softcap": 1.3, "bias": True, "lengths": (40, 130), "recent": 6}),
        ("segments", {"dim": 64, "lengths": (70, 64), "page": 64, "tokens": 13, "group": 5}),
        ("mixed", {"page": 64, "scale_dtype": "float32", "lengths": (90,), "group": 1}),
    ],
)
def test_history_matches_float64(name, options):
    case = make(name, **options)
    cases.check(case, run(case), tolerance="decode_bfloat16")


def test_lengths_and_splits():
    """Lengths around a page and a tile of 2 pages; 3 splits of 5 tiles, some of them empty.

    With offsets rounding is relative to scale * code and to the offset, not to their sum.
    """
    lengths = (0, 1, 63, 64, 65, 128, 129, 600)
    case = make("affine", page=64, paged=True, lengths=lengths, tokens=43, group=2)
    tuned = (dataclasses.replace(SMALL[0], tile_rows=4), SMALL[1])
    offsets = tuple(jnp.abs(x) for x in case.v.offsets)
    sizes = case.replace(v=dataclasses.replace(case.v, offsets=offsets))
    want = dataclasses.replace(cases.oracle(case), mean_abs=cases.oracle(sizes).mean_abs)
    got = run(case, splits=3, tuned=tuned)
    cases.check(case, got, tolerance="decode_bfloat16", want=want)


def test_pages_anywhere():
    """The same head-pages in a pool, in another order: the same numbers."""
    plain = make("turboquant_2", page=64, lengths=(190, 100), tokens=23, heads=2)
    batch, count = plain.pages.table.shape
    order = np.random.default_rng(1).permutation(batch * count)

    def moved(buffer):
        flat = np.asarray(buffer).reshape(batch, 2, count, *buffer.shape[1:])
        pool = np.empty((batch * count, 2, *buffer.shape[1:]), buffer.dtype)
        pool[order] = flat.swapaxes(1, 2).reshape(pool.shape)
        return jnp.asarray(pool.reshape(buffer.shape))

    def side(side):
        return dataclasses.replace(
            side, words=tuple(map(moved, side.words)), scales=tuple(map(moved, side.scales))
        )

    table = jnp.asarray(order.reshape(batch, count), jnp.int32)
    pages = dataclasses.replace(
        plain.pages, table=table, stride_page=2, stride_head=1, contiguous=False
    )
    paged = plain.replace(k=side(plain.k), v=side(plain.v), pages=pages)
    for a, b in zip(jax.tree.leaves(run(plain)), jax.tree.leaves(run(paged)), strict=True):
        np.testing.assert_array_equal(a, b)


def test_rows_anywhere():
    """A chunk cut after 10 rows and put together the other way round: each row as before.

    The second tile then needs a page that the first does not.
    """
    case = make("static_scale", page=64, lengths=(190,), tokens=74, group=1, window=66)
    call = jitted(triton.history, bias=None, **case.options, splits=1, tuned=SMALL)
    want = call(*cases.args(case))
    rows = np.roll(np.arange(74), -10)
    seen = case.starts[:, rows], case.ends[:, rows]
    got = call(case.q[:, :, rows], case.k, case.v, case.pages, *seen)
    for a, b in zip(jax.tree.leaves(want), jax.tree.leaves(got), strict=True):
        np.testing.assert_allclose(a[:, :, rows], b, rtol=TOL["decode_stored"], atol=1e-30)


@pytest.mark.parametrize(
    ("options", "tolerance"),
    [
        # A ring out of order before the chunk, padding tokens, a window, other coordinates of V.
        (
            {"ring": 45, "starts": (3, 700, 9), "counts": (50, 11, 0), "window": 30, "v_dim": 16},
            "own_pairs",
        ),
        ({"dim": 128, "dtype": "bfloat16", "softcap": 2.0, "group": 5}, "decode_bfloat16"),
        ({"dim": 80, "dtype": "float16", "group": 1, "heads": 1, "ring": 3}, "own_pairs"),
    ],
)
def test_own_matches_float64(options, tolerance):
    case = cases.own(tokens=50, **{"dim": 32} | options)
    cases.check(case, run_own(case), tolerance=tolerance)


def test_nan_between_what_the_rows_of_a_tile_see():
    """Rows that see nothing in common: entries between theirs belong to nobody."""
    case = cases.own(tokens=20, group=1, heads=1, dim=16, starts=(0,))
    lower = jnp.where(jnp.arange(20) % 2 == 0, 0, 15)[None]
    upper = jnp.where(jnp.arange(20) % 2 == 0, 4, 18)[None]
    nobody = (jnp.arange(20) > 4) & ((jnp.arange(20) < 15) | (jnp.arange(20) > 18))
    k, v = (jnp.where(nobody[:, None], jnp.nan, jnp.nan_to_num(x)) for x in (case.k, case.v))
    case = case.replace(k=k, v=v, lower=lower, upper=upper)
    cases.check(case, run_own(case), tolerance="own_pairs")


def test_own_reads_only_tiles_that_are_seen():
    """The steps of every tile of rows against all pairs of rows and entries."""
    tokens, window = 200, 24
    case = cases.own(
        tokens=tokens, group=1, heads=1, dim=16, starts=(30, 0), ring=16, window=window
    )
    got = np.asarray(triton_own.bounds(case.positions, case.lower, case.upper, OWN))
    s = np.asarray(case.positions)[:, None]
    lower, upper = (np.asarray(x)[..., None] for x in (case.lower, case.upper))
    seen = (s >= 0) & (s >= lower) & (s <= upper)
    steps = 0
    for b in range(2):
        for tile in range(got.shape[1]):
            rows = seen[b, tile * OWN.rows : (tile + 1) * OWN.rows].any(axis=0)
            tiles = np.unique(np.flatnonzero(rows) // OWN.entries)
            assert (got[b, tile, 0], got[b, tile, 1]) == (tiles[0], tiles[-1] + 1)
            steps += got[b, tile, 1] - got[b, tile, 0]
    each = (OWN.rows + window) // OWN.entries + 2
    assert steps <= 2 * got.shape[1] * each
    nothing = triton_own.bounds(case.positions, case.upper, case.lower - 1, OWN)
    np.testing.assert_array_equal(nothing, 0)


def test_history_reads_only_pages_that_are_seen():
    """A window of 49 slots up to the 600th: a tile of rows reads up to three pages of 64."""
    plan = triton_kernel.Plan(
        k=(), v=(), strides=(1, 1), rows=2, m=64, tiles=3, tile_rows=2, whole=True, steps=12,
        scale=1.0, softcap=None, interpret=True, asm=False,
    )  # fmt: skip
    at = np.arange(170)
    starts, ends = (jnp.asarray(x, jnp.int32)[None] for x in (at + 400, np.minimum(at + 449, 600)))
    first, last = map(np.asarray, triton_kernel.bounds(starts, ends, plan))
    for tile in range(3):
        rows = slice(64 * tile, 64 * (tile + 1))
        low, high = at[rows][0] + 400, min(at[rows][-1] + 449, 600)
        assert (first[tile], last[tile]) == (low // 64, -(-high // 64))
        assert last[tile] - first[tile] <= 3
    assert np.all(last <= plan.steps)


def test_what_it_refuses():
    case = cases.history("turboquant_3", lengths=(5,), tokens=1)
    part = Part(field="codes", width=64, bits=5, levels="table")
    wide = dataclasses.replace(case.k, reading=Reading(parts=(part,)))
    assert "5 bits" in str(triton.unsupported(case.q, wide, case.v, case.pages))
    assert triton.unsupported(*cases.args(case)[:4]) is None
    exact = cases.own(tokens=2, dim=513, heads=1, group=1)
    with pytest.raises(ValueError, match=r"dim=513 .* use 'xla'"):
        exact.run(implementation="triton", interpret=True)


def test_tuning_covers_all_that_is_supported():
    empty = cases.history("turboquant_3", lengths=(1,), tokens=1, group=1, heads=1).k
    for dim in (16, 64, 96, 128, 256, 512):
        for bits in (1, 4, 8):
            part = Part(field="codes", width=dim, bits=bits, levels="affine", offset="offset")
            side = dataclasses.replace(empty, reading=Reading(parts=(part,)))
            numbers, rows = triton.tuning(side, side)
            assert numbers.tile_rows in (1, 2, 4, 8)
            assert rows in (32, 64)
        for pieces in (1, 2):
            tuned = triton.own_tuning(dim, pieces)
            assert tuned.rows % 16 == tuned.entries % 16 == 0
