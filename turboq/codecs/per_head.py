"""Calibrated per-head codec: mean removed, rotation, per-head scale and fitted codebook."""

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from turboq import codebook as codebooks
from turboq.codecs import checks
from turboq.codecs.base import Arrays, Field, Stored
from turboq.codecs.scalar import ScalarCodec


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerHead(ScalarCodec):
    """x_hat = mean + scale R^T c with the head's own mean [D] and codebook [2**bits].

    At D = 64, 128, 256: bits + 0.25, 0.125, 0.0625 with a scale per vector, exactly bits with one
    per head. Static: fitted by `turboq_calibrate.fit`. The block-wise XLA attention reads it with a
    folded query; no Pallas kernel does yet.

    K: one fixed mean for all tokens shifts all logits of a query alike, so it is exact under
    softmax; it is folded into the query. V: the mean is added back once per output, times the
    probability mass on stored tokens.

    `scale`: "vector" stores one scale per vector (bits + 16/D bits per channel) under `scale_rule`;
    "head" uses the fitted array `scale` [] for all vectors and stores none (exactly `bits`), which
    needs `scale_rule="raw"` and cannot show NaN inputs in what it stores: check inputs before. A
    vector equal to the mean decodes to the mean exactly under "vector" only.

    Arrays of one head, float32: mean [D] (units of x), codebook [2**bits] ascending (unit scale),
    and for scale="head" scale [] (units of x).
    """

    name: ClassVar[str] = "per_head"
    calibrated: ClassVar[bool] = True
    source: ClassVar[str] = "mean removal and Lloyd-Max (1982) fitted per head"

    scale: str = "vector"

    def __post_init__(self):
        super().__post_init__()
        checks.check_choice("scale", self.scale, ("vector", "head"))
        if self.scale == "head" and self.scale_rule != "raw":
            raise ValueError(
                f"{self.scale_rule=} must be 'raw' with scale='head' (none per vector)"
            )

    @property
    def fields(self) -> tuple[Field, ...]:
        return super().fields if self.scale == "vector" else (self.codes_field(self.bits),)

    @property
    def array_shapes(self) -> dict[str, tuple[int, ...]]:
        shapes: dict[str, tuple[int, ...]] = {"mean": (self.dim,), "codebook": (2**self.bits,)}
        return shapes | ({"scale": ()} if self.scale == "head" else {})

    def codebook_of(self, arrays: Arrays) -> Float[Array, "levels"]:
        return arrays["codebook"]

    def scale_of(self, arrays: Arrays, stored: Stored) -> Float[Array, "*n"]:
        if self.scale == "vector":
            return super().scale_of(arrays, stored)
        return jnp.broadcast_to(arrays["scale"], stored["codes"].shape[:-1])

    def encode(self, arrays: Arrays, x: Float[Array, "*n D"]) -> Stored:
        if self.scale == "vector":
            return super().encode(arrays, x)
        y = self.turn.apply(self.centered(arrays, x))
        # A head that never varies has scale 0: everything it stores decodes to the mean.
        inverse = jnp.where(arrays["scale"] > 0, 1.0 / arrays["scale"], 0.0)
        return {"codes": codebooks.nearest(arrays["codebook"], y * inverse)}


def default_arrays(codec: PerHead) -> dict[str, np.ndarray]:
    """Arrays that make `per_head` act like `turboquant_mse`: no mean, sphere codebook, scale 1."""
    table = codebooks.lloyd_max("sphere", codec.bits, codec.dim).astype(np.float32)
    arrays = {"mean": np.zeros(codec.dim, np.float32), "codebook": table}
    return arrays | ({"scale": np.ones((), np.float32)} if codec.scale == "head" else {})
