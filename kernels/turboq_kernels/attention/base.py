"""Attention that reads packed words block by block in plain XLA: the oracle and the fallback.

Online softmax over blocks of pages (Milakov & Gimelshein 2018; FlashAttention's recurrence): only
one block is ever unpacked, keys meet a folded query, values are summed in code space, and the
inverse transform of V is applied once at the end. Exact sinks and the exact tail join the same
softmax. Bytes read per token: the packed cache's, once per call.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from turboq import packing
from turboq.attention import HIGHEST, soft_cap
from turboq.cache import GroupBuffers, LayerCache, Tail, stored_mask
from turboq.codecs.base import Codec, Stored
from turboq.layer import HeadGroup, KVLayer, in_head_order
from turboq.simulate import take_heads


def cache_attention(
    q: Float[Array, "B T H D"],
    layer: KVLayer,
    cache: LayerCache,
    tail: Tail,
    *,
    q_positions: Int[Array, "B T"],
    scale: float,
    window: int | None,
    softcap: float | None,
    block_pages: int,
) -> Float[Array, "B T H E"]:
    """See `turboq_kernels.attention.cache_attention`."""
    outs = []
    for group, buffers in zip(layer.groups, cache.groups, strict=True):
        per_kv = q.shape[2] // layer.kv_heads
        heads = tuple(h * per_kv + g for h in group.heads for g in range(per_kv))
        outs.append(
            _group(
                take_heads(q, heads), layer, cache, group, buffers, tail,
                q_positions=q_positions, scale=scale, window=window, softcap=softcap,
                block_pages=block_pages,
            )
        )  # fmt: skip
    joined = jnp.concatenate(outs, axis=2)
    batch, t, heads, dim = joined.shape
    by_kv = joined.reshape(batch, t, layer.kv_heads, heads // layer.kv_heads, dim)
    return in_head_order(layer, by_kv, 2).reshape(batch, t, heads, dim)


def _group(
    q, layer, cache, group: HeadGroup, buffers: GroupBuffers, tail: Tail,
    *, q_positions, scale, window, softcap, block_pages,
):  # fmt: skip
    policy, n = layer.policy, len(group.heads)
    batch, t, heads, dim = q.shape
    per_kv = heads // n
    # Queries of one KV head lie together: [B, N, T * G, D].
    q = q.reshape(batch, t, n, per_kv, dim).transpose(0, 2, 1, 3, 4)
    q = q.reshape(batch, n, t * per_kv, dim).astype(jnp.float32)
    at = jnp.repeat(q_positions, per_kv, axis=1)[:, None, :, None]  # [B, 1, TG, 1]

    def seen(slots):  # slots [B, S] -> [B, 1, TG, S]
        s = slots[:, None, None, :]
        mask = (s >= 0) & (s <= at)
        return mask if window is None else mask & (s > at - window)

    def exact(state, k, v, mask):
        """Adds exact keys and values [B, N, S, D] to the running softmax."""
        raw = jnp.einsum("bntd,bnsd->bnts", q, k.astype(jnp.float32), precision=HIGHEST)
        p, state = _rescale(state, soft_cap(raw * scale, softcap), mask)
        top, total, mass, stored_sum, exact_sum = state
        exact_sum += jnp.einsum("bnts,bnsd->bntd", p, v.astype(jnp.float32), precision=HIGHEST)
        return top, total + jnp.sum(p, axis=-1), mass, stored_sum, exact_sum

    folded = _heads(group.k.fold_query)(group.k_arrays, q)
    tokens = block_pages * packing.PAGE

    def block(i, state):
        stored = stored_mask(layer, cache, i * tokens, tokens)
        k = _slice(group.k, buffers.k, i, block_pages, stored)
        v = _slice(group.v, buffers.v, i, block_pages, stored)
        slots = jnp.broadcast_to(i * tokens + jnp.arange(tokens, dtype=jnp.int32), stored.shape)
        mask = seen(slots) & stored[:, None, None, :] & (slots >= policy.sinks)[:, None, None, :]
        if layer.ring:
            mask &= slots[:, None, None, :] < layer.stored_until(at + 1)
        raw = _heads(group.k.logits)(group.k_arrays, folded, k)
        p, state = _rescale(state, soft_cap(raw * scale, softcap), mask)
        top, total, mass, stored_sum, exact_sum = state
        here = jnp.sum(p, axis=-1)
        stored_sum += _heads(group.v.accumulate)(group.v_arrays, p, v)
        return top, total + here, mass + here, stored_sum, exact_sum

    rows = (batch, n, t * per_kv)
    value_dim = group.v.dim
    state = (
        jnp.full(rows, -jnp.inf, jnp.float32),  # running maximum
        jnp.zeros(rows, jnp.float32),  # sum of exponentials
        jnp.zeros(rows, jnp.float32),  # its part on stored tokens
        _zero_sum(group, buffers, rows, block_pages),
        jnp.zeros((*rows, value_dim), jnp.float32),
    )
    if policy.sinks:
        slots = jnp.broadcast_to(jnp.arange(policy.sinks, dtype=jnp.int32), (batch, policy.sinks))
        slots = jnp.where(slots < cache.lengths[:, None], slots, -1)
        mask = seen(slots)
        state = exact(state, buffers.k_sinks, buffers.v_sinks, mask)
    if layer.ring:
        k, v = (take_heads(x, group.heads).swapaxes(1, 2) for x in (tail.k, tail.v))
        s = tail.positions[:, None, None, :]
        mask = seen(tail.positions) & (s >= layer.stored_until(at + 1)) & (s >= policy.sinks)
        empty = (tail.positions < 0)[:, None, :, None]
        state = exact(state, k, jnp.where(empty, 0.0, v), mask)
    needed = -(-(jnp.max(q_positions) + 1) // tokens)
    blocks = jnp.minimum(needed, cache.capacity // tokens)
    _, total, mass, stored_sum, exact_sum = jax.lax.fori_loop(0, blocks, block, state)
    out = _heads(group.v.unfold_output)(group.v_arrays, stored_sum, mass) + exact_sum
    out /= jnp.where(total > 0, total, 1.0)[..., None]
    out = out.reshape(batch, n, t, per_kv, value_dim).transpose(0, 2, 1, 3, 4)
    return out.reshape(batch, t, heads, value_dim)


def _rescale(state, logits, mask):
    """Online softmax: weights of the new logits, and the state scaled to the new maximum."""
    top, total, mass, stored_sum, exact_sum = state
    logits = jnp.where(mask, logits, -jnp.inf)
    new_top = jnp.maximum(top, jnp.max(logits, axis=-1))
    base = jnp.where(jnp.isfinite(new_top), new_top, 0.0)  # rows that saw nothing stay at zero
    p = jnp.exp(logits - base[..., None])
    old = jnp.exp(top - base)
    return p, (
        new_top,
        total * old,
        mass * old,
        stored_sum * old[..., None],
        exact_sum * old[..., None],
    )


def _heads(method):
    """A method of one head -> all sequences and heads: arrays [N, ...], the rest [B, N, ...]."""

    def run(arrays, *rest):
        each = (0,) * len(rest)
        return jax.vmap(jax.vmap(method, in_axes=(0, *each)), in_axes=(None, *each))(arrays, *rest)

    return run


def _slice(codec: Codec, stored: Stored, i, block_pages: int, valid) -> Stored:
    """Unpacked fields of one block of pages, [B, N, tokens, width]; unwritten slots are zero."""
    out = {}
    for field in codec.fields:
        every = codec.block if field.per_block else 1
        unit = block_pages if field.packed else block_pages * packing.PAGE // every
        part = jax.lax.dynamic_slice_in_dim(stored[field.name], i * unit, unit, axis=2)
        if field.packed:
            out[field.name] = packing.unpack(part)
        else:
            # A NaN in a slot nobody wrote must not reach the sums as 0 * NaN.
            held = valid[:, None, ::every, None]
            out[field.name] = jnp.where(held, part, jnp.zeros((), part.dtype))
    return out


def _zero_sum(group: HeadGroup, buffers: GroupBuffers, rows, block_pages: int):
    """Zeros in the shape in which this V codec accumulates (its code space)."""

    def shape():
        valid = jnp.ones((rows[0], block_pages * packing.PAGE), bool)
        v = _slice(group.v, buffers.v, 0, block_pages, valid)
        p = jnp.zeros((*rows, block_pages * packing.PAGE), jnp.float32)
        return _heads(group.v.accumulate)(group.v_arrays, p, v)

    return jnp.zeros(jax.eval_shape(shape).shape, jnp.float32)
