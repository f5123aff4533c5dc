"""The packed KV cache of one layer: a pytree of fixed-size buffers, jitted once.

Slot s of every buffer belongs to token position s. Every token is encoded when it is written, and
the first `sinks` and the last `recent` tokens are *also* kept exact; a codec that encodes blocks
of tokens does so when a whole block has left the recent window. What is encoded is never touched
again. Per head group the buffers are

    packed field     uint32 [B, N, capacity / 256, bits, 8, width]   (folded: `numbers.packing`)
    raw field        dtype  [B, N, capacity, width]                  (per block: capacity / block)
    exact sinks      dtype  [B, N, sinks, D]
    exact recent     dtype  [B, N, ring, D]                          at position mod ring

with N heads in the group and ring = recent + block - 1. A layer with `rope` has its keys encoded as
`turboq.cache.key_form` says, turned at their slot's position; exact ones stay as they come. Of a
layer with a window only the pages that it needs are there: slot s belongs to token `dropped` + s
(`turboq.cache.windows`). Appending a token never changes a shape: nothing is recompiled.

Raises:
  ValueError: `init` of no sequence or no token. TurboqError: `write` of tokens that do not fit.

Examples:
  >>> import jax.numpy as jnp
  >>> from turboq import TokenPolicy, TurboQuantMSE, contiguous, uniform_layer
  >>> codec = TurboQuantMSE(dim=64, bits=3)
  >>> layer = uniform_layer(kv_heads=2, k=codec, v=codec, policy=TokenPolicy())
  >>> cache = contiguous.init(layer, batch=1, capacity=256)
  >>> k = v = jnp.ones((1, 10, 2, 64))  # [B, T, K, D]
  >>> cache, tail = contiguous.write(layer, cache, k, v)
  >>> cache.lengths.tolist(), cache.nbytes == 256 * layer.bits_per_token // 8
  ([10], True)
"""

