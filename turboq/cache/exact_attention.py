"""Exact attention over plain arrays: the reference that everything else is compared with."""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
from jaxtyping import Array, Bool, Float, Int

HIGHEST = jax.lax.Precision.HIGHEST
PREFIXES = 2  # lengths of keys that blocks of queries in order read: 3/4 of all; each is compiled
LONG, LONG_PREFIXES = 4096, 8  # of so many keys more lengths are worth their compilation: 9/16

# Keys, values, and which of those keys the queries at given positions may see; each has its own
# number of keys.
Visible = Callable[[Int[Array, "B T"]], Bool[Array, "B T _"]]
Unfold = Callable[[Float[Array, "B K n C"], Float[Array, "B K n"]], Float[Array, "B K n E"]]
Prepared = tuple[Float[Array, "B S K D"], Float[Array, "B S K E"], Bool[Array, "B S K"]]
Segment = tuple[Float[Array, "B _ K D"], Float[Array, "B _ K _"], Visible]


def causal(
    k_positions: Int[Array, "B S"], *, window: int | None = None, lowest: int = 0
) -> Visible:
    """Keys at positions [max(lowest, t - window + 1), t]; a negative position is an empty slot."""

    def visible(q_positions: Int[Array, "B T"]) -> Bool[Array, "B T S"]:
        t, s = q_positions[:, :, None], k_positions[:, None, :]
        seen = (s <= t) & (s >= lowest)
        return seen if window is None else seen & (s > t - window)

    return visible


def soft_cap(logits: Float[Array, "*n"], cap: float | None) -> Float[Array, "*n"]:
    """cap * tanh(logits / cap), or the logits themselves without a cap (Gemma 2)."""
    return logits if cap is None else cap * jnp.tanh(logits / cap)


def without_broken(x: Float[Array, "*n D"]) -> tuple[Float[Array, "*n D"], Bool[Array, "*n"]]:
    """x with zeros for the vectors that hold Inf or NaN, and which those are.

    A weight of zero times Inf is NaN: a masked product keeps broken vectors from nobody. Taken out
    here, they reach those that may see them as NaN (in the logit or weight) and nobody else.
    """
    broken = ~jnp.all(jnp.isfinite(x), axis=-1)
    return jnp.where(broken[..., None], jnp.zeros((), x.dtype), x), broken


def attention(
    q: Float[Array, "B T H D"],
    k: Float[Array, "B S K D"],
    v: Float[Array, "B S K E"],
    *,
    scale: float,
    q_positions: Int[Array, "B T"] | None = None,
    k_positions: Int[Array, "B S"] | None = None,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: Float[Array, "H"] | None = None,
    query_block: int = 128,
) -> Float[Array, "B T H E"]:
    """Causal grouped-query attention, softmax(scale q k^T) v, in float32.

    Positions default to 0..T-1 and 0..S-1; a negative key position marks an empty slot. A query
    that sees no key gets zeros, one that sees Inf or NaN in a key or value NaN; what a query may
    not see never reaches it. `sink_logits` join the softmax and no output (gpt-oss). Peak memory is
    B * H * query_block * S logits.

    Raises:
      ValueError: the number of query heads is not a multiple of the number of KV heads.
    """
    batch, s = k.shape[:2]
    if k_positions is not None and q_positions is None:
        q_positions = _in_order(batch, q.shape[1])
    if k_positions is None:
        k_positions = jnp.broadcast_to(jnp.arange(s, dtype=jnp.int32), (batch, s))
    segment = (k, v, causal(k_positions, window=window))
    return attention_over_segments(
        q, [segment], scale=scale, q_positions=q_positions, softcap=softcap,
        sink_logits=sink_logits, query_block=query_block, window=window,
    )  # fmt: skip


