"""Asymmetric uniform quantization of groups of channels of one token: what several codecs share.

    minimum = f(min y),  scale = f((max y - min y) / (2^b - 1)),
    code = clip(rint((y - minimum) / scale), 0, 2^b - 1),  y_hat = minimum + scale code

with f the rounding to the stored type, so codes are the nearest ones for what is stored. A group
without spread has scale 0 and codes 0. Zero is not a level in general; an all-zero group is exact.
"""

from __future__ import annotations

import dataclasses

import jax.numpy as jnp
from jaxtyping import Array, Float, UInt8

from turboq.codecs import checks
from turboq.codecs.base import Arrays, Field, Stored
from turboq.codecs.minifloat import divide
from turboq.codecs.reading import Part, Reading
from turboq.codecs.transformed import TransformedCodec


def levels(
    y: Float[Array, "*n"], bits: int, dtype: str, axis: int
) -> tuple[Float[Array, "*m"], Float[Array, "*m"]]:
    """(scale, minimum) of the groups along `axis`, in the stored type, that axis kept at size 1."""
    low, high = jnp.min(y, axis=axis, keepdims=True), jnp.max(y, axis=axis, keepdims=True)
    # XLA's minimum on a CPU drops NaN in long reductions (seen from 64 entries); it must show.
    low = jnp.where(jnp.any(jnp.isnan(y), axis=axis, keepdims=True), jnp.nan, low)
    span = divide(high - low, jnp.float32(2**bits - 1))
    return span.astype(dtype), low.astype(dtype)


def codes(
    y: Float[Array, "*n"], scale: Float[Array, "*m"], minimum: Float[Array, "*m"], bits: int
) -> UInt8[Array, "*n"]:
    """Nearest codes for the stored scale and minimum, which broadcast against y (equal ranks)."""
    scale, minimum = scale.astype(jnp.float32), minimum.astype(jnp.float32)
    spread = scale > 0
    steps = jnp.where(spread, divide(y - minimum, jnp.where(spread, scale, 1.0)), 0.0)
    return jnp.clip(jnp.round(steps), 0, 2**bits - 1).astype(jnp.uint8)


def values(
    codes: UInt8[Array, "*n"], scale: Float[Array, "*m"], minimum: Float[Array, "*m"]
) -> Float[Array, "*n"]:
    """minimum + scale * code in float32."""
    return minimum.astype(jnp.float32) + scale.astype(jnp.float32) * codes.astype(jnp.float32)


@dataclasses.dataclass(frozen=True, kw_only=True)
class TokenAffine(TransformedCodec):
    """Base: each token's transformed vector in groups of `group` channels (0: one group).

    Stored per token: codes, and per group a scale and a minimum in `scale_dtype`:
    bits + 2 * 16 / group bits per channel with float16.

    Raises:
      ValueError: a field out of range; the message names it and the allowed values.
    """

    bits: int
    group: int = 0
    scale_dtype: str = "float16"

    def __post_init__(self):
        super().__post_init__()
        checks.check_bits(self.bits)
        checks.check_choice("scale_dtype", self.scale_dtype, checks.DTYPES)
        group = self.group
        if type(group) is not int or group < 0 or group == 1 or (group and self.dim % group):
            raise ValueError(f"{group=} must be 0 (one group) or a divisor of dim={self.dim} > 1")

    @property
    def groups(self) -> int:
        """Groups per token."""
        return self.dim // (self.group or self.dim)

    @property
    def fields(self) -> tuple[Field, ...]:
        bits = checks.DTYPE_BITS[self.scale_dtype]
        return (
            Field(name="codes", width=self.dim, bits=self.bits, dtype="codes"),
            Field(name="scale", width=self.groups, bits=bits, dtype=self.scale_dtype),
            Field(name="minimum", width=self.groups, bits=bits, dtype=self.scale_dtype),
        )

    @property
    def reading(self) -> Reading | None:
        """One affine part; None with several groups of channels, which a kernel does not know."""
        if self.groups > 1:
            return None
        part = Part(
            field="codes", width=self.dim, bits=self.bits, levels="affine",
            scale="scale", offset="minimum",
        )  # fmt: skip
        return Reading(parts=(part,))

    def level_tables(self, arrays: Arrays) -> tuple[Float[Array, "L"], ...]:
        return (jnp.ones((1,), jnp.float32),) if self.reading else super().level_tables(arrays)

    def quantize(self, arrays: Arrays, y: Float[Array, "*n D"]) -> Stored:
        split = y.reshape(*y.shape[:-1], self.groups, -1)
        scale, minimum = levels(split, self.bits, self.scale_dtype, axis=-1)
        return {
            "codes": codes(split, scale, minimum, self.bits).reshape(y.shape),
            "scale": scale[..., 0],
            "minimum": minimum[..., 0],
        }

    def dequantize(self, arrays: Arrays, stored: Stored) -> Float[Array, "*n D"]:
        packed = stored["codes"]
        split = packed.reshape(*packed.shape[:-1], self.groups, -1)
        y = values(split, stored["scale"][..., None], stored["minimum"][..., None])
        return y.reshape(packed.shape)
