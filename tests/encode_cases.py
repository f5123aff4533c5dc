"""Inputs for the encode kernels: codecs with a `writing`, dirty pages, a float64 checker.

case = make_case("mse_3")              # or make_case(name, dim=128, page=64, paged=True, ...)
check(case, *case.run(mosaic_tpu.write, interpret=True))
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any

import jax.numpy as jnp
import numpy as np
from tolerances import TOL

from turboq.codecs import PerHead, TurboQuantMSE, TurboQuantProd
from turboq.codecs.base import Codec
from turboq.codecs.hadamard_per_head import HadamardPerHead
from turboq.codecs.rope_block import RopeBlock
from turboq.codecs.transform import Transform
from turboq.codecs.writing import WriteTables, Writing
from turboq.numbers import packing
from turboq_kernels.decode import types as reading
from turboq_kernels.encode import store
from turboq_kernels.encode.types import word_fields


def _segments(dim: int):
    return ((dim // 4, 4), (dim // 2, 2))  # a quarter is not stored


CODECS: dict[str, Callable[[int], Codec]] = {
    **{f"mse_{b}": lambda d, b=b: TurboQuantMSE(dim=d, bits=b) for b in (1, 2, 3, 4)},
    "mse_matched": lambda d: TurboQuantMSE(
        dim=d, bits=3, scale_rule="matched", scale_dtype="bfloat16"
    ),
    "mse_unbiased": lambda d: TurboQuantMSE(
        dim=d, bits=2, rotation="haar", scale_rule="unbiased", scale_dtype="float32"
    ),
    "mse_least_squares": lambda d: TurboQuantMSE(dim=d, bits=3, scale_rule="least_squares"),
    "prod_1": lambda d: TurboQuantProd(dim=d, bits=1),
    "prod_3": lambda d: TurboQuantProd(dim=d, bits=3),
    "prod_bfloat16": lambda d: TurboQuantProd(
        dim=d, bits=2, scale_rule="matched", scale_dtype="bfloat16", sketch="orthogonal"
    ),
    "prod_float32": lambda d: TurboQuantProd(dim=d, bits=4, scale_dtype="float32"),
    "per_head_vector": lambda d: PerHead(dim=d, bits=2),
    "per_head_head": lambda d: PerHead(dim=d, bits=3, scale="head"),
    "transform_none": lambda d: Transform(dim=d, segments=_segments(d)),
    "transform_code": lambda d: Transform(dim=d, segments=_segments(d), gain="code"),
    "transform_float16": lambda d: Transform(
        dim=d, segments=_segments(d), gain="float16", codebook="fitted"
    ),
    "transform_odd": lambda d: Transform(dim=d, segments=((24, 4), (16, 2), (8, 1)), gain="code"),
    "rope_block": lambda d: RopeBlock(dim=d, segments=_segments(d), gain="code"),
    "hadamard_vector": lambda d: HadamardPerHead(dim=d, bits=3),
    "hadamard_head": lambda d: HadamardPerHead(dim=d, bits=3, scale="head"),
}


def make(name: str, *, dim: int = 64, heads: int = 2, seed: int = 0) -> tuple[Codec, Any]:
    """A codec and random arrays [N, ...] of its heads."""
    codec = CODECS[name](dim)
    rng = np.random.default_rng(seed)
    arrays = {}
    for key, shape in codec.array_shapes.items():
        a = rng.standard_normal((heads, *shape))
        if key.startswith("codebook"):
            a = np.sort(a, axis=-1)
        elif key in ("scale", "gains"):
            a = np.sort(np.abs(a) + 0.3, axis=-1)
        elif key == "analysis":
            a = a * dim**-0.5
        elif key == "signs":
            a = np.sign(a)
        elif key in ("order", "place"):
            a = np.stack([rng.permutation(shape[0]) for _ in range(heads)])
        arrays[key] = jnp.asarray(a, jnp.float32)
    return codec, arrays


@dataclasses.dataclass(frozen=True)
class Case:
    """Arguments of `turboq_kernels.encode.types.Write`."""

    codec: Codec
    arrays: Any
    x: Any  # [B, N, T, D]
    tables: WriteTables
    words: tuple[Any, ...]
    pages: reading.Pages
    starts: Any
    counts: Any

    @property
    def writing(self) -> Writing:
        assert self.codec.writing is not None
        return self.codec.writing

    @property
    def page(self) -> int:
        return self.words[0].shape[-2] * packing.WORD_BITS

    @property
    def valid(self) -> np.ndarray:
        """bool [B, T]: tokens that are not padding."""
        return np.arange(self.x.shape[2])[None, :] < np.asarray(self.counts)[:, None]

    def run(self, write, **options):
        return write(
            self.x, self.writing, self.tables, self.words, self.pages, self.starts, self.counts,
            **options,
        )  # fmt: skip

    def replace(self, **changes) -> Case:
        return dataclasses.replace(self, **changes)

    def codes(self, words) -> list[np.ndarray]:
        """uint8 [B, N, T, w] of every field of words, where this case's tokens lie."""
        at = _slots(self)
        return [unpacked(w)[at] for w in words]


