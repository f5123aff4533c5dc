"""Keys and values of some pages of the one pool, by products of their bits with the layer's matrix.

    [k; v] = mean + sum over a group's lanes of  matrix[:, l] gain[unit of l] (bit_l - 1/2)

and keys before RoPE are rotated then (`columns.linear`). Every group's lanes are slices of the
pool, so no lane is looked up, and one product makes all channels of its heads. In bfloat16 gains
and matrix are rounded to it, by 2^-9 at most of what each lane adds; sums are float32.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from turboq.cache.columns import BIT_OF, NONE
from turboq.cache.layer import KVLayer
from turboq.numbers.packing import PAGE
from turboq.numbers.rope import rotate
from turboq_kernels.columns import triton
from turboq_kernels.columns.linear import HIGHEST, LinearLayer, units_of


def keys_and_values(
    made: LinearLayer,
    layer: KVLayer,
    words: UInt32[Array, "B P R C"],
    positions: Int[Array, "#B S"],
    dtype: jnp.dtype,
) -> tuple[Float[Array, "B K S D"], Float[Array, "B K S E"]]:
    """Of all slots of these pages, which stand at `positions`; products and results in `dtype`."""
    words = triton.padded(words, made)
    dims = made.means.shape[2], made.v.mean.shape[1]
    if made.joined:
        matrix = jnp.concatenate([_matrix(made, i, words) for i in (0, 1)], axis=1)
        both = _products(made, 0, matrix, words, dtype)
        cut = matrix.shape[1] // sum(dims) * dims[0]
        keys, values = both[..., :cut], both[..., cut:]
    else:
        keys, values = (_products(made, i, _matrix(made, i, words), words, dtype) for i in (0, 1))
    k, v = (_by_head(x, dim) for x, dim in zip((keys, values), dims, strict=True))
    if layer.rope is None:
        k = k + made.means[None, :, :1]
    else:
        offset = positions % layer.rope_block
        means = jnp.moveaxis(made.means[:, offset], 1, 0)  # [B, K, S, D]
        k = rotate(layer.rope, k + means, (positions - offset)[:, None])
    return k.astype(dtype), (v + made.v.mean[None, :, None]).astype(dtype)


def _matrix(made: LinearLayer, i: int, words: UInt32[Array, "B P R C"]) -> Float[Array, "J c U"]:
    """Of all heads of every group, over its own lanes."""
    own = triton.local_of(made, i, (made.k, made.v)[i].matrix, words.shape[-1])
    return own.reshape(len(own), -1, own.shape[-1])


def _products(
    made: LinearLayer, i: int, matrix: Float[Array, "J c U"], words, dtype
) -> Float[Array, "J B S c"]:
    """What the bits of each group's lanes add up to, float32."""
    windows, widths = triton.windows(made, words.shape[-1])[i], triton.widths(made, i)
    gains = _gains(made, i, words).astype(dtype)
    shifts = jnp.asarray(BIT_OF, jnp.uint32)[None, None, :, None, None]
    groups = []
    for units in units_of(made.unit_groups):
        mine = units if made.joined else units[:1]
        lanes = [
            jax.lax.dynamic_slice_in_dim(words, windows[unit], width, axis=-1)
            for unit, width in zip(mine, widths, strict=True)
        ]
        own = jnp.concatenate(lanes, axis=-1)[:, :, None]
        bits = ((own >> shifts) & jnp.uint32(1)).reshape(len(words), -1, own.shape[-1])
        signs = bits.astype(dtype) - jnp.asarray(0.5, dtype)
        gain = [
            jnp.broadcast_to(gains[:, :, unit, None], (*bits.shape[:2], width))
            for unit, width in zip(mine, widths, strict=True)
        ]
        groups.append(signs * jnp.concatenate(gain, axis=-1))
    return jnp.einsum(
        "jbsu,jcu->jbsc", jnp.stack(groups), matrix.astype(dtype),
        precision=HIGHEST if dtype == jnp.float32 else None, preferred_element_type=jnp.float32,
    )  # fmt: skip


def _gains(made: LinearLayer, i: int, words: UInt32[Array, "B P R C"]) -> Float[Array, "B S U"]:
    """Of every unit at every slot."""
    side, planes = (made.k, made.v)[i], made.gain_lanes[i]  # [U, 4]
    batch, slots = len(words), words.shape[1] * PAGE
    if not made.gained:
        return jnp.ones((batch, slots, len(side.gains)), jnp.float32)
    own = words[..., jnp.maximum(planes, 0).reshape(-1)].reshape(*words.shape[:3], *planes.shape)
    shifts = jnp.asarray(BIT_OF, jnp.uint32)[None, None, :, None, None, None]
    bits = (own[:, :, None] >> shifts) & jnp.uint32(1)
    bits = jnp.where(planes == NONE, jnp.uint32(0), bits)
    worth = jnp.arange(planes.shape[1], dtype=jnp.uint32).reshape(1, 1, 1, 1, 1, -1)
    codes = jnp.sum(bits << worth, axis=-1, dtype=jnp.uint32).astype(jnp.int32)
    units = jnp.arange(len(side.gains), dtype=jnp.int32)
    return side.gains[units, codes].reshape(batch, slots, -1)


def _by_head(x: Float[Array, "J B S c"], dim: int) -> Float[Array, "B K S D"]:
    """Channels of all heads of a group are those of one after another."""
    groups, batch, slots, _ = x.shape
    heads = x.reshape(groups, batch, slots, -1, dim)
    return jnp.moveaxis(heads, 1, 0).swapaxes(2, 3).reshape(batch, -1, slots, dim)
