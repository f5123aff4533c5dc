"""Keys and values of some pages of the one pool, by products of their bits with the layer's matrix.

    [k; v] = mean + sum over a group's lanes of  matrix[:, l] gain[unit of l] (bit_l - 1/2)

and keys before RoPE are rotated then (`columns.linear`). Every group's lanes are slices of the
pool, so no lane is looked up, and one product makes all channels of its heads. In bfloat16 gains
and matrix are rounded to it, by 2^-9 at most of what each lane adds; sums are float32.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from turboq.cache.columns import BIT_OF, NONE
from turboq.cache.layer import KVLayer
from turboq.numbers.rope import rotate
from turboq_kernels.columns import triton
from turboq_kernels.columns.linear import HIGHEST, LinearLayer, units_of

# Words of so many lanes from a lane on, of the pages at hand: (lane, count) -> [B, P, R, count].
Take = Callable[[Any, int], UInt32[Array, "B P R c"]]


def taking(
    words: UInt32[Array, "N P R C"], table: Int[Array, "b p"] | None, page: Array, count: int
) -> Take:
    """Of `count` pages of every sequence from `page` on; `table`: as of `LayerState`."""
    rows = words.shape[2]

    def own(lane, width: int):
        start = (jnp.int32(0), page, jnp.int32(0), lane)
        return jax.lax.dynamic_slice(words, start, (len(words), count, rows, width))

    def shared(lane, width: int):
        assert table is not None
        at = jax.lax.dynamic_slice_in_dim(table, page, count, axis=1)

        def one(page):
            start = (jnp.int32(0), page, jnp.int32(0), lane)
            return jax.lax.dynamic_slice(words, start, (1, 1, rows, width))[0, 0]

        return jax.vmap(jax.vmap(one))(at)

    return own if table is None else shared


def matrices(made: LinearLayer, lanes: int, dtype: jnp.dtype) -> tuple[Float[Array, "J c U"], ...]:
    """Of all heads of every group, over its own lanes: of K and V, one of both for joined heads.

    `lanes` are those of the pool, at least those of `triton.padded`.
    """
    own = [x.reshape(len(x), -1, x.shape[-1]).astype(dtype) for x in triton.local(made, lanes)]
    return (jnp.concatenate(own, axis=1),) if made.joined else tuple(own)


def keys_and_values(
    made: LinearLayer,
    own: tuple[Float[Array, "J c U"], ...],
    layer: KVLayer,
    take: Take,
    positions: Int[Array, "#B S"],
    *,
    lanes: int,
) -> tuple[Float[Array, "B K S D"], Float[Array, "B K S E"]]:
    """Of all slots of some pages, which stand at `positions`, by `matrices`, in their type."""
    dims = made.means.shape[2], made.v.mean.shape[1]
    codes, dtype = _gain_codes(made, take), own[0].dtype
    found = [_products(made, i, matrix, take, codes, lanes) for i, matrix in enumerate(own)]
    if made.joined:
        cut = found[0].shape[-1] // sum(dims) * dims[0]
        found = [found[0][..., :cut], found[0][..., cut:]]
    k, v = (_by_head(x, dim) for x, dim in zip(found, dims, strict=True))
    if layer.rope is None:
        k = k + made.means[None, :, :1]
    else:
        offset = positions % layer.rope_block
        means = jnp.moveaxis(made.means[:, offset], 1, 0)  # [B, K, S, D]
        k = rotate(layer.rope, k + means, (positions - offset)[:, None])
    return k.astype(dtype), (v + made.v.mean[None, :, None]).astype(dtype)


def _products(
    made: LinearLayer, i: int, matrix: Float[Array, "J c U"], take: Take, codes, lanes: int
) -> Float[Array, "J B S c"]:
    """What the bits of each group's lanes add up to, float32."""
    dtype = matrix.dtype
    windows, widths = triton.windows(made, lanes)[i], triton.widths(made, i)
    gains = None if codes is None else _gains(made, i, codes).astype(dtype)
    half = jnp.asarray(0.5, dtype)
    groups = []
    for units in units_of(made.unit_groups):
        mine = units if made.joined else units[:1]
        parts = []
        for unit, width in zip(mine, widths, strict=True):
            signs = _bits(take(windows[unit], width)).astype(dtype) - half
            parts.append(signs if gains is None else signs * gains[..., unit, None])
        groups.append(jnp.concatenate(parts, axis=-1))
    return jnp.einsum(
        "jbsu,jcu->jbsc", jnp.stack(groups), matrix,
        precision=HIGHEST if dtype == jnp.float32 else None, preferred_element_type=jnp.float32,
    )  # fmt: skip


def _bits(words: UInt32[Array, "B P R c"]) -> UInt32[Array, "B S c"]:
    """Token by token."""
    shifts = jnp.asarray(BIT_OF, jnp.uint32)[None, None, :, None, None]
    bits = (words[:, :, None] >> shifts) & jnp.uint32(1)
    return bits.reshape(len(words), -1, words.shape[-1])


def _gain_codes(made: LinearLayer, take: Take) -> Int[Array, "2 B S U"] | None:
    """Which gain every unit of K, and of V, has at every slot."""
    if not made.gained:
        return None
    first = made.first[0] + made.gain_lane
    bits = _bits(take(first, made.gain_weights.shape[1]))
    planes = made.gain_lanes  # [2, U, 4]
    own = bits[..., jnp.maximum(planes - first, 0)]  # [B, S, 2, U, 4]
    worth = jnp.left_shift(1, jnp.arange(planes.shape[2], dtype=jnp.int32))
    worth = jnp.where(planes == NONE, 0, worth[None, None])
    codes = jnp.sum(own.astype(jnp.int32) * worth[None, None], axis=-1)
    return jnp.moveaxis(codes, 2, 0)


def _gains(made: LinearLayer, i: int, codes: Int[Array, "2 B S U"]) -> Float[Array, "B S U"]:
    side = (made.k, made.v)[i]
    units = jnp.arange(len(side.gains), dtype=jnp.int32)[None, None]
    return side.gains.at[units, codes[i]].get(mode="promise_in_bounds")


def _by_head(x: Float[Array, "J B S c"], dim: int) -> Float[Array, "B K S D"]:
    """Channels of all heads of a group are those of one after another."""
    groups, batch, slots, _ = x.shape
    heads = x.reshape(groups, batch, slots, -1, dim)
    return jnp.moveaxis(heads, 1, 0).swapaxes(2, 3).reshape(batch, -1, slots, dim)
