"""Rotary position embedding: turning vectors to their positions, and back.

    angle[t, i] = position[t] * inv_freq[i],  inv_freq[i] = theta^(-2 i / dim),  i < dim / 2
    (a, b) -> (a cos - b sin, b cos + a sin)      of every pair (a, b) of the first `dim` channels

Su et al. 2021 (arXiv 2104.09864) eq. 34. Pairs are (i, i + dim/2) in layout "half" (Hugging Face),
(2i, 2i + 1) in layout "interleaved" (the paper, GGUF); channels from `dim` on pass through.
"""

from __future__ import annotations

import dataclasses
import functools
import math
from typing import Literal

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float, Int

LAYOUTS = ("half", "interleaved")
_LLAMA3 = ("low_freq_factor", "high_freq_factor", "original_context")
_OPTIONAL = {"optional": True}  # a document may leave the field out (`turboq.plan.read`)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Scaling:
    """How frequencies are stretched for longer contexts.

    "linear" divides all by `factor`; "llama3" (Llama 3.1) divides long wavelengths and keeps short
    ones, by how often they turn within the original context (`llama3_frequencies`).

    Raises:
      ValueError: unknown type, numbers that are missing, superfluous, not positive or out of order.
    """

    type: Literal["linear", "llama3"]
    factor: float
    low_freq_factor: float | None = dataclasses.field(default=None, metadata=_OPTIONAL)
    high_freq_factor: float | None = dataclasses.field(default=None, metadata=_OPTIONAL)
    original_context: float | None = dataclasses.field(default=None, metadata=_OPTIONAL)

    def __post_init__(self):
        if self.type not in ("linear", "llama3"):
            raise ValueError(f"rope scaling type={self.type!r} must be 'linear' or 'llama3'")
        _check_positive("factor", self.factor)
        for name in _LLAMA3:
            value = getattr(self, name)
            if (value is not None) != (self.type == "llama3"):
                raise ValueError(f"{name}={value} is for type 'llama3' alone, which needs it")
            if value is not None:
                _check_positive(name, value)
        low, high = self.low_freq_factor, self.high_freq_factor
        if low is not None and high is not None and not low < high:
            raise ValueError(f"{self.low_freq_factor=} must be below {self.high_freq_factor=}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Rope:
    """A rotary embedding of the first `dim` channels.

    `inv_freq` [dim / 2] (radians per token of each pair) overrides `theta` and `scaling`, for files
    that carry the frequencies themselves (GGUF `rope_freqs`).

    Raises:
      ValueError: dim not even, a number that is not positive, or frequencies that dim / 2 does not
        count.
    """

    dim: int
    theta: float
    layout: Literal["half", "interleaved"] = "half"
    scaling: Scaling | None = dataclasses.field(default=None, metadata=_OPTIONAL)
    inv_freq: tuple[float, ...] | None = dataclasses.field(default=None, metadata=_OPTIONAL)

    def __post_init__(self):
        if self.dim % 2 or self.dim <= 0:
            raise ValueError(f"rotary dim={self.dim} must be even and positive")
        _check_positive("theta", self.theta)
        if self.layout not in LAYOUTS:
            raise ValueError(f"layout={self.layout!r} must be one of {LAYOUTS}")
        if self.inv_freq is None:
            return
        if not all(0 <= f < math.inf for f in self.inv_freq):
            raise ValueError("inv_freq= must be finite numbers, zero or more")
        if 2 * len(self.inv_freq) != self.dim:
            raise ValueError(
                f"inv_freq= of {len(self.inv_freq)} frequencies does not fit dim={self.dim}"
            )


def _check_positive(name: str, value: float) -> None:
    if not 0 < value < math.inf:
        raise ValueError(f"{name}={value} must be a positive number")


def llama3_frequencies(
    inv_freq: Float[np.ndarray, "H"], factor: float, low: float, high: float, context: float
) -> Float[np.ndarray, "H"]:
    """Llama 3.1 scaling: long wavelengths divided by `factor`, short kept, a linear ramp between.

    With r = context * inv_freq / (2 pi) turns over the original context and
    s = clip((r - low) / (high - low), 0, 1): inv_freq * ((1 - s) / factor + s).
    """
    turns = context * inv_freq / (2 * np.pi)
    smooth = np.clip((turns - low) / (high - low), 0.0, 1.0)
    return inv_freq * ((1.0 - smooth) / factor + smooth)


@functools.lru_cache(maxsize=64)
def inverse_frequencies(rope: Rope) -> Float[np.ndarray, "H"]:
    """Radians per token of each channel pair, float32 [dim // 2], read-only."""
    if rope.inv_freq is not None:
        inv_freq = np.asarray(rope.inv_freq, np.float64)
    else:
        inv_freq = rope.theta ** -(np.arange(0, rope.dim, 2, dtype=np.float64) / rope.dim)
        scaling = rope.scaling
        if scaling is not None and scaling.type == "linear":
            inv_freq = inv_freq / scaling.factor
        elif scaling is not None:
            others = (getattr(scaling, name) for name in _LLAMA3)
            inv_freq = llama3_frequencies(inv_freq, scaling.factor, *others)
    out = inv_freq.astype(np.float32)
    out.flags.writeable = False
    return out


def tables(
    rope: Rope, positions: Int[Array, "*n"]
) -> tuple[Float[Array, "*n H"], Float[Array, "*n H"]]:
    """cos and sin of every position's angles, float32; H = dim // 2 pairs."""
    inv_freq = inverse_frequencies(rope).reshape((1,) * positions.ndim + (-1,))
    angles = positions.astype(jnp.float32)[..., None] * inv_freq
    return jnp.cos(angles), jnp.sin(angles)


def apply(
    x: Float[Array, "*n D"],
    cos: Float[Array, "*m H"],
    sin: Float[Array, "*m H"],
    layout: str = "half",
) -> Float[Array, "*n D"]:
    """Rotates the first 2 H channels; `cos` and `sin` broadcast over the axes before them.

    With -sin it is its own inverse, up to the rounding of a float32 rotation.
    """
    half = cos.shape[-1]
    if layout == "half":
        a, b = x[..., :half], x[..., half : 2 * half]
    else:
        a, b = x[..., 0 : 2 * half : 2], x[..., 1 : 2 * half : 2]
    turned = (a * cos - b * sin, b * cos + a * sin)
    if layout == "half":
        return jnp.concatenate([*turned, x[..., 2 * half :]], axis=-1)
    pairs = jnp.stack(turned, axis=-1).reshape(*x.shape[:-1], 2 * half)
    return jnp.concatenate([pairs, x[..., 2 * half :]], axis=-1)


def rotate(
    rope: Rope, x: Float[Array, "*n D"], positions: Int[Array, "*m"]
) -> Float[Array, "*n D"]:
    """R(position) x in float32; `positions` broadcast over the axes of x before D."""
    cos, sin = tables(rope, positions)
    return apply(x.astype(jnp.float32), cos, sin, rope.layout)


def unrotate(
    rope: Rope, x: Float[Array, "*n D"], positions: Int[Array, "*m"]
) -> Float[Array, "*n D"]:
    """R(-position) x in float32: what `rotate` turned, turned back."""
    cos, sin = tables(rope, positions)
    return apply(x.astype(jnp.float32), cos, -sin, rope.layout)


def matrices(rope: Rope, dim: int, positions: Int[np.ndarray, "n"]) -> Float[np.ndarray, "n D D"]:
    """R(position) of keys of `dim` channels as matrices, float64."""
    angles = np.asarray(positions, np.float64)[:, None] * inverse_frequencies(rope)
    half, index = rope.dim // 2, np.arange(rope.dim // 2)
    first, second = (index, index + half) if rope.layout == "half" else (2 * index, 2 * index + 1)
    out = np.broadcast_to(np.eye(dim), (len(angles), dim, dim)).copy()
    out[:, first, first] = out[:, second, second] = np.cos(angles)
    out[:, second, first] = np.sin(angles)
    out[:, first, second] = -np.sin(angles)
    return out
