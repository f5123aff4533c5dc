"""Rotary position embedding: frequencies from a `RopeSpec`, half-rotation layout.

    angle[t, i] = position[t] * inv_freq[i],  inv_freq[i] = theta^(-2 i / dim),  i < dim / 2
    (a, b) -> (a cos - b sin, b cos + a sin)  with a, b the two halves of the rotated channels

Su et al. 2021 (arXiv 2104.09864) eq. 34, channels paired as (i, i + dim/2) as Hugging Face does.
"""

from __future__ import annotations

import functools

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

from turboq.errors import TurboqError
from turboq_calibrate.models.spec import RopeSpec


def llama3_frequencies(
    inv_freq: np.ndarray, factor: float, low: float, high: float, context: float
) -> np.ndarray:
    """Llama 3.1 scaling: long wavelengths divided by `factor`, short kept, a linear ramp between.

    With r = context * inv_freq / (2 pi) turns over the original context and
    s = clip((r - low) / (high - low), 0, 1): inv_freq * ((1 - s) / factor + s).
    """
    turns = context * inv_freq / (2 * np.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return inv_freq * ((1.0 - smooth) / factor + smooth)


@functools.lru_cache(maxsize=64)
def inverse_frequencies(rope: RopeSpec) -> np.ndarray:
    """Radians per token of each channel pair, float32 [dim // 2], read-only."""
    if rope.dim % 2 or rope.dim <= 0:
        raise TurboqError(f"rotary dimension {rope.dim} must be even and positive")
    if rope.inv_freq is not None:
        inv_freq = np.asarray(rope.inv_freq, np.float64)
    else:
        inv_freq = rope.theta ** -(np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim)
        match rope.scaling:
            case None:
                pass
            case ("linear", factor):
                inv_freq = inv_freq / factor
            case ("llama3", factor, low, high, context):
                inv_freq = llama3_frequencies(inv_freq, factor, low, high, context)
            case _:
                raise TurboqError(
                    f"rope scaling {rope.scaling!r} is not supported (supported: linear, llama3)"
                )
    if inv_freq.shape != (rope.dim // 2,):
        raise TurboqError(f"{inv_freq.shape[0]} rope frequencies for {rope.dim} rotary channels")
    out = inv_freq.astype(np.float32)
    out.flags.writeable = False
    return out


def tables(
    rope: RopeSpec, positions: Int[Array, "B T"]
) -> tuple[Float[Array, "B T half"], Float[Array, "B T half"]]:
    """cos and sin of every position's angles, float32."""
    inv_freq = jnp.asarray(inverse_frequencies(rope))
    angles = positions.astype(jnp.float32)[..., None] * inv_freq[None, None, :]
    return jnp.cos(angles), jnp.sin(angles)


def apply(
    x: Float[Array, "B T N D"], cos: Float[Array, "B T half"], sin: Float[Array, "B T half"]
) -> Float[Array, "B T N D"]:
    """Rotates the first 2 * half channels of every head; the rest pass through."""
    half = cos.shape[-1]
    a, b, rest = x[..., :half], x[..., half : 2 * half], x[..., 2 * half :]
    cos, sin = cos[:, :, None, :], sin[:, :, None, :]
    return jnp.concatenate([a * cos - b * sin, b * cos + a * sin, rest], axis=-1)