def attention_over_segments(
    q: Float[Array, "B T H D"],
    segments: Sequence[Segment],
    *,
    scale: float,
    q_positions: Int[Array, "B T"] | None = None,
    softcap: float | None = None,
    sink_logits: Float[Array, "H"] | None = None,
    query_block: int = 128,
    unfold: Unfold | None = None,
    window: int | None = None,
) -> Float[Array, "B T H E"]:
    """One softmax over several key/value segments, each with its own visibility rule.

    Without `q_positions` query t is token t, and sees no key of a segment after its t-th: those are
    not read either, but up to the end of its part of the queries. With a `window` it also sees none
    before its (t - window + 1)-th: a block of queries reads the keys of its windows only.

    With `q_positions` and many keys a block of queries reads the first segment up to the last
    eighth that one of them sees.

    `unfold` turns the first segment's sum of values, and the sum of their weights, into outputs:
    its values may be in the space of their codes.
    """
    batch, t, heads, _ = q.shape
    kv_heads = segments[0][0].shape[2]
    if heads % kv_heads:
        raise ValueError(f"{heads=} query heads must be a multiple of {kv_heads=}")
    in_order = q_positions is None
    if q_positions is None:
        q_positions = _in_order(batch, t)
    ready = [_prepared(k, v) for k, v, _ in segments]
    attend = functools.partial(
        _attend_block, visible=[rule for _, _, rule in segments], scale=scale, softcap=softcap,
        unfold=unfold, sink_logits=sink_logits,
    )  # fmt: skip
    blocks = -(-t // query_block)
    if blocks <= 1:
        return attend(q, q_positions, ready)
    # Weights are computed again in a reverse pass, which is faster than keeping them.
    attend = jax.checkpoint(attend)
    block = -(-t // blocks)
    pad = blocks * block - t
    q = jnp.pad(q, ((0, 0), (0, pad), (0, 0), (0, 0)))
    q_positions = jnp.pad(q_positions, ((0, 0), (0, pad)), mode="edge")
    q_blocks = q.reshape(batch, blocks, block, heads, -1).swapaxes(0, 1)
    at = q_positions.reshape(batch, blocks, block).swapaxes(0, 1)
    keys = max(one[0].shape[1] for one in ready)
    ends = (jnp.arange(blocks, dtype=jnp.int32) + 1) * block
    if in_order and window is not None and 2 * (window + block) <= keys:
        found = jax.lax.map(
            lambda x: attend(*x[:2], *_last(ready, x[2], window + block - 1)), (q_blocks, at, ends)
        )
    elif in_order:
        most = LONG_PREFIXES if keys >= LONG else PREFIXES
        groups, found = max(1, min(most, blocks // 4)), []
        for i in range(groups):
            rows = slice(i * blocks // groups, (i + 1) * blocks // groups)
            read = [tuple(x[:, : rows.stop * block] for x in one) for one in ready]
            each = (q_blocks[rows], at[rows])
            found.append(jax.lax.map(lambda x, read=read: attend(*x, read), each))
        found = jnp.concatenate(found)
    elif ready[0][0].shape[1] >= LONG:
        found = jax.lax.map(
            lambda x: _up_to_seen(attend, segments[0][2], ready, *x), (q_blocks, at)
        )
    else:
        found = jax.lax.map(lambda x: attend(*x, ready), (q_blocks, at))
    return found.swapaxes(0, 1).reshape(batch, blocks * block, heads, -1)[:, :t]


def _last(ready: Sequence[Prepared], end: Int[Array, ""], width: int):
    """The last `width` tokens of every segment that end before `end`, and the first one's number.

    Where there are fewer they are the first ones.
    """
    cut, firsts = [], []
    for one in ready:
        own = min(width, one[0].shape[1])
        first = jnp.clip(end - own, 0, one[0].shape[1] - own)
        cut.append(tuple(jax.lax.dynamic_slice_in_dim(x, first, own, axis=1) for x in one))
        firsts.append(first)
    return cut, firsts


def _up_to_seen(attend, rule: Visible, ready: Sequence[Prepared], q, at) -> Array:
    """A block's attention to the eighths of the first segment up to the last that it sees."""
    keys = ready[0][0].shape[1]
    seen = jnp.any(rule(at), axis=(0, 1))
    count = jnp.max(jnp.where(seen, jnp.arange(1, keys + 1, dtype=jnp.int32), 0))
    ends = [-(-keys * (i + 1) // LONG_PREFIXES) for i in range(LONG_PREFIXES)]

    def up_to(end: int):
        return lambda: attend(q, at, [tuple(x[:, :end] for x in ready[0]), *ready[1:]])

    which = jnp.sum(count > jnp.asarray(ends[:-1], jnp.int32))
    return jax.lax.switch(which, [up_to(end) for end in ends])


def _in_order(batch: int, t: int) -> Int[Array, "B T"]:
    return jnp.broadcast_to(jnp.arange(t, dtype=jnp.int32), (batch, t))


def _prepared(k: Float[Array, "B S K D"], v: Float[Array, "B S K E"]) -> Prepared:
    (k, broken_k), (v, broken_v) = (without_broken(x.astype(jnp.float32)) for x in (k, v))
    return k, v, broken_k | broken_v


def _attend_block(
    q, q_positions, segments, firsts=None, *, visible, scale, softcap, unfold, sink_logits
):
    batch, t, heads, dim = q.shape
    kv_heads = segments[0][0].shape[2]
    per = heads // kv_heads
    q = q.reshape(batch, t, kv_heads, per, dim).transpose(0, 2, 3, 1, 4).astype(jnp.float32)
    q = q.reshape(batch, kv_heads, per * t, dim)
    logits, seen = [], []
    for i, ((k, _, broken), rule) in enumerate(zip(segments, visible, strict=True)):
        raw = jnp.einsum("bknd,bskd->bkns", q, k, precision=HIGHEST)
        masked = jnp.where(
            broken.swapaxes(1, 2)[:, :, None], jnp.nan, soft_cap(raw * scale, softcap)
        )
        logits.append(masked)
        all_seen = rule(q_positions)
        first = 0 if firsts is None else firsts[i]
        seen.append(jax.lax.dynamic_slice_in_dim(all_seen, first, k.shape[1], axis=2))
    mask = jnp.tile(jnp.concatenate(seen, axis=-1), (1, per, 1))[:, None]
    joint = jnp.where(mask, jnp.concatenate(logits, axis=-1), -jnp.inf)
    top = jnp.max(joint, axis=-1, keepdims=True)
    sink = None
    if sink_logits is not None:  # of each row, group by group, query by query
        by_group = sink_logits.astype(jnp.float32).reshape(kv_heads, per)
        sink = jnp.repeat(by_group, t, axis=1)[None, :, :, None]
        top = jnp.maximum(top, sink)
    top = jnp.where(jnp.isfinite(top), top, 0.0)
    p = jnp.exp(joint - top)
    total = jnp.sum(p, axis=-1, keepdims=True)
    total = total if sink is None else total + jnp.exp(sink - top)
    out, start = 0.0, 0
    for i, (_, v, _) in enumerate(segments):
        part = p[..., start : start + v.shape[1]]
        acc = jnp.einsum("bkns,bske->bkne", part, v, precision=HIGHEST)
        out += acc if unfold is None or i else unfold(acc, jnp.sum(part, axis=-1))
        start += v.shape[1]
    out = out / jnp.where(total > 0, total, 1.0)
    out = out.reshape(batch, kv_heads, per, t, -1).transpose(0, 3, 1, 2, 4)
    return out.reshape(batch, t, heads, -1)
