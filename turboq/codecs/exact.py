"""Vectors as they are, in float32, bfloat16 or float16: the baseline of every table."""

# pyright: strict, reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from turboq.codecs import checks
from turboq.codecs.base import Arrays, Codec, Field, Stored
from turboq.codecs.scalar import dot


@dataclasses.dataclass(frozen=True, kw_only=True)
class Exact(Codec):
    """x_hat = x rounded to `dtype`; 16 or 32 bits per channel.

    The same at every D. Dynamic: nothing is fitted. The block-wise XLA attention reads it; no
    Pallas kernel does yet. float16 overflows to inf above 65504, which `checks.check_finite_stored`
    reports.

    Raises:
      ValueError: dim not a multiple of 8, or unknown dtype.

    Examples:
      >>> from turboq import Exact
      >>> Exact(dim=128).bits_per_channel, Exact(dim=128, dtype="float32").bits_per_channel
      (16.0, 32.0)
    """

    name: ClassVar[str] = "exact"
    source: ClassVar[str] = "rounding to a floating-point type"

    dtype: str = "bfloat16"

    def __post_init__(self):
        checks.check_dim(self.dim)
        checks.check_choice("dtype", self.dtype, checks.DTYPES)

    @property
    def fields(self) -> tuple[Field, ...]:
        bits = checks.DTYPE_BITS[self.dtype]
        return (Field(name="x", width=self.dim, bits=bits, dtype=self.dtype),)

    def encode(self, arrays: Arrays, x: Float[Array, "*n D"]) -> Stored:
        return {"x": x.astype(self.dtype)}

    def decode(self, arrays: Arrays, stored: Stored) -> Float[Array, "*n D"]:
        return stored["x"].astype(jnp.float32)

    def fold_query(self, arrays: Arrays, q: Float[Array, "T D"]) -> dict[str, Array]:
        return {"q": q.astype(jnp.float32)}

    def logits(
        self, arrays: Arrays, folded: dict[str, Array], stored: Stored
    ) -> Float[Array, "T S"]:
        return dot(folded["q"], self.decode(arrays, stored).T)

    def accumulate(
        self, arrays: Arrays, weights: Float[Array, "T S"], stored: Stored
    ) -> Float[Array, "T C"]:
        return dot(weights, self.decode(arrays, stored))

    def unfold_output(
        self, arrays: Arrays, acc: Float[Array, "T C"], mass: Float[Array, "T"]
    ) -> Float[Array, "T D"]:
        return acc