def make_case(
    name: str,
    *,
    dim: int = 64,
    heads: int = 2,
    page: int = 256,
    paged: bool = False,
    tokens: int = 5,
    starts: tuple[int, ...] = (0, 254),
    counts: tuple[int, ...] | None = None,
    spare_pages: int = 1,
    dtype: str = "float32",
    clean: bool = False,
    seed: int = 0,
) -> Case:
    """A random case; padding tokens hold NaN and all words random bits (zero if `clean`).

    Table entries of pages that a sequence does not need are 0, whoever owns that page.
    """
    codec, arrays = make(name, dim=dim, heads=heads, seed=seed)
    assert codec.writing is not None
    rng = np.random.default_rng(seed + 1)
    batch = len(starts)
    counts = (tokens,) * batch if counts is None else counts
    needed = [-(-(s + n) // page) for s, n in zip(starts, counts, strict=True)]
    width = max(max(needed), 1) + spare_pages
    if paged:
        total = sum(needed) + 2  # two pages nobody owns
        order = iter(rng.permutation(total).tolist())
        table = np.zeros((batch, width), np.int32)
        for b, n in enumerate(needed):
            table[b, :n] = [next(order) for _ in range(n)]
        pages, head_pages = reading.pool_pages(jnp.asarray(table), heads), total * heads
    else:
        pages = reading.contiguous_pages(batch, heads, width)
        head_pages = batch * heads * width
    x = rng.standard_normal((batch, heads, tokens, dim)) * rng.lognormal(size=(batch, heads, 1, 1))
    padding = np.arange(tokens)[None, :] >= np.asarray(counts)[:, None]
    x = np.where(padding[:, None, :, None], np.nan, x)
    bits = {f.name: (f.bits, f.width) for f in codec.fields}
    words = []
    for field in word_fields(codec.writing):
        b, w = bits[field]
        held = rng.integers(0, 2**32, (head_pages, b, page // packing.WORD_BITS, w), np.uint32)
        words.append(jnp.asarray(np.zeros_like(held) if clean else held))
    return Case(
        codec=codec, arrays=arrays, x=jnp.asarray(x, jnp.dtype(dtype)),
        tables=store.tables_of(codec, arrays, heads), words=tuple(words), pages=pages,
        starts=jnp.asarray(starts, jnp.int32), counts=jnp.asarray(counts, jnp.int32),
    )  # fmt: skip


def unpacked(words) -> np.ndarray:
    """uint8 [R, page, w] of [R, bits, rows, w]."""
    words = np.asarray(words)
    codes = packing.unpack_host(words[:, None])  # a page at a time
    assert codes.shape[1] == words.shape[-2] * packing.WORD_BITS
    return codes


def _slots(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """Head-page and slot of every token, [B, N, T] (padding: those of the last entry)."""
    table = np.asarray(case.pages.table)
    at = np.asarray(case.starts)[:, None] + np.arange(case.x.shape[2])[None, :]
    entry = np.minimum(at // case.page, table.shape[1] - 1)
    first = np.take_along_axis(table, entry, axis=1) * case.pages.stride_page
    heads = np.arange(case.x.shape[1])[None, :, None] * case.pages.stride_head
    slot = np.broadcast_to((at % case.page)[:, None], (*case.x.shape[:3],))
    return first[:, None] + heads, slot


def check(case: Case, words, rows) -> None:
    """Fails unless words and rows are what `case.x` encodes to, and all else is untouched."""
    touched, kept = _untouched(case)
    for name, old, new in zip(word_fields(case.writing), case.words, words, strict=True):
        assert new.shape == old.shape
        assert new.dtype == old.dtype
        old, new = np.asarray(old), np.asarray(new)
        np.testing.assert_array_equal(new[~touched], old[~touched], f"{name}: pages of others")
        np.testing.assert_array_equal(unpacked(new)[kept], unpacked(old)[kept], f"{name}: earlier")
    check_codes(
        case.writing, case.tables, case.x, case.codes(words), rows, valid=case.valid[:, None]
    )


def _untouched(case: Case) -> tuple[np.ndarray, np.ndarray]:
    """bool [R]: head-pages that tokens touch; [R, page]: slots below the tokens in them."""
    total = case.words[0].shape[0]
    touched, kept = np.zeros(total, bool), np.zeros((total, case.page), bool)
    where, slot = _slots(case)
    for (b, n, t), at in np.ndenumerate(where):
        if case.valid[b, t]:
            touched[at] = True
            if t == 0:
                kept[at, : slot[b, n, t]] = True
    return touched, kept


def check_codes(writing: Writing, tables: WriteTables, x, codes, rows, *, valid=None) -> None:
    """Codes and row numbers of x [B, N, T, D] against float64.

    A code may be that of any number within the rounding error of u, a row number within that and
    half a unit of the type it is stored in. What follows from a rounded choice (scale from codes,
    signs from scale) is computed from the choice that was made.

    Args:
      valid: bool, broadcast to [B, N, T]: the tokens to look at.
    """
    x, t = np.asarray(x, np.float64), _float64(tables)
    valid = np.ones(x.shape[:3], bool) if valid is None else np.broadcast_to(valid, x.shape[:3])
    assert all(r.shape == x.shape[:3] for r in rows), "rows"
    kinds = zip(writing.rows, rows, strict=True)
    given = {k: np.asarray(r, np.float64)[valid] for k, r in kinds}
    codes = [np.asarray(c)[valid] for c in codes]
    head = np.broadcast_to(np.arange(x.shape[1])[None, :, None], x.shape[:3])[valid]
    x, eps = x[valid], TOL["encode_f32"]
    mean, matrix = t.mean[head], t.matrix[head]
    size = np.linalg.norm(x, axis=-1) + np.linalg.norm(mean, axis=-1)
    y = np.einsum("kcd,kd->kc", matrix, x - mean)
    off = eps * np.linalg.norm(matrix, axis=-1) * size[:, None]
    rms, rms_off = np.sqrt(np.mean(y * y, -1)), np.sqrt(np.mean(off * off, -1))
    gain = np.ones(len(y))
    if writing.gain == "rms":
        gain = rms
    elif writing.gain == "code":
        assert writing.scale is not None
        gains, index = t.gains[head], given[writing.scale]
        edges = np.sqrt(gains[:, 1:] * gains[:, :-1])
        _between(index, edges, rms[:, None], rms_off[:, None] + eps * rms[:, None], "gain")
        gain = np.take_along_axis(gains, index.astype(int)[:, None], axis=1)[:, 0]
    safe = np.where(gain == 0, 1.0, gain)[:, None]
    u = y / safe
    off = off / safe + eps * np.abs(u)
    values = np.zeros((len(u), 0))
    for i, (run, start) in enumerate(zip(writing.parts, writing.starts, strict=True)):
        levels, here = t.levels[i][head], np.s_[:, start : start + run.width]
        middles = 0.5 * (levels[:, 1:] + levels[:, :-1])
        near = u[here][..., None], off[here][..., None]
        unclear = _between(codes[i], middles[:, None], *near, f"part {i}")
        assert unclear <= TOL["unclear_share"], f"part {i}: {unclear=}"
        values = np.concatenate([values, np.take_along_axis(levels, codes[i].astype(int), 1)], 1)
    error = np.linalg.norm(off, axis=-1)  # of u and of everything made of it
    ratio = np.zeros(len(u))
    if writing.parts and writing.gain == "rms":
        assert writing.scale is not None
        scale, relative = given[writing.scale], 4 * error / np.sqrt(u.shape[-1]) + 8 * eps
        _near(scale, _scale(writing.rule, u, values, gain), relative, writing.dtype, "scale")
        ratio = _rounded(scale, writing.dtype) / safe[:, 0]
    if writing.signs is not None:
        moved = ratio[:, None] * values if writing.parts else np.zeros_like(u)
        residual, off = u - moved, off + 4 * eps * np.abs(moved)
        sketch = t.sketch[head]
        s = np.einsum("kcd,kd->kc", sketch, residual)
        norm = np.linalg.norm(residual, axis=-1)
        off_s = np.einsum("kcd,kd->kc", np.abs(sketch), off)
        off_s = off_s + eps * np.linalg.norm(sketch, axis=-1) * norm[:, None]
        assert np.all(np.where(s > off_s, codes[-1] == 1, True)), "signs"
        assert np.all(np.where(s < -off_s, codes[-1] == 0, True)), "signs"
        assert np.mean(np.abs(s) <= off_s) <= TOL["unclear_share"] or np.any(norm == 0)
        assert writing.gamma is not None
        want = norm * gain * x.shape[-1] ** -0.5
        off = np.linalg.norm(off, axis=-1) / np.where(norm == 0, 1, norm) + 8 * eps
        _near(given[writing.gamma], want, off, writing.dtype, "gamma")


def _between(codes, middles, u, off, what) -> float:
    """Codes are the number of middles below u, give or take `off`; the share that is not clear."""
    low, high = np.sum(middles < u - off, axis=-1), np.sum(middles < u + off, axis=-1)
    wrong = (codes < low) | (codes > high)
    assert not np.any(wrong), f"{what}: {np.mean(wrong)} of the codes are wrong"
    return float(np.mean(low != high))


def _near(got, want, relative, dtype: str, what: str) -> None:
    info = jnp.finfo(dtype)
    exponent = np.floor(np.log2(np.maximum(np.abs(want), float(info.smallest_subnormal))))
    unit = np.maximum(float(info.eps) * 2.0**exponent, float(info.smallest_subnormal))
    bound = relative * np.abs(want) + 0.5 * unit
    over = np.abs(want) + bound > float(info.max)
    error = np.where(over & np.isinf(got), 0.0, np.abs(got - want))
    assert np.all(error <= bound), f"{what}: {np.max(error / bound)} times what rounding explains"


def _scale(rule: str, u, c, gain):
    uu, uc, cc = (np.sum(a * b, axis=-1) for a, b in ((u, u), (u, c), (c, c)))
    with np.errstate(divide="ignore", invalid="ignore"):
        factor = {
            "raw": np.ones_like(uu),
            "matched": np.sqrt(uu / cc),
            "unbiased": np.where(uc > 0, uu / uc, 0.0),
            "least_squares": np.where(cc > 0, uc / cc, 0.0),
        }[rule]
    return gain * factor


def _rounded(x: np.ndarray, dtype: str) -> np.ndarray:
    return np.asarray(x.astype(np.float32).astype(jnp.dtype(dtype)), np.float64)


def _float64(tables: WriteTables) -> WriteTables:
    def wide(x):
        return None if x is None else np.asarray(x, np.float64)

    return WriteTables(
        matrix=wide(tables.matrix), mean=wide(tables.mean), gains=wide(tables.gains),
        levels=tuple(wide(x) for x in tables.levels), sketch=wide(tables.sketch),
    )  # fmt: skip
