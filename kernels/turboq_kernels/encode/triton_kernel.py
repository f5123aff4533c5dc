"""Body of the Triton encode kernel: up to 32 tokens of one word row, from x to words.

    y [N, C] = (x - mean) A.T      N columns: the row's tokens from its first one on, then padding
    gain, u, codes, scale          as in `turboq.codecs.writing`, by the same functions
    word = sum_n bit_p(code_n) << (first bit + n)

Sizes of products are powers of two: channels beyond C and D are masked, their levels are zero.
With a sketch a program leaves its residuals in global memory (they stay in the GPU's cache) and
reads them back in blocks, as it does x: the product with S then needs no more registers than that
with A.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float

from turboq.codecs.writing import Writing
from turboq.numbers import scale as scales
from turboq.numbers.packing import WORD_BITS
from turboq_kernels.encode import triton_steps as steps
from turboq_kernels.encode.types import word_fields
from turboq_kernels.triton_memory import load, store

MIN_SIDE = 16  # the smallest side of a product


@dataclasses.dataclass(frozen=True, kw_only=True)
class Plan:
    """What is static."""

    writing: Writing
    strides: tuple[int, int]
    rows: int  # word rows per page
    dim: int  # D
    coded: int  # C
    channels: int  # C, padded
    columns: int  # N
    single: bool  # one program per token, or per word row
    block: int  # coordinates per step of a product
    interpret: bool
    # Of every number: whether it goes where it is kept, [head-page, slot], or to [B, N, T].
    in_place: tuple[bool, ...] = ()


@dataclasses.dataclass(frozen=True)
class Row:
    """A program's tokens: column n is token tokens[n] and goes to bit first + n of its word row."""

    program: tuple[Any, Any, Any]
    at: tuple[Any, Any]  # head-page and row
    first: Array  # the bits below are those of older tokens
    mask: Array  # bit n: column n is real
    real: Array  # [N], likewise
    tokens: Array  # [N], 0 where not real


