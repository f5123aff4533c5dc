"""Trellis-coded quantization after a rotation. Data-free."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from turboq.codecs import checks
from turboq.codecs.base import Arrays, Field, Stored
from turboq.codecs.transformed import TransformedCodec
from turboq.numbers import scale as scales
from turboq.numbers import trellis


@dataclasses.dataclass(frozen=True, kw_only=True)
class TCQ(TransformedCodec):
    """x_hat = scale R^T c with c the nearest path of a trellis of `states` states (4, 8, 16, 256).

    bits + (log2(states) + 16) / D bits per channel: the free start state is stored and counted.
    At 8 states and 3 bits 3.297 (D=64), 3.148 (128), 3.074 (256). Gaussian SNR at 2 and 3 bits,
    D=128: 10.78 and 16.41 dB with 8 states, 11.23 and 16.88 with 256, against 9.30 and 14.62 of
    Lloyd-Max and 12.04 and 18.06 of Shannon's bound. Dynamic: nothing is fitted to data. No kernel
    reads it directly; decoding needs no recursion (`turboq.numbers.trellis.decode`).

    `scale_rule` is one of `turboq.numbers.scale.RULES`.

    Source: Marcellin and Fischer (1990) with Ungerboeck's codes (1982); for KV caches buun, QTIP.

    Raises:
      ValueError: a field out of range; the message names it and the allowed values.
    """

    name: ClassVar[str] = "tcq"
    source: ClassVar[str] = "Marcellin and Fischer 1990; Ungerboeck 1982"

    bits: int
    states: int = 8
    rotation: str = "hadamard"
    scale_rule: str = "raw"
    scale_dtype: str = "float16"

    def __post_init__(self):
        super().__post_init__()
        trellis.check(self.states, self.bits)
        checks.check_choice("scale_rule", self.scale_rule, scales.RULES)
        checks.check_choice("scale_dtype", self.scale_dtype, checks.DTYPES)

    @property
    def fields(self) -> tuple[Field, ...]:
        start, scale = self.states.bit_length() - 1, checks.DTYPE_BITS[self.scale_dtype]
        return (
            Field(name="path", width=self.dim, bits=self.bits, dtype="codes"),
            Field(name="start", width=1, bits=start, dtype="codes"),
            Field(name="scale", width=1, bits=scale, dtype=self.scale_dtype),
        )

    @property
    def tables(self) -> dict[str, np.ndarray]:
        return super().tables | {
            "codebook": trellis.codebook(self.states, self.bits).astype(np.float32),
            "parity": trellis.parity_matrix(self.states, self.dim).astype(np.float32),
        }

    @property
    def points(self) -> Float[Array, "P"]:
        """Codebook of both branches, float32."""
        return jnp.asarray(trellis.codebook(self.states, self.bits), jnp.float32)

    def quantize(self, arrays: Arrays, y: Float[Array, "*n D"]) -> Stored:
        u, rms = scales.unit_rms(y)
        path, start = trellis.encode(self.states, self.points, u.reshape(-1, self.dim))
        path, start = path.reshape(u.shape), start.reshape(u.shape[:-1])
        scale = rms
        if self.scale_rule != "raw":
            values = trellis.decode(self.states, self.points, path, start)
            scale = scales.vector_scale(self.scale_rule, u, values, rms)
        stored = {"path": path, "start": start[..., None]}
        return stored | {"scale": scale.astype(self.scale_dtype)[..., None]}

    def dequantize(self, arrays: Arrays, stored: Stored) -> Float[Array, "*n D"]:
        values = trellis.decode(self.states, self.points, stored["path"], stored["start"][..., 0])
        return values * stored["scale"].astype(jnp.float32)
