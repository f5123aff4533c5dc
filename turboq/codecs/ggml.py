"""llama.cpp's KV cache types as one codec: blocks of 32 channels, with and without rotation."""

from __future__ import annotations

import dataclasses
from collections.abc import Mapping
from typing import Any, ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from turboq.codecs import checks, ggml_blocks
from turboq.codecs.base import Arrays, Field, Stored
from turboq.codecs.ggml_blocks import BLOCK
from turboq.codecs.transformed import TransformedCodec

KINDS = ("f16", *ggml_blocks.TYPES)


@dataclasses.dataclass(frozen=True, kw_only=True)
class Ggml(TransformedCodec):
    """One of ggml's types `f16 q8_0 q5_0 q5_1 q4_0 q4_1 iq4_nl`, byte for byte.

    All-in bits per channel, the same at D = 64, 128 and 256 (scales belong to 32 channels):
    f16 16, q8_0 8.5, q5_1 6, q5_0 5.5, q4_1 5, q4_0 4.5, iq4_nl 4.5. Dynamic: nothing is fitted. No
    kernel reads ggml's bytes; attention dequantizes packed codes block by block.

    `rotation` "identity" is llama.cpp before April 2026; mainline since rotates quantized caches
    with an unsigned Hadamard ("walsh", see `attn_rot`); "hadamard" adds random signs.

    float16 scales overflow to inf beyond about 65504 times the largest code, which
    `checks.check_finite_stored` reports.

    Raises:
      ValueError: unknown type, or dim not a multiple of 32 (f16: of 8).
    """

    name: ClassVar[str] = "ggml"
    source: ClassVar[str] = "llama.cpp: ggml-quants.c (quantize_row_*_ref), rotation of PR 21038"
    scale_dtype: ClassVar[str] = "float16"

    type: str

    def __post_init__(self):
        super().__post_init__()
        checks.check_choice("type", self.type, KINDS)
        if self.type != "f16" and self.dim % BLOCK:
            raise ValueError(
                f"dim={self.dim} must be a multiple of {BLOCK}, a block of {self.type}"
            )

    @property
    def fields(self) -> tuple[Field, ...]:
        if self.type == "f16":
            return (Field(name="x", width=self.dim, bits=16, dtype="float16"),)
        kind = ggml_blocks.TYPES[self.type]
        names = ("scale", "minimum") if kind.minimum else ("scale",)
        width = self.dim // BLOCK
        return (
            Field(name="codes", width=self.dim, bits=kind.bits, dtype="codes"),
            *(Field(name=name, width=width, bits=16, dtype="float16") for name in names),
        )

    def quantize(self, arrays: Arrays, y: Float[Array, "*n D"]) -> Stored:
        if self.type == "f16":
            return {"x": y.astype(jnp.float16)}
        return ggml_blocks.quantize(ggml_blocks.TYPES[self.type], y)

    def dequantize(self, arrays: Arrays, stored: Stored) -> Float[Array, "*n D"]:
        if self.type == "f16":
            return stored["x"].astype(jnp.float32)
        return ggml_blocks.dequantize(ggml_blocks.TYPES[self.type], stored)

    @property
    def nbytes(self) -> int:
        """Bytes of one vector in ggml's layout, equal to `bits_per_vector / 8`."""
        if self.type == "f16":
            return 2 * self.dim
        return self.dim // BLOCK * ggml_blocks.TYPES[self.type].nbytes

    def to_bytes(self, stored: Mapping[str, Any]) -> np.ndarray:
        """ggml's bytes of stored vectors, uint8 [*n, nbytes], on the host."""
        if self.type == "f16":
            return np.ascontiguousarray(np.asarray(stored["x"]).astype("<f2")).view(np.uint8)
        return ggml_blocks.to_bytes(ggml_blocks.TYPES[self.type], stored)

    def from_bytes(self, data: np.ndarray) -> dict[str, np.ndarray]:
        """Stored fields from ggml's bytes, the inverse of `to_bytes`.

        Raises:
          ValueError: not uint8 with a last axis of `nbytes`.
        """
        if data.dtype != np.uint8 or data.shape[-1:] != (self.nbytes,):
            raise ValueError(
                f"{data.dtype=} {data.shape=} must be uint8 [..., {self.nbytes}] for"
                f" {self.type} at dim={self.dim}"
            )
        if self.type == "f16":
            return {"x": np.ascontiguousarray(data).view("<f2").astype(np.float16)}
        return ggml_blocks.from_bytes(ggml_blocks.TYPES[self.type], data)


def attn_rot(dim: int, side: str) -> dict[str, Any]:
    """Mainline llama.cpp's rotation of a quantized cache, as keywords of `Ggml`.

    Unsigned Hadamard in blocks of the largest power of two that divides a key's head dim, and of 64
    channels for values; none when dim is not a multiple of 64. Mainline also leaves it out when
    layers of one cache differ in head dim, or with LLAMA_ATTN_ROT_DISABLE=1: use no keywords then.

    Raises:
      ValueError: side is neither "k" nor "v".
    """
    checks.check_choice("side", side, ("k", "v"))
    if dim % 64:
        return {"rotation": "identity", "rotation_block": 0}
    return {"rotation": "walsh", "rotation_block": 64 if side == "v" else dim & -dim}


def mainline(dim: int, side: str, type: str) -> Ggml:
    """The codec of `--cache-type-k` or `-v` TYPE in mainline llama.cpp: f16 is never rotated."""
    return Ggml(dim=dim, type=type, **({} if type == "f16" else attn_rot(dim, side)))
