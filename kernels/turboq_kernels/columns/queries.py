"""Queries as the stored bits of a layer meet them: one row of weights over its lanes each.

    logit(row m, token t) = gain[m, t] * sum_l left[m, l] (bit[t, l] - 1/2) + bias[m, t]

Keys after their rotary embedding: left = matrix^T q, bias = q . mean. Keys relative to blocks of P
positions (`turboq.cache.key_form`): left = matrix^T R(-p0) q, one such row for every block, and
bias = q . R(t) mean, a product of D numbers per row with one table of cosines and sines for all
heads and layers.
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from turboq.numbers import rope as rotary
from turboq.numbers.rope import Rope
from turboq_kernels.columns.linear import LinearSide

HIGHEST = jax.lax.Precision.HIGHEST


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Folded:
    """Rows of a step: M query rows (all heads of a layer), Q blocks of positions (1: all)."""

    left: Any  # float32 [B, Q, M, W]
    largest: Any  # float32 [B, M]: no entry of `left` is larger, in any block
    bias: Any  # float32 [B, M, S], or [B, M, 1] of all tokens alike


def to_rows(q: Float[Array, "B T H D"], heads: int) -> Float[Array, "B M D"]:
    """Row (n T + t) G + g is query head n G + g of token t."""
    batch, t, count, dim = q.shape
    q = q.astype(jnp.float32).reshape(batch, t, heads, count // heads, dim)
    return q.swapaxes(1, 2).reshape(batch, t * count, dim)


def from_rows(x: Float[Array, "B M E"], tokens: int, heads: int) -> Float[Array, "B T H E"]:
    """The inverse of `to_rows` for outputs."""
    batch, rows, dim = x.shape
    x = x.reshape(batch, heads, tokens, rows // tokens // heads, dim).swapaxes(1, 2)
    return x.reshape(batch, tokens, rows // tokens, dim)


def fold(
    rows: Float[Array, "B M D"], side: LinearSide, *, slots: int, rope: Rope | None, block: int
) -> Folded:
    """Rows of queries at their own positions, for keys of so many slots."""
    heads = side.mean.shape[0]
    of_row = jnp.repeat(jnp.arange(heads, dtype=jnp.int32), rows.shape[1] // heads)
    own = (of_row[:, None] == side.head[None]).astype(jnp.float32)
    mean = side.mean[of_row]
    # |left| <= |q| |column|: rotations keep both, so one unit serves all blocks.
    columns = jnp.sqrt(jnp.sum(jnp.square(side.matrix), axis=0))
    largest = jnp.linalg.norm(rows, axis=-1) * jnp.max(own * columns[None], axis=1)[None]
    if rope is None:
        turned = rows[:, None]
        bias = jnp.sum(rows * mean[None], axis=-1, keepdims=True)
    else:
        starts = jnp.arange(0, slots, block, dtype=jnp.int32)
        every = jnp.broadcast_to(rows[:, None], (len(rows), len(starts), *rows.shape[1:]))
        turned = rotary.unrotate(rope, every, starts[None, :, None])
        bias = mean_logits(rope, rows, mean, slots)
    left = jnp.einsum("bqmd,dw->bqmw", turned, side.matrix, precision=HIGHEST)
    left = left * own[None, None]
    return Folded(left=left, largest=largest, bias=bias)


def mean_logits(
    rope: Rope, q: Float[Array, "B M D"], mean: Float[Array, "M D"], slots: int
) -> Float[Array, "B M S"]:
    """q . R(t) mean for t = 0..slots - 1: a cosine and a sine of each pair, and what is not turned.

    q1 (m1 cos - m2 sin) + q2 (m2 cos + m1 sin) = (q1 m1 + q2 m2) cos + (q2 m1 - q1 m2) sin
    """
    cos, sin = rotary.tables(rope, jnp.arange(slots, dtype=jnp.int32))
    half = rope.dim // 2
    if rope.layout == "half":
        first, second = slice(0, half), slice(half, rope.dim)
    else:
        first, second = slice(0, rope.dim, 2), slice(1, rope.dim, 2)
    q1, q2, m1, m2 = q[..., first], q[..., second], mean[:, first], mean[:, second]
    m1, m2 = m1[None], m2[None]
    turned = jnp.concatenate([q1 * m1 + q2 * m2, q2 * m1 - q1 * m2], axis=-1)
    table = jnp.concatenate([cos, sin], axis=-1)
    still = jnp.sum(q[..., rope.dim :] * mean[None, :, rope.dim :], axis=-1, keepdims=True)
    return jnp.einsum("bmi,si->bms", turned, table, precision=HIGHEST) + still


def as_integers(folded: Folded, piece: float) -> tuple[Int[Array, "B Q M W"], Float[Array, "B M"]]:
    """(integers of up to `piece`, their unit): left = integers * unit, rounded."""
    unit = jnp.where(folded.largest > 0, folded.largest / piece, 1.0)
    return jnp.round(folded.left / unit[:, None, :, None]).astype(jnp.int32), unit
