"""Inputs for the decode kernels: random stored sides of every reading, pages, lengths; a checker.

case = make("turboquant_3")                        # or make(name, dim=128, page=64, paged=True)
check(case, case.run(implementation="xla"))        # against the float64 oracle
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax.numpy as jnp
import kernel_oracle
import numpy as np
from tolerances import TOL

from turboq.codecs.reading import Part, Reading
from turboq_kernels import decode as kernels

# name -> (K parts, V parts) as (share of dim, bits, levels, scale?, offset?)
READINGS: dict[str, tuple[list, list]] = {
    "turboquant_3": ([(1, 3, "table", 1, 0)], [(1, 3, "table", 1, 0)]),
    "turboquant_2": ([(1, 2, "table", 1, 0)], [(1, 2, "table", 1, 0)]),
    "turboquant_4": ([(1, 4, "table", 1, 0)], [(1, 4, "table", 1, 0)]),
    "static_scale": ([(1, 3, "table", 0, 0)], [(1, 2, "table", 0, 0)]),
    "prod": ([(1, 2, "table", 1, 0), (1, 1, "sign", 1, 0)], [(1, 3, "table", 1, 0)]),
    "affine": ([(1, 3, "affine", 1, 1)], [(1, 2, "affine", 1, 1)]),
    "affine_4": ([(1, 4, "affine", 1, 1)], [(1, 4, "affine", 1, 1)]),
    "segments": (
        [(0.25, 4, "table", 1, 0), (0.5, 2, "table", 1, 0)],  # a quarter is not stored
        [(0.5, 3, "table", 1, 0), (0.5, 2, "table", 1, 0)],
    ),
    "int8": ([(1, 8, "int8", 1, 0)], [(1, 8, "int8", 1, 0)]),
    "e4m3": ([(1, 8, "e4m3", 1, 0)], [(1, 8, "e4m3", 0, 0)]),
    "mixed": ([(1, 8, "int8", 1, 0)], [(1, 3, "table", 1, 0)]),
}


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of `turboq_kernels.decode.decode`."""

    q: Any
    k: kernels.Side
    v: kernels.Side
    pages: kernels.Pages
    starts: Any
    ends: Any
    options: dict[str, Any]

    def run(self, **options):
        return kernels.decode(
            self.q, self.k, self.v, self.pages, self.starts, self.ends, **self.options | options
        )

    def oracle(self) -> kernel_oracle.Softmax:
        return kernel_oracle.decode(
            self.q, self.k, self.v, self.pages, self.starts, self.ends, **self.options
        )

    def replace(self, **changes) -> Case:
        return dataclasses.replace(self, **changes)


