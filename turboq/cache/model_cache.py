"""The cache of a whole model whose heads differ in data only: learned plans, one compiled program.

The stored tokens of all layers and heads lie in one pool of columns (`turboq.cache.columns`), each
head in exactly its own bits. Codecs are `transform`s of one kind, with their segments as data
(`turboq.codecs.transform_padded`), so every layer of one geometry runs the same program, whatever
the plan. Sinks, recent window and keys before RoPE are those of `turboq.cache.contiguous`. Layers
of a sliding window have a pool of their own, which holds the pages that the window needs.

    form = forms(layers)
    states, pools = init(form, batch=1, capacity=4096)
    states, pools = holding(form, states, pools, new=k.shape[1])  # before the first layer writes
    state, words, tail = write(states[i], pools[form.pool_of[i]], k, v)
    out = attend(q, state, words, tail, q_positions=at, scale=scale)

This is the reference: tokens are decoded, then attended to.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from turboq.cache import columns as bits
from turboq.cache import contiguous, joint, overflow, windows
from turboq.cache.columns import Columns, field_planes
from turboq.cache.contiguous import GroupBuffers, Tail
from turboq.cache.exact_attention import Segment, Unfold, attention_over_segments, causal
from turboq.cache.key_form import from_stored
from turboq.cache.layer import HeadGroup, KVLayer
from turboq.codecs.as_transform import layer_as_transforms
from turboq.codecs.base import Arrays, Codec, Stored
from turboq.codecs.transform import Transform
from turboq.codecs.transform_padded import PaddedTransform, shared_layers
from turboq.numbers.packing import PAGE


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerForm:
    """A layer of padded codecs, and where its heads lie in the pool.

    `first` has the lanes at which the layer's two runs begin (`turboq.cache.columns`), and the one
    behind them, `most` how many lanes they have in the layer that has most, `fewest` the columns of
    codes of the head of the model that has fewest, `widest` those of the widest K and V, for every
    place among joined heads (K of all, V of all).
    """

    layer: KVLayer
    k: Columns
    v: Columns
    first: Any  # int32 [3]
    most: tuple[int, int] = dataclasses.field(metadata={"static": True})
    fewest: int = dataclasses.field(metadata={"static": True})
    widest: tuple[int, ...] = dataclasses.field(metadata={"static": True})

    @property
    def group(self) -> HeadGroup:
        return self.layer.groups[0]

    @property
    def codecs(self) -> tuple[PaddedTransform, PaddedTransform]:
        """Of K and V."""
        k, v = self.group.k, self.group.v
        assert isinstance(k, PaddedTransform)
        assert isinstance(v, PaddedTransform)
        return k, v


@dataclasses.dataclass(frozen=True, kw_only=True)
class ModelForm:
    """All layers, and of every pool its window, its columns and the most tokens of a sequence."""

    layers: tuple[LayerForm, ...]
    pool_of: tuple[int, ...]  # of each layer
    windows: tuple[int | None, ...]
    columns: tuple[int, ...]

    @property
    def bits_per_token(self) -> int:
        """Stored bits of one token in all layers."""
        return bits.bits_per_token([side for form in self.layers for side in (form.k, form.v)])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class SharedPages:
    """Where sequences have their pages in a pool [1, N, R, C] that they share."""

    table: Any  # int32 [B, P], from the first token on
    room: Any  # int32 [B], slots of a sequence's own pages


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerState:
    """What a layer keeps beside the pool: its form, exact tokens, and how many tokens there are."""

    form: LayerForm
    exact: GroupBuffers
    lengths: Any  # int32 [B]
    overflow: Any  # int32 [B]
    dropped: Any = None  # int32 [B], position of the pool's slot 0; None: 0, nothing is given up
    shared: SharedPages | None = None  # None: words [B, P, R, C] are each sequence's own pages

    @property
    def first(self) -> Any:
        """Position of slot 0: int32 [B], or 0."""
        return 0 if self.dropped is None else self.dropped

    @property
    def table(self) -> Any:
        """Of shared pages, or None."""
        return None if self.shared is None else self.shared.table

    def pages(self, words: UInt32[Array, "N P R C"]) -> int:
        """Pages of a sequence."""
        return bits.pages_of(words, self.table)

    def room(self, words: UInt32[Array, "N P R C"]) -> Any:
        """The position behind the last that a sequence's pages hold: int32 [] or [B]."""
        if self.shared is not None:
            return self.shared.room
        return jnp.int32(words.shape[1] * PAGE) + self.first

    @property
    def nbytes(self) -> int:
        """Bytes of the exact tokens."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.exact))


def forms(layers: Sequence[KVLayer | None], *, tables: bool = False) -> ModelForm | None:
    """The layers in the form of this cache; None where one is of other codecs, or has none.

    With `tables` TurboQuant and `per_head` are taken too, as the transforms that they are. Where
    all heads are alike, caches and kernels of their own read them faster (`cache.contiguous`).
    """
    kept = [layer for layer in layers if layer is not None]
    kept = [layer_as_transforms(layer) for layer in kept] if tables else kept
    shared = shared_layers(kept) if len(kept) == len(layers) else None
    if shared is None:
        return None
    heads = [(_heads(layer, "k"), _heads(layer, "v")) for layer in kept]
    fewest = min(len(codes) for sides in heads for side in sides for codes, _ in side)
    widest = {n: _widest(heads, kept, n) for n in {layer.joint_heads for layer in kept}}
    kinds = list(dict.fromkeys(layer.window for layer in kept))
    out, columns = {}, []
    for window in kinds:
        own = [i for i, layer in enumerate(kept) if layer.window == window]
        laid, count = bits.lay_out(heads[i] for i in own)
        runs = np.array([one.runs for one in laid], np.int32)  # [L, 2, 2]
        most_k, most_v = (int(n) for n in np.max(runs[:, :, 1] - runs[:, :, 0], axis=0))
        firsts = np.concatenate([runs[:, :, 0], runs[:, 1:, 1]], axis=1)
        for i, x, first in zip(own, laid, firsts, strict=True):
            out[i] = LayerForm(
                layer=shared[i], k=x.k, v=x.v, first=first, most=(most_k, most_v), fewest=fewest,
                widest=widest[kept[i].joint_heads],
            )  # fmt: skip
        columns.append(count)
    return ModelForm(
        layers=tuple(out[i] for i in range(len(kept))),
        pool_of=tuple(kinds.index(layer.window) for layer in kept),
        windows=tuple(kinds),
        columns=tuple(columns),
    )


def _widest(heads, layers: Sequence[KVLayer], joined: int | None) -> tuple[int, ...]:
    """`LayerForm.widest`, of the layers that join as many heads."""
    alike = [own for own, x in zip(heads, layers, strict=True) if x.joint_heads == joined]
    return tuple(
        max(len(codes) for sides in alike for codes, _ in sides[side][place :: joined or 1])
        for side in (0, 1)
        for place in range(joined or 1)
    )


def _heads(layer: KVLayer, side: str) -> list[bits.Head]:
    """Columns of every head of one side, in order."""
    heads = {h: _planes(getattr(g, side)) for g in layer.groups for h in g.heads}
    return [heads[h] for h in sorted(heads)]


def _planes(codec: Transform) -> bits.Head:
    """Columns of one head: codes in the order of the codec's fields, then start and gain."""
    codes, rest, coordinate, entry = [], [], 0, codec.dim
    for field in codec.fields:
        if field.name.startswith("codes"):
            codes += field_planes(coordinate, field.width, field.bits)
            coordinate += field.width
        else:
            rest += field_planes(entry, field.width, field.bits)
            entry += field.width
    return codes, rest


