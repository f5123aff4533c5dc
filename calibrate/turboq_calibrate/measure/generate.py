"""Greedy generation: through the packed cache, or by plain attention over the whole sequence.

The two paths share nothing but the decoder's layers, so each checks the other: with an exact
cache they produce the same tokens.
"""

from __future__ import annotations

import dataclasses
from collections.abc import Callable, Sequence
from typing import Any

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32

from turboq.cache import contiguous as caches
from turboq.cache import model_cache, overflow
from turboq.cache.layer import KVLayer
from turboq.errors import TurboqError
from turboq_calibrate.measure.attention_plugs import Cached, Pooled, cached_by, pool_by
from turboq_calibrate.measure.broken import first_broken
from turboq_calibrate.models import Model, embed_tokens
from turboq_calibrate.models.decoder import Params, exact_attend, run_head, run_layer
from turboq_calibrate.models.spec import LayerSpec
from turboq_kernels import columns


@dataclasses.dataclass(frozen=True, kw_only=True)
class Generation:
    """Generated tokens, and the logits each was chosen from (None unless asked for)."""

    tokens: Int32[np.ndarray, "B steps"]
    logits: Float32[np.ndarray, "B steps V"] | None
    cache_bytes: int  # live token buffers at the end; 0 on the plain path


def greedy(
    model: Model,
    prompt: Int[np.ndarray, "B T"],
    steps: int,
    *,
    layers: Sequence[KVLayer] | None = None,
    keep_logits: bool = False,
    attention: str | None = None,
) -> Generation:
    """Appends `steps` tokens to every prompt, each the arg-max (lower token on a tie).

    With `layers` (one `KVLayer` per decoder layer, `[plan.kv_layer(i, arrays) for i in ...]`) the
    prompt is prefilled into packed caches and every step appends one token: three compiled
    functions whatever the number of steps. Without, every step runs the whole sequence, padded to
    its final length, through plain attention: slow, without any cache, the reference.

    `attention` names the kernel that reads the caches (`plugs.KERNELS`; None takes the first that
    supports the case), interpreted where its platform is missing; of one pool for all layers it
    reads single tokens, XLA the prompt.

    Raises:
      TurboqError: empty prompt, no steps, a sequence longer than the model's context, or logits
        that are not finite: names the layer, side, head and token that the caches cannot store.
    """
    prompt = np.asarray(prompt, np.int32)
    if prompt.shape[0] < 1 or prompt.shape[1] < 1:
        raise TurboqError(f"prompt of shape {prompt.shape} must hold at least one token")
    if steps < 1:
        raise TurboqError(f"{steps=} must be 1 or more")
    total = prompt.shape[1] + steps
    if total > model.spec.context:
        raise TurboqError(
            f"{prompt.shape[1]} prompt tokens + {steps=} exceed the model's context of "
            f"{model.spec.context}"
        )
    if layers is None:
        return _plain(model, prompt, steps, keep_logits)
    if len(layers) != len(model.spec.layers):
        raise ValueError(f"{len(layers)=} must be the number of layers, {len(model.spec.layers)}")
    pooled = attention in (None, *columns.IMPLEMENTATIONS)
    form = model_cache.forms(layers) if pooled else None
    # The last token is returned but never written, hence one token less.
    batch, capacity = len(prompt), total - 1
    if form is not None:
        cache = _OnePool(form, batch, capacity, attention)
    else:
        cache = _ByLayer(layers, batch, capacity, cached_by(attention))
    return _cached(model, prompt, steps, layers, cache, keep_logits)


class _ByLayer:
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

    def hold(self, new: int) -> None:
        """Room for the windows of the next `new` queries: each layer's write and plug see to it."""

    def layer(self, i: int, spec: LayerSpec, params: Params, x: Array, positions: Array) -> Array:
        x, self.states[i] = run_layer(
            spec, params, x, positions, self.attend, self.states[i], donate=True
        )
        return x

    def counters(self) -> list[Any]:
        """Whatever counts an overflow."""
        return [state.cache for state in self.states]

    def nbytes(self) -> int:
        return sum(state.cache.nbytes for state in self.states)


