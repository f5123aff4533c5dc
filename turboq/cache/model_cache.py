"""The cache of a whole model whose heads differ in data only: learned plans, one compiled program.

The stored tokens of all layers and heads lie in one pool of columns (`turboq.cache.columns`), each
head in exactly its own bits. Codecs are `transform`s of one kind, with their segments as data
(`turboq.codecs.transform_padded`), so every layer of one geometry runs the same program, whatever
the plan. Sinks, recent window and keys before RoPE are those of `turboq.cache.contiguous`.

    states, words = init(forms(layers), batch=1, capacity=4096)
    state, words, tail = write(states[0], words, k, v)
    out = attend(q, state, words, tail, q_positions=at, scale=scale)

This is the reference: tokens are decoded, then attended to.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from collections.abc import Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int, UInt32

from turboq.cache import columns as bits
from turboq.cache import contiguous, overflow
from turboq.cache.columns import Columns, field_planes
from turboq.cache.contiguous import GroupBuffers, Tail
from turboq.cache.exact_attention import Segment, attention_over_segments, causal
from turboq.cache.key_form import from_stored
from turboq.cache.layer import HeadGroup, KVLayer
from turboq.codecs.base import Arrays, Codec, Stored
from turboq.codecs.transform import Transform
from turboq.codecs.transform_padded import PaddedTransform, shared_layers
from turboq.numbers.packing import PAGE


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerForm:
    """A layer of padded codecs, and where its heads lie in the pool.

    `first` has the lanes at which the layer's two runs begin (`turboq.cache.columns`), `most` how
    many lanes they have in the layer that has most, `fewest` the columns of codes of the head of
    the model that has fewest.
    """

    layer: KVLayer
    k: Columns
    v: Columns
    first: Any  # int32 [2]
    most: tuple[int, int] = dataclasses.field(metadata={"static": True})
    fewest: int = dataclasses.field(metadata={"static": True})

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
    """All layers, and how many columns the pool has."""

    layers: tuple[LayerForm, ...]
    columns: int

    @property
    def bits_per_token(self) -> int:
        """Stored bits of one token in all layers."""
        return bits.bits_per_token([side for form in self.layers for side in (form.k, form.v)])


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerState:
    """What a layer keeps beside the pool: its form, exact tokens, and how many tokens there are."""

    form: LayerForm
    exact: GroupBuffers
    lengths: Any  # int32 [B]
    overflow: Any  # int32 [B]

    @property
    def nbytes(self) -> int:
        """Bytes of the exact tokens."""
        return sum(leaf.nbytes for leaf in jax.tree.leaves(self.exact))


def forms(layers: Sequence[KVLayer | None]) -> ModelForm | None:
    """The layers in the form of this cache; None where one is of other codecs, or has none."""
    kept = [layer for layer in layers if layer is not None]
    shared = shared_layers(kept) if len(kept) == len(layers) else None
    if shared is None:
        return None
    heads = [(_heads(layer, "k"), _heads(layer, "v")) for layer in kept]
    laid, count = bits.lay_out(heads)
    fewest = min(len(codes) for sides in heads for side in sides for codes, _ in side)
    runs = np.array([one.runs for one in laid], np.int32)  # [L, 2, 2]
    most_k, most_v = (int(n) for n in np.max(runs[:, :, 1] - runs[:, :, 0], axis=0))
    return ModelForm(
        layers=tuple(
            LayerForm(layer=layer, k=x.k, v=x.v, first=first, most=(most_k, most_v), fewest=fewest)
            for x, layer, first in zip(laid, shared, runs[:, :, 0], strict=True)
        ),
        columns=count,
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


def init(
    form: ModelForm, *, batch: int, capacity: int
) -> tuple[list[LayerState], UInt32[Array, "B P R C"]]:
    """Empty states and an empty pool for `capacity` tokens, rounded up to whole pages of 256.

    Raises:
      ValueError: `batch` or `capacity` is not positive.
    """
    if batch < 1 or capacity < 1:
        raise ValueError(f"{batch=} and {capacity=} must be at least 1")
    states = []
    for one in form.layers:
        group, layer = one.group, one.layer
        dtype = jnp.dtype(layer.policy.exact_dtype)
        exact = {
            f"{side}_{name}": jnp.zeros((batch, len(group.heads), tokens, codec.dim), dtype)
            for side, codec in (("k", group.k), ("v", group.v))
            for name, tokens in (("sinks", layer.policy.sinks), ("recent", layer.ring))
        }
        lengths, lost = (jnp.zeros((batch,), jnp.int32) for _ in range(2))
        state = LayerState(
            # The copy is the state's own to donate; the caller's arrays stay valid.
            form=jax.tree.map(jnp.array, one), exact=GroupBuffers(k={}, v={}, **exact),
            lengths=lengths, overflow=lost,
        )  # fmt: skip
        states.append(state)
    return states, bits.pool(batch, math.ceil(capacity / PAGE), form.columns)


def write(
    state: LayerState,
    words: UInt32[Array, "B P R C"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K E"],
    counts: Int[Array, "B"] | None = None,
) -> tuple[LayerState, UInt32[Array, "B P R C"], Tail]:
    """Encodes and stores the next T tokens of every sequence (`turboq.cache.contiguous.write`).

    Raises:
      TurboqError: outside jit, tokens that do not fit.
    """
    contiguous.check_room(state.lengths, words.shape[1] * PAGE, k.shape[1], counts)
    return _write(state, words, k, v, counts)


@jax.jit
def _write(state: LayerState, words, k, v, counts):
    layer, group, t = state.form.layer, state.form.group, k.shape[1]
    steps = jnp.arange(t, dtype=jnp.int32)
    counts = jnp.full((k.shape[0],), t, jnp.int32) if counts is None else counts
    capacity = jnp.int32(words.shape[1] * PAGE)
    fitting, lost = overflow.split(state.lengths, counts, capacity)
    positions = state.lengths[:, None] + steps[None, :]
    valid = steps[None, :] < fitting[:, None]
    found = contiguous.write_group(
        layer, group, state.exact, k, v, state.lengths, positions, valid, fitting, _encoded
    )
    for codec, side, columns in (
        (group.k, found.k, state.form.k),
        (group.v, found.v, state.form.v),
    ):
        words = bits.write(words, columns, _entries(codec, side), positions[:, 0], valid)
    exact = dataclasses.replace(found, k={}, v={})
    new = dataclasses.replace(
        state, exact=exact, lengths=state.lengths + fitting, overflow=state.overflow + lost
    )
    before, after = ((state.exact,), state.lengths), ((exact,), new.lengths)
    return new, words, contiguous.tail_of(layer, before, after, k, v, positions, valid)


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


def _read(codec: Codec, columns: Columns, words: UInt32[Array, "B P R C"]) -> Stored:
    """All slots of all heads of one side: field -> [K, B, S, width]."""
    count, planes = sum(f.width for f in codec.fields), max(f.bits for f in codec.fields)
    return _stored(codec, bits.read(words, columns, count, planes))


@functools.partial(jax.jit, static_argnames=("scale", "window", "softcap"))
def attend(
    q: Float[Array, "B T H D"],
    state: LayerState,
    words: UInt32[Array, "B P R C"],
    tail: Tail,
    *,
    q_positions: Int[Array, "B T"],
    scale: float,
    window: int | None = None,
    softcap: float | None = None,
) -> Float[Array, "B T H E"]:
    """Attention to what is stored: a query at t sees token s exactly if s < sinks or recent."""
    form, layer, group = state.form, state.form.layer, state.form.group
    k_codec, v_codec = form.codecs
    k = jax.vmap(k_codec.decode)(group.k_arrays, _read(k_codec, form.k, words))
    v = jax.vmap(v_codec.values)(group.v_arrays, _read(v_codec, form.v, words))
    slots = jnp.arange(k.shape[2], dtype=jnp.int32)[None]
    k = from_stored(layer, group.k_arrays, k.swapaxes(0, 1), slots)
    k, v = k.swapaxes(1, 2), jnp.moveaxis(v, 0, 2)  # [B, S, K, D]
    sinks = layer.policy.sinks
    held = jnp.where((slots >= sinks) & (slots < state.lengths[:, None]), slots, -1)
    seen = causal(held, window=window)

    def packed(at):
        return seen(at) & (slots[:, None, :] < layer.stored_until(at + 1)[:, :, None])

    first = jnp.broadcast_to(slots[:, :sinks], (len(q), sinks))
    first = jnp.where(first < state.lengths[:, None], first, -1)
    segments: list[Segment] = [(k, v, packed)]
    if sinks:
        exact = (state.exact.k_sinks, state.exact.v_sinks)
        own_k, own_v = (x.swapaxes(1, 2).astype(jnp.float32) for x in exact)
        segments.append((own_k, own_v, causal(first, window=window)))
    if tail.positions.shape[1]:
        recent = causal(tail.positions, window=window, lowest=sinks)

        def newest(at):
            new = tail.positions[:, None, :] >= layer.stored_until(at + 1)[:, :, None]
            return recent(at) & new

        segments.append((tail.k, tail.v, newest))
    unfold = jax.vmap(v_codec.unfold_output)

    def unfolded(acc, mass):
        acc, mass = (jnp.moveaxis(x, 1, 0) for x in (acc, mass))
        flat = unfold(
            group.v_arrays,
            acc.reshape(len(acc), -1, acc.shape[-1]),
            mass.reshape(len(mass), -1),
        )
        return jnp.moveaxis(flat.reshape(*acc.shape[:-1], -1), 0, 1)

    return attention_over_segments(
        q, segments, scale=scale, q_positions=q_positions, softcap=softcap, unfold=unfolded
    )


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Fresh:
    """A layer whose cache is made where it is used, of a pool for all layers: for one prefill."""

    form: LayerForm
    columns: int = dataclasses.field(metadata={"static": True})

    def init(self, batch: int, capacity: int) -> tuple[LayerState, UInt32[Array, "B P R C"]]:
        """An empty state and pool."""
        one = ModelForm(layers=(self.form,), columns=self.columns)
        (state,), words = init(one, batch=batch, capacity=capacity)
        return state, words


def fresh(layers: Sequence[KVLayer | None]) -> list[Fresh] | None:
    """All layers so, or None as of `forms`."""
    form = forms(layers)
    return form and [Fresh(form=one, columns=form.columns) for one in form.layers]


def nbytes(states: Sequence[LayerState], words: UInt32[Array, "B P R C"]) -> int:
    """Bytes of all live token buffers."""
    return words.nbytes + sum(state.nbytes for state in states)