def kernel(*refs, plan: Plan, tree) -> None:
    """One program of the grid (row or token, head, sequence)."""
    inputs = jax.tree.unflatten(tree, refs[: tree.num_leaves])
    fields = len(word_fields(plan.writing))
    outs = refs[tree.num_leaves + fields :]  # the old words are read where the new ones go
    words, numbers = outs[:fields], outs[fields:]
    i, _head, b = program = (pl.program_id(0), pl.program_id(1), pl.program_id(2))
    start, count = inputs["starts"][b], inputs["counts"][b]
    rows, size = plan.rows, plan.rows * WORD_BITS
    if plan.single:
        page, slot = (start + i) // size, (start + i) % size
        row, first = slot % rows, slot // rows
    else:
        page, row = start // size + i // rows, i % rows
        below = jnp.maximum(start - page * size - row, 0)
        first = (below + rows - 1) // rows  # the row's first slot that is not below the start
    token = page * size + first * rows + row - start

    @pl.when((first < WORD_BITS) & (token < count))
    def _():
        held = jnp.minimum((count - token + rows - 1) // rows, WORD_BITS - first)
        where = row_of(inputs["table"], program, (page, row, first), token, held, plan)
        write_row(inputs, words, numbers, where, plan)


def row_of(table, program, place, token, held, plan: Plan) -> Row:
    """`held` tokens from `token` on, in a page and word row from bit `first` on."""
    (_, n, b), (page, row, first) = program, place
    columns = jnp.arange(plan.columns, dtype=jnp.int32)
    return Row(
        program=program,
        at=(table[b, page] * plan.strides[0] + n * plan.strides[1], row),
        first=first.astype(jnp.uint32),
        mask=jnp.uint32(0xFFFFFFFF) >> (WORD_BITS - held).astype(jnp.uint32),
        real=columns < held,
        tokens=jnp.where(columns < held, token + plan.rows * columns, 0),
    )


def write_row(inputs, words, numbers, where: Row, plan: Plan) -> None:
    """Codes of a row's tokens into its words; their numbers."""
    writing, (_, n, b) = plan.writing, where.program
    y = _turned(inputs, where, plan)
    u, gain, found = y, jnp.ones((plan.columns,), jnp.float32), []
    if writing.gain == "rms":
        u, gain = scales.unit_rms(y)
        if plan.channels != plan.coded:  # the mean was over the padding too
            more = (plan.channels / plan.coded) ** 0.5
            u, gain = u * (1 / more), gain * more
    elif writing.gain == "code":
        rms = jnp.sqrt(jnp.sum(jnp.square(y), axis=-1) / plan.coded)
        gains = inputs["gains"]
        index, gain = steps.choose_gain(rms, lambda k: gains[_of(gains, n), k], gains.shape[1])
        u = y / gain[:, None]
        found.append(index.astype(jnp.float32))
    tables = [lambda k, ref=ref: ref[_of(ref, n), k] for ref in inputs["levels"]]
    codes, values = steps.choose_levels(u, writing, tables)
    for plane in range(max((part.bits for part in writing.parts), default=0)):
        new = steps.words_of(codes, plane)
        for part, begin, ref in zip(writing.parts, writing.starts, words, strict=False):
            if plane < part.bits:
                _put(ref, new, plane, begin, part.width, where, plan)
    residual = u
    if writing.parts and writing.gain == "rms":
        scale = scales.vector_scale(writing.rule, u, values, gain).astype(writing.dtype)
        found.append(scale.astype(jnp.float32))
        residual = u - (found[-1] / jnp.where(gain == 0, 1.0, gain))[:, None] * values
    if writing.signs is not None:
        norm = jnp.sqrt(jnp.sum(residual * residual, axis=-1))
        gamma = (norm * gain * plan.dim**-0.5).astype(writing.dtype)
        found.append(gamma.astype(jnp.float32))
        signs = _signs(inputs["sketch"], numbers[-1], residual, where, plan)
        _put(words[-1], steps.words_of(signs, 0), 0, 0, plan.coded, where, plan)
    in_place = plan.in_place or (False,) * len(found)
    for ref, number, here in zip(numbers, found, in_place, strict=False):
        place = (where.at[0], _slots(where, plan)) if here else (b, n, where.tokens)
        store(ref, place, number.astype(ref.dtype), where.real, interpret=plan.interpret)


def _slots(where: Row, plan: Plan) -> Array:
    """Of every column, in the page."""
    columns = jnp.arange(plan.columns, dtype=jnp.int32)
    return plan.rows * (where.first.astype(jnp.int32) + columns) + where.at[1]


def _turned(inputs, where: Row, plan: Plan) -> Float[Array, "N C"]:
    """(x - mean) A.T."""
    _, n, b = where.program

    def coordinates(k):
        at = k * plan.block + jnp.arange(plan.block, dtype=jnp.int32)
        inside = at < plan.dim
        x = load(
            inputs["x"], (b, n, where.tokens[:, None], at[None, :]),
            where.real[:, None] & inside[None, :],
        )  # fmt: skip
        x = x.astype(jnp.float32)
        if inputs["mean"] is None:
            return x
        return x - load(inputs["mean"], (_of(inputs["mean"], n), at), inside)[None, :]

    return steps.product(
        lambda k: _matrix(inputs["matrix"], n, k, plan), coordinates,
        -(-plan.dim // plan.block), (plan.channels, plan.columns),
    )  # fmt: skip


def _signs(ref, residuals, residual, where: Row, plan: Plan):
    """S r >= 0, int32 [N, C]; `residuals` is room for r."""
    i, n, b = where.program
    own = (i * plan.columns + jnp.arange(plan.columns, dtype=jnp.int32))[:, None]
    channels = jnp.arange(plan.channels, dtype=jnp.int32)[None, :]
    store(
        residuals, (b, n, own, channels), residual, channels < plan.coded, interpret=plan.interpret
    )
    if not plan.interpret:
        plgpu.debug_barrier()  # of this program

    def block(k):
        at = (k * plan.block + jnp.arange(plan.block, dtype=jnp.int32))[None, :]
        return load(residuals, (b, n, own, at), at < plan.coded)

    turned = steps.product(
        lambda k: _matrix(ref, n, k, plan), block,
        -(-plan.coded // plan.block), (plan.channels, plan.columns),
    )  # fmt: skip
    return (turned >= 0).astype(jnp.int32)


def _matrix(ref, n, k, plan: Plan) -> Float[Array, "C block"]:
    """Block k of the columns of head n's matrix [C, width], zero outside."""
    channels = jnp.arange(plan.channels, dtype=jnp.int32)[:, None]
    at = (k * plan.block + jnp.arange(plan.block, dtype=jnp.int32))[None, :]
    whole = plan.channels == plan.coded and ref.shape[2] % plan.block == 0
    mask = None if whole else (channels < plan.coded) & (at < ref.shape[2])
    return load(ref, (_of(ref, n), channels, at), mask)


def _of(ref, n):
    """Head n of a table, or the one that all heads share."""
    return n if ref.shape[0] > 1 else 0


def _put(ref, new, plane: int, begin: int, width: int, where: Row, plan: Plan) -> None:
    """Words of channels begin.. as one plane of the word row; older tokens keep their bits."""
    channels = jnp.arange(plan.channels, dtype=jnp.int32) - begin
    inside = (channels >= 0) & (channels < width)
    head_page, row = where.at
    at = (head_page, plane, row, channels)
    old = load(ref, at, inside & (where.first > jnp.uint32(0)))
    older = (jnp.uint32(1) << where.first) - jnp.uint32(1)
    store(
        ref,
        at,
        (old & older) | ((new & where.mask) << where.first),
        inside,
        interpret=plan.interpret,
    )