# pyright: strict, reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable
from typing import Any, cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from turboq.cache import joint, overflow, windows
from turboq.cache.key_form import to_stored
from turboq.cache.layer import HeadGroup, KVLayer, Leaves, in_head_order
from turboq.cache.simulate import check_heads, round_exact, take_heads
from turboq.codecs.base import Arrays, Codec, Stored
from turboq.errors import TurboqError
from turboq.numbers import packing


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class GroupBuffers:
    """Buffers of one head group."""

    k: Leaves
    v: Leaves
    k_sinks: Any
    v_sinks: Any
    k_recent: Any
    v_recent: Any


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerCache:
    """Cache of one layer for B sequences, which have `lengths[b]` tokens.

    The first `dropped[b]` of them, whole pages, no window reaches any more: they are not held.
    Their slots went to others; None: the buffers have `slots` for all `capacity` tokens.

    `overflow[b]` tokens were written behind the capacity: they are not stored, and what is
    computed from them is wrong. `turboq.cache.overflow.check` refuses such a cache.
    """

    groups: tuple[GroupBuffers, ...]
    lengths: Any  # int32 [B], never above the capacity
    overflow: Any  # int32 [B]
    capacity: int = dataclasses.field(metadata={"static": True})
    slots: int = dataclasses.field(metadata={"static": True})
    dropped: Any = None  # int32 [B]

    @property
    def first(self) -> Any:
        """Position of slot 0: int32 [B], or 0."""
        return 0 if self.dropped is None else self.dropped

    @property
    def nbytes(self) -> int:
        """Bytes of all live token buffers (counters of the B sequences not included)."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.groups))


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Tail:
    """Exact keys and values that queries may need instead of their quantized selves.

    A negative position is an empty slot. Without a recent window the tail has no slots.
    """

    k: Any  # float32 [B, R, K, D]
    v: Any  # float32 [B, R, K, E]
    positions: Any  # int32 [B, R]


# Encodes x [B, N, T, D] into the slots from positions[:, 0] on, where `valid`.
Store = Callable[[Codec, Arrays, Stored, Any, Any, Any], Stored]


def init(layer: KVLayer, *, batch: int, capacity: int) -> LayerCache:
    """An empty cache for `capacity` tokens per sequence, rounded up to whole pages of 256.

    A layer with a window holds the pages that one query needs.

    Raises:
      ValueError: `batch` or `capacity` is not positive, or a window over blocks of tokens that do
        not divide a page.
    """
    if batch < 1 or capacity < 1:
        raise ValueError(f"{batch=} and {capacity=} must be at least 1")
    joint.refuse(layer, "turboq.cache.contiguous")
    slots = windows.pages_held(layer.window, capacity) * packing.PAGE
    capacity = math.ceil(capacity / packing.PAGE) * packing.PAGE
    policy = layer.policy
    if slots < capacity and packing.PAGE % layer.block:
        raise ValueError(
            f"blocks of {layer.block} tokens must divide pages of {packing.PAGE} in a layer with a"
            " window: another codec, or smaller blocks"
        )

    def exact(group: HeadGroup, codec: Codec, tokens: int) -> Array:
        return jnp.zeros(
            (batch, len(group.heads), tokens, codec.dim), jnp.dtype(policy.exact_dtype)
        )

    groups = tuple(
        GroupBuffers(
            k=_empty(g.k, (batch, len(g.heads)), slots),
            v=_empty(g.v, (batch, len(g.heads)), slots),
            k_sinks=exact(g, g.k, policy.sinks),
            v_sinks=exact(g, g.v, policy.sinks),
            k_recent=exact(g, g.k, layer.ring),
            v_recent=exact(g, g.v, layer.ring),
        )
        for g in layer.groups
    )
    # Separate arrays: a cache is donated, and no buffer may be given twice.
    lengths, lost, dropped = (jnp.zeros((batch,), jnp.int32) for _ in range(3))
    return LayerCache(
        groups=groups, lengths=lengths, overflow=lost, capacity=capacity, slots=slots,
        dropped=dropped if slots < capacity else None,
    )  # fmt: skip


def settled(layer: KVLayer, cache: LayerCache) -> LayerCache:
    """The cache with no more pages than one more token of a layer with a window needs.

    Several tokens written at once need more while their queries look: `write` makes room for them,
    and after attention this gives it up. A cache that is not settled only takes more memory.
    """
    return cast(LayerCache, _holding(layer, cache, 1))


@functools.partial(jax.jit, static_argnames=("new",))
def _holding(layer: KVLayer, cache: LayerCache, new: int) -> LayerCache:
    """The cache with the pages that the next `new` queries need, and no others."""
    if cache.dropped is None or layer.window is None:
        return cache
    old = cache.slots // packing.PAGE
    count = windows.pages_held(layer.window, cache.capacity, new=new)
    first = windows.first_needed(layer.window, cache.lengths)
    given_up = (first - cache.dropped) // packing.PAGE

    def move(groups: tuple[GroupBuffers, ...]) -> tuple[GroupBuffers, ...]:
        def one(x: Array) -> Array:
            return windows.moved(x, given_up, old, count, axis=2)

        return tuple(
            dataclasses.replace(g, k=jax.tree.map(one, g.k), v=jax.tree.map(one, g.v))
            for g in groups
        )

    if count == old:  # most tokens begin no page
        groups = cast(
            tuple[GroupBuffers, ...],
            jax.lax.cond(jnp.any(given_up > 0), move, _same, cache.groups),
        )
    else:
        groups = move(cache.groups)
    return dataclasses.replace(cache, groups=groups, dropped=first, slots=count * packing.PAGE)


def check_room(
    lengths: Int[Array, "B"], capacity: int, tokens: int, counts: Int[Array, "B"] | None = None
) -> None:
    """Refuses, where lengths are known (outside jit), `tokens` or `counts` more than there is room.

    Raises:
      TurboqError: a sequence would outgrow the capacity.
    """
    known, more = overflow.known(lengths), overflow.known(tokens if counts is None else counts)
    if known is None or more is None:
        return
    more = np.broadcast_to(more, known.shape)
    b = int(np.argmax(known + more))
    if known[b] + more[b] > capacity:
        raise TurboqError(
            f"{known[b]} + {more[b]} tokens do not fit a cache of capacity {capacity}: "
            "create it with a larger capacity"
        )


def write(
    layer: KVLayer,
    cache: LayerCache,
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K E"],
    counts: Int[Array, "B"] | None = None,
    store: Store | None = None,
) -> tuple[LayerCache, Tail]:
    """Encodes and stores the next T tokens (one, or a prefill chunk) of every sequence.

    Only the first `counts[b]` of them are real (default: all); the rest is padding and leaves no
    trace. Writing one by one or in chunks gives equal bytes (with `layer.rope` up to the float32
    rounding of turning keys back, which may move a code).

    Inside jit no length is known: tokens past the capacity are counted in `overflow` instead of
    being stored, and `turboq.cache.overflow.check` says so, inside (checkify) or afterwards.

    `store` encodes and writes (default: XLA, through the codec's own `encode`).

    Raises:
      TurboqError: outside jit, tokens that do not fit.
    """
    check_room(cache.lengths, cache.capacity, k.shape[1], counts)
    return cast(tuple[LayerCache, Tail], _write(layer, cache, k, v, counts, store or store_encoded))


@functools.partial(jax.jit, static_argnames=("store",))
def _write(
    layer: KVLayer,
    cache: LayerCache,
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K E"],
    counts: Int[Array, "B"] | None,
    store: Store,
) -> tuple[LayerCache, Tail]:
    check_heads(layer, k.shape[2])
    batch, t = k.shape[:2]
    held = cast(LayerCache, _holding(layer, cache, t))
    steps = jnp.arange(t, dtype=jnp.int32)
    counts = jnp.full((batch,), t, jnp.int32) if counts is None else counts
    fitting, lost = overflow.split(held.lengths, counts, jnp.int32(held.capacity))
    positions = held.lengths[:, None] + steps[None, :]
    valid = steps[None, :] < fitting[:, None]
    store = store if held.dropped is None else _after(held.dropped, store)
    groups = tuple(
        write_group(layer, g, buffers, k, v, held.lengths, positions, valid, fitting, store)
        for g, buffers in zip(layer.groups, held.groups, strict=True)
    )
    new = dataclasses.replace(
        held, groups=groups, lengths=held.lengths + fitting, overflow=held.overflow + lost
    )
    before, after = (held.groups, held.lengths), (groups, new.lengths)
    return new, tail_of(layer, before, after, k, v, positions, valid)


def _empty(codec: Codec, lead: tuple[int, int], capacity: int) -> Stored:
    return {
        f.name: jnp.zeros(
            (*lead, capacity // packing.PAGE, *packing.kept_shape(f.bits, f.width)), jnp.uint32
        )
        if f.packed
        else jnp.zeros(
            (*lead, capacity // codec.block if f.per_block else capacity, f.width),
            jnp.dtype(f.dtype),
        )
        for f in codec.fields
    }


def write_group(
    layer: KVLayer,
    group: HeadGroup,
    buffers: GroupBuffers,
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K E"],
    start: Int[Array, "B"],
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
    counts: Int[Array, "B"],
    store: Store,
    rows: Int[Array, "B"] | None = None,
) -> GroupBuffers:
    """Writes tokens to one group: `store` puts encoded ones where this cache keeps them.

    `rows` of the exact buffers are those of these sequences (None: all rows, in order), for one
    token.
    """
    sinks, ring = layer.policy.sinks, layer.ring
    units = joint.to_units(layer, k, v, positions)
    k, v, k_coded, v_coded = (  # [B, N, T, D]
        take_heads(x, group.heads).swapaxes(1, 2) for x in (k, v, *units)
    )
    from_end = start[:, None] + counts[:, None] - positions
    sink = jnp.where(valid & (positions < sinks), positions, sinks)
    # Of a chunk longer than the ring only its last tokens are written: slots stay unique.
    slot = jnp.where(valid & (from_end <= ring), positions % max(ring, 1), ring)

    def side(
        codec: Codec, arrays: Arrays, stored: Stored, recent: Array, x: Array, store: Store
    ) -> Stored:
        if layer.block == 1:
            return store(codec, arrays, stored, x, positions, valid)
        return _store_blocks(layer, codec, arrays, stored, recent, x, start, counts, store)

    def k_store(
        codec: Codec, arrays: Arrays, stored: Stored, x: Array, positions: Array, valid: Array
    ) -> Stored:
        if layer.joint_heads is None:
            x = to_stored(layer, arrays, x, positions)
        return store(codec, arrays, stored, x, positions, valid)

    def exact(buffer: Array, x: Array, slots: Array) -> Array:
        if rows is None or buffer.shape[2] == 0:
            return cast(Array, _scatter(buffer, x, slots))
        new = x[:, :, 0].astype(buffer.dtype)
        return buffer.at[rows, :, slots[:, 0]].set(new, mode="drop")

    return GroupBuffers(
        k=side(group.k, group.k_arrays, buffers.k, buffers.k_recent, k_coded, k_store),
        v=side(group.v, group.v_arrays, buffers.v, buffers.v_recent, v_coded, store),
        k_sinks=exact(buffers.k_sinks, k, sink),
        v_sinks=exact(buffers.v_sinks, v, sink),
        k_recent=exact(buffers.k_recent, k, slot),
        v_recent=exact(buffers.v_recent, v, slot),
    )


def _after(dropped: Int[Array, "B"], store: Store) -> Store:
    """`store` into slots counted from token `dropped` on."""

    def shifted(
        codec: Codec, arrays: Arrays, stored: Stored, x: Array, positions: Array, valid: Array
    ) -> Stored:
        return store(codec, arrays, stored, x, positions - dropped[:, None], valid)

    return shifted


# K and V of one form, and layers alike, are traced once; nothing is left of the inner function.
_traced_once = functools.partial(jax.jit, inline=True)


@functools.partial(_traced_once, static_argnames=("codec",))
def store_encoded(
    codec: Codec,
    arrays: Arrays,
    stored: Stored,
    x: Float[Array, "B N T D"],
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
) -> Stored:
    """Encodes x [B, N, T, D], whole blocks of it, into slots positions[:, 0] onwards."""
    encoded = jax.vmap(codec.encode, in_axes=(0, 1), out_axes=1)(arrays, x)
    return put(codec, encoded, stored, positions, valid)


def put(
    codec: Codec,
    encoded: Stored,
    stored: Stored,
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
) -> Stored:
    """The fields that are in `encoded` [B, N, T, ...], written into slots positions[:, 0] on."""
    out: Stored = {}
    for field in codec.fields:
        if field.name not in encoded:
            continue
        new, old = encoded[field.name], stored[field.name]
        if field.packed:
            new = jnp.where(valid[:, None, :, None], new, jnp.uint8(0))  # OR with 0: no trace
            insert = jax.vmap(packing.insert, in_axes=(0, 0, None))  # heads
            words = packing.kept(old, field.width)
            slots = words.shape[2] * words.shape[-2] * packing.WORD_BITS
            new = new[:, :, :slots]  # what lies behind is padding, wherever it starts
            out[field.name] = packing.keep(jax.vmap(insert)(words, new, positions[:, 0]))
        else:
            every = codec.block if field.per_block else 1
            rows = positions[:, ::every] // every
            inside = valid[:, ::every] & (rows < old.shape[2])
            out[field.name] = _scatter(old, new, jnp.where(inside, rows, old.shape[2]))
    return out


def _store_blocks(
    layer: KVLayer,
    codec: Codec,
    arrays: Arrays,
    stored: Stored,
    recent: Float[Array, "B N R D"],
    x: Float[Array, "B N T D"],
    start: Int[Array, "B"],
    counts: Int[Array, "B"],
    store: Store,
) -> Stored:
    """Encodes the blocks that these tokens complete, from the exact ring and the new tokens."""
    first, end = layer.stored_until(start), layer.stored_until(start + counts)
    # T tokens complete ceil(T / block) blocks at most, wherever they start.
    length = math.ceil(x.shape[2] / layer.block) * layer.block
    positions = first[:, None] + jnp.arange(length, dtype=jnp.int32)[None, :]
    kept = jnp.take_along_axis(recent, (positions % layer.ring)[:, None, :, None], axis=2)
    ahead = jnp.clip(positions - start[:, None], 0, x.shape[2] - 1)
    new = jnp.take_along_axis(x, ahead[:, None, :, None], axis=2)
    old = (positions < start[:, None])[:, None, :, None]
    tokens = jnp.where(old, kept.astype(jnp.float32), round_exact(layer.policy, new))
    complete = positions < end[:, None]

    def encode(stored: Stored) -> Stored:
        return store(codec, arrays, stored, tokens, positions, complete)

    # Most appended tokens complete no block and encode nothing.
    return cast(Stored, jax.lax.cond(jnp.any(end > first), encode, _same, stored))


def _same[T](x: T) -> T:
    return x


@_traced_once
def _scatter(
    buffer: Array,  # [B, N, slots, C]
    rows: Array,  # [B, N, T, C]
    slots: Int[Array, "B T"],
) -> Array:
    """Writes row t of sequence b to slots[b, t]; a slot equal to the buffer's size writes none."""
    if buffer.shape[2] == 0:
        return buffer
    rows = rows.astype(buffer.dtype)

    def one_sequence(buffer: Array, rows: Array, slots: Array) -> Array:
        return buffer.at[:, slots].set(rows, mode="drop", unique_indices=False)

    return jax.vmap(one_sequence)(buffer, rows, slots)


Held = tuple[tuple[GroupBuffers, ...], Int[Array, "B"]]  # buffers, and tokens present


def tail_of(
    layer: KVLayer,
    old: Held,
    new: Held,
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K E"],
    positions: Int[Array, "B T"],
    valid: Bool[Array, "B T"],
) -> Tail:
    """Exact tokens that the queries of these new tokens may need."""
    ring, t = layer.ring, k.shape[1]
    (old_groups, old_lengths), (new_groups, new_lengths) = old, new
    if not ring:
        return Tail(k=k[:, :0], v=v[:, :0], positions=positions[:, :0])
    if t == 1:  # the ring already holds everything that the one query may see
        ring_k, ring_v = ring_of(layer, new_groups)
        return Tail(k=ring_k, v=ring_v, positions=ring_positions(new_lengths, ring))
    ring_k, ring_v = ring_of(layer, old_groups)
    return Tail(
        k=jnp.concatenate([ring_k, round_exact(layer.policy, k)], axis=1),
        v=jnp.concatenate([ring_v, round_exact(layer.policy, v)], axis=1),
        positions=jnp.concatenate(
            [ring_positions(old_lengths, ring), jnp.where(valid, positions, -1)], axis=1
        ),
    )


def ring_of(layer: KVLayer, groups: tuple[GroupBuffers, ...]) -> tuple[Array, Array]:
    """Exact recent keys and values of all heads, [B, ring, K, D], in ring order."""

    def gather(parts: list[Array]) -> Array:
        return in_head_order(layer, jnp.concatenate(parts, axis=1), 1).swapaxes(1, 2)

    return (
        gather([g.k_recent for g in groups]).astype(jnp.float32),
        gather([g.v_recent for g in groups]).astype(jnp.float32),
    )


def ring_positions(lengths: Int[Array, "B"], ring: int) -> Int[Array, "B R"]:
    """Position held by each ring slot after `lengths` tokens; -1 for a slot never written."""
    slots = jnp.arange(ring, dtype=jnp.int32)[None, :]
    last = lengths[:, None] - 1
    # Nothing divided is negative: one operation of a compiler, not several.
    return jnp.maximum(last - jax.lax.rem(last - slots + ring, jnp.int32(ring)), -1)