Pools = list[UInt32[Array, "B _ R _"]]
TPU_LANES = 128


def init(
    form: ModelForm, *, batch: int, capacity: int, lanes: int | None = None
) -> tuple[list[LayerState], Pools]:
    """Empty states and empty pools for `capacity` tokens, rounded up to whole pages of 256.

    A pool of a window holds the pages that one query needs.

    Args:
      lanes: what the width of a pool is a multiple of. None: on a TPU 128, the tiles of its memory,
        so that no kernel copies the pool to pad it; elsewhere 1.

    Raises:
      ValueError: `batch` or `capacity` is not positive.
    """
    if batch < 1 or capacity < 1:
        raise ValueError(f"{batch=} and {capacity=} must be at least 1")
    counts = [windows.pages_held(window, capacity) for window in form.windows]
    whole = math.ceil(capacity / PAGE)
    states = []
    for one, pool in zip(form.layers, form.pool_of, strict=True):
        lengths, lost, dropped = (jnp.zeros((batch,), jnp.int32) for _ in range(3))
        state = LayerState(
            # The copy is the state's own to donate; the caller's arrays stay valid.
            form=jax.tree.map(jnp.array, one), exact=exact_of(one, batch),
            lengths=lengths, overflow=lost, dropped=dropped if counts[pool] < whole else None,
        )  # fmt: skip
        states.append(state)
    widths = [lanes_of(n, lanes) for n in form.columns]
    return states, [bits.pool(batch, *sizes) for sizes in zip(counts, widths, strict=True)]


