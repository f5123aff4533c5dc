"""Queries as the stored bits of a layer meet them: one row of weights over its lanes each.

    logit(row m, token t) = sum_l gain[unit of l, t] left[m, l] (bit[t, l] - 1/2) + bias[m, t]

Keys after their rotary embedding: left = matrix^T q, bias = q . mean. Keys relative to blocks of P
positions (`turboq.cache.key_form`): left = matrix^T R(-p0) q, one such row for every block, and
bias = R(-p0) q . mean, of the mean at a token's place in its block (`LinearLayer.means`).
"""

from __future__ import annotations

import dataclasses
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

from turboq.numbers import rope as rotary
from turboq.numbers.rope import Rope
from turboq_kernels.columns.linear import HIGHEST, NONE, LinearLayer, LinearSide
from turboq_kernels.columns.types import Sums


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


def own_lanes(layer: LinearLayer, side: LinearSide, rows: int) -> Bool[Array, "M W"]:
    """Lanes that are of a row's group."""
    groups = jnp.asarray((*layer.unit_groups, NONE), jnp.int32)[side.unit]
    of_row = jnp.arange(rows, dtype=jnp.int32) // (rows // layer.groups)
    return of_row[:, None] == groups[None]


def fold(
    rows: Float[Array, "B M D"],
    layer: LinearLayer,
    *,
    slots: int,
    rope: Rope | None,
    block: int,
    matrix: Float[Array, "J G D U"] | None = None,
) -> Folded:
    """Rows of queries at their own positions, for keys of so many slots.

    `matrix`: over each group's own lanes (`triton.local`), which are then those of the result.
    """
    side, m = layer.k, rows.shape[1]
    each, heads = side.matrix.shape[0], side.mean.shape[0]
    # |left| <= |q| |column|: rotations keep both, so one unit serves all blocks.
    longest = jnp.repeat(layer.longest, m // heads)
    largest = jnp.linalg.norm(rows, axis=-1) * longest[None]
    turned = rows[:, None]
    if rope is not None:
        starts = jnp.arange(0, slots, block, dtype=jnp.int32)
        every = jnp.broadcast_to(rows[:, None], (len(rows), len(starts), *rows.shape[1:]))
        turned = rotary.unrotate(rope, every, starts[None, :, None])
    of_head = turned.reshape(*turned.shape[:2], heads, m // heads, -1)
    bias = jnp.einsum("bqhrd,hpd->bhrqp", of_head, layer.means, precision=HIGHEST)
    bias = bias.reshape(len(rows), m, -1)
    by_head = turned.reshape(*turned.shape[:2], layer.groups, each, m // heads, -1)
    equation = "bqjgrd,gdw->bqjgrw" if matrix is None else "bqjgrd,jgdw->bqjgrw"
    of = side.matrix if matrix is None else matrix
    left = jnp.einsum(equation, by_head, of, precision=HIGHEST)
    left = left.reshape(*turned.shape[:3], -1)
    if matrix is None:
        left = jnp.where(own_lanes(layer, side, m), left, 0.0)
    return Folded(left=left, largest=largest, bias=bias)


def values(
    sums: Sums, layer: LinearLayer, matrix: Float[Array, "J G E Y"] | None = None
) -> Float[Array, "B M E"]:
    """What sums over bits are worth: sums of p x_hat, not yet normalised. `matrix` as of `fold`."""
    batch, m, _ = sums.acc.shape
    heads = layer.v.mean.shape[0]
    each = heads // layer.groups
    bits = sums.acc
    if matrix is None:
        bits = jnp.where(own_lanes(layer, layer.v, m), bits, 0.0)
    bits = bits.reshape(batch, layer.groups, each, m // heads, -1)
    equation = "bjgrw,gew->bjgre" if matrix is None else "bjgrw,jgew->bjgre"
    of = layer.v.matrix if matrix is None else matrix
    acc = jnp.einsum(equation, bits, of, precision=HIGHEST)
    mean = jnp.repeat(layer.v.mean, m // heads, axis=0)
    return acc.reshape(batch, m, -1) + sums.total[..., None] * mean[None]


def as_integers(folded: Folded, piece: float) -> tuple[Int[Array, "B Q M W"], Float[Array, "B M"]]:
    """(integers of up to `piece`, their unit): left = integers * unit, rounded."""
    unit = jnp.where(folded.largest > 0, folded.largest / piece, 1.0)
    return jnp.round(folded.left / unit[:, None, :, None]).astype(jnp.int32), unit
