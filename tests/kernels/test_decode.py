"""Decode over head-pages in XLA: against float64, hand-computed cases, exact properties."""

import dataclasses

import jax.numpy as jnp
import kernel_cases as cases
import kernel_oracle
import numpy as np
import pytest
from tolerances import TOL

from turboq.codecs.reading import Part, Reading
from turboq.numbers import packing
from turboq_kernels import decode as kernels
from turboq_kernels import merge
from turboq_kernels.decode import api, base

DIM = 32


def make(name="turboquant_3", **options):
    return cases.make(name, **{"dim": DIM} | options)


@pytest.mark.parametrize(
    ("name", "page"),
    [(name, (64, 256)[i % 2]) for i, name in enumerate(cases.READINGS)] + [("turboquant_3", 256)],
)
def test_matches_float64(name, page):
    """Every reading, on shuffled pages of 64 or contiguous ones of 256."""
    case = make(name, page=page, paged=page == 64, tokens=2, bias=name == "prod", sinks=2)
    cases.check(case, case.run())


def hand(k_codes, v_codes, q, *, levels="table", **options):
    """One sequence, one head, width 8, page 64; channel c of a token repeats its code."""
    part = Part(field="codes", width=8, bits=2, levels=levels)

    def side(codes):
        slots = np.zeros((1, 64, 8), np.uint8)
        slots[0, : len(codes)] = np.array(codes, np.uint8)[:, None]
        table = jnp.array([[-2.0, -1.0, 1.0, 3.0]]) if levels == "table" else None
        return kernels.Side(
            words=(jnp.asarray(cases.pack(slots, 2, 2)),), scales=(None,), offsets=(None,),
            tables=(table,), reading=Reading(parts=(part,)),
        )  # fmt: skip

    return kernels.decode(
        jnp.full((1, 1, 1, 8), q / 8, jnp.float32), side(k_codes), side(v_codes),
        kernels.contiguous_pages(1, 1, 1), jnp.zeros((1, 1), jnp.int32),
        jnp.full((1, 1), len(k_codes), jnp.int32), **options,
    )  # fmt: skip


def test_hand_computed():
    """Logits ln 3 * (1, -1) / 2 give weights 3/4 and 1/4 on the values 3 and -2."""
    half = float(np.log(3) / 2)
    got = hand([2, 1], [3, 0], half)
    out = np.asarray(got.acc / got.total[..., None])
    np.testing.assert_allclose(out, 0.75 * 3 + 0.25 * -2, rtol=TOL["decode_stored"])
    np.testing.assert_allclose(got.top, half, rtol=TOL["decode_stored"])
    np.testing.assert_allclose(got.total, 1 + 1 / 3, rtol=TOL["decode_stored"])
    # Codes as numbers: keys 2 and 1, values 3 and 0; a cap of 1 on logits 2 and 1.
    got = hand([2, 1], [3, 0], 1.0, levels="affine", softcap=1.0)
    p = 1 / (1 + np.exp(np.tanh(1.0) - np.tanh(2.0)))
    out = np.asarray(got.acc / got.total[..., None])
    np.testing.assert_allclose(out, 3 * p, rtol=TOL["decode_stored"])


def test_tiles_of_rows_are_the_rows(monkeypatch):
    """Rows with bounds of their own, the last tile incomplete; slots behind hold NaN."""
    monkeypatch.setattr(base, "TILE_ROWS", 4)
    for name, tokens in (("prod", 5), ("turboquant_3", 7)):
        case = make(name, page=64, lengths=(70, 130), group=2, tokens=tokens, bias=name == "prod")
        assert case.q.shape[2] > 8
        cases.check(case, case.run(block_tokens=64))


@pytest.mark.parametrize("page", [256, 64])
def test_lengths_around_a_block(page):
    """Empty, one token, and a block less, exactly, plus one; slots behind hold NaN."""
    lengths = (0, 1, page - 1, page, page + 1, 2 * page + 3)
    case = make("affine", page=page, lengths=lengths, heads=1, group=2, paged=True)
    want = case.oracle()
    cases.check(case, case.run(), want=want)
    cases.check(case, case.run(block_tokens=page), want=want)


@pytest.mark.parametrize("group", [1, 5, 16])
def test_any_number_of_query_heads_and_tokens(group):
    case = make(group=group, tokens=3, lengths=(70, 3), page=64)
    cases.check(case, case.run())


@pytest.mark.parametrize(
    "options", [{"window": 40}, {"softcap": 1.5}, {"sinks": 4, "window": 70, "softcap": 0.7}]
)
def test_window_softcap_sinks(options):
    case = make(page=64, lengths=(200, 65), tokens=2, **options)
    cases.check(case, case.run())


def test_blocks_need_not_divide_the_pages():
    """Five pages in blocks of two: the last block overlaps the one before it."""
    case = make(page=64, lengths=(300, 250), spare_pages=0)
    cases.check(case, case.run(block_tokens=128))


