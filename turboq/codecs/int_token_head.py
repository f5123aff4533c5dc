"""INT8 and INT4 with one float32 scale per token and KV head, as vLLM stores them."""

from __future__ import annotations

import dataclasses
import functools
from typing import ClassVar

import jax
import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from turboq.codecs.base import Arrays, Field, Stored
from turboq.codecs.bitstream import as_bytes, check_width, from_bytes, pack_bits, unpack_bits
from turboq.codecs.fp8 import MIN_SCALE, token_scale
from turboq.codecs.minifloat import divide
from turboq.codecs.reading import Part, Reading
from turboq.codecs.transformed import TransformedCodec
from turboq.numbers.codebook import materialized

_SCALE = Field(name="scale", width=1, bits=32, dtype="float32")


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int8TokenHead(TransformedCodec):
    """x_hat = s c with s = max(absmax / 127, 1e-6) and c = rint(x * (1 / s)), ties to even.

    vLLM's int8_per_token_head since it rounds (earlier releases cut towards zero). Codes are
    stored as the byte of the int8: D + 4 bytes, so 8.5, 8.25, 8.125 bits per channel at D = 64,
    128, 256. Dynamic. Kernels read the bytes (`reading`).
    """

    name: ClassVar[str] = "int8_token_head"
    source: ClassVar[str] = "vLLM int8_per_token_head"
    rotation: ClassVar[str] = "identity"
    rotation_block: ClassVar[int] = 0
    seed: ClassVar[int] = 0

    @property
    def fields(self) -> tuple[Field, ...]:
        return (Field(name="codes", width=self.dim, bits=8, dtype="codes"), _SCALE)

    @property
    def reading(self) -> Reading | None:
        part = Part(field="codes", width=self.dim, bits=8, levels="int8", scale="scale")
        return Reading(parts=(part,))

    def level_tables(self, arrays: Arrays) -> tuple[Float[Array, "L"], ...]:
        return (jnp.ones((1,), jnp.float32),)

    def quantize(self, arrays: Arrays, y: Float[Array, "*n D"]) -> Stored:
        scale = token_scale(y, 127.0)
        codes = jnp.clip(jnp.rint(y * (1 / scale)), -128.0, 127.0).astype(jnp.int8)
        codes = jax.lax.bitcast_convert_type(codes, jnp.uint8)
        return {"codes": materialized(codes), "scale": scale}

    def dequantize(self, arrays: Arrays, stored: Stored) -> Float[Array, "*n D"]:
        codes = jax.lax.bitcast_convert_type(stored["codes"], jnp.int8)
        return codes.astype(jnp.float32) * stored["scale"]

    def to_bytes(self, stored: Stored) -> np.ndarray:
        """uint8 [..., D + 4]: int8 codes, float32 scale."""
        scale = as_bytes(np.asarray(stored["scale"]), "float32")
        return np.concatenate([np.asarray(stored["codes"], np.uint8), scale], axis=-1)

    def from_bytes(self, stream: np.ndarray) -> Stored:
        """The inverse of `to_bytes`."""
        check_width(stream, self.dim + 4)
        scale = from_bytes(stream[..., self.dim :], "float32")
        return {"codes": jnp.asarray(stream[..., : self.dim]), "scale": jnp.asarray(scale)}


