"""FP8 keys and values: e4m3 or e5m2 codes with no, a static or a per-vector scale."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Bool, Float

from turboq.codecs import checks
from turboq.codecs.base import Arrays, Field, Stored
from turboq.codecs.bitstream import as_bytes, check_width, from_bytes
from turboq.codecs.minifloat import E4M3, E5M2, MiniFloat, divide
from turboq.codecs.observed import Observed
from turboq.codecs.reading import Part, Reading
from turboq.codecs.transformed import TransformedCodec

FORMATS = {"e4m3": E4M3, "e5m2": E5M2}
SCALES = ("none", "tensor", "head", "token")
MIN_SCALE = 1e-6  # of a per-vector scale, as vLLM has it


@dataclasses.dataclass(frozen=True, kw_only=True)
class FP8(TransformedCodec):
    """x_hat = scale * fp8(x / scale): e4m3 (without infinity, largest 448) or e5m2 (57344).

    Rounds to nearest, ties to even. What lies beyond the largest number after scaling, infinity
    included, saturates to it; NaN is stored as NaN. -0.0 keeps its sign.

    `scale`: "none" stores x itself; "tensor" and "head" use the fitted array scale [] (one value
    for all KV heads, or the head's own; `turboq.codecs.fit_scale`); "token" stores one float32 per
    vector, s = max(absmax / largest, 1e-6) with codes of x * (1 / s), as vLLM's
    fp8_per_token_head does.

    Bits per channel at D = 64, 128, 256: 8, 8, 8, with scale="token" 8.5, 8.25, 8.125. Static
    except "token" and "none". A static scale cannot show NaN or saturation in what it stores: check
    inputs before. Kernels read the bytes (`reading`), a static scale folded into query and output.

    Raises:
      ValueError: unknown format or scale.
    """

    name: ClassVar[str] = "fp8"
    source: ClassVar[str] = "Micikevicius et al., FP8 formats, arXiv 2209.05433; vLLM fp8 caches"
    needs: ClassVar[tuple[str, ...]] = ("sample",)
    rotation: ClassVar[str] = "identity"
    rotation_block: ClassVar[int] = 0
    seed: ClassVar[int] = 0

    format: str = "e4m3"
    scale: str = "token"

    def __post_init__(self):
        super().__post_init__()
        checks.check_choice("format", self.format, tuple(FORMATS))
        checks.check_choice("scale", self.scale, SCALES)

    @property
    def number(self) -> MiniFloat:
        """The format of the codes."""
        return FORMATS[self.format]

    @property
    def range(self) -> float:
        """Largest |x| / scale that does not saturate."""
        return self.number.largest

    @property
    def fields(self) -> tuple[Field, ...]:
        codes = Field(name="codes", width=self.dim, bits=8, dtype="codes")
        scale = Field(name="scale", width=1, bits=32, dtype="float32")
        return (codes, scale) if self.scale == "token" else (codes,)

    @property
    def array_shapes(self) -> dict[str, tuple[int, ...]]:
        return {"scale": ()} if self.scale in ("tensor", "head") else {}

    def _fit(self, seen: Observed) -> dict[str, np.ndarray]:
        from turboq.codecs.fit_scale import fit_scale

        return fit_scale(self, seen.x, "mse")

    @property
    def reading(self) -> Reading | None:
        scale = "scale" if self.scale == "token" else None
        part = Part(field="codes", width=self.dim, bits=8, levels=self.format, scale=scale)
        return Reading(parts=(part,))

    def level_tables(self, arrays: Arrays) -> tuple[Float[Array, "L"], ...]:
        """The static scale of the head is the part's gain."""
        return (arrays["scale"][None] if self.array_shapes else jnp.ones((1,), jnp.float32),)

    def quantize(self, arrays: Arrays, y: Float[Array, "*n D"]) -> Stored:
        if self.scale == "none":
            return {"codes": self.number.encode(y)}
        if self.scale != "token":
            return {"codes": self.number.encode(divide(y, arrays["scale"]))}
        scale = token_scale(y, self.number.largest)
        return {"codes": self.number.encode(y * (1 / scale)), "scale": scale}

    def finite(self, stored: Stored) -> Bool[Array, "*n"]:
        codes = jnp.all(jnp.isfinite(self.number.decode(stored["codes"])), axis=-1)
        return codes & super().finite(stored)

    def dequantize(self, arrays: Arrays, stored: Stored) -> Float[Array, "*n D"]:
        values = self.number.decode(stored["codes"])
        if self.scale == "none":
            return values
        return values * (stored["scale"] if self.scale == "token" else arrays["scale"])

    def to_bytes(self, stored: Stored) -> np.ndarray:
        """uint8 [..., D] codes, then with scale="token" the float32 scale: D + 4 bytes."""
        parts = [np.asarray(stored["codes"], np.uint8)]
        if self.scale == "token":
            parts.append(as_bytes(np.asarray(stored["scale"]), "float32"))
        return np.concatenate(parts, axis=-1)

    def from_bytes(self, stream: np.ndarray) -> Stored:
        """The inverse of `to_bytes`."""
        check_width(stream, self.bits_per_vector // 8)
        stored = {"codes": jnp.asarray(stream[..., : self.dim])}
        if self.scale == "token":
            stored["scale"] = jnp.asarray(from_bytes(stream[..., self.dim :], "float32"))
        return stored


def token_scale(y: Float[Array, "*n D"], largest: float) -> Float[Array, "*n 1"]:
    """max(absmax / largest, 1e-6) of every vector, float32, correctly rounded; NaN stays NaN."""
    peak = jnp.max(jnp.abs(y), axis=-1, keepdims=True)
    # XLA's maximum on a CPU drops NaN in long reductions; it must show.
    peak = jnp.where(jnp.any(jnp.isnan(y), axis=-1, keepdims=True), jnp.nan, peak)
    return jnp.maximum(divide(peak, jnp.float32(largest)), jnp.float32(MIN_SCALE))