class _OnePool:
    """One cache of all layers, whose heads differ in data only: one program per kind of layer."""

    def __init__(
        self, form: model_cache.ModelForm, batch: int, capacity: int, attention: str | None
    ):
        self.form, self.attend = form, pool_by(attention)
        self.states, self.pools = model_cache.init(form, batch=batch, capacity=capacity)
        kernel = attention not in (None, "xla") or jax.default_backend() != "cpu"
        self.matrices = [
            columns.prepare(state, self.pools[pool]) if kernel else None
            for state, pool in zip(self.states, form.pool_of, strict=True)
        ]

    def hold(self, new: int) -> None:
        self.states, self.pools = model_cache.holding(self.form, self.states, self.pools, new=new)

    def layer(self, i: int, spec: LayerSpec, params: Params, x: Array, positions: Array) -> Array:
        pool = self.form.pool_of[i]
        state = Pooled(layer=self.states[i], words=self.pools[pool], matrices=self.matrices[i])
        x, state = run_layer(spec, params, x, positions, self.attend, state, donate=True)
        self.states[i], self.pools[pool] = state.layer, state.words
        self.matrices[i] = state.matrices
        return x

    def counters(self) -> list[Any]:
        return list(self.states)

    def nbytes(self) -> int:
        return model_cache.nbytes(self.states, self.pools)


def _cached(
    model: Model,
    prompt: np.ndarray,
    steps: int,
    layers: Sequence[KVLayer],
    cache: _ByLayer | _OnePool,
    keep_logits: bool,
) -> Generation:
    batch, length = prompt.shape
    positions = jnp.broadcast_to(jnp.arange(length, dtype=jnp.int32), (batch, length))
    logits = _step(model, jnp.asarray(prompt), positions, cache)
    tokens, kept = [], []
    for step in range(steps):
        if (bad := _first_bad(logits)) is not None:
            sequence = np.concatenate([prompt[bad], *(t[bad : bad + 1] for t in tokens)])
            cause = first_broken(model, list(layers), sequence)
            raise _not_finite(step, bad, cause or "nothing that the caches store is to blame")
        token = _choose(logits)
        tokens.append(token)
        if keep_logits:
            kept.append(np.asarray(logits))
        if step + 1 < steps:
            where = jnp.full((batch, 1), length + step, jnp.int32)
            logits = _step(model, jnp.asarray(token)[:, None], where, cache)
    overflow.check(cache.counters())
    return _generation(tokens, kept, cache.nbytes())


def _step(
    model: Model,
    tokens: Int[Array, "B T"],
    positions: Int[Array, "B T"],
    cache: _ByLayer | _OnePool,
) -> Float[Array, "B V"]:
    """Writes the tokens into the cache, which is updated; returns the last one's logits."""
    x = embed_tokens(model, tokens)
    cache.hold(tokens.shape[1])
    for i, spec in enumerate(model.spec.layers):
        x = cache.layer(i, spec, model.layer(i), x, positions)
    if tokens.shape[1] > 1:  # what only the chunk's own queries needed is given up
        cache.hold(1)
    return run_head(model.spec, model.head_params(), x[:, -1:])[:, 0]


def _plain(model: Model, prompt, steps: int, keep_logits: bool) -> Generation:
    batch, length = prompt.shape
    capacity = length + steps - 1
    sequence = np.zeros((batch, capacity), np.int32)
    sequence[:, :length] = prompt
    positions = jnp.broadcast_to(jnp.arange(capacity, dtype=jnp.int32), (batch, capacity))
    tokens, kept = [], []
    for step in range(steps):
        at = length + step  # tokens that are real; what follows is padding no query before sees
        x = embed_tokens(model, jnp.asarray(sequence))
        for i, spec in enumerate(model.spec.layers):
            x, _ = run_layer(spec, model.layer(i), x, positions, exact_attend, None)
        last = jax.lax.dynamic_slice_in_dim(x, jnp.int32(at - 1), 1, axis=1)
        logits = run_head(model.spec, model.head_params(), last)[:, 0]
        if (bad := _first_bad(logits)) is not None:
            raise _not_finite(step, bad, "the model's own, without a cache: another --model_dtype?")
        tokens.append(_choose(logits))
        if keep_logits:
            kept.append(np.asarray(logits))
        if at < capacity:
            sequence[:, at] = tokens[-1]
    return _generation(tokens, kept, 0)


def _first_bad(logits: Float[Array, "B V"]) -> int | None:
    """The first sequence whose logits are not finite."""
    bad = ~np.isfinite(np.asarray(logits)).all(axis=-1)
    return int(bad.argmax()) if bad.any() else None


def _not_finite(step: int, sequence: int, cause: object) -> TurboqError:
    return TurboqError(
        f"logits of generated token {step} of sequence {sequence} are not finite: {cause}"
    )


def _choose(logits: Float[Array, "B V"]) -> Int32[np.ndarray, "B"]:
    return np.asarray(logits).argmax(axis=-1).astype(np.int32)


def _generation(tokens, kept, cache_bytes: int) -> Generation:
    return Generation(
        tokens=np.stack(tokens, axis=1),
        logits=np.stack(kept, axis=1) if kept else None,
        cache_bytes=cache_bytes,
    )
