"""Columns in plain XLA: the bits of a few query rows' tokens, page by page, never decoded.

A page's words become numbers g (bit - 1/2) [256, W], which meet the folded queries and then the
probabilities: two products of W numbers per row and token, where decoding turns every token by
matrices as wide as all heads. For more rows than a few, and for keys that are turned one by one,
decoding them is cheaper.
"""

from __future__ import annotations

from collections.abc import Callable

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from turboq.cache.columns import BIT_OF, NONE, pages_of
from turboq.cache.exact_attention import HIGHEST
from turboq.numbers.packing import PAGE
from turboq_kernels.columns.linear import LinearLayer
from turboq_kernels.columns.queries import Folded
from turboq_kernels.columns.types import Sums
from turboq_kernels.decode.base import online_softmax

MOST_ROWS = 64
FEWEST_POSITIONS = 16  # of a block of keys: every block has folded queries of its own


def unsupported(rows: int, block: int | None) -> str | None:
    """Why a case is not for this reading, or None. `block` None: keys after RoPE."""
    if rows > MOST_ROWS:
        return f"{rows} query rows; up to {MOST_ROWS} are read"
    if block is not None and not reads_blocks(block):
        return f"keys of blocks of {block} positions"
    return None


def reads_blocks(block: int) -> bool:
    """Whether keys in blocks of so many positions are read."""
    return PAGE % block == 0 and block >= FEWEST_POSITIONS


def attend(
    folded: Folded,
    words: UInt32[Array, "N P R C"],
    layer: LinearLayer,
    starts: Int[Array, "B M"],
    ends: Int[Array, "B M"],
    *,
    scale: float,
    softcap: float | None,
    table: Int[Array, "B p"] | None = None,
) -> Sums:
    """Softmax over slots starts[b, m] <= s < ends[b, m] of every row (`columns.queries`).

    `table`: as of `LayerState`.
    """
    pages = pages_of(words, table)
    logits_of, values = _by_blocks(folded, pages), 0 if layer.joined else 1

    def numbers(page: Array, i: int) -> Array:
        if table is None:
            own = jax.lax.dynamic_index_in_dim(words, page, axis=1, keepdims=False)
        else:
            own = words[0, jax.lax.dynamic_index_in_dim(table, page, axis=1, keepdims=False)]
        return _numbers(own, layer, i)

    def logits(page: Array, valid: Array) -> Array:
        return logits_of(numbers(page, 0), page)[:, None]

    def sums(p: Array, seen: Array, page: Array, valid: Array) -> Array:
        # Of joined heads the same numbers again, which XLA makes once.
        return jnp.einsum("bnms,bsw->bnmw", p, numbers(page, values), precision=HIGHEST)

    found = online_softmax(
        logits, sums, starts, ends,
        heads=1, width=layer.v.matrix.shape[-1], page=PAGE, pages=pages, block=1,
        scale=scale, softcap=softcap, splits=None,
    )  # fmt: skip
    return Sums(acc=found.acc[:, 0], total=found.total[:, 0], top=found.top[:, 0])


def _by_blocks(folded: Folded, pages: int) -> Callable[[Array, Array], Array]:
    """Logits [B, M, S] of a page's numbers [B, S, W] and its index: each block has its queries."""
    batch, count, rows, _ = folded.left.shape
    blocks = max(1, count // pages)  # of a page

    def logits(k: Array, page: Array) -> Array:
        left = folded.left
        if count > 1:
            left = jax.lax.dynamic_slice_in_dim(left, page * blocks, blocks, axis=1)
        split = k.reshape(batch, blocks, PAGE // blocks, -1)
        raw = jnp.einsum("bqmw,bqsw->bmqs", left, split, precision=HIGHEST)
        raw = raw.reshape(batch, rows, PAGE)
        if folded.bias.shape[-1] == 1:
            return raw + folded.bias
        return raw + jax.lax.dynamic_slice_in_dim(folded.bias, page * PAGE, PAGE, axis=2)

    return logits


def _numbers(page: UInt32[Array, "B R C"], layer: LinearLayer, i: int) -> Float[Array, "B S W"]:
    """g (bit - 1/2) of every lane of K (0) or V (1) at the tokens of a page; any of other lanes."""
    side = (layer.k, layer.v)[i]
    lanes = layer.first[i] + jnp.arange(side.matrix.shape[-1], dtype=jnp.int32)
    signs = _bits(page, lanes).astype(jnp.float32) - 0.5
    if not layer.gained:
        return signs
    planes = layer.gain_lanes[i]  # [U, 4]
    bits = _bits(page, planes.reshape(-1)).reshape(len(page), PAGE, *planes.shape)
    worth = jnp.where(planes == NONE, 0, 1 << jnp.arange(planes.shape[1], dtype=jnp.int32)[None])
    codes = jnp.sum(bits.astype(jnp.int32) * worth[None, None], axis=-1)  # [B, S, U]
    units = jnp.arange(len(side.gains), dtype=jnp.int32)
    gains = side.gains.at[units[None, None], codes].get(mode="promise_in_bounds")
    there = side.unit[None] == units[:, None]  # a gather of so many lanes takes far longer
    return signs * jnp.matmul(gains, there.astype(jnp.float32), precision=HIGHEST)


def _bits(page: UInt32[Array, "B R C"], lanes: Int[Array, "n"]) -> UInt32[Array, "B S n"]:
    """Bits of some lanes, token by token; lanes behind the pool hold zeros."""
    lanes = jnp.where(lanes < 0, page.shape[-1], lanes)
    own = page.at[..., lanes].get(mode="fill", fill_value=0)
    shifts = jnp.asarray(BIT_OF, jnp.uint32)[None, :, None, None]
    return ((own[:, None] >> shifts) & jnp.uint32(1)).reshape(len(page), PAGE, -1)
