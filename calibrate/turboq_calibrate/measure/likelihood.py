"""How likely texts find what follows, through packed caches: many pairs, in batches.

    log p(continuation | context) = sum_i log p(c_i | context, c_<i)

Every token is written to the cache and read back from it, as an engine does. Pairs of like length
are read together in chunks of one size (`generate_many`).
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float, Int

from turboq.cache import overflow
from turboq.cache.layer import KVLayer
from turboq.errors import TurboqError
from turboq_calibrate.cost.metrics import log_softmax
from turboq_calibrate.measure.decode_cache import feed, open_cache
from turboq_calibrate.measure.generate_many import CHUNK
from turboq_calibrate.models import Model

Pair = tuple[Sequence[int], Sequence[int]]  # (context, continuation), one token each at least


def log_likelihoods(
    model: Model,
    layers: Sequence[KVLayer],
    pairs: Sequence[Pair],
    *,
    batch: int = 8,
    chunk: int = CHUNK,
    step: Callable[[int], None] = lambda done: None,
) -> list[tuple[float, bool]]:
    """(log-probability in nats, whether greedy decoding writes it) of every continuation.

    Args:
      step: called with how many pairs a batch has done.

    Raises:
      TurboqError: an empty context or continuation, a pair beyond the model's context (the last
        token is read by nothing), predictions that are not finite.
    """
    for n, (context, continuation) in enumerate(pairs):
        if not (len(context) and len(continuation)):
            raise TurboqError(f"pair {n}: context and continuation need one token at least")
        model.spec.check_length(len(context) + len(continuation) - 1, f"pair {n}:")
    if not pairs:
        return []
    rows = [np.array([*a, *b], np.int32) for a, b in pairs]
    sizes = np.array([len(row) - 1 for row in rows])
    starts = np.array([len(a) - 1 for a, _ in pairs])
    found: list[tuple[float, bool]] = [(0.0, True)] * len(pairs)
    order = np.argsort(sizes, kind="stable")
    batch, chunk = min(batch, len(rows)), min(chunk, int(sizes.max()))
    for at in range(0, len(rows), batch):
        members = order[at : at + batch]
        filled = np.concatenate([members, np.repeat(members[-1:], batch - len(members))])
        cache = open_cache(layers, batch, int(sizes.max()))
        logp, greedy = np.zeros(batch), np.ones(batch, bool)
        for first in range(0, int(sizes[filled].max()), chunk):
            part = _cut([rows[i] for i in filled], first, chunk + 1)
            counts = np.clip(sizes[filled] - first, 0, chunk).astype(np.int32)
            where = first + np.arange(chunk)[None]
            asked = (where >= starts[filled][:, None]) & (where < sizes[filled][:, None])
            logits = feed(
                model, cache, jnp.asarray(part[:, :-1]), first,
                last=chunk if asked.any() else 1, counts=jnp.asarray(counts),
            )  # fmt: skip
            if asked.any():
                each, right = jax.device_get(
                    _score(logits, jnp.asarray(part[:, 1:]), jnp.asarray(asked))
                )
                logp += each.sum(axis=1, dtype=np.float64)
                greedy &= right.all(axis=1)
        overflow.check(cache.counters())
        for row, i in enumerate(members):
            if not np.isfinite(logp[row]):
                raise TurboqError(f"pair {i}: predictions are not finite")
            found[i] = float(logp[row]), bool(greedy[row])
        step(len(members))
    return found


def _cut(rows: Sequence[np.ndarray], first: int, length: int) -> Int[np.ndarray, "B n"]:
    parts = [row[first : first + length] for row in rows]
    return np.stack([np.pad(part, (0, length - len(part))) for part in parts])


@jax.jit
def _score(
    logits: Float[Array, "B T V"], target: Int[Array, "B T"], asked: Bool[Array, "B T"]
) -> tuple[Float[Array, "B T"], Bool[Array, "B T"]]:
    """log p of every target that is asked for, else 0; whether it is the arg-max, else yes."""
    logp = jnp.take_along_axis(jax.vmap(log_softmax)(logits), target[..., None], axis=-1)[..., 0]
    right = jnp.argmax(logits, axis=-1) == target
    return jnp.where(asked, logp, 0.0), right | ~asked
