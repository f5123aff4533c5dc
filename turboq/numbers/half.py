"""float16 numbers as their bits: kernels on a TPU take integers of 16 bits, but no float16.

XLA, too, passes over all of an array to change its type; there and back again it is nothing.
"""

from __future__ import annotations

import jax
import jax.numpy as jnp
from jaxtyping import Array


def bits(x: Array) -> Array:
    """uint16 of float16; another type as it is."""
    return jax.lax.bitcast_convert_type(x, jnp.uint16) if x.dtype == jnp.float16 else x


def values(x: Array) -> Array:
    """float16 of uint16, the inverse of `bits`; another type as it is."""
    return jax.lax.bitcast_convert_type(x, jnp.float16) if x.dtype == jnp.uint16 else x


def like(x: Array, kept: Array) -> Array:
    """x as an array that keeps such numbers has them."""
    return bits(x) if kept.dtype == jnp.uint16 else x
