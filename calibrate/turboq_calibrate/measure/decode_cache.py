"""The packed cache of a whole model while it decodes: made once, fed some tokens at a time."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from turboq.cache import contiguous as caches
from turboq.cache import model_cache
from turboq.cache.layer import KVLayer
from turboq_calibrate.measure.attention_plugs import Cached, Pooled, cached_by, pool_attend
from turboq_calibrate.models import Model, embed_tokens
from turboq_calibrate.models.decoder import Params, run_head, run_layer
from turboq_calibrate.models.spec import LayerSpec


class ByLayer:
    """A cache per layer, of any codecs; a program per kind of layer."""

    def __init__(self, layers: Sequence[KVLayer], batch: int, capacity: int, attend: Callable):
        self.attend = attend
        self.states = [
            # The copy is ours to donate; the caller's arrays stay valid.
            Cached(
                layer=jax.tree.map(jnp.copy, layer),
                cache=caches.init(layer, batch=batch, capacity=capacity),
            )
            for layer in layers
        ]

    def layer(
        self, i: int, spec: LayerSpec, params: Params, x: Array, positions: Array, *, keep: bool
    ) -> Array:
        x, state = run_layer(
            spec, params, x, positions, self.attend, self.states[i], donate=not keep
        )
        if not keep:
            self.states[i] = state
        return x

    def counters(self) -> list[Any]:
        """Whatever counts an overflow."""
        return [state.cache for state in self.states]

    def nbytes(self) -> int:
        return sum(state.cache.nbytes for state in self.states)


class OnePool:
    """One cache of all layers, whose heads differ in data only: one program per kind of layer."""

    def __init__(self, form: model_cache.ModelForm, batch: int, capacity: int):
        self.states, self.words = model_cache.init(form, batch=batch, capacity=capacity)

    def layer(
        self, i: int, spec: LayerSpec, params: Params, x: Array, positions: Array, *, keep: bool
    ) -> Array:
        state = Pooled(layer=self.states[i], words=self.words)
        x, state = run_layer(spec, params, x, positions, pool_attend, state, donate=not keep)
        if not keep:  # a layer reads its own columns only: the next one needs none of these
            self.states[i], self.words = state.layer, state.words
        return x

    def counters(self) -> list[Any]:
        return list(self.states)

    def nbytes(self) -> int:
        return model_cache.nbytes(self.states, self.words)


def open_cache(
    layers: Sequence[KVLayer], batch: int, capacity: int, attention: str | None = None
) -> ByLayer | OnePool:
    """An empty cache for `capacity` tokens a sequence; one pool of all layers where it can be.

    `attention` names the kernel that reads it, layer by layer (`attention_plugs.KERNELS`).
    """
    form = model_cache.forms(layers) if attention is None else None
    if form is not None:
        return OnePool(form, batch, capacity)
    return ByLayer(layers, batch, capacity, cached_by(attention))


def feed(
    model: Model,
    cache: ByLayer | OnePool,
    tokens: Int[Array, "B T"],
    start: int,
    *,
    last: int = 1,
    keep: bool = False,
) -> Float[Array, "B n V"]:
    """Writes the tokens at positions `start`, ... and returns the logits of the `last` of them.

    `keep` leaves the cache as it was: what follows a prompt can be tried more than once.
    """
    batch, count = tokens.shape
    at = start + jnp.arange(count, dtype=jnp.int32)
    positions = jnp.broadcast_to(at, (batch, count))
    x = embed_tokens(model, tokens)
    for i, spec in enumerate(model.spec.layers):
        x = cache.layer(i, spec, model.layer(i), x, positions, keep=keep)
    return run_head(model.spec, model.head_params(), x[:, -last:])
