"""Masked loads and stores of Triton kernels, the same when interpreted, and exact products."""

from __future__ import annotations

from typing import Any

import jax
import jax.numpy as jnp
from jax.experimental.pallas import triton as plgpu
from jaxtyping import Array, Float


def load(ref, at: tuple, mask) -> Array:
    """ref[at], zero where masked."""
    if mask is None:
        return plgpu.load(ref.at[_alike(at)])
    *index, mask = _alike((*at, mask))
    return plgpu.load(ref.at[tuple(index)], mask=mask, other=jnp.zeros((), ref.dtype))


def store(ref, at: tuple, value, mask, *, interpret: bool) -> None:
    """ref[at] = value, nothing where masked."""
    *index, mask = _alike((*at, mask))
    if interpret:  # which stores at masked places too, what lay there: let it be nowhere
        index[-1] = jnp.where(mask, index[-1], ref.shape[-1])
    plgpu.store(ref.at[tuple(index)], value, mask=mask)


def _alike(values: tuple) -> tuple[Any, ...]:
    """The arrays among them broadcast to one shape."""
    shape = jnp.broadcast_shapes(*(jnp.shape(v) for v in values))
    return tuple(v if jnp.ndim(v) == 0 else jnp.broadcast_to(v, shape) for v in values)


def three(x: Float[Array, "*s"]) -> list[Array]:
    """x as the exact sum of three bfloat16 numbers; of NaN or Inf some part is NaN or Inf."""
    parts = []
    for _ in range(2):
        bits = jax.lax.bitcast_convert_type(x, jnp.uint32) & jnp.uint32(0xFFFF0000)
        head = jax.lax.bitcast_convert_type(bits, jnp.float32)
        parts.append(head.astype(jnp.bfloat16))
        x = x - head
    return [*parts, x.astype(jnp.bfloat16)]
