"""The TPU decode kernel in interpret mode: against float64, and watched for races and bounds."""

import dataclasses
import functools

import jax
import jax.numpy as jnp
import kernel_cases as cases
import numpy as np
import pytest
from jax.experimental.pallas import tpu as pltpu
from tolerances import TOL

from turboq.codecs.reading import Part, Reading
from turboq_kernels.decode import mosaic_tpu
from turboq_kernels.decode import mosaic_tpu_layout as layout
from turboq_kernels.decode import mosaic_tpu_planes as planes

# Parts of different widths: 64 + 128 coordinates meet 192, which are padded to 256.
WIDTHS = {
    "widths": ([(1 / 3, 1, "sign", 1, 0), (2 / 3, 2, "table", 0, 0)], [(1, 1, "affine", 1, 1)]),
}
# The interpreted kernel is one large program: without optimization it compiles much faster.
FAST = {"xla_backend_optimization_level": 0, "xla_llvm_disable_expensive_passes": True}


def run(case, interpret: bool | pltpu.InterpretParams = True, chunks=1, **options):
    named = {"bias": None, "softcap": None, "splits": None} | case.options | options
    decode = functools.partial(mosaic_tpu.decode, interpret=interpret, chunks=chunks, **named)
    assert mosaic_tpu.unsupported(case.q, case.k, case.v, case.pages) is None
    return jax.jit(decode, compiler_options=FAST)(
        case.q, case.k, case.v, case.pages, case.starts, case.ends
    )


@pytest.mark.parametrize(
    ("name", "made", "options"),
    [
        # Several steps, heads and splits; lengths 0, one step and one more; speculative tokens.
        (
            "turboquant_3",
            {"dim": 128, "lengths": (2900, 0, 1024, 1025), "paged": True, "tokens": 2, "sinks": 3},
            {"splits": 2},
        ),
        # Pages of 64 share rows of scales; logits capped; a window.
        (
            "turboquant_2",
            {"dim": 128, "page": 64, "paged": True, "softcap": 2.0, "window": 100, "heads": 3},
            {},
        ),
        ("widths", {"dim": 192, "heads": 1, "bias": True}, {}),
        # Chips without an integer matrix unit; floats; scales that are not float16.
        ("e4m3", {"dim": 128, "heads": 1, "scale_dtype": "bfloat16", "group": 9}, {"int8": False}),
        ("mixed", {"dim": 64, "heads": 1, "scale_dtype": "float32", "lengths": (290,)}, {}),
    ],
)
def test_matches_float64(name, made, options, monkeypatch):
    monkeypatch.setattr(cases, "READINGS", cases.READINGS | WIDTHS)
    case = cases.make(name, **made)
    cases.check(case, run(case, **options), tolerance="decode_mosaic")


def test_symmetric_tables_need_half_the_planes():
    """Parts that promise symmetry are read by four planes instead of seven."""
    case = cases.make("turboquant_3", dim=128, heads=1, lengths=(700,), paged=True, tokens=2)
    case = cases.symmetric(case)
    spec, _ = mosaic_tpu.specify(case.q, case.k, case.v, case.pages)
    assert [len(p.planes) for p in (*spec.k, *spec.v)] == [4, 4]
    cases.check(case, run(case), tolerance="decode_mosaic")


