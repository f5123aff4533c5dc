"""The C reader of pages, compiled by the system's compiler, on pages that the cache has written."""

import ctypes
import importlib.resources
import os
import shutil
import subprocess

import jax.numpy as jnp
import numpy as np
import pytest
from tolerances import TOL

from turboq.cache import columns, model_cache
from turboq.cache.layer import TokenPolicy, uniform_layer
from turboq.codecs.observed import Observed
from turboq.codecs.transform import Transform
from turboq.export import ENGINES, Options
from turboq.numbers import packing

WORDS, FLOATS, NUMBERS = (np.ctypeslib.ndpointer(t, flags="C") for t in ("u4", "f4", "i4"))
DIM, HEADS, TOKENS = 24, 2, 300  # a page and a part of one


class Some(ctypes.Structure):
    """`turboq_columns`."""

    _fields_ = (
        ("lanes", ctypes.c_uint32), ("count", ctypes.c_uint32), ("lane", ctypes.c_void_p),
    )  # fmt: skip


@pytest.fixture(scope="module")
def reader(tmp_path_factory):
    compiler = shutil.which(os.environ.get("CC", "cc"))
    if compiler is None:
        pytest.skip("no C compiler: set CC")
    out = tmp_path_factory.mktemp("c") / "turboq_page.so"
    source = importlib.resources.files("turboq.export") / "c" / "turboq_page.c"
    strict = ["-std=c99", "-Wall", "-Wextra", "-Wpedantic", "-Wconversion", "-Werror"]
    shared = ["-shared", "-fPIC", "-o", str(out)]
    subprocess.run([compiler, *strict, *shared, str(source), "-lm"], check=True)
    found = ctypes.CDLL(str(out))
    u32 = ctypes.c_uint32
    found.turboq_entries.argtypes = [WORDS, Some, NUMBERS, NUMBERS, u32, WORDS]
    found.turboq_dots.argtypes = [WORDS, Some, FLOATS, FLOATS]
    found.turboq_sums.argtypes = [WORDS, Some, FLOATS, FLOATS]
    codes = np.ctypeslib.ndpointer("u1", flags="C")
    found.turboq_codes.argtypes = [WORDS, u32, u32, u32, codes]
    found.turboq_half.argtypes, found.turboq_half.restype = [u32], ctypes.c_float
    return found


@pytest.fixture(scope="module")
def written():
    """(codec, arrays of all heads, what is stored, form of the layer, words of both pages)."""
    rng = np.random.default_rng(5)
    codec = Transform(
        dim=DIM, segments=((8, 4), (8, 2)), quantizer="window", states=16, gain="float16"
    )
    x = rng.normal(0.3, 0.9 ** np.arange(DIM), (HEADS, TOKENS, DIM)).astype(np.float32)
    arrays = {name: jnp.asarray(a) for name, a in codec.fit(Observed.of(x)).items()}
    layer = uniform_layer(
        kv_heads=HEADS, k=codec, v=codec, k_arrays=arrays, v_arrays=arrays, policy=TokenPolicy()
    )
    form = model_cache.forms([layer])
    assert form is not None
    (state,), (words,) = model_cache.init(form, batch=1, capacity=TOKENS)
    tokens = jnp.asarray(x.transpose(1, 0, 2)[None])
    state, words, _ = model_cache.write(state, words, tokens, tokens)
    stored = [
        codec.encode({n: a[h] for n, a in arrays.items()}, jnp.asarray(x[h])) for h in range(HEADS)
    ]
    return codec, arrays, stored, state.form, np.asarray(words[0])


def columns_of(laid: columns.Columns, h: int, words, *, codes: bool = False):
    """(lane, entry, plane) of one head, int32, and `turboq_columns`; `codes`: without its gain."""
    lane, entry, plane = (np.asarray(a)[h] for a in (laid.lane, laid.entry, laid.plane))
    keep = (plane != columns.NONE) & ((entry < DIM) | (not codes))
    arrays = tuple(np.ascontiguousarray(a[keep].astype("i4")) for a in (lane, entry, plane))
    return arrays, Some(words.shape[-1], int(keep.sum()), arrays[0].ctypes.data)


