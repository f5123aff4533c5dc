"""Attention plugs of a quantized cache: simulated in one pass, or through the real packed cache.

Each is one module-level function, so that it compiles once per (LayerSpec, codecs, shapes); what
differs between layers (arrays, buffers) travels in the state. The simulated one and the packed ones
for evaluation are compiled by themselves, for `decoder.run_parts`.
"""

from __future__ import annotations

import dataclasses
import functools
from collections.abc import Callable
from typing import Any

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int

from turboq.cache import contiguous as caches
from turboq.cache import model_cache
from turboq.cache.layer import KVLayer
from turboq.cache.simulate import attend_to, simulate
from turboq.errors import TurboqError
from turboq.numbers.packing import PAGE
from turboq_calibrate.models.decoder import exact_attend
from turboq_calibrate.models.spec import LayerSpec
from turboq_kernels import columns
from turboq_kernels.attention import cache_attention
from turboq_kernels.encode import api as encoding
from turboq_kernels.encode import encode

HIGHEST = jax.lax.Precision.HIGHEST

# Which kernel reads the packed cache, by name; elsewhere than on its platform it is interpreted.
KERNELS: dict[str, tuple[str, ...]] = {
    "xla": ("cpu", "gpu", "tpu"),
    "mosaic_tpu": ("tpu",),
    "triton": ("gpu",),
}


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Cached:
    """A layer's codecs and its packed cache: the state of `cache_attend`.

    Of the next tokens of sequence b only the first `counts[b]` are written; None: all.
    """

    layer: KVLayer
    cache: caches.LayerCache
    counts: Any = None  # int32 [B]


@jax.tree_util.register_dataclass
@dataclasses.dataclass(frozen=True, kw_only=True)
class Pooled:
    """A layer's part of a model's cache and the pool it shares: the state of `pool_by`.

    `counts` as in `Cached`.
    """

    layer: model_cache.LayerState
    words: Array
    counts: Any = None  # int32 [B]
    matrices: columns.LinearLayer | None = None  # for kernels; None: they are not needed


