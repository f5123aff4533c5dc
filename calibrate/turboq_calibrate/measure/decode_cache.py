"""The packed cache of a whole model while it decodes: made once, fed some tokens at a time.

Layers without keys and values (gated delta-nets) have their state beside it. A layer that reads the
cache of another appends the same tokens to it as it was before them, and drops what that makes.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from turboq.cache import contiguous as caches
from turboq.cache import model_cache
from turboq.cache.layer import KVLayer
from turboq_calibrate.measure.attention_plugs import Cached, Pooled, cached_by, pool_by
from turboq_calibrate.models import Model, embed_tokens, recurrence
from turboq_calibrate.models.decoder import Params, exact_attend, run_head, run_layer
from turboq_calibrate.models.spec import LayerSpec
from turboq_kernels import columns


def shared(spec: LayerSpec) -> bool:
    """Whether the layer reads a cache that others read too."""
    return spec.lends or spec.borrows_cache_of is not None


class Recurrent:
    """The states of recurrent layers, by layer; none before the first token.

    And the caches that several layers read as they were before the tokens at hand, by owner.
    """

    def __init__(self):
        self.recurrent: dict[int, recurrence.State] = {}
        self.lent: dict[int, Any] = {}

    def found(self, i: int, spec: LayerSpec, state: Any) -> Any:
        """What a layer appends to: the owner's `state`, of a borrower that of before its owner."""
        if spec.lends:
            self.lent[i] = state
        return state if spec.owns_cache else self.lent[i]

    def mix(
        self, i: int, spec: LayerSpec, params: Params, x: Array, positions: Array, *,
        keep: bool, counts: Array | None = None,
    ) -> Array:  # fmt: skip
        assert spec.recurrent is not None
        state = self.recurrent.get(i, recurrence.empty(spec.recurrent, len(x)))
        state = state._replace(counts=_copied(counts))
        x, state = run_layer(spec, params, x, positions, exact_attend, state, donate=not keep)
        if not keep:
            self.recurrent[i] = state
        return x


class ByLayer(Recurrent):
    """A cache per layer, of any codecs; a program per kind of layer."""

    def __init__(self, layers: Sequence[KVLayer], batch: int, capacity: int, attend: Callable):
        super().__init__()
        self.attend = attend
        self.states = [
            # The copy is ours to donate; the caller's arrays stay valid.
            Cached(
                layer=jax.tree.map(jnp.copy, layer),
                cache=caches.init(layer, batch=batch, capacity=capacity),
            )
            for layer in layers
        ]

    def hold(self, new: int) -> None:
        """Room for the windows of the next `new` queries: each layer's write and plug see to it."""

    def layer(
        self, i: int, spec: LayerSpec, params: Params, x: Array, positions: Array, *,
        keep: bool, counts: Array | None = None,
    ) -> Array:  # fmt: skip
        found = self.found(i, spec, self.states[i])
        # Its own copy of the counts: the state is donated.
        given = dataclasses.replace(found, counts=_copied(counts))
        donate = not (keep or shared(spec))
        x, state = run_layer(spec, params, x, positions, self.attend, given, donate=donate)
        if not keep and spec.owns_cache:
            self.states[i] = state
        return x

    def counters(self) -> list[Any]:
        """Whatever counts an overflow."""
        return [state.cache for state in self.states]

    def nbytes(self) -> int:
        return sum(state.cache.nbytes for state in self.states)