def make(
    name: str,
    *,
    dim: int = 64,
    page: int = 256,
    paged: bool = False,
    lengths: tuple[int, ...] = (300, 7),
    heads: int = 2,
    group: int = 3,
    tokens: int = 1,
    sinks: int = 0,
    window: int | None = None,
    softcap: float | None = None,
    bias: bool = False,
    scale_dtype: str = "float16",
    spare_pages: int = 1,
    dirty: bool = True,
    seed: int = 0,
) -> Case:
    """A random case: sequence b holds lengths[b] tokens, the last `tokens` being the queries' own.

    Every page table has `spare_pages` entries more than the longest sequence needs. With `dirty`
    the slots behind each length hold NaN scales and offsets and all-one codes, pages that no
    sequence owns included; `paged` shuffles the head-pages of a pool (contiguous otherwise).
    """
    rng = np.random.default_rng(seed)
    batch, rows = len(lengths), page // 32
    count = -(-max(max(lengths), 1) // page) + spare_pages
    if paged:
        total = batch * count + 2  # two pages nobody owns
        order = rng.permutation(total)[: batch * count].reshape(batch, count).astype(np.int32)
        pages, head_pages = kernels.pool_pages(jnp.asarray(order), heads), total * heads
    else:
        pages, head_pages = kernels.contiguous_pages(batch, heads, count), batch * heads * count
    valid = np.zeros((head_pages, page), bool)
    table = np.asarray(pages.table)
    for b, length in enumerate(lengths):
        for s in range(length):
            at = table[b, s // page] * pages.stride_page
            for n in range(heads):
                valid[at + n * pages.stride_head, s % page] = True
    k_parts, v_parts = (parts(p, dim) for p in READINGS[name])
    k, v = (side(rng, p, heads, valid, rows, scale_dtype, dirty) for p in (k_parts, v_parts))
    m = tokens * group
    q = rng.standard_normal((batch, heads, m, k.reading.width)).astype(np.float32)
    starts, ends = visible(lengths, tokens, group, sinks=sinks, window=window)
    options: dict[str, Any] = {"scale": float(dim**-0.5), "softcap": softcap}
    if bias:
        options["bias"] = jnp.asarray(rng.standard_normal((batch, heads, m)), jnp.float32)
    return Case(jnp.asarray(q), k, v, pages, starts, ends, options)


def symmetric(case: Case) -> Case:
    """The case with tables of level(~code) = -level(code), of which its parts know."""

    def changed(side):
        parts = tuple(
            dataclasses.replace(p, symmetric=p.levels == "table") for p in side.reading.parts
        )
        tables = tuple(None if t is None else (t - t[:, ::-1]) / 2 for t in side.tables)
        return dataclasses.replace(side, tables=tables, reading=Reading(parts=parts))

    return case.replace(k=changed(case.k), v=changed(case.v))


def visible(lengths, tokens: int, group: int, *, sinks: int = 0, window: int | None = None):
    """(starts, ends) int32 [B, tokens * group], token-major: row t * group + g is query token t."""
    ends = np.asarray(lengths)[:, None] - tokens + 1 + np.arange(tokens)[None, :]
    starts = np.full_like(ends, sinks)
    if window is not None:
        starts = np.maximum(starts, ends - window)
    starts, ends = (np.repeat(np.maximum(x, 0), group, axis=1) for x in (starts, ends))
    return jnp.asarray(starts, jnp.int32), jnp.asarray(ends, jnp.int32)


def parts(rows: list, dim: int) -> tuple[Part, ...]:
    return tuple(
        Part(
            field=f"codes{i}", width=int(dim * share), bits=bits, levels=levels,
            scale=f"scale{i}" if scale else None, offset=f"offset{i}" if offset else None,
        )
        for i, (share, bits, levels, scale, offset) in enumerate(rows)
    )  # fmt: skip


def side(rng, parts, heads, valid, rows, scale_dtype="float16", dirty=True) -> kernels.Side:
    """Random words, scales of order 1 / rms of the levels, ascending tables."""
    words, scales, offsets, tables = [], [], [], []
    total, page = valid.shape
    for part in parts:
        codes = rng.integers(0, 2**part.bits, (total, page, part.width)).astype(np.uint8)
        if part.levels in ("e4m3", "e5m2"):  # numbers of order one, of both signs
            codes = codes & np.uint8(0xBF)
            codes = np.where(codes & np.uint8(0x7F) > np.uint8(0x3C), codes & np.uint8(0x83), codes)
        if dirty:
            codes = np.where(valid[..., None], codes, np.uint8(2**part.bits - 1))
        words.append(jnp.asarray(pack(codes, part.bits, rows)))
        rms = {"affine": 2 ** (part.bits - 1), "int8": 74.0}.get(part.levels, 1.0)
        scales.append(
            _rows(rng.uniform(0.5, 1.5, valid.shape) / rms, valid, part.scale, scale_dtype, dirty)
        )
        offsets.append(
            _rows(rng.uniform(-1.5, 0.5, valid.shape), valid, part.offset, scale_dtype, dirty)
        )
        table = np.sort(rng.standard_normal((heads, 2**part.bits)), axis=1).astype(np.float32)
        tables.append(jnp.asarray(table) if part.levels == "table" else None)
    return kernels.Side(
        words=tuple(words), scales=tuple(scales), offsets=tuple(offsets), tables=tuple(tables),
        reading=Reading(parts=tuple(parts)),
    )  # fmt: skip


def _rows(values, valid, field, dtype, dirty):
    if field is None:
        return None
    return jnp.asarray(np.where(valid | (not dirty), values, np.nan), jnp.dtype(dtype))


def pack(codes: np.ndarray, bits: int, rows: int) -> np.ndarray:
    """uint8 [R, page, C] -> uint32 [R, bits, rows, C] from the layout's definition."""
    total, page, channels = codes.shape
    words = np.zeros((total, bits, rows, channels), np.uint32)
    for slot in range(page):
        j, r = divmod(slot, rows)
        for p in range(bits):
            bit = (codes[:, slot] >> np.uint8(p)) & np.uint8(1)
            words[:, p, r] |= bit.astype(np.uint32) << np.uint32(j)
    return words


def check(case: Case, partial, *, tolerance: str = "decode_stored", want=None) -> None:
    """Fails unless `partial` is the case's softmax: output, log-sum-exp, rows that see nothing.

    The tolerance bounds the error of the output relative to sum p |v|, and of the log-sum-exp
    absolutely.
    """
    want = want or case.oracle()
    total, top, acc = (np.asarray(x, np.float64) for x in (partial.total, partial.top, partial.acc))
    empty = np.isneginf(want.lse)
    assert np.all(np.isfinite(total)), "total is not finite"
    assert np.all(np.isfinite(acc)), "acc is not finite"
    assert not np.any(np.isnan(top)), "top is NaN"
    np.testing.assert_array_equal(total[empty], 0.0)
    np.testing.assert_array_equal(acc[empty], 0.0)
    assert np.all(total[~empty] > 0), "a row that sees tokens has no mass"
    lse = top[~empty] + np.log(total[~empty])
    np.testing.assert_allclose(lse, want.lse[~empty], rtol=0, atol=TOL[tolerance], err_msg="lse")
    out = acc[~empty] / total[~empty][..., None]
    error = np.abs(out - want.out[~empty]) / np.maximum(want.mean_abs[~empty], 1e-30)
    assert error.max(initial=0.0) <= TOL[tolerance], f"output error {error.max()} of sum p |v|"
