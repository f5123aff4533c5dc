"""KVarN-like: Hadamard, two-axis variance normalisation of a block of tokens, integers.

A block of rotated tokens y [block, D] over its own rms is balanced in the log domain (Sinkhorn):

    repeat `iterations` times:  log c += log std over tokens;   log t += log std over channels
    of y / (t c), where t [block] scales tokens, c [D] channels; the most even state seen is kept,
    evenness being max/min of the channels' stds plus max/min of the tokens' stds.

Keys ("channel") are then asymmetric integers per channel over the block, values ("token") per
token over all channels. The scale along the axis that shares one minimum cancels in the result, so
only the other one is stored and applied: z = y / t for keys, z = y / c for values, z_hat =
minimum + scale code. As published, stds (over n - 1) are held within 1e-3..1e3 and logs within
-0.3..10, and the scale that is stored is the first one updated in each round.

What the description leaves open and is chosen here: the limits apply to the block over its rms, so
that coding commutes with the size of the vectors (published: to the block as it is); any of the
rotations of `numbers.rotation`, the unsigned Hadamard by default; codes are nearest for the stored
numbers. Published presets are keys 4 bits with values 2 bits, group 128 (or 64).
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax
import jax.numpy as jnp
from jaxtyping import Array, Float

from turboq.codecs import affine, checks
from turboq.codecs.base import Arrays, Field, Stored
from turboq.codecs.kivi import check_group, split_tokens
from turboq.codecs.minifloat import divide
from turboq.codecs.transformed import TransformedCodec
from turboq.numbers import scale as scales

AXES = ("channel", "token")
STD_LIMITS = (1e-3, 1e3)
LOG_LIMITS = (-0.3, 10.0)


@dataclasses.dataclass(frozen=True, kw_only=True)
class KVarN(TransformedCodec):
    """Balanced blocks of `group` tokens; `axis` "channel" for keys, "token" for values.

    Stored per token codes, and in `scale_dtype`
      channel: token_scale [1] per token; scale, minimum [D] per block
      token:   scale, minimum [1] per token; channel_scale [D] per block
    All-in bits per channel at D = 64, 128, 256 with group 128 and float16:
      channel: bits + 0.5, 0.375, 0.3125;  token: bits + 0.625, 0.375, 0.25
    Dynamic, no calibration. A kernel can read it directly (block scales fold into the query, token
    scales into the logit; for values into probability and output); none does yet.

    Raises:
      ValueError: a field out of range; the message names it and the allowed values.
    """

    name: ClassVar[str] = "kvarn"
    source: ClassVar[str] = "KVarN (arXiv 2606.03458) section 3 and its published description"

    bits: int
    rotation: str = "walsh"
    axis: str = "channel"
    group: int = 128
    iterations: int = 16
    scale_dtype: str = "float16"

    def __post_init__(self):
        super().__post_init__()
        checks.check_bits(self.bits)
        checks.check_choice("axis", self.axis, AXES)
        checks.check_choice("scale_dtype", self.scale_dtype, checks.DTYPES)
        check_group(self.group)
        if type(self.iterations) is not int or not 0 <= self.iterations <= 64:
            raise ValueError(f"{self.iterations=} must be 0..64")

    @property
    def block(self) -> int:
        return self.group

    @property
    def fields(self) -> tuple[Field, ...]:
        bits, kind = checks.DTYPE_BITS[self.scale_dtype], self.scale_dtype

        def of_token(name):
            return Field(name=name, width=1, bits=bits, dtype=kind)

        def of_block(name):
            return Field(name=name, width=self.dim, bits=bits, dtype=kind, per_block=True)

        codes = Field(name="codes", width=self.dim, bits=self.bits, dtype="codes")
        if self.axis == "channel":
            return codes, of_token("token_scale"), of_block("scale"), of_block("minimum")
        return codes, of_token("scale"), of_token("minimum"), of_block("channel_scale")

    def quantize(self, arrays: Arrays, y: Float[Array, "*n D"]) -> Stored:
        tiles = split_tokens(y, self.group)
        token, channel = balance(tiles, self.iterations, self.axis)
        by_channel = self.axis == "channel"
        even = (token if by_channel else channel).astype(self.scale_dtype)
        z = divide(tiles, even.astype(jnp.float32))
        axis = -2 if by_channel else -1
        scale, minimum = affine.levels(z, self.bits, self.scale_dtype, axis=axis)
        codes = affine.codes(z, scale, minimum, self.bits).reshape(y.shape)
        per_token = (*y.shape[:-1], 1)
        if by_channel:
            return {
                "codes": codes,
                "token_scale": even.reshape(per_token),
                "scale": scale[..., 0, :],
                "minimum": minimum[..., 0, :],
            }
        return {
            "codes": codes,
            "scale": scale.reshape(per_token),
            "minimum": minimum.reshape(per_token),
            "channel_scale": even[..., 0, :],
        }

    def dequantize(self, arrays: Arrays, stored: Stored) -> Float[Array, "*n D"]:
        tiles = split_tokens(stored["codes"], self.group)

        def part(name):
            values = stored[name]
            if values.shape[-1] == 1:  # one per token
                return split_tokens(values, self.group)
            return values[..., None, :]

        even = part("token_scale" if self.axis == "channel" else "channel_scale")
        z = affine.values(tiles, part("scale"), part("minimum"))
        return (z * even.astype(jnp.float32)).reshape(stored["codes"].shape)


def balance(
    tiles: Float[Array, "*n T D"], iterations: int, axis: str
) -> tuple[Float[Array, "*n T 1"], Float[Array, "*n 1 D"]]:
    """Token scales and channel scales, both without unit, that even out the stds of a block.

    `axis` is the axis of the integers: "channel" updates the token scales first in each round,
    "token" the channel scales.
    """
    unit = scales.unit_rms(tiles.reshape(*tiles.shape[:-2], -1))[0].reshape(tiles.shape)
    token_axis, channel_axis = -1, -2  # axes that the std of a token, of a channel runs over

    def step(log_scale, current, over):
        std = jnp.clip(jnp.std(current, axis=over, keepdims=True, ddof=1), *STD_LIMITS)
        return jnp.clip(log_scale + jnp.log(std), *LOG_LIMITS)

    def divided(token, channel):
        return unit * jnp.exp(-token) * jnp.exp(-channel)

    def round_(_, carry):
        token, channel, best = carry
        if axis == "channel":
            token = step(token, divided(token, channel), token_axis)
            channel = step(channel, divided(token, channel), channel_axis)
        else:
            channel = step(channel, divided(token, channel), channel_axis)
            token = step(token, divided(token, channel), token_axis)
        uneven = unevenness(divided(token, channel))
        better = uneven <= best[0]
        kept = (
            jnp.where(better, uneven, best[0]),
            jnp.where(better, token, best[1]),
            jnp.where(better, channel, best[2]),
        )
        return token, channel, kept

    token = jnp.zeros((*unit.shape[:-1], 1), jnp.float32)
    channel = jnp.zeros((*unit.shape[:-2], 1, unit.shape[-1]), jnp.float32)
    start = (token, channel, (unevenness(unit), token, channel))
    _, token, channel = jax.lax.fori_loop(0, iterations, round_, start)[2]
    return jnp.exp(token), jnp.exp(channel)


def unevenness(x: Float[Array, "*n T D"]) -> Float[Array, "*n 1 1"]:
    """max/min of the channels' stds plus max/min of the tokens' stds; 2 for an even block."""

    def spread(axis):
        std = jnp.std(x, axis=axis, keepdims=True, ddof=1)
        low, high = (f(std, axis=(-2, -1), keepdims=True) for f in (jnp.min, jnp.max))
        return high / jnp.maximum(low, 1e-8)

    return spread(-2) + spread(-1)
