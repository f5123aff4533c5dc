"""Encode on GPUs by Pallas-Triton: one program writes one word row of one head-page.

A word row holds tokens rows * j + r of its page at bit j, so what one program writes, no other
does, and its words are (old bits of slots below the start) | (new bits), without atomics. Of T
tokens that all fit different rows (T <= rows) each has its own program; otherwise there is one
program per row of every page that the tokens may touch, and those without a token end at once.
The body is `triton_kernel`.
"""

from __future__ import annotations

import dataclasses
import functools
from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental import pallas as pl
from jaxtyping import Array, Float, Int, UInt32

from turboq.codecs.writing import WriteTables, Writing
from turboq.numbers.packing import WORD_BITS
from turboq_kernels.decode.types import Pages
from turboq_kernels.target import too_old

try:
    from jax.experimental.pallas import triton as plgpu

    from turboq_kernels.encode.triton_kernel import MIN_SIDE, Plan, kernel
except ImportError as error:  # deprecated since JAX 0.11
    raise ImportError(
        f"JAX {jax.__version__} has no Pallas-Triton backend (jax.experimental.pallas.triton), "
        "which this kernel is written in; use JAX 0.11 or 0.12, or implementation='xla'"
    ) from error

_FEW = 16  # columns when no word row gets more tokens than that
_MAX_CHANNELS = 512


@dataclasses.dataclass(frozen=True, kw_only=True)
class Tuning:
    """Tokens per program (16 or 32), coordinates per step of a product, warps, stages of loads."""

    columns: int
    block: int
    num_warps: int
    num_stages: int


def tuning(channels: int, tokens_per_row: int) -> Tuning:
    """For padded channels and at most so many tokens in a word row.

    Only columns and stages depend on the tokens, so that a token goes through the same sums alone
    as in a chunk. One token is a chain of waits for A: more of it is under way at once. Chosen by
    registers and instructions; nothing was timed.
    """
    few = tokens_per_row <= _FEW
    return Tuning(
        columns=_FEW if few else WORD_BITS,
        block=32 if channels <= 256 else 16,
        num_warps=4 if channels < 128 else 8,
        num_stages=4 if few else 2,
    )


def unsupported(writing: Writing, dim: int, page: int) -> str | None:
    """Why this kernel cannot encode a case, or None."""
    channels = max(dim, sum(part.width for part in writing.parts))
    if channels > _MAX_CHANNELS:
        return f"{channels} coordinates are more than {_MAX_CHANNELS}"
    return too_old()


def write(
    x: Float[Array, "B N T D"],
    writing: Writing,
    tables: WriteTables,
    words: tuple[UInt32[Array, "R _ r _"], ...],
    pages: Pages,
    starts: Int[Array, "B"],
    counts: Int[Array, "B"],
    *,
    interpret: bool = False,
    tuned: Tuning | None = None,
) -> tuple[tuple[UInt32[Array, "R _ r _"], ...], tuple[Float[Array, "B N T"], ...]]:
    """See `turboq_kernels.encode.types.Write`; row numbers of padding tokens are arbitrary.

    Args:
      tuned: in place of `tuning`'s choice.

    Raises:
      ValueError: fewer columns than tokens that a word row may get.
    """
    batch, heads, tokens, _ = x.shape
    rows = words[0].shape[2]
    plan, tuned = planned(x, writing, tables, words, pages, interpret, tuned)
    touched = min(-(-(tokens - 1) // (rows * WORD_BITS)) + 1, pages.table.shape[1])
    programs = tokens if plan.single else touched * rows
    inputs = {
        "table": pages.table, "starts": starts, "counts": counts, **operands(x, tables)
    }  # fmt: skip
    leaves, tree = jax.tree.flatten(inputs)
    shapes: list[tuple[int, ...]] = [(batch, heads, tokens)] * len(writing.rows)
    if tables.sketch is not None:  # room for residuals
        shapes.append((batch, heads, programs * plan.columns, plan.coded))
    out = pl.pallas_call(
        functools.partial(kernel, plan=plan, tree=tree),
        grid=(programs, heads, batch),
        out_shape=[
            *(jax.ShapeDtypeStruct(w.shape, w.dtype) for w in words),
            *(jax.ShapeDtypeStruct(shape, jnp.float32) for shape in shapes),
        ],
        input_output_aliases={len(leaves) + i: i for i in range(len(words))},
        compiler_params=plgpu.CompilerParams(
            num_warps=tuned.num_warps, num_stages=tuned.num_stages
        ),
        interpret=interpret,
        name="turboq_encode",
    )(*leaves, *words)
    return tuple(out[: len(words)]), tuple(out[len(words) :][: len(writing.rows)])


def planned(
    x: Float[Array, "B N T D"],
    writing: Writing,
    tables: WriteTables,
    words: tuple[UInt32[Array, "R _ r _"], ...],
    pages: Pages,
    interpret: bool,
    tuned: Tuning | None = None,
) -> tuple[Plan, Tuning]:
    """What is static about a call.

    Raises:
      ValueError: fewer columns than tokens that a word row may get.
    """
    tokens, dim = x.shape[2:]
    rows, coded = words[0].shape[2], tables.matrix.shape[-2]
    channels, tokens_per_row = _padded(coded), min(-(-tokens // rows), WORD_BITS)
    tuned = tuned or tuning(channels, tokens_per_row)
    if tuned.columns < tokens_per_row:
        raise ValueError(f"{tuned.columns=} are fewer than {tokens_per_row=}")
    plan = Plan(
        writing=writing, strides=(pages.stride_page, pages.stride_head), rows=rows, dim=dim,
        coded=coded, channels=channels, columns=tuned.columns, single=tokens <= rows,
        block=min(tuned.block, _padded(dim)), interpret=interpret,
    )  # fmt: skip
    return plan, tuned


def operands(x: Float[Array, "B N T D"], tables: WriteTables) -> dict[str, Any]:
    """What a program reads beside page table and counts."""
    return {
        "x": x, "matrix": tables.matrix, "mean": tables.mean, "levels": list(tables.levels),
        "gains": tables.gains, "sketch": tables.sketch,
    }  # fmt: skip


def _padded(width: int) -> int:
    return max(MIN_SIDE, pl.next_power_of_2(width))
