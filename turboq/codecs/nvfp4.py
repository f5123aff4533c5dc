"""NVFP4: e2m1 codes, an e4m3 scale per 16 channels, one static float32 scale per head."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from turboq.codecs.base import Arrays, Field, Stored
from turboq.codecs.bitstream import check_width, pack_bits, unpack_bits
from turboq.codecs.minifloat import E2M1, E4M3, divide
from turboq.codecs.observed import Observed
from turboq.codecs.transformed import TransformedCodec

BLOCK = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class NVFP4(TransformedCodec):
    """x_hat = scale * b * c, c = e2m1(x / (scale * b)), b = e4m3(absmax of the 16 / (6 * scale)).

    e2m1 is 0, 0.5, 1, 1.5, 2, 3, 4, 6 and a sign, rounded to nearest, ties to even, saturating. A
    block whose b rounds to 0 is stored as zeros; one whose b exceeds 448 saturates. The array
    scale [] is fitted (`turboq.codecs.fit_scale`): absmax / (448 * 6) uses the whole range of b,
    absmax / 448 is ModelOpt's convention for caches.

    D / 2 + D / 16 bytes: 4.5 bits per channel at every D. Static global scale. NaN in x is NaN in
    b, which no float field shows: check inputs before. Kernels read it through `dequantize`.

    Raises:
      ValueError: dim is not a multiple of 16.
    """

    name: ClassVar[str] = "nvfp4"
    source: ClassVar[str] = "NVIDIA NVFP4 (two-level scales), as ModelOpt and vLLM caches use it"
    needs: ClassVar[tuple[str, ...]] = ("sample",)
    rotation: ClassVar[str] = "identity"
    rotation_block: ClassVar[int] = 0
    seed: ClassVar[int] = 0

    def __post_init__(self):
        super().__post_init__()
        if self.dim % BLOCK:
            raise ValueError(f"dim={self.dim} must be a multiple of {BLOCK} (one block scale each)")

    @property
    def range(self) -> float:
        """Largest |x| / scale that does not saturate."""
        return E4M3.largest * E2M1.largest

    @property
    def fields(self) -> tuple[Field, ...]:
        return (
            Field(name="codes", width=self.dim, bits=4, dtype="codes"),
            Field(name="block_scale", width=self.dim // BLOCK, bits=8, dtype="codes"),
        )

    @property
    def array_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"scale": ()}

    def _fit(self, seen: Observed) -> dict[str, np.ndarray]:
        from turboq.codecs.fit_scale import fit_scale

        return fit_scale(self, seen.x, "mse")

    def quantize(self, arrays: Arrays, y: Float[Array, "*n D"]) -> Stored:
        blocks = y.reshape(*y.shape[:-1], -1, BLOCK)
        peak = jnp.max(jnp.abs(blocks), axis=-1)
        block_scale = E4M3.encode(divide(peak, 6 * arrays["scale"]))
        step = E4M3.decode(block_scale) * arrays["scale"]
        # x / inf is a zero with the sign of x: what a block scale of zero leaves.
        scaled = divide(blocks, jnp.where(step == 0, jnp.inf, step)[..., None])
        return {"codes": E2M1.encode(scaled).reshape(y.shape), "block_scale": block_scale}

    def finite(self, stored: Stored) -> Bool[Array, "*n"]:
        return jnp.all(jnp.isfinite(E4M3.decode(stored["block_scale"])), axis=-1)

    def dequantize(self, arrays: Arrays, stored: Stored) -> Float[Array, "*n D"]:
        step = E4M3.decode(stored["block_scale"]) * arrays["scale"]
        values = E2M1.decode(stored["codes"])
        blocks = values.reshape(*values.shape[:-1], -1, BLOCK) * step[..., None]
        return blocks.reshape(values.shape)

    def to_bytes(self, stored: Stored) -> np.ndarray:
        """uint8 [..., D / 2 + D / 16]: nibbles (even channel low), then the block scales.

        Engines tile the block scales of a page for their kernels; this is one vector's order.
        """
        codes = pack_bits(np.asarray(stored["codes"]), 4)
        return np.concatenate([codes, np.asarray(stored["block_scale"], np.uint8)], axis=-1)

    def from_bytes(self, stream: np.ndarray) -> Stored:
        """The inverse of `to_bytes`."""
        half = self.dim // 2
        check_width(stream, half + self.dim // BLOCK)
        codes = unpack_bits(stream[..., :half], 4, self.dim)
        return {"codes": jnp.asarray(codes), "block_scale": jnp.asarray(stream[..., half:])}
