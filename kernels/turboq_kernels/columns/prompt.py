"""A chunk of a prompt on the one pool: pages are decoded a few at a time, then flash attention.

Of hundreds of query rows to a KV head reading bits as they lie costs more than decoding them once:
every row would meet all lanes of a head, of which there are more than channels. So keys and values
of a few pages come into memory as exact tokens are kept (`TokenPolicy.exact_dtype`), flash
attention (`turboq_kernels.prefill`) goes over them, and over a chunk's own and recent tokens
likewise. Pages that no query sees are not decoded. Memory: keys and values of `TOKENS` tokens, and
no logits.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt32

from turboq.cache import model_cache
from turboq.cache.contiguous import Tail
from turboq.cache.model_cache import LayerForm, LayerState
from turboq.numbers.packing import PAGE
from turboq_kernels import merge
from turboq_kernels.columns import linear, mosaic_tpu, pages, triton
from turboq_kernels.columns.linear import LinearLayer
from turboq_kernels.decode.types import Partial
from turboq_kernels.prefill import kernels
from turboq_kernels.target import too_old

TOKENS = 8192  # of all sequences: 32 MiB of keys and values of 8 heads of 128 channels in bfloat16


def unsupported(form: LayerForm, name: str) -> str | None:
    """Why flash attention of this implementation cannot read a layer, or None."""
    if form.layer.latent:
        return "latent attention, whose keys are wider than flash attention takes"
    return too_old() if name == "triton" else mosaic_tpu.unsupported_chip()


def attend(
    q: Float[Array, "B T H D"],
    state: LayerState,
    words: UInt32[Array, "N P R C"],
    tail: Tail,
    made: LinearLayer | None = None,
    *,
    q_positions: Int[Array, "B T"],
    scale: float,
    window: int | None,
    softcap: float | None,
    sink_logits: Float[Array, "H"] | None,
    implementation: str,
    interpret: bool,
    tokens: int = TOKENS,
) -> Float[Array, "B T H E"]:
    """`turboq.cache.model_cache.attend` of many queries, by kernels of the implementation named.

    Stored `tokens` of all sequences together are decoded at a time, at least a page of each.
    `made`: the layer's matrices; None, or without those of keys: they are made here.
    """
    layer, sinks = state.form.layer, state.form.layer.policy.sinks
    (batch, t, count, dim), heads = q.shape, len(state.form.group.heads)
    each = count // heads
    rows = q.astype(jnp.float32).reshape(batch, t, heads, each, dim)
    rows = rows.swapaxes(1, 2).reshape(batch, heads, -1, dim)
    at = jnp.repeat(q_positions, each, axis=1)  # of all heads alike
    low = jnp.zeros_like(at) if window is None else at - window + 1
    recent = layer.stored_until(at + 1)
    options = {"scale": scale, "softcap": softcap}
    by = {"implementation": implementation, "interpret": interpret}
    lowest, highest = jnp.maximum(low, sinks), jnp.minimum(at, recent - 1)
    parts = [_stored(rows, state, words, made, lowest, highest, tokens, options | by)]
    if sinks:
        slots = jnp.arange(sinks, dtype=jnp.int32)[None, None]
        seen = (slots >= low[..., None]) & (slots <= at[..., None])
        seen &= slots < state.lengths[:, None, None]
        exact = (state.exact.k_sinks, state.exact.v_sinks)
        parts.append(merge.exact(rows, *exact, seen, **options))
    if tail.positions.shape[1]:
        k, v = (x.swapaxes(1, 2) for x in (tail.k, tail.v))
        newest = jnp.maximum(lowest, recent)
        parts.append(kernels.own(rows, k, v, tail.positions, newest, at, **options, **by))
    if sink_logits is not None:
        own = jnp.tile(sink_logits.reshape(heads, each), (1, t))
        parts.append(merge.sink(own, batch, parts[0].acc.shape[-1]))
    whole = merge.merge(merge.stack(parts))
    out = whole.acc / jnp.where(whole.total > 0, whole.total, 1.0)[..., None]
    return out.reshape(batch, heads, t, each, -1).swapaxes(1, 2).reshape(batch, t, count, -1)


def _stored(
    rows: Float[Array, "B K M D"],
    state: LayerState,
    words: UInt32[Array, "N P R C"],
    made: LinearLayer | None,
    lowest: Int[Array, "B M"],
    highest: Int[Array, "B M"],
    tokens: int,
    options,
) -> Partial:
    """The softmax over the stored tokens from `lowest` to `highest` that each row sees."""
    form, first = state.form, jnp.reshape(state.first, (-1, 1))
    read, unfold = _reader(state, words, made)
    batch, held = len(rows), state.pages(words)
    count = min(max(1, tokens // (batch * PAGE)), held)
    highest = jnp.minimum(highest, state.lengths[:, None] - 1)
    seen = lowest <= highest
    begin = jnp.min(jnp.where(seen, lowest - first, held * PAGE), initial=held * PAGE)
    end = jnp.max(jnp.where(seen, highest - first + 1, 0), initial=0)
    size = count * PAGE

    def step(i, whole: Partial) -> Partial:
        page = jnp.minimum(i * count, held - count)
        slots = page * PAGE + jnp.arange(size, dtype=jnp.int32)[None]
        positions = slots + first
        k, v = read(page, count, positions)
        # The last step begins earlier where pages do not divide: what it has seen, it sees once.
        positions = jnp.where(slots >= i * size, positions, -1)
        positions = jnp.broadcast_to(positions, (batch, size))
        own = kernels.own(rows, k, v, positions, lowest, highest, **options)
        return merge.merge(merge.stack([whole, own]))

    width, lead = form.codecs[1].dim, rows.shape[:3]
    none = Partial(
        acc=jnp.zeros((*lead, width), jnp.float32), top=jnp.full(lead, -jnp.inf),
        total=jnp.zeros(lead, jnp.float32),
    )  # fmt: skip
    found = jax.lax.fori_loop(begin // size, -(-end // size), step, none)
    if unfold is None:
        return found
    return Partial(acc=unfold(found.acc, found.total), top=found.top, total=found.total)


def _reader(state: LayerState, words: UInt32[Array, "N P R C"], made: LinearLayer | None):
    """What reads some pages' slots at positions as keys and values, and sums of these as outputs.

    Codes that are not linear in their bits are decoded by their codecs.
    """
    form, table = state.form, state.table
    dtype = jnp.dtype(form.layer.policy.exact_dtype)
    if linear.unsupported(form) is None:
        if made is not None and made.k.matrix is not None:
            layer = made
        else:
            layer = linear.linear_layer(form, pool_lanes=words.shape[-1])
        wide = triton.padded(words, layer)
        own = pages.matrices(layer, wide.shape[-1], dtype)

        def by_matrix(page: Array, count: int, positions: Int[Array, "#B S"]):
            take = pages.taking(wide, table, page, count)
            return pages.keys_and_values(
                layer, own, form.layer, take, positions, lanes=wide.shape[-1]
            )

        return by_matrix, None

    def by_codec(page: Array, count: int, positions: Int[Array, "#B S"]):
        if table is None:
            part = jax.lax.dynamic_slice_in_dim(words, page, count, axis=1), positions
        else:
            own = jax.lax.dynamic_slice_in_dim(table, page, count, axis=1)
            part = words, positions, own
        decoded = model_cache.decoded(form, *part)
        return tuple(x.astype(dtype).swapaxes(1, 2) for x in decoded)

    return by_codec, model_cache.unfold_of(form)
