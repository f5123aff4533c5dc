"""Static per-channel integers with calibrated scales, as ONNX Runtime GenAI stores INT8 and INT4.

    symmetric: q = clip(rint(x / s_c), -2^(b-1), 2^(b-1) - 1),   x_hat = s_c q
    affine:    q = clip(rint((x - z_c) / s_c), 0, 2^b - 1),      x_hat = z_c + s_c q

Nothing but codes is stored per token. The symmetric INT8 and INT4 codes are those of the operator
`com.microsoft.GroupQueryAttention` with PER_CHANNEL scales; `to_bytes` gives its bytes.
"""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from turboq.codecs import checks
from turboq.codecs.base import Arrays, Field, Stored, stack
from turboq.codecs.minifloat import divide
from turboq.codecs.observed import Observed
from turboq.codecs.scalar import lead
from turboq.codecs.transformed import TransformedCodec

FORMS = ("symmetric", "affine")


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerChannel(TransformedCodec):
    """x_hat from the head's own scale per channel; `form` "symmetric" or "affine".

    All-in bits per channel at every D: exactly `bits`. Static. A kernel can read it directly (the
    scales fold into the query and the output); none does yet. What lies beyond the calibrated range
    saturates, and NaN or Inf cannot show in what is stored: check inputs before. A channel with
    scale 0 decodes to 0 (affine: to its z).

    A `rotation` other than identity applies before the scales, which are then fitted to rotated
    vectors (`fit_per_channel` rotates); it is not what ONNX Runtime does per channel.

    Arrays of one head, float32, units of x: channel_scale [D], and for "affine" channel_zero [D].

    Raises:
      ValueError: a field out of range; the message names it and the allowed values.
    """

    name: ClassVar[str] = "per_channel"
    source: ClassVar[str] = "ONNX Runtime GenAI int8/int4 per_channel; affine: textbook"
    needs: ClassVar[tuple[str, ...]] = ("sample",)

    bits: int
    form: str = "symmetric"

    def __post_init__(self):
        super().__post_init__()
        checks.check_bits(self.bits)
        checks.check_choice("form", self.form, FORMS)

    @property
    def fields(self) -> tuple[Field, ...]:
        return (Field(name="codes", width=self.dim, bits=self.bits, dtype="codes"),)

    @property
    def array_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"channel_scale": (self.dim,)}
        return shapes | ({"channel_zero": (self.dim,)} if self.form == "affine" else {})

    def _fit(self, seen: Observed) -> dict[str, np.ndarray]:
        """Keys after their rotary embedding get envelopes; a rotation, which mixes pairs, none."""
        layout = seen.rope_layout if self.rotation == "identity" else "none"
        return stack(
            [fit_per_channel(self, x, rope_layout=layout, rope_dim=seen.rope_dim) for x in seen.x]
        )

    @property
    def _offset(self) -> int:
        """Code of q = 0."""
        return 2 ** (self.bits - 1) if self.form == "symmetric" else 0

    def quantize(self, arrays: Arrays, y: Float[Array, "*n D"]) -> Stored:
        scale = lead(arrays["channel_scale"], y.ndim)
        if self.form == "affine":
            y = y - lead(arrays["channel_zero"], y.ndim)
        # A quotient, not a product with 1 / s: the operator's rounding, ties included.
        q = jnp.where(scale > 0, jnp.round(divide(y, jnp.where(scale > 0, scale, 1.0))), 0.0)
        codes = jnp.clip(q + self._offset, 0, 2**self.bits - 1)
        return {"codes": codes.astype(jnp.uint8)}

    def dequantize(self, arrays: Arrays, stored: Stored) -> Float[Array, "*n D"]:
        codes = stored["codes"]
        y = (codes.astype(jnp.float32) - self._offset) * lead(arrays["channel_scale"], codes.ndim)
        return y + lead(arrays["channel_zero"], codes.ndim) if self.form == "affine" else y

    def to_bytes(self, stored: Stored) -> np.ndarray:
        """uint8 [*n, D] (int8, two's complement) or [*n, D / 2] (int4: q + 8, even channel low).

        Raises:
          ValueError: not symmetric with 8 or 4 bits.
        """
        codes = np.asarray(stored["codes"])
        if self._bits_of_bytes() == 8:
            return codes ^ np.uint8(0x80)  # code - 128 as two's complement
        return codes[..., 0::2] | codes[..., 1::2] << np.uint8(4)

    def from_bytes(self, data: np.ndarray) -> dict[str, np.ndarray]:
        """The stored fields of `to_bytes`.

        Raises:
          ValueError: not symmetric with 8 or 4 bits.
        """
        data = np.asarray(data, np.uint8)
        if self._bits_of_bytes() == 8:
            return {"codes": data ^ np.uint8(0x80)}
        pair = np.stack([data & np.uint8(15), data >> np.uint8(4)], axis=-1)
        return {"codes": pair.reshape(*data.shape[:-1], -1)}

    def _bits_of_bytes(self) -> int:
        if self.form != "symmetric" or self.bits not in (4, 8):
            raise ValueError(f"{self.form=} {self.bits=} must be symmetric with 4 or 8 bits")
        return self.bits


