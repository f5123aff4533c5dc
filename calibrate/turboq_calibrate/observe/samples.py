"""Raw keys, values and query moments of a short run, for codecs that are fitted to samples.

Small by design (a few windows): most codecs need statistics only, which stream (`capture`).
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
import numpy as np
from jaxtyping import Float

from turboq.errors import TurboqError
from turboq.numbers.rope import unrotate
from turboq_calibrate.models.decoder import exact_attend
from turboq_calibrate.models.model import Model, forward


@dataclasses.dataclass(frozen=True, kw_only=True)
class LayerSamples:
    """One layer: k and v [K, n, D], and E[q q^T] of each KV head's queries [K, D, D].

    Keys and queries are those of attention, after RoPE, unless `pre_rope`.
    """

    k: Float[np.ndarray, "K N D"]
    v: Float[np.ndarray, "K N E"]
    q_moment: Float[np.ndarray, "K D D"]
    pre_rope: bool = False


def collect_samples(
    model: Model,
    tokens: np.ndarray,
    *,
    skip: int = 4,
    positions: np.ndarray | None = None,
    pre_rope: bool = False,
) -> list[LayerSamples]:
    """Samples of every layer over windows tokens [B, T], without each window's first `skip`.

    `positions` [B, T] default to 0..T-1. Holds all of them on the host: 4 bytes times
    B * T * (D_k + D_v) * K * L. `pre_rope` gives keys and queries before their rotary embedding.

    Raises:
      TurboqError: a layer's keys or values are not finite.
    """
    at = None if positions is None else jnp.asarray(positions)
    states = forward(model, tokens, attend=_keep_pre_rope if pre_rope else _keep, positions=at)[1]
    out = []
    for index, state in enumerate(states):
        k, v, q = (np.asarray(x)[:, skip:] for x in state)
        if not (np.all(np.isfinite(k)) and np.all(np.isfinite(v))):
            raise TurboqError(f"layer {index}: keys or values hold NaN or Inf")
        heads = k.shape[2]
        grouped = q.reshape(-1, heads, q.shape[2] // heads, q.shape[3])
        moment = np.einsum("nkgd,nkge->kde", grouped, grouped, dtype=np.float64)
        out.append(
            LayerSamples(
                k=_by_head(k),
                v=_by_head(v),
                q_moment=moment / (len(grouped) * grouped.shape[2]),
                pre_rope=pre_rope,
            )
        )
    return out


def _keep(spec, q, k, v, positions, state):
    out, _ = exact_attend(spec, q, k, v, positions, None)
    return out, (k.astype(jnp.float32), v.astype(jnp.float32), q.astype(jnp.float32))


def _keep_pre_rope(spec, q, k, v, positions, state):
    out, (k, v, q) = _keep(spec, q, k, v, positions, state)
    if spec.rope is not None:
        k, q = (unrotate(spec.rope, x, positions[:, :, None]) for x in (k, q))
    return out, (k, v, q)


def _by_head(x: Float[np.ndarray, "B T K D"]) -> Float[np.ndarray, "K N D"]:
    return np.ascontiguousarray(np.moveaxis(x, 2, 0).reshape(x.shape[2], -1, x.shape[3]))
