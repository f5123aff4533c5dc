"""Teacher forcing token by token through the packed cache: what an engine's decode computes.

One causal pass over a window (`teacher_forced`) states the same predictions; here every token of
the last positions is written to the cache and attends to it before the next one is known.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from turboq.cache.layer import KVLayer
from turboq_calibrate.cost import metrics
from turboq_calibrate.measure.decode_cache import feed, open_cache
from turboq_calibrate.models import Model
from turboq_calibrate.models.decoder import run_head


def step_by_step(
    model: Model,
    layers: Sequence[KVLayer | None],
    tokens: Int[np.ndarray, "B T"],
    exact: Float[Array, "B T M"],
    steps: int,
    step: Callable[[], None],
    attention: str | None = None,
) -> dict[str, np.ndarray]:
    """`metrics.compare` of the last `steps` positions that predict a token: name -> [B, steps].

    The tokens before them are prefilled. `exact` is the exact model's last hidden state; `step` is
    called after the prefill and after every token, `attention` names the kernel that reads the
    cache (`attention_plugs.KERNELS`).
    """
    owned = [layer for layer in layers if layer is not None]
    batch, length = tokens.shape
    first = length - 1 - steps
    cache = open_cache(owned, batch, length - 1, attention)
    if first:
        feed(model, cache, jnp.asarray(tokens[:, :first]), 0).block_until_ready()
    step()
    rows = []
    for t in range(first, length - 1):
        goal = jnp.asarray(tokens[:, t + 1])
        reference = metrics.reference(
            run_head(model.spec, model.head_params(), exact[:, t : t + 1])[:, 0], goal
        )
        logits = feed(model, cache, jnp.asarray(tokens[:, t : t + 1]), t)[:, 0]
        rows.append(jax.device_get(metrics.compare(reference, logits, goal)))
        step()
    return {name: np.stack([row[name] for row in rows], axis=1) for name in rows[0]}