def fit_per_channel(
    codec: PerChannel,
    samples: np.ndarray,
    *,
    rope_layout: str = "none",
    rope_dim: int | None = None,
) -> dict[str, np.ndarray]:
    """Arrays of one head from samples [n, D], in float64; nothing is clipped.

    symmetric: s_c = max|x_c| / 2^(b-1), ONNX Runtime's convention (qmax 128 or 8), in which +max
    takes the last code, one step below it; affine: z_c = min, s_c = (max - min) / (2^b - 1).

    `rope_layout` "half" (channel d pairs with d + rope_dim / 2) or "interleaved" (2 i with 2 i + 1)
    takes, for keys after RoPE, max sqrt(x_c^2 + x_pair^2) for both channels of a pair: rotating by
    a position cannot change it, so short calibration windows do not under-estimate channels that
    turn slowly. Affine ranges become +-envelope. "none" (values, keys before RoPE) uses the
    samples as they are. `rope_dim`: leading rotated channels, None for all.

    Raises:
      ValueError: samples not [n, D], empty or not finite; unknown layout, odd or too large
        rope_dim; an envelope with a rotation, which mixes pairs.
    """
    x = np.asarray(samples, np.float64)
    if x.ndim != 2 or x.shape[1] != codec.dim or not len(x):
        raise ValueError(f"samples {x.shape=} must be [n, {codec.dim}] with n > 0")
    if not np.all(np.isfinite(x)):
        raise ValueError("samples must be finite: NaN or Inf found")
    pairs = rope_pairs(rope_layout, codec.dim if rope_dim is None else rope_dim, codec.dim)
    if rope_layout != "none" and codec.rotation != "identity":
        raise ValueError(f"{rope_layout=} needs rotation='identity', not {codec.rotation!r}")
    if codec.rotation != "identity":
        size = codec.turn.dim
        x = (x.reshape(len(x), -1, size) @ codec.turn.matrix.T).reshape(x.shape)
    low, high = x.min(axis=0), x.max(axis=0)
    if len(pairs):
        norm = np.sqrt(x[:, pairs[:, 0]] ** 2 + x[:, pairs[:, 1]] ** 2).max(axis=0)
        for side in range(2):
            low[pairs[:, side]], high[pairs[:, side]] = -norm, norm
    if codec.form == "affine":
        scale = (high - low) / (2**codec.bits - 1)
        return {"channel_scale": scale.astype(np.float32), "channel_zero": low.astype(np.float32)}
    scale = np.maximum(np.abs(low), np.abs(high)) / 2 ** (codec.bits - 1)
    return {"channel_scale": scale.astype(np.float32)}


def rope_pairs(layout: str, rope_dim: int, dim: int) -> np.ndarray:
    """Channel pairs [rope_dim / 2, 2] that RoPE turns together; none for layout "none".

    Raises:
      ValueError: unknown layout, or rope_dim odd or above dim.
    """
    checks.check_choice("rope_layout", layout, ("none", "half", "interleaved"))
    if layout == "none":
        return np.zeros((0, 2), np.int64)
    if not 0 <= rope_dim <= dim or rope_dim % 2:
        raise ValueError(f"{rope_dim=} must be even and at most {dim=}")
    channels = np.arange(rope_dim)
    return channels.reshape(2, -1).T if layout == "half" else channels.reshape(-1, 2)
