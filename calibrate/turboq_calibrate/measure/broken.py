"""Where a plan first stores something that is not finite: layer, side, head, token, and the fix."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from typing import Any

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from turboq.cache.layer import KVLayer
from turboq.cache.simulate import simulate
from turboq.codecs.base import Codec
from turboq_calibrate.measure.attention_plugs import simulated_attend
from turboq_calibrate.models import Model, default_positions, embed_tokens
from turboq_calibrate.models.decoder import run_layer
from turboq_calibrate.models.spec import LayerSpec


@dataclasses.dataclass(frozen=True, kw_only=True)
class Broken:
    """One vector that a plan stores as Inf or NaN; `norm` is the vector's own."""

    layer: int
    side: str
    head: int
    token: int
    norm: float
    codec: Codec

    def __str__(self) -> str:
        return (
            f"layer {self.layer}, {self.side} of head {self.head}, token {self.token}"
            f" (norm {self.norm:.3g}): {self.remedy}"
        )

    @property
    def remedy(self) -> str:
        if not np.isfinite(self.norm):
            return "it is not finite before it is quantized: another --model_dtype may help"
        if self.codec.config().get("scale_dtype") == "float16":
            return "its scale exceeds float16: plan with --scale_dtype=bfloat16"
        return f"codec {self.codec.name!r} cannot store it: plan with another codec"


def of_every_layer(model: Model, owned: Sequence[KVLayer]) -> list[KVLayer | None]:
    """For every layer of the model what it owns; `owned` are of those that own a cache."""
    left = iter(owned)
    return [next(left) if spec.owns_cache else None for spec in model.spec.layers]


def first_broken(
    model: Model, layers: list[KVLayer | None], window: Int[np.ndarray, "T"]
) -> Broken | None:
    """The first layer's largest stored vector that is not finite, or None.

    The plan runs once more over one window, layer by layer: only where something is known to be
    wrong.
    """
    tokens = window[None]
    positions, x = default_positions(jnp.asarray(tokens)), embed_tokens(model, tokens)
    for i, spec in enumerate(model.spec.layers):
        layer = layers[spec.cache_at(i)]
        x, seen = run_layer(spec, model.layer(i), x, positions, _look, layer)
        for side in ("k", "v") if spec.owns_cache and layer is not None else ():
            broken, norms = (np.asarray(a)[0] for a in seen[side])  # [T, K]
            if not broken.any():
                continue
            # Of a block of tokens that broke together the largest is the one to blame; NaN sorts
            # as the largest of all.
            size = np.where(broken, np.nan_to_num(norms, nan=np.inf, posinf=np.inf), -1.0)
            token, head = (int(j) for j in np.unravel_index(np.argmax(size), size.shape))
            assert layer is not None
            group = next(g for g in layer.groups if head in g.heads)
            codec = group.k if side == "k" else group.v
            return Broken(
                layer=i, side=side, head=head, token=token, norm=float(norms[token, head]),
                codec=codec,
            )  # fmt: skip
    return None


def _look(
    spec: LayerSpec,
    q: Float[Array, "B T H Q"],
    k: Float[Array, "B T K D"],
    v: Float[Array, "B T K E"],
    positions: Int[Array, "B T"],
    state: Any,
    sinks: Float[Array, "H"] | None = None,
) -> tuple[Float[Array, "B T H E"], Any]:
    """Plug: as `simulated_attend`. Out: which vectors are stored broken, and norms, [B, T, K]."""
    out, _ = simulated_attend(spec, q, k, v, positions, state, sinks)
    if state is None:
        return out, None
    at = jnp.arange(k.shape[1], dtype=jnp.int32)
    read = (at >= state.policy.sinks) & (at < state.stored_until(jnp.int32(k.shape[1])))

    def of(x, stored):
        broken = ~jnp.all(jnp.isfinite(stored), axis=-1) & read[None, :, None]
        return broken, jnp.linalg.norm(x.astype(jnp.float32), axis=-1)

    return out, {
        side: of(x, stored)
        for side, x, stored in zip("kv", (k, v), simulate(state, k, v), strict=True)
    }
