"""Greedy generation: through the packed cache, or by plain attention over the whole sequence.

The two paths share nothing but the decoder's layers, so each checks the other: with an exact
cache they produce the same tokens.
"""

# pyright: strict, reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import cast

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Float32, Int, Int32

from turboq.cache import overflow
from turboq.cache.layer import KVLayer
from turboq.errors import TurboqError
from turboq_calibrate.measure.broken import first_broken, of_every_layer
from turboq_calibrate.measure.decode_cache import ByLayer, OnePool, feed, open_cache
from turboq_calibrate.models import Model, embed_tokens
from turboq_calibrate.models.decoder import exact_attend, run_head, run_layer


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

    With `layers` (of the decoder layers that own a cache, `plan.kv_layers(arrays)`) the prompt is
    prefilled into packed caches and every step appends one token: a few compiled functions whatever
    the number of steps. Without, every step runs the whole sequence, padded to its final length,
    through plain attention: slow, without any cache, the reference.

    `attention` names the kernel that reads the caches (`plugs.KERNELS`; None takes the first that
    supports the case), interpreted where its platform is missing; of one pool for all layers it
    reads single tokens, XLA the prompt.

    Raises:
      TurboqError: empty prompt, no steps, a sequence longer than the model's context, or logits
        that are not finite: names the layer, side, head and token that the caches cannot store.
      ValueError: not one of `layers` for every layer of the model that owns a cache.

    Examples:
      >>> import numpy as np
      >>> import turboq
      >>> import turboq_calibrate as tc
      >>> model = tc.load_model("embedded")
      >>> codec = turboq.TurboQuantMSE(dim=model.spec.layers[0].head_dim, bits=3)
      >>> plan = turboq.uniform_plan(tc.model_geometry(model), k=codec, v=codec)
      >>> prompt = np.asarray([model.tokenizer.encode("Python is a language")])
      >>> generated = tc.greedy(model, prompt, steps=2, layers=plan.kv_layers({}))
      >>> generated.tokens.shape, generated.logits is None
      ((1, 2), True)
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
    # The last token is returned but never written, hence one token less.
    cache = open_cache(layers, len(prompt), total - 1, attention)
    return _cached(model, prompt, steps, layers, cache, keep_logits)


def _cached(
    model: Model,
    prompt: Int32[np.ndarray, "B T"],
    steps: int,
    layers: Sequence[KVLayer],
    cache: ByLayer | OnePool,
    keep_logits: bool,
) -> Generation:
    length = prompt.shape[1]
    logits = feed(model, cache, jnp.asarray(prompt), 0)[:, 0]
    tokens: list[Int32[np.ndarray, "B"]] = []
    kept: list[Float32[np.ndarray, "B V"]] = []
    for step in range(steps):
        if (bad := first_bad(logits)) is not None:
            sequence = np.concatenate([prompt[bad], *(t[bad : bad + 1] for t in tokens)])
            cause = first_broken(model, of_every_layer(model, layers), sequence)
            raise not_finite(step, bad, cause or "nothing that the caches store is to blame")
        token = _choose(logits)
        tokens.append(token)
        if keep_logits:
            kept.append(np.asarray(logits))
        if step + 1 < steps:
            logits = feed(model, cache, jnp.asarray(token)[:, None], length + step)[:, 0]
    overflow.check(cache.counters())
    return _generation(tokens, kept, cache.nbytes())


def _plain(
    model: Model, prompt: Int32[np.ndarray, "B T"], steps: int, keep_logits: bool
) -> Generation:
    batch, length = prompt.shape
    capacity = length + steps - 1
    sequence = np.zeros((batch, capacity), np.int32)
    sequence[:, :length] = prompt
    positions = jnp.broadcast_to(jnp.arange(capacity, dtype=jnp.int32), (batch, capacity))
    tokens: list[Int32[np.ndarray, "B"]] = []
    kept: list[Float32[np.ndarray, "B V"]] = []
    for step in range(steps):
        at = length + step  # tokens that are real; what follows is padding no query before sees
        x = embed_tokens(model, jnp.asarray(sequence))
        for i, spec in enumerate(model.spec.layers):
            x, _ = run_layer(spec, model.layer(i), x, positions, exact_attend, None)
        last = jax.lax.dynamic_slice_in_dim(x, jnp.int32(at - 1), 1, axis=1)
        logits = cast(Array, run_head(model.spec, model.head_params(), last))[:, 0]
        if (bad := first_bad(logits)) is not None:
            raise not_finite(step, bad, "the model's own, without a cache: another --model_dtype?")
        tokens.append(_choose(logits))
        if keep_logits:
            kept.append(np.asarray(logits))
        if at < capacity:
            sequence[:, at] = tokens[-1]
    return _generation(tokens, kept, 0)


def first_bad(logits: Float[Array | np.ndarray, "B V"]) -> int | None:
    """The first sequence whose logits are not finite."""
    bad = ~np.isfinite(np.asarray(logits)).all(axis=-1)
    return int(bad.argmax()) if bad.any() else None


def not_finite(step: int, sequence: int, cause: object) -> TurboqError:
    return TurboqError(
        f"logits of generated token {step} of sequence {sequence} are not finite: {cause}"
    )


def _choose(logits: Float[Array, "B V"]) -> Int32[np.ndarray, "B"]:
    return np.asarray(logits).argmax(axis=-1).astype(np.int32)


def _generation(
    tokens: list[Int32[np.ndarray, "B"]],
    kept: list[Float32[np.ndarray, "B V"]],
    cache_bytes: int,
) -> Generation:
    return Generation(
        tokens=np.stack(tokens, axis=1),
        logits=np.stack(kept, axis=1) if kept else None,
        cache_bytes=cache_bytes,
    )