@pytest.mark.parametrize(
    ("name", "made"),
    [
        ("static_scale", {"heads": 1, "lengths": (1500, 10)}),
        # Scales that two heads share: three steps of one sequence.
        ("turboquant_2", {"heads": 2, "lengths": (2500,), "scale_dtype": "bfloat16"}),
    ],
)
def test_no_races_and_nothing_out_of_bounds(name, made, capfd, monkeypatch):
    """Copies as late as their waits allow, memory that starts as NaN, every access checked.

    Sequences of three steps in all: both buffers of each stage are used again.
    """
    tiles, room = mosaic_tpu.by_heads, mosaic_tpu._scale_buffer

    def words(buffer, heads):
        x = jax.lax.bitcast_convert_type(tiles(buffer, heads), jnp.uint16).astype(jnp.uint32)
        return x[:, ::2] | (x[:, 1::2] << 16)

    def of_words(form, pages):
        held = room(form, pages)
        if not form.heads:
            return held
        steps, count, heads, page = held.shape
        return pltpu.VMEM((steps, count, heads // 2, page), jnp.uint32)

    monkeypatch.setattr(mosaic_tpu, "by_heads", words)
    monkeypatch.setattr(mosaic_tpu, "_scale_buffer", of_words)
    case = cases.make(name, dim=128, group=1, paged=True, spare_pages=0, **made)
    watched = pltpu.InterpretParams(
        detect_races=True, out_of_bounds_reads="raise", dma_execution_mode="on_wait"
    )
    got = run(case, interpret=watched)
    cases.check(case, got, tolerance="decode_mosaic")
    assert "RACE DETECTED" not in "".join(capfd.readouterr())


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
@pytest.mark.parametrize("symmetric", [False, True])
def test_planes_are_the_table(bits, symmetric):
    """level(0) + sum of weights times parities is the table, and no smaller set would do."""
    table = np.sort(np.random.default_rng(bits).standard_normal(2**bits)).astype(np.float32)
    if symmetric:
        table = (table - table[::-1]) / 2
    part = Part(field="codes", width=8, bits=bits, levels="table")
    used = planes.subsets(part, symmetric)
    assert len(used) == (2 ** (bits - 1) if symmetric else 2**bits - 1)
    v, first = planes.weights(part, used, jnp.asarray(table)[None], 1)
    codes = np.arange(2**bits)
    parities = np.array([[bin(s & c).count("1") % 2 for s in used] for c in codes])
    got = np.asarray(first, np.float64) + parities @ np.asarray(v[0], np.float64)
    np.testing.assert_allclose(got, table, rtol=0, atol=TOL["plane_sums"])
    assert np.all(np.abs(np.asarray(v)) > TOL["plane_sums"])


@pytest.mark.parametrize("levels", ["affine", "sign", "int8"])
def test_planes_of_numbers(levels):
    bits = {"affine": 3, "sign": 1, "int8": 8}[levels]
    part = Part(field="codes", width=8, bits=bits, levels=levels)
    v, first = planes.weights(part, planes.subsets(part), None, 2)
    codes = np.arange(2**bits)
    got = np.asarray(first)[1] + ((codes[:, None] >> np.arange(bits)) & 1) @ np.asarray(v)[1]
    want = {
        "affine": codes,
        "sign": 2 * codes - 1,
        "int8": codes.astype(np.uint8).view(np.int8),
    }[levels]
    np.testing.assert_array_equal(got, want)


@pytest.mark.parametrize(
    ("rows", "fold", "chunks"), [(8, 1, 1), (8, 2, 2), (8, 8, 1), (2, 1, 2), (2, 2, 1)]
)
def test_lanes_cover_every_token_once(rows, fold, chunks):
    step = layout.Step(rows, fold, chunks)
    lane = np.arange(layout.LANES)
    found = [
        (step.page_of(lane) + c * step.chunk_pages) * step.page + step.slot_of(lane, h, j)
        for c, h in step.blocks
        for j in range(layout.GROUPS)
    ]
    np.testing.assert_array_equal(np.sort(np.concatenate(found)), np.arange(step.tokens))


def test_every_half_precision_scale():
    """All 65536 bit patterns, denormals included; what is not finite becomes a finite number."""
    bits = np.arange(2**16, dtype=np.uint16)
    got = np.asarray(
        layout.ScaleLayout("float16", 256).decode(jnp.asarray(bits, jnp.uint32), False)
    )
    want = bits.view(np.float16).astype(np.float32)
    finite = np.isfinite(want)
    np.testing.assert_array_equal(got[finite], want[finite])
    assert np.all(np.isfinite(got))


@pytest.mark.parametrize("heads", [2, 4, 8, 16, 24])
def test_tiles_of_shared_scales(heads):
    """Every head's row of every page, from tiles that lie as a pool's; each tile comes once."""
    pages, page = 4, 256
    assert layout.lies_by_heads("bfloat16", heads, page)
    form = layout.ScaleLayout("bfloat16", page, heads)
    numbers = np.arange(pages * heads * page, dtype=np.uint32).reshape(pages * heads, page)
    pool = jax.lax.bitcast_convert_type(jnp.asarray(numbers, jnp.uint16), jnp.bfloat16)
    tiles = np.asarray(layout.by_heads(pool, heads)).view(np.uint16).astype(np.uint32)
    words = tiles[:, ::2] | tiles[:, 1::2] << 16  # of a register: two rows of 16 bits
    assert heads * form.share(pages) >= len(tiles)
    for i in range(pages):
        for n in range(heads):
            row = words[form.tile_of(i, n), n % form.tile // 2][None]
            own = np.asarray(form.words_of(jnp.asarray(row), jnp.int32(n)))
            both = np.concatenate([own & 0xFFFF, own >> 16], axis=1)[0]
            np.testing.assert_array_equal(both, numbers[i * heads + n] & 0xFFFF)


@pytest.mark.parametrize(
    ("dtype", "heads", "page"), [("float32", 8, 256), ("float16", 3, 256), ("bfloat16", 8, 64)]
)
def test_other_scales_do_not_lie_so(dtype, heads, page):
    assert not layout.lies_by_heads(dtype, heads, page)


def test_what_it_cannot_do():
    case = cases.make("turboquant_2", heads=1, group=1, lengths=(3,))
    wide = jnp.zeros((1, 1, mosaic_tpu.MAX_ROWS + 1, 64))
    assert "query rows" in str(mosaic_tpu.unsupported(wide, case.k, case.v, case.pages))
    five = Part(field="codes", width=64, bits=5, levels="table")
    other = dataclasses.replace(case.k, reading=Reading(parts=(five,)))
    assert "5-bit table" in str(mosaic_tpu.unsupported(case.q, other, case.v, case.pages))
    many = jnp.zeros((1, 64, 128, 64))
    assert "bytes of VMEM" in str(mosaic_tpu.unsupported(many, case.k, case.v, case.pages))