@pytest.mark.parametrize(("side", "h"), [("k", 0), ("k", 1), ("v", 1)])
def test_entries_of_a_page_are_what_was_stored(reader, written, side, h):
    codec, _, stored, form, words = written
    (_lane, entry, plane), some = columns_of(getattr(form, side), h, words)
    count = DIM + 1
    got = np.empty((len(words), 256, count), "u4")
    for page, out in zip(words, got, strict=True):
        reader.turboq_entries(np.ascontiguousarray(page), some, entry, plane, count, out)
    got = got.reshape(-1, count)
    codes = np.concatenate([np.asarray(stored[h][f"codes{i}"]) for i in range(2)], axis=1)
    np.testing.assert_array_equal(got[:TOKENS, : codec.coded], codes)
    assert not got[TOKENS:].any()
    gains = np.array([reader.turboq_half(int(bits)) for bits in got[:TOKENS, DIM]], np.float32)
    np.testing.assert_array_equal(gains, np.asarray(stored[h]["gain"], np.float32)[:, 0])


def test_attention_needs_only_the_bits(reader, written):
    """Keys and values of a linear code, from words, the matrix and gains; against `decode`."""
    codec, arrays, stored, form, words = written
    one = {name: a[1] for name, a in arrays.items()}
    bits = codec.bit_form(one)
    assert bits is not None
    (part,) = bits.parts
    (_lane, entry, plane), keys = columns_of(form.k, 1, words, codes=True)
    bit_of = np.cumsum([0, *np.repeat(part.bits, [w for w, _ in codec.segments])])
    matrix = np.asarray(part.matrix)[:, bit_of[entry] + plane]  # in column order
    x_hat = np.asarray(codec.decode(one, {n: a[:256] for n, a in stored[1].items()}))
    gain = np.asarray(stored[1]["gain"], np.float32)[:256, 0]
    page = np.ascontiguousarray(words[0])
    rng = np.random.default_rng(6)

    q = rng.normal(size=DIM).astype(np.float32)
    dots = np.empty(256, "f4")
    reader.turboq_dots(page, keys, np.ascontiguousarray(matrix.T @ q), dots)
    logits = gain * (dots + q @ np.asarray(part.constant)) + q @ np.asarray(bits.mean)
    np.testing.assert_allclose(logits, x_hat @ q, rtol=0, atol=TOL["product_f32"] * 64)

    p = rng.dirichlet(np.ones(256)).astype(np.float32)
    (_lane, entry, plane), values = columns_of(form.v, 1, words, codes=True)
    matrix = np.asarray(part.matrix)[:, bit_of[entry] + plane]
    sums = np.zeros(len(entry), "f4")
    reader.turboq_sums(page, values, p * gain, sums)
    out = matrix @ sums + np.asarray(part.constant) * (p @ gain) + np.asarray(bits.mean)
    np.testing.assert_allclose(out, p @ x_hat, rtol=0, atol=TOL["product_f32"] * 64)


@pytest.mark.parametrize("rows", [8, 2])
@pytest.mark.parametrize("bits", [1, 3, 8])
def test_pages_of_planes(reader, rng, bits, rows):
    codes = rng.integers(0, 2**bits, (32 * rows, 24)).astype(np.uint8)
    words = np.asarray(packing.pack(jnp.asarray(codes), bits, rows))[0]
    got = np.empty_like(codes)
    reader.turboq_codes(np.ascontiguousarray(words), bits, rows, 24, got)
    np.testing.assert_array_equal(got, codes)


def test_halves_are_ieee(reader):
    every = np.arange(1 << 16, dtype=np.uint16)
    got = np.array([reader.turboq_half(int(bits)) for bits in every], np.float32)
    np.testing.assert_array_equal(got, every.view(np.float16).astype(np.float32))


def test_the_reader_s_export_has_it():
    from plan_cases import plain

    files = ENGINES["reader"].project(*plain(), Options()).files
    assert {"turboq_page.h", "turboq_page.c", "read_plan.py", "page.npz"} == {*files}