def test_permuting_pages_changes_no_bit():
    case = make("prod", page=64, paged=True, lengths=(200, 130))
    rng = np.random.default_rng(3)
    heads = case.q.shape[1]
    total = case.k.words[0].shape[0] // heads
    order = rng.permutation(total)
    inverse = np.argsort(order)  # page p moves to inverse[p]

    def moved(side):
        def pages(x):
            if x is None:
                return None
            return x.reshape(total, heads, *x.shape[1:])[order].reshape(x.shape)

        return dataclasses.replace(
            side,
            words=tuple(pages(x) for x in side.words),
            scales=tuple(pages(x) for x in side.scales),
        )

    table = jnp.asarray(inverse[np.asarray(case.pages.table)], jnp.int32)
    turned = case.replace(
        k=moved(case.k), v=moved(case.v), pages=dataclasses.replace(case.pages, table=table)
    )
    same(case.run(), turned.run())


def test_contiguous_and_paged_are_the_same():
    """The contiguous promise only replaces a gather by a slice."""
    case = make(page=64, lengths=(200, 130))
    gathered = case.replace(pages=dataclasses.replace(case.pages, contiguous=False))
    same(case.run(), gathered.run())


def test_unused_slots_never_leak():
    """NaN scales, garbage codes (NaN in e4m3) outside the visible slots change no bit."""
    for name in ("affine", "e4m3"):
        options = {"page": 64, "lengths": (70, 0, 64), "window": 30}
        clean, dirty = (make(name, dirty=d, **options) for d in (False, True))
        # Slots before the window are not seen either: everything there may be NaN.
        case = dirty.replace(k=poisoned(dirty.k), v=poisoned(dirty.v))
        same(clean.run(), case.run())


def poisoned(side):
    """NaN in the scales of the first 16 slots of every head-page 0 of its sequence."""
    rows = tuple(
        tuple(None if x is None else x.at[::3, :16].set(jnp.nan) for x in group)
        for group in (side.scales, side.offsets)
    )
    return dataclasses.replace(side, scales=rows[0], offsets=rows[1])


def same(a, b):
    for x, y in zip((a.acc, a.top, a.total), (b.acc, b.top, b.total), strict=True):
        np.testing.assert_array_equal(np.asarray(x), np.asarray(y))


def test_splits_change_only_rounding():
    case = make(page=64, lengths=(500, 0, 65, 1), heads=1)
    want = case.oracle()
    for splits in (2, 3, 8):
        cases.check(case, case.run(splits=splits, block_tokens=64), want=want)


@pytest.mark.parametrize("cut", [0, 1, 64, 99, 170])
def test_any_cut_of_the_sequence_merges(cut):
    """Two calls over [start, cut) and [cut, end), joined, are one call."""
    case = make("prod", page=64, lengths=(170, 40))
    middle = jnp.minimum(case.ends, cut)
    left, right = case.replace(ends=middle), case.replace(starts=jnp.maximum(middle, case.starts))
    cases.check(case, merge.merge(merge.stack([left.run(), right.run()])))


def test_merge_ignores_the_top_of_empty_parts():
    part = kernels.Partial(
        acc=jnp.ones((1, 1, 2, 4)), top=jnp.full((1, 1, 2), -3.0), total=jnp.full((1, 1, 2), 2.0)
    )
    empty = kernels.Partial(
        acc=jnp.zeros((1, 1, 2, 4)), top=jnp.full((1, 1, 2), 1e30), total=jnp.zeros((1, 1, 2))
    )
    same(merge.merge(merge.stack([part, empty])), part)
    nothing = merge.merge(merge.stack([empty, empty]))
    np.testing.assert_array_equal(np.asarray(nothing.acc), 0.0)
    np.testing.assert_array_equal(np.asarray(nothing.total), 0.0)


def test_exact_part_and_logit_sink():
    """Exact tokens against float64; a sink of logit z takes the share e^z / (e^z + rest)."""
    rng = np.random.default_rng(0)
    q, k, v = rng.standard_normal((3, 1, 2, 5, 8))
    seen = np.array([[[1, 1, 0, 1, 0]] * 5], bool)
    seen[0, 4] = False
    v[:, :, 2] = np.nan  # seen by nobody
    part = merge.exact(*(jnp.asarray(x, jnp.float32) for x in (q, k, v)), jnp.asarray(seen),
                       scale=0.5, softcap=None)  # fmt: skip
    weights = np.where(seen[:, None], np.exp(0.5 * np.einsum("bnmd,bnsd->bnms", q, k)), 0.0)
    out = np.einsum("bnms,bnsd->bnmd", weights, np.nan_to_num(v))
    total = weights.sum(-1)
    got = np.asarray(part.acc * jnp.exp(part.top)[..., None])[:, :, :4]
    np.testing.assert_allclose(got, out[:, :, :4], atol=TOL["decode_stored"])
    np.testing.assert_array_equal(np.asarray(part.total)[:, :, 4], 0.0)
    joined = merge.merge(merge.stack([part, merge.sink(jnp.full((2, 5), 0.7), 1, 8)]))
    share = np.asarray(joined.acc / joined.total[..., None])[:, :, :4]
    want = out[:, :, :4] / (total[:, :, :4] + np.exp(0.7))[..., None]
    np.testing.assert_allclose(share, want, atol=TOL["decode_stored"])
    np.testing.assert_array_equal(np.asarray(joined.acc)[:, :, 4], 0.0)