@dataclasses.dataclass(frozen=True, kw_only=True)
class Int4TokenHead(TransformedCodec):
    """Rotated asymmetric 4-bit codes whose zero point hides in the scale's mantissa.

        y = H (signs * x), entries of H +-1;  s = max((max y - min y) / 15, 1e-6)
        z = clip(round(-min y / s), 0, 15),  c = clip(round(y * (1 / s) + z), 0, 15)
        stored: c, and s with its 4 lowest mantissa bits replaced by z
        y_hat = s' (c - z), s' being s with those bits zero

    round is half away from zero. `vllm_signs` are vLLM's. A vector whose y are all of one sign
    has its zero point clipped, so it loses range: that is the format's. vLLM rotates in the
    model's dtype; here y is float32. Power-of-two D in vLLM; other D take H (x) C of
    `turboq.numbers.rotation`, times sqrt(D).

    D / 2 + 4 bytes: 4.5, 4.25, 4.125 bits per channel at D = 64, 128, 256. Dynamic. Kernels read
    it through `dequantize`.
    """

    name: ClassVar[str] = "int4_token_head"
    source: ClassVar[str] = "vLLM int4_per_token_head"
    rotation: ClassVar[str] = "walsh"
    rotation_block: ClassVar[int] = 0
    seed: ClassVar[int] = 0

    @property
    def fields(self) -> tuple[Field, ...]:
        return (Field(name="codes", width=self.dim, bits=4, dtype="codes"), _SCALE)

    @property
    def tables(self) -> dict[str, np.ndarray]:
        matrix = self.turn.matrix * vllm_signs(self.dim)
        return {"rotation": matrix.astype(np.float32)}

    def forward(self, arrays: Arrays, x: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        return self.turn.apply(x * _signs(self.dim, x.ndim))

    def backward(self, arrays: Arrays, y: Float[Array, "*n D"]) -> Float[Array, "*n D"]:
        return self.turn.invert(y) * _signs(self.dim, y.ndim)

    def quantize(self, arrays: Arrays, y: Float[Array, "*n D"]) -> Stored:
        y = y * np.float32(np.sqrt(self.dim))
        low, high = jnp.min(y, -1, keepdims=True), jnp.max(y, -1, keepdims=True)
        # XLA's minimum on a CPU drops NaN in long reductions; it must show.
        low = jnp.where(jnp.any(jnp.isnan(y), -1, keepdims=True), jnp.nan, low)
        scale = jnp.maximum(divide(high - low, jnp.float32(15)), jnp.float32(MIN_SCALE))
        zero = jnp.clip(_round_away(-low / scale), 0.0, 15.0)
        codes = jnp.clip(_round_away(y * (1 / scale) + zero), 0.0, 15.0).astype(jnp.uint8)
        bits = jax.lax.bitcast_convert_type(scale, jnp.int32)
        bits = (bits & jnp.int32(-16)) | zero.astype(jnp.int32)  # NaN and inf stay not finite
        hidden = jax.lax.bitcast_convert_type(bits, jnp.float32)
        return {"codes": materialized(codes), "scale": hidden}

    def dequantize(self, arrays: Arrays, stored: Stored) -> Float[Array, "*n D"]:
        bits = jax.lax.bitcast_convert_type(stored["scale"], jnp.int32)
        scale = jax.lax.bitcast_convert_type(bits & jnp.int32(-16), jnp.float32)
        zero = (bits & jnp.int32(15)).astype(jnp.float32)
        steps = stored["codes"].astype(jnp.float32) - zero
        return steps * (scale * np.float32(1 / np.sqrt(self.dim)))

    def to_bytes(self, stored: Stored) -> np.ndarray:
        """uint8 [..., D / 2 + 4]: nibbles (even channel low), float32 scale with the zero point."""
        scale = as_bytes(np.asarray(stored["scale"]), "float32")
        return np.concatenate([pack_bits(np.asarray(stored["codes"]), 4), scale], axis=-1)

    def from_bytes(self, stream: np.ndarray) -> Stored:
        """The inverse of `to_bytes`."""
        half = self.dim // 2
        check_width(stream, half + 4)
        codes = unpack_bits(stream[..., :half], 4, self.dim)
        scale = from_bytes(stream[..., half:], "float32")
        return {"codes": jnp.asarray(codes), "scale": jnp.asarray(scale)}


@functools.lru_cache(maxsize=16)
def vllm_signs(dim: int) -> np.ndarray:
    """The fixed signs [D] of vLLM's int4 rotation, float64.

    +1 where a fair float32 Bernoulli of PyTorch's CPU generator (mt19937, seed 0x9E3779B9) gives 1:
    where the low 24 bits of its 32-bit word are below 2**23.
    """
    state = np.random.RandomState(0x9E3779B9)
    words = state.randint(0, 1 << 32, size=dim, dtype=np.uint32)
    signs = np.where(words & np.uint32(0xFFFFFF) < np.uint32(1 << 23), 1.0, -1.0)
    signs.setflags(write=False)
    return signs


def _signs(dim: int, ndim: int) -> Array:
    return jnp.asarray(vllm_signs(dim), jnp.float32).reshape((1,) * (ndim - 1) + (-1,))


def _round_away(v: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """Half away from zero, as adding a half and cutting does in float32."""
    return jnp.trunc(jnp.where(v >= 0, v + 0.5, v - 0.5))
