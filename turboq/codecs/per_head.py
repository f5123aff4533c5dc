"""Calibrated per-head codec: mean removed, rotation, per-head scale and fitted codebook."""

# pyright: strict, reportUnknownMemberType=false

from __future__ import annotations

import dataclasses
from typing import ClassVar

import jax.numpy as jnp
import numpy as np
from jaxtyping import Array, Float

from turboq.codecs import checks
from turboq.codecs.base import Arrays, Field, Stored
from turboq.codecs.observed import Observed
from turboq.codecs.reading import Part, Reading
from turboq.codecs.scalar import ScalarCodec
from turboq.codecs.writing import Run, WriteTables, Writing
from turboq.numbers import codebook as codebooks
from turboq.numbers import codebook_fitting as fitting

MIN_PER_LEVEL = 16


@dataclasses.dataclass(frozen=True, kw_only=True)
class PerHead(ScalarCodec):
    """x_hat = mean + scale R^T c with the head's own mean [D] and codebook [2**bits].

    At D = 64, 128, 256: bits + 0.25, 0.125, 0.0625 with a scale per vector, exactly bits with one
    per head. Static (`fit`). Kernels read it with a folded query, a level
    table per head (`reading`).

    K: one fixed mean for all tokens shifts all logits of a query alike, so it is exact under
    softmax; it is folded into the query. V: the mean is added back once per output, times the
    probability mass on stored tokens.

    `scale`: "vector" stores one scale per vector (bits + 16/D bits per channel) under `scale_rule`;
    "head" uses the fitted array `scale` [] for all vectors and stores none (exactly `bits`), which
    needs `scale_rule="raw"` and cannot show NaN inputs in what it stores: check inputs before. A
    vector equal to the mean decodes to the mean exactly under "vector" only.

    Arrays of one head, float32: mean [D] (units of x), codebook [2**bits] ascending (unit scale),
    and for scale="head" scale [] (units of x).

    Source: Lloyd 1982, Max 1960: c_i = E[t | t_{i-1} < t < t_i], of the head's own coordinates.

    Raises:
      ValueError: a field out of range; the message names it and the allowed values.

    Examples:
      >>> from turboq import PerHead
      >>> PerHead(dim=64, bits=3).array_shapes
      {'mean': (64,), 'codebook': (8,)}
      >>> [PerHead(dim=64, bits=3, scale=scale).bits_per_channel for scale in ("vector", "head")]
      [3.25, 3.0]
    """

    name: ClassVar[str] = "per_head"
    source: ClassVar[str] = "mean removal and Lloyd-Max (1982) fitted per head"
    needs: ClassVar[tuple[str, ...]] = ("moments", "sample")

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

    def _fit(self, seen: Observed) -> dict[str, np.ndarray]:
        """mean = E[x], and the best codebook for y / rms(y) or y / scale, y = R (x - mean).

        Coordinates are every (N D / 2^15)-th of the sample; a head that never varies has scale 0
        and the Gaussian codebook.
        """
        y = (seen.x - seen.mean[:, None]) @ self.turn.matrix.T
        spread = np.sqrt(np.maximum(np.trace(seen.covariance, axis1=1, axis2=2), 0.0) / self.dim)
        arrays = {"mean": seen.mean}
        if self.scale == "head":
            arrays["scale"], rms = spread, spread[:, None, None]
        else:
            rms = np.sqrt(np.mean(y * y, axis=2, keepdims=True))
        unit = np.divide(y, rms, out=np.zeros_like(y), where=rms > 0).reshape(len(y), -1)
        few = np.sort(unit[:, :: max(1, unit.shape[1] >> 15)], axis=1)
        arrays["codebook"] = np.stack([self._codebook(u) for u in few])
        return arrays

    def _codebook(self, u: Float[np.ndarray, "n"]) -> Float[np.ndarray, "levels"]:
        levels = 2**self.bits
        if not np.any(u):
            return codebooks.lloyd_max("gaussian", self.bits)
        # The best of a histogram, with bins that widen outwards; then Lloyd's steps on the sample.
        place = np.arcsinh(u)
        place = (place - place[0]) / max(place[-1] - place[0], 1e-9) * max(1024, 8 * levels)
        counts = np.bincount(place.astype(np.int64))
        means = np.bincount(place.astype(np.int64), u) / np.maximum(counts, 1)
        return fitting.lloyd(u, fitting.fit_histogram(counts, means, levels), 10)

    @property
    def fewest_tokens(self) -> int:
        """16 coordinates for each level of the codebook, below which it is noise."""
        return max(super().fewest_tokens, -(-MIN_PER_LEVEL * 2**self.bits // self.dim))

    def codebook_of(self, arrays: Arrays) -> Float[Array, "levels"]:
        return arrays["codebook"]

    @property
    def reading(self) -> Reading | None:
        if self.scale == "vector":
            return super().reading
        part = Part(field="codes", width=self.dim, bits=self.bits, levels="table")
        return Reading(parts=(part,))

    def level_tables(self, arrays: Arrays) -> tuple[Float[Array, "L"], ...]:
        """The codebook, times the head's scale where none is stored."""
        table = arrays["codebook"]
        return (table if self.scale == "vector" else table * arrays["scale"],)

    @property
    def writing(self) -> Writing | None:
        if self.scale == "vector":
            return super().writing
        return Writing(parts=(Run(field="codes", width=self.dim, bits=self.bits),))

    def write_tables(self, arrays: Arrays) -> WriteTables:
        """A divided by the head's scale where none is stored."""
        tables = super().write_tables(arrays)
        if self.scale == "vector":
            return tables
        return dataclasses.replace(tables, matrix=tables.matrix * inverse(arrays["scale"]))

    def scale_of(self, arrays: Arrays, stored: Stored) -> Float[Array, "*n"]:
        if self.scale == "vector":
            return super().scale_of(arrays, stored)
        return jnp.broadcast_to(arrays["scale"], stored["codes"].shape[:-1])

    def encode(self, arrays: Arrays, x: Float[Array, "*n D"]) -> Stored:
        if self.scale == "vector":
            return super().encode(arrays, x)
        y = self.turn.apply(self.centered(arrays, x))
        return {"codes": codebooks.nearest(arrays["codebook"], y * inverse(arrays["scale"]))}


def inverse(scale: Float[Array, "*n"]) -> Float[Array, "*n"]:
    """1 / scale; 0 for a head that never varies: all it stores decodes to the mean."""
    return jnp.where(scale > 0, 1.0 / scale, 0.0)