# Planted bugs: the checker must notice each. `base.decode` is called without jit, so that what is
# patched is what runs.


def caught(case, **options):
    """Whether the checker rejects what `base.decode` gives."""
    arguments = {"bias": None, "splits": None} | case.options | options
    partial = base.decode(case.q, case.k, case.v, case.pages, case.starts, case.ends, **arguments)
    try:
        cases.check(case, partial)
    except AssertionError:
        return True
    return False


def bug_case():
    return make(page=64, lengths=(130, 64), heads=1, group=2, dirty=False)


def test_without_a_bug_nothing_is_caught():
    assert not caught(bug_case(), block_tokens=64)


def test_wrong_shift_is_caught(monkeypatch):
    """Every bit read one position too high: the neighbouring token's code."""
    right = packing.unpack
    monkeypatch.setattr(base.packing, "unpack", lambda words: right(words >> jnp.uint32(1)))
    assert caught(bug_case())


def test_swapped_planes_are_caught(monkeypatch):
    right = packing.unpack
    monkeypatch.setattr(base.packing, "unpack", lambda w: right(w[..., ::-1, :, :]))
    assert caught(bug_case())


def test_missing_rescale_is_caught(monkeypatch):
    """Sums of earlier blocks not brought to the new maximum; of 8 rows some see it rise."""
    monkeypatch.setattr(base, "rescaled", lambda state, top: dataclasses.replace(state, top=top))
    assert caught(make(page=64, lengths=(130,), heads=1, group=8), block_tokens=64)


def test_missing_rescale_of_splits_is_caught(monkeypatch):
    monkeypatch.setattr(
        merge, "factors", lambda tops, totals: (jnp.ones_like(tops), jnp.max(tops, axis=0))
    )
    assert caught(bug_case(), splits=2, block_tokens=64)


@pytest.mark.parametrize("side", ["starts", "ends"])
@pytest.mark.parametrize("by", [-1, 1])
def test_off_by_one_length_is_caught(side, by):
    case = bug_case().replace(starts=jnp.full((2, 2), 3, jnp.int32))
    wrong = case.replace(**{side: getattr(case, side) + by})
    with pytest.raises(AssertionError):
        cases.check(case, wrong.run())


def test_wrong_head_stride_is_caught():
    case = make(page=64, paged=True, lengths=(130, 64))
    wrong = case.replace(pages=dataclasses.replace(case.pages, stride_page=1))
    with pytest.raises(AssertionError):
        cases.check(case, wrong.run())


def test_oracle_reads_the_documented_bit():
    """Token rows*j + r of a page is bit j of row r (a bit set by hand)."""
    words = np.zeros((3, 8, 4), np.uint32)
    words[1, 5, 2] = 1 << 7
    codes = kernel_oracle.code_at(words, 8 * 7 + 5)
    np.testing.assert_array_equal(codes, [0, 0, 2, 0])
    assert not kernel_oracle.code_at(words, 8 * 7 + 6).any()


# Dispatch.


def test_a_named_implementation_never_falls_back(monkeypatch):
    case = make(page=64, lengths=(3,))
    with pytest.raises(ValueError, match="implementation='cuda' must be"):
        case.run(implementation="cuda")
    with pytest.raises(ValueError, match="needs a named implementation"):
        case.run(interpret=True)
    monkeypatch.setattr(api, "unsupported", lambda name, *_: f"{name} is too new")
    with pytest.raises(ValueError, match="triton is too new; use 'xla' or None"):
        api.choose(case.q, case.k, case.v, case.pages, "triton")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: {"q": c.q[..., :-8]}, "coordinates"),
        (lambda c: {"v": make(page=256, lengths=(3,)).v}, "pages of K and V differ"),
        (lambda c: {"k": dataclasses.replace(c.k, tables=(None,))}, "needs a level table"),
        (lambda c: {"k": dataclasses.replace(c.k, words=(c.k.words[0][:, :2],))}, "words of"),
    ],
)
def test_refuses_what_does_not_fit(change, message):
    case = make(page=64, lengths=(3,))
    with pytest.raises(ValueError, match=message):
        case.replace(**change(case)).run()
