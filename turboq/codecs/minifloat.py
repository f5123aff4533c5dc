"""Small floating-point formats in exact integer arithmetic, the same under every backend.

    |v| = m * 2**(E + low),  code = sign | (E << mantissa_bits) + m,  low = min_exponent - mantissa

with E >= 0 and m = rint(|v| / 2**(E + low)), ties to even: a mantissa that rounds up carries into
the exponent by itself, and subnormals are E = 0. XLA's own casts go through a wider type on some
backends and then round twice (4 of 1e6 normal values to e4m3 on a CPU differ from `ml_dtypes`).
"""

from __future__ import annotations

import dataclasses

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float, Int, UInt8

from turboq.numbers.codebook import materialized


@dataclasses.dataclass(frozen=True, kw_only=True)
class MiniFloat:
    """A sign bit, `exponent_bits` and `mantissa_bits`, with subnormals.

    Overflow saturates: everything finite above `largest`, and infinity, becomes `largest` (what
    GPU conversions call satfinite). NaN becomes `nan_code` with its sign; a format without NaN
    (nan_code None) stores `largest` for it.
    """

    name: str
    exponent_bits: int
    mantissa_bits: int
    largest: float
    nan_code: int | None = None
    inf_code: int | None = None

    @property
    def bits(self) -> int:
        return 1 + self.exponent_bits + self.mantissa_bits

    @property
    def min_exponent(self) -> int:
        """Exponent of the smallest normal number."""
        return 2 - (1 << (self.exponent_bits - 1))

    def encode(self, v: Float[Array, "*n"]) -> UInt8[Array, "*n"]:
        """Codes of float32 values, round to nearest, ties to even, saturating."""
        v = v.astype(jnp.float32)
        bits = jax.lax.bitcast_convert_type(v, jnp.int32)
        size = jnp.minimum(jnp.abs(v), jnp.float32(self.largest))
        exponent = (jax.lax.bitcast_convert_type(size, jnp.int32) >> 23) - 127
        e = jnp.maximum(exponent - self.min_exponent, 0)
        size = jnp.where(jnp.isnan(v), jnp.float32(self.largest), size)
        e = jnp.where(jnp.isnan(v), jnp.int32(0), e)
        m = jnp.rint(size * _power_of_two(self.mantissa_bits - self.min_exponent - e))
        code = (e << self.mantissa_bits) + m.astype(jnp.int32)
        special = self.code_of_largest if self.nan_code is None else self.nan_code
        code = jnp.where(jnp.isnan(v), jnp.int32(special), code)
        sign = (bits < 0).astype(jnp.int32) << (self.bits - 1)
        return materialized((code | sign).astype(jnp.uint8))

    def decode(self, codes: UInt8[Array, "*n"]) -> Float[Array, "*n"]:
        """Float32 values of codes."""
        c = codes.astype(jnp.int32)
        code = c & ((1 << (self.bits - 1)) - 1)
        e = jnp.maximum((code >> self.mantissa_bits) - 1, 0)
        m = (code - (e << self.mantissa_bits)).astype(jnp.float32)
        size = m * _power_of_two(e + (self.min_exponent - self.mantissa_bits))
        if self.nan_code is not None:
            size = jnp.where(code > self.code_of_largest, jnp.float32(jnp.nan), size)
        if self.inf_code is not None:
            size = jnp.where(code == self.inf_code, jnp.float32(jnp.inf), size)
        return jnp.where(c >> (self.bits - 1) == 1, -size, size)

    @property
    def code_of_largest(self) -> int:
        """Code of `largest`."""
        top = (1 << (self.bits - 1)) - 1
        return {"e4m3": top - 1, "e5m2": top - 4, "e2m1": top}[self.name]


E4M3 = MiniFloat(name="e4m3", exponent_bits=4, mantissa_bits=3, largest=448.0, nan_code=0x7F)
E5M2 = MiniFloat(
    name="e5m2", exponent_bits=5, mantissa_bits=2, largest=57344.0, nan_code=0x7E, inf_code=0x7C
)
E2M1 = MiniFloat(name="e2m1", exponent_bits=2, mantissa_bits=1, largest=6.0)


def divide(x: Float[Array, "*n"], y: Float[Array, "*m"]) -> Float[Array, "*n"]:
    """x / y, correctly rounded, y broadcast to x.

    XLA turns a division by a constant or by a broadcast value into a product with the reciprocal,
    which is off by one unit in up to half of the cases; a divisor that hangs on x stops it.
    """
    return x / jnp.where(jnp.isnan(x), jnp.float32(1), jnp.broadcast_to(y, x.shape))


def _power_of_two(exponent: Int[Array, "*n"]) -> Float[Array, "*n"]:
    return jax.lax.bitcast_convert_type((exponent + 127) << 23, jnp.float32)