class OnePool(Recurrent):
    """One cache of all layers, whose heads differ in data only: one program per kind of layer."""

    def __init__(
        self, form: model_cache.ModelForm, batch: int, capacity: int, attention: str | None
    ):
        super().__init__()
        self.form, self.attend = form, pool_by(attention)
        self.states, self.pools = model_cache.init(form, batch=batch, capacity=capacity)
        self.matrices = [
            None if attention == "xla" else columns.prepare(state, self.pools[pool], attention)
            for state, pool in zip(self.states, form.pool_of, strict=True)
        ]

    def hold(self, new: int) -> None:
        self.states, self.pools = model_cache.holding(self.form, self.states, self.pools, new=new)

    def layer(
        self, i: int, spec: LayerSpec, params: Params, x: Array, positions: Array, *,
        keep: bool, counts: Array | None = None,
    ) -> Array:  # fmt: skip
        pool = self.form.pool_of[i]
        found = self.found(i, spec, (self.states[i], self.pools[pool], self.matrices[i]))
        state = Pooled(layer=found[0], words=found[1], matrices=found[2], counts=_copied(counts))
        donate = not (keep or shared(spec))
        x, state = run_layer(spec, params, x, positions, self.attend, state, donate=donate)
        if (
            not keep and spec.owns_cache
        ):  # a layer reads its own columns only: the next one needs none of these
            self.states[i], self.pools[pool] = state.layer, state.words
            self.matrices[i] = state.matrices
        return x

    def counters(self) -> list[Any]:
        return list(self.states)

    def nbytes(self) -> int:
        return model_cache.nbytes(self.states, self.pools)


def _copied(counts: Array | None) -> Array | None:
    return None if counts is None else jnp.copy(counts)


def open_cache(
    layers: Sequence[KVLayer], batch: int, capacity: int, attention: str | None = None
) -> ByLayer | OnePool:
    """An empty cache for `capacity` tokens a sequence; one pool of all layers where it can be.

    `layers` are those that own a cache, in order.
    `attention` names the kernel that reads it (`attention_plugs.KERNELS`).
    """
    form = model_cache.forms(layers)
    if form is not None:
        return OnePool(form, batch, capacity, attention)
    return ByLayer(layers, batch, capacity, cached_by(attention))


def feed(
    model: Model,
    cache: ByLayer | OnePool,
    tokens: Int[Array, "B T"],
    start: int | Int[Array, "B"],
    *,
    last: int = 1,
    keep: bool = False,
    counts: Int[Array, "B"] | None = None,
) -> Float[Array, "B n V"]:
    """Writes the tokens at positions `start`, ... and returns the logits of the `last` of them.

    `keep` leaves the cache as it was: what follows a prompt can be tried more than once. With
    `counts` only the first counts[b] tokens of sequence b are real, and the rest is padding that
    leaves no trace; last=1 are then the logits of the last one that is real (of none, meaningless),
    last=T those of all.

    Raises:
      ValueError: another `last` with `counts`; a cache of another number of layers than own one.
    """
    owners = sum(spec.owns_cache for spec in model.spec.layers)
    if len(cache.states) != owners:
        raise ValueError(
            f"layers of the cache, {len(cache.states)}, must be those that own one, {owners}"
        )
    batch, count = tokens.shape
    first = jnp.reshape(jnp.asarray(start, jnp.int32), (-1, 1))
    at = first + jnp.arange(count, dtype=jnp.int32)[None]
    positions = jnp.broadcast_to(at, (batch, count))
    x = embed_tokens(model, tokens)
    cache.hold(count)
    number = {
        i: n for n, i in enumerate(i for i, s in enumerate(model.spec.layers) if s.owns_cache)
    }
    for i, spec in enumerate(model.spec.layers):
        if spec.recurrent is not None:
            x = cache.mix(i, spec, model.layer(i), x, positions, keep=keep, counts=counts)
            continue
        own = number[spec.cache_at(i)]
        x = cache.layer(own, spec, model.layer(i), x, positions, keep=keep, counts=counts)
    cache.lent.clear()
    if count > 1:  # what only the chunk's own queries needed is given up
        cache.hold(1)
    if counts is not None and last not in (1, count):
        raise ValueError(f"{last=} with counts must be 1 or {count}")
    if counts is None or last == count:
        x = x[:, -last:]
    else:
        x = jnp.take_along_axis(x, jnp.maximum(counts - 1, 0)[:, None, None], axis=1)
    return run_head(model.spec, model.head_params(), x)
