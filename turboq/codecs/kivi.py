"""KIVI: keys asymmetric per channel over blocks of tokens, values asymmetric per token.

    K: for each channel and block of `group` tokens   k_hat = minimum + scale code
    V: for each token and group of `group` channels   v_hat = minimum + scale code

KIVI keeps a residual of recent tokens exact. Here that is `TokenPolicy.recent` (KIVI's R, 128 in
the paper) plus the tokens that wait until their block of keys is full, K and V alike: between R and
R + group - 1 tokens. KIVI itself moves R keys at a time, so its exact keys number 0 to R - 1.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
from jaxtyping import Array, Float

from turboq.codecs import affine, checks
from turboq.codecs.base import Arrays, Field, Stored
from turboq.codecs.transformed import TransformedCodec

GROUPS = (32, 64, 128)
RECENT = 128  # the paper's residual length


def check_group(group: int, groups: tuple[int, ...] = GROUPS) -> None:
    """Raises ValueError unless group is one of those that codecs of token blocks offer."""
    if type(group) is not int or group not in groups:
        raise ValueError(f"{group=} must be one of {groups}")


@dataclasses.dataclass(frozen=True, kw_only=True)
class KiviKey(TransformedCodec):
    """Per channel, asymmetric `bits`-bit integers over blocks of `group` tokens.

    Stored: codes per token; scale and minimum [D] per block in `scale_dtype`. All-in bits per
    channel, at every D: bits + 32 / group (2 bits: 3.0, 2.5, 2.25 for group 32, 64, 128). Dynamic.
    A kernel can read it directly (scale and minimum of a block fold into the query); none does yet.

    KIVI quantizes keys after RoPE, as here, and uses no rotation (`rotation="identity"`); the other
    rotations make variants that are not KIVI. Codes are nearest for the stored, rounded scale.

    Raises:
      ValueError: a field out of range; the message names it and the allowed values.
    """

    name: ClassVar[str] = "kivi_key"
    source: ClassVar[str] = "KIVI (arXiv 2402.02750) section 3, keys per channel"

    bits: int
    group: int = 32
    scale_dtype: str = "float16"

    def __post_init__(self):
        super().__post_init__()
        checks.check_bits(self.bits)
        checks.check_choice("scale_dtype", self.scale_dtype, checks.DTYPES)
        check_group(self.group)

    @property
    def block(self) -> int:
        return self.group

    @property
    def fields(self) -> tuple[Field, ...]:
        bits, kind = checks.DTYPE_BITS[self.scale_dtype], self.scale_dtype
        return (
            Field(name="codes", width=self.dim, bits=self.bits, dtype="codes"),
            Field(name="scale", width=self.dim, bits=bits, dtype=kind, per_block=True),
            Field(name="minimum", width=self.dim, bits=bits, dtype=kind, per_block=True),
        )

    def quantize(self, arrays: Arrays, y: Float[Array, "*n D"]) -> Stored:
        tiles = split_tokens(y, self.group)
        scale, minimum = affine.levels(tiles, self.bits, self.scale_dtype, axis=-2)
        return {
            "codes": affine.codes(tiles, scale, minimum, self.bits).reshape(y.shape),
            "scale": scale[..., 0, :],
            "minimum": minimum[..., 0, :],
        }

    def dequantize(self, arrays: Arrays, stored: Stored) -> Float[Array, "*n D"]:
        tiles = split_tokens(stored["codes"], self.group)
        y = affine.values(tiles, stored["scale"][..., None, :], stored["minimum"][..., None, :])
        return y.reshape(stored["codes"].shape)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KiviValue(affine.TokenAffine):
    """Per token, asymmetric `bits`-bit integers over groups of `group` channels.

    All-in bits per channel, at every D: bits + 32 / group. KIVI uses groups of 32, 64 or 128; any
    divisor of D is taken, so that D = 80 has one (16). Dynamic. A kernel can read it directly
    (the scale folds into the probability); none does yet.
    """

    name: ClassVar[str] = "kivi_value"
    source: ClassVar[str] = "KIVI (arXiv 2402.02750) section 3, values per token"

    group: int = 32


def split_tokens(x: Array, block: int) -> Array:
    """[*n, S, D] -> [*n, S / block, block, D].

    Raises:
      ValueError: S is not a multiple of the block.
    """
    *lead, tokens, dim = x.shape
    if tokens % block:
        raise ValueError(f"{tokens=} must be a multiple of {block=}")
    return jnp.reshape(x, (*lead, tokens // block, block, dim))