def exact_of(form: LayerForm, rows: int) -> GroupBuffers:
    """Sinks and recent tokens of a layer for so many sequences, empty."""
    group, layer = form.group, form.layer
    dtype = jnp.dtype(layer.policy.exact_dtype)
    exact = {
        f"{side}_{name}": jnp.zeros((rows, len(group.heads), tokens, codec.dim), dtype)
        for side, codec in (("k", group.k), ("v", group.v))
        for name, tokens in (("sinks", layer.policy.sinks), ("recent", layer.ring))
    }
    return GroupBuffers(k={}, v={}, **exact)


def lanes_of(columns: int, multiple: int | None = None) -> int:
    """The width of a pool (`init`)."""
    multiple = multiple or (TPU_LANES if jax.default_backend() == "tpu" else 1)
    return -(-columns // multiple) * multiple


def holding(
    form: ModelForm, states: list[LayerState], pools: Pools, *, new: int
) -> tuple[list[LayerState], Pools]:
    """States and pools with the pages that the next `new` queries of all layers need.

    Pages that no window needs are given up; those that new tokens need come. Call it before the
    first layer writes `new` tokens, and after the last one with new=1, so that nothing is left of
    a chunk but windows. All layers have as many tokens at that time.
    """
    states, pools = list(states), list(pools)
    for i, window in enumerate(form.windows):
        own = [n for n, pool in enumerate(form.pool_of) if pool == i]
        first = states[own[0]]
        if window is None or first.dropped is None:
            continue
        count = -(-(window + new - 2) // PAGE) + 1
        move = _move_in_place if pools[i].shape[1] == count else _move
        pools[i], dropped = move(pools[i], first.dropped, first.lengths, window, count)
        for n in own:  # each its own: a state is donated
            states[n] = dataclasses.replace(states[n], dropped=jnp.copy(dropped))
    return states, pools


def _moved(words, dropped, lengths, window: int, count: int):
    old, first = words.shape[1], windows.first_needed(window, lengths)
    given_up = (first - dropped) // PAGE

    def move(words):
        return windows.moved(words, given_up, old, count, axis=1)

    if count == old:  # most tokens begin no page
        return jax.lax.cond(jnp.any(given_up > 0), move, lambda words: words, words), first
    return move(words), first


_move = jax.jit(_moved, static_argnums=(3, 4))
_move_in_place = jax.jit(_moved, static_argnums=(3, 4), donate_argnums=0)


# Puts T tokens of every sequence, or counts[b] of them (None: all), into state and pool.
Put = Callable[..., tuple[LayerState, UInt32[Array, "N P R C"]]]


def write(
    state: LayerState,
    words: UInt32[Array, "N P R C"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K E"],
    counts: Int[Array, "B"] | None = None,
    by: Put | None = None,
) -> tuple[LayerState, UInt32[Array, "N P R C"], Tail]:
    """Encodes and stores the next T tokens of every sequence (`turboq.cache.contiguous.write`).

    `by` encodes and stores them (default: XLA, `put`).

    Raises:
      TurboqError: outside jit, tokens that do not fit.
    """
    if state.shared is None:
        length, room = state.lengths - state.first, words.shape[1] * PAGE
        contiguous.check_room(length, room, k.shape[1], counts)
    return _write(state, words, k, v, counts, by or put)


@functools.partial(jax.jit, static_argnames=("by",))
def _write(state: LayerState, words, k, v, counts, by: Put):
    new, words = by(state, words, k, v, counts)
    before, after = ((state.exact,), state.lengths), ((new.exact,), new.lengths)
    steps = jnp.arange(k.shape[1], dtype=jnp.int32)[None, :]
    valid = steps < (new.lengths - state.lengths)[:, None]
    positions = state.lengths[:, None] + steps
    return new, words, contiguous.tail_of(
        state.form.layer, before, after, k, v, positions, valid
    )  # fmt: skip


def put(
    state: LayerState,
    words: UInt32[Array, "N P R C"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K E"],
    counts: Int[Array, "B"] | None,
    encode: contiguous.Store | None = None,
) -> tuple[LayerState, UInt32[Array, "N P R C"]]:
    """State and pool with the next tokens; `encode` gives what is stored (None: the codec's own).

    Tokens that do not fit are counted.
    """
    layer, group, t = state.form.layer, state.form.group, k.shape[1]
    steps = jnp.arange(t, dtype=jnp.int32)
    counts = jnp.full((k.shape[0],), t, jnp.int32) if counts is None else counts
    fitting, lost = overflow.split(state.lengths, counts, state.room(words))
    positions = state.lengths[:, None] + steps[None, :]
    valid = steps[None, :] < fitting[:, None]
    found = contiguous.write_group(
        layer, group, state.exact, k, v, state.lengths, positions, valid, fitting,
        encode or _encoded,
    )  # fmt: skip
    for codec, side, columns in (
        (group.k, found.k, state.form.k),
        (group.v, found.v, state.form.v),
    ):
        start = positions[:, 0] - state.first
        words = bits.write(words, columns, _entries(codec, side), start, valid, state.table)
    exact = dataclasses.replace(found, k={}, v={})
    new = dataclasses.replace(
        state, exact=exact, lengths=state.lengths + fitting, overflow=state.overflow + lost
    )
    return new, words


def _encoded(codec, arrays: Arrays, stored: Stored, x, positions, valid) -> Stored:
    """A `contiguous.Store` that stores nothing yet."""
    return jax.vmap(codec.encode, in_axes=(0, 1), out_axes=1)(arrays, x)


def _entries(codec: Codec, stored: Stored) -> UInt32[Array, "*n E"]:
    """What is stored as unsigned numbers, codes first."""

    def whole(x: Array) -> Array:
        if x.dtype == jnp.float16:
            x = jax.lax.bitcast_convert_type(x, jnp.uint16)
        return x.astype(jnp.uint32)

    return jnp.concatenate([whole(stored[field.name]) for field in codec.fields], axis=-1)


def _stored(codec: Codec, entries: UInt32[Array, "*n E"]) -> Stored:
    """The inverse of `_entries`."""
    out, at = {}, 0
    for field in codec.fields:
        part = entries[..., at : at + field.width]
        at += field.width
        if field.packed:
            out[field.name] = part.astype(jnp.uint8)
        else:
            out[field.name] = jax.lax.bitcast_convert_type(part.astype(jnp.uint16), jnp.float16)
    return out


def _read(codec: Codec, columns: Columns, words: UInt32[Array, "N P R C"], table) -> Stored:
    """All slots of all heads of one side: field -> [K, B, S, width]."""
    count, planes = sum(f.width for f in codec.fields), max(f.bits for f in codec.fields)
    return _stored(codec, bits.read(words, columns, count, planes, table))


@functools.partial(jax.jit, static_argnames=("scale", "window", "softcap"))
def attend(
    q: Float[Array, "B T H D"],
    state: LayerState,
    words: UInt32[Array, "N P R C"],
    tail: Tail,
    *,
    q_positions: Int[Array, "B T"],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
    sink_logits: Float[Array, "H"] | None = None,
) -> Float[Array, "B T H E"]:
    """Attention to what is stored: a query at t sees token s exactly if s < sinks or recent."""
    layer = state.form.layer
    check_window(state, window)
    count = state.pages(words) * PAGE
    slots = jnp.arange(count, dtype=jnp.int32)[None] + jnp.reshape(state.first, (-1, 1))
    k, v = decoded(state.form, words, slots, state.table)
    sinks = layer.policy.sinks
    held = jnp.where((slots >= sinks) & (slots < state.lengths[:, None]), slots, -1)
    seen = causal(held, window=window)

    def packed(at):
        return seen(at) & (slots[:, None, :] < layer.stored_until(at + 1)[:, :, None])

    first = jnp.broadcast_to(jnp.arange(sinks, dtype=jnp.int32)[None], (len(q), sinks))
    first = jnp.where(first < state.lengths[:, None], first, -1)
    segments: list[Segment] = [(layer.keys(k, v), v, packed)]
    if sinks:
        exact = (state.exact.k_sinks, state.exact.v_sinks)
        own_k, own_v = (x.swapaxes(1, 2).astype(jnp.float32) for x in exact)
        segments.append((layer.keys(own_k, own_v), own_v, causal(first, window=window)))
    if tail.positions.shape[1]:
        recent = causal(tail.positions, window=window, lowest=sinks)

        def newest(at):
            new = tail.positions[:, None, :] >= layer.stored_until(at + 1)[:, :, None]
            return recent(at) & new

        segments.append((layer.keys(tail.k, tail.v), tail.v, newest))
    return attention_over_segments(
        q, segments, scale=scale, q_positions=q_positions, softcap=softcap,
        unfold=unfold_of(state.form), sink_logits=sink_logits,
    )  # fmt: skip


def decoded(
    form: LayerForm,
    words: UInt32[Array, "n p R C"],
    positions: Int[Array, "#B S"],
    table: Int[Array, "B P"] | None = None,
) -> tuple[Float[Array, "B S K D"], Float[Array, "B S K E"]]:
    """Keys of all slots, which stand at these positions, and values in the space of their codes.

    Of pages by themselves, or of those that a `table` has. `unfold_of` takes sums of the values to
    outputs.
    """
    layer, group = form.layer, form.group
    k_codec, v_codec = form.codecs
    k = jax.vmap(k_codec.decode)(group.k_arrays, _read(k_codec, form.k, words, table))
    decode_v = v_codec.decode if unfold_of(form) is None else v_codec.values
    v = jax.vmap(decode_v)(group.v_arrays, _read(v_codec, form.v, words, table))
    if layer.joint_heads is None:
        k = from_stored(layer, group.k_arrays, k.swapaxes(0, 1), positions).swapaxes(0, 1)
    k, v = jnp.moveaxis(k, 0, 2), jnp.moveaxis(v, 0, 2)  # [B, S, K, D]
    return joint.from_units(layer, k, v, positions)


def unfold_of(form: LayerForm) -> Unfold | None:
    """What sums of values, and of their weights, are worth; None: as they are.

    Neither keys of latent attention nor values that are read with keys are in code space.
    """
    if form.layer.latent or form.layer.joint_heads is not None:
        return None
    _, v_codec = form.codecs

    def unfolded(acc, mass):
        acc, mass = (jnp.moveaxis(x, 1, 0) for x in (acc, mass))
        flat = jax.vmap(v_codec.unfold_output)(
            form.group.v_arrays,
            acc.reshape(len(acc), -1, acc.shape[-1]),
            mass.reshape(len(mass), -1),
        )
        return jnp.moveaxis(flat.reshape(*acc.shape[:-1], -1), 0, 1)

    return unfolded


def check_window(state: LayerState, window: int | None) -> None:
    """Refuses a window of more tokens than the layer keeps."""
    kept = state.form.layer.window
    if kept is not None and (window is None or window > kept):
        raise ValueError(f"{window=} sees more than the {kept} tokens that the layer keeps")


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Fresh:
    """A layer whose cache is made where it is used, of a pool for all layers: for one prefill.

    All tokens are held, whatever the window, while their queries look.
    """

    form: LayerForm
    columns: int = dataclasses.field(metadata={"static": True})

    def init(self, batch: int, capacity: int) -> tuple[LayerState, UInt32[Array, "N P R C"]]:
        """An empty state and pool."""
        one = ModelForm(layers=(self.form,), pool_of=(0,), windows=(None,), columns=(self.columns,))
        (state,), (words,) = init(one, batch=batch, capacity=capacity)
        return state, words


def fresh(layers: Sequence[KVLayer | None]) -> list[Fresh] | None:
    """All layers so, or None as of `forms`."""
    form = forms(layers)
    return form and [
        Fresh(form=one, columns=form.columns[pool])
        for one, pool in zip(form.layers, form.pool_of, strict=True)
    ]


def nbytes(states: Sequence[LayerState], pools: Pools) -> int:
    """Bytes of all live token buffers."""
    return sum(words.nbytes for words in pools) + sum(state.nbytes for state in states)
