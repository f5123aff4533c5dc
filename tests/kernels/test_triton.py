"""The Pallas-Triton decode kernel in interpret mode: against float64, and its unpacking alone."""

import dataclasses
import importlib.util
import itertools
import sys

import jax.numpy as jnp
import kernel_cases as cases
import ml_dtypes
import numpy as np
import pytest
from triton_cases import SMALL, make, run

from turboq.codecs.reading import Part, Reading
from turboq_kernels.decode import triton
from turboq_kernels.decode import triton_unpack as unpacking
from turboq_kernels.target import Target


@pytest.mark.parametrize(
    ("name", "options"),
    [
        ("turboquant_4", {"page": 64, "paged": True, "tokens": 2, "sinks": 3, "window": 90}),
        ("prod", {"softcap": 1.3, "bias": True, "lengths": (40, 130)}),
        ("segments", {"dim": 64, "lengths": (70, 64), "page": 64}),
        ("mixed", {"tokens": 2, "heads": 2, "scale_dtype": "float32"}),
    ],
)
def test_matches_float64(name, options):
    case = make(name, **options)
    cases.check(case, run(case), tolerance="decode_triton")


def test_lengths_and_splits():
    """Lengths around a page and a tile of 2 pages; 3 splits of 5 tiles, some of them empty."""
    case = make("affine", page=64, group=2, paged=True, lengths=(0, 1, 63, 64, 65, 128, 129, 600))
    tuned = dataclasses.replace(SMALL, tile_rows=4)
    cases.check(case, run(case, tuned=tuned, splits=3), tolerance="decode_triton")


def test_many_query_rows():
    """Above 16 rows queries and probabilities are one bfloat16 each."""
    case = make("turboquant_2", page=64, group=7, tokens=3, lengths=(70, 30))
    cases.check(case, run(case), tolerance="decode_bfloat16")


@pytest.mark.parametrize("bits", [1, 2, 3, 4])
def test_lookup_words(bits):
    rng = np.random.default_rng(bits)
    codes = rng.integers(0, 2**bits, (32, 5)).astype(np.uint32)
    table = rng.standard_normal((1, 2**bits)).astype(ml_dtypes.bfloat16)
    registers = unpacking.byte_tables([jnp.full(5, x, jnp.float32) for x in table[0]])
    for together in (False, True):
        words = unpacking.lookup_words(planes(codes, bits), registers, False, together=together)
        np.testing.assert_array_equal(levels(words), table[0][codes])


def test_every_byte_is_its_number():
    """All 256 codes, as integers and as 8-bit floats against ml_dtypes."""
    codes = np.arange(256, dtype=np.uint32).reshape(32, 8)
    words = unpacking.byte_words(planes(codes, 8), asm=False)
    found = levels(unpacking.integer_words(words, False, asm=False))
    np.testing.assert_array_equal(found.astype(np.float32), codes)
    found = levels(unpacking.integer_words(words, True, asm=False))
    np.testing.assert_array_equal(found.astype(np.float32), codes.astype(np.uint8).view(np.int8))
    for dtype in (ml_dtypes.float8_e4m3fn, ml_dtypes.float8_e5m2):
        e4m3 = dtype is ml_dtypes.float8_e4m3fn
        found = levels(unpacking.float_words(words, e4m3, asm=False)).astype(np.float32)
        want = codes.astype(np.uint8).view(dtype).astype(np.float32)
        numbers = np.isfinite(want)
        np.testing.assert_array_equal(found[numbers], want[numbers])
        assert np.all(np.isfinite(found))


def test_five_bits_need_three_zero_planes():
    codes = np.random.default_rng(5).integers(0, 32, (32, 4)).astype(np.uint32)
    words = unpacking.byte_words(planes(codes, 5), asm=False)
    found = levels(unpacking.integer_words(words, False, asm=False))
    np.testing.assert_array_equal(found.astype(np.float32), codes)


def test_join_counts_up():
    arrays = [jnp.full((2, 3), i) for i in range(16)]
    joined = triton.join(arrays).reshape(2, 3, 16)
    np.testing.assert_array_equal(joined, jnp.stack(arrays, axis=-1))


def planes(codes, bits):
    """Words of 32 codes each: bit p of code j is bit j of plane p."""
    shifts = np.arange(32, dtype=np.uint32)[:, None]
    return [
        jnp.asarray((((codes >> p) & 1) << shifts).sum(axis=0, dtype=np.uint32))
        for p in range(bits)
    ]


def levels(words):
    """16 words of 2 bfloat16 -> [32, ...] by bit j."""
    pairs = np.stack([np.asarray(w) for w in words])
    halves = np.stack([pairs & 0xFFFF, pairs >> 16], axis=1).astype(np.uint16)
    fields = halves.reshape(32, *pairs.shape[1:]).view(ml_dtypes.bfloat16)
    out = np.empty_like(fields)
    out[np.asarray(unpacking.bit_of_field(jnp.arange(32)))] = fields
    return out


def test_refuses_what_it_cannot_do():
    case = make("turboquant_3", dim=24)
    with pytest.raises(ValueError, match="24 coordinates of 'codes0' are no multiple of 16"):
        case.run(implementation="triton", interpret=True)
    case = make("turboquant_3", group=65, lengths=(5,))
    with pytest.raises(ValueError, match="65 query rows"):
        case.run(implementation="triton", interpret=True)
    part = dataclasses.replace(case.k.reading.parts[0], bits=5)
    wide = dataclasses.replace(case.k, reading=dataclasses.replace(case.k.reading, parts=(part,)))
    assert "5 bits" in str(triton.unsupported(case.q[:, :, :8], wide, case.v, case.pages))


def test_says_so_where_jax_has_no_triton(monkeypatch):
    monkeypatch.delattr("jax.experimental.pallas.triton")
    monkeypatch.setitem(sys.modules, "jax.experimental.pallas.triton", None)
    path = triton.__file__
    assert path is not None
    spec = importlib.util.spec_from_file_location("triton_again", path)
    assert spec is not None
    assert spec.loader is not None
    with pytest.raises(ImportError, match=r"no Pallas-Triton backend .* implementation='xla'"):
        spec.loader.exec_module(importlib.util.module_from_spec(spec))


def test_tuning_covers_all_that_is_supported():
    empty = cases.make("affine", lengths=(1,), heads=1).k
    for dim, bits, rows in itertools.product((16, 64, 96, 128, 256, 512), (1, 4, 8), (8, 16, 64)):
        part = Part(field="codes", width=dim, bits=bits, levels="affine", offset="offset")
        side = dataclasses.replace(empty, reading=Reading(parts=(part,)))
        assert triton.tuning(side, side, rows).tile_rows in (1, 2, 4, 8)


@pytest.mark.parametrize(
    ("capability", "refused"), [((8, 9), True), ((9, 0), False), (None, False)]
)
def test_bytes_as_floats_need_sm_90(monkeypatch, capability, refused):
    """int8 and e4m3 become floats by packed additions of bfloat16, which older GPUs do not have."""
    gpu = Target(ptx=True, processors=108, capability=capability)
    monkeypatch.setattr(triton, "target", lambda: gpu)
    case = cases.make("affine", lengths=(1,), heads=1)
    for levels in ("int8", "e4m3"):
        part = Part(field="codes", width=32, bits=8, levels=levels)
        side = dataclasses.replace(case.k, reading=Reading(parts=(part,)))
        reason = triton.unsupported_sides(side, case.v)
        assert (reason is not None) == refused
        assert reason is None or "sm_89" in reason
    assert triton.unsupported_sides(case.k, case.v) is None