def simulated_attend(
    spec: LayerSpec,
    q: Float[Array, "B T H Q"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K E"],
    positions: Int[Array, "B T"],
    state: Any,
    sinks: Float[Array, "H"] | None = None,
) -> tuple[Float[Array, "B T H E"], Any]:
    """Plug: quantize and dequantize K and V. In: a `KVLayer` (None: exact), out: `head_errors`."""
    if state is None:
        return exact_attend(spec, q, k, v, positions, None, sinks)
    exact, stored = ((state.keys(k, v), v) for k, v in ((k, v), simulate(state, k, v)))
    out = attend_to(
        state.policy, state.block, q, exact, stored,
        scale=spec.scale, window=spec.window, softcap=spec.softcap, sink_logits=sinks,
    )  # fmt: skip
    return out, head_errors(q, exact, stored, state.policy.sinks, spec.scale)


def packed_attend(
    spec: LayerSpec,
    q: Float[Array, "B T H Q"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K E"],
    positions: Int[Array, "B T"],
    state: Any,
    sinks: Float[Array, "H"] | None = None,
) -> tuple[Float[Array, "B T H E"], Any]:
    """Like `simulated_attend`, but through a fresh packed cache: one prefill of T tokens."""
    return packed_by(None)(spec, q, k, v, positions, state, sinks)


@functools.cache
def packed_by(implementation: str | None) -> Callable[..., tuple[Array, Any]]:
    """`packed_attend` with a named kernel (`KERNELS`), interpreted where it cannot run."""
    attend = cached_by(implementation)

    @functools.partial(jax.jit, static_argnames=("spec",))
    def plug(spec: LayerSpec, q, k, v, positions, state, sinks=None):
        if state is None:
            return exact_attend(spec, q, k, v, positions, None, sinks)
        if isinstance(state, model_cache.Fresh):
            layer = state.form.layer
            part, words = state.init(k.shape[0], k.shape[1])
            pooled = Pooled(layer=part, words=words)
            out, _ = pool_by(implementation)(spec, q, k, v, positions, pooled, sinks)
        else:
            layer = state
            empty = caches.init(layer, batch=k.shape[0], capacity=k.shape[1])
            out, _ = attend(spec, q, k, v, positions, Cached(layer=layer, cache=empty), sinks)
        exact, stored = ((layer.keys(k, v), v) for k, v in ((k, v), simulate(layer, k, v)))
        return out, head_errors(q, exact, stored, layer.policy.sinks, spec.scale)

    return plug


@functools.cache
def pool_by(implementation: str | None) -> Callable[..., tuple[Array, Pooled]]:
    """`cached_by` where all layers share a pool (`turboq.cache.model_cache`).

    A named kernel, or what `columns.attend` prefers, reads and, if it is one that writes, encodes.

    Raises:
      TurboqError: an unknown name.
    """
    if implementation not in (None, *KERNELS):
        raise TurboqError(f"{implementation=} must be None or one of {tuple(KERNELS)}")
    interpret = jax.default_backend() not in KERNELS[implementation or "xla"]

    def writer(form: model_cache.LayerForm) -> dict[str, Any]:
        if implementation is None:
            return {}
        writes = implementation in columns.WRITERS
        if writes and columns.cannot_write(form, implementation) is None:
            return {"implementation": implementation, "interpret": interpret}
        return {"implementation": "xla"}

    def plug(spec: LayerSpec, q, k, v, positions, state: Pooled, sinks=None):
        layer, words, tail = columns.write(
            state.layer, state.words, k, v, state.counts, **writer(state.layer.form)
        )
        out = columns.attend(
            q, layer, words, tail, state.matrices, q_positions=positions,
            scale=spec.scale, window=spec.window, softcap=spec.softcap, sink_logits=sinks,
            implementation=implementation, interpret=interpret,
        )  # fmt: skip
        return out, dataclasses.replace(state, layer=layer, words=words)

    return plug


def cache_attend(
    spec: LayerSpec,
    q: Float[Array, "B T H Q"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K E"],
    positions: Int[Array, "B T"],
    state: Cached,
    sinks: Float[Array, "H"] | None = None,
) -> tuple[Float[Array, "B T H E"], Cached]:
    """Plug: append K and V to the packed cache, then attend to all it holds (prefill or a step)."""
    return cached_by(None)(spec, q, k, v, positions, state, sinks)


@functools.cache
def cached_by(implementation: str | None) -> Callable[..., tuple[Array, Cached]]:
    """`cache_attend` with a named kernel (`KERNELS`), interpreted where it cannot run.

    The kernel reads the cache; it also writes it if it can encode all codecs of the layer (XLA does
    otherwise, and writes the same up to the rounding of sums).

    Raises:
      TurboqError: an unknown name.
    """
    if implementation not in (None, *KERNELS):
        raise TurboqError(f"{implementation=} must be None or one of {tuple(KERNELS)}")
    interpret = jax.default_backend() not in KERNELS[implementation or "xla"]

    def writer(layer: KVLayer) -> dict[str, Any]:
        if implementation is None or encoding.unsupported(layer, PAGE, implementation) is None:
            return {"implementation": implementation, "interpret": interpret}
        return {"implementation": "xla"}

    def plug(spec: LayerSpec, q, k, v, positions, state: Cached, sinks=None):
        cache, tail = encode(
            state.layer, state.cache, k, v, counts=state.counts, **writer(state.layer)
        )
        assert isinstance(cache, caches.LayerCache)  # as it came
        out = cache_attention(
            q, state.layer, cache, tail, q_positions=positions,
            scale=spec.scale, window=spec.window, softcap=spec.softcap, sink_logits=sinks,
            implementation=implementation, interpret=interpret,
        )  # fmt: skip
        cache = caches.settled(state.layer, cache)
        return out, dataclasses.replace(state, cache=cache)

    return plug


@functools.partial(jax.jit, static_argnames=("sinks", "scale"))
def head_errors(
    q: Float[Array, "B T H D"],
    exact: tuple[Float[Array, "B T K D"], Float[Array, "B T K E"]],
    stored: tuple[Float[Array, "B T K D"], Float[Array, "B T K E"]],
    sinks: int,
    scale: float,
) -> dict[str, Float[Array, "B K"]]:
    """What quantization does to each KV head, over the tokens s >= sinks of each window.

    Keys are those that queries meet: of latent attention the latent vectors are part of them.
    With e = k_hat - k and C(.) the covariance over tokens (a constant shift of all keys changes no
    softmax, so means do not count) and M = mean of q q^T over positions and the group's queries:

      k_logit_mse = scale^2 tr(M C(e))           mean squared logit error, nats^2
      k_rel_mse   = tr C(e) / tr C(k)
      v_rel_mse   = sum |v_hat - v|^2 / sum |v|^2
    """
    k, v = (x.astype(jnp.float32) for x in exact)
    k_hat, v_hat = stored
    batch, tokens, kv_heads = k.shape[:3]
    counted = jnp.arange(tokens, dtype=jnp.int32) >= sinks
    # What does not count must not reach the sums: 0 * Inf is NaN.
    k_hat, v_hat = (
        jnp.where(counted[None, :, None, None], x_hat, x) for x_hat, x in ((k_hat, k), (v_hat, v))
    )
    weight = jnp.broadcast_to(counted.astype(jnp.float32)[None, :, None, None], (1, tokens, 1, 1))
    count = max(tokens - sinks, 1)

    def centred(x):
        mean = jnp.sum(x * weight, axis=1, keepdims=True) / count
        return (x - mean) * weight

    grouped = q.astype(jnp.float32).reshape(batch, tokens, kv_heads, -1, q.shape[-1])
    queries = grouped.shape[1] * grouped.shape[3]
    m = jnp.einsum("btkgd,btkge->bkde", grouped, grouped, precision=HIGHEST) / queries
    error, signal = centred(k_hat - k), centred(k)
    c = jnp.einsum("btkd,btke->bkde", error, error, precision=HIGHEST) / count
    energy = jnp.sum(jnp.square(v) * weight, axis=(1, 3))
    lost = jnp.sum(jnp.square(v_hat - v) * weight, axis=(1, 3))
    spread = jnp.sum(jnp.square(signal), axis=(1, 3))
    return {
        "k_logit_mse": jnp.sum(m * c, axis=(2, 3)) * scale**2,
        "k_rel_mse": jnp.sum(jnp.square(error), axis=(1, 3)) / jnp.where(spread > 0, spread, 1.0),
        "v_rel_mse": lost / jnp.where(energy > 0, energy, 1.0),
    }
